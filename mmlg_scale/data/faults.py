"""What becomes of damaged samples: left out of the epochs, counted, listed, and limited.

Why they are known before the first step. Batches are full on every rank, their order is a function of (seed, epoch, position), and a run
resumes at the exact sample; so the number of samples of an epoch must be known before it starts, and be the same on all ranks. A sample
that is found damaged in mid-epoch could only be replaced by one that the epoch reads anyway. Therefore each split is scanned (`scan.py`):
sizes, tar headers, UTF-8, JSON, and, of splits that are not too large, a decode of every image. That is shared by ranks and threads, and is
kept until a shard changes. With `structure` images are not decoded: what does not decode is then found when it is read.

Damage that only appears while a run reads (a failing disk, an undecodable image under `structure`) is met by a substitute from the same
epoch order (`pipeline.py`), counted under its cause, and counted towards the same limit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmlg_scale.bounds import MAX_MANIFEST_BYTES
from mmlg_scale.data.manifest import listed_text, manifest_digest
from mmlg_scale.data.reader import Fault, ShardReader
from mmlg_scale.data.scan import Check, Findings, Span, checked_spans, scan
from mmlg_scale.errors import UserError
from mmlg_scale.files import make_folder, open_append, write_text_atomic, writing
from mmlg_scale.ranks import is_first_rank, on_first_rank
from mmlg_scale.reading import one_line, shown
from mmlg_scale.records import read_record

MAX_BAD_FRACTION = 0.01
SHOWN = 3
"""Faults that a message names."""


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
        source: the name of the mixture's source, if it is of one.
        lacking: samples that lack a name of data.captions, by name.
        captions_per_image: that are read of a sample.
        num_repeated: captions that were read twice in a batch, because their sample has fewer than that.
    """

    epoch: int
    num_intact: int
    skipped: dict[str, int]
    listed_in: Path | None
    num_captions: int
    num_truncated: int
    context_length: int
    source: str = ""
    lacking: dict[str, int] = field(default_factory=dict)
    captions_per_image: int = 1
    num_repeated: int = 0

    @property
    def _which(self) -> str:
        return f"{self.source}, epoch {self.epoch}" if self.source else f"epoch {self.epoch}"

    def told_skipped(self) -> str:
        """The skipped samples in words."""
        where = f", listed in {self.listed_in}" if self.listed_in is not None else ""
        return f"{self._which}: {sum(self.skipped.values())} samples skipped ({_causes(self.skipped)}){where}"

    def told_cut(self) -> str:
        """The cut captions in words."""
        return f"{self._which}: {told_truncation(self.num_truncated, self.num_captions, self.context_length)}"

    def told_lacking(self) -> str:
        """The captions that are not of the name that might have been drawn, in words."""
        causes = ", ".join(f"{shown(name)!r} in {count}" for name, count in sorted(self.lacking.items()))
        samples = self.num_captions // self.captions_per_image
        return f"{self._which}: of {samples} samples, there are no captions named {causes}; their others were read"

    def told_repeated(self) -> str:
        """The captions that were read again, in words."""
        told = f"{self.num_repeated} of {self.num_captions} captions were read twice in a batch"
        return f"{self._which}: {told}: their samples have fewer than data.captions_per_image {self.captions_per_image}"


def told_truncation(num_truncated: int, num_captions: int, context_length: int) -> str:
    """How many captions are cut, in words."""
    return f"{num_truncated} of {num_captions} captions are cut to the context length of {context_length} tokens"


def _causes(counts: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items()))


def print_report(report: EpochReport) -> None:
    """A line on the console where something was skipped; of the first rank's captions, where some were cut or repeated or lack a name."""
    if report.skipped:
        print(report.told_skipped(), flush=True)
    if report.num_truncated and is_first_rank():
        print(report.told_cut(), flush=True)
    if report.lacking and is_first_rank():
        print(report.told_lacking(), flush=True)
    if report.num_repeated and is_first_rank():
        print(report.told_repeated(), flush=True)


def check_limit(
    counts: Counter[str], first: Iterable[Fault], num_samples: float, max_bad_fraction: float, listed_in: Path | None, what: str
) -> None:
    """Stop where more than `max_bad_fraction` of `num_samples` are damaged: `counts` by cause, of which some come `first`.

    Raises:
        UserError: with the counts by cause, the first faults, and where the full list is.
    """
    if counts.total() <= max_bad_fraction * num_samples:
        return
    told = "; ".join(str(fault) for fault in islice(first, SHOWN))
    where = f"Full list: {listed_in}." if listed_in is not None else "mmlg data check lists them all."
    raise UserError(
        f"{what}: {counts.total()} damaged samples ({_causes(counts)}) are more than "
        f"data.max_bad_fraction {max_bad_fraction:g} of them. First: {told}. {where} Fix the data, or raise data.max_bad_fraction."
    )


class FaultLog:
    """One rank's account of what is skipped and cut: faults are appended to a JSON Lines file as they are found; an epoch ends with a sum.

    Args:
        known: the damaged samples that the epochs leave out.
        num_samples: of the split; `share` of them, and of `known`, fall to this rank.
        file: where the list goes; null: nowhere.
        what: the split, which starts messages.
        source, captions_per_image: as in the reports.
    """

    def __init__(
        self,
        known: Findings,
        num_samples: int,
        *,
        share: float,
        max_bad_fraction: float,
        file: Path | None,
        context_length: int,
        on_epoch: Callable[[EpochReport], None],
        what: str,
        source: str = "",
        captions_per_image: int = 1,
    ) -> None:
        self.known, self.num_samples, self.share, self.what = known, num_samples, share, what
        self.max_bad_fraction, self.file, self.on_epoch = max_bad_fraction, file, on_epoch
        self.context_length, self.source, self.captions_per_image = context_length, source, captions_per_image
        self._met: dict[int, list[Fault]] = {}
        self._captions: Counter[int] = Counter()
        self._cut: Counter[int] = Counter()
        self._repeated: Counter[int] = Counter()
        self._lacking: dict[int, Counter[str]] = {}

    def add(self, epoch: int, step: int, faults: Iterable[Fault]) -> None:
        """Count samples of `epoch` that turned out damaged when `step` read them.

        Raises:
            UserError: more than the limit of this rank's samples of the epoch are damaged; of several ranks, more by four standard
                deviations, since a rank meets a random part of the damaged samples.
        """
        new = list(faults)
        if not new:
            return
        met = self._met.setdefault(epoch, [])
        met += new
        append_faults(self.file, new, epoch=epoch, step=step)
        allowed, part = self.max_bad_fraction * self.num_samples * self.share, ""
        counts = Counter(fault.cause for fault in met)
        if self.share < 1:
            allowed += 4 * math.sqrt(allowed)
            part = f", a rank's part of {round(self.num_samples * self.share)} samples"
        if len(met) + self.share * len(self.known) > allowed:
            counts += Counter({cause: round(self.share * count) for cause, count in self.known.counts.items()})
            check_limit(counts, chain(met, self.known), 0.0, self.max_bad_fraction, self.file, f"{self.what}, epoch {epoch}{part}")

    def add_captions(self, epoch: int, samples: int, cut: int, repeated: int, lacking: Mapping[str, int]) -> None:
        """Count samples that were read, captions of them that were cut or repeated, and those of them that lack a name, by name."""
        self._captions[epoch] += samples * self.captions_per_image
        self._cut[epoch] += cut
        self._repeated[epoch] += repeated
        if lacking:
            self._lacking.setdefault(epoch, Counter()).update(lacking)

    def end_epoch(self, epoch: int) -> None:
        """Report the epoch; every rank reports what it met itself."""
        met = self._met.pop(epoch, [])
        counts = dict(self.known.counts + Counter(fault.cause for fault in met))
        captions, cut = self._captions.pop(epoch, 0), self._cut.pop(epoch, 0)
        lacking = dict(self._lacking.pop(epoch, {}))
        self.on_epoch(
            EpochReport(
                epoch,
                self.num_samples - len(self.known),
                counts,
                self.file,
                captions,
                cut,
                self.context_length,
                self.source,
                lacking,
                self.captions_per_image,
                self._repeated.pop(epoch, 0),
            )
        )


def known_faults(
    folder: Path,
    reader: ShardReader,
    *,
    check: Check,
    max_bad_fraction: float,
    record: Path | None,
    rank: int,
    threads: int,
    shared: bool,
    label: str = "",
) -> Findings:
    """The damaged samples that a run leaves out: as its record says, or else as a scan finds them, the same on every rank.

    Args:
        record: the run's folder, which keeps the set over a resume.
        shared: this is one of the ranks of the process group, which all call.
        label: part of the names of the run's files, where it reads several splits.

    Raises:
        UserError: more than the limit, or a damaged record; on every rank.
    """
    identity = manifest_digest(folder)
    file = None if record is None else record / f"data-skipped{label}.json"
    first = on_first_rank if shared else _call
    recorded = first(lambda: _load_record(file, identity, reader))
    if recorded is not None:
        return Findings(reader, recorded)
    faults = scan(folder, reader, check=check, threads=threads, shared=shared)
    list_file = fault_list(record, 0 if shared else rank, label)

    def note() -> None:
        if list_file is not None:
            list_file.unlink(missing_ok=True)  # of an earlier start, which came no further
            append_faults(list_file, faults, epoch=0, step=0)

    def keep() -> None:
        if file is not None:
            entries = [(str(shard), spans) for shard, spans in faults.spans.items()]
            write_text_atomic(file, listed_text({"manifest_sha256": identity}, "shards", entries))

    first(note)
    check_limit(faults.counts, faults, len(reader), max_bad_fraction, list_file, reader.shards.where)
    first(keep)
    return faults


T = TypeVar("T")


def _call(work: Callable[[], T]) -> T:
    return work()


def fault_list(record: Path | None, rank: int, label: str = "") -> Path | None:
    """The file in which a rank lists its faults."""
    return None if record is None else record / f"data-faults{label}-rank{rank}.jsonl"


def _load_record(file: Path | None, identity: str, reader: ShardReader) -> dict[int, list[Span]] | None:
    """The damaged samples that the run left out so far; None where it starts afresh, or on another data set."""
    if file is None or not file.is_file():
        return None
    remedy = "Remove it; the run then checks its data again."
    content = read_record(file, "record of skipped samples", remedy, MAX_MANIFEST_BYTES)
    try:
        if content["manifest_sha256"] != identity:
            return None
        if "faults" in content:  # of an earlier version
            return _by_shard(content["faults"], reader)
        spans = {int(shard): checked_spans(found) for shard, found in content["shards"].items()}
        for shard, found in spans.items():
            if not 0 <= shard < len(reader.shards) or any(first + count > reader.shards.samples[shard] for first, count, *_ in found):
                raise ValueError("a sample that the data set does not have")
        return spans
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}). {remedy}") from error


def _by_shard(faults: Iterable[Mapping[str, Any]], reader: ShardReader) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = {}
    for fault in faults:
        shard = int(np.searchsorted(reader.shards.starts, fault["index"], side="right")) - 1
        if not 0 <= shard < len(reader.shards):
            raise ValueError("a sample that the data set does not have")
        found.setdefault(shard, []).append((fault["index"] - int(reader.shards.starts[shard]), 1, fault["cause"], fault["detail"]))
    return {shard: checked_spans(spans) for shard, spans in found.items()}


def append_faults(file: Path | None, faults: Findings | Sequence[Fault], *, epoch: int, step: int) -> None:
    """Append one JSON line per fault."""
    if file is None or not len(faults):
        return
    make_folder(file.parent)
    with writing(file), open_append(file) as opened:
        for fault in faults:
            opened.write(json.dumps({"epoch": epoch, "step": step, **vars(fault)}, ensure_ascii=False) + "\n")
