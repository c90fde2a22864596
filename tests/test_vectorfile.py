from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from makers import MODEL, make_vector, same_bits
from mien import vectorfile
from mien.errors import VectorError, VectorFileError
from mien.fingerprint import Fingerprint
from mien.vector import Vector

# Every kind of value that metadata may have; floats in a list are float32 in the file.
META: dict[str, Any] = {
    "kind": "emotion",
    "positive": "full of joy",
    "samples": 240,
    "below": -3,
    "scale": 0.1,
    "checked": True,
    "unchecked": False,
    "strength": [0.5, 0.25],
    "calibration.dose": [0.5, 1.0, 1.5],
    "calibration.repeats": [1, 2, 3],
    "words": ["glad", "fröhlich", ""],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "joy.gguf"


def assert_same(a: Vector, b: Vector) -> None:
    assert (a.name, a.layers, a.fingerprint, a.model_hint) == (b.name, b.layers, b.fingerprint, b.model_hint)
    assert same_bits(a.rows, b.rows)
    assert dict(a.meta) == dict(b.meta)


# What is written.


@pytest.mark.parametrize(
    "vector",
    [
        make_vector(meta=META),
        make_vector("one", layers=(5,)),
        make_vector("freude_größer", layers=(1, 3, 4), seed=3),
        make_vector(fingerprint=None, model_hint="gemma3", layers=(1, 500, 9999)),
        make_vector(fingerprint=Fingerprint("llama", 6, 5)),
        Vector("tiny", (1,), np.array([[1e-45, -0.0, 3.4e38]], dtype=np.float32), model_hint="llama"),
    ],
    ids=lambda vector: vector.name,
)
def test_a_vector_comes_back_as_it_was(vector: Vector, path: Path) -> None:
    vector.save(path)
    assert_same(vectorfile.load(path), vector)
    again = path.with_name("again.gguf")
    vectorfile.load(path).save(str(again))
    assert again.read_bytes() == path.read_bytes()


def test_a_file_holds_what_the_format_says_and_nothing_else(path: Path) -> None:
    vector = make_vector(layers=(1, 4), meta=META)
    vector.save(path)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
        "mien.name": "joy",
        "mien.model.architecture": "llama",
        "mien.model.n_layer": 6,
        "mien.model.n_embd": 5,
        "mien.model.vocabulary": "ab" * 32,
        "mien.model.name": "tiny",
        **{f"mien.{key}": value for key, value in META.items()},
    }
    kinds = gguf.GGUFValueType
    assert reader.fields["controlvector.model_hint"].types == [kinds.STRING]
    assert reader.fields["controlvector.layer_count"].types == [kinds.UINT32]
    assert reader.fields["mien.checked"].types == [kinds.BOOL]
    assert reader.fields["mien.samples"].types == [kinds.INT64]
    assert reader.fields["mien.scale"].types == [kinds.FLOAT64]
    assert reader.fields["mien.strength"].types == [kinds.ARRAY, kinds.FLOAT32]
    assert [(t.name, t.tensor_type.name, list(t.shape)) for t in reader.tensors] == [
        ("direction.1", "F32", [5]),
        ("direction.4", "F32", [5]),
    ]
    for tensor, row in zip(reader.tensors, vector.rows):
        assert same_bits(np.array(tensor.data), row)


def test_the_bytes_are_these(path: Path) -> None:
    rows = np.array([[1.0, -2.0], [0.5, 0.0]], dtype=np.float32)
    golden = Vector(
        "joy", (1, 3), rows, Fingerprint("llama", 4, 2, "ab" * 32, "tiny"), meta={"kind": "emotion"}
    )
    golden.save(path)
    assert (
        hashlib.sha256(path.read_bytes()).hexdigest()
        == "3a7212ba91b61b06b8c84b0b85ad159df518783a8b5c80d719838ebd84fda76c"
    )


def test_metadata_is_written_in_one_order(path: Path) -> None:
    forwards, backwards = make_vector(meta=META), make_vector(meta=dict(reversed(META.items())))
    forwards.save(path)
    first = path.read_bytes()
    backwards.save(path)
    assert path.read_bytes() == first


def test_missing_folders_are_made(tmp_path: Path) -> None:
    make_vector().save(tmp_path / "a" / "b" / "joy.gguf")
    assert_same(vectorfile.load(tmp_path / "a" / "b" / "joy.gguf"), make_vector())


def test_a_vector_of_no_known_architecture_is_not_written(path: Path) -> None:
    with pytest.raises(
        VectorError, match=r"^joy: the model's architecture is not known, and the format needs it$"
    ):
        make_vector(fingerprint=None).save(path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("stage", ["write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_vector().save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, stage, fail)
    with pytest.raises(VectorFileError, match="No space left"):
        make_vector(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_metadata_that_can_not_be_written_leaves_no_file(path: Path) -> None:
    with pytest.raises(TypeError):
        make_vector(meta={"odd": object()}).save(path)  # type: ignore[dict-item]
    assert not list(path.parent.iterdir())


# What is read. The files below are made by hand, so that the reader is not tested against the writer.

F32, F16, BF16 = 0, 1, 30
UINT32, STRING, ARRAY, INT64, FLOAT64 = 4, 8, 9, 11, 12


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key: str, value: str | int | float) -> bytes:
    if isinstance(value, str):
        return text(key) + struct.pack("<I", STRING) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<Iq", INT64, value)
    return text(key) + struct.pack("<Id", FLOAT64, value)


def tensor_info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_file(
    fields: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, bytes]], version: int = 3
) -> bytes:
    """A GGUF file byte by byte: fields as from `field`; tensors as (name, dims, type number, data)."""
    infos, data = b"", b""
    for name, dims, kind, values in tensors:
        infos += tensor_info(name, dims, kind, len(data))
        data += values + b"\0" * (-len(values) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields) + infos
    return head + b"\0" * (-len(head) % 32) + data


CONTROL = field("general.architecture", "controlvector")
HEAD = [CONTROL, field("controlvector.model_hint", "llama")]
ROW = np.arange(1, 5, dtype=np.float32).tobytes()
GOOD = ("direction.1", (4,), F32, ROW)


def model(**changes: str | int | float) -> list[bytes]:
    """The head with a fingerprint in which `changes` are made."""
    keys = {"architecture": "llama", "n_layer": 4, "n_embd": 4, "vocabulary": "", "name": "", **changes}
    return HEAD + [field(f"mien.model.{key}", value) for key, value in keys.items()]


def without(key: str) -> list[bytes]:
    return [one for one in model() if text(f"mien.model.{key}") not in one]


def values(*numbers: float) -> bytes:
    return np.array(numbers, dtype=np.float32).tobytes()


def test_the_smallest_file_is_read(path: Path) -> None:
    path.write_bytes(gguf_file([CONTROL], [GOOD]))
    vector = vectorfile.load(path)
    assert (vector.name, vector.layers, vector.fingerprint, vector.model_hint) == ("joy", (1,), None, "")
    assert same_bits(vector.rows, np.array([[1, 2, 3, 4]], dtype=np.float32))
    assert not vector.meta


def test_directions_are_sorted_by_layer(path: Path) -> None:
    names = ["direction.10", "direction.2", "direction.1"]
    path.write_bytes(gguf_file(HEAD, [(name, (1,), F32, values(i)) for i, name in enumerate(names)]))
    vector = vectorfile.load(path)
    assert vector.layers == (1, 2, 10)
    assert vector.rows.ravel().tolist() == [2, 1, 0]


OTHER_NAME = "expected only tensors named direction.N with N from 1: llama.cpp refuses the file"

BROKEN: dict[str, tuple[bytes, str, str]] = {
    # id: (the file, where, the problem)
    "empty": (b"", "", "not a GGUF file: it starts with b'', expected b'GGUF'"),
    "not GGUF": (
        b"PK\x03\x04" + bytes(100),
        "",
        "not a GGUF file: it starts with b'PK\\x03\\x04', expected b'GGUF'",
    ),
    "magic alone": (b"GGUF", "", "broken or cut short at 4 bytes"),
    "version 1": (gguf_file(HEAD, [GOOD], version=1), "", "version 1 which we cannot handle"),
    "a model": (
        gguf_file([field("general.architecture", "llama")], [GOOD]),
        "general.architecture",
        "expected a control vector, got a GGUF file of architecture 'llama'",
    ),
    "no architecture": (
        gguf_file([], [GOOD]),
        "general.architecture",
        "expected a control vector, got a GGUF file of architecture None",
    ),
    "architecture a number": (
        gguf_file([field("general.architecture", 7)], [GOOD]),
        "general.architecture",
        "7",
    ),
    "hint a number": (
        gguf_file([CONTROL, field("controlvector.model_hint", 7)], [GOOD]),
        "controlvector.model_hint",
        "expected text, got 7",
    ),
    "no tensors": (gguf_file(HEAD, []), "", "there is no tensor named direction.N in it"),
    "layer 0": (gguf_file(HEAD, [("direction.0", (4,), F32, ROW)]), "direction.0", OTHER_NAME),
    "layer x": (gguf_file(HEAD, [("direction.x", (4,), F32, ROW)]), "direction.x", OTHER_NAME),
    "layer 01": (gguf_file(HEAD, [("direction.01", (4,), F32, ROW)]), "direction.01", OTHER_NAME),
    "layer -1": (gguf_file(HEAD, [("direction.-1", (4,), F32, ROW)]), "direction.-1", OTHER_NAME),
    "layer 10000": (gguf_file(HEAD, [("direction.10000", (4,), F32, ROW)]), "direction.10000", OTHER_NAME),
    "arabic layer": (gguf_file(HEAD, [("direction.\u0661", (4,), F32, ROW)]), "direction.\u0661", OTHER_NAME),
    "trailing text": (gguf_file(HEAD, [("direction.1\n", (4,), F32, ROW)]), "direction.1\n", OTHER_NAME),
    "another tensor": (
        gguf_file(HEAD, [GOOD, ("output.weight", (4,), F32, ROW)]),
        "output.weight",
        OTHER_NAME,
    ),
    "one twice": (gguf_file(HEAD, [GOOD, GOOD]), "", "duplicated tensor with name direction.1"),
    "F16": (gguf_file(HEAD, [("direction.1", (8,), F16, ROW)]), "direction.1", "expected type F32, got F16"),
    "BF16": (
        gguf_file(HEAD, [("direction.1", (8,), BF16, ROW)]),
        "direction.1",
        "expected type F32, got BF16",
    ),
    "unknown type": (
        gguf_file(HEAD, [("direction.1", (4,), 999, ROW)]),
        "",
        "is not a valid GGMLQuantizationType",
    ),
    "2-D": (
        gguf_file(HEAD, [("direction.1", (4, 1), F32, ROW)]),
        "direction.1",
        "expected one dimension, got 2",
    ),
    "0-D": (gguf_file(HEAD, [("direction.1", (), F32, ROW)]), "direction.1", "expected one dimension, got 0"),
    "no values": (gguf_file(HEAD, [("direction.1", (0,), F32, b"")]), "direction.1", "it is empty"),
    "rows of different lengths": (
        gguf_file(HEAD, [("direction.2", (3,), F32, ROW[:12]), GOOD]),
        "direction.2",
        "expected 4 values, got 3",
    ),
    "NaN": (
        gguf_file(HEAD, [GOOD, ("direction.2", (4,), F32, values(1, 2, np.nan, 4))]),
        "direction.2",
        "value 2 is nan; every value must be finite",
    ),
    "infinity": (
        gguf_file(HEAD, [("direction.1", (2,), F32, values(-np.inf, 1))]),
        "direction.1",
        "value 0 is -inf; every value must be finite",
    ),
    "layer beyond the model": (
        gguf_file(model(), [("direction.4", (4,), F32, ROW)]),
        "",
        "4 values at layers up to 4 can't belong to llama (llama, 4 layers, n_embd 4)",
    ),
    "width of another model": (
        gguf_file(model(n_embd=5), [GOOD]),
        "",
        "4 values at layers up to 1 can't belong to",
    ),
    "architecture of the model a number": (
        gguf_file(model(architecture=1), [GOOD]),
        "",
        "architecture: expected str",
    ),
    "n_layer a text": (gguf_file(model(n_layer="4"), [GOOD]), "", "n_layer: expected int, got '4'"),
    "n_embd a float": (gguf_file(model(n_embd=4.0), [GOOD]), "", "n_embd: expected int, got 4.0"),
    "n_layer zero": (gguf_file(model(n_layer=0), [GOOD]), "", "n_layer: expected a positive number, got 0"),
    "n_layer huge": (gguf_file(model(n_layer=1 << 40), [GOOD]), "", "n_layer: expected a positive number"),
    "vocabulary a number": (gguf_file(model(vocabulary=3), [GOOD]), "", "vocabulary: expected str, got 3"),
    "half a fingerprint": (gguf_file(without("n_embd"), [GOOD]), "", "n_embd: expected int, got None"),
    "one key twice": (gguf_file([CONTROL, CONTROL], [GOOD]), "", "Duplicate general.architecture"),
    "text that is not UTF-8": (
        gguf_file([CONTROL, text("mien.kind") + struct.pack("<IQ", STRING, 2) + b"\xff\xfe"], [GOOD]),
        "",
        "the metadata is broken",
    ),
    "tensor name not UTF-8": (
        gguf_file(HEAD, [GOOD]).replace(b"direction.1", b"direction.\xff"),
        "",
        "broken or cut",
    ),
    "unknown kind of value": (
        gguf_file([CONTROL, text("mien.kind") + struct.pack("<I", 99)], [GOOD]),
        "",
        "broken or cut short",
    ),
    "endless array": (
        gguf_file([CONTROL, text("mien.a") + struct.pack("<IIQ", ARRAY, UINT32, 1 << 50)], [GOOD]),
        "",
        "expected at least",
    ),
    "endless nesting": (
        gguf_file(
            [CONTROL, text("mien.a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000], [GOOD]
        ),
        "",
        "RecursionError",
    ),
    "endless text": (
        gguf_file([CONTROL, text("mien.a") + struct.pack("<IQ", STRING, 1 << 62)], [GOOD]),
        "",
        "expected at least",
    ),
    "more keys than there are": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60) + gguf_file(HEAD, [GOOD])[24:],
        "",
        "broken or cut short",
    ),
    "more tensors than there are": (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 2) + gguf_file(HEAD, [GOOD])[24:],
        "",
        "broken or cut short",
    ),
    "more values than there are": (
        gguf_file(HEAD, [("direction.1", (1 << 40,), F32, ROW)]),
        "",
        "expected at least",
    ),
    "an offset that wraps around": (
        gguf_file(HEAD, [GOOD]).replace(
            tensor_info("direction.1", (4,), F32, 0), tensor_info("direction.1", (4,), F32, (1 << 64) - 64)
        ),
        "",
        "broken or cut short",
    ),
}


@pytest.mark.parametrize(("data", "where", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(data: bytes, where: str, problem: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(VectorFileError) as caught:
        vectorfile.load(path)
    error = caught.value
    assert problem in error.problem
    assert (error.path, error.where) == (str(path), where)
    assert str(error) == f"{path}{', ' + where if where else ''}: {error.problem}"


@pytest.mark.parametrize(
    ("make", "problem"),
    [(lambda path: None, "No such file or directory"), (lambda path: path.mkdir(), "Is a directory")],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], problem: str, path: Path) -> None:
    make(path)
    with pytest.raises(VectorFileError) as caught:
        vectorfile.load(path)
    assert str(caught.value) == f"{path}: can't be read ({problem})"


@pytest.mark.parametrize(("n_layer", "n_embd", "step"), [(3, 8, 5), (30, 576, 4096)])
def test_a_file_cut_short_is_refused_wherever_it_ends(
    n_layer: int, n_embd: int, step: int, path: Path
) -> None:
    fingerprint = Fingerprint("llama", n_layer, n_embd, "ab" * 32)
    make_vector(layers=range(1, n_layer), fingerprint=fingerprint, meta=META).save(path)
    data = path.read_bytes()
    for size in range(0, len(data), step):
        path.write_bytes(data[:size])
        with pytest.raises(VectorFileError):
            vectorfile.load(path)
    path.write_bytes(data)
    assert vectorfile.load(path).n_embd == n_embd


def test_a_file_with_flipped_bits_is_finite_or_refused(path: Path) -> None:
    make_vector(layers=range(1, MODEL.n_layer), meta=META).save(path)
    data = path.read_bytes()
    dice = random.Random(7)
    refused = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(dice.choice([1, 1, 3])):
            broken[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(broken)
        try:
            vector = vectorfile.load(path)
        except VectorFileError:
            refused += 1
        else:
            assert np.isfinite(vector.rows).all()
    assert 50 < refused < 300


def test_a_place_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "joy.gguf"):
        with pytest.raises(VectorFileError, match="can't be written"):
            make_vector().save(path)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "folder"]
