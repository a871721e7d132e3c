"""Typed training settings, as recipes hold them: what each engine can be told, and within which limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture
from models.engines.unet.predictor import SegmenterArchitecture
from models.images.rendering import Rendering
from models.tiling.settings import Tiling
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.tiles import TileSettings


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """Which planes to learn from, what is held back for validation, and how image files become RGB.

    ``range`` and ``bands``: see `models.images.rendering.Rendering`; they become part of the version.
    """

    category: str = "plane"
    val_fraction: float = Field(default=0.15, ge=0, lt=1)
    scene_pattern: str | None = None
    range: Literal["auto", "percentile", "depth"] | tuple[float, float] = "auto"
    bands: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _can_be_rendered(self) -> DataSettings:
        _ = self.rendering
        return self

    @property
    def rendering(self) -> Rendering:
        """How image files become RGB."""
        return Rendering(range=self.range, bands=self.bands)


class OptimizerSettings(_Settings):
    """Optimiser and learning rate; ``clip_norm`` 0 switches gradient clipping off."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    clip_norm: float = Field(default=5.0, ge=0)
    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0)
    milestones: list[int] = []
    gamma: float = Field(default=0.1, gt=0, le=1)


class TrainingSettings(_Settings):
    """How long and how often; ``epochs``, where given, decides instead of ``steps``.

    ``evaluate_every`` and ``checkpoint_every`` count steps; null means an epoch.
    ``precision``: that of networks and losses in training (`models.runtime.devices.pick_precision`);
    weights, optimiser and validation are always in full precision.
    """

    steps: int = Field(default=1000, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = "auto"

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # YAML reads 32 as a number.
        return "32" if value == 32 and not isinstance(value, bool) else value


class _Recipe(_Settings):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    weights: str = "none"
    data: DataSettings = DataSettings()
    augmentation: Augmentation = Augmentation()

    def flat(self) -> dict[str, Any]:
        """All settings as ``section.key`` -> value, for MLflow params."""
        return dict(flatten(self.model_dump()))

    def key(self, *more: str) -> str:
        """Digest of all settings and ``more``, 12 hex digits."""
        return hashlib.sha256(json.dumps([self.model_dump(), more], sort_keys=True).encode()).hexdigest()[:12]


class _LoopRecipe(_Recipe):
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()

    @property
    def seed(self) -> int:
        """Seed of weights, data order and augmentation."""
        return self.training.seed


class WindowSettings(_Settings):
    """What a detector is trained on and how it predicts.

    ``window``: side in pixels of random windows to train on; ``focus``: share of them
    placed on a plane; ``tiles``: a fixed grid of tiles to train on instead; neither:
    whole images. ``min_visible``: share of a cut plane that must be inside for it to
    count. ``tiling``: tiles to predict by, part of the version; without it a model
    trained on ``tiles`` predicts by tiles of that size, any other whole images.
    """

    window: int | None = Field(default=None, ge=64, le=8192)
    focus: float = Field(default=0.8, ge=0, le=1)
    min_visible: float = Field(default=0.35, gt=0, le=1)
    tiles: TileSettings | None = None
    tiling: Tiling | None = None

    @model_validator(mode="after")
    def _one_cut(self) -> WindowSettings:
        if self.window is not None and self.tiles is not None:
            raise ValueError("window and tiles exclude each other; set one of them to null")
        return self

    @property
    def prediction(self) -> Tiling | None:
        """The tiling of the version; None for whole images."""
        if self.tiling is None and self.tiles is not None:
            return Tiling(size=self.tiles.size, overlap=self.tiles.overlap)
        return self.tiling


class DetectorRecipe(_LoopRecipe, WindowSettings):
    """Settings of ``train_detector`` with the torchvision engine."""

    task: Literal["detector"]
    engine: Literal["torchvision"] = "torchvision"
    architecture: DetectorArchitecture = DetectorArchitecture()


class MaskRecipe(_LoopRecipe, WindowSettings):
    """Settings of ``train_maskrcnn`` with the torchvision engine."""

    task: Literal["maskrcnn"]
    engine: Literal["torchvision"] = "torchvision"
    architecture: MaskArchitecture = MaskArchitecture()


class Detectron2Recipe(_Recipe, WindowSettings):
    """Settings of ``train_detector`` and ``train_maskrcnn`` with the Detectron2 engine.

    ``config``: a name of Detectron2's model zoo or a YAML file; ``opts``: its settings
    as ``KEY: value``; ``weights``: zoo, imagenet, none, a URL or a path
    (``opts: {MODEL.WEIGHTS: ...}`` says the same).
    Windows keep the scale that they were cut at where ``INPUT.MIN_SIZE_TRAIN`` is 0.
    """

    task: Literal["detector", "maskrcnn"]
    engine: Literal["detectron2"]
    weights: str = "zoo"
    config: str = Field(min_length=1)
    opts: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("opts"), dict):
            opts = dict(flatten(content["opts"]))
            content = {**content, "opts": opts}
            if "MODEL.WEIGHTS" in opts:
                content["weights"] = opts.pop("MODEL.WEIGHTS") or "none"
        return content

    @property
    def seed(self) -> int:
        """Seed of weights, data order and augmentation."""
        return int(self.opts.get("SEED", 0))


class UNetRecipe(_LoopRecipe):
    """Settings of ``train_unet``; ``box_jitter`` moves each side by up to that share of the box."""

    task: Literal["unet"]
    engine: Literal["torch"] = "torch"
    architecture: SegmenterArchitecture = SegmenterArchitecture()
    loss: Literal["bce", "bce_dice"] = "bce_dice"
    box_jitter: float = Field(default=0.0, ge=0, le=0.5)


Recipe = DetectorRecipe | MaskRecipe | Detectron2Recipe | UNetRecipe


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (``section.key``, value) pairs, in order."""
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
