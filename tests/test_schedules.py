"""cosine_schedule.py: the schedule, sampling in few steps and from t < T, a fair comparison."""

import math

import numpy as np
import pytest
import torch
from conftest import MNIST, MU, S, gaussian_eps, having, load, one_line, tables
from matplotlib.figure import Figure
from PIL import Image

PATH = "paper/cosine_schedule.py"
BLUE, ORANGE = "#0072B2", "#D55E00"


def cosine_alpha_bar(T=1000):
    """By the formula of the paper, with the one beta that is clipped. Index 0: the clean image."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.append(f[:-1] / f[0], 0.001 * f[-2] / f[0])


ALPHA_BAR = {"linear": lambda T: tables(T)[1], "cosine": cosine_alpha_bar}


class Constant(torch.nn.Module):
    """A network with x0_hat = c at every t, under its own schedule. It writes down its calls."""

    def __init__(self, alpha_bar, c):
        super().__init__()
        self.alpha_bar, self.c, self.calls = torch.as_tensor(alpha_bar).float(), c, []

    def forward(self, xt, t):
        self.calls.append((xt, t[0].item()))
        ab = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - ab.sqrt() * self.c) / (1 - ab).sqrt()


# The mathematics ------------------------------------------------------------------------------


@having("cosine_beta")
def test_cosine_schedule(script):
    """Improved-diffusion's first betas and its last, which is clipped; alpha_bar by the formula."""
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
@pytest.mark.parametrize(
    "T, steps, skip", [(1000, 50, 0), (1000, 50, 0.2), (1000, 30, 0.5), (7, 7, 0)]
)
def test_sample_respaced_is_its_chain(schedule, T, steps, skip):
    """With eps* of N(mu, s^2): mean and variance by the recursion over the times, from noise."""
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


# The comparison -------------------------------------------------------------------------------


def test_loss_by_t_tells_the_bands_apart():
    """Images of one grey level, of which eps follows; the model knows this up to t = 500 only."""
    script, alpha_bar = load(PATH), torch.as_tensor(tables()[1]).float()
    oracle = Constant(alpha_bar, 200 / 127.5 - 1)
    images = torch.full((3, 1, 8, 8), 200, dtype=torch.uint8)

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


LEVELS = torch.arange(240).byte().view(240, 1, 1, 1).repeat(1, 1, 28, 28)
LEVELS[:, 0, 3, 20] = 255  # image k has grey level k, and shows which side is up and left


def run(monkeypatch, tmp_path, *flags, done=None, **patches):
    """main on LEVELS, with networks for which x0_hat is -0.5 (linear) and 0.5 (cosine).

    -> networks, calls of train, figures {file name: figure}. done: the training steps after which
    the first training stops.
    """
    script, networks, trained, figures = load(PATH), {}, [], {}

    def train(diffusion, model, images, steps, batch_size, lr):
        name = ["linear", "cosine"][len(trained)]
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        trained.append((diffusion, weights, torch.randn(3), images, steps, batch_size, lr))
        networks[name] = Constant(ALPHA_BAR[name](diffusion.T), dict(linear=-0.5, cosine=0.5)[name])
        return networks[name], torch.zeros(done or steps)

    def savefig(figure, path, **_):
        figures[path.name] = figure

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(script, "load_mnist", lambda data, root: (LEVELS, data))
    for name, value in (dict(train=train) | patches).items():
        monkeypatch.setattr(script, name, value)
    always = ["--smoke", "--T", "20", "--samples", "8", "--device", "cpu", "--out", str(tmp_path)]
    script.main([*always, *flags])
    return networks, trained, figures


@pytest.mark.parametrize("n", [9, 1])
def test_which_schedule_made_which_file_row_and_line(n, monkeypatch, tmp_path, capsys):
    """Networks whose x_0 is a grey level of its own, right only under its own schedule."""
    settings = load(PATH).SMOKE | {"S": 10}
    flags = ["--skip-last", "0.4", "--samples", str(n)]
    networks, _, figures = run(monkeypatch, tmp_path, *flags, SMOKE=settings)
    grey = {"linear": 64, "cosine": 191}
    for name in ("linear", "cosine"):
        for kind in ("samples", "skipped"):
            samples = np.load(tmp_path / f"{kind}_{name}.npz")["arr_0"]
            assert samples.shape == (n, 28, 28, 1) and samples.dtype == np.uint8
            assert (samples == grey[name]).all()
        facts = torch.load(tmp_path / f"model_{name}.pt")["settings"]
        assert facts["task"] == f"28x28 images with the {name} schedule" and facts["T"] == 20
        for kind in ("samples", "skipped"):
            grid = np.array(Image.open(tmp_path / f"{kind}_{name}.png"))
            columns = math.isqrt(n)
            for k in range(n):
                y, x = [2 + 58 * i for i in divmod(k, columns)] if n > 1 else (0, 0)
                assert (grid[y : y + 56, x : x + 56] == grey[name]).all()

    # The loss of x0_hat = c on an image x_0 is alpha_bar / (1 - alpha_bar) (x_0 - c)^2.
    [over_t, over_snr] = figures["loss_by_t.png"].axes
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    held_out = LEVELS[order[:40]]
    x0 = held_out[torch.arange(100) % 40].double() / 127.5 - 1
    printed = capsys.readouterr().out.splitlines()[-1]
    lines = zip(over_t.lines, over_snr.lines, networks, (BLUE, ORANGE), strict=True)
    for line, snr, name, color in lines:
        alpha_bar, t = ALPHA_BAR[name](20), np.arange(1, 21)
        error = ((x0 - networks[name].c) ** 2).mean((1, 2, 3)).numpy()
        loss = (error * np.repeat(alpha_bar[t] / (1 - alpha_bar[t]), 5)).reshape(20, 5).mean(1)
        assert line.get_label() == name and line.get_color() == snr.get_color() == color
        assert line.get_xdata().tolist() == t.tolist()
        assert np.allclose(line.get_ydata(), loss, rtol=0.02)
        assert np.allclose(snr.get_xdata(), np.log(alpha_bar[t] / (1 - alpha_bar[t])), atol=1e-2)
        assert np.array_equal(snr.get_ydata(), line.get_ydata())
        assert f"{name}: 3 training steps, held-out loss {loss.mean():.2f}"[:-1] in printed
    assert f"4 x {n} samples" in printed
    assert over_t.get_yscale() == over_snr.get_yscale() == "log"
    assert over_t.get_xlabel() == "t"
    assert over_t.get_ylabel() == "$L_{simple}$ of held-out images"
    assert over_snr.get_xlabel() == "log-SNR (left: noise, right: the image)"
    legend = over_t.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["linear", "cosine"]

    [axes] = figures["skipped.png"].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"{name}, from t = {t}" for name in ("linear", "cosine") for t in (20, 12)]
    picture = np.asarray(axes.images[0].get_array())
    assert picture.shape == (30 * 4 + 2, 30 * min(n, 8) + 2, 3) and picture.dtype == np.uint8
    for y, level in zip(axes.get_yticks(), (64, 64, 191, 191), strict=True):
        for x in range(2, picture.shape[1], 30):
            assert (picture[y - 14 : y + 14, x : x + 28] == level).all()


def test_schedules_and_forward_show_each_schedule_under_its_name(monkeypatch, tmp_path):
    figures = run(monkeypatch, tmp_path, "--T", "40")[2]
    curves = {
        name: (np.append(0, 1 - a[1:] / a[:-1])[1:], a[1:])
        for name in ALPHA_BAR
        for a in [ALPHA_BAR[name](40)]
    }
    left, middle, right = figures["schedules.png"].axes
    for axes, column in ((left, 0), (middle, 1), (right, 1)):
        for line, name, color in zip(axes.lines, curves, (BLUE, ORANGE), strict=True):
            y = curves[name][column]
            y = np.log(y / (1 - y)) if axes is right else y
            assert (line.get_label(), line.get_color()) == (name, color)
            assert np.array_equal(line.get_xdata(), np.arange(1, 41))
            assert np.allclose(line.get_ydata(), y, rtol=1e-3)
        assert axes.get_xlabel() == "t"
    assert left.get_yscale() == "log" and middle.get_yscale() == right.get_yscale() == "linear"
    legend = [text.get_text() for text in middle.get_legend().get_texts()]
    assert legend == ["linear", "cosine"]
    titles = left.get_title(), middle.get_title(), right.get_title()
    assert titles[:2] == (r"$\beta_t$", r"$\bar\alpha_t$") and titles[2].startswith("log-SNR: ")

    places = np.array(figures["forward.png"].axes).reshape(2, 9)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    first = LEVELS[order[0], 0].numpy() / 127.5 - 1
    for row, name in zip(places, ALPHA_BAR, strict=True):
        assert row[0].get_ylabel() == name
        for axes, t in zip(row, range(0, 41, 5), strict=True):
            a, shown = ALPHA_BAR[name](40)[t], np.asarray(axes.images[0].get_array())
            assert axes.images[0].get_clim() == (-1, 1) and f"{a:.2g}" in axes.get_xlabel()
            if t > 0:  # the same noise at every t, under both schedules
                eps = (shown - math.sqrt(a) * first) / math.sqrt(1 - a)
                noise = np.asarray(places[0, 8].images[0].get_array())
                assert np.corrcoef(eps.ravel(), noise.ravel())[0, 1] > 0.99
                assert 0.9 < eps.std() < 1.1
            else:
                assert np.allclose(shown, first)
            assert axes.get_title() == f"t = {t}"


def test_both_networks_start_from_the_same_noise_at_the_same_t(monkeypatch, tmp_path):
    networks, *_ = run(monkeypatch, tmp_path, "--skip-last", "0.25", "--seed", "5")
    starts = []
    for network in networks.values():
        chains = network.calls[-35:]  # after loss_by_t: the whole chain, and 15 of its steps
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
    assert all(torch.equal(one[k], two[k]) for k in (1, 2, 3)) and one[4:] == two[4:]
    assert one[4:] == (3, load(PATH).CPU["batch_size"], load(PATH).CPU["lr"])
    seen, loss_by_t = [], load(PATH).loss_by_t

    def watched(diffusion, model, images, n):
        seen.append(images)
        return loss_by_t(diffusion, model, images, n)

    _, [other, _], _ = run(monkeypatch, tmp_path, "--seed", "6", loss_by_t=watched)
    assert not torch.equal(other[1], one[1])
    levels = [set(images[:, 0, 0, 0].tolist()) for images in (one[3], other[3], *seen)]
    assert levels[0] == levels[1] and len(levels[0]) == 200
    assert levels[2] == levels[3] == set(range(240)) - levels[0]


@pytest.mark.slow
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
            gradients = [p.grad.norm() for p in self.param_groups[0]["params"]]
            norms.append(torch.stack(gradients).norm().item())
            rates.append(self.param_groups[0]["lr"])
            super().step()

    norms, rates, x0s, loss = [], [], [], script.Diffusion.loss

    def watched_loss(self, model, x0):
        x0s.append(x0.double())
        return loss(self, model, x0)

    monkeypatch.setattr(torch.optim, "AdamW", WatchedAdamW)
    monkeypatch.setattr(script.Diffusion, "loss", watched_loss)
    cheap = dict(
        loss_by_t=lambda *_: torch.ones(20), sample_respaced=lambda *_: torch.zeros(1, 1, 28, 28)
    )
    run(monkeypatch, tmp_path, "--steps", "40", UNet=Watched, train=script.train, **cheap)
    assert len(seen) == len(x0s) == 80 and norms == pytest.approx([1] * 80, abs=1e-3)
    rate = script.CPU["lr"]
    assert rates == pytest.approx(2 * [rate * min(30 * (i + 1), 40 - i) / 40 for i in range(40)])
    for k in range(40):
        shown = []
        for (xt, t), x0, name in zip(seen[k::40], x0s[k::40], ALPHA_BAR, strict=True):
            ab = torch.as_tensor(ALPHA_BAR[name](20))[t].view(-1, 1, 1, 1)
            shown.append((x0, t, (xt - ab.sqrt() * x0) / (1 - ab).sqrt()))
        (x1, t1, eps1), (x2, t2, eps2) = shown
        assert torch.equal(x1, x2) and torch.equal(t1, t2) and torch.allclose(eps1, eps2, atol=1e-3)
        level = 127.5 * (x1[:, 0, 0, 0] + 1)
        assert torch.allclose(x1[:, 0, 3, 20], torch.ones(len(x1), dtype=torch.float64))
        assert torch.allclose(level, level.round(), atol=1e-3) and level.min() >= 0
    saved = [torch.load(tmp_path / f"model_{name}.pt")["ema"]["first.weight"] for name in ALPHA_BAR]
    assert not torch.equal(*saved)


def test_nothing_but_the_schedule_differs(monkeypatch, tmp_path):
    """Under one schedule given twice, both networks and their samples are equal, bit for bit."""
    script = load(PATH)
    twice = {"linear": script.linear_beta, "cosine": script.linear_beta}
    run(
        monkeypatch,
        tmp_path,
        SCHEDULES=twice,
        train=script.train,
        loss_by_t=lambda *_: torch.ones(20),
    )
    one, two = (torch.load(tmp_path / f"model_{name}.pt") for name in twice)
    assert all(torch.equal(one["ema"][key], two["ema"][key]) for key in one["ema"])
    for kind in ("samples", "skipped"):
        drawn = [np.load(tmp_path / f"{kind}_{name}.npz")["arr_0"] for name in twice]
        assert np.array_equal(*drawn) and len(np.unique(drawn)) > 9


def test_after_ctrl_c_the_second_network_has_no_more_steps_than_the_first(monkeypatch, tmp_path):
    _, trained, _ = run(monkeypatch, tmp_path, "--steps", "9", done=2)
    assert [steps for *_, steps, _, _ in trained] == [9, 2]
    for name in ALPHA_BAR:
        assert torch.load(tmp_path / f"model_{name}.pt")["settings"]["steps"] == 2


@pytest.mark.parametrize("interrupted", ["linear", "cosine"])
def test_ctrl_c_while_either_network_trains(interrupted, monkeypatch, tmp_path, capsys):
    """The true train stops in its third training step; both networks are saved and sampled."""
    script = load(PATH)
    calls, loss = dict(linear=0, cosine=0), script.Diffusion.loss

    def stopping_loss(self, model, x0):
        name = "linear" if np.allclose(self.alpha_bar, ALPHA_BAR["linear"](20)) else "cosine"
        calls[name] += 1
        if name == interrupted and calls[name] == 3:
            raise KeyboardInterrupt
        return loss(self, model, x0)

    monkeypatch.setattr(script.Diffusion, "loss", stopping_loss)
    run(monkeypatch, tmp_path, "--steps", "4", train=script.train)
    steps = dict(linear=2 if interrupted == "linear" else 4, cosine=2)
    printed = capsys.readouterr().out
    assert "Stopped after 2 training steps" in printed
    for name in ALPHA_BAR:
        assert f"{name}: {steps[name]} training steps" in printed
        assert torch.load(tmp_path / f"model_{name}.pt")["settings"]["steps"] == steps[name]
        assert np.load(tmp_path / f"skipped_{name}.npz")["arr_0"].shape == (8, 28, 28, 1)
    models, facts = script.load_networks(tmp_path)  # both are of one run
    assert {name: facts[name]["steps"] for name in facts} == steps


def test_batches_of_500_keep_their_order_and_differ():
    """Sample n is where it belongs, whatever the batches; x_T is new in each."""
    script, starts = load(PATH), []

    def model(xt, t):
        if t[0] == 10:
            starts.append(xt)
        return torch.zeros_like(xt)

    torch.manual_seed(1)
    x0 = script.sample_in_batches(model, script.linear_beta(10), 2, 0, 510, "cpu")
    assert [len(start) for start in starts] == [500, 10] and x0.shape == (510, 1, 28, 28)
    xT = torch.cat(starts).flatten(1)
    both = torch.corrcoef(torch.cat([xT[:10], xT[500:], x0[:10].flatten(1), x0[500:].flatten(1)]))
    assert both[:10, 10:20].abs().max() < 0.2  # noise of the two batches
    assert both[:20, 20:].diagonal().min() > 0.7 and both[20:30, 30:].abs().max() < 0.2


# Files and flags -------------------------------------------------------------------------------
@pytest.fixture
def cheap(monkeypatch):
    """No time is spent on samples and losses."""
    monkeypatch.setattr(load(PATH), "loss_by_t", lambda *_: torch.ones(20))
    one = torch.zeros(1, 1, 28, 28)
    monkeypatch.setattr(load(PATH), "sample_in_batches", lambda *_: one)


def test_the_linear_network_serves_ddpm_mnist_and_the_cosine_network_does_not(
    tmp_path, capsys, cheap
):
    load(PATH).main(["--smoke", "--out", str(tmp_path)])
    flags = ["--samples", "8", "--out", str(tmp_path / "generated")]
    load(MNIST).main(["--load", str(tmp_path / "model_linear.pt"), *flags])
    assert np.load(tmp_path / "generated" / "samples.npz")["arr_0"].shape == (8, 28, 28, 1)
    message = one_line(MNIST, ["--load", tmp_path / "model_cosine.pt", *flags], capsys)
    assert "cosine schedule" in message and "linear schedule" in message


@pytest.mark.slow
def test_load_takes_both_networks_of_one_run(tmp_path, capsys, cheap):
    """Its two files may not come from different runs, nor have changed places."""
    folders = [tmp_path / name for name in ("a", "steps", "T", "seed", "lr", "batch_size")]
    changed = [(), ("--steps", 2), ("--T", 9), ("--seed", 1), ("--lr", 1e-4), ("--batch-size", 3)]
    for folder, flags in zip(folders, changed, strict=True):
        load(PATH).main(["--smoke", *map(str, flags), "--out", str(folder)])
        capsys.readouterr()
        out = ["--out", str(folder / "loaded"), "--data", "mnist5k"]
        load(PATH).main(["--load", str(folder), *out])
        steps = 2 if folder.name == "steps" else 3
        assert capsys.readouterr().out.count(f": {steps} training steps") == 2
    for folder in folders[1:]:
        mixed = tmp_path / f"mixed_{folder.name}"
        mixed.mkdir()
        for name, source in (("linear", folders[0]), ("cosine", folder)):
            (mixed / f"model_{name}.pt").write_bytes((source / f"model_{name}.pt").read_bytes())
        message = one_line(PATH, ["--load", mixed, "--out", tmp_path / "no"], capsys)
        assert "different runs" in message and mixed.name in message
    wide = torch.load(folders[0] / "model_cosine.pt")
    wide["settings"]["run"]["unet"] = wide["network"] | {"widths": [16, 32]}
    torch.save(wide, tmp_path / "mixed_T" / "model_cosine.pt")
    assert "different runs" in one_line(PATH, ["--load", tmp_path / "mixed_T"], capsys)

    linear, cosine = (folders[0] / f"model_{name}.pt" for name in ("linear", "cosine"))
    first, second = linear.read_bytes(), cosine.read_bytes()
    linear.write_bytes(second)
    cosine.write_bytes(first)
    message = one_line(PATH, ["--load", folders[0], "--out", tmp_path / "no"], capsys)
    assert "model_linear.pt" in message and "cosine" in message
    linear.write_bytes(b"")
    assert "model_linear.pt" in one_line(PATH, ["--load", folders[0]], capsys)
    linear.unlink()
    assert "model_linear.pt" in one_line(PATH, ["--load", folders[0]], capsys)
    assert not (tmp_path / "no").exists()


def test_damaged_weights_are_told(tmp_path, capsys):
    """NaN would be rounded to black."""
    flags = ["--smoke", "--samples", "1", "--out", str(tmp_path)]
    load(PATH).main(flags)
    saved = torch.load(tmp_path / "model_cosine.pt")
    saved["ema"]["last.2.bias"] += math.nan
    torch.save(saved, tmp_path / "model_cosine.pt")
    flags = ["--load", tmp_path, "--data", "mnist5k", "--out", tmp_path / "loaded"]
    assert "NaN" in one_line(PATH, flags, capsys)
    assert not list((tmp_path / "loaded").glob("*_cosine.*"))


def test_all_is_finite_at_the_largest_T():
    """At T = 8000 alpha_bar_T of the linear schedule is 1e-35."""
    script = load(PATH)

    def zero(xt, t):
        return torch.zeros_like(xt)

    for name, beta in script.SCHEDULES.items():
        assert script.log_snr(script.Diffusion(beta(8000))).isfinite().all(), name
        for steps in (1, 7, 100):
            x0 = script.sample_respaced(zero, beta(8000), steps, 0, (2, 1, 4, 4), "cpu")
            assert x0.isfinite().all() and x0.abs().max() <= 1


def test_skip_last_must_leave_a_step(tmp_path, capsys):
    for part in ("-0.1", "1", "1.5", "nan", "0.96"):
        flags = ["--smoke", f"--skip-last={part}", "--out", tmp_path / "out"]
        error = one_line(PATH, flags, capsys)
        assert "--skip-last" in error and not (tmp_path / "out").exists()
