"""Supervised fine-tuning on conversations (Ouyang et al. 2022, section 3.5): next tokens of the assistant only.

    python -m finetune.sft configs/finetune/sft_instructgpt_1b3.yaml

B rows of T tokens. ``labels`` are shifted already and -100 outside the assistant's answers; an answer's end token is
part of it.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import preferences, tokenizer
from fledge.data.chats import Chats, ChatsConfig, Prompts
from fledge.data.text import IGNORE
from fledge.evals import generation
from fledge.evals.score import Score, bootstrap
from fledge.evals.validation import validation
from fledge.models import adapters, language
from fledge.models.adapters import LoRAConfig
from fledge.models.language import decay_exempt, document_mask, next_token_loss
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, Permutation, Rows, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, autocast, fit

WRITES = "chat-model"


class Parents(BaseConfig):
    model: str | None = parent("causal-lm", "chat-model", required=True)
    """Language model and tokenizer to instruct."""


class Optim(OptimConfig):
    """InstructGPT 1.3B (appendix C.1): 9.65e-6, no warm-up, cosine to a tenth."""

    lr: float = 9.65e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    min_lr: float = 9.65e-7
    clip: float | None = 1.0


class Train(TrainConfig):
    """InstructGPT 1.3B: 16 epochs of batches of 32. Its residual dropout of .2 is the parent model's to have."""

    batch: PositiveInt = 32
    steps: Duration = "16 epochs"


class Evaluation(BaseConfig):
    """Held-out conversations before and after."""

    split: Literal["validation", "test"] = "test"
    """validation: to choose hyper-parameters by."""
    metric: Literal["exact", "nats"] = "nats"
    """exact: greedy answers that are right to the letter. nats: mean negative log-likelihood of an answer's token."""
    examples: PositiveInt = 512
    """How many at most."""
    max_new_tokens: PositiveInt = 64


class Config(StageConfig):
    """Supervised fine-tuning; the defaults are InstructGPT's for 1.3B."""

    stage: Literal["finetune.sft"] = "finetune.sft"
    parents: Parents = Parents()
    data: ChatsConfig
    lora: LoRAConfig | None = None
    """Adapters learn, and the rest is frozen; null: all of the model learns."""
    optim: Optim = Optim()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    track: TrackConfig = TrackConfig()


# -------------------------------------------------------------------------------------------------------- objective


class SFT(nn.Module):
    """Predict each token of the assistant from what was said before it in the same conversation."""

    weights = {"loss": 1.0}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens of answers."""
        return {"loss": int((batch["labels"] != IGNORE).sum())}

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch["attention_mask"].sum())

    def constant(self) -> list[nn.Parameter]:
        """The base that adapters leave as it is."""
        return adapters.frozen(self)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return {"loss": next_token_loss(self.logits(batch), batch["labels"])}

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V). Unpacked rows are one document each, with the padding on the right as another."""
        document = batch.get("document", batch["attention_mask"])
        position = batch.get("position", torch.arange(document.shape[1], device=document.device).expand_as(document))
        mask = document_mask(document, causal=True)
        return self.model(
            input_ids=batch["input_ids"], attention_mask=mask, position_ids=position, use_cache=False
        ).logits


# ------------------------------------------------------------------------------------------------------------- stage


def chosen_examples(n: int, limit: int) -> list[int]:
    """At most ``limit`` of n, the same ones every time."""
    order = Permutation(n, "evaluation")
    return [order[i] for i in range(min(n, limit))]


def groups_of(records: list[dict]) -> tuple[np.ndarray, str]:
    """What a bootstrap resamples: the characters of the world's questions, or the examples."""
    if all("codepoint" in record for record in records):
        return np.array([record["codepoint"] for record in records]), "characters"
    return np.arange(len(records)), "examples"


def exact_answers(
    model: Any, tokens: Any, prompts: Prompts, ids: list[int], config: Config
) -> tuple[Tensor, list[str]]:
    """(N,) 1. where the greedy answer is the wanted one, and the answers."""
    given = generation.answers(
        model, tokens, prompts, ids, max_new_tokens=config.evaluation.max_new_tokens, precision=config.train.precision
    )
    return generation.exact(given, [wanted(prompts.records[i]) for i in ids]), given


def wanted(record: dict) -> str:
    """The last answer of a conversation."""
    return [m["content"] for m in record["messages"] if m["role"] == "assistant"][-1]


@torch.no_grad()
def answer_nats(model: Any, held_out: Chats, ids: list[int], precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Per example (N,): the sum of -log p over its answers' tokens, and how many they are."""
    sft = SFT(model).eval()
    nats, tokens = [], []
    for i in ids:
        batch = {name: x.to(distributed.device()) for name, x in held_out.rows([i]).items()}
        with autocast(precision):
            nats.append(sft(batch, 0)["loss"].item())
        tokens.append(sft.counts(batch)["loss"])
    return np.array(nats), np.array(tokens)


def main(config: Config) -> artifact.Artifact:
    """Train, measure held-out answers, and hand the chat model over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["model"])
        train = Chats(config.data, tokens, "train", at_least=config.train.batch)
        run.say(train.report())
        objective = SFT(language.read(parents["model"]))
        language.check_length(objective.model, config.data.max_length, "data.max_length")
        torch.manual_seed(derive("init", config.seed))
        if config.lora is not None:
            adapters.add(objective.model, config.lora)
        stream = DataStream(len(train), train.rows, batch=config.train.batch, seed=config.seed, what="data")
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)

        def held_out() -> tuple[int, Rows]:
            rows = Chats(config.data, tokens, "validation")
            return len(rows), rows.rows

        watch = validation(objective, config.train, held_out)
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        model = (adapters.merged(objective.model) if config.lora is not None else objective.model).eval()
        scores = []
        if run.measures:
            base = language.read(parents["model"]).to(distributed.device())
            scores = [evaluate(model, base, tokens, config, run)]

        def save(folder: Path) -> None:
            language.save(model, tokens, folder)
            if config.lora is not None:
                adapters.save(objective.model, folder / adapters.FOLDER)

        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(model).__name__, "parameters": language.size(model)},
            preprocessing={"tokenizer": tokenizer.digest(tokens), "template": config.data.template},
            data={"fingerprint": config.data.fingerprint(), "examples": len(train.records), "skipped": train.skipped},
            step=steps,
        )


def evaluate(model: Any, base: Any, tokens: Any, config: Config, run: Run) -> Score:
    """The figure of the table, and a few answers before and after for the report."""
    prompts = preferences.prompts(config.data, tokens, config.evaluation.split)
    ids = chosen_examples(len(prompts), config.evaluation.examples)
    shown = ids if config.evaluation.metric == "exact" else ids[:12]
    right, after = exact_answers(model, tokens, prompts, shown, config)
    base_right, before = exact_answers(base, tokens, prompts, shown, config)
    rows = zip(shown, before, after, strict=True)
    run.samples(
        "answers",
        [
            {
                "prompt": prompts.records[i]["prompt"][-1]["content"],
                "wanted": wanted(prompts.records[i]),
                "before": old,
                "after": new,
            }
            for i, old, new in list(rows)[:12]
        ],
        "Greedy answers to held-out prompts",
    )
    if config.evaluation.metric == "exact":
        clusters, unit = groups_of([prompts.records[i] for i in ids])
        low, high = bootstrap(right, clusters)
        return Score(
            metric="exact answers", after=float(right.mean()), before=float(base_right.mean()), low=low, high=high,
            n=len(np.unique(clusters)), unit=unit, note=f"{len(ids)} prompts, greedy",
        )  # fmt: skip
    held_out = Chats(config.data.model_copy(update={"packing": "none"}), tokens, config.evaluation.split)
    ids = chosen_examples(len(held_out), config.evaluation.examples)
    nats, count = answer_nats(model, held_out, ids, config.train.precision)
    base_nats, _ = answer_nats(base, held_out, ids, config.train.precision)
    low, high = bootstrap(nats / count, weights=count)
    return Score(
        metric="nats per answer token", after=nats.sum() / count.sum(), before=base_nats.sum() / count.sum(),
        low=low, high=high, n=len(ids), higher_is_better=False, unit="examples",
    )  # fmt: skip


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
