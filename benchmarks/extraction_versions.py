"""What does an extraction step cost, next to an earlier version of this project?

    git worktree add ../earlier COMMIT
    python -m benchmarks.extraction_versions ../earlier                              # the demo's extraction
    python -m benchmarks.extraction_versions ../earlier --model ViT-B-32 --steps 1 --out benchmarks/results

Each version runs in a process of its own, from its own files, on the same shards, ancestor (random weights), recipe, sizes and batches,
which are decoded before. They take turns, so that whatever else the machine does falls on both; a ratio is of two neighbouring turns, by
CPU time. One core, fp32. With --compile, of this version twice: with `runtime.compile` and without. With --kept, too with the ancestor's
outputs in a `teacher_pool`: the turn that warms up computes and writes them, the others read them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from mmlg_scale import towers
from mmlg_scale.data.corpus import pairs_of
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.training.roles import fresh_spec

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import dataclasses, json, logging, sys, time
from pathlib import Path
import numpy as np
import torch
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.session import build_session

name, ancestor, batches, data, options = json.loads(sys.argv[1])
logging.disable(logging.INFO)
torch.set_num_threads(1)
answers, sys.stdout = sys.stdout, sys.stderr
write_scenes(Path(data), num_train=512, num_val=16, num_test=16)  # each version has its own files
settings, _ = load_recipe(name, **{"data.path": data, "extraction.start": "random"})
arrays, kept, more = np.load(batches), options.pop("kept", False), {}
num_pairs = arrays["texts"].shape[0] * arrays["texts"].shape[1]
if kept or getattr(settings.extraction.loss, "teacher_pool", None):
    settings.extraction.loss.teacher_pool = num_pairs if kept else None  # None: the ancestor runs in every step, as before there were pools
    more = {"folder": Path(data)} if kept else {}
if hasattr(settings.extraction, "growth"):
    settings.extraction.growth = 0.0  # the same depths in both versions
settings.extraction.training.steps = 1_200
settings.extraction.training.optimizer.learning_rate = 7e-3  # and the same schedule, so that losses can be compared
session = build_session(settings, ExtractionRole(settings, Path(ancestor)), runtime=Runtime(cache_decoded=False, **options), **more)
form = next(iter(session.stream()))
texts_field = "text_NT" if hasattr(form, "text_NT") else "text_BT"  # of versions without several captions an image
batches = [
    dataclasses.replace(form, image_uint8_BCHW=torch.from_numpy(images), **{texts_field: torch.from_numpy(texts)})
    for images, texts in zip(arrays["images"], arrays["texts"])
]
steps = len(batches)
if kept:
    batches = [dataclasses.replace(batch, places_B=torch.arange(len(batch)) + step * len(batch)) for step, batch in enumerate(batches)]
for line in sys.stdin:
    wall, cpu, loss = time.perf_counter(), time.process_time(), None
    for step, batch in enumerate(batches):
        loss = session.train_step(batch, step)
    found = {"wall": (time.perf_counter() - wall) / steps, "cpu": (time.process_time() - cpu) / steps, "loss": float(loss)}
    print(json.dumps(found), file=answers, flush=True)
session.close()
"""


class Version:
    """A version's process."""

    def __init__(self, folder: Path, task: list[Any]) -> None:
        paths = [str(folder), str(folder / "kernels"), str(folder / "launchers")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WORKER, json.dumps(task)]
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def turn(self) -> dict[str, float]:
        """Seconds of a step by the clock and of the CPU, and the last step's loss."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("A version's process has ended; see its message above.")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def make_task(model: str, folder: Path, steps: int) -> list[Any]:
    """Recipe, ancestor (random weights: what a step computes does not depend on them) and batches, as a worker is told of them.

    Captions end at any of the positions from 8 to 34, or to the end of a shorter context.
    """
    name = "demo"
    if model != "demo":
        name = str(folder / "recipe.yaml")
        Path(name).write_text(f"model: {{architecture: {model}}}\nextraction: {{training: {{batch_size: 8}}}}\n")
    write_scenes(folder / "data", num_train=64, num_val=16, num_test=16)
    settings, _ = load_recipe(name, **{"data.path": str(folder / "data")})
    spec = fresh_spec(settings, pairs_of(settings.data))
    towers.export(towers.Bundle(spec, towers.build_clip(spec.config, seed=0).state_dict()), folder / "ancestor")
    generator, size, length = np.random.default_rng(0), spec.image_size, spec.context_length
    shape, end = (steps, settings.extraction.training.batch_size), towers.vocab_size(spec.config) - 1
    texts = generator.integers(3, end, (*shape, length))
    ends = generator.integers(7, min(length, 34), shape)[..., None]
    np.put_along_axis(texts, ends, end, axis=2)
    texts[np.arange(length) > ends] = 0
    np.savez(folder / "batches.npz", images=generator.integers(0, 256, (*shape, 3, size, size), dtype=np.uint8), texts=texts)
    return [name, str(folder / "ancestor"), str(folder / "batches.npz")]


def compare(versions: dict[str, Version], turns: int, reference: str) -> dict[str, Any]:
    """Medians of a step's seconds, and of the ratios of `reference` to each in neighbouring turns."""
    spent: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for turn in range(turns + 1):
        for name in list(versions) if turn % 2 else list(reversed(versions)):
            found = versions[name].turn()
            if turn:  # the first warms up
                spent[name].append(found)
    row: dict[str, Any] = {"turns": turns, "losses_of_the_first_turn": {name: found[0]["loss"] for name, found in spent.items()}}
    for name, found in spent.items():
        row[name] = {f"{clock}_seconds": statistics.median(each[clock] for each in found) for clock in ("cpu", "wall")}
        row[name]["ratios_cpu"] = [other["cpu"] / own["cpu"] for own, other in zip(found, spent[reference], strict=True)]
        row[name]["ratio_cpu"] = statistics.median(row[name]["ratios_cpu"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="a checkout of the other version")
    parser.add_argument("--model", default="demo", help="demo, or an open_clip configuration")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="of a turn")
    parser.add_argument("--compile", action="store_true", help="this version compiled, too")
    parser.add_argument("--kept", action="store_true", help="this version with the ancestor's outputs kept, too")
    parser.add_argument("--out", type=Path, default=None, help="folder for extraction_versions_MODEL.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        task = make_task(args.model, folder, args.steps)
        places: dict[str, tuple[Path, dict[str, Any]]] = {"earlier": (args.earlier.resolve(), {}), "now": (ROOT, {})}
        if args.kept:
            places["kept"] = (ROOT, {"kept": True})
        if args.compile:
            places["compiled"] = (ROOT, {"compile": True})
        versions = {name: Version(place, [*task, str(folder / name), runtime]) for name, (place, runtime) in places.items()}
        for version in versions.values():
            stack.callback(version.close)
        row = compare(versions, args.turns, "earlier")
    for name in versions:
        ratios, milliseconds = row[name]["ratios_cpu"], 1e3 * row[name]["cpu_seconds"]
        print(f"{name}: {milliseconds:.1f} ms CPU a step, {row[name]['ratio_cpu']:.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")
    if args.out is not None:
        command = ["git", "-C", str(args.earlier), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        report = {"environment": measure.environment("cpu"), "model": args.model, "steps": args.steps, "earlier_commit": commit, "row": row}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"extraction_versions_{args.model}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
