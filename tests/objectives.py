"""Every objective at toy size with a ragged batch, for the tests that hold for all of them.

``build(name, dtype)`` gives the same objective and the same batch on every rank. Dropout and drop path are 0.
"""

import torch
from torch import Tensor, nn

BATCH = 8


def _tokenizer():
    from fledge.data.tokenizer import TokenizerConfig, train

    text = "the quick brown fox jumps over the lazy dog and runs away from ten tall trees "
    documents = [text[i:] + text[:i] for i in range(len(text)) if text[i - 1] == " "]
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
    decoder = Decoder(embed_dim=32, depth=2, num_heads=2)
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


def dino() -> tuple[nn.Module, dict[str, Tensor]]:
    from fledge.data.augment import MultiCropConfig
    from fledge.data.images import ImagesConfig
    from fledge.models.vit import ViTConfig
    from pretrain.dino import Config, Head
    from pretrain.dino import build as build_dino

    config = Config(
        data=ImagesConfig(source="folder", path="unused"),
        augment=MultiCropConfig(global_size=16, local_size=8, local_crops=2),
        model=ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2),
        head=Head(out_dim=24, hidden_dim=16, bottleneck_dim=8),
        drop_path_rate=0.0,
    )
    objective = build_dino(config, None, 100, 10)
    objective.center.normal_(std=0.1)
    return objective, {
        "global_crops": torch.randn(BATCH, 2, 3, 16, 16),
        "local_crops": torch.randn(BATCH, 2, 3, 8, 8),
    }


def mlm() -> tuple[nn.Module, dict[str, Tensor]]:
    from fledge.data.tokenizer import TokenizerConfig, train
    from fledge.models.language import EncoderConfig, build_encoder
    from pretrain.mlm import MLM

    tokens = train(TokenizerConfig(style="encoder", vocab_size=300), ["the quick brown fox", "jumps over the dog"])
    sizes = EncoderConfig(embed_dim=16, depth=2, num_heads=2, context_length=16, dropout=0.0)
    batch = _packed(2)
    selected = (torch.rand(batch["input_ids"].shape) < 0.3) & (batch["document"] > 0)
    selected[1] = False  # a row in which nothing is asked
    return MLM(build_encoder(sizes, tokens)), batch | {"labels": torch.where(selected, batch["input_ids"], -100)}


def _gpt2(**more):
    from transformers import GPT2Config

    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1}
    return GPT2Config(**sizes, **off, **more)


def sft() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2LMHeadModel

    from finetune.sft import SFT

    batch = _packed(3)
    mask = (batch["document"] > 0).long()
    answer = (torch.rand(mask.shape) < 0.5) & (batch["labels"] != -100)
    labels = torch.where(answer, batch["labels"], -100)
    return SFT(GPT2LMHeadModel(_gpt2())), {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def sft_mixed() -> tuple[nn.Module, dict[str, Tensor]]:
    """Adapters that learn from answers and from text, some micro-batches of which hold none."""
    from transformers import GPT2LMHeadModel

    from finetune.sft import MixedSFT, mixed
    from fledge.models import adapters
    from fledge.models.adapters import LoRAConfig

    model = GPT2LMHeadModel(_gpt2())
    for parameter in adapters.add(model, LoRAConfig(rank=2, dora=True)):
        nn.init.normal_(parameter, std=0.3)
    _, chats = sft()
    batch = mixed([(0, {name: x[:6] for name, x in chats.items()}), (1, _packed(8, rows=2, length=10))])
    return MixedSFT(model, 0.3), {name: x[torch.tensor([0, 1, 6, 2, 3, 4, 5, 7])] for name, x in batch.items()}


def _ranked(ranks: list[list[int]]) -> dict[str, Tensor]:
    """Answers of uneven lengths to BATCH prompts; -1 is no answer."""
    K = len(ranks[0])
    rows = _packed(4, rows=BATCH * K)
    there = torch.tensor(ranks) >= 0
    mask = (rows["document"] > 0).long().view(BATCH, K, -1) * there[:, :, None]
    return {
        "input_ids": rows["input_ids"].view(BATCH, K, -1),
        "attention_mask": mask,
        "ranks": torch.tensor(ranks),
    }


def _scoring() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(_gpt2(num_labels=1, pad_token_id=2))


# The pairwise term alone has no gradient at the last bias: centring terms large enough to see it in fp32.
RANKS = [[0, 1, 2, 3], [1, 0, 0, 2], [2, 1, 0, -1], [0, 1, -1, -1], [0, 0, 0, 1], [1, 0, 2, -1], [0, 0, -1, -1],
         [3, 2, 1, 0]]  # fmt: skip


def reward() -> tuple[nn.Module, dict[str, Tensor]]:
    """Pairs with margins."""
    from align.reward import RewardModel

    return RewardModel(_scoring(), 0.5), _ranked([[0, 1]] * BATCH) | {"margin": torch.rand(BATCH)}


def reward_ranked() -> tuple[nn.Module, dict[str, Tensor]]:
    """Prompts with two to four answers, ties among them that are learned from."""
    from align.reward import RewardModel

    return RewardModel(_scoring(), 0.5, tie_threshold=0.4), _ranked(RANKS)


def reward_plackett_luce() -> tuple[nn.Module, dict[str, Tensor]]:
    from align.reward import RewardModel

    return RewardModel(_scoring(), 0.5, "plackett_luce"), _ranked(RANKS)


def ppo() -> tuple[nn.Module, dict[str, Tensor]]:
    """Four models, but for reference and reward."""
    from transformers import GPT2LMHeadModel, GPT2Model

    from align.rollout import ValueModel, value_head

    value = ValueModel(GPT2Model(_gpt2()), value_head(16, "normal"))
    return _on_a_rollout(GPT2LMHeadModel(_gpt2()), value)


def ppo_lora() -> tuple[nn.Module, dict[str, Tensor]]:
    """One trunk, with adapters that say something."""
    from transformers import GPT2LMHeadModel

    from align.actors import Value, one_trunk
    from fledge.models.adapters import LoRAConfig

    cast = one_trunk(GPT2LMHeadModel(_gpt2()), LoRAConfig(rank=2), Value(init="policy", head="normal"))
    for parameter in (*cast.policy_parameters, *cast.value_parameters):
        nn.init.normal_(parameter, std=0.2)
    return _on_a_rollout(cast.policy, cast.value)


def _on_a_rollout(policy: nn.Module, value: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A frozen rollout, partly outside both clipping ranges, with two rows of text beside each answer."""
    from align.ppo import PPO, Algorithm

    P, T = 5, 7
    ids = torch.randint(10, 60, (BATCH, P + T))
    prompt = torch.arange(P) >= torch.randint(0, P - 1, (BATCH, 1))
    response = torch.arange(T) < torch.randint(1, T + 1, (BATCH, 1))
    objective = PPO(policy, value, Algorithm(), 0.7, ptx_coef=0.5)
    batch = {"input_ids": ids, "attention_mask": torch.cat([prompt, response], dim=1).long()}
    batch |= {"response_mask": response.long(), "reward_mask": response.long()}
    with torch.no_grad():
        old_logprobs = objective.logprobs(objective.policy, batch) + 0.2 * torch.randn(BATCH, T)
        old_values = objective.values(batch) + 0.2 * torch.randn(BATCH, T)
    batch |= {"old_logprobs": old_logprobs, "old_values": old_values, "advantages": torch.randn(BATCH, T)}
    batch |= {f"ptx_{name}": x.unflatten(0, (BATCH, 2)) for name, x in _packed(6, rows=2 * BATCH).items()}
    return objective, batch | {"returns": torch.randn(BATCH, T), "objective/score": torch.randn(BATCH)}


OBJECTIVES = (mae, dino, mlm, clm, clip, sft, sft_mixed, reward, reward_ranked, reward_plackett_luce, ppo, ppo_lora)
BUILDERS = {f.__name__: f for f in OBJECTIVES}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(7)
    objective, batch = BUILDERS[name]()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return objective.to(dtype), batch
