"""DPO, KTO, GRPO and RLOO, trained by TRL (https://github.com/huggingface/trl), as a stage like any other.

    python -m align.trl configs/align/trl_dpo_world.yaml

Ours are the config, the data and its token ids, the optimiser and its schedule, the record of the run, the figures and
the artifact; TRL's are the losses, the rollouts and the loop (``align/trl_loop.py``). The ids are handed over as they
are: TRL neither renders nor tokenises anything. What its loop cannot do (resume, ranks, padding) stands in docs/trl.md.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import PositiveFloat, PositiveInt, model_validator

from align import examples, held_out, judge, scorers, trl_loop
from align.actors import Trainable, choose_trainable
from align.examples import Examples, ExamplesConfig
from align.implicit import Implicit
from align.rollout import joined
from align.scorers import Ensemble, Part, Scorer
from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, bookkeeping, hardware, parent, resolve
from fledge.data import chats, preferences
from fledge.data.preferences import Preferences
from fledge.data.prompts import Prompts, read_prompts
from fledge.data.records import Split
from fledge.errors import RunError
from fledge.evals.score import Score
from fledge.models import adapters, language, reward_model
from fledge.models.adapters import LoRAConfig
from fledge.optim import OptimConfig
from fledge.track import Run, TrackConfig

WRITES = "chat-model"


class Parents(BaseConfig):
    policy: str | None = parent("chat-model", required=True)
    """Policy to start from; it is the reference, too."""
    reward: str | None = parent(*reward_model.KINDS, required=False)
    """Reward model, or an ensemble of them, of grpo and rloo where ``reward`` names no function; for dpo and kto it
    only judges."""
    reward_2: str | None = parent(*reward_model.KINDS, required=False)
    """Another one, for ``rewards``."""
    reward_3: str | None = parent(*reward_model.KINDS, required=False)
    """A third one."""


class Optim(OptimConfig):
    """Zephyr's (Hugging Face's alignment handbook): AdamW without decay, cosine, a tenth of warm-up, clipped at 1."""

    lr: float = 5e-7
    weight_decay: float = 0.0
    clip: float | None = 1.0
    warmup: Duration = "0.1 epochs"


class Train(BaseConfig):
    """What TRL's loop is told. Defaults: Zephyr's."""

    batch: PositiveInt = 128
    """What a step learns from, over all ranks: pairs of dpo, answers of the others."""
    steps: Duration = "1 epoch"
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast of the forward; parameters stay in fp32."""
    micro_batch: PositiveInt | None = None
    """Rows of one forward on one rank, which must divide its share; null: the whole share."""
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    grad_checkpointing: bool = hardware(False)
    """Recompute each block's activations in the backward."""
    log_every: PositiveInt = bookkeeping(1)


class Evaluation(BaseConfig):
    """Held-out pairs, and answers to held-out prompts before and after, judged."""

    split: Literal["validation", "test"] = "test"
    pairs: PositiveInt = 1024
    """Of dpo and kto: how many prompts with their answers, or labelled answers, at most."""
    prompts: PositiveInt = 512
    """To be answered, at most."""
    max_new_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    greedy: bool = False
    """Judge the most probable answers; off: sampled ones. The same for both policies."""


class Config(StageConfig):
    """A trainer of TRL; the defaults are Zephyr's DPO (alignment handbook, full), but for its beta, an argument."""

    stage: Literal["align.trl"] = "align.trl"
    trainer: Literal["dpo", "kto", "grpo", "rloo"] = "dpo"
    parents: Parents = Parents()
    data: ExamplesConfig = ExamplesConfig()
    reward: str | None = None
    """grpo, rloo: ``module:function``, called with the prompts' records and the responses; null: the parent."""
    rewards: list[Part] | None = None
    """In its place, a weighted sum of functions and parent reward models, each part logged."""
    ensemble: Ensemble | None = None
    """How the members of an ensemble make one score; null: their mean."""
    judge: str | None = None
    """``module:function`` of the same form that judges before and after; null: the Unicode database for the world,
    else the reward."""
    arguments: dict[str, Any] = {}
    """Of TRL's own config class (DPOConfig, KTOConfig, GRPOConfig, RLOOConfig), beside what the sections here say."""
    trainable: Trainable | None = None
    """Learn only the policy's parameters whose names hold this regular expression, such as ``norm``; null: all."""
    lora: LoRAConfig | None = None
    """Learn adapters beside the frozen policy; null: none."""
    optim: Optim = Optim()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    track: TrackConfig = TrackConfig()

    @property
    def rolls_out(self) -> bool:
        """Does it learn from a reward of its own answers, or from given answers?"""
        return self.trainer in ("grpo", "rloo")

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        scorers.check(self.reward, self.rewards)
        if not self.rolls_out and (self.reward is not None or self.rewards is not None):
            raise ValueError(f"grpo and rloo learn from reward or rewards; {self.trainer} learns from preferences")
        if self.data.label is not None and (self.trainer != "kto" or self.data.source == "world"):
            raise ValueError("data.label is for trainer: kto with data.source: files")
        if self.trainable is not None and self.lora is not None:
            raise ValueError(
                "trainable chooses parameters of the policy, all of which lora freezes; use one of the two"
            )
        if self.data.margin is not None:
            raise ValueError("data.margin: TRL's losses know no margins of records; align.reward's does")
        return self


# ---------------------------------------------------------------------------------------------------------------- data


def read_examples(config: Config, tokens: Any, split: Split) -> Examples:
    """The given answers of a split that dpo or kto learn from."""
    if config.data.label is not None:
        return examples.labelled(config.data, tokens, split)
    given = examples.pairs(Preferences(config.data, tokens, split))
    return given if config.trainer == "dpo" else examples.both_sides(given)


def prompts_of(config: Config, tokens: Any, split: Split, room: int) -> Prompts:
    """The prompts of a split, each once, of at most ``room`` tokens."""
    data = config.data.model_copy(update={"max_length": min(config.data.max_length, room)})
    if config.rolls_out or data.source == "world" or data.label is not None:
        return read_prompts(data, tokens, split)  # type: ignore[arg-type]  # it has all fields of a PromptsConfig
    return preferences.prompts(data, tokens, split)


# -------------------------------------------------------------------------------------------------------------- reward


def build_scorer(config: Config, parents: dict[str, Artifact]) -> Scorer | None:
    """The reward that grpo and rloo learn from, and that judges where nothing else does; None: dpo and kto have none.

    Raises:
        InputError: grpo or rloo have nothing to learn from, a reward model has another tokenizer than the policy, or a
            parent was trained in another template.
    """
    for role in set(parents) & set(get_args(scorers.Role)):
        artifact.same_tokenizer(parents["policy"], parents[role])
    for at in parents.values():
        artifact.same_template(at, config.data.template)
    if not config.rolls_out and "reward" not in parents:
        return None
    return scorers.build(
        config.reward, config.rewards, config.ensemble, parents, config.train.precision, config.train.micro_batch
    )


def reward_function(scorer: Scorer, prompts: Prompts) -> Callable[..., list[float]]:
    """A scorer in the form that TRL calls; ``row`` is our own column. TRL would leave out what is not a number."""

    def reward(
        completions: list[str],
        completion_ids: list[list[int]],
        row: list[int],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        answers = chats.pad(completion_ids, prompts.pad_id, "right")
        batch = joined([prompts.ids[i] for i in row], answers, prompts.pad_id)
        figures = scorer.figures([prompts.records[i] for i in row], completions, batch)
        score = figures.pop("score")
        for i in (~score.isfinite()).nonzero():
            raise RunError(f"the reward is {score[i].item()} for the response {completions[i]!r}")
        for name, values in figures.items():
            log_metric(name, values.mean().item())
        return score.tolist()

    return reward


def build_judge(config: Config, scorer: Scorer | None) -> judge.Judge | None:
    """What scores held-out answers; None: nothing is there that could."""
    if config.judge is None and config.data.source != "world" and scorer is None:
        return None
    found = judge.build(config.judge, config.data, scorer)  # type: ignore[arg-type]  # None is not looked at then
    return found if config.rolls_out else found._replace(unseen=True)


# --------------------------------------------------------------------------------------------------------------- stage


def agreement(config: Config, tokens: Any) -> Callable[[Implicit], Score]:
    """How the implicit reward of dpo and kto is measured: on held-out answers, which are read at once."""
    asked = config.evaluation
    if config.data.label is not None:
        found = examples.labelled(config.data, tokens, asked.split).shuffled(0)
        some = found.at(list(range(min(len(found), asked.pairs))))
        return lambda implicit: implicit.on_labelled(some)
    sample = held_out.sample(Preferences(config.data, tokens, asked.split), asked.pairs)
    return lambda implicit: implicit.on_pairs(sample)


def questions(config: Config, tokens: Any, policy: Any) -> judge.Questions:
    """Held-out prompts that leave room for an answer, and how both policies are asked them."""
    asked = config.evaluation
    room = language.positions(policy.config) - asked.max_new_tokens
    return judge.Questions(
        prompts=prompts_of(config, tokens, asked.split, room),
        tokenizer=tokens,
        most=asked.prompts,
        seed=config.seed,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        greedy=asked.greedy,
        precision=config.train.precision,
        rows=config.train.micro_batch or 128,
    )


def check_lengths(config: Config, args: Any, policy: Any) -> None:
    """Refuse prompts and answers that the policy has no positions for."""
    language.check_length(policy, config.evaluation.max_new_tokens + 2, "a prompt + evaluation.max_new_tokens")
    if not config.rolls_out:
        language.check_length(policy, config.data.max_length, "data.max_length")
        return
    longest = config.data.max_length + args.max_completion_length
    language.check_length(policy, longest, "data.max_length + arguments.max_completion_length")


def finished(model: Any, parent: Artifact, lora: bool) -> Any:
    """What was learned in a model of its own, free of what TRL put into the one that it trained."""
    learned = adapters.merged(model.get_base_model()) if lora else model
    policy = language.read(parent)
    policy.load_state_dict(learned.state_dict())
    return policy.to(distributed.device())


def main(config: Config) -> Artifact:
    """Let TRL train, measure held-out pairs and answers before and after, and hand the policy over."""
    device = distributed.setup(config.train.device)
    trl_loop.arguments(config)
    trl_loop.share(config)
    parents = artifact.open_parents(config)
    scorer = build_scorer(config, parents)
    referee = build_judge(config, scorer)
    with Run.open(config, parents) as run, distributed.lent("bf16" if config.train.precision == "bf16" else "no"):
        run.truncate(0)  # what an interrupted run left begins anew
        tokens, policy = language.read_tokenizer(parents["policy"]), language.read(parents["policy"])
        choose_trainable(policy, config.trainable)
        args = trl_loop.told(config, run.dir)
        check_lengths(config, args, policy)
        ids, reward, measure = {}, None, None
        if scorer is not None and config.rolls_out:
            prompts = prompts_of(config, tokens, "train", config.data.max_length)
            found = examples.of_prompts(prompts, tokens, config.data.template)
            ids = dict(zip(found.columns["prompt"], prompts.ids, strict=True))
            reward = reward_function(scorer, prompts)
        else:
            found, measure = read_examples(config, tokens, "train"), agreement(config, tokens)
        run.say(found.report)
        asked = questions(config, tokens, policy) if referee is not None else None
        if referee is not None and asked is not None:
            judge.try_out(referee, policy.to(device), asked)
        per_epoch = trl_loop.steps_of_epoch(config, args, found)
        steps = resolve(config.train.steps, per_epoch)
        own = language.read_tokenizer(parents["policy"])  # TRL gives it a padding token where it has none
        trainer = trl_loop.build(config, args, policy, own, found, ids, reward)
        model = trl_loop.train(config, trainer, run, steps, per_epoch)
        policy = finished(model, parents["policy"], config.lora is not None)

        reference, scores, kl = language.read(parents["policy"]).to(device), [], {}
        if measure is not None:
            rows = config.train.micro_batch or 64
            scores.append(measure(Implicit(policy, reference, config.train.precision, rows)))
        if referee is not None and asked is not None:
            judged, table, kl["kl"] = judge.compare(referee, reference, policy, asked)
            scores += judged
            run.samples("answers", table, "Held-out prompts, answered before and after")

        def save(folder: Path) -> None:
            language.save(policy, tokens, folder)
            if config.lora is not None:
                adapters.save(model.get_base_model(), folder / adapters.FOLDER)

        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(policy).__name__, "parameters": language.size(policy)},
            preprocessing={**parents["policy"].preprocessing, "template": config.data.template},
            data={"fingerprint": config.data.fingerprint(), "trl": version("trl"), **found.counts},
            step=steps,
            **kl,
        )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
