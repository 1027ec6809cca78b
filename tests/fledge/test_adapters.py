"""Adapters: the base when they are off, peft's own arithmetic when they are on, and both forms that others read."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fledge.errors import InputError
from fledge.models import adapters
from fledge.models.adapters import LoRAConfig

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def base(arch: str) -> nn.Module:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if arch == "gpt2":
        sizes = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)
        return GPT2LMHeadModel(sizes).eval()
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **special
    )
    return LlamaForCausalLM(sizes).eval()


def adapted(model: nn.Module, name: str, dora: bool = False, rank: int = 4) -> list[nn.Parameter]:
    """An adapter that says something: its B is not zero."""
    found = adapters.add(model, LoRAConfig(rank=rank, dora=dora), name)
    for parameter in found:
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    return found


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_new_adapter_changes_nothing_and_off_is_the_base_bit_for_bit(arch, dora):
    plain = base(arch)
    model = copy.deepcopy(plain)
    found = adapters.add(model, LoRAConfig(rank=4, dora=dora))
    assert sum(p.requires_grad for p in model.parameters()) == len(found) > 0
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    adapted(model, "other", dora)
    with adapters.using(model, None):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "lm_head"]])
def test_an_adapter_never_changes_a_weight_that_others_share(targets, tied):
    """A head of its own may have one; merging it leaves the model as it was with it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=48,
            tie_word_embeddings=tied,
        )  # fmt: skip
    ).eval()
    lora = LoRAConfig(rank=4, targets=targets)
    if tied or "embed_tokens" in targets:
        with pytest.raises(InputError, match=f"{targets[-1]} is the embedding or tied to it"):
            adapters.add(model, lora)
        return
    for parameter in adapters.add(model, lora):
        nn.init.normal_(parameter, std=0.1)
    torch.testing.assert_close(adapters.merged(model)(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_lora_is_its_formula():
    model = base("llama")
    layer = model.model.layers[0].self_attn.q_proj
    adapters.add(model, LoRAConfig(rank=4, alpha=6.0, targets=["q_proj"]))
    lora = model.model.layers[0].self_attn.q_proj
    A, B = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    nn.init.normal_(B)
    x = torch.randn(3, 32)
    torch.testing.assert_close(lora(x), x @ layer.weight.T + 6 / 4 * x @ A.T @ B.T)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_several_adapters_on_one_trunk_each_with_its_own_gradient(arch):
    model = base(arch)
    mine, other = adapted(model, "policy"), adapted(model, "value", rank=2)
    assert adapters.names(model) == ["policy", "value"]
    with adapters.using(model, "policy"):
        model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in mine)
    assert all(p.grad is None and p.requires_grad for p in other)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merged_weights_load_with_transformers_and_the_adapter_with_peft(arch, dora, tmp_path):
    from peft import PeftModel

    plain = base(arch)
    model = copy.deepcopy(plain)
    adapted(model, "value")
    adapted(model, "policy", dora)
    with adapters.using(model, "policy"):
        wanted = model(IDS).logits
    merged = adapters.merged(model, "policy")
    assert type(merged) is type(plain) and list(merged.state_dict()) == list(plain.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    adapters.save(model, tmp_path / "adapter", "policy")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, wanted)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(IDS).logits, wanted)


def test_unknown_targets_are_named():
    with pytest.raises(InputError, match=r"lora.targets.*nowhere.*q_proj"):
        adapters.add(base("llama"), LoRAConfig(targets=["nowhere"]))
