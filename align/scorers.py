"""What scores finished answers: a function of the user's or a reward model."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from align.rollout import ValueModel, in_pieces
from fledge.errors import InputError, RunError
from fledge.stream import Batch

Reward = Callable[[list[dict], list[str]], Sequence[float]]
"""(records of the prompts, responses) -> one score each."""


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
