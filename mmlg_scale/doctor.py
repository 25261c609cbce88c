"""`mmlg doctor`: what this machine has, and what to do about what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmlg_scale.files import free_bytes

SLURM_SECONDS = 5
LEAST_DISK, LEAST_SHARED_MEMORY = 2 * 2**30, 2**30
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where torch's data workers put their batches)


@dataclass(frozen=True)
class Finding:
    """What a check found. States: `ok`; `absent`, training goes without it; `missing`, training needs it."""

    name: str
    state: str
    found: str
    remedy: str = ""


Check = Callable[[], tuple[str, str, str]]
"""Gives a state, what was found, and a remedy, empty where all is well."""


def _python() -> tuple[str, str, str]:
    return "ok", f"{platform.python_version()} on {platform.machine()}", ""


def _torch() -> tuple[str, str, str]:
    import torch

    return "ok", f"{torch.__version__}, {torch.get_num_threads()} CPU threads", ""


def _cuda() -> tuple[str, str, str]:
    import torch

    if not torch.backends.cuda.is_built():
        return "absent", "torch is a CPU build", "On a GPU machine, install torch's CUDA build; here training runs on the CPU."
    if not torch.cuda.is_available():
        return "absent", "no CUDA GPU", "Check the driver with nvidia-smi; without one training runs on the CPU."
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    if not torch.cuda.is_bf16_supported():
        return "absent", f"{names}, without bf16", "Set engine.precision to fp32."
    return "ok", f"{names}, CUDA {torch.version.cuda}, bf16", ""


def _triton() -> tuple[str, str, str]:
    import triton

    if os.environ.get("TRITON_INTERPRET") == "1":
        return "absent", f"{triton.__version__}, interpreted", "Unset TRITON_INTERPRET: interpreted kernels are for tests."
    return "ok", str(triton.__version__), ""


def _deepspeed() -> tuple[str, str, str]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it looks for accelerators, and warns
    from mmlg_scale.training.engine import deepspeed_version

    return "ok", deepspeed_version(), ""


def _deepspeed_ops() -> tuple[str, str, str]:
    """DeepSpeed's own kernels; training here needs none, since the optimiser is torch's."""
    from mmlg_scale.training.engine import compatible_deepspeed_ops

    compatible = compatible_deepspeed_ops()
    return "ok", f"none is needed; {len(compatible)} could be compiled here", ""


def _open_clip() -> tuple[str, str, str]:
    from mmlg_scale import towers

    return "ok", f"{towers.open_clip_version()}, {len(towers.architecture_names())} architectures", ""


def _attention() -> tuple[str, str, str]:
    import torch

    backends = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cuDNN": torch.backends.cuda.cudnn_sdp_enabled(),
        "plain": torch.backends.cuda.math_sdp_enabled(),
    }
    found = "torch: " + ", ".join(name for name, enabled in backends.items() if enabled)
    if importlib.util.find_spec("flash_attn") is not None:
        return "ok", f"{found}; flash-attn", ""
    if not torch.cuda.is_available():
        return "ok", found, ""
    return "absent", f"{found}; no flash-attn", "Torch's own attention is used; nothing to do."


def _communication() -> tuple[str, str, str]:
    import torch
    import torch.distributed as dist

    found = [name for name, there in (("gloo", dist.is_gloo_available()), ("NCCL", dist.is_nccl_available())) if there]
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    if needed not in found:
        return "missing", f"torch with {', '.join(found) or 'no backend'}", f"Install a build of torch with {needed}."
    return "ok", ", ".join(found), ""


def _cores() -> tuple[str, str, str]:
    return "ok", f"{len(os.sched_getaffinity(0))} usable", ""


def _memory() -> tuple[str, str, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return "ok", f"{total / 2**30:.0f} GiB that this process may use", ""


def _disk() -> tuple[str, str, str]:
    free = free_bytes(Path.cwd())
    found = f"{free / 2**30:.1f} GiB free in {Path.cwd()}"
    return (
        ("ok", found, "") if free >= LEAST_DISK else ("missing", found, "Free some: checkpoints need more; or give --out on another disk.")
    )


def _shared_memory() -> tuple[str, str, str]:
    if not SHARED_MEMORY.is_dir():
        return "absent", f"no {SHARED_MEMORY}", "Set runtime.num_workers to 0, or mount it: loader processes pass batches through it."
    free = free_bytes(SHARED_MEMORY)
    found = f"{free / 2**30:.1f} GiB free in {SHARED_MEMORY}"
    if free >= LEAST_SHARED_MEMORY:
        return "ok", found, ""
    return "absent", found, "Give a container --shm-size=8g, or set runtime.num_workers to 0: a loader process that runs out is killed."


def _slurm() -> tuple[str, str, str]:
    commands = {name: shutil.which(name) for name in ("sbatch", "squeue", "srun", "scancel", "sinfo")}
    lacking = [name for name, path in commands.items() if path is None]
    if lacking:
        return "absent", f"no {', '.join(lacking)} on the PATH", "Use mmlg launch local; on a cluster, log in to a submit node."
    arguments = [str(commands["sinfo"]), "--noheader", "--format=%P %a %D"]
    try:
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=SLURM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "absent", f"sinfo gave no answer in {SLURM_SECONDS} s", "Ask the cluster's administrators whether slurmctld runs."
    if answer.returncode:
        said = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        return "absent", f"sinfo: {said}", "Check SLURM_CONF, and that slurmctld runs (scontrol ping)."
    return "ok", f"partitions: {'; '.join(answer.stdout.strip().splitlines()) or 'none'}", ""


CHECKS: dict[str, tuple[Check, bool]] = {
    "Python": (_python, True),
    "torch": (_torch, True),
    "CUDA": (_cuda, False),
    "Triton": (_triton, False),
    "DeepSpeed": (_deepspeed, True),
    "DeepSpeed ops": (_deepspeed_ops, False),
    "open_clip": (_open_clip, True),
    "attention": (_attention, False),
    "communication": (_communication, True),
    "CPU cores": (_cores, True),
    "memory": (_memory, True),
    "disk": (_disk, True),
    "shared memory": (_shared_memory, False),
    "Slurm": (_slurm, False),
}
"""Name -> (check, whether training needs it)."""


def examine() -> list[Finding]:
    """Every check's finding. A check that fails in any way is a finding too."""
    findings = []
    for name, (check, needed) in CHECKS.items():
        try:
            findings.append(Finding(name, *check()))
        except Exception as fault:
            said = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
            findings.append(Finding(name, "missing" if needed else "absent", said, "Run make setup, or install what it names."))
    return findings


def report(findings: list[Finding], *, as_json: bool) -> int:
    """Print findings as a table or as JSON, a list of objects; returns 1 when something that training needs is missing, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    missing = [finding.name for finding in findings if finding.state == "missing"]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("check", "state", "what was found", "what to do")
        colours = {"ok": "green", "absent": "yellow", "missing": "red"}
        for finding in findings:
            state = f"[{colours[finding.state]}]{finding.state}[/]"
            table.add_row(finding.name, state, escape(finding.found), escape(finding.remedy))
        console = Console()
        if not console.is_terminal:
            console = Console(width=120)
        console.print(table)
        print(f"Missing: {', '.join(missing)}. See the table above." if missing else "Training works on this machine.")
    return int(bool(missing))
