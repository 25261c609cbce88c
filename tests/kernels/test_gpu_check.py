"""`make gpu-check` continues when a check fails or hangs, and says what became of each."""

import json
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
from mmlg_kernels.tiles import Tile, read_table, write_table

from benchmarks import gpu_check
from benchmarks.gpu_check import TOTAL_SECONDS, Check, all_checks, part_name, run_checks, show, tuned_tiles, write_results


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
    kept: list[int] = []
    outcomes = run_checks(checks, tmp_path, 120, lambda done: kept.append(len(done)))
    assert kept == [1, 2, 3, 4]  # after each, so that a machine that is taken away leaves what was done
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "over its limit", "passed"]
    assert [outcome.last_lines for outcome in outcomes] == [["a table"], ["no such kernel"], ["hanging"], []]
    out = tmp_path / "out"
    out.mkdir()
    found = tmp_path / "found"
    found.mkdir()
    (found / "tiles-some-gpu.json").write_text("{}")
    (found / "tests.log").write_text("log")
    for done in (outcomes[:2], outcomes):
        write_results(done, found, out, "gpu_check_1", {"device": "some GPU"})
        content = json.loads((out / "gpu_check_1.json").read_text())
        assert (content["environment"], len(content["checks"])) == ({"device": "some GPU"}, len(done))
    assert (show(outcomes), show([outcomes[0], outcomes[3]])) == (1, 0)
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check_1.json", "gpu_check_1.tar.gz", "tiles-some-gpu.json"]
    with tarfile.open(out / "gpu_check_1.tar.gz") as archive:
        assert archive.getnames() == ["tests.log", "tiles-some-gpu.json"]
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


def test_each_part_fits_into_nine_minutes(tmp_path: Path) -> None:
    for part in (1, 2):
        assert sum(check.limit_s for check in all_checks(part, tmp_path)) <= TOTAL_SECONDS < 9 * 60
    assert {"tests", "tiles"} == {check.name for check in all_checks(1, tmp_path)}
    assert "throughput" in {check.name for check in all_checks(2, tmp_path)}


def test_tiles_are_those_that_the_kernels_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part 1's, the committed ones, or the user's; of this GPU, and of this Triton."""
    results, out, given, cache = (tmp_path / name for name in ("results", "out", "given", "cache"))
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    monkeypatch.delenv("MMLG_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    tiles = {"softmax_forward bfloat16": Tile(64, 64, 64, 4, 3)}

    def write(folder: Path, gpu: str = "Some GPU") -> None:
        write_table(folder / f"tiles-{gpu.lower().replace(' ', '-')}.json", gpu, tiles, {})

    assert tuned_tiles(out, "Some GPU") is None
    write(results, "Other GPU")
    (results / "tiles-some-gpu.json").write_text("{}")
    read_table.cache_clear()
    assert tuned_tiles(out, "Some GPU") is None
    write(cache / "mmlg_kernels")
    assert tuned_tiles(out, "Some GPU") == cache / "mmlg_kernels" / "tiles-some-gpu.json"
    write(results)
    assert tuned_tiles(out, "Some GPU") == results / "tiles-some-gpu.json"  # --out is emptied between the parts
    write(out)
    assert tuned_tiles(out, "Some GPU") == out / "tiles-some-gpu.json"
    monkeypatch.setenv("MMLG_TILES", str(given))
    assert tuned_tiles(out, "Some GPU") is None


def test_checks_that_run_again_leave_the_results_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = all_checks(2, tmp_path)
    assert part_name(2, every, every) == "gpu_check_2"
    assert part_name(2, every[1:3], every) == f"gpu_check_2_{every[1].name}_{every[2].name}"
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--part", "1", "--only", "throughput"])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    outcomes = run_checks([Check("steps", python("pass"), 60, ("json", "no_such_package"))], tmp_path, 60)
    assert [outcome.status for outcome in outcomes] == ["needs no_such_package"]
