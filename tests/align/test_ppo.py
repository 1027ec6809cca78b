"""PPO: ratio 1 at first, nothing moves that must not, a save is exact, and a known optimum is found."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from align import ppo, rollout, scorers
from fledge.train import autocast

V, EOS, PAD = 11, 2, 0


class Words:
    """A tokenizer's decoding: every id is a word."""

    def __init__(self, eos_token_id=EOS, pad_token_id=PAD):
        self.eos_token_id, self.pad_token_id = eos_token_id, pad_token_id

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(str(i) for i in row) for row in rows]


class Prompts:
    def __init__(self, ids):
        self.ids, self.records = ids, [{"id": i} for i in range(len(ids))]

    def __len__(self):
        return len(self.ids)

    def inputs(self, ids):
        return {}


class Score(scorers.Scorer):
    """A function of (records, responses, batch)."""

    def __init__(self, function):
        self.function = function

    def figures(self, records, texts, batch):
        return {"score": self.function(records, texts, batch)}


PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10], [5, 5, 5], [4, 8, 9], [10]]


def gpt2(seed=0, vocab=V, **kw):
    """Dropout is configured everywhere; PPO must not feel it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    # tied embeddings at random would repeat the prompt and never end an answer
    specials = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}
    return spread(GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **{**sizes, **specials, **kw})))


def spread(model):
    """Flatter distributions than random weights give, so that every token, the end among them, is said."""
    model.lm_head.weight.data *= 0.5
    return model


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, initializer_range=0.2, attention_dropout=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return spread(LlamaForCausalLM(config))


def reward(records, texts):
    """Likes 7, dislikes length; differs by prompt."""
    return [text.split().count("7") - 0.1 * len(text.split()) + 0.01 * r["id"] for r, text in zip(records, texts)]  # noqa: B905


def config(batch=4, rows=12, **kw):
    sections = {
        "rollout": ppo.Rollout(batch=rows, max_new_tokens=6, temperature=0.7),
        "ppo": ppo.Algorithm(num_ppo_epochs=2),
        "train": ppo.Train(batch=batch, steps=12, precision="fp32"),
    }
    return ppo.Config(**{**sections, **kw})


def build(settings, policy=None, tokenizer=None, prompts=None, dtype=torch.float32, scorer=None):
    policy = (policy or gpt2()).to(dtype)
    reference = copy.deepcopy(policy).eval()
    value = rollout.ValueModel(copy.deepcopy(policy.base_model), rollout.value_head(16, "normal"))
    torch.manual_seed(7)
    nn.init.normal_(value.head.weight, std=0.3)
    objective = ppo.PPO(policy, value.to(dtype), settings.ppo, settings.rollout.temperature)
    scorer = scorer or scorers.FunctionScorer(reward, "reward")
    return ppo.Rollouts(objective, reference, Prompts(prompts or PROMPTS), scorer, tokenizer or Words(), settings)


def roll(stream):
    """A rollout with answers that end themselves and answers that are cut, of several lengths."""
    stream.begin(0)
    ended, lengths = stream.rollout["objective/ended"], stream.rollout["objective/length"]
    assert 0 < ended.sum() < len(ended) and len(lengths.unique()) > 2
    return stream.rollout


def gradient_step(stream, optimizer, step, micro_batches=1):
    """The loop in ten lines: the independent reference of the update."""
    stream.begin(step)
    batch = stream.fetch(stream.ids(step), step)
    objective, counts = stream.objective, stream.objective.counts(batch)
    optimizer.zero_grad()
    for part in range(micro_batches):
        piece = {name: x[part::micro_batches] for name, x in batch.items()}
        out = objective(piece, step)
        sum(weight * out[name] / counts[name] for name, weight in objective.weights.items()).backward()
    optimizer.step()
    return {name: x / counts[name] for name, x in out.items()}


# ------------------------------------------------------------------------------------------------ the first update


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_ratio_is_one_and_kl_zero_at_the_first_update(make, temperature):
    settings = config(rollout=ppo.Rollout(batch=12, max_new_tokens=6, temperature=temperature))
    stream = build(settings, make())
    roll(stream)
    stream.objective.train()  # as the loop does; dropout must stay off
    for step in range(3):  # all minibatches of the first PPO epoch
        batch = ppo.trim(stream.fetch(stream.ids(step), step))
        logprobs = stream.objective.logprobs(stream.objective.policy, batch)
        ratio = (logprobs - batch["old_logprobs"]).exp()[batch["response_mask"].bool()]
        assert (ratio - 1).abs().max() <= 1e-5
        out = stream.objective(batch, step)
        assert out["clipfrac"] == 0 and out["approxkl"].abs() <= 1e-5
    assert stream.rollout["objective/kl"].abs().max() <= 1e-5


def test_the_rows_of_a_minibatch_are_its_ids_the_longest_first():
    stream = build(config(), llama())
    rollout = roll(stream)
    for step in range(3):
        ids = stream.ids(step)
        batch = stream.fetch(ids, step)
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        assert lengths == sorted(rollout["attention_mask"][ids].sum(dim=1).tolist(), reverse=True)
        assert sorted(batch["returns"].sum(dim=1).tolist()) == sorted(rollout["returns"][ids].sum(dim=1).tolist())


@torch.no_grad()
@pytest.mark.parametrize("make", [gpt2, llama])
def test_ratio_is_near_one_at_the_first_update_in_bf16(make):
    """Rows stand beside others than when they were rolled out, and so round otherwise; the KL is of the same pieces."""
    train = ppo.Train(batch=4, steps=12, precision="bf16", micro_batch=3)
    stream = build(config(train=train), make())
    roll(stream)
    assert (stream.rollout["objective/kl"] == 0).all()
    for step in range(3):
        batch = ppo.trim(stream.fetch(stream.ids(step), step))
        for piece in (slice(0, 1), slice(1, 4)):
            rows = {name: x[piece] for name, x in batch.items()}
            with autocast("bf16"):
                logprobs = stream.objective.logprobs(stream.objective.policy, rows)
                out = stream.objective(rows, step)
            assert logprobs.dtype == torch.float32
            ratio = (logprobs - rows["old_logprobs"]).exp()[rows["response_mask"].bool()]
            assert (ratio - 1).abs().max() <= 0.05
            assert out["clipfrac"] == 0 and out["approxkl"] / rows["response_mask"].sum() <= 1e-3


@torch.no_grad()
def test_old_logprobs_are_those_of_the_distribution_that_was_sampled():
    """Row by row, without padding, by log-softmax of the tempered logits."""
    stream = build(config())
    r, policy = roll(stream), stream.objective.policy
    P = r["input_ids"].shape[1] - r["response_mask"].shape[1]
    for row in range(12):
        length = int(r["response_mask"][row].sum())
        prompt = PROMPTS[stream.prompt_ids(0)[row]]
        response = r["input_ids"][row, P : P + length].tolist()
        logp = (policy(torch.tensor([prompt + response])).logits[0] / 0.7).log_softmax(-1)
        expected = [logp[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert r["old_logprobs"][row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        hidden = stream.objective.value.trunk(torch.tensor([prompt + response])).last_hidden_state[0]
        values = stream.objective.value.head(hidden).squeeze(1)[len(prompt) - 1 : -1]
        assert r["old_values"][row, :length].tolist() == pytest.approx(values.tolist(), abs=1e-5)
        assert EOS not in response[:-1] and (length == 6 or response[-1] == EOS)
    assert r["objective/ended"].tolist() == [
        float(EOS in row) for row in (r["input_ids"][:, P:] * r["response_mask"]).tolist()
    ]


def test_rewards_and_advantages_of_a_rollout_by_hand():
    settings = config(kl=ppo.KL(coef=0.3), ppo=ppo.Algorithm(num_ppo_epochs=2, gae_lambda=1.0))
    stream = build(settings)
    noise = torch.Generator().manual_seed(0)
    for parameter in stream.reference.parameters():  # a reference that differs, so that KL counts
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    r, kept, returns = roll(stream), [], {}
    texts = rollout.decode(stream.tokenizer, r)
    with torch.no_grad():
        ref = stream.objective.logprobs(stream.reference, r)
    for row in range(12):
        length = int(r["response_mask"][row].sum())
        score = reward([stream.prompts.records[stream.prompt_ids(0)[row]]], [texts[row]])[0]
        score = score if r["objective/ended"][row] else -1.0
        log_ratios = (r["old_logprobs"] - ref)[row, :length].tolist()
        for t in range(length):  # lambda 1: the return is what is still to come
            returns[row, t] = score - 0.3 * sum(log_ratios[t:])
            kept.append(returns[row, t] - r["old_values"][row, t].item())
        assert r["objective/kl"][row].item() == pytest.approx(sum(log_ratios), abs=1e-5)
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((a - mean) ** 2 for a in kept) / len(kept))
    for (row, t), expected in returns.items():
        assert r["returns"][row, t].item() == pytest.approx(expected, abs=1e-5)
        advantage = (expected - r["old_values"][row, t].item() - mean) / std
        assert r["advantages"][row, t].item() == pytest.approx(advantage, abs=1e-4)


def test_answers_are_drawn_at_the_temperature_of_the_rollout():
    settings = config(batch=4000, rollout=ppo.Rollout(batch=4000, max_new_tokens=1, temperature=0.4))
    stream = build(settings, prompts=[PROMPTS[0]])
    stream.begin(0)
    said = stream.rollout["input_ids"][:, -1].bincount(minlength=V) / 4000
    with torch.no_grad():
        logits = stream.objective.policy(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert (said - (logits / 0.4).softmax(-1)).abs().max() < 4 * math.sqrt(0.25 / 4000)
    assert (said - logits.softmax(-1)).abs().max() > 6 * math.sqrt(0.25 / 4000), "the test would not see the difference"


def test_losses_are_means_over_tokens_with_the_published_weights():
    """Token by token from logits of single rows, on a rollout whose old log-probabilities were moved."""
    stream = build(config(batch=12), dtype=torch.float64)
    batch = dict(roll(stream))
    objective = stream.objective
    assert objective.weights == {"policy_loss": 1.0, "value_loss": 0.1}
    batch["old_logprobs"] = batch["old_logprobs"] + 0.2
    batch["old_values"] = batch["old_values"] - 0.3
    out, counts = objective(batch, 0), objective.counts(batch)
    policy_loss = value_loss = tokens = 0
    for row in range(12):
        for t in range(int(batch["response_mask"][row].sum())):
            a, r, v = (batch[name][row, t].item() for name in ("advantages", "returns", "old_values"))
            policy_loss += max(-a * math.exp(-0.2), -a * max(math.exp(-0.2), 0.8))
            value_loss += 0.5 * max((v + 0.3 - r) ** 2, (v + 0.2 - r) ** 2)
            tokens += 1
    assert counts["policy_loss"] == counts["value_loss"] == counts["entropy"] == tokens
    assert counts["objective/kl"] == 12
    assert out["policy_loss"].item() / tokens == pytest.approx(policy_loss / tokens, abs=1e-5)
    assert out["value_loss"].item() / tokens == pytest.approx(value_loss / tokens, abs=1e-5)
    assert out["ratio"].item() / tokens == pytest.approx(math.exp(-0.2), abs=1e-5)


def test_score_after_eos_is_a_mode():
    """Where the answer ended early, the score stands one position on, and the value after its end takes part."""
    stream = build(config(ppo=ppo.Algorithm(num_ppo_epochs=2, reward_at="after_eos", gae_lambda=1.0)))
    r = roll(stream)
    early = (r["objective/length"] < 6).nonzero().flatten().tolist()
    P = r["input_ids"].shape[1] - 6
    for row in early:
        end = int(r["objective/length"][row])
        assert r["reward_mask"][row].sum() == end + 1 and r["response_mask"][row].sum() == end
        prompt = PROMPTS[stream.prompt_ids(0)[row]]
        answer = r["input_ids"][row, P : P + end].tolist()
        with torch.no_grad():
            hidden = stream.objective.value.trunk(torch.tensor([prompt + answer])).last_hidden_state[0, -1]
            assert r["old_values"][row, end].item() == pytest.approx(
                stream.objective.value.head(hidden).item(), abs=1e-5
            )
        assert r["returns"][row, end].item() == pytest.approx(r["objective/score"][row].item(), abs=1e-5)


# --------------------------------------------------------------------------------------- what must not matter


def gradient(stream, batch, micro_batches=1, pad=(0, 0), pad_id=PAD, order=None):
    objective = stream.objective
    objective.zero_grad()
    batch = {name: x if order is None else x[order] for name, x in batch.items()}
    counts = objective.counts(batch)
    for part in range(micro_batches):
        piece = {name: x[part::micro_batches] for name, x in batch.items()}
        sides = {name: pad if name in ("input_ids", "attention_mask") else (0, pad[1]) for name in piece}
        wide = {name: nn.functional.pad(x, sides[name]) if x.ndim == 2 else x for name, x in piece.items()}
        wide["input_ids"] = torch.where(wide["attention_mask"].bool(), wide["input_ids"], pad_id)
        out = objective(wide, 0)
        sum(weight * out[name] / counts[name] for name, weight in objective.weights.items()).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters()}


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batches": 2},
        {"micro_batches": 4},
        {"micro_batches": 5},
        {"pad": (3, 2)},
        {"pad_id": EOS},
        {"order": torch.arange(11, -1, -1)},
    ],
    ids=lambda change: next(iter(change)) + str(next(iter(change.values())))[:6],
)
def test_gradient_ignores_cutting_padding_and_order(change):
    """On one frozen rollout in float64: relative to the norm of each tensor's gradient, 1e-12."""
    stream = build(config(batch=12, kl=ppo.KL(coef=0.2)), dtype=torch.float64)
    batch = dict(roll(stream))
    noise = torch.randn(batch["old_logprobs"].shape, generator=torch.Generator().manual_seed(1))
    batch["old_logprobs"] = batch["old_logprobs"] + 0.3 * noise  # so that clipping decides somewhere
    whole = gradient(stream, batch)
    changed = gradient(stream, batch, **change)
    total = torch.cat([g.flatten() for g in whole.values()]).norm()
    for name, g in whole.items():
        assert (g - changed[name]).norm() <= 1e-12 * max(g.norm(), 1e-6 * total), name


def test_pad_may_be_eos_and_rows_may_be_cut():
    """The same rollout with pad = eos, and with other pieces of generation and scoring."""
    plain = build(config())
    roll(plain)
    same = build(config(), tokenizer=Words(pad_token_id=EOS))
    pieces = build(
        config(
            rollout=ppo.Rollout(batch=12, max_new_tokens=6, temperature=0.7, generate_batch=5),
            train=ppo.Train(batch=4, steps=12, precision="fp32", micro_batch=3),
        )
    )
    for other in (same, pieces):
        other.begin(0)
        for name, tensor in plain.rollout.items():
            if name == "input_ids":
                real = plain.rollout["attention_mask"]
                assert torch.equal(tensor * real, other.rollout[name] * real)
            elif tensor.ndim == 2 and tensor.is_floating_point():
                mask = plain.rollout["response_mask"].bool()
                torch.testing.assert_close(other.rollout[name][mask], tensor[mask], atol=1e-5, rtol=1e-5)
            else:
                torch.testing.assert_close(other.rollout[name], tensor, atol=1e-5, rtol=1e-5)


def test_an_answer_depends_on_seed_iteration_and_row_only():
    a, b = build(config()), build(config())
    a.begin(0), b.begin(0)
    assert torch.equal(a.rollout["input_ids"], b.rollout["input_ids"])
    b.begin(6)
    assert b.iteration == 1 and not torch.equal(a.rollout["input_ids"], b.rollout["input_ids"])
    seeds = [tuple(row) for row in a.rollout["input_ids"].tolist()]
    assert len(set(seeds)) > 8, "the same prompt twice gets two answers"


def test_a_new_iteration_brings_new_answers_to_the_same_prompt():
    stream = build(config(), prompts=[PROMPTS[0]])
    stream.begin(0)
    first = stream.rollout["input_ids"]
    stream.begin(6)
    assert not torch.equal(first, stream.rollout["input_ids"])


def test_every_pass_over_the_prompts_sees_each_once():
    stream = build(config(rows=8, batch=4))
    seen = [i for iteration in range(6) for i in stream.prompt_ids(iteration)]
    for start in range(0, 48, 6):
        assert sorted(seen[start : start + 6]) == list(range(6))


def test_minibatches_cover_the_rollout_once_an_epoch():
    stream = build(config())
    stream.begin(0)
    assert stream.updates == 6
    for epoch in range(2):
        ids = [i for k in range(3) for i in stream.ids(3 * epoch + k)]
        assert sorted(ids) == list(range(12))
    assert stream.ids(0) != stream.ids(3)


# ------------------------------------------------------------------------------------------------------------ saves


def test_a_save_in_the_middle_of_a_rollout_is_exact():
    """Stopped after any update and rebuilt from parameters, optimiser and stream state: bitwise the same weights."""
    settings = config(kl=ppo.KL(coef=0.15, target=0.5, horizon=50))

    def fresh():
        stream = build(settings)
        return stream, torch.optim.AdamW(stream.objective.parameters(), lr=1e-2)

    def run(stream, optimizer, steps):
        return [gradient_step(stream, optimizer, step)["policy_loss"].item() for step in steps]

    stream, optimizer = fresh()
    losses = run(stream, optimizer, range(14))
    for stop in (1, 6, 8):
        first, first_optimizer = fresh()
        start = run(first, first_optimizer, range(stop))
        tensors, state = copy.deepcopy(first.state())
        second, second_optimizer = fresh()
        second.objective.load_state_dict(first.objective.state_dict())
        second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
        second.load(tensors, state)
        assert start + run(second, second_optimizer, range(stop, 14)) == losses
        assert second.kl_coef == stream.kl_coef != 0.15
        for a, b in zip(stream.objective.parameters(), second.objective.parameters(), strict=True):
            assert torch.equal(a, b)


def test_frozen_models_are_not_in_the_objective():
    stream = build(config())
    names = {name.split(".")[0] for name in stream.objective.state_dict()}
    assert names == {"policy", "value"}


# ---------------------------------------------------------------------------------------------------------- rewards


@torch.no_grad()
def test_a_reward_model_is_read_at_the_last_real_token_and_calibrated():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(3)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=V, num_labels=1, pad_token_id=PAD, bos_token_id=None, eos_token_id=None, **sizes)
    ).eval()
    model.config.reward_offset, model.config.reward_scale = 0.25, 3.0
    scorer = scorers.ModelScorer(model, "fp32", 5)
    for tokenizer in (Words(), Words(pad_token_id=EOS)):
        stream = build(config(), tokenizer=tokenizer, scorer=scorer)
        r = roll(stream)
        for row in range(12):
            alone = r["input_ids"][row][r["attention_mask"][row].bool()][None]  # ends in its EOS or its last token
            # not model(alone): it takes a pad id that the policy said for padding
            raw = model.score(model.transformer(alone).last_hidden_state[0, -1]).item()
            assert r["objective/score"][row].item() == pytest.approx((raw - 0.25) * 3.0, abs=1e-4)
    from fledge.models import reward_model

    head = reward_model.calibrated_head(model)
    hidden = torch.randn(4, 16)
    torch.testing.assert_close(head(hidden), (model.score(hidden) - 0.25) * 3.0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda r, t: [0.0], r"mine:score gave scores of shape \(1,\) for 12 responses"),
        (lambda r, t: torch.zeros(len(t), 1), r"shape \(12, 1\) for 12"),
        (lambda r, t: [float("nan")] * len(t), "mine:score is nan for the response"),
        (lambda r, t: [math.inf] * len(t), "is inf for the response"),
        (lambda r, t: None, "gave NoneType"),
        (lambda r, t: ["good"] * len(t), "gave list"),
        (lambda r, t: 1 / (12 - len(t)), "raised ZeroDivisionError: .* for 12 responses together"),
        (lambda r, t: [1 / (row["id"] != 1) for row in r], "ZeroDivisionError: division by zero at row"),
    ],
)
def test_a_bad_reward_is_an_error_that_names_it(function, words):
    from fledge.errors import RunError

    with pytest.raises(RunError, match=words):
        build(config(), scorer=scorers.FunctionScorer(function, "mine:score")).begin(0)


def test_a_reward_is_found_by_name():
    from fledge.errors import InputError

    assert scorers.callable_of("math:sqrt", "reward") is math.sqrt
    for name in ("math", "math:no_such", "no_such_module_x:f", ":f", "math:pi"):
        with pytest.raises(InputError, match="reward"):
            scorers.callable_of(name, "reward")


def test_value_heads_of_the_references():
    assert not rollout.value_head(400, "zero").weight.any()
    torch.manual_seed(0)
    spread = torch.cat([rollout.value_head(400, "normal").weight for _ in range(50)]).std().item()
    assert spread == pytest.approx(1 / math.sqrt(401), rel=0.02)


# ------------------------------------------------------------------------------------------------------ known optimum


def enumerate_policy(model, prompts, vocab, T, temperature=1.0):
    """log π of every response to every prompt by plain forwards: (prompts, vocab ** T), and the responses."""
    every = torch.tensor(list(itertools.product(range(vocab), repeat=T)))
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.cat([torch.tensor([prompt]).expand(len(every), -1), every], dim=1)
            logp = (model(ids).logits.double() / temperature).log_softmax(-1)[:, len(prompt) - 1 : -1]
            rows.append(logp.gather(2, every[:, :, None])[:, :, 0].sum(1))
    return torch.stack(rows), every


def optimise(seed, beta=0.5, iterations=120, symbols=4, T=3, lr=3e-3, temperature=1.0, rows=256):
    """(J of the reference, J of the trained policy, the attainable J*), all by enumeration."""
    prompts = [[0], [1], [2]]
    policy = gpt2(seed, symbols, n_positions=8, n_embd=32, initializer_range=0.1)
    policy.eval()
    log_ref, every = enumerate_policy(policy, prompts, symbols, T, temperature)
    g = torch.Generator().manual_seed(seed)
    table = 0.5 * torch.randn(log_ref.shape, generator=g, dtype=torch.float64) + 0.4 * (every == symbols - 1).sum(1)
    column = {" ".join(map(str, row)): i for i, row in enumerate(every.tolist())}

    def look_up(records, texts):
        return [table[r["id"], column[text]].item() for r, text in zip(records, texts, strict=True)]

    settings = config(
        rollout=ppo.Rollout(batch=rows, max_new_tokens=T, temperature=temperature, missing_eos_penalty=None),
        kl=ppo.KL(coef=beta),
        ppo=ppo.Algorithm(vf_coef=0.5),
        train=ppo.Train(batch=rows, steps=1, precision="fp32"),
    )
    value = rollout.ValueModel(
        gpt2(seed + 1, symbols, n_positions=8, n_embd=32, initializer_range=0.1).transformer,
        rollout.value_head(32, "zero"),
    )
    objective = ppo.PPO(policy, value, settings.ppo, temperature)
    stream = ppo.Rollouts(
        objective,
        copy.deepcopy(policy),
        Prompts(prompts),
        scorers.FunctionScorer(look_up, "table"),
        Words(eos_token_id=None),
        settings,
    )
    optimizer = torch.optim.Adam(objective.parameters(), lr=lr, eps=1e-5)
    steps = iterations * stream.updates
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        gradient_step(stream, optimizer, step)

    def J(log_policy):
        return (log_policy.exp() * (table - beta * (log_policy - log_ref))).sum(1).mean().item()

    best = beta * torch.logsumexp(log_ref + table / beta, dim=1).mean().item()
    return J(log_ref), J(enumerate_policy(policy, prompts, symbols, T, temperature)[0]), best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_known_optimum_is_reached_and_never_passed(seed):
    """J = E[r] - β KL is greatest at π_ref exp(r / β) / Z, where it is β log Z."""
    start, found, best = optimise(seed)
    assert found <= best + 1e-6
    assert (found - start) / (best - start) >= 0.95
