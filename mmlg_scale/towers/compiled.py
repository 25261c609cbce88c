"""The block function, compiled by torch.compile (inductor) for the machine that it runs on.

One function is compiled for each form, width and precision, and of it one graph for each way in which a step calls it: a whole block, or
the last one of a pooled tower; with gradients, or without. It is used by every layer, so the number of layers costs nothing; a text tower's
length is a variable of the graph, an image tower's is fixed. What is around a block, as activation checkpointing, composing and ZeRO-3's
gathering, stays outside of the graph.

torch keeps what it has compiled in a cache of the user's (TORCHINDUCTOR_CACHE_DIR), which other processes and later runs read.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sysconfig
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line

BACKEND = "inductor"
"""torch.compile's backend; a test replaces it by one that compiles nothing."""
SWITCH_OFF = "or set runtime.compile to false"


class CompiledBlocks(nn.Module):
    """A module that computes blocks; `compile_blocks` has it do so by compiled functions.

    Only while it is trained, or where it is frozen, as a teacher is: evaluations come in batches of many sizes, each of which would be
    compiled.
    """

    compiled = False

    def runs_compiled(self) -> bool:
        """Whether the next forward pass is of compiled blocks."""
        return self.compiled and (self.training or not next(self.parameters()).requires_grad)


def compile_blocks(model: nn.Module) -> None:
    """Have the blocks of `model` compiled when they first run."""
    for module in model.modules():
        if isinstance(module, CompiledBlocks):
            module.compiled = True


def require_compiler(device: str) -> None:
    """Raise UserError where torch.compile does not find what it compiles with: a C++ compiler and Python's headers, and on a GPU Triton."""
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in named or ["g++", "clang++"]):
        told = f"CXX names {named[0]}, which is not there" if named else "there is neither g++ nor clang++"
        raise UserError(f"runtime.compile needs a C++ compiler, and {told}. Install one, {SWITCH_OFF}.")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise UserError(f"runtime.compile needs Python's headers, and {headers} has no Python.h. Install python3-dev, {SWITCH_OFF}.")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError(f"runtime.compile needs Triton on a GPU. pip install triton, {SWITCH_OFF}.")


def compiled_block(compute: Callable[..., Tensor], hidden_BTd: Tensor, form: Any, rows_B1: Tensor | None) -> Callable[..., Tensor]:
    """`compute` with this form and no packing, compiled: called as ``block(hidden, rows, *tensors)``; its first call compiles.

    That raises UserError where torch cannot.
    """
    if form.causal:
        torch._dynamo.mark_dynamic(hidden_BTd, 1)
    device = hidden_BTd.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTd.dtype
    return _compiled(compute, form, hidden_BTd.shape[-1], autocast, rows_B1 is not None, torch.is_grad_enabled())


@functools.cache
def _compiled(
    compute: Callable[..., Tensor], form: Any, width: int, precision: torch.dtype, pooled: bool, differentiable: bool
) -> Callable[..., Tensor]:
    def block(hidden_BTd: Tensor, rows_B1: Tensor | None, *tensors: Tensor) -> Tensor:
        return compute(hidden_BTd, form, rows_B1, None, *tensors)

    # torch keeps graphs by a function's code, of which one may have eight. Each of ours gets a code of its own, by its name.
    words = ["causal"] * form.causal + ["pooled"] * pooled + ["differentiable"] * differentiable
    name = "_".join(["block", *words, str(width), str(form.num_heads), form.activation, str(precision).removeprefix("torch.")])
    own = types.FunctionType(block.__code__.replace(co_name=name), block.__globals__, name, block.__defaults__, block.__closure__)
    made = torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)

    def run(*args: Any) -> Tensor:
        try:
            return made(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            # A run that is killed while the compiler writes leaves a part of a file, which torch does not replace.
            raise UserError(
                f"runtime.compile: torch cannot compile a block ({one_line(error.inner_exception)}). Remove its cache, {_cache()}, "
                f"which a run that was killed may have damaged, {SWITCH_OFF}."
            ) from error

    return run


def _cache() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
