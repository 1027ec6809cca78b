"""Reward models from ranked answers (Christiano et al. 2017; Stiennon et al. 2020; Ouyang et al. 2022).

    python -m align.reward configs/align/reward_nplus.yaml

B prompts of K answers each, a pair being K = 2; a reward is one number, read at an answer's last token. In
``ranks`` (B, K) lower is better, equal is a tie, -1 is no answer.
"""

import math
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from align import held_out
from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import tokenizer
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.errors import InputError
from fledge.evals.ranking import decided
from fledge.evals.score import Score
from fledge.evals.validation import validation
from fledge.models import adapters, language, reward_model
from fledge.models.adapters import LoRAConfig
from fledge.models.language import decay_exempt
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, Rows, derive, longest_first, rows_of
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "reward-model"


class Parents(BaseConfig):
    model: str | None = parent("chat-model", "causal-lm", required=True)
    """Language model whose trunk and tokenizer the reward model takes over; its head is new."""


class Optim(OptimConfig):
    """Huang et al. 2024 (summarize_from_feedback_details): 3e-6, cosine, eps 1e-5, torch's decay, no clipping."""

    lr: float = 3e-6
    eps: float = 1e-5
    weight_decay: float = 0.01


class Train(TrainConfig):
    batch: PositiveInt = 64
    steps: Duration = "1 epoch"


class Config(StageConfig):
    """Reward modelling; the defaults are Huang et al. 2024's, with the model's own last token for EOS."""

    stage: Literal["align.reward"] = "align.reward"
    parents: Parents = Parents()
    data: PreferencesConfig
    loss: Literal["pairwise", "plackett_luce"] = "pairwise"
    """pairwise: every pair of a prompt's answers (Ouyang et al. 2022). plackett_luce: their whole order at once."""
    tie_threshold: PositiveFloat | None = None
    """By how much a reward must lead to be preferred as likely as not (the log of Rao & Kupper 1967's threshold): ties
    are learned from; null: they are not compared."""
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Weight of mean (r_i + r_j)² over pairs (Eisenstein et al. 2023); 0: the offset alone centres rewards."""
    head_init: Literal["normal", "zero", "transformers"] = "normal"
    """normal: N(0, 1/(d + 1)) (Stiennon et al. 2020). zero. transformers: N(0, .02²), as its classifiers have it."""
    lora: LoRAConfig | None = None
    """Adapters and the head learn, and the rest is frozen; null: all of the model learns."""
    evaluation_pairs: PositiveInt = 1024
    """Held-out prompts with their answers at most."""
    evaluation_split: Literal["validation", "test"] = "test"
    """Pairs that give the figure; validation, to choose hyper-parameters by."""
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _an_order_knows_no_gaps(self) -> "Config":
        given = [n for n, x in (("data.margin", self.data.margin), ("tie_threshold", self.tie_threshold)) if x]
        if self.loss == "plackett_luce" and given:
            raise ValueError(f"{given[0]} belongs to loss: pairwise; loss is plackett_luce")
        return self


# -------------------------------------------------------------------------------------------------------- objective


def compared(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Which answers are better than which, and which are tied with which, i < j. (B, K) -> (B, K, K), (B, K, K)"""
    there = ranks >= 0
    both = there[:, :, None] & there[:, None, :]
    first, second = ranks[:, :, None], ranks[:, None, :]
    return both & (first < second), both.triu(1) & (first == second)


def gaps(rewards: Tensor) -> Tensor:
    """r_i - r_j: (B, K) -> (B, K, K)"""
    return rewards[:, :, None] - rewards[:, None, :]


def mean_over(pairs: Tensor, values: Tensor) -> Tensor:
    """Of each prompt, over its pairs; 0 where it has none. bool (B, K, K), (B, K, K) -> (B,)"""
    return torch.where(pairs, values, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def pairwise_loss(
    rewards: Tensor, ranks: Tensor, margin: Tensor | None = None, tie_threshold: float | None = None
) -> Tensor:
    """Bradley-Terry over all compared pairs of a prompt: Σ_prompts mean_pairs -log σ(r_i - r_j - m).

    Args:
        rewards: (B, K).
        ranks: (B, K).
        margin: (B,) the m of Touvron et al. 2023 (Llama 2); 0 by default.
        tie_threshold: the η of Rao & Kupper 1967, "Ties in paired-comparison experiments": i is preferred with
            probability σ(r_i - r_j - η), and neither with the rest, (e^2η - 1) σ(r_i - r_j - η) σ(r_j - r_i - η). None:
            tied answers are not compared.
    """
    better, tied = compared(ranks)
    eta = tie_threshold or 0.0
    lead = gaps(rewards) - eta if margin is None else gaps(rewards) - eta - margin[:, None, None]
    loss = -F.logsigmoid(lead)
    if tie_threshold is None:
        return mean_over(better, loss).sum()
    neither = -F.logsigmoid(gaps(rewards) - eta) - F.logsigmoid(-gaps(rewards) - eta) - math.log(math.expm1(2 * eta))
    return mean_over(better | tied, torch.where(tied, neither, loss)).sum()


def plackett_luce_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Σ_prompts -log P(ranking) / K: each answer is the best of itself and those ranked below it (Plackett 1975).

    Tied answers do not stand against each other. (B, K), (B, K) -> ()
    """
    there = ranks >= 0
    better, _ = compared(ranks)
    field = better | torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)
    worst_of = rewards[:, None, :].masked_fill(~field, -math.inf).logsumexp(dim=2)  # (B, K)
    return (torch.where(there, worst_of - rewards, 0.0).sum(dim=1) / there.sum(dim=1)).sum()


def centre_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """Σ_prompts mean_pairs (r_i + r_j)² (Eisenstein et al. 2023). (B, K), (B, K) -> ()"""
    better, tied = compared(ranks)
    return mean_over(better | tied, (rewards[:, :, None] + rewards[:, None, :]).square()).sum()


class RewardModel(nn.Module):
    """Give the better answers of each prompt the higher rewards."""

    def __init__(
        self,
        model: Any,
        center_rewards_coefficient: float = 0.0,
        loss: Literal["pairwise", "plackett_luce"] = "pairwise",
        tie_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.tie_threshold = model, loss, tie_threshold
        self.weights = {"loss": 1.0, "centre": center_rewards_coefficient}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Prompts; compared pairs for what is said of these."""
        pairs = int(compared(batch["ranks"])[0].sum())
        return {"loss": len(batch["ranks"]), "centre": len(batch["ranks"]), "accuracy": pairs, "margin": pairs}

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch["attention_mask"].sum())

    def constant(self) -> list[nn.Parameter]:
        """The base that adapters leave as it is."""
        return adapters.frozen(self)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        given, ranks = reward_model.of_answers(self.model, batch), batch["ranks"]  # (B, K), (B, K)
        if self.loss == "pairwise":
            loss = pairwise_loss(given, ranks, batch.get("margin"), self.tie_threshold)
        else:
            loss = plackett_luce_loss(given, ranks)
        margins = gaps(given.detach())[compared(ranks)[0]]  # (pairs,)
        return {
            "loss": loss,
            "centre": centre_loss(given, ranks),
            "accuracy": (margins > 0).to(margins.dtype).sum(),
            "margin": margins.sum(),
        }


def check_padding(parent: artifact.Artifact, tokens: Any) -> None:
    """InputError unless the tokenizer pads with a token of its own.

    fledge reads a reward by position, whatever pads; transformers' own classifiers at the last token whose id is not
    the padding's (``GenericForSequenceClassification``), and only row by row where there is none.
    """
    if tokens.pad_token_id is None:
        why = "has no padding token, by which transformers would find an answer's last token"
    elif tokens.pad_token_id == tokens.eos_token_id:
        why = "pads with its end token, so transformers would read a reward before the answer's end"
    else:
        return
    raise InputError(
        f"the tokenizer of {parent.path} {why}; import the language model with a padding token of its own: fledge "
        "import KIND SOURCE DIR --pad-token TOKEN, where TOKEN is one that stands in no text"
    )


def build(
    parent: artifact.Artifact,
    tokens: Any,
    seed: int,
    head_init: Literal["normal", "zero", "transformers"] = "normal",
) -> Any:
    """The parent's trunk under a new head."""
    torch.manual_seed(derive("init", seed))
    model = language.read(
        parent, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=tokens.pad_token_id,
        expect_missing=["score."], expect_unexpected=["lm_head."],
    )  # fmt: skip
    std = {"normal": 1 / (model.score.in_features + 1) ** 0.5, "zero": 0.0, "transformers": 0.02}[head_init]
    nn.init.normal_(model.score.weight, std=std)
    return model


# ------------------------------------------------------------------------------------------------------------- stage


def calibrate(model: Any, asked: held_out.Sample, precision: str) -> None:
    """Set offset and scale so that (raw - offset) · scale has mean 0 over best answers and unit deviation overall.

    Ouyang et al. set the bias so that demonstrations score 0. Both stand in the model's config: the plain loader gives
    raw rewards, fledge calibrated ones.
    """
    given, ranks = asked.rewards(model, precision), asked.ranks()
    model.config.reward_offset = float(given[ranks == 0].mean())
    model.config.reward_scale = float(1 / given[ranks >= 0].std().clamp(min=1e-6))


def main(config: Config) -> artifact.Artifact:
    """Train, calibrate, measure held-out answers, and hand the reward model over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    tokens = language.read_tokenizer(parents["model"])
    check_padding(parents["model"], tokens)
    with Run.open(config, parents) as run:
        ties = config.tie_threshold is not None
        train = Preferences(config.data, tokens, "train", at_least=config.train.batch, ties=ties)
        run.say(train.report())
        learner = build(parents["model"], tokens, config.seed, config.head_init)
        language.check_length(learner, config.data.max_length, "data.max_length")
        if config.lora is not None:
            adapters.add(learner, config.lora)
            learner.score.requires_grad_(True)
        objective = RewardModel(learner, config.center_rewards_coefficient, config.loss, config.tie_threshold)

        def rows(ids: list[int], seeds: list[int]) -> Batch:
            batch = train.rows(ids, seeds)
            return rows_of(batch, longest_first(batch["attention_mask"]))

        stream = DataStream(len(train), rows, batch=config.train.batch, seed=config.seed, what="data")
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)

        test = Preferences(config.data, tokens, config.evaluation_split, ties=True) if run.measures else None

        def validation_rows() -> tuple[int, Rows]:
            some = Preferences(config.data, tokens, "validation", ties=ties)
            return len(some), some.rows

        watch = validation(objective, config.train, validation_rows)
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        model = adapters.merged(learner) if config.lora is not None else learner
        calibrate(model, held_out.sample(train, config.evaluation_pairs), config.train.precision)
        if ties:
            model.config.reward_tie_threshold = config.tie_threshold
        scores, figures = [], {}
        if test is not None:
            before = build(parents["model"], tokens, config.seed, config.head_init).to(distributed.device())
            scores, figures = evaluate(model, before, held_out.sample(test, config.evaluation_pairs), config, run)

        def save(folder: Path) -> None:
            language.save(model, tokens, folder)
            if config.lora is not None:
                adapters.save(learner, folder / adapters.FOLDER, heads=["score"])

        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(model).__name__, "parameters": language.size(model)},
            preprocessing={
                "tokenizer": tokenizer.digest(tokens),
                "template": config.data.template,
                "reward_offset": model.config.reward_offset,
                "reward_scale": model.config.reward_scale,
                **({"reward_tie_threshold": config.tie_threshold} if ties else {}),
            },
            data={"fingerprint": config.data.fingerprint(), "pairs": len(train), "skipped": train.skipped},
            step=steps,
            **figures,
        )


def evaluate(
    model: Any, before: Any, asked: held_out.Sample, config: Config, run: Run
) -> tuple[list[Score], dict[str, Any]]:
    """Accuracy on held-out pairs beside that of the untrained head; and whether the probabilities that it gives to its
    choices are those with which they are right."""
    given, first = (asked.rewards(m, config.train.precision) for m in (model, before))
    likely = held_out.probability(decided(asked.ranks()).difference(given), config.tie_threshold)
    table = held_out.table(asked, reward_model.calibrated(model, given))
    run.samples("pairs", table, "Held-out pairs with their calibrated rewards")
    return [held_out.accuracy(asked, given, first)], held_out.figures(asked, given, likely)


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
