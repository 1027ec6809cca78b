"""k-NN against the authors' numbers and a plain loop, at every awkward size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fledge.evals.knn import knn_correct, knn_votes

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_authors_numbers():
    t, truth = load_file(FIXTURES / "knn.safetensors"), json.loads((FIXTURES / "knn.json").read_text())
    for k, (top1, top5) in truth["knn_top1_top5"].items():
        for top, want in ((1, top1), (5, top5)):
            right = knn_correct(t["train"], t["train_labels"], t["test"], t["test_labels"], k=int(k), top=top)
            assert 100 * right.double().mean().item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("M", [0, 1, 99, 100])
@pytest.mark.parametrize("k", [1, 20, 1000])
def test_plain_loop_at_any_size(M, k):
    """Fewer test rows than the authors' 100 chunks, more neighbours than training rows."""
    g = torch.Generator().manual_seed(M + k)
    train, test = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (30, M))
    labels = torch.randint(0, 3, (30,), generator=g)
    have = knn_votes(train, labels, test, 4, k=k, batch=32)
    assert have.shape == (M, 4)
    for i in range(M):
        cosines = torch.stack([torch.cosine_similarity(test[i], row, dim=0) for row in train])
        want = torch.zeros(4, dtype=torch.float64)
        for j in cosines.argsort(descending=True)[:k]:
            want[labels[j]] += (cosines[j] / 0.07).exp()
        torch.testing.assert_close(have[i], want, rtol=1e-9, atol=1e-9)
