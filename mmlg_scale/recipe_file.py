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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmlg_scale.bounds import MAX_RECIPE_BYTES, MAX_YAML_DEPTH, MAX_YAML_VALUES
from mmlg_scale.errors import UserError
from mmlg_scale.reading import one_line, read_text, shown
from mmlg_scale.recipe import Recipe
from mmlg_scale.runtime import Runtime

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")
SHIPPED = Path(__file__).with_name("recipes")
_CONFIG, _BASELINES = "--model.config.", "--baselines."
_NULLS = ("null", "Null", "NULL", "~")


def new_parser(prog: str, description: str, **settings: Any) -> ArgumentParser:
    """A parser that raises instead of exiting, with help out of the docstrings below fields."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _bound_yaml()
    return ArgumentParser(prog=prog, description=description, exit_on_error=False, **settings)


def add_recipe_options(parser: ArgumentParser) -> None:
    """Make every field of recipe and runtime an option of the parser, and the recipe's file one."""
    parser.add_argument("--recipe", action="config", help="The recipe: a YAML file, also given as the first argument.")
    parser.add_class_arguments(Recipe, as_group=False)
    parser.add_class_arguments(Runtime, "runtime")


def take_config_options(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Options such as --model.config.vision_cfg.layers=4, by dotted key below model.config, and the other words.

    The parser would replace the whole of vision_cfg by the one key, because the recipe has a free mapping there.

    Raises:
        UserError: a value is missing, or no YAML.
    """
    import yaml

    others, found, left = list[str](), dict[str, Any](), iter(_spell_nulls(words))
    for word in left:
        if not word.startswith(_CONFIG):
            others.append(word)
            continue
        key, equals, value = word.partition("=")
        text = value if equals else next(left, None)
        if text is None:
            raise UserError(f"{key}: expected one argument.")
        try:
            check_yaml(text)
            found[key.removeprefix(_CONFIG)] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            raise UserError(f"{key}: {shown(text)!r} is not valid YAML ({one_line(error)}).") from error
    return others, found


def _spell_nulls(words: Sequence[str]) -> Iterator[str]:
    """The words, where a null two levels below a baseline (--baselines.tleg.loss.teacher_pool null) is a mapping of its key.

    The parser would make the word None of it; a mapping it merges with the section's other keys.

    Raises:
        UserError: a section that may be null has no such key, or one that may not be is null, of which the parser would tell in terms of
            its own.
    """
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        kind = kind_of(option.removeprefix("--")) if option.startswith("--") else None
        section = dataclass_in(kind)
        if section is not None and not may_be_null(kind) and (value if equals else following).strip() in _NULLS:
            raise UserError(f"{option}: is null, and has keys: {', '.join(typing.get_type_hints(section))}. Give one of them.")
    left = iter(words)
    for word in left:
        option, equals, value = word.partition("=")
        kind = kind_of(option.removeprefix("--")) if option.startswith("--") else None
        if not option.startswith(_BASELINES) or option.count(".") < 3 or not may_be_null(kind):
            yield word
            continue
        text = value if equals else next(left, None)
        if text is not None and text.strip() in _NULLS:
            section, _, name = option.rpartition(".")
            yield f"{section}={{{name}: null}}"
        else:
            yield word
            if not equals and text is not None:
                yield text


def kind_of(dotted: str) -> Any:
    """The annotation of a recipe's key; None for what is no key. Raises UserError below a section that may be null and has no such key."""
    kind, prefix, within_optional = Any, "", False
    types = typing.get_type_hints(Recipe)
    for name in dotted.split("."):
        if name not in types:
            if within_optional:
                raise UserError(f"--{dotted}: unknown recipe key {prefix}{name}. {_instead(name, list(types), prefix)}")
            return None
        kind, prefix = types[name], f"{prefix}{name}."
        section = dataclass_in(kind)
        if section is None:
            return kind if prefix == f"{dotted}." else None  # what is below a value is the parser's to judge
        types, within_optional = typing.get_type_hints(section), within_optional or may_be_null(kind)
    return kind


def may_be_null(kind: Any) -> bool:
    """Whether an annotation allows null."""
    return type(None) in typing.get_args(kind)


def recipe_of(args: Any, config_options: Mapping[str, Any] | None = None) -> tuple[Recipe, Runtime]:
    """Recipe and runtime out of what such a parser, and `take_config_options`, found.

    Raises:
        UserError: fields do not go together.
    """
    content = args.as_dict()
    for dotted, value in (config_options or {}).items():
        *parents, key = dotted.split(".")
        place = content["model"]["config"] = dict(content["model"]["config"] or {})
        for parent in parents:
            inner = place.get(parent)
            place[parent] = dict(inner) if isinstance(inner, dict) else {}
            place = place[parent]
        place[key] = value
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
        words, config_options = take_config_options([f"--{key}={'null' if value is None else value}" for key, value in options.items()])
        args = parser.parse_args(["--recipe", str(path), *words])
    except argparse.ArgumentError as error:
        raise UserError(f"recipe {name}: {' '.join(str(error).split())}") from error
    return recipe_of(args, config_options)


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
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def dataclass_in(kind: Any) -> Any:
    """The dataclass that an annotation names, looking through `| None` and `list[...]`; None where it names none."""
    if dataclasses.is_dataclass(kind):
        return kind
    return next((found for part in typing.get_args(kind) if (found := dataclass_in(part)) is not None), None)


def check_yaml(text: str) -> None:
    """Look at a YAML text value by value, before anything is built of it.

    Raises:
        yaml.YAMLError: more than MAX_YAML_DEPTH deep, or more than MAX_YAML_VALUES with every alias written out (a few lines of aliases of
            aliases can stand for billions); a key twice in one mapping, of which YAML's readers silently take the last; or no YAML.
    """
    import yaml

    keys: list[set[str] | None] = []  # of the open mappings; None: a sequence
    is_key: list[bool] = []  # whether the next value in it is a key

    def place(event: yaml.Event) -> None:
        if not keys or keys[-1] is None:
            return
        if is_key[-1] and isinstance(event, yaml.ScalarEvent):
            if event.value in keys[-1] and event.value != "<<":
                raise yaml.YAMLError(f"the key {event.value} is there twice in one mapping")
            keys[-1].add(event.value)
        is_key[-1] = not is_key[-1]

    sizes: dict[str, int] = {}
    open_parts: list[tuple[str | None, int]] = []  # anchor, and values before it
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.NodeEvent):
            place(event)
        if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
            is_key.append(True)
            open_parts.append((event.anchor, total))
            total += 1
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            anchor, before = open_parts.pop()
            keys.pop(), is_key.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"*{event.anchor} is an alias of something around itself, or for nothing")
            total += sizes[event.anchor]
        if total > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"more than {MAX_YAML_VALUES:,} values, its aliases written out")
        if len(open_parts) > MAX_YAML_DEPTH:
            raise yaml.YAMLError(f"nested more than {MAX_YAML_DEPTH} deep")


def _bound_yaml() -> None:
    """Have the parser look at every file and every value before it reads them: an option can name a file too."""
    from jsonargparse import get_loader, set_loader
    from yaml import YAMLError

    load = get_loader("yaml")
    if getattr(load, "is_bounded", False):
        return

    def load_bounded(text: str) -> Any:
        if len(text) > MAX_RECIPE_BYTES:
            raise YAMLError(f"{len(text)} characters, at most {MAX_RECIPE_BYTES} are supported")
        check_yaml(text)
        try:
            return load(text)
        except (ValueError, OverflowError, RecursionError) as error:
            raise YAMLError(one_line(error)) from error

    load_bounded.is_bounded = True  # type: ignore[attr-defined]
    set_loader("yaml", load_bounded, (YAMLError,))


def check_keys(path: Path) -> None:
    """Raise UserError for the first key of the YAML file at `path` that no recipe has, naming the nearest one that exists."""
    import yaml

    text = read_text(path, "recipe", "Fix the file.", MAX_RECIPE_BYTES)
    try:
        check_yaml(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {shown(' '.join(str(error).split()))}. Fix the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no recipe (a mapping of keys). Copy a shipped recipe and change it.")
    _check_keys(content, typing.get_type_hints(Recipe) | {"runtime": Runtime}, path, "")


def _check_keys(content: Any, types: Mapping[str, Any], path: Path, prefix: str) -> None:
    if isinstance(content, list):
        for index, item in enumerate(content):
            _check_keys(item, types, path, f"{prefix.rstrip('.')}[{index}].")
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key not in types:
            raise UserError(f"{path}: unknown recipe key {prefix}{shown(key)}. {_instead(str(key), list(types), prefix)}")
        inner = dataclass_in(types[key])
        if inner is not None:
            # The parser would take a text for the name of another file to read.
            parts = value if isinstance(value, list) else [value]
            if None in parts and not (value is None and may_be_null(types[key])):
                raise UserError(f"{path}: recipe key {prefix}{key} is empty. Give a mapping of keys, or leave it out.")
            if any(not isinstance(part, dict) and part is not None for part in parts):
                raise UserError(f"{path}: recipe key {prefix}{key} is {shown(value)!r}. Give a mapping of keys.")
            _check_keys(value, typing.get_type_hints(inner), path, f"{prefix}{key}.")


def _instead(key: str, valid: list[str], prefix: str) -> str:
    """What to write in place of an unknown key: the nearest one, or of a small section without a similar one all."""
    if prefix and len(valid) <= 8 and not difflib.get_close_matches(key, valid, cutoff=0.7) and _elsewhere(key) is None:
        return f"Valid keys: {', '.join(prefix + name for name in valid)}."
    return f"Nearest valid key: {_elsewhere(key) or prefix + difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]}."


def _elsewhere(key: str) -> str | None:
    """The dotted key of a runtime setting of this name, since those are easily taken for a recipe's."""
    return f"runtime.{key}" if key in typing.get_type_hints(Runtime) else None


def resolve_recipe_path(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name (`demo`).

    Raises:
        UserError: neither exists; names the shipped ones.
    """
    path = Path(name)
    if path.is_file() or (os.path.lexists(path) and not path.is_dir()):
        return path  # a pipe is refused where it is read
    shipped = SHIPPED / f"{name}.yaml"
    if path.name == name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise UserError(f"no recipe file {name!r}. Give a path to a YAML file or one of the shipped recipes: {names}.")
