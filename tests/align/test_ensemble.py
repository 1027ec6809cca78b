"""Ensembles of reward models: what the stage says of them, from the members' own rewards by the plain loader."""

import math

import numpy as np
import pytest
import torch

from align import ensemble, reward
from fledge.data.preferences import Preferences
from fledge.errors import InputError
from tests.align.test_reward import home, raw_of, settings, tokens  # noqa: F401

ETA = 0.5


@pytest.fixture(scope="module")
def members(home):  # noqa: F811
    """Two that know no ties, and one that does; trained so little that each is wrong at times."""
    little = {"lr": 1e-6}
    more = ({"seed": 1}, {"seed": 2}, {"seed": 6, "tie_threshold": ETA})
    return [reward.main(settings(home, f"member_{n}", optim=little, **one)) for n, one in enumerate(more, 1)]


def config(home, members, name="together"):  # noqa: F811
    parents = {f"member_{n}": str(member.path) for n, member in enumerate(members, 1)}
    more = {"data": settings(home).data.model_dump(), "device": "cpu", "out": str(home / "runs")}
    return ensemble.Config.model_validate({"parents": parents, "name": name, "track": {"wandb": "off"}, **more})


@pytest.fixture(scope="module")
def rewards(home, members, tokens):  # noqa: F811
    """(M, N, 2) raw, the better answer first, and each member's (offset, scale)."""
    from transformers import AutoModelForSequenceClassification

    test = Preferences(settings(home).data, tokens, "test", ties=True)
    texts = [prompt + answer for prompt, both in zip(test.prompts, test.answers, strict=True) for answer in both]
    plain = [AutoModelForSequenceClassification.from_pretrained(member.path).eval() for member in members]
    raw = torch.stack([raw_of(model, texts) for model in plain]).view(len(plain), len(test), 2).double().numpy()
    return raw, [(model.config.reward_offset, model.config.reward_scale) for model in plain]


def test_the_figures_are_those_of_the_members_rewards(home, members, rewards):  # noqa: F811
    made = ensemble.main(config(home, members))
    raw, scales = rewards
    given = np.stack([(x - offset) * scale for x, (offset, scale) in zip(raw, scales, strict=True)])  # (M, N, 2)
    gaps = given[:, :, 0] - given[:, :, 1]
    score, figures = made.scores[0], made.metrics
    assert score["after"] == pytest.approx(np.mean(gaps.mean(0) > 0))
    assert score["baseline"] == pytest.approx(np.mean([np.mean(gap > 0) for gap in gaps]))
    spread = [math.sqrt(np.mean([(x - np.mean(one)) ** 2 for x in one])) for one in given.reshape(len(given), -1).T]
    assert figures["disagreement"]["answers"] == pytest.approx(np.mean(spread), rel=1e-4)
    assert figures["disagreement"]["pairs"] == pytest.approx(np.mean(gaps.std(axis=0)), rel=1e-4)
    assert 0 < score["after"] < 1  # so that the figures say something


def test_each_member_is_as_sure_as_its_own_thresholds_make_it(home, members, rewards):  # noqa: F811
    """Rao and Kupper's π_i / (π_i + θ π_j), given that one of both is preferred; the mean of the members'."""
    theta, worth = [1.0, 1.0, math.exp(ETA)], np.exp(rewards[0])
    likely = []
    for pair in range(worth.shape[1]):
        won = [better / (better + t * worse) for t, (better, worse) in zip(theta, worth[:, pair], strict=True)]
        lost = [worse / (worse + t * better) for t, (better, worse) in zip(theta, worth[:, pair], strict=True)]
        likely.append(np.mean([w / (w + x) for w, x in zip(won, lost, strict=True)]))
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p in likely:
        bins.setdefault(int((max(p, 1 - p) - 0.5) / 0.05), []).append((max(p, 1 - p), p > 0.5))
    ece = sum(abs(sum(right for _, right in some) - sum(p for p, _ in some)) for some in bins.values()) / len(likely)
    assert ensemble.main(config(home, members)).metrics["ece"] == pytest.approx(ece, rel=1e-4)
    assert [member.preprocessing.get("reward_tie_threshold") for member in members] == [None, None, ETA]


def test_no_model_twice(home, members):  # noqa: F811
    first, second, _ = members
    with pytest.raises(InputError, match=r"parents.member_3 is the model of parents.member_2 once more"):
        ensemble.main(config(home, [first, second, second], "twice"))
    with pytest.raises(InputError, match=r"parents.member_2 is the model of parents.member_1 once more"):
        ensemble.main(config(home, [first, first, second], "twice"))
