from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from makers import MODEL, make_vector, same_bits
from mien import exporting, foreign, interchange, vectorfile
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
    assert (a.site, a.digest) == (b.site, b.digest)
    assert same_bits(a.rows, b.rows)
    assert dict(a.meta) == dict(b.meta)


def sparse_vector(name: str = "sparse", **options: Any) -> Vector:
    """Of neurons, with layers of 0, 1, 4, 5 and 20 values that are not zero among 20; -0.0 is one."""
    rows = np.zeros((5, 20), dtype=np.float32)
    rows[1, 19] = -2.5
    rows[2, [0, 1, 7, 8]] = [1, -0.0, 1e-45, 3]
    rows[3, :5] = 1
    rows[4] = np.arange(1, 21)
    return Vector(name, (0, 1, 2, 3, 4), rows, site="neurons", **options)


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
        make_vector("probe", meta={"bias": [0.5, -2.0], "center": [1.0, 0.25]}),
        make_vector("subspace", rank=3, meta={"center": [0.5] * 6}),
        make_vector("flat", rank=7, layers=(2,), site="mlp"),
        make_vector("attention", layers=(0, 5), site="attention", meta=META),
        make_vector("heads", layers=(0, 1), site="heads", n_embd=12, meta={"head_dim": 4}),
        make_vector("neurons", layers=(0, 3), site="neurons", n_embd=40, rank=2),
        make_vector("dense", layers=(0, 3), site="neurons", n_embd=40),
        sparse_vector("sparse", fingerprint=MODEL),
        sparse_vector("stranger", model_hint="gemma3", meta={"kind": "trait"}),
        Vector("experts", (0, 9999), np.eye(4)[:2], model_hint="mixtral", site="experts"),
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


def read_file(path: Path) -> tuple[dict[str, Any], list[tuple[str, str, list[int]]]]:
    """(fields, tensors) as gguf has them; a shape's fastest dimension is first."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, [(t.name, t.tensor_type.name, list(map(int, t.shape))) for t in reader.tensors]


def test_a_file_of_miens_own_holds_what_the_format_says_and_nothing_else(path: Path) -> None:
    make_vector(layers=(1, 4), rank=3, meta={"kind": "trait", "site": "mlp", "center": [0.5] * 6}).save(path)
    fields, tensors = read_file(path)
    model = {f"mien.model.{key}": value for key, value in MODEL.as_dict().items()}
    assert fields == {
        "general.architecture": "mien-vector",
        "mien.name": "joy",
        "mien.site": "residual",
        "mien.width": 5,
        "mien.model_hint": "llama",
        "mien.kind": "trait",
        "mien.center": [0.5] * 6,
        **model,
    }
    assert tensors == [("residual.1", "F32", [5, 3]), ("residual.4", "F32", [5, 3])]


def test_few_values_of_neurons_are_written_as_a_pair(path: Path) -> None:
    vector = sparse_vector(model_hint="llama")
    vector.save(path)
    fields, tensors = read_file(path)
    assert (fields["mien.site"], fields["mien.width"]) == ("neurons", 20)
    assert tensors == [
        ("neurons.0", "F32", [20]),  # of nothing there is no pair
        ("neurons.1.index", "I32", [1]),
        ("neurons.1.value", "F32", [1]),
        ("neurons.2.index", "I32", [4]),
        ("neurons.2.value", "F32", [4]),
        ("neurons.3", "F32", [20]),
        ("neurons.4", "F32", [20]),
    ]
    data = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    assert data["neurons.2.index"].tolist() == [0, 1, 7, 8]
    assert same_bits(np.array(data["neurons.2.value"]), vector.rows[2, [0, 1, 7, 8]])


def test_no_other_site_is_written_as_pairs(path: Path) -> None:
    rows = np.zeros((1, 20), dtype=np.float32)
    rows[0, 3] = 1
    for site in ("attention", "mlp", "heads", "experts"):
        Vector("joy", (0,), rows, site=site, model_hint="llama").save(path)
        assert read_file(path)[1] == [(f"{site}.0", "F32", [20])]
    Vector("joy", (0,), rows.reshape(1, 2, 10), site="neurons", model_hint="llama").save(path)
    assert read_file(path)[1] == [("neurons.0", "F32", [10, 2])]


@pytest.mark.parametrize(
    ("golden", "digest"),
    [
        (
            Vector(
                "calm",
                (0, 2),
                np.array([[[1.0, -2.0], [0.5, 0.0]], [[0.25, 4.0], [-1.0, 8.0]]], dtype=np.float32),
                Fingerprint("llama", 4, 8, "ab" * 32, "tiny"),
                meta={"kind": "emotion", "bias": [1, 2.5]},
                site="heads",
            ),
            "2c8eb448f02312294e1bd2179f86780bd3f4896042c8ca5a9b91cb58fd48a303",
        ),
        (
            sparse_vector(fingerprint=Fingerprint("llama", 5, 2, "ab" * 32, "tiny")),
            "2d3e598298afed84ae0f9de2729a1ad73ea377f0a95a847713633dbde1802021",
        ),
    ],
    ids=["heads", "sparse"],
)
def test_the_bytes_of_miens_own_file_are_these(golden: Vector, digest: str, path: Path) -> None:
    golden.save(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_what_metadata_says_of_the_site_is_true(path: Path) -> None:
    make_vector(meta={"site": "heads"}).save(path)
    assert vectorfile.load(path).meta["site"] == "residual"
    make_vector(meta={"site": "heads", "width": "wide", "model_hint": 3}, site="mlp").save(path)
    assert_same(vectorfile.load(path), make_vector(site="mlp"))


def test_a_key_is_documented_for_all_that_mien_writes() -> None:
    known = {key for key in vectorfile.KEYS if not key.endswith(".*")}
    assert {"name", "site", "width", "model_hint", "bias", "center", "head_dim", "stream_norm"} <= known


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


@pytest.mark.parametrize(
    ("vector", "what"),
    [
        (make_vector(rank=2), "2 directions a layer of the residual stream"),
        (make_vector(site="mlp"), "one direction a layer of mlp"),
        (sparse_vector(fingerprint=MODEL), "one direction a layer of neurons"),
        (make_vector(site="heads", rank=3), "3 directions a layer of heads"),
    ],
)
def test_other_programs_are_not_given_what_they_can_not_hold(
    vector: Vector, what: str, path: Path, tmp_path: Path
) -> None:
    problem = (
        f"llama.cpp's control vectors have one direction a layer of the residual stream; this one is {what}"
    )
    for format, suffix in exporting.SUFFIXES.items():
        with pytest.raises(VectorError) as caught:
            exporting.write(vector, tmp_path / f"x{suffix}", format)
        assert str(caught.value) == f"{vector.name}: {problem}"
    assert not list(tmp_path.iterdir())
    vector.save(path)
    for read in (interchange.read, foreign.read_gguf):
        with pytest.raises(VectorFileError) as refused:
            read(path)
        assert str(refused.value) == f"{path}: {problem}"


# What is read. The files below are made by hand, so that the reader is not tested against the writer.

F32, F16, BF16 = 0, 1, 30
UINT32, FLOAT32, STRING, ARRAY, UINT64, INT64, FLOAT64 = 4, 6, 8, 9, 10, 11, 12
I32 = 26


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


def own(site: str | int = "neurons", width: str | int | float = 4, *more: bytes) -> list[bytes]:
    """The head of a file of mien's own."""
    kind = field("general.architecture", "mien-vector")
    return [kind, field("mien.site", site), field("mien.width", width), *more]


def index(*numbers: int) -> bytes:
    return np.array(numbers, dtype=np.int32).tobytes()


def sparse(at: bytes, held: bytes, layer: int = 2) -> list[tuple[str, tuple[int, ...], int, bytes]]:
    """The two tensors of a sparse layer."""
    return [
        (f"neurons.{layer}.index", (len(at) // 4,), I32, at),
        (f"neurons.{layer}.value", (len(held) // 4,), F32, held),
    ]


def array(key: str, kind: int, layout: str, *numbers: float) -> bytes:
    return text(key) + struct.pack(f"<IIQ{len(numbers)}{layout}", ARRAY, kind, len(numbers), *numbers)


def test_the_smallest_file_of_miens_own_is_read(path: Path) -> None:
    path.write_bytes(gguf_file(own("experts"), [("experts.0", (4,), F32, ROW)]))
    vector = vectorfile.load(path)
    assert (vector.name, vector.layers, vector.fingerprint, vector.model_hint) == ("joy", (0,), None, "")
    assert (vector.site, dict(vector.meta)) == ("experts", {})
    assert same_bits(vector.rows, np.array([[1, 2, 3, 4]], dtype=np.float32))


def test_a_subspace_is_read_direction_by_direction(path: Path) -> None:
    path.write_bytes(gguf_file(own("residual", 2), [("residual.3", (2, 2), F32, ROW)]))
    assert vectorfile.load(path).rows.tolist() == [[[1, 2], [3, 4]]]


def test_a_pair_may_hold_as_many_values_as_it_likes(path: Path) -> None:
    pair = sparse(index(0, 1, 2, 3), values(0, 1, 2, -0.0))
    path.write_bytes(
        gguf_file(own(), [*pair, ("neurons.0", (4,), F32, ROW), *sparse(index(3), values(9), 10)])
    )
    vector = vectorfile.load(path)
    assert vector.layers == (0, 2, 10)
    assert same_bits(vector.rows[1:], np.array([[0, 1, 2, -0.0], [0, 0, 0, 9]], dtype=np.float32))


OTHER_NAME = "expected only tensors named direction.N with N from 1: llama.cpp refuses the file"

ONLY_NEURONS = (
    "expected only tensors named neurons.N with N from 0, neurons.N.index and neurons.N.value, as mien.site "
    "says"
)
ONLY_HEADS = "expected only tensors named heads.N with N from 0, as mien.site says"
NOT_POSITIVE = "expected a positive number, got"
ASCENDING = "expected numbers that ascend from 0 to at most 3"
UNWRITABLE = "expected numbers of 64 bits, in arrays of one kind and 32"
NEURON = ("neurons.2", (4,), F32, ROW)
A_HEAD = ("heads.1", (4,), F32, ROW)

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


BROKEN |= {
    "control vector of another site": (
        gguf_file([*HEAD, field("mien.site", "mlp")], [GOOD]),
        "mien.site",
        "expected residual, got 'mlp'",
    ),
    "name a number": (gguf_file([*HEAD, field("mien.name", 7)], [GOOD]), "mien.name", "expected text, got 7"),
    "a bias too few": (
        gguf_file([*HEAD, array("mien.bias", FLOAT32, "f", 1, 2)], [GOOD]),
        "",
        "joy: bias: expected 1 finite numbers",
    ),
    "a center of NaN": (
        gguf_file([*HEAD, array("mien.center", FLOAT64, "d", np.nan)], [GOOD]),
        "",
        "joy: center: expected 1 finite numbers",
    ),
    "a center that is no list": (
        gguf_file([*HEAD, field("mien.center", 1.0)], [GOOD]),
        "",
        "joy: center: expected 1 finite numbers",
    ),
    "a number beyond 64 bits": (
        gguf_file([*HEAD, text("mien.samples") + struct.pack("<IQ", UINT64, 1 << 63)], [GOOD]),
        "mien.samples",
        UNWRITABLE,
    ),
    "numbers beyond 32 bits": (
        gguf_file([*HEAD, array("mien.samples", INT64, "q", 1, 1 << 31)], [GOOD]),
        "mien.samples",
        UNWRITABLE,
    ),
    "floats beyond float32": (
        gguf_file([*HEAD, array("mien.strength", FLOAT64, "d", 1e39)], [GOOD]),
        "mien.strength",
        UNWRITABLE,
    ),
    "no site": (
        gguf_file([field("general.architecture", "mien-vector")], [NEURON]),
        "mien.site",
        "expected text, got None",
    ),
    "site a number": (gguf_file(own(7), [NEURON]), "mien.site", "expected text, got 7"),
    "site unknown": (
        gguf_file(own("queries"), [NEURON]),
        "mien.site",
        "expected one of residual, attention, mlp, heads, neurons, experts, got 'queries'",
    ),
    "no width": (gguf_file(own()[:2], [NEURON]), "mien.width", f"{NOT_POSITIVE} None"),
    "width zero": (gguf_file(own(width=0), [NEURON]), "mien.width", f"{NOT_POSITIVE} 0"),
    "width negative": (gguf_file(own(width=-4), [NEURON]), "mien.width", f"{NOT_POSITIVE} -4"),
    "width a text": (gguf_file(own(width="4"), [NEURON]), "mien.width", f"{NOT_POSITIVE} '4'"),
    "width a float": (gguf_file(own(width=4.0), [NEURON]), "mien.width", f"{NOT_POSITIVE} 4.0"),
    "width huge": (gguf_file(own(width=1 << 40), [NEURON]), "mien.width", f"{NOT_POSITIVE} 1099511627776"),
    "width of another file": (
        gguf_file(own(width=5), [NEURON]),
        "neurons.2",
        "expected rows of 5 values, as mien.width says, got 4",
    ),
    "own hint a number": (
        gguf_file(own("neurons", 4, field("mien.model_hint", 7)), [NEURON]),
        "mien.model_hint",
        "expected text, got 7",
    ),
    "own file without tensors": (gguf_file(own(), []), "", "there is no tensor named neurons.N in it"),
    "direction in an own file": (gguf_file(own(), [NEURON, GOOD]), "direction.1", ONLY_NEURONS),
    "mixed sites": (gguf_file(own("heads"), [A_HEAD, NEURON]), "neurons.2", ONLY_HEADS),
    "pair of another site": (
        gguf_file(own("heads"), [("heads.1.index", (1,), I32, index(0)), A_HEAD]),
        "heads.1.index",
        ONLY_HEADS,
    ),
    "own layer -1": (gguf_file(own("heads"), [("heads.-1", (4,), F32, ROW)]), "heads.-1", ONLY_HEADS),
    "own layer 01": (gguf_file(own("heads"), [("heads.01", (4,), F32, ROW)]), "heads.01", ONLY_HEADS),
    "own layer 10000": (
        gguf_file(own("heads"), [("heads.10000", (4,), F32, ROW)]),
        "heads.10000",
        ONLY_HEADS,
    ),
    "own residual 0": (
        gguf_file(own("residual", 2), [("residual.0", (2, 2), F32, ROW)]),
        "residual.0",
        "expected only tensors named residual.N with N from 1, as mien.site says",
    ),
    "own of a control vector": (
        gguf_file(own("residual"), [("residual.1", (4,), F32, ROW)]),
        "residual.1",
        "expected several directions; one a layer of the residual stream is a control vector",
    ),
    "own F16": (
        gguf_file(own("heads"), [("heads.1", (4,), F16, ROW[:8])]),
        "heads.1",
        "expected type F32, got F16",
    ),
    "own 3-D": (
        gguf_file(own("heads", 2), [("heads.1", (2, 2, 1), F32, ROW)]),
        "heads.1",
        "expected one dimension or two, got 3",
    ),
    "own rank 1 in 2-D": (
        gguf_file(own("heads"), [("heads.1", (4, 1), F32, ROW)]),
        "heads.1",
        "expected one dimension for one direction, got 2",
    ),
    "own rank 0": (gguf_file(own("heads"), [("heads.1", (4, 0), F32, b"")]), "heads.1", "it is empty"),
    "own ranks that differ": (
        gguf_file(own("heads", 2), [("heads.3", (2,), F32, ROW[:8]), ("heads.1", (2, 2), F32, ROW)]),
        "heads.3",
        "expected shape (2, 2) as in heads.1, got (2,)",
    ),
    "own NaN": (
        gguf_file(own("heads", 2), [("heads.1", (2, 2), F32, values(1, 2, 3, np.nan))]),
        "heads.1",
        "value 3 is nan; every value must be finite",
    ),
    "own layer beyond the model": (
        gguf_file(own("heads", 4, *model()[2:]), [("heads.4", (4,), F32, ROW)]),
        "",
        "4 values at layers up to 4 can't belong to llama (llama, 4 layers, n_embd 4)",
    ),
    "no value": (
        gguf_file(own(), sparse(index(1), values(1))[:1]),
        "neurons.2.value",
        "it is missing, and its other half is there",
    ),
    "no index": (
        gguf_file(own(), sparse(index(1), values(1))[1:]),
        "neurons.2.index",
        "it is missing, and its other half is there",
    ),
    "whole and sparse": (
        gguf_file(own(), [NEURON, *sparse(index(1), values(1))]),
        "neurons.2",
        "it is there whole, and as index and value, too",
    ),
    "index twice": (gguf_file(own(), sparse(index(1, 1), values(1, 2))), "neurons.2.index", ASCENDING),
    "index falling": (gguf_file(own(), sparse(index(2, 1), values(1, 2))), "neurons.2.index", ASCENDING),
    "index negative": (gguf_file(own(), sparse(index(-1), values(1))), "neurons.2.index", ASCENDING),
    "index beyond": (gguf_file(own(), sparse(index(4), values(1))), "neurons.2.index", ASCENDING),
    "index of floats": (
        gguf_file(own(), [("neurons.2.index", (1,), F32, values(1)), sparse(index(1), values(1))[1]]),
        "neurons.2.index",
        "expected type I32, got F32",
    ),
    "index 2-D": (
        gguf_file(own(), [("neurons.2.index", (1, 1), I32, index(1)), sparse(index(1), values(1))[1]]),
        "neurons.2.index",
        "expected one dimension, got 2",
    ),
    "index of nothing": (gguf_file(own(), sparse(b"", b"")), "neurons.2.index", "it is empty"),
    "values of integers": (
        gguf_file(own(), [sparse(index(1), b"")[0], ("neurons.2.value", (1,), I32, index(1))]),
        "neurons.2.value",
        "expected type F32, got I32",
    ),
    "values too many": (
        gguf_file(own(), sparse(index(1), values(1, 2))),
        "neurons.2.value",
        "expected 1 values, one for each index, got 2",
    ),
    "values of NaN": (
        gguf_file(own(), sparse(index(1, 2), values(1, np.inf))),
        "neurons.2.value",
        "value 1 is inf; every value must be finite",
    ),
    "pairs that claim gigabytes": (
        gguf_file(own(width=1 << 22), [t for n in range(5) for t in sparse(index(1), values(1), n)]),
        "",
        "expected at most 16777216 values in all, got 5 x 4194304",
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
    assert vectorfile.load(path).width == n_embd


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


def test_a_file_of_miens_own_with_flipped_bits_is_finite_or_refused(path: Path) -> None:
    dice = random.Random(8)
    for vector in (sparse_vector(fingerprint=MODEL), make_vector(rank=3, meta=META)):
        vector.save(path)
        data = path.read_bytes()
        for _ in range(150):
            broken = bytearray(data)
            broken[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            path.write_bytes(broken)
            with suppress(VectorFileError):
                assert np.isfinite(vectorfile.load(path).rows).all()


def test_a_place_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "joy.gguf"):
        with pytest.raises(VectorFileError, match="can't be written"):
            make_vector().save(path)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["file", "folder"]
