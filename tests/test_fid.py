"""fid_is.py against closed forms and torch-fidelity, and what it says of bad input."""
import json

import numpy as np
import pytest
import torch
from conftest import load
from PIL import Image
from test_scores import features_with, random_cov

FID = "paper/fid_is.py"


def random_images(folder, n, size=(12, 12), seed=0, mode="RGB"):
    folder.mkdir()
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *size, 3), dtype=np.uint8)
    for i in range(n):
        Image.fromarray(pixels[i]).convert(mode).save(folder / f"{i:03}.png")
    return pixels


def test_moments_in_batches_are_those_of_all():
    moments, other = load(FID).Moments(7), load(FID).Moments(7)
    x = 100 + torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for part in x[:30].split(9):
        moments.update(part)
    other.update(x[30:])
    moments.merge(other.n, other.mean, other.scatter)
    mean, cov = moments.gaussian()
    assert torch.allclose(mean, x.mean(0), atol=1e-12) and torch.allclose(cov, x.T.cov(), atol=1e-12)


def test_fid_is_that_of_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one = features_with(torch.arange(20) / 10, random_cov(20, 0))
    two = features_with(torch.ones(20), random_cov(20, 1), n=250, seed=1)
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, (one, two)), False)
    assert load(FID).fid(one, two) == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)


def test_inception_score_of_known_answers():
    """Every image of every class alike: 1. Surely of one of ten classes, all as frequent: 10."""
    score = load(FID).inception_score
    assert score(torch.zeros(100, 10)) == pytest.approx((1, 0), abs=1e-12)
    assert score(1000 * torch.eye(10).repeat(10, 1)) == pytest.approx((10, 0), abs=1e-9)
    assert score(1000 * torch.eye(10)[torch.zeros(100, dtype=torch.long)]) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_is_that_of_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(500, 30, generator=torch.Generator().manual_seed(0))
    for splits in (1, 5, 10):
        mean, std = load(FID).inception_score(logits, splits)
        theirs = isc_features_to_metric(logits, splits, shuffle=False)
        assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
        assert std == pytest.approx(theirs["inception_score_std"], abs=1e-9)


def test_score_images_takes_every_image_once_in_any_size_of_batch():
    """Features that are a number of the image: mean and covariance of all, and of the first n of a fixed order."""
    script, images = load(FID), torch.arange(600).remainder(256).byte().view(600, 1, 1, 1)

    def extractor(part):
        x = part.flatten(1).double()
        return torch.cat([x, x**2], 1), torch.cat([x, 0 * x], 1) / 50

    gaussians, (score, _), _ = script.score_images(images, extractor, {75, 600})
    x = images.flatten().double()
    features = torch.stack([x, x**2], 1)
    assert torch.allclose(gaussians[600][0], features.mean(0)) and torch.allclose(gaussians[600][1], features.T.cov())
    assert set(gaussians) == {75, 600} and not torch.allclose(gaussians[75][0], gaussians[600][0])
    again, _, _ = script.score_images(images, extractor, {75})
    assert torch.equal(again[75][1], gaussians[75][1]) and 1 < score < 2


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of made weights for torch-fidelity's Inception."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        state = module.FeatureExtractorInceptionV3("made", ["2048"]).state_dict()
    factors = {"conv.weight": 3, "fc.weight": 0.02}  # so that images differ in features, and in logits not too much
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: factors.get(".".join(name.split(".")[-2:]), 1) * x for name, x in state.items()}, path)
    return path


def test_the_inception_path_gives_torch_fidelity_s_numbers(inception_weights, tmp_path):
    """The same made weights, the same two folders of PNGs, of different sizes: FID and Inception Score."""
    import torch_fidelity

    for name, n, size, seed in (("samples", 3, 12, 0), ("real", 4, 16, 1)):
        random_images(tmp_path / name, n, (size, size), seed)
    load(FID).main(
        ["--smoke", "--device", "cpu", "--samples", str(tmp_path / "samples"), "--reference", str(tmp_path / "real")]
        + ["--inception-weights", str(inception_weights), "--out", str(tmp_path / "out")]
    )
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())["table"]["samples"]
    theirs = torch_fidelity.calculate_metrics(
        **dict(input1=str(tmp_path / "samples"), input2=str(tmp_path / "real"), cuda=False, fid=True, isc=True),
        **dict(feature_extractor_weights_path=str(inception_weights), isc_splits=1, cache=False, verbose=False),
    )
    assert row["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert row["n"] == 3 and row["FID"] > 0
    extractor = load(FID).inception(str(inception_weights), torch.device("cpu"))
    images = load(FID).open_images(str(tmp_path / "samples"), 3)
    _, (score, _), _ = load(FID).score_images(images, extractor, {3}, splits=1)
    assert score - 1 == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3) and score > 1.001


def test_samples_that_are_the_reference(tmp_path):
    """Distance 0, whatever the file they come in; floats of [-1, 1] and of [0, 255] are the same as bytes."""
    script = load(FID)
    pixels = random_images(tmp_path / "folder", 40)
    np.savez(tmp_path / "bytes.npz", pixels)
    np.savez(tmp_path / "signed.npz", pixels.astype(np.float32) / 127.5 - 1)
    np.savez(tmp_path / "large.npz", pixels.astype(np.float32))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for name in ("folder", "bytes.npz", "signed.npz", "large.npz"):
        opened = script.open_images(str(tmp_path / name), 3)
        assert torch.equal(opened[torch.arange(40)], images)
    random_images(tmp_path / "grey", 3, mode="L")
    assert script.open_images(str(tmp_path / "grey"), 1)[torch.tensor([2, 0])].shape == (2, 1, 12, 12)


def extractor_of_pixels(images):
    x = images.flatten(1).float() / 255
    return x[:, :16], x[:, :10]


def test_identical_sets_are_0_apart_and_the_floor_is_not():
    script, images = load(FID), torch.randint(0, 256, (500, 1, 4, 4), dtype=torch.uint8)
    rows, curves = script.score_all({"samples": images}, images, extractor_of_pixels)
    assert abs(rows["samples"]["FID"]) < 1e-6 < rows["real images"]["FID"]
    assert rows["real images"]["n"] == 250 and list(curves["samples"]) == [62, 125, 250, 500]
    assert curves["samples"][62] > curves["samples"][250]  # the bias


BAD = ["empty", "mixed", "one", "text", "cut off", "nan", "range", "shape", "missing", "size"]


def test_a_reference_of_three_is_too_few_for_two_halves(tmp_path, capsys):
    random_images(tmp_path / "samples", 3), random_images(tmp_path / "real", 3)
    with pytest.raises(SystemExit) as stop:
        load(FID).main(["--samples", str(tmp_path / "samples"), "--reference", str(tmp_path / "real")])
    assert stop.value.code == 2 and "--reference: a score needs 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("bad", BAD)
def test_bad_samples_are_one_line(bad, tmp_path, capsys):
    folder = tmp_path / "samples"
    random_images(folder, 1 if bad == "one" else 4, size=(28, 28), mode="L")
    if bad == "empty":
        for path in folder.iterdir():
            path.unlink()
    elif bad == "mixed":
        Image.new("L", (9, 9)).save(folder / "zzz.png")
    elif bad == "text":
        (folder / "000.png").write_text("no image")
    elif bad == "cut off":
        (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:200])
    elif bad == "size":
        folder = tmp_path / "small"
        random_images(folder, 4)
    elif bad in ("nan", "range", "shape"):
        folder, array = tmp_path / "samples.npz", np.zeros((4, 28, 28, 1), dtype=np.float32)
        array[0, 0, 0, 0] = {"nan": np.nan, "range": 0.5, "shape": 1}[bad]
        np.savez(folder, array if bad != "shape" else array[0])
    elif bad == "missing":
        folder = tmp_path / "nowhere"
    flags = ["--smoke", "--device", "cpu", "--features", "classifier", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        load(FID).main([*flags, "--samples", str(folder)])
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fid_is.py: ")]
    assert stop.value.code == 2 and len(error) == 1
    assert not list(tmp_path.glob("out/*"))


def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "sprung",)

    torch.save(Trap(), tmp_path / "weights.pth")
    with pytest.raises(SystemExit):
        load(FID).inception(str(tmp_path / "weights.pth"), torch.device("cpu"))
    assert "--features inception" in capsys.readouterr().err and not (tmp_path / "sprung").exists()


def test_a_model_of_another_script_is_scored(tmp_path):
    mnist = load("pytorch_lowlevel/ddpm_mnist.py")
    mnist.main(["--smoke", "--out", str(tmp_path / "model")])
    load(FID).main(["--smoke", "--samples", str(tmp_path / "model" / "model.pt"), "--out", str(tmp_path / "out")])
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())["table"]
    assert set(table) == {"EMA", "raw weights", "real images"} and table["EMA"]["n"] == 12
