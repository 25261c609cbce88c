"""A run that hangs ends by itself, and says where."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mmlg_scale.errors import EXIT_HANG
from mmlg_scale.training.watchdog import Watchdog

HANGING = """
import os, sys, threading
from pathlib import Path
from mmlg_scale.training import watchdog

def waits_for_ever(pipe):
    os.read(pipe, 1)  # as a collective does: in C, without Python's lock

watchdog.GRACE_SECONDS = 0.1
read, _ = os.pipe()
with watchdog.Watchdog(Path(sys.argv[1]), 3, 0.3):
    waits_for_ever(read)
"""


def test_a_process_that_hangs_ends_with_its_stack(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == EXIT_HANG
    file = tmp_path / "stacks" / "rank-3.txt"
    assert done.stderr == f"mmlg: error: rank 3 has done no step for 0 s (runtime.hang_minutes); where it hangs is in {file}.\n"
    stack = file.read_text()
    assert "in waits_for_ever" in stack
    assert stack.count("most recent call first") == 2  # its thread, and the one that watches


def test_one_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 0.5) as watchdog:
        for _ in range(10):
            time.sleep(0.1)
            watchdog.beat()
    with Watchdog(tmp_path, 0, 0.2) as watchdog, watchdog.paused():
        time.sleep(0.6)
    with Watchdog(tmp_path, 0, None):
        pass
    assert os.listdir(tmp_path) == []
