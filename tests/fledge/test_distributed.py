"""Collectives against one process, errors that reach every rank, and launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fledge import distributed
from fledge.errors import InputError, RunError
from tests.launch import environment

WORLD = 2
forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight that mixes every row with every other, as a contrastive loss does."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def mixed(rows: torch.Tensor) -> torch.Tensor:
    return (rows @ rows.T).logsumexp(dim=1).mean()


def ranks(out: str) -> None:
    """On each rank: what the tests below look at."""
    distributed.setup("cpu")
    assert distributed.world_size() == WORLD and distributed.is_main() == (distributed.rank() == 0)
    x, w = features()
    w.requires_grad_()
    mine = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
    gathered = distributed.gather_rows(x[mine] * w[mine])
    mixed(gathered).backward()
    grad = distributed.all_reduce_sum({"w": w.grad / WORLD})["w"]  # as DDP averages
    found = {"gathered": gathered.detach(), "grad": grad}
    big = 2**53 + 1  # not a float64
    counts = distributed.all_reduce_counts({"b": big * (1 - distributed.rank()), "a": distributed.rank()})
    sums = distributed.all_reduce_sum({"y": torch.ones(2, 3) * (1 + distributed.rank()), "x": torch.tensor(0.5)})
    told = {"counts": counts, "objects": distributed.gather_objects(distributed.rank()), "errors": []}
    told["broadcast"] = distributed.broadcast_object({"from": distributed.rank()})
    told["on_main"] = distributed.on_main(lambda: distributed.rank())
    for kind in (InputError, RunError, KeyError):
        try:
            distributed.on_main(lambda kind=kind: fail(kind))
        except Exception as error:
            told["errors"].append(f"{type(error).__name__}: {error}")
    save_file(found | sums, f"{out}/{distributed.rank()}.safetensors")
    Path(f"{out}/{distributed.rank()}.json").write_text(json.dumps(told))


def fail(kind: type[Exception]) -> None:
    assert distributed.is_main()
    raise kind("the disk is full")


@forking
def test_collectives(forks, tmp_path):
    forks.start("tests.fledge.test_distributed:ranks", {"out": str(tmp_path)}, world=WORLD, folder=tmp_path).wait()
    x, w = features()
    w.requires_grad_()
    mixed(x * w).backward()
    for rank in range(WORLD):
        found = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(found["gathered"], (x * w).detach(), rtol=0, atol=0)
        torch.testing.assert_close(found["grad"], w.grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(found["y"], torch.full((2, 3), 3.0)) and found["x"].item() == 1 and found["x"].shape == ()
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["counts"] == {"a": 1, "b": 2**53 + 1}
        assert told["objects"] == [0, 1] and told["broadcast"] == {"from": 0} and told["on_main"] == 0
        own, others = "KeyError: 'the disk is full'", "RunError: KeyError('the disk is full')"
        plain = ["InputError: the disk is full", "RunError: the disk is full"]
        assert told["errors"] == [*plain, own if rank == 0 else others]


def test_one_process_needs_no_group():
    x = torch.randn(3, 2)
    assert distributed.gather_rows(x) is x
    assert distributed.all_reduce_counts({"a": 1}) == {"a": 1} and distributed.gather_objects(5) == [5]
    assert distributed.broadcast_object(5) == 5 and distributed.on_main(lambda: 5) == 5
    with pytest.raises(KeyError):  # as it is: there is nobody to send it to
        distributed.on_main(lambda: fail(KeyError))


# -------------------------------------------------------------------------------------------------------- launchers

STAGE = """\
stage: pretrain.mae
data: {path: pictures, channels: 1}
augment: {size: 8, mean: [0.5], std: [0.25]}
model: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 8, depth: 2, num_heads: 2}
decoder: {embed_dim: 8, depth: 1, num_heads: 2}
optim: {warmup: 1}
train: {batch: 4, steps: 3, precision: fp32, device: cpu}
track: {wandb: "off"}
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "accelerate --cpu": ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
}


def launched(launcher: str, folder: Path) -> subprocess.CompletedProcess:
    """``python -m pretrain.mae`` under a launcher."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True)
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(folder / "pictures" / f"{i}.png")
    (folder / "mae.yaml").write_text(STAGE)
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "pretrain.mae", "mae.yaml"]
    env = environment(GLOO_SOCKET_IFNAME="lo")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


def test_torchrun_and_accelerate_are_the_same_run(tmp_path):
    digests = {}
    for launcher in ("torchrun", "accelerate"):
        done = launched(launcher, tmp_path / launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        run = tmp_path / launcher / "runs" / "mae"
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
        digests[launcher] = json.loads((run / "artifact" / "manifest.json").read_text())["digest"]
    assert digests["torchrun"] == digests["accelerate"]


def test_a_launcher_that_starts_one_process_of_two_is_refused(tmp_path):
    """accelerate launch --cpu --num_processes 2 would train on one process without a word."""
    done = launched("accelerate --cpu", tmp_path)
    assert done.returncode != 0
    assert "accelerate was asked for several processes, but has started one; use torchrun" in done.stderr
    assert not (tmp_path / "runs" / "mae" / "artifact").exists()


def test_an_unknown_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="train.device: cuda is not available here; found .*cpu"):
        distributed.setup("cuda")
