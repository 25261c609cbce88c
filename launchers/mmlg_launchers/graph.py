"""A graph of steps on a launcher: each runs once those it needs are complete. Knows nothing of what the steps do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmlg_launchers.interface import Job, Launcher, Resources


@dataclass(frozen=True)
class Step:
    """One command of a graph."""

    id: str
    argv: tuple[str, ...]
    resources: Resources
    needs: tuple[str, ...]
    """Ids of the steps that must be complete before this one starts."""
    marker: Path
    """The file that a finished step leaves."""
    total: int | None = None
    """What `progress` counts up to, for the progress bar."""

    @property
    def folder(self) -> Path:
        """Where the step writes."""
        return self.marker.parent


class StepFailed(Exception):
    """A step did not end as it should: one line with its id, exit code, last printed line and log."""


def run_graph(
    steps: Sequence[Step],
    launcher: Launcher,
    *,
    parallel: int,
    console: Console,
    is_complete: Callable[[Step], bool] = lambda step: step.marker.exists(),
    progress: Callable[[Step], int] = lambda step: 0,
    news: Callable[[Step], Sequence[str]] = lambda step: (),
) -> None:
    """Run every step that is not complete, at most `parallel` side by side; free places go to steps in their order.

    Args:
        is_complete: asked once for each step, when all that it needs is complete: a step may depend on what those wrote.
        progress: how far a running step is, for its bar.
        news: what a running step has to say since the last call, in lines; asked and printed only where there are no bars.

    Raises:
        StepFailed: a step failed. The other running steps are stopped.
    """
    waiting, done = list(steps), set[str]()
    running: dict[Step, tuple[Job, TaskID, float]] = {}
    has_bars = console.is_terminal
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        overall = bars.add_task("steps", total=len(steps))

        def complete(step: Step, how: str) -> None:
            done.add(step.id)
            bars.advance(overall)
            say(f"[{len(done)}/{len(steps)}] {step.id}: {how}")

        def say(line: str) -> None:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

        try:
            while waiting or running:
                ready = [step for step in waiting if set(step.needs) <= done]
                for step in ready[: max(0, parallel - len(running))]:
                    waiting.remove(step)
                    if is_complete(step):
                        complete(step, "kept")
                        continue
                    job = launcher.submit(list(step.argv), step.resources, step.folder.parent / f"{step.folder.name}.launch")
                    running[step] = (job, bars.add_task(step.id, total=step.total), time.monotonic())
                    if not has_bars:
                        news(step)  # of an earlier start
                        say(f"{step.id}: started; log {job.log_paths()[0]}")
                if running:
                    time.sleep(0.2)
                for step, (job, bar, started) in list(running.items()):
                    is_final = job.state().is_final
                    if has_bars:
                        bars.update(bar, completed=progress(step))
                    else:
                        for line in news(step):
                            say(f"{step.id}: {line}  {time.monotonic() - started:.0f} s")
                    if not is_final:
                        continue
                    del running[step]
                    bars.remove_task(bar)
                    if job.exit_code != 0 or not step.marker.exists():
                        raise StepFailed(_failure(step, job))
                    complete(step, f"complete after {time.monotonic() - started:.0f} s")
        finally:
            for job, *_ in running.values():
                job.cancel()


def _failure(step: Step, job: Job) -> str:
    logs = job.log_paths()
    lines = [line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("mmlg: error: ") if lines else "it printed nothing"
    return f"step {step.id} failed (exit code {job.exit_code}): {said} Log: {logs[0] if logs else '-'}."
