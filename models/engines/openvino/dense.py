"""Which layers of a converted detector hold its work, and which the geometry of boxes."""

from __future__ import annotations

import re

# The modules of a detector with most of its work.
_MODULES = re.compile(
    r"__module\.network\.("
    r"backbone|rpn\.head|roi_heads\.(box|mask)_(head|predictor)"  # torchvision
    r"|proposal_generator\.rpn_head|head"  # Detectron2
    r")[./]"
)
# Their last layers: little work, and what they give is scores and where boxes lie. On 15 tiles of DOTA, detector_scratch:
# bfloat16 changes scores above 0.3 by 0.0092 with them in float32 (root mean square; 0.0110 without) and leaves a box an
# IoU of 0.994 with itself (0.990 without).
_LAST = re.compile(
    r"__module\.network\.("
    r"rpn\.head\.(cls_logits|bbox_pred)|roi_heads\.box_predictor"  # torchvision, the latter Detectron2 too
    r"|proposal_generator\.rpn_head\.(objectness_logits|anchor_deltas)|head\.(cls_score|bbox_pred)"  # Detectron2
    r")[./]"
)
# Of whatever name: OpenVINO calls a convolution that a norm was folded into otherwise.
_TYPES = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")


def is_dense(name: str, kind: str) -> bool:
    """Whether a layer may compute in less than full precision; ``name`` and type are OpenVINO's."""
    return not _LAST.match(name) and (bool(_MODULES.match(name)) or kind in _TYPES)
