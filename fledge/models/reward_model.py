"""Reward models: a transformer's trunk under a head of one number, read at an answer's last token.

Raw rewards are what the plain loader gives. Calibrated ones are (raw - offset) · scale; both stand in the model's
config as ``reward_offset`` and ``reward_scale``. B prompts of K answers, N answers, T positions.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fledge.artifact import Artifact
from fledge.models import language
from fledge.stream import Batch

KINDS = ("reward-model", "reward-ensemble")
MEMBERS = "members"
"""Where an ensemble's artifact keeps its models: ordinary reward models, each in a folder of its own."""


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """(N, T, D), (N, T) right-padded with 1 = real -> (N, D) at the last real token, found by position, not by id."""
    last = mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def raw_rewards(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of right-padded sequences (N, T): (N,), in fp32 at least.

    The trunk is causal, and padding stands behind the token that is read: it needs no mask, and attention without one
    is faster.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    with torch.autocast(ids.device.type, enabled=False):
        return model.score(last_token(hidden, mask).to(model.score.weight.dtype)).squeeze(-1)


def of_answers(model: Any, batch: Batch) -> Tensor:
    """Raw rewards of a batch of ``Preferences``: (B, K), 0 where there is no answer. One forward of each answer."""
    there = batch["ranks"] >= 0  # (B, K)
    ids, mask = batch["input_ids"][there], batch["attention_mask"][there]  # (N, T)
    longest = int(mask.sum(dim=1).max())
    raw = raw_rewards(model, ids[:, :longest], mask[:, :longest])
    return raw.new_zeros(there.shape).masked_scatter(there, raw)


def calibration(model: Any) -> tuple[float, float]:
    """(offset, scale) of a reward model; a calibrated reward is (raw - offset) · scale."""
    return float(getattr(model.config, "reward_offset", 0.0)), float(getattr(model.config, "reward_scale", 1.0))


def calibrated(model: Any, raw: Tensor) -> Tensor:
    """(raw - offset) · scale, of any shape."""
    offset, scale = calibration(model)
    return (raw - offset) * scale


def calibrated_head(model: Any) -> nn.Linear:
    """The head of a reward model with its calibration folded in, so that it starts on the scale of the scores."""
    offset, scale = calibration(model)
    head = nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight * scale)
        head.bias.fill_(-offset * scale)
    return head


def tie_threshold(model: Any) -> float | None:
    """The η that it learned ties with (Rao & Kupper 1967), in raw rewards; None: it learned from no ties."""
    return getattr(model.config, "reward_tie_threshold", None)


def template(preprocessing: dict[str, Any], tokens: Any) -> Literal["chat", "plain"]:
    """How conversations are written for a model: as its manifest says, else in its tokenizer's own template."""
    return preprocessing.get("template") or ("plain" if tokens.chat_template is None else "chat")


def members(artifact: Artifact) -> list[Artifact]:
    """The reward models that stand in an artifact: itself, or an ensemble's members in the order of their names."""
    if artifact.kind != "reward-ensemble":
        return [artifact]
    return [replace(artifact, path=folder) for folder in sorted((artifact.path / MEMBERS).iterdir())]


def read(artifact: Artifact) -> list[Any]:
    """The models of ``members``."""
    return [language.read(member, "AutoModelForSequenceClassification") for member in members(artifact)]


def read_tokenizer(artifact: Artifact) -> Any:
    """That of ``members``, which is one."""
    return language.read_tokenizer(members(artifact)[0])
