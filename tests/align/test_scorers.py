"""Scorers: whatever scores, one finite number a response; equal scores keep their scale; functions found by name."""

import math
import sys

import pytest
import torch

from align import rlhf, scorers
from fledge import artifact
from fledge.errors import InputError, RunError
from tests.align.test_ppo import EOS, PAD, V, build, config

ASKED = [{"prompt": [{"role": "user", "content": text}]} for text in ("ab", "ba")]


def fixed(*scores, name="mine:f"):
    return scorers.FunctionScorer(lambda records, texts: list(scores), name)


# ------------------------------------------------------------------------------------------- one finite number each


def reward_of(vocab, weight):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "num_labels": 1}
    specials = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=vocab, **sizes, **specials))
    torch.nn.init.constant_(model.score.weight, weight)
    return model


def test_a_model_that_gives_nan_ends_the_run_before_any_update():
    stream = build(config(), scorer=scorers.ModelScorer(reward_of(V, math.nan), "fp32", 5))
    with pytest.raises(RunError, match=r"the reward model is nan for the response '\d"):
        stream.begin(0)
    assert stream.moments.count == 0 and not stream.rollout


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A reward model's artifact whose head is NaN."""
    from fledge.data import tokenizer
    from fledge.models import language

    folder = tmp_path_factory.mktemp("scorers")
    tokens = tokenizer.train(tokenizer.TokenizerConfig(kind="char", vocab_size=64, min_frequency=1), ["abc"])
    return artifact.write(
        folder / "broken", kind="reward-model", config="stage: align.reward\n", architecture={},
        save=lambda at: language.save(reward_of(len(tokens), math.nan), tokens, at),
        preprocessing={"tokenizer": tokenizer.digest(tokens), "template": "chat"},
    )  # fmt: skip


def test_a_model_that_reads_texts_is_checked_too(broken):
    scorer = scorers.of_texts(broken, "fp32")
    with pytest.raises(RunError, match="the reward model .*broken is nan for the response 'b'"):
        scorer(ASKED, ["b", "a"], {})
    with pytest.raises(RunError, match="the reward model .*broken is nan for the response 'b'"):
        scorers.EnsembleScorer([fixed(1.0, 1.0), scorer], scorers.Ensemble())(ASKED, ["b", "a"], {})
    built = scorers.build(None, None, None, {"reward": broken}, "fp32", None)
    assert str(broken.path) in built.name


def test_what_is_made_of_finite_scores_is_checked_too():
    far = scorers.Ensemble(objective="uncertainty_weighted")  # the variance of these overflows fp32
    with pytest.raises(RunError, match="the reward ensemble is -inf for the response 'y'"):
        scorers.EnsembleScorer([fixed(0.0, 1e30), fixed(0.0, -1e30)], far)(ASKED, ["x", "y"], {})
    with pytest.raises(RunError, match="the reward weighted sum is inf for the response 'y'"):
        scorers.WeightedSum({"a": (fixed(0.0, 1e30), 1e30)}).figures(ASKED, ["x", "y"], {})


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3,)])
def test_a_scorer_of_another_shape_is_refused(shape):
    class Odd(scorers.Scorer):
        name = "odd"

        def _figures(self, records, texts, batch):
            return {"score": torch.zeros(shape)}

    with pytest.raises(RunError, match=r"the reward odd gave scores of shape \(.*\) for 2 responses"):
        Odd()(ASKED, ["x", "y"], {})


# --------------------------------------------------------------------------------------------------- running moments


@pytest.mark.parametrize(("norm", "expected"), [("scale", [1.0, 1.0]), ("standardise", [0.0, 0.0])])
def test_scores_that_were_all_equal_keep_their_scale(norm, expected):
    """A reward of 0 or 1 that begins with 1s; nothing is divided by the root of 1e-8."""
    ones, moments = torch.ones(2), rlhf.Moments()
    for part in (torch.ones(5), torch.ones(3), ones):
        moments = moments.merged(part)
    assert rlhf.normalise_scores(ones, moments, norm, None).tolist() == expected
    tenths = rlhf.Moments().merged(torch.full((7,), 0.1)).merged(torch.full((4,), 0.1))  # of which none is exact
    assert tenths.std == 1.0


def test_any_variance_is_used_as_it_is():
    moments = rlhf.Moments().merged(torch.ones(5)).merged(torch.tensor([1.0, 0.0, 1.0]))
    variance = 7 / 64  # of seven 1s and a 0: p (1 - p)
    assert moments.std == pytest.approx(math.sqrt(variance + 1e-8), rel=1e-12)
    scaled = rlhf.normalise_scores(torch.tensor([1.0, 0.0]), moments, "scale", None)
    assert scaled.tolist() == pytest.approx([1 / math.sqrt(variance + 1e-8), 0.0])


# ------------------------------------------------------------------------------------------------- functions by name


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder where a command was started, which Python does not know yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    return tmp_path


def test_a_function_may_import_when_it_is_called(here):
    (here / "late_words.py").write_text("WORTH = 2.5\n")
    (here / "late_reward.py").write_text(
        "def late(records, responses):\n    from late_words import WORTH\n    return [WORTH] * len(responses)\n"
    )
    found = scorers.callable_of("late_reward:late", "reward")
    assert found([], ["a", "b"]) == [2.5, 2.5]
    before = list(sys.path)
    scorers.callable_of("late_reward:late", "reward")
    assert sys.path == before  # once is enough


@pytest.mark.parametrize(
    ("name", "text", "words", "cause"),
    [
        ("does_not_parse", "def f(:\n", "SyntaxError: .*does_not_parse.py, line 1", SyntaxError),
        ("names_nothing", "import math\nx = nowhere\n", "NameError: .*nowhere.*names_nothing.py:2", NameError),
        ("divides", "def g():\n    return 1 / 0\n\ng()\n", "ZeroDivisionError.*divides.py:2", ZeroDivisionError),
        ("wants_more", "import no_such_package_x\n", "no_such_package_x.*wants_more.py:1", ImportError),
        ("has_none", "", "AttributeError: .*has no attribute 'f'", AttributeError),
    ],
)
def test_a_module_that_cannot_be_read_is_told_with_its_line(here, name, text, words, cause):
    (here / f"{name}.py").write_text(text)
    with pytest.raises(InputError, match=f"(?s)reward: {name}:f cannot be imported .*{words}") as told:
        scorers.callable_of(f"{name}:f", "reward")
    assert isinstance(told.value.__cause__, cause)
