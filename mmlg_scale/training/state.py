"""A training state in a form that knows neither ranks nor ZeRO stages, so that any number of ranks at any stage resumes from it.

For every parameter, by name, its fp32 numbers and those that the optimizer keeps of it (exp_avg and exp_avg_sq, or Muon's momentum; step):

    FOLDER/rank-00002.exp_avg.safetensors     NAME@START -> consecutive numbers of the flattened parameter, from START on

Each rank writes the ranges that it owns, all at once and without a word to the others, and reads the ranges that it needs, whoever wrote
them. Nothing is gathered, so that no rank ever needs memory for more than its own share, and nothing is pickled.

The ranges are found in DeepSpeed's own book-keeping (`_hp_mapping` of ZeRO 1 and 2, `grad_position` of ZeRO 3). Its checkpoints fit only
the number of ranks and the stage that wrote them; its universal ones only the stage, by way of a conversion and of pickles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmlg_scale.errors import UserError

FP32, STEP, BUFFER = "fp32", "step", "buffer"
OptimizerState = MutableMapping[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """A range of a flattened parameter, and where a rank has it: from `offset` on in `owner`, flattened, which its optimizer steps."""

    name: str
    start: int
    count: int
    owner: Tensor
    offset: int = 0

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.name}@{self.start}"

    def of(self, tensor: Tensor) -> Tensor:
        """Its numbers in the owner, or in a tensor of the optimizer's that has the owner's shape: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]


def find_parts(engine: Any, zero_stage: int, rank: int) -> list[Part]:
    """The ranges that this rank's optimizer steps; all of everything at stage 0.

    Args:
        engine: DeepSpeed's.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer, found = engine.optimizer, []
    if zero_stage == 0:
        steps = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found = [Part(names[id(parameter)], 0, parameter.numel(), parameter) for parameter in steps]
    elif zero_stage < 3:
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                place = parameter._hp_mapping
                if place is not None:  # else it lies in other ranks' shares
                    own, there = place.lp_fragment_address, place.hp_fragment_address
                    found.append(Part(names[id(parameter)], own.start, own.numel, flat, there.start))
    else:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.ds_numel:
                group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = rank * count
                held = min(count, parameter.ds_numel - start)  # the last ranks' shares end in padding
                if held > 0:
                    found.append(Part(names[id(parameter)], start, held, optimizer.fp32_partitioned_groups_flat[group], offset))
    return found


def share_of(parts: Iterable[Part], rank: int, num_ranks: int) -> list[Part]:
    """One rank's share of ranges that every rank has."""
    found = []
    for part in parts:
        first, last = (part.count * index // num_ranks for index in (rank, rank + 1))
        if first < last:
            found.append(replace(part, start=part.start + first, count=last - first, offset=part.offset + first))
    return found


def copy_parts(parts: Sequence[Part], state: Mapping[Tensor, Mapping[str, Tensor]], rank: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The numbers of `parts`, and those of the optimizer's `state` of them, by file: (name, what it holds), copied to the CPU."""
    kinds = {kind for part in parts for kind in state.get(part.owner, ())}
    # One kind after the other: who writes each file before asking for the next has a third of the state in memory.
    for kind in (FP32, *sorted(kinds)):
        tensors = {}
        for part in parts:
            tensor = part.owner if kind == FP32 else state.get(part.owner, {}).get(kind)
            if tensor is not None:
                own = tensor.detach().reshape(1) if kind == STEP else part.of(tensor)
                tensors[part.key] = own.cpu().clone() if own.device.type == "cpu" else own.cpu()  # safetensors refuses views of one storage
        yield _file_name(rank, kind), tensors


def copy_buffers(buffers: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """What a model keeps besides its parameters, of which all ranks have the same; as `copy_parts`."""
    return _file_name(0, BUFFER), {f"{name}@0": tensor.detach().cpu().reshape(-1).clone() for name, tensor in buffers.items()}


def write_files(files: Iterable[tuple[str, Mapping[str, Tensor]]], folder: Path) -> Iterator[Path]:
    """Write the files of `copy_parts` and `copy_buffers`; yields each once it is written.

    Raises:
        OSError, safetensors' own errors: a file cannot be written; see `files.writing`.
    """
    for name, tensors in files:
        save_file(dict(tensors), folder / name)
        yield folder / name


def _file_name(rank: int, kind: str) -> str:
    return f"rank-{rank:05d}.{kind}.safetensors"


class SavedParts:
    """The ranges in a folder, whoever wrote them; a context."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Any]]] = defaultdict(list)

    def __enter__(self) -> SavedParts:
        for path in sorted(self._folder.glob("rank-*.safetensors")):
            kind, file = path.name.split(".")[1], self._stack.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118 (no dictionary)
                name, _, start = key.rpartition("@")
                values = file.get_slice(key)
                self._ranges[kind, name].append((int(start), values.get_shape()[0], values))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def has(self, kind: str, name: str) -> bool:
        """Whether there is anything of a kind of a parameter."""
        return (kind, name) in self._ranges

    def kinds(self, name: str) -> list[str]:
        """What the optimizer kept of a parameter."""
        return sorted(kind for kind, of in self._ranges if of == name and kind not in (FP32, BUFFER))

    def read(self, kind: str, part: Part, target: Tensor) -> None:
        """Copy a part's numbers of a kind to `target` [count].

        Raises:
            UserError: the folder is missing some of them.
        """
        left = part.count
        for start, count, values in self._ranges[kind, part.name]:
            first, last = max(start, part.start), min(start + count, part.start + part.count)
            if first < last:
                target[first - part.start : last - part.start].copy_(values[first - start : last - start])
                left -= last - first
        if left:
            raise UserError(f"{self._folder} is missing {left} numbers ({kind}) of {part.name}: it is a checkpoint of another model.")

    def step(self, name: str) -> float:
        """How many steps the optimizer has taken with a parameter."""
        return max(float(values[:][0]) for _, _, values in self._ranges[STEP, name])


@torch.no_grad()
def load_parts(parts: Sequence[Part], state: OptimizerState, saved: SavedParts) -> None:
    """Fill the owners of `parts`, and the optimizer's `state` of them, from what was saved."""
    state.clear()
    for part in parts:
        saved.read(FP32, part, part.of(part.owner))
        for kind in saved.kinds(part.name):
            if kind == STEP:
                # A flat owner takes one step for all its parameters; one that got no gradient so far has counted fewer at stage 0.
                before = float(state.get(part.owner, {}).get(STEP, 0))
                step = torch.tensor(max(before, saved.step(part.name)), device=part.owner.device)
                state.setdefault(part.owner, {})[STEP] = step
            else:
                values = state.setdefault(part.owner, {})
                if kind not in values:
                    values[kind] = torch.zeros_like(part.owner)
                saved.read(kind, part, part.of(values[kind]))


@torch.no_grad()
def load_buffers(buffers: Mapping[str, Tensor], saved: SavedParts) -> None:
    """Fill a model's buffers."""
    for name, tensor in buffers.items():
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        saved.read(BUFFER, Part(name, 0, tensor.numel(), tensor), flat)
        tensor.copy_(flat.view(tensor.shape))
