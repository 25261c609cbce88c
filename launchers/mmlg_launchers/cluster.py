"""What is peculiar to a site, as a YAML file: partition, account, modules, environment, container. Nothing of it is in code."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlg_launchers.interface import LaunchError

SHIPPED = Path(__file__).with_name("clusters")
MAX_BYTES = 100_000
OWN_OPTIONS = frozenset(
    (
        "partition",
        "account",
        "qos",
        "constraint",
        "exclude",
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "gres",
        "mem",
        "time",
        "array",
        "dependency",
        "kill-on-invalid-dep",
        "signal",
        "requeue",
        "open-mode",
        "output",
        "error",
        "chdir",
        "export",
        "job-name",
        "wrap",
    )
)
"""Options of sbatch that have a key or an option of their own, or that the batch script relies on."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass
class Container:
    """An image in which the ranks run."""

    image: str
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees: FROM:TO."""


@dataclass
class Cluster:
    """A site's settings."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: list[str] = field(default_factory=list)
    """Nodes that are not to be used."""
    gpus_per_node: int = 0
    gpu_type: str | None = None
    gpu_memory_gib: int | None = None
    """Of one GPU, for mmlg plan; null: that of the type's smallest model."""
    cpus_per_process: int | None = None
    memory_gib: int | None = None
    """Per node."""
    time: str | None = None
    """Time limit as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Other options of sbatch, by their long names."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    nccl: dict[str, str] = field(default_factory=dict)
    """NCCL's variables without the prefix NCCL_."""
    scratch: str | None = None
    """Folder for temporary files; {user} and {job_id} are filled in."""
    cache: str | None = None
    """Folder for compiled kernels and downloads; {user} is filled in."""
    python: str | None = None
    """The interpreter with mmlg; null: the one that submits."""
    pyxis: Container | None = None
    apptainer: Container | None = None
    save_seconds: int = 30
    """How long one checkpoint takes to write."""
    max_restarts: int = 2
    """How often a job that crashes without having made progress is started again."""
    unsafe_shell_setup: list[str] = field(default_factory=list)
    """Lines of shell before the ranks start. The only text of this file that is executed."""

    @property
    def signal_seconds(self) -> int:
        """How long before the time limit ranks are told to save: three times what it takes, and at least 90 s."""
        return max(90, 3 * self.save_seconds)

    def check(self) -> None:
        """Raises LaunchError for what does not go together, or could be taken for something else where the batch script names it."""
        if self.pyxis is not None and self.apptainer is not None:
            raise LaunchError("pyxis and apptainer are both given. Keep one.")
        for key, variables in (("environment", self.environment), ("nccl", self.nccl)):
            for name in variables:
                if not _NAME.fullmatch(name):
                    raise LaunchError(f"{key}: {name!r} is no name of a variable.")
        for name in self.sbatch:
            if name in OWN_OPTIONS:
                raise LaunchError(f"sbatch: {name} has a key or an option of its own, or is set by the batch script. Remove it here.")
            if not re.fullmatch(r"[a-z][a-z-]*", name):
                raise LaunchError(f"sbatch: {name!r} is no long option of sbatch (as in reservation).")
        if self.time is not None:
            check_time(self.time)
        for key, value in _texts(dataclasses.asdict(self)):
            if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
                raise LaunchError(f"{key}: {value!r} has a line break or another control character.")


def _texts(content: Any, key: str = "") -> list[tuple[str, str]]:
    """Every text of nested dictionaries and lists, with its dotted key."""
    if isinstance(content, str):
        return [(key, content)]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for name, value in items for found in _texts(value, f"{key}.{name}".lstrip("."))]


def check_time(value: str) -> None:
    """Raises LaunchError where `value` is no time limit as Slurm writes it."""
    if not _TIME.fullmatch(value):
        raise LaunchError(f"time: {value!r} is no time limit. Write minutes, HH:MM:SS or D-HH:MM:SS.")


def load_cluster(name: str) -> Cluster:
    """A cluster by the path of its YAML file, or a shipped one by name (`generic`).

    Raises:
        LaunchError: no such file, no mapping, an unknown key (lists the valid ones), or a value that does not fit.
    """
    path = Path(name)
    if not path.is_file():
        path = SHIPPED / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise LaunchError(f"no cluster file {name!r}. Give a path to a YAML file or one of the shipped ones: {names}.")
    try:
        cluster = _parse(path)
        cluster.check()
    except LaunchError as error:
        raise LaunchError(f"cluster file {path}: {error}") from error
    return cluster


def _parse(path: Path) -> Cluster:
    import yaml

    if path.stat().st_size > MAX_BYTES:
        raise LaunchError(f"has {path.stat().st_size} bytes, at most {MAX_BYTES} are supported.")
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise LaunchError("has YAML aliases (*name). Write the value out.")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise LaunchError(f"is not valid YAML: {' '.join(str(error).split())}.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise LaunchError("has no mapping of keys.")
    valid = [known.name for known in dataclasses.fields(Cluster)]
    for key in content:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise LaunchError(f"unknown key {str(key)!r}.{hint} Valid keys: {', '.join(valid)}.")
    return _typed(content)


def _typed(content: dict[str, Any]) -> Cluster:
    """Build the dataclasses of plain values, each checked against its field's type."""
    import argparse

    from jsonargparse import ArgumentParser

    containers = {}
    for key in ("pyxis", "apptainer"):
        given = content.get(key)
        if given is not None:
            if not isinstance(given, dict) or set(given) - {"image", "mounts"} or "image" not in given:
                raise LaunchError(f"{key}: give a mapping of image and, if need be, mounts (a list of FROM:TO).")
            containers[key] = given
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Cluster, None)
    try:
        found = parser.parse_object({key: value for key, value in content.items() if value is not None}).as_dict()
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise LaunchError(f"{' '.join(str(error).split())}") from error
    for key in ("pyxis", "apptainer"):
        found[key] = Container(**found[key]) if found[key] is not None else None
    return Cluster(**found)
