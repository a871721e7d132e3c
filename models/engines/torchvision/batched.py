"""What follows the dense layers of torchvision's detectors, for all images of a batch at once, as a GPU wants it.

torchvision filters proposals and detections image by image, in small kernels, and waits for the GPU several times on
the way. Measured on an H200, 16 tiles of 640 pixels with the recipe detector_scratch: 1.3 of 2.4 ms
a tile were these two steps, 0.3 ms the dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import clip_boxes_to_image

# Pairs of boxes that are compared at once: a few arrays of float32 of that size are in memory.
MOST_PAIRS = 32_000_000
# Rounds of suppression between two looks at whether they changed anything: a look waits for the GPU.
ROUNDS = 4
# torchvision's least side of a detected box, in pixels at the network's scale.
LEAST_SIDE = 1e-2


def batched(module: RegionProposalNetwork | RoIHeads) -> None:
    """Let a module of torchvision, with the layers and settings that it has, treat a batch at once on a GPU."""
    module.__class__ = BatchedProposals if isinstance(module, RegionProposalNetwork) else BatchedDetections


class BatchedProposals(RegionProposalNetwork):
    """torchvision's region proposal network; in prediction on a GPU a batch's proposals are filtered at once."""

    # Where a batch is treated at once; on a CPU nothing is gained.
    devices = ("cuda",)

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):  # type: ignore[no-untyped-def]
        """See `RegionProposalNetwork`: the same boxes and scores, to rounding, in the same order."""
        counts = [min(count, self.pre_nms_top_n()) for count in num_anchors_per_level]
        if self.training or not _gains(self.devices, proposals, len(image_shapes), max(counts)):
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        objectness = objectness.detach().reshape(len(proposals), -1)
        strongest = self._get_top_n_idx(objectness, num_anchors_per_level)
        scores = torch.sigmoid(objectness.gather(1, strongest))
        boxes = clipped(proposals.gather(1, strongest[..., None].expand(-1, -1, 4)), image_shapes)
        valid = large_enough(boxes, self.min_size) & (scores >= self.score_thresh)
        levels = zip(boxes.split(counts, 1), valid.split(counts, 1), strict=True)
        kept = torch.cat([suppressed(of_level, of_valid, self.nms_thresh) for of_level, of_valid in levels], 1)
        order, numbers = by_score(scores, kept, self.post_nms_top_n())
        boxes, scores = boxes.gather(1, order[..., None].expand(-1, -1, 4)), scores.gather(1, order)
        return [b[:n] for b, n in zip(boxes, numbers, strict=True)], [s[:n] for s, n in zip(scores, numbers, strict=True)]


class BatchedDetections(RoIHeads):
    """torchvision's heads; in prediction on a GPU a batch's detections are filtered at once."""

    devices = ("cuda",)

    def postprocess_detections(self, class_logits, box_regression, proposals, image_shapes):  # type: ignore[no-untyped-def]
        """See `RoIHeads`: the same boxes, scores and labels, to rounding, in the same order."""
        counts = [len(of_image) for of_image in proposals]
        if not _gains(self.devices, class_logits, len(counts), max(counts)):
            return super().postprocess_detections(class_logits, box_regression, proposals, image_shapes)
        decoded = self.box_coder.decode(box_regression, proposals)
        probabilities = torch.softmax(class_logits, -1)
        # (images, proposals, classes), less the background; images with fewer proposals are filled up with score -1.
        pad = nn.utils.rnn.pad_sequence
        boxes = clipped(pad(decoded.split(counts), batch_first=True)[:, :, 1:], image_shapes)
        scores = pad(probabilities.split(counts), batch_first=True, padding_value=-1.0)[:, :, 1:]
        valid = (scores > self.score_thresh) & large_enough(boxes, LEAST_SIDE)
        images, most, classes = scores.shape
        ranked = torch.where(valid, scores, -1.0).transpose(1, 2).reshape(images * classes, most)
        order = ranked.sort(dim=1, descending=True, stable=True).indices[:, : int(valid.sum(1).max())]
        of_class = boxes.transpose(1, 2).reshape(images * classes, most, 4)
        chosen = suppressed(
            of_class.gather(1, order[..., None].expand(-1, -1, 4)), ranked.gather(1, order) >= 0, self.nms_thresh
        )
        kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, order, chosen)
        kept = kept.reshape(images, classes, most).transpose(1, 2).reshape(images, -1)
        boxes, scores = boxes.reshape(images, -1, 4), scores.reshape(images, -1)
        order, numbers = by_score(scores, kept, self.detections_per_img)
        boxes, scores, labels = (
            boxes.gather(1, order[..., None].expand(-1, -1, 4)),
            scores.gather(1, order),
            order % classes + 1,
        )
        cut = [[row[:n] for row, n in zip(of, numbers, strict=True)] for of in (boxes, scores, labels)]
        return cut[0], cut[1], cut[2]


def _gains(devices: Sequence[str], tensor: Tensor, images: int, boxes: int) -> bool:
    """Whether there is a batch, on a device that gains by it, with boxes that fit into memory when they are compared."""
    return tensor.device.type in devices and images > 1 and 0 < boxes**2 <= MOST_PAIRS


def clipped(boxes: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Boxes (images, ..., 4) cut at the borders of their images, whose shapes are (height, width)."""
    if len(set(shapes)) == 1:
        return clip_boxes_to_image(boxes, shapes[0])
    return torch.stack([clip_boxes_to_image(of_image, shape) for of_image, shape in zip(boxes, shapes, strict=True)])


def large_enough(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides of boxes (..., 4) are at least so long."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def suppressed(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each group of boxes; what torchvision's ``nms`` keeps.

    A box is kept where no kept box before it overlaps it by more than the threshold. All boxes are judged at once by
    those kept in the round before; round k has the first k right, so that a round which changes nothing has all.

    Args:
        boxes: (groups, N, 4), xyxy, by falling score within each group.
        valid: bool (groups, N); others neither suppress nor are kept.

    Returns:
        bool (groups, N).
    """
    groups, number = valid.shape
    at_once = max(1, MOST_PAIRS // max(number, 1) ** 2)
    if groups > at_once:
        parts = zip(boxes.split(at_once), valid.split(at_once), strict=True)
        return torch.cat([suppressed(*part, threshold) for part in parts])
    # A sum of float16 ones is not zero where there is one, which is all that is asked.
    over = _overlap(boxes, threshold).triu_(1).to(torch.float16 if boxes.is_cuda else torch.float32)
    kept = last = valid
    for _ in range(0, number, ROUNDS):
        for _ in range(ROUNDS):
            last, kept = kept, valid & (torch.bmm(kept[:, None].to(over.dtype), over)[:, 0] == 0)
        if torch.equal(kept, last):
            break
    return kept


def _overlap(boxes: Tensor, threshold: float) -> Tensor:
    """Whether two boxes of a group have an IoU above the threshold: bool (groups, N, N)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = (torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])).clamp_(min=0)
    height = (torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])).clamp_(min=0)
    shared, area = width.mul_(height), (x2 - x1) * (y2 - y1)
    return shared / (area[:, :, None] + area[:, None] - shared) > threshold


def by_score(scores: Tensor, kept: Tensor, most: int) -> tuple[Tensor, list[int]]:
    """Places of the kept ones by falling score.

    Returns:
        int64 (images, M), of which as many count as the list says; how many each image has, ``most`` at most.
    """
    order = torch.where(kept, scores, -1.0).sort(dim=1, descending=True, stable=True).indices
    numbers = kept.sum(1).clamp(max=most).tolist()
    return order[:, : max(numbers, default=0)], numbers
