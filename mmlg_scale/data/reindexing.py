"""`mmlg data index` on a set that has an index: one of earlier versions is rewritten, and of a packed set what is missing is made again.

A manifest of earlier versions lists every sample. Its places become the records of the new indexes: no shard is read, and the set keeps its
identity, so that runs that have read it still know it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.index import EXTENSIONS, RecordBuilder, index_path, read_index, write_index
from mmlg_scale.data.indexing import index_shard
from mmlg_scale.data.manifest import Progress, Shards, has_old_format, load_shards, shards_of, write_manifest
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, shown
from mmlg_scale.records import read_record


def old_splits(root: Path) -> list[str]:
    """The splits of a data set whose manifests are of earlier versions."""
    return [split for split in SPLITS if has_old_format(root / split)]


def rewrite_index(root: Path, progress: Progress = lambda items: items) -> dict[str, int]:
    """Rewrite the manifests of earlier versions in a data set; returns the samples of each split that was rewritten.

    Raises:
        UserError: a manifest is damaged; nothing of its split is then changed.
    """
    counts = {}
    for split in old_splits(root):
        folder = root / split
        path = folder / "manifest.json"
        identity = file_digest(path, "the split's manifest")
        manifest = read_record(path, "manifest", "Pack or index the data set again.", MAX_MANIFEST_BYTES)
        try:
            entries = [_rewritten(folder, shard) for shard in progress(manifest["shards"])]
            shards_of(folder, entries)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}). Pack or index the data set again.") from error
        write_manifest(folder, split, entries, identity=identity)
        counts[split] = sum(entry["samples"] for entry in entries)
    return counts


def _rewritten(folder: Path, shard: Mapping[str, Any]) -> dict[str, Any]:
    """A shard's entry in the new format; its index is written."""
    builder = RecordBuilder()
    for sample in shard["samples"]:
        extension, *place = sample["image"]
        if str(extension).lower() not in EXTENSIONS:
            raise ValueError(f"an image of kind {shown(extension)}")
        members = {"image": place, "text": sample.get("text"), "json": sample.get("json")}
        for kind, span in members.items():
            if span is not None:
                offset, size = span
                if type(offset) is not int or type(size) is not int or not 512 <= offset < 2**62 or not 0 <= size < 2**32:
                    raise ValueError(f"no place in a shard: {shown(span)}")
                builder.add(str(sample["key"]), kind, str(extension), 0, offset, size)
    entry = {"file": shard["file"], "bytes": shard["num_bytes"], "sha256": shard["sha256"], "samples": len(shard["samples"]), "index": ""}
    shards_of(folder, [entry])  # before a file is named after it
    records = builder.records()
    if len(records) != len(shard["samples"]):
        raise ValueError("a sample without an image or a caption, or a key twice")
    return {key: entry[key] for key in ("file", "samples", "bytes", "sha256")} | {"index": write_index(folder, entry["file"], records)}


def renew_index(root: Path, progress: Progress = lambda items: items) -> dict[str, int]:
    """Make again what is missing or damaged of a packed set's indexes, from its shards; returns how many of each split were.

    Raises:
        UserError: a shard is not the one that was packed.
    """
    counts = {}
    for split in SPLITS:
        folder = root / split
        if not (folder / "manifest.json").is_file():
            continue
        shards = load_shards(folder)
        missing = [shard for shard in range(len(shards)) if not _is_whole(shards, shard)]
        for shard in progress(missing):
            entry = index_shard(shards.path(shard), folder).entry
            if entry["index"] != shards.indexes[shard]:
                raise UserError(f"{shards.path(shard)} is not the shard that was packed. Copy it again, or pack the data set again.")
        counts[split] = len(missing)
    return counts


def _is_whole(shards: Shards, shard: int) -> bool:
    path, of = index_path(shards.folder, shards.names[shard]), shards
    try:
        read_index(path, int(of.samples[shard]), int(of.num_bytes[shard]), of.indexes[shard])
    except UserError:
        return False
    return True
