"""Each script as its user meets it: --smoke, --load, bad input, no network, Ctrl-C."""
import json
import pickle
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPTS, having, load

# The pictures of a run, samples first.
PICTURES = {
    "classifier_free_guidance": ["samples", "loss", "guidance", "tradeoff"],
    "classifier_guidance": ["samples", "loss", "guidance", "tradeoff", "accuracy", "both"],
    "fid_is": ["samples", "loss", "fid"],
    "progressive_training": ["samples_plain", "samples_progressive", "stages", "race"],
    "ddim_sampling": ["samples", "loss", "steps", "eta", "interpolation", "inversion"],
    "cosine_schedule": ["samples_linear", "samples_cosine", "skipped", "schedules", "forward", "loss_by_t"],
}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=[Path(s).stem for s in SCRIPTS])


def pictures(path):
    """The pictures that a script writes, the samples first."""
    return [f"{name}.png" for name in PICTURES.get(Path(path).stem, ["samples", "denoising", "loss"])]


def run(path, *flags):
    """The script in a process of its own, without a terminal."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def read(folder):
    """{file name: bytes} of a run's folder; of metrics.json only what a second run must repeat."""
    found = {p.name: p.read_bytes() for p in folder.iterdir()}
    metrics = json.loads(found.pop("metrics.json"))
    found.pop("race.png", None)  # its axis is the clock
    for row in metrics.get("table", []):
        if isinstance(row, dict):
            row.pop("seconds", None), row.pop("in network", None)
    return found | {"loss": metrics.get("loss") or metrics.get("table"), "steps": metrics["settings"]["steps"]}


@each_script
def test_smoke_twice_gives_the_same_bytes(path, tmp_path):
    done = run(path, "--smoke", "--seed", 3, "--out", tmp_path / "first")  # a process of its own
    assert done.returncode == 0, done.stderr
    for name, seed in (("second", "3"), ("other", "4")):
        load(path).main(["--smoke", "--seed", seed, "--out", str(tmp_path / name)])
    samples = pictures(path)[0]
    assert {p.name for p in (tmp_path / "first").iterdir()} >= {*pictures(path), "metrics.json", "model.pt"}
    first, second, other = (read(tmp_path / name) for name in ("first", "second", "other"))
    assert first == second
    assert first[samples] != other[samples] and first["loss"] != other["loss"]

    # --load draws what the run drew, with the settings of that run, and leaves its files alone.
    load(path).main(["--load", str(tmp_path / "first" / "model.pt"), "--out", str(tmp_path / "loaded")])
    assert read(tmp_path / "loaded")[samples] == first[samples]
    assert not (tmp_path / "loaded" / "model.pt").exists()


@each_script
def test_smoke_files_hold_what_they_should(path, tmp_path):
    from PIL import Image

    load(path).main(["--smoke", "--out", str(tmp_path)])
    for name in pictures(path):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) >= 56 and len(image.convert("L").getcolors()) > 2
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {"settings", "model", "ema"} <= set(checkpoint)
    assert any(not torch.equal(checkpoint["model"][k], v) for k, v in checkpoint["ema"].items())
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["settings"]["data"] == "strokes" and metrics["seconds"]["training"] > 0
    assert not list(tmp_path.glob("*.part*"))


@each_script
@pytest.mark.parametrize(
    "flags",
    [
        ["--T", "0"],
        ["--T", "-5"],
        ["--T", "ten"],
        ["--steps", "0"],
        ["--batch-size", "0"],
        ["--batch-size", "1000000"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--samples", "0"],
        ["--seed", "100000000000000000000"],
        ["--lr", "inf"],
        ["--device", "abacus"],
        ["--data", "cats"],
        ["--no-such-flag"],
        ["--load", "{here}/missing.pt"],
        ["--load", "{here}/text.pt"],
        ["--load", "{here}/empty.pt"],
        ["--load", "{here}/pickle.pt"],
        ["--load", "{here}/other.pt"],
        ["--load", "{here}/other.pt", "--steps", "5"],
        ["--out", "{here}/text.pt/folder"],
    ],
    ids=lambda flags: " ".join(flags).replace("{here}/", ""),
)
def test_bad_input_is_one_line_and_exit_2(path, flags, tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "text.pt").write_text("not a checkpoint\n")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    before = {p.name for p in tmp_path.iterdir()}
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        load(path).main(["--smoke", *out, *(flag.format(here=tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith(f"{Path(path).name}: ") and error.count("\n") == 1 and flags[0] in error
    assert not (tmp_path / "sprung").exists()
    assert {p.name for p in tmp_path.iterdir()} - {"out"} == before and not list(tmp_path.glob("out/*"))


@having("fid", "train", without=["find_reference"])  # fid_is.py calls the number --count
def test_so_few_samples_that_they_have_no_score(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--smoke", "--samples", "7", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--samples must be 8 or more" in capsys.readouterr().err


@each_script
def test_a_loss_that_is_no_number_stops_the_run_with_its_cause(path, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        load(path).main(["--smoke", "--steps", "100", "--lr", "1e30", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err.splitlines()[-1]


@each_script
def test_ctrl_c_keeps_what_was_learned(path, tmp_path):
    command = [sys.executable, str(ROOT / path), "--smoke", "--steps", "1000000", "--out", str(tmp_path)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs in the background are born deaf to Ctrl-C
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear) as process:
        seen = b""
        while b"loss=" not in seen:
            seen += process.stderr.read1(100)
            assert process.poll() is None, seen
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert b"Stopped after" in out
    later = {"samples_progressive.png"}  # of a run that would have begun after the one that was stopped
    assert {p.name for p in tmp_path.iterdir()} >= {*pictures(path), "metrics.json", "model.pt"} - later
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < metrics.get("steps_done", 1) < 1_000_000 and metrics.get("runs_done", 1) == 1


def test_help_needs_no_torchvision():
    """Quick --help: nothing that is slow to import, other than torch itself."""
    for path in SCRIPTS:
        code = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({path!r}, run_name='__main__')"
        code = f"try:\n {code}\nexcept SystemExit: print({{'torchvision', 'sklearn', 'matplotlib'}} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.stdout.endswith("set()\n") and "--steps" in done.stdout, done.stderr


# Data -----------------------------------------------------------------------------------------------------------------


def write_idx(root, images):
    """A file like MNIST's: two zeros, type 8 (bytes), 3 axes, their sizes, and the pixels."""
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.parent.mkdir(parents=True)
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in images.shape)
    path.write_bytes(header + images.numpy().tobytes())
    return path


@having("load_mnist", "load_images")
def test_mnist_on_disk_is_read_as_it_is(script, tmp_path, monkeypatch):
    monkeypatch.delattr(urllib.request, "urlopen")  # no network is needed
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8)
    write_idx(tmp_path, images)
    for data in ("auto", "mnist"):
        got, name = script.load_images(data, tmp_path)
        assert torch.equal(got[:, 0], images) and name == "mnist"


@having("load_mnist", "load_images")
@pytest.mark.parametrize("keep", [0, 3, 500])
def test_a_cut_off_idx_file_is_named_in_one_line(script, keep, tmp_path, capsys):
    path = write_idx(tmp_path, torch.zeros(7, 28, 28, dtype=torch.uint8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SystemExit) as stop:
        script.main(["--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(path) in error
    assert not list(tmp_path.glob("out/*")) and path.exists()


@having("load_mnist", "load_images")
def test_without_network_the_bundled_digits_step_in_loudly(script, tmp_path, capsys, monkeypatch):
    def urlopen(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    images, name = script.load_images("auto", tmp_path)
    notice = capsys.readouterr().out
    assert name == "digits" and images.shape == (1797, 1, 28, 28) and images.dtype == torch.uint8
    assert images.min() == 0 and images.max() == 255
    assert "no route to host" in notice and "1,797" in notice
    with pytest.raises(SystemExit) as stop:
        script.load_images("mnist", tmp_path)
    assert stop.value.code == 2 and "no route to host" in capsys.readouterr().err


@having("load_mnist", "load_images")
def test_a_network_that_hangs_is_given_up(script, tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **options: release.wait(60))
    monkeypatch.setattr(load(script.path), "SERVER_SECONDS", 0.2)
    assert script.load_images("auto", tmp_path)[1] == "digits"
    release.set()


@having("load_mnist", "load_images")
def test_the_bundled_digits_are_the_library_s(script):
    """Each enlarged digit, averaged back down to 8x8, is close to the original."""
    from sklearn.datasets import load_digits

    images, _ = script.load_images("digits", None)
    small = torch.nn.functional.interpolate(images.float(), size=8, mode="area")[:, 0] / 255
    original = torch.from_numpy(load_digits().images).float() / 16
    correlation = torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1]
    assert correlation > 0.97


# Colour ---------------------------------------------------------------------------------------------------------------


def write_cifar10(root, rows, monkeypatch):
    """Five batches like CIFAR-10's: pickles of rows of 3072 bytes. Made files fail the checksum, so it is left out."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args, **options: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for part, batch in enumerate(rows.chunk(5), start=1):
        content = {"data": batch.numpy(), "labels": [part] * len(batch)}
        (folder / f"data_batch_{part}").write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["thing"]}))
    return folder


@having("load_cifar10")
def test_cifar10_on_disk_is_read_as_it_is(script, tmp_path, monkeypatch):
    """A row holds 1024 red values, then green, then blue, each row by row of the image."""
    monkeypatch.delattr(urllib.request, "urlopen")  # no network is needed
    rows = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
    write_cifar10(tmp_path, rows, monkeypatch)
    for data in ["cifar10"] if hasattr(script, "load_mnist") else ["auto", "cifar10"]:
        images, name = script.load_images(data, tmp_path)
        assert torch.equal(images, rows.view(10, 3, 32, 32)) and name == "cifar10"


@having("load_labels")
def test_labels_belong_to_their_images(script, tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1).expand(7, 28, 28).contiguous()
    path = write_idx(tmp_path, images).with_name("train-labels-idx1-ubyte")
    path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 7, *range(3, 10)]))
    pixels = script.load_images("mnist", tmp_path)[0][:, 0, 0, 0]
    assert (script.load_labels("mnist", tmp_path) - pixels).tolist() == [3] * 7
    write_cifar10(tmp_path, torch.zeros(10, 3072, dtype=torch.uint8), monkeypatch)
    assert script.load_labels("cifar10", tmp_path).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert script.load_labels("digits", None).tolist() == load_digits().target.tolist()
    for data in ("photos", "strokes"):
        images, labels = script.load_images(data, None)[0], script.load_labels(data, None)
        assert len(images) == len(labels) and labels.bincount().tolist() == [len(images) // 2] * 2
    path.unlink()
    with pytest.raises(SystemExit):
        script.load_labels("mnist", tmp_path)


@having("load_cifar10")
def test_damaged_cifar10_is_named_in_one_line(script, tmp_path, monkeypatch, capsys):
    folder = write_cifar10(tmp_path, torch.zeros(10, 3072, dtype=torch.uint8), monkeypatch)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:100])
    with pytest.raises(SystemExit) as stop:
        script.main(["--data", "cifar10", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and str(folder) in error
    assert not list(tmp_path.glob("out/*")) and folder.exists()


@having("load_photos", without=["load_mnist"])
def test_without_network_crops_of_photographs_step_in_loudly(script, tmp_path, capsys, monkeypatch):
    from sklearn.datasets import load_sample_image

    def urlopen(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    images, name = script.load_images("auto", tmp_path)
    notice = capsys.readouterr().out
    assert name == "photos" and images.shape == (6716, 3, 32, 32) and images.dtype == torch.uint8
    assert "no route to host" in notice and "photographs" in notice
    corner = load_sample_image("china.jpg")[:64, :64].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert abs(images[0].permute(1, 2, 0).numpy() - corner).max() <= 0.5
    with pytest.raises(SystemExit) as stop:
        script.load_images("cifar10", tmp_path)
    assert stop.value.code == 2 and "no route to host" in capsys.readouterr().err
