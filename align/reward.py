"""Reward models from pairs of answers (Christiano et al. 2017; Stiennon et al. 2020; Ouyang et al. 2022).

    python -m align.reward configs/align/reward_nplus.yaml

B pairs of a chosen and a rejected answer to one prompt; a reward is one number, read at an answer's last token.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import tokenizer
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.errors import InputError
from fledge.evals.calibration import reliability
from fledge.evals.score import Score, bootstrap
from fledge.evals.validation import validation
from fledge.models import language
from fledge.models.language import decay_exempt
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, Permutation, Rows, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, autocast, fit

WRITES = "reward-model"


class Parents(BaseConfig):
    model: str | None = parent("chat-model", required=True)
    """Chat model whose trunk and tokenizer the reward model takes over; its head is new."""


class Optim(OptimConfig):
    """Huang et al. 2024 (summarize_from_feedback_details): 3e-6, cosine, eps 1e-5, torch's decay, no clipping."""

    lr: float = 3e-6
    eps: float = 1e-5
    weight_decay: float = 0.01


class Train(TrainConfig):
    batch: PositiveInt = 64
    steps: Duration = "1 epoch"


class Config(StageConfig):
    """Pairwise reward modelling; the defaults are Huang et al. 2024's, with the model's own last token for EOS."""

    stage: Literal["align.reward"] = "align.reward"
    parents: Parents = Parents()
    data: PreferencesConfig
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Weight of mean (r_chosen + r_rejected)² (Eisenstein et al. 2023); 0: the offset alone centres rewards."""
    evaluation_pairs: PositiveInt = 1024
    """Held-out pairs at most."""
    evaluation_split: Literal["validation", "test"] = "test"
    """Pairs that give the figure; validation, to choose hyper-parameters by."""
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()


# -------------------------------------------------------------------------------------------------------- objective


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) right-padded with 1 = real -> (B, D) at the last real token, found by position, not by id."""
    last = mask.sum(dim=1) - 1
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry: Σ -log σ(r_chosen - r_rejected) over pairs (B,), (B,)."""
    return -F.logsigmoid(chosen - rejected).sum()


class RewardModel(nn.Module):
    """Give the chosen answer of each pair the higher reward."""

    def __init__(self, model: Any, center_rewards_coefficient: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.weights = {"loss": 1.0, "centre": center_rewards_coefficient}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        return dict.fromkeys(("loss", "accuracy", "margin", "centre"), len(batch["chosen_ids"]))

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch["chosen_mask"].sum() + batch["rejected_mask"].sum())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        chosen, rejected = self.pair_rewards(batch)  # (B,), (B,)
        margin = (chosen - rejected).detach()
        return {
            "loss": pairwise_loss(chosen, rejected),
            "centre": (chosen + rejected).square().sum(),
            "accuracy": (margin > 0).to(margin.dtype).sum(),
            "margin": margin.sum(),
        }

    def pair_rewards(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both answers in one forward, padded to the longer side: (B,), (B,)."""
        width = max(batch["chosen_ids"].shape[1], batch["rejected_ids"].shape[1])
        wide = {name: F.pad(x, (0, width - x.shape[1])) for name, x in batch.items()}
        ids = torch.cat([wide["chosen_ids"], wide["rejected_ids"]])
        mask = torch.cat([wide["chosen_mask"], wide["rejected_mask"]])
        chosen, rejected = self.rewards(ids, mask).chunk(2)
        return chosen, rejected

    def rewards(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw rewards (B,) of right-padded sequences (B, T), in fp32 at least."""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        with torch.autocast(ids.device.type, enabled=False):
            return self.model.score(last_token(hidden, mask).to(self.model.score.weight.dtype)).squeeze(-1)


def build(parent: artifact.Artifact, tokens: Any, seed: int) -> Any:
    """The parent's trunk under a new head of N(0, 1/(d+1)) (Stiennon et al. 2020)."""
    if tokens.pad_token_id is None or tokens.pad_token_id == tokens.eos_token_id:
        raise InputError(
            f"{parent.path}: the tokenizer's padding token is its end token, so a reward model would never see an "
            "answer end; give it a padding token of its own"
        )
    torch.manual_seed(derive("init", seed))
    model = language.read(
        parent, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=tokens.pad_token_id,
        expect_missing=["score."], expect_unexpected=["lm_head."],
    )  # fmt: skip
    nn.init.normal_(model.score.weight, std=1 / (model.score.in_features + 1) ** 0.5)
    return model


# ------------------------------------------------------------------------------------------------------------- stage


@torch.no_grad()
def rewards_of(objective: RewardModel, data: Preferences, ids: list[int], precision: str) -> tuple[Tensor, Tensor]:
    """Raw rewards of the pairs ``ids``: chosen (N,), rejected (N,)."""
    objective.eval()
    found = []
    for start in range(0, len(ids), 64):
        batch = {name: x.to(distributed.device()) for name, x in data.rows(ids[start : start + 64]).items()}
        with autocast(precision):
            found.append(torch.stack(objective.pair_rewards(batch)).cpu())
    chosen, rejected = torch.cat(found, dim=1)
    return chosen, rejected


def calibrate(model: Any, chosen: Tensor, rejected: Tensor) -> None:
    """Set offset and scale so that (raw - offset) · scale has mean 0 over chosen answers and unit deviation overall.

    Ouyang et al. set the bias so that demonstrations score 0. Both stand in the model's config: the plain loader gives
    raw rewards, PPO calibrated ones.
    """
    model.config.reward_offset = float(chosen.mean())
    model.config.reward_scale = float(1 / torch.cat([chosen, rejected]).std().clamp(min=1e-6))


def main(config: Config) -> artifact.Artifact:
    """Train, measure held-out pairs, calibrate, and hand the reward model over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["model"])
        train = Preferences(config.data, tokens, "train", at_least=config.train.batch)
        run.say(train.report())
        objective = RewardModel(build(parents["model"], tokens, config.seed), config.center_rewards_coefficient)
        language.check_length(objective.model, config.data.max_length, "data.max_length")
        stream = DataStream(len(train), train.rows, batch=config.train.batch, seed=config.seed, what="data")
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)

        def held_out() -> tuple[int, Rows]:
            pairs = Preferences(config.data, tokens, "validation")
            return len(pairs), pairs.rows

        watch = validation(objective, config.train, held_out)
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        reference = chosen_pairs(train, config.evaluation_pairs)
        calibrate(objective.model, *rewards_of(objective, train, reference, config.train.precision))
        scores, calibration = [], {}
        if run.measures:
            before = RewardModel(build(parents["model"], tokens, config.seed)).to(distributed.device())
            score, calibration = evaluate(objective, before, tokens, config, run)
            scores = [score]
        model = objective.model
        return run.publish(
            WRITES,
            lambda folder: language.save(model, tokens, folder),
            scores,
            architecture={"name": type(model).__name__, "parameters": language.size(model)},
            preprocessing={
                "tokenizer": tokenizer.digest(tokens),
                "template": config.data.template,
                "reward_offset": model.config.reward_offset,
                "reward_scale": model.config.reward_scale,
            },
            data={"fingerprint": config.data.fingerprint(), "pairs": len(train), "skipped": train.skipped},
            step=steps,
            **calibration,
        )


def chosen_pairs(data: Preferences, limit: int) -> list[int]:
    order = Permutation(len(data), "evaluation")
    return [order[i] for i in range(min(len(data), limit))]


def evaluate(
    objective: RewardModel, before: RewardModel, tokens: Any, config: Config, run: Run
) -> tuple[Score, dict[str, Any]]:
    """Held-out pairs in which the chosen answer has the higher reward, half of them being chance; and whether the
    probabilities that it gives to its choices, σ(|r_chosen - r_rejected|), are those with which they are right."""
    held_out = Preferences(config.data, tokens, config.evaluation_split)
    ids = chosen_pairs(held_out, config.evaluation_pairs)
    chosen, rejected = rewards_of(objective, held_out, ids, config.train.precision)
    first_chosen, first_rejected = rewards_of(before, held_out, ids, config.train.precision)
    right = (chosen > rejected).float().numpy()
    records = [held_out.records[i] for i in ids]
    known = all("codepoint" in record for record in records)
    clusters = np.array([record["codepoint"] for record in records]) if known else np.arange(len(records))
    low, high = bootstrap(right, clusters)
    longer = np.mean([len(held_out.chosen[i]) > len(held_out.rejected[i]) for i in ids])
    model = objective.model.config
    run.samples(
        "pairs",
        [
            {
                "prompt": record["prompt"][-1]["content"],
                "chosen": record["chosen"][-1]["content"],
                "rejected": record["rejected"][-1]["content"],
                "reward": f"{(c - model.reward_offset) * model.reward_scale:+.2f}",
                "reward of rejected": f"{(r - model.reward_offset) * model.reward_scale:+.2f}",
            }
            for record, c, r in list(zip(records, chosen.tolist(), rejected.tolist(), strict=True))[:12]
        ],
        "Held-out pairs with their calibrated rewards",
    )
    score = Score(
        metric="accuracy on pairs",
        after=float(right.mean()),
        before=float((first_chosen > first_rejected).float().mean()),
        baseline=0.5,
        baseline_name="chance",
        low=low,
        high=high,
        n=len(np.unique(clusters)),
        unit="characters" if known else "pairs",
        note=f"{len(ids)} pairs; the longer answer is right in {longer:.3f}",
    )
    margin = chosen - rejected
    bins, error = reliability(margin.abs().sigmoid(), (margin > 0) + 0.5 * (margin == 0), low=0.5)
    return score, {"calibration": bins, "ece": error}


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
