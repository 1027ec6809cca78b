"""What is measured beside the training: FLOPs in closed form, spikes by brute force; and that nothing else moves."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fledge import throughput
from fledge.throughput import Spikes, peak_flops
from tests.fledge.test_train import Line, fitted, without_times
from tests.objectives import BATCH, build

# ------------------------------------------------------------------------------------------------------------- spikes


def test_spikes_are_those_that_brute_force_finds():
    rng = np.random.default_rng(0)
    loss, norm = rng.normal(3, 0.1, 600), rng.gamma(4, size=600)
    loss[[50, 200, 201, 420]] += 5  # the first lies before the window is full
    norm[[300, 420]] += 100
    expected, seen, spikes = 0, [], Spikes()
    for i in range(600):
        for values in (loss, norm):
            before = values[i - 128 : i] if i >= 128 else None
            if before is not None and values[i] > before.mean() + 6 * before.std():
                expected += 1
                break
        seen.append(spikes.see({"train/loss": loss[i], "train/grad_norm": norm[i]}))
        assert seen[-1] == expected
    assert expected == 4 and seen[199] == 0 and seen[200] == 1 and seen[-1] == 4


def test_a_still_loss_has_no_spikes():
    spikes = Spikes()
    assert [spikes.see({"train/loss": 1 + 1e-12 * (i == 200), "train/grad_norm": 0.0}) for i in range(300)] == [0] * 300


class Spiky(Line):
    """Its loss jumps at the steps ``spikes``, and ends the process at ``dies``."""

    def __init__(self, spikes=(), dies=None):
        super().__init__()
        self.spikes, self.dies = spikes, dies

    def forward(self, batch, step):
        if step == self.dies:
            raise KeyboardInterrupt
        out = super().forward(batch, step)
        return out | {"small": out["small"] + 1e6 * (step in self.spikes)}


def spiky(dies=None) -> Spiky:
    torch.manual_seed(0)
    return Spiky({60, 140, 151}, dies)


def test_a_resumed_run_counts_the_same_spikes(tmp_path):
    calm, interrupted = tmp_path / "calm", tmp_path / "interrupted"
    _, _, true = fitted(calm, steps=170, objective=spiky(), save_every=30)
    for dies in (100, 147, 155):
        with pytest.raises(KeyboardInterrupt):
            fitted(interrupted, steps=170, objective=spiky(dies), save_every=30)
    _, _, logged = fitted(interrupted, steps=170, objective=spiky(), save_every=30)
    assert without_times(logged) == without_times(true)
    assert {r["step"]: r["train/spikes"] for r in true}[139] == 0 and true[-1]["train/spikes"] == 2


def test_after_a_roll_back_the_window_is_that_of_the_curve(tmp_path):
    """The same counts as brute force over what metrics.jsonl holds in the end."""

    class Odd(Spiky):
        def forward(self, batch, step):
            out = super().forward(batch, step)
            return out | {"small": out["small"] * (float("inf") if step == 150 else 1)}

    torch.manual_seed(0)
    _, _, logged = fitted(tmp_path, steps=190, objective=Odd({149, 170}), save_every=40, on_nonfinite="roll_back")
    trained = [r for r in logged if "train/loss" in r]
    assert not {120, 149, 150} & {r["step"] for r in trained}  # the batches from the checkpoint to there are left out
    again = Spikes()
    assert [again.see(r) for r in trained] == [r["train/spikes"] for r in trained]
    assert trained[-1]["train/spikes"] == 1


# -------------------------------------------------------------------------------------------------------------- FLOPs


class Network(Line):
    """B rows of 3 -> H -> 1, with dropout."""

    H = 8

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, self.H), nn.Linear(self.H, 1))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_share_of_the_peak_is_that_of_the_arithmetic(tmp_path, monkeypatch, micro_batch):
    """Each product of (m, k) and (k, n) is 2mkn; the backward has two for each, but none to the input."""
    _, _, plain = fitted(tmp_path / "plain", objective=network(), micro_batch=micro_batch)
    monkeypatch.setattr(throughput, "here", lambda precision: 1e9)
    counted, _, logged = fitted(tmp_path / "counted", objective=network(), micro_batch=micro_batch)
    B, H = 4, Network.H
    flops = 2 * (2 * B * 3 * H) + 3 * (2 * B * H)
    for record in logged:
        assert record["system/mfu"] * record["time/step"] * 1e9 == pytest.approx(flops, rel=1e-6)
        assert "system/hfu" not in record
    assert without_times(logged) == without_times(plain)  # dropout and all: the counting moved nothing
    assert counted.steps == 6 and not any("system/mfu" in r for r in plain)


def test_recomputed_activations_are_called_by_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "here", lambda precision: 1e9)
    _, _, logged = fitted(tmp_path, objective=network(), grad_checkpointing=True)
    assert all("system/hfu" in r and "system/mfu" not in r for r in logged)


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40", "bf16", 181e12),
        ("Tesla T4", "fp32", 8.1e12),
        ("Tesla T4", "bf16", None),  # has no such units
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_a_peak_is_known_or_it_is_not_said(name, precision, expected):
    assert peak_flops(name, precision) == expected


def test_the_peak_of_tf32_is_not_that_of_fp32(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12


# ------------------------------------------------------------------------------------------------- rows, tokens, memory


class Texts(Line):
    """Rows whose first number is above 0 are two tokens long, the others one."""

    def tokens(self, batch):
        return int((batch["x"][:, 0] > 0).sum()) + len(batch["x"])


def test_sequences_count_tokens(tmp_path):
    torch.manual_seed(0)
    _, stream, logged = fitted(tmp_path, objective=Texts())
    for record in logged:
        rows = stream.fetch(stream.ids(record["step"]), record["step"])["x"]
        true = sum(2 if row[0] > 0 else 1 for row in rows)
        assert record["time/tokens_per_second"] * record["time/step"] == pytest.approx(true)
        assert record["time/rows_per_second"] * record["time/step"] == pytest.approx(4)
        assert record["time/data_share"] == record["time/data"] / record["time/step"] < 1


@pytest.mark.parametrize(("name", "mask"), [("clm", "document"), ("mlm", "document"), ("sft", "attention_mask")])
def test_padding_is_no_token(name, mask):
    objective, batch = build(name, torch.float32)
    lengths = [12 - row % 5 for row in range(BATCH)]  # as tests/objectives.py pads them
    assert objective.tokens(batch) == sum(lengths)
    batch["input_ids"][batch[mask] == 0] = 7  # whatever stands there
    assert objective.tokens(batch) == sum(lengths)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to compare with")
def test_memory_is_the_resident_set_on_a_cpu(tmp_path):
    held = torch.ones(64 << 20, dtype=torch.uint8)  # 64 MiB that are touched
    _, _, logged = fitted(tmp_path)
    status = Path("/proc/self/status").read_text()
    now = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 2**20
    assert logged[-1]["system/memory_gib"] == pytest.approx(now, rel=0.2) and held.sum() == 64 << 20
    json.dumps(logged, allow_nan=False)
