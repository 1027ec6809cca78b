"""The classifier artifact: what timm makes of it is the probe itself."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune import classify
from fledge import artifact
from fledge.config import load
from fledge.data.images import ImagesConfig, eval_batch
from fledge.errors import InputError
from fledge.evals.features import feature_spread, pooled
from fledge.models import vit
from fledge.models.vit import ViTConfig

SIZE = ViTConfig(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2)
PREPROCESSING = {"size": 16, "resize": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def pictures(root, n, seed):
    """Three classes of noisy colour."""
    g = torch.Generator().manual_seed(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            noise = torch.randint(-40, 40, (16, 16, 3), generator=g)
            pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder artifact and three labelled folders."""
    root = tmp_path_factory.mktemp("classify")
    folders = {name: pictures(root / name, n, i) for i, (name, n) in enumerate((("train", 8), ("val", 4), ("test", 5)))}
    torch.manual_seed(0)
    model = vit.build(SIZE)
    encoder = artifact.write(
        root / "encoder",
        kind="vision-encoder",
        save=lambda folder: vit.save(model, SIZE, PREPROCESSING, folder),
        config="stage: pretrain.dino\n",
        architecture=vit.architecture(SIZE),
        preprocessing=PREPROCESSING,
    )
    return root, folders, encoder


def config(world, **kw):
    root, folders, encoder = world
    data = {name: {"path": path} for name, path in folders.items()}
    data["data"] = data.pop("train")
    name = "-".join(str(v) for v in kw.values())
    plain = {"stage": "finetune.classify", "name": name, "out": str(root / "runs")} | data
    plain |= {"parents": {"encoder": str(encoder.path)}, "track": {"wandb": "off"}} | kw
    return load(classify.Config, plain)


@pytest.mark.parametrize("task", ["probe", "knn"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_gives_the_heads_logits(world, task, pool, tmp_path, monkeypatch):
    """Moved to another folder and loaded by timm alone, with class names."""
    found = classify.main(config(world, task=task, pool=pool))
    assert found.kind == classify.WRITES
    moved = found.path.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("local-dir:moved", pretrained=True).eval()
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == sorted(COLOURS)

    images = ImagesConfig(source="folder", path=world[1]["test"]).open()
    view = classify.view_of(world[2])
    x, y = eval_batch(images, range(len(images)), view), torch.tensor(images.labels)
    encoder, _ = vit.read(world[2])
    head = load_file(moved / "model.safetensors")
    want = pooled(encoder.eval(), x, pool) @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    scores = {s["metric"]: s for s in found.scores}
    published = scores["linear probe accuracy" if task == "probe" else "prototype accuracy"]
    assert published["after"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert published["n"] == 15 and published["before"] is not None and published["baseline_name"] == "raw pixels"
    assert published["baseline"] == 1.0  # colours: raw pixels know everything
    if task == "knn":
        assert 0 <= scores["20-NN accuracy"]["after"] <= 1


def test_wrong_data_is_said(world, tmp_path):
    root, folders, encoder = world
    other = pictures(tmp_path / "other", 2, 9)
    (tmp_path / "other" / "red").rename(tmp_path / "other" / "crimson")
    bad = config(world, task="probe", pool="cls").model_dump()
    bad["test"]["path"] = other
    with pytest.raises(InputError, match="crimson, red"):
        classify.main(load(classify.Config, bad | {"name": "bad"}))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (16, 16)).save(flat / "a.png")
    bad["test"]["path"] = str(flat)
    with pytest.raises(InputError, match="no labels"):
        classify.main(load(classify.Config, bad | {"name": "bad"}))


def test_feature_spread():
    g = torch.Generator().manual_seed(0)
    spread = feature_spread(torch.randn(4000, 16, generator=g))
    assert spread["feature_std"] == pytest.approx(1, abs=0.02) and spread["rankme"] > 15
    one = feature_spread(torch.ones(100, 16))
    assert one["feature_std"] == pytest.approx(0, abs=1e-5) and one["rankme"] == pytest.approx(1, abs=0.01)
