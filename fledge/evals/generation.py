"""Answers of a chat model to prompts, and how many of them are exactly right."""

from collections.abc import Sequence
from typing import Any

import torch

from fledge import distributed
from fledge.data.prompts import Prompts
from fledge.models.language import room
from fledge.models.sampling import sample
from fledge.stream import derive
from fledge.train import autocast


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    precision: str = "fp32",
    batch: int = 128,
) -> list[str]:
    """The model's answer to each of the prompts ``ids``, without special tokens; at temperature 0 the likeliest one.

    Prompts of similar length are answered together. What is drawn is the same at every call.
    """
    model.eval()
    order = sorted(range(len(ids)), key=lambda k: len(prompts.ids[ids[k]]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = {name: x.to(distributed.device()) for name, x in prompts.rows([ids[k] for k in some]).items()}
        with autocast(precision):
            said, mask = sample(
                model,
                rows["input_ids"],
                rows["attention_mask"],
                max_new_tokens=min(max_new_tokens, room(model, rows["input_ids"])),
                temperature=temperature,
                seeds=[derive("answer", ids[k]) for k in some],
                eos_id=tokenizer.eos_token_id,
                pad_id=prompts.pad_id,
            )
        for k, row, real in zip(some, said, mask.bool(), strict=True):
            found[k] = tokenizer.decode(row[real].tolist(), skip_special_tokens=True).strip()
    return [found[k] for k in range(len(ids))]


def exact(given: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """(N,) 1. where the answer is right to the letter, spaces aside."""
    same = [" ".join(a.split()) == " ".join(b.split()) for a, b in zip(given, wanted, strict=True)]
    return torch.tensor(same, dtype=torch.float32)
