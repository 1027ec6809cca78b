"""PPO on records with pictures: a tiny LLaVA comes in from its folder, sees by its processor, and goes out again."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from align import ppo
from fledge import artifact, importer
from fledge.data.prompts import PromptsConfig, read_prompts
from fledge.errors import InputError
from fledge.models import language

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TEMPLATE = (
    "{% for m in messages %}{{ '[user]' if m.role == 'user' else '[says]' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[says]{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "shown").mkdir()
    lines = []
    for n, word in enumerate(["which", "what", "say"] * 8):
        name, colour = list(COLOURS.items())[n % 3]
        Image.new("RGB", (10 + n, 12), colour).save(folder / "shown" / f"{n}.png")
        lines.append({"prompt": f"{word} colour {n}", "picture": f"shown/{n}.png", "colour": name})
    lines.append({"prompt": "nothing there", "picture": "shown/none.png", "colour": "red"})
    lines.append({"prompt": "nothing named", "colour": "red"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "sees.py").write_text(
        "def right(records, responses):\n"
        "    return [float(said.split()[:1] == [r['colour']]) for r, said in zip(records, responses)]\n"
    )
    words = ["<pad>", "<end>", "<image>", "[user]", "[says]", "<unk>", *COLOURS, "which", "what", "say", "colour"]
    words += [str(n) for n in range(24)]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=TEMPLATE,
        additional_special_tokens=["<image>", "[user]", "[says]"],
    )  # fmt: skip
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokens, patch_size=4, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder / "foreign")
    processor.save_pretrained(folder / "foreign")
    importer.bring_in("chat-model", str(folder / "foreign"), folder / "chat")
    return folder


def settings(home, **kw):
    return ppo.Config.model_validate(
        {
            "out": str(home / "runs"),
            "parents": {"policy": str(home / "chat")},
            "data": {
                "source": "files", "path": str(home / "prompts.jsonl"), "image": "picture", "max_length": 24,
                "validation_fraction": 0.0, "test_fraction": 0.2,
            },
            "reward": "sees:right",
            "value": {"init": "policy", "head": "zero"},
            "rollout": {"batch": 12, "max_new_tokens": 2, "missing_eos_penalty": None},
            "ppo": {"num_ppo_epochs": 2},
            "optim": {"lr": 1e-2},
            "train": {"batch": 12, "steps": 4, "precision": "fp32", "device": "cpu"},
            "track": {"wandb": "off"},
            **kw,
        }
    )  # fmt: skip


def prompts_of(home, processor, **kw):
    data = settings(home).data.model_dump() | kw
    return read_prompts(PromptsConfig.model_validate(data), processor.tokenizer, "train", processor)


def test_ids_and_pixels_are_the_processors_own(home):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(home / "chat")
    found = prompts_of(home, processor)
    assert len(found) > 12 and "no picture" in found.report() and "no such file" in found.report()
    for i in range(0, len(found), 5):
        record = found.records[i]
        shown = Image.open(home / record["picture"])
        text = f"[user]<image>\n{record['prompt'][0]['content']}[says]"
        theirs = processor(text=[text], images=[shown], return_tensors="pt", add_special_tokens=False)
        assert found.ids[i] == theirs["input_ids"][0].tolist() and found.ids[i].count(2) == 4  # 8 / 4 squared
        assert torch.equal(found.inputs([i])["pixel_values"], theirs["pixel_values"])
    both = found.inputs([1, 0])["pixel_values"]
    assert torch.equal(both[1], found.inputs([0])["pixel_values"][0]) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_stage_sees(home, monkeypatch, lora):
    """The artifact is transformers' own, and what it says depends on the picture."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.chdir(home)
    made = ppo.main(settings(home, name=f"sees_{bool(lora)}", lora=lora))
    model, processor = AutoModelForImageTextToText.from_pretrained(made.path), AutoProcessor.from_pretrained(made.path)
    before = AutoModelForImageTextToText.from_pretrained(home / "chat")
    shown = [Image.new("RGB", (9, 9), colour) for colour in COLOURS.values()]
    rows = processor(text=["[user]<image>\nsay colour 3[says]"] * 3, images=shown, return_tensors="pt")
    with torch.no_grad():
        said, first = (m(**rows).logits[:, -1].softmax(-1) for m in (model, before))
    assert not torch.allclose(said[0], said[1]) and not torch.allclose(said, first)
    assert made.metrics["kl"] > 0
    again = language.read_processor(made.path)
    assert again is not None and again.image_token == "<image>"


def rank(home: str) -> None:
    """The stage on one of several ranks."""
    os.chdir(home)
    ppo.main(settings(Path(home), name="two_ranks"))


def test_two_ranks_see_what_one_does(home, forks, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    one = ppo.main(settings(home, name="one_rank"))
    forks.start("tests.align.test_ppo_pictures:rank", {"home": str(home)}, world=2, folder=tmp_path).wait(timeout=120)
    two = artifact.open(home / "runs/two_ranks/artifact")
    assert two.scores[0]["before"] == pytest.approx(one.scores[0]["before"], abs=1e-6)
    for name, tensor in one.tensors().items():
        torch.testing.assert_close(two.tensors()[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_prompt_without_a_message_of_the_user_is_left_out_and_counted(home, tmp_path):
    lines = (home / "prompts.jsonl").read_text().splitlines()[:3]
    nobody = {"messages": [{"role": "system", "content": "say"}], "picture": "shown/0.png"}
    path = tmp_path / "more.jsonl"
    path.write_text("\n".join([*lines, json.dumps(nobody)]))
    (tmp_path / "shown").symlink_to(home / "shown")
    found = prompts_of(home, language.read_processor(home / "chat"), path=str(path), test_fraction=0.0)
    assert len(found) == 3 and found.skipped == {"no message of the user to show a picture with": 1}


def test_another_picture_is_other_data(home, tmp_path):
    config = PromptsConfig.model_validate(settings(home).data.model_dump())
    before = config.fingerprint()
    path = home / "shown" / "3.png"
    kept = path.read_bytes()
    Image.new("RGB", (13, 12), (1, 2, 3)).save(path)
    assert config.fingerprint() != before
    path.write_bytes(kept)
    assert config.fingerprint() == before


def test_what_is_refused(home):
    processor = language.read_processor(home / "chat")
    with pytest.raises(InputError, match="no processor: it reads text alone"):
        read_prompts(settings(home).data, processor.tokenizer, "train")
    with pytest.raises(InputError, match="overlong: drop"):
        prompts_of(home, processor, overlong="truncate")
    with pytest.raises(InputError, match="no token that stands for a picture"):
        found = type("Blind", (), {})()
        read_prompts(settings(home).data, processor.tokenizer, "train", found)
    with pytest.raises(ValidationError, match="parents.reward reads text alone"):
        settings(home, parents={"policy": "a", "reward": "b"}, reward=None)
    with pytest.raises(ValidationError, match="parents.judge reads text alone"):
        settings(home, parents={"policy": "a", "judge": "b"})
