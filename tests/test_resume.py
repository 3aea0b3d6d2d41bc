"""--resume: an interrupted run goes on exactly where it was."""
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, having, load

FLAGS = ["--smoke", "--steps", "60", "--seed", "2"]  # a checkpoint every 2 steps; an epoch has 8


def same(a, b):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@having("restore")
def test_a_run_killed_twice_and_resumed_equals_the_run_without_a_break(script, tmp_path):
    """Bit for bit: weights, EMA, losses, samples. The breaks fall within an epoch."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert script.main([*FLAGS, "--out", str(whole)]) is None
    done = []  # steps in the checkpoint after each kill -9
    for flags in (FLAGS, [*FLAGS, "--resume"]):
        command = [sys.executable, "-u", str(ROOT / script.path), *flags, "--out", str(pieces)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            for _ in range(3):
                while "checkpoint.pt" not in (line := process.stdout.readline()):
                    assert line, "the script has ended"
            process.send_signal(signal.SIGKILL)
        done.append(len(torch.load(pieces / "checkpoint.pt", weights_only=True)["losses"]))
    assert 6 <= done[0] < done[1] < 60
    script.main(["--smoke", "--resume", "--out", str(pieces)])  # flags that are left out are those of the run
    for name in ("model.pt", "samples.png", "denoising.png", "loss.png", "preview.png"):
        assert (pieces / name).read_bytes() == (whole / name).read_bytes(), name
    assert same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, pieces)))


@having("restore")
def test_a_finished_run_resumed_draws_again(script, tmp_path):
    flags = ["--smoke", "--out", str(tmp_path)]
    script.main(flags)
    before = (tmp_path / "samples.png").read_bytes()
    script.main([*flags, "--resume"])
    assert (tmp_path / "samples.png").read_bytes() == before


@having("load_resumed")
@pytest.mark.parametrize("changes", [{"--lr": "0.5"}, {"--seed": "3", "--steps": "9", "--variance": "beta_tilde"}])
def test_other_settings_are_told_and_stop_the_run(script, changes, tmp_path, capsys):
    script.main(["--smoke", "--out", str(tmp_path)])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(["--smoke", "--resume", "--out", str(tmp_path), *sum(changes.items(), ())])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for flag, value in changes.items():
        assert f"{flag[2:]} was " in error and f" now {value}" in error
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@having("load_resumed")
@pytest.mark.parametrize("content", [None, b"", b"half a checkpoint"])
def test_nothing_to_resume_is_one_line(script, content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        script.main(["--smoke", "--resume", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "checkpoint.pt" in error


@having("save_checkpoint")
def test_a_checkpoint_cut_off_in_the_writing_leaves_the_one_before(script, tmp_path, monkeypatch):
    """A write that dies half way: what stands under the name is whole, and the run can be resumed."""
    flags = ["--smoke", "--steps", "6", "--out", str(tmp_path)]
    save = torch.save

    def die(state, path):
        if len(state["losses"]) == 4:
            path.write_bytes(b"half")
            raise OSError("killed")
        save(state, path)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(load(script.path).torch, "save", die)
        script.main(flags)
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 2
    script.main([*flags, "--resume"])
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]) == 6
