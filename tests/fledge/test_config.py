"""Configs: what is accepted, and that every fault is found at once, with its place and a way out."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from fledge import config
from fledge.config import Config, DataConfig, Duration, StageConfig, bookkeeping, hardware, load, parent, parse
from fledge.errors import InputError


class World(DataConfig):
    source: Literal["world"]
    fonts: int = 3


class Folder(DataConfig):
    source: Literal["folder"]
    path: str = hardware()
    size: int = 32


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = None


class Parents(Config):
    encoder: str | None = parent("vision-encoder", required=True)
    init: str | None = parent("vision-encoder", "text-encoder", required=False)


class Stage(StageConfig):
    stage: Literal["pretrain.fake"] = "pretrain.fake"
    parents: Parents = Parents()
    data: Annotated[World | Folder, Field(discriminator="source")]
    optim: Optim = Optim()
    steps: Duration = "3 epochs"
    mode: Literal["auto", "off"] = "auto"
    workers: int = hardware(0)
    every: int = bookkeeping(1)
    where: Path = Path("here")

    @model_validator(mode="after")
    def _odd(self):
        if self.steps == 7:
            raise ValueError("steps 7 does not go with mode")
        return self


GOOD = {"data": {"source": "world"}, "parents": {"encoder": "runs/mae/artifact"}}


def fails(source, *overrides) -> list[str]:
    """The lines of the error."""
    with pytest.raises(InputError) as caught:
        load(Stage, source, overrides)
    return [line.strip() for line in str(caught.value).splitlines()][1:]


def write(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------ YAML


def test_scalars_are_read_as_in_yaml_1_2():
    text = (
        "[off, yes, 1e-3, 1_000, 0x1F, 007, 1:30, 2024-01-01, ~, 'true', .5, 1., -1e5, +3, true, 1e+2, '3', \"\", -0]"
    )
    assert parse(text, "f").data == [
        "off", "yes", 1e-3, 1000, 31, "007", "1:30", "2024-01-01", None, "true", 0.5, 1.0, -1e5, 3, True, 100.0, "3",
        "", 0,
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["1e-3", "1E5", ".5", "5.", "1.5e3", "-.2", "12", "-7", "0"])
def test_numbers_agree_with_python(text):
    value = parse(f"a: {text}", "f").data["a"]
    assert value == float(text) and isinstance(value, int) == text.lstrip("-").isdigit()


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 7)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    "text, says",
    [
        ("a: 1\nb: 2\na: 3", "f:3  a  duplicate key, first at f:1"),
        ("a: {b: 1,\n b: 2}", "f:2  a.b  duplicate key, first at f:1"),
        ("x: 1\na: !!python/object:os.system x", "f:2: not valid YAML: the tag"),
        ("a: !x 3", "the tag !x is not allowed"),
        ("<<: {a: 1}", "merge keys"),
        ("a: [1", "f:1: not valid YAML"),
        ("a: &a [*a]", "too much after aliases"),
        (BOMB, "too much after aliases"),
        ("a: &a 1\nb: [" + "*a," * 65 + "]", "more than 64 aliases"),
        ("a: " + "[" * 40 + "]" * 40, "levels deep"),
        ("[" * 100_000, "levels deep"),
        ("a: b: c", "f:1: not valid YAML"),
        ("a: 1\n---\nb: 2", "another document"),
        ("? [1]\n: 2", "a key must be plain text"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_bad_yaml(text, says):
    with pytest.raises(InputError, match=".*") as caught:
        parse(text, "f")
    assert says in str(caught.value)


def test_aliases_within_measure_are_fine():
    assert parse("a: &a [1, 2]\nb: *a", "f").data == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "raw, says",
    [
        (b"", "empty"),
        (b"- 1\n", "expected keys and values"),
        (b"a: 1\nb: \xff", ":2: not UTF-8"),
        (b"#" * (1 << 21), "larger"),
    ],
)
def test_bad_files(tmp_path, raw, says):
    path = tmp_path / "a.yaml"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=says):
        config.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nope.yaml: cannot be read: No such file"):
        config.read(tmp_path / "nope.yaml")


# ------------------------------------------------------------------------------------------------ errors


def test_all_errors_at_once_with_line_key_expectation_and_nearest_key(tmp_path):
    path = write(
        tmp_path,
        """stage: pretrain.fake
data:
  source: folder
  pathh: 3
  size: "3"
optim:
  lrr: 1e-3
  lr: "0.1"
  betas: [0.9, x]
clip: 3
mode: of
steps: 3.5
seed: true
every: null
""",
    )
    assert fails(path, "optim.clip=abc") == [
        f"{path}:2  data.path  required, but missing, expected text",
        f"{path}:4  data.pathh  unknown key; did you mean path (text)?",
        f'{path}:5  data.size  found "3" (text) (in quotes it is text), expected a whole number',
        f"{path}:7  optim.lrr  unknown key; did you mean lr (a number)?",
        f'{path}:8  optim.lr  found "0.1" (text) (in quotes it is text), expected a number',
        f'{path}:9  optim.betas[1]  found "x" (text), expected a number',
        f"{path}:10  clip  unknown key here; did you mean optim.clip?",
        f"{path}:11  mode  found \"of\" (text), expected one of 'auto' or 'off'; did you mean off?",
        f"{path}:12  steps  found 3.5 (number), expected a whole number or text",
        f"{path}:13  seed  found true (true/false), expected a whole number",
        f"{path}:14  every  found nothing (null), expected a whole number",
        'override optim.clip=abc  optim.clip  found "abc" (text), expected a number',
        f"{path}:1  parents.encoder  required, expected the path of an artifact of kind vision-encoder",
    ]


@pytest.mark.parametrize(
    "change, says",
    [
        (
            {"data": {"source": "wrld"}},
            "data  source: 'wrld' is not known, expected one of world, folder; did you mean world?",
        ),
        ({"data": {"fonts": 1}}, "data  the key 'source' is missing, expected source: one of world, folder"),
        ({"data": 3}, "data  found 3 (whole number), expected a section (keys and values)"),
        ({"data": {"source": "world", "font": 1}}, "data.font  unknown key; did you mean fonts (a whole number)?"),
        ({"steps": 7}, "(whole file)  steps 7 does not go with mode"),
        ({"steps": "3 eons"}, 'steps  expected a number of steps, or a text such as "800 epochs"'),
        ({"optim": {"lr": -1.0}}, "optim.lr  found -1.0 (number), expected greater than 0"),
        ({"optim": {"betas": [0.1]}}, "optim.betas[1]  required, but missing"),
        ({"stage": "pretrain.mae"}, "stage  found \"pretrain.mae\" (text), expected one of 'pretrain.fake'"),
        ({"name": "../x"}, "name  found"),
        ({"parents": {"encoder": 3}}, "parents.encoder  found 3 (whole number), expected text"),
        ({"optim": {"lr": float("inf")}}, "optim.lr  found inf (number), expected a finite number"),
    ],
)
def test_one_error(change, says):
    (line,) = fails(GOOD | change)
    assert line.startswith("config  " + says)


@pytest.mark.parametrize(
    "text, says",
    [
        ("foo", "override 'foo': expected section.key=value"),
        ("a..b=1", "expected section.key=value"),
        ("optim.lr=[1", "override optim.lr=[1: the value is not valid YAML"),
        ("seed.x=1", "seed is no section"),
        ("optim=3", "found 3 (whole number), expected a section"),
    ],
)
def test_bad_overrides(text, says):
    assert any(says in line for line in fails(GOOD | {"seed": 1}, text))


# ------------------------------------------------------------------------------------------------ values


def test_overrides_win_and_merge():
    made = load(Stage, GOOD, ["optim.lr=1", "mode=off", "data={source: folder, path: x}", "optim.betas=[0, 1e-2]"])
    assert made.optim == Optim(lr=1.0, betas=(0.0, 0.01)) and made.mode == "off"
    assert made.data == Folder(source="folder", path="x")
    assert load(Stage, GOOD, ["seed=1", "seed=2"]).seed == 2


def test_a_mapping_merges_but_another_source_replaces():
    tree = config.Tree({"data": {"source": "folder", "path": "x", "size": 3}}, "f")
    tree.put(("data",), {"size": 4}, "set")
    assert tree.data["data"] == {"source": "folder", "path": "x", "size": 4}
    tree.put(("data",), {"source": "world"}, "set")
    assert tree.data["data"] == {"source": "world"}


def test_configs_are_frozen_and_unaliased():
    made = load(Stage, GOOD)
    with pytest.raises(ValueError):
        made.seed = 1
    assert GOOD == {"data": {"source": "world"}, "parents": {"encoder": "runs/mae/artifact"}}


def test_dump_reads_back_also_where_text_looks_like_something_else(tmp_path):
    for text in ("1e-3", "off", "null", "007", "1:30", "x: y", "", "  a", "é", "0x1F", "true", "- a"):
        made = load(Stage, GOOD | {"data": {"source": "folder", "path": text}})
        again = load(Stage, write(tmp_path, config.dump(made)))
        assert again == made
        assert yaml.safe_load(config.dump(made))["data"]["path"] == text  # and other readers see text too


def test_science_leaves_out_hardware_bookkeeping_and_parents():
    made = load(Stage, GOOD | {"data": {"source": "folder", "path": "x"}})
    assert config.science(made) == {
        "stage": "pretrain.fake",
        "seed": 0,
        "data": {"source": "folder", "size": 32},
        "optim": {"lr": 0.001, "betas": [0.9, 0.95], "clip": None},
        "steps": "3 epochs",
        "mode": "auto",
        "where": "here",
    }
    other = load(Stage, GOOD | {"data": {"source": "folder", "path": "y"}}, ["workers=3", "out=z", "name=n", "every=9"])
    assert config.science(other) == config.science(made)
    assert config.science(load(Stage, GOOD, ["optim.lr=1"])) == config.science(load(Stage, GOOD, ["optim.lr=1.0"]))


def test_durations():
    assert config.resolve(12, 5) == 12
    assert config.resolve("3 epochs", 5) == 15
    assert config.resolve("0.5 epochs", 5) == 2
    assert config.resolve("1 epoch", 5) == 5
    assert config.resolve("7 steps", 5) == 7
    with pytest.raises(InputError):
        config.resolve("soon", 5)


def test_roles_and_sections():
    made = load(Stage, GOOD)
    assert config.roles(Stage) == {
        "encoder": (("vision-encoder",), True),
        "init": (("vision-encoder", "text-encoder"), False),
    }
    assert config.data_sections(made) == {"data": World(source="world")}
    assert made.run_dir == Path("runs/fake")


def test_the_schema_describes_the_fields():
    schema = config.json_schema(Stage)
    assert schema["$defs"]["Optim"]["properties"]["lr"]["description"] == "Peak learning rate."
    assert schema["additionalProperties"] is False
    assert schema["properties"]["workers"][config.MARK] == config.HARDWARE


def test_data_paths(monkeypatch):
    monkeypatch.setenv("FLEDGE_DATA", "/data")
    assert config.data_path("$FLEDGE_DATA/x") == Path("/data/x")
    monkeypatch.delenv("FLEDGE_DATA")
    with pytest.raises(InputError, match="FLEDGE_DATA is not set"):
        config.data_path("${FLEDGE_DATA}/x")
