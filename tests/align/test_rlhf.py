"""The maths of RLHF against the numbers of published implementations, against plain loops, and against closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import rlhf

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def ppo():
    return load_file(FIXTURES / "ppo.safetensors")


@pytest.fixture(scope="module")
def numbers():
    return json.loads((FIXTURES / "ppo.json").read_text())


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tol, atol=tol)


def ragged(seed, rows=5, width=7):
    """A random ragged batch in float64; row 0 is full, row 1 has one token. Under the mask stands rubbish."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[0], lengths[1] = width, 1
    mask = torch.arange(width) < lengths[:, None]
    draw = lambda: torch.where(mask, torch.randn(rows, width, generator=g, dtype=torch.float64), math.nan)  # noqa: E731
    return mask, lengths.tolist(), draw


# -------------------------------------------------------------------------------------------- published implementations


def test_gae_of_openrlhf_verl_and_deepspeed_chat(ppo):
    advantages, returns = rlhf.gae(ppo["rewards"], ppo["values"], ppo["response_mask"], 1.0, 0.95)
    close(advantages, ppo["openrlhf/gae_advantages"])
    close(advantages, ppo["deepspeed_chat/gae_advantages"])
    close(returns, ppo["openrlhf/gae_returns"])
    close(rlhf.masked_sum(returns, ppo["response_mask"]), (ppo["verl/gae_returns"] * ppo["response_mask"]).sum())
    close(returns * ppo["response_mask"], ppo["verl/gae_returns"] * ppo["response_mask"])
    discounted, _ = rlhf.gae(ppo["rewards"], ppo["values"], ppo["response_mask"], 0.9, 0.8)
    close(discounted, ppo["openrlhf/gae_advantages_gamma.9_lam.8"])


def test_whitening_of_trl_and_verl(ppo):
    mask = ppo["response_mask"]
    # TRL adds 1e-8 to the variance, as ours does; it leaves what stands under the mask
    close(rlhf.whiten(ppo["whiten_input"], mask, unbiased=True), ppo["trl_1.12/masked_whiten"] * mask)
    close(rlhf.whiten(ppo["whiten_input"], mask, unbiased=True), ppo["verl/masked_whiten"] * mask)
    advantages, _ = rlhf.gae(ppo["rewards"], ppo["values"], mask, 1.0, 0.95)
    close(rlhf.whiten(advantages, mask, unbiased=True), ppo["verl/whitened_advantages"] * mask)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_of_verl_and_openrlhf(ppo, estimator):
    mask = ppo["response_mask"].bool()
    ours = rlhf.kl_estimate(ppo["logprobs"], ppo["ref_logprobs"], estimator)[mask].clamp(-10, 10)  # as theirs do
    close(ours, ppo[f"verl/kl_{estimator}"][mask])
    close(ours, ppo[f"openrlhf/kl_{estimator}_fp32_clamped10"][mask], tol=2e-6)  # theirs computes in float32


def test_losses_of_openrlhf_deepspeed_chat_and_verl(ppo, numbers):
    mask, tokens = ppo["response_mask"], ppo["response_mask"].sum()
    advantages, returns = ppo["openrlhf/gae_advantages"], ppo["openrlhf/gae_returns"]
    policy = rlhf.policy_loss(ppo["logprobs"], ppo["old_logprobs"], advantages, mask, 0.2).loss / tokens
    value = rlhf.value_loss(ppo["new_values"], ppo["old_values"], returns, mask, 0.2) / tokens
    for published in numbers["policy_loss_clip.2"].values():
        close(policy, published)
    for published in numbers["value_loss_clip.2"].values():
        close(value, published)


def test_reward_one_past_eos_of_trl_and_nplus(ppo, numbers):
    mask, setup = ppo["response_mask"], numbers["after_eos"]
    kl = rlhf.kl_estimate(ppo["logprobs"], ppo["ref_logprobs"], "k1")
    rewards = rlhf.token_rewards(kl, ppo["scores"], mask, setup["beta"], reward_at="after_eos")
    close(rewards, ppo["after_eos/rewards"])
    paid = rlhf.reward_mask(mask, "after_eos")
    advantages, _ = rlhf.gae(rewards, ppo["after_eos/values"], paid, setup["gamma"], setup["gae_lambda"])
    close(advantages, ppo["after_eos/advantages"])


# ----------------------------------------------------------------------------------------- plain loops and closed forms


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_double_sum_of_its_definition(gamma, lam):
    mask, lengths, draw = ragged(1)
    rewards, values = draw(), draw()
    advantages, returns = rlhf.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_gae_with_lambda_one_is_the_reward_to_go():
    mask, lengths, draw = ragged(2)
    rewards, values = draw(), draw()
    _, returns = rlhf.gae(rewards, values, mask, 1.0, 1.0)
    for row, length in enumerate(lengths):
        for t in range(length):
            assert returns[row, t].item() == pytest.approx(sum(rewards[row, t:length].tolist()), abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_has_mean_zero_and_variance_one_over_all_ranks(unbiased):
    mask, _, draw = ragged(3, rows=8)
    x = draw()
    whitened = rlhf.whiten(x, mask, unbiased=unbiased)
    kept = whitened[mask]
    assert kept.mean().abs() < 1e-12 and (kept.var(unbiased=unbiased) - 1).abs() < 1e-6
    assert not whitened[~mask].any()
    # two ranks with uneven rows, their sums exchanged as a collective would
    halves = [(x[:3], mask[:3]), (x[3:], mask[3:])]
    count = sum(m.sum() for _, m in halves)
    mean = sum(v[m].sum() for v, m in halves) / count
    answers = [torch.stack([count.double(), mean * count]), sum(((v[m] - mean) ** 2).sum() for v, m in halves)]
    for (v, m), ours in zip(halves, (whitened[:3], whitened[3:]), strict=True):
        replies = iter(answers)
        close(rlhf.whiten(v, m, unbiased=unbiased, reduce=lambda _, r=replies: next(r)), ours, tol=1e-12)


def test_whitening_divides_by_the_root_of_the_variance_plus_its_epsilon():
    x = torch.tensor([[-1e-4, 1e-4]], dtype=torch.float64)  # variance 1e-8, just the epsilon
    close(rlhf.whiten(x, torch.ones_like(x)), [[-(0.5**0.5), 0.5**0.5]], tol=1e-12)


def test_whitening_may_keep_the_mean():
    mask, _, draw = ragged(4)
    x = draw() + 3
    assert rlhf.whiten(x, mask, shift_mean=False)[mask].mean().item() == pytest.approx(x[mask].mean().item())


def test_score_stands_at_the_last_real_token_and_kl_before_it():
    mask, lengths, draw = ragged(5)
    kl, scores = draw(), torch.arange(1.0, 6.0, dtype=torch.float64)
    rewards = rlhf.token_rewards(kl, scores, mask, kl_coef=0.3)
    for row, length in enumerate(lengths):
        for t in range(mask.shape[1]):
            expected = (-0.3 * kl[row, t].item() if t < length else 0) + (scores[row].item() if t == length - 1 else 0)
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_missing_eos_replaces_or_subtracts():
    scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
    assert rlhf.penalise_missing_eos(scores, ended, 1.0, "replace").tolist() == [2.0, -1.0]
    assert rlhf.penalise_missing_eos(scores, ended, 1.0, "subtract").tolist() == [2.0, 1.0]
    assert rlhf.penalise_missing_eos(scores, ended, None).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_tempered_softmax(temperature):
    g = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 3, 11, generator=g, dtype=torch.float64)
    tokens = torch.randint(11, (2, 3), generator=g)
    logp = torch.log_softmax(logits / temperature, -1)
    close(rlhf.token_logprobs(logits, tokens, temperature), logp.gather(-1, tokens[..., None])[..., 0], tol=1e-12)
    close(rlhf.entropy(logits, temperature), -(logp.exp() * logp).sum(-1), tol=1e-12)
    assert rlhf.token_logprobs(logits.bfloat16(), tokens).dtype == torch.float32


def test_entropy_of_certainty_is_zero_and_of_ignorance_log_v():
    certain = torch.tensor([[[0.0, -torch.inf, -torch.inf]]])
    assert rlhf.entropy(certain).item() == 0
    assert rlhf.entropy(torch.zeros(1, 1, 8)).item() == pytest.approx(math.log(8))


def test_kl_estimators_average_to_the_exact_divergence():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(6, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):  # k2 is biased
        close((p.exp() * rlhf.kl_estimate(p, q, estimator)).sum(), exact, tol=1e-12)
    assert (rlhf.kl_estimate(p, q, "k3") >= 0).all()


def test_policy_loss_token_by_token_and_where_its_gradient_stops():
    mask, lengths, draw = ragged(6)
    new, old, advantages = draw().requires_grad_(), draw(), draw().nan_to_num()
    out = rlhf.policy_loss(new, old, advantages, mask, cliprange=0.2)
    loss = clipped_tokens = ratios = moved = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            a, rho = advantages[row, t].item(), math.exp((new[row, t] - old[row, t]).item())
            loss += max(-a * rho, -a * min(max(rho, 0.8), 1.2))
            clipped_tokens += (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8)
            ratios += rho
            moved += rho - 1 - math.log(rho)
    assert out.loss.item() == pytest.approx(loss, abs=1e-12)
    assert out.approxkl.item() == pytest.approx(moved, rel=1e-12)
    assert out.clipfrac.item() == clipped_tokens and out.ratio.item() == pytest.approx(ratios, rel=1e-12)
    out.loss.backward()
    assert torch.isfinite(new.grad).all() and not new.grad[~mask].any()
    assert (new.grad[mask] == 0).sum().item() == clipped_tokens
    # at ρ = 1 the gradient is that of -A log π: the policy gradient
    same = old.clone().requires_grad_()
    rlhf.policy_loss(same, old, advantages, mask, 0.2).loss.backward()
    close(same.grad[mask], -advantages[mask], tol=1e-12)


def test_value_loss_token_by_token():
    mask, lengths, draw = ragged(7)
    new, old, returns = draw().requires_grad_(), draw(), draw()
    loss = plain = 0.0
    for row, length in enumerate(lengths):
        for t in range(length):
            v, o, r = new[row, t].item(), old[row, t].item(), returns[row, t].item()
            loss += 0.5 * max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2)
            plain += 0.5 * (v - r) ** 2
    out = rlhf.value_loss(new, old, returns, mask, 0.2)
    assert out.item() == pytest.approx(loss, rel=1e-12)
    assert rlhf.value_loss(new, old, returns, mask, None).item() == pytest.approx(plain, rel=1e-12)
    out.backward()
    assert torch.isfinite(new.grad[mask]).all() and not new.grad[~mask].nan_to_num(1.0).any()


def test_adaptive_controller_follows_its_closed_form():
    # twice the target: error clipped to +.2, 512 of 10,000 episodes; a tenth above: error .1; far below: -.2
    assert rlhf.adaptive_kl_coef(0.15, 12.0, 6.0, 512) == pytest.approx(0.15 * (1 + 0.2 * 0.0512))
    assert rlhf.adaptive_kl_coef(0.15, 6.6, 6.0, 512) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    assert rlhf.adaptive_kl_coef(0.15, -1.0, 6.0, 512) == pytest.approx(0.15 * (1 - 0.2 * 0.0512))
    assert rlhf.adaptive_kl_coef(0.15, 6.0, 6.0, 512) == 0.15


def test_explained_variance():
    mask, _, draw = ragged(8)
    returns = draw()
    assert rlhf.explained_variance(returns + 1, returns, mask).item() == pytest.approx(1)
    assert rlhf.explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0)
    values = draw()
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    assert rlhf.explained_variance(values, returns, mask).item() == pytest.approx(expected.item())
