"""ddpm_paper.py: the network to the parameter, the bound on the likelihood, several ranks."""
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, having, load
from test_diffusion import exact, gaussian_eps, tables

PAPER = "paper/ddpm_paper.py"


def stirred(model):
    """The model with random values in every tensor, of a size that lets the image through."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model.eval()


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


def test_halving_pads_to_the_right_and_below():
    """A kernel of ones sums 3x3 pixels: the first sum begins at pixel 0, the last reaches one beyond the edge."""
    halve = load(PAPER).UNet(widths=[32, 32], blocks=1, attention=[]).down[0][-1]
    with torch.no_grad():
        halve[1].weight.fill_(1 / 32)
        halve[1].bias.zero_()
        x = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 32, 6, 6)
        got = halve(x)[0, 0]
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
    """diffusers' network, saved as diffusers does and loaded by --pretrained's code: the same outputs in fp32."""
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
    model = script.load_pretrained(str(path))
    xt, t = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 500, 1000])
    with torch.no_grad():
        expected = official(xt, t - 1).sample
        assert expected.std() > 0.1
        assert (model(xt, t) - expected).abs().max() < 3e-5


@pytest.mark.parametrize("content", [b"", b"no weights", "other"])
def test_a_file_without_the_weights_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "weights.bin"
    torch.save({"conv_in.weight": torch.zeros(1)}, path) if content == "other" else path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        load(PAPER).main(["--pretrained", str(path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--pretrained" in error


def test_the_published_weights_leave_the_files_of_a_run_alone():
    assert load(PAPER).parse_arguments(["--pretrained"]).out == Path("runs/ddpm_paper/loaded")


def test_a_trained_network_keeps_its_schedule(tmp_path, capsys):
    load(PAPER).main(["--smoke", "--out", str(tmp_path)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        load(PAPER).main(["--smoke", "--load", str(tmp_path / "model.pt"), "--schedule", "cosine"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--schedule" in error


# The schedule and the bound -------------------------------------------------------------------------------------------


@having("cosine_beta")
def test_cosine_schedule(script):
    """alpha_bar is cos^2 of a ratio until the one beta at the end that is clipped."""
    beta = script.cosine_beta(1000)
    alpha_bar = (1 - beta).cumprod(0)
    assert beta.dtype == torch.float64 and beta.shape == (1001,) and beta[0] == 0
    assert (beta == 0.999).sum() == 1 and beta[1000] == 0.999

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (1, 250, 500, 750, 999):
        assert alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-10)
    assert alpha_bar[1000].item() == pytest.approx(f(999) / f(0) * 0.001, rel=1e-10)


@having("cosine_beta")
def test_cosine_schedule_is_that_of_diffusers(script):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").betas
    assert (script.cosine_beta(1000)[1:] - theirs).abs().max() < 1e-6


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


# Several ranks --------------------------------------------------------------------------------------------------------

# One training step, whose noise is a function of the image: so it is the same however the batch is shared out.
WORKER = """
import sys, torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
from conftest import load
script = load("paper/ddpm_paper.py")
args = script.parse_arguments(["--smoke", "--steps", "1", "--batch-size", "8", "--device", "cpu", "--out", sys.argv[2]])
script.join_ranks("cpu")
args.device, args.ranks = "cpu", script.ranks()
script.fill_defaults(args, torch.device("cpu"), {})
script.flip = lambda x0: x0
script.now_and_then = lambda *args: None

class Fixed(script.Diffusion):
    def loss(self, model, x0):
        t = 1 + (x0.abs() * torch.arange(x0[0].numel()).view_as(x0[0])).sum((1, 2, 3)).long() % self.T
        eps = torch.cos(7 * x0 + t.view(-1, 1, 1, 1))
        return F.mse_loss(model(self.q_sample(x0, t, eps), t), eps)

torch.manual_seed(0)
model = script.UNet(widths=[32, 32], blocks=1, attention=[1], dropout=0)
images = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
torch.manual_seed(script.rank())
script.autocast = lambda device: torch.autocast("cpu", enabled=False)
ema, losses = script.train(Fixed(script.linear_beta(args.T)), model, images, args)
share = script.joined(torch.full((2, 1, 1, 1), float(script.rank())))
if script.rank() == 0:
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.save({"grads": grads, "losses": losses, "share": share.flatten()}, sys.argv[3])
if script.ranks() > 1:
    torch.distributed.destroy_process_group()  # else the threads behind it can abort the process at its end
"""


def torchrun(*words, ranks=2):
    """--standalone takes any port that is free."""
    options = ["--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, "-u", "-m", "torch.distributed.run", *options, *map(str, words)]


def test_two_ranks_have_the_gradients_of_one_process_with_the_whole_batch(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    results = []
    for name, start in (("one", [sys.executable, worker]), ("two", torchrun(worker))):
        command = [*map(str, start), str(ROOT / "tests"), str(tmp_path / "out"), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(tmp_path / name, weights_only=True))
    one, two = results
    assert one["share"].tolist() == [0, 0] and two["share"].tolist() == [0, 0, 1, 1]
    assert two["losses"].item() == pytest.approx(one["losses"].item(), rel=1e-5)
    size = max(grad.abs().max().item() for grad in one["grads"].values())
    for name, grad in one["grads"].items():
        assert (grad - two["grads"][name]).abs().max() < 1e-5 * size, name


def test_two_ranks_resume_exactly(tmp_path):
    flags = ["--smoke", "--steps", "40", "--device", "cpu"]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"

    def start(out, *more):
        command = torchrun(ROOT / PAPER, *flags, "--out", out, *more)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
        )

    for out, kill, more in ((whole, False, ()), (pieces, True, ()), (pieces, False, ("--resume",))):
        with start(out, *more) as process:
            if kill:
                while "checkpoint.pt" not in (line := process.stdout.readline()):
                    assert line, process.stderr.read()
                os.killpg(process.pid, signal.SIGKILL)
            else:
                _, error = process.communicate(timeout=200)
                assert process.returncode == 0, error
    assert 0 < json.loads((pieces / "metrics.json").read_text())["resumed_after"] < 40
    for name in ("model.pt", "samples.png", "loss.png"):
        assert (pieces / name).read_bytes() == (whole / name).read_bytes(), name


@having("load_resumed", "ranks")
def test_resuming_with_another_number_of_ranks_is_told(script, tmp_path, capsys):
    script.main(["--smoke", "--out", str(tmp_path)])
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    checkpoint["settings"]["ranks"] = 2
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(["--smoke", "--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "ranks was 2 and is now 1" in capsys.readouterr().err


@having("write_bound")
def test_nll_writes_its_picture_and_number(script, tmp_path):
    script.main(["--smoke", "--nll", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text())["bits_per_dimension"] > 0
    assert (tmp_path / "nll.png").stat().st_size > 1000
