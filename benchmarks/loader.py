"""How many samples does one worker on one core give, next to open_clip_train's loader and to plain webdataset?

    python -m benchmarks.loader                        # table; about two minutes on a free core
    python -m benchmarks.loader --out DIR              # and loader_cpu.json

256 px JPEGs with captions of 5 to 25 words, packed into shards, become batches of 224 px: open_clip's random crop (90 to 100 % of the
area, bicubic) and its byte pairs. Each loader has one worker process, and all processes of the benchmark share one core. They take turns:
a turn begins when the worker has its batches ready and nothing to do, takes some batches, and ends when it is so again, so that as many
are made as are taken. What counts is the CPU time of worker and reader together, since other work may share the core; the time on the
clock is beside it.

The other loaders normalise images in the worker, in fp32. Ours hands bytes over, and the device normalises them: "ours" is the loader,
as with a GPU, and "ours, normalised" has the batches normalised on this core, too. Images are noise over smooth structure (38 kB each), or
with --images real JPEGs from a folder.

    python -m benchmarks.loader --augment          # what aug_cfg costs: --out DIR writes augment_cpu.json

In one process, without loaders: per image, the draw of a crop and its decoding and resizing at the default scale and at [0.4, 1.0], and
what is added by colour jitter and grey (open_clip's color_jitter [0.32, 0.32, 0.32, 0.08] at 0.8, gray_scale_prob 0.2), ours beside PIL's
by open_clip's own transforms, in turns, by CPU time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks import measure
from mmlg_scale import towers
from mmlg_scale.augmentation import Augmentation
from mmlg_scale.data.augment import draw_colours, recolour
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.images import random_resized_crop
from mmlg_scale.data.pack import PackSettings, pack_table
from mmlg_scale.data.pipeline import StreamSettings
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.streams import Stream, generator

SIDE, SIZE, BATCH = 256, 224, 64
OURS, NORMALISED, TRAIN, PLAIN = "ours", "ours, normalised", "open_clip_train", "webdataset"
IDLE_SECONDS = 0.3


def write_shards(root: Path, num_images: int, images: Path | None) -> Path:
    """The set under `root`, all of it training but for a few; returns it."""
    draws = np.random.default_rng(0)
    source = root / "images"
    source.mkdir()
    vocabulary = towers.BytePairTokenizer().vocabulary
    words = [token[:-4] for token in vocabulary if token.endswith("</w>") and token[:-4].isalpha()]
    paths = sorted(images.glob("*.jp*g"))[:num_images] if images else [source / f"{index:05}.jpg" for index in range(num_images)]
    with open(root / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["filepath", "caption"])
        for path in paths:
            if images is None:
                coarse = Image.fromarray(draws.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) + draws.normal(0, 12, (SIDE, SIDE, 1))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "JPEG", quality=90)
            ranks = np.minimum(draws.zipf(1.3, draws.integers(5, 26)), len(words)) - 1  # few words are most of a text
            table.writerow([path.resolve(), " ".join(words[rank] for rank in ranks)])
    pack_table(root / "pairs.csv", root / "data", PackSettings(val=0.01, test=0.01, tokenizer="bpe"))
    return root / "data"


def ours(data: Path) -> Iterator[Any]:
    """Our loader's batches: uint8 images, token ids."""
    spec = towers.ModelSpec(towers.model_config("ViT-B-32"))
    settings = StreamSettings(global_batch_size=BATCH, seed=0, num_workers=1, augment="resized_crop", check="structure")
    return iter(Corpus(open_pairs(data), spec).stream(settings))


def open_clip_trains(data: Path) -> Iterator[Any]:
    """As `python -m open_clip_train.main --dataset-type webdataset --workers 1` reads them."""
    open_clip = towers.open_clip
    from open_clip_train import data as theirs

    # Written for webdataset up to 0.2.86; later ones mark the end of each shard, which it takes for a file.
    expand = theirs.tar_file_expander
    theirs.tar_file_expander = lambda *given, **more: (file for file in expand(*given, **more) if "fname" in file)
    shards = sorted(map(str, (data / "train").glob("*.tar")))
    args = SimpleNamespace(
        train_data=f"{data}/train/shard-{{{Path(shards[0]).stem[6:]}..{Path(shards[-1]).stem[6:]}}}.tar",
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH,
        workers=1,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(SIZE, is_train=True)
    return iter(theirs.get_wds_dataset(args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader)


def webdatasets(data: Path) -> Iterator[Any]:
    """A few lines of webdataset, as its documentation has them, with open_clip's transform and tokenizer."""
    import webdataset as wds

    open_clip = towers.open_clip
    transform, tokenizer = open_clip.image_transform(SIZE, is_train=True), open_clip.get_tokenizer("ViT-B-32")
    shards = sorted(map(str, (data / "train").glob("*.tar")))
    pairs = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000).decode("pil").to_tuple("jpg", "txt")
    batches = pairs.map_tuple(transform, lambda text: tokenizer(text)[0]).batched(BATCH)
    return iter(wds.WebLoader(batches, batch_size=None, num_workers=1, prefetch_factor=2))


class Loader:
    """A loader with its worker process, whose CPU time is watched."""

    def __init__(self, name: str, make: Callable[[], Iterator[Any]], use: Callable[[Any], object]) -> None:
        self.name, self._use = name, use
        before = {child.pid for child in psutil.Process().children()}
        self._batches = make()
        next(self._batches)
        new = [child for child in psutil.Process().children() if child.pid not in before]
        self._workers = [child for child in new if "resource_tracker" not in " ".join(child.cmdline())]
        assert len(self._workers) == 1, new

    def turn(self, num_batches: int) -> measure.Row:
        """Seconds, of the processor and on the clock, in which as many batches were made and used."""
        self._settle()
        worker, own, clock = self._spent(), time.process_time(), time.perf_counter()
        for batch in itertools.islice(self._batches, num_batches):
            self._use(batch)
        own = time.process_time() - own
        idle = self._settle()
        wall = time.perf_counter() - clock - idle
        return {"variant": self.name, "cpu_s": self._spent() - worker + own, "wall_s": wall, "samples": num_batches * BATCH}

    def _spent(self) -> float:
        times = self._workers[0].cpu_times()
        return float(times.user + times.system)

    def _settle(self) -> float:
        """Wait until the worker has nothing to do; returns how long that has been so."""
        last, since = self._spent(), time.perf_counter()
        while time.perf_counter() - since < IDLE_SECONDS:
            time.sleep(0.02)
            if (now := self._spent()) != last or self._workers[0].status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP):
                last, since = now, time.perf_counter()
        return time.perf_counter() - since


def summary(rows: list[measure.Row]) -> dict[str, Any]:
    """Samples per CPU second of each loader over all turns, and of ours the median of the ratios of turns."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["variant"], []).append(row["samples"] / row["cpu_s"])
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    ratios = {
        f"{mine} / {other}": {
            "median": round(statistics.median(pairs), 2),
            "least": round(min(pairs), 2),
            "most": round(max(pairs), 2),
        }
        for mine in (OURS, NORMALISED)
        for other in (TRAIN, PLAIN)
        for pairs in [[a / b for a, b in zip(rates[mine], rates[other], strict=True)]]
    }
    return {"samples_per_cpu_second": medians, "ratios": ratios}


JITTER = Augmentation(color_jitter=[0.32, 0.32, 0.32, 0.08], color_jitter_prob=0.8, gray_scale_prob=0.2)
WIDE = (0.4, 1.0)


def augmentations(data: Path, turns: int, num_images: int) -> dict[str, dict[str, float]]:
    """CPU microseconds an image of each part of an augmentation, over the turns: median, least and most."""
    reader = ShardReader(data / "train")
    payloads = [reader.image_bytes(index) for index in range(min(num_images, len(reader)))]
    crops = [random_resized_crop(payload, SIZE, generator(0, Stream.CROP, 0, index)) for index, payload in enumerate(payloads)]
    images = [Image.fromarray(crop) for crop in crops]
    from open_clip import transform as open_clip_transforms

    theirs = [open_clip_transforms.color_jitter(0.32, 0.32, 0.32, 0.08, p=0.8), open_clip_transforms.gray_scale(0.2)]

    def crop(scale: tuple[float, float]) -> None:
        for index, payload in enumerate(payloads):
            random_resized_crop(payload, SIZE, generator(0, Stream.CROP, 1, index), scale=scale)

    def recolour_all() -> None:
        for index, pixels in enumerate(crops):
            recolour(pixels, draw_colours(JITTER, 0, 1, index))

    def recolour_by_pil() -> None:
        for image in images:
            np.asarray(theirs[1](theirs[0](image)))

    parts: dict[str, Callable[[], None]] = {
        "crop, scale [0.9, 1.0]": lambda: crop((0.9, 1.0)),
        "crop, scale [0.4, 1.0]": lambda: crop(WIDE),
        "colours, ours": recolour_all,
        "colours, open_clip's by PIL": recolour_by_pil,
    }
    found: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(turns + 1):
        for name, work in parts.items():
            since = time.process_time()
            work()
            if turn:  # the first one warms up
                found[name].append(1e6 * (time.process_time() - since) / len(payloads))
    return {name: {"median": statistics.median(us), "least": min(us), "most": max(us)} for name, us in found.items()}


def measure_augmentations(args: argparse.Namespace) -> int:
    """The table of --augment."""
    with tempfile.TemporaryDirectory() as folder:
        found = augmentations(write_shards(Path(folder), args.num_images, args.images), args.turns, args.num_images)
    for name, us in found.items():
        print(f"{name:30} {us['median']:7.0f} us an image, of the processor (turns: {us['least']:.0f} to {us['most']:.0f})")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"images": args.num_images, "turns": args.turns, "from_px": SIDE, "to_px": SIZE, "load_average": os.getloadavg()[0]}
        content = {"environment": measure.environment("cpu"), **facts, "cpu_us_per_image": found}
        (args.out / "augment_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6, help="of each loader")
    parser.add_argument("--batches", type=int, default=4, help="of each turn")
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--images", type=Path, default=None, help="folder of JPEGs in place of generated ones")
    parser.add_argument("--core", type=int, default=0, help="the core that all processes share")
    parser.add_argument("--augment", action="store_true", help="what aug_cfg costs an image, in place of the loaders")
    parser.add_argument("--out", type=Path, default=None, help="folder for loader_cpu.json, or augment_cpu.json")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    torch.set_num_threads(1)
    if args.augment:
        return measure_augmentations(args)
    preprocess = towers.Preprocess()
    with tempfile.TemporaryDirectory() as folder:
        data = write_shards(Path(folder), args.num_images, args.images)
        size = sum(path.stat().st_size for path in (data / "train").glob("*.tar")) / args.num_images
        loaders = [
            Loader(OURS, lambda: ours(data), lambda batch: batch.image_uint8_BCHW),
            Loader(NORMALISED, lambda: ours(data), lambda batch: preprocess(batch.image_uint8_BCHW)),
            Loader(TRAIN, lambda: open_clip_trains(data), lambda batch: batch[0]),
            Loader(PLAIN, lambda: webdatasets(data), lambda batch: batch[0]),
        ]
        rows = []
        for turn in range(args.turns + 1):
            for loader in loaders:
                row = loader.turn(args.batches)
                if turn:  # the first one warms up
                    rows.append({**row, "turn": turn})
        found = summary(rows)
        for name, rate in found["samples_per_cpu_second"].items():
            wall = statistics.median(row["samples"] / row["wall_s"] for row in rows if row["variant"] == name)
            print(f"{name:18} {rate:8.1f} samples per CPU second  {wall:8.1f} per second on the clock")
        for name, ratio in found["ratios"].items():
            print(f"{name:36} {ratio['median']:.2f} (turns: {ratio['least']:.2f} to {ratio['most']:.2f})")
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            facts = {"bytes_per_sample": round(size), "batch": BATCH, "from_px": SIDE, "to_px": SIZE, "load_average": os.getloadavg()[0]}
            content = {"environment": measure.environment("cpu"), **facts, **found, "rows": rows}
            (args.out / "loader_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
        sys.stdout.flush()
        os._exit(0)  # the workers have no end of their own


if __name__ == "__main__":
    sys.exit(main())
