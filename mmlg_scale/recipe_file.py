"""Recipes as YAML files and command-line options, together with the runtime.

A recipe is a YAML file with the fields of `recipe.Recipe` and, under `runtime`, those of `runtime.Runtime`; every field can be overridden
by its dotted name (``--extraction.training.steps 200``). jsonargparse does the parsing: it is the one library that gives nested
dataclasses, YAML files, dotted overrides, ranges of numbers and help from docstrings together. The dataclasses are built here, never by
the parser.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Recipe
from mmlg_scale.runtime import Runtime

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")
SHIPPED = Path(__file__).with_name("recipes")


def new_parser(prog: str, description: str, **settings: Any) -> ArgumentParser:
    """A parser that raises instead of exiting, with help out of the docstrings below fields."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, **settings)


def add_recipe_options(parser: ArgumentParser) -> None:
    """Make every field of recipe and runtime an option of the parser, and the recipe's file one."""
    parser.add_argument("--recipe", action="config", help="The recipe: a YAML file, also given as the first argument.")
    parser.add_class_arguments(Recipe, as_group=False)
    parser.add_class_arguments(Runtime, "runtime")


def recipe_of(args: Any) -> tuple[Recipe, Runtime]:
    """Recipe and runtime out of what such a parser found. Raises UserError where fields do not go together."""
    content = args.as_dict()
    recipe = from_dict(Recipe, {field.name: content[field.name] for field in dataclasses.fields(Recipe)})
    recipe.check()
    return recipe, from_dict(Runtime, content["runtime"])


def load_recipe(name: str, **options: Any) -> tuple[Recipe, Runtime]:
    """Recipe and runtime by path or shipped name, with options by dotted key: ``load_recipe("demo", **{"data.path": "data"})``.

    Raises:
        UserError: no such recipe, an unknown key, or a value that does not fit.
    """
    path = resolve_recipe_path(name)
    check_keys(path)
    parser = new_parser("load_recipe", "")
    add_recipe_options(parser)
    try:
        args = parser.parse_args(["--recipe", str(path), *(f"--{key}={value}" for key, value in options.items())])
    except argparse.ArgumentError as error:
        raise UserError(f"recipe {name}: {' '.join(str(error).split())}") from error
    return recipe_of(args)


def to_content(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    """What a recipe file holds."""
    return recipe.to_dict() | {"runtime": dataclasses.asdict(runtime)}


def from_dict(cls: type[T], content: Mapping[str, Any]) -> T:
    """An instance of a dataclass of this module out of what the parser found: nothing but dataclasses of ours is ever built."""
    types = typing.get_type_hints(cls)

    def value_of(kind: Any, value: Any) -> Any:
        inner = dataclass_in(kind)
        if inner is None or value is None:
            return _plain(value)
        if isinstance(value, list):
            return [value_of(inner, item) for item in value]
        return from_dict(inner, value)

    return cls(**{key: value_of(types[key], value) for key, value in content.items()})


def _plain(value: Any) -> Any:
    """Numbers of the parser's restricted types as Python's own, which YAML can write."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def dataclass_in(kind: Any) -> Any:
    """The dataclass that an annotation names, looking through `| None` and `list[...]`; None where it names none."""
    return next((t for t in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(t)), None)


def check_keys(path: Path) -> None:
    """Raise UserError for the first key of the YAML file at `path` that no recipe has, naming the nearest one that exists."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Fix the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no recipe (a mapping of keys). Copy a shipped recipe and change it.")
    _check_keys(content, typing.get_type_hints(Recipe) | {"runtime": Runtime}, path, "")


def _check_keys(content: Any, types: Mapping[str, Any], path: Path, prefix: str) -> None:
    if isinstance(content, list):
        for index, item in enumerate(content):
            _check_keys(item, types, path, f"{prefix.rstrip('.')}[{index}].")
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key not in types:
            near = _elsewhere(str(key)) or prefix + difflib.get_close_matches(str(key), list(types), n=1, cutoff=0.0)[0]
            raise UserError(f"{path}: unknown recipe key {prefix}{key}. Nearest valid key: {near}.")
        inner = dataclass_in(types[key])
        if inner is not None:
            _check_keys(value, typing.get_type_hints(inner), path, f"{prefix}{key}.")


def _elsewhere(key: str) -> str | None:
    """The dotted key of a runtime setting of this name, since those are easily taken for a recipe's."""
    return f"runtime.{key}" if key in typing.get_type_hints(Runtime) else None


def resolve_recipe_path(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name (`demo`).

    Raises:
        UserError: neither exists; names the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise UserError(f"no recipe file {name!r}. Give a path to a YAML file or one of the shipped recipes: {names}.")
