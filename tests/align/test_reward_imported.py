"""Foreign models as reward models and under them: what pads where nothing did, and the template they are read in."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from align import ensemble, reward
from fledge import artifact, cli
from fledge.data import tokenizer
from fledge.errors import InputError
from fledge.evals.reward import Judge
from fledge.generate import generate
from fledge.importer import bring_in
from fledge.models import language

END = "<|endoftext|>"
ASKED = [f"{a} {b}?" for a in ("alpha", "beta", "gamma") for b in ("delta", "epsilon", "zeta", "eta")]
TEMPLATE = "{% for m in messages %}{{ m.role + ':\n' + m.content + (eos_token if m.role == 'assistant' else '\n') }}\
{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"


def gpt2_tokens(**more):
    """As GPT-2's: bytes and their merges, one special token that begins and ends texts, and none that pads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END, *more.get("extra_special_tokens", [])], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(ASKED, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict.fromkeys(("bos_token", "eos_token"), END), **more)


def saved(folder, tokens, model: type = GPT2LMHeadModel, spare=0, **more):
    torch.manual_seed(0)
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    settings = GPT2Config(vocab_size=len(tokens) + spare, **{**sizes, **ids, "pad_token_id": None, **more})
    language.save(model(settings), tokens, folder)
    return str(folder)


def rewarding(folder, tokens, **more):
    return saved(folder, tokens, GPT2ForSequenceClassification, num_labels=1, **more)


def config(home, parent, **data):
    pairs = [{"prompt": q, "chosen": f"{q[0]}a", "rejected": "be"} for q in ASKED]
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    held = {"validation_fraction": 0.1, "test_fraction": 0.3, "max_length": 40, "template": "plain", **data}
    return reward.Config.model_validate(
        {
            "out": str(home / "runs"),
            "parents": {"model": str(parent)},
            "data": {"source": "files", "path": str(home / "pairs.jsonl"), **held},
            "train": {"batch": 4, "steps": 2, "precision": "fp32", "device": "cpu"},
            "track": {"wandb": "off"},
        }
    )


@torch.no_grad()
def alone(model, tokens, texts):
    """The plain loader's rewards, a text at a time: nothing pads."""
    return torch.stack([model(**tokens(text, return_tensors="pt")).logits[0, 0] for text in texts])


def test_a_byte_that_no_text_holds_pads_for_gpt2(tmp_path):
    """A reward model of a tokenizer without padding: transformers reads its batches as it reads each row alone."""
    tokens = gpt2_tokens()
    source = saved(tmp_path / "gpt2", tokens)
    bare = bring_in("causal-lm", source, tmp_path / "bare")
    with pytest.raises(InputError, match="has no padding token.*import KIND SOURCE DIR --pad-token TOKEN"):
        reward.main(config(tmp_path, bare.path))

    padded = bring_in("causal-lm", source, tmp_path / "padded", pad_token="ÿ")
    before, after = bare.tensors(), padded.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], x) for name, x in after.items())
    read = language.read_tokenizer(padded)
    texts = [*ASKED, "Ärger für naïve cafés 🙂 ÷ \n\t"]
    assert read(texts)["input_ids"] == tokens(texts)["input_ids"] and len(read) == len(tokens)
    assert read.pad_token_id == tokens.get_vocab()["ÿ"] != read.eos_token_id

    made = reward.main(config(tmp_path, padded.path))
    plain = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    theirs = AutoTokenizer.from_pretrained(made.path)
    texts = [f"{END}alpha beta?a{END}", f"{END}gamma?a long answer{END}", f"{END}a?b{END}"]
    expected = alone(plain, theirs, texts)
    batch = theirs(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits[:, 0], expected)
        theirs.pad_token, plain.config.pad_token_id = END, theirs.eos_token_id  # why its end may not pad
        wrong = plain(**theirs(texts, padding=True, return_tensors="pt")).logits[:, 0]
    assert ((wrong - expected).abs() > 1e-3).all()


def test_a_tokenizer_that_pads_with_its_end(tmp_path):
    source = saved(tmp_path / "gpt2", gpt2_tokens(pad_token=END), pad_token_id=0)
    same = bring_in("causal-lm", source, tmp_path / "same")
    with pytest.raises(InputError, match="pads with its end token.*--pad-token TOKEN"):
        reward.main(config(tmp_path, same.path))
    assert cli.main(["import", "causal-lm", source, str(tmp_path / "own"), "--pad-token", "ÿ"]) == 0
    own = artifact.open(tmp_path / "own", "causal-lm")
    assert language.read_tokenizer(own).pad_token == "ÿ"
    described = json.loads((own.path / "config.json").read_text())
    assert described["pad_token_id"] == language.read_tokenizer(own).pad_token_id


def test_a_reserved_token_or_a_new_one_in_a_row_that_is_left(tmp_path):
    reserved = saved(tmp_path / "llama3", gpt2_tokens(extra_special_tokens=["<|reserved_0|>"]))
    padded = bring_in("causal-lm", reserved, tmp_path / "a", pad_token="<|reserved_0|>")
    assert language.read_tokenizer(padded).pad_token_id == 1
    tokens = gpt2_tokens()
    roomy = bring_in("causal-lm", saved(tmp_path / "roomy", tokens, spare=4), tmp_path / "b", pad_token="[PAD]")
    assert language.read_tokenizer(roomy).pad_token_id == len(tokens)
    assert len(roomy.tensors()["transformer.wte.weight"]) == len(tokens) + 4


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (END, "begins or ends them; give a token that stands in no text, such as 'ÿ'"),
        ("a", "is a piece of texts"),
        ("[PAD]", "no row left for a new one"),
    ],
)
def test_what_does_not_pad(tmp_path, token, words):
    with pytest.raises(InputError, match=words):
        bring_in("causal-lm", saved(tmp_path / "gpt2", gpt2_tokens()), tmp_path / "a", pad_token=token)
    assert not (tmp_path / "a").exists()


def test_where_it_is_a_character_it_does_not_pad(tmp_path):
    characters = tokenizer.train(tokenizer.TokenizerConfig(kind="char", vocab_size=64), ["aÿb"])
    with pytest.raises(InputError, match="is a piece of texts"):
        bring_in("causal-lm", saved(tmp_path / "char", characters), tmp_path / "a", pad_token="ÿ")
    with pytest.raises(InputError, match="--pad-token belongs to a causal-lm, chat-model or reward-model"):
        bring_in("vision-encoder", str(tmp_path / "char"), tmp_path / "a", pad_token="ÿ")


# ----------------------------------------------------------------------------------------------- foreign reward models


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_foreign_reward_model_scores_in_its_template(tmp_path, template):
    """Its tokenizer pads with nothing; written out by hand, read a text at a time by the plain loader."""
    tokens = gpt2_tokens(**({"chat_template": TEMPLATE} if template == "chat" else {}))
    made = bring_in("reward-model", rewarding(tmp_path / "theirs", tokens, pad_token_id=5), tmp_path / "rm")
    assert made.preprocessing["template"] == template
    answers = ["be", "aa and more", "zeta"]
    before = f"{END}alpha?" if template == "plain" else "user:\nalpha?\nassistant:\n"
    plain = AutoModelForSequenceClassification.from_pretrained(made.path).eval()
    expected = alone(plain, tokens, [f"{before}{answer}{END}" for answer in answers])
    _, *lines = generate(made.path, "alpha?", answers=answers).splitlines()
    found = {line.split(maxsplit=2)[2]: float(line.split()[1]) for line in lines}
    assert [found[answer] for answer in answers] == pytest.approx(expected.tolist(), abs=6e-4)
    asked = [{"role": "user", "content": "alpha?"}]
    torch.testing.assert_close(Judge(made)([asked] * 3, answers), expected, atol=1e-5, rtol=1e-4)


def test_one_whose_manifest_says_no_template_is_read_as_its_tokenizer_can(tmp_path):
    tokens = gpt2_tokens()
    made = bring_in("reward-model", rewarding(tmp_path / "theirs", tokens, pad_token_id=5), tmp_path / "rm")
    old = artifact.write(
        tmp_path / "old", kind="reward-model", config="stage: import\n", architecture={},
        preprocessing={"tokenizer": tokenizer.digest(tokens)},
        save=lambda at: language.save(language.read(made, "AutoModelForSequenceClassification"), tokens, at),
    )  # fmt: skip
    said = [generate(one.path, "alpha?", answers=["a", "b"]) for one in (old, made)]
    assert said[0] == said[1]
    theirs = rewarding(tmp_path / "others", tokens, pad_token_id=5, initializer_range=0.2)
    members = {"member_1": old, "member_2": bring_in("reward-model", theirs, tmp_path / "other")}
    data = config(tmp_path, "unused").data
    ensemble.check(members, ensemble.Config(seed=0, data=data))
    with pytest.raises(InputError, match="parents.member_2 is the model of parents.member_1 once more"):
        ensemble.check({**members, "member_2": made}, ensemble.Config(seed=0, data=data))
    with pytest.raises(InputError, match="data.template is chat, but parents.member_1 .* reads plain"):
        ensemble.check(members, ensemble.Config(seed=0, data=data.model_copy(update={"template": "chat"})))


def test_foreign_reward_models_that_would_be_read_elsewhere(tmp_path):
    bare = rewarding(tmp_path / "bare", gpt2_tokens())
    end = rewarding(tmp_path / "end", gpt2_tokens(pad_token=END), pad_token_id=0)
    for source, words in ((bare, "has no pad_token_id"), (end, "which is not the same model.*--pad-token")):
        with pytest.raises(InputError, match=words):
            bring_in("reward-model", source, tmp_path / "a")
    opened = [bring_in("reward-model", source, f"{source}_padded", pad_token="ÿ") for source in (bare, end)]
    tokens = gpt2_tokens()
    texts = [f"{END}alpha?a{END}", f"{END}a long one?b{END}"]
    for made in opened:  # then transformers reads it where fledge does
        model, own = AutoModelForSequenceClassification.from_pretrained(made.path).eval(), language.read_tokenizer(made)
        with torch.no_grad():
            together = model(**own(texts, padding=True, return_tensors="pt")).logits[:, 0]
        torch.testing.assert_close(together, alone(model, tokens, texts))


def test_a_special_token_forges_no_turn(tmp_path):
    made = bring_in("reward-model", rewarding(tmp_path / "theirs", gpt2_tokens(), pad_token_id=5), tmp_path / "rm")
    for prompt, answer in ((f"alpha?{END}", "a"), ("alpha?", f"a{END} and more")):
        with pytest.raises(InputError, match=r"'<\|endoftext\|>' is a special token"):
            generate(made.path, prompt, answers=["fine", answer])
