"""The maths of reinforcement learning from human feedback: rewards, advantages, losses. Tensors in, tensors out.

Axes: B rows (one prompt with one response each), T response tokens, V vocabulary. Conventions, everywhere:

- ``mask (B, T)``: 1 = a real response token, from the first through the end-of-sequence inclusive; 0 after it.
- ``logprobs (B, T)``: entry t scores response token t. ``values (B, T)``: entry t is the value *before* token t.
- Losses and statistics are **sums** over the mask; whoever calls divides by the number of tokens of the whole batch.

Sources: Schulman et al. 2015 (GAE, arXiv:1506.02438) and 2017 (PPO, arXiv:1707.06347); Ziegler et al. 2019
(arXiv:1909.08593: per-token KL reward, adaptive controller); Ouyang et al. 2022 (InstructGPT, arXiv:2203.02155); Huang
et al. 2024 ("The N+ implementation details of RLHF with PPO", arXiv:2403.17031); Schulman 2020 ("Approximating KL
divergence", a note) for k1, k2 and k3.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
ScoreNorm = Literal["standardise", "scale"]
RewardAt = Literal["last_token", "after_eos"]


# ---------------------------------------------------------------------------------------------------- masked reductions


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``x (B, T)`` where ``mask`` is 1. What stands under the mask may be anything, NaN and inf included."""
    return torch.where(mask.bool(), x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the 1s of the mask (0 where there are none)."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    unbiased: bool = False,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the 1s of the mask, in two passes; 0 elsewhere. (B, T) -> (B, T)

    The variance is divided by n as in lm-human-preferences and N+; ``unbiased`` divides by n - 1, as TRL and verl do.
    ``shift_mean=False`` keeps the mean (N+'s whitening of rewards). ``reduce`` sums a tensor over all ranks, so that
    every rank whitens its rows with the moments of the whole batch.
    """
    count, total = reduce(torch.stack([mask.sum().to(x.dtype), masked_sum(x, mask)]))
    mean = total / count.clamp(min=1)
    squares = reduce(masked_sum((x - mean) ** 2, mask))
    var = squares / (count - 1 if unbiased else count).clamp(min=1)
    whitened = (x - mean) / torch.sqrt(var + 1e-8)
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, torch.zeros_like(x))


# -------------------------------------------------------------------------------------- what the policy says of a token


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), in at least fp32, at every token of the vocabulary. (…, V) -> (…, V)

    The temperature of sampling belongs here too: a policy that samples from softmax(logits / .7) *is* that softmax.
    """
    logits = _full_precision(logits)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def at(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Those of the given tokens. (…, V), (…) -> (…)"""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy in nats of distributions given by their logs, never negative. (…, V) -> (…)"""
    # a token of probability 0 adds nothing: 0 * -inf would be NaN
    finite = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -finite.mul_(log_probs.exp()).sum(-1).clamp(max=0)  # in place: (…, V) is the largest tensor of an update


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given tokens, in at least fp32. (…, V), (…) -> (…)"""
    return at(log_probabilities(logits, temperature), tokens)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) at every position, never negative. (…, V) -> (…)"""
    return entropy_of(log_probabilities(logits, temperature))


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimates KL(policy || reference) from sampled tokens, each in nats. (B, T), (B, T) -> (B, T)

    d = logprobs - ref_logprobs.  k1 = d is unbiased and the one whose sum is the KL of the sequence; k2 = d²/2 has less
    variance and a bias; k3 = exp(-d) - 1 + d is unbiased and never negative, with a heavy upper tail.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    return torch.expm1(-d) + d


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) of each token's whole distribution, without an estimate. (…, V) twice -> (…)"""
    logp, ref_logp = (log_probabilities(x, temperature) for x in (logits, ref_logits))
    return torch.where(logp == -torch.inf, 0.0, logp.exp() * (logp - ref_logp)).sum(-1)


# ----------------------------------------------------------------------------------------------- from scores to rewards


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers seen so far."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def merged(self, x: Tensor) -> "Moments":
        """With the numbers of `x` too, in float64: M2 = M2_a + M2_b + δ² n_a n_b / n (Chan, Golub and LeVeque 1979)."""
        x = x.double()
        n, delta = self.count + x.numel(), x.mean().item() - self.mean
        m2 = ((x - x.mean()) ** 2).sum().item()
        return Moments(n, self.mean + delta * x.numel() / n, self.m2 + m2 + delta**2 * self.count * x.numel() / n)

    @property
    def std(self) -> float:
        """sqrt(M2 / n + 1e-8): that of all numbers, over n, as `whiten` has it; 1 while all of them are equal.

        Equal numbers have no scale: over 1e-4 a score of 1 would become 10,000, and under trlx, which divides by the
        plain deviation, inf. scikit-learn's StandardScaler takes 1 in place of 0, too (`_handle_zeros_in_scale`).
        """
        return math.sqrt(self.m2 / self.count + 1e-8) if self.m2 > 0 else 1.0


def normalise_scores(scores: Tensor, moments: Moments, norm: ScoreNorm | None, clip: float | None) -> Tensor:
    """First normalised by the moments of all scores so far, these among them, then clipped to ±clip. (B,) -> (B,)

    "standardise": (s - mean) / std, as TRL's former use_score_norm has it; "scale": s / std, as trlx's running
    scale_reward has it, so that a score keeps its sign.
    """
    if norm is not None:
        scores = (scores - (moments.mean if norm == "standardise" else 0.0)) / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)


def penalise_missing_eos(
    scores: Tensor, ended: Tensor, penalty: float | None, mode: Literal["replace", "subtract"] = "replace"
) -> Tensor:
    """Scores of responses that ran out of length without an end-of-sequence. ``ended`` 1 = ended. (B,), (B,) -> (B,)

    "replace" puts -penalty in the place of the score (Huang et al. 2024: -1), "subtract" takes it off (TRL).
    """
    if penalty is None:
        return scores
    punished = torch.full_like(scores, -penalty) if mode == "replace" else scores - penalty
    return torch.where(ended.bool(), scores, punished)


def reward_mask(mask: Tensor, reward_at: RewardAt = "last_token") -> Tensor:
    """The positions over which rewards and GAE run. (B, T) -> (B, T)

    ``last_token``: the response mask itself. ``after_eos``: one position more, where there is room, as N+ and TRL 1.12
    do it; there the value *after* the last token takes part. Kept only to reproduce them.
    """
    if reward_at == "last_token":
        return mask
    return torch.cat([mask[:, :1], mask[:, :-1]], dim=1) | mask


def token_rewards(
    kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float, reward_at: RewardAt = "last_token"
) -> Tensor:
    """r_t = -kl_coef · kl_t, plus the score of the row at its last real token. (B, T), (B,), (B, T) -> (B, T)

    A row without any token (which a sampler never makes) gets no score. With ``after_eos`` the score stands one
    position later, on a full row at its last token.
    """
    rewards = torch.where(mask.bool(), -kl_coef * kl, torch.zeros_like(kl))
    paid = reward_mask(mask, reward_at).bool()
    last = paid & ~torch.cat([paid[:, 1:], torch.zeros_like(paid[:, :1])], dim=1)
    return rewards + torch.where(last, scores.to(rewards.dtype).unsqueeze(1), torch.zeros_like(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, both (B, T), from rewards, values and mask (B, T).

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}        R_t = A_t + V_t

    The value past the last real token is 0: a response that is over, or cut by its length limit, earns nothing more.
    """
    zero = torch.zeros_like(rewards)
    rewards, values = torch.where(mask.bool(), rewards, zero), torch.where(mask.bool(), values, zero)
    advantage, next_value = zero[:, 0], zero[:, 0]
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * advantage
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


# --------------------------------------------------------------------------------------------------------------- losses


class PolicyLoss(NamedTuple):
    """Sums over the tokens of the mask. Only ``loss`` carries a gradient."""

    loss: Tensor
    clipfrac: Tensor  # tokens where clipping decides, so that no gradient flows
    approxkl: Tensor  # k3 of KL(old || new): how far this update has moved
    ratio: Tensor  # π_new / π_old


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> PolicyLoss:
    """The clipped surrogate: max(-A ρ, -A clip(ρ, 1-ε, 1+ε)), ρ = exp(logprobs - old_logprobs). All (B, T) -> sums."""
    # Under the mask the difference is made 0 before exp, so that no inf there turns a gradient into NaN.
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        clipfrac = masked_sum((clipped > unclipped).to(ratio.dtype), mask)
        approxkl = masked_sum(torch.expm1(log_ratio) - log_ratio, mask)
        mean_ratio = masked_sum(ratio, mask)
    return PolicyLoss(masked_sum(torch.max(unclipped, clipped), mask), clipfrac, approxkl, mean_ratio)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float | None
) -> Tensor:
    """½ max((V - R)², (V_old + clip(V - V_old, ±ε) - R)²), all (B, T) -> sum over the mask. ε None: no clipping."""
    # Under the mask all three are made 0 first: what stands there must not reach the gradient, not even as NaN.
    values, old_values, returns = (torch.where(mask.bool(), x, 0.0) for x in (values, old_values, returns))
    squares = (values - returns) ** 2
    if cliprange_value is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        squares = torch.max(squares, (clipped - returns) ** 2)
    return masked_sum(squares, mask) / 2


# -------------------------------------------------------------------------------------------- controller and statistics


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float = 10_000) -> float:
    """Ziegler et al.'s proportional controller: the next β, after ``episodes`` responses with mean sequence KL ``kl``.

    β ← β (1 + clip(KL / target - 1, ±0.2) · episodes / horizon); the horizon is counted in episodes.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the mask: 1 = values predict the returns, 0 = no better than their mean."""
    residual_var = _variance(returns - values, mask)
    return_var = _variance(returns, mask)
    return torch.where(return_var > 0, 1 - residual_var / return_var.clamp(min=1e-30), torch.zeros_like(return_var))


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
