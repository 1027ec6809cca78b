"""Pretraining text beside PPO, so that what it does not reward is not forgotten: InstructGPT's PPO-ptx.

k rows of text stand beside each answer, L tokens long, so that a batch may be cut by rows as ever: (B, k, L).

    loss = policy_loss + vf_coef · value_loss + coef · mean over text tokens of -log π(next token)

On the coefficient. Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155, appendix C.4) give γ = 27.8 and 8 pretraining
examples for each episode; their objective (2) is a sum over the tokens of an example beside a sum over those of an
episode, and whether the code divides by tokens is not said. The number of examples is a sample size and not a weight:
both terms are expectations. In token means, as here, 27.8 on sums would be 27.8 · (tokens of an example / tokens of an
answer), far more. DeepSpeed-Chat multiplies a token mean by 27.8, and its README reports that this made its runs
unstable. So 27.8 is the published default, and about 1 is where to begin.
"""

from typing import Any

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from fledge.config import Config
from fledge.data.text import IGNORE, Packed, TextConfig
from fledge.models.language import document_mask, next_token_loss
from fledge.stream import Batch, Permutation

PREFIX = "ptx_"


class Pretraining(Config):
    """Text that the policy goes on predicting."""

    data: TextConfig
    coef: PositiveFloat = 27.8
    """Of the mean over text tokens. InstructGPT's; much, if its loss was no token mean: begin with 1."""
    rows: PositiveInt = 8
    """k, rows of ``data.seq_len`` tokens beside each answer of a minibatch; they are part of its micro-batch."""


class Text:
    """The rows of text, each once in every pass over them."""

    def __init__(self, config: Pretraining, tokenizer: Any, seed: int) -> None:
        self.k, self.seed = config.rows, seed
        self.packed = Packed(config.data, tokenizer, "train", style="causal")

    def beside(self, visits: list[int]) -> Batch:
        """For the visits of answers, numbered from the beginning of the run: ``ptx_*``, (B, k, L) int64 each."""
        wanted = [self.k * visit + j for visit in visits for j in range(self.k)]
        places = [divmod(number, len(self.packed)) for number in wanted]
        orders = {epoch: Permutation(len(self.packed), "ptx", self.seed, epoch) for epoch, _ in places}
        found = self.packed.rows([orders[epoch][i] for epoch, i in places])
        return {f"{PREFIX}{name}": x.unflatten(0, (len(visits), self.k)) for name, x in found.items()}


def tokens(batch: Batch) -> int:
    """Tokens that have a next one."""
    return int((batch[f"{PREFIX}labels"] != IGNORE).sum())


def loss(policy: nn.Module, batch: Batch) -> Tensor:
    """-log π of every next token of its own document, summed. ()"""
    ids, document, position, labels = (
        batch[f"{PREFIX}{name}"].flatten(0, 1) for name in ("input_ids", "document", "position", "labels")
    )  # (B · k, L)
    mask = document_mask(document, causal=True)
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    return next_token_loss(logits, labels)
