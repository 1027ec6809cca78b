"""Preferences: a prompt with two answers or more, of which some are better; and prompts alone, to be answered."""

import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fledge.data import chats, records
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import ChatsConfig, Message, RecordsConfig
from fledge.data.prompts import Prompts
from fledge.data.records import Split
from fledge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALONE, TIED = "fewer than two answers", "all answers tied"  # reasons of a skip, beside those of chats


class PreferencesConfig(RecordsConfig):
    """Pairs: ``prompt``, ``chosen``, ``rejected`` as texts or messages (TRL's formats). Rankings: ``prompt`` and a list
    of ``responses`` with their ``ranks`` or ``scores``. An answer may be a whole conversation that begins with the
    prompt. Fields may be named otherwise."""

    world_part: ClassVar[str] = "preferences"
    chosen: str = "chosen"
    """The field of the better answer."""
    rejected: str = "rejected"
    """The field of the worse answer."""
    margin: str | None = None
    """The field of pairs that says by how much reward the better answer should lead; null: none."""
    responses: str | None = None
    """The field with a list of answers; null: pairs."""
    ranks: str | None = None
    """The field with a list of their ranks: lower is better, equal is a tie."""
    scores: str | None = None
    """The field with a list of their scores, in place of ranks: higher is better, equal is a tie."""

    def check(self) -> None:
        super().check()
        given = [name for name in ("ranks", "scores") if getattr(self, name) is not None]
        if len(given) != (self.responses is not None):
            asked = "data.ranks or data.scores, one of them" if self.responses else "data.responses"
            raise InputError(f"data: a ranking has responses and ranks, or responses and scores; give {asked}")
        if self.margin is not None and self.responses is not None:
            raise InputError("data.margin belongs to pairs, and data.responses to rankings; leave one of them out")
        if self.margin is not None and self.source == "world":
            raise InputError("data.margin names a field of your own pairs; those of the world have none: leave it out")


# ---- records ---------------------------------------------------------------------------------------------------------


def pair(config: PreferencesConfig, record: dict, where: str) -> dict[str, list[Message]]:
    """{prompt, chosen, rejected} as messages. Without a prompt field it is what two conversations have in common."""
    said = [records.look_up(record, field, where) for field in (config.chosen, config.rejected)]
    if config.prompt[0].split(".")[0] not in record and all(isinstance(one, list) for one in said):
        chosen, rejected = (chats.as_messages(one, "assistant", where) for one in said)
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        last = max((n for n in range(common) if chosen[n]["role"] != "assistant"), default=-1) + 1
        prompt = chosen[:last]
    else:
        prompt = chats.as_messages(chats.prompt_of(config, record, where), "user", where)
    chosen, rejected = (answer(one, prompt, where) for one in said)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def answer(said: Any, prompt: list[Message], where: str) -> list[Message]:
    """An answer as messages, which may stand behind a copy of the prompt: UltraFeedback's have both.

    Raises:
        InputError: somebody else speaks first.
    """
    messages = chats.as_messages(said, "assistant", where)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if prompt and messages and messages[0]["role"] != "assistant":
        raise InputError(
            f"{where}: an answer begins with a turn of the {messages[0]['role']}; expected the assistant's, alone or "
            "behind the messages of the prompt, word for word"
        )
    return messages


def pairs(config: PreferencesConfig, split: Split) -> list[dict]:
    """The records of a split, each with prompt, chosen and rejected as messages."""
    if config.source == "world":
        from fledge.data import world

        plain = PreferencesConfig()  # the world's own field names, whatever the config says about files
        found = chats.of_the_world(config, split, world.preferences(split))
        return [record | pair(plain, record, "world") for record in found]
    return [{**record, **pair(config, record, where)} for where, record in chats.read(config, split)]


def ranking(config: PreferencesConfig, record: dict, where: str) -> dict[str, Any]:
    """{prompt, answers, ranks}: K answers as messages and their ranks, 0 the best; a pair has chosen and rejected too.

    Raises:
        InputError: answers, ranks or scores are not lists of one length, or a number is none.
    """
    if config.responses is None:
        said = pair(config, record, where)
        margin = {} if config.margin is None else {"margin": _number(record, config.margin, where)}
        return {**said, "answers": [said["chosen"], said["rejected"]], "ranks": [0, 1], **margin}
    field = config.ranks or config.scores or ""
    responses, values = (records.look_up(record, name, where) for name in (config.responses, field))
    if not isinstance(responses, list) or not isinstance(values, list) or len(responses) != len(values):
        raise InputError(
            f"{where}: {config.responses} and {field} should be lists of one length, a number for each answer; found "
            f"{_length(responses)} and {_length(values)}"
        )
    numbers = [_number({field: value}, field, where) for value in values]
    levels = sorted(set(numbers), reverse=config.ranks is None)
    prompt = chats.as_messages(chats.prompt_of(config, record, where), "user", where)
    return {
        "prompt": prompt,
        "answers": [answer(response, prompt, where) for response in responses],
        "ranks": [levels.index(number) for number in numbers],
    }


def rankings(config: PreferencesConfig, split: Split) -> list[dict]:
    """The records of a split, each with prompt, answers and ranks; those of pairs with chosen and rejected too."""
    if config.source == "world":
        found = pairs(config, split)
        return [r | {"answers": [r["chosen"], r["rejected"]], "ranks": [0, 1]} for r in found]
    return [{**record, **ranking(config, record, where)} for where, record in chats.read(config, split)]


def _number(record: dict, field: str, where: str) -> float:
    value = records.look_up(record, field, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{where}: {field} should be a finite number, found {str(value)[:40]!r}")
    return float(value)


def _length(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else type(value).__name__


# ---- rows ------------------------------------------------------------------------------------------------------------


class Preferences:
    """A split of ranked answers as rows, one a prompt. ``skipped`` counts what was left out, by reason.

    ``records`` are the used ones; of each ``prompts`` (ids), ``answers`` (K lists of ids) and ``ranks`` (K).

    Args:
        ties: answers that are tied say something too; without, prompts whose answers are all tied are left out.
    """

    def __init__(
        self,
        config: PreferencesConfig,
        tokenizer: "PreTrainedTokenizerFast",
        split: Split,
        *,
        at_least: int = 1,
        ties: bool = False,
    ) -> None:
        self.config, self.split, self.pad_id = config, split, tokenizers.pad_id(tokenizer)
        found = rankings(config, split)
        skipped, self.truncated = Counter[str](), 0
        pattern = chats.markers(tokenizer)
        usable = [r for r in found if not (reason := _unusable(pattern, r, ties)) or _count(skipped, reason)]
        asked, said = ([record[name] for record in usable] for name in ("prompt", "answers"))
        ids = chats.ids_of_answers(tokenizer, asked, said, config.template)
        self.records: list[dict] = []
        self.prompts: list[list[int]] = []
        self.answers: list[list[list[int]]] = []
        for record, (prompt, answers) in zip(usable, ids, strict=True):
            if any(answers[i] == answers[j] for i, j in _decided(record)):
                skipped[chats.EQUAL] += 1
                continue
            room = config.max_length - max(map(len, answers))  # one cut for all: they share their prompt
            if len(prompt) > room:
                cut = (
                    chats.shorten(prompt, room, tokenizers.bos_id(tokenizer)) if config.overlong == "truncate" else None
                )
                if cut is None:
                    skipped[chats.LONG] += 1
                    continue
                prompt = cut
                self.truncated += 1
            self.records.append(record)
            self.prompts.append(prompt)
            self.answers.append(answers)
        self.ranks: list[list[int]] = [record["ranks"] for record in self.records]
        self.skipped = dict(skipped)
        chats.require(len(self.records), at_least, split, len(found), self.skipped)

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, ids: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask (B, K, T) and ranks (B, K), int64; margin (B,) where the config names a field.

        Right-padded; mask 1 = real, through the end token, which closes every answer. Where a prompt has fewer answers
        than another, its last rows are padding throughout, of rank -1. Rank 0 is the best, equal ranks are a tie.
        """
        K = max(len(self.answers[i]) for i in ids)
        sequences, ranks = [], torch.full((len(ids), K), -1)
        for row, i in enumerate(ids):
            ranks[row, : len(self.ranks[i])] = torch.tensor(self.ranks[i])
            sequences += [self.prompts[i] + answer for answer in self.answers[i]]
            sequences += [[]] * (K - len(self.answers[i]))
        tokens, mask = (x.view(len(ids), K, -1) for x in chats.pad(sequences, self.pad_id, "right"))
        batch = {"input_ids": tokens, "attention_mask": mask, "ranks": ranks}
        if self.config.margin is not None:
            batch["margin"] = torch.tensor([self.records[i]["margin"] for i in ids])
        return batch

    def report(self) -> str:
        return chats.report(len(self), self.skipped, self.truncated)


def _count(skipped: Counter[str], reason: str) -> bool:
    skipped[reason] += 1
    return False


def _unusable(pattern: re.Pattern[str], record: dict, ties: bool) -> str | None:
    """Why a record teaches nothing, or None."""
    answers = record["answers"]
    if any(not messages or messages[-1]["role"] != "assistant" for messages in answers):
        return chats.NOTHING
    if any(not message["content"].strip() for messages in answers for message in messages):
        return chats.EMPTY
    if len(answers) < 2:
        return ALONE
    if not record["prompt"]:
        return chats.UNASKED
    if not ties and not _decided(record):
        return TIED
    if chats.marked(pattern, [*record["prompt"], *(message for messages in answers for message in messages)]):
        return chats.MARKED
    return None


def _decided(record: dict) -> list[tuple[int, int]]:
    """The pairs of answers of which one is better."""
    ranks = record["ranks"]
    return [(i, j) for i in range(len(ranks)) for j in range(i) if ranks[i] != ranks[j]]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(
    config: ChatsConfig | PreferencesConfig, tokenizer: "PreTrainedTokenizerFast", split: Split, *, at_least: int = 1
) -> Prompts:
    """The prompts of a split, each once: of pairs, or of conversations up to the last answer. For PPO.

    ``max_length`` of the config is the most tokens of the prompt alone.
    """
    if isinstance(config, PreferencesConfig):
        found = rankings(config, split)
    else:
        found = [{**r, "prompt": _before_answer(r["messages"])} for r in chats.conversations(config, split)]
    return Prompts(
        found,
        tokenizer,
        split=split,
        template=config.template,
        max_length=config.max_length,
        overlong=config.overlong,
        at_least=at_least,
    )


def _before_answer(messages: list[Message]) -> list[Message]:
    last = max((n for n, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
    return messages[:last]
