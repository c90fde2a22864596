"""Low-level llama.cpp contexts, and batches of several sequences for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import llama_cpp.llama_cpp as api
import mien
import numpy as np
from llama_cpp._logger import set_verbose
from mien.vector import Floats, Vector

MOST = 256  # tokens of a batch


class Row(NamedTuple):
    """A token of a batch. wanted: its logits are asked for."""

    token: int
    position: int
    sequences: tuple[int, ...] = (0,)
    wanted: bool = True


# By (sequence, position).
Logits: TypeAlias = "dict[tuple[int, int], Floats]"


def load_model(path: Path) -> Any:
    api.llama_backend_init()
    set_verbose(False)
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    assert model
    return model


def parameters_for(
    n_seq_max: int = 1, *, unified: bool = False, n_ubatch: int = MOST, n_threads: int = 1, **more: Any
) -> Any:
    """Parameters of a context in which a row's floats do not depend on the rows beside it.

    That is so of a model as tiny.QUANTISED, where attention is computed by itself for each row: as llama.cpp
    does where the cache is quantised, too.
    """
    parameters = api.llama_context_default_params()
    parameters.n_ctx = 256 * n_seq_max
    parameters.n_seq_max, parameters.kv_unified = n_seq_max, unified
    parameters.n_batch, parameters.n_ubatch = MOST, n_ubatch
    parameters.n_threads = parameters.n_threads_batch = n_threads
    parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
    parameters.type_k = parameters.type_v = api.GGML_TYPE_Q8_0
    for name, value in more.items():
        setattr(parameters, name, value)
    return parameters


class Contexts:
    """Makes contexts of one model, and frees them."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load_model(path)
        self.made: list[Any] = []

    def make(self, n_seq_max: int = 1, *, hooked: bool = True, path: str = "auto", **options: Any) -> Any:
        """hooked: by mien.init_from_model, else by llama.cpp alone."""
        parameters = parameters_for(n_seq_max, **options)
        if hooked:
            context = mien.init_from_model(self.model, parameters, path=path)
        else:
            context = api.llama_init_from_model(self.model, parameters)
        assert context
        self.made.append(context)
        return context

    def free(self, context: Any) -> None:
        self.made.remove(context)
        mien.free(context)

    def free_all(self) -> None:
        for context in list(self.made):
            self.free(context)

    def close(self) -> None:
        self.free_all()
        api.llama_model_free(self.model)


def new_batch(rows: Sequence[Row]) -> Any:
    """A llama_batch of `rows`; free it with api.llama_batch_free."""
    batch = api.llama_batch_init(max(len(rows), 1), 0, max(len(row.sequences) for row in rows))
    batch.n_tokens = len(rows)
    for i, row in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = row.token, row.position, row.wanted
        batch.n_seq_id[i] = len(row.sequences)
        for j, sequence in enumerate(row.sequences):
            batch.seq_id[i][j] = sequence
    return batch


def logits_of(context: Any, i: int) -> Floats:
    """Of token `i` of the last batch."""
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    return np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), shape=(n_vocab,)).copy()


def evaluate(context: Any, decode: Callable[[Any], int] | None, rows: Sequence[Row]) -> Logits:
    """One batch. decode: that of a Steering; None: llama_decode itself."""
    batch = new_batch(rows)
    try:
        assert (decode(batch) if decode else api.llama_decode(context, batch)) == 0
    finally:
        api.llama_batch_free(batch)
    return {
        (row.sequences[0], row.position): logits_of(context, i) for i, row in enumerate(rows) if row.wanted
    }


def evaluate_all(
    context: Any, decode: Callable[[Any], int] | None, batches: Iterable[Sequence[Row]]
) -> Logits:
    found: Logits = {}
    for rows in batches:
        found.update(evaluate(context, decode, rows))
    return found


def clear(context: Any) -> None:
    api.llama_memory_clear(api.llama_get_memory(context), True)


def differing(a: Logits, b: Logits) -> list[tuple[int, int]]:
    """The tokens whose logits are not the same bits."""
    assert a.keys() == b.keys()
    return [key for key in sorted(a) if not np.array_equal(a[key], b[key])]


def own_control_vector(context: Any, vector: Vector, n_layer: int) -> None:
    """Set it through llama.cpp's own call, with a row for every layer so that none is stale."""
    rows = np.zeros((n_layer - 1, vector.width), dtype=np.float32)
    for layer, row in vector.directions.items():
        rows[layer - 1] = row
    data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert api.llama_set_adapter_cvec(context, data, rows.size, vector.width, 1, n_layer - 1) == 0


def pointer_of(context: Any) -> int:
    return int(ctypes.cast(context, ctypes.c_void_p).value or 0)
