"""Machine code of the Triton kernels for three GPU generations, compiled without a GPU, in a process where nothing is interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmlg_kernels import tiled

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
# What the tensor cores of each generation are called in its machine code.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--dtype", "bf16", "fp32", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "compiled.json").read_text())


@pytest.fixture(scope="module")
def rows(content: dict[str, list[dict[str, object]]]) -> list[dict[str, object]]:
    return content["rows"]


def test_every_kernel_was_compiled(rows: list[dict[str, object]]) -> None:
    names = [f"{loss}_{part}" for loss in ("softmax", "sigmoid", "distillation") for part in ("forward", "gradient")]
    names += ["softmax_forward_ranks", "own_logits", "block_transfer", "block_transfer_gradient"]
    assert {(row["kernel"], row["dtype"], row["arch"]) for row in rows} == {
        (name, dtype, arch) for name in names for dtype in ("bf16", "fp32") for arch in SHARED_LIMIT
    }


def test_no_spills_and_within_shared_memory(rows: list[dict[str, object]]) -> None:
    for row in rows:
        assert row["stack_bytes"] == 0, row
        assert row["local_bytes"] == 0, row
        assert int(row["shared_bytes"]) <= SHARED_LIMIT[str(row["arch"])], row  # type: ignore[call-overload]
        assert 0 < int(row["registers"]) <= 255, row  # type: ignore[call-overload]


def test_tensor_cores_in_half_precision_and_exact_products_in_fp32(rows: list[dict[str, object]]) -> None:
    for row in rows:
        multiplies = row["dtype"] == "bf16" and "transfer" not in str(row["kernel"])
        expected = [TENSOR_CORES[str(row["arch"])]] if multiplies else []
        assert row["matrix_instructions"] == expected, row


def test_block_transfer_reads_and_writes_16_bytes_at_once(rows: list[dict[str, object]]) -> None:
    for row in rows:
        if "transfer" in str(row["kernel"]):
            assert int(row["wide_loads"]) > 0, row  # type: ignore[call-overload]
            assert int(row["wide_stores"]) > 0, row  # type: ignore[call-overload]


def test_every_kernel_compiles_where_an_integer_is_one(content: dict[str, list[dict[str, object]]]) -> None:
    """As it is with a single tile, row or split: the interpreter knows no such constants."""
    found = content["integers_at_1"]
    assert [row for row in found if row["fault"]] == []
    assert {"block_transfer_gradient", "add_shares", "own_logits", "softmax_forward"} <= {str(row["kernel"]) for row in found}
    constant = {(row["kernel"], name) for row in found for name in row["constants"]}  # type: ignore[attr-defined]
    assert ("softmax_forward", "tiles_per_split") in constant
    assert ("sigmoid_forward", "num_columns") in constant


def test_tf32_only_where_torch_allows_it() -> None:
    assert tiled.precision_of(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert tiled.precision_of(torch.float32) == "tf32"
        assert tiled.precision_of(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
