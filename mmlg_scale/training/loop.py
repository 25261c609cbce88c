"""The training loop: batches in, steps, evaluations, checkpoints. It knows nothing of modalities, learngenes or baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale import recipe
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.errors import RunStopped
from mmlg_scale.ranks import is_first_rank, on_first_rank, shared
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.engine import Engine
from mmlg_scale.training.health import Health
from mmlg_scale.training.inputs import inputs_of, text_length
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.signals import Request, Requests, requeue
from mmlg_scale.training.stages import Stage, Terms
from mmlg_scale.training.step import compute_gradients, compute_loss
from mmlg_scale.training.watchdog import Watchdog

Curve = list[dict[str, Any]]


class Batches(Protocol):
    """The endless stream of a rank's batches."""

    def __iter__(self) -> Iterator[Batch]: ...

    def figures(self, step: int) -> dict[str, float]:
        """What is to be noted of the data after `step` steps."""
        ...


_HALF = 2**32


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
    inputs = inputs_of(batch, stage.spec.preprocess, engine.device, text=engine.text)
    loss, terms = compute_gradients(stage, engine, inputs, step)
    training = stage.training
    engine.step(rate_factor(step, training.steps, training.optimizer.warmup_fraction), loss)
    return loss, terms


def train(
    stage: Stage,
    engine: Engine,
    *,
    batches: Callable[[int], Batches],
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
    spent = _Spent(progress, engine)
    keep = _Keep(stage, engine, checkpoints, meters, requests, runtime, health, spent)
    # A model that is not trained, as weights from elsewhere, needs no training data.
    reading = batches(progress.step) if progress.step < training.steps and not progress.stopped_early else None
    stream = iter(reading or ())
    while progress.step < training.steps and not progress.stopped_early:
        watchdog.beat()
        keep.obey(requests.agree(progress.step))
        step = progress.step
        with meters.loader_wait():
            batch = next(stream)
        loss, terms = train_step(stage, engine, batch, step)
        progress.step += 1
        spent.add(stage.flops(step, text_length(batch, engine.text), batch.captions_per_image), len(batch))
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
        if meters.is_due(progress.step) or due or save:
            spent.settle()
        figures |= {"gradient_norm": engine.gradient_norm, "learning_rate": engine.learning_rate}
        meters.step(
            progress.step, figures | _of_data(reading, meters, progress.step), num_samples=training.batch_size, flops=spent.unreported()
        )

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


def _of_data(reading: Batches | None, meters: Meters, step: int) -> dict[str, float]:
    """The data's figures, where figures are written."""
    return reading.figures(step) if reading is not None and meters.is_due(step) else {}


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


class _Spent:
    """What steps cost, summed over ranks: each cuts its captions to its own longest one, so that none knows the others' cost.

    The sums are exchanged (`settle`) where a figure or a checkpoint needs them, not in every step.
    """

    def __init__(self, progress: Progress, engine: Engine) -> None:
        self.progress, self._engine = progress, engine
        self._pending = [0, 0]  # this rank's, of students and teacher
        self._reported = progress.flops + progress.teacher_flops

    def add(self, per_sample: Sequence[int], num_samples: int) -> None:
        """One step on this rank's part of the batch."""
        self._pending = [so_far + flops * num_samples for so_far, flops in zip(self._pending, per_sample, strict=True)]

    def settle(self) -> None:
        """Add all ranks' to `progress`. Collective."""
        if any(self._pending) and dist.get_world_size() > 1:
            # In two parts, because a sum may not fit into 64 bits.
            parts = torch.tensor([divmod(flops, _HALF) for flops in self._pending], device=self._engine.device)
            dist.all_reduce(parts)
            self._pending = [high * _HALF + low for high, low in parts.tolist()]
        self.progress.flops += self._pending[0]
        self.progress.teacher_flops += self._pending[1]
        self._pending = [0, 0]

    def unreported(self) -> int:
        """All FLOPs that were settled since the last call."""
        before, self._reported = self._reported, self.progress.flops + self.progress.teacher_flops
        return self._reported - before


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
        spent: _Spent,
    ) -> None:
        self._stage, self._engine, self._checkpoints, self._meters = stage, engine, checkpoints, meters
        self._requests, self._runtime, self._health, self._spent = requests, runtime, health, spent
        self._progress = progress = spent.progress
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
            inputs = inputs_of(self._batch, self._stage.spec.preprocess, self._engine.device, text=self._engine.text)
            self._health.require_loss(compute_loss(self._stage, self._engine, inputs, step - 1), step)
        self._healthy_step = step

    def __call__(self) -> None:
        """Write a checkpoint, unless this step has one; in the background where the runtime says so. Collective."""
        progress = self._progress
        if self._saved_step == progress.step:
            return
        self.require_health()
        progress.skipped_steps += self._health.take_skipped()
        self._spent.settle()
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
        raise shared(RunStopped(f"stopped by {request.told} {told}; {then}.", request.exit_code, speaks=is_first_rank()))


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
