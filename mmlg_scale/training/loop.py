"""The training loop: batches in, steps, evaluations, checkpoints. It knows nothing of modalities, learngenes or baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import recipe
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.errors import RunStopped
from mmlg_scale.ranks import is_first_rank, on_first_rank
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.health import Health
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.signals import Request, Requests, requeue
from mmlg_scale.training.stages import Stage, Terms
from mmlg_scale.training.step import compute_gradients, compute_loss
from mmlg_scale.training.watchdog import Watchdog

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
    skipped_steps: int = 0


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
    loss, terms = compute_gradients(stage, engine, _inputs(stage, engine, batch), step)
    training = stage.training
    engine.step(rate_factor(step, training.steps, training.optimizer.warmup_fraction), loss)
    return loss, terms


def _inputs(stage: Stage, engine: Engine, batch: Batch) -> Inputs:
    inputs = Inputs(batch.image_uint8_BCHW, batch.text_BT, samples=batch.samples_B2).to(engine.device)
    return replace(inputs, image=stage.spec.preprocess(inputs.image))


def train(
    stage: Stage,
    engine: Engine,
    *,
    batches: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[], dict[str, float]],
    checkpoints: Checkpoints,
    meters: Meters,
    requests: Requests,
    watchdog: Watchdog,
    runtime: Runtime,
    evaluate_first: bool = False,
    stop: Callable[[Curve], bool] = lambda curve: False,
    name_of: Callable[[int], str] = str,
) -> Progress:
    """Train `stage` to the end of its schedule, from its newest checkpoint where there is one.

    Args:
        batches: given a step, the endless stream of this rank's batches from that step on.
        evaluate: metrics of the present weights on the validation split.
        requests: what asks the run to save or to end on the way.
        watchdog: is told of every step, evaluation and checkpoint.
        runtime: when checkpoints are written, and what is done about steps that are not finite.
        evaluate_first: whether the curve begins at step 0.
        stop: asked after each evaluation, that before the first step included; True ends the run. The first rank's answer counts.
        name_of: a sample's key by its index.

    Raises:
        UserError: too many steps in a row were not finite, or the weights are ruined; names step, rank, samples and learning rate. Noticed
            at the next logged step at the latest, and before anything is evaluated, saved or exported.
        RunStopped: it was asked to end.
    """
    training = stage.training
    progress = _resume(engine, checkpoints, meters)

    def look() -> None:
        _evaluate(progress, stage, meters, evaluate)
        progress.stopped_early = on_first_rank(lambda: stop(progress.curve))
        watchdog.beat()

    evaluated = progress.curve[-1]["step"] if progress.curve else -1
    # Or the process before was asked to end when an evaluation was due.
    if (evaluate_first and evaluated < 0) or (_is_due(progress.step, training) and evaluated < progress.step):
        look()
    health = Health(engine, runtime.max_skipped_steps, name_of)
    keep = _Keep(stage, engine, checkpoints, meters, requests, runtime, health, progress)
    # A model that is not trained, as weights from elsewhere, needs no training data.
    stream = iter(batches(progress.step) if progress.step < training.steps and not progress.stopped_early else ())
    while progress.step < training.steps and not progress.stopped_early:
        watchdog.beat()
        keep.obey(requests.agree(progress.step))
        step = progress.step
        with meters.loader_wait():
            batch = next(stream)
        loss, terms = train_step(stage, engine, batch, step)
        student_flops, teacher_flops = (per_sample * training.batch_size for per_sample in stage.flops(step))
        progress.step += 1
        progress.flops += student_flops
        progress.teacher_flops += teacher_flops
        health.note(progress.step, batch.indices_B)
        keep.trained(batch)
        due = _is_due(progress.step, training)
        cadence = due if runtime.checkpoint_every is None else progress.step % runtime.checkpoint_every == 0
        save = cadence or progress.step == training.steps
        if due or save:
            keep.require_health()
        # On a CPU a look costs no synchronisation, and the kernels refuse a scale that is not a number.
        elif meters.is_due(progress.step) or engine.device.type == "cpu":
            health.look()
            health.require_weights(progress.step)
        figures: dict[str, Any] = {"loss": loss, **terms}
        if meters.is_due(progress.step):
            figures = _mean_over_ranks(figures)
        figures |= {"gradient_norm": engine.gradient_norm, "learning_rate": engine.learning_rate}
        meters.step(progress.step, figures, num_samples=training.batch_size, flops=student_flops + teacher_flops)

        if due:
            request = requests.agree(progress.step, now=True)  # an evaluation may take longer than a scheduler waits
            save = save or request == Request.SAVE
            if request.ends:
                keep.obey(request)
            look()
        if save:
            keep()
    checkpoints.wait()
    return progress


def _is_due(step: int, training: recipe.Training) -> bool:
    """Whether the weights after `step` steps are evaluated."""
    return step > 0 and (step % training.eval_every == 0 or step == training.steps)


def _resume(engine: Engine, checkpoints: Checkpoints, meters: Meters) -> Progress:
    progress = Progress()
    checkpoints.require_space(engine)  # before hours of training whose result could not be kept
    saved = checkpoints.load_latest(engine)
    if saved is not None:
        progress = Progress(**saved["progress"])
        meters.load_state_dict(progress.meters)
    meters.resume_from(progress.step)
    return progress


class _Keep:
    """Saves a run whose model is in good health, and ends it where that is asked for."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        checkpoints: Checkpoints,
        meters: Meters,
        requests: Requests,
        runtime: Runtime,
        health: Health,
        progress: Progress,
    ) -> None:
        self._stage, self._engine, self._checkpoints, self._meters = stage, engine, checkpoints, meters
        self._requests, self._runtime, self._health, self._progress = requests, runtime, health, progress
        self._saved_step = progress.step  # there is nothing to save before the first step
        self._healthy_step = progress.step
        self._batch: Batch | None = None

    def trained(self, batch: Batch) -> None:
        """A step has been taken on this rank's `batch`."""
        self._batch = batch

    def require_health(self) -> None:
        """Raise UserError, on every rank, where the model is ruined, be it by the update that no loss has seen yet. Collective."""
        step = self._progress.step
        if self._healthy_step == step or self._batch is None:
            return
        self._health.look()
        self._health.require_weights(step)
        with self._meters.pause():
            inputs = _inputs(self._stage, self._engine, self._batch)
            self._health.require_loss(compute_loss(self._stage, self._engine, inputs, step - 1), step)
        self._healthy_step = step

    def __call__(self) -> None:
        """Write a checkpoint, unless this step has one; in the background where the runtime says so. Collective."""
        progress = self._progress
        if self._saved_step == progress.step:
            return
        self.require_health()
        progress.skipped_steps += self._health.take_skipped()
        progress.meters = self._meters.state_dict()
        with self._meters.pause():
            self._checkpoints.save(self._engine, progress.step, {"progress": vars(progress)})
        self._saved_step = progress.step
        self._requests.saved()

    def obey(self, request: Request) -> None:
        """Save, or save and end, as asked. Collective.

        Raises:
            RunStopped: the run was asked to end.
        """
        if request == Request.SAVE:
            self()
        if not request.ends:
            return
        last = self._checkpoints.last_save_seconds()
        told = f"after step {self._progress.step}, which is saved" if self._progress.step else "before its first step"
        # Half the length again is for a disk that is busy because all jobs of a node are being ended.
        needed = (2.5 if self._checkpoints.saving else 1.5) * (last or 0.0)
        if request == Request.TERMINATE and self._saved_step != self._progress.step and needed > self._runtime.kill_wait:
            told = (
                f"after step {self._progress.step}; the last checkpoint is of step {self._saved_step}, since one takes {last:.0f} s and "
                f"runtime.kill_wait is {self._runtime.kill_wait:.0f} s"
            )
        else:
            self()
        self._checkpoints.wait()
        then = on_first_rank(requeue) if request == Request.REQUEUE else "start the same command again to resume"
        raise RunStopped(f"stopped by {request.told} {told}; {then}.", request.exit_code, speaks=is_first_rank())


def _mean_over_ranks(figures: Mapping[str, Tensor]) -> dict[str, Any]:
    """Each rank's loss is over its own pairs; the mean is the global batch's."""
    values = torch.stack([value.detach().float().reshape(()) for value in figures.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(figures, values.unbind(0), strict=True))


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
