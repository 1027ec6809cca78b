"""A run of SFT that is chosen by a reward model's score, held against transformers' own classes."""

import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fledge import artifact
from fledge.config import load
from fledge.data import preferences
from fledge.errors import InputError
from fledge.evals.reward import Judge
from fledge.export import export
from tests.fledge.test_export import Family


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Family(tmp_path_factory.mktemp("family"))


def scores(reward, prompts: list[str], answers: list[str]) -> torch.Tensor:
    """Calibrated, one conversation at a time and unpadded, by the plain loader."""
    model, tokens = AutoModelForSequenceClassification.from_pretrained(reward), AutoTokenizer.from_pretrained(reward)
    talks = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(prompts, answers, strict=True)
    ]
    with torch.no_grad():
        raw = [
            model(torch.tensor([tokens.apply_chat_template(talk, return_dict=True)["input_ids"]])).logits
            for talk in talks
        ]
    return (torch.cat(raw).squeeze(1) - model.config.reward_offset) * model.config.reward_scale


@pytest.fixture(scope="module")
def chosen(family):
    """A run that was chosen by the score of its answers to six validation prompts."""
    module, given = importlib.import_module("finetune.sft"), family.config("sft") | {"name": "chosen"}
    given["parents"] = given["parents"] | {"reward": str(family.run("reward") / "artifact")}
    given["evaluation"] = {"metric": "exact", "examples": 8, "max_new_tokens": 6, "prompts": 6}
    given["optim"] = {"lr": 0.002}  # so slowly that its answers change while it learns
    given["train"] = given["train"] | {"eval_every": 2, "save_every": 2, "keep": 9}
    given["train"]["select"] = {"metric": "eval/reward", "mode": "max"}
    config = load(module.Config, given)
    return family, config, module.main(config)


def test_the_checkpoint_is_chosen_by_the_reward_models_score(chosen, tmp_path):
    family, config, made = chosen
    run = family.root / "runs/chosen"
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"] + 1: line["eval/reward"] for line in curve if "eval/reward" in line}
    assert set(measured) == {2, 4, 6, 8, 10, 12} and len(set(measured.values())) > 1
    assert all("eval/exact" in line and "eval/loss" in line for line in curve if "eval/reward" in line)
    best = max(measured, key=lambda step: (measured[step], -step))
    assert made.step == best and made.checkpoint["why"].startswith("the best by eval/reward")
    assert [score["metric"] for score in made.manifest["metrics"]["scores"]] == ["exact answers", "reward"]
    assert set(made.manifest["parents"]) == {"model", "reward"}

    tokens = AutoTokenizer.from_pretrained(made.path)
    prompts = preferences.prompts(config.data, tokens, "validation")
    assert len(prompts) > 6
    order = importlib.import_module("finetune.sft").chosen_examples(len(prompts), 6)
    asked = [prompts.records[i]["prompt"][-1]["content"] for i in order]
    for step in (2, 12):
        model = AutoModelForCausalLM.from_pretrained(export(f"{run}@{step}", tmp_path / str(step)).path).eval()
        said = []
        for i in order:
            ids = torch.tensor([prompts.ids[i]])
            new = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id,
            )  # fmt: skip
            said.append(tokens.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip())
        mean = scores(family.run("reward") / "artifact", asked, said).mean().item()
        assert measured[step] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_an_empty_test_split_is_found_before_training(family, stage):
    module = importlib.import_module({"sft": "finetune.sft", "reward": "align.reward"}[stage])
    given = family.config(stage) | {"name": f"untested_{stage}"}
    given["data"] = given["data"] | {"test_fraction": 0.0}
    with pytest.raises(InputError, match="the test data has 0 usable examples"):
        module.main(load(module.Config, given))
    assert not (family.root / f"runs/untested_{stage}/metrics.jsonl").read_text()


def test_a_judge_reads_any_answer_and_cuts_only_prompts(family):
    reward = artifact.open(family.run("reward") / "artifact", kind="reward-model")
    prompts, answers = ["the fox?", "a dog and a fox " * 3 + "?", "x?"], ["runs", "", "over the lazy dog"]
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    judge = Judge(reward)
    torch.testing.assert_close(judge(asked, answers), scores(reward.path, prompts, answers), rtol=1e-4, atol=1e-5)
    positions = judge.model.config.max_position_embeddings
    long = judge.ids([{"role": "user", "content": "fox " * 99}], "runs")
    short = judge.ids([{"role": "user", "content": "fox"}], "runs")
    assert len(long) == positions and long[0] == short[0] and long[-3:] == short[-3:]
