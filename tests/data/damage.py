"""Ways to damage one sample of a packed split, each with the cause under which it must be counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mmlg_scale.data.manifest import Location
from mmlg_scale.data.reader import CUT, ENCODING, HEADER, IMAGE, JSON, MISSING, ShardReader

Damage = Callable[[Path, int, int], set[int]]
"""(split, shard, position in it) -> the positions in the shard that are lost by damaging that one."""


def overwrite(split: Path, shard: int, offset: int, payload: bytes) -> None:
    with open(ShardReader(split).shards.path(shard), "r+b") as file:
        file.seek(offset)
        file.write(payload)


def sample_of(split: Path, shard: int, position: int) -> Location:
    reader = ShardReader(split)
    return reader.place(int(reader.shards.starts[shard]) + position)


def header(member: str) -> Damage:
    def damage(split: Path, shard: int, position: int) -> set[int]:
        offset, _ = getattr(sample_of(split, shard, position), member)
        overwrite(split, shard, offset - 512 + 3, b"\xff")  # one byte of the name
        return {position}

    return damage


def image_zeroed(split: Path, shard: int, position: int) -> set[int]:
    offset, _ = sample_of(split, shard, position).image
    overwrite(split, shard, offset, bytes(20))
    return {position}


def image_cut(split: Path, shard: int, position: int) -> set[int]:
    """As a download that ended early and was filled up with zeros."""
    offset, size = sample_of(split, shard, position).image
    overwrite(split, shard, offset + size // 2, bytes(size - size // 2))
    return {position}


def caption_not_utf8(member: str) -> Damage:
    def damage(split: Path, shard: int, position: int) -> set[int]:
        offset, _ = getattr(sample_of(split, shard, position), member)
        overwrite(split, shard, offset + 18, b"\xe9")  # Latin-1, inside the first caption of the JSON
        return {position}

    return damage


def json_cut(split: Path, shard: int, position: int) -> set[int]:
    offset, size = sample_of(split, shard, position).json or (0, 0)
    overwrite(split, shard, offset + size - 5, b"     ")
    return {position}


def json_empty(split: Path, shard: int, position: int) -> set[int]:
    offset, size = sample_of(split, shard, position).json or (0, 0)
    overwrite(split, shard, offset, json.dumps({"captions": []}).encode().ljust(size))
    return {position}


def shard_cut(split: Path, shard: int, position: int) -> set[int]:
    """The file ends inside the image of the sample."""
    place, shards = sample_of(split, shard, position), ShardReader(split).shards
    with open(place.shard, "r+b") as file:
        file.truncate(place.image[0] + place.image[1] // 2)
    return set(range(position, int(shards.samples[shard])))


def shard_missing(split: Path, shard: int, position: int) -> set[int]:
    shards = ShardReader(split).shards
    shards.path(shard).unlink()
    return set(range(int(shards.samples[shard])))


KINDS: dict[str, tuple[Damage, str]] = {
    "image header": (header("image"), HEADER),
    "json header": (header("json"), HEADER),
    "text header": (header("text"), HEADER),
    "image zeroed": (image_zeroed, IMAGE),
    "image cut": (image_cut, IMAGE),
    "caption in json": (caption_not_utf8("json"), ENCODING),
    "caption in text": (caption_not_utf8("text"), ENCODING),
    "json cut": (json_cut, JSON),
    "json without captions": (json_empty, JSON),
    "shard cut": (shard_cut, CUT),
    "shard missing": (shard_missing, MISSING),
}
