"""The path of a GPU without a GPU: the meta device refuses to meet tensors of another device, as CUDA does.

(The scripts of guidance have such a test in test_guidance.py.) Where there is CUDA or MPS, --smoke runs there.
"""
import argparse
import contextlib
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, load, run

UNLABELLED = [
    "pytorch_lowlevel/ddpm_mnist.py", "pytorch_lowlevel/ddpm_cifar.py", "paper/ddim_sampling.py",
    "paper/cosine_schedule.py", "paper/progressive_training.py", "paper/ddpm_paper.py",
]  # fmt: skip


@pytest.fixture
def waits(monkeypatch):
    """A list that grows whenever the program waits for the device. On the meta device there is nothing to wait for."""
    seen = []
    for name, value in (("item", lambda self: 0.5), ("cpu", lambda self: self), ("tolist", lambda self: [])):
        usual = getattr(torch.Tensor, name)

        def patched(self, usual=usual, name=name, value=value):
            if self.device.type != "meta":
                return usual(self)
            seen.append(name)
            return value(self)

        monkeypatch.setattr(torch.Tensor, name, patched)
    for name in ("Adam", "AdamW"):
        usual = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *args, usual=usual, fused, **options: usual(*args, **options))
    monkeypatch.setattr(torch, "save", lambda *args: None)
    monkeypatch.setattr("os.replace", lambda *args: None)
    return seen


@pytest.mark.parametrize("path", UNLABELLED, ids=[Path(path).stem for path in UNLABELLED])
def test_training_and_sampling_stay_on_the_device(path, waits, tmp_path, monkeypatch):
    script, meta = load(path), torch.device("meta")
    monkeypatch.setattr(script, "autocast", lambda device: contextlib.nullcontext())
    network = {name: value for name, value in script.SMOKE["network"].items()}
    model = script.UNet(**network).to(meta)
    channels = model.first.in_channels
    images = torch.zeros(20, channels, 32, 32, dtype=torch.uint8, device=meta)
    args = argparse.Namespace(**{**script.SMOKE, "steps": 7, "batch_size": 4, "lr": 1e-3, "seed": 0, "out": tmp_path})
    vars(args).update(save_every=10**9, preview_every=10**9, warm_up=5, ranks=1)
    vars(args).update(variance="beta", data="made", schedule="linear")
    diffusion = script.Diffusion(script.linear_beta(10), meta)
    ema, losses = script.train(diffusion, model, images, args)
    assert losses.shape == (7,) and {p.device.type for p in ema.parameters()} == {"meta"}
    assert waits.count("item") == 1, "one .item() for the progress bar, none in a step"
    shape = (6, channels, 32, 32)
    waits.clear()
    if hasattr(diffusion, "sample"):
        assert diffusion.sample(ema, shape).device == meta
    if hasattr(diffusion, "ddim_sample"):
        assert diffusion.ddim_sample(ema, shape, 5, eta=0.5).device == meta
    if hasattr(diffusion, "bound"):
        diffusion.bound(ema, torch.zeros(shape, device=meta))
    assert not waits


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_smoke_on_the_real_device(device, tmp_path):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} here")
    for path in SCRIPTS:
        done = run(path, "--smoke", "--device", device, "--out", tmp_path / Path(path).stem)
        assert done.returncode == 0, done.stderr
