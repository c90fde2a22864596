"""The tensors of a vector file, read and checked, and written: see vectorfile.py for what they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import VectorFileError
from .vector import SITES, Floats, Vector

if TYPE_CHECKING:
    import gguf

MAX_FLOATS = 1 << 24  # that sparse tensors may stand for: a small file could claim terabytes

_DIRECTION = re.compile(r"direction\.([1-9][0-9]{0,3})")
_PLACE = re.compile(r"([a-z]+)\.(0|[1-9][0-9]{0,3})(?:\.(index|value))?")


def control_rows(path: Path, tensors: Iterable[gguf.ReaderTensor]) -> dict[int, Floats]:
    """{layer: direction} of a control vector. Raises VectorFileError for what llama.cpp refuses, and NaN."""
    rows: dict[int, Floats] = {}
    for tensor in tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        if match is None:
            problem = "expected only tensors named direction.N with N from 1: llama.cpp refuses the file"
            raise VectorFileError(path, problem, tensor.name)
        rows[int(match.group(1))] = _values(path, tensor, "F32", (1,))
    if not rows:
        raise VectorFileError(path, "there is no tensor named direction.N in it")
    expected = rows[min(rows)].size
    for layer, row in rows.items():
        if row.size != expected:
            raise VectorFileError(path, f"expected {expected} values, got {row.size}", f"direction.{layer}")
    return rows


def own_rows(path: Path, tensors: Iterable[gguf.ReaderTensor], site: str, width: object) -> dict[int, Floats]:
    """{layer: row} of a file of mien's own, each (width,), or (rank, width) throughout.

    site, width: what its metadata says. Raises VectorFileError, naming the tensor or key, for anything else.
    """
    if site not in SITES:
        raise VectorFileError(path, f"expected one of {', '.join(SITES)}, got {site!r}", "mien.site")
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width < 1 << 31:
        raise VectorFileError(path, f"expected a positive number, got {width!r}", "mien.width")
    rows: dict[int, Floats] = {}
    pairs: dict[int, dict[str, gguf.ReaderTensor]] = {}
    for tensor in tensors:
        layer, half = _place(path, tensor.name, site)
        if half:
            pairs.setdefault(layer, {})[half] = tensor
            continue
        rows[layer] = _values(path, tensor, "F32", (1, 2))
        if rows[layer].shape[-1] != width:
            problem = f"expected rows of {width} values, as mien.width says, got {rows[layer].shape[-1]}"
            raise VectorFileError(path, problem, tensor.name)
    if len(pairs) * width > MAX_FLOATS:
        problem = f"expected at most {MAX_FLOATS} values in all, got {len(pairs)} x {width}"
        raise VectorFileError(path, problem)
    for layer, pair in pairs.items():
        if layer in rows:
            raise VectorFileError(path, "it is there whole, and as index and value, too", f"neurons.{layer}")
        rows[layer] = _sparse_row(path, layer, pair, width)
    if not rows:
        raise VectorFileError(path, f"there is no tensor named {site}.N in it")
    _require_one_rank(path, site, rows)
    return rows


def _place(path: Path, name: str, site: str) -> tuple[int, str | None]:
    """The layer that a tensor's name says, and which half of a pair it is, if it is one."""
    match = _PLACE.fullmatch(name)
    first = 1 if site == "residual" else 0
    if match is not None and match[1] == site and int(match[2]) >= first:
        layer, half = int(match[2]), match[3]
        if half is None or site == "neurons":
            return layer, half
    halves = ", neurons.N.index and neurons.N.value" if site == "neurons" else ""
    problem = f"expected only tensors named {site}.N with N from {first}{halves}, as mien.site says"
    raise VectorFileError(path, problem, name)


def _require_one_rank(path: Path, site: str, rows: dict[int, Floats]) -> None:
    first = min(rows)
    shape = rows[first].shape
    for layer, row in rows.items():
        if row.shape != shape:
            problem = f"expected shape {shape} as in {site}.{first}, got {row.shape}"
            raise VectorFileError(path, problem, f"{site}.{layer}")
    if len(shape) == 2 and shape[0] == 1:
        raise VectorFileError(path, "expected one dimension for one direction, got 2", f"{site}.{first}")
    if len(shape) == 1 and site == "residual":
        problem = "expected several directions; one a layer of the residual stream is a control vector"
        raise VectorFileError(path, problem, f"{site}.{first}")


def _sparse_row(path: Path, layer: int, pair: dict[str, gguf.ReaderTensor], width: int) -> Floats:
    for half in ("index", "value"):
        if half not in pair:
            raise VectorFileError(
                path, "it is missing, and its other half is there", f"neurons.{layer}.{half}"
            )
    index, value = pair["index"], pair["value"]
    at = _values(path, index, "I32", (1,))
    if (at[1:] <= at[:-1]).any() or at[0] < 0 or at[-1] >= width:
        raise VectorFileError(path, f"expected numbers that ascend from 0 to at most {width - 1}", index.name)
    values = _values(path, value, "F32", (1,))
    if values.size != at.size:
        raise VectorFileError(
            path, f"expected {at.size} values, one for each index, got {values.size}", value.name
        )
    row = np.zeros(width, dtype=np.float32)
    row[at] = values
    return row


def _values(path: Path, tensor: gguf.ReaderTensor, kind: str, ranks: tuple[int, ...]) -> Any:
    """The tensor's values, a copy. Raises VectorFileError for another type or rank, nothing, and NaN."""
    name = tensor.name
    if tensor.tensor_type.name != kind:
        raise VectorFileError(path, f"expected type {kind}, got {tensor.tensor_type.name}", name)
    if len(tensor.shape) not in ranks:
        words = "one dimension" if ranks == (1,) else "one dimension or two"
        raise VectorFileError(path, f"expected {words}, got {len(tensor.shape)}", name)
    values = np.array(tensor.data, dtype=np.int32 if kind == "I32" else np.float32)
    if values.size == 0:
        raise VectorFileError(path, "it is empty", name)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        place = int(bad[0])
        raise VectorFileError(
            path, f"value {place} is {values.flat[place]}; every value must be finite", name
        )
    return values


def tensors(vector: Vector) -> Iterator[tuple[str, Any]]:
    """(name, values) of the file that holds `vector`, in the order of the layers."""
    site = "direction" if vector.is_control_vector else vector.site
    for layer, row in vector.directions.items():
        # By bits: -0.0 is kept, so that the floats are the same when they come back.
        at = np.flatnonzero(row.view(np.int32)) if site == "neurons" and row.ndim == 1 else np.empty(0)
        if 0 < 4 * at.size < row.size:
            yield f"neurons.{layer}.index", at.astype(np.int32)
            yield f"neurons.{layer}.value", row[at]
        else:
            yield f"{site}.{layer}", np.array(row)
