"""mmlg data ...: make, pack, index and check data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmlg_scale.bounds import MAX_PROCESSES
from mmlg_scale.cli.parsing import make_parser, parse, progress
from mmlg_scale.data import RESTVAL, SPLITS
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import ImageSize, NonNegativeInt, Threads, UnitInterval
from mmlg_scale.reading import shown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

OUT_HELP = "Folder to write. It appears complete or not at all."
TOKENIZER_HELP = (
    "What models trained from scratch on the set will use; models that have a tokenizer keep their own. none: open_clip's byte pairs; bpe: "
    "the same, and models with another tokenizer are refused; words: a vocabulary of the captions' words, for toy models; or a path: a "
    "model folder or a tokenizer.json."
)


def scenes(arguments: list[str]) -> int:
    """mmlg data scenes."""
    from mmlg_scale.recipe_data import Scenes

    parser = make_parser(
        "data scenes",
        "--out DIR [options]",
        "Write the procedural image-text set as webdataset shards. Train, val and test share no scene.",
        ("data scenes --out data", "data scenes --out small --num_train 2000 --num_val 100 --num_test 100 --image-size 64"),
    )
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help=OUT_HELP)
    parser.add_argument("--image-size", type=ImageSize, default=32, metavar="N", help="Side of the square images in pixels.")
    parser.add_class_arguments(Scenes, as_group=False)
    args = parse(parser, arguments)
    from mmlg_scale.data.scenes import write_scenes
    from mmlg_scale.data.summary import print_summary

    write_scenes(
        Path(args.out),
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        seed=args.seed,
        image_size=args.image_size,
        progress=progress("scenes"),
    )
    print_summary(Path(args.out), brief=True)
    return 0


def pack(arguments: list[str]) -> int:
    """mmlg data pack."""
    parser = make_parser(
        "data pack",
        "SOURCE --out DIR [options]",
        "Pack your images and captions into webdataset shards, and say what is in them.",
        (
            "data pack pairs.csv --out data --tokenizer words",
            "data pack dataset_flickr30k.json --images flickr30k-images --out flickr30k",
        ),
    )
    help_text = (
        "A CSV or TSV table (filepath,caption; split too if you like), a COCO or Karpathy JSON file, or a folder with one folder of images "
        "per class."
    )
    parser.add_argument("source", type=str, metavar="SOURCE", help=help_text)
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help=OUT_HELP)
    parser.add_argument("--tokenizer", type=str, default="none", metavar="T", help=TOKENIZER_HELP)
    _add_packing(parser)
    args = parse(parser, arguments)
    from mmlg_scale.data.pack import PackSettings, pack_folders, pack_table
    from mmlg_scale.data.pack_json import pack_json
    from mmlg_scale.data.summary import print_summary

    source, out, bar = _local(args.source, "pack"), Path(args.out), progress("pack")
    kind = "folder" if source.is_dir() else "JSON file" if source.suffix.lower() == ".json" else "table"
    for key, its in _ONLY_FOR.items():
        if source.exists() and its != kind and getattr(args, key) != parser.get_default(key):
            raise UserError(f"--{key.replace('_', '-')} is for a {its}, and {source} is a {kind}. Leave it out.")
    keys = ("val", "test", "seed", "tokenizer", "resize", "skip_bad")
    settings = PackSettings(**{key: getattr(args, key) for key in keys}, as_shown=not args.as_stored)
    if kind == "folder":
        pack_folders(source, out, settings, templates=args.templates, progress=bar)
    elif kind == "JSON file":
        if args.images is None:
            raise UserError("--images is missing. Give the folder that the image names in the JSON file are relative to.")
        more = {"restval": args.restval, "allow_other_counts": args.allow_other_counts}
        pack_json(source, out, settings, images=Path(args.images), progress=bar, **more)
    else:
        pack_table(source, out, settings, image_column=args.image_column, caption_column=args.caption_column, progress=bar)
    print_summary(out)
    return 0


_ONLY_FOR = {
    **dict.fromkeys(("image_column", "caption_column"), "table"),
    **dict.fromkeys(("images", "restval", "allow_other_counts"), "JSON file"),
    "templates": "folder",
}
"""Options of mmlg data pack that one kind of source has."""


def _add_packing(parser: ArgumentParser) -> None:
    """The options of mmlg data pack, by what they are for."""
    group = parser.add_argument_group("splits, where the source has none of its own")
    group.add_argument("--val", type=UnitInterval, default=0.05, metavar="X", help="Fraction of images for validation.")
    group.add_argument("--test", type=UnitInterval, default=0.1, metavar="X", help="Fraction of images for the test split.")
    group.add_argument("--seed", type=NonNegativeInt, default=0, metavar="N", help="Seed of the split.")
    group = parser.add_argument_group("images")
    help_text = "Resize to N pixels (shorter side) and crop the centre square."
    group.add_argument("--resize", type=ImageSize | None, default=None, metavar="N", help=help_text)
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="Leave out images that are missing or do not decode and captions that are empty or too long, and list them.",
    )
    group.add_argument(
        "--as-stored",
        action="store_true",
        help="Pack every image byte for byte; models see the same. By default images that viewers show otherwise than they are stored "
        "(rotated by EXIF, transparent, 16-bit, palette) are packed as shown, and counted.",
    )
    group = parser.add_argument_group("tables")
    help_text = "Column with image paths, relative to the table."
    group.add_argument("--image-column", type=str, default="filepath", metavar="NAME", help=help_text)
    help_text = "Column with captions; rows of one image are its captions."
    group.add_argument("--caption-column", type=str, default="caption", metavar="NAME", help=help_text)
    group = parser.add_argument_group("folders per class")
    group.add_argument(
        "--templates", type=str, nargs="+", default=["a photo of {}."], metavar="TEXT", help="Caption templates; {} is the class."
    )
    group = parser.add_argument_group("COCO and Karpathy JSON")
    help_text = "Folder that the file's image names are relative to. Required for JSON."
    group.add_argument("--images", type=str | None, default=None, metavar="DIR", help=help_text)
    group.add_argument("--restval", type=str, default="train", choices=RESTVAL, help="What happens to a Karpathy file's restval images.")
    help_text = "Accept a Karpathy file whose splits have other sizes than the published ones."
    group.add_argument("--allow-other-counts", action="store_true", help=help_text)


def check(arguments: list[str]) -> int:
    """mmlg data check."""
    parser = make_parser(
        "data check",
        "DIR [options]",
        "Check a data set: manifest, sizes, SHA-256, sample headers, captions, images. Exit code 0: intact; 1: damaged, with a list.",
        ("data check data --split val test --no-decode", "data check data --part 3/8"),
    )
    parser.add_argument("folder", type=str, metavar="DIR", help="The data set.")
    parser.add_argument("--split", type=str, nargs="+", default=None, choices=SPLITS, help="Only these splits.")
    parser.add_argument("--decode", action="store_true", default=True, help="Decode every image (the default).")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="Do not decode images: faster.")
    help_text = "Threads that read and decode."
    parser.add_argument("--threads", type=Threads, default=os.cpu_count() or 1, metavar="N", help=help_text)
    help_text = "Only the I-th of N parts of the shards, for an array of jobs; what they find is kept together."
    parser.add_argument("--part", type=str, default="1/1", metavar="I/N", help=help_text)
    args = parse(parser, arguments)
    from mmlg_scale.data.check import check_dataset, print_damage

    root, part = _local(args.folder, "check"), _part(args.part)
    found = check_dataset(root, splits=args.split, decode=args.decode, threads=args.threads, part=part, progress=progress("check"))
    print_damage(found, root)
    return 1 if found else 0


def _local(path: str, command: str) -> Path:
    """A path of this machine. Raises UserError for the URL of a store."""
    from mmlg_scale.data.transfer import is_remote, local_path

    if is_remote(path):
        told = (
            "Download it, or mount the bucket."
            if command == "pack"
            else "Run it on a local copy or a mounted bucket, and upload what it writes."
        )
        raise UserError(f"{shown(path)} is remote: mmlg data {command} works on folders of this machine. {told}")
    return local_path(path)


def _part(text: str) -> tuple[int, int]:
    """ "3/8" as (3, 8)."""
    number, slash, total = text.partition("/")
    if not slash or not (number + total).isdecimal() or not 1 <= int(number) <= int(total) <= MAX_PROCESSES:
        raise UserError(f"--part {text!r} is no part. Give the part's number, from 1, and how many there are: --part 3/8.")
    return int(number), int(total)


def index(arguments: list[str]) -> int:
    """mmlg data index."""
    parser = make_parser(
        "data index",
        "DIR [options]",
        "Make a data set of webdataset shards from elsewhere (KEY.jpg with KEY.txt, KEY.json or KEY.cls): manifests and indexes are "
        "written beside the shards, which are not touched. A pass that was stopped resumes. A set of an earlier version gets "
        "a new index.",
        ("data index cc3m --val-shards 2 --test-shards 2", "data index laion --part 3/8"),
    )
    parser.add_argument("folder", type=str, metavar="DIR", help="The folder of the shards, or of train/, val/ and test/ with shards.")
    help_text = "Shards for the validation split, where there are no folders of splits."
    parser.add_argument("--val-shards", type=NonNegativeInt, default=1, metavar="N", help=help_text)
    help_text = "Shards for the test split, likewise: the last ones."
    parser.add_argument("--test-shards", type=NonNegativeInt, default=1, metavar="N", help=help_text)
    parser.add_argument("--tokenizer", type=str, default="none", metavar="T", help=TOKENIZER_HELP)
    help_text = "Processes that read shards."
    parser.add_argument("--processes", type=Threads, default=os.cpu_count() or 1, metavar="N", help=help_text)
    help_text = "Index only the I-th of N parts of the shards, for an array of jobs with the same other options."
    parser.add_argument("--part", type=str | None, default=None, metavar="I/N", help=help_text)
    parser.add_argument("--join", action="store_true", help="After all parts: write the manifests.")
    args = parse(parser, arguments)
    from mmlg_scale.data import indexing, reindexing
    from mmlg_scale.data.summary import print_summary

    root, bar = _local(args.folder, "index"), progress("index")
    splits = {"val_shards": args.val_shards, "test_shards": args.test_shards}
    if args.part is not None and args.join:
        raise UserError("--part and --join do not go together. Run all parts, then once --join.")
    if reindexing.old_splits(root):
        told = ", ".join(f"{split} {count}" for split, count in reindexing.rewrite_index(root, bar).items())
        print(f"{root}: index rewritten, {told} samples. Shards and identity are as they were.")
    elif indexing.recorded_kind(root) not in (None, "indexed"):
        made = sum(reindexing.renew_index(root, bar).values())
        print(f"{root} was packed with its index: {made} of its files were missing or damaged, and made again.")
    elif args.part is not None:
        part = _part(args.part)
        now, total = indexing.index_shards_of(root, part, processes=args.processes, progress=bar, **splits)
        print(f"{root}: part {args.part}: {now} shards indexed, {total - now} were. When all parts are: mmlg data index {root} --join")
        return 0
    else:
        write = indexing.join_dataset if args.join else indexing.index_dataset
        more = {} if args.join else {"processes": args.processes, "progress": bar}
        counts, problems = write(root, tokenizer=args.tokenizer, **splits, **more)
        indexing.print_index(counts, problems, root)
    print_summary(root)
    return 0
