"""A run that is killed and started again is the run that was never killed: the same weights and curve, bit for bit.

Every stage at toy size on generated data, with dropout (but PPO) and random augmentation on. The uninterrupted and the
killed run are in processes of different hash seeds with scrambled global generators. Ranks and data workers are spread
over the stages. What is compared: every tensor of the last checkpoint, every number of metrics.jsonl but times and
memory, and the digest of the artifact, which holds every score.
"""

import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fledge.export import export
from tests.forks import Forks, Job

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

STEPS = 12
PATIENCE = 300.0  # seconds in which a start of a toy stage gets anywhere, also on a busy machine
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away", "from", "ten"]
VIT = {"img_size": 16, "in_chans": 1, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
TRANSFORMER = {"embed_dim": 16, "depth": 2, "num_heads": 2, "context_length": 48, "dropout": 0.1}


@dataclass
class Case:
    """One stage at toy size. ``parents``: role -> name of another case, or of nothing."""

    stage: str
    config: dict[str, Any]
    world: int = 1
    workers: int = 0
    parents: dict[str, str] | None = None
    steps: int = STEPS


def train(batch: int = 8, **more: Any) -> dict[str, Any]:
    often = {"save_every": 3, "eval_every": 4}
    return {"batch": batch, "steps": STEPS, "precision": "fp32", "device": "cpu", **often} | more


def data(path: str, **more: Any) -> dict[str, Any]:
    return {"source": "files", "path": path, "validation_fraction": 0.2, "test_fraction": 0.2} | more


TEXT = data("text.txt", split_on="line", seq_len=16)
PICTURES = {"path": "pictures", "channels": 1}
VIEW = {"mean": [0.5], "std": [0.25]}
CASES = {
    "mae": Case(
        "pretrain.mae",
        {
            "data": {**PICTURES, "holdout": 0.3},
            "augment": {"size": 16, **VIEW},
            "model": VIT,
            "decoder": {"embed_dim": 8, "depth": 1, "num_heads": 2},
            "optim": {"warmup": 2, "lr": 0.01},
            "train": train(),
        },
        world=2,
        workers=2,
    ),
    "dino": Case(
        "pretrain.dino",
        {
            "data": PICTURES,
            "augment": {"global_size": 16, "local_size": 8, "local_crops": 2, **VIEW},
            "model": VIT,
            "drop_path_rate": 0.3,
            "head": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
            "warmup_teacher_temp_epochs": 2,
            "optim": {"warmup": 2, "lr": 0.01, "freeze_last_layer": 5},
            "evaluation": {"method": "knn", "k": 3, "fit": PICTURES, "test": PICTURES},
            "train": train(micro_batch=3),
        },
        workers=2,
    ),
    "mlm": Case(
        "pretrain.mlm",
        {
            "data": TEXT,
            "tokenizer": {"style": "encoder", "vocab_size": 320},
            "model": TRANSFORMER,
            "optim": {"warmup": 2, "lr": 0.01},
            "train": train(micro_batch=3),
        },
        world=2,
    ),
    "clm": Case(
        "pretrain.clm",
        {
            "data": TEXT,
            "tokenizer": {"vocab_size": 320},
            "model": {"arch": "gpt2", **TRANSFORMER},
            "optim": {"warmup": 2, "lr": 0.01},
            "train": train(),
        },
        workers=2,
    ),
    "sft": Case(
        "finetune.sft",
        {
            "data": data("chats.jsonl", max_length=40),
            "optim": {"lr": 0.01},
            "evaluation": {"examples": 8, "max_new_tokens": 4},
            "train": train(micro_batch=2),
        },
        world=2,
        parents={"model": "clm"},
    ),
    "sft_lora": Case(
        "finetune.sft",
        {
            "data": data("chats.jsonl", max_length=40, packing="best_fit"),
            "lora": {"rank": 2, "dropout": 0.2, "dora": True},
            "neftune_alpha": 5.0,
            "pretraining": {"data": TEXT, "share": 0.3},
            "optim": {"lr": 0.01},
            "evaluation": {"metric": "exact", "examples": 8, "max_new_tokens": 4, "prompts": 4},
            "train": train(batch=4, micro_batch=2, grad_checkpointing=True),
        },
        parents={"model": "clm"},
    ),
    "reward": Case(
        "align.reward",
        {"data": data("preferences.jsonl", max_length=40), "optim": {"lr": 0.01}, "train": train(save_every=2)},
        parents={"model": "sft"},
    ),
    "reward_ranked": Case(
        "align.reward",
        {
            "data": data("rankings.jsonl", max_length=40, responses="responses", ranks="ranks"),
            "tie_threshold": 0.5,
            "lora": {"rank": 2, "dropout": 0.1},
            "optim": {"lr": 0.01},
            "train": train(save_every=2, micro_batch=3),
        },
        world=2,
        parents={"model": "sft"},
    ),
    "ppo": Case(
        "align.ppo",
        {
            "data": data("chats.jsonl", max_length=40),
            "rollout": {
                "batch": 16,
                "max_new_tokens": 8,
                "temperature": 1.0,
                "score_norm": "standardise",
                "score_clip": 2.0,
            },
            "kl": {"target": 1.0, "horizon": 100},
            "ppo": {"num_ppo_epochs": 2, "target_kl": 3e-4, "ema": 0.9},
            "ptx": {"data": TEXT, "coef": 0.1, "rows": 2},
            "optim": {"lr": 0.001, "clip": 1.0},
            "evaluation": {"prompts": 8},
            "train": train(micro_batch=3),
        },
        world=2,
        parents={"policy": "sft", "reward": "reward"},
    ),
    "ppo_lora": Case(
        "align.ppo",
        {
            "data": data("chats.jsonl", max_length=40),
            "lora": {"rank": 2},
            "rollout": {"batch": 16, "max_new_tokens": 8, "temperature": 1.0},
            "ppo": {"num_ppo_epochs": 2},
            "value": {"init": "policy", "head": "zero"},
            "optim": {"lr": 0.01},
            "evaluation": {"prompts": 8},
            "train": train(micro_batch=3, grad_checkpointing=True),
        },
        world=2,
        parents={"policy": "sft", "reward": "reward"},
    ),
    "clip": Case(
        "align.clip",
        {
            "data": {"path": "pairs.jsonl", "channels": 1, "holdout": 0.3},
            "augment": {"size": 16, "scale": [0.5, 1.0], **VIEW},
            "text_model": {"dropout": 0.1},
            "projection_dim": 8,
            "max_length": 40,
            "optim": {"warmup": 2, "lr": 0.01},
            "train": train(),
        },
        world=2,
        workers=2,
        parents={"image": "mae", "text": "mlm"},
    ),
    "classify": Case(
        "finetune.classify",
        {"data": PICTURES, "test": PICTURES, "device": "cpu"},
        parents={"encoder": "mae"},
        steps=0,
    ),
}


# ------------------------------------------------------------------------------------------------------ small world


def write_data(folder: Path) -> None:
    """Grey pictures of three classes, lines of words, questions with right and wrong answers."""
    g, rng = torch.Generator().manual_seed(0), random.Random(0)
    for name, tone in (("dark", 40), ("middle", 120), ("light", 200)):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(10):
            pixels = (tone + torch.randint(-40, 40, (20, 20), generator=g)).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "pictures" / name / f"{i}.png")
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(4, 14))) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    pictures = sorted((folder / "pictures").rglob("*.png"))
    words = [" ".join(rng.sample(WORDS, 3)) for _ in pictures]
    captions = [
        {"image": str(path.relative_to(folder)), "caption": f"{path.parent.name} {said}"}
        for path, said in zip(pictures, words, strict=True)
    ]
    pairs = [(f"{' '.join(rng.choices(WORDS, k=3))} {i}?", *rng.sample(WORDS, 2)) for i in range(60)]
    chats = [{"prompt": prompt, "completion": right} for prompt, right, _ in pairs]
    preferences = [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in pairs]
    rankings = [
        {"prompt": prompt, "responses": [*both, *rng.sample(WORDS, i % 3)], "ranks": [0, 2, 1, 2][: 2 + i % 3]}
        for i, (prompt, *both) in enumerate(pairs)
    ]
    files = {"chats": chats, "preferences": preferences, "rankings": rankings, "pairs": captions}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def placed(value: Any, folder: Path) -> Any:
    """The config with the paths of its data inside ``folder``."""
    if isinstance(value, dict):
        return {k: str(folder / v) if k == "path" else placed(v, folder) for k, v in value.items()}
    return value


class World:
    """The data, two servers, and every uninterrupted run, each made once."""

    def __init__(self, root: Path, calm: Forks, stormy: Forks) -> None:
        self.root, self.calm, self.stormy = root, calm, stormy
        write_data(root)

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """The whole config of a case; ``changes`` go into its train section."""
        case = CASES[name]
        config = {"stage": case.stage, "name": name, "seed": 5, **placed(case.config, self.root)}
        config["track"] = {"wandb": "off"}
        if case.steps:
            config["train"] = {**config["train"], "workers": case.workers, **changes}
        if case.parents:
            config["parents"] = {role: str(self.uninterrupted(p) / "artifact") for role, p in case.parents.items()}
        return config

    def start(self, forks: Forks, name: str, folder: Path, world: int | None = None, **more: Any) -> Job:
        changes = more.pop("changes", {})
        args = {"stage": CASES[name].stage, "config": self.config(name, **changes), **more}
        return forks.start("tests.resume_driver:stage", args, world=world or CASES[name].world, folder=folder)

    def uninterrupted(self, name: str) -> Path:
        """The folder of the run that nothing happens to."""
        folder = self.root / "calm" / name
        if not (run_of(name, folder) / "artifact").exists():
            self.start(self.calm, name, folder).wait()
        return run_of(name, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory, forks):
    with Forks(hash_seed=2) as stormy:
        yield World(tmp_path_factory.mktemp("resume"), forks, stormy)


def run_of(name: str, folder: Path) -> Path:
    return folder / "runs" / name


# ------------------------------------------------------------------------------------------------------- comparison


def curve(run: Path) -> list[dict[str, Any]]:
    """Every number that was logged, in order, without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "system/"))} for line in lines]


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return {
        f"{newest.name}/{file.stem}/{name}": tensor
        for file in newest.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same_run(found: Path, truth: Path) -> None:
    assert curve(found) == curve(truth)
    if (truth / "checkpoints").exists():
        tensors, true = last_checkpoint(found), last_checkpoint(truth)
        assert tensors.keys() == true.keys()
        different = [name for name in true if not torch.equal(tensors[name], true[name])]
        assert not different, different
        assert state(found) == state(truth)
    if (truth / "artifact").exists():
        mine, his = (json.loads((run / "artifact" / "manifest.json").read_text()) for run in (found, truth))
        assert mine["files"] == his["files"] and mine["metrics"] == his["metrics"]


def state(run: Path) -> str:
    return (sorted((run / "checkpoints").glob("step_*"))[-1] / "state.json").read_text()


# ------------------------------------------------------------------------------------------------------------ storm


def logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def kill_somewhere(job: Job, run: Path, lines: int, delay: float, rank: int) -> bool:
    """SIGKILL ``rank`` when so many lines are logged and ``delay`` seconds more have gone; was it still running?"""
    until = time.monotonic() + PATIENCE
    while logged(run) < lines and not job.failed():
        if job.poll():
            return False
        if time.monotonic() > until:
            job.stacks()
            job.end()
            raise AssertionError(f"it stands still at {logged(run)} lines, before {lines}:\n{job.output()}")
        time.sleep(0.001)
    time.sleep(delay)
    assert not job.failed(), job.output()
    if job.poll():
        return False
    job.kill(rank)
    job.end()
    return True


def storm(world: World, name: str, folder: Path, seed: int) -> tuple[int, int]:
    """Run ``name`` in ``folder`` through its kills, then to its end. (random kills, kills inside a save)"""
    case, rng, run = CASES[name], random.Random(f"{seed}/{name}"), run_of(name, folder)
    random_kills = save_kills = 0
    if case.steps:
        die = {"save": rng.randint(1, 2), "sync": rng.randint(1, 8)}
        job = world.start(world.stormy, name, folder, die=die)
        job.wait(check=False) if case.world == 1 else wait_for_death(job)
        assert job.codes[0] == -9, f"rank 0 was to die at {die}: {job.output()}"
        job.end()
        save_kills += 1
    moments = [rng.randint(0, case.steps - 2) if case.steps else 0 for _ in range(3)] + [case.steps]
    for lines in moments:
        job = world.start(world.stormy, name, folder)
        if not kill_somewhere(job, run, lines, rng.uniform(0, 0.05), rng.randrange(case.world)):
            break
        random_kills += 1
    else:
        job = world.start(world.stormy, name, folder)
    job.wait()
    return random_kills, save_kills


def wait_for_death(job: Job, rank: int = 0) -> None:
    """Until that rank is dead; the launcher would then end the others."""
    until = time.monotonic() + 60
    while job.poll() is False and job.codes[rank] is None and time.monotonic() < until:
        time.sleep(0.005)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments(world, name, tmp_path):
    truth = world.uninterrupted(name)
    random_kills, save_kills = storm(world, name, tmp_path, seed=0)
    assert random_kills >= 3 or not CASES[name].steps
    assert save_kills == 1 or not CASES[name].steps
    assert_same_run(run_of(name, tmp_path), truth)
    if CASES[name].steps:
        learned, skipped = ({r["step"] for r in curve(truth) if f"train/{k}" in r} for k in ("loss", "skipped"))
        assert bool(skipped) == (name == "ppo")  # its early stop
        assert not learned & skipped and learned | skipped == set(range(CASES[name].steps))
        assert [r["step"] for r in curve(truth) if any(k.startswith("eval/") for k in r)] == [3, 7, 11]


# ------------------------------------------------------------------------------------------------------------ shards

SHARDED = ("mae", "dino", "mlm", "clm", "sft", "sft_lora", "reward", "clip")
"""All but PPO, which generates."""


def sharded(world: World, name: str) -> Path:
    """The run of this stage in shards on two ranks that nothing happens to."""
    folder = world.root / "sharded" / name
    if not (run_of(name, folder) / "artifact").exists():
        world.start(world.calm, name, folder, world=2, changes={"engine": "fsdp2"}).wait()
    return run_of(name, folder)


@pytest.mark.parametrize("name", SHARDED)
def test_a_stage_in_shards_is_the_stage(world, name, tmp_path):
    """Curve, evaluations and artifact, up to rounding; and whoever exports its checkpoint gets the same artifact."""
    run = sharded(world, name)
    if CASES[name].world == 2:
        truth = world.uninterrupted(name)
    else:  # its dropout is another on one rank
        world.start(world.calm, name, tmp_path / "ddp", world=2).wait()
        truth = run_of(name, tmp_path / "ddp")
    assert [r.keys() for r in curve(run)] == [r.keys() for r in curve(truth)]
    for mine, true in zip(curve(run), curve(truth), strict=True):
        assert mine == pytest.approx(true, rel=1e-4, abs=1e-6)
    weights, true_weights = (load_file(one / "artifact/model.safetensors") for one in (run, truth))
    for key, tensor in true_weights.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-2, atol=1e-3, msg=key)
    exported = export(str(run), tmp_path / "exported").path
    assert (exported / "model.safetensors").read_bytes() == (run / "artifact/model.safetensors").read_bytes()


@pytest.mark.parametrize("name, rank", [("mae", 1), ("dino", 0)])
def test_killed_in_shards(world, name, rank, tmp_path):
    """At random moments, and rank 0 or 1 inside of its part of a save."""
    more = {"world": 2, "changes": {"engine": "fsdp2"}}
    die = {"save": 2, "sync": 1, "rank": rank}
    job = world.start(world.stormy, name, tmp_path, die=die, **more)
    wait_for_death(job, rank)
    assert job.codes[rank] == -9, job.output()
    job.end()
    for lines in (4, 7):
        job = world.start(world.stormy, name, tmp_path, **more)
        assert kill_somewhere(job, run_of(name, tmp_path), lines, 0.02, 1 - rank)
    world.start(world.stormy, name, tmp_path, **more).wait()
    assert_same_run(run_of(name, tmp_path), sharded(world, name))


# ------------------------------------------------------------------------------------------------- ranks and batches


def test_four_ranks_and_layers_that_run_in_another_order(world, tmp_path):
    """DDP rebuilds its buckets after a process's first backward, which from 4 ranks on changes sums of gradients.
    Here the layers are registered out of order, so that it really does: without ``settle_buckets`` this fails."""

    def run(name: str, *parts: int) -> Path:
        for steps in parts:
            folder = tmp_path / name
            world.calm.start("tests.resume_driver:out_of_order", {"steps": steps}, world=4, folder=folder).wait()
        return tmp_path / name / "runs" / "toy"

    truth, found = run("whole", 8), run("parts", 3, 4, 8)
    assert curve(found) == curve(truth) and len(curve(truth)) == 8
    tensors, true = last_checkpoint(found), last_checkpoint(truth)
    assert [name for name in true if not torch.equal(tensors[name], true[name])] == []


@pytest.mark.parametrize("name", ["mae", "mlm"])
def test_other_ranks_and_micro_batches_see_the_same_samples(world, name, tmp_path):
    """A run that goes on with another number of ranks and other micro-batches: the same ids, and the same curve up to
    rounding (dropout, whose noise depends on both, off)."""
    off = {"model": {**CASES[name].config["model"], "dropout": 0.0}} if name == "mlm" else {}
    traces, runs = [], []
    for folder, parts in (("whole", [(1, None)]), ("parts", [(2, 3), (4, 1), (1, 5)])):
        trace = tmp_path / f"{folder}.jsonl"
        for i, (ranks, micro_batch) in enumerate(parts):
            args = {
                "stage": CASES[name].stage,
                "config": world.config(name, micro_batch=micro_batch, workers=0) | placed(off, world.root),
                "trace": str(trace),
            }
            if i + 1 < len(parts):
                args["die"] = {"save": 1, "sync": 8}  # once the first checkpoint of this start is in place
            job = world.stormy.start("tests.resume_driver:stage", args, world=ranks, folder=tmp_path / folder)
            if "die" in args:
                wait_for_death(job)
                job.end()
            else:
                job.wait()
        traces.append(ids_of(trace))
        runs.append(run_of(name, tmp_path / folder))
    assert traces[0] == traces[1] and len(traces[0]) == STEPS
    whole, parts = (curve(run) for run in runs)
    assert [record["step"] for record in whole] == [record["step"] for record in parts]
    for mine, true in zip(parts, whole, strict=True):
        assert mine == pytest.approx(true, rel=1e-4)


def ids_of(trace: Path) -> dict[int, list[int]]:
    """Step -> the ids of its global batch, from all ranks."""
    found: dict[int, set[int]] = {}
    for line in trace.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["step"], set()).update(record["ids"])
    return {step: sorted(ids) for step, ids in found.items()}
