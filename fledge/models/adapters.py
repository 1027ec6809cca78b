"""Low-rank adapters on a language model's linear layers, by peft, put into the model in place.

The model stays of its own class. A layer W x becomes W x + (alpha / rank) · B A x with A (rank, in) and B (out, rank),
B = 0 at first (Hu et al. 2021, https://arxiv.org/abs/2106.09685). Several adapters may share one trunk; `using` says
which of them takes part, and with none the model is the base, bit for bit.
"""

import contextlib
import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from fledge.config import Config
from fledge.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

T = TypeVar("T")
FOLDER = "adapter"
"""Where an artifact keeps its adapter, beside the merged weights."""


class LoRAConfig(Config):
    """What learns beside the frozen base. The default is all linear layers but the head, as QLoRA has it."""

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    """The update counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the adapter's input."""
    targets: list[str] = []
    """Layers by the end of their names, such as q_proj; none: all linear layers but the head."""
    dora: bool = False
    """Learn each column's magnitude apart from its direction (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""


def in_peft(model: nn.Module, config: LoRAConfig) -> "LoraConfig":
    """The same in peft's own words, for ``model``."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, whatever it is
        lora_dropout=config.dropout,
        target_modules=config.targets or "all-linear",
        use_dora=config.dora,
        task_type="SEQ_CLS" if hasattr(model, "score") else None,  # or peft takes the head for a layer
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),  # GPT-2's layers
    )


def add(model: Any, config: LoRAConfig, name: str = "default") -> list[nn.Parameter]:
    """Put an adapter into ``model``, which freezes all that it had, and take it into use; its parameters.

    Raises:
        InputError: no layer has a name that ``config.targets`` asks for, or one of them is the embedding, whose weight
            a tied head shares: merging would change both.
    """
    lora = in_peft(model, config)
    others = [parameter for other in names(model) for parameter in parameters(model, other)]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
            model.add_adapter(lora, adapter_name=name)
    except ValueError as error:
        some = sorted({n.rpartition(".")[2] for n, module in model.named_modules() if hasattr(module, "weight")})
        raise InputError(f"lora.targets {config.targets}: {error} Its layers are {', '.join(some)}") from error
    embedding = model.get_input_embeddings().weight
    for where, layer in layers(model):
        base = layer.get_base_layer()
        if isinstance(base, nn.Embedding) or base.weight is embedding:
            raise InputError(
                f"lora.targets {config.targets}: {where} is the embedding or tied to it; leave it out, adapters are "
                "for linear layers with weights of their own"
            )
    model.set_adapter(name)
    for parameter in others:  # one adapter does not freeze another
        parameter.requires_grad_(True)
    return parameters(model, name)


def layers(model: nn.Module) -> "Iterator[tuple[str, BaseTunerLayer]]":
    """The layers that hold adapters, by name."""
    if "peft" not in sys.modules:  # which takes a second to import, and without which nothing holds any
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for where, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield where, module


def names(model: nn.Module) -> list[str]:
    """The adapters of a model."""
    return sorted({name for _, layer in layers(model) for name in layer._all_available_adapter_names()})


def parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """Those of one adapter, in the model's order."""
    return [p for where, p in model.named_parameters() if f".{name}." in where and "lora_" in where]


def frozen(module: nn.Module) -> list[nn.Parameter]:
    """What the adapters inside leave as it is; the `constant()` of an objective that learns nothing but adapters."""
    return [parameter for parameter in module.parameters() if not parameter.requires_grad]


State = tuple[list[str], bool]
"""Which adapters of a layer are in use, and whether all are off."""


@contextlib.contextmanager
def _switched(held: "list[BaseTunerLayer]", states: list[State]) -> Iterator[None]:
    before: list[Any] = [(layer._active_adapter, layer._disable_adapters) for layer in held]
    _switch(held, states)
    try:
        yield
    finally:
        _switch(held, before)


def _switch(held: "list[BaseTunerLayer]", states: list[State]) -> None:
    for layer, (active, off) in zip(held, states, strict=True):
        layer._active_adapter, layer._disable_adapters = active, off


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """In here ``model`` computes with one adapter, or as its base (None). What is trainable stays as it is."""
    held = [layer for _, layer in layers(model)]
    with _switched(held, [([name] if name else [], name is None)] * len(held)):
        yield


def as_now(module: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """``function`` under the adapters that ``module`` computes with now, whenever it is called."""
    held = [layer for _, layer in layers(module)]
    now: list[Any] = [(layer._active_adapter, layer._disable_adapters) for layer in held]

    def then(*args: Any, **kwargs: Any) -> T:
        with _switched(held, now):
            return function(*args, **kwargs)

    return then if held else function


class View:
    """A model with one of its adapters, or as its base (None), called like the model; it has no weights of its own."""

    def __init__(self, model: Any, name: str | None) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with using(self.model, self.name):
            return self.model(*args, **kwargs)

    def to(self, device: torch.device) -> "View":
        """The model moves; this is a way to look at it."""
        self.model.to(device)
        return self


@torch.no_grad()
def merged(model: Any, name: str = "default") -> Any:
    """A plain model of the same class whose weights hold one adapter; ``model`` is left as it is.

    Raises:
        RuntimeError: a merged weight is not finite.
    """
    plain = copy.deepcopy(model)
    for where, layer in list(layers(plain)):
        layer.merge(safe_merge=True, adapter_names=[name])
        parent, _, last = where.rpartition(".")
        setattr(plain.get_submodule(parent), last, layer.get_base_layer())
    plain._hf_peft_config_loaded = False
    del plain.peft_config
    return plain.requires_grad_(True)


def save(model: Any, folder: Path, name: str = "default", heads: Sequence[str] = ()) -> None:
    """One adapter in peft's own form: ``PeftModel.from_pretrained(base, folder)`` reads it.

    Args:
        heads: modules that learned as a whole and go with it, such as a reward model's score.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name)
    for head in heads:
        tensors |= {f"{head}.{key}": tensor for key, tensor in model.get_submodule(head).state_dict().items()}
    prefixed = {f"base_model.model.{key}": tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.copy(model.peft_config[name])
    config.modules_to_save = list(heads) or None
    config.inference_mode, config.base_model_name_or_path = True, None  # the base may be anywhere
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set is written in another order each time
    config.save_pretrained(folder)
