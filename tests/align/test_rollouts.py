"""What rollouts offer beside the plain algorithm: an early stop, scores normalised, an average of the weights,
pretraining text, other generators."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from align import ppo, ptx, rlhf, rollout
from fledge import ema
from fledge.errors import RunError
from fledge.stream import rows_of, share
from fledge.train import backward
from tests.align.test_ppo import EOS, PROMPTS, Words, build, config, gpt2, roll


def learn(stream, optimizer, steps):
    """The loop: which steps were skipped, and the others' figures. {step: means}"""
    seen = {}
    for step in steps:
        stream.begin(step)
        ids = stream.ids(step)
        if ids is None:
            continue
        batch, objective = stream.fetch(ids, step), stream.objective
        optimizer.zero_grad()
        seen[step] = backward(objective, [batch], step)
        optimizer.step()
        objective.after_step(step, seen[step])
        stream.observe(step, seen[step])
    return seen


def sgd(stream, lr):
    return torch.optim.SGD(stream.objective.parameters(), lr=lr)


# -------------------------------------------------------------------------------------------------- early stop on KL


def test_an_iteration_ends_with_the_update_that_went_too_far():
    """Against a run that never stops: its first figure beyond the bound is the last seen, until the next rollout."""
    free = build(config())
    figures = {step: m["approxkl"].item() for step, m in learn(free, sgd(free, 0.3), range(6)).items()}
    last = 3  # of six updates
    bound = max(figures[step] for step in range(last)) * 1.001
    assert figures[last] > bound, "the rate is too low for this test"
    stream = build(config(ppo=ppo.Algorithm(num_ppo_epochs=2, target_kl=bound)))
    optimizer = sgd(stream, 0.3)
    seen = learn(stream, optimizer, range(6))
    assert list(seen) == [0, 1, 2, 3]
    assert {step: m["approxkl"].item() for step, m in seen.items()} == {step: figures[step] for step in range(4)}
    stopped = copy.deepcopy(stream.objective.state_dict())
    first = stream.rollout["input_ids"]
    stream.begin(6)
    assert stream.ids(6) is not None and not torch.equal(first, stream.rollout["input_ids"])
    assert all(torch.equal(x, stopped[name]) for name, x in stream.objective.state_dict().items())


def test_a_save_among_skipped_updates_is_exact():
    settings = config(
        ppo=ppo.Algorithm(num_ppo_epochs=2, target_kl=1e-3, ema=0.9),
        rollout=ppo.Rollout(batch=12, max_new_tokens=6, temperature=0.7, score_norm="standardise", score_clip=1.0),
    )
    whole = build(settings)
    optimizer = sgd(whole, 0.3)
    seen = learn(whole, optimizer, range(18))
    assert 3 <= len(seen) < 18, "nothing was skipped"
    for stop in (next(step for step in range(18) if step not in seen), 6, 7):
        first = build(settings)
        learn(first, sgd(first, 0.3), range(stop))
        tensors, state = copy.deepcopy(first.state())
        second = build(settings)
        second.objective.load_state_dict(first.objective.state_dict())
        second.load(tensors, state)
        rest = learn(second, sgd(second, 0.3), range(stop, 18))
        assert list(rest) == [step for step in seen if step >= stop]
        assert second.moments == whole.moments
        for (name, a), b in zip(
            whole.objective.state_dict().items(), second.objective.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


# ---------------------------------------------------------------------------------------------- scores and their norm


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_running_moments_are_those_of_all_numbers_at_once(offset):
    g = torch.Generator().manual_seed(0)
    every = torch.randn(1000, generator=g, dtype=torch.float64) * 3 + offset
    moments = rlhf.Moments()
    for part in every.split([1, 7, 300, 192, 500]):
        moments = moments.merged(part)
    assert moments.count == 1000
    assert moments.mean == pytest.approx(every.mean().item(), rel=1e-13)
    assert moments.std == pytest.approx(math.sqrt(every.var(unbiased=False).item() + 1e-8), rel=1e-10)


@pytest.mark.parametrize("norm", [None, "standardise", "scale"])
def test_scores_are_normalised_then_clipped_then_penalised(norm):
    """Over two iterations, by hand from all raw scores so far."""
    settings = config(
        rollout=ppo.Rollout(
            batch=12, max_new_tokens=6, temperature=0.7, score_norm=norm, score_clip=0.4, missing_eos_penalty=3.0
        ),
        kl=ppo.KL(coef=0.0),
        ppo=ppo.Algorithm(num_ppo_epochs=2, gae_lambda=1.0),
    )
    stream, raw = build(settings), []
    for step in (0, 6):
        stream.begin(step)
        r = stream.rollout
        raw += r["objective/score"].tolist()
        mean = sum(raw) / len(raw) if norm == "standardise" else 0.0
        centre = sum(raw) / len(raw)
        std = math.sqrt(sum((s - centre) ** 2 for s in raw) / len(raw)) if norm else 1.0
        clipped = 0
        for row in range(12):
            expected = (r["objective/score"][row].item() - mean) / std
            clipped += abs(expected) > 0.4
            expected = max(-0.4, min(0.4, expected)) if r["objective/ended"][row] else -3.0
            assert r["returns"][row, 0].item() == pytest.approx(expected, abs=1e-5)
        assert clipped > 0


# ------------------------------------------------------------------------------------------------------------ average


def test_the_average_is_the_recursion_over_what_was_trainable():
    settings = config(ppo=ppo.Algorithm(num_ppo_epochs=2, ema=0.9))
    policy = gpt2()
    policy.transformer.wte.weight.requires_grad_(False)
    stream = build(settings, policy)
    objective, name = stream.objective, "transformer.h.0.mlp.c_fc.weight"
    expected = policy.get_parameter(name).detach().clone()
    for step in range(4):
        optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.3)
        learn(stream, optimizer, [step])
        expected = 0.9 * expected + 0.1 * policy.get_parameter(name).detach()
    average = objective.average
    assert "transformer/wte/weight" not in dict(average.named_buffers())
    torch.testing.assert_close(average.get_buffer(name.replace(".", "/")), expected, rtol=1e-6, atol=1e-7)
    live = copy.deepcopy(policy.state_dict())
    with objective.handed_over():
        assert torch.equal(policy.get_parameter(name), average.get_buffer(name.replace(".", "/")))
        assert not torch.equal(policy.get_parameter(name), live[name])
    assert all(torch.equal(x, live[key]) for key, x in policy.state_dict().items())


def test_an_average_comes_back_even_after_an_error():
    model = torch.nn.Linear(2, 2)
    average, live = ema.Average(model, 0.5), model.weight.detach().clone()
    average.get_buffer("weight").zero_()
    with pytest.raises(ZeroDivisionError), average.in_place_of(model):
        assert not model.weight.any()
        _ = 1 / 0
    assert torch.equal(model.weight, live)


# ---------------------------------------------------------------------------------------------------- pretraining text


class Documents:
    """Seven packed rows, some with padding, as `fledge.data.text.Packed` has them."""

    def __init__(self):
        g = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 11, (7, 9), generator=g)
        document = torch.ones_like(ids)
        for row in range(7):
            document[row, 2 + row % 4 :] = 2
            document[row, 9 - row % 3 :] = 0
        position = torch.stack([torch.cat([torch.arange(int((row == n).sum())) for n in row.unique_consecutive()])
                                for row in document])  # fmt: skip
        same = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] > 0)
        labels = F.pad(torch.where(same, ids[:, 1:], -100), (0, 1), value=-100)
        self.batch = {"input_ids": ids, "document": document, "position": position, "labels": labels}

    def __len__(self):
        return 7

    def rows(self, ids):
        return {name: x[ids] for name, x in self.batch.items()}


def with_text(k=2, coef=1.7, **kw):
    stream = build(config(batch=12), dtype=torch.float64, **kw)
    text = ptx.Text.__new__(ptx.Text)
    text.k, text.seed, text.packed = k, 0, Documents()
    stream.text = text
    return stream, ppo.PPO(stream.objective.policy, stream.objective.value, stream.objective.config, 0.7, coef)


def test_text_adds_the_gradient_of_its_own_token_mean():
    """Two separate backwards: PPO alone, and every document alone without padding or packing."""
    stream, objective = with_text()
    roll(stream)
    batch = stream.fetch(stream.ids(0), 0)
    assert batch["ptx_labels"].shape == (12, 2, 9)
    means = backward(objective, [batch], 0)
    together = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    backward(stream.objective, [{k: x for k, x in batch.items() if not k.startswith("ptx_")}], 0)
    nats, tokens = torch.zeros((), dtype=torch.float64), 0
    for ids, document in zip(batch["ptx_input_ids"].flatten(0, 1), batch["ptx_document"].flatten(0, 1), strict=True):
        for number in (1, 2):
            alone = ids[document == number]
            if len(alone) > 1:
                logp = objective.policy(alone[None, :-1]).logits[0].log_softmax(-1)
                nats = nats - logp.gather(1, alone[1:, None]).sum()
                tokens += len(alone) - 1
    (1.7 * nats / tokens).backward()
    assert means["ptx_loss"].item() == pytest.approx(nats.item() / tokens, rel=1e-12)
    for name, p in objective.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_text_may_be_cut_with_its_answers(micro_batch):
    stream, objective = with_text()
    roll(stream)
    batch = stream.fetch(stream.ids(0), 0)
    backward(objective, [batch], 0)
    whole = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    backward(objective, [rows_of(batch, piece) for piece in share(12, 0, 1, micro_batch)[1]], 0)
    for name, p in objective.named_parameters():
        torch.testing.assert_close(whole[name], p.grad, rtol=1e-9, atol=1e-12)


def test_each_text_stands_once_in_every_pass_whatever_the_ranks():
    stream, _ = with_text(k=1)
    stream.batch, stream.minibatches, stream.updates = 4, 3, 6
    roll(stream)
    seen = [batch["ptx_input_ids"] for step in range(6) for batch in [stream.fetch(stream.ids(step), step)]]
    rows = [tuple(row) for row in torch.cat(seen).flatten(0, 1).tolist()]
    counts = {row: rows.count(row) for row in set(rows)}
    assert len(rows) == 24 and len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1
    ids = stream.ids(4)
    halves = [stream.fetch(ids[:2], 4), stream.fetch(ids[2:], 4)]
    whole = stream.fetch(ids, 4)["ptx_input_ids"].tolist()
    assert sorted(whole) == sorted(row for half in halves for row in half["ptx_input_ids"].tolist())


# --------------------------------------------------------------------------------------------------------- generators


class Transformers:
    """A second generator: `generate` of transformers, greedy."""

    def __init__(self, policy, tokenizer, settings):
        self.policy, self.tokenizer, self.settings = policy, tokenizer, settings

    def __call__(self, prompts, seeds, inputs):
        said = torch.zeros(len(prompts), self.settings.max_new_tokens, dtype=torch.long)
        mask = torch.zeros_like(said)
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            out = self.policy.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.settings.max_new_tokens,
                do_sample=False, eos_token_id=EOS, pad_token_id=0,
            )[0, len(prompt) :]  # fmt: skip
            said[row, : len(out)], mask[row, : len(out)] = out, 1
        return said, mask


def greedy(policy, tokenizer, settings):
    return rollout.Sampler(policy, tokenizer, max_new_tokens=6, temperature=0.0, precision="fp32", rows=5)


def test_another_generator_gives_the_same_rollout():
    def rolled(generator):
        name = f"tests.align.test_rollouts:{generator}"
        settings = config(rollout=ppo.Rollout(batch=12, max_new_tokens=6, temperature=0.7, generator=name))
        return roll(build(settings, gpt2(15)))  # whose greedy answers end early, late and not at all

    ours, theirs = rolled("greedy"), rolled("Transformers")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, msg=name)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (([[4, EOS, 0]] * 3, [[1, 1, 0]] * 3), r"owes \(rows, T\) = \[12, 6\]"),
        (([[4, EOS, 0, 0, 0, 0]] * 12, [[1, 0, 1, 0, 0, 0]] * 12), "a run of 1s"),
        (([[4, EOS, 0, 0, 0, 0]] * 12, [[0] * 6] * 12), "a run of 1s"),
        (([[4, EOS, 5, 5, 5, 5]] * 12, [[1] * 6] * 12), "goes on behind its end-of-sequence"),
        (([[4, 5, 0, 0, 0, 0]] * 12, [[1, 1, 0, 0, 0, 0]] * 12), "neither ends"),
    ],
)
def test_a_generator_that_owes_something_is_an_error_that_says_what(said, words):
    stream = build(config())
    stream.config = stream.config.model_copy(update={"generator": "mine:make"})
    stream.generate = lambda prompts, seeds, inputs: tuple(map(torch.tensor, said))
    with pytest.raises(RunError, match=f"mine:make gave.*{words}"):
        stream.begin(0)


def test_a_generator_sees_prompts_as_they_are_and_seeds_that_tell_rows_apart():
    asked = []

    def generate(prompts, seeds, inputs):
        asked.append((prompts, seeds))
        said = torch.full((len(prompts), 6), EOS)
        return said, F.pad(torch.ones(len(prompts), 1, dtype=torch.long), (0, 5))

    stream = build(config())
    stream.generate = generate
    for step in (0, 6):
        stream.begin(step)
    (prompts, seeds), (_, later) = asked
    assert prompts == [PROMPTS[i] for i in stream.prompt_ids(0)]
    assert len({*seeds, *later}) == 24
    assert isinstance(stream.tokenizer, Words)
