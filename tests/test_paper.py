"""ddpm_paper.py: the network to the parameter, published weights, the bound, several ranks."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, exact, gaussian_eps, having, load, one_line, run, tables
from test_resume import same

PAPER = "paper/ddpm_paper.py"


def stirred(model):
    """The model with random values in every tensor, of a size that lets the image through."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model.eval()


def main(*flags):
    load(PAPER).main([str(flag) for flag in flags])


# The network ------------------------------------------------------------------------------------


def test_the_network_has_the_paper_s_parameters():
    """Counted from Appendix B with pencil and paper: blocks, attentions, resamplings, the ends."""
    model = load(PAPER).UNet()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def block(a, b):
        skip = a * b + b if a != b else 0
        return 2 * a + 9 * a * b + b + 512 * b + b + 2 * b + 9 * b * b + b + skip

    attention, resample = 2 * 256 + 4 * (256 * 256 + 256), 9 * 256 * 256 + 256
    assert count(model) == 35_746_307
    assert count(model.time) == 128 * 512 + 512 + 512 * 512 + 512
    assert count(model.first) == 27 * 128 + 128
    assert count(model.down[0]) == 2 * block(128, 128) + 9 * 128 * 128 + 128
    assert count(model.down[1]) == block(128, 256) + block(256, 256) + 2 * attention + resample
    assert count(model.down[3]) == 2 * block(256, 256)
    assert count(model.middle) == 2 * block(256, 256) + attention
    assert count(model.up[3]) == 3 * block(512, 256) + resample
    assert count(model.up[1]) == 2 * block(512, 256) + block(384, 256) + 3 * attention + resample
    assert count(model.up[0]) == block(384, 128) + 2 * block(256, 128)
    assert count(model.last) == 2 * 128 + 27 * 128 + 3


def test_the_time_goes_in_as_sines_then_cosines_of_t_minus_1():
    model, seen = load(PAPER).UNet(widths=[128], blocks=1, attention=[]), []
    model.time.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.zeros(2, 3, 8, 8), torch.tensor([1, 700]))
    frequency = np.exp(-math.log(10_000) * np.arange(64) / 63)
    for row, t in zip(seen[0], (0, 699), strict=True):
        expected = np.concatenate([np.sin(t * frequency), np.cos(t * frequency)])
        assert np.abs(row.detach().numpy() - expected).max() < 1e-4


def test_downsampling_pads_to_the_right_and_below():
    """A kernel of ones sums 3x3 pixels: the first sum begins at pixel 0, the last reaches one
    beyond the edge.
    """
    downsample = load(PAPER).UNet(3, [32, 32], 1, attention=[]).down[0][-1]
    with torch.no_grad():
        downsample.conv.weight.fill_(1 / 32)
        downsample.conv.bias.zero_()
        x = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 32, 6, 6)
        got = downsample(x, None)[0, 0]
    pixels = x[0, 0]
    assert got.shape == (3, 3) and torch.allclose(got[0, 0], pixels[0:3, 0:3].sum())
    assert torch.allclose(got[2, 2], pixels[4:6, 4:6].sum())


def test_norms_have_32_groups_and_eps_1e_6():
    norms = [m for m in load(PAPER).UNet().modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(32, 1e-6)} and len(norms) == 2 * 22 + 6 + 1


def test_dropout_is_the_paper_s_and_off_when_drawing():
    model = load(PAPER).UNet(widths=[32], blocks=1, attention=[])
    stirred(model)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    xt, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    assert rates == {0.1} and torch.equal(model(xt, t), model(xt, t))
    model.train()
    assert not torch.equal(model(xt, t), model(xt, t))


def test_weights_begin_as_in_the_official_code():
    """Xavier-uniform for each c x c matrix and for convolutions with their window; next to nothing
    where a block ends.
    """
    torch.manual_seed(0)
    model = load(PAPER).UNet()
    block = model.down[1][1]
    expected = {
        block.conv1.weight: math.sqrt(6 / (9 * 256 + 9 * 256)),
        block.time.weight: math.sqrt(6 / (512 + 256)),
        block.attention.qkv.weight: math.sqrt(6 / (256 + 256)),
        block.conv2.weight: 1e-5 * math.sqrt(6 / (9 * 256 + 9 * 256)),
        block.attention.out.weight: 1e-5 * math.sqrt(6 / (256 + 256)),
        model.last[2].weight: 1e-5 * math.sqrt(6 / (9 * 128 + 9 * 3)),
    }
    for weight, bound in expected.items():
        assert 0.98 * bound < weight.abs().max() <= bound * 1.0001
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert block.conv1.bias.abs().max() == 0


# Published weights ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle():
    """diffusers' network of the published configuration, with random values in every tensor."""
    diffusers = pytest.importorskip("diffusers")
    down, up = "DownBlock2D", "UpBlock2D"
    settings = dict(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=(down, "AttnDownBlock2D", down, down),
        up_block_types=(up, up, "AttnUpBlock2D", up),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    return stirred(diffusers.UNet2DModel(**settings))


def published_layout(state):
    """diffusers' names and shapes -> those of the published file, by a table of this test's own.

    There the levels of both ways are counted from the finest, and attention has 1x1 convolutions.
    """
    table = [
        (r"time_embedding\.linear_1", "temb.dense.0"),
        (r"time_embedding\.linear_2", "temb.dense.1"),
        (r"conv_norm_out", "norm_out"),
        (r"time_emb_proj", "temb_proj"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"down_blocks", "down"),
        (r"\.resnets", ".block"),
        (r"\.attentions", ".attn"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_(q|k|v)", r"\1"),
    ]
    found = {}
    for name, weight in state.items():
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
        name = name.replace("upsamplers.0", "upsample")
        for theirs, published in table:
            name = re.sub(theirs, published, name)
        if ".attn" in name and weight.ndim == 2:
            weight = weight[:, :, None, None]
        found[name] = weight
    return found


def test_the_layout_is_that_of_the_published_file(oracle):
    """Names and shapes that github.com/ermongroup/ddim's models/diffusion.py has, some of each."""
    weights = published_layout(oracle.state_dict())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {
        "temb.dense.0.weight": (512, 128),
        "temb.dense.1.bias": (512,),
        "conv_in.weight": (128, 3, 3, 3),
        "down.0.block.0.norm1.weight": (128,),
        "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "down.1.attn.1.q.weight": (256, 256, 1, 1),
        "down.1.attn.0.proj_out.bias": (256,),
        "down.2.downsample.conv.weight": (256, 256, 3, 3),
        "mid.block_1.temb_proj.weight": (256, 512),
        "mid.attn_1.norm.weight": (256,),
        "mid.block_2.conv2.weight": (256, 256, 3, 3),
        "up.3.block.2.conv1.weight": (256, 512, 3, 3),
        "up.3.upsample.conv.weight": (256, 256, 3, 3),
        "up.1.attn.2.v.weight": (256, 256, 1, 1),
        "up.1.block.2.nin_shortcut.weight": (256, 384, 1, 1),
        "up.0.block.0.conv1.weight": (128, 384, 3, 3),
        "norm_out.weight": (128,),
        "conv_out.bias": (3,),
    }
    assert expected.items() <= shapes.items()
    assert "down.3.downsample.conv.weight" not in shapes
    assert "up.0.upsample.conv.weight" not in shapes
    assert sum(weight.numel() for weight in weights.values()) == 35_746_307


@pytest.fixture
def published(oracle, tmp_path):
    path = tmp_path / "model-790000.ckpt"
    torch.save(published_layout(oracle.state_dict()), path)
    return path


def test_published_weights_run_in_it(oracle, published):
    """The same outputs as those of diffusers' network, in fp32."""
    model, facts = load(PAPER).load_trained(published)
    assert (facts["T"], facts["schedule"]) == (1000, "linear") and not model.training
    xt, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 700])
    with torch.no_grad():
        expected = oracle(xt, t - 1).sample
        assert expected.std() > 0.1
        assert (model(xt, t) - expected).abs().max() < 3e-5


@pytest.fixture
def sampled(monkeypatch):
    """In place of T steps of sampling: what the sampler was given, as a list of calls."""
    calls = []

    def sample(self, model, shape, **options):
        calls.append((self, model, tuple(shape), options))
        return torch.zeros(shape)

    monkeypatch.setattr(load(PAPER).Diffusion, "sample", sample)
    return calls


def test_pretrained_generates_with_the_averaged_weights(oracle, tmp_path, monkeypatch, sampled):
    """Downloaded under a name of its own; 1000 steps of the linear schedule."""
    asked = []

    def download(url, **options):
        asked.append((url, options))
        return published_layout(oracle.state_dict())

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.chdir(tmp_path)
    main("--pretrained", "--samples", "3", "--variance", "beta_tilde")
    [(url, options)] = asked
    assert url == "https://heibox.uni-heidelberg.de/f/2e4f01e2d9ee49bab1d5/?dl=1"
    expected = dict(file_name="ddpm_ema_cifar10.ckpt", map_location="cpu", weights_only=True)
    assert options == expected
    [(diffusion, model, shape, options)] = sampled
    assert shape == (3, 3, 32, 32) and options == dict(variance="beta_tilde")
    assert diffusion.T == 1000
    assert torch.equal(diffusion.beta.cpu(), load(PAPER).linear_beta().float())
    assert torch.equal(model.first.weight.cpu(), oracle.conv_in.weight)
    written = {p.name for p in Path("runs/ddpm_paper/loaded").iterdir()}
    assert written == {"samples.png", "samples.npz"}


def test_without_network_pretrained_is_one_line(tmp_path, monkeypatch, capsys):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    message = one_line(PAPER, ["--pretrained", "--out", tmp_path], capsys)
    assert "https://heibox" in message


@pytest.mark.parametrize("flag", ["--T", "--steps", "--lr", "--batch-size"])
def test_pretrained_refuses_flags_of_training(flag, tmp_path, capsys):
    message = one_line(PAPER, ["--pretrained", flag, "7", "--out", tmp_path / "out"], capsys)
    assert flag in message and not (tmp_path / "out").exists()


def test_published_weights_with_a_missing_layer_are_one_line(published, tmp_path, capsys):
    weights = torch.load(published, weights_only=True)
    del weights["down.1.attn.1.k.weight"]
    torch.save(weights, tmp_path / "less.ckpt")
    flags = ["--load", tmp_path / "less.ckpt", "--out", tmp_path / "out"]
    assert "less.ckpt" in one_line(PAPER, flags, capsys)


# The schedule and the bound ---------------------------------------------------------------------


@having("gaussian_kl")
def test_kl_is_the_library_s(script):
    torch.manual_seed(0)
    m1, m2 = torch.randn(2, 5).double()
    v1, v2 = torch.rand(2, 5).double()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(m1, v1.sqrt()), normal(m2, v2.sqrt()))
    bits = kl.mean().item() / math.log(2)
    assert script.gaussian_kl(m1, v1, m2, v2).item() == pytest.approx(bits, rel=1e-12)


@having("decoder_cost")
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.999])
def test_the_decoder_shares_out_a_probability_of_1(script, mean):
    levels = (torch.arange(256).double() / 127.5 - 1).view(-1, 1)
    sigma = torch.tensor(0.3).double()
    centre = torch.tensor(mean).double()
    cost = torch.stack([script.decoder_cost(level, centre, sigma) for level in levels])
    assert (2**-cost).sum().item() == pytest.approx(1, abs=1e-9)
    density = math.exp(-0.5 * ((levels[100].item() - mean) / 0.3) ** 2)
    density /= 0.3 * math.sqrt(2 * math.pi)
    assert 2 ** -cost[100].item() == pytest.approx(density * 2 / 255, rel=1e-3)


def closed_form_bound(m, s, variance):
    """L_0, ..., L_T in bits for the exact eps, with pixels ~ N(m, s^2), rounded to 256 levels.

    The error of x0_hat has the mean square
        v_t = s^2 (1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar),
    and L_0 is integrated over the levels and the noise.
    """
    beta, alpha_bar = tables()
    before, after = alpha_bar[:-1], alpha_bar[1:]
    tilde = np.concatenate([[0], (1 - before) / (1 - after) * beta[1:]])
    sigma2 = {"beta": beta, "beta_tilde": tilde}[variance]
    v = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)
    L = np.zeros(1001)
    for t in range(2, 1001):
        weight = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])
        ratio = tilde[t] / sigma2[t]
        L[t - 1] = (ratio - 1 - math.log(ratio) + weight**2 * v[t] / sigma2[t]) / 2
    last = alpha_bar[1000]
    L[1000] = (1 - last + last * (m**2 + s**2) - 1 - math.log(1 - last)) / 2
    z, weight = np.polynomial.hermite_e.hermegauss(60)
    x0 = np.arange(256)[:, None] / 127.5 - 1
    x1 = math.sqrt(alpha_bar[1]) * x0 + math.sqrt(1 - alpha_bar[1]) * z
    slope = math.sqrt(alpha_bar[1]) * s**2 / (alpha_bar[1] * s**2 + 1 - alpha_bar[1])
    mean, sigma = m + slope * (x1 - math.sqrt(alpha_bar[1]) * m), math.sqrt(tilde[2])
    phi = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
    mass = phi((x0 + 1 / 255 - mean) / sigma) - phi((x0 - 1 / 255 - mean) / sigma)
    level = np.exp(-0.5 * ((x0[:, 0] - m) / s) ** 2)
    cost = (-np.log(np.maximum(mass, 1e-300)) * weight).sum(1) / weight.sum()
    L[0] = (level / level.sum() * cost).sum()
    return L / math.log(2)


@having("Diffusion.bound")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_bits_per_dimension_of_rounded_gaussian_pixels(script, variance):
    """In closed form; and above the entropy, which no code can beat, but by less than a bit."""
    m, s = 0.1, 0.2
    torch.manual_seed(0)
    pixels = (m + s * torch.randn(4, 1, 100, 100).double()).clamp(-1, 1)
    x0 = (pixels * 127.5 + 127.5).round() / 127.5 - 1
    L = exact(script).bound(gaussian_eps(tables()[1], m, s), x0, variance=variance)
    expected = closed_form_bound(m, s, variance)
    assert L.shape == (1001,) and L.sum().item() == pytest.approx(expected.sum(), abs=0.03)
    for part in (slice(0, 1), slice(1, 10), slice(10, 1000)):
        assert L[part].sum().item() == pytest.approx(expected[part].sum(), abs=0.02)
    assert L[1000].item() == pytest.approx(expected[1000], rel=0.05)
    entropy = math.log2(127.5 * s * math.sqrt(2 * math.pi * math.e))
    assert entropy < L.sum() < entropy + 1


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of a --smoke run, in one process, of 6 training steps."""
    folder = tmp_path_factory.mktemp("smoke")
    main("--smoke", "--device", "cpu", "--seed", "5", "--nll", "4", "--out", folder)
    return folder


class FakeCIFAR10:
    """Data that tell on themselves: training images of level 10, test image k of level 100 + k."""

    base_folder = "none"

    def __init__(self, root, train=True, download=False):
        levels = np.full(50, 10) if train else 100 + np.arange(70)
        shape = (len(levels), 32, 32, 3)
        self.data = np.broadcast_to(levels[:, None, None, None], shape).astype(np.uint8)


def test_nll_is_the_mean_over_test_images(smoke, tmp_path, monkeypatch, capsys, sampled):
    """In batches, the last one smaller; each image counts the same.

    The bound of level k is k bits, all in L_0, and 1.5 in L_{T-1} and 0.25 in L_T.
    There are 70 images, fewer than asked for, and the report says so.
    """
    script, batches = load(PAPER), []

    def bound(self, model, x0, variance):
        k = (x0[:, 0, 0, 0] + 1) * 127.5
        batches.append(k.round().long().tolist())
        terms = torch.zeros(self.T + 1)
        terms[0] = k.mean()
        terms[-2:] = torch.tensor([1.5, 0.25])
        return terms

    monkeypatch.setattr(script, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr(script.Diffusion, "bound", bound)
    main("--load", smoke / "model.pt", "--data", "cifar10", "--out", tmp_path, "--nll", "99")
    together = sum(batches, [])
    assert len(batches) > 1 and len(batches[-1]) < len(batches[0])
    assert sorted(together) == list(range(100, 170)) != together  # so that fewer are a sample
    bits = "136.250 bits per dimension of 70 test images (cifar10)"
    assert f"{bits}, of which L_0 134.500 and L_T 0.2500" in capsys.readouterr().out
    assert (tmp_path / "nll.png").stat().st_size > 1000


def test_nll_after_training_and_loaded(smoke, tmp_path, capsys, sampled):
    """--load --nll repeats what the run itself has found; beta_tilde gives another bound."""
    pictures = []
    for more in ([], ["--variance", "beta_tilde"]):
        source = smoke / "checkpoint.pt"
        main("--load", source, "--seed", "5", "--nll", "4", "--out", tmp_path, *more)
        pictures.append((tmp_path / "nll.png").read_bytes())
        assert "bits per dimension of 4 test images (photos)" in capsys.readouterr().out
    assert pictures[0] == (smoke / "nll.png").read_bytes() != pictures[1]
    assert [options["variance"] for _, _, _, options in sampled] == ["beta", "beta_tilde"]


def test_the_plot_shows_each_term_at_its_t(tmp_path, monkeypatch):
    script, figures = load(PAPER), []
    usual = script.Figure.savefig
    monkeypatch.setattr(
        script.Figure, "savefig", lambda self, *_: figures.append(self) or usual(self, *_)
    )
    script.plot_terms(torch.tensor([0.5, 0.25, 0.125, 0.01]), "a title", tmp_path / "nll.png")
    [axes] = figures[0].axes
    [line] = axes.get_lines()
    assert line.get_xydata().tolist() == [[0, 0.5], [1, 0.25], [2, 0.125]]
    assert axes.get_yscale() == "log" and axes.get_title() == "a title"
    assert axes.get_xlabel() == "t" and axes.get_ylabel() == "$L_t$ in bits per dimension"


def test_test_crops_share_no_pixel_with_training_crops(monkeypatch):
    """In photographs whose left part is black and whose right part is white, training crops are
    black and test crops white.
    """
    script = load(PAPER)
    photo = np.zeros((427, 640, 3), np.uint8)
    photo[:, 512:] = 255

    class Photos:
        images = [photo, photo]

    monkeypatch.setattr(script, "load_sample_images", Photos)
    train, test = (script.load_images("photos", "nowhere", train)[0] for train in (True, False))
    assert train.shape == (2 * 46 * 57, 3, 32, 32) and test.shape == (2 * 46 * 9, 3, 32, 32)
    assert (train == 0).all() and (test == 255).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_the_one_asked_for_and_the_file_keeps_it(schedule, tmp_path, sampled):
    script = load(PAPER)
    main("--smoke", "--steps", "1", "--schedule", schedule, "--T", "20", "--out", tmp_path)
    main("--load", tmp_path / "model.pt", "--samples", "3", "--out", tmp_path / "loaded")
    beta = dict(linear=script.linear_beta, cosine=script.cosine_beta)[schedule](20)
    assert len(sampled) == 2
    for diffusion, *_ in sampled:
        assert torch.equal(diffusion.beta.cpu(), beta.float())


def test_the_paper_s_settings():
    """Section 4 and Appendix B; the same network as that of the published weights."""
    script = load(PAPER)
    recipe = dict(steps=800_000, batch_size=128, lr=2e-4, warm_up=5000, T=1000, schedule="linear")
    assert script.GPU.items() >= recipe.items()
    with torch.device("meta"):
        found, default = script.UNet(**script.GPU["unet"]), script.UNet()
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (found, default)]
    assert shapes[0] == shapes[1]
    assert {m.p for m in found.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_half_of_the_images_are_mirrored(tmp_path, monkeypatch):
    """Images whose left edge alone is bright: half of them are shown with a bright right edge."""
    script, seen = load(PAPER), []
    images = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    images[..., 0] = 255
    monkeypatch.setattr(script, "load_images", lambda *_: (images, "made"))
    usual = script.Diffusion.loss

    def loss(self, model, x0):
        seen.append(x0)
        return usual(self, model, x0)

    monkeypatch.setattr(script.Diffusion, "loss", loss)
    main("--smoke", "--batch-size", "40", "--out", tmp_path)
    x0 = torch.cat(seen)
    left, right = (x0[..., edge].mean((1, 2)) == 1 for edge in (0, -1))
    assert len(x0) == 240 and (left ^ right).all()
    assert abs(right.sum().item() - 120) < 4.5 * math.sqrt(240 / 4)


# Several ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_a_stray_variable_does_not_make_it_a_rank(name, monkeypatch):
    """Some job systems set one of them. Only torchrun sets all that is needed."""
    monkeypatch.setenv(name, "1")
    args = load(PAPER).parse_args(["--smoke"])
    assert (args.rank, args.ranks) == (0, 1)


@pytest.fixture
def rank_1_of_2(monkeypatch):
    variables = dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, TORCHELASTIC_RUN_ID="none")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_ranks_share_the_work(rank_1_of_2):
    args = load(PAPER).parse_args(["--smoke", "--device", "cpu"])
    assert (args.rank, args.ranks, args.device.type) == (1, 2, "cpu")


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--batch-size", "5"], "--batch-size 5 cannot be shared by 2 ranks"),
        (["--load", "model.pt"], "torchrun is for training"),
        (["--pretrained"], "torchrun is for training"),
        (["--device", "cuda"], "GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_ranks_cannot_do_is_one_line(
    flags, told, tmp_path, monkeypatch, capsys, rank_1_of_2
):
    script = load(PAPER)
    monkeypatch.setattr(script, "existing_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = one_line(PAPER, ["--smoke", "--out", tmp_path / "out", *flags], capsys)
    assert told in message and not (tmp_path / "out").exists()


def test_each_rank_has_a_gpu_of_its_own(monkeypatch, rank_1_of_2):
    script, chosen = load(PAPER), []
    monkeypatch.setattr(script, "existing_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    args = script.parse_args(["--smoke", "--device", "cuda"])
    assert args.device == torch.device("cuda:1") and chosen == [args.device]


def test_resuming_with_another_number_of_ranks_is_one_line(smoke, capsys, rank_1_of_2):
    message = one_line(PAPER, ["--device", "cpu", "--resume", "--out", smoke], capsys)
    assert "ranks" in message and "began with 1" in message


# Two ranks, started by torchrun once for several tests. Each writes down what it saw.
WORKER = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import load
from pathlib import Path

script, out, rank = load("paper/ddpm_paper.py"), Path(sys.argv[2]), int(os.environ["RANK"])
record = dict(x0=[], t=[], eps=[], grad=[], losses=[], calls=[])
loss, q_sample = script.Diffusion.loss, script.Diffusion.q_sample
clip = torch.nn.utils.clip_grad_norm_
train, sample, load_images = script.train_distributed, script.Diffusion.sample, script.load_images

def watched_loss(self, model, x0):
    value = loss(self, model, x0)
    record["losses"].append(value.detach().clone())
    return value * float("nan") if os.environ.get("BROKEN") and rank == 1 else value

def watched_q_sample(self, x0, t, eps):
    record["x0"].append(x0)
    record["t"].append(t)
    record["eps"].append(eps)
    return q_sample(self, x0, t, eps)

def watched_clip(parameters, norm):
    parameters = list(parameters)
    record["grad"].append([p.grad.clone() for p in parameters])
    return clip(parameters, norm)

def watched_train(diffusion, model, *rest):
    record["start"] = {name: value.clone() for name, value in model.state_dict().items()}
    ema, losses = train(diffusion, model, *rest)
    record.update(model=model.state_dict(), ema=ema.state_dict(), mean_losses=losses)
    return ema, losses

def called(name, function):
    def wrapper(*args, **options):
        record["calls"].append(name)
        return function(*args, **options)
    return wrapper

script.Diffusion.loss, script.Diffusion.q_sample = watched_loss, watched_q_sample
script.train_distributed, torch.nn.utils.clip_grad_norm_ = watched_train, watched_clip
script.Diffusion.sample, script.load_images = called("sample", sample), called("load", load_images)
script.SMOKE["unet"]["dropout"] = 0
try:
    script.main(["--device", "cpu", "--out", str(out / "run"), *sys.argv[3:]])
finally:
    torch.save(record, out / f"record{rank}.pt")
"""


def torchrun(*words, **environment):
    """Two ranks. --standalone takes any port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, **pipes, env=os.environ | environment)


def worker(folder, *flags, **environment):
    """A run of two ranks that write down what they see -> exit code, output, the two records."""
    folder.mkdir(exist_ok=True)
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    words = [folder / "worker.py", ROOT / "tests", folder, "--seed", "3", *flags]
    with torchrun(*words, **environment) as process:
        try:
            output = "".join(process.communicate(timeout=240))
        finally:
            process.terminate()  # torchrun ends its ranks
    records = [torch.load(folder / f"record{rank}.pt", weights_only=True) for rank in (0, 1)]
    return process.returncode, output, *records


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two ranks, and what they have written down."""
    folder = tmp_path_factory.mktemp("two")
    code, output, first, second = worker(folder, "--smoke", "--nll", "4")
    assert code == 0, output
    return folder / "run", first, second


@pytest.mark.slow
def test_ranks_begin_and_end_with_equal_weights(two):
    _, first, second = two
    for part in ("start", "model", "ema", "mean_losses"):
        assert same(first[part], second[part]), part
    assert not same(first["start"], first["model"])


@pytest.mark.slow
def test_ranks_see_images_times_and_noise_of_their_own(two):
    """Two images each of a batch of 4; and no training step's are those of another."""
    _, first, second = two
    for part in ("x0", "t", "eps"):
        found = [*first[part][:6], *second[part][:6]]
        assert all(len(value) == 2 for value in found)
        equal = sum(torch.equal(found[i], found[j]) for i in range(12) for j in range(i))
        assert equal == 0 if part != "t" else equal < 5


@pytest.mark.slow
def test_gradients_and_losses_are_means_over_the_ranks(two):
    """As if one process had had the whole batch: computed from what each rank saw at first."""
    script, (_, first, second) = load(PAPER), two
    model = script.UNet(**script.SMOKE["unet"], dropout=0)
    model.load_state_dict(first["start"])
    diffusion = script.Diffusion(script.linear_beta(10))
    x0, t, eps = (torch.cat([first[part][0], second[part][0]]) for part in ("x0", "t", "eps"))
    with script.autocast(x0.device):
        loss = (model(diffusion.q_sample(x0, t, eps), t) - eps).square().mean()
    loss.backward()
    assert first["mean_losses"][0].item() == pytest.approx(loss.item(), rel=1e-3)
    for k in range(6):
        mean = (first["losses"][k] + second["losses"][k]) / 2
        assert first["mean_losses"][k].item() == pytest.approx(mean.item(), rel=1e-6)
    size = max(p.grad.abs().max() for p in model.parameters())
    gradients = zip(model.parameters(), first["grad"][0], second["grad"][0], strict=True)
    for p, got, other in gradients:
        assert torch.equal(got, other) and (got - p.grad).abs().max() < 0.01 * size
    assert not same(first["grad"][0], first["grad"][1])


@pytest.mark.slow
def test_rank_0_alone_loads_samples_and_writes(two):
    folder, first, second = two
    written = {"samples.png", "samples.npz", "loss.png", "nll.png"}
    written |= {"model.pt", "checkpoint.pt", "preview.png"}
    assert {path.name for path in folder.iterdir()} == written
    assert second["calls"] == []
    assert first["calls"] == ["load", "sample", "load", "sample"]  # preview, test images, samples


@pytest.mark.slow
def test_two_ranks_resume_to_the_same_bits(two, tmp_path):
    """A run in two parts, on a machine without CUDA, equals the one without a break."""
    folder, _, _ = two
    for flags in (["--smoke", "--steps", "4"], ["--resume", "--steps", "6"]):
        code, output, _, _ = worker(tmp_path, *flags)
        assert code == 0, output
    pieces = tmp_path / "run"
    files = [out / "checkpoint.pt" for out in (folder, pieces)]
    assert same(*(torch.load(file, weights_only=True) for file in files))
    for name in ("samples.png", "loss.png"):
        assert (folder / name).read_bytes() == (pieces / name).read_bytes(), name


@pytest.mark.slow
def test_a_nan_on_one_rank_ends_both(tmp_path):
    code, output, _, _ = worker(tmp_path, "--smoke", "--steps", "2", BROKEN="1")
    assert code != 0 and output.count("The loss is nan") == 2
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_torchrun_leaves_whole_files_and_no_process(how, tmp_path):
    """Nothing before the last checkpoint is lost, and no file is half written."""
    flags = ["--smoke", "--device", "cpu", "--steps", "1000000", "--out", tmp_path]
    with torchrun(ROOT / PAPER, *flags) as process:
        until = time.time() + 200
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None and time.time() < until
            time.sleep(0.1)
        process.send_signal(how)
        process.communicate(timeout=90)
    assert process.returncode != 0
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert {path.name for path in files} <= {"checkpoint.pt", "preview.png"}
    assert all(path.stat().st_size > 0 for path in files)
    losses = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert len(losses) >= 2 and len(losses) % 2 == 0 and losses.isfinite().all()


@pytest.mark.slow
def test_a_stray_rank_as_a_program(tmp_path):
    flags = ["--smoke", "--device", "cpu", "--out", tmp_path]
    done = run(PAPER, *flags, RANK="3", WORLD_SIZE="8")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
