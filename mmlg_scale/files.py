"""Writing files so that a kill at any instant leaves either the old file or the new one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from mmlg_scale.errors import UserError


def write_bytes_atomic(path: Path, payload: bytes) -> None:
    """Write `payload` to a temporary file beside `path`, flush it to disk, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_bytes_atomic` for JSON; NaN and infinity are refused because they are not JSON."""
    write_text_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError when fewer than `needed` bytes are free in `folder`, before anything of `what` is written."""
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder}: {what} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free. Free some, or write --out to another disk."
        )
