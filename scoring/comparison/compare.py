"""Several predictions of the same images, compared; metrics come from pipelines.evaluation."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype
from tabulate import tabulate

from models.errors import DataError
from models.instances import Instances
from pipelines.data.dataset import Dataset, Sample
from pipelines.evaluation.matching import Diagnosis, Kind, bootstrap_difference, diagnose, disagreement, rank
from pipelines.evaluation.metrics import COCO_METRICS, evaluate_instances

# First the numbers that people look for, then the rest as they come.
ORDER = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "mask_AP", "mask_AP50", "IoU", "Dice")


@dataclass(frozen=True)
class Scored:
    """One scoring run in the comparison: version, data and results.

    Attributes:
        label: of the version.
        data: name and split of the data set.
        digest: of the data set.
        metrics: by name.
        images: how many were predicted.
        seconds: of work.
        source: where the images came from.
        score_threshold: least score that was kept.
        megabytes: size of the saved model.
        category: what was looked for.
        failed: images that could not be read or predicted.
        leaves_out: whether its metrics are without these.
        segmenter: whether the version segments given boxes.
    """

    label: str
    data: str
    digest: str
    metrics: Mapping[str, float]
    images: int
    seconds: float
    source: str = ""
    score_threshold: float = 0.05
    megabytes: float = math.nan
    category: str = "plane"
    failed: int = 0
    leaves_out: bool = False
    segmenter: bool = False


def check_same_data(runs: Sequence[Scored]) -> None:
    """Refuse to compare over different images.

    Raises:
        DataError: naming the runs and data sets that differ.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.digest != first.digest:
            raise DataError(
                f"{other.label} was scored on {other.data} (digest {other.digest}), "
                f"{first.label} on {first.data} (digest {first.digest}); only equal data can be compared"
            )


def comparison_table(runs: Sequence[Scored]) -> pd.DataFrame:
    """One row per run; metrics as columns in reading order, then images per second.

    Raises:
        DataError: the runs are over different images.
    """
    check_same_data(runs)
    known = [{} if r.leaves_out else r.metrics for r in runs]
    columns = [k for k in ORDER if any(k in r.metrics for r in runs)]
    rows = []
    for run, metrics in zip(runs, known, strict=True):
        row: dict[str, object] = {"model": run.label, **{k: metrics.get(k, math.nan) for k in columns}}
        row |= {"images": run.images, **({"failed": run.failed} if any(r.failed for r in runs) else {})}
        row["images/s"] = run.images / run.seconds if run.seconds else math.nan
        rows.append(row)
    return pd.DataFrame(rows)


def render(table: pd.DataFrame) -> str:
    """The table as text for a terminal."""
    known = table.astype(object).where(table.notna(), None)
    # A label that looks like a number is shown as it is.
    words = [i for i, kind in enumerate(table.dtypes) if not is_numeric_dtype(kind)]
    look = {"headers": "keys", "tablefmt": "simple", "showindex": False, "floatfmt": ".3f", "missingval": "-"}
    return tabulate(known, disable_numparse=words, **look)


# Errors and disagreements are counted among detections of at least this score.
SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class Candidate:
    """One set of predictions in a comparison; the score below which none were kept, speed and size where known.

    failed: how many images could not be read or predicted, None where that is not known.
    folder: of the job that made them, on this machine; None where that is not known.
    """

    label: str
    predictions: Sequence[Instances]
    _: KW_ONLY
    score_threshold: float = 0.05
    images_per_second: float = math.nan
    megabytes: float = math.nan
    failed: int | None = None
    folder: Path | None = None

    def view(self, dataset: Dataset) -> str | None:
        """The command that shows them image by image; None where there is no job to show."""
        if self.folder is None:
            return None
        words = ["score", "view", str(self.folder), "--data", str(dataset.source)]
        return shlex.join(words if dataset.split in ("test", "all") else [*words, "--split", dataset.split])


@dataclass(frozen=True)
class Group:
    """Versions that were named together, such as those of several seeds: their spread, and how they differ from the first.

    Attributes:
        label: of the group.
        kind: boxes or masks.
        spreads: metric -> ``mean ± standard deviation (count)``.
        differences: metric -> difference to the first group with its interval and what it allows to say.
    """

    label: str
    kind: Kind
    spreads: dict[str, str]
    differences: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A candidate against the first one: difference of AP and its 95 % interval over resampled images."""

    label: str
    kind: Kind
    difference: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows."""
        if self.interval is None:
            return "one image: no interval, nothing can be said about others"
        if self.interval[0] > 0:
            return "better"
        return "worse" if self.interval[1] < 0 else "no difference shown"


@dataclass(frozen=True)
class ImageDifference:
    """How far candidates disagree on one image; ``box`` (xyxy) is where most is to be seen."""

    image_id: str
    disagreements: int
    correct: tuple[int, ...]
    false: tuple[int, ...]
    missed: tuple[int, ...]
    box: tuple[float, float, float, float] | None


@dataclass(frozen=True)
class Comparison:
    """Everything that a report shows; labels are in the order of the candidates."""

    labels: list[str]
    kinds: list[Kind]
    metrics: dict[Kind, dict[str, dict[str, float]]]
    curves: dict[Kind, dict[str, np.ndarray]]
    pairs: list[Pair]
    errors: dict[str, dict[str, int]]
    matched_iou: dict[str, float]
    images: list[ImageDifference]
    groups: list[Group] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self, candidates: Sequence[Candidate]) -> pd.DataFrame:
        """One row per candidate: metrics (masks prefixed ``mask_``), IoU of matched planes, errors, speed, size."""
        rows = []
        for one in candidates:
            row: dict[str, object] = {"model": one.label}
            if any(c.failed for c in candidates):
                row["failed"] = one.failed
            for kind in self.kinds:
                prefix = "mask_" if kind == "segm" else ""
                row |= {prefix + k: v for k, v in self.metrics[kind][one.label].items()}
            row |= {"matched_IoU": self.matched_iou[one.label], **self.errors[one.label]}
            rows.append({**row, "images/s": one.images_per_second, "MB": one.megabytes})
        return pd.DataFrame(rows)


def compare(
    dataset: Dataset,
    candidates: Sequence[Candidate],
    resamples: int = 500,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Comparison:
    """Compare two or more candidates on a data set with truth; the others are compared with the first.

    Args:
        dataset: with truth.
        candidates: what is compared.
        resamples: of the images, for intervals.
        groups: group -> labels of its candidates; groups are held against each other, by their spread.

    Masks are compared where truth and every candidate have them, boxes always. All
    metrics count detections from the highest score threshold of the candidates on:
    otherwise one that kept more would be measured by another rule.

    Raises:
        DataError: fewer than two, equal labels, no truth, or predictions for other images.
    """
    labels = [c.label for c in candidates]
    if len(candidates) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"a comparison needs two or more different candidates, not {', '.join(labels) or 'none'}")
    threshold = max(c.score_threshold for c in candidates)
    masks = dataset.has_masks and all(p.masks is not None or not len(p) for c in candidates for p in c.predictions)
    kinds: list[Kind] = ["bbox", "segm"] if masks else ["bbox"]
    kept = {c.label: [p.above(threshold) for p in c.predictions] for c in candidates}
    metrics: dict[Kind, dict[str, dict[str, float]]] = {}
    curves: dict[Kind, dict[str, np.ndarray]] = {}
    pairs = []
    for kind in kinds:
        metrics[kind] = {k: evaluate_instances(dataset, kept[k], kind, score_threshold=threshold).metrics for k in labels}
        ranked = {k: rank(dataset, kept[k], kind) for k in labels}
        curves[kind] = {k: r.curve() for k, r in ranked.items()}
        for label in labels[1:]:
            difference = metrics[kind][label]["AP"] - metrics[kind][labels[0]]["AP"]
            pairs.append(
                Pair(label, kind, difference, bootstrap_difference(ranked[labels[0]], ranked[label], resamples=resamples))
            )
    diagnoses = {k: _diagnoses(dataset, kept[k], masks) for k in labels}
    errors = {k: _sum([d.counts() for d in of.values()]) for k, of in diagnoses.items()}
    overlaps = {k: [o for d in of.values() for o in d.overlaps] for k, of in diagnoses.items()}
    settings = {
        "data": f"{dataset.name}/{dataset.split}",
        "digest": dataset.digest(),
        "images": len(dataset),
        "planes": dataset.planes,
        "score_threshold": threshold,
        "max_dets": 100,
        "resamples": resamples,
        "errors_at_score": SHOWN_SCORE,
        "images_failed": ", ".join(f"{c.label} {c.failed}" for c in candidates if c.failed) or "none known",
    }
    matched = {k: float(np.mean(v)) if v else math.nan for k, v in overlaps.items()}
    images = _rank_images(dataset, kept, diagnoses, masks)
    return Comparison(
        labels=labels,
        kinds=kinds,
        metrics=metrics,
        curves=curves,
        pairs=pairs,
        errors=errors,
        matched_iou=matched,
        images=images,
        groups=_groups(groups or {}, metrics),
        settings=settings,
    )


# The metrics whose spread over a group is shown.
OF_GROUPS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _groups(members: Mapping[str, Sequence[str]], metrics: Mapping[Kind, Mapping[str, Mapping[str, float]]]) -> list[Group]:
    if not members:
        return []
    # Needs scipy, which a scorer's environment does without.
    from pipelines.evaluation.spread import Spread, difference

    groups = []
    for kind, of_kind in metrics.items():
        first: dict[str, dict[str, float]] = {}
        for label, labels in members.items():
            values = {name: {one: of_kind[one][name] for one in labels} for name in OF_GROUPS}
            spreads = {name: str(Spread.of(list(v.values()))) for name, v in values.items()}
            differences = {name: str(difference(first[name], v)) for name, v in values.items()} if first else {}
            groups.append(Group(label, kind, spreads, differences))
            first = first or values
    return groups


def _diagnoses(dataset: Dataset, predictions: Sequence[Instances], masks: bool) -> dict[str, Diagnosis]:
    by_id = {p.image_id: p.above(SHOWN_SCORE) for p in predictions}
    return {s.image_id: diagnose(s, by_id.get(s.image_id, _empty(s)), masks) for s in dataset.samples}


def _empty(sample: Sample) -> Instances:
    return Instances.empty(sample.image_id, sample.height, sample.width, masks=True)


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(c[key] for c in counts) for key in counts[0]}


def _rank_images(
    dataset: Dataset, kept: Mapping[str, Sequence[Instances]], diagnoses: Mapping[str, Mapping[str, Diagnosis]], masks: bool
) -> list[ImageDifference]:
    labels = list(kept)
    by_id = {k: {f.image_id: f.above(SHOWN_SCORE) for f in of} for k, of in kept.items()}
    rows = []
    for sample in dataset.samples:
        shown = {k: by_id[k].get(sample.image_id, _empty(sample)) for k in labels}
        total, places = 0, []
        for label in labels[1:]:
            left, right = disagreement(shown[labels[0]], shown[label], masks)
            total += len(left) + len(right)
            places += [(shown[labels[0]].scores[i], shown[labels[0]].boxes[i]) for i in left]
            places += [(shown[label].scores[i], shown[label].boxes[i]) for i in right]
        counts = [diagnoses[k][sample.image_id].counts() for k in labels]
        box = max(places, key=lambda p: p[0])[1] if places else None
        rows.append(
            ImageDifference(
                image_id=sample.image_id,
                disagreements=total,
                correct=tuple(c["correct"] for c in counts),
                false=tuple(c["false"] + c["duplicate"] for c in counts),
                missed=tuple(c["missed"] for c in counts),
                box=None if box is None else (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            )
        )
    return sorted(rows, key=lambda r: (-r.disagreements, r.image_id))


def deltas(comparison: Comparison, kind: Kind, label: str) -> dict[str, float]:
    """COCO's twelve numbers of a candidate minus those of the first."""
    first, other = comparison.metrics[kind][comparison.labels[0]], comparison.metrics[kind][label]
    return {k: other[k] - first[k] for k in COCO_METRICS}
