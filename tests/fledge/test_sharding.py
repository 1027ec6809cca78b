"""Parameters in shards over the ranks train like whole ones, and their checkpoints are read by any number of ranks.

Gradients of every objective are in test_gradients.py, stages and kills in test_resume.py.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from fledge import checkpoint, distributed, sharding
from fledge.checkpoint import module_tensors, newest, optimizer_tensors
from fledge.config import StageConfig
from fledge.errors import InputError, RunError
from fledge.optim import Optim, OptimConfig, adamw, clip_each, clip_global, decay_groups
from fledge.saver import Saver
from fledge.stream import DataStream, rows_of, share
from fledge.track import Run, read_metrics
from fledge.train import TrainConfig, backward, fit, repeated_blocks, update, wrapped
from tests.fledge.test_checkpoint import FAULTS, bits, same
from tests.fledge.test_faults import die_at
from tests.fledge.test_train import without_times
from tests.objectives import BATCH, build

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
Engine = Literal["ddp", "fsdp2"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(13), nn.Linear(13, 13)

    def forward(self, x):
        return x + self.layer(self.norm(x)).tanh()


class Deep(nn.Module):
    """13 rows and 3 do not divide by 2 or 4: shards are uneven, and some are empty. A scale of one row, a tied layer,
    a frozen one, and a buffer that counts."""

    weights = {"square": 1.0, "small": 0.1}

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 13), nn.Linear(13, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.back = nn.Linear(13, 5, bias=False)
        self.back.weight = nn.Parameter(self.first.weight.detach().T.clone().contiguous())
        self.tied = nn.Linear(13, 3)
        self.tied.weight = self.last.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros(()))

    def counts(self, batch):
        return dict.fromkeys(("square", "small"), len(batch["x"]))

    def forward(self, batch, step):
        hidden = self.frozen(self.blocks(self.first(batch["x"]).tanh()))
        y = self.last(hidden) * self.scale + self.tied(hidden).square()
        return {"square": (y - batch["x"][:, :3]).square().sum(), "small": self.back(hidden).square().sum()}

    def after_step(self, step, means):
        self.steps += 1
        self.scale.clamp_(0, 1.01)


def deep_rows(ids, seeds):
    return {"x": torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in seeds])}


class Toy(StageConfig):
    stage: Literal["pretrain.toy"] = "pretrain.toy"
    train: TrainConfig


def fit_deep(steps: int, engine: Engine = "ddp", note: str | None = None, out: str = "runs", **more: Any) -> None:
    """Train, or go on training, to so many steps. ``note``: a file for the ids of each step, and what was resumed."""
    distributed.setup("cpu")
    config = Toy(out=out, train=TrainConfig(batch=8, steps=99, precision="fp32", engine=engine, save_every=4, **more))
    torch.manual_seed(1)
    deep = Deep()
    optim = adamw(decay_groups(deep), OptimConfig(lr=0.003, clip=0.5), batch=8, steps=40, steps_per_epoch=5)
    stream = DataStream(40, deep_rows, batch=8, seed=2)
    noted: dict[str, Any] = {"ids": {}, "loaded": {}}
    plain, load_module, load_optimizer = stream.ids, checkpoint.load_module, checkpoint.load_optimizer

    def ids(step):
        noted["ids"][step] = plain(step)
        return noted["ids"][step]

    def loaded(module, tensors):
        load_module(module, tensors)
        noted["loaded"] |= {name: bits(distributed.whole(t)).hex() for name, t in module_tensors(module).items()}

    def loaded_optimizer(optimizer, module, tensors):
        load_optimizer(optimizer, module, tensors)
        for name, tensor in optimizer_tensors(optimizer, module).items():
            noted["loaded"][name] = bits(distributed.whole(tensor)).hex()

    stream.ids = ids  # type: ignore[method-assign]
    checkpoint.load_module, checkpoint.load_optimizer = loaded, loaded_optimizer
    try:
        with Run.open(config) as run:
            fit(deep, stream, optim, config.train, run, steps=steps, seed=3)
    finally:
        checkpoint.load_module, checkpoint.load_optimizer = load_module, load_optimizer
    noted["end"] = {name: bits(tensor).hex() for name, tensor in module_tensors(deep).items()}
    if note is not None and distributed.is_main():
        Path(note).write_text(json.dumps(noted))


class Runs:
    """Runs of `fit_deep`, each in a folder of its own."""

    def __init__(self, root: Path, forks: Any) -> None:
        self.root, self.forks = root, forks

    def start(self, name: str, world: int, steps: int, engine: Engine, of: str | None = None, **more: Any) -> Path:
        """Train a run, or a copy of the run ``of`` further."""
        folder = self.root / name
        if of is not None:
            shutil.copytree(self.root / of, folder)
        args = {"steps": steps, "engine": engine, "note": str(folder / "note.json"), **more}
        self.forks.start("tests.fledge.test_sharding:fit_deep", args, world=world, folder=folder).wait()
        return folder

    def note(self, name: str) -> dict:
        return json.loads((self.root / name / "note.json").read_text())

    def curve(self, name: str) -> list[dict]:
        return without_times(read_metrics(self.root / name / "runs/toy/metrics.jsonl"))

    def checkpoints(self, name: str) -> Path:
        return self.root / name / "runs/toy/checkpoints"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks) -> Runs:
    """``whole``: 28 steps on one rank. ``sharded``: 8 steps in shards on two. ``ddp``: 8 steps, replicated on two."""
    runs = Runs(tmp_path_factory.mktemp("sharding"), forks)
    runs.start("whole", 1, 28, "ddp")
    runs.start("sharded", 2, 8, "fsdp2")
    runs.start("ddp", 2, 8, "ddp")
    return runs


# --------------------------------------------------------------------------------------------------------- resharding


@pytest.mark.parametrize(
    "of, world, engine", [("sharded", 1, "ddp"), ("sharded", 4, "fsdp2"), ("sharded", 4, "ddp"), ("ddp", 4, "fsdp2")]
)
def test_another_engine_and_number_of_ranks_go_on(runs, of, world, engine):
    """Bitwise what was saved, the same samples, and for 20 steps the losses of a run on one rank."""
    name = f"{of}-{world}-{engine}"
    runs.start(name, world, 28, engine, of=of)
    found = checkpoint.find(runs.checkpoints(of), 8)
    saved = {**found.tensors("model"), **found.tensors("optim")}
    note = runs.note(name)
    assert note["loaded"] == {key: bits(tensor).hex() for key, tensor in saved.items()}
    true = runs.note("whole")
    assert note["ids"] == {step: ids for step, ids in true["ids"].items() if int(step) >= 8}
    assert [r["step"] for r in runs.curve(name)] == list(range(28))
    for mine, whole in zip(runs.curve(name), runs.curve("whole"), strict=True):
        assert mine == pytest.approx(whole, rel=1e-5)


def test_the_same_ranks_go_on_bitwise(runs):
    runs.start("straight", 2, 28, "fsdp2")
    runs.start("parts", 2, 28, "fsdp2", of="sharded")
    assert runs.curve("parts") == runs.curve("straight")
    assert runs.note("parts")["end"] == runs.note("straight")["end"]
    names = sorted(path.name for path in (runs.checkpoints("parts") / "step_00000028").iterdir())
    assert names == ["index.json", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    for name in names[2:4]:
        files = [runs.checkpoints(run) / "step_00000028" / name for run in ("parts", "straight")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_a_stage_gets_back_is_what_was_saved(runs):
    """After training the objective is whole again, and on every rank what the last checkpoint holds."""
    saved = newest(runs.checkpoints("sharded")).tensors("model")
    assert runs.note("sharded")["end"] == {name: bits(tensor).hex() for name, tensor in saved.items()}


def test_each_rank_writes_its_rows_alone(runs):
    """The index says which, every tensor is cut along its rows, and what is not cut is of rank 0."""
    folder = runs.checkpoints("sharded") / "step_00000008"
    index = json.loads((folder / "index.json").read_text())
    whole = newest(runs.checkpoints("ddp"))
    for group in ("model", "optim"):
        assert index["groups"][group].keys() == whole.tensors(group).keys()
    assert index["ranks"] == 2
    assert index["groups"]["model"]["last.weight"] == {"shape": [3, 13], "dtype": "float32", "rows": [[0, 2], [2, 3]]}
    assert index["groups"]["model"]["scale"]["rows"] == [[0, 1], [1, 1]]
    assert index["groups"]["model"]["steps"] == {"shape": [], "dtype": "float32", "rows": None}
    assert index["groups"]["optim"]["first.bias/exp_avg"]["rows"] == [[0, 7], [7, 13]]
    sizes = [(folder / f"rank-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert sizes[1] < sizes[0] < 1.5 * sizes[1]


def test_a_slice_reads_the_rows_of_every_rank_between():
    rows = torch.arange(26.0).view(13, 2)
    pieces = [(0, rows[:4]), (4, rows[4:8]), (8, rows[8:12]), (12, rows[12:13]), (13, rows[13:])]
    stored = checkpoint.Stored([13, 2], torch.float32, pieces)
    assert torch.equal(stored[...], rows)
    for start in range(14):
        for stop in range(start, 14):
            assert torch.equal(stored[start:stop], rows[start:stop])


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_fault_of_any_file_falls_back_and_is_named(runs, tmp_path, fault):
    names = sorted(path.name for path in (runs.checkpoints("sharded") / "step_00000008").iterdir())
    assert len(names) == 5
    for name in names:
        root = tmp_path / name
        shutil.copytree(runs.checkpoints("sharded"), root)
        FAULTS[fault](root / "step_00000008" / name)
        with pytest.warns(RuntimeWarning, match=f"step_00000008 is broken: .*{name}"):
            assert newest(root).step == 4


def save_two(root: str, step: int, die: tuple[int, str] | None = None) -> None:
    """One rank of two saves a tensor in shards and one that is not, and perhaps dies at the so-manieth call."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tensors = {"rows": distribute_tensor(torch.full((3, 2), float(step)), mesh, [Shard(0)]), "all": torch.tensor(step)}
    with Saver(Path(root)) as saver:
        if die is not None:
            die_at(*die)
        saver.save(step, {"model": tensors}, {"seen": step}, keep=1)


def pair(root: str, step: int, who: int = 0, die: tuple[int, str] | None = None) -> list[int]:
    """Two processes, each a rank, save; their exit codes."""
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            torch.distributed.init_process_group("gloo", init_method=f"file://{root}.{step}", rank=rank, world_size=2)
            try:
                save_two(root, step, die if rank == who else None)
            except RuntimeError as error:  # the other one is gone
                print(f"rank {rank}: {error}", flush=True)
                os._exit(3)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def die_everywhere(root: str) -> None:
    """With one checkpoint kept, one rank dies in each of its calls: whole checkpoints are all that is ever found."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    deaths, seen = 0, set()
    assert pair(root, 1) == [0, 0]
    for who in (0, 1):
        for at in range(1, 100):
            folder = f"{root}-{who}-{at}"
            shutil.copytree(root, folder)
            codes = pair(folder, 2, who, (at, "torn"))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = newest(Path(folder))
            assert found is not None and found.state == {"seen": found.step}
            assert found.tensors("model")["rows"].unique().tolist() == [found.step]
            assert found.tensors("model")["all"].item() == found.step
            assert not list(Path(folder).glob(".*"))
            seen.add(found.step)
            if codes[who] == 0:
                break
            assert codes[who] == 9, (who, at, codes)
            deaths += 1
        assert at > 3
    assert seen == {1, 2} and deaths > 15


def test_death_of_one_rank_at_every_call_of_a_save(forks, tmp_path):
    args = {"root": str(tmp_path / "root")}
    forks.start("tests.fledge.test_sharding:die_everywhere", args, folder=tmp_path).wait(300)


def full_on_rank_1(root: str) -> None:
    """The disk of rank 1 is full: both ranks say so, nothing is left behind, and with room the same save succeeds."""
    distributed.setup("cpu")
    save_two(root, 1)
    plain = checkpoint.save_file

    def full(*args):
        raise OSError(28, "No space left on device")

    if distributed.rank() == 1:
        checkpoint.save_file = full
    with pytest.raises(RunError, match="step 2 could not be written to .*: .*No space left.*older checkpoints are"):
        save_two(root, 2)
    checkpoint.save_file = plain
    distributed.barrier()
    assert [path.name for path in Path(root).iterdir()] == ["step_00000001"]
    distributed.barrier()
    save_two(root, 2)
    assert newest(Path(root)).step == 2


def test_a_full_disk_of_one_rank_is_the_error_of_all(forks, tmp_path):
    args = {"root": str(tmp_path / "root")}
    forks.start("tests.fledge.test_sharding:full_on_rank_1", args, world=2, folder=tmp_path).wait()


# ------------------------------------------------------------------------------------------------------------ updates


def optimiser(objective: nn.Module, name: str) -> Optim:
    """As the stages clip: DINO tensor by tensor, the others globally."""
    mode = "tensor" if name == "dino" else "global"
    config = OptimConfig(lr=0.01, decay="constant", weight_decay=0.05, clip=0.1)
    return adamw(decay_groups(objective), config, batch=BATCH, steps=9, steps_per_epoch=3, clip_mode=mode)


def three_updates(name: str, engine: Engine) -> dict[str, torch.Tensor]:
    """Everything that three steps in float64 leave, and the norms of their gradients."""
    objective, batch = build(name, torch.float64)
    optim = optimiser(objective, name)
    world = distributed.world_size()
    mine, pieces = share(BATCH, distributed.rank(), world, BATCH if name == "clip" else BATCH // (2 * world))
    model = sharding.shard(objective, optim.optimizer, repeated_blocks) if engine == "fsdp2" else objective
    micro_batches = [rows_of(rows_of(batch, mine), piece) for piece in pieces]
    norms = [update(model, micro_batches, step, optim)[1] for step in range(3)]
    if engine == "fsdp2":
        sharding.gather(objective, model)
    return {**module_tensors(objective), "norms": torch.stack(norms)}


UPDATED = ("mae", "dino", "clm", "clip")


def sharded_updates(out: str) -> None:
    distributed.setup("cpu")
    for name in UPDATED:
        torch.save(three_updates(name, "fsdp2"), f"{out}/{name}-{distributed.rank()}.pt")


def test_updates_are_those_of_one_process(forks, tmp_path):
    """Clipping of both kinds, AdamW, DINO's teacher and centre, CLIP's clamp."""
    args = {"out": str(tmp_path)}
    forks.start("tests.fledge.test_sharding:sharded_updates", args, world=2, folder=tmp_path).wait()
    for name in UPDATED:
        true = three_updates(name, "ddp")
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert found.keys() == true.keys()
            for key, tensor in true.items():
                torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-7, atol=1e-8, msg=f"{name}: {key}")


def in_bf16(name: str, engine: Engine, recompute: bool) -> dict[str, torch.Tensor]:
    """What two steps of a rank leave: bf16 autocast, two micro-batches."""
    objective, batch = build(name, torch.float32)
    optim = optimiser(objective, name)
    mine, pieces = share(BATCH, distributed.rank(), distributed.world_size(), 2)
    config = TrainConfig(batch=BATCH, steps=2, grad_checkpointing=recompute)
    model = wrapped(objective, engine, optim, config)
    micro_batches = [rows_of(rows_of(batch, mine), piece) for piece in pieces]
    norms = [update(model, micro_batches, step, optim, precision="bf16")[1] for step in range(2)]
    if engine == "fsdp2":
        sharding.gather(objective, model)
    return {**module_tensors(objective), "norms": torch.stack(norms)}


def bf16_of_both_engines() -> None:
    distributed.setup("cpu")
    for name in ("mae", "clm"):
        true = in_bf16(name, "ddp", recompute=False)
        for recompute in (False, True):
            found = in_bf16(name, "fsdp2", recompute)
            for key, tensor in true.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


def test_autocast_and_recomputed_blocks(forks, tmp_path):
    forks.start("tests.fledge.test_sharding:bf16_of_both_engines", {}, world=2, folder=tmp_path).wait()


def ranks_look_at_norms() -> None:
    """Of uneven shards, some of them empty, one with a number that is not finite on one rank alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.setup("cpu")
    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    g = torch.Generator().manual_seed(0)
    whole = [torch.randn(rows, 2, generator=g) for rows in (1, 3, 4, 7)]
    for clip in (clip_global, clip_each):
        for limit in (0.5, None):
            plain = [nn.Parameter(torch.zeros_like(x)) for x in whole]
            sharded = [nn.Parameter(distribute_tensor(torch.zeros_like(x), mesh, [Shard(0)])) for x in whole]
            for p, s, x in zip(plain, sharded, whole, strict=True):
                p.grad, s.grad = x.clone(), distribute_tensor(x.clone(), mesh, [Shard(0)])
            torch.testing.assert_close(clip(sharded, limit), clip(plain, limit), rtol=1e-6, atol=0)
            for p, s in zip(plain, sharded, strict=True):
                torch.testing.assert_close(distributed.whole(s.grad), p.grad, rtol=1e-6, atol=0)
    if distributed.rank() == 1:
        distributed.local(sharded[3].grad)[0, 0] = float("nan")
    assert clip_global(sharded, 1.0).isnan()


def test_norms_are_of_whole_tensors(forks, tmp_path):
    forks.start("tests.fledge.test_sharding:ranks_look_at_norms", {}, world=2, folder=tmp_path).wait()


# --------------------------------------------------------------------------------------------------- what is obtained


def look_at_what_is_held(out: str) -> None:
    """While it trains a rank holds its share and no more, the objective nothing, and a look at it gives it all back."""
    from torch.distributed.tensor.debug import CommDebugMode

    distributed.setup("cpu")
    torch.manual_seed(1)
    deep = Deep()
    true = {name: tensor.clone() for name, tensor in module_tensors(deep).items()}
    tied = deep.tied.weight
    optimizer = torch.optim.AdamW(p for p in deep.parameters() if p.requires_grad)
    sharded = sharding.shard(deep, optimizer, repeated_blocks)
    assert distributed.engine_of(sharded) == "fsdp2" and type(deep) is Deep
    assert all(tensor.numel() == 0 for tensor in module_tensors(deep).values())
    held = sum(distributed.local(p).numel() for p in sharded.parameters())
    every = sum(p.numel() for p in sharded.parameters())
    assert held <= every / 2 + sum(p[0].numel() for p in sharded.parameters())
    mine = {id(p) for p in sharded.parameters()}
    assert all(id(p) in mine for group in optimizer.param_groups for p in group["params"])
    with sharding.gathered(deep, sharded):
        assert same(module_tensors(deep), true) and deep.tied.weight is tied is deep.last.weight
    assert all(tensor.numel() == 0 for tensor in module_tensors(deep).values())
    backward(sharded, [deep_rows([0, 1], [4, 5])], 0)
    assert all(distributed.is_sharded(p.grad) for p in sharded.parameters() if p.requires_grad)
    with CommDebugMode() as told:
        backward(sharded, [deep_rows([i], [i]) for i in range(3)], 0)
    sums = {str(name): n for name, n in told.get_comm_counts().items() if "reduce_scatter" in str(name)}
    assert list(sums.values()) == [3], f"{sums}: one a block and one for the rest, in the last micro-batch alone"
    scalar = nn.ParameterDict({"zero": nn.Parameter(torch.ones(()))})
    with pytest.raises(InputError, match=r"deals out rows, and zero has none; give it the shape \(1,\)"):
        sharding.shard(scalar, optimizer, repeated_blocks)
    Path(f"{out}/{distributed.rank()}").touch()


def test_what_is_held_while_training(forks, tmp_path):
    args = {"out": str(tmp_path)}
    forks.start("tests.fledge.test_sharding:look_at_what_is_held", args, world=2, folder=tmp_path).wait()
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_the_engine_is_recorded(runs):
    for name, world, engine in (("sharded", 2, "fsdp2"), ("ddp", 2, "ddp"), ("whole", 1, None)):
        attempts = json.loads((runs.root / name / "runs/toy/environment.json").read_text())["attempts"]
        assert (attempts[-1]["world_size"], attempts[-1]["engine"]) == (world, engine)
    assert "2 processes, engine fsdp2" in (runs.root / "sharded/rank0.log").read_text()


def test_one_process_is_refused(tmp_path):
    with pytest.raises(InputError, match="deals parameters out over processes, and there is one; .*train.engine=ddp"):
        fit_deep(2, "fsdp2", out=str(tmp_path))


def test_ppo_is_refused_when_its_config_is_read():
    from align import ppo
    from fledge.config import load

    with pytest.raises(InputError, match="train.engine: fsdp2 .*generates with the whole policy"):
        load(ppo.Config, {"stage": "align.ppo"}, ["train.engine=fsdp2"])
