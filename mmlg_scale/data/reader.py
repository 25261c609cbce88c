"""Samples by their place in a shard, each read checked: what is damaged raises `DamagedSample` with its cause.

Reading goes by the manifest's offsets, so damage in one place never hides what lies behind it. Files are read by `pread`, not mapped:
a mapped file that is cut or whose disk fails while a run reads it would kill the process instead of raising.
"""

from __future__ import annotations

import functools
import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmlg_scale.bounds import MAX_CAPTION, MAX_IMAGE_BYTES, MAX_SAMPLE_TEXT_BYTES
from mmlg_scale.data.images import PLAIN, check_decodes, check_png, decode, load_cheaply, random_resized_crop
from mmlg_scale.data.manifest import BLOCK, Location, locations
from mmlg_scale.digests import content_digest
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, open_regular, shown
from mmlg_scale.towers import Preprocess

__all__ = ["REMEDIES", "DamagedSample", "Fault", "ShardReader", "check_decodes", "decode", "header_problem", "random_resized_crop"]

OPEN_SHARDS = 32
"""Files kept open: more than the shards that are mixed with each other."""

MISSING, CUT, HEADER, LONG = "missing shard", "cut shard", "tar header", "caption too long"
ENCODING, JSON, IMAGE, READ, HASH = "caption not UTF-8", "unreadable JSON", "undecodable image", "read error", "SHA-256"
REMEDIES = {
    MISSING: "copy the shard again",
    CUT: "copy the shard again",
    HEADER: "copy the shard again",
    ENCODING: "write the caption as UTF-8 and pack again",
    LONG: "shorten the caption and pack again",
    JSON: "fix the JSON and pack again",
    IMAGE: "replace the image and pack again",
    READ: "check the storage",
    HASH: "copy the shard again",
}
"""Every cause of damage with what to do about it."""
CHANGED_BYTES = "the bytes are not those that were packed or indexed"


@dataclass(frozen=True)
class Fault:
    """A damaged sample: shard file, key, position in the split, one of the causes above, and what was found."""

    shard: str
    key: str
    index: int
    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard} sample {shown(self.key)}: {self.cause} ({shown(self.detail)}); {REMEDIES[self.cause]}"


class DamagedSample(UserError):
    """A sample that cannot be read; `cause` is a key of REMEDIES."""

    def __init__(self, place: Location, cause: str, detail: str) -> None:
        super().__init__(f"{place.shard} sample {shown(place.key)}: {cause} ({shown(detail)}). Remedy: {REMEDIES[cause]}.")
        self.place, self.cause, self.detail = place, cause, detail

    def fault(self, index: int) -> Fault:
        """This damage as a record; `index` is the sample's position in the split."""
        return Fault(str(self.place.shard), self.place.key, index, self.cause, self.detail)


class ShardReader:
    """Random access to a split by seek: (image bytes, captions, label) of sample i. Every method may raise DamagedSample."""

    def __init__(self, folder: Path) -> None:
        self.places, self.shards = locations(folder)
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files do not travel to worker processes

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard."""
        return [shard.num_samples for shard in self.shards]

    def part(self, start: int, stop: int) -> ShardReader:
        """A reader of its own, with its own open files, of samples start ... stop - 1."""
        reader = ShardReader.__new__(ShardReader)
        reader.places, reader._open = self.places[start:stop], OrderedDict()
        reader.shards = [shard for shard in self.shards if start < stop and shard.file == self.places[start].shard]
        return reader

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # not so where the constructor failed
            self.close()

    def _file(self, place: Location) -> BinaryIO:
        file = self._open.get(place.shard)
        if file is None:
            try:
                file = self._open[place.shard] = open_regular(place.shard, buffering=0)
            except FileNotFoundError as error:
                raise DamagedSample(place, MISSING, "no such file") from error
            except OSError as error:
                raise DamagedSample(place, READ, str(error)) from error
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(place.shard)
        return file

    def _read(self, place: Location, offset: int, size: int) -> bytes:
        file = self._file(place)
        try:
            payload = os.pread(file.fileno(), size, offset)
            while 0 < len(payload) < size:  # one read gives at most 2 GiB, and less over some network file systems
                more = os.pread(file.fileno(), size - len(payload), offset + len(payload))
                if not more:
                    break
                payload += more
        except OSError as error:
            raise DamagedSample(place, READ, str(error)) from error
        if len(payload) < size:
            raise DamagedSample(
                place, CUT, f"bytes {offset} to {offset + size} are wanted, the file ends at {os.fstat(file.fileno()).st_size}"
            )
        return payload

    def check_headers(self, index: int) -> None:
        """Compare the tar header before each member with the manifest: checksum, name, size."""
        place = self.places[index]
        for extension, part in ((place.extension, place.image), ("txt", place.text), ("json", place.json)):
            if part is not None:
                problem = header_problem(self._read(place, part[0] - 512, 512), f"{place.key}.{extension}", part[1])
                if problem:
                    raise DamagedSample(place, HEADER, f".{extension}: {problem}")
                # Headers, and so the end of the data too: a shard can be cut inside the last member.
                self._read(place, part[0] + max(0, part[1] - 1), min(1, part[1]))

    def image_bytes(self, index: int) -> bytes:
        """The encoded image as packed."""
        place = self.places[index]
        if place.image[1] > MAX_IMAGE_BYTES:
            raise DamagedSample(place, IMAGE, f"{place.image[1]} bytes, more than the {MAX_IMAGE_BYTES:,} that are read")
        return self._read(place, *place.image)

    def image(self, index: int, image_size: int, *, preprocess: Preprocess = PLAIN, draft: bool = False) -> np.ndarray:
        """The image as a model with this preprocessing sees it: uint8 [H, W, 3]; `draft` as in `decode`."""
        return self._decoded(index, functools.partial(decode, image_size=image_size, preprocess=preprocess, draft=draft))

    def crop(self, index: int, image_size: int, generator: np.random.Generator, *, preprocess: Preprocess = PLAIN) -> np.ndarray:
        """A random crop of the whole image: uint8 [H, W, 3]; see `random_resized_crop`."""
        return self._decoded(
            index, functools.partial(random_resized_crop, image_size=image_size, generator=generator, preprocess=preprocess)
        )

    def check_image(self, index: int) -> None:
        """Decode the image, no further than it takes to know that all of it is there."""
        self._decoded(index, load_cheaply)

    def _decoded(self, index: int, decoder: Any) -> Any:
        payload = self.image_bytes(index)
        try:
            check_png(payload)
            return decoder(payload)
        except Exception as error:  # of damaged bytes PIL's plugins raise nearly anything: struct.error, EOFError, SyntaxError, ...
            raise DamagedSample(self.places[index], IMAGE, " ".join(str(error).split())) from error

    def about(self, index: int) -> dict[str, Any]:
        """{"captions": [...], "label": int | None}: from the JSON's `captions`, else from the text, else from the JSON's `caption`."""
        place = self.places[index]
        content: Any = {}
        if place.json is not None:
            try:
                content = json.loads(self._text(place, place.json, "json"))
            except (ValueError, RecursionError) as error:
                raise DamagedSample(place, JSON, one_line(error)) from error
            if not isinstance(content, dict):
                raise DamagedSample(place, JSON, "no JSON object")
        captions = content.get("captions")
        if captions is None and place.text is not None:
            captions = [self._text(place, place.text, "txt").strip()]
        if captions is None:
            captions = [content.get("caption")]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise DamagedSample(place, JSON, "no captions, or an empty one")
        longest = max(map(len, captions))
        if longest > MAX_CAPTION:
            raise DamagedSample(place, LONG, f"{longest} characters, at most {MAX_CAPTION} are supported")
        label = content.get("label")
        return {"captions": captions, "label": label if type(label) is int and abs(label) < 2**31 else None}

    def is_changed(self, shard: int) -> bool:
        """Whether the bytes of a shard are not those that the manifest's SHA-256 is of; False also where it cannot be read."""
        try:
            return content_digest(self.shards[shard].file) != self.shards[shard].sha256
        except OSError:
            return False

    def check_text(self, index: int) -> None:
        """Read captions and label, and the text also where the captions come from the JSON."""
        self.about(index)
        place = self.places[index]
        if place.text is not None:
            self._text(place, place.text, "txt")

    def _text(self, place: Location, part: tuple[int, int], extension: str) -> str:
        if part[1] > MAX_SAMPLE_TEXT_BYTES:
            raise DamagedSample(place, LONG, f".{extension} of {part[1]} bytes, at most {MAX_SAMPLE_TEXT_BYTES:,} are read")
        payload = self._read(place, *part)
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedSample(place, ENCODING, f".{extension}, byte {error.start}") from error


def header_checksum(header: bytes) -> bool:
    """Whether a block of 512 bytes has the checksum of a tar header: the sum of all bytes, those of its own field counted as spaces."""
    stored = header[148:156].strip(b"\0 ")
    if len(header) != BLOCK or not stored.isdigit():
        return False
    try:
        return sum(header) - sum(header[148:156]) + 8 * 32 == int(stored, 8)
    except ValueError:
        return False


def header_problem(header: bytes, name: str, size: int) -> str | None:
    """What is wrong with a tar header block of 512 bytes (POSIX.1-1988 ustar) that should announce `name` with `size` bytes."""
    if not header_checksum(header):
        return "wrong checksum"
    field = header[124:136]
    try:
        found = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return "unreadable size"
    if found != size:
        return f"announces {found} bytes, the manifest says {size}"
    short = header[:100].rstrip(b"\0").decode("utf-8", "replace")
    prefix = header[345:500].rstrip(b"\0").decode("utf-8", "replace") if header[257:262] == b"ustar" else ""
    told = f"{prefix}/{short}" if prefix else short
    # Names that are long or not ASCII are in an extended header; what is here is a shortened or mangled copy.
    if name.isascii() and len(name) < 100 and told.lower() != name.lower():
        return f"belongs to {told!r}"
    return None
