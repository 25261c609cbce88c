"""Contrastive losses that never store the B x B similarity matrix. Depends on torch and triton alone; usable without mmlg_scale."""

from mmlg_kernels.contrastive import contrastive_loss, sigmoid_loss
from mmlg_kernels.dispatch import BACKENDS

__all__ = ["BACKENDS", "contrastive_loss", "sigmoid_loss"]
