"""Comparison and its page: numbers, ties, nothing found, one image, many images; the page in a real browser."""

import math
import shutil

import cv2
import numpy as np
import pytest

from models.errors import DataError
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.metrics import evaluate_instances
from scoring.comparison.compare import Candidate, compare, deltas
from scoring.comparison.report import write_report
from scoring.use_cases import _members_once

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def data(airfield):
    return open_dataset(str(airfield), "test")


def _guess(sample, noise, drop, rng, masks=True):
    keep = np.flatnonzero(rng.random(len(sample.boxes)) >= drop)
    boxes = (sample.boxes[keep] + rng.normal(0, noise, (len(keep), 4))).clip(0, sample.width).astype(np.float32)
    kept_masks = [sample.masks[i] for i in keep] if masks else None
    return Instances.make(
        sample.image_id, sample.height, sample.width, boxes, rng.uniform(0.3, 1, len(keep)), masks=kept_masks
    )


def _candidate(label, data, noise=1.0, drop=0.0, seed=0, masks=True):
    rng = np.random.default_rng(seed)
    return Candidate(
        label, [_guess(s, noise, drop, rng, masks) for s in data.samples], images_per_second=2.5, megabytes=18.0
    )


def test_the_numbers_are_the_evaluators_and_differences_are_to_the_first(data):
    good, bad = _candidate("good/1", data), _candidate("bad/1", data, 6.0, 0.3, 1)
    made = compare(data, [good, bad], resamples=50)
    assert made.kinds == ["bbox", "segm"]
    for kind in made.kinds:
        for one in (good, bad):
            assert made.metrics[kind][one.label] == evaluate_instances(data, one.predictions, kind).metrics
    pair = next(p for p in made.pairs if p.kind == "bbox")
    assert pair.label == "bad/1"
    assert pair.difference == pytest.approx(deltas(made, "bbox", "bad/1")["AP"])
    assert pair.verdict == "worse"
    assert made.curves["bbox"]["good/1"].mean() == pytest.approx(made.metrics["bbox"]["good/1"]["AP"])
    table = made.table([good, bad])
    assert list(table["model"]) == ["good/1", "bad/1"]
    assert {"AP", "mask_AP", "matched_IoU", "missed", "poorly outlined", "images/s", "MB"} <= set(table.columns)
    assert made.errors["bad/1"]["missed"] > made.errors["good/1"]["missed"]
    assert [d.disagreements for d in made.images] == sorted((d.disagreements for d in made.images), reverse=True)


def test_ties_show_no_difference(data):
    made = compare(data, [_candidate("a", data), _candidate("b", data)], resamples=20)
    assert {(p.difference, p.interval, p.verdict) for p in made.pairs} == {(0.0, (0.0, 0.0), "no difference shown")}
    assert {d.disagreements for d in made.images} == {0}
    assert {d.box for d in made.images} == {None}


def test_a_version_that_found_nothing(data, tmp_path):
    nothing = Candidate("nothing/1", [])
    candidates = [_candidate("a", data), nothing]
    made = compare(data, candidates, resamples=20)
    assert made.metrics["bbox"]["nothing/1"]["AP"] == 0
    assert made.errors["nothing/1"]["missed"] == data.planes
    assert math.isnan(made.matched_iou["nothing/1"])
    assert write_report(made, candidates, data, tmp_path / "r.html").stat().st_size > 10_000


def test_one_image_has_no_interval(data, tmp_path):
    one = data.subset([data.samples[0].image_id], "test")
    candidates = [_candidate("a", one), _candidate("b", one, 5.0)]
    made = compare(one, candidates)
    assert {p.interval for p in made.pairs} == {None}
    assert "nothing can be said about others" in made.pairs[0].verdict
    assert "one image" in write_report(made, candidates, one, tmp_path / "r.html").read_text()


def test_boxes_alone_are_compared_as_boxes(data):
    made = compare(data, [_candidate("a", data), _candidate("b", data, masks=False)], resamples=10)
    assert made.kinds == ["bbox"]


def test_all_are_measured_from_the_highest_threshold(data):
    low, high = _candidate("low", data, 3.0), _candidate("high", data, 3.0)
    high = Candidate("high", [f.above(0.6) for f in high.predictions], score_threshold=0.6)
    made = compare(data, [low, high], resamples=10)
    assert made.settings["score_threshold"] == 0.6
    assert made.metrics["bbox"]["low"] == made.metrics["bbox"]["high"]


def test_what_cannot_be_compared_is_refused(data, tmp_path):
    with pytest.raises(DataError, match="two or more different candidates, not a, a"):
        compare(data, [_candidate("a", data), _candidate("a", data)])
    with pytest.raises(DataError, match="two or more different candidates, not a"):
        compare(data, [_candidate("a", data)])
    foreign = Instances.make("elsewhere", 9, 9, [[0, 0, 3, 3]], [0.9])
    with pytest.raises(DataError, match="an image that it does not have"):
        compare(data, [_candidate("a", data), Candidate("b", [foreign])])


@pytest.fixture(scope="module")
def report(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    candidates = [_candidate("planes-inst/1", data), _candidate("planes-mask/12 <b>", data, 5.0, 0.3, 2)]
    return write_report(compare(data, candidates, resamples=20), candidates, data, folder / "report.html")


def test_the_page_asks_nothing_of_the_network_and_escapes_names(report):
    text = report.read_text()
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert "planes-mask/12 &lt;b&gt;" in text
    assert "<b>" not in text


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_in_a_browser_without_network(report, width, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(viewport={"width": width, "height": 900}, offline=True).new_page()
        messages = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("requestfailed", lambda request: messages.append(request.url[:80]))
        page.goto(report.as_uri())
        page.wait_for_load_state("load")
        assert messages == []
        count, missing = page.evaluate(
            "[document.images.length, [...document.images].filter(i => !i.complete || !i.naturalWidth).length]"
        )
        assert (count >= 10, missing) == (True, 0)
        # Nothing runs out of the page sideways; wide tables scroll in their own frame.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('p, td, th')].map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        assert cv2.imread(str(tmp_path / "page.png")) is not None
        browser.close()


def test_groups_of_versions_have_a_spread_and_are_held_against_the_first(data, tmp_path):
    noise = {"a/1": 1.0, "a/2": 1.3, "b/1": 5.0, "b/2": 5.5, "c/1": 1.0}
    candidates = [_candidate(label, data, n, 0, seed) for seed, (label, n) in enumerate(noise.items())]
    groups = {"a/1..2": ["a/1", "a/2"], "b/1..2": ["b/1", "b/2"], "c/1": ["c/1"], "a/2": ["a/2"]}
    made = compare(data, candidates, resamples=20, groups=groups)
    boxes = [g for g in made.groups if g.kind == "bbox"]
    assert [g.label for g in boxes] == ["a/1..2", "b/1..2", "c/1", "a/2"]
    values = [made.metrics["bbox"][label]["AP"] for label in ("a/1", "a/2", "b/1", "b/2", "c/1")]
    assert boxes[0].spreads["AP"] == f"{np.mean(values[:2]):.3f} ± {np.std(values[:2], ddof=1):.3f} (2)"
    assert boxes[0].differences == {}
    gap = np.mean(values[2:4]) - np.mean(values[:2])
    assert boxes[1].differences["AP"].startswith(f"{gap:+.3f} [")
    assert boxes[2].spreads["AP"] == f"{values[4]:.3f}"
    assert "the noise" in boxes[2].differences["AP"]
    # A version may be in a group and stand alone too.
    assert boxes[3].spreads["AP"] == f"{values[1]:.3f}"
    text = write_report(made, candidates, data, tmp_path / "report.html").read_text()
    assert "Groups of versions" in text
    assert boxes[1].differences["AP"] in text
    # Versions that were named one by one are no groups.
    assert compare(data, candidates, resamples=20).groups == []


def test_what_a_group_holds_is_scored_once():
    named = {"a/1..2": ["a/1", "a/2"], "a/2": ["a/2"], "b/1": ["b/1"], "a/2..3": ["a/2", "a/3"]}
    assert _members_once(named, ["a/1..2", "a/2", "a/2..3", "b/1"]) == ["a/1", "a/2", "a/3", "b/1"]
    assert _members_once(named, ["a/2", "a/1..2"]) == ["a/2", "a/1"]
    # The same thing named twice is a mistake that the comparison refuses.
    assert _members_once({"b/1": ["b/1"]}, ["b/1", "b/1"]) == ["b/1", "b/1"]
