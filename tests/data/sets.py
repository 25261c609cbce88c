"""Small data sets whose samples say where they are from: key, colour and captions."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmlg_scale.data.indexing import index_dataset

About = Callable[[int], Mapping[str, Any]]


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
