"""The fuzz targets, for a fixed number of inputs; by hand they run as long as you like (fuzz/driver.py)."""

from __future__ import annotations

import importlib
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).parent / "fuzz"
ROOM = 256 << 20  # bytes that the inputs may take at once


@pytest.fixture
def load_target(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FUZZ))
    return importlib.import_module


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_any_text_is_a_recipe_or_is_refused(load_target: Any) -> None:
    driver, recipe = load_target("driver"), load_target("recipe")
    before = peak()
    count, accepted, _ = driver.run(recipe.TARGET, 0, range(5000))
    assert count == 5000
    assert 1000 < accepted < 4000  # else most inputs say nothing
    assert peak() - before < ROOM


def test_any_file_is_a_vector_or_is_refused(load_target: Any, tmp_path: Path) -> None:
    driver, vectorfile = load_target("driver"), load_target("vectorfile")
    before = peak()
    count, accepted, _ = driver.run(vectorfile.target(tmp_path), 0, range(1500))
    assert count == 1500
    assert 150 < accepted < 1200
    assert peak() - before < ROOM


def test_what_is_found_can_be_seen_again(load_target: Any) -> None:
    driver = load_target("driver")

    def check(number: int) -> bool:
        if number % 10 == 7:
            raise ValueError("a seven")
        return True

    target = driver.Target(lambda dice: dice.randrange(100), check)
    with pytest.raises(driver.Found, match="a seven") as found:
        driver.run(target, 5, range(1000))
    first, shown, *_ = str(found.value).splitlines()
    _, seed, _, number = first.split()
    assert int(shown) == random.Random(f"{seed}:{number}").randrange(100)


@pytest.mark.parametrize("name", ["recipe", "vectorfile"])
def test_a_target_runs_by_hand(name: str) -> None:
    command = [sys.executable, str(FUZZ / f"{name}.py"), "--seconds", "1", "--seed", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("seed 3\n")
    assert "accepted" in result.stdout
