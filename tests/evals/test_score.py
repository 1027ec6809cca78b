"""Intervals against the normal approximation in closed form, and against resampling by hand."""

import json
import math

import numpy as np
import pytest

from fledge.evals.score import Score, bootstrap, paired

Z = 1.959964  # the normal distribution's 97.5 % point


def normal(mean: float, error: float) -> tuple[float, float]:
    return mean - Z * error, mean + Z * error


def test_a_mean_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(2000) < 0.3
    error = math.sqrt(values.mean() * (1 - values.mean()) / 2000)
    assert bootstrap(values, n=4000) == pytest.approx(normal(values.mean(), error), abs=0.06 * error * Z)


def test_whole_clusters_are_drawn():
    """200 characters in 10 fonts, equal within a character: the error is that of 200 figures, not of 2000."""
    means = np.random.default_rng(2).normal(size=200)
    values, clusters = np.repeat(means, 10), np.repeat([f"U+{i:04X}" for i in range(200)], 10)
    error = means.std() / math.sqrt(200)
    assert bootstrap(values, clusters, n=4000) == pytest.approx(normal(means.mean(), error), abs=0.1 * error * Z)
    low, high = bootstrap(values, n=1000)
    assert high - low < 0.4 * 2 * Z * error


def test_clusters_of_different_size_are_a_ratio_of_sums():
    """Brute force: draw clusters one by one, put their values together, take the mean."""
    rng = np.random.default_rng(3)
    groups = [rng.normal(loc=size / 20, size=size) for size in rng.integers(1, 40, size=60)]
    draws = [np.concatenate([groups[i] for i in rng.integers(60, size=60)]).mean() for _ in range(4000)]
    clusters = np.repeat(np.arange(60), [len(g) for g in groups])
    expected, width = np.quantile(draws, [0.025, 0.975]), np.ptp(np.quantile(draws, [0.025, 0.975]))
    assert bootstrap(np.concatenate(groups), clusters, n=4000) == pytest.approx(expected, abs=0.06 * width)


def test_weights_make_a_weighted_mean():
    """Bits per byte of documents, weighted by bytes, is the same as one figure a byte."""
    rng = np.random.default_rng(4)
    sizes, bits = rng.integers(1, 30, size=50), rng.random(50)
    by_byte = bootstrap(np.repeat(bits, sizes), np.repeat(np.arange(50), sizes))
    assert bootstrap(bits, weights=sizes) == pytest.approx(by_byte)


def test_pairs_stay_together():
    """A shift of every example by the same amount has no error at all, however much the examples differ."""
    before = np.random.default_rng(5).normal(scale=100, size=300)
    assert paired(before, before + 0.25, clusters=np.arange(300) // 3) == pytest.approx((0.25, 0.25))
    noise = np.random.default_rng(6).normal(size=300)
    error = noise.std() / math.sqrt(300)
    assert paired(before, before + noise, n=4000) == pytest.approx(normal(noise.mean(), error), abs=0.08 * error * Z)
    with pytest.raises(ValueError, match="same examples"):
        paired([1.0], [1.0, 2.0])


def test_many_clusters_in_little_memory_and_the_same_seed_gives_the_same():
    values = np.random.default_rng(7).random(30_000)
    first = bootstrap(values, n=300)
    assert first == bootstrap(values, n=300) != bootstrap(values, n=300, seed=1)
    assert first == pytest.approx(normal(values.mean(), values.std() / math.sqrt(30_000)), abs=1e-3)


@pytest.mark.parametrize(("values", "clusters"), [([], None), ([1.0, 2.0], [1])])
def test_wrong_shapes_are_refused(values, clusters):
    with pytest.raises(ValueError, match="bootstrap"):
        bootstrap(values, clusters)


def test_a_score_survives_json():
    score = Score("bits per byte", 2.1, 40, 2.0, 2.2, before=8.0, higher_is_better=False, unit="documents")
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score
    odd = Score.from_dict(json.loads(json.dumps(Score("m", math.nan, 0, math.nan, math.inf).to_dict())))
    assert math.isnan(odd.after) and math.isnan(odd.high)
    assert Score.from_dict({**score.to_dict(), "of_tomorrow": 1}) == score


def test_honesty():
    up = {"after": 0.5, "n": 9, "low": 0.4, "high": 0.6}
    assert Score("m", **up, before=0.1, baseline=0.2).shortfall() == ""
    assert Score("m", **up, before=0.7, baseline=0.2).shortfall() == "does not beat its start"
    assert (
        Score("m", **up, before=0.1, baseline=0.45, baseline_name="pixels").shortfall()
        == "within chance of its baseline (pixels)"
    )
    assert Score("m", **up, before=0.5).shortfall() == "does not beat its start"
    assert Score("m", **up, baseline=0.55, higher_is_better=False).shortfall() == "within chance of its baseline"
    assert Score("m", **up, baseline=0.7, higher_is_better=False).shortfall() == ""
    assert Score("m", math.nan, 0, math.nan, math.nan, before=0.1).shortfall() == "does not beat its start"
    assert Score("m", **up).shortfall() == ""


def test_pairs_decide_where_they_are_known():
    """The figure's own interval holds the start, but every pair rose."""
    up = Score("m", 0.5, 9, 0.4, 0.6, before=0.45, gain=(0.02, 0.08))
    assert up.shortfall() == "" and Score.from_dict(json.loads(json.dumps(up.to_dict()))) == up
    unsure = Score("m", 0.5, 9, 0.4, 0.6, before=0.45, gain=(-0.02, 0.12), baseline=0.1, lead=(0.3, 0.5))
    assert unsure.shortfall() == "within chance of its start"
    down = Score("m", 2.0, 9, 1.5, 2.5, baseline=2.2, lead=(-0.3, -0.1), higher_is_better=False)
    assert down.shortfall() == ""
