"""What each recipe does to the optimiser, the weights and the images, watched while main runs."""

import math

import numpy as np
import pytest
import torch
from conftest import CIFAR, MNIST, TRAIN, OneConvolution, first_of, having, load

PAPER = "paper/ddpm_paper.py"
STEPS = 60  # of the watched runs: enough for a warm-up of a thirtieth


class Watch:
    """Runs a script's main with a small network and writes down what happens in its trainings.

    runs: one record for each optimiser, in their order.
    """

    def __init__(self, path, monkeypatch, tmp_path, *flags, scale=1.0):
        self.runs = []
        self.script = load(path)
        watch = self
        for name in ("Adam", "AdamW"):
            watched = self.watched(getattr(torch.optim, name))
            monkeypatch.setattr(self.script.torch.optim, name, watched)
        usual = self.script.Diffusion.loss

        def loss(diffusion, model, x0):
            if torch.is_grad_enabled() and watch.runs:
                watch.runs[-1]["x0"].append(x0.detach().clone())
            return scale * usual(diffusion, model, x0)

        monkeypatch.setattr(self.script.Diffusion, "loss", loss)
        self.out = tmp_path
        self.script.main(["--smoke", "--out", str(tmp_path), *map(str, flags)])

    def watched(self, usual):
        runs = self.runs

        class Watched(usual):
            def __init__(self, parameters, *args, **options):
                super().__init__(parameters, *args, **options)
                first = self.param_groups[0]["params"][0]
                self.run = dict(kind=usual.__name__, rates=[], norms=[], weights=[], x0=[])
                self.run.update(zeroed=0, start=first.detach().clone())
                runs.append(self.run)

            def zero_grad(self, *args, **options):
                self.run["zeroed"] += 1
                super().zero_grad(*args, **options)

            def step(self, *args, **options):
                [group] = self.param_groups
                grads = [p.grad.flatten() for p in group["params"] if p.grad is not None]
                self.run["rates"].append(float(group["lr"]))
                self.run["norms"].append(torch.cat(grads).norm().item())
                self.run["group"] = {key: group[key] for key in ("betas", "eps", "weight_decay")}
                assert group["fused"]
                assert self.run["zeroed"] == len(self.run["rates"]), "zeroed once in each step"
                super().step(*args, **options)
                self.run["weights"].append(group["params"][0].detach().clone())

        return Watched


def first_weight(model_file):
    """The first parameter of the averaged network in a model.pt."""
    return next(iter(torch.load(model_file, weights_only=True)["ema"].values()))


def ema_of(run):
    """What the average of a run's weights must be, by the formula."""
    ema = run["start"].clone()
    for k, weight in enumerate(run["weights"]):
        decay = min(0.9999, (1 + k) / (10 + k))
        ema = decay * ema + (1 - decay) * weight
    return ema


def expected_rate(path, k, steps):
    if path == PAPER:
        warm_up = load(PAPER).SMOKE["warm_up"]
        return min(1, (k + 1) / warm_up)
    return min(30 * (k + 1) / steps, 1 - k / steps)


@first_of(TRAIN)
def test_the_optimiser_does_what_the_recipe_says(path, monkeypatch, tmp_path):
    """Each training: rates from the first step to the last, betas, eps, clipping by the norm.

    A loss a million times too large must be clipped to a gradient of norm 1 exactly.
    """
    watch = Watch(path, monkeypatch, tmp_path, "--steps", STEPS, "--lr", "0.001", scale=1e6)
    assert watch.runs
    for run in watch.runs:
        steps = len(run["rates"])
        by_diffusion = bool(run["x0"])  # and not a classifier, which has a recipe of its own
        if by_diffusion:
            expected = [0.001 * expected_rate(path, k, steps) for k in range(steps)]
            assert run["rates"] == pytest.approx(expected)
            assert max(run["norms"]) == pytest.approx(1, abs=1e-3)
            assert len(run["x0"]) == steps
        assert max(run["norms"]) < 1.001
        if path == PAPER:
            assert run["kind"] == "Adam" and run["group"]["betas"] == (0.9, 0.999)
        else:
            assert run["kind"] == "AdamW" and run["group"]["betas"] == (0.9, 0.95)
        assert run["group"]["eps"] == 1e-8
    if len(watch.runs) == 1:
        assert len(watch.runs[0]["rates"]) == STEPS


@first_of(TRAIN)
def test_the_average_of_the_weights_is_saved(path, monkeypatch, tmp_path):
    """model.pt holds the EMA of one of the run's trainings, and not the last raw weights."""
    watch = Watch(path, monkeypatch, tmp_path, "--steps", 12, "--lr", "0.01")
    files = sorted(tmp_path.glob("model*.pt"))
    assert files
    for file in files:
        saved = first_weight(file)
        averages = [ema_of(run) for run in watch.runs if run["start"].shape == saved.shape]
        assert any(torch.allclose(saved, average, atol=1e-5) for average in averages), file.name
        assert not any(torch.allclose(saved, run["weights"][-1], atol=1e-5) for run in watch.runs)


@first_of(TRAIN)
def test_the_seed_decides_weights_batches_and_samples(path, monkeypatch, tmp_path):
    """The same seed gives the same run, another one other weights, batches and samples."""

    def one(seed, folder):
        with monkeypatch.context() as patch:
            flags = ["--steps", 3, "--batch-size", 5, "--seed", seed]
            watch = Watch(path, patch, tmp_path / folder, *flags)
        samples = [np.load(file)["arr_0"] for file in sorted(watch.out.glob("*.npz"))]
        return [run for run in watch.runs if run["x0"]], samples

    runs, samples = one(1, "a")
    again, samples_again = one(1, "b")
    others, other_samples = one(2, "c")
    assert runs and samples
    for run, same, other in zip(runs, again, others, strict=True):
        assert torch.equal(run["start"], same["start"])
        assert not torch.equal(run["start"], other["start"])
        assert all(map(torch.equal, run["x0"], same["x0"]))
        assert not any(map(torch.equal, run["x0"], other["x0"]))
        assert all(len(x0) == 5 for x0 in run["x0"])
        if len(run["x0"]) > 1:  # a stage of progressive_training.py may be one training step
            assert not torch.equal(run["x0"][0], run["x0"][1])
    for found, same, other in zip(samples, samples_again, other_samples, strict=True):
        assert np.array_equal(found, same) and not np.array_equal(found, other)


@first_of(TRAIN)
def test_the_network_sees_pixels_in_minus_one_to_one(path, monkeypatch, tmp_path):
    """Grey level k of 0...255 as k / 127.5 - 1, in batches (B, C, H, W) of float32."""
    watch = Watch(path, monkeypatch, tmp_path, "--steps", 8, "--batch-size", 16)
    for run in watch.runs:
        for x0 in run["x0"]:
            assert x0.dtype == torch.float32 and x0.ndim == 4 and len(x0) == 16
            level = (x0 + 1) * 127.5
            assert torch.allclose(level, level.round(), atol=1e-3)
            assert x0.min() >= -1 and x0.max() <= 1
        if run["x0"]:
            everything = torch.cat(run["x0"])
            assert everything.max() > 0.5 and (path in (CIFAR, PAPER) or everything.min() == -1)


# The functions themselves -----------------------------------------------------------------------


@having("lr_factor")
def test_lr_factor_rises_for_a_thirtieth_and_falls_to_zero(script):
    factors = [script.lr_factor(step, 300) for step in range(300)]
    assert factors[0] == pytest.approx(0.1) and factors[4] == pytest.approx(0.5)
    assert factors[9] == pytest.approx(291 / 300) and factors[-1] == pytest.approx(1 / 300)
    assert factors.index(max(factors)) == 9
    assert script.lr_factor(0, 1) == 1


@having("update_ema")
def test_ema_is_a_weighted_mean_that_forgets_its_start(script):
    """From 100 (the random start) with the model at 1 ever after: what is left of the start is
    the product of the decays.
    """
    ema = torch.nn.Linear(1, 1).requires_grad_(False)
    model = torch.nn.Linear(1, 1).requires_grad_(False)
    ema.weight.fill_(100)
    model.weight.fill_(1)
    for step in range(1000):
        script.update_ema(ema, model, step)
    left = math.prod((1 + step) / (10 + step) for step in range(1000))
    assert ema.weight.item() == pytest.approx(1 + 99 * left, rel=1e-5) and left < 1e-15
    ema.weight.fill_(100)
    script.update_ema(ema, model, 10**9)
    assert ema.weight.item() == pytest.approx(1 + 99 * 0.9999, rel=1e-6)


@having("train")
def test_every_image_is_as_likely_as_any_other(script):
    """x_0 ~ q(x_0): 18 images, each of one grey level, in 50 batches of 36."""
    levels = torch.arange(0, 256, 15).byte()
    images = levels.view(18, 1, 1, 1).expand(18, 1, 4, 4)
    seen = []

    class Recorder(script.Diffusion):
        def loss(self, model, x0):
            seen.append(x0)
            return super().loss(model, x0)

    torch.manual_seed(0)
    diffusion = Recorder(script.linear_beta(10))
    script.train(diffusion, OneConvolution(1), images, 50, 36, 1e-3)
    k = (torch.stack(seen)[:, :, 0, 0, 0] + 1) * 127.5
    counts = (k / 15).round().long().flatten().bincount(minlength=18)
    assert (counts - 100).abs().max() < 4.5 * math.sqrt(1800 / 18 * 17 / 18)
    assert len({tuple(batch.tolist()) for batch in k}) == 50  # no batch comes twice


@having("train")
def test_a_small_network_learns_diagonals(script):
    """In seconds; the same seed gives the same weights; the EMA is not the last weights."""
    images = torch.stack([255 * torch.eye(16).roll(i) for i in range(16)])[:, None].byte()
    diffusion = script.Diffusion(script.linear_beta(10))

    def learn():
        torch.manual_seed(1)
        model = script.UNet(1, [16, 16], 1)
        return model, *script.train(diffusion, model, images, 80, 16, 2e-3)

    model, ema, losses = learn()
    assert losses.shape == (80,) and losses[-20:].mean() < 0.5 * losses[:5].mean()
    pairs = zip(ema.parameters(), model.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.training
    _, again, losses_again = learn()
    assert torch.equal(losses_again, losses)
    assert all(map(torch.equal, again.parameters(), ema.parameters()))


@having("train")
def test_each_loss_is_the_one_of_its_step(script):
    """Losses 0, 1, 2, ... come back in their order, unscaled and without a gradient."""
    count = iter(range(100))

    class Counter(script.Diffusion):
        def loss(self, model, x0):
            return 0 * super().loss(model, x0) + next(count)

    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    diffusion = Counter(script.linear_beta(10))
    _, losses = script.train(diffusion, OneConvolution(1), images, 7, 2, 1e-3)
    assert losses.tolist() == list(range(7)) and not losses.requires_grad


@having("flip")
def test_flip_mirrors_half_of_the_images(script):
    x0 = torch.rand(4000, 3, 2, 5)
    torch.manual_seed(0)
    got = script.flip(x0)
    same, mirrored = ((got == x).flatten(1).all(1) for x in (x0, x0.flip(3)))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum().item() - 2000) < 4.5 * math.sqrt(4000 / 4)


def test_digits_are_never_mirrored(monkeypatch, tmp_path):
    """Every image that the network sees is one of the data set, as it stands there."""
    watch = Watch(MNIST, monkeypatch, tmp_path, "--steps", 5)
    images, _ = load(MNIST).load_mnist("mnist5k", None)
    known = {image.numpy().tobytes() for image in images}
    for x0 in watch.runs[0]["x0"]:
        levels = ((x0 + 1) * 127.5).round().byte()
        assert all(level.numpy().tobytes() in known for level in levels)
