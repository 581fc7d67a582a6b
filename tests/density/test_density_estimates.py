"""What DensityNCELoss estimates and how well: against the theory of the estimator, maximum likelihood, and the truth.

The families here are smooth, so the error of an estimate is normal, with the covariance that Gutmann and Hyvarinen's
theorem 3 gives; it is taken at the true parameters from the sample itself. Runs are seeded; 4.5 standard errors would
be a chance of 1e-5 a number for a seed chosen blindly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import MultivariateNormal
from torch.func import grad, jacrev, vmap

from nce_ext.density import DensityNCELoss


def minimise(loss, start):
    """The parameters at the minimum, in float64."""
    theta = start.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    assert theta.grad.abs().max() < 1e-6
    return theta.detach()


def fit(log_f, x, noise, ratio, start):
    """theta [P], whose last element is log Z, fitted to x [N, d]."""
    y = noise.sample((len(x) * ratio,))
    log_q, log_q_y = noise.log_prob(x), noise.log_prob(y)
    loss_fn = DensityNCELoss(ratio)
    return minimise(lambda t: loss_fn(log_f(t, x), log_q, log_f(t, y), log_q_y, log_z=t[-1]), start)


def asymptotic_covariance(log_f, theta, x, noise, ratio):
    """Of the estimate from the N points x: (J^-1 - (1 + 1/ratio) J^-1 m m^T J^-1) / N, with P = 1 - sigmoid(z)."""
    score = vmap(grad(lambda t, point: log_f(t, point[None])[0] - t[-1]), (None, 0))(theta, x)
    z = log_f(theta, x) - theta[-1] - math.log(ratio) - noise.log_prob(x)
    weighted = score * torch.sigmoid(-z)[:, None]
    inverse = torch.linalg.inv(score.T @ weighted / len(x))
    mean = inverse @ weighted.mean(0)
    return (inverse - (1 + 1 / ratio) * torch.outer(mean, mean)) / len(x)


def assert_estimates(figures, estimate, theta, covariance):
    """figures(estimate) are those of theta to 4.5 standard errors, by the delta method."""
    jacobian = jacrev(figures)(theta)
    standard_error = (jacobian @ covariance @ jacobian.T).diagonal().sqrt()
    assert (standard_error < 0.1).all(), "too few points to tell anything"
    error = ((figures(estimate) - figures(theta)) / standard_error).abs()
    assert (error < 4.5).all(), f"in standard errors: {error.tolist()}"


def quadratic(theta, x):
    """b x - x A x / 2 in two dimensions; theta = (b, A's three, log Z)."""
    b, a = theta[:2], theta[2:5]
    return x @ b - 0.5 * (a[0] * x[:, 0] ** 2 + 2 * a[1] * x[:, 0] * x[:, 1] + a[2] * x[:, 1] ** 2)


def moments(theta):
    """Mean, covariance and log Z of ``quadratic``."""
    covariance = torch.linalg.inv(torch.stack([theta[2], theta[3], theta[3], theta[4]]).view(2, 2))
    return torch.cat([covariance @ theta[:2], covariance.flatten()[[0, 1, 3]], theta[5:]])


def gaussian(mean, covariance):
    """A Gaussian in float64, and the theta that ``quadratic`` has for it."""
    mean, covariance = torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)
    a = torch.linalg.inv(covariance)
    b = a @ mean
    log_z = 0.5 * (b @ mean) + math.log(2 * math.pi) + 0.5 * torch.logdet(covariance)
    return MultivariateNormal(mean, covariance), torch.cat([b, a.flatten()[[0, 1, 3]], log_z[None]])


DATA, THETA = gaussian([1.0, -0.5], [[1.5, 0.6], [0.6, 0.8]])
NEAR, _ = gaussian([0.5, 0.0], [[2.0, 0.0], [0.0, 2.0]])
FAR, _ = gaussian([4.0, 3.0], [[2.0, 0.0], [0.0, 2.0]])
START = torch.tensor([0.0, 0, 1, 0, 1, 0])


@pytest.mark.parametrize("ratio", [1, 10])
def test_recovers_a_gaussian_and_its_log_z(ratio):
    x = DATA.sample((20_000,))
    estimate = fit(quadratic, x, NEAR, ratio, START)
    assert_estimates(moments, estimate, THETA, asymptotic_covariance(quadratic, THETA, x, NEAR, ratio))


def two_components(theta, x):
    """log(N-like at m1 of width s1 + e^a times that at m2 of width s2); theta = (m1, m2, log s1, log s2, a, log Z)."""
    first = -0.5 * ((x - theta[:2]) ** 2).sum(1) * torch.exp(-2 * theta[4])
    second = theta[6] - 0.5 * ((x - theta[2:4]) ** 2).sum(1) * torch.exp(-2 * theta[5])
    return torch.logaddexp(first, second)


def test_recovers_a_mixture_and_its_log_z():
    means, widths, height = torch.tensor([[-2.0, 0.0], [1.5, 1.0]]), torch.tensor([0.6, 1.0]), 0.4
    mass = 2 * math.pi * torch.tensor([widths[0] ** 2, math.exp(height) * widths[1] ** 2])
    theta = torch.cat([means.flatten(), widths.log(), torch.tensor([height]), mass.sum().log()[None]]).double()
    second = torch.rand(20_000) < mass[1] / mass.sum()
    x = (means[second.long()] + widths[second.long(), None] * torch.randn(20_000, 2)).double()
    noise, _ = gaussian([0.0, 0.5], [[5.0, 0.0], [0.0, 2.0]])
    start = torch.tensor([-1.5, 0.5, 1, 0, 0, 0, 0, 0])
    estimate = fit(two_components, x, noise, 8, start)
    assert_estimates(lambda t: t, estimate, theta, asymptotic_covariance(two_components, theta, x, noise, 8))


def mean_squared_error(noise, ratio, reference, n=1000, repetitions=8):
    """Of mean, covariance and log Z against ``reference(x)``, over data sets that are the same for every call."""
    errors = []
    for seed in range(repetitions):
        torch.manual_seed(seed)
        x = DATA.sample((n,))
        estimate = fit(quadratic, x, noise, ratio, THETA.round(decimals=1))
        errors.append((moments(estimate) - reference(x)).square().sum().item())
    return np.mean(errors)


def test_noise_far_from_the_data_is_worse():
    """By the theorem's own figures, by more than a factor 5 here; half of it is asked for."""
    expected = []
    for noise in (NEAR, FAR):
        covariance = asymptotic_covariance(quadratic, THETA, DATA.sample((50_000,)), noise, 2)
        jacobian = jacrev(moments)(THETA)
        expected.append((jacobian @ covariance @ jacobian.T).trace().item())
    near, far = (mean_squared_error(noise, 2, lambda x: moments(THETA), n=2000) for noise in (NEAR, FAR))
    assert expected[1] > 5 * expected[0]
    assert far / near > 0.5 * expected[1] / expected[0], f"near {near}, far {far}"


def maximum_likelihood(x):
    _, theta = gaussian(x.mean(0).tolist(), x.T.cov(correction=0).tolist())
    return moments(theta)


def test_more_noise_brings_the_estimate_to_maximum_likelihood():
    """Its squared distance from the maximum-likelihood estimate falls as 1 / noise_ratio."""
    ratios = [1, 4, 16, 64]
    errors = [mean_squared_error(NEAR, ratio, maximum_likelihood) for ratio in ratios]
    assert errors == sorted(errors, reverse=True)
    slope = stats.linregress(np.log(ratios), np.log(errors)).slope
    assert -1.3 < slope < -0.7, f"{errors}"


def test_log_density_ratio_separates_what_is_out_of_distribution():
    """Better than the noise's own density does: here that one is highest where the data are not."""
    torch.manual_seed(1)
    side = torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)

    def data(n):
        return side[torch.randint(2, (n,))] + 0.5 * torch.randn(n, 2, dtype=torch.float64)

    x = data(4000)
    noise = MultivariateNormal(x.mean(0), x.T.cov())
    start = torch.tensor([-2.0, 0, 2, 0, 0, 0, 0, 0])
    theta = fit(two_components, x, noise, 4, start)
    loss_fn = DensityNCELoss(4, log_z=theta[-1].item())
    inside, outside = data(2000), noise.sample((2000,)) * torch.tensor([0.3, 1.0])
    ratio = [loss_fn.log_density_ratio(two_components(theta, p), noise.log_prob(p)).numpy() for p in (inside, outside)]
    density = [noise.log_prob(p).numpy() for p in (inside, outside)]
    auroc = [stats.mannwhitneyu(*pair).statistic / 2000**2 for pair in (ratio, density)]
    assert auroc[0] > 0.97
    assert auroc[1] < 0.6
    # E_p[log p - log q] is the divergence of the data from the noise, and E_q[p / q] is 1.
    sample = noise.sample((20_000,))
    weight = loss_fn.log_density_ratio(two_components(theta, sample), noise.log_prob(sample)).exp()
    assert abs(weight.mean() - 1) < 4.5 * weight.std() / math.sqrt(20_000)
    assert ratio[0].mean() > 0
