"""DPO's implicit reward, log π/π_ref (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 5), on held-out
answers. Its factor beta is left out: no comparison needs it.

N prompts of K answers each, or B answers.
"""

import dataclasses

import numpy as np
from torch import Tensor, nn

from align import held_out
from align.examples import Examples
from align.held_out import Sample
from align.rollout import in_pieces, joined, response_logprobs
from fledge.data import chats
from fledge.evals import ranking
from fledge.evals.score import Score, bootstrap
from fledge.stream import Batch

METRIC = "implicit reward's accuracy on {}"


@dataclasses.dataclass(frozen=True)
class Implicit:
    """A policy as a reward model, beside the reference that it started from."""

    policy: nn.Module
    reference: nn.Module
    precision: str
    rows: int
    """Of one forward at most."""

    def rewards(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """(B,), from the ids of each prompt and of the answer behind it."""
        batch = joined(prompts, chats.pad(answers, 0, "right"), 0)  # which id pads says nothing: masks are explicit

        def logprobs_of(model: nn.Module) -> Tensor:
            def summed(piece: Batch) -> Tensor:
                return response_logprobs(model, piece).sum(dim=1)

            return in_pieces(summed, batch, self.precision, self.rows)

        return logprobs_of(self.policy) - logprobs_of(self.reference)

    def on_pairs(self, asked: Sample) -> Score:
        """How often the better of two answers has the higher reward. At first all rewards are 0."""
        data = asked.data
        flat = [(data.prompts[i], answer) for i in asked.ids for answer in data.answers[i]]
        found = self.rewards(*map(list, zip(*flat, strict=True)))
        each = list(found.split([len(data.answers[i]) for i in asked.ids]))
        given = nn.utils.rnn.pad_sequence(each, batch_first=True)  # (N, K)
        return dataclasses.replace(held_out.accuracy(asked, given, None), metric=METRIC.format("pairs"))

    def on_labelled(self, found: Examples) -> Score:
        """How often the reward is above 0 where the answer is desirable, and below where it is not; 0 is half right."""
        columns, records = found.columns, found.records
        rewards = self.rewards(columns["prompt_ids"], columns["completion_ids"])
        signs = 2 * np.array(columns["label"]) - 1
        right = ranking.right(signs * rewards.numpy())
        names = ["\0".join(m["content"] for m in r["messages"][:-1]) for r in records]
        _, clusters = np.unique(names, return_inverse=True)  # answers to one prompt rise and fall together
        low, high = bootstrap(right, clusters)
        desirable = float(np.mean(columns["label"]))
        return Score(
            metric=METRIC.format("labelled answers"), after=float(right.mean()),
            baseline=max(desirable, 1 - desirable), baseline_name="the more frequent label",
            low=low, high=high, n=int(clusters.max()) + 1, unit="prompts", note=f"{len(records)} answers",
        )  # fmt: skip
