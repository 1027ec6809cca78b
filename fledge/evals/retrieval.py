"""Does a query find what it belongs to? Recall among all candidates, where several candidates may be right.

Q queries, N candidates ("keys"), D features of unit length. ``owner`` numbers say what belongs together: a picture is
right for a caption if both have the same owner, so that captions with several pictures need no special case.
"""

from math import comb

import numpy as np
import torch
from torch import Tensor


@torch.no_grad()
def right_ranks(queries: Tensor, keys: Tensor, query_owner: Tensor, key_owner: Tensor, chunk: int = 1024) -> Tensor:
    """(Q,) how many wrong keys come before the best right one, ties included: 0 is a hit at the first place.

    Counting ties against the query makes constant features score zero, not one.

    Args:
        queries: (Q, D). keys: (N, D). query_owner: (Q,). key_owner: (N,), where every query's owner occurs.
    """
    ranks = []
    for rows, owner in zip(queries.split(chunk), query_owner.split(chunk), strict=True):
        similarity = rows @ keys.T  # (q, N)
        right = owner[:, None] == key_owner[None, :]
        if not bool(right.any(dim=1).all()):
            raise ValueError("a query without a right key cannot be ranked")
        best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def recall_at(ranks: Tensor, k: int) -> np.ndarray:
    """(Q,) 1. where a right key stands among the first k."""
    return (ranks < k).double().cpu().numpy()


def chance(query_owner: Tensor, key_owner: Tensor, k: int) -> float:
    """Recall at k of a random order: 1 - C(N - m, k) / C(N, k) for a query with m right keys, averaged."""
    N, k = len(key_owner), min(k, len(key_owner))
    size = dict(zip(*(part.tolist() for part in key_owner.unique(return_counts=True)), strict=True))
    missed = [comb(N - size[owner], k) / comb(N, k) for owner in query_owner.tolist()]
    return 1 - sum(missed) / len(missed)
