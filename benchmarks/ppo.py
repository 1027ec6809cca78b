"""A whole PPO iteration of ours beside a plain loop: the same models, prompts, sampling settings and updates.

The plain loop is what one writes first: ``generate`` of transformers, every row padded to the longest in every forward,
two epochs of minibatches. Both sample their own answers; the prompts and the mean length of answers are the same.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from align import rlhf
from align.actors import Value, build_value
from align.ppo import PPO, Algorithm, Config, Rollout, Rollouts, Train
from align.rollout import PromptsConfig
from align.scorers import FunctionScorer
from fledge.optim import Optim
from fledge.stream import cut, rows_of, share
from fledge.train import update

B, T, EPOCHS, MINIBATCHES, EOS, PAD = 64, 48, 2, 2, 2, 0


class EndingHead(torch.nn.Module):
    """Answers end at random, after some 20 tokens, as those of a trained policy do: their lengths differ."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("bias", F.one_hot(torch.tensor(EOS), 1024) * 4.0, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) + self.bias


class Source:
    """Prompts as PPO reads them."""

    def __init__(self, ids: list[list[int]]) -> None:
        self.ids, self.records = ids, [{} for _ in ids]

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, ids: list[int]) -> dict[str, torch.Tensor]:
        return {}


def score(records: list[dict], texts: list[str]) -> list[float]:
    return [float(len(text) % 7) for text in texts]


def pair(model: Callable[[], Any]) -> tuple[Callable[[int], object], Callable[[int], object]]:
    g = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, 1024, (int(n),), generator=g).tolist() for n in torch.randint(6, 24, (256,), generator=g)
    ]
    tokenizer = SimpleNamespace(
        eos_token_id=EOS, pad_token_id=PAD, batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows]
    )
    return _ours(model(), prompts, tokenizer), _plain(model(), prompts, tokenizer)


def _ours(policy: Any, prompts: list[list[int]], tokenizer: Any) -> Callable[[int], object]:
    config = Config(
        data=PromptsConfig(source="files", path="unused"),
        reward="benchmarks.ppo:score",
        rollout=Rollout(batch=B, max_new_tokens=T, temperature=1.0),
        ppo=Algorithm(num_ppo_epochs=EPOCHS),
        value=Value(init="policy", head="zero"),
        train=Train(batch=B // MINIBATCHES, steps=1, precision="fp32", micro_batch=16),
    )
    policy.lm_head = EndingHead(policy.lm_head)
    reference = copy.deepcopy(policy).eval()
    objective = PPO(policy, build_value(config.value, policy, {}), config.ppo, 1.0)
    stream = Rollouts(objective, reference, Source(prompts), FunctionScorer(score, "score"), tokenizer, config)  # type: ignore[arg-type]
    optim = Optim(torch.optim.AdamW(objective.parameters(), lr=1e-5, eps=1e-5), lr=lambda step: 1e-5)

    def iteration(i: int) -> None:
        for step in range(i * stream.updates, (i + 1) * stream.updates):
            stream.begin(step)
            rows, pieces = share(stream.batch, 0, 1, 16)
            batch = stream.fetch(stream.ids(step)[rows], step)
            update(objective, [rows_of(batch, piece) for piece in pieces], step, optim)

    return iteration


def _plain(policy: Any, prompts: list[list[int]], tokenizer: Any) -> Callable[[int], object]:
    policy.eval()
    policy.lm_head = EndingHead(policy.lm_head)
    reference = copy.deepcopy(policy)
    trunk, head = copy.deepcopy(policy.base_model), torch.nn.Linear(policy.config.hidden_size, 1)
    parameters = [*policy.parameters(), *trunk.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, eps=1e-5)

    def logprobs(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[
            :, -T - 1 : -1
        ]
        return F.log_softmax(logits, -1).gather(2, ids[:, -T:, None]).squeeze(2)

    def values(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = trunk(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        return head(hidden).squeeze(2)[:, -T - 1 : -1]

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
            pieces = cut(B, B // 16)
            old = torch.cat([logprobs(policy, said[p], mask[p]) for p in pieces])
            ref = torch.cat([logprobs(reference, said[p], mask[p]) for p in pieces])
            old_values = torch.cat([values(said[p], mask[p]) for p in pieces])
            texts = tokenizer.batch_decode(
                [row[m.bool()].tolist() for row, m in zip(said[:, width:], real, strict=True)]
            )
            rewards = rlhf.token_rewards(old - ref, torch.tensor(score([], texts)), real, 0.05)
            advantages, returns = rlhf.gae(rewards, old_values, real, 1.0, 0.95)
            advantages = rlhf.whiten(advantages, real)
        for _ in range(EPOCHS):
            order = torch.randperm(B)
            for rows in order.chunk(MINIBATCHES):
                optimizer.zero_grad()
                count = real[rows].sum()
                for p in rows.split(16):
                    new, v = logprobs(policy, said[p], mask[p]), values(said[p], mask[p])
                    loss = rlhf.policy_loss(new, old[p], advantages[p], real[p], 0.2).loss
                    loss = loss + 0.1 * rlhf.value_loss(v, old_values[p], returns[p], real[p], 0.2)
                    (loss / count).backward()
                optimizer.step()

    return iteration
