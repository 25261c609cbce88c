"""`mmlg data index`: manifest and indexes for webdataset shards that were made elsewhere (KEY.jpg beside KEY.txt or KEY.json).

No shard is touched. Each is read once: where its members lie, whether headers, captions and JSON can be read, its SHA-256. What was found
is written beside the index as soon as the shard is done (index/NAME.json), so that a pass that was stopped resumes, and
several jobs share one; these notes go when the manifest, which is made of them, is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

from mmlg_scale.bounds import MAX_JSON_BYTES, MAX_SAMPLE_TEXT_BYTES
from mmlg_scale.data import SPLITS
from mmlg_scale.data.classes import CLASSES_FILE, CLASSNAMES, listed_classes, repeated_classes
from mmlg_scale.data.index import BLOCK, EXTENSIONS, LABEL, LABELLED, MAX_MEMBER_BYTES, NAMES, RecordBuilder, index_path, write_index
from mmlg_scale.data.manifest import Progress, shards_of, tokenizer_digests, write_manifest
from mmlg_scale.data.publish import DESCRIPTION_VERSION
from mmlg_scale.data.reader import KEY, DamagedSample, ShardReader, content_digest, header_checksum, open_shard
from mmlg_scale.data.scan import ShardState, check_samples, checked_spans, save_states, state_of
from mmlg_scale.data.tokens import BPE, NONE, Offer, read_offer, recorded_offer, remove_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_json_atomic
from mmlg_scale.reading import one_line, read_json, shown
from mmlg_scale.records import read_record, write_record

KINDS = {"txt": "text", "json": "json", "cls": "label", **dict.fromkeys(EXTENSIONS, "image")}

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
"""First bytes of a compressed shard -> its kind, and the command that unpacks it."""
DAMAGED_HEADER, CUT_SHARD, NO_IMAGE, NO_CAPTION, TWICE, DOTTED, OTHER = (
    "damaged places (tar header)",
    "cut shards",
    "samples without an image",
    "samples without a caption",
    "duplicate members",
    "members with a dot in their name before the extension, where webdataset ends the key (rename KEY.v2.jpg to KEY_v2.jpg)",
    "members of other kinds",
)
ONLY_LABEL = "samples of train with a .cls and no caption, which are for evaluation"
LABEL_BESIDE, NAMES_BESIDE = (
    "labels (.cls) beside a .json with captions (write them into it as label)",
    "captions by name (.json) beside a label (.cls)",
)
FEW_BYTES = 2**28
"""Below this, processes take longer to start than to index."""


@dataclass
class Indexed:
    """One shard's manifest entry, what was found damaged in it, and its problems: counts by cause."""

    entry: dict[str, Any]
    state: ShardState
    problems: Counter[str] = field(default_factory=Counter)


def index_dataset(
    root: Path,
    *,
    val_shards: int = 1,
    test_shards: int = 1,
    tokenizer: str = NONE,
    processes: int = 1,
    progress: Progress = lambda items: items,
) -> tuple[dict[str, int], Counter[str]]:
    """Write index, manifest and dataset.json, so that ROOT is a data set; returns the samples of each split and the problems found.

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
    index_part(root, groups, processes=processes, progress=progress)
    return join_parts(root, groups, offer, {"val_shards": val_shards, "test_shards": test_shards, "tokenizer": offer.name})


def index_shards_of(
    root: Path, part: tuple[int, int], *, val_shards: int, test_shards: int, processes: int, progress: Progress
) -> tuple[int, int]:
    """One of several jobs: index every n-th shard, `part` being (i, n) counted from 1; returns how many were done now, and of how many.

    Raises:
        UserError: as `index_dataset`.
    """
    groups = _groups(root, val_shards, test_shards)
    _refuse_foreign(root)
    return index_part(root, groups, part, processes=processes, progress=progress)


def join_dataset(root: Path, *, val_shards: int, test_shards: int, tokenizer: str) -> tuple[dict[str, int], Counter[str]]:
    """After all parts: the manifest and dataset.json out of what they found; returns as `index_dataset`.

    Raises:
        UserError: as `index_dataset`; a shard that no part has indexed, or that has changed since.
    """
    offer = read_offer(tokenizer)
    groups = _groups(root, val_shards, test_shards)
    _refuse_foreign(root)
    _refuse_tokenizer(root)
    return join_parts(root, groups, offer, {"val_shards": val_shards, "test_shards": test_shards, "tokenizer": offer.name})


def index_part(
    root: Path, groups: Mapping[str, Sequence[Path]], part: tuple[int, int] = (1, 1), *, processes: int, progress: Progress
) -> tuple[int, int]:
    """Index the shards of a part that are not yet, in as many processes; returns how many were done now, and of how many."""
    tasks = [(root / split, path) for split, paths in groups.items() for path in paths][part[0] - 1 :: part[1]]
    missing = [task for task in tasks if read_note(*task) is None]
    size = sum(path.stat().st_size for _, path in missing if path.is_file())
    if min(processes, len(missing)) < 2 or size < FEW_BYTES:
        for task in progress(missing):
            _index_and_note(task)
    else:
        # Spawned: a progress bar is a thread, which a fork would break.
        with ProcessPoolExecutor(min(processes, len(missing)), mp_context=get_context("spawn")) as pool:
            for _ in progress(_Counted(pool.map(_index_and_note, missing), len(missing))):
                pass
    return len(missing), len(tasks)


class _Counted:
    """An iterable of known length, for a progress bar."""

    def __init__(self, items: Iterable[Any], count: int) -> None:
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __length_hint__(self) -> int:
        return self._count


def _note_path(folder: Path, shard: Path) -> Path:
    return index_path(folder, shard.name).with_suffix(".json")


def _index_and_note(task: tuple[Path, Path]) -> None:
    folder, path = task
    found = index_shard(path, folder)
    note = {"entry": found.entry, "state": found.state, "problems": found.problems}
    write_json_atomic(_note_path(folder, path), note)


def read_note(folder: Path, path: Path) -> Indexed | None:
    """What a pass that is not joined yet found in a shard; None: nothing, or the shard has changed."""
    note = _note_path(folder, path)
    if not note.is_file() or not index_path(folder, path.name).is_file():
        return None
    try:
        content = read_json(note, "note of a shard's index", "", MAX_JSON_BYTES)
        stat, state = path.stat(), content["state"]
        if (state["num_bytes"], state["mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
            return None
        state = {**state, "faults": checked_spans(state["faults"])}
        shards_of(folder, [content["entry"]])
        problems = Counter({str(cause): int(count) for cause, count in content["problems"].items()})
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Indexed(content["entry"], state, problems)


def join_parts(
    root: Path, groups: Mapping[str, Sequence[Path]], offer: Offer, args: Mapping[str, Any]
) -> tuple[dict[str, int], Counter[str]]:
    """Manifest and dataset.json out of the notes of all shards, which then go."""
    problems: Counter[str] = Counter()
    found: dict[str, list[Indexed]] = {}
    classes = listed_classes(root)
    for split, paths in groups.items():
        found[split] = []
        for path in paths:
            one = read_note(root / split, path)
            if one is None:
                raise UserError(
                    f"shard {path} is not indexed, or has changed since. Run mmlg data index {root} with the --part that it is in."
                )
            found[split].append(one)
            problems += one.problems
        if not sum(one.entry["samples"] for one in found[split]):
            if split == "train" and problems[ONLY_LABEL] and len(groups) > 1:
                del found[split]  # a set that only evaluates
                continue
            raise UserError(
                f"{root}: split {split} has no whole sample (an image with a .txt, a .json with a caption, or for evaluation a .cls). "
                f"{_told(problems)}"
            )
    for split, shards in found.items():
        write_manifest(root / split, split, [one.entry for one in shards])
        save_states(root / split, {one.entry["file"]: one.state for one in shards})
    if classes is not None:
        write_record(root / CLASSES_FILE, classes)
    remove_tokenizer(root)
    offer.write(root, lambda: _captions(root / "train"))
    counts = {split: sum(one.entry["samples"] for one in shards) for split, shards in found.items()}
    described = {"format_version": DESCRIPTION_VERSION, "kind": "indexed", "args": dict(args), "splits": counts}
    write_record(root / "dataset.json", {**described, **tokenizer_digests(root)})
    _clear(root, {split: groups[split] for split in found})
    return counts, problems


def _clear(root: Path, groups: Mapping[str, Sequence[Path]]) -> None:
    """Remove the notes, and what an earlier pass wrote for shards and splits that are no longer there."""
    for split in SPLITS:
        folder = root / split
        keep = {index_path(folder, path.name).name for path in groups.get(split, ())}
        old = [file for file in (folder / "index").glob("*") if file.suffix in (".json", ".npy") and file.name not in keep]
        if split not in groups:
            old += [folder / "manifest.json", *folder.glob("checked*.json")]
        for file in old:
            with contextlib.suppress(OSError):
                file.unlink()


def _told(problems: Mapping[str, int]) -> str:
    return "Found: " + (", ".join(f"{count} {cause}" for cause, count in problems.items()) or "no image at all") + "."


def _groups(root: Path, val_shards: int, test_shards: int) -> dict[str, list[Path]]:
    """The shards of each split."""
    if not root.is_dir():
        raise UserError(f"no folder {root}. Give the one with the shards, or train/, val/ and test/ with shards.")
    inside = {split: sorted((root / split).glob("*.tar")) for split in SPLITS}
    if any(inside.values()):
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
    kind = recorded_kind(root)
    if kind not in (None, "indexed"):
        raise UserError(f"{root} was packed by another command ({kind}), with its manifests. Check it with mmlg data check.")


def recorded_kind(root: Path) -> str | None:
    """How a data set came about: indexed, packed, scenes; None where there is no dataset.json."""
    file = root / "dataset.json"
    return (
        str(read_record(file, "description of a data set", "Remove it and index the shards again.").get("kind")) if file.is_file() else None
    )


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


def index_shard(path: Path, folder: Path) -> Indexed:
    """Write a shard's index for the split `folder`; what is damaged beyond use is left out and counted.

    Raises:
        UserError: the shard cannot be opened, or is no regular file.
    """
    problems: Counter[str] = Counter()
    builder = RecordBuilder()
    for member in _members(path, problems):
        named = KEY.match(member.name) if member.isfile() else None
        if named is None:
            continue
        extension = named[2].lower()
        kind = KINDS.get(extension)
        if kind is None or member.size > MAX_MEMBER_BYTES:
            problems[DOTTED if extension.rpartition(".")[2] in KINDS and kind is None else OTHER] += 1
        elif not builder.add(named[1], kind, extension, member.offset, member.offset_data, member.size):
            problems[TWICE] += 1
    with _open_shard(path) as file:
        for members in builder.samples().values():
            if "json" in members and not _json_counts(file, members):
                if _has_names(file, members):
                    members["json"] = (*members["json"][:3], NAMES)
                else:
                    del members["json"]
            if "label" in members:
                _place_label(members, problems)
            if folder.name == "train" and "text" not in members and "json" in members and members["json"][3] == LABEL:
                del members["json"]
                problems[ONLY_LABEL] += "image" in members
            elif "image" not in members:
                problems[NO_IMAGE] += 1
            elif "text" not in members and "json" not in members:
                problems[NO_CAPTION] += 1
        file.seek(0)
        sha256, size = content_digest(file), file.tell()
    records = builder.records()
    name = path.name if path.parent == folder else f"../{path.name}"
    entry = {"file": name, "samples": len(records), "bytes": size, "sha256": sha256, "index": write_index(folder, path.name, records)}
    reader = ShardReader.of_shards(shards_of(folder, [entry]), {0: records})
    state = state_of(path, check_samples(reader, range(len(records)), 0, decode=False))
    reader.close()
    return Indexed(entry, state, problems)


def _place_label(members: dict[str, tuple[int, int, int, str]], problems: Counter[str]) -> None:
    """Put a sample's .cls where its record has room for a JSON, unless that has the captions."""
    label = members.pop("label")
    json_kind = members["json"][3] if "json" in members else None
    if json_kind not in (None, NAMES):
        problems[LABEL_BESIDE] += 1
        return
    problems[NAMES_BESIDE] += json_kind == NAMES
    members["json"] = (*label[:3], LABEL)


def _open_shard(path: Path) -> BinaryIO:
    try:
        file = open_shard(path)
        start = os.pread(file.fileno(), BLOCK, 0)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({one_line(error)}). Copy it again, or remove it.") from error
    for magic, (name, command) in COMPRESSED.items():
        if start.startswith(magic) and not header_checksum(start):  # a member may be named so
            file.close()
            raise UserError(f"shard {path} is compressed by {name}: training reads samples at any place. Unpack it: {command}, as a .tar.")
    return file


def _json_counts(file: BinaryIO, entry: Mapping[str, tuple[int, int, int, str]]) -> bool:
    """Whether captions come from the sample's JSON: always where it has a list of them, else only for want of a text."""
    _, offset, size, _ = entry["json"]
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


def _has_names(file: BinaryIO, entry: Mapping[str, tuple[int, int, int, str]]) -> bool:
    """Whether the JSON beside a text may hold further captions by name."""
    _, offset, size, _ = entry["json"]
    if "text" not in entry or size > MAX_SAMPLE_TEXT_BYTES:
        return False
    file.seek(offset)
    try:
        content = json.loads(file.read(size))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(isinstance(value, (str, list)) for value in content.values())


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
    for name in repeated_classes(root):
        print(f"classes: {shown(name)!r} is the name of several, which cannot be told apart")
    if not (root / CLASSES_FILE).is_file() and any(_has_labels(root / split) for split in counts):
        print(f"there are labels, and no list of classes for zero-shot classification: give {root / CLASSNAMES} and index again")
    for split in sorted(set(SPLITS) - set(counts)):
        print(f"no {split} split: training and mmlg family need it; give --{split}-shards or a folder {split}/")


def _has_labels(folder: Path) -> bool:
    """Whether the first shard of a split has labels."""
    reader = ShardReader(folder)
    found = bool((reader.records(0)["flags"] & LABELLED).any())
    reader.close()
    return found
