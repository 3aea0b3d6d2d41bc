"""The network and its time embedding, where an answer is known."""

import inspect
import math

import pytest
import torch
from conftest import MNIST, having, load


def tiny(script, **changes):
    """The network of --smoke, changed; for images (1 or 3, 32, 32), with 3 classes where it takes
    labels.
    """
    torch.manual_seed(0)
    network = {**script.SMOKE["unet"], **changes}
    if "classes" in inspect.signature(script.UNet).parameters:
        network["classes"] = 3
    return script.UNet(**network).eval()


def eps_of(model, xt, t):
    """eps_hat; of a network that takes labels, for the label 1."""
    return model(xt, t, torch.ones_like(t)) if hasattr(model, "label") else model(xt, t)


def images(model, n):
    return torch.randn(n, model.first.in_channels, 32, 32)


def stirred(model):
    """The model with random weights everywhere: some begin at zero, and hide what lies behind them.
    """
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


@having("UNet.__init__", "UNet.forward")
def test_unet_shapes(script):
    for shape in ({}, {"blocks": 2}, {"widths": [16, 32, 48]}):
        model = stirred(tiny(script, **shape))
        xt, t = images(model, 3), torch.tensor([1, 500, 1000])
        eps_hat = eps_of(model, xt, t)
        assert eps_hat.shape == xt.shape and eps_hat.dtype == torch.float32
        assert torch.allclose(
            eps_of(model, xt[1:2], t[1:2]), eps_hat[1:2], atol=1e-5
        )  # images do not see each other
        assert not torch.allclose(eps_of(model, xt, t.flip(0)), eps_hat)  # the time counts
        eps_hat.square().sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]


@having("UNet.__init__", "UNet.forward")
def test_every_pixel_sees_every_other(script, monkeypatch):
    """At the coarsest resolution attention joins the corners. The norms do as well, and are taken
    out here.
    """
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x)
    model = tiny(script)
    for (
        p
    ) in model.parameters():  # none is zero, and none so large that attention sees a single pixel
        torch.nn.init.normal_(p, std=0.1)
    xt = images(model, 1).requires_grad_()
    eps_of(model, xt, torch.tensor([10]))[0, 0, 0, 0].backward()
    assert (xt.grad != 0).all()


@having("UNet.__init__", "UNet.forward")
def test_a_new_network_predicts_no_more_than_its_bias(script):
    """The last convolution begins at 0 (in ddpm_paper.py next to it), so L_simple begins at about
    1.
    """
    model = tiny(script)
    assert eps_of(model, images(model, 2), torch.tensor([3, 9])).std((0, 2, 3)).max() < 1e-4


@having("AttentionBlock.forward")  # test_paper.py counts the blocks of the paper's network
def test_attention_stands_where_it_is_asked_for(script):
    """After each block of that resolution, on the way down and up, and in the middle."""
    model = tiny(script, widths=[16, 16, 32], blocks=2, attention=[1])
    held = [
        [isinstance(block, script.AttentionBlock) for block in level]
        for level in (*model.down, *model.up)
    ]
    assert held == [[False] * 3, [True, True, False], [False, True, True], [False] * 3]
    model, t = stirred(model), torch.tensor([7])
    xt = images(model, 1)
    with_attention = eps_of(model, xt, t)
    torch.nn.init.zeros_(model.down[1][0].attention.out.weight)
    assert not torch.allclose(eps_of(model, xt, t), with_attention)


@pytest.mark.parametrize("name", ["Attention", "AttnBlock"])
def test_attention_is_the_textbook_formula(name):
    torch.manual_seed(0)
    layer = getattr(load(MNIST if name == "Attention" else "paper/ddpm_paper.py"), name)(
        32
    ).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 32, 3, 5).double()
    pixels = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.qkv(pixels).split(32, dim=2)
    weights = (q @ k.transpose(1, 2) / math.sqrt(32)).exp()
    out = layer.out(weights / weights.sum(2, keepdim=True) @ v)
    assert torch.allclose(layer(x), x + out.transpose(1, 2).reshape(x.shape), atol=1e-10)


@having("ResBlock.forward")
def test_a_residual_block_is_its_formula(script):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); the skip is a 1x1 convolution where
    widths differ.
    """
    torch.manual_seed(0)
    for c_in, c_out in ((16, 16), (16, 24)):
        block, e = stirred(script.ResBlock(c_in, c_out, 8)).double(), torch.randn(2, 8).double()
        x = torch.randn(2, c_in, 5, 5).double()

        def normed(h, norm):
            groups = h.view(2, norm.num_groups, -1)
            centred = groups - groups.mean(2, keepdim=True)
            h = (centred / (centred.square().mean(2, keepdim=True) + norm.eps).sqrt()).view(h.shape)
            h = h * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
            return h * torch.sigmoid(h)

        h = block.conv1(normed(x, block.norm1)) + (e @ block.time.weight.T + block.time.bias).view(
            2, -1, 1, 1
        )
        skip = x
        if c_in != c_out:
            skip = torch.einsum("oihw,nixy->noxy", block.skip.weight, x) + block.skip.bias.view(
                1, -1, 1, 1
            )
        assert torch.allclose(block(x, e), skip + block.conv2(normed(h, block.norm2)), atol=1e-10)
