"""The path of a GPU without a GPU: the meta device refuses to meet tensors of another device, as
CUDA does, and whatever waits for it can be counted. Where there is CUDA or MPS, --smoke runs there.
"""

import ast
import contextlib
import inspect

import pytest
import torch
from conftest import SCRIPTS, TRAIN, definitions, each, load, run

TRAINERS = ("train", "train_conditional", "train_resumable", "train_distributed", "train_network")


@pytest.fixture
def waits(monkeypatch):
    """A list that grows whenever the program waits for the device."""
    seen = []
    answers = {"item": lambda self: 0.5, "cpu": lambda self: self, "tolist": lambda self: []}
    for name, answer in answers.items():
        usual = getattr(torch.Tensor, name)

        def patched(self, usual=usual, name=name, answer=answer):
            if self.device.type != "meta":
                return usual(self)
            seen.append(name)
            return answer(self)

        monkeypatch.setattr(torch.Tensor, name, patched)
    for name in ("Adam", "AdamW"):  # there are no fused kernels for meta
        usual = getattr(torch.optim, name)

        def unfused(*args, usual=usual, fused, **options):
            return usual(*args, **options)

        monkeypatch.setattr(torch.optim, name, unfused)
    monkeypatch.setattr(torch, "save", lambda *args: None)
    return seen


@each([path for path in SCRIPTS if "train" in definitions(path)][:1])
def test_training_stays_on_the_device(path, waits, monkeypatch):
    """Nothing waits in a training step: one .item() in fifty steps, and the losses at the end."""
    script, meta = load(path), torch.device("meta")
    monkeypatch.setattr(script, "autocast", lambda device: contextlib.nullcontext())
    model = script.UNet(**script.SMOKE["unet"]).to(meta)
    images = torch.zeros(20, 1, 32, 32, dtype=torch.uint8, device=meta)
    diffusion = script.Diffusion(script.linear_beta(10), meta)
    ema, losses = script.train(diffusion, model, images, 60, 4, 1e-3)
    assert losses.shape == (60,) and {p.device.type for p in ema.parameters()} == {"meta"}
    assert waits.count("item") == 1 and len(waits) == 2


@each(TRAIN)
def test_sampling_stays_on_the_device(path, waits):
    script, meta = load(path), torch.device("meta")
    options = dict(script.SMOKE["unet"])
    model = script.UNet(**options).to(meta)
    diffusion = script.Diffusion(script.linear_beta(10), meta)
    shape = (6, options.get("channels", 3), 32, 32)
    labels = torch.zeros(6, dtype=torch.long, device=meta)

    def network(xt, t):
        return model(xt, t, labels) if "classes" in options else model(xt, t)

    if hasattr(diffusion, "sample"):
        assert diffusion.sample(network, shape).device == meta
    if hasattr(diffusion, "ddim_sample"):
        assert diffusion.ddim_sample(network, shape, 5, eta=0.5).device == meta
    if hasattr(diffusion, "bound"):
        diffusion.bound(network, torch.zeros(shape, device=meta))
    assert not waits


@each(TRAIN)
def test_a_trainer_is_one_of_those_known(path):
    """A training loop with a new name would be missed by the tests of training: add it there."""
    found = [name for name in definitions(path) if name.startswith("train")]
    assert found and set(found) <= set(TRAINERS)
    for name in found:
        code = ast.unparse(ast.parse(inspect.getsource(getattr(load(path), name))))
        assert code.count(".item()") <= 1 and "set_postfix" in code


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_smoke_on_the_real_device(device, tmp_path):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} here")
    for path in SCRIPTS:
        done = run(path, "--smoke", "--device", device, "--out", tmp_path / path.split("/")[-1])
        assert done.returncode == 0, done.stderr
