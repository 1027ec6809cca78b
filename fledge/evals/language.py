"""Figures of language models on held-out documents, and the counts that they must beat.

N documents, B rows, T tokens, V vocabulary. Every figure comes as sums per document, so that a bootstrap can resample
documents. Nothing here draws from a global generator.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fledge import distributed
from fledge.data.text import IGNORE, Packed
from fledge.models.language import document_mask
from fledge.train import autocast


class PerDocument(NamedTuple):
    """Sums over the scored tokens of each document, (N,) each."""

    nats: np.ndarray
    bytes: np.ndarray
    tokens: np.ndarray
    correct: np.ndarray


def document_of_token(packed: Packed, ids: Sequence[int]) -> np.ndarray:
    """(B, T) number of the document in the split that each position of the rows ``ids`` belongs to, -1 at padding."""
    found = np.full((len(ids), packed.config.seq_len), -1, np.int64)
    for row, i in enumerate(ids):
        at = 0
        for piece in range(packed.index.rows[i], packed.index.rows[i + 1]):
            start, length = int(packed.index.start[piece]), int(packed.index.length[piece])
            found[row, at : at + length] = np.searchsorted(packed.tokens.offsets, start, side="right") - 1
            at += length
    return found


@torch.no_grad()
def score_documents(
    logits_of: Callable[[dict[str, Tensor]], Tensor],
    batch_of: Callable[[list[int]], dict[str, Tensor]],
    packed: Packed,
    token_bytes: Tensor,
    *,
    rows: int = 64,
    causal: bool,
) -> PerDocument:
    """Score every label of every row once.

    Args:
        logits_of: batch -> (B, T, V).
        batch_of: row ids -> batch with ``labels`` (B, T), -100 where nothing is scored. Shifted if ``causal``.
        token_bytes: (V,) bytes of each token, 0 for special ones; the tokens beyond are never labels.
    """
    sums = np.zeros((4, packed.documents))
    device = distributed.device()
    for start in range(0, len(packed), rows):
        ids = list(range(start, min(start + rows, len(packed))))
        batch = {name: tensor.to(device) for name, tensor in batch_of(ids).items()}
        labels = batch["labels"].cpu()
        logits = logits_of(batch).float()
        nats = F.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=IGNORE, reduction="none").cpu()
        correct = (logits.argmax(-1).cpu() == labels).numpy()
        documents, scored = document_of_token(packed, ids), (labels != IGNORE).numpy()
        size = token_bytes[labels.clamp(min=0)].numpy()
        for k, value in enumerate((nats.double().numpy(), size, np.ones_like(size), correct)):
            np.add.at(sums[k], documents[scored], value[scored])
    return PerDocument(*sums)


def causal_logits(model: Any, precision: str = "fp32") -> Callable[[dict[str, Tensor]], Tensor]:
    """Next-token logits of packed rows, documents isolated, dropout off."""

    def logits(batch: dict[str, Tensor]) -> Tensor:
        model.eval()
        mask = document_mask(batch["document"], causal=True)
        with autocast(precision):
            return model(
                input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position"], use_cache=False
            ).logits

    return logits


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    """Σ nats / (ln 2 · Σ bytes); special tokens have no bytes, so tokenizers can be compared."""
    return float(nats.sum() / (np.log(2) * size.sum()))


# ----------------------------------------------------------------------------------------------------------- baselines


class ByteTrigram:
    """An interpolated byte trigram: p = λ3·p3 + λ2·p2 + λ1·p1 + λ0/256, each p a relative frequency.

    The weights, which depend on how often the history was seen, maximise the likelihood of held-out text by EM
    (Jelinek and Mercer 1980). ``history`` starts with two zero bytes.
    """

    BUCKETS = np.array([0, 1, 3, 10, 30, 100, 1000])

    def __init__(self, fit: Sequence[bytes], tune: Sequence[bytes]) -> None:
        self.one, self.two, self.three = np.ones(256), np.zeros((256, 256)), Counter()
        self.pairs: Counter = Counter()
        for document in fit:
            codes = np.frombuffer(b"\0\0" + document, np.uint8).astype(np.int64)
            np.add.at(self.one, codes[2:], 1)
            np.add.at(self.two, (codes[1:-1], codes[2:]), 1)
            keys = (codes[:-2] << 16) | (codes[1:-1] << 8) | codes[2:]
            self.three.update(keys.tolist())
            self.pairs.update((keys >> 8).tolist())
        self.weights = np.full((len(self.BUCKETS) + 1, 4), 0.25)
        parts, bucket = self._parts(b"".join(tune)[:200_000])
        for _ in range(30):
            joint = self.weights[bucket] * parts
            share = joint / joint.sum(1, keepdims=True)
            for b in np.unique(bucket):
                self.weights[b] = share[bucket == b].mean(0)

    def _parts(self, document: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The four probabilities of every byte (n, 4), and the bucket of its history (n,)."""
        codes = np.frombuffer(b"\0\0" + document, np.uint8).astype(np.int64)
        a, b, c = codes[:-2], codes[1:-1], codes[2:]
        history = (a << 8) | b
        seen = np.array([self.pairs[h] for h in history.tolist()], float)
        three = np.array([self.three[k] for k in ((history << 8) | c).tolist()]) / np.maximum(seen, 1)
        two = self.two[b, c] / np.maximum(self.two.sum(1)[b], 1)
        parts = np.stack([three, two, self.one[c] / self.one.sum(), np.full(len(c), 1 / 256)], 1)
        return parts, np.searchsorted(self.BUCKETS, seen, side="right")

    def nats(self, document: bytes) -> np.ndarray:
        """-log p of every byte, (n,)."""
        parts, bucket = self._parts(document)
        return -np.log((self.weights[bucket] * parts).sum(1))


def neighbour_bigram(inputs: Tensor, maskable: Tensor, vocab: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The best guess of a token from the one on its left or on its right, whichever has been right more often.

    Args:
        inputs, maskable: (B, T) uncorrupted training rows and which tokens count.

    Returns:
        guess(left (n,), right (n,)) -> (n,) token ids; a masked or missing neighbour is -1.
    """
    common = int(torch.bincount(inputs[maskable], minlength=vocab).argmax())
    tables = []
    for shift in (-1, 1):
        neighbour = inputs.roll(-shift, dims=1)
        ok = maskable.clone()
        ok[:, 0 if shift == -1 else -1] = False
        pairs = Counter(zip(neighbour[ok].tolist(), inputs[ok].tolist(), strict=True))
        best: dict[int, tuple[int, int]] = {}
        totals: Counter = Counter()
        for (beside, token), count in pairs.items():
            totals[beside] += count
            if count > best.get(beside, (0, 0))[0]:
                best[beside] = (count, token)
        tables.append({beside: (count / totals[beside], token) for beside, (count, token) in best.items()})

    def guess(left: Tensor, right: Tensor) -> Tensor:
        none = (0.0, common)
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        return torch.tensor([max(tables[0].get(a, none), tables[1].get(b, none))[1] for a, b in pairs])

    return guess
