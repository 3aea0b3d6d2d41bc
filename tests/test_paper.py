"""ddpm_paper.py: the network to the parameter, the official weights, the bound, the recipe, several ranks."""
import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, exact, gaussian_eps, having, load, one_line, tables

PAPER = "paper/ddpm_paper.py"


def stirred(model):
    """The model with random values in every tensor, of a size that lets the image through."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model.eval()


def same(a, b):
    """Nested dicts, lists and tensors that are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# The network ----------------------------------------------------------------------------------------------------------


def test_the_network_has_the_paper_s_parameters():
    """Counted here from Appendix B with pencil and paper: a block, an attention, a resampling, the ends."""
    model = load(PAPER).UNet()

    def count(module):
        return sum(p.numel() for p in module.parameters())

    def block(a, b):
        return 2 * a + 9 * a * b + b + 512 * b + b + 2 * b + 9 * b * b + b + (a * b + b if a != b else 0)

    attention, resample = 2 * 256 + 4 * (256 * 256 + 256), 9 * 256 * 256 + 256
    assert count(model) == 35_746_307
    assert count(model.time) == 128 * 512 + 512 + 512 * 512 + 512 and count(model.first) == 27 * 128 + 128
    assert count(model.down[0]) == 2 * block(128, 128) + 9 * 128 * 128 + 128
    assert count(model.down[1]) == block(128, 256) + block(256, 256) + 2 * attention + resample
    assert count(model.down[3]) == 2 * block(256, 256)
    assert count(model.middle) == 2 * block(256, 256) + attention
    assert count(model.up[0]) == 3 * block(512, 256) + resample
    assert count(model.up[2]) == 2 * block(512, 256) + block(384, 256) + 3 * attention + resample
    assert count(model.up[3]) == block(384, 128) + 2 * block(256, 128)
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
    """A kernel of ones sums 3x3 pixels: the first sum begins at pixel 0, the last reaches one beyond the edge."""
    downsample = load(PAPER).UNet(widths=[32, 32], blocks=1, attention=[]).down[0][-1]
    with torch.no_grad():
        downsample[1].weight.fill_(1 / 32)
        downsample[1].bias.zero_()
        x = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 32, 6, 6)
        got = downsample(x)[0, 0]
    pixels = x[0, 0]
    assert torch.allclose(got[0, 0], pixels[0:3, 0:3].sum()) and torch.allclose(got[2, 2], pixels[4:6, 4:6].sum())


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
    """Xavier-uniform of each c x c matrix and of convolutions with their window; next to nothing where a block ends."""
    torch.manual_seed(0)
    model = load(PAPER).UNet()
    block = model.down[1][1]
    expected = {
        block.conv1.weight: math.sqrt(6 / (9 * 256 + 9 * 256)),
        block.time.weight: math.sqrt(6 / (512 + 256)),
        block.attention.qkv.weight: math.sqrt(6 / (256 + 256)),
        block.conv2[1].weight: 1e-5 * math.sqrt(6 / (9 * 256 + 9 * 256)),
        block.attention.out.weight: 1e-5 * math.sqrt(6 / (256 + 256)),
        model.last[2].weight: 1e-5 * math.sqrt(6 / (9 * 128 + 9 * 3)),
    }
    for weight, bound in expected.items():
        assert 0.98 * bound < weight.abs().max() <= bound * 1.0001
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert block.conv1.bias.abs().max() == 0


@pytest.fixture(scope="module")
def official():
    """diffusers' network of the published configuration, with random values in every tensor."""
    diffusers = pytest.importorskip("diffusers")
    settings = dict(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None,
    )  # fmt: skip
    return stirred(diffusers.UNet2DModel(**settings))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin with the old names"])
def test_the_published_weights_run_in_it(official, kind, tmp_path):
    """diffusers' network, saved as diffusers does and read by --pretrained's code: the same outputs in fp32."""
    script = load(PAPER)
    if kind == "bin with the old names":  # the published file's: diffusers renames them when it loads it
        weights = official.state_dict()
        for new, old in OLD_NAMES.items():
            weights = {name.replace(f".{new}.", f".{old}."): weight for name, weight in weights.items()}
        path = tmp_path / "old.bin"
        torch.save(weights, path)
    else:
        official.save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
        path = tmp_path / f"diffusion_pytorch_model.{kind}"
    saved = script.load_official(str(path))
    model = script.UNet(**saved["network"]).eval()
    model.load_state_dict(saved["ema"])
    xt, t = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 500, 1000])
    with torch.no_grad():
        expected = official(xt, t - 1).sample
        assert expected.std() > 0.1
        assert (model(xt, t) - expected).abs().max() < 3e-5


@pytest.fixture
def drawn(monkeypatch):
    """Instead of T steps of sampling: what the sampler was given, [(Diffusion, model, shape, options), ...]."""
    calls, Diffusion = [], load(PAPER).Diffusion

    def sample(self, model, shape, **options):
        calls.append((self, model, tuple(shape), options))
        return torch.zeros(shape)

    monkeypatch.setattr(Diffusion, "sample", sample)
    return calls


def test_pretrained_draws_from_the_published_network(official, tmp_path, monkeypatch, drawn):
    """From the hub, under a name of its own in the cache: 1000 steps of the linear schedule, the weights in it."""
    script, asked = load(PAPER), []

    def download(url, **options):
        asked.append((url, options))
        return official.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.chdir(tmp_path)
    script.main(["--pretrained", "--smoke", "--samples", "6", "--batch-size", "4"])
    [(url, options)] = asked
    assert url.startswith("https://huggingface.co/google/ddpm-cifar10-32/") and url.endswith(".bin")
    assert options == {"file_name": "ddpm-cifar10-32.bin", "map_location": "cpu", "weights_only": True}
    assert [shape for _, _, shape, _ in drawn] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    diffusion, model, _, _ = drawn[0]
    assert diffusion.T == 1000 and torch.equal(diffusion.beta, script.linear_beta().float())
    assert torch.equal(model.first.weight, official.conv_in.weight) and not model.training
    assert {p.name for p in Path("runs/ddpm_paper/loaded").iterdir()} == {"samples.png", "samples.npz"}


def test_a_file_without_the_weights_is_one_line(tmp_path, capsys):
    path = tmp_path / "weights.bin"
    for content in (b"", b"no weights", "other"):
        torch.save({"conv_in.weight": torch.zeros(1)}, path) if content == "other" else path.write_bytes(content)
        assert "--pretrained" in one_line(PAPER, ["--pretrained", path, "--out", tmp_path / "out"], capsys)


# The schedule and the bound -------------------------------------------------------------------------------------------


@having("gaussian_kl")
def test_kl_is_the_library_s(script):
    torch.manual_seed(0)
    m1, m2, v1, v2 = torch.randn(5).double(), torch.randn(5).double(), torch.rand(5).double(), torch.rand(5).double()
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(m1, v1.sqrt()), normal(m2, v2.sqrt())).mean() / math.log(2)
    assert script.gaussian_kl(m1, v1, m2, v2).item() == pytest.approx(kl.item(), rel=1e-12)


@having("decoder_cost")
@pytest.mark.parametrize("mean", [-1.2, -0.3, 0.999])
def test_the_decoder_shares_out_a_probability_of_1(script, mean):
    levels = (torch.arange(256).double() / 127.5 - 1).view(-1, 1)
    sigma = torch.tensor(0.3).double()
    cost = torch.stack([script.decoder_cost(level, torch.tensor(mean).double(), sigma) for level in levels])
    assert (2**-cost).sum().item() == pytest.approx(1, abs=1e-9)
    density = math.exp(-0.5 * ((levels[100].item() - mean) / 0.3) ** 2) / (0.3 * math.sqrt(2 * math.pi))
    assert 2 ** -cost[100].item() == pytest.approx(density * 2 / 255, rel=1e-3)


def closed_form_bound(m, s, variance):
    """The bound for pixels ~ N(m, s^2), rounded to 256 levels, and the exact eps: L_0, ..., L_T in bits.

    The error of x0_hat has mean square v_t = s^2 (1 - alpha_bar) / (alpha_bar s^2 + 1 - alpha_bar); L_0 is integrated
    over the levels and the noise.
    """
    beta, alpha_bar = tables()
    before, after = alpha_bar[:-1], alpha_bar[1:]
    tilde = np.concatenate([[0], (1 - before) / (1 - after) * beta[1:]])
    sigma2 = {"beta": beta, "beta_tilde": tilde}[variance]
    v = s**2 * (1 - alpha_bar) / (alpha_bar * s**2 + 1 - alpha_bar)
    L = np.zeros(1001)
    for t in range(2, 1001):
        weight, ratio = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t]), tilde[t] / sigma2[t]
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
    x0 = ((m + s * torch.randn(4, 1, 100, 100).double()).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
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
    """The folder of a --smoke run, in one process, of 6 steps."""
    folder = tmp_path_factory.mktemp("smoke")
    load(PAPER).main(["--smoke", "--device", "cpu", "--seed", "5", "--nll", "4", "--out", str(folder)])
    return folder


class FakeCIFAR10:
    """Data that tell on themselves: training images of level 10, and test image k of level 100 + k."""

    base_folder = "none"

    def __init__(self, root, train=True, download=False):
        levels = np.full(50, 10) if train else 100 + np.arange(10)
        self.data = np.broadcast_to(levels[:, None, None, None], (len(levels), 32, 32, 3)).astype(np.uint8)


def test_nll_is_the_mean_over_test_images(smoke, tmp_path, monkeypatch, capsys, drawn):
    """In batches of --batch-size, the last one smaller; each image counts the same. The bound of level k is k bits."""
    script, batches = load(PAPER), []

    def bound(self, model, x0, variance):
        k = (x0[:, 0, 0, 0] + 1) * 127.5
        batches.append(k.round().long().tolist())
        return torch.cat([k.mean().view(1), torch.zeros(self.T)])

    monkeypatch.setattr(script, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr(script.Diffusion, "bound", bound)
    flags = ["--load", smoke / "model.pt", "--data", "cifar10", "--batch-size", "4", "--out", tmp_path]
    script.main([*map(str, flags), "--nll", "10"])
    assert [len(batch) for batch in batches] == [4, 4, 2] and sorted(sum(batches, [])) == list(range(100, 110))
    assert sum(batches, []) != list(range(100, 110))  # so that fewer are a sample of all
    assert "104.500 bits per dimension of 10 test images" in capsys.readouterr().out
    assert (tmp_path / "nll.png").stat().st_size > 1000


def test_nll_of_photographs_after_training_and_loaded(smoke, tmp_path, capsys, drawn):
    """--load --nll --data photos repeats what the run itself has found; beta_tilde gives another bound."""
    pictures = []
    for more in ([], ["--variance", "beta_tilde"]):
        flags = ["--load", smoke / "checkpoint.pt", "--nll", "4", "--data", "photos", "--out", tmp_path, *more]
        load(PAPER).main([str(flag) for flag in flags])
        pictures.append((tmp_path / "nll.png").read_bytes())
    assert pictures[0] == (smoke / "nll.png").read_bytes() != pictures[1]
    assert [options["variance"] for _, _, _, options in drawn] == ["beta", "beta_tilde"]
    assert "bits per dimension of 4 test images" in capsys.readouterr().out


def test_test_crops_share_no_pixel_with_training_crops(monkeypatch):
    """In photographs whose left part is black and whose right part is white: all training crops black, test white."""
    script = load(PAPER)
    photo = np.zeros((427, 640, 3), np.uint8)
    photo[:, 512:] = 255
    monkeypatch.setattr(script, "load_sample_images", lambda: argparse.Namespace(images=[photo, photo]))
    train, test = (script.load_images("photos", "nowhere", train)[0] for train in (True, False))
    assert train.shape == (2 * 46 * 57, 3, 32, 32) and test.shape == (2 * 46 * 9, 3, 32, 32)
    assert (train == 0).all() and (test == 255).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_is_the_one_asked_for(schedule, tmp_path, monkeypatch, drawn):
    script = load(PAPER)
    monkeypatch.setattr(script, "train", lambda diffusion, model, *_: (model, torch.ones(1)))
    script.main(["--smoke", "--schedule", schedule, "--T", "20", "--out", str(tmp_path)])
    beta = {"linear": script.linear_beta, "cosine": script.cosine_beta}[schedule](20)
    assert torch.equal(drawn[0][0].beta, beta.float())


# The recipe -----------------------------------------------------------------------------------------------------------


class OneConvolution(torch.nn.Module):
    """The smallest network: eps_hat = a 1x1 convolution of x_t."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 1)

    def forward(self, xt, t):
        return self.conv(xt)


def train(tmp_path, images, model, diffusion=None, **changes):
    """The script's train on a small problem -> EMA, losses."""
    script = load(PAPER)
    settings = dict.fromkeys(script.SETTINGS, 0) | dict(steps=60, batch_size=8, lr=1e-3, warm_up=20)
    settings |= dict(out=tmp_path, network={}, save_every=10**9) | changes
    diffusion = diffusion or script.Diffusion(script.linear_beta(10))
    return script.train(diffusion, model, images, argparse.Namespace(**settings))


def test_the_recipe(tmp_path, monkeypatch):
    """Adam of (0.9, 0.999); the rate rises for the warm-up and stays; gradients have norm 1 at most; the EMA's ramp."""
    rates, norms, weights = [], [], []

    class Watched(torch.optim.Adam):
        def step(self):
            [group] = self.param_groups
            rates.append(group["lr"])
            norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
            assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0 and group["fused"]
            super().step()
            weights.append(group["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    model = OneConvolution()
    model.conv.weight.data += 30  # so wrong that its gradient must be clipped
    expected = model.conv.weight.detach().clone()
    images = torch.randint(0, 256, (20, 3, 4, 4), dtype=torch.uint8)
    ema, losses = train(tmp_path, images, model, steps=300, lr=0.5, warm_up=100)
    assert rates == pytest.approx([0.5 * min(1, (i + 1) / 100) for i in range(300)])
    assert [rates[0], rates[99], rates[299]] == pytest.approx([0.005, 0.5, 0.5])
    assert norms[0] == pytest.approx(1, abs=1e-3) and max(norms) < 1.001
    for k, weight in enumerate(weights):
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.conv.weight, expected, atol=1e-4) and not torch.allclose(ema.conv.weight, weights[-1])
    assert losses.shape == (300,) and losses[-20:].mean() < losses[:5].mean()


def test_the_paper_s_settings():
    """Section 4 and Appendix B; the same network by default as for the published weights."""
    gpu = load(PAPER).GPU
    assert {name: gpu[name] for name in ("steps", "batch_size", "lr", "warm_up", "network")} == dict(
        steps=800_000, batch_size=128, lr=2e-4, warm_up=5000, network={}
    )


def test_the_network_sees_every_image_in_minus_one_to_one_and_half_of_them_mirrored(tmp_path):
    """Image k has level 15 k at its left edge, and 0 elsewhere: each is as likely as any other, so is each side."""
    script, seen = load(PAPER), []

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    images = torch.zeros(17, 3, 4, 4, dtype=torch.uint8)
    images[..., 0] = torch.arange(15, 256, 15).byte().view(17, 1, 1)[:, None].expand(17, 3, 4, 1)[..., 0]
    train(tmp_path, images, OneConvolution(), Recorder(script.linear_beta(10)), steps=50, batch_size=34)
    x0 = torch.cat(seen)
    assert x0.shape == (1700, 3, 4, 4) and x0.min() == -1 and x0.max() == 1
    left, right = (((x0[:, 0, 0, edge] + 1) * 127.5).round().long() for edge in (0, -1))
    assert ((left == 0) ^ (right == 0)).all() and abs((left == 0).sum() - 850) < 4.5 * math.sqrt(1700 / 4)
    counts = ((left + right) // 15).bincount(minlength=18)[1:]
    assert (counts - 100).abs().max() < 4.5 * math.sqrt(1700 / 17 * 16 / 17)
    assert len({tuple(batch[:, 0, 0].flatten().tolist()) for batch in seen}) == 50  # no batch comes twice
    for seed in (0, 1):
        train(tmp_path, images, OneConvolution(), Recorder(script.linear_beta(10)), steps=1, batch_size=34, seed=seed)
        assert torch.equal(seen[-1], seen[0]) == (seed == 0)


# The command line -----------------------------------------------------------------------------------------------------


def test_wrong_input_is_one_line(smoke, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in smoke.iterdir()}
    for flags, told in [
        (["--pretrained", "--T", "500"], "--pretrained: the published network was trained with --T 1000"),
        (["--pretrained", "--schedule", "cosine"], "--pretrained: the published network was trained with"),
        (["--load", "{smoke}/model.pt", "--T", "500"], "T was 10, not 500"),
        (["--load", "{smoke}/model.pt", "--schedule", "cosine"], "schedule was linear, not cosine"),
        (["--load", "{smoke}/model.pt", "--pretrained"], "not allowed with"),
        (["--resume", "--out", "{smoke}", "--batch-size", "8"], "batch-size was 4, not 8"),
        (["--resume", "--out", "{smoke}", "--data", "cifar10"], "data was photos, not cifar10"),
        (["--resume", "--out", "{smoke}/nowhere"], "--resume"),
        (["--nll", "-1"], "--nll must lie between 0 and"),
    ]:
        out = [] if "--out" in flags else ["--out", tmp_path / "out"]
        assert told in one_line(PAPER, [*(flag.format(smoke=smoke) for flag in flags), *out], capsys)
        assert not (tmp_path / "out").exists()
    assert before == {path.name: path.read_bytes() for path in smoke.iterdir()}


def test_a_model_is_no_checkpoint(smoke, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((smoke / "model.pt").read_bytes())
    assert "--resume" in one_line(PAPER, ["--resume", "--out", tmp_path], capsys)


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried 10**12 bytes")

    monkeypatch.setattr(load(PAPER), "train", full)
    assert "--batch-size" in one_line(PAPER, ["--smoke", "--out", tmp_path], capsys)


def test_resuming_with_another_number_of_ranks_is_one_line(smoke, tmp_path, capsys):
    checkpoint = torch.load(smoke / "checkpoint.pt", weights_only=True)
    checkpoint["settings"]["ranks"] = 2
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert "ranks was 2, not 1" in one_line(PAPER, ["--smoke", "--resume", "--out", tmp_path], capsys)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--batch-size", "5"], "--batch-size that its 2 ranks can share"),
        (["--load", "{smoke}/model.pt"], "torchrun is for training"),
        (["--device", "cuda:0"], "--device cuda:1"),  # rank 1 does not crowd GPU 0; here there is none at all
        (["--device", "cuda"], "--device cuda:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_ranks_cannot_do_is_one_line(flags, told, smoke, tmp_path, monkeypatch, capsys):
    if "--device" in flags and torch.cuda.device_count() > 1:
        pytest.skip("there are GPUs enough")
    monkeypatch.setattr(load(PAPER), "RANKS", 2)
    monkeypatch.setattr(load(PAPER), "RANK", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    flags = [flag.format(smoke=smoke) for flag in flags]
    assert told in one_line(PAPER, ["--smoke", "--out", tmp_path / "out", *flags], capsys)
    assert not (tmp_path / "out").exists()


# Resuming, in one process and in several ------------------------------------------------------------------------------


def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bits(smoke, tmp_path, monkeypatch):
    """Ctrl-C in step 3: that step is done and written; the rest equals the run without a break, dropout and all."""
    script, steps = load(PAPER), []
    loss = script.Diffusion.loss

    def interrupted(self, model, x0):
        steps.append(len(steps) + 1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, x0)

    monkeypatch.setattr(script.Diffusion, "loss", interrupted)
    monkeypatch.setitem(script.SMOKE, "save_every", 4)  # none is due at step 3
    before = signal.getsignal(signal.SIGINT)
    script.main(["--smoke", "--device", "cpu", "--seed", "5", "--out", str(tmp_path)])
    assert len(steps) == 3 and signal.getsignal(signal.SIGINT) is before
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 3
    script.main(["--smoke", "--device", "cpu", "--resume", "--out", str(tmp_path)])
    assert signal.getsignal(signal.SIGINT) is before
    for name in ("model.pt", "checkpoint.pt"):
        assert same(*(torch.load(folder / name, weights_only=True) for folder in (smoke, tmp_path))), name
    for name in ("samples.png", "loss.png"):
        assert (tmp_path / name).read_bytes() == (smoke / name).read_bytes(), name
    script.main(["--smoke", "--device", "cpu", "--resume", "--steps", "7", "--out", str(tmp_path)])  # a longer run
    longer, whole = (torch.load(out / "checkpoint.pt", weights_only=True)["losses"] for out in (tmp_path, smoke))
    assert len(longer) == 7 and torch.equal(longer[:6], whole)


# Two ranks, started by torchrun once for many tests: a run, the same stopped and resumed, and a run that fails.
WORKER = """
import os, signal, sys, time, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import load
from pathlib import Path

script, out, rank = load("paper/ddpm_paper.py"), Path(sys.argv[2]), int(os.environ["RANK"])
record = {"x0": [], "t": [], "eps": [], "grad": [], "losses": [], "calls": [], "codes": []}
step, interrupt, broken = 0, None, None
loss, q_sample, clip = script.Diffusion.loss, script.Diffusion.q_sample, torch.nn.utils.clip_grad_norm_
train, sample, bound, load_images = script.train, script.Diffusion.sample, script.Diffusion.bound, script.load_images

def watched_loss(self, model, x0):
    global step
    step += 1
    if step == interrupt and rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
    value = loss(self, model, x0)
    record["losses"].append(value.detach().clone())
    return value * float("nan") if step == broken and rank == 1 else value

def watched_q_sample(self, x0, t, eps):
    record["x0"].append(x0), record["t"].append(t), record["eps"].append(eps)
    return q_sample(self, x0, t, eps)

def watched_clip(parameters, norm):
    parameters = list(parameters)
    record["grad"].append([p.grad.clone() for p in parameters])
    return clip(parameters, norm)

def watched_train(diffusion, model, *rest):
    record["start"] = {name: value.clone() for name, value in model.state_dict().items()}
    ema, losses = train(diffusion, model, *rest)
    record["model"], record["ema"], record["mean losses"] = model.state_dict(), ema.state_dict(), losses
    return ema, losses

def called(name, function):
    return lambda *args, **options: record["calls"].append(name) or function(*args, **options)

def meet(backend, start=dist.init_process_group):
    if record["codes"]:  # torchrun's store serves one meeting only
        start(backend, init_method=f"file://{out}/store{len(record['codes'])}", rank=rank, world_size=2)
    else:
        start(backend)

script.Diffusion.loss, script.Diffusion.q_sample, script.train = watched_loss, watched_q_sample, watched_train
torch.nn.utils.clip_grad_norm_ = watched_clip
script.Diffusion.sample, script.Diffusion.bound = called("sample", sample), called("bound", bound)
script.load_images, dist.init_process_group = called("load_images", load_images), meet
script.SMOKE["network"]["dropout"] = 0

def main(*flags):
    global step
    step = 0
    try:
        script.main(["--smoke", "--device", "cpu", "--seed", "3", *map(str, flags)])
        record["codes"].append(0)
    except SystemExit as stop:
        record["codes"].append(stop.code)
    done = out / f"done{len(record['codes'])}"
    if rank == 0:
        done.touch()
    while not done.exists():  # as in life: a run is resumed when all of it has ended
        time.sleep(0.05)

main("--out", out / f"rank{rank}", "--nll", "4")
saved = {name: value for name, value in record.items() if name not in ("calls", "codes")}
record["x0"], record["t"], record["eps"], record["grad"], record["losses"] = [], [], [], [], []
saved["calls"] = list(record["calls"])
interrupt = 3
main("--out", out / "pieces")
interrupt, saved["stopped after"] = None, len(record["mean losses"])
main("--out", out / "pieces", "--resume")
broken = 2
main("--out", out / "broken", "--steps", "2")
saved["codes"] = record["codes"]
torch.save(saved, out / f"record{rank}.pt")
dist.destroy_process_group()
"""


def torchrun(*words):
    """Two ranks. --standalone takes any port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of the WORKER, and what its ranks 0 and 1 have written down."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    with torchrun(folder / "worker.py", ROOT / "tests", folder) as process:
        try:
            _, error = process.communicate(timeout=150)
        finally:
            process.terminate()  # torchrun ends its ranks
    assert process.returncode == 0, error
    return folder, *(torch.load(folder / f"record{rank}.pt", weights_only=True) for rank in (0, 1))


def test_ranks_begin_and_end_with_equal_weights(two):
    _, first, second = two
    for part in ("start", "model", "ema"):
        assert same(first[part], second[part]), part
    assert not same(first["start"], first["model"])
    assert same(first["mean losses"], second["mean losses"]) and first["codes"][:3] == second["codes"][:3] == [0] * 3


def test_ranks_see_images_times_and_noise_of_their_own(two):
    """Two images each of a batch of 4; and no step's are those of another."""
    _, first, second = two
    for part in ("x0", "t", "eps"):
        drawn = [*first[part][:6], *second[part][:6]]
        assert all(len(value) == 2 for value in drawn)
        equal = sum(torch.equal(drawn[i], drawn[j]) for i in range(12) for j in range(i))
        assert equal == 0 if part != "t" else equal < 5


def test_gradients_and_losses_are_means_over_the_ranks(two):
    """As if one process had had the whole batch: computed here from what each rank saw in its first step."""
    script, (_, first, second) = load(PAPER), two
    model = script.UNet(widths=[8, 16], blocks=1, dropout=0)
    model.load_state_dict(first["start"])
    diffusion = script.Diffusion(script.linear_beta(10))
    x0, t, eps = (torch.cat([first[part][0], second[part][0]]) for part in ("x0", "t", "eps"))
    with script.autocast(x0.device):
        loss = (model(diffusion.q_sample(x0, t, eps), t) - eps).square().mean()
    loss.backward()
    assert first["mean losses"][0].item() == pytest.approx(loss.item(), rel=1e-3)
    for k in range(6):
        mean = (first["losses"][k] + second["losses"][k]) / 2
        assert first["mean losses"][k].item() == pytest.approx(mean.item(), rel=1e-6)
    size = max(p.grad.abs().max() for p in model.parameters())
    for p, got, other in zip(model.parameters(), first["grad"][0], second["grad"][0], strict=True):
        assert torch.equal(got, other) and (got - p.grad).abs().max() < 0.01 * size
    assert not same(first["grad"][0], first["grad"][1])


def test_rank_0_alone_loads_draws_and_writes(two):
    folder, first, second = two
    written = {"samples.png", "samples.npz", "loss.png", "nll.png", "model.pt", "checkpoint.pt", "preview.png"}
    assert {path.name for path in (folder / "rank0").iterdir()} == written
    assert not (folder / "rank1").exists() and second["calls"] == []
    assert first["calls"] == ["load_images", "sample", "load_images", "bound", "sample"]  # first comes the preview


def test_ctrl_c_on_one_rank_stops_both_and_they_go_on_to_the_same_bits(two):
    folder, first, second = two
    assert first["stopped after"] == second["stopped after"] == 3
    for name in ("model.pt", "checkpoint.pt"):
        whole, pieces = (torch.load(folder / run / name, weights_only=True) for run in ("rank0", "pieces"))
        assert same(whole, pieces), name
    for name in ("samples.png", "loss.png"):
        assert (folder / "rank0" / name).read_bytes() == (folder / "pieces" / name).read_bytes(), name


def test_a_nan_on_one_rank_ends_both(two):
    folder, first, second = two
    assert first["codes"] == second["codes"] == [0, 0, 0, 2]


def test_a_killed_rank_ends_the_other(tmp_path):
    with torchrun(ROOT / PAPER, "--smoke", "--device", "cpu", "--steps", "1000000", "--out", tmp_path) as process:
        try:
            while not (tmp_path / "checkpoint.pt").exists():
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.1)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = {}
            for pid in children:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks |= {entry: int(pid) for entry in environment if entry in (b"RANK=0", b"RANK=1")}
            os.kill(ranks[b"RANK=1"], signal.SIGKILL)
            process.communicate(timeout=60)
            assert process.returncode != 0 and not Path(f"/proc/{ranks[b'RANK=0']}").exists()
        finally:
            process.terminate()
