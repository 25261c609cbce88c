"""`make gpu-check` continues when a check fails or hangs, and says what became of each."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import Check, run_checks, write_results


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_a_check_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    # The one that hangs leaves a child behind, as compilers' workers are, and takes no notice of being asked to end.
    hang = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
print("hanging", flush=True)
time.sleep(600)
"""
    checks = [
        Check("good", python("print('a table')"), 60),
        Check("bad", python("raise SystemExit('no such kernel')"), 60),
        Check("hanging", python(hang), 2),
        Check("after", python("pass"), 60),
    ]
    outcomes = run_checks(checks, tmp_path, 120)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "over its limit", "passed"]
    assert [outcome.last_lines for outcome in outcomes] == [["a table"], ["no such kernel"], ["hanging"], []]
    assert write_results(outcomes, tmp_path, "cpu") == 1
    assert write_results([outcomes[0], outcomes[3]], tmp_path, "cpu") == 0
    assert len(json.loads((tmp_path / "gpu_check.json").read_text())["checks"]) == 2
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_the_total_holds_and_a_report_is_written_when_asked_to_end(handler: object, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, handler)  # type: ignore[arg-type]
    tests = "import time\ntry:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('report written')\n"
    outcomes = run_checks([Check("slow", python(tests), 600), Check("late", python("pass"), 600)], tmp_path, 3)
    signal.signal(signal.SIGINT, before)
    assert [(o.status, o.last_lines) for o in outcomes] == [("over its limit", ["report written"]), ("not started", [])]
