"""The scripts that resume: a run that was stopped at any moment goes on to the same bits."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CIFAR, ROOT, each, first_of, having, load, one_line
from PIL import Image

PAPER = "paper/ddpm_paper.py"
RESUMABLE = [CIFAR, PAPER]
FLAGS = ["--smoke", "--steps", "10", "--device", "cpu", "--seed", "5", "--batch-size", "3"]
PICTURES = ["samples.png", "loss.png", "preview.png"]


def same(a, b):
    """Nested dicts, lists and tensors that are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def saved(folder, name="checkpoint.pt"):
    return torch.load(folder / name, weights_only=True)


def assert_same_run(folder, other):
    """Every file of a finished run, compared bit for bit."""
    for name in PICTURES:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("checkpoint.pt", "model.pt"):
        assert same(saved(folder, name), saved(other, name)), name
    samples = [np.load(out / "samples.npz")["arr_0"] for out in (folder, other)]
    assert np.array_equal(*samples)
    assert {p.name for p in folder.iterdir()} == {p.name for p in other.iterdir()}


def main(path, *flags):
    load(path).main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(path): the folder of a run of 10 training steps without a break."""
    done = {}

    def folder(path):
        if path not in done:
            done[path] = tmp_path_factory.mktemp("whole")
            main(path, *FLAGS, "--out", done[path])
        return done[path]

    return folder


# Stopped at every kind of moment ----------------------------------------------------------------


class Stop(BaseException):
    """As sudden as a kill: no script can catch it by `except Exception`."""


def stop_in_training(k):
    """The stop comes while the loss of training step k (from 1) is computed."""

    def patch(script, monkeypatch, error):
        count = []
        usual = script.Diffusion.loss

        def loss(self, model, x0):
            count.append(x0)
            if len(count) == k:
                raise error
            return usual(self, model, x0)

        monkeypatch.setattr(script.Diffusion, "loss", loss)

    return patch


def stop_in_update(script, monkeypatch, error):
    """In training step 6, after the optimiser and in the middle of the averaging of weights."""
    usual = script.update_ema

    def update_ema(ema, model, step):
        if step == 5:
            next(iter(ema.parameters())).fill_(7)
            raise error
        usual(ema, model, step)

    monkeypatch.setattr(script, "update_ema", update_ema)


def stop_in_saving(script, monkeypatch, error):
    """While the checkpoint of 4 training steps is being written: half of the file is there."""
    usual = torch.save

    def save(state, file):
        if len(state.get("losses", [])) == 4:
            file.write(b"half")
            raise error
        usual(state, file)

    monkeypatch.setattr(script.torch, "save", save)


def stop_in_preview(k):
    """While preview k (from 1) is generated. The second is due at the last training step."""

    def patch(script, monkeypatch, error):
        count = []
        usual = script.Diffusion.p_sample

        def p_sample(self, model, xt, t, *args, **options):
            if len(xt) == 16 and t == 3:
                count.append(t)
                if len(count) == k:
                    raise error
            return usual(self, model, xt, t, *args, **options)

        monkeypatch.setattr(script.Diffusion, "p_sample", p_sample)

    return patch


MOMENTS = {  # where the run stops, and the training steps that the last checkpoint then has
    "training step 3": (stop_in_training(3), 2),
    "training step 4": (stop_in_training(4), 2),
    "training step 8": (stop_in_training(8), 6),
    "update": (stop_in_update, 4),
    "saving": (stop_in_saving, 2),
    "preview": (stop_in_preview(1), 4),
    "last preview": (stop_in_preview(2), 8),
}


@first_of(RESUMABLE)
@pytest.mark.parametrize("error", [Stop, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment_it_goes_on_to_the_same_bits(
    path, moment, error, whole, tmp_path, monkeypatch, capsys
):
    """Ctrl-C samples with what was learned; the checkpoint is the one before the stop."""
    patch, steps = MOMENTS[moment]
    with monkeypatch.context() as context:
        patch(load(path), context, error)
        if error is Stop:
            with pytest.raises(Stop):
                main(path, *FLAGS, "--out", tmp_path)
        else:
            main(path, *FLAGS, "--out", tmp_path)
            assert "--resume" in capsys.readouterr().out
            assert (tmp_path / "samples.npz").exists() and (tmp_path / "model.pt").exists()
    assert len(saved(tmp_path)["losses"]) == steps
    main(path, "--resume", "--out", tmp_path)  # flags that are left out are those of the run
    assert_same_run(tmp_path, whole(path))


@first_of(RESUMABLE)
def test_stopped_again_and_again(path, whole, tmp_path, monkeypatch):
    """Every second attempt gets two training steps further."""
    attempts = 0
    more = FLAGS
    while True:
        attempts += 1
        assert attempts < 9
        with monkeypatch.context() as context:
            stop_in_training(3)(load(path), context, Stop)
            try:
                main(path, *more, "--out", tmp_path)
                break
            except Stop:
                more = ["--resume"]
    assert attempts == 5
    assert_same_run(tmp_path, whole(path))


def start(path, *flags):
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    hear = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return subprocess.Popen(command, preexec_fn=hear, **quiet)


@pytest.mark.slow
@each(RESUMABLE)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_as_a_program_it_goes_on_to_the_same_bits(path, how, whole, tmp_path):
    """A real signal, at a random moment after the first checkpoint."""
    with start(path, *FLAGS, "--steps", "100000", "--out", tmp_path) as process:
        until = time.time() + 240
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None and time.time() < until, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.Random(str(how)).random())
        process.send_signal(how)
        error = process.communicate(timeout=240)[1].decode()
    assert process.returncode == (0 if how == signal.SIGINT else -signal.SIGKILL), error
    assert "Traceback" not in error
    done = len(saved(tmp_path)["losses"])
    assert done % 2 == 0
    (tmp_path / "unbroken").mkdir()
    main(path, "--resume", "--steps", done + 3, "--out", tmp_path)
    losses = saved(tmp_path)["losses"]
    assert len(losses) == done + 3 and losses.isfinite().all()


# Longer runs, other flags -----------------------------------------------------------------------


@first_of(RESUMABLE)
def test_a_finished_run_resumed_repeats_its_files(path, whole, tmp_path):
    main(path, *FLAGS, "--out", tmp_path)
    main(path, "--resume", "--out", tmp_path)
    assert_same_run(tmp_path, whole(path))


@first_of(RESUMABLE)
def test_a_checkpoint_can_be_loaded(path, whole, tmp_path):
    """It is also a model.pt: --load generates the samples of the run."""
    source = whole(path) / "checkpoint.pt"
    n = len(np.load(whole(path) / "samples.npz")["arr_0"])
    main(path, "--load", source, "--seed", "5", "--samples", n, "--out", tmp_path)
    assert (tmp_path / "samples.png").read_bytes() == (whole(path) / "samples.png").read_bytes()
    assert not (tmp_path / "model.pt").exists()


@first_of(RESUMABLE)
def test_a_finished_run_can_be_made_longer(path, tmp_path, monkeypatch):
    """The rates go on as those of a run of 12 steps; the losses so far stay; new ones follow."""
    script = load(path)
    rates = []
    kind = "AdamW" if path == CIFAR else "Adam"

    class Recorder(getattr(torch.optim, kind)):
        def step(self):
            rates.append(float(self.param_groups[0]["lr"]))
            super().step()

    monkeypatch.setattr(script.torch.optim, kind, Recorder)
    flags = ["--smoke", "--lr", "0.5", "--out", tmp_path]
    main(path, *flags, "--steps", "6")
    before = saved(tmp_path)["losses"]
    main(path, "--resume", "--steps", "12", "--out", tmp_path)
    after = saved(tmp_path)
    if path == CIFAR:
        expected = [script.lr_factor(k, 6) for k in range(6)]
        expected += [script.lr_factor(k, 12) for k in range(6, 12)]
    else:
        expected = [min(1, (k + 1) / script.SMOKE["warm_up"]) for k in range(12)]
    assert rates == pytest.approx([0.5 * factor for factor in expected])
    assert torch.equal(after["losses"][:6], before)
    assert len(after["losses"]) == after["settings"]["steps"] == 12
    assert saved(tmp_path, "model.pt")["settings"]["steps"] == 12


def other_value(name, value):
    """A value of the flag that differs from that of the run."""
    others = dict(data="cifar10", schedule="cosine", variance="beta_tilde", data_root="elsewhere")
    return others.get(name) or value + 1


@first_of(RESUMABLE)
def test_what_must_not_change_is_refused_and_nothing_is_touched(path, whole, capsys):
    """Each setting in FIXED, by its flag; fewer steps than there are; --load. The same values pass.
    """
    folder = whole(path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    settings = saved(folder)["settings"]
    refused = set()
    for name in load(path).FIXED:
        flag = "--" + name.replace("_", "-")
        if name == "flip":
            words = ["--no-flip"]
        elif name in ("warm_up", "ranks"):  # they have no flag
            continue
        else:
            words = [flag, other_value(name, settings[name])]
        message = one_line(path, ["--resume", "--out", folder, *words], capsys)
        assert flag in message and str(settings[name]) in message
        refused.add(name)
    assert refused >= {"T", "batch_size", "lr", "data", "seed"}
    message = one_line(path, ["--resume", "--out", folder, "--steps", "7"], capsys)
    assert "--steps" in message
    message = one_line(path, ["--load", folder / "model.pt", "--resume", "--out", folder], capsys)
    assert "--resume" in message and "--load" in message
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    unchanged = ["--T", settings["T"], "--lr", settings["lr"], "--seed", "5"]
    assert load(path).parse_args(["--resume", "--out", str(folder), *map(str, unchanged)]).T == 10


@first_of(RESUMABLE)
def test_what_may_change_is_kept_unless_a_flag_changes_it(path, whole):
    folder = whole(path)
    settings = saved(folder)["settings"]
    kept = load(path).parse_args(["--resume", "--out", str(folder)])
    assert settings.keys() >= set(load(path).KEPT)
    assert all(getattr(kept, name) == value for name, value in settings.items())
    assert kept.unet == saved(folder)["network"]
    changed = 0
    for name in ("steps", "samples", "variance", "data_root"):
        other = other_value(name, settings[name])
        flags = ["--resume", "--out", str(folder), "--" + name.replace("_", "-"), str(other)]
        changed += getattr(load(path).parse_args(flags), name) == other
    assert changed == 4


@first_of(RESUMABLE)
def test_samples_of_another_number_after_resuming(path, whole, tmp_path):
    main(path, *FLAGS, "--out", tmp_path)
    main(path, "--resume", "--samples", "3", "--out", tmp_path)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 32, 32, 3)
    assert same(saved(tmp_path)["losses"], saved(whole(path))["losses"])


@first_of(RESUMABLE)
def test_nothing_to_resume_is_one_line(path, whole, tmp_path, capsys):
    """No checkpoint; half of one; a text; a model.pt, which has no optimiser; another script's."""
    [other] = [script for script in RESUMABLE if script != path]
    contents = [
        None,
        (whole(path) / "checkpoint.pt").read_bytes()[:999],
        b"not a checkpoint",
        b"",
        (whole(path) / "model.pt").read_bytes(),
        (whole(other) / "checkpoint.pt").read_bytes(),
        (ROOT / "assets/ddpm_cifar.pt").read_bytes(),
    ]
    for content in contents:
        if content is not None:
            (tmp_path / "checkpoint.pt").write_bytes(content)
        message = one_line(path, ["--resume", "--out", tmp_path], capsys)
        assert str(tmp_path / "checkpoint.pt") in message and "weights_only" not in message
        if content is not None:
            assert (tmp_path / "checkpoint.pt").read_bytes() == content
    assert one_line(path, ["--resume", "--out", tmp_path / "none"], capsys)
    assert not (tmp_path / "none").exists()


@first_of(RESUMABLE)
def test_a_run_goes_on_with_its_own_data_or_not_at_all(path, tmp_path, monkeypatch, capsys):
    """It began with CIFAR-10, which can no longer be had: photographs must not take its place."""
    script = load(path)
    photos = script.load_images("photos", "nowhere")[0]
    with monkeypatch.context() as patch:
        patch.setattr(script, "load_images", lambda *_: (photos[:700], "cifar10"))
        main(path, "--smoke", "--data", "cifar10", "--out", tmp_path)
    assert saved(tmp_path)["settings"]["data"] == "cifar10"
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def unreachable(*_, **__):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(script, "CIFAR10", unreachable)
    unreachable.base_folder = "cifar-10-batches-py"
    message = one_line(path, ["--resume", "--steps", "60", "--out", tmp_path], capsys)
    assert "700" in message and "--resume" in message
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@first_of(RESUMABLE)
def test_a_nan_keeps_the_checkpoint_before_it(path, tmp_path, monkeypatch, capsys):
    """The loss of training step 6, at which a checkpoint is due, is NaN."""
    script = load(path)
    count = []
    usual = script.Diffusion.loss

    def loss(self, model, x0):
        count.append(x0)
        return usual(self, model, x0) * (math.nan if len(count) == 6 else 1)

    monkeypatch.setattr(script.Diffusion, "loss", loss)
    message = one_line(path, [*FLAGS, "--out", tmp_path], capsys)
    assert "nan" in message and "--lr" in message and "6" in message
    assert len(saved(tmp_path)["losses"]) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "preview.png"}


@first_of(RESUMABLE)
def test_two_runs_in_one_folder_do_not_crash_each_other(path, whole, tmp_path, monkeypatch):
    """While one run writes its checkpoint, another one begins and ends in the same folder."""
    script = load(path)
    usual = torch.save
    nested = []

    def save(state, file):
        if len(state.get("losses", [])) == 4 and not nested:
            nested.append(True)
            main(path, *FLAGS, "--out", tmp_path)
        usual(state, file)

    monkeypatch.setattr(script.torch, "save", save)
    main(path, *FLAGS, "--out", tmp_path)
    assert nested
    assert_same_run(tmp_path, whole(path))


@pytest.mark.slow
@each(RESUMABLE)
def test_two_programs_in_one_folder(path, whole, tmp_path):
    processes = [start(path, *FLAGS, "--out", tmp_path) for _ in range(2)]
    for process in processes:
        error = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, error
    assert_same_run(tmp_path, whole(path))


# What a training step depends on ----------------------------------------------------------------


@having("seed_everything")
def test_every_training_step_of_every_seed_has_random_numbers_of_its_own(script, monkeypatch):
    """Pairs (seed, step) and triples (seed, step, rank), also those that a sum would confuse."""
    seeds = []
    monkeypatch.setattr(script.torch, "manual_seed", seeds.append)
    values = [*range(60), 10**7 - 1, 10**7, 10**7 + 1, 10**9, 4 * 10**6]
    for seed, step, rank in product(values, values, range(4)):
        script.seed_everything(seed, step, rank)
    assert len(set(seeds)) == len(seeds) == len(values) ** 2 * 4
    assert 0 <= min(seeds) and max(seeds) < 2**64
    by_run = {seed: [] for seed in (0, 1, 10**7)}
    for seed, found in by_run.items():
        for step in range(2000):
            seeds.clear()
            script.seed_everything(seed, step)
            found.append(seeds[0] % 2**32)  # all that a CPU's generator uses
    assert len(set(sum(by_run.values(), []))) > 5990  # a few may meet by chance, no series does


@first_of(RESUMABLE)
def test_what_a_step_sees_depends_on_seed_and_number_alone(path, tmp_path, monkeypatch):
    """Whatever was drawn before: the batch, the flips, t and the noise of a step are the same."""
    script = load(path)

    def inputs(*flags):
        seen = []

        def forward(self, xt, t):
            if torch.is_grad_enabled():
                seen.append((xt, t))
            return xt * self.first.bias[0]

        with monkeypatch.context() as patch:
            patch.setattr(script.UNet, "forward", forward)
            main(path, "--smoke", "--out", tmp_path, "--batch-size", "4", *flags)
        return seen

    long = inputs("--steps", "5")
    torch.randn(99)
    short = inputs("--steps", "3")
    other = inputs("--steps", "3", "--seed", "1")
    assert len(long) == 5 and same(long[:3], short)
    times = [tuple(t.tolist()) for _, t in long + other]
    assert len(set(times)) > 5
    for i, j in product(range(5), range(3)):
        assert not torch.equal(long[i][0], other[j][0])
        assert i == j or not torch.equal(long[i][0], long[j][0])


# What a checkpoint and a preview hold -----------------------------------------------------------


@first_of(RESUMABLE)
def test_a_checkpoint_holds_what_its_documentation_says(path, whole):
    script = load(path)
    checkpoint = saved(whole(path))
    text = script.save_checkpoint.__doc__
    assert checkpoint.keys() == {"network", "ema", "settings", "model", "optimizer", "losses"}
    assert all(name in text for name in checkpoint)
    model = script.UNet(**checkpoint["network"])
    weights = dict(model.named_parameters())
    assert checkpoint["model"].keys() == checkpoint["ema"].keys() == weights.keys()
    assert not same(checkpoint["model"], checkpoint["ema"])
    averages = checkpoint["optimizer"]["state"]
    assert len(averages) == len(weights)
    assert all(entry["step"] == 10 for entry in averages.values())
    assert checkpoint["losses"].shape == (10,) and checkpoint["losses"].dtype == torch.float32
    assert checkpoint["settings"]["task"] == script.TASK
    assert same(checkpoint["ema"], saved(whole(path), "model.pt")["ema"])


@first_of(RESUMABLE)
def test_the_preview_shows_16_images_of_the_averaged_network(path, tmp_path, monkeypatch):
    """Image k is drawn as the level 10 k, if the network that is asked is the average."""
    script = load(path)
    models = []

    def sample(self, model, shape, clip=True, variance="beta"):
        models.append((model.training, any(p.requires_grad for p in model.parameters())))
        levels = torch.arange(shape[0]).view(-1, 1, 1, 1) * 10 / 127.5 - 1
        return levels.expand(shape)

    monkeypatch.setattr(script.Diffusion, "sample", sample)
    main(path, *FLAGS, "--out", tmp_path)
    assert models == [(False, False)] * 3
    with Image.open(tmp_path / "preview.png") as picture:
        pixels = np.asarray(picture)
    side = pixels.shape[0] // 4
    found = [pixels[side // 2 + i * side, side // 2 + j * side] for i in range(4) for j in range(4)]
    assert [colour.tolist() for colour in found] == [[10 * k] * 3 for k in range(16)]


@first_of(RESUMABLE)
@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
def test_compile_compiles_the_network_that_is_trained(path, flag, whole, tmp_path, monkeypatch):
    """And a compiled run writes the same files: keys without a prefix."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self)))
    main(path, *FLAGS, flag, "--out", tmp_path)
    assert compiled == ([load(path).UNet] if flag == "--compile" else [])
    assert_same_run(tmp_path, whole(path))


@first_of(RESUMABLE)
def test_a_disk_that_fills_up_during_training_is_one_line(path, tmp_path, monkeypatch, capsys):
    """At the second checkpoint: the first one stays, and it can be resumed later."""
    usual = os.replace
    count = []

    def full(source, target):
        count.append(target)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        usual(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = one_line(path, [*FLAGS, "--out", tmp_path], capsys)
    assert "No space left" in message and str(tmp_path) in message
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert len(saved(tmp_path)["losses"]) == 2
