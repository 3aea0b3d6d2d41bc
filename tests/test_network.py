"""The network, its time embedding, its average and its training, each where an answer is known."""
import argparse
import copy
import math

import pytest
import torch
from conftest import having


def tiny(script, **changes):
    torch.manual_seed(0)
    return script.UNet(**{"widths": [8, 16], "blocks": 1, "patch": 2, **changes})


def stirred(model):
    """The model with random weights everywhere: some begin at zero, and hide what lies behind them."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


@having("time_embedding")
def test_time_embedding_values(script):
    """sin before cos; the frequencies fall from 1 to 1/10000 by equal factors."""
    e = script.time_embedding(torch.tensor([0, 1, 1000]), 8).double()
    frequency = [10_000 ** (-k / 3) for k in range(4)]
    assert e.shape == (3, 8)
    for row, t in zip(e, (0, 1, 1000), strict=True):
        expected = [math.sin(t * f) for f in frequency] + [math.cos(t * f) for f in frequency]
        assert torch.allclose(row, torch.tensor(expected).double(), atol=1e-4)


@having("UNet.forward")
@pytest.mark.parametrize("shape", [{"patch": 1}, {"patch": 2}, {"blocks": 2}, {"widths": [8, 16, 24], "patch": 1}])
def test_unet_shapes(script, shape):
    model, xt = stirred(tiny(script, **shape)), torch.randn(3, 1, 28, 28)
    t = torch.tensor([1, 500, 1000])
    eps_hat = model(xt, t)
    assert eps_hat.shape == xt.shape and eps_hat.dtype == torch.float32
    assert torch.allclose(model(xt[1:2], t[1:2]), eps_hat[1:2], atol=1e-5)  # images do not see each other
    assert not torch.allclose(model(xt, t.flip(0)), eps_hat)  # the time counts
    eps_hat.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@having("UNet.forward")
def test_every_pixel_sees_every_other(script):
    """At 7x7 attention joins the corners."""
    model = stirred(tiny(script))
    xt = torch.randn(1, 1, 28, 28, requires_grad=True)
    model(xt, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert (xt.grad[0, 0] != 0).all()


@having("Attention.forward")
def test_attention_is_the_textbook_formula(script):
    torch.manual_seed(0)
    layer = script.Attention(16).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 16, 3, 5).double()
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(pixels).split(16, dim=2)
    weights = (q @ k.transpose(1, 2) / math.sqrt(16)).exp()
    out = layer.out(weights / weights.sum(2, keepdim=True) @ v)
    assert torch.allclose(layer(x), x + out.transpose(1, 2).reshape(x.shape), atol=1e-10)


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


@having("train", "batches", "load_images")
def test_training_learns_and_repeats_itself(script):
    """Strokes are learned in seconds; the EMA is not the last weights; the same seed gives the same weights."""
    images, name = script.load_images("strokes", None)
    assert name == "strokes" and images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28)
    args = argparse.Namespace(steps=150, batch_size=16, lr=2e-3)

    def run():
        model = tiny(script, widths=[16, 16])
        start = copy.deepcopy(model)
        torch.manual_seed(1)
        ema, losses = script.train(script.Diffusion(script.linear_beta(100)), model, images, args)
        return start, model, ema, losses

    start, model, ema, losses = run()
    assert losses.shape == (150,) and losses[-20:].mean() < 0.5 * losses[:5].mean()
    for a, b in ((start, ema), (model, ema)):
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    again = run()
    assert torch.equal(again[3], losses)
    assert all(torch.equal(p, q) for p, q in zip(again[2].parameters(), ema.parameters(), strict=True))


@having("batches")
def test_an_epoch_shows_every_image_once_in_exactly_minus_one_to_one(script):
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 2, 2)
    torch.manual_seed(0)
    endless = script.batches(images, 100)
    epochs = [torch.cat([next(endless) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert epoch.shape == (256, 1, 2, 2) and epoch.min() == -1 and epoch.max() == 1
        seen = ((epoch[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert seen.bincount(minlength=256).tolist() == [1] * 256
    assert not torch.equal(*epochs)
