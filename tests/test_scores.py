"""The scores of samples: the Fréchet distance in closed form and against scipy, the classifier that gives features."""
import numpy as np
import pytest
import torch
from conftest import having


def features_with(mean, cov, n=400, seed=0):
    """n points whose sample mean and sample covariance are these, to rounding."""
    mean, cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def random_cov(d, seed):
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / d + 0.1 * torch.eye(d)


@having("fid")
def test_fid_of_diagonal_gaussians(script):
    """|mu1 - mu2|^2 + sum of (s1 - s2)^2, in closed form."""
    mu1, mu2 = [0.0, 1.0, 2.0], [1.0, 1.0, -1.0]
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 1.0])
    one, two = features_with(mu1, (s1**2).diag()), features_with(mu2, (s2**2).diag(), n=300, seed=1)
    assert script.fid(one, two) == pytest.approx(1 + 0 + 9 + 4 + 0 + 0.25, abs=1e-8)
    assert script.fid(one.float(), two.float()) == pytest.approx(14.25, abs=1e-4)


@having("fid")
def test_fid_of_full_gaussians(script):
    """Against scipy's square root of a matrix, and symmetric."""
    from scipy.linalg import sqrtm

    S1, S2 = random_cov(12, 0), random_cov(12, 1)
    mu1, mu2 = torch.arange(12) / 10, torch.ones(12)
    expected = ((mu1 - mu2) ** 2).sum().item() + np.trace(S1 + S2 - 2 * sqrtm((S1 @ S2).numpy()).real)
    one, two = features_with(mu1, S1), features_with(mu2, S2, seed=1)
    assert script.fid(one, two) == pytest.approx(expected, abs=1e-6)
    assert script.fid(two, one) == pytest.approx(expected, abs=1e-6)


@having("fid")
def test_fid_of_fewer_points_than_dimensions(script):
    """Rank-deficient: 20 points in 64 dimensions. The distance to themselves, and to themselves moved."""
    points = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).double()
    assert abs(script.fid(points, points)) < 1e-6
    assert script.fid(points, points + 0.5) == pytest.approx(64 * 0.25, abs=1e-6)
    zero = torch.zeros(5, 64)
    assert script.fid(points, zero) == pytest.approx((points.mean(0) ** 2).sum().item() + points.var(0).sum().item())


@having("train_classifier", "features_of")
def test_the_classifier_learns(script):
    """Squares at two places, in noise; its features are 64 numbers, of bytes and of floats the same."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randint(0, 120, (200, 1, 16, 16), dtype=torch.uint8)
    images[labels == 0, :, 2:6, 2:6] += 100
    images[labels == 1, :, 9:13, 9:13] += 100
    classifier = script.train_classifier(images, labels, torch.device("cpu"), 40)
    x = images.float() / 127.5 - 1
    assert (classifier(x).argmax(1) == labels).float().mean() == 1
    features = script.features_of(classifier, images)
    assert features.shape == (200, 64) and features.dtype == torch.float64
    assert torch.allclose(classifier.head(features.float()), classifier(x), atol=1e-4)
    assert torch.equal(script.features_of(classifier, x + 0.4 / 127.5), features)
    white, beyond = torch.full((1, 1, 16, 16), 255, dtype=torch.uint8), torch.full((1, 1, 16, 16), 5.0)
    assert torch.equal(script.features_of(classifier, beyond), script.features_of(classifier, white))
