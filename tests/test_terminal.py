"""On a terminal: the cursor is there after whatever ends a command, and an error begins a line of its own."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

import mmlg_scale
from mmlg_scale.cli import main
from tests.forks import start
from tests.test_machine_errors import made, train

__all__ = ["made"]  # a fixture

HIDE = b"\x1b[?25l"


def command(words: list[str]) -> int:
    os.environ |= {"TERM": "xterm", "COLUMNS": "200"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
    return main(words)


def on_a_terminal(words: list[str], number: signal.Signals | None, after: bytes) -> tuple[int, bytes]:
    """Run a command in a fork whose console is a terminal; send it a signal once `after` is shown. Exit code, and all that was shown."""
    terminal, console = pty.openpty()
    process = start(console, command, words)
    os.close(console)
    assert process.pid is not None
    shown, sent, end = b"", False, time.monotonic() + 120
    while time.monotonic() < end:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the child has closed it
            break
        shown += part
        if number is not None and not sent and after in shown:
            os.kill(process.pid, number)
            sent = True
    os.close(terminal)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode, shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_cursor_is_never_hidden(number: signal.Signals, made: Path, tmp_path: Path) -> None:
    long = ["--ancestor.steps=100000", "--ancestor.eval_every=100000"]
    code, shown = on_a_terminal([*train(made, tmp_path / "run"), *long], number, b"/100000")
    assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert b"ancestor" in shown
    assert HIDE not in shown
    if number == signal.SIGINT:
        last = shown.decode().splitlines()[-1]
        when = r"(after step \d+, which is saved|before its first step)"
        assert re.match(rf"(\x1b\[\?25h)?mmlg: stopped by Ctrl-C {when}; start the same command again to resume\. ", last)
        assert last.endswith(f"Command: {shlex.join(['mmlg', *train(made, tmp_path / 'run'), *long])}")


def test_an_error_comes_after_the_bar(made: Path, tmp_path: Path) -> None:
    diverging = ["--ancestor.optimizer.learning_rate=1e20", "--ancestor.optimizer.gradient_clipping=0", "--ancestor.steps=50"]
    code, shown = on_a_terminal([*train(made, tmp_path / "run"), *diverging], None, b"")
    assert code == 2
    assert HIDE not in shown
    last = shown.decode().splitlines()[-1].removeprefix("\x1b[?25h")
    assert last.startswith("mmlg: error: training diverged: ")


def test_bars_of_commands_leave_the_cursor(tmp_path: Path) -> None:
    words = ["data", "scenes", "--num-train", "20", "--num-val", "4", "--num-test", "4", "--out", str(tmp_path / "set")]
    code, shown = on_a_terminal(words, None, b"")
    assert code == 0
    assert b"scenes" in shown
    assert HIDE not in shown


def test_every_bar_is_on_such_a_console() -> None:
    """rich's own console is for tables."""
    root = Path(mmlg_scale.__file__).parent
    made = {str(path.relative_to(root)) for path in root.rglob("*.py") if re.search(r"\bConsole\(", path.read_text())}
    assert made == {"doctor.py", "data/check.py", "forecast.py"}
    tracks = [line for path in root.rglob("*.py") for line in path.read_text().splitlines() if " track(" in line and "import" not in line]
    assert tracks
    assert all("console=Terminal(" in line for line in tracks)
