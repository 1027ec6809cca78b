"""Folders that are whole: written aside, flushed, hashed, renamed. Checkpoints and artifacts are both such folders.

A whole folder has a `manifest.json` that was written last. It holds a format number, the sha256 and size of every other
file, and a seal: the sha256 of the manifest itself without the seal. So one changed byte anywhere in the folder shows.
Hashes give integrity, not authenticity: whoever can write the folder can also write a manifest that fits.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fledge.errors import InputError

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 64 * 2**20  # bytes; a larger one is not ours
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")  # reading one can run code


class Broken(Exception):
    """A whole folder is no longer whole; the message names the file and what is wrong with it."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short(digest: str) -> str:
    return digest[:12]


def canonical(value: Any) -> str:
    """The one way this value is written: stable over Python versions, so that it can be hashed and compared."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def table_digest(files: dict[str, dict]) -> str:
    """The content id of a folder: sha256 over its sorted file table; place and time do not count."""
    lines = [f"{files[name]['sha256']}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write, flush, fsync: an fsync without the flush would leave Python's own buffer out."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def aside(path: Path, purpose: str) -> Path:
    """A fresh name beside `path`: `.tmp-` being written, `.del-` being removed, `.bad-` kept as evidence."""
    return path.parent / f".{purpose}-{path.name}-{uuid.uuid4().hex[:8]}"


def seal(manifest: dict) -> dict:
    """The manifest with its own sha256 in it."""
    bare = {key: value for key, value in manifest.items() if key != "seal"}
    return {**bare, "seal": hashlib.sha256(canonical(bare).encode()).hexdigest()}


def entry(path: Path) -> dict[str, Any]:
    """Force a file to the disk; its line in the table of a manifest."""
    sync(path)
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, manifest: dict, known: Mapping[str, dict] | None = None) -> dict:
    """Close a folder: fsync what is in it, hash it, write the manifest last. Returns the manifest as written.

    Args:
        known: files that whoever wrote them has fsynced and hashed, and their lines in the table.
    """
    known = known or {}
    files = {name: known[name] if name in known else entry(folder / name) for name in members(folder)}
    manifest = seal({**manifest, "files": files, "digest": table_digest(files)})
    write_text(folder / MANIFEST, canonical(manifest))
    for below in [path for path in folder.rglob("*") if path.is_dir()]:
        sync(below)
    sync(folder)
    return manifest


def move(source: Path, target: Path) -> None:
    """Rename within one folder, durably."""
    os.rename(source, target)
    sync(target.parent)


def remove(path: Path) -> None:
    """Remove a folder so that a half-removed one can never be taken for a whole one."""
    gone = aside(path, "del")
    move(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path, name: str = "") -> None:
    """Remove what a killed process left behind (of the one folder `name`, or of all)."""
    for purpose in ("tmp", "del"):
        for path in root.glob(f".{purpose}-{name + '-' if name else ''}*"):
            shutil.rmtree(path, ignore_errors=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def plain(name: str) -> bool:
    """Is this a plain relative name inside the folder: nothing absolute, no `..`, no backslash, nothing invisible?"""
    pure = PurePosixPath(name)
    inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts
    return inside and str(pure) == name and name.isprintable() and "\\" not in name and ":" not in name


def members(folder: Path) -> list[str]:
    """Names of all files below the folder but the manifest; links and other odd things are listed too, not followed."""
    names = []
    for here, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        names += [Path(here, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(name for name in names if name != MANIFEST)


def read_manifest(folder: Path, number: int | tuple[int, ...], what: str) -> dict:
    """Read and check the manifest alone. InputError for another format number, Broken for anything else."""
    numbers = (number,) if isinstance(number, int) else number
    path = folder / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > MANIFEST_LIMIT:
            raise Broken(f"{MANIFEST} is not a plain file of reasonable size")
        text = path.read_bytes().decode()
        manifest = json.loads(text)
    except FileNotFoundError:
        raise Broken(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise Broken(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Broken(f"{MANIFEST} was changed after it was written (it is not JSON any more)") from None
    if isinstance(manifest, dict) and type(manifest.get("format")) is int and manifest["format"] not in numbers:
        raise InputError(
            f"{what} {folder} has format {manifest['format']}; this version of fledge reads "
            f"format {' or '.join(map(str, numbers))}. "
            "Use the version of fledge that wrote it, or write it again with this one"
        )
    if not isinstance(manifest, dict) or "format" not in manifest or text != _resealed(manifest):
        raise Broken(f"{MANIFEST} was changed after it was written (its seal does not fit)")
    return manifest


def _resealed(manifest: dict) -> str | None:
    with contextlib.suppress(ValueError):  # NaN, which we never write
        return canonical(seal(manifest))
    return None


def faults(folder: Path, manifest: dict) -> list[str]:
    """What differs between the folder and its manifest, one sentence a file, every file named. Empty when whole."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_entry(entry) for entry in files.values()):
        return [f"{MANIFEST} has no readable table of files"]
    odd = [name for name in files if not plain(name)]
    if odd:  # looked at before any of these names is used as a path
        return [f"{MANIFEST} names {name!r}, which is not a plain name inside the folder" for name in sorted(odd)]
    there = members(folder)
    found = [f"{name} is missing" for name in sorted(set(files) - set(there))]
    found += [f"{name} does not belong here (not in {MANIFEST})" for name in there if name not in files]
    found += [sentence for name in there if name in files for sentence in _file_fault(folder / name, name, files[name])]
    if not found and manifest.get("digest") != table_digest(files):
        found = [f"{MANIFEST} has a digest that does not follow from its table of files"]
    return found or stray_shards(folder, there)


def stray_shards(folder: Path, names: list[str]) -> list[str]:
    """Indexes of shards that lead out of the folder or to another format; `names` are the files of the folder.

    Loaders follow an index wherever it leads, and unpickle what has no name in .safetensors.
    """
    found = []
    for index in (name for name in names if name.endswith(".index.json")):
        try:
            shards = set(json.loads((folder / index).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.append(f"{index} is no readable index of shards")
            continue
        beside = PurePosixPath(index).parent
        odd = [one for one in shards if not (isinstance(one, str) and one.endswith(".safetensors") and plain(one))]
        odd += [one for one in shards.difference(odd) if str(beside / one) not in names]
        found += [
            f"{index} names {one!r}, which is no .safetensors file of the folder" for one in sorted(odd, key=repr)
        ]
    return found


def _entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int


def _file_fault(path: Path, name: str, entry: dict) -> Iterable[str]:
    if path.is_symlink() or not path.is_file():
        return [f"{name} is a link or no plain file"]
    if name.lower().endswith(PICKLES):
        return [f"{name} may hold pickled code, which is never read; weights are kept as .safetensors"]
    size = path.stat().st_size
    if size != entry["bytes"]:
        return [f"{name} was changed after it was written ({size} bytes, expected {entry['bytes']})"]
    try:
        digest = sha256(path)
    except OSError as error:
        return [f"{name} cannot be read ({error.strerror})"]
    if digest != entry["sha256"]:
        changed = f"sha256 {short(digest)}… expected {short(entry['sha256'])}…"
        return [f"{name} was changed after it was written ({changed})"]
    return []
