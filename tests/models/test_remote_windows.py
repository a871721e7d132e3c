"""Large TIFFs of a web server by their parts: as after a download, few bytes, failing requests, servers without parts."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
from upath import UPath

from models.errors import DataError
from models.images import decoding, remote_bytes, windows
from models.images.raster import WindowedImage
from models.images.remote_bytes import BLOCK, RemoteBytes
from models.images.windows import open_image
from models.instances import Instances
from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling, tile_grid

rasterio = pytest.importorskip("rasterio")

SIDE = 2600


class Server:
    """Serves the files of a folder by ranges; counts the bytes; ``fail`` says which requests fail."""

    def __init__(self, folder):
        self.folder, self.sent, self.requests, self.ranges, self.fail = folder, 0, 0, True, lambda number: False
        self.sent_as_parts = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self._answer(body=False)

            def do_GET(self):
                self._answer(body=True)

            def _answer(self, body):
                path = server.folder / self.path.lstrip("/")
                server.requests += 1
                server.command = self.command
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if not path.is_file() or server.fail(server.requests):
                    self.send_response(404 if not path.is_file() else 503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                size = path.stat().st_size
                start, end = (int(asked[1]), min(int(asked[2]), size - 1)) if asked and server.ranges else (0, size - 1)
                with open(path, "rb") as file:
                    file.seek(start)
                    content = file.read(end + 1 - start)
                if asked and server.ranges:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
                else:
                    self.send_response(200)
                if server.ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    for start in range(0, len(content) if body else 0, BLOCK):
                        written = self.wfile.write(content[start : start + BLOCK])
                        server.sent += written
                        server.sent_as_parts += written if asked else 0
                except OSError:
                    # Asked for its size alone, by a request that was not let come to its end.
                    self.close_connection = True

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def stop(self):
        self._http.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiled TIFF of some megabytes, and one with 16 bits and percentiles."""
    folder = tmp_path_factory.mktemp("served")
    chance = np.random.default_rng(0)
    for name, dtype, most in (("eight", "uint8", 255), ("sixteen", "uint16", 9000)):
        profile = {"driver": "GTiff", "count": 3, "height": SIDE, "width": SIDE, "dtype": dtype, "photometric": "RGB"}
        blocks = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
        with rasterio.open(folder / f"{name}.tif", "w", **profile, **blocks) as file:
            file.write(chance.integers(0, most, (3, SIDE, SIDE), dtype=dtype) // 4)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(windows, "WINDOWED_PIXELS", 1_000_000)
    for module in (decoding, remote_bytes):
        monkeypatch.setattr(module, "RETRIES", (0.0, 0.0))
    made = Server(folder)
    yield made
    made.stop()


def _tiles(image):
    return [image[y1:y2, x1:x2] for x1, y1, x2, y2 in tile_grid(*image.shape[:2], Tiling(size=640, overlap=0.3))]


@pytest.mark.parametrize("name", ["eight.tif", "sixteen.tif"])
def test_windows_are_those_of_the_downloaded_file_and_each_byte_comes_once(server, folder, name):
    image = open_image(UPath(f"{server.url}/{name}"))
    assert isinstance(image, WindowedImage)
    local = open_image(folder / name)
    for one, other in zip(_tiles(image), _tiles(local), strict=True):
        assert np.array_equal(one, other)
    assert server.sent <= 1.01 * (folder / name).stat().st_size + BLOCK


def test_opened_in_one_thread_and_read_in_another(server, folder):
    """As scoring does; rasterio looks beside a file for masks and overviews, in the context that opened it."""
    with ThreadPool(2) as pool:
        images = pool.map(open_image, [UPath(f"{server.url}/{name}.tif") for name in ("eight", "sixteen")])
        for image, name in zip(images, ("eight", "sixteen"), strict=True):
            local = open_image(folder / f"{name}.tif")
            assert np.array_equal(image[300:900, 200:1000], local[300:900, 200:1000])
            assert np.array_equal(image.shrunk(100, 100), local.shrunk(100, 100))


def test_only_the_parts_that_a_window_needs_are_fetched(server, folder):
    image = open_image(UPath(f"{server.url}/eight.tif"))
    before = server.sent
    assert before < 5 * BLOCK
    window = image[1000:1200, 900:1200]
    assert np.array_equal(window, open_image(folder / "eight.tif")[1000:1200, 900:1200])
    # It lies in 3 x 2 of 11 x 11 blocks.
    needed = 6 / 121 * (folder / "eight.tif").stat().st_size
    assert server.sent - before <= 1.15 * needed + 6 * 2 * BLOCK


def test_a_request_in_a_hundred_may_fail(server, folder):
    chance = random.Random(3)
    server.fail = lambda number: number % 100 == 50 or chance.random() < 0.01
    image = open_image(UPath(f"{server.url}/eight.tif"))
    assert all(np.array_equal(a, b) for a, b in zip(_tiles(image), _tiles(open_image(folder / "eight.tif")), strict=True))
    assert server.requests > 60


def test_a_part_that_cannot_be_fetched_is_never_read_as_something_else(server):
    image = open_image(UPath(f"{server.url}/eight.tif"))
    server.fail = lambda number: True
    for _ in range(2):
        with pytest.raises(DataError, match=r"eight\.tif: cannot be fetched \(503") as failed:
            image[1000:1200, 900:1200]
        assert failed.value.kind == "unreachable"
    server.fail = lambda number: False
    # What GDAL has noted of it meanwhile is not to be trusted; a new attempt opens it anew.
    with pytest.raises(DataError, match="cannot be fetched"):
        image[2000:2200, 900:1200]


def test_a_file_that_changes_while_it_is_read_is_said_to(server, folder, tmp_path):
    shutil.copy(folder / "eight.tif", tmp_path / "a.tif")
    server.folder = tmp_path
    image = open_image(UPath(f"{server.url}/a.tif"))
    image[:500, :500]
    image.check()
    content = bytearray((folder / "eight.tif").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.tif").write_bytes(content)
    os.utime(tmp_path / "a.tif", (1e9, 1e9))
    with pytest.raises(DataError, match=r"a\.tif: has changed while it was read") as failed:
        image.check()
    assert failed.value.kind == "unreachable"
    tiled = Tiled(
        SimpleNamespace(predict=lambda tiles: [Instances.empty("", 640, 640) for _ in tiles]), Tiling(size=640), "cpu"
    )
    with pytest.raises(DataError, match="has changed while it was read"):
        tiled.predict([image])


def test_what_is_gone_from_its_server_is_not_a_full_disk(server, folder, tmp_path):
    shutil.copy(folder / "eight.tif", tmp_path / "a.tif")
    server.folder = tmp_path
    image = open_image(UPath(f"{server.url}/a.tif"))
    (tmp_path / "a.tif").unlink()
    with pytest.raises(DataError, match="is not, or not any more, on its server"):
        image[1000:1200, 900:1200]


def test_a_disk_that_takes_a_part_of_a_block_is_full(server, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(remote_bytes.os, "pwrite", lambda number, content, place: real(number, content[:1000], place))
    with pytest.raises(DataError, match="No space left on device"):
        open_image(UPath(f"{server.url}/eight.tif"))


def test_a_server_without_parts_sends_the_file_once(server, folder):
    server.ranges = False
    image = open_image(UPath(f"{server.url}/eight.tif"))
    assert all(np.array_equal(a, b) for a, b in zip(_tiles(image), _tiles(open_image(folder / "eight.tif")), strict=True))
    assert server.sent == (folder / "eight.tif").stat().st_size


def test_other_bytes_than_those_asked_for_are_refused(server, monkeypatch):
    content = RemoteBytes(UPath(f"{server.url}/eight.tif"))
    monkeypatch.setattr(content.source.fs, "cat_file", lambda *_, **__: b"short")
    with pytest.raises(DataError, match=rf"sends 5 bytes where {BLOCK} were asked for") as failed:
        content.read(0, 10)
    assert failed.value.kind == "unreachable"


def test_small_files_and_images_come_whole(server, folder, monkeypatch):
    monkeypatch.setattr(windows, "WORTH_IT", 10**9)
    assert np.array_equal(open_image(UPath(f"{server.url}/eight.tif")), open_image(folder / "eight.tif")[:, :])
    assert server.sent == (folder / "eight.tif").stat().st_size


def test_missing_refused_and_cut_files(server, folder, tmp_path):
    with pytest.raises(DataError, match="no such file") as failed:
        open_image(UPath(f"{server.url}/no.tif"))
    assert failed.value.kind == "missing"
    content = (folder / "eight.tif").read_bytes()
    server.folder = tmp_path
    (tmp_path / "cut.tif").write_bytes(content[: len(content) // 2])
    image = open_image(UPath(f"{server.url}/cut.tif"))
    with pytest.raises(DataError, match="damaged") as failed:
        _tiles(image)
    assert failed.value.kind == "damaged"
    (tmp_path / "text.tif").write_bytes(b"no image" * 200_000)
    with pytest.raises(DataError, match="not an image"):
        open_image(UPath(f"{server.url}/text.tif"))


def test_a_file_that_cannot_be_opened_leaves_nothing_to_be_closed_elsewhere(server, folder, tmp_path, monkeypatch):
    content = bytearray((folder / "eight.tif").read_bytes())
    # A compression that GDAL does not know.
    server.folder = tmp_path
    ifd = int.from_bytes(content[4:8], "little")
    for entry in range(ifd + 2, ifd + 2 + 12 * int.from_bytes(content[ifd : ifd + 2], "little"), 12):
        if int.from_bytes(content[entry : entry + 2], "little") == 259:
            content[entry + 8 : entry + 10] = b"\x0f\x27"
    (tmp_path / "odd.tif").write_bytes(content)
    unraised = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)

    def fail():
        with pytest.raises(DataError) as failed:
            open_image(UPath(f"{server.url}/odd.tif"))
        assert failed.value.kind == "damaged"

    with ThreadPool(1) as pool:
        pool.apply(fail)
    gc.collect()
    assert not unraised


def test_a_full_disk_is_no_damaged_file(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote_bytes.os, "pwrite", full)
    with pytest.raises(DataError, match=rf"its parts cannot be kept in {tempfile.gettempdir()} .*No space left"):
        open_image(UPath(f"{server.url}/eight.tif"))


def test_the_stream_is_that_of_the_file(server, folder):
    content = (folder / "eight.tif").read_bytes()
    stream = RemoteBytes(UPath(f"{server.url}/eight.tif")).stream()
    chance = random.Random(1)
    for _ in range(60):
        start, size = chance.randrange(len(content) + 10), chance.choice((0, 1, 16, BLOCK, 3 * BLOCK + 7, -1))
        assert stream.seek(start) == stream.tell() == start
        assert stream.read(size) == (content[start : start + size] if size >= 0 else content[start:])
    assert stream.seek(-4, 2) == len(content) - 4
    assert stream.read() == content[-4:]
    assert server.sent <= len(content)
