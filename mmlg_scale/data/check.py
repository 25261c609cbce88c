"""`mmlg data check`: every byte of a data set against its manifest, every sample read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlg_scale.data import SPLITS
from mmlg_scale.data.faults import scan
from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.reader import CHANGED_BYTES, CUT, HASH, MISSING, REMEDIES, Fault, ShardReader
from mmlg_scale.errors import UserError


@dataclass(frozen=True)
class Damage:
    """One line of the report: a sample, or a whole shard where `key` is None; `num_samples` are lost by it."""

    split: str
    shard: str
    key: str | None
    cause: str
    detail: str
    num_samples: int

    def __str__(self) -> str:
        lost = f"{self.num_samples} samples" if self.num_samples else "the shard as a whole"
        which = f"sample {self.key}" if self.key is not None else lost
        return f"{self.shard}: {which}: {self.cause} ({self.detail}); {REMEDIES[self.cause]}"


def check_dataset(
    root: Path,
    *,
    splits: Sequence[str] | None = None,
    decode: bool = True,
    threads: int = 1,
    progress: Progress = lambda items: items,
) -> list[Damage]:
    """Compare each shard's bytes with the manifest's SHA-256, and read each sample: headers, caption, JSON, image where `decode`.

    What it finds is kept beside each manifest, so that a training run need not look again.

    Raises:
        UserError: no data set, no such split, a damaged manifest.
    """
    if not root.is_dir():
        raise UserError(f"no data set {root}: no such folder.")
    present = [split for split in SPLITS if (root / split / "manifest.json").is_file()]
    for split in splits or ():
        if split not in present:
            raise UserError(f"{root} has no split {split!r}; it has: {', '.join(present) or 'none'}. Name one of them.")
    if not present:
        raise UserError(
            f"{root} contains no data set (no split with a manifest.json). mmlg data pack writes one, mmlg data index describes shards."
        )
    found: list[Damage] = []
    for split in splits or present:
        found += _check_split(root / split, split, decode, threads, progress)
    return found


def _check_split(folder: Path, split: str, decode: bool, threads: int, progress: Progress) -> list[Damage]:
    reader = ShardReader(folder)
    faults = scan(folder, reader, check="decode" if decode else "structure", threads=threads, fresh=True, progress=progress)
    by_shard: dict[str, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_shard[fault.shard].append(fault)
    found = []
    for number, shard in enumerate(reader.shards):
        faults = by_shard[str(shard.file)]
        found += _lines(split, str(shard.file), faults)
        known = any(fault.cause == HASH for fault in faults) or (decode and not faults)  # the scan has hashed it
        if any(fault.cause == HASH for fault in faults) or (not known and reader.is_changed(number)):
            found.append(Damage(split, str(shard.file), None, HASH, CHANGED_BYTES, 0))
    return found


def _lines(split: str, shard: str, faults: Sequence[Fault]) -> list[Damage]:
    """A line per sample, but one for all samples that went with a missing or a cut shard."""
    lines = [Damage(split, shard, fault.key, fault.cause, fault.detail, 1) for fault in faults if fault.cause not in (MISSING, CUT, HASH)]
    for cause in (MISSING, CUT):
        lost = [fault for fault in faults if fault.cause == cause]
        if lost:
            detail = lost[0].detail if cause == MISSING else f"from sample {lost[0].key} on: {lost[0].detail}"
            lines.append(Damage(split, shard, None, cause, detail, len(lost)))
    return lines


def print_damage(found: Sequence[Damage], root: Path) -> None:
    """A line per fault, then a table of damaged samples by split and cause."""
    from rich.console import Console
    from rich.table import Table

    if not found:
        print(f"{root}: nothing is damaged.")
        return
    for damage in found:
        print(damage)
    lines: Counter[tuple[str, str]] = Counter((damage.split, damage.cause) for damage in found)
    samples: Counter[tuple[str, str]] = Counter()
    for damage in found:
        samples[damage.split, damage.cause] += damage.num_samples
    table = Table("split", "cause", "faults", "samples lost", "remedy")
    for split, cause in sorted(lines):
        table.add_row(split, cause, str(lines[split, cause]), str(samples[split, cause]), REMEDIES[cause])
    Console().print(table)
