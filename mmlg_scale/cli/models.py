"""Commands on models and results: descend, eval, report."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mmlg_scale.cli.parsing import make_parser, parse
from mmlg_scale.cli.runs import WIDTH_HELP
from mmlg_scale.data import SPLITS
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import PositiveInt
from mmlg_scale.recipe import MODALITIES


def descend(arguments: list[str]) -> int:
    """mmlg descend."""
    parser = make_parser(
        "descend",
        "LEARNGENE --image-layers N --text-layers N --out DIR [options]",
        "Write a descendant from a learngene file: a CLIP of any depth, as an ordinary open_clip model folder. It needs no data and no "
        "training: milliseconds at toy size, one to two seconds for a ViT-B/32.",
        (
            "descend runs/demo/learngene/learngene.safetensors --image-layers 5 --text-layers 3 --out small",
            "descend runs/demo/learngene/learngene.safetensors --image-layers 6 --image-width 48 --modality image --out image-tower",
        ),
    )
    parser.add_argument("learngene", type=str, metavar="LEARNGENE", help="A learngene.safetensors file.")
    help_text = "Depth of the image tower. Deeper than the ancestor works too."
    parser.add_argument("--image-layers", type=int | None, default=None, metavar="N", help=help_text)
    parser.add_argument("--text-layers", type=int | None, default=None, metavar="N", help="Depth of the text tower.")
    for tower in ("image", "text"):
        parser.add_argument(f"--{tower}-width", type=int | None, default=None, metavar="N", help=WIDTH_HELP.format(tower))
    parser.add_argument("--modality", type=str, default="both", choices=MODALITIES, help="Both towers, or one.")
    help_text = "Folder to write. open_clip.create_model('local-dir:DIR') loads it."
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help=help_text)
    help_text = "Replace the model that is there; other files in the folder are kept."
    parser.add_argument("--overwrite", action="store_true", help=help_text)
    args = parse(parser, arguments)
    for tower in ("image", "text"):
        if getattr(args, f"{tower}_layers") is None and args.modality in ("both", tower):
            raise UserError(f"--{tower}-layers is missing. Give the depth of the {tower} tower.")
        for kind in ("layers", "width"):
            if args.modality not in ("both", tower) and getattr(args, f"{tower}_{kind}") is not None:
                raise UserError(f"--{tower}-{kind} is given, and --modality {args.modality} writes no {tower} tower. Leave it out.")
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
    parser = make_parser(
        "eval",
        "MODEL --data DIR [options]",
        "Measure an open_clip model folder on a data set, with the model's own preprocessing and tokenizer. Prints one JSON object of "
        "fractions from 0 to 1: image_retrieval_recall@K (captions that find their image among the first K), text_retrieval_recall@K "
        "(images that find one of their captions) and mean_recall@K (the mean of both), K being 1, 5 and 10; where the set has classes "
        "also acc1, acc5 and mean_per_class_recall (zero-shot).",
        ("eval small --data data", "eval runs/ancestor/model --data data --split val --out metrics.json"),
    )
    parser.add_argument("model", type=str, metavar="MODEL", help="A folder that open_clip loads as local-dir:MODEL.")
    help_text = "A data set that mmlg data pack, index or scenes wrote: a folder, or a URL (https://, s3://, gs://, hf://)."
    parser.add_argument("--data", type=str, required=True, metavar="DIR", help=help_text)
    help_text = "Folder for copies of a remote data set, on a disk of this machine."
    parser.add_argument("--cache-dir", type=str | None, default=None, metavar="DIR", help=help_text)
    parser.add_argument("--cache-bytes", type=PositiveInt, default=64 * 2**30, metavar="N", help="Of those copies together, at most.")
    parser.add_argument("--split", type=str, default="test", choices=SPLITS, help="Which split.")
    parser.add_argument("--out", type=str | None, default=None, metavar="FILE", help="Write the JSON to this file too.")
    args = parse(parser, arguments)
    from mmlg_scale.data.corpus import cache_of, open_pairs
    from mmlg_scale.data.store import OPTIONS
    from mmlg_scale.evaluation.evaluate import evaluate_folder
    from mmlg_scale.files import write_json_atomic

    if args.out is not None and Path(args.out).is_dir():
        raise UserError(f"--out {args.out} is a folder. Give the name of a file.")
    pairs = open_pairs(args.data, cache_of(args.cache_dir, args.cache_bytes, OPTIONS), key="--data")
    metrics = evaluate_folder(Path(args.model), pairs, args.split)
    print(json.dumps(metrics, indent=1))
    if args.out is not None:
        write_json_atomic(Path(args.out), metrics)
    return 0


def report(arguments: list[str]) -> int:
    """mmlg report."""
    parser = make_parser(
        "report",
        "DIR",
        "Draw DIR/report.html again from DIR/family.json, with every ratio recomputed. Nothing is trained or evaluated.",
        ("report runs/demo", "report runs/mine"),
    )
    parser.add_argument("run", type=str, metavar="DIR", help="The folder of a finished mmlg family run.")
    args = parse(parser, arguments)
    from mmlg_scale.report import write_report

    print(write_report(Path(args.run)))
    return 0
