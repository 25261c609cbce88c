"""SHA-256 of what runs read, so that a run knows its inputs again, and of tensors, so that a changed file of weights is noticed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from mmlg_scale.errors import UserError, is_of_the_machine
from mmlg_scale.reading import open_regular

if TYPE_CHECKING:
    from torch import Tensor

_FEW_BYTES = 2**20
"""Below this, threads take longer to start than to hash."""
SEAL_FILE = "mmlg.json"
"""SHA-256 of an export's other files. open_clip does not look at it, and a folder without it is read all the same."""
_OF_A_MODEL = (".json", ".safetensors", ".bin", ".pt", ".pth", ".txt")


def file_digest(path: Path, what: str) -> str:
    """SHA-256 of a file, or over the names and contents of the model files in a folder; `what` names it where it is not there.

    An export's list of digests is no part of its model. Unchanged files are read once per process.

    Raises:
        UserError: nothing is there, or it cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in _OF_A_MODEL and file.name != SEAL_FILE and file.is_file())
            lines = "".join(f"{file.name} {_digest(file, *_stamp(file))}\n" for file in files)
            return hashlib.sha256(lines.encode()).hexdigest()
        return _digest(path, *_stamp(path))
    except OSError as error:
        if is_of_the_machine(error):
            raise
        raise UserError(f"{what}: {path} cannot be read ({error.strerror}). Correct the path.") from error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    return content_digest(path)


def content_digest(path: Path) -> str:
    """SHA-256 of a regular file's bytes. Raises OSError where it cannot be read."""
    found = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, type, shape and bytes of dense tensors, in the order of their names.

    Each is hashed where it lies, several at a time: hashlib lets other threads run.
    """
    names = sorted(tensors)
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) < _FEW_BYTES:
        found = [_tensor_digest(tensors[name]) for name in names]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(_tensor_digest, (tensors[name] for name in names)))
    lines = [[name, str(tensors[name].dtype), list(tensors[name].shape), digest] for name, digest in zip(names, found, strict=True)]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    import torch

    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()
