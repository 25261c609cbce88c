"""Commands on models and results: descend, eval, report."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mmlg_scale.cli.parsing import make_parser, parse
from mmlg_scale.cli.runs import WIDTH_HELP
from mmlg_scale.data import SPLITS
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import MODALITIES


def descend(arguments: list[str]) -> int:
    """mmlg descend."""
    parser = make_parser("descend", "Write a descendant from a learngene file: closed form, no data, no training.")
    parser.add_argument("learngene", type=str, help="A learngene.safetensors file.")
    parser.add_argument(
        "--image-layers",
        type=int | None,
        default=None,
        help="Depth of the image tower; deeper than the ancestor works too.",
    )
    parser.add_argument("--text-layers", type=int | None, default=None, help="Depth of the text tower.")
    for tower in ("image", "text"):
        parser.add_argument(f"--{tower}-width", type=int | None, default=None, help=WIDTH_HELP.format(tower) + ".")
    parser.add_argument("--modality", type=str, default="both", choices=MODALITIES, help="Both towers, or one alone.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write: open_clip.create_model('local-dir:OUT') loads it.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the export that is there; other files in the folder stay.")
    args = parse(parser, arguments)
    for tower in ("image", "text"):
        if getattr(args, f"{tower}_layers") is None and args.modality in ("both", tower):
            raise UserError(f"--{tower}-layers is missing. Say how deep the {tower} tower is to be.")
    from mmlg_scale.learngene.file import load_learngene

    learngene = load_learngene(Path(args.learngene))
    started = time.perf_counter()
    sizes = {f"{tower}_{kind}": getattr(args, f"{tower}_{kind}") for tower in ("image", "text") for kind in ("layers", "width")}
    descendant = learngene.descend(**sizes, modality=args.modality)
    written = time.perf_counter() - started
    descendant.export(Path(args.out), overwrite=args.overwrite)
    print(f"{args.out}: composed in {written * 1e3:.1f} ms, on disk after {(time.perf_counter() - started) * 1e3:.1f} ms")
    return 0


def evaluate(arguments: list[str]) -> int:
    """mmlg eval."""
    parser = make_parser("eval", "Retrieval (and, where the set has classes, zero-shot) metrics of an open_clip folder.")
    parser.add_argument("model", type=str, help="A folder that open_clip loads by local-dir:.")
    parser.add_argument("--data", type=str, required=True, help="A data set folder (mmlg data scenes / pack).")
    parser.add_argument("--split", type=str, default="test", choices=SPLITS, help="Which split.")
    parser.add_argument("--out", type=str | None, default=None, help="Write the metrics to this JSON file too.")
    args = parse(parser, arguments)
    from mmlg_scale.evaluation.evaluate import evaluate_folder
    from mmlg_scale.files import write_json_atomic

    metrics = evaluate_folder(Path(args.model), Path(args.data), args.split)
    print(json.dumps(metrics, indent=1))
    if args.out is not None:
        write_json_atomic(Path(args.out), metrics)
    return 0


def report(arguments: list[str]) -> int:
    """mmlg report."""
    parser = make_parser("report", "Draw report.html again from family.json.")
    parser.add_argument("run", type=str, help="The folder of a family run.")
    args = parse(parser, arguments)
    from mmlg_scale.report import write_report

    print(write_report(Path(args.run)))
    return 0
