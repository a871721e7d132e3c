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
# Of whatever name: OpenVINO calls a convolution that a norm was folded into otherwise.
_TYPES = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "MatMul")


def is_dense(name: str, kind: str) -> bool:
    """Whether a layer may compute in less than full precision; ``name`` and type are OpenVINO's."""
    return bool(_MODULES.match(name)) or kind in _TYPES
