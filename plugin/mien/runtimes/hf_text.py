"""Text in, text out with transformers: what mien's own commands need of a model and its tokenizer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from ..errors import MienError, MissingExtra, ModelFileError, ModelNotFound, PromptTooLong


def load_hf(path: Path, *, dtype: str = "float32", **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, which transformers dequantises, or of a model's folder.

    dtype: a torch dtype's name. Nothing is downloaded. Raises ModelNotFound if files are missing,
    ModelFileError, with its reason, if transformers can't load them, MissingExtra if accelerate is not
    installed.
    """
    transformers.utils.logging.set_verbosity_error()
    source, file = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    options = {"local_files_only": True, **file, **options}
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        with bars:
            tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
            model = AutoModelForCausalLM.from_pretrained(str(source), dtype=getattr(torch, dtype), **options)
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # how transformers says that accelerate is missing
        raise MissingExtra("accelerate", "hf") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        problem = f"transformers can't load it as a model ({error})"
        if path.is_dir() and not isinstance(error, SafetensorError):  # a file in it is missing
            raise ModelNotFound(f"{path}: {problem}") from error
        raise ModelFileError(path, problem) from error
    return model.eval(), tokenizer


def chat_inputs(tokenizer: Any, messages: Sequence[Any]) -> Any:
    """`messages` in the model's chat template, up to the beginning of the reply: int64 (1, tokens).

    Raises MienError where the model has no template.
    """
    if tokenizer.chat_template is None:
        raise MienError("this model has no chat template: use --raw (raw=True)")
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise MienError(f"this model's chat template does not take these messages: {error}") from error
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def stream(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 1,
    n_ctx: int | None = None,
) -> Iterator[str]:
    """The continuation of `inputs` (int64 (1, tokens)), piece by piece; closing it stops the model.

    temperature: 0 takes the most probable token; else sampling as llama-cpp-python does it by default
    (top_k 40, top_p 0.95, min_p 0.05). Raises PromptTooLong if the prompt leaves no room in n_ctx, MienError
    if it has no token.
    """
    length = inputs.shape[1]
    room = max_tokens if n_ctx is None else min(max_tokens, n_ctx - length)
    if n_ctx is not None and room < 1:
        raise PromptTooLong(length, n_ctx - 1)
    if not length:
        raise MienError("the prompt has no token")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()
    torch.manual_seed(seed)
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(
            model.generate,
            input_ids=inputs.to(model.device),
            attention_mask=torch.ones_like(inputs, device=model.device),
            max_new_tokens=room,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            streamer=streamer,
            stopping_criteria=[_Until(stopped)],
            **(
                sampling
                if temperature > 0
                else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            ),
        )
        work.add_done_callback(lambda _: streamer.end())  # after an error nobody else would
        try:
            yield from streamer
        finally:
            stopped.set()
        work.result()


class _Until(transformers.StoppingCriteria):  # type: ignore[misc]  # its module is not followed
    """Stops generation when the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
