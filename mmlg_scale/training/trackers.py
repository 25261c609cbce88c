"""Where a run's figures go: metrics.jsonl, TensorBoard, Weights & Biases, behind one small interface. Only the first rank has any."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from mmlg_scale.errors import UserError
from mmlg_scale.files import open_append, write_text_atomic, writing
from mmlg_scale.runtime import TrackerName

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
Kind = Literal["training", "evaluation"]


class Tracker(Protocol):
    """Takes figures by step."""

    def resume_from(self, step: int) -> None:
        """Begin at `step` (0: a fresh run) and drop what an earlier process wrote beyond it, so that nothing is there twice."""
        ...

    def scalars(self, step: int, values: Mapping[str, float], *, kind: Kind) -> None:
        """Take the figures of one step, or the metrics of one evaluation."""
        ...

    def close(self) -> None:
        """Flush."""
        ...


class JsonLines:
    """FOLDER/metrics.jsonl: {"step", figures...} or {"step", "evaluation": {...}} a line; what is not finite becomes null."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"

    def resume_from(self, step: int) -> None:
        if self._path.exists():
            # A fresh run repeats its evaluation at step 0 too.
            kept = [line for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines() if 0 < step >= _step_of(line)]
            write_text_atomic(self._path, "".join(f"{line}\n" for line in kept))

    def scalars(self, step: int, values: Mapping[str, float], *, kind: Kind) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, **clean} if kind == "training" else {"step": step, "evaluation": clean}
        with writing(self._path), open_append(self._path) as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def close(self) -> None:
        pass


def _step_of(line: str) -> float:
    """The step of a line; infinity for a line that a kill cut short, which is never kept."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf


class TensorBoard:
    """FOLDER/tensorboard/."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def resume_from(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what event files of earlier processes hold from purge_step on.
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, values: Mapping[str, float], *, kind: Kind) -> None:
        assert self._writer is not None, "resume_from comes before the first step"
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is derived from `folder` and `config`: a resumed run continues its curves.

    WANDB_MODE=offline keeps it in FOLDER/wandb for `wandb sync`.

    Raises:
        UserError: the package is not installed, or the run cannot be started.
    """

    def __init__(self, folder: Path, *, name: str, project: str | None, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError('runtime.trackers: wandb is not installed. pip install "mmlg-scale[wandb]", or leave it out.') from error
        identity = hashlib.sha256(json.dumps([str(folder.resolve()), config], sort_keys=True).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project,
                id=identity,
                name=name,
                dir=str(folder),
                config=dict(config),
                resume="allow",
                save_code=False,
                settings=wandb.Settings(silent=True, disable_git=True, console="off"),
            )
        except Exception as error:  # wandb's own kinds, and those of its network libraries
            raise UserError(f"runtime.trackers: wandb does not start ({' '.join(str(error).split())}). Set WANDB_MODE=offline.") from error
        self._first = 0

    def resume_from(self, step: int) -> None:
        self._first = step

    def scalars(self, step: int, values: Mapping[str, float], *, kind: Kind) -> None:
        if 0 < self._first >= step:
            return  # an earlier process logged it
        # Under its own step: what a killed process logged beyond the resume point, the server keeps once and does not take again.
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Forgiving:
    """Another tracker, switched off and reported once where it fails: a run is worth more than its curves elsewhere."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._works = True

    def _try(self, action: Callable[[], None]) -> None:
        if self._works:
            try:
                action()
            except Exception as error:  # a full disk, a lost network: whatever the library raises
                self._works = False
                print(f"tracker {self._name} is switched off: {' '.join(str(error).split())}", file=sys.stderr, flush=True)

    def resume_from(self, step: int) -> None:
        self._try(lambda: self._tracker.resume_from(step))

    def scalars(self, step: int, values: Mapping[str, float], *, kind: Kind) -> None:
        self._try(lambda: self._tracker.scalars(step, values, kind=kind))

    def close(self) -> None:
        self._try(self._tracker.close)


def make_trackers(
    names: Sequence[TrackerName], folder: Path, *, name: str, project: str | None, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers of a run in `folder`; only metrics.jsonl may end it.

    Args:
        names: of `runtime.TrackerName`.
        name: of the run, where a tracker shows one.
        project: of Weights & Biases; None: its own default.
        config: what the run is, for the record.
    """
    found: list[Tracker] = []
    for kind in dict.fromkeys(names):
        if kind == "jsonl":
            found.append(JsonLines(folder))
        elif kind == "tensorboard":
            found.append(Forgiving(kind, TensorBoard(folder)))
        else:
            assert kind == "wandb", kind
            found.append(Forgiving(kind, WeightsAndBiases(folder, name=name, project=project, config=config)))
    return found
