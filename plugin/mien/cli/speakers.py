"""A model that answers, and its steering: the same for `mien run` and `mien chat` in every runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import click

from ..errors import MienError, PromptTooLong
from .progress import noticed

if TYPE_CHECKING:
    from ..steering import Steering

Message: TypeAlias = dict[str, str]
N_CTX = 2048  # tokens
_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window")  # of llama-cpp-python


@dataclass(frozen=True)
class Limits:
    """How to answer. temperature: 0 takes the most probable token; seed: for others."""

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 1


class Speaker(Protocol):
    """An attached model. `chat` and `complete` give the reply piece by piece; both raise PromptTooLong.

    n_ctx: how many tokens prompt and reply may have together. trained: how many the model was trained with,
    and n_ctx has at most; None if that is not known.
    """

    path: Path
    steering: Steering
    n_ctx: int
    trained: int | None

    def chat(self, messages: Sequence[Message], limits: Limits, turn: int = 1) -> Iterator[str]:
        """The reply to a conversation, in the model's chat template. turn: the reply's number, from 1."""

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        """The plain continuation of `prompt`."""

    def count(self, messages: Sequence[Message]) -> int:
        """How many tokens `chat` gives the model, give or take those that begin and end every text."""


class LlamaSpeaker:
    """Through llama-cpp-python."""

    def __init__(self, path: Path, n_ctx: int, threads: int | None) -> None:
        from ..runtimes import attach
        from ..runtimes.llama_text import errors_logged, load_llama

        self.path = path
        self._llm = load_llama(path, n_ctx=n_ctx, n_threads=threads)
        self.trained: int | None = self._llm._model.n_ctx_train()
        self.n_ctx = min(n_ctx, self._llm._model.n_ctx_train())
        self._llm._n_ctx = self.n_ctx
        with errors_logged():  # a warning about the context's length would be about what is never used
            self.steering = attach(self._llm)

    def chat(self, messages: Sequence[Message], limits: Limits, turn: int = 1) -> Iterator[str]:
        chunks = self._llm.create_chat_completion(messages, stream=True, **vars(limits))
        self.steering.turn = turn  # which the call has counted by the messages that are left
        for choice in self._choices(chunks):
            yield choice["delta"].get("content") or ""

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        for choice in self._choices(self._llm.create_completion(prompt, stream=True, **vars(limits))):
            yield choice["text"]

    def count(self, messages: Sequence[Message]) -> int:
        from ..runtimes.llama_text import prompt_length

        return prompt_length(self._llm, messages)

    def _choices(self, chunks: Iterator[Any]) -> Iterator[Any]:
        try:
            for chunk in chunks:
                yield chunk["choices"][0]
        except ValueError as error:
            if not (found := _TOO_LONG.search(str(error))):
                raise
            raise too_long(self, int(found[1])) from error
        except RuntimeError as error:  # llama_decode failed
            raise MienError(f"llama.cpp could not evaluate the prompt ({error})") from error


class HFSpeaker:
    """Through transformers, which dequantises a GGUF file to float32."""

    def __init__(self, path: Path, n_ctx: int, threads: int | None) -> None:
        import torch

        from ..runtimes import attach
        from ..runtimes.hf_text import load_hf
        from ..threads import default_threads

        torch.set_num_threads(threads or default_threads())
        self.path = path
        self._model, self._tokenizer = load_hf(path)
        self.trained: int | None = getattr(self._model.config, "max_position_embeddings", None)
        self.n_ctx = min(n_ctx, self.trained or n_ctx)
        self.steering = attach(self._model, tokenizer=self._tokenizer)

    def chat(self, messages: Sequence[Message], limits: Limits, turn: int = 1) -> Iterator[str]:
        from ..runtimes.hf_text import chat_inputs

        self.steering.turn = turn
        yield from self._stream(chat_inputs(self._tokenizer, messages), limits)

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        yield from self._stream(self._tokenizer(prompt, return_tensors="pt").input_ids, limits)

    def count(self, messages: Sequence[Message]) -> int:
        from ..runtimes.hf_text import chat_inputs

        return int(chat_inputs(self._tokenizer, messages).shape[1])

    def _stream(self, inputs: Any, limits: Limits) -> Iterator[str]:
        from ..runtimes.hf_text import stream

        try:
            yield from stream(self._model, self._tokenizer, inputs, n_ctx=self.n_ctx, **vars(limits))
        except PromptTooLong as error:
            raise too_long(self, error.tokens) from error


SPEAKERS: dict[str, type[LlamaSpeaker] | type[HFSpeaker]] = {"llama": LlamaSpeaker, "hf": HFSpeaker}


def too_long(speaker: Speaker, tokens: int) -> PromptTooLong:
    """The error for a prompt of that many tokens."""
    return PromptTooLong(tokens, speaker.n_ctx - 1, at_limit=speaker.n_ctx == speaker.trained)


def load_speaker(runtime: str, model: str | None, n_ctx: int | None, threads: int | None) -> Speaker:
    """The model, attached. runtime: a key of SPEAKERS. n_ctx: by default N_CTX; if the model was trained
    with fewer tokens it has those, which is said on stderr if another number was asked for.

    Raises ModelNotFound, ModelFileError, ContextNotMade.
    """
    from ..models import find_model

    path = find_model(model, folders=runtime == "hf")
    with noticed(f"loading {path.name}"):
        speaker = SPEAKERS[runtime](path, n_ctx or N_CTX, threads)
    if n_ctx and speaker.n_ctx < n_ctx:
        click.echo(
            f"note: the model was trained with {speaker.trained} tokens of context, so --ctx {n_ctx} is "
            f"{speaker.n_ctx}",
            err=True,
        )
    return speaker
