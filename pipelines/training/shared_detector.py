"""Losses of torchvision's detectors over a batch that several processes share, as one process would have them.

Each loss is a mean over what is sampled of all images: anchors, proposals, or those that are planes. Three things
would differ where each process knew its own images alone, and are made equal here: the weight of its means, the random
draws (torchvision draws image after image from one generator), and the size that a batch's images are padded to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from pipelines.training.group import Group, weighted


class SharedLoss:
    """The loss function of this process's share, image ``rank``, ``rank + world``, ... of a batch.

    Args:
        loss: of a batch; torchvision's losses by name.
    """

    def __init__(self, model: FasterRCNN, loss: Callable[..., Mapping[str, Tensor]], group: Group, batch_size: int) -> None:
        self._loss, self._group, self._batch_size = loss, group, batch_size
        self._anchors = SharedSampler(model.rpn.fg_bg_sampler, group, batch_size, before=self._draw_sizes)
        self._proposals = SharedSampler(model.roi_heads.fg_bg_sampler, group, batch_size)
        model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler = self._anchors, self._proposals
        self._transform: Any = model.transform
        self._choose, self._largest = self._transform.torch_choice, self._transform.max_by_axis
        self._transform.torch_choice, self._transform.max_by_axis = self._counted_choice, self._common_size
        self._chosen: list[list[int]] = []

    def __call__(self, model: nn.Module, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """Parts of the whole batch's losses: the sum over the processes is what one process would have got."""
        self._chosen = []
        losses = self._loss(model, batch, device)
        of = {
            "loss_objectness": self._anchors.share,
            "loss_rpn_box_reg": self._anchors.share,
            "loss_classifier": self._proposals.share,
            "loss_box_reg": self._proposals.share,
            "loss_mask": self._proposals.share_of_planes,
        }
        return weighted(dict(losses), [of[name] for name in losses])

    def _counted_choice(self, sizes: list[int]) -> int:
        self._chosen.append(sizes)
        return int(self._choose(sizes))

    def _draw_sizes(self) -> None:
        # torchvision draws one of its sizes for each image, where it scales them, of one size too.
        for _ in range(self._batch_size - len(self._chosen) if self._chosen else 0):
            self._choose(self._chosen[0])

    def _common_size(self, shapes: list[list[int]]) -> list[int]:
        own = self._largest(shapes)
        # In validation there is one process.
        return self._group.largest(torch.tensor(own)).tolist() if self._transform.training else own


class SharedSampler:
    """torchvision's sampler of anchors or proposals; draws for the images of other processes too.

    Attributes:
        share: of what is sampled of the whole batch, the part of this process's images.
        share_of_planes: of the sampled ones that are planes.
    """

    def __init__(self, sampler: Any, group: Group, batch_size: int, before: Callable[[], None] = lambda: None) -> None:
        self._sampler, self._group, self._batch_size, self._before = sampler, group, batch_size, before
        self.share = self.share_of_planes = 0.0

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """See `BalancedPositiveNegativeSampler`; ``matched`` are this process's images, each int (anchors,)."""
        self._before()
        rank, world = self._group.rank, self._group.world
        candidates = torch.zeros(self._batch_size, 2, dtype=torch.int64)
        candidates[rank::world] = torch.tensor([[int((m >= 1).sum()), int((m == 0).sum())] for m in matched])
        candidates = self._group.total(candidates)
        positive, negative, images = [], [], iter(matched)
        for place, counts in enumerate(candidates.tolist()):
            if place % world == rank:
                chosen = self._sampler([next(images)])
                positive.append(chosen[0][0])
                negative.append(chosen[1][0])
            else:
                for count in counts:
                    torch.randperm(count, device=matched[0].device)
        size = self._sampler.batch_size_per_image
        planes = candidates[:, 0].clamp(max=int(size * self._sampler.positive_fraction))
        sampled = planes + torch.minimum(candidates[:, 1], size - planes)
        self.share, self.share_of_planes = (float(n[rank::world].sum()) / max(1, int(n.sum())) for n in (sampled, planes))
        return positive, negative
