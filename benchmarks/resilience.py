"""What surviving costs: how long a checkpoint of a ViT-B-32 stalls training, its share of the time at one save in ten minutes, and what
an exact place in the data costs.

    python -m benchmarks.resilience                        # table
    python -m benchmarks.resilience --folder RUNS --out DIR     # on another disk; and resilience.json

One process trains ViT-B-32 (151 M parameters) on two pairs a step, so that AdamW has its moments, and saves: in the foreground, where
training waits for the disk, and in the background, where it waits for a copy in memory. Training continues during the second kind, so
that its steps show what the writing thread takes from them. A copy of as many bytes to the same disk, flushed, is the measure of the
disk. The share is of 600 s of training between two saves, whatever a step takes. The stall is of one rank that writes everything: N ranks
write an Nth each.

The data: a run resumes at its place because samples are found by number. What that takes, a look into the index and a read by position in
the order of training, is set against decoding the same samples at 224 px.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import environment
from mmlg_scale import recipe, towers
from mmlg_scale.data.images import decode
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.synthetic import write_pairs
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
    runtime = Runtime()
    device = start_ranks(runtime)
    config = towers.model_config("ViT-B-32")
    model = towers.Bundle(towers.ModelSpec(config), towers.build_clip(config, seed=0).state_dict())
    training = recipe.Training(steps=2, batch_size=2)
    stage = ClipStage("ancestor", model, training, device)
    engine = Engine(stage.model, stage.parameter_groups(), runtime=runtime, batch_size=2, optimizer=training.optimizer)
    inputs = Inputs(torch.randn(2, 3, 224, 224), torch.randint(1, 400, (2, 77))).to(device)

    def step() -> float:
        started = time.perf_counter()
        compute_gradients(stage, engine, inputs, 0)
        engine.step(1.0)
        return time.perf_counter() - started

    alone = [step() for _ in range(8)][2:]
    saves, stalls, published, beside = [], [], [], []
    for number in range(repeats):
        saves.append(Checkpoints(folder).save(engine, 2 * number + 1, {}))
        checkpoints = Checkpoints(folder, background=True)
        started = time.perf_counter()
        stalls.append(checkpoints.save(engine, 2 * number + 2, {}))
        while checkpoints.saving:
            beside.append(step())
        checkpoints.wait()
        published.append(time.perf_counter() - started)
    size = json.loads((checkpoints.folder / "last-save.json").read_text())["bytes"]
    plain = statistics.median(write_plain(folder, size) for _ in range(repeats))
    started = time.perf_counter()
    checkpoints.load_latest(engine)
    loading = time.perf_counter() - started
    engine.close()
    stop_ranks()
    save, stall, slower = statistics.median(saves), statistics.median(stalls), statistics.median(beside) / statistics.median(alone) - 1
    return {
        "parameters": sum(tensor.numel() for tensor in model.state.values()),
        "bytes": size,
        "foreground_stall_seconds": save,
        "background_stall_seconds": stall,
        "longest_background_stall_seconds": max(stalls),
        "background_published_after_seconds": statistics.median(published),
        "step_seconds": statistics.median(alone),
        "step_seconds_beside_a_save": statistics.median(beside),
        "plain_write_seconds": plain,
        "load_seconds": loading,
        "foreground_share_at_one_save_in_ten_minutes": save / (SAVE_EVERY + save),
        "background_share_at_one_save_in_ten_minutes": stall / (SAVE_EVERY + stall),
        "background_share_with_slower_steps": (stall + max(0.0, slower) * statistics.median(published)) / SAVE_EVERY,
    }


def measure_reads(folder: Path, num_samples: int) -> dict[str, float]:
    """CPU seconds a sample, in a random order: to find it, to read its image and its caption, to decode it at 224 px."""
    write_pairs(folder / "pairs", num_train=num_samples)
    reader = ShardReader(folder / "pairs" / "train")
    order = np.random.default_rng(0).permutation(num_samples)

    def spent(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return (time.process_time() - started) / num_samples

    encoded: list[bytes] = []
    return {
        "index_seconds_a_sample": spent(lambda: [reader.locate(part) for part in np.array_split(order, 16)]),
        "read_image_seconds_a_sample": spent(lambda: encoded.extend(reader.image_bytes(int(index)) for index in order)),
        "read_caption_seconds_a_sample": spent(lambda: [reader.about(int(index)) for index in order]),
        "decode_seconds_a_sample": spent(lambda: [decode(payload, 224) for payload in encoded]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured; left out: the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for resilience.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), args.repeats) | measure_reads(Path(folder), 2000)
    for name, value in found.items():
        print(f"{name:44} {value:,.6f}" if value < 1000 else f"{name:44} {value:,.0f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "resilience.json").write_text(json.dumps({"environment": environment("cpu"), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
