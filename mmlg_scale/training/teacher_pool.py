"""The ancestor's outputs for a pool of pairs that training walks through again and again: computed once, kept on disk.

    RUN/teacher-pool/
      layout.json    what a row holds
      run.json       of rows that are kept for the adaptation: what they were computed from
      rows.bin       a row of fixed size for each pair: features of both towers, then the hidden states that are compared

A row is found by the pair's place in the pool, says of which sample, caption and length it is, and has a checksum: one that is missing,
torn by a crash, damaged or of another pair is computed again. What is written is what is compared, rounded to the pool's type already when
it is computed, so that a resumed run, whose rows are there, gets the same numbers. Any rank reads and writes any row: the exchange of
gradients between two steps keeps a rank from asking for a row that another one is about to write.

The rows are removed when the run is complete, unless the recipe's adaptation reuses them. Then run.json beside them says what they are of,
and descendants of the learngene are compared with what is there (`KeptTeacher`): for them the ancestor does not run at all.

Ranks on several nodes share the file over NFS, where a node may not see another one's row yet: then it computes the row again. Rows fill
whole pages, which is what clients write, and every rank flushes what it wrote before the run's result says that the rows are there.

Rows are read and written by offset, not through a memory map: on a full disk writing to a map kills the process, as reading does where the
file has been cut short. The system's page cache serves both.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import TextLength
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, require_space, writing
from mmlg_scale.ranks import on_first_rank
from mmlg_scale.reading import open_regular
from mmlg_scale.records import read_record, write_record
from mmlg_scale.training.folder import IDENTITY_FILE, differences
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.sizes import TOWERS, compared_depths
from mmlg_scale.training.teacher import Autocast, LiveTeacher

FOLDER = "teacher-pool"
_HEADER = np.dtype([("checksum", "<u4"), ("length", "<u4"), ("sample", "<i8"), ("caption", "<i8"), ("place", "<i8")])
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_FORMAT = 2
_PAGE = 4096
REMEDY = "Extract again with adaptation.reuse_teacher_pool, or set that to false: then the ancestor runs for the adaptation too."


@dataclass(frozen=True)
class Layout:
    """What a row holds: for each output its shape, of one pair, in the order in which they lie in it."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: str

    @classmethod
    def of(cls, config: Mapping[str, Any], loss: recipe.DistillationLoss) -> Layout:
        """What `loss` compares of an ancestor of this open_clip configuration."""
        embed_dim, depths = int(config["embed_dim"]), range(len(compared_depths(loss)))
        tokens = {"image": towers.num_patches(config) + 1, "text": towers.context_length(config)}
        shapes: dict[str, tuple[int, ...]] = {f"{tower}_features": (embed_dim,) for tower in TOWERS}
        for tower in TOWERS:
            shapes |= {f"{tower}_hidden.{depth}": (tokens[tower], towers.width(config, tower)) for depth in depths}
        return cls(shapes, loss.teacher_pool_dtype)

    @cached_property
    def row_bytes(self) -> int:
        """Of a pair, with its header, in whole pages: clients of NFS write pages, with what they knew of another node's row in them."""
        numbers = sum(math.prod(shape) for shape in self.shapes.values())
        return -(-(_HEADER.itemsize + numbers * _TYPES[self.dtype].itemsize) // _PAGE) * _PAGE

    def views(self, rows_BR: Tensor) -> dict[str, Tensor]:
        """Each output [B, ...] of rows of bytes, without a copy."""
        numbers_BN = rows_BR[:, _HEADER.itemsize :].view(_TYPES[self.dtype])
        found, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + math.prod(shape)
            found[name] = numbers_BN[:, start:end].unflatten(1, shape)
            start = end
        return found

    def to_json(self, num_rows: int) -> dict[str, Any]:
        """What layout.json says."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"format": _FORMAT, "rows": num_rows, "row_bytes": self.row_bytes, "dtype": self.dtype, "shapes": shapes}


def is_walked_again(loss: recipe.DistillationLoss, training: recipe.Training) -> bool:
    """Whether training meets any pair of the pool twice, so that keeping outputs saves anything."""
    return loss.teacher_pool is not None and loss.teacher_pool < training.steps * training.batch_size


def pool_bytes(config: Mapping[str, Any], loss: recipe.DistillationLoss, training: recipe.Training, *, keeps: bool = False) -> int:
    """What a run's pool takes on disk while it is under way, or after it (`keeps`); 0 where it has none. `config` is the ancestor's."""
    if loss.teacher_pool is None or not (keeps or is_walked_again(loss, training)):
        return 0
    return loss.teacher_pool * Layout.of(config, loss).row_bytes


def require_budgets(settings: recipe.Recipe, config: Mapping[str, Any], budget: int) -> None:
    """`require_budget` for every pool of the recipe, before anything runs."""
    for key, (loss, training) in settings.comparisons().items():
        if key == "adaptation.loss" and settings.reuses_teacher_pool:
            continue
        if pool_bytes(config, loss, training, keeps=settings.keeps_teacher_pool(key)):
            require_budget(Layout.of(config, loss), loss.teacher_pool or 0, budget, key)


def require_budget(layout: Layout, num_rows: int, budget: int, key: str) -> None:
    """Raise UserError where a pool takes more than `budget` bytes; `key` is where its loss is in the recipe."""
    needed = num_rows * layout.row_bytes
    if needed > budget:
        smaller = "" if layout.dtype == "bf16" else ", teacher_pool_dtype bf16"
        raise UserError(
            f"recipe key {key}.teacher_pool: {num_rows:,} pairs take {needed:,} bytes ({layout.row_bytes:,} each), "
            f"runtime.teacher_pool_bytes is {budget:,}. Use a smaller pool{smaller}, or allow more."
        )


class PoolFile:
    """The rows on disk. Made by all ranks together.

    Args:
        kept_as: what the rows are computed from, where they stay on the disk when the run is complete.
        finished: read those that a complete run has kept as `kept_as`; nothing is written.

    Raises:
        UserError: the disk has no room for it, or something that is not a folder or a file of ours is in its place; no such rows were kept.
    """

    def __init__(
        self, run_folder: Path, layout: Layout, num_rows: int, *, kept_as: Mapping[str, Any] | None = None, finished: bool = False
    ) -> None:
        self.folder, self.layout, self.num_rows, self.kept_as = run_folder / FOLDER, layout, num_rows, kept_as
        self.file = self.folder / "rows.bin"
        on_first_rank(self._require_kept if finished else self._prepare)
        access = os.O_RDONLY if finished else os.O_RDWR
        self._opened = os.fdopen(os.open(self.file, access | os.O_NOFOLLOW | os.O_CLOEXEC), "rb" if finished else "r+b", buffering=0)

    def _require_kept(self) -> None:
        """Raise UserError where what is there is not what a complete run has kept as `kept_as`."""
        assert self.kept_as is not None
        differing = differences(self.folder, self.kept_as)
        if differing is None:
            raise UserError(f"{self.folder} is not there: this learngene's extraction kept none of the ancestor's outputs. {REMEDY}")
        if not differing and read_record(self.folder / "layout.json", "layout", REMEDY) != self.layout.to_json(self.num_rows):
            differing = ["the recipe's extraction.loss asks for others"]
        if differing:
            raise UserError(f"{self.folder} has other outputs than this run compares with: {'; '.join(differing)}. {REMEDY}")
        with open_regular(self.file) as file:
            found, size = os.fstat(file.fileno()).st_size, self.num_rows * self.layout.row_bytes
        if found != size:
            raise UserError(f"{self.file} has {found:,} bytes and should have {size:,}: it is damaged. {REMEDY}")

    def _prepare(self) -> None:
        """Keep the file of an earlier start of the run, or make an empty one."""
        size, wanted = self.num_rows * self.layout.row_bytes, self.layout.to_json(self.num_rows)
        marker, there = self.folder / "layout.json", 0
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a symbolic link. Remove it; the run makes a folder of its own.")
        try:
            kept = read_record(marker, "layout", "") == wanted and not self.file.is_symlink()
            with open_regular(self.file) as file:
                kept, there = kept and os.fstat(file.fileno()).st_size == size, os.fstat(file.fileno()).st_blocks * 512
        except (OSError, UserError):
            kept = False
        if not kept:
            self.remove()
            there = 0
        require_space(self.folder.parent, max(0, size - there), "the ancestor's outputs for teacher_pool")
        if not kept:
            make_folder(self.folder)
            with writing(self.file), open(self.file, "xb") as empty:
                empty.truncate(size)  # what is not written takes no space, and reads as zeros
            write_record(marker, wanted)
        if self.kept_as is not None:
            write_record(self.folder / IDENTITY_FILE, self.kept_as)

    def remove(self) -> None:
        """Remove the rows from the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def flush(self) -> None:
        """See that rows that are to be kept, and that this rank wrote, are on the disk."""
        if self.kept_as is not None:
            with writing(self.file):
                os.fsync(self._opened.fileno())

    def end(self) -> None:
        """The run is complete: remove the rows, unless they are to be kept."""
        if self.kept_as is None:
            self.remove()

    def read(self, rows_BR: np.ndarray, headers_B: np.ndarray) -> np.ndarray:
        """Read the rows at the places in `headers_B` into `rows_BR` (uint8); bool [B], which of them are whole and those of these pairs."""
        size, whole, descriptor = self.layout.row_bytes, np.zeros(len(rows_BR), bool), self._opened.fileno()
        for number, (row, header) in enumerate(zip(rows_BR, headers_B, strict=True)):
            if os.preadv(descriptor, [row.data], int(header["place"]) * size) == size:
                found = row[: _HEADER.itemsize].view(_HEADER)[0]
                same = all(found[name] == header[name] for name in ("length", "sample", "caption", "place"))
                whole[number] = same and found["checksum"] == _checksum(row)
        return whole

    def write(self, rows_BR: np.ndarray, headers_B: np.ndarray) -> None:
        """Write rows, whose headers are filled in here."""
        with writing(self.file):
            for row, header in zip(rows_BR, headers_B, strict=True):
                view = row[: _HEADER.itemsize].view(_HEADER)
                view[0] = header
                view["checksum"] = _checksum(row)
                written, start = 0, int(header["place"]) * self.layout.row_bytes
                while written < len(row):
                    written += os.pwrite(self._opened.fileno(), row.data[written:], start + written)


def _checksum(row: np.ndarray) -> int:
    """Of all of a row but the checksum itself. Against damage, not against an attacker: the file is the run's own."""
    return zlib.crc32(row.data[4:])


class PooledTeacher:
    """The ancestor, whose outputs for a pair of the pool are computed when they are first asked for, and read from the disk after that."""

    cost: None = None

    def __init__(self, teacher: LiveTeacher, file: PoolFile) -> None:
        self.spec, self.teacher, self.file = teacher.spec, teacher, file

    def flops(self, depths: Sequence[float], text_length: TextLength = None, captions: int = 1) -> int:
        return self.teacher.flops(depths, text_length, captions)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, autocast: Autocast, depths: Sequence[float]) -> dict[str, Any]:
        """As the ancestor's own, in the pool's type; hidden states of text are 0 behind a caption's end token, where none is compared."""
        headers_B, rows_BR = _headers(inputs), _empty_rows(self.file.layout, inputs)
        missing = np.flatnonzero(~self.file.read(rows_BR.numpy(), headers_B))
        if self._computes(len(missing)):
            self._compute(inputs, autocast, depths, missing, rows_BR, headers_B)
        return _outputs(self.file.layout, rows_BR, inputs, len(depths)) | self.teacher.logits(inputs.text.device)

    def _computes(self, num_missing: int) -> bool:
        """Whether the ancestor runs: where its parameters are divided among the ranks, all run it together."""
        if not self.teacher.sharded:
            return num_missing > 0
        wanted = torch.tensor([num_missing], device=self.teacher.device)
        dist.all_reduce(wanted)
        return bool(wanted.item())

    def _compute(
        self, inputs: Inputs, autocast: Autocast, depths: Sequence[float], missing: np.ndarray, rows_BR: Tensor, headers_B: np.ndarray
    ) -> None:
        """Fill the missing rows in, and write them."""
        chosen = missing if len(missing) else np.arange(1)  # to run with the other ranks
        wanted = replace(inputs, patches=None)  # of whole images, so that any choice of patches can be made later
        outputs = self.teacher(wanted if len(chosen) == len(inputs) else wanted.rows(torch.from_numpy(chosen)), autocast, depths)
        if not len(missing):
            return
        rows_MR = torch.zeros(len(missing), rows_BR.shape[1], dtype=torch.uint8)
        views, lengths_M = self.file.layout.views(rows_MR), torch.from_numpy(headers_B["length"][missing].astype(np.int64))
        for tower in TOWERS:
            views[f"{tower}_features"].copy_(outputs[f"{tower}_features"])
            for number, hidden_MTd in enumerate(outputs[f"{tower}_hidden"]):
                view = views[f"{tower}_hidden.{number}"][:, : hidden_MTd.shape[1]]
                view.copy_(hidden_MTd)
                if tower == "text":
                    view.masked_fill_((torch.arange(view.shape[1]) >= lengths_M[:, None])[:, :, None], 0.0)
        self.file.write(rows_MR.numpy(), headers_B[missing])
        rows_BR[torch.from_numpy(missing)] = rows_MR

    def flush(self) -> None:
        self.file.flush()

    def forget(self) -> None:
        self.file.end()


class KeptTeacher:
    """The ancestor's outputs for the pool of a complete extraction, read from beside its learngene: the ancestor itself never runs."""

    cost: None = None

    def __init__(self, model: towers.Bundle, file: PoolFile) -> None:
        self.spec, self.file = model.spec, file
        self._logits = {"logit_scale": towers.logit_multiplier(model.state["logit_scale"]).detach().clone()}
        if "logit_bias" in model.state:
            self._logits["logit_bias"] = model.state["logit_bias"].detach().clone()

    def flops(self, depths: Sequence[float], text_length: TextLength = None, captions: int = 1) -> int:
        return 0

    def __call__(self, inputs: Inputs, autocast: Autocast, depths: Sequence[float]) -> dict[str, Any]:
        """What the extraction compared with for these pairs. Raises UserError where a row is damaged, or of another pair."""
        headers_B, rows_BR = _headers(inputs), _empty_rows(self.file.layout, inputs)
        missing = np.flatnonzero(~self.file.read(rows_BR.numpy(), headers_B))
        if len(missing):
            header = headers_B[missing[0]]
            raise UserError(
                f"{self.file.file}: row {header['place']} is damaged, or not of sample {header['sample']} "
                f"and caption {header['caption']}. {REMEDY}"
            )
        device = inputs.text.device
        self._logits = {name: value.to(device) for name, value in self._logits.items()}  # once: a copy to a device waits for it
        return _outputs(self.file.layout, rows_BR, inputs, len(depths)) | self._logits

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        pass


def _empty_rows(layout: Layout, inputs: Inputs) -> Tensor:
    """Room for these inputs' rows; pinned where they go to a GPU, which need not be waited for then."""
    return torch.empty(len(inputs), layout.row_bytes, dtype=torch.uint8, pin_memory=inputs.text.is_cuda)


def _outputs(layout: Layout, rows_BR: Tensor, inputs: Inputs, num_depths: int) -> dict[str, Any]:
    """Features and hidden states of these inputs out of their rows, on the inputs' device, where the rows go in one piece."""
    length, views = inputs.text.shape[1], layout.views(rows_BR.to(inputs.text.device, non_blocking=True))
    found: dict[str, Any] = {name: views[name] for name in ("image_features", "text_features")}
    found["image_hidden"] = [views[f"image_hidden.{number}"] for number in range(num_depths)]
    found["text_hidden"] = [views[f"text_hidden.{number}"][:, :length] for number in range(num_depths)]
    if inputs.patches is not None:
        found["image_hidden"] = [towers.keep_patches(hidden, inputs.patches) for hidden in found["image_hidden"]]
    return found


def _headers(inputs: Inputs) -> np.ndarray:
    """Of these pairs' rows, from what is on the host: no device is waited for."""
    assert inputs.samples is not None
    assert inputs.places is not None
    assert inputs.lengths is not None
    headers_B = np.zeros(len(inputs), _HEADER)
    headers_B["length"], headers_B["place"] = inputs.lengths.numpy(), inputs.places.numpy()
    headers_B["sample"], headers_B["caption"] = inputs.samples.numpy().T
    return headers_B
