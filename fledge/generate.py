"""Text from a language artifact: a causal one continues, a chat model answers, a text encoder fills in its masks, a
reward model scores answers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fledge import artifact
from fledge.artifact import Artifact
from fledge.errors import InputError

CAUSAL = ("causal-lm", "chat-model")
REWARDS = ("reward-model", "reward-ensemble")
MASK = re.compile(r"\[MASK\]|<mask>")
GUESSES = 5


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    answers: Sequence[str] = (),
) -> str:
    """What a language artifact makes of `prompt`, a function of its arguments alone.

    Args:
        temperature: 0 takes the most probable token.
        top_k: sample among the k most probable tokens; None: among all.
        answers: what a reward model scores.
    """
    if temperature < 0:
        raise InputError(f"--temperature {temperature}: expected 0 (greedy) or more")
    opened = artifact.open(path)
    if opened.kind in REWARDS:
        return score(opened, prompt, answers)
    if answers:
        raise InputError(f"--answer: {path} is a {opened.kind}, which scores no answers; give a {' or '.join(REWARDS)}")
    if opened.kind == "text-encoder":
        return fill(opened, prompt)
    if opened.kind not in CAUSAL:
        raise InputError(
            f"{path} is a {opened.kind}, which writes no text; expected a {', '.join(CAUSAL)}, "
            f"text-encoder or {' or '.join(REWARDS)}"
        )
    return continue_(opened, prompt, max_new_tokens, temperature, top_k, seed)


def continue_(opened: Artifact, prompt: str, n: int, temperature: float, top_k: int | None, seed: int) -> str:
    """The prompt with its continuation, or a chat model's answer alone."""
    from fledge.models import language
    from fledge.models.sampling import left_pad, sample
    from fledge.stream import derive

    tokens = language.read_tokenizer(opened)
    ids = prompt_ids(opened, tokens, prompt)
    model = language.read(opened).eval()
    room = room_for(model, len(ids), opened, least=1)
    said, mask = sample(
        model,
        *left_pad([ids]),
        max_new_tokens=min(n, room),
        seeds=[derive("generate", seed)],
        temperature=temperature,
        top_k=top_k,
        eos_id=tokens.eos_token_id,
    )
    answer = tokens.decode(said[0, : int(mask[0].sum())].tolist(), skip_special_tokens=True)
    return answer.strip() if is_chat(opened, tokens) else prompt + answer


def is_chat(opened: Artifact, tokens: Any) -> bool:
    """Was it taught in a chat template?"""
    from fledge.models import reward_model

    return opened.kind == "chat-model" and reward_model.template(opened.preprocessing, tokens) == "chat"


def prompt_ids(opened: Artifact, tokens: Any, prompt: str) -> list[int]:
    """A chat model is asked in its template; any other begins a document with the prompt."""
    if is_chat(opened, tokens):
        messages = [{"role": "user", "content": prompt}]
        ids = tokens.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(ids["input_ids"])
    start = [] if tokens.bos_token_id is None else [tokens.bos_token_id]
    ids = start + tokens(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the prompt is empty, and this model has no token that begins a text; give some text")
    return ids


def room_for(model: Any, length: int, opened: Artifact, least: int = 0) -> int:
    """How many tokens the model reads beside `length`; an error where that is less than `least`."""
    from fledge.models import language

    most = language.positions(model.config)
    if length + least > most:
        raise InputError(f"the prompt has {length} tokens, but {opened.path} reads {most}; shorten it")
    return most - length


def fill(opened: Artifact, prompt: str) -> str:
    """The text with its masks filled in, and below it the best guesses for each."""
    import torch

    from fledge.models import language

    tokens = language.read_tokenizer(opened)
    if not MASK.search(prompt):
        raise InputError(f"{opened.path} is a text-encoder: it fills in [MASK], and the prompt has none")
    if tokens.mask_token is None:
        raise InputError(f"the tokenizer of {opened.path} has no mask token, so nothing can be filled in")
    model = language.read(opened, "AutoModelForMaskedLM").eval()
    batch = tokens(MASK.sub(str(tokens.mask_token), prompt), return_tensors="pt")
    ids = batch["input_ids"][0]
    room_for(model, len(ids), opened)
    with torch.no_grad():
        probabilities = model(**batch).logits[0].float().softmax(dim=-1)  # (T, V)
    lines = []
    for place in (ids == tokens.mask_token_id).nonzero()[:, 0].tolist():
        best = probabilities[place, : len(tokens)].topk(min(GUESSES, len(tokens)))
        ids[place] = best.indices[0]
        words = [tokens.decode([i]).strip() or "(space)" for i in best.indices.tolist()]
        guesses = [f"{word} {p:.2f}" for word, p in zip(words, best.values.tolist(), strict=True)]
        lines.append(f"  [MASK] {len(lines) + 1}: " + ", ".join(guesses))
    return "\n".join([tokens.decode(ids.tolist(), skip_special_tokens=True), *lines])


def score(opened: Artifact, prompt: str, answers: Sequence[str]) -> str:
    """A table of the answers, the best first: calibrated and raw rewards, or an ensemble's mean and disagreement."""
    import torch

    from fledge.data import chats, tokenizer
    from fledge.models import reward_model

    if not answers or not all(answer.strip() for answer in answers):
        raise InputError(f"{opened.path} is a {opened.kind}: it scores answers; give --answer TEXT, once for each")
    tokens = reward_model.read_tokenizer(opened)
    for text in (prompt, *answers):
        if found := chats.markers(tokens).search(text):
            raise InputError(
                f"{found.group()!r} is a special token of {opened.path}: it could end the answer, or forge "
                "a turn; say it in another way"
            )
    models, template = reward_model.read(opened), reward_model.template(opened.preprocessing, tokens)
    asked = [{"role": "user", "content": prompt}]
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    [(first, ids)] = chats.ids_of_answers(tokens, [asked], [said], template)
    room_for(models[0], len(first) + max(map(len, ids)), opened)
    rows = chats.pad([first + answer for answer in ids], tokenizer.pad_id(tokens), "right")
    with torch.no_grad():
        raw = torch.stack([reward_model.raw_rewards(model.eval(), *rows) for model in models])  # (M, N)
    calibrated = torch.stack([reward_model.calibrated(m, x) for m, x in zip(models, raw, strict=True)])
    spread, mean = torch.std_mean(calibrated, dim=0, correction=0)
    names, beside = ("reward", "raw"), raw[0]
    if opened.kind == "reward-ensemble":
        names, beside = ("reward", "disagreement"), spread
    lines = [f"{names[0]:>8}  {names[1]:>12}  answer"]
    for i in mean.argsort(descending=True, stable=True).tolist():
        lines.append(f"{mean[i].item():8.3f}  {beside[i].item():12.3f}  {answers[i]}")
    return "\n".join(lines)
