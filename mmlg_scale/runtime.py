"""How a run is done: ranks, workers, caches, cadence, trackers. None of it is part of a run's identity.

A run may be stopped and resumed with other settings of these, and a finished one stays valid. Results agree to rounding, not to the last
digit, where the number of ranks or threads or the ZeRO stage differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmlg_scale.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Processes, Threads, Workers

TextMode = Literal["full", "cut", "packed"]
TrackerName = Literal["jsonl", "tensorboard", "wandb"]


@dataclass
class Runtime:
    """How a run is done; never changes what is computed, but for rounding."""

    num_processes: Processes = 1
    """Ranks of each training step of `mmlg family`."""
    parallel: Processes | None = None
    """Steps of `mmlg family` that run side by side; null: as many as the cores allow, or one for each GPU."""
    threads: Threads | None = 1
    """CPU threads per rank; null: the cores divided by the ranks."""
    num_workers: Workers = 0
    """Loader processes per rank; 0 decodes in the training process (small images are cached after their first use)."""
    cache_decoded: bool = True
    """Keep decoded images in memory where the whole split takes at most 512 MiB."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: what is divided among the ranks (1: optimiser state, 2: and gradients, 3: and parameters)."""
    persistence_threshold: NonNegativeInt = 100_000
    """ZeRO-3 keeps parameters with fewer numbers than this whole on every rank."""
    bucket_size: PositiveInt = 25_000_000
    """Numbers of gradients that ranks exchange at once. ZeRO 1 and 2 keep buffers of that size (two where overlap is on), never larger than
    the model."""
    overlap: bool = True
    """Exchange gradients of some layers while those of others are computed (ZeRO 1 to 3)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each transformer block and recompute it in the backward pass: less memory, a third more compute."""
    text: TextMode = "cut"
    """Captions of a training step: as long as the context; cut after the longest of the rank's batch (rounded up to 8 tokens); or packed
    one after the other, without padding."""
    compile: bool = False
    """Compile the transformer block for this machine (torch.compile). The first steps wait for it, minutes on a CPU, where it gains a
    twentieth on a small model; later runs read torch's cache. Needs a C++ compiler. Losses differ in the last digits. Packed captions
    are not compiled."""
    compose_per_layer: bool = False
    """Extraction sums a layer's matrices when it runs, not all before the first; with activation_checkpointing one layer's are in
    memory."""
    shard_ancestor: bool = False
    """Each rank keeps its part of the frozen ancestor and gathers a block when it runs: less memory, more communication."""
    teacher_pool_bytes: PositiveInt = 32 * 2**30
    """Most that the ancestor's outputs for a teacher_pool may take on disk, in the folder of each run that has one."""
    log_every: PositiveInt = 10
    """Steps between logged figures."""
    checkpoint_every: PositiveInt | None = None
    """Steps between checkpoints; null: one after each evaluation."""
    checkpoint_minutes: PositiveFloat | None = 10.0
    """A checkpoint too where the last one is this many minutes old; null: none by the clock."""
    background_saves: bool = True
    """Write checkpoints while training continues: it waits only for a copy in the CPU's memory (12 bytes a parameter, divided by the
    ranks)."""
    keep_last: PositiveInt = 2
    """Checkpoints kept of a run under way; a finished run keeps none."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept besides, also of a finished run."""
    kill_wait: PositiveFloat = 30.0
    """Seconds between SIGTERM and SIGKILL here (Slurm's KillWait): a checkpoint that would take longer is not begun."""
    max_skipped_steps: NonNegativeInt = 3
    """Steps in a row whose loss or gradient is not finite that change nothing and are passed over; one more ends the run."""
    hang_minutes: PositiveFloat | None = 30.0
    """A run that does no step, evaluation or checkpoint for so long ends with every rank's stack in its folder; null: it waits."""
    trackers: list[TrackerName] = field(default_factory=lambda: ["jsonl", "tensorboard"])
    """Where figures go: jsonl (metrics.jsonl in the run's folder, which progress bars read), tensorboard, wandb (Weights & Biases)."""
    wandb_project: str = "mmlg_scale"
    """Project of the Weights & Biases runs."""
