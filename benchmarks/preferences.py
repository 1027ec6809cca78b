"""Reward models beside TF-IDF and logistic regression, on the very pairs that they learned from and were tested on.

    python -m benchmarks.preferences runs/preferences/reward runs/preferences/reward_polite

A folder is a run of align.reward on pairs. TF-IDF as scikit-learn has it: words of two letters or more, in lower case, and
pairs of them; ln((1 + n) / (1 + df)) + 1; rows of length one. The price of large weights is chosen on the validation
split. Intervals are bootstraps over prompts.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align import held_out
from align.reward import Config
from fledge import artifact
from fledge import config as configs
from fledge.data.preferences import Preferences
from fledge.evals.score import bootstrap, paired
from fledge.models import language

PRICES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Of the squared weights, beside the mean loss of a pair."""


def words(text: str) -> list[str]:
    """Words, and pairs of neighbours."""
    found = re.findall(r"\b\w\w+\b", text.lower())
    return found + [f"{a} {b}" for a, b in pairwise(found)]


def features(prompt: str, answer: str) -> Counter[str]:
    """An answer's words. Of one word, such as yes or no, what counts is the question: its words, each with the answer."""
    own = words(answer)
    return Counter([*own, *(f"{word}|{own[0]}" for word in words(prompt))] if len(own) == 1 else own)


class TfIdf:
    """A linear Bradley-Terry model of TF-IDF features: what an answer is worth is w · x."""

    def __init__(self, train: Sequence[tuple[Counter[str], Counter[str]]], price: float) -> None:
        texts = [text for pair in train for text in pair]
        df = Counter(word for text in texts for word in text)
        self.place = {word: n for n, word in enumerate(df)}
        self.idf = {word: math.log((1 + len(texts)) / (1 + n)) + 1 for word, n in df.items()}
        self.weights = torch.zeros(len(self.place), requires_grad=True)
        better, worse = (self.rows([pair[side] for pair in train]) for side in (0, 1))
        optim = torch.optim.LBFGS([self.weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optim.zero_grad()
            found = -F.logsigmoid(self.of(better) - self.of(worse)).mean() + price * self.weights.square().sum() / 2
            found.backward()
            return found

        optim.step(loss)

    def rows(self, texts: Sequence[Counter[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Places, values and where each text begins, as embedding_bag takes them."""
        places, values, starts = [], [], []
        for text in texts:
            starts.append(len(places))
            known = {word: n * self.idf[word] for word, n in text.items() if word in self.place}
            norm = math.sqrt(sum(x * x for x in known.values())) or 1.0
            places += [self.place[word] for word in known]
            values += [x / norm for x in known.values()]
        return torch.tensor(places), torch.tensor(values), torch.tensor(starts)

    def of(self, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """(N,)"""
        places, values, starts = rows
        table = self.weights[:, None]
        return F.embedding_bag(places, table, starts, mode="sum", per_sample_weights=values).squeeze(1)

    @torch.no_grad()
    def right(self, pairs: Sequence[tuple[Counter[str], Counter[str]]]) -> np.ndarray:
        """(N,) 1 where the better answer is worth more."""
        better, worse = (self.of(self.rows([pair[side] for pair in pairs])) for side in (0, 1))
        return (better > worse).double().numpy()


def read(records: Sequence[dict]) -> list[tuple[Counter[str], Counter[str]]]:
    """Features of the better and of the worse answer."""
    asked = ["\n".join(m["content"] for m in r["prompt"]) for r in records]
    return [
        (features(prompt, r["chosen"][-1]["content"]), features(prompt, r["rejected"][-1]["content"]))
        for prompt, r in zip(asked, records, strict=True)
    ]


def chosen(train: Sequence[dict], validation: Sequence[dict]) -> tuple[TfIdf, float]:
    """The model whose price does best on validation pairs."""
    pairs, held_back = read(train), read(validation)
    models = {price: TfIdf(pairs, price) for price in PRICES}
    best = max(models, key=lambda price: models[price].right(held_back).mean())
    return models[best], best


def compare(run: Path) -> dict[str, object]:
    """Both models' accuracy on the test pairs, and the paired difference."""
    made = artifact.open(run / "artifact", "reward-model")
    config = configs.load(Config, run / "config.yaml")
    tokens = language.read_tokenizer(made)
    train, validation, test = (Preferences(config.data, tokens, s) for s in ("train", "validation", "test"))
    asked = held_out.sample(test, config.evaluation_pairs)
    rewards = asked.rewards(language.read(made, "AutoModelForSequenceClassification"), config.train.precision)
    ours = (rewards[:, 0] > rewards[:, 1]).double().numpy()
    tfidf, price = chosen(train.records, validation.records)
    theirs = tfidf.right(read(asked.records))
    clusters = ["\0".join(m["content"] for m in r["prompt"]) for r in asked.records]
    return {
        "run": str(run),
        "pairs": {"train": len(train), "validation": len(validation), "test": len(asked.ids)},
        "reward model": (ours.mean(), *bootstrap(ours, clusters)),
        f"TF-IDF, price {price:g}": (theirs.mean(), *bootstrap(theirs, clusters)),
        "difference": ((ours - theirs).mean(), *paired(theirs, ours, clusters)),
        "the longer answer": float(np.mean([longer(r) for r in asked.records])),
    }


def longer(record: dict) -> float:
    """1 where the better answer has more characters, one half where both have as many."""
    gap = len(record["chosen"][-1]["content"]) - len(record["rejected"][-1]["content"])
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
