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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from mmlg_kernels import tiled, tiled_distillation, transfer_tiles
from mmlg_kernels.tiles import Tile, tile_for
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one program may have (CUDA C++ programming guide, technical specifications per compute capability)."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MATRIX_INSTRUCTIONS = r"\b(HGMMA|WGMMA|UTC[A-Z]*MMA|TCGEN05|HMMA|QMMA|OMMA)\b"

# Arguments in order: x pointers of features, f of fp32, n of int32, t of the table of tiles, i an integer, r a real number; o a pointer to
# results, which are in bf16 for fp32 blocks. Then the constants. Integers named here are multiples of 16 in every real model.
RANKS = ("own_row_ptr", "own_column_ptr", "row_above_ptr", "column_above_ptr")
SIMILARITIES = {
    "softmax_forward": (tiled.softmax_forward_kernel, "xxfffiiiii"),
    "softmax_forward_ranks": (tiled.softmax_forward_kernel, "xxfffiiiiiffnn"),
    "own_logits": (tiled.own_logits_kernel, "xxffii"),
    "softmax_gradient": (tiled.softmax_gradient_kernel, "xxfffxiiiir"),
    "sigmoid_forward": (tiled.sigmoid_forward_kernel, "xxfffiiiii"),
    "sigmoid_gradient": (tiled.sigmoid_gradient_kernel, "xxffxfiiiir"),
    "distillation_forward": (tiled_distillation.distillation_forward_kernel, "xxxxffffffffiiiii"),
    "distillation_gradient": (tiled_distillation.distillation_gradient_kernel, "xxxxffffffxiiiiirr"),
}
TRANSFERS = {
    "block_transfer": (transfer_tiles.transfer_kernel, "tfffffo", {}),
    "block_transfer_gradient": (transfer_tiles.transfer_gradient_kernel, "tfffffofffffii", {"ADD_A": True, "ADD_B": False}),
}
MIXES = ((1, 1), (4, 4))
"""Multimodal and unimodal blocks of a layer."""
MULTIPLES = ("width", "teacher_width", "num_columns")


def compile_similarity(name: str, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """Compile a kernel over tiles of similarities as it is launched, and read its machine code."""
    kernel, kinds = SIMILARITIES[name]
    tile, constants = _tile(name, dtype), _similarity_constants(name, dtype)
    facts = {"kernel": name, "dtype": DTYPES[dtype], "arch": f"sm_{arch}", "tile": [tile.rows, tile.columns, tile.depth]}
    return facts | _compile(kernel, kinds, constants, DTYPES[dtype], arch, tile.num_warps, tile.num_stages)


def _tile(name: str, dtype: torch.dtype) -> Tile:
    return tile_for("softmax_forward_ranks" if name == "own_logits" else name, dtype)


def _similarity_constants(name: str, dtype: torch.dtype) -> dict[str, Any]:
    tile = _tile(name, dtype)
    constants = {"BM": tile.rows, "BN": tile.columns, "BD": tile.depth, "PRECISION": "ieee"}
    if name.startswith("softmax_forward"):
        counts = name == "softmax_forward_ranks"
        constants = ({} if counts else dict.fromkeys(RANKS)) | constants | {"RANKS": counts}
    return constants


def _transfer_constants(mixes: tuple[int, int], flags: Mapping[str, Any]) -> dict[str, Any]:
    tile = {"ROWS": transfer_tiles.ROWS, "COLUMNS": transfer_tiles.COLUMNS}
    return {"KA": mixes[0], "KB": mixes[1], **tile, "ALIGNED": True, **flags}


def compile_transfer(name: str, mixes: tuple[int, int], dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """Compile a kernel of block transfer, from fp32 blocks to layers of a dtype."""
    kernel, kinds, flags = TRANSFERS[name]
    constants, tile = _transfer_constants(mixes, flags), [transfer_tiles.ROWS, transfer_tiles.COLUMNS]
    facts = {"kernel": name, "dtype": DTYPES[dtype], "arch": f"sm_{arch}", "tile": tile, "blocks": sum(mixes)}
    return facts | _compile(kernel, kinds, constants, DTYPES[dtype], arch, 4, 3)


def specialised(arch: int) -> list[dict[str, Any]]:
    """Kernels as Triton compiles them where an integer is 1, which it makes a constant unless told not to: each integer alone, and all.

    Up to Triton's own intermediate code, where a constant that is used as a number of the GPU's shows; the rest does not depend on it.
    """
    found = []
    shapes = {name: (kernel, kinds, _similarity_constants(name, torch.float32)) for name, (kernel, kinds) in SIMILARITIES.items()}
    shapes |= {name: (kernel, kinds, _transfer_constants((1, 1), flags)) for name, (kernel, kinds, flags) in TRANSFERS.items()}
    shapes["add_shares"] = (transfer_tiles.add_shares_kernel, "ftfi", {"BLOCK": transfer_tiles.SHARES})
    for name, (kernel, kinds, constants) in shapes.items():
        integers = [argument for argument, kind in zip(kernel.arg_names, kinds, strict=False) if kind == "i"]
        for ones in dict.fromkeys([*((integer,) for integer in integers), tuple(integers)]):
            made = {argument for argument in ones if not kernel.params[kernel.arg_names.index(argument)].do_not_specialize}
            source = _source(kernel, kinds, constants, "fp32", made)
            try:
                _first_stage(source, arch)
                fault = None
            except triton.compiler.CompilationError as error:
                fault = str(error).strip().splitlines()[-1]
            found.append({"kernel": name, "ones": ones, "constants": sorted(made), "fault": fault})
    return found


def _first_stage(source: ASTSource, arch: int) -> Any:
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    context = triton._C.libtriton.ir.context()
    triton._C.libtriton.ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options({"num_warps": 4, "num_stages": 3})
    return source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def _source(kernel: Any, kinds: str, constants: dict[str, Any], dtype: str, ones: Collection[str] = ()) -> ASTSource:
    """A kernel with its arguments' types; those of `ones` are constants of value 1."""
    types = {"x": f"*{dtype}", "o": f"*{dtype}", "f": "*fp32", "n": "*i32", "t": "*i64", "i": "i32", "r": "fp32"}
    names = kernel.arg_names
    constants = constants | dict.fromkeys(ones, 1)
    signature = {argument: types[kind] for argument, kind in zip(names, kinds, strict=False)} | dict.fromkeys(constants, "constexpr")
    assert list(signature) == list(names), f"{names}"
    # Tensors lie at addresses that are multiples of 16, as torch allocates them.
    multiples = [name not in ones and (kind not in "ir" or name in MULTIPLES) for name, kind in zip(names, kinds, strict=False)]
    aligned = {(index,): [["tt.divisibility", 16]] for index, is_multiple in enumerate(multiples) if is_multiple}
    return ASTSource(kernel, signature, constexprs={(names.index(key),): value for key, value in constants.items()}, attrs=aligned)


def _compile(kernel: Any, kinds: str, constants: dict[str, Any], dtype: str, arch: int, num_warps: int, num_stages: int) -> dict[str, Any]:
    source, options = _source(kernel, kinds, constants, dtype), {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "num_warps": num_warps,
        "registers": found["REG"],
        "stack_bytes": found["STACK"],
        "local_bytes": found["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": sorted(set(re.findall(MATRIX_INSTRUCTIONS, code))),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.[A-Z0-9.]*128\b", code)) + len(re.findall(r"\bLDGSTS[A-Z0-9.]*\.128\b", code)),
        "wide_stores": len(re.findall(r"\bSTG\.[A-Z0-9.]*128\b", code)),
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
    rows = [compile_similarity(name, dtype, arch) for arch in args.arch for name in SIMILARITIES for dtype in dtypes]
    rows += [
        compile_transfer(name, mixes, dtype, arch)
        for arch in args.arch
        for name in TRANSFERS
        for mixes in MIXES
        for dtype in dtypes
        if dtype != torch.float16
    ]
    print("| kernel | dtype | arch | registers | stack | shared | matrix instructions |\n|---|---|---|---|---|---|---|")
    for row in rows:
        name = f"{row['kernel']} of {row['blocks']}" if "blocks" in row else row["kernel"]
        use = f"{row['registers']} | {row['stack_bytes']} | {row['shared_bytes'] / 1024:.0f} KiB"
        print(f"| {name} | {row['dtype']} | {row['arch']} | {use} | {', '.join(row['matrix_instructions']) or 'none'} |")
    ones = specialised(90)
    faults = [row for row in ones if row["fault"]]
    print(f"\n{len(ones)} combinations of integers at 1, {len(faults)} of them fail", *faults, sep="\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        content = {"triton": triton.__version__, "note": "compiled ahead of time, not run on a GPU", "rows": rows, "integers_at_1": ones}
        (args.out / "compiled.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
