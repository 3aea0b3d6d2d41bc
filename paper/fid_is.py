"""FID and Inception Score: the one place where samples are scored.

Fréchet Inception Distance (Heusel et al. 2017, arXiv 1706.08500): a network trained to classify turns images into
features; those of samples and those of real images are taken for two Gaussians, whose distance is the score.
Inception Score (Salimans et al. 2016, arXiv 1606.03498): is each image clearly of one class, and are all of many?

    python paper/fid_is.py                                  # scores sets whose faults are known: start here
    python paper/fid_is.py runs/ddim_sampling/*.npz --reference mnist --plot

Samples: .npz files (arr_0: images (N, H, W, C); arr_1: labels, if there are any) or folders of images. The network is
a small classifier, trained on a part of the real images (minutes on a CPU) and kept beside the data, so that all scores
against one reference can be compared; where there are labels, it gives accuracy and diversity. Or it is Inception
(torch-fidelity's copy, 91 MB), as in published numbers. The distance is called FD by the classifier, FID by Inception:
the two cannot be compared. It falls as the number of samples grows: compare it with the row "real images", which are
other real images: as many as the samples, or all that there are. Published FIDs are those of 50,000 samples.
Writes to runs/fid_is/: scores.txt (the table); without samples known.png (the known sets beside their scores); with
--plot distance.png (over the number of samples) and tradeoff.png (accuracy, diversity). Left out: precision, recall."""
import argparse
import socket
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm


# 1. The scores ------------------------------------------------------------------------------------------------
def fid(features1, features2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), mu and S the mean and covariance of features (N, D). -> float

    The trace of the root is the sum of the singular values of S1^(1/2) S2^(1/2): real numbers whatever the rounding,
    where a square root of S1 S2 can turn complex.
    """
    (mu1, S1), (mu2, S2) = ((x.mean(0), x.T.cov()) for x in (features1.double(), features2.double()))
    roots = [vectors * values.clamp(min=0).sqrt() @ vectors.T for values, vectors in map(torch.linalg.eigh, (S1, S2))]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    return ((mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * overlap).item()


def inception_score(logits, splits=10):
    """exp E KL(p(y | x) || p(y)) of logits (N, classes), over consecutive parts -> mean, std over the parts"""
    N, log_p, scores = len(logits), logits.double().log_softmax(1), []
    for i in range(splits := min(splits, N)):
        part = log_p[i * N // splits : (i + 1) * N // splits]
        p_y = part.exp().mean(0)
        scores.append(((part.exp() * part).sum(1).mean() - torch.special.xlogy(p_y, p_y).sum()).exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def score_all(network, sets, real, labels, n_floor):
    """[(name, scores, features)] of sets [(name, images, labels or None)] and of real images (the floor); and the
    features of the reference. network: callable features, logits = network(images). real (N, C, H, W): the last
    n_floor are the floor, the others the reference. labels (N,): of the real images, or None."""
    rows, (features, logits) = [], extract(network, real)
    against, floor = features[:-n_floor], [x if x is None else x[-n_floor:] for x in (features, logits, labels)]
    found = [(name, *extract(network, images), y) for name, images, y in sets]
    for n in sorted({n_floor, *(min(len(images), n_floor) for _, images, _ in sets)}):
        found.append(("real images", *(x if x is None else x[:n] for x in floor)))
    for name, features, logits, y in found:
        order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))  # they may come class by class
        p, y_hat = logits.double().softmax(1).max(1)
        sure = (p > 0.9).double().mean().item()
        row = dict(n=len(features), FD=fid(features, against), IS=inception_score(logits[order]), sure=sure)
        if y is not None:  # diversity: the variance within a class, summed over D
            within = [features[y == k].double().var(0).sum() for k in y.unique() if (y == k).sum() > 1]
            row |= dict(accuracy=(y_hat == y).double().mean().item(), diversity=torch.tensor(within).mean().item())
        rows.append((name, row, features))
    return rows, against


def distance_by_number(features, against, draws=10, seed=0):
    """{n: (mean, std)} of the distance of n of the features, over random draws (one, where n is all of them)."""
    N, generator, curve = len(features), torch.Generator().manual_seed(seed), {}
    for n in sorted({N // 8, N // 4, N // 2, N} - {0, 1}):
        parts = [torch.randperm(N, generator=generator)[:n] for _ in range(draws if n < N else 1)]
        distances = torch.tensor([fid(features[part], against) for part in parts], dtype=torch.float64)
        curve[n] = distances.mean().item(), distances.std(correction=0).item()
    return curve


# 2. Images ----------------------------------------------------------------------------------------------------
def read(source, least=2):
    """The images of a folder or an .npz file, (N, C, H, W) uint8, and their labels (N,) or None."""
    try:
        if Path(source).is_dir():
            kinds, images, labels = (".png", ".jpg", ".jpeg", ".bmp", ".webp"), [], None
            for path in sorted(path for path in Path(source).iterdir() if path.suffix.lower() in kinds):
                image = Image.open(path)
                images.append(pil_to_tensor(image.convert("RGB")))
                if image.mode[0] in "IF" or images[-1].shape != images[0].shape:
                    raise ValueError(f"{path.name} has more than 8 bits, or not the size of those before it")
            images = torch.stack(images)
            images = images[:, :1] if (images == images[:, :1]).all() else images  # grey, whatever the files say
        else:
            with np.load(source) as file:
                pixels, labels = file["arr_0"], file.get("arr_1")
            low, high, is_float = pixels.min(), pixels.max(), pixels.dtype.kind == "f"
            if pixels.dtype != np.uint8 and not (is_float and (-1 if high <= 1 else 0) <= low and high <= 255):
                raise ValueError(f"{pixels.dtype} from {low} to {high}: uint8 or floats in [-1, 1] or [0, 255] wanted")
            if is_float and high <= 1:
                pixels = 127.5 * (pixels + 1) if low < 0 else 255 * pixels
            images = torch.from_numpy(pixels.round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        if labels is not None:
            labels = torch.from_numpy(labels.astype(np.int64, casting="same_kind"))
            if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 999:
                raise ValueError("arr_1 does not hold one label of 0 ... 999 for each image")
        if len(images) < least or images.shape[1] not in (1, 3):
            raise ValueError(f"{len(images)} images of {images.shape[1]} channels: {least} or more of 1 or 3 wanted")
    except Exception as error:
        fail(f"{source}: no folder of images and no .npz file that can be scored ({type(error).__name__}: {error})")
    return images, labels


def load_real(name, root):
    """Real images (N, C, H, W) uint8, their labels (N,) or None, their name, and the sizes of three parts of them:
    images to train the classifier with, to compare samples with, and for the floor."""
    generator = torch.Generator().manual_seed(0)
    if name in ("mnist", "cifar10"):
        file = {"mnist": "MNIST/raw/train-images-idx3-ubyte", "cifar10": "cifar-10-batches-py/batches.meta"}[name]
        try:
            dataset = {"mnist": MNIST, "cifar10": CIFAR10}[name]
            train, test = dataset(root, download=True), dataset(root, train=False, download=True)
            images = torch.cat([torch.as_tensor(train.data), torch.as_tensor(test.data)])
            images = images[:, None] if name == "mnist" else images.permute(0, 3, 1, 2).contiguous()
            labels = torch.cat([torch.as_tensor(train.targets), torch.as_tensor(test.targets)])
            N, n = len(train.data), len(test.data)  # the first half of MNIST's test images is easier, hence shuffled
            order = torch.cat([torch.arange(N), N + torch.randperm(n, generator=generator)])
            return images[order], labels[order], name, [N - N // 5, N // 5, n]
        except Exception as error:
            if Path(root, file).exists():
                fail(f"{Path(root, file).parent} cannot be read: delete it, and it is downloaded again ({error})")
            missing, name = name, {"mnist": "digits", "cifar10": "photos"}[name]
            print(f"\n!!! NO {missing.upper()}: {error}\n!!! In its place: scikit-learn's {name}.\n")
    if name == "digits":  # 1,797 digits of 8x8 pixels, enlarged
        images = F.interpolate(torch.from_numpy(load_digits().images)[:, None] / 16, size=28, mode="bicubic")
        images, labels = (255 * images.clamp(0, 1)).round().byte(), torch.from_numpy(load_digits().target)
    elif name == "photos":  # crops of two photographs at half their size
        photos = torch.stack([torch.tensor(photo) for photo in load_sample_images().images]).permute(0, 3, 1, 2)
        crops = F.avg_pool2d(photos.float(), 2).unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
        images = crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte()
        labels = torch.arange(len(images)) * 8 // len(images)
        print("Photos have no classes: here, a crop's class is the strip (four a photograph) that it was cut from.")
    else:
        images, labels = read(name, least=8)
    order, n = torch.randperm(len(images), generator=generator), len(images) // 4
    return images[order], None if labels is None else labels[order], name, [len(images) - 2 * n, n, n]


def known_sets(images, labels, n):
    """[(name, images, labels)]: n images each with faults that are known, made of real ones (N, C, H, W)."""
    real, y = images[:n].float(), labels[:n]
    blurred, noisy = F.avg_pool2d(real, 3, 1, 1).byte(), (real + 25 * torch.randn(real.shape)).clamp(0, 255).byte()
    one = (labels == labels[0]).nonzero()[:, 0].repeat(n)[:n]
    each = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()]).repeat(n)[:n]
    sets = [("blurred", blurred, y), ("noisy", noisy, y), ("wrong labels", images[:n], y.roll(1))]
    return sets + [("one class", images[one], labels[one]), ("one image a class", images[each], labels[each])]


# 3. Features --------------------------------------------------------------------------------------------------
def find_classifier(images, labels, path, device, steps):
    """A classifier of images (N, C, H, W) uint8 with labels (N,), as a network for `extract`; kept in that file."""
    torch.manual_seed(0)  # whatever --seed is: one classifier for all scores
    layers = []
    for c_in, c in zip([images.shape[1], 32, 64], [32, 64, 128], strict=True):
        layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(c), nn.ReLU()]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, 64), nn.ReLU())
    model = nn.Sequential(features, nn.Linear(64, int(labels.max()) + 1)).to(device, memory_format=torch.channels_last)
    made_of = [zlib.crc32(images.numpy()), zlib.crc32(labels.numpy()), steps]
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        assert saved["made_of"] == made_of
        model.load_state_dict(saved["network"])
    except Exception:  # no file, or one of other images
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in tqdm(range(steps), "training the classifier"):
            index = torch.randint(len(images), (128,))
            loss = F.cross_entropy(model(images[index].to(device).float() / 127.5 - 1), labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"network": model.state_dict(), "made_of": made_of}, path)
        except (OSError, RuntimeError) as error:
            print(f"The classifier cannot be kept in {path}: {error}")
    model.eval()
    return lambda part: (x := features(part.to(device).float() / 127.5 - 1), model[1](x))


def inception(weights, device):
    """The extractor behind published numbers: the Inception of 2015 (torch-fidelity), with a file of its weights."""
    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run what a pickle holds
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights).to(device)
    except Exception as error:
        fail(f"--features inception: no weights ({type(error).__name__}: {str(error)[:150]})")
    return lambda part: network(part.expand(-1, 3, -1, -1).to(device))


@torch.no_grad()
def extract(network, images):
    """Features (N, D) and logits (N, classes) of images (N, C, H, W) uint8."""
    parts = [[x.float().cpu() for x in network(part)] for part in tqdm(images.split(250), "features", leave=False)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


# 4. Run -------------------------------------------------------------------------------------------------------
def fail(message):
    """End the program with one line and exit code 2."""
    print(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    # The command line
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, flag = fail, parser.add_argument
    flag("samples", nargs="*", help=".npz files or folders of images (without any: sets whose faults are known)")
    flag("--reference", help="mnist, cifar10, digits, photos, a folder or an .npz file (what suits the samples)")
    flag("--features", choices=["classifier", "inception"], help="(classifier, if the reference has labels)")
    flag("--inception-weights", dest="weights", help="a file of Inception's weights, which is then used")
    flag("--plot", action="store_true", help="write distance.png and, if two sets have labels, tradeoff.png")
    flag("--seed", type=int, default=0, help="of the noise and of random draws, not of the classifier (0)")
    flag("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"), help="cuda, mps or cpu")
    flag("--out", type=Path, default=Path("runs/fid_is"), help="folder for pictures (runs/fid_is)")
    flag("--data-root", default="data", help="folder of MNIST, CIFAR-10 and the classifiers (data)")
    flag("--smoke", action="store_true", help="small data and hardly a classifier: does everything work?")
    args, start = parser.parse_args(argv), time.perf_counter()
    try:
        torch.manual_seed(args.seed)
        args.device = torch.ones(1, device=args.device).device
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()  # can it be written to?
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        fail(f"--seed {args.seed}, --device {args.device} or --out {args.out} cannot be used: {error}")
    socket.setdefaulttimeout(10)  # seconds
    network = inception(args.weights, args.device) if args.weights or args.features == "inception" else None

    # The samples, and the real images that they are compared with
    sets = [("/".join(path.parts[-2:]).removesuffix(".npz"), *read(path)) for path in map(Path, args.samples)]
    shape = tuple(sets[0][1].shape[1:]) if sets else (1, 28, 28)
    suits = {(1, 28, 28): ["mnist", "digits"], (3, 32, 32): ["cifar10", "photos"]}.get(shape)
    if not args.reference and not suits:
        fail(f"--reference is needed: mnist suits (1, 28, 28), cifar10 (3, 32, 32), and these images are {shape}")
    real, labels, name, (n_train, _, n_floor) = load_real(args.reference or suits[args.smoke], args.data_root)
    if labels is None and (args.features == "classifier" or not sets):
        fail(f"--reference {name} has no labels, which the classifier and the known sets need")
    network = network or (inception(None, args.device) if labels is None else None)
    sets = sets or known_sets(real[-n_floor:], labels[-n_floor:], min(1000, n_floor))
    sets = [(name, x.expand(-1, max(x.shape[1], real.shape[1]), -1, -1), y) for name, x, y in sets]
    if not network and (min(real.shape[2:]) < 8 or any(x.shape[1:] != real.shape[1:] for _, x, _ in sets)):
        fail(f"--features classifier needs images of one size, 8x8 or more; those of {name} are {list(real.shape[1:])}")

    # The scores
    FD = "FID" if network else "FD"
    if network:  # Inception has seen none of the images, and its classes are not those of the labels
        sets, labels = [(name, images, None) for name, images, _ in sets], None
    else:
        path = Path(args.data_root, f"classifier_{Path(name).stem}{'_smoke' * args.smoke}.pt")
        network = find_classifier(real[:n_train], labels[:n_train], path, args.device, 3 if args.smoke else 1000)
        real, labels = real[n_train:], labels[n_train:]  # the classifier has seen the others
    rows, against = score_all(network, sets, real, labels, n_floor)
    width, most = max(len(name) for name, _, _ in rows), min(n_floor, max(len(images) for _, images, _ in sets))
    table = [f"{FD}: the distance to {len(against):,} images of {name}; over 0.9: classified with that confidence",
             f"{'':{width}}  samples {FD:>9}  Inception Score  over 0.9  accuracy  diversity"]
    columns = "{n:8,} {FD:9.4g} {IS[0]:9.3f} +- {IS[1]:.3f} {sure:9.1%}"
    for name, row, _ in rows:
        more = " {accuracy:9.1%} {diversity:10.4g}" if "accuracy" in row else ""
        table.append(f"{name:{width}} " + (columns + more).format(**row))
    print("\n" + "\n".join(table))
    (args.out / "scores.txt").write_text("\n".join(table) + "\n")

    # Pictures
    shown = rows[: len(sets)] + [row for row in rows[len(sets) :] if row[1]["n"] == most]  # one of the floors
    if not args.samples:
        column = Figure(figsize=(8, 6), layout="constrained").subplots(len(sets) + 1)
        titles, grids = [f"{table[1]}\n{table[2]}", *table[3:]], [*sets, ("", real[-n_floor:], None)]
        for axes, (_, x, _), title in zip(column, grids, titles, strict=False):
            axes.imshow(make_grid(x[:14], nrow=14).permute(1, 2, 0))
            axes.set_title(title, loc="left", fontsize=8, family="monospace")
            axes.axis("off")
        axes.figure.savefig(args.out / "known.png", dpi=150)
    if args.plot:
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        for name, _, features in shown:
            curve = distance_by_number(features, against, seed=args.seed)
            axes.errorbar(list(curve), *zip(*curve.values(), strict=True), marker="o", capsize=3, label=name)
        axes.set(xlabel="number of samples", ylabel=f"{FD} (mean of 10 draws)", xscale="log", yscale="log")
        axes.set_xticks(list(curve), [str(n) for n in curve])
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        axes.figure.legend(loc="outside right upper", fontsize=8)
        axes.figure.savefig(args.out / "distance.png")
    if args.plot and sum(y is not None for _, _, y in sets) > 1:
        axes = Figure(figsize=(7, 4), layout="constrained").subplots()
        for name, row, _ in (row for row in shown if "accuracy" in row[1]):
            axes.plot(row["diversity"], row["accuracy"], "k*" if name == "real images" else "o", label=name)
        axes.set(xlabel="diversity: variance within a class", ylabel="accuracy", ylim=(0, 1.05))
        axes.figure.legend(loc="outside right upper", fontsize=8)
        axes.figure.savefig(args.out / "tradeoff.png")
    print(f"\n{len(sets)} sets scored in {time.perf_counter() - start:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
