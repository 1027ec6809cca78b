"""PPO's models on one trunk: adapters off is the base, and each learns what a model of its own would have learned."""

import copy

import pytest
import torch
from torch import nn

from align import actors, ppo, rollout, scorers
from align.actors import POLICY, VALUE, Value
from fledge.errors import InputError
from fledge.models import adapters
from fledge.models.adapters import LoRAConfig
from fledge.train import checkpoint_blocks, repeated_blocks
from tests.align.test_ppo import PROMPTS, Prompts, Words, config, gpt2, gradient_step, llama, reward, roll

LORA = LoRAConfig(rank=3, alpha=6.0)


def on_one_trunk(policy, seed=3):
    torch.manual_seed(seed)
    return actors.one_trunk(policy, LORA, Value(init="policy", head="normal"))


def saying_something(cast):
    """After some learning, as it were: at first every B is zero."""
    for parameter in [*cast.policy_parameters, *cast.value_parameters]:
        nn.init.normal_(parameter, std=0.2)
    return cast


def stream_of(cast, settings, dtype=torch.float32):
    objective = ppo.PPO(cast.policy, cast.value, settings.ppo, settings.rollout.temperature).to(dtype)
    scorer = scorers.FunctionScorer(reward, "reward")
    return ppo.Rollouts(objective, cast.reference, Prompts(PROMPTS), scorer, Words(), settings)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_reference_is_the_base_bit_for_bit_whatever_was_learned(make):
    plain = make().eval()
    cast = saying_something(on_one_trunk(copy.deepcopy(plain)))
    ids = torch.tensor(PROMPTS[0])[None]
    assert torch.equal(cast.reference(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert not torch.equal(cast.policy(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_ratio_is_one_and_kl_zero_at_the_first_update(make):
    stream = stream_of(on_one_trunk(make()), config())
    rolled = roll(stream)
    assert rolled["objective/kl"].abs().max() <= 1e-5
    for step in range(3):  # all minibatches of the first PPO epoch
        batch = stream.fetch(stream.ids(step), step)
        out, tokens = stream.objective(batch, step), stream.objective.counts(batch)["ratio"]
        assert out["ratio"].item() / tokens == pytest.approx(1, abs=1e-5)
        assert out["clipfrac"] == 0 and out["approxkl"].abs() <= 1e-5


def weight_gradients(model, loss):
    """dL/dW of the linear layers of a plain model."""
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.ndim == 2}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradients_are_those_of_two_plain_models_with_the_adapters_in_their_weights(make, checkpointing):
    """With W = W0 + s B A: dL/dB = s dL/dW A', dL/dA = s B' dL/dW. The plain models share nothing and know no peft."""
    settings = config(batch=12)
    cast = saying_something(on_one_trunk(make().double()))
    cast.value.head.double()
    stream = stream_of(cast, settings, torch.float64)
    batch = {n: x.double() if x.is_floating_point() else x for n, x in roll(stream).items()}
    noise = torch.randn(batch["old_logprobs"].shape, generator=torch.Generator().manual_seed(1))
    batch["old_logprobs"] = batch["old_logprobs"] + 0.1 * noise
    truth = {}
    for name, term in ((POLICY, "policy_loss"), (VALUE, "value_loss")):
        plain = adapters.merged(cast.policy, name)
        apart = ppo.PPO(plain, rollout.ValueModel(plain.base_model, copy.deepcopy(cast.value.head)), settings.ppo, 0.7)
        truth[name] = weight_gradients(plain, apart(batch, 0)[term])
        if name == VALUE:
            truth["head"] = apart.value.head.weight.grad
    if checkpointing:
        checkpoint_blocks(repeated_blocks(stream.objective))
    out = stream.objective(batch, 0)
    (out["policy_loss"] + out["value_loss"]).backward()
    torch.testing.assert_close(cast.value.head.weight.grad, truth["head"])
    scale, seen = LORA.alpha / LORA.rank, 0
    for where, layer in adapters.layers(cast.policy):
        for name in (POLICY, VALUE):
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight  # (rank, in), (out, rank)
            dW = truth[name][f"{where}.weight"]
            dW = dW.T if make is gpt2 else dW  # GPT-2's layers hold W transposed
            torch.testing.assert_close(B.grad, scale * dW @ A.T)
            torch.testing.assert_close(A.grad, scale * B.T @ dW)
            seen += 1
    assert seen == 2 * (8 if make is gpt2 else 14)


def test_only_adapters_and_head_learn_and_the_trunk_is_in_no_checkpoint():
    cast = on_one_trunk(llama())
    stream = stream_of(cast, config())
    before = {name: p.clone() for name, p in stream.objective.named_parameters()}
    optimizer = torch.optim.AdamW([*cast.policy_parameters, *cast.value_parameters], lr=0.01)
    for step in range(3):
        gradient_step(stream, optimizer, step)
    moved = {name for name, p in stream.objective.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("value.head")}
    constant = {id(p) for p in stream.objective.constant()}
    assert {name for name, p in stream.objective.named_parameters() if id(p) not in constant} == moved


def test_a_value_has_no_head_of_words():
    with pytest.raises(InputError, match="lm_head.*leave it out"):
        actors.one_trunk(llama(), LoRAConfig(targets=["q_proj", "lm_head"]), Value(init="policy", head="zero"))
