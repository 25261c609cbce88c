"""Samples by their place in a shard, each read checked: what is damaged raises `DamagedSample` with its cause.

Reading goes by the offsets in the shard's index, so damage in one place never hides what lies behind it. Files are read by `pread`, not
mapped: a mapped file that is cut or whose disk fails while a run reads it would kill the process instead of raising.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mmlg_scale.bounds import MAX_CAPTION, MAX_IMAGE_BYTES, MAX_SAMPLE_TEXT_BYTES
from mmlg_scale.data.images import PLAIN, check_decodes, check_png, decode, load_cheaply, random_resized_crop
from mmlg_scale.data.index import (
    BLOCK,
    EXTENSIONS,
    LABELLED,
    NAMES_ONLY,
    PLAIN_KEY,
    RECORD,
    index_path,
    key_checksum,
    read_index,
    records_in,
)
from mmlg_scale.data.manifest import Location, Shards, load_shards
from mmlg_scale.data.store import RemoteFile, Store, StoreError
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, open_regular, shown
from mmlg_scale.towers import Preprocess

__all__ = ["REMEDIES", "DamagedSample", "Fault", "ShardReader", "check_decodes", "decode", "header_problem", "random_resized_crop"]

OPEN_SHARDS = 32
"""Files and indexes that are kept: more than the shards that are mixed with each other."""
OPEN_COPIES = 16
"""Of remote shards: no more than are mixed, since a copy that is open takes its place on the disk even where it has been removed."""
TEXT = "txt"
"""The name by which a sample's text is asked for beside keys of its JSON."""
KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
"""webdataset's rule for a member's name: the key is all up to the first dot of the base name."""

MISSING, CUT, HEADER, LONG = "missing shard", "cut shard", "tar header", "caption too long"
FILE = "damaged file"
"""Of a set, besides its shards."""
ENCODING, JSON, IMAGE, READ, HASH = "caption not UTF-8", "unreadable JSON", "undecodable image", "read error", "SHA-256"
LABEL = "bad label"
REMEDIES = {
    MISSING: "copy the shard again",
    CUT: "copy the shard again",
    HEADER: "copy the shard again",
    FILE: "copy it again, or pack the set again",
    ENCODING: "write the caption as UTF-8 and pack again",
    LONG: "shorten the caption and pack again",
    JSON: "fix the JSON and pack again",
    LABEL: "write the class as a number from 0 and index again",
    IMAGE: "replace the image and pack again",
    READ: "check the storage",
    HASH: "copy the shard again",
}
"""Every cause of damage with what to do about it."""
_CLASS = re.compile(rb"[ \t\r\n]*([0-9]{1,9})[ \t\r\n]*")
MAX_LABEL_BYTES = 64
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
    """A sample that cannot be read; `fault` says which, where and why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(
            f"{fault.shard} sample {shown(fault.key)}: {fault.cause} ({shown(fault.detail)}). Remedy: {REMEDIES[fault.cause]}."
        )
        self.fault, self.cause, self.detail = fault, fault.cause, fault.detail


def open_shard(path: Path) -> BinaryIO:
    """Open a shard of this machine for `pread`. Raises OSError."""
    return open_regular(path, buffering=0)


def open_remote(store: Store, file: RemoteFile) -> BinaryIO:
    """Open the copy of a remote file. Raises StoreError where it cannot be downloaded, UserError where the cache's disk fails."""
    try:
        return store.open(file)
    except StoreError:
        raise
    except OSError as error:
        told = error.strerror or one_line(error)
        folder = store.cache.keys.folder if store.cache is not None else ""
        raise UserError(f"{folder}: copies of {store.root} cannot be kept ({error.filename}: {told}). Give another folder.") from error


class _Spot(NamedTuple):
    """A sample by its shard, and its record in plain numbers."""

    shard: int
    position: int
    image: tuple[int, int]
    text: tuple[int, int] | None
    json: tuple[int, int] | None
    key: int
    lead: int
    extension: str
    flags: int


class ShardReader:
    """Random access to a split by seek: (image bytes, captions, label) of sample i. Every method may raise DamagedSample.

    What it holds grows with the number of shards; indexes and files of the few shards that are being read are kept open.

    Args:
        folder: the split; of a remote set, the copy of its manifest.
        store: where its shards are, if not in `folder`.

    Raises:
        UserError: no manifest, or a damaged one; while reading, a missing or damaged index.
    """

    def __init__(self, folder: Path, store: Store | None = None) -> None:
        self.shards = load_shards(folder, store)
        self._open, self._indexes = OrderedDict[int, BinaryIO](), OrderedDict[int, np.ndarray]()
        self.limit_open(OPEN_SHARDS)

    @classmethod
    def of_shards(cls, shards: Shards, records: dict[int, np.ndarray] | None = None) -> ShardReader:
        """A reader of shards that no manifest lists yet, by the records of each."""
        reader = cls.__new__(cls)
        reader.shards, reader._open, reader._indexes = shards, OrderedDict(), OrderedDict(records or {})
        reader.limit_open(OPEN_SHARDS)
        return reader

    def limit_open(self, count: int) -> None:
        """Keep at most so many shards open; indexes are kept all the same."""
        self._most_open = min(count, OPEN_SHARDS if self.shards.store is None else OPEN_COPIES)

    def __len__(self) -> int:
        return int(self.shards.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to worker processes, nor need indexes.
        return {**vars(self), "_open": OrderedDict(), "_indexes": OrderedDict()}

    def clone(self) -> ShardReader:
        """A reader of the same split with open files of its own, for another thread."""
        return ShardReader.of_shards(self.shards)

    def close(self) -> None:
        """Close the shards; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()
        self._indexes.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # not so where the constructor failed
            self.close()

    def records(self, shard: int) -> np.ndarray:
        """The index of a shard: RECORD [N]. Raises UserError where it is missing or damaged, StoreError where it cannot be downloaded."""
        found = self._indexes.get(shard)
        if found is None:
            of = self.shards
            wanted = int(of.samples[shard]), int(of.num_bytes[shard]), of.indexes[shard]
            if of.store is None:
                found = read_index(index_path(of.folder, of.names[shard]), *wanted)
            else:
                found = _remote_index(of.store, of.index_file(shard), *wanted)
            self._indexes[shard] = found
            if len(self._indexes) > OPEN_SHARDS:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return found

    def locate(self, samples_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shard [N] and the record, RECORD [N], of each of many samples."""
        shards_N = np.searchsorted(self.shards.starts, samples_N, side="right") - 1
        found_N = np.empty(len(samples_N), RECORD)
        order_N = np.argsort(shards_N, kind="stable")
        names, firsts = np.unique(shards_N[order_N], return_index=True)
        for shard, rows in zip(names.tolist(), np.split(order_N, firsts[1:]), strict=True):
            found_N[rows] = self.records(shard)[samples_N[rows] - self.shards.starts[shard]]
        return shards_N, found_N

    def place(self, index: int) -> Location:
        """Where a sample lies, with its key: for people, and for tests."""
        spot = self._spot(index)
        return Location(self.shards.path(spot.shard), self._key(spot), spot.extension, spot.image, spot.text, spot.json)

    def key(self, index: int) -> str:
        """A sample's key, read from the tar; where it cannot be read, the sample's number in the shard, after a #."""
        of, shard = self.shards, int(np.searchsorted(self.shards.starts, index, side="right")) - 1
        if of.store is not None and not of.store.has(of.index_file(shard)):
            return f"#{index - int(of.starts[shard])}"  # nothing is fetched for a message
        return self._key(self._spot(index))

    def _spot(self, index: int) -> _Spot:
        shard = int(np.searchsorted(self.shards.starts, index, side="right")) - 1
        position = index - int(self.shards.starts[shard])
        try:
            record = self.records(shard)[position]
        except StoreError as error:
            raise DamagedSample(Fault(self.shards.told(shard), f"#{position}", index, READ, str(error))) from error
        image, text, about, image_size, text_size, json_size, key, lead, extension, flags = record.item()
        return _Spot(
            shard,
            position,
            (image, image_size),
            (text, text_size) if text else None,
            (about, json_size) if about else None,
            key,
            lead,
            EXTENSIONS[extension],
            flags,
        )

    def _key(self, spot: _Spot) -> str:
        if self.shards.store is not None and not self.shards.store.has(self.shards.file(spot.shard)):
            return f"#{spot.position}"
        lead = max(1, spot.lead)
        for part, blocks in ((spot.image, lead), (spot.text, 1), (spot.json, 1)):
            if part is None:
                continue
            try:
                header = self._pread(spot.shard, part[0] - blocks * BLOCK, blocks * BLOCK)
                with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
                    named = KEY.match((tar.next() or tarfile.TarInfo("")).name)
            except Exception:  # of headers that are damaged, or made to damage, tarfile raises nearly anything  # noqa: S112
                continue
            if named is not None and (key_checksum(named[1]) == spot.key or not spot.flags & PLAIN_KEY):
                return named[1]
        return f"#{spot.position}"

    def _damaged(self, spot: _Spot, cause: str, detail: str) -> DamagedSample:
        shard = self.shards.told(spot.shard)
        index = int(self.shards.starts[spot.shard]) + spot.position
        return DamagedSample(Fault(shard, self._key(spot), index, cause, detail))

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        """Raises OSError."""
        file = self._open.get(shard)
        if file is None:
            of = self.shards
            file = open_shard(of.path(shard)) if of.store is None else open_remote(of.store, of.file(shard))
            self._open[shard] = file
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        payload = os.pread(file.fileno(), size, offset)
        while 0 < len(payload) < size:  # one read gives at most 2 GiB, and less over some network file systems
            more = os.pread(file.fileno(), size - len(payload), offset + len(payload))
            if not more:
                break
            payload += more
        return payload

    def _read(self, spot: _Spot, offset: int, size: int) -> bytes:
        try:
            payload = self._pread(spot.shard, offset, size)
        except FileNotFoundError as error:
            raise self._damaged(spot, MISSING, "no such file") from error
        except OSError as error:
            raise self._damaged(spot, READ, str(error)) from error
        if len(payload) < size:
            end = os.fstat(self._open[spot.shard].fileno()).st_size
            raise self._damaged(spot, CUT, f"bytes {offset} to {offset + size} are wanted, the file ends at {end}")
        return payload

    def check_headers(self, index: int) -> None:
        """Compare the tar header before each member with the index: checksum, name, size."""
        spot = self._spot(index)
        key = spot.key if spot.flags & PLAIN_KEY else None
        about = None if spot.flags & NAMES_ONLY else spot.json
        told = "cls" if spot.flags & LABELLED else "json"
        for extension, part in ((spot.extension, spot.image), ("txt", spot.text), (told, about)):
            if part is not None:
                problem = header_problem(self._read(spot, part[0] - BLOCK, BLOCK), extension, part[1], key)
                if problem:
                    raise self._damaged(spot, HEADER, f".{extension}: {problem}")
                # Headers, and so the end of the data too: a shard can be cut inside the last member.
                self._read(spot, part[0] + max(0, part[1] - 1), min(1, part[1]))

    def image_bytes(self, index: int) -> bytes:
        """The encoded image as packed."""
        spot = self._spot(index)
        if spot.image[1] > MAX_IMAGE_BYTES:
            raise self._damaged(spot, IMAGE, f"{spot.image[1]} bytes, more than the {MAX_IMAGE_BYTES:,} that are read")
        return self._read(spot, *spot.image)

    def image(self, index: int, image_size: int, *, preprocess: Preprocess = PLAIN, draft: bool = False) -> np.ndarray:
        """The image as a model with this preprocessing sees it: uint8 [H, W, 3]; `draft` as in `decode`."""
        return self._decoded(index, functools.partial(decode, image_size=image_size, preprocess=preprocess, draft=draft))

    def crop(self, index: int, image_size: int, generator: np.random.Generator, **options: Any) -> np.ndarray:
        """A random crop of the whole image: uint8 [H, W, 3]; see `random_resized_crop`, which takes the options."""
        return self._decoded(index, functools.partial(random_resized_crop, image_size=image_size, generator=generator, **options))

    def check_image(self, index: int) -> None:
        """Decode the image, no further than it takes to know that all of it is there."""
        self._decoded(index, load_cheaply)

    def _decoded(self, index: int, decoder: Any) -> Any:
        payload = self.image_bytes(index)
        try:
            check_png(payload)
            return decoder(payload)
        except Exception as error:  # of damaged bytes PIL's plugins raise nearly anything: struct.error, EOFError, SyntaxError, ...
            raise self._damaged(self._spot(index), IMAGE, " ".join(str(error).split())) from error

    def about(self, index: int, names: Sequence[str] = ()) -> dict[str, Any]:
        """{"captions": [...], "label": int | None}: from the JSON's `captions`, else from the text, else from the JSON's `caption`.

        With `names` also "named", in that order the list of captions under each of these keys of the JSON (a text, or a list of texts),
        `txt` being the sample's text: empty where there is none. A sample of an image and a .cls has a label, and no captions.
        """
        spot = self._spot(index)
        content: Any = {}
        if spot.json is not None and spot.flags & LABELLED:
            content = {"label": self._class(spot, *spot.json)}
            if spot.text is None:
                return content | {"captions": []} | ({"named": [[] for _ in names]} if names else {})
        elif spot.json is not None and (names or not spot.flags & NAMES_ONLY):
            try:
                content = json.loads(self._text(spot, spot.json, "json"))
            except (ValueError, RecursionError) as error:
                raise self._damaged(spot, JSON, one_line(error)) from error
            if not isinstance(content, dict):
                raise self._damaged(spot, JSON, "no JSON object")
        captions = content.get("captions")
        if captions is None and spot.text is not None:
            captions = [self._text(spot, spot.text, "txt").strip()]
        if captions is None:
            captions = [content.get("caption")]
        if isinstance(captions, list):
            captions = [text for text in captions if not (isinstance(text, str) and not text.strip())]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text.strip() for text in captions):
            raise self._damaged(spot, JSON, "no captions, or only empty ones")
        named = list[list[str]]()
        for name in names:
            given = self._text(spot, spot.text, "txt").strip() if name == TEXT and spot.text is not None else content.get(name)
            texts = given if isinstance(given, list) else [given]
            named.append([text for text in texts if isinstance(text, str) and text.strip()])
        longest = max(len(text) for texts in (captions, *named) for text in texts)
        if longest > MAX_CAPTION:
            raise self._damaged(spot, LONG, f"{longest} characters, at most {MAX_CAPTION} are supported")
        label = content.get("label")
        found = {"captions": captions, "label": label if type(label) is int and abs(label) < 2**31 else None}
        return found | {"named": named} if names else found

    def _class(self, spot: _Spot, offset: int, size: int) -> int:
        """The number in a .cls."""
        found = _CLASS.fullmatch(self._read(spot, offset, size)) if size <= MAX_LABEL_BYTES else None
        if found is None:
            told = f"{size} bytes" if size > MAX_LABEL_BYTES else repr(shown(self._read(spot, offset, size).decode("utf-8", "replace")))
            raise self._damaged(spot, LABEL, f".cls: {told} is no class number from 0")
        return int(found[1])

    def is_changed(self, shard: int) -> bool:
        """Whether the bytes of a shard are not those that the manifest's SHA-256 is of; False also where it cannot be read.

        Of a remote shard they never are: its copy would not be there.
        """
        if self.shards.store is not None:
            return False
        try:
            with open_shard(self.shards.path(shard)) as file:
                return content_digest(file) != self.shards.sha256[shard]
        except OSError:
            return False

    def check_text(self, index: int) -> None:
        """Read captions and label, and the text also where the captions come from the JSON."""
        self.about(index)
        spot = self._spot(index)
        if spot.text is not None:
            self._text(spot, spot.text, "txt")

    def _text(self, spot: _Spot, part: tuple[int, int], extension: str) -> str:
        if part[1] > MAX_SAMPLE_TEXT_BYTES:
            raise self._damaged(spot, LONG, f".{extension} of {part[1]} bytes, at most {MAX_SAMPLE_TEXT_BYTES:,} are read")
        payload = self._read(spot, *part)
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(spot, ENCODING, f".{extension}, byte {error.start}") from error


def _remote_index(store: Store, file: RemoteFile, num_samples: int, num_bytes: int, digest: str) -> np.ndarray:
    with open_remote(store, file) as opened:
        try:
            return records_in(opened, num_samples, num_bytes, digest)
        except (OSError, ValueError) as error:
            raise UserError(f"index {store.url(file.name)} is damaged: {one_line(error)}. Index the set again, where it is.") from error


def content_digest(file: BinaryIO) -> str:
    """SHA-256 of an open file from its present position on. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def header_checksum(header: bytes) -> bool:
    """Whether a block of 512 bytes has the checksum of a tar header: the sum of all bytes, those of its own field counted as spaces."""
    stored = header[148:156].strip(b"\0 ")
    if len(header) != BLOCK or not stored.isdigit():
        return False
    try:
        return sum(header) - sum(header[148:156]) + 8 * 32 == int(stored, 8)
    except ValueError:
        return False


def header_problem(header: bytes, extension: str, size: int, key: int | None) -> str | None:
    """What is wrong with a tar header block of 512 bytes (POSIX.1-1988 ustar).

    Args:
        extension, size: of the member that it should announce.
        key: checksum of the member's key; None where the header need not hold the whole of it.
    """
    if not header_checksum(header):
        return "wrong checksum"
    field = header[124:136]
    try:
        found = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return "unreadable size"
    if found != size:
        return f"announces {found} bytes, the index says {size}"
    if key is not None:
        short = header[:100].rstrip(b"\0").decode("utf-8", "replace")
        prefix = header[345:500].rstrip(b"\0").decode("utf-8", "replace") if header[257:262] == b"ustar" else ""
        told = f"{prefix}/{short}" if prefix else short
        named = KEY.match(told)
        if named is None or key_checksum(named[1]) != key or named[2].lower() != extension:
            return f"belongs to {told!r}"
    return None
