"""Conversations: questions and answers as token rows in which only the answers are scored.

    record --columns--> messages --chat template--> segments --tokenizer--> ids, scored

Ids are built segment by segment, so that what is scored is known by construction: nothing is tokenised twice and no
marker is searched for among the ids. The scored segments are the assistant's words and the end token that closes them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fledge.config import DataConfig, data_path, hardware
from fledge.data import records, text
from fledge.data import tokenizer as tokenizers
from fledge.data.records import Split
from fledge.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]
Segment = tuple[str, bool]  # text with its special tokens written out, scored
Overlong = Literal["drop", "truncate"]
ROLES = ("system", "user", "assistant")

# reasons of a skip, counted in `skipped`
EMPTY, NOTHING, UNASKED = "empty answer", "no answer of the assistant", "nothing asked before the assistant"
LONG = "longer than max_length"
MARKED, TWICE, EQUAL = "a special token in the text", "prompt seen before", "chosen equals rejected"
TRUNCATED = "prompt cut at the left"  # not a skip; counted beside them in `truncated`


# ---- records ---------------------------------------------------------------------------------------------------------


class RecordsConfig(DataConfig):
    """Records of conversations and how their splits are drawn; base of chats and preferences."""

    world_part: ClassVar[str]
    source: Literal["world", "files"] = "world"
    """world: what ships with fledge. files: records of your own, in ``path``."""
    path: str | None = hardware(None)
    """A .jsonl (also .jsonl.gz) or .parquet file, or a folder of them."""
    validation_path: str | None = hardware(None)
    """Held-out records of their own; without it, a share of those of ``path``."""
    test_path: str | None = hardware(None)
    """As ``validation_path``, for the final figures."""
    split_field: str | None = None
    """A field that says train, validation (also val, valid, dev) or test; without it, a hash of the prompt decides."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out."""
    test_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of prompts held out for the final figures."""
    portion: tuple[float, float] = (0.0, 1.0)
    """Share of the training prompts, by a hash of its own: [0, 0.5] in one stage and [0.5, 1] in the next keep them
    apart, so that a policy is not rewarded for what it was taught by heart."""
    prompt: list[str] = ["prompt"]
    """The field or fields that make the prompt, one below the other: [instruction, input]."""
    template: Literal["chat", "plain"] = "chat"
    """chat: a prompt that is plain text becomes a user's message. plain: prompt and answer follow without markers."""
    max_length: int = Field(default=512, ge=2)
    """The most tokens of an example."""
    overlong: Overlong = "drop"
    """drop: leave longer examples out. truncate: cut their prompt at the left, the answer stays whole. Both counted."""

    def fingerprint(self) -> str:
        if self.source == "world":
            from fledge.data import world

            return world.fingerprint(self.world_part)
        return records.digest({s: [records.sha256(f) for f in paths] for s, paths in self.inputs().items()})

    def check(self) -> None:
        if self.source == "files" and self.path is None:
            raise InputError("data.source is files, but data.path is not set; give a .jsonl or .parquet file")
        if self.source == "world" and self.path is not None:
            raise InputError(f"data.path is {self.path}, but data.source is world; set data.source: files to read it")
        if self.validation_fraction + self.test_fraction >= 1:
            raise InputError("data.validation_fraction and data.test_fraction leave nothing to train on")
        if not 0 <= self.portion[0] < self.portion[1] <= 1:
            raise InputError(f"data.portion is {list(self.portion)}; expected [low, high] with 0 <= low < high <= 1")
        self.inputs()

    def inputs(self) -> dict[str, list[Path]]:
        """The files behind each path that is set."""
        return records.inputs(self, records.RECORD_SUFFIXES)


class ChatsConfig(RecordsConfig):
    """Conversations: ``messages``, or ``prompt`` and ``completion`` (TRL's formats), or fields named otherwise."""

    world_part: ClassVar[str] = "questions"
    messages: str = "messages"
    """The field with a list of {role, content}; records without it have a prompt and a completion."""
    completion: str = "completion"
    """The field of the answer."""
    packing: Literal["none", "best_fit"] = "none"
    """none: one example a row. best_fit: several examples a row of max_length, with a document index."""
    chat_template: str | None = None
    """A Jinja template in place of the tokenizer's own, which goes into the artifact; null: the tokenizer's."""
    chat_template_path: str | None = hardware(None)
    """The same as a file, whose content counts."""

    def fingerprint(self) -> str:
        own = super().fingerprint()
        return own if self.chat_template_path is None else records.digest([own, self.own_template()])

    def check(self) -> None:
        super().check()
        if self.own_template() is not None and self.template == "plain":
            raise InputError("data.template is plain, which writes no markers; use chat with a data.chat_template")

    def own_template(self) -> str | None:
        """The text of the template that is given here."""
        if self.chat_template_path is None:
            return self.chat_template
        if self.chat_template is not None:
            raise InputError("data.chat_template and data.chat_template_path are both set; give one of them")
        path = data_path(self.chat_template_path)
        if not path.is_file():
            raise InputError(f"data.chat_template_path: {path} is no file; give a Jinja template")
        return records.read_text(path)


_HELD_OUT: dict[str, Split] = {"val": "validation", "valid": "validation", "dev": "validation"}


def read(config: RecordsConfig, split: Split) -> Iterator[tuple[str, dict]]:
    """("file:line", record) of a split, as they stand in the files."""
    config.check()
    inputs = config.inputs()
    if split != "train" and split in inputs:
        for path in inputs[split]:
            yield from records.read_records(path)
        return
    shares = {"validation": config.validation_fraction, "test": config.test_fraction}
    validation, test = (0.0 if s in inputs else share for s, share in shares.items())
    for path in inputs["train"]:
        for where, record in records.read_records(path):
            if config.split_field is not None:
                named = str(records.look_up(record, config.split_field, where))
                found = _HELD_OUT.get(named, named)
                if found not in records.SPLITS:
                    raise InputError(f"{where}: {config.split_field} is {named!r}; expected train, validation or test")
            else:
                found = records.split_of(_key(config, record, where), validation, test)
            if found == split and (split != "train" or records.in_portion(_key(config, record, where), config.portion)):
                yield where, record


def of_the_world(config: RecordsConfig, split: Split, found: Iterable[Any]) -> list[dict]:
    """The world's records of a split; of the training ones the portion, by character and its case pair."""
    from fledge.data import world

    kept = [dict(record) for record in found]
    if split != "train":
        return kept
    return [r for r in kept if records.in_portion(str(world.family(r["codepoint"])), config.portion)]


def _key(config: RecordsConfig, record: dict, where: str) -> str:
    """What the split hashes: the prompt, so that one prompt's answers never stand on both sides."""
    messages = record.get(getattr(config, "messages", ""))
    if messages is None and config.prompt[0] not in record and isinstance(record.get("chosen"), list):
        messages = record["chosen"]  # preferences without a prompt of their own
    if messages is None:
        messages = prompt_of(config, record, where)
    prompt = [m for m in as_messages(messages, "user", where) if m["role"] != "assistant"]
    return "\n".join(m["content"] for m in prompt)


def prompt_of(config: RecordsConfig, record: dict, where: str) -> str | list:
    """The prompt of a record: a list of messages as it stands, or texts joined."""
    if len(config.prompt) == 1 and isinstance(value := records.look_up(record, config.prompt[0], where), list):
        return value
    return records.join_fields(record, config.prompt, where)


def as_messages(value: Any, role: str, where: str) -> list[Message]:
    """Checked messages; a plain text becomes one of ``role``.

    Raises:
        InputError: not a text or a list of {role, content} with known roles.
    """
    if isinstance(value, str) or value is None:
        return [{"role": role, "content": value or ""}]
    value = value if isinstance(value, list) else [value]
    for message in value:
        fine = isinstance(message, dict) and isinstance(message.get("content"), str) and message.get("role") in ROLES
        if not fine:
            raise InputError(
                f"{where}: expected a text or a list of messages with a role ({', '.join(ROLES)}) and a text as "
                f"content, found {str(message)[:80]!r}"
            )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def conversation(config: ChatsConfig, record: dict, where: str) -> list[Message]:
    """The messages of a record of any of the formats."""
    if record.get(config.messages) is not None:
        return as_messages(record[config.messages], "user", where)
    completion = records.look_up(record, config.completion, where)
    return as_messages(prompt_of(config, record, where), "user", where) + as_messages(completion, "assistant", where)


def _turns(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def conversations(config: ChatsConfig, split: Split) -> list[dict]:
    """The records of a split, each with its ``messages``; whatever else a record holds stays beside them."""
    if config.source == "world":
        from fledge.data import world

        return [
            q | {"messages": _turns(q["prompt"], q["answer"])}
            for q in of_the_world(config, split, world.questions(split))
        ]
    return [{**record, "messages": conversation(config, record, where)} for where, record in read(config, split)]


# ---- tokens ----------------------------------------------------------------------------------------------------------


def render(tokenizer: "PreTrainedTokenizerFast", messages: list[Message], *, generation: bool = False) -> str:
    """The chat template's text; with ``generation`` it ends where the assistant begins to speak.

    Raises:
        InputError: there is no template, or it cannot write these messages.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise InputError(f"this tokenizer has no chat template; {ANOTHER}, or use data.template: plain")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the chat template fails at messages of the roles {roles} ({_asking(messages)}): {error}"
        ) from error


ANOTHER = "give the model one that fits when it is fine-tuned, in its data.chat_template"


def _asking(messages: list[Message]) -> str:
    """Names a conversation by what is asked in it first."""
    asked = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"])
    return f"asking {asked[:60]!r}"


def _unfit(messages: list[Message]) -> InputError:
    return InputError(
        f"the chat template cannot be trained on ({_asking(messages)}): it changes earlier turns when a later one is "
        f"added, or does not close an answer with the tokenizer's end token; {ANOTHER}"
    )


PROBE = [{"role": "user", "content": "a question, to try the template"}, {"role": "assistant", "content": "an answer"}]


def use_template(config: ChatsConfig, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Give the tokenizer the template of the config, if there is one, and try whichever it has on a question.

    Raises:
        InputError: it cannot be trained on.
    """
    config.check()
    own = config.own_template()
    if own is not None:
        tokenizer.chat_template = own
    if config.template == "chat":
        segments(tokenizer, PROBE)


def segments(tokenizer: "PreTrainedTokenizerFast", messages: list[Message], template: str = "chat") -> list[Segment]:
    """A conversation as (text, scored) in order, up to the last answer. Their ids, joined, are the example."""
    if template == "plain":
        return _plain_segments(tokenizer, messages)
    done, found = "", []
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(tokenizer, messages[:n], generation=True)
        said = answer_text(tokenizer, prompt, messages[: n + 1])
        if not prompt.startswith(done):
            raise _unfit(messages)
        found += [(prompt[len(done) :], False), (said, True)]
        done = prompt + said
    return found


def _plain_segments(tokenizer: "PreTrainedTokenizerFast", messages: list[Message]) -> list[Segment]:
    """What stands before an answer is one segment, bos included: it is what may be cut, and read as one text."""
    found: list[Segment] = [(str(tokenizer.bos_token or ""), False)]
    for message in messages:
        if message["role"] == "assistant":
            found.append((message["content"] + str(tokenizer.eos_token), True))
        elif found[-1][1]:
            found.append((message["content"], False))
        else:
            found[-1] = (found[-1][0] + message["content"], False)
    return found


def answer_text(
    tokenizer: "PreTrainedTokenizerFast", prompt: str, messages: list[Message], template: str = "chat"
) -> str:
    """What stands behind the rendered prompt, through the end token that closes the last answer."""
    if template == "plain":
        return prompt_text(tokenizer, messages, template)[len(prompt) :]
    full, end = render(tokenizer, messages), str(tokenizer.eos_token)
    closed = full.rfind(end) + len(end)
    if not full.startswith(prompt) or closed < len(prompt) + len(end):
        raise _unfit(messages)
    return full[len(prompt) : closed]


def prompt_text(tokenizer: "PreTrainedTokenizerFast", messages: list[Message], template: str = "chat") -> str:
    """What stands before the answer."""
    return "".join(text for text, _ in prompt_segments(tokenizer, messages, template))


def prompt_segments(
    tokenizer: "PreTrainedTokenizerFast", messages: list[Message], template: str = "chat"
) -> list[Segment]:
    """What stands before the answer; the ids are those of ``apply_chat_template(add_generation_prompt=True)``.

    Those of a plain template are those of training, where what was said before stands in segments of its own.
    """
    if template == "plain":
        return _plain_segments(tokenizer, messages)
    return [(render(tokenizer, messages, generation=True), False)]


def ids_of(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[list[int]]:
    """Ids of texts whose special tokens are written out; nothing is added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def ids_of_segments(
    tokenizer: "PreTrainedTokenizerFast", conversations: list[list[Segment]]
) -> list[list[tuple[list[int], bool]]]:
    """[(ids, scored)] of each conversation's segments, each tokenised as it stands behind the one before it.

    Where a tokenizer puts a blank before every text (SentencePiece's dummy prefix), a segment is read behind the last
    character, or the special token, of the one before, whose ids are then taken off again. Equal ones are read once.
    """
    blank = _adds_blank(tokenizer)
    behind = [
        list(zip(_ends_before(tokenizer, some) if blank else [""] * len(some), (text for text, _ in some), strict=True))
        for some in conversations
    ]
    different = list(dict.fromkeys(chain.from_iterable(behind)))
    ids = dict(zip(different, _ids_behind(tokenizer, different), strict=True))
    return [
        [(ids[text], scored) for text, (_, scored) in zip(texts, some, strict=True)]
        for texts, some in zip(behind, conversations, strict=True)
    ]


def ids_of_answers(
    tokenizer: "PreTrainedTokenizerFast",
    asked: list[list[Message]],
    answers: list[list[list[Message]]],
    template: str = "chat",
) -> list[tuple[list[int], list[list[int]]]]:
    """(ids of the prompt, ids of each of its answers through their end tokens) of each of the prompts ``asked``."""
    texts: list[list[Segment]] = []
    for prompt, some in zip(asked, answers, strict=True):
        before = prompt_segments(tokenizer, prompt, template)
        written = "".join(text for text, _ in before)
        texts += [[*before, (answer_text(tokenizer, written, [*prompt, *said], template), True)] for said in some]
    ids = iter(ids_of_segments(tokenizer, texts))
    found = [[next(ids) for _ in some] for some in answers]
    return [(joined(pieces[0][:-1]), [said for *_, (said, _) in pieces]) for pieces in found]


def joined(pieces: list[tuple[list[int], bool]]) -> list[int]:
    """The ids of segments, one behind the other."""
    return [i for ids, _ in pieces for i in ids]


def _adds_blank(tokenizer: "PreTrainedTokenizerFast") -> bool:
    both, first, second = ids_of(tokenizer, ["\na", "\n", "a"])
    return both != first + second


def _ends_before(tokenizer: "PreTrainedTokenizerFast", segments: list[Segment]) -> list[str]:
    """What stands right before each segment: nothing, a special token, or a character."""
    special = re.compile(f"(?:{markers(tokenizer).pattern})$")
    before = [text for text, _ in segments[:-1]]
    return ["", *(found[0] if (found := special.search(text)) else text[-1:] for text in before)]


def _ids_behind(tokenizer: "PreTrainedTokenizerFast", behind: list[tuple[str, str]]) -> list[list[int]]:
    """Ids of texts as they stand behind their ends, (end, text) each; alone, where a token would reach over both."""
    whole = ids_of(tokenizer, [end + text for end, text in behind])
    ends = sorted({end for end, _ in behind})
    known = dict(zip(ends, ids_of(tokenizer, ends), strict=True))
    return [
        ids[len(known[end]) :] if ids[: len(known[end])] == known[end] else ids_of(tokenizer, [text])[0]
        for ids, (end, text) in zip(whole, behind, strict=True)
    ]


def markers(tokenizer: "PreTrainedTokenizerFast") -> re.Pattern[str]:
    """Finds the name of a special token in a text."""
    specials = [t.content for t in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if t.special]
    return re.compile("|".join(map(re.escape, specials)) or r"(?!)")


def marked(pattern: re.Pattern[str], messages: Iterable[Message]) -> bool:
    """Does a message hold the name of a special token? It could forge a turn, so it is not used."""
    return any(pattern.search(message["content"]) for message in messages)


def shorten(prompt: list[int], room: int, bos: int | None) -> list[int] | None:
    """The last ``room`` ids of a prompt, its bos kept in front; None if nothing of the prompt would be left."""
    first = prompt[:1] if prompt[:1] == [bos] else []
    kept = room - len(first)
    return first + prompt[len(prompt) - kept :] if kept > 0 else None


def pad(sequences: list[list[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (B, T) int64 of the longest's length; mask 1 = real."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        at = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, at] = torch.tensor(sequence, dtype=torch.long)
        mask[row, at] = 1
    return ids, mask


class Chats:
    """A split of conversations as rows.

    ``skipped`` counts what was left out, by reason; ``truncated`` those whose prompt was cut; ``records`` are the used.
    """

    def __init__(
        self, config: ChatsConfig, tokenizer: "PreTrainedTokenizerFast", split: Split, *, at_least: int = 1
    ) -> None:
        self.config, self.split, self.pad_id = config, split, tokenizers.pad_id(tokenizer)
        found = conversations(config, split)
        skipped, truncated = Counter[str](), 0
        self.records, ids, scored = [], [], []
        for record, pieces in _tokenise(config, tokenizer, found, skipped):
            length = sum(len(piece) for piece, _ in pieces)
            if length > config.max_length:
                first = shorten(
                    pieces[0][0], len(pieces[0][0]) + config.max_length - length, tokenizers.bos_id(tokenizer)
                )
                if config.overlong == "drop" or first is None:
                    skipped[LONG] += 1
                    continue
                pieces[0] = (first, False)
                truncated += 1
            self.records.append(record)
            ids.append(np.concatenate([np.array(piece, np.int32) for piece, _ in pieces]))
            scored.append(np.concatenate([np.full(len(piece), answer) for piece, answer in pieces]))
        self.skipped, self.truncated = dict(skipped), truncated
        require(len(ids), at_least, split, len(found), self.skipped)
        self.offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)  # (N + 1,)
        self.tokens = np.concatenate(ids)
        self.scored = np.concatenate(scored)
        packed = config.packing == "best_fit"
        self.index = text.pack(self.offsets, config.max_length, "best_fit") if packed else None

    def __len__(self) -> int:
        return len(self.index.rows) - 1 if self.index is not None else len(self.records)

    def rows(self, ids: list[int], seeds: list[int] | None = None) -> dict[str, Tensor]:
        """(B, T) int64 input_ids, attention_mask, labels: right-padded to the longest. Packed: also document, position.

        Labels are ALREADY SHIFTED: labels[t] is the token at t + 1 where that is the assistant's, else -100.
        """
        if self.index is None:
            index = text.Index(np.arange(len(self) + 1), self.offsets[:-1], np.diff(self.offsets))
            width = int(max(index.length[i] for i in ids))
        else:
            index, width = self.index, self.config.max_length
        batch = text.assemble(index, ids, lambda a, b: self.tokens[a:b], width, self.pad_id)
        scored = text.assemble(index, ids, lambda a, b: self.scored[a:b], width, 0)["input_ids"].bool()
        batch["attention_mask"] = (batch["document"] > 0).long()
        batch["labels"] = text.next_labels(batch["input_ids"], batch["document"])
        batch["labels"][:, :-1][~scored[:, 1:]] = text.IGNORE
        return batch if self.index is not None else {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}

    def report(self) -> str:
        return report(len(self.records), self.skipped, self.truncated)


def _tokenise(
    config: ChatsConfig, tokenizer: "PreTrainedTokenizerFast", found: list[dict], skipped: Counter[str]
) -> Iterator[tuple[dict, list[tuple[list[int], bool]]]]:
    """(record, [(ids of a segment, scored)]) of the usable records; all segments go to the tokenizer at once."""
    usable, pieces, pattern = [], [], markers(tokenizer)
    for record in found:
        messages = record["messages"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        reason = NOTHING if not answers else EMPTY if not all(a.strip() for a in answers) else None
        if reason is None and messages[0]["role"] == "assistant":
            reason = UNASKED
        if reason is None and marked(pattern, messages):
            reason = MARKED
        if reason is not None:
            skipped[reason] += 1
            continue
        usable.append(record)
        pieces.append(segments(tokenizer, messages, config.template))
    yield from zip(usable, ids_of_segments(tokenizer, pieces), strict=True)


def require(used: int, at_least: int, split: str, of: int, skipped: dict[str, int]) -> None:
    """Raise InputError where too few examples are left."""
    if used < max(at_least, 1):
        raise InputError(
            f"the {split} data has {used} usable examples of {of}, but {max(at_least, 1)} are needed; "
            f"{_reasons(skipped) or 'nothing was skipped'}; use more data or a smaller train.batch"
        )


def report(used: int, skipped: dict[str, int], truncated: int = 0) -> str:
    """One line for people: what was used, and what was not and why."""
    cut = f"; {truncated} with their {TRUNCATED}" if truncated else ""
    return f"{used} examples used{cut}" + (f"; {_reasons(skipped)}" if skipped else "")


def _reasons(skipped: dict[str, int]) -> str:
    return "skipped: " + ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) if skipped else ""
