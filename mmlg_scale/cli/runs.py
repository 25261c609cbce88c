"""Commands that train: train, extract, features, family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmlg_scale.cli.parsing import make_parser, parse_recipe, path_or_none, required
from mmlg_scale.ranges import PositiveInt
from mmlg_scale.recipe import INITS, METHODS, MODALITIES

ANCESTOR_HELP = "The ancestor: a model folder, or a file of weights (.safetensors, .pt) for the recipe's architecture."
FEATURES_HELP = "What mmlg features wrote, for recipes with engine.keep_features."
WIDTH_HELP = "Residual width of the {} tower, a multiple of its head dimension; the ancestor's where left out"


def train(arguments: list[str]) -> int:
    """mmlg train."""
    parser = make_parser(
        "train",
        "Train the ancestor, or (with --init) a descendant or a baseline. Started again, it resumes from its last checkpoint.",
    )
    parser.add_argument("--out", type=str | None, default=None, help="The run's folder.")
    parser.add_argument("--init", type=str, default="ancestor", choices=INITS, help="What is trained.")
    for tower in ("image", "text"):
        help_text = f"Depth of the {tower} tower (not for the ancestor)."
        parser.add_argument(f"--{tower}-layers", type=PositiveInt, default=4, help=help_text)
        help_text = f"{WIDTH_HELP.format(tower)} (not for the ancestor)."
        parser.add_argument(f"--{tower}-width", type=PositiveInt | None, default=None, help=help_text)
    parser.add_argument(
        "--ancestor-model",
        type=str | None,
        default=None,
        help=f"{ANCESTOR_HELP} For even, distil, and learngenes when their descendants are adapted.",
    )
    parser.add_argument("--learngene", type=str | None, default=None, help="Learngene file (mmlg, tleg, sws).")
    parser.add_argument("--modality", type=str, default="both", choices=MODALITIES, help="One tower alone: mmlg only, not trained.")
    parser.add_argument("--target-of", type=str | None, default=None, help="A finished scratch run: training stops at its quality.")
    parser.add_argument("--features", type=str | None, default=None, help=FEATURES_HELP)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "out")
    from mmlg_scale.recipe import Size
    from mmlg_scale.training.roles import AncestorRole, DescendantRole, Role
    from mmlg_scale.training.run import run_role

    role: Role = AncestorRole(recipe)
    if args.init != "ancestor":
        role = DescendantRole(
            recipe,
            args.init,
            Size(args.image_layers, args.text_layers, args.image_width, args.text_width, args.modality),
            ancestor=path_or_none(args.ancestor_model),
            learngene=path_or_none(args.learngene),
            target_of=path_or_none(args.target_of),
            features=path_or_none(args.features),
        )
    run_role(role, Path(args.out), runtime)
    return 0


def extract(arguments: list[str]) -> int:
    """mmlg extract."""
    parser = make_parser("extract", "Distil the learngene out of an ancestor. Started again, it resumes from its last checkpoint.")
    parser.add_argument("--ancestor-model", type=str | None, default=None, help=ANCESTOR_HELP)
    parser.add_argument("--out", type=str | None, default=None, help="The run's folder; the result is OUT/learngene.safetensors.")
    parser.add_argument("--method", type=str, default="mmlg", choices=METHODS, help="Whose settings: extraction's, or a baseline's.")
    parser.add_argument("--features", type=str | None, default=None, help=FEATURES_HELP)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "ancestor-model", "out")
    from mmlg_scale.training.roles import ExtractionRole
    from mmlg_scale.training.run import run_role

    run_role(ExtractionRole(recipe, Path(args.ancestor_model), args.method, path_or_none(args.features)), Path(args.out), runtime)
    return 0


def features(arguments: list[str]) -> int:
    """mmlg features."""
    parser = make_parser(
        "features",
        "Compute the ancestor's features of the training split once, for recipes with engine.keep_features. Started again, it resumes.",
    )
    parser.add_argument("--ancestor-model", type=str | None, default=None, help=ANCESTOR_HELP)
    help_text = "Folder to write: 4 bytes a number, one row for each image and caption."
    parser.add_argument("--out", type=str | None, default=None, help=help_text)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "ancestor-model", "out")
    from mmlg_scale.training.run import write_features

    write_features(recipe, Path(args.ancestor_model), Path(args.out), runtime)
    return 0


def family(arguments: list[str]) -> int:
    """mmlg family."""
    parser = make_parser(
        "family",
        "data -> ancestor -> learngene -> descendants and baselines -> report. Started again, it runs what is not complete, and after a "
        "change of the recipe what depends on the change.",
    )
    parser.add_argument("--out", type=str | None, default=None, help="The family's folder: family.json and report.html are written there.")
    parser.add_argument(
        "--ancestor-model",
        type=str | None,
        default=None,
        help="An ancestor that exists: the folder of an mmlg train run (its cost is counted) or a model folder. Also --ancestor DIR.",
    )
    # --ancestor is the name of a section of the recipe too, which no plain word can be the value of.
    for index, word in enumerate(arguments):
        if word == "--ancestor" or word.startswith("--ancestor="):
            arguments = [*arguments[:index], word.replace("--ancestor", "--ancestor-model", 1), *arguments[index + 1 :]]
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "out")
    if args.ancestor_model is not None:
        run = Path(args.ancestor_model)
        weights = run / "model" if (run / "model").is_dir() else run
        recipe.model = dataclasses.replace(recipe.model, weights=str(weights.absolute()))
    from mmlg_scale.family import run_family

    run_family(recipe, runtime, Path(args.out))
    return 0
