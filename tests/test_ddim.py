"""DDIM against exact trajectories of the toys of test_diffusion.py, against DDPM, and against diffusers."""
import math

import pytest
import torch
from conftest import having, load
from test_diffusion import MU, S, exact, gaussian_eps, mixture_eps, tables

MNIST = "pytorch_lowlevel/ddpm_mnist.py"


def start(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@having("ddim_timesteps")
def test_timesteps(script):
    assert script.ddim_timesteps(1000, 10) == list(range(1000, 0, -100))
    assert script.ddim_timesteps(1000, 10, "quadratic") == [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10]
    assert script.ddim_timesteps(7, 3) == [7, 5, 2]
    for T in (1, 2, 10, 57, 1000):
        for steps in {1, 2, 3, T // 3, T // 2, T - 1, T} & set(range(1, T + 1)):
            for spacing in ("uniform", "quadratic"):
                t = script.ddim_timesteps(T, steps, spacing)
                assert len(t) == steps and t[0] == T and t[-1] >= 1
                assert all(a > b for a, b in zip(t, t[1:], strict=False))
    assert script.ddim_timesteps(1000, 1000, "quadratic") == list(range(1000, 0, -1))


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_every_trajectory_of_gaussian_data_is_known(script, steps, spacing):
    """eps* makes each step affine in x_t: eta = 0 keeps (x_t - sqrt(ab) mu) on one line, and stretches it."""
    _, alpha_bar = tables()
    t = script.ddim_timesteps(1000, steps, spacing)
    x = xT = start(2, 1, 3, 3)
    centred = x - math.sqrt(alpha_bar[1000]) * MU
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        total = a * S**2 + 1 - a  # the variance of x_t; its covariances with x_0 and with eps give the two shares
        centred = centred * (math.sqrt(a * b) * S**2 + math.sqrt((1 - a) * (1 - b))) / total
    got = exact(script).ddim_sample(gaussian_eps(alpha_bar), None, steps, 0.0, spacing, clip=False, xT=xT)
    assert torch.allclose(got, centred + MU, atol=1e-6)
    if steps == 1000 and spacing == "uniform":  # close to the exact flow, which maps N(0, 1) to N(mu, s^2)
        assert (got - (MU + S * xT)).abs().max() < 0.02


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("eta", [0, 0.5, 1])
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_trajectories_of_a_mixture(script, steps, spacing, eta):
    """DDIM, Eq. 12 and 16, written out with numbers, and the same noise."""
    _, alpha_bar = tables()
    model, xT = mixture_eps(alpha_bar, [-0.6, 0.7], 0.1), start(2, 1, 4, 4)
    torch.manual_seed(1)
    got = exact(script).ddim_sample(model, None, steps, eta, spacing, clip=False, xT=xT)
    torch.manual_seed(1)
    t, x = script.ddim_timesteps(1000, steps, spacing), xT
    for now, then in zip(t, t[1:] + [0], strict=True):
        a, b = alpha_bar[now], alpha_bar[then]
        e = model(x, torch.tensor([now, now]))
        sigma = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(max(0, 1 - b - sigma**2)) * e
        if eta and then:
            x = x + sigma * torch.randn_like(x)
    assert torch.allclose(got, x, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_eta_1_over_all_steps_is_ddpm(script, variance):
    """Sampled by p_sample of ddpm_mnist.py with either variance, from the same x_T, with the same noise, clipped."""
    _, alpha_bar = tables()
    model, xT, ddpm = mixture_eps(alpha_bar, [-0.6, 0.7], 0.1), start(2, 1, 4, 4), exact(load(MNIST))
    torch.manual_seed(2)
    got = exact(script).ddim_sample(model, None, 1000, 1.0, xT=xT, variance=variance)
    torch.manual_seed(2)
    for t in range(1000, 0, -1):
        xT = ddpm.p_sample(model, xT, t, variance=variance)
    assert torch.allclose(got, xT, atol=1e-6)


@having("Diffusion.ddim_sample")
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers(script, eta):
    """Their t counts from 0, and "trailing" gives the same times as "uniform" here; x0_hat clipped, eps re-derived."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(1000, 1e-4, 0.02, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    assert [t + 1 for t in theirs.timesteps.tolist()] == script.ddim_timesteps(1000, 20)
    model, xT = mixture_eps(tables()[1], [-0.9, 1.1], 0.2), start(2, 1, 4, 4)
    torch.manual_seed(3)
    got = exact(script).ddim_sample(model, None, 20, eta, xT=xT)
    torch.manual_seed(3)
    for t in theirs.timesteps:
        noise = torch.randn_like(xT) if eta and t > 49 else torch.zeros_like(xT)
        eps_hat = model(xT, torch.full((2,), t + 1))
        xT = theirs.step(eps_hat, t, xT, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
    assert torch.allclose(got, xT, atol=1e-5)


@having("Diffusion.ddim_step")
def test_eps_is_derived_again_from_the_clipped_x0(script):
    """An x0_hat of 3 counts as 1, and the noise is then what makes x_t of that 1."""
    _, alpha_bar = tables()
    a, b, xt = alpha_bar[600], alpha_bar[300], torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    eps_hat = (xt - math.sqrt(a) * 3) / math.sqrt(1 - a)
    got = exact(script).ddim_step(lambda x, t: eps_hat, xt, 600, 300)
    assert torch.allclose(got, math.sqrt(b) + math.sqrt(1 - b) * (xt - math.sqrt(a)) / math.sqrt(1 - a), atol=1e-10)


@having("Diffusion.ddim_sample")
def test_ddim_is_a_function_of_xT_whatever_the_batch(script):
    model, xT = mixture_eps(tables()[1], [-0.6, 0.7], 0.1), start(5, 1, 4, 4)
    diffusion = exact(script)
    whole = diffusion.ddim_sample(model, None, 20, xT=xT)
    parts = [diffusion.ddim_sample(model, None, 20, xT=part) for part in xT.split(2)]
    assert torch.equal(whole, torch.cat(parts))
    torch.manual_seed(0)
    fresh = diffusion.ddim_sample(model, (5, 1, 4, 4), 20)
    torch.manual_seed(0)
    assert torch.equal(fresh, diffusion.ddim_sample(model, None, 20, xT=torch.randn(5, 1, 4, 4, dtype=torch.float64)))


@having("seeded_sample")
def test_samplers_share_x_T_and_their_noise_is_new(script):
    """For every eta, in every part of 500; z never repeats x_T, which equal seeds for the two would make it do."""
    _, alpha_bar = tables()
    seen = {}
    for eta in (0.0, 1.0):
        inputs = seen[eta] = []

        def model(xt, t, inputs=inputs):
            inputs.append(xt)
            return torch.zeros_like(xt)

        torch.randn(5)
        script.seeded_sample(exact(script), model, (510, 1, 4, 4), 2, 3, eta=eta, clip=False)
    assert [len(xt) for xt in seen[0.0]] == [500, 500, 10, 10]
    for k in (0, 2):
        xT, x500 = seen[1.0][k : k + 2]
        assert torch.equal(xT, seen[0.0][k]) and not torch.equal(xT[:10], seen[0.0][2 - k][:10])
        a, b = alpha_bar[1000], alpha_bar[500]
        z = (x500 - math.sqrt(b / a) * xT) / math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        assert abs(torch.corrcoef(torch.stack([z.flatten(), xT.flatten()]))[0, 1]) < 0.35


@having("Diffusion.ddim_invert")
def test_inversion_and_back_returns_to_the_start(script):
    """From data of the toys, over all steps; the x_T on the way is noise of the right size."""
    for model in (gaussian_eps(tables()[1]), mixture_eps(tables()[1], [-0.6, 0.7], 0.2)):
        x0 = torch.tensor([-0.5, -0.3, 0.1, 0.3, 0.5, 0.8], dtype=torch.float64).view(6, 1, 1, 1)
        diffusion = exact(script)
        xT = diffusion.ddim_invert(model, x0, 1000)
        back = diffusion.ddim_sample(model, None, 1000, clip=False, xT=xT)
        assert (back - x0).abs().max() < 1e-2 and (xT.diff(dim=0) > 0).all()
    assert torch.allclose(diffusion.ddim_invert(gaussian_eps(tables()[1]), x0, 1000), (x0 - MU) / S, atol=0.06)


@having("slerp")
def test_slerp_stays_on_the_arc(script):
    x, y = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    assert torch.allclose(script.slerp(x, y, 0.0), x) and torch.allclose(script.slerp(x, y, 1.0), y, atol=1e-6)
    assert torch.allclose(script.slerp(x, y, 1 / 3), 3 * torch.tensor([math.cos(math.pi / 6), 0.5, 0]), atol=1e-6)
