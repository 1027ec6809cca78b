"""A step of supervised fine-tuning beside TRL's SFTTrainer on the same padded rows, the answers scored in both."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

B, T, VOCABULARY = 16, 128, 1024


def rows() -> dict[str, Tensor]:
    """Conversations of 32 to 128 tokens whose second half is the answer, padded on the right."""
    length = torch.randint(T // 4, T + 1, (B, 1))
    length[0] = T
    place = torch.arange(T)
    real = place < length
    ids = torch.randint(3, VOCABULARY, (B, T)).where(real, 0)
    return {"input_ids": ids, "attention_mask": real.long(), "answer": (real & (place >= length // 2)).long()}


def pair(build: Callable[[], Any], ours: Callable, adamw: Callable) -> tuple[Callable, Callable]:
    """(our update, TRL's training step and the same AdamW)"""
    from finetune.sft import SFT

    batch = rows()
    labels = batch["input_ids"].masked_fill(batch.pop("answer") == 0, -100)
    shifted = labels.roll(-1, 1)
    shifted[:, -1] = -100
    peer = build()
    trainer, optimizer = of_trl(peer), adamw(peer.parameters())
    count = (labels != -100).sum()

    def theirs(step: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        trainer.training_step(peer, {**batch, "labels": labels}, num_items_in_batch=count)
        torch.nn.utils.get_total_norm([p.grad for p in peer.parameters() if p.grad is not None]).item()
        optimizer.step()

    return ours(SFT(build()), {**batch, "labels": shifted}), theirs


def of_trl(model: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    return trainer_of_trl(SFTTrainer, SFTConfig, model, {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]})


def trainer_of_trl(trainer: Callable, config: Callable, model: Any, row: dict[str, list[int]]) -> Any:
    """TRL's trainer around ``model``, in fp32 and silent, ready for its training steps; ``row`` is only to be there."""
    from datasets import Dataset, disable_progress_bars

    from fledge.data.tokenizer import TokenizerConfig, train

    disable_progress_bars()
    args = config(
        output_dir=tempfile.gettempdir(), bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    tokens = train(TokenizerConfig(vocab_size=300), ["only to be there"])
    made = trainer(model=model, args=args, train_dataset=Dataset.from_list([row]), processing_class=tokens)
    model.train()
    return made
