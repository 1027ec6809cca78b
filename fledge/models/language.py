"""Language models through transformers, built from typed configs; documents in one row are isolated explicitly.

B rows, T positions, V vocabulary. ``document`` (B, T) numbers the documents of a row from 1, 0 is padding; ``position``
(B, T) restarts in each document.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from fledge.artifact import Artifact
from fledge.config import Config
from fledge.errors import InputError


class CausalConfig(Config):
    """A decoder. The defaults are GPT-2 124M as nanoGPT trains it."""

    arch: Literal["gpt2", "llama"] = "gpt2"
    """gpt2: learned positions, LayerNorm, GELU; llama: rotary positions, RMSNorm, SwiGLU."""
    embed_dim: PositiveInt = 768
    depth: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_dim: PositiveInt | None = None
    """None: 4 · embed_dim for gpt2, 8/3 · embed_dim rounded up to a multiple of 16 for llama."""
    context_length: PositiveInt = 1024
    dropout: float = 0.0
    vocab_multiple: PositiveInt = 64
    """The embedding is padded to this multiple; padded entries are never targets."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "CausalConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class EncoderConfig(Config):
    """A BERT encoder. The defaults are BERT-base (Devlin et al. 2019)."""

    embed_dim: PositiveInt = 768
    depth: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_dim: PositiveInt | None = None
    """None: 4 · embed_dim."""
    context_length: PositiveInt = 512
    dropout: float = 0.1
    init_std: PositiveFloat = 0.02
    """Of matrices and embeddings, truncated at two of it. BERT's .02 is for widths about 768."""
    vocab_multiple: PositiveInt = 8

    @model_validator(mode="after")
    def _sizes_agree(self) -> "EncoderConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        return self


def padded_vocab(tokenizer: Any, multiple: int) -> int:
    return -(-len(tokenizer) // multiple) * multiple


def special_ids(tokenizer: Any) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def build_causal(config: CausalConfig, tokenizer: Any) -> nn.Module:
    """A causal LM with tied embeddings, N(0, .02), residual projections N(0, .02 / sqrt(2 · depth)) (nanoGPT)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    vocab = padded_vocab(tokenizer, config.vocab_multiple)
    if config.arch == "gpt2":
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab,
                n_positions=config.context_length,
                n_embd=config.embed_dim,
                n_layer=config.depth,
                n_head=config.num_heads,
                n_inner=config.mlp_dim,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                **special_ids(tokenizer),
            )
        )
        residual = ("attn.c_proj.weight", "mlp.c_proj.weight")
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                max_position_embeddings=config.context_length,
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_dim or -(-config.embed_dim * 8 // 48) * 16,
                attention_dropout=config.dropout,
                tie_word_embeddings=True,
                **special_ids(tokenizer),
            )
        )
        residual = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(residual):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.depth))
    return model


def build_encoder(config: EncoderConfig, tokenizer: Any) -> nn.Module:
    """A BERT masked LM (embeddings tied to the decoder behind dense + GELU + LayerNorm), truncated to 2 sigma."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            vocab_size=padded_vocab(tokenizer, config.vocab_multiple),
            max_position_embeddings=config.context_length,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_dim or 4 * config.embed_dim,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
        )
    )
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(layer.weight, std=config.init_std, a=-2 * config.init_std, b=2 * config.init_std)
    return model


def document_mask(document: Tensor, *, causal: bool) -> Tensor:
    """(B, T) document numbers -> (B, 1, T, T) bool, True = may attend: the same document, and no later position.

    Padding is a document of its own, so no row of the mask is empty.
    """
    allowed = document[:, :, None] == document[:, None, :]
    if causal:
        allowed = allowed.tril()
    return allowed[:, None]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over labels that are not -100, in fp32 at least. logits (B, T, V), labels (B, T) shifted."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def logits_at(model: Any, where: Tensor, **inputs) -> Tensor:
    """The logits of some positions alone, (n, V), in their order row by row: the head never sees the others.

    Args:
        where: (B, T) bool, n of them true.
        inputs: of the model's forward.
    """
    return model(**inputs, use_cache=False, logits_to_keep=where).logits


def token_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p of each token, (n,), in fp32 at least. logits (n, V), tokens (n,)."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens, reduction="none")


def neftune(embeddings: Tensor, document: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise of at most alpha / sqrt(L · d) (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

    L is the length of the token's own document, so that neither padding nor packing changes the noise of an example;
    transformers and TRL take the padded width of the micro-batch instead.

    Args:
        embeddings: (B, T, d).
        document: (B, T) numbers of the documents of a row; padding is one of its own.
    """
    lengths = torch.zeros(len(document), int(document.max()) + 1, device=document.device, dtype=embeddings.dtype)
    lengths = lengths.scatter_add(1, document, torch.ones_like(document, dtype=embeddings.dtype)).gather(1, document)
    most = alpha / (lengths * embeddings.shape[-1]).sqrt()  # (B, T)
    return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * most[:, :, None]


def decay_exempt(name: str, parameter: Tensor) -> bool:
    """Gains and biases are not decayed; embeddings are, as in GPT-2's and BERT's published recipes."""
    return parameter.ndim <= 1 or name.endswith(".bias")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars and reports of transformers: what it loads and saves is checked and said by us."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write transformers' own form: config.json, model.safetensors, tokenizer files."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def read_tokenizer(artifact: Artifact) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(artifact.path, local_files_only=True)


def read_processor(folder: Path) -> Any:
    """The processor of a model that sees, which holds its tokenizer too; None: the model reads text alone."""
    from transformers import AutoProcessor

    if not any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def writes(folder: Path) -> str:
    """transformers' Auto class for a model that writes text: a causal one, or one that sees beside."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    return "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"


def read(artifact: Artifact, auto: str | None = None, **options) -> Any:
    """The model of a language artifact, in fp32, strictly: a tensor left over or missing is an error.

    Args:
        auto: transformers' Auto class; by default that of ``writes``.
        options: passed to from_pretrained; ``expect_missing`` names prefixes that are allowed to be new.
    """
    import transformers

    expect_missing = tuple(options.pop("expect_missing", ()))
    expect_unexpected = tuple(options.pop("expect_unexpected", ()))
    auto = auto or writes(artifact.path)
    with quiet():
        model, report = getattr(transformers, auto).from_pretrained(
            artifact.path, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, dtype=torch.float32, **options,
        )  # fmt: skip
    # str.startswith(()) is False: without expectations every name counts.
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(expect_missing))
    left_over = sorted(n for n in report["unexpected_keys"] if not n.startswith(expect_unexpected))
    if missing or left_over or report["mismatched_keys"]:
        raise InputError(
            f"{artifact.path} does not fit {auto}: missing {missing}, left over {left_over}, "
            f"other shapes {sorted(map(str, report['mismatched_keys']))}; expected what a stage of fledge wrote"
        )
    return model


def positions(config: Any) -> int:
    """How many tokens a model of this config reads; many, where it does not say."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2**31)


def room(model: Any, input_ids: Tensor) -> int:
    """How many tokens the model can say behind prompts (B, P) before its positions end."""
    return max(0, positions(model.config) - input_ids.shape[1])


def check_length(model: Any, length: int, key: str) -> None:
    """Refuse rows of ``length`` tokens where the model has fewer positions, as an InputError that names ``key``."""
    most = positions(model.config)
    if length > most:
        raise InputError(f"{key} is {length}, but the parent model has {most} positions; use at most {most}")


def size(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
