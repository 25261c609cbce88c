"""What a family will cost, before anything runs: `mmlg plan`.

The steps are those of `family.Plan`. FLOPs are exact, since they are counted by the same formulas as in the runs, and sizes are drawn from
the recipe's seed; a run that stops at its target costs less. Memory and time are estimates. Nothing is built but on the meta device.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import BYTES_PER_PARAMETER, forward_flops, parameter_counts, training_flops
from mmlg_scale.data.corpus import pairs_of
from mmlg_scale.data.scenes import TRAIN_CAPTIONS, scenes_tokenizer
from mmlg_scale.data.summary import num_pairs
from mmlg_scale.family import Member, Plan, check, check_folder, num_parallel, standing
from mmlg_scale.hardware import Hardware
from mmlg_scale.learngene.file import tensor_bytes
from mmlg_scale.learngene.structure import TOWERS, Structure
from mmlg_scale.memory import activation_bytes, backward_bytes, checkpoint_bytes, compared_bytes, loss_bytes, peak_bytes
from mmlg_scale.report import NAMES, seconds, si
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.folder import has_work, result_of
from mmlg_scale.training.learngene_roles import ExtractionRole, PretrainingRole
from mmlg_scale.training.meters import measure_peak_flops
from mmlg_scale.training.roles import AncestorRole, DescendantRole, fresh_spec
from mmlg_scale.training.sizes import SizeDraw, compared_depths, pooled_towers
from mmlg_scale.training.teacher_pool import pool_bytes

_NAMES: Mapping[str, str] = {str(init): name for init, name in NAMES.items()}


@dataclass(frozen=True)
class StepCost:
    """What a step does and takes.

    Attributes:
        params: parameters of what the step exports.
        steps, batch_size: of the whole schedule.
        flops, teacher_flops: of the whole schedule.
        memory: bytes on each rank at the fullest moment of a step: weights, optimizer, gradients, buffers, activations, loss, ancestor
            (frozen), composed layers.
        export_bytes: what stays on disk.
        checkpoint_bytes: what its checkpoints, and the ancestor's outputs for a teacher_pool, take besides while it runs.
    """

    trains: str
    params: int = 0
    steps: int = 0
    batch_size: int = 0
    flops: int = 0
    teacher_flops: int = 0
    memory: Mapping[str, float] | None = None
    export_bytes: int = 0
    checkpoint_bytes: int = 0

    @property
    def memory_bytes(self) -> float:
        """Of one rank, all in all."""
        return sum(self.memory.values()) if self.memory is not None else 0.0


@dataclass(frozen=True)
class StepForecast:
    """A step of the family.

    Attributes:
        state: new, kept (complete), resumes (from a checkpoint), or again (the recipe has changed).
        done: steps in the checkpoint that it resumes from; all of them where it is kept.
        seconds: an estimate of what is left.
        ranks: on which it runs.
    """

    id: str
    needs: tuple[str, ...]
    state: str
    done: int
    cost: StepCost
    seconds: float
    ranks: int = 1

    @property
    def device_hours(self) -> float:
        """Hours of all its ranks together."""
        return self.seconds * self.ranks / 3600


@dataclass(frozen=True)
class Forecast:
    """The steps and what they sum up to.

    Attributes:
        peak_flops: FLOP/s of one device.
        seconds: an estimate until everything is complete, `parallel` steps side by side.
    """

    steps: tuple[StepForecast, ...]
    peak_flops: float
    mfu: float
    ranks: int
    parallel: int
    seconds: float
    hardware: Hardware | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain nested dictionaries, with totals."""
        costs = [step.cost for step in self.steps]
        totals = {
            "flops": sum(cost.flops for cost in costs),
            "teacher_flops": sum(cost.teacher_flops for cost in costs),
            "export_bytes": sum(cost.export_bytes for cost in costs),
            "checkpoint_bytes": max(cost.checkpoint_bytes for cost in costs) * self.parallel,
            "memory_bytes_per_rank": max(cost.memory_bytes for cost in costs),
            "seconds": self.seconds,
            "device_hours": sum(step.device_hours for step in self.steps),
        }
        steps = [
            {**asdict(step), **asdict(step.cost), "memory_bytes": step.cost.memory_bytes, "device_hours": step.device_hours}
            for step in self.steps
        ]
        for step in steps:
            del step["cost"]
        assumed = {key: getattr(self, key) for key in ("peak_flops", "mfu", "ranks", "parallel")}
        if self.hardware is not None:
            assumed["hardware"] = asdict(self.hardware)
        return {"steps": steps, "totals": totals, "assumed": assumed}


def forecast(
    settings: recipe.Recipe,
    runtime: Runtime,
    out: Path | None,
    *,
    peak_flops: float | None = None,
    mfu: float,
    hardware: Hardware | None = None,
) -> Forecast:
    """The steps of `mmlg family` with their costs.

    Args:
        out: the family's folder, in which finished steps are found; None: a new one.
        peak_flops: FLOP/s of one device; None: that of this machine.
        mfu: the fraction of it that training is taken to reach.
        hardware: GPUs of a cluster instead: of their peak and MFU, on as many ranks as there are; one step at a time unless the runtime
            says otherwise.

    Raises:
        UserError: whatever `mmlg family` would refuse before its first step.
    """
    if hardware is not None:
        runtime = replace(runtime, num_processes=hardware.ranks, parallel=runtime.parallel or 1)
        peak_flops = hardware.peak_flops
    folder = (out if out is not None else Path("runs/plan")).absolute()
    config = check(settings, runtime, folder)
    if out is not None and folder.exists():
        check_folder(settings, folder)
    plan = Plan(settings, runtime, folder, image_size=towers.image_size(config))
    costs = _Costs(plan, _with_vocabulary(settings, config))
    if peak_flops is None:
        torch.set_num_threads(runtime.threads or max(1, len(os.sched_getaffinity(0)) // runtime.num_processes))
        peak_flops = measure_peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kept: set[str] = set()
    steps = []
    for member in plan.members:
        cost, (state, done) = costs.of(member), _state(member, plan, kept) if out is not None else ("new", 0)
        if state == "kept":
            kept.add(member.step.id)
            done = cost.steps
        left = 0.0 if state == "kept" else 1 - done / max(1, cost.steps)
        ranks = member.step.resources.num_processes
        reached = mfu if hardware is None else hardware.mfu[_kind(member)]
        spent = left * (cost.flops + cost.teacher_flops) / (peak_flops * reached * ranks)
        steps.append(StepForecast(member.step.id, member.step.needs, state, done, cost, spent, ranks))
    parallel = num_parallel(runtime)
    return Forecast(tuple(steps), peak_flops, mfu, runtime.num_processes, parallel, _until_the_end(steps, parallel), hardware)


def _kind(member: Member) -> str:
    """Whose MFU a step is taken to have, of `hardware.KINDS`."""
    if isinstance(member.role, ExtractionRole | PretrainingRole):
        return "extraction"
    return "descendant" if isinstance(member.role, DescendantRole) else "ancestor"


def _with_vocabulary(settings: recipe.Recipe, config: dict[str, Any]) -> dict[str, Any]:
    """The ancestor's configuration with the vocabulary that it will have."""
    if "vocab_size" in config["text_cfg"]:
        return config
    if settings.model.weights is not None:
        return towers.load_ancestor(Path(settings.model.weights), config).spec.config
    if settings.data.is_given:
        return fresh_spec(settings, pairs_of(settings.data)).config
    tokenizer: towers.Tokenizer = scenes_tokenizer() if settings.data.tokenizer == "auto" else towers.BytePairTokenizer()
    return {**config, "text_cfg": {**config["text_cfg"], "vocab_size": tokenizer.vocab_size}}


def _state(member: Member, plan: Plan, kept: set[str]) -> tuple[str, int]:
    """The state of a step, and the last step of its newest checkpoint."""
    folder = member.step.folder
    if not set(member.step.needs) <= kept:
        return "new", 0  # what it reads will be another
    differing = standing(member, plan)
    if differing is None or (differing and not has_work(folder)):
        return "new", 0
    if differing:
        return "again", 0
    if member.identity is None or result_of(folder) is not None:
        return "kept", 0
    saved = Checkpoints(folder).steps()
    return ("resumes", saved[-1]) if saved else ("new", 0)


def _until_the_end(steps: Sequence[StepForecast], parallel: int) -> float:
    """Seconds until every step is complete, at most `parallel` side by side, each as soon as what it needs is there."""
    ends = {step.id: 0.0 for step in steps if step.state == "kept"}
    waiting = [step for step in steps if step.state != "kept"]
    running: dict[str, float] = {}
    now = 0.0
    while waiting or running:
        for step in [step for step in waiting if set(step.needs) <= set(ends)][: parallel - len(running)]:
            waiting.remove(step)
            running[step.id] = now + step.seconds
        first = min(running, key=lambda identifier: running[identifier])
        now = ends[first] = running.pop(first)
    return now


class _Costs:
    """What the members of a plan cost."""

    def __init__(self, plan: Plan, config: dict[str, Any]) -> None:
        self.plan, self.config, self.settings, self.runtime = plan, config, plan.settings, plan.runtime
        self.bf16, self.captions = self.settings.engine.precision == "bf16", self.settings.data.captions_per_image
        self._params = functools.cache(
            lambda sizes: parameter_counts(towers.build_meta(towers.with_sizes(config, **dict(sizes))).state_dict())
        )

    def of(self, member: Member) -> StepCost:
        """What a step does and takes."""
        role = member.role
        if isinstance(role, ExtractionRole):
            return self._elastic(_NAMES[role.method], role.extraction, role.extraction.loss, keeps=self.settings.reuses_teacher_pool)
        if isinstance(role, PretrainingRole):
            name = _NAMES["direct"] if role.method is None else f"{_NAMES[role.method]}, continued on pairs"
            return self._elastic(name, role.pretraining, None)
        if isinstance(role, AncestorRole):
            if self.settings.model.weights is not None:
                return StepCost(f"{self._sizes(self.config)} (its weights are given)", **self._export(self.params({})))
            return self._clip(self._sizes(self.config), {}, self.settings.ancestor, None)
        if isinstance(role, DescendantRole):
            return self._descendant(role)
        return self._features() if member.step.id == "features" else StepCost("writes the procedural scenes")

    def params(self, sizes: Mapping[str, int | None]) -> int:
        """Parameters of a CLIP of these sizes."""
        return int(self._params(tuple(sorted(sizes.items())))["total"])

    def _sizes(self, config: Mapping[str, Any], modality: str = "both") -> str:
        """Depths, and widths where they are not the ancestor's, in words."""
        present = TOWERS if modality == "both" else (modality,)
        layers = " + ".join(str(towers.num_layers(config, tower)) for tower in present)
        widths = [towers.width(config, tower) for tower in present]
        if config is not self.config and widths == [towers.width(self.config, tower) for tower in present]:
            return f"{layers} layers"
        return f"{layers} layers, width {' + '.join(map(str, widths))}"

    @staticmethod
    def _export(params: int) -> dict[str, Any]:
        return {"params": params, "export_bytes": BYTES_PER_PARAMETER * params}

    def _descendant(self, role: DescendantRole) -> StepCost:
        sizes = role.size.sizes()
        told = f"{_NAMES[role.init]}, {self._sizes(towers.with_sizes(self.config, **sizes), role.size.modality)}"
        if role.size.modality == "both":
            return self._clip(told, sizes, role.training, role.weights, reuses=role.reuses_teacher_pool)
        counts = self._params(tuple(sorted(sizes.items())))
        params = counts[f"{role.size.modality}_blocks"] + counts[f"{role.size.modality}_stem"]
        return StepCost(f"{told} (not trained)", **self._export(params))

    def _clip(
        self,
        told: str,
        sizes: Mapping[str, int | None],
        training: recipe.Training,
        weights: recipe.DistillationLoss | None,
        *,
        reuses: bool = False,
    ) -> StepCost:
        """A plain CLIP, with the ancestor as teacher where `weights` say what is compared; `reuses`: with outputs that were kept of it."""
        config, params = towers.with_sizes(self.config, **sizes), self.params(sizes)
        samples = training.steps * training.batch_size
        maps = _map_params(config, self.config) if weights is not None and weights.hidden else 0
        return StepCost(
            told,
            steps=training.steps,
            batch_size=training.batch_size,
            flops=samples * training_flops(config, captions=self.captions, pooled=pooled_towers(config, compared_depths(weights))),
            teacher_flops=0 if reuses else self._teacher_flops(weights, training),
            memory=self._memory(params + maps, config, training, weights, params, has_ancestor=not reuses) if training.steps else None,
            checkpoint_bytes=self._while_it_runs(params + maps, training, None if reuses else weights) if training.steps else 0,
            **self._export(params),
        )

    def _elastic(self, name: str, settings: recipe.Elastic, loss: recipe.DistillationLoss | None, *, keeps: bool = False) -> StepCost:
        """A learngene's training, compared with the ancestor where there is a `loss`; `keeps`: whose outputs for a pool stay on disk."""
        training = settings.training
        structure = Structure(self.config, **{key: getattr(settings, key) for key in Structure.SETTINGS})
        params = sum(torch.Size(shape).numel() for shape in structure.shapes().values())
        trained = params + (_map_params(self.config, self.config) if loss is not None and loss.hidden else 0)
        draw = SizeDraw(settings, self.config, self.settings.seed)
        deepest = towers.with_sizes(self.config, **{f"{tower}_layers": most for tower, most in draw.max_layers.items()})
        memory = self._memory(trained, deepest, training, loss, 0, accumulates=settings.students_per_step > 1)
        matrices = {tower: structure.layout(tower).matrix_size for tower in TOWERS}
        one_layer = self.runtime.compose_per_layer and self.runtime.activation_checkpointing and settings.basis == "knots"
        layers = dict.fromkeys(TOWERS, 1) if one_layer else draw.max_layers
        memory["composed layers"] = (2 if self.bf16 else 4) * sum(layers[tower] * matrices[tower] for tower in TOWERS)
        blocks = f"{settings.num_multimodal} shared, {settings.num_unimodal} a tower"
        if settings.embedding_rank is not None:
            blocks += f"; embedding of rank {settings.embedding_rank}"
        kept = pool_bytes(self.config, loss, training, keeps=True) if keeps and loss is not None else 0
        return StepCost(
            f"{name}'s blocks: {blocks}",
            steps=training.steps,
            batch_size=training.batch_size,
            flops=training.batch_size * draw.total_flops(training.steps, self.captions),
            teacher_flops=self._teacher_flops(loss, training),
            memory=memory,
            checkpoint_bytes=self._while_it_runs(trained, training, None if keeps else loss),
            params=params,
            export_bytes=tensor_bytes(structure, settings.file_dtype) + kept,
        )

    def _features(self) -> StepCost:
        """The ancestor's pass over the training split."""
        if not self.plan.given.data.is_given:
            images = self.settings.data.scenes.num_train
            captions = TRAIN_CAPTIONS * images
        else:
            parts = pairs_of(self.settings.data).training()
            counts = [num_pairs(part.folder, part.store, first_shard=part.store is not None, rule=part.rule) for part in parts]
            images, captions = (sum(of) for of in zip(*counts, strict=True))
        flops = forward_flops(self.config, pooled=TOWERS)
        return StepCost(
            f"the ancestor's features of {images:,} images and {captions:,} captions",
            flops=images * flops["image"] + captions * flops["text"],
            memory={"ancestor": float(BYTES_PER_PARAMETER * self.params({}))},
            export_bytes=BYTES_PER_PARAMETER * (images + captions) * int(self.config["embed_dim"]),
        )

    def _teacher_flops(self, loss: recipe.DistillationLoss | None, training: recipe.Training) -> int:
        """Of a schedule, where there is something to compare: of each pair of a pool once; features that are kept cost their one pass."""
        if loss is None or self.settings.engine.keep_features:
            return 0
        samples = training.steps * training.batch_size
        if loss.teacher_pool is not None:
            samples = min(samples, loss.teacher_pool)
        pooled = pooled_towers(self.config, compared_depths(loss))
        return samples * forward_flops(self.config, captions=self.captions, pooled=pooled)["total"]

    def _while_it_runs(self, params: int, training: recipe.Training, loss: recipe.DistillationLoss | None) -> int:
        """The checkpoints that are kept, the one being written, and the ancestor's outputs for a pool."""
        kept = training.steps // self.runtime.keep_every if self.runtime.keep_every is not None else 0
        checkpoints = (self.runtime.keep_last + 1 + kept) * checkpoint_bytes(params)
        return checkpoints + (pool_bytes(self.config, loss, training) if loss is not None else 0)

    def _memory(
        self,
        params: int,
        config: Mapping[str, Any],
        training: recipe.Training,
        compared: recipe.DistillationLoss | None,
        num_cast: int,
        *,
        accumulates: bool = False,
        has_ancestor: bool = True,
    ) -> dict[str, float]:
        """Bytes by kind at a step's fullest moment; `num_cast` of the parameters are copied to bf16 where autocast runs."""
        runtime, ranks = self.runtime, self.runtime.num_processes
        with_ancestor = compared is not None and has_ancestor and not self.settings.engine.keep_features
        batch = training.batch_size / ranks
        rows = batch / training.accumulation
        checkpointing, captions = runtime.activation_checkpointing, self.captions
        pooled = pooled_towers(config, compared_depths(compared))
        per_sample = activation_bytes(config, bf16=self.bf16, checkpointing=checkpointing, captions=captions, pooled=pooled)
        per_sample += backward_bytes(config, bf16=self.bf16, captions=captions)
        if compared is not None and compared.hidden:
            per_sample += compared_bytes(self.config, len(compared.hidden_depths), captions=captions)
        found = peak_bytes(
            params,
            zero_stage=runtime.zero_stage,
            ranks=ranks,
            activations=rows * per_sample + (2 * num_cast if self.bf16 else 0),
            bucket_size=runtime.bucket_size,
            overlap=runtime.overlap,
            bf16_communication=self.settings.engine.communication == "bf16",
            accumulates=accumulates or training.accumulation > 1,
        )
        if with_ancestor:
            found["ancestor"] = BYTES_PER_PARAMETER * self.params({}) / (ranks if runtime.shard_ancestor else 1)
        if found["activations"]:
            found["loss"] = loss_bytes(training.batch_size, int(self.config["embed_dim"]), teacher=compared is not None, captions=captions)
        return found


def _map_params(config: Mapping[str, Any], teacher: Mapping[str, Any]) -> int:
    """Of the maps between hidden states, which are trained beside the model and thrown away."""
    return sum(towers.width(config, tower) * towers.width(teacher, tower) for tower in TOWERS)


def print_forecast(found: Forecast, *, as_json: bool) -> None:
    """Print a table, or one JSON object."""
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(_table(found))
    for line in _told(found):
        console.print(line, highlight=False)


def _told(found: Forecast) -> list[str]:
    """What is said below the table."""
    totals = found.to_json()["totals"]
    flops = totals["flops"] + totals["teacher_flops"]
    kept = sum(step.state == "kept" for step in found.steps)
    lines = [
        f"{len(found.steps)} steps, {f'{kept} of them complete, ' if kept else ''}{si(flops)}FLOP in all; "
        f"at most {_bytes(totals['memory_bytes_per_rank'])} of memory a rank (estimate, tensors only).",
        f"Disk: {_bytes(totals['export_bytes'])} of results, and up to {_bytes(totals['checkpoint_bytes'])} while it runs "
        "(checkpoints, teacher pools).",
    ]
    side = f"{_count(found.parallel, 'step')} at a time, {_count(found.ranks, 'rank')} each"
    left_out = "Not counted: reading data, evaluation, start-up."
    if found.hardware is None:
        peak = f"{found.mfu:.0%} of {si(found.peak_flops)}FLOP/s a rank (--mfu, --flops-per-second)"
        lines.append(f"Time: about {seconds(found.seconds)} (estimate): {side}, {peak}. {left_out}")
    else:
        hours = f"{totals['device_hours']:,.1f} GPU-hours (estimate)"
        lines.append(f"Time: about {seconds(found.seconds)}, {hours}: {side}, on {found.hardware.device}. {left_out}")
        lines += [note[:1].upper() + note[1:] for note in found.hardware.notes]
        room, most = found.hardware.memory_bytes, totals["memory_bytes_per_rank"]
        if room is not None and most > 0.9 * room:
            wants = ", ".join(step.id for step in found.steps if step.cost.memory_bytes > 0.9 * room)
            lines.append(
                f"Memory: {wants} would take more than nine tenths of a GPU's {_bytes(room)}. Use more accumulation, "
                "runtime.activation_checkpointing or a higher runtime.zero_stage."
            )
        lines.append("Units: kB, MB, GB, TB are powers of 1000. Memory estimates are of tensors; a CUDA context takes about 0.5 GB more.")
    lines.append(
        "FLOPs are of whole schedules. A run that reaches its target earlier stops there; captions are cut to the longest of a batch."
    )
    return lines


def _table(found: Forecast) -> Table:
    table = Table()
    hours = ("GPU-hours",) if found.hardware is not None else ()
    for column in ("step", "needs", "what", "parameters", "steps × batch", "FLOPs", "teacher FLOPs", "memory", "disk", "time", *hours):
        table.add_column(column, justify="left" if column in ("step", "needs", "what") else "right", overflow="fold")
    for step in found.steps:
        cost = step.cost
        left = seconds(step.seconds) if step.seconds else ""
        left = {"kept": "kept", "again": f"{left}, again", "resumes": f"{left}, from step {step.done}"}.get(step.state, left)
        table.add_row(
            step.id,
            ", ".join(step.needs),
            cost.trains,
            si(cost.params) if cost.params else "",
            f"{cost.steps:,} × {cost.batch_size:,}" if cost.steps else "",
            si(cost.flops) if cost.flops else "",
            si(cost.teacher_flops) if cost.teacher_flops else "",
            _bytes(cost.memory_bytes) if cost.memory else "",
            _bytes(cost.export_bytes) if cost.export_bytes else "",
            left,
            *([f"{step.device_hours:,.2f}" if step.seconds else ""] if hours else []),
        )
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bytes(count: float) -> str:
    """1.5e9 -> 1.5 GB."""
    return f"{si(count)}B"
