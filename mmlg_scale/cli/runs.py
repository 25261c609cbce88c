"""Commands that train, or say what training will cost: train, extract, pretrain, features, family, plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlg_scale.cli.parsing import make_parser, parse_recipe, path_or_none, required
from mmlg_scale.errors import UserError
from mmlg_scale.ranges import Fraction, Layers, PositiveFloat, PositiveInt, Width
from mmlg_scale.recipe import INITS, METHODS, MODALITIES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mmlg_scale.recipe import Recipe
    from mmlg_scale.runtime import Runtime

ANCESTOR_HELP = "The ancestor: a model folder, or a file of weights (.safetensors, .pt) for the recipe's architecture."
FEATURES_HELP = "The folder that mmlg features wrote, for recipes with engine.keep_features."
WIDTH_HELP = "Width of the {} tower, a multiple of its head dimension; left out: the ancestor's."
DESCENDANT_OPTIONS = (
    *(f"{tower}-{kind}" for tower in ("image", "text") for kind in ("layers", "width")),
    *("ancestor-model", "learngene", "modality", "target-of", "features"),
)
"""Of mmlg train, with --init."""
DEFAULT_MFU = 0.4
RESUMES = "Start the same command again and it resumes from its last checkpoint, with the same numbers."


def train(arguments: list[str]) -> int:
    """mmlg train."""
    parser = make_parser(
        "train",
        "RECIPE --data.path DIR --out DIR [options]",
        f"Train the ancestor, or with --init a descendant or a baseline. {RESUMES}",
        (
            "train demo --data.path data --out runs/ancestor",
            "train demo --init mmlg --learngene runs/gene/learngene.safetensors --ancestor-model runs/ancestor/model \\\n"
            "      --image-layers 4 --text-layers 4 --data.path data --out runs/i4-t4",
        ),
    )
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help="The run's folder.")
    parser.add_argument(
        "--init",
        type=str,
        default="ancestor",
        choices=INITS,
        help="What is trained. mmlg, direct, tleg, sws: a descendant of that learngene; scratch: random weights; even: every n-th layer of "
        "the ancestor; distil: random weights with the ancestor as teacher.",
    )
    _add_descendant(parser)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "out")
    from mmlg_scale.recipe import Size
    from mmlg_scale.training.roles import AncestorRole, DescendantRole, Role
    from mmlg_scale.training.run import run_role

    role: Role = AncestorRole(recipe)
    if args.init == "ancestor":
        given = next((name for name in DESCENDANT_OPTIONS if getattr(args, name.replace("-", "_")) is not None), None)
        if given is not None:
            raise UserError(
                f"--{given} is of a descendant or a baseline, and the ancestor is trained. Say which with --init, or leave it out."
            )
    else:
        other = {"image": "text", "text": "image"}.get(args.modality or "both")
        for kind in ("layers", "width"):
            if getattr(args, f"{other}_{kind}", None) is not None:
                raise UserError(f"--{other}-{kind} is given, and --modality {args.modality} has no {other} tower. Leave it out.")
        role = DescendantRole(
            recipe,
            args.init,
            Size(args.image_layers or 4, args.text_layers or 4, args.image_width, args.text_width, args.modality or "both"),
            ancestor=path_or_none(args.ancestor_model),
            learngene=path_or_none(args.learngene),
            target_of=path_or_none(args.target_of),
            features=path_or_none(args.features),
        )
    run_role(role, Path(args.out), runtime)
    return 0


def _add_descendant(parser: ArgumentParser) -> None:
    """The options of mmlg train that say which descendant or baseline."""
    group = parser.add_argument_group("descendants and baselines (with --init)")
    for tower in ("image", "text"):
        help_text = f"Depth of the {tower} tower. Default: 4."
        group.add_argument(f"--{tower}-layers", type=Layers | None, default=None, metavar="N", help=help_text)
        group.add_argument(f"--{tower}-width", type=Width | None, default=None, metavar="N", help=WIDTH_HELP.format(tower))
    group.add_argument(
        "--ancestor-model",
        type=str | None,
        default=None,
        metavar="PATH",
        help=f"{ANCESTOR_HELP} For even and distil, and for adapting descendants.",
    )
    group.add_argument("--learngene", type=str | None, default=None, metavar="FILE", help="The learngene, for mmlg, direct, tleg and sws.")
    group.add_argument(
        "--modality",
        type=str | None,
        default=None,
        choices=(*MODALITIES, None),
        metavar="{" + ",".join(MODALITIES) + "}",
        help="Both towers, or one, which is not trained (mmlg only). Default: both.",
    )
    help_text = "A finished scratch run: training stops once it has reached that run's quality."
    group.add_argument("--target-of", type=str | None, default=None, metavar="DIR", help=help_text)
    group.add_argument("--features", type=str | None, default=None, metavar="DIR", help=FEATURES_HELP)


def extract(arguments: list[str]) -> int:
    """mmlg extract."""
    parser = make_parser(
        "extract",
        "RECIPE --ancestor-model PATH --data.path DIR --out DIR [options]",
        f"Distil the learngene out of an ancestor, trained here or elsewhere. {RESUMES}",
        (
            "extract demo --ancestor-model runs/ancestor/model --data.path data --out runs/gene",
            "extract vit-b-32 --ancestor-model weights.safetensors --data.path data --out runs/gene --extraction.training.steps 2000",
        ),
    )
    parser.add_argument("--ancestor-model", type=str | None, default=None, metavar="PATH", help=ANCESTOR_HELP)
    help_text = "The run's folder; the result is DIR/learngene.safetensors."
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=help_text)
    help_text = "mmlg takes the settings of extraction; tleg and sws those of baselines.tleg and baselines.sws."
    parser.add_argument("--method", type=str, default="mmlg", choices=METHODS, help=help_text)
    parser.add_argument("--features", type=str | None, default=None, metavar="DIR", help=FEATURES_HELP)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "ancestor-model", "out")
    from mmlg_scale.training.learngene_roles import ExtractionRole
    from mmlg_scale.training.run import run_role

    run_role(ExtractionRole(recipe, Path(args.ancestor_model), args.method, path_or_none(args.features)), Path(args.out), runtime)
    return 0


def pretrain(arguments: list[str]) -> int:
    """mmlg pretrain."""
    parser = make_parser(
        "pretrain",
        "RECIPE --data.path DIR --out DIR [options]",
        "Train a learngene directly on the pairs, by the contrastive loss at a random depth each step: no ancestor is needed. Descendants "
        f"of any size come out of its file. {RESUMES}",
        (
            "pretrain demo --data.path data --out runs/direct",
            "pretrain my-recipe.yaml --learngene runs/gene/learngene.safetensors --data.path data --out runs/further",
        ),
    )
    help_text = "Continue from this learngene, extracted or pre-trained, of the recipe's structure. Left out: from random weights."
    parser.add_argument("--learngene", type=str | None, default=None, metavar="FILE", help=help_text)
    help_text = (
        "Continue with the settings of extraction.continuation (mmlg), or of baselines.tleg.continuation, baselines.sws.continuation. "
    )
    help_text += "Left out: with those of pretraining."
    parser.add_argument("--method", type=str | None, default=None, choices=METHODS, help=help_text)
    help_text = "The run's folder; the result is DIR/learngene.safetensors."
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=help_text)
    parsed = parse_recipe(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    required(args, "out")
    from mmlg_scale.training.learngene_roles import PretrainingRole
    from mmlg_scale.training.run import run_role

    run_role(PretrainingRole(recipe, path_or_none(args.learngene), args.method), Path(args.out), runtime)
    return 0


def features(arguments: list[str]) -> int:
    """mmlg features."""
    parser = make_parser(
        "features",
        "RECIPE --ancestor-model PATH --data.path DIR --out DIR",
        "Compute the ancestor's features of every training image and caption once, for recipes with engine.keep_features: later runs read "
        "them instead of running the ancestor. Start the same command again and it resumes.",
        (
            "features my-recipe.yaml --ancestor-model runs/ancestor/model --data.path data --out runs/features",
            "extract my-recipe.yaml --features runs/features --ancestor-model runs/ancestor/model --data.path data --out runs/gene",
        ),
    )
    parser.add_argument("--ancestor-model", type=str | None, default=None, metavar="PATH", help=ANCESTOR_HELP)
    help_text = "Folder to write: one row for each image and caption, 4 bytes a number."
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=help_text)
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
    parsed = parse_family_command(arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    from mmlg_scale.family import run_family

    run_family(recipe, runtime, Path(args.out))
    return 0


def parse_family_command(arguments: list[str]) -> tuple[Any, Recipe, Runtime] | None:
    """What mmlg family is asked to do: its options, `out` among them, recipe and runtime."""
    parser = make_parser(
        "family",
        "RECIPE --out DIR [--data.path DIR] [options]",
        "The whole job: data, ancestor, learngene, descendants and baselines, report. Start the same command again and it runs what is not "
        "complete yet; with a changed recipe, only what depends on the change. mmlg plan shows the steps and what they cost first.",
        (
            "family demo --out runs/demo",
            "family my-recipe.yaml --data.path data --ancestor runs/ancestor --out runs/mine",
        ),
    )
    help_text = "The family's folder: DIR/family.json and DIR/report.html are the result."
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=help_text)
    add_ancestor(parser)
    parsed = parse_family(parser, arguments)
    if parsed is not None:
        required(parsed[0], "out")
    return parsed


def plan(arguments: list[str]) -> int:
    """mmlg plan."""
    parser = make_parser(
        "plan",
        "RECIPE [--data.path DIR] [--out DIR] [options]",
        "Show the steps of mmlg family before anything runs: parameters, FLOPs, memory, disk, and an estimate of the time. Where --out "
        "already contains a family, its complete steps are shown as kept. Nothing is written.",
        (
            "plan demo",
            "plan vit-l-14 --data.path data --cluster my-site.yaml --nodes 4 --benchmark runs/benchmark/benchmark.json",
        ),
    )
    parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help="The family's folder, to see what is complete in it.")
    add_ancestor(parser)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of the table, for scripts.")
    group = parser.add_argument_group("time")
    help_text = "Peak of one device. Left out: a GPU's data-sheet bf16 peak, or the matrix products of this CPU, measured for 0.2 s."
    group.add_argument("--flops-per-second", type=PositiveFloat | None, default=None, metavar="X", help=help_text)
    help_text = "Fraction of the peak that training reaches (model FLOPs utilisation). Your own runs print theirs."
    group.add_argument("--mfu", type=Fraction | None, default=None, metavar="X", help=f"{help_text} Left out: {DEFAULT_MFU}.")
    help_text = "A cluster file (or the name of a shipped one): memory a GPU, time and GPU-hours on its GPUs."
    group.add_argument("--cluster", type=str | None, default=None, metavar="FILE", help=help_text)
    help_text = "Nodes of the cluster on which a step runs."
    group.add_argument("--nodes", type=PositiveInt | None, default=None, metavar="N", help=f"{help_text} Default: 1.")
    help_text = "benchmark.json of mmlg benchmark on such GPUs: its MFU instead of an assumed one."
    group.add_argument("--benchmark", type=str | None, default=None, metavar="FILE", help=help_text)
    parsed = parse_family(parser, arguments)
    if parsed is None:
        return 0
    args, recipe, runtime = parsed
    if args.cluster is None and args.nodes is not None:
        raise UserError("--nodes needs --cluster, which says what a node is. Give both, or neither.")
    if args.cluster is None and args.benchmark is not None:
        raise UserError("--benchmark needs --cluster, whose GPUs it was measured on. Give both, or --mfu.")
    from mmlg_scale.forecast import forecast, print_forecast

    hardware = None
    if args.cluster is not None:
        from mmlg_scale.hardware import hardware_of

        hardware = hardware_of(
            args.cluster,
            nodes=args.nodes or 1,
            precision=recipe.engine.precision,
            model=str(recipe.model.architecture),
            default_mfu=DEFAULT_MFU,
            given_mfu=args.mfu,
            peak_flops=args.flops_per_second,
            benchmark=path_or_none(args.benchmark),
        )
    mfu = DEFAULT_MFU if args.mfu is None else args.mfu
    found = forecast(recipe, runtime, path_or_none(args.out), peak_flops=args.flops_per_second, mfu=mfu, hardware=hardware)
    print_forecast(found, as_json=args.json)
    return 0


def add_ancestor(parser: ArgumentParser) -> None:
    """The option of commands on a whole family whose ancestor exists."""
    parser.add_argument(
        "--ancestor-model",
        type=str | None,
        default=None,
        metavar="PATH",
        help="An ancestor that exists: the folder of an mmlg train run (its cost is counted), a model folder, or a file of weights. "
        "--ancestor PATH says the same.",
    )


def parse_family(parser: ArgumentParser, arguments: list[str]) -> tuple[Any, Recipe, Runtime] | None:
    """`parse_recipe` of commands on a whole family; an ancestor that is given becomes the recipe's weights."""
    # --ancestor is the name of a section of the recipe too, which no plain word can be the value of.
    for index, word in enumerate(arguments):
        if word == "--ancestor" or word.startswith("--ancestor="):
            arguments = [*arguments[:index], word.replace("--ancestor", "--ancestor-model", 1), *arguments[index + 1 :]]
    return parse_recipe(parser, arguments, _take_ancestor)


def _take_ancestor(args: Any, recipe: Recipe) -> None:
    if args.ancestor_model is not None:
        run = Path(args.ancestor_model)
        weights = run / "model" if (run / "model").is_dir() else run
        recipe.model = dataclasses.replace(recipe.model, weights=str(weights.absolute()))
