"""What a version must show before an alias moves to it: gates from a YAML file, and their verdicts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import RecipeError, invalid_field, one_line
from models.geometry.rle import rle_iou
from models.instances import Instances
from models.runtime.devices import HalfPrecisionKind, TwinPrecision
from pipelines.data.dataset import Dataset
from pipelines.evaluation.metrics import SIZE_CLASSES
from pipelines.evaluation.side_by_side import Measurement, gain_confidence, slowdown
from pipelines.registry.training_images import TrainingImages

GATES = Path(__file__).parents[1] / "gates"


# Of a metric: scores that differ in their last digits change places.
ROUNDING = 0.0005
# A loss is significant where fewer resampled sets of images than this show none.
SIGNIFICANT = 0.025
# In full precision a twin's detections are its parent's: this far, in pixels and in score.
SAME_PIXELS, SAME_SCORE, SAME_MASKS = 0.01, 1e-4, 0.95


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricGate(_Settings):
    """Bounds of one metric."""

    minimum: float | None = Field(default=None, description="Least value.")
    min_gain: float | None = Field(
        default=None,
        description=(
            "Least gain over the baseline; below 0 allows a loss of that size, otherwise a tie leaves the baseline where "
            "it is."
        ),
    )
    confidence: float | None = Field(
        default=None, ge=0.5, lt=1, description="Least confidence of that gain, by a paired bootstrap over images."
    )

    @model_validator(mode="after")
    def confident_of_something(self) -> MetricGate:
        """A confidence is one of a gain."""
        if self.confidence is not None and self.min_gain is None:
            raise ValueError("confidence needs min_gain")
        return self


class SliceGate(_Settings):
    """Planes or images on which the main metric must not fall."""

    size: str | None = Field(default=None, description="COCO size class: small, medium or large.")
    images: str | None = Field(default=None, description="Pattern of image names, such as A00*.")
    max_loss: float = Field(default=0.0, ge=0, description="Largest loss against the baseline.")

    @model_validator(mode="after")
    def one_of_both(self) -> SliceGate:
        """By size or by name."""
        if (self.size is None) == (self.images is None) or self.size not in (None, *SIZE_CLASSES):
            raise ValueError(f"expected size ({', '.join(SIZE_CLASSES)}) or images (a pattern of names)")
        return self


class Gates(_Settings):
    """The gates of one alias."""

    against: str | None = Field(default=None, description="Alias of the baseline; null: the one to be moved.")
    metrics: dict[str, MetricGate] = Field(default={}, description="Bounds by metric.")
    slices: dict[str, SliceGate] = Field(default={}, description="Slices by name.")
    max_slowdown: float | None = Field(
        default=None, gt=0, description="Largest time per image, as a ratio to the baseline's."
    )
    max_size: float | None = Field(
        default=None, gt=0, description="Largest size of the weights, as a ratio to the baseline's."
    )
    max_megabytes: float | None = Field(default=None, gt=0, description="Largest size of the weights in megabytes.")
    min_planes: int = Field(default=0, ge=0, description="Least number of annotated planes in each data set.")

    @property
    def need_data(self) -> bool:
        """Whether anything has to be predicted."""
        return bool(self.metrics or self.slices or self.max_slowdown or self.min_planes)


class RequiredData(_Settings):
    """A data set to evaluate on."""

    path: str = Field(description="Folder or annotation file.")
    split: str = Field(default="test", description="Split of a data set folder.")
    digest: str | None = Field(default=None, description="Digest of its content, wherever it lies; null: any.")


class TwinGate(_Settings):
    """What a twin, or a half precision on a GPU, must show beside its parent before it is used."""

    max_loss: float | None = Field(
        default=None,
        ge=0,
        description="Largest loss of AP, AP50, mask AP and IoU; null: 0.0005 in f32, which is rounding, "
        "0.005 in bf16, bf16-mixed and 16-mixed, 0.01 in int8.",
    )
    min_speedup: float | None = Field(
        default=None,
        gt=0,
        description="Least gain in speed: the parent's time over the twin's; null: 1.0 for twins, 1.1 for bf16-mixed and "
        "16-mixed, as measuring one twice on a GPU differs by so much.",
    )

    def loss(self, precision: TwinPrecision | HalfPrecisionKind) -> float:
        """The largest loss in a precision."""
        if self.max_loss is not None:
            return self.max_loss
        return {"f32": ROUNDING, "int8": 0.01}.get(precision, 0.005)

    def speedup(self, precision: TwinPrecision | HalfPrecisionKind) -> float:
        """The least gain in speed in a precision."""
        if self.min_speedup is not None:
            return self.min_speedup
        return 1.1 if precision in ("bf16-mixed", "16-mixed") else 1.0


class GateFile(_Settings):
    """A model's gates by alias; an alias that is not named has those of ``production``."""

    data: list[RequiredData] = Field(default=[], description="Data sets to evaluate on.")
    gates: dict[str, Gates] = Field(description="Gates by alias.")
    accelerate: dict[TwinPrecision | HalfPrecisionKind, TwinGate] = Field(
        default={}, description="Gates of twins, and of half precisions on a GPU, by precision."
    )

    def of(self, alias: str) -> Gates:
        """The gates of an alias.

        Raises:
            RecipeError: none for it, and none for production.
        """
        gates = self.gates.get(alias) or self.gates.get("production")
        if gates is None:
            raise RecipeError(f"gates: none for {alias}, and none for production; known: {', '.join(self.gates) or 'none'}")
        return gates


def find_gates(name: str, given: str | None = None) -> tuple[GateFile, str]:
    """A model's gates and where they were found: the file that was given, ``gates/<name>.yaml``, or those of the project.

    ``prod.planes-det`` without a file of its own has those of ``planes-det``.

    Raises:
        RecipeError: no such file, not YAML, an unknown key (naming the nearest), a value out of range.
    """
    names = [name] + ([name.rpartition(".")[2]] if "." in name else [])
    places = [Path(given)] if given else [folder / f"{n}.yaml" for n in names for folder in (Path("gates"), GATES)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in GATES.glob("*.yaml")))
        raise RecipeError(
            f"gates {given}: no such file"
            if given
            else f"gates/{name}.yaml: no such file; give --gates FILE (known: {known})"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"gates {path}: not valid YAML ({one_line(error, 200)})") from error
    return parse_gates(content, f"gates {path}"), str(path)


def parse_gates(content: Any, where: str) -> GateFile:
    """Validate raw gates; ``where`` begins the error message."""
    try:
        return GateFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            fields = {f for k in (GateFile, RequiredData, Gates, SliceGate, MetricGate) for f in k.model_fields}
            near = difflib.get_close_matches(str(first["loc"][-1]), sorted(fields), 1, 0.5)
            raise RecipeError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")) from error
        raise RecipeError(f"{where}: {invalid_field(error)}") from error


@dataclass(frozen=True)
class Check:
    """One gate's verdict: what it requires and what was measured; ``metric``: it is on a metric of all images."""

    gate: str
    data: str
    required: str
    candidate: str
    baseline: str
    passed: bool
    metric: bool = False

    def __str__(self) -> str:
        beside = f" against {self.baseline}" if self.baseline != "-" else ""
        return f"{self.gate} {self.candidate}{beside} ({self.required} required)"


def judge(gates: Gates, main: str, candidate: Measurement, baseline: Measurement | None) -> list[Check]:
    """All gates of one data set; without a baseline those that compare pass.

    ``main`` is the metric of slices. What cannot be measured does not pass.

    Raises:
        RecipeError: a metric that this kind of model does not have.
    """
    where = f"{candidate.dataset.name}/{candidate.dataset.split}"
    # Where the data has no outlines, slices are judged by boxes.
    main = main if main in candidate.metrics else main.removeprefix("mask_")
    checks = []
    if gates.min_planes:
        planes = candidate.dataset.planes
        checks.append(Check("planes", where, f">= {gates.min_planes}", str(planes), "-", planes >= gates.min_planes))
    failed = [None if m is None else len(m.failed) for m in (candidate, baseline)]
    if any(failed):
        # They count in every metric; no gate of its own.
        ours, theirs = ("-" if count is None else str(count) for count in failed)
        checks.append(Check("images that failed", where, "taken for empty", ours, theirs, True))
    for metric, gate in gates.metrics.items():
        checks += _judge_metric(metric, gate, where, candidate, baseline)
    for title, limit in gates.slices.items():
        mine, its = (None if m is None else _slice(limit, main, m) for m in (candidate, baseline))
        checks.append(_against(f"{title}: {main}", where, least=-limit.max_loss, ours=mine, theirs=its))
    if gates.max_slowdown is not None:
        ratio = 1.0 if baseline is None else slowdown(candidate, baseline)
        shown = "-" if baseline is None else f"{ratio:.2f} times" if math.isfinite(ratio) else "cannot be measured"
        checks.append(Check("time", where, f"<= {gates.max_slowdown:g} times", shown, "-", ratio <= gates.max_slowdown))
    return checks


# Of segmenters the first, of models that find planes the others.
METRICS_OF_TWINS = ("IoU", "AP", "AP50", "mask_AP", "mask_AP50")


def judge_twin(
    gate: TwinGate, precision: TwinPrecision | HalfPrecisionKind, twin: Measurement, parent: Measurement
) -> list[Check]:
    """The gates of a twin, or of a half precision, on one data set, its parent measured beside it."""
    where = f"{twin.dataset.name}/{twin.dataset.split}"
    same = twin.failed.keys() == parent.failed.keys()
    checks = [Check("images that failed", where, "the same", str(len(twin.failed)), str(len(parent.failed)), same)]
    for metric in METRICS_OF_TWINS[:1] if twin.segmenter else METRICS_OF_TWINS[1:]:
        if metric not in parent.metrics or not math.isfinite(parent.metrics[metric]):
            continue
        check = _against(
            f"{metric} gain",
            where,
            least=-gate.loss(precision),
            ours=twin.metrics.get(metric, math.nan),
            theirs=parent.metrics[metric],
        )
        checks.append(replace(check, metric=True))
        share = gain_confidence(metric, -ROUNDING, twin, parent)
        # Of a single image nothing can be resampled.
        significant = math.isfinite(share) and share < SIGNIFICANT
        shown = "cannot be measured" if math.isnan(share) else f"lost on {1 - share:.0%} of resampled sets"
        checks.append(Check(f"{metric} loss", where, "not significant", shown, "-", not significant))
    if len(checks) == 1:
        checks.append(Check("metrics", where, "at least one", "none: no annotated planes", "-", False))
    elif not any(parent.metrics.get(metric, 0) > 0 for metric in METRICS_OF_TWINS):
        # Of a model that finds nothing nothing can be lost, whatever the twin gives.
        checks.append(Check("metrics", where, "above 0", "the version itself reaches 0", "-", False))
    if precision == "f32":
        checks.append(_same_detections(where, twin, parent))
    speedup = 1 / slowdown(twin, parent)
    shown = f"{speedup:.2f} times" if math.isfinite(speedup) else "cannot be measured"
    least = gate.speedup(precision)
    checks.append(Check("speed", where, f">= {least:g} times", shown, "-", speedup >= least))
    return checks


@dataclass(frozen=True)
class Differences:
    """How far detections of the same images differ.

    Attributes:
        pixels: largest distance of a border of matched boxes.
        score: largest difference of their scores.
        mask_iou: least IoU of their masks; None without masks.
        unequal: images with another number of detections.
        first_unequal: the first of them, in words.
    """

    pixels: float = 0.0
    score: float = 0.0
    mask_iou: float | None = None
    unequal: int = 0
    first_unequal: str | None = None

    @property
    def rounding(self) -> bool:
        """Whether they are no more than another order of additions makes."""
        masks = self.mask_iou is None or self.mask_iou >= SAME_MASKS
        return not self.unequal and self.pixels <= SAME_PIXELS and self.score <= SAME_SCORE and masks

    def __str__(self) -> str:
        masks = "" if self.mask_iou is None else f", masks' IoU at least {self.mask_iou:.3f}"
        return f"within {self.pixels:.2g} pixels, {self.score:.2g} of score{masks}"


def largest_differences(twin: Measurement, parent: Measurement) -> Differences:
    """Match every detection of the parent with the nearest of the twin, and the other way, image by image."""
    by_id = {p.image_id: p for p in twin.predictions}
    pixels = score = 0.0
    mask_ious, unequal = [], []
    for theirs in parent.predictions:
        ours = by_id.get(theirs.image_id)
        if ours is None or len(ours) != len(theirs):
            unequal.append(f"{theirs.image_id}: {0 if ours is None else len(ours)} detections, not {len(theirs)}")
        elif len(theirs):
            distances = np.abs(theirs.boxes[:, None] - ours.boxes[None]).max(axis=2)
            nearest = distances.argmin(axis=1)
            # Of both, so that none stands for two.
            pixels = max(pixels, float(distances.min(axis=1).max()), float(distances.min(axis=0).max()))
            score = max(score, float(np.abs(theirs.scores - ours.scores[nearest]).max()))
            if theirs.masks is not None or ours.masks is not None:
                mask_ious.append(_least_mask_iou(theirs, ours, nearest))
    return Differences(
        pixels=pixels,
        score=score,
        mask_iou=min(mask_ious, default=None),
        unequal=len(unequal),
        first_unequal=unequal[0] if unequal else None,
    )


def _least_mask_iou(theirs: Instances, ours: Instances, nearest: np.ndarray) -> float:
    """The least IoU of their masks and those of the nearest of ours; of equal masks it is 1, empty ones too."""
    if theirs.masks is None or ours.masks is None:
        return 0.0
    pairs = [(mask, ours.masks[i]) for mask, i in zip(theirs.masks, nearest, strict=True)]
    return min(1.0 if a == b else float(rle_iou([a], [b])[0, 0]) for a, b in pairs)


def _same_detections(where: str, twin: Measurement, parent: Measurement) -> Check:
    """Whether every detection of the parent is there again, and no other."""
    largest = largest_differences(twin, parent)
    masks = "" if largest.mask_iou is None else f", masks' IoU {SAME_MASKS:g}"
    required = f"within {SAME_PIXELS:g} pixels, {SAME_SCORE:g} of score{masks}"
    return Check("detections", where, required, largest.first_unequal or str(largest), "-", largest.rounding)


def _slice(gate: SliceGate, main: str, of: Measurement) -> float:
    return of.of_size(gate.size, main) if gate.size else of.of_images(str(gate.images), main)


def _judge_metric(
    metric: str, gate: MetricGate, where: str, candidate: Measurement, baseline: Measurement | None
) -> Iterable[Check]:
    ours = candidate.at(metric)
    theirs = None if baseline is None else baseline.at(metric)
    if gate.minimum is not None:
        yield Check(metric, where, f">= {gate.minimum:g}", _shown(ours), "-", ours >= gate.minimum, metric=True)
    if gate.min_gain is None:
        return
    yield replace(
        _against(f"{metric} gain", where, least=gate.min_gain, ours=ours, theirs=theirs, strict=True), metric=True
    )
    if gate.confidence is not None:
        share = 1.0 if baseline is None else gain_confidence(metric, gate.min_gain, candidate, baseline)
        shown = "-" if baseline is None else _shown(share)
        yield Check(f"{metric} gain, confidence", where, f">= {gate.confidence:g}", shown, "-", share >= gate.confidence)


def judge_group(gates: Gates, candidates: Sequence[Measurement], baselines: Sequence[Measurement]) -> list[Check]:
    """Whether a gain that a gate asks for is beyond the noise of seeds: its 95 % interval lies above it.

    ``candidates`` and ``baselines`` are the versions of each side's group on one data set; a baseline that stands alone
    is taken to be as noisy as the candidates are (`pipelines.evaluation.spread.difference`).
    """
    from pipelines.evaluation.spread import Spread, difference

    checks = []
    for metric, gate in gates.metrics.items():
        if gate.min_gain is None or not baselines:
            continue
        sides = [{str(i): m.at(metric) for i, m in enumerate(side)} for side in (baselines, candidates)]
        gain = difference(*sides)
        theirs, ours = (str(Spread.of(list(side.values()))) for side in sides)
        dataset = candidates[0].dataset
        required = f"> {gate.min_gain:+g} beyond the noise"
        shown = f"{ours} ({gain})"
        where, passed = f"{dataset.name}/{dataset.split}", gain.low > gate.min_gain
        checks.append(Check(f"{metric} gain over seeds", where, required, shown, theirs, passed, metric=True))
    return checks


def _against(
    gate: str, where: str, *, least: float, ours: float | None, theirs: float | None, strict: bool = False
) -> Check:
    """Gain of at least ``least``; with ``strict`` a tie is no gain."""
    assert ours is not None
    required = f"> {least:+g}" if strict and least == 0 else f">= {least:+g}"
    if theirs is None:
        return Check(gate, where, required, _shown(ours), "-", math.isfinite(ours))
    gain = ours - theirs
    passed = gain > least if strict and least == 0 else gain >= least - 1e-12
    shown = f"{_shown(ours)} ({gain:+.4f})" if math.isfinite(gain) else _shown(ours)
    return Check(gate, where, required, shown, _shown(theirs), passed)


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "cannot be measured"


def judge_size(gates: Gates, megabytes: float, baseline: float | None) -> list[Check]:
    """The gates on a version's size, which need no data."""
    checks = []
    if gates.max_size is not None:
        ratio = 1.0 if baseline is None else megabytes / baseline
        shown = "-" if baseline is None else f"{baseline:.1f} MB"
        size = f"{megabytes:.1f} MB ({ratio:.2f} times)"
        checks.append(Check("size", "-", f"<= {gates.max_size:g} times", size, shown, ratio <= gates.max_size))
    if gates.max_megabytes is not None:
        required = f"<= {gates.max_megabytes:g} MB"
        checks.append(Check("size", "-", required, f"{megabytes:.1f} MB", "-", megabytes <= gates.max_megabytes))
    return checks


def judge_data(required: Sequence[RequiredData], digests: Sequence[str]) -> list[Check]:
    """Whether every required content was evaluated on."""
    return [
        Check(
            "data set",
            f"{r.path}/{r.split}",
            str(r.digest),
            "there" if r.digest in digests else "not evaluated",
            "-",
            r.digest in digests,
        )
        for r in required
        if r.digest
    ]


def judge_images(
    datasets: Sequence[Dataset],
    trained_on: TrainingImages | None,
    baseline: TrainingImages | None = None,
    data_digest: str = "unknown",
) -> list[Check]:
    """Whether the candidate was trained on none of the images that it is judged on.

    What is not known is reported and does not fail. That the baseline was trained on some is reported too: its numbers
    are flattered, and a gain over them is harder.

    Args:
        data_digest: digest of the training set, all that releases before 0.6.1 noted.
    """
    required, checks = "none trained on", []
    for dataset in datasets:
        where = f"{dataset.name}/{dataset.split}"
        flattered = _share(baseline, dataset) if baseline is not None and baseline.shared_with(dataset) else "-"
        if trained_on is None:
            same = dataset.digest() == data_digest
            reason = "it is the training set" if same else "not known (imported, or registered before 0.6.1)"
            checks.append(Check("images", where, required, reason, flattered, not same))
            continue
        unknown = "".join(f"; not known of {name}" for name in trained_on.unknown)
        shared = trained_on.shared_with(dataset)
        checks.append(Check("images", where, required, _share(trained_on, dataset) + unknown, flattered, not shared))
    return checks


def _share(trained_on: TrainingImages, dataset: Dataset) -> str:
    shared = trained_on.shared_with(dataset)
    return f"{len(shared)} of {len(dataset)}" + (f" (first: {shared[0]})" if shared else "")
