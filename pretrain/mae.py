"""Masked autoencoders (He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners").

    python -m pretrain.mae configs/pretrain/mae_vitb16_imagenet.yaml

B images, L patches of P x P pixels, D width of the encoder. In ``mask`` 1 is removed and 0 is kept.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fledge import artifact, distributed
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data.augment import AugmentConfig, denormalise
from fledge.data.images import Images, ImagesConfig, augmented, eval_batch
from fledge.evals.validation import validation
from fledge.evals.vision import VisionEval, evaluate
from fledge.models import vit
from fledge.models.vit import ViTConfig
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.pictures import picture_grid
from fledge.stream import Batch, DataStream, derive, generator
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "vision-encoder"


class Parents(BaseConfig):
    init: str | None = parent("vision-encoder", required=False)
    """Encoder to start from; its decoder is new."""


class Decoder(BaseConfig):
    """The light decoder (section 3): the same for every encoder size."""

    embed_dim: PositiveInt = 512
    depth: PositiveInt = 8
    num_heads: PositiveInt = 16


class Optim(OptimConfig):
    """Table 8 of the paper: blr 1.5e-4 per 256 images, 40 epochs of warm-up from 0, cosine to 0 per iteration."""

    lr: float = 1.5e-4
    lr_batch: int | None = 256
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: Duration = "40 epochs"


class Train(TrainConfig):
    batch: int = 4096
    steps: Duration = "800 epochs"


class Config(StageConfig):
    """MAE pretraining; the defaults are the published ViT-B/16 recipe."""

    stage: Literal["pretrain.mae"] = "pretrain.mae"
    parents: Parents = Parents()
    data: ImagesConfig
    augment: AugmentConfig = AugmentConfig()
    model: ViTConfig = ViTConfig()
    decoder: Decoder = Decoder()
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    norm_pix_loss: bool = True
    """Targets are normalised by their patch's mean and standard deviation."""
    optim: Optim = Optim()
    train: Train = Train()
    track: TrackConfig = TrackConfig()
    evaluation: VisionEval | None = None
    """Labelled pictures that measure the encoder in the end; none: it is handed over unmeasured."""

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Config":
        if self.augment.size != self.model.img_size:
            raise ValueError(f"augment.size {self.augment.size} is not model.img_size {self.model.img_size}")
        if self.data.channels != self.model.in_chans:
            raise ValueError(f"data.channels {self.data.channels} is not model.in_chans {self.model.in_chans}")
        if int(self.model.num_patches * (1 - self.mask_ratio)) < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} keeps none of {self.model.num_patches} patches")
        return self


# ------------------------------------------------------------------------------------------------------------ maths


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P·P·C): patches row-major, the channel last inside a patch."""
    B, C, H, W = images.shape
    h, w, P = H // patch_size, W // patch_size, patch_size
    return images.reshape(B, C, h, P, w, P).permute(0, 2, 4, 3, 5, 1).reshape(B, h * w, P * P * C)


def unpatchify(patches: Tensor, patch_size: int, channels: int, grid: int) -> Tensor:
    """(B, L, P·P·C) -> (B, C, H, W), the inverse of ``patchify`` for a square grid."""
    B, P = len(patches), patch_size
    patches = patches.reshape(B, grid, grid, P, P, channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(B, channels, grid * P, grid * P)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the patches with the smallest noise.

    Args:
        noise: (B, L).

    Returns:
        ids_keep (B, len_keep), mask (B, L) with 1 = removed, ids_restore (B, L) which undoes the shuffle.
    """
    L = noise.shape[1]
    len_keep = int(L * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    mask = (ids_restore >= len_keep).to(noise.dtype)
    return ids_shuffle[:, :len_keep], mask, ids_restore


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather rows of (B, N, D) by ids (B, n) -> (B, n, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[-1]))


def targets(patches: Tensor, norm_pix_loss: bool) -> Tensor:
    """Pixels of each patch, normalised by its mean and (unbiased) variance if ``norm_pix_loss``. (B, L, P·P·C)."""
    if not norm_pix_loss:
        return patches
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


# -------------------------------------------------------------------------------------------------------- objective


class MAE(nn.Module):
    """Encode the visible patches, decode all of them, regress the removed ones."""

    weights = {"loss": 1.0}

    def __init__(self, config: Config) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.config = config
        model, decoder = config.model, config.decoder
        grid = model.img_size // model.patch_size
        self.encoder = vit.build(model)
        self.decoder_embed = nn.Linear(model.embed_dim, decoder.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.embed_dim))
        self.decoder_pos_embed = nn.Parameter(vit.sincos_pos_embed(decoder.embed_dim, grid), requires_grad=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(decoder.embed_dim, decoder.num_heads, 4.0, qkv_bias=True, norm_layer=norm)
                for _ in range(decoder.depth)
            )
        )
        self.decoder_norm = norm(decoder.embed_dim)
        self.decoder_pred = nn.Linear(decoder.embed_dim, model.patch_size**2 * model.in_chans)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for all Linears and the patch projection seen as one; its bias keeps the convolution's default."""
        vit.xavier_init(self)
        projection = self.encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))
        grid = self.config.model.img_size // self.config.model.patch_size
        self.encoder.pos_embed = nn.Parameter(
            vit.sincos_pos_embed(self.config.model.embed_dim, grid), requires_grad=False
        )
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Removed patches."""
        B, L = batch["noise"].shape
        return {"loss": B * (L - int(L * (1 - self.config.mask_ratio)))}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        latent, mask, ids_restore = self.forward_encoder(batch["image"], batch["noise"])
        pred = self.forward_decoder(latent, ids_restore)
        return {"loss": self.forward_loss(batch["image"], pred, mask)}

    def forward_encoder(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, H, W), (B, L) -> latent (B, 1 + len_keep, D), mask (B, L), ids_restore (B, L)."""
        encoder = self.encoder
        ids_keep, mask, ids_restore = random_masking(noise, self.config.mask_ratio)
        tokens = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]  # (B, L, D)
        tokens = take(tokens, ids_keep)
        cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls_token.to(tokens.dtype), tokens], dim=1)
        return encoder.norm(encoder.blocks(tokens)), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent (B, 1 + len_keep, D) -> predicted patches (B, L, P·P·C); cls is decoded too and dropped."""
        tokens = self.decoder_embed(latent)  # (B, 1 + len_keep, D')
        B, L = ids_restore.shape
        missing = self.mask_token.to(tokens.dtype).expand(B, L + 1 - tokens.shape[1], -1)
        patches = take(torch.cat([tokens[:, 1:], missing], dim=1), ids_restore)  # (B, L, D')
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """The mean squared error of each patch, summed over the removed ones; in fp32 under autocast."""
        target = targets(patchify(images, self.config.model.patch_size), self.config.norm_pix_loss)
        pred = pred.to(torch.promote_types(pred.dtype, torch.float32))
        return ((pred - target).square().mean(dim=-1) * mask).sum()


# ------------------------------------------------------------------------------------------------------------- stage


class MaskedImages:
    """Rows of augmented images with the noise that decides their masks: a function of each sample's seed."""

    def __init__(self, rows, num_patches: int) -> None:
        self.rows, self.num_patches = rows, num_patches

    def __call__(self, ids: list[int], seeds: list[int]) -> Batch:
        noise = [
            torch.rand(self.num_patches, generator=torch.Generator().manual_seed(derive("mask", seed)))
            for seed in seeds
        ]
        return self.rows(ids, seeds) | {"noise": torch.stack(noise)}


def reconstructions(mae: MAE, images: Images, config: Config, n: int = 12):
    """Rows of three pictures: masked, reconstructed with the visible patches pasted in, and the original. A PIL image.

    With norm_pix_loss the prediction is scaled back by the original patch's mean and deviation: what is judged is the
    structure inside a patch, not its brightness.
    """
    ids = [i * len(images) // n for i in range(n)]
    view = config.augment.evaluation(resize=config.augment.size)
    pixels = eval_batch(images, ids, view).to(distributed.device())  # (n, C, H, W)
    P, grid = config.model.patch_size, config.model.img_size // config.model.patch_size
    noise = torch.rand(len(ids), grid * grid, generator=generator("pictures", config.seed)).to(pixels.device)
    with torch.no_grad():
        latent, mask, ids_restore = mae.forward_encoder(pixels, noise)
        pred = mae.forward_decoder(latent, ids_restore).float()
    patches, mask = patchify(pixels, P), mask[:, :, None]
    if config.norm_pix_loss:
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        pred = pred * (var + 1e-6).sqrt() + mean
    views = [patches * (1 - mask), patches * (1 - mask) + pred * mask, patches]
    rows = [denormalise(unpatchify(v, P, config.model.in_chans, grid).cpu(), view.mean, view.std) for v in views]
    return picture_grid(torch.stack(rows, dim=1))


def main(config: Config) -> artifact.Artifact:
    """Train, measure the frozen features, and hand the encoder over."""
    distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    with Run.open(config, parents) as run:
        images = config.data.open()
        if images.report():
            run.say(images.report())

        def untrained() -> MAE:
            torch.manual_seed(derive("init", config.seed))
            mae = MAE(config)
            if "init" in parents:
                run.say(vit.load(mae.encoder, config.model, parents["init"]))
            return mae

        def rows(pictures: Images) -> MaskedImages:
            return MaskedImages(augmented(pictures, config.augment), config.model.num_patches)

        def held_out() -> tuple[int, MaskedImages]:
            pictures = config.data.held_out().open()
            return len(pictures), rows(pictures)

        mae = untrained()
        stream = DataStream(len(images), rows(images), batch=config.train.batch, seed=config.seed)
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        optim = adamw(
            decay_groups(mae), config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch
        )
        watch = validation(mae, config.train, held_out)
        fit(mae, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        mae.eval()
        view = config.augment.evaluation(resize=config.augment.size)
        scores = []
        if run.measures:
            run.picture("reconstructions", reconstructions(mae, images, config), "Masked, reconstructed, original")
        if run.measures and config.evaluation:
            before = untrained().encoder.to(distributed.device())
            scores = [evaluate(mae.encoder, before, config.evaluation, view)]
        return run.publish(
            WRITES,
            lambda folder: vit.save(mae.encoder, config.model, vit.preprocessing(view), folder),
            scores,
            architecture=vit.architecture(config.model),
            preprocessing=vit.preprocessing(view),
            data={"fingerprint": images.fingerprint, "pictures": len(images), "skipped": len(images.skipped)},
            step=steps,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
