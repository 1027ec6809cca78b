"""Retrieval and zero-shot measures against brute force and known answers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fledge.evals.retrieval import chance, recall_at, right_ranks
from fledge.evals.zero_shot import class_embeddings, fill, zero_shot_correct


def brute_force(queries, keys, query_owner, key_owner, k):
    """Sort all keys of each query in plain Python and look at the first k."""
    hits = []
    for query, owner in zip(queries.tolist(), query_owner.tolist(), strict=True):
        similar = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys.tolist()]
        order = sorted(range(len(similar)), key=lambda i: -similar[i])
        hits.append(any(key_owner[i] == owner for i in order[:k]))
    return np.array(hits, float)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_recall_with_several_pictures_of_a_caption(k, chunk):
    torch.manual_seed(1)
    text = F.normalize(torch.randn(30, 6, dtype=torch.float64), dim=1)
    owner = torch.cat([torch.arange(30), torch.randint(0, 30, (50,))])  # one to several pictures a caption
    image = F.normalize(text[owner] + 0.8 * torch.randn(80, 6, dtype=torch.float64), dim=1)
    number = torch.arange(30)
    for queries, keys, own, others in ((text, image, number, owner), (image, text, owner, number)):
        found = recall_at(right_ranks(queries, keys, own, others, chunk), k)
        expected = brute_force(queries, keys, own, others, k)
        assert np.array_equal(found, expected) and 0.05 < found.mean() < 1


def test_ties_count_against_the_query():
    same, number = torch.ones(5, 3), torch.arange(5)
    assert right_ranks(same, same, number, number).tolist() == [4] * 5


def test_a_query_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="without a right key"):
        right_ranks(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]), torch.tensor([1]))


def test_chance_is_the_recall_of_random_orders():
    number, owner = torch.arange(3), torch.tensor([0, 0, 0, 1, 2, 2])
    assert chance(owner, number, 1) == pytest.approx(1 / 3) and chance(number, owner, 99) == 1
    rng, hits = np.random.default_rng(0), []
    for _ in range(20_000):
        first = owner.numpy()[rng.permutation(6)[:2]]
        hits.append(np.mean([n in first for n in range(3)]))
    assert chance(number, owner, 2) == pytest.approx(np.mean(hits), abs=0.005)


def test_class_directions_are_mean_and_unit_length():
    table = {"a": [1.0, 0.0], "a?": [0.0, 1.0], "b": [0.6, -0.8]}
    classes = class_embeddings(lambda texts: torch.tensor([table[t] for t in texts]), [["a", "a?"], ["b"]])
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, -0.8]]))
    images = torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 0.0]])
    assert zero_shot_correct(images, classes, torch.tensor([0, 1, 1])).tolist() == [1, 1, 0]
    assert fill(["{}", "a picture of {}"], "cat") == ["cat", "a picture of cat"]
