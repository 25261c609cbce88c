"""The family as jobs of a cluster that wait for each other: the same graph of steps, and as its last step the report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from mmlg_launchers import Resources, SlurmLauncher, Step
from mmlg_launchers.slurm import active_job
from mmlg_launchers.slurm_graph import batches, launch_folder, plan_graph, submit_graph
from rich.console import Console

from mmlg_scale import recipe, towers
from mmlg_scale.errors import UserError
from mmlg_scale.family import SUPERSEDED, Plan, check, check_folder, claim, is_complete, standing
from mmlg_scale.files import write_text_atomic
from mmlg_scale.recipe_file import to_content
from mmlg_scale.runtime import Runtime
from mmlg_scale.terminal import Terminal
from mmlg_scale.training.folder import has_work, hold, set_aside

REPORT = "report"


@dataclass(frozen=True)
class Submitted:
    """What came of it."""

    complete: tuple[str, ...]
    """Steps that need not run."""
    jobs: dict[str, str]
    """The others, each with its job."""


class FamilyJobs:
    """A family in `out` whose training steps ask for `resources`, and whose other steps for one process.

    Raises:
        UserError: as `family.check`.
    """

    def __init__(self, settings: recipe.Recipe, runtime: Runtime, out: Path, launcher: SlurmLauncher, resources: Resources) -> None:
        self.settings, self.out, self.launcher = settings, out.absolute(), launcher
        self.runtime = dataclasses.replace(runtime, num_processes=resources.num_nodes * resources.num_processes)
        config = check(settings, self.runtime, self.out)
        self.plan = Plan(settings, self.runtime, self.out, image_size=towers.image_size(config))
        self._members = {member.step.id: member for member in self.plan.members}
        small = alone(resources)
        self.steps = [
            dataclasses.replace(step, resources=small)
            if step.total is None
            else dataclasses.replace(step, resources=resources, checkpoints=step.folder / "checkpoints")
            for step in (member.step for member in self.plan.members)
        ]
        argv = (sys.executable, "-m", "mmlg_scale", "family", str(self.out / "recipe.yaml"), "--out", str(self.out))
        self.steps.append(Step(REPORT, argv, small, tuple(self._members), self.out / "report.html"))

    def scripts(self, max_parallel: int | None) -> list[tuple[str, str]]:
        """Name and batch script of each part that would be submitted now. Nothing is written or moved."""
        check_folder(self.settings, self.out)
        self._require_no_changes_under_way()
        planned = plan_graph(self.steps, self._looks_complete)
        return [(batch.name, self.launcher.script(batch)) for batch in batches(planned, self.launcher, self.out, max_parallel=max_parallel)]

    def submit(self, max_parallel: int | None) -> Submitted:
        """Submit what is neither complete nor under way. Runs that the recipe no longer asks for are moved aside.

        Raises:
            UserError: `out` holds something else; another process works there; the recipe has changed while steps are under way.
            LaunchError: Slurm refuses a job.
        """
        console = Terminal(stderr=True)
        with hold(self.out):
            claim(self.settings, self.out)
            self._require_no_changes_under_way()
            is_drawn = self._is_drawn()
            write_text_atomic(self.out / "recipe.yaml", self._text)

            def complete(step: Step, needs_complete: bool) -> bool:
                if step.id == REPORT:
                    return needs_complete and is_drawn
                return self._is_complete(step, needs_complete, console)

            planned = plan_graph(self.steps, complete)
            jobs = submit_graph(planned, self.launcher, self.out, max_parallel=max_parallel)
        return Submitted(planned.complete, jobs)

    def _is_complete(self, step: Step, needs_complete: bool, console: Console) -> bool:
        if needs_complete:
            return is_complete(self._members[step.id], self.plan, console)
        if has_work(step.folder):
            # Of other inputs than those that it will have, which its job would refuse to work on.
            with hold(step.folder):
                kept = set_aside(step.folder, self.out / SUPERSEDED)
            console.print(
                f"{step.id}: what it needs runs again, and so does it; the earlier run is in {kept}.", highlight=False, soft_wrap=True
            )
        return False

    def _looks_complete(self, step: Step, needs_complete: bool) -> bool:
        if step.id == REPORT:
            return needs_complete and self._is_drawn()
        return needs_complete and step.marker.exists() and standing(self._members[step.id], self.plan) == []

    def _is_drawn(self) -> bool:
        """Whether the report is of this recipe, and newer than every step's result."""
        with contextlib.suppress(FileNotFoundError):
            newest = max(member.step.marker.stat().st_mtime for member in self.plan.members)
            return self._known == self._text and (self.out / "report.html").stat().st_mtime >= newest
        return False

    @property
    def _text(self) -> str:
        return yaml.safe_dump(to_content(self.settings, self.runtime), sort_keys=False)

    @property
    def _known(self) -> str | None:
        """The recipe of what is there."""
        file = self.out / "recipe.yaml"
        return file.read_text() if file.is_file() else None

    def _require_no_changes_under_way(self) -> None:
        """Raise UserError where jobs wait or run whose recipe, which they read when they start, would change under them."""
        if self._known is None:
            return
        try:
            before = yaml.safe_load(self._known)
        except yaml.YAMLError:
            before = None
        before, now = before if isinstance(before, dict) else {}, yaml.safe_load(self._text)
        changed = [key for key in before | now if key != "runtime" and before.get(key) != now.get(key)]
        active = [step.id for step in self.steps if changed and active_job(launch_folder(step)) is not None]
        if active:
            raise UserError(
                f"{self.out}: the recipe's {', '.join(changed)} changed, and {len(active)} of its steps are under way ({active[0]}). "
                f"Wait for them, or end them first: mmlg launch cancel {self.out}."
            )


def alone(resources: Resources) -> Resources:
    """What a step of one process without a GPU asks for, next to steps that ask for `resources`."""
    return dataclasses.replace(resources, num_processes=1, num_nodes=1, gpus_per_node=0, memory_gib=None)
