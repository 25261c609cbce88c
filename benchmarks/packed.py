"""How much faster are training steps on packed captions than on captions cut to the batch's longest?

    python -m benchmarks.packed --data runs/packed                        # demo and mid, ancestor and extraction; CPU, one core
    python -m benchmarks.packed --data runs/packed --models mid --out DIR   # and packed_cpu.json

The same stage with the same weights, twice in one process; windows over the same decoded batches alternate, the first of two in turn.
What is timed is `train_step`, the optimiser included; ratios are of neighbouring windows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.throughput import Task, _timed, make_task
from mmlg_scale.data.corpus import pairs_of
from mmlg_scale.recipe import Extraction
from mmlg_scale.runtime import Runtime, TextMode
from mmlg_scale.throughput import Cell, RoleName, role_of, settings_of
from mmlg_scale.towers import cut_length, lengths_of
from mmlg_scale.training.session import Session, build_session

PREDICTED = {
    ("demo", "ancestor"): 1.05,
    ("demo", "extraction"): 1.00,
    ("mid", "ancestor"): 1.08,
    ("mid", "extraction"): 1.08,
}
"""Cut over packed, by CPU time, written down before the first run."""
MODES: tuple[TextMode, TextMode] = ("cut", "packed")


def build(task: Task, role: RoleName, text: TextMode, folder: Path) -> Session:
    """The session of a role whose captions are computed that way."""
    batch_size = task.batch_size if role == "ancestor" else task.settings.extraction.training.batch_size
    cell = Cell(role, None, task.settings.engine.precision, 0, batch_size)
    settings = settings_of(task.settings, cell)
    assert isinstance(settings.extraction, Extraction)
    # Students of similar depth, so that windows cost about the same.
    settings = replace(settings, extraction=replace(settings.extraction, width_shares=[1.0], min_layers=6))
    pairs = pairs_of(settings.data)
    return build_session(settings, role_of(settings, cell, pairs, folder), runtime=Runtime(text=text), pairs=pairs)


def compare(task: Task, role: RoleName, folder: Path, pairs: int) -> dict[str, Any]:
    """Medians of a step's seconds, and the ratios of neighbouring windows."""
    sessions = {mode: build(task, role, mode, folder) for mode in MODES}
    stream = iter(sessions["cut"].stream())
    kept = [next(stream) for _ in range(task.steps)]
    counts = {mode: itertools.count() for mode in MODES}
    losses = {mode: float(session.train_step(kept[0], next(counts[mode]))) for mode, session in sessions.items()}
    apart = abs(losses["cut"] - losses["packed"]) / abs(losses["cut"])
    if apart > 1e-5:
        raise RuntimeError(f"{task.name}: the losses on one batch are {losses}: not the same work")

    def work(mode: TextMode) -> Callable[[], None]:
        def run() -> None:
            for batch in kept:
                sessions[mode].train_step(batch, next(counts[mode]))

        return run

    spent: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for pair in range(pairs + 1):
        for mode in MODES if pair % 2 else MODES[::-1]:
            found = _timed(work(mode), task.steps, sessions[mode].engine.device)
            if pair:
                spent[mode].append(found)
    lengths = [lengths_of(batch.text_NT) for batch in kept]
    row: dict[str, Any] = {"model": task.name, "role": role, "batch_size": len(kept[0].text_NT), "predicted": PREDICTED[task.name, role]}
    row["tokens_packed"] = statistics.mean(float(each.float().mean()) for each in lengths)
    row["tokens_cut"] = statistics.mean(cut_length(batch.text_NT) for batch in kept)
    stage = sessions["cut"].stage
    costs = [
        (sum(stage.flops(0, int(cut_length(batch.text_NT)))), sum(stage.flops(0, each.tolist())))
        for batch, each in zip(kept, lengths, strict=True)
    ]
    row["flops_ratio"] = sum(cut for cut, _ in costs) / sum(packed for _, packed in costs)
    for index, clock in ((0, "wall"), (1, "cpu")):
        row |= {f"{mode}_{clock}_seconds": statistics.median(times[index] for times in found) for mode, found in spent.items()}
        row[f"ratios_{clock}"] = [cut[index] / packed[index] for cut, packed in zip(spent["cut"], spent["packed"], strict=True)]
        row[f"ratio_{clock}"] = statistics.median(row[f"ratios_{clock}"])
    for session in sessions.values():
        session.engine.close()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | step | tokens: cut, packed | FLOPs, cut ÷ packed | predicted | CPU s: cut, packed | cut ÷ packed by CPU time |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        ratios = row["ratios_cpu"]
        lines.append(
            f"| {row['model']} | {row['role']} | {row['tokens_cut']:.1f}, {row['tokens_packed']:.1f} | {row['flops_ratio']:.2f} "
            f"| {row['predicted']:.2f} | {row['cut_cpu_seconds']:.3f}, {row['packed_cpu_seconds']:.3f} "
            f"| {row['ratio_cpu']:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for generated data and models")
    parser.add_argument("--models", nargs="+", choices=("demo", "mid"), default=["demo", "mid"])
    parser.add_argument("--roles", nargs="+", choices=("ancestor", "extraction"), default=["ancestor", "extraction"])
    parser.add_argument("--pairs", type=int, default=5, help="windows of each")
    parser.add_argument("--steps", type=int, default=None, help="steps of a window")
    parser.add_argument("--out", type=Path, default=None, help="folder for packed_cpu.json")
    args = parser.parse_args()
    rows = []
    for name, role in itertools.product(args.models, args.roles):
        task = make_task(name, args.data, batch_size=None, steps=args.steps, precision="fp32", num_pairs=500)
        rows.append(compare(task, role, args.data / "models" / name, args.pairs))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    if args.out is not None:
        content = {"environment": measure.environment("cpu"), "rows": rows}
        (args.out / "packed_cpu.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
