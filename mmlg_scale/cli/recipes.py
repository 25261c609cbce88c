"""mmlg recipe: which recipes ship, what one holds, and what a field means."""

from __future__ import annotations

import textwrap

from mmlg_scale.cli.parsing import make_parser, parse_recipe
from mmlg_scale.errors import UserError

HELP = """usage: mmlg recipe [show RECIPE [options]]
       mmlg recipe --help [SECTION]

Without arguments: list the shipped recipes. show: print a recipe, shipped or your own, with all its fields;
what is printed is a recipe file to start your own from. --help SECTION: every field of a section.

{fields}
examples:
  mmlg recipe --help extraction.training
  mmlg recipe show vit-b-32 --extraction.training.steps 2000
"""


def recipe(arguments: list[str]) -> int:
    """mmlg recipe."""
    from mmlg_scale.recipe_help import help_text, shipped

    if not arguments:
        for name, told in shipped().items():
            print(textwrap.fill(told, 110, initial_indent=f"{name:10}", subsequent_indent=" " * 10))
        print("\nmmlg recipe show NAME prints one; mmlg recipe --help says what each field means.")
        return 0
    if {"-h", "--help", "help"} & set(arguments):
        names = [word for word in arguments if word not in ("-h", "--help", "help", "show")]
        print(help_text(names[0]) if names else HELP.format(fields=help_text(None)), end="")
        return 0
    if arguments[0] != "show":
        raise UserError(f"mmlg recipe {arguments[0]}: no such command. Use show RECIPE, or --help SECTION.")
    if len(arguments) < 2:
        raise UserError("mmlg recipe show needs a recipe: a YAML file, or the name of a shipped one. mmlg recipe lists them.")
    parser = make_parser("recipe show", "RECIPE [options]", "Print a recipe with all its fields.", ())
    parse_recipe(parser, [*arguments[1:], "--print-config"])
    return 0
