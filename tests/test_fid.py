"""fid_is.py against closed forms, scipy and torch-fidelity; what it compares with what; what it says of bad input."""
import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image

script = load("paper/fid_is.py")
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def features_with(mean, cov, n=400, seed=0):
    """n points whose sample mean and sample covariance are these, to rounding."""
    mean, cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=generator(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def random_cov(d, seed):
    a = torch.randn(d, d, dtype=torch.float64, generator=generator(seed))
    return a @ a.T / d + 0.1 * torch.eye(d)


def random_images(folder, n, size=(12, 12), seed=0, mode="RGB"):
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for i in range(n):
        Image.fromarray(pixels[i]).convert(mode).save(folder / f"{i:03}.png")
    return pixels


# The scores -----------------------------------------------------------------------------------------------------------


def test_fid_of_diagonal_gaussians():
    """|mu1 - mu2|^2 + sum of (s1 - s2)^2, in closed form."""
    mu1, mu2 = [0.0, 1.0, 2.0], [1.0, 1.0, -1.0]
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 1.0])
    one, two = features_with(mu1, (s1**2).diag()), features_with(mu2, (s2**2).diag(), n=300, seed=1)
    assert script.fid(one, two) == pytest.approx(1 + 0 + 9 + 4 + 0 + 0.25, abs=1e-8)
    assert script.fid(one.float(), two.float()) == pytest.approx(14.25, abs=1e-4)


def test_fid_of_full_gaussians():
    """Against scipy's square root of a matrix and torch-fidelity, and symmetric."""
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    S1, S2 = random_cov(12, 0), random_cov(12, 1)
    mu1, mu2 = torch.arange(12) / 10, torch.ones(12)
    expected = ((mu1 - mu2) ** 2).sum().item() + np.trace(S1 + S2 - 2 * sqrtm((S1 @ S2).numpy()).real)
    one, two = features_with(mu1, S1), features_with(mu2, S2, n=250, seed=1)
    assert script.fid(one, two) == pytest.approx(expected, abs=1e-6)
    assert script.fid(two, one) == pytest.approx(expected, abs=1e-6)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one, two)), False)
    assert script.fid(one, two) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)


def test_fid_of_fewer_points_than_dimensions():
    """Rank-deficient: 20 points in 64 dimensions. The distance to themselves, and to themselves moved."""
    points = torch.randn(20, 64, generator=generator()).double()
    assert abs(script.fid(points, points)) < 1e-6
    assert script.fid(points, points + 0.5) == pytest.approx(64 * 0.25, abs=1e-6)
    zero = torch.zeros(5, 64)
    assert script.fid(points, zero) == pytest.approx((points.mean(0) ** 2).sum().item() + points.var(0).sum().item())


def test_inception_score_of_known_answers():
    """Every image of every class alike: 1. Surely of one of ten classes, all as frequent: 10."""
    score = script.inception_score
    assert score(torch.zeros(100, 10)) == pytest.approx((1, 0), abs=1e-12)
    assert score(1000 * torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0), abs=1e-9)
    assert score(1000 * torch.eye(10)[torch.zeros(100, dtype=torch.long)]) == pytest.approx((1, 0), abs=1e-9)
    assert score(1000 * torch.eye(10)[:4], splits=1) == pytest.approx((4, 0), abs=1e-9)


def test_inception_score_is_that_of_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(503, 30, generator=generator())
    for splits in (1, 5, 10):
        mean, std = script.inception_score(logits, splits)
        theirs = isc_features_to_metric(logits, splits, shuffle=False)
        assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(theirs["inception_score_std"], abs=1e-9)


# The table ------------------------------------------------------------------------------------------------------------


def grey(levels):
    """Images (N, 1, 8, 8) of one grey level each."""
    return torch.as_tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


def network_of_greys(images):
    """Features: the grey level and 0. Class: the level's tens, surely for even levels, with p = 0.6 for odd ones."""
    level = images[:, 0, 0, 0].double()
    p = torch.where(level % 2 == 0, 0.999, 0.6)[:, None]
    others = (1 - p) / 9
    one_hot = torch.eye(10).double()[(level // 10).long()]
    return torch.stack([level, 0 * level], 1), (one_hot * p + (1 - one_hot) * others).log()


def test_the_table_of_a_network_whose_answers_are_known():
    """Distance, confidence, accuracy and diversity of grey levels, by hand; the floor is the last real images."""
    against, floor = [0, 20, 40, 60], [1, 21, 41]  # mean 30, variance 2000 / 3; and mean 21, variance 400
    sets = [
        ("three", grey([10, 12, 31, 53]), torch.tensor([1, 1, 2, 5])),  # one of four labels is wrong
        ("bare", grey([70, 70]), None),
    ]
    rows, features = script.score_all(network_of_greys, sets, grey(against + floor), torch.arange(7), 3)
    assert features[:, 0].tolist() == against
    assert [(name, row["n"]) for name, row, _ in rows] == [
        ("three", 4), ("bare", 2), ("real images", 2), ("real images", 3),
    ]
    table = [row for _, row, _ in rows]

    def distance(levels):
        levels = torch.tensor(levels).double()
        return (levels.mean().item() - 30) ** 2 + (levels.std().item() - (2000 / 3) ** 0.5) ** 2

    expected = [distance(levels) for levels in ([10, 12, 31, 53], [70, 70], floor[:2], floor)]
    assert [row["FD"] for row in table] == pytest.approx(expected, abs=1e-6)
    assert [row["sure"] for row in table] == [0.5, 1, 0, 0]
    assert table[0]["accuracy"] == 0.75 and table[0]["diversity"] == pytest.approx(2)  # of 10 and 12; the rest is alone
    assert "accuracy" not in table[1] and "diversity" not in table[1]
    assert table[3]["accuracy"] == 0  # the floor's labels are the last three: 4, 5, 6, and it sees 0, 2, 4
    assert [features[:, 0].tolist() for _, _, features in rows] == [[10, 12, 31, 53], [70, 70], floor[:2], floor]


def test_the_inception_score_of_samples_that_come_class_by_class():
    """In their own order each split would hold one class only, and the score would be 1."""
    sets = [("sorted", grey([10 * (i // 20) for i in range(200)]), None)]
    rows, _ = script.score_all(network_of_greys, sets, grey(range(0, 80, 2)), None, 20)
    assert rows[0][1]["IS"][0] > 6


def test_accuracy_and_diversity_of_two_classes():
    """Diversity is the mean over classes of the variance within them, summed over the features."""
    images, y = grey([10, 14, 30, 30]), torch.tensor([1, 1, 3, 3])
    rows, _ = script.score_all(network_of_greys, [("a", images, y)], grey(range(8)), None, 4)
    assert rows[0][1]["diversity"] == pytest.approx((8 + 0) / 2) and rows[0][1]["accuracy"] == 1
    assert "accuracy" not in rows[1][1]  # no labels of the real images are known


def test_the_distance_falls_with_the_number_of_samples():
    """The mean over draws is above the distance of all; all of them are one draw, without a spread."""
    features, against = torch.randn(400, 8, generator=generator()), torch.randn(2000, 8, generator=generator(1))
    curve = script.distance_by_number(features, against)
    assert list(curve) == [50, 100, 200, 400]
    assert curve[400] == (pytest.approx(script.fid(features, against), abs=1e-12), 0)
    means, stds = zip(*curve.values(), strict=True)
    assert list(means) == sorted(means, reverse=True) and min(stds[:3]) > 0
    again, other = (script.distance_by_number(features, against, seed=seed) for seed in (0, 1))
    assert again == curve and other[50] != curve[50]
    two = torch.tensor([[0.0, 1.0], [2.0, 5.0]])  # half of these is one image, which has no covariance
    assert script.distance_by_number(two, against[:, :2]).keys() == {2}


# Images ---------------------------------------------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_images(tmp_path):
    """A folder; bytes; floats of [-1, 1], of [0, 1] and of [0, 255]; a file of guided-diffusion with mu and sigma."""
    pixels = random_images(tmp_path / "folder", 40)
    np.savez(tmp_path / "bytes.npz", pixels)
    np.savez(tmp_path / "signed.npz", pixels.astype(np.float32) / 127.5 - 1)
    np.savez(tmp_path / "unit.npz", pixels.astype(np.float64) / 255)
    np.savez(tmp_path / "large.npz", pixels.astype(np.float32))
    labels = np.arange(40, dtype=np.int32)
    np.savez(tmp_path / "guided.npz", mu=np.zeros(9), sigma=np.eye(9), arr_0=pixels, arr_1=labels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for name in ("folder", "bytes.npz", "signed.npz", "unit.npz", "large.npz", "guided.npz"):
        opened, labels = script.read(tmp_path / name)
        assert torch.equal(opened, images) and opened.is_contiguous(), name
        assert (labels is None) == (name != "guided.npz")
    assert labels.tolist() == list(range(40)) and labels.dtype == torch.int64
    random_images(tmp_path / "grey", 3, mode="L")
    assert script.read(tmp_path / "grey")[0].shape == (3, 1, 12, 12)
    Image.open(tmp_path / "grey" / "000.png").convert("RGB").save(tmp_path / "grey" / "000.png")  # as save_image does
    assert script.read(tmp_path / "grey")[0].shape == (3, 1, 12, 12)


@pytest.mark.parametrize("value, dtype, byte", [(255, "uint8", 255), (1, "float32", 255), (-1, "float32", 0)])
def test_images_of_one_value_can_be_read(value, dtype, byte, tmp_path):
    np.savez(tmp_path / "white.npz", np.full((4, 8, 8, 1), value, dtype=dtype))
    assert (script.read(tmp_path / "white.npz")[0] == byte).all()


def write_idx(path, array):
    """A file like MNIST's: two zeros, type 8 (bytes), the axes, their sizes, and the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, n_train=100, n_test=40, missing=0):
    """Training images of the grey levels 0 ... 99, test images of 200 ... 239; the label is the level modulo 10."""
    for name, levels in (("train", np.arange(n_train)), ("t10k", 200 + np.arange(n_test))):
        images = np.broadcast_to(levels[:, None, None], (len(levels), 28, 28))
        write_idx(root / "MNIST" / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(root / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte", levels[: len(levels) - missing] % 10)


def test_mnist_has_three_parts_and_its_labels(tmp_path):
    """Trained with: the first 80 training images. Compared with: the last 20. The floor: test images, shuffled."""
    write_mnist(tmp_path)
    images, labels, name, sizes = script.load_real("mnist", tmp_path)
    levels = images[:, 0, 0, 0].long()
    assert images.shape == (140, 1, 28, 28) and images.dtype == torch.uint8
    assert name == "mnist" and sizes == [80, 20, 40]
    assert levels[:100].tolist() == list(range(100)) and (levels % 10).tolist() == labels.tolist()
    assert levels[100:].sort().values.tolist() == list(range(200, 240)) != levels[100:].tolist()


def test_cifar10_with_few_test_images(tmp_path, monkeypatch):
    """Colours and labels at their place, and a floor as small as it is."""
    class Made:
        def __init__(self, root, train=True, download=False):
            n = 50 if train else 6
            self.data, self.targets = np.zeros((n, 32, 32, 3), np.uint8), [i % 10 for i in range(n)]
            self.data[..., 1] = np.arange(n)[:, None, None] + (0 if train else 100)

    monkeypatch.setattr(script, "CIFAR10", Made)
    images, labels, name, sizes = script.load_real("cifar10", tmp_path)
    assert images.shape == (56, 3, 32, 32) and sizes == [40, 10, 6] and name == "cifar10"
    assert images[7, :, 3, 4].tolist() == [0, 7, 0] and labels[7] == 7
    assert (images[50:, 1, 0, 0].long() - 100).tolist() == labels[50:].tolist() and images.is_contiguous()


def test_small_sets_hold_out_a_quarter_twice(tmp_path):
    for name, shape, classes in (("digits", (1797, 1, 28, 28), 10), ("photos", (6716, 3, 32, 32), 8)):
        images, labels, found, sizes = script.load_real(name, tmp_path)
        assert images.shape == shape and images.dtype == torch.uint8 and found == name
        assert sum(sizes) == len(images) and sizes[1] == sizes[2] == len(images) // 4
        for part in labels.split(sizes):
            assert part.unique().tolist() == list(range(classes))
    assert torch.equal(images, script.load_real("photos", tmp_path)[0])


def test_digits_have_their_own_labels(tmp_path):
    from sklearn.datasets import load_digits

    images, labels, _, _ = script.load_real("digits", tmp_path)
    small = torch.nn.functional.interpolate(images.float(), size=8, mode="area").flatten(1)
    originals = torch.from_numpy(load_digits().data).float()
    nearest = torch.cdist(small / 255 * 16, originals).argmin(1)
    assert (torch.from_numpy(load_digits().target)[nearest] == labels).all()


def test_without_mnist_digits_step_in_loudly(tmp_path, capsys, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(script, "MNIST", refuse), monkeypatch.setattr(script, "CIFAR10", refuse)
    for name, small in (("mnist", "digits"), ("cifar10", "photos")):
        assert script.load_real(name, tmp_path)[2] == small
        notice = capsys.readouterr().out
        assert f"NO {name.upper()}" in notice and "no route to host" in notice and small in notice


@pytest.mark.parametrize("fault", ["labels", "cut off"])
def test_a_damaged_data_set_is_one_line(fault, tmp_path, capsys):
    write_mnist(tmp_path, missing=3 if fault == "labels" else 0)
    if fault == "cut off":
        (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    with pytest.raises(SystemExit) as stop:
        script.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "MNIST" in error and "delete it" in error
    assert not list(tmp_path.glob("out/*"))


def test_known_sets_have_the_faults_they_are_named_for():
    images, labels = torch.randint(0, 256, (300, 1, 12, 12), generator=generator()).byte(), torch.arange(300) % 10
    sets = {name: (x, y) for name, x, y in script.known_sets(images, labels, 200)}
    assert all(x.shape == (200, 1, 12, 12) and x.dtype == torch.uint8 and len(y) == 200 for x, y in sets.values())
    real, spread = images[:200].float(), images.float().std(dim=(2, 3)).mean()
    assert sets["blurred"][0].float().std(dim=(2, 3)).mean() < spread / 2
    assert 10 < (sets["noisy"][0].float() - real).abs().mean() < 25
    assert torch.equal(sets["wrong labels"][0], images[:200]) and (sets["wrong labels"][1] != labels[:200]).all()
    assert sets["one class"][1].unique().tolist() == [0] and len(sets["one class"][0].unique(dim=0)) == 30
    assert sets["one image a class"][1].bincount().tolist() == [20] * 10
    assert len(sets["one image a class"][0].unique(dim=0)) == 10


# Features -------------------------------------------------------------------------------------------------------------


def squares(n=200):
    """Squares at two places, in noise, and which place it is."""
    labels = torch.arange(n) % 2
    images = torch.randint(0, 120, (n, 1, 16, 16), generator=generator()).byte()
    images[labels == 0, :, 2:6, 2:6] += 100
    images[labels == 1, :, 9:13, 9:13] += 100
    return images, labels


def test_the_classifier_learns_and_is_kept(tmp_path, monkeypatch):
    """64 features and the logits; the same after it was read from its file; trained anew for other images or steps."""
    images, labels = squares()
    path = tmp_path / "new" / "classifier_squares.pt"
    network = script.find_classifier(images, labels, path, CPU, 30)
    features, logits = script.extract(network, images)
    assert features.shape == (200, 64) and logits.shape == (200, 2) and (features >= 0).all()
    assert (logits.argmax(1) == labels).all()
    alone, _ = script.extract(network, images[5:6])  # an image's features do not depend on the other images
    assert torch.allclose(alone, features[5:6], atol=1e-4)
    written = path.read_bytes()
    torch.manual_seed(5)  # whatever was drawn before
    with monkeypatch.context() as patch:
        patch.delattr(torch.optim, "AdamW")  # nothing is trained
        again = script.extract(script.find_classifier(images, labels, path, CPU, 30), images)
    assert torch.equal(again[0], features) and path.read_bytes() == written
    path.write_text("no classifier")
    anew = script.extract(script.find_classifier(images, labels, path, CPU, 30), images)
    assert torch.equal(anew[1], logits)  # of one seed
    for other in ((images.flip(3), labels, 30), (images, 1 - labels, 30), (images, labels, 2)):
        before = path.read_bytes()
        script.find_classifier(*other[:2], path, CPU, other[2])
        assert path.read_bytes() != before


def test_a_classifier_that_cannot_be_kept_is_used_all_the_same(tmp_path, capsys):
    (tmp_path / "file").touch()
    network = script.find_classifier(*squares(8), tmp_path / "file" / "classifier.pt", CPU, 1)
    assert script.extract(network, squares(8)[0])[0].shape == (8, 64)
    assert "cannot be kept" in capsys.readouterr().out


def test_the_classifier_never_sees_what_samples_are_compared_with(tmp_path, monkeypatch):
    """MNIST whose grey levels say where an image comes from: what is trained with, compared with, and the floor."""
    write_mnist(tmp_path)
    np.savez(tmp_path / "samples.npz", np.full((10, 28, 28, 1), 7, np.uint8), np.arange(10))
    seen = {}

    def find_classifier(images, labels, path, device, steps):
        seen.update(trained=images[:, 0, 0, 0].tolist(), labels=labels.tolist(), path=path, steps=steps)
        return network_of_greys

    def score_all(network, sets, real, labels, n_floor):
        levels = real[:, 0, 0, 0].tolist()
        seen.update(against=levels[:-n_floor], floor=levels[-n_floor:], floor_labels=labels[-n_floor:].tolist())
        seen.update(sets=sets)
        row = dict(n=10, FD=12.3, IS=(4.56, 0.1), sure=0.5, accuracy=0.25, diversity=7.5)
        return [("made", row, torch.zeros(2, 2))], torch.zeros(20, 2)

    monkeypatch.setattr(script, "find_classifier", find_classifier), monkeypatch.setattr(script, "score_all", score_all)
    flags = ["--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    script.main([str(tmp_path / "samples.npz"), *flags])
    assert seen["trained"] == list(range(80)) and seen["labels"] == [i % 10 for i in range(80)]
    assert seen["against"] == list(range(80, 100))
    assert sorted(seen["floor"]) == list(range(200, 240)) and seen["floor_labels"] == [i % 10 for i in seen["floor"]]
    assert seen["path"] == tmp_path / "classifier_mnist.pt" and seen["steps"] == 1000
    [(name, images, labels)] = seen["sets"]
    assert name.endswith("/samples") and (images == 7).all() and labels.tolist() == list(range(10))
    text = (tmp_path / "out" / "scores.txt").read_text()
    assert "FD: the distance to 20 images of mnist" in text
    assert text.splitlines()[-1].split() == ["made", "10", "12.3", "4.560", "+-", "0.100", "50.0%", "25.0%", "7.5"]
    script.main(["--reference", "mnist", *flags])  # the known sets are made of images new to the classifier
    for name, images, _ in seen["sets"]:
        if name in ("wrong labels", "one class", "one image a class"):
            assert images.min() >= 200


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of made weights for torch-fidelity's Inception."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        state = module.FeatureExtractorInceptionV3("made", ["2048"]).state_dict()
    factors = {"conv.weight": 3, "fc.weight": 0.02}  # so that images differ in features, and in logits not too much
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: factors.get(".".join(name.split(".")[-2:]), 1) * x for name, x in state.items()}, path)
    return path


def test_the_inception_path_gives_torch_fidelity_s_numbers(inception_weights, tmp_path, monkeypatch):
    """The same made weights, the same folders of PNGs, of different sizes: FID and Inception Score.

    Of 64 features of an earlier layer: torch-fidelity's square root of a 2048 x 2048 matrix takes 15 seconds.
    """
    import torch_fidelity

    asked, made = [], script.FeatureExtractorInceptionV3
    monkeypatch.setattr(script, "FeatureExtractorInceptionV3", lambda name, features, weights: (
        asked.append(features) or made(name, ["64", *features[1:]], weights)))

    random_images(tmp_path / "samples", 3, (12, 12))
    real = random_images(tmp_path / "real", 8, (16, 16), 1)
    calls, score_all = [], script.score_all
    monkeypatch.setattr(script, "score_all", lambda *args: calls.append((args[0], *score_all(*args))) or calls[0][1:])
    script.main(
        ["--device", "cpu", str(tmp_path / "samples"), "--reference", str(tmp_path / "real"), "--out", str(tmp_path)]
        + ["--features", "inception", "--inception-weights", str(inception_weights)]
    )
    network, rows, against = calls[0]
    (tmp_path / "compared").mkdir()
    for i in torch.randperm(8, generator=generator())[:6].tolist():  # the other two are the floor
        Image.fromarray(real[i]).save(tmp_path / "compared" / f"{i}.png")
    theirs = torch_fidelity.calculate_metrics(
        **dict(input1=str(tmp_path / "samples"), input2=str(tmp_path / "compared"), cuda=False, fid=True, isc=True),
        **dict(feature_extractor_weights_path=str(inception_weights), isc_splits=1, cache=False, verbose=False),
        feature_layer_fid="64", save_cpu_ram=True,  # no worker processes
    )
    row = rows[0][1]
    assert row["FD"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4) and row["FD"] > 0
    assert asked == [["2048", "logits_unbiased"]] and against.shape == (6, 64)
    assert [row["n"] for _, row, _ in rows] == [3, 2]
    _, logits = script.extract(network, script.read(tmp_path / "samples")[0])
    score, _ = script.inception_score(logits, splits=1)
    assert score - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3) and score > 1.001
    assert "FID: the distance to 6 images" in (tmp_path / "scores.txt").read_text()


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "weights.pth")
    with pytest.raises(SystemExit):
        script.inception(str(tmp_path / "weights.pth"), CPU)
    assert "--features inception" in capsys.readouterr().err and not (tmp_path / "sprung").exists()


# The command line -----------------------------------------------------------------------------------------------------


def small_reference(path, n=40, classes=2):
    """An .npz of labelled images."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    np.savez(path, pixels, np.arange(n) % classes)
    return pixels


def test_known_sets_explain_the_scores(tmp_path):
    script.main(["--smoke", "--device", "cpu", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"known.png", "scores.txt"}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["classifier_digits_smoke.pt"]
    text = (tmp_path / "out" / "scores.txt").read_text()
    assert "449 images of digits" in text
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == [
        "blurred", "noisy", "wrong labels", "one class", "one image a class", "real images",
    ]


def test_plot_adds_its_files(tmp_path, monkeypatch):
    """The table is the same with and without it; tradeoff.png is drawn of two labelled sets or more."""
    figures = []

    class Kept(script.Figure):
        def savefig(self, path, **options):
            super().savefig(path, **options)
            figures.append(self)

    monkeypatch.setattr(script, "Figure", Kept)
    small_reference(tmp_path / "real.npz")
    for name, n in (("a", 7), ("b", 9)):
        small_reference(tmp_path / f"{name}.npz", n)
    np.savez(tmp_path / "bare.npz", np.load(tmp_path / "a.npz")["arr_0"])
    flags = ["--smoke", "--device", "cpu", "--reference", str(tmp_path / "real.npz"), "--data-root", str(tmp_path)]
    files = {}
    for out, names, plot in (("1", "ab", []), ("2", "ab", ["--plot"]), ("3", ["a", "bare"], ["--plot"])):
        script.main([*(str(tmp_path / f"{name}.npz") for name in names), *flags, *plot, "--out", str(tmp_path / out)])
        files[out] = {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
    assert list(files["1"]) == ["scores.txt"] and files["1"]["scores.txt"] == files["2"]["scores.txt"]
    assert set(files["2"]) == {"scores.txt", "distance.png", "tradeoff.png"}
    assert set(files["3"]) == {"scores.txt", "distance.png"}
    for name in ("distance.png", "tradeoff.png"):
        with Image.open(tmp_path / "2" / name) as image:
            assert len(image.convert("L").getcolors()) > 20
    distance, tradeoff, _ = figures
    names = [f"{tmp_path.name}/a", f"{tmp_path.name}/b", "real images"]
    assert all([text.get_text() for text in figure.legends[0].get_texts()] == names for figure in (distance, tradeoff))
    text = files["1"]["scores.txt"].decode().splitlines()
    rows = [line.split() for line in text[2:]]
    assert [row[:1] + row[-8:-7] for row in rows[:2]] == [[f"{tmp_path.name}/a", "7"], [f"{tmp_path.name}/b", "9"]]
    assert [row[2] for row in rows[2:]] == ["7", "9", "10"]  # as many as in a set, and all there are
    axes, shown = tradeoff.axes[0], [*rows[:2], rows[3]]
    assert [line.get_label() for line in axes.lines] == names
    points = [(f"{100 * y:.1f}%", f"{x:.4g}") for line in axes.lines for x, y in line.get_xydata()]
    assert points == [(row[-2], row[-1]) for row in shown]  # accuracy over diversity, of the floor that of most images
    assert [[f"{y:.4g}" for y in line.get_ydata()][-1] for line in distance.axes[0].lines[::3]] == [
        row[-7] for row in shown]  # of all images of a set; each has two more lines, the caps of its error bars


@pytest.mark.parametrize("shape, reference", [((28, 28, 1), "digits"), ((32, 32, 3), "photos"), ((8, 8, 3), None)])
def test_the_reference_that_suits_the_samples(shape, reference, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8))
    flags = ["--smoke", "--device", "cpu", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    if reference:
        script.main([str(tmp_path / "a.npz"), *flags])
        assert f"images of {reference}" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as stop:
            script.main([str(tmp_path / "a.npz"), *flags])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "--reference" in error and error.count("\n") == 1


def bad_pixels(bad):
    """An array that cannot be scored."""
    array = np.zeros((4, 8, 8, 1), dtype=np.float32)
    array[0, 0, 0, 0] = {"nan": np.nan, "range": 300, "below": -2, "between": -1}.get(bad, 0)
    array[1] = 1.02 if bad == "between" else 0  # [-1, 1] with pixels that were not clipped
    if bad in ("uint16", "int64"):
        return array.astype(bad)
    arrays = {"flat": array[0], "channels": array.repeat(4, axis=3), "none": array[:0], "size": array[:, :7]}
    return arrays.get(bad, array)


BAD_SAMPLES = ["empty", "mixed", "one", "text", "cut off", "16 bit", "missing", "npy", "other keys", "model.pt"]
BAD_ARRAYS = ["nan", "range", "below", "between", "flat", "channels", "none", "size", "uint16", "int64"]
BAD_LABELS = ["shorter", "floats", "negative", "beyond"]
BAD_FLAGS = ["weights", "reference", "unlabelled", "few", "device", "seed", "out", "folder alone", "features", "flag"]


@pytest.mark.parametrize("cases", [BAD_SAMPLES, BAD_ARRAYS, BAD_LABELS, BAD_FLAGS], ids=lambda cases: cases[0])
def test_bad_input_is_one_line_and_nothing_is_written(cases, tmp_path, capsys, monkeypatch):
    for bad in cases:
        (tmp_path / bad).mkdir()
        capsys.readouterr()
        check_bad_input(bad, tmp_path / bad, capsys, monkeypatch)


def check_bad_input(bad, tmp_path, capsys, monkeypatch):
    def find_classifier(*args):
        raise AssertionError("told only after training")

    monkeypatch.setattr(script, "find_classifier", find_classifier)
    small_reference(tmp_path / "real.npz")
    folder, pixels = tmp_path / "folder", small_reference(tmp_path / "good.npz", 4)
    random_images(folder, 1 if bad == "one" else 4, size=(8, 8), mode="L")
    samples, reference, flags = [tmp_path / "bad.npz"], tmp_path / "real.npz", []
    if bad in BAD_ARRAYS:
        np.savez(samples[0], bad_pixels(bad))
    elif bad in BAD_LABELS:
        y = dict(shorter=np.arange(3), floats=np.zeros(4), negative=-np.arange(4), beyond=1000 + np.arange(4))[bad]
        np.savez(samples[0], pixels, y)
    elif bad in BAD_FLAGS:
        np.savez(tmp_path / "bare.npz", small_reference(tmp_path / "x.npz"))
        np.savez(tmp_path / "few.npz", pixels, np.arange(4))
        places = {"reference": "nowhere", "unlabelled": "bare.npz", "few": "few.npz", "folder alone": "folder"}
        reference = tmp_path / places.get(bad, "real.npz")
        samples = [] if bad == "folder alone" else [tmp_path / "good.npz"]
        flags = dict(
            weights=["--features", "inception", "--inception-weights", "nope.pth"], device=["--device", "abacus"],
            unlabelled=["--features", "classifier"], seed=["--seed", "100000000000000000000"], flag=["--no-such"],
            out=["--out", str(tmp_path / "good.npz" / "folder")], features=["--features", "cats"],
        ).get(bad, [])
    elif bad in ("empty", "one", "mixed", "text", "cut off", "16 bit"):
        samples = [folder]
        if bad == "empty":
            for path in folder.iterdir():
                path.unlink()
        elif bad == "mixed":
            Image.new("L", (9, 9)).save(folder / "zzz.png")
        elif bad == "text":
            (folder / "000.png").write_text("no image")
        elif bad == "cut off":
            (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
        elif bad == "16 bit":
            Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(folder / "003.png")
    elif bad == "npy":
        np.save(tmp_path / "bad.npy", pixels)
        (tmp_path / "bad.npy").rename(samples[0])
    elif bad == "other keys":
        np.savez(samples[0], images=pixels)
    elif bad == "model.pt":
        torch.save({"network": {}}, samples[0])
    before = set(tmp_path.rglob("*"))
    common = ["--reference", str(reference), "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        script.main([*map(str, samples), *common, *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("fid_is.py: "), error
    named = [str(path) for path in samples] + [str(reference)] + [flag for flag in flags if flag.startswith("--")]
    assert any(name in error for name in named) or bad == "size", error
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "out"}
