"""What opening and resuming a data set costs, from a million samples to a hundred million: seconds and memory of a process and of a worker.

    python -m benchmarks.data_scale                            # table
    python -m benchmarks.data_scale --out benchmarks/results   # and data_scale.json

A set of N samples in shards of 10,000 is written as `mmlg data index` would leave it: manifest, indexes, the record of the check, and tars
that are sparse files of the right size, without content. Then, each in a fresh process whose imports are done and not counted:

    open      the manifest, what the check found (one stat a shard), the order; memory is the peak above the imports
    first     the places of one rank's share (4,096) of the first batch of 32,768: sample, shard and record of each
    resume    the same at step 1,000,000, by a process that has just opened the set
    places    places a second, over 2^22 positions that follow each other, with the record of each
    worker    a process that is handed reader and order as a loader worker is, and looks up its share of 64 batches: bytes that travel, and
              peak memory above its imports

`open` reads files that were just written: from a disk that has not seen them for long it takes that disk's time for a file of 178 bytes a
shard. Indexes are read where places are, 44 bytes a sample. Seconds are of the wall, beside them those of the processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import environment
from mmlg_scale.data.faults import known_faults
from mmlg_scale.data.index import PLAIN_KEY, RECORD, index_content, index_digest, index_path, key_checksum
from mmlg_scale.data.manifest import write_manifest
from mmlg_scale.data.order import EpochOrder
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scan import save_states, state_of

PER_SHARD = 10_000
IMAGE_BYTES, TEXT_BYTES = 30_000, 60
BATCH, SHARE = 32_768, 4_096
RESUMED_STEP = 1_000_000
PLACES = 2**22
SIZES = (1_000_000, 10_000_000, 100_000_000)


def write_set(root: Path, num_samples: int) -> dict[str, int]:
    """A training split of `num_samples` without content; returns the bytes of its manifest and of its indexes."""
    folder = root / "train"
    (folder / "index").mkdir(parents=True)
    records = np.zeros(PER_SHARD, RECORD)
    stride = 512 * (2 + -(-IMAGE_BYTES // 512) + -(-TEXT_BYTES // 512))
    records["image"] = 512 + stride * np.arange(PER_SHARD)
    records["text"] = records["image"] + stride - 1024
    records["image_size"], records["text_size"], records["lead"], records["flags"] = IMAGE_BYTES, TEXT_BYTES, 1, PLAIN_KEY
    size, entries, states, index_bytes = stride * PER_SHARD + 1024, list[dict[str, Any]](), {}, 0
    for shard in range(num_samples // PER_SHARD):
        name = f"shard-{shard:06d}.tar"
        with open(folder / name, "wb") as tar:
            tar.truncate(size)
        records["key"] = np.arange(PER_SHARD) + key_checksum(name) % 2**31
        content = index_content(records)
        index_path(folder, name).write_bytes(content)
        index_bytes += len(content)
        sha256 = hashlib.sha256(name.encode()).hexdigest()
        entries.append({"file": name, "samples": PER_SHARD, "bytes": size, "sha256": sha256, "index": index_digest(content)})
        states[name] = state_of(folder / name, [])
    write_manifest(folder, "train", entries)
    save_states(folder, states)
    return {"manifest_bytes": (folder / "manifest.json").stat().st_size, "index_bytes": index_bytes}


def _memory(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


class Measured:
    """Seconds of a block on the wall and of the processor, and its peak memory above what the process had."""

    def __enter__(self) -> Measured:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        self._memory = _memory("VmRSS")
        self._wall, self._processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._processor
        self.peak_bytes = _memory("VmHWM") - self._memory

    def row(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_bytes": self.peak_bytes}


def _open(root: Path) -> tuple[ShardReader, EpochOrder]:
    reader = ShardReader(root / "train")
    known = known_faults(root / "train", reader, check="auto", max_bad_fraction=0.01, record=None, rank=0, threads=1, shared=False)
    return reader, EpochOrder(reader.shards.samples, known.positions(), seed=0)


def _look_up(reader: ShardReader, order: EpochOrder, first: int, count: int) -> int:
    _, samples = order.places(first, count)
    _, records = reader.locate(samples)
    return int(records["image_size"].sum())


def measure_process(root: Path, handed: Path) -> dict[str, Any]:
    """What a training process does before its first batch; what a worker is handed goes to the file `handed`."""
    _memory("VmRSS")
    with Measured() as opened:
        reader, order = _open(root)
    with Measured() as first:
        _look_up(reader, order, 0, SHARE)
    handed.write_bytes(pickle.dumps((reader, order)))
    with Measured() as places:
        for start in range(0, PLACES, BATCH):
            _look_up(reader, order, start, BATCH)
    return {
        "open": opened.row(),
        "first": first.row(),
        "places": {**places.row(), "a_second": PLACES / places.seconds, "a_cpu_second": PLACES / places.cpu_seconds},
    }


def measure_resume(root: Path) -> dict[str, Any]:
    """The first places of a process that resumes."""
    reader, order = _open(root)
    with Measured() as resumed:
        _look_up(reader, order, RESUMED_STEP * BATCH, SHARE)
    return {"resume": resumed.row()}


def measure_worker(handed: Path) -> dict[str, Any]:
    """What a loader worker holds after 64 batches."""
    with Measured() as worked:
        payload = handed.read_bytes()
        reader, order = pickle.loads(payload)  # noqa: S301  # which this program wrote
        for step in range(64):
            _look_up(reader, order, step * BATCH, SHARE)
    return {"worker": {**worked.row(), "handed_bytes": len(payload)}}


def measure(folder: Path, num_samples: int) -> dict[str, Any]:
    """A row of the table: writes a set into `folder` and measures in processes of their own."""
    root, handed = folder / "set", folder / "handed"
    row = {"samples": num_samples, "shards": num_samples // PER_SHARD, **write_set(root, num_samples)}
    for words in (["process", str(root), str(handed)], ["resume", str(root)], ["worker", str(handed)]):
        command = [sys.executable, "-m", "benchmarks.data_scale", "--measure", *words]
        row |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people."""
    names = ("samples", "open s", "(cpu)", "open MB", "first s", "resume s", "places/s", "/cpu s", "handed kB", "worker MB", "manifest MB")
    lines = ["".join(f"{name:>13}" for name in names)]
    for row in rows:
        values = (
            f"{row['samples']:,}",
            f"{row['open']['seconds']:.3f}",
            f"{row['open']['cpu_seconds']:.3f}",
            f"{row['open']['peak_bytes'] / 1e6:.1f}",
            f"{row['first']['seconds']:.3f}",
            f"{row['resume']['seconds']:.3f}",
            f"{row['places']['a_second']:,.0f}",
            f"{row['places']['a_cpu_second']:,.0f}",
            f"{row['worker']['handed_bytes'] / 1e3:,.0f}",
            f"{row['worker']['peak_bytes'] / 1e6:.1f}",
            f"{row['manifest_bytes'] / 1e6:.2f}",
        )
        lines.append("".join(f"{value:>13}" for value in values))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help=f"samples, multiples of {PER_SHARD:,}")
    parser.add_argument("--folder", type=Path, default=None, help="where the sets are written and removed: 45 bytes a sample")
    parser.add_argument("--out", type=Path, default=None, help="folder for data_scale.json")
    parser.add_argument("--measure", nargs="+", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        kind, *paths = args.measure
        work = {"process": measure_process, "resume": measure_resume, "worker": measure_worker}[kind]
        print(json.dumps(work(*map(Path, paths))))
        return
    rows = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(measure(Path(folder), size))
        print(table(rows[-1:]), flush=True)
    print("\n" + table(rows))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": {**environment("cpu"), "load": os.getloadavg()}, "per_shard": PER_SHARD, "rows": rows}
        (args.out / "data_scale.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
