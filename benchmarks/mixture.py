"""What mixing sources costs: making the pattern, finding places, resuming far on; and how far a source's share is ever off.

    python -m benchmarks.mixture                            # table
    python -m benchmarks.mixture --out benchmarks/results   # and mixture.json

Orders are of sources of a million samples in shards of 10,000, which exist in no file: this measures arithmetic. Each mixture in a fresh
process, imports not counted:

    first     order and pattern made, and the places of the first batch of 32,768
    resume    the same at step 1,000,000
    places    places a second over 2^22 positions that follow each other, from the start
    off       the largest deviation of any source's samples from its share of all positions so far, in samples, over a whole period

Seconds are of the processor, beside them those of the wall.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import environment
from mmlg_scale.data.mixture import MixedOrder, Pattern, shares_of, source_seed
from mmlg_scale.data.order import EpochOrder

BATCH, PLACES, RESUMED_STEP = 32_768, 2**22, 1_000_000
MIXTURES: dict[str, list[float]] = {
    "1 set": [1.0],
    "3, weights 0.7, 0.25, 0.05": [0.7, 0.25, 0.05],
    "3, weighted by size": [12_423_374.0, 3_318_333.0, 113_287.0],
    "16, weights 1 to 16": [float(weight) for weight in range(1, 17)],
    "256, odd weights": [1.0 + 0.001 * index * index for index in range(256)],
}


def make(weights: Sequence[float]) -> MixedOrder:
    """The order of a mixture of sources of a million samples each."""
    orders = [EpochOrder(np.full(100, 10_000), np.zeros(0, np.int64), source_seed(0, source)) for source in range(len(weights))]
    return MixedOrder(orders, np.arange(len(weights) + 1) * 1_000_000, Pattern(shares_of(weights, "data.sources")))


def measure(weights: Sequence[float]) -> dict[str, Any]:
    """The figures of one mixture, in this process."""
    found: dict[str, Any] = {}
    for name, step in (("first", 0), ("resume", RESUMED_STEP)):
        wall, cpu = time.perf_counter(), time.process_time()
        order = make(weights)
        order.places(step * BATCH, BATCH)
        found[name] = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    order = make(weights)
    order.places(0, BATCH)
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, PLACES, BATCH):
        order.places(first, BATCH)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found["places"] = {"a_second": PLACES / wall, "a_cpu_second": PLACES / cpu}
    pattern = order.pattern
    sources, numbers = pattern.places(0, pattern.period)
    ideal = np.arange(1, pattern.period + 1)[:, None] * (pattern.shares / pattern.period)
    # A source's count changes where it is read: before and behind that it is off most.
    behind = np.abs(numbers + 1 - ideal[np.arange(pattern.period), sources])
    before = np.abs(numbers - (ideal[np.arange(pattern.period), sources] - (pattern.shares / pattern.period)[sources]))
    return found | {"sources": len(weights), "period": pattern.period, "off": float(max(behind.max(), before.max()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Folder for mixture.json.")
    parser.add_argument("--only", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(MIXTURES[args.only])))
        return
    rows = {}
    print(f"{'mixture':30} {'period':>8} {'first: s':>9} {'resume: s':>10} {'places a second':>16} {'off':>8}")
    for name in MIXTURES:
        done = subprocess.run([sys.executable, "-m", "benchmarks.mixture", "--only", name], capture_output=True, text=True, check=True)
        row = rows[name] = json.loads(done.stdout)
        seconds = [row[part]["cpu_seconds"] for part in ("first", "resume")]
        print(f"{name:30} {row['period']:8,} {seconds[0]:9.3f} {seconds[1]:10.3f} {row['places']['a_cpu_second']:16,.0f} {row['off']:8.5f}")
    if args.out is not None:
        (args.out / "mixture.json").write_text(json.dumps({"rows": rows, "environment": environment("cpu")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
