"""Raise models from raw pixels and raw text to an aligned model: one lineage of checkpoints, one loop, one command.

    fledge.run("demo")
    fledge.artifact.open("runs/demo/ppo/artifact")

Nothing heavy is imported until it is used.
"""

from typing import TYPE_CHECKING, Any

from fledge.errors import InputError, RunError

if TYPE_CHECKING:
    from pathlib import Path

    from fledge import artifact
    from fledge.artifact import Artifact

__all__ = ["InputError", "RunError", "__version__", "artifact", "run"]
__version__ = "0.1.0"


def run(
    file: "str | Path", *overrides: str, out: "str | Path | None" = None, only: str | None = None, fresh: bool = False
) -> "dict[str, Artifact]":
    """Run a recipe or one stage, as `fledge run` does.

    Args:
        file: a YAML file, or the bare name of a shipped recipe.
        overrides: `name.section.key=value`, or `section.key=value` for one stage.
        out: folder of runs.
        only: run just this stage of a recipe.
        fresh: run anew also what is finished; the earlier runs are moved aside.

    Returns:
        The artifact of each stage by its name.

    Raises:
        InputError: the input is wrong; the message says what, where, and what to do.
        RunError: a run could not go on.
    """
    from fledge import recipe

    return recipe.run(file, overrides, out, only, fresh)


def __getattr__(name: str) -> Any:
    if name == "artifact":
        import fledge.artifact

        return fledge.artifact
    raise AttributeError(f"module 'fledge' has no attribute {name!r}")
