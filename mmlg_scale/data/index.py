"""The binary index of a shard: a record of fixed width per sample that says where the sample's members lie.

It is an ordinary .npy file, SPLIT/index/NAME.npy for the shard NAME.tar, whose digest the manifest holds. Keys are not in it: whoever needs
one reads it from the tar (`reader.ShardReader.key`), and a checksum of the key tells whether a tar header belongs to its sample.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmlg_scale.errors import UserError
from mmlg_scale.files import write_bytes_atomic
from mmlg_scale.reading import one_line, open_regular

INDEX_FOLDER = "index"
BLOCK = 512
"""Of a tar: headers and data begin at its multiples."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
"""Of images. A record holds the number of one: append, never reorder."""
PLAIN_KEY = 1
"""Flag: the tar headers of the sample hold its whole key, so that they can be compared with it."""
NAMES_ONLY = 2
"""Flag: the captions are in the text; the JSON is read only where captions are asked for by its keys."""
LABELLED = 4
"""Flag: in the JSON's place is a .cls, a class number as text; there are no captions but the text."""
RECORD = np.dtype(
    [
        ("image", "<u8"),
        ("text", "<u8"),
        ("json", "<u8"),
        ("image_size", "<u4"),
        ("text_size", "<u4"),
        ("json_size", "<u4"),
        ("key", "<u4"),
        ("lead", "<u2"),
        ("extension", "u1"),
        ("flags", "u1"),
    ]
)
"""Offsets and sizes in bytes of image, .txt and .json (or .cls), at least one of the last two (offset 0: none); CRC-32 of the key; blocks
of 512 bytes that the image's tar headers take (0: unknown); number in EXTENSIONS; flags. 44 bytes."""
MAX_SHARD_SAMPLES = 1_000_000
MAX_MEMBER_BYTES = 2**32 - 1
MAX_LEAD = 64
"""Blocks of headers that are read to find a key."""
_DIGEST_LETTERS = 32
"""Hexadecimal digits of the index's SHA-256 that the manifest holds: 128 bits, so that 100,000 shards stay below 20 MB."""


def index_path(folder: Path, shard_name: str) -> Path:
    """The index of a shard of the split `folder`; `shard_name` as the manifest gives it."""
    return folder / index_name(shard_name)


def index_name(shard_name: str) -> str:
    """A shard's index, relative to its split."""
    return f"{INDEX_FOLDER}/{Path(shard_name).name.removesuffix('.tar')}.npy"


def index_bytes(num_samples: int) -> int:
    """How large the index of so many samples is."""
    return len(_header(num_samples)) + num_samples * RECORD.itemsize


def key_checksum(key: str) -> int:
    """What a record holds of its key."""
    return zlib.crc32(key.encode("utf-8", "surrogateescape"))


NAMES = "names"
"""In place of a JSON's extension: see NAMES_ONLY."""
LABEL = "cls"
"""Likewise: see LABELLED."""
_FLAGS = {NAMES: NAMES_ONLY, LABEL: LABELLED}


class RecordBuilder:
    """Collects the members of a shard, in any order, into records in the order in which the keys appear."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[str, tuple[int, int, int, str]]] = {}

    def add(self, key: str, kind: str, extension: str, header: int, offset: int, size: int) -> bool:
        """Note a member: `kind` is image, text or json, `header` where its first tar header begins; False where the key has one already."""
        members = self._samples.setdefault(key, {})
        if kind in members:
            return False
        members[kind] = (header, offset, size, extension)
        return True

    def samples(self) -> dict[str, dict[str, tuple[int, int, int, str]]]:
        """By key, and kind: header, offset, size, extension. What is removed from it is not in the records."""
        return self._samples

    def records(self) -> np.ndarray:
        """RECORD [N] of the samples that have an image and a text or a JSON."""
        whole = [(key, one) for key, one in self._samples.items() if "image" in one and ("text" in one or "json" in one)]
        records = np.zeros(len(whole), RECORD)
        for position, (key, members) in enumerate(whole):
            header, offset, _, extension = members["image"]
            lead = (offset - header) // BLOCK if header else 1
            record = records[position]
            for kind, member in members.items():
                record[kind], record[f"{kind}_size"] = member[1], member[2]
            record["key"], record["extension"] = key_checksum(key), EXTENSIONS.index(extension.lower())
            record["lead"] = lead if lead <= MAX_LEAD else 0
            # Names that are long or not ASCII are in extended headers: the header proper has a shortened or mangled copy.
            record["flags"] = PLAIN_KEY if key.isascii() and len(key) + 6 < 100 else 0
            record["flags"] |= _FLAGS.get(members["json"][3], 0) if "json" in members else 0
        return records


def _header(num_samples: int) -> bytes:
    """The header of the .npy file, version 1.0. Written and compared letter by letter, so that no parser meets a stranger's file."""
    text = f"{{'descr': {RECORD.descr!r}, 'fortran_order': False, 'shape': ({num_samples},), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"  # data begin at a multiple of 64
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def index_content(records: np.ndarray) -> bytes:
    """The bytes of an index file."""
    return _header(len(records)) + records.tobytes()


def index_digest(content: bytes) -> str:
    """What the manifest holds of an index file."""
    return hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]


def write_index(folder: Path, shard_name: str, records: np.ndarray) -> str:
    """Write a shard's index, whole or not at all; returns its digest.

    Raises:
        UserError: more samples than a shard may have.
    """
    if len(records) > MAX_SHARD_SAMPLES:
        raise UserError(
            f"shard {shard_name} has {len(records):,} samples, at most {MAX_SHARD_SAMPLES:,} are supported. Make smaller shards."
        )
    content = index_content(records)
    write_bytes_atomic(index_path(folder, shard_name), content)
    return index_digest(content)


def read_index(path: Path, num_samples: int, num_bytes: int, digest: str) -> np.ndarray:
    """The records of a shard: RECORD [num_samples], none of which points out of its `num_bytes` bytes.

    Read, not mapped: a mapped file whose disk fails would kill the process.

    Raises:
        UserError: the file is missing, damaged, or another one than the manifest names.
    """
    remedy = f"Copy it again, or make it again with mmlg data index {path.parent.parent.parent}."
    try:
        with open_regular(path) as file:
            return records_in(file, num_samples, num_bytes, digest)
    except FileNotFoundError as error:
        raise UserError(f"no index {path} of a shard. {remedy}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"index {path} is damaged: {one_line(error)}. {remedy}") from error


def records_in(file: BinaryIO, num_samples: int, num_bytes: int, digest: str) -> np.ndarray:
    """What `read_index` gives, of an open file. Raises OSError, and ValueError where it is damaged or another file."""
    header, wanted = _header(num_samples), index_bytes(num_samples)
    size = os.fstat(file.fileno()).st_size
    if size != wanted:
        raise ValueError(f"it has {size} bytes, {wanted} are {num_samples} samples")
    content = file.read(wanted)
    if index_digest(content) != digest:
        raise ValueError("it is not the file that the manifest names (SHA-256)")
    if not content.startswith(header):
        raise ValueError("it is no array of records")
    records = np.frombuffer(content, RECORD, offset=len(header))
    _require_places(records, num_bytes)
    return records


def _require_places(records: np.ndarray, num_bytes: int) -> None:
    """Raise ValueError where a record points out of the shard."""
    has_text, has_json = records["text"] > 0, records["json"] > 0
    wrong = (records["extension"] >= len(EXTENSIONS)) | ~(has_text | has_json) | (records["image"] < BLOCK)
    for kind in ("image", "text", "json"):
        offset, size = records[kind], records[f"{kind}_size"]
        # Compared without a sum, which could overflow.
        wrong |= (offset > 0) & ((offset < BLOCK) | (offset % BLOCK > 0) | (offset > num_bytes))
        wrong |= size.astype(np.uint64) > np.maximum(num_bytes - np.minimum(offset, num_bytes).astype(np.int64), 0).astype(np.uint64)
        wrong |= (offset == 0) & (size > 0)
    if wrong.any():
        raise ValueError(f"record {int(np.argmax(wrong))} is no place in a shard of {num_bytes} bytes")
