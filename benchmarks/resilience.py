"""What surviving costs: how long a checkpoint of a ViT-B-32 stalls training, and its share of the time at one save in ten minutes.

    python -m benchmarks.resilience                        # table
    python -m benchmarks.resilience --folder RUNS --out DIR     # on another disk; and resilience.json

One process trains ViT-B-32 (151 M parameters) for one step of two pairs, so that AdamW has its moments, and saves. Timed are the whole of
`Checkpoints.save` and its parts: copying and writing, flushing and hashing. A copy of as many bytes to the same disk, flushed, is the
measure of the disk. The step time that the share is of is 600 s of training between two saves, whatever a step takes. The stall is of one
rank that writes everything: N ranks write an Nth each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import environment
from mmlg_scale import recipe, towers
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.stages import ClipStage
from mmlg_scale.training.step import compute_gradients

SAVE_EVERY = 600.0


def write_plain(folder: Path, num_bytes: int) -> float:
    """Seconds to write and flush so many bytes."""
    block = os.urandom(2**24)
    started = time.perf_counter()
    with open(folder / "plain", "wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    (folder / "plain").unlink()
    return seconds


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds and bytes of saving and of loading."""
    device = start_ranks(Runtime(threads=None))
    config = towers.model_config("ViT-B-32")
    model = towers.Bundle(towers.ModelSpec(config), towers.build_clip(config, seed=0).state_dict())
    training = recipe.Training(steps=2, batch_size=2)
    stage = ClipStage("ancestor", model, training, device)
    engine = Engine(stage.model, stage.parameter_groups(), runtime=Runtime(), batch_size=2, optimizer=training.optimizer)
    text = torch.randint(1, 400, (2, 77))
    compute_gradients(stage, engine, Inputs(torch.randn(2, 3, 224, 224), text).to(device), 0)
    engine.step(1.0)
    checkpoints, saves, parts = Checkpoints(folder), [], []
    for step in range(1, repeats + 1):
        saves.append(checkpoints.save(engine, step, {}))
        (folder / "part").mkdir()
        started = time.perf_counter()
        written = list(engine.save(folder / "part"))
        parts.append(time.perf_counter() - started)
        for path in written:
            path.unlink()
        (folder / "part").rmdir()
    size = json.loads((checkpoints.folder / "last-save.json").read_text())["bytes"]
    plain = statistics.median(write_plain(folder, size) for _ in range(repeats))
    started = time.perf_counter()
    checkpoints.load_latest(engine)
    loading = time.perf_counter() - started
    engine.close()
    stop_ranks()
    save = statistics.median(saves)
    return {
        "parameters": sum(tensor.numel() for tensor in model.state.values()),
        "bytes": size,
        "save_seconds": save,
        "slowest_save_seconds": max(saves),
        "copy_and_write_seconds": statistics.median(parts),
        "plain_write_seconds": plain,
        "load_seconds": loading,
        "share_at_one_save_in_ten_minutes": save / (SAVE_EVERY + save),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured; left out: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for resilience.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.repeats)
    for name, value in found.items():
        print(f"{name:36} {value:,.4f}" if value < 1000 else f"{name:36} {value:,.0f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "resilience.json").write_text(json.dumps({"environment": environment("cpu"), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
