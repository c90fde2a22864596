"""Building from source, what the archives hold, and finding the package once it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
JUNK = (
    "benchmarks/results/bench.json",
    "csrc/build/mien_batch.o",
    "plugin/mien/__pycache__/old.cpython-311.pyc",
    "plugin/mien/_engine.abi3.so",
    "vectors/smollm2-135m-instruct/.making/dose-joy.json",
)


class Archives(NamedTuple):
    sdist: set[str]  # names in it, without its top folder
    unpacked: Path
    wheel: Path


def copied(folder: Path) -> Path:
    """A copy of the checkout, so that it stays clean; without what git ignores."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "results", "__pycache__", "*.so", "*.egg-info")
    return shutil.copytree(ROOT, folder, ignore=ignored)


def build(source: Path, kind: str, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `python -m build` asks of setuptools, in this environment."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    target.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """An sdist of the checkout, and a wheel of the sdist."""
    folder = tmp_path_factory.mktemp("archives")
    source = copied(folder / "source")
    for name in JUNK:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    built = build(source, "sdist", folder / "dist")
    assert built.returncode == 0, built.stderr
    (archive,) = (folder / "dist").glob("mien-*.tar.gz")
    with tarfile.open(archive) as file:
        names = [Path(member.name) for member in file.getmembers() if member.isfile()]
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    built = build(unpacked, "wheel", folder / "dist", MIEN_DEV="1")
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (folder / "dist").glob("mien-*.whl")
    return Archives({Path(*name.parts[1:]).as_posix() for name in names}, unpacked, wheel)


def files(folder: str, *patterns: str) -> set[str]:
    """Of the checkout, by their paths in it."""
    found = {path.relative_to(ROOT).as_posix() for each in patterns for path in (ROOT / folder).rglob(each)}
    assert found
    return found


def test_an_sdist_holds_all_that_the_build_and_the_tests_read(archives: Archives) -> None:
    assert files("csrc", "*.c", "*.h", "*.py") <= archives.sdist
    assert files("plugin", "*.py", "*.toml", "py.typed") <= archives.sdist
    assert files("vectors", "*.py", "LICENSE", "README.md", "pack.toml", "*.gguf") <= archives.sdist
    assert files("tests", "*.py", "*.txt", "*.c", "*.h", "Makefile") <= archives.sdist
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt", "MANIFEST.in"} <= archives.sdist
    assert not archives.sdist & set(JUNK)


def test_a_wheel_of_the_sdist_holds_the_package_and_nothing_else(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as wheel:
        names = set(wheel.namelist())
    expected = {name.removeprefix("plugin/") for name in files("plugin", "*.py", "*.toml", "py.typed")}
    packs = files("vectors", "*.py", "README.md", "pack.toml", "*.gguf")
    expected |= {f"mien/{name}" for name in packs} | {"mien/_engine.abi3.so"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.partition(".dist-info/licenses/")[2] for name in names} >= {"LICENSE", "vectors/LICENSE"}


def test_a_wheel_is_tagged_for_the_oldest_python_and_all_later(archives: Archives) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=").replace(".", "")
    assert f"-cp{oldest}-abi3-" in archives.wheel.name
    with zipfile.ZipFile(archives.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["License-Expression"] == "MIT AND Apache-2.0"


def test_what_is_unpacked_of_a_wheel_runs(archives: Archives, tmp_path: Path) -> None:
    with zipfile.ZipFile(archives.wheel) as wheel:
        wheel.extractall(tmp_path / "site")
    code = """
import mien, mien.engine, mien.vectors, numpy
from mien.runtimes.fake import NumpyModel
print(mien.__file__)
print(mien.load("joy").name)
steering = mien.attach(NumpyModel(n_layer=30, n_embd=576, n_vocab=8))
steering.set(mien.Vector("one", (3,), numpy.ones((1, 576), dtype="float32")))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == [str(tmp_path / "site" / "mien" / "__init__.py"), "joy"], found.stderr
    assert found.returncode == 0, found.stderr


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path) -> None:
    built = build(copied(tmp_path / "source"), "wheel", tmp_path / "wheels", CC="/no/such/compiler")
    assert built.returncode != 0
    assert "apt install gcc" in built.stderr
    assert "Traceback" not in built.stderr
    assert not list((tmp_path / "wheels").iterdir())


def test_on_windows_the_build_says_what_is_supported() -> None:
    code = "import cffi, runpy, sys; sys.platform = 'win32'; runpy.run_path('csrc/build.py')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "WSL" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("way", ["command", "script", "module"])
def test_beside_the_checkout_the_package_is_found_and_not_its_folder(tmp_path: Path, way: str) -> None:
    """A folder of the name `mien` is a namespace package to whatever looks for packages there."""
    (tmp_path / "mien").symlink_to(ROOT)
    code = "import mien; mien.attach; print(mien.__file__)"
    (tmp_path / "beside.py").write_text(code)
    arguments = {"command": ["-c", code], "script": ["beside.py"], "module": ["-m", "beside"]}[way]
    found = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).name == "__init__.py"
