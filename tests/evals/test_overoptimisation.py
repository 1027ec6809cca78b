"""Gao et al.'s fit against data made by their formula, a grid and calculus; best of n against every subset."""

import itertools
import math

import numpy as np
import pytest

from fledge.evals.overoptimisation import best_of_n, best_of_n_kl, fit

KL = np.linspace(0.0, 36.0, 19)


def curve(form, kl, alpha, beta):
    """The paper's formulas, as they stand there."""
    d = [math.sqrt(k) for k in kl]
    if form == "rl":
        return np.array([x * (alpha - beta * math.log(x)) if x else 0.0 for x in d])
    return np.array([x * (alpha - beta * x) for x in d])


@pytest.mark.parametrize("form", ["rl", "best-of-n"])
@pytest.mark.parametrize("start", [None, 0.7])
def test_exact_data_give_their_parameters_back(form, start):
    found = fit(KL, 0.7 + curve(form, KL, 0.5, 0.2), form, start)
    assert (found.start, found.alpha, found.beta, found.r2) == pytest.approx((0.7, 0.5, 0.2, 1.0), abs=1e-9)
    assert found(KL) == pytest.approx(0.7 + curve(form, KL, 0.5, 0.2), abs=1e-9)
    assert found.alpha_interval == pytest.approx((0.5, 0.5), abs=1e-9)


@pytest.mark.parametrize("form", ["rl", "best-of-n"])
def test_the_peak_is_where_the_curve_is_highest(form):
    found = fit(KL, curve(form, KL, 0.5, 0.2), form)
    fine = np.linspace(0.01, 60, 600_000)
    heights = curve(form, fine, 0.5, 0.2)
    assert found.peak == pytest.approx(fine[heights.argmax()], rel=1e-3)
    d = math.sqrt(found.peak)
    assert heights.max() == pytest.approx(0.2 * d if form == "rl" else 0.5**2 / (4 * 0.2), rel=1e-6)


@pytest.mark.parametrize("form", ["rl", "best-of-n"])
def test_no_grid_point_fits_noisy_data_better(form):
    noisy = curve(form, KL, 0.5, 0.2) + np.random.default_rng(0).normal(size=len(KL)) * 0.05
    found = fit(KL, noisy, form, start=0.0)

    def error(alpha, beta):
        return ((curve(form, KL, alpha, beta) - noisy) ** 2).sum()

    around = np.linspace(-0.05, 0.05, 41)
    best = error(found.alpha, found.beta)
    assert all(error(found.alpha + a, found.beta + b) >= best - 1e-12 for a in around for b in around)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """200 noisy data sets: the 95 % interval of β and of the peak should hold the truth in about 190 of them."""
    rng, truth = np.random.default_rng(1), curve("rl", KL, 0.5, 0.2)
    found = [fit(KL, truth + rng.normal(size=len(KL)) * 0.05, n=200, seed=i) for i in range(200)]
    beta = sum(f.beta_interval[0] <= 0.2 <= f.beta_interval[1] for f in found)
    peak = sum(f.peak_interval[0] <= math.exp(2 * (0.5 / 0.2 - 1)) <= f.peak_interval[1] for f in found)
    assert 178 <= beta <= 200 and 178 <= peak <= 200


def test_a_curve_that_never_turns_has_no_peak():
    rising = fit(KL, curve("rl", KL, 0.5, -0.1))
    assert rising.peak == math.inf and rising.peak_interval == (math.inf, math.inf)
    assert fit(KL, curve("best-of-n", KL, -0.5, 0.1), "best-of-n").peak == 0


@pytest.mark.parametrize("kl", [[0, 1], [1, 1, 1, 1], [0.0, 0.0, 0.0, 4.0]])
def test_too_few_points_are_refused(kl):
    with pytest.raises(ValueError, match="cannot tell"):
        fit(kl, np.arange(len(kl)))


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        fit([0, 1, 2, math.nan], [0, 1, 2, 3])


# ------------------------------------------------------------------------------------------------------- best of n


def by_enumeration(proxy, value, n):
    """Every subset, every best answer in it."""
    total = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        tied = [value[i] for i in subset if proxy[i] == top]
        total.append(sum(tied) / len(tied))
    return sum(total) / len(total)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(n, ties):
    rng = np.random.default_rng(n)
    proxy, value = rng.normal(size=7), rng.normal(size=7)
    if ties:
        proxy = np.array([0, 1, 1, 1, 2, 2, 5.0])
        value[1:4], value[4:6] = value[1], value[4]  # answers that tie are the same answer
    assert best_of_n(proxy, value, n) == pytest.approx(by_enumeration(proxy, value, n), abs=1e-12)


def test_ties_are_broken_at_random():
    """Three answers tie at the top with values 0, 3, 6: whichever subset, their chances are the same."""
    assert best_of_n([1, 1, 1, 0], [0, 3, 6, 100], 4) == pytest.approx(3)
    assert best_of_n([1, 1, 1, 0], [0, 3, 6, 100], 2) == pytest.approx(3)  # no pair lacks one of the three


def test_best_of_one_is_the_mean_and_best_of_all_the_best():
    proxy, value = [3.0, 1.0, 2.0], [10.0, 20.0, 60.0]
    assert best_of_n(proxy, value, 1) == pytest.approx(30) and best_of_n(proxy, value, 3) == 10
    with pytest.raises(ValueError, match="best of 4"):
        best_of_n(proxy, value, 4)


def test_kl_of_best_of_n():
    """Its density beside the policy's is n u^(n-1) at quantile u: the integral of n u^(n-1) log(n u^(n-1))."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 2, 8):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx((density * np.log(density)).mean(), abs=1e-4)
