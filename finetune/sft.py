"""Supervised fine-tuning on conversations (Ouyang et al. 2022, section 3.5): next tokens of the assistant only.

    python -m finetune.sft configs/finetune/sft_instructgpt_1b3.yaml

B rows of T tokens. ``labels`` are shifted already and -100 outside the assistant's answers; an answer's end token is
part of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import preferences, tokenizer
from fledge.data.chats import Chats, ChatsConfig, use_template
from fledge.data.prompts import Prompts
from fledge.data.text import IGNORE, Packed, TextConfig
from fledge.errors import InputError
from fledge.evals import generation
from fledge.evals.reward import Judge
from fledge.evals.score import Score, bootstrap
from fledge.evals.validation import validation
from fledge.models import adapters, language
from fledge.models.adapters import LoRAConfig
from fledge.models.language import decay_exempt, document_mask, logits_at, neftune, token_nats
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, Mixed, Permutation, Rows, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, autocast, fit

WRITES = "chat-model"


class Parents(BaseConfig):
    model: str | None = parent("causal-lm", "chat-model", required=True)
    """Language model and tokenizer to instruct."""
    reward: str | None = parent("reward-model", required=False)
    """Scores answers while training (``eval/reward``) and at the end; it may have another tokenizer."""


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
    prompts: PositiveInt | None = None
    """How many validation prompts are answered every ``train.eval_every`` steps, for ``eval/reward`` (with
    ``parents.reward``) and ``eval/exact`` (with ``metric: exact``); null: as many as ``examples``."""
    temperature: NonNegativeFloat | None = None
    """Of answers that the reward model scores; null: greedy ones."""


class Pretraining(BaseConfig):
    """Pretraining text among the conversations (Ouyang et al. 2022, appendix C: 10 % of it before RLHF)."""

    data: TextConfig
    share: float = Field(0.1, gt=0, lt=1)
    """Of the rows of each batch, at least one."""
    coef: PositiveFloat = 0.1
    """loss = mean over the batch's answer tokens + coef · mean over its text tokens. The paper says nothing of it."""

    def rows(self, batch: int) -> int:
        """How many rows of a batch are text."""
        return min(max(round(self.share * batch), 1), batch - 1)


class Config(StageConfig):
    """Supervised fine-tuning; the defaults are InstructGPT's for 1.3B."""

    stage: Literal["finetune.sft"] = "finetune.sft"
    parents: Parents = Parents()
    data: ChatsConfig
    pretraining: Pretraining | None = None
    """Text that is mixed in; null: none."""
    lora: LoRAConfig | None = None
    """Adapters learn, and the rest is frozen; null: all of the model learns."""
    neftune_alpha: PositiveFloat | None = None
    """Noise on the embeddings while training; the paper takes 5, 10 or 15. null: none."""
    optim: Optim = Optim()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _something_to_mix(self) -> "Config":
        if self.pretraining is not None and self.train.batch < 2:
            raise ValueError("pretraining shares each batch with the conversations; train.batch must be 2 at least")
        return self


# -------------------------------------------------------------------------------------------------------- objective


class SFT(nn.Module):
    """Predict each token of the assistant from what was said before it in the same conversation."""

    weights = {"loss": 1.0}

    def __init__(self, model: Any, neftune_alpha: float | None = None) -> None:
        super().__init__()
        self.model, self.neftune_alpha = model, neftune_alpha

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
        return {"loss": self.nats(batch).sum()}

    def nats(self, batch: Batch) -> Tensor:
        """-log p of each label that counts, row by row, (n,)."""
        scored = batch["labels"] != IGNORE  # (B, T)
        return token_nats(logits_at(self.model, scored, **self.inputs(batch)), batch["labels"][scored])

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model reads. Unpacked rows are one document each, with the padding on the right as another."""
        ids, document = batch["input_ids"], batch.get("document", batch["attention_mask"])
        position = batch.get("position", torch.arange(document.shape[1], device=document.device).expand_as(document))
        read = {"attention_mask": document_mask(document, causal=True), "position_ids": position}
        if self.neftune_alpha is None or not self.training:
            return read | {"input_ids": ids}
        return read | {"inputs_embeds": neftune(self.model.get_input_embeddings()(ids), document, self.neftune_alpha)}


class MixedSFT(SFT):
    """The same, and predict each next token of rows of pretraining text: ``batch["pretraining"]`` (B,), 1 = text."""

    def __init__(self, model: Any, coef: float, neftune_alpha: float | None = None) -> None:
        super().__init__(model, neftune_alpha)
        self.weights = {"answers": 1.0, "pretraining": coef}

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens of answers, and of text."""
        scored = (batch["labels"] != IGNORE).sum(dim=1)  # (B,)
        text = int((scored * batch["pretraining"]).sum())
        return {"answers": int(scored.sum()) - text, "pretraining": text}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        nats = self.nats(batch)
        text = batch["pretraining"].repeat_interleave((batch["labels"] != IGNORE).sum(dim=1)).to(nats.dtype)  # (n,)
        return {"answers": (nats * (1 - text)).sum(), "pretraining": (nats * text).sum()}


def mixed(parts: list[tuple[int, Batch]]) -> Batch:
    """Rows of conversations (part 0) above rows of text (part 1), padded on the right to one width."""
    width = max(rows["input_ids"].shape[1] for _, rows in parts)
    joined: dict[str, list[Tensor]] = {}
    for which, rows in parts:
        document = rows.get("document", rows.get("attention_mask"))
        assert document is not None
        position = rows.get("position", torch.arange(document.shape[1]).expand_as(document))
        whole = {"input_ids": rows["input_ids"], "document": document, "position": position, "labels": rows["labels"]}
        for name, tensor in whole.items():
            fill = IGNORE if name == "labels" else 0
            joined.setdefault(name, []).append(pad(tensor, (0, width - tensor.shape[1]), value=fill))
        joined.setdefault("pretraining", []).append(torch.full((len(document),), which))
    batch = {name: torch.cat(tensors) for name, tensors in joined.items()}
    return batch | {"attention_mask": (batch["document"] > 0).long()}


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


def answers(model: Any, tokens: Any, prompts: Prompts, ids: list[int], config: Config, temperature=0.0) -> list[str]:
    """What the model says to the prompts ``ids``."""
    return generation.answers(
        model, tokens, prompts, ids, max_new_tokens=config.evaluation.max_new_tokens, temperature=temperature,
        precision=config.train.precision,
    )  # fmt: skip


def exact_answers(
    model: Any, tokens: Any, prompts: Prompts, ids: list[int], config: Config
) -> tuple[Tensor, list[str]]:
    """(N,) 1. where the greedy answer is the wanted one, and the answers."""
    given = answers(model, tokens, prompts, ids, config)
    return generation.exact(given, [wanted(prompts.records[i]) for i in ids]), given


def rewards(model: Any, tokens: Any, prompts: Prompts, ids: list[int], config: Config, judge: Judge) -> Tensor:
    """(N,) what the reward model says of the answers to the prompts ``ids``."""
    given = answers(model, tokens, prompts, ids, config, config.evaluation.temperature or 0.0)
    return judge([prompts.records[i]["prompt"] for i in ids], given)


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


def watching(model: Any, tokens: Any, config: Config, judge: Judge | None) -> Callable[[int], dict[str, float]] | None:
    """What is measured on validation data while training: losses of answers and text, exact answers, the reward."""
    if not config.train.eval_every:
        return None

    def chats() -> tuple[int, Rows]:
        rows = Chats(config.data, tokens, "validation")
        return len(rows), rows.rows

    loss = validation(SFT(model), config.train, chats)
    text_loss = None
    if (mix := config.pretraining) is not None:
        text = Packed(mix.data, tokens, "validation", style="causal")
        text_loss = validation(SFT(model), config.train, lambda: (len(text), text_rows(text)))
    asks = judge is not None or config.evaluation.metric == "exact"
    prompts = preferences.prompts(config.data, tokens, "validation") if asks else None

    def measure(step: int) -> dict[str, float]:
        found = loss(step) if loss is not None else {}
        if text_loss is not None:
            found["pretraining"] = text_loss(step)["loss"]
        return found | (answered(model, tokens, prompts, config, judge) if prompts is not None else {})

    return measure


def answered(model: Any, tokens: Any, prompts: Prompts, config: Config, judge: Judge | None) -> dict[str, float]:
    """Means over validation prompts, of which each rank answers its share."""
    ids = chosen_examples(len(prompts), config.evaluation.prompts or config.evaluation.examples)
    mine = ids[distributed.rank() :: distributed.world_size()]
    sums = {}
    if config.evaluation.metric == "exact":
        sums["exact"] = exact_answers(model, tokens, prompts, mine, config)[0].sum() if mine else torch.zeros(())
    if judge is not None:
        sums["reward"] = rewards(model, tokens, prompts, mine, config, judge).sum() if mine else torch.zeros(())
    sums = distributed.all_reduce_sum({name: value.to(distributed.device()) for name, value in sums.items()})
    return {name: value.item() / len(ids) for name, value in sums.items()}


def text_rows(text: Packed) -> Rows:
    """Rows of pretraining text as the objective reads rows."""

    def rows(ids: list[int], seeds: list[int]) -> Batch:
        batch = text.rows(ids)
        return batch | {"attention_mask": (batch["document"] > 0).long()}

    return rows


def stream_of(config: Config, train: Chats, text: Packed | None) -> DataStream:
    """Conversations alone, or with rows of text among them."""
    if config.pretraining is None or text is None:
        return DataStream(len(train), train.rows, batch=config.train.batch, seed=config.seed, what="data")
    n = config.pretraining.rows(config.train.batch)
    chats = DataStream(len(train), train.rows, batch=config.train.batch - n, seed=config.seed, what="data")
    others = DataStream(len(text), text.rows, batch=n, seed=derive("text", config.seed), what="pretraining.data")
    return Mixed([chats, others], mixed)


def main(config: Config) -> artifact.Artifact:
    """Train, measure held-out answers, and hand the chat model over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    if config.train.select is not None and config.train.select.metric == "eval/reward" and "reward" not in parents:
        raise InputError("train.select.metric is eval/reward, but parents.reward is not set; give a reward-model")
    mix = config.pretraining
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["model"])
        use_template(config.data, tokens)
        train = Chats(
            config.data, tokens, "train", at_least=config.train.batch - (mix.rows(config.train.batch) if mix else 0)
        )
        run.say(train.report())
        text = Packed(mix.data, tokens, "train", style="causal", at_least=mix.rows(config.train.batch)) if mix else None
        model = language.read(parents["model"])
        language.check_length(model, config.data.max_length, "data.max_length")
        if mix is not None:
            language.check_length(model, mix.data.seq_len, "pretraining.data.seq_len")
        judge = Judge(parents["reward"], config.train.precision) if "reward" in parents and run.measures else None
        torch.manual_seed(derive("init", config.seed))
        if config.lora is not None:
            adapters.add(model, config.lora)
        alpha = config.neftune_alpha
        objective = SFT(model, alpha) if mix is None else MixedSFT(model, mix.coef, alpha)
        stream = stream_of(config, train, text)
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)
        asked = held_out(config, tokens) if run.measures else None
        watch = watching(model, tokens, config, judge) if run.measures else None
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        trained = (adapters.merged(model) if config.lora is not None else model).eval()
        scores = []
        if asked is not None:
            base = language.read(parents["model"]).to(distributed.device())
            scores = evaluate(trained, base, tokens, asked, config, run, judge)

        def save(folder: Path) -> None:
            language.save(trained, tokens, folder)
            if config.lora is not None:
                adapters.save(model, folder / adapters.FOLDER)

        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(trained).__name__, "parameters": language.size(trained)},
            preprocessing={"tokenizer": tokenizer.digest(tokens), "template": config.data.template},
            data={"fingerprint": config.data.fingerprint(), "examples": len(train.records), "skipped": train.skipped},
            step=steps,
        )


class HeldOut(NamedTuple):
    """What the figures are of."""

    prompts: Prompts
    chats: Chats | None
    """With their answers, where these are what is measured."""


def held_out(config: Config, tokens: Any) -> HeldOut:
    """Read before training: a split without examples should not be found out after it."""
    split, likely = config.evaluation.split, config.evaluation.metric == "nats"
    chats = Chats(config.data.model_copy(update={"packing": "none"}), tokens, split) if likely else None
    return HeldOut(preferences.prompts(config.data, tokens, split), chats)


def evaluate(
    model: Any, base: Any, tokens: Any, asked: HeldOut, config: Config, run: Run, judge: Judge | None
) -> list[Score]:
    """The figures of the table, and a few answers before and after for the report."""
    prompts = asked.prompts
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
    scores = []
    if asked.chats is None:
        clusters, unit = groups_of([prompts.records[i] for i in ids])
        low, high = bootstrap(right, clusters)
        scores.append(Score(
            metric="exact answers", after=float(right.mean()), before=float(base_right.mean()), low=low, high=high,
            n=len(np.unique(clusters)), unit=unit, note=f"{len(ids)} prompts, greedy",
        ))  # fmt: skip
    else:
        scores.append(likelihood(model, base, asked.chats, config))
    if judge is not None:
        mine, his = (rewards(one, tokens, prompts, ids, config, judge).numpy() for one in (model, base))
        low, high = bootstrap(mine)
        scores.append(Score(
            metric="reward", after=float(mine.mean()), before=float(his.mean()), low=low, high=high, n=len(ids),
            unit="prompts",
        ))  # fmt: skip
    return scores


def likelihood(model: Any, base: Any, chats: Chats, config: Config) -> Score:
    """Nats per token of held-out answers."""
    ids = chosen_examples(len(chats), config.evaluation.examples)
    nats, count = answer_nats(model, chats, ids, config.train.precision)
    base_nats, _ = answer_nats(base, chats, ids, config.train.precision)
    low, high = bootstrap(nats / count, weights=count)
    return Score(
        metric="nats per answer token", after=nats.sum() / count.sum(), before=base_nats.sum() / count.sum(),
        low=low, high=high, n=len(ids), higher_is_better=False, unit="examples",
    )  # fmt: skip


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
