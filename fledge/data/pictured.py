"""Prompts with a picture each, as a processor of transformers hands them to a policy that sees."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fledge.data.chats import Message
from fledge.data.images import MAX_PIXELS, decode
from fledge.data.pairs import look_at, lookup
from fledge.errors import InputError
from fledge.stream import Batch

NONE, NOBODY = "no picture", "no message of the user to show a picture with"  # reasons of a skip
ROWS = 64
"""Pictures that are decoded together."""


class Pictured:
    """The pictures that records name, and what a processor makes of them.

    Args:
        processor: of the policy's artifact (AutoProcessor).
        field: where a record names its picture, a path below ``folder``.
        records: those whose pictures will be asked for.

    Raises:
        InputError: the processor makes something of words and pictures together that has no row for each prompt.
    """

    def __init__(self, processor: Any, field: str, folder: Path, records: Sequence[dict]) -> None:
        self.processor, self.field, self.folder = processor, field, folder
        self.faults = {name: found.why for name, found in look_at(folder, self.names(records), MAX_PIXELS).items()}
        if not hasattr(processor, "image_token"):
            raise InputError(
                f"data.image: {type(processor).__name__} has no token that stands for a picture; PPO sees with models "
                "such as LLaVA, whose processor puts tokens in the place of a picture"
            )

    def name(self, record: dict) -> str:
        """The picture's path, or nothing."""
        found = lookup(record, self.field)
        return found if isinstance(found, str) else ""

    def names(self, records: Sequence[dict]) -> list[str]:
        return [name for record in records if (name := self.name(record))]

    def fault(self, record: dict) -> str | None:
        """Why this prompt cannot be asked, or None."""
        if all(message["role"] != "user" for message in record["prompt"]):
            return NOBODY
        return self.faults.get(self.name(record), NONE)

    def asked(self, messages: list[Message]) -> list[Message]:
        """The prompt with the picture's token before the user's first words."""
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        seen = {**messages[first], "content": f"{self.processor.image_token}\n{messages[first]['content']}"}
        return [*messages[:first], seen, *messages[first + 1 :]]

    def ids(self, texts: Sequence[str], records: Sequence[dict]) -> list[list[int]]:
        """Token ids of prompts, with as many tokens for each picture as the model has places for it."""
        found: list[list[int]] = []
        for start in range(0, len(texts), ROWS):
            some = slice(start, start + ROWS)
            out = self.processor(text=list(texts[some]), images=self._read(records[some]), add_special_tokens=False)
            beside = set(out) - {"input_ids", "attention_mask"} - set(self.inputs(records[start : start + 1]))
            if beside:
                raise InputError(
                    f"data.image: {type(self.processor).__name__} gives {', '.join(sorted(beside))} beside tokens and "
                    "pictures, which PPO does not carry; use a policy such as LLaVA, which needs pixel values alone"
                )
            found += out["input_ids"]
        return found

    def inputs(self, records: Sequence[dict]) -> Batch:
        """What the model is called with beside ids, (B, …) each."""
        found = dict(self.processor.image_processor(images=self._read(records), return_tensors="pt"))
        for name, tensor in found.items():
            if len(tensor) != len(records):
                raise InputError(
                    f"data.image: {type(self.processor).__name__} gives {name} of shape {[*tensor.shape]} for "
                    f"{len(records)} pictures; PPO needs one row for each"
                )
        return found

    def _read(self, records: Sequence[dict]) -> list[Any]:
        return [decode(self.folder / self.name(record), "RGB") for record in records]
