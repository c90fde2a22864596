"""What one llama_context knows and another does not: carried over where it can be, refused where it can't be
seen.

llama.cpp can be asked for a context's KV cache and threads. It can't be asked which LoRA adapters were set
with llama_set_adapters_lora, for a control vector, or whether attention is causal. Whether there is any such
thing shows in what a context computes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np

from ..errors import RuntimeNotSupported
from ..vector import Floats

# Two contexts of one model compute the same on a CPU, bit for bit. On a device a callback may keep operations
# from being fused, which rounds otherwise.
_ROUNDING = 1e-2


def carry_settings(old: Any, new: Any, lora: tuple[Any, float] | None) -> None:
    """Give `new` the threads of `old`, and the adapter and scale `lora`. Raises RuntimeNotSupported."""
    api.llama_set_n_threads(new, api.llama_n_threads(old), api.llama_n_threads_batch(old))
    if lora is not None:
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(lora[0])
        if api.llama_set_adapters_lora(new, adapters, 1, (ctypes.c_float * 1)(lora[1])):
            raise RuntimeNotSupported("llama.cpp could not apply the model's LoRA again")


def read_state(context: Any) -> Any:
    """What its memory holds, as an array of bytes; None if it is empty."""
    memory = api.llama_get_memory(context)
    sequences = range(api.llama_n_seq_max(context))
    if memory is None or all(api.llama_memory_seq_pos_max(memory, i) < 0 for i in sequences):
        return None
    size = api.llama_state_get_size(context)
    state = (ctypes.c_uint8 * size)()
    written = api.llama_state_get_data(context, state, size)
    return (ctypes.c_uint8 * written).from_buffer(state)


def write_state(context: Any, state: Any) -> None:
    """What `read_state` gave. Raises RuntimeNotSupported."""
    if state is not None and api.llama_state_set_data(context, state, len(state)) != len(state):
        raise RuntimeNotSupported("llama.cpp could not carry the context's state over")


def require_alike(old: Any, new: Any, state: Any) -> None:
    """Raise RuntimeNotSupported if `old` computes something else than `new`, which is empty and stays so.

    state: that of `old`, which it has again after an error only; otherwise it is to be freed.
    """
    try:
        before, after = _probe(old), _probe(new)
        if before is not None and after is not None and not _alike(old, before, after):
            raise RuntimeNotSupported(
                "this context computes something else than a new one with the same parameters. Something was "
                "set on it that llama.cpp can't be asked for and that would be lost: LoRA adapters "
                "(llama_set_adapters_lora), a control vector (llama_set_adapter_cvec) or "
                "llama_set_causal_attn. Attach first, and set it afterwards"
            )
    except BaseException:
        write_state(old, state)
        raise


def _alike(context: Any, before: Floats, after: Floats) -> bool:
    if np.array_equal(before, after, equal_nan=True):
        return True
    if not api.llama_supports_gpu_offload():
        return False
    distance = np.linalg.norm((before - after).astype(np.float64))
    return bool(distance <= _ROUNDING * np.linalg.norm(before.astype(np.float64)))


def _probe(context: Any) -> Floats | None:
    """What it computes of three tokens: logits, or an embedding. None if it can't be said; its memory is
    empty then."""
    model, memory = api.llama_get_model(context), api.llama_get_memory(context)
    if memory is None or api.llama_model_has_encoder(model):
        return None
    n_vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
    count = min(3, int(api.llama_n_ubatch(context)), int(api.llama_n_ctx(context)))
    api.llama_memory_clear(memory, False)
    batch = api.llama_batch_init(count, 0, 1)
    try:
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i % max(n_vocab, 1), i, 1, 0
            batch.logits[i] = True
        if api.llama_decode(context, batch) != 0:
            return None
        if logits := api.llama_get_logits(context):
            found = np.ctypeslib.as_array(logits, shape=(count * n_vocab,))
        elif embedding := api.llama_get_embeddings_seq(context, 0) or api.llama_get_embeddings(context):
            found = np.ctypeslib.as_array(embedding, shape=(int(api.llama_model_n_embd(model)),))
        else:
            return None
        return np.array(found, dtype=np.float32)
    finally:
        api.llama_batch_free(batch)
        api.llama_memory_clear(memory, False)
        api.llama_perf_context_reset(context)
