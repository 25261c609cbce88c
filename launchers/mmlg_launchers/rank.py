"""One rank under torchrun: `python -m mmlg_launchers.rank -m MODULE ...` or `... SCRIPT ...`.

It asks the kernel to end it with torchrun first: ranks whose torchrun was killed would otherwise go on training, and write
to the same folder as the rerun.
"""

from __future__ import annotations

import runpy
import sys

from mmlg_launchers.local import end_with_parent


def main() -> None:
    """See the module's docstring."""
    end_with_parent()
    words = sys.argv[1:]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
