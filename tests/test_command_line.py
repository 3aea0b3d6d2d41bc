"""Each script as its user meets it: --smoke, --load, every flag, wrong input, Ctrl-C, NaN."""

import argparse
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CIFAR, MNIST, ROOT, SCRIPTS, TRAIN, each, first_of, load, one_line
from PIL import Image

PAPER = "paper/ddpm_paper.py"
RESUMABLE = [CIFAR, PAPER]
TIMED = {"race.png"}  # figures with a clock for an axis


def arrays(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def content(path):
    """What must be equal from run to run: of archives, whose bytes have a date, what they hold."""
    if path.suffix == ".npz":
        return {name: (array.shape, array.tobytes()) for name, array in arrays(path).items()}
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    return path.read_bytes()


def plain(saved):
    """The contents of a .pt file with tensors as lists, so that == compares them."""
    if isinstance(saved, dict):
        return {name: plain(value) for name, value in saved.items()}
    return saved.tolist() if isinstance(saved, torch.Tensor) else saved


def read(folder):
    return {p.name: content(p) for p in folder.iterdir() if p.name not in TIMED}


def source_of(folder):
    """What --load takes: the one model.pt, or the folder where a script has two networks."""
    models = sorted(folder.glob("model*.pt"))
    return models[0] if len(models) == 1 else folder


@each(TRAIN)
def test_smoke_as_a_program_in_a_new_folder(path, smoke):
    """No terminal, nothing there before: a last line that reports, and files of the right form."""
    folder = smoke(path)
    last = smoke.output(path).stdout.splitlines()[-1]
    assert last.endswith(f": runs/{Path(path).stem}/smoke")
    assert re.search(r"\d+ s\b", last) and "samples" in last
    assert "cannot be loaded" not in smoke.output(path).stdout  # it uses data that are at hand
    assert not smoke.output(path).stderr, smoke.output(path).stderr
    names = {p.name for p in folder.iterdir()}
    assert not [name for name in names if name.startswith("unfinished")]
    assert names & {"loss.png", "race.png", "schedules.png"}
    for file in folder.glob("*.npz"):
        samples = arrays(file)["arr_0"]
        assert samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)
        assert arrays(file).get("arr_1", samples).shape[0] == len(samples)
    for file in folder.glob("*.png"):
        with Image.open(file) as picture:
            assert min(picture.size) >= 40 and len(picture.convert("L").getcolors()) > 2, file


@first_of(TRAIN)
def test_the_same_seed_gives_the_same_files(path, smoke, tmp_path):
    load(path).main(["--smoke", "--seed", "3", "--out", str(tmp_path)])
    assert read(tmp_path) == read(smoke(path))


@first_of(TRAIN)
def test_load_reproduces_the_samples_and_leaves_the_run_alone(path, smoke, tmp_path):
    before = read(smoke(path))
    source = source_of(smoke(path))
    samples = [name for name in before if name.endswith(".npz")]
    count = len(arrays(smoke(path) / samples[0])["arr_0"])
    for seed, same in ((3, True), (4, False)):
        flags = ["--load", source, "--seed", seed, "--samples", count, "--out", tmp_path]
        load(path).main([str(flag) for flag in [*flags, *SAMPLING.get(path, [])]])
        found = read(tmp_path)
        assert samples and all((found[name] == before[name]) == same for name in samples)
        assert not list(tmp_path.glob("model*.pt"))
    assert read(smoke(path)) == before


SAMPLING = {}  # flags that --smoke sets and that change what --load generates
REFUSED = {  # with --load, besides --steps, --batch-size, --lr and --T
    MNIST: {"data"},
    CIFAR: {"data", "flip", "compile", "resume"},
    PAPER: {"schedule", "compile", "resume"},  # --nll uses the data
    "paper/classifier_free_guidance.py": {"data", "data_root"},
    "paper/classifier_guidance.py": set(),  # may still train the classifier
    "paper/cosine_schedule.py": set(),  # measures losses on the data
    "paper/ddim_sampling.py": set(),  # inverts images of the data
    "paper/progressive_training.py": {"data", "data_root"},
}


@first_of(TRAIN)
def test_load_takes_the_settings_of_training_from_the_file(path, smoke, tmp_path, capsys):
    source = source_of(smoke(path))
    refused = load(path).TRAINING_FLAGS
    assert set(refused) == {"steps", "batch_size", "lr", "T"} | REFUSED[path]
    for name in refused:
        flag = "--" + name.replace("_", "-")
        values = {"data": ["mnist5k"], "data_root": ["x"], "flip": [], "compile": [], "resume": []}
        if path in RESUMABLE:
            values["data"] = ["photos"]
        words = [flag, *values.get(name, ["linear"] if name == "schedule" else ["7"])]
        message = one_line(path, ["--load", source, "--out", tmp_path / "out", *words], capsys)
        assert flag in message and "--load" in message
        assert not (tmp_path / "out").exists()


@first_of(TRAIN)
def test_smoke_and_load_write_to_folders_of_their_own(path, smoke, tmp_path, monkeypatch):
    """So that neither overwrites a trained network."""
    monkeypatch.chdir(tmp_path)
    load(path).main(["--load", str(source_of(smoke(path))), "--samples", "10"])
    assert [p.name for p in (tmp_path / "runs" / Path(path).stem).iterdir()] == ["loaded"]


# Every flag -------------------------------------------------------------------------------------


def parser_of(path, monkeypatch):
    """The ArgumentParser that a script's parse_args builds."""
    found = []
    usual = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **options):
        found.append(self)
        return usual(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        load(path).parse_args(["--smoke"])
    return found[0]


@each(TRAIN)
def test_settings_come_from_flags_then_smoke_then_the_device(path, monkeypatch):
    """For each setting: the device's default, --smoke's, and a flag's value win in this order."""
    script = load(path)
    assert script.GPU.keys() == script.CPU.keys() >= script.SMOKE.keys()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that is not to be used
        args = vars(script.parse_args(["--device", "cpu"]))
    assert args.items() >= script.CPU.items()
    args = vars(script.parse_args(["--device", "cpu", "--smoke"]))
    assert args.items() >= (script.CPU | script.SMOKE).items()
    monkeypatch.setattr(script, "existing_device", torch.device)
    args = vars(script.parse_args(["--device", "cuda"]))
    assert args.items() >= script.GPU.items()
    args = vars(script.parse_args(["--device", "cuda", "--smoke"]))
    assert args.items() >= (script.GPU | script.SMOKE).items()
    for flag, value in (("steps", 7), ("batch_size", 9), ("T", 11), ("seed", 12), ("samples", 13)):
        given = ["--smoke", "--" + flag.replace("_", "-"), str(value)]
        assert vars(script.parse_args(given))[flag] == value
    assert script.parse_args(["--lr", "0.25"]).lr == 0.25
    assert script.parse_args([]).out == Path("runs", Path(path).stem)
    assert script.parse_args(["--smoke"]).out == Path("runs", Path(path).stem, "smoke")
    assert script.parse_args(["--out", "x"]).out == Path("x")


@each(TRAIN)
def test_smoke_is_quick_on_every_device(path, monkeypatch):
    """A few steps of a small network, with data that a package holds, and nothing to compile."""
    script = load(path)
    monkeypatch.setattr(script, "existing_device", torch.device)
    for device in ("cpu", "cuda"):
        args = script.parse_args(["--smoke", "--device", device])
        assert args.steps <= 10 and args.T <= 100 and max(args.unet["widths"]) <= 32
        assert args.data in ("mnist5k", "photos") and not getattr(args, "compile", False)
        for name in ("save_every", "preview_every"):  # each happens within the few steps
            assert getattr(args, name, 1) < args.steps
        assert getattr(args, "classifier_recipe", {"steps": 1})["steps"] <= 10
        assert args.samples <= 256


@each(SCRIPTS)
def test_help_prints_the_defaults_of_the_dictionaries(path, capsys):
    with pytest.raises(SystemExit) as stop:
        load(path).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for settings in (getattr(load(path), name, {}) for name in ("CPU", "GPU")):
        for name, value in settings.items():
            assert f"'{name}': {value!r}" in text, name
    if path in TRAIN:
        assert f"defaults on a CPU: {load(path).CPU}" in text
        assert f"defaults with CUDA: {load(path).GPU}" in text


@each(TRAIN)
def test_with_a_gpu_the_network_is_that_of_the_lesson(path):
    """Widths from 64 on and two blocks (DDPM's from 128 on), and a recipe for larger batches."""
    script = load(path)
    unet = script.GPU["unet"]
    widths = {CIFAR: [64, 128, 256, 512], PAPER: [128, 256, 256, 256]}.get(path, [64, 128, 256])
    assert unet["widths"] == widths and unet["blocks"] == 2
    assert unet["channels"] == script.CPU["unet"]["channels"]
    assert unet.get("attention", [1]) == [1] and unet.get("classes", 10) == 10
    assert script.GPU["batch_size"] == (128 if path in RESUMABLE else 256)
    assert script.GPU["lr"] == (2e-4 if path in RESUMABLE else 5e-4)
    assert script.GPU["steps"] >= 6000 > script.CPU["steps"]
    for name in ("T", "data", "data_root", "seed"):
        assert script.GPU[name] == script.CPU[name]


class Stub(torch.nn.Module):
    """In place of a script's UNet: writes down its calls, and has one weight to be trained."""

    calls = []

    def __init__(self, *args, **options):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt, t, y=None):
        Stub.calls.append((torch.is_grad_enabled(), xt.shape, t.clone(), xt.device))
        return self.weight + 0.1 * xt


@pytest.fixture
def calls(monkeypatch):
    """calls(path, *flags): how a script called its network in training and in sampling."""

    def of(path, *flags):
        Stub.calls = []
        with monkeypatch.context() as patch:
            patch.setattr(load(path), "UNet", Stub)
            load(path).main(["--smoke", *map(str, flags)])
        training = [call for call in Stub.calls if call[0]]
        sampling = [call for call in Stub.calls if not call[0]]
        return training, sampling

    return of


@first_of(TRAIN)
def test_steps_batch_size_and_T_are_those_of_the_flags(path, calls, tmp_path):
    training, sampling = calls(
        path, "--steps", 5, "--batch-size", 6, "--T", 12, "--samples", 10, "--out", tmp_path
    )
    times = torch.cat([t for _, _, t, _ in training + sampling])
    assert times.min() >= 1 and times.max() == 12
    assert {shape[0] for _, shape, _, _ in training} == {6}
    if not path.endswith(("cosine_schedule.py", "progressive_training.py")):
        assert len(training) == 5
    saved = torch.load(sorted(tmp_path.glob("model*.pt"))[0], weights_only=True)["settings"]
    assert saved["T"] == 12 and saved["steps"] == 5


@first_of(TRAIN)
@pytest.mark.parametrize("n", [10, 12])
def test_samples_is_the_number_of_images(path, n, calls, tmp_path):
    calls(path, "--samples", n, "--out", tmp_path)
    files = list(tmp_path.glob("*.npz"))
    assert files and all(len(arrays(file)["arr_0"]) == n for file in files)


@first_of([path for path in TRAIN if path not in RESUMABLE])
def test_data_root_is_where_mnist_is_sought(path, calls, tmp_path, monkeypatch):
    roots = []

    def download(root, *args, **options):
        roots.append(root)
        raise RuntimeError("no route to host")

    monkeypatch.setattr(load(path), "MNIST", download)
    calls(path, "--data", "mnist", "--data-root", tmp_path / "here", "--out", tmp_path)
    assert set(map(str, roots)) == {str(tmp_path / "here")}
    for file in tmp_path.glob("model*.pt"):  # what the file records is what was really used
        assert torch.load(file, weights_only=True)["settings"]["data"] == "mnist5k"


# Flags of one script or of a few: two values, files that must differ, and files that must not.
DDIM, COSINE = "paper/ddim_sampling.py", "paper/cosine_schedule.py"
FREE, CLASSIFIER = "paper/classifier_free_guidance.py", "paper/classifier_guidance.py"
PROGRESSIVE, PAPER = "paper/progressive_training.py", "paper/ddpm_paper.py"
EFFECTS = {
    (MNIST, "--variance"): (["beta"], ["beta_tilde"], ["samples.npz"], ["loss.png", "model.pt"]),
    (CIFAR, "--variance"): (["beta"], ["beta_tilde"], ["samples.npz"], ["loss.png", "model.pt"]),
    (PAPER, "--variance"): (["beta"], ["beta_tilde"], ["samples.npz"], ["loss.png", "model.pt"]),
    (CIFAR, "--flip"): (["--flip"], ["--no-flip"], ["model.pt", "samples.npz"], []),
    (PAPER, "--schedule"): (["linear"], ["cosine"], ["model.pt", "samples.npz"], []),
    (DDIM, "--clip"): (["--clip"], ["--no-clip"], ["ddim_0005.npz"], ["model.pt"]),
    (FREE, "--clip"): (["--clip"], ["--no-clip"], ["w_4.npz"], ["model.pt"]),
    (CLASSIFIER, "--clip"): (["--clip"], ["--no-clip"], ["s_4.npz"], ["model.pt"]),
    (FREE, "--sampler"): (["ddim"], ["ddpm"], ["w_4.npz"], ["model.pt"]),
    (COSINE, "--skip-last"): (["0"], ["0.5"], ["skipped_linear.npz"], ["samples_linear.npz"]),
}
# Flags with a test of their own, in this file or another.
COMMON = {"--steps", "--batch-size", "--T", "--lr", "--seed", "--samples", "--data-root", "--data"}
COMMON |= {"--load", "--smoke", "--out", "--device", "--help"}
ELSEWHERE = {
    (DDIM, "--S"): "test_ddim.py",
    (FREE, "--w"): "test_guidance.py",
    (CLASSIFIER, "--s"): "test_guidance.py",
    (CIFAR, "--resume"): "test_resume.py",
    (PAPER, "--resume"): "test_resume.py",
    (CIFAR, "--compile"): "test_resume.py",
    (PAPER, "--compile"): "test_resume.py",
    (PAPER, "--nll"): "test_paper.py",
    (PAPER, "--pretrained"): "test_paper.py",
}


@each(TRAIN)
def test_each_flag_has_a_test(path, monkeypatch):
    """A flag that a script has and these tables lack fails here."""
    actions = parser_of(path, monkeypatch)._actions
    flags = {
        action.option_strings[-1 if "--no-" not in action.option_strings[-1] else 0]
        for action in actions
    }
    known = {flag for script, flag in EFFECTS | ELSEWHERE if script == path}
    assert flags == COMMON | known


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, flag", EFFECTS, ids=[f"{Path(path).stem} {flag}" for path, flag in EFFECTS]
)
def test_a_flag_changes_what_it_should_and_nothing_else(path, flag, tmp_path):
    one, other, differ, same = EFFECTS[path, flag]
    for folder, value in (("one", one), ("other", other)):
        words = value if value[0].startswith("--") else [flag, *value]
        load(path).main(["--smoke", "--seed", "1", *words, "--out", str(tmp_path / folder)])
    found, others = read(tmp_path / "one"), read(tmp_path / "other")
    assert all(found[name] != others[name] for name in differ)
    for name in same:
        if name.endswith(".pt"):
            assert found[name]["ema"] == others[name]["ema"]
        else:
            assert found[name] == others[name]


# What is refused --------------------------------------------------------------------------------

BAD = [
    ["--T", "0"],
    ["--T", "-5"],
    ["--T", "ten"],
    ["--T", "8001"],
    ["--T", str(10**13)],
    ["--steps", "0"],
    ["--batch-size", "0"],
    ["--batch-size", "2.5"],
    ["--lr", "nan"],
    ["--lr", "0"],
    ["--lr", "-1"],
    ["--lr", "inf"],
    ["--samples", "0"],
    ["--samples", str(10**11)],
    ["--seed", "-1"],
    ["--seed", str(10**20)],
    ["--device", "abacus"],
    ["--device", "meta"],
    ["--no-such-flag"],
]


@first_of(TRAIN)
@pytest.mark.parametrize("flags", BAD, ids=lambda flags: " ".join(flags))
def test_a_wrong_value_is_one_line_that_names_the_flag(path, flags, tmp_path, capsys):
    message = one_line(path, ["--out", tmp_path / "out", *flags], capsys)
    assert flags[0] in message and len(message) < 400
    assert not (tmp_path / "out").exists()


class Trap:
    """A pickle that runs code when it is loaded unsafely."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def harmful_files(folder):
    """Files that no script may take for a trained network: {name: what the message must say}."""
    (folder / "text.pt").write_text("not a checkpoint\n", encoding="utf-8")
    (folder / "empty.pt").touch()
    (folder / "trap.pt").write_bytes(pickle.dumps(Trap(folder / "sprung"), protocol=2))
    torch.save({"network": {}, "ema": Trap(folder / "sprung"), "settings": {}}, folder / "zip.pt")
    torch.save({"weights": torch.zeros(3)}, folder / "other.pt")
    torch.save({"network": {}, "ema": {}, "settings": {}}, folder / "no_T.pt")
    (folder / "half.pt").write_bytes((folder / "other.pt").read_bytes()[:200])
    return ["text.pt", "empty.pt", "trap.pt", "zip.pt", "other.pt", "no_T.pt", "half.pt"]


@first_of(TRAIN)
def test_a_file_that_is_no_network_is_one_line(path, smoke, tmp_path, capsys):
    """And no code in it is run. Where two files make a network, each is tried in turn."""
    names = harmful_files(tmp_path)
    models = sorted(smoke(path).glob("model*.pt"))
    for name in [*names, "missing.pt"]:
        if len(models) == 1:
            sources = [tmp_path / name]
        else:
            sources = []
            for model in models:
                source = tmp_path / f"{name} as {model.name}"
                source.mkdir(exist_ok=True)
                for other in models:
                    (source / other.name).write_bytes(other.read_bytes())
                (source / model.name).unlink()
                if name != "missing.pt":
                    (source / model.name).write_bytes((tmp_path / name).read_bytes())
                sources.append(source)
        for source in sources:
            message = one_line(path, ["--load", source, "--out", tmp_path / "out"], capsys)
            assert str(source) in message and "weights_only" not in message
    assert not (tmp_path / "sprung").exists()


@first_of(RESUMABLE)
def test_a_file_that_is_no_checkpoint_is_one_line(path, tmp_path, capsys):
    """The same files as checkpoint.pt, for --resume."""
    out = tmp_path / "out"
    out.mkdir()
    for name in harmful_files(tmp_path):
        (out / "checkpoint.pt").write_bytes((tmp_path / name).read_bytes())
        message = one_line(path, ["--smoke", "--resume", "--out", out], capsys)
        assert str(out / "checkpoint.pt") in message and "weights_only" not in message
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow  # it needs the output of every script
@each(TRAIN)
def test_a_network_of_another_kind_is_refused(path, smoke, tmp_path, capsys):
    """Each script's model.pt in each other script: it either generates images or says why not."""
    ours = source_of(smoke(path))
    for other in TRAIN:
        if other == path:
            continue
        source = source_of(smoke(other))
        if source.is_dir() != ours.is_dir():
            continue
        # --smoke, because classifier_guidance.py trains the classifier that is missing.
        flags = ["--load", source, "--smoke", "--samples", 10, "--out", tmp_path / Path(other).stem]
        try:
            load(path).main([str(flag) for flag in flags])
        except SystemExit as stop:
            assert isinstance(stop.code, str) and str(source) in stop.code, (other, stop.code)
            assert "\n" not in stop.code
        else:
            assert load(other).TASK == load(path).TASK


@pytest.mark.slow
@pytest.mark.parametrize("task", ["cosine_schedule", "progressive_training"])
def test_a_network_for_another_schedule_or_size_is_refused(task, smoke, tmp_path, capsys):
    for model in smoke(f"paper/{task}.py").glob("model*.pt"):
        facts = torch.load(model, weights_only=True)["settings"]
        if facts["task"] == load(MNIST).TASK:
            continue
        message = one_line(MNIST, ["--load", model, "--out", tmp_path], capsys)
        assert facts["task"] in message
    message = one_line(MNIST, ["--load", ROOT / "assets/ddpm_cifar.pt", "--out", tmp_path], capsys)
    assert "UNet" in message


@each(SCRIPTS)
def test_an_output_folder_that_cannot_be_written_stops_the_run_at_once(path, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        message = one_line(path, ["--smoke", "--out", out], capsys)
        assert str(out) in message
        assert not capsys.readouterr().out  # so not even the data have been loaded


@first_of(TRAIN)
def test_a_full_disk_is_one_line_and_leaves_older_files(path, smoke, tmp_path, monkeypatch, capsys):
    """Writing fails half way: the files of the run before are still there, and no others."""
    out = tmp_path / "out"
    flags = ["--smoke", "--seed", "3", "--out", str(out)]
    load(path).main(flags)
    before = read(out)

    def full(file, *args, **options):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    for owner, name in ((load(path).np, "savez"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            message = one_line(path, [*flags, "--seed", "4"], capsys)
        assert "No space left" in message and str(out) in message
        assert not list(out.glob("unfinished*"))
        kept = {key: value for key, value in read(out).items() if key.endswith(".npz")}
        assert kept == {key: value for key, value in before.items() if key.endswith(".npz")}


# NaN and Ctrl-C ---------------------------------------------------------------------------------


@first_of(TRAIN)
def test_a_loss_that_is_nan_stops_the_training_with_its_cause(path, tmp_path, monkeypatch, capsys):
    usual = load(path).Diffusion.loss

    def loss(self, model, x0):
        return usual(self, model, x0) * float("nan")

    monkeypatch.setattr(load(path).Diffusion, "loss", loss)
    message = one_line(path, ["--smoke", "--steps", "400", "--out", tmp_path], capsys)
    assert "nan" in message.lower() and "--lr" in message
    assert not list(tmp_path.glob("model*.pt"))


@first_of(TRAIN)
def test_weights_that_are_nan_are_told_before_pixels_are_rounded(path, smoke, tmp_path, capsys):
    source = source_of(smoke(path))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for model in smoke(path).glob("model*.pt"):
        saved = torch.load(model, weights_only=True)
        for weight in saved["ema"].values():
            weight.fill_(float("nan"))
        torch.save(saved, damaged / model.name)
    source = damaged if source.is_dir() else damaged / source.name
    message = one_line(path, ["--load", source, "--out", tmp_path / "out"], capsys)
    assert "NaN" in message
    assert not list((tmp_path / "out").glob("*.npz"))


class CtrlC:
    """In place of a script's tqdm: the given bar is interrupted at the given step."""

    def __init__(self, script, monkeypatch, bar, step):
        usual = script.tqdm

        class Bar(usual):
            def __init__(self, iterable=None, desc=None, *args, **options):
                super().__init__(iterable, desc, *args, **options)
                self.counts = desc is not None and bar in desc

            def __iter__(self):
                for index, item in enumerate(super().__iter__()):
                    if self.counts and index == step:
                        raise KeyboardInterrupt
                    yield item

        monkeypatch.setattr(script, "tqdm", Bar)


@first_of(TRAIN)
def test_ctrl_c_in_training_keeps_what_was_learned(path, tmp_path, monkeypatch, capsys):
    CtrlC(load(path), monkeypatch, "training", 2)
    flags = ["--smoke", "--steps", "6", "--out", str(tmp_path)]
    monkeypatch.setitem(load(path).SMOKE, "save_every", 17)
    load(path).main(flags)
    out = capsys.readouterr().out
    assert "Stopped after 2 training steps" in out
    assert ("A checkpoint is saved every 17 steps. --resume" in out) == (path in RESUMABLE)
    names = {p.name for p in tmp_path.iterdir()}
    assert [name for name in names if name.endswith(".npz")]
    models = sorted(tmp_path.glob("model*.pt"))
    facts = [torch.load(model, weights_only=True)["settings"] for model in models]
    if path != PROGRESSIVE:  # whose fact is the plan: its networks train in several stages
        assert 2 in [fact["steps"] for fact in facts]  # as were taken, not as were asked for


@first_of(TRAIN)
def test_ctrl_c_before_the_first_step_is_one_line(path, tmp_path, monkeypatch, capsys):
    CtrlC(load(path), monkeypatch, "training", 0)
    message = one_line(path, ["--smoke", "--out", tmp_path], capsys)
    assert "Stopped" in message
    assert not list(tmp_path.glob("model*.pt"))


@pytest.mark.slow
@each(SCRIPTS)
def test_ctrl_c_in_the_terminal_shows_no_traceback(path, tmp_path):
    """Real signals: in the training, and again in the sampling if the program goes on with that."""
    if path in TRAIN:
        flags = ["--smoke", "--steps", "100000", "--samples", "30000"]
    else:
        flags = ["--data-root", str(tmp_path / "file")]  # no folder: it says so, and goes on
        (tmp_path / "file").touch()
    command = [sys.executable, str(ROOT / path), *flags, "--out", str(tmp_path)]
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    errors = tmp_path / "errors.txt"
    with errors.open("w") as stderr:
        options = dict(preexec_fn=hear, cwd=tmp_path, env=environment, encoding="utf-8")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, **options)
    alarm = threading.Timer(300, process.kill)  # for a program that does not hear Ctrl-C
    alarm.start()
    with process:
        # The first line is about the data, so the imports are done.
        for i, line in enumerate(process.stdout):
            if i == 0 or "Going on with what has been learned" in line:
                time.sleep(1.5)
                process.send_signal(signal.SIGINT)
    alarm.cancel()
    assert "Stopped" in errors.read_text() and process.returncode == 1
    assert "Traceback" not in errors.read_text()
