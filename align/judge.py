"""A policy judged beside the one that it started from: the same held-out prompts, the same seeds, paired."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align import rlhf
from align.rollout import FunctionScorer, Scorer, answer, callable_of, decode, in_pieces, response_logits
from fledge.data import world
from fledge.data.chats import Prompts, RecordsConfig
from fledge.evals.score import Score, bootstrap, paired
from fledge.stream import Batch, Permutation, derive


class Judge(NamedTuple):
    """What scores held-out answers."""

    score: Scorer
    metric: str
    unseen: bool  # training does not see it


def world_gold(records: list[dict], texts: list[str]) -> list[float]:
    """The Unicode database's judgement of answers about characters."""
    return [world.gold(record, text) for record, text in zip(records, texts, strict=True)]


def build(name: str | None, data: RecordsConfig, reward: Scorer) -> Judge:
    """The function that is named; else the Unicode database, for the world; else the reward itself."""
    if name is not None:
        return Judge(FunctionScorer(callable_of(name, "judge"), name), name.rpartition(":")[2], True)
    if data.source == "world":
        return Judge(FunctionScorer(world_gold, "world.gold"), "gold score", True)
    return Judge(reward, "reward", False)


def compare(
    judge: Judge,
    models: dict[str, nn.Module],
    prompts: Prompts,
    tokenizer: Any,
    *,
    most: int,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    greedy: bool,
    precision: str,
    rows: int,
) -> tuple[list[Score], list[dict], float]:
    """Scores before and after, a few answers of both, and the KL of after to before in nats an answer.

    Args:
        models: ``before`` and ``after``.
        temperature: of the policy; the KL is that of the tempered distributions.
        most, rows: prompts at most, and at most so many at a time.
    """
    order = Permutation(len(prompts), "evaluation")
    chosen = [order[i] for i in range(min(len(prompts), most))]
    records = [prompts.records[i] for i in chosen]
    batches = {
        name: answer(
            model,
            [prompts.ids[i] for i in chosen],
            [derive("evaluation", seed, i) for i in chosen],
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=0.0 if greedy else temperature,
            precision=precision,
            rows=rows,
        )
        for name, model in models.items()
    }
    texts = {name: decode(tokenizer, batch) for name, batch in batches.items()}
    judged = {name: judge.score(records, texts[name], batch).numpy() for name, batch in batches.items()}

    def kl_of(piece: Batch) -> Tensor:
        after, before = (response_logits(models[name], piece) for name in ("after", "before"))
        return torch.where(piece["response_mask"].bool(), rlhf.exact_kl(after, before, temperature), 0.0)

    kl = in_pieces(kl_of, batches["after"], precision, rows).sum(dim=1).mean().item()
    pairs = zip(
        records, texts["before"], texts["after"], judged["before"].tolist(), judged["after"].tolist(), strict=True
    )
    table = [
        {"prompt": r["prompt"][-1]["content"], "before": a, "after": b, "score before": x, "score after": y}
        for r, a, b, x, y in list(pairs)[:12]
    ]
    return scores_of(judge, records, judged["before"], judged["after"], kl), table, kl


def scores_of(judge: Judge, records: list[dict], before: Any, after: Any, kl: float) -> list[Score]:
    """The figure before and after, and its gain with the interval of the paired difference."""
    clusters = [r["codepoint"] for r in records] if all("codepoint" in r for r in records) else None
    unit, n = ("prompts", len(records)) if clusters is None else ("characters", len(set(clusters)))
    low, high = bootstrap(after, clusters)
    gain_low, gain_high = paired(before, after, clusters)
    note = f"{len(records)} prompts, KL {kl:.2f} nats an answer" + ("" if judge.unseen else "; trained on this reward")
    return [
        Score(judge.metric, float(after.mean()), n, low, high, before=float(before.mean()), unit=unit, note=note),
        Score(
            f"gain in {judge.metric}", float((after - before).mean()), n, gain_low, gain_high,
            baseline=0.0, baseline_name="no change", unit=unit, note="paired over the same prompts",
        ),
    ]  # fmt: skip
