"""Text in, tokens out: what mien's own commands need of a `llama_cpp.Llama`, attached or not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as api
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import MienError, ModelNotFound


def load_llama(path: Path, *, n_ctx: int = 2048, n_threads: int | None = None, **options: Any) -> Any:
    """A quiet `llama_cpp.Llama` of the GGUF file at `path`, as mien's own commands use it.

    n_threads: for decoding and prefill alike, all processors by default. Raises ModelNotFound where the
    file is missing or no model.
    """
    threads = n_threads or os.cpu_count()
    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such file")
    try:
        return llama_cpp.Llama(
            str(path), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False, **options
        )
    except ValueError as error:
        raise ModelNotFound(f"{path}: llama.cpp can't load it as a model ({error})") from error


def raw_tokens(llm: Any, text: str) -> list[int]:
    """`text` as it stands, with the tokenizer's own beginning of sequence where the model wants one."""
    tokens: list[int] = llm.tokenize(text.encode(), add_bos=bool(llm._model.add_bos_token()), special=True)
    return tokens


@lru_cache(maxsize=8)
def _formatter(template: str, bos: str, eos: str) -> Jinja2ChatFormatter:
    """Compiled once a model: extraction renders a thousand texts."""
    return Jinja2ChatFormatter(template=template, bos_token=bos, eos_token=eos)


def chat_tokens(llm: Any, messages: Sequence[Any], opening: str = "") -> list[int]:
    """`messages` in the model's chat template, up to and with the opening of the reply.

    Raises MienError where the model has no template.
    """
    template = llm.metadata.get("tokenizer.chat_template")
    if template is None:
        raise MienError("this model has no chat template: use --raw (raw=True)")
    bos, eos = (llm._model.token_get_text(t) if t >= 0 else "" for t in (llm.token_bos(), llm.token_eos()))
    try:
        prompt = _formatter(template, bos, eos)(messages=list(messages)).prompt
    except ValueError as error:  # what the formatter makes of a template's raise_exception
        raise MienError(f"this model's chat template does not take these messages: {error}") from error
    add_bos = bool(llm._model.add_bos_token()) and not (bos and prompt.startswith(bos))
    tokens: list[int] = llm.tokenize((prompt + opening).encode(), add_bos=add_bos, special=True)
    return tokens


def greedy_reply(llm: Any, tokens: Sequence[int], limit: int) -> list[int]:
    """The most probable continuation, up to `limit` tokens or the end of the turn."""
    reply: list[int] = []
    for token in llm.generate(tokens, temp=0.0):
        if len(reply) == limit or api.llama_vocab_is_eog(llm._model.vocab, token):
            break
        reply.append(token)
    return reply


def log_probabilities(llm: Any, tokens: Sequence[int], reply: Sequence[int]) -> npt.NDArray[np.float64]:
    """Natural log-probability of each token of `reply` after `tokens`, as the model is set now.

    Evaluated from an empty context, which is left empty. float64 (len(reply),). Raises ValueError
    where it does not fit into one batch.
    """
    everything = [*tokens, *reply]
    if len(everything) > min(llm.n_batch, llm.n_ctx()):
        raise ValueError(f"expected at most {min(llm.n_batch, llm.n_ctx())} tokens, got {len(everything)}")
    llm.reset()
    llm._ctx.kv_cache_clear()
    llm._batch.set_batch(batch=everything, n_past=0, logits_all=False)
    for i in range(len(everything)):
        llm._batch.batch.logits[i] = i >= len(tokens) - 1
    llm._ctx.decode(llm._batch)
    count = len(reply) + 1
    logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(count, llm.n_vocab()))[:-1].astype(
        np.float64
    )
    llm.reset()
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(reply)), list(reply)]
    result: npt.NDArray[np.float64] = chosen - np.log(np.exp(shifted).sum(axis=1))
    return result
