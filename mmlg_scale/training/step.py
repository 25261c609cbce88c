"""One step's gradients: whole batches or micro-batches, one student or several, one teacher pass for all of them.

A contrastive loss compares every pair of the global batch, so micro-batches cannot be summed as they stand. With accumulation, features and
hidden states of all micro-batches are computed first without graph; the loss on the whole of them gives their gradients; then each
micro-batch is computed again, with graph, and those gradients are passed on (GradCache: Gao et al. 2021, section 3). What is kept for the
whole batch is a model's outputs, never its activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.stages import Stage, Terms

Outputs = dict[str, Any]
_PER_BATCH = ("logit_scale", "logit_bias")  # every other output has a row for each sample


def compute_gradients(
    stage: Stage, engine: Engine, image_BCHW: Tensor, text_BT: Tensor, step: int, samples_B2: Tensor | None = None
) -> tuple[Tensor, Terms]:
    """Leave the step's gradients in `engine`; return the mean loss of the step's students and its terms, detached.

    The result does not depend on `training.accumulation`: every sum over the batch is taken over the whole of it.

    Args:
        image_BCHW, text_BT: this rank's share of the batch; ranks hold consecutive rows.
        samples_B2: its pairs' places in the training split, (sample, caption); only kept features of the ancestor need them.

    Raises:
        UserError: the share cannot be cut into the recipe's number of micro-batches.
    """
    num_rows, parts = len(text_BT), stage.training.accumulation
    if num_rows % parts:
        raise UserError(f"recipe key accumulation: {parts} does not divide the {num_rows} pairs of a rank. Change it or batch_size.")
    patches_BP = stage.patches(step, dist.get_rank() * num_rows, num_rows)
    if patches_BP is not None:
        patches_BP = patches_BP.to(image_BCHW.device, non_blocking=True)
    cut = num_rows // parts
    patches = [None] * parts if patches_BP is None else patches_BP.split(cut)
    micro_batches = list(zip(image_BCHW.split(cut), text_BT.split(cut), patches, strict=True))
    targets = _targets(stage, engine, micro_batches, [None] * parts if samples_B2 is None else samples_B2.split(cut))
    students = stage.students(step)
    results = []
    with engine.accumulate() if len(students) * parts > 1 else nullcontext():
        for student in students:
            compute = _direct if parts == 1 else _cached
            results.append(compute(stage, engine, micro_batches, targets, text_BT, student, 1 / len(students)))
    losses, terms = zip(*results, strict=True)
    return torch.stack(losses).mean(), {name: torch.stack([each[name] for each in terms]).mean() for name in terms[0]}


MicroBatch = tuple[Tensor, Tensor, Tensor | None]


def _targets(stage: Stage, engine: Engine, micro_batches: Sequence[MicroBatch], samples: Sequence[Tensor | None]) -> Outputs | None:
    parts = [stage.targets(engine.autocast, *micro_batch, which) for micro_batch, which in zip(micro_batches, samples, strict=True)]
    found = [part for part in parts if part is not None]
    return _join(found) if found else None


def _direct(
    stage: Stage,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    targets: Outputs | None,
    text_BT: Tensor,
    student: Mapping[str, Any],
    share: float,
) -> tuple[Tensor, Terms]:
    """Gradients of `share` times one student's loss, the batch in one piece."""
    ((image, text, patches),) = micro_batches
    loss, terms = stage.objective(engine(image, text, patches=patches, **student), targets, text_BT)
    engine.backward(loss * share)
    return loss.detach(), {name: term.detach() for name, term in terms.items()}


def _cached(
    stage: Stage,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    targets: Outputs | None,
    text_BT: Tensor,
    student: Mapping[str, Any],
    share: float,
) -> tuple[Tensor, Terms]:
    """Gradients of `share` times one student's loss, the batch in micro-batches."""
    with torch.no_grad():
        whole = _join([engine(image, text, patches=patches, **student) for image, text, patches in micro_batches])
    for _, tensor in _tensors(whole):
        tensor.requires_grad_()
    loss, terms = stage.objective(whole, targets, text_BT)
    (loss * share).backward()
    first = 0
    for image, text, patches in micro_batches:
        outputs = engine(image, text, patches=patches, **student)
        rows = slice(first, first + len(text))
        first += len(text)
        carriers = []
        for (name, output), (_, leaf) in zip(_tensors(outputs), _tensors(whole), strict=True):
            if leaf.grad is not None:
                # Of what is one number for the batch, each micro-batch carries its part.
                grad = leaf.grad / len(micro_batches) if name in _PER_BATCH else leaf.grad[rows]
                carriers.append((output.float() * grad.float()).sum())
        engine.backward(torch.stack(carriers).sum())  # a number with the loss's gradients, whatever its value
    return loss.detach(), {name: term.detach() for name, term in terms.items()}


def _tensors(outputs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor of a model's outputs, in a fixed order."""
    return [(name, tensor) for name, value in outputs.items() for tensor in (value if isinstance(value, list) else [value])]


def _join(parts: Sequence[Mapping[str, Any]]) -> Outputs:
    """Outputs of consecutive micro-batches as those of one batch."""

    def joined(name: str) -> Any:
        values = [part[name] for part in parts]
        if name in _PER_BATCH:
            return values[0].clone()
        if isinstance(values[0], list):
            return [torch.cat(tensors) for tensors in zip(*values, strict=True)]
        return torch.cat(values)

    return {name: joined(name) for name in parts[0]}
