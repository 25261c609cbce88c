"""Do 1, 2 and 4 ranks train the same model? Losses of the same recipe at each world size, in one picture.

    python -m benchmarks.world_sizes --out benchmarks/results     # world_sizes.json and .png; more than five minutes on two cores

Trains the demo's ancestor for 60 steps of 128 scenes under ZeRO-2 on as many gloo ranks, and once more on 4 ranks that become 2 after the
first evaluation and 3 after the second (96 scenes a step, so that 3 divides them), with the same run on one rank beside it. Reported is the
largest difference of a loss from that of one rank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measure import environment

STEPS, EVERY = 60, 20
RANKS = (1, 2, 4)


def train(data: Path, out: Path, ranks: int, batch_size: int, steps: int = STEPS, *, stop_after: int | None = None) -> None:
    """Train on so many ranks; with `stop_after`, stop once that step has been saved."""
    words = [sys.executable, "-m", "mmlg_scale", "launch", "local", "--num-processes", str(ranks), "--run-folder", f"{out}.launch", "--"]
    words += ["train", "demo", "--data.path", str(data), "--out", str(out), f"--ancestor.steps={steps}", f"--ancestor.eval_every={EVERY}"]
    words += [f"--ancestor.batch_size={batch_size}", "--runtime.zero_stage=2", "--runtime.log_every=1", "--runtime.keep_last=1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if stop_after is not None:
        while process.poll() is None and not (out / "checkpoints" / f"step-{stop_after:08d}").exists():
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        (out / "STOP").touch()
    _, said = process.communicate()
    if process.returncode not in (0, 76):
        raise RuntimeError(f"{ranks} ranks failed (exit code {process.returncode}): {said}")


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return [found[step] for step in range(1, STEPS + 1)]


def measure(folder: Path) -> dict[str, Any]:
    """Losses by the name of the run."""
    data = folder / "data"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "mmlg_scale",
            "data",
            "scenes",
            "--out",
            str(data),
            "--num_train",
            "4000",
            "--num_val",
            "64",
            "--num_test",
            "64",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, list[float]] = {}
    for ranks in RANKS:
        train(data, folder / f"ranks-{ranks}", ranks, 128)
        found[f"{ranks} rank{'s' if ranks > 1 else ''}"] = losses(folder / f"ranks-{ranks}")
    train(data, folder / "one", 1, 96)
    found["1 rank, 96 a step"] = losses(folder / "one")
    train(data, folder / "changing", 4, 96, stop_after=EVERY)
    train(data, folder / "changing", 2, 96, stop_after=2 * EVERY)
    train(data, folder / "changing", 3, 96)
    found["4, then 2, then 3 ranks, 96 a step"] = losses(folder / "changing")
    return found


def differences(found: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of a loss from that of one rank with the same batches."""

    def largest(one: str, other: str) -> float:
        return max(abs(a - b) for a, b in zip(found[one], found[other], strict=True))

    plain = {name: largest("1 rank", name) for name in ("2 ranks", "4 ranks")}
    changing = "4, then 2, then 3 ranks, 96 a step"
    return plain | {changing: largest("1 rank, 96 a step", changing)}


def plot(found: dict[str, list[float]]) -> Figure:
    """All losses, those of more ranks dashed above those of one."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axis = figure.subplots()
    styles = {1: {"lw": 5, "alpha": 0.35}, 2: {"lw": 2, "ls": "--"}, 4: {"lw": 1, "ls": ":"}}
    for name, values in found.items():
        style = styles[1] if name.startswith("1") else styles[2] if name.startswith("2") else styles[4]
        colour = "#c2410c" if "96" in name else "#1d4ed8"
        axis.plot(range(1, len(values) + 1), values, color=colour if name != "4 ranks" else "#0f172a", label=name, **style)
    axis.set(xlabel="step", ylabel="contrastive loss")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="Folder for world_sizes.json and world_sizes.png.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    largest = differences(found)
    for name, value in largest.items():
        print(f"{name}: losses differ from one rank's by at most {value:.2g}")
    if arguments.out is not None:
        content = {"environment": environment("cpu"), "largest_difference": largest, "losses": found}
        (arguments.out / "world_sizes.json").write_text(json.dumps(content, indent=1) + "\n")
        plot(found).savefig(arguments.out / "world_sizes.png", dpi=110)


if __name__ == "__main__":
    main()
