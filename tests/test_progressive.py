"""progressive_training.py: a plan of equal time, weights that carry over, and a race that is fair."""
import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load, tables
from matplotlib.figure import Figure
from PIL import Image

PATH = "paper/progressive_training.py"
COST = {8: 0.01, 16: 0.02, 32: 0.08}  # seconds per step
GREY = 200 / 127.5 - 1


def settings(**changes):
    smoke = load(PATH).SMOKE
    return argparse.Namespace(**smoke | dict(lr=1e-3, seed=0, device=torch.device("cpu"), smoke=True) | changes)


def grey_images(size, n=6):
    return torch.full((n, 1, size, size), 200, dtype=torch.uint8)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Drawer(torch.nn.Module):
    """The network for which x0_hat is c (one number for each size, or an image) at every t."""

    def __init__(self, c, T=10):
        super().__init__()
        self.c, self.alpha_bar, self.sizes = c, torch.as_tensor(tables(T)[1]).float(), []

    def forward(self, xt, t):
        self.sizes.append(xt.shape[-1])
        ab = self.alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - ab.sqrt() * self.c) / (1 - ab).sqrt()


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_takes_the_same_time():
    stages = load(PATH).plan(600, COST)
    seconds = [steps * COST[size] for size, steps in stages]
    assert [size for size, _ in stages] == [8, 16, 32] and seconds == pytest.approx([8, 16, 24], rel=0.01)
    assert load(PATH).plan(1, COST) == [(8, 1), (16, 1), (32, 1)]


def test_seconds_per_step_is_that_of_the_fastest_run(monkeypatch):
    """By a clock on which five steps take 50 s while the machine warms up, then 10 s, then 15 s."""
    script, clock, runs = load(PATH), [100.0], iter([50, 10, 15])

    def train(diffusion, model, images, args):
        assert args.steps == 5 and args.batch_size == 4 and images.shape[-1] == 16
        clock[0] += next(runs)
        return None, torch.zeros(args.steps)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert script.seconds_per_step(None, grey_images(16), settings()) == 2


def test_ctrl_c_while_a_step_is_timed_ends_the_program(monkeypatch):
    monkeypatch.setattr(load(PATH), "train", lambda *_: (None, torch.zeros(2)))
    with pytest.raises(SystemExit):
        load(PATH).seconds_per_step(None, grey_images(16), settings())


# The race -------------------------------------------------------------------------------------------------------------


class Knowing(torch.nn.Module):
    """Knows that each image is of one grey level, and errs by d in every pixel: its loss is d^2. To ask takes long."""

    def __init__(self, d, clock, asked):
        super().__init__()
        self.d, self.clock, self.asked, self.drawer = d, clock, asked, Drawer(GREY)

    def forward(self, xt, t):
        self.clock[0] += 1000
        self.asked.append((xt, t))
        return self.drawer(xt, t) + self.d


def fake_race(monkeypatch, steps, stop_in_call=math.inf, **changes):
    """race with a clock and a train that are known -> points, EMAs, calls of train, what the networks were asked."""
    script, clock, calls, asked = load(PATH), [5.0], [], []

    def train(diffusion, model, images, args):
        calls.append(SimpleNamespace(images=images, steps=args.steps, model=model, start=weights(model)))
        clock[0] += args.steps * COST[images.shape[-1]]
        model.first.bias.data += 1  # something is learned
        torch.randn(len(calls))  # random numbers are used up
        done = args.steps - 1 if len(calls) == stop_in_call else args.steps
        return Knowing(len(calls) / 100, clock, asked), torch.zeros(done)

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    images_of = {size: grey_images(size) for size in COST}
    diffusion = script.Diffusion(script.linear_beta(10))
    points, emas = script.race(diffusion, images_of, grey_images(32, 50), COST, settings(steps=steps, **changes))
    assert all(call.images is images_of[call.images.shape[-1]] for call in calls)
    return points, emas, calls, asked


def test_the_race_with_a_known_clock_and_known_networks(monkeypatch):
    """A quarter, a half and all of 2,400 steps at 0.08 s: 48, 96, 192 s both ways. Run k ends with call ends[k]."""
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
    assert {way: {size: ema.d for size, ema in of.items()} for way, of in emas.items()} == {
        "plain": {32: 0.09}, "progressive": {8: 0.10, 16: 0.11, 32: 0.12},
    }  # fmt: skip
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
    assert {way: list(of) for way, of in emas.items()} == {"plain": [32], "progressive": [8, 16]}
    points, emas, calls, _ = fake_race(monkeypatch, 80, stop_in_call=1)
    assert len(calls) == 1 and points == {"plain": [], "progressive": []} and list(emas) == ["plain"]


def test_every_stage_has_a_learning_rate_and_an_ema_of_its_own(monkeypatch):
    """The true train: its weights are those of the stage before, and its EMA starts from them."""
    script, rates, norms, starts, ends, levels = load(PATH), [], [], [], [], []
    update_ema, loss = script.update_ema, script.Diffusion.loss

    class Watched(torch.optim.AdamW):
        def __init__(self, parameters, *args, **options):
            super().__init__(parameters, *args, **options)
            rates.append([])

        def step(self):
            rates[-1].append(self.param_groups[0]["lr"])
            norms.append(torch.stack([p.grad.norm() for p in self.param_groups[0]["params"]]).norm().item())
            super().step()

    def watched_update(ema, model, step):
        if step == 0:
            starts.append((weights(ema), ends[-1] if ends else None))
        update_ema(ema, model, step)
        ends.append(weights(model))

    class Small(torch.nn.Module):
        def __init__(self, **network):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 1)
            self.conv.bias.data += 30  # so wrong that its gradient must be clipped

        def forward(self, xt, t):
            return self.conv(xt)

    def watched_loss(self, model, x0):
        levels.append(127.5 * (x0[:, 0, 0, 0] + 1))
        return loss(self, model, x0)

    monkeypatch.setattr(script.Diffusion, "loss", watched_loss)
    monkeypatch.setattr(script, "UNet", Small)
    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(script, "update_ema", watched_update)
    images_of = {size: (10 * torch.arange(26)).byte().view(26, 1, 1, 1).expand(26, 1, size, size) for size in COST}
    diffusion, cost = script.Diffusion(script.linear_beta(10)), {8: 0.1, 16: 0.2, 32: 1.2}
    _, emas = script.race(diffusion, images_of, images_of[32], cost, settings(steps=60))
    plans = [[15], [30, 30, 8], [30], [60, 60, 15], [60], [120, 120, 30]]
    assert [len(stage) for stage in rates] == [n for plan in plans for n in plan]
    for stage in rates:
        n = len(stage)
        assert stage == pytest.approx([1e-3 * min(30 * (i + 1), n - i) / n for i in range(n)])
    assert max(norms) == pytest.approx(1, abs=1e-3)
    assert set((torch.cat(levels) / 10).round(decimals=3).tolist()) == set(range(26))  # every image, in [-1, 1]
    for k in (-2, -1):  # the last two stages go on from the weights before them, not from an EMA
        assert torch.equal(*starts[k])
    for ema, (start, _) in zip(emas["progressive"].values(), starts[-3:], strict=True):
        assert not torch.equal(weights(ema), start)


# main -----------------------------------------------------------------------------------------------------------------


def main(monkeypatch, tmp_path, *flags, **patches):
    """main, whose race is a record of its arguments and returns Drawers -> that record, the figures."""
    script, figures, seen = load(PATH), {}, []
    ramp = torch.linspace(-1, 1, 1024).view(1, 1, 32, 32)  # tells whether the frame is cut off evenly
    emas = {"plain": {32: Drawer(ramp)}, "progressive": {8: Drawer(-0.6), 16: Drawer(0.2), 32: Drawer(-ramp)}}

    def race(diffusion, images_of, held_out, cost, args):
        seen.append(SimpleNamespace(images_of=images_of, held_out=held_out, cost=cost, diffusion=diffusion))
        return {"plain": [(10.0, 0.3), (20.0, 0.2), (41.0, 0.1)], "progressive": [(11.0, 0.5), (21.0, 0.4)]}, emas

    def load_images(data, root):
        images = torch.randint(0, 256, (600, 1, 28, 28), generator=torch.Generator().manual_seed(1)).byte()
        images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(600) // 256, torch.arange(600) % 256  # its number
        return images, data

    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.update({path.name: figure}))
    for name, value in (dict(race=race, load_images=load_images) | patches).items():
        monkeypatch.setattr(script, name, value)
    script.main(["--T", "10", "--out", str(tmp_path), *flags])
    return seen[0], figures, ((ramp + 1) * 127.5).round().byte()[0, 0, 2:30, 2:30].numpy()


def test_images_are_framed_and_made_small_and_none_that_judges_is_trained_on(monkeypatch, tmp_path):
    numbers = []
    for seed in ("3", "4"):
        seen, *_ = main(monkeypatch, tmp_path, "--smoke", "--seed", seed)
        full, held_out = seen.images_of[32], seen.held_out
        assert list(seen.images_of) == [8, 16, 32] and full.shape == (500, 1, 32, 32) and len(held_out) == 100
        frame = torch.ones(32, 32, dtype=torch.bool)
        frame[2:30, 2:30] = False
        for images in (full, held_out):
            assert images.dtype == torch.uint8 and not images[:, 0, frame].any()
            assert 120 < images[:, :, 3:30, 2:30].float().mean() < 135
        for size in (8, 16):
            k, small = 32 // size, seen.images_of[size]
            means = full.float().view(500, 1, size, k, size, k).mean((3, 5))
            assert small.dtype == torch.uint8 and (small.float() - means).abs().max() <= 0.5
        numbers.append([set((256 * x[:, 0, 2, 2].int() + x[:, 0, 2, 3]).tolist()) for x in (full, held_out)])
    assert numbers[0] == numbers[1] and numbers[0][0] | numbers[0][1] == set(range(600))


def test_the_clock_plans_except_for_smoke(monkeypatch, tmp_path):
    def measured(diffusion, images, args):
        assert diffusion.T == 10
        return images.shape[-1] / 100

    smoke, *_ = main(monkeypatch, tmp_path, "--smoke", seconds_per_step=measured)
    assert smoke.cost == {8: 1, 16: 1, 32: 1}
    true, *_ = main(monkeypatch, tmp_path, "--samples", "4", seconds_per_step=measured)
    assert true.cost == {8: 0.08, 16: 0.16, 32: 0.32}


def test_each_stage_draws_at_its_size_in_50_steps_with_eta_1(monkeypatch, tmp_path):
    """From noise of the same seed each time."""
    script, seen = load(PATH), []

    def ddim_sample(self, model, shape, S, eta=0.0):
        seen.append((model.c, shape, S, eta, torch.randn(1).item()))
        return torch.zeros(shape)

    monkeypatch.setattr(script.Diffusion, "ddim_sample", ddim_sample)
    main(monkeypatch, tmp_path, "--smoke", "--T", "200", "--samples", "3", "--seed", "7")
    torch.manual_seed(7)
    noise = torch.randn(1).item()
    assert [seen[0][0], seen[1][0]] == [-0.6, 0.2]
    shapes = [(8, 1, 8, 8), (8, 1, 16, 16), (8, 1, 32, 32), (3, 1, 32, 32), (3, 1, 32, 32)]
    assert [call[1:] for call in seen] == [(shape, 50, 1, noise) for shape in shapes]


def test_what_is_drawn_by_which_network(monkeypatch, tmp_path):
    _, figures, ramp = main(monkeypatch, tmp_path, "--smoke", "--samples", "5")
    for way, expected in (("plain", ramp), ("progressive", 255 - ramp)):
        samples = np.load(tmp_path / f"samples_{way}.npz")["arr_0"].astype(int)
        assert samples.shape == (5, 28, 28, 1)
        assert np.abs(samples[..., 0] - expected).max() <= 1

    [axes] = figures["race.png"].axes
    lines = [(*np.array(line.get_data()).tolist(), line.get_label(), line.get_color()) for line in axes.lines]
    assert lines == [
        ([10, 20, 41], [0.3, 0.2, 0.1], "plain", "#0072B2"), ([11, 21], [0.5, 0.4], "progressive", "#D55E00"),
    ]  # fmt: skip
    assert "seconds" in axes.get_xlabel() and axes.get_legend() is not None

    stages = np.asarray(Image.open(tmp_path / "stages.png").convert("L")).astype(int)
    assert stages.shape == (3 * 66 + 2, 8 * 66 + 2)  # eight images of each stage, the smallest size above
    assert abs(stages[34, 34] - 51) <= 1 and abs(stages[100, 34] - 153) <= 1
    assert np.abs(stages[134:198, 2:66][::2, ::2][2:30, 2:30] - (255 - ramp)).max() <= 1
    for way in ("plain", "progressive"):
        assert torch.load(tmp_path / f"model_{way}.pt")["settings"]["samples"] == 5
