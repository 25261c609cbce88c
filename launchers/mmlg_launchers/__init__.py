"""Runs an argv, or a graph of them, on resources and follows it. Knows nothing of what the argv does."""

from mmlg_launchers.cluster import Cluster, load_cluster
from mmlg_launchers.graph import Step, StepFailed, run_graph
from mmlg_launchers.interface import Job, JobState, Launcher, LaunchError, Resources
from mmlg_launchers.local import LocalLauncher
from mmlg_launchers.slurm import SlurmLauncher

__all__ = [
    "Cluster",
    "Job",
    "JobState",
    "LaunchError",
    "Launcher",
    "LocalLauncher",
    "Resources",
    "SlurmLauncher",
    "Step",
    "StepFailed",
    "load_cluster",
    "run_graph",
]
