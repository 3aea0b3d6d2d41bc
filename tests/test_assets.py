"""The trained networks in assets/: small, safe to load, and better than chance on real images."""

import pytest
import torch
from conftest import CIFAR, MNIST, ROOT, load

FREE = "paper/classifier_free_guidance.py"
TRAINED = [("ddpm_mnist", MNIST), ("classifier_free_guidance", FREE), ("ddpm_cifar", CIFAR)]
if (ROOT / "assets/emoji.pt").exists():
    TRAINED.append(("emoji", CIFAR))


def known_images(name):
    """64 real images in [-1, 1], and their labels where the network takes them."""
    if name == "ddpm_mnist":
        found = load(MNIST).load_mnist("mnist5k", None)
    elif name == "classifier_free_guidance":
        found = load(FREE).load_labelled_mnist("mnist5k", None)
    else:
        found = load(CIFAR).load_images("photos", None)
    images, *labels = found[:-1]
    chosen = slice(None, None, len(images) // 64)
    x0 = images[chosen][:64] / 127.5 - 1
    return x0, [values[chosen][:64] for values in labels]


@pytest.mark.parametrize("name, path", TRAINED)
def test_a_trained_network_predicts_the_noise_in_real_images(name, path):
    """With the right t its loss is small; told a wrong one, it is several times larger."""
    file = ROOT / "assets" / f"{name}.pt"
    assert file.stat().st_size < 3_000_000
    saved = torch.load(file, weights_only=True)
    assert set(saved) == {"network", "ema", "settings"} and "/" not in str(saved["settings"])
    assert {weight.dtype for weight in saved["ema"].values()} == {torch.float16}
    network, T = load(path).load_model(file)
    assert T == 1000 and not network.training
    diffusion = load(path).Diffusion(load(path).linear_beta())
    x0, labels = known_images(name)

    def loss(told):
        torch.manual_seed(0)
        with torch.no_grad():
            return diffusion.loss(lambda xt, t: network(xt, told(t), *labels), x0).item()

    right = loss(lambda t: t)
    wrong = loss(lambda t: 1001 - t)
    assert right < 0.2 and wrong > 3 * right
