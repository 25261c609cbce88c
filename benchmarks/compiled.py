"""What do the Triton kernels compile to? Needs no GPU.

    python -m benchmarks.compiled                          # every kernel for sm_80, sm_90 and sm_100
    python -m benchmarks.compiled --arch 90 --out DIR      # one architecture; JSON under DIR

Registers, stack (where spills go) and shared memory as the machine code says, and which matrix instructions it uses. Kernels are compiled
with the tiles and warps that they are launched with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from mmlg_kernels import tiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have (CUDA C++ programming guide, technical specifications per compute capability)."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MATRIX_INSTRUCTIONS = r"\b(HGMMA|WGMMA|UTC[A-Z]*MMA|TCGEN05|HMMA|QMMA|OMMA)\b"

# Arguments in order: x pointers of features, f of fp32, i an integer; out is a pointer to features.
KERNELS = {
    "softmax_forward": (tiled.softmax_forward_kernel, "xxfffiiii"),
    "softmax_gradient": (tiled.softmax_gradient_kernel, "xxfffxiiii"),
    "sigmoid_forward": (tiled.sigmoid_forward_kernel, "xxfffiiii"),
    "sigmoid_gradient": (tiled.sigmoid_gradient_kernel, "xxffxfiiii"),
}


def compile_kernel(name: str, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """Compile one kernel as it is launched, and read its machine code."""
    kernel, kinds = KERNELS[name]
    tile = tiled.tile_for(dtype, forward=name.endswith("forward"))
    types = {"x": f"*{DTYPES[dtype]}", "f": "*fp32", "i": "i32"}
    names = kernel.arg_names
    constants = {"BM": tile.rows, "BN": tile.columns, "BD": tile.depth, "PRECISION": "ieee"}
    signature = {argument: types[kind] for argument, kind in zip(names, kinds, strict=False)} | dict.fromkeys(constants, "constexpr")
    assert list(signature) == list(names), f"{name}: {names}"
    # Features lie at addresses that are multiples of 16, as torch allocates them; the width is one in every real model.
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(kinds) if kind != "i" or names[index] in ("width", "num_columns")
    }
    source = ASTSource(kernel, signature, constexprs={(names.index(key),): value for key, value in constants.items()}, attrs=aligned)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": name,
        "dtype": DTYPES[dtype],
        "arch": f"sm_{arch}",
        "tile": [tile.rows, tile.columns, tile.depth],
        "num_warps": tile.num_warps,
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "local_bytes": found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": sorted(set(re.findall(MATRIX_INSTRUCTIONS, code))),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.[A-Z0-9.]*128\b", code)) + len(re.findall(r"\bLDGSTS[A-Z0-9.]*\.128\b", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES.values()), default=list(DTYPES.values()))
    parser.add_argument("--out", type=Path, default=None, help="folder for compiled.json")
    args = parser.parse_args()
    dtypes = [dtype for dtype, name in DTYPES.items() if name in args.dtype]
    rows = [compile_kernel(name, dtype, arch) for arch in args.arch for name in KERNELS for dtype in dtypes]
    print("| kernel | dtype | arch | registers | stack | shared | matrix instructions |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['kernel']} | {row['dtype']} | {row['arch']} | {row['registers']} | {row['stack_bytes']} "
            f"| {row['shared_bytes'] / 1024:.0f} KiB | {', '.join(row['matrix_instructions']) or 'none'} |"
        )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"triton": triton.__version__, "note": "compiled ahead of time, not run on a GPU", "rows": rows}
        (args.out / "compiled.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
