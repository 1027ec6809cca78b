"""Small files that readers may open at any time: metrics.jsonl, one record a line, and JSON that is replaced whole."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fledge.errors import InputError


def encode(step: int, values: Mapping[str, Any]) -> str:
    """One line of metrics.jsonl. JSON knows no NaN: such a value becomes null and is named under "nonfinite"."""
    record: dict[str, Any] = {"step": int(step)}
    odd: dict[str, str] = {}
    for key, value in values.items():
        number = int(value) if isinstance(value, int) else float(value)
        finite = math.isfinite(number)
        record[key] = number if finite else None
        if not finite:
            odd[key] = repr(number)
    if odd:
        record["nonfinite"] = odd
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order. A last line torn by a kill is left out."""
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole records and how many bytes they take; what follows those bytes is torn."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    records: list[dict[str, Any]] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path}:{number}: expected a JSON object with a step, found {line[:60]!r}; the file was changed from "
                "outside. Remove that line, or start the run in another folder."
            ) from None
        records.append(record)
    return records, whole


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a kill, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """What `write_json` wrote, or `default` where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
