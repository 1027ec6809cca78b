"""Proximal policy optimisation from a reward (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    python -m align.ppo configs/align/ppo_world.yaml

An iteration: answer ``rollout.batch`` prompts with the live policy; score the answers; subtract the KL to the reference
token by token; estimate advantages; then pass over them ``num_ppo_epochs`` times in minibatches of ``train.batch``.
The rollout is a data source: ``align/rollouts.py`` is the algorithm, the loop is the one of every method.

B rows, P prompt positions (padded on the left), T response positions (padded on the right). In every mask 1 is real.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from align import actors, judge, ptx, rlhf, scorers
from align.actors import Trainable, Value
from align.ptx import Pretraining
from align.rollout import (
    ValueModel,
    closed_up,
    response_logprobs,
    said,
    spread,
    token_logits,
    trim,
)
from align.rollouts import KL, Rollout, Rollouts
from align.scorers import Ensemble, Part
from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, parent, resolve
from fledge.data.prompts import PromptsConfig, read_prompts
from fledge.data.records import Split
from fledge.ema import Average
from fledge.errors import InputError
from fledge.models import adapters, language, reward_model
from fledge.models.adapters import LoRAConfig
from fledge.optim import OptimConfig, adamw
from fledge.stream import Batch, derive, share
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "chat-model"
Watch = Callable[[int], dict[str, float]]


class Parents(BaseConfig):
    policy: str | None = parent("chat-model", required=True)
    """Policy to start from; a frozen copy of it is the reference."""
    reward: str | None = parent(*reward_model.KINDS, required=False)
    """Reward model, or an ensemble of them; not needed where ``reward`` names a function."""
    reward_2: str | None = parent(*reward_model.KINDS, required=False)
    """Another one, for ``rewards``."""
    reward_3: str | None = parent(*reward_model.KINDS, required=False)
    """A third one."""
    judge: str | None = parent("reward-model", required=False)
    """One that judges before and after and that PPO never sees; its tokenizer may be another."""


class Algorithm(BaseConfig):
    """PPO itself. Defaults: Huang et al. 2024, which are Ziegler et al. 2019's; only ``reward_at`` departs."""

    num_ppo_epochs: PositiveInt = 4
    cliprange: PositiveFloat = 0.2
    cliprange_value: PositiveFloat | None = 0.2
    vf_coef: float = Field(0.1, ge=0)
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation, keeping their mean (on in Ziegler et al.)."""
    unbiased_whitening: bool = False
    """Variances over n - 1, as TRL and verl have it; off: over n, as the papers' code has it."""
    reward_at: rlhf.RewardAt = "last_token"
    """Where the score stands. after_eos: one position late, as Huang et al. and TRL 1.12 have it."""
    target_kl: PositiveFloat | None = None
    """An early stop: once the mean ``approxkl`` of an update is beyond this, the policy has left the one that answered
    too far behind, and the updates that remain of the iteration are skipped, though counted (Spinning Up and
    Stable-Baselines3: 1.5 times .01, looked at before the update; here, as in CleanRL, the update is made)."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Momentum of the policy's average over updates, which is then judged and handed over in its place (InstructGPT:
    .992); answers come from the policy itself."""


class Optim(OptimConfig):
    """Huang et al. 2024: AdamW with eps 1e-5 and torch's weight decay on everything, linear to 0, no clipping."""

    lr: float = 3e-6
    eps: float = 1e-5
    weight_decay: float = 0.01
    decay: Literal["cosine", "linear", "constant"] = "linear"


class Train(TrainConfig):
    """1M answers in rollouts of 512, four epochs of one minibatch each."""

    batch: PositiveInt = 512
    steps: Duration = 1_000_000 // 512 * 4


class Evaluation(BaseConfig):
    """Answers to held-out prompts before and after, judged."""

    split: Literal["validation", "test"] = "test"
    prompts: PositiveInt = 512
    """How many at most."""
    greedy: bool = False
    """Judge the most probable answers; off: sampled ones, as in the rollouts. The same for both policies."""


class Config(StageConfig):
    """PPO; the defaults are Huang et al. 2024's TL;DR recipe ("N+ implementation details"), ``reward_at`` aside."""

    stage: Literal["align.ppo"] = "align.ppo"
    parents: Parents = Parents()
    data: PromptsConfig = PromptsConfig()
    reward: str | None = None
    """``module:function``, called with the prompts' records and the responses; None: the parent reward model."""
    rewards: list[Part] | None = None
    """In its place, a weighted sum of functions and parent reward models, each part logged."""
    ensemble: Ensemble | None = None
    """How the members of an ensemble make one score; null: their mean."""
    judge: str | None = None
    """``module:function`` of the same form that judges before and after and that PPO never sees; None: the parent
    judge, else the Unicode database for the world, else the reward itself."""
    trainable: Trainable | None = None
    """Learn only the policy's parameters whose names hold this regular expression, such as ``norm``; None: all. An
    answer teaches a few bits, and what it teaches millions of parameters is mostly noise; few answers, few parameters
    (Zhao et al. 2023, https://arxiv.org/abs/2312.11420, tune the gains of the norms alone)."""
    lora: LoRAConfig | None = None
    """Policy and value learn adapters on one frozen trunk, which is the reference too; null: each is a model."""
    rollout: Rollout = Rollout()
    kl: KL = KL()
    ppo: Algorithm = Algorithm()
    ptx: Pretraining | None = None
    """Pretraining text beside PPO (InstructGPT's PPO-ptx); None: none."""
    value: Value = Value()
    optim: Optim = Optim()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Config":
        if self.rollout.batch % self.train.batch:
            raise ValueError(f"rollout.batch {self.rollout.batch} is not a multiple of train.batch {self.train.batch}")
        if self.train.engine == "fsdp2":
            raise ValueError(
                "train.engine: fsdp2 deals parameters out, and PPO generates with the whole policy on every process; "
                "use train.engine: ddp"
            )
        if self.judge is not None and self.parents.judge is not None:
            raise ValueError("judge and parents.judge are both given; one of them judges")
        scorers.check(self.reward, self.rewards)
        given = [role for role in get_args(scorers.Role) if getattr(self.parents, role) is not None]
        if idle := sorted(set(given) - self._used()):
            raise ValueError(f"parents.{idle[0]} is given, but neither rewards nor value.init use it; leave it out")
        if self.data.image is not None:
            given += ["judge"] if self.parents.judge is not None else []
            if given:
                raise ValueError(f"data.image: parents.{given[0]} reads text alone; give functions in its place")
        if self.lora is not None:
            self._adapters_agree(self.lora)
        if self.value.init == "policy" and self.value.head == "reward":
            raise ValueError("value.head is reward, but value.init is policy; use zero or normal")
        return self

    def _used(self) -> set[str]:
        """The parent reward models that score answers or begin as the value."""
        alone = self.reward is None and self.rewards is None
        parts = {str(part.model) for part in self.rewards or [] if part.model is not None}
        return parts | ({"reward"} if alone or self.value.init == "reward" else set())

    def _adapters_agree(self, lora: LoRAConfig) -> None:
        if self.trainable is not None:
            raise ValueError(
                "trainable chooses parameters of the policy, all of which lora freezes; use one of the two"
            )
        if self.value.init == "reward":
            raise ValueError(
                "with lora the value is an adapter on the policy's trunk, but value.init is reward; use value.init: "
                "policy with head: zero, or leave lora out"
            )
        if lora.dropout:
            raise ValueError(f"lora.dropout is {lora.dropout}, but PPO's policy learns as it answers: without; use 0.0")


# -------------------------------------------------------------------------------------------------------- objective


class PPO(nn.Module):
    """Clipped policy and value losses on rows of a rollout. Policy and value run without dropout, always.

    A batch: ``input_ids``, ``attention_mask`` (B, P + T); ``response_mask``, ``reward_mask``, ``old_logprobs``,
    ``old_values``, ``advantages``, ``returns`` (B, T); ``inputs.NAME`` and ``ptx_*`` (B, …) where there are pictures or
    text; and figures of the rollout, (B,), whose names hold a "/": they are averaged and logged as they are.
    """

    def __init__(
        self,
        policy: nn.Module,
        value: ValueModel,
        config: Algorithm,
        temperature: float,
        ptx_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.value, self.config, self.temperature = policy, value, config, temperature
        self.weights = {"policy_loss": 1.0, "value_loss": config.vf_coef} | ({"ptx_loss": ptx_coef} if ptx_coef else {})
        learned = adapters.parameters(policy, actors.POLICY) or None  # on one trunk, not the value's
        self.average = Average(policy, config.ema, learned) if config.ema else None
        self.train()

    def train(self, mode: bool = True) -> "PPO":
        """Stay in eval mode: dropout would make the policy that answers another one than the policy that learns."""
        return super().train(False)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Response tokens; rows for the rollout's figures."""
        tokens, valued = int(batch["response_mask"].sum()), int(batch["reward_mask"].sum())
        names = ("policy_loss", "clipfrac", "approxkl", "ratio", "entropy")
        rows = {name: len(x) for name, x in batch.items() if "/" in name}
        text = {"ptx_loss": ptx.tokens(batch)} if "ptx_loss" in self.weights else {}
        return dict.fromkeys(names, tokens) | {"value_loss": valued} | text | rows

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        text = int((batch["ptx_document"] > 0).sum()) if "ptx_loss" in self.weights else 0
        return int(batch["attention_mask"].sum()) + text

    def constant(self) -> list[nn.Parameter]:
        """The trunk under adapters, which nothing changes."""
        return adapters.frozen(self.policy) if adapters.names(self.policy) else []

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        batch, config = trim(batch), self.config
        mask = batch["response_mask"]
        everything = rlhf.log_probabilities(token_logits(self.policy, batch), self.temperature)  # (N, V)
        logprobs = spread(rlhf.at(everything, said(batch)), mask)  # (B, T)
        values = self.values(batch)  # (B, T)
        policy = rlhf.policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, config.cliprange)
        value_loss = rlhf.value_loss(
            values, batch["old_values"], batch["returns"], batch["reward_mask"], config.cliprange_value
        )
        with torch.no_grad():
            entropy = rlhf.entropy_of(everything).sum()
        figures = {name: x.sum() for name, x in batch.items() if "/" in name}
        text = {"ptx_loss": ptx.loss(self.policy, batch)} if "ptx_loss" in self.weights else {}
        return (
            {
                "policy_loss": policy.loss,
                "value_loss": value_loss,
                "clipfrac": policy.clipfrac,
                "approxkl": policy.approxkl,
                "ratio": policy.ratio,
                "entropy": entropy,
            }
            | text
            | figures
        )

    def after_step(self, step: int, means: dict[str, Tensor]) -> None:
        """Move the average."""
        if self.average is not None:
            self.average.update(self.policy)

    def handed_over(self) -> contextlib.AbstractContextManager:
        """In here the policy is what is judged and handed over: its average, where there is one."""
        return self.average.in_place_of(self.policy) if self.average is not None else contextlib.nullcontext()

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the response tokens under ``model``, the policy or the reference. (B, T)"""
        return response_logprobs(model, batch, self.temperature)

    def values(self, batch: Batch) -> Tensor:
        """The value before each response token. (B, T)"""
        mask = batch.get("reward_mask", batch["response_mask"])
        rows = closed_up(batch, mask)
        return spread(self.value(**rows.inputs)[rows.before], mask)


# ------------------------------------------------------------------------------------------------------------- stage


def check(config: Config, policy: Any, tokenizer: Any, parents: dict[str, Artifact]) -> None:
    """Refuse what cannot be, before anything is trained.

    Raises:
        InputError: rows are longer than a parent has positions; a parent was trained in another template; fewer rows
            than processes; no token ends an answer; the judge is a reward that is trained on.
    """
    wanted = config.data.max_length + config.rollout.max_new_tokens
    for role, at in parents.items():
        if role == "judge":  # reads texts in its own template, and shortens what is too long for it
            continue
        artifact.same_template(at, config.data.template)
        room = positions(at)
        if wanted > room:
            raise InputError(
                f"data.max_length {config.data.max_length} + rollout.max_new_tokens {config.rollout.max_new_tokens} = "
                f"{wanted} tokens, but {at.path} has {room} positions; lower one of them"
            )
    if config.ptx is not None:
        language.check_length(policy, config.ptx.data.seq_len, "ptx.data.seq_len")
    if config.rollout.missing_eos_penalty is not None and tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer of {parents['policy'].path} has no end-of-sequence token: no answer ends itself, "
            "and all would be penalised; set rollout.missing_eos_penalty: null"
        )
    share(config.train.batch, 0, distributed.world_size(), config.train.most_rows)
    apart = parents.get("judge")
    if apart and (same := [role for role, at in parents.items() if role != "judge" and at.digest == apart.digest]):
        raise InputError(f"parents.judge is parents.{same[0]}, which PPO is trained on; give another reward model")


def positions(at: Artifact) -> int:
    """How many tokens all language models of an artifact read."""
    from transformers import AutoConfig

    folders = [member.path for member in reward_model.members(at)]
    return min(language.positions(AutoConfig.from_pretrained(folder, local_files_only=True)) for folder in folders)


def handed_over(objective: PPO, watch: Watch) -> Watch:
    """An evaluation of what would be handed over now."""

    def measure(step: int) -> dict[str, float]:
        with objective.handed_over():
            return watch(step)

    return measure


def main(config: Config) -> Artifact:
    """Roll out, improve, judge held-out answers before and after, and hand the policy over."""
    device = distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    for role in set(parents) & set(get_args(scorers.Role)):
        artifact.same_tokenizer(parents["policy"], parents[role])
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["policy"])
        processor = language.read_processor(parents["policy"].path)
        policy = language.read(parents["policy"])
        check(config, policy, tokens, parents)
        prompts = read_prompts(config.data, tokens, "train", processor)
        run.say(prompts.report())
        scorer = scorers.build(
            config.reward, config.rewards, config.ensemble, parents, config.train.precision, config.train.most_rows
        )
        referee = judge.build(config.judge, config.data, scorer, parents.get("judge"), config.train.precision)
        size = language.size(policy)
        torch.manual_seed(derive("init", config.seed))
        cast = actors.build(policy, parents, lora=config.lora, trainable=config.trainable, value=config.value)
        if prompts.pictures is not None:
            cast = actors.reached(cast, {"input_ids": torch.tensor(prompts.ids[:1]), **prompts.inputs([0])})
        reference = cast.reference.to(device)
        text = ptx.Text(config.ptx, tokens, config.seed) if config.ptx else None
        coef = config.ptx.coef if config.ptx else None
        objective = PPO(policy, cast.value, config.ppo, config.rollout.temperature, coef).to(device)
        stream = Rollouts(objective, reference, prompts, scorer, tokens, config, text)
        steps = resolve(config.train.steps, stream.steps_per_epoch)
        warmup = resolve(config.value.warmup, stream.steps_per_epoch)
        if warmup >= steps:
            raise InputError(f"value.warmup {warmup} leaves the policy none of the {steps} train.steps; lower it")
        groups = [
            {"params": cast.policy_parameters, "start_step": warmup},
            {"params": cast.value_parameters, "lr_scale": config.value.lr_scale},
        ]
        optim = adamw(groups, config.optim, batch=stream.batch, steps=steps, steps_per_epoch=stream.steps_per_epoch)

        def questions(split: Split) -> judge.Questions:
            return judge.Questions(
                prompts=read_prompts(config.data, tokens, split, processor),
                tokenizer=tokens,
                most=config.evaluation.prompts,
                seed=config.seed,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                greedy=config.evaluation.greedy,
                precision=config.train.precision,
                rows=config.train.most_rows or 128,
            )

        asked = questions(config.evaluation.split) if run.measures else None
        if asked is not None:
            judge.try_out(referee, reference, asked)
        watch = None
        if config.train.eval_every:
            watch = handed_over(objective, judge.watch(referee, scorer, policy, reference, questions("validation")))
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        with objective.handed_over():
            scores, kl = [], {}
            if asked is not None:
                scores, table, kl["kl"] = judge.compare(referee, reference, policy, asked)
                run.samples("answers", table, "Held-out prompts, answered before and after")
            return run.publish(
                WRITES,
                lambda folder: cast.save(processor or tokens, folder),
                scores,
                architecture={"name": type(policy).__name__, "parameters": size},
                preprocessing={**parents["policy"].preprocessing, "template": config.data.template},
                data={"fingerprint": config.data.fingerprint(), "prompts": len(prompts), "skipped": prompts.skipped},
                step=steps,
                **kl,
            )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
