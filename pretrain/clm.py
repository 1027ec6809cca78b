"""Next-token language modelling (Radford et al. 2019; sizes and schedule as nanoGPT trains GPT-2 124M).

    python -m pretrain.clm configs/pretrain/clm_gpt2_124m.yaml

B rows of T tokens, V vocabulary. ``labels`` are shifted already: labels[t] is the token that follows input_ids[t] in
the same document, -100 where there is none.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fledge.config import Config as BaseConfig
from fledge.config import StageConfig, parent
from fledge.data.text import TextConfig
from fledge.data.tokenizer import TokenizerConfig
from fledge.models.language import CausalConfig, document_mask
from fledge.optim import OptimConfig
from fledge.stream import Batch
from fledge.track import TrackConfig
from fledge.train import TrainConfig

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
    warmup: int | str = 2000
    warmup_offset: Literal[0, 1] = 1
    min_lr: float = 6e-5


class Train(TrainConfig):
    batch: int = 480
    """Blocks of ``model.context_length`` tokens: 480 · 1024 = 491,520 tokens a step."""
    steps: int | str = 600_000


class Config(StageConfig):
    """Next-token pretraining; the defaults are nanoGPT's GPT-2 124M."""

    stage: Literal["pretrain.clm"] = "pretrain.clm"
    parents: Parents = Parents()
    data: TextConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: CausalConfig = CausalConfig()
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()


# -------------------------------------------------------------------------------------------------------- objective


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over labels that are not -100, in fp32 at least. logits (B, T, V), labels (B, T) shifted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


class CLM(nn.Module):
    """A causal language model that predicts each next token of its own document."""

    weights = {"loss": 1.0}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def counts(self, batch: Batch) -> dict[str, int]:
        """Tokens that have a next one."""
        return {"loss": int((batch["labels"] != -100).sum())}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        logits = self.model(
            input_ids=batch["input_ids"],
            attention_mask=document_mask(batch["document"], causal=True),
            position_ids=batch["position"],
            use_cache=False,
        ).logits
        return {"loss": next_token_loss(logits, batch["labels"])}
