"""How long it takes to plan jobs over very long lists, and how much memory: ``python -m benchmarks.plans``.

Two lists of generated names: a parquet file, and a bucket whose server (this file's own, on loopback) lists keys as
Amazon's ListObjectsV2 does and holds no object. Each is planned in a process of its own, once undisturbed, and once
killed with SIGKILL while it lists and called again: both must end in the same plan. The yardstick is what jobs that do
not lie in parts do with a list: `open_dataset` of a tenth of it. Then the last thousand images of the long list, which
exist, are scored where all parts before them are done, and as a list of their own. At the end the bucket holds a
thousand objects more, and its job, all of whose parts count as done, is to learn of them (`score --update`).
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PLANNING = """
import json, logging, sys, time
from pathlib import Path
started = time.monotonic()
from pipelines.data.readers.listing import open_listing
from scoring.parts.job import planned
from scoring.parts.place import Place
from scoring.runners.local import peak_memory
where, place = sys.argv[1:]
listing = open_listing(where)
assert listing.has_more_than(100_000)
requested = dict(label="m/1", model="", settings={"rendering": {"range": "auto"}}, data="d", source=where, split="test")
requested |= dict(category="plane", part_size=4096, shard_size=32)
plan = planned(Place(place), listing, requested)
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "memory": peak_memory(), "images": plan.images, "inputs": plan.inputs}))
"""
SCORING = """
import json, sys, time
from pathlib import Path
from benchmarks.field import ByColour
from pipelines.data.readers.listing import open_listing
from scoring.parts.job import LocalParts, planned, run_parts
from scoring.parts.place import Place
from scoring.requests import JobSettings
from scoring.runners.local import LocalRunner, peak_memory
where, at = sys.argv[1:]
place = Place(at)
requested = dict(label="m/1", model="", settings={"rendering": {"range": "auto"}}, data="d", source=where, split="test")
requested |= dict(category="plane", part_size=1000, shard_size=32)
plan = planned(place, open_listing(where), requested)
mark = {"images": 1000, "instances": 0, "failures": 0, "seconds": 1.0, "masks": False}
(Path(at) / "done").mkdir(exist_ok=True)
for number in range(plan.parts - 1):
    content = json.dumps({"plan": plan.digest, "totals": mark, "again": 0})
    (Path(at) / "done" / f"part-{number:06d}.json").write_text(content)
"""
LAST = """
started = time.monotonic()
runner = LocalParts(LocalRunner(ByColour()), place, plan, JobSettings(), Path(at) / ".parts")
result = run_parts(place, plan, runner, lambda items, *_: items)
told = {"seconds": time.monotonic() - started, "memory": peak_memory(), "images": result.images}
print(json.dumps(told | {"failures": result.failures}))
"""
UPDATING = """
import json, sys, time
from pathlib import Path
started = time.monotonic()
from pipelines.data.readers.listing import open_listing
from scoring.parts.place import Place
from scoring.parts.plan import read_plan
from scoring.parts.updates import updated
from scoring.runners.local import peak_memory
where, at = sys.argv[1:]
plan = read_plan(Place(at))
requested = plan.model_dump(include={"label", "model", "settings", "data", "source", "split", "category"})
requested |= dict(part_size=plan.part_size, shard_size=plan.shard_size)
news = updated(Place(at), plan, open_listing(where), requested, Path(at) / ".updating").later[-1].news
told = {"seconds": time.monotonic() - started, "memory": peak_memory()}
print(json.dumps(told | news.model_dump(include={"images", "new", "changed", "gone", "kept"})))
"""
WHOLE = """
import json, sys, time
started = time.monotonic()
from pipelines.data.readers.opening import open_dataset
from scoring.runners.local import peak_memory
dataset = open_dataset(sys.argv[1])
print(json.dumps({"seconds": time.monotonic() - started, "memory": peak_memory(), "images": len(dataset)}))
"""


def name_of(number: int) -> str:
    """A key of the bucket; their order is that of the numbers."""
    return f"survey/{number // 1000:06d}/scene-{number:09d}_tile.tif"


class Bucket(http.server.BaseHTTPRequestHandler):
    """ListObjectsV2 of ``count`` generated keys of a bucket named survey (Amazon S3 API reference)."""

    protocol_version = "HTTP/1.1"
    count = 0

    def do_GET(self) -> None:
        """A page of keys."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(self.path).query))
        after = query.get("continuation-token") or query.get("start-after") or ""
        start = int(after.rpartition("-")[2].partition("_")[0]) + 1 if after else 0
        end = min(start + 1000, self.count)
        keys = "".join(
            f"<Contents><Key>{name_of(n)}</Key><Size>1</Size><ETag>&quot;{n}&quot;</ETag></Contents>"
            for n in range(start, end)
        )
        more = f"<NextContinuationToken>{name_of(end - 1)}</NextContinuationToken>" if end < self.count else ""
        cut = str(end < self.count).lower()
        xml = f"<ListBucketResult><Name>survey</Name><IsTruncated>{cut}</IsTruncated>{more}{keys}</ListBucketResult>"
        body = xml.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def run(code: str, *arguments: str, kill_when: Path | None = None) -> dict[str, Any]:
    """What a process prints as JSON; or kill it as soon as a file is there."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    while kill_when is not None and process.poll() is None:
        if kill_when.exists():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return {}
        time.sleep(0.05)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    return json.loads(out.splitlines()[-1])


def told(result: dict[str, Any]) -> str:
    """Time and memory."""
    return f"{result['seconds']:.0f} s, peak {result['memory'] / 2**20:,.0f} MiB"


def measure(title: str, where: str, folder: Path, count: int) -> None:
    """Plan a list, print what it took, and do it again with a kill halfway through the listing."""
    whole = run(PLANNING, where, str(folder / "whole"))
    print(
        f"{title}: {whole['images']:,} images planned in {whole['seconds']:.0f} s, peak {whole['memory'] / 2**20:,.0f} MiB"
    )
    half = folder / "killed" / ".planning" / "listed" / f"{count // 200_000:06d}.parquet"
    assert not run(PLANNING, where, str(folder / "killed"), kill_when=half)
    again = run(PLANNING, where, str(folder / "killed"))
    same = "the same plan" if again["inputs"] == whole["inputs"] else "ANOTHER PLAN"
    print(f"   killed after half of the listing and called again: {again['seconds']:.0f} s, {same}")
    assert again["inputs"] == whole["inputs"]


def measure_last(folder: Path) -> None:
    """Score the last part of the long list, and a list of it alone, each in a process that plans nothing."""
    results = []
    for name in ("list", "last"):
        where, place = str(folder / f"{name}.parquet"), str(folder / "scored" / name)
        run(SCORING + "print('{}')", where, place)
        results.append(run(SCORING + LAST, where, place))
        assert not results[-1]["failures"], results
        print(f"the last 1,000 of {results[-1]['images']:,} images scored in {told(results[-1])}")
    print(f"   memory: {results[0]['memory'] / results[1]['memory']:.3f} of that of a list of 1,000")


def measure_update(folder: Path, where: str) -> None:
    """Bring a job over a bucket, whose parts are taken for done, up to date with a thousand new objects."""
    (lists,) = folder.glob("plan-*")
    (folder / "inputs").mkdir()
    for file in sorted(lists.iterdir()):
        table = pq.read_table(file)
        marks = [f'1 "{int(path.rpartition("-")[2].partition("_")[0])}"' for path in table["path"].to_pylist()]
        pq.write_table(table.append_column("digest", pa.array(marks)), folder / "inputs" / file.name, compression="zstd")
    Bucket.count += 1000
    result = run(UPDATING, where, str(folder))
    kinds = ", ".join(f"{result[kind]:,} {kind}" for kind in ("new", "changed", "gone", "kept"))
    print(f"   a thousand objects more, --update without their scoring: {told(result)}; {kinds}")
    assert (result["new"], result["changed"], result["gone"]) == (1000, 0, 0)


def main() -> None:
    """Plan both lists."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000, help="0: the bucket alone")
    parser.add_argument("--objects", type=int, default=5_000_000)
    parser.add_argument("--out", default=None, help="where to work; a temporary folder without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as temporary:
        folder = Path(temporary)
        if options.images:
            measure_lists(folder, options.images)
        measure_bucket(folder, options.objects)


def measure_lists(folder: Path, images: int) -> None:
    """A list in a file."""
    real = [str(folder / "images" / f"last-{n:04d}.png") for n in range(1000)]
    (folder / "images").mkdir()
    for number, path in enumerate(real):
        cv2.imwrite(path, np.full((64, 64, 3), number % 256, np.uint8))
    schema = pa.schema([("path", pa.string())])
    for name, count in (("list", images), ("tenth", images // 10), ("last", 1000)):
        with pq.ParquetWriter(folder / f"{name}.parquet", schema) as writer:
            for start in range(0, count - 1000, 100_000):
                paths = [f"/data/{name_of(n)}" for n in range(start, min(count - 1000, start + 100_000))]
                writer.write_table(pa.table([paths], schema=schema))
            writer.write_table(pa.table([real], schema=schema))
    tenth = run(WHOLE, str(folder / "tenth.parquet"))
    print(f"not in parts: {tenth['images']:,} images listed in {told(tenth)}")
    measure("list", str(folder / "list.parquet"), folder / "list", images)
    measure_last(folder)


def measure_bucket(folder: Path, objects: int) -> None:
    """Keys of a bucket."""
    Bucket.count = objects
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    where = "s3://survey/survey/**/*.tif"
    measure("bucket", where, folder / "bucket", objects)
    measure_update(folder / "bucket" / "whole", where)
    server.shutdown()


if __name__ == "__main__":
    main()
