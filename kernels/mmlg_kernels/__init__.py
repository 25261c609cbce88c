"""Contrastive losses that never store the B x B similarity matrix, and block transfer. Needs only torch and triton, not mmlg_scale."""

from mmlg_kernels.block_transfer import block_transfer, transfer_blocks, transfer_layer
from mmlg_kernels.contrastive import contrastive_loss, sigmoid_loss
from mmlg_kernels.dispatch import BACKENDS
from mmlg_kernels.distillation import contrastive_distillation_loss, teacher_log_sum_exps
from mmlg_kernels.transfer_plan import Slice, Target, TransferPlan

__all__ = [
    "BACKENDS",
    "Slice",
    "Target",
    "TransferPlan",
    "block_transfer",
    "contrastive_distillation_loss",
    "contrastive_loss",
    "sigmoid_loss",
    "teacher_log_sum_exps",
    "transfer_blocks",
    "transfer_layer",
]
