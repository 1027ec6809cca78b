"""Vision transformers: timm's ``VisionTransformer`` (its blocks, key names and loading), built from a typed config.

B images, C channels, H x W pixels, P patch side, N = 1 + L tokens (cls first, patches row-major), D width.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from fledge.artifact import Artifact, load_state
from fledge.config import Config
from fledge.data.augment import EvalConfig
from fledge.errors import InputError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TIMM_NAME = "vit_base_patch16_224"  # the timm architecture whose sizes are then replaced by ours


class ViTConfig(Config):
    """A plain ViT; the defaults are ViT-B/16 at 224 pixels (Dosovitskiy et al. 2021)."""

    img_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    in_chans: PositiveInt = 3
    embed_dim: PositiveInt = 768
    depth: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_ratio: float = 4.0

    @model_validator(mode="after")
    def _sizes_agree(self) -> "ViTConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of 4, which sine-cosine positions need")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2


def build(config: ViTConfig, *, drop_path_rate: float = 0.0, num_classes: int = 0) -> "VisionTransformer":
    """A timm ViT without a head: feature = cls after the final LayerNorm (eps 1e-6), weights as timm draws them."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        **config.model_dump(),
        num_classes=num_classes,
        global_pool="token",
        drop_path_rate=drop_path_rate,
    )


def sincos_pos_embed(embed_dim: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (1, 1 + grid², embed_dim), zero for cls.

    The first half of the channels encodes the column, the second the row; in each, sines then cosines with
    frequencies 10000^(-2i/(D/2)), in float64 (He et al. 2021, Vaswani et al. 2017; the order is MAE's).
    """
    quarter = embed_dim // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)  # (D/4,)
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(axis, omega) for axis in (column, row)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)  # (L, D)
    table = np.concatenate([np.zeros((1, embed_dim)), table])
    return torch.from_numpy(table).to(torch.get_default_dtype())[None]


def xavier_init(module: nn.Module) -> None:
    """MAE's initialisation: xavier-uniform for every Linear (qkv fused), zero biases, unit LayerNorms."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def save(
    model: nn.Module, config: ViTConfig, preprocessing: dict, folder: Path, classes: list[str] | None = None
) -> None:
    """Write timm's ``local-dir:`` form: model.safetensors, and config.json with architecture, sizes, mean and std."""
    from safetensors.torch import save_file

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    size = [config.in_chans, config.img_size, config.img_size]
    description = {
        "architecture": TIMM_NAME,
        "num_classes": len(classes or []),
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": config.model_dump() | {"num_classes": len(classes or []), "global_pool": "token"},
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": preprocessing["mean"],
            "std": preprocessing["std"],
            "num_classes": len(classes or []),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        | ({"label_names": classes} if classes else {}),
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def preprocessing(view: EvalConfig) -> dict:
    """What a picture goes through before the encoder, for manifest and config.json."""
    return {"mean": list(view.mean), "std": list(view.std), "size": view.size, "resize": view.short_side}


def architecture(config: ViTConfig) -> dict:
    return {"name": TIMM_NAME, "vit": config.model_dump()}


def read_config(artifact: Artifact) -> ViTConfig:
    """The sizes of a vision artifact, from its manifest."""
    return ViTConfig(**artifact.manifest["architecture"]["vit"])


def load(model: nn.Module, config: ViTConfig, artifact: Artifact) -> str:
    """Load a vision-encoder artifact into ``model``, strictly; returns the loading report.

    Raises:
        InputError: the sizes differ, or a tensor is left over or missing.
    """
    from safetensors.torch import load_file

    sizes = read_config(artifact)
    if sizes != config:
        differ = [f"{k} {v} here, {getattr(sizes, k)} there" for k, v in config if getattr(sizes, k) != v]
        raise InputError(
            f"{artifact.path} does not fit model: {', '.join(differ)}; give model the sizes of the artifact"
        )
    return load_state(model, load_file(artifact.path / "model.safetensors"), where=str(artifact.path))


def read(artifact: Artifact) -> tuple["VisionTransformer", ViTConfig]:
    """The encoder of a vision-encoder artifact, and its sizes."""
    config = read_config(artifact)
    model = build(config)
    load(model, config, artifact)
    return model, config


def to_transformers(model: "VisionTransformer", config: ViTConfig) -> nn.Module:
    """The same function as transformers' ``ViTModel``: fused qkv split, the pooler an identity (so pooled = cls).

    Returns:
        A ViTModel whose ``pooler_output`` equals ``model(images)``, (B, D).
    """
    from transformers import ViTConfig as HFConfig
    from transformers import ViTModel

    hf = ViTModel(
        HFConfig(
            image_size=config.img_size,
            patch_size=config.patch_size,
            num_channels=config.in_chans,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            intermediate_size=int(config.embed_dim * config.mlp_ratio),
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pooler_act="linear",
            pooler_output_size=config.embed_dim,
        ),
        add_pooling_layer=True,
    )
    load_state(hf, transformers_state(model), where="ViT as transformers' ViTModel")
    return hf


def transformers_state(model: "VisionTransformer") -> dict[str, Tensor]:
    """timm's tensors under transformers' names; qkv thirds become q, k, v; the pooler becomes an identity."""
    rename = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.o_proj",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "blocks": "layers",
        "norm": "layernorm",
    }
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".attn.qkv." in name:
            block, kind = name.split(".")[1], name.rsplit(".", 1)[1]
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                state[f"layers.{block}.attention.{letter}_proj.{kind}"] = third
            continue
        parts = f".{name}."
        for ours, theirs in rename.items():
            parts = parts.replace(f".{ours}.", f".{theirs}.")
        state[parts.strip(".")] = tensor
    width = model.embed_dim
    return state | {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
