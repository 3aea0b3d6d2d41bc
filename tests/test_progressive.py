"""progressive_training.py: stages of equal time, weights that carry over, and a fair race."""

import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MNIST, load, one_line, tables
from matplotlib.figure import Figure
from PIL import Image

PATH = "paper/progressive_training.py"
COST = {8: 0.01, 16: 0.02, 32: 0.08}  # seconds per training step
GREY = 200 / 127.5 - 1


def settings(**changes):
    return argparse.Namespace(**load(PATH).CPU | load(PATH).SMOKE | dict(batch_size=4) | changes)


def grey_images(size, n=6):
    return torch.full((n, 1, size, size), 200, dtype=torch.uint8)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Drawer(torch.nn.Module):
    """The network for which x0_hat is c (a number or an image) at every t."""

    def __init__(self, c, T=10):
        super().__init__()
        self.c, self.alpha_bar = c, torch.as_tensor(tables(T)[1]).float()

    def forward(self, xt, t):
        ab = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - ab.sqrt() * self.c) / (1 - ab).sqrt()


# The plan ---------------------------------------------------------------------------------------


def test_the_plan_takes_the_same_time():
    stages = load(PATH).plan(600, COST)
    seconds = [steps * COST[size] for size, steps in stages]
    assert [size for size, _ in stages] == [8, 16, 32]
    assert seconds == pytest.approx([8, 16, 24], rel=0.01)
    assert load(PATH).plan(1, COST) == [(8, 1), (16, 1), (32, 1)]


def test_seconds_per_step_is_that_of_the_fastest_run(monkeypatch):
    """By a clock on which five steps take 50 s while the machine warms up, then 10 s, then 15 s."""
    script, clock, runs = load(PATH), [100.0], iter([50, 10, 15])

    def train(diffusion, model, images, steps, batch_size, lr):
        assert (steps, batch_size, lr) == (5, 4, load(PATH).CPU["lr"])
        assert images.shape[-1] == 16
        clock[0] += next(runs)
        return None, torch.zeros(steps)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert script.seconds_per_step(None, grey_images(16), settings()) == 2


def test_ctrl_c_while_a_step_is_timed_ends_the_program(monkeypatch):
    monkeypatch.setattr(load(PATH), "train", lambda *_: (None, torch.zeros(2)))
    with pytest.raises(SystemExit, match="before the race"):
        load(PATH).seconds_per_step(None, grey_images(16), settings())


# The race ---------------------------------------------------------------------------------------


class Knowing(torch.nn.Module):
    """Knows that each image is of one grey level, and errs by d in every pixel: its loss is d^2.

    To ask it takes long.
    """

    def __init__(self, d, clock, asked):
        super().__init__()
        self.d, self.clock, self.asked, self.drawer = d, clock, asked, Drawer(GREY)

    def forward(self, xt, t):
        self.clock[0] += 1000
        self.asked.append((xt, t))
        return self.drawer(xt, t) + self.d


def fake_race(monkeypatch, steps, stop_in_call=math.inf, **changes):
    """race with a known clock and a known train -> points, EMAs, calls of train, what was asked."""
    script, clock, calls, asked = load(PATH), [5.0], [], []

    def train(diffusion, model, images, steps, batch_size, lr):
        assert (batch_size, lr) == (4, script.CPU["lr"])
        call = SimpleNamespace(images=images, steps=steps, model=model, start=weights(model))
        calls.append(call)
        clock[0] += steps * COST[images.shape[-1]]
        model.first.bias.data += 1  # something is learned
        torch.randn(len(calls))  # random numbers are used up
        done = steps - 1 if len(calls) == stop_in_call else steps
        return Knowing(len(calls) / 100, clock, asked), torch.zeros(done)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    images_of = {size: grey_images(size) for size in COST}
    diffusion = script.Diffusion(script.linear_beta(10))
    args = settings(steps=steps, **changes)
    points, emas = script.race(diffusion, images_of, grey_images(32, 50), COST, args)
    assert all(call.images is images_of[call.images.shape[-1]] for call in calls)
    return points, emas, calls, asked


def test_the_race_with_a_known_clock_and_known_networks(monkeypatch):
    """A quarter, a half and all of 2,400 steps at 0.08 s: 48, 96, 192 s both ways.

    Run k ends with call ends[k].
    """
    points, emas, calls, asked = fake_race(monkeypatch, 2400)
    stages = [(call.images.shape[-1], call.steps) for call in calls]
    assert stages == [
        (32, 600), (8, 800), (16, 800), (32, 300),
        (32, 1200), (8, 1600), (16, 1600), (32, 600),
        (32, 2400), (8, 3200), (16, 3200), (32, 1200),
    ]  # fmt: skip
    ends = {"plain": [1, 5, 9], "progressive": [4, 8, 12]}
    assert list(points) == ["plain", "progressive"]
    for way, run_ends in ends.items():
        seconds, losses = zip(*points[way], strict=True)
        assert seconds == pytest.approx([48, 96, 192])  # without the time that the losses take
        assert losses == pytest.approx([(k / 100) ** 2 for k in run_ends], rel=1e-3)
    found = {way: {size: ema.d for size, ema in of.items()} for way, of in emas.items()}
    assert found == {"plain": {32: 0.09}, "progressive": {8: 0.10, 16: 0.11, 32: 0.12}}
    assert len(asked) == 6  # each about the same x_t, t and noise
    assert all(torch.equal(xt, asked[0][0]) and torch.equal(t, asked[0][1]) for xt, t in asked)
    assert asked[0][0].shape == (50, 1, 32, 32) and len(asked[0][1].unique()) > 5


def test_every_run_starts_anew_and_the_weights_carry_over_from_stage_to_stage(monkeypatch):
    *_, calls, _ = fake_race(monkeypatch, 8)
    first = [calls[k] for k in (0, 1, 4, 5, 8, 9)]  # of each run
    assert all(torch.equal(call.start, first[0].start) for call in first)
    assert len({id(call.model) for call in calls}) == 6
    for k in (1, 5, 9):
        assert calls[k].model is calls[k + 1].model is calls[k + 2].model
        assert not torch.equal(calls[k].start, calls[k + 1].start)
    other = fake_race(monkeypatch, 8, seed=1)[2]
    assert not torch.equal(other[0].start, calls[0].start)


def test_a_run_that_is_stopped_does_not_count_but_is_kept(monkeypatch):
    points, emas, calls, _ = fake_race(monkeypatch, 80, stop_in_call=3)
    assert len(calls) == 3 and [len(curve) for curve in points.values()] == [1, 0]
    found = {way: list(of) for way, of in emas.items()}
    assert found == {"plain": [32], "progressive": [8, 16]}
    points, emas, calls, _ = fake_race(monkeypatch, 80, stop_in_call=1)
    assert len(calls) == 1 and points == {"plain": [], "progressive": []}
    assert list(emas) == ["plain"]


def test_every_stage_has_a_learning_rate_and_an_ema_of_its_own(monkeypatch):
    """The true train: its weights are those of the stage before, and its EMA starts from them."""
    script, rates, starts, ends, levels = load(PATH), [], [], [], []
    update_ema, loss = script.update_ema, script.Diffusion.loss

    class Watched(torch.optim.AdamW):
        def __init__(self, parameters, *args, **options):
            super().__init__(parameters, *args, **options)
            rates.append([])

        def step(self):
            rates[-1].append(self.param_groups[0]["lr"])
            super().step()

    def watched_update(ema, model, step):
        if step == 0:
            starts.append((weights(ema), ends[-1] if ends else None))
        update_ema(ema, model, step)
        ends.append(weights(model))

    class Small(torch.nn.Module):
        def __init__(self, **unet):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 1)

        def forward(self, xt, t):
            return self.conv(xt)

    def watched_loss(self, model, x0):
        levels.append(127.5 * (x0[:, 0, 0, 0] + 1))
        return loss(self, model, x0)

    monkeypatch.setattr(script.Diffusion, "loss", watched_loss)
    monkeypatch.setattr(script, "UNet", Small)
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(script, "update_ema", watched_update)
    grey = (10 * torch.arange(26)).byte().view(26, 1, 1, 1)
    images_of = {size: grey.expand(26, 1, size, size) for size in COST}
    diffusion, cost = script.Diffusion(script.linear_beta(10)), {8: 0.1, 16: 0.2, 32: 1.2}
    args = settings(steps=60, lr=1e-3)
    _, emas = script.race(diffusion, images_of, images_of[32], cost, args)
    plans = [[15], [30, 30, 8], [30], [60, 60, 15], [60], [120, 120, 30]]
    assert [len(stage) for stage in rates] == [n for plan in plans for n in plan]
    for stage in rates:
        n = len(stage)
        assert stage == pytest.approx([1e-3 * min(30 * (i + 1), n - i) / n for i in range(n)])
    # Every image is seen, in [-1, 1].
    assert set((torch.cat(levels) / 10).round(decimals=3).tolist()) == set(range(26))
    for k in (-2, -1):  # the last two stages go on from the weights before them, not from an EMA
        assert torch.equal(*starts[k])
    for ema, (start, _) in zip(emas["progressive"].values(), starts[-3:], strict=True):
        assert not torch.equal(weights(ema), start)


# main -------------------------------------------------------------------------------------------

RAMP = torch.linspace(-1, 1, 1024).view(1, 1, 32, 32)  # tells whether the frame is cut off evenly
EMAS = {
    "plain": {32: Drawer(RAMP)},
    "progressive": {8: Drawer(-0.6), 16: Drawer(0.2), 32: Drawer(-RAMP)},
}
POINTS = {
    "plain": [(10.0, 0.3), (20.0, 0.2), (41.0, 0.1)],
    "progressive": [(11.0, 0.5), (21.0, 0.4)],
}
SHOWN = ((RAMP + 1) * 127.5).round().byte()[0, 0].numpy().astype(int)


def numbered_images(data, root):
    """1,600 noisy images that carry their number in two pixels."""
    images = torch.randint(
        0, 256, (1600, 1, 28, 28), generator=torch.Generator().manual_seed(1)
    ).byte()
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(1600) // 256, torch.arange(1600) % 256
    return images, data


def main(monkeypatch, tmp_path, *flags, emas=EMAS, points=POINTS, **patches):
    """main, whose race writes down its arguments and returns Drawers -> that record, figures."""
    script, figures, seen = load(PATH), {}, []

    def race(diffusion, images_of, held_out, cost, args):
        seen.append(SimpleNamespace(images_of=images_of, held_out=held_out, cost=cost))
        return points, emas

    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.name: figure}))
    for name, value in (dict(race=race, load_mnist=numbered_images) | patches).items():
        monkeypatch.setattr(script, name, value)
    script.main(["--T", "10", "--out", str(tmp_path), *flags])
    return seen[0], figures


def test_images_are_framed_and_made_small_and_none_that_judges_is_trained_on(monkeypatch, tmp_path):
    numbers = []
    for seed in ("3", "4"):
        seen, _ = main(monkeypatch, tmp_path, "--smoke", "--seed", seed)
        full, held_out = seen.images_of[32], seen.held_out
        assert list(seen.images_of) == [8, 16, 32]
        assert full.shape == (600, 1, 32, 32) and held_out.shape == (1000, 1, 32, 32)
        frame = torch.ones(32, 32, dtype=torch.bool)
        frame[2:30, 2:30] = False
        for images in (full, held_out):
            assert images.dtype == torch.uint8 and not images[:, 0, frame].any()
            assert 120 < images[:, :, 3:30, 2:30].float().mean() < 135
        for size in (8, 16):
            k, small = 32 // size, seen.images_of[size]
            means = full.float().view(600, 1, size, k, size, k).mean((3, 5))
            assert small.dtype == torch.uint8 and (small.float() - means).abs().max() <= 0.5
        pair = [256 * x[:, 0, 2, 2].int() + x[:, 0, 2, 3] for x in (full, held_out)]
        numbers.append([set(x.tolist()) for x in pair])
    assert numbers[0] == numbers[1]  # whatever the seed
    assert numbers[0][0] | numbers[0][1] == set(range(1600))
    assert len(numbers[0][0]) == 600 and numbers[0][1] != set(range(1000))  # a random choice


def test_the_clock_plans_except_for_smoke(monkeypatch, tmp_path):
    def measured(diffusion, images, args):
        assert diffusion.T == 10
        return images.shape[-1] / 100

    smoke, _ = main(monkeypatch, tmp_path, "--smoke", seconds_per_step=measured)
    assert smoke.cost == {8: 1, 16: 1, 32: 1}
    true, _ = main(monkeypatch, tmp_path, "--samples", "4", seconds_per_step=measured)
    assert true.cost == {8: 0.08, 16: 0.16, 32: 0.32}


def test_each_stage_generates_at_its_size_in_50_steps_with_eta_1(monkeypatch, tmp_path):
    """From noise of the same seed each time, in batches of at most 500."""
    script, seen = load(PATH), []

    def ddim_sample(self, model, shape, S, eta=0.0):
        seen.append((model.c, shape, S, eta, torch.randn(1).item()))
        return torch.zeros(shape)

    monkeypatch.setattr(script.Diffusion, "ddim_sample", ddim_sample)
    main(monkeypatch, tmp_path, "--smoke", "--T", "200", "--samples", "503", "--seed", "7")
    torch.manual_seed(7)
    first, second = torch.randn(1).item(), torch.randn(1).item()
    assert [seen[0][0], seen[1][0]] == [-0.6, 0.2]
    calls = [((8, 1, size, size), first) for size in (8, 16, 32)]
    calls += 2 * [((500, 1, 32, 32), first), ((3, 1, 32, 32), second)]
    assert [call[1:] for call in seen] == [(shape, 50, 1, noise) for shape, noise in calls]


def test_the_files_hold_what_each_network_generates(monkeypatch, tmp_path):
    main(monkeypatch, tmp_path, "--smoke", "--samples", "70", "--steps", "7")
    shown = SHOWN[2:30, 2:30]
    for way, expected in (("plain", shown), ("progressive", 255 - shown)):
        samples = np.load(tmp_path / f"samples_{way}.npz")["arr_0"].astype(int)
        assert samples.shape == (70, 28, 28, 1)
        assert np.abs(samples[..., 0] - expected).max() <= 1
        with Image.open(tmp_path / f"samples_{way}.png") as picture:
            pixels = np.asarray(picture.convert("L")).astype(int)
        assert pixels.shape == (8 * 58 + 2, 8 * 58 + 2)  # the first 64, twice as large
        for corner in (2, 2 + 7 * 58):
            image = pixels[corner : corner + 56, 2:58][::2, ::2]
            assert np.abs(image - expected).max() <= 1
        saved = torch.load(tmp_path / f"model_{way}.pt", weights_only=True)["settings"]
        assert saved["steps"] == 7 and saved["task"] == load(PATH).TASK and "32x32" in saved["task"]


def test_the_report_has_the_seconds_of_both_networks(monkeypatch, tmp_path, capsys):
    clock = [0]

    def generate(diffusion, network, n, size, seed):
        clock[0] += 7
        return torch.zeros(n, 1, size, size, dtype=torch.uint8)

    monkeypatch.setattr(load(PATH).time, "perf_counter", lambda: clock[0])
    main(monkeypatch, tmp_path, "--smoke", "--samples", "5", generate=generate)
    assert "5 samples each in 14 s: " in capsys.readouterr().out


def test_race_png_and_stages_png_show_what_was_measured(monkeypatch, tmp_path):
    _, figures = main(monkeypatch, tmp_path, "--smoke", "--samples", "5")
    [axes] = figures["race.png"].axes
    lines = [(*np.array(line.get_data()).tolist(), line.get_label()) for line in axes.lines]
    assert lines == [
        ([10, 20, 41], [0.3, 0.2, 0.1], "plain"), ([11, 21], [0.5, 0.4], "progressive"),
    ]  # fmt: skip
    assert axes.get_xlabel() == "seconds of training"
    assert axes.get_ylabel() == "$L_{simple}$ at 32x32 on held-out images"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["plain", "progressive"]
    assert axes.lines[0].get_color() != axes.lines[1].get_color()

    rows = figures["stages.png"].axes
    assert [axes.get_ylabel() for axes in rows] == ["8x8", "16x16", "32x32"]
    for axes, size, expected in zip(rows, (8, 16, 32), (51, 153, 255 - SHOWN), strict=True):
        [image] = axes.images
        row = np.asarray(image.get_array()).astype(int)
        assert row.shape == (size, 8 * size) and image.origin == "upper"
        assert (image.norm.vmin, image.norm.vmax, image.get_cmap().name) == (0, 255, "gray")
        for k in range(8):
            assert np.abs(row[:, k * size : (k + 1) * size] - expected).max() <= 1
    heights = [axes.get_position().y0 for axes in rows]
    assert heights == sorted(heights, reverse=True)  # the smallest on top


def test_ctrl_c_in_the_first_run_still_gives_its_samples(monkeypatch, tmp_path):
    points = {"plain": [], "progressive": []}
    emas = {"plain": {32: Drawer(RAMP)}}
    _, figures = main(monkeypatch, tmp_path, "--smoke", emas=emas, points=points)
    assert set(figures) == {"race.png"}
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"model_plain.pt", "samples_plain.npz", "samples_plain.png"}


def test_two_networks_of_different_runs_are_refused(tmp_path, capsys):
    """One of the two files is from an earlier run, for example after a kill between them."""
    script = load(PATH)
    unet = script.SMOKE["unet"]
    for steps in (5, 6):
        for way in ("plain", "progressive"):
            facts = dict(task=script.TASK, T=10, steps=5 if way == "plain" else steps, data="mnist")
            ema = script.UNet(**unet).state_dict()
            saved = dict(network=unet, ema=ema, settings=facts)
            torch.save(saved, tmp_path / f"model_{way}.pt")
        flags = ["--load", str(tmp_path), "--samples", "2", "--out", str(tmp_path / "out")]
        if steps == 5:
            script.main(flags)
            assert len(list((tmp_path / "out").glob("*.npz"))) == 2
        else:
            assert "different runs" in one_line(PATH, flags, capsys)
    message = one_line(MNIST, ["--load", tmp_path / "model_plain.pt", "--out", tmp_path], capsys)
    assert "32x32" in message
