"""DINO against the authors' own numbers (tests/fixtures/README.md), brute force and closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from fledge.models.positions import interpolate_pos_embed, tokens
from pretrain.dino import (
    DINO,
    DINOHead,
    Network,
    cross_view_entropy,
    entropy,
    teacher_probs,
    teacher_temp_at,
    warmup_then_cosine,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOL = {"rtol": 1e-9, "atol": 1e-9}
STEPS, PER_EPOCH = 12, 3


@pytest.fixture(scope="module")
def truth():
    return json.loads((FIXTURES / "dino.json").read_text()) | {"t": load_file(FIXTURES / "dino.safetensors")}


def lr(step):
    return warmup_then_cosine(step, peak=2e-3, end=1e-6, warmup_steps=3, steps=STEPS)


def weight_decay(step):
    return warmup_then_cosine(step, peak=0.04, end=0.4, warmup_steps=0, steps=STEPS)


def momentum(step):
    return warmup_then_cosine(step, peak=0.9, end=1.0, warmup_steps=0, steps=STEPS)


def teacher_temp(step):
    return teacher_temp_at(step // PER_EPOCH, warmup=0.04, final=0.07, warmup_epochs=2)


def network(norm_last_layer=False, K=64):
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0, dynamic_img_size=True
    )
    return Network(vit, DINOHead(32, K, hidden_dim=48, bottleneck_dim=16, norm_last_layer=norm_last_layer))


def ours(name):
    """The authors' parameter name -> ours: weight_norm is a parametrization now."""
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(f"last_layer.{old}", f"last_layer.parametrizations.weight.{new}")
    return name


def part(tensors, prefix):
    return {ours(k.removeprefix(prefix)): v for k, v in tensors.items() if k.startswith(prefix)}


def build(truth) -> DINO:
    student = network().double()
    student.load_state_dict(part(truth["t"], "student0/"))
    return DINO(student, network().double(), teacher_temp=teacher_temp, momentum=momentum).double()


def batch_at(truth, step):
    views = [truth["t"][f"crops/{step:02d}/{v}"] for v in range(6)]
    return {"global_crops": torch.stack(views[:2], dim=1), "local_crops": torch.stack(views[2:], dim=1)}


def check_end(objective, truth):
    for mine, name in ((objective.student, "student_final/"), (objective.teacher, "teacher_final/")):
        want, have = part(truth["t"], name), mine.state_dict()
        assert want.keys() == have.keys()
        for key in want:
            torch.testing.assert_close(have[key], want[key], **TOL)


def test_twelve_steps_in_ten_lines(truth):
    """Losses, centers, norms, first gradients and final weights, with nothing of the library but the objective."""
    objective = build(truth)
    named = dict(objective.student.named_parameters())
    decayed = {ours(name) for name in truth["decay"]}
    optimizer = torch.optim.AdamW([{"params": [p]} for p in named.values()], lr=0.0)
    for step in range(STEPS):
        batch = batch_at(truth, step)
        counts, out = objective.counts(batch), objective(batch, step)
        optimizer.zero_grad()
        (out["loss"] / counts["loss"]).backward()
        assert out["loss"].item() / counts["loss"] == pytest.approx(truth["loss"][step], rel=1e-9, abs=1e-9)
        norms = [p.grad.norm().item() for p in named.values()]
        assert norms == pytest.approx(truth["clip_norms"][step], rel=1e-9, abs=1e-9)
        if step == 0:
            for name, want in part(truth["t"], "grad0/").items():  # before clipping
                torch.testing.assert_close(named[name].grad, want, **TOL)
        for (name, p), norm, group in zip(named.items(), norms, optimizer.param_groups, strict=True):
            p.grad = None if step < PER_EPOCH and "last_layer" in name else p.grad * min(1, 0.3 / (norm + 1e-6))
            group.update(lr=lr(step), weight_decay=weight_decay(step) if name in decayed else 0.0)
        optimizer.step()
        objective.after_step(step, {"teacher_mean": out["teacher_mean"] / counts["teacher_mean"]})
        torch.testing.assert_close(objective.center, truth["t"][f"center/{step:02d}"], **TOL)
    check_end(objective, truth)


def test_features_and_outputs(truth):
    objective, batch = build(truth), batch_at(truth, 0)
    student, t = objective.student, truth["t"]
    torch.testing.assert_close(tokens(student.backbone, batch["global_crops"][:, 0])[:, 0], t["features_global"], **TOL)
    torch.testing.assert_close(tokens(student.backbone, batch["local_crops"][:, 0])[:, 0], t["features_local"], **TOL)
    out = student(batch["global_crops"], batch["local_crops"])  # the authors' rows are view-major
    torch.testing.assert_close(out.transpose(0, 1).flatten(0, 1), t["student_out"], **TOL)
    out = objective.teacher(batch["global_crops"])
    torch.testing.assert_close(out.transpose(0, 1).flatten(0, 1), t["teacher_out"], **TOL)


def test_schedules(truth):
    for mine, theirs in ((lr, "lr"), (weight_decay, "weight_decay"), (momentum, "momentum_teacher")):
        assert [mine(i) for i in range(STEPS)] == pytest.approx(truth[theirs], rel=1e-12)
    assert [teacher_temp(i) for i in range(0, STEPS, PER_EPOCH)] == pytest.approx(truth["teacher_temp_by_epoch"])
    assert lr(0) == 0 and lr(2) == lr(3) == 2e-3  # the peak twice
    assert momentum(STEPS - 1) < 1


def test_one_schedule_step_of_warmup_is_zero():
    assert warmup_then_cosine(0, peak=1.0, end=0.0, warmup_steps=1, steps=5) == 0.0
    assert warmup_then_cosine(1, peak=1.0, end=0.0, warmup_steps=1, steps=5) == 1.0
    assert teacher_temp_at(0, warmup=0.04, final=0.07, warmup_epochs=1) == 0.04
    assert teacher_temp_at(0, warmup=0.04, final=0.07, warmup_epochs=0) == 0.07
    # vision.md's check of the published run: 300 epochs of momentum end just below 1
    assert 0.9999 < warmup_then_cosine(999, peak=0.996, end=1.0, warmup_steps=0, steps=1000) < 1


def test_loss_is_the_mean_over_pairs_of_different_views():
    g = torch.Generator().manual_seed(0)
    B, T, S, K = 3, 2, 10, 7
    teacher = torch.randn(B, T, K, generator=g, dtype=torch.float64)
    student = torch.randn(B, S, K, generator=g, dtype=torch.float64)
    center = torch.randn(1, K, generator=g, dtype=torch.float64)
    have = cross_view_entropy(teacher_probs(teacher, center, 0.05), (student / 0.1).log_softmax(-1))
    for b in range(B):
        terms = []
        for t in range(T):
            p = ((teacher[b, t] - center[0]) / 0.05).exp()
            p = p / p.sum()
            for s in range(S):
                if s != t:
                    q = (student[b, s] / 0.1).exp()
                    terms.append(-(p * (q / q.sum()).log()).sum().item())
        assert len(terms) == 18
        assert have[b].item() == pytest.approx(sum(terms) / 18, rel=1e-12)


def test_collapse_to_uniform_costs_ln_k():
    K = 65536
    flat = torch.zeros(1, 2, K, dtype=torch.float64)
    probs = teacher_probs(flat, torch.zeros(1, K), 0.04)
    assert cross_view_entropy(probs, flat.log_softmax(-1)).item() == pytest.approx(11.0904, abs=5e-5)
    assert entropy(probs)[0, 0].item() == pytest.approx(math.log(K), rel=1e-12)


def test_head_as_the_authors_build_it():
    torch.manual_seed(0)
    head = DINOHead(32, 4096, hidden_dim=64, bottleneck_dim=256, norm_last_layer=True)
    gain, direction = (
        head.last_layer.parametrizations.weight.original0,
        head.last_layer.parametrizations.weight.original1,
    )
    assert gain.shape == (4096, 1) and (gain == 1).all() and not gain.requires_grad
    assert DINOHead(32, 64).last_layer.parametrizations.weight.original0.requires_grad is False
    assert network().head.last_layer.parametrizations.weight.original0.requires_grad
    assert direction.std().item() == pytest.approx(1 / math.sqrt(3 * 256), rel=0.01)  # kaiming-uniform, not .02
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.05) and (head.mlp[2].bias == 0).all()
    rows = head.last_layer.weight.norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    assert head(torch.randn(5, 32)).abs().max() <= 1 + 1e-6  # cosines


def test_teacher_is_a_copy_that_shares_no_storage(truth):
    objective = build(truth)
    student, teacher = objective.student.state_dict(), objective.teacher.state_dict()
    assert all(torch.equal(student[k], teacher[k]) for k in student)
    storages = {t.untyped_storage().data_ptr() for t in student.values()}
    assert not any(t.untyped_storage().data_ptr() in storages for t in teacher.values())
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    objective(batch_at(truth, 0), 0)["loss"].backward()
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_forward_changes_nothing(truth):
    """It may run twice: center and teacher move in after_step only."""
    objective, batch = build(truth), batch_at(truth, 0)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    first, second = objective(batch, 0), objective(batch, 0)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_monitors(truth):
    """Cross-entropy = entropy of the target + KL from target to student; counts name every output."""
    objective, batch = build(truth), batch_at(truth, 0)
    out, counts = objective(batch, 0), objective.counts(batch)
    assert out.keys() == counts.keys()
    mean = {k: out[k] / counts[k] for k in out}
    torch.testing.assert_close(mean["loss"], mean["teacher_entropy"] + mean["kl"], **TOL)
    torch.testing.assert_close(mean["teacher_mean"], truth["t"]["teacher_out"].mean(dim=0), **TOL)


def fixture_config():
    """The authors' set-up as a config of ours."""
    from fledge.config import load
    from pretrain.dino import Config

    plain = {
        "stage": "pretrain.dino",
        "data": {"path": "nowhere"},
        "augment": {"global_size": 32, "local_size": 16, "local_crops": 4},
        "model": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
        "head": {"out_dim": 64, "hidden_dim": 48, "bottleneck_dim": 16},
        "drop_path_rate": 0.0,
        "warmup_teacher_temp_epochs": 2,
        "momentum_teacher": 0.9,
        "optim": {"lr": 2e-3, "lr_batch": None, "warmup": "1 epoch", "clip": 0.3},
        "train": {"batch": 2, "steps": "4 epochs"},
    }
    return load(Config, plain)


@pytest.mark.parametrize("pieces", [1, 2])
def test_twelve_steps_as_the_stage_takes_them(truth, pieces):
    """Objective and optimiser as `main` builds them, through the loop's update, whole batches and micro-batches."""
    from fledge.train import update
    from pretrain import dino

    config = fixture_config()
    objective = dino.build(config, None, STEPS, PER_EPOCH).double()
    for net in (objective.student, objective.teacher):
        net.load_state_dict(part(truth["t"], "student0/"))
    optim = dino.build_optim(config, objective.student, STEPS, PER_EPOCH)
    for step in range(STEPS):
        batch = batch_at(truth, step)
        rows = [{k: v[i::pieces] for k, v in batch.items()} for i in range(pieces)]
        means, norm = update(objective, rows, step, optim)
        assert means["loss"].item() == pytest.approx(truth["loss"][step], rel=1e-9, abs=1e-9)
        assert norm.item() == pytest.approx(math.hypot(*truth["clip_norms"][step]), rel=1e-9)
        torch.testing.assert_close(objective.center, truth["t"][f"center/{step:02d}"], **TOL)
    check_end(objective, truth)


def test_positions():
    """The matrix is bicubic interpolation by scale factor; the plain size is not the same."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(1, 1 + 14 * 14, 8, generator=g, dtype=torch.float64)
    assert interpolate_pos_embed(table, 14, 14) is table
    image = table[:, 1:].view(1, 14, 14, 8).permute(0, 3, 1, 2)
    for h, w in ((6, 6), (6, 9), (16, 14)):
        want = torch.nn.functional.interpolate(image, scale_factor=((h + 0.1) / 14, (w + 0.1) / 14), mode="bicubic")
        have = interpolate_pos_embed(table, h, w)
        torch.testing.assert_close(have[:, 1:], want.permute(0, 2, 3, 1).flatten(1, 2), **TOL)
        assert torch.equal(have[:, 0], table[:, 0])
    from timm.layers import resample_abs_pos_embed

    timm = resample_abs_pos_embed(table, (6, 6), (14, 14), num_prefix_tokens=1)
    torch.testing.assert_close(interpolate_pos_embed(table, 6, 6, mode="timm"), timm.double(), rtol=1e-5, atol=1e-5)
    assert (interpolate_pos_embed(table, 6, 6) - timm).norm() / timm.norm() > 0.01
    with torch.inference_mode():
        interpolate_pos_embed(table, 5, 5)  # first made where nothing may be trained
    learned = table.clone().requires_grad_()
    interpolate_pos_embed(learned, 5, 5).sum().backward()
    assert learned.grad is not None


def test_tokens_equal_timm_at_its_own_size():
    torch.manual_seed(0)
    vit = network().backbone.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(tokens(vit, images), vit.forward_features(images), **TOL)


# ------------------------------------------------------------------------------------------------------------- stage


def tiny(out, **kw):
    from fledge.config import load
    from pretrain.dino import Config

    plain = {
        "stage": "pretrain.dino",
        "out": str(out),
        "augment": {"global_size": 16, "local_size": 8, "local_crops": 2},
        "model": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        "head": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
        "optim": {"warmup": "1 epoch"},
        "train": {"batch": 4, "steps": 6, "precision": "fp32", "eval_every": 3, "device": "cpu"},
        "track": {"wandb": "off"},
    }
    return load(Config, plain | kw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from PIL import Image

    root, g = tmp_path_factory.mktemp("dino") / "pictures", torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(0, 256, (20, 20, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return str(root)


def test_stage_hands_over_the_teacher(folder, tmp_path):
    import timm

    from fledge.checkpoint import newest
    from pretrain.dino import main

    data = {"path": folder}
    evaluation = {"method": "knn", "fit": data, "test": data}
    found = main(tiny(tmp_path, data=data, evaluation=evaluation))
    assert found.kind == "vision-encoder" and found.step == 6
    state = newest(tmp_path / "dino" / "checkpoints").tensors("model")
    weights = load_file(found.path / "model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, state[f"teacher.backbone.{name}"], rtol=0, atol=0)
    assert any(not torch.equal(t, state[f"student.backbone.{n}"]) for n, t in weights.items())
    assert state["center"].abs().max() > 0  # a buffer, so a resumed run goes on with it
    model = timm.create_model(f"local-dir:{found.path}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 16)
    lines = [json.loads(x) for x in (tmp_path / "dino" / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/teacher_entropy", "train/kl"} <= lines[0].keys()
    assert any("eval/knn_top1" in line for line in lines)
    assert found.metrics["scores"][0]["baseline_name"] == "raw pixels"


def test_defaults_are_the_published_recipe():
    """ViT-S/16, 300 epochs on 16 x 64 pictures (vit_small, boosted): the numbers of the authors' scripts."""
    from pretrain.dino import Config

    fields = {name: field.default for name, field in Config.model_fields.items()}
    model, augment, optim, train = fields["model"], fields["augment"], fields["optim"], fields["train"]
    assert (model.img_size, model.patch_size, model.embed_dim, model.depth, model.num_heads) == (224, 16, 384, 12, 6)
    assert (augment.global_size, augment.local_size, augment.local_crops) == (224, 96, 8)
    assert (augment.global_scale, augment.local_scale) == ((0.4, 1.0), (0.05, 0.4))
    assert (augment.blur, augment.solarize, augment.jitter, augment.grey) == ((1.0, 0.1, 0.5), 0.2, 0.8, 0.2)
    assert optim.peak_lr(train.batch) == pytest.approx(5e-4 * 1024 / 256)
    assert (optim.betas, optim.min_lr, optim.warmup, optim.clip) == ((0.9, 0.999), 1e-6, "10 epochs", 3.0)
    assert (optim.weight_decay, optim.weight_decay_end, optim.freeze_last_layer) == (0.04, 0.4, "1 epoch")
    assert (fields["student_temp"], fields["teacher_temp"], fields["warmup_teacher_temp"]) == (0.1, 0.07, 0.04)
    assert (fields["warmup_teacher_temp_epochs"], fields["momentum_teacher"]) == (30, 0.996)
    assert fields["head"].model_dump() == {
        "out_dim": 65536,
        "hidden_dim": 2048,
        "bottleneck_dim": 256,
        "norm_last_layer": False,
    }
    assert (fields["center_momentum"], fields["drop_path_rate"], train.steps) == (0.9, 0.1, "300 epochs")


def test_network_is_initialised_as_the_authors(folder, tmp_path):
    from pretrain.dino import build

    torch.manual_seed(99)  # the stage's seed decides, not whoever ran before
    dino = build(tiny(tmp_path, data={"path": folder}), None, steps=6, steps_per_epoch=3)
    again = build(tiny(tmp_path, data={"path": folder}), None, steps=6, steps_per_epoch=3)
    assert all(torch.equal(a, b) for a, b in zip(dino.parameters(), again.parameters(), strict=True))
    backbone = dino.student.backbone
    assert 0.01 < backbone.cls_token.std() < 0.04 and 0.015 < backbone.pos_embed.std() < 0.025
    assert backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert not any(getattr(m, "drop_prob", 0) for m in dino.teacher.modules())
    assert backbone.norm.eps == 1e-6


@pytest.mark.parametrize(
    "change, words",
    [
        ({"augment": {"global_size": 32, "local_size": 8}}, "global_size"),
        ({"augment": {"global_size": 16, "local_size": 9}}, "local_size"),
        ({"data": {"path": "x", "channels": 1}}, "channels"),
        ({"optim": {"decay": "linear"}}, "decay"),
    ],
)
def test_sizes_that_disagree_are_said(folder, tmp_path, change, words):
    from fledge.errors import InputError

    with pytest.raises(InputError, match=words):
        tiny(tmp_path, **({"data": {"path": folder}} | change))
