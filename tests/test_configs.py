"""What is shipped in configs/: complete files, defaults that are the published recipes, and a reason for each departure.

That every file loads is tested in tests/fledge/test_architecture.py.
"""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fledge import config as configs
from fledge import recipe
from fledge.config import SCIENCE, DataConfig, mark

ROOT = Path(__file__).parents[1]
STAGES = [path for path in sorted((ROOT / "configs").glob("*/*.yaml")) if path.parent.name != "recipes"]
WORLD = [path for path in STAGES if path.stem.endswith("_world")]
PUBLISHED = [path for path in STAGES if path not in WORLD]
each = pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)

# Fields of a data section that say nothing about the world, which knows its own; and those that speak of nothing else.
OF_FILES = {"resize_to", "max_pixels", "holdout", "image_field", "caption_field", "join", "where", "split_on", "field"}
OF_FILES |= {"validation_fraction", "test_fraction", "split_field", "prompt", "messages", "completion"}
OF_FILES |= {"chosen", "rejected"}
OF_WORLD = {"kinds", "fonts"}


def opened(path: Path) -> tuple[configs.Tree, BaseModel]:
    """A stage's file as it stands, and its config, parents being given on the command line."""
    tree = configs.read(path)
    cls = recipe.import_stage(tree.data["stage"], "").Config
    required = [f"parents.{name}=somewhere" for name, role in configs.roles(cls).items() if role.required]
    return tree, configs.load(cls, path, required)


def stated(section: BaseModel) -> dict[str, FieldInfo]:
    """The fields of a section that its file must state: the science that its source has a use for."""
    fields = {name: info for name, info in type(section).model_fields.items() if mark(info) == SCIENCE}
    unused = set()
    if isinstance(section, DataConfig) and hasattr(section, "source"):
        unused = OF_FILES if section.source == "world" else OF_WORLD
    unused |= {"parents", "track"}  # given on the command line; pure bookkeeping
    return {name: info for name, info in fields.items() if name not in unused}


def missing(section: BaseModel, written: Any, key: tuple = ()) -> list[str]:
    """Dotted keys that the file leaves to a default."""
    found = []
    for name in stated(section):
        value = getattr(section, name)
        if name not in (written or {}):
            found.append(configs.dotted((*key, name)))
        elif isinstance(value, BaseModel):
            found += missing(value, written[name], (*key, name))
    return found


@each
def test_a_stages_file_is_complete(path):
    tree, config = opened(path)
    assert not missing(config, tree.data)


@each
def test_the_head_says_command_hardware_and_what_to_expect(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert f"configs/{path.parent.name}/{path.name}" in text and "Hardware:" in text and "Expected:" in text
    assert path in WORLD or "Not run by us at this size" in text.replace("\n# ", " ")


# ------------------------------------------------------------------------------------------------ departures


COVERED = {"data", "model", "train", "evaluation", "decoder", "tokenizer", "image_model", "text_model"}
"""Sections of sizes: one comment at their first line says why all of them are what they are."""


def departures(section: BaseModel, defaults: Any, key: tuple = ()) -> list[tuple]:
    """Keys whose value is not the class default; of a section that the class does not give, the section's own defaults."""
    found = []
    for name, info in stated(section).items():
        value = getattr(section, name)
        default = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            found += departures(value, default if type(default) is type(value) else None, (*key, name))
        elif value != default:
            found.append((*key, name))
    return found


def explained(tree: configs.Tree, key: tuple, lines: list[str]) -> bool:
    """Is there a comment on the key's line or on the line above, or on the first line of its section of sizes?"""
    keys = [key] + ([key[:1]] if key[0] in COVERED else [])
    numbers = [int(tree.place(one).rpartition(":")[2]) for one in keys]
    return any("#" in lines[n - 1] or lines[n - 2].lstrip().startswith("#") for n in numbers)


@each
def test_each_departure_from_the_published_recipe_has_its_reason_beside_it(path):
    tree, config = opened(path)
    lines = path.read_text().splitlines()
    silent = [key for key in departures(config, None) if not explained(tree, key, lines)]
    assert not [configs.dotted(key) for key in silent if key not in [("stage",), ("seed",)]]
