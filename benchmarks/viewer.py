"""How soon the page of ``score view`` shows a picture, and how long a step takes: ``python -m benchmarks.viewer``.

A drawn job: JPEGs of 1,024 pixels with outlines, and their truth. The command is started as a user starts it, and
headless Chromium opens its page. Measured in the page itself, from the key or click until picture and outlines are
drawn: steps with a pause between them, in which the page fetches the neighbours; steps one after the other as fast as
the page answers; jumps to an image of the list, which nothing was fetched for. Needs Chromium and the package
playwright (requirements-dev.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from models.geometry.rle import RLE, rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.job import run_job
from scoring.requests import JobSettings

SIDE, PLANES, LENGTH = 1024, 12, 60
# Waits until the page says that it shows another image, and the browser has drawn it.
STEP = """
action => new Promise((done, failed) => {
  setTimeout(() => failed(new Error("no other image within 20 s")), 20000);
  const status = document.getElementById("status"), before = status.textContent, began = performance.now();
  const watch = new MutationObserver(() => {
    if (status.textContent === before) return;
    watch.disconnect();
    requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
  });
  watch.observe(status, { childList: true, characterData: true, subtree: true });
  if (action === null) document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  else document.getElementById("list").children[action].firstChild.click();
})
"""


def _boxes(number: int) -> list[list[int]]:
    """Where planes are drawn on an image (xyxy in pixels); the same for the same number."""
    dice = random.Random(number)
    corners = [(dice.randrange(SIDE - LENGTH), dice.randrange(SIDE - LENGTH)) for _ in range(PLANES)]
    return [[x, y, x + LENGTH, y + LENGTH] for x, y in corners]


def _mask(box: Sequence[int]) -> RLE:
    """A fuselage and wings."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    x1, y1, x2, y2 = box
    cv2.line(mask, ((x1 + x2) // 2, y1), ((x1 + x2) // 2, y2 - 1), 1, 9)
    cv2.line(mask, (x1, (y1 + y2) // 2), (x2 - 1, (y1 + y2) // 2), 1, 9)
    return rle_encode(mask.astype(bool))


class Drawn:
    """Finds all planes that were drawn on an image but the last, and one that is none."""

    def __init__(self) -> None:
        self.number = 0

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """The images come in their order."""
        found = []
        for _ in images:
            boxes = [*_boxes(self.number)[:-1], _boxes(self.number + 500_000)[0]]
            scores = [0.99 - 0.04 * i for i in range(len(boxes))]
            masks = [_mask(box) for box in boxes]
            found.append(Instances.make("", SIDE, SIDE, boxes, scores, masks=masks))
            self.number += 1
        return found


def make_job(folder: Path, count: int) -> tuple[Path, Path]:
    """Draw images and truth, and score them; the job's folder and the data set."""
    data = folder / "data"
    (data / "test").mkdir(parents=True)
    ground = np.random.default_rng(0).normal(0, 12, (2 * SIDE, 2 * SIDE, 3))
    images: list[dict[str, Any]] = []
    planes: list[dict[str, Any]] = []
    for number in range(count):
        shift = number * 37 % SIDE
        image = (ground[shift : shift + SIDE, :SIDE] + 100 + number % 40).clip(0, 255).astype(np.uint8)
        for x1, y1, x2, y2 in _boxes(number):
            cv2.line(image, ((x1 + x2) // 2, y1), ((x1 + x2) // 2, y2 - 1), (225, 225, 225), 9)
            cv2.line(image, (x1, (y1 + y2) // 2), (x2 - 1, (y1 + y2) // 2), (225, 225, 225), 9)
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "image_id": number, "category_id": 1, "iscrowd": 0}
            planes.append({"id": len(planes), **box})
        cv2.imwrite(str(data / "test" / f"i{number:05d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": number, "file_name": f"i{number:05d}.jpg", "height": SIDE, "width": SIDE})
    truth = {"images": images, "annotations": planes, "categories": [{"id": 1, "name": "plane"}]}
    (data / "test_coco.json").write_text(json.dumps(truth))
    settings = JobSettings(overlays=0, batch_size=1, workers=1)
    job = run_job(
        Drawn(), "drawn/1", open_dataset(data, "test", keep=True), folder, settings=settings, progress=lambda i, *_: i
    )
    return job.folder, data


def shown(name: str, milliseconds: Sequence[float]) -> str:
    """A line of the table: median and 95th percentile."""
    late = statistics.quantiles(milliseconds, n=20)[-1]
    return f"| {name} | {len(milliseconds)} | {statistics.median(milliseconds):.0f} ms | {late:.0f} ms |"


def measure(folder: Path, data: Path, steps: int) -> None:
    """Start the command and a browser, step, and print a table."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.perf_counter()
    call = [sys.executable, "-m", "scoring.cli", "view", str(folder), "--data", str(data), "--no-open", "--port", str(port)]
    server = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout is not None
        line = server.stdout.readline().strip()
        ready = time.perf_counter() - begun
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            opened = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("svg image")
            first = time.perf_counter() - opened
            count = page.locator("nav li").count()
            print(f"{line}\nfrom the command to the address: {ready:.1f} s; from there to the first picture: {first:.2f} s")
            page.wait_for_timeout(1000)
            calm = []
            for _ in range(steps):
                calm.append(page.evaluate(STEP, None))
                page.wait_for_timeout(500)
            hurried = [page.evaluate(STEP, None) for _ in range(steps)]
            places = random.Random(1).sample(range(2 * steps + 5, count), min(steps, count - 2 * steps - 5))
            jumps = [page.evaluate(STEP, place) for place in places]
            browser.close()
    finally:
        server.terminate()
        server.wait()
    print("\n| | steps | median | 95th percentile |\n|---|---|---|---|")
    print(shown("a step, half a second after the one before", calm))
    print(shown("a step as soon as the one before is drawn", hurried))
    print(shown("a jump to another image of the list", jumps))


def main() -> None:
    """Draw, score, look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    assert options.images > 3 * options.steps + 5, "steps and jumps are to go to images that were not shown before"
    with tempfile.TemporaryDirectory() as folder:
        job, data = make_job(Path(folder), options.images)
        measure(job, data, options.steps)


if __name__ == "__main__":
    main()
