"""Data sets on disk: webdataset shards with a manifest.

    ROOT/
      dataset.json                  what the set is and how it was made
      classes.json                  optional: class names and caption templates
      tokenizer/                    optional: a word tokenizer
      train/  val/  test/
        shard-000000.tar ...        KEY.png|jpg, KEY.txt (first caption), KEY.json ({"captions": [...], "label": int | null})
        manifest.json               per shard: SHA-256, bytes, samples (key, image [extension, offset, size], text and json [offset, size])

A set is written into a temporary folder and published by a rename, so that there is never half a set under its name. Shards are written by
webdataset and indexed by the standard library's tarfile; reading goes by the manifest's offsets. Of shards made elsewhere (`indexing.py`) a
sample has a text, or a JSON, or both.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, remove_leftovers, temporary_name, write_text_atomic, writing
from mmlg_scale.reading import one_line, open_regular, shown
from mmlg_scale.records import read_record, record_text, write_record

FORMAT_VERSION = 1
BLOCK = 512
"""Of a tar: headers and data begin at its multiples."""
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as it is packed."""

    key: str
    image: bytes
    extension: str
    captions: list[str]
    label: int | None = None


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
class Shard:
    """A shard file as the manifest describes it."""

    file: Path
    sha256: str
    num_samples: int


@contextmanager
def new_dataset(root: Path, kind: str, args: dict[str, Any]) -> Iterator[Path | None]:
    """Give a temporary folder to write a data set into; publish it as `root` when the block ends without an error.

    Yields None, and says so, where `root` already is the data set that these arguments make.

    Raises:
        UserError: `root` contains something else, or is a file.
        OSError: it cannot be written, with the path; nothing is left of the set.
    """
    identity = {"format_version": FORMAT_VERSION, "kind": kind, "args": args}
    if root.exists():
        if not root.is_dir():
            raise UserError(f"{root} is a file. Give a folder that does not exist yet.")
        marker = root / "dataset.json"
        found = _read_object(marker, "description of a data set") if marker.is_file() else None
        if found is not None and {key: found.get(key) for key in identity} == json.loads(json.dumps(identity)):
            print(f"{root} already contains this data set ({found.get('splits')}): nothing to do.")
            yield None
            return
        if found is not None or any(root.iterdir()):
            what = "a data set made with other arguments" if found is not None else "files that are not a data set"
            raise UserError(f"{root} contains {what}. Give another --out, or remove it.")
    make_folder(root.parent)
    remove_leftovers(root.parent.absolute())
    temporary = temporary_name(root)
    try:
        temporary.mkdir()
        yield temporary
        counts = {split: load_manifest(temporary / split)["num_samples"] for split in SPLITS if (temporary / split).is_dir()}
        write_record(temporary / "dataset.json", {**identity, "splits": counts, **tokenizer_digests(temporary)})
        if root.exists():
            root.rmdir()  # empty, as checked above
        os.replace(temporary, root)
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary):
            error.filename = str(root)  # the name that the user knows
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def tokenizer_digests(root: Path) -> dict[str, Any]:
    """{"tokenizer": name -> SHA-256} of the files in ROOT/tokenizer, for dataset.json; {} where there are none."""
    digests = {}
    for file in sorted((root / "tokenizer").glob("*.json")):
        with open_regular(file) as opened:
            digests[file.name] = hashlib.sha256(opened.read()).hexdigest()
    return {"tokenizer": digests} if digests else {}


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object that this module or `indexing` wrote."""
    return read_record(path, what, "Remove the data set and make it again.", MAX_MANIFEST_BYTES)


def write_split(root: Path, split: str, samples: Iterable[Sample], *, samples_per_shard: int) -> None:
    """Write one split's shards and manifest. The same samples give the same bytes."""
    assert samples_per_shard > 0
    folder = root / split
    folder.mkdir()
    source = iter(samples)
    shards: list[dict[str, Any]] = []
    while chunk := list(islice(source, samples_per_shard)):
        path = folder / f"shard-{len(shards):06d}.tar"
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
        shards.append(_index(path))
    if not shards:
        raise UserError(f"split {split} has no samples. Give more data, or other fractions.")
    total = sum(len(shard["samples"]) for shard in shards)
    manifest = {"format_version": FORMAT_VERSION, "split": split, "num_samples": total, "shards": shards}
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write FOLDER/manifest.json. Raises UserError where it is too large to be read again."""
    text = record_text(manifest)
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(
            f"{folder}: a manifest of {manifest['num_samples']:,} samples would take {len(text) / 2**30:.1f} GiB, "
            f"{MAX_MANIFEST_BYTES / 2**30:.0f} are supported. Pack or index fewer shards in one data set."
        )
    write_text_atomic(folder / "manifest.json", text)


def _index(path: Path) -> dict[str, Any]:
    """A shard's manifest entry, from the tar as it is on disk."""
    payload = path.read_bytes()
    samples: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            entry = samples.setdefault(key, {"key": key})
            place = [member.offset_data, member.size]
            if extension in ("txt", "json"):
                entry["text" if extension == "txt" else "json"] = place
            else:
                entry["image"] = [extension, *place]
    return {
        "file": path.name,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "num_bytes": len(payload),
        "samples": list(samples.values()),
    }


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a split. Whether the shards are there and whole is for `faults.scan` to say.

    Raises:
        UserError: no folder, no manifest, no samples.
    """
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise UserError(f"no data in {folder}: the folder is missing. mmlg data scenes or mmlg data pack writes a data set.")
    if not path.is_file():
        shards = len(list(folder.glob("*.tar")))
        raise UserError(f"{folder} has {shards} shards and no manifest.json. mmlg data index writes one for shards made elsewhere.")
    manifest = _read_object(path, "manifest")
    if manifest.get("format_version") != FORMAT_VERSION or not manifest.get("num_samples"):
        raise UserError(f"{path} is empty or of another version. Pack the data set again.")
    return manifest


def _span(place: Sequence[int] | None) -> tuple[int, int] | None:
    if place is None:
        return None
    offset, size = place
    if type(offset) is not int or type(size) is not int or not BLOCK <= offset < 2**62 or not 0 <= size < 2**62:
        raise ValueError(f"no place in a shard: {shown(place)}")
    return offset, size


def _shard(folder: Path, name: Any) -> Path:
    """A shard lies in the split's folder, or in the one above it (`data index`); a manifest cannot name any other file."""
    base = name.removeprefix("../") if isinstance(name, str) else ""
    if not base or "/" in base or "\0" in base or base in (".", ".."):
        raise ValueError(f"no shard's name: {shown(name)!r}")
    return folder / name


def locations(folder: Path) -> tuple[list[Location], list[Shard]]:
    """Every sample of a split in shard order, and the shards. Raises UserError where the manifest is damaged."""
    manifest = load_manifest(folder)
    places, shards = [], []
    try:
        for shard in manifest["shards"]:
            file = _shard(folder, shard["file"])
            for sample in shard["samples"]:
                extension, *place = sample["image"]
                image, text, about = _span(place), _span(sample.get("text")), _span(sample.get("json"))
                if image is None or (text is None and about is None):
                    raise KeyError(f"text or json of sample {sample['key']}")
                places.append(Location(file, str(sample["key"]), str(extension), image, text, about))
            shards.append(Shard(file, str(shard["sha256"]), len(shard["samples"])))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        told = one_line(error)
        raise UserError(f"{folder / 'manifest.json'} is damaged, or of another version: {told}. Pack the data set again.") from error
    return places, shards
