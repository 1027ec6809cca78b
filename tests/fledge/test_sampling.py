"""The sampler against a plain loop without a cache, against transformers' greedy search, and against its own logits."""

import pytest
import torch

from fledge.models.sampling import choose, left_pad, position_ids, sample, stream

EOS, PAD = 3, 0


def tiny(arch, **kw):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if arch == "gpt2":
        config = GPT2Config(vocab_size=13, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, **kw)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.3, **kw,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = [[5, 6, 7, 8], [9], [4, 10, 11], [12, 2]]


def settings(**kw):
    return {"max_new_tokens": 9, "seeds": list(range(len(PROMPTS))), "eos_id": EOS, "pad_id": PAD, **kw}


def uncached(model, prompt, seed, temperature, max_new_tokens):
    """One row alone: no padding, no cache, the same uniform numbers."""
    uniform = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed))
    ids = list(prompt)
    for t in range(max_new_tokens):
        logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(choose(logits, uniform[t : t + 1], temperature).item())
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@torch.no_grad()
def test_every_row_speaks_as_if_it_were_alone(arch, temperature):
    model = tiny(arch)
    ids, mask = sample(model, *left_pad(PROMPTS, PAD), temperature=temperature, **settings())
    for row, prompt in enumerate(PROMPTS):
        alone = uncached(model, prompt, row, temperature, 9)
        assert ids[row, : len(alone)].tolist() == alone
        assert mask[row].tolist() == [1] * len(alone) + [0] * (9 - len(alone))
        assert (ids[row, len(alone) :] == PAD).all()
    if temperature:
        assert len(set(mask.sum(1).tolist())) > 1, "the rows should end at different times"


def test_greedy_is_transformers_greedy():
    model = tiny("gpt2")
    input_ids, attention_mask = left_pad(PROMPTS, PAD)
    theirs = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=9, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
    )[:, input_ids.shape[1] :]
    ours, _ = sample(model, input_ids, attention_mask, temperature=0, **settings())
    assert torch.equal(ours[:, : theirs.shape[1]], theirs)


def test_order_padding_and_pad_id_change_nothing():
    model = tiny("gpt2")
    ids, mask = sample(model, *left_pad(PROMPTS, PAD), **settings())
    order = [2, 0, 3, 1]
    moved, moved_mask = sample(
        model, *left_pad([PROMPTS[i] for i in order], PAD), **settings(seeds=[settings()["seeds"][i] for i in order])
    )
    assert torch.equal(moved, ids[order]) and torch.equal(moved_mask, mask[order])
    input_ids, attention_mask = left_pad(PROMPTS, EOS)
    wide = [torch.nn.functional.pad(x, (3, 0), value=v) for x, v in ((input_ids, EOS), (attention_mask, 0))]
    again, again_mask = sample(model, *wide, **settings(pad_id=EOS))
    assert torch.equal(again_mask, mask) and torch.equal(again * mask, ids * mask)


def test_draws_have_the_softmax_as_their_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
        allowed = logits if top_k is None else logits.masked_fill(logits < 1.0, -torch.inf)
        drawn = choose(logits.expand(20_000, -1), uniform, temperature, top_k).bincount(minlength=5) / 20_000
        torch.testing.assert_close(drawn, (allowed[0] / temperature).softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_uniform_number_takes_a_token_that_exists(dtype):
    logits = torch.full((1, 50_000), -3.0, dtype=dtype)
    logits[0, -7:] = -torch.inf
    assert choose(logits, torch.tensor([1 - 2**-24]), 1.0).item() < 50_000 - 7
    assert choose(logits, torch.tensor([0.0]), 1.0).item() == 0


def test_positions_start_at_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3], [0, 1, 1, 1]]


def test_without_an_end_token_every_row_is_full():
    _, mask = sample(tiny("llama"), *left_pad(PROMPTS), **settings(eos_id=None))
    assert mask.all()


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_says_what_sample_says(arch, temperature):
    model = tiny(arch)
    ids, mask = sample(model, *left_pad(PROMPTS, PAD), temperature=temperature, **settings())
    for row, prompt in enumerate(PROMPTS):
        said = stream(model, prompt, max_new_tokens=9, seed=row, temperature=temperature, eos_ids={EOS})
        assert list(said) == ids[row][mask[row].bool()].tolist()
