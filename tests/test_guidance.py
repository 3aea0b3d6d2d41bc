"""Guidance where it is known exactly: a mixture of Gaussians, whose components are the classes."""
import argparse
import math
from itertools import islice

import pytest
import torch
from conftest import having
from test_diffusion import exact, gaussian_eps, mixture_eps, tables

MEANS, S = [-0.6, 0.2, 0.9], 0.15


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


@having("guided_eps", "sample_classes")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("w", [2, 4])
def test_guided_samples_have_the_statistics_of_the_recursion(script, w, sampler):
    """Stronger guidance pushes the mean past that of the class, and narrows the spread."""
    _, alpha_bar = tables()
    alone, everything = gaussian_eps(alpha_bar, 0.5, 0.2), gaussian_eps(alpha_bar, 0.0, 0.6)

    def model(xt, t, y):
        return torch.where(y.view(-1, 1, 1, 1) == -1, everything(xt, t), alone(xt, t))

    def eps_of(xt, t, y):
        return script.guided_eps(model, xt, t, y, w)

    y = torch.zeros(4, dtype=torch.long)
    x0 = script.sample_classes(exact(script), eps_of, y, (1, 100, 100), sampler, 0, clip=False)
    mean, var = guided_chain(sampler, w, 0.0, 0.6, 0.5, 0.2)
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / 40_000))
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / 40_000))
    assert mean > 0.52 and math.sqrt(var) < 0.2


@having("sample_classes")
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_all_strengths_start_from_the_same_noise(script, sampler):
    starts = []
    for w in (0, 3):
        first = {}

        def eps_of(xt, t, y, w=w, first=first):
            first.setdefault(len(xt), xt)
            return w * 0.1 * xt

        torch.randn(w + 1)
        script.sample_classes(exact(script, 10), eps_of, torch.arange(520) % 3, (1, 2, 2), sampler, 7, clip=True)
        starts.append(first)
    assert set(starts[0]) == {500, 20}
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in (500, 20))
    assert not torch.equal(starts[0][500][:20], starts[0][20])


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


@having("labelled_batches")
def test_labels_stay_with_their_images(script):
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    pairs = list(islice(script.labelled_batches(images, torch.arange(256) // 7, 100, seed=1), 8))
    x0, y = torch.cat([x0 for x0, _ in pairs]), torch.cat([y for _, y in pairs])
    seen = ((x0.flatten() + 1) * 127.5).round().long()
    assert torch.equal(seen // 7, y)
    assert seen[:768].view(3, 256).sort().values.tolist() == [list(range(256))] * 3  # each image once an epoch
    assert all(len(y) == 100 for _, y in pairs)


@having("train_conditional")
def test_training_learns_the_labels_and_their_absence(script):
    """Black images and white ones: the label says which; without it the answer lies between. NULL has been trained."""
    images = torch.cat([torch.zeros(16, 1, 4, 4), torch.full((16, 1, 4, 4), 255)]).byte()
    labels = torch.arange(32) // 16
    args = argparse.Namespace(steps=300, batch_size=32, lr=1e-2, seed=0)
    torch.manual_seed(0)
    model = script.UNet(1, [32, 32], 1, 2)  # two norm groups: one would take the grey of the whole image away
    ema, losses = script.train_conditional(script.Diffusion(script.linear_beta()), model, images, labels, args)
    assert losses[-20:].mean() < 0.5 * losses[:5].mean() and not torch.equal(ema.first.weight, model.first.weight)
    xt, t = torch.zeros(1, 1, 4, 4), torch.tensor([400])  # grey: it could come from either
    eps = [ema(xt, t, torch.tensor([y])).mean().item() for y in (0, script.NULL, 1)]  # eps grows as x_0 gets darker
    assert eps[0] > eps[1] + 0.1 > eps[2] + 0.2
    assert (model.label.weight.abs().sum(1) > 0).all() and len(model.label.weight) == 3


# Guidance by a classifier ---------------------------------------------------------------------------------------------


def exact_logits(alpha_bar, means=MEANS, s=S):
    """The ideal noisy classifier of the mixture, of images of one pixel: log p(x_t | y) up to a constant."""

    def classifier(xt, t):
        ab, mean = torch.as_tensor(alpha_bar)[t].view(-1, 1), torch.tensor(means, dtype=torch.float64)
        return -((xt.flatten(1) - ab.sqrt() * mean) ** 2) / (2 * (ab * s**2 + 1 - ab))

    return classifier


@having("classifier_eps")
def test_with_the_perfect_classifier_s_1_is_the_conditional_model(script):
    """Bayes' rule: and for any s the same as classifier-free guidance with w = s."""
    xt, t, y = inputs()
    xt, (_, alpha_bar), diffusion = xt[:, :, :1, :1], tables(), exact(script)
    model, classifier = conditional_eps(alpha_bar), exact_logits(alpha_bar)

    def unconditional(xt, t):
        return model(xt, t, torch.full_like(t, -1))

    for s in (0, 1, 2.5):
        got = script.classifier_eps(diffusion, unconditional, classifier, xt, t, y, s)
        assert torch.allclose(got, script.guided_eps(model, xt, t, y, s), atol=1e-8) and not got.requires_grad
    one = script.classifier_eps(diffusion, unconditional, classifier, xt, 500 + 0 * t, y, 1)
    assert torch.allclose(one, model(xt, 500 + 0 * t, y), atol=1e-8)


@having("class_gradient")
def test_the_gradient_is_that_of_log_p(script):
    """Against differences of log p, by double steps of 1e-5; each image by its own label."""
    xt, t, y = inputs()
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    network = torch.nn.Sequential(*layers).double()
    got, h = script.class_gradient(lambda x, t: network(x), xt, t, y), 1e-5
    for pixel in range(9):
        step = h * torch.eye(9, dtype=torch.float64)[pixel].view(1, 1, 3, 3)
        up, down = (network(xt + sign * step).softmax(1)[range(6), y].log() for sign in (1, -1))
        assert torch.allclose(got.flatten(1)[:, pixel], (up - down) / (2 * h), atol=1e-8)


@having("train_noisy_classifier")
def test_the_noisy_classifier_learns_and_knows_less_of_more_noise(script):
    """Black and white images, one of four pixels: sure near t = 1, a guess near T."""
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    images = (255 * labels).view(40, 1, 1, 1).expand(40, 1, 2, 2).byte()
    diffusion, network = script.Diffusion(script.linear_beta()), dict(channels=1, widths=[8, 16], classes=2)
    classifier = script.train_noisy_classifier(diffusion, images, labels, network, torch.device("cpu"), 150)
    accuracy = script.accuracy_by_t(diffusion, classifier, images, labels, 4000)
    assert accuracy.shape == (20,) and accuracy[:5].min() > 0.95
    assert 0.35 < accuracy[-3:].mean() < 0.65 and accuracy[:8].mean() > accuracy[8:14].mean() > accuracy[14:].mean()


@having("train_noisy_classifier")
def test_ctrl_c_ends_the_training_of_the_noisy_classifier_alone(script, monkeypatch):
    """What it has learned, and the diffusion model trained before it, are kept."""
    cross_entropy, losses = torch.nn.functional.cross_entropy, []

    def interrupted(*args):
        if len(losses) == 2:
            raise KeyboardInterrupt
        losses.append(cross_entropy(*args))
        return losses[-1]

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", interrupted)
    images, labels = torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.arange(4) % 2
    diffusion, network = script.Diffusion(script.linear_beta()), dict(channels=1, widths=[8, 16], classes=2)
    classifier = script.train_noisy_classifier(diffusion, images, labels, network, torch.device("cpu"), 150)
    assert len(losses) == 2 and not classifier.training


@having("diversity")
def test_diversity_is_the_variance_within_classes(script):
    y = torch.arange(3000) % 3
    spread = torch.tensor([1.0, 2.0, 3.0])[y]
    features = 100.0 * y[:, None] + spread[:, None] * torch.randn(3000, 5, generator=torch.Generator().manual_seed(0))
    assert script.diversity(features, y) == pytest.approx(5 * (1 + 4 + 9) / 3, rel=0.1)
    features, y = torch.cat([features, torch.zeros(1, 5)]), torch.cat([y, torch.tensor([3])])
    assert script.diversity(features, y) == pytest.approx(5 * (1 + 4 + 9) / 3, rel=0.1)  # one image has none


@having("by_class")
def test_rows_are_classes(script):
    images = (torch.arange(12) % 3).view(12, 1, 1, 1).float()
    assert script.by_class(images, 3, 2).shape == (3, 2, 1, 1, 1)
    assert script.by_class(images, 3, 2).flatten(1).tolist() == [[0, 0], [1, 1], [2, 2]]
