"""The loop: its knobs change no result, what it refuses, what it logs; and every objective can learn one batch."""

import copy
import json
import math
import shutil
from typing import Any, Literal

import pytest
import torch
from torch import nn

from fledge import train as loop
from fledge.config import StageConfig, load, science
from fledge.errors import InputError, RunError
from fledge.optim import Optim, OptimConfig, adamw, decay_groups
from fledge.stream import DataStream, rows_of
from fledge.track import Run
from fledge.train import TrainConfig, backward, checkpoint_blocks, fit, load_ahead, repeated_blocks, update
from tests.objectives import BATCH, BUILDERS, build


def gradients(objective: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------- knobs


@pytest.mark.parametrize("name", ["mae", "clm"])
def test_bf16_is_a_precision_of_the_forward_alone(name):
    objective, batch = build(name, torch.float32)
    plain = backward(objective, [batch], 0)["loss"]
    true = gradients(objective)
    objective.zero_grad()
    seen = []
    hook = next(m for m in objective.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    half = backward(objective, [batch], 0, precision="bf16")["loss"]
    hook.remove()
    assert seen == [torch.bfloat16] and half.dtype == torch.float32
    assert half != plain and half.item() == pytest.approx(plain.item(), rel=0.01)
    assert {p.dtype for p in objective.parameters()} == {
        p.grad.dtype for p in objective.parameters() if p.grad is not None
    }
    flat, flat_true = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients(objective), true))
    assert torch.cosine_similarity(flat, flat_true, dim=0) > 0.99


def with_dropout(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    objective, batch = build(name, torch.float32)
    for module in objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    return objective, batch


@pytest.mark.parametrize("name", ["mae", "clm", "mlm", "sft"])
def test_gradient_checkpointing_is_exact_with_dropout_too(name):
    objective, batch = with_dropout(name)
    pieces = [rows_of(batch, slice(0, 5)), rows_of(batch, slice(5, BATCH))]
    means = backward(objective, pieces, 4, seed=1)
    true = gradients(objective)
    blocks = repeated_blocks(objective)
    assert len(blocks) == (4 if name == "mae" else 2)
    calls = []
    for block in blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **kw: calls.append(1) or inner(*args, **kw)
    checkpoint_blocks(blocks)
    objective.zero_grad()
    again = backward(objective, pieces, 4, seed=1)
    assert len(calls) == 2 * 2 * len(blocks)  # each block of each micro-batch forward, and forward once more
    assert torch.equal(means["loss"], again["loss"])
    found = gradients(objective)
    assert found.keys() == true.keys() and [n for n in true if not torch.equal(found[n], true[n])] == []
    calls.clear()
    with torch.no_grad():
        objective(batch, 0)
    assert len(calls) == len(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "clm"])
def test_compiled_blocks_give_the_same_loss(name):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler here, and there is none")
    objective, batch = build(name, torch.float32)
    names = list(objective.state_dict())
    plain = backward(objective, [batch], 0)["loss"]
    true = gradients(objective)
    for block in repeated_blocks(objective):
        block.compile()
    objective.zero_grad()
    compiled = backward(objective, [batch], 0)["loss"]
    assert list(objective.state_dict()) == names
    assert compiled.item() == pytest.approx(plain.item(), rel=1e-5)
    flat, flat_true = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients(objective), true))
    assert (flat - flat_true).norm() <= 1e-4 * flat_true.norm()


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    objective, batch = with_dropout("sft")

    def loss(step, seed=0, pieces=(slice(0, BATCH),)):
        torch.rand(3)  # whatever anybody draws
        objective.zero_grad()
        return backward(objective, [rows_of(batch, p) for p in pieces], step, seed=seed)["loss"].item()

    assert loss(3) == loss(3) and len({loss(3), loss(4), loss(3, seed=1)}) == 3
    twice = {k: torch.cat([v[:2], v[:2]]) for k, v in batch.items()}
    same = [objective(rows_of(twice, slice(0, 2)), 0)["loss"].item() for _ in range(2)]
    assert same[0] != same[1]


# ------------------------------------------------------------------------------------------------------------- update


def optimiser(objective: nn.Module, lr: float = 0.01, **more: Any) -> Optim:
    config = OptimConfig(lr=lr, decay="constant", weight_decay=0.0, **more)
    return adamw(decay_groups(objective), config, batch=BATCH, steps=100, steps_per_epoch=10)


@pytest.mark.parametrize("where, term", [("loss", "loss is nan"), ("gradient", "the gradient norm is nan")])
@pytest.mark.parametrize("name", ["mae", "clm"])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(name, where, term):
    objective, batch = build(name, torch.float32)
    optim = optimiser(objective)
    update(objective, [batch], 0, optim)
    before = copy.deepcopy(objective.state_dict()), copy.deepcopy(optim.optimizer.state_dict()["state"])
    weight = next(p for p in objective.parameters() if p.requires_grad and p.ndim > 1)
    if where == "loss":
        weight.data[0] = float("nan")
        before[0].update({n: t.clone() for n, t in objective.state_dict().items()})
    else:
        weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RunError, match=f"step 1: {term}. Nothing was updated"):
        update(objective, [batch], 1, optim)
    state = objective.state_dict()
    assert all(
        torch.equal(
            state[n],
            t,
        )
        or (state[n].isnan() == t.isnan()).all()
        for n, t in before[0].items()
    )
    after = optim.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], v) for i, s in before[1].items() for k, v in s.items())


FLOOR = {"mae": 0.15, "mlm": 0.05, "clm": 0.25, "clip": 0.05, "sft": 0.1}
"""What is left of the loss of one batch after it was trained on many times."""
OWN = {"dino", "sft_mixed", "reward", "reward_ranked", "reward_plackett_luce", "ppo", "ppo_lora"}
"""Those whose loss does not go to zero; each has a test of its own, but for PPO's adapters, which learn too little."""


def overfit(name: str, steps: int = 150, lr: float = 0.01) -> tuple[dict, dict, nn.Module, dict]:
    objective, batch = build(name, torch.float32)
    optim = optimiser(objective, lr)
    curve = [update(objective, [batch], step, optim)[0] for step in range(steps)]
    assert all(v.isfinite().all() for means in curve for v in means.values())
    return curve[0], curve[-1], objective, batch


def test_every_objective_is_overfitted():
    assert FLOOR.keys() | OWN == BUILDERS.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_overfits_one_batch(name):
    first, last, *_ = overfit(name, *((300, 0.002) if name in ("mae", "clip") else ()))
    assert last["loss"] < FLOOR[name] * first["loss"]


def test_dino_overfits_one_batch():
    """The student comes to its teacher: the KL falls; the teacher's entropy is not the student's to lower."""
    first, last, *_ = overfit("dino")
    assert last["kl"] < 0.25 * first["kl"]


def test_adapters_learn_answers_and_text_of_one_batch():
    """As far as rank 2 goes before the head of an untrained network; the base stays as it is."""
    base, _ = build("sft_mixed", torch.float32)
    first, last, objective, _ = overfit("sft_mixed")
    assert last["answers"] < 0.97 * first["answers"] and last["pretraining"] < 0.97 * first["pretraining"]
    assert all(torch.equal(a, b) for a, b in zip(objective.constant(), base.constant(), strict=True))


def test_reward_overfits_one_batch():
    first, last, *_ = overfit("reward")
    assert last["accuracy"] == 1 and last["loss"] < 0.1 * first["loss"] and last["margin"] > 3


def test_ppo_reaches_the_clipped_optimum_of_one_rollout():
    """max_r min(r A, clip(r) A) is 1.2 A for A > 0 and .8 A for A < 0: what the policy can gain on a frozen rollout."""
    _, last, _, batch = overfit("ppo", steps=300)
    mask, A = batch["response_mask"].bool(), batch["advantages"]
    optimum = -torch.where(A > 0, 1.2 * A, 0.8 * A)[mask].mean()
    start = -A[mask].mean()
    assert optimum <= last["policy_loss"] + 1e-6
    assert last["policy_loss"] - optimum < 0.1 * (start - optimum)


# --------------------------------------------------------------------------------------------------------------- fit


class Line(nn.Module):
    """y = w x with dropout on x; one parameter tensor and one buffer that counts its steps."""

    weights = {"square": 2.0, "small": 0.5}

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 1), nn.Dropout(0.2)
        self.register_buffer("steps", torch.zeros(()))

    def counts(self, batch):
        return {"square": len(batch["x"]), "small": len(batch["x"]), "mean_x": len(batch["x"])}

    def forward(self, batch, step):
        y = self.layer(self.drop(batch["x"])).squeeze(1)
        square = (y - batch["x"].sum(dim=1)).square().sum()
        return {"square": square, "small": y.square().sum(), "mean_x": batch["x"].detach().sum(dim=0)}

    def after_step(self, step, means):
        assert set(means) == {"square", "small", "mean_x"} and means["mean_x"].shape == (3,)
        self.steps += 1


def line_rows(ids, seeds):
    return {"x": torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])}


class Skipping(DataStream):
    """Leaves out the steps ``skipped`` and remembers what it was told."""

    def __init__(self, *args, skipped=(), **kw):
        super().__init__(*args, **kw)
        self.skipped, self.begun, self.observed = skipped, [], []

    def begin(self, step):
        self.begun.append(step)

    def ids(self, step):
        return None if step in self.skipped else super().ids(step)

    def observe(self, step, means):
        self.observed.append(step)


class Toy(StageConfig):
    stage: Literal["pretrain.toy"] = "pretrain.toy"


def fitted(folder, steps=6, evaluate=None, skipped=(), objective=None, optim=None, **more):
    """Fit a line in ``folder``: the objective, the stream, and what was logged."""
    config = load(TrainConfig, {"batch": 4, "steps": steps, "precision": "fp32", "device": "cpu", **more})
    torch.manual_seed(0)
    objective = objective or Line()
    stream = Skipping(13, line_rows, batch=4, seed=1, skipped=skipped)
    optim = optim or optimiser(objective, 0.05)
    with Run.open(Toy(out=str(folder))) as run:
        fit(objective, stream, optim, config, run, steps=steps, seed=2, evaluate=evaluate)
    path = folder / "toy" / "metrics.jsonl"
    return objective, stream, [json.loads(line) for line in path.read_text().splitlines()]


class Hungry(Line):
    """Fits micro-batches of at most ``most`` rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, batch, step):
        if len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")
        return super().forward(batch, step)


def test_out_of_memory_names_the_largest_micro_batch_to_try(tmp_path):
    tried: list[int | None] = [None]
    while True:
        try:
            objective, *_ = fitted(tmp_path, objective=Hungry(1), micro_batch=tried[-1])
            break
        except RunError as error:
            said = str(error)
            assert said.startswith("toy: step 0: out of memory with micro-batches of")
            assert "CUDA out of memory" in said and "train.grad_checkpointing=true" in said and "GPU 0" not in said
            tried.append(int(said.partition("train.micro_batch=")[2].partition(",")[0]))
    assert tried == [None, 2, 1] and objective.steps == 6
    with pytest.raises(RunError, match="try next: a smaller model;") as caught:
        fitted(tmp_path / "b", objective=Hungry(0), micro_batch=1, grad_checkpointing=True, precision="bf16")
    assert "train.micro_batch=" not in str(caught.value)


def without_times(records, *drop):
    return [{k: v for k, v in r.items() if not k.startswith(("time/", "system/", *drop))} for r in records]


def test_what_is_logged(tmp_path):
    lr = OptimConfig(lr=0.1, warmup=2, min_lr=0.01).lr_at(4, 6, 3)
    objective = Line()
    optim = Optim(torch.optim.AdamW(objective.parameters()), lr=lr, clip=0.001)
    _, stream, logged = fitted(tmp_path, objective=objective, optim=optim)
    assert [r["step"] for r in logged] == stream.begun == stream.observed == list(range(6))
    assert [r["train/lr"] for r in logged] == [lr(step) for step in range(6)]
    for r in logged:
        assert set(r) == {"step", "train/loss", "train/square", "train/small", "train/lr", "train/grad_norm"} | {
            "train/spikes", "time/step", "time/data", "time/data_share", "time/rows_per_second", "system/memory_gib"
        }  # fmt: skip
        assert r["train/loss"] == pytest.approx(2 * r["train/square"] + 0.5 * r["train/small"], rel=1e-6)
        assert r["train/grad_norm"] > 0.01  # before clipping


def test_log_every_keeps_the_last_step(tmp_path):
    _, _, logged = fitted(tmp_path, steps=8, log_every=3)
    assert [r["step"] for r in logged] == [0, 3, 6, 7]


def test_a_skipped_step_is_counted_and_logged_as_skipped(tmp_path):
    objective, stream, logged = fitted(tmp_path, skipped={2, 5}, save_every=2)
    assert stream.begun == list(range(6)) == [r["step"] for r in logged] and stream.observed == [0, 1, 3, 4]
    assert [r["step"] for r in logged if r.get("train/skipped")] == [2, 5]
    assert not any("train/loss" in r for r in logged if r["step"] in (2, 5))
    assert objective.steps == 4
    assert [p.name for p in sorted((tmp_path / "toy" / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]


def test_evaluation_moves_nothing(tmp_path):
    """Though it draws random numbers and leaves the network in eval mode, where it has no dropout."""
    measured: nn.Module = Line()
    torch.manual_seed(0)
    measured.load_state_dict(Line().state_dict())

    def evaluate(step):
        torch.manual_seed(0)
        measured.eval()
        return {"accuracy": torch.rand(()).item()}

    _, _, with_it = fitted(tmp_path / "a", objective=measured, evaluate=evaluate, eval_every=2)
    _, _, without = fitted(tmp_path / "b", evaluate=evaluate, eval_every=0)
    training = [r for r in with_it if "train/loss" in r]
    assert without_times(training) == without_times(without)
    assert [r["step"] for r in with_it if "eval/accuracy" in r] == [1, 3, 5]


def test_a_network_that_was_read_in_eval_mode_trains_with_dropout(tmp_path):
    torch.manual_seed(0)
    _, _, from_eval = fitted(tmp_path / "a", objective=Line().eval())
    _, _, from_train = fitted(tmp_path / "b")
    assert without_times(from_eval) == without_times(from_train)


def test_workers_prepare_the_same_batches():
    stream = Skipping(13, line_rows, batch=4, seed=1, skipped={3})
    torch.manual_seed(0)
    state = torch.get_rng_state()
    ways = [
        list(load_ahead(stream, range(1, 7), TrainConfig(batch=4, steps=7, workers=workers, micro_batch=3)))
        for workers in (0, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        [b is None for b, _ in ways[0]] == [b is None for b, _ in ways[1]] == [False, False, True, False, False, False]
    )
    for (one, pieces), (other, others) in zip(*ways, strict=True):
        assert pieces == others and (one is None or torch.equal(one["x"], other["x"]))


def test_nothing_prefetches_an_on_policy_stream():
    stream = Skipping(13, line_rows, batch=4, seed=1)
    stream.on_policy = True
    fetched = []
    stream.rows = lambda ids, seeds: fetched.append(1) or line_rows(ids, seeds)
    batches = load_ahead(stream, range(3), TrainConfig(batch=4, steps=3, workers=2))
    next(batches)
    assert fetched == [1]


def test_fit_says_what_to_do_about_a_loss_that_is_not_finite(tmp_path):
    class Broken(Line):
        def forward(self, batch, step):
            out = super().forward(batch, step)
            return out | {"small": out["small"] * (float("inf") if step == 3 else 1)}

    objective = Broken()
    with pytest.raises(RunError, match=r"toy: step 3: small is inf. Nothing was updated.*optim.lr.*precision: fp32"):
        fitted(tmp_path, objective=objective, save_every=2)
    assert objective.steps == 3
    assert [p.name for p in (tmp_path / "toy" / "checkpoints").iterdir()] == ["step_00000002"]
    assert json.loads((tmp_path / "toy" / "status.json").read_text())["state"] == "failed"


def test_fit_turns_its_knobs(tmp_path, monkeypatch):
    """grad_checkpointing and compile reach the blocks, and deterministic torch; the curve is the same."""
    torch.manual_seed(0)
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    monkeypatch.setattr(loop, "checkpoint_blocks", lambda blocks: compiled.append(len(blocks)))

    class Deep(Line):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2)))

        def forward(self, batch, step):
            return super().forward({"x": self.blocks(batch["x"])}, step)

    fitted(tmp_path, objective=Deep(), compile=True, grad_checkpointing=True, deterministic=True)
    assert compiled == [2, "Sequential", "Sequential"] and torch.are_deterministic_algorithms_enabled()
    fitted(tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()


def nan_on_one_rank() -> None:
    """Rank 1's rows give a NaN: every rank must stop in that step, with nothing moved."""
    from fledge import distributed

    distributed.setup("cpu")
    torch.manual_seed(0)
    objective = Line()
    model, optim = distributed.wrap(objective), optimiser(objective)
    x = torch.ones(4, 3)
    update(model, [{"x": x}], 0, optim)
    before = objective.layer.weight.detach().clone()
    bad = x * float("nan") if distributed.rank() == 1 else x
    with pytest.raises(RunError, match="step 1: square is nan. Nothing was updated"):
        update(model, [{"x": bad}], 1, optim)
    assert torch.equal(objective.layer.weight, before) and objective.steps == 1
    update(model, [{"x": x}], 2, optim)  # and nobody is out of step


def test_a_nan_on_one_rank_stops_every_rank(forks, tmp_path):
    forks.start("tests.fledge.test_train:nan_on_one_rank", {}, world=2, folder=tmp_path).wait()


# ------------------------------------------------------------------------------------------------------------ select


CURVE = {2: 0.3, 4: 0.9, 6: math.nan, 8: 0.9, 10: 0.7, 11: 0.8}
"""A made-up metric behind so many steps: its best is that of step 4, and of step 2 where less is better."""


def selected(folder, mode="max", metric="eval/score", curve=CURVE, die_at=None, **more):
    """Fit 11 steps; the objective, and which evaluations were made. ``die_at``: raise in that evaluation."""
    asked = []

    def evaluate(step):
        asked.append(step + 1)
        if step + 1 == die_at:
            raise KeyboardInterrupt
        return {"score": curve.get(step + 1, 0.0), "other": 1.0}

    how = {"steps": 11, "eval_every": 2, "save_every": 3, "keep": 1, "select": {"metric": metric, "mode": mode}}
    objective, *_ = fitted(folder, evaluate=evaluate, **{**how, **more})
    return objective, asked


def steps_kept(folder) -> list[int]:
    return [int(path.name[5:]) for path in sorted((folder / "toy/checkpoints").glob("step_*"))]


@pytest.mark.parametrize("mode, best", [("max", 4), ("min", 2)])
def test_the_best_is_kept_named_and_handed_over(tmp_path, mode, best):
    objective, asked = selected(tmp_path, mode)
    assert asked == [1, 2, 4, 6, 8, 10, 11]  # the first only asks what is measured; the last step counts too
    assert steps_kept(tmp_path) == [best, 11]
    note = json.loads((tmp_path / "toy/best.json").read_text())
    assert note == {"metric": "eval/score", "mode": mode, "value": CURVE[best], "step": best,
                    "checkpoint": f"checkpoints/step_{best:08d}"}  # fmt: skip
    until, *_ = fitted(tmp_path / "short", steps=best)
    assert objective.steps == best
    assert all(torch.equal(a, b) for a, b in zip(objective.parameters(), until.parameters(), strict=True))


@pytest.mark.parametrize("die_at", [2, 4, 6, 8, 10, 11])
def test_the_choice_survives_a_kill(tmp_path, die_at):
    with pytest.raises(KeyboardInterrupt):
        selected(tmp_path, die_at=die_at)
    objective, _ = selected(tmp_path)
    assert objective.steps == 4 and steps_kept(tmp_path) == [4, 11]
    assert json.loads((tmp_path / "toy/best.json").read_text())["step"] == 4
    objective, asked = selected(tmp_path)  # trained to the end, and not handed over
    assert objective.steps == 4 and asked == []


def test_what_cannot_be_selected_by_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"eval/scor is not measured; expected one of eval/score, eval/other; did you"):
        selected(tmp_path / "a", metric="eval/scor")
    with pytest.raises(InputError, match="eval/x is not measured while this stage trains"):
        fitted(tmp_path / "b", eval_every=1, select={"metric": "eval/x", "mode": "max"})
    with pytest.raises(RunError, match="eval/score was never a finite number"):
        selected(tmp_path / "c", curve=dict.fromkeys(range(12), math.nan))
    for wrong, says in [
        ({"select": {"metric": "eval/x", "mode": "max"}}, "select needs eval_every"),
        ({"select": {"metric": "train/loss", "mode": "min"}, "eval_every": 1}, "eval/"),
        ({"select": {"metric": "eval/x", "mode": "best"}, "eval_every": 1}, "'min' or 'max'"),
    ]:
        with pytest.raises(InputError, match=says):
            load(TrainConfig, {"batch": 1, "steps": 1, **wrong})


def test_the_cadence_of_evaluation_is_science_only_where_it_chooses():
    config = {"batch": 1, "steps": 1, "eval_every": 5}
    assert "eval_every" not in science(load(TrainConfig, config))
    select = {"metric": "eval/x", "mode": "max"}
    assert science(load(TrainConfig, {**config, "select": select}))["eval_every"] == 5
