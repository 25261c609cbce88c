"""The console for progress bars."""

from __future__ import annotations

from rich.console import Console


class Terminal(Console):
    """A console whose bars leave the cursor as it is.

    rich hides it while a bar is shown, and a process that is killed does not bring it back.
    """

    def show_cursor(self, show: bool = True) -> bool:
        return super().show_cursor(True) if show else False
