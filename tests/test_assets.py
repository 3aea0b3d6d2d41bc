"""The trained networks in assets/."""
import pytest
import torch
from conftest import MNIST, ROOT, load

FREE = "paper/classifier_free_guidance.py"
TRAINED = [("ddpm_mnist", MNIST, "digits"), ("classifier_free_guidance", FREE, "digits")]


@pytest.mark.parametrize("name, path, data", TRAINED)
def test_a_trained_network_knows_images(name, path, data):
    """Half-precision weights, no folder in the settings; it predicts noise in images that it has never seen."""
    saved, script = torch.load(ROOT / "assets" / f"{name}.pt", weights_only=True), load(path)
    assert set(saved) == {"network", "ema", "settings"} and "/" not in str(saved["settings"])
    assert {weight.dtype for weight in saved["ema"].values()} == {torch.float16}
    network, diffusion = script.UNet(**saved["network"]).eval(), script.Diffusion(script.linear_beta())
    network.load_state_dict(saved["ema"])
    images, *labels, _ = script.load_images(data, None)
    x0, labels = images[:64] / 127.5 - 1, [y[:64] for y in labels]
    for told, low, high in ((lambda t: t, 0.02, 0.2), (lambda t: 1001 - t, 0.3, 9.0)):  # the right t, and a wrong one
        torch.manual_seed(0)
        with torch.no_grad():
            assert low < diffusion.loss(lambda xt, t, told=told: network(xt, told(t), *labels), x0) < high
