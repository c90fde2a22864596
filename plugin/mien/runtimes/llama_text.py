"""Text in, tokens out: what mien's own commands need of a `llama_cpp.Llama`, attached or not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import llama_cpp
import llama_cpp.llama_cpp as api
from jinja2.exceptions import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, get_chat_completion_handler

from ..errors import ContextNotMade, MienError, ModelFileError, ModelNotFound
from ..threads import default_threads

LARGE_CONTEXT = 1 << 17  # tokens from which memory is checked before llama.cpp asks for it
_ERROR = 4  # ggml_log_level
FLOAT32_SHARE = 0.25  # of the memory, that a copy of a model in float32 may take


def load_llama(path: Path, *, n_ctx: int = 2048, n_threads: int | None = None, **options: Any) -> Any:
    """A quiet `llama_cpp.Llama` of the GGUF file at `path`, as mien's own commands use it.

    n_ctx: llama.cpp rounds it up, and then llama-cpp-python would overrun arrays of its own: no prompt may
    have more. n_threads: for decoding and prefill alike, by default half of the processors.

    Raises ModelNotFound if the file is missing, ModelFileError if llama.cpp can't load it, ContextNotMade if
    it can't make the context.
    """
    threads = n_threads or default_threads()
    if not path.is_file():
        raise ModelNotFound(f"{path}: there is no such file")
    if n_ctx > LARGE_CONTEXT:
        _require_memory(path, n_ctx)
    with errors_logged() as logged:
        try:
            llm = llama_cpp.Llama(
                _Path(path), n_ctx=n_ctx, n_threads=threads, n_threads_batch=threads, verbose=False, **options
            )
        except TemplateError as error:
            raise ModelFileError(path, f"its chat template can't be read ({error})") from error
        except ValueError as error:
            cause = "; ".join(dict.fromkeys(logged)) or str(error)
            if "llama_context" in str(error):
                raise ContextNotMade(path, n_ctx, cause) from error
            raise ModelFileError(path, f"llama.cpp can't load it as a model ({cause})") from error
    llm._n_ctx = min(llm._n_ctx, n_ctx)
    return llm


def _require_memory(path: Path, n_ctx: int) -> None:
    """Raises ContextNotMade if the context's keys and values would take more than the machine's memory.

    The system may promise memory that it does not have, and end the process once it is used. Within the
    context that the model was trained with it is llama.cpp's own to judge: it may need less than this.
    """
    llm = load_llama(path, n_ctx=64)
    model = llm._model.model
    n_head, trained = api.llama_model_n_head(model), api.llama_model_n_ctx_train(model)
    width = api.llama_model_n_head_kv(model) * api.llama_model_n_embd(model) // max(n_head, 1)
    need, memory = 4 * n_ctx * api.llama_model_n_layer(model) * width, _memory()
    llm.close()
    if n_ctx > trained and memory and 2 * need > memory:  # while mien attaches there are two
        cause = f"its keys and values take {need / 1e9:.0f} GB, and this machine has {memory / 1e9:.0f} GB"
        raise ContextNotMade(path, n_ctx, f"{cause}; the model was trained with {trained} tokens")


class _Path(str):
    """A path that llama-cpp-python passes on in the bytes that the file system has for it.

    It encodes text as UTF-8, which a name of other bytes, or any in a locale of ASCII, does not survive.
    """

    def __new__(cls, path: Path) -> _Path:
        return super().__new__(cls, path)

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """The lines that llama.cpp logs as errors meanwhile. No line is printed: llama-cpp-python prints the
    warnings, and leaves the errors out."""
    lines: list[str] = []

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def note(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR and (line := text.decode(errors="replace").strip()):
            lines.append(line)

    before, data = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    api.llama_log_set(note, None)
    try:
        yield lines
    finally:
        api.llama_log_set(before, data)


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
    how.ftype, how.allow_requantize, how.nthread = api.LLAMA_FTYPE_ALL_F32, True, default_threads()
    with TemporaryDirectory(prefix="mien-") as folder:
        copy = Path(folder) / path.name
        if status := api.llama_model_quantize(os.fsencode(path), os.fsencode(copy), ctypes.byref(how)):
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
    except (ValueError, TemplateError) as error:  # ValueError: a template's raise_exception
        raise MienError(f"this model's chat template does not take these messages: {error}") from error
    add_bos = bool(llm._model.add_bos_token()) and not (bos and prompt.startswith(bos))
    tokens: list[int] = llm.tokenize((prompt + opening).encode(), add_bos=add_bos, special=True)
    return tokens


def prompt_length(llm: Any, messages: Sequence[Any]) -> int:
    """How many tokens `llm.create_chat_completion` makes of `messages`, give or take those that begin and end
    every text. Raises MienError if the chat template does not take them."""
    handler = llm.chat_handler or llm._chat_handlers.get(llm.chat_format)
    handler = handler or get_chat_completion_handler(llm.chat_format)
    prompt = _Prompt(llm)
    try:
        handler(llama=cast(Any, prompt), messages=list(messages), stream=True)
    except (ValueError, TemplateError) as error:  # as in chat_tokens
        raise MienError(f"this model's chat template does not take these messages: {error}") from error
    return prompt.length


class _Prompt:
    """Stands in for a Llama in a chat handler, and takes the prompt that the handler makes of messages."""

    def __init__(self, llm: Any) -> None:
        self._llm, self.length = llm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Sequence[int], **_: Any) -> Iterator[Any]:
        self.length = len(prompt)
        return iter(())
