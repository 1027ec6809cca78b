"""Sampling from a causal language model, with a cache of keys and values and one generator a row.

B rows, P prompt positions (padded on the left), T new tokens, V vocabulary. What a row says depends on its own prompt
and seed alone: not on its neighbours, their order or their padding (beyond the rounding of the forward).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def position_ids(attention_mask: Tensor) -> Tensor:
    """0, 1, 2, … over the real tokens of each row, wherever its padding stands (padding itself: 0). (B, S) -> (B, S)"""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of any lengths -> input_ids (B, P) and attention_mask (B, P), 1 = real. The prompts end in one column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if prompt:
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
    return ids, mask


@torch.no_grad()
def sample(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    inputs: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue every prompt until it ends itself or ``max_new_tokens`` are said.

    Args:
        model: a causal LM of transformers in eval mode.
        input_ids, attention_mask: (B, P), padded on the left; 1 = real.
        seeds: one a row.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: sample among the k most probable tokens only; None: among all.
        eos_id: the token that ends a response; None: none does.
        pad_id: what stands after the end. Only the mask says what is real.
        inputs: what the prompts bring beside ids, such as pixel_values, (B, …) each; the model sees it with the
            prompt, and the cache remembers it.

    Returns:
        ids (B, T) and response_mask (B, T), 1 through the end-of-sequence token inclusive, T = max_new_tokens.
    """
    B, T = len(input_ids), max_new_tokens
    ids = torch.full((B, T), pad_id, dtype=torch.long, device=input_ids.device)
    response_mask = torch.zeros_like(ids)
    uniform = torch.stack([torch.rand(T, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniform = uniform.to(input_ids.device)  # drawn on the CPU: the same numbers on every device

    rows = torch.arange(B, device=input_ids.device)  # the rows that go on
    feed, seen, positions, cache = input_ids, attention_mask, position_ids(attention_mask), None
    more = inputs or {}
    for t in range(T):
        out = model(
            input_ids=feed,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        tokens = choose(out.logits[:, -1], uniform[rows, t], temperature, top_k)  # (rows,)
        ids[rows, t], response_mask[rows, t] = tokens, 1
        cache, more = out.past_key_values, {}
        going = tokens != eos_id if eos_id is not None else torch.ones_like(tokens, dtype=torch.bool)
        if not going.all():  # rows that ended cost nothing from here on
            rows, tokens, seen, positions = rows[going], tokens[going], seen[going], positions[going]
            if not len(rows):
                break
            cache.batch_select_indices(going.nonzero().flatten())
        feed, positions = tokens[:, None], positions[:, -1:] + 1
        seen = torch.cat([seen, torch.ones_like(feed)], dim=1)
    return ids, response_mask


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """The token at which the cumulated probability passes ``uniform``. (B, V), (B,) in [0, 1) -> (B,)

    One uniform number a token, whatever V is; a token of probability 0 is never taken.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # double where there is one, so that the sum of a large vocabulary keeps its small terms
    logits = logits.float() if logits.device.type == "mps" else logits.double()
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulated = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    # Kept below 1 by more than a rounding error: at the total itself no token would pass.
    target = uniform.to(logits.dtype).clamp(max=1 - 2**-22)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).squeeze(1)


@torch.no_grad()
def stream(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that ``sample`` says to one prompt, each as soon as it is known, through the first of ``eos_ids``."""
    uniform = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(model.device)
    feed, cache = torch.tensor([list(prompt)], device=model.device), None
    for t in range(max_new_tokens):
        out = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = choose(out.logits[:, -1], uniform[t : t + 1], temperature, top_k)
        yield int(token)
        if int(token) in eos_ids:
            return
        feed, cache = token[:, None], out.past_key_values
