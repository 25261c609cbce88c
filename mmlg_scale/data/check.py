"""`mmlg data check`: every byte of a data set against its manifest, every sample and every other file read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmlg_scale.data import SPLITS
from mmlg_scale.data.manifest import Progress
from mmlg_scale.data.reader import CHANGED_BYTES, CUT, FILE, HASH, MISSING, REMEDIES, ShardReader
from mmlg_scale.data.scan import Check, Span, scan
from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown


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
        if self.cause == FILE:
            return self.detail
        lost = f"{self.num_samples} samples" if self.num_samples else "the shard as a whole"
        which = f"sample {shown(self.key)}" if self.key is not None else lost
        return f"{self.shard}: {which}: {self.cause} ({self.detail}); {REMEDIES[self.cause]}"


def check_dataset(
    root: Path,
    *,
    splits: Sequence[str] | None = None,
    decode: bool = True,
    threads: int = 1,
    part: tuple[int, int] = (1, 1),
    progress: Progress = lambda items: items,
) -> list[Damage]:
    """Compare each shard's bytes with the manifest's SHA-256, and read each sample: headers, caption, JSON, image where `decode`; and,
    as the first part, the set's other files.

    What it finds is kept beside each manifest, so that a training run need not look again. Of several parts, (i, n), each looks at its own
    shards, and what they find is kept together.

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
    found = _check_small_files(root) if part[0] == 1 else []
    for split in splits or present:
        found += _check_split(root / split, split, decode, threads, part, progress)
    return found


def _check_small_files(root: Path) -> list[Damage]:
    """What every run reads of a set besides its splits: dataset.json, the tokenizer, the classes."""
    # Imported here: the command's help needs none of it.
    from mmlg_scale.data.classes import CLASSES_FILE, load_classes
    from mmlg_scale.data.tokens import described, offered_tokenizer

    found = list[Damage]()
    readers = {"dataset.json": lambda: described(root), "tokenizer": lambda: offered_tokenizer(root)}
    for name, read in {**readers, CLASSES_FILE: lambda: load_classes(root / CLASSES_FILE)}.items():
        try:
            read()
        except (UserError, OSError) as error:
            told = str(error)
            if all(told != damage.detail for damage in found):  # the tokenizer is compared with dataset.json
                found.append(Damage("-", name, None, FILE, told, 0))
    return found


def _check_split(folder: Path, split: str, decode: bool, threads: int, part: tuple[int, int], progress: Progress) -> list[Damage]:
    reader = ShardReader(folder)
    check: Check = "decode" if decode else "structure"
    faults = scan(folder, reader, check=check, hashed=True, threads=threads, fresh=True, part=part, progress=progress)
    found = []
    for shard in range(part[0] - 1, len(reader.shards), part[1]):
        file, spans = str(reader.shards.path(shard)), faults.spans.get(shard, [])
        found += _lines(split, file, shard, spans, reader)
        # The scan has compared the bytes of shards whose samples are all well; of others too, but keeps what it found in the samples.
        if any(cause == HASH for _, _, cause, _ in spans) or (spans and reader.is_changed(shard)):
            found.append(Damage(split, file, None, HASH, CHANGED_BYTES, 0))
    return found


def _lines(split: str, file: str, shard: int, spans: Sequence[Span], reader: ShardReader) -> list[Damage]:
    """A line per sample, but one for all samples that went with a missing or a cut shard."""
    start, lines = int(reader.shards.starts[shard]), list[Damage]()
    for first, count, cause, detail in spans:
        if cause not in (MISSING, CUT, HASH):
            lines += [Damage(split, file, reader.key(start + first + number), cause, detail, 1) for number in range(count)]
    for cause in (MISSING, CUT):
        lost = [span for span in spans if span[2] == cause]
        if lost:
            first, _, _, detail = lost[0]
            told = detail if cause == MISSING else f"from sample {shown(reader.key(start + first))} on: {detail}"
            lines.append(Damage(split, file, None, cause, told, sum(count for _, count, _, _ in lost)))
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
