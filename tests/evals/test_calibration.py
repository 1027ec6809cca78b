"""Reliability diagrams against counting by hand, and against predictors whose error is known."""

import numpy as np
import pytest

from fledge.evals.calibration import reliability


def test_bins_are_those_counted_by_hand():
    predicted = [0.5, 0.54, 0.56, 0.72, 0.95, 1.0]
    observed = [1, 0, 0, 0.5, 1, 1]
    bins, error = reliability(predicted, observed, low=0.5, bins=5)
    assert [(b["n"], b["predicted"], b["observed"]) for b in bins] == [
        (3, pytest.approx(1.6 / 3), pytest.approx(1 / 3)), (1, 0.72, 0.5), (2, pytest.approx(0.975), 1.0)
    ]  # fmt: skip
    assert [b["low"] for b in bins] == pytest.approx([0.5, 0.7, 0.9]) and bins[-1]["high"] == 1
    assert error == pytest.approx(3 / 6 * 0.2 + 1 / 6 * 0.22 + 2 / 6 * 0.025)


def test_a_predictor_that_draws_by_its_own_probabilities_is_calibrated():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, size=200_000)
    _, error = reliability(p, rng.random(p.size) < p, low=0.5)
    assert error < 0.005
    _, sure = reliability(np.full(p.size, 0.99), rng.random(p.size) < 0.7)
    assert sure == pytest.approx(0.29, abs=0.005)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="2 predictions of 3 outcomes"):
        reliability([0.1, 0.2], [1, 0, 1])
