"""What a browser shows, to those who see little: axe-core over the pages, the viewer and the report."""

from __future__ import annotations

import contextlib
import functools
import http.server
import shutil
import subprocess
import sys
import threading

import pytest

from scoring.viewer.content import Job
from scoring.viewer.server import serve
from tests.pages.blocks import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.docs,
    pytest.mark.xdist_group("accessibility"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)"),
]

SIZES = [(1280, "light"), (400, "light"), (1280, "dark"), (400, "dark")]
GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        # A browser asks for it by itself.
        if self.path == "/favicon.ico":
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()


@contextlib.contextmanager
def _served(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _faults(browser, addresses, width, scheme, ready="body"):
    """What axe finds grave and what the console says, by page."""
    from axe_playwright_python.sync_playwright import Axe

    axe, faults = Axe(), []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        for address in addresses:
            page.goto(address)
            page.wait_for_selector(ready)
            for one in axe.run(page).response["violations"]:
                if one["impact"] in GRAVE:
                    places = [
                        f"{node['target']} {node['html'][:120]} {node['failureSummary'][:300]}" for node in one["nodes"]
                    ]
                    faults.append(f"{address} {one['id']} ({len(places)}): " + "\n    ".join(places[:4]))
            wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth + 1")
            faults += [f"{address}: wider than the window"] if wide else []
            faults += [f"{address} says: {text}" for text in said]
            said.clear()
    return faults


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", str(ROOT / "docs"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_pages(site, browser, width, scheme):
    with _served(site) as address:
        names = [page.name for page in sorted(site.glob("*.html"))]
        assert len(names) > 12
        faults = _faults(browser, [f"{address}/{name}" for name in names], width, scheme, "footer")
    assert not faults, "\n".join(faults)


@pytest.fixture(scope="module")
def scored(documented_versions, tmp_path_factory):
    """The folders of a scoring with outlines and of a comparison."""
    from tests.journeys.conftest import Project
    from tests.pages.conftest import copied

    project = Project(
        copied(documented_versions, tmp_path_factory.mktemp("shown") / "planes"), documented_versions / "data"
    )
    data = ("--data", "data/airfield")
    project.score("--model", "planes-inst/1", *data, "--out", "predictions")
    project.score("compare", "planes-inst/1", "planes-mask/1", *data, "--out", "comparison")
    return project.folder


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_viewer(scored, browser, width, scheme):
    server = serve(Job(scored / "predictions" / "planes-inst-1", str(scored / "data" / "airfield")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        faults = _faults(browser, [f"http://127.0.0.1:{server.server_port}/"], width, scheme, "svg image")
    finally:
        server.shutdown()
        server.server_close()
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_report(scored, browser, width, scheme):
    with _served(scored / "comparison") as address:
        faults = _faults(browser, [f"{address}/report.html"], width, scheme)
    assert not faults, "\n".join(faults)


def test_a_grave_fault_would_be_noticed(browser, tmp_path):
    text = '<html lang="en"><title>t</title><main><h1>t</h1><img src="a.png"><p style="color:#ccc">pale</p></main></html>'
    (tmp_path / "index.html").write_text(text)
    with _served(tmp_path) as address:
        faults = "\n".join(_faults(browser, [f"{address}/"], 400, "light"))
    assert "image-alt" in faults
    assert "color-contrast" in faults
    assert "says: Failed to load resource" in faults
