"""Versions whose files somebody changed where the store keeps them: refused, and nothing of them runs."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import pytest

from models.saved.folder import folder_digest
from tests.journeys.conftest import error_line
from tests.journeys.stack import BUCKET

pytestmark = pytest.mark.xdist_group("registry")


def _plant(team, name, change):
    """Register a version and change its saved files where the store keeps them, as somebody with access there could."""
    team.register(team.weak, name)
    if team.store is None:
        source = team.client.get_model_version_download_uri(name, "1")
        change(Path(source) / "artifacts" / "model")
        return
    client, prefix = team.store.s3, "artefacts/"
    source = team.client.get_model_version_download_uri(name, "1").partition(":/")[2].strip("/")
    local = team.folder / f"planted-{name}"
    keys = [
        o["Key"] for o in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}{source}/artifacts/model/")["Contents"]
    ]
    (local / "model").mkdir(parents=True)
    for key in keys:
        client.download_file(BUCKET, key, str(local / "model" / key.rpartition("/")[2]))
    change(local / "model")
    for path in local.rglob("*"):
        if path.is_file() and not path.is_symlink():
            client.upload_file(str(path), BUCKET, f"{prefix}{source}/artifacts/{path.relative_to(local)}")


def _pickle(folder):
    class Evil:
        def __reduce__(self):
            return Path.touch, (folder.parent / "owned",)

    (folder / "weights.pkl").write_bytes(pickle.dumps(Evil()))


def _tampered(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(bytes(content))


def _giant(folder):
    spec = json.loads((folder / "model.json").read_text())
    spec["architecture"]["decoder_channels"] = [4096] * 5
    (folder / "model.json").write_text(json.dumps(spec))


def _giant_weights(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _long_spec(folder):
    (folder / "model.json").write_text("[" * 2_000_000)


def _deep_spec(folder):
    (folder / "model.json").write_text("[" * 400_000)


def _hidden(folder):
    (folder / "detector").mkdir()
    (folder / "detector" / "__init__.py").write_text("raise SystemExit(7)\n")


@pytest.mark.parametrize(
    ("change", "message", "signed"),
    [
        (_pickle, "holds 'weights.pkl', which no saved model has", False),
        (_tampered, "its files are not those that were registered", False),
        (_hidden, "holds 'detector/__init__.py', which no saved model has", False),
        (_long_spec, "model.json has 2,000,000 bytes", False),
        # Whoever can change the tags too is held by the form of the files.
        (_giant, "weights do not fit the architecture", True),
        (_giant_weights, "damaged weights", True),
        (_deep_spec, "not valid JSON", True),
    ],
)
def test_planted_versions_are_refused_and_nothing_of_them_runs(team, tmp_path, change, message, signed):
    name = f"evil{change.__name__}"
    _plant(team, name, change)
    if signed:
        shutil.copytree(team.weak, tmp_path / "model")
        change(tmp_path / "model")
        team.client.set_model_version_tag(name, "1", "digest", folder_digest(tmp_path / "model"))
    arguments = ("--model", f"{name}/1", "--data", team.data, "--out", str(tmp_path / "out"))
    started = time.monotonic()
    # Of the same digest an honest version may be in the cache already.
    fresh = {"PLANES_CACHE": str(tmp_path / "cache")}
    assert message in error_line(team.score(*arguments, code=1, **fresh))
    assert time.monotonic() - started < 60
    assert not list((tmp_path / "out").glob("*/instances.parquet"))
    assert not list(team.folder.rglob("owned"))
    checked = team.registry("verify", name, code=1, **fresh)
    assert "FAIL" in checked.stdout
    assert "Traceback" not in checked.stderr


def test_links_and_paths_that_lead_out_are_refused(team, tmp_path):
    if team.store is not None:
        pytest.skip("an object store has no links, and this one takes no such keys")
    secret = tmp_path / "secret"
    secret.write_text("{}")

    def link(folder):
        (folder / "model.json").unlink()
        (folder / "model.json").symlink_to(secret)

    def whole(folder):
        shutil.copytree(folder, tmp_path / "elsewhere")
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "elsewhere")

    def escape(folder):
        (folder / "..\\..\\owned").write_text("x")

    for change, message in ((link, "is a link"), (whole, "is a link"), (escape, "leads out of it")):
        name = f"leading-{change.__name__}"
        _plant(team, name, change)
        arguments = ("--model", f"{name}/1", "--data", team.data, "--out", str(tmp_path / "out"))
        assert message in error_line(team.score(*arguments, code=1))


def test_a_tag_that_is_no_digest_is_refused(team, tmp_path):
    team.register(team.weak, "named")
    team.client.set_model_version_tag("named", "1", "digest", "../../../tmp/x")
    done = team.score("--model", "named/1", "--data", team.data, "--out", str(tmp_path / "out"), code=1)
    assert "its tag digest is no digest" in error_line(done)
