"""`mmlg doctor`: what this machine has, and a remedy for what it lacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmlg_scale.errors import UserError

Check = Callable[[], str]


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} CPU threads"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise UserError("no CUDA GPU: training runs on the CPU. On a GPU machine, check the driver with nvidia-smi.")
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _deepspeed() -> str:
    from mmlg_scale.training.engine import deepspeed_version

    return deepspeed_version()


def _open_clip() -> str:
    from mmlg_scale import towers

    return f"{towers.open_clip_version()}, {len(towers.architecture_names())} architectures"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 2:
        raise UserError(f"{free:.1f} GiB free in this folder: checkpoints need more. Free some, or write --out to another disk.")
    return f"{free:.0f} GiB free in this folder"


def _slurm() -> str:
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on the PATH: use mmlg launch local. On a cluster, log in to a submit node.")
    return str(shutil.which("sbatch"))


def _cores() -> str:
    return f"{len(os.sched_getaffinity(0))} usable"


CHECKS: dict[str, tuple[Check, bool]] = {
    "torch": (_torch, True),
    "GPU": (_gpu, False),
    "CPU cores": (_cores, True),
    "DeepSpeed": (_deepspeed, True),
    "open_clip": (_open_clip, True),
    "disk": (_disk, True),
    "Slurm": (_slurm, False),
}
"""Name -> (check, whether training needs it)."""


def examine() -> int:
    """Print a table of all checks; returns 1 when something that training needs is missing, else 0."""
    table = Table("check", "state", "what was found, or what to do")
    failed = False
    for name, (check, needed) in CHECKS.items():
        try:
            table.add_row(name, "[green]ok[/]", check())
        except (UserError, ImportError, OSError, RuntimeError) as error:
            failed |= needed
            remedy = str(error) if isinstance(error, UserError) else f"{error}. Run make setup."
            table.add_row(name, "[red]missing[/]" if needed else "[yellow]absent[/]", remedy)
    Console().print(table)
    return 1 if failed else 0
