"""Typed configs: YAML plus dotted overrides, strict, with every error at once. Knows no stage and imports no torch.

    text --compose--> nodes with line marks --> Tree: plain data and the place of every key --pydantic--> Config

Three kinds of field, told apart by a mark (the default is science):
    science        changes the result; another value is another run
    hardware       changes how the result is computed, not the result (micro-batch, workers, device, paths)
    bookkeeping    names, tracking, cadence of logging and saving
"""

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from fledge.errors import InputError

MAX_BYTES = 1 << 20  # a config is written by hand; more is a mistake or an attack
MAX_DEPTH = 32
MAX_ALIASES = 64
MAX_NODES = 50_000  # after aliases are expanded

MARK = "x-fledge"  # the key of our marks in a field's JSON schema
SCIENCE, HARDWARE, BOOKKEEPING, PARENT = "science", "hardware", "bookkeeping", "parent"


# ------------------------------------------------------------------------------------------------ the typed models


class Config(BaseModel):
    """Base of every section: unknown keys and wrong types are errors, values are frozen, docstrings describe fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
    )

    def also_science(self) -> set[str]:
        """Fields whose mark says hardware or bookkeeping, but which decide the result as this config stands."""
        return set()


def hardware(default: Any = ..., **kw: Any) -> Any:
    """A field that changes how the result is computed, but not the result."""
    return Field(default, json_schema_extra={MARK: HARDWARE}, **kw)


def bookkeeping(default: Any = ..., **kw: Any) -> Any:
    """A field of names, tracking and cadence: it touches no number of the run."""
    return Field(default, json_schema_extra={MARK: BOOKKEEPING}, **kw)


def parent(*kinds: str, required: bool) -> Any:
    """A field that holds the path of a parent artifact; `load` asks for it where it is required."""
    return Field(None, json_schema_extra={MARK: PARENT, "kinds": list(kinds), "required": required})


def mark(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return str(extra.get(MARK, SCIENCE)) if isinstance(extra, dict) else SCIENCE


class Role(NamedTuple):
    """What a stage says about one of its parents."""

    kinds: tuple[str, ...]
    required: bool


def roles(cls: type[BaseModel]) -> dict[str, Role]:
    """The parents that a stage's Config declares: {role: (kinds, required)}."""
    info = cls.model_fields.get("parents")
    section = _model(info.annotation) if info else None
    found = {}
    for name, child in section.model_fields.items() if section else ():
        extra = child.json_schema_extra
        if isinstance(extra, dict) and extra.get(MARK) == PARENT:
            found[name] = Role(tuple(extra["kinds"]), bool(extra["required"]))  # type: ignore[arg-type]
    return found


_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(epochs?|steps?)")


def _check_duration(value: int | str) -> int | str:
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, str) and _DURATION.fullmatch(value):
        return value
    raise ValueError('expected a number of steps, or a text such as "800 epochs"')


Duration = Annotated[int | str, AfterValidator(_check_duration)]
"""A number of steps, or a text such as "800 epochs"."""


def resolve(duration: int | str, steps_per_epoch: int) -> int:
    """The number of steps of a duration."""
    if isinstance(duration, int):
        return duration
    found = _DURATION.fullmatch(duration)
    if not found:
        raise InputError(f'{duration!r} is no duration; expected a number of steps, or a text such as "800 epochs"')
    return round(float(found[1]) * (steps_per_epoch if found[2].startswith("epoch") else 1))


class DataConfig(Config):
    """Base of every data section."""

    def fingerprint(self) -> str:
        """A digest of what the data holds; where it lies does not matter."""
        raise NotImplementedError(f"{type(self).__name__} has no fingerprint")

    def check(self) -> None:
        """Raise InputError at once where the data is missing or unreadable; cheap, run before any stage starts."""


class StageConfig(Config):
    """Base of every stage's Config."""

    stage: str
    """The module of the stage, such as pretrain.mae."""
    name: str = bookkeeping("", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Name of the run; by default the last part of the stage."""
    out: str = hardware("runs")
    """Folder of runs; this run is written to OUT/NAME."""
    seed: int = Field(0, ge=0)
    """Everything random in the run follows from it."""

    @property
    def run_name(self) -> str:
        return self.name or self.stage.rpartition(".")[2]

    @property
    def run_dir(self) -> Path:
        return Path(self.out) / self.run_name


def data_path(path: str) -> Path:
    """The place of a data path: `~` and environment variables ($FLEDGE_DATA/photos) are filled in."""
    filled = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)", filled)
    if unset:
        raise InputError(f"{path}: the environment variable {unset[1]} is not set; set it to the folder of your data")
    return Path(filled)


# ------------------------------------------------------------------------------------------------ YAML with places

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")

Key = tuple[str | int, ...]
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it becomes a folder


class _Loader(yaml.SafeLoader):
    """Composes nodes only, constructs nothing. Scalars are read as in YAML 1.2: `off` is text, `1e-3` a number."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # every plain scalar stays text here; `_scalar` reads it

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = self.aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MAX_ALIASES:
                raise yaml.MarkedYAMLError(
                    problem=f"more than {MAX_ALIASES} aliases (*name)", problem_mark=self.peek_event().start_mark
                )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or our own reader would take for something else than text."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
        return super().increase_indent(flow, False)


for _pattern in (_INT, _FLOAT):
    _Dumper.add_implicit_resolver("tag:fledge:number", re.compile(f"(?:{_pattern.pattern})$"), list("-+.0123456789"))


@dataclass
class Tree:
    """Plain data, and for every key the place where it was written ("file:line" or "override a.b=1")."""

    data: Any
    origin: str
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """The place of a key, or of its nearest ancestor."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.origin)

    def get(self, key: Key) -> Any:
        value = self.data
        for part in key:
            value = value[part]
        return value

    def child(self, key: Key) -> "Tree":
        """The tree below a key."""
        below = {place[len(key) :]: text for place, text in self.places.items() if place[: len(key)] == key}
        return Tree(self.get(key), self.place(key), below)

    def put(self, key: Key, value: Any, place: str, places: dict[Key, str] | None = None) -> None:
        """Set a value. A mapping is merged key by key; one with another `source` replaces what stood there."""
        section = self.data
        for i, part in enumerate(key[:-1]):
            if section.get(part) is None:
                section[part] = {}
                self.places[key[: i + 1]] = place
            section = section[part]
            if not isinstance(section, dict):
                self.problems.append(f"{place}  {dotted(key)}  {dotted(key[: i + 1])} is no section, it has no keys")
                return
        old = section.get(key[-1])
        merges = isinstance(value, dict) and isinstance(old, dict)
        if isinstance(value, dict) and isinstance(old, dict):
            merges = value.get("source", old.get("source")) == old.get("source")
        if not merges:
            self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
            section[key[-1]] = {} if isinstance(value, dict) else value
        self.places[key] = place
        for name, item in value.items() if isinstance(value, dict) else ():
            self.put((*key, name), item, (places or {}).get((*key, name), place), places)
        if not isinstance(value, dict):
            self.places |= {k: p for k, p in (places or {}).items() if k[: len(key)] == key}


def dotted(key: Sequence[str | int]) -> str:
    """("optim", "betas", 0) -> "optim.betas[0]"."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read(path: str | Path) -> Tree:
    """The tree of a YAML file."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; expected a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES:,} bytes; expected a config written by hand")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; expected a YAML file") from None
    tree = parse(text, str(path))
    if tree.data is None:
        raise InputError(f"{path}: empty; expected a YAML file with `stage:` or `stages:`")
    if not isinstance(tree.data, dict):
        raise InputError(f"{path}:1: expected keys and values (`key: value`), found {found(tree.data)}")
    return tree


def parse(text: str, origin: str) -> Tree:
    """The tree of a YAML text; `origin` names it in messages (a line number is put behind it)."""
    tree = Tree(None, f"{origin}:1")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        tree.data = _plain(node, origin, (), tree, [0]) if node is not None else None
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        where = f"{origin}:{at.line + 1}" if at else origin
        raise InputError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree.problems:
        raise InputError("\n".join(tree.problems))
    return tree


def _plain(node: yaml.Node, origin: str, key: Key, tree: Tree, seen: list[int]) -> Any:
    """Plain data of a node; notes the place of every key, and duplicate keys as problems."""
    seen[0] += 1
    if seen[0] > MAX_NODES or len(key) > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem="too much after aliases (*name) are expanded", problem_mark=node.start_mark)
    where = f"{origin}:{node.start_mark.line + 1}"
    tree.places.setdefault(key, where)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, origin, (*key, i), tree, seen) for i, item in enumerate(node.value)]
    data: dict[str, Any] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=name_node.start_mark)
        name, line = name_node.value, f"{origin}:{name_node.start_mark.line + 1}"
        if name == "<<" and name_node.style is None:
            raise yaml.MarkedYAMLError(problem="merge keys (<<) are not allowed", problem_mark=name_node.start_mark)
        if name in data:
            tree.problems.append(f"{line}  {dotted((*key, name))}  duplicate key, first at {tree.place((*key, name))}")
            continue
        tree.places[(*key, name)] = line
        data[name] = _plain(value_node, origin, (*key, name), tree, seen)
    return data


def _scalar(node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.tag not in ("tag:yaml.org,2002:str", "!"):
        raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not allowed", problem_mark=node.start_mark)
    if node.style is not None or node.tag == "!":
        return text  # quoted: text as it stands
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text) and len(text) < 4000:
        return int(text.replace("_", ""))
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
    return text


def override(tree: Tree, text: str, place: str = "") -> None:
    """Apply `section.key=value` to a tree; the value is YAML. `place` names it in messages."""
    name, equals, value = text.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"override {text!r}: expected section.key=value, for example optim.lr=1e-3")
    place = place or f"override {text}"
    place = place if len(place) <= 90 else place[:87] + "..."
    if len(text) > MAX_BYTES:
        raise InputError(f"{place}: larger than {MAX_BYTES:,} bytes")
    try:
        parsed = parse(value, place).data
    except InputError as error:
        raise InputError(f"{place}: the value is not valid YAML ({str(error).partition(': ')[2] or error})") from None
    key: Key = tuple(parts)
    if isinstance(parsed, dict):
        tree.put(key, None, place)  # `data={source: folder, path: x}` replaces the whole section
    tree.put(key, parsed, place)


# ------------------------------------------------------------------------------------------------ load

C = TypeVar("C", bound=BaseModel)


def load(cls: type[C], source: Path | str | dict | Tree, overrides: Sequence[str] = ()) -> C:
    """A validated config of a YAML file (or plain data, or a tree), with overrides; all errors in one InputError."""
    if isinstance(source, Tree):
        tree = source
    elif isinstance(source, dict):
        tree = Tree(json.loads(json.dumps(source)), "config")
    else:
        tree = read(source)
    problems = []
    for text in overrides:
        try:
            override(tree, text)
        except InputError as error:
            problems.append(str(error))
    problems += tree.problems
    config = None
    try:
        # JSON mode: strict about numbers and text, yet a list may become a tuple and a text a path.
        config = cls.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as error:
        problems += _explain(cls, tree, error)
    problems += _absent_parents(cls, tree)
    if problems or config is None:
        count = f"{len(problems)} errors" if len(problems) != 1 else "1 error"
        raise InputError(f"{count} in the config\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def _absent_parents(cls: type[BaseModel], tree: Tree) -> list[str]:
    given = tree.data.get("parents") or {}
    return [
        f"{tree.place(('parents',))}  parents.{role}  required, expected the path of an artifact of kind "
        + " or ".join(kinds)
        for role, (kinds, required) in roles(cls).items()
        if required and isinstance(given, dict) and given.get(role) is None
    ]


def _explain(cls: type[BaseModel], tree: Tree, error: ValidationError) -> list[str]:
    """One line for each error: place, key, what was wrong, what was expected, the nearest valid key."""
    lines: dict[Key, tuple[str, list[str]]] = {}
    for item in error.errors(include_url=False):
        key, section = _locate(cls, item["loc"])
        what, expected = _what(item, key, section, cls)
        expectations = lines.setdefault(key, (what, []))[1]
        if expected and expected not in expectations:
            expectations.append(expected)  # a union reports once for each of its members
    return [
        f"{tree.place(key)}  {dotted(key) or '(whole file)'}  {what}"
        + (f", expected {' or '.join(want)}" if want else "")
        for key, (what, want) in sorted(lines.items(), key=lambda line: _line_number(tree.place(line[0])))
    ]


def _line_number(place: str) -> int:
    number = place.rpartition(":")[2]
    return int(number) if number.isdigit() else MAX_BYTES  # overrides after the file


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (keys and values)",
    "model_type": "a section (keys and values)",
    "model_attributes_type": "a section (keys and values)",
    "none_required": "null",
    "path_type": "a path",
}


def _what(item: Any, key: Key, section: Any, cls: type[BaseModel]) -> tuple[str, str]:
    """(what was wrong, what was expected) of one pydantic error."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + _nearest_key(str(key[-1]), key[:-1], section, cls), ""
    if kind == "missing":
        info = _fields(section).get(key[-1]) if key else None
        return "required, but missing", describe(info.annotation) if info else ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = str(context["discriminator"]).strip("'")
        tags = _tags(section, name)
        if kind == "union_tag_not_found":
            return f"the key {name!r} is missing", f"{name}: one of " + ", ".join(tags)
        tag = str(context["tag"])
        return f"{name}: {tag!r} is not known", "one of " + ", ".join(tags) + nearest(tag, tags)
    if kind == "literal_error" or kind == "enum":
        options = re.findall(r"'([^']*)'", str(context["expected"]))
        return f"found {found(value)}", f"one of {context['expected']}" + nearest(value, options)
    if kind == "value_error":
        return str(context["error"]), ""
    if kind in _EXPECTED:
        hint = ""
        if isinstance(value, str) and kind.partition("_")[0] in ("int", "float", "bool"):
            hint = " (in quotes it is text)" if re.fullmatch(r"[-+.\d_eE]+|true|false", value) else ""
        return f"found {found(value)}{hint}", _EXPECTED[kind]
    message = item["msg"].removeprefix("Input should ").removeprefix("Value error, ")
    return f"found {found(value)}", message.removeprefix("be ")


def found(value: Any) -> str:
    """What was found, in words: the value and its type."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a section with the keys " + ", ".join(map(str, list(value)[:6])) if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    name = {bool: "true/false", int: "whole number", float: "number", str: "text"}.get(
        type(value), type(value).__name__
    )
    shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)
    return f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({name})"


def nearest(word: Any, options: Sequence[str]) -> str:
    """A hint at the option that was probably meant; empty if none is near."""
    near = difflib.get_close_matches(str(word), options, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _nearest_key(name: str, path: Key, section: Any, cls: type[BaseModel]) -> str:
    fields = _fields(section)
    near = difflib.get_close_matches(name, list(fields), 1, 0.6)
    if near:
        return f"; did you mean {near[0]} ({describe(fields[near[0]].annotation)})?"
    everywhere = [key for key, _ in walk(cls)]
    same = [dotted(key) for key in everywhere if key[-1] == name]
    if same:
        return f" here; did you mean {same[0]}?"
    where = dotted(path) or "the file"
    loose = difflib.get_close_matches(name, list(fields), 1, 0.4)
    if loose:
        return f"; did you mean {loose[0]} ({describe(fields[loose[0]].annotation)})?"
    return f"; valid keys of {where}: " + ", ".join(fields) if fields else ""


# ------------------------------------------------------------------------------------------------ types


def _strip(annotation: Any) -> Any:
    """Without Annotated, and without `| None`."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    members = _members(annotation)
    return _strip(members[0]) if len(members) == 1 and members[0] is not annotation else annotation


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a union without None; of any other type, itself."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    return [annotation]


def _model(annotation: Any) -> type[BaseModel] | None:
    annotation = _strip(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _fields(section: Any) -> dict[Any, FieldInfo]:
    model = _model(section)
    return dict(model.model_fields) if model else {}


def _tags(annotation: Any, name: str) -> list[str]:
    """The values of the discriminator `name` over the members of a union."""
    models = [model for member in _members(_strip(annotation)) if (model := _model(member))]
    return [str(tag) for model in models for tag in typing.get_args(_strip(model.model_fields[name].annotation))]


def _locate(cls: type[BaseModel], loc: Sequence[str | int]) -> tuple[Key, Any]:
    """(key in the file, type of the section that holds it) of a pydantic location, which names union members as well.

    For an error at a union itself the type is the union.
    """
    key: list[str | int] = []
    holder: Any = cls
    current: Any = cls
    for part in loc:
        members = _members(_strip(current))
        if len(members) > 1:  # this part names the member, by its tag or by its type
            current = next((member for member in members if _answers(member, str(part))), None)
            holder = current
            continue
        holder = current
        current = _step(_strip(current), part)
        key.append(part)
    return tuple(key), current if len(_members(_strip(current))) > 1 else holder


def _answers(member: Any, label: str) -> bool:
    model = _model(member)
    if model is None:
        return getattr(_strip(member), "__name__", "") == label
    literals = [typing.get_args(_strip(info.annotation)) for info in model.model_fields.values()]
    return label == model.__name__ or any(label in map(str, values) for values in literals)


def _step(annotation: Any, part: str | int) -> Any:
    """The type below a key or an index."""
    if model := _model(annotation):
        info = model.model_fields.get(str(part))
        return info.annotation if info else None
    args: tuple[Any, ...] = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is dict:
        return args[1]
    if origin is tuple and isinstance(part, int) and ... not in args:
        return args[part] if part < len(args) else None
    return args[0] if args and origin in (list, tuple, set, frozenset) else None


def describe(annotation: Any) -> str:
    """A type in words."""
    members = _members(annotation)
    if len(members) > 1:
        return " or ".join(dict.fromkeys(describe(member) for member in members))
    annotation = _strip(annotation)
    origin: Any = typing.get_origin(annotation)
    args: list[Any] = list(typing.get_args(annotation))
    if origin is Literal:
        return "one of " + ", ".join(map(str, args)) if len(args) > 1 else str(args[0])
    if origin in (list, tuple):
        return "a list"
    if origin is dict:
        return "a mapping"
    if _model(annotation):
        return "a section"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def walk(cls: type[BaseModel], prefix: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Every field of a config class with its key, sections after their own field."""
    for name, info in cls.model_fields.items():
        yield (*prefix, name), info
        for member in _members(_strip(info.annotation)):
            if model := _model(member):
                yield from walk(model, (*prefix, name))


# ------------------------------------------------------------------------------------------------ out again


def dump(config: BaseModel) -> str:
    """The config as YAML that `load` reads back."""
    return to_yaml(config.model_dump(mode="json"))


def to_yaml(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def science(config: BaseModel) -> dict[str, Any]:
    """What the result follows from: plain data without hardware, bookkeeping and the paths of parents."""
    more = config.also_science() if isinstance(config, Config) else set()
    return {
        name: _science(getattr(config, name))
        for name, info in type(config).model_fields.items()
        if (mark(info) == SCIENCE or name in more) and name != "parents"
    }


def _science(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return science(value)
    if isinstance(value, dict):
        return {str(key): _science(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_science(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_science(item) for item in value), key=repr)
    return str(value) if isinstance(value, Path) else value


def departures(config: BaseModel) -> dict[str, dict[str, Any]]:
    """Every dotted key whose value is not its class default: {"value": v, "default": d}, plain data; without a default
    where the class leaves it open. Parents, names, tracking and cadence are left out."""
    return {dotted(key): found for key, found in _departures(config, None, ())}


def _departures(section: BaseModel, defaults: Any, prefix: Key) -> Iterator[tuple[Key, dict[str, Any]]]:
    for name, info in type(section).model_fields.items():
        if mark(info) == BOOKKEEPING or not prefix and name in ("stage", "out", "parents"):
            continue
        value = getattr(section, name)
        default = getattr(defaults, name) if defaults is not None else info.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            yield from _departures(value, default if type(default) is type(value) else None, (*prefix, name))
        elif value != default:
            known = {} if default is PydanticUndefined else {"default": to_jsonable_python(default)}
            yield (*prefix, name), {"value": to_jsonable_python(value), **known}


def data_sections(config: BaseModel, prefix: Key = ()) -> dict[str, DataConfig]:
    """Every data section of a config by its dotted key."""
    sections: dict[str, DataConfig] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, DataConfig):
            sections[dotted((*prefix, name))] = value
        elif isinstance(value, BaseModel):
            sections |= data_sections(value, (*prefix, name))
    return sections


def json_schema(cls: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a stage's YAML, with which editors complete and check it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | cls.model_json_schema()
