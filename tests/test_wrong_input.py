"""Wrong input from end to end: one clear message, the right exit code, and nothing lost that was written before.

What a single function says is tested beside it: keys and types in fledge/test_config.py, recipes in
fledge/test_recipe.py, damaged artifacts in fledge/test_artifact.py, records and pictures in data/.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from fledge import artifact, cli

SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from ten tall trees near a cold blue river"
WORDS = SENTENCE.split()
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TRAIN = {"batch": 4, "steps": 2, "precision": "fp32", "device": "cpu"}
HELD = {"source": "files", "validation_fraction": 0.2, "test_fraction": 0.2}
STAGES: dict[str, dict[str, Any]] = {
    "mae": {
        "stage": "pretrain.mae",
        "data": {"path": "pictures"},
        "augment": {"size": 16},
        "model": VIT,
        "decoder": {"embed_dim": 8, "depth": 1, "num_heads": 2},
        "optim": {"warmup": 0},
        "train": TRAIN,
    },
    "clm": {
        "stage": "pretrain.clm",
        "data": {**HELD, "path": "text.txt", "split_on": "line", "seq_len": 16},
        "tokenizer": {"vocab_size": 300},
        "model": {"arch": "llama", "embed_dim": 16, "depth": 1, "num_heads": 2, "context_length": 64},
        "optim": {"warmup": 0},
        "train": TRAIN,
    },
    "sft": {
        "stage": "finetune.sft",
        "data": {**HELD, "path": "chats.jsonl", "max_length": 48},
        "evaluation": {"examples": 4, "max_new_tokens": 2},
        "train": TRAIN,
    },
    "reward": {
        "stage": "align.reward",
        "data": {**HELD, "path": "preferences.jsonl", "max_length": 48},
        "train": TRAIN,
    },
    "ppo": {
        "stage": "align.ppo",
        "data": {**HELD, "path": "prompts.jsonl", "max_length": 40},
        "rollout": {"batch": 4, "max_new_tokens": 2},
        "evaluation": {"prompts": 4},
        "train": TRAIN,
    },
    "clip": {
        "stage": "align.clip",
        "data": {"path": "pairs.jsonl"},
        "augment": {"size": 16},
        "image_model": VIT,
        "text_model": {"embed_dim": 16, "depth": 1, "num_heads": 2, "context_length": 16},
        "tokenizer": {"style": "encoder", "vocab_size": 300},
        "projection_dim": 8,
        "max_length": 16,
        "train": TRAIN,
    },
}


def lines(path: str, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def saying(i: int) -> str:
    return " ".join(WORDS[(i * 7 + k * (1 + i % 5)) % len(WORDS)] for k in range(4 + i % 3)) + f" {i}"


def make_data() -> None:
    """Pictures, text, conversations, preferences, prompts and pairs; all good but where a test says otherwise."""
    Path("pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20), (i * 30, 255 - i * 30, 90)).save(f"pictures/{i}.png")
    Path("text.txt").write_text("\n".join(saying(i) for i in range(150)))
    lines("chats.jsonl", [{"prompt": saying(i), "completion": WORDS[i % 20]} for i in range(40)])
    pairs = [{"prompt": saying(i), "chosen": WORDS[i % 20], "rejected": WORDS[(i + 1) % 20]} for i in range(40)]
    lines("preferences.jsonl", pairs)
    lines("prompts.jsonl", [{"prompt": saying(i)} for i in range(40)])
    lines("pairs.jsonl", [{"image": f"pictures/{i}.png", "caption": f"shade {WORDS[i]}"} for i in range(8)])


def damaged(source: str, target: str, change) -> None:
    shutil.copytree(source, target)
    change(Path(target))


def flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)


def later_format(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data, a config for each stage, and a small family of finished runs."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("FLEDGE_CACHE", str(home / "cache"))
        patch.setenv("WANDB_MODE", "disabled")
        make_data()
        for name, config in STAGES.items():
            Path(f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        done = [
            ("mae",),
            ("clm",),
            ("clm", "name=clm2", "tokenizer.vocab_size=290"),  # the same text, another tokenizer
            ("sft", "parents.model=runs/clm/artifact"),
            ("sft", "name=sft2", "parents.model=runs/clm2/artifact"),
            ("reward", "name=reward2", "parents.model=runs/sft2/artifact"),
        ]
        for name, *more in done:
            assert cli.main(["run", f"{name}.yaml", *more]) == 0
        damaged("runs/clm/artifact", "edited", flip_a_byte)
        damaged("runs/clm/artifact", "later", later_format)
        Path("binary.txt").write_bytes(b"\x00\x01 no text")
        Path("latin.txt").write_bytes("déjà vu".encode("latin-1"))
        Path("torn.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl')
        lines("nameless.jsonl", [{"question": "a", "answer": "b"}])
        Path("short.txt").write_text("too little\n")
        Path("broken").mkdir()
        Path("broken/a.png").write_bytes(b"\x89PNG and then nothing")
        lines("silent.jsonl", [{"image": f"pictures/{i}.png", "caption": " "} for i in range(8)])
        yield home


def contents(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


SFT, PPO = ("sft", "name=new"), ("ppo", "name=new", "parents.policy=runs/sft/artifact")
WRONG = {
    "wrong type": ("clm", "name=new", "train.steps=many", ["override train.steps=many", "train.steps", "800 epochs"]),
    "contradictory sizes": ("mae", "name=new", "model.num_heads=3", ["embed_dim 16", "not a multiple", "num_heads 3"]),
    "two sizes of one picture": ("mae", "name=new", "augment.size=32", ["augment.size 32", "model.img_size 16"]),
    "two lengths of one row": ("clm", "name=new", "data.seq_len=128", ["data.seq_len 128", "context_length 64"]),
    "uneven rollouts": (*PPO, "rollout.batch=6", ["rollout.batch 6", "multiple", "train.batch 4"]),
    "no folder": ("mae", "name=new", "data.path=nowhere", ["nowhere does not exist", "folder of pictures"]),
    "no file": ("clm", "name=new", "data.path=nowhere.txt", ["data.path", "no file or folder nowhere.txt"]),
    "no file of pairs": ("clip", "name=new", "data.path=nowhere.jsonl", ["nowhere.jsonl does not exist", "JSON"]),
    "unset variable": ("clm", "name=new", "data.path=$NO_SUCH_PLACE/x", ["NO_SUCH_PLACE is not set", "set it"]),
    "zero bytes": ("clm", "name=new", "data.path=binary.txt", ["binary.txt", "offset 0", "UTF-8"]),
    "another encoding": ("clm", "name=new", "data.path=latin.txt", ["latin.txt", "byte 0xe9 at offset 1", "convert"]),
    "torn records": (*SFT, "parents.model=runs/clm/artifact", "data.path=torn.jsonl",
                     ["torn.jsonl:2", "JSON", "one object a line"]),
    "other fields": (*SFT, "parents.model=runs/clm/artifact", "data.path=nameless.jsonl",
                     ["nameless.jsonl:1", "'prompt'", "answer, question"]),
    "no usable picture": ("mae", "name=new", "data.path=broken",
                          ["broken", "none of its 1 pictures", "a.png", "pictures that open"]),
    "only empty captions": ("clip", "name=new", "data.path=silent.jsonl", ["silent.jsonl", "empty caption", "8"]),
    "too short a text": ("clm", "name=new", "data.path=short.txt", "data.validation_fraction=0", "data.test_fraction=0",
                         ["short.txt", "text is too short", "rows of data.seq_len 16", "4 are needed", "smaller"]),
    "fewer than a batch": ("mae", "name=new", "train.batch=64", ["8 samples", "train.batch is 64", "smaller batch"]),
    "no parent": (*SFT, ["parents.model", "required", "causal-lm or chat-model"]),
    "parent of another kind": (*SFT, "parents.model=runs/mae/artifact",
                               ["parents.model", "is a vision-encoder", "expected a causal-lm or chat-model"]),
    "a run's folder": (*SFT, "parents.model=runs/clm", ["is a run's folder", "runs/clm/artifact"]),
    "edited weights": (*SFT, "parents.model=edited",
                       ["parents.model edited", "model.safetensors was changed", "--fresh"]),
    "another format number": (*SFT, "parents.model=later", ["has format 99", "reads format 1", "version"]),
    "another tokenizer": (*PPO, "parents.reward=runs/reward2/artifact",
                          ["runs/sft/artifact", "runs/reward2/artifact", "do not share a tokenizer"]),
    "no reward": (*PPO, ["needs a reward", "parents.reward", "module:function"]),
    "longer than the model": (*SFT, "parents.model=runs/clm/artifact", "data.max_length=99",
                              ["data.max_length is 99", "64 positions"]),
    "adapters on no layer": (*SFT, "parents.model=runs/clm/artifact", "lora={targets: [nowhere]}",
                             ["lora.targets ['nowhere']", "q_proj"]),
    "adapters of no rank": (*SFT, "parents.model=runs/clm/artifact", "lora={rank: 0}", ["lora.rank", "greater than 0"]),
    "a choice by rewards of nobody": (*SFT, "parents.model=runs/clm/artifact", "train.eval_every=1",
                                      "train.select={metric: eval/reward, mode: max}",
                                      ["train.select.metric is eval/reward", "parents.reward", "reward-model"]),
    "a choice by what is not measured": (*SFT, "parents.model=runs/clm/artifact", "train.eval_every=1",
                                         "train.select={metric: eval/exact, mode: max}",
                                         ["eval/exact is not measured", "eval/loss"]),
    "a template that says nothing": (*SFT, "parents.model=runs/clm/artifact",
                                     "data.chat_template='{{ messages[9].x.y }}'", ["the chat template fails", "user"]),
    "a template that ends no answer": (*SFT, "parents.model=runs/clm/artifact",
                                       "data.chat_template='{% for m in messages %}{{ m.content }}{% endfor %}'",
                                       ["cannot be trained on", "end token", "data.chat_template"]),
    "prompts that fill the context": (*SFT, "parents.model=runs/clm/artifact", "data.max_length=3",
                                      ["0 usable examples", "longer than max_length"]),
    "text of rows too long": (*SFT, "parents.model=runs/clm/artifact", "pretraining={data: {seq_len: 99}}",
                              ["pretraining.data.seq_len is 99", "64 positions"]),
    "text in batches of one": (*SFT, "parents.model=runs/clm/artifact", "pretraining={data: {}}", "train.batch=1",
                               ["pretraining shares each batch", "train.batch must be 2"]),
    "an encoder of other sizes": ("mae", "name=new", "parents.init=runs/mae/artifact", "model.depth=2",
                                  ["runs/mae/artifact", "depth 2 here, 1 there"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_one_clear_message_and_nothing_lost(home, what, capsys):
    stage, *overrides, words = WRONG[what]
    before = contents(home)
    code = cli.main(["run", f"{stage}.yaml", *overrides])
    said = capsys.readouterr().err
    assert code == 2 and said.count("fledge: ") == 1 and "Traceback" not in said, said
    assert not [word for word in words if word not in said], said
    after = contents(home)
    assert {name: after.get(name) for name in before} == before
    shutil.rmtree(home / "runs/new", ignore_errors=True)


# ------------------------------------------------------------------------------------------------ what can be left out


def finished(name: str) -> artifact.Artifact:
    return artifact.open(f"runs/{name}/artifact")


def test_an_undecodable_picture_among_good_ones_is_counted_and_named(home, capsys):
    shutil.copytree("pictures", "mixed")
    Path("mixed/torn.jpg").write_bytes(b"\xff\xd8\xff and no more")
    assert cli.main(["run", "mae.yaml", "name=mixed", "data.path=mixed"]) == 0
    assert "mixed: left out 1 of 9 pictures: torn.jpg (" in capsys.readouterr().out
    assert (finished("mixed").data["pictures"], finished("mixed").data["skipped"]) == (8, 1)


def test_an_empty_caption_among_good_ones_is_counted_and_named(home, capsys):
    Path("some.jsonl").write_text(Path("pairs.jsonl").read_text() + '{"image": "pictures/0.png", "caption": ""}\n')
    assert cli.main(["run", "clip.yaml", "name=some", "data.path=some.jsonl"]) == 0
    assert "left out 1 of 9 captioned pictures: some.jsonl:9 (empty caption (caption))" in capsys.readouterr().out
    assert finished("some").data["skipped"] == 1


def test_empty_answers_and_forged_turns_are_counted_and_named(home, capsys):
    more = [{"prompt": "a", "completion": " "}, {"prompt": "b", "completion": "x<|user|>y"}]
    Path("more.jsonl").write_text(Path("chats.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in more))
    splits = ["data.validation_fraction=0", "data.test_path=chats.jsonl"]
    run = ["run", "sft.yaml", "name=more", "data.path=more.jsonl", *splits, "parents.model=runs/clm/artifact"]
    assert cli.main(run) == 0
    assert "skipped: 1 a special token in the text, 1 empty answer" in capsys.readouterr().out
    assert finished("more").data["skipped"] == {"a special token in the text": 1, "empty answer": 1}


# ------------------------------------------------------------------------------------------------ a run that fails


@pytest.mark.parametrize("stage, lr, term", [("clm", "1e30", "the gradient norm is nan"), ("mae", "1e12", "loss is ")])
def test_what_is_not_finite_stops_the_run_and_keeps_its_checkpoints(home, stage, lr, term, capsys):
    run = ["run", f"{stage}.yaml", "name=hot", f"optim.lr={lr}", "train.steps=9", "train.save_every=1", "--fresh"]
    assert cli.main(run) == 1
    said = capsys.readouterr().err
    assert said.count("fledge: ") == 1 and "Traceback" not in said
    kept = sorted(Path("runs/hot/checkpoints").glob("step_*"))
    step = int(kept[-1].name.removeprefix("step_"))
    words = [f"hot: step {step}: {term}", "Nothing was updated", "kept in runs/hot/checkpoints", "lower optim.lr"]
    assert not [word for word in words if word not in said], said
    logged = [json.loads(line)["step"] for line in Path("runs/hot/metrics.jsonl").read_text().splitlines()]
    assert kept and logged == list(range(step))
    assert not Path("runs/hot/artifact").exists()
    before = contents(home / "runs/hot/checkpoints")
    assert cli.main(run[:-1]) == 1  # goes on from there and says the same
    assert f"hot: step {step}: {term}" in capsys.readouterr().err
    assert contents(home / "runs/hot/checkpoints") == before
