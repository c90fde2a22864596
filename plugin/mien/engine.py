"""The C engine: the only importer of the compiled extension.

Keeps buffers alive for as long as C may read them, and turns status codes into exceptions.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ._engine import ffi, lib
from .errors import RecipeError, RuntimeNotSupported, SteeringNotApplied
from .vector import SITES, Floats, Vector

PATHS: dict[str, int] = {
    "auto": lib.MIEN_PATH_AUTO,
    "in-graph": lib.MIEN_PATH_IN_GRAPH,
    "post-compute": lib.MIEN_PATH_POST,
}
# How llama.cpp cuts a batch of several sequences: see mien_batch.h.
ORDERS: dict[str, int] = {
    name: getattr(lib, f"MIEN_ORDER_{name.upper()}") for name in ("none", "simple", "equal", "sequential")
}
PATH_NAMES = {number: name for name, number in PATHS.items()}

# The bare ValueErrors can only come from a bug in mien: everything above checks first.
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    lib.MIEN_ERR_MEMORY: (MemoryError, "mien's engine could not allocate"),
    lib.MIEN_ERR_SHAPE: (ValueError, "sizes must be positive, the same at one place, and those of the hook"),
    lib.MIEN_ERR_LAYER: (ValueError, "a layer that the model does not have, or layers that do not ascend"),
    lib.MIEN_ERR_SITE: (ValueError, "an unknown site"),
    lib.MIEN_ERR_OP: (ValueError, "an unknown operation"),
    lib.MIEN_ERR_NOT_FINITE: (
        RecipeError,
        "the recipe's coefficients and vectors add up to NaN or infinity; use smaller coefficients",
    ),
    lib.MIEN_ERR_SYMBOL: (
        RuntimeNotSupported,
        "this llama.cpp library lacks functions that mien needs; update llama-cpp-python",
    ),
    lib.MIEN_ERR_TENSOR: (
        SteeringNotApplied,
        "activations are not rows of float32 of the expected width, so they were left as they were",
    ),
    lib.MIEN_ERR_GATE: (RecipeError, "too many gates at one place: expected at most 32"),
    lib.MIEN_ERR_ROWS: (
        SteeringNotApplied,
        "llama.cpp put the tokens of the batch into its micro-batches in an order that mien does not know",
    ),
    lib.MIEN_ERR_NOT_MET: (SteeringNotApplied, "layers of the recipe were never evaluated"),
    lib.MIEN_ERR_NOT_APPLIED: (SteeringNotApplied, "rows were computed without being steered"),
}


def check(status: int) -> None:
    """Raise what `status` stands for; nothing for MIEN_OK."""
    if status != lib.MIEN_OK:
        kind, message = _ERRORS[status]
        raise kind(message)


OPERATIONS: dict[str, int] = {
    "ablate": lib.MIEN_OP_ABLATE,
    "clamp": lib.MIEN_OP_CLAMP,
    "edit": lib.MIEN_OP_EDIT,
    "scale": lib.MIEN_OP_SCALE,
    "add": lib.MIEN_OP_ADD,
    "add_keep_norm": lib.MIEN_OP_ADD_KEEP_NORM,
    "forbid": lib.MIEN_OP_FORBID,
    "force": lib.MIEN_OP_FORCE,
}
_SITES: dict[str, int] = {site: getattr(lib, f"MIEN_SITE_{site.upper()}") for site in SITES}
_FOREVER = (1 << 31) - 1
_NO_WINDOW = (0, math.inf, 0, math.inf)


class WindowLike(Protocol):
    """A window of tokens of a reply."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> float: ...
    @property
    def ramp(self) -> int: ...
    @property
    def decay(self) -> float: ...


class GateLike(Protocol):
    """A condition on a readout."""

    @property
    def vector(self) -> Vector: ...
    @property
    def above(self) -> float: ...
    @property
    def below(self) -> float: ...
    @property
    def hysteresis(self) -> float: ...
    @property
    def latch(self) -> bool: ...
    @property
    def key(self) -> str: ...


class DoseLike(Protocol):
    """What the engine reads of a dose."""

    @property
    def coefficient(self) -> float: ...
    @property
    def vector(self) -> Vector: ...
    @property
    def operation(self) -> str: ...
    @property
    def values(self) -> tuple[float, ...]: ...
    @property
    def window(self) -> WindowLike: ...
    @property
    def gates(self) -> Sequence[GateLike]: ...


class CompiledProgram:
    """An immutable program in C memory.

    doses: in an order in which those that fold are neighbours. Raises VectorError where a sum is not
    finite. Any thread may apply it.
    """

    def __init__(self, n_layer: int, doses: Sequence[DoseLike]) -> None:
        keep: list[Any] = []  # arrays that C reads during the call
        gates: dict[str, GateLike] = {}
        for dose in doses:
            if dose.gates:
                gates.update((gate.key, gate) for gate in dose.gates)
        numbers = {key: number for number, key in enumerate(gates)}
        c_gates = ffi.new("mien_gate[]", max(len(gates), 1))
        for c_gate, gate in zip(c_gates, gates.values()):
            _fill_readout(c_gate.readout, gate.vector, keep)
            c_gate.above, c_gate.below = gate.above, gate.below
            c_gate.hysteresis, c_gate.latch = gate.hysteresis, gate.latch
        terms = ffi.new("mien_term[]", max(len(doses), 1))
        for at, dose in enumerate(doses):
            _fill_term(terms, at, dose, keep)
            if dose.gates:
                terms[at].n_gates = len(dose.gates)
                terms[at].gates[0 : len(dose.gates)] = [numbers[gate.key] for gate in dose.gates]
        self._take(n_layer, terms, len(doses), c_gates, len(gates))

    def _take(self, n_layer: int, terms: Any, count: int, gates: Any, n_gates: int) -> None:
        out = ffi.new("mien_program **")
        check(lib.mien_program_new(out, n_layer, terms, count, gates, n_gates))
        self.handle = ffi.gc(out[0], lib.mien_program_release)
        self.n_layer = n_layer

    @cached_property
    def places(self) -> dict[str, tuple[int, ...]]:
        """{site: the layers that it acts on, ascending}, only sites where it does."""
        out = ffi.new("int32_t[]", self.n_layer)
        found = {}
        for site, number in _SITES.items():
            if count := lib.mien_program_layers(self.handle, number, out, self.n_layer):
                found[site] = tuple(out[0:count])
        return found

    @property
    def acts(self) -> bool:
        """Whether it does anything anywhere."""
        return any(lib.mien_program_has(self.handle, number) for number in _SITES.values())

    @property
    def layers(self) -> list[int]:
        """The layers that it acts on at the residual stream, ascending."""
        return list(self.places.get("residual", ()))

    @cached_property
    def stacks(self) -> bool:
        """Whether several operations act one after another at any place."""
        return bool(lib.mien_program_copy(self.handle))

    def width(self, site: str, layer: int) -> int:
        """How many floats a row has there, 0 where it does nothing."""
        return cast(int, lib.mien_program_width(self.handle, _SITES[site], layer))

    def direction(self, layer: int, operation: str, site: str = "residual") -> Floats | None:
        """What an operation without window and gates has at `layer`, float32 (width,), a copy; or None."""
        number, kind = _SITES[site], OPERATIONS[operation]
        found = lib.mien_program_direction(self.handle, number, layer, kind)
        if not found:
            return None
        return np.frombuffer(ffi.buffer(found, 4 * self.width(site, layer)), dtype=np.float32).copy()

    def apply(
        self, layer: int, rows: Floats, site: str = "residual", tokens: Tokens | None = None
    ) -> tuple[float, int]:
        """Steer `rows` (float32, C-contiguous, n x width) in place. tokens: what they are, all of a prompt.

        Returns the sum over the rows of the squared length that each moved by (of experts: how many logits
        were set), and how many rows were changed.
        """
        width = self.width(site, layer)
        if not width:
            return 0.0, 0
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"expected float32 rows of {width}, got {rows.dtype} {rows.shape}")
        if tokens is not None and len(tokens.array) < len(rows):
            raise ValueError(f"expected {len(rows)} tokens, got {len(tokens.array)}")
        ffi.from_buffer(rows, require_writable=True)
        said = tokens.address() if tokens is not None else 0
        return apply_tokens_at(self, site, layer, rows.ctypes.data, len(rows), said)


class SumOf:
    """Compiles sums of the same vectors with other coefficients."""

    def __init__(self, n_layer: int, vectors: Sequence[Vector]) -> None:
        self._n_layer, self._count, self._keep = n_layer, len(vectors), []
        self._terms = ffi.new("mien_term[]", max(len(vectors), 1))
        for number, vector in enumerate(vectors):
            template, arrays = _prepared(vector, "add")
            self._terms[number] = template[0]
            self._keep.append(arrays)
        self._size = ffi.sizeof(self._terms)

    def compiled(self, coefficients: Sequence[float]) -> CompiledProgram:
        """As CompiledProgram, of the sum with these coefficients."""
        terms = ffi.new("mien_term[]", max(self._count, 1))  # its own: any thread may compile
        ffi.memmove(terms, self._terms, self._size)
        for number, coefficient in enumerate(coefficients):
            terms[number].coefficient = coefficient
        made = CompiledProgram.__new__(CompiledProgram)
        made._take(self._n_layer, terms, self._count, ffi.NULL, 0)
        return made


# CompiledProgram.apply on memory that somebody else owns, at the residual stream of a prompt:
# apply_at(program.handle, layer, address, n_rows), the address being that of n_rows contiguous rows of
# float32 that no one else writes meanwhile. Returns the squared length alone. Nothing is checked: it is
# for a runtime's own loop, once a layer and token.
apply_at: Callable[[Any, int, int, int], float] = lib.mien_program_steer_at


def apply_tokens_at(
    program: CompiledProgram, site: str, layer: int, address: int, count: int, tokens: int
) -> tuple[float, int]:
    """As apply_at at any site, of any tokens: the address of Tokens, or 0 for a prompt."""
    shift = lib.mien_program_apply_at(program.handle, _SITES[site], layer, address, count, tokens)
    return shift.squared, shift.rows


class Memory:
    """What the gates of a program remember of one sequence."""

    def __init__(self, program: CompiledProgram) -> None:
        out = ffi.new("mien_memory **")
        check(lib.mien_memory_new(out, program.handle))
        self.handle = ffi.gc(out[0], lib.mien_memory_release)

    def reserve(self, replies: int) -> None:
        """Make room for the reply's tokens up to that number."""
        check(lib.mien_memory_reserve(self.handle, replies))


class Tokens:
    """What each of some rows is, for a program.

    replies: the number of its token in the reply, -1 for a prompt's. memories: of its sequence, one for
    each row or one for all; they are kept alive and made large enough.
    """

    def __init__(
        self, replies: Sequence[int], memories: Sequence[Memory | None] | Memory | None = None
    ) -> None:
        self.memories = memories
        self.array = ffi.new("mien_token[]", max(len(replies), 1))
        each = memories if isinstance(memories, Sequence) else [memories] * len(replies)
        for token, reply, memory in zip(self.array, replies, each):
            token.reply = reply
            if memory is not None:
                memory.reserve(reply + 1)
                token.memory = memory.handle

    def address(self, row: int = 0) -> int:
        return int(ffi.cast("uintptr_t", self.array + row))


class Probe:
    """The readouts of several vectors of the residual stream, read at once. Immutable.

    vectors: of one direction a layer. Raises VectorError where one can't be read.
    """

    def __init__(self, n_layer: int, vectors: Sequence[Vector]) -> None:
        keep: list[Any] = []
        readouts = ffi.new("mien_readout[]", max(len(vectors), 1))
        for readout, vector in zip(readouts, vectors):
            _fill_readout(readout, vector, keep)
        out = ffi.new("mien_probe **")
        check(lib.mien_probe_new(out, n_layer, readouts, len(vectors)))
        self.handle = ffi.gc(out[0], lib.mien_probe_release)
        self.count, self.width = len(vectors), vectors[0].width

    def read(self, layer: int, rows: Floats) -> Floats:
        """Of `rows` (float32, C-contiguous, n x width): float32 (n, vectors), NaN for no direction there."""
        if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected float32 rows of {self.width}, got {rows.dtype} {rows.shape}")
        out = np.full((len(rows), self.count), np.nan, dtype=np.float32)
        data = ffi.from_buffer("float[]", rows)
        lib.mien_probe_read(self.handle, layer, data, len(rows), ffi.from_buffer("float[]", out))
        return out

    def read_at(self, layer: int, address: int, count: int, out: int) -> None:
        """The same on rows and a result that somebody else owns, by their addresses."""
        lib.mien_probe_read_at(self.handle, layer, address, count, out)


def _floats(array: npt.NDArray[Any], keep: list[Any]) -> Any:
    found = ffi.from_buffer("float[]", array)
    keep.append(found)
    return found


def _doubles(array: npt.NDArray[np.float64], keep: list[Any]) -> Any:
    found = ffi.from_buffer("double[]", np.ascontiguousarray(array, dtype=np.float64))
    keep.append(found)
    return found


def _fill_readout(readout: Any, vector: Vector, keep: list[Any]) -> None:
    """Only the layers where there is something to read."""
    kept = np.flatnonzero(vector.rows.any(axis=-1))
    layers = ffi.from_buffer("int32_t[]", np.ascontiguousarray(vector.layer_ids[kept]))
    keep.append(layers)
    readout.width, readout.n_rows = vector.width, len(kept)
    readout.layers = layers
    readout.rows = _floats(np.ascontiguousarray(vector.readouts[kept, 0]), keep)
    readout.offsets = _doubles(vector.center[kept, 0], keep)


def _prepare(vector: Vector, operation: str) -> tuple[Any, list[Any]]:
    """A term of that vector without its dose and window, and the arrays that it points into."""
    keep: list[Any] = []
    subspace = operation in ("ablate", "clamp")
    term = ffi.new("mien_term *")
    layers = ffi.from_buffer("int32_t[]", vector.layer_ids)
    keep.append(layers)
    term.op, term.site = OPERATIONS[operation], _SITES[vector.site]
    term.width, term.rank = vector.width, vector.rank if subspace else 1
    term.n_rows, term.layers = len(vector.layers), layers
    term.rows = _floats(vector.basis if subspace else vector.rows, keep)
    term.window.stop, term.window.decay = _FOREVER, math.inf
    if operation == "edit":
        term.biases = _doubles(cast(Any, vector.bias), keep)
    return term, keep


def _prepared(vector: Vector, operation: str) -> tuple[Any, list[Any]]:
    """What `_prepare` makes, once: a recipe may be new before every token."""
    kept = vector.kept
    if operation not in kept:
        kept[operation] = _prepare(vector, operation)
    return cast("tuple[Any, list[Any]]", kept[operation])


def _fill_term(terms: Any, number: int, dose: DoseLike, keep: list[Any]) -> None:
    vector, operation = dose.vector, dose.operation
    template, arrays = _prepared(vector, operation)
    terms[number] = template[0]
    keep.append(arrays)
    term = terms[number]
    term.coefficient = dose.coefficient
    if operation == "clamp":
        values = np.array(dose.values) + vector.center
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by C
            targets = np.einsum("lr,lrw->lw", values, vector.spans.astype(np.float64)).astype(np.float32)
        term.targets = _floats(targets, keep)
    if operation == "edit":
        term.margin = dose.values[0]
    window = dose.window
    if (window.start, window.stop, window.ramp, window.decay) != _NO_WINDOW:
        term.window.start, term.window.ramp = window.start, window.ramp
        term.window.stop = int(min(window.stop, _FOREVER))
        term.window.decay = window.decay


def symbols() -> list[str]:
    """The names of the functions that a hook needs of the runtime's library, in order."""
    count = lib.mien_hook_symbol_count()
    return [ffi.string(lib.mien_hook_symbol(i)).decode() for i in range(count)]


Acting: TypeAlias = "tuple[CompiledProgram | None, CompiledProgram | None, int]"
_STRAYS = 64


class SettingLike(Protocol):
    """What acts on each sequence of a context: on what it is given, on its reply, and a generation.

    One for all sequences, or one for each. Gates keep their state while the generation stays the same.
    """

    @property
    def acting(self) -> Sequence[Acting]: ...


class Stray(NamedTuple):
    """Tokens that llama.cpp evaluated without a decode of ours: see mien_stray.

    position: of the first, -1 if it could not be read. given: so many from the first on are no reply's.
    """

    position: int
    rows: int
    given: int
    setting: SettingLike | None


def _c_acting(setting: SettingLike) -> Any:
    acting = ffi.new("mien_acting[]", len(setting.acting))
    for one, (prompt, response, generation) in zip(acting, setting.acting):
        one.prompt = prompt.handle if prompt else ffi.NULL
        one.response = response.handle if response else ffi.NULL
        one.generation = generation
    return acting


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
        self._counts: list[Any] = []
        self.setting: SettingLike | None = None
        self._swapping = threading.RLock()  # which a signal handler may enter again
        self._numbers = itertools.count(1)
        self._strays = ffi.new("mien_stray[]", _STRAYS)
        self._settings: dict[int, SettingLike] = {}  # by number, those that may act or have acted last

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

    # ---- the context's batches and sites ----

    def set_batching(
        self, fields: Mapping[str, int], n_sequences: int, n_ubatch: int, orders: Sequence[str]
    ) -> None:
        """How batches look, and how the context cuts them. Nothing is set afterwards.

        fields: where a llama_batch has its fields, in bytes, by name. orders: keys of ORDERS, the rule and
        then what is done where that can't be kept to.
        """
        layout = ffi.new("mien_batch_layout *", dict(fields))
        numbers = [ORDERS[order] for order in [*orders, "none"]]
        batching = ffi.new("mien_batching *", (n_sequences, n_ubatch, numbers[:2]))
        check(lib.mien_hook_set_batching(self._hook, layout, batching))

    def scout(self) -> None:
        """Take down the nodes of what is evaluated until `nodes`."""
        lib.mien_hook_scout(self._hook)

    def nodes(self) -> list[int]:
        """The addresses of those ggml_tensors in order, good until the next evaluation."""
        out = ffi.new("void *const **")
        count = lib.mien_hook_nodes(self._hook, out)
        return [int(ffi.cast("uintptr_t", out[0][i])) for i in range(count)]

    def source(self, node: int, i: int) -> int:
        """The address of a node's source 0 or 1; 0 for none, or where the layout did not verify."""
        found = lib.mien_hook_source(self._hook, ffi.cast("void *", node), i)
        return int(ffi.cast("uintptr_t", found))

    def locate(
        self, site: str, layer: int, width: int, stem: str = "", weight: int = 0, tail: int = 0
    ) -> None:
        """Where (site, layer) is: the node "stem-layer", or the product with the tensor at `weight`."""
        pointer = ffi.cast("void *", weight)
        check(lib.mien_hook_locate(self._hook, _SITES[site], layer, width, stem.encode(), pointer, tail))

    # ---- what acts ----

    def swap(self, setting: SettingLike, expected: SettingLike | None) -> bool:
        """Have `setting` act in evaluations that begin from now on, if `expected` is what was swapped in
        last.

        Any thread, any time. Returns whether it did: if another thread was first, nothing has changed. What
        was swapped in last is `setting`, and what the last decode went by `acted`: there is no other record.
        """
        acting = _c_acting(setting)
        with self._swapping:
            if self.setting is not expected:
                return False
            self.setting = setting
            try:
                self._hand_over(setting, acting)
            except BaseException:
                self.setting = expected
                raise
            # A signal handler may have set something else in this thread meanwhile: the record tells what is
            # last.
            while self.setting is not setting:
                setting = self.setting
                self._hand_over(setting, _c_acting(setting))
        return True

    def _hand_over(self, setting: SettingLike, acting: Any) -> None:
        number = next(self._numbers)
        self._settings[number] = setting  # first: a decode may take it at once
        status = lib.mien_hook_swap(self._hook, acting, len(setting.acting), number)
        if status:
            del self._settings[number]
        check(status)

    @property
    def acted(self) -> SettingLike | None:
        """What the last `begin`, or graph outside of begin and end, went by; None before there was any."""
        return self._settings.get(lib.mien_hook_acted(self._hook))

    def _forget_older(self) -> None:
        """Settings before the one that acts can't act any more."""
        number = lib.mien_hook_acted(self._hook)
        with self._swapping:
            for older in [other for other in self._settings if other < number]:
                self._settings.pop(older, None)

    def tell_reply(self, sequence: int, position: int) -> None:
        """From which position on tokens are the reply; -1: work it out from the batches."""
        lib.mien_hook_tell_reply(self._hook, sequence, position)

    def shift(self, sequence: int, by: int) -> None:
        """The cache's tokens of a sequence were moved by that many positions."""
        lib.mien_hook_shift(self._hook, sequence, by)

    def reply(self, sequence: int) -> int:
        """The position of its reply's first token."""
        return cast(int, lib.mien_hook_reply(self._hook, sequence))

    def next(self, sequence: int) -> int:
        """The position at which its next token is looked for."""
        return cast(int, lib.mien_hook_next(self._hook, sequence))

    def silent(self, sequence: int) -> bool:
        """Whether its last token asked for no logits, so that the next one is given."""
        return cast(bool, lib.mien_hook_silent(self._hook, sequence))

    def place(self, sequence: int, reply: int, next: int, silent: bool) -> None:
        """What the runtime keeps of it was moved, or loaded: see mien_hook_place."""
        lib.mien_hook_place(self._hook, sequence, reply, next, silent)

    def rewind(self, sequence: int, position: int) -> None:
        """What the runtime kept of it from `position` on is gone."""
        lib.mien_hook_rewind(self._hook, sequence, position)

    def begin_anew(self, sequence: int) -> None:
        """Its gates remember nothing."""
        check(lib.mien_hook_begin_anew(self._hook, sequence))

    def begin(self, batch: int) -> int:
        """Before a decode of the llama_batch at that address: the status, for `check`."""
        status = cast(int, lib.mien_hook_begin(self._hook, batch))
        if len(self._settings) > 1:
            self._forget_older()
        return status

    def end(self) -> int:
        """After a decode: the status, for `check`."""
        return cast(int, lib.mien_hook_end(self._hook))

    def threads(self, count: int) -> None:
        """How many threads llama.cpp computes with, at most."""
        lib.mien_hook_threads(self._hook, count)

    @property
    def continued(self) -> bool:
        """Whether a reply continued with several tokens in the last decode, without being told."""
        return cast(bool, lib.mien_hook_continued(self._hook))

    @property
    def unsteered(self) -> int:
        """How many graphs ran outside of begin and end that could not be steered."""
        return cast(int, lib.mien_hook_unsteered(self._hook))

    def strays(self) -> list[Stray] | None:
        """What was evaluated outside of begin and end since the last call; None if too much to note."""
        out = self._strays  # not made here: this runs once a token
        count = lib.mien_hook_strays(self._hook, out, _STRAYS)
        if not count:
            return []
        if count < 0:
            return None
        known = self._settings.get
        return [Stray(one.position, one.rows, one.given, known(one.id)) for one in out[0:count]]

    # ---- what is read ----

    def capture(self, layers: Sequence[int], first: int, count: int) -> Floats:
        """For the next decode: collect the outputs of `layers` for its tokens first to first + count.

        Returns the float32 array (layers, count, n_embd) that the decode fills; rows that it does not
        compute stay NaN.
        """
        buffer = np.full((len(layers), count, self.n_embd), np.nan, dtype=np.float32)
        ids = ffi.new("int32_t[]", list(layers))
        data = ffi.from_buffer("float[]", buffer, require_writable=True)
        lib.mien_hook_capture(self._hook, data, ids, len(layers), first, count)
        self._capture = [buffer, data]
        return buffer

    def stop_capture(self) -> None:
        lib.mien_hook_capture(self._hook, ffi.NULL, ffi.NULL, 0, 0, 0)
        self._capture = []

    def watch(self, probe: Probe | None, before: int = 0, after: int = 0, count: int = 0) -> None:
        """Read block outputs with `probe` in the decodes that begin from now on.

        before, after: addresses of float32 (count, n_layer, vectors), for decodes of at most `count` tokens;
        whoever calls keeps them until something else is read.
        """
        pointers = (ffi.cast("float *", address) for address in (before, after))
        handle = probe.handle if probe else ffi.NULL
        check(lib.mien_hook_watch(self._hook, handle, *pointers, count))

    def tokens(self, count: int) -> tuple[list[int], list[int]]:
        """Of a decode that was watched: each token's sequence, and its number in the reply or -1."""
        sequences, replies = ffi.new("int32_t[]", count), ffi.new("int32_t[]", count)
        count = min(lib.mien_hook_tokens(self._hook, sequences, replies, count), count)
        return list(sequences[0:count]), list(replies[0:count])

    def count(self, counts: npt.NDArray[np.int64] | None, used: int = 0, stem: str = "") -> None:
        """Count in `counts`, int64 (n_layer, n_expert), how often each expert is chosen; None: no longer."""
        data = ffi.NULL if counts is None else ffi.from_buffer("int64_t[]", counts, require_writable=True)
        n_expert = 0 if counts is None else counts.shape[1]
        check(lib.mien_hook_count(self._hook, data, n_expert, used, stem.encode()))
        self._counts = [counts, data]  # only now: C may have written into the others up to here

    def applied(self, site: str, layer: int) -> tuple[int, float, str, bool]:
        """(rows changed, sum of their squared shifts, path, whether the place was met)."""
        applied = lib.mien_hook_applied(self._hook, _SITES[site], layer)
        return applied.rows, applied.moved, PATH_NAMES[applied.path], applied.met
