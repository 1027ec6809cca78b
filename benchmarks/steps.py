"""Our training steps beside those of plain loops around the same libraries, at equal settings (see paired.py).

Those of aligning are in align.py.
"""

import argparse
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import Ratio, compare
from fledge.optim import Optim, decay_groups
from fledge.train import update


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)


def ours(objective: torch.nn.Module, batch: dict[str, Tensor], pieces: int = 1) -> Callable[[int], object]:
    """The loop's own update on a batch cut into ``pieces`` micro-batches."""
    optim = Optim(adamw(decay_groups(objective)), lr=lambda step: 1e-4, weight_decay=lambda step: 0.05)
    cuts = [
        dict(zip(batch, rows, strict=True)) for rows in zip(*(x.chunk(pieces) for x in batch.values()), strict=True)
    ]
    return lambda step: update(objective, cuts, step, optim)


def mae() -> tuple[Callable, Callable]:
    """MAE ViT-S/16-like with a light decoder at 96 pixels, beside transformers' ViTMAE with AdamW."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from fledge.data.augment import AugmentConfig
    from fledge.data.images import ImagesConfig
    from fledge.models.vit import ViTConfig
    from pretrain.mae import MAE, Config, Decoder

    sizes = ViTConfig(img_size=96, patch_size=16, embed_dim=192, depth=6, num_heads=6)
    config = Config(
        data=ImagesConfig(source="folder", path="unused"), augment=AugmentConfig(size=96), model=sizes,
        decoder=Decoder(embed_dim=128, depth=2, num_heads=4),
    )  # fmt: skip
    batch = {"image": torch.randn(32, 3, 96, 96), "noise": torch.rand(32, 36)}
    peer = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768, image_size=96,
            patch_size=16, decoder_hidden_size=128, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
            decoder_intermediate_size=512, mask_ratio=0.75, norm_pix_loss=True,
        )
    )  # fmt: skip
    optimizer = adamw(peer.parameters())

    def theirs(step: int) -> None:
        optimizer.zero_grad()
        peer(pixel_values=batch["image"], noise=batch["noise"]).loss.backward()
        optimizer.step()

    return ours(MAE(config), batch), theirs


def small_llama(context: int = 128) -> Any:
    from fledge.models.language import CausalConfig, build_causal

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = type("Tokenizer", (types.SimpleNamespace,), {"__len__": lambda self: 1024})(**ids)
    return build_causal(
        CausalConfig(arch="llama", embed_dim=128, depth=4, num_heads=4, context_length=context), tokenizer
    )


def clm() -> tuple[Callable, Callable]:
    """A packed row of several documents, isolated; beside transformers' own loss on the same rows, not isolated."""
    from pretrain.clm import CLM

    B, T = 32, 128
    ids = torch.randint(3, 1024, (B, T))
    document = torch.arange(T).div(32, rounding_mode="floor").expand(B, T) + 1
    labels = ids.roll(-1, 1).masked_fill(document.roll(-1, 1) != document, -100)
    batch = {
        "input_ids": ids,
        "document": document,
        "position": torch.arange(T).remainder(32).expand(B, T),
        "labels": labels,
    }
    peer = small_llama()
    optimizer = adamw(peer.parameters())

    def theirs(step: int) -> None:
        optimizer.zero_grad()
        peer(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return ours(CLM(small_llama()), batch), theirs


def loop() -> tuple[Callable, Callable]:
    """The loop itself: our ``update`` beside ten bare lines on the same objective and two micro-batches."""
    from pretrain.clm import CLM

    B, T = 32, 64
    ids = torch.randint(3, 1024, (B, T))
    document, position = torch.ones(B, T, dtype=torch.long), torch.arange(T).expand(B, T)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    batch = {"input_ids": ids, "document": document, "position": position, "labels": labels}
    bare = CLM(small_llama())
    optimizer = adamw(decay_groups(bare))
    halves = [{name: x[:16] for name, x in batch.items()}, {name: x[16:] for name, x in batch.items()}]

    def theirs(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        count = sum(int((half["labels"] != -100).sum()) for half in halves)
        for half in halves:
            (bare(half, step)["loss"] / count).backward()
        grads = [p.grad for p in bare.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(grads).item()
        optimizer.step()

    return ours(CLM(small_llama()), batch, pieces=2), theirs


PAIRS = {
    "mae": ("MAE step / transformers ViTMAE step", mae, 3),
    "clm": ("next-token step / plain transformers loop", clm, 3),
    "loop": ("loop / the same objective in ten bare lines", loop, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=PAIRS)
    args = parser.parse_args()
    print(f"{'':<44} {'ours':>11} {'theirs':>11}   ratio (median, quartiles); CPU-seconds a step, one thread, fp32")
    for key, (name, build, steps) in PAIRS.items():
        if args.only in (None, key):
            torch.manual_seed(0)
            ratio: Ratio = compare(name, *build(), rounds=args.rounds, steps=steps)
            print(ratio, flush=True)


if __name__ == "__main__":
    main()
