import pytest
import torch
from transformers import AutoTokenizer

from fledge.data import tokenizer as tokenizers
from fledge.data.tokenizer import ROLES, SPECIALS, TokenizerConfig
from fledge.errors import InputError

TEXTS = ["the quick brown fox jumps over the lazy dog", "the dog sleeps\n\nthe fox does not", "naïve café — 1,234"] * 4
ODD = [
    "",
    " ",
    "  two  spaces , and . dots !\n\t",
    "日本語 🙂 \u0301 \u200d",
    "\x01\x7f",
    "[MASK] <|user|> [EOS]",
    "a'b don't",
]


@pytest.fixture(scope="module", params=["byte_bpe", "char"])
def tokenizer(request):
    return tokenizers.train(TokenizerConfig(kind=request.param, vocab_size=320), TEXTS)


def test_training_is_deterministic(tokenizer):
    kind = "char" if len(tokenizer) < 256 else "byte_bpe"
    again = tokenizers.train(TokenizerConfig(kind=kind, vocab_size=320), iter(TEXTS))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert tokenizers.digest(again) == tokenizers.digest(tokenizer)
    assert tokenizers.digest(tokenizers.train(TokenizerConfig(kind=kind, vocab_size=280), TEXTS[:1])) != (
        tokenizers.digest(tokenizer)
    )


def test_special_tokens_stand_first_and_apart(tokenizer):
    specials = [*SPECIALS.values(), *ROLES.values()]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(10))
    assert tokenizers.special_ids(tokenizer) == list(range(10))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizers.ordinary_ids(tokenizer).tolist() == list(range(10, len(tokenizer)))


def test_auto_tokenizer_reads_it_back(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    for read in (AutoTokenizer.from_pretrained(tmp_path / "saved"), tokenizers.load(tmp_path / "saved")):
        assert [read(t)["input_ids"] for t in ODD + TEXTS] == [tokenizer(t)["input_ids"] for t in ODD + TEXTS]
        assert tokenizers.digest(read) == tokenizers.digest(tokenizer)
        assert read.chat_template == tokenizer.chat_template
    config = TokenizerConfig(path=str(tmp_path / "saved"))
    config.check()
    assert tokenizers.digest(tokenizers.build(config, lambda: pytest.fail("not needed"))) == tokenizers.digest(
        tokenizer
    )
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert TokenizerConfig(path=str(tmp_path / "moved")).fingerprint() == _fingerprint(tokenizer, tmp_path / "again")


def _fingerprint(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return TokenizerConfig(path=str(folder)).fingerprint()


def test_the_digest_ignores_the_padding_last_asked_for(tokenizer):
    before = tokenizers.digest(tokenizer)
    tokenizer(["a", "the dog"], padding=True, truncation=True, max_length=4)
    assert tokenizers.digest(tokenizer) == before


def test_bytes_are_lossless_and_special_names_in_text_are_text():
    tokenizer = tokenizers.train(TokenizerConfig(vocab_size=300), TEXTS)
    for text, ids in zip(ODD, tokenizers.encode(tokenizer, ODD), strict=True):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizers.special_ids(tokenizer))
        assert tokenizers.token_bytes(tokenizer)[torch.tensor(ids, dtype=torch.long)].sum() == len(text.encode())


def test_characters_fall_back_to_unknown():
    tokenizer = tokenizers.train(TokenizerConfig(kind="char", vocab_size=64), ["abba — é\n"])
    ids = tokenizers.encode(tokenizer, ["ab Q\né—"])[0]
    assert [tokenizer.convert_ids_to_tokens(i) for i in ids] == ["a", "b", " ", "[UNK]", "\n", "é", "—"]
    assert tokenizers.token_bytes(tokenizer)[torch.tensor(ids)].tolist() == [1, 1, 1, 0, 1, 2, 3]
    few = tokenizers.train(TokenizerConfig(kind="char", vocab_size=12), ["aaabbc"])
    assert len(few) == 12
    assert few.convert_ids_to_tokens([10, 11]) == ["a", "b"]


@pytest.mark.parametrize("style, before, after", [("causal", "[BOS]", None), ("encoder", "[CLS]", "[SEP]")])
def test_framing(style, before, after):
    tokenizer = tokenizers.train(TokenizerConfig(vocab_size=300, style=style), TEXTS)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])
    assert tokens[0] == before and (tokens[-1] == after if after else tokens[-1] not in SPECIALS.values())
    assert tokenizers.style_of(tokenizer) == style
    ends = {"causal": ("[BOS]", "[EOS]"), "encoder": ("[CLS]", "[SEP]")}[style]
    assert tokenizers.frame(tokenizer, style) == tuple([tokenizer.convert_tokens_to_ids(e)] for e in ends)


def test_template_equals_a_hand_written_rendering_and_marks_what_is_generated():
    tokenizer = tokenizers.train(TokenizerConfig(vocab_size=300), TEXTS)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello\n "},
        {"role": "assistant", "content": " the dog"},
        {"role": "user", "content": "and?"},
    ]
    text = "[BOS]<|system|>be brief<|user|>hello\n <|assistant|> the dog[EOS]<|user|>and?"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text + "<|assistant|>"
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == " the dog[EOS]"


def test_a_foreign_tokenizer_gets_padding_of_its_own(tmp_path):
    tokenizer = tokenizers.train(TokenizerConfig(vocab_size=300), TEXTS)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    read = tokenizers.load(tmp_path)
    assert read.pad_token == "[PAD]" and read.pad_token_id != read.eos_token_id
    assert tokenizers.add_chat(read) == 0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: tokenizers.train(TokenizerConfig(vocab_size=100), TEXTS), ["vocab_size is 100", "266"]),
        (lambda p: tokenizers.train(TokenizerConfig(), ["", ""]), ["no text"]),
        (lambda p: tokenizers.load(p / "none"), ["none", "tokenizer.json"]),
    ],
)
def test_wrong_input(make, words, tmp_path):
    with pytest.raises(InputError) as error:
        make(tmp_path)
    assert all(word in str(error.value) for word in words)
