"""mmlg benchmark: how fast training steps are on this machine, or on the ranks that mmlg launch started."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlg_scale.cli.parsing import make_parser, parse_recipe, required
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import BatchSize, ImageSize, Layers, PositiveInt, Processes

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mmlg_scale.recipe import Recipe
    from mmlg_scale.runtime import Runtime
    from mmlg_scale.throughput import Cell, Row

ROLES, PRECISIONS, STAGES, KINDS = ("ancestor", "extraction", "descendant"), ("fp32", "bf16"), (0, 1, 2, 3), ("scenes", "photos")
RESULTS_FILE, PLOT_FILE = "benchmark.json", "benchmark.svg"


def benchmark(arguments: list[str]) -> int:
    """mmlg benchmark."""
    parser = make_parser(
        "benchmark",
        "RECIPE --out DIR [options]",
        "Measure training steps: samples/s with and without the loader, MFU, loader stall, exposed communication, peak memory. Options "
        "with several values are swept in all combinations. DIR collects the rows of all calls; where ranks differ, scaling is told. For "
        "several nodes, put it behind mmlg launch.",
        (
            "benchmark demo --out runs/benchmark --roles ancestor extraction --num-processes 1 2 --zero-stages 0 1 2 3",
            "launch slurm --cluster my-site.yaml --nodes 4 -- benchmark my-recipe.yaml --out runs/benchmark \\\n"
            "      --architectures ViT-B-32 ViT-B-16 --precisions bf16 --batch-sizes 256 512",
        ),
    )
    _add_options(parser)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "out")
    out = Path(args.out)
    if args.num_processes is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("--num-processes starts ranks itself. Leave it out under mmlg launch.")
        return _on_each(args, recipe, runtime, out)
    return _here(args, recipe, runtime, out)


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=f"{RESULTS_FILE}, {PLOT_FILE} and generated data.")
    help_text = "Whose steps: extraction's are the auxiliary model's, descendant's those of adaptation."
    parser.add_argument("--roles", nargs="+", type=str, choices=ROLES, default=list(ROLES), metavar="ROLE", help=help_text)
    help_text = "open_clip configurations, not the recipe's model."
    parser.add_argument("--architectures", nargs="+", type=str, default=None, metavar="NAME", help=help_text)
    help_text = "Pairs per rank. Left out: those of the recipe."
    parser.add_argument("--batch-sizes", nargs="+", type=PositiveInt, default=None, metavar="N", help=help_text)
    help_text = "Or pairs over all ranks, for strong scaling."
    parser.add_argument("--global-batch-sizes", nargs="+", type=BatchSize, default=None, metavar="N", help=help_text)
    help_text = "fp32, bf16. Left out: the recipe's."
    parser.add_argument("--precisions", nargs="+", type=str, choices=PRECISIONS, default=None, metavar="P", help=help_text)
    help_text = "DeepSpeed ZeRO stages, 0 to 3. Left out: runtime.zero_stage."
    parser.add_argument("--zero-stages", nargs="+", type=int, choices=STAGES, default=None, metavar="S", help=help_text)
    help_text = "Precision of exchanged gradients: fp32, bf16."
    parser.add_argument("--communications", nargs="+", type=str, choices=PRECISIONS, default=None, metavar="P", help=help_text)
    help_text = "Ranks to start on this machine, fresh ones for each combination. Left out: the present ones."
    parser.add_argument("--num-processes", nargs="+", type=Processes, default=None, metavar="N", help=help_text)
    for tower in ("image", "text"):
        help_text = f"Depth of the descendant's {tower} tower. Default: half the ancestor's."
        parser.add_argument(f"--{tower}-layers", type=Layers | None, default=None, metavar="N", help=help_text)
    parser.add_argument("--steps", type=PositiveInt, default=10, metavar="N", help="Steps of a window.")
    parser.add_argument("--repeats", type=PositiveInt, default=5, metavar="N", help="Windows with and without the loader.")
    parser.add_argument("--warmup", type=PositiveInt, default=4, metavar="N", help="Steps before the first window.")
    help_text = (
        "Without --data.path: scenes (the procedural set, few words) or photos (JPEGs, captions of 5 to 25 words). Default: photos with "
        "--architectures, else scenes."
    )
    parser.add_argument("--generate", type=str | None, choices=(*KINDS, None), default=None, metavar="KIND", help=help_text)
    parser.add_argument("--num-pairs", type=PositiveInt, default=2000, metavar="N", help="Training pairs to generate.")
    parser.add_argument("--quiet", action="store_true", help="Write files only: no table.")
    parser.add_argument("--photo-size", type=ImageSize, default=256, metavar="N", help="Side of generated photos in pixels.")


def _here(args: Any, recipe: Recipe, runtime: Runtime, out: Path) -> int:
    """Measure every combination on the present ranks, one after the other."""
    import torch
    import torch.distributed as dist

    from mmlg_scale.ranks import is_first_rank, on_first_rank
    from mmlg_scale.throughput import Windows, check, environment, measure_cell
    from mmlg_scale.training.engine import ranks

    with ranks(runtime) as device:
        world_size = dist.get_world_size()
        cells = list(_cells(args, recipe, runtime, world_size))
        check(cells, world_size)
        recipe.data.path = on_first_rank(lambda: _data(args, recipe, out))
        windows = Windows(args.steps, args.repeats, args.warmup)
        for cell in cells:
            if is_first_rank():
                print(f"measuring {cell.in_words()} on {world_size} rank{'s' * (world_size > 1)}", file=sys.stderr, flush=True)
            try:
                row = measure_cell(recipe, runtime, cell, windows, out / "models")
            except torch.OutOfMemoryError:
                if world_size > 1:
                    raise  # the other ranks may not have met it, and wait
                row = _without_figures(recipe, runtime, cell, world_size, "out of memory")
            row |= {"environment": environment(device)}
            on_first_rank(lambda row=row: _keep(out, [row]))  # type: ignore[misc]
        if is_first_rank() and not args.quiet:
            _show(out)
    return 0


def _on_each(args: Any, recipe: Recipe, runtime: Runtime, out: Path) -> int:
    """Measure every combination at every number of ranks, each in fresh processes of this machine."""
    import yaml
    from mmlg_launchers import LocalLauncher, Resources

    from mmlg_scale.files import write_text_atomic
    from mmlg_scale.recipe_file import to_content
    from mmlg_scale.throughput import check

    cells = [(ranks, cell) for ranks in args.num_processes for cell in _cells(args, recipe, runtime, ranks)]
    for ranks, cell in cells:
        check([cell], ranks)
    recipe.data.path = _data(args, recipe, out)
    file = out / "recipe.yaml"
    write_text_atomic(file, yaml.safe_dump(to_content(recipe, runtime), sort_keys=False))
    failed, launcher = 0, LocalLauncher(stream=True)
    for ranks, cell in cells:
        argv = [sys.executable, "-m", "mmlg_scale", "benchmark", str(file), *_options(args, cell), "--out", str(out), "--quiet"]
        job = launcher.submit(argv, Resources(num_processes=ranks), out / "launch")
        try:
            job.wait()
        except KeyboardInterrupt:
            job.cancel()
            raise
        if job.exit_code:
            failed += 1
            _keep(out, [_without_figures(recipe, runtime, cell, ranks, f"failed with exit code {job.exit_code}")])
    if not args.quiet:
        _show(out)
    return 1 if failed else 0


def _cells(args: Any, recipe: Recipe, runtime: Runtime, ranks: int) -> Iterator[Cell]:
    """Every combination at a number of ranks."""
    from mmlg_scale.throughput import Cell, recipe_batch

    if args.batch_sizes and args.global_batch_sizes:
        raise UserError("--batch-sizes and --global-batch-sizes say the same in two ways. Give one of them.")
    if (args.image_layers is None) != (args.text_layers is None):
        raise UserError("--image-layers and --text-layers go together. Give both, or neither.")
    given = [ranks * size for size in args.batch_sizes or ()] or args.global_batch_sizes
    layers = None if args.image_layers is None else (args.image_layers, args.text_layers)
    for role, architecture, precision, stage, communication in itertools.product(
        args.roles,
        args.architectures or [None],
        args.precisions or [recipe.engine.precision],
        args.zero_stages or [runtime.zero_stage],
        args.communications or [recipe.engine.communication],
    ):
        for batch_size in given or [recipe_batch(recipe, role)]:
            yield Cell(role, architecture, precision, stage, int(batch_size), layers if role == "descendant" else None, communication)


def _options(args: Any, cell: Cell) -> list[str]:
    """The options that measure one combination alone."""
    found = ["--roles", cell.role, "--precisions", cell.precision, "--zero-stages", str(cell.zero_stage)]
    found += ["--communications", cell.communication, "--global-batch-sizes", str(cell.batch_size)]
    found += ["--architectures", cell.architecture] if cell.architecture else []
    if cell.layers is not None:
        found += ["--image-layers", str(cell.layers[0]), "--text-layers", str(cell.layers[1])]
    return [*found, "--steps", str(args.steps), "--repeats", str(args.repeats), "--warmup", str(args.warmup)]


def _data(args: Any, recipe: Recipe, out: Path) -> str | None:
    """The data set: the user's, or one that is generated once; None where the user has given a mixture."""
    if recipe.data.is_given:
        return recipe.data.path
    from mmlg_scale.data.scenes import write_scenes
    from mmlg_scale.data.synthetic import write_pairs
    from mmlg_scale.towers import image_size, model_config

    kind = args.generate or ("photos" if args.architectures else "scenes")
    if kind == "photos":
        captions = recipe.data.captions_per_image
        folder = out / f"photos-{args.photo_size}-{args.num_pairs}{f'-{captions}-captions' if captions > 1 else ''}"
        write = functools.partial(write_pairs, folder, num_train=args.num_pairs, image_size=args.photo_size, captions=captions)
    else:
        side = image_size(model_config(recipe.model.config if recipe.model.config is not None else recipe.model.architecture))
        folder = out / f"scenes-{side}-{args.num_pairs}"
        write = functools.partial(write_scenes, folder, num_train=args.num_pairs, num_val=16, num_test=16, image_size=side)
    if not folder.exists():
        print(f"generating {args.num_pairs} {kind}: {folder}", file=sys.stderr)
        write()
    return str(folder)


def _without_figures(recipe: Recipe, runtime: Runtime, cell: Cell, ranks: int, note: str) -> Row:
    return {**cell.row(recipe, runtime, ranks), "local_batch": cell.batch_size // ranks, "note": note}


def _keep(out: Path, rows: Sequence[Row]) -> None:
    """Add rows to those of earlier calls."""
    from mmlg_scale.records import write_record
    from mmlg_scale.throughput import merged

    write_record(out / RESULTS_FILE, {"rows": merged(_kept(out), rows)})


def _kept(out: Path) -> list[Row]:
    from mmlg_scale.records import read_record

    file = out / RESULTS_FILE
    if not file.exists():
        return []
    rows = read_record(file, "the results of earlier calls", "Remove it, or give another --out, and measure again.").get("rows")
    if not isinstance(rows, list):
        raise UserError(f"{file} has no rows. Remove it, or give another --out, and measure again.")
    return rows


def _show(out: Path) -> None:
    """Print the table and draw the plot."""
    from mmlg_scale.throughput import draw, table

    rows = _kept(out)
    print(table(rows))
    draw(rows, out / PLOT_FILE)
