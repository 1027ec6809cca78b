"""MAE against the original authors' numbers (float64) and against transformers' ViTMAE."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fledge.data.augment import AugmentConfig
from fledge.data.images import ImagesConfig
from fledge.models import vit
from fledge.models.vit import ViTConfig
from fledge.optim import Optim, decay_groups
from fledge.schedule import warmup_then
from fledge.train import update
from pretrain.mae import MAE, Config, Decoder, patchify, random_masking, unpatchify

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOL = {"rtol": 1e-9, "atol": 1e-9}
SMALL = ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)


@pytest.fixture(scope="module")
def truth():
    return json.loads((FIXTURES / "mae.json").read_text()) | {"t": load_file(FIXTURES / "mae.safetensors")}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def config(**changes) -> Config:
    data = ImagesConfig(source="folder", path="unused")
    return Config(
        data=data,
        augment=AugmentConfig(size=32),
        model=SMALL,
        decoder=Decoder(embed_dim=16, depth=2, num_heads=4),
        **changes,
    )


def ours(name: str) -> str:
    """The authors keep encoder and decoder in one module; our encoder is a part of its own."""
    own = ("decoder", "mask_token")
    return name if name.startswith(own) else f"encoder.{name}"


def part(truth, prefix):
    return {ours(k.removeprefix(prefix)): v for k, v in truth["t"].items() if k.startswith(prefix)}


def build(truth, which):
    mae = MAE(config(norm_pix_loss=which == "norm_pix"))
    mae.load_state_dict(part(truth, f"{which}/state/"))
    return mae, {"image": truth["t"][f"{which}/imgs"], "noise": truth["t"][f"{which}/noise"]}


@pytest.mark.parametrize("which", ["norm_pix", "raw_pix"])
def test_forward_and_gradients(truth, which):
    mae, batch = build(truth, which)
    t = truth["t"]
    latent, mask, ids_restore = mae.forward_encoder(batch["image"], batch["noise"])
    torch.testing.assert_close(latent, t[f"{which}/latent"], **TOL)
    torch.testing.assert_close(mask, t[f"{which}/mask"].double(), **TOL)
    assert torch.equal(ids_restore, t[f"{which}/ids_restore"])
    torch.testing.assert_close(mae.forward_decoder(latent, ids_restore), t[f"{which}/pred"], **TOL)
    torch.testing.assert_close(patchify(batch["image"], 8), t[f"{which}/patches"], **TOL)
    loss = mae(batch, 0)["loss"] / mae.counts(batch)["loss"]
    assert loss.item() == pytest.approx(truth[f"{which}_loss"], rel=1e-9)
    loss.backward()
    grads = part(truth, f"{which}/grad/")
    trained = {n: p for n, p in mae.named_parameters() if p.requires_grad}
    assert trained.keys() == grads.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, grads[name], **TOL)


@pytest.mark.parametrize("which", ["norm_pix", "raw_pix"])
def test_five_steps_of_the_loop(truth, which):
    mae, batch = build(truth, which)
    groups = decay_groups(mae)
    names = {id(p): n for n, p in mae.named_parameters()}
    assert {names[id(p)] for p in groups[0]["params"]} == {ours(n) for n in truth[f"{which}_decay"]}
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    optim = Optim(optimizer, lr=lambda step: 1e-3, weight_decay=lambda step: 0.05)
    losses = [update(mae, [batch], step, optim)[0]["loss"].item() for step in range(5)]
    assert losses == pytest.approx(truth[f"{which}_trajectory"], rel=1e-9)
    for name, value in part(truth, f"{which}/final/").items():
        torch.testing.assert_close(mae.state_dict()[name], value, **TOL)


def test_positions_and_schedule(truth):
    torch.testing.assert_close(vit.sincos_pos_embed(768, 14)[0], truth["t"]["sincos_768_14_cls"].double(), **TOL)
    for epoch, lr in truth["lr"].items():  # by fractional epoch: a step is 1/100 epoch
        mine = warmup_then("cosine", round(float(epoch) * 100), peak=2.4e-3, end=0.0, warmup_steps=4000, steps=80000)
        assert mine == pytest.approx(lr, rel=1e-9, abs=1e-15)


def test_patchify_is_undone():
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpatchify(patchify(images, 8), 8, 3, 4), images)


def test_mask_keeps_the_smallest_noise():
    noise = torch.rand(5, 16)
    ids_keep, mask, _ = random_masking(noise, 0.75)
    assert mask.sum(1).tolist() == [12.0] * 5
    for row in range(5):
        smallest = set(noise[row].sort().indices[:4].tolist())
        assert set(ids_keep[row].tolist()) == smallest == set((mask[row] == 0).nonzero()[:, 0].tolist())


def test_initialisation():
    """The fused qkv has xavier's bound of a (D -> 3D) map, and the patch projection's bias keeps its default."""
    mae = MAE(config())
    bound = (6 / (32 + 96)) ** 0.5
    for block in mae.encoder.blocks:
        weight = block.attn.qkv.weight
        assert weight.abs().max() <= bound < weight.abs().max() * 1.05
    assert mae.encoder.patch_embed.proj.bias.abs().max() > 0
    assert not mae.encoder.pos_embed.requires_grad and mae.encoder.pos_embed[0, 0].abs().max() == 0


def test_equals_transformers_vitmae():
    """Same weights and the same mask: transformers' loss and gradients of everything."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    mae = MAE(config())
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32,
            patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
            decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True, layer_norm_eps=1e-6,
        )
    ).double()  # fmt: skip
    missing = theirs.vit.load_state_dict(
        {n: t for n, t in vit.transformers_state(mae.encoder).items() if "pooler" not in n}, strict=True
    )
    assert not missing.missing_keys
    with torch.no_grad():
        d = theirs.decoder
        d.mask_token.copy_(mae.mask_token)
        d.decoder_pos_embed.copy_(mae.decoder_pos_embed)
        for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
            getattr(d, name).load_state_dict(getattr(mae, name).state_dict())
        for layer, block in zip(d.decoder_layers, mae.decoder_blocks, strict=True):
            q, k, v = block.attn.qkv.weight.chunk(3)
            qb, kb, vb = block.attn.qkv.bias.chunk(3)
            a = layer.attention
            for linear, weight, bias in ((a.q_proj, q, qb), (a.k_proj, k, kb), (a.v_proj, v, vb)):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            a.o_proj.load_state_dict(block.attn.proj.state_dict())
            layer.layernorm_before.load_state_dict(block.norm1.state_dict())
            layer.layernorm_after.load_state_dict(block.norm2.state_dict())
            layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
            layer.mlp.fc2.load_state_dict(block.mlp.fc2.state_dict())
    batch = {"image": torch.randn(3, 3, 32, 32), "noise": torch.rand(3, 16)}
    loss = mae(batch, 0)["loss"] / mae.counts(batch)["loss"]
    other = theirs(pixel_values=batch["image"], noise=batch["noise"]).loss
    torch.testing.assert_close(loss, other, rtol=1e-10, atol=1e-10)
    loss.backward()
    other.backward()
    torch.testing.assert_close(mae.encoder.patch_embed.proj.weight.grad,
                               theirs.vit.embeddings.patch_embeddings.projection.weight.grad, **TOL)  # fmt: skip
    torch.testing.assert_close(mae.decoder_pred.weight.grad, theirs.decoder.decoder_pred.weight.grad, **TOL)
    torch.testing.assert_close(mae.mask_token.grad, theirs.decoder.mask_token.grad, **TOL)
