"""Whole PPO iterations: ours beside a plain padded loop, and beside TRL 1.12's own PPOTrainer.

An iteration is generation, scoring by policy, reference, value and reward model, advantages, and all updates. All
start from the same policy and reward model, draw from the same prompts, sample from the whole distribution at
temperature 1, and take the same number of steps of AdamW over the same number of rows. Models are built before the
clock runs.
"""

import contextlib
import copy
import io
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align import actors, rlhf
from align.actors import Value
from align.ppo import PPO, Algorithm, Config, Rollout, Rollouts, Train
from align.scorers import ModelScorer, Scorer
from fledge.data.prompts import PromptsConfig
from fledge.models.adapters import LoRAConfig
from fledge.models.language import CausalConfig, build_causal
from fledge.optim import adamw
from fledge.stream import cut, rows_of, share
from fledge.train import update

PAD, BOS, EOS = 0, 2, 3
LR, EPS = 3e-6, 1e-5
Step = Callable[[int], object]


class Setting(NamedTuple):
    """Sizes of a Llama and of an iteration. The default has one minibatch an epoch, as Huang et al. 2024."""

    width: int = 192
    depth: int = 4
    heads: int = 6
    vocabulary: int = 8192
    answers: int = 64
    new_tokens: int = 48
    epochs: int = 4
    minibatches: int = 1
    micro_batch: int = 16


SMALL = Setting(width=128, heads=4, vocabulary=1024, epochs=2, minibatches=2)


# --------------------------------------------------------------------------------------------- what all have in common


def causal(setting: Setting) -> Any:
    ids = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    tokenizer = type("Tokenizer", (SimpleNamespace,), {"__len__": lambda self: setting.vocabulary})(**ids)
    sizes = CausalConfig(
        arch="llama", embed_dim=setting.width, depth=setting.depth, num_heads=setting.heads, context_length=128
    )
    return build_causal(sizes, tokenizer).eval()


def policy_of(setting: Setting, mean_length: int = 20) -> Any:
    """Its answers end at random, as those of a trained policy do: their lengths differ."""
    policy = causal(setting)
    bias = math.log(setting.vocabulary / (mean_length - 1))

    def end_sometimes(head: Any, inputs: Any, logits: Tensor) -> None:
        logits[..., EOS] += bias

    policy.lm_head.register_forward_hook(end_sometimes)
    return policy


def reward_of(setting: Setting) -> Any:
    from transformers import LlamaForSequenceClassification

    config = causal(setting).config
    config.num_labels = 1
    return LlamaForSequenceClassification(config).eval()


def prompts_of(setting: Setting) -> list[list[int]]:
    """256 of 6 to 23 tokens."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 24, (256,), generator=g).tolist()
    return [torch.randint(4, setting.vocabulary, (n,), generator=g).tolist() for n in lengths]


class Prompts:
    """Prompts as PPO reads them."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids, self.records = ids, [{} for _ in ids]

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, ids: list[int]) -> dict[str, Tensor]:
        return {}


# ---------------------------------------------------------------------------------------------------------------- ours


def ours(setting: Setting, policy: Any, scorer: Scorer, lora: LoRAConfig | None = None) -> Step:
    """With ``lora`` policy, reference and value are one trunk; else each is a model of its own."""
    config = Config(
        data=PromptsConfig(source="files", path="unused"),
        reward="unused:unused",
        rollout=Rollout(batch=setting.answers, max_new_tokens=setting.new_tokens, temperature=1.0),
        ppo=Algorithm(num_ppo_epochs=setting.epochs),
        value=Value(init="policy", head="zero"),
        lora=lora,
        train=Train(
            batch=setting.answers // setting.minibatches, steps=1, precision="fp32", micro_batch=setting.micro_batch
        ),
    )
    tokenizer: Any = SimpleNamespace(
        eos_token_id=EOS, pad_token_id=PAD, batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows]
    )
    cast = actors.build(policy, {}, lora=lora, trainable=None, value=config.value)
    objective = PPO(policy, cast.value, config.ppo, config.rollout.temperature)
    prompts: Any = Prompts(prompts_of(setting))
    stream = Rollouts(objective, cast.reference, prompts, scorer, tokenizer, config)
    groups = [{"params": cast.policy_parameters}, {"params": cast.value_parameters}]
    optim = adamw(groups, config.optim, batch=stream.batch, steps=10**6, steps_per_epoch=1)

    def iteration(i: int) -> None:
        for step in range(i * stream.updates, (i + 1) * stream.updates):
            stream.begin(step)
            rows, pieces = share(stream.batch, 0, 1, setting.micro_batch)
            batch = stream.fetch(stream.ids(step)[rows], step)
            update(objective, [rows_of(batch, piece) for piece in pieces], step, optim)

    return iteration


# ------------------------------------------------------------------------------------------------- a plain padded loop


def plain(setting: Setting, policy: Any, reward: Any) -> Step:
    """What one writes first: ``generate`` of transformers, every row padded to the longest prompt and answer in every
    forward, logits of every position."""
    reference = copy.deepcopy(policy).requires_grad_(False)
    trunk, head = copy.deepcopy(policy.base_model), torch.nn.Linear(policy.config.hidden_size, 1)
    parameters = [*policy.parameters(), *trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, eps=EPS)
    prompts, B, T = prompts_of(setting), setting.answers, setting.new_tokens

    def read(model: Any, ids: Tensor, mask: Tensor) -> Any:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)

    def logprobs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
        logits = read(model, ids, mask).logits[:, -T - 1 : -1]
        return F.log_softmax(logits, -1).gather(2, ids[:, -T:, None]).squeeze(2)

    def values(ids: Tensor, mask: Tensor) -> Tensor:
        return head(read(trunk, ids, mask).last_hidden_state).squeeze(2)[:, -T - 1 : -1]

    def scores(ids: Tensor, mask: Tensor) -> Tensor:
        found = reward.score(read(reward.base_model, ids, mask).last_hidden_state).squeeze(2)
        last = (mask * torch.arange(mask.shape[1])).argmax(1, keepdim=True)
        return found.gather(1, last).squeeze(1)

    def iteration(i: int) -> None:
        some = [prompts[(i * B + k) % len(prompts)] for k in range(B)]
        width = max(map(len, some))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
        with torch.no_grad():
            said = policy.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=T, do_sample=True, top_k=0, top_p=1.0,
                eos_token_id=EOS, pad_token_id=PAD,
            )  # fmt: skip
            said = F.pad(said, (0, width + T - said.shape[1]), value=PAD)
            ended = (said[:, width:] == EOS).long()
            real = (ended.cumsum(1) - ended == 0).long()
            mask = torch.cat([mask, real], 1)
            pieces = cut(B, B // setting.micro_batch)
            old = torch.cat([logprobs(policy, said[p], mask[p]) for p in pieces])
            ref = torch.cat([logprobs(reference, said[p], mask[p]) for p in pieces])
            old_values = torch.cat([values(said[p], mask[p]) for p in pieces])
            score = torch.cat([scores(said[p], mask[p]) for p in pieces])
            rewards = rlhf.token_rewards(old - ref, score, real, 0.05)
            advantages, returns = rlhf.gae(rewards, old_values, real, 1.0, 0.95)
            advantages = rlhf.whiten(advantages, real)
        for _ in range(setting.epochs):
            for rows in torch.randperm(B).chunk(setting.minibatches):
                optimizer.zero_grad()
                count = real[rows].sum()
                for p in rows.split(setting.micro_batch):
                    new, v = logprobs(policy, said[p], mask[p]), values(said[p], mask[p])
                    loss = rlhf.policy_loss(new, old[p], advantages[p], real[p], 0.2).loss
                    loss = loss + 0.1 * rlhf.value_loss(v, old_values[p], returns[p], real[p], 0.2)
                    (loss / count).backward()
                optimizer.step()

    return iteration


# ------------------------------------------------------------------------------------------------------------ TRL 1.12


def trl(setting: Setting, policy: Any, reward: Any, folder: Path, stop: bool) -> Step:
    """``PPOTrainer.train`` of TRL 1.12, unmodified, of so many episodes that one call is one iteration.

    Its minibatches do nothing (each epoch is one optimiser step), so a setting with more than one is none of its own.

    Args:
        folder: where TRL 1.12 lies (pip's --target); another version may be installed.
        stop: stop_token="eos"; else an answer has all its tokens, as TRL 1.12 has it by default.
    """
    assert setting.minibatches == 1
    folder = folder.resolve()
    sys.path.insert(0, str(folder))
    import trl as package

    if not package.__version__.startswith("1.12.") or not Path(package.__file__).is_relative_to(folder):
        raise SystemExit(f"{folder} should hold TRL 1.12, but {package.__file__} is {package.__version__}")
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    from fledge.data.tokenizer import TokenizerConfig, train

    tokens = train(TokenizerConfig(vocab_size=300), ["only to pad"])
    tokens.padding_side = "left"
    assert (tokens.pad_token_id, tokens.eos_token_id) == (PAD, EOS)
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), total_episodes=setting.answers, per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.answers // setting.micro_batch, num_mini_batches=1,
        num_ppo_epochs=setting.epochs, response_length=setting.new_tokens, stop_token="eos" if stop else None,
        temperature=1.0, learning_rate=LR, adam_epsilon=EPS, lr_scheduler_type="constant", bf16=False, use_cpu=True,
        gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=args,
        processing_class=tokens,
        model=policy,
        ref_model=copy.deepcopy(policy).requires_grad_(False),
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=Dataset.from_dict({"input_ids": prompts_of(setting)}),
    )

    def iteration(i: int) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return iteration


# --------------------------------------------------------------------------------------------------------------- pairs


def beside_plain(setting: Setting) -> tuple[Step, Step]:
    policy, reward = policy_of(setting), reward_of(setting)
    scorer = ModelScorer(copy.deepcopy(reward), "fp32", setting.micro_batch)
    return ours(setting, copy.deepcopy(policy), scorer), plain(setting, policy, reward)


def beside_trl(setting: Setting, folder: Path, stop: bool) -> tuple[Step, Step]:
    policy, reward = policy_of(setting), reward_of(setting)
    scorer = ModelScorer(copy.deepcopy(reward), "fp32", setting.micro_batch)
    return ours(setting, copy.deepcopy(policy), scorer), trl(setting, policy, reward, folder, stop)
