"""Training steps of this project next to open_clip_train's: samples/s with the loader and without it, by the clock and by CPU time.

    python -m benchmarks.throughput                            # both models, one core, fp32
    python -m benchmarks.throughput --models mid --pairs 7 --out benchmarks/results
    python -m benchmarks.throughput --compile --step-alone      # ours compiled, next to ours as it is and to open_clip_train
    python -m benchmarks.throughput sweep demo --out runs/benchmark --zero-stages 0 1 2 3     (the same as `mmlg benchmark demo ...`)

Both sides train the same open_clip model from the same weights on the same shards: ours by `build_session` and `train_step`, theirs by
`open_clip_train.train.train_one_epoch` with the data pipeline of `open_clip_train.data` (both from the open_clip_torch wheel). Same batch,
precision, optimiser settings, clipping, crops, tokenizer, threads; loaders decode in the training process. Before anything is timed, the
losses of both on one batch are compared. Then windows of steps alternate, ours and theirs, each with the loader inside and over batches
that are decoded already, so that whatever else the machine does falls on both; a ratio is of two neighbouring windows. With --compile ours
is `runtime.compile`, windows of the same steps not compiled are in turn with them, and what the first steps take more than later ones is
the cost of compiling, from an empty cache.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import logging
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from mmlg_scale import recipe as recipes
from mmlg_scale import towers
from mmlg_scale.accounting import training_flops
from mmlg_scale.data.pipeline import Batch
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.data.synthetic import write_pairs
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.runtime import Runtime
from mmlg_scale.towers.library import open_clip
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.meters import measure_peak_flops
from mmlg_scale.training.session import Session, build_session

Row = dict[str, Any]
MID = Path(__file__).with_name("mid.yaml")
"""A mid-size ViT, 112 px and 77 positions."""
PREDICTED = {
    "mid": {
        "loader inside": "1.4 to 1.7",
        "step alone": "1.4 to 1.7 (products: 1.32 at 32 positions; the rest is attention without a dense mask)",
    },
    "demo": {"loader inside": "1.3 to 1.7", "step alone": "1.1 to 1.3 (nothing can be cut)"},
}
"""Ratios by CPU time, written down before the first run with captions cut; one core, fp32."""
PREDICTED_COMPILED = {
    "mid": "1.9 to 2.0 compiled, 1.85 to 1.95 without: three quarters of the time is in products, which stay as they are",
    "demo": "1.6 to 1.75 compiled, 1.45 to 1.55 without",
}
"""Of the step alone, with attention over short sequences by plain products: of demo's block of 10 ms, 2.7 were attention and become 1.5;
norms, activations, biases and copies take 2, of which compiling leaves 1."""
COMPARED = {"ours": "theirs", "ours_step": "theirs_step", "ours_loader": "theirs_loader", "plain_step": "theirs_step"}
LOSSES_AGREE = 1e-4
"""Relative difference of the two losses on one batch, above which nothing is timed (bf16: 2e-2)."""


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    name: str
    settings: recipes.Recipe
    batch_size: int
    steps: int


def make_task(name: str, data: Path, *, batch_size: int | None, steps: int | None, precision: str, num_pairs: int) -> Task:
    """`mid`, `demo` or an open_clip configuration's name; its data set is written below `data` once."""
    if name == "demo":
        folder = data / f"scenes-32-{num_pairs}"
        if not folder.exists():
            write_scenes(folder, num_train=num_pairs, num_val=16, num_test=16, samples_per_shard=500)
        settings, _ = load_recipe("demo", **{"data.path": str(folder)})
        size, count = batch_size or settings.ancestor.batch_size, steps or 8
    else:
        side = 256
        folder = data / f"photos-{side}-{num_pairs}"
        if not folder.exists():
            write_pairs(folder, num_train=num_pairs, image_size=side)
        settings, _ = load_recipe(str(MID), **{"data.path": str(folder)})
        settings.model = settings.model if name == "mid" else recipes.Model(architecture=name)
        size, count = batch_size or 64, steps or 2
    settings.data.check = "structure"  # what is read once before the first step is not measured
    settings.data.augment, settings.engine.precision = "resized_crop", precision  # type: ignore[assignment]
    optimizer = recipes.Optimizer(name="adamw", learning_rate=1e-4, weight_decay=0.1, gradient_clipping=1.0)
    settings.ancestor = replace(settings.ancestor, steps=10**6, batch_size=size, optimizer=optimizer)
    return Task(name, settings, size, count)


class Ours:
    """One side: `train_step` on the stage of `mmlg train`."""

    def __init__(self, task: Task, runtime: Runtime) -> None:
        self.session: Session = build_session(task.settings, runtime=runtime)
        self._steps = itertools.count()
        self.stream: Iterator[Batch] = iter(self.session.stream())

    def run(self, batches: Iterator[Batch] | Sequence[Batch]) -> None:
        for batch in batches:
            self.session.train_step(batch, next(self._steps))

    def run_plain(self, batches: Sequence[Batch]) -> None:
        """The same steps, not compiled."""
        blocks = [module for module in self.session.stage.model.modules() if isinstance(module, towers.CompiledBlocks)]
        for block in blocks:
            block.compiled = False
        self.run(batches)
        for block in blocks:
            block.compiled = True

    def loss(self, batch: Batch) -> float:
        """Of the weights as they are; their gradients are dropped."""
        stage, engine = self.session.stage, self.session.engine
        inputs = Inputs(batch.image_uint8_BCHW, batch.text_NT, samples=batch.samples_BS).to(engine.device)
        with torch.no_grad(), engine.autocast():
            outputs = engine.model(stage.spec.preprocess(inputs.image), inputs.text)
            return float(stage.objective(outputs, None, inputs.text)[0])


class Theirs:
    """The other side: open_clip's model under `train_one_epoch`, fed by open_clip_train's own pipeline."""

    def __init__(self, task: Task, session: Session) -> None:
        self._workers = session.runtime.num_workers
        self._task, self._device = task, session.engine.device
        training, config = task.settings.ancestor, session.stage.spec.config
        self.model = _their_model(config, session)
        self._optimizer = _their_optimizer(self.model, training.optimizer)
        self._args = argparse.Namespace(
            device=str(self._device), precision={"fp32": "fp32", "bf16": "amp_bf16"}[task.settings.engine.precision], distill=False,
            accum_freq=1, skip_scheduler=True, grad_clip_norm=training.optimizer.gradient_clipping, log_every_n_steps=10**9,
            batch_size=task.batch_size, world_size=1, rank=0, local_rank=0, horovod=False, wandb=False, save_logs=False, log_local=False,
        )  # fmt: skip
        self._loss = open_clip.ClipLoss(cache_labels=True)
        self._preprocess = session.stage.spec.preprocess
        self.stream: Iterator[Any] = iter(self._batches(session))

    def run(self, batches: Iterator[Any] | Sequence[Any]) -> None:
        from open_clip_train.train import train_one_epoch

        data = {"train": _Epoch(list(batches) if isinstance(batches, list) else batches, self._task.steps, self._task.batch_size)}
        train_one_epoch(self.model, data, self._loss, 0, self._optimizer, None, None, None, self._args)

    def loss(self, batch: tuple[Tensor, Tensor]) -> float:
        from open_clip_train.precision import get_autocast

        with torch.no_grad(), get_autocast(self._args.precision, device_type=self._device.type)():
            return float(self._loss(**self.model(*(x.to(self._device) for x in batch))))

    def prepared(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch of ours as their loader would give it: normalised fp32 images and token ids on the CPU; pinned for a GPU, as ours are."""
        made = self._preprocess(batch.image_uint8_BCHW), batch.text_NT
        return (made[0].pin_memory(), made[1].pin_memory()) if self._device.type == "cuda" else made

    def _batches(self, session: Session) -> Iterator[Any]:
        """Their loader over our shards, epoch after epoch."""
        with suppress(ImportError):
            import pandas  # noqa: F401
        sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # of which open_clip_train reads CSV files only
        from open_clip_train import data as their_data

        spec, root = session.stage.spec, Path(self._task.settings.data.path or "")
        shards = sorted((root / "train").glob("*.tar"))
        urls = str(root / "train" / f"shard-{{000000..{len(shards) - 1:06d}}}.tar")
        config, own = self._preprocess.to_config(), isinstance(spec.tokenizer, towers.FileTokenizer)
        crop = {"scale": (0.9, 1.0)}
        transform = open_clip.image_transform(
            spec.image_size, is_train=True, mean=tuple(config["mean"]), std=tuple(config["std"]), aug_cfg=crop
        )
        tokenizer: Callable[[str], Tensor] = (
            (lambda text: session.corpus.tokenize([text]))
            if own
            else open_clip.get_tokenizer("ViT-B-32", context_length=spec.context_length)
        )
        args = argparse.Namespace(
            train_data=urls, val_data=None, dataset_resampled=False, train_data_upsampling_factors=None, seed=0,
            train_num_samples=json.loads((root / "train" / "manifest.json").read_text())["num_samples"],
            batch_size=self._task.batch_size, world_size=1, workers=self._workers,
        )  # fmt: skip
        # Their pipeline is written for webdataset up to 0.2.86, which marked no ends of shards.
        if "eof_value" in inspect.signature(their_data.tar_file_expander).parameters:
            their_data.tar_file_expander = functools.partial(their_data.tar_file_expander, eof_value=None)
        random.seed(0)
        for epoch in itertools.count():
            found = their_data.get_wds_dataset(args, transform, is_train=True, epoch=epoch, tokenizer=tokenizer)
            yield from found.dataloader


class _Epoch:
    """What `train_one_epoch` wants of a data set: a number of batches, here the next ones of an endless stream."""

    def __init__(self, batches: Any, num_batches: int, batch_size: int) -> None:
        self.dataloader, self._batches = self, batches
        self.num_batches, self.num_samples = num_batches, num_batches * batch_size

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: the stream continues."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._batches), self.num_batches)


def _their_model(config: dict[str, Any], session: Session) -> torch.nn.Module:
    """open_clip's CLIP as `create_model` makes it, at our weights."""
    keys = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
    model = open_clip.CLIP(**{key: config[key] for key in keys if key in config}, output_dict=True)
    own = {name.removeprefix("clip."): tensor for name, tensor in session.engine.state_dict().items()}
    model.load_state_dict({name: tensor.reshape(model.state_dict()[name].shape) for name, tensor in own.items()})
    return model.to(session.engine.device)


def _their_optimizer(model: torch.nn.Module, settings: recipes.Optimizer) -> torch.optim.Optimizer:
    """As `open_clip_train.main` builds it, at the rate that our warm-up has."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def is_plain(name: str, parameter: Tensor) -> bool:
        return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    groups = [
        {"params": [parameter for name, parameter in named if is_plain(name, parameter)], "weight_decay": 0.0},
        {"params": [parameter for name, parameter in named if not is_plain(name, parameter)], "weight_decay": settings.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=1e-9, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)


def compare(task: Task, runtime: Runtime, pairs: int, *, step_alone: bool = False) -> Row:
    """Windows of both in turn; medians of what a step takes, and of the ratios of neighbouring windows.

    Args:
        step_alone: leave out the windows with loaders.

    Raises:
        RuntimeError: the two losses on one batch differ: not the same work.
    """
    ours = Ours(task, runtime)
    with closing(ours.session):
        return _compare(task, ours, pairs, step_alone=step_alone)


def _compare(task: Task, ours: Ours, pairs: int, *, step_alone: bool) -> Row:
    """As `compare`, of a session that the caller closes."""
    theirs = Theirs(task, ours.session)
    kept = [next(ours.stream) for _ in range(max(2, task.steps))][: task.steps]
    prepared = [theirs.prepared(batch) for batch in kept]
    losses = ours.loss(kept[0]), theirs.loss(prepared[0])
    apart = abs(losses[0] - losses[1]) / abs(losses[1])
    if apart > (LOSSES_AGREE if task.settings.engine.precision == "fp32" else 2e-2):
        raise RuntimeError(f"{task.name}: the losses on one batch are {losses[0]} and {losses[1]}: not the same model or data")
    windows: dict[str, Callable[[], None]] = {"ours_step": lambda: ours.run(kept), "theirs_step": lambda: theirs.run(prepared)}
    if not step_alone:
        windows |= {
            "ours": lambda: ours.run(itertools.islice(ours.stream, task.steps)),
            "theirs": lambda: theirs.run(theirs.stream),
            "ours_loader": lambda: _read(ours.stream, task.steps),
            "theirs_loader": lambda: _read(theirs.stream, task.steps),
        }
    first = None
    if ours.session.runtime.compile:
        first = _first_steps(ours, kept)
        windows["plain_step"] = lambda: ours.run_plain(kept)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in windows}
    for pair in range(pairs + 1):
        for name in list(windows) if pair % 2 else list(reversed(windows)):
            found = _timed(windows[name], task.steps, ours.session.engine.device)
            if pair:  # the first of each warms up
                spent[name].append(found)
    config, device = ours.session.stage.spec.config, ours.session.engine.device
    row = _row(task, spent, training_flops(config), measure_peak_flops(device)) | {"losses": losses}
    if first is not None:
        row |= _cost_of_compiling(row, first, task.steps)
    return row


def _first_steps(ours: Ours, batches: Sequence[Batch]) -> tuple[float, float]:
    """Wall and CPU seconds of the first window, compilers' included."""

    def cpu() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    started = time.perf_counter(), cpu()
    ours.run(batches)
    return time.perf_counter() - started[0], cpu() - started[1]


def _cost_of_compiling(row: Row, first: tuple[float, float], steps: int) -> Row:
    """Seconds, and the steps after which they are gained (none where compiled steps are no faster)."""
    found: Row = {}
    for clock, seconds in zip(("wall", "cpu"), first, strict=True):
        cost, gain = (
            seconds - steps * row[f"ours_step_{clock}_seconds"],
            row[f"plain_step_{clock}_seconds"] - row[f"ours_step_{clock}_seconds"],
        )
        found |= {f"compiling_{clock}_seconds": cost, f"steps_until_it_pays_{clock}": cost / gain if gain > 0 else None}
    return found


def _read(stream: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(stream, count):
        pass


def _timed(work: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of a step."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def _row(task: Task, spent: dict[str, list[tuple[float, float]]], flops_per_sample: int, peak_flops: float) -> Row:
    """Medians; MFU is by the clock, and charges both sides what the whole model costs at full length, whatever they leave out."""
    row: Row = {"model": task.name, "batch_size": task.batch_size, "steps": task.steps, "pairs": len(spent["ours_step"])}
    row["mfu_of_step"] = {
        side: flops_per_sample * task.batch_size / statistics.median(wall for wall, _ in spent[f"{side}_step"]) / peak_flops
        for side in ("ours", "theirs")
    }
    row["precision"] = task.settings.engine.precision
    for index, clock in ((0, "wall"), (1, "cpu")):
        for name, found in spent.items():
            row[f"{name}_{clock}_seconds"] = statistics.median(times[index] for times in found)
        for own_name, other_name in COMPARED.items():
            kind = own_name.removeprefix("ours")
            if own_name in spent and other_name in spent:
                pairs = zip(spent[own_name], spent[other_name], strict=True)
                ratios = [other[index] / own[index] for own, other in pairs if own[index] > 0]
                row[f"ratio{kind}_{clock}"], row[f"ratios{kind}_{clock}"] = statistics.median(ratios), ratios
    return row


def table(rows: Sequence[Row]) -> str:
    """Markdown: samples per second of CPU time, and the ratios with their ranges."""
    heads = ["model", "batch", "figure", "ours, samples per CPU s", "open_clip_train", "ratio, CPU time (range)", "ratio, clock (range)"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        told_of = {"": "loader inside", "_step": "step alone", "_loader": "loader alone", "plain_step": "step alone, not compiled"}
        for own_name, other_name in COMPARED.items():
            kind = own_name.removeprefix("ours")
            if f"ratio{kind}_cpu" not in row:
                continue
            told = told_of[kind]
            cells = [f"{row['batch_size'] / row[f'{name}_cpu_seconds']:,.1f}" for name in (own_name, other_name)]
            for clock in ("cpu", "wall"):
                ratios = row[f"ratios{kind}_{clock}"]
                cells.append(f"{row[f'ratio{kind}_{clock}']:.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
            lines.append([row["model"], str(row["batch_size"]), told, *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def profile(task: Task, runtime: Runtime, top: int = 12) -> Row:
    """Which operators the steps of each side spend their time in, as shares of it, and how many a step calls."""
    ours = Ours(task, runtime)
    with closing(ours.session):
        theirs = Theirs(task, ours.session)
        kept = [next(ours.stream) for _ in range(task.steps)]
        sides = {"ours": lambda: ours.run(kept), "theirs": lambda: theirs.run([theirs.prepared(batch) for batch in kept])}
        found: Row = {}
        for name, work in sides.items():
            work()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
                work()
            events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
            whole = sum(event.self_cpu_time_total for event in events)
            found[name] = {
                "operators_per_step": sum(event.count for event in events) / task.steps,
                "share_of_time": {event.key: event.self_cpu_time_total / whole for event in events[:top]},
            }
    return found


def main() -> int:
    if sys.argv[1:2] == ["sweep"]:
        from mmlg_scale.cli import main as mmlg

        return mmlg(["benchmark", *sys.argv[2:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mid", "demo"], metavar="NAME", help="mid, demo, or open_clip configurations")
    parser.add_argument("--pairs", type=int, default=5, help="windows of each side")
    parser.add_argument("--steps", type=int, default=None, help="steps of a window; default: 2 (demo: 8)")
    parser.add_argument("--batch-size", type=int, default=None, help="default: 64 (demo: the recipe's)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--num-pairs", type=int, default=2000, help="training pairs to generate")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of both sides")
    parser.add_argument("--compile", action="store_true", help="ours with runtime.compile, next to ours without")
    parser.add_argument("--step-alone", action="store_true", help="no windows with loaders")
    parser.add_argument("--profile", action="store_true", help="the operators that a step spends its time in, too")
    parser.add_argument("--data", type=Path, default=None, help="folder for the generated data; default: a temporary one")
    parser.add_argument("--out", type=Path, default=None, help="folder for throughput_DEVICE.json (or …_compiled.json)")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, predicted = (f"{device}_compiled", PREDICTED_COMPILED) if args.compile else (device, PREDICTED)
    report: Row = {"environment": measure.environment(device), "rows": [], "profiles": {}}
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(temporary) / "compiled")  # empty: what compiling costs is measured
        for name in args.models:
            task = make_task(
                name, args.data or Path(temporary), batch_size=args.batch_size, steps=args.steps, precision=args.precision,
                num_pairs=args.num_pairs,
            )  # fmt: skip
            # Keeping decoded images would compare a decoder with a cache.
            runtime = Runtime(num_workers=args.workers, cache_decoded=False, compile=args.compile)
            report["rows"].append(compare(task, runtime, args.pairs, step_alone=args.step_alone) | {"predicted": predicted.get(name)})
            print(table(report["rows"][-1:]), flush=True)
            if args.profile:
                report["profiles"][name] = profile(task, runtime)
            if args.out is not None:
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"throughput_{kind}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
