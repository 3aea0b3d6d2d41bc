"""Guidance where it is known exactly, and both scripts' experiments with networks and data whose answer is known.

The exact part: a mixture of Gaussians, whose components are the classes. The experiments: main runs with a network that
paints each class in a grey of its own and writes down how it was called, on images that carry their number.
"""
import argparse
import contextlib
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MNIST, exact, gaussian_eps, having, load, mixture_eps, one_line, tables
from matplotlib.figure import Figure
from PIL import Image

FREE, GUIDED = "paper/classifier_free_guidance.py", "paper/classifier_guidance.py"
MEANS, S = [-0.6, 0.2, 0.9], 0.15
each = pytest.mark.parametrize("path", [FREE, GUIDED], ids=["free", "classifier"])


def conditional_eps(alpha_bar, means=MEANS, s=S):
    """The ideal model(xt, t, y): eps* of component y, or of the whole mixture where y is NULL = -1."""
    whole = mixture_eps(alpha_bar, means, s)

    def model(xt, t, y):
        of_y = gaussian_eps(alpha_bar, torch.tensor(means, dtype=torch.float64)[y].view(-1, 1, 1, 1), s)(xt, t)
        return torch.where(y.view(-1, 1, 1, 1) == -1, whole(xt, t), of_y)

    return model


def inputs():
    xt = torch.randn(6, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return xt, torch.tensor([1, 10, 200, 500, 900, 1000]), torch.tensor([0, 1, 2, 0, 1, 2])


# Classifier-free guidance, exactly --------------------------------------------------------------------------------


@having("guided_eps")
def test_w_mixes_the_two_predictions(script):
    """w = 0 is the mixture's, w = 1 the component's, and others go on along the line through both."""
    xt, t, y = inputs()
    model = conditional_eps(tables()[1])
    eps_y, eps_null = model(xt, t, y), model(xt, t, torch.full_like(y, -1))
    assert script.NULL == -1
    assert torch.equal(script.guided_eps(model, xt, t, y, 0), eps_null)
    assert torch.equal(script.guided_eps(model, xt, t, y, 1), eps_y)
    for w in (0.5, 2, 8):
        assert torch.allclose(script.guided_eps(model, xt, t, y, w), (1 - w) * eps_null + w * eps_y, atol=1e-8)


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
    """Mean and variance of x_0 if eps_null is that of N(mu0, s0^2) and eps_y that of N(mu, s^2): all is affine."""
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
            x, e, noise = 1 / math.sqrt(1 - beta[now]), -beta[now] / math.sqrt((1 - a) * (1 - beta[now])), beta[now]
        mean, var = (x + e * slope) * mean + e * shift, (x + e * slope) ** 2 * var + (noise if then else 0)
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
    x0 = exact(script).ddim_sample(eps_of, (4, 1, 50, 50), S, eta, clip=False, variance="beta")
    mean, var = guided_chain(sampler, w, 0.0, 0.6, 0.5, 0.2)
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / 10_000))
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / 10_000))
    assert mean > 0.52 and math.sqrt(var) < 0.2


@having("drop_labels")
def test_labels_are_dropped_one_by_one(script):
    """Each on its own: the rate is right over all, in each class, and within batches it varies as a binomial does."""
    torch.manual_seed(0)
    y = torch.arange(50_000) % 10
    kept = script.drop_labels(y)
    dropped = kept == script.NULL
    assert torch.equal(kept[~dropped], y[~dropped]) and script.NULL not in range(10)
    assert abs(dropped.sum().item() - 5000) < 4.5 * math.sqrt(50_000 * 0.09)
    assert all(abs(dropped[y == label].sum().item() - 500) < 4.5 * math.sqrt(450) for label in range(10))
    of_batches = torch.stack([(script.drop_labels(y[:100]) == script.NULL).sum() for _ in range(500)]).double()
    assert of_batches.var().item() == pytest.approx(9, rel=4.5 * math.sqrt(2 / 500))


# Guidance by a classifier, exactly --------------------------------------------------------------------------------


def exact_logits(alpha_bar, means=MEANS, s=S):
    """The ideal noisy classifier of the mixture, of images of one pixel: log p(x_t | y) up to a constant."""

    def classifier(xt, t):
        ab, mean = torch.as_tensor(alpha_bar)[t].view(-1, 1), torch.tensor(means, dtype=torch.float64)
        return -((xt.flatten(1) - ab.sqrt() * mean) ** 2) / (2 * (ab * s**2 + 1 - ab))

    return classifier


def test_with_the_perfect_classifier_s_1_is_the_conditional_model():
    """Bayes' rule: and for any s the same as classifier-free guidance with w = s."""
    script, free = load(GUIDED), load(FREE)
    xt, t, y = inputs()
    xt, (_, alpha_bar), diffusion = xt[:, :, :1, :1], tables(), exact(script)
    model, classifier = conditional_eps(alpha_bar), exact_logits(alpha_bar)

    def unconditional(xt, t):
        return model(xt, t, torch.full_like(t, -1))

    for s in (0, 1, 2.5):
        got = script.classifier_eps(diffusion, unconditional, classifier, xt, t, y, s)
        assert torch.allclose(got, free.guided_eps(model, xt, t, y, s), atol=1e-8) and not got.requires_grad
    one = script.classifier_eps(diffusion, unconditional, classifier, xt, 500 + 0 * t, y, 1)
    assert torch.allclose(one, model(xt, 500 + 0 * t, y), atol=1e-8)


def test_the_gradient_is_that_of_log_p():
    """Against differences of log p, by double steps of 1e-5; each image by its own label."""
    xt, t, y = inputs()
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    network = torch.nn.Sequential(*layers).double()
    got, h = load(GUIDED).class_gradient(lambda x, t: network(x), xt, t, y), 1e-5
    for pixel in range(9):
        step = h * torch.eye(9, dtype=torch.float64)[pixel].view(1, 1, 3, 3)
        up, down = (network(xt + sign * step).softmax(1)[range(6), y].log() for sign in (1, -1))
        assert torch.allclose(got.flatten(1)[:, pixel], (up - down) / (2 * h), atol=1e-8)


def test_accuracy_over_t():
    """1000 images, one for each t, and a classifier that is right up to t = 500 alone: bands of 50, in order of t."""
    script, seen = load(GUIDED), []
    images = (torch.arange(1000) % 256).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = torch.randint(0, 10, (1000,), generator=torch.Generator().manual_seed(0))

    def classifier(xt, t):
        seen.append((xt, t))
        return torch.nn.functional.one_hot((labels[t - 1] + (t > 500)) % 10, 10).float()

    accuracy = script.accuracy_by_t(script.Diffusion(script.linear_beta()), classifier, images, labels)
    assert accuracy.tolist() == [1] * 10 + [0] * 10
    xt, t = (torch.cat(part) for part in zip(*seen, strict=True))
    assert t.tolist() == list(range(1, 1001))
    ab = torch.as_tensor(tables()[1])[t].view(-1, 1, 1, 1)
    noise = (xt - ab.sqrt() * (images / 127.5 - 1)) / (1 - ab).sqrt()
    assert abs(noise.mean()) < 4.5 / math.sqrt(64_000) and abs(noise.var() - 1) < 4.5 * math.sqrt(2 / 64_000)
    few = script.Diffusion(script.linear_beta(4))
    accuracy = script.accuracy_by_t(few, lambda xt, t: torch.eye(10)[t], images[:8], torch.full((8,), 3))
    assert accuracy.tolist() == [0, 0, 1, 0]


# The experiments --------------------------------------------------------------------------------------------------


def numbered_images(n=600):
    """n images whose first ten rows are the bits of their number, white or black; each with a label by chance."""
    bits = torch.arange(n)[:, None] >> torch.arange(10) & 1
    images = torch.full((n, 28, 28), 128, dtype=torch.uint8)
    images[:, :10] = (255 * bits)[:, :, None].byte()
    return images, torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(1))


def numbers(xt):
    """The numbers of noisy images, as long as the noise is weak (T = 10)."""
    return ((xt[:, 0, :10].mean(2) > 0) << torch.arange(10)).sum(1)


def painter(T, conditional, gain=0.01):
    """A network that sees in every x_t the same image, grey without a label, and gain (y + 1) with label y.

    So classifier-free guidance must end at w gain (y + 1). It writes down (xt, t, y, training) of every call.
    """
    alpha_bar = torch.as_tensor(tables(T)[1]).float()

    class Painter(torch.nn.Module):
        calls = []

        def __init__(self, **network):
            super().__init__()
            assert ("classes" in network) == conditional
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, xt, t, y=None):
            self.calls.append((xt.detach(), t, y, self.training))
            ab = alpha_bar[t].view(-1, 1, 1, 1)
            x0 = gain * (y.view(-1, 1, 1, 1) + 1) if conditional else gain
            return (xt - ab.sqrt() * x0) / (1 - ab).sqrt() + 0 * self.weight

    return Painter


class KnowingClassifier(torch.nn.Module):
    """It reads the number, so it is always right. Asked for a gradient, it gives that of log p(y | x_t): 200 (y - 4.5).

    It writes down its calls.
    """

    calls = []

    def __init__(self, *network):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, xt, t):
        self.calls.append((xt.detach(), t, self.training))
        if not xt.requires_grad:
            truth = numbered_images()[1][numbers(xt).clamp(max=599)]
            return torch.nn.functional.one_hot(truth, 10) + self.weight
        total = xt.sum((1, 2, 3))  # the logits are 0, so that the classes are equally likely; their gradients are not
        return (total - total.detach())[:, None] * 200 * (torch.arange(10) - 4.5)


def experiment(path, monkeypatch, out, *flags, T=10, gain=None):
    """main, with networks that paint and images that carry their number -> the calls of the UNet, the figures drawn."""
    script, figures, (images, labels) = load(path), [], numbered_images()
    network = painter(T, path == FREE, gain if gain is not None else 0.01 if path == FREE else 0)

    class Recorded(Figure):
        def __init__(self, **options):
            super().__init__(**options)
            figures.append(self)

    monkeypatch.setattr(script, "MNIST", lambda *args, **options: SimpleNamespace(data=images, targets=labels))
    monkeypatch.setattr(script, "UNet", network)
    monkeypatch.setattr(script, "Figure", Recorded)
    if path == GUIDED:
        monkeypatch.setattr(script, "NoisyClassifier", KnowingClassifier)
        monkeypatch.setattr(KnowingClassifier, "calls", [])
    script.main(["--smoke", "--data", "mnist", "--T", str(T), "--out", str(out), *map(str, flags)])
    return network.calls, figures


def grey(path, strength, y):
    """What the networks of experiment paint, as bytes. Guided by the classifier: that of the last step, t = 1."""
    x0 = strength * (y + 1) / 100 if path == FREE else strength * 1e-4 / math.sqrt(1 - 1e-4) * 200 * (y - 4.5)
    return np.round(127.5 * (1 + np.clip(x0, -1, 1)))


@each
def test_each_strength_has_its_own_images_labels_and_block(path, monkeypatch, tmp_path):
    name = "w" if path == FREE else "s"
    _, figures = experiment(path, monkeypatch, tmp_path, f"--{name}", 8, 0, 1.5, 1, "--samples", 35)
    assert {p.name for p in tmp_path.glob("*.npz")} == {f"{name}_{x}.npz" for x in ("0", "1", "1.5", "8")}
    for strength in ("0", "1", "1.5", "8"):
        with np.load(tmp_path / f"{name}_{strength}.npz") as arrays:
            images, y = arrays["arr_0"], arrays["arr_1"]
        assert images.dtype == np.uint8 and images.shape == (35, 28, 28, 1)
        assert y.tolist() == [k % 10 for k in range(35)]
        assert np.abs(images - grey(path, float(strength), y)[:, None, None, None]).max() <= 1
    blocks = figures[-1].axes
    assert [axes.get_title() for axes in blocks] == [f"{name} = {x}" for x in ("8", "0", "1.5", "1")]
    for axes, strength in zip(blocks, (8, 0, 1.5, 1), strict=True):
        picture = np.asarray(axes.images[0].get_array())
        assert picture.shape[:2] == (10 * 30 + 2, 3 * 30 + 2)  # 35 // 10 in each row
        rows = [picture[round(row), 16::30, 0] for row in axes.get_yticks()]
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(k) for k in range(10)]
        assert all(np.abs(row - grey(path, strength, k)).max() <= 1 for k, row in enumerate(rows))
    with Image.open(tmp_path / "samples.png") as picture:  # of the strength that is nearest to 2, in columns
        assert picture.size == (10 * 58 + 2, 4 * 58 + 2)
        shades = [picture.getpixel((30 + 58 * k, 30))[0] for k in range(10)]
    assert np.abs(shades - grey(path, 1.5, np.arange(10))).max() <= 1


@each
@pytest.mark.parametrize("flags", [[], ["--no-clip"]])
def test_all_strengths_start_from_the_same_noise(path, flags, monkeypatch, tmp_path):
    """520 samples, drawn in parts: no two images start alike, but all strengths do."""
    name = "--w" if path == FREE else "--s"
    calls, _ = experiment(path, monkeypatch, tmp_path, name, 0, 1, 4, "--samples", 520, *flags, gain=0.01)
    starts = [xt for xt, t, _, training in calls if not training and t[0] == 10]
    if path == FREE:  # with w = 4 the batch is there twice, with a label and without
        assert all(torch.equal(*xt.chunk(2)) for xt in starts[4:])
        starts[4:] = [xt.chunk(2)[0] for xt in starts[4:]]
    assert [len(start) for start in starts] == [500, 20] * 3
    xT = torch.cat(starts).view(3, 520, 28 * 28)
    assert (xT == xT[0]).all() and len(xT[0].unique(dim=0)) == 520
    assert abs(xT.mean()) < 4.5 / math.sqrt(520 * 784) and xT.var().item() == pytest.approx(1, abs=0.01)


@each
def test_no_clip_lets_x0_hat_leave_the_range(path, monkeypatch, tmp_path):
    """The network sees an image five times too bright: without clipping the last x_t is as bright, with it 1."""
    name = "--w" if path == FREE else "--s"
    for flags, brightest in (([], 1), (["--no-clip"], 5)):
        flags = [name, 1 if path == FREE else 0, "--samples", 10, *flags]
        calls, _ = experiment(path, monkeypatch, tmp_path, *flags, gain=0.5 if path == FREE else 5)
        xt = [xt for xt, t, _, training in calls if not training and t[0] == 1][-1]
        assert xt.mean((1, 2, 3)).max().item() == pytest.approx(brightest, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_sampler_is_the_one_asked_for(sampler, monkeypatch, tmp_path):
    """T = 60: DDIM calls the network at 50 times, DDPM at all; the variance of x_1 is that of its recursion."""
    flags = ["--sampler", sampler, "--w", 1, "--samples", 40]
    calls, _ = experiment(FREE, monkeypatch, tmp_path, *flags, T=60, gain=0)
    calls = {int(t[0]): xt for xt, t, _, training in calls if not training}
    assert list(calls)[0] == 60 and len(calls) == (50 if sampler == "ddim" else 60)
    beta, ab = tables(60)
    expected = 1.0
    for t in range(60, 1, -1):  # the network says x_0 = 0: DDPM shrinks x_t by a factor, and adds beta_t
        expected = (math.sqrt(1 - beta[t]) * (1 - ab[t - 1]) / (1 - ab[t])) ** 2 * expected + beta[t]
    expected = (1 - ab[1]) / (1 - ab[60]) if sampler == "ddim" else expected
    assert calls[1].var().item() == pytest.approx(expected, rel=4.5 * math.sqrt(2 / 40 / 784))


@each
def test_images_keep_their_labels_and_noise_its_time_in_training(path, monkeypatch, tmp_path):
    """What the networks are shown, by the numbers in the images: labels, noise, and the images that are held out."""
    labels, cross_entropy = [], torch.nn.functional.cross_entropy

    def recorded(logits, y):
        labels.append(y)
        return cross_entropy(logits, y)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    images, truth = numbered_images()
    x0, ab = images[:, None].float() / 127.5 - 1, torch.as_tensor(tables(10)[1])
    calls, figures = experiment(path, monkeypatch, tmp_path, "--steps", 40, "--batch-size", 50, "--samples", 10)
    shown = [call for call in calls if call[-1]]
    assert [len(xt) for xt, *_ in shown] == [50] * 40
    seen = [(torch.cat([xt for xt, *_ in shown]), torch.cat([t for _, t, *_ in shown]))]
    if path == FREE:
        y = torch.cat([y for *_, y, _ in shown])
        number, dropped = numbers(seen[0][0]), y == -1
        assert torch.equal(y[~dropped], truth[number[~dropped]])
        assert abs(dropped.sum().item() - 200) < 4.5 * math.sqrt(2000 * 0.09)
        assert dropped.view(40, 50).sum(1).max() < 5 + 4.5 * math.sqrt(50 * 0.09)  # one by one, not batch by batch
        assert len(number.unique()) > 500  # all 600 images are trained on
    else:
        trained = [call for call in KnowingClassifier.calls if call[-1]]
        tested = [call for call in KnowingClassifier.calls if len(call[0]) == 100]  # samples come by tens
        assert [len(xt) for xt, *_ in trained] == [64] * 3
        seen += [tuple(torch.cat(part) for part in list(zip(*calls, strict=True))[:2]) for calls in (trained, tested)]
        assert torch.equal(torch.cat(labels), truth[numbers(seen[1][0])])
        held_out = set(numbers(seen[2][0]).tolist())
        assert len(held_out) == 100
        assert not held_out & {*numbers(seen[0][0]).tolist(), *numbers(seen[1][0]).tolist()}
        curve = figures[1].axes[0].lines[0]
        assert curve.get_xdata() == pytest.approx(np.arange(10) + 0.5)
        assert np.asarray(curve.get_ydata()).tolist() == [1] * 10
    for xt, t in seen:
        assert t.min() == 1 and t.max() == 10
        noise = (xt - ab[t].sqrt().view(-1, 1, 1, 1) * x0[numbers(xt)]) / (1 - ab[t]).sqrt().view(-1, 1, 1, 1)
        var = noise.var((1, 2, 3))
        assert abs(noise.mean()) < 4.5 / math.sqrt(noise.numel()) and (var - 1).abs().max() < 6 * math.sqrt(2 / 784)


# Training ---------------------------------------------------------------------------------------------------------


def train(path, network, images, labels, steps, batch_size=32, lr=1e-2, loss_of=None):
    """Either script's training function -> EMA, losses. In classifier_guidance.py loss_of says of which network."""
    script = load(path)
    if path == FREE:
        args = argparse.Namespace(steps=steps, batch_size=batch_size, lr=lr)
        diffusion = script.Diffusion(script.linear_beta(), images.device)
        return script.train_conditional(diffusion, network, images, labels, args)
    return script.train(network, loss_of, images, labels, steps, batch_size, lr)


def black_and_white(n=32, size=4):
    """Half of the images black, half white; their labels say which."""
    labels = torch.arange(n) % 2
    return (255 * labels).view(n, 1, 1, 1).expand(n, 1, size, size).byte(), labels


@each
def test_the_recipe(path, monkeypatch):
    """The rate rises for a 30th of the steps and falls to 0; gradients have norm 1 at most; the EMA is its formula."""
    rates, norms, weights = [], [], []

    class Watched(torch.optim.AdamW):
        def step(self):
            [group] = self.param_groups
            rates.append(group["lr"]), norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
            assert group["betas"] == (0.9, 0.95) and group["fused"]
            super().step()
            weights.append(group["params"][0].detach().clone())

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((1,), 30.0))

        def forward(self, xt, t, y=None):
            return self.weight * xt

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    loss_of = None if path == FREE else lambda network, x0, y: network(x0, y).square().mean()
    ema, losses = train(path, Scaled(), *black_and_white(), 300, 8, 1.0, loss_of)
    assert rates == pytest.approx([min(30 * (i + 1), 300 - i) / 300 for i in range(300)])
    assert norms[0] == pytest.approx(1, abs=1e-3) and max(norms) < 1.001
    expected = torch.full((1,), 30.0)
    for k, weight in enumerate(weights):
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.weight, expected, atol=1e-4) and not ema.weight.requires_grad and not ema.training
    assert losses.shape == (300,) and losses[-20:].mean() < losses[:5].mean()


def test_training_learns_the_labels_and_their_absence():
    """Black images and white ones: the label says which; without it the answer lies between. NULL has been trained."""
    script = load(FREE)
    torch.manual_seed(0)
    model = script.UNet(1, [32, 32], 1, 2)  # two norm groups: one would take the grey of the whole image away
    untrained = model.label.weight.detach().clone()
    ema, losses = train(FREE, model, *black_and_white(), 150)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean() and not torch.equal(ema.first.weight, model.first.weight)
    xt, t = torch.zeros(1, 1, 4, 4), torch.tensor([400])  # grey: it could come from either
    eps = [ema(xt, t, torch.tensor([y])).mean().item() for y in (0, script.NULL, 1)]  # eps grows as x_0 gets darker
    assert eps[0] > eps[1] + 0.1 > eps[2] + 0.2
    assert ((model.label.weight - untrained).abs().amax(1) > 0.01).all() and len(untrained) == 3


def test_the_noisy_classifier_learns_and_knows_less_of_more_noise():
    """Black and white images, one of four pixels: sure near t = 1, a guess near T."""
    script = load(GUIDED)
    torch.manual_seed(0)
    (images, labels), diffusion = black_and_white(4000, 2), script.Diffusion(script.linear_beta())
    loss_of = partial(script.classifier_loss, diffusion)
    classifier, _ = train(GUIDED, script.NoisyClassifier(1, [16, 16], 2), images, labels, 150, 64, 1e-3, loss_of)
    accuracy = script.accuracy_by_t(diffusion, classifier, images, labels)
    assert accuracy.shape == (20,) and accuracy[:5].min() > 0.95
    assert 0.35 < accuracy[-3:].mean() < 0.65 and accuracy[:8].mean() > accuracy[8:14].mean() > accuracy[14:].mean()


@each
def test_everything_stays_on_one_device(path, monkeypatch):
    """On the meta device, which refuses to meet another, as CUDA does: training, and guided sampling."""
    script, meta, waits = load(path), torch.device("meta"), []
    monkeypatch.setattr(script, "autocast", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **options: torch.optim.Adam(*args, foreach=False))
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda x: waits.append(x) or 0.5 if x.device == meta else item(x))
    images, labels = torch.zeros(20, 1, 28, 28, dtype=torch.uint8, device=meta), torch.zeros(20, dtype=int, device=meta)
    with meta:
        model = script.UNet(1, [16, 16], 1, **{"classes": 10} if path == FREE else {})
    diffusion, y = script.Diffusion(script.linear_beta(10), meta), labels[:6]
    if path == FREE:
        ema, losses = train(path, model, images, labels, 3)
        eps_of = partial(script.guided_eps, ema, y=y, w=3)
    else:
        with meta:
            classifier = script.NoisyClassifier(1, [16, 16], 10)
        ema, _ = train(path, model, images, labels, 3, loss_of=lambda network, x0, y: diffusion.loss(network, x0))
        loss_of = partial(script.classifier_loss, diffusion)
        guide, losses = train(path, classifier, images, labels, 3, loss_of=loss_of)
        assert script.accuracy_by_t(diffusion, guide, images, labels).device == meta
        eps_of = partial(script.classifier_eps, diffusion, ema, guide, y=y, s=3)
    assert losses.device == meta and losses.shape == (3,)
    assert len(waits) == (1 if path == FREE else 2), "one .item() for the progress bar, none in a step"
    assert diffusion.ddim_sample(eps_of, (6, 1, 28, 28), 5).device == meta


# Loading, stopping, wrong input -----------------------------------------------------------------------------------


def test_a_network_of_ddpm_mnist_is_guided_untrained(tmp_path):
    """classifier_guidance.py trains the classifier alone; from its own file it draws the same with no training."""
    script, mnist = load(GUIDED), load(MNIST)
    torch.manual_seed(5)
    network = mnist.SMOKE["network"]
    model = mnist.UNet(**network)
    settings = dict(T=7, data="digits", samples=64, seed=9, steps=5, variance="beta")
    torch.save({"network": network, "ema": model.state_dict(), "settings": settings}, tmp_path / "its.pt")
    script.main(["--load", str(tmp_path / "its.pt"), "--smoke", "--s", "3", "--out", str(tmp_path / "first")])
    saved = torch.load(tmp_path / "first" / "model.pt", weights_only=True)
    assert all(torch.equal(saved["ema"][name], value) for name, value in model.state_dict().items())
    assert [saved["settings"][name] for name in ("T", "steps", "samples", "s")] == [7, 5, 20, [3]]
    mnist.UNet(**saved["network"]).load_state_dict(saved["ema"])
    script.main(["--load", str(tmp_path / "first" / "model.pt"), "--out", str(tmp_path / "second")])
    of_both = [np.load(tmp_path / run / "s_3.npz")["arr_0"] for run in ("first", "second")]
    assert of_both[0].shape == (20, 28, 28, 1) and np.array_equal(*of_both) and of_both[0].std() > 0
    assert not {"model.pt", "loss.png", "accuracy.png"} & {p.name for p in (tmp_path / "second").iterdir()}


@pytest.mark.parametrize("path, which", [(FREE, "UNet"), (GUIDED, "UNet"), (GUIDED, "classifier")])
def test_ctrl_c_ends_one_training_and_keeps_what_was_learned(path, which, monkeypatch, tmp_path, capsys):
    function = "mse_loss" if which == "UNet" else "cross_entropy"
    original, losses = getattr(torch.nn.functional, function), []

    def interrupted(*args):
        if len(losses) == 2:
            raise KeyboardInterrupt
        losses.append(original(*args))
        return losses[-1]

    monkeypatch.setattr(torch.nn.functional, function, interrupted)
    experiment(path, monkeypatch, tmp_path, "--samples", 10)
    assert "Stopped after 2 steps" in capsys.readouterr().out
    assert {"model.pt", "samples.png", "guidance.png", "loss.png"} <= {p.name for p in tmp_path.iterdir()}
    if path == GUIDED:
        assert sum(training for *_, training in KnowingClassifier.calls) == 3  # with the one that was interrupted


@each
def test_wrong_input_of_its_own_is_one_line(path, tmp_path, capsys):
    name, out = "--w" if path == FREE else "--s", ["--smoke", "--out", tmp_path / "out"]
    for flags in ([name, "nan"], [name, "1", "inf"], [name], [name, "much"], ["--samples", 9], ["--guidance", 3]):
        assert flags[0] in one_line(path, [*out, *flags], capsys)
    mnist, settings = load(MNIST), {"T": 10, "data": "digits", "schedule": "cosine"}  # no labels, or another schedule
    network = mnist.SMOKE["network"]
    wrong = {"network": network, "ema": mnist.UNet(**network).state_dict(), "settings": settings}
    torch.save(wrong, tmp_path / "wrong.pt")
    assert "--load" in one_line(path, [*out, "--load", tmp_path / "wrong.pt"], capsys)
    assert not list(tmp_path.glob("out/*.pt"))
