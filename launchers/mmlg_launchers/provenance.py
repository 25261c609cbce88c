"""What ran, kept beside a job's logs: command, versions, the code's commit and what differs from it, or a copy of the code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = "what-ran"
SECONDS = 60


def keep(folder: Path, argv: Sequence[str], texts: Mapping[str, str], packages: Sequence[str]) -> None:
    """Write command.txt, versions.txt, commit.txt and changes.diff below the launch folder `folder`, and `texts` by file name.

    Args:
        packages: import packages whose code is meant; none of them is imported.
    """
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    roots = list(dict.fromkeys(_git(path, "rev-parse", "--show-toplevel").strip() for path in package_folders(packages)))
    commits = [f"{root} {_git(Path(root), 'rev-parse', 'HEAD').strip()}" for root in roots if root]
    # --no-ext-diff, --no-textconv: the configuration of a checkout could name programs.
    diffs = [_git(Path(root), "diff", "--no-ext-diff", "--no-textconv", "HEAD") for root in roots if root]
    versions = sorted({f"{found.metadata['Name']}=={found.version}" for found in importlib.metadata.distributions()}, key=str.lower)
    contents = {
        "command.txt": shlex.join(argv),
        "versions.txt": "\n".join(versions),
        "commit.txt": "\n".join(commits) or "the code is in no git checkout",
        "changes.diff": "".join(diffs).rstrip("\n"),
        **texts,
    }
    for name, text in contents.items():
        (place / name).unlink(missing_ok=True)  # a symbolic link in its place would be followed
        (place / name).write_text(text.rstrip("\n") + "\n" if text else "", encoding="utf-8", errors="surrogateescape")


def snapshot(folder: Path, packages: Sequence[str]) -> Path:
    """Copy the code of packages below the launch folder; returns the folder to put in front of PYTHONPATH.

    Every call makes a folder of its own: jobs of an earlier one may still run from theirs.
    """
    target = folder / FOLDER / time.strftime("code-%Y%m%d-%H%M%S")
    number = 1
    while target.exists():
        target, number = target.with_name(f"{target.name.partition('.')[0]}.{number}"), number + 1
    for path in package_folders(packages):
        shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def package_folders(packages: Sequence[str]) -> list[Path]:
    """Where import packages are."""
    specs = (importlib.util.find_spec(name) for name in packages)
    return [Path(place).absolute() for spec in specs if spec is not None for place in list(spec.submodule_search_locations or ())[:1]]


def _git(folder: Path, *words: str) -> str:
    """What git prints; nothing where there is no git, or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""
