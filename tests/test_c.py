"""The engine's own tests, without Python: see tests/c/Makefile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("target", ["test", "strict", "thread"])
def test_make(target: str) -> None:
    """test: sanitizers and the build that ships. strict: no warning. thread: no data race."""
    folder = Path(__file__).parent / "c"
    result = subprocess.run(
        ["make", "--no-print-directory", "-C", str(folder), target],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
