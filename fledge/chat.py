"""A conversation with a chat model, in its own template: at a terminal, or one line after another down a pipe.

    fledge generate runs/demo/sft --chat
    printf '%s\n' "latin small letter e: its case?" "greek small letter pi: its script?" | fledge generate DIR --chat

Answers go to stdout and nothing else does; what is said about the conversation goes to stderr.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fledge import artifact
from fledge.errors import InputError

HELP = "/reset begins anew, /system TEXT sets what the model is told first, /quit or Ctrl-D ends"
Message = dict[str, str]


class Chatter:
    """A chat model with the settings it answers with; it remembers nothing.

    Args:
        model, tokenizer: of transformers; the tokenizer has a chat template.
        temperature: 0 takes the most probable token.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int, temperature: float, top_k: int | None, seed: int
    ) -> None:
        from fledge.models import language

        self.model, self.tokenizer, self.seed = model.eval(), tokenizer, seed
        self.max_new_tokens, self.temperature, self.top_k = max_new_tokens, temperature, top_k
        self.positions = language.positions(model.config)
        ends = getattr(model.generation_config, "eos_token_id", None)  # a chat model may name several
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = {i for i in [*ends, tokenizer.eos_token_id] if i is not None}

    def ids(self, messages: list[Message]) -> list[int]:
        """The conversation in the model's template, up to where it begins to speak.

        Raises:
            InputError: the template refuses these messages, as some do a system's.
        """
        from jinja2 import TemplateError

        try:
            found = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this: {error}") from error
        return list(found["input_ids"])

    def answer(self, messages: list[Message], turn: int) -> Iterator[str]:
        """The answer in pieces, as it comes; the same messages and turn give the same one."""
        from fledge.models.sampling import stream
        from fledge.stream import derive

        ids = self.ids(messages)
        tokens = stream(
            self.model,
            ids,
            max_new_tokens=min(self.max_new_tokens, self.positions - len(ids)),
            seed=derive("generate", self.seed) if turn == 0 else derive("generate", self.seed, turn),
            temperature=self.temperature,
            top_k=self.top_k,
            eos_ids=self.eos_ids,
        )
        return spoken(self.tokenizer, tokens)


def spoken(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Tokens as text without special ones, in pieces that join to the whole text less the spaces around it.

    Held back are spaces, which may be the last ones, and the first bytes of a character of which more are to come.
    """
    ids: list[int] = []
    said, text = "", ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    yield text[len(said) :]


class Conversation:
    """What was said so far. What no longer fits into the model is forgotten, the oldest exchange first."""

    def __init__(self, chatter: Chatter) -> None:
        self.chatter = chatter
        self.system = ""
        self.turns: list[Message] = []
        self.answered = 0

    def reset(self) -> None:
        self.turns, self.answered = [], 0

    def tell(self, system: str) -> None:
        """Set the system's message; the conversation begins anew.

        Raises:
            InputError: the template knows no such message.
        """
        before, self.system = self.system, system
        try:
            self.chatter.ids(self._messages([{"role": "user", "content": "?"}]))
        except InputError:
            self.system = before
            raise
        self.reset()

    def ask(self, text: str) -> tuple[int, Iterator[str]]:
        """How many exchanges were forgotten to make room, and the answer in pieces.

        Raises:
            InputError: the text does not fit into the model even alone, or could forge a turn.
        """
        self._check(text)
        turns, forgotten = [*self.turns, {"role": "user", "content": text}], 0
        while (lacking := self._lacking(turns)) and len(turns) > 1:
            turns, forgotten = turns[2:], forgotten + 1
        if lacking and not self._lacking(turns, wanted=1):
            lacking = 0  # a shorter answer than was asked for has room
        if lacking:
            raise InputError(f"this does not fit: the model reads {self.chatter.positions} tokens; say it shorter")
        return forgotten, self._answer(turns)

    def _answer(self, turns: list[Message]) -> Iterator[str]:
        pieces: list[str] = []
        try:
            for piece in self.chatter.answer(self._messages(turns), self.answered):
                pieces.append(piece)
                yield piece
        finally:  # an answer that was interrupted was still said
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
            self.answered += 1

    def _messages(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *turns] if self.system else turns

    def _lacking(self, turns: list[Message], wanted: int | None = None) -> int:
        """How many tokens too few the model has for these turns and an answer."""
        used = len(self.chatter.ids(self._messages(turns))) + (wanted or self.chatter.max_new_tokens)
        return max(0, used - self.chatter.positions)

    def _check(self, text: str) -> None:
        """A special token's name in a text would become that token, and could end the turn and begin another."""
        tokenizer = self.chatter.tokenizer
        names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        if found := next((name for name in sorted(names) if name and name in text), None):
            raise InputError(f"{found!r} is a special token of this model; say it in another way")


# ------------------------------------------------------------------------------------------------------------ loading


def open_chatter(path: str | Path, **settings: Any) -> Chatter:
    """A chat-model artifact, or a folder of transformers' own with a chat template. No code of the folder is run.

    Raises:
        InputError: neither is there, or the model has no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fledge.models import language

    folder = Path(path)
    if settings["temperature"] < 0:
        raise InputError(f"--temperature {settings['temperature']}: expected 0 (greedy) or more")
    if (folder / "manifest.json").is_file() or not (folder / "config.json").is_file():
        opened = artifact.open(path, "chat-model")
        model, tokenizer = language.read(opened), language.read_tokenizer(opened)
    else:
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            with language.quiet():
                tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto", **options)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: transformers cannot read it as a language model: {reason}") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{path} has no chat template, so it cannot be talked to; leave out --chat to continue a text")
    return Chatter(model, tokenizer, **settings)


# ---------------------------------------------------------------------------------------------------------- terminal


def talk(chatter: Chatter, first: str | None = None) -> None:
    """Until the input ends: an answer for each line. At a terminal, Ctrl-C ends an answer."""
    conversation, terminal = Conversation(chatter), sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        say(HELP)
    for line in [first] if first else []:
        reply(conversation, line, terminal)
    for line in typed() if terminal else sys.stdin:
        line = line.strip()
        if line == "/quit":
            break
        if line.startswith("/"):
            command(conversation, line)
        elif line:
            reply(conversation, line, terminal)


def typed() -> Iterator[str]:
    """Lines of a terminal, with the editing keys that it has."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then knows the arrow keys)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def command(conversation: Conversation, line: str) -> None:
    """/reset or /system TEXT."""
    name, _, text = line.partition(" ")
    if name == "/reset":
        conversation.reset()
        say("the conversation begins anew")
    elif name == "/system":
        try:
            conversation.tell(text.strip())
        except InputError as error:
            say(str(error))
        else:
            say(
                "the conversation begins anew, "
                + ("with this said first" if text.strip() else "with nothing said first")
            )
    else:
        say(f"{name} is no command: {HELP}")


def reply(conversation: Conversation, line: str, terminal: bool) -> None:
    """Print the answer as it comes, and a newline; a refused line is answered by an empty one."""
    try:
        forgotten, pieces = conversation.ask(line)
    except InputError as error:
        say(str(error))
        pieces, forgotten = iter(()), 0
    if forgotten:
        say(f"the context is full: the oldest {forgotten} exchange{'s' * (forgotten > 1)} forgotten")
    try:
        for piece in pieces:
            sys.stdout.write(printable(piece) if terminal else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not terminal:
            raise
        pieces.close()  # type: ignore[union-attr]
    sys.stdout.write("\n")
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text for a terminal: nothing that a model says moves the cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def say(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)
