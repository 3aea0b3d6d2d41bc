"""The mathematics against answers known from outside the code. Everything in float64, so that equal
means equal.
"""

import math

import pytest
import torch
from conftest import MU, S, exact, gaussian_eps, having, mixture_eps, tables

# Forward process
# -------------------------------------------------------------------------------------------------


@having("linear_beta")
def test_linear_schedule(script):
    beta = script.linear_beta(1000)
    assert beta.dtype == torch.float64 and beta.shape == (1001,)
    assert beta[0] == 0 and beta[1] == 1e-4 and beta[1000] == 0.02
    assert beta[251].item() == pytest.approx(1e-4 + 0.0199 * 250 / 999, rel=1e-12)
    assert script.linear_beta(1).tolist() == [0, 1e-4]


@having("linear_beta", "Diffusion.__init__")
def test_tables(script):
    diffusion, (beta, alpha_bar) = exact(script), tables()
    assert diffusion.T == 1000
    assert diffusion.alpha_bar[0] == 1
    for t in (1, 250, 500, 750, 1000):
        assert diffusion.alpha_bar[t].item() == pytest.approx(alpha_bar[t], rel=1e-11)
    assert diffusion.alpha_bar[1000].item() == pytest.approx(4.0358e-5, rel=1e-4)  # x_T is noise
    assert torch.allclose(diffusion.alpha, torch.as_tensor(1 - beta), atol=1e-15)
    assert all(
        len(table) == 1001 for table in (diffusion.beta, diffusion.alpha, diffusion.beta_tilde)
    )
    assert script.Diffusion(script.linear_beta(10)).alpha_bar.dtype == torch.float32


@having("linear_beta", "Diffusion.q_sample")
def test_q_sample_equals_t_single_steps(script):
    """The closed form has the mean and the variance that t steps of q(x_t | x_{t-1}) build up one
    by one.
    """
    diffusion, (beta, _) = exact(script), tables()
    x0, zero = (
        torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, dtype=torch.float64),
    )
    mean, variance = 0.7, 0.0
    for t in range(1, 1001):
        mean, variance = math.sqrt(1 - beta[t]) * mean, (1 - beta[t]) * variance + beta[t]
        if t in (1, 2, 500, 1000):
            time = torch.tensor([t])
            assert diffusion.q_sample(x0, time, zero).item() == pytest.approx(mean, rel=1e-10)
            assert diffusion.q_sample(0 * x0, time, zero + 1).item() == pytest.approx(
                math.sqrt(variance), rel=1e-10
            )
    assert torch.equal(diffusion.q_sample(x0, torch.tensor([0]), zero + 5), x0)


@having("linear_beta", "Diffusion.q_sample")
def test_q_sample_takes_a_time_for_each_image(script):
    diffusion, (_, alpha_bar) = exact(script), tables()
    x0, eps, t = (
        torch.ones(3, 2, 4, 4).double(),
        torch.full((3, 2, 4, 4), 2.0).double(),
        torch.tensor([1, 500, 1000]),
    )
    xt = diffusion.q_sample(x0, t, eps)
    for image, step in zip(xt, t.tolist(), strict=True):
        expected = math.sqrt(alpha_bar[step]) + 2 * math.sqrt(1 - alpha_bar[step])
        assert torch.allclose(image, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


# Reverse process
# --------------------------------------------------------------------------------------------------


@having("linear_beta", "Diffusion.q_posterior")
@pytest.mark.parametrize("t", [2, 1000])
def test_posterior_is_bayes_rule(script, t):
    """q(x_{t-1} | x_t, x_0): the product of two Gaussians in x_{t-1}, precisions added."""
    diffusion, (beta, alpha_bar) = exact(script), tables()
    x0, xt = 0.4, -1.3
    ab, precision = alpha_bar[t - 1], 1 / (1 - alpha_bar[t - 1]) + (1 - beta[t]) / beta[t]
    mean = (math.sqrt(ab) * x0 / (1 - ab) + math.sqrt(1 - beta[t]) * xt / beta[t]) / precision
    image = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    for time in (t, torch.tensor([t, t])):
        got, variance = diffusion.q_posterior(x0 * image, xt * image, time)
        assert torch.allclose(got, mean * image, atol=1e-9)
        assert torch.allclose(variance, torch.tensor(1 / precision, dtype=torch.float64), rtol=1e-8)
    assert diffusion.beta_tilde[t].item() == pytest.approx(1 / precision, rel=1e-8)


@having("linear_beta", "Diffusion.q_posterior")
def test_posterior_at_the_last_step_is_x0(script):
    diffusion = exact(script)
    x0, xt = torch.randn(2, 1, 3, 3).double(), torch.randn(2, 1, 3, 3).double()
    mean, variance = diffusion.q_posterior(x0, xt, 1)
    assert torch.allclose(mean, x0, atol=1e-12) and variance.abs().max() == 0


@having("linear_beta", "Diffusion.predict_x0")
def test_predict_x0_undoes_q_sample(script):
    diffusion = exact(script)
    x0, eps, t = (
        torch.randn(3, 1, 4, 4).double(),
        torch.randn(3, 1, 4, 4).double(),
        torch.tensor([1, 400, 1000]),
    )
    assert torch.allclose(
        diffusion.predict_x0(diffusion.q_sample(x0, t, eps), t, eps), x0, atol=1e-10
    )


@having("linear_beta", "Diffusion.p_sample")
@pytest.mark.parametrize("variance, t", [("beta", 2), ("beta_tilde", 77), ("beta", 1000)])
def test_p_sample_is_algorithm_2(script, t, variance):
    """Unclipped, the step is (x_t - (1 - alpha_t) / sqrt(1 - alpha_bar_t) eps^) / sqrt(alpha_t) +
    sigma_t z.
    """
    diffusion, (beta, alpha_bar) = exact(script), tables()
    model = gaussian_eps(alpha_bar)
    xt = torch.randn(2, 1, 5, 5).double()
    torch.manual_seed(1)
    got = diffusion.p_sample(model, xt, t, clip=False, variance=variance)
    torch.manual_seed(1)
    z = torch.randn_like(xt)
    eps_hat = model(xt, torch.tensor([t, t]))
    sigma2 = {"beta": beta[t], "beta_tilde": (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]}[
        variance
    ]
    mean = (xt - beta[t] / math.sqrt(1 - alpha_bar[t]) * eps_hat) / math.sqrt(1 - beta[t])
    assert torch.allclose(got, mean + math.sqrt(sigma2) * z, atol=1e-10)


@having("linear_beta", "Diffusion.p_sample")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_last_step_adds_no_noise(script, variance):
    diffusion, (_, alpha_bar) = exact(script), tables()
    x1 = torch.randn(2, 1, 5, 5).double()
    steps = [
        diffusion.p_sample(gaussian_eps(alpha_bar), x1, 1, clip=False, variance=variance)
        for _ in range(2)
    ]
    assert torch.equal(*steps)


@having("linear_beta", "Diffusion.p_sample")
def test_x0_hat_is_clipped_before_the_mean(script):
    """With an x0_hat of 3 and of -3 the mean is that of 1 and of -1; the mean itself is left alone.
    """
    diffusion, (beta, alpha_bar) = exact(script), tables()
    t, xt = 300, torch.full((2, 1, 2, 2), 4.0, dtype=torch.float64)
    x0 = torch.tensor([3.0, -3.0], dtype=torch.float64).view(2, 1, 1, 1)
    eps_hat = (xt - math.sqrt(alpha_bar[t]) * x0) / math.sqrt(1 - alpha_bar[t])
    torch.manual_seed(0)
    got = diffusion.p_sample(lambda x, _: eps_hat, xt, t)
    torch.manual_seed(0)
    a, b = math.sqrt(alpha_bar[t - 1]) * beta[t], math.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1])
    mean = (a * x0.sign() + b * xt) / (1 - alpha_bar[t])
    assert torch.allclose(got, mean + math.sqrt(beta[t]) * torch.randn_like(xt), atol=1e-10)
    assert got.min() > 1  # were the mean clipped, it would lie in [-1, 1]


# Sampling -----------------------------------------------------------------------------------------
# ------------------


def affine_chain(T, variance):
    """Mean and variance of x_0 when x_T ~ N(0, 1) goes down the chain with eps*: two recursions
    over t.
    """
    beta, alpha_bar = tables(T)
    mean, var = 0.0, 1.0
    for t in range(T, 0, -1):
        total = alpha_bar[t] * S**2 + 1 - alpha_bar[t]
        slope = (1 - beta[t] / total) / math.sqrt(1 - beta[t])
        shift = beta[t] / total * math.sqrt(alpha_bar[t]) * MU / math.sqrt(1 - beta[t])
        sigma2 = {
            "beta": beta[t],
            "beta_tilde": (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t],
        }[variance]
        mean, var = slope * mean + shift, slope**2 * var + (sigma2 if t > 1 else 0)
    return mean, var


@having("linear_beta", "Diffusion.sample")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("T", [1, 20, 1000])
def test_statistics_of_samples_follow_the_recursion(script, T, variance):
    torch.manual_seed(0)
    n = 40_000
    model = gaussian_eps(tables(T)[1])
    x0 = exact(script, T).sample(model, (4, 1, 100, 100), clip=False, variance=variance)
    mean, var = affine_chain(T, variance)
    assert x0.mean().item() == pytest.approx(mean, abs=4.5 * math.sqrt(var / n))
    assert x0.var().item() == pytest.approx(var, rel=4.5 * math.sqrt(2 / n))


def test_the_recursion_ends_at_the_data():
    """The point of it all, and a check of the recursion above: at T = 1000 x_0 is N(mu, s^2)."""
    for variance in ("beta", "beta_tilde"):
        mean, var = affine_chain(1000, variance)
        assert mean == pytest.approx(MU, abs=1e-3) and math.sqrt(var) == pytest.approx(S, rel=0.02)


@having("linear_beta", "Diffusion.sample")
def test_sample_of_a_mixture_step_by_step(script):
    """The chain against one written here with the formulas of Algorithm 2 and the same noise."""
    beta, alpha_bar = tables(50)
    model, shape = mixture_eps(alpha_bar, [-0.8, 0.1, 0.9], 0.05), (3, 1, 8, 8)
    torch.manual_seed(5)
    got = exact(script, 50).sample(model, shape, clip=False)
    torch.manual_seed(5)
    x = torch.randn(shape, dtype=torch.float64)
    for t in range(50, 0, -1):
        eps_hat = model(x, torch.full((3,), t))
        x = (x - beta[t] / math.sqrt(1 - alpha_bar[t]) * eps_hat) / math.sqrt(1 - beta[t])
        if t > 1:
            x = x + math.sqrt(beta[t]) * torch.randn_like(x)
    assert torch.allclose(got, x, atol=1e-8)


@having("linear_beta", "Diffusion.sample")
def test_samples_of_a_mixture_find_its_modes(script):
    torch.manual_seed(0)
    x0 = exact(script).sample(mixture_eps(tables()[1], [-0.5, 0.5], 0.1), (2, 1, 40, 40))
    upper = x0[x0 > 0]
    assert len(upper) / x0.numel() == pytest.approx(0.5, abs=0.04)
    assert upper.mean().item() == pytest.approx(
        0.5, abs=0.02
    ) and upper.std().item() == pytest.approx(0.1, rel=0.1)


# Training objective -------------------------------------------------------------------------------
# --------------------


@having("linear_beta", "Diffusion.loss")
def test_loss_is_zero_for_the_perfect_answer_and_one_for_none(script):
    """If every image is the same, eps follows from x_t and t; a model that sees another t cannot
    know it.
    """
    diffusion, x0 = exact(script), torch.full((64, 1, 16, 16), 0.6, dtype=torch.float64)
    alpha_bar = torch.as_tensor(tables()[1])

    def oracle(xt, t):
        ab = alpha_bar[t].view(-1, 1, 1, 1)
        return (xt - ab.sqrt() * 0.6) / (1 - ab).sqrt()

    torch.manual_seed(0)
    assert diffusion.loss(oracle, x0).item() < 1e-20
    assert diffusion.loss(lambda xt, t: 0 * xt, x0).item() == pytest.approx(1, abs=0.05)


@having("linear_beta", "Diffusion.loss")
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_loss_draws_t_from_1_to_T_evenly(script, batch_size):
    """Both ends included, and each t equally often, whatever the batch; a time of its own for each
    image.
    """
    seen, x0 = [], torch.zeros(batch_size, 1, 1, 1, dtype=torch.float64)

    def model(xt, t):
        seen.append(t)
        return xt

    torch.manual_seed(0)
    diffusion = exact(script, 5)
    for _ in range(9000 // batch_size):
        diffusion.loss(model, x0)
    counts = torch.cat(seen).bincount(minlength=6).tolist()
    n = sum(counts)
    assert counts[0] == 0 and len(counts) == 6
    assert all(abs(count - n / 5) < 4.5 * math.sqrt(n * 1 / 5 * 4 / 5) for count in counts[1:])
    if batch_size == 1000:
        assert seen[0].unique().tolist() == [1, 2, 3, 4, 5]
