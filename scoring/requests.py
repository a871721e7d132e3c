"""What scoring and comparing are asked for; each field has its help, which commands and the settings reference show.

Plain dataclasses: ``--help`` is not to wait for pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.runtime.devices import Precision
from pipelines.use_cases.requests import DEVICE

Convention = Literal["course", "airbus"]
GeoJSON = Literal["rfc7946", "native"]
Runtime = Literal["auto", "torch", "openvino"]
RunnerName = Literal["local", "ray"]
# What runs a job's networks, as manifests name it.
TORCH = "torch"

# The score from which AP is measured.
DEFAULT_THRESHOLD = 0.05

SPLIT = {"help": "Split of a data set folder; train+test: both."}
RLE = {"help": "Runs of the Kaggle CSV."}
SCORE_THRESHOLD = {"help": "Least score that is kept."}
GEOJSON = {
    "help": "Coordinates of the GeoJSON files: longitude and latitude as in RFC 7946, or native: each image's own system."
}


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """How planes are put onto one map."""

    crs: str = field(default="EPSG:4326", metadata={"help": "Coordinate system of a map layer, such as EPSG:32633."})
    dedupe: bool = field(
        default=False, metadata={"help": "In a map layer, count a plane once that overlapping images of one time show."}
    )
    time_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose first group is the time in an image's name; without it the TIFF's own tag. "
            "Images with the same time, or with none, are of one time."
        },
    )


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """How to score."""

    batch_size: int | None = field(
        default=None, metadata={"help": "Images, or tiles, per forward pass; by default one on a CPU, eight on a GPU."}
    )
    score_threshold: float = field(default=DEFAULT_THRESHOLD, metadata=SCORE_THRESHOLD)
    overlays: int = field(default=3, metadata={"help": "Pictures to draw."})
    rle: Convention = field(default="course", metadata=RLE)
    geojson: GeoJSON = field(default="rfc7946", metadata=GEOJSON)
    tiling: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": 'Settings of the version\'s tiling to change; {"size": 0} for whole images.'},
    )
    shard_size: int = field(default=32, metadata={"help": "Images written, and after a stop lost, together."})
    part_size: int | None = field(
        default=None,
        metadata={
            "help": "Images of a part, where the job is to lie in parts; by default it does in a URL and from 100,000 "
            "images on, 4,096 in each."
        },
    )
    workers: int | None = field(
        default=None,
        metadata={"help": "Threads that decode images; by default by CPUs and place of the images."},
    )
    fresh: bool = field(
        default=False, metadata={"help": "Score anew where the folder holds another or an unfinished scoring."}
    )
    update: bool = field(
        default=False,
        metadata={
            "help": "Where the folder holds a scoring of other images, keep what is unchanged, score what is new or "
            "changed, and set aside what is gone."
        },
    )
    precision: Precision = field(default="32", metadata={"help": "Of the networks."})
    runtime: str = field(default=TORCH, metadata={"help": "What runs the networks: torch, or a twin: openvino bf16."})
    value_range: str | None = field(
        default=None, metadata={"help": "Values shown: auto, percentile, depth, or LOW,HIGH; by default the version's."}
    )
    bands: str | None = field(
        default=None,
        metadata={"help": "Bands shown as red, green, blue: 4,3,2, or auto; by default the version's."},
    )

    # A models.saved.scores.Scores, whose import would make --help wait for pydantic.
    scores: Any = field(
        default=None,
        metadata={
            "help": "Calibration of the version: the table has probabilities, the Kaggle CSV what reaches its threshold."
        },
    )

    @property
    def changes(self) -> dict[str, Any]:
        """What to change of the version's tiling."""
        return {**self.tiling, **({"batch": self.batch_size} if self.batch_size and self.tiling.get("size") != 0 else {})}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What runs the scoring."""

    runner: RunnerName = field(default="local", metadata={"help": "What runs the scoring."})
    address: str | None = field(default=None, metadata={"help": "A running Ray cluster; by default one in this machine."})
    actors: int | None = field(
        default=None,
        metadata={
            "help": "Ray actors; by default one a GPU, or one for two CPUs; 2-8: 2, and more while the cluster has room."
        },
    )
    most_actors: int | None = field(
        default=None,
        metadata={"help": "Most Ray actors, started while the cluster has room for them; --actors 2-8 says both."},
    )


LOCAL = Execution()


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score, with what, and where to leave it."""

    models: tuple[str, ...] = field(
        metadata={"help": "NAME/VERSION, NAME/ALIAS, NAME@ALIAS, models:/..., or a saved folder; repeatable."}
    )
    data: str = field(
        metadata={"help": "Folder, COCO JSON, course JSON, STAC items, image, quoted glob, CSV or parquet list, or a URL."}
    )
    out: str = field(
        default="predictions", metadata={"help": "Folder or URL for outputs, a folder inside for each version."}
    )
    split: str = field(default="test", metadata=SPLIT)
    scene_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression whose first group is an image's scene."}
    )
    device: str = field(default="auto", metadata=DEVICE)
    auto_threshold: bool = field(
        default=False, metadata={"help": "Keep what reaches the score that the version itself suggests."}
    )
    settings: JobSettings = field(default_factory=JobSettings, metadata={"help": "How to score."})
    execution: Execution = field(default=LOCAL, metadata={"help": "What runs the scoring."})
    runtime: Runtime = field(
        default="auto",
        metadata={
            "help": "What runs the networks; auto: the fastest approved twin that this CPU computes, else PyTorch, on a "
            "GPU in the fastest approved precision."
        },
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest:
    """What to compare; the others are held against the first."""

    targets: tuple[str, ...] = field(
        metadata={"help": "Scoring runs (MLflow run ids), versions, job folders or files of predictions."}
    )
    data: str | None = field(
        default=None, metadata={"help": "Data set with ground truth; without it that of the scoring runs."}
    )
    split: str = field(default="test", metadata=SPLIT)
    out: str = field(default="comparison", metadata={"help": "Folder for report.html and comparison.csv."})
    device: str = field(default="auto", metadata=DEVICE)
    score_threshold: float = field(default=0.05, metadata=SCORE_THRESHOLD)
    category: str = field(
        default="auto", metadata={"help": "Class to measure files by; auto: that of the job, else plane."}
    )
