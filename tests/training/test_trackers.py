"""Trackers: what Weights & Biases keeps is read back from its own files; failures cost curves, never the run."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mmlg_scale.errors import UserError, in_words
from mmlg_scale.training.trackers import Forgiving, JsonLines, TensorBoard, make_trackers


def _records(file: Path) -> list[Any]:
    """Records of a .wandb file: a header of 7 bytes, then LevelDB's log (blocks of 32 KiB; checksum, length, type, payload)."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, whole, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def _history(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for record in _records(file):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((row["_step"], {key: value for key, value in row.items() if "/" in key}))
    return rows


PROCESS = """
import json, sys
from pathlib import Path
from mmlg_scale.training.trackers import make_trackers
folder, settings, start, steps = json.loads(sys.argv[1])
(tracker,) = make_trackers(["wandb"], Path(folder), **settings)
tracker.resume_from(start)
if start == 0:
    tracker.scalars(0, {"acc1": 0.0}, kind="evaluation")
for step in steps:
    tracker.scalars(step, {"loss": 10.0 - step}, kind="training")
    if step % 2 == 0:
        tracker.scalars(step, {"acc1": step / 10}, kind="evaluation")
tracker.close()
"""
"""One process of a run: a resumed run is another process."""


def test_weights_and_biases_offline_with_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings: dict[str, Any] = {"name": "family/ancestor", "project": "ours", "config": {"recipe": {"seed": 7}}}

    for start, steps in ((0, [1, 2]), (2, [2, 3, 4])):  # step 2 is before the resume point: it is not logged again
        arguments = json.dumps([str(tmp_path), settings, start, steps])
        subprocess.run([sys.executable, "-c", PROCESS, arguments], check=True, timeout=120)
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    assert first.name == second.name  # one id: one curve
    assert _history(first) == [
        (0, {"evaluation/acc1": 0.0}),
        (1, {"training/loss": 9.0}),
        (2, {"training/loss": 8.0, "evaluation/acc1": 0.2}),
    ]
    assert _history(second) == [(3, {"training/loss": 7.0}), (4, {"training/loss": 6.0, "evaluation/acc1": 0.4})]
    runs = [record.run for record in _records(second) if record.WhichOneof("record_type") == "run"]
    assert (runs[0].project, runs[0].display_name) == ("ours", "family/ancestor")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["recipe"] == {"seed": 7}


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed\. pip install \"mmlg-scale\[wandb\]\""):
        make_trackers(["wandb"], tmp_path, name="run", project=None, config={})
    assert [type(tracker) for tracker in make_trackers(["jsonl", "jsonl"], tmp_path, name="run", project=None, config={})] == [JsonLines]


class Failing:
    """Fails at its second figure."""

    calls = 0

    def resume_from(self, step: int) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float], *, kind: str) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        self.calls += 100


def test_a_tracker_that_fails_is_reported_once_and_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    failing = Failing()
    tracker = Forgiving("tensorboard", failing)
    for step in range(1, 5):
        tracker.scalars(step, {"loss": 1.0}, kind="training")
    tracker.close()
    assert failing.calls == 2
    assert capsys.readouterr().err == "tracker tensorboard is switched off: [Errno 28] No space left on device\n"


def test_a_full_disk_under_tensorboard_costs_curves_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = Forgiving("tensorboard", TensorBoard(tmp_path))
    tracker.resume_from(0)
    tracker.scalars(1, {"loss": 1.0}, kind="training")
    tracker.close()
    assert capsys.readouterr().err.count("tracker tensorboard is switched off") == 1


def test_a_full_disk_under_metrics_jsonl_ends_the_run() -> None:
    class Full(JsonLines):
        def __init__(self) -> None:
            self._path = Path("/dev/full")

    with pytest.raises(OSError, match="No space left") as error:
        Full().scalars(1, {"loss": 1.0}, kind="training")
    assert in_words(error.value) == "/dev/full: the disk is full. Free some space, then start the same command again."
