"""Proximal policy optimisation from a reward (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022).

    python -m align.ppo configs/align/ppo_world.yaml

An iteration: answer ``rollout.batch`` prompts with the live policy; score the answers; subtract the KL to the reference
token by token; estimate advantages; then pass over them ``num_ppo_epochs`` times in minibatches of ``train.batch``.
The rollout is a data source: ``Rollouts`` is the algorithm, the loop is the one of every method.

B rows, P prompt positions (padded on the left), T response positions (padded on the right). In every mask 1 is real.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from align import actors, judge, rlhf
from align.actors import Value
from align.rollout import (
    FunctionScorer,
    ModelScorer,
    PromptsConfig,
    Scorer,
    ValueModel,
    answer,
    callable_of,
    decode,
    in_pieces,
    read_prompts,
    response_logits,
    responses,
    trim,
)
from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, hardware, parent, resolve
from fledge.data.chats import Prompts
from fledge.data.records import Split
from fledge.errors import InputError
from fledge.models import adapters, language
from fledge.models.adapters import LoRAConfig
from fledge.optim import OptimConfig, adamw
from fledge.stream import Batch, Permutation, cut, derive, rows_of
from fledge.track import Run, TrackConfig
from fledge.train import TrainConfig, fit

WRITES = "chat-model"


class Parents(BaseConfig):
    policy: str | None = parent("chat-model", required=True)
    """Policy to start from; a frozen copy of it is the reference."""
    reward: str | None = parent("reward-model", required=False)
    """Reward model; not needed where ``reward`` names a function."""


class Rollout(BaseConfig):
    """How answers come about. Defaults: Huang et al. 2024."""

    batch: PositiveInt = 512
    """Answers of one iteration, over all ranks; a multiple of ``train.batch``."""
    max_new_tokens: PositiveInt = 53
    temperature: PositiveFloat = 0.7
    """Of sampling, and therefore of every log-probability, the reference's too."""
    missing_eos_penalty: float | None = 1.0
    """For answers that do not end themselves: their score becomes minus this, or is lowered by it."""
    missing_eos: Literal["replace", "subtract"] = "replace"
    generate_batch: PositiveInt | None = hardware(None)
    """The most rows that are generated together on one rank; None: all of them."""


class KL(BaseConfig):
    """The price of leaving the reference. Defaults: fixed at .05, k1 (Huang et al. 2024)."""

    coef: float = Field(0.05, ge=0)
    estimator: rlhf.KLEstimator = "k1"
    target: PositiveFloat | None = None
    """If given, the coefficient is steered so that the KL of an answer becomes this (Ziegler et al.: 6, coef .15)."""
    horizon: PositiveFloat = 10_000
    """Of the controller, in answers."""


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
    judge: str | None = None
    """``module:function`` of the same form that judges before and after and that PPO never sees; None: the Unicode
    database for the world, else the reward itself."""
    trainable: str | None = None
    """Learn only the policy's parameters whose names hold this regular expression, such as ``norm``; None: all. An
    answer teaches a few bits, and what it teaches millions of parameters is mostly noise; few answers, few parameters
    (Zhao et al. 2023, https://arxiv.org/abs/2312.11420, tune the gains of the norms alone)."""
    lora: LoRAConfig | None = None
    """Policy and value learn adapters on one frozen trunk, which is the reference too; null: each is a model."""
    rollout: Rollout = Rollout()
    kl: KL = KL()
    ppo: Algorithm = Algorithm()
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
        if self.lora is not None:
            self._adapters_agree(self.lora)
        if self.value.init == "policy" and self.value.head == "reward":
            raise ValueError("value.head is reward, but value.init is policy; use zero or normal")
        try:
            re.compile(self.trainable or "")
        except re.error as error:
            raise ValueError(f"trainable {self.trainable!r} is no regular expression: {error}") from error
        return self

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
    ``old_values``, ``advantages``, ``returns`` (B, T); and figures of the rollout, (B,), whose names hold a "/": they
    are averaged and logged as they are.
    """

    def __init__(self, policy: nn.Module, value: ValueModel, config: Algorithm, temperature: float) -> None:
        super().__init__()
        self.policy, self.value, self.config, self.temperature = policy, value, config, temperature
        self.weights = {"policy_loss": 1.0, "value_loss": config.vf_coef}
        self.train()

    def train(self, mode: bool = True) -> "PPO":
        """Stay in eval mode: dropout would make the policy that answers another one than the policy that learns."""
        return super().train(False)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Response tokens; rows for the rollout's figures."""
        tokens, valued = int(batch["response_mask"].sum()), int(batch["reward_mask"].sum())
        names = ("policy_loss", "clipfrac", "approxkl", "ratio", "entropy")
        rows = {name: len(x) for name, x in batch.items() if "/" in name}
        return dict.fromkeys(names, tokens) | {"value_loss": valued} | rows

    def tokens(self, batch: Batch) -> int:
        """Tokens that are not padding."""
        return int(batch["attention_mask"].sum())

    def constant(self) -> list[nn.Parameter]:
        """The trunk under adapters, which nothing changes."""
        return adapters.frozen(self.policy) if adapters.names(self.policy) else []

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        batch, config = trim(batch), self.config
        mask = batch["response_mask"]
        logits = response_logits(self.policy, batch)  # (B, T, V)
        logprobs = rlhf.token_logprobs(logits, responses(batch), self.temperature)  # (B, T)
        values = self.values(batch)  # (B, T)
        policy = rlhf.policy_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, config.cliprange)
        value_loss = rlhf.value_loss(
            values, batch["old_values"], batch["returns"], batch["reward_mask"], config.cliprange_value
        )
        with torch.no_grad():
            entropy = rlhf.masked_sum(rlhf.entropy(logits.detach(), self.temperature), mask)
        figures = {name: x.sum() for name, x in batch.items() if "/" in name}
        return {
            "policy_loss": policy.loss,
            "value_loss": value_loss,
            "clipfrac": policy.clipfrac,
            "approxkl": policy.approxkl,
            "ratio": policy.ratio,
            "entropy": entropy,
        } | figures

    def logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the response tokens under ``model``, the policy or the reference. (B, T)"""
        return rlhf.token_logprobs(response_logits(model, batch), responses(batch), self.temperature)

    def values(self, batch: Batch) -> Tensor:
        """The value before each response token. (B, T)"""
        T = batch["response_mask"].shape[1]
        return self.value(batch["input_ids"], batch["attention_mask"])[:, -T - 1 : -1]


# --------------------------------------------------------------------------------------------------------- rollouts


class Rollouts:
    """The stream of PPO: every ``updates`` steps, answers of the live policy with their advantages.

    All ranks hold the whole rollout (it is small), so that a minibatch may take its rows from any of them and
    advantages are whitened over all. The state is the rollout and the KL coefficient: a save is exact at any update.
    """

    on_policy = True

    def __init__(
        self, objective: PPO, reference: nn.Module, prompts: Prompts, scorer: Scorer, tokenizer: Any, config: Config
    ) -> None:
        self.objective, self.reference, self.prompts, self.scorer = objective, reference, prompts, scorer
        self.tokenizer, self.config, self.seed, self.batch = tokenizer, config.rollout, config.seed, config.train.batch
        self.kl, self.precision, self.micro_batch = config.kl, config.train.precision, config.train.most_rows
        self.minibatches = config.rollout.batch // self.batch
        self.updates = config.ppo.num_ppo_epochs * self.minibatches  # steps of one iteration
        self.steps_per_epoch = max(1, len(prompts) // config.rollout.batch) * self.updates
        self.iteration, self.kl_coef = -1, config.kl.coef
        self.rollout: Batch = {}

    def begin(self, step: int) -> None:
        """At the first update of an iteration: roll out."""
        iteration = step // self.updates
        if iteration == self.iteration:
            return
        if self.rollout and self.kl.target is not None:
            mean_kl = self.rollout["objective/kl"].mean().item()
            self.kl_coef = rlhf.adaptive_kl_coef(
                self.kl_coef, mean_kl, self.kl.target, self.config.batch, self.kl.horizon
            )
        mine = cut(self.config.batch, distributed.world_size())[distributed.rank()]
        parts = distributed.gather_objects(self.evaluate(self.respond(iteration, mine), iteration, mine))
        everywhere = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.rollout, self.iteration = trim(self.with_advantages(everywhere)), iteration

    def prompt_ids(self, iteration: int) -> list[int]:
        """The prompts of an iteration: a new order in every pass over them, without a gap between passes."""
        first, n = iteration * self.config.batch, len(self.prompts)
        places = [divmod(first + row, n) for row in range(self.config.batch)]
        orders = {epoch: Permutation(n, "prompts", self.seed, epoch) for epoch, _ in places}
        return [orders[epoch][k] for epoch, k in places]

    def respond(self, iteration: int, mine: slice) -> Batch:
        """This rank's rows: prompts, padded to the longest of all ranks, and the policy's answers."""
        chosen = self.prompt_ids(iteration)
        width = max(len(self.prompts.ids[i]) for i in chosen)
        # A prompt may come twice in one iteration; its row tells the two answers apart.
        seeds = [derive("generation", self.seed, iteration, i, row) for row, i in enumerate(chosen)]
        return answer(
            self.objective.policy,
            [self.prompts.ids[i] for i in chosen[mine]],
            seeds[mine],
            self.tokenizer,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            precision=self.precision,
            width=width,
            rows=self.config.generate_batch,
        )

    def evaluate(self, batch: Batch, iteration: int, mine: slice) -> Batch:
        """Log-probabilities, values and scores of this rank's rows, by the forward that training uses."""
        objective, mask = self.objective, batch["response_mask"]
        batch["reward_mask"] = rlhf.reward_mask(mask, objective.config.reward_at)
        records = [self.prompts.records[i] for i in self.prompt_ids(iteration)[mine]]
        scores = self.scorer(records, decode(self.tokenizer, batch), batch)
        last = responses(batch).gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
        eos_id = -1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

        def run(function: Callable[[Batch], Tensor]) -> Tensor:
            return in_pieces(function, batch, self.precision, self.micro_batch)

        return batch | {
            "old_logprobs": run(lambda piece: objective.logprobs(objective.policy, piece)),
            "ref_logprobs": run(lambda piece: objective.logprobs(self.reference, piece)),
            "old_values": run(objective.values),
            "objective/score": scores.float(),
            "objective/ended": (last == eos_id).float(),
            "objective/length": mask.sum(dim=1).float(),
        }

    def with_advantages(self, batch: Batch) -> Batch:
        """Rewards, advantages and returns of the whole rollout; advantages whitened over all its tokens, once."""
        config, mask, paid = self.objective.config, batch["response_mask"], batch["reward_mask"]
        ref_logprobs = batch.pop("ref_logprobs")
        kl = rlhf.kl_estimate(batch["old_logprobs"], ref_logprobs, self.kl.estimator)
        scores = rlhf.penalise_missing_eos(
            batch["objective/score"], batch["objective/ended"], self.config.missing_eos_penalty, self.config.missing_eos
        )
        rewards = rlhf.token_rewards(kl, scores, mask, self.kl_coef, config.reward_at)
        if config.whiten_rewards:
            rewards = rlhf.whiten(rewards, paid, unbiased=config.unbiased_whitening, shift_mean=False)
        advantages, returns = rlhf.gae(rewards, batch["old_values"], paid, config.gamma, config.gae_lambda)
        k1 = torch.where(mask.bool(), batch["old_logprobs"] - ref_logprobs, 0.0)
        explained = rlhf.explained_variance(batch["old_values"], returns, paid)
        return batch | {
            "advantages": rlhf.whiten(advantages, mask, unbiased=config.unbiased_whitening),
            "returns": returns,
            "objective/kl": k1.sum(dim=1),
            "objective/kl_coef": torch.full_like(scores, self.kl_coef),
            "val/explained_variance": explained.expand_as(scores).clone(),
        }

    def ids(self, step: int) -> list[int]:
        """The rows of a minibatch: every PPO epoch cuts the rollout along a new permutation."""
        epoch, k = divmod(step % self.updates, self.minibatches)
        order = Permutation(self.config.batch, "minibatch", self.seed, self.iteration, epoch)
        return [order[i] for i in range(k * self.batch, (k + 1) * self.batch)]

    def fetch(self, ids: Sequence[int], step: int) -> Batch:
        """Those rows of the rollout, the short answers together, so that micro-batches carry little padding."""
        rows = torch.tensor(ids)
        rows = rows[self.rollout["response_mask"][rows].sum(dim=1).argsort(stable=True)]
        return trim(rows_of(self.rollout, rows))

    def observe(self, step: int, means: dict[str, Tensor]) -> None:
        """The KL of the rollout itself steers the controller, when the next one begins."""

    def state(self) -> tuple[Batch, dict]:
        return self.rollout, {"iteration": self.iteration, "kl_coef": self.kl_coef}

    def load(self, tensors: Batch, state: dict) -> None:
        self.rollout, self.iteration, self.kl_coef = dict(tensors), state["iteration"], state["kl_coef"]


# ------------------------------------------------------------------------------------------------------------- stage


def build_scorer(config: Config, parents: dict[str, Artifact]) -> Scorer:
    """The reward: a function, or the parent reward model."""
    if config.reward is not None:
        return FunctionScorer(callable_of(config.reward, "reward"), config.reward)
    if "reward" not in parents:
        raise InputError("align.ppo needs a reward: parents.reward (a reward-model), or reward: module:function")
    model = language.read(parents["reward"], "AutoModelForSequenceClassification").to(distributed.device())
    return ModelScorer(model, config.train.precision, config.train.most_rows)


def check_length(config: Config, policy: Any, artifact_: Artifact) -> None:
    room, wanted = policy.config.max_position_embeddings, config.data.max_length + config.rollout.max_new_tokens
    if wanted > room:
        raise InputError(
            f"data.max_length {config.data.max_length} + rollout.max_new_tokens {config.rollout.max_new_tokens} = "
            f"{wanted} tokens, but {artifact_.path} has {room} positions; lower one of them"
        )


def main(config: Config) -> Artifact:
    """Roll out, improve, judge held-out answers before and after, and hand the policy over."""
    device = distributed.setup(config.train.device)
    parents = artifact.open_parents(config)
    if config.reward is None and "reward" in parents:
        artifact.same_tokenizer(parents["policy"], parents["reward"])
    with Run.open(config, parents) as run:
        tokens = language.read_tokenizer(parents["policy"])
        policy = language.read(parents["policy"])
        check_length(config, policy, parents["policy"])
        prompts = read_prompts(config.data, tokens, "train")
        run.say(prompts.report())
        scorer = build_scorer(config, parents)
        referee = judge.build(config.judge, config.data, scorer)
        size = language.size(policy)
        torch.manual_seed(derive("init", config.seed))
        cast = actors.build(policy, parents, lora=config.lora, trainable=config.trainable, value=config.value)
        reference = cast.reference.to(device)
        objective = PPO(policy, cast.value, config.ppo, config.rollout.temperature).to(device)
        stream = Rollouts(objective, reference, prompts, scorer, tokens, config)
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
                prompts=read_prompts(config.data, tokens, split),
                tokenizer=tokens,
                most=config.evaluation.prompts,
                seed=config.seed,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                greedy=config.evaluation.greedy,
                precision=config.train.precision,
                rows=config.train.most_rows or 128,
            )

        watch = None
        if config.train.eval_every:
            watch = judge.watch(referee, policy, reference, questions("validation"))
        fit(objective, stream, optim, config.train, run, steps=steps, seed=config.seed, evaluate=watch)

        scores, kl = [], {}
        if run.measures:
            asked = questions(config.evaluation.split)
            scores, table, kl["kl"] = judge.compare(referee, reference, policy, asked)
            run.samples("answers", table, "Held-out prompts, answered before and after")
        return run.publish(
            WRITES,
            lambda folder: cast.save(tokens, folder),
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
