"""Reading and writing vector files: GGUF, of two kinds.

One direction a layer of the residual stream is a control vector, as llama.cpp's `--control-vector` takes it:

    general.architecture         "controlvector"
    controlvector.model_hint     the model's architecture, such as "llama"
    controlvector.layer_count    how many directions follow
    mien.*                       everything else, see KEYS
    tensors  direction.N         F32, n_embd values, N >= 1: added to the output of block N, from 0

`direction.N` means "added at block N" to llama.cpp, repeng and mien alike. llama.cpp's own generator
captures at block N-1 what it names direction.N; what is read here is where a direction acts.

What that can't say, another site or several directions a layer, is a file of mien's own, which llama.cpp
refuses:

    general.architecture         "mien-vector"
    mien.site                    see vector.SITES
    mien.width                   how many floats a row has there
    mien.model_hint              the model's architecture: the other key is of control vectors
    mien.*                       as above
    tensors  <site>.N            F32, width values, or rank x width of a subspace, the same rank in every
                                 layer; N from 0, at the residual stream from 1
             neurons.N.index     I32, ascending, and
             neurons.N.value     F32, as many: the values that are not zero, in place of neurons.N; written
                                 where they are fewer than a quarter
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import VectorError, VectorFileError, VectorFileNotFound
from .fingerprint import Fingerprint
from .vector import MetaValue, Vector
from .vectorrows import control_rows, own_rows, tensors
from .wholefile import replacing

if TYPE_CHECKING:
    import gguf

KEYS = {
    "name": "the vector's name in recipes",
    "kind": "emotion or trait",
    "positive": "the pole that a positive coefficient steers to, in words",
    "negative": "the pole that a negative coefficient steers to, in words",
    "site": "where it acts: residual, attention, mlp, heads, neurons or experts",
    "when": "the tokens it acts on where a recipe does not say: all, prompt or response",
    "width": "of a file of mien's own: how many floats a row has there",
    "model_hint": "of a file of mien's own: the model's architecture",
    "head_dim": "of heads: how many floats each has",
    "bias": "of a linear probe, per layer: <direction, h> + bias is its logit",
    "center": "per direction: the readout that counts as zero, the middle of the contrast",
    "captured_at": "where it was read: the output of the same block",
    "method": "how it was made",
    "data_digest": "SHA-256 over the contrast texts",
    "samples": "how many texts on each side",
    "imported_from": "the program whose file it was made of; imported_digest is that file's SHA-256",
    "imported_model_type": "the model's type in such a file, as transformers names it",
    "scale": "the factor that was baked in, on the raw difference",
    "strength": "per direction: its length over the median norm of the residual stream there",
    "stream_norm": "per direction: that norm",
    "calibration.*": "the dose curve: coefficient, perplexity, repetition, distinct-2; and the budgets",
    "licence": "SPDX identifier",
    "model.*": "the fingerprint of the model it was made on",
}

CONTROL, OWN = "controlvector", "mien-vector"

_MAGIC = b"GGUF"
_FLOAT32 = float(np.finfo(np.float32).max)
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
    """Read a vector file of either kind whole.

    Raises VectorFileError, naming the tensor or key, for a file that is not GGUF, is cut short, holds
    any tensor but those of its kind (another name, type or rank, a layer that can't be), rows of different
    lengths, NaN or infinity, or metadata that can't be so.
    """
    path = Path(path)
    reader = open_gguf(path)
    try:
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except BROKEN as error:
        raise VectorFileError(path, f"the metadata is broken ({error})") from error
    kind = fields.get("general.architecture")
    if kind not in (CONTROL, OWN):
        raise VectorFileError(
            path,
            f"expected a control vector, got a GGUF file of architecture {kind!r}",
            "general.architecture",
        )
    meta = _read_meta(path, fields)
    if kind == CONTROL:
        site, rows = "residual", control_rows(path, reader.tensors)
        if meta.get("site", site) != site:
            raise VectorFileError(path, f"expected residual, got {meta['site']!r}", "mien.site")
        hint = _text(path, "controlvector.model_hint", fields.get("controlvector.model_hint", ""))
    else:
        site = _text(path, "mien.site", meta.pop("site", None))
        rows = own_rows(path, reader.tensors, site, meta.pop("width", None))
        hint = _text(path, "mien.model_hint", meta.pop("model_hint", ""))
    name = _text(path, "mien.name", meta.pop("name", "")) or path.stem
    layers = tuple(sorted(rows))
    try:
        fingerprint = _fingerprint(meta)
        return Vector(name, layers, np.stack([rows[n] for n in layers]), fingerprint, hint, meta, site)
    except (VectorError, ValueError) as error:
        raise VectorFileError(path, str(error)) from error


def write(vector: Vector, path: str | Path) -> None:
    """Write `vector` to `path`, as a control vector where it is one: the same vector gives the same bytes.

    Raises VectorError where the model's architecture is not known, VectorFileError if the file can't
    be written, or exists and is not a regular file. On error a file already there is as it was.
    """
    import gguf

    if not vector.model_hint:
        raise VectorError(f"{vector.name}: the model's architecture is not known, and the format needs it")
    path = Path(path)
    kind = CONTROL if vector.is_control_vector else OWN
    try:
        with replacing(path) as temporary, closing(gguf.GGUFWriter(temporary, kind)) as writer:
            if vector.is_control_vector:
                writer.add_string("controlvector.model_hint", vector.model_hint)
                writer.add_uint32("controlvector.layer_count", len(vector.layers))
            for key, value in sorted(_meta_to_write(vector).items()):
                _add(writer, f"mien.{key}", value)
            for name, values in tensors(vector):
                writer.add_tensor(name, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise VectorFileError(path, f"can't be written ({error.strerror})") from error


def why_own(vector: Vector) -> str:
    """Why it is no control vector, '' where it is one: what is said to who would export or import it."""
    if vector.is_control_vector:
        return ""
    count = "one direction" if vector.rank == 1 else f"{vector.rank} directions"
    site = "the residual stream" if vector.site == "residual" else vector.site
    return (
        "llama.cpp's control vectors have one direction a layer of the residual stream; this one is "
        f"{count} a layer of {site}"
    )


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of the GGUF file at `path`. Raises VectorFileError if it can't be read as one.

    What reading on from it lets out, where the file lies about itself, is one of BROKEN.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except FileNotFoundError as error:
        raise VectorFileNotFound(path) from error
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


# ---- metadata ----


def _read_meta(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """The keys under `mien.`, without that. Raises VectorFileError for what could not be written again."""
    meta = {name[5:]: value for name, value in fields.items() if name.startswith("mien.")}
    for key, value in meta.items():
        if not _is_writable(value):
            raise VectorFileError(
                path, "expected numbers of 64 bits, in arrays of one kind and 32", f"mien.{key}"
            )
    return meta


def _is_writable(value: object) -> bool:
    """Whether `_add` can write it: what GGUF can hold is more than the writer takes."""
    if not isinstance(value, list):
        return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
    if len({type(item) for item in value}) > 1:  # nested arrays, which the reader flattens
        return False
    return all(
        -(1 << 31) <= item < 1 << 31
        if isinstance(item, int)
        else abs(item) <= _FLOAT32 or not np.isfinite(item)
        for item in value
        if not isinstance(item, str)
    )


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise VectorFileError(path, f"expected text, got {value!r}", key)
    return value


def _fingerprint(meta: dict[str, MetaValue]) -> Fingerprint | None:
    """The model's fingerprint, taken out of `meta`."""
    data = {key[6:]: meta.pop(key) for key in list(meta) if key.startswith("model.")}
    return Fingerprint.from_mapping(data) if data else None


def _meta_to_write(vector: Vector) -> dict[str, MetaValue]:
    meta: dict[str, MetaValue] = {**vector.meta, "name": vector.name}
    if not vector.is_control_vector:
        meta |= {"site": vector.site, "width": vector.width, "model_hint": vector.model_hint}
    elif "site" in meta:
        meta["site"] = vector.site
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
