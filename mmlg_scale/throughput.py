"""How fast steps of ancestor, extraction and descendant are: samples/s, MFU, loader stall, exposed communication, memory; `mmlg benchmark`.

A cell is one combination of model, role, precision, ZeRO stage, batch and number of ranks. Its stage is built as `mmlg train` and
`mmlg extract` build it (`build_session`), on random weights: a step's cost does not depend on what the weights are. Windows of steps with
the loader inside alternate with windows over batches that are decoded already, so that both figures see the same machine.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from mmlg_scale import recipe, towers
from mmlg_scale.data.corpus import PairSet, pairs_of
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.errors import UserError
from mmlg_scale.hardware import device_name
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.ranks import on_first_rank
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.communication import exposed_communication
from mmlg_scale.training.engine import deepspeed_version
from mmlg_scale.training.inputs import text_length
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.meters import measure_peak_flops
from mmlg_scale.training.roles import AncestorRole, DescendantRole, Role, fresh_spec
from mmlg_scale.training.session import Session, build_session
from mmlg_scale.training.sizes import SizeDraw

Row = dict[str, Any]
RoleName = Literal["ancestor", "extraction", "descendant"]
ROLES: tuple[RoleName, ...] = ("ancestor", "extraction", "descendant")
ENDLESS = 10**6
"""Steps of the schedule: its warm-up is then longer than any measurement, and rates stay near zero."""
KEPT_BATCHES = 4
"""Decoded batches that the windows without the loader go through in turn."""
SPEED_OPTIONS = (
    *("threads", "num_workers", "cache_decoded", "persistence_threshold", "bucket_size", "overlap"),
    *("activation_checkpointing", "text", "compile", "compose_per_layer", "shard_ancestor"),
)
"""Runtime options on which figures depend. Rows name those that are not at their defaults."""


@dataclass(frozen=True)
class Cell:
    """One combination to measure; with the number of ranks it is what a row is known by.

    Attributes:
        architecture: an open_clip configuration's name; None: the recipe's model.
        batch_size: pairs of a step, all ranks together.
        layers: (image, text) depth of a descendant.
        communication: in what ranks exchange gradients.
    """

    role: RoleName
    architecture: str | None
    precision: Literal["fp32", "bf16"]
    zero_stage: Literal[0, 1, 2, 3]
    batch_size: int
    layers: tuple[int, int] | None = None
    communication: Literal["fp32", "bf16"] = "fp32"

    def in_words(self) -> str:
        """For the console."""
        return f"{self.role}, {self.architecture or 'the recipe'}, {self.precision}, ZeRO-{self.zero_stage}, {self.batch_size} pairs"

    def row(self, settings: recipe.Recipe, runtime: Runtime, ranks: int) -> Row:
        """What a row of figures says of the combination, as JSON gives it back."""
        row = {**asdict(self), "layers": self.layers and list(self.layers), "model": model_name(settings, self), "ranks": ranks}
        if (captions := settings.data.captions_per_image) > 1:
            row["captions_per_image"] = captions
        usual = Runtime()
        options = {name: value for name in SPEED_OPTIONS if (value := getattr(runtime, name)) != getattr(usual, name)}
        if (parts := role_training(settings, self.role).accumulation) > 1:
            options["accumulation"] = parts
        return row | ({"options": options} if options else {})


@dataclass(frozen=True)
class Windows:
    """How long is measured: after `warmup` steps, `repeats` windows of `steps` steps, with and without the loader in turn."""

    steps: int = 10
    repeats: int = 5
    warmup: int = 4


def settings_of(settings: recipe.Recipe, cell: Cell) -> recipe.Recipe:
    """The recipe of a cell: its model, precision and batch, and a schedule that does not end while it is measured, of all depths."""
    model = settings.model
    if cell.architecture is not None:
        model = replace(model, architecture=cell.architecture, config=None)
    model = replace(model, weights=None)
    extraction, adaptation = settings.extraction, settings.adaptation
    distils = replace(extraction, start="random", growth=0.0, training=_endless(extraction.training, cell), loss=_unpooled(extraction.loss))
    return replace(
        settings,
        model=model,
        engine=replace(settings.engine, precision=cell.precision, communication=cell.communication, keep_features=False),
        ancestor=_endless(settings.ancestor, cell),
        extraction=distils,
        adaptation=replace(
            adaptation, training=_endless(adaptation.training, cell), loss=_unpooled(adaptation.loss), reuse_teacher_pool=False
        ),
    )


def _endless(training: recipe.Training, cell: Cell) -> recipe.Training:
    return replace(training, steps=ENDLESS, batch_size=cell.batch_size)


def _unpooled(loss: recipe.DistillationLoss) -> recipe.DistillationLoss:
    return replace(loss, teacher_pool=None)


def model_name(settings: recipe.Recipe, cell: Cell) -> str:
    """An architecture's name, or the sizes of the recipe's own: image tower's width x layers + text tower's."""
    named = cell.architecture or settings.model.architecture
    if named is not None or settings.model.config is None:
        return str(named)
    config = towers.model_config(settings.model.config)
    return " + ".join(f"{towers.width(config, tower)} x {towers.num_layers(config, tower)}" for tower in ("image", "text"))


def recipe_batch(settings: recipe.Recipe, role: RoleName) -> int:
    """The recipe's own batch size of a role, all ranks together."""
    return role_training(settings, role).batch_size


def role_training(settings: recipe.Recipe, role: RoleName) -> recipe.Training:
    """The recipe's training of a role."""
    training = {"ancestor": settings.ancestor, "extraction": settings.extraction.training, "descendant": settings.adaptation.training}
    return training[role]


def role_of(settings: recipe.Recipe, cell: Cell, pairs: PairSet, folder: Path) -> Role:
    """The role of a cell, whose random ancestor and learngene are written below `folder` where it reads any. Collective."""
    if cell.role == "ancestor":
        return AncestorRole(settings)
    on_first_rank(lambda: _write_models(settings, cell, pairs, folder))
    ancestor = folder / "ancestor"
    if cell.role == "extraction":
        return ExtractionRole(settings, ancestor)
    depths = cell.layers or descendant_layers(fresh_spec(settings, pairs).config)
    return DescendantRole(settings, "mmlg", recipe.Size(*depths), ancestor=ancestor, learngene=folder / "learngene.safetensors")


def descendant_layers(config: Mapping[str, Any]) -> tuple[int, int]:
    """Half the ancestor's depth in each tower."""
    image, text = (max(1, towers.num_layers(config, tower) // 2) for tower in ("image", "text"))
    return image, text


def _write_models(settings: recipe.Recipe, cell: Cell, pairs: PairSet, folder: Path) -> None:
    spec = fresh_spec(settings, pairs)
    state = towers.build_clip(spec.config, seed=settings.seed).state_dict()
    towers.export(towers.Bundle(spec, state), folder / "ancestor", overwrite=True)
    if cell.role != "descendant":
        return
    extraction = settings.extraction
    structure = Structure(spec.config, **{key: getattr(extraction, key) for key in Structure.SETTINGS})
    auxiliary = AuxiliaryCLIP.from_ancestor(state, structure, seed=settings.seed)
    trained = SizeDraw(extraction, spec.config, settings.seed).trained_range()
    gene = Learngene.from_auxiliary(structure, auxiliary.state_dict(), spec=spec, extraction=asdict(extraction), trained=trained)
    gene.save(folder / "learngene.safetensors")


def measure_cell(settings: recipe.Recipe, runtime: Runtime, cell: Cell, windows: Windows, folder: Path) -> Row:
    """Build a cell's stage, run it, and say what it took; every rank gets the row. Collective.

    Raises:
        UserError: the recipe, the data set and the cell do not go together.
    """
    settings, runtime = settings_of(settings, cell), replace(runtime, zero_stage=cell.zero_stage)
    pairs = pairs_of(settings.data)
    _forget_peak()
    session = build_session(settings, role_of(settings, cell, pairs, folder), runtime=runtime, pairs=pairs)
    try:
        found = measure(session, windows)
    finally:
        session.engine.close()
        del session
        gc.collect()
    return {**cell.row(settings, runtime, found["ranks"]), **found}


def measure(session: Session, windows: Windows) -> Row:
    """The figures of a session's steps. Wall and CPU seconds are per step and rank: the slowest rank's, and the ranks' mean. Collective."""
    steps = itertools.count()
    stream = iter(session.stream())
    kept = [next(stream) for _ in range(KEPT_BATCHES)]
    _window(session, itertools.islice(itertools.cycle(kept), windows.warmup), steps)
    with_loader, without = [], []
    for _ in range(windows.repeats):
        with_loader.append(_window(session, itertools.islice(stream, windows.steps), steps))
        without.append(_window(session, itertools.islice(itertools.cycle(kept), windows.steps), steps))
    peak_bytes, watched = _peak_bytes(session.engine.device), without
    if session.engine.device.type == "cuda":  # by the profiler, in a window of its own
        watched = [_window(session, itertools.islice(itertools.cycle(kept), windows.steps), steps, profile=True)]
    return _figures(session, with_loader, without, watched, peak_bytes)


def _window(session: Session, batches: Iterable[Batch], steps: Iterator[int], *, profile: bool = False) -> Row:
    """Steps over these batches, and how long they took: in all, waiting for the loader, and for other ranks (on a GPU with `profile`)."""
    waited, flops, count, device = 0.0, 0, 0, session.engine.device
    _wait(session)
    start, cpu = time.perf_counter(), time.process_time()
    source = iter(batches)
    with exposed_communication(device) if profile or device.type != "cuda" else nullcontext() as exposed:
        while True:
            asked = time.perf_counter()
            batch = next(source, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            step = next(steps)
            session.train_step(batch, step)
            length = text_length(batch, session.engine.text)
            flops += sum(session.stage.flops(step, length, batch.captions_per_image)) * len(batch)
            count += 1
    _wait(session)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"steps": count, "wall": wall, "cpu": cpu, "waited": waited, "flops": flops, "exposed": exposed.seconds if exposed else 0.0}


def _wait(session: Session) -> None:
    if session.engine.device.type == "cuda":
        torch.cuda.synchronize(session.engine.device)
    if dist.get_world_size() > 1:
        dist.barrier()


def _figures(session: Session, with_loader: Sequence[Row], without: Sequence[Row], watched: Sequence[Row], peak_bytes: int) -> Row:
    """Medians over windows of the ranks' figures together."""
    mine = {
        "watched": watched,
        "with_loader": with_loader,
        "without": without,
        "peak_bytes": peak_bytes,
        "peak_flops": measure_peak_flops(session.engine.device),
    }
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    batch, peak = session.stage.training.batch_size, sum(found["peak_flops"] for found in ranks)
    figures: Row = {"ranks": len(ranks), "local_batch": batch // len(ranks)}
    for key, name in (("with_loader", ""), ("without", "step_")):
        all_windows = list(zip(*(found[key] for found in ranks), strict=True))
        seconds = [max(rank["wall"] for rank in window) / window[0]["steps"] for window in all_windows]
        cpu = [statistics.mean(rank["cpu"] for rank in window) / window[0]["steps"] for window in all_windows]
        low, middle, high = _quantiles(seconds)
        flops = [sum(rank["flops"] for rank in window) / window[0]["steps"] for window in all_windows]
        figures |= {
            f"{name}seconds_p20": low,
            f"{name}seconds": middle,
            f"{name}seconds_p80": high,
            f"{name}cpu_seconds": statistics.median(cpu),
            f"{name}samples_per_second": batch / middle,
            f"{name}mfu": statistics.median(work / spent / peak for work, spent in zip(flops, seconds, strict=True)),
        }
        if key == "with_loader":
            figures["flops_per_sample"] = statistics.mean(flops) / batch
            stall = [max(rank["waited"] for rank in window) / max(rank["wall"] for rank in window) for window in all_windows]
            figures["loader_stall"] = statistics.median(stall)
    exposed = [[(row["exposed"] / row["steps"], row["exposed"] / row["wall"]) for row in found["watched"]] for found in ranks]
    for key, per_rank in zip(("seconds", "share"), zip(*(zip(*rows, strict=True) for rows in exposed), strict=True), strict=True):
        means = [statistics.mean(window) for window in zip(*per_rank, strict=True)]
        figures[f"exposed_communication_{key}"] = statistics.median(means)
    return figures | {"peak_memory_bytes": max(found["peak_bytes"] for found in ranks), "peak_flops": peak}


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _forget_peak() -> None:
    """Let the peak of memory begin anew: on Linux, and on a GPU."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: torch.device) -> int:
    """A GPU's allocator's peak; on a CPU the process's resident memory's, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment(device: torch.device) -> Row:
    """The machine and the versions that rows belong to."""
    return {
        "device": device_name(device.type),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "open_clip": towers.open_clip_version(),
        "deepspeed": deepspeed_version(),
        "python": platform.python_version(),
    }


IDENTITY = ("model", "role", "precision", "zero_stage", "batch_size", "layers", "communication", "captions_per_image", "options", "ranks")
"""Keys of a row that say what was measured."""


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows of several calls: a combination that was measured again, with the same options, has its last figures."""
    found = {tuple(str(row.get(key)) for key in IDENTITY): row for row in [*old, *new]}
    return sorted(
        found.values(), key=lambda row: [str(row["model"]), ROLES.index(row["role"]), *(_order(row, key) for key in IDENTITY[2:])]
    )


def _order(row: Row, key: str) -> tuple[float, str]:
    value = row.get(key)
    if value is None:
        return -math.inf, ""
    return (float(value), "") if isinstance(value, int) else (math.inf, str(value))


def efficiency(row: Row, rows: Sequence[Row]) -> tuple[str, float] | None:
    """("weak" or "strong", efficiency) against the row with the fewest ranks that is alike but for them; None where there is none.

    Weak: the same pairs per rank. Strong: the same pairs in all. Samples/s per rank over those of the fewer ranks, loader inside.
    """
    for kind, key in (("weak", "local_batch"), ("strong", "batch_size")):
        alike = [key, *(name for name in IDENTITY if name not in ("batch_size", "ranks"))]
        fewer = [other for other in rows if other["ranks"] < row["ranks"] and "note" not in other]
        fewer = [other for other in fewer if all(other.get(name) == row.get(name) for name in alike)]
        if fewer:
            base = min(fewer, key=lambda other: other["ranks"])
            return kind, row["samples_per_second"] / row["ranks"] / (base["samples_per_second"] / base["ranks"])
    return None


def _told_options(row: Row) -> str:
    """Options that are not at their defaults, in words."""
    return "".join(f", {name} {json.dumps(value).strip(chr(34))}" for name, value in row.get("options", {}).items())


def table(rows: Sequence[Row]) -> str:
    """Markdown, one line for each combination."""
    heads = ["model", "role", "precision", "ZeRO", "ranks", "pairs/rank", "samples/s", "without loader", "of it per CPU s and rank"]
    heads += ["MFU", "stall", "exposed communication", "peak GiB", "scaling"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        depth = " {}+{}".format(*row["layers"]) if row.get("layers") else ""
        sent = ", gradients in bf16" if row.get("communication") == "bf16" else ""
        several = f", {row['captions_per_image']} captions an image" if row.get("captions_per_image") else ""
        known = [
            row["model"],
            row["role"] + depth + several + _told_options(row),
            row["precision"] + sent,
            str(row["zero_stage"]),
            str(row["ranks"]),
            str(row["local_batch"]),
        ]
        if "note" in row:
            lines.append([*known, row["note"], *[""] * (len(heads) - len(known) - 1)])
            continue
        scaling = efficiency(row, rows)
        figures = [f"{row['samples_per_second']:,.1f}", f"{row['step_samples_per_second']:,.1f}"]
        figures.append(f"{row['local_batch'] / row['step_cpu_seconds']:,.1f}")
        figures += [f"{row['step_mfu']:.0%}", f"{row['loader_stall']:.0%}"]
        figures.append(f"{row['exposed_communication_share']:.0%}" if "exposed_communication_share" in row else "")
        figures.append(f"{row['peak_memory_bytes'] / 2**30:.2f}")
        lines.append([*known, *figures, "" if scaling is None else f"{scaling[0]} {scaling[1]:.0%}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw(rows: Sequence[Row], target: Path) -> None:
    """Samples/s against ranks (where several were measured) or pairs per rank, and memory, as one SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if "note" not in row]
    x = "ranks" if len({row["ranks"] for row in rows}) > 1 else "local_batch"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        several = f" {row['captions_per_image']} captions" if row.get("captions_per_image") else ""
        name = f"{row['model']} {row['role']} {row['precision']} ZeRO-{row['zero_stage']}{several}{_told_options(row)}"
        lines.setdefault(name + (f" {row['local_batch']}/rank" if x == "ranks" else ""), []).append(row)
    for name, mine in lines.items():
        places = [row[x] for row in mine]
        axes[0].plot(places, [row["samples_per_second"] for row in mine], "o-", label=name)
        axes[1].plot(places, [row["peak_memory_bytes"] / 2**30 for row in mine], "o-", label=name)
    for axis, label in zip(axes, ("samples/s, loader inside", "peak memory of a rank, GiB"), strict=True):
        axis.set(xlabel={"ranks": "ranks", "local_batch": "pairs per rank"}[x], ylabel=label, ylim=(0, None))
        axis.grid(visible=True, alpha=0.2)
    axes[0].legend(fontsize=7)
    figure.savefig(target)
    plt.close(figure)


def check(cells: Sequence[Cell], world_size: int) -> None:
    """Raise UserError for a batch that the ranks cannot share."""
    for cell in cells:
        if cell.batch_size % world_size:
            raise UserError(
                f"a batch of {cell.batch_size} pairs is not a multiple of the {world_size} ranks. Give --batch-sizes, per rank."
            )
