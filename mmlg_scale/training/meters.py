"""Figures of a run: console line or bar, metrics.jsonl, TensorBoard.

Figures stay on the device until a line is due: reading one costs a synchronisation.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from mmlg_scale.files import write_text_atomic

# Dense bf16 peak of data-centre GPUs in FLOP/s, from their data sheets.
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def measure_peak_flops(device: torch.device) -> float:
    """The denominator of MFU: a GPU's data-sheet bf16 peak where it is known, else the best of a few large matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for key, peak in GPU_PEAKS.items() if key in name]
        if known:
            return known[0]
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Meters:
    """One run's figures; with `enabled` False (ranks other than the first) only the clock runs.

    Args:
        folder: metrics.jsonl and tensorboard/ are written there.
        log_every: steps between lines of metrics.jsonl.
        line_every: seconds between console lines where the console is no terminal.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        *,
        name: str,
        device: torch.device,
        enabled: bool = True,
        log_every: int = 10,
        line_every: float = 10.0,
    ) -> None:
        self.folder, self.total_steps, self.name, self.enabled = folder, total_steps, name, enabled
        self.log_every, self.line_every = log_every, line_every
        self._device = device
        self._console = Console(stderr=True)
        self._before = 0.0  # training seconds of earlier processes
        self._paused = 0.0  # seconds of this process that were no training
        self._started = time.perf_counter()
        self._reset_window()
        self._last_line = -math.inf
        self._peak = measure_peak_flops(device) if enabled else math.inf
        self._writer = SummaryWriter(str(folder / "tensorboard")) if enabled else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, console=self._console, disable=not (enabled and self._console.is_terminal))
        self._bar.start()
        self._task = self._bar.add_task(name, total=total_steps, figures="")

    @property
    def seconds(self) -> float:
        """Seconds of training so far over all processes of the run: evaluation and checkpoints excluded."""
        return self._before + time.perf_counter() - self._started - self._paused

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._before = state["seconds"]
        self._started, self._paused = time.perf_counter(), 0.0

    def resume_from(self, step: int) -> None:
        """Drop what an earlier process wrote beyond `step`, so that nothing stands twice; call once before the first step."""
        path = self.folder / "metrics.jsonl"
        if self.enabled and path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) <= step]  # type: ignore[operator]
            write_text_atomic(path, "".join(f"{line}\n" for line in kept))
        self._bar.update(self._task, completed=step)
        self._started, self._paused = time.perf_counter(), 0.0
        self._reset_window()

    @contextmanager
    def loader_wait(self) -> Iterator[None]:
        """Time spent here is loader stall."""
        start = time.perf_counter()
        yield
        self._stall += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here is no training: evaluation, checkpoints."""
        start = time.perf_counter()
        yield
        spent = time.perf_counter() - start
        self._paused += spent
        self._window_paused += spent

    def step(self, step: int, figures: Mapping[str, Any], *, num_samples: int, flops: float) -> None:
        """Count one step; write a line when one is due."""
        self._samples += num_samples
        self._flops += flops
        if not self.enabled:
            return
        self._bar.update(self._task, completed=step)
        if step % self.log_every and step != self.total_steps:
            return
        line = {"step": step, **{name: _number(value) for name, value in figures.items()}, **self._rates(step)}
        self._write(step, line)
        self._say(step, line)
        self._reset_window()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation."""
        if self.enabled:
            self._write(step, {"step": step, "evaluation": dict(metrics)})

    def _rates(self, step: int) -> dict[str, Any]:
        spent = max(1e-9, time.perf_counter() - self._window_start - self._window_paused)
        steps = max(1, self._samples and self.log_every)
        return {
            "seconds": self.seconds,
            "samples_per_second": self._samples / spent,
            "mfu": self._flops / spent / self._peak,
            "loader_stall": self._stall / spent,
            "eta_seconds": (self.total_steps - step) * spent / steps,
            "peak_memory_bytes": self._memory(),
        }

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _reset_window(self) -> None:
        self._window_start, self._window_paused = time.perf_counter(), 0.0
        self._samples, self._flops, self._stall = 0, 0.0, 0.0

    def _write(self, step: int, line: Mapping[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(_clean(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        assert self._writer is not None
        for name, value in (line.get("evaluation") or line).items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"{'evaluation' if 'evaluation' in line else 'training'}/{name}", value, step)

    def _say(self, step: int, line: Mapping[str, Any]) -> None:
        figures = (
            f"loss {line['loss']:.3f}  lr {line['learning_rate']:.1e}  {line['samples_per_second']:,.0f} samples/s  "
            f"MFU {line['mfu']:.0%}  stall {line['loader_stall']:.0%}  ETA {line['eta_seconds']:.0f} s"
        )
        self._bar.update(self._task, figures=figures)
        due = time.perf_counter() - self._last_line >= self.line_every or step == self.total_steps
        if not self._console.is_terminal and due:
            self._last_line = time.perf_counter()
            self._console.print(f"{self.name} {step}/{self.total_steps}  {figures}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Flush and end the bar."""
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, torch.Tensor) else value)


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> int | None:
    """The step of a line, or None for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
