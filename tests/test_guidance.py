"""Guidance where it is known exactly, and both scripts' experiments with known networks and data.

The exact part: a mixture of Gaussians, whose components are the classes. The experiments: main runs
with a network that paints each class in its own grey and writes down how it was called, on images
that carry their number.
"""

import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import MNIST, each, exact, gaussian_eps, having, load, mixture_eps, one_line, tables
from matplotlib.figure import Figure
from PIL import Image

FREE, GUIDED = "paper/classifier_free_guidance.py", "paper/classifier_guidance.py"
MEANS, S = [-0.6, 0.2, 0.9], 0.15
both = each([FREE, GUIDED])


def conditional_eps(alpha_bar, means=MEANS, s=S):
    """The ideal model(xt, t, y): eps* of component y, or of the mixture where y is NULL = -1."""
    whole = mixture_eps(alpha_bar, means, s)

    def model(xt, t, y):
        mean = torch.tensor(means, dtype=torch.float64)[y].view(-1, 1, 1, 1)
        of_y = gaussian_eps(alpha_bar, mean, s)(xt, t)
        return torch.where(y.view(-1, 1, 1, 1) == -1, whole(xt, t), of_y)

    return model


def inputs():
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(6, 1, 3, 3, dtype=torch.float64, generator=generator)
    return xt, torch.tensor([1, 10, 200, 500, 900, 1000]), torch.tensor([0, 1, 2, 0, 1, 2])


# Classifier-free guidance, exactly --------------------------------------------------------------


@having("guided_eps")
def test_w_mixes_the_two_predictions(script):
    """w = 0 is the mixture's, w = 1 the component's; others lie on the line through both."""
    xt, t, y = inputs()
    model = conditional_eps(tables()[1])
    eps_y = model(xt, t, y)
    eps_null = model(xt, t, torch.full_like(y, -1))
    assert script.NULL == -1
    assert torch.equal(script.guided_eps(model, xt, t, y, 0), eps_null)
    assert torch.equal(script.guided_eps(model, xt, t, y, 1), eps_y)
    for w in (-1, 0.5, 2, 8):
        expected = (1 - w) * eps_null + w * eps_y
        assert torch.allclose(script.guided_eps(model, xt, t, y, w), expected, atol=1e-8)


@having("guided_eps")
@pytest.mark.parametrize("w", [2, 4.5])
def test_the_paper_s_w_is_ours_minus_1(script, w):
    """Ho & Salimans, Eq. 6: (1 + w) eps(y) - w eps(null)."""
    xt, t, y = inputs()
    model = conditional_eps(tables()[1])
    expected = (1 + (w - 1)) * model(xt, t, y) - (w - 1) * model(xt, t, torch.full_like(y, -1))
    assert torch.allclose(script.guided_eps(model, xt, t, y, w), expected, atol=1e-8)


@having("guided_eps")
@pytest.mark.parametrize("w, size", [(0, 6), (1, 6), (2, 12)])
def test_one_call_of_the_network_does(script, w, size):
    seen = []

    def model(xt, t, y):
        seen.append((len(xt), len(t), len(y)))
        return xt

    script.guided_eps(model, *inputs(), w)
    assert seen == [(size,) * 3]


def guided_chain(sampler, w, mu0, s0, mu, s):
    """Mean and variance of x_0 if eps_null is that of N(mu0, s0^2) and eps_y that of N(mu, s^2).

    Every step is affine.
    """
    beta, alpha_bar = tables()
    times = list(range(1000, 0, -20 if sampler == "ddim" else -1))
    mean, var = 0.0, 1.0
    for now, then in zip(times, times[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        slope = shift = 0
        for weight, m, sd in ((1 - w, mu0, s0), (w, mu, s)):  # eps = slope x + shift
            k = math.sqrt(1 - a) / (a * sd**2 + 1 - a)
            slope, shift = slope + weight * k, shift - weight * k * math.sqrt(a) * m
        if sampler == "ddim":
            x, e, noise = math.sqrt(b / a), math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a), 0
        else:
            x, noise = 1 / math.sqrt(1 - beta[now]), beta[now]
            e = -beta[now] / math.sqrt((1 - a) * (1 - beta[now]))
        mean = (x + e * slope) * mean + e * shift
        var = (x + e * slope) ** 2 * var + (noise if then else 0)
    return mean, var


@having("guided_eps")
@pytest.mark.parametrize("w, sampler", [(2, "ddim"), (4, "ddim"), (2, "ddpm")])
def test_guided_samples_have_the_statistics_of_the_recursion(script, w, sampler):
    """Stronger guidance pushes the mean past that of the class, and narrows the spread."""
    _, alpha_bar = tables()
    alone, everything = gaussian_eps(alpha_bar, 0.5, 0.2), gaussian_eps(alpha_bar, 0.0, 0.6)

    def model(xt, t, y):
        return torch.where(y.view(-1, 1, 1, 1) == -1, everything(xt, t), alone(xt, t))

    torch.manual_seed(0)
    eps_of = partial(script.guided_eps, model, y=torch.zeros(4, dtype=torch.long), w=w)
    S, eta = (50, 0) if sampler == "ddim" else (1000, 1)
    shape = (4, 1, 50, 50)
    x0 = exact(script).ddim_sample(eps_of, shape, S, eta, clip=False, variance="beta")
    mean, var = guided_chain(sampler, w, 0.0, 0.6, 0.5, 0.2)
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / 10_000))
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / 10_000))
    assert mean > 0.52 and math.sqrt(var) < 0.2


@having("drop_labels")
def test_labels_are_dropped_one_by_one(script):
    """Independently: the rate is right over all and in each class, and it varies between batches
    as a binomial does.
    """
    torch.manual_seed(0)
    y = torch.arange(50_000) % 10
    kept = script.drop_labels(y)
    dropped = kept == script.NULL
    assert torch.equal(kept[~dropped], y[~dropped]) and script.NULL not in range(10)
    assert abs(dropped.sum().item() - 5000) < 4.5 * math.sqrt(50_000 * 0.09)
    for label in range(10):
        assert abs(dropped[y == label].sum().item() - 500) < 4.5 * math.sqrt(450)
    of_batches = [(script.drop_labels(y[:100]) == script.NULL).sum() for _ in range(500)]
    variance = torch.stack(of_batches).double().var().item()
    assert variance == pytest.approx(9, rel=4.5 * math.sqrt(2 / 500))


# Guidance by a classifier, exactly --------------------------------------------------------------


def exact_logits(alpha_bar, means=MEANS, s=S):
    """The ideal noisy classifier of images of one pixel: log p(x_t | y) up to a constant."""

    def classifier(xt, t):
        ab = torch.as_tensor(alpha_bar)[t].view(-1, 1)
        mean = torch.tensor(means, dtype=torch.float64)
        return -((xt.flatten(1) - ab.sqrt() * mean) ** 2) / (2 * (ab * s**2 + 1 - ab))

    return classifier


def test_with_the_perfect_classifier_s_1_is_the_conditional_model():
    """Bayes' rule: and for any s the same as classifier-free guidance with w = s."""
    script, free = load(GUIDED), load(FREE)
    xt, t, y = inputs()
    xt = xt[:, :, :1, :1]
    _, alpha_bar = tables()
    diffusion = exact(script)
    model, classifier = conditional_eps(alpha_bar), exact_logits(alpha_bar)

    def unconditional(xt, t):
        return model(xt, t, torch.full_like(t, -1))

    for s in (0, 1, 2.5):
        got = script.classifier_eps(diffusion, unconditional, classifier, xt, t, y, s)
        assert torch.allclose(got, free.guided_eps(model, xt, t, y, s), atol=1e-8)
        assert not got.requires_grad
    t = torch.full_like(t, 500)
    one = script.classifier_eps(diffusion, unconditional, classifier, xt, t, y, 1)
    assert torch.allclose(one, model(xt, t, y), atol=1e-8)


def test_the_gradient_is_that_of_log_p():
    """Against differences of log p, by double steps of 1e-5; each image by its own label."""
    xt, t, y = inputs()
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    network = torch.nn.Sequential(*layers).double()
    with torch.no_grad():  # as in sampling
        got = load(GUIDED).class_gradient(lambda x, t: network(x), xt, t, y)
    h = 1e-5
    for pixel in range(9):
        step = h * torch.eye(9, dtype=torch.float64)[pixel].view(1, 1, 3, 3)
        up, down = (network(xt + sign * step).softmax(1)[range(6), y].log() for sign in (1, -1))
        assert torch.allclose(got.flatten(1)[:, pixel], (up - down) / (2 * h), atol=1e-8)


def test_accuracy_in_bands_of_t():
    """1,000 images, and a classifier that is right up to t = 500 alone: ten bands of 1, ten of 0.

    Every image is used once, with the noise of its t.
    """
    script = load(GUIDED)
    generator = torch.Generator().manual_seed(0)
    images = (torch.arange(1000) % 256).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = torch.randint(0, 10, (1000,), generator=generator)
    seen = []

    def classifier(xt, t):
        truth = labels[len(seen) :: 20]
        seen.append((xt, t))
        return torch.nn.functional.one_hot((truth + (t > 500)) % 10, 10).float()

    torch.manual_seed(0)
    diffusion = script.Diffusion(script.linear_beta())
    accuracy = script.accuracy_by_t(diffusion, classifier, images, labels)
    assert accuracy.tolist() == [1] * 10 + [0] * 10
    assert sum(len(t) for _, t in seen) == 1000
    alpha_bar = torch.as_tensor(tables()[1])
    noise = []
    for k, (xt, t) in enumerate(seen):
        assert 50 * k + 1 <= t.min() and t.max() <= 50 * k + 50 and len(t.unique()) > 20
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        x0 = images[k::20] / 127.5 - 1
        noise.append((xt - ab.sqrt() * x0) / (1 - ab).sqrt())
    noise = torch.cat(noise)
    assert abs(noise.mean()) < 4.5 / math.sqrt(64_000)
    assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / 64_000)


def test_with_few_steps_each_t_has_its_accuracy():
    """T = 4, and a classifier whose answer is t, for images of class 3."""
    script = load(GUIDED)
    diffusion = script.Diffusion(script.linear_beta(4))
    images, labels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.full((8,), 3)
    accuracy = script.accuracy_by_t(diffusion, lambda xt, t: torch.eye(10)[t], images, labels)
    assert accuracy.tolist() == [0, 0, 1, 0]


def test_the_pooling_is_adaptive_pooling_from_7x7_to_4x4():
    """In a form that every device has: MPS refuses adaptive pooling where sizes do not divide."""
    [pool] = [m for m in load(GUIDED).NoisyClassifier(1, [32, 64, 128], 10).head
              if isinstance(m, torch.nn.AvgPool2d)]  # fmt: skip
    features = torch.randn(2, 3, 7, 7)
    expected = torch.nn.functional.adaptive_avg_pool2d(features, 4)
    assert torch.allclose(pool(features), expected, atol=1e-6)


# The experiments --------------------------------------------------------------------------------


def numbered_images(n=600):
    """Images whose first ten rows are the bits of their number, white or black; random labels."""
    bits = torch.arange(n)[:, None] >> torch.arange(10) & 1
    images = torch.full((n, 1, 28, 28), 128, dtype=torch.uint8)
    images[:, 0, :10] = (255 * bits)[:, :, None].byte()
    return images, torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(1))


def numbers(xt):
    """The numbers of noisy images, as long as the noise is weak (T = 10)."""
    return ((xt[:, 0, :10].mean(2) > 0) << torch.arange(10)).sum(1)


def painter(T, conditional, gain):
    """A network that sees in every x_t the same image: grey, or gain (y + 1) with label y.

    So classifier-free guidance must end at w gain (y + 1). It writes down (xt, t, y, training) of
    every call.
    """
    alpha_bar = torch.as_tensor(tables(T)[1]).float()

    class Painter(torch.nn.Module):
        calls = []

        def __init__(self, **unet):
            super().__init__()
            assert ("classes" in unet) == conditional
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, xt, t, y=None):
            self.calls.append((xt.detach(), t, y, self.training))
            ab = alpha_bar[t].view(-1, 1, 1, 1)
            x0 = gain * (y.view(-1, 1, 1, 1) + 1) if conditional else gain
            return (xt - ab.sqrt() * x0) / (1 - ab).sqrt() + 0 * self.weight

    return Painter


class KnowingClassifier(torch.nn.Module):
    """It reads the number, so it is always right. It writes down (xt, t, purpose) of its calls.

    Asked for a gradient, it gives that of log p(y | x_t): 200 (y - 4.5) in every pixel.
    """

    calls = []

    def __init__(self, *network):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, xt, t):
        purpose = "guide" if xt.requires_grad else "train" if self.training else "test"
        self.calls.append((xt.detach(), t, purpose))
        if purpose != "guide":
            truth = numbered_images()[1][numbers(xt).clamp(max=599)]
            return torch.nn.functional.one_hot(truth, 10) + self.weight
        total = xt.sum((1, 2, 3))  # the logits are 0, so all classes are equally likely; their
        return (total - total.detach())[:, None] * 200 * (torch.arange(10) - 4.5)  # slopes differ


def experiment(path, monkeypatch, out, *flags, T=10, gain=None):
    """main with known networks and images -> the UNet's calls, the figures {file name: Figure}."""
    script = load(path)
    figures = {}
    if gain is None:
        gain = 0.01 if path == FREE else 0
    network = painter(T, path == FREE, gain)
    images, labels = numbered_images()
    monkeypatch.setattr(script, "load_labelled_mnist", lambda data, root: (images, labels, data))
    monkeypatch.setattr(script, "UNet", network)
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.name: figure}))
    if path == GUIDED:
        monkeypatch.setattr(script, "NoisyClassifier", KnowingClassifier)
        monkeypatch.setattr(KnowingClassifier, "calls", [])
    script.main(["--smoke", "--T", str(T), "--out", str(out), *map(str, flags)])
    return network.calls, figures


def grey(path, strength, y):
    """What the networks of experiment paint, as bytes. With the classifier: in the last step."""
    if path == FREE:
        x0 = strength * (y + 1) / 100
    else:
        x0 = strength * 1e-4 / math.sqrt(1 - 1e-4) * 200 * (y - 4.5)
    return np.round(127.5 * (1 + np.clip(x0, -1, 1)))


@both
def test_each_strength_has_its_own_images_labels_and_block(path, monkeypatch, tmp_path):
    name = "w" if path == FREE else "s"
    flags = [f"--{name}", 8, 0, 1.5, 1, "--samples", 35]
    _, figures = experiment(path, monkeypatch, tmp_path, *flags)
    found = {p.name for p in tmp_path.glob("*.npz")}
    assert found == {f"{name}_{x}.npz" for x in ("0", "1", "1.5", "8")}
    for strength in ("0", "1", "1.5", "8"):
        with np.load(tmp_path / f"{name}_{strength}.npz") as arrays:
            images, y = arrays["arr_0"], arrays["arr_1"]
        assert images.dtype == np.uint8 and images.shape == (35, 28, 28, 1)
        assert y.tolist() == [k % 10 for k in range(35)]
        assert np.abs(images - grey(path, float(strength), y)[:, None, None, None]).max() <= 1
    blocks = figures["guidance.png"].axes
    titles = [axes.get_title() for axes in blocks]
    assert titles == [f"{name} = {x}" for x in ("8", "0", "1.5", "1")]
    for axes, strength in zip(blocks, (8, 0, 1.5, 1), strict=True):
        picture = np.asarray(axes.images[0].get_array())
        assert picture.shape[:2] == (10 * 30 + 2, 3 * 30 + 2)  # 35 // 10 in each row
        rows = [picture[round(row), 16::30, 0] for row in axes.get_yticks()]
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(k) for k in range(10)]
        assert all(np.abs(row - grey(path, strength, k)).max() <= 1 for k, row in enumerate(rows))
    with Image.open(tmp_path / "samples.png") as picture:  # of the strength that is nearest to 2
        assert picture.size == (10 * 58 + 2, 4 * 58 + 2)
        shades = [picture.getpixel((30 + 58 * k, 30))[0] for k in range(10)]
    assert np.abs(shades - grey(path, 1.5, np.arange(10))).max() <= 1


@both
def test_images_are_saved_upright_rounded_and_clamped(path, monkeypatch, tmp_path):
    """The sampler returns image n with the grey level n + 0.6 and marks outside of [-1, 1]."""
    script = load(path)

    def ddim_sample(self, model, shape, *args, **options):
        x0 = torch.empty(shape)
        x0[:] = ((torch.arange(shape[0]) + 0.6) / 127.5 - 1).view(-1, 1, 1, 1)
        x0[:, 0, 3, 20] = 1.5
        x0[:, 0, 4, 20] = -2
        return x0

    monkeypatch.setattr(script.Diffusion, "ddim_sample", ddim_sample)
    name = "w" if path == FREE else "s"
    _, figures = experiment(path, monkeypatch, tmp_path, f"--{name}", 3, "--samples", 20)
    expected = np.empty((20, 28, 28, 1), dtype=np.uint8)
    expected[:] = np.arange(1, 21).reshape(20, 1, 1, 1)
    expected[:, 3, 20] = 255
    expected[:, 4, 20] = 0
    assert np.array_equal(np.load(tmp_path / f"{name}_3.npz")["arr_0"], expected)
    grid = np.asarray(figures["guidance.png"].axes[0].images[0].get_array())
    with Image.open(tmp_path / "samples.png") as picture:
        doubled = np.asarray(picture)
    for k in range(20):  # guidance.png has a row for each label, samples.png a column
        x, y = 2 + 30 * (k // 10), 2 + 30 * (k % 10)
        assert np.array_equal(grid[y : y + 28, x : x + 28, :1], expected[k])
        x, y = 2 + 58 * (k % 10), 2 + 58 * (k // 10)
        assert np.array_equal(doubled[y : y + 56 : 2, x : x + 56 : 2, :1], expected[k])
        assert np.array_equal(doubled[y + 1 : y + 56 : 2, x + 1 : x + 56 : 2, :1], expected[k])


@having("plot_guidance")
@pytest.mark.parametrize("n, columns", [(10, 1), (39, 3), (200, 4)])
@pytest.mark.parametrize("blocks", [1, 12])
def test_a_block_has_a_row_for_each_digit(script, n, columns, blocks, tmp_path, monkeypatch):
    """Row c, column j: sample 10 j + c, upright. The picture is large enough to be looked at."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    images[:] = (torch.arange(n) % 200).byte().view(-1, 1, 1, 1)
    images[:, :, 0, 27] = 255  # at the top on the right
    script.plot_guidance({f"w = {k}": images for k in range(blocks)}, tmp_path / "g.png")
    assert len(figures[0].axes) == blocks and figures[0].axes[0].get_ylabel() == "digit asked for"
    assert (figures[0].get_size_inches() * figures[0].dpi).min() >= 200
    for k, axes in enumerate(figures[0].axes):
        assert axes.get_title() == f"w = {k}" and not list(axes.get_xticks())
        picture = np.asarray(axes.images[0].get_array())
        assert axes.images[0].origin == "upper" and picture.dtype == np.uint8
        for c in range(10):
            for j in range(columns):
                cell = picture[2 + 30 * c : 30 + 30 * c, 2 + 30 * j : 30 + 30 * j, 0]
                assert (cell == images[10 * j + c, 0].numpy()).all()
        assert picture.shape == (302, 30 * columns + 2, 3)


@both
@pytest.mark.parametrize("flags", [[], ["--no-clip"]])
def test_all_strengths_start_from_the_same_noise(path, flags, monkeypatch, tmp_path):
    """520 samples in two batches: no two images start alike, but all strengths do."""
    name = "--w" if path == FREE else "--s"
    flags = [name, 0, 1, 4, "--samples", 520, *flags]
    calls, _ = experiment(path, monkeypatch, tmp_path, *flags, gain=0.01)
    starts = [xt for xt, t, _, training in calls if not training and t[0] == 10]
    if path == FREE:  # with w = 4 the batch is there twice, with a label and without
        assert all(torch.equal(*xt.chunk(2)) for xt in starts[4:])
        starts[4:] = [xt.chunk(2)[0] for xt in starts[4:]]
    assert [len(start) for start in starts] == [500, 20] * 3
    xT = torch.cat(starts).view(3, 520, 28 * 28)
    assert (xT == xT[0]).all() and len(xT[0].unique(dim=0)) == 520
    assert abs(xT.mean()) < 4.5 / math.sqrt(520 * 784)
    assert xT.var().item() == pytest.approx(1, abs=0.01)


@both
def test_no_clip_lets_x0_hat_leave_the_range(path, monkeypatch, tmp_path):
    """The network sees an image five times too bright: unclipped, the last x_t is as bright."""
    name = "--w" if path == FREE else "--s"
    for flags, brightest in (([], 1), (["--clip"], 1), (["--no-clip"], 5)):
        flags = [name, 1 if path == FREE else 0, "--samples", 10, *flags]
        gain = 0.5 if path == FREE else 5
        calls, _ = experiment(path, monkeypatch, tmp_path, *flags, gain=gain)
        xt = [xt for xt, t, _, training in calls if not training and t[0] == 1][-1]
        assert xt.mean((1, 2, 3)).max().item() == pytest.approx(brightest, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_sampler_is_the_one_asked_for(sampler, monkeypatch, tmp_path):
    """T = 60: DDIM calls the network at 50 times, DDPM at all; the variance of x_1 is known."""
    flags = ["--sampler", sampler, "--w", 1, "--samples", 40]
    calls, _ = experiment(FREE, monkeypatch, tmp_path, *flags, T=60, gain=0)
    calls = {int(t[0]): xt for xt, t, _, training in calls if not training}
    assert list(calls)[0] == 60 and len(calls) == (50 if sampler == "ddim" else 60)
    beta, ab = tables(60)
    expected = 1.0
    for t in range(60, 1, -1):  # x0_hat = 0: DDPM shrinks x_t by a factor, and adds beta_t
        factor = math.sqrt(1 - beta[t]) * (1 - ab[t - 1]) / (1 - ab[t])
        expected = factor**2 * expected + beta[t]
    if sampler == "ddim":
        expected = (1 - ab[1]) / (1 - ab[60])
    assert calls[1].var().item() == pytest.approx(expected, rel=4.5 * math.sqrt(2 / 40 / 784))


def test_the_classifier_guides_with_the_sampler_s_x_t_and_t(monkeypatch, tmp_path):
    """At each of 50 times, the UNet and the classifier are asked about the same x_t and t."""
    flags = ["--s", 2, "--samples", 10]
    calls, _ = experiment(GUIDED, monkeypatch, tmp_path, *flags, T=60, gain=0.1)
    asked = [(xt, t) for xt, t, _, training in calls if not training]
    guided = [(xt, t) for xt, t, purpose in KnowingClassifier.calls if purpose == "guide"]
    assert len(asked) == len(guided) == 50
    for ours, other in zip(asked, guided, strict=True):
        assert torch.equal(ours[0], other[0]) and torch.equal(ours[1], other[1])
    calls, _ = experiment(GUIDED, monkeypatch, tmp_path, "--s", 0, "--samples", 10)
    assert not [call for call in KnowingClassifier.calls if call[2] == "guide"]


def noise_in(xt, t):
    """The noise in x_t of numbered images (T = 10)."""
    x0 = numbered_images()[0].float() / 127.5 - 1
    ab = torch.as_tensor(tables(10)[1])[t].view(-1, 1, 1, 1)
    return (xt - ab.sqrt() * x0[numbers(xt)]) / (1 - ab).sqrt()


def assert_noise_of_its_time(xt, t):
    assert t.min() == 1 and t.max() == 10
    noise = noise_in(xt, t)
    assert abs(noise.mean()) < 4.5 / math.sqrt(noise.numel())
    assert (noise.var((1, 2, 3)) - 1).abs().max() < 6 * math.sqrt(2 / 784)


def test_images_keep_their_labels_in_training(monkeypatch, tmp_path):
    """By the numbers in the images: labels, one in ten dropped, and the noise of their t."""
    _, truth = numbered_images()
    flags = ["--steps", 40, "--batch-size", 50, "--samples", 10]
    calls, _ = experiment(FREE, monkeypatch, tmp_path, *flags)
    shown = [call for call in calls if call[-1]]
    assert [len(xt) for xt, *_ in shown] == [50] * 40
    xt, t, y = (torch.cat([call[k] for call in shown]) for k in range(3))
    assert_noise_of_its_time(xt, t)
    number, dropped = numbers(xt), y == -1
    assert torch.equal(y[~dropped], truth[number[~dropped]])
    assert abs(dropped.sum().item() - 200) < 4.5 * math.sqrt(2000 * 0.09)
    assert dropped.view(40, 50).sum(1).max() < 5 + 4.5 * math.sqrt(50 * 0.09)  # not whole batches
    assert len(number.unique()) > 500  # all 600 images are trained on


def test_the_classifier_learns_noisy_images_and_is_tested_on_others(monkeypatch, tmp_path):
    """Every sixth image is held out from both trainings; the rest comes with its own label."""
    labels = []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(logits, y):
        labels.append(y)
        return cross_entropy(logits, y)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    _, truth = numbered_images()
    flags = ["--steps", 40, "--batch-size", 50, "--samples", 10]
    calls, figures = experiment(GUIDED, monkeypatch, tmp_path, *flags)
    of_unet = [call for call in calls if call[-1]]
    assert [len(xt) for xt, *_ in of_unet] == [50] * 40
    of_classifier = [call for call in KnowingClassifier.calls if call[2] == "train"]
    assert [len(xt) for xt, *_ in of_classifier] == [64] * 3
    tests = [call for call in KnowingClassifier.calls if call[2] == "test"]
    for shown in (of_unet, of_classifier, tests):
        xt, t = (torch.cat([call[k] for call in shown]) for k in range(2))
        assert_noise_of_its_time(xt, t)
        number = numbers(xt)
        if shown is tests:
            assert sorted(number.tolist()) == list(range(0, 600, 6))
        else:
            assert (number % 6 != 0).all() and len(number.unique()) > 150
        if shown is of_classifier:
            assert torch.equal(torch.cat(labels), truth[number])
    [stairs] = figures["accuracy.png"].axes[0].patches
    values, edges, _ = stairs.get_data()
    assert np.asarray(values).tolist() == [1] * 10  # it is always right
    assert np.asarray(edges) == pytest.approx(np.arange(11) + 0.5)  # each t in the middle


@both
def test_the_report_says_what_was_trained_and_sampled(path, monkeypatch, tmp_path, capsys):
    """Steps, the mean of the last 50 losses, and how many samples."""
    losses = {"mse_loss": [], "cross_entropy": []}
    for name, seen in losses.items():
        usual = getattr(torch.nn.functional, name)

        def recorded(*args, usual=usual, seen=seen):
            seen.append(usual(*args))
            return seen[-1]

        monkeypatch.setattr(torch.nn.functional, name, recorded)
    experiment(path, monkeypatch, tmp_path, "--steps", 60, "--lr", 0.1, "--samples", 12)
    means = {name: torch.stack(seen[-50:]).mean() for name, seen in losses.items() if seen}
    out = capsys.readouterr().out
    assert "600 images (mnist5k)" in out
    if path == FREE:
        report = out.splitlines()[-1]
        assert report.startswith("60 training steps in ")
        assert f"loss {means['mse_loss']:.4f}; 12 samples for each of 5 values of w in " in report
    else:
        assert f"UNet: 60 training steps, loss {means['mse_loss']:.4f}\n" in out
        assert f"classifier: 3 training steps, loss {means['cross_entropy']:.4f}\n" in out
        report = out.splitlines()[-1]
        assert report.startswith("12 samples for each s, ")
    assert report.endswith(f": {tmp_path}")


def test_each_network_is_trained_by_its_own_recipe(monkeypatch, tmp_path):
    """The flags are those of the UNet; the classifier's recipe stands in the settings."""
    script, calls = load(GUIDED), []
    usual = script.train_network

    def watched(loss_of, network, images, labels, steps, batch_size, lr):
        calls.append((type(network).__name__, steps, batch_size, lr))
        return usual(loss_of, network, images, labels, steps, batch_size, lr)

    monkeypatch.setattr(script, "train_network", watched)
    flags = ["--steps", 4, "--batch-size", 5, "--lr", 0.25, "--samples", 10]
    experiment(GUIDED, monkeypatch, tmp_path, *flags)
    recipe = script.SMOKE["classifier_recipe"]
    assert calls[0] == ("Painter", 4, 5, 0.25)
    assert calls[1:] == [("KnowingClassifier", *recipe.values())]
    assert list(recipe) == ["steps", "batch_size", "lr"]


def test_accuracy_png_shows_what_was_measured(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    accuracy = torch.linspace(1, 0.1, 20)
    load(GUIDED).plot_accuracy(accuracy, 1000, tmp_path / "accuracy.png")
    [axes] = figures[0].axes
    [stairs] = axes.patches
    values, edges, _ = stairs.get_data()
    assert np.asarray(values) == pytest.approx(accuracy.numpy())
    assert np.asarray(edges) == pytest.approx(np.arange(0, 1001, 50) + 0.5)
    [guessing] = axes.lines
    assert list(guessing.get_ydata()) == [0.1, 0.1] and guessing.get_linestyle() == "--"
    assert axes.get_xlabel() == "t" and axes.get_ylabel() == "accuracy"
    assert axes.get_title() == "classifier on $x_t$ of held-out images (dashed: guessing)"
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 1


def test_loss_png_has_both_losses(monkeypatch, tmp_path):
    """Each under its name, smoothed over a fiftieth, from the end of the first window on."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    losses = {"UNet": torch.rand(200), "classifier": torch.rand(40) + 1}
    load(GUIDED).plot_losses(losses, tmp_path / "loss.png")
    [axes] = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(losses)
    for line, (name, values), window in zip(axes.lines, losses.items(), (5, 1), strict=True):
        assert line.get_label() == name
        x, y = line.get_data()
        assert list(x) == list(range(window, len(values) + 1))
        means = [values[i - window : i].mean().item() for i in x]
        assert np.asarray(y) == pytest.approx(np.array(means))
    assert axes.get_xlabel() == "training step" and axes.get_yscale() == "log"
    assert axes.get_title() == "$L_{simple}$ or cross-entropy"


# Training ---------------------------------------------------------------------------------------


def train(path, network, images, labels, steps, batch_size=32, lr=1e-2, loss_of=None):
    """Either script's training function -> EMA, losses. loss_of: of classifier_guidance.py."""
    script = load(path)
    if path == FREE:
        diffusion = script.Diffusion(script.linear_beta(), images.device)
        return script.train_conditional(
            diffusion, network, images, labels, steps, batch_size, lr
        )
    return script.train_network(loss_of, network, images, labels, steps, batch_size, lr)


def black_and_white(n=32, size=4):
    """Half of the images black, half white; their labels say which."""
    labels = torch.arange(n) % 2
    return (255 * labels).view(n, 1, 1, 1).expand(n, 1, size, size).byte(), labels


class Scaled(torch.nn.Module):
    """Its answer is x_t times a weight that begins far off."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1,), 30.0))

    def forward(self, xt, t=None, y=None):
        return self.weight * xt


@both
def test_the_average_is_returned_and_the_rate_is_that_of_the_step(path, monkeypatch):
    """test_training.py watches the UNets of all scripts; here, the classifier's training too."""
    rates, norms, weights = [], [], []

    class Watched(torch.optim.AdamW):
        def step(self):
            [group] = self.param_groups
            rates.append(group["lr"])
            norms.append(group["params"][0].grad.norm().item())
            super().step()
            weights.append(group["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    images, labels = black_and_white()
    seen = []

    def loss_of(network, x0, y):
        seen.append((x0, y))
        return network(x0).square().mean()

    ema, losses = train(path, Scaled(), images, labels, 300, 8, 0.1, loss_of)
    assert rates == pytest.approx([0.1 * min(30 * (i + 1), 300 - i) / 300 for i in range(300)])
    assert norms[0] == pytest.approx(1, abs=1e-3) and max(norms) < 1.001
    expected = torch.full((1,), 30.0)
    for k, weight in enumerate(weights):
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.weight, expected, atol=1e-4)
    assert not torch.allclose(ema.weight, weights[-1], atol=1e-4)
    assert not ema.weight.requires_grad and not ema.training
    assert losses.shape == (300,) and losses[-20:].mean() < losses[:5].mean()
    for x0, y in seen:  # classifier_guidance.py: each image with its label, in [-1, 1]
        assert torch.equal(x0.mean((1, 2, 3)), 2.0 * y - 1) and len(x0) == 8


@both
def test_a_loss_that_is_nan_stops_either_training(path):
    class Broken(Scaled):
        def forward(self, xt, t=None, y=None):
            return self.weight * xt * float("nan")

    images, labels = black_and_white()
    with pytest.raises(SystemExit) as stop:
        train(path, Broken(), images, labels, 60, 8, 1.0, lambda net, x0, y: net(x0).mean())
    assert "nan" in stop.value.code and "50" in stop.value.code and "--lr" in stop.value.code


def test_training_learns_the_labels_and_their_absence():
    """Black images and white ones: the label says which; without it the answer lies between.

    NULL has been trained.
    """
    script = load(FREE)
    torch.manual_seed(0)
    # Two norm groups: one would take the grey of the whole image away.
    model = script.UNet(1, [32, 32], 1, 2)
    untrained = model.label.weight.detach().clone()
    ema, losses = train(FREE, model, *black_and_white(), 150)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()
    assert not torch.equal(ema.first.weight, model.first.weight)
    xt, t = torch.zeros(1, 1, 4, 4), torch.tensor([400])  # grey: it could come from either
    # eps grows as x_0 gets darker
    eps = [ema(xt, t, torch.tensor([y])).mean().item() for y in (0, script.NULL, 1)]
    assert eps[0] > eps[1] + 0.1 > eps[2] + 0.2
    assert ((model.label.weight - untrained).abs().amax(1) > 0.01).all() and len(untrained) == 3


def test_the_noisy_classifier_learns_and_knows_less_of_more_noise():
    """Black and white images, one of four pixels: sure near t = 1, a guess near T."""
    script = load(GUIDED)
    torch.manual_seed(0)
    images, labels = black_and_white(4000, 2)
    diffusion = script.Diffusion(script.linear_beta())
    loss_of = partial(script.classifier_loss, diffusion)
    classifier = script.NoisyClassifier(1, [16, 16], 2, size=2)
    classifier, _ = train(GUIDED, classifier, images, labels, 150, 64, 1e-3, loss_of)
    accuracy = torch.zeros(20)
    for shift in (0, 1):  # so that every band has images of both classes
        accuracy += script.accuracy_by_t(diffusion, classifier, images[shift:], labels[shift:]) / 2
    assert accuracy.shape == (20,) and accuracy[:5].min() > 0.95
    assert 0.35 < accuracy[-3:].mean() < 0.65
    assert accuracy[:8].mean() > accuracy[8:14].mean() > accuracy[14:].mean()


@both
def test_everything_stays_on_one_device(path, monkeypatch):
    """On the meta device, which refuses to meet another, as CUDA does: training and sampling."""
    script, meta, waits = load(path), torch.device("meta"), []
    monkeypatch.setattr(script, "autocast", lambda device: contextlib.nullcontext())
    usual = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **rest: usual(*args, **rest))
    item = torch.Tensor.item
    monkeypatch.setattr(
        torch.Tensor, "item", lambda x: waits.append(x) or 0.5 if x.device == meta else item(x)
    )
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: x)
    images = torch.zeros(20, 1, 28, 28, dtype=torch.uint8, device=meta)
    labels = torch.zeros(20, dtype=int, device=meta)
    diffusion, y = script.Diffusion(script.linear_beta(10), meta), labels[:6]
    with meta:
        model = script.UNet(**script.SMOKE["unet"])
    if path == FREE:
        ema, losses = train(path, model, images, labels, 3, 6)
        eps_of = partial(script.guided_eps, ema, y=y, w=3)
    else:
        with meta:
            classifier = script.NoisyClassifier(1, [16, 16], 10)

        def loss(network, x0, y):
            return diffusion.loss(network, x0)

        ema, _ = train(path, model, images, labels, 3, 6, loss_of=loss)
        loss_of = partial(script.classifier_loss, diffusion)
        guide, losses = train(path, classifier, images, labels, 3, 6, loss_of=loss_of)
        assert script.accuracy_by_t(diffusion, guide, images, labels).device == meta
        eps_of = partial(script.classifier_eps, diffusion, ema, guide, y=y, s=3)
    assert losses.shape == (3,) and not waits
    assert diffusion.ddim_sample(eps_of, (6, 1, 28, 28), 5).device == meta


# Loading, stopping, wrong input -----------------------------------------------------------------


def mnist_model(folder, **settings):
    """A model.pt of ddpm_mnist.py with random weights -> its path, the network."""
    mnist = load(MNIST)
    torch.manual_seed(5)
    unet = mnist.SMOKE["unet"]
    model = mnist.UNet(**unet)
    facts = dict(task=mnist.TASK, T=7, steps=5, data="mnist") | settings
    torch.save({"network": unet, "ema": model.state_dict(), "settings": facts}, folder / "its.pt")
    return folder / "its.pt", model


def test_a_network_of_ddpm_mnist_is_guided_untrained(tmp_path, capsys):
    """Only the classifier is trained; from its own file the same samples come with no training."""
    script = load(GUIDED)
    source, model = mnist_model(tmp_path)
    flags = ["--smoke", "--s", "3", "--data", "mnist5k"]
    script.main(["--load", str(source), *flags, "--out", str(tmp_path / "first")])
    names = {p.name for p in (tmp_path / "first").iterdir()}
    assert {"model.pt", "loss.png", "accuracy.png", "s_3.npz", "guidance.png"} <= names
    saved = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(saved["ema"][name], value)
    settings = saved["settings"]  # of the network's training, which was that of ddpm_mnist.py
    assert settings["T"] == 7 and settings["steps"] == 5 and settings["data"] == "mnist"
    load(MNIST).UNet(**saved["network"]).load_state_dict(saved["ema"])

    flags = ["--s", "3", "--samples", "20", "--out", str(tmp_path / "second")]
    capsys.readouterr()
    script.main(["--load", str(tmp_path / "first" / "model.pt"), *flags])
    assert "images" not in capsys.readouterr().out  # no data are loaded
    runs = [np.load(tmp_path / run / "s_3.npz")["arr_0"] for run in ("first", "second")]
    assert runs[0].shape == (20, 28, 28, 1) and np.array_equal(*runs) and runs[0].std() > 0
    names = {p.name for p in (tmp_path / "second").iterdir()}
    assert names == {"s_3.npz", "guidance.png", "samples.png"}


def test_load_takes_data_only_where_a_classifier_is_to_be_trained(tmp_path, capsys):
    source, _ = mnist_model(tmp_path)
    out = ["--smoke", "--samples", "10", "--s", "1", "--out", str(tmp_path / "out")]
    load(GUIDED).main(["--load", str(source), *out, "--data-root", str(tmp_path)])
    for flags in (["--data", "mnist5k"], ["--data-root", "x"]):
        flags = ["--load", tmp_path / "out" / "model.pt", "--out", tmp_path / "other", *flags]
        assert "--data" in one_line(GUIDED, flags, capsys)
    for flags in (["--steps", 3], ["--batch-size", 3], ["--lr", 1], ["--T", 9]):
        message = one_line(GUIDED, ["--load", source, *out, *flags], capsys)
        assert flags[0] in message and "--load" in message


@pytest.mark.parametrize("path, which", [(FREE, "UNet"), (GUIDED, "UNet"), (GUIDED, "classifier")])
def test_ctrl_c_ends_one_training_and_keeps_what_was_learned(
    path, which, monkeypatch, tmp_path, capsys
):
    function = "mse_loss" if which == "UNet" else "cross_entropy"
    original, losses = getattr(torch.nn.functional, function), []

    def interrupted(*args):
        if len(losses) == 2:
            raise KeyboardInterrupt
        losses.append(original(*args))
        return losses[-1]

    monkeypatch.setattr(torch.nn.functional, function, interrupted)
    _, figures = experiment(path, monkeypatch, tmp_path, "--samples", 10)
    assert "Stopped after 2 training steps" in capsys.readouterr().out
    assert {"loss.png", "guidance.png"} <= figures.keys()
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["settings"]["steps"] == (2 if which == "UNet" else 3)
    if path == GUIDED:  # with the step that was interrupted
        trained = [call for call in KnowingClassifier.calls if call[2] == "train"]
        assert len(trained) == 3


@both
def test_samples_are_finite_at_the_largest_T(path, tmp_path):
    """T = 8000: alpha_bar_T is almost 0. The images are noise, and not all black."""
    name = "w" if path == FREE else "s"
    flags = ["--smoke", "--T", "8000", f"--{name}", "2", "--samples", "10"]
    load(path).main([*flags, "--out", str(tmp_path)])
    assert np.load(tmp_path / f"{name}_2.npz")["arr_0"].std() > 10


@both
def test_wrong_input_of_its_own_is_one_line(path, tmp_path, capsys):
    name, out = "--w" if path == FREE else "--s", ["--smoke", "--out", tmp_path / "out"]
    for flags in (
        [name, "nan"],
        [name, "1", "inf"],
        [name],
        [name, "much"],
        [name, "2", "2.0000001"],
        [name, "1", "1"],
        [name, "-1e-5"],  # argparse takes this for a flag, and --help says what to write
        ["--samples", 9],
        ["--guidance", 3],
    ):
        assert flags[0] in one_line(path, [*out, *flags], capsys)
    assert not list(tmp_path.glob("out/*.pt"))
    args = load(path).parse_args([f"{name}=-1e-5"])
    assert vars(args)[name[2:]] == [-1e-5]
    assert vars(load(path).parse_args([name, "-0.5", "3"]))[name[2:]] == [-0.5, 3]


def test_an_unconditional_network_is_refused_by_classifier_free_guidance(tmp_path, capsys):
    source, _ = mnist_model(tmp_path)
    message = one_line(FREE, ["--load", source, "--out", tmp_path / "out"], capsys)
    assert str(source) in message and "kind" in message


def test_another_schedule_is_refused(tmp_path, capsys):
    source, _ = mnist_model(tmp_path, task="28x28 images with the cosine schedule")
    message = one_line(GUIDED, ["--load", source, "--out", tmp_path / "out"], capsys)
    assert "cosine" in message
