"""The same frozen rollout through TRL 1.12's own PPOTrainer.train and through ours, in the mode that reproduces it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import ppo, rollout
from fledge.optim import Optim
from fledge.stream import rows_of, share
from fledge.train import update
from tests.align.test_ppo import Score

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODES = {"k1": {}, "k3_whitened_rewards": {"estimator": "k3", "whiten_rewards": True}}


class Frozen:
    """Prompts with answers and scores that are given, as tokenizer, prompts, generator and scorer see them."""

    def __init__(self, said, scores, width, pad, eos):
        self.pad_token_id, self.eos_token_id = pad, eos
        prompts, responses = said[:, :width], said[:, width:]
        self.ids = [[i for i in row if i != pad] for row in prompts.tolist()]
        self.records = [{"row": row} for row in range(len(said))]
        self.responses, self.scores = responses, scores

    def __len__(self):
        return len(self.ids)

    def inputs(self, ids):
        return {}

    def batch_decode(self, rows, **options):
        return ["" for _ in rows]

    def generate(self, prompts, seeds, inputs):
        said = self.responses[[self.ids.index(prompt) for prompt in prompts]]
        return said, (said != self.pad_token_id).long()

    def score(self, records, texts, batch):
        return self.scores[[record["row"] for record in records]]


@pytest.mark.parametrize("micro_batch", [8, 3])
@pytest.mark.parametrize("mode", MODES)
def test_three_updates_end_in_the_same_parameters(mode, micro_batch):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_default_dtype(torch.float64)
    try:
        found = load_file(FIXTURES / "trl_ppo.safetensors")
        about = json.loads((FIXTURES / "trl_ppo.json").read_text())
        frozen = Frozen(found["query_responses"], found["scores"], about["prompt_width"], about["pad"], about["eos"])

        def model(prefix, head="lm_head.weight"):
            made = GPT2LMHeadModel(GPT2Config(**about["sizes"]))
            tensors = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
            made.load_state_dict(tensors if head in tensors else tensors | {head: made.lm_head.weight}, strict=False)
            return made

        policy, reference = model("before/policy/"), model("reference/").eval()
        head = torch.nn.Linear(8, 1, bias=False)
        head.weight.data.copy_(found["before/value/score.weight"])
        estimator = MODES[mode].get("estimator", "k1")
        config = ppo.Config(
            rollout=ppo.Rollout(
                batch=8, max_new_tokens=6, temperature=about["temperature"] + 1e-7, missing_eos="subtract"
            ),
            kl=ppo.KL(coef=0.3, estimator=estimator),
            ppo=ppo.Algorithm(
                num_ppo_epochs=3, vf_coef=0.5, reward_at="after_eos", unbiased_whitening=True,
                whiten_rewards=MODES[mode].get("whiten_rewards", False),
            ),
            train=ppo.Train(batch=8, steps=3, precision="fp32"),
        )  # fmt: skip
        value = rollout.ValueModel(model("before/value/").transformer, head)
        objective = ppo.PPO(policy, value, config.ppo, config.rollout.temperature)
        stream = ppo.Rollouts(objective, reference, frozen, Score(frozen.score), frozen, config)
        stream.generate = frozen.generate
        optim = Optim(torch.optim.SGD(objective.parameters(), lr=about["lr"]), lr=lambda step: about["lr"])
        for step in range(3):
            stream.begin(step)
            rows, pieces = share(8, 0, 1, micro_batch)
            batch = stream.fetch(stream.ids(step)[rows], step)
            update(objective, [rows_of(batch, piece) for piece in pieces], step, optim)
    finally:
        torch.set_default_dtype(torch.float32)
    ours = {f"policy/{name}": x for name, x in policy.state_dict().items()}
    ours |= {f"value/transformer.{name}": x for name, x in value.trunk.state_dict().items()}
    ours["value/score.weight"] = head.weight
    theirs = {k.removeprefix(f"{mode}/"): v for k, v in found.items() if k.startswith(f"{mode}/")}
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        moved = (tensor - found[f"before/{name}"]).norm()
        assert (ours[name] - tensor).norm() <= 1e-12 * max(moved, 1e-3), name
