"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str) -> str:
    found = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ, cwd=ROOT, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.model
def test_three_tempers_differ() -> None:
    text = run_python("examples/three_tempers.py")
    answers = dict(re.findall(r"^ *(plain|joy|fear)  (.+)$", text, re.MULTILINE))
    assert len(set(answers.values())) == 3
    # Kernels of other processors round differently, and a greedy reply goes its own way sooner or later.
    beginning = " ".join(answers["plain"].split()[:8])
    assert beginning in (ROOT / "README.md").read_text(), "the README shows another output"


@pytest.mark.model
def test_hot_swap_shows_every_dose() -> None:
    text = run_python("examples/hot_swap.py")
    assert text.count("[calm]") == 2
    assert "[joy]" in text


def test_arithmetic_prints_cosines() -> None:
    rows = [line.split() for line in run_python("examples/arithmetic.py").splitlines()[1:6]]
    for i, row in enumerate(rows):
        assert float(row[i + 1]) == 1.0


@pytest.mark.model
@pytest.mark.parametrize("example", ["batch_of_tempers", "tempers_of_sequences"])
def test_a_batch_of_tempers_has_a_row_each(example: str) -> None:
    text = run_python(f"examples/{example}.py")
    rows = re.findall(r"^ *(plain|joy|fear|calm)  (.+)$", text, re.MULTILINE)
    assert [name for name, _ in rows] == ["plain", "joy", "fear", "calm"]
    assert len({answer for _, answer in rows}) == 4
