"""Next-token language modelling (Radford et al. 2019; sizes and schedule as nanoGPT trains GPT-2 124M).

    python -m pretrain.clm configs/pretrain/clm_gpt2_124m.yaml

B rows of T tokens, V vocabulary. ``labels`` are shifted already: labels[t] is the token that follows input_ids[t] in
the same document, -100 where there is none.
"""

from typing import Any, Literal

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import text, tokenizer
from fledge.data.text import IGNORE, Packed, TextConfig
from fledge.data.tokenizer import TokenizerConfig
from fledge.evals.language import ByteTrigram, PerDocument, bits_per_byte, causal_logits, score_documents
from fledge.evals.score import Score, bootstrap
from fledge.evals.validation import validation
from fledge.models import language
from fledge.models.language import CausalConfig, decay_exempt, document_mask, next_token_loss
from fledge.models.sampling import sample
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, Rows, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "causal-lm"


class Parents(BaseConfig):
    init: str | None = parent("causal-lm", required=False)
    """Model and tokenizer to go on from."""


class Optim(OptimConfig):
    """nanoGPT's GPT-2 124M: 6e-4 to 6e-5 by cosine after 2000 steps, matrices and embeddings decayed by 0.1."""

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float | None = 1.0
    warmup: Duration = 2000
    warmup_offset: Literal[0, 1] = 1
    min_lr: float = 6e-5


class Train(TrainConfig):
    batch: int = 480
    """Blocks of ``model.context_length`` tokens: 480 · 1024 = 491,520 tokens a step."""
    steps: Duration = 600_000


class Config(StageConfig):
    """Next-token pretraining; the defaults are nanoGPT's GPT-2 124M."""

    stage: Literal["pretrain.clm"] = "pretrain.clm"
    parents: Parents = Parents()
    data: TextConfig
    tokenizer: TokenizerConfig = TokenizerConfig(style="causal", vocab_size=50_257)
    model: CausalConfig = CausalConfig()
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


class CLM(nn.Module):
    """A causal language model that predicts each next token of its own document."""

    weights = {"loss": 1.0}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens that have a next one."""
        return {"loss": int((batch["labels"] != IGNORE).sum())}

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int((batch["document"] > 0).sum())

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=document_mask(batch["document"], causal=True),
            position_ids=batch["position"],
            use_cache=False,
        ).logits
        return {"loss": next_token_loss(logits, batch["labels"])}


# ------------------------------------------------------------------------------------------------------------- stage


def evaluate(
    model: Any, before: Any, held_out: Packed, documents: dict[str, list[str]], tokens: Any, precision: str
) -> Score:
    """Bits per byte of held-out documents, beside an interpolated byte trigram fitted on the same training text."""

    def per_document(model: Any) -> PerDocument:
        logits = causal_logits(model, precision)
        return score_documents(logits, held_out.rows, held_out, tokenizer.token_bytes(tokens), rows=32, causal=True)

    after, first = per_document(model), per_document(before)
    encoded = {split: [document.encode() for document in found] for split, found in documents.items()}
    trigram = ByteTrigram(encoded["train"], encoded["validation"])
    nats = np.array([trigram.nats(document).sum() for document in encoded["held out"]])
    size = np.array([len(document) for document in encoded["held out"]])
    scored = after.bytes > 0
    bits = after.nats[scored] / (np.log(2) * after.bytes[scored])
    low, high = bootstrap(bits, weights=after.bytes[scored])
    return Score(
        metric="bits per byte",
        after=bits_per_byte(after.nats, after.bytes),
        before=bits_per_byte(first.nats, first.bytes),
        baseline=bits_per_byte(nats, size),
        baseline_name="interpolated byte trigram",
        low=low,
        high=high,
        n=int(scored.sum()),
        higher_is_better=False,
        unit="documents",
        note=f"{int(size.sum())} bytes, {100 * after.bytes.sum() / size.sum():.1f} % of them scored",
    )


def continuations(model: Any, tokens: Any, prompts: list[str], n: int = 48) -> list[dict]:
    """Beginnings of held-out documents, continued by sampling at temperature 0.8."""
    rows = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([tokens(prompt)["input_ids"]], device=distributed.device())
        made = sample(
            model, ids, torch.ones_like(ids), max_new_tokens=min(n, language.room(model, ids)), temperature=0.8,
            eos_id=tokens.eos_token_id, pad_id=tokens.pad_token_id, seeds=[derive("continuation", i)],
        )  # fmt: skip
        rows.append({"beginning": prompt, "continuation": tokens.decode(made[0][0].tolist(), skip_special_tokens=True)})
    return rows


def main(config: Config) -> artifact.Artifact:
    """Train, measure on the test documents, and hand the language model over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        documents = {split: text.documents(config.data, split) for split in ("train", "validation")}
        if "init" in parents:
            tokens = language.read_tokenizer(parents["init"])
        else:
            tokens = tokenizer.build(config.tokenizer, lambda: documents["train"])
        train = Packed(config.data, tokens, "train", style="causal", at_least=config.train.batch)

        def untrained() -> Any:
            torch.manual_seed(derive("init", config.seed))
            return language.read(parents["init"]) if "init" in parents else language.build_causal(config.model, tokens)

        def held_out() -> tuple[int, Rows]:
            rows = Packed(config.data, tokens, "validation", style="causal")
            return len(rows), rows.rows

        objective = CLM(untrained())
        stream = DataStream(len(train), train.rows, batch=config.train.batch, seed=config.seed, what="data")
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        groups = decay_groups(objective, decay_exempt)
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)
        watch = validation(objective, config.train, held_out)
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        model = objective.model.eval()
        scores = []
        if run.measures:
            held_out = Packed(config.data, tokens, config.evaluation_split, style="causal", at_least=0)
            before = untrained().to(distributed.device())
            documents["held out"] = text.documents(config.data, config.evaluation_split)
            scores = [evaluate(model, before, held_out, documents, tokens, config.train.precision)]
            beginnings = [" ".join(document.split()[:6]) for document in documents["held out"][:8]]
            run.samples("continuations", continuations(model, tokens, beginnings), "Held-out beginnings, continued")
        return run.publish(
            WRITES,
            lambda folder: language.save(model, tokens, folder),
            scores,
            architecture={"name": type(model).__name__, "parameters": language.size(model)},
            preprocessing={"tokenizer": tokenizer.digest(tokens), "max_length": config.model.context_length},
            data={"fingerprint": config.data.fingerprint(), "documents": train.documents},
            step=steps,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
