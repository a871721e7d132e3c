"""Typed training settings, as recipes hold them: the options of each engine and their limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.engines.torchvision.network import DetectorArchitecture, MaskArchitecture
from models.engines.unet.settings import SegmenterArchitecture
from models.images.rendering import Rendering
from models.tiling.settings import Tiling
from pipelines.data.loading.augment import Augmentation
from pipelines.data.loading.tiles import TileSettings


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """Which planes to learn from, what is held back for validation, and how image files become RGB."""

    category: str = Field(default="plane", description="Name of the annotated class to learn; case does not matter.")
    val_fraction: float = Field(
        default=0.15, ge=0, lt=1, description="Share of the training scenes held back for validation; 0 for none."
    )
    scene_pattern: str | None = Field(
        default=None,
        description=(
            "Regular expression whose first group is the scene of an image's name; images of a scene stay together. null: "
            "by the names of tiles."
        ),
    )
    range: Literal["auto", "percentile", "depth"] | tuple[float, float] = Field(
        default="auto",
        description="Values that become 0 and 255: auto, percentile, depth, or LOW,HIGH; part of the version.",
    )
    bands: tuple[int, ...] | None = Field(
        default=None,
        description="Bands for red, green and blue, counted from 1; null: those that the file names. Part of the version.",
    )

    @model_validator(mode="after")
    def _can_be_rendered(self) -> DataSettings:
        _ = self.rendering
        return self

    @property
    def rendering(self) -> Rendering:
        """How image files become RGB."""
        return Rendering(range=self.range, bands=self.bands)


class OptimizerSettings(_Settings):
    """Optimiser, learning rate and its schedule."""

    name: Literal["adam", "adamw", "sgd"] = Field(default="adamw", description="Optimiser.")
    lr: float = Field(default=5e-4, gt=0, description="Learning rate after the warm-up.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay; biases and norms are not decayed.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of sgd.")
    clip_norm: float = Field(default=5.0, ge=0, description="Largest norm of the gradients; 0 switches clipping off.")
    schedule: Literal["constant", "cosine", "steps"] = Field(
        default="cosine",
        description=(
            "Course of the learning rate: constant, cosine (down to 2 %), or steps (times gamma at each milestone)."
        ),
    )
    warmup_steps: int = Field(default=50, ge=0, description="Steps over which the learning rate rises linearly.")
    milestones: list[int] = Field(default=[], description="Steps at which schedule steps lowers the rate.")
    gamma: float = Field(default=0.1, gt=0, le=1, description="Factor at each milestone.")


class TrainingSettings(_Settings):
    """How long, how often, and in which precision."""

    steps: int = Field(default=1000, ge=1, description="Training steps.")
    epochs: int | None = Field(default=None, ge=1, description="Epochs, which decide instead of steps where given.")
    batch_size: int = Field(default=8, ge=1, description="Examples per step.")
    evaluate_every: int | None = Field(default=None, ge=1, description="Steps between validations; null: an epoch.")
    checkpoint_every: int | None = Field(default=None, ge=1, description="Steps between checkpoints; null: an epoch.")
    workers: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Processes that prepare batches, for each process that trains; 0: that one does; null: 0 on a CPU; on a GPU "
            "one for two cores, parted among those that train, at most 8. The result is the same."
        ),
    )
    seed: int = Field(default=0, ge=0, description="Seed of weights, data order and augmentation.")
    precision: Literal["auto", "32", "bf16-mixed", "16-mixed"] = Field(
        default="auto",
        description=(
            "Precision of networks and losses in training; auto: bf16-mixed on a CPU that multiplies bfloat16 (AMX, "
            "AVX-512 BF16), 32 on any other CPU, half precision on a GPU. Weights, optimiser and validation are always in "
            "full precision."
        ),
    )

    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description=(
            "Share of its past that the moving average of the weights keeps at each step; the version gets the average, "
            "which is steadier than the last step's weights. 0: no average."
        ),
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # YAML reads 32 as a number.
        return "32" if value == 32 and not isinstance(value, bool) else value


class _Recipe(_Settings):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the recipe.")
    weights: str = Field(
        default="none",
        description="Weights to start from: none, a name that the library knows, a path, or models:/NAME/VERSION.",
    )
    data: DataSettings = Field(default=DataSettings(), description="Data and how it is read.")
    augmentation: Augmentation = Field(default=Augmentation(), description="Augmentation of the training examples.")

    def flat(self) -> dict[str, Any]:
        """All settings as ``section.key`` -> value, for MLflow params."""
        return dict(flatten(self.model_dump()))

    def key(self, *more: str) -> str:
        """Digest of all settings and ``more``, 12 hex digits."""
        return hashlib.sha256(json.dumps([self.model_dump(), more], sort_keys=True).encode()).hexdigest()[:12]


class _LoopRecipe(_Recipe):
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="Optimiser.")
    training: TrainingSettings = Field(default=TrainingSettings(), description="Length, batches, precision.")

    @property
    def seed(self) -> int:
        """Seed of weights, data order and augmentation."""
        return self.training.seed


class SyntheticSettings(_Settings):
    """Drawn airfields (as `make_airfield` draws them) among the training windows; boxes and masks of them are exact."""

    share: float = Field(default=0.15, gt=0, lt=1, description="Share of the windows that show drawn airfields.")
    zoom: float = Field(default=0.75, ge=0.05, le=4, description="Scale at which their windows are cut.")
    scenes: int = Field(default=150, ge=1, le=10_000, description="Drawn scenes of 1,024 x 1,024 pixels; 2 MB each.")
    lengths: tuple[float, float] = Field(
        default=(18.0, 150.0), description="Least and greatest length of a drawn plane in pixels, before zoom."
    )
    fighters: float = Field(default=0.3, ge=0, le=1, description="Share of the drawn planes that are fighters.")
    seed: int = Field(default=0, ge=0, description="Seed of the drawn scenes.")

    @model_validator(mode="after")
    def _least_first(self) -> SyntheticSettings:
        if not 8 <= self.lengths[0] <= self.lengths[1] <= 400:
            raise ValueError(f"lengths: expected least and greatest, 8 to 400 pixels, found {list(self.lengths)}")
        return self


class WindowSettings(_Settings):
    """What a detector is trained on and how it predicts."""

    window: int | None = Field(
        default=None,
        ge=64,
        le=8192,
        description="Side in pixels of random windows to train on; null: whole images or tiles.",
    )
    window_zoom: float = Field(
        default=1.0,
        ge=0.05,
        le=4,
        description="Scale at which windows are cut, to go with tiling.zooms; 0.5: a window shows four times the ground.",
    )
    plane_sizes: tuple[float, float] | None = Field(
        default=None,
        description=(
            "Longer side in pixels that the plane a window is placed on is scaled to, drawn evenly on a logarithmic scale; "
            "enlarged by at most 2, shrunk by at most 8. null: planes keep their size."
        ),
    )
    focus: float = Field(default=0.8, ge=0, le=1, description="Share of the windows placed on a plane.")
    min_visible: float = Field(
        default=0.35, gt=0, le=1, description="Share of a cut plane that must be inside for it to count."
    )
    synthetic: SyntheticSettings | None = Field(
        default=None, description="Drawn airfields among the training windows, for kinds of planes that the data lack."
    )
    tiles: TileSettings | None = Field(default=None, description="A fixed grid of tiles to train on instead of windows.")
    tiling: Tiling | None = Field(
        default=None,
        description=(
            "Tiles to predict by, part of the version; null: tiles of the training's size where it had tiles, else whole "
            "images."
        ),
    )

    @model_validator(mode="after")
    def _one_cut(self) -> WindowSettings:
        if self.window is not None and self.tiles is not None:
            raise ValueError("window and tiles exclude each other; set one of them to null")
        if self.window is None and (self.plane_sizes is not None or self.window_zoom != 1):
            raise ValueError("plane_sizes and window_zoom scale windows; set window, or plane_sizes=null and window_zoom=1")
        if self.window is None and self.synthetic is not None:
            raise ValueError("synthetic mixes drawn windows with those of the data; set window, or synthetic=null")
        if self.plane_sizes is not None and not 4 <= self.plane_sizes[0] <= self.plane_sizes[1]:
            raise ValueError(
                f"plane_sizes: expected least and largest in pixels, 4 or more, found {list(self.plane_sizes)}"
            )
        return self

    @property
    def prediction(self) -> Tiling | None:
        """The tiling of the version; None for whole images."""
        if self.tiling is None and self.tiles is not None:
            return Tiling(size=self.tiles.size, overlap=self.tiles.overlap)
        return self.tiling


class DetectorRecipe(_LoopRecipe, WindowSettings):
    """Settings of ``train_detector`` with the torchvision engine."""

    task: Literal["detector"] = Field(description="Kind of training.")
    engine: Literal["torchvision"] = Field(default="torchvision", description="Detection library.")
    architecture: DetectorArchitecture = Field(
        default=DetectorArchitecture(), description="Layers of the network and its output."
    )


class MaskRecipe(_LoopRecipe, WindowSettings):
    """Settings of ``train_maskrcnn`` with the torchvision engine."""

    task: Literal["maskrcnn"] = Field(description="Kind of training.")
    engine: Literal["torchvision"] = Field(default="torchvision", description="Detection library.")
    architecture: MaskArchitecture = Field(default=MaskArchitecture(), description="Layers of the network and its output.")


class Detectron2Recipe(_Recipe, WindowSettings):
    """Settings of ``train_detector`` and ``train_maskrcnn`` with the Detectron2 engine.

    Windows keep the scale that they were cut at where ``INPUT.MIN_SIZE_TRAIN`` is 0.
    """

    task: Literal["detector", "maskrcnn"] = Field(description="Kind of training.")
    engine: Literal["detectron2"] = Field(description="Detection library.")
    weights: str = Field(
        default="zoo",
        description="zoo, imagenet, none, a URL, a path or models:/NAME/VERSION; opts MODEL.WEIGHTS says the same.",
    )
    config: str = Field(min_length=1, description="A name of Detectron2's model zoo, or a YAML file.")
    opts: dict[str, Any] = Field(default={}, description="Detectron2's own settings as KEY: value.")

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
    """Settings of ``train_unet``."""

    task: Literal["unet"] = Field(description="Kind of training.")
    engine: Literal["torch"] = Field(default="torch", description="Library that trains it.")
    architecture: SegmenterArchitecture = Field(default=SegmenterArchitecture(), description="Network and crops.")
    loss: Literal["bce", "bce_dice"] = Field(
        default="bce_dice", description="Binary cross-entropy, or its sum with the Dice loss."
    )
    box_jitter: float = Field(
        default=0.0, ge=0, le=0.5, description="Share of the box by which each side of a training crop moves at most."
    )

    @model_validator(mode="after")
    def _crops_have_one_plane(self) -> UNetRecipe:
        if self.augmentation.paste:
            raise ValueError("augmentation.paste is for detectors, whose examples have many planes; set it to 0")
        return self


Recipe = DetectorRecipe | MaskRecipe | Detectron2Recipe | UNetRecipe


def flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (``section.key``, value) pairs, in order."""
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
