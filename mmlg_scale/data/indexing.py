"""`mmlg data index`: manifests for webdataset shards that were made elsewhere (KEY.jpg beside KEY.txt or KEY.json). No shard is touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmlg_scale.bounds import MAX_SAMPLE_TEXT_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.manifest import BLOCK, FORMAT_VERSION, Progress, tokenizer_digests, write_manifest
from mmlg_scale.data.reader import DamagedSample, ShardReader, header_checksum
from mmlg_scale.data.tokens import BPE, NONE, read_offer, recorded_offer, remove_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, open_regular
from mmlg_scale.records import read_record, write_record

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
KINDS = {"txt": "text", "json": "json", **dict.fromkeys(IMAGES, "image")}
_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
"""webdataset's rule: a key is all up to the first dot of the base name."""

DAMAGED_HEADER, CUT_SHARD, NO_IMAGE, NO_CAPTION, TWICE, DOTTED, OTHER = (
    "damaged places (tar header)",
    "cut shards",
    "samples without an image",
    "samples without a caption",
    "duplicate members",
    "members with a dot in their name before the extension, where webdataset ends the key (rename KEY.v2.jpg to KEY_v2.jpg)",
    "members of other kinds",
)


@dataclass
class Indexed:
    """One shard's manifest entry, and its problems: counts by cause."""

    entry: dict[str, Any]
    problems: Counter[str] = field(default_factory=Counter)


def index_dataset(
    root: Path,
    *,
    val_shards: int = 1,
    test_shards: int = 1,
    tokenizer: str = NONE,
    progress: Progress = lambda items: items,
) -> tuple[dict[str, int], Counter[str]]:
    """Write a manifest per split and dataset.json, so that ROOT is a data set; returns the samples of each split and the problems found.

    Splits are the subfolders train, val and test; where there is none of them, ROOT's own shards in the order of their names, the last
    ones for test and those before for val. Indexing again renews what indexing wrote. `tokenizer`: as in `pack.PackSettings`.

    Raises:
        UserError: no shards, too few for the splits, a packed data set, an unknown tokenizer, or one in ROOT that indexing did not write, a
            split without a whole sample.
    """
    offer = read_offer(tokenizer)
    groups = _groups(root, val_shards, test_shards)
    _refuse_foreign(root)
    _refuse_tokenizer(root)
    problems: Counter[str] = Counter()
    manifests: dict[str, dict[str, Any]] = {}
    for split, paths in groups.items():
        shards = []
        for path in progress(paths):
            found = index_shard(path)
            found.entry["file"] = path.name if path.parent == root / split else f"../{path.name}"
            problems += found.problems
            shards.append(found.entry)
        total = sum(len(shard["samples"]) for shard in shards)
        if not total:
            raise UserError(
                f"{root}: split {split} has no whole sample (an image with a .txt, or a .json with a caption). {_told(problems)}"
            )
        manifests[split] = {"format_version": FORMAT_VERSION, "split": split, "num_samples": total, "shards": shards}
    for split, manifest in manifests.items():
        write_manifest(root / split, manifest)
    remove_tokenizer(root)
    offer.write(root, lambda: _captions(root / "train"))
    counts = {split: manifest["num_samples"] for split, manifest in manifests.items()}
    args = {"val_shards": val_shards, "test_shards": test_shards, "tokenizer": offer.name}
    described = {"format_version": FORMAT_VERSION, "kind": "indexed", "args": args, "splits": counts}
    write_record(root / "dataset.json", {**described, **tokenizer_digests(root)})
    return counts, problems


def _told(problems: Mapping[str, int]) -> str:
    return "Found: " + (", ".join(f"{count} {cause}" for cause, count in problems.items()) or "no image at all") + "."


def _groups(root: Path, val_shards: int, test_shards: int) -> dict[str, list[Path]]:
    """The shards of each split."""
    if not root.is_dir():
        raise UserError(f"no folder {root}. Give the one with the shards, or train/, val/ and test/ with shards.")
    inside = {split: sorted((root / split).glob("*.tar")) for split in SPLITS}
    if any(inside.values()):
        if not inside["train"]:
            raise UserError(f"{root} has shards in {', '.join(split for split in SPLITS if inside[split])} but none in train. Add train.")
        return {split: paths for split, paths in inside.items() if paths}
    shards = sorted(root.glob("*.tar"))
    if not shards:
        raise UserError(f"{root} contains no .tar shards, nor does {root}/train. Give the folder with the shards.")
    if min(val_shards, test_shards) < 0 or val_shards + test_shards >= len(shards):
        raise UserError(
            f"{root} has {len(shards)} shards; {val_shards} for val and {test_shards} for test leave none for train. "
            "Give --val-shards and --test-shards that do."
        )
    first_test = len(shards) - test_shards
    first_val = first_test - val_shards
    groups = {"train": shards[:first_val], "val": shards[first_val:first_test], "test": shards[first_test:]}
    return {split: paths for split, paths in groups.items() if paths}


def _refuse_foreign(root: Path) -> None:
    file = root / "dataset.json"
    if file.is_file():
        kind = read_record(file, "description of a data set", "Remove it and index the shards again.").get("kind")
        if kind != "indexed":
            raise UserError(f"{root} was packed by another command ({kind}), with its manifests. Check it with mmlg data check.")


def _refuse_tokenizer(root: Path) -> None:
    """A tokenizer that a person put there is theirs; one that dataset.json records is replaced."""
    if (root / "tokenizer").exists() and recorded_offer(root) in (None, NONE, BPE):
        raise UserError(f"{root / 'tokenizer'} is not from mmlg data index. Move it away, and give its path with --tokenizer to use it.")


def _captions(folder: Path) -> Iterator[str]:
    reader = ShardReader(folder)
    for index in range(len(reader)):
        try:
            yield from reader.about(index)["captions"]
        except DamagedSample:
            continue  # training skips and counts it
    reader.close()


def index_shard(path: Path) -> Indexed:
    """A shard's manifest entry; what is damaged is left out and counted."""
    problems: Counter[str] = Counter()
    samples: dict[str, dict[str, Any]] = {}
    for member in _members(path, problems):
        named = _NAME.match(member.name) if member.isfile() else None
        if named is None:
            continue
        key, extension = named[1], named[2].lower()
        kind = KINDS.get(extension)
        if kind is None:
            problems[DOTTED if extension.rpartition(".")[2] in KINDS else OTHER] += 1
            continue
        entry = samples.setdefault(key, {"key": key})
        if kind in entry:
            problems[TWICE] += 1
            continue
        place = [member.offset_data, member.size]
        entry[kind] = [named[2], *place] if kind == "image" else place
    whole = []
    with _open_shard(path) as file:
        for entry in samples.values():
            if "json" in entry and not _json_counts(file, entry):
                del entry["json"]
            if "image" not in entry:
                problems[NO_IMAGE] += 1
            elif "text" not in entry and "json" not in entry:
                problems[NO_CAPTION] += 1
            else:
                whole.append(entry)
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        size = file.tell()
    return Indexed({"file": path.name, "sha256": digest.hexdigest(), "num_bytes": size, "samples": whole}, problems)


def _open_shard(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({one_line(error)}). Copy it again, or remove it.") from error


def _json_counts(file: Any, entry: Mapping[str, Any]) -> bool:
    """Whether captions come from the sample's JSON: always where it has a list of them, else only for want of a text."""
    offset, size = entry["json"]
    if size > MAX_SAMPLE_TEXT_BYTES:
        return "text" not in entry  # the reader refuses it
    file.seek(offset)
    try:
        content = json.loads(file.read(size))
    except (ValueError, RecursionError):
        return "text" not in entry  # then training counts it as unreadable
    if not isinstance(content, dict):
        return False
    return "captions" in content or ("text" not in entry and isinstance(content.get("caption"), str))


def _members(path: Path, problems: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """The whole members of a tar, also behind damaged places: reading resumes at the next block with a valid header.

    Raises:
        UserError: the shard cannot be opened, or is no regular file.
    """
    with _open_shard(path) as file:
        size = os.fstat(file.fileno()).st_size
        expected = restart = 0
        while (restart := _next_header(file, restart)) < size:
            file.seek(restart)
            try:
                # With ignore_zeros tarfile skips, block by block, what is no header.
                with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                    while (member := tar.next()) is not None:
                        tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                        if member.size < 0:
                            raise tarfile.ReadError("a negative size")  # behind which tarfile would go back, and for ever
                        problems[DAMAGED_HEADER] += _has_bytes(file, expected, member.offset)
                        end = member.offset_data + member.size if member.isfile() else member.offset_data
                        expected = restart = -(-end // BLOCK) * BLOCK
                        if end > size:
                            problems[CUT_SHARD] += 1
                            return
                        yield member
                break
            except OSError:
                raise
            except RecursionError:
                restart = max(restart + BLOCK, -(-file.tell() // BLOCK) * BLOCK)  # extended headers of extended headers, hundreds deep
            except Exception:  # of headers that are damaged, or made to damage, tarfile raises ReadError, ValueError and others
                restart += BLOCK
        problems[DAMAGED_HEADER] += _has_bytes(file, expected, size)


def _next_header(file: Any, start: int) -> int:
    """The first block from `start` on with the checksum of a tar header; the file's end where there is none."""
    file.seek(start)
    while block := file.read(BLOCK):
        if header_checksum(block):
            return int(start)
        start += BLOCK
    return int(start)


def _has_bytes(file: Any, start: int, stop: int) -> int:
    """1 where something other than padding lies in between, else 0; the file's position is kept."""
    if stop <= start:
        return 0
    position = file.tell()
    file.seek(start)
    found, left = 0, stop - start
    while left and not found:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
        found, left = int(any(block)), left - len(block)
    file.seek(position)
    return found


def print_index(counts: Mapping[str, int], problems: Mapping[str, int], root: Path) -> None:
    """What was indexed, and what was left out."""
    print(f"{root}: " + ", ".join(f"{split} {count}" for split, count in counts.items()) + " samples")
    for cause in sorted(cause for cause, count in problems.items() if count):
        print(f"left out: {problems[cause]} {cause}")
    for split in sorted(set(SPLITS) - set(counts)):
        print(f"no {split} split: training and mmlg family need it; give --{split}-shards or a folder {split}/")
