"""Text in, tokens out: what mien's own commands need of a `llama_cpp.Llama`, attached or not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as api
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import MienError, ModelNotFound

FLOAT32_SHARE = 0.25  # of the memory, that a copy of a model in float32 may take


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


@contextmanager
def in_float32(path: Path) -> Iterator[Path]:
    """A copy of the model file at `path`, its weights in float32, until the end of the context.

    They are the same weights: what quantisation rounds was rounded before. On a CPU llama.cpp takes half the
    time for many texts then, and rounds no activations. It is the file itself where its weights have 16 bits
    or more, or the copy would take more than FLOAT32_SHARE of the memory. Raises as `load_llama`.
    """
    model = load_llama(path, n_ctx=64)
    count, size = api.llama_model_n_params(model._model.model), api.llama_model_size(model._model.model)
    model.close()
    if size >= 2 * count or 4 * count > FLOAT32_SHARE * _memory():
        yield path
        return
    how = api.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = api.LLAMA_FTYPE_ALL_F32, True, os.cpu_count() or 1
    with TemporaryDirectory(prefix="mien-") as folder:
        copy = Path(folder) / path.name
        if status := api.llama_model_quantize(str(path).encode(), str(copy).encode(), ctypes.byref(how)):
            raise MienError(f"{path}: llama.cpp could not write its weights in float32 (status {status})")
        yield copy


def _memory() -> int:
    """Bytes of memory of this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on Windows
        return 0


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
