"""Which samples of a split are damaged, found once and kept beside its manifest until a shard changes.

`checked.json` holds, of each shard, its size and time and what was found in it. The index pass and packing write it for what they read
(headers and captions), a run's start and `mmlg data check` complete it. Parts that other jobs checked lie beside it as `checked-*.json`,
and are taken in by whoever writes the whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import torch.distributed as dist

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data.manifest import Progress, listed_text, manifest_digest
from mmlg_scale.data.reader import CHANGED_BYTES, HASH, MISSING, READ, REMEDIES, DamagedSample, Fault, ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_text_atomic
from mmlg_scale.ranks import is_first_rank, several_ranks
from mmlg_scale.records import read_record

Check = Literal["auto", "decode", "structure"]
CHECKS = ("auto", "decode", "structure")
AUTO_DECODE_SAMPLES = 200_000
"""Up to so many samples of a split `auto` decodes every image, which takes a core about a minute for 200,000 of 300 pixels."""
ANNOUNCE_FROM = 20_000
"""Samples from which a scan, which then takes a minute or more, says that it is under way."""
CACHE_VERSION = 2
CACHE_FILE = "checked.json"
SAVE_SECONDS = 60.0
"""How often a long scan writes down what it has."""
_CHUNK = 64
"""Samples that a thread checks at a time: shards are too few and too unequal to be shared among threads."""

Span = tuple[int, int, str, str]
"""Damaged samples that follow each other for one reason: the first's position in its shard, how many, cause, detail."""
ShardState = dict[str, Any]
"""num_bytes and mtime_ns of a shard's file (null: missing), decode (whether images were decoded), hashed (whether the shard's SHA-256 was
compared), faults: a list of Span."""
T = TypeVar("T")
R = TypeVar("R")


class Findings:
    """The damaged samples of a split: iterated in its order, each as a `Fault`, whose key is then read."""

    def __init__(self, reader: ShardReader, spans: Mapping[int, Iterable[Span]]) -> None:
        self._reader = reader
        self.spans: dict[int, list[Span]] = {shard: list(found) for shard, found in sorted(spans.items()) if found}
        self.counts: Counter[str] = Counter()
        for found in self.spans.values():
            for _, count, cause, _ in found:
                self.counts[cause] += count

    def __len__(self) -> int:
        return self.counts.total()

    def __iter__(self) -> Iterator[Fault]:
        reader = self._reader.clone()
        for shard, found in self.spans.items():
            file, start = reader.shards.told(shard), int(reader.shards.starts[shard])
            for first, count, cause, detail in found:
                for index in range(start + first, start + first + count):
                    yield Fault(file, reader.key(index), index, cause, detail)
        reader.close()

    def positions(self) -> np.ndarray:
        """The damaged samples, sorted: int64 [F]."""
        starts = self._reader.shards.starts
        parts = [np.arange(first, first + count) + starts[shard] for shard, found in self.spans.items() for first, count, *_ in found]
        return np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.int64)


def num_threads() -> int:
    """The cores that fall to this rank: of those that it may use, which it shares with the other ranks of its node.

    Slurm binds each of its tasks to cores of its own, unless the cluster leaves them unbound.
    """
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    is_task = os.environ.get("SLURM_NTASKS") == os.environ.get("WORLD_SIZE", "1")
    if is_task and cores <= int(os.environ.get("SLURM_CPUS_PER_TASK", "0")):
        return cores
    return max(1, cores // ranks)


def resolved(check: Check, num_samples: int, *, remote: bool = False) -> Literal["decode", "structure"]:
    """What `check` means for a split; a `remote` one is fetched as a whole only where that is asked for. Raises UserError: unknown."""
    if check not in CHECKS:
        raise UserError(f"data.check {check!r} is unknown. Use one of: {', '.join(CHECKS)}.")
    if check == "auto":
        return "decode" if num_samples <= AUTO_DECODE_SAMPLES and not remote else "structure"
    return check


def scan(
    folder: Path,
    reader: ShardReader,
    *,
    check: Check = "decode",
    hashed: bool = False,
    threads: int = 1,
    shared: bool = False,
    fresh: bool = False,
    part: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> Findings:
    """The damaged samples of a split in its order; shards that have not changed since an earlier scan are not read again.

    Args:
        folder: the split that `reader` reads.
        hashed: compare the SHA-256 of shards also where images are not decoded.
        threads: PIL decodes outside Python's lock, so threads share the work.
        shared: share it with the ranks of the running process group, and exchange what they found; all ranks must call.
        fresh: look at every shard again.
        part: (i, n): only the i-th of n parts of the shards, counted from 1; the result is kept beside that of the other parts.
        progress: wraps the work; by default a bar on the first rank's terminal.

    Raises:
        UserError: `check` is unknown, or a shard's index is missing or damaged.
    """
    decode = resolved(check, len(reader), remote=reader.shards.store is not None) == "decode"
    shared = shared and several_ranks()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    cache = _Cache(folder, {} if fresh else load_states(folder), part)
    shards = range(part[0] - 1, len(reader.shards), part[1])
    states = {shard: cache.kept(reader, shard, decode, hashed) for shard in shards[rank::world_size]}
    states = _exchanged(states) if shared else states
    missing = [shard for shard in sorted(states) if states[shard] is None]
    to_read = int(reader.shards.samples[missing].sum())
    if rank == 0 and is_first_rank() and progress is None and to_read >= ANNOUNCE_FROM:
        print(f"checking {to_read:,} samples of {reader.shards.where}, once; kept in {CACHE_FILE}", flush=True)
    work = _Work(reader, missing, decode, hashed or decode, rank, world_size)
    bar = progress or _bar("checking data")
    found = _shared(lambda: work.run(threads, bar, None)) if shared else work.run(threads, bar, cache)
    done = {shard: state for shard, state in states.items() if state is not None} | work.states(found)
    if rank == 0:
        names = reader.shards.names
        cache.save({names[shard]: state for shard, state in sorted(done.items())}, whole=part == (1, 1))
    return Findings(reader, {shard: state["faults"] for shard, state in done.items()})


def _bar(description: str) -> Progress:
    """A progress bar with the time that is left, on the first rank's terminal."""
    if not is_first_rank() or not sys.stderr.isatty():
        return lambda items: items
    from rich.progress import track

    from mmlg_scale.terminal import Terminal

    return lambda items: track(items, description=description, console=Terminal(stderr=True))


def _exchanged(own: Mapping[int, Any]) -> dict[int, Any]:
    """The entries of all ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(own))
    return {key: value for found in gathered for key, value in found.items()}


Found: TypeAlias = dict[int, list[Span]]
"""By shard; an entry (-1, 0, HASH, ...) says that its bytes have changed."""


def _shared(work: Callable[[], Found]) -> Found:
    """What all ranks found; what ends the work of one ends that of all, so that none waits for it."""
    own: Found = {}
    error: Exception | None = None
    try:
        own = work()
    except (UserError, OSError) as raised:
        error = raised
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, None if error is None else str(error)))
    if error is not None:
        raise error
    merged: Found = {}
    for found, told in gathered:
        if told is not None:
            raise UserError(told)
        for shard, spans in found.items():
            merged.setdefault(shard, []).extend(spans)
    return merged


class _Work:
    """The shards that are to be read, in chunks of samples of which this rank takes every `world_size`-th."""

    def __init__(self, reader: ShardReader, shards: list[int], decode: bool, hashed: bool, rank: int, world_size: int) -> None:
        self.reader, self.shards, self.decode, self.hashed = reader, shards, decode, hashed
        self.rank, self.world_size = rank, world_size
        self.stamps = {shard: _stamp_of(reader, shard) for shard in shards}
        self._local = threading.local()
        self._clones: list[ShardReader] = []

    def _chunks(self) -> Iterator[tuple[int, int, int]]:
        """(shard, first, stop) of samples; (shard, -1, -1): the shard's hash."""
        for shard in self.shards:
            if self.hashed:
                yield shard, -1, -1
            size = int(self.reader.shards.samples[shard])
            yield from ((shard, first, min(first + _CHUNK, size)) for first in range(0, size, _CHUNK))

    def __length_hint__(self) -> int:
        total = sum(-(-int(self.reader.shards.samples[shard]) // _CHUNK) + self.hashed for shard in self.shards)
        return (total - self.rank + self.world_size - 1) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return islice(self._chunks(), self.rank, None, self.world_size)

    def run(self, threads: int, progress: Progress, cache: _Cache | None) -> Found:
        """Read what falls to this rank; `cache` is written to now and then."""
        found: Found = {}
        if not self.shards:
            return found
        complete, saved = self.shards[0], time.monotonic()
        try:
            with ThreadPoolExecutor(max(1, threads)) as pool:
                for (shard, _, _), spans in ahead(pool, self._read, progress(self), 4 * max(1, threads)):
                    found.setdefault(shard, []).extend(spans)
                    if cache is not None and shard != complete and time.monotonic() - saved > SAVE_SECONDS:
                        names = self.reader.shards.names
                        done = {number: list(found[number]) for number in found if number < shard}
                        cache.add({names[number]: state for number, state in self.states(done, only=done).items()})
                        saved = time.monotonic()
                    complete = shard
        finally:
            for clone in self._clones:
                clone.close()
        return found

    def _read(self, chunk: tuple[int, int, int]) -> list[Span]:
        reader = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = self.reader.clone()
            self._clones.append(reader)
        shard, first, stop = chunk
        if first < 0:
            return [(-1, 0, HASH, CHANGED_BYTES)] if reader.is_changed(shard) else []
        start = int(reader.shards.starts[shard])
        return check_samples(reader, range(start + first, start + stop), start, decode=self.decode)

    def states(self, found: Found, only: Iterable[int] | None = None) -> dict[int, ShardState]:
        """What is to be kept of each shard."""
        states = {}
        for shard in self.shards if only is None else only:
            spans = sorted(found.get(shard, []))
            changed = bool(spans) and spans[0][0] < 0
            spans = _joined(spans[changed:])
            if changed and not spans:
                # Pixels or words are others than were packed, and nothing says in which samples.
                spans = [(0, int(self.reader.shards.samples[shard]), HASH, CHANGED_BYTES)]
            states[shard] = {**self.stamps[shard], "decode": self.decode, "hashed": self.hashed, "faults": spans}
        return states


def check_samples(reader: ShardReader, samples: Iterable[int], start: int, *, decode: bool) -> list[Span]:
    """The damaged ones of some samples of a shard whose first is `start`."""
    spans = []
    for index in samples:
        try:
            reader.check_headers(index)
            reader.check_text(index)
            if decode:
                reader.check_image(index)
        except DamagedSample as damage:
            spans.append((index - start, 1, damage.cause, damage.detail))
    return _joined(spans)


def _joined(spans: list[Span]) -> list[Span]:
    """Sorted spans, those of one cause and detail that follow each other made one."""
    joined: list[Span] = []
    for first, count, cause, detail in spans:
        if joined and joined[-1][0] + joined[-1][1] == first and joined[-1][2:] == (cause, detail):
            joined[-1] = (joined[-1][0], joined[-1][1] + count, cause, detail)
        else:
            joined.append((first, count, cause, detail))
    return joined


def ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) in the order of the items, of which at most `count` are under way."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) >= count:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _stamp_of(reader: ShardReader, shard: int) -> dict[str, int | None]:
    """Of a remote shard what the manifest says: its copy is only there if that is true."""
    if reader.shards.store is None:
        return _stamp(reader.shards.path(shard))
    return {"num_bytes": int(reader.shards.num_bytes[shard]), "mtime_ns": None}


def _stamp(file: Path) -> dict[str, int | None]:
    try:
        stat = file.stat()
    except OSError:
        return {"num_bytes": None, "mtime_ns": None}
    return {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def state_of(file: Path, faults: list[Span]) -> ShardState:
    """The state of a shard whose headers and captions were just read, and whose SHA-256 just taken."""
    return {**_stamp(file), "decode": False, "hashed": True, "faults": faults}


def load_states(folder: Path) -> dict[str, ShardState]:
    """What earlier scans of this manifest found, by the shard's name; anything unreadable counts as nothing found."""
    try:
        identity = manifest_digest(folder)
        # Of two that say as much of a shard the newer one counts: the shard may have changed in between.
        files = sorted(folder.glob("checked*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    except (UserError, OSError):
        return {}
    states: dict[str, ShardState] = {}
    for file in files:
        try:
            content = read_record(file, "record of checks", "", MAX_MANIFEST_BYTES)
            if content["format_version"] == CACHE_VERSION and content["manifest_sha256"] == identity:
                for name, state in content["shards"].items():
                    new = _checked_state(state)
                    if name not in states or (new["decode"], new["hashed"]) >= (states[name]["decode"], states[name]["hashed"]):
                        states[name] = new
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return states


def _checked_state(state: ShardState) -> ShardState:
    """A shard's state as the cache holds it, if it is one."""
    faults = checked_spans(state["faults"])
    return {**{key: state[key] for key in ("num_bytes", "mtime_ns", "decode", "hashed")}, "faults": faults}


def checked_spans(spans: Iterable[Any]) -> list[Span]:
    """Spans that a file holds. Raises ValueError or TypeError where they are none."""
    found = []
    for first, count, cause, detail in spans:
        if type(first) is not int or type(count) is not int or first < 0 or count < 1:
            raise ValueError("no place in a shard")
        if cause not in REMEDIES or not isinstance(detail, str):
            raise ValueError(f"{cause!r} is no cause of damage")
        found.append((first, count, cause, detail))
    return found


class _Cache:
    """What is kept between scans of a split; `part` (i, n) has a file of its own where there are several."""

    def __init__(self, folder: Path, known: dict[str, ShardState], part: tuple[int, int]) -> None:
        self.folder, self.known = folder, known
        self.part_file = folder / (CACHE_FILE if part[1] == 1 else f"checked-{part[0]}-of-{part[1]}.json")

    def kept(self, reader: ShardReader, shard: int, decode: bool, hashed: bool) -> ShardState | None:
        """What is known of a shard, if that is enough and its file is the one that was looked at.

        Of a remote shard the headers and captions need no look: packing and indexing have had it, and what they found lies beside the
        manifest.
        """
        found = self.known.get(reader.shards.names[shard])
        remote, size = reader.shards.store is not None, int(reader.shards.samples[shard])
        if remote and not decode:
            unseen: ShardState = {**_stamp_of(reader, shard), "decode": False, "hashed": False, "faults": []}
            found = unseen if found is None or found["num_bytes"] != unseen["num_bytes"] else found
        elif found is None or (decode and not found["decode"]) or (hashed and not found["hashed"] and not remote):
            return None
        stamp = _stamp_of(reader, shard)
        if stamp["num_bytes"] is None or any(found[key] != stamp[key] for key in stamp if not (remote and key == "mtime_ns")):
            return None
        return found if all(first + count <= size for first, count, *_ in found["faults"]) else None

    def add(self, states: dict[str, ShardState]) -> None:
        """Write down some more shards."""
        self.known.update(states)
        save_states(self.folder, self.known, self.part_file)

    def save(self, states: dict[str, ShardState], *, whole: bool) -> None:
        """Write down what is known of all shards, which makes the files of parts superfluous, or of those of a part."""
        parts = [file for file in self.folder.glob("checked-*.json") if whole]
        if states == self.known and not parts and whole:
            return
        if save_states(self.folder, states, self.folder / CACHE_FILE if whole else self.part_file):
            with contextlib.suppress(OSError):
                for file in parts:
                    file.unlink()


def save_states(folder: Path, states: Mapping[str, ShardState], file: Path | None = None) -> bool:
    """Keep the states, except of shards that could not be read: storage may come back. False where the data set is read-only."""
    lasting = [(name, state) for name, state in states.items() if not any(cause in (MISSING, READ) for _, _, cause, _ in state["faults"])]
    text = listed_text({"format_version": CACHE_VERSION, "manifest_sha256": manifest_digest(folder)}, "shards", lasting)
    try:
        write_text_atomic(file or folder / CACHE_FILE, text)
    except OSError:
        return False  # then every run scans
    return True
