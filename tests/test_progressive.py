"""progressive_training.py: sizes, the plan of equal time, weights that carry over."""
import argparse

import pytest
import torch
from conftest import load

SCRIPT = "paper/progressive_training.py"


def test_resized_is_the_mean_of_squares():
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    framed, small = (load(SCRIPT).resized(images, size) for size in (32, 8))
    assert torch.equal(framed[:, :, 2:30, 2:30], images) and framed[:, :, :2].sum() == framed[:, :, 30:].sum() == 0
    means = framed.float().view(5, 1, 8, 4, 8, 4).mean((3, 5))
    assert small.shape == (5, 1, 8, 8) and (small.float() - means).abs().max() <= 0.5
    colour = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(load(SCRIPT).resized(colour, 32), colour)


def test_the_plan_takes_the_same_time():
    cost = {8: 0.01, 16: 0.02, 32: 0.08}
    stages = load(SCRIPT).plan(600, cost)
    assert [size for size, _ in stages] == [8, 16, 32]
    seconds = [steps * cost[size] for size, steps in stages]
    assert sum(seconds) == pytest.approx(600 * 0.08, rel=0.01)
    assert seconds == pytest.approx([8, 16, 24], rel=0.01)


def smoke_settings(script):
    args = argparse.Namespace(**{**script.SETTINGS, **script.SMOKE, "lr": 1e-3}, device="cpu", smoke=True)
    args.network = {"channels": 1, **args.network}
    return args


def test_a_race_that_is_stopped_in_a_plain_run_shows_full_size_alone(monkeypatch):
    script = load(SCRIPT)
    args, images = smoke_settings(script), script.load_images("strokes", None)[0]
    images_of = {size: script.resized(images, size) for size in script.SIZES}
    monkeypatch.setattr(script, "train", lambda diffusion, model, images, args: (model, torch.zeros(0)))
    diffusion = script.Diffusion(script.linear_beta(10))
    _, emas, table, last = script.race(diffusion, images_of, lambda ema: dict(loss=0.0, FD=0.0), args)
    assert len(table) == 1 and table[0]["way"] == "plain"
    assert [(size, ema is emas["plain"]) for size, ema in last] == [(32, True)]


def test_weights_carry_over_from_size_to_size(monkeypatch):
    script = load(SCRIPT)
    args = smoke_settings(script)
    images = script.load_images("strokes", None)[0]
    images_of = {size: script.resized(images, size) for size in script.SIZES}
    train, seen = script.train, []

    def watched(diffusion, model, images, args):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        result = train(diffusion, model, images, args)
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        seen.append((images.shape[-1], len(result[1]), before, after))
        return result

    monkeypatch.setattr(script, "train", watched)
    stages = [(8, 5), (16, 3), (32, 2)]
    _, emas, _, stopped = script.train_in_stages(script.Diffusion(script.linear_beta(10)), stages, images_of, args)
    assert [(size, steps) for size, steps, _, _ in seen] == stages and len(emas) == 3 and not stopped
    for (_, _, _, end), (_, _, start, _) in zip(seen, seen[1:], strict=False):
        assert torch.equal(start, end)
    assert not torch.equal(seen[0][2], seen[0][3])
