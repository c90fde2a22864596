"""What one llama_context knows and another does not: carried over where it can be, refused where it can't be
seen.

llama.cpp can be asked for a context's KV cache and threads. It can't be asked which LoRA adapters were set
with llama_set_adapters_lora, for a control vector, or whether attention is causal. Whether there is any such
thing shows in what a context computes.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as api
import numpy as np

from ..errors import RuntimeNotSupported
from ..vector import Floats

# Two contexts of one model compute the same on a CPU, bit for bit. On a device a callback may keep operations
# from being fused, which rounds otherwise.
_ROUNDING = 1e-2


def take_over(old: Any, new: Any, lora: tuple[Any, float] | None) -> None:
    """Put `new`, which is empty, into the state of `old`: memory, threads, the adapter and scale `lora`, the
    logits that the next token is drawn from, and whether it gives embeddings.

    Raises RuntimeNotSupported if that can't be done, or if `old` computes something else than `new`; `old` is
    then as it was. Otherwise its memory is gone.
    """
    api.llama_set_n_threads(new, api.llama_n_threads(old), api.llama_n_threads_batch(old))
    if lora is not None:
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(lora[0])
        if api.llama_set_adapters_lora(new, adapters, 1, (ctypes.c_float * 1)(lora[1])):
            raise RuntimeNotSupported("llama.cpp could not apply the model's LoRA again")
    state, logits = _read_state(old), _last_logits(old)
    try:
        _require_alike(old, new)
        _write_state(new, state)
    except BaseException:
        _write_state(old, state)
        _put_logits(old, logits)
        raise
    _put_logits(new, logits)


def _read_state(context: Any) -> Any:
    """What its memory holds, as an array of bytes; None if it is empty."""
    memory = api.llama_get_memory(context)
    sequences = range(api.llama_n_seq_max(context))
    if memory is None or all(api.llama_memory_seq_pos_max(memory, i) < 0 for i in sequences):
        return None
    size = api.llama_state_get_size(context)
    state = (ctypes.c_uint8 * size)()
    written = api.llama_state_get_data(context, state, size)
    return (ctypes.c_uint8 * written).from_buffer(state)


def _write_state(context: Any, state: Any) -> None:
    """What `_read_state` gave. Raises RuntimeNotSupported."""
    if state is not None and api.llama_state_set_data(context, state, len(state)) != len(state):
        raise RuntimeNotSupported("llama.cpp could not carry the context's state over")


def _last_logits(context: Any) -> Floats | None:
    """Those from which a token would be drawn now, float32 (n_vocab,); None if there are none."""
    if api.llama_get_logits(context) and (row := api.llama_get_logits_ith(context, -1)):
        return np.array(np.ctypeslib.as_array(row, shape=(_n_vocab(context),)))
    return None


def _require_alike(old: Any, new: Any) -> None:
    """Raise RuntimeNotSupported if they don't compute the same. Both are empty then."""
    before, after = _probe(old), _probe(new)
    if before.embeds != after.embeds:
        api.llama_set_embeddings(new, before.embeds)
        after = _probe(new)
    if before.found is not None and after.found is not None and not _alike(before.found, after.found):
        raise RuntimeNotSupported(
            "this context computes something else than a new one with the same parameters. Something was "
            "set on it that llama.cpp can't be asked for and that would be lost: LoRA adapters "
            "(llama_set_adapters_lora), a control vector (llama_set_adapter_cvec) or "
            "llama_set_causal_attn. Attach first, and set it afterwards"
        )


def _put_logits(context: Any, logits: Floats | None) -> None:
    """In the place of those of `_probe`, from which nobody is to draw: NaN if there were none."""
    if not (first := api.llama_get_logits(context)):
        return
    for to in (first, api.llama_get_logits_ith(context, -1)):  # one row, or of embeddings all tokens'
        if to:
            np.ctypeslib.as_array(to, shape=(_n_vocab(context),))[:] = np.nan if logits is None else logits


def _n_vocab(context: Any) -> int:
    return int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context))))


def _alike(before: Floats, after: Floats) -> bool:
    if np.array_equal(before, after, equal_nan=True):
        return True
    if not api.llama_supports_gpu_offload():
        return False
    distance = np.linalg.norm((before - after).astype(np.float64))
    return bool(distance <= _ROUNDING * np.linalg.norm(before.astype(np.float64)))


class _Probed(NamedTuple):
    """found: logits, or else an embedding; None if neither is to be had. embeds: whether embeddings are
    computed."""

    found: Floats | None
    embeds: bool


def _probe(context: Any) -> _Probed:
    """What `context` computes of three tokens; its memory is empty then."""
    model, memory = api.llama_get_model(context), api.llama_get_memory(context)
    if memory is None or api.llama_model_has_encoder(model):
        return _Probed(None, False)
    n_vocab = _n_vocab(context)
    count = min(3, int(api.llama_n_ubatch(context)), int(api.llama_n_ctx(context)))
    api.llama_memory_clear(memory, False)
    batch = api.llama_batch_init(count, 0, 1)
    try:
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i % max(n_vocab, 1), i, 1, 0
            batch.logits[i] = i == count - 1  # the last token's tell, since they go by the others
        if api.llama_decode(context, batch) != 0:
            return _Probed(None, False)
        embedding = api.llama_get_embeddings_seq(context, 0) or api.llama_get_embeddings(context)
        if found := api.llama_get_logits(context):
            found = np.array(np.ctypeslib.as_array(found, shape=(n_vocab,)), dtype=np.float32)
        elif embedding:
            size = int(api.llama_model_n_embd(model))
            found = np.array(np.ctypeslib.as_array(embedding, shape=(size,)), dtype=np.float32)
        return _Probed(found if isinstance(found, np.ndarray) else None, bool(embedding))
    finally:
        api.llama_batch_free(batch)
        api.llama_memory_clear(memory, False)
        api.llama_perf_context_reset(context)
