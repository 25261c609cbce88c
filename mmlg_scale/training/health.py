"""Whether a run still trains: steps that are not finite change nothing; too many of them, or a ruined model, end the run.

What each step finds stays on the device until it is looked at, which costs a synchronisation; `Engine.step` has by then left the weights
alone. A model counts as ruined where a weight is not finite or beyond 1e19 (`Engine.is_finite`), or where its loss on the last batch is
not finite any more. A ruined model is neither saved nor exported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mmlg_scale.errors import UserError
from mmlg_scale.ranks import is_first_rank
from mmlg_scale.training.engine import Engine

LOOK_EVERY = 100
"""Steps after which a look is taken at the latest."""
_SHOWN = 4
"""Samples that are named of a batch."""
_REMEDY = "Lower optimizer.learning_rate, or raise optimizer.warmup_fraction. The last checkpoint is from before."


class Health:
    """The health of one run.

    Args:
        max_skipped: steps in a row that may be passed over.
        name_of: a sample's key by its index.
    """

    def __init__(self, engine: Engine, max_skipped: int, name_of: Callable[[int], str] = str) -> None:
        self._engine, self._max_skipped, self._name_of = engine, max_skipped, name_of
        self._unseen: list[
            tuple[int, Tensor, Tensor]
        ] = []  # step; which ranks' loss, and last whether the norm, is lost; this rank's samples
        self._in_a_row = self._skipped = 0

    def take_skipped(self) -> int:
        """Steps that were passed over since the last call."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    def note(self, step: int, samples_B: Tensor) -> None:
        """Take what the engine found in `step`; `samples_B` are this rank's."""
        norm = self._engine.gradient_norm
        lost_R = self._engine.lost_R
        if isinstance(norm, float):
            lost_norm = torch.full((1,), not math.isfinite(norm), device=lost_R.device)
        else:
            lost_norm = ~norm.isfinite().reshape(1)
        lost = torch.cat([lost_R, lost_norm.to(lost_R)])
        self._unseen.append((step, lost, samples_B))
        if len(self._unseen) >= LOOK_EVERY:
            self.look()

    def look(self) -> None:
        """Report steps that were passed over since the last look. Collective.

        Raises:
            UserError: on every rank, there were too many in a row.
        """
        if not self._unseen:
            return
        unseen, self._unseen = self._unseen, []
        for (step, _, samples_B), lost in zip(unseen, torch.stack([lost for _, lost, _ in unseen]).tolist(), strict=True):
            if not any(lost):
                self._in_a_row = 0
                continue
            self._in_a_row += 1
            self._skipped += 1
            told = self._told(step, [rank for rank, is_lost in enumerate(lost[:-1]) if is_lost], samples_B)
            if self._in_a_row > self._max_skipped:
                more = f" {self._max_skipped} steps before it were passed over (runtime.max_skipped_steps)." if self._max_skipped else ""
                raise UserError(f"training diverged: {told}, {self._rate}.{more} {_REMEDY}")
            if is_first_rank():
                print(f"mmlg: {told}: this step changes nothing.", file=sys.stderr, flush=True)

    def _told(self, step: int, ranks: list[int], samples_B: Tensor) -> str:
        """What was lost in a step, where, and on which samples. Collective."""
        own = [self._name_of(int(index)) for index in samples_B[:_SHOWN]]
        keys = [*own, "…"] if len(samples_B) > _SHOWN else own
        found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, keys)
        what = "loss" if ranks else "gradient norm"
        ranks = ranks or list(range(dist.get_world_size()))
        samples = ", ".join(key for rank in ranks for key in found[rank])
        return f"the {what} is not finite after step {step} on {_listed(ranks)} (samples {samples})"

    def require_weights(self, step: int) -> None:
        """Raise UserError on every rank where any rank's weights are ruined. Collective."""
        self._require(self._engine.is_finite(), f"the weights are not finite, or beyond 1e19, after step {step}")

    def require_loss(self, loss: Tensor, step: int) -> None:
        """Raise UserError on every rank where any rank's loss of the present weights is not finite. Collective."""
        self._require(loss.isfinite().all(), f"the loss is not finite any more after the update of step {step}")

    def _require(self, well: Tensor, problem: str) -> None:
        lost_R = torch.zeros(dist.get_world_size(), dtype=torch.uint8, device=self._engine.device)
        lost_R[dist.get_rank()] = ~well
        dist.all_reduce(lost_R)
        ranks = [rank for rank, lost in enumerate(lost_R.tolist()) if lost]
        if ranks:
            raise UserError(f"training diverged: {problem} on {_listed(ranks)}, {self._rate}. {_REMEDY}")

    @property
    def _rate(self) -> str:
        return f"at learning rate {self._engine.learning_rate:.2g}"


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
