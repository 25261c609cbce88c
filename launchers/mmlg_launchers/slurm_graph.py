"""A graph of steps as jobs of Slurm that wait for each other: nobody's shell has to stay open. Knows nothing of what the steps do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmlg_launchers.graph import Step
from mmlg_launchers.slurm import SlurmLauncher, active_job, call
from mmlg_launchers.slurm_script import Batch, Task


@dataclass(frozen=True)
class Part:
    """Steps that are submitted together: one job, or an array where there are several."""

    steps: tuple[Step, ...]
    needs: tuple[str, ...]
    """Ids of jobs, or `step:ID` for steps that are not submitted yet."""

    @property
    def name(self) -> str:
        """The step's id, or that of the first with the number of the others."""
        others = len(self.steps) - 1
        return self.steps[0].id + (f"+{others}" if others else "")


@dataclass(frozen=True)
class Planned:
    """What a graph comes to, as things are."""

    complete: tuple[str, ...]
    active: dict[str, str]
    """Step -> job that waits or runs."""
    parts: tuple[Part, ...]


def plan_graph(steps: Sequence[Step], is_complete: Callable[[Step, bool], bool]) -> Planned:
    """Which steps are complete, which are under way, and how the others are submitted.

    Args:
        steps: each after those that it needs.
        is_complete: asked for every step that is not under way; the second argument says whether all that it needs is complete.
    """
    complete: list[str] = []
    active: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[Step]] = {}
    group_of: dict[str, tuple[object, ...]] = {}
    for step in steps:
        job = active_job(launch_folder(step))
        if job is not None:
            active[step.id] = job.id
            continue
        if is_complete(step, set(step.needs) <= set(complete)):
            complete.append(step.id)
            continue
        # Steps side by side that wait for the same and ask for the same become an array.
        waits = frozenset(group_of.get(need, (active.get(need),)) for need in step.needs if need not in complete)
        key = (step.resources, step.folder.parent, waits)
        group_of[step.id] = key
        groups.setdefault(key, []).append(step)
    parts = []
    for members in groups.values():
        waits_for = dict.fromkeys(need for step in members for need in step.needs if need not in complete)
        parts.append(Part(tuple(members), tuple(active.get(need, f"step:{need}") for need in waits_for)))
    return Planned(tuple(complete), active, tuple(_in_order(parts)))


def _in_order(parts: Sequence[Part]) -> list[Part]:
    """Each part after those that it waits for."""
    ordered: list[Part] = []
    left = list(parts)
    while left:
        there = {step.id for part in ordered for step in part.steps}
        ready = [part for part in left if all(need.removeprefix("step:") in there for need in part.needs if need.startswith("step:"))]
        assert ready, "a circle of steps"
        ordered += ready
        left = [part for part in left if part not in ready]
    return ordered


def launch_folder(step: Step) -> Path:
    """Where a step's job keeps its state and logs."""
    return step.folder.parent / f"{step.folder.name}.launch"


def batches(planned: Planned, launcher: SlurmLauncher, folder: Path, *, max_parallel: int | None) -> list[Batch]:
    """The batch of each part; it needs `step:ID` where that step is not submitted yet.

    Args:
        folder: of the graph; arrays have their scripts and own logs below it.
        max_parallel: tasks of an array that run side by side.
    """
    found = []
    for part in planned.parts:
        tasks = [Task(step.argv, launch_folder(step), step.checkpoints) for step in part.steps]
        place = tasks[0].folder if len(tasks) == 1 else folder / "arrays" / part.name
        name = f"{launcher.name}-{part.name}"
        found.append(launcher.batch(name, tasks, part.steps[0].resources, folder=place, needs=part.needs, max_parallel=max_parallel))
    return found


def submit_graph(planned: Planned, launcher: SlurmLauncher, folder: Path, *, max_parallel: int | None) -> dict[str, str]:
    """Submit the parts, each with the ids of the jobs that it waits for; returns the job of every step that is not complete.

    Raises:
        LaunchError: Slurm refuses one of them. What was submitted before it is cancelled.
    """
    jobs = dict(planned.active)
    submitted: list[str] = []
    try:
        for part, batch in zip(planned.parts, batches(planned, launcher, folder, max_parallel=max_parallel), strict=True):
            needs = tuple(jobs[need.removeprefix("step:")] if need.startswith("step:") else need for need in batch.needs)
            ids = launcher.submit_batch(replace(batch, needs=needs))
            submitted += ids
            jobs.update(zip((step.id for step in part.steps), ids, strict=True))
    except BaseException:
        if submitted:
            call("scancel", *submitted)
        raise
    return jobs
