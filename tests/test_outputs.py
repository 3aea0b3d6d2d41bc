"""Every file that a script writes holds what its name says; a file without a row here fails."""

import inspect
import re
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CIFAR, MNIST, ROOT, TRAIN, definitions, first_of, having, load
from PIL import Image, ImageSequence

PAPER = "paper/ddpm_paper.py"
# Which test compares a file with the arrays behind it.
SAMPLES = "test_outputs.py::test_samples_are_those_of_the_sampler"
LOSS = "test_outputs.py::test_the_loss_curve_is_that_of_the_run"
FILM = "test_outputs.py::test_the_film_shows_x_t_above_its_estimate"
AVERAGE = "test_training.py::test_the_average_of_the_weights_is_saved"
PREVIEW = "test_resume.py::test_the_preview_shows_16_images_of_the_averaged_network"
CHECKPOINT = "test_resume.py::test_a_checkpoint_holds_what_its_documentation_says"
GUIDED = "test_guidance.py::test_each_strength_has_its_own_images_labels_and_block"
COSINE = "test_schedules.py::test_which_schedule_made_which_file_row_and_line"
BOTH_SCHEDULES = (
    "test_schedules.py::test_schedules_and_forward_show_each_schedule_under_its_name"
)
DDIM = "test_ddim.py::test_files_hold_the_samples_of_their_name"
STAGES = "test_progressive.py::test_race_png_and_stages_png_show_what_was_measured"
RACE_SAMPLES = "test_progressive.py::test_the_files_hold_what_each_network_generates"
ROWS = {
    MNIST: {
        "samples.*": SAMPLES,
        "loss.png": LOSS,
        "denoising.*": FILM,
        "model.pt": AVERAGE,
    },
    CIFAR: {
        "samples.*": SAMPLES,
        "loss.png": LOSS,
        "model.pt": AVERAGE,
        "preview.png": PREVIEW,
        "checkpoint.pt": CHECKPOINT,
    },
    PAPER: {
        "samples.*": SAMPLES,
        "loss.png": LOSS,
        "model.pt": AVERAGE,
        "preview.png": PREVIEW,
        "checkpoint.pt": CHECKPOINT,
        "nll.png": "test_paper.py::test_the_plot_shows_each_term_at_its_t",
    },
    "paper/classifier_free_guidance.py": {
        "w_*.npz": GUIDED,
        "guidance.png": GUIDED,
        "samples.png": GUIDED,
        "loss.png": LOSS,
        "model.pt": AVERAGE,
    },
    "paper/classifier_guidance.py": {
        "s_*.npz": GUIDED,
        "guidance.png": GUIDED,
        "samples.png": GUIDED,
        "accuracy.png": "test_guidance.py::test_accuracy_png_shows_what_was_measured",
        "loss.png": "test_guidance.py::test_loss_png_has_both_losses",
        "model.pt": AVERAGE,
    },
    "paper/cosine_schedule.py": {
        "samples_*": COSINE,
        "skipped*": COSINE,
        "loss_by_t.png": COSINE,
        "schedules.png": BOTH_SCHEDULES,
        "forward.png": BOTH_SCHEDULES,
        "model_*.pt": AVERAGE,
    },
    "paper/ddim_sampling.py": {
        "*_0*.npz": DDIM,
        "samples.png": DDIM,
        "steps.png": DDIM,
        "eta.png": DDIM,
        "estimates.png": "test_ddim.py::test_estimates_show_x0_hat_of_each_x_T_at_each_t",
        "interpolation.png": "test_ddim.py::test_interpolation_runs_on_the_arc_between_two_x_T",
        "inversion.png": "test_ddim.py::test_inversion_is_of_images_that_were_not_trained_on",
        "loss.png": LOSS,
        "model.pt": AVERAGE,
    },
    "paper/progressive_training.py": {
        "samples_*": RACE_SAMPLES,
        "race.png": STAGES,
        "stages.png": STAGES,
        "model_*.pt": AVERAGE,
    },
}


@first_of(TRAIN)
def test_each_file_has_a_test(path, smoke):
    """A new file of --smoke must get a row above, and a row must name a test that exists."""
    names = {file.name for file in smoke(path).iterdir()}
    for name in names:
        rows = [row for row in ROWS[path] if fnmatch(name, row)]
        assert len(rows) == 1, f"{path} writes {name}: which test verifies it?"
    for row, test in ROWS[path].items():
        written = any(fnmatch(name, row) for name in names)
        assert written or row == "nll.png", f"{path} does not write {row}"  # that takes --nll
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def known_bytes(shape):
    """Bytes (N, C, H, W) that any turn, flip or swap of channels changes."""
    count = int(np.prod(shape))
    return (7 * np.arange(count) % 251).astype(np.uint8).reshape(shape)


def grid(images, columns):
    """(N, H, W, C) bytes as one picture: each twice as large, in rows, with black lines of 2."""
    images = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    count, height, width, channels = images.shape
    lines = -(-count // columns)
    picture = np.zeros(
        (lines * (height + 2) + 2, columns * (width + 2) + 2, channels), dtype=np.uint8
    )
    for k, image in enumerate(images):
        top = 2 + k // columns * (height + 2)
        left = 2 + k % columns * (width + 2)
        picture[top : top + height, left : left + width] = image
    return np.repeat(picture, 3 // channels, axis=2)


@first_of([MNIST, CIFAR, PAPER])
def test_samples_are_those_of_the_sampler(path, monkeypatch, tmp_path):
    """Rounded bytes with the channels last and in their order; the picture is a grid of them.

    There are as many as asked for, in batches of at most 500.
    """
    script = load(path)
    asked = []

    def sample(self, model, shape, clip=True, variance="beta"):
        asked.append((shape, model.training))
        # Cut off instead of rounded, each byte would be 1 too small.
        return torch.from_numpy((known_bytes(shape) - 0.3) / 127.5 - 1).float()

    monkeypatch.setattr(script.Diffusion, "sample", sample)
    script.main(["--smoke", "--samples", "503", "--out", str(tmp_path)])
    shapes = [shape for shape, _ in asked[-2:]]
    assert [shape[0] for shape in shapes] == [500, 3] and not any(mode for _, mode in asked)
    expected = np.concatenate([known_bytes(shape) for shape in shapes]).transpose(0, 2, 3, 1)
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["arr_0"] and np.array_equal(file["arr_0"], expected)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.array(picture), grid(expected, columns=22))


@first_of(
    [
        "paper/ddim_sampling.py",
        "paper/classifier_free_guidance.py",
        "paper/classifier_guidance.py",
        "paper/cosine_schedule.py",
        "paper/progressive_training.py",
    ]
)
def test_archives_hold_the_images_of_the_sampler_upright(path, monkeypatch, tmp_path):
    """In every .npz, each image is the one that the sampler has returned, and so are the labels,
    although samples are generated in batches of 500.
    """
    script = load(path)

    def made(shape):
        return torch.from_numpy((known_bytes(shape) - 0.3) / 127.5 - 1).float()

    def ddim_sample(self, model, shape, *args, xT=None, **options):
        return made(shape if xT is None else xT.shape)

    if "cosine" in path:
        monkeypatch.setattr(script, "sample_respaced", lambda *args: made(args[4]))
    else:
        monkeypatch.setattr(script.Diffusion, "ddim_sample", ddim_sample)
    flags = ["--S", "2"] if "ddim" in path else []
    script.main(["--smoke", *flags, "--samples", "503", "--out", str(tmp_path)])
    size = 32 if "progressive" in path else 28  # its digits are padded with a frame of 2
    batches = [known_bytes((count, size, size, 1)) for count in (500, 3)]
    expected = np.concatenate(batches)
    expected = expected[:, 2:-2, 2:-2] if size == 32 else expected
    archives = sorted(tmp_path.glob("*.npz"))
    assert len(archives) >= 2
    for archive in archives:
        with np.load(archive) as file:
            assert np.array_equal(file["arr_0"], expected), archive.name
            assert ("classifier" in path) == ("arr_1" in file.files)
            if "arr_1" in file.files:
                assert file["arr_1"].tolist() == [k % 10 for k in range(503)]


@pytest.fixture
def kept(monkeypatch):
    """kept(script): {name of the file: the Figure saved there}, as they come."""
    from matplotlib.figure import Figure

    saved = {}

    class Kept(Figure):
        def savefig(self, path, **options):
            super().savefig(path, **options)
            saved[path.name] = self

    def keep(script):
        monkeypatch.setattr(script, "Figure", Kept)
        return saved

    return keep


@first_of([MNIST, CIFAR, PAPER, "paper/classifier_free_guidance.py", "paper/ddim_sampling.py"])
def test_the_loss_curve_is_that_of_the_run(path, monkeypatch, tmp_path, kept, capsys):
    """Each point is the mean of two training steps; the report has the mean of the last 50."""
    script = load(path)
    figures = kept(script)
    seen = []
    usual = script.Diffusion.loss

    def loss(diffusion, model, x0):
        value = usual(diffusion, model, x0)
        seen.append(value.item())
        return value

    monkeypatch.setattr(script.Diffusion, "loss", loss)
    flags = ["--S", "2"] if "ddim" in path else []
    script.main(["--smoke", "--steps", "60", *flags, "--samples", "10", "--out", str(tmp_path)])
    [axes] = figures["loss.png"].axes
    [line] = axes.lines
    assert len(seen) == 60 and line.get_xdata().tolist() == list(range(2, 61))
    pairs = (np.array(seen[:-1]) + seen[1:]) / 2
    assert np.allclose(line.get_ydata(), pairs, rtol=1e-5)
    report = capsys.readouterr().out.splitlines()[-1]
    assert report.startswith("60 training steps in ")
    assert f" s, loss {np.mean(seen[-50:]):.4f}; " in report and "; 10 samples " in report


@having("plot_loss")
def test_the_loss_curve_is_a_moving_average(script, tmp_path, kept):
    figures = kept(script)
    losses = torch.rand(130, generator=torch.Generator().manual_seed(0))
    script.plot_loss(losses, tmp_path / "loss.png")
    [axes] = figures["loss.png"].axes
    [line] = axes.lines
    means = [losses[end - 3 : end].mean().item() for end in range(3, 131)]
    assert line.get_xdata().tolist() == list(range(3, 131))
    assert np.allclose(line.get_ydata(), means, rtol=1e-5)
    assert axes.get_yscale() == "log" and axes.get_xlabel() == "training step"
    assert axes.get_title() == "$L_{simple}$, mean of 3 training steps"


def test_the_film_shows_x_t_above_its_estimate(monkeypatch, tmp_path):
    """From noise to image: [-1, 1] as black to white in every frame; the last frame stays.

    Its chains are drawn with the same --variance as the samples.
    """
    script = load(MNIST)
    steps = []
    variances = set()
    usual = script.Diffusion.p_sample

    def p_sample(self, model, xt, t, *options, **named):
        if len(xt) == 8:  # the film's chains (--samples is 3)
            eps_hat = model(xt, torch.full((8,), t))
            x0_hat = (xt - (1 - self.alpha_bar[t]).sqrt() * eps_hat) / self.alpha_bar[t].sqrt()
            steps.append((t, torch.cat([xt, x0_hat]).float()))
            given = inspect.signature(usual).bind(self, model, xt, t, *options, **named)
            variances.add(given.arguments["variance"])
        return usual(self, model, xt, t, *options, **named)

    monkeypatch.setattr(script.Diffusion, "p_sample", p_sample)
    flags = ["--smoke", "--T", "70", "--samples", "3", "--variance", "beta_tilde"]
    script.main([*flags, "--out", str(tmp_path)])
    assert variances == {"beta_tilde"}
    assert [t for t, _ in steps] == list(range(70, 0, -1))
    expected = []
    for t, images in steps:
        if t % 2 == 1:  # every second one, so that 35 frames result
            grey = 255 * (images.clamp(-1, 1) + 1) / 2
            expected.append(grid(grey.byte().permute(0, 2, 3, 1).numpy(), columns=8))
    with Image.open(tmp_path / "denoising.gif") as film:
        pictures = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(film)]
        assert film.info["loop"] == 0
    assert len(expected) == 35 and sum(durations) == 100 * (35 + 15)
    assert durations[:30] == [100] * 30 and len(pictures) >= 35
    for picture, frame in zip(pictures, expected, strict=False):
        assert np.abs(picture.astype(int) - frame).max() <= 3
    assert np.abs(pictures[-1].astype(int) - expected[-1]).max() <= 3 and durations[-1] >= 1500
    height = expected[0].shape[0]
    with Image.open(tmp_path / "denoising.png") as picture:
        column = np.array(picture.convert("RGB")).astype(int)
    assert column.shape[0] == 6 * (height + 2) + 2
    for k, frame in enumerate(expected[::6]):
        top = 2 + k * (height + 2)
        assert np.abs(column[top : top + height, 2:-2] - frame).max() <= 1


@first_of([path for path in TRAIN if not path.endswith("progressive_training.py")])
def test_the_report_tells_training_from_sampling(path, monkeypatch, tmp_path, capsys):
    """By a clock on which a training step takes 1,000 s and a step of the sampler 1 s.

    The two scripts that train two networks report the time of everything together.
    """
    script = load(path)
    clock = [0]
    usual = script.UNet.forward

    def forward(self, *inputs, **named):
        clock[0] += 1000 if self.training and torch.is_grad_enabled() else 1
        return usual(self, *inputs, **named)

    monkeypatch.setattr(script.UNet, "forward", forward)
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    more = ["--nll", "2"] if path == PAPER else []
    script.main(["--smoke", "--samples", "10", *more, "--out", str(tmp_path)])
    report = capsys.readouterr().out.splitlines()[-1]
    seconds = [int(n) for n in re.findall(r"(\d+) s\b", report)]
    args = script.parse_args(["--smoke"])
    if "plot_loss" not in definitions(path):
        assert 1000 * args.steps < seconds[0] <= clock[0] and len(seconds) == 1
        return
    training, sampling = seconds
    previews = args.T if hasattr(args, "preview_every") else 0
    assert training == 1000 * args.steps + previews
    if path in (MNIST, CIFAR, PAPER):
        assert sampling == args.T
    else:  # several times, in as many steps
        assert args.T < sampling < 1000
