"""The trained networks in assets/."""
import pytest
import torch
from conftest import CIFAR, MNIST, ROOT, load

FREE = "paper/classifier_free_guidance.py"
TRAINED = [("ddpm_mnist", MNIST, "digits"), ("classifier_free_guidance", FREE, "digits")]
TRAINED += [("ddpm_cifar", CIFAR, "photos")]


@pytest.mark.parametrize("name, path, data", TRAINED)
def test_a_trained_network_knows_images(name, path, data):
    """Half-precision weights, no folder in the settings; it predicts noise in images that it has never seen."""
    saved, script = torch.load(ROOT / "assets" / f"{name}.pt", weights_only=True), load(path)
    assert set(saved) == {"network", "ema", "settings"} and "/" not in str(saved["settings"])
    assert {weight.dtype for weight in saved["ema"].values()} == {torch.float16}
    network, diffusion = script.UNet(**saved["network"]).eval(), script.Diffusion(script.linear_beta())
    network.load_state_dict(saved["ema"])
    images, *labels, _ = script.load_images(data, None)
    x0, *labels = (values[:: len(values) // 64][:64] for values in (images / 127.5 - 1, *labels))
    losses = []
    for told in (lambda t: t, lambda t: 1001 - t):  # the right t, and a wrong one
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(diffusion.loss(lambda xt, t, told=told: network(xt, told(t), *labels), x0).item())
    assert losses[0] < 0.2 and losses[1] > 3 * losses[0]
