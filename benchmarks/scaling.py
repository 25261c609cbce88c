"""What do ZeRO stages cost, how long do ranks wait for each other, and does a step scale? `mmlg benchmark` on the mid-size model, here.

    python -m benchmarks.scaling --out runs/scaling                     # 1 and 2 ranks; ZeRO 0 to 3 on 2 ranks
    python -m benchmarks.scaling --out runs/scaling --ranks 1 2 4 8 --batch-size 256 --recipe vit-b-16

Each combination runs in fresh processes. Weak scaling: a step of one rank over a step of several, as many pairs on each, by the clock; and
by CPU time, which other work on the machine hardly changes, but which leaves out waiting. Exposed communication is the time that a rank
spends in waiting for collectives (`training/communication.py`), for a rank that is behind too. For nodes: `mmlg benchmark` behind
`mmlg launch slurm --nodes N`, with one --out for all N.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mmlg_scale.cli import main as mmlg
from mmlg_scale.cli.benchmark import RESULTS_FILE

MID = Path(__file__).with_name("mid.yaml")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a stage costs on the most ranks, relative to stage 0 there, and weak scaling against one rank."""
    rows = [row for row in rows if "note" not in row]
    base = {row["ranks"]: row for row in rows if row["zero_stage"] == 0 and row["communication"] == "fp32"}
    heads = [
        "ZeRO",
        "gradients",
        "ranks",
        "pairs/rank",
        "step, s (CPU s)",
        "÷ stage 0, CPU",
        "peak GiB a rank",
        "exposed communication, s (share)",
        "weak scaling, CPU (clock)",
    ]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        seconds = f"{row['step_seconds']:.2f} ({row['step_cpu_seconds']:.2f})"
        known = [str(row["zero_stage"]), row["communication"], str(row["ranks"]), str(row["local_batch"]), seconds]
        same, one = base.get(row["ranks"]), base.get(1)
        known.append("" if same is None else f"{row['step_cpu_seconds'] / same['step_cpu_seconds']:.2f}")
        known.append(f"{row['peak_memory_bytes'] / 2**30:.2f}")
        known.append(f"{row['exposed_communication_seconds']:.2f} ({row['exposed_communication_share']:.0%})")
        scaling = ""
        if one is not None and one is not row and row["zero_stage"] == 0 and row["communication"] == "fp32":
            ratios = [one[key] / row[key] for key in ("step_cpu_seconds", "step_seconds")]
            scaling = f"{ratios[0]:.0%} ({ratios[1]:.0%})"
        lines.append([*known, scaling])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for benchmark.json, benchmark.svg and generated data")
    parser.add_argument("--recipe", default=str(MID), help="recipe file or shipped recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per rank")
    parser.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="ZeRO stages on the most ranks")
    parser.add_argument("--communications", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="in what gradients are exchanged")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    fixed = ["--roles", "ancestor", "--batch-sizes", str(args.batch_size), "--steps", str(args.steps), "--repeats", str(args.repeats)]
    fixed += ["--warmup", "1", "--generate", "photos", "--num-pairs", "500", "--out", args.out, "--quiet"]
    worst = 0
    for ranks in sorted(args.ranks):
        stages = args.stages if ranks == max(args.ranks) else [0]
        swept = ["--num-processes", str(ranks), "--zero-stages", *map(str, stages), "--communications", *args.communications]
        worst = max(worst, mmlg(["benchmark", args.recipe, *fixed, *swept]))
    print(table(json.loads((Path(args.out) / RESULTS_FILE).read_text())["rows"]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
