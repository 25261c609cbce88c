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
    """How far a run is: everything besides the engine's tensors that a resumed run needs."""

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
        UserError: the loss or the weights are no longer finite numbers; names step, rank and learning rate. Noticed at the next logged
            step at the latest, and before anything is evaluated, saved or exported.
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

    health = _Health(engine)
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
        due = progress.step % training.eval_every == 0 or progress.step == training.steps
        save = due if checkpoint_every is None else progress.step % checkpoint_every == 0 or progress.step == training.steps
        health.note(loss, progress.step)
        # On a CPU a look costs no synchronisation, and the kernels refuse a scale that is not a number.
        if due or save or meters.is_due(progress.step) or engine.device.type == "cpu":
            health.check(progress.step)
        figures: dict[str, Any] = {"loss": loss, **terms}
        if meters.is_due(progress.step):
            figures = _mean_over_ranks(figures)
        figures |= {"gradient_norm": engine.gradient_norm, "learning_rate": engine.learning_rate}
        meters.step(progress.step, figures, num_samples=training.batch_size, flops=student_flops + teacher_flops)

        if due:
            _evaluate(progress, stage, meters, evaluate)
            progress.stopped_early = stop(progress.curve)
        if save:
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


class _Health:
    """Whether a run has diverged. What each step found stays on the device until it is looked at, which costs a synchronisation."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lost_at = torch.zeros((), dtype=torch.int64, device=engine.device)  # the first step whose loss was not finite; 0: none

    def note(self, loss: Tensor, step: int) -> None:
        """Take this rank's loss of `step`."""
        self._lost_at = torch.where((self._lost_at == 0) & ~loss.isfinite().all(), step, self._lost_at)

    def check(self, step: int) -> None:
        """Raise UserError on every rank where any rank's loss was not finite so far, or its weights are not. Collective."""
        lost_RK = torch.zeros(dist.get_world_size(), 2, dtype=torch.int64, device=self._engine.device)
        lost_RK[dist.get_rank()] = torch.stack([self._lost_at, (~self._engine.is_finite()).long()])
        dist.all_reduce(lost_RK)
        losses, weights = lost_RK.T.tolist()
        if not any(losses) and not any(weights):
            return
        what, ranks = "weights are", [rank for rank, lost in enumerate(weights) if lost]
        if any(losses):
            what, step = "loss is", min(filter(None, losses))
            ranks = [rank for rank, lost in enumerate(losses) if lost == step]
        told = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        raise UserError(
            f"training diverged: the {what} not finite after step {step} on {told}, at learning rate {self._engine.learning_rate:.2g}. "
            "Lower optimizer.learning_rate, or raise optimizer.warmup_fraction. The last checkpoint is from before."
        )


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
