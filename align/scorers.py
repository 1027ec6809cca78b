"""What scores finished answers: functions of the user's, reward models, ensembles of them, and weighted sums.

B answers, M members of an ensemble.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from align.rollout import ValueModel, closed_up, in_pieces
from fledge import distributed
from fledge.artifact import Artifact
from fledge.config import Config
from fledge.errors import InputError, RunError
from fledge.evals.reward import Judge
from fledge.models import reward_model
from fledge.stream import Batch

Reward = Callable[[list[dict], list[str]], Sequence[float]]
"""(records of the prompts, responses) -> one score each."""

Role = Literal["reward", "reward_2", "reward_3"]


class Ensemble(Config):
    """What several reward models make of one answer (Coste et al. 2023, https://arxiv.org/abs/2310.02743)."""

    objective: Literal["mean", "worst_case", "uncertainty_weighted"] = "mean"
    """The members' mean; the least of them; or the mean less ``coef`` times their variance."""
    coef: NonNegativeFloat = 0.1
    """Of the variance. The paper's for PPO."""


class Part(Config):
    """One term of a weighted sum: a function or a parent reward model."""

    function: str | None = None
    """``module:function``."""
    model: Role | None = None
    """The role of the parent."""
    weight: float = 1.0
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """What it is logged as, objective/reward_NAME; null: the function's name or the role."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Part":
        if (self.function is None) == (self.model is None):
            raise ValueError("a part of rewards is either function: module:function or model: a parent's role")
        return self

    @property
    def label(self) -> str:
        return self.name or self.model or str(self.function).rpartition(":")[2]


def check(reward: str | None, parts: Sequence[Part] | None) -> None:
    """Raise ValueError where a config's ``reward`` and ``rewards`` contradict each other."""
    if reward is not None and parts is not None:
        raise ValueError("reward and rewards are both given; name the function in a part of rewards")
    labels = [part.label for part in parts or ()]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two parts of rewards are called {', '.join(sorted(labels))}; give each a name of its own")


class Scorer:
    """What scores finished responses; ``batch`` holds input_ids, attention_mask and response_mask, and the prompts'
    ``inputs.NAME``. A scorer brings ``_figures``; what it gives is checked here, whatever it is."""

    name: str
    """In messages."""

    def __call__(self, records: list[dict], texts: list[str], batch: Batch) -> Tensor:
        """(B,)"""
        return self.figures(records, texts, batch)["score"]

    def figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        """The ``score``, and what else is worth logging beside it; (B,) each, on the CPU.

        Raises:
            RunError: the scores are not one finite number for each response. One NaN would make all advantages NaN,
                and under ``rollout.score_norm`` those of every later iteration.
        """
        found = self._figures(records, texts, batch)
        scores = found["score"]
        if scores.shape != (len(texts),):
            raise RunError(
                f"the reward {self.name} gave scores of shape {tuple(scores.shape)} for {len(texts)} responses; give "
                "one number for each"
            )
        if not scores.isfinite().all():
            row = int((~scores.isfinite()).nonzero()[0])
            raise RunError(f"the reward {self.name} is {scores[row].item()} for the response {texts[row]!r}")
        return found

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        """As ``figures``, unchecked."""
        raise NotImplementedError


class FunctionScorer(Scorer):
    """A user's function: (records, responses) -> one finite number each."""

    def __init__(self, function: Reward, name: str) -> None:
        self.function, self.name = function, name

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        try:
            given = self.function(records, texts)
        except Exception as error:  # whatever a user's code raises
            raise RunError(f"the reward {self.name} raised {_said(error)} {self._where(records, texts)}") from error
        try:
            return {"score": torch.as_tensor(given).detach().to("cpu", torch.float32)}
        except (TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"the reward {self.name} gave {type(given).__name__} ({_said(error)}); give a list of numbers, one for "
                "each response"
            ) from error

    def _where(self, records: list[dict], texts: list[str]) -> str:
        """The first row that raises when it is scored alone."""
        for row, (record, text) in enumerate(zip(records, texts, strict=True)):
            try:
                self.function([record], [text])
            except Exception:  # the same as before, of one row
                return f"at row {row} of {len(texts)}, for the response {text[:80]!r} to {_prompt(record)[:80]!r}"
        return f"for {len(texts)} responses together, though for none of them alone"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _prompt(record: dict) -> str:
    prompt = record.get("prompt", "")
    return prompt[-1]["content"] if isinstance(prompt, list) and prompt else str(prompt)


class ModelScorer(Scorer):
    """A reward model, read at the last real token by position and never by comparing ids with a pad id."""

    def __init__(self, model: Any, precision: str, micro_batch: int | None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.value, self.name = ValueModel(model.base_model, model.score), f"model {model.name_or_path}".rstrip()
        self.precision, self.micro_batch = precision, micro_batch

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        def last(piece: Batch) -> Tensor:
            rows, end = closed_up(piece, piece["response_mask"]), piece["attention_mask"].sum(dim=1, keepdim=True) - 1
            return self.value(**rows.inputs).gather(1, end).squeeze(1)

        raw = in_pieces(last, batch, self.precision, self.micro_batch)
        return {"score": reward_model.calibrated(self.model, raw)}


class TextScorer(Scorer):
    """A reward model that reads prompts and answers as texts: its tokenizer may be another."""

    def __init__(self, reward: Artifact, precision: str) -> None:
        self.judge, self.name = Judge(reward, precision), f"model {reward.path}"

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        return {"score": self.judge([record["prompt"] for record in records], texts)}


class EnsembleScorer(Scorer):
    """Several calibrated reward models as one, with the deviation of their scores as ``disagreement``."""

    name = "ensemble"

    def __init__(self, members: Sequence[Scorer], config: Ensemble) -> None:
        self.members, self.config = members, config

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        scores = torch.stack([member(records, texts, batch) for member in self.members])  # (M, B)
        variance, mean = torch.var_mean(scores, dim=0, correction=0)
        score = {
            "mean": mean,
            "worst_case": scores.amin(dim=0),
            "uncertainty_weighted": mean - self.config.coef * variance,
        }[self.config.objective]
        return {"score": score, "disagreement": variance.sqrt()}


class WeightedSum(Scorer):
    """Σ weight · score of named parts, each of which is a figure of its own: ``reward_NAME``, before its weight."""

    name = "weighted sum"

    def __init__(self, parts: Mapping[str, tuple[Scorer, float]]) -> None:
        self.parts = parts

    def _figures(self, records: list[dict], texts: list[str], batch: Batch) -> dict[str, Tensor]:
        found = {}
        for name, (scorer, _) in self.parts.items():
            figures = scorer.figures(records, texts, batch)
            found[f"reward_{name}"] = figures.pop("score")
            found |= {f"{figure}_{name}": x for figure, x in figures.items()}
        total = torch.stack([weight * found[f"reward_{name}"] for name, (_, weight) in self.parts.items()]).sum(dim=0)
        return {"score": total, **found}


def build(
    reward: str | None,
    parts: Sequence[Part] | None,
    ensemble: Ensemble | None,
    parents: Mapping[str, Artifact],
    precision: str,
    micro_batch: int | None,
) -> Scorer:
    """The reward of a config: a function, a weighted sum of parts, or the parent reward model.

    Raises:
        InputError: there is no such function or parent.
    """

    def of_model(role: str) -> Scorer:
        if role not in parents:
            raise InputError(f"rewards: a part asks for parents.{role}, which is not given; give its artifact")
        models = [model.to(distributed.device()) for model in reward_model.read(parents[role])]
        members = [ModelScorer(model, precision, micro_batch) for model in models]
        return members[0] if len(members) == 1 else EnsembleScorer(members, ensemble or Ensemble())

    def of_part(part: Part) -> Scorer:
        if part.function is not None:
            return FunctionScorer(callable_of(part.function, "rewards"), part.function)
        return of_model(str(part.model))

    if reward is not None:
        return FunctionScorer(callable_of(reward, "reward"), reward)
    if parts:
        return WeightedSum({part.label: (of_part(part), part.weight) for part in parts})
    if "reward" not in parents:
        raise InputError(
            "this stage needs a reward: parents.reward (a reward-model), reward: module:function, or rewards: a list"
        )
    return of_model("reward")


def of_texts(reward: Artifact, precision: str) -> Scorer:
    """A reward model, or an ensemble's mean, that judges answers of any model, whatever its tokens and template."""
    members = [TextScorer(member, precision) for member in reward_model.members(reward)]
    return members[0] if len(members) == 1 else EnsembleScorer(members, Ensemble())


def callable_of(name: str, key: str) -> Reward:
    """The function that ``module:function`` names, found from where the command was started too.

    That folder stays on ``sys.path``, behind everything else: the function may import from it when it is called.

    Raises:
        InputError: there is no such module or function, or the module raises while it is read.
    """
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise InputError(f"{key}: {name!r} should be module:function, such as my_rewards:short_answers")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises while it is read
        raise InputError(
            f"{key}: {name} cannot be imported ({_said(error)}{_line(error)}); give module:function of Python that is "
            "there"
        ) from error
    if not callable(found):
        raise InputError(f"{key}: {name} is {type(found).__name__}, not a function")
    return found  # type: ignore[return-value]  # what it takes and gives is seen when it is called


def _line(error: Exception) -> str:
    """The last line of the user's own Python that an import came through, if any."""
    ours = (__file__, importlib.__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    return f", {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
