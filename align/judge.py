"""A policy judged beside the one that it started from: the same held-out prompts, the same seeds, paired."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from align import rlhf
from align.rollout import answer, decode, in_pieces, spread, token_logits
from align.scorers import FunctionScorer, Scorer, TextScorer, callable_of
from fledge.artifact import Artifact
from fledge.data import world
from fledge.data.chats import RecordsConfig
from fledge.data.prompts import Prompts
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
        order = Permutation(len(self.prompts), "evaluation")
        return [order[i] for i in range(min(len(self.prompts), self.most))]

    def records(self) -> list[dict]:
        return [self.prompts.records[i] for i in self.chosen()]

    def put_to(self, model: nn.Module) -> Batch:
        """The prompts with this model's answers, as ``answer`` gives them."""
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

    def kl(self, after: nn.Module, before: nn.Module, answers: Batch) -> float:
        """KL(after || before) in nats an answer, on its answers: exact at each token, summed, mean over rows."""

        def kl_of(piece: Batch) -> Tensor:
            logits, reference = (token_logits(model, piece) for model in (after, before))
            return spread(rlhf.exact_kl(logits, reference, self.temperature), piece["response_mask"])

        return in_pieces(kl_of, answers, self.precision, self.rows).sum(dim=1).mean().item()


def watch(
    judge: Judge, reward: Scorer, policy: nn.Module, reference: nn.Module, questions: Questions
) -> Callable[[int], dict[str, float]]:
    """`evaluate` of `fit`: a point of the frontier, of one set of answers of the policy.

    score: the mean judgement, Gao et al.'s gold; reward: that which it is trained on, their proxy, without the penalty
    of an answer that does not end; kl: to the reference, exact, in nats an answer.
    """

    def measure(step: int) -> dict[str, float]:
        answers, records = questions.put_to(policy), questions.records()
        texts = decode(questions.tokenizer, answers)
        judged = judge.score(records, texts, answers)
        rewarded = reward(records, texts, answers) if judge.unseen else judged
        kl = questions.kl(policy, reference, answers)
        return {"score": judged.mean().item(), "reward": rewarded.mean().item(), "kl": kl}

    return measure


def compare(
    judge: Judge, before: nn.Module, after: nn.Module, questions: Questions
) -> tuple[list[Score], list[dict], float]:
    """Scores before and after, a few answers of both, and the KL of after to before in nats an answer."""
    records, models = questions.records(), {"before": before, "after": after}
    answers = {name: questions.put_to(model) for name, model in models.items()}
    texts = {name: decode(questions.tokenizer, batch) for name, batch in answers.items()}
    judged = {name: judge.score(records, texts[name], batch).numpy() for name, batch in answers.items()}
    kl = questions.kl(after, before, answers["after"])
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
