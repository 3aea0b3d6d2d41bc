"""The recipe of training by what it does: to the optimiser, to the weights, to the images that the network sees."""
import argparse
import math

import pytest
import torch
from conftest import CIFAR, MNIST, having, load

both = pytest.mark.parametrize("path", [MNIST, CIFAR], ids=["ddpm_mnist", "ddpm_cifar"])


class OneConvolution(torch.nn.Module):
    """The smallest network: eps_hat = a 1x1 convolution of x_t."""

    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, xt, t):
        return self.conv(xt)


def train(path, tmp_path, images=None, model=None, diffusion=None, **changes):
    """The script's train on a small problem -> EMA, losses."""
    script = load(path)
    channels = 1 if path == MNIST else 3
    images = torch.randint(0, 256, (20, channels, 4, 4), dtype=torch.uint8) if images is None else images
    settings = dict(steps=60, batch_size=8, lr=1e-3, seed=0, T=10, data="made", samples=4, variance="beta")
    settings |= dict(out=tmp_path, network={}, save_every=10**9, preview_every=10**9) | changes
    diffusion = diffusion or script.Diffusion(script.linear_beta(10), images.device)
    return script.train(diffusion, model or OneConvolution(channels), images, argparse.Namespace(**settings))


@having("update_ema")
def test_ema_is_a_weighted_mean_that_forgets_its_start(script):
    """From 100 (the random start) with the model at 1 ever after: what is left of the start is the product of the d."""
    ema, model = torch.nn.Linear(1, 1).requires_grad_(False), torch.nn.Linear(1, 1).requires_grad_(False)
    ema.weight.fill_(100), model.weight.fill_(1)
    for step in range(1000):
        script.update_ema(ema, model, step)
    left = math.prod((1 + step) / (10 + step) for step in range(1000))
    assert ema.weight.item() == pytest.approx(1 + 99 * left, rel=1e-5) and left < 1e-15
    ema.weight.fill_(100)
    script.update_ema(ema, model, 10**9)
    assert ema.weight.item() == pytest.approx(1 + 99 * 0.9999, rel=1e-6)


@both
def test_the_recipe(path, tmp_path, monkeypatch):
    """The rate rises for a 30th of the steps and falls to 0; gradients have norm 1 at most; the EMA is its formula."""
    rates, norms, weights = [], [], []

    class Watched(torch.optim.AdamW):
        def step(self):
            [group] = self.param_groups
            rates.append(group["lr"]), norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
            assert group["betas"] == (0.9, 0.95) and group["fused"]
            super().step()
            weights.append(group["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    model = OneConvolution(1 if path == MNIST else 3)
    model.conv.weight.data += 30  # so wrong that its gradient must be clipped
    start = model.conv.weight.detach().clone()
    ema, losses = train(path, tmp_path, model=model, steps=300, lr=1.0)
    assert rates == pytest.approx([min(30 * (i + 1), 300 - i) / 300 for i in range(300)])
    assert [rates[0], rates[9], rates[-1]] == pytest.approx([0.1, 291 / 300, 1 / 300])
    assert norms[0] == pytest.approx(1, abs=1e-3) and max(norms) < 1.001
    expected = start
    for k, weight in enumerate(weights):
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.conv.weight, expected, atol=1e-4)
    assert losses.shape == (300,) and losses[-20:].mean() < losses[:5].mean()


@both
def test_the_network_sees_every_image_in_minus_one_to_one(path, tmp_path):
    """x_0 ~ q(x_0): each image as likely as any other, grey level k of 0..255 as k / 127.5 - 1."""
    seen, script = [], load(path)

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    channels = 1 if path == MNIST else 3
    levels = torch.arange(0, 256, 15).byte()  # 18 images, each of one level
    images = levels.view(18, 1, 1, 1).expand(18, channels, 4, 4)
    train(path, tmp_path, images, diffusion=Recorder(script.linear_beta(10)), steps=50, batch_size=36)
    x0 = torch.stack(seen)
    assert x0.shape == (50, 36, channels, 4, 4) and x0.dtype == torch.float32
    k = (x0[:, :, 0, 0, 0] + 1) * 127.5
    assert torch.allclose(k, k.round(), atol=1e-3) and x0.min() == -1 and x0.max() == 1
    counts = (k / 15).round().long().flatten().bincount(minlength=18)
    assert (counts - 100).abs().max() < 4.5 * math.sqrt(1800 / 18 * 17 / 18)
    assert len({tuple(batch.tolist()) for batch in k}) == 50  # no batch comes twice


@having("flip")
def test_flip_mirrors_half_of_the_images(script):
    x0 = torch.rand(4000, 3, 2, 5)
    torch.manual_seed(0)
    got = script.flip(x0)
    same, mirrored = ((got == x).flatten(1).all(1) for x in (x0, x0.flip(3)))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum().item() - 2000) < 4.5 * math.sqrt(4000 / 4)


def test_training_on_colour_sees_both_halves(tmp_path):
    """Images whose left edge alone is bright: the network is shown about as many with a bright right edge."""
    script, seen = load(CIFAR), []

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    images = torch.zeros(200, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = 255
    train(CIFAR, tmp_path, images, diffusion=Recorder(script.linear_beta(10)), steps=10, batch_size=40)
    left, right = (torch.cat(seen)[..., edge].mean((1, 2)) == 1 for edge in (0, -1))
    assert (left ^ right).all() and abs(right.sum().item() - 200) < 4.5 * math.sqrt(400 / 4)


@both
def test_a_small_network_learns_diagonals(path, tmp_path):
    """In seconds; the same seed gives the same weights; the EMA is not the last weights."""
    script, channels = load(path), 1 if path == MNIST else 3
    images = torch.stack([255 * torch.eye(16).roll(i) for i in range(16)])[:, None].repeat(1, channels, 1, 1).byte()

    def learn():
        torch.manual_seed(1)
        model = script.UNet(channels, [16, 16], 1)
        return model, *train(path, tmp_path, images, model, steps=80, batch_size=16, lr=2e-3)

    model, ema, losses = learn()
    assert losses[-20:].mean() < 0.5 * losses[:5].mean()
    assert any(not torch.equal(p, q) for p, q in zip(ema.parameters(), model.parameters(), strict=True))
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.training
    _, again, losses_again = learn()
    assert torch.equal(losses_again, losses)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ema.parameters(), strict=True))
