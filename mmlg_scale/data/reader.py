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

from mmlg_scale.data.images import PLAIN, check_decodes, check_png, decode, load_cheaply, random_resized_crop
from mmlg_scale.data.manifest import Location, locations
from mmlg_scale.errors import UserError
from mmlg_scale.towers import Preprocess

__all__ = ["REMEDIES", "DamagedSample", "Fault", "ShardReader", "check_decodes", "decode", "header_problem", "random_resized_crop"]

OPEN_SHARDS = 32
"""Files kept open: more than the shards that are mixed with each other."""

MISSING, CUT, HEADER = "missing shard", "cut shard", "tar header"
ENCODING, JSON, IMAGE, READ, HASH = "caption not UTF-8", "unreadable JSON", "undecodable image", "read error", "SHA-256"
REMEDIES = {
    MISSING: "copy the shard again",
    CUT: "copy the shard again",
    HEADER: "copy the shard again",
    ENCODING: "write the caption as UTF-8 and pack again",
    JSON: "fix the JSON and pack again",
    IMAGE: "replace the image and pack again",
    READ: "check the storage",
    HASH: "copy the shard again",
}
"""Every cause of damage with what to do about it."""


@dataclass(frozen=True)
class Fault:
    """A damaged sample: shard file, key, position in the split, one of the causes above, and what was found."""

    shard: str
    key: str
    index: int
    cause: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard} sample {self.key}: {self.cause} ({self.detail}); {REMEDIES[self.cause]}"


class DamagedSample(UserError):
    """A sample that cannot be read; `cause` is a key of REMEDIES."""

    def __init__(self, place: Location, cause: str, detail: str) -> None:
        super().__init__(f"{place.shard} sample {place.key}: {cause} ({detail}). Remedy: {REMEDIES[cause]}.")
        self.place, self.cause, self.detail = place, cause, detail

    def fault(self, index: int) -> Fault:
        """This damage as a record; `index` is the sample's position in the split."""
        return Fault(str(self.place.shard), self.place.key, index, self.cause, self.detail)


class ShardReader:
    """Random access to a split by seek: (image bytes, captions, label) of sample i. Every method may raise DamagedSample."""

    def __init__(self, folder: Path) -> None:
        self.places, self.shard_sizes = locations(folder)
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __len__(self) -> int:
        return len(self.places)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # open files do not travel to worker processes

    def part(self, start: int, stop: int) -> ShardReader:
        """A reader of its own, with its own open files, of samples start ... stop - 1."""
        reader = ShardReader.__new__(ShardReader)
        reader.places, reader.shard_sizes, reader._open = self.places[start:stop], [stop - start], OrderedDict()
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
                file = self._open[place.shard] = open(place.shard, "rb", buffering=0)  # noqa: SIM115
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
            except ValueError as error:
                raise DamagedSample(place, JSON, str(error)) from error
            if not isinstance(content, dict):
                raise DamagedSample(place, JSON, "no JSON object")
        captions = content.get("captions")
        if captions is None and place.text is not None:
            captions = [self._text(place, place.text, "txt").strip()]
        if captions is None:
            captions = [content.get("caption")]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise DamagedSample(place, JSON, "no captions, or an empty one")
        label = content.get("label")
        return {"captions": captions, "label": label if isinstance(label, int) else None}

    def check_text(self, index: int) -> None:
        """Read captions and label, and the text also where the captions come from the JSON."""
        self.about(index)
        place = self.places[index]
        if place.text is not None:
            self._text(place, place.text, "txt")

    def _text(self, place: Location, part: tuple[int, int], extension: str) -> str:
        payload = self._read(place, *part)
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedSample(place, ENCODING, f".{extension}, byte {error.start}") from error


def header_problem(header: bytes, name: str, size: int) -> str | None:
    """What is wrong with a tar header block of 512 bytes (POSIX.1-1988 ustar) that should announce `name` with `size` bytes.

    The checksum is the sum of all bytes, those of its own field counted as spaces.
    """
    stored = header[148:156].strip(b"\0 ")
    try:
        expected = int(stored, 8)
    except ValueError:
        return "no checksum"
    if sum(header) - sum(header[148:156]) + 8 * 32 != expected:
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
