"""Do 1, 2 and 4 ranks train the same model? Losses of the same recipe at each world size, in one picture.

    python -m benchmarks.world_sizes --out benchmarks/results     # world_sizes.json and .svg

Trains a CLIP of 3 + 3 layers of the demo's width on 120 batches of 48 scenes under ZeRO-2, on 1, 2 and 4 gloo ranks, and once more on 4
ranks that become 2 and then 3: the run is stopped by its file STOP and started again with another number. Reported is the largest
difference of a loss from that of one rank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure import environment
from mmlg_scale.data.scenes import write_scenes

STEPS, EVERY, BATCH = 120, 30, 48
RANKS = (1, 2, 4)
CHANGING = "4, then 2, then 3 ranks"
STOPPED = 76


def train(data: Path, out: Path, ranks: int, *, stop_after: int | None = None) -> None:
    """Train on so many ranks; with `stop_after`, stop some steps after that one has been saved."""
    words = [sys.executable, "-m", "mmlg_scale", "launch", "local", "--num-processes", str(ranks), "--run-folder", f"{out}.launch", "--"]
    words += ["train", "demo", "--data.path", str(data), "--out", str(out), f"--ancestor.steps={STEPS}", f"--ancestor.eval_every={EVERY}"]
    words += [f"--ancestor.batch_size={BATCH}", "--runtime.zero_stage=2", "--runtime.log_every=1", "--runtime.keep_last=1"]
    words += [f"--model.config.{tower}_cfg.layers=3" for tower in ("vision", "text")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if stop_after is not None:
        while process.poll() is None and not (out / "checkpoints" / f"step-{stop_after:08d}").exists():
            time.sleep(0.05)
        (out / "STOP").touch()
    _, said = process.communicate()
    if process.returncode != (0 if stop_after is None else STOPPED):
        raise RuntimeError(f"{ranks} ranks ended with exit code {process.returncode}: {said}")


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return [found[step] for step in range(1, STEPS + 1)]


def measure(folder: Path) -> dict[str, list[float]]:
    """Losses by the name of the run."""
    data = folder / "data"
    write_scenes(data, num_train=4000, num_val=64, num_test=64, seed=0, image_size=32)
    found: dict[str, list[float]] = {}
    for ranks in RANKS:
        train(data, folder / f"ranks-{ranks}", ranks)
        found[f"{ranks} rank{'s' if ranks > 1 else ''}"] = losses(folder / f"ranks-{ranks}")
    train(data, folder / "changing", 4, stop_after=EVERY)
    train(data, folder / "changing", 2, stop_after=2 * EVERY)
    train(data, folder / "changing", 3)
    found[CHANGING] = losses(folder / "changing")
    return found


def differences(found: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of a loss from that of one rank."""
    return {name: max(abs(a - b) for a, b in zip(found["1 rank"], of, strict=True)) for name, of in found.items() if name != "1 rank"}


def plot(found: dict[str, list[float]]) -> Figure:
    """All losses on each other: one rank's broad and pale, the others' ever thinner above it."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    styles: list[dict[str, Any]] = [
        {"lw": 7, "color": "#bfdbfe"},
        {"lw": 3.5, "color": "#3b82f6"},
        {"lw": 1.5, "color": "#0f172a"},
        {"lw": 1.2, "color": "#f97316", "ls": (0, (3, 3))},
    ]
    for (name, values), style in zip(found.items(), styles, strict=True):
        axis.plot(range(1, len(values) + 1), values, label=name, **style)
    axis.set(xlabel="step", ylabel="contrastive loss")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Folder for world_sizes.json and world_sizes.svg.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    largest = differences(found)
    for name, value in largest.items():
        print(f"{name}: losses differ from one rank's by at most {value:.2g}")
    if arguments.out is not None:
        content = {"environment": environment("cpu"), "largest_difference": largest, "losses": found}
        (arguments.out / "world_sizes.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(found).savefig(arguments.out / "world_sizes.svg")


if __name__ == "__main__":
    main()
