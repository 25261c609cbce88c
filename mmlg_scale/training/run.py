"""One run in a folder of its own: role -> session -> loop -> exported model and result.json.

result.json holds the curve (validation split), the metrics at step 0 and at the end (test split), and what the run cost.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmlg_scale import recipe
from mmlg_scale.data.corpus import Corpus, PairSet, pairs_of
from mmlg_scale.data.pipeline import TrainStream
from mmlg_scale.errors import UserError
from mmlg_scale.hardware import device_name
from mmlg_scale.metric_names import check_metric
from mmlg_scale.ranks import is_first_rank, on_first_rank
from mmlg_scale.records import write_record
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import features
from mmlg_scale.training.checkpoint import Checkpoints
from mmlg_scale.training.engine import autocast_of, ranks
from mmlg_scale.training.folder import RESULT_FILE, Incarnation, claim, hold, read_json
from mmlg_scale.training.loop import Progress, train
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.roles import Role, features_identity, load_ancestor
from mmlg_scale.training.session import Session, build_session
from mmlg_scale.training.signals import Requests
from mmlg_scale.training.teacher import LiveTeacher
from mmlg_scale.training.trackers import make_trackers
from mmlg_scale.training.watchdog import Watchdog

Result = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """One start of a run, in a folder that it holds."""

    identity: dict[str, Any]
    device: torch.device
    incarnation: Incarnation
    requests: Requests


def run_role(role: Role, out: Path, runtime: Runtime) -> Result:
    """Train a role to the end in the folder `out` and return its result; that of a complete run at once.

    Raises:
        UserError: what was given does not go together; `out` contains another run, or another process works there.
    """
    settings = role.settings
    pairs = pairs_of(settings.data)
    check_metric(settings.evaluation.metric, has_classes=pairs.classes is not None)
    role.check(pairs)
    return _in_folder(out, runtime, lambda: role.identity(pairs), lambda start: _train(role, pairs, out, runtime, start))


def write_features(settings: recipe.Recipe, ancestor: Path, out: Path, runtime: Runtime) -> Result:
    """Write the features that the ancestor gives the training split to `out`; see `features`."""
    pairs = pairs_of(settings.data)

    def work(start: Start) -> Result:
        model, device = load_ancestor(settings, ancestor, pairs), start.device
        found = features.compute_features(
            LiveTeacher(model, device),
            Corpus(pairs, model.spec).sweep(),
            out,
            autocast=functools.partial(autocast_of, settings.engine.precision, device),
            device=device,
            num_workers=runtime.num_workers,
            end_if_asked=start.requests.end_if_asked,
        )

        def finish() -> None:
            start.incarnation.check()
            write_record(out / RESULT_FILE, {"role": "features", **found})
            features.remove_blocks(out)

        on_first_rank(finish)
        if is_first_rank():
            print(f"{out}: features of {found['num_images']} images and {found['num_captions']} captions")
        return found

    return _in_folder(out, runtime, lambda: features_identity(settings, pairs, ancestor), work)


def _in_folder(
    out: Path,
    runtime: Runtime,
    identity_of: Callable[[], dict[str, Any]],
    work: Callable[[Start], Result],
) -> Result:
    """Between the ranks' start and end, and with the folder held by the first rank: claim it, and do the work where it is not done."""
    minutes = runtime.checkpoint_minutes
    with ranks(runtime) as device, ExitStack() as held, Requests(out, save_every=None if minutes is None else 60 * minutes) as requests:

        def claimed() -> tuple[dict[str, Any], Result | None, int]:
            held.enter_context(hold(out))
            identity = identity_of()
            result = claim(out, identity)
            return identity, result, Incarnation.next(out).number if result is None else 0

        identity, result, number = on_first_rank(claimed)
        if result is None:
            return work(Start(identity, device, Incarnation(out, number), requests))
        if is_first_rank():
            print(f"{out}: complete{_in_words(result)}; nothing to do.", file=sys.stderr)
        return result


def _in_words(result: Result) -> str:
    if "steps" not in result:
        return ""
    metrics = ", ".join(f"{name} {result['metrics'][name]:.3f}" for name in ("mean_recall@1", "acc1") if name in result["metrics"])
    return f": {result['steps']} steps, {metrics} (test split)"


def _train(role: Role, pairs: PairSet, out: Path, runtime: Runtime, start: Start) -> Result:
    resumes = on_first_rank(lambda: bool(Checkpoints(out).steps()))
    session = build_session(role.settings, role, runtime=runtime, pairs=pairs, resumes=resumes, folder=out)
    if is_first_rank():
        print(f"{out}: {session.stage.spec.in_words()}", file=sys.stderr)
    with closing(_meters(session, out, start)) as meters:  # the bar ends before anything else is told
        result = _train_metered(role, out, session, meters, start)
    if is_first_rank():
        print(f"{out}: complete{_in_words(result)}.", file=sys.stderr)
    return result


def _train_metered(role: Role, out: Path, session: Session, meters: Meters, start: Start) -> Result:
    runtime, stage, engine, incarnation = session.runtime, session.stage, session.engine, start.incarnation
    checkpoints = Checkpoints(
        out,
        keep_last=runtime.keep_last,
        keep_every=runtime.keep_every,
        incarnation=incarnation.number,
        check_owner=incarnation.check,
        background=runtime.background_saves,
    )
    validation, test = (session.eval_split(split) for split in ("val", "test"))
    at_start = out / "metrics_at_0.json"
    if role.evaluate_first and not on_first_rank(lambda: at_start.exists() or bool(checkpoints.steps())):
        metrics = session.evaluate(test)
        on_first_rank(lambda: write_record(at_start, metrics))
    minutes = runtime.hang_minutes
    with Watchdog(out, dist.get_rank(), None if minutes is None else 60 * minutes) as watchdog:

        def batches(step: int) -> TrainStream:
            with watchdog.paused():  # the first start checks the data
                return session.stream(step, record=out)

        try:
            progress = train(
                stage,
                engine,
                batches=batches,
                evaluate=lambda: session.evaluate(validation),
                checkpoints=checkpoints,
                meters=meters,
                requests=start.requests,
                watchdog=watchdog,
                runtime=runtime,
                evaluate_first=role.evaluate_first,
                stop=role.stop,
                name_of=session.corpus.name_of,
            )
        except UserError:
            checkpoints.settle()  # the model was in good health when it was copied
            raise
    seconds = meters.seconds
    if stage.teacher is not None:
        stage.teacher.flush()  # before the ranks meet in the evaluation: the result is written after all of them
    metrics = session.evaluate(test)
    state = engine.state_dict()
    engine.close()

    def finish() -> Result:
        result = _result(role, start.identity, progress, metrics, seconds, session)
        if at_start.exists():
            result["metrics_at_0"] = read_json(at_start)
        incarnation.check()
        result.update(stage.export(state, out))
        incarnation.check()
        if stage.teacher is not None:
            stage.teacher.forget()  # before the result, after which no start would
        write_record(out / RESULT_FILE, result)
        return result

    result = on_first_rank(finish)
    checkpoints.remove()
    return result


def _meters(session: Session, out: Path, start: Start) -> Meters:
    runtime, stage = session.runtime, session.stage
    trackers = []
    if is_first_rank():
        trackers = make_trackers(
            runtime.trackers, out, name=f"{out.parent.name}/{out.name}", project=runtime.wandb_project, config=start.identity
        )
    return Meters(
        trackers,
        stage.training.steps,
        name=stage.name,
        device=session.engine.device,
        enabled=is_first_rank(),
        log_every=runtime.log_every,
        shown=dict.fromkeys((session.settings.evaluation.metric, "mean_recall@1", "acc1")),
        check_owner=start.incarnation.check,
    )


def _result(
    role: Role, identity: dict[str, Any], progress: Progress, metrics: dict[str, float], seconds: float, session: Session
) -> Result:
    teacher = session.stage.teacher
    return {
        **{key: value for key, value in identity.items() if key not in ("recipe", "inputs")},
        "seed": role.settings.seed,
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped_steps,
        "flops": progress.flops,
        "teacher_flops": progress.teacher_flops,
        "kept_features": teacher.cost if teacher is not None else None,
        "seconds": seconds,
        "device": device_name(session.engine.device.type),
        "cores": len(os.sched_getaffinity(0)),
        "metrics": metrics,
        "metrics_at_0": None,
        "curve": progress.curve,
    }
