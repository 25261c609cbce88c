"""What every test of a hostile file needs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlg_scale.cli import main

DEEP = "[" * 100_000


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for a pipe fails instead of waiting."""

    def too_long(*_: Any) -> None:
        raise TimeoutError("longer than 60 s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(*words: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    """A command ends with exit code 2 and one line, which is returned."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mmlg: error: ")
    assert lines[0].isprintable()
    return lines[0]
