"""A run that is prolonged is the longer run; micro-batches that fit are found; every stage can be chosen by its own
validation split."""

import json

import pytest
import torch

from fledge import checkpoint, extend, track
from fledge.config import load
from fledge.errors import InputError, RunError
from fledge.evals.validation import validation
from fledge.optim import OptimConfig, adamw
from fledge.stream import DataStream
from fledge.track import Run
from fledge.train import TrainConfig, fit
from tests.fledge.test_train import Hungry, Line, Toy, fitted, line_rows, without_times


class Long(Toy):
    """A stage whose length and rate are part of what it is."""

    train: TrainConfig
    optim: OptimConfig


def trained(folder, steps, optim, name="toy", **more):
    """A line, fitted with a rate by a config: its parameters and what was logged."""
    config = load(
        Long,
        {
            "out": str(folder),
            "name": name,
            "optim": {"lr": 0.1, **optim},
            "train": {"batch": 4, "steps": steps, "precision": "fp32", "device": "cpu", "save_every": 4, **more},
        },
    )
    torch.manual_seed(0)
    objective = Line()
    made = adamw([{"params": list(objective.parameters())}], config.optim, batch=4, steps=steps, steps_per_epoch=3)
    with Run.open(config) as run:
        fit(objective, DataStream(13, line_rows, batch=4, seed=1), made, config.train, run, steps=steps, seed=2)
    return objective, without_times(track.read_metrics(run.dir / "metrics.jsonl"))


# --------------------------------------------------------------------------------------------------------- prolonged


@pytest.mark.parametrize("optim", [{}, {"cooldown": 5}, {"cooldown": "2 epochs", "warmup": 3}])
def test_a_prolonged_run_is_the_longer_run(tmp_path, optim):
    """Constant until its cooldown: what comes after that is thrown away, and the rest is the same bits."""
    optim = {"decay": "constant", **optim}
    whole, curve = trained(tmp_path / "whole", 23, optim)
    trained(tmp_path, 14, optim, "short")
    longer, found = trained(tmp_path, 23, optim, "long", extend_from=str(tmp_path / "short"))
    begun = {None: 14, 5: 9, "2 epochs": 8}[optim.get("cooldown")]
    assert extend.origin(tmp_path / "short") == (begun, True)
    assert found == curve and longer.steps == 23
    for mine, true in zip(longer.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, true)
    identity = json.loads((tmp_path / "long/identity.json").read_text())
    assert identity["extends"]["step"] == begun


def test_a_cooldown_falls_along_a_line():
    rate = OptimConfig(lr=0.8, decay="constant", cooldown=4, warmup=2, min_lr=0.2).lr_at(1, 10, 1)
    assert [rate(step) for step in range(11)] == pytest.approx([0, 0.4] + [0.8] * 5 + [0.65, 0.5, 0.35, 0.2])


def test_a_rate_that_follows_from_the_length_is_prolonged_in_words(tmp_path, capsys):
    """From its end on, with the longer run's rate: said, and not the run that was longer from its first step."""
    optim = {"decay": "linear"}
    _, curve = trained(tmp_path / "whole", 12, optim)
    trained(tmp_path, 6, optim, "short")
    _, found = trained(tmp_path, 12, optim, "long", extend_from=str(tmp_path / "short"))
    assert "the rate of" in (said := capsys.readouterr().out) and "from step 6 on it is that of the longer run" in said
    rates = [[record["train/lr"] for record in records] for records in (found, curve)]
    assert rates[0][6:] == rates[1][6:] and rates[0][:6] != rates[1][:6]


def test_a_prolonged_run_is_interrupted_and_goes_on(tmp_path):
    optim = {"decay": "constant"}
    _, curve = trained(tmp_path / "whole", 16, optim)
    trained(tmp_path, 8, optim, "short")
    more = {"extend_from": str(tmp_path / "short")}
    trained(tmp_path, 16, optim, "long", **more)
    newest = checkpoint.find(tmp_path / "long/checkpoints").path
    (newest / "manifest.json").unlink()  # as if it had been killed there
    with pytest.warns(RuntimeWarning, match="is broken"):
        _, found = trained(tmp_path, 16, optim, "long", **more)
    assert found == curve


def test_what_cannot_be_prolonged_is_refused(tmp_path):
    trained(tmp_path, 6, {"decay": "constant"}, "short")
    earlier = {"extend_from": str(tmp_path / "short")}
    with pytest.raises(InputError, match=r"trained with something else \(optim.lr 0.1 -> 0.2\); only train.steps"):
        trained(tmp_path, 12, {"decay": "constant", "lr": 0.2}, "a", **earlier)
    with pytest.raises(InputError, match="is at step 6, train.steps 6; ask for more"):
        trained(tmp_path, 6, {"decay": "constant"}, "b", **earlier)
    with pytest.raises(InputError, match="is no run's folder"):
        trained(tmp_path, 12, {"decay": "constant"}, "c", extend_from=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="cooldown is the end of a constant rate, but decay is cosine"):
        load(OptimConfig, {"lr": 0.1, "cooldown": 5})
    with pytest.raises(InputError, match="3 steps of warmup and 8 of cooldown exceed the 10 train.steps"):
        OptimConfig(lr=0.1, decay="constant", warmup=3, cooldown=8).lr_at(1, 10, 1)


# ------------------------------------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("most, found", [(9, 4), (3, 2), (1, 1)])
def test_what_fits_is_found_and_kept(tmp_path, most, found, capsys):
    """Halves of the 4 rows, until a forward does not run out of memory; the run is that of this number given."""
    objective, _, logged = fitted(tmp_path / "auto", objective=seeded(most), micro_batch="auto")
    given, _, same = fitted(tmp_path / "given", objective=seeded(most), micro_batch=found)
    assert f"micro-batches of {found} rows" in capsys.readouterr().out
    assert without_times(logged) == without_times(same)
    assert torch.equal(objective.layer.weight, given.layer.weight)
    assert checkpoint.find(tmp_path / "auto/toy/checkpoints").state["micro_batch"] == found


def seeded(most: int) -> Hungry:
    torch.manual_seed(0)
    return Hungry(most)


def test_a_resumed_run_keeps_what_was_found(tmp_path):
    """More memory than before is no reason for other bits."""
    whole, *_ = fitted(tmp_path / "whole", objective=seeded(1), micro_batch="auto")
    fitted(tmp_path / "parts", steps=3, objective=seeded(1), micro_batch="auto")
    parts, *_ = fitted(tmp_path / "parts", objective=seeded(9), micro_batch="auto")
    assert torch.equal(whole.layer.weight, parts.layer.weight)


def test_nothing_fits(tmp_path):
    with pytest.raises(RunError, match="toy: out of memory with one row"):
        fitted(tmp_path, objective=Hungry(0), micro_batch="auto")


# --------------------------------------------------------------------------------------------------------- validation


def test_validation_is_the_mean_over_the_rows_without_dropout():
    """Against the sum over all rows at once; 13 samples in batches of 4 leave one out."""
    torch.manual_seed(3)
    objective = Line()
    config = load(TrainConfig, {"batch": 4, "steps": 1, "precision": "fp32", "eval_every": 1, "micro_batch": 3})
    seen = []

    def rows(ids, seeds):
        seen.extend(zip(ids, seeds, strict=True))
        return line_rows(ids, seeds)

    measure = validation(objective, config, lambda: (13, rows))
    found = measure(0)
    assert measure(7) == found and seen[:12] == seen[12:] and [i for i, _ in seen[:12]] == list(range(12))
    x = line_rows(*zip(*seen[:12], strict=True))["x"]
    with torch.no_grad():
        y = objective.layer(x).squeeze(1)
    square, small = (y - x.sum(1)).square().mean().item(), y.square().mean().item()
    assert found == pytest.approx({"loss": 2 * square + 0.5 * small, "square": square, "small": small}, rel=1e-5)


def test_validation_that_nobody_asked_for_opens_nothing():
    config = load(TrainConfig, {"batch": 4, "steps": 1})
    assert validation(Line(), config, lambda: pytest.fail("opened")) is None
