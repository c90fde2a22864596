"""Text in, tokens out: what mien's own commands need of a `llama_cpp.Llama`, attached or not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import llama_cpp
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
