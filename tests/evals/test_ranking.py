"""Figures of held-out preferences against counting by hand."""

import numpy as np
import pytest

from fledge.evals import ranking

RANKS = np.array([[0, 1, -1], [1, 0, 1], [0, 0, 1]])
REWARDS = np.array([[2.0, 1.0, 9.0], [0.0, -1.0, 3.0], [0.5, 0.4, 0.0]])
LENGTHS = np.array([[3, 3, 0], [5, 4, 4], [1, 2, 3]])


def test_pairs_of_rankings_with_ties_and_missing_answers():
    found = ranking.decided(RANKS)
    assert list(zip(*(x.tolist() for x in found), strict=True)) == [
        (0, 0, 1),
        (1, 1, 0),
        (1, 1, 2),
        (2, 0, 2),
        (2, 1, 2),
    ]
    assert found.difference(REWARDS).tolist() == pytest.approx([1, -1, -4, 0.5, 0.4])
    assert [x.tolist() for x in ranking.tied(RANKS)] == [[1, 2], [0, 0], [2, 1]]


def test_figures_by_hand():
    likely = [0.9, 0.4, 0.2, 0.7, 0.6]
    found = ranking.figures(REWARDS, RANKS, LENGTHS, likely, margin=[3.0, 1.0, 2.0])
    assert sum(b["n"] for b in found["calibration"]) == 5
    # sizes .4, .5, 1 twice, 4
    assert [(b["accuracy"], b["n"]) for b in found["margins"]] == [(1, 1), (1, 1), (0.5, 2), (0, 1)]
    by_annotation = {b["low"]: (b["accuracy"], b["n"]) for b in ranking.by_size(
        np.array([1, -1, -4, 0.5, 0.4]), np.array([3.0, 1, 1, 2, 2]), bins=3)}  # fmt: skip
    assert by_annotation[1.0] == (0.0, 2)
    # better minus worse in tokens: 0, -1, 0, -2, -1
    length = found["length"]
    assert length["longer_is_better"] == 0 and length["accuracy_if_longer"] is None
    assert length["accuracy_if_shorter"] == pytest.approx(2 / 3) and (length["n_longer"], length["n_shorter"]) == (0, 3)
    assert length["longer_is_preferred"] == pytest.approx(1 / 3)
    gap, longer = np.array([1, -1, -4, 0.5, 0.4]), np.array([0, -1, 0, -2, -1])
    assert length["correlation"] == pytest.approx(gap @ longer / np.linalg.norm(gap) / np.linalg.norm(longer))
    # ties lie 3 and .1 apart, decided pairs 1, 1, 4, .5, .4
    assert found["ties"] == {"n": 2, "agreement": pytest.approx((1 / 5 + 1) / 2)}


def test_equal_rewards_are_right_by_half():
    """A coin for each: what a model that knows nothing is worth, whatever is asked of it."""
    gap, longer = np.array([0.0, 0.0, 2.0, -1.0]), np.array([3, -2, 1, -1])
    assert ranking.right(gap).tolist() == [0.5, 0.5, 1, 0]
    assert [(b["accuracy"], b["n"]) for b in ranking.by_size(gap, np.abs(gap), bins=2)] == [(0.5, 2), (0.5, 2)]
    found = ranking.length_bias(gap, longer)
    assert (found["accuracy_if_longer"], found["accuracy_if_shorter"]) == (0.75, 0.25)
    assert found["longer_is_preferred"] == 0.75  # coin, coin, longer, longer
    blind = ranking.figures(np.zeros((3, 3)), RANKS, LENGTHS, np.full(5, 0.5))
    assert [b["accuracy"] for b in blind["margins"]] == [0.5] and blind["ece"] == 0


def test_length_bias_of_a_model_that_knows_length_alone():
    rng = np.random.default_rng(0)
    longer = rng.integers(-9, 10, size=400)
    found = ranking.length_bias(2.0 * longer, longer)
    assert found["correlation"] == pytest.approx(1) and found["longer_is_preferred"] == 1
    assert (found["accuracy_if_longer"], found["accuracy_if_shorter"]) == (1, 0)
    blind = ranking.length_bias(rng.normal(size=400), longer)
    assert abs(blind["correlation"]) < 0.15


def test_disagreement_against_all_comparisons():
    rng = np.random.default_rng(1)
    spread, right = rng.integers(0, 5, size=60).astype(float), rng.random(60) < 0.6
    wins = [(a > b) + 0.5 * (a == b) for a in spread[~right] for b in spread[right]]
    assert ranking.disagreement(spread, right) == pytest.approx(np.mean(wins))
    assert ranking.disagreement(spread, np.ones(60, bool)) is None


def test_the_judge_of_two_answers():
    said = [{"chosen": " Yes"}, {"chosen": [{"role": "assistant", "content": "No"}]}, {"chosen": "No"}]
    assert ranking.agrees(said, ["Yes", " No ", "No way"]) == [1.0, 1.0, 0.0]
