"""Reading what users bring: text, JSON lines and parquet, with errors that name the place; splits; the cache.

Digests are of contents and never of paths, so that a moved folder is the same data.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fledge.config import data_path
from fledge.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def cache_folder(name: str) -> Path:
    """A folder for what can be made again: $FLEDGE_CACHE/name, by default ~/.cache/fledge/name."""
    root = os.environ.get("FLEDGE_CACHE") or Path.home() / ".cache" / "fledge"
    folder = Path(root) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the cache folder {folder} ({error.strerror}); set FLEDGE_CACHE to a writable folder"
        ) from error
    return folder


def unit(key: str) -> float:
    """A key as a number in [0, 1), evenly spread (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") / 2**64


def in_portion(key: str, portion: tuple[float, float]) -> bool:
    """Does a training prompt belong to the portion [low, high)? Independent of the split."""
    return portion[0] <= unit(f"portion {key}") < portion[1]


def split_of(key: str, validation: float, test: float) -> Split:
    """The split of a document or prompt by a hash of it: equal keys never stand on both sides."""
    u = unit(key)
    return "validation" if u < validation else "test" if u < validation + test else "train"


def inputs(config: Any, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files behind ``path``, ``validation_path`` and ``test_path``, of those that are set, by split."""
    paths = {"train": "path", "validation": "validation_path", "test": "test_path"}
    named = {split: (getattr(config, field), f"data.{field}") for split, field in paths.items()}
    return {split: files_of(path, suffixes, what) for split, (path, what) in named.items() if path is not None}


def files_of(path: str | Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The file itself, the files of a pattern (``text/*.txt``), or a folder's files with one of the suffixes; in the
    order of their relative names."""
    path = data_path(str(path))
    if any(letter in path.name for letter in "*?["):
        matching = sorted(f for f in path.parent.glob(path.name) if f.is_file() and f.name.endswith(suffixes))
        if not matching:
            raise InputError(f"{what}: no file matches {path}; give its place relative to where you start")
        return matching
    if path.is_file():
        if not path.name.endswith(suffixes):
            raise InputError(f"{what}: {path} should end in one of {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        raise InputError(f"{what}: there is no file or folder {path}; give its place relative to where you start")
    found = (f for f in path.rglob("*") if f.is_file() and f.name.endswith(suffixes))
    files = sorted(found, key=lambda f: f.relative_to(path).as_posix())
    if not files:
        raise InputError(f"{what}: the folder {path} holds no file that ends in {', '.join(suffixes)}")
    return files


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Of a file's bytes; remembered within the process while size and time stay the same."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


def digest(parts: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_text(path: Path) -> str:
    """A UTF-8 file, line ends as LF, without a byte order mark.

    Raises:
        InputError: not UTF-8, or binary: names the file and the offset of the first offending byte.
    """
    data = _read(path)
    zero = data.find(b"\0")
    if zero >= 0:
        raise InputError(f"{path}: a zero byte at offset {zero}, so this is no text file; give UTF-8 text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason}); "
            "convert the file to UTF-8 first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error


RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """("file:line", record) of a JSON lines file (also .gz), or ("file:row", record) of a parquet file."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{number}: not a line of JSON ({error.msg}, column {error.colno}); expected one object a line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f"{path}:{number}: expected a JSON object with named fields, found {type(record).__name__}"
            )
        yield f"{path}:{number}", record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's own errors share no base class
        raise InputError(f"{path}: not a readable parquet file ({error})") from error
    for number, record in enumerate(rows):
        yield f"{path}:{number}", record


def look_up(record: dict, name: str, where: str) -> Any:
    """A field by its name, also inside: ``instances.0.output``; of several (``output|instances.0.output``) the first
    that the record has, so that files of different layouts can stand in one folder.

    Raises:
        InputError: there is none; names the place and the fields that there are.
    """
    for way in name.split("|"):
        found, value = _inside(record, way.split("."))
        if found:
            return value
    fields = ", ".join(sorted(record)) or "none"
    raise InputError(f"{where}: no field {name!r}; the record has: {fields}. Name the fields in the data section")


def _inside(value: Any, parts: list[str]) -> tuple[bool, Any]:
    """(True, what stands at the end of the way), or (False, None) where the way ends early."""
    for part in parts:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return True, value


def join_fields(record: dict, names: Iterable[str], where: str, separator: str = "\n") -> str:
    """The texts of some fields one below the other; an empty one adds nothing."""
    texts = [look_up(record, name, where) for name in names]
    for name, text in zip(names, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise InputError(f"{where}: field {name!r} should be a text, found {type(text).__name__}")
    return separator.join(text for text in texts if text)
