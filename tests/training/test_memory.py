"""The memory that `mmlg plan` says of a rank, against the peak of real steps by torch's profiler: within 10 %."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from mmlg_launchers import LocalLauncher, Resources

from mmlg_scale import towers
from mmlg_scale.accounting import parameter_counts
from mmlg_scale.memory import activation_bytes, backward_bytes, peak_bytes
from mmlg_scale.runtime import Runtime


def config(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "embed_dim": width // 2,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": width, "head_width": 32, "layers": layers},
        "text_cfg": {"context_length": 16, "vocab_size": vocabulary, "width": width, "heads": width // 32, "layers": layers},
    }


SMALL, LARGE = config(128, 4, 500), config(256, 6, 2000)


def case(size: dict[str, Any], batch_size: int, captions: int = 1, **runtime: Any) -> dict[str, Any]:
    return {"config": size, "batch_size": batch_size, "captions": captions, "runtime": runtime}


CASES = [
    *(case(SMALL, 64, zero_stage=stage) for stage in (0, 1, 2)),  # more activations than gradients
    *(case(LARGE, 16, zero_stage=stage) for stage in (0, 1, 2)),  # fewer
    case(SMALL, 64, zero_stage=0, activation_checkpointing=True),
    case(SMALL, 64, captions=3, zero_stage=1),
    case(LARGE, 16, zero_stage=1, overlap=False, bucket_size=2_500_000),
    case(LARGE, 16, zero_stage=2, bucket_size=2_500_000),
]


def measured(cases: list[dict[str, Any]], ranks: int, folder: Path) -> list[int]:
    """The peaks of the first rank."""
    argv = [sys.executable, "-m", "tests.training.memory_worker", str(folder / "peaks.json"), json.dumps(cases)]
    job = LocalLauncher().submit(argv, Resources(num_processes=ranks), folder / "run")
    job.wait(timeout=400)
    assert job.exit_code == 0, job.log_paths()[0].read_text()[-3000:]
    return list(json.loads((folder / "peaks.json").read_text()))


def planned(given: dict[str, Any], ranks: int) -> float:
    sizes, runtime = towers.model_config(given["config"]), Runtime(**given["runtime"])
    checkpointing, captions = runtime.activation_checkpointing, given["captions"]
    per_sample = activation_bytes(sizes, bf16=False, checkpointing=checkpointing, captions=captions)
    found = peak_bytes(
        parameter_counts(towers.build_meta(sizes).state_dict())["total"],
        zero_stage=runtime.zero_stage,
        ranks=ranks,
        activations=given["batch_size"] / ranks * (per_sample + backward_bytes(sizes, bf16=False, captions=captions)),
        bucket_size=runtime.bucket_size,
        overlap=runtime.overlap,
    )
    return sum(found.values())


@pytest.mark.slow
def test_planned_memory_is_what_steps_take(tmp_path: Path) -> None:
    """Of each of two ranks."""
    ranks = 2
    apart = {}
    for given, peak in zip(CASES, measured(CASES, ranks, tmp_path), strict=True):
        name = (
            f"width {given['config']['vision_cfg']['width']}, batch {given['batch_size']}, {given['captions']} captions, {given['runtime']}"
        )
        apart[name] = planned(given, ranks) / peak - 1
    print(json.dumps(apart, indent=1))
    assert all(abs(error) < 0.1 for error in apart.values()), apart
