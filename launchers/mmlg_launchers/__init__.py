"""Runs an argv, or a graph of them, on resources and follows it. Knows nothing of what the argv does."""

from mmlg_launchers.graph import Step, StepFailed, run_graph
from mmlg_launchers.interface import Job, JobState, Launcher, Resources
from mmlg_launchers.local import LocalLauncher

__all__ = ["Job", "JobState", "Launcher", "LocalLauncher", "Resources", "Step", "StepFailed", "run_graph"]
