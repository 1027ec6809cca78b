"""Every objective at toy size with a ragged batch, for the tests that hold for all of them.

``build(name, dtype)`` gives the same objective and the same batch on every rank. Dropout and drop path are 0.
"""

import torch
from torch import Tensor, nn

BATCH = 8


def _tokenizer():
    from fledge.data.tokenizer import TokenizerConfig, train

    words = "the quick brown fox jumps over the lazy dog and runs away from ten tall trees".split()
    documents = [" ".join(words[i:] + words[:i]) for i in range(len(words))]
    return train(TokenizerConfig(vocab_size=300), documents)


def _packed(seed: int, rows: int = BATCH, length: int = 12, low: int = 10, high: int = 60) -> dict[str, Tensor]:
    """Rows of documents of uneven lengths with padding at the end of some."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (rows, length), generator=g)
    document, position = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, length, dtype=torch.long)
    labels = torch.full((rows, length), -100)
    for row in range(rows):
        at, number, end = 0, 1, length - row % 5
        while at < end:
            size = min(end - at, 2 + int(torch.randint(0, 6, (1,), generator=g)))
            document[row, at : at + size], position[row, at : at + size] = number, torch.arange(size)
            labels[row, at : at + size - 1] = ids[row, at + 1 : at + size]
            at, number = at + size, number + 1
        position[row, end:] = torch.arange(length - end)
    return {"input_ids": ids, "document": document, "position": position, "labels": labels}


def mae() -> tuple[nn.Module, dict[str, Tensor]]:
    from fledge.data.augment import AugmentConfig
    from fledge.data.images import ImagesConfig
    from fledge.models.vit import ViTConfig
    from pretrain.mae import MAE, Config, Decoder

    sizes = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    data = ImagesConfig(source="folder", path="unused")
    decoder = Decoder(embed_dim=8, depth=2, num_heads=2)
    objective = MAE(Config(data=data, augment=AugmentConfig(size=16), model=sizes, decoder=decoder))
    return objective, {"image": torch.randn(BATCH, 3, 16, 16), "noise": torch.rand(BATCH, 16)}


def clm() -> tuple[nn.Module, dict[str, Tensor]]:
    from fledge.models.language import CausalConfig, build_causal
    from pretrain.clm import CLM

    sizes = CausalConfig(arch="llama", embed_dim=16, depth=2, num_heads=2, context_length=16)
    return CLM(build_causal(sizes, _tokenizer())), _packed(1)


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    from align.clip import CLIP, Config, dual_encoder, tokenize
    from fledge.data.pairs import PairsConfig
    from fledge.data.tokenizer import TokenizerConfig, train
    from fledge.models.language import EncoderConfig
    from fledge.models.vit import ViTConfig

    captions = ["fox", "a lazy dog", "ten tall trees", "the quick brown fox", "dog", "over", "it jumps away", "runs"]
    tokens = train(TokenizerConfig(style="encoder", vocab_size=300), captions)
    config = Config(
        data=PairsConfig(path="unused"),
        augment={"size": 16},
        image_model=ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2),
        text_model=EncoderConfig(embed_dim=16, depth=2, num_heads=2, context_length=32, dropout=0.0),
        max_length=32,
        projection_dim=8,
    )
    objective = CLIP(dual_encoder(config, {}, tokens, say=lambda report: None), rows=BATCH)
    return objective, {"image": torch.randn(BATCH, 3, 16, 16)} | tokenize(tokens, captions, config.max_length)


BUILDERS = {"mae": mae, "clm": clm, "clip": clip}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(7)
    objective, batch = BUILDERS[name]()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return objective.to(dtype), batch
