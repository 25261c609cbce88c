"""Figures of a run, on a clock driven by hand: every value is computed beside it."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmlg_scale.training.meters import Meters, measure_peak_flops
from mmlg_scale.training.trackers import make_trackers


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def _meters(folder: Path, clock: Clock, **changes: Any) -> Meters:
    settings: dict[str, Any] = {"name": "run", "device": torch.device("cpu"), "log_every": 2, "peak_flops": 1e4}
    settings |= {"console": Console(file=io.StringIO(), width=200)} | changes
    trackers = make_trackers(["jsonl", "tensorboard"], folder, name="run", project=None, config={}) if settings.get("enabled", True) else []
    return Meters(trackers, settings.pop("total_steps", 5), clock=clock, **settings)


def _step(meters: Meters, clock: Clock, step: int, *, loss: float = 1.0, seconds: float = 2.0, wait: float = 0.0) -> None:
    with meters.loader_wait():
        clock.pass_by(wait)
    clock.pass_by(seconds - wait)
    meters.step(step, {"loss": torch.tensor(loss), "learning_rate": 0.1}, num_samples=8, flops=4000)


def _lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rates_by_hand(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock)
    clock.pass_by(50)  # building and the like: no training
    meters.resume_from(0)
    _step(meters, clock, 1, wait=0.5)
    with meters.pause():
        clock.pass_by(100)
    _step(meters, clock, 2, loss=3.0, wait=0.5)
    for step in (3, 4, 5):
        _step(meters, clock, step, seconds=1.0)
    meters.close()

    start, first, second, last = _lines(tmp_path)
    memory = [line.pop("peak_memory_bytes") for line in (start, first, second, last)]
    assert all(1e6 < num_bytes < 1e12 for num_bytes in memory)
    # A step of 8 samples and 4000 FLOPs in 2 s at a peak of 10,000 FLOP/s, 0.5 s of them waiting; four, then three steps to go.
    common = {"learning_rate": 0.1, "samples_per_second": 4.0, "mfu": 0.2, "loader_stall": 0.25}
    assert start == {**common, "step": 1, "loss": 1.0, "seconds": 2.0, "eta_seconds": 8.0}
    assert first == {**common, "step": 2, "loss": 3.0, "seconds": 4.0, "eta_seconds": 6.0}
    assert (second["step"], second["seconds"], second["samples_per_second"], second["loader_stall"]) == (4, 6.0, 8.0, 0.0)
    # The last window holds one step only.
    assert (last["step"], last["seconds"], last["samples_per_second"], last["mfu"], last["eta_seconds"]) == (5, 7.0, 8.0, 0.4, 0.0)


def test_the_clock_leaves_out_pauses_and_what_follows_the_last_step(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock, total_steps=2)
    assert meters.seconds == 0.0
    clock.pass_by(7)
    meters.resume_from(0)
    _step(meters, clock, 1)
    with meters.pause():
        clock.pass_by(11)
    _step(meters, clock, 2)
    assert meters.seconds == 4.0
    clock.pass_by(13)  # evaluation on the test split
    with meters.pause():
        clock.pass_by(17)
    assert meters.seconds == 4.0


def test_a_run_without_steps_takes_no_time(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock, total_steps=0)
    meters.resume_from(0)
    clock.pass_by(5)
    assert meters.seconds == 0.0


def test_a_resumed_run_continues_without_doubling(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock)
    meters.resume_from(0)
    meters.evaluation(0, {"mean_recall@1": 0.1})
    for step in (1, 2):
        _step(meters, clock, step)
    state = meters.state_dict()
    meters.evaluation(2, {"mean_recall@1": 0.2})
    for step in (3, 4):
        _step(meters, clock, step, loss=9.0)
    meters.close()  # ended here: step 2's checkpoint is the newest
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')

    clock.pass_by(500)
    again = _meters(tmp_path, clock)
    again.load_state_dict(json.loads(json.dumps(state)))
    again.resume_from(2)
    for step in (3, 4, 5):
        _step(again, clock, step)
    again.close()
    lines = _lines(tmp_path)
    assert [(line["step"], "evaluation" in line) for line in lines] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (4, False),
        (5, False),
    ]
    assert [line["loss"] for line in lines if "loss" in line] == [1.0] * 4  # the 9s of the lost steps are gone
    assert [line["seconds"] for line in lines if "seconds" in line] == [2.0, 4.0, 8.0, 10.0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(1, 1.0), (2, 1.0), (4, 1.0), (5, 1.0)]
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("evaluation/mean_recall@1")] == [(0, 0.1), (2, 0.2)]


def test_a_run_that_starts_afresh_keeps_nothing(tmp_path: Path) -> None:
    for value in (0.1, 0.2):  # the first process ended before its first checkpoint
        meters = _meters(tmp_path, Clock())
        meters.resume_from(0)
        meters.evaluation(0, {"acc1": value})
        meters.close()
    assert _lines(tmp_path) == [{"step": 0, "evaluation": {"acc1": 0.2}}]


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock)
    meters.resume_from(0)
    _step(meters, clock, 2, loss=math.nan)
    meters.evaluation(2, {"acc1": math.inf, "acc5": 0.5})
    meters.close()
    first, second = _lines(tmp_path)
    assert first["loss"] is None
    assert second["evaluation"] == {"acc1": None, "acc5": 0.5}


class Unreadable:
    """A figure that nobody may read."""

    def __float__(self) -> float:
        raise AssertionError("read on a step that writes no line")


def test_figures_are_read_only_when_a_line_is_due(tmp_path: Path) -> None:
    meters = _meters(tmp_path, Clock(), log_every=3)
    meters.resume_from(0)
    meters.step(1, {"loss": 1.0, "learning_rate": 0.1}, num_samples=1, flops=1)
    meters.step(2, {"loss": Unreadable(), "learning_rate": 0.1}, num_samples=1, flops=1)
    with pytest.raises(AssertionError, match="writes no line"):
        meters.step(3, {"loss": Unreadable(), "learning_rate": 0.1}, num_samples=1, flops=1)


def test_plain_lines_where_the_console_is_no_terminal(tmp_path: Path) -> None:
    clock, file = Clock(), io.StringIO()
    meters = _meters(tmp_path, clock, log_every=1, line_every=5.0, console=Console(file=file, width=60), total_steps=4)
    meters.resume_from(0)
    for step in (1, 2, 3, 4):  # 2 s each: a line at once, then one after 5 s or more, and one at the end
        _step(meters, clock, step, loss=2.5, wait=1.0)
    meters.close()
    figures = "loss 2.500  lr 1.0e-01  4 samples/s  MFU 20%  stall 50%  N GB  ETA"
    lines = re.sub(r"[0-9.]+ GB", "N GB", file.getvalue()).splitlines()
    assert lines == [f"run 1/4  {figures} 6 s", f"run 4/4  {figures} 0 s"]


def test_what_to_do_about_a_stall_is_said_once(tmp_path: Path) -> None:
    """Not of the first steps, which wait for the workers to start, nor of a share that is small."""

    def printed(waits: list[float]) -> list[str]:
        clock, file = Clock(), io.StringIO()
        meters = _meters(tmp_path / str(waits[1]), clock, log_every=5, console=Console(file=file, width=200), total_steps=len(waits))
        meters.resume_from(0)
        for step, wait in enumerate(waits, start=1):
            _step(meters, clock, step, wait=wait)
        meters.close()
        return [line for line in file.getvalue().splitlines() if "bound" in line]

    assert printed([2.0] + 15 * [0.3]) == []
    told = "loader-bound: training waits for data 25% of the time. Raise runtime.num_workers, or lower the resolution."
    assert printed([0.0] + 15 * [0.5]) == [f"run 10/16  {told}"]


def test_the_model_s_own_figures_and_evaluations_are_in_the_lines(tmp_path: Path) -> None:
    clock, file = Clock(), io.StringIO()
    meters = _meters(tmp_path, clock, console=Console(file=file, width=60), total_steps=4, shown=["mean_recall@1", "acc1"])
    meters.resume_from(0)
    clock.pass_by(2.0)
    figures = {"loss": 2.5, "gradient_norm": torch.tensor(0.126), "logit_scale": torch.tensor(14.28), "learning_rate": 0.1}
    meters.step(1, figures, num_samples=8, flops=4000)
    meters.evaluation(1, {"acc1": 0.25, "acc5": 0.5, "mean_recall@1": 0.1234})
    meters.evaluation(2, {"acc5": 0.5})  # nothing to show
    meters.close()
    first, second = file.getvalue().splitlines()
    assert first.startswith("run 1/4  loss 2.500  grad norm 0.13  logit scale 14.3  lr 1.0e-01  4 samples/s  MFU 20%")
    assert second == "run 1/4  validation  mean_recall@1 0.123  acc1 0.250  after 2 s"
    line = _lines(tmp_path)[0]
    assert (line["gradient_norm"], line["logit_scale"]) == (pytest.approx(0.126), pytest.approx(14.28))


def test_a_bar_where_the_console_is_a_terminal(tmp_path: Path) -> None:
    clock, file = Clock(), io.StringIO()
    meters = _meters(tmp_path, clock, console=Console(file=file, width=120, force_terminal=True), total_steps=2)
    meters.resume_from(0)
    for step in (1, 2):
        _step(meters, clock, step, loss=2.5)
    meters.close()
    assert "2/2" in file.getvalue()
    assert "loss 2.500" in file.getvalue()
    assert "run 2/2  loss" not in file.getvalue()


def test_other_ranks_write_nothing_but_keep_time(tmp_path: Path) -> None:
    clock = Clock()
    meters = _meters(tmp_path, clock, enabled=False)
    meters.resume_from(0)
    for step in (1, 2):
        _step(meters, clock, step)
    meters.evaluation(2, {"acc1": 1.0})
    meters.close()
    assert meters.seconds == 4.0
    assert list(tmp_path.iterdir()) == []


def test_peak_is_measured_without_touching_the_global_random_state() -> None:
    before = torch.get_rng_state()
    peak = measure_peak_flops(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak < 1e15
