"""Reward models beside TF-IDF and logistic regression, on the very pairs that they learned from and were tested on.

    python -m benchmarks.preferences runs/preferences/reward runs/preferences/reward_polite

and such a model as the judge of two policies:

    fledge compare runs/preferences/sft_polite/artifact runs/preferences/ppo_polite/artifact \\
        --data runs/preferences/ppo_polite/config.yaml --judge benchmarks.preferences:politeness

A folder is a run of align.reward on pairs. TF-IDF as scikit-learn has it: words of two letters or more, in lower case,
and pairs of them; ln((1 + n) / (1 + df)) + 1; rows of length one. The price of large weights is chosen on the
validation split. Intervals are bootstraps over prompts.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align import held_out
from align.reward import Config
from fledge import artifact, recipe
from fledge import config as configs
from fledge.data import preferences
from fledge.data.preferences import Preferences
from fledge.evals.score import bootstrap, paired
from fledge.models import language

PRICES = (1e-5, 1e-4, 1e-3, 1e-2)
"""Of the squared weights, beside the mean loss of a pair."""


Pair = tuple[Counter[str], Counter[str]]
"""Features of the better and of the worse answer."""


class Rows(NamedTuple):
    """Texts as embedding_bag takes them: places of features and their values one behind the other, and where each text
    begins."""

    places: Tensor
    values: Tensor
    starts: Tensor


def words(text: str) -> list[str]:
    """Words, and pairs of neighbours."""
    found = re.findall(r"\b\w\w+\b", text.lower())
    return found + [f"{a} {b}" for a, b in pairwise(found)]


def features(prompt: str, answer: str) -> Counter[str]:
    """An answer's words. Where it is one word, such as yes or no, also those of the question, each with the answer."""
    own = words(answer)
    return Counter([*own, *(f"{word}|{own[0]}" for word in words(prompt))] if len(own) == 1 else own)


class TfIdf:
    """A linear Bradley-Terry model of TF-IDF features: what an answer is worth is w · x. ``price`` is that of |w|² / 2,
    and the one among PRICES that does best on validation pairs."""

    def __init__(self, train: Sequence[Pair], validation: Sequence[Pair]) -> None:
        texts = [text for pair in train for text in pair]
        df = Counter(word for text in texts for word in text)
        self.place = {word: n for n, word in enumerate(df)}
        self.idf = [math.log((1 + len(texts)) / (1 + n)) + 1 for n in df.values()]
        learned, held_back = self.sides(train), self.sides(validation)
        fitted = {price: self.fit(*learned, price) for price in PRICES}
        self.price = max(PRICES, key=lambda price: right(*(self.of(x, fitted[price]) for x in held_back)).mean())
        self.weights = fitted[self.price]

    def sides(self, pairs: Sequence[Pair]) -> tuple[Rows, Rows]:
        return self.rows([better for better, _ in pairs]), self.rows([worse for _, worse in pairs])

    def rows(self, texts: Sequence[Counter[str]]) -> Rows:
        places, values, starts = [], [], []
        for text in texts:
            starts.append(len(places))
            known = {self.place[word]: n for word, n in text.items() if word in self.place}
            norm = math.hypot(*(n * self.idf[place] for place, n in known.items())) or 1.0
            places += known
            values += [n * self.idf[place] / norm for place, n in known.items()]
        return Rows(torch.tensor(places, dtype=torch.long), torch.tensor(values), torch.tensor(starts))

    def fit(self, better: Rows, worse: Rows, price: float) -> Tensor:
        weights = torch.zeros(len(self.place), requires_grad=True)
        optim = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optim.zero_grad()
            gap = self.of(better, weights) - self.of(worse, weights)
            found = -F.logsigmoid(gap).mean() + price * weights.square().sum() / 2
            found.backward()
            return found

        optim.step(loss)
        return weights.detach()

    def of(self, rows: Rows, weights: Tensor) -> Tensor:
        """(N,)"""
        table = weights[:, None]
        return F.embedding_bag(rows.places, table, rows.starts, mode="sum", per_sample_weights=rows.values).squeeze(1)

    def __call__(self, texts: Sequence[Counter[str]]) -> Tensor:
        """(N,) what answers are worth."""
        return self.of(self.rows(texts), self.weights)


def right(better: Tensor, worse: Tensor) -> np.ndarray:
    """(N,) 1 where the better answer is worth more, one half where both are worth as much."""
    return ((1 + (better - worse).sign()) / 2).double().numpy()


def said(messages: Sequence[dict]) -> str:
    return "\n".join(message["content"] for message in messages)


def read(records: Sequence[dict]) -> list[Pair]:
    """Features of the better and of the worse answer."""
    prompts = [said(record["prompt"]) for record in records]
    better, worse = (
        [features(prompt, said(record[side])) for prompt, record in zip(prompts, records, strict=True)]
        for side in ("chosen", "rejected")
    )
    return list(zip(better, worse, strict=True))


@cache
def judge() -> TfIdf:
    """Of the pairs that the recipe keeps for judging politeness."""
    (config,) = [stage.config for stage in recipe.load("preferences").stages if stage.name == "judge_polite"]
    assert isinstance(config, Config)
    train, validation = (preferences.pairs(config.data, split) for split in ("train", "validation"))
    return TfIdf(read(train), read(validation))


def politeness(records: list[dict], answers: list[str]) -> list[float]:
    """A judge for `fledge compare`."""
    prompts = [said(record["prompt"]) for record in records]
    return judge()([features(*both) for both in zip(prompts, answers, strict=True)]).tolist()


def compare(run: Path) -> dict[str, object]:
    """Both models' accuracy on the test pairs, and the paired difference."""
    made = artifact.open(run / "artifact", "reward-model")
    config = configs.load(Config, run / "config.yaml")
    tokens = language.read_tokenizer(made)
    train, validation, test = (Preferences(config.data, tokens, s) for s in ("train", "validation", "test"))
    asked = held_out.sample(test, config.evaluation_pairs)
    rewards = asked.rewards(language.read(made, "AutoModelForSequenceClassification"), config.train.precision)
    ours = right(rewards[:, 0], rewards[:, 1])
    tfidf, pairs = TfIdf(read(train.records), read(validation.records)), read(asked.records)
    theirs = right(*(tfidf([pair[side] for pair in pairs]) for side in (0, 1)))
    clusters = [said(record["prompt"]) for record in asked.records]
    return {
        "run": str(run),
        "pairs": {"train": len(train), "validation": len(validation), "test": len(asked.ids)},
        "reward model": (ours.mean(), *bootstrap(ours, clusters)),
        f"TF-IDF, price {tfidf.price:g}": (theirs.mean(), *bootstrap(theirs, clusters)),
        "difference": ((ours - theirs).mean(), *paired(theirs, ours, clusters)),
        "the longer answer": float(np.mean([longer(r) for r in asked.records])),
    }


def longer(record: dict) -> float:
    """1 where the better answer has more characters, one half where both have as many."""
    gap = len(said(record["chosen"])) - len(said(record["rejected"]))
    return (1 + np.sign(gap)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        for name, found in compare(run).items():
            told = "{:.4f} [{:.4f}, {:.4f}]".format(*found) if isinstance(found, tuple) else found
            print(f"{name}: {told}", flush=True)


if __name__ == "__main__":
    main()
