"""What the first start on a set of photographs costs, and what an evaluation of a large split holds in memory.

    python -m benchmarks.data_start                          # figures
    python -m benchmarks.data_start --out benchmarks/results # and data_start.json

First start: 2,000 JPEGs of 500 x 375 pixels in one shard. The check before step 1 (headers, captions, SHA-256, a decode of every image) is
timed against nothing but decoding the same images whole, on as many threads, in turn; on the wall and in seconds of all processors.

Evaluation: 20,000 JPEGs of 224 x 224 pixels with one caption each, opened, checked, decoded, encoded by a stand-in for a model (means over
patches, so that the memory is that of the data's way) and scored, in a process of its own whose imports are not counted: peak memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.data_scale import Measured
from benchmarks.measure import environment
from mmlg_scale import towers
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.images import open_image
from mmlg_scale.data.publish import Sample, new_dataset, write_split
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scan import num_threads, scan
from mmlg_scale.evaluation.evaluate import evaluate_pairs

DISTINCT = 64
"""Images that are drawn; the others are copies, which cost the same to decode."""


def _jpegs(width: int, height: int) -> list[bytes]:
    """Random smooth images with some grain, as large as photographs of their size are."""
    found, generator = [], np.random.default_rng(0)
    for _ in range(DISTINCT):
        coarse = generator.integers(0, 256, (height // 25 + 2, width // 25 + 2, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = np.clip(pixels + generator.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def write_set(root: Path, width: int, height: int, counts: dict[str, int]) -> None:
    """A data set of such images, with a caption each."""
    images = _jpegs(width, height)

    def samples(count: int) -> Iterator[Sample]:
        for index in range(count):
            yield Sample(f"{index:08d}", images[index % DISTINCT], "jpg", [f"photograph {index} of something"], index % 10)

    with new_dataset(root, "benchmark", {}) as folder:
        assert folder is not None
        for split, count in counts.items():
            write_split(folder, split, samples(count), samples_per_shard=2_000)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def first_start(folder: Path, num_images: int, repeats: int) -> dict[str, Any]:
    """Seconds of the check and of decoding, each the least of `repeats` in turn."""
    root, threads = folder / "photographs", num_threads()
    write_set(root, 500, 375, {"train": num_images})
    reader = ShardReader(root / "train")
    payloads = [reader.image_bytes(index) for index in range(num_images)]

    def decode(payload: bytes) -> None:
        with open_image(payload) as image:
            image.load()

    def decode_all() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, payloads))

    checks, decodes = [], []
    for _ in range(repeats):
        decodes.append(_timed(decode_all))
        checks.append(_timed(lambda: scan(root / "train", reader, check="decode", threads=threads, fresh=True)))
    again = _timed(lambda: scan(root / "train", reader, check="decode", threads=threads))
    check, plain = ([min(times) for times in zip(*of, strict=True)] for of in (checks, decodes))
    return {
        "images": num_images,
        "threads": threads,
        "mean_bytes": sum(map(len, payloads)) / num_images,
        "check_seconds": check[0],
        "check_cpu_seconds": check[1],
        "decode_seconds": plain[0],
        "decode_cpu_seconds": plain[1],
        "ratio": check[0] / plain[0],
        "cpu_ratio": check[1] / plain[1],
        "second_start_seconds": again[0],
    }


def measure_evaluation(root: Path) -> dict[str, Any]:
    """Peak memory of an evaluation above the imports, its seconds, and its metrics."""
    config = {
        "embed_dim": 507,
        "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 64, "head_width": 32, "layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    spec = towers.ModelSpec(towers.model_config(config), towers.Preprocess(), towers.BytePairTokenizer())
    projection = torch.randn(77, 507, generator=torch.Generator().manual_seed(0))

    def encode_image(images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 13).flatten(1)

    with Measured() as measured:
        split = Corpus(open_pairs(root), spec).eval_split("test")
        metrics = evaluate_pairs(
            encode_image, lambda ids: ids.float() @ projection[: ids.shape[1]], split, spec.preprocess, torch.device("cpu")
        )
    return {"images": len(split.images.samples_N), **measured.row(), "mean_recall@1": metrics["mean_recall@1"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=2_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the sets are written and removed")
    parser.add_argument("--out", type=Path, default=None, help="folder for data_start.json")
    parser.add_argument("--measure", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure_evaluation(args.measure)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {"first_start": first_start(Path(folder), args.photographs, args.repeats)}
        print(json.dumps(found, indent=1), flush=True)
        root = Path(folder) / "evaluated"
        write_set(root, 224, 224, {"train": 1, "val": 1, "test": args.images})
        command = [sys.executable, "-m", "benchmarks.data_start", "--measure", str(root)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found["evaluation"] = json.loads(output.splitlines()[-1])
    print(json.dumps(found["evaluation"], indent=1))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": {**environment("cpu"), "load": os.getloadavg()}, **found}
        (args.out / "data_start.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
