"""The C engine: the only importer of the compiled extension.

Keeps buffers alive for as long as C may read them, and turns status codes into exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from ._engine import ffi, lib
from .errors import RuntimeNotSupported, SteeringNotApplied, VectorError
from .vector import Floats

PATHS: dict[str, int] = {
    "auto": lib.MIEN_PATH_AUTO,
    "in-graph": lib.MIEN_PATH_IN_GRAPH,
    "post-compute": lib.MIEN_PATH_POST,
}
PATH_NAMES = {number: name for name, number in PATHS.items()}

# The bare ValueErrors can only come from a bug in mien: everything above checks first.
_ERRORS: dict[int, Exception] = {
    lib.MIEN_ERR_MEMORY: MemoryError("mien's engine could not allocate"),
    lib.MIEN_ERR_SHAPE: ValueError("n_layer and n_embd must be positive, and a program's those of its hook"),
    lib.MIEN_ERR_LAYER: ValueError("a layer that the model does not have, or layers that do not ascend"),
    lib.MIEN_ERR_SITE: ValueError("an unknown site"),
    lib.MIEN_ERR_OP: ValueError("an unknown operation"),
    lib.MIEN_ERR_NOT_FINITE: VectorError(
        "the recipe's coefficients and vectors add up to NaN or infinity; use smaller coefficients"
    ),
    lib.MIEN_ERR_SYMBOL: RuntimeNotSupported(
        "this llama.cpp library lacks functions that mien needs; update llama-cpp-python"
    ),
    lib.MIEN_ERR_TENSOR: SteeringNotApplied(
        "a block's output is not rows of n_embd float32, so it was left as it was"
    ),
    lib.MIEN_ERR_NOT_MET: SteeringNotApplied("layers of the recipe were never evaluated"),
    lib.MIEN_ERR_NOT_APPLIED: SteeringNotApplied("rows were computed without being steered"),
}


def check(status: int) -> None:
    """Raise what `status` stands for; nothing for MIEN_OK."""
    if status != lib.MIEN_OK:
        error = _ERRORS[status]
        raise type(error)(*error.args)


class VectorLike(Protocol):
    """What the engine reads of a vector."""

    @property
    def layer_ids(self) -> npt.NDArray[np.int32]: ...
    @property
    def rows(self) -> Floats: ...


OPERATIONS: dict[str, int] = {"add": lib.MIEN_OP_ADD, "add_keep_norm": lib.MIEN_OP_ADD_KEEP_NORM}


class CompiledProgram:
    """An immutable program in C memory.

    added, norm_kept: (coefficient, vector) pairs, each summed up in their order and added to a row; the
    second sum gives the row its length back afterwards. Raises VectorError where a sum is not finite.
    Any thread may apply it.
    """

    def __init__(
        self,
        n_layer: int,
        n_embd: int,
        added: Sequence[tuple[float, VectorLike]],
        norm_kept: Sequence[tuple[float, VectorLike]] = (),
    ) -> None:
        terms = [(lib.MIEN_OP_ADD, *dose) for dose in added]
        terms += [(lib.MIEN_OP_ADD_KEEP_NORM, *dose) for dose in norm_kept]
        array = ffi.new("mien_term[]", max(len(terms), 1))
        keep = []  # cffi arrays that C reads during the call
        for term, (op, coefficient, vector) in zip(array, terms):
            if vector.rows.shape[1] != n_embd:
                raise ValueError(f"expected rows of {n_embd}, got {vector.rows.shape[1]}")
            layers = ffi.from_buffer("int32_t[]", vector.layer_ids)
            rows = ffi.from_buffer("float[]", vector.rows)
            keep += [layers, rows]
            term.op, term.site = op, lib.MIEN_SITE_RESIDUAL
            term.coefficient = coefficient
            term.n_rows = vector.rows.shape[0]
            term.layers, term.rows = layers, rows
        out = ffi.new("mien_program **")
        check(lib.mien_program_new(out, n_layer, n_embd, array, len(terms)))
        self.handle = ffi.gc(out[0], lib.mien_program_release)
        self.n_layer, self.n_embd = n_layer, n_embd

    @property
    def layers(self) -> list[int]:
        """The layers that it acts on, ascending."""
        out = ffi.new("int32_t[]", self.n_layer)
        count = lib.mien_program_layers(self.handle, lib.MIEN_SITE_RESIDUAL, out)
        return list(out[0:count])

    def direction(self, layer: int, operation: str) -> Floats | None:
        """What a key of OPERATIONS adds at `layer`, float32 (n_embd,), a copy; None for nothing."""
        found = lib.mien_program_direction(self.handle, lib.MIEN_SITE_RESIDUAL, layer, OPERATIONS[operation])
        if not found:
            return None
        return np.frombuffer(ffi.buffer(found, 4 * self.n_embd), dtype=np.float32).copy()

    def apply(self, layer: int, rows: Floats) -> float:
        """Steer `rows` (float32, C-contiguous, n x n_embd) in place.

        Returns the sum over the rows of the squared length that each moved by.
        """
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != self.n_embd:
            raise ValueError(f"expected float32 rows of {self.n_embd}, got {rows.dtype} {rows.shape}")
        data = ffi.from_buffer("float[]", rows, require_writable=True)
        moved = lib.mien_program_apply(self.handle, lib.MIEN_SITE_RESIDUAL, layer, data, len(rows))
        return cast(float, moved)


# CompiledProgram.apply on memory that somebody else owns: apply_at(program.handle, layer, address, n_rows),
# the address being that of n_rows contiguous rows of n_embd float32 that no one else writes meanwhile.
# Nothing is checked: it is for a runtime's own loop, once a layer and token.
apply_at: Callable[[Any, int, int, int], float] = lib.mien_program_apply_at


def symbols() -> list[str]:
    """The names of the functions that a hook needs of the runtime's library, in order."""
    count = lib.mien_hook_symbol_count()
    return [ffi.string(lib.mien_hook_symbol(i)).decode() for i in range(count)]


class Hook:
    """The llama.cpp hook of one context.

    addresses: of the functions named by `symbols()`, 0 for what the library lacks. path: a key of
    PATHS. Raises RuntimeNotSupported where that path can't be had. It must outlive the context.
    """

    def __init__(self, addresses: Iterable[int], n_layer: int, n_embd: int, path: str = "auto") -> None:
        pointers = ffi.new("void *[]", [ffi.cast("void *", address) for address in addresses])
        out = ffi.new("mien_hook **")
        check(lib.mien_hook_new(out, pointers, n_layer, n_embd, PATHS[path]))
        self._hook = ffi.gc(out[0], lib.mien_hook_free)
        self.n_layer, self.n_embd = n_layer, n_embd
        if path == "in-graph" and self.path != path:
            raise RuntimeNotSupported(
                f"the in-graph path can't be had with this llama.cpp: {self.reason}; use path='auto'"
            )
        self._capture: list[Any] = []  # buffers that C may write into until the next end

    @property
    def path(self) -> str:
        return PATH_NAMES[lib.mien_hook_path(self._hook)]

    @property
    def reason(self) -> str:
        """Why that path."""
        return cast(str, ffi.string(lib.mien_hook_reason(self._hook)).decode())

    @property
    def callback(self) -> int:
        """Address of the function for `cb_eval`."""
        return int(ffi.cast("uintptr_t", ffi.addressof(lib, "mien_hook_eval")))

    @property
    def user_data(self) -> int:
        """Address for `cb_eval_user_data`."""
        return int(ffi.cast("uintptr_t", self._hook))

    def swap(self, program: CompiledProgram | None) -> None:
        """The program for evaluations that begin from now on. Any thread, any time."""
        check(lib.mien_hook_swap(self._hook, program.handle if program else ffi.NULL))

    def begin(self, program: CompiledProgram | None) -> None:
        """Before a decode: `program` acts on all of it."""
        check(lib.mien_hook_begin(self._hook, program.handle if program else ffi.NULL))

    def end(self) -> int:
        """After a decode: the status, for `check`."""
        return cast(int, lib.mien_hook_end(self._hook))

    def capture(self, layers: Sequence[int], first: int, count: int, outputs: int) -> Floats:
        """For the next decode: collect the outputs of `layers` for its tokens first to first + count.

        outputs: address of the batch's `logits` flags. Returns the float32 array (layers, count,
        n_embd) that the decode fills; rows that it does not compute stay NaN.
        """
        buffer = np.full((len(layers), count, self.n_embd), np.nan, dtype=np.float32)
        ids = ffi.new("int32_t[]", list(layers))
        data = ffi.from_buffer("float[]", buffer, require_writable=True)
        flags = ffi.cast("int8_t *", outputs)
        lib.mien_hook_capture(self._hook, data, ids, len(layers), first, count, flags)
        self._capture = [buffer, data]
        return buffer

    def stop_capture(self) -> None:
        lib.mien_hook_capture(self._hook, ffi.NULL, ffi.NULL, 0, 0, 0, ffi.NULL)
        self._capture = []

    def applied(self, layer: int) -> tuple[int, float, str, bool]:
        """(rows steered, sum of their squared shifts, path, whether the layer was met)."""
        applied = lib.mien_hook_applied(self._hook, layer)
        return applied.rows, applied.moved, PATH_NAMES[applied.path], applied.met
