"""The training loop: batches in, steps, evaluations, checkpoints. It knows nothing of modalities, learngenes or baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale.data.pipeline import Batch
from mmlg_scale.errors import UserError
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.stages import Stage, Terms
from mmlg_scale.training.step import compute_gradients

Curve = list[dict[str, Any]]


@dataclass
class Progress:
    """Where a run stands: everything besides the engine's tensors that a resumed run needs."""

    step: int = 0
    flops: int = 0
    teacher_flops: int = 0
    curve: Curve = field(default_factory=list)
    meters: dict[str, Any] = field(default_factory=dict)
    stopped_early: bool = False


def rate_factor(step: int, training_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then cosine to zero (Loshchilov & Hutter 2017, equation 5 with one cycle), as a fraction of the peak rate.

    `step` counts from 0; the first step already has a positive rate and the last one is just above zero.
    """
    warmup = max(1, round(warmup_fraction * training_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, training_steps - warmup)))


def train_step(stage: Stage, engine: Engine, batch: Batch, step: int) -> tuple[Tensor, Terms]:
    """One optimiser step on this rank's batch; returns its loss and the loss's terms, detached. Collective."""
    inputs = Inputs(batch.image_uint8_BCHW, batch.text_BT, samples=batch.samples_B2).to(engine.device)
    inputs = replace(inputs, image=stage.spec.preprocess(inputs.image))
    loss, terms = compute_gradients(stage, engine, inputs, step)
    training = stage.training
    engine.step(rate_factor(step, training.steps, training.optimizer.warmup_fraction))
    return loss, terms


def train(
    stage: Stage,
    engine: Engine,
    *,
    batches: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[], dict[str, float]],
    checkpoints: Checkpoints,
    meters: Meters,
    evaluate_first: bool = False,
    checkpoint_every: int | None = None,
    stop: Callable[[Curve], bool] = lambda curve: False,
) -> Progress:
    """Train `stage` to the end of its schedule, from its newest checkpoint where there is one.

    Args:
        batches: given a step, the endless stream of this rank's batches from that step on.
        evaluate: metrics of the present weights on the validation split.
        evaluate_first: whether the curve begins at step 0.
        checkpoint_every: steps between checkpoints; None: one after each evaluation.
        stop: asked after each evaluation, that before the first step included; True ends the run.

    Raises:
        UserError: the loss is not a number; names the rank and the step.
    """
    training = stage.training
    progress = Progress()
    checkpoints.require_space(engine)  # before hours of training whose result could not be kept
    saved = checkpoints.load_latest(engine)
    if saved is not None:
        progress = Progress(**saved["progress"])
        meters.load_state_dict(progress.meters)
    meters.resume_from(progress.step)
    if evaluate_first and not progress.curve:
        _evaluate(progress, stage, meters, evaluate)
        progress.stopped_early = stop(progress.curve)

    # A model that is not trained, as weights from elsewhere, needs no training data.
    stream = iter(batches(progress.step) if progress.step < training.steps and not progress.stopped_early else ())
    while progress.step < training.steps and not progress.stopped_early:
        step = progress.step
        with meters.loader_wait():
            batch = next(stream)
        loss, terms = train_step(stage, engine, batch, step)
        student_flops, teacher_flops = (per_sample * training.batch_size for per_sample in stage.flops(step))
        progress.step += 1
        progress.flops += student_flops
        progress.teacher_flops += teacher_flops
        figures: dict[str, Any] = {"loss": loss, **terms}
        if meters.is_due(progress.step):
            figures = _mean_over_ranks(figures)
        figures |= {"gradient_norm": engine.gradient_norm, "learning_rate": engine.learning_rate}
        meters.step(progress.step, figures, num_samples=training.batch_size, flops=student_flops + teacher_flops)

        due = progress.step % training.eval_every == 0 or progress.step == training.steps
        if due:
            _check_finite(loss, progress.step)
            _evaluate(progress, stage, meters, evaluate)
            progress.stopped_early = stop(progress.curve)
        if due if checkpoint_every is None else progress.step % checkpoint_every == 0 or progress.step == training.steps:
            _check_finite(loss, progress.step)
            progress.meters = meters.state_dict()
            with meters.pause():
                checkpoints.save(engine, progress.step, {"progress": vars(progress)})
    return progress


def _mean_over_ranks(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Each rank's loss is over its own pairs; the mean is the global batch's."""
    values = torch.stack([value.detach().float().reshape(()) for value in figures.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(figures, values.unbind(0), strict=True))


def _check_finite(loss: Tensor, step: int) -> None:
    """Stop every rank when any rank's loss is not finite: weights that went through such a step are lost."""
    bad = torch.full((dist.get_world_size(),), 0.0, device=loss.device)
    bad[dist.get_rank()] = 0.0 if torch.isfinite(loss).all() else 1.0
    dist.all_reduce(bad)
    if bad.any():
        ranks = ", ".join(str(rank) for rank in bad.nonzero().flatten().tolist())
        raise UserError(f"the loss is not finite at step {step} on rank {ranks}. Lower the learning rate; the last checkpoint is kept.")


def _evaluate(progress: Progress, stage: Stage, meters: Meters, evaluate: Callable[[], dict[str, float]]) -> None:
    seconds = meters.seconds
    with meters.pause():
        metrics = evaluate()
    point = {
        "step": progress.step,
        "samples": progress.step * stage.training.batch_size,
        "flops": progress.flops + progress.teacher_flops,
        "seconds": seconds,
        **metrics,
    }
    progress.curve.append(point)
    meters.evaluation(progress.step, metrics)
