"""Which samples of a split are damaged: found once before the first step, kept beside the manifest, listed, and limited.

Why before the first step. Batches are full on every rank, their order is a function of (seed, epoch, position), and a run resumes at the
exact sample; so the number of samples of an epoch must be known before it starts, and be the same on all ranks. A sample that is found
damaged in mid-epoch could only be replaced by one that the epoch reads anyway. Therefore each split is scanned: sizes, tar headers, UTF-8,
JSON, and a decode of every image. That costs what the decoding of one epoch costs, is shared by the ranks and by threads, and is kept
in `checked.json` beside the manifest, with size and time of every shard, until a shard changes. `mmlg data check` writes the same file
ahead of time. With `structure` images are not decoded: what does not decode is then found when it is read.

Damage that only appears while a run reads (a failing disk, an undecodable image under `structure`) is met by a substitute from the same
epoch order (`pipeline.py`), counted under its cause, and counted towards the same limit.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch.distributed as dist

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.reader import CHANGED_BYTES, HASH, MISSING, READ, REMEDIES, DamagedSample, Fault, ShardReader
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, open_append, writing
from mmlg_scale.ranks import is_first_rank, on_first_rank, several_ranks
from mmlg_scale.reading import one_line
from mmlg_scale.records import read_record, write_record

MAX_BAD_FRACTION = 0.01
Check = Literal["decode", "structure"]
CHECKS = ("decode", "structure")
CACHE_VERSION = 1
CACHE_FILE = "checked.json"
ANNOUNCE_FROM = 20_000
"""Samples from which a scan, which then takes a minute or more, says that it is under way."""

ShardState = dict[str, Any]
"""num_bytes and mtime_ns of a shard's file (null: missing), decode (whether images were decoded), faults [position, cause, detail]."""


@dataclass(frozen=True)
class EpochReport:
    """What was skipped and cut in one epoch, as one rank met it.

    Attributes:
        num_intact: samples that the epoch reads.
        skipped: damaged samples by cause.
        listed_in: the file with the full list, if any.
        num_captions: captions that this rank read.
        num_truncated: those of them that are longer than the context length.
        context_length: tokens per caption.
    """

    epoch: int
    num_intact: int
    skipped: dict[str, int]
    listed_in: Path | None
    num_captions: int
    num_truncated: int
    context_length: int

    def told_skipped(self) -> str:
        """The skipped samples in words."""
        where = f", listed in {self.listed_in}" if self.listed_in is not None else ""
        return f"epoch {self.epoch}: {sum(self.skipped.values())} samples skipped ({_causes(self.skipped)}){where}"

    def told_cut(self) -> str:
        """The cut captions in words."""
        return f"epoch {self.epoch}: {told_truncation(self.num_truncated, self.num_captions, self.context_length)}"


def told_truncation(num_truncated: int, num_captions: int, context_length: int) -> str:
    """How many captions are cut, in words."""
    return f"{num_truncated} of {num_captions} captions are cut to the context length of {context_length} tokens"


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items()))


def print_report(report: EpochReport) -> None:
    """One line on the console where something was skipped, and one, of the first rank's captions, where some were cut."""
    if report.skipped:
        print(report.told_skipped(), flush=True)
    if report.num_truncated and is_first_rank():
        print(report.told_cut(), flush=True)


def scan(
    folder: Path,
    reader: ShardReader,
    *,
    check: Check = "decode",
    threads: int = 1,
    shared: bool = False,
    fresh: bool = False,
    progress: Progress = lambda items: items,
) -> list[Fault]:
    """The damaged samples of a split in its order, from `checked.json` for the shards that have not changed since.

    Args:
        folder: the split that `reader` reads.
        threads: PIL decodes outside Python's lock, so threads share the work.
        shared: split the shards over the ranks of the running process group and exchange what they found; all ranks must call.
        fresh: look at every shard again.

    Raises:
        UserError: `check` is unknown.
    """
    if check not in CHECKS:
        raise UserError(f"data.check {check!r} is unknown. Use one of: {', '.join(CHECKS)}.")
    identity = manifest_digest(folder)
    files = [shard.file for shard in reader.shards]
    starts = _starts(reader.shard_sizes)
    known = {} if fresh else _load_cache(folder, identity)
    shared = shared and several_ranks()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)

    def state_of(shard: int) -> tuple[int, ShardState]:
        found, stamp = known.get(files[shard].name), _stamp(files[shard])
        unchanged = found is not None and stamp["num_bytes"] is not None and all(found[key] == stamp[key] for key in stamp)
        fits = found is not None and all(0 <= fault[0] < reader.shard_sizes[shard] for fault in found["faults"])
        if found is not None and unchanged and fits and (found["decode"] or check == "structure"):
            return shard, found
        part = reader.part(starts[shard], starts[shard] + reader.shard_sizes[shard])
        try:
            return shard, {**stamp, "decode": check == "decode", "faults": _scan_shard(part, decode=check == "decode")}
        finally:
            part.close()

    own = range(rank, len(files), world_size)
    if rank == 0 and check == "decode" and not known and len(reader) >= ANNOUNCE_FROM:
        print(f"checking the {len(reader)} samples of {folder}, once; kept in {CACHE_FILE}", flush=True)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        states = dict(progress(pool.map(state_of, own)))
    if shared:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, states)
        states = {shard: state for part in gathered for shard, state in part.items()}
    if rank == 0:
        _save_cache(folder, identity, {files[shard].name: state for shard, state in sorted(states.items())}, known)
    return [
        Fault(str(files[shard]), reader.places[starts[shard] + position].key, starts[shard] + position, cause, detail)
        for shard in range(len(files))
        for position, cause, detail in states[shard]["faults"]
    ]


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a split's manifest.json. Raises UserError where it cannot be read."""
    return file_digest(folder / "manifest.json", "the split's manifest")


def _starts(sizes: Sequence[int]) -> list[int]:
    starts, total = [], 0
    for size in sizes:
        starts.append(total)
        total += size
    return starts


def _stamp(file: Path) -> dict[str, int | None]:
    try:
        stat = file.stat()
    except OSError:
        return {"num_bytes": None, "mtime_ns": None}
    return {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _scan_shard(part: ShardReader, *, decode: bool) -> list[tuple[int, str, str]]:
    faults = []
    for position in range(len(part)):
        try:
            part.check_headers(position)
            part.check_text(position)
            if decode:
                part.check_image(position)
        except DamagedSample as damage:
            faults.append((position, damage.cause, damage.detail))
    if decode and not faults and part.shards and part.is_changed(0):
        # Pixels or words are others than were packed, and nothing says in which samples.
        faults = [(position, HASH, CHANGED_BYTES) for position in range(len(part))]
    return faults


def changed_faults(reader: ShardReader, faults: Sequence[Fault]) -> list[Fault]:
    """All samples of the shards whose bytes are not those of the manifest, though none of their samples is among `faults`."""
    found, starts, damaged = [], _starts(reader.shard_sizes), {fault.shard for fault in faults}
    for number, (shard, start) in enumerate(zip(reader.shards, starts, strict=True)):
        if str(shard.file) not in damaged and shard.num_samples and reader.is_changed(number):
            places = enumerate(reader.places[start : start + shard.num_samples], start)
            found += [Fault(str(shard.file), place.key, index, HASH, CHANGED_BYTES) for index, place in places]
    return found


def _load_cache(folder: Path, identity: str) -> dict[str, ShardState]:
    """What an earlier scan of this manifest found; anything unreadable counts as nothing found."""
    try:
        content = read_record(folder / CACHE_FILE, "record of checks", "", MAX_MANIFEST_BYTES)
        if content["format_version"] == CACHE_VERSION and content["manifest_sha256"] == identity:
            return {name: _checked_state(state) for name, state in content["shards"].items()}
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _checked_state(state: ShardState) -> ShardState:
    """A shard's state as the cache holds it, if it is one."""
    for position, cause, detail in state["faults"]:
        if type(position) is not int or cause not in REMEDIES or not isinstance(detail, str):
            raise ValueError(f"{cause!r} is no cause of damage")
    return {key: state[key] for key in ("num_bytes", "mtime_ns", "decode", "faults")}


def _save_cache(folder: Path, identity: str, states: dict[str, ShardState], known: dict[str, ShardState]) -> None:
    """Keep the states, except of shards that could not be read: storage may come back."""
    lasting = {
        name: {**state, "faults": [list(fault) for fault in state["faults"]]}
        for name, state in states.items()
        if not any(cause in (MISSING, READ) for _, cause, _ in state["faults"])
    }
    if lasting == known:
        return
    content = {"format_version": CACHE_VERSION, "manifest_sha256": identity, "shards": lasting}
    with contextlib.suppress(OSError):  # a data set may be read-only: then every run scans
        write_record(folder / CACHE_FILE, content)


def check_limit(faults: Sequence[Fault], num_samples: float, max_bad_fraction: float, listed_in: Path | None, what: str) -> None:
    """Stop where more than `max_bad_fraction` of `num_samples` are damaged.

    Raises:
        UserError: with the counts by cause, the first faults, and where the full list is.
    """
    if len(faults) <= max_bad_fraction * num_samples:
        return
    first = "; ".join(str(fault) for fault in faults[:3])
    where = f"Full list: {listed_in}." if listed_in is not None else "mmlg data check lists them all."
    raise UserError(
        f"{what}: {len(faults)} damaged samples ({_causes(Counter(fault.cause for fault in faults))}) are more than "
        f"data.max_bad_fraction {max_bad_fraction:g} of them. First: {first}. {where} Fix the data, or raise data.max_bad_fraction."
    )


class FaultLog:
    """One rank's account of what is skipped and cut: faults are appended to a JSON Lines file as they are found; an epoch ends with a sum.

    Args:
        known: the damaged samples that the epochs leave out.
        num_samples: of the split; `share` of them, and of `known`, fall to this rank.
        file: where the list goes; null: nowhere.
        what: the split, which starts messages.
    """

    def __init__(
        self,
        known: Sequence[Fault],
        num_samples: int,
        *,
        share: float,
        max_bad_fraction: float,
        file: Path | None,
        context_length: int,
        on_epoch: Callable[[EpochReport], None],
        what: str,
    ) -> None:
        self.known, self.num_samples, self.share, self.what = list(known), num_samples, share, what
        self.max_bad_fraction, self.file, self.on_epoch = max_bad_fraction, file, on_epoch
        self.context_length = context_length
        self._met: dict[int, list[Fault]] = {}
        self._captions: Counter[int] = Counter()
        self._cut: Counter[int] = Counter()

    def add(self, epoch: int, step: int, faults: Iterable[Fault]) -> None:
        """Count samples of `epoch` that turned out damaged when `step` read them.

        Raises:
            UserError: more than the limit of this rank's samples of the epoch are damaged.
        """
        new = list(faults)
        if not new:
            return
        met = self._met.setdefault(epoch, [])
        met += new
        append_faults(self.file, new, epoch=epoch, step=step)
        if len(met) + self.share * len(self.known) > self.max_bad_fraction * self.num_samples * self.share:
            check_limit([*met, *self.known], 0.0, self.max_bad_fraction, self.file, f"{self.what}, epoch {epoch}")

    def add_captions(self, read: Mapping[int, int], cut: Mapping[int, int]) -> None:
        """Count captions by epoch: those that were read, and those of them that were cut."""
        self._captions.update(read)
        self._cut.update(cut)

    def end_epoch(self, epoch: int) -> None:
        """Report the epoch; every rank reports what it met itself."""
        met = self._met.pop(epoch, [])
        counts = dict(Counter(fault.cause for fault in (*self.known, *met)))
        captions, cut = self._captions.pop(epoch, 0), self._cut.pop(epoch, 0)
        self.on_epoch(EpochReport(epoch, self.num_samples - len(self.known), counts, self.file, captions, cut, self.context_length))


def known_faults(
    folder: Path, reader: ShardReader, *, check: Check, max_bad_fraction: float, record: Path | None, rank: int, threads: int, shared: bool
) -> list[Fault]:
    """The damaged samples that a run leaves out: as its record says, or else as a scan finds them, the same on every rank.

    Args:
        record: the run's folder, which keeps the set over a resume.
        shared: this is one of the ranks of the process group, which all call.

    Raises:
        UserError: more than the limit, or a damaged record; on every rank.
    """
    identity = manifest_digest(folder)
    file = None if record is None else record / "data-skipped.json"
    first = on_first_rank if shared else _call
    recorded = first(lambda: _load_record(file, identity))
    if recorded is not None:
        return recorded
    faults = scan(folder, reader, check=check, threads=threads, shared=shared)
    list_file = fault_list(record, 0 if shared else rank)

    def note() -> None:
        if list_file is not None:
            list_file.unlink(missing_ok=True)  # of an earlier start, which came no further
            append_faults(list_file, faults, epoch=0, step=0)

    def keep() -> None:
        if file is not None:
            write_record(file, {"manifest_sha256": identity, "faults": [vars(fault) for fault in faults]})

    first(note)
    check_limit(faults, len(reader), max_bad_fraction, list_file, str(folder))
    first(keep)
    return faults


T = TypeVar("T")


def _call(work: Callable[[], T]) -> T:
    return work()


def fault_list(record: Path | None, rank: int) -> Path | None:
    """The file in which a rank lists its faults."""
    return None if record is None else record / f"data-faults-rank{rank}.jsonl"


def _load_record(file: Path | None, identity: str) -> list[Fault] | None:
    """The damaged samples that the run left out so far; None where it starts afresh, or on another data set."""
    if file is None or not file.is_file():
        return None
    remedy = "Remove it; the run then checks its data again."
    content = read_record(file, "record of skipped samples", remedy, MAX_MANIFEST_BYTES)
    try:
        return [Fault(**fault) for fault in content["faults"]] if content["manifest_sha256"] == identity else None
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}). {remedy}") from error


def intact_samples(reader: ShardReader, faults: Sequence[Fault]) -> list[np.ndarray]:
    """The samples of each shard that are not damaged: int64 [N] per shard."""
    whole = np.ones(len(reader), bool)
    whole[[fault.index for fault in faults]] = False
    edges = np.cumsum(reader.shard_sizes)[:-1]
    return [part[keep] for part, keep in zip(np.split(np.arange(len(reader)), edges), np.split(whole, edges), strict=True)]


def append_faults(file: Path | None, faults: Sequence[Fault], *, epoch: int, step: int) -> None:
    """Append one JSON line per fault."""
    if file is None or not faults:
        return
    lines = [json.dumps({"epoch": epoch, "step": step, **vars(fault)}, ensure_ascii=False) + "\n" for fault in faults]
    make_folder(file.parent)
    with writing(file), open_append(file) as opened:
        opened.write("".join(lines))
