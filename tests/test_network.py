"""The network, its time embedding, its average and its training, each where an answer is known."""
import copy
import math
from itertools import islice

import pytest
import torch
from conftest import definitions, having


def tiny(script, **changes):
    """The network of --smoke, changed."""
    torch.manual_seed(0)
    network = script.SMOKE["network"]
    if not hasattr(script, "SHAPE"):  # where the data set decides how many channels there are
        network = {**network, "channels": 1}
    if "guided_eps" in definitions(script.path):
        network = {**network, "classes": 3}
    return script.UNet(**{**network, **changes}).eval()


def eps_of(model, xt, t):
    """eps_hat; of a network that takes labels, for the label 1."""
    return model(xt, t, torch.ones_like(t)) if hasattr(model, "label") else model(xt, t)


def shape_of(script):
    """(C, H, W) of the images that tiny takes."""
    return getattr(script, "SHAPE", (1, 28, 28))


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
@pytest.mark.parametrize("shape", [{}, {"blocks": 2}, {"widths": [8, 16, 24]}])
def test_unet_shapes(script, shape):
    model, xt = stirred(tiny(script, **shape)), torch.randn(3, *shape_of(script))
    t = torch.tensor([1, 500, 1000])
    eps_hat = eps_of(model, xt, t)
    assert eps_hat.shape == xt.shape and eps_hat.dtype == torch.float32
    assert torch.allclose(eps_of(model, xt[1:2], t[1:2]), eps_hat[1:2], atol=1e-5)  # images do not see each other
    assert not torch.allclose(eps_of(model, xt, t.flip(0)), eps_hat)  # the time counts
    eps_hat.square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused


@having("UNet.forward")
def test_every_pixel_sees_every_other(script, monkeypatch):
    """At the coarsest resolution attention joins the corners. The norms do as well, and are taken out here."""
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
    model = tiny(script)
    for p in model.parameters():  # none is zero, and none so large that attention sees a single pixel
        torch.nn.init.normal_(p, std=0.1)
    xt = torch.randn(1, *shape_of(script), requires_grad=True)
    eps_of(model, xt, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert (xt.grad != 0).all()


@having("AttentionBlock.forward")  # test_paper.py counts the blocks of the paper's network
def test_attention_stands_where_it_is_asked_for(script):
    """After each block of that resolution, on the way down and up, and in the middle."""
    model = tiny(script, widths=[8, 8, 16], blocks=2, attention=[1])
    held = [[isinstance(block, script.AttentionBlock) for block in level] for level in (*model.down, *model.up)]
    assert held == [[False] * 3, [True, True, False], [False, True, True], [False] * 3]
    model, xt, t = stirred(model), torch.randn(1, *shape_of(script)), torch.tensor([7])
    with_attention = eps_of(model, xt, t)
    torch.nn.init.zeros_(model.down[1][0].attention.out.weight)
    assert not torch.allclose(eps_of(model, xt, t), with_attention)


@having("UNet.forward")
def test_attention_is_the_textbook_formula(script):
    torch.manual_seed(0)
    layer = (getattr(script, "Attention", None) or script.AttnBlock)(32).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 32, 3, 5).double()
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(pixels).split(32, dim=2)
    weights = (q @ k.transpose(1, 2) / math.sqrt(32)).exp()
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


@having("train", "UNet.__init__", once=True)
def test_training_learns_and_repeats_itself(script, tmp_path):
    """Strokes are learned in seconds; the EMA is not the last weights; the same seed gives the same weights."""
    images, name = script.load_images("strokes", None)
    assert name == "strokes" and images.dtype == torch.uint8 and images.shape[1:] == shape_of(script)
    flags = "--smoke --steps 80 --batch-size 16 --lr 2e-3 --T 100 --device cpu --out".split()
    args = script.parse_arguments([*flags, str(tmp_path)])
    script.fill_defaults(args, torch.device("cpu"), {})
    vars(args).update(save_every=80, preview_every=80)  # of those scripts that have them
    quick = {"widths": [16, 16]} | ({"attention": []} if "attention" in script.SMOKE["network"] else {})

    def run():
        model = tiny(script, **quick).train()
        start = copy.deepcopy(model)
        torch.manual_seed(1)
        ema, losses = script.train(script.Diffusion(script.linear_beta(100)), model, images, args)
        return start, model, ema, losses

    start, model, ema, losses = run()
    assert losses.shape == (80,) and losses[-20:].mean() < 0.5 * losses[:5].mean()
    for a, b in ((start, ema), (model, ema)):
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    again = run()
    assert torch.equal(again[3], losses)
    assert all(torch.equal(p, q) for p, q in zip(again[2].parameters(), ema.parameters(), strict=True))


@having("batches")
@pytest.mark.parametrize("batch_size", [100, 128])
def test_an_epoch_shows_every_image_once_in_exactly_minus_one_to_one(script, batch_size):
    """Whether or not the batch divides the epoch; all batches are of one size, the seed decides the order."""
    images = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 1, 2, 2)
    x0 = list(islice(script.batches(images, batch_size, seed=1), 8))
    assert all(batch.shape == (batch_size, 1, 2, 2) and batch.abs().max() <= 1 for batch in x0)
    seen = ((torch.cat(x0)[:, 0, 0, 0] + 1) * 127.5).round().long()
    epochs = seen[:768].view(3, 256)
    assert all(epoch.bincount(minlength=256).tolist() == [1] * 256 for epoch in epochs)
    assert torch.cat(x0).min() == -1 and torch.cat(x0).max() == 1
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(next(script.batches(images, batch_size, seed=1)), x0[0])
    assert not torch.equal(next(script.batches(images, batch_size, seed=2)), x0[0])


@having("flip")
def test_flip_mirrors_half_of_the_images(script):
    x0 = torch.rand(4000, 3, 2, 5)
    torch.manual_seed(0)
    got = script.flip(x0)
    same, mirrored = ((got == x).flatten(1).all(1) for x in (x0, x0.flip(3)))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum().item() - 2000) < 4.5 * math.sqrt(4000 / 4)


@having("flip", "train")
def test_training_sees_both_halves(script, tmp_path):
    """Images whose left edge alone is bright: the network is shown about as many with a bright right edge."""
    images, seen = torch.zeros(200, *shape_of(script), dtype=torch.uint8), []
    images[..., 0] = 255

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    args = script.parse_arguments(["--smoke", "--steps", "10", "--batch-size", "40", "--out", str(tmp_path)])
    args.device = "cpu"
    script.fill_defaults(args, torch.device("cpu"), {})
    script.train(Recorder(script.linear_beta(args.T)), tiny(script), images, args)
    left, right = (torch.cat(seen)[..., edge].mean((1, 2)) == 1 for edge in (0, -1))
    assert (left ^ right).all() and abs(right.sum().item() - 200) < 4.5 * math.sqrt(400 / 4)
