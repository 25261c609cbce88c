"""SHA-256 of what runs read, so that a run knows its inputs again."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from mmlg_scale.errors import UserError

_OF_A_MODEL = (".json", ".safetensors", ".bin", ".pt", ".pth", ".txt")


def file_digest(path: Path, what: str) -> str:
    """SHA-256 of a file, or over the names and contents of the model files in a folder; `what` names it where it is not there.

    Unchanged files are read once per process.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _OF_A_MODEL and file.is_file())
            lines = "".join(f"{file.name} {_digest(file, *_stamp(file))}\n" for file in files)
            return hashlib.sha256(lines.encode()).hexdigest()
        return _digest(path, *_stamp(path))
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}). Correct the path.") from error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
