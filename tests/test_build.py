"""Building and installing from source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DATA = ROOT / "plugin" / "mien" / "data"
PARTS = ("csrc", "plugin", "vectors", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is built, so that the checkout stays clean."""
    folder = tmp_path / "source"
    folder.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / part)
    return folder


def build(source: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    arguments = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(target), str(source)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_a_wheel_holds_the_engine_the_packs_and_nothing_foreign(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path / "wheels", MIEN_DEV="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "wheels").glob("mien-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert any(name.startswith("mien/_engine") for name in names)
    pack = {name for name in names if name.startswith("mien/vectors/smollm2-135m-instruct/")}
    assert {Path(name).name for name in pack} >= {"pack.toml", "joy.gguf", "calm.gguf", "README.md"}
    assert {"mien/py.typed", "mien/cli/__init__.py", "mien/runtimes/llama.py"} <= names
    data = {f"mien/data/{path.relative_to(DATA).as_posix()}" for path in DATA.rglob("*.toml")}
    assert len(data) > 40
    assert data <= names, "a family of contrast data is missing in pyproject.toml's packages"
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"mien"}


def test_without_a_compiler_the_build_says_what_to_install(source: Path, tmp_path: Path) -> None:
    built = build(source, tmp_path / "wheels", CC="/no/such/compiler")
    assert built.returncode != 0
    output = built.stdout + built.stderr
    assert "its C engine could not be built" in output
    assert "apt install gcc" in output
    assert not (tmp_path / "wheels").exists() or not list((tmp_path / "wheels").iterdir())
