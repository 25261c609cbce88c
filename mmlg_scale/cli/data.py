"""mmlg data ...: make, pack, index and check data sets."""

from __future__ import annotations

import os
from pathlib import Path

from mmlg_scale.cli.parsing import make_parser, parse, progress
from mmlg_scale.data import RESTVAL, SPLITS
from mmlg_scale.errors import UserError

TOKENIZER_HELP = (
    "What the set offers to models trained from scratch on it; models that have a tokenizer use their own. none: open_clip's byte pairs, "
    "and any model fits; words: a vocabulary of the captions' words, for toy models; bpe: byte pairs, and models with another tokenizer "
    "are refused; or a model folder or a tokenizer.json."
)


def scenes(arguments: list[str]) -> int:
    """mmlg data scenes."""
    from mmlg_scale.recipe import Scenes

    parser = make_parser("data scenes", "Write the procedural image-text set as webdataset shards: train, val and test share no scene.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; made whole or not at all.")
    parser.add_argument("--image-size", type=int, default=32, help="Side of the square images in pixels.")
    parser.add_class_arguments(Scenes, as_group=False)
    args = parse(parser, arguments)
    from mmlg_scale.data.scenes import write_scenes

    write_scenes(
        Path(args.out),
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        seed=args.seed,
        image_size=args.image_size,
        progress=progress("scenes"),
    )
    return 0


def pack(arguments: list[str]) -> int:
    """mmlg data pack."""
    parser = make_parser(
        "data pack", "Pack a CSV/TSV table (filepath,caption), a folder per class, or COCO or Karpathy JSON into webdataset shards."
    )
    parser.add_argument("source", type=str, help="The table, the JSON file, or the folder that holds one folder per class.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; made whole or not at all.")
    parser.add_argument("--image-column", type=str, default="filepath", help="Table column with image paths, relative to the table.")
    parser.add_argument(
        "--caption-column",
        type=str,
        default="caption",
        help="Table column with captions; rows of one image are its captions.",
    )
    parser.add_argument(
        "--templates", type=str, nargs="+", default=["a photo of {}."], help="Caption templates for folders; {} is the class."
    )
    parser.add_argument(
        "--val",
        type=float,
        default=0.05,
        help="Fraction of images for validation where the source has no split of its own.",
    )
    parser.add_argument("--test", type=float, default=0.1, help="Fraction of images for the test split, likewise.")
    parser.add_argument("--tokenizer", type=str, default="none", help=TOKENIZER_HELP)
    parser.add_argument("--resize", type=int | None, default=None, help="Resize images to this many pixels (shorter side, centre crop).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the split.")
    parser.add_argument("--images", type=str | None, default=None, help="Folder that a JSON file's image names are relative to.")
    parser.add_argument("--restval", type=str, default="train", choices=RESTVAL, help="What becomes of a Karpathy file's restval images.")
    parser.add_argument(
        "--allow-other-counts", action="store_true", help="Take a Karpathy file whose splits have other sizes than are known of its set."
    )
    parser.add_argument("--skip-bad", action="store_true", help="Leave out images that are missing or do not decode, and list them.")
    parser.add_argument(
        "--as-stored",
        action="store_true",
        help="Pack every image byte for byte. By default those that viewers show otherwise than they are stored (rotated by EXIF, "
        "transparent, 16-bit, palette) are packed as shown, and counted.",
    )
    args = parse(parser, arguments)
    from mmlg_scale.data.pack import PackSettings, pack_folders, pack_table
    from mmlg_scale.data.pack_json import pack_json

    source, out, bar = Path(args.source), Path(args.out), progress("pack")
    keys = ("val", "test", "seed", "tokenizer", "resize", "skip_bad")
    settings = PackSettings(**{key: getattr(args, key) for key in keys}, as_shown=not args.as_stored)
    if source.is_dir():
        pack_folders(source, out, settings, templates=args.templates, progress=bar)
    elif source.suffix.lower() == ".json":
        if args.images is None:
            raise UserError("--images is missing. Give the folder that the image names in the JSON file are relative to.")
        more = {"restval": args.restval, "allow_other_counts": args.allow_other_counts}
        pack_json(source, out, settings, images=Path(args.images), progress=bar, **more)
    else:
        pack_table(source, out, settings, image_column=args.image_column, caption_column=args.caption_column, progress=bar)
    return 0


def check(arguments: list[str]) -> int:
    """mmlg data check."""
    parser = make_parser(
        "data check", "Check a data set: manifest, sizes, SHA-256, sample headers, captions, images. Exit code 1: damaged."
    )
    parser.add_argument("folder", type=str, help="The data set.")
    parser.add_argument("--split", type=str, nargs="+", default=None, choices=SPLITS, help="Only these splits.")
    parser.add_argument("--decode", action="store_true", default=True, help="Decode every image (the default).")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="Do not decode images.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="Threads that read and decode.")
    args = parse(parser, arguments)
    from mmlg_scale.data.check import check_dataset, print_damage

    root = Path(args.folder)
    found = check_dataset(root, splits=args.split, decode=args.decode, threads=args.threads, progress=progress("check"))
    print_damage(found, root)
    return 1 if found else 0


def index(arguments: list[str]) -> int:
    """mmlg data index."""
    parser = make_parser(
        "data index", "Write manifests for webdataset shards made elsewhere (KEY.jpg with KEY.txt or KEY.json); no shard is touched."
    )
    parser.add_argument("folder", type=str, help="The folder of the shards, or of train/, val/ and test/ with shards.")
    parser.add_argument("--val-shards", type=int, default=1, help="Shards for validation where there are no folders of splits.")
    parser.add_argument("--test-shards", type=int, default=1, help="Shards for the test split, likewise: the last ones.")
    parser.add_argument("--tokenizer", type=str, default="none", help=TOKENIZER_HELP)
    args = parse(parser, arguments)
    from mmlg_scale.data.indexing import index_dataset, print_index

    root = Path(args.folder)
    counts, problems = index_dataset(
        root, val_shards=args.val_shards, test_shards=args.test_shards, tokenizer=args.tokenizer, progress=progress("index")
    )
    print_index(counts, problems, root)
    return 0
