"""ddpm_cifar.py, stopped and resumed: bit for bit the run that nothing happened to."""
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import CIFAR, ROOT, load, one_line

FLAGS = ["--smoke", "--steps", "40", "--device", "cpu", "--seed", "5"]
FILES = ["samples.png", "loss.png", "preview.png"]


def same(a, b):
    """Nested dicts, lists and tensors that are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def start(*flags):
    command = [sys.executable, str(ROOT / CIFAR), *map(str, flags)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=hear)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, "the script has ended"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without a break."""
    folder = tmp_path_factory.mktemp("whole")
    load(CIFAR).main([*FLAGS, "--out", str(folder)])
    return folder


def test_a_stopped_run_goes_on_to_the_same_bits(whole, tmp_path):
    """After kill -9 it goes on from the last checkpoint; after a Ctrl-C, at which it samples, from that step."""
    checkpoint, done = tmp_path / "checkpoint.pt", []
    for how, flags in ((signal.SIGKILL, FLAGS), (signal.SIGINT, [*FLAGS, "--resume"])):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        with start(*flags, "--out", tmp_path) as process:
            wait_for(lambda before=before: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before, process)
            time.sleep(random.random() / 20)
            process.send_signal(how)
        assert process.returncode == (0 if how == signal.SIGINT else -signal.SIGKILL)
        assert bool((tmp_path / "samples.png").stat().st_size) == (how == signal.SIGINT)
        done.append(len(torch.load(checkpoint, weights_only=True)["losses"]))
    assert 2 <= done[0] < done[1] <= 40
    load(CIFAR).main(["--smoke", "--resume", "--out", str(tmp_path)])  # flags left out are those of the run
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, tmp_path)))


def test_a_finished_run_resumed_draws_again_and_a_checkpoint_can_be_loaded(whole, tmp_path):
    before = {name: (whole / name).read_bytes() for name in FILES}
    load(CIFAR).main(["--smoke", "--resume", "--out", str(whole)])
    assert {name: (whole / name).read_bytes() for name in FILES} == before
    load(CIFAR).main(["--load", str(whole / "checkpoint.pt"), "--out", str(tmp_path)])
    assert (tmp_path / "samples.png").read_bytes() == before["samples.png"]


def test_a_finished_run_can_be_made_longer(tmp_path, monkeypatch):
    """The learning rate then falls from where a run of 12 steps has it after 6, and the loss curve has all 12."""
    script, rates = load(CIFAR), []

    class Recorder(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(script.torch.optim, "AdamW", Recorder)
    flags = ["--smoke", "--lr", "1", "--out", str(tmp_path)]
    script.main([*flags, "--steps", "6"])
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    script.main([*flags, "--steps", "12", "--resume"])
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert rates[:6] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates[6:] == pytest.approx([6 / 12, 5 / 12, 4 / 12, 3 / 12, 2 / 12, 1 / 12])
    assert torch.equal(after["losses"][:6], before) and len(after["losses"]) == after["settings"]["steps"] == 12


def test_other_settings_stop_the_run(whole, capsys):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    for flag, value, why in (("--lr", "0.5", "--lr was "), ("--seed", "3", "--seed was "), ("--steps", "39", "40 and")):
        error = one_line(CIFAR, ["--smoke", "--resume", "--out", whole, flag, value], capsys)
        assert flag in error and why in error and value in error
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


@pytest.mark.parametrize("path", [CIFAR, "paper/ddpm_paper.py"])
def test_a_run_goes_on_with_its_own_data_or_not_at_all(path, tmp_path, monkeypatch, capsys):
    """CIFAR-10 cannot be had, and load_images returns the photos: a run that began with CIFAR-10 is left alone."""
    script, checkpoint = load(path), tmp_path / "checkpoint.pt"
    script.main(["--smoke", "--out", str(tmp_path)])
    saved = torch.load(checkpoint, weights_only=True)
    saved["settings"]["data"] = "cifar10"
    torch.save(saved, checkpoint)
    before, photos = checkpoint.read_bytes(), script.load_images("photos", "nowhere")
    monkeypatch.setattr(script, "load_images", lambda *_: photos)
    assert "cifar10" in one_line(path, ["--smoke", "--resume", "--steps", "60", "--out", tmp_path], capsys)
    assert checkpoint.read_bytes() == before


def test_nothing_to_resume_is_one_line(whole, tmp_path, capsys):
    """Nor is a model.pt: it has no optimiser."""
    for content in (None, b"half a checkpoint", (whole / "model.pt").read_bytes()):
        if content is not None:
            (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "checkpoint.pt" in one_line(CIFAR, ["--smoke", "--resume", "--out", tmp_path], capsys)


def test_a_checkpoint_cut_off_in_the_writing_leaves_the_one_before(tmp_path, monkeypatch):
    """A write that dies half way: what stands under the name is whole, and the run can be resumed."""
    flags = ["--smoke", "--steps", "6", "--out", str(tmp_path)]
    save = torch.save

    def die(state, path):
        if len(state.get("losses", ())) == 4:
            path.write_bytes(b"half")
            raise OSError("killed")
        save(state, path)

    usual = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(load(CIFAR).torch, "save", die)
        load(CIFAR).main(flags)
    signal.signal(signal.SIGINT, usual)
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 2
    load(CIFAR).main([*flags, "--resume"])
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 6


def test_what_a_step_draws_depends_on_its_number_alone(tmp_path, monkeypatch):
    """Whatever has been drawn before: the batch, the flips, t and the noise of steps 3 and 4 are the same."""
    script, seen = load(CIFAR), []

    def fresh(*flags):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(script.UNet, "forward", lambda self, xt, t: seen.append((xt, t)) or xt * self.first.bias[0])
            patch.setattr(script.Diffusion, "sample", lambda self, model, shape, **_: torch.rand(shape))
            script.main(["--smoke", "--out", str(tmp_path), *flags])
        return list(seen)

    long = fresh("--steps", "5")
    torch.randn(99)
    again = fresh("--steps", "5")
    assert len(long) == 5 and same(long, again)
    assert not torch.equal(long[0][0], long[1][0]) and not torch.equal(fresh("--seed", "1")[0][0], long[0][0])
