"""Data sets on disk: webdataset shards, a manifest of the shards, and an index of the samples of each.

    ROOT/
      dataset.json                  what the set is and how it was made
      classes.json                  optional: class names and caption templates
      tokenizer/                    optional: a word tokenizer
      train/  val/  test/
        shard-000000.tar ...        KEY.png|jpg, KEY.txt (first caption), KEY.json ({"captions": [...], "label": int | null})
        index/shard-000000.npy ...  where the members of each sample lie (index.py)
        manifest.json               per shard: file, samples, bytes, SHA-256, and the first half of its index's SHA-256
        checked.json                what the last check found (scan.py)

The manifest is all that is read of a set before its samples are: its size, and the memory of a process, grow with the shards. Of shards
made elsewhere (`indexing.py`), which lie here or one folder up, a sample has a text, or a JSON, or both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data.index import MAX_SHARD_SAMPLES, index_bytes, index_name
from mmlg_scale.data.store import RemoteFile, Store
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_text_atomic
from mmlg_scale.reading import one_line, open_regular, shown
from mmlg_scale.records import parse_record, read_record, sealed

FORMAT_VERSION = 2
OLD_FORMAT = 1
"""A manifest that lists every sample."""
Progress = Callable[[Iterable[Any]], Iterable[Any]]
_OLD = re.compile(rb'\s*\{\s*"format_version": 1,')


@dataclass(frozen=True)
class Location:
    """Where a sample's members lie: shard file and (offset, size) of image, text and JSON; at least one of the last two is there."""

    shard: Path
    key: str
    extension: str
    image: tuple[int, int]
    text: tuple[int, int] | None
    json: tuple[int, int] | None


@dataclass(frozen=True)
class Shards:
    """The shards of a split, as its manifest lists them; the samples of each follow those of the one before.

    Attributes:
        names: file names, relative to `folder`.
        samples, num_bytes: int64 [S], of each.
        sha256, indexes: digests of each shard and of its index.
        starts: int64 [S + 1], the first sample of each, and the number of all.
        store: where they are, if that is not `folder`.
    """

    folder: Path
    names: list[str]
    samples: np.ndarray
    num_bytes: np.ndarray
    sha256: list[str]
    indexes: list[str]
    starts: np.ndarray
    store: Store | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, shard: int) -> Path:
        """The file of a shard of a local set."""
        return self.folder / self.names[shard]

    @property
    def where(self) -> str:
        """The split, for people."""
        return str(self.folder) if self.store is None else f"{self.store.root}/{self.folder.name}"

    def told(self, shard: int) -> str:
        """A shard, for people."""
        return str(self.path(shard)) if self.store is None else self.store.url(self.file(shard).name)

    def file(self, shard: int) -> RemoteFile:
        """A shard in its store."""
        name = posixpath.normpath(f"{self.folder.name}/{self.names[shard]}")
        return RemoteFile(name, int(self.num_bytes[shard]), self.sha256[shard])

    def index_file(self, shard: int) -> RemoteFile:
        """A shard's index in its store."""
        name = f"{self.folder.name}/{index_name(self.names[shard])}"
        return RemoteFile(name, index_bytes(int(self.samples[shard])), self.indexes[shard])


def shards_of(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Shards:
    """The shards that a manifest's entries describe. Raises ValueError, KeyError or TypeError where they are damaged."""
    names, samples, num_bytes, sha256, indexes = list[str](), list[int](), list[int](), list[str](), list[str]()
    for entry in entries:
        count, size = entry["samples"], entry["bytes"]
        if type(count) is not int or type(size) is not int or not 0 <= count <= MAX_SHARD_SAMPLES or not 0 <= size < 2**62:
            raise ValueError(f"a shard of {shown(count)} samples in {shown(size)} bytes")
        if not all(isinstance(entry[name], str) for name in ("sha256", "index")):
            raise ValueError("a digest is no text")
        names.append(_shard_name(entry["file"]))
        samples.append(count)
        num_bytes.append(size)
        sha256.append(entry["sha256"])
        indexes.append(entry["index"])
    if len(set(names)) < len(names):
        raise ValueError("a shard is listed twice")
    counts = np.array(samples, np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    return Shards(folder, names, counts, np.array(num_bytes, np.int64), sha256, indexes, starts)


def _shard_name(name: Any) -> str:
    """A shard lies in the split's folder, or in the one above it (`data index`); a manifest cannot name any other file."""
    base = name.removeprefix("../") if isinstance(name, str) else ""
    if not base or "/" in base or "\0" in base or base in (".", ".."):
        raise ValueError(f"no shard's name: {shown(name)!r}")
    return str(name)


def tokenizer_digests(root: Path) -> dict[str, Any]:
    """{"tokenizer": name -> SHA-256} of the files in ROOT/tokenizer, for dataset.json; {} where there are none."""
    digests = {}
    for file in sorted((root / "tokenizer").glob("*.json")):
        with open_regular(file) as opened:
            digests[file.name] = hashlib.sha256(opened.read()).hexdigest()
    return {"tokenizer": digests} if digests else {}


def listed_text(head: Mapping[str, Any], name: str, entries: Iterable[Any]) -> str:
    """The text of a record whose last value, the list or object `name`, has an entry per shard: a line each.

    `entries` are JSON values, or (key, value) pairs of an object.
    """
    lines, pairs = list[str](), False
    for entry in entries:
        pairs = isinstance(entry, tuple)
        lines.append(f"{json.dumps(entry[0])}:{_compact(entry[1])}" if pairs else _compact(entry))
    start, end = ("{", "}") if pairs or not lines else ("[", "]")
    inside = ",\n".join(lines)
    return sealed(json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}") + f',\n "{name}": {start}\n{inside}\n {end}')


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def write_manifest(folder: Path, split: str, entries: Sequence[Mapping[str, Any]], *, identity: str | None = None) -> None:
    """Write FOLDER/manifest.json.

    Args:
        entries: of each shard `file`, `samples`, `bytes`, `sha256` and `index`.
        identity: `manifest_digest` of the manifest in the old format that this one says the same as.

    Raises:
        UserError: it is too large to be read again.
    """
    assert entries
    head = {"format_version": FORMAT_VERSION, "split": split, "num_samples": sum(entry["samples"] for entry in entries)}
    text = listed_text({**head, **({"identity": identity} if identity else {})}, "shards", entries)
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{folder}: a manifest of {len(entries):,} shards would take {len(text) / 2**30:.1f} GiB, "
            f"{MAX_MANIFEST_BYTES / 2**30:.0f} are supported. Make larger shards."
        )
    write_text_atomic(folder / "manifest.json", text)


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split. Whether the shards are there and whole is for `scan` to say.

    Raises:
        UserError: no folder, no manifest, no samples, or the old format.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise UserError(f"no data in {folder}: the folder is missing. mmlg data scenes or mmlg data pack writes a data set.")
    if not path.is_file():
        shards = len(list(folder.glob("*.tar")))
        raise UserError(f"{folder} has {shards} shards and no manifest.json. mmlg data index writes one for shards made elsewhere.")
    if has_old_format(folder):
        raise UserError(
            f"{path} has the format of earlier versions, which lists every sample. mmlg data index {folder.parent} rewrites it; "
            "shards stay as they are."
        )
    manifest = read_record(path, "manifest", _REMEDY, MAX_MANIFEST_BYTES)
    if manifest.get("format_version") != FORMAT_VERSION or not manifest.get("num_samples"):
        raise UserError(f"{path} is empty or of another version. {_REMEDY}")
    return manifest


_REMEDY = "Pack the data set again, or index its shards again with mmlg data index."


def has_old_format(folder: Path) -> bool:
    """Whether a split's manifest is of an earlier version. Reads no more than its beginning."""
    try:
        with open_regular(folder / "manifest.json") as file:
            return _OLD.match(file.read(64)) is not None
    except OSError:
        return False


def load_shards(folder: Path, store: Store | None = None) -> Shards:
    """The shards of a split, which are in `store` where one is given.

    Raises:
        UserError: as `load_manifest`, and where the manifest is damaged.
    """
    if store is not None and not (folder / "manifest.json").is_file():
        raise UserError(f"{store.root} has no split {folder.name!r}: there is no {folder.name}/manifest.json.")
    manifest = load_manifest(folder)
    try:
        shards = shards_of(folder, manifest["shards"])
        if shards.starts[-1] != manifest["num_samples"]:
            raise ValueError("the samples of its shards are not as many as it says")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{folder / 'manifest.json'} is damaged, or of another version: {one_line(error)}. {_REMEDY}") from error
    return shards if store is None else replace(shards, store=store)


def manifest_digest(folder: Path) -> str:
    """What a split's manifest is known by: its SHA-256, or that of the manifest in the old format that it was rewritten from.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "manifest.json"
    digest = file_digest(path, "the split's manifest")
    return _former_identity(path, digest) or digest


@functools.lru_cache(maxsize=64)
def _former_identity(path: Path, digest: str) -> str | None:
    """`digest` is of the file's content, so that a file that changes is read again."""
    with open_regular(path) as file:
        if b'"identity"' not in file.read(4096):
            return None
        file.seek(0)
        content = parse_record(file.read(), path, _REMEDY)
    found = content.get("identity")
    return found if isinstance(found, str) else None
