"""Reading rows from files that other programs write: numbered as the file has it, checked, not placed.

    GGUF           tensors direction.N, one row each, N from 0
    torch          {N: tensor}, or a SteeringVector of steering-vectors; see torchfile.py
    npz            arrays named direction.N, layer_N, layers.N or N, one row each
    safetensors    tensors named so
    the last two   or one array of shape (rows, n_embd), numbered from 0; .npy is read too

What the numbers mean is for interchange.py to say.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from . import torchfile, vectorfile
from .errors import MienError, MissingExtra, VectorFileError
from .vector import Floats

MAX_BYTES = 512 << 20  # of a file, and of what is in it
ROUNDED = "values of float64 were rounded to float32"

Refuse: TypeAlias = Callable[[str, str], MienError]

_NAME = re.compile(r"(?:direction\.|layer_|layers\.)?(0|[1-9][0-9]{0,3})")
# What NumPy lets out when an .npy or .npz file lies about itself.
_BROKEN = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    RuntimeError,  # zipfile's word for an entry that is encrypted; nested without end is one, too
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Found:
    """What a file holds. rows: float32 of one length, by the file's own number. hint: the architecture
    it names, '' where it names none. notes: what became of the values.
    """

    rows: dict[int, Floats]
    hint: str = ""
    notes: tuple[str, ...] = ()


def container(path: Path) -> str:
    """'gguf', 'torch', 'npz' or 'safetensors', by what the file starts with.

    Raises VectorFileError where it is none of them or can't be read.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(b"GGUF"):
            return "gguf"
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):  # the latter is an empty one
            with zipfile.ZipFile(path) as archive:
                return "torch" if any(n.endswith("/data.pkl") for n in archive.namelist()) else "npz"
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise VectorFileError(path, f"can't be read ({error})") from error
    if start.startswith(b"\x93NUMPY"):
        return "npz"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return "safetensors"
    if start[:1] == b"\x80":
        raise VectorFileError(
            path, "a bare pickle is not read: loading one runs what it says. Save it with torch.save(...)"
        )
    raise VectorFileError(
        path,
        f"expected GGUF, a zip archive of torch.save or NumPy, or safetensors; it starts with {start[:4]!r}",
    )


def checked(found: Iterable[tuple[int, str, Any]], refuse: Refuse) -> tuple[dict[int, Floats], bool]:
    """{number: float32 row} of (number, name, array of n_embd floats) each, and whether any was rounded.

    A row may have dimensions of one around it. Raises what `refuse(problem, name)` gives for a number
    that is twice there, another type than floats, other shapes or lengths, NaN and infinity.
    """
    rows: dict[int, Floats] = {}
    rounded = False
    first = ""
    for number, name, values in found:
        array = np.asarray(values)
        if array.dtype.kind != "f":
            raise refuse(f"expected floats, got {array.dtype}", name)
        if array.ndim == 0 or array.size == 0 or array.size != array.shape[-1]:
            raise refuse(f"expected one row of n_embd values, got shape {array.shape}", name)
        if number in rows:
            raise refuse(f"expected one row for {number}, and there are two", name)
        with np.errstate(over="ignore"):
            row = array.reshape(-1).astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(row))
        if bad.size:
            value = array.reshape(-1)[bad[0]]
            raise refuse(f"value {bad[0]} is {value}; every value must be finite in float32", name)
        first = first or name
        length = next(iter(rows.values())).size if rows else row.size
        if row.size != length:
            raise refuse(f"expected {length} values as in {first}, got {row.size}", name)
        rounded = rounded or (array.dtype.itemsize > 4 and bool((row != array.reshape(-1)).any()))
        rows[number] = row
    return rows, rounded


def read_gguf(path: Path) -> tuple[Found, bool]:
    """The rows of a control vector, and whether it is mien's own: it has keys that start with `mien.`.

    Raises VectorFileError as `vectorfile.load` does; direction.0, and types of float other than F32,
    are read here.
    """
    reader = vectorfile.open_gguf(path)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields.get("general.architecture")
        if architecture == vectorfile.OWN:
            raise VectorFileError(path, vectorfile.why_own(vectorfile.load(path)))
        if architecture != vectorfile.CONTROL:
            raise VectorFileError(
                path, f"expected a control vector, got a GGUF file of architecture {architecture!r}"
            )
        rows = [_gguf_row(path, tensor) for tensor in reader.tensors]
    except vectorfile.BROKEN as error:
        raise VectorFileError(path, f"it is broken ({error})") from error
    hint = fields.get("controlvector.model_hint", "")
    if not isinstance(hint, str):
        raise VectorFileError(path, f"expected text, got {hint!r}", "controlvector.model_hint")
    own = any(name.startswith("mien.") for name in fields)
    return _found(path, rows, "direction.N", hint), own


def _gguf_row(path: Path, tensor: Any) -> tuple[int, str, Any]:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import dequantize

    match = re.fullmatch(r"direction\.(0|[1-9][0-9]{0,3})", tensor.name)
    if match is None:
        name = repr(tensor.name[:60])
        raise VectorFileError(path, "expected only tensors named direction.N, N from 0", name)
    if tensor.tensor_type not in (Kind.F32, Kind.F16, Kind.F64, Kind.BF16):
        raise VectorFileError(path, f"expected floats, got {tensor.tensor_type.name}", tensor.name)
    values = tensor.data
    if tensor.tensor_type == Kind.BF16:
        values = dequantize(values, Kind.BF16)
    return int(match.group(1)), tensor.name, values


def read_torch(path: Path) -> Found:
    """Of a SteeringVector, its attributes as a dict, {layer: tensor}, or one tensor of (rows, n_embd).

    Raises VectorFileError for anything else, for a layer type other than decoder_block, and as
    `torchfile.load` does.
    """
    value = torchfile.load(path)
    if isinstance(value, torchfile.Saved):
        value = value.state
    if isinstance(value, dict) and "layer_activations" in value:
        require_blocks(value.get("layer_type", "decoder_block"), lambda *at: VectorFileError(path, *at))
        value = value["layer_activations"]
    if isinstance(value, np.ndarray):
        return _table(path, "the tensor", value)
    if not isinstance(value, dict) or not all(isinstance(v, np.ndarray) for v in value.values()):
        raise VectorFileError(path, "expected a SteeringVector or {layer: tensor}, got something else")
    rows = [(_number(path, key), f"layer {key}", row) for key, row in value.items()]
    return _found(path, rows, "{layer: tensor}")


def require_blocks(layer_type: object, refuse: Refuse) -> None:
    """Raises what `refuse` gives for a SteeringVector that acts elsewhere than on a block's output."""
    if layer_type != "decoder_block":
        raise refuse(
            f"expected 'decoder_block', got {str(layer_type)[:40]!r}: that is another site, and a vector "
            f"file holds directions for the output of blocks",
            "layer_type",
        )


def read_npz(path: Path) -> Found:
    """Of an .npz or .npy file. Raises VectorFileError for what it may not hold; no object is unpickled."""
    try:
        _require_small(path, path.stat().st_size)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _require_small(path, sum(info.file_size for info in archive.infolist()))
        arrays = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            arrays = {"the array": arrays}
        found = [(name, np.asarray(arrays[name])) for name in arrays]
    except _BROKEN as error:
        raise VectorFileError(path, f"not readable as NumPy's ({error})") from error
    return _named(path, found)


def read_safetensors(path: Path) -> Found:
    """Of a safetensors file; its metadata may name the architecture.

    Raises VectorFileError for what it may not hold, MissingExtra where safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, deserialize
    except ModuleNotFoundError as error:
        raise MissingExtra("safetensors", "hf") from error
    try:
        _require_small(path, path.stat().st_size)
        data = path.read_bytes()
        tensors = deserialize(data)  # type: ignore[no-untyped-call]  # it is Rust
    except (OSError, SafetensorError) as error:
        raise VectorFileError(path, f"not readable as safetensors ({error})") from error
    found = _named(path, [(name, _safetensors_row(path, name, tensor)) for name, tensor in tensors])
    # deserialize has checked the header, and leaves out this part of it.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    hint = header.get("__metadata__", {}).get("architecture", "")
    return Found(found.rows, hint, found.notes)


def _safetensors_row(path: Path, name: str, tensor: Mapping[str, Any]) -> Any:
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}
    if tensor["dtype"] not in kinds:
        raise VectorFileError(path, f"expected floats, got {tensor['dtype']}", repr(name[:60]))
    values = np.frombuffer(tensor["data"], kinds[tensor["dtype"]]).reshape(tensor["shape"])
    return torchfile.from_bfloat16(values) if tensor["dtype"] == "BF16" else values


def _named(path: Path, found: list[tuple[str, Any]]) -> Found:
    if len(found) == 1 and found[0][1].ndim == 2:
        return _table(path, *found[0])
    rows = [(_number(path, name), name, array) for name, array in found]
    return _found(path, rows, "direction.N, layer_N, layers.N or N")


def _table(path: Path, name: str, array: Any) -> Found:
    if array.ndim != 2:
        raise VectorFileError(path, f"expected shape (rows, n_embd), got {array.shape}", name)
    return _found(path, [(i, f"{name}, row {i}", row) for i, row in enumerate(array)], "rows")


def _number(path: Path, name: str | int) -> int:
    match = _NAME.fullmatch(str(name))
    if match is None:
        shown = repr(str(name)[:60])  # a stranger's text may hold control characters
        raise VectorFileError(path, "expected direction.N, layer_N, layers.N or N, N from 0 to 9999", shown)
    return int(match.group(1))


def _found(path: Path, found: list[tuple[int, str, Any]], expected: str, hint: str = "") -> Found:
    rows, rounded = checked(found, lambda problem, name: VectorFileError(path, problem, name))
    if not rows:
        raise VectorFileError(path, f"expected {expected}, and there is none")
    return Found(rows, hint, (ROUNDED,) if rounded else ())


def _require_small(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise VectorFileError(path, f"expected at most {MAX_BYTES} bytes, got {size}")
