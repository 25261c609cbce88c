"""Figures of a run, for the console (a line or a bar) and the trackers.

Figures stay on the device until a line is due: reading one costs a synchronisation.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmlg_scale.hardware import GPU_PEAKS
from mmlg_scale.terminal import Terminal
from mmlg_scale.training.trackers import Tracker


def measure_peak_flops(device: torch.device) -> float:
    """One device's FLOP/s, the denominator of MFU.

    A GPU's data-sheet bf16 peak where it is known; else the best of square matrix products run for about 0.2 s (bf16 on a GPU, fp32 on
    this process's threads on a CPU). A measured peak is lower where other processes share the cores, and MFU then looks better.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for key, peak in GPU_PEAKS.items() if key in name]
        if known:
            return known[0]
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # the global random state is not touched
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best, started = math.inf, time.perf_counter()
    while time.perf_counter() - started < 0.2 or best == math.inf:
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


LOADER_BOUND = 0.2
"""Share of the time that training waits for its loader from which on the console says so, once."""
WINDOW_TOLD = 5
"""Steps that such a share is over: the first ones wait for the workers to start."""
STALL_REMEDY = "Raise runtime.num_workers, or lower the resolution."


class Meters:
    """One run's figures; with `enabled` False (ranks other than the first) only the clock runs.

    Order of calls: load_state_dict (a resumed run), resume_from, then step and evaluation, then close. The clock runs from resume_from
    to the last step of the schedule, so that what comes before and after (evaluation on the test split, export) is no training time.

    Args:
        trackers: where figures go besides the console.
        total_steps: length of the schedule.
        log_every: steps between figures.
        shown: metrics of an evaluation that the console shows.
        line_every: seconds between console lines where the console is no terminal.
        peak_flops: FLOP/s of one device; measured where it is not given. MFU is against the peak of all ranks together.
        console: where the bar or the lines go; standard error where it is not given.
        clock: seconds that only grow.
        check_owner: raises where another start has taken the run over; asked before a tracker is given anything.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        total_steps: int,
        *,
        name: str,
        device: torch.device,
        enabled: bool = True,
        log_every: int = 10,
        shown: Iterable[str] = (),
        line_every: float = 10.0,
        peak_flops: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.perf_counter,
        check_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.trackers, self.total_steps, self.name, self.enabled = trackers, total_steps, name, enabled
        self.log_every, self.line_every, self.shown = log_every, line_every, tuple(shown)
        self._device, self._clock, self._check_owner = device, clock, check_owner
        self._console = console if console is not None else Terminal(stderr=True)
        self._before = 0.0  # training seconds of earlier processes
        self._paused = 0.0  # seconds of this process that were no training
        self._started: float | None = None
        self._stopped: float | None = None
        self._reset_window()
        self._last_line, self._has_told_stall = -math.inf, False
        self._peak = math.inf
        if enabled:
            num_devices = dist.get_world_size() if dist.is_initialized() else 1
            self._peak = num_devices * (peak_flops if peak_flops is not None else measure_peak_flops(device))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, console=self._console, disable=not (enabled and self._console.is_terminal))
        self._task = self._bar.add_task(name, total=total_steps, figures="")

    @property
    def seconds(self) -> float:
        """Seconds of training so far over all processes of the run: evaluation and checkpoints excluded. Waits for the device."""
        if self._started is None:
            return self._before
        return self._before + (self._now() if self._stopped is None else self._stopped) - self._started - self._paused

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; call before `resume_from`."""
        self._before = state["seconds"]

    def resume_from(self, step: int) -> None:
        """Start the clock at `step` (0: a fresh run), and drop what an earlier process wrote beyond it, so that nothing is there twice."""
        for tracker in self.trackers:
            tracker.resume_from(step)
        self._bar.start()
        self._bar.update(self._task, completed=step)
        self._started, self._paused = self._clock(), 0.0
        self._stopped = self._started if step >= self.total_steps else None
        self._reset_window()

    @contextmanager
    def loader_wait(self) -> Iterator[None]:
        """Time spent here is loader stall."""
        start = self._clock()
        try:
            yield
        finally:
            self._stall += self._clock() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here is no training: evaluation, checkpoints."""
        start = self._now()
        try:
            yield
        finally:
            spent = self._now() - start
            self._window_paused += spent
            if self._stopped is None:
                self._paused += spent

    def is_due(self, step: int) -> bool:
        """Whether the figures of `step` will be written: the first, every `log_every`-th, the last."""
        return step == 1 or step % self.log_every == 0 or step == self.total_steps

    def step(self, step: int, figures: Mapping[str, Any], *, num_samples: int, flops: float) -> None:
        """Count one step; write a line when one is due.

        Args:
            step: steps done, this one included.
            figures: numbers or tensors of one element, "loss" and "learning_rate" among them; read only when a line is due.
            num_samples, flops: of this step, all ranks together.
        """
        self._steps += 1
        self._samples += num_samples
        self._flops += flops
        if step == self.total_steps and self._stopped is None:
            self._stopped = self._now()
        if not self.enabled:
            return
        self._bar.update(self._task, completed=step)
        if not self.is_due(step):
            return
        line = {name: _number(value) for name, value in figures.items()} | self._rates(step)
        self._check_owner()
        for tracker in self.trackers:
            tracker.scalars(step, line, kind="training")
        self._say(step, line)
        if line["loader_stall"] >= LOADER_BOUND and self._steps >= WINDOW_TOLD and not self._has_told_stall:
            self._has_told_stall = True
            self._print(step, f"loader-bound: training waits for data {line['loader_stall']:.0%} of the time. {STALL_REMEDY}")
        self._reset_window()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass on the metrics of an evaluation, and print those of `shown`."""
        if self.enabled:
            self._check_owner()
        for tracker in self.trackers:
            tracker.scalars(step, metrics, kind="evaluation")
        told = [f"{name} {metrics[name]:.3f}" for name in self.shown if name in metrics]
        if self.enabled and told:
            self._print(step, f"validation  {'  '.join(told)}  after {self.seconds:.0f} s")

    def _rates(self, step: int) -> dict[str, Any]:
        seconds = self.seconds  # waits for the device, so that the window's work is done
        spent = max(1e-9, self._clock() - self._window_start - self._window_paused)
        return {
            "seconds": seconds,
            "samples_per_second": self._samples / spent,
            "mfu": self._flops / spent / self._peak,
            "loader_stall": self._stall / spent,
            "eta_seconds": (self.total_steps - step) * spent / self._steps,
            "peak_memory_bytes": self._memory(),
        }

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _reset_window(self) -> None:
        self._window_start, self._window_paused = self._clock(), 0.0
        self._steps, self._samples, self._flops, self._stall = 0, 0, 0.0, 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()

    def _say(self, step: int, line: Mapping[str, Any]) -> None:
        of_model = "".join(
            f"{told} {line[name]:{style}}  "
            for name, told, style in (("gradient_norm", "grad norm", ".2f"), ("logit_scale", "logit scale", ".1f"))
            if name in line
        )
        figures = (
            f"loss {line['loss']:.3f}  {of_model}lr {line['learning_rate']:.1e}  {line['samples_per_second']:,.0f} samples/s  "
            f"MFU {line['mfu']:.0%}  stall {line['loader_stall']:.0%}  {line['peak_memory_bytes'] / 1e9:.1f} GB  "
            f"ETA {line['eta_seconds']:.0f} s"
        )
        self._bar.update(self._task, figures=figures)
        due = self._clock() - self._last_line >= self.line_every or step == self.total_steps
        if not self._console.is_terminal and due:
            self._last_line = self._clock()
            self._print(step, figures)

    def _print(self, step: int, told: str) -> None:
        self._console.print(f"{self.name} {step}/{self.total_steps}  {told}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush and end the bar."""
        self._bar.stop()
        for tracker in self.trackers:
            tracker.close()


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)
