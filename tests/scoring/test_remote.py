"""Images that are elsewhere: an object store and a web server on loopback give what files on disk give."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from models.errors import DataError
from models.images import decoding, remote_bytes, windows
from models.images import decoding as image_module
from models.tiling.predictor import by_tiles
from models.tiling.settings import Tiling
from pipelines.data import remote
from pipelines.data.readers.opening import open_dataset
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.jobs.manifest import read_inputs, read_manifest
from scoring.requests import JobSettings
from tests.conftest import write_image
from tests.models.test_remote_windows import Server
from tests.scoring.test_job import Brightness
from tests.stores import s3_server


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Six images, two of them in a folder below, and one that is none."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for i in range(6):
        write_image(folder / ("deep" if i > 3 else ".") / f"i {i} ü.png", 20 + i, 30, i)
    (folder / "broken.jpg").write_bytes(b"none")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def bucket(local):
    """The same files in a bucket of a real HTTP server that speaks S3."""
    with s3_server("scenes") as store:
        for path in local.rglob("*"):
            if path.is_file():
                store.put(str(path), f"scenes/photos/{path.relative_to(local).as_posix()}")
        yield store


@pytest.fixture
def web(local):
    """The same files on a web server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _score(where, out, **settings):
    how = JobSettings(shard_size=2, overlays=2, score_threshold=0.0, **settings)
    return run_job(Brightness(), "m/1", open_dataset(where), out, settings=how, progress=lambda r, *_: r)


def _rows(out):
    table = pq.read_table(out / "m-1" / "instances.parquet").to_pandas()
    return table.drop(columns=["mask_size", "mask_counts"]).to_dict("records")


def test_a_bucket_gives_what_a_folder_gives(local, bucket, tmp_path):
    job = _score("s3://scenes/photos/**/*.[pj][np]g", tmp_path / "s3")
    assert (job.images, job.failures) == (6, 1)
    errors = pq.read_table(tmp_path / "s3" / "m-1" / "errors.parquet").to_pylist()
    assert [e["kind"] for e in errors] == ["not an image"]
    assert errors[0]["path"] == "s3://scenes/photos/broken.jpg"
    here = _score(f"{local}/**/*.[pj][np]g", tmp_path / "here")
    assert here.images == 6
    by_name = [sorted(_rows(tmp_path / where), key=lambda r: r["image_id"]) for where in ("s3", "here")]
    assert by_name[0] == by_name[1]
    assert len(list((tmp_path / "s3" / "m-1" / "overlays").iterdir())) == 2

    inputs = read_inputs(tmp_path / "s3" / "m-1", read_manifest(tmp_path / "s3" / "m-1"))
    assert str(inputs.samples[0].path).startswith("s3://scenes/photos/")
    assert export_job(tmp_path / "s3" / "m-1", tmp_path / "later", ["coco", "overlays"], most=2) == 6

    assert len(open_dataset("s3://scenes/photos/*.png")) == 4
    assert len(open_dataset("s3://scenes/photos")) == len(open_dataset(local)) == 5
    assert len(open_dataset("s3://scenes/photos/i 0 ü.png")) == 1
    with pytest.raises(DataError, match="s3://scenes/nothing: no such file or folder"):
        open_dataset("s3://scenes/nothing")
    with pytest.raises(DataError, match="s3://absent-bucket/photos: no such file or folder"):
        open_dataset("s3://absent-bucket/photos")
    with pytest.raises(DataError, match="no images there"):
        open_dataset("s3://scenes/photos/*.gif")


def test_a_changed_object_is_noticed(bucket, tmp_path):
    bucket.pipe("scenes/few/a.png", (_png(tmp_path, 1)))
    _score("s3://scenes/few", tmp_path / "out")
    assert _score("s3://scenes/few", tmp_path / "out").resumed == 1
    bucket.pipe("scenes/few/a.png", (_png(tmp_path, 2)))
    _forget()
    with pytest.raises(DataError, match=r"1 images changed \(first: a\)"):
        _score("s3://scenes/few", tmp_path / "out")


def _png(folder, seed):
    write_image(folder / "made.png", seed=seed)
    return (folder / "made.png").read_bytes()


def _forget():
    # A process of its own would list the bucket anew.
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def test_a_list_of_urls_and_paths(local, web, tmp_path, monkeypatch):
    monkeypatch.setattr(image_module, "RETRIES", (0.01,))
    shutil.copy(local / "i 0 ü.png", tmp_path / "beside.png")
    urls = [f"{web}/i%201%20%C3%BC.png", f"{web}/absent.png", "beside.png", f"{web}/broken.jpg"]
    urls.append("http://127.0.0.1:9/nobody.png")
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(urls) + "\n")
    job = _score(tmp_path / "list.csv", tmp_path / "out", workers=3)
    assert (job.images, job.failures) == (2, 3)
    errors = pq.read_table(tmp_path / "out" / "m-1" / "errors.parquet").to_pylist()
    assert [e["kind"] for e in errors] == ["missing", "not an image", "unreachable"]
    assert all(e["path"] in e["message"] and "\n" not in e["message"] for e in errors)
    single = open_dataset(f"{web}/i%201%20%C3%BC.png")
    assert (single.samples[0].read() == open_dataset(local / "i 1 ü.png").samples[0].read()).all()


def test_an_annotation_file_on_a_server(local, web, tmp_path):
    (local / "test_coco.json").write_text(
        '{"images": [{"id": 7, "file_name": "i 2 ü.png"}], "annotations": [{"id": 1, "image_id": 7, "category_id": 3,'
        ' "bbox": [1, 2, 5, 6]}], "categories": [{"id": 3, "name": "plane"}]}'
    )
    dataset = open_dataset(f"{web}/test_coco.json")
    assert (len(dataset), dataset.planes, dataset.samples[0].height) == (1, 1, 22)
    assert np.isfinite(dataset.samples[0].read()).all()
    os.unlink(local / "test_coco.json")


def test_what_cannot_be_opened_is_one_line():
    with pytest.raises(DataError, match=r"gs://bucket/x: cannot be opened \(.*gcsfs"):
        open_dataset("gs://bucket/x")
    with pytest.raises(DataError, match=r"nonsense://x: cannot be opened"):
        open_dataset("nonsense://x")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/x\.csv: "):
        open_dataset("http://127.0.0.1:9/x.csv")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/x\.json: "):
        open_dataset("http://127.0.0.1:9/x.json")


@pytest.fixture
def silent():
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_says_nothing_is_given_up(silent, monkeypatch):
    monkeypatch.setattr(image_module, "RETRIES", ())
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    with pytest.raises(DataError, match=r"a\.png: cannot be fetched") as caught:
        image_module.read_image(remote.to_path(f"{silent}/a.png"))
    assert caught.value.kind == "unreachable"


def test_what_fsspec_is_told_of_web_servers_stays(silent, monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"trust_env": True}})
    assert remote.to_path(f"{silent}/b.png").fs.client_kwargs == {"trust_env": True}


@pytest.mark.parametrize("work", ["list(read_ahead(samples, workers=2))", "fingerprints(paths)"])
def test_one_interrupt_ends_what_waits_for_a_silent_server(silent, work):
    lines = [
        # What is started in the background ignores Ctrl-C.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)",
        "from types import SimpleNamespace",
        "from models.images.rendering import DEFAULT",
        "from pipelines.data.remote import fingerprints, to_path",
        "from scoring.reader import read_ahead",
        f"paths = [to_path(f'{silent}/{{i}}.png') for i in range(40)]",
        "samples = [SimpleNamespace(image_id='', path=path, rendering=DEFAULT, part_of=None) for path in paths]",
        "print('begins', flush=True)",
        work,
    ]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"begins\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in said


def test_an_image_whose_store_fails_once_is_fetched(monkeypatch):
    monkeypatch.setattr(image_module, "RETRIES", (0.0,))
    calls = []

    class Once:
        path = "x"
        fs = property(lambda self: self)

        def cat_file(self, path):
            calls.append(path)
            if len(calls) == 1:
                raise ConnectionError("no route")
            return b"bytes"

    assert image_module._fetched(Once()) == b"bytes"
    assert len(calls) == 2


def test_a_large_tiff_of_a_web_server_is_scored_by_its_parts(tmp_path, monkeypatch):
    """As from the disk: rows, pictures, places on the ground; a request in a hundred fails, and no part comes twice."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    monkeypatch.setattr(windows, "WINDOWED_PIXELS", 1_000_000)
    for module in (decoding, remote_bytes):
        monkeypatch.setattr(module, "RETRIES", (0.0, 0.0))
    (tmp_path / "in").mkdir()
    chance = np.random.default_rng(0)
    profile = {"driver": "COG", "count": 3, "height": 2300, "width": 2300, "dtype": "uint8", "blocksize": 256}
    where = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_700_000, 0.5, 0.5)}
    path = tmp_path / "in" / "scene.tif"
    with rasterio.open(path, "w", **profile, **where, compress="deflate", overviews="none") as file:
        file.write(chance.integers(0, 250, (3, 2300, 2300), dtype=np.uint8))
    server = Server(tmp_path / "in")
    # Not where it is asked for sizes: fsspec then asks for the whole file, and lets go of it, as it does to see whether a
    # file exists; how much of it is on its way by then is chance.
    server.fail = lambda number: number % 100 == 60 and server.command == "GET"
    tables = {}
    for name, data in (("web", f"{server.url}/scene.tif"), ("disk", str(path))):
        predictor = by_tiles(Brightness(), Tiling(size=512, overlap=0.3, zooms=(1.0, 0.5)), "cpu")
        settings = JobSettings(overlays=1, score_threshold=0.0)
        job = run_job(predictor, "m/1", open_dataset(data), tmp_path / name, settings=settings, progress=lambda r, *_: r)
        assert (job.images, job.failures) == (1, 0)
        files = ("instances.parquet", "overlays/scene.jpg", "geojson/scene.geojson")
        tables[name] = [(job.folder / one).read_bytes() for one in files]
    server.stop()
    assert tables["web"] == tables["disk"]
    # Once to score it, once for the picture, and its header for the place.
    assert server.sent_as_parts <= 2.1 * path.stat().st_size
