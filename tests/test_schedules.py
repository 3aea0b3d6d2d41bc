"""cosine_schedule.py: two schedules, and a comparison of them that is fair."""
import argparse
import math

import pytest
import torch
from conftest import having, load
from test_diffusion import MU, S, gaussian_eps, tables

COSINE = "paper/cosine_schedule.py"


@having("log_snr")
def test_log_snr(script):
    """0 where signal and noise are of one strength; t at which each schedule is there: closed forms."""
    alpha_bar = torch.tensor([0.5, 0.8], dtype=torch.float64)
    assert script.log_snr(alpha_bar).tolist() == pytest.approx([0, math.log(4)], abs=1e-12)
    snr = script.log_snr(script.Diffusion(script.cosine_beta(), dtype=torch.float64).alpha_bar[1:])
    assert (snr.diff() < 0).all() and abs(snr[495].item()) < 0.01  # cosine: f(t) = f(0) / 2 near t = 496


@having("respaced")
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_respaced_steps_have_the_alpha_bar_of_the_long_chain(script, schedule):
    long = script.SCHEDULES[schedule](1000)
    alpha_bar = (1 - long).cumprod(0)
    for steps in (10, 50, 333, 1000):
        beta, t = script.respaced(long, steps)
        assert t[0] == 0 and t[-1] == 1000 and len(t) == len(beta) == steps + 1 and (t.diff() > 0).all()
        assert torch.allclose((1 - beta).cumprod(0), alpha_bar[t], rtol=1e-10, atol=0)
    assert torch.allclose(beta, long, atol=1e-12)


@having("sample_with", "respaced")
@pytest.mark.parametrize("skip", [0, 0.2])
def test_sample_with_is_the_respaced_chain(script, skip):
    """With eps* of N(mu, s^2): mean and variance by the recursion over 50 of the 1,000 steps, from pure noise."""
    _, alpha_bar = tables()
    seen, ideal = [], gaussian_eps(torch.as_tensor(alpha_bar).float())

    def model(xt, t):
        seen.append(t[0].item())
        return ideal(xt, t)

    n = 90_000
    x0 = script.sample_with(model, script.linear_beta(), 50, skip, (1, 1, 300, 300), "cpu", 0)
    t = list(range(1000, 0, -20))[round(50 * skip) :]
    assert seen == t
    mean, var = 0.0, 1.0
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        total, beta = a * S**2 + 1 - a, 1 - a / b
        slope = (1 - beta / total) / math.sqrt(1 - beta)
        mean = slope * mean + beta / total * math.sqrt(a) * MU / math.sqrt(1 - beta)
        var = slope**2 * var + (1 - b) / (1 - a) * beta
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / n))
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / n))


@having("sample_with", "respaced")
def test_every_network_starts_from_the_same_noise(script):
    """Whatever was drawn before, and with or without the end of the chain."""
    starts = {}  # {t: x_t} where a chain begins

    def model(xt, t):
        starts.setdefault(t[0].item(), xt)
        return 0 * xt

    for skip in (0, 0.2):
        starts.clear()
        script.sample_with(model, script.cosine_beta(), 10, skip, (2, 1, 4, 4), "cpu", 3)
        first = starts[1000 - round(1000 * skip)]
        starts.clear()
        torch.randn(7)
        script.sample_with(model, script.linear_beta(), 10, skip, (2, 1, 4, 4), "cpu", 3)
        assert torch.equal(first, starts[1000 - round(1000 * skip)])


@having("loss_by_t")
def test_loss_by_t_tells_the_bands_apart(script):
    """Images of one colour, of which eps follows; the model that knows this lies above t = 500."""
    diffusion, images = script.Diffusion(script.linear_beta()), torch.full((3, 1, 8, 8), 200, dtype=torch.uint8)
    x0 = 200 / 127.5 - 1

    def model(xt, t):
        a = diffusion.alpha_bar[t].view(-1, 1, 1, 1)
        return torch.where(t.view(-1, 1, 1, 1) > 500, 0, 1) * (xt - a.sqrt() * x0) / (1 - a).sqrt()

    loss = script.loss_by_t(diffusion, model, images, 2000)
    assert loss.shape == (20,) and loss[:10].max() < 1e-5
    assert torch.allclose(loss[10:], torch.ones(10), atol=5 * math.sqrt(2 / 6400))


def test_nothing_but_the_schedule_differs():
    """Under one schedule given twice the two networks are equal, bit for bit; so are their weights at the start."""
    script = load(COSINE)
    args = argparse.Namespace(**{**script.SETTINGS, **script.SMOKE, "lr": 1e-3}, device="cpu")
    args.network = {"channels": 1, **args.network}
    images = script.load_images("strokes", None)[0]
    same, other = (script.Diffusion(beta(10)) for beta in (script.linear_beta, script.cosine_beta))
    models, emas = script.train_both({"linear": same, "cosine": same}, images, args)
    for networks in (models, emas):
        pairs = list(zip(networks["linear"].parameters(), networks["cosine"].parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q in pairs)
    models, _ = script.train_both({"linear": same, "cosine": other}, images, args)
    assert not torch.equal(models["linear"].first.weight, models["cosine"].first.weight)
