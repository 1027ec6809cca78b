"""What is shipped in configs/: complete files, defaults that are the published recipes, a reason for each departure.

That every file loads is tested in tests/fledge/test_architecture.py.
"""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fledge import config as configs
from fledge import recipe
from fledge.config import SCIENCE, DataConfig, mark

ROOT = Path(__file__).parents[1]
STAGES = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.parent.name != "recipes"]
WORLD = [path for path in STAGES if path.stem.endswith("_world")]
PUBLISHED = [path for path in STAGES if path not in WORLD]
each = pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)

# Fields of a data section that say nothing about the world, which knows its own; and those that speak of nothing else.
OF_FILES = {"resize_to", "max_pixels", "holdout", "image_field", "caption_field", "join", "where", "split_on", "field"}
OF_FILES |= {"validation_fraction", "test_fraction", "split_field", "prompt", "messages", "completion"}
OF_FILES |= {"chosen", "rejected", "margin", "responses", "ranks", "scores", "label", "image"}
OF_WORLD = {"kinds", "fonts"}


def opened(path: Path) -> tuple[configs.Tree, BaseModel]:
    """A stage's file as it stands, and its config, parents being given on the command line."""
    tree = configs.read(path)
    cls = recipe.import_stage(tree.data["stage"], "").Config
    required = [f"parents.{name}=somewhere" for name, role in configs.roles(cls).items() if role.required]
    return tree, configs.load(cls, path, required)


def stated(section: BaseModel) -> dict[str, FieldInfo]:
    """The fields of a section that its file must state: the science that its source has a use for."""
    fields = {name: info for name, info in type(section).model_fields.items() if mark(info) == SCIENCE}
    unused = set()
    if isinstance(section, DataConfig) and hasattr(section, "source"):
        unused = OF_FILES if section.source == "world" else OF_WORLD
    unused |= {"parents", "track"}  # given on the command line; pure bookkeeping
    return {name: info for name, info in fields.items() if name not in unused}


def missing(section: BaseModel, written: Any, key: tuple = ()) -> list[str]:
    """Dotted keys that the file leaves to a default."""
    found = []
    for name in stated(section):
        value = getattr(section, name)
        if name not in (written or {}):
            found.append(configs.dotted((*key, name)))
        elif isinstance(value, BaseModel):
            found += missing(value, written[name], (*key, name))
    return found


@each
def test_a_stages_file_is_complete(path):
    tree, config = opened(path)
    assert not missing(config, tree.data)


@each
def test_the_head_says_command_hardware_and_what_to_expect(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"configs/{path.parent.name}/{path.name}" in text and "Hardware:" in text and "Expected:" in text
    assert path in WORLD or "Not run by us at this size" in text.replace("\n# ", " ")


# ------------------------------------------------------------------------------------------------ departures


COVERED = {"data", "test", "model", "train", "evaluation", "decoder", "tokenizer", "image_model", "text_model"}
"""Sections of sizes: one comment at their first line says why all of them are what they are."""


def departures(section: BaseModel, defaults: Any, key: tuple = ()) -> list[tuple]:
    """Keys whose value is not the class default; in a section that the class leaves open, not the section's own."""
    found = []
    for name, info in stated(section).items():
        value = getattr(section, name)
        default = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            found += departures(value, default if type(default) is type(value) else None, (*key, name))
        elif value != default:
            found.append((*key, name))
    return found


def explained(tree: configs.Tree, key: tuple, lines: list[str]) -> bool:
    """Is there a comment on the key's line or on the line above, or on the first line of its section of sizes?"""
    keys = [key] + ([key[:1]] if key[0] in COVERED else [])
    numbers = [int(tree.place(one).rpartition(":")[2]) for one in keys]
    return any("#" in lines[n - 1] or lines[n - 2].lstrip().startswith("#") for n in numbers)


@each
def test_each_departure_from_the_published_recipe_has_its_reason_beside_it(path):
    tree, config = opened(path)
    lines = path.read_text().splitlines()
    silent = [key for key in departures(config, None) if not explained(tree, key, lines)]
    assert not [configs.dotted(key) for key in silent if key not in [("stage",), ("seed",)]]


# ------------------------------------------------------------------------------------------------ published recipes


RECIPES: dict[str, dict[str, Any]] = {
    # He et al. 2021, table 8, and PRETRAIN.md of their repository (not its scripts' defaults)
    "mae_vitb16_imagenet": {
        "model.img_size": 224, "model.patch_size": 16, "model.embed_dim": 768, "model.depth": 12, "model.num_heads": 12,
        "decoder.embed_dim": 512, "decoder.depth": 8, "decoder.num_heads": 16,
        "mask_ratio": 0.75, "norm_pix_loss": True,
        "augment.scale": (0.2, 1.0), "augment.flip": 0.5,
        "optim.lr": 1.5e-4, "optim.lr_batch": 256, "optim.betas": (0.9, 0.95), "optim.weight_decay": 0.05,
        "optim.warmup": "40 epochs", "optim.warmup_offset": 0, "optim.decay": "cosine", "optim.min_lr": 0.0,
        "optim.clip": None, "train.batch": 4096, "train.steps": "800 epochs",
    },
    # Caron et al. 2021: main_dino.py with the flags of the 300-epoch ViT-S/16
    "dino_vits16_imagenet": {
        "model.img_size": 224, "model.patch_size": 16, "model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6,
        "head.out_dim": 65536, "head.hidden_dim": 2048, "head.bottleneck_dim": 256, "head.norm_last_layer": False,
        "augment.global_scale": (0.4, 1.0), "augment.local_scale": (0.05, 0.4), "augment.local_crops": 8,
        "augment.local_size": 96, "augment.jitter": 0.8, "augment.brightness": 0.4, "augment.contrast": 0.4,
        "augment.saturation": 0.2, "augment.hue": 0.1, "augment.grey": 0.2, "augment.blur": (1.0, 0.1, 0.5),
        "augment.blur_radius": (0.1, 2.0), "augment.solarize": 0.2, "augment.flip": 0.5, "drop_path_rate": 0.1,
        "student_temp": 0.1, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30,
        "center_momentum": 0.9, "momentum_teacher": 0.996,
        "optim.lr": 5e-4, "optim.lr_batch": 256, "optim.betas": (0.9, 0.999), "optim.min_lr": 1e-6,
        "optim.warmup": "10 epochs", "optim.weight_decay": 0.04, "optim.weight_decay_end": 0.4, "optim.clip": 3.0,
        "optim.freeze_last_layer": "1 epoch", "train.batch": 1024, "train.steps": "300 epochs",
    },
    # Liu et al. 2019, table 9, base
    "mlm_roberta_base": {
        "model.embed_dim": 768, "model.depth": 12, "model.num_heads": 12, "model.context_length": 512,
        "model.dropout": 0.1, "mlm_probability": 0.15, "mask_replace_prob": 0.8, "random_replace_prob": 0.1,
        "optim.lr": 6e-4, "optim.betas": (0.9, 0.98), "optim.eps": 1e-6, "optim.weight_decay": 0.01,
        "optim.clip": None, "optim.warmup": 24_000, "optim.decay": "linear", "optim.min_lr": 0.0,
        "train.batch": 8192, "train.steps": 500_000,
    },
    # nanoGPT: config/train_gpt2.py and the defaults of train.py
    "clm_gpt2_124m": {
        "model.arch": "gpt2", "model.embed_dim": 768, "model.depth": 12, "model.num_heads": 12,
        "model.context_length": 1024, "model.dropout": 0.0, "model.vocab_multiple": 64, "tokenizer.vocab_size": 50_257,
        "optim.lr": 6e-4, "optim.betas": (0.9, 0.95), "optim.eps": 1e-8, "optim.weight_decay": 0.1, "optim.clip": 1.0,
        "optim.warmup": 2000, "optim.warmup_offset": 1, "optim.decay": "cosine", "optim.min_lr": 6e-5,
        "train.batch": 12 * 40, "train.steps": 600_000,
    },
    # Radford et al. 2021, tables 18 to 20
    "clip_vitb32": {
        "image_model.patch_size": 32, "image_model.embed_dim": 768, "image_model.depth": 12,
        "image_model.num_heads": 12,
        "text_model.embed_dim": 512, "text_model.depth": 12, "text_model.num_heads": 8, "text_model.context_length": 77,
        "tokenizer.vocab_size": 49_408, "projection_dim": 512, "augment.scale": (0.9, 1.0), "augment.flip": 0.0,
        "optim.lr": 5e-4, "optim.betas": (0.9, 0.98), "optim.eps": 1e-6, "optim.weight_decay": 0.2,
        "optim.warmup": 2000, "optim.decay": "cosine", "optim.min_lr": 0.0, "optim.clip": None,
        "train.batch": 32_768, "train.steps": "32 epochs",
    },
    # Ouyang et al. 2022, appendix C, 1.3B: cosine to a tenth, no warm-up
    "sft_instructgpt_1b3": {
        "optim.lr": 9.65e-6, "optim.min_lr": 9.65e-7, "optim.betas": (0.9, 0.95), "optim.warmup": 0,
        "optim.decay": "cosine", "train.batch": 32, "train.steps": "16 epochs",
    },
    # Huang et al. 2024: reward.py
    "reward_nplus": {
        "optim.lr": 3e-6, "optim.eps": 1e-5, "optim.betas": (0.9, 0.999), "optim.weight_decay": 0.01,
        "optim.warmup": 0, "optim.decay": "cosine", "optim.clip": None, "center_rewards_coefficient": 0.0,
        "train.batch": 64, "train.steps": "1 epoch",
    },
    # Hugging Face's alignment handbook: recipes/zephyr-7b-beta/dpo/config_full.yaml, 8 GPUs x 8 rows x 2
    "trl_dpo_zephyr_7b": {
        "trainer": "dpo", "optim.lr": 5e-7, "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.weight_decay": 0.0,
        "optim.clip": 1.0, "optim.warmup": "0.1 epochs", "optim.decay": "cosine", "optim.min_lr": 0.0,
        "train.batch": 128, "train.steps": "1 epoch", "train.precision": "bf16",
    },
    # Huang et al. 2024: ppo.py; a million answers
    "ppo_nplus": {
        "rollout.batch": 512, "rollout.max_new_tokens": 53, "rollout.temperature": 0.7,
        "rollout.missing_eos": "replace", "rollout.missing_eos_penalty": 1.0, "kl.coef": 0.05, "kl.estimator": "k1",
        "kl.target": None, "ppo.num_ppo_epochs": 4, "ppo.cliprange": 0.2, "ppo.cliprange_value": 0.2,
        "ppo.vf_coef": 0.1, "ppo.gamma": 1.0, "ppo.gae_lambda": 0.95, "ppo.whiten_rewards": False,
        "ppo.unbiased_whitening": False, "value.init": "reward", "value.head": "reward",
        "optim.lr": 3e-6, "optim.eps": 1e-5, "optim.decay": "linear", "optim.min_lr": 0.0, "optim.clip": None,
        "train.batch": 512, "train.steps": 1953 * 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_class_defaults_and_shipped_file_are_the_published_recipe(name):
    (path,) = [path for path in PUBLISHED if path.stem == name]
    _, config = opened(path)
    for key, number in RECIPES[name].items():
        default, shipped = type(config).model_fields, config
        *sections, last = key.split(".")
        for section in sections:
            given = default[section] if isinstance(default, dict) else getattr(default, section)
            default, shipped = getattr(given, "default", given), getattr(shipped, section)
        default = default[last].default if isinstance(default, dict) else getattr(default, last)
        assert (key, default, getattr(shipped, last)) == (key, number, number)


def test_every_published_file_is_held_against_its_paper():
    """But for variants of one (a larger MAE, SFT and PPO by adapters) and the two measures, whose numbers are the
    method's own arguments."""
    others = {"mae_vitl16_imagenet", "probe_imagenet", "knn_imagenet", "sft_lora", "ppo_lora"}
    assert {path.stem for path in PUBLISHED} - set(RECIPES) == others


def test_sft_by_adapters_is_qlora_without_its_quantisation():
    """scripts/finetune_guanaco_7b.sh of artidoro/qlora; transformers' constant rate has no warm-up."""
    config = opened(ROOT / "configs/finetune/sft_lora.yaml")[1]
    assert config.lora.model_dump() == {"rank": 64, "alpha": 16.0, "dropout": 0.1, "targets": [], "dora": False}
    assert (config.train.batch, config.train.steps, config.data.max_length) == (4 * 4, 1875, 512)
    optim = config.optim
    assert (optim.lr, optim.decay, optim.betas[1], optim.clip, optim.weight_decay) == (2e-4, "constant", 0.999, 0.3, 0)
    assert optim.warmup == 0


def test_mae_large_is_mae_base_with_another_encoder():
    base, large = (opened(ROOT / f"configs/pretrain/mae_vit{size}16_imagenet.yaml")[1] for size in "bl")
    assert (large.model.embed_dim, large.model.depth, large.model.num_heads) == (1024, 24, 16)
    assert configs.science(large) | {"model": 0} == configs.science(base) | {"model": 0}
