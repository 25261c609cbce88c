"""DeepSpeed around a model: start the ranks, step, save, load. The only place that imports deepspeed."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmlg_kernels import exchange
from torch import Tensor, nn

from mmlg_scale import recipe, towers
from mmlg_scale.errors import UserError
from mmlg_scale.memory import checkpoint_bytes
from mmlg_scale.ranks import on_every_rank, several_ranks
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.muon import MuonAdamW
from mmlg_scale.training.state import Part, SavedParts, copy_buffers, copy_parts, find_parts, load_buffers, load_parts, share_of

_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""What DeepSpeed asks the environment for, of a process that no launcher started."""
_OPEN_FILES = 65_536
_set_here: list[str] = []
"""Which of them `start_ranks` set."""


def start_ranks(runtime: Runtime) -> torch.device:
    """Join the process group (of one rank where no launcher started several), set the thread count, and return this rank's device.

    Raises:
        UserError: the environment says that this is a rank, but not of what; or blocks are to be compiled and there is no compiler.
    """
    use_cuda = torch.cuda.is_available()
    if runtime.compile:
        towers.require_compiler("cuda" if use_cuda else "cpu")
    if not use_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed probes for accelerators and warns
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    _allow_open_files()
    if not dist.is_initialized():
        backend, timeout = "nccl" if use_cuda else "gloo", _patience(runtime)
        exchange.timeout = timeout
        if "RANK" in os.environ:  # our launcher's, torchrun's, or a scheduler's
            missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise UserError(f"RANK is set, but not {' and '.join(missing)}. Start ranks with mmlg launch or torchrun, or unset RANK.")
            dist.init_process_group(backend, timeout=timeout)
        else:
            # A store in this process: no port that another run on this host could hold.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
            _set_here.extend(name for name in _RANK if name not in os.environ)
            os.environ.update({name: _RANK[name] for name in _set_here})
    return device


def _patience(runtime: Runtime) -> timedelta:
    """How long a rank waits for another in a collective; by itself NCCL waits ten minutes.

    Longer than the watchdog, which leaves stacks behind, and than what the first rank does alone, as joining features.
    """
    return timedelta(minutes=max(60.0, 2 * (runtime.hang_minutes or 0.0)))


def _allow_open_files() -> None:
    """Raise the soft limit on open files, often 1,024: each of gloo's groups takes a socket for every other rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a container may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def stop_ranks() -> None:
    """Leave the process group. Another may be started in this process afterwards: a notebook's next session."""
    while _set_here:
        os.environ.pop(_set_here.pop(), None)
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        # What DeepSpeed remembers of the group that is gone; the next start makes its own.
        comm.cdb = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    # One of gloo's threads may still have to let go of the last tensors, for which it needs the interpreter: where that has ended, it
    # aborts the process.
    time.sleep(0.1)


@contextmanager
def ranks(runtime: Runtime) -> Iterator[torch.device]:
    """`start_ranks`, and at the end `stop_ranks` where no group was there before; after an error too, where no rank waits for this one."""
    is_own = not dist.is_initialized()
    device = start_ranks(runtime)
    try:
        yield device
    except BaseException as error:
        # Of an error that only this rank has, the others do not know: they would lose it before it has said why it ends.
        if is_own and (not several_ranks() or on_every_rank(error)):
            stop_ranks()
        raise
    if is_own:
        stop_ranks()


def autocast_of(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model of a precision (fp32, bf16) computes."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


class Engine:
    """A model under DeepSpeed.

    Args:
        model: owns every trained parameter; its forward is the only place where they are used (ZeRO-3 gathers them there).
        parameter_groups: torch optimiser groups; each may carry `lr` (its peak rate) and `weight_decay`.
        runtime: ZeRO stage, activation checkpointing, whether captions are cut or packed and blocks compiled.
        batch_size: global; must be a multiple of the world size.
        precision: fp32 or bf16.
        communication: fp32 or bf16, in what gradients are exchanged.
        optimizer: the recipe's: name, rates, decays, clipping.
        sgd: use plain SGD instead: for exactness tests, because AdamW amplifies rounding noise in small gradients.

    Raises:
        UserError: the batch cannot be divided among the ranks, or Muon is asked for at ZeRO stage 3.
    """

    def __init__(
        self,
        model: nn.Module,
        parameter_groups: list[dict[str, Any]],
        *,
        runtime: Runtime,
        batch_size: int,
        optimizer: recipe.Optimizer,
        precision: str = "fp32",
        communication: str = "fp32",
        sgd: bool = False,
    ) -> None:
        import deepspeed

        world_size = dist.get_world_size()
        if batch_size % world_size:
            raise UserError(f"recipe key batch_size: {batch_size} is not a multiple of the {world_size} ranks. Change either.")
        # DeepSpeed would compile a shared-memory all-reduce for CPU ranks: a minute at the first run, and a stale lock that hangs
        # every later run if that one is killed. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.precision = precision
        self.zero_stage, self._checkpoint_blocks = runtime.zero_stage, runtime.activation_checkpointing
        self.text = runtime.text
        self.device = next(model.parameters()).device
        torch_optimizer = (
            torch.optim.SGD(parameter_groups, lr=optimizer.learning_rate, fused=True)
            if sgd
            else _optimizer(parameter_groups, optimizer, runtime)
        )
        self._torch_optimizer = torch_optimizer
        if runtime.compile:
            towers.compile_blocks(model)
        self._clipping = optimizer.gradient_clipping
        if self.zero_stage == 3 and any(isinstance(module, towers.ResidualAttentionBlock) for module in model.modules()):
            # A block's forward uses its submodules' parameters without calling them: they are gathered with the block, as one.
            deepspeed.utils.set_z3_leaf_modules(model, [towers.ResidualAttentionBlock])
        if precision == "bf16" or self.zero_stage < 3:
            _choose_communication(model, communication, self.zero_stage)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch_optimizer,
            config=deepspeed_config(
                runtime,
                precision,
                communication,
                batch_size=batch_size,
                world_size=world_size,
                clipping=optimizer.gradient_clipping,
                largest_bucket=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            ),
            dist_init_required=False,
        )
        # DeepSpeed would copy every gradient to one flat buffer and back, to share it with nobody.
        self._alone = self.zero_stage == 0 and world_size == 1
        if self._alone:
            self._engine.enable_backward_allreduce = False
        self.model: nn.Module = self._engine.module
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._norm = torch.zeros((), device=self.device)
        self.lost_R = self._lost_ranks(None)
        self._peak_rates = [group["lr"] for group in self._engine.optimizer.param_groups]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, under autocast in bf16, with its blocks checkpointed where the runtime says so."""
        if self._checkpoint_blocks:
            kwargs["checkpoint"] = True
        return self._engine(*args, **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a model outside the engine (a teacher, an evaluation) computes as inside."""
        return autocast_of(self.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, averaged over ranks."""
        self._engine.backward(loss)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Several `backward` calls inside add up; ranks exchange gradients once, at the end."""
        if self.zero_stage == 0:
            with self._engine.no_sync():
                yield
            if not self._alone:
                self._engine.allreduce_gradients()
        else:
            with self._engine.coalesce_grad_reduction():
                yield

    def step(self, rate_factor: float, loss: Tensor | None = None) -> None:
        """Clip, and one optimiser step at `rate_factor` times each group's peak rate. Collective.

        Where the loss of any rank or the gradients' norm is not finite, no weight and no moment changes. That is decided on the device
        (`lost_R` and `gradient_norm` say it afterwards): AdamW's fused kernels read it there, as they do for a gradient scaler. Under
        ZeRO, DeepSpeed itself looks at the norm on the host in every step.

        Args:
            loss: of this rank's batch; None: it is not looked at.
        """
        for group, peak in zip(self._engine.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * rate_factor
        self.lost_R = self._lost_ranks(loss)
        lost = self.lost_R.any()
        if self.zero_stage == 0:  # where DeepSpeed would clip with the norm on the host, and without telling it
            self._clip()
            lost = lost | ~self._norm.isfinite()
        self._torch_optimizer.found_inf = lost.float()  # type: ignore[attr-defined]
        self._engine.step()

    def _clip(self) -> None:
        """Take the norm of the gradients and clip them by it, on the device."""
        for parameter in self._trained:
            if parameter.grad is None:  # several ranks exchange zeros then: the optimiser must do the same here
                parameter.grad = torch.zeros_like(parameter)
        self._norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self._trained if parameter.grad is not None])
        if self._clipping:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self._clipping, self._norm)

    def _lost_ranks(self, loss: Tensor | None) -> Tensor:
        """Which ranks' loss is not finite, uint8 [R] on the device. One small collective, of which the host does not wait for the end."""
        lost_R = torch.zeros(dist.get_world_size(), dtype=torch.uint8, device=self.device)
        if loss is not None:
            lost_R[dist.get_rank()] = ~loss.detach().isfinite().all()
            if dist.get_world_size() > 1:
                dist.all_reduce(lost_R)
        return lost_R

    @property
    def gradient_norm(self) -> Tensor | float:
        """The norm of the last step's gradients, all ranks' together, before clipping."""
        return self._norm if self.zero_stage == 0 else self._engine.get_global_grad_norm()

    @property
    def learning_rate(self) -> float:
        """The first group's present rate."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def copies(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """This rank's share of the training state by file: (name, what it holds), copied to the CPU one after the other; see `state`."""
        rank, parts = dist.get_rank(), self._parts()
        if self.zero_stage == 0:
            parts = share_of(parts, rank, dist.get_world_size())
        yield from copy_parts(parts, self._torch_optimizer.state, rank)
        if rank == 0:
            yield copy_buffers(self._buffers())

    def load(self, folder: Path) -> None:
        """Read what engines of the same model have saved, at any world size and stage. Collective.

        Raises:
            UserError: on any rank, something is missing from the folder.
        """
        with SavedParts(folder) as saved:
            load_parts(self._parts(), self._torch_optimizer.state, saved)
            load_buffers(self._buffers(), saved)
        optimizer = self._engine.optimizer
        if self.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()
            for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
                optimizer._unflatten_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def _parts(self) -> list[Part]:
        return find_parts(self._engine, self.zero_stage, dist.get_rank())

    def _buffers(self) -> dict[str, Tensor]:
        kept = self.model.state_dict().keys()
        return {name: tensor for name, tensor in self.model.named_buffers() if name in kept}

    def is_finite(self) -> Tensor:
        """Whether each tensor's sum of squares is finite, of what this rank has (under ZeRO-3 its part): a bool on the device.

        A weight beyond 1e19, whose square is infinite in fp32, is no use to anyone: no norm can be taken of it.
        """
        parts = [self._own(parameter).detach() for parameter in self.model.parameters()]
        return torch.stack([part.float().square().sum().isfinite() for part in parts]).all()

    def _own(self, parameter: Any) -> Tensor:
        """What this rank has of a parameter: under ZeRO-3 its share, without the padding that nobody has initialised."""
        share = getattr(parameter, "ds_tensor", None)
        if share is None:
            return parameter
        return share.view(-1)[: max(0, parameter.ds_numel - dist.get_rank() * share.numel())]

    @property
    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on disk."""
        return checkpoint_bytes(sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.model.parameters()))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's parameters and buffers in fp32 on the CPU, gathered under ZeRO-3. Collective."""
        if self._engine.zero_optimization_partition_weights():
            import deepspeed

            # An evaluation that left a module out (hidden maps, a tower) leaves what DeepSpeed fetched ahead for it in flight.
            self._engine.empty_partition_cache()
            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                return {name: tensor.detach().float().cpu().clone() for name, tensor in self.model.state_dict().items()}
        return {name: tensor.detach().float().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def _optimizer(groups: list[dict[str, Any]], settings: recipe.Optimizer, runtime: Runtime) -> torch.optim.Optimizer:
    """AdamW, or Muon for matrices and AdamW for the rest."""
    adamw: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
        "fused": True,
    }
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    if runtime.zero_stage == 3:
        raise UserError("runtime.zero_stage 3 divides matrices, which Muon needs whole. Use stage 2, or optimizer.name adamw.")
    return MuonAdamW(groups, sharded=runtime.zero_stage in (1, 2), **adamw)


_GATHERED_WHOLE = ("embedding", "coefficients", "vectors", "logit_")
"""Words in the names of parameters that autocast does not round, and that are therefore gathered as they are."""


def _choose_communication(model: nn.Module, communication: str, zero_stage: int) -> None:
    """Under its autocast DeepSpeed ignores `communication_data_type` at ZeRO stages 1 to 3, and looks for this attribute of a parameter.

    At stage 3 it is also the type that the parameter is gathered in.
    """
    for name, parameter in model.named_parameters():
        rounded = zero_stage < 3 or (parameter.ndim >= 2 and not any(word in name for word in _GATHERED_WHOLE))
        parameter.comm_dtype = torch.bfloat16 if communication == "bf16" and rounded else torch.float32  # type: ignore[attr-defined]


def deepspeed_config(
    runtime: Runtime,
    precision: str,
    communication: str,
    *,
    batch_size: int,
    world_size: int,
    clipping: float,
    largest_bucket: int,
) -> dict[str, Any]:
    """The DeepSpeed configuration; everything that DeepSpeed would otherwise choose silently is stated."""
    bucket = min(runtime.bucket_size, largest_bucket)
    bucket += bucket % 2  # DeepSpeed aligns to two numbers
    config: dict[str, Any] = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // world_size,
        "gradient_accumulation_steps": 1,
        # DeepSpeed clips at 1.0 when this is left out. Without ZeRO, `Engine.step` clips: DeepSpeed's own waits for the device.
        "gradient_clipping": clipping if runtime.zero_stage else 0.0,
        "zero_optimization": {
            "stage": runtime.zero_stage,
            "stage3_param_persistence_threshold": runtime.persistence_threshold,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": runtime.overlap,
            "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear in the whole process
        },
        "communication_data_type": communication,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # it waits for the device in every step
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        # None of torch's modules by itself: DeepSpeed would exchange the gradients of nn.Linear in bf16.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def deepspeed_version() -> str:
    """DeepSpeed's version; importing it here proves that it loads."""
    import deepspeed

    return str(deepspeed.__version__)


def compatible_deepspeed_ops() -> list[str]:
    """Names of DeepSpeed's own kernels that could be compiled on this machine. Training here uses none of them."""
    import deepspeed

    return sorted(name for name, works in deepspeed.ops.__compatible_ops__.items() if works)
