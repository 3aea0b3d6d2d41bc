"""Each script as its user meets it: --smoke, --load, wrong input, Ctrl-C, a loss that is no number."""
import os
import pickle
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR, MNIST, ROOT, SCRIPTS, load, one_line
from PIL import Image

TRAIN = [script for script in SCRIPTS if not script.endswith("fid_is.py")]
TIMED = {"race.png"}  # pictures whose axis is the clock

each_script = pytest.mark.parametrize("path", TRAIN, ids=[Path(s).stem for s in TRAIN])


def content(path):
    """What must be equal from run to run: of an archive (with time stamps in it) what it holds, else the bytes."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {name: (arrays[name].shape, arrays[name].tobytes()) for name in arrays.files}
    return plain(torch.load(path, weights_only=True)) if path.suffix == ".pt" else path.read_bytes()


def plain(saved):
    """The contents of a .pt file with tensors as lists, so that == compares them."""
    if isinstance(saved, dict):
        return {name: plain(value) for name, value in saved.items()}
    return saved.tolist() if isinstance(saved, torch.Tensor) else saved


def read(folder):
    return {path.name: content(path) for path in folder.iterdir() if path.name not in TIMED}


PROGRAMS = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv[:] = [path, "--smoke", "--seed", "3"]
    runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("paths", [TRAIN[:4], TRAIN[4:]], ids=["first four", "last four"])
def test_smoke_twice_gives_the_same_files_and_load_the_same_samples(paths, tmp_path, capsys):
    """First as programs, without a terminal, in a new folder: one after the other, since Python takes long to start."""
    command = [sys.executable, "-c", PROGRAMS, *(str(ROOT / path) for path in paths)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {Path(path).stem for path in paths}
    for path in paths:
        folder = f"runs/{Path(path).stem}/smoke"
        [last] = [line for line in done.stdout.splitlines() if line.endswith(f": {folder}")]
        assert " s" in last
        check_files(path, tmp_path / folder, tmp_path / Path(path).stem, capsys)


def check_files(path, first, folder, capsys):
    """The files in `first` are of the right form; the same seed gives them again, and so does --load."""
    load(path).main(["--smoke", "--seed", "3", "--out", str(folder / "second")])
    files = read(first)
    assert files == read(folder / "second")
    archives, pictures = ([name for name in files if name.endswith(end)] for end in (".npz", ".png"))
    assert archives and pictures
    for name in archives:
        with np.load(first / name) as arrays:
            samples = arrays["arr_0"]
            assert samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)
            assert "arr_1" not in arrays or arrays["arr_1"].shape == samples.shape[:1]
    for name in pictures:
        with Image.open(first / name) as picture:
            assert min(picture.size) >= 40 and len(picture.convert("L").getcolors()) > 2, name

    # --load draws what the run drew, with the settings of that run, and leaves its files alone. A flag counts more.
    models = sorted(first.glob("model*.pt"))
    assert models
    for model in models:
        saved = torch.load(model, weights_only=True)
        assert {"network", "ema", "settings"} <= set(saved) and saved["settings"]["seed"] == 3
    source = models[0] if len(models) == 1 else first
    for seed, flags in ((3, []), (4, ["--seed", "4"])):
        load(path).main(["--load", str(source), "--out", str(folder / "loaded"), *flags])
        loaded = read(folder / "loaded")
        assert all((loaded[name] == files[name]) == (seed == 3) for name in archives)
    assert read(first) == files and not list(folder.glob("loaded/model*.pt"))
    error = one_line(path, ["--load", source, "--out", folder / "other", "--T", "11"], capsys)  # it was trained with 10
    assert "T " in error and "10" in error and "11" in error and not (folder / "other").exists()


def test_smoke_and_load_have_folders_of_their_own(tmp_path, monkeypatch):
    """So that neither overwrites a long run. In a folder where nothing has been run before."""
    monkeypatch.chdir(tmp_path)
    for flags in (["--smoke"], ["--load", "runs/ddpm_mnist/smoke/model.pt", "--smoke"]):
        load(MNIST).main(flags)
    folder = tmp_path / "runs" / "ddpm_mnist"
    assert {path.name for path in folder.iterdir()} == {"smoke", "loaded"}
    assert content(folder / "smoke" / "samples.npz") == content(folder / "loaded" / "samples.npz")


BAD = [
    ["--T", "0"], ["--T", "-5"], ["--T", "ten"], ["--T", str(10**13)], ["--steps", "0"], ["--batch-size", "0"],
    ["--batch-size", "2.5"], ["--lr", "nan"], ["--lr", "0"], ["--lr", "inf"], ["--samples", "0"],
    ["--samples", str(10**11)], ["--seed", "-1"], ["--seed", "100000000000000000000"], ["--device", "abacus"],
    ["--device", "meta:7x"], ["--data", "cats"], ["--variance", "none"], ["--no-such-flag"],
    ["--load", "{here}/missing.pt"], ["--load", "{here}/text.pt"], ["--load", "{here}/empty.pt"],
    ["--load", "{here}/pickle.pt"], ["--load", "{here}/other.pt"], ["--load", "{here}/colour.pt"], ["--load", "{here}"],
    ["--out", "{here}/text.pt/folder"], ["--out", "{here}/taken"],
]  # fmt: skip
FEW = [["--T", "0"], ["--lr", "nan"], ["--device", "abacus"], ["--load", "{here}/pickle.pt"]]
FEW += [["--out", "{here}/text.pt/x"]]


@each_script
def test_wrong_input_is_one_line_and_exit_2(path, tmp_path, capsys):
    """Nothing is written, and no file is touched; in full on the first script, a few cases on the others."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    network = load(CIFAR).SMOKE["network"]
    ema = load(CIFAR).UNet(**network).state_dict()
    torch.save({"network": network, "ema": ema, "settings": {"T": 10}}, tmp_path / "colour.pt")
    (tmp_path / "taken" / "samples.png").mkdir(parents=True)
    before = {path.name for path in tmp_path.iterdir()}
    for flags in BAD if path == MNIST else FEW:
        out = [] if "--out" in flags else ["--out", tmp_path / "out"]
        error = one_line(path, ["--smoke", *out, *(flag.format(here=tmp_path) for flag in flags)], capsys)
        assert flags[0] in error and len(error) < 500, (flags, error)
        assert {path.name for path in tmp_path.iterdir()} - {"out"} == before, flags
        assert not [path for path in tmp_path.glob("out/*") if path.stat().st_size], flags


@pytest.mark.parametrize("path", [MNIST, CIFAR], ids=["ddpm_mnist", "ddpm_cifar"])
def test_a_loss_that_is_no_number_stops_the_run_with_its_cause(path, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load(path).main(["--smoke", "--steps", "50", "--lr", "1e6", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model.pt").exists()


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    """ddpm_cifar.py's Ctrl-C is in test_resume.py."""
    command = [sys.executable, str(ROOT / MNIST), "--smoke", "--steps", "1000000", "--out", str(tmp_path)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background are born deaf to Ctrl-C
    bars = os.environ | {"TQDM_DISABLE": ""}  # the first loss is read from the bar, even where bars are switched off
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes, preexec_fn=hear, env=bars) as process:
        seen = b""
        while b"loss=" not in seen:
            seen += process.stderr.read1(100)
            assert process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert b"Stopped after" in out
    assert {p.name for p in tmp_path.iterdir()} >= {"samples.png", "samples.npz", "loss.png", "model.pt"}
