"""The images: those on the disk as they are, a stand-in where there are none, one line where they are damaged."""
import inspect
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import SCRIPTS, definitions, load, one_line
from sklearn.datasets import load_digits, load_sample_image
from torchvision.datasets import CIFAR10, MNIST

COLOUR = ["pytorch_lowlevel/ddpm_cifar.py", "paper/ddpm_paper.py"]
DIGITS = [path for path in SCRIPTS if path not in COLOUR and "load_images" in definitions(path)]


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=[Path(path).stem for path in paths])


def write_idx(root, images, labels):
    """Files like MNIST's, of the training and the test images: a header of types and sizes, then the bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    return folder


def write_cifar10(root, rows, monkeypatch):
    """Batches like CIFAR-10's: pickles of rows of 3072 bytes. Made files fail the checksum, so it is left out."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *args, **options: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{part}" for part in range(1, 6)] + ["test_batch"]
    for name, batch in zip(names, [*rows.chunk(5), rows], strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": batch.numpy(), "labels": [3] * len(batch)}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["thing"]}))
    return folder


def images_of(path, data, root):
    """The first thing that the script's load_images gives, and all of it."""
    found = load(path).load_images(data, str(root))
    return (found[0] if isinstance(found, tuple) else found), found


def test_mnist_on_disk_is_read_as_it_is(tmp_path):
    images, labels = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8), torch.arange(7, dtype=torch.uint8)
    write_idx(tmp_path, images, labels)
    for path in DIGITS:
        got, found = images_of(path, "mnist", tmp_path)
        assert torch.equal(got[:, 0], images) and "mnist" in found, path


@each(DIGITS[:1] + DIGITS[-1:])
@pytest.mark.parametrize("keep", [0, 500])
def test_a_damaged_idx_file_is_one_line_with_its_folder(path, keep, tmp_path, capsys):
    folder = write_idx(tmp_path, torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7, dtype=torch.uint8))
    damaged = folder / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    error = one_line(path, ["--data-root", tmp_path, "--out", tmp_path / "out"], capsys)
    assert str(tmp_path / "MNIST") in error and "delete" in error
    assert not [path for path in tmp_path.glob("out/*") if path.stat().st_size] and damaged.exists()


def unreachable(self):
    raise RuntimeError("Error downloading:\nno route to host")


@each(DIGITS[::5])
def test_without_network_the_bundled_digits_step_in_loudly(path, tmp_path, capsys, monkeypatch):
    """Each enlarged digit, averaged back down to 8x8, is close to the library's."""
    monkeypatch.setattr(MNIST, "download", unreachable)
    images, found = images_of(path, "mnist", tmp_path)
    notice = capsys.readouterr().out
    assert "digits" in found and images.shape == (1797, 1, 28, 28) and images.dtype == torch.uint8
    assert "!!!" in notice and "no route to host" in notice and "1,797" in notice
    small = torch.nn.functional.interpolate(images.float(), size=8, mode="area")[:, 0] / 255
    original = torch.from_numpy(load_digits().images).float() / 16
    assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.97
    assert images.min() == 0 and images.max() == 255
    assert torch.equal(images_of(path, "digits", tmp_path)[0], images) and not capsys.readouterr().out


@each(COLOUR)
def test_cifar10_on_disk_is_read_as_it_is(path, tmp_path, monkeypatch):
    """A row holds 1024 red values, then green, then blue, each row by row of the image."""
    rows = torch.randint(0, 256, (10, 3072), dtype=torch.uint8)
    write_cifar10(tmp_path, rows, monkeypatch)
    images, found = images_of(path, "cifar10", tmp_path)
    assert torch.equal(images, rows.view(10, 3, 32, 32)) and "cifar10" in found


@each(COLOUR)
def test_damaged_cifar10_is_one_line_with_its_folder(path, tmp_path, monkeypatch, capsys):
    folder = write_cifar10(tmp_path, torch.zeros(10, 3072, dtype=torch.uint8), monkeypatch)
    (folder / "data_batch_3").write_bytes((folder / "data_batch_3").read_bytes()[:100])
    error = one_line(path, ["--data-root", tmp_path, "--out", tmp_path / "out"], capsys)
    assert str(folder) in error and "delete" in error and folder.exists()


@each(COLOUR)
def test_without_network_crops_of_photographs_step_in_loudly(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", unreachable)
    images, found = images_of(path, "cifar10", tmp_path)
    notice = capsys.readouterr().out
    assert "photos" in found and images.shape[1:] == (3, 32, 32) and images.dtype == torch.uint8
    assert "!!!" in notice and "no route to host" in notice
    photo = torch.from_numpy(load_sample_image("china.jpg")).permute(2, 0, 1).float()
    corner = photo[:, :64, :64].view(3, 32, 2, 32, 2).mean((2, 4))  # the first crop: at half its size
    assert (images[0].float() - corner).abs().max() <= 0.5


def test_the_server_has_ten_seconds():
    for path in DIGITS + COLOUR:
        assert "socket.setdefaulttimeout(10)" in inspect.getsource(load(path))
