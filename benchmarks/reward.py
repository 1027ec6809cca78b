"""A step of a reward model beside TRL's RewardTrainer on the same pairs, and rankings beside their pairs apart."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.sft import trainer_of_trl

T, VOCABULARY = 96, 1024


def rows(prompts: int, answers: int) -> dict[str, Tensor]:
    """Answers of 24 to 96 tokens with their prompts, padded on the right; ranks in a random order."""
    length = torch.randint(T // 4, T + 1, (prompts, answers, 1))
    length[0, 0] = T
    real = torch.arange(T) < length
    ids = torch.randint(3, VOCABULARY, (prompts, answers, T)).where(real, 0)
    ranks = torch.rand(prompts, answers).argsort(dim=1)
    return {"input_ids": ids, "attention_mask": real.long(), "ranks": ranks}


def scoring(base: Any) -> Any:
    """A reward model of the sizes of a causal one."""
    from transformers import LlamaForSequenceClassification

    base.config.num_labels = 1
    return LlamaForSequenceClassification(base.config)


def pair(build: Callable[[], Any], ours: Callable, adamw: Callable) -> tuple[Callable, Callable]:
    """(our update of 16 pairs, TRL's training step and the same AdamW)"""
    from align.reward import RewardModel

    batch = rows(16, 2) | {"ranks": torch.tensor([[0, 1]] * 16)}
    peer = scoring(build())
    trainer, optimizer = of_trl(peer), adamw(peer.parameters())
    theirs_batch = {k: torch.cat([batch[k][:, 0], batch[k][:, 1]]) for k in ("input_ids", "attention_mask")}

    def theirs(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        trainer.training_step(peer, dict(theirs_batch))
        torch.nn.utils.get_total_norm([p.grad for p in peer.parameters() if p.grad is not None]).item()
        optimizer.step()

    return ours(RewardModel(scoring(build())), batch), theirs


def ranking(K: int, build: Callable[[], Any], ours: Callable, adamw: Callable) -> tuple[Callable, Callable]:
    """(our update of 4 prompts with K answers, the same update of all their pairs, two forwards a pair)"""
    from align.reward import RewardModel

    batch = rows(4, K)
    both = torch.tensor(list(itertools.combinations(range(K), 2)))  # (pairs, 2)
    apart = {name: x[:, both].flatten(0, 1) for name, x in batch.items()}
    return ours(RewardModel(scoring(build())), batch), ours(RewardModel(scoring(build())), apart)


def of_trl(model: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    trainer = trainer_of_trl(RewardTrainer, RewardConfig, model, {"chosen_ids": [1, 5, 2], "rejected_ids": [1, 6, 2]})
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    return trainer
