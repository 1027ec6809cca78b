"""What a rollout is made of: answers, what models say of them, and what scores them. ``align/ppo.py`` puts it together.

B rows, P prompt positions (padded on the left), T response positions (padded on the right), V vocabulary. In every
mask 1 is real. A batch holds ``input_ids``, ``attention_mask`` (B, P + T), ``response_mask`` (B, T), and more such.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from fledge import distributed
from fledge.data import chats, world
from fledge.data.chats import Prompts, RecordsConfig
from fledge.data.records import Split
from fledge.errors import InputError, RunError
from fledge.models.sampling import left_pad, position_ids, sample
from fledge.stream import Batch, cut
from fledge.train import autocast

Reward = Callable[[list[dict], list[str]], Sequence[float]]
"""(records of the prompts, responses) -> one score each."""


# -------------------------------------------------------------------------------------------------- prompts and answers


class PromptsConfig(RecordsConfig):
    """Prompts of any records: chats, preferences, or prompts alone. ``max_length`` is that of a prompt alone."""

    world_part: ClassVar[str] = "questions"
    messages: str = "messages"
    """The field with a list of {role, content}; its last answer is left off. Records without it have a prompt."""


def read_prompts(config: PromptsConfig, tokenizer: Any, split: Split) -> Prompts:
    """The prompts of a split, each once; answers that stand behind them are left off."""
    if config.source == "world":
        questions = chats.of_the_world(config, split, world.questions(split))
        found = ((f"world:{n}", record) for n, record in enumerate(questions))
    else:
        found = chats.read(config, split)
    records = []
    for where, record in found:
        said = record.get(config.messages)
        messages = chats.as_messages(chats.prompt_of(config, record, where) if said is None else said, "user", where)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        records.append({**record, "prompt": messages})
    form = {"template": config.template, "max_length": config.max_length, "overlong": config.overlong}
    return Prompts(records, tokenizer, split=split, **form)


def answer(
    policy: nn.Module,
    prompts: list[list[int]],
    seeds: list[int],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    precision: str,
    width: int = 0,
    rows: int | None = None,
) -> Batch:
    """input_ids, attention_mask (B, P + T) and response_mask (B, T), on the CPU.

    Prompts are padded to at least ``width``; at most ``rows`` are generated together.
    """
    pad_id = tokenizer.pad_token_id or 0
    ids, mask = left_pad(prompts, pad_id)
    left = (max(0, width - ids.shape[1]), 0)
    ids, mask = nn.functional.pad(ids, left, value=pad_id), nn.functional.pad(mask, left)
    found = []
    for piece in cut(len(ids), -(-len(ids) // (rows or len(ids)))):
        with autocast(precision):
            new = sample(
                policy,
                ids[piece].to(distributed.device()),
                mask[piece].to(distributed.device()),
                max_new_tokens=max_new_tokens,
                seeds=seeds[piece],
                temperature=temperature,
                eos_id=tokenizer.eos_token_id,
                pad_id=pad_id,
            )
        found.append([x.cpu() for x in new])
    new_ids, new_mask = (torch.cat(x) for x in zip(*found, strict=True))
    return {
        "input_ids": torch.cat([ids, new_ids], dim=1),
        "attention_mask": torch.cat([mask, new_mask], dim=1),
        "response_mask": new_mask,
    }


def decode(tokenizer: Any, batch: Batch) -> list[str]:
    """The responses as text, without special tokens."""
    rows = zip(responses(batch).tolist(), batch["response_mask"].sum(dim=1).tolist(), strict=True)
    return tokenizer.batch_decode([ids[:length] for ids, length in rows], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------------ what models say


def trim(batch: Batch) -> Batch:
    """Drop the columns that are padding in every row: left of the longest prompt, right of the longest response."""
    T = batch["response_mask"].shape[1]
    P = batch["input_ids"].shape[1] - T
    longest = batch.get("reward_mask", batch["response_mask"]).sum(dim=1).max()
    first, last = P - int(batch["attention_mask"][:, :P].sum(dim=1).max()), int(longest)
    columns = {P + T: slice(first, P + last), T: slice(0, last)}
    return {name: x[:, columns[x.shape[1]]] if x.ndim == 2 else x for name, x in batch.items()}


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that each response token was drawn from: those one position before it. (B, T, V)"""
    T = batch["response_mask"].shape[1]
    P = batch["input_ids"].shape[1] - T
    mask = batch["attention_mask"]
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=torch.arange(P - 1, P + T - 1, device=mask.device),
    )
    return out.logits


def responses(batch: Batch) -> Tensor:
    """The response tokens, (B, T)."""
    return batch["input_ids"][:, -batch["response_mask"].shape[1] :]


class ValueModel(nn.Module):
    """A transformer's trunk with one number a position."""

    def __init__(self, trunk: Any, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, S), (B, S) -> (B, S), in fp32: the head is outside autocast."""
        positions = position_ids(attention_mask)
        out = self.trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
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
    order = batch["response_mask"].sum(dim=1).argsort(stable=True)
    B, T = batch["response_mask"].shape
    found = []
    for piece in cut(B, -(-B // (most or B))):
        with autocast(precision):
            out = function(trim({name: x[order[piece]].to(distributed.device()) for name, x in batch.items()})).cpu()
        found.append(out if out.ndim == 1 else nn.functional.pad(out, (0, T - out.shape[1])))
    return torch.cat(found)[order.argsort()]


# -------------------------------------------------------------------------------------------------------------- rewards


class Scorer(Protocol):
    """What scores finished responses; ``batch`` holds input_ids, attention_mask and response_mask."""

    def __call__(self, records: list[dict], texts: list[str], batch: Batch) -> Tensor: ...


class FunctionScorer:
    """A user's function: (records, responses) -> one finite number each."""

    def __init__(self, function: Reward, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, records: list[dict], texts: list[str], batch: Batch) -> Tensor:
        scores = torch.as_tensor(self.function(records, texts), dtype=torch.float32).flatten().cpu()
        if len(scores) != len(texts):
            raise RunError(
                f"the reward {self.name} gave {len(scores)} scores for {len(texts)} responses; give one each"
            )
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise RunError(f"the reward {self.name} is {scores[row].item()} for the response {texts[row]!r}")
        return scores


class ModelScorer:
    """A reward model, read at the last real token by position and never by comparing ids with a pad id."""

    def __init__(self, model: Any, precision: str, micro_batch: int | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.value = ValueModel(model.base_model, model.score)
        self.precision, self.micro_batch = precision, micro_batch
        self.offset, self.scale = calibration(model)

    def __call__(self, records: list[dict], texts: list[str], batch: Batch) -> Tensor:
        def last(piece: Batch) -> Tensor:
            T = piece["response_mask"].shape[1]
            index = piece["input_ids"].shape[1] - T + piece["response_mask"].sum(dim=1) - 1
            return self.value(piece["input_ids"], piece["attention_mask"]).gather(1, index[:, None]).squeeze(1)

        return (in_pieces(last, batch, self.precision, self.micro_batch) - self.offset) * self.scale


def calibration(model: Any) -> tuple[float, float]:
    """(offset, scale) of a reward model; a calibrated score is (raw - offset) · scale."""
    return float(getattr(model.config, "reward_offset", 0.0)), float(getattr(model.config, "reward_scale", 1.0))


def calibrated_head(model: Any) -> nn.Linear:
    """The head of a reward model with its calibration folded in, so that it starts on the scale of the scores."""
    offset, scale = calibration(model)
    head = nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight * scale)
        head.bias.fill_(-offset * scale)
    return head


def callable_of(name: str, key: str) -> Reward:
    """The function that ``module:function`` names, found from where the command was started too.

    Raises:
        InputError: there is no such module or function.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise InputError(f"{key}: {name!r} should be module:function, such as my_rewards:short_answers")
    path, sys.path = sys.path, [*sys.path, os.getcwd()]
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{key}: {name} cannot be imported ({error}); give module:function of Python that is there"
        ) from error
    finally:
        sys.path = path
    if not callable(found):
        raise InputError(f"{key}: {name} is {type(found).__name__}, not a function")
    return found
