"""Prompts for a policy to answer: of any records, with a picture each where the policy sees."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fledge.config import data_path
from fledge.data import chats, world
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import LONG, MARKED, TWICE, UNASKED, Overlong, RecordsConfig, Segment
from fledge.data.images import MAX_PIXELS
from fledge.data.pairs import look_at, lookup
from fledge.data.pictured import Pictured
from fledge.data.records import SPLITS, Split, digest
from fledge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PromptsConfig(RecordsConfig):
    """Prompts of any records: chats, preferences, or prompts alone. ``max_length`` is that of a prompt alone."""

    world_part: ClassVar[str] = "questions"
    messages: str = "messages"
    """The field with a list of {role, content}; its last answer is left off. Records without it have a prompt."""
    image: str | None = None
    """The field with the path of a picture, below the folder of the records, for a policy that sees; null: none."""

    def check(self) -> None:
        super().check()
        if self.image is not None and (self.source == "world" or self.overlong == "truncate"):
            raise InputError("data.image is for data.source: files, and for overlong: drop: a cut prompt may lose it")

    def fingerprint(self) -> str:
        if self.image is None:
            return super().fingerprint()
        names = {str(lookup(record, self.image)) for split in SPLITS for _, record in chats.read(self, split)}
        found = look_at(self.folder(), sorted(names), MAX_PIXELS)
        return digest([super().fingerprint(), {name: picture.sha256 for name, picture in found.items()}])

    def folder(self) -> Path:
        """Where the records lie."""
        at = data_path(self.path or "")
        return at if at.is_dir() else at.parent


class Prompts:
    """Prompts alone, each once, for a policy to answer. ``records`` stand in the order of the ids.

    Args:
        found: records with their ``prompt`` as messages.
        max_length: tokens of a prompt at most.
        pictures: what prompts show beside their words.
    """

    def __init__(
        self,
        found: list[dict],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        split: str,
        template: str = "chat",
        max_length: int = 512,
        overlong: Overlong = "drop",
        at_least: int = 1,
        pictures: Pictured | None = None,
    ) -> None:
        self.pad_id, skipped, self.truncated = tokenizers.pad_id(tokenizer), Counter[str](), 0
        self.pictures = pictures
        unique: dict[tuple[str, str], tuple[dict, list[Segment]]] = {}
        pattern = chats.markers(tokenizer)
        for record in found:
            if not record["prompt"]:
                skipped[UNASKED] += 1
                continue
            if chats.marked(pattern, record["prompt"]):
                skipped[MARKED] += 1
                continue
            if pictures is not None and (fault := pictures.fault(record)):
                skipped[fault] += 1
                continue
            asked, shown = record["prompt"], ""
            if pictures is not None:
                asked, shown = pictures.asked(asked), pictures.name(record)
            before = chats.prompt_segments(tokenizer, asked, template)
            words_and_picture = "".join(text for text, _ in before), shown
            skipped[TWICE] += words_and_picture in unique
            unique.setdefault(words_and_picture, (record, before))
        self.records: list[dict] = []
        self.ids: list[list[int]] = []
        usable = [record for record, _ in unique.values()]
        if pictures is None:
            pieces = chats.ids_of_segments(tokenizer, [before for _, before in unique.values()])
            every = [chats.joined(some) for some in pieces]
        else:
            every = pictures.ids([words for words, _ in unique], usable)
        for record, ids in zip(usable, every, strict=True):
            if not ids:  # an empty text, without a token that begins one
                skipped[UNASKED] += 1
                continue
            if len(ids) > max_length and overlong == "drop":
                skipped[LONG] += 1
                continue
            if len(ids) > max_length:
                ids = chats.shorten(ids, max_length, tokenizers.bos_id(tokenizer)) or ids[-max_length:]
                self.truncated += 1
            self.records.append(record)
            self.ids.append(ids)
        self.skipped = {reason: n for reason, n in skipped.items() if n}
        chats.require(len(self.ids), at_least, split, len(found), self.skipped)
        self.width = max(map(len, self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """(B, P) int64 input_ids and attention_mask, LEFT-padded to the longest of these rows."""
        tokens, mask = chats.pad([self.ids[i] for i in ids], self.pad_id, "left")
        return {"input_ids": tokens, "attention_mask": mask}

    def inputs(self, ids: list[int]) -> dict[str, Tensor]:
        """What they bring beside ids, (B, …) each, by the name of the model's argument; nothing without pictures."""
        return {} if self.pictures is None else self.pictures.inputs([self.records[i] for i in ids])

    def report(self) -> str:
        return chats.report(len(self), self.skipped, self.truncated)


def read_prompts(config: PromptsConfig, tokenizer: Any, split: Split, processor: Any = None) -> Prompts:
    """The prompts of a split, each once; answers that stand behind them are left off.

    Args:
        processor: of a policy that sees.

    Raises:
        InputError: there are pictures, and no processor.
    """
    found, pictures = prompt_records(config, split), None
    if config.image is not None:
        if processor is None:
            raise InputError(f"data.image is {config.image}, but the policy has no processor: it reads text alone")
        pictures = Pictured(processor, config.image, config.folder(), found)
    form = {"template": config.template, "max_length": config.max_length, "overlong": config.overlong}
    return Prompts(found, tokenizer, split=split, pictures=pictures, **form)


def prompt_records(config: PromptsConfig, split: Split) -> list[dict]:
    """The records of a split, each with its ``prompt`` as messages."""
    if config.source == "world":
        questions = chats.of_the_world(config, split, world.questions(split))
        found = ((f"world:{n}", record) for n, record in enumerate(questions))
    else:
        found = chats.read(config, split)
    records = []
    for where, record in found:
        said = record.get(config.messages)
        messages = chats.as_messages(chats.prompt_of(config, record, where) if said is None else said, "user", where)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        records.append({**record, "prompt": messages})
    return records
