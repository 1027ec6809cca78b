"""Several reward models as one (Coste et al. 2023, https://arxiv.org/abs/2310.02743).

    python -m align.ensemble configs/align/ensemble_world.yaml parents.member_1=… parents.member_2=…

Nothing is trained: members are runs of ``align.reward`` with other seeds, data or parents. The artifact is a folder of
ordinary reward models, each of which transformers loads by itself; what reads it calibrates each and puts them
together.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt

from align import held_out
from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import StageConfig, hardware, parent
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.errors import InputError
from fledge.evals.ranking import decided, disagreement, right
from fledge.evals.score import Score
from fledge.models import language, reward_model
from fledge.track import Run, TrackConfig

WRITES = "reward-ensemble"


class Parents(BaseConfig):
    """Reward models that share a tokenizer."""

    member_1: str | None = parent("reward-model", required=True)
    member_2: str | None = parent("reward-model", required=True)
    member_3: str | None = parent("reward-model", required=False)
    member_4: str | None = parent("reward-model", required=False)
    member_5: str | None = parent("reward-model", required=False)
    member_6: str | None = parent("reward-model", required=False)
    member_7: str | None = parent("reward-model", required=False)
    member_8: str | None = parent("reward-model", required=False)


class Config(StageConfig):
    """Put reward models together, and measure what that is worth on held-out pairs."""

    stage: Literal["align.ensemble"] = "align.ensemble"
    parents: Parents = Parents()
    data: PreferencesConfig
    """The members' held-out pairs."""
    evaluation_pairs: PositiveInt = 1024
    """Held-out prompts with their answers at most."""
    evaluation_split: Literal["validation", "test"] = "test"
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    track: TrackConfig = TrackConfig()


def weights(member: Artifact) -> str:
    """What tells one model from another, whatever their runs are called."""
    return " ".join(
        sorted(file["sha256"] for name, file in member.manifest["files"].items() if name.endswith(".safetensors"))
    )


def check(parents: dict[str, Artifact], config: Config) -> None:
    """InputError unless the members read the same tokens of the same template, and are not one model twice."""
    first, *others = parents.values()
    for other in others:
        artifact.same_tokenizer(first, other)
    known: dict[str, str] = {}
    for role, member in parents.items():
        if (earlier := known.setdefault(weights(member), role)) != role:
            raise InputError(f"parents.{role} is the model of parents.{earlier} once more; give another one")
        template = reward_model.template(member.preprocessing, language.read_tokenizer(member))
        if template != config.data.template:
            raise InputError(
                f"data.template is {config.data.template}, but parents.{role} {member.path} reads {template}; give the "
                "members' own"
            )


def main(config: Config) -> Artifact:
    """Measure the members together and apart, and hand them over in one folder."""
    device = distributed.setup(config.device)
    parents = artifact.open_parents(config)
    check(parents, config)
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["member_1"])
        members = {role: reward_model.read(member)[0].to(device) for role, member in parents.items()}
        scores, figures = [], {}
        if run.measures:
            test = Preferences(config.data, tokens, config.evaluation_split, ties=True)
            scores, figures = evaluate(members, held_out.sample(test, config.evaluation_pairs), run)

        def save(folder: Path) -> None:
            for role, model in members.items():
                language.save(model, tokens, folder / reward_model.MEMBERS / role)

        first = next(iter(members.values()))
        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(first).__name__, "members": len(members)},
            preprocessing={
                "tokenizer": parents["member_1"].preprocessing.get("tokenizer"),
                "template": config.data.template,
            },
            data={"fingerprint": config.data.fingerprint()},
            step=0,
            **figures,
        )


def evaluate(members: dict[str, Any], asked: held_out.Sample, run: Run) -> tuple[list[Score], dict[str, Any]]:
    """Accuracy of the members' mean beside that of the mean member; and whether they disagree where they are wrong.

    Its probability of a choice is the mean of the members' own, each by its own scale and tie threshold: raw rewards of
    different members, and thresholds on them, cannot be compared, probabilities can.
    """
    raw = [asked.rewards(model, "fp32") for model in members.values()]
    given = torch.stack(
        [reward_model.calibrated(m, x) for m, x in zip(members.values(), raw, strict=True)]
    )  # (M, N, K)
    pairs = decided(asked.ranks())
    gaps = np.stack([pairs.difference(x) for x in given])  # (M, P)
    score = held_out.accuracy(asked, given.mean(dim=0), None)
    score = replace(score, baseline=float(right(gaps).mean()), baseline_name="the mean member")
    likely = np.mean(
        [
            held_out.probability(pairs.difference(x), reward_model.tie_threshold(m))
            for m, x in zip(members.values(), raw, strict=True)
        ],
        axis=0,
    )  # (P,)
    figures = held_out.figures(asked, given.mean(dim=0), likely)
    figures["disagreement"] = {
        "answers": float(given.std(dim=0, correction=0)[asked.ranks() >= 0].mean()),
        "pairs": float(gaps.std(axis=0).mean()),
        "larger_if_wrong": disagreement(gaps.std(axis=0), gaps.mean(axis=0) > 0),
    }
    run.samples("pairs", held_out.table(asked, given.mean(dim=0)), "Held-out pairs with their mean rewards")
    return [score], figures


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
