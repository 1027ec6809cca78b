"""PPO of a policy that sees: pictures reach generation, policy, reference, value and reward, row by row, and count.

A tiny LLaVA and three prompts with the same words and another picture each; right is the token of its colour. The best
policy and the best blind one are known in closed form.
"""

import copy
import math

import torch
from torch import nn

from align import actors, ppo, rollout
from tests.align.test_ppo import Prompts, Score, Words, config, gradient_step

V, IMAGE, COLOURS = 8, 7, [4, 5, 6]
PROMPT = [IMAGE, 3]


class NoImage(nn.Module):
    """A head that never says the token in whose place a picture stands."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, torch.tensor([IMAGE]), -torch.inf)


class Pictures(Prompts):
    """Every prompt has one red, green or blue pixel field; ``asked`` keeps what was read."""

    def inputs(self, ids):
        colours = torch.tensor(ids) % 3
        return {"pixel_values": nn.functional.one_hot(colours, 3)[:, :, None, None].expand(-1, 3, 4, 4).float()}


def llava(seed=0):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    )
    model.lm_head = NoImage(model.lm_head)
    return model.eval()


def right_colour(records, texts, batch):
    said = torch.tensor([int(text.split()[0]) for text in texts])
    return (said == torch.tensor(COLOURS)[batch["inputs.pixel_values"][:, :, 0, 0].argmax(1)]).float()


def build(scorer, tokens=1, rows=24, **kw):
    settings = config(
        rollout=ppo.Rollout(batch=rows, max_new_tokens=tokens, temperature=1.0, missing_eos_penalty=None),
        ppo=ppo.Algorithm(vf_coef=0.5),
        train=ppo.Train(batch=rows, steps=1, precision="fp32", **kw),
        kl=ppo.KL(coef=0.3),
    )
    policy = llava()
    value = rollout.ValueModel(copy.deepcopy(policy.base_model), rollout.value_head(16, "zero"))
    objective = ppo.PPO(policy, value, settings.ppo, 1.0)
    words = Words(eos_token_id=None)
    return ppo.Rollouts(objective, copy.deepcopy(policy), Pictures([PROMPT] * 3), Score(scorer), words, settings)


@torch.no_grad()
def table(model):
    """log π of each first token for each picture, (3, V)."""
    ids = torch.tensor([PROMPT] * 3)
    return model(input_ids=ids, **Pictures([]).inputs([0, 1, 2])).logits[:, -1].double().log_softmax(-1)


def test_a_seeing_policy_comes_to_its_optimum_which_no_blind_one_can():
    stream, beta = build(right_colour, rows=48), 0.3
    optimizer = torch.optim.Adam(stream.objective.parameters(), lr=3e-3, eps=1e-5)
    reward = nn.functional.one_hot(torch.tensor(COLOURS), V).double()  # (3, V)
    before = table(stream.reference)
    steps = 40 * stream.updates
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        gradient_step(stream, optimizer, step)
    after = table(stream.objective.policy)

    def J(log_policy):
        said = log_policy > -math.inf
        return torch.where(said, log_policy.exp() * (reward - beta * (log_policy - before)), 0.0).sum(1).mean().item()

    best = beta * torch.logsumexp(before + reward / beta, dim=1).mean().item()
    blind = beta * torch.logsumexp((before + reward / beta).mean(0), dim=0).item()
    assert J(after) <= best + 1e-6
    assert J(after) > blind
    assert (J(after) - J(before)) / (best - J(before)) >= 0.95
    assert torch.equal(table(stream.reference), before)


def test_only_what_a_gradient_reaches_learns():
    """Brute force: a backward. DDP would wait for the gradients of the others."""
    for value in (actors.Value(init="policy", head="zero"), actors.Value(init="policy", head="normal")):
        stream = build(right_colour)
        policy = llava()
        cast = actors.four_models(policy, {}, None, value)
        found = actors.reached(cast, {"input_ids": torch.tensor([PROMPT]), **stream.prompts.inputs([0])})
        objective = ppo.PPO(found.policy, found.value, stream.objective.config, 1.0)
        stream.objective = objective
        stream.generate.policy = found.policy
        stream.begin(0)
        batch = stream.fetch(stream.ids(0), 0)
        out = objective(batch, 0)
        (out["policy_loss"] + out["value_loss"]).backward()
        learning = {id(p) for p in [*found.policy_parameters, *found.value_parameters]}
        for name, parameter in objective.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad == (id(parameter) in learning), name
        unread = [name for name, p in found.policy.named_parameters() if not p.requires_grad]
        assert unread and all("post_layernorm" in name for name in unread)


def test_pictures_stand_beside_their_own_rows_everywhere_and_in_no_save():
    seen = []

    def scorer(records, texts, batch):
        seen.append(torch.tensor([record["id"] % 3 for record in records]))
        assert torch.equal(batch["inputs.pixel_values"][:, :, 0, 0].argmax(1), seen[0])
        return torch.zeros(len(records))

    stream = build(scorer, tokens=3, micro_batch=5)
    stream.begin(0)
    assert not any(name.startswith("inputs.") for name in stream.state()[0])
    r, chosen = stream.rollout, stream.prompt_ids(0)
    for model, name in ((stream.objective.policy, "old_logprobs"), (stream.objective.value, "old_values")):
        for row in range(0, 24, 5):  # each alone, with its own picture
            ids, pixels = r["input_ids"][row][None], stream.prompts.inputs([chosen[row]])
            with torch.no_grad():
                if name == "old_logprobs":
                    logp = model(input_ids=ids, **pixels).logits[0].log_softmax(-1)
                    expected = logp[1:-1].gather(1, ids[0, 2:, None])[:, 0]
                else:
                    expected = model(ids, **pixels)[0, 1:-1]
            torch.testing.assert_close(r[name][row], expected, atol=1e-5, rtol=1e-5)
    step = 0
    batch = stream.fetch(stream.ids(step), step)
    colours = batch["inputs.pixel_values"][:, :, 0, 0].argmax(1)
    out = stream.objective(batch, step)
    assert out["approxkl"].abs() < 1e-5 and len(colours.unique()) == 3
    wrong = {**batch, "inputs.pixel_values": batch["inputs.pixel_values"].roll(1, 1)}
    assert stream.objective(wrong, step)["approxkl"] > 1e-3  # it does look
