"""Win rates against counting by hand, the sign test against its tables, length against made-up judges."""

import numpy as np
import pytest

from fledge.evals.preference import by_length, mean_difference, sign_test, win_rate


def test_a_tie_is_half_a_win():
    found = win_rate([1, 1, 0, 0, -1])
    assert found["rate"] == 0.6
    assert (found["wins"], found["ties"], found["losses"]) == (2, 2, 1)
    assert 0 <= found["low"] < 0.6 < found["high"] <= 1
    assert win_rate([0.5, -0.5])["rate"] == 0.5 and win_rate([0.5, 0.5])["rate"] == 0.75


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = win_rate(rng.choice([-1, 0, 1], p=[0.3, 0.2, 0.5], size=150))
        held += found["low"] <= 0.6 <= found["high"]
    assert 180 <= held <= 199


def test_prompts_of_one_character_count_once():
    """Forty copies of five prompts know no more than the five: the interval is that of five."""
    five = np.array([1, 1, 1, -1, 0])
    narrow, wide = win_rate(np.repeat(five, 40)), win_rate(np.repeat(five, 40), np.repeat(np.arange(5), 40))
    alone = win_rate(five)
    assert wide["high"] - wide["low"] == pytest.approx(alone["high"] - alone["low"], abs=0.02)
    assert narrow["high"] - narrow["low"] < 0.3 * (wide["high"] - wide["low"])


def test_winning_always_is_not_certainty():
    """Wilson 1927: of 10 out of 10 the interval begins at 10 / (10 + 1.96²)."""
    found = win_rate([1] * 10)
    assert (found["rate"], found["low"], found["high"]) == pytest.approx((1, 10 / (10 + 1.959964**2), 1))
    assert win_rate([1] * 10, [0] * 5 + [1] * 5)["low"] == pytest.approx(2 / (2 + 1.959964**2))


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    # Two-sided binomial probabilities: 2 · (1 + 10) / 1024, 2 / 32, and no evidence at all.
    [(9, 1, 22 / 1024), (1, 9, 22 / 1024), (5, 0, 2 / 32), (5, 5, 1.0), (0, 0, 1.0)],
)
def test_the_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


def test_the_sign_test_of_many():
    """Where counts are large, the normal approximation with continuity correction."""
    from math import erfc, sqrt

    assert sign_test(1100, 900) == pytest.approx(erfc((200 - 1) / sqrt(2000) / sqrt(2)), rel=0.02)


def test_the_difference_is_paired():
    first = np.random.default_rng(0).normal(size=400) * 10
    found = mean_difference(first, first + 0.5 + 0.1 * np.random.default_rng(1).normal(size=400))
    assert found["b"] - found["a"] == pytest.approx(found["difference"])
    assert 0.48 < found["low"] < 0.5 < found["high"] < 0.52


def test_a_judge_that_likes_length_is_found_out():
    rng = np.random.default_rng(0)
    first, second = rng.integers(5, 100, 500), rng.integers(50, 200, 500)
    found = by_length(np.sign(second - first), first, second)
    assert found["longer_wins"] == 1 and (found["a"], found["b"]) == (first.mean(), second.mean())
    near = [abs(a - b) <= 0.1 * max(a, b) for a, b in zip(first, second, strict=True)]
    assert found["similar"]["n"] == sum(near)
    liked = by_length(-np.sign(second - first), first, second)
    assert liked["longer_wins"] == 0


def test_without_lengths_that_differ_or_agree_nothing_is_said():
    assert by_length([1, -1], [3, 4], [3, 4])["longer_wins"] is None
    assert by_length([1, -1], [3, 4], [9, 9])["similar"] is None
    assert by_length([1, 0], [3, 4], [3, 4], [7, 7])["similar"]["rate"] == 0.75
