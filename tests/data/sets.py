"""Small data sets whose samples say where they are from: key, colour and captions."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mmlg_scale.data.corpus import Corpus, pairs_of
from mmlg_scale.data.indexing import index_dataset
from mmlg_scale.data.mixture import JoinedReader
from mmlg_scale.data.pipeline import Batch, StreamSettings
from mmlg_scale.recipe import Data
from mmlg_scale.sources import Source
from tests.data.damage import KINDS
from tests.data.specs import spec_for

About = Callable[[int], Mapping[str, Any]]
SIZES = {"small": 21, "middle": 46, "large": 150}
WEIGHTS = {"small": 0.2, "middle": 0.3, "large": 0.5}
DAMAGED = {"small": [], "middle": [9, 10], "large": [0, 77, 149]}
BATCH = 12


def write_set(root: Path, count: int, *, about: About | None = None, per_shard: int = 4, tokenizer: str = "none") -> Path:
    """A set of `count` training samples NAME-00000, ... and four each to validate and test, indexed as one from elsewhere.

    Args:
        about: the JSON of a training sample; none without it.
    """
    for split, number in (("train", count), ("val", 4), ("test", 4)):
        (root / split).mkdir(parents=True)
        for shard in range(-(-number // per_shard)):
            with tarfile.open(root / split / f"shard-{shard:06d}.tar", "w") as tar:
                for index in range(shard * per_shard, min(number, (shard + 1) * per_shard)):
                    image = io.BytesIO()
                    Image.new("RGB", (16, 16), (index % 256, len(root.name) * 20 % 256, index // 256)).save(image, "PNG")
                    _add(tar, f"{root.name}-{index:05d}.png", image.getvalue())
                    _add(tar, f"{root.name}-{index:05d}.txt", f"{root.name} number {index}".encode())
                    if about is not None and split == "train":
                        _add(tar, f"{root.name}-{index:05d}.json", json.dumps(about(index)).encode())
    index_dataset(root, tokenizer=tokenizer)
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def about(index: int) -> dict[str, Any]:
    """`alt` in every sample, `synthetic` (two) in two of three."""
    found: dict[str, Any] = {"alt": f"alternative {index}", "rest": 3}
    return found | ({"synthetic": [f"made up {index}", f"once more {index}"]} if index % 3 else {"synthetic": "  "})


def write_three_sets(folder: Path) -> Path:
    """Three sets of 6, 12 and 38 shards (so the last has three windows), the last two with damaged samples."""
    for name, size in SIZES.items():
        write_set(folder / name, size, about=about)
        for index in DAMAGED[name]:
            KINDS["image cut"][0](folder / name / "train", index // 4, index % 4)
    return folder


def mixture_of(root: Path, *names: str, **fields: Any) -> Data:
    chosen = [Source(str(root / name), weight) for name, weight in WEIGHTS.items() if not names or name in names]
    return Data(sources=chosen, **fields)


def batches(data: Data, root: Path, count: int, *, start_step: int = 0, record: Path | None = None, **options: Any) -> list[Batch]:
    settings = StreamSettings(**{"global_batch_size": BATCH, "seed": 5, "max_bad_fraction": 0.1, "check": "decode", **options})
    return list(islice(Corpus(pairs_of(data), spec_for(root / "small")).stream(settings, start_step, record=record), count))


def keys(data: Data, found: list[Batch]) -> list[list[str]]:
    """The keys of each batch's samples, from the tars."""
    reader = JoinedReader.of(pairs_of(data).training())

    def key(sample: int) -> str:
        source = reader.source(sample)
        return reader.readers[source].key(sample - int(reader.starts[source]))

    return [[key(sample) for sample in batch.indices_B.tolist()] for batch in found]


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.samples_BS, other.samples_BS)
        assert torch.equal(one.image_uint8_BCHW, other.image_uint8_BCHW)
        assert torch.equal(one.text_NT, other.text_NT)
