"""What the house promises, checked: layers, sizes, dependencies that agree, a start-up that stays light."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests import conftest
from tests.architecture import licences, rooms

PACKAGES = ("models", "pipelines", "scoring")


def _sources(root):
    return [p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))]


def test_layers_hold(root):
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_circle_of_modules_or_rooms(root):
    """Those of types alone and those by a string counted, which import-linter does not see."""
    graph = rooms.imports(rooms.modules(root))
    # The strings by which engines are loaded are among them.
    assert "models.engines.composed" in graph["models.loading"]
    rooms.order(graph)
    rooms.order(rooms.rooms(graph))


def test_the_drawing_is_that_of_the_code(root):
    page = (root / "docs" / "architecture.md").read_text()
    drawing = rooms.drawing(rooms.rooms(rooms.imports(rooms.modules(root))))
    assert page == rooms.drawn(page, drawing), "run: python -m tests.architecture.rooms"


def test_the_files_that_the_page_names_are_there(root):
    page = (root / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:models|pipelines|scoring|tests|benchmarks)/[\w/]+(?:\.\w+)?/?)`", page))
    assert len(named) > 30
    assert not [name for name in named if not (root / name).exists()]
    # And what it says is there.
    for file, name in re.findall(r"`(\w[\w/]+\.py)` \(`(\w+)`", page):
        assert re.search(rf"^\s*(def|class) {name}\b|^{name}\b", (root / file).read_text(), re.MULTILINE), (file, name)


def test_errors_keep_their_causes(root):
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant):
                # Ctrl-C is no error.
                assert ast.unparse(node.exc) in ("SystemExit(130)", "SystemExit(INTERRUPTED)"), (path, node.lineno)


def test_openvino_has_one_core(root):
    """Of two, the second to go leaves a stack for signals that is no memory any more (see `shared_core`)."""
    files = [
        path for room in ("models", "pipelines", "scoring", "benchmarks", "tests") for path in (root / room).rglob("*.py")
    ]
    made = sorted(path.name for path in files if re.search(r"\bCore\(\)", path.read_text()) and path != Path(__file__))
    # NNCF quantises in a process of its own.
    assert made == ["network.py", "quantize_process.py"]


def test_package_fronts_import_nothing(root):
    for path in _sources(root):
        if path.name == "__init__.py":
            assert not [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))], (
                path
            )


def _pins(text):
    return sorted(line.strip() for line in text.splitlines() if line.strip() and not line.startswith(("#", "-r")))


def test_dependencies_agree(root):
    required = _pins((root / "requirements.txt").read_text())
    conda = yaml.safe_load((root / "conda.yaml").read_text())["dependencies"]
    pip = next(d["pip"] for d in conda if isinstance(d, dict))
    assert sorted(pip) == required
    # conda-forge's Detectron2 is compiled against one pytorch: pip must find that very version in place.
    pins = dict(pin.split("==") for pin in pip)
    assert {"detectron2", f"pytorch={pins['torch']}", f"torchvision={pins['torchvision']}", "setuptools<82"} <= {
        d for d in conda if isinstance(d, str)
    }
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in required)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    assert all("==" in pin for pin in _pins((root / "requirements-dev.txt").read_text()))


def test_a_scorer_has_the_versions_of_the_whole_environment(root):
    lines = _pins((root / "requirements-scorer.txt").read_text())
    assert "-c requirements.txt" in lines
    required = dict(pin.split("==") for pin in _pins((root / "requirements.txt").read_text()))
    own = dict(line.split("==") for line in lines if "==" in line)
    names = {line for line in lines if not line.startswith("-c") and "==" not in line}
    assert names <= set(required)
    assert own["mlflow-skinny"] == required["mlflow"]
    assert own["opencv-python-headless"] == required["opencv-python"]
    assert f"openvino=={own['openvino']}" in (root / "requirements-dev.txt").read_text()
    # A store in a SQL database needs them, which mlflow-skinny does not bring.
    assert set(own) == {"mlflow-skinny", "opencv-python-headless", "openvino", "alembic", "sqlalchemy"}


def test_imports_are_declared(root):
    names = {
        "cv2": "opencv-python",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "segmentation_models_pytorch": "segmentation-models-pytorch",
        "sklearn": "scikit-learn",
        "upath": "universal-pathlib",
    }
    names |= {"faster_coco_eval": "faster-coco-eval", "lightning_fabric": "lightning-fabric"}
    # fsspec fetches from web servers with it.
    names["aiohttp"] = "fsspec"
    required = {pin.split("==")[0] for pin in _pins((root / "requirements.txt").read_text())}
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required |= {re.split(r"==|\[", pin)[0] for pins in extras.values() for pin in pins}
    for path in _sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {m.split(".")[0] for m in modules} - sys.stdlib_module_names - set(PACKAGES):
                assert names.get(module, module) in required, (path, module)


def test_extras_are_imported_on_use_alone(root):
    # These modules hold hooks and steps of its trainer, and are themselves imported on use.
    allowed = {"pipelines/training/detectron2/hooks.py", "pipelines/training/detectron2/precision.py"}
    # This one is a program of its own.
    allowed.add("models/engines/openvino/quantize_process.py")
    for path in _sources(root):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(
                n.split(".")[0] in ("detectron2", "nncf", "openvino", "rasterio", "ray", "s3fs")
                or n.startswith(("pipelines.training.detectron2.hooks", "pipelines.training.detectron2.precision"))
                for n in names
            ):
                assert path.relative_to(root).as_posix() in allowed, path


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom scoring.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'pandas', 'numpy', 'cv2', 'ray', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--score-threshold" in done.stdout


def test_help_answers_at_once():
    program = Path(sys.executable).parent / "score"
    if not program.exists():
        pytest.skip("the package is not installed, so there is no score command")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([str(program), "--help"], capture_output=True, check=True, env={**os.environ})
        times.append(time.perf_counter() - started)
    # The promise is 0.3 s on an idle machine (measured: 0.1 s); here others run beside it.
    assert min(times) < 0.6, times


def test_versions_agree(root):
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (root / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


def test_the_licences_are_those_of_what_is_pinned(root):
    shown = licences.rows_of(licences.PAGE.read_text())
    said = "run: python -m tests.architecture.licences"
    assert {name: version for name, (version, _) in shown.items()} == licences.pins(), said
    assert licences.PAGE.read_text() == licences.page(), said
    with pytest.raises(LookupError, match="not installed"):
        licences.licence_of("no-such-package")


@pytest.mark.parametrize(("seconds", "skipped"), [(-1, True), (60, False), (None, False)])
def test_what_a_limit_of_time_leaves_out_is_skipped(seconds, skipped):
    until = None if seconds is None else time.time() + seconds
    item = SimpleNamespace(config=SimpleNamespace(getoption={"--until": until}.get))
    with pytest.raises(pytest.skip.Exception, match="no time was left") if skipped else nullcontext():
        conftest.pytest_runtest_setup(item)
