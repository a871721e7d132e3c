"""What the use cases are asked for; each field has its help, which commands and the settings reference show.

Plain dataclasses: ``--help`` is not to wait for pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.runtime.devices import HalfPrecisionKind, TwinPrecision

WORK_DIR = ".planes/training"

DEVICE = {"help": "auto, cpu, cuda or cuda:N."}
ENGINE = {"help": "Detection library; takes the recipe's twin NAME_ENGINE where the recipe is for another."}
FOLDS = {"help": "Folds by scene, each scored by a training on the others; 0: none. Nothing is registered."}
SEEDS = {"help": "Seeds to train with, from the recipe's own upwards; mean and standard deviation of every metric."}
SCORES_FROM = {"help": "Parent run of a training with --folds; the version gets its calibration and score threshold."}
NUM_GPUS = {"help": "Processes that share each batch, on the first GPUs; with --device cpu so many on the CPU."}
GATES = {"help": "YAML file of gates; without it gates/MODEL.yaml, else the project's own."}
GATE_SPLIT = {"help": "Split of data folders, instead of that of the gates."}
KEPT_IN = {"help": "Where checkpoints are kept."}
REGISTER_AS = {"help": "Registered model to add a version to."}
TRAINED_ON = {"help": "Data folder, COCO JSON or course JSON."}
RECIPE = {"help": "Recipe name or path of a YAML file."}


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train, on what, and where to register it."""

    task: str = field(metadata={"help": "unet, detector or maskrcnn."})
    recipe: str = field(metadata=RECIPE)
    data: str = field(metadata=TRAINED_ON)
    register_as: str = field(metadata=REGISTER_AS)
    device: str = field(default="auto", metadata=DEVICE)
    overrides: tuple[str, ...] = field(default=(), metadata={"help": "section.key=value of the recipe; repeatable."})
    engine: str | None = field(default=None, metadata=ENGINE)
    work_dir: str = field(default=WORK_DIR, metadata=KEPT_IN)
    reuse: bool = field(default=False, metadata={"help": "Take the version of an equal training, if there is one."})
    fresh: bool = field(
        default=False,
        metadata={
            "help": "Throw away an unfinished equal training instead of going on; with --folds or --seeds do all again."
        },
    )
    num_gpus: int = field(default=1, metadata=NUM_GPUS)
    register: bool = field(default=True, metadata={"help": "Add a version; otherwise the model is logged alone."})
    label: str = field(default="", metadata={"help": "What the run is called beside the model."})
    scores_from: str | None = field(default=None, metadata=SCORES_FROM)
    tags: Mapping[str, str] = field(default_factory=dict, metadata={"help": "More tags of the run and its version."})


@dataclass(frozen=True, kw_only=True)
class AblationRequest:
    """Which variants of a recipe to train, how often, and on which folds; without variants the recipe as it is."""

    recipe: str = field(metadata=RECIPE)
    data: str = field(metadata=TRAINED_ON)
    name: str = field(metadata={"help": "Name of the models logged (not registered)."})
    device: str = field(default="auto", metadata=DEVICE)
    grid: tuple[str, ...] = field(
        default=(), metadata={"help": '"key=v1,v2": all combinations of all entries; repeatable.'}
    )
    variants: tuple[str, ...] = field(
        default=(), metadata={"help": '"key=v key=v; key=v": variants one by one, instead of a grid.'}
    )
    overrides: tuple[str, ...] = field(default=(), metadata={"help": "section.key=value for all variants; repeatable."})
    metric: str = field(default="auto", metadata={"help": "AP, AP50, mask_AP, IoU, ...; auto: the task's main one."})
    engine: str | None = field(default=None, metadata=ENGINE)
    work_dir: str = field(default=WORK_DIR, metadata=KEPT_IN)
    fresh: bool = field(default=False, metadata={"help": "Do again what an equal ablation has done."})
    folds: int = field(default=0, metadata=FOLDS)
    seeds: int = field(default=1, metadata=SEEDS)
    search: int = field(
        default=0,
        metadata={"help": "Trials of a search over the grid, whose entries may be ranges: lr=0.0001..0.003; 0: all of it."},
    )
    task: str | None = field(default=None, metadata={"help": "unet, detector or maskrcnn; without it the recipe's."})
    register: bool = field(default=False, metadata={"help": "Add a version for each seed, where there are no folds."})
    num_gpus: int = field(default=1, metadata=NUM_GPUS)
    scores_from: str | None = field(default=None, metadata=SCORES_FROM)


@dataclass(frozen=True, kw_only=True)
class ComposeRequest:
    """What to compose, and what to evaluate it on."""

    detector: str = field(metadata={"help": "NAME/VERSION, NAME/ALIAS or a folder."})
    segmenter: str = field(metadata={"help": "NAME/VERSION, NAME/ALIAS or a folder."})
    name: str = field(metadata=REGISTER_AS)
    data: str = field(metadata={"help": "Data to evaluate on; its test split is used."})
    overlaps: Literal["exclusive", "keep"] = field(
        default="exclusive", metadata={"help": "exclusive: a pixel belongs to the plane of the higher score."}
    )
    min_score: float = field(default=0.0, metadata={"help": "Least score to segment."})
    device: str = field(default="auto", metadata=DEVICE)
    reuse: bool = field(default=False, metadata={"help": "Take the version of an equal composition, if there is one."})


@dataclass(frozen=True, kw_only=True)
class PromotionRequest:
    """What to promote, and by which gates."""

    model: str = field(metadata={"help": "Candidate: NAME/VERSION, NAME@ALIAS, or NAME/FIRST..LAST, a group."})
    alias: str = field(default="production", metadata={"help": "Alias to move."})
    data: tuple[str, ...] = field(
        default=(), metadata={"help": "Data sets to evaluate on instead of those of the gates; repeatable."}
    )
    split: str | None = field(default=None, metadata=GATE_SPLIT)
    device: str = field(default="auto", metadata=DEVICE)
    gates: str | None = field(default=None, metadata=GATES)
    dry_run: bool = field(default=False, metadata={"help": "Evaluate and judge, move nothing."})
    force: bool = field(default=False, metadata={"help": "Move the alias even if a gate fails; needs --reason."})
    reason: str = field(default="", metadata={"help": "Why, for the history."})


@dataclass(frozen=True, kw_only=True)
class AccelerateRequest:
    """What to make faster, on which device, in which precisions, and what to measure it on."""

    model: str = field(metadata={"help": "NAME/VERSION or NAME@ALIAS."})
    device: str = field(
        default="cpu", metadata={"help": "cpu: twins; cuda or cuda:N: half precision on that GPU, measured there."}
    )
    precisions: tuple[TwinPrecision | HalfPrecisionKind, ...] | None = field(
        default=None,
        metadata={
            "help": "f32, bf16, int8 of twins, bf16-mixed, 16-mixed on a GPU; repeatable; without it all that can be had."
        },
    )
    gates: str | None = field(default=None, metadata=GATES)
    data: tuple[str, ...] = field(
        default=(), metadata={"help": "Data sets to measure on instead of those of the gates; repeatable."}
    )
    split: str | None = field(default=None, metadata=GATE_SPLIT)
    calibration: str | None = field(
        default=None, metadata={"help": "Data set whose training split calibrates int8; without it no int8."}
    )
