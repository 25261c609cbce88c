"""The device's name; a cluster's GPUs and the fraction of their peak that training reaches: what `mmlg plan --cluster` assumes."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlg_scale.errors import UserError
from mmlg_scale.records import read_record

# Dense bf16 peak of data-centre GPUs in FLOP/s, from their data sheets; the first key that the device's name contains counts.
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}
GPU_MEMORY_GB = {"B200": 180, "H200": 141, "H100 PCIe": 80, "H100 NVL": 94, "H100": 80, "A100": 40, "L40S": 48}
"""Of the smallest model of each, from the same data sheets; 10^9 bytes."""
KINDS = ("ancestor", "extraction", "descendant")
"""Kinds of steps of which `mmlg benchmark` measures the MFU."""


@dataclass(frozen=True)
class Hardware:
    """What steps are taken to run on.

    Attributes:
        device: one GPU in words.
        ranks: GPUs of a step that trains.
        peak_flops: FLOP/s of one.
        memory_bytes: of one; None: not known.
        mfu: the fraction of the peak that is reached, by kind of step.
        notes: sentences on where the figures are from, and what is assumed.
    """

    device: str
    ranks: int
    peak_flops: float
    memory_bytes: float | None
    mfu: Mapping[str, float]
    notes: tuple[str, ...]


def device_name(device_type: str) -> str:
    """The GPU's name; of a CPU its model and its widest vector instructions, by which a run's last digits differ between machines."""
    import torch

    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def known_gpu(gpu_type: str) -> str | None:
    """The key of GPU_PEAKS that a scheduler's name of a GPU (a100, nvidia_h100_pcie) means."""
    words = re.sub(r"[^a-z0-9]+", " ", gpu_type.lower())
    return next((key for key in GPU_PEAKS if all(word in words for word in key.lower().split())), None)


def hardware_of(
    cluster: str,
    *,
    nodes: int,
    precision: str,
    model: str,
    default_mfu: float,
    given_mfu: float | None,
    peak_flops: float | None,
    benchmark: Path | None,
) -> Hardware:
    """The GPUs of a cluster file, or of a shipped one by name.

    Args:
        model: whose rows of a benchmark are preferred.
        given_mfu, peak_flops: the user's own, which come before all others.
        benchmark: benchmark.json of `mmlg benchmark`.

    Raises:
        UserError: the file does not say what is needed, the GPU is not known, or the benchmark has no row to go by.
    """
    from mmlg_launchers import LaunchError, load_cluster

    try:
        site = load_cluster(cluster)
    except LaunchError as error:
        raise UserError(str(error)) from error
    if site.gpus_per_node < 1:
        raise UserError(f"cluster {cluster} says nothing of GPUs. Give gpus_per_node, and gpu_type, in its file.")
    gpu = known_gpu(site.gpu_type) if site.gpu_type is not None else None
    notes = []
    if peak_flops is not None:
        notes.append(f"peak: {peak_flops / 1e12:,.0f} TFLOP/s a GPU, as given.")
    elif gpu is not None:
        peak_flops = GPU_PEAKS[gpu]
        notes.append(f"peak: {peak_flops / 1e12:,.0f} TFLOP/s a GPU, dense bf16, from the data sheet of {gpu}.")
    else:
        told = "no gpu_type" if site.gpu_type is None else f"gpu_type {site.gpu_type}, whose peak is not known here"
        raise UserError(f"cluster {cluster} has {told}. Give --flops-per-second, its dense bf16 peak (known: {', '.join(GPU_PEAKS)}).")
    if precision == "fp32":
        notes.append("the recipe computes in fp32, whose peak is a fraction of bf16's: times are too short. Set engine.precision to bf16.")
    if site.gpu_memory_gib is not None:
        memory: float | None = site.gpu_memory_gib * 2.0**30
    else:
        memory = None if gpu is None else GPU_MEMORY_GB[gpu] * 1e9
        if gpu is not None:
            notes.append(f"memory: {GPU_MEMORY_GB[gpu]} GB a GPU, the smallest {gpu} (gpu_memory_gib in the cluster file says otherwise).")
    ranks = nodes * site.gpus_per_node
    if given_mfu is not None:
        mfu = dict.fromkeys(KINDS, given_mfu)
        notes.append(f"MFU: {given_mfu:.0%}, as given.")
    elif benchmark is not None:
        mfu = _measured(benchmark, gpu, model, precision, ranks, notes)
    else:
        mfu = dict.fromkeys(KINDS, default_mfu)
        notes.append(f"MFU: {default_mfu:.0%}, an assumption: nothing was measured. Give --benchmark FILE (mmlg benchmark).")
    return Hardware(site.gpu_type or "GPU", ranks, peak_flops, memory, mfu, tuple(notes))


def _measured(file: Path, gpu: str | None, model: str, precision: str, ranks: int, notes: list[str]) -> dict[str, float]:
    """The MFU of each kind of step, loader inside, of the most similar row: the model first, then the number of ranks."""
    rows = read_record(file, "the results of mmlg benchmark", "Measure again.").get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file} has no rows. Give benchmark.json of mmlg benchmark.")
    usable = [row for row in rows if row.get("precision") == precision and _is_share(row.get("mfu")) and isinstance(row.get("ranks"), int)]
    if not usable:
        raise UserError(f"{file} has no figures in {precision}, the recipe's precision. Measure with --precisions {precision}.")

    def difference(row: dict[str, Any]) -> tuple[bool, float]:
        return row.get("model") != model, abs(math.log(max(1, row["ranks"]) / ranks))

    found = {}
    for kind in KINDS:
        own = [row for row in usable if row.get("role") == kind]
        row = min(own or usable, key=difference)
        found[kind] = float(row["mfu"])
        device = str((row.get("environment") or {}).get("device", "an unnamed device"))
        told = f"MFU of {kind} steps: {row['mfu']:.1%}, measured on {row['ranks']} × {device}, {row.get('model')}"
        told += "" if own else f", of {row.get('role')} steps, since there are none of their own"
        if gpu is None or known_gpu(device) != gpu:
            told += "; an assumption, since that is another device"
        notes.append(f"{told}.")
    return found


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
