"""What a rollout is made of: answers, and what models say of them. ``align/ppo.py`` puts it together.

B rows, P prompt positions (padded on the left), T response positions (padded on the right), V vocabulary. In every
mask 1 is real. A batch holds ``input_ids``, ``attention_mask`` (B, P + T), ``response_mask`` (B, T), and more such.
What a prompt brings beside its ids (pictures) is ``inputs.NAME`` (B, …), every model's argument NAME.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from align import rlhf
from fledge import distributed
from fledge.errors import RunError
from fledge.models.language import logits_at
from fledge.models.sampling import left_pad, sample
from fledge.stream import Batch, cut, longest_first, rows_of
from fledge.train import autocast

# ------------------------------------------------------------------------------------------------------------- answers


class Generator(Protocol):
    """What answers prompts: our sampler, or in its place vLLM, paged generation, or whatever else writes.

    It owes answers of the policy as it is when it is called: it is called at the first update of every iteration, on
    every rank with that rank's prompts, and must bring its copy of the weights up to date itself. It samples from
    softmax(logits / temperature), untruncated (no top-k, no top-p): that is what the losses take the policy to be.
    Its log-probabilities are never asked for. Those of the rollout come from the forward that training uses, because
    another kernel's differ: in bf16 by up to .05 in the ratio.
    """

    def __call__(self, prompts: list[list[int]], seeds: list[int], inputs: Batch) -> tuple[Tensor, Tensor]:
        """ids (B, T) and response_mask (B, T), int64 on the CPU, T = ``max_new_tokens``.

        Args:
            prompts: their ids, as they are, without padding.
            seeds: one a row. The same seed, prompt and weights give the same answer, or a resumed run is another run.
            inputs: what the prompts bring beside ids, (B, …) each, by the name of the model's argument; may be empty.

        The mask is 1 from the first token through the end-of-sequence inclusive, at least once, and 0 after it; an
        answer without an end-of-sequence has T tokens. Under the mask any id may stand.
        """
        ...


class Sampler:
    """The default: `fledge.models.sampling`, with a cache of keys and values, on the live policy itself."""

    def __init__(
        self,
        policy: nn.Module,
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        precision: str,
        rows: int | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.precision, self.rows = policy, tokenizer, precision, rows
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def __call__(self, prompts: list[list[int]], seeds: list[int], inputs: Batch) -> tuple[Tensor, Tensor]:
        pad_id = self.tokenizer.pad_token_id or 0
        ids, mask = left_pad(prompts, pad_id)
        found = []
        for piece in cut(len(ids), -(-len(ids) // (self.rows or len(ids)))):
            here = {name: x[piece].to(distributed.device()) for name, x in inputs.items()}
            with autocast(self.precision):
                new = sample(
                    self.policy,
                    ids[piece].to(distributed.device()),
                    mask[piece].to(distributed.device()),
                    max_new_tokens=self.max_new_tokens,
                    seeds=seeds[piece],
                    temperature=self.temperature,
                    eos_id=self.tokenizer.eos_token_id,
                    pad_id=pad_id,
                    inputs=here,
                )
            found.append([x.cpu() for x in new])
        new_ids, new_mask = (torch.cat(x) for x in zip(*found, strict=True))
        return new_ids, new_mask


def answer(
    policy: nn.Module,
    prompts: list[list[int]],
    seeds: list[int],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    precision: str,
    rows: int | None = None,
    inputs: Batch | None = None,
) -> Batch:
    """What ``policy`` says: input_ids, attention_mask (B, P + T), response_mask (B, T), on the CPU.

    At most ``rows`` are generated together. ``inputs``: as ``Generator`` has them.
    """
    sampler = Sampler(
        policy, tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, precision=precision, rows=rows
    )
    inputs = inputs or {}
    batch = joined(prompts, sampler(prompts, seeds, inputs), tokenizer.pad_token_id or 0)
    return batch | {f"{INPUTS}{name}": x for name, x in inputs.items()}


def joined(prompts: list[list[int]], said: tuple[Tensor, Tensor], pad_id: int, width: int = 0) -> Batch:
    """input_ids, attention_mask (B, P + T) and response_mask (B, T): prompts, padded to at least ``width``, and what
    was said behind them."""
    ids, mask = left_pad(prompts, pad_id)
    left = (max(0, width - ids.shape[1]), 0)
    ids, mask = nn.functional.pad(ids, left, value=pad_id), nn.functional.pad(mask, left)
    new_ids, new_mask = said
    return {
        "input_ids": torch.cat([ids, new_ids], dim=1),
        "attention_mask": torch.cat([mask, new_mask], dim=1),
        "response_mask": new_mask,
    }


def check_answers(
    said: tuple[Tensor, Tensor], shape: tuple[int, int], eos_id: int | None, vocabulary: int, name: str
) -> None:
    """Raise RunError where what a generator said is not what it owes (see ``Generator``).

    Args:
        vocabulary: how many ids the policy can read.
    """
    if not (isinstance(said, tuple | list) and len(said) == 2 and all(isinstance(x, Tensor) for x in said)):
        raise RunError(f"{name} gave {type(said).__name__}; it owes two tensors: ids and a response mask")
    ids, mask = said
    if (*ids.shape,) != shape or (*mask.shape,) != shape:
        raise RunError(f"{name} gave ids {[*ids.shape]} and a mask {[*mask.shape]}; it owes (rows, T) = {list(shape)}")
    for what, x in (("ids", ids), ("a mask", mask)):
        if x.dtype != torch.int64 or x.device.type != "cpu":
            raise RunError(f"{name} gave {what} of {x.dtype} on {x.device}; it owes torch.int64 on the cpu")
    strange = ids[(ids < 0) | (ids >= vocabulary)]
    if len(strange):
        raise RunError(
            f"{name} gave the id {strange[0].item()}; the policy reads 0 to {vocabulary - 1}. Behind the end of an "
            "answer, too: put its padding token there"
        )
    lengths = mask.sum(dim=1, keepdim=True)  # (B, 1)
    place = torch.arange(shape[1])
    if (lengths < 1).any() or not torch.equal(mask, (place < lengths).long()):
        raise RunError(f"{name} gave a response mask that is not a run of 1s from the first token on")
    ends = mask.bool() & (ids == (-1 if eos_id is None else eos_id))
    if (ends & (place < lengths - 1)).any():
        raise RunError(f"{name} gave an answer that goes on behind its end-of-sequence, token {eos_id}")
    if not (ends.any(dim=1) | (lengths[:, 0] == shape[1])).all():
        raise RunError(f"{name} gave an answer that neither ends in the end-of-sequence nor has {shape[1]} tokens")


def decode(tokenizer: Any, batch: Batch) -> list[str]:
    """The responses as text, without special tokens."""
    rows = zip(responses(batch).tolist(), batch["response_mask"].sum(dim=1).tolist(), strict=True)
    return tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------ what models say


INPUTS = "inputs."
OVER_ALL = ("input_ids", "attention_mask")
OVER_RESPONSES = (
    "response_mask", "reward_mask", "old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"
)  # fmt: skip
"""The fields of a batch whose second axis is prompt and response (P + T), or the response (T)."""


def trim(batch: Batch) -> Batch:
    """Drop the columns that are padding in every row: left of the longest prompt, right of the longest response."""
    T = batch["response_mask"].shape[1]
    P = batch["input_ids"].shape[1] - T
    longest = batch.get("reward_mask", batch["response_mask"]).sum(dim=1).max()
    first, last = P - int(batch["attention_mask"][:, :P].sum(dim=1).max()), int(longest)
    columns = dict.fromkeys(OVER_ALL, slice(first, P + last)) | dict.fromkeys(OVER_RESPONSES, slice(0, last))
    return {name: x[:, columns[name]] if name in columns else x for name, x in batch.items()}


def inputs_of(batch: Batch) -> Batch:
    """What the prompts bring beside ids, by the name of the model's argument."""
    return {name.removeprefix(INPUTS): x for name, x in batch.items() if name.startswith(INPUTS)}


class Rows(NamedTuple):
    """Prompts and responses as models read them fastest: without padding on the left, so that causal attention needs no
    mask, and what stands behind the end of a row does not matter."""

    inputs: dict[str, Tensor]
    """What a model is called with: input_ids (B, S), and what the prompts bring beside ids."""
    before: Tensor
    """(B, S) bool; True = the next token is one that was asked for."""


def closed_up(batch: Batch, mask: Tensor) -> Rows:
    """The rows of a batch; ``mask`` (B, T) says which response positions are asked for. Every prompt has a token."""
    T = mask.shape[1]
    ids, attention = batch["input_ids"], batch["attention_mask"]
    P = ids.shape[1] - T
    prompts = attention[:, :P].sum(dim=1, keepdim=True)  # (B, 1), their lengths
    column = torch.arange(int(attention.sum(dim=1).max()), device=ids.device)  # (S,)
    ids = ids.gather(1, (column + P - prompts).clamp(max=P + T - 1))
    before = (column >= prompts - 1) & (column < prompts - 1 + mask.sum(dim=1, keepdim=True))
    return Rows({"input_ids": ids, **inputs_of(batch)}, before)


def token_logits(model: Any, batch: Batch) -> Tensor:
    """The logits that each real response token was drawn from, row after row: no others are computed. (N, V)"""
    rows = closed_up(batch, batch["response_mask"])
    return logits_at(model, rows.before, **rows.inputs)


def response_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Of the response tokens under ``model``; 0 where there is none. (B, T)"""
    found = rlhf.token_logprobs(token_logits(model, batch), said(batch), temperature)
    return spread(found, batch["response_mask"])


def spread(numbers: Tensor, mask: Tensor) -> Tensor:
    """One number for each 1 of the mask, row after row, at its place; 0 elsewhere. (N,), (B, T) -> (B, T)"""
    return torch.zeros(mask.shape, dtype=numbers.dtype, device=numbers.device).masked_scatter(mask.bool(), numbers)


def said(batch: Batch) -> Tensor:
    """The real response tokens, row after row. (N,)"""
    return responses(batch)[batch["response_mask"].bool()]


def responses(batch: Batch) -> Tensor:
    """The response tokens, (B, T)."""
    return batch["input_ids"][:, -batch["response_mask"].shape[1] :]


class ValueModel(nn.Module):
    """A transformer's trunk with one number a position."""

    def __init__(self, trunk: Any, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """(B, S) without padding on the left, and what the prompts bring beside ids -> (B, S), in fp32: the head is
        outside autocast."""
        out = self.trunk(input_ids=input_ids, use_cache=False, **inputs)
        with torch.autocast(input_ids.device.type, enabled=False):
            return self.head(out.last_hidden_state.to(self.head.weight.dtype)).squeeze(-1)


def value_head(width: int, init: Literal["zero", "normal"]) -> nn.Linear:
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.bias)
    nn.init.normal_(head.weight, std=0.0 if init == "zero" else 1 / math.sqrt(width + 1))
    return head


@torch.no_grad()
def in_pieces(function: Callable[[Batch], Tensor], batch: Batch, precision: str, most: int | None) -> Tensor:
    """``function`` over at most ``most`` rows at a time, similar lengths together: (B,), or (B, t) padded to (B, T)."""
    order = longest_first(batch["attention_mask"])
    B, T = batch["response_mask"].shape
    found = []
    for piece in cut(B, -(-B // (most or B))):
        rows = {name: x.to(distributed.device()) for name, x in trim(rows_of(batch, order[piece])).items()}
        with autocast(precision):
            out = function(rows).cpu()
        found.append(out if out.ndim == 1 else nn.functional.pad(out, (0, T - out.shape[1])))
    return torch.cat(found)[order.argsort()]
