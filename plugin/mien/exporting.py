"""Writing vectors for other programs: a file, an object of theirs, or a whole pack."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .architectures import gguf_architecture, transformers_model_type
from .errors import MissingExtra, PackError, VectorError
from .install import move_into_place, require_new
from .pack import Pack, write_whole
from .vector import Floats, Vector
from .vectorfile import why_own

if TYPE_CHECKING:
    from repeng import ControlVector
    from steering_vectors import SteeringVector

# What `write` writes, and the ending of such a file.
SUFFIXES = {
    "repeng": ".gguf",
    "llama.cpp": ".gguf",
    "npz": ".npz",
    "safetensors": ".safetensors",
    "steering-vectors": ".pt",
}


def write(vector: Vector, path: str | Path, format: str) -> None:
    """Write `vector` for another program; the same vector gives the same bytes.

    format: one of SUFFIXES.
      llama.cpp          mien's own file, which llama.cpp loads as it is
      repeng             the same with the model's type as transformers names it, which repeng compares.
                         ControlModel needs a direction for each layer it is given: the vector's layers
      npz, safetensors   arrays direction.N, float32; safetensors also holds the architecture
      steering-vectors   {layer: tensor} as torch.save writes it: SteeringVector(torch.load(path))

    Raises MissingExtra where safetensors or torch is needed and missing, VectorError for a subspace or a
    vector of another site than the residual stream, and where GGUF needs an architecture and it is not
    known, VectorFileError or PackError where the file can't be written. On error a file already there is as
    it was.
    """
    path = Path(path)
    if format not in SUFFIXES:
        raise VectorError(f"format: expected one of {', '.join(SUFFIXES)}, got {format!r}")
    _require_control_vector(vector)
    if format == "llama.cpp":
        vector.save(path)
    elif format == "repeng":
        _for_repeng(vector).save(path)
    else:
        write_whole(path, _ENCODERS[format](vector))


def export(pack: Pack, target: str | Path, format: str, force: bool = False) -> Path:
    """Write every vector of `pack` into the folder `target`, one file each. Gives `target`.

    force: replace such a folder of an earlier export.

    Raises what `Pack.load` and `write` raise, and PackError where `target` already exists, holds other
    things than an export, or can't be written. On error it is as it was, and nothing is left behind.
    """
    target = Path(target)
    pack = Pack.read(pack.path)  # the manifest as it is now is the one that counts
    vectors = [pack.load(name) for name in pack.entries]
    require_new(target, force)
    if os.path.lexists(target):
        _require_export(target, SUFFIXES[format])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # On the file system of the target, so that moving it there is one rename.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
            new = Path(work, "new")
            new.mkdir()
            for vector in vectors:
                write(vector, new / f"{vector.name}{SUFFIXES[format]}", format)
            move_into_place(new, target, aside=Path(work, "old"))
    except OSError as error:
        raise PackError(f"{target}: can't be written ({error.strerror})") from error
    return target


def to_repeng(vector: Vector) -> ControlVector:
    """As a repeng.ControlVector, for `ControlModel(model, list(vector.layers))`: it wants its layers as a
    list, and a direction for each. Raises MissingExtra where repeng is not installed, VectorError as `write`.
    """
    _require_control_vector(vector)
    try:
        from repeng import ControlVector
    except ModuleNotFoundError as error:
        raise _NotInstalled("repeng") from error
    rows = {layer: np.array(row) for layer, row in vector.directions.items()}
    return ControlVector(model_type=_model_type(vector), directions=rows)


def to_steering_vectors(vector: Vector) -> SteeringVector:
    """As a steering_vectors.SteeringVector, float32 on the CPU.

    Raises MissingExtra where steering-vectors is not installed, VectorError as `write`.
    """
    _require_control_vector(vector)
    try:
        from steering_vectors import SteeringVector
    except ModuleNotFoundError as error:
        raise _NotInstalled("steering-vectors") from error
    return SteeringVector(layer_activations=_tensors(vector), layer_type="decoder_block")


def _require_control_vector(vector: Vector) -> None:
    if why := why_own(vector):
        raise VectorError(f"{vector.name}: {why}")


class _NotInstalled(MissingExtra):
    """Of a package that no extra of mien's brings."""

    def __init__(self, package: str) -> None:
        super().__init__(package, "")
        self.args = (f"{package} is not installed: pip install {package}",)


def _model_type(vector: Vector) -> str:
    """transformers' name: the one that the vector came with, as long as it is still true."""
    came_with = vector.meta.get("imported_model_type")
    if isinstance(came_with, str) and gguf_architecture(came_with) == vector.model_hint:
        return came_with
    return transformers_model_type(vector.model_hint)


def _for_repeng(vector: Vector) -> Vector:
    """With transformers' name as hint. The fingerprint goes to the metadata, where mien finds it again:
    as an attribute it would set the hint.
    """
    meta = dict(vector.meta)
    if vector.fingerprint is not None:
        meta |= {f"model.{key}": value for key, value in vector.fingerprint.as_dict().items()}
    return Vector(vector.name, vector.layers, vector.rows, None, _model_type(vector), meta)


def _arrays(vector: Vector) -> dict[str, Floats]:
    return {f"direction.{layer}": row for layer, row in vector.directions.items()}


def _encode_npz(vector: Vector) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **_arrays(vector))  # type: ignore[arg-type]  # its stub takes the names for options
    return buffer.getvalue()


def _encode_safetensors(vector: Vector) -> bytes:
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        raise MissingExtra("safetensors", "hf") from error
    # Of several keys the order would change from call to call.
    return save(_arrays(vector), {"architecture": vector.model_hint})


def _encode_torch(vector: Vector) -> bytes:
    tensors = _tensors(vector)
    import torch

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _tensors(vector: Vector) -> dict[int, Any]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise MissingExtra("torch", "hf") from error
    return {layer: torch.from_numpy(np.array(row)) for layer, row in vector.directions.items()}


_ENCODERS: dict[str, Callable[[Vector], bytes]] = {
    "npz": _encode_npz,
    "safetensors": _encode_safetensors,
    "steering-vectors": _encode_torch,
}


def _require_export(target: Path, suffix: str) -> None:
    """Raises PackError unless `target` is a folder with nothing but files of such an export in it."""
    if target.is_symlink() or not target.is_dir():
        raise PackError(f"{target}: expected a folder of an earlier export, got something else")
    other = next((path.name for path in sorted(target.iterdir()) if path.suffix != suffix), None)
    if other is not None:
        raise PackError(f"{target}: {other} is no vector of an earlier export; remove the folder yourself")
