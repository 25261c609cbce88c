"""Every edit of `mutants.py` still applies, and (slow) makes the tests fail that it names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutants import MUTANTS, ROOT


def test_every_edit_applies(tmp_path: Path) -> None:
    assert len(MUTANTS) >= 30
    for number, mutant in enumerate(MUTANTS):
        mutant.write(tmp_path / str(number))
        compile((tmp_path / str(number) / "mmlg_kernels" / mutant.file).read_text(), mutant.file, "exec")


@pytest.mark.slow
def test_every_edit_is_noticed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutants", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("as it is") == 0, (tmp_path / "as-it-is" / "log.txt").read_text()[-3000:]
    # 1: tests failed; 5 would be that none was chosen, 2 to 4 that pytest itself stopped. A signal: it wrote where it must not.
    assert [name for name, code in report.items() if code != 1 and code >= 0] == []
