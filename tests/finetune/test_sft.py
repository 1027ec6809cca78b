"""SFT beside TRL's SFTTrainer and transformers' NEFTune on the same batches; what may change nothing; wrong input."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.sft import SFT, MixedSFT, mixed
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import Chats, ChatsConfig
from fledge.data.prompts import Prompts
from fledge.data.tokenizer import TokenizerConfig
from fledge.evals import generation
from fledge.models import adapters, language
from fledge.models.adapters import LoRAConfig

TALKS = [("what is it?", "four."), ("two plus two?", "it is four, of course"), ("hi", "ho"), ("a letter?", "e acute")]
TEXTS = [text for pair in TALKS for text in pair] * 3


@pytest.fixture(scope="module")
def tokens():
    return tokenizers.train(TokenizerConfig(vocab_size=300), TEXTS)


@pytest.fixture
def chats(tokens, tmp_path):
    def chats(**more) -> Chats:
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in TALKS]
        (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        held = {"validation_fraction": 0.0, "test_fraction": 0.0}
        return Chats(ChatsConfig(source="files", path=str(tmp_path / "chats.jsonl"), **held, **more), tokens, "train")

    return chats


def llama(tokens, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=96, **language.special_ids(tokens), **more,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


def gradients(objective: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss, and its gradient by the model's names."""
    objective.zero_grad()
    (term,) = objective.weights
    loss = objective(batch, 0)[term] / objective.counts(batch)[term]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in objective.model.named_parameters() if p.grad is not None}


def assert_same(found: tuple, truth: tuple) -> None:
    assert found[0] == pytest.approx(truth[0], rel=1e-5)
    assert found[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_who_has_no_padding_token_answers_the_same(tokens):
    """GPT-2's, Llama's and Mistral's have none."""
    bare = copy.deepcopy(tokens)
    bare.pad_token = None
    said = []
    for one in (tokens, bare):
        records = [{"prompt": [{"role": "user", "content": q}]} for q, _ in TALKS]
        prompts = Prompts(records, one, split="test")
        model = llama(tokens)
        said.append(generation.answers(model, one, prompts, range(len(prompts)), max_new_tokens=8, temperature=1.0))
    assert bare.pad_token_id is None and said[0] == said[1] and len(set(said[0])) > 1


# ---- TRL


def of_trl(model: nn.Module, tokens, folder, *, packing: bool) -> tuple[dict, tuple]:
    """The batch that TRL's SFTTrainer makes of the conversations, its loss and its gradients."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"prompt": [{"role": "user", "content": q}], "completion": [{"role": "assistant", "content": a}]}
        for q, a in TALKS
    ]
    args = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=4, max_length=64, packing=packing, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", completion_only_loss=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokens)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    model.train().zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return batch, (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_are_those_of_trl(tokens, chats, tmp_path, packing):
    batch, truth = of_trl(llama(tokens), tokens, tmp_path / "trl", packing=packing)
    mine = chats(max_length=64, packing="best_fit" if packing else "none")
    rows = mine.rows(list(range(len(mine))))
    assert ("position_ids" in batch) == packing
    real = batch["labels"] != -100
    scored = rows["labels"] != -100
    assert sorted(batch["labels"][real].tolist()) == sorted(rows["labels"][scored].tolist())
    assert_same(gradients(SFT(llama(tokens)).train(), rows), truth)


def test_neftune_is_that_of_transformers_on_the_same_noise(tokens, chats):
    """On rows without padding; transformers takes L with it."""
    from transformers.integrations.neftune import activate_neftune

    rows = {name: x[:, :10] for name, x in chats().rows([1]).items()}
    model, peer = llama(tokens), llama(tokens).train()
    activate_neftune(peer, 5.0)
    torch.manual_seed(3)
    read = peer.get_input_embeddings()(rows["input_ids"])
    torch.manual_seed(3)
    mine = SFT(model, 5.0).train().inputs(rows)["inputs_embeds"]
    plain = model.get_input_embeddings()(rows["input_ids"])
    torch.testing.assert_close(mine, read)
    assert not torch.equal(mine, plain)
    assert "inputs_embeds" not in SFT(model, 5.0).eval().inputs(rows)


def test_the_noise_is_as_large_as_the_documents_are_long():
    document = torch.tensor([[1] * 4 + [2] * 16 + [0] * 12, [1] * 32])
    noise = language.neftune(torch.zeros(2, 32, 4096), document, alpha=5.0)
    for row, at, length in ((0, slice(0, 4), 4), (0, slice(4, 20), 16), (1, slice(0, 32), 32)):
        most = 5.0 / math.sqrt(length * 4096)
        assert 0.99 * most < noise[row, at].abs().max() <= most
        assert noise[row, at].std().item() == pytest.approx(most / math.sqrt(3), rel=0.02)  # of a uniform one


# ---- what changes nothing


def test_padding_its_id_and_the_order_of_rows_change_nothing(tokens, chats):
    rows = chats().rows([0, 1, 2, 3])
    truth = gradients(SFT(llama(tokens)), rows)
    ended = dict(rows, input_ids=rows["input_ids"].masked_fill(rows["attention_mask"] == 0, tokens.eos_token_id))
    assert_same(gradients(SFT(llama(tokens)), ended), truth)
    fill = {"input_ids": 7, "attention_mask": 0, "labels": -100}
    wider = {n: nn.functional.pad(x, (0, 9), value=fill[n]) for n, x in rows.items()}
    assert_same(gradients(SFT(llama(tokens)), wider), truth)
    assert_same(gradients(SFT(llama(tokens)), {n: x[[2, 0, 3, 1]] for n, x in rows.items()}), truth)
    packed = chats(packing="best_fit", max_length=64)
    assert len(packed) < 4
    assert_same(gradients(SFT(llama(tokens)), packed.rows(list(range(len(packed))))), truth)


def test_packed_conversations_do_not_see_each_other(tokens, chats):
    rows = chats(packing="best_fit", max_length=64).rows([0])
    first = rows["document"] == 1
    other = dict(rows, input_ids=torch.where(first, rows["input_ids"], 50))
    label = rows["labels"] != -100
    mine, his = (SFT(llama(tokens)).nats(batch) for batch in (rows, other))
    torch.testing.assert_close(mine[first[label]], his[first[label]])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_head_sees_only_what_is_scored(tokens, arch):
    from fledge.models.language import CausalConfig, build_causal, logits_at

    torch.manual_seed(0)
    model = build_causal(CausalConfig(arch=arch, embed_dim=16, depth=2, num_heads=2, context_length=16), tokens).eval()
    ids, where = torch.randint(0, 100, (3, 8)), torch.rand(3, 8) < 0.4
    torch.testing.assert_close(logits_at(model, where, input_ids=ids), model(input_ids=ids).logits[where])
    assert model(input_ids=ids).logits.shape[:2] == (3, 8)


# ---- adapters and text


def test_dropout_of_adapters_is_on_while_training(tokens, chats):
    model = llama(tokens)
    for parameter in adapters.add(model, LoRAConfig(rank=4, dropout=0.5)):
        nn.init.normal_(parameter, std=0.1)
    rows, objective = chats().rows([0, 1]), SFT(model).train()
    assert objective(rows, 0)["loss"] != objective(rows, 0)["loss"]
    assert objective.eval()(rows, 0)["loss"] == objective(rows, 0)["loss"]
    model.train()
    torch.manual_seed(1)
    first = gradients(objective.train(), rows)
    torch.manual_seed(1)
    assert_same(gradients(objective, rows), first)


def test_adapters_learn_behind_checkpointed_blocks_though_the_embedding_is_frozen(tokens, chats):
    from fledge.train import checkpoint_blocks, repeated_blocks

    rows, found = chats().rows([0, 1]), []
    for checkpointed in (False, True):
        model = llama(tokens)
        for parameter in adapters.add(model, LoRAConfig(rank=4)):
            nn.init.normal_(parameter, std=0.1)
        if checkpointed:
            checkpoint_blocks(repeated_blocks(model))
        found.append(gradients(SFT(model).train(), rows))
    assert len(found[0][1]) == 2 * 2 * 7
    assert_same(found[1], found[0])


def test_text_in_the_batch_counts_apart(tokens, chats):
    """answers + coef · text, each the mean over its own tokens: two batches' losses, by hand."""
    talk, ids = chats().rows([0, 1, 2]), torch.randint(20, 90, (2, 11))
    text = {"input_ids": ids, "document": torch.ones_like(ids), "position": torch.arange(11).expand(2, 11)}
    text["labels"] = ids.roll(-1, 1).index_fill(1, torch.tensor([10]), -100)
    batch, model = mixed([(0, talk), (1, text)]), llama(tokens).eval()
    objective = MixedSFT(model, 0.25)
    sums, counts = objective(batch, 0), objective.counts(batch)
    plain = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    assert counts == {"answers": SFT(model).counts(talk)["loss"], "pretraining": 20}
    torch.testing.assert_close(sums["pretraining"], -plain.sum())
    torch.testing.assert_close(sums["answers"], SFT(model)(talk, 0)["loss"])
    assert objective.weights == {"answers": 1.0, "pretraining": 0.25}
    assert objective.tokens(batch) == int(talk["attention_mask"].sum()) + 22
