"""Masked language modelling (Devlin et al. 2019; without sentence pairs and with fresh masks, as Liu et al. 2019).

    python -m pretrain.mlm configs/pretrain/mlm_roberta_base.yaml

B rows of T tokens. ``labels`` hold the original token where one was selected, -100 elsewhere; nothing is shifted.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import text, tokenizer
from fledge.data.text import IGNORE, Packed, TextConfig, mask_tokens, maskable
from fledge.data.tokenizer import TokenizerConfig
from fledge.evals.language import neighbour_bigram, score_documents
from fledge.evals.score import Score, bootstrap
from fledge.evals.validation import validation
from fledge.models import language
from fledge.models.language import EncoderConfig, decay_exempt, document_mask
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, autocast, fit

WRITES = "text-encoder"


class Parents(BaseConfig):
    init: str | None = parent("text-encoder", required=False)
    """Encoder and tokenizer to go on from."""


class Optim(OptimConfig):
    """RoBERTa-base (Liu et al. 2019, table 9): 6e-4 after 24k steps, linear to 0, no clipping."""

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    warmup: Duration = 24_000
    decay: Literal["cosine", "linear", "constant"] = "linear"


class Train(TrainConfig):
    batch: int = 8192
    steps: Duration = 500_000


class Config(StageConfig):
    """Masked-token pretraining; the defaults are RoBERTa-base's."""

    stage: Literal["pretrain.mlm"] = "pretrain.mlm"
    parents: Parents = Parents()
    data: TextConfig
    tokenizer: TokenizerConfig = TokenizerConfig(style="encoder", vocab_size=50_264)
    model: EncoderConfig = EncoderConfig()
    mlm_probability: float = Field(0.15, gt=0, lt=1)
    """Share of a row's ordinary tokens that are selected, exactly and at least one."""
    mask_replace_prob: float = Field(0.8, ge=0, le=1)
    random_replace_prob: float = Field(0.1, ge=0, le=1)
    evaluation_split: Literal["validation", "test"] = "test"
    """Documents that give the figure; validation, to choose hyper-parameters by."""
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.data.seq_len > self.model.context_length:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} exceeds model.context_length {self.model.context_length}"
            )
        return self


# -------------------------------------------------------------------------------------------------------- objective


class MLM(nn.Module):
    """Predict the original tokens at the selected positions from the whole document."""

    weights = {"loss": 1.0}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: Batch) -> dict[str, int]:
        """Selected tokens."""
        selected = int((batch["labels"] != IGNORE).sum())
        return {"loss": selected, "accuracy": selected}

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int((batch["document"] > 0).sum())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        selected = batch["labels"] != IGNORE  # (B, T)
        logits = self.logits(batch, selected)  # (n, V): only the selected positions are decoded
        labels = batch["labels"][selected]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "accuracy": (logits.detach().argmax(-1) == labels).sum().to(loss.dtype)}

    def logits(self, batch: Batch, where: Tensor) -> Tensor:
        """Logits at the positions ``where`` (B, T) bool -> (n, V), in fp32 at least."""
        hidden = self.model.bert(
            input_ids=batch["input_ids"],
            attention_mask=document_mask(batch["document"], causal=False),
            position_ids=batch["position"],
        ).last_hidden_state  # (B, T, D)
        logits = self.model.cls(hidden[where])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------- stage


class MaskedRows:
    """Packed rows, corrupted as a function of each row's seed."""

    def __init__(self, packed: Packed, tokens: Any, config: Config) -> None:
        self.packed, self.special = packed, tokenizer.special_ids(tokens)
        self.corruption = {
            "mlm_probability": config.mlm_probability,
            "mask_replace_prob": config.mask_replace_prob,
            "random_replace_prob": config.random_replace_prob,
            "mask_id": tokens.mask_token_id,
            "ordinary_ids": tokenizer.ordinary_ids(tokens),
        }

    def __call__(self, ids: list[int], seeds: list[int]) -> Batch:
        rows = self.packed.rows(ids)
        may = maskable(rows["input_ids"], rows["document"], self.special)
        corrupted, labels = mask_tokens(rows["input_ids"], may, seeds=seeds, **self.corruption)
        return rows | {"input_ids": corrupted, "labels": labels}


def evaluation_rows(packed: Packed, tokens: Any, config: Config):
    """Rows whose masks depend on (seed, row) alone: every evaluation asks the same questions, all of them [MASK]."""
    all_masked = config.model_copy(update={"mask_replace_prob": 1.0, "random_replace_prob": 0.0})
    masked = MaskedRows(packed, tokens, all_masked)
    return lambda ids: masked(ids, [derive("evaluation mask", config.seed, i) for i in ids])


def evaluate(objective: MLM, held_out: Packed, train: Packed, tokens: Any, config: Config, before: MLM) -> Score:
    """Accuracy at masked tokens of held-out documents, beside the most frequent token and the neighbour bigram."""
    batch_of, sizes = evaluation_rows(held_out, tokens, config), tokenizer.token_bytes(tokens)

    def accuracy(model: MLM):
        model.eval()

        def logits(batch: Batch) -> Tensor:
            with autocast(config.train.precision):
                B, T = batch["input_ids"].shape
                return model.logits(batch, torch.ones(B, T, dtype=torch.bool, device=batch["input_ids"].device)).view(
                    B, T, -1
                )

        found = score_documents(logits, batch_of, held_out, sizes, rows=32, causal=False)
        return found.correct, found.tokens

    correct, total = accuracy(objective)
    asked = total > 0
    low, high = bootstrap(correct[asked] / total[asked], weights=total[asked])
    first_correct, first_total = accuracy(before)
    sample = train.rows(list(range(min(len(train), 4000))))
    guess = neighbour_bigram(
        sample["input_ids"],
        maskable(sample["input_ids"], sample["document"], tokenizer.special_ids(tokens)),
        len(tokens),
    )
    hits = frequent = 0
    common = int(guess(torch.tensor([-1]), torch.tensor([-1])))
    for i in range(len(held_out)):
        batch = batch_of([i])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        at = (labels != IGNORE).nonzero()[:, 0]
        left = torch.where(at > 0, ids[(at - 1).clamp(min=0)], -1)
        right = torch.where(at < len(ids) - 1, ids[(at + 1).clamp(max=len(ids) - 1)], -1)
        hits += int((guess(left, right) == labels[at]).sum())
        frequent += int((labels[at] == common).sum())
    return Score(
        metric="masked-token accuracy",
        after=float(correct.sum() / total.sum()),
        before=float(first_correct.sum() / first_total.sum()),
        baseline=hits / float(total.sum()),
        baseline_name="best neighbour bigram",
        low=low,
        high=high,
        n=int(asked.sum()),
        unit="documents",
        note=f"most frequent token {frequent / float(total.sum()):.4f}; {int(total.sum())} masked tokens",
    )


def examples(objective: MLM, held_out: Packed, tokens: Any, config: Config, n: int = 8) -> list[dict]:
    """Masked rows with what was asked and what was answered."""
    batch_of = evaluation_rows(held_out, tokens, config)
    rows = []
    for i in np.linspace(0, len(held_out) - 1, min(n, len(held_out))).astype(int).tolist():
        batch = {k: v.to(distributed.device()) for k, v in batch_of([i]).items()}
        selected = batch["labels"] != IGNORE
        with torch.no_grad():
            guess = objective.logits(batch, selected).argmax(-1)
        rows.append(
            {
                "text": tokens.decode(batch["input_ids"][0][batch["document"][0] > 0].tolist())[:300],
                "asked": " · ".join(tokens.decode([t]).strip() for t in batch["labels"][selected][:12].tolist()),
                "answered": " · ".join(tokens.decode([t]).strip() for t in guess[:12].tolist()),
            }
        )
    return rows


def main(config: Config) -> artifact.Artifact:
    """Train, measure on the test documents, and hand the encoder over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        if "init" in parents:
            tokens = language.read_tokenizer(parents["init"])
        else:
            tokens = tokenizer.build(config.tokenizer, lambda: text.documents(config.data, "train"))
        train = Packed(config.data, tokens, "train", style="encoder", at_least=config.train.batch)

        def untrained() -> MLM:
            torch.manual_seed(derive("init", config.seed))
            if "init" in parents:
                return MLM(language.read(parents["init"], "AutoModelForMaskedLM"))
            return MLM(language.build_encoder(config.model, tokens))

        def held_out() -> tuple[int, MaskedRows]:
            rows = Packed(config.data, tokens, "validation", style="encoder")
            return len(rows), MaskedRows(rows, tokens, config)

        objective = untrained()
        stream = DataStream(
            len(train), MaskedRows(train, tokens, config), batch=config.train.batch, seed=config.seed, what="data"
        )
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(
            groups, config.optim, batch=config.train.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch
        )
        watch = validation(objective, config.train, held_out)
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        objective.eval()
        scores = []
        if run.measures:
            held_out = Packed(config.data, tokens, config.evaluation_split, style="encoder", at_least=0)
            scores = [evaluate(objective, held_out, train, tokens, config, untrained().to(distributed.device()))]
            shown = examples(objective, held_out, tokens, config)
            run.samples("masked_tokens", shown, "Held-out rows, asked and answered")
        return run.publish(
            WRITES,
            lambda folder: language.save(objective.model, tokens, folder),
            scores,
            architecture={"name": type(objective.model).__name__, "parameters": language.size(objective.model)},
            preprocessing={"tokenizer": tokenizer.digest(tokens), "max_length": config.model.context_length},
            data={"fingerprint": config.data.fingerprint(), "documents": train.documents},
            step=steps,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
