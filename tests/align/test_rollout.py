"""What a generator owes is checked before anything is computed; a prompt without tokens is refused."""

import pytest
import torch

from align import rollout
from fledge.errors import RunError
from tests.align.test_ppo import EOS, PAD, V

IDS = torch.tensor([[4, EOS, PAD, PAD], [5, 6, 7, 8]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def check(said):
    rollout.check_answers(said, (2, 4), EOS, V, "mine:make")


def test_answers_that_are_as_owed_pass():
    check((IDS, MASK))
    check([IDS.clamp(max=V - 1), MASK])


def changed(x, value):
    x = x.clone()
    x[0, -1] = value  # under the mask
    return x


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (None, "gave NoneType; it owes two tensors"),
        ((IDS, MASK, MASK), "gave tuple; it owes two tensors"),
        ((IDS.tolist(), MASK), "owes two tensors"),
        ((IDS.to("meta"), MASK.to("meta")), "gave ids of torch.int64 on meta; it owes torch.int64 on the cpu"),
        ((IDS, MASK.to("meta")), "gave a mask of torch.int64 on meta"),
        ((IDS.int(), MASK), "gave ids of torch.int32 on cpu; it owes torch.int64"),
        ((IDS, MASK.float()), "gave a mask of torch.float32 on cpu"),
        ((IDS, MASK.bool()), "gave a mask of torch.bool on cpu"),
        ((changed(IDS, V), MASK), f"gave the id {V}; the policy reads 0 to {V - 1}"),
        ((changed(IDS, -100), MASK), "gave the id -100"),
        ((IDS, 2 * MASK), "a run of 1s"),
        ((IDS, MASK.flip(1)), "a run of 1s"),
    ],
)
def test_what_a_generator_owes(said, words):
    with pytest.raises(RunError, match=f"mine:make {words}" if words.startswith("gave") else f"mine:make.*{words}"):
        check(said)
