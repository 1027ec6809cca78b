"""Preferences: a prompt with a chosen and a rejected answer; and prompts alone, for a policy to answer."""

import re
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from fledge.data import chats, records
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import ChatsConfig, Message, Prompts, RecordsConfig
from fledge.data.records import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PreferencesConfig(RecordsConfig):
    """``prompt``, ``chosen``, ``rejected`` as texts or messages (TRL's formats), or fields named otherwise."""

    world_part: ClassVar[str] = "preferences"
    chosen: str = "chosen"
    """The field of the better answer."""
    rejected: str = "rejected"
    """The field of the worse answer."""


def pair(config: PreferencesConfig, record: dict, where: str) -> dict[str, list[Message]]:
    """{prompt, chosen, rejected} as messages. Without a prompt field it is what two conversations have in common."""
    chosen, rejected = (records.look_up(record, field, where) for field in (config.chosen, config.rejected))
    if config.prompt[0].split(".")[0] not in record and isinstance(chosen, list) and isinstance(rejected, list):
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        last = max((n for n in range(common) if chosen[n].get("role") != "assistant"), default=-1) + 1
        prompt, chosen, rejected = chosen[:last], chosen[last:], rejected[last:]
    else:
        prompt = chats.prompt_of(config, record, where)
    return {
        "prompt": chats.as_messages(prompt, "user", where),
        "chosen": chats.as_messages(chosen, "assistant", where),
        "rejected": chats.as_messages(rejected, "assistant", where),
    }


def pairs(config: PreferencesConfig, split: Split) -> list[dict]:
    """The records of a split, each with prompt, chosen and rejected as messages."""
    if config.source == "world":
        from fledge.data import world

        plain = PreferencesConfig()  # the world's own field names, whatever the config says about files
        found = chats.of_the_world(config, split, world.preferences(split))
        return [record | pair(plain, record, "world") for record in found]
    return [{**record, **pair(config, record, where)} for where, record in chats.read(config, split)]


class Preferences:
    """A split of pairs as rows. ``skipped`` counts what was left out, by reason; ``records`` are the used ones."""

    def __init__(
        self, config: PreferencesConfig, tokenizer: "PreTrainedTokenizerFast", split: Split, *, at_least: int = 1
    ) -> None:
        self.config, self.split, self.pad_id = config, split, tokenizers.pad_id(tokenizer)
        found = pairs(config, split)
        skipped, self.truncated = Counter[str](), 0
        pattern = chats.markers(tokenizer)
        usable = [record for record in found if not (reason := _unusable(pattern, record)) or _count(skipped, reason)]
        texts = [text for record in usable for text in _texts(config, tokenizer, record)]
        ids = iter(chats.ids_of(tokenizer, texts))
        self.records: list[dict] = []
        self.prompts: list[list[int]] = []  # as both sides begin
        self.chosen: list[list[int]] = []
        self.rejected: list[list[int]] = []
        for record in usable:
            prompt, chosen, rejected = next(ids), next(ids), next(ids)
            room = config.max_length - max(len(chosen), len(rejected))  # one cut for both: they share their prompt
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
            self.chosen.append(prompt + chosen)
            self.rejected.append(prompt + rejected)
        self.skipped = dict(skipped)
        chats.require(len(self.records), at_least, split, len(found), self.skipped)

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, ids: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """chosen_ids, chosen_mask (B, Tc), rejected_ids, rejected_mask (B, Tr), int64.

        Right-padded; mask 1 = real, through the end token, which closes every answer.
        """
        chosen, chosen_mask = chats.pad([self.chosen[i] for i in ids], self.pad_id, "right")
        rejected, rejected_mask = chats.pad([self.rejected[i] for i in ids], self.pad_id, "right")
        return {
            "chosen_ids": chosen,
            "chosen_mask": chosen_mask,
            "rejected_ids": rejected,
            "rejected_mask": rejected_mask,
        }

    def report(self) -> str:
        return chats.report(len(self), self.skipped, self.truncated)


def _count(skipped: Counter[str], reason: str) -> bool:
    skipped[reason] += 1
    return False


def _unusable(pattern: re.Pattern[str], record: dict) -> str | None:
    """Why a pair teaches nothing, or None."""
    answers = [record["chosen"], record["rejected"]]
    if any(not messages or messages[-1]["role"] != "assistant" for messages in answers):
        return chats.NOTHING
    if any(not message["content"].strip() for messages in answers for message in messages):
        return chats.EMPTY
    if answers[0] == answers[1]:
        return chats.EQUAL
    if chats.marked(pattern, [*record["prompt"], *answers[0], *answers[1]]):
        return chats.MARKED
    return None


def _texts(config: PreferencesConfig, tokenizer: "PreTrainedTokenizerFast", record: dict) -> list[str]:
    """[prompt, chosen answer, rejected answer] with their special tokens written out."""
    prompt = chats.prompt_text(tokenizer, record["prompt"], config.template)
    if config.template == "chat":
        turns = ([*record["prompt"], *record[side]] for side in ("chosen", "rejected"))
        return [prompt, *(chats.answer_text(tokenizer, prompt, messages) for messages in turns)]
    plain = (chats.segments(tokenizer, record[side], "plain")[1:] for side in ("chosen", "rejected"))  # without bos
    return [prompt, *("".join(text for text, _ in pieces) for pieces in plain)]


def prompts(
    config: ChatsConfig | PreferencesConfig, tokenizer: "PreTrainedTokenizerFast", split: Split, *, at_least: int = 1
) -> Prompts:
    """The prompts of a split, each once: of pairs, or of conversations up to the last answer. For PPO.

    ``max_length`` of the config is the most tokens of the prompt alone.
    """
    if isinstance(config, PreferencesConfig):
        found = pairs(config, split)
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
