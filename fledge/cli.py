"""The command line. Everything heavy is imported where it is used, so that help and config errors answer at once.

Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped by SIGTERM or SIGUSR2 and ready to go on,
130 interrupted.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fledge import __version__, launch, preempt
from fledge.errors import InputError, Preempted, RunError
from fledge.redact import redact

KINDS = "vision-encoder, text-encoder, causal-lm, image-classifier, dual-encoder, chat-model, reward-model"
OVERRIDES = "name.section.key=value (of one stage's file: section.key=value); the value is YAML"
SWEEP = "a run for each value; again: for each combination. Comma-separated YAML, for example seed=0,1,2"
RESTARTS = "start again after failures, N times in a row without a newer checkpoint; default 0: never"


def parser() -> argparse.ArgumentParser:
    """The commands of `fledge`."""
    top = argparse.ArgumentParser(
        "fledge", description="Raise models from raw pixels and raw text to an aligned model."
    )
    top.add_argument("--version", action="version", version=f"fledge {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run a recipe or one stage; what is finished is reused")
    _add_file(run)
    run.add_argument("--only", metavar="STAGE", help="run just this stage of a recipe")
    run.add_argument("--fresh", action="store_true", help="run anew; earlier runs are moved aside, never deleted")
    run.add_argument("--set", action="append", metavar="KEY=V,V", help=SWEEP)
    run.add_argument("--jobs", type=_positive, default=1, metavar="N", help="with --set: stages at once; default 1")
    run.set_defaults(work=_run)

    start = commands.add_parser("launch", help="run on several processes or machines, here or by SLURM")
    _add_file(start)
    start.add_argument("--gpus", type=_positive, metavar="N", help="processes on each machine, each with a GPU")
    start.add_argument("--procs", type=_positive, metavar="N", help="processes on each machine; default its GPUs, or 1")
    start.add_argument("--nodes", type=_positive, default=1, metavar="M", help="machines; start it on each of them")
    start.add_argument("--node-rank", type=int, metavar="R", help="this machine, from 0; default $SLURM_NODEID")
    start.add_argument("--rdzv", metavar="HOST:PORT", help="where the machines meet: on the first of them")
    start.add_argument("--rdzv-timeout", type=_positive, default=300, metavar="SECONDS", help="default 300")
    start.add_argument("--max-restarts", type=_natural, default=0, metavar="N", help=RESTARTS)
    start.add_argument("--slurm", action="store_true", help="write a batch file and give it to sbatch")
    start.add_argument("--only", metavar="STAGE", help="just this stage of a recipe, whose parents have finished")
    start.add_argument("--per-stage", action="store_true", help="with --slurm: a job a stage, after its parents'")
    start.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="a further #SBATCH option")
    start.add_argument("--dry-run", action="store_true", help="print the command or the batch file; start nothing")
    start.set_defaults(work=launch.main)

    plan = commands.add_parser("plan", help="say for each stage whether it would run, resume or be reused, and why")
    _add_file(plan)
    plan.add_argument("--set", action="append", metavar="KEY=V,V", help=SWEEP)
    plan.set_defaults(work=_plan)

    dash = commands.add_parser("dash", help="all runs of a folder in the browser, while they go on")
    dash.add_argument(
        "runs", nargs="?", default="runs", metavar="RUNS", help="a folder of runs, also of folders of them"
    )
    dash.add_argument("--port", type=_natural, metavar="N", help="default 8347, or a free one where that is taken")
    dash.set_defaults(work=_dash)

    show = commands.add_parser("show", help="verify an artifact and say what it is and where it came from")
    show.add_argument("dir", metavar="DIR", help="an artifact's folder, or its run's")
    show.set_defaults(work=_show)

    bring = commands.add_parser("import", help="make a timm or transformers folder an artifact")
    bring.add_argument("kind", metavar="KIND", help=KINDS)
    bring.add_argument("source", metavar="SOURCE", help="the folder, or owner/name on the Hugging Face hub")
    bring.add_argument("dir", metavar="DIR", help="the artifact to write")
    bring.add_argument(
        "--pad-token", metavar="TOKEN", help="what pads, for a language model without a padding token of its own"
    )
    bring.set_defaults(work=_import)

    export = commands.add_parser("export", help="write an artifact from a checkpoint of a run, unmeasured")
    export.add_argument("run", metavar="RUN[@STEP]", help="a run's folder; @STEP, or @best, instead of the newest")
    export.add_argument("dir", metavar="DIR", help="the artifact to write")
    export.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="where data and parents lie now, the device")
    export.set_defaults(work=_export)

    generate = commands.add_parser("generate", help="text from a language artifact, or scores of answers")
    generate.add_argument("dir", metavar="DIR", help="an artifact's folder, or its run's")
    generate.add_argument(
        "prompt", nargs="?", help="what to continue or answer; for a text encoder, text with [MASK] in it"
    )
    generate.add_argument(
        "--answer", action="append", default=[], metavar="TEXT", help="an answer that a reward model scores; repeatable"
    )
    generate.add_argument("--chat", action="store_true", help="a conversation with a chat model, here or down a pipe")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T")
    generate.add_argument("--top-k", type=_positive, metavar="K", help="sample among the K most probable tokens only")
    generate.add_argument("--greedy", action="store_true", help="always take the most probable token")
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(work=_generate)

    against = commands.add_parser("compare", help="two chat models side by side, and who wins by a judge")
    for side in ("a", "b"):
        against.add_argument(side, metavar=side.upper(), help="a chat-model's folder, or its run's")
    against.add_argument("--judge", metavar="MODULE:FUNCTION", help="(records, answers) -> scores, or of two answers")
    against.add_argument("--reward", metavar="DIR", help="a reward-model's folder, or its run's, as the judge")
    against.add_argument("--data", default="world", metavar="FILE", help="records, or a YAML of prompts; default world")
    against.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default test")
    against.add_argument("--prompts", type=_positive, default=512, metavar="N", help="at most; default 512")
    against.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    against.add_argument("--temperature", type=float, default=1.0, metavar="T")
    against.add_argument("--greedy", action="store_true", help="always take the most probable token")
    against.add_argument("--seed", type=int, default=0)
    against.add_argument(
        "--out", action="append", default=[], metavar="FILE", help=".html or .json; may be given twice"
    )
    against.set_defaults(work=_compare)
    return top


def _add_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a recipe or a stage's YAML, or a shipped recipe's name (demo)")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    command.add_argument("--out", metavar="DIR", help="folder of runs; default runs/RECIPE, of one stage runs")


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _run(args: argparse.Namespace) -> None:
    from fledge import recipe, sweep

    if not args.set:
        if args.jobs > 1:
            raise InputError("--jobs: the stages of a recipe run one after another; it belongs to --set")
        recipe.run(args.file, args.overrides, args.out, args.only, args.fresh)
    elif args.only is not None:
        raise InputError("--only runs one stage, --set the whole recipe several times; give one of them")
    else:
        sweep.run(sweep.load(args.file, args.set, args.overrides, args.out), args.jobs, args.fresh)


def _plan(args: argparse.Namespace) -> None:
    from fledge import recipe, sweep

    if args.set:
        print(sweep.plan(sweep.load(args.file, args.set, args.overrides, args.out)))
    else:
        print(recipe.plan(args.file, args.overrides, args.out))


def _dash(args: argparse.Namespace) -> None:
    from fledge.dash import server

    server.main(args.runs, args.port)


def _show(args: argparse.Namespace) -> None:
    from fledge import artifact

    print(artifact.describe(artifact.open(artifact_folder(args.dir))))


def _import(args: argparse.Namespace) -> None:
    from fledge.importer import bring_in

    made = bring_in(args.kind, args.source, args.dir, args.pad_token)
    print(f"{made.path}: {made.kind} {made.digest[:12]} from {args.source}")


def _export(args: argparse.Namespace) -> None:
    from fledge.export import export

    made = export(args.run, args.dir, args.overrides)
    print(f"{made.path}: {made.kind} {made.digest[:12]} from step {made.step} of {args.run}")


def _generate(args: argparse.Namespace) -> None:
    settings = {"max_new_tokens": args.max_new_tokens, "temperature": 0.0 if args.greedy else args.temperature}
    settings |= {"top_k": args.top_k, "seed": args.seed}
    if args.chat:
        from fledge import chat

        chat.talk(chat.open_chatter(artifact_folder(args.dir), **settings), args.prompt)
    elif args.prompt is None:
        raise InputError("what should it continue or answer? give a prompt, or --chat for a conversation")
    else:
        from fledge.generate import generate

        print(generate(artifact_folder(args.dir), args.prompt, answers=args.answer, **settings))


def _compare(args: argparse.Namespace) -> None:
    from fledge import recipe, track
    from fledge.report import comparison

    if args.temperature <= 0 and not args.greedy:
        raise InputError(f"--temperature {args.temperature:g}: expected a number above 0, or --greedy")
    if odd := [path for path in args.out if not path.endswith((".html", ".json"))]:
        raise InputError(f"--out {odd[0]}: expected a name that ends in .html or .json")
    found = recipe.import_tool("align.compare").compare(
        artifact_folder(args.a),
        artifact_folder(args.b),
        judge=args.judge,
        reward=args.reward and artifact_folder(args.reward),
        data=args.data,
        split=args.split,
        prompts=args.prompts,
        greedy=args.greedy,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    for path in args.out:
        text = comparison.page(found) if path.endswith(".html") else json.dumps(found, indent=1, ensure_ascii=False)
        track.write_atomic(Path(path), text)
    print(comparison.text(found, shutil.get_terminal_size().columns))


def artifact_folder(folder: str) -> str:
    """Of a run's folder, its artifact."""
    inside = os.path.join(folder, "artifact")
    return inside if os.path.isfile(os.path.join(inside, "manifest.json")) else folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fledge`."""
    args = _parse(parser(), argv)
    work = functools.partial(guarded, lambda: args.work(args), resumable=args.command == "run")
    is_rank = args.command == "run" and launch.LOGS_VARIABLE in os.environ
    return launch.as_rank(work) if is_rank else work()


def _parse(top: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options."""
    args, rest = top.parse_known_args(argv)
    stray = [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]
    if stray:
        top.error(f"unrecognized arguments: {redact(' '.join(stray))}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def stage_main(config: type, main: Callable[[Any], Any], argv: Sequence[str] | None = None) -> int:
    """`python -m pretrain.mae FILE.yaml section.key=value … [--out DIR] [--fresh]`."""
    stage = str(config.model_fields["stage"].get_default())  # type: ignore[attr-defined]
    top = argparse.ArgumentParser(f"python -m {stage}", description=(config.__doc__ or "").partition("\n")[0])
    top.add_argument("file", metavar="FILE", help="the stage's YAML")
    top.add_argument("overrides", nargs="*", metavar="section.key=value", help="the value is YAML")
    top.add_argument("--out", metavar="DIR", help="folder of runs")
    top.add_argument("--fresh", action="store_true", help="run anew; the earlier run is moved aside, never deleted")
    args = _parse(top, argv)

    def work() -> None:
        from fledge import recipe

        recipe.run(args.file, args.overrides, args.out, fresh=args.fresh, module=sys.modules[main.__module__])

    return guarded(work, resumable=True)


def guarded(work: Callable[[], int | None], resumable: bool) -> int:
    """Run `work`; an exit code, and for what the user or the run did wrong a message without a traceback."""
    try:
        with preempt.listening() if resumable else contextlib.nullcontext():
            code = work()
        sys.stdout.flush()
    except InputError as error:
        return _complain(str(error), 2)
    except RunError as error:
        return _complain(str(error), 1)
    except Preempted as stop:
        return _complain(f"{stop}; the same command goes on where it was", Preempted.CODE)
    except RuntimeError as error:
        if not (resumable and preempt.asked()):
            raise
        reason = (str(error).splitlines() or [""])[0]  # the ranks that were asked first have left, and others notice
        return _complain(
            f"stopped by {preempt.asked()} ({reason}); the same command goes on where it was", Preempted.CODE
        )
    except KeyboardInterrupt:
        _complain("interrupted" + ("; the same command goes on where it was" if resumable else ""), 130)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0


def _complain(message: str, code: int) -> int:
    message = redact(message)
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1 else "0"
    group = sys.modules.get("torch.distributed")
    joined = group is not None and group.is_available() and group.is_initialized()
    if rank == "0":
        print(f"fledge: {message}", file=sys.stderr, flush=True)
    elif joined or launch.LOGS_VARIABLE in os.environ:  # else every process finds the same fault, and rank 0 says it
        print(f"fledge (rank {rank}): {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
