"""What a reward model says of answers, read as texts: it may have another tokenizer than the model that gave them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fledge import distributed
from fledge.artifact import Artifact
from fledge.data import chats
from fledge.data import tokenizer as tokenizers
from fledge.data.chats import Message
from fledge.models import language, reward_model
from fledge.train import autocast


class Judge:
    """A reward model that scores answers on its calibrated scale.

    Prompt and answer are written in the reward model's own template and tokens, and every answer is closed by its end
    token, also one that was cut short. What exceeds its positions is cut at the left of the prompt.
    """

    def __init__(self, reward: Artifact, precision: str = "fp32", rows: int = 64) -> None:
        self.tokens = language.read_tokenizer(reward)
        self.model = language.read(reward, "AutoModelForSequenceClassification").eval().requires_grad_(False)
        self.template = reward_model.template(reward.preprocessing, self.tokens)
        self.precision, self.rows = precision, rows
        self.offset = float(getattr(self.model.config, "reward_offset", 0.0))
        self.scale = float(getattr(self.model.config, "reward_scale", 1.0))

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[Message]], answers: Sequence[str]) -> Tensor:
        """(N,) one score an answer; texts of similar length are read together."""
        self.model.to(distributed.device())
        texts = [self.ids(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = torch.empty(len(texts))
        for start in range(0, len(order), self.rows):
            some = order[start : start + self.rows]
            scores[some] = self.raw([texts[i] for i in some])
        return (scores - self.offset) * self.scale

    def ids(self, prompt: list[Message], answer: str) -> list[int]:
        """One conversation, through the end token."""
        said = [{"role": "assistant", "content": answer}]
        [(first, [last])] = chats.ids_of_answers(self.tokens, [prompt], [[said]], self.template)
        room = language.positions(self.model.config) - len(last)
        if len(first) > room:
            first = chats.shorten(first, room, tokenizers.bos_id(self.tokens)) or []
        return [*first, *last][-language.positions(self.model.config) :]

    def raw(self, texts: list[list[int]]) -> Tensor:
        """(B,) the head at each text's last token, found by its length and never by a pad id."""
        ids, mask = (x.to(distributed.device()) for x in chats.pad(texts, tokenizers.pad_id(self.tokens), "right"))
        with autocast(self.precision):
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), mask.sum(dim=1) - 1]
        return self.model.score(last.to(self.model.score.weight.dtype)).squeeze(-1).cpu()
