"""Foreign folders become artifacts that compute the same; what would not is refused. And text from artifacts."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from fledge import artifact
from fledge.data import tokenizer
from fledge.errors import InputError
from fledge.files import sha256
from fledge.generate import generate
from fledge.importer import bring_in
from fledge.models import language, vit
from fledge.models.language import CausalConfig, EncoderConfig

DOCUMENTS = ["the cat sat on the mat", "a dog ran to the cat"] * 20
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Folders as other people's libraries write them."""
    root = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    causal = tokenizer.train(tokenizer.TokenizerConfig(vocab_size=300), DOCUMENTS)
    tokenizer.add_chat(causal)
    masked = tokenizer.train(tokenizer.TokenizerConfig(vocab_size=300, style="encoder"), DOCUMENTS)
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "context_length": 64}
    language.save(language.build_causal(CausalConfig(**small), causal), causal, made(root / "clm"))
    language.save(language.build_encoder(EncoderConfig(**small), masked), masked, made(root / "mlm"))
    bert = BertConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
    language.save(BertForSequenceClassification(bert), masked, made(root / "two_labels"))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SIZES)
    save_for_hf(model, made(root / "vit"), model_args=SIZES | {"num_classes": 5}, safe_serialization=True)
    odd = SIZES | {"num_classes": 5, "global_pool": "avg", "class_token": False}
    save_for_hf(
        timm.create_model("vit_tiny_patch16_224", **odd), made(root / "odd"), model_args=odd, safe_serialization=True
    )
    return root


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_timm_encoder_keeps_its_features(foreign, tmp_path):
    opened = bring_in("vision-encoder", str(foreign / "vit"), tmp_path / "a")
    images = torch.rand(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{foreign / 'vit'}", pretrained=True).eval()
    ours, sizes = vit.read(opened)
    again = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    with torch.no_grad():
        for model in (ours.eval(), again):
            torch.testing.assert_close(model.forward_features(images), theirs.forward_features(images))
    assert sizes.num_patches == 16 and opened.parents == {}
    assert opened.origin == {
        "source": str(foreign / "vit"),
        "files": {name: sha256(foreign / "vit" / name) for name in ("config.json", "model.safetensors")},
    }
    assert "origin:" in artifact.tree(artifact.open(tmp_path / "a"))


def test_a_timm_classifier_keeps_its_logits(foreign, tmp_path):
    bring_in("image-classifier", str(foreign / "vit"), tmp_path / "a")
    images = torch.rand(2, 3, 32, 32)
    models = [timm.create_model(f"local-dir:{p}", pretrained=True).eval() for p in (foreign / "vit", tmp_path / "a")]
    with torch.no_grad():
        torch.testing.assert_close(*[model(images) for model in models])


@pytest.mark.parametrize(
    "kind, name, auto",
    [("causal-lm", "clm", AutoModelForCausalLM), ("chat-model", "clm", AutoModelForCausalLM),
     ("text-encoder", "mlm", AutoModelForMaskedLM)],
)  # fmt: skip
def test_a_language_model_keeps_its_logits_and_tokens(foreign, tmp_path, kind, name, auto):
    opened = bring_in(kind, str(foreign / name), tmp_path / "a")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        logits = [auto.from_pretrained(p).eval()(input_ids=ids).logits for p in (foreign / name, opened.path)]
    assert torch.equal(*logits)
    tokens = [AutoTokenizer.from_pretrained(p)("the cat")["input_ids"] for p in (foreign / name, opened.path)]
    assert tokens[0] == tokens[1]
    assert opened.preprocessing["max_length"] == 64


def copy(source: Path, target: Path, **changes) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    described = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(described))
    return target


def test_what_is_refused(foreign, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pickled = made(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"code")
    empty = made(tmp_path / "empty")
    remote = copy(foreign / "clm", tmp_path / "remote", auto_map={"AutoModel": "x.Y"})
    broken = copy(foreign / "clm", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    for kind, source, says in [
        ("vision", foreign / "vit", "'vision' is no kind to import, expected one of vision-encoder"),
        ("reward-ensemble", foreign / "clm", "'reward-ensemble' is no kind to import"),
        ("causal-lm", pickled, "holds its weights as pytorch_model.bin: a pickle"),
        ("causal-lm", empty, "has no .safetensors file"),
        ("causal-lm", remote, "needs code of its own"),
        ("causal-lm", broken, "cannot be read as a causal-lm"),
        ("causal-lm", tmp_path / "nowhere", "does not exist"),
        ("text-encoder", foreign / "clm", "cannot be read as a text-encoder"),
        ("vision-encoder", foreign / "clm", "is no timm folder"),
        ("vision-encoder", foreign / "odd", "odd"),
        ("dual-encoder", foreign / "clm", "is no vision-text-dual-encoder"),
        ("reward-model", foreign / "clm", "missing: score.weight"),
        ("reward-model", foreign / "two_labels", "has 2 labels, expected 1"),
    ]:
        with pytest.raises(InputError) as caught:
            bring_in(kind, str(source), tmp_path / "a")
        assert says in str(caught.value), (kind, source)
        assert not (tmp_path / "a").exists()


def test_text_is_a_function_of_prompt_and_seed(foreign, tmp_path):
    model = bring_in("causal-lm", str(foreign / "clm"), tmp_path / "a").path
    said = generate(model, "the cat", seed=1, max_new_tokens=8)
    assert said.startswith("the cat") and said == generate(model, "the cat", seed=1, max_new_tokens=8)
    assert said != generate(model, "the cat", seed=2, max_new_tokens=8)
    greedy = [generate(model, "the cat", seed=s, temperature=0, max_new_tokens=8) for s in (1, 2)]
    assert greedy[0] == greedy[1]
    assert generate(model, "the cat", seed=7, top_k=1, max_new_tokens=8) == greedy[0]


def test_greedy_text_is_transformers_own(foreign, tmp_path):
    model = bring_in("causal-lm", str(foreign / "clm"), tmp_path / "a").path
    tokens, theirs = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[tokens.bos_token_id, *tokens("a dog", add_special_tokens=False)["input_ids"]]])
    out = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=tokens.pad_token_id)
    expected = tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(model, "a dog", temperature=0, max_new_tokens=8) == "a dog" + expected


def test_a_text_encoder_fills_in(foreign, tmp_path):
    model = bring_in("text-encoder", str(foreign / "mlm"), tmp_path / "a").path
    lines = generate(model, "the [MASK] sat on [MASK]").splitlines()
    assert lines[0].startswith("the") and [line[:11] for line in lines[1:]] == ["  [MASK] 1:", "  [MASK] 2:"]


def test_what_cannot_be_generated(foreign, tmp_path):
    causal = bring_in("causal-lm", str(foreign / "clm"), tmp_path / "a").path
    masked = bring_in("text-encoder", str(foreign / "mlm"), tmp_path / "b").path
    seeing = bring_in("vision-encoder", str(foreign / "vit"), tmp_path / "c").path
    for model, prompt, options, says in [
        (masked, "the cat", {}, "fills in [MASK], and the prompt has none"),
        (seeing, "the cat", {}, "is a vision-encoder, which writes no text"),
        (causal, "the cat " * 60, {}, "shorten it"),
        (causal, "the cat", {"temperature": -1}, "expected 0 (greedy) or more"),
    ]:
        with pytest.raises(InputError, match=".*") as caught:
            generate(model, prompt, **options)
        assert says in str(caught.value)
