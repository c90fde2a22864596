"""Vectors from and for other programs, each with its own idea of which block a row belongs to.

    format               its row N was read at           and acts at          a trap
    mien                 block N                         block N
    llama.cpp            -                               block N
    repeng               block N                         block N              the last is read elsewhere
    llama.cpp-generator  block N-1                       block N
    steering-vectors     block N                         block N              other sites than blocks
    npz, safetensors     -                               block N

Blocks are counted from 0, and a row acts on a block's output. mien's layers say where a row acts; where
it was read stays in the metadata as `captured_at`. Block 0 has no place in the file format, so a row for
it is dropped, and a note says so. What is decided for the user is always in the notes.

repeng reads the last block after the model's final norm and adds before it: that row is dropped, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from . import foreign, vectorfile
from .architectures import gguf_architecture, is_gguf_architecture
from .errors import MienError, ModelMismatch, VectorError, VectorFileError, VectorFileNotFound
from .exporting import SUFFIXES, to_repeng, to_steering_vectors, write
from .fingerprint import Fingerprint
from .foreign import Found, Refuse
from .pack import file_digest
from .vector import Floats, MetaValue, Vector

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Imported",
    "from_repeng",
    "from_steering_vectors",
    "read",
    "rescaled",
    "to_repeng",
    "to_steering_vectors",
    "write",
]

FORMATS = ("auto", "mien", "repeng", "llama.cpp-generator", "steering-vectors", "npz", "safetensors")
_CONTAINERS = {"steering-vectors": "torch", "npz": "npz", "safetensors": "safetensors"}
# How many blocks away from its number a row was read.
_CAPTURED = {"repeng": 0, "steering-vectors": 0, "llama.cpp-generator": -1}
_ASSUMED = {
    "llama.cpp": (
        "the file does not say who wrote it: row N was taken to act at block N, as llama.cpp takes it. If "
        "repeng wrote it, import it as repeng, which drops an unsound row; if llama.cpp's generator did, "
        "as llama.cpp-generator"
    ),
    "llama.cpp-generator": (
        "row N acts at block N, as in llama.cpp, and was read at block N-1; a shift of -1 puts it there"
    ),
    "npz": "row N was taken to act at the output of block N, counted from 0; a shift moves all rows",
}
_ASSUMED["safetensors"] = _ASSUMED["npz"]
# Metadata that was measured on directions of that size, at those blocks.
_MEASURED = ("calibration.", "strength", "stream_norm", "bias", "center")


@dataclass(frozen=True)
class Imported:
    """A vector from elsewhere. format: one of FORMATS, or 'llama.cpp' for a file that does not say who
    wrote it. notes: what was decided for the user, a sentence each.
    """

    vector: Vector
    format: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Wishes:
    """What the user said beside the rows; see `read`."""

    name: str
    shift: int
    architecture: str
    model: Fingerprint | None
    keep_last: bool = False


def read(
    path: str | Path,
    format: str = "auto",
    *,
    name: str | None = None,
    shift: int = 0,
    architecture: str = "",
    model: Fingerprint | None = None,
    keep_last: bool = False,
) -> Imported:
    """Read a vector from a file of another program; nothing in it is executed or unpickled.

    format: one of FORMATS; 'auto' goes by what is in the file. name: the vector's; by default the one in
    a file of mien's, else the file's name without its ending. shift: added to every row's number.
    architecture: of the model, as GGUF or transformers names it. model: the model itself, which the rows
    are checked against. keep_last: keep the row of the last block in a file of repeng's.

    Raises VectorFileError, naming the place, for a file that is broken, is not of that format, or holds
    NaN, infinity, rows of different lengths, or no row for a block from 1; ModelMismatch where it is not
    for `model`; MissingExtra for a safetensors file where safetensors is not installed.
    """
    if format not in FORMATS:
        raise VectorError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    if not path.exists():
        raise VectorFileNotFound(path)
    wishes = _Wishes(name or path.stem, shift, architecture, model, keep_last)
    refuse: Refuse = partial(VectorFileError, path)
    kind = foreign.container(path) if format == "auto" else _CONTAINERS.get(format, "gguf")
    if kind != "gguf":
        found = _READERS[kind](path)
        format = "steering-vectors" if kind == "torch" else kind
    else:
        found, own = foreign.read_gguf(path)
        if own:
            vector = vectorfile.load(path)
            return _imported_own(vector, format, replace(wishes, name=name or vector.name), refuse)
        if format == "mien":
            raise refuse("expected keys that start with mien., and there is none; import it as auto", "")
        format = "llama.cpp" if format == "auto" else format
    return _imported(found, format, wishes, refuse, {"imported_digest": _digest(path)})


def from_repeng(
    control_vector: Any,
    *,
    name: str = "repeng",
    shift: int = 0,
    model: Fingerprint | None = None,
    keep_last: bool = False,
) -> Imported:
    """From a repeng.ControlVector: its `model_type` and `directions`. Arguments as for `read`.

    Raises VectorError, naming the layer, for rows that can't be a vector's; ModelMismatch as `read`.
    """
    refuse = _refuse_object(name)
    rows = {int(layer): row for layer, row in control_vector.directions.items()}
    found = _found(rows, str(control_vector.model_type), refuse)
    return _imported(found, "repeng", _Wishes(name, shift, "", model, keep_last), refuse, {})


def from_steering_vectors(
    steering_vector: Any,
    *,
    name: str = "steering_vectors",
    shift: int = 0,
    architecture: str = "",
    model: Fingerprint | None = None,
) -> Imported:
    """From a steering_vectors.SteeringVector, on any device. Arguments and errors as for `read`.

    Raises VectorError, naming the layer, for rows that can't be a vector's, and for a layer type other
    than decoder_block; ModelMismatch as `read`.
    """
    refuse = _refuse_object(name)
    foreign.require_blocks(steering_vector.layer_type, refuse)
    tensors = steering_vector.layer_activations
    # NumPy has no bfloat16; float32 holds each of its values, and of float64 what the file will hold.
    rows = {int(layer): tensor.detach().cpu().float().numpy() for layer, tensor in tensors.items()}
    wishes = _Wishes(name, shift, architecture, model)
    return _imported(_found(rows, "", refuse), "steering-vectors", wishes, refuse, {})


def rescaled(vector: Vector, factor: float) -> Vector:
    """`vector` times `factor`, with its metadata, but for a calibration, which was of the old scale.

    Raises VectorError for a factor that is not finite, or makes a value so.
    """
    from .calibration import bake_scale

    meta = {key: value for key, value in vector.meta.items() if not key.startswith("calibration.")}
    old = meta.get("scale", 1.0)
    scale = factor * old if isinstance(old, float) else factor
    return bake_scale(replace(vector, meta=meta), factor, {"scale": scale})


_READERS: dict[str, Callable[[Path], Found]] = {
    "torch": foreign.read_torch,
    "npz": foreign.read_npz,
    "safetensors": foreign.read_safetensors,
}


def _imported_own(vector: Vector, format: str, wishes: _Wishes, refuse: Refuse) -> Imported:
    """A file of mien's, which says itself where its rows act, and maybe for which model."""
    notes: list[str] = []
    mine = vector.fingerprint
    if mine is not None and wishes.model is not None and mine.differences(wishes.model):
        raise ModelMismatch(f"{wishes.name} is not for {wishes.model}", mine.differences(wishes.model))
    if format not in ("auto", "mien"):
        notes.append(f"it holds mien's own metadata: it was read as mien's, not as {format}'s, and whole")
    wishes = replace(wishes, model=mine or wishes.model)
    hint = _architecture(vector.model_hint, wishes, notes)
    rows = _placed(vector.directions, wishes, refuse, notes)
    meta = dict(vector.meta)
    if wishes.shift:
        notes.append("its strength, calibration, bias and center were left out: measured before the shift")
        meta = {key: value for key, value in meta.items() if not key.startswith(_MEASURED)}
        meta["captured_at"] = f"{meta.get('captured_at', 'not known')}; then shifted by {wishes.shift}"
    made = Vector.from_directions(wishes.name, rows, wishes.model, hint, meta)
    return Imported(made, "mien", tuple(notes))


def _imported(
    found: Found, format: str, wishes: _Wishes, refuse: Refuse, meta: dict[str, MetaValue]
) -> Imported:
    notes = list(found.notes)
    if format in _ASSUMED:
        notes.append(_ASSUMED[format])
    rows = _without_last(found.rows, wishes, notes) if format == "repeng" else found.rows
    rows = _placed(rows, wishes, refuse, notes)
    if format in ("npz", "safetensors") and wishes.model is not None and wishes.model.n_layer - 1 in rows:
        notes.append(
            f"row {wishes.model.n_layer - 1 - wishes.shift} acts at the last block: if it was read from the "
            f"last of transformers' hidden_states, that is after the final norm, and the row is unsound"
        )
    hint = _architecture(found.hint, wishes, notes)
    meta |= {"imported_from": format, "site": "residual", "captured_at": _captured(format, wishes.shift)}
    if format == "repeng":
        meta["imported_model_type"] = found.hint  # several become one architecture of GGUF
    vector = Vector.from_directions(wishes.name, rows, wishes.model, hint, meta)
    return Imported(vector, format, tuple(notes))


def _without_last(rows: Mapping[int, Floats], wishes: _Wishes, notes: list[str]) -> Mapping[int, Floats]:
    """Without repeng's row for the last block: the model's, or where that is not known the highest."""
    last = wishes.model.n_layer - 1 if wishes.model is not None else max(rows)
    if last not in rows or wishes.keep_last:
        return rows
    which = "the last block" if wishes.model is not None else "the highest, taken for the last block"
    notes.append(
        f"row {last} was dropped ({which}): repeng reads that one after the model's final norm, and adds "
        f"before it. It can be kept{'' if wishes.model is not None else '; naming the model decides it'}"
    )
    return {number: row for number, row in rows.items() if number != last}


def _placed(
    rows: Mapping[int, Floats], wishes: _Wishes, refuse: Refuse, notes: list[str]
) -> dict[int, Floats]:
    """{the block that the row acts on: row}, without those that the format has no place for."""
    placed = {number + wishes.shift: row for number, row in rows.items()}
    low = sorted(block for block in placed if block < 1)
    if low:
        numbers = ", ".join(str(block - wishes.shift) for block in low)
        notes.append(
            f"row {numbers} was dropped: it would act at block {', '.join(map(str, low))}, and vector files "
            f"start at block 1 (llama.cpp refuses direction.0)"
        )
    kept = {block: row for block, row in placed.items() if block >= 1}
    if not kept:
        raise refuse(f"no row is left for a block from 1; there were {_span(rows)}", "")
    n_layer = wishes.model.n_layer if wishes.model is not None else 10_000
    if max(kept) >= n_layer:
        number = max(kept) - wishes.shift
        extra = " Where row 0 is the embedding, the shift is -1." if len(rows) == n_layer + 1 else ""
        raise refuse(
            f"expected blocks up to {n_layer - 1}, got a row for block {max(kept)}.{extra}", f"row {number}"
        )
    _require_width(next(iter(kept.values())).size, wishes)
    return kept


def _span(rows: Mapping[int, Floats]) -> str:
    return f"{len(rows)}, from {min(rows)} to {max(rows)}" if rows else "none"


def _require_width(n_embd: int, wishes: _Wishes) -> None:
    if wishes.model is not None and n_embd != wishes.model.n_embd:
        raise ModelMismatch(
            f"{wishes.name} is not for {wishes.model}",
            [f"rows of {n_embd} values, not {wishes.model.n_embd}"],
        )


def _architecture(hint: str, wishes: _Wishes, notes: list[str]) -> str:
    """GGUF's name of the architecture: what the user says, else what the file says."""
    said = gguf_architecture(wishes.architecture or hint)
    known = is_gguf_architecture(said)
    if wishes.model is None:
        if said and not known:
            notes.append(f"{said!r} is no architecture that GGUF knows; it was kept as it is")
        return said
    if known and said != wishes.model.architecture:
        raise ModelMismatch(
            f"{wishes.name} is not for {wishes.model}",
            [f"made for {said}, the model is {wishes.model.architecture}"],
            "" if wishes.architecture else "If the file is wrong there, name the architecture yourself.",
        )
    if said and said != wishes.model.architecture:
        notes.append(f"{said!r}, which the file says it is for, is no architecture that GGUF knows")
    return wishes.model.architecture


def _captured(format: str, shift: int) -> str:
    """Where the rows were read, seen from where they act now."""
    if format not in _CAPTURED:
        return "not known"
    away = _CAPTURED[format] - shift
    if away == 0:
        return "output of the same block"
    blocks = "the block" if abs(away) == 1 else f"{abs(away)} blocks"
    return f"output of {blocks} {'before' if away < 0 else 'after'}"


def _refuse_object(name: str) -> Refuse:
    def refuse(problem: str, where: str) -> MienError:
        return VectorError(f"{name}{', ' + where if where else ''}: {problem}")

    return refuse


def _found(rows: Mapping[int, Any], hint: str, refuse: Refuse) -> Found:
    checked, rounded = foreign.checked([(n, f"layer {n}", row) for n, row in rows.items()], refuse)
    return Found(checked, hint, (foreign.ROUNDED,) if rounded else ())


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise VectorFileError(path, f"can't be read ({error.strerror})") from error
