"""The stream of PPO: what it learns from is what its live policy answers. ``align/ppo.py`` learns from it.

B rows, P prompt positions (padded on the left), T response positions (padded on the right). In every mask 1 is real.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from align import rlhf
from align.ptx import Text
from align.rlhf import Moments
from align.rollout import (
    INPUTS,
    Generator,
    Sampler,
    check_answers,
    decode,
    in_pieces,
    joined,
    responses,
    trim,
)
from align.scorers import Scorer, callable_of
from fledge import distributed
from fledge.config import Config, hardware
from fledge.data.prompts import Prompts
from fledge.stream import Batch, Permutation, cut, derive, longest_first, rows_of


class Rollout(Config):
    """How answers come about, and what their scores are worth. Defaults: Huang et al. 2024.

    A score is normalised by all scores of the run so far, then clipped, then the answer that did not end itself is
    penalised: the penalty counts on the scale that PPO sees.
    """

    batch: PositiveInt = 512
    """Answers of one iteration, over all ranks; a multiple of ``train.batch``."""
    max_new_tokens: PositiveInt = 53
    temperature: PositiveFloat = 0.7
    """Of sampling, and therefore of every log-probability, the reference's too."""
    generator: str | None = None
    """``module:function`` that makes what answers in the place of our sampler (vLLM, paged generation), called with the
    policy, the tokenizer and this section; what it owes: ``align.rollout.Generator``."""
    score_norm: rlhf.ScoreNorm | None = None
    """standardise: less the running mean, over the running standard deviation. scale: only over the latter. A value
    model that starts from the reward's head knows nothing of it: use value.head: zero."""
    score_clip: PositiveFloat | None = None
    """Scores beyond plus or minus this become this (OpenRLHF: 10, DeepSpeed-Chat: 5)."""
    missing_eos_penalty: float | None = 1.0
    """For answers that do not end themselves: their score becomes minus this, or is lowered by it."""
    missing_eos: Literal["replace", "subtract"] = "replace"
    generate_batch: PositiveInt | None = hardware(None)
    """The most rows that are generated together on one rank; None: all of them."""


class KL(Config):
    """The price of leaving the reference. Defaults: fixed at .05, k1 (Huang et al. 2024)."""

    coef: float = Field(0.05, ge=0)
    estimator: rlhf.KLEstimator = "k1"
    target: PositiveFloat | None = None
    """If given, the coefficient is steered so that the KL of an answer becomes this (Ziegler et al.: 6, coef .15)."""
    horizon: PositiveFloat = 10_000.0
    """Of the controller, in answers."""

    @model_validator(mode="after")
    def _steerable(self) -> "KL":
        if self.target is not None and self.coef == 0:
            raise ValueError("kl.target steers kl.coef by factors, and kl.coef is 0; begin with Ziegler et al.'s .15")
        return self


def build_generator(config: Any, policy: nn.Module, tokenizer: Any) -> Generator:
    """Our sampler on the live policy, or what ``rollout.generator`` makes."""
    rollout: Rollout = config.rollout
    if rollout.generator is not None:
        return callable_of(rollout.generator, "rollout.generator")(policy, tokenizer, rollout)  # type: ignore
    return Sampler(
        policy,
        tokenizer,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        precision=config.train.precision,
        rows=rollout.generate_batch,
    )


class Rollouts:
    """Every ``updates`` steps, answers of the live policy with their advantages.

    All ranks hold the whole rollout (it is small), so that a minibatch may take its rows from any of them and
    advantages are whitened over all. The state is the rollout, the KL coefficient, the moments of the scores and
    whether the iteration was stopped: a save is exact at any update.

    Args:
        objective: an `align.ppo.PPO`.
        config: an `align.ppo.Config`.
        text: pretraining text to stand beside the answers.
    """

    on_policy = True

    def __init__(
        self,
        objective: Any,
        reference: nn.Module,
        prompts: Prompts,
        scorer: Scorer,
        tokenizer: Any,
        config: Any,
        text: Text | None = None,
    ) -> None:
        self.objective, self.reference, self.prompts, self.scorer = objective, reference, prompts, scorer
        self.tokenizer, self.config, self.seed, self.batch = tokenizer, config.rollout, config.seed, config.train.batch
        self.kl, self.precision, self.micro_batch = config.kl, config.train.precision, config.train.most_rows
        self.generate, self.text = build_generator(config, objective.policy, tokenizer), text
        self.minibatches = config.rollout.batch // self.batch
        self.updates = config.ppo.num_ppo_epochs * self.minibatches  # steps of one iteration
        self.steps_per_epoch = max(1, len(prompts) // config.rollout.batch) * self.updates
        self.iteration, self.kl_coef, self.moments = -1, config.kl.coef, Moments()
        self.stopped = -1  # the iteration whose remaining updates are skipped
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
        parts = distributed.together(lambda: self.evaluate(self.respond(iteration, mine), iteration, mine))
        everywhere = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.moments = self.moments.merged(everywhere["objective/score"])
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
        prompts = [self.prompts.ids[i] for i in chosen[mine]]
        said = self.generate(prompts, seeds[mine], self.prompts.inputs(chosen[mine]))
        if self.config.generator is not None:
            shape = (len(prompts), self.config.max_new_tokens)
            vocabulary = self.objective.policy.config.get_text_config().vocab_size
            check_answers(said, shape, self.tokenizer.eos_token_id, vocabulary, self.config.generator)
        return joined(prompts, said, self.tokenizer.pad_token_id or 0, width)

    def evaluate(self, batch: Batch, iteration: int, mine: slice) -> Batch:
        """Log-probabilities, values and scores of this rank's rows, by the forward that training uses."""
        objective, mask = self.objective, batch["response_mask"]
        batch["reward_mask"] = rlhf.reward_mask(mask, objective.config.reward_at)
        chosen = self.prompt_ids(iteration)[mine]
        seen = batch | self.inputs(chosen)
        records = [self.prompts.records[i] for i in chosen]
        figures = self.scorer.figures(records, decode(self.tokenizer, batch), seen)
        last = responses(batch).gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
        eos_id = -1 if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

        def run(function: Callable[[Batch], Tensor]) -> Tensor:
            return in_pieces(function, seen, self.precision, self.micro_batch)

        return batch | {
            "old_logprobs": run(lambda piece: objective.logprobs(objective.policy, piece)),
            "ref_logprobs": run(lambda piece: objective.logprobs(self.reference, piece)),
            "old_values": run(objective.values),
            **{f"objective/{name}": figure.float() for name, figure in figures.items()},
            "objective/ended": (last == eos_id).float(),
            "objective/length": mask.sum(dim=1).float(),
        }

    def inputs(self, chosen: list[int]) -> Batch:
        """What these prompts bring beside ids. It is read again whenever it is needed, and no part of the state."""
        return {f"{INPUTS}{name}": x for name, x in self.prompts.inputs(chosen).items()}

    def with_advantages(self, batch: Batch) -> Batch:
        """Rewards, advantages and returns of the whole rollout; advantages whitened over all its tokens, once."""
        config, mask, paid = self.objective.config, batch["response_mask"], batch["reward_mask"]
        ref_logprobs = batch.pop("ref_logprobs")
        kl = rlhf.kl_estimate(batch["old_logprobs"], ref_logprobs, self.kl.estimator)
        scores = self.worth(batch["objective/score"], batch["objective/ended"])
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

    def worth(self, scores: Tensor, ended: Tensor) -> Tensor:
        """The scores as PPO sees them: normalised, clipped, and penalised where an answer did not end. (B,) -> (B,)"""
        config = self.config
        scores = rlhf.normalise_scores(scores, self.moments, config.score_norm, config.score_clip)
        return rlhf.penalise_missing_eos(scores, ended, config.missing_eos_penalty, config.missing_eos)

    def ids(self, step: int) -> list[int] | None:
        """The rows of a minibatch: every PPO epoch cuts the rollout along a new permutation. None: the iteration was
        stopped, and this update is skipped."""
        if self.stopped == self.iteration:
            return None
        epoch, k = divmod(step % self.updates, self.minibatches)
        order = Permutation(self.config.batch, "minibatch", self.seed, self.iteration, epoch)
        return [order[i] for i in range(k * self.batch, (k + 1) * self.batch)]

    def fetch(self, ids: Sequence[int], step: int) -> Batch:
        """Those rows of the rollout, the longest first, so that micro-batches carry little padding."""
        rows = torch.tensor(ids)
        rows = rows[longest_first(self.rollout["attention_mask"][rows])]
        chosen = self.prompt_ids(self.iteration)
        batch = trim(rows_of(self.rollout, rows)) | self.inputs([chosen[row] for row in rows.tolist()])
        if self.text is None:
            return batch
        epochs_before = step // self.minibatches  # of PPO, since the run began
        return batch | self.text.beside([epochs_before * self.config.batch + row for row in rows.tolist()])

    def observe(self, step: int, means: dict[str, Tensor]) -> None:
        """Has this update left the policy that answered too far behind? Then it is the iteration's last.

        The controller of the KL to the reference needs no feedback: the rollout itself steers it.
        """
        bound = self.objective.config.target_kl
        if bound is not None and means["approxkl"].item() > bound:
            self.stopped = self.iteration

    def state(self) -> tuple[Batch, dict]:
        state = {"iteration": self.iteration, "kl_coef": self.kl_coef, "stopped": self.stopped}
        return self.rollout, state | {"moments": list(self.moments)}

    def load(self, tensors: Batch, state: dict) -> None:
        self.rollout, self.iteration, self.kl_coef = dict(tensors), state["iteration"], state["kl_coef"]
        self.stopped = state.get("stopped", -1)  # runs from before there was an early stop
        self.moments = Moments(*state.get("moments", ()))
