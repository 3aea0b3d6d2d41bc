"""ddpm_cifar.py --data FOLDER: what becomes of pictures of every kind, and what is refused."""

import io

import numpy as np
import pytest
import torch
from conftest import CIFAR, load, one_line
from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = [(4, 4), (4, 27), (27, 4), (27, 27)]  # (row, column) well inside each quarter of 32x32


def quarters(size=64):
    """A picture that shows its orientation and its channels: red, green / blue, white."""
    pixels = np.zeros((size, size, 3), np.uint8)
    half = size // 2
    pixels[:half, :half] = RED
    pixels[:half, half:] = GREEN
    pixels[half:, :half] = BLUE
    pixels[half:, half:] = WHITE
    return Image.fromarray(pixels)


def read(path):
    return load(CIFAR).square_image(path)


def colours(image, places=CORNERS):
    """The colours of a (3, 32, 32) image at these places."""
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    return [tuple(image[:, row, column].tolist()) for row, column in places]


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


EXACT = ["png", "bmp", "tif", "tiff", "gif", "PNG", "Bmp", "TIFF", "webp"]


@pytest.mark.parametrize("ending", [*EXACT, "jpg", "JPEG", "Jpg"])
def test_orientation_channels_and_range(ending, tmp_path):
    options = dict(quality=100, subsampling=0) if ending.lower() in ("jpg", "jpeg") else {}
    if ending == "webp":
        options = dict(lossless=True)
    image = read(save(quarters(), tmp_path / f"a.{ending}", **options))
    difference = np.array(colours(image)) - np.array([RED, GREEN, BLUE, WHITE])
    assert np.abs(difference).max() <= (0 if ending in EXACT else 3)


def test_32x32_pixels_stay_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = read(save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(640, 64), (64, 640), (96, 64), (640, 427), (130, 64)])
def test_the_centre_is_cropped_to_a_square(size, tmp_path):
    """The longer side is cut at both ends: what lies there (black) is gone, the middle is whole."""
    width, height = size
    side = min(size)
    picture = Image.new("RGB", size, "black")
    picture.paste(quarters(side), ((width - side) // 2, (height - side) // 2))
    image = read(save(picture, tmp_path / "a.png"))
    assert colours(image) == [RED, GREEN, BLUE, WHITE]
    border = torch.cat([image[:, 1, :], image[:, -2, :], image[:, :, 1], image[:, :, -2]], dim=1)
    assert border.amax(0).min() > 200  # no black stripe at any side


def test_fine_patterns_become_grey_and_not_stripes(tmp_path):
    """Antialiasing: lines one pixel wide, made four times smaller, are their mean."""
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:, ::2] = 255
    image = read(save(Image.fromarray(pixels), tmp_path / "a.png"))[:, 3:-3, 3:-3].float()
    assert (image - 127.5).abs().max() < 12


def test_small_pictures_are_enlarged(tmp_path):
    assert colours(read(save(quarters(8), tmp_path / "a.png"))) == [RED, GREEN, BLUE, WHITE]


def transparent():
    """Left: fully transparent, of a colour that must not show. Right: red, half transparent below.
    """
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (0, 200, 0, 0)
    pixels[:, 32:] = (*RED, 255)
    pixels[32:, 32:, 3] = 128
    return Image.fromarray(pixels)


def test_transparent_parts_become_white(tmp_path):
    image = read(save(transparent(), tmp_path / "a.png"))
    left, red, left_below, pink = colours(image)
    assert left == left_below == WHITE and red == RED
    assert np.abs(np.array(pink) - (255, 127, 127)).max() <= 1
    assert image[1, :, 14:18].min() == 0 and image[1, :8, :14].min() == 255  # and no green fringe


def test_a_palette_with_a_transparent_colour(tmp_path):
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, *RED, *BLUE])
    palette.paste(1, (0, 0, 32, 32))
    palette.paste(2, (32, 32, 64, 64))
    path = save(palette, tmp_path / "a.png", transparency=0)
    assert colours(read(path)) == [RED, WHITE, WHITE, BLUE]
    path = save(palette, tmp_path / "b.gif", transparency=0)
    assert colours(read(path)) == [RED, WHITE, WHITE, BLUE]


def test_grey_and_black_and_white(tmp_path):
    grey = Image.new("L", (40, 40), 77)
    assert set(colours(read(save(grey, tmp_path / "a.png")))) == {(77, 77, 77)}
    alpha = Image.merge("LA", [grey, Image.new("L", (40, 40), 0)])
    assert set(colours(read(save(alpha, tmp_path / "b.png")))) == {WHITE}
    bits = Image.new("1", (40, 40), 1)
    assert set(colours(read(save(bits, tmp_path / "c.png")))) == {WHITE}


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits_a_pixel(ending, tmp_path):
    """A ramp from 0 to 65535 becomes one from 0 to 255, and not white above 255."""
    ramp = np.linspace(0, 65535, 32).astype(np.uint16)
    picture = Image.fromarray(np.broadcast_to(ramp, (32, 32)).copy())
    image = read(save(picture, tmp_path / f"a.{ending}"))
    expected = torch.linspace(0, 255, 32)
    assert (image.float() - expected).abs().max() <= 1


def test_cmyk(tmp_path):
    picture = quarters().convert("CMYK")
    image = read(save(picture, tmp_path / "a.jpg", quality=100))
    difference = np.array(colours(image)) - np.array([RED, GREEN, BLUE, WHITE])
    assert np.abs(difference).max() < 12


def test_a_photograph_is_turned_as_its_camera_noted(tmp_path):
    """EXIF orientation 6: stored lying on its side, to be turned by 90 degrees clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = quarters().transpose(Image.Transpose.ROTATE_90)
    path = save(lying, tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    difference = np.array(colours(read(path))) - np.array([RED, GREEN, BLUE, WHITE])
    assert np.abs(difference).max() <= 3


def test_of_an_animation_the_first_frame_counts(tmp_path):
    first, second = Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), BLUE)
    path = save(first, tmp_path / "a.gif", save_all=True, append_images=[second])
    assert set(colours(read(path))) == {RED}


def test_a_folder_is_searched_recursively_in_alphabetical_order(tmp_path):
    """Images of level 10 k, whose paths are in this order; other files are left out."""
    names = ["a.JPG", "b/a.png", "b/c/d/e.Png", "b/z.webp", "c.gif"]
    for k, name in enumerate(names):
        picture = Image.new("RGB", (40 + k, 50), (10 * k, 10 * k, 10 * k))
        options = dict(lossless=True) if name.endswith("webp") else {}
        save(picture, tmp_path / name, **options)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "b" / "no ending").write_text("no image", encoding="utf-8")
    images = load(CIFAR).load_folder(tmp_path)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    levels = images.float().mean((1, 2, 3))
    assert torch.allclose(levels, torch.arange(5) * 10.0, atol=1)


# As the user meets it ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, red at the left and blue at the right, of odd sizes, some in a subfolder."""
    base = tmp_path / "pictures"
    for k in range(12):
        picture = Image.new("RGB", (40, 40 + 3 * k), BLUE)
        picture.paste(RED, (0, 0, 20, 40 + 3 * k))
        save(picture, base / ("" if k % 2 else "more") / f"{k}.png")
    return base


def seen_in_training(monkeypatch, *flags):
    """All x_0 of a run of ddpm_cifar.py."""
    seen = []
    script = load(CIFAR)
    usual = script.Diffusion.loss

    def loss(self, model, x0):
        seen.append(x0)
        return usual(self, model, x0)

    with monkeypatch.context() as patch:
        patch.setattr(script.Diffusion, "loss", loss)
        script.main(["--smoke", *map(str, flags)])
    return torch.cat(seen)


@pytest.mark.parametrize("flag", ["--flip", "--no-flip"])
def test_train_resume_and_load_without_the_folder(flag, folder, tmp_path, monkeypatch, capsys):
    """Half of the pictures are mirrored, or none; a resumed run goes on in the same way."""
    out = tmp_path / "out"
    flags = ["--data", f"{folder}/", flag, "--batch-size", "20", "--out", out]
    x0 = seen_in_training(monkeypatch, *flags)
    assert "12 images" in capsys.readouterr().out
    x0 = torch.cat([x0, seen_in_training(monkeypatch, "--resume", "--steps", "9", "--out", out)])
    assert len(x0) == 9 * 20
    red_left = (x0[:, 0, 16, 4] == 1) & (x0[:, 2, 16, 4] == -1) & (x0[:, 2, 16, 27] == 1)
    red_right = (x0[:, 0, 16, 27] == 1) & (x0[:, 2, 16, 27] == -1) & (x0[:, 2, 16, 4] == 1)
    assert (red_left | red_right).all()
    if flag == "--no-flip":
        assert red_left.all()
    else:
        assert abs(red_right.sum() - 90) < 4.5 * (180 / 4) ** 0.5
    settings = torch.load(out / "model.pt", weights_only=True)["settings"]
    assert settings["data"] == str(folder) and settings["steps"] == 9
    folder.rename(tmp_path / "moved")
    for name in ("model.pt", "checkpoint.pt"):
        load(CIFAR).main(["--load", str(out / name), "--samples", "4", "--out", str(out / name[0])])
        assert np.load(out / name[0] / "samples.npz")["arr_0"].shape == (4, 32, 32, 3)
    before = (out / "checkpoint.pt").read_bytes()
    message = one_line(CIFAR, ["--resume", "--steps", "12", "--out", out], capsys)
    assert str(folder) in message
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_folder_with_other_images_is_not_resumed(folder, tmp_path, capsys):
    out = tmp_path / "out"
    load(CIFAR).main(["--smoke", "--data", str(folder), "--out", str(out)])
    before = (out / "checkpoint.pt").read_bytes()
    save(quarters(), folder / "new.png")
    message = one_line(CIFAR, ["--resume", "--steps", "12", "--out", out], capsys)
    assert "12 images" in message
    assert (out / "checkpoint.pt").read_bytes() == before


def test_empty_and_missing_folders_and_files_are_one_line(tmp_path, capsys):
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text", encoding="utf-8")
    save(quarters(), tmp_path / "picture.png")
    for name in ("empty", "texts", "missing", "picture.png"):
        flags = ["--smoke", "--data", tmp_path / name, "--out", tmp_path / "out"]
        assert str(tmp_path / name) in one_line(CIFAR, flags, capsys)
    message = one_line(CIFAR, ["--smoke", "--data", "cifr10", "--out", tmp_path / "out"], capsys)
    assert "cifr10" in message
    assert not list((tmp_path / "out").iterdir())


def broken_files():
    """Contents that Pillow refuses in different ways."""
    buffer = io.BytesIO()
    quarters(200).save(buffer, "PNG")
    png = buffer.getvalue()
    damaged = bytearray(png)
    damaged[60:90] = bytes(30)
    return {"empty.png": b"", "text.jpg": b"text", "half.png": png[:300], "damaged.png": damaged}


@pytest.mark.parametrize("name", broken_files())
def test_an_unreadable_file_is_one_line_that_names_it(name, folder, tmp_path, capsys):
    (folder / "more" / name).write_bytes(broken_files()[name])
    flags = ["--smoke", "--data", folder, "--out", tmp_path / "out"]
    message = one_line(CIFAR, flags, capsys)
    assert str(folder / "more" / name) in message


def test_data_may_not_be_given_with_load(tmp_path, folder, capsys):
    flags = ["--load", "model.pt", "--data", folder, "--out", tmp_path / "out"]
    message = one_line(CIFAR, flags, capsys)
    assert "--data" in message and "--load" in message
