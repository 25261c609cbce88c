"""A graph of steps on a launcher: each runs once those it needs are complete. Knows nothing of what the steps do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmlg_launchers.interface import Job, Launcher, Resources
from mmlg_launchers.supervise import in_words, tail


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
    checkpoints: Path | None = None
    """The folder in which something new appears when the step has made progress, for launchers that start it again after a crash."""

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
    poll_seconds: float = 0.2,
) -> None:
    """Run every step that is not complete, at most `parallel` side by side; free places go to steps in their order.

    Args:
        is_complete: asked once for each step, when all that it needs is complete: a step may depend on what those wrote.
        progress: how far a running step is, for its bar.
        news: what a running step has to say since the last call, in lines; asked and printed only where there are no bars.
        poll_seconds: between two looks at the running jobs.

    Raises:
        StepFailed: a step failed. The other running steps are stopped.
    """
    waiting, done = list(steps), set[str]()
    running: dict[Step, Job] = {}
    with _Display(console, len(steps), progress, news) as display:
        try:
            while waiting or running:
                ready = [step for step in waiting if set(step.needs) <= done]
                for step in ready[: max(0, parallel - len(running))]:
                    waiting.remove(step)
                    if is_complete(step):
                        done.add(step.id)
                        display.kept(step)
                        continue
                    display.before(step)
                    running[step] = launcher.submit(list(step.argv), step.resources, step.folder.parent / f"{step.folder.name}.launch")
                    display.started(step, running[step])
                if running:
                    time.sleep(poll_seconds)
                for step, job in list(running.items()):
                    is_final = job.state().is_final
                    display.look_at(step)
                    if not is_final:
                        continue
                    del running[step]
                    if job.exit_code != 0 or not step.marker.exists():
                        raise StepFailed(_failure(step, job))
                    done.add(step.id)
                    display.complete(step)
        finally:
            for job in running.values():
                job.cancel()


class _Display:
    """What the console shows of a graph: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console, num_steps: int, progress: Callable[[Step], int], news: Callable[[Step], Sequence[str]]) -> None:
        self._console, self._num_steps, self._progress, self._news = console, num_steps, progress, news
        columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=console, transient=True)
        self._overall = self._bars.add_task("steps", total=num_steps)
        self._num_done = 0
        self._running: dict[Step, tuple[TaskID, float]] = {}

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def kept(self, step: Step) -> None:
        """The step need not run."""
        self._done(step, "kept")

    def before(self, step: Step) -> None:
        """What the step has to say of an earlier start is no news."""
        if not self._console.is_terminal:
            self._news(step)

    def started(self, step: Step, job: Job) -> None:
        """The step runs."""
        self._running[step] = self._bars.add_task(step.id, total=step.total), time.monotonic()
        if not self._console.is_terminal:
            self._say(f"{step.id}: started, log in {job.log_paths()[0]}")

    def look_at(self, step: Step) -> None:
        """How far a running step is."""
        bar, started = self._running[step]
        if self._console.is_terminal:
            self._bars.update(bar, completed=self._progress(step))
            return
        for line in self._news(step):
            self._say(f"{step.id}: {line}  {time.monotonic() - started:.0f} s")

    def complete(self, step: Step) -> None:
        """The step has ended as it should."""
        bar, started = self._running.pop(step)
        self._bars.remove_task(bar)
        self._done(step, f"complete after {time.monotonic() - started:.0f} s")

    def _done(self, step: Step, how: str) -> None:
        self._num_done += 1
        self._bars.advance(self._overall)
        self._say(f"[{self._num_done}/{self._num_steps}] {step.id}: {how}")


def _failure(step: Step, job: Job) -> str:
    log, code = job.log_paths()[0], job.exit_code
    lines = [line for line in tail(log).splitlines() if line.strip()] if log.is_file() else []
    said = lines[-1].removeprefix("mmlg: error: ") if lines else "it printed nothing."
    if code is not None and code < 0:  # a supervisor says so in the log
        said = f"it was ended by {in_words(-code)}."
    return f"step {step.id} failed (exit code {code}): {said} Log: {log}."
