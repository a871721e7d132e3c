"""`score view`: what the page is told of a job, what the server refuses, and the page itself in headless Chromium."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from dataclasses import replace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from models.errors import DataError
from models.geometry.rle import rle_decode, rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from scoring.cli import main
from scoring.jobs.job import run_job
from scoring.requests import JobSettings
from scoring.viewer import content
from scoring.viewer.content import Job, outlines
from scoring.viewer.server import serve
from tests.conftest import write_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BOXES = [[10, 10, 30, 34], [40, 12, 52, 22], [60, 40, 78, 58]]


class Finder:
    """Finds the first two planes of three, doubles the first, and sees one that is none; the second with a low score."""

    def predict(self, images):
        results = []
        for image in images:
            height, width = image.shape[:2]
            boxes = [BOXES[0], [11, 11, 31, 35], BOXES[1], [2, 60, 9, 70]]
            masks = []
            for x1, y1, x2, y2 in boxes:
                mask = np.zeros((height, width), bool)
                mask[y1:y2, x1:x2] = True
                masks.append(rle_encode(mask))
            results.append(Instances.make("", height, width, boxes, [0.9, 0.8, 0.3, 0.6], masks=masks))
        return results


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A job over four images, the third of which cannot be read, and their truth: none on the last."""
    folder = tmp_path_factory.mktemp("viewed")
    images, annotations = [], []
    for i in range(4):
        write_image(folder / "data" / "test" / f"i{i}.png", 80, 90, i)
        images.append({"id": i, "file_name": f"i{i}.png", "height": 80, "width": 90})
        for box in BOXES if i < 3 else ():
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            annotations.append({"id": len(annotations), "image_id": i, "category_id": 1, "bbox": xywh, "iscrowd": 0})
    (folder / "data" / "test" / "i2.png").write_bytes(b"no image")
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
    (folder / "data" / "test_coco.json").write_text(json.dumps(truth))
    dataset = open_dataset(folder / "data", "test", keep=True)
    settings = JobSettings(overlays=0, score_threshold=0.0)
    job = run_job(Finder(), "m/1", dataset, folder, settings=settings, progress=lambda r, *_: r)
    return job.folder, folder / "data"


def test_states_of_planes_and_what_was_missed(scored):
    folder, data = scored
    job = Job(folder, str(data))
    overview = job.overview()
    assert (overview["label"], overview["truth"], overview["all"]) == ("m/1", True, 4)
    first, _, lost, empty = overview["images"]
    by_score = dict(zip(first["scores"], first["state"], strict=True))
    assert by_score == {0.9: "right", 0.8: "wrong", 0.6: "wrong", 0.3: "right"}
    assert dict(zip(first["scores"], first["sizes"], strict=True)) == {0.9: 0, 0.8: 0, 0.6: 0, 0.3: 0}
    assert (first["missed"], first["failed"]) == (1, "")
    assert (lost["scores"], lost["missed"]) == ([], 3)
    assert "not an image" in lost["failed"]
    assert (set(empty["state"]), empty["missed"]) == ({"wrong"}, 0)
    one = job.image(0)
    assert one["missed"] == [[60.0, 40.0, 78.0, 58.0]]
    assert (one["height"], one["width"]) == (80, 90)
    without = Job(folder).overview()
    assert without["truth"] is False
    assert set(without["images"][0]["state"]) == {""}


def test_each_detection_takes_one_plane(scored):
    """Two planes under one box, and a box that overlaps two planes: as COCO matches them."""
    job = Job(scored[0], str(scored[1]))
    sample = job.samples[0]
    found = Instances.make("i0", 80, 90, [BOXES[0], BOXES[2]], [0.9, 0.8])
    assert job._judged(sample, found) == (["right", "right"], [1])


def test_outlines_are_those_of_the_mask():
    mask = np.zeros((50, 60), bool)
    cv2.circle(drawn := mask.astype(np.uint8), (20, 25), 9, 1, -1)
    cv2.rectangle(drawn, (40, 3), (50, 12), 1, -1)
    found = Instances.make("a", 50, 60, [[0, 0, 60, 50]], [0.5], masks=[rle_encode(drawn.astype(bool))])
    rings = outlines(found, 0)
    assert len(rings) == 2
    again = cv2.fillPoly(np.zeros((50, 60), np.uint8), [np.array(ring) for ring in rings], 1)
    assert np.array_equal(again.astype(bool), rle_decode(found.masks[0]))
    assert outlines(Instances.make("a", 50, 60, [[0, 0, 9, 9]], [0.5]), 0) == []


def test_what_cannot_be_looked_at(scored, tmp_path, monkeypatch):
    folder, data = scored
    with pytest.raises(DataError, match="not the folder of a scoring"):
        Job(tmp_path)
    write_image(tmp_path / "other" / "x.png")
    with pytest.raises(DataError, match="no annotations to look at errors by"):
        Job(folder, str(tmp_path / "other"), "all")
    content_of = json.loads((data / "test_coco.json").read_text())
    (tmp_path / "far").mkdir()
    for image in content_of["images"]:
        image["file_name"] = f"far{image['id']}.png"
        write_image(tmp_path / "far" / image["file_name"], 80, 90)
    (tmp_path / "far" / "test_coco.json").write_text(json.dumps(content_of))
    with pytest.raises(DataError, match="none of its images is in far/test"):
        Job(folder, str(tmp_path / "far"))
    monkeypatch.setattr(content, "MOST_IMAGES", 2)
    few = Job(folder).overview()
    assert (few["all"], len(few["images"])) == (4, 2)
    refused = CliRunner().invoke(main, ["view", str(tmp_path)])
    assert refused.exit_code == 1
    assert "not the folder of a scoring" in refused.stderr


def test_what_cannot_be_judged_is_refused(scored, tmp_path):
    folder, data = scored
    shutil.copytree(data, tmp_path / "data")
    content_of = json.loads((data / "test_coco.json").read_text())
    for image in content_of["images"]:
        image["width"] = 99
        write_image(tmp_path / "data" / "test" / image["file_name"], 80, 99)
    (tmp_path / "data" / "test_coco.json").write_text(json.dumps(content_of))
    with pytest.raises(DataError, match="image 'i0' was scored at 90x80, its annotation says 99x80"):
        Job(folder, str(tmp_path / "data"))

    class Two(Finder):
        def predict(self, images):
            return [replace(one, labels=np.ones(len(one), np.int64)) for one in super().predict(images)]

    settings = JobSettings(overlays=0, score_threshold=0.0)
    dataset = open_dataset(data, "test", keep=True)
    job = run_job(Two(), "m/2", dataset, tmp_path, settings=settings, progress=lambda r, *_: r)
    with pytest.raises(DataError, match="knows several classes"):
        Job(job.folder, str(data))
    assert len(Job(job.folder).samples) == 4


def test_a_job_that_is_updated_meanwhile_is_not_shown_as_it_was(scored, tmp_path):
    folder = tmp_path / "m-1"
    shutil.copytree(scored[0], folder)
    server = serve(Job(folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert _get(server.server_address, "/image/0")[0] == 200
    content_of = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content_of, "inputs": "others"}))
    for path in ("/job", "/image/0", "/picture/0"):
        status, _, said = _get(server.server_address, path)
        assert (status, said) == (409, b"the job was updated, or is gone: start score view again")
    server.shutdown()
    server.server_close()
    (folder / "errors.parquet").unlink()
    with pytest.raises(DataError, match=r"errors\.parquet: cannot be read"):
        Job(folder)


@pytest.fixture
def address(scored):
    server = serve(Job(scored[0], str(scored[1])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address
    server.shutdown()
    server.server_close()


def _get(address, path, **headers):
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers.get("Content-Type", ""), content


def test_the_server_gives_pictures_by_number_to_this_machine_alone(address):
    assert address[0] == "127.0.0.1"
    status, kind, picture = _get(address, "/picture/0")
    assert (status, kind) == (200, "image/jpeg; height=80; width=90")
    assert cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR).shape == (80, 90, 3)
    assert _get(address, "/picture/2")[0] == 500
    for path in (
        "/picture/4",
        "/picture/-1",
        "/picture/../../etc/passwd",
        "/etc/passwd",
        "/image/0/x",
        "/picture/0001000000",
    ):
        assert _get(address, path)[0] == 404, path
    # A page elsewhere whose name was turned to this address.
    assert _get(address, "/job", Host="evil.example")[0] == 403
    assert _get(address, "/job", Host="localhost:1")[0] == 200


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page(address, browser, width, scheme):
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(f"http://{address[0]}:{address[1]}/")
    page.wait_for_selector("svg image")
    # The worst first: two wrong and one missed, twice; then the one that failed, with three missed.
    from playwright.sync_api import expect

    names = page.locator("nav .name").all_inner_texts()
    assert names == ["i3", "i0", "i1", "i2"]
    assert page.locator("nav .count").all_inner_texts()[1:] == ["4 (3 errors)", "4 (3 errors)", "failed"]
    assert not page.locator("#class").is_visible()
    assert page.locator("#title").inner_text() == "m/1: 12 planes in 4 images"
    status = page.locator("#status")
    page.keyboard.press("ArrowRight")
    expect(status).to_have_text("2 of 4: i0, 4 planes, 3 errors")
    expect(page.locator("polygon.mask.right")).to_have_count(2)
    expect(page.locator("polygon.mask.wrong")).to_have_count(2)
    expect(page.locator("rect.missed")).to_have_count(1)
    # What was found with a lower score than is asked for is missed.
    page.locator("#score").fill("0.5")
    expect(page.locator("rect.missed")).to_have_count(2)
    expect(status).to_have_text("1 of 4: i0, 3 planes, 4 errors")
    expect(page.locator("nav [aria-current=true] .name")).to_have_text("i0")
    page.locator("#masks").uncheck()
    expect(page.locator("rect.box")).to_have_count(5)
    page.locator("#file").fill("i2")
    expect(page.locator("nav li")).to_have_count(1)
    expect(page.locator("#empty")).to_contain_text("not an image")
    page.locator("#file").fill("nothing")
    expect(page.locator("#empty")).to_have_text("No image has such a name.")
    page.locator("#file").fill("")
    expect(page.locator("nav li")).to_have_count(4)
    page.locator("nav button").first.click()
    page.wait_for_selector("svg image")
    assert page.locator("body").evaluate("body => body.scrollWidth <= document.documentElement.clientWidth")
    # The picture that cannot be read is an answer of the server, the only one that is no success.
    assert all("/picture/2" in text or "500" in text for text in said), said


def test_the_command_says_where_the_page_is(scored, monkeypatch):
    from http.server import ThreadingHTTPServer

    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    done = CliRunner().invoke(main, ["view", str(scored[0]), "--data", str(scored[1])])
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"m/1: 4 images at {opened[0]} (Ctrl-C ends)")
