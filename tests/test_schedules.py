"""cosine_schedule.py: the cosine schedule, sampling in few steps and from the middle, and a comparison that is fair."""
import math

import numpy as np
import pytest
import torch
from conftest import MNIST, MU, S, gaussian_eps, having, load, one_line, tables
from matplotlib.figure import Figure

PATH = "paper/cosine_schedule.py"
BLUE, ORANGE = "#0072B2", "#D55E00"


def cosine_alpha_bar(T=1000):
    """By the formula of the paper, with the one beta that is clipped. Index 0 is the clean image."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.append(f[:-1] / f[0], 0.001 * f[-2] / f[0])


ALPHA_BAR = {"linear": lambda T: tables(T)[1], "cosine": cosine_alpha_bar}


class Constant(torch.nn.Module):
    """The network for which x0_hat is the number c at every t, under its own schedule; it notes its calls."""

    def __init__(self, alpha_bar, c):
        super().__init__()
        self.alpha_bar, self.c, self.calls = torch.as_tensor(alpha_bar).float(), c, []

    def forward(self, xt, t):
        self.calls.append((xt, t[0].item()))
        ab = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - ab.sqrt() * self.c) / (1 - ab).sqrt()


# The mathematics ------------------------------------------------------------------------------------------------------


@having("cosine_beta")
def test_cosine_schedule(script):
    """Improved-diffusion's first betas and its last, which is clipped; alpha_bar is cos^2 of a ratio until there."""
    beta = script.cosine_beta(1000)
    assert beta.dtype == torch.float64 and beta.shape == (1001,) and beta[0] == 0
    assert beta[1:4].tolist() == pytest.approx([4.1284e-05, 4.6143e-05, 5.1001e-05], rel=1e-4)
    assert (beta == 0.999).sum() == 1 and beta[1000] == 0.999
    assert np.allclose((1 - beta).cumprod(0), cosine_alpha_bar(), rtol=1e-9, atol=0)


@having("cosine_beta")
def test_cosine_schedule_is_that_of_diffusers(script):
    diffusers = pytest.importorskip("diffusers")
    for T in (1000, 10, 1):
        theirs = diffusers.DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").betas
        assert (script.cosine_beta(T)[1:] - theirs).abs().max() < 1e-6


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("T, steps, skip", [(1000, 50, 0), (1000, 50, 0.2), (1000, 30, 0.5), (7, 7, 0)])
def test_sample_respaced_is_its_chain(schedule, T, steps, skip):
    """With eps* of N(mu, s^2): mean and variance by the recursion over the times visited, from pure noise."""
    script, alpha_bar = load(PATH), ALPHA_BAR[schedule](T)
    seen, first, ideal = [], [], gaussian_eps(torch.as_tensor(alpha_bar).float())

    def model(xt, t):
        seen.append(t[0].item())
        first.append(xt)
        return ideal(xt, t)

    torch.manual_seed(3)
    shape, n = (1, 1, 150, 200), 30_000
    x0 = script.sample_respaced(model, script.SCHEDULES[schedule](T), steps, skip, shape, "cpu")
    times = [round(T * k / steps) for k in range(round(steps * (1 - skip)), 0, -1)]
    assert seen == times and times[0] == round(T * (1 - skip))
    torch.manual_seed(3)
    assert torch.equal(first[0], torch.randn(shape))  # pure noise, whatever the t
    mean, var = 0.0, 1.0
    for now, then in zip(times, times[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        total, beta = a * S**2 + 1 - a, 1 - a / b
        slope = (1 - beta / total) / math.sqrt(1 - beta)
        mean = slope * mean + beta / total * math.sqrt(a) * MU / math.sqrt(1 - beta)
        var = slope**2 * var + (1 - b) / (1 - a) * beta
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / n) + 1e-4)
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / n) + 1e-3)


# The comparison -------------------------------------------------------------------------------------------------------


def test_loss_by_t_tells_the_bands_apart():
    """Images of one grey level, of which eps follows; the model that knows this lies above t = 500."""
    script, alpha_bar = load(PATH), torch.as_tensor(tables()[1]).float()
    oracle, images = Constant(alpha_bar, 200 / 127.5 - 1), torch.full((3, 1, 8, 8), 200, dtype=torch.uint8)

    def model(xt, t):
        return torch.where(t.view(-1, 1, 1, 1) > 500, 0, 1) * oracle(xt, t)

    loss = script.loss_by_t(script.Diffusion(script.linear_beta()), model, images, 2000)
    assert loss.shape == (20,) and loss[:10].max() < 1e-5
    assert torch.allclose(loss[10:], torch.ones(10), atol=5 * math.sqrt(2 / 6400))


@pytest.mark.parametrize("T", [1000, 30])
def test_loss_by_t_shows_both_networks_the_same_images_t_and_noise(T):
    script, shown = load(PATH), []
    images = (torch.arange(5) * 50).byte().view(5, 1, 1, 1).expand(5, 1, 8, 8)
    for schedule in script.SCHEDULES:
        seen = []

        def model(xt, t, seen=seen):
            seen.append((xt, t))
            return xt

        torch.randn(7)  # whatever was drawn before
        script.loss_by_t(script.Diffusion(script.SCHEDULES[schedule](T)), model, images, 2000)
        xt, t = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
        counts = t.long().bincount(minlength=T + 1)
        assert len(t) == 2000 and counts[0] == 0 and counts[1:].max() - counts[1:].min() <= 1
        ab = torch.as_tensor(ALPHA_BAR[schedule](T))[t.long()].view(-1, 1, 1, 1)
        x0 = (torch.arange(2000) % 5 * 50 / 127.5 - 1).view(-1, 1, 1, 1).double()
        shown.append((t, (xt - ab.sqrt() * x0) / (1 - ab).sqrt()))
    (t1, eps1), (t2, eps2) = shown
    assert torch.equal(t1, t2) and abs(eps1.std().item() - 1) < 0.02
    clear = t1 > 1  # at t = 1 the noise is so faint that float32 has few of its digits
    assert torch.allclose(eps1[clear], eps2[clear], atol=1e-3)


LEVELS = torch.arange(240).byte().view(240, 1, 1, 1).expand(240, 1, 28, 28)  # image k has grey level k


def run(monkeypatch, tmp_path, *flags, done=None, **patches):
    """main on LEVELS, with networks for which x0_hat is -0.5 (linear) and 0.5 (cosine).

    -> networks, calls of train, figures {file name: figure}. done: the steps after which the first training stops.
    """
    script, networks, trained, figures = load(PATH), {}, [], {}

    def train(diffusion, model, images, args):
        name = ["linear", "cosine"][len(trained)]
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        trained.append((diffusion, weights, torch.randn(3), images, args.steps))
        networks[name] = Constant(ALPHA_BAR[name](args.T), {"linear": -0.5, "cosine": 0.5}[name])
        return networks[name], torch.zeros(done or args.steps)

    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.name: figure}))
    monkeypatch.setattr(script, "load_images", lambda data, root: (LEVELS, data))
    for name, value in (dict(train=train) | patches).items():
        monkeypatch.setattr(script, name, value)
    script.main(["--smoke", "--T", "20", "--out", str(tmp_path), *flags])
    return networks, trained, figures


@pytest.mark.parametrize("n", [9, 1])
def test_which_schedule_made_which_file_row_and_line(n, monkeypatch, tmp_path, capsys):
    """Networks whose x_0 is a grey level of its own, right only under its own schedule."""
    networks, _, figures = run(monkeypatch, tmp_path, "--skip-last", "0.4", "--samples", str(n))
    grey = {"linear": 64, "cosine": 191}
    for name in ("linear", "cosine"):
        for kind in ("samples", "skipped"):
            samples = np.load(tmp_path / f"{kind}_{name}.npz")["arr_0"]
            assert samples.shape == (n, 28, 28, 1) and samples.dtype == np.uint8
            assert (samples == grey[name]).all()
        assert torch.load(tmp_path / f"model_{name}.pt")["settings"]["schedule"] == name

    # The loss of x0_hat = c on an image of level k is alpha_bar / (1 - alpha_bar) (x_0 - c)^2.
    [over_t, over_snr] = figures["loss_by_t.png"].axes
    held_out = load(PATH).load_images("", "")[0][torch.randperm(240, generator=torch.Generator().manual_seed(0))[:40]]
    x0 = held_out[torch.arange(100) % 40, 0, 0, 0] / 127.5 - 1
    printed = capsys.readouterr().out.splitlines()[-1]
    for line, snr, name, color in zip(over_t.lines, over_snr.lines, networks, (BLUE, ORANGE), strict=True):
        alpha_bar, t = ALPHA_BAR[name](20), np.arange(1, 21)
        error = (x0.numpy() - networks[name].c) ** 2 * np.repeat(alpha_bar[t] / (1 - alpha_bar[t]), 5)
        loss = error.reshape(20, 5).mean(1)
        assert line.get_label() == name and line.get_color() == snr.get_color() == color
        assert line.get_xdata().tolist() == t.tolist() and np.allclose(line.get_ydata(), loss, rtol=0.02)
        assert np.allclose(snr.get_xdata(), np.log(alpha_bar[t] / (1 - alpha_bar[t])), atol=1e-2)
        assert np.array_equal(snr.get_ydata(), line.get_ydata())
        assert f"{name}: 3 steps, loss {loss.mean():.2f}"[:-1] in printed

    [axes] = figures["skipped.png"].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{name}, from t = {t}" for name in ("linear", "cosine") for t in (20, 12)]
    picture = np.asarray(axes.images[0].get_array())
    greys = [picture[round(y), 2 + 14, 0] for y in axes.get_yticks()]
    assert np.allclose(greys, [64 / 255] * 2 + [191 / 255] * 2)


def test_schedules_and_forward_show_each_schedule_under_its_name(monkeypatch, tmp_path):
    figures = run(monkeypatch, tmp_path, "--T", "40")[2]
    curves = {name: (np.append(0, 1 - a[1:] / a[:-1])[1:], a[1:]) for name in ALPHA_BAR for a in [ALPHA_BAR[name](40)]}
    left, middle, right = figures["schedules.png"].axes
    for axes, column in ((left, 0), (middle, 1), (right, 1)):
        for line, name, color in zip(axes.lines, curves, (BLUE, ORANGE), strict=True):
            y = curves[name][column]
            y = np.log(y / (1 - y)) if axes is right else y
            assert (line.get_label(), line.get_color()) == (name, color)
            assert np.array_equal(line.get_xdata(), np.arange(1, 41)) and np.allclose(line.get_ydata(), y, rtol=1e-3)
    assert left.get_yscale() == "log" and middle.get_legend() is not None

    places = np.array(figures["forward.png"].axes).reshape(2, 9)
    first = torch.randperm(240, generator=torch.Generator().manual_seed(0))[0].item() / 127.5 - 1
    for row, name in zip(places, ALPHA_BAR, strict=True):
        assert row[0].get_ylabel() == name
        for axes, other, t in zip(row, places[0], range(0, 41, 5), strict=True):
            a, shown = ALPHA_BAR[name](40)[t], np.asarray(axes.images[0].get_array())
            assert axes.images[0].get_clim() == (-1, 1) and f"{a:.2g}" in axes.get_xlabel()
            if t > 0:  # the same noise at every t, under both schedules
                eps = (shown - math.sqrt(a) * first) / math.sqrt(1 - a)
                noise = np.asarray(places[0, 8].images[0].get_array())
                assert np.corrcoef(eps.ravel(), noise.ravel())[0, 1] > 0.9999 and 0.9 < eps.std() < 1.1
            else:
                assert np.allclose(shown, first)
            assert other.get_title() == f"t = {t}"


def test_both_networks_start_from_the_same_noise_at_the_same_t(monkeypatch, tmp_path):
    networks, *_ = run(monkeypatch, tmp_path, "--skip-last", "0.25", "--seed", "5")
    starts = []
    for network in networks.values():
        chains = network.calls[-(20 + 15) :]  # after loss_by_t: the whole chain, and 15 steps without its end
        assert [t for _, t in chains] == [*range(20, 0, -1), *range(15, 0, -1)]
        starts.append((chains[0][0], chains[20][0]))
    torch.manual_seed(5)
    noise = torch.randn(8, 1, 28, 28)
    assert all(torch.equal(start, noise) for pair in starts for start in pair)


def test_both_trainings_have_the_same_weights_randomness_and_images(monkeypatch, tmp_path):
    """And no held-out image among these, with any seed."""
    _, [one, two], _ = run(monkeypatch, tmp_path, "--seed", "4")
    for (name, ab), (diffusion, *_) in zip(ALPHA_BAR.items(), (one, two), strict=True):
        assert np.allclose(diffusion.alpha_bar, ab(20), atol=1e-6), name
    assert torch.equal(one[1], two[1]) and torch.equal(one[2], two[2]) and torch.equal(one[3], two[3])
    seen, loss_by_t = [], load(PATH).loss_by_t

    def watched(diffusion, model, images, n):
        seen.append(images)
        return loss_by_t(diffusion, model, images, n)

    _, [other, _], _ = run(monkeypatch, tmp_path, "--seed", "6", loss_by_t=watched)
    assert not torch.equal(other[1], one[1])
    levels = [set(images[:, 0, 0, 0].tolist()) for images in (one[3], other[3], *seen)]
    assert levels[0] == levels[1] and len(levels[0]) == 200
    assert levels[2] == levels[3] == set(range(240)) - levels[0]


def test_in_training_both_networks_see_the_same_images_t_and_noise(monkeypatch, tmp_path):
    """The true train: x_0 by its grey level, t as it is, eps from x_t."""
    script, seen = load(PATH), []

    class Watched(script.UNet):
        def __init__(self, **network):
            super().__init__(**network)
            self.last[-1].bias.data += 30  # so wrong that its gradient must be clipped

        def forward(self, xt, t):
            if torch.is_grad_enabled():
                seen.append((xt.detach().double(), t))
            return super().forward(xt, t)

    class WatchedAdamW(torch.optim.AdamW):
        def step(self):
            norms.append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
            rates.append(self.param_groups[0]["lr"])
            super().step()

    norms, rates, x0s, loss = [], [], [], script.Diffusion.loss

    def watched_loss(self, model, x0):
        x0s.append(x0.double())
        return loss(self, model, x0)

    monkeypatch.setattr(torch.optim, "AdamW", WatchedAdamW)
    monkeypatch.setattr(script.Diffusion, "loss", watched_loss)
    cheap = dict(loss_by_t=lambda *_: torch.ones(20), sample_respaced=lambda *_: torch.zeros(1, 1, 28, 28))
    run(monkeypatch, tmp_path, "--steps", "40", UNet=Watched, train=script.train, **cheap)
    assert len(seen) == len(x0s) == 80 and norms == pytest.approx([1] * 80, abs=1e-3)
    assert rates == pytest.approx(2 * [1.5e-3 * min(30 * (i + 1), 40 - i) / 40 for i in range(40)])
    for k in range(40):
        shown = []
        for (xt, t), x0, name in zip(seen[k::40], x0s[k::40], ALPHA_BAR, strict=True):
            ab = torch.as_tensor(ALPHA_BAR[name](20))[t].view(-1, 1, 1, 1)
            shown.append((x0, t, (xt - ab.sqrt() * x0) / (1 - ab).sqrt()))
        (x1, t1, eps1), (x2, t2, eps2) = shown
        assert torch.equal(x1, x2) and torch.equal(t1, t2) and torch.allclose(eps1, eps2, atol=1e-3)
        level = 127.5 * (x1[:, 0, 0, 0] + 1)
        assert torch.allclose(level, level.round(), atol=1e-3) and level.min() >= 0
    saved = [torch.load(tmp_path / f"model_{name}.pt")["ema"]["first.weight"] for name in ALPHA_BAR]
    assert not torch.equal(*saved)


def test_nothing_but_the_schedule_differs(monkeypatch, tmp_path):
    """Under one schedule given twice the two networks, and what they draw, are equal, bit for bit."""
    script = load(PATH)
    twice = {"linear": script.linear_beta, "cosine": script.linear_beta}
    run(monkeypatch, tmp_path, SCHEDULES=twice, train=script.train, loss_by_t=lambda *_: torch.ones(20))
    one, two = (torch.load(tmp_path / f"model_{name}.pt") for name in twice)
    assert all(torch.equal(one["ema"][key], two["ema"][key]) for key in one["ema"])
    for kind in ("samples", "skipped"):
        drawn = [np.load(tmp_path / f"{kind}_{name}.npz")["arr_0"] for name in twice]
        assert np.array_equal(*drawn) and len(np.unique(drawn)) > 9


def test_after_ctrl_c_the_second_network_has_no_more_steps_than_the_first(monkeypatch, tmp_path):
    _, trained, _ = run(monkeypatch, tmp_path, "--steps", "9", done=2)
    assert [steps for *_, steps in trained] == [9, 2]


# Files and flags ------------------------------------------------------------------------------------------------------


def test_the_linear_network_serves_ddpm_mnist(tmp_path, monkeypatch, capsys):
    """Each file keeps its own number of steps, and two files that have changed places are found out."""
    monkeypatch.setattr(load(PATH), "loss_by_t", lambda *_: torch.ones(20))
    monkeypatch.setattr(load(PATH), "sample_respaced", lambda *_: torch.zeros(1, 1, 28, 28))
    load(PATH).main(["--smoke", "--out", str(tmp_path)])
    load(MNIST).main(["--load", str(tmp_path / "model_linear.pt"), "--out", str(tmp_path / "drawn")])
    assert np.load(tmp_path / "drawn" / "samples.npz")["arr_0"].shape == (8, 28, 28, 1)
    linear, cosine, third = (tmp_path / name for name in ("model_linear.pt", "model_cosine.pt", "third.pt"))
    saved = torch.load(cosine)
    torch.save(saved | {"settings": saved["settings"] | {"steps": 2}}, cosine)
    load(PATH).main(["--load", str(tmp_path), "--out", str(tmp_path / "loaded")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert "linear: 3 steps" in last and "cosine: 2 steps" in last
    linear.rename(third), cosine.rename(linear), third.rename(cosine)
    assert "model_linear.pt" in one_line(PATH, ["--load", tmp_path, "--out", tmp_path / "out"], capsys)
    saved = torch.load(cosine)
    torch.save(saved | {"network": saved["network"] | {"widths": [8, 32]}}, linear)
    assert "model_linear.pt" in one_line(PATH, ["--load", tmp_path, "--out", tmp_path / "out"], capsys)


def test_skip_last_must_leave_a_step(tmp_path, capsys):
    for part in ("-0.1", "1", "1.5", "nan", "0.96"):
        error = one_line(PATH, ["--smoke", "--skip-last", part, "--out", tmp_path / "out"], capsys)
        assert "--skip-last" in error and not (tmp_path / "out").exists()
