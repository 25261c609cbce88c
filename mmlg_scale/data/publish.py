"""Writing a data set: into a temporary folder that is published by a rename, so that there is never half a set under its name."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds

from mmlg_scale.bounds import MAX_CAPTION, MAX_MANIFEST_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.index import RecordBuilder, write_index
from mmlg_scale.data.manifest import load_manifest, tokenizer_digests, write_manifest
from mmlg_scale.data.reader import content_digest
from mmlg_scale.data.scan import ShardState, save_states, state_of
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, remove_leftovers, temporary_name, writing
from mmlg_scale.records import read_record, write_record

DESCRIPTION_VERSION = 1
"""Of dataset.json."""
_REMEDY = "Remove the data set and make it again."


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as it is packed."""

    key: str
    image: bytes
    extension: str
    captions: list[str]
    label: int | None = None


def require_target(root: Path) -> None:
    """Raise UserError where `root` is a file, or a folder with files that are not a data set."""
    if not root.exists():
        return
    if not root.is_dir():
        raise UserError(f"{root} is a file. Give a folder that does not exist yet.")
    if not (root / "dataset.json").is_file() and any(root.iterdir()):
        raise UserError(f"{root} contains files that are not a data set. Give another --out, or remove it.")


def _is_there(root: Path, identity: dict[str, Any]) -> bool:
    """Whether `root` is the data set of this identity, which is then told. Raises UserError where it is another one."""
    marker = root / "dataset.json"
    if not marker.is_file():
        return False
    found = read_record(marker, "description of a data set", _REMEDY, MAX_MANIFEST_BYTES)
    if {key: found.get(key) for key in identity} != json.loads(json.dumps(identity)):
        raise UserError(f"{root} contains a data set made with other arguments. Give another --out, or remove it.")
    print(f"{root} already contains this data set ({found.get('splits')}): nothing to do.")
    return True


@contextmanager
def new_dataset(root: Path, kind: str, args: dict[str, Any]) -> Iterator[Path | None]:
    """Give a temporary folder to write a data set into; publish it as `root` when the block ends without an error.

    Yields None, and says so, where `root` already is the data set that these arguments make.

    Raises:
        UserError: `root` contains something else, or is a file.
        OSError: it cannot be written, with the path; nothing is left of the set.
    """
    identity = {"format_version": DESCRIPTION_VERSION, "kind": kind, "args": args}
    require_target(root)
    if _is_there(root, identity):
        yield None
        return
    make_folder(root.parent)
    remove_leftovers(root.parent.absolute())
    temporary = temporary_name(root)
    try:
        temporary.mkdir()
        yield temporary
        counts = {split: load_manifest(temporary / split)["num_samples"] for split in SPLITS if (temporary / split).is_dir()}
        write_record(temporary / "dataset.json", {**identity, "splits": counts, **tokenizer_digests(temporary)})
        try:
            if root.exists():
                root.rmdir()  # empty, as checked above
            os.replace(temporary, root)
        except OSError:
            if not _is_there(root, identity):  # else another process has made the same set meanwhile
                raise
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary):
            error.filename = str(root)  # the name that the user knows
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_split(root: Path, split: str, samples: Iterable[Sample], *, samples_per_shard: int) -> None:
    """Write one split's shards, their indexes and the manifest. The same samples give the same bytes."""
    assert samples_per_shard > 0
    folder = root / split
    folder.mkdir()
    source = iter(samples)
    entries, states = list[dict[str, Any]](), dict[str, ShardState]()
    while chunk := list(islice(source, samples_per_shard)):
        path = folder / f"shard-{len(entries):06d}.tar"
        # Fixed owner and time, so that the bytes depend only on the samples.
        with writing(path), wds.TarWriter(str(path), user="mmlg", group="mmlg", mode=0o644, mtime=0) as writer:
            for sample in chunk:
                about = json.dumps({"captions": sample.captions, "label": sample.label}, ensure_ascii=False)
                writer.write(
                    {
                        "__key__": sample.key,
                        sample.extension: sample.image,
                        "txt": sample.captions[0].encode(),
                        "json": about.encode(),
                    }
                )
        entries.append(_indexed(path))
        if all(_is_sound(text) for sample in chunk for text in sample.captions):
            states[path.name] = state_of(path, [])  # as the index pass would find
    if not entries:
        raise UserError(f"split {split} has no samples. Give more data, or other fractions.")
    write_manifest(folder, split, entries)
    save_states(folder, states)


def _is_sound(caption: str) -> bool:
    return bool(caption.strip()) and len(caption) <= MAX_CAPTION


def _indexed(path: Path) -> dict[str, Any]:
    """A shard's manifest entry, from the tar as it is on disk; its index is written."""
    builder = RecordBuilder()
    with open(path, "rb") as file:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                kind = {"txt": "text", "json": "json"}.get(extension, "image")
                builder.add(key, kind, extension, member.offset, member.offset_data, member.size)
        file.seek(0)
        digest, size = content_digest(file), file.tell()
    records = builder.records()
    return {
        "file": path.name,
        "samples": len(records),
        "bytes": size,
        "sha256": digest,
        "index": write_index(path.parent, path.name, records),
    }
