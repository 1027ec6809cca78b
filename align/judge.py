"""A policy judged beside the one that it started from: the same held-out prompts, the same seeds, paired."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from align import rlhf
from align.rollout import answer, decode, in_pieces, spread, token_logits
from align.scorers import FunctionScorer, Scorer, TextScorer, callable_of
from fledge import distributed
from fledge.artifact import Artifact
from fledge.data import world
from fledge.data.chats import RecordsConfig
from fledge.data.prompts import Prompts
from fledge.evals.score import Score, bootstrap, paired
from fledge.stream import Batch, Permutation, cut, derive

T = TypeVar("T")


class Judge(NamedTuple):
    """What scores held-out answers."""

    score: Scorer
    metric: str
    unseen: bool  # training does not see it


def world_gold(records: list[dict], texts: list[str]) -> list[float]:
    """The Unicode database's judgement of answers about characters."""
    return [world.gold(record, text) for record, text in zip(records, texts, strict=True)]


def build(
    name: str | None, data: RecordsConfig, reward: Scorer, apart: Artifact | None = None, precision: str = "fp32"
) -> Judge:
    """The function that is named; else the reward model `apart`; else the Unicode database, for the world; else the
    reward itself."""
    if name is not None:
        return Judge(FunctionScorer(callable_of(name, "judge"), name), name.rpartition(":")[2], True)
    if apart is not None:
        return Judge(TextScorer(apart, precision), "judge's reward", True)
    if data.source == "world":
        return Judge(FunctionScorer(world_gold, "world.gold"), "gold score", True)
    return Judge(reward, "reward", False)


class Questions(NamedTuple):
    """Held-out prompts, and how every model is asked them: the same prompts, seeds and sampling for all."""

    prompts: Prompts
    tokenizer: Any
    most: int
    """Prompts at most."""
    seed: int
    max_new_tokens: int
    temperature: float
    """Of the policy; the KL is that of the tempered distributions."""
    greedy: bool
    precision: str
    rows: int
    """At most so many at a time."""

    def chosen(self) -> list[int]:
        """The prompts of this rank, which has its share of them."""
        order = Permutation(len(self.prompts), "evaluation")
        all_ranks = [order[i] for i in range(min(len(self.prompts), self.most))]
        return all_ranks[cut(len(all_ranks), distributed.world_size())[distributed.rank()]]

    def records(self) -> list[dict]:
        return [self.prompts.records[i] for i in self.chosen()]

    def put_to(self, model: nn.Module) -> Batch:
        """The prompts of this rank with this model's answers, as ``answer`` gives them."""
        chosen = self.chosen()
        return answer(
            model,
            [self.prompts.ids[i] for i in chosen],
            [derive("evaluation", self.seed, i) for i in chosen],
            self.tokenizer,
            max_new_tokens=self.max_new_tokens,
            temperature=0.0 if self.greedy else self.temperature,
            precision=self.precision,
            rows=self.rows,
            inputs=self.prompts.inputs(chosen),
        )

    def kl(self, after: nn.Module, before: nn.Module, answers: Batch) -> list[float]:
        """KL(after || before) in nats of each answer of after's: exact at each token, summed."""

        def kl_of(piece: Batch) -> Tensor:
            logits, reference = (token_logits(model, piece) for model in (after, before))
            return spread(rlhf.exact_kl(logits, reference, self.temperature), piece["response_mask"])

        return in_pieces(kl_of, answers, self.precision, self.rows).sum(dim=1).tolist()

    def everywhere(self, rows: Callable[[], Iterable[T]]) -> list[T]:
        """What ``rows`` finds for the prompts of each rank, of all ranks, in the order of the prompts; or, on all of
        them, the error of any."""
        parts = distributed.together(lambda: list(rows()) if self.chosen() else [])
        return [row for part in parts for row in part]


def watch(
    judge: Judge, reward: Scorer, policy: nn.Module, reference: nn.Module, questions: Questions
) -> Callable[[int], dict[str, float]]:
    """`evaluate` of `fit`: a point of the frontier, of one set of answers of the policy.

    score: the mean judgement, Gao et al.'s gold; reward: that which it is trained on, their proxy, without the penalty
    of an answer that does not end; kl: to the reference, exact, in nats an answer.
    """

    def measure(step: int) -> dict[str, float]:
        def mine() -> Iterable[tuple[float, float, float]]:
            answers, records = questions.put_to(policy), questions.records()
            texts = decode(questions.tokenizer, answers)
            judged = judge.score(records, texts, answers)
            rewarded = reward(records, texts, answers) if judge.unseen else judged
            return zip(judged.tolist(), rewarded.tolist(), questions.kl(policy, reference, answers), strict=True)

        means = torch.tensor(questions.everywhere(mine)).mean(dim=0).tolist()
        return dict(zip(("score", "reward", "kl"), means, strict=True))

    return measure


def try_out(judge: Judge, policy: nn.Module, questions: Questions) -> None:
    """Let the judge score two answers, so that one that fails does so before anything is trained."""
    few = questions._replace(most=2)

    def mine() -> list[float]:
        answers = few.put_to(policy)
        return judge.score(few.records(), decode(few.tokenizer, answers), answers).tolist()

    few.everywhere(mine)


def compare(
    judge: Judge, before: nn.Module, after: nn.Module, questions: Questions
) -> tuple[list[Score], list[dict], float]:
    """Scores before and after, a few answers of both, and the KL of after to before in nats an answer."""

    def mine() -> Iterable[tuple[dict, str, str, float, float, float]]:
        records = questions.records()
        old, new = questions.put_to(before), questions.put_to(after)
        old_texts, new_texts = decode(questions.tokenizer, old), decode(questions.tokenizer, new)
        old_scores, new_scores = judge.score(records, old_texts, old), judge.score(records, new_texts, new)
        kl = questions.kl(after, before, new)
        return zip(records, old_texts, new_texts, old_scores.tolist(), new_scores.tolist(), kl, strict=True)

    found = questions.everywhere(mine)
    table = [
        {"prompt": r["prompt"][-1]["content"], "before": a, "after": b, "score before": x, "score after": y}
        for r, a, b, x, y, _ in found[:12]
    ]
    records, _, _, old_scores, new_scores, kls = zip(*found, strict=True)
    kl = float(np.mean(kls))
    return scores_of(judge, list(records), np.array(old_scores), np.array(new_scores), kl), table, kl


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
