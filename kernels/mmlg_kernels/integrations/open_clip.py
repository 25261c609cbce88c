"""open_clip's ClipLoss without the matrix of similarities. open_clip itself is not imported."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlg_kernels.contrastive import contrastive_loss


class FusedClipLoss(nn.Module):
    """In place of `open_clip.loss.ClipLoss` (open_clip 3.3): the same constructor, the same call, the same loss.

    Gradients on W ranks are always the exact ones of the global batch, whatever the options: of the features W times those of the mean
    loss, so that averaging over ranks, as DDP does, gives the gradient of the global batch. ClipLoss's, averaged by DDP:

    | local_loss | gather_with_grad | its value on a rank | its gradient through the features | against ours |
    |---|---|---|---|---|
    | yes | yes | its own pairs' mean | the global batch's | equal |
    | no | yes | the global batch's mean | the global batch's | equal |
    | no | no | the global batch's mean | the global batch's / W | ours is W times as large; Adam hardly differs, SGD and clipping do |
    | yes | no | its own pairs' mean | misses the terms in which a pair is another rank's negative | ours is exact, its is not |

    The scale's gradient, averaged by DDP, is the global batch's in all of them and in ours; on a single rank the shares differ, since ours
    counts a pair's row and column where ClipLoss counts its image's and its text's row. Values are ClipLoss's: with local_loss=False the
    ranks' means are averaged by one all-reduce of a number.

    Args:
        local_loss: False returns the global batch's mean on every rank, True that of this rank's pairs. Not the gradient: see above.
        gather_with_grad: taken, without effect: gradients always cross ranks.
        cache_labels: taken, without effect: there are no labels.
        rank, world_size: of the default process group, which must be there when world_size > 1.
        use_horovod: must be False.

    Raises:
        ValueError: use_horovod; a rank outside the world.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod=True: ranks exchange features only by torch.distributed; use open_clip's ClipLoss with horovod")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} in a world of {world_size}")
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, or {"contrastive_loss": the loss}.

        Args:
            image_features, text_features: [B, D], of this rank's pairs, normalised by the model. Two dtypes (a tower outside autocast) meet
                in the wider one.
            logit_scale: the multiplier, already exponentiated.
            logit_bias: added to all logits, it cancels in the softmax; its gradient is zero, as in ClipLoss up to rounding.
            output_dict: as open_clip's training loop asks for it.

        Raises:
            ValueError: as in `contrastive_loss`; world_size > 1 without a process group of that size.
        """
        if image_features.dtype != text_features.dtype:
            wide = torch.promote_types(image_features.dtype, text_features.dtype)
            image_features, text_features = image_features.to(wide), text_features.to(wide)
        scale = torch.as_tensor(logit_scale, device=image_features.device)
        loss = contrastive_loss(image_features, text_features, scale, group=self._group())
        if self.world_size > 1 and not self.local_loss:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            # The value of all ranks with this rank's gradient.
            loss = loss + (mean / self.world_size - loss.detach())
        if logit_bias is not None:
            # A parameter without any gradient would stop DDP.
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self) -> Any:
        if self.world_size == 1:
            return None
        if not dist.is_initialized():
            raise ValueError(f"world_size {self.world_size}, but torch.distributed has no process group")
        if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            raise ValueError(
                f"this is rank {dist.get_rank()} of {dist.get_world_size()}, the loss was made for rank {self.rank} of {self.world_size}"
            )
        return dist.group.WORLD
