"""Contrastive language-image pretraining (Radford et al. 2021, "Learning Transferable Visual Models From Natural
Language Supervision").

    python -m align.clip configs/align/clip_vitb32.yaml

n pairs on this rank, B in the global batch, T tokens, D features. Row i of images and row i of texts belong together.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.artifact import Artifact, load_state
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data import tokenizer
from fledge.data.augment import ClipAugmentConfig, EvalConfig
from fledge.data.pairs import Captioned, Pairs, PairsConfig, captioned
from fledge.data.tokenizer import TokenizerConfig, tokenize
from fledge.errors import InputError
from fledge.evals.contrastive import ContrastiveEval, evaluate
from fledge.evals.score import Score
from fledge.evals.validation import validation
from fledge.models import language, vit
from fledge.models.language import EncoderConfig
from fledge.models.vit import ViTConfig
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, DataStream, derive
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "dual-encoder"
LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = math.log(100)


class Parents(BaseConfig):
    image: str | None = parent("vision-encoder", required=False)
    """The image tower; else `image_model` from scratch."""
    text: str | None = parent("text-encoder", required=False)
    """The text tower and its tokenizer; else `text_model` and `tokenizer` from scratch."""


class Optim(OptimConfig):
    """Tables 18-20 of the paper, ViT-B/32: 2,000 steps of warm-up, cosine to 0; no decay of gains and biases."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    warmup: Duration = 2000


class Train(TrainConfig):
    batch: PositiveInt = 32_768
    steps: Duration = "32 epochs"


class Config(StageConfig):
    """Pictures to words. The defaults are ViT-B/32's published recipe, with this house's plain towers.

    Three departures from the paper's architecture: no LayerNorm before the image tower's blocks, GELU instead of
    QuickGELU, and a bidirectional text tower that is read at its first token instead of a causal one read at its last.
    """

    stage: Literal["align.clip"] = "align.clip"
    parents: Parents = Parents()
    data: PairsConfig
    templates: tuple[str, ...] = ("{}",)
    """Forms of a caption {}; one is drawn whenever a pair is seen. {script}: that of a world's character."""
    augment: ClipAugmentConfig = ClipAugmentConfig()
    tokenizer: TokenizerConfig = TokenizerConfig(style="encoder", vocab_size=49_408)
    """Trained on the captions; of no use with parents.text, whose own is taken."""
    image_model: ViTConfig = ViTConfig(patch_size=32)
    """Sizes of the image tower; of no use with parents.image, which has its own."""
    text_model: EncoderConfig = EncoderConfig(
        embed_dim=512, depth=12, num_heads=8, context_length=77, dropout=0.0, vocab_multiple=8
    )
    """Sizes of the text tower; with parents.text, which has its own, only `dropout` counts."""
    projection_dim: PositiveInt = 512
    max_length: int = Field(77, ge=3)
    """Tokens of a caption, its first and last included; a longer one is cut before its last."""
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()
    evaluation: ContrastiveEval | None = None
    """None: the model is handed over unmeasured."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Config":
        if not self.templates or not all("{}" in one for one in self.templates):
            raise ValueError("templates needs at least one, each with {} where the caption goes")
        if self.data.source != "world" and any("{script}" in one for one in self.templates):
            raise ValueError("templates: only the world's characters have a {script}")
        if self.parents.image is None:
            size, channels = self.image_model.img_size, self.image_model.in_chans
            if self.augment.size != size:
                raise ValueError(f"augment.size {self.augment.size} is not image_model.img_size {size}")
            if self.data.channels != channels:
                raise ValueError(f"data.channels {self.data.channels} is not image_model.in_chans {channels}")
        if self.parents.text is None:
            limit = self.text_model.context_length
            if self.max_length > limit:
                raise ValueError(f"max_length {self.max_length} exceeds text_model.context_length {limit}")
            if self.tokenizer.style != "encoder":
                raise ValueError("tokenizer.style must be encoder: a caption is read from its first token to its last")
        return self


# ------------------------------------------------------------------------------------------------------------ maths


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over the global batch, the part of this rank's rows, summed.

    This rank's n rows stand against all B columns. Gathering with gradient, a sum over ranks in the backward, and
    DDP's mean over ranks give the exact gradient of the mean over the global batch.

    Args:
        image, text: (n, D), of unit length, at least fp32.
        logit_scale: (1,), the logarithm of the inverse temperature.

    Returns:
        The summed loss, (); and how many of this rank's images find their text at the first place, ().
    """
    n, D = image.shape
    all_image, all_text = distributed.gather_rows(torch.cat([image, text], dim=1)).split(D, dim=1)  # (B, D) each
    labels = torch.arange(n, device=image.device) + n * distributed.rank()
    scale = logit_scale.exp()
    per_image = scale * image @ all_text.T  # (n, B)
    per_text = scale * text @ all_image.T
    loss = F.cross_entropy(per_image, labels, reduction="sum") + F.cross_entropy(per_text, labels, reduction="sum")
    return loss / 2, (per_image.detach().argmax(dim=1) == labels).sum()


def decay_exempt(name: str, parameter: Tensor) -> bool:
    """Gains, biases, the temperature and the class token are not decayed; embeddings are."""
    return parameter.ndim <= 1 or name.endswith((".bias", "cls_token"))


# -------------------------------------------------------------------------------------------------------- objective


class CLIP(nn.Module):
    """Two towers, two projections, one temperature.

    Args:
        model: a ``VisionTextDualEncoderModel``.
        rows: of the global batch. The loss couples them all, so a forward that sees fewer is a mistake.
    """

    weights = {"loss": 1.0}

    def __init__(self, model: Any, rows: int | None = None) -> None:
        super().__init__()
        self.model, self.rows = model, rows
        model.logit_scale = nn.Parameter(model.logit_scale.detach().reshape(1))  # sharding wants an axis

    def counts(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        n = len(batch["image"])
        return {"loss": n, "accuracy": n, "logit_scale": n}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        n = len(batch["image"])
        if self.training and self.rows is not None and n * distributed.world_size() != self.rows:
            raise ValueError(f"{n} rows on each of {distributed.world_size()} ranks are not the batch of {self.rows}")
        image = self.encode_image(batch["image"])
        text = self.encode_text(batch["input_ids"], batch["attention_mask"])
        with torch.autocast(image.device.type, enabled=False):
            loss, hits = contrastive_loss(image, text, self.model.logit_scale)
        scale = self.model.logit_scale.detach().exp().squeeze()
        return {"loss": loss, "accuracy": hits.to(loss.dtype), "logit_scale": scale * n}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, D), of unit length, at least fp32."""
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(n, T), (n, T) -> (n, D), of unit length, at least fp32."""
        return unit(self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output)

    def after_step(self, step: int, means: dict[str, Tensor]) -> None:
        """The parameter itself stays in [0, ln 100], so that its exponential never needs to be cut."""
        self.model.logit_scale.clamp_(0, LOGIT_SCALE_MAX)


def unit(features: Tensor) -> Tensor:
    """Rows of unit length, computed outside of half precision."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


# ----------------------------------------------------------------------------------------------------------- towers


def image_tower(config: Config, encoder: Artifact | None) -> tuple[Any, ViTConfig, str]:
    """transformers' ViTModel whose pooled output is the encoder's feature, its sizes, and the loading report."""
    sizes = vit.read_config(encoder) if encoder else config.image_model
    timm_vit = vit.build(sizes)
    report = vit.load(timm_vit, sizes, encoder) if encoder else ""
    tower = vit.to_transformers(timm_vit, sizes)
    tower.pooler.requires_grad_(False)  # an identity, so that pooled = class token; trained, it would be a layer more
    return tower, sizes, report


def text_tower(config: Config, encoder: Artifact | None, tokens: Any) -> tuple[Any, str]:
    """A transformers encoder whose pooler is new, and the loading report. The language modelling head stays behind."""
    from transformers import AutoConfig, AutoModel

    if encoder:
        dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.text_model.dropout)
        sizes = AutoConfig.from_pretrained(encoder.path, local_files_only=True, **dropout)
        tensors = encoder.tensors()
    else:
        scratch = language.build_encoder(config.text_model, tokens)
        sizes, tensors = scratch.config, scratch.state_dict()
    tower = AutoModel.from_config(sizes, dtype=torch.float32)
    if getattr(tower, "pooler", None) is None:
        raise InputError(f"parents.text: {type(tower).__name__} has no pooler, which a dual encoder reads; give a BERT")
    prefix = tower.base_model_prefix + "."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    where = str(encoder.path) if encoder else "text_model"
    report = load_state(tower, tensors, expect_missing=["pooler.*"], expect_unexpected=["cls.*"], where=where)
    return tower, report if encoder else ""


def dual_encoder(config: Config, parents: dict[str, Artifact], tokens: Any, say: Callable[[str], None]) -> Any:
    """transformers' VisionTextDualEncoderModel of both towers; projections N(0, 1 / width) as CLIP's."""
    from transformers import VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    vision, _, image_report = image_tower(config, parents.get("image"))
    text, text_report = text_tower(config, parents.get("text"), tokens)
    for report in filter(None, (image_report, text_report)):
        say(report)
    sizes = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=config.projection_dim, logit_scale_init_value=LOGIT_SCALE_INIT
    )
    model = VisionTextDualEncoderModel(config=sizes, vision_model=vision, text_model=text)
    for projection in (model.visual_projection, model.text_projection):
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    return model


def save(model: Any, tokens: Any, view: EvalConfig, max_length: int, folder: Path) -> None:
    """Write transformers' own form: model, tokenizer that cuts at ``max_length``, and an image processor."""
    from transformers import CLIPImageProcessor

    state = model.state_dict()
    model.save_pretrained(folder, state_dict=state | {"logit_scale": state["logit_scale"].reshape(())})
    tokens.model_max_length = max_length
    tokens.save_pretrained(folder)
    square = {"height": view.size, "width": view.size}
    CLIPImageProcessor(
        size={"shortest_edge": view.short_side}, crop_size=square, resample=3, do_convert_rgb=len(view.mean) == 3,
        image_mean=list(view.mean), image_std=list(view.std),
    ).save_pretrained(folder)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- stage


def caption_forms(captions: Sequence[str], config: Config) -> list[str]:
    """Every caption in all of the config's forms, caption by caption. Distinct captions stay distinct."""
    script = dict.fromkeys(captions, "")
    if config.data.source == "world":
        from fledge.data.world import characters

        script = {character.name: character.script for character in characters()}
    return [t.replace("{script}", script[c]).replace("{}", c) for c in captions for t in config.templates]


class PairRows:
    """Rows of a picture and one form of its caption, cut after the longest caption among them.

    Args:
        rows: of pictures and their captions in all F forms, "input_ids" and "attention_mask" (B, F, T).
    """

    def __init__(self, rows: Captioned) -> None:
        self.rows = rows

    def __call__(self, ids: list[int], seeds: list[int]) -> Batch:
        batch = self.rows(ids, seeds)
        forms = batch["input_ids"].shape[1]
        chosen = torch.tensor([Random(derive("template", seed)).randrange(forms) for seed in seeds])
        at = torch.arange(len(chosen))
        return shortened(batch | {name: batch[name][at, chosen] for name in ("input_ids", "attention_mask")})


def pair_rows(pairs: Pairs, tokens: Any, config: Config) -> PairRows:
    """The rows of the training stream, every caption tokenised once."""
    table = tokenize(tokens, caption_forms(pairs.captions, config), config.max_length)
    text = {name: tensor.unflatten(0, (len(pairs), -1)) for name, tensor in table.items()}
    return PairRows(captioned(pairs, config.augment, text))


def shortened(batch: Batch, multiple: int = 8) -> Batch:
    """Without columns that are padding in every row; few different lengths, for kernels that are compiled for each."""
    longest = int(batch["attention_mask"].sum(dim=1).max())
    T = -(-longest // multiple) * multiple
    return batch | {name: batch[name][:, :T] for name in ("input_ids", "attention_mask")}


def check_batch(train: TrainConfig, world: int) -> None:
    """The loss compares every pair with every other of the batch, so a batch cannot be cut into micro-batches."""
    if train.batch % world:
        raise InputError(
            f"train.batch {train.batch} is not a multiple of the {world} ranks; each needs equally many pairs"
        )
    rows = train.batch // world
    if train.micro_batch is not None and (train.micro_batch == "auto" or train.micro_batch < rows):
        raise InputError(
            f"train.micro_batch {train.micro_batch} may be less than the {rows} pairs of one rank, and a contrastive "
            "loss over parts of the batch is another loss; use more ranks, train.grad_checkpointing or a smaller "
            "train.batch"
        )


def check_parents(config: Config, parents: dict[str, Artifact], tokens: Any) -> None:
    """What the parents were made with must be what they are fed."""
    if "image" in parents:
        sizes, known = vit.read_config(parents["image"]), parents["image"].preprocessing
        fed = {"size": config.augment.size, "mean": list(config.augment.mean), "std": list(config.augment.std)}
        wanted = {name: known.get(name, value) for name, value in fed.items()} | {"size": sizes.img_size}
        differ = [f"augment.{name} is {fed[name]}, there {wanted[name]}" for name in fed if fed[name] != wanted[name]]
        if config.data.channels != sizes.in_chans:
            differ.append(f"data.channels is {config.data.channels}, there {sizes.in_chans}")
        if differ:
            raise InputError(f"parents.image {parents['image'].path} was made with other pictures: {'; '.join(differ)}")
    if "text" in parents:
        limit = parents["text"].preprocessing.get("max_length", config.max_length)
        if config.max_length > limit:
            raise InputError(f"max_length {config.max_length} exceeds the {limit} positions of {parents['text'].path}")
        if tokenizer.style_of(tokens) != "encoder":
            raise InputError(
                f"the tokenizer of {parents['text'].path} does not close a text; train it as style: encoder"
            )


def main(config: Config) -> Artifact:
    """Train both towers, measure them on held-out pairs, and hand them over as one."""
    distributed.setup(config.train.device)
    check_batch(config.train, distributed.world_size())
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        pairs: Pairs = config.data.open()
        if pairs.report():
            run.say(pairs.report())
        if "text" in parents:
            tokens = language.read_tokenizer(parents["text"])
        else:
            tokens = tokenizer.build(config.tokenizer, lambda: caption_forms(pairs.captions, config))
        check_parents(config, parents, tokens)

        def untrained(say: Callable[[str], None] = lambda report: None) -> CLIP:
            torch.manual_seed(derive("init", config.seed))
            return CLIP(dual_encoder(config, parents, tokens, say), rows=config.train.batch)

        clip = untrained(run.say)
        rows = pair_rows(pairs, tokens, config)
        stream = DataStream(len(pairs), rows, batch=config.train.batch, seed=config.seed)
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        optim = adamw(
            decay_groups(clip, decay_exempt), config.optim,
            batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch,
        )  # fmt: skip

        def held_out() -> tuple[int, PairRows]:
            others = config.data.held_out().open()
            return len(others), pair_rows(others, tokens, config)

        watch = validation(clip, config.train, held_out)
        fit(clip, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        clip.eval()
        view = config.augment.evaluation(resize=config.augment.size)
        scores: list[Score] = []
        if run.measures and config.evaluation:
            before = untrained().to(distributed.device()).eval()
            scores, sheet = evaluate(clip, before, config.evaluation, view, tokens, config.max_length)
            run.picture("retrieval", sheet, "Held-out captions and the pictures they find first")
        return run.publish(
            WRITES,
            lambda folder: save(clip.model, tokens, view, config.max_length, folder),
            scores,
            architecture={
                "name": type(clip.model).__name__,
                "image": type(clip.model.vision_model).__name__,
                "text": type(clip.model.text_model).__name__,
                "projection_dim": config.projection_dim,
                "parameters": language.size(clip.model),
            },
            preprocessing=vit.preprocessing(view)
            | {"tokenizer": tokenizer.digest(tokens), "max_length": config.max_length},
            data={
                "fingerprint": pairs.fingerprint,
                "captions": len(pairs),
                "pictures": len(pairs.images),
                "skipped": len(pairs.skipped),
            },
            step=steps,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
