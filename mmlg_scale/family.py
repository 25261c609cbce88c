"""The family: data -> ancestor -> learngene -> descendants and baselines -> family.json and report.html, as a resumable plan.

A plan is a list of plain steps (id, argv, resources, needs, marker). A step is an `mmlg` command that resumes itself; it is complete when
its marker file stands. Running the plan again therefore repeats nothing that is complete, and a launcher that knows nothing of CLIP
can run it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmlg_launchers import Job, Launcher, LocalLauncher, Resources
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import summarise
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.evaluate import folder_features
from mmlg_scale.files import write_json_atomic, write_text_atomic
from mmlg_scale.report import console_table, retrieval_samples, write_report
from mmlg_scale.training.checkpoint import claim_run_folder

LEARNGENE_KEYS = ("params", "bytes", "block_params", "stem_params", "flops", "teacher_flops", "seconds", "metrics", "curve")


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    id: str
    argv: tuple[str, ...]
    resources: Resources
    needs: tuple[str, ...]
    marker: Path
    """The step is complete when this file stands."""
    total: int | None = None
    """Training steps, for the progress bar."""

    @property
    def folder(self) -> Path:
        """Where the step writes."""
        return self.marker.parent


def plan(settings: recipe.Recipe, out: Path, *, image_size: int) -> list[Step]:
    """The steps of a family run in `out`, in the order in which free places are given to them.

    The long chain (ancestor, extraction) stands before what can run beside it, and longer baselines before shorter ones.
    """
    file = str(out / "recipe.yaml")
    data = Path(settings.data.path) if settings.data.path is not None else out / "data"
    ancestor, learngenes = out / "ancestor", {"mmlg": out / "learngene" / "learngene.safetensors"}
    learngenes |= {method: out / method / "learngene.safetensors" for method in settings.baselines.learngenes()}
    resources = Resources(num_processes=settings.engine.num_processes)
    steps: list[Step] = []

    def add(identifier: str, command: list[str], needs: tuple[str, ...], marker: Path, total: int | None = None) -> None:
        argv = (sys.executable, "-m", "mmlg_scale", *command)
        steps.append(Step(identifier, argv, resources if total is not None else Resources(), needs, marker, total))

    def training(identifier: str, folder: Path, needs: tuple[str, ...], total: int, *options: str, command: str = "train") -> None:
        words = [command, file, "--data.path", str(data), "--out", str(folder), *options]
        add(identifier, words, (*first, *needs), folder / "result.json", total)

    first: tuple[str, ...] = ()
    if settings.data.path is None:
        scenes = settings.data.scenes
        options = [f"--image-size={image_size}", *(f"--{key}={value}" for key, value in vars(scenes).items())]
        add("data", ["data", "scenes", "--out", str(data), *options], (), data / "dataset.json")
        first = ("data",)
    training("ancestor", ancestor, (), settings.ancestor.steps)
    model: tuple[str, ...] = ("--ancestor-model", str(ancestor / "model"))
    source = "ancestor"
    if settings.engine.keep_features:
        training("features", out / "features", ("ancestor",), 0, *model, command="features")
        model, source = (*model, "--features", str(out / "features")), "features"
    training("learngene", learngenes["mmlg"].parent, (source,), settings.extraction.training.steps, *model, command="extract")
    for method, rival in settings.baselines.learngenes().items():
        folder, method_option = learngenes[method].parent, ("--method", method)
        training(method, folder, (source,), rival.training.steps, *model, *method_option, command="extract")
    for init in ("scratch", "mmlg", "distil", "even", *settings.baselines.learngenes()):
        chosen: recipe.Training | None = settings.adaptation.training if init in learngenes else getattr(settings.baselines, init)
        for size in sorted(settings.family.sizes, key=lambda size: -(size.image_layers + size.text_layers)):
            counted = size.in_sum and size.modality == "both"
            if chosen is None or (init != "mmlg" and not counted):
                continue
            folder = out / "descendants" / f"{size.name}-{init}"
            needs: tuple[str, ...] = () if init == "scratch" else ("ancestor",) if init == "even" else (source,)
            words = ["--init", init, "--modality", size.modality, *(model if needs else ())]
            words += [word for key, value in size.sizes().items() if value for word in (f"--{key.replace('_', '-')}", str(value))]
            if init in learngenes:
                words += ["--learngene", str(learngenes[init])]
                needs = ("learngene" if init == "mmlg" else init,)
            if init != "scratch" and counted and settings.baselines.scratch is not None:
                words += ["--target-of", str(out / "descendants" / f"{size.name}-scratch")]
                needs = (*needs, f"{size.name}-scratch")
            training(folder.name, folder, needs, chosen.steps, *words)
    return steps


def run_plan(steps: list[Step], launcher: Launcher, *, parallel: int, console: Console) -> None:
    """Run every incomplete step once those it needs are complete, at most `parallel` side by side.

    Raises:
        UserError: a step failed; names its log and quotes its last line. The other running steps are stopped and will resume.
    """
    waiting = [step for step in steps if not step.marker.exists()]
    done = {step.id for step in steps} - {step.id for step in waiting}
    running: dict[Step, tuple[Job, TaskID]] = {}
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        overall = bars.add_task("steps of the plan", total=len(steps), completed=len(done))
        try:
            while waiting or running:
                for step in [s for s in waiting if set(s.needs) <= done][: parallel - len(running)]:
                    waiting.remove(step)
                    job = launcher.submit(list(step.argv), step.resources, step.folder.parent / f"{step.folder.name}.launch")
                    running[step] = (job, bars.add_task(step.id, total=step.total))
                time.sleep(0.2)
                for step, (job, bar) in list(running.items()):
                    bars.update(bar, completed=_trained_steps(step))
                    if not job.state().is_final:
                        continue
                    del running[step]
                    bars.remove_task(bar)
                    if job.exit_code != 0 or not step.marker.exists():
                        raise UserError(_failure(step, job))
                    done.add(step.id)
                    bars.advance(overall)
                    console.print(f"[{len(done)}/{len(steps)}] {step.id}: complete", highlight=False)
        finally:
            for job, _ in running.values():
                job.cancel()


def _failure(step: Step, job: Job) -> str:
    logs = job.log_paths()
    lines = [line for log in logs if log.is_file() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("mmlg: error: ") if lines else "it printed nothing"
    return f"step {step.id} failed (exit code {job.exit_code}): {said} Log: {logs[0] if logs else '-'}. Start the same command to go on."


def _trained_steps(step: Step) -> int:
    """The last training step that the step's metrics file names."""
    path = step.folder / "metrics.jsonl"
    if step.total is None or not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # a line still being written
    return 0


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two family runs in one folder would write over each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another mmlg family runs in {folder}. Wait for it, or give another --out.") from error
        yield


def run_family(settings: recipe.Recipe, out: Path, *, launcher: Launcher | None = None) -> dict[str, Any]:
    """Run the whole plan in `out` and write family.json and report.html; returns the family.

    Raises:
        UserError: `out` holds another recipe's run; a step failed.
    """
    out = out.absolute()
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=130)  # a log file has no width of its own
    config = towers.model_config(settings.model.config if settings.model.config is not None else settings.model.architecture)
    with _only_one(out):
        claim_run_folder(out, {"role": "family", "recipe": settings.to_dict()})
        write_text_atomic(out / "recipe.yaml", yaml.safe_dump(settings.to_dict(), sort_keys=False))
        steps = plan(settings, out, image_size=towers.image_size(config))
        run_plan(steps, launcher or _local_launcher(), parallel=_parallel(settings), console=console)
        family = assemble(settings, out)
        write_json_atomic(out / "family.json", family)
        _draw_samples(settings, out)
        report = write_report(out)
    console.print(console_table(family))
    console.print(f"report: {report}", highlight=False)
    return family


def _local_launcher() -> LocalLauncher:
    """On the CPU, steps are forks of a process that has the heavy imports behind it; a GPU's driver does not survive a fork."""
    if torch.cuda.is_available():
        return LocalLauncher()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return LocalLauncher(preload=("mmlg_scale.training.run", "deepspeed"))


def _parallel(settings: recipe.Recipe) -> int:
    if settings.family.parallel is not None:
        return max(1, settings.family.parallel)
    if torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // settings.engine.num_processes)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (settings.engine.num_processes * (settings.engine.threads or cores)))


def assemble(settings: recipe.Recipe, out: Path) -> dict[str, Any]:
    """family.json's content from the steps' results."""

    def result(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "result.json").read_text())

    ancestor, learngene = result(out / "ancestor"), result(out / "learngene")
    entries = []
    for folder in sorted((out / "descendants").iterdir()):
        if not (folder / "result.json").is_file():
            continue
        run = result(folder)
        entries.append(
            {
                "name": folder.name,
                **{key: run[key] for key in ("image_layers", "text_layers", "image_width", "text_width", "params", "init", "seed")},
                "modality": run["size"]["modality"],
                "in_sum": run["size"]["in_sum"],
                "metrics_at_0": run["metrics_at_0"],
                "metrics_final": run["metrics"],
                "metric": settings.evaluation.metric,
                "steps": run["steps"],
                "flops": run["flops"] + run["teacher_flops"],
                "seconds": run["seconds"],
                "curve": run["curve"],
            }
        )
    family = {
        "format_version": 1,
        "metric": settings.evaluation.metric,
        "ancestor": {
            **{key: ancestor[key] for key in ("params", "flops", "seconds", "metrics", "image_layers", "text_layers", "curve")},
            "num_bytes": 4 * ancestor["params"],
        },
        "kept_features": learngene["kept_features"],
        "learngene": {key: learngene[key] for key in LEARNGENE_KEYS},
        "rival_learngenes": {
            method: {key: result(out / method)[key] for key in LEARNGENE_KEYS} for method in settings.baselines.learngenes()
        },
        "descendants": entries,
        "environment": environment(settings),
        "recipe": settings.to_dict(),
    }
    return summarise(family)


def environment(settings: recipe.Recipe) -> dict[str, Any]:
    """What the figures were measured on: processor, cores, versions. No host name."""
    from importlib.metadata import version

    packages = ("torch", "deepspeed", "open_clip_torch", "mmlg-scale")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": settings.engine.threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _draw_samples(settings: recipe.Recipe, out: Path) -> None:
    """retrieval_samples.json: what the middle descendant finds in the test split."""
    sizes = sorted((s for s in settings.family.sizes if s.modality == "both"), key=lambda s: s.image_layers + s.text_layers)
    if not sizes:
        return
    folder = out / "descendants" / f"{sizes[len(sizes) // 2].name}-mmlg" / "model"
    data = Path(settings.data.path) if settings.data.path is not None else out / "data"
    image_ND, text_MD, split = folder_features(folder, data, "test")
    samples = retrieval_samples(image_ND, text_MD, split.text_to_image_M, split.captions, split.image_png)
    write_json_atomic(out / "retrieval_samples.json", samples)
