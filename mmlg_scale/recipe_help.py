"""What a recipe can hold, in words: its sections, and each field with its type, default and the docstring below it.

A section is a nested part of the recipe down to two levels (`extraction`, `extraction.training`); deeper parts, and every optimizer, are
shown with the section that holds them. So every field is in one section.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from docstring_parser import parse_from_object

from mmlg_scale.errors import UserError
from mmlg_scale.ranges import IN_WORDS
from mmlg_scale.recipe import Optimizer, Recipe
from mmlg_scale.recipe_file import SHIPPED, dataclass_in
from mmlg_scale.runtime import Runtime

WIDTH = 100
UNSET = dataclasses.MISSING


@dataclass(frozen=True)
class Field:
    """A field of the recipe.

    Attributes:
        key: dotted; `[]` is one item of a list.
        kind: what it may be, in words.
        default: as in YAML.
        told: the docstring below it.
    """

    key: str
    kind: str
    default: str
    told: str


@dataclass
class Section:
    """A part of the recipe with a help of its own.

    Attributes:
        note: what is to be said of the section as a whole: that it may be null, or is a list.
    """

    key: str
    told: str
    note: str = ""
    fields: list[Field] = field(default_factory=list)


@functools.cache
def sections() -> dict[str, Section]:
    """Every section by its dotted key, in the order of a recipe file; "" holds the fields that are in no section."""
    found = {"": Section("", "")}
    _collect(Recipe, Recipe(), "", found[""], found)
    found["runtime"] = Section("runtime", "How it runs: ranks, workers, caches, checkpoints, trackers. It never changes the numbers.")
    _collect(Runtime, Runtime(), "runtime.", found["runtime"], found)
    return found


def _collect(cls: type, default: Any, prefix: str, section: Section, found: dict[str, Section]) -> None:
    """Add the fields of a dataclass to `section`, or to sections of their own."""
    owners = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]  # each parses its own docstrings only
    told = {param.arg_name: " ".join((param.description or "").split()) for owner in owners for param in parse_from_object(owner).params}
    kinds = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        key, kind, value = prefix + each.name, kinds[each.name], getattr(default, each.name)
        inner = dataclass_in(kind)
        if inner is None:
            section.fields.append(Field(key, in_words(kind), as_yaml(value), told[each.name]))
            continue
        is_list = any(typing.get_origin(part) is list for part in (kind, *typing.get_args(kind)))
        into = section
        if inner is not Optimizer and key.count(".") < 2:
            into = found[key] = Section(key, told[each.name], _note(kind, value, is_list))
        items = "[]." if is_list else "."
        _collect(inner, inner() if is_list or value is None else value, key + items, into, found)


def _note(kind: Any, value: Any, is_list: bool) -> str:
    if is_list and value is None:
        return "A list of mappings with these keys; null leaves it out, which is the default."
    if is_list:
        return f"A list of mappings with these keys. Default: {as_yaml([_short(item) for item in value])}."
    if type(None) not in typing.get_args(kind):
        return ""
    return "null leaves it out" + (", which is the default." if value is None else ".")


def _short(item: Any) -> dict[str, Any]:
    """An item of a list without the fields that have their default."""
    defaults = {each.name: each.default for each in dataclasses.fields(item)}
    changed = {key: value for key, value in vars(item).items() if value != defaults[key]}
    return changed or {key: value for key, value in vars(item).items() if type(value) is int}


def in_words(kind: Any) -> str:
    """A type as help says it."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    parts = typing.get_args(kind)
    if type(None) in parts:
        return ", or ".join([in_words(part) for part in parts if part is not type(None)] + ["null"])
    if typing.get_origin(kind) is list:
        return f"a list, each {in_words(parts[0])}"
    return IN_WORDS[(typing.get_origin(kind) or kind).__name__]


def as_yaml(value: Any) -> str:
    """A value as a recipe file has it, on one line."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("\n").removesuffix("\n...")


def help_text(name: str | None) -> str:
    """What `mmlg recipe --help [SECTION]` prints; `name` may be a single field too.

    Raises:
        UserError: no such section or field; names the nearest.
    """
    if name is None:
        return _overview()
    known = sections()
    if name in known:
        section = known[name]
        below = [f"  {key:24}{found.told}" for key, found in known.items() if key.startswith(f"{name}.")]
        lines = [line for line in (f"{name}: {section.told}", section.note) if line]
        if section.fields:
            lines += ["", *(line for each in section.fields for line in _lines(each))]
        return "\n".join(lines + (["", "Sections below it:", *below] if below else [])) + "\n"
    every = {each.key: each for section in known.values() for each in section.fields}
    if name in every:
        return "\n".join(_lines(every[name])) + "\n"
    names = [*filter(None, known), *every]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UserError(f"a recipe has no section {name!r}. Did you mean {near!r}? mmlg recipe --help lists the sections.")


def _lines(each: Field) -> Iterator[str]:
    yield f"  {each.key}"
    yield from textwrap.wrap(f"{each.kind}; default: {each.default}", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield from textwrap.wrap(each.told, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _overview() -> str:
    known = sections()
    top = [line for each in known[""].fields for line in _lines(each)]
    listed = [f"  {key:24}{section.told}" for key, section in known.items() if key]
    return "\n".join([*top, "", "sections:", *listed]) + "\n"


def shipped() -> dict[str, str]:
    """The shipped recipes by name, with the first sentence of the comment at the head of each file."""
    found = {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        head = " ".join(line.removeprefix("#").strip() for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")])
        found[path.stem] = head.partition(". ")[0].rstrip(".") + "."
    return found
