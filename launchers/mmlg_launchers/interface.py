"""What every launcher offers: (argv, resources, run folder) -> a job with a state, logs and a way to cancel it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

    num_processes: int = 1
    """Ranks per node."""
    num_nodes: int = 1
    """Nodes; a local launcher has one."""
    cpus_per_process: int | None = None
    """CPU threads per rank; None: the cores divided by the ranks, or what a cluster gives."""
    gpus_per_node: int = 0
    """GPUs that are asked of a cluster; a local launcher gives each rank one of its own."""
    memory_gib: int | None = None
    """Per node, asked of a cluster; None: the site's default."""
    time: str | None = None
    """Time limit on a cluster, as Slurm writes it; None: the site's default."""


EXIT_REQUEUE = 75
"""Exit code of a command that has saved and asks to be started again."""
EXIT_STOPPED = 76
"""Exit code of a command that was asked to stop, and has saved."""


class LaunchError(Exception):
    """A job cannot be started, found or stopped: one line that says why and what to do."""


class JobState(enum.Enum):
    """How far a job is."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class Job(Protocol):
    """A submitted argv."""

    @property
    def exit_code(self) -> int | None:
        """None until the job has ended."""
        ...

    def state(self) -> JobState:
        """The present state."""
        ...

    def wait(self, timeout: float | None = None) -> JobState:
        """Wait for the end, at most `timeout` seconds; returns the state then."""
        ...

    def cancel(self) -> None:
        """End the job and everything it started."""
        ...

    def log_paths(self) -> list[Path]:
        """Files with what the job printed: the first rank's, which ends with the line of a failure, then those of the others."""
        ...


class Launcher(Protocol):
    """Starts jobs."""

    def submit(self, argv: Sequence[str], resources: Resources, run_folder: Path, env: Mapping[str, str] | None = None) -> Job:
        """Start `argv`; state and logs are written to `run_folder`."""
        ...
