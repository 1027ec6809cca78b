"""DPO, KTO, GRPO and RLOO, trained by TRL (https://github.com/huggingface/trl), as a stage like any other.

    python -m align.trl configs/align/trl_dpo_world.yaml

Ours are the config, the data and its token ids, the optimiser and its schedule, the record of the run, the figures and
the artifact; TRL's are the losses, the rollouts and the loop. The ids are handed over as they are: TRL neither renders
nor tokenises anything.

**Limits**, all of them of TRL's loop (what follows from each: docs/trl.md):

- *Resume*: none. Its checkpoints hold pickles, which fledge neither writes nor reads: an interrupted stage begins anew.
  The artifact is written at the end and whole, or not at all; ``fledge export`` has nothing to export.
- *Ranks and micro-batches* change more than rounding: KTO estimates its KL in each micro-batch of each rank, GRPO and
  RLOO draw other answers. So ``train.micro_batch`` is science here, and batches must divide evenly. Every rank holds
  all parameters: no FSDP, no DeepSpeed.
- *Padding*: right for DPO and KTO; left for the prompts of GRPO and RLOO, where TRL passes no positions. We put them
  in, so that a row means the same however it is padded. Masks come from lengths, so pad may be eos.
- *Length*: what exceeds ``data.max_length`` is dropped, or its prompt cut at the left, before TRL sees it.
- *Selection and faults*: no ``train.select``, no ``train.on_nonfinite``: a loss that is not finite ends the run.
"""

import contextlib
import dataclasses
import itertools
import math
import time
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError, model_validator
from torch import Tensor, nn

from align import judge, scorers
from align.rollout import in_pieces, read_prompts, response_logprobs
from align.scorers import Scorer
from fledge import artifact, distributed
from fledge.artifact import Artifact
from fledge.config import Config as BaseConfig
from fledge.config import Duration, StageConfig, bookkeeping, hardware, nearest, parent, resolve
from fledge.data import chats, preferences
from fledge.data.chats import Chats, ChatsConfig, Prompts
from fledge.data.preferences import Preferences, PreferencesConfig
from fledge.data.records import Split
from fledge.errors import InputError, RunError
from fledge.evals.score import Score, bootstrap
from fledge.models import adapters, language
from fledge.models.adapters import LoRAConfig
from fledge.models.language import decay_exempt
from fledge.models.sampling import position_ids
from fledge.optim import OptimConfig, adamw, decay_groups
from fledge.stream import Batch, Permutation, derive
from fledge.track import Run, TrackConfig

WRITES = "chat-model"
TRAINERS = {"dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO"}
Name = Literal["dpo", "kto", "grpo", "rloo"]

OURS = {
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay", "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas", "adam_epsilon": "optim.eps", "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.warmup", "warmup_ratio": "optim.warmup", "lr_scheduler_type": "optim.decay",
    "max_steps": "train.steps", "num_train_epochs": "train.steps", "per_device_train_batch_size": "train.batch",
    "gradient_accumulation_steps": "train.micro_batch", "bf16": "train.precision", "fp16": "train.precision",
    "gradient_checkpointing": "train.grad_checkpointing", "activation_checkpointing": "train.grad_checkpointing",
    "logging_steps": "train.log_every", "use_cpu": "train.device", "seed": "seed", "output_dir": "out",
    "report_to": "track", "run_name": "name", "max_length": "data.max_length", "truncation_mode": "data.overlong",
    "chat_template_kwargs": "data.template", "model_init_kwargs": "parents.policy",
}  # fmt: skip
"""What TRL's configs call something that a section of ours says."""
NOT_ASKED = {"trust_remote_code", "pad_token", "dataset_num_proc", "reward_weights", "num_generations_eval"}
NOT_ASKED |= {"log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts"}
NOT_ASKED |= {"num_completions_to_print", "max_tool_calling_iterations", "padding_free"}
"""Arguments of TRL that have no meaning in a stage."""


class Parents(BaseConfig):
    policy: str | None = parent("chat-model", required=True)
    """Policy to start from; it is the reference, too."""
    reward: str | None = parent("reward-model", "reward-ensemble", required=False)
    """Reward model of grpo and rloo, where ``reward`` names no function; for dpo and kto it only judges."""


class Data(PreferencesConfig):
    """dpo: pairs. kto: both sides of pairs, or with ``label`` single answers. grpo, rloo: prompts of any records."""

    messages: str = "messages"
    """kto with labels, grpo, rloo: the field with a list of {role, content}; records without it have a prompt."""
    completion: str = "completion"
    """kto with labels: the field of the answer."""
    image: ClassVar[None] = None
    """TRL's trainers are given no pictures."""
    label: str | None = None
    """kto: the field that says by true or false whether an answer is desirable; null: the records are pairs."""


class Optim(OptimConfig):
    """Zephyr's (Hugging Face's alignment handbook): AdamW without decay, cosine, a tenth of warm-up, clipped at 1."""

    lr: float = 5e-7
    weight_decay: float = 0.0
    clip: float | None = 1.0
    warmup: Duration = "0.1 epochs"


class Train(BaseConfig):
    """What TRL's loop is told. Defaults: Zephyr's."""

    batch: PositiveInt = 128
    """What a step learns from, over all ranks: pairs of dpo, answers of the others."""
    steps: Duration = "1 epoch"
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast of the forward; parameters stay in fp32."""
    micro_batch: PositiveInt | None = None
    """Rows of one forward on one rank, which must divide its share; null: the whole share."""
    device: Literal["auto", "cuda", "mps", "cpu"] = hardware("auto")
    grad_checkpointing: bool = hardware(False)
    """Recompute each block's activations in the backward."""
    log_every: PositiveInt = bookkeeping(1)


class Evaluation(BaseConfig):
    """Held-out pairs, and answers to held-out prompts before and after, judged."""

    split: Literal["validation", "test"] = "test"
    pairs: PositiveInt = 1024
    """Of dpo and kto: how many pairs (or labelled answers) at most."""
    prompts: PositiveInt = 512
    """How many at most."""
    max_new_tokens: PositiveInt = 128
    temperature: PositiveFloat = 1.0
    greedy: bool = False
    """Judge the most probable answers; off: sampled ones. The same for both policies."""


class Config(StageConfig):
    """A trainer of TRL; the defaults are Zephyr's DPO (alignment handbook, full), but for its beta, an argument."""

    stage: Literal["align.trl"] = "align.trl"
    trainer: Name = "dpo"
    parents: Parents = Parents()
    data: Data = Data()
    reward: str | None = None
    """grpo, rloo: ``module:function``, called with the prompts' records and the responses; null: the parent."""
    judge: str | None = None
    """``module:function`` of the same form that judges before and after; null: the Unicode database for the world,
    else the reward."""
    arguments: dict[str, Any] = {}
    """Of TRL's own config class (DPOConfig, KTOConfig, GRPOConfig, RLOOConfig), beside what the sections here say."""
    lora: LoRAConfig | None = None
    """Learn adapters beside the frozen policy; null: all of it."""
    optim: Optim = Optim()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    track: TrackConfig = TrackConfig()

    @property
    def rolls_out(self) -> bool:
        """Does it learn from a reward of its own answers, or from given answers?"""
        return self.trainer in ("grpo", "rloo")

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if self.reward is not None and not self.rolls_out:
            raise ValueError(f"reward is what grpo and rloo learn from; {self.trainer} learns from preferences")
        if self.data.label is not None and (self.trainer != "kto" or self.data.source == "world"):
            raise ValueError("data.label is for trainer: kto with data.source: files")
        if self.data.margin is not None:
            raise ValueError("data.margin: TRL's losses know no margins of records; align.reward's does")
        return self


# ------------------------------------------------------------------------------------------------- what TRL is told


def check_arguments(config: Config) -> None:
    """Refuse arguments that TRL's config class does not have, that are ours, or that are of another type.

    Raises:
        InputError: names the argument, and where it is said instead or the nearest one.
    """
    import trl
    from transformers import TrainingArguments

    cls = getattr(trl, f"{TRAINERS[config.trainer]}Config")
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    free = sorted({field.name for field in dataclasses.fields(cls)} - common - NOT_ASKED - set(OURS))
    types = typing.get_type_hints(cls)
    for name, value in config.arguments.items():
        if name in OURS:
            raise InputError(f"arguments.{name}: say it as {OURS[name]}; TRL is told by fledge")
        if name not in free:
            why = "is left to fledge" if name in common | NOT_ASKED else f"is no argument of {cls.__name__}"
            raise InputError(f"arguments.{name} {why}{nearest(name, free)}; it takes {', '.join(free)}")
        try:
            TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]["msg"]
            raise InputError(f"arguments.{name}: {value!r} does not fit {cls.__name__}: {wrong}") from None


def share(config: Config) -> tuple[int, int]:
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


def told(config: Config, folder: Path) -> Any:
    """TRL's config, without the number of steps. It saves, reports and schedules nothing by itself.

    Raises:
        InputError: TRL refuses a value, or values that do not go together.
    """
    import trl

    rows, pieces = share(config)
    cls = getattr(trl, f"{TRAINERS[config.trainer]}Config")
    lengths = {} if config.rolls_out else {"max_length": None}  # cut already
    try:
        return cls(
            **config.arguments,
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


# -------------------------------------------------------------------------------------------------------------- data


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is learned from: rows of token ids for TRL, and what is known of them."""

    columns: dict[str, list]
    records: list[dict]
    counts: dict[str, Any]
    report: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def pairs_of(data: Preferences) -> Examples:
    """DPO's columns: prompt_ids, and chosen_ids and rejected_ids behind them; of a ranking all pairs but the ties."""
    columns: dict[str, list] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    records = []
    for prompt, answers, ranks, record in zip(data.prompts, data.answers, data.ranks, data.records, strict=True):
        for (better, chosen), (worse, rejected) in itertools.permutations(zip(ranks, answers, strict=True), 2):
            if better < worse:
                for name, ids in zip(columns, (prompt, chosen, rejected), strict=True):
                    columns[name].append(ids)
                records.append(record)
    return Examples(columns, records, {"pairs": len(records), "skipped": data.skipped}, data.report())


def both_sides(pairs: Examples) -> Examples:
    """KTO's columns from pairs: every answer by itself, with its label."""
    c = pairs.columns
    columns = {
        "prompt_ids": [ids for ids in c["prompt_ids"] for _ in range(2)],
        "completion_ids": [ids for both in zip(c["chosen_ids"], c["rejected_ids"], strict=True) for ids in both],
        "label": [True, False] * len(pairs),
    }
    return dataclasses.replace(pairs, columns=columns, records=[r for r in pairs.records for _ in range(2)])


def labelled(config: Data, tokens: Any, split: Split) -> Examples:
    """KTO's columns from answers that are labelled one by one.

    Raises:
        InputError: a label is not true or false.
    """
    same = {name: getattr(config, name) for name in ChatsConfig.model_fields if hasattr(config, name)}
    data = Chats(ChatsConfig.model_validate(same), tokens, split)
    prompts, answers, labels = [], [], []
    for record, first, end in zip(data.records, data.offsets, data.offsets[1:], strict=False):
        label = record.get(config.label)
        if not isinstance(label, bool):
            raise InputError(f"data.label: {config.label} is {label!r} in {record}; expected true or false")
        ids, scored = data.tokens[first:end].tolist(), data.scored[first:end]
        start = int(np.flatnonzero(~scored)[-1]) + 1  # of the last answer
        prompts.append(ids[:start])
        answers.append(ids[start:])
        labels.append(label)
    columns = {"prompt_ids": prompts, "completion_ids": answers, "label": labels}
    counts = {"answers": len(labels), "desirable": sum(labels), "skipped": data.skipped}
    return Examples(columns, data.records, counts, data.report())


def given_answers(config: Config, tokens: Any, split: Split) -> Examples:
    """The rows of dpo or kto."""
    if config.data.label is not None:
        return labelled(config.data, tokens, split)
    pairs = pairs_of(Preferences(config.data, tokens, split))
    return pairs if config.trainer == "dpo" else both_sides(pairs)


def prompts_of(config: Config, tokens: Any, split: Split, room: int) -> Prompts:
    """Prompts of at most ``room`` tokens."""
    data = config.data.model_copy(update={"max_length": min(config.data.max_length, room)})
    if config.rolls_out or data.source == "world" or data.label is not None:
        return read_prompts(data, tokens, split)  # type: ignore[arg-type]  # it has all fields of a PromptsConfig
    return preferences.prompts(data, tokens, split)


def with_kl_answers(columns: dict[str, list], rows: int) -> dict[str, list]:
    """KTO's KL is estimated on answers to other prompts: those of each micro-batch, moved on by one.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.1; TRL rotates the same way.
    """
    answers = columns["completion_ids"]
    moved = [answers[i - 1] if i % rows else answers[min(i + rows, len(answers)) - 1] for i in range(len(answers))]
    return columns | {"KL_completion_ids": moved}


def as_dataset(config: Config, examples: Examples) -> Any:
    """A Dataset of TRL's columns, in an order of the seed's (KTO's loop keeps the order that it finds)."""
    from datasets import Dataset

    order = Permutation(len(examples), "data", config.seed)
    columns = {name: [column[order[i]] for i in range(len(order))] for name, column in examples.columns.items()}
    if config.trainer == "kto" and config.arguments.get("loss_type", "kto") == "kto":
        columns = with_kl_answers(columns, share(config)[0])
    return Dataset.from_dict(columns)


def laid_out(prompts: list[list[int]], answers: list[list[int]], pad_id: int) -> Batch:
    """Prompts padded on the left, answers on the right: input_ids, attention_mask (B, P + T), response_mask (B, T)."""
    left, left_mask = chats.pad(prompts, pad_id, "left")
    right, right_mask = chats.pad(answers, pad_id, "right")
    return {
        "input_ids": torch.cat([left, right], dim=1),
        "attention_mask": torch.cat([left_mask, right_mask], dim=1),
        "response_mask": right_mask,
    }


# ------------------------------------------------------------------------------------------------------------ training


def build_scorer(config: Config, parents: dict[str, Artifact]) -> Scorer | None:
    """The reward: a function, or the parent reward model; None: there is neither.

    Raises:
        InputError: grpo or rloo have nothing to learn from.
    """
    if config.reward is None and "reward" not in parents:
        if config.rolls_out:
            raise InputError(
                f"{config.trainer} needs a reward: parents.reward (a reward-model), or reward: module:function"
            )
        return None
    if "reward" in parents:
        artifact.same_tokenizer(parents["policy"], parents["reward"])
    return scorers.build(config.reward, None, None, parents, config.train.precision, config.train.micro_batch)


def reward_function(scorer: Scorer, prompts: Prompts, pad_id: int) -> Callable[..., list[float]]:
    """A scorer in the form that TRL calls; ``row`` is our own column."""

    def reward(completions: list[str], completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        batch = laid_out([prompts.ids[i] for i in row], completion_ids, pad_id)
        return scorer([prompts.records[i] for i in row], completions, batch).tolist()

    return reward


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no warnings of what TRL calls by names that transformers is about to change."""
    with language.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def trainer_class(name: Name, ids: dict[str, list[int]]) -> Any:
    """TRL's trainer, but for its own tokenising, and for telling Hugging Face that it is used.

    ``ids`` are those of each prompt that is rolled out.
    """
    import trl

    class Trainer(getattr(trl, f"{TRAINERS[name]}Trainer")):
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


def reporter(run: Run, progress: Any, config: Config) -> Any:
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
                raise RunError(
                    f"{run.name}: step {step}: the loss is {self.values['loss']}. TRL's loop cannot go back; nothing "
                    "was handed over. A lower optim.lr, a longer optim.warmup or precision: fp32 usually helps"
                )

    return Reporter()


def build_trainer(
    config: Config, args: Any, policy: Any, tokens: Any, dataset: Any, ids: dict[str, list[int]], reward: Any
) -> Any:
    """TRL's trainer around ``policy``, and around an adapter in it with ``lora``.

    Raises:
        InputError: TRL refuses the arguments, or the environment asks for FSDP or DeepSpeed.
    """
    rewards = {"reward_funcs": reward} if config.rolls_out else {}
    lora = adapters.in_peft(policy, config.lora) if config.lora is not None else None
    try:
        with quiet():
            trainer = trainer_class(config.trainer, ids)(
                policy, args=args, train_dataset=dataset, processing_class=tokens, peft_config=lora, **rewards
            )
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"TRL's {TRAINERS[config.trainer]}Trainer refuses this: {error}") from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError("align.trl keeps whole parameters on each rank; unset ACCELERATE_USE_… in the environment")
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            pass_positions(model)
    return trainer


def train(config: Config, trainer: Any, run: Run, steps: int, steps_per_epoch: int) -> Any:
    """Take the steps with our AdamW and our schedule; TRL's model then: the policy, or a PeftModel around it."""
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
    return trainer.accelerator.unwrap_model(trainer.model)


# ---------------------------------------------------------------------------------------------------------- evaluation


def implicit_rewards(
    policy: nn.Module, reference: nn.Module, prompts: list[list[int]], answers: list[list[int]], config: Config
) -> Tensor:
    """log π(answer) - log π_ref(answer), (B,): DPO's reward (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290,
    section 5) but for its factor beta, which no comparison needs."""
    rows = laid_out(prompts, answers, 0)  # which id pads says nothing: masks are explicit

    def logprobs_of(model: nn.Module) -> Tensor:
        def summed(piece: Batch) -> Tensor:
            return response_logprobs(model, piece).sum(dim=1)

        return in_pieces(summed, rows, config.train.precision, config.train.micro_batch or 64)

    return logprobs_of(policy) - logprobs_of(reference)


def held_out(config: Config, tokens: Any) -> Examples:
    """Pairs, or labelled answers, for dpo and kto to be measured on."""
    split = config.evaluation.split
    if config.data.label is not None:
        return labelled(config.data, tokens, split)
    return pairs_of(Preferences(config.data, tokens, split))


def agreement(policy: nn.Module, reference: nn.Module, found: Examples, config: Config) -> Score:
    """How often the implicit reward of held-out answers agrees with people. At first it is 0 for all; a tie is half."""
    order = Permutation(len(found), "evaluation")
    chosen = [order[i] for i in range(min(len(order), config.evaluation.pairs))]
    columns = {name: [column[i] for i in chosen] for name, column in found.columns.items()}

    def rewards(answers: str) -> Tensor:
        return implicit_rewards(policy, reference, columns["prompt_ids"], columns[answers], config)

    if config.data.label is None:
        margin, unit = rewards("chosen_ids") - rewards("rejected_ids"), "pairs"
    else:
        margin, unit = rewards("completion_ids") * (2 * torch.tensor(columns["label"]).float() - 1), "labelled answers"
    right = ((margin > 0) + 0.5 * (margin == 0)).numpy()
    records = [found.records[i] for i in chosen]
    known = all("codepoint" in record for record in records)
    clusters = np.array([record["codepoint"] for record in records]) if known else np.arange(len(records))
    low, high = bootstrap(right, clusters)
    return Score(
        metric=f"implicit reward's accuracy on {unit}", after=float(right.mean()), before=0.5, low=low, high=high,
        n=len(np.unique(clusters)), unit="characters" if known else unit, note=f"{len(records)} {unit}",
    )  # fmt: skip


def build_judge(config: Config, scorer: Scorer | None) -> judge.Judge | None:
    """What scores held-out answers; None: nothing is there that could."""
    if config.judge is None and config.data.source != "world" and scorer is None:
        return None
    found = judge.build(config.judge, config.data, scorer)  # type: ignore[arg-type]  # None is not looked at then
    return found if config.rolls_out else found._replace(unseen=True)


# --------------------------------------------------------------------------------------------------------------- stage


def examples_of(config: Config, tokens: Any, prompts: Prompts | None) -> Examples:
    """The training data in TRL's columns."""
    if prompts is None:
        return given_answers(config, tokens, "train")
    texts = [chats.prompt_text(tokens, record["prompt"], config.data.template) for record in prompts.records]
    counts = {"prompts": len(prompts), "skipped": prompts.skipped}
    return Examples({"prompt": texts, "row": list(range(len(texts)))}, prompts.records, counts, prompts.report())


def steps_of_epoch(config: Config, args: Any, examples: Examples) -> int:
    """Steps in which everything was learned from once.

    Raises:
        InputError: the data does not fill one batch.
    """
    rows = len(examples) * (args.num_generations * args.num_iterations if config.rolls_out else 1)
    if rows < config.train.batch:
        raise InputError(
            f"the train data gives {rows} rows, but train.batch is {config.train.batch}; {examples.report}"
        )
    return rows // config.train.batch


def finished(model: Any, parent: Artifact, lora: bool) -> Any:
    """What was learned in a model of its own, free of what TRL put into the one that it trained."""
    learned = adapters.merged(model.get_base_model()) if lora else model
    policy = language.read(parent)
    policy.load_state_dict(learned.state_dict())
    return policy.to(distributed.device())


def main(config: Config) -> Artifact:
    """Let TRL train, measure held-out pairs and answers before and after, and hand the policy over."""
    import trl

    device = distributed.setup(config.train.device)
    check_arguments(config)
    share(config)
    parents = artifact.open_parents(config)
    scorer = build_scorer(config, parents)
    referee = build_judge(config, scorer)
    with Run.open(config, parents) as run, distributed.lent("bf16" if config.train.precision == "bf16" else "no"):
        run.truncate(0)  # what an interrupted run left begins anew
        tokens, policy = language.read_tokenizer(parents["policy"]), language.read(parents["policy"])
        args = told(config, run.dir)
        check_lengths(config, args, policy)
        prompts = prompts_of(config, tokens, "train", config.data.max_length) if config.rolls_out else None
        examples = examples_of(config, tokens, prompts)
        run.say(examples.report)
        asked = questions(config, tokens, policy) if referee is not None else None
        compared = held_out(config, tokens) if prompts is None else None
        per_epoch = steps_of_epoch(config, args, examples)
        steps = resolve(config.train.steps, per_epoch)
        ids, reward = {}, None
        if prompts is not None and scorer is not None:
            ids = dict(zip(examples.columns["prompt"], prompts.ids, strict=True))
            reward = reward_function(scorer, prompts, prompts.pad_id)
        own = language.read_tokenizer(parents["policy"])  # TRL gives it a padding token where it has none
        trainer = build_trainer(config, args, policy, own, as_dataset(config, examples), ids, reward)
        model = train(config, trainer, run, steps, per_epoch)
        policy = finished(model, parents["policy"], config.lora is not None)

        reference, scores, kl = language.read(parents["policy"]).to(device), [], {}
        if compared is not None:
            scores.append(agreement(policy, reference, compared, config))
        if referee is not None and asked is not None:
            judged, table, kl["kl"] = judge.compare(referee, reference, policy, asked)
            scores += judged
            run.samples("answers", table, "Held-out prompts, answered before and after")

        def save(folder: Path) -> None:
            language.save(policy, tokens, folder)
            if config.lora is not None:
                adapters.save(model.get_base_model(), folder / adapters.FOLDER)

        return run.publish(
            WRITES,
            save,
            scores,
            architecture={"name": type(policy).__name__, "parameters": language.size(policy)},
            preprocessing={**parents["policy"].preprocessing, "template": config.data.template},
            data={"fingerprint": config.data.fingerprint(), "trl": trl.__version__, **examples.counts},
            step=steps,
            **kl,
        )


def check_lengths(config: Config, args: Any, policy: Any) -> None:
    """Refuse prompts and answers that the policy has no positions for."""
    language.check_length(policy, config.evaluation.max_new_tokens + 2, "a prompt + evaluation.max_new_tokens")
    if not config.rolls_out:
        language.check_length(policy, config.data.max_length, "data.max_length")
        return
    longest = config.data.max_length + args.max_completion_length
    language.check_length(policy, longest, "data.max_length + arguments.max_completion_length")


def questions(config: Config, tokens: Any, policy: Any) -> judge.Questions:
    """Held-out prompts that leave room for an answer, and how both policies are asked them."""
    asked = config.evaluation
    room = language.positions(policy.config) - asked.max_new_tokens
    return judge.Questions(
        prompts=prompts_of(config, tokens, asked.split, room),
        tokenizer=tokens,
        most=asked.prompts,
        seed=config.seed,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        greedy=asked.greedy,
        precision=config.train.precision,
        rows=config.train.micro_batch or 128,
    )


if __name__ == "__main__":
    from fledge.cli import stage_main

    raise SystemExit(stage_main(Config, main))
