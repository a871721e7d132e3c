"""The course's own segmentation network: an encoder-decoder with additive skip connections."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

WIDTHS = (8, 16, 32, 64, 128, 256, 512)


def _conv(inputs: int, outputs: int, activation: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if activation else nn.Sequential(*layers)


class SkipNet(nn.Module):
    """Images (B, 3, H, W) float to logits (B, 1, H, W); H and W must be multiples of 64.

    Encoder: conv 3-8, then six times conv + 2x2 max pooling, doubling the width to
    512. Decoder: six times conv + x2 upsampling, halving the width to 8, each added
    to the encoder's output of the same size, then ReLU and BatchNorm. Head: conv
    8-3, conv 3-1 without activation. A conv is Conv3x3 + BatchNorm + ReLU. The
    description leaves the upsampling open; it is bilinear here.

    Source: the course project's description of its network (part 2).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, WIDTHS[0])
        self.down = nn.ModuleList(nn.Sequential(_conv(a, b), nn.MaxPool2d(2)) for a, b in pairwise(WIDTHS))
        reverse = WIDTHS[::-1]
        self.up = nn.ModuleList(
            nn.Sequential(_conv(a, b), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            for a, b in pairwise(reverse)
        )
        self.norm = nn.ModuleList(nn.BatchNorm2d(b) for b in reverse[1:])
        self.head = nn.Sequential(_conv(8, 3), _conv(3, 1, activation=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the same height and width as ``x``."""
        if x.shape[-1] % 64 or x.shape[-2] % 64:
            raise ValueError(f"height and width must be multiples of 64, got {tuple(x.shape[-2:])}")
        x = self.stem(x)
        skips = [x]
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, norm, skip in zip(self.up, self.norm, reversed(skips[:-1]), strict=True):
            x = norm(torch.relu(up(x) + skip))
        return self.head(x)
