"""What commands share: parsers, recipes as options, errors in one line."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlg_scale.errors import UserError
from mmlg_scale.reading import shown

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from mmlg_scale.recipe import Recipe
    from mmlg_scale.runtime import Runtime


def nearest(word: str, choices: Sequence[str]) -> str:
    """ " Did you mean ...?" with the nearest choice, or nothing."""
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    return f" Did you mean {found[0]!r}?" if found else ""


def _instead(word: str, options: Sequence[str]) -> str:
    """A sentence for an unknown option: the nearest one, or in a small section of the recipe without a similar key all of that section."""
    section, dot, key = word.rpartition(".")
    siblings = [option.removeprefix(f"{section}.") for option in options if option.startswith(f"{section}.") and option[-1] != "+"]
    if dot and 0 < len(siblings) <= 8 and not difflib.get_close_matches(key, siblings, cutoff=0.7):
        return f" Valid: {', '.join(f'{section}.{name}' for name in siblings)}."
    return nearest(word, options)


def make_parser(name: str, usage: str, description: str, examples: Sequence[str]) -> ArgumentParser:
    """The parser of a command.

    Args:
        usage: what follows `mmlg NAME` in the usage line.
        examples: what follows `mmlg ` in the examples that end the help.
    """
    from mmlg_scale.cli.formatter import EXAMPLES, HelpFormatter
    from mmlg_scale.recipe_file import new_parser

    return new_parser(
        f"mmlg {name}",
        description,
        usage=f"mmlg {name} {usage}",
        epilog="\n".join([EXAMPLES, *(f"  mmlg {example}" for example in examples)]),
        formatter_class=HelpFormatter,
    )


class _Parsed(Exception):
    """A command's options are right, and the command is not to run."""


_only_parses = ContextVar("_only_parses", default=False)


def require_options(command: Callable[[], Any]) -> None:
    """Raise UserError where `command`, which parses its options first, would refuse them; it does not run."""
    token = _only_parses.set(True)
    try:
        command()
    except _Parsed:
        pass
    finally:
        _only_parses.reset(token)


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Any:
    """Parse, turning what argparse says of a mistake into one line with the nearest valid option."""
    options = {option for action in parser._actions for option in action.option_strings}
    try:
        args = parser.parse_args([_underscored(word, options) for word in arguments])
        out = str(getattr(args, "out", None))
        if "://" in out:
            raise UserError(
                f"--out {shown(out)} is a URL: results are written on this machine. Give a folder, and copy it when it is complete."
            )
        if _only_parses.get():
            raise _Parsed
        return args
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        message = in_words(" ".join(str(error).split()))
        unknown = [word.split("=")[0] for word in message.split() if word.startswith("--")]
        hint = _instead(unknown[0], sorted(options)) if message.startswith("unrecognized") and unknown else ""
        raise UserError(f"{message}.{hint} See {parser.prog} --help.") from error


def in_words(message: str) -> str:
    """What the parser says of a value that does not fit, in words: key, value, and what it may be. Other messages stay as they are."""
    from mmlg_scale.ranges import IN_WORDS
    from mmlg_scale.recipe_file import kind_of, may_be_null

    keys = re.findall(r'Parser key "([^"]+)"', message)
    wanted = [IN_WORDS[name] for name in re.findall(r"Not of type (\w+)", message) if name in IN_WORDS]
    wanted += [f"one of {choices}" for choices in re.findall(r"Expected a typing\.Literal\[([^\]]*)\]", message)]
    kinds = re.findall(r"Expected an? <class '(\w+)'>", message)
    wanted += [IN_WORDS[kind] for kind in kinds if kind in IN_WORDS]
    if not keys or not wanted:
        return message.rstrip(".")
    values = re.findall(
        r"(?:: (\S+) does not conform|base 10: ('[^']*')|could not convert string to float: ('[^']*')|val='([^']*)'|val=(None)\))", message
    )
    values = [next(filter(None, found)) for found in values] or re.findall(r"(?:Given|Got) value: (.+?)\.?$", message)
    value = f" {values[0].replace('None', 'null')} does not fit" if values else " does not fit"
    # The parser says None of a section that may be null, too.
    null = " or null" if "NoneType" in kinds and (kind := kind_of(".".join(keys))) is not None and may_be_null(kind) else ""
    return f"{'.'.join(keys)}:{value}. Use {' or '.join(dict.fromkeys(wanted))}{null}"


def _underscored(word: str, options: set[str]) -> str:
    """Recipe fields are spelled with underscores, command options with hyphens; both spellings of either are understood."""
    name, equals, value = word.partition("=")
    for other in ("--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")):
        if name.startswith("--") and name not in options and other in options:
            return other + equals + value
    return word


RECIPE_FIELDS = (
    "Every field of the recipe is an option too: --data.path DIR, --extraction.training.steps 200, --runtime.num_workers 8. "
    "mmlg recipe --help lists them."
)


def required(args: Any, *names: str) -> None:
    """Raise UserError for the first option that was not given. Checked here so that --print-config needs none of them."""
    for name in names:
        if getattr(args, name.replace("-", "_")) is None:
            raise UserError(f"--{name} is missing. See --help.")


def parse_recipe(
    parser: ArgumentParser, arguments: list[str], adjust: Callable[[Any, Recipe], None] = lambda args, recipe: None
) -> tuple[Any, Recipe, Runtime] | None:
    """Parse a command whose first argument is a recipe; every field of recipe and runtime is an option of the command.

    With --print-config, prints the resolved recipe, a valid recipe file, and returns None. --help leaves the fields out: there are hundreds
    of them, and `mmlg recipe --help` lists them.

    Args:
        adjust: what the command's other options change in the recipe.
    """
    import yaml

    from mmlg_scale.recipe_file import add_recipe_options, check_keys, recipe_of, resolve_recipe_path, take_config_options, to_content

    group = parser.add_argument_group("recipe", RECIPE_FIELDS)
    group.add_argument("--print-config", action="store_true", help="Print the recipe with all its fields, a valid recipe file, and stop.")
    if {"-h", "--help"} & set(arguments):
        parser.add_argument("RECIPE", help="A YAML file, or the name of a shipped recipe: mmlg recipe lists them.")
        parse(parser, ["--help"])
    add_recipe_options(parser)
    if arguments and not arguments[0].startswith("-"):
        path = resolve_recipe_path(arguments[0])
        arguments = ["--recipe", str(path), *arguments[1:]]
    elif not any(word.startswith(("--recipe", "--model", "--print-config")) for word in arguments):
        raise UserError(f"RECIPE is missing. It comes first: {parser.prog} RECIPE ...; mmlg recipe lists the shipped ones.")
    for index, word in enumerate(arguments):
        if word == "--recipe" or word.startswith("--recipe="):
            check_keys(Path(word.partition("=")[2] or "".join(arguments[index + 1 : index + 2])))
    arguments, config_options = take_config_options(arguments)
    args = parse(parser, arguments)
    recipe, runtime = recipe_of(args, config_options)
    adjust(args, recipe)
    if args.print_config:
        yaml.safe_dump(to_content(recipe, runtime), sys.stdout, sort_keys=False)
        return None
    return args, recipe, runtime


def path_or_none(value: str | None) -> Path | None:
    """A path option that may be left out."""
    return None if value is None else Path(value)


def progress(name: str) -> Callable[[Any], Any]:
    """A progress bar around an iterable, on a terminal."""
    from rich.progress import track

    from mmlg_scale.terminal import Terminal

    return lambda items: track(items, description=name, console=Terminal(stderr=True), disable=not sys.stderr.isatty())
