"""One step's gradients: whole batches or micro-batches, one student or several, one teacher pass for all of them.

A contrastive loss compares every pair of the global batch, so micro-batches cannot be summed one by one. With accumulation, features and
hidden states of all micro-batches are computed first without graph; the loss on the whole of them gives their gradients; then each
micro-batch is computed again, with graph, and those gradients are passed on (GradCache: Gao et al. 2021, section 3). What is kept for the
whole batch is a model's outputs, never its activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.stages import Stage, Terms

Outputs = dict[str, Any]
_PER_BATCH = ("logit_scale", "logit_bias")  # every other output has a row for each image or caption


def compute_gradients(stage: Stage, engine: Engine, inputs: Inputs, step: int) -> tuple[Tensor, Terms]:
    """Leave the step's gradients in `engine`; return the mean loss of the step's students, its terms and the logit scale, detached.

    The result does not depend on `training.accumulation`: every sum over the batch is taken over the whole of it.

    Args:
        inputs: this rank's part of the batch, on the engine's device; ranks hold consecutive images. Patch dropout is drawn here.

    Raises:
        UserError: the part cannot be cut into the recipe's number of micro-batches.
    """
    num_rows, parts = len(inputs), stage.training.accumulation
    if num_rows % parts:
        raise UserError(f"recipe key accumulation: {parts} does not divide the {num_rows} pairs of a rank. Change it or batch_size.")
    inputs = replace(inputs, patches=stage.patches(step, dist.get_rank() * num_rows, num_rows)).to(engine.device)
    micro_batches = inputs.split(num_rows // parts)
    found = [stage.targets(engine.autocast, micro_batch) for micro_batch in micro_batches]
    targets = _join([part for part in found if part is not None]) if found[0] is not None else None
    students = stage.students(step)
    results = []
    with engine.accumulate() if len(students) * parts > 1 else nullcontext():
        for student in students:
            compute = _direct if parts == 1 else _cached
            loss, terms, outputs = compute(stage, engine, micro_batches, targets, inputs.text, student, 1 / len(students))
            results.append((loss, terms))
            targets = stage.next_targets(targets, outputs)
            del outputs  # not beside the next student's
    names = dict.fromkeys(name for _, terms in results for name in terms)
    means = {name: torch.stack([terms[name] for _, terms in results if name in terms]).mean() for name in names}
    return torch.stack([loss for loss, _ in results]).mean(), means


@torch.no_grad()
def compute_loss(stage: Stage, engine: Engine, inputs: Inputs, step: int) -> Tensor:
    """The mean loss of the step's students on the present weights; arguments as for `compute_gradients`. Collective."""
    num_rows, model = len(inputs), engine.model
    inputs = replace(inputs, patches=stage.patches(step, dist.get_rank() * num_rows, num_rows)).to(engine.device)
    micro_batches = inputs.split(num_rows // stage.training.accumulation)
    found = [stage.targets(engine.autocast, micro_batch) for micro_batch in micro_batches]
    targets = _join([part for part in found if part is not None]) if found[0] is not None else None
    losses = []
    was_training = model.training
    model.eval()
    with engine.autocast():
        for student in stage.students(step):
            outputs = _join([model(part.image, part.text, patches=part.patches, packing=part.packing, **student) for part in micro_batches])
            losses.append(stage.objective(outputs, targets, inputs.text)[0])
            targets = stage.next_targets(targets, outputs)
    model.train(was_training)
    return torch.stack(losses).mean()


def _forward(engine: Engine, inputs: Inputs, student: Mapping[str, Any]) -> Outputs:
    return engine(inputs.image, inputs.text, patches=inputs.patches, packing=inputs.packing, **student)


def _direct(
    stage: Stage,
    engine: Engine,
    micro_batches: Sequence[Inputs],
    targets: Outputs | None,
    text_NT: Tensor,
    student: Mapping[str, Any],
    share: float,
) -> tuple[Tensor, Terms, Outputs]:
    """Gradients of `share` times one student's loss, the batch in one piece; also returns the student's outputs."""
    outputs = _forward(engine, micro_batches[0], student)
    loss, terms = stage.objective(outputs, targets, text_NT)
    engine.backward(loss * share)
    return loss.detach(), _figures(terms, outputs), outputs


def _cached(
    stage: Stage,
    engine: Engine,
    micro_batches: Sequence[Inputs],
    targets: Outputs | None,
    text_NT: Tensor,
    student: Mapping[str, Any],
    share: float,
) -> tuple[Tensor, Terms, Outputs]:
    """Gradients of `share` times one student's loss, the batch in micro-batches; also returns the student's outputs on all of it."""
    with torch.no_grad():
        whole = _join([_forward(engine, micro_batch, student) for micro_batch in micro_batches])
    for _, tensor in _tensors(whole):
        tensor.requires_grad_()
    loss, terms = stage.objective(whole, targets, text_NT)
    (loss * share).backward()
    for number, micro_batch in enumerate(micro_batches):
        outputs = _forward(engine, micro_batch, student)
        carriers = []
        for (name, output), (_, leaf) in zip(_tensors(outputs), _tensors(whole), strict=True):
            if leaf.grad is not None:
                # Of what is one number for the batch, each micro-batch has its share. All have as many images, and captions.
                parts = len(micro_batches)
                grad = leaf.grad / parts if name in _PER_BATCH else leaf.grad.chunk(parts)[number]
                carriers.append((output.float() * grad.float()).sum())
        engine.backward(torch.stack(carriers).sum())  # a number with the loss's gradients, whatever its value
    return loss.detach(), _figures(terms, whole), whole


def _figures(terms: Terms, outputs: Outputs) -> Terms:
    """What is reported of a step besides its loss."""
    return {name: term.detach() for name, term in terms.items()} | {"logit_scale": outputs["logit_scale"].detach().squeeze()}


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
