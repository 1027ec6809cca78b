"""TRL's own loop (https://github.com/huggingface/trl) for ``align/trl.py``: what it is told, and its trainers around
our ids, optimiser, schedule and record. No other file knows TRL. ``config`` is an `align.trl.Config`.
"""

import contextlib
import dataclasses
import math
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from align import examples
from align.examples import Examples
from fledge import distributed
from fledge.config import nearest
from fledge.errors import InputError, RunError
from fledge.models import adapters, language
from fledge.models.language import decay_exempt
from fledge.models.sampling import position_ids
from fledge.optim import adamw, decay_groups
from fledge.stream import derive
from fledge.track import Run

Reward = Callable[..., list[float]]
"""As TRL calls it: completions, completion_ids, log_metric and the dataset's columns, by name."""

OURS = {
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay", "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas", "adam_epsilon": "optim.eps", "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.warmup", "warmup_ratio": "optim.warmup", "lr_scheduler_type": "optim.decay",
    "max_steps": "train.steps", "num_train_epochs": "train.steps", "per_device_train_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.micro_batch", "bf16": "train.precision", "fp16": "train.precision",
    "gradient_checkpointing": "train.grad_checkpointing", "activation_checkpointing": "train.grad_checkpointing",
    "logging_steps": "train.log_every", "use_cpu": "train.device", "seed": "seed", "output_dir": "out",
    "report_to": "track", "run_name": "name", "max_length": "data.max_length", "truncation_mode": "data.overlong",
    "chat_template_kwargs": "data.template", "model_init_kwargs": "parents.policy", "reward_weights": "rewards",
}  # fmt: skip
"""What TRL's configs call something that a section of ours says."""
NOT_ASKED = {"trust_remote_code", "pad_token", "dataset_num_proc", "num_generations_eval", "padding_free"}
NOT_ASKED |= {"log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts"}
NOT_ASKED |= {"num_completions_to_print", "max_tool_calling_iterations"}
"""Arguments of TRL that have no meaning in a stage."""


def of_trl(config: Any, what: str) -> Any:
    """TRL's Config or Trainer of a method."""
    import trl

    return getattr(trl, f"{config.trainer.upper()}{what}")


# ------------------------------------------------------------------------------------------------- what TRL is told


def arguments(config: Any) -> dict[str, Any]:
    """The config's ``arguments``, as TRL has their types.

    Raises:
        InputError: TRL's config class has no such argument, or it is ours, or of another type; says where it belongs,
            or the nearest one.
    """
    from transformers import TrainingArguments

    cls = of_trl(config, "Config")
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    free = sorted({field.name for field in dataclasses.fields(cls)} - common - NOT_ASKED - set(OURS))
    types, found = typing.get_type_hints(cls), {}
    for name, value in config.arguments.items():
        if name in OURS:
            raise InputError(f"arguments.{name}: say it as {OURS[name]}; TRL is told by fledge")
        if name not in free:
            why = "is left to fledge" if name in common | NOT_ASKED else f"is no argument of {cls.__name__}"
            raise InputError(f"arguments.{name} {why}{nearest(name, free)}; it takes {', '.join(free)}")
        try:
            found[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]["msg"]
            raise InputError(f"arguments.{name}: {value!r} does not fit {cls.__name__}: {wrong}") from None
    return found


def share(config: Any) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step) on each rank.

    Raises:
        InputError: the batch does not divide evenly.
    """
    train, world = config.train, distributed.world_size()
    rows = train.micro_batch or max(1, train.batch // world)
    if train.batch % (rows * world):
        raise InputError(
            f"train.batch {train.batch} is not a multiple of {world} ranks x micro-batches of {rows} rows; TRL cuts "
            "batches evenly"
        )
    return rows, train.batch // (rows * world)


def told(config: Any, folder: Path) -> Any:
    """TRL's config, without the number of steps. It saves, reports and schedules nothing by itself.

    Raises:
        InputError: TRL refuses a value, or values that do not go together.
    """
    rows, pieces = share(config)
    cls = of_trl(config, "Config")
    lengths = {} if config.rolls_out else {"max_length": None}  # cut already
    try:
        return cls(
            **arguments(config),
            **lengths,
            output_dir=str(folder),  # which stays empty
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=pieces,
            dataloader_drop_last=True,
            max_grad_norm=config.optim.clip or 0.0,
            bf16=config.train.precision == "bf16",
            activation_checkpointing=config.train.grad_checkpointing,
            use_cpu=distributed.device().type == "cpu",
            accelerator_config={"use_configured_state": True},  # the ranks are started already
            ddp_find_unused_parameters=False,
            seed=derive("trl", config.seed) % 2**32,
            logging_steps=config.train.log_every,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"arguments: TRL's {cls.__name__} refuses them: {error}") from error


def steps_of_epoch(config: Any, args: Any, found: Examples) -> int:
    """Steps in which everything was learned from once; of grpo and rloo, num_iterations times.

    Raises:
        InputError: the data does not fill one batch, or what grpo and rloo generate at once.
    """
    rows, at_once, times = len(found), config.train.batch, 1
    if config.rolls_out:
        rows, at_once, times = rows * args.num_generations, args.generation_batch_size, args.num_iterations
    used = rows // at_once * at_once * times
    if used < config.train.batch:
        answers = f" (prompts x num_generations), of which {at_once} are generated at once," if config.rolls_out else ""
        raise InputError(
            f"the train data gives {rows} rows{answers} but train.batch is {config.train.batch}; {found.report}"
        )
    return used // config.train.batch


def as_dataset(config: Any, found: Examples) -> Any:
    """A Dataset of TRL's columns, in an order of the seed's: KTO's loop keeps the order that it finds."""
    from datasets import Dataset

    found = found.shuffled(config.seed)
    if config.trainer == "kto" and config.arguments.get("loss_type", "kto") == "kto":
        found = examples.with_kl_answers(found, share(config)[0])
    return Dataset.from_dict(found.columns)


# --------------------------------------------------------------------------------------------------------- its trainers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no warnings of what TRL calls by names that transformers is about to change."""
    with language.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def trainer_class(config: Any, ids: dict[str, list[int]]) -> Any:
    """TRL's trainer, but for its own tokenising, and for telling Hugging Face that it is used.

    ``ids`` are those of each prompt that is rolled out.
    """

    class Trainer(of_trl(config, "Trainer")):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
            return [ids[prompt] for prompt in prompts], None, {}

        def _send_telemetry(self) -> None:
            pass

    return Trainer


def pass_positions(model: nn.Module) -> None:
    """Say positions by the mask where the caller left them out: GPT-2 counts padding on the left as text otherwise."""

    def put_in(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None:
            kwargs["position_ids"] = position_ids(mask)
        return args, kwargs

    model.register_forward_pre_hook(put_in, with_kwargs=True)


def build(
    config: Any,
    args: Any,
    policy: Any,
    tokens: Any,
    found: Examples,
    ids: dict[str, list[int]],
    reward: Reward | None,
) -> Any:
    """TRL's trainer around ``policy``, and around an adapter in it with ``lora``. ``tokens`` may get a padding token.

    Raises:
        InputError: TRL refuses the arguments, or the environment asks for FSDP or DeepSpeed.
    """
    rewards = {"reward_funcs": reward} if config.rolls_out else {}
    lora = adapters.in_peft(policy, config.lora) if config.lora is not None else None
    cls = trainer_class(config, ids)
    try:
        with quiet():
            trainer = cls(
                policy, args=args, train_dataset=as_dataset(config, found), processing_class=tokens, peft_config=lora,
                **rewards,
            )  # fmt: skip
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"TRL's {config.trainer.upper()}Trainer refuses this: {error}") from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError("align.trl keeps whole parameters on each rank; unset ACCELERATE_USE_… in the environment")
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            pass_positions(model)
    return trainer


# ------------------------------------------------------------------------------------------------------------- training


def broken(run: Run, where: str, what: str) -> RunError:
    return RunError(
        f"{run.name}: {where}: {what}. TRL's loop cannot go back; nothing was handed over. A lower optim.lr, a longer "
        "optim.warmup or precision: fp32 usually helps"
    )


def reporter(run: Run, progress: Any, config: Any) -> Any:
    """TRL's logs become the run's: train/loss, train/rewards/margins and so on, as TRL calls them."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        values: dict[str, float] = {}
        began = seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.began
            progress.update(self.values, rows=config.train.batch)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            names = {"learning_rate": "lr", "epoch": None, "step_time": None}
            self.values = {names.get(k, k): v for k, v in logs.items() if v is not None and names.get(k, k)}
            step = state.global_step - 1
            run.log(step, {f"train/{name}": v for name, v in self.values.items()} | {"time/step": self.seconds})
            if not math.isfinite(self.values["loss"]):
                raise broken(run, f"step {step}", f"the loss is {self.values['loss']}")

    return Reporter()


def train(config: Any, trainer: Any, run: Run, steps: int, steps_per_epoch: int) -> Any:
    """Take the steps with our AdamW and our schedule; TRL's model then: the policy, or a PeftModel around it.

    Raises:
        RunError: a loss or a parameter is not finite.
    """
    from transformers import PrinterCallback

    groups, batch = decay_groups(trainer.model, decay_exempt), config.train.batch
    optim = adamw(groups, config.optim, batch=batch, steps=steps, steps_per_epoch=steps_per_epoch)
    for group in optim.optimizer.param_groups:
        group["lr"] = 1.0  # which the scheduler multiplies
        group["weight_decay"] = config.optim.weight_decay if group["decay"] else 0.0
    trainer.optimizer = optim.optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optim.optimizer, optim.lr)
    trainer.remove_callback(PrinterCallback)
    trainer.args.max_steps = steps
    with run.progress(steps) as progress, quiet():
        trainer.add_callback(reporter(run, progress, config))
        trainer.train()
    if trainer.state.global_step < steps:
        raise RunError(
            f"{run.name}: TRL's loop ended after {trainer.state.global_step} of {steps} steps; nothing was handed over"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):  # since the last line of the log
        raise broken(run, f"step {steps - 1}", "a parameter is not finite")
    return model
