"""DDIM against exact trajectories, DDPM and diffusers; and its experiments with models whose answer is known."""
import argparse
import contextlib
import io
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import MNIST, MU, S, exact, gaussian_eps, having, load, mixture_eps, one_line, tables
from PIL import Image
from sklearn.datasets import load_digits

DDIM = "paper/ddim_sampling.py"


def start(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@having("ddim_timesteps")
def test_timesteps(script):
    assert script.ddim_timesteps(1000, 10) == list(range(1000, 0, -100))
    assert script.ddim_timesteps(1000, 10, "quadratic") == [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10]
    assert script.ddim_timesteps(7, 3) == [7, 5, 2]
    for T in (1, 2, 10, 57, 1000):
        for steps in {1, 2, 3, T // 3, T // 2, T - 1, T} & set(range(1, T + 1)):
            for spacing in ("uniform", "quadratic"):
                t = script.ddim_timesteps(T, steps, spacing)
                assert len(t) == steps and t[0] == T and t[-1] >= 1
                assert all(a > b for a, b in zip(t, t[1:], strict=False))
    assert script.ddim_timesteps(1000, 1000, "quadratic") == list(range(1000, 0, -1))


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("steps, spacing", [(10, "uniform"), (50, "quadratic"), (1000, "uniform")])
def test_every_trajectory_of_gaussian_data_is_known(script, steps, spacing):
    """eps* makes each step affine in x_t: eta = 0 keeps (x_t - sqrt(ab) mu) on one line, and stretches it."""
    _, alpha_bar = tables()
    t = script.ddim_timesteps(1000, steps, spacing)
    x = xT = start(2, 1, 3, 3)
    centred = x - math.sqrt(alpha_bar[1000]) * MU
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        total = a * S**2 + 1 - a  # the variance of x_t; its covariances with x_0 and with eps give the two shares
        centred = centred * (math.sqrt(a * b) * S**2 + math.sqrt((1 - a) * (1 - b))) / total
    got = exact(script).ddim_sample(gaussian_eps(alpha_bar), None, steps, 0.0, spacing, clip=False, xT=xT)
    assert torch.allclose(got, centred + MU, atol=1e-6)
    if steps == 1000 and spacing == "uniform":  # close to the exact flow, which maps N(0, 1) to N(mu, s^2)
        assert (got - (MU + S * xT)).abs().max() < 0.02


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("steps, spacing, eta", [(10, "quadratic", 0), (50, "uniform", 0.5), (50, "quadratic", 1)])
def test_trajectories_of_a_mixture(script, steps, spacing, eta):
    """DDIM, Eq. 12 and 16, written out with numbers, and the same noise."""
    _, alpha_bar = tables()
    model, xT = mixture_eps(alpha_bar, [-0.6, 0.7], 0.1), start(2, 1, 4, 4)
    torch.manual_seed(1)
    got = exact(script).ddim_sample(model, None, steps, eta, spacing, clip=False, xT=xT)
    torch.manual_seed(1)
    t, x = script.ddim_timesteps(1000, steps, spacing), xT
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        e = model(x, torch.tensor([now, now]))
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(max(0, 1 - b - sigma**2)) * e
        if eta and then:
            x = x + sigma * torch.randn_like(x)
    assert torch.allclose(got, x, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_eta_1_over_all_steps_is_ddpm(script, variance):
    """Sampled by p_sample of ddpm_mnist.py with either variance, from the same x_T, with the same noise, clipped."""
    _, alpha_bar = tables()
    model, xT, ddpm = mixture_eps(alpha_bar, [-0.6, 0.7], 0.1), start(2, 1, 4, 4), exact(load(MNIST))
    torch.manual_seed(2)
    got = exact(script).ddim_sample(model, None, 1000, 1.0, xT=xT, variance=variance)
    torch.manual_seed(2)
    for t in range(1000, 0, -1):
        xT = ddpm.p_sample(model, xT, t, variance=variance)
    assert torch.allclose(got, xT, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers(script, eta):
    """Their t counts from 0, and "trailing" gives the same times as "uniform" here; x0_hat clipped, eps re-derived."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    assert [t + 1 for t in theirs.timesteps.tolist()] == script.ddim_timesteps(1000, 20)
    model, xT = mixture_eps(tables()[1], [-0.9, 1.1], 0.2), start(2, 1, 4, 4)
    torch.manual_seed(3)
    got = exact(script).ddim_sample(model, None, 20, eta, xT=xT)
    torch.manual_seed(3)
    for t in theirs.timesteps:
        noise = torch.randn_like(xT) if eta and t > 49 else torch.zeros_like(xT)
        eps_hat = model(xT, torch.full((2,), t + 1))
        xT = theirs.step(eps_hat, t, xT, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
    assert torch.allclose(got, xT, atol=1e-5)


@having("Diffusion.ddim_step")
def test_eps_is_derived_again_from_the_clipped_x0(script):
    """An x0_hat of 3 counts as 1, and the noise is then what makes x_t of that 1."""
    _, alpha_bar = tables()
    a, b, xt = alpha_bar[600], alpha_bar[300], torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    eps_hat = (xt - math.sqrt(a) * 3) / math.sqrt(1 - a)
    got = exact(script).ddim_step(lambda x, t: eps_hat, xt, 600, 300)
    assert torch.allclose(got, math.sqrt(b) + math.sqrt(1 - b) * (xt - math.sqrt(a)) / math.sqrt(1 - a), atol=1e-10)


@having("Diffusion.ddim_sample")
def test_ddim_is_a_function_of_xT_whatever_the_batch(script):
    model, xT = mixture_eps(tables()[1], [-0.6, 0.7], 0.1), start(5, 1, 4, 4)
    diffusion = exact(script)
    whole = diffusion.ddim_sample(model, None, 20, xT=xT)
    parts = [diffusion.ddim_sample(model, None, 20, xT=part) for part in xT.split(2)]
    assert torch.equal(whole, torch.cat(parts))
    torch.manual_seed(0)
    fresh = diffusion.ddim_sample(model, (5, 1, 4, 4), 20)
    torch.manual_seed(0)
    assert torch.equal(fresh, diffusion.ddim_sample(model, None, 20, xT=torch.randn(5, 1, 4, 4, dtype=torch.float64)))


@having("Diffusion.ddim_invert")
def test_inversion_and_back_returns_to_the_start(script):
    """From data of the toys, over all steps; the x_T on the way is noise of the right size."""
    for model in (gaussian_eps(tables()[1]), mixture_eps(tables()[1], [-0.6, 0.7], 0.2)):
        x0 = torch.tensor([-0.5, -0.3, 0.1, 0.3, 0.5, 0.8], dtype=torch.float64).view(6, 1, 1, 1)
        diffusion = exact(script)
        xT = diffusion.ddim_invert(model, x0, 1000)
        back = diffusion.ddim_sample(model, None, 1000, clip=False, xT=xT)
        assert (back - x0).abs().max() < 1e-2 and (xT.diff(dim=0) > 0).all()
    assert torch.allclose(diffusion.ddim_invert(gaussian_eps(tables()[1]), x0, 1000), (x0 - MU) / S, atol=0.06)


@having("slerp")
def test_slerp_stays_on_the_arc(script):
    x, y = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    assert torch.allclose(script.slerp(x, y, 0.0), x) and torch.allclose(script.slerp(x, y, 1.0), y, atol=1e-6)
    assert torch.allclose(script.slerp(x, y, 1 / 3), 3 * torch.tensor([math.cos(math.pi / 6), 0.5, 0]), atol=1e-6)


# The experiments --------------------------------------------------------------------------------------------------
STEPS, FOUR = [5, 10, 20, 50, 100], ["ddpm", "eta1", "ddim", "quadratic"]


class Watched:
    """A model that writes down every (t, x_t) it is asked about."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, xt, t):
        assert t.dtype == torch.long and (t == t[0]).all() and len(t) == len(xt)
        self.seen.append((t[0].item(), xt))
        return self.model(xt, t)


def cells(T):
    """(S, sampler) in the order of the table: over all T steps two samplers alone."""
    return [(steps, name) for steps in STEPS if steps < T for name in FOUR] + [(T, "ddpm"), (T, "ddim")]


def are_times(t, steps, name="ddim", T=1000):
    """Is t the list of S times, evenly spaced or quadratic, to rounding?"""
    power = 2 if name == "quadratic" else 1
    exact = [max(i, T * (i / steps) ** power) for i in range(steps, 0, -1)]
    return len(t) == steps and all(abs(a - b) < 0.51 for a, b in zip(t, exact, strict=True))


def noises(seen, x0, eta, beta_tilde=True):
    """The z of each step with DDIM's Eq. 12 for this eta, from what a watched model of gaussian_eps has seen."""
    _, alpha_bar = tables()
    eps, z = gaussian_eps(alpha_bar), []
    for (t, x), (t_next, x_next) in zip(seen, seen[1:] + [(0, x0)], strict=True):
        a, b, e = alpha_bar[t], alpha_bar[t_next], eps(x, torch.tensor([t]))
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        mean = math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b - sigma**2) * e
        added = sigma if beta_tilde else math.sqrt(1 - a / b)
        z.append((x_next - mean) / (added if eta and t_next else 1))
    assert z.pop().abs().max() < 1e-6  # none in the last step
    return torch.stack(z)


def test_each_sampler_visits_its_times_from_the_same_x_T():
    """S calls for S steps; quadratic times where they should be, and nowhere else."""
    script, xT, order = load(DDIM), start(3, 1, 4, 4), []
    model, asked = Watched(gaussian_eps(tables()[1])), [100, 5, 50, 10, 20, 2000]  # of 1000 at most
    for steps, name, x0 in script.compare(xT, exact(script), model, asked, script.SAMPLERS, 0, True):
        seen, model.seen = model.seen, []
        assert are_times([t for t, _ in seen], steps, name)
        assert torch.equal(seen[0][1], xT) and x0.shape == xT.shape
        order.append((steps, name))
    assert order == cells(1000)


def test_each_sampler_adds_its_noise():
    """ddpm: sqrt(beta) z of the long step; eta1: sqrt(beta_tilde) z, the same z; ddim and quadratic: none."""
    script, xT, z = load(DDIM), start(40, 1, 16, 16), {}
    model = Watched(gaussian_eps(tables()[1]))
    for _, name, x0 in script.compare(xT, exact(script), model, [10], script.SAMPLERS, 3, False):
        z[name] = noises(model.seen, x0, eta=float(name in ("ddpm", "eta1")), beta_tilde=name != "ddpm")
        model.seen = []
    for name in ("ddpm", "eta1"):
        assert ((z[name].std((1, 2, 3, 4)) - 1).abs() < 0.04).all() and z[name].mean().abs() < 0.02
    assert torch.allclose(z["ddpm"], z["eta1"], atol=1e-6)
    assert z["ddim"].abs().max() < 1e-6 and z["quadratic"].abs().max() < 1e-6


def test_each_row_of_eta_has_its_eta():
    script, xT, labels = load(DDIM), start(40, 1, 16, 16), []
    model = Watched(gaussian_eps(tables()[1]))
    for steps, label, x0 in script.compare(xT, exact(script), model, [20], script.ETAS, 3, False):
        eta = float(label.removeprefix("eta = "))
        z, model.seen = noises(model.seen, x0, eta), []
        labels.append((steps, eta))
        assert (z.abs() < 1e-6).all() if eta == 0 else ((z.std((1, 2, 3, 4)) - 1).abs() < 0.04).all()
    assert labels == [(20, 0), (20, 0.25), (20, 0.5), (20, 0.75), (20, 1)]


def test_parts_of_500_keep_their_order_and_their_noise_is_new():
    """z never repeats x_T, which equal seeds for the two would make it do, nor the z of another part or step."""
    script = load(DDIM)
    torch.manual_seed(3)  # as main draws x_T from this seed
    xT = torch.randn(510, 1, 4, 4, dtype=torch.float64)
    model = Watched(gaussian_eps(tables()[1]))
    [(_, _, x0)] = script.compare(xT, exact(script), model, [3], {"eta1": dict(eta=1)}, 3, False)
    assert [len(xt) for _, xt in model.seen] == [500] * 3 + [10] * 3
    assert torch.equal(torch.cat([model.seen[0][1], model.seen[3][1]]), xT) and len(x0) == 510
    first, second = noises(model.seen[:3], x0[:500], 1.0), noises(model.seen[3:], x0[500:], 1.0)
    several = [xT[:10], xT[500:], first[0, :10], first[1, :10], second[0], second[1]]
    correlation = torch.corrcoef(torch.stack([x.flatten() for x in several]))
    assert (correlation - torch.eye(6)).abs().max() < 0.35
    assert next(script.compare(xT, exact(script), model, [3], {"eta1": dict(eta=1)}, 4, False))[2].ne(x0).all()


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_reaches_every_sampler(clip):
    """The model says x_0 = 3 of whatever it sees; clipped, that is 1."""
    script, ab = load(DDIM), torch.as_tensor(tables()[1])

    def three(xt, t):
        a = ab[t].view(-1, 1, 1, 1)
        return (xt - a.sqrt() * 3) / (1 - a).sqrt()

    for samplers in (script.SAMPLERS, script.ETAS):
        for *_, x0 in script.compare(start(2, 1, 4, 4), exact(script), three, [5], samplers, 0, clip):
            assert torch.allclose(x0, torch.full_like(x0, 1.0 if clip else 3.0), atol=1e-6)


# The whole script, with a network of a known answer -----------------------------------------------------------------
class Ideal(torch.nn.Module):
    """In place of the UNet: eps* of pixels N(mu, 0.5^2), where mu goes from 0.6 above to -0.6 below."""

    seen = []

    def __init__(self, channels):
        super().__init__()
        self.mu, self.alpha_bar = torch.linspace(0.6, -0.6, 28)[:, None], torch.as_tensor(tables(100)[1]).float()

    def forward(self, xt, t):
        Ideal.seen.append((t[0].item(), xt))
        return gaussian_eps(self.alpha_bar, self.mu, 0.5)(xt, t)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What main draws, prints and writes from a file of another script, T = 100, with Ideal in place of its network."""
    script, folder, pictures, text = load(DDIM), tmp_path_factory.mktemp("known"), {}, io.StringIO()
    settings = {"T": 100, "data": "digits", "samples": 2, "seed": 9, "steps": 7, "variance": "beta"}
    torch.save({"network": {"channels": 1}, "ema": {}, "settings": settings}, folder / "model.pt")
    Ideal.seen, save = [], script.save_labelled

    def save_labelled(path, blocks):
        pictures[path.name] = blocks
        save(path, blocks)

    flags = ["--load", folder / "model.pt", "--out", folder, "--samples", 10, "--seed", 5, "--no-clip"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(script, "UNet", Ideal)
        patch.setattr(script, "save_labelled", save_labelled)
        patch.setattr(script, "time", argparse.Namespace(perf_counter=lambda: 5 + 0.5 * len(Ideal.seen)))
        script.main([*map(str, flags), "--device", "cpu"])
    return argparse.Namespace(out=folder, pictures=pictures, seen=Ideal.seen, text=text.getvalue())


def to_bytes(x0):
    return (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().numpy()[:, 0, :, :, None]


def test_main_makes_these_calls(known):
    """The comparison, with T as the last S; eta.png with S = 20 and 100; four arcs; an inversion, and back."""
    seen = iter([(t, len(xt)) for t, xt in known.seen])
    for steps, name in cells(100):
        t, n = zip(*itertools.islice(seen, steps), strict=True)
        assert are_times(t, steps, name, T=100) and set(n) == {10}
    for n, steps in [(8, 20)] * 5 + [(8, 100)] * 5 + [(11, 50)] * 4:
        assert list(itertools.islice(seen, steps)) == [(t, n) for t in range(100, 0, -100 // steps)]
    assert list(seen) == [(t, 8) for t in [*range(1, 101), *range(100, 0, -1)]]


def test_the_printed_table(known):
    """By a clock that goes on half a second with each call of the network."""
    *lines, last = [line.split() for line in known.text.splitlines()]
    assert [(int(line[1]), line[0]) for line in lines] == cells(100)
    for line in lines:
        assert line[2:] == ["calls", "of", "the", "network", f"{0.5 * int(line[1]):.1f}", "s"]
    total = sum(steps / 2 for steps, _ in cells(100))
    assert last == ["18", "x", "10", "samples", "in", f"{total:.0f}", "s:", str(known.out)]


def test_files_hold_the_samples_of_their_name(known):
    """Bytes (N, 28, 28, 1) of the last step's x0_hat; the rows of steps.png and eta.png are the first 8 of them."""
    files = {path.name: np.load(path)["arr_0"] for path in known.out.glob("*.npz")}
    assert sorted(files) == sorted(f"{name}_{steps:04}.npz" for steps, name in cells(100))
    seen, eps, alpha_bar = iter(known.seen), gaussian_eps(tables(100)[1], Ideal(1).mu, 0.5), tables(100)[1]
    for steps, name in cells(100):
        *_, (t, xt) = itertools.islice(seen, steps)
        x0 = (xt - math.sqrt(1 - alpha_bar[t]) * eps(xt, torch.tensor([t]))) / math.sqrt(alpha_bar[t])
        array = files[f"{name}_{steps:04}.npz"]
        assert array.shape == (10, 28, 28, 1) and array.dtype == np.uint8
        difference = array != to_bytes(x0)
        assert difference.mean() < 0.002 and np.abs(array.astype(int) - to_bytes(x0)).max() <= 1  # at .5, to rounding
    assert list(known.pictures["steps.png"]) == ["DDPM", "DDIM"]
    assert list(known.pictures["eta.png"]) == ["S = 20", "S = 100"]
    for title, rows in known.pictures["steps.png"].items():
        assert list(rows) == [f"S = {steps}" for steps in STEPS]
        for steps in STEPS:
            assert np.array_equal(to_bytes(rows[f"S = {steps}"]), files[f"{title.lower()}_{steps:04}.npz"][:8])
    for title, rows in known.pictures["eta.png"].items():
        assert list(rows) == ["eta = 0", "eta = 0.25", "eta = 0.5", "eta = 0.75", "eta = 1"]
        assert torch.allclose(rows["eta = 0"], known.pictures["steps.png"]["DDIM"][title], atol=1e-4)
        assert all((rows["eta = 0"] - rows[label]).abs().mean() > 0.05 for label in list(rows)[1:])
    samples, first = np.array(Image.open(known.out / "samples.png").convert("L")), files["ddim_0100.npz"][..., 0]
    for n, corner in {0: np.s_[2:58, 2:58], 9: np.s_[60:116, 60:116]}.items():  # 8 in a row
        assert np.array_equal(samples[corner], first[n].repeat(2, 0).repeat(2, 1))


def test_interpolation_runs_on_the_arc_between_two_x_T(known):
    """x_T from the seed; without clipping DDIM is affine here, so that each point of the arc has a known image."""
    [rows] = known.pictures["interpolation.png"].values()
    torch.manual_seed(5)
    xT = torch.randn(10, 1, 28, 28)
    assert torch.equal(known.seen[0][1], xT)
    ends = known.pictures["steps.png"]["DDIM"]["S = 50"]
    assert len(rows) == 4
    for n, row in enumerate(rows.values()):
        assert row.shape == (11, 1, 28, 28)
        assert torch.allclose(row[0], ends[n], atol=1e-3) and torch.allclose(row[10], ends[n + 4], atol=1e-3)
        slope = (row[0] - row[10]) / (xT[n] - xT[n + 4])
        assert slope.min() > 0.3  # and the same in a row of pixels, with the same mu
        angle = math.acos((xT[n] * xT[n + 4]).sum() / (xT[n].norm() * xT[n + 4].norm()))
        for k in (3, 5):
            arc = (math.sin((1 - k / 10) * angle) * xT[n] + math.sin(k / 10 * angle) * xT[n + 4]) / math.sin(angle)
            assert torch.allclose(row[k], row[0] + slope.median() * (arc - xT[n]), atol=2e-2)


def test_inversion_is_of_images_that_were_not_trained_on(known):
    """scikit-learn's last 8 digits; x_T as the exact flow has it; and back again, whatever --clip says."""
    [rows] = known.pictures["inversion.png"].values()
    image, xT, back = rows.values()
    assert list(rows)[0] == "image" and "x_T" in list(rows)[1] and "back" in list(rows)[2]
    small = torch.from_numpy(load_digits().images[-8:])[:, None] / 16
    digits = torch.nn.functional.interpolate(small, size=28, mode="bicubic").clamp(0, 1)
    assert (image - (2 * digits - 1)).abs().max() < 1 / 127 and image.min() == -1
    assert (back - image).abs().max() < 0.1
    far = (image[0] - image[1]).abs() > 0.5
    slope = (xT[0] - xT[1])[far] / (image[0] - image[1])[far]
    assert far.sum() > 50 and slope.std() < 1e-3 * slope.mean()  # affine: the same in every pixel


def test_a_picture_with_labels(tmp_path, monkeypatch):
    """Image n of row r of block b is one grey level; the label of a row stands before it."""
    script, figures = load(DDIM), []
    save = script.Figure.savefig
    monkeypatch.setattr(script.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    level = torch.linspace(-0.95, 0.95, 30).view(2, 3, 5)  # of image n of row r of block b
    images = level.view(2, 3, 5, 1, 1, 1).expand(2, 3, 5, 1, 28, 28)
    blocks = {f"b{b}": {f"r{r}": images[b, r] for r in range(3)} for b in range(2)}
    script.save_labelled(tmp_path / "x.png", blocks)
    assert Image.open(tmp_path / "x.png").size[0] > 600
    for b, axes in enumerate(figures[0].axes):
        assert axes.get_title() == f"b{b}"
        assert [text.get_text() for text in axes.get_yticklabels()] == ["r0", "r1", "r2"]
        shown = np.array(axes.images[0].get_array())
        assert axes.images[0].get_clim() == (-1, 1) and shown.shape == (90, 150)
        for r, y in enumerate(axes.get_yticks()):
            assert np.allclose(shown[int(y), 15::30], level[b, r])
            assert np.ptp(shown[30 * r + 1 : 30 * r + 29, 1:29]) == 0


# Files, data and training -----------------------------------------------------------------------------------------
def drawn(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npz", ".png")}


def test_load_draws_what_the_run_drew(tmp_path, monkeypatch):
    """All flags of the run are in its model.pt; flags given with --load count more."""
    script = load(DDIM)
    script.main(["--smoke", "--samples", "9", "--no-clip", "--seed", "3", "--T", "6", "--out", str(tmp_path / "a")])
    model = str(tmp_path / "a" / "model.pt")
    script.main(["--load", model, "--out", str(tmp_path / "b")])
    one, two = drawn(tmp_path / "a"), drawn(tmp_path / "b")
    assert one.pop("loss.png") and one == two and len(one) == 11
    assert np.load(tmp_path / "b" / "ddim_0006.npz")["arr_0"].shape == (9, 28, 28, 1)
    monkeypatch.setattr(script, "save_labelled", lambda *_: None)
    for flag in (["--clip"], ["--seed", "4"]):
        script.main(["--load", model, "--out", str(tmp_path / "c"), *flag])
        three = drawn(tmp_path / "c")
        assert all(three[name] != two[name] for name in two if name.endswith(".npz"))


def test_the_network_of_ddpm_mnist_is_loaded(tmp_path):
    """T from its file, which counts more than --smoke; its seed and number of samples are its own affair."""
    load(MNIST).main(["--smoke", "--T", "7", "--seed", "8", "--out", str(tmp_path / "m")])
    script, model = load(DDIM), str(tmp_path / "m" / "model.pt")
    script.main(["--load", model, "--smoke", "--out", str(tmp_path / "a"), "--device", "cpu"])
    assert sorted(p.name for p in (tmp_path / "a").glob("ddim*.npz")) == ["ddim_0005.npz", "ddim_0007.npz"]
    got = np.load(tmp_path / "a" / "ddim_0005.npz")["arr_0"]
    saved = torch.load(model, weights_only=True)
    network = load(MNIST).UNet(**saved["network"])
    network.load_state_dict(saved["ema"])
    torch.manual_seed(0)
    diffusion = script.Diffusion(script.linear_beta(7))
    with script.autocast(torch.device("cpu")):
        x0 = diffusion.ddim_sample(network, (8, 1, 28, 28), 5)
    assert np.abs(got.astype(int) - to_bytes(x0)).max() <= 2


def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    script = load(DDIM)
    monkeypatch.setattr(script, "load_images", lambda *_: pytest.fail("the data were loaded first"))
    network, settings = dict(channels=1, widths=[16, 16], blocks=1), dict(T=10, data="mnist")
    ema = script.UNet(**network).state_dict()
    colour = network | {"channels": 3}
    files = dict(
        cosine=(network, ema, settings | {"schedule": "cosine"}),
        empty=(network, ema, {}),
        labels=(network | {"classes": 10}, ema, settings),
        colour=(colour, script.UNet(**colour).state_dict(), settings),
    )
    for name, parts in files.items():
        torch.save(dict(zip(("network", "ema", "settings"), parts, strict=True)), tmp_path / f"{name}.pt")
    for name in (*files, "missing"):
        assert f"{name}.pt" in one_line(DDIM, ["--load", tmp_path / f"{name}.pt", "--out", tmp_path / "no"], capsys)
    assert "--samples" in one_line(DDIM, ["--samples", 7, "--out", tmp_path / "no"], capsys)
    assert not (tmp_path / "no").exists()


def test_images(tmp_path, monkeypatch, capsys):
    """Train with MNIST's training images, invert its test images; in its place scikit-learn's digits, said aloud."""
    script = load(DDIM)

    class Fake:
        def __init__(self, root, train, download):
            self.data = torch.full((60 if train else 20, 28, 28), 7 if train else 9, dtype=torch.uint8)

    monkeypatch.setattr(script, "MNIST", Fake)
    images, others, name = script.load_images("mnist", tmp_path)
    assert images.shape == (60, 1, 28, 28) and (images == 7).all() and name == "mnist"
    assert others.shape == (8, 1, 28, 28) and (others == 9).all() and capsys.readouterr().out == ""

    def offline(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(script, "MNIST", offline)
    images, others, name = script.load_images("mnist", tmp_path)
    assert name == "digits" and images.shape == (1789, 1, 28, 28) and images.dtype == torch.uint8 and len(others) == 8
    assert "!!! NO MNIST: no network here" in capsys.readouterr().out
    small = torch.nn.functional.avg_pool2d(torch.cat([images, others]).float(), 7)[:, 0]  # 28 = 4 x 7: a coarse look
    coarse = torch.nn.functional.avg_pool2d(torch.from_numpy(load_digits().images).float()[:, None], 2)[:, 0] / 16 * 255
    assert torch.corrcoef(torch.stack([small.flatten(), coarse.flatten()]))[0, 1] > 0.98
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        script.load_images("mnist", tmp_path)
    assert "delete" in capsys.readouterr().err


class OneConvolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1)

    def forward(self, xt, t):
        return self.conv(xt)


def test_the_recipe(monkeypatch):
    """The rate rises for a 30th of the steps and falls to 0; gradients are clipped; images lie in [-1, 1]; the EMA."""
    script, rates, norms, weights, seen = load(DDIM), [], [], [], []

    class Optimizer(torch.optim.AdamW):
        def step(self):
            [group] = self.param_groups
            rates.append(group["lr"]), norms.append(torch.stack([p.grad.norm() for p in group["params"]]).norm().item())
            assert group["betas"] == (0.9, 0.95) and group["fused"]
            super().step()
            weights.append(group["params"][0].detach().clone())

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    model, diffusion = OneConvolution(), Recorder(script.linear_beta(10))
    model.conv.weight.data += 30  # so wrong that its gradient must be clipped
    expected = model.conv.weight.detach().clone()
    ema, losses = script.train(diffusion, model, images, argparse.Namespace(steps=300, batch_size=8, lr=1.0))
    assert rates == pytest.approx([min(30 * (i + 1), 300 - i) / 300 for i in range(300)])
    assert norms[0] == pytest.approx(1, abs=1e-3) and max(norms) < 1.001
    for k, weight in enumerate(weights):
        decay = min(0.9999, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(ema.conv.weight, expected, atol=1e-4)
    assert losses.shape == (300,) and losses[-20:].mean() < losses[:5].mean()
    values, counts = torch.stack(seen)[:, :, 0, 0, 0].unique(return_counts=True)
    assert torch.allclose(values, torch.tensor([-1, -0.6, 1])) and (counts - 800).abs().max() < 110
