"""The `mmlg` command: subcommands only. Parse, call, print; no logic, and no heavy import before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlg_scale.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mmlg_scale.recipe import Recipe

HELP = """usage: mmlg COMMAND ...

Train one big CLIP, distil a small learngene out of it, write CLIPs of any depth from that.

The whole job, from image-text shards to a report:
  mmlg family demo --out runs/demo          (demo: a shipped recipe; or your own YAML file)

Step by step:
  mmlg data scenes --out DIR                write the procedural image-text set as webdataset shards
  mmlg data pack SOURCE --out DIR           pack your CSV/TSV (filepath,caption), COCO or Karpathy JSON, or folder per class
  mmlg data index DIR                       make a data set of shards from elsewhere, without touching them
  mmlg data check DIR                       compare every byte with its checksum and read every sample
  mmlg train RECIPE --data.path DIR --out DIR
                                            train the ancestor
  mmlg extract RECIPE --data.path DIR --ancestor-model DIR --out DIR
                                            distil the learngene
  mmlg features RECIPE --data.path DIR --ancestor-model DIR --out DIR
                                            keep the ancestor's features, for recipes with engine.keep_features
  mmlg descend LEARNGENE --image-layers A --text-layers B --out DIR
                                            write a descendant as an ordinary open_clip model
  mmlg train RECIPE --init mmlg|tleg|sws|scratch|even|distil --image-layers A --text-layers B ...
                                            train a descendant or a baseline
  mmlg eval MODEL --data DIR                retrieval and zero-shot metrics of any open_clip folder
  mmlg report DIR                           draw report.html of a family run again

Running:
  mmlg launch local --num-processes N -- <any mmlg command>
  mmlg doctor                               what this machine has, and what to do about what it lacks

Every command has --help. Commands that take a RECIPE take every field of it as an option
(--extraction.training.steps 200) and print the resolved whole with --print-config.
A user's mistake ends with one line and exit code 2; --debug shows the traceback.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 the user's mistake)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments and "--" not in arguments[: arguments.index("--debug")]
    if debug:
        arguments.remove("--debug")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    try:
        return _command(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"mmlg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmlg: interrupted; start the same command again to go on.", file=sys.stderr)
        return 130


def _command(arguments: list[str]) -> int:
    words = 2 if arguments[0] in ("data", "launch") and len(arguments) > 1 and not arguments[1].startswith("-") else 1
    name = " ".join(arguments[:words])
    if name in ("data", "launch"):
        choices = [key for key in COMMANDS if key.startswith(f"{name} ")]
        print("usage: one of\n  " + "\n  ".join(f"mmlg {key} --help" for key in choices))
        return 0 if arguments[1:] in (["-h"], ["--help"]) else 2
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}.{_nearest(name, list(COMMANDS))} See mmlg --help.")
    return COMMANDS[name](arguments[words:])


def _nearest(word: str, choices: Sequence[str]) -> str:
    import difflib

    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    return f" Did you mean {found[0]!r}?" if found else ""


def _parser(name: str, description: str) -> ArgumentParser:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=f"mmlg {name}", description=description, exit_on_error=False)


def _parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """Parse, turning what argparse says of a mistake into one line with the nearest valid option."""
    import argparse

    options = {option for action in parser._actions for option in action.option_strings}
    try:
        return parser.parse_args([_underscored(word, options) for word in arguments])
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        message = " ".join(str(error).split())
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        hint = _nearest(unknown[0], sorted(options)) if message.startswith("unrecognized") and unknown else ""
        raise UserError(f"{message}.{hint} See {parser.prog} --help.") from error


def _underscored(word: str, options: set[str]) -> str:
    """Recipe fields are spelled with underscores, command options with hyphens; both spellings of either are understood."""
    name, equals, value = word.partition("=")
    for other in ("--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")):
        if name.startswith("--") and name not in options and other in options:
            return other + equals + value
    return word


def _parse_recipe(parser: ArgumentParser, arguments: list[str]) -> tuple[Any, Recipe]:
    """Parse a command whose first argument is a recipe; every recipe field is an option of the command."""
    from mmlg_scale.recipe import Recipe, check_keys, resolve_recipe_path

    parser.add_argument("--recipe", action="config", help="The recipe: a YAML file, also given as the first argument.")
    parser.add_class_arguments(Recipe, as_group=False)
    if arguments and not arguments[0].startswith("-"):
        path = resolve_recipe_path(arguments[0])
        check_keys(path)
        arguments = ["--recipe", str(path), *arguments[1:]]
    parsed = _parse(parser, arguments)
    import dataclasses

    instance = parser.instantiate(parsed)
    recipe = Recipe(**{field.name: getattr(instance, field.name) for field in dataclasses.fields(Recipe)})
    recipe.check()
    return parsed, recipe


def _data_scenes(arguments: list[str]) -> int:
    from mmlg_scale.recipe import Scenes

    parser = _parser("data scenes", "Write the procedural image-text set as webdataset shards: train, val and test share no scene.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write; made whole or not at all.")
    parser.add_argument("--image-size", type=int, default=32, help="Side of the square images in pixels.")
    parser.add_class_arguments(Scenes, as_group=False)
    args = _parse(parser, arguments)
    from mmlg_scale.data.scenes import write_scenes

    write_scenes(
        Path(args.out),
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        seed=args.seed,
        image_size=args.image_size,
        progress=_progress("scenes"),
    )
    return 0


def _data_pack(arguments: list[str]) -> int:
    parser = _parser(
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
        help="Share of images for validation where the source has no split of its own.",
    )
    parser.add_argument("--test", type=float, default=0.1, help="Share of images for the test split, likewise.")
    parser.add_argument("--tokenizer", type=str, default="words", help="words: a vocabulary made of the captions; bpe: open_clip's.")
    parser.add_argument("--resize", type=int | None, default=None, help="Resize images to this many pixels (shorter side, centre crop).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the split.")
    parser.add_argument("--images", type=str | None, default=None, help="Folder that a JSON file's image names are relative to.")
    parser.add_argument(
        "--restval", type=str, default="train", choices=["train", "drop"], help="What becomes of a Karpathy file's restval images."
    )
    parser.add_argument(
        "--allow-other-counts", action="store_true", help="Take a Karpathy file whose splits have other sizes than are known of its set."
    )
    parser.add_argument("--skip-bad", action="store_true", help="Leave out images that are missing or do not decode, and list them.")
    args = _parse(parser, arguments)
    from mmlg_scale.data.pack import pack_folders, pack_table
    from mmlg_scale.data.pack_json import pack_json

    source, out = Path(args.source), Path(args.out)
    common = {key: getattr(args, key) for key in ("seed", "tokenizer", "resize", "skip_bad")}
    common |= {"shares": {"val": args.val, "test": args.test}, "progress": _progress("pack")}
    if source.is_dir():
        pack_folders(source, out, templates=args.templates, **common)
    elif source.suffix.lower() == ".json":
        if args.images is None:
            raise UserError("--images is missing. Give the folder that the image names in the JSON file are relative to.")
        pack_json(source, out, images=Path(args.images), restval=args.restval, allow_other_counts=args.allow_other_counts, **common)
    else:
        pack_table(source, out, image_column=args.image_column, caption_column=args.caption_column, **common)
    return 0


def _data_check(arguments: list[str]) -> int:
    parser = _parser("data check", "Check a data set: manifest, sizes, SHA-256, sample headers, captions, images. Exit code 1: damaged.")
    parser.add_argument("folder", type=str, help="The data set.")
    parser.add_argument("--split", type=str, nargs="+", default=None, choices=["train", "val", "test"], help="Only these splits.")
    parser.add_argument("--decode", action="store_true", default=True, help="Decode every image (the default).")
    parser.add_argument("--no-decode", dest="decode", action="store_false", help="Do not decode images.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="Threads that read and decode.")
    args = _parse(parser, arguments)
    from mmlg_scale.data.check import check_dataset, print_damage

    root = Path(args.folder)
    found = check_dataset(root, splits=args.split, decode=args.decode, threads=args.threads, progress=_progress("check"))
    print_damage(found, root)
    return 1 if found else 0


def _data_index(arguments: list[str]) -> int:
    parser = _parser(
        "data index", "Write manifests for webdataset shards made elsewhere (KEY.jpg with KEY.txt or KEY.json); no shard is touched."
    )
    parser.add_argument("folder", type=str, help="The folder of the shards, or of train/, val/ and test/ with shards.")
    parser.add_argument("--val-shards", type=int, default=1, help="Shards for validation where there are no folders of splits.")
    parser.add_argument("--test-shards", type=int, default=1, help="Shards for the test split, likewise: the last ones.")
    parser.add_argument("--tokenizer", type=str, default="bpe", help="bpe: open_clip's; words: a vocabulary made of the captions.")
    args = _parse(parser, arguments)
    from mmlg_scale.data.indexing import index_dataset, print_index

    root = Path(args.folder)
    counts, problems = index_dataset(
        root, val_shards=args.val_shards, test_shards=args.test_shards, tokenizer=args.tokenizer, progress=_progress("index")
    )
    print_index(counts, problems, root)
    return 0


def _progress(name: str) -> Callable[[Any], Any]:
    from rich.progress import track

    return lambda items: track(items, description=name, disable=not sys.stderr.isatty())


ANCESTOR_HELP = "The ancestor: an open_clip folder, or a file of weights (.safetensors, .pt) for the recipe's architecture."
FEATURES_HELP = "What mmlg features wrote, for recipes with engine.keep_features."
WIDTH_HELP = "Residual width of the {} tower, a multiple of its head dimension; the ancestor's where left out"


def _train(arguments: list[str]) -> int:
    parser = _parser(
        "train",
        "Train the ancestor, or (with --init) a descendant or a baseline. Started again, it goes on from its last checkpoint.",
    )
    parser.add_argument("--out", type=str, required=True, help="The run's folder.")
    parser.add_argument(
        "--init",
        type=str,
        default="ancestor",
        choices=["ancestor", "mmlg", "tleg", "sws", "scratch", "even", "distil"],
        help="What is trained.",
    )
    parser.add_argument("--image-layers", type=int, default=4, help="Depth of the image tower (not for the ancestor).")
    parser.add_argument("--text-layers", type=int, default=4, help="Depth of the text tower (not for the ancestor).")
    for tower in ("image", "text"):
        parser.add_argument(f"--{tower}-width", type=int | None, default=None, help=f"{WIDTH_HELP.format(tower)} (not for the ancestor).")
    parser.add_argument(
        "--ancestor-model",
        type=str | None,
        default=None,
        help=f"{ANCESTOR_HELP} For even, distil, and learngenes when their descendants are adapted.",
    )
    parser.add_argument("--learngene", type=str | None, default=None, help="Learngene file (mmlg, tleg, sws).")
    parser.add_argument(
        "--modality", type=str, default="both", choices=["both", "image", "text"], help="One tower alone: mmlg only, not trained."
    )
    parser.add_argument("--target-of", type=str | None, default=None, help="A finished scratch run: training stops at its quality.")
    parser.add_argument("--features", type=str | None, default=None, help=FEATURES_HELP)
    args, recipe = _parse_recipe(parser, arguments)
    from mmlg_scale.recipe import Size
    from mmlg_scale.training.run import train_ancestor, train_descendant

    if args.init == "ancestor":
        train_ancestor(recipe, Path(args.out))
    else:
        train_descendant(
            recipe,
            Path(args.out),
            init=args.init,
            size=Size(args.image_layers, args.text_layers, args.image_width, args.text_width, args.modality),
            ancestor=_path(args.ancestor_model),
            learngene=_path(args.learngene),
            target_of=_path(args.target_of),
            kept_features=_path(args.features),
        )
    return 0


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _extract(arguments: list[str]) -> int:
    parser = _parser("extract", "Distil the learngene out of an ancestor. Started again, it goes on from its last checkpoint.")
    parser.add_argument("--ancestor-model", type=str, required=True, help=ANCESTOR_HELP)
    parser.add_argument("--out", type=str, required=True, help="The run's folder; the result is OUT/learngene.safetensors.")
    parser.add_argument(
        "--method",
        type=str,
        default="mmlg",
        choices=["mmlg", "tleg", "sws"],
        help="Which settings of the recipe: extraction, or a baseline's.",
    )
    parser.add_argument("--features", type=str | None, default=None, help=FEATURES_HELP)
    args, recipe = _parse_recipe(parser, arguments)
    from mmlg_scale.training.run import extract

    extract(recipe, Path(args.ancestor_model), Path(args.out), method=args.method, kept_features=_path(args.features))
    return 0


def _features(arguments: list[str]) -> int:
    parser = _parser(
        "features",
        "Compute the ancestor's features of the training split once, for recipes with engine.keep_features. Started again, it goes on.",
    )
    parser.add_argument("--ancestor-model", type=str, required=True, help=ANCESTOR_HELP)
    parser.add_argument("--out", type=str, required=True, help="Folder to write: 4 bytes a number, one row for each image and caption.")
    args, recipe = _parse_recipe(parser, arguments)
    from mmlg_scale.training.run import write_features

    write_features(recipe, Path(args.ancestor_model), Path(args.out))
    return 0


def _descend(arguments: list[str]) -> int:
    parser = _parser("descend", "Write a descendant from a learngene file: closed form, no data, no training.")
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
    parser.add_argument("--modality", type=str, default="both", choices=["both", "image", "text"], help="Both towers, or one alone.")
    parser.add_argument("--out", type=str, required=True, help="Folder to write: open_clip.create_model('local-dir:OUT') loads it.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an export that stands there.")
    args = _parse(parser, arguments)
    for tower in ("image", "text"):
        if getattr(args, f"{tower}_layers") is None and args.modality in ("both", tower):
            raise UserError(f"--{tower}-layers is missing. Say how deep the {tower} tower shall be.")
    import time

    from mmlg_scale.learngene.file import load_learngene

    learngene = load_learngene(Path(args.learngene))
    started = time.perf_counter()
    sizes = {f"{tower}_{kind}": getattr(args, f"{tower}_{kind}") for tower in ("image", "text") for kind in ("layers", "width")}
    descendant = learngene.descend(**sizes, modality=args.modality)
    written = time.perf_counter() - started
    descendant.export(Path(args.out), overwrite=args.overwrite)
    print(f"{args.out}: composed in {written * 1e3:.1f} ms, on disk after {(time.perf_counter() - started) * 1e3:.1f} ms")
    return 0


def _eval(arguments: list[str]) -> int:
    parser = _parser("eval", "Retrieval (and, where the set has classes, zero-shot) metrics of an open_clip folder.")
    parser.add_argument("model", type=str, help="A folder that open_clip loads by local-dir:.")
    parser.add_argument("--data", type=str, required=True, help="A data set folder (mmlg data scenes / pack).")
    parser.add_argument("--split", type=str, default="test", choices=["train", "val", "test"], help="Which split.")
    parser.add_argument("--out", type=str | None, default=None, help="Write the metrics to this JSON file too.")
    args = _parse(parser, arguments)
    import json

    from mmlg_scale.evaluation.evaluate import evaluate_folder
    from mmlg_scale.files import write_json_atomic

    metrics = evaluate_folder(Path(args.model), Path(args.data), args.split)
    print(json.dumps(metrics, indent=1))
    if args.out is not None:
        write_json_atomic(Path(args.out), metrics)
    return 0


def _family(arguments: list[str]) -> int:
    parser = _parser(
        "family",
        "data -> ancestor -> learngene -> descendants and baselines -> report. Started again, it repeats nothing complete.",
    )
    parser.add_argument("--out", type=str, required=True, help="The family's folder: family.json and report.html are written there.")
    args, recipe = _parse_recipe(parser, arguments)
    from mmlg_scale.family import run_family

    run_family(recipe, Path(args.out))
    return 0


def _report(arguments: list[str]) -> int:
    parser = _parser("report", "Draw report.html again from family.json.")
    parser.add_argument("run", type=str, help="The folder of a family run.")
    args = _parse(parser, arguments)
    from mmlg_scale.report import write_report

    print(write_report(Path(args.run)))
    return 0


def _launch_local(arguments: list[str]) -> int:
    if "--" not in arguments:
        arguments = [*arguments, "--"]
    split = arguments.index("--")
    parser = _parser(
        "launch local",
        "Run any mmlg command on several local processes: mmlg launch local --num-processes 2 -- train ...",
    )
    parser.add_argument("--num-processes", type=int, default=1, help="Ranks.")
    parser.add_argument("--run-folder", type=str, default="runs/launch", help="Where state and logs are written.")
    args = _parse(parser, arguments[:split])
    command = arguments[split + 1 :]
    command = command[1:] if command[:1] == ["mmlg"] else command
    if not command:
        raise UserError("no command after --. Example: mmlg launch local --num-processes 2 -- train demo --data DIR --out DIR.")
    from mmlg_launchers import LocalLauncher, Resources

    launcher = LocalLauncher(stream=True)
    argv = [sys.executable, "-m", "mmlg_scale", *command]
    job = launcher.submit(argv, Resources(num_processes=args.num_processes), Path(args.run_folder))
    try:
        job.wait()
    except KeyboardInterrupt:
        job.cancel()
        raise
    return job.exit_code or 0


def _doctor(arguments: list[str]) -> int:
    parser = _parser(
        "doctor",
        "Check what training needs on this machine: packages, GPU, kernels, communication, memory, disk, Slurm. For each: what was found, "
        "and what to do. ok: there; absent: training goes without it; missing: training needs it, and the exit code is 1.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects with name, state, found and remedy")
    options = _parse(parser, arguments)
    import contextlib

    from mmlg_scale.doctor import examine, report

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed says things on standard output when it is imported
        findings = examine()
    return report(findings, as_json=options.json)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "data scenes": _data_scenes,
    "data pack": _data_pack,
    "data index": _data_index,
    "data check": _data_check,
    "train": _train,
    "extract": _extract,
    "features": _features,
    "descend": _descend,
    "eval": _eval,
    "family": _family,
    "report": _report,
    "launch local": _launch_local,
    "doctor": _doctor,
}
