"""The ancestor's features of the training set on disk: computed once, read by every run that compares with them.

    FOLDER/
      blocks/block-000000.safetensors   while it is computed: finished parts, which a restarted pass does not repeat
      image.npy  [N, E]                 fp32; not a number where a sample could not be read
      text.npy   [M, E]                 of all captions of all samples
      captions.npy [N + 1]              where each sample's captions begin in text.npy
      result.json                       written last: what the features are of, how many, what they cost

Only final features are kept: hidden states are a thousand times larger.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import track
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader

from mmlg_scale import towers
from mmlg_scale.accounting import forward_flops
from mmlg_scale.data.sweep import Samples, Sweep
from mmlg_scale.data.workers import from_workers, require_shared_memory, worker_options
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import require_space, write_bytes_atomic, writing
from mmlg_scale.ranks import on_first_rank
from mmlg_scale.reading import one_line, require_file
from mmlg_scale.terminal import Terminal

if TYPE_CHECKING:
    from mmlg_scale.training.teacher import Autocast, LiveTeacher


FILES = ("image.npy", "text.npy", "captions.npy")
POOLED = ("image", "text")
"""Only final features are wanted: see `accounting.forward_flops`."""
REMEDY = "Remove the folder and write the features again with mmlg features."


def compute_features(
    teacher: LiveTeacher,
    sweep: Sweep,
    out: Path,
    *,
    autocast: Autocast,
    device: torch.device,
    num_workers: int = 0,
    end_if_asked: Callable[[], None] = lambda: None,
    items_per_block: int = 64,
) -> dict[str, Any]:
    """Write the features of `sweep`'s samples to `out`, each rank a part of them; return numbers and cost. Collective.

    Finished blocks of an earlier start are kept; `remove_blocks` once the result is written. `end_if_asked` is called for each batch, and
    may end this start by an exception.

    Raises:
        UserError: too little disk, or shared memory for the workers; a worker fails.
    """
    blocks = [range(start, min(start + items_per_block, len(sweep))) for start in range(0, len(sweep), items_per_block)]
    paths = [out / "blocks" / f"block-{number:06d}.safetensors" for number in range(len(blocks))]
    there = on_first_rank(lambda: [path.exists() for path in paths])
    missing = [number for number in range(dist.get_rank(), len(blocks), dist.get_world_size()) if not there[number]]
    # Parts and their sum are there at once for a moment; every sample has a caption.
    needed = 2 * 2 * 4 * len(sweep.reader) * int(teacher.spec.config["embed_dim"])
    on_first_rank(lambda: require_space(out, needed, "the ancestor's features"))
    items = [item for number in missing for item in blocks[number]]
    image, captions = 3 * sweep.image_size**2, 8 * 8 * sweep.context_length  # eight captions an image are many
    on_first_rank(lambda: require_shared_memory(num_workers, [sweep.item_size * image, sweep.item_size * captions]))
    loader: DataLoader[Samples] = DataLoader(
        sweep,
        batch_size=None,
        sampler=items,
        **worker_options(num_workers),
    )
    preprocess, started, found = teacher.spec.preprocess, time.perf_counter(), list[dict[str, Tensor]]()
    place = iter(missing)
    for position, samples in enumerate(
        track(from_workers(loader), "features", total=len(items), console=Terminal(stderr=True), disable=dist.get_rank() != 0)
    ):
        end_if_asked()
        found.append(_features(teacher, samples, preprocess, autocast, device))
        if position + 1 == len(items) or items[position + 1] % items_per_block == 0:
            block = {name: torch.cat([part[name] for part in found]) for name in found[0]}
            block["text_flops"] = block["text_flops"].sum().reshape(1)
            block["seconds"] = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
            tensors, metadata = towers.signed(block)
            write_bytes_atomic(paths[next(place)], save(tensors, metadata))
            found, started = [], time.perf_counter()
    dist.barrier()
    counts, flops = on_first_rank(lambda: _join(paths, out)), forward_flops(teacher.spec.config, pooled=POOLED)
    total = counts["num_images"] * flops["image"] + counts.pop("text_flops")
    scalars = {name: float(value) for name, value in towers.logits_outputs(teacher.model.clip).items()}
    return {**counts, "flops": total, "logits": scalars}


@torch.no_grad()
def _features(
    teacher: LiveTeacher, samples: Samples, preprocess: Callable[[Tensor], Tensor], autocast: Autocast, device: torch.device
) -> dict[str, Tensor]:
    """By name: features of one item's images and of all their captions, and what the captions, which are cut, have cost."""
    images = preprocess(samples.image_uint8_NCHW.to(device))
    order = samples.text_MT.argmax(dim=-1).argsort(stable=True)  # by length, so that little of a part is padding
    parts = [part[:, : towers.cut_length(part)] for part in samples.text_MT[order].split(len(images)) if len(part)]
    with autocast():
        image_NE = teacher.model(images)["image_features"].float().cpu()
        found = [teacher.model(text=part.to(device))["text_features"].float().cpu() for part in parts]
    image_NE[~samples.whole_N] = torch.nan
    text_ME = torch.cat([image_NE[:0], *found])
    cost = sum(len(part) * forward_flops(teacher.spec.config, text_length=part.shape[1], pooled=POOLED)["text"] for part in parts)
    return {
        "image": image_NE,
        "text": torch.empty_like(text_ME).index_copy_(0, order, text_ME),
        "num_captions": samples.num_captions_N,
        "text_flops": torch.tensor([cost]),
    }


def _join(paths: Sequence[Path], out: Path) -> dict[str, Any]:
    """One file of each kind out of all blocks; their numbers and the seconds that they took."""
    ranks = min(dist.get_world_size(), len(paths))  # that had work
    captions, seconds, width, text_flops = [], 0.0, 0, 0
    for path in paths:
        block = _read_block(path)
        captions.append(block["num_captions"].numpy())
        seconds, width = seconds + float(block["seconds"]) / ranks, block["image"].shape[1]
        text_flops += int(block["text_flops"])
    starts = np.concatenate([[0], np.cumsum(np.concatenate(captions))])
    for name in FILES:
        (out / name).unlink(missing_ok=True)  # a symbolic link in its place would be followed
    with writing(out / "captions.npy"):
        np.save(out / "captions.npy", starts)
    rows = {"image": len(starts) - 1, "text": int(starts[-1])}
    for name, count in rows.items():
        file = out / f"{name}.npy"
        # Through a file, not a memory map: on a full disk writing to a map kills the process.
        with writing(file), open(file, "wb") as whole:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (count, width)}
            np.lib.format.write_array_header_1_0(whole, header)
            for path in paths:
                whole.write(_read_block(path)[name].numpy().data)
    digests = {name: file_digest(out / name, "features") for name in FILES}
    return {"num_images": rows["image"], "num_captions": rows["text"], "text_flops": text_flops, "seconds": seconds, "files": digests}


def remove_blocks(out: Path) -> None:
    """Remove the parts, once result.json says what was made of them: until then a start takes no longer than to join them."""
    shutil.rmtree(out / "blocks", ignore_errors=True)


def _read_block(path: Path) -> dict[str, Tensor]:
    remedy = "Remove that block; mmlg features computes it again."
    try:
        block = towers.read_tensors(path)[0]
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}. {remedy}") from error
    if "text_flops" not in block:
        raise UserError(f"{path} is of an earlier version. {remedy}")
    return block


def check_features(folder: Path, result: Mapping[str, Any]) -> None:
    """Compare the files in `folder` with the SHA-256 in `result`, its result.json. Raises UserError where one is damaged."""
    wanted = result.get("files")  # an earlier version has none
    for name in FILES:
        if isinstance(wanted, dict) and file_digest(folder / name, "features") != wanted.get(name):
            raise UserError(f"{folder / name} is damaged: it is not the file that was written (SHA-256). {REMEDY}")


def open_features(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays in `folder`: image [N, E] and text [M, E], which stay on disk, and captions [N + 1].

    Raises:
        UserError: a file is missing, is no array, or is of another shape than the others.
    """
    for name in FILES:
        require_file(folder / name, "features", REMEDY)
    try:
        image, text = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES[:2])
        starts = np.load(folder / FILES[2], allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder} has no readable features ({one_line(error)}). {REMEDY}") from error
    agree = (
        all(array.ndim == 2 and array.dtype == np.float32 for array in (image, text))
        and image.shape[1] == text.shape[1]
        and starts.shape == (len(image) + 1,)
        and np.issubdtype(starts.dtype, np.integer)
        and starts[0] == 0
        and starts[-1] == len(text)
        and bool((np.diff(starts) >= 0).all())
    )
    if not agree:
        raise UserError(f"{folder}: {', '.join(FILES)} do not go together. {REMEDY}")
    return image, text, starts
