"""Reading and writing vector files: GGUF, as llama.cpp's `--control-vector` takes it.

    general.architecture         "controlvector"
    controlvector.model_hint     the model's architecture, such as "llama"
    controlvector.layer_count    how many directions follow
    mien.*                       everything else, see KEYS
    tensors  direction.N         F32, n_embd values, N >= 1: added to the output of block N, from 0

`direction.N` means "added at block N" to llama.cpp, repeng and mien alike. llama.cpp's own generator
captures at block N-1 what it names direction.N; what is read here is where a direction acts.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import VectorError, VectorFileError
from .fingerprint import Fingerprint
from .vector import MetaValue, Vector

if TYPE_CHECKING:
    import gguf

KEYS = {
    "name": "the vector's name in recipes",
    "kind": "emotion or trait",
    "positive": "the pole that a positive coefficient steers to, in words",
    "negative": "the pole that a negative coefficient steers to, in words",
    "site": "where it acts: residual",
    "captured_at": "where it was read: the output of the same block",
    "method": "how it was made",
    "data_digest": "SHA-256 over the contrast texts",
    "samples": "how many texts on each side",
    "imported_from": "the program whose file it was made of; imported_digest is that file's SHA-256",
    "imported_model_type": "the model's type in such a file, as transformers names it",
    "scale": "the factor that was baked in, on the raw difference",
    "strength": "per direction: its length over the median norm of the residual stream there",
    "calibration.*": "the dose curve: coefficient, perplexity, repetition; and the budgets",
    "licence": "SPDX identifier",
    "model.*": "the fingerprint of the model it was made on",
}

_MAGIC = b"GGUF"
_DIRECTION = re.compile(r"direction\.([1-9][0-9]{0,3})")
# What gguf's reader lets out when a file lies about itself.
BROKEN = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,  # an offset that overflows; see errstate in open_gguf
    MemoryError,
    RecursionError,  # arrays nested without end
)


def load(path: str | Path) -> Vector:
    """Read a vector file whole.

    Raises VectorFileError, naming the tensor or key, for a file that is not GGUF, is cut short, holds
    any tensor that llama.cpp would refuse (another name, type or rank, layer 0), rows of different
    lengths, NaN or infinity.
    """
    path = Path(path)
    reader = open_gguf(path)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except BROKEN as error:
        raise VectorFileError(path, f"the metadata is broken ({error})") from error
    if fields.get("general.architecture") != "controlvector":
        raise VectorFileError(
            path,
            f"expected a control vector, got a GGUF file of architecture "
            f"{fields.get('general.architecture')!r}",
            "general.architecture",
        )
    directions: dict[int, Any] = {}
    for tensor in reader.tensors:
        layer, row = _direction(path, tensor)
        directions[layer] = row
    if not directions:
        raise VectorFileError(path, "there is no tensor named direction.N in it")
    sizes = {layer: row.size for layer, row in directions.items()}
    expected = sizes[min(sizes)]
    for layer, size in sizes.items():
        if size != expected:
            raise VectorFileError(path, f"expected {expected} values, got {size}", f"direction.{layer}")
    meta = {name[5:]: value for name, value in fields.items() if name.startswith("mien.")}
    hint = fields.get("controlvector.model_hint", "")
    if not isinstance(hint, str):
        raise VectorFileError(path, f"expected text, got {hint!r}", "controlvector.model_hint")
    name = meta.pop("name", path.stem)
    try:
        fingerprint = _fingerprint(meta)
        return Vector.from_directions(str(name), directions, fingerprint, hint, meta)
    except (VectorError, ValueError) as error:
        raise VectorFileError(path, str(error)) from error


def write(vector: Vector, path: str | Path) -> None:
    """Write `vector` to `path`: the same vector gives the same bytes.

    Raises VectorError where the model's architecture is not known, VectorFileError where the file can't
    be written. On error a file already there is as it was.
    """
    import gguf

    if not vector.model_hint:
        raise VectorError(f"{vector.name}: the model's architecture is not known, and the format needs it")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise VectorFileError(path, f"can't be written ({error.strerror})") from error
    os.close(handle)
    try:
        with closing(gguf.GGUFWriter(temporary, "controlvector")) as writer:
            writer.add_string("controlvector.model_hint", vector.model_hint)
            writer.add_uint32("controlvector.layer_count", len(vector.layers))
            for key, value in sorted(_meta_to_write(vector).items()):
                _add(writer, f"mien.{key}", value)
            for layer, row in vector.directions.items():
                writer.add_tensor(f"direction.{layer}", np.array(row))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise VectorFileError(path, f"can't be written ({error.strerror})") from error
        raise


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of the GGUF file at `path`. Raises VectorFileError where it can't be read as one.

    What reading on from it lets out, where the file lies about itself, is one of BROKEN.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise VectorFileError(path, f"can't be read ({error.strerror})") from error
    if magic != _MAGIC:
        raise VectorFileError(path, f"not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}")
    import gguf

    class Reader(gguf.GGUFReader):
        # Past the end gguf gives less than asked for, and reads an array that claims 2^50 values for ever.
        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise ValueError(f"expected at least {end} bytes")
            return super()._get(offset, dtype, count, *rest, **named)

    try:
        with np.errstate(over="raise"):
            return Reader(path)
    except BROKEN as error:
        size = path.stat().st_size
        raise VectorFileError(
            path, f"broken or cut short at {size} bytes ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _direction(path: Path, tensor: gguf.ReaderTensor) -> tuple[int, np.ndarray[Any, Any]]:
    import gguf

    name = tensor.name
    match = _DIRECTION.fullmatch(name)
    if match is None:
        raise VectorFileError(
            path, "expected only tensors named direction.N with N from 1: llama.cpp refuses the file", name
        )
    if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
        raise VectorFileError(path, f"expected type F32, got {tensor.tensor_type.name}", name)
    if len(tensor.shape) != 1:
        raise VectorFileError(path, f"expected one dimension, got {len(tensor.shape)}", name)
    row = np.array(tensor.data, dtype=np.float32)
    if row.size == 0:
        raise VectorFileError(path, "it is empty", name)
    if not np.isfinite(row).all():
        place = int(np.flatnonzero(~np.isfinite(row))[0])
        raise VectorFileError(path, f"value {place} is {row[place]}; every value must be finite", name)
    return int(match.group(1)), row


def _fingerprint(meta: dict[str, MetaValue]) -> Fingerprint | None:
    """The model's fingerprint, taken out of `meta`."""
    data = {key[6:]: meta.pop(key) for key in list(meta) if key.startswith("model.")}
    return Fingerprint.from_mapping(data) if data else None


def _meta_to_write(vector: Vector) -> dict[str, MetaValue]:
    meta: dict[str, MetaValue] = {**vector.meta, "name": vector.name}
    if vector.fingerprint is not None:
        meta.update({f"model.{key}": value for key, value in vector.fingerprint.as_dict().items()})
    return meta


def _add(writer: gguf.GGUFWriter, key: str, value: MetaValue) -> None:
    # bool before int: it is one
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float64(key, value)
    else:
        writer.add_array(key, list(value))
