"""What TRL's trainers learn from: token ids in the columns that they read. ``align/trl.py`` hands them over."""

import dataclasses
import itertools
from typing import Any, ClassVar

import numpy as np

from fledge.data import chats
from fledge.data.chats import Chats, ChatsConfig
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.data.prompts import Prompts
from fledge.data.records import Split
from fledge.errors import InputError
from fledge.stream import Permutation


class ExamplesConfig(PreferencesConfig):
    """dpo: pairs or rankings. kto: both sides of them, or with ``label`` single answers. grpo, rloo: prompts of any
    records."""

    messages: str = "messages"
    """kto with labels, grpo, rloo: the field with a list of {role, content}; records without it have a prompt."""
    completion: str = "completion"
    """kto with labels: the field of the answer."""
    image: ClassVar[None] = None
    """TRL's trainers are given no pictures."""
    label: str | None = None
    """kto: the field that says by true or false whether an answer is desirable; null: the records are pairs."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows by TRL's columns, the record behind each, and what is known of all."""

    columns: dict[str, list]
    records: list[dict]
    counts: dict[str, Any]
    report: str

    def __len__(self) -> int:
        return len(self.records)

    def at(self, rows: list[int]) -> "Examples":
        """Some of the rows, in this order."""
        columns = {name: [column[i] for i in rows] for name, column in self.columns.items()}
        return dataclasses.replace(self, columns=columns, records=[self.records[i] for i in rows])

    def shuffled(self, seed: int) -> "Examples":
        order = Permutation(len(self), "data", seed)
        return self.at([order[i] for i in range(len(order))])


def pairs(data: Preferences) -> Examples:
    """DPO's columns: prompt_ids, and chosen_ids and rejected_ids behind them; of a ranking all pairs but the ties."""
    columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    found = []
    for prompt, answers, ranks, record in zip(data.prompts, data.answers, data.ranks, data.records, strict=True):
        for (better, chosen), (worse, rejected) in itertools.permutations(zip(ranks, answers, strict=True), 2):
            if better < worse:
                for name, ids in zip(columns, (prompt, chosen, rejected), strict=True):
                    columns[name].append(ids)
                found.append(record)
    return Examples(columns, found, {"pairs": len(found), "skipped": data.skipped}, data.report())


def both_sides(given: Examples) -> Examples:
    """KTO's columns from pairs: every answer by itself, with its label."""
    twice = given.at([i for i in range(len(given)) for _ in range(2)])
    sides = zip(given.columns["chosen_ids"], given.columns["rejected_ids"], strict=True)
    columns = {
        "prompt_ids": twice.columns["prompt_ids"],
        "completion_ids": [ids for both in sides for ids in both],
        "label": [True, False] * len(given),
    }
    return dataclasses.replace(twice, columns=columns)


def labelled(config: ExamplesConfig, tokens: Any, split: Split) -> Examples:
    """KTO's columns from answers that are labelled one by one.

    Raises:
        InputError: a label is not true or false.
    """
    same = {name: getattr(config, name) for name in ChatsConfig.model_fields if hasattr(config, name)}
    data = Chats(ChatsConfig.model_validate(same), tokens, split)
    columns: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "label": []}
    for record, first, end in zip(data.records, data.offsets, data.offsets[1:], strict=False):
        label = record.get(config.label)
        if not isinstance(label, bool):
            raise InputError(f"data.label: {config.label} is {label!r} in {record}; expected true or false")
        ids = data.tokens[first:end].tolist()
        start = int(np.flatnonzero(~data.scored[first:end])[-1]) + 1  # of the last answer
        for name, value in zip(columns, (ids[:start], ids[start:], label), strict=True):
            columns[name].append(value)
    labels = columns["label"]
    counts = {"answers": len(labels), "desirable": sum(labels), "skipped": data.skipped}
    return Examples(columns, data.records, counts, data.report())


def of_prompts(prompts: Prompts, tokens: Any, template: str) -> Examples:
    """The columns of GRPO and RLOO: prompt as text, and row, its place among the prompts."""
    texts = [chats.prompt_text(tokens, record["prompt"], template) for record in prompts.records]
    counts = {"prompts": len(prompts), "skipped": prompts.skipped}
    return Examples({"prompt": texts, "row": list(range(len(texts)))}, prompts.records, counts, prompts.report())


def with_kl_answers(examples: Examples, rows: int) -> Examples:
    """KTO's KL is estimated on answers to other prompts: those of each micro-batch of ``rows``, moved on by one.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.1; TRL rotates the same way.
    """
    answers = examples.columns["completion_ids"]
    moved = [answers[i - 1] if i % rows else answers[min(i + rows, len(answers)) - 1] for i in range(len(answers))]
    return dataclasses.replace(examples, columns=examples.columns | {"KL_completion_ids": moved})
