"""Two chat models side by side: the same prompts, the same seeds, and who answers better by a judge. `fledge compare`.

N prompts. A judge is a function, and how many arguments it takes says which form it has:

- ``judge(records, answers)``: one score for each answer; the higher one wins, equal ones tie. PPO's form.
- ``judge(records, first, second)``: for each prompt a number in [-1, 1], 1 where the second answer is better, -1 where
  the first is, 0 for a tie (of a probability p that the second is better, 2 p - 1). It is asked twice, the answers in
  either order, and the two are averaged, so that a liking for a place cancels out.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from align import scorers
from align.judge import Questions, world_gold
from align.rollout import decode, inputs_of
from align.scorers import FunctionScorer, Scorer, callable_of
from fledge import artifact, distributed
from fledge import config as configs
from fledge.artifact import Artifact
from fledge.data.pictured import Pictured
from fledge.data.prompts import Prompts, PromptsConfig, prompt_records
from fledge.data.records import RECORD_SUFFIXES, Split
from fledge.errors import InputError, RunError
from fledge.evals.preference import by_length, mean_difference, win_rate
from fledge.models import language, reward_model
from fledge.stream import Batch

Pairwise = Callable[[list[dict], list[str], list[str]], Sequence[float]]
ROWS = 128  # that are answered together
LOGITS = 2**26
"""The most numbers in a tensor of logits of the exact KL: 256 MB in fp32, and some seven such at once. An answer is not
cut: one that is longer by itself is read alone."""


class Side(NamedTuple):
    """A model and how it is asked."""

    artifact: Artifact
    model: nn.Module
    questions: Questions


class Verdict(NamedTuple):
    """What a judge says of N pairs of answers."""

    preference: np.ndarray
    """(N,), 1 where the second answer wins."""
    scores: tuple[np.ndarray, np.ndarray] | None
    """(N,) of each side, of a judge that scores."""
    consistent: float | None
    """Of a judge that compares: in which share of the pairs it prefers the same answer in either order."""


def compare(
    a: str | Path,
    b: str | Path,
    *,
    judge: str | None = None,
    reward: str | Path | None = None,
    data: str = "world",
    split: Split = "test",
    prompts: int = 512,
    greedy: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """What two chat models answer to the same prompts with the same seeds, and who wins.

    Args:
        a, b: artifacts; the win rate is that of b over a.
        judge: ``module:function`` of either form; None and no `reward`: the Unicode database, for the world.
        reward: a reward-model's artifact or an ensemble's, as the judge; it reads texts, in its own template.
        data: ``world``, records (.jsonl, .parquet or a folder of them), all of which are asked; or a YAML with the data
            section of a PPO stage, or that section itself, of which `split` is asked.
        prompts: how many at most.

    Returns:
        Plain JSON: what was compared and how; ``win``, ``score``, ``length``, ``kl`` of b to a (None where they read
        other tokens or pixels); ``rows``, a dict a prompt, those with different answers first.

    Raises:
        InputError: no such artifact, data or judge, nobody to judge, no prompt that both can be asked, or pictures for
            what reads text alone.
        RunError: the judge raises, or says something other than one finite number a prompt.
    """
    distributed.setup()
    opened = [artifact.open(path, "chat-model") for path in (a, b)]
    config, split = data_of(data, split)
    referee = referee_of(judge, reward, config)
    asking = {"most": prompts, "seed": seed, "max_new_tokens": max_new_tokens, "greedy": greedy}
    sides = sides_of(opened, config, split, {**asking, "temperature": temperature, "precision": "fp32", "rows": ROWS})
    records = sides[0].questions.records()
    batches = [side.questions.put_to(side.model) for side in sides]
    texts = [decode(side.questions.tokenizer, batch) for side, batch in zip(sides, batches, strict=True)]
    verdict = referee(records, texts, batches)
    clusters = [r["codepoint"] for r in records] if all("codepoint" in r for r in records) else None
    lengths = [[len(text) for text in side] for side in texts]
    return {
        **{name: about(side.artifact) for name, side in zip("ab", sides, strict=True)},
        "judge": judge or (f"reward model {reward}" if reward else "gold score of the Unicode database"),
        "data": data,
        "split": split,
        **asking,
        "temperature": 0.0 if greedy else temperature,
        "n": len(records),
        "unit": "prompts" if clusters is None else "characters",
        "units": len(records if clusters is None else set(clusters)),
        "win": win_rate(verdict.preference, clusters),
        "consistent": verdict.consistent,
        "score": mean_difference(*verdict.scores, clusters) if verdict.scores else None,
        "length": by_length(verdict.preference, lengths[0], lengths[1], clusters),
        "kl": kl_of(sides, batches),
        "rows": rows(records, texts, verdict),
    }


# ---------------------------------------------------------------------------------------------------------- prompts


def data_of(data: str, split: Split) -> tuple[PromptsConfig, Split]:
    """Where the prompts stand; records that are named themselves are all asked, whichever split would have them."""
    if data == "world":
        return PromptsConfig(source="world"), split
    if data.endswith((".yaml", ".yml")):
        tree = configs.read(data)
        return configs.load(PromptsConfig, tree.child(("data",)) if "data" in tree.data else tree), split
    if not (Path(data).is_dir() or data.endswith(RECORD_SUFFIXES)):
        raise InputError(f"--data {data}: expected world, a YAML, or records ({', '.join(RECORD_SUFFIXES)})")
    return PromptsConfig(source="files", path=data, validation_fraction=0.0, test_fraction=0.0), "train"


def sides_of(opened: list[Artifact], config: PromptsConfig, split: Split, asking: dict) -> list[Side]:
    """Both models with the prompts that both can be asked, in one order, each in its own template and tokens."""
    found = prompt_records(config, split)
    pictures = [pictures_of(one, config, found) for one in opened]
    models = [language.read(one).eval().to(distributed.device()) for one in opened]
    tokenizers = [language.read_tokenizer(one) for one in opened]
    rooms = [language.positions(m.config) - asking["max_new_tokens"] for m in models]
    if min(rooms) < 2:
        small = opened[rooms.index(min(rooms))].path
        raise InputError(f"max_new_tokens {asking['max_new_tokens']} leaves no room for a prompt in {small}; lower it")

    def read(side: int, records: list[dict]) -> Prompts:
        form = {"template": opened[side].preprocessing.get("template", config.template), "overlong": config.overlong}
        length = min(config.max_length, rooms[side])
        return Prompts(records, tokenizers[side], split=split, max_length=length, pictures=pictures[side], **form)

    known = [{id(record) for record in read(side, found).records} for side in (0, 1)]
    common = [record for record in found if all(id(record) in ids for ids in known)]
    if not common:
        raise InputError(f"no prompt can be asked of both {opened[0].path} and {opened[1].path}: see data.max_length")
    return [
        Side(opened[side], models[side], Questions(read(side, common), tokenizers[side], **asking)) for side in (0, 1)
    ]


def pictures_of(one: Artifact, config: PromptsConfig, records: list[dict]) -> Pictured | None:
    """What prompts show a model beside their words, by the model's own processor; None: there are no pictures.

    Raises:
        InputError: there are pictures, and the model has no processor.
    """
    if config.image is None:
        return None
    processor = language.read_processor(one.path)
    if processor is None:
        raise InputError(f"data.image is {config.image}, but {one.path} has no processor: it reads text alone")
    return Pictured(processor, config.image, config.folder(), records)


# ------------------------------------------------------------------------------------------------------------ judges

Referee = Callable[[list[dict], list[list[str]], list[Batch]], Verdict]


def referee_of(judge: str | None, reward: str | Path | None, config: PromptsConfig) -> Referee:
    """Who judges: a function, a reward model, or the Unicode database, which knows the world."""
    if judge is not None and reward is not None:
        raise InputError("--judge and --reward: one of them judges; give one")
    if judge is not None:
        function: Any = callable_of(judge, "--judge")
        if arguments(function) == 3:
            return lambda records, texts, batches: compared(function, judge, records, *texts)
        return scored(FunctionScorer(function, judge), judge)
    if reward is not None:
        model = artifact.open(reward, reward_model.KINDS)
        if config.image is not None:
            raise InputError(
                f"data.image is {config.image}, but the reward model {reward} reads text alone; give --judge "
                "module:function, which sees the records"
            )
        return scored(scorers.of_texts(model, "fp32"), str(reward))
    if config.source == "world":
        return scored(FunctionScorer(world_gold, "world.gold"), "world.gold")
    raise InputError("nobody judges: give --judge module:function or --reward ARTIFACT (the world judges itself)")


def arguments(function: Callable) -> int:
    """How many positional arguments a function needs."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not say
        return 2
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in known)


def scored(score: Scorer, name: str) -> Referee:
    """The verdict of a judge that scores answers one by one."""

    def verdict(records: list[dict], texts: list[list[str]], batches: list[Batch]) -> Verdict:
        first, second = (
            asked(score, name, records, answers, batch).double().numpy()
            for answers, batch in zip(texts, batches, strict=True)
        )
        return Verdict(np.sign(second - first), (first, second), None)

    return verdict


def compared(judge: Pairwise, name: str, records: list[dict], first: list[str], second: list[str]) -> Verdict:
    """The verdict of a judge that compares, asked in either order."""
    straight = preferences(asked(judge, name, records, first, second), name, len(records))
    swapped = -preferences(asked(judge, name, records, second, first), name, len(records))
    consistent = float((np.sign(straight) == np.sign(swapped)).mean())
    return Verdict((straight + swapped) / 2, None, consistent)


def asked(judge: Callable, name: str, *given: Any) -> Any:
    """What the judge says; whatever goes wrong in it is told as its fault."""
    try:
        return judge(*given)
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"the judge {name} raised {type(error).__name__}: {error}") from error


def preferences(said: Any, name: str, n: int) -> np.ndarray:
    """(N,) numbers in [-1, 1], or an error that says what they are instead."""
    try:
        found = np.asarray(said, np.float64)
    except (TypeError, ValueError):
        raise RunError(f"the judge {name} gave {type(said).__name__}; expected {n} numbers in [-1, 1]") from None
    if found.shape != (n,):
        raise RunError(f"the judge {name} gave numbers of shape {found.shape} for {n} prompts; give one each")
    wrong = ~((found >= -1) & (found <= 1))  # NaN too
    if wrong.any():
        raise RunError(
            f"the judge {name} gave {found[wrong][0]:g} for prompt {int(wrong.argmax())}; expected a preference in "
            "[-1, 1], 1 where the second answer is better (2 p - 1 of a probability p)"
        )
    return found


# ------------------------------------------------------------------------------------------------------------ result


def kl_of(sides: list[Side], batches: list[Batch]) -> float | None:
    """KL(b || a) in nats an answer, on b's answers; None where the two do not read the same."""
    a, b = sides
    if not alike(sides, batches):
        return None
    longest = int(batches[1]["response_mask"].sum(dim=1).max())
    rows = max(1, LOGITS // (longest * vocabulary(b.model)))
    return float(np.mean(b.questions._replace(rows=min(ROWS, rows)).kl(b.model, a.model, batches[1])))


def alike(sides: list[Side], batches: list[Batch]) -> bool:
    """Do both read prompts as the same ids of one vocabulary, and pictures as the same pixels?"""
    a, b = sides
    try:
        artifact.same_tokenizer(a.artifact, b.artifact)
    except InputError:
        return False
    if vocabulary(a.model) != vocabulary(b.model) or a.questions.prompts.ids != b.questions.prompts.ids:
        return False
    first, second = (inputs_of(batch) for batch in batches)
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def vocabulary(model: Any) -> int:
    """How many logits it has a token."""
    return model.config.get_text_config().vocab_size


def about(opened: Artifact) -> dict[str, Any]:
    return {"path": str(opened.path), "name": opened.name, "stage": opened.stage, "digest": opened.digest}


def rows(records: list[dict], texts: list[list[str]], verdict: Verdict) -> list[dict[str, Any]]:
    """A prompt, both answers, the preference, and both scores where there are such; different answers first."""
    found = []
    for n, record in enumerate(records):
        row = {"prompt": record["prompt"][-1]["content"], "a": texts[0][n], "b": texts[1][n]}
        row |= {"preference": float(verdict.preference[n])}
        if verdict.scores is not None:
            row |= {"score a": float(verdict.scores[0][n]), "score b": float(verdict.scores[1][n])}
        found.append(row)
    return sorted(found, key=lambda row: row["a"] == row["b"])
