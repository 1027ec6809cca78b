"""The models that PPO trains and asks: policy, reference and value. Each a model of its own, or all on one trunk.

Full fine-tuning has a network for each. With LoRA (Hu et al. 2021) one network is resident: with the policy's adapter
it is the policy, with none the reference, with the value's adapter and a head the value. The reward is the fourth.
"""

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, PositiveFloat
from torch import Tensor, nn

from align.rollout import ValueModel, value_head
from fledge.artifact import Artifact
from fledge.config import Config, Duration
from fledge.errors import InputError
from fledge.models import adapters, language, reward_model
from fledge.models.adapters import LoRAConfig
from fledge.stream import Batch

POLICY, VALUE = "policy", "value"
"""The adapters on one trunk."""


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


Trainable = Annotated[str, AfterValidator(_expression)]
"""What names of parameters that learn hold; see ``choose_trainable``."""


class Value(Config):
    """The value model. Defaults: separate from the policy, all of the reward model (Huang et al. 2024; InstructGPT)."""

    init: Literal["reward", "policy"] = "reward"
    """Whose trunk it starts from. With LoRA it is the policy's, and the value has its own adapter on it."""
    head: Literal["reward", "zero", "normal"] = "reward"
    """The reward model's head, zeros (Ziegler et al. 2019), or N(0, 1/(d + 1)) (Stiennon et al. 2020)."""
    lr_scale: PositiveFloat = 1.0
    """Its learning rate beside the policy's."""
    warmup: Duration = 0
    """Updates in which it learns alone, before its policy does (as verl's critic_warmup)."""


@dataclass(frozen=True)
class Actors:
    """``policy`` and ``reference`` are called like a causal LM of transformers; ``value``: ids, mask -> (B, S)."""

    policy: Any
    reference: Any
    value: ValueModel
    policy_parameters: list[nn.Parameter]
    """Those of the policy that learn."""
    value_parameters: list[nn.Parameter]

    def save(self, tokenizer: Any, folder: Path) -> None:
        """The policy in transformers' form; with LoRA its merged weights, and beside them its adapter in peft's."""
        if not adapters.names(self.policy):
            return language.save(self.policy, tokenizer, folder)
        language.save(adapters.merged(self.policy, POLICY), tokenizer, folder)
        adapters.save(self.policy, folder / adapters.FOLDER, POLICY)


def build(
    policy: Any, parents: dict[str, Artifact], *, lora: LoRAConfig | None, trainable: str | None, value: Value
) -> Actors:
    """The actors that start from ``policy``, which becomes one of them."""
    return one_trunk(policy, lora, value) if lora else four_models(policy, parents, trainable, value)


def four_models(policy: Any, parents: dict[str, Artifact], trainable: str | None, value: Value) -> Actors:
    """Policy, its frozen copy, and value; with the reward model they are four. Nothing is shared."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    critic = build_value(value, policy, parents)
    return Actors(policy, reference, critic, choose_trainable(policy, trainable), list(critic.parameters()))


def one_trunk(policy: Any, lora: LoRAConfig, value: Value) -> Actors:
    """The policy's adapter is in use except inside the calls of reference and value.

    Raises:
        InputError: ``lora.targets`` names layers that a value has not.
    """
    valuing = adapters.add(policy, lora, VALUE)
    inside = {id(parameter) for parameter in policy.base_model.parameters()}
    if not all(id(parameter) in inside for parameter in valuing):
        raise InputError(f"lora.targets {lora.targets} reach the policy's head, which its value lacks; leave it out")
    learning = adapters.add(policy, lora, POLICY)
    head = value_head(policy.config.get_text_config().hidden_size, value.head)  # type: ignore[arg-type]  (not "reward": Config refuses)
    critic = ValueModel(adapters.View(policy.base_model, VALUE), head)
    return Actors(policy, adapters.View(policy, None), critic, learning, [*valuing, *head.parameters()])


def reached(cast: Actors, inputs: Batch) -> Actors:
    """The same actors, of which only parameters learn that a gradient reaches; DDP would wait for the others. LLaVA
    reads a layer of its vision tower that is not the last."""
    with torch.enable_grad():
        learning = leaves(cast.policy(**inputs).logits), leaves(cast.value(**inputs))
    kept = [
        [p for p in parameters if id(p) in found]
        for parameters, found in zip((cast.policy_parameters, cast.value_parameters), learning, strict=True)
    ]
    for parameter in {*cast.policy_parameters, *cast.value_parameters} - {p for some in kept for p in some}:
        parameter.requires_grad_(False)
    return replace(cast, policy_parameters=kept[0], value_parameters=kept[1])


def leaves(output: Tensor) -> set[int]:
    """The ids of the parameters that a gradient of ``output`` reaches."""
    seen, found, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))  # of the node where the gradient of a leaf is summed
        todo += [before for before, _ in node.next_functions]
    return found


def build_value(config: Value, policy: Any, parents: dict[str, Artifact]) -> ValueModel:
    """A model of its own: nothing is shared with the policy."""
    if config.init == "policy":
        trunk = copy.deepcopy(policy.base_model)
    elif "reward" not in parents:
        raise InputError("value.init is reward, but there is no parents.reward; use value.init: policy with head: zero")
    else:
        reward = reward_model.read(parents["reward"])[0]  # of an ensemble the first
        trunk = reward.base_model
        if config.head == "reward":
            return ValueModel(trunk, reward_model.calibrated_head(reward))
    head = value_head(policy.config.get_text_config().hidden_size, config.head)  # type: ignore[arg-type]  (as above)
    return ValueModel(trunk, head)


def choose_trainable(policy: nn.Module, pattern: str | None) -> list[nn.Parameter]:
    """The parameters that learn; the others are frozen.

    Raises:
        InputError: ``pattern`` matches no name.
    """
    chosen = [p for name, p in policy.named_parameters() if pattern is None or re.search(pattern, name)]
    if not chosen:
        some = ", ".join(name for name, _ in list(policy.named_parameters())[:4])
        raise InputError(f"trainable: {pattern!r} is found in no name of the policy's parameters, such as {some}")
    policy.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen
