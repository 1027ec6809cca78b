"""The known optimum of tests/align/test_ppo.py with two tokens, and the mistakes that it finds.

As measured on seeds 0 and 1: correct .98 and .99 of what is attainable; the temperature forgotten .85 and .88; the sign
of the KL, a score or a mask off by one: below .6.
"""

import pytest
import torch

from align import rlhf
from tests.align.test_ppo import optimise


def recovered(seed):
    start, found, best = optimise(seed, iterations=40, T=2, temperature=0.7, rows=128)
    assert found <= best + 1e-6
    return (found - start) / (best - start)


def test_two_tokens_come_to_their_optimum():
    assert recovered(1) >= 0.95


KL, REWARDS, LOSS, LOGPROBS = rlhf.kl_estimate, rlhf.token_rewards, rlhf.policy_loss, rlhf.log_probabilities


def early(kl, scores, *rest):
    """The score one token before the last."""
    without = REWARDS(kl, torch.zeros_like(scores), *rest)
    return without + (REWARDS(kl, scores, *rest) - without).roll(-1, 1)


def short(new, old, advantages, mask, cliprange):
    """The last token is not learned from."""
    return LOSS(new, old, advantages, torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1), cliprange)


MISTAKES = {
    "kl_estimate": lambda *a: -KL(*a),
    "token_rewards": early,
    "policy_loss": short,
    "log_probabilities": lambda logits, temperature: LOGPROBS(logits, 1.0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_does_not_come_to_it(monkeypatch, name):
    monkeypatch.setattr(rlhf, name, MISTAKES[name])
    assert recovered(1) < 0.95
