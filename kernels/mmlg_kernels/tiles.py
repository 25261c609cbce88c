"""Sizes of tiles per kernel: fixed ones, or those that `mmlg_kernels.tuning` has measured on this GPU and keeps in a small table.

Nothing is measured while training runs: a table is only ever read, so that the same table gives the same bits on every run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

_log = logging.getLogger("mmlg_kernels")
_forced: dict[str, Tile] = {}


@dataclass(frozen=True)
class Tile:
    """Sizes of a tile of logits and of the steps along the features, and how a program is run."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


INTERPRETED = Tile(32, 32, 32, 4, 1)
# By the bytes of a number. Forward passes keep running sums beside the logits: at 128 columns registers would spill on sm_80 and sm_100.
# Distillation's programs hold the similarities of two models.
DEFAULTS = {
    "softmax_forward": {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "softmax_forward_ranks": {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
    "softmax_gradient": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "sigmoid_forward": {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "sigmoid_gradient": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "distillation_forward": {2: Tile(64, 64, 64, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
    "distillation_gradient": {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
}


def tile_for(kernel: str, dtype: torch.dtype) -> Tile:
    """The tile that a kernel of `DEFAULTS` is launched with for features of a dtype."""
    if kernel in _forced:
        return _forced[kernel]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETED
    default = DEFAULTS[kernel][dtype.itemsize]
    if not torch.cuda.is_available():
        return default
    return read_table(table_path(torch.cuda.get_device_name())).get(key_of(kernel, dtype), default)


@contextmanager
def forced(kernel: str, tile: Tile) -> Iterator[None]:
    """Launch a kernel with this tile, whatever table there is."""
    _forced[kernel] = tile
    try:
        yield
    finally:
        del _forced[kernel]


def key_of(kernel: str, dtype: torch.dtype) -> str:
    """The key of a table's entry."""
    return f"{kernel} {str(dtype).removeprefix('torch.')}"


def table_path(gpu: str) -> Path:
    """Where a GPU's table lies: under MMLG_TILES, or else in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmlg_kernels"
    return Path(os.environ.get("MMLG_TILES") or cache) / f"tiles-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


@functools.cache
def read_table(path: Path) -> dict[str, Tile]:
    """A table's tiles, read once; none without one. A table of another Triton or that cannot be read is left unused, with a warning."""
    try:
        content = json.loads(path.read_text())
        tiles = {key: _checked(values) for key, values in content["tiles"].items()}
        version = content["triton"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        _log.warning("%s is not a table of tiles (%s): ignored. `python -m mmlg_kernels.tuning` rewrites it", path, fault)
        return {}
    if version != triton.__version__:
        _log.warning("%s was measured with Triton %s: left unused; `python -m mmlg_kernels.tuning` measures again", path, version)
        return {}
    return tiles


def write_table(path: Path, gpu: str, tiles: dict[str, Tile], milliseconds: dict[str, Any]) -> None:
    """Write a table; whole or not at all."""
    content = {"gpu": gpu, "triton": triton.__version__, "torch": torch.__version__}
    content |= {"tiles": {key: list(astuple(tile)) for key, tile in tiles.items()}, "milliseconds": milliseconds}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
    read_table.cache_clear()


def _checked(values: list[int]) -> Tile:
    # Triton takes powers of two, and dot products from 16 on.
    if not all(isinstance(value, int) and 0 < value <= 1024 for value in values):
        raise ValueError(f"a tile of {values}")
    tile = Tile(*values)
    if any(size < 16 or size & (size - 1) for size in (tile.rows, tile.columns, tile.depth)) or tile.num_warps & (tile.num_warps - 1):
        raise ValueError(f"a tile of {values}")
    return tile
