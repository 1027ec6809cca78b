"""CLIP against open_clip's numbers, the textbook loss in float64, and what others expect of its artifact."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn

from align import clip
from align.clip import CLIP, Config, unit
from fledge import artifact, distributed
from fledge.config import load
from fledge.data.augment import EvalConfig
from fledge.data.images import eval_batch
from fledge.data.pairs import PairsConfig
from fledge.data.tokenizer import TokenizerConfig, tokenize, train
from fledge.errors import InputError
from fledge.evals import contrastive
from fledge.evals.retrieval import right_ranks
from fledge.models import language, vit
from fledge.models.language import EncoderConfig
from fledge.models.vit import ViTConfig
from fledge.optim import Optim, adamw, decay_groups
from fledge.stream import rows_of, share
from fledge.train import TrainConfig, backward, update
from tests.launch import environment, run
from tests.objectives import BATCH, build

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES = ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
TEXT = EncoderConfig(embed_dim=32, depth=2, num_heads=2, context_length=32, dropout=0.0)
WORDS = ["red", "green", "blue", "white"]
SHAPES = ["circle", "square", "bar", "cross", "dot", "frame", "stripe", "corner"]


# ---------------------------------------------------------------------------------------------- loss and gradients


class Linear(CLIP):
    """CLIP's loss on two linear towers, as the numbers in the fixtures were made."""

    def __init__(self, fixture):
        holder = nn.Module()
        holder.logit_scale = nn.Parameter(fixture["logit_scale"].clone())
        super().__init__(holder, rows=16)
        self.image_weight = nn.Parameter(fixture["image_weight"].clone())
        self.text_weight = nn.Parameter(fixture["text_weight"].clone())

    def encode_image(self, pixels):
        return unit(pixels @ self.image_weight)

    def encode_text(self, input_ids, attention_mask):
        return unit(input_ids @ self.text_weight)


def open_clip_case() -> dict[str, torch.Tensor]:
    """Loss and gradients of this rank's rows through the loop's own backward."""
    fixture = load_file(FIXTURES / "clip.safetensors")
    text = fixture["text_in"]
    batch = {"image": fixture["image_in"], "input_ids": text, "attention_mask": torch.ones(16, 1)}
    objective = Linear(fixture)
    mine, _ = share(16, distributed.rank(), distributed.world_size(), None)
    means = backward(distributed.wrap(objective), [rows_of(batch, mine)], step=0)
    grads = {f"{name}_grad": parameter.grad for name, parameter in objective.named_parameters()}
    return {"loss": means["loss"], "logit_scale": means["logit_scale"]} | grads


def textbook_case() -> dict[str, torch.Tensor]:
    """The same for a whole dual encoder."""
    objective, batch = build("clip")
    mine, _ = share(BATCH, distributed.rank(), distributed.world_size(), None)
    means = backward(distributed.wrap(objective), [rows_of(batch, mine)], step=0)
    return {"loss": means["loss"]} | {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}


def textbook() -> dict[str, torch.Tensor]:
    """-log p(own text | image) and -log p(own image | text), averaged, over the whole batch on one process."""
    objective, batch = build("clip")
    image = objective.model.get_image_features(batch["image"]).pooler_output
    text = objective.model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    similarity = (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
    p = (similarity * objective.model.logit_scale.exp()).exp()  # (image, text)
    loss = -((p.diag() / p.sum(1)).log().mean() + (p.diag() / p.sum(0)).log().mean()) / 2
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run(2, [__file__, str(folder)])
    return {name: load_file(folder / f"{name}.safetensors") for name in ("open_clip", "textbook")}


@pytest.mark.parametrize("world", [1, 2])
def test_equals_open_clip(world, request):
    found = open_clip_case() if world == 1 else request.getfixturevalue("two_ranks")["open_clip"]
    truth = json.loads((FIXTURES / "clip.json").read_text())["cases"][str(world)]
    tensors = load_file(FIXTURES / "clip.safetensors")
    assert found["loss"].item() == pytest.approx(truth["loss"], rel=1e-12)
    assert found["model.logit_scale_grad"].item() == pytest.approx(truth["logit_scale_grad"], rel=1e-12)
    assert found["logit_scale"].item() == pytest.approx(tensors["logit_scale"].exp().item(), rel=1e-12)
    for name in ("image_weight_grad", "text_weight_grad"):
        torch.testing.assert_close(found[name], tensors[f"{world}/{name}"], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("world", [1, 2])
def test_equals_the_textbook(world, request):
    found, truth = textbook_case() if world == 1 else request.getfixturevalue("two_ranks")["textbook"], textbook()
    floor = 1e-6 * torch.cat([grad.flatten() for grad in truth.values()]).norm()
    assert found.keys() == truth.keys() and truth["model.logit_scale"].norm() > 1e-3
    for name, true in truth.items():
        assert (found[name] - true).norm() <= 1e-11 * max(true.norm(), floor), name


def test_a_part_of_the_batch_is_refused():
    objective, batch = build("clip")
    with pytest.raises(ValueError, match="are not the batch of 8"):
        objective(rows_of(batch, slice(0, 4)), 0)
    with pytest.raises(InputError, match="train.micro_batch 4 may be less than the 8 pairs"):
        clip.check_batch(TrainConfig(batch=16, steps=1, micro_batch=4), world=2)
    with pytest.raises(InputError, match="train.batch 15 is not a multiple of the 2 ranks"):
        clip.check_batch(TrainConfig(batch=15, steps=1), world=2)
    clip.check_batch(TrainConfig(batch=16, steps=1, micro_batch=8), world=2)


def test_logits_are_fp32_under_autocast(monkeypatch):
    """Features leave bf16 before they are normalised, and the product of features is no bf16 kernel."""
    objective, batch = build("clip", torch.float32)
    seen = []
    cross_entropy = clip.F.cross_entropy
    monkeypatch.setattr(clip.F, "cross_entropy", lambda x, y, **kw: seen.append(x) or cross_entropy(x, y, **kw))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = objective.model.get_image_features(batch["image"]).pooler_output
        image = objective.encode_image(batch["image"])
        loss = objective(batch, 0)["loss"]
    assert projected.dtype == torch.bfloat16 and image.dtype == loss.dtype == torch.float32
    assert [logits.dtype for logits in seen] == [torch.float32] * 2
    torch.testing.assert_close(image.norm(dim=1), torch.ones(BATCH), rtol=1e-6, atol=0)
    fine = seen[0] / objective.model.logit_scale.exp()  # a bf16 matmul would round every entry to 8 bits
    assert (fine - fine.bfloat16().float()).abs().max() > 1e-4


def test_the_temperature_is_clamped_and_not_decayed():
    objective, batch = build("clip", torch.float32)
    names = {id(p): n for n, p in objective.named_parameters()}
    decayed, spared = [{names[id(p)] for p in g["params"]} for g in decay_groups(objective, clip.decay_exempt)]
    assert "model.logit_scale" in spared and "model.vision_model.embeddings.cls_token" in spared
    assert "model.visual_projection.weight" in decayed
    assert not any(name.endswith(".bias") or "norm" in name.lower() for name in decayed)
    assert not any("pooler" in name and "vision" in name for name in decayed | spared), "the identity is frozen"

    optim = Optim(torch.optim.SGD(decay_groups(objective), lr=1.0), lr=lambda step: 0.0)
    for start, end in ((9.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)):
        nn.init.constant_(objective.model.logit_scale, start)
        update(objective, [batch], 0, optim)
        assert objective.model.logit_scale.item() == pytest.approx(end, rel=1e-6)
    assert build("clip")[0].model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_image_tower_is_timms(dtype, tolerance):
    """Every parameter disturbed, so that a dropped or swapped one shows."""
    torch.manual_seed(0)
    encoder = vit.build(SIZES).to(dtype)
    for parameter in encoder.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    tower = vit.to_transformers(encoder, SIZES).to(dtype)
    tower.load_state_dict(vit.transformers_state(encoder))
    images = torch.randn(4, 3, 16, 16, dtype=dtype)
    expected = encoder(images)
    assert (tower(images).pooler_output - expected).abs().max() <= tolerance * expected.abs().max()


def tokens_of(captions):
    return train(TokenizerConfig(style="encoder", vocab_size=400), captions)


def test_the_last_token_survives_cutting():
    captions = ["red", "a very long caption about nothing at all, again and again", "[SEP] is a word here"]
    tokens = tokens_of(captions)
    table = tokenize(tokens, captions, max_length=8)
    assert table["input_ids"].shape == (3, 8)
    for ids, mask in zip(table["input_ids"], table["attention_mask"], strict=True):
        n = int(mask.sum())
        assert ids[0] == tokens.cls_token_id and ids[n - 1] == tokens.sep_token_id and mask[:n].all()
        assert (ids[:n] == tokens.sep_token_id).sum() == 1
    assert table["attention_mask"][1].all()
    tokens.model_max_length = 8  # as it is handed over
    theirs = tokens(captions[:2], truncation=True, padding=True, return_tensors="pt")
    assert torch.equal(theirs["input_ids"], table["input_ids"][:2])


def test_padding_changes_no_feature():
    objective, batch = build("clip")
    short = clip.shortened({k: v[:1] for k, v in batch.items()})
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    whole = objective.encode_text(batch["input_ids"], batch["attention_mask"])[:1]
    cut = objective.encode_text(short["input_ids"], short["attention_mask"])
    torch.testing.assert_close(cut, whole, rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ stage


def draw(path, colour, shape):
    image = Image.new("RGB", (16, 16), "black")
    pen = ImageDraw.Draw(image)
    {
        "circle": lambda: pen.ellipse((2, 2, 13, 13), fill=colour),
        "square": lambda: pen.rectangle((3, 3, 12, 12), fill=colour),
        "bar": lambda: pen.rectangle((0, 6, 15, 9), fill=colour),
        "cross": lambda: [pen.line((x, 0, 15 - x, 15), fill=colour, width=3) for x in (0, 15)],
        "dot": lambda: pen.ellipse((6, 6, 9, 9), fill=colour),
        "frame": lambda: pen.rectangle((1, 1, 14, 14), outline=colour, width=2),
        "stripe": lambda: pen.rectangle((6, 0, 9, 15), fill=colour),
        "corner": lambda: pen.rectangle((0, 0, 7, 7), fill=colour),
    }[shape]()
    image.save(path)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """32 captions with a picture each, as JSON lines."""
    root = tmp_path_factory.mktemp("shapes")
    rows = []
    for colour in WORDS:
        for shape in SHAPES:
            draw(root / f"{colour}-{shape}.png", colour, shape)
            rows.append({"image": f"{colour}-{shape}.png", "caption": f"a {colour} {shape}", "colour": colour})
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "captions.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("WANDB_MODE", "disabled")


def config(shapes, out, **changes) -> Config:
    pairs = {"path": str(shapes)}
    return load(
        Config,
        {
            "stage": "align.clip", "out": str(out), "data": pairs,
            "augment": {"size": 16, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]},
            "image_model": SIZES.model_dump(), "text_model": TEXT.model_dump(),
            "tokenizer": {"style": "encoder", "vocab_size": 400}, "max_length": 24, "projection_dim": 32,
            "optim": {"lr": 2e-3, "warmup": 5, "weight_decay": 0.0},
            "train": {"batch": 32, "steps": 3, "precision": "fp32", "device": "cpu"},
            "track": {"wandb": "off"},
            "evaluation": {
                "pairs": pairs,
                "zero_shot": {"pairs": pairs | {"caption_field": "colour"}, "templates": ["{}", "a {} circle"]},
            },
        }
        | changes,
    )  # fmt: skip


def test_overfits_32_pairs(shapes, tmp_path):
    chosen = config(shapes, tmp_path, optim={"lr": 2e-3, "warmup": 5, "weight_decay": 0.0, "decay": "constant"})
    pairs = chosen.data.open()
    tokens = tokens_of(pairs.captions)
    torch.manual_seed(0)
    objective = CLIP(clip.dual_encoder(chosen, {}, tokens, print), rows=32)
    rows = clip.pair_rows(pairs, tokens, chosen)
    batch = rows(list(range(32)), list(range(32)))
    optim = adamw(decay_groups(objective, clip.decay_exempt), chosen.optim, batch=32, steps=400, steps_per_epoch=1)
    for step in range(400):
        means, _ = update(objective, [batch], step, optim)
    assert means["loss"] < 0.2 and means["accuracy"] == 1
    objective.eval()
    image = contrastive.embed_images(objective, batch["image"])
    text = contrastive.embed_texts(objective, {name: batch[name] for name in ("input_ids", "attention_mask")})
    number = torch.arange(32)
    assert right_ranks(text, image, number, number).max() == 0 == right_ranks(image, text, number, number).max()


def test_forms_of_a_caption_are_drawn_by_the_samples_seed(shapes, tmp_path):
    forms = ["{}", "a picture of {}", "{}, drawn"]
    chosen = config(shapes, tmp_path, templates=forms)
    pairs = chosen.data.open()
    tokens = tokens_of(clip.caption_forms(pairs.captions, chosen))
    rows = clip.pair_rows(pairs, tokens, chosen)
    seen = set()
    for seed in range(20):
        batch, again = rows([3, 7], [seed, seed + 100]), rows([7, 3], [seed + 100, seed])
        n = min(batch["input_ids"].shape[1], again["input_ids"].shape[1])
        assert torch.equal(batch["input_ids"][:, :n], again["input_ids"].flip(0)[:, :n])
        read = tokens.decode(batch["input_ids"][0], skip_special_tokens=True)
        assert read in [form.replace("{}", pairs.captions[3]) for form in forms]
        seen.add(read)
    assert len(seen) == 3
    with pytest.raises(InputError, match="only the world's characters have a {script}"):
        config(shapes, tmp_path, templates=["{script}: {}"])
    with pytest.raises(InputError, match="each with {} where the caption goes"):
        config(shapes, tmp_path, templates=["a picture"])


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A vision encoder and a text encoder as MAE and MLM would have written them."""
    root = tmp_path_factory.mktemp("parents")
    torch.manual_seed(3)
    sizes = SIZES.model_copy(update={"embed_dim": 16})
    encoder, view = vit.build(sizes), EvalConfig(size=16, resize=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    tokens = tokens_of([f"a {colour} {shape}" for colour in WORDS for shape in SHAPES])
    model = language.build_encoder(EncoderConfig(embed_dim=24, depth=1, num_heads=2, context_length=24), tokens)
    for module in (encoder, model):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    artifact.write(
        root / "image",
        kind="vision-encoder",
        config="stage: pretrain.mae\nname: mae\n",
        save=lambda folder: vit.save(encoder, sizes, vit.preprocessing(view), folder),
        architecture=vit.architecture(sizes),
        preprocessing=vit.preprocessing(view),
    )
    artifact.write(
        root / "text",
        kind="text-encoder",
        config="stage: pretrain.mlm\nname: mlm\n",
        save=lambda folder: language.save(model, tokens, folder),
        architecture={},
        preprocessing={"max_length": 24},
    )
    return {"image": str(root / "image"), "text": str(root / "text")}, encoder, model


LIKE_PARENT = {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}


def test_towers_come_from_the_parents(shapes, tmp_path, parents):
    folders, encoder, mlm = parents
    chosen = config(shapes, tmp_path, parents=folders, augment=LIKE_PARENT, image_model={}, text_model={"dropout": 0.0})
    opened = artifact.open_parents(chosen)
    reports = []
    model = clip.dual_encoder(chosen, opened, language.read_tokenizer(opened["text"]), reports.append).eval()
    assert "loaded 31 of 31 tensors" in reports[0].replace(str(len(encoder.state_dict())), "31")
    assert "not given: pooler.dense.bias, pooler.dense.weight; not used: cls." in reports[1]
    images, ids = torch.randn(3, 3, 16, 16), torch.randint(20, 40, (3, 7))
    torch.testing.assert_close(model.vision_model(images).pooler_output, encoder(images), rtol=1e-5, atol=1e-6)
    hidden = model.text_model(ids).last_hidden_state
    torch.testing.assert_close(hidden, mlm.eval().bert(ids).last_hidden_state, rtol=1e-5, atol=1e-6)
    assert model.text_model.config.hidden_dropout_prob == 0
    assert model.training is False and CLIP(clip.dual_encoder(chosen, opened, None, print)).training


def test_wrong_parents_are_refused(shapes, tmp_path, parents):
    folders = parents[0]
    with pytest.raises(InputError, match="parents.text .* is a vision-encoder, expected a text-encoder"):
        clip.main(config(shapes, tmp_path, parents={"text": folders["image"]}))
    with pytest.raises(InputError, match=r"augment.mean is \[0.48.*there \[0.5, 0.5, 0.5\]"):
        clip.main(config(shapes, tmp_path, parents={"image": folders["image"]}))
    with pytest.raises(InputError, match="max_length 30 exceeds the 24 positions"):
        clip.main(config(shapes, tmp_path, parents={"text": folders["text"]}, max_length=30))
    with pytest.raises(InputError, match="max_length 77 exceeds text_model.context_length 32"):
        config(shapes, tmp_path, max_length=77)


LOADS = """
import sys
sys.modules["fledge"] = None  # importing it fails
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel
folder, picture, out = sys.argv[1:]
model, report = VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
model.eval()
texts = ["a red circle", "blue " * 60]
tokens = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, padding=True, return_tensors="pt")
pixels = AutoImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt")["pixel_values"]
with torch.no_grad():
    found = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
assert model.logit_scale.shape == ()
found = {"pixels": pixels, "image": found.image_embeds, "text": found.text_embeds, "logits": found.logits_per_image}
save_file(found, out)
"""


@pytest.mark.parametrize("start", ["scratch", "parents"])
def test_the_stage_and_what_others_load(shapes, tmp_path, parents, start, monkeypatch):
    changes = {"parents": parents[0], "augment": LIKE_PARENT} if start == "parents" else {}
    chosen = config(shapes, tmp_path, **changes)
    trained = []
    original = clip.save
    monkeypatch.setattr(clip, "save", lambda model, *rest: trained.append(model) or original(model, *rest))
    made = clip.main(chosen)
    assert made.kind == "dual-encoder" and made.step == 3 and made.preprocessing["max_length"] == 24
    assert set(made.parents) == ({"image", "text"} if start == "parents" else set())
    scores = {score["metric"]: score for score in made.scores}
    assert list(scores) == ["zero-shot accuracy, mean over classes", "text to image recall@1", "image to text recall@1"]
    assert (
        scores["zero-shot accuracy, mean over classes"]["baseline"] == 1 / 4
        and scores["image to text recall@1"]["baseline"] == 1 / 32
    )
    assert all(score["before"] is not None and score["n"] == 32 for score in scores.values())
    assert (chosen.run_dir / "media" / "retrieval.png").stat().st_size > 0

    moved = tmp_path / "elsewhere"
    made.path.rename(moved)
    picture = shapes.parent / "red-circle.png"
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(moved), str(picture), str(tmp_path / "out.safetensors")],
        cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "out.safetensors")
    objective = CLIP(trained[0]).eval()
    pairs = chosen.data.open()
    number = next(i for i in range(len(pairs.images)) if pairs.captions[pairs.images.label(i)] == "a red circle")
    pixels = eval_batch(pairs.images, [number], chosen.augment.evaluation(resize=16))
    torch.testing.assert_close(theirs["pixels"], pixels, rtol=1e-5, atol=1e-5)
    tokens = language.read_tokenizer(artifact.open(moved))
    table = tokenize(tokens, ["a red circle", "blue " * 60], 24)
    image, text = contrastive.embed_images(objective, pixels), contrastive.embed_texts(objective, table)
    torch.testing.assert_close(theirs["image"], image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs["text"], text, rtol=1e-5, atol=1e-5)
    logits = objective.model.logit_scale.exp().item() * image @ text.T
    torch.testing.assert_close(theirs["logits"], logits, rtol=1e-4, atol=1e-4)


def test_defaults_are_the_published_recipe():
    defaults = Config(data=PairsConfig(path="unused"))
    assert (defaults.train.batch, defaults.train.steps) == (32_768, "32 epochs")
    optim = defaults.optim
    assert (optim.lr, optim.betas, optim.eps, optim.weight_decay, optim.warmup) == (5e-4, (0.9, 0.98), 1e-6, 0.2, 2000)
    assert (optim.lr_batch, optim.decay, optim.min_lr, optim.clip) == (None, "cosine", 0.0, None)
    image, text = defaults.image_model, defaults.text_model
    assert (image.img_size, image.patch_size, image.embed_dim, image.depth, image.num_heads) == (224, 32, 768, 12, 12)
    assert (text.embed_dim, text.depth, text.num_heads, text.context_length, text.dropout) == (512, 12, 8, 77, 0.0)
    assert (defaults.projection_dim, defaults.max_length, defaults.tokenizer.vocab_size) == (512, 77, 49_408)
    assert defaults.augment.flip == 0 and defaults.augment.scale == (0.9, 1.0)


def test_the_shipped_recipe_loads_and_equals_the_defaults(monkeypatch):
    monkeypatch.setenv("FLEDGE_DATA", "/data")
    shipped = load(Config, Path(__file__).parents[2] / "configs/align/clip_vitb32.yaml")
    defaults = Config(data=shipped.data, evaluation=shipped.evaluation, name=shipped.name)
    changed = {k for k, v in shipped.model_dump().items() if v != defaults.model_dump()[k]}
    assert changed <= {"train", "track"}
    hardware = {"workers", "grad_checkpointing", "log_every", "save_every", "eval_every"}
    assert shipped.train.model_dump(exclude=hardware) == defaults.train.model_dump(exclude=hardware)


if __name__ == "__main__":
    distributed.setup("cpu")
    for name, case in {"open_clip": open_clip_case, "textbook": textbook_case}.items():
        result = {key: value.reshape(-1) if value.ndim == 0 else value for key, value in case().items()}
        if distributed.is_main():
            save_file(result, f"{sys.argv[1]}/{name}.safetensors")
