"""Vectors from and for other programs: what each row means there, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from makers import MODEL, N_EMBD, N_LAYER, make_vector, same_bits
from mien import exporting, foreign, interchange, torchfile, vectorfile
from mien.architectures import gguf_architecture, is_gguf_architecture, transformers_model_type
from mien.cli import cli
from mien.errors import (
    MienError,
    MissingExtra,
    ModelMismatch,
    ModelNotFound,
    PackError,
    VectorError,
    VectorFileError,
)
from mien.fingerprint import Fingerprint
from mien.interchange import FORMATS, SUFFIXES, read, write
from mien.modelfile import fingerprint_of
from mien.pack import Pack
from mien.vector import Vector
from packs import make_pack


def rows_of(*numbers: int, n_embd: int = N_EMBD, seed: int = 0) -> dict[int, Any]:
    generator = np.random.default_rng(seed)
    return {number: generator.standard_normal(n_embd).astype(np.float32) for number in numbers}


def write_gguf(path: Path, rows: Mapping[int, Any], hint: str | None = "llama") -> Path:
    """As repeng, llama.cpp's generator and others write it: nothing but the hint, the count and the rows."""
    writer = gguf.GGUFWriter(path, "controlvector")
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(rows))
    for number, row in rows.items():
        writer.add_tensor(f"direction.{number}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def assert_rows(vector: Vector, expected: Mapping[int, Any]) -> None:
    assert vector.layers == tuple(sorted(expected))
    for layer, row in expected.items():
        assert same_bits(vector.directions[layer], row)


# Names of architectures.


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "llama"),
        ("mistral", "llama"),
        ("mixtral", "llama"),
        ("gpt_neox", "gptneox"),
        ("qwen2_moe", "qwen2moe"),
        ("gemma3_text", "gemma3"),
        ("cohere", "command-r"),
        ("phi", "phi2"),
        ("phi3", "phi3"),
        ("gpt_bigcode", "starcoder"),
        ("falcon_h1", "falcon-h1"),
        ("nobody_knows-this", "nobody_knows-this"),
        ("", ""),
    ],
)
def test_an_architecture_has_one_name(model_type: str, architecture: str) -> None:
    assert gguf_architecture(model_type) == architecture
    assert gguf_architecture(architecture) == architecture


def test_every_architecture_of_gguf_comes_back() -> None:
    for name in gguf.MODEL_ARCH_NAMES.values():
        assert is_gguf_architecture(name)
        assert gguf_architecture(transformers_model_type(name)) == name
    assert transformers_model_type("llama") == "llama"
    assert transformers_model_type("gptneox") == "gpt_neox"
    assert transformers_model_type("command-r") == "cohere"


# There and back.


@pytest.mark.parametrize("format", SUFFIXES)
@pytest.mark.parametrize(
    "vector",
    [
        make_vector(layers=(1, 3, 5), meta={"kind": "emotion", "samples": 3}),
        Vector("joy", (1, 2), np.array([[1e-45, -0.0], [3.4e38, 1.0]], np.float32), model_hint="gptneox"),
    ],
    ids=["with a fingerprint", "odd floats"],
)
def test_a_vector_comes_back_to_the_bit(vector: Vector, format: str, tmp_path: Path) -> None:
    path = tmp_path / f"joy{SUFFIXES[format]}"
    write(vector, path, format)
    first = path.read_bytes()
    found = read(path, model=vector.fingerprint, architecture=vector.model_hint)
    assert found.vector.layers == vector.layers
    assert same_bits(found.vector.rows, vector.rows)
    assert (found.vector.name, found.vector.model_hint) == (vector.name, vector.model_hint)
    assert found.vector.fingerprint == vector.fingerprint
    if SUFFIXES[format] == ".gguf":  # mien's metadata travels, too
        assert (found.format, dict(found.vector.meta)) == ("mien", dict(vector.meta))
        assert found.notes == ()
    write(vector, path, format)
    assert path.read_bytes() == first


def test_the_plain_file_is_what_save_writes(tmp_path: Path) -> None:
    vector = make_vector()
    write(vector, tmp_path / "a.gguf", "llama.cpp")
    vector.save(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_safetensors_hold_the_architecture(tmp_path: Path) -> None:
    write(make_vector(fingerprint=None, model_hint="gemma3"), tmp_path / "a.safetensors", "safetensors")
    assert read(tmp_path / "a.safetensors").vector.model_hint == "gemma3"


def test_torch_opens_what_is_written_for_steering_vectors(tmp_path: Path) -> None:
    vector = make_vector()
    write(vector, tmp_path / "joy.pt", "steering-vectors")
    found = torch.load(tmp_path / "joy.pt", weights_only=True)
    assert list(found) == list(vector.layers)
    assert all(same_bits(found[layer].numpy(), row) for layer, row in vector.directions.items())


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorError, match=r"format: expected one of auto, mien, repeng, .*, got 'onnx'"):
        read(tmp_path / "a", "onnx")
    with pytest.raises(VectorError, match=r"format: expected one of repeng, llama.cpp, .*, got 'zip'"):
        write(make_vector(), tmp_path / "a", "zip")


def test_what_can_not_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "joy.gguf"
    path.write_bytes(b"old")
    with pytest.raises(VectorError, match="the model's architecture is not known"):
        write(make_vector(fingerprint=None), path, "repeng")
    with pytest.raises(PackError, match="can't be written"):
        write(make_vector(), path / "below" / "joy.npz", "npz")
    assert path.read_bytes() == b"old"


# repeng.


def test_repengs_file_keeps_its_blocks_and_loses_the_last(tmp_path: Path) -> None:
    rows = rows_of(*range(N_LAYER - 1, 0, -1))
    path = write_gguf(tmp_path / "happy.gguf", rows, "mistral")
    found = read(path, "repeng")
    last = rows.pop(N_LAYER - 1)
    assert_rows(found.vector, rows)
    assert (found.vector.name, found.vector.model_hint, found.format) == ("happy", "llama", "repeng")
    assert len(found.notes) == 1
    assert "row 5 was dropped (the highest, taken for the last block)" in found.notes[0]
    assert "final norm" in found.notes[0]
    assert dict(found.vector.meta) == {
        "imported_from": "repeng",
        "imported_digest": hashlib.sha256(path.read_bytes()).hexdigest(),
        "imported_model_type": "mistral",
        "site": "residual",
        "captured_at": "output of the same block",
    }
    kept = read(path, "repeng", keep_last=True)
    assert kept.notes == ()
    assert_rows(kept.vector, {**rows, N_LAYER - 1: last})


def test_the_model_decides_which_row_of_repengs_is_the_last(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", rows_of(1, 2, 3))
    assert read(path, "repeng", model=MODEL).vector.layers == (1, 2, 3)
    assert read(path, "repeng", model=MODEL).notes == ()
    found = read(write_gguf(tmp_path / "b.gguf", rows_of(1, 5)), "repeng", model=MODEL)
    assert found.vector.layers == (1,)
    assert found.vector.fingerprint == MODEL
    assert "row 5 was dropped (the last block)" in found.notes[0]


def test_repeng_finds_its_own_name_of_the_model(tmp_path: Path) -> None:
    def hint(vector: Vector) -> str:
        write(vector, tmp_path / "out.gguf", "repeng")
        reader = gguf.GGUFReader(tmp_path / "out.gguf")
        return str(reader.fields["controlvector.model_hint"].contents())

    assert hint(make_vector(fingerprint=None, model_hint="gptneox")) == "gpt_neox"
    assert hint(make_vector(fingerprint=Fingerprint("command-r", 6, 5))) == "cohere"
    assert hint(make_vector(fingerprint=None, model_hint="llama")) == "llama"
    imported = read(write_gguf(tmp_path / "in.gguf", rows_of(1, 2), "mistral"), "repeng").vector
    assert hint(imported) == "mistral"
    moved = dataclasses.replace(imported, model_hint="gemma2")
    assert hint(moved) == "gemma2"


def test_what_mien_wrote_for_repeng_is_read_whole(tmp_path: Path) -> None:
    vector = make_vector(layers=(4, 5))
    write(vector, tmp_path / "joy.gguf", "repeng")
    found = read(tmp_path / "joy.gguf", "repeng")
    assert_rows(found.vector, vector.directions)
    assert found.vector.fingerprint == MODEL
    assert "holds mien's own metadata" in found.notes[0]


@dataclasses.dataclass
class ControlVector:
    """The shape of repeng.ControlVector."""

    model_type: str
    directions: dict[int, Any]


def test_an_object_of_repengs_is_taken() -> None:
    rows = rows_of(3, 2, 1)
    found = interchange.from_repeng(ControlVector("gpt_neox", rows), name="happy")
    assert_rows(found.vector, {1: rows[1], 2: rows[2]})
    assert (found.vector.name, found.vector.model_hint) == ("happy", "gptneox")
    assert "imported_digest" not in found.vector.meta
    wide = interchange.from_repeng(ControlVector("llama", {1: np.full(5, 0.1)}), keep_last=True)
    assert wide.notes == ("values of float64 were rounded to float32",)
    with pytest.raises(VectorError, match=r"^happy, layer 2: expected 5 values as in layer 1, got 4$"):
        interchange.from_repeng(ControlVector("llama", {1: np.ones(5), 2: np.ones(4)}), name="happy")


def test_an_object_for_repeng_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("repeng")
    module.ControlVector = ControlVector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "repeng", module)
    vector = make_vector(fingerprint=None, model_hint="gptneox")
    made = interchange.to_repeng(vector)
    assert made.model_type == "gpt_neox"
    assert all(same_bits(made.directions[layer], row) for layer, row in vector.directions.items())
    made.directions[1] += 1  # theirs to change
    assert interchange.from_repeng(made, keep_last=True).vector.layers == vector.layers


# llama.cpp, and its generator.


def test_a_control_vector_of_unknown_origin_says_what_was_assumed(tmp_path: Path) -> None:
    rows = rows_of(1, 2, 5)
    found = read(write_gguf(tmp_path / "x.gguf", rows), model=MODEL)
    assert_rows(found.vector, rows)
    assert found.format == "llama.cpp"
    assert found.vector.meta["captured_at"] == "not known"
    assert len(found.notes) == 1
    for word in ("block N", "repeng", "llama.cpp-generator"):
        assert word in found.notes[0]


def test_the_generators_rows_stay_where_llama_cpp_applies_them(tmp_path: Path) -> None:
    rows = rows_of(1, 2, 3)
    found = read(write_gguf(tmp_path / "x.gguf", rows), "llama.cpp-generator")
    assert_rows(found.vector, rows)
    assert found.vector.meta["captured_at"] == "output of the block before"
    assert "a shift of -1" in found.notes[0]


def test_a_shift_takes_the_generators_rows_to_where_they_were_read(tmp_path: Path) -> None:
    rows = rows_of(1, 2, 3)
    found = read(write_gguf(tmp_path / "x.gguf", rows), "llama.cpp-generator", shift=-1)
    assert_rows(found.vector, {1: rows[2], 2: rows[3]})
    assert found.vector.meta["captured_at"] == "output of the same block"
    assert "row 1 was dropped: it would act at block 0" in found.notes[1]


@pytest.mark.parametrize(
    ("format", "shift", "place"),
    [
        ("repeng", 2, "output of 2 blocks before"),
        ("repeng", -1, "output of the block after"),
        ("llama.cpp-generator", 1, "output of 2 blocks before"),
        ("auto", 1, "not known"),
    ],
)
def test_where_a_row_was_read_follows_the_shift(format: str, shift: int, place: str, tmp_path: Path) -> None:
    found = read(write_gguf(tmp_path / "x.gguf", rows_of(3, 4, 5)), format, shift=shift)
    assert found.vector.layers[0] == 3 + shift
    assert found.vector.meta["captured_at"] == place


@pytest.mark.parametrize("format", ["auto", "repeng", "llama.cpp-generator"])
def test_row_0_is_dropped_and_said(format: str, tmp_path: Path) -> None:
    rows = rows_of(0, 1, 2)
    found = read(write_gguf(tmp_path / "x.gguf", rows), format, keep_last=True)
    assert_rows(found.vector, {1: rows[1], 2: rows[2]})
    assert any("row 0 was dropped: it would act at block 0" in note for note in found.notes)


def test_row_0_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="no row is left for a block from 1; there were 1, from 0 to 0"):
        read(write_gguf(tmp_path / "x.gguf", rows_of(0)))
    with pytest.raises(VectorFileError, match="no row is left"):
        read(write_gguf(tmp_path / "y.gguf", rows_of(7)), "repeng")


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_floats_become_float32(kind: Any, tmp_path: Path) -> None:
    row = (np.arange(5) / 3).astype(kind)
    found = read(write_gguf(tmp_path / "x.gguf", {1: row}), "llama.cpp-generator")
    assert same_bits(found.vector.rows[0], row.astype(np.float32))
    assert ("values of float64 were rounded to float32" in found.notes) == (kind is np.float64)


# mien's own files.


def test_miens_own_file_moves_with_its_metadata_but_for_what_was_measured(tmp_path: Path) -> None:
    meta: dict[str, Any] = {
        "kind": "trait",
        "captured_at": "output of the same block",
        "strength": [0.5, 0.5],
        "stream_norm": [1.0, 1.0],
        "calibration.dose": [0.5],
    }
    vector = make_vector("joy", (1, 2), meta=meta)
    vector.save(tmp_path / "x.gguf")
    found = read(tmp_path / "x.gguf", shift=1, name="glee")
    assert_rows(found.vector, {2: vector.rows[0], 3: vector.rows[1]})
    assert found.vector.name == "glee"
    assert dict(found.vector.meta) == {
        "kind": "trait",
        "captured_at": "output of the same block; then shifted by 1",
    }
    assert "measured before the shift" in found.notes[0]
    with pytest.raises(VectorFileError, match="row 2: expected blocks up to 5, got a row for block 6"):
        read(tmp_path / "x.gguf", shift=4)


def test_a_foreign_file_is_not_miens(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match="expected keys that start with mien"):
        read(write_gguf(tmp_path / "x.gguf", rows_of(1)), "mien")


# The model.


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", rows_of(1, 2), "qwen2")
    with pytest.raises(ModelMismatch, match=r"made for qwen2, the model is llama.*name the architecture"):
        read(path, model=MODEL)
    assert read(path, model=MODEL, architecture="mistral").vector.fingerprint == MODEL
    with pytest.raises(ModelMismatch, match="rows of 5 values, not 7"):
        read(path, architecture="llama", model=Fingerprint("llama", 6, 7))
    make_vector().save(tmp_path / "own.gguf")
    with pytest.raises(ModelMismatch, match="made for n_embd 5, the model has 7"):
        read(tmp_path / "own.gguf", model=Fingerprint("llama", 6, 7))
    with pytest.raises(ModelMismatch, match="made for gemma2, the model is llama"):
        read(tmp_path / "own.gguf", architecture="gemma2")


def test_a_hint_that_means_nothing_is_said(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", rows_of(1, 2), "qwen2.5")
    assert read(path).vector.model_hint == "qwen2.5"
    assert "'qwen2.5' is no architecture that GGUF knows" in read(path).notes[1]
    assert read(path, model=MODEL).vector.model_hint == "llama"
    assert "'qwen2.5', which the file says" in read(path, model=MODEL).notes[1]
    assert read(write_gguf(tmp_path / "y.gguf", rows_of(1), None)).vector.model_hint == ""


def test_too_many_rows_for_the_model_say_what_may_be_meant(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", rows=np.ones((N_LAYER + 1, N_EMBD), np.float32))
    with pytest.raises(VectorFileError, match=r"block 6\. Where row 0 is the embedding, the shift is -1"):
        read(path, model=MODEL)
    found = read(path, model=MODEL, shift=-1)
    assert found.vector.layers == (1, 2, 3, 4, 5)
    assert any("row 0, 1 was dropped" in note for note in found.notes)
    assert any("row 6 acts at the last block" in note and "final norm" in note for note in found.notes)


@pytest.mark.model
def test_a_models_file_has_the_fingerprint_of_the_loaded_model(model_path: Path, load: Any) -> None:
    from mien.runtimes import llama_context

    assert fingerprint_of(model_path) == llama_context.fingerprint_of(load()._model.model)


def test_a_models_folder_has_a_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text('{"model_type": "mistral", "num_hidden_layers": 6, "hidden_size": 5}')
    assert fingerprint_of(folder) == Fingerprint("llama", 6, 5, name="tiny")
    config.write_text('{"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "n_layer": 2}}')
    with pytest.raises(ModelNotFound, match="n_embd: expected int, got None"):
        fingerprint_of(folder)
    config.write_text("[]")
    with pytest.raises(ModelNotFound, match="with a model_type"):
        fingerprint_of(folder)
    config.unlink()
    with pytest.raises(ModelNotFound, match=r"config\.json: expected a transformers model's configuration"):
        fingerprint_of(folder)


def test_a_models_file_that_is_none_is_refused(tmp_path: Path) -> None:
    make_vector().save(tmp_path / "joy.gguf")
    with pytest.raises(ModelNotFound, match="expected a model, got a vector"):
        fingerprint_of(tmp_path / "joy.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ModelNotFound, match="broken or cut short"):
        fingerprint_of(tmp_path / "cut.gguf")
    with pytest.raises(ModelNotFound, match="no such file"):
        fingerprint_of(tmp_path / "nothing.gguf")


def test_tokens_are_as_llama_cpp_holds_them(tmp_path: Path) -> None:
    from mien.fingerprint import vocabulary_digest

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "glm4moe")
    writer.add_block_count(7)
    writer.add_uint32("glm4moe.nextn_predict_layers", 1)
    writer.add_embedding_length(5)
    writer.add_token_list([b"a", b"\xff", b"", b"b\0c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = fingerprint_of(tmp_path / "m.gguf")
    assert found.n_layer == 6
    assert found.vocabulary == vocabulary_digest([b"a", b"\xff", b"[EMPTY_2]", b"b"])


# steering-vectors.


@dataclasses.dataclass
class SteeringVector:
    """The shape of steering_vectors.steering_vector.SteeringVector."""

    layer_activations: dict[int, Any]
    layer_type: str = "decoder_block"


@pytest.fixture
def steering_vectors(monkeypatch: pytest.MonkeyPatch) -> type[SteeringVector]:
    """The class under the name that the package gives it, so that it is saved under that name."""
    package, module = (types.ModuleType(f"steering_vectors{tail}") for tail in ("", ".steering_vector"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(SteeringVector, "__module__", module.__name__)
    module.SteeringVector = package.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    return SteeringVector


WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = sys.modules["steering_vectors"] = None
from mien.interchange import read
for path in sys.argv[1:]:
    found = read(path)
    print(json.dumps({layer: row.tolist() for layer, row in found.vector.directions.items()}))
"""


def test_what_torch_saved_is_read_without_torch(steering_vectors: type, tmp_path: Path) -> None:
    table = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    wide = table.to(torch.bfloat16)
    saved = {
        "plain": {1: table[1].clone(), 2: table[2].clone()},
        "shared storage": {1: table[1], 5: table[5]},
        "not contiguous": {1: table.T[:, 2], 2: table.T[:, 3], 3: table.flip(0)[0].flip(0)[::1]},
        "bfloat16": {1: wide[1], 2: wide.T[:, 1]},
        "float16": {1: table[1].half()},
        "float64": {1: table[1].double(), 2: table[2].double()},
        "parameters": {1: torch.nn.Parameter(table[1]), 2: table[2].clone().requires_grad_()},
        "with dimensions of one": {1: table[1].reshape(1, 1, 5), 2: table[2].reshape(1, 5)},
        "one value": {1: table[1][:1]},
        "expanded": {1: table[1][:1].expand(5)},
    }
    paths, expected = [], []
    for tensors in saved.values():
        for form in (steering_vectors(tensors), tensors, vars(steering_vectors(tensors))):
            for protocol in (2, 4):
                paths.append(tmp_path / f"{len(paths)}.pt")
                torch.save(form, paths[-1], pickle_protocol=protocol)
                expected.append(
                    {str(k): t.detach().float().flatten().numpy().tolist() for k, t in tensors.items()}
                )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_steering_vectors_keys_are_blocks(steering_vectors: type, tmp_path: Path) -> None:
    tensors = {layer: torch.full((5,), float(layer)) for layer in (0, 2, 5)}
    torch.save(steering_vectors(tensors), tmp_path / "calm.pt")
    found = read(tmp_path / "calm.pt", "steering-vectors", model=MODEL)
    assert_rows(found.vector, {layer: tensors[layer].numpy() for layer in (2, 5)})  # the last is sound here
    assert (found.vector.name, found.format) == ("calm", "steering-vectors")
    assert found.vector.meta["captured_at"] == "output of the same block"
    assert found.notes == (
        "row 0 was dropped: it would act at block 0, and vector files start at block 1 "
        "(llama.cpp refuses direction.0)",
    )


def test_one_tensor_of_rows_is_read(tmp_path: Path) -> None:
    torch.save(torch.ones(3, 5), tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").vector.layers == (1, 2)


@pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", None])
def test_other_sites_are_refused(layer_type: Any, steering_vectors: type, tmp_path: Path) -> None:
    steering = steering_vectors({1: torch.ones(5)}, layer_type)
    torch.save(steering, tmp_path / "x.pt")
    with pytest.raises(VectorFileError, match=f"layer_type: expected 'decoder_block', got '{layer_type}'"):
        read(tmp_path / "x.pt")
    with pytest.raises(VectorError, match=f"^calm, layer_type: expected .* '{layer_type}': .* another site"):
        interchange.from_steering_vectors(steering, name="calm")


def test_objects_of_steering_vectors_come_and_go(steering_vectors: type) -> None:
    table = torch.arange(10.0).reshape(2, 5).to(torch.bfloat16).requires_grad_()
    found = interchange.from_steering_vectors(
        steering_vectors({1: table[0], 2: table[1]}), name="calm", architecture="mistral"
    )
    assert found.vector.model_hint == "llama"
    assert same_bits(found.vector.rows, np.arange(10, dtype=np.float32).reshape(2, 5))
    made = interchange.to_steering_vectors(found.vector)
    assert isinstance(made, steering_vectors)
    assert made.layer_type == "decoder_block"
    assert same_bits(made.layer_activations[2].numpy(), found.vector.rows[1])


# Pickles that want more than to be read.


class Evil:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def zipped(path: Path, data: bytes, **entries: bytes) -> Path:
    """An archive as torch's, around any pickle. entries: data0 is the entry data/0."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            archive.writestr(f"archive/{name.replace('data', 'data/')}", content)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\xff" + value.to_bytes(255, "little", signed=True)


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    reference = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count)
    return b"(" + reference + b"tQ"


def tensor(count: int, offset: int, shape: list[int], strides: list[int], **named: str) -> bytes:
    """A pickle of {1: tensor}."""
    body = b"}K\x01ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count, **named) + number(offset)
    for numbers in (shape, strides):
        body += b"(" + b"".join(number(n) for n in numbers) + b"t"
    return b"\x80\x02" + body + b"\x89ccollections\nOrderedDict\n)RtRs."


def test_the_pickles_made_here_are_sound(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32)
    found = read(zipped(tmp_path / "x.pt", tensor(8, 1, [3], [2]), data0=values.tobytes()))
    assert same_bits(found.vector.rows[0], values[1:7:2])
    path = zipped(
        tmp_path / "big.pt", tensor(8, 1, [3], [2]), data0=values.astype(">f4").tobytes(), byteorder=b"big"
    )
    assert same_bits(read(path).vector.rows[0], values[1:7:2])


NESTED = b"\x80\x02" + b"K\x01" + b"q\x00h\x00\x86" * 200 + b"."  # a tuple that to walk takes 2^200 steps

HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (b"\x80\x02cos\nsystem\n" + text("exit") + b"\x85R.", "it names 'os.system'"),
    "builtins.eval by STACK_GLOBAL": (
        b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text("1") + b"\x85R.",
        "it names 'builtins.eval'",
    ),
    "builtins.eval in a dict in a list": (
        b"\x80\x02]}K\x01cbuiltins\neval\n" + text("1") + b"\x85Rsa.",
        "it names 'builtins.eval'",
    ),
    "torch.load": (b"\x80\x02ctorch\nload\n.", "it names 'torch.load'"),
    "a pickle in a storage": (
        b"\x80\x02ctorch.storage\n_load_from_bytes\n.",
        "it names 'torch.storage._load_from_bytes'",
    ),
    "an integer tensor": (tensor(1, 0, [1], [1], kind="LongStorage"), "it names 'torch.LongStorage'"),
    "a module that is no text": (b"\x80\x04K\x01K\x02\x93.", "a name is no text"),
    "a name with a line of its own": (b"\x80\x04" + text("os\n") + text("x") + b"\x93.", r"names 'os\\n.x'"),
    "an opcode that calls": (b"\x80\x02(" + text("a") + b"ios\nsystem\n.", "INST is no opcode"),
    "an extension registry": (b"\x80\x02\x82\x01.", "EXT1 is no opcode"),
    "a persistent id as text": (b"Pabc\n.", "PERSID is no opcode"),
    "a call of a tensor": (b"\x80\x02K\x01)R.", "it calls what is no function"),
    "an OrderedDict with items": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "in a way that torch.save"),
    "a storage as a function": (b"\x80\x02ctorch\nFloatStorage\n)R.", "in a way that torch.save"),
    "a state of something else": (b"\x80\x02}}b.", "attributes of a SteeringVector"),
    "a reference that is no storage": (b"\x80\x02K\x01Q.", "expected a reference to a storage"),
    "a reference to another thing": (
        b"\x80\x02(" + text("module") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ.",
        "expected a reference to a storage",
    ),
    "a storage of a path": (tensor(1, 0, [1], [1], key="../0"), "expected a storage's number"),
    "a storage that is not there": (tensor(8, 0, [1], [1], key="7"), "data/7: there is no such entry"),
    "a storage of 2^60": (tensor(2**60, 0, [1], [1]), "data/0: with it there are more than 536870912 bytes"),
    "a storage of less than there is": (tensor(7, 0, [1], [1]), "data/0: expected 28 bytes, got 32"),
    "a storage of another type": (tensor(8, 0, [1], [1], kind="HalfStorage"), "expected 16 bytes, got 32"),
    "a negative storage": (tensor(-1, 0, [1], [1]), "expected a storage's number and its count"),
    "an offset outside": (tensor(8, 8, [1], [1]), "not within its 8 values"),
    "a stride outside": (tensor(8, 1, [8], [1]), "not within its 8 values"),
    "a stride far outside": (tensor(8, 0, [2], [2**62]), "not within its 8 values"),
    "a negative stride": (tensor(8, 7, [8], [-1]), "expected an offset, a shape and strides of 0 or more"),
    "a negative offset": (tensor(8, -1, [1], [1]), "strides of 0 or more"),
    "shape and strides that differ": (tensor(8, 0, [1, 1], [1]), "strides of 0 or more"),
    "many dimensions": (tensor(8, 0, [1] * 9, [1] * 9), "in at most 8 dimensions"),
    "no values": (tensor(8, 0, [0], [1]), "not within its 8 values"),
    "one value a billion times": (tensor(8, 0, [2**30], [0]), "with it there are more than"),
    "a billion by 2^1000": (tensor(8, 0, [2**1000, 2**30], [0, 0]), "with it there are more than"),
    "a tuple as a key": (NESTED[:-1] + b"}h\x00K\x01s.", "expected a number or a text as key, got tuple"),
    "a tuple without end": (NESTED, "expected a SteeringVector or"),
    "a dict in itself": (b"\x80\x02}q\x00K\x01h\x00s.", "expected a SteeringVector or"),
    "a text": (b"\x80\x02" + text("joy") + b".", "expected a SteeringVector or"),
    "text as a tensor": (b"\x80\x02}K\x01" + text("joy") + b"s.", "expected a SteeringVector or"),
    "an odd number of items": (b"\x80\x02}(K\x01u.", "expected a dict and pairs"),
    "items of no dict": (b"\x80\x02](K\x01K\x02u.", "expected a dict and pairs"),
    "an item of no list": (b"\x80\x02}K\x01a.", "expected a list"),
    "an empty stack": (b"\x80\x02.", "takes more from its stack than is there"),
    "a stack that runs empty": (b"\x80\x02\x86.", "takes more from its stack than is there"),
    "no mark": (b"\x80\x02t.", "there is no mark"),
    "nothing memoized": (b"\x80\x02h\x05.", "nothing was memoized as 5"),
    "nothing to memoize": (b"\x80\x02q\x05.", "takes more from its stack"),
    "no end": (b"\x80\x02}", "the pickle is broken or cut short"),
    "nothing": (b"", "the pickle is broken or cut short"),
    "an opcode that is none": (b"\x80\x02\xff.", "the pickle is broken or cut short"),
    "a text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffjoy.", "the pickle is broken or cut short"),
    "a bad text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "the pickle is broken or cut short"),
    "an empty dict": (b"\x80\x02}.", "and there is none"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_is_refused_for(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = zipped(tmp_path / "x.pt", data, data0=bytes(32))
    with pytest.raises(VectorFileError, match=re.escape(message) if "\\" not in message else message):
        read(path)


def test_a_dimension_of_one_may_have_any_stride(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", tensor(8, 3, [1, 5], [2**200, 1]), data0=bytes(32))
    assert read(path).vector.width == 5


def test_many_tensors_of_one_storage_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "MAX_BYTES", 32 + 2 * 32)
    tensors = {layer: torch.arange(8.0) for layer in (1, 2, 3)}
    for layer in (2, 3):
        tensors[layer] = tensors[1]
    torch.save({1: tensors[1], 2: tensors[1].view(8)}, tmp_path / "two.pt")
    assert read(tmp_path / "two.pt").vector.layers == (1, 2)
    torch.save({layer: tensors[1].view(8) for layer in (1, 2, 3)}, tmp_path / "three.pt")
    with pytest.raises(VectorFileError, match="with it there are more than 96 bytes of tensors"):
        read(tmp_path / "three.pt")


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    call = Evil(os.mkdir, str(witness))
    evil = [call, {1: call}, {1: torch.ones(5), 2: [call]}]
    for i, value in enumerate(evil):
        for protocol in (2, 4):
            path = tmp_path / f"{i}.pt"
            torch.save(value, path, pickle_protocol=protocol)
            with pytest.raises(VectorFileError, match=r"refused: it names '(posix|nt)\."):
                read(path)
            assert not witness.exists()
    # What was saved here does what it says: loading it the common way runs it.
    torch.load(tmp_path / "0.pt", weights_only=False)
    assert witness.exists()


def test_a_bare_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps({1: Evil(os.mkdir, str(tmp_path / "witness"))}))
    for format, message in (("auto", "a bare pickle is not read"), ("steering-vectors", "expected a zip")):
        with pytest.raises(VectorFileError, match=message):
            read(path, format)
    torch.save({1: torch.ones(5)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(VectorFileError, match=r"save it again with torch\.save"):
        read(path, "steering-vectors")
    assert not (tmp_path / "witness").exists()


def test_archives_that_torch_does_not_write_are_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "x.pt", tensor(8, 0, [5], [1])

    def refused(message: str) -> None:
        with pytest.raises(VectorFileError, match=message):
            read(path, "steering-vectors")

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good)
    refused(r"data\.pkl: expected an entry that is stored")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        archive.writestr("archive/data/0", bytes(32), zipfile.ZIP_DEFLATED)
    refused("data/0: expected an entry that is stored")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("b/data.pkl", good)
    refused(r"expected one data\.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", good)
    refused(r"expected one data\.pkl")
    zipped(path, good, data0=bytes(32), byteorder=b"middle")
    refused("byteorder: expected little or big, got b'middle'")
    zipped(path, b"\x80\x02" + b"0" * (1 << 20))
    refused(r"data\.pkl: expected at most 1048576 bytes, got 1048578")
    zipped(path, good, data0=bytes(32))
    path.write_bytes(path.read_bytes()[:-30])
    refused("can't be read")
    path.unlink()
    refused("can't be read")


def test_an_entry_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.pt", tensor(1 << 26, 0, [5], [1]), data0=bytes(32))
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<II", 1 << 28, 1 << 28)
    path.write_bytes(data)
    with pytest.raises(VectorFileError, match=r"data/0: expected at most \d+ bytes, got 268435456"):
        read(path)


@pytest.mark.parametrize("format", ["repeng", "npz", "safetensors", "steering-vectors"])
def test_a_damaged_file_gives_one_kind_of_error(format: str, tmp_path: Path) -> None:
    seed = 20
    generator = random.Random(seed)
    path = tmp_path / f"x{SUFFIXES[format]}"
    write(make_vector(fingerprint=None, model_hint="llama"), path, format)
    good = path.read_bytes()
    for i in range(150):
        data = bytearray(good)
        if i % 5 == 0:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.randrange(1, 4)):
                data[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data)
        print(f"seed {seed}, case {i}")  # shown where it fails
        with warnings.catch_warnings(), contextlib.suppress(MienError):
            warnings.simplefilter("ignore")  # of NumPy, about the header
            read(path)


# Arrays.


@pytest.mark.parametrize("pattern", ["direction.{}", "layer_{}", "layers.{}", "{}"])
@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_rows_go_by_their_names(pattern: str, format: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rows = rows_of(1, 3, 10)
    arrays = {pattern.format(n): row for n, row in rows.items()}
    path = tmp_path / f"x.{format}"
    if format == "npz":
        write_npz(path, **arrays)
    else:
        save_file(arrays, path)
    for asked in ("auto", format):
        found = read(path, asked, architecture="mistral")
        assert_rows(found.vector, rows)
        assert (found.format, found.vector.model_hint) == (format, "llama")
        assert found.notes[0].startswith("row N was taken to act at the output of block N")
        assert found.vector.meta["captured_at"] == "not known"


def test_one_array_is_a_row_a_block(tmp_path: Path) -> None:
    table = np.stack(list(rows_of(0, 1, 2).values()))
    np.save(tmp_path / "x.npy", table)
    for path in (tmp_path / "x.npy", write_npz(tmp_path / "x.npz", rows=table)):
        found = read(path)
        assert_rows(found.vector, {1: table[1], 2: table[2]})
        assert "row 0 was dropped" in found.notes[1]
        assert_rows(read(path, shift=1).vector, {1: table[0], 2: table[1], 3: table[2]})


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64", "float32"])
def test_safetensors_of_every_float(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    rows = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)).to(getattr(torch, kind))
    save_file({"layer_1": rows[0].clone(), "layer_2": rows[1].clone()}, tmp_path / "x.safetensors")
    assert same_bits(read(tmp_path / "x.safetensors").vector.rows, rows.float().numpy())


ONES = np.ones(5, np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"layer_1": ONES, "layer_2": np.ones(4)}, "layer_2: expected 5 values as in layer_1, got 4"),
        ({"layer_1": np.array([1, np.nan, 2])}, "layer_1: value 1 is nan; every value must be finite"),
        ({"layer_2": np.array([1, -np.inf])}, "layer_2: value 1 is -inf"),
        ({"layer_1": np.array([1, 2, 1e300])}, r"layer_1: value 2 is 1e\+300; .* finite in float32"),
        ({"rows": np.array([[1.0], [np.nan]])}, "rows, row 1: value 0 is nan"),
        ({"layer_1": np.arange(5)}, "layer_1: expected floats, got int64"),
        ({"layer_1": np.ones(5, complex)}, "layer_1: expected floats, got complex128"),
        ({"layer_1": np.array(1.0)}, r"layer_1: expected one row of n_embd values, got shape \(\)"),
        ({"layer_1": np.ones((2, 5)), "layer_2": ONES}, r"layer_1: .* got shape \(2, 5\)"),
        ({"layer_1": np.ones(0)}, r"layer_1: .* got shape \(0,\)"),
        ({"layer_1": ONES, "direction.1": ONES}, "expected one row for 1, and there are two"),
        ({"layer_x": ONES}, "'layer_x': expected direction.N, layer_N, layers.N or N"),
        ({"layer_-1": ONES}, "'layer_-1': expected direction.N"),
        ({"layer_01": ONES}, "'layer_01': expected direction.N"),
        ({"layer_12345": ONES}, "N from 0 to 9999"),
        ({"layer_1\x1b[2J": ONES}, r"'layer_1\\x1b\[2J'"),
        ({}, "expected direction.N, layer_N, layers.N or N, and there is none"),
        ({"layer_1": np.array([{}], object)}, "not readable as NumPy's .*allow_pickle"),
    ],
)
def test_arrays_that_are_no_vector(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=message):
        read(write_npz(tmp_path / "x.npz", **arrays))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({1: np.array([1, np.nan], np.float32)}, "direction.1: value 1 is nan"),
        ({1: ONES, 2: ONES[:3]}, "direction.2: expected 5 values as in direction.1, got 3"),
        ({1: np.ones((2, 5), np.float32)}, r"direction.1: expected one row of n_embd values, got shape"),
        ({1: np.arange(5, dtype=np.int32)}, "direction.1: expected floats, got I32"),
        ({"x": ONES}, "'direction.x': expected only tensors named direction.N"),
        ({10000: ONES}, "'direction.10000': expected only tensors named direction.N"),
    ],
)
def test_control_vectors_that_are_none(rows: dict[int, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=message):
        read(write_gguf(tmp_path / "x.gguf", rows), "repeng")


def test_another_gguf_file_is_no_vector(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(VectorFileError, match=r"expected a control vector, got .* architecture 'llama'"):
        read(tmp_path / "x.gguf")


def test_safetensors_of_other_types_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"layer_1": np.arange(5)}, tmp_path / "x.safetensors")
    with pytest.raises(VectorFileError, match="'layer_1': expected floats, got I64"):
        read(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 5) + b"{bad}")
    with pytest.raises(VectorFileError, match="not readable as safetensors"):
        read(tmp_path / "x.safetensors")


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", layer_1=ONES)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(VectorFileError, match=r"not readable as NumPy's .*encrypted"):
        read(path)


def test_large_arrays_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        bomb, {"descr": "<f4", "fortran_order": False, "shape": (1 << 45, 5)}
    )
    (tmp_path / "x.npy").write_bytes(bomb.getvalue())
    with pytest.raises(VectorFileError, match="not readable as NumPy's"):
        read(tmp_path / "x.npy")
    np.savez_compressed(tmp_path / "x.npz", layer_1=np.zeros(10_000, np.float32))
    monkeypatch.setattr(foreign, "MAX_BYTES", 20_000)
    with pytest.raises(VectorFileError, match="expected at most 20000 bytes, got 4"):
        read(tmp_path / "x.npz")
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 8) + b"{" + bytes(30_000))
    with pytest.raises(VectorFileError, match="expected at most 20000 bytes, got 30009"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected GGUF, .* it starts with b''"),
        (b"joy = [1, 2]", "it starts with b'joy '"),
        (b"PK\x03\x04 and no more", "can't be read"),
        (b"\x80\x04}.", "a bare pickle is not read"),
    ],
)
def test_files_of_no_kind(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(VectorFileError, match=message):
        read(tmp_path / "x")
    with pytest.raises(VectorFileError, match="can't be read"):
        read(tmp_path / "nothing")
    with pytest.raises(VectorFileError, match="can't be read"):
        read(tmp_path)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "auto"])
def test_the_wrong_format_says_what_it_expected(format: str, tmp_path: Path) -> None:
    for suffix in (".gguf", ".npz", ".pt"):
        if format in ("mien", "repeng", "llama.cpp-generator") and suffix == ".gguf":
            continue
        if (format, suffix) in (("npz", ".npz"), ("steering-vectors", ".pt")):
            continue
        path = tmp_path / f"x{suffix}"
        write(make_vector(), path, next(f for f, ending in SUFFIXES.items() if ending == suffix))
        with pytest.raises(VectorFileError):
            read(path, format)


# What is not installed.


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        ("torch", lambda path: write(make_vector(), path, "steering-vectors"), r"pip install 'mien\[hf\]'"),
        ("safetensors", lambda path: write(make_vector(), path, "safetensors"), r"pip install 'mien\[hf\]'"),
        ("safetensors", lambda path: read(path.parent, "safetensors"), r"pip install 'mien\[hf\]'"),
        ("repeng", lambda path: interchange.to_repeng(make_vector()), "pip install repeng$"),
        (
            "steering_vectors",
            lambda path: interchange.to_steering_vectors(make_vector()),
            "pip install steering-vectors$",
        ),
    ],
)
def test_what_is_missing_is_named(
    module: str, call: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if module == "safetensors":
        monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingExtra, match=message):
        call(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# A whole pack.


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    (tmp_path / "source").mkdir()
    return make_pack(tmp_path / "source")


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_pack_is_exported_as_a_file_a_vector(pack: Pack, format: str, tmp_path: Path) -> None:
    target = exporting.export(pack, tmp_path / "deep" / "out", format)
    assert [path.name for path in sorted(target.iterdir())] == [
        f"anger{SUFFIXES[format]}",
        f"joy{SUFFIXES[format]}",
    ]
    for path in target.iterdir():
        found = read(path, model=pack.fingerprint)
        assert same_bits(found.vector.rows, pack.load(found.vector.name).rows)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_export_is_replaced_by_force_and_only_an_export(pack: Pack, tmp_path: Path) -> None:
    target = exporting.export(pack, tmp_path / "out", "npz")
    (target / "joy.npz").write_bytes(b"old")
    with pytest.raises(PackError, match=r"it already exists\. Use --force"):
        exporting.export(pack, target, "npz")
    assert (target / "joy.npz").read_bytes() == b"old"
    exporting.export(pack, target, "npz", force=True)
    assert (target / "joy.npz").read_bytes() != b"old"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match=r"notes\.txt is no vector of an earlier export"):
        exporting.export(pack, target, "npz", force=True)
    with pytest.raises(PackError, match="expected a folder of an earlier export"):
        exporting.export(pack, target / "notes.txt", "npz", force=True)
    assert (target / "notes.txt").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = exporting.export(pack, tmp_path / "out", "npz")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    rename = exporting.os.rename

    def fail(source: Path, destination: Path) -> None:
        if source.name == "new":
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(exporting.os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        exporting.export(pack, target, "npz", force=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingExtra):
        exporting.export(pack, tmp_path / "other", "safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_pack_that_is_not_as_its_manifest_says_is_not_exported(pack: Pack, tmp_path: Path) -> None:
    (pack.path / "joy.gguf").write_bytes(b"GGUF")
    with pytest.raises(PackError, match="SHA-256"):
        exporting.export(pack, tmp_path / "out", "npz")
    assert not (tmp_path / "out").exists()


# The factor.


def test_a_factor_is_baked_in_with_what_still_holds() -> None:
    meta: dict[str, Any] = {"strength": [1.0, 2.0], "calibration.dose": [1.0], "scale": 0.5, "kind": "trait"}
    vector = make_vector(meta=meta)
    found = interchange.rescaled(vector, -2.0)
    assert same_bits(found.rows, vector.rows * np.float32(-2))
    assert dict(found.meta) == {"strength": [2.0, 4.0], "scale": -1.0, "kind": "trait"}
    assert (found.name, found.fingerprint) == (vector.name, vector.fingerprint)
    with pytest.raises(VectorError, match="not finite"):
        interchange.rescaled(vector, float("nan"))


# The command line.


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_import_says_what_it_decided_on_stderr(here: Path) -> None:
    rows = rows_of(0, 1, 2)
    write_gguf(here / "happy.gguf", rows, "mistral")
    found = invoke("import", "happy.gguf", "--out", "out")
    assert found.exit_code == 0
    assert found.stdout == "out/happy.gguf: <Vector happy: 2 layers (1-2) x 5>, llama.cpp, for llama\n"
    notes = found.stderr.splitlines()
    assert notes[0].startswith("happy.gguf: the file does not say who wrote it")
    assert notes[1].startswith("happy.gguf: row 0 was dropped")
    assert len(notes) == 2
    made = vectorfile.load(here / "out" / "happy.gguf")
    assert_rows(made, {1: rows[1], 2: rows[2]})


def test_import_gives_json(here: Path) -> None:
    write_gguf(here / "happy.gguf", rows_of(1, 2, 3))
    arguments = ["--from", "llama.cpp-generator", "--shift", "-1", "--scale", "0.5", "--name", "glad"]
    found = invoke("import", "happy.gguf", *arguments, "--out", "out", "--json")
    (data,) = json.loads(found.stdout)
    assert data["name"] == "glad"
    assert data["file"] == "out/glad.gguf"
    assert data["format"] == "llama.cpp-generator"
    assert (data["architecture"], data["n_embd"], data["layers"]) == ("llama", 5, [1, 2])
    assert data["meta"]["captured_at"] == "output of the same block"
    assert data["meta"]["scale"] == 0.5
    assert [f"happy.gguf: {note}" for note in data["notes"]] == found.stderr.splitlines()
    assert_rows(
        vectorfile.load(here / "out" / "glad.gguf"),
        {k - 1: v / 2 for k, v in rows_of(1, 2, 3).items() if k > 1},
    )


def test_import_takes_several_files_and_a_model(here: Path) -> None:
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 5}'
    )
    write_npz(here / "calm-v2.npz", layer_1=ONES)
    torch.save({5: torch.ones(5)}, here / "glad.pt")
    found = invoke("import", "calm-v2.npz", "glad.pt", "--model", "model", "--json")
    assert [row["file"] for row in json.loads(found.stdout)] == ["calm_v2.gguf", "glad.gguf"]
    assert "'calm-v2' can't be written in a recipe: it was named calm_v2" in found.stderr
    assert vectorfile.load(here / "glad.gguf").fingerprint == Fingerprint("llama", 6, 5, name="model")
    assert (
        "calm_v2" in invoke("pack", "build", ".", "--name", "a", "--version", "1", "--licence", "MIT").stdout
    )


def test_import_keeps_the_last_row_when_asked(here: Path) -> None:
    write_gguf(here / "happy.gguf", rows_of(1, 2))
    found = invoke("import", "happy.gguf", "--from", "repeng", "--keep-last", "--out", "out", "--json")
    assert json.loads(found.stdout)[0]["layers"] == [1, 2]
    found = invoke("import", "happy.gguf", "--from", "repeng", "--out", "out", "--force", "--json")
    assert json.loads(found.stdout)[0]["layers"] == [1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["happy.gguf"], 2, ["happy.gguf already exists", "--force"]),
        (["happy.gguf", "rows.npz", "--name", "x"], 2, ["--name goes with one FILE"]),
        (["happy.gguf", "--name", "x-y"], 2, ["can't be written in a recipe"]),
        (["happy.gguf", "sub/happy.gguf", "-o", "out"], 2, ["both become out/happy.gguf"]),
        (["happy.gguf", "--from", "onnx"], 2, ["onnx"]),
        (["rows.npz"], 1, ["rows.npz: it does not say", "--model", "--architecture"]),
        (["happy.gguf", "rows.npz", "-o", "out"], 1, ["rows.npz: it does not say"]),
        (["nothing.gguf"], 3, ["nothing.gguf: can't be read"]),
        (["evil.pt"], 4, ["evil.pt, data.pkl, byte 2: refused: it names 'os.system'"]),
        (["happy.gguf", "--model", "nothing"], 3, ["nothing: there is no such file"]),
        (["happy.gguf", "--model", "happy.gguf"], 4, ["expected a model, got a vector"]),
        (["happy.gguf", "-o", "out", "--scale", "1e39"], 1, ["NaN or infinity"]),
        (["happy.gguf", "-o", "out", "--shift", "-9"], 4, ["no row is left"]),
    ],
)
def test_import_refuses(arguments: list[str], code: int, words: list[str], here: Path) -> None:
    (here / "sub").mkdir()
    write_gguf(here / "happy.gguf", rows_of(1))
    write_gguf(here / "sub" / "happy.gguf", rows_of(1))
    write_npz(here / "rows.npz", layer_1=ONES)
    zipped(here / "evil.pt", HOSTILE["os.system"][0])
    before = sorted(here.rglob("*"))
    found = invoke("import", *arguments)
    assert found.exit_code == code, found.stderr
    assert found.stdout == ""
    for word in words:
        assert word in found.stderr
    assert sorted(here.rglob("*")) == before


def test_a_name_in_a_file_leads_nowhere_else(here: Path) -> None:
    make_vector("../../etc/joy").save(here / "x.gguf")
    found = invoke("import", "x.gguf", "--out", "out", "--json")
    assert json.loads(found.stdout)[0]["file"] == "out/______etc_joy.gguf"


def test_import_knows_every_format() -> None:
    from mien.cli import exchanging

    assert exchanging.FORMATS == FORMATS
    parameters = {parameter.name: parameter for parameter in cli.commands["pack"].commands["export"].params}
    assert set(parameters["format"].type.choices) == {"zip", *SUFFIXES}


def test_pack_export_writes_for_other_programs(here: Path) -> None:
    (here / "source").mkdir()
    make_pack(here / "source")
    found = invoke("pack", "export", "source", "--format", "repeng")
    assert found.stdout == "tiny-repeng\n"
    assert read(here / "tiny-repeng" / "joy.gguf").format == "mien"
    again = invoke("pack", "export", "source", "--format", "repeng")
    assert again.exit_code == 4
    assert "tiny-repeng: it already exists" in again.stderr
    data = json.loads(invoke("pack", "export", "source", "--format", "repeng", "--force", "--json").stdout)
    assert data == {
        "name": "tiny",
        "version": "1.0",
        "format": "repeng",
        "file": "tiny-repeng",
        "files": ["tiny-repeng/anger.gguf", "tiny-repeng/joy.gguf"],
    }
    assert invoke("pack", "export", "source").stdout == "tiny-1.0.zip\n"


@pytest.mark.parametrize("module", ["torch", "safetensors"])
def test_a_missing_extra_is_one_message(module: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "source").mkdir()
    make_pack(here / "source")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    format = "steering-vectors" if module == "torch" else "safetensors"
    found = invoke("pack", "export", "source", "--format", format)
    assert found.exit_code == 6
    assert found.stderr == f"MissingExtra: {module} is not installed: pip install 'mien[hf]'\n"
    assert [path.name for path in here.iterdir()] == ["source"]
