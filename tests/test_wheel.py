"""The wheel, installed alone in an empty environment, runs the main job."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil, simrl
names = [module.name for module in pkgutil.walk_packages(simrl.__path__, "simrl.")]
for name in names:
    if name == "simrl.__main__":  # importing that one runs it
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # the core has no extras
        if not (name.startswith("simrl.real_backend.") and error.name in ("torch", "vllm", "ray", "transformers")):
            raise
print(len(names))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with nothing but the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git tracks: files lying about in a checkout must not find their way into the wheel.
    run("git", "clone", "--quiet", ROOT, "source", cwd=folder)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder / "source", cwd=folder)
    venv.create(folder / "env", with_pip=True)
    binaries = folder / "env" / "bin"
    wheel = next(folder.glob("*.whl"))
    run(binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", wheel, cwd=folder)
    return binaries


def test_wheel_runs_the_main_job(installed: Path, tmp_path: Path) -> None:
    command = [installed / "simrl", "run", "--policy", "rlhfless", "--nodes", "20", "--steps", "2", "--json"]
    summary = json.loads(run(*command, cwd=tmp_path))
    assert (summary["policy"], summary["nodes"], summary["gpus"], summary["steps"]) == ("rlhfless", 20, 160, 2)
    assert summary["responses"] == 2 * 1024 * 4
    assert list(tmp_path.iterdir()) == []


def test_wheel_holds_every_module(installed: Path, tmp_path: Path) -> None:
    tracked = run("git", "ls-files", "*.py", cwd=ROOT).split()
    folders = ("traces/", "policies/", "simulator/", "real_backend/", "experiments/", "simrl/")
    modules = [name for name in tracked if name.startswith(folders) and name != "simrl/__init__.py"]
    assert int(run(installed / "python", "-c", IMPORT_ALL, cwd=tmp_path)) == len(modules)
