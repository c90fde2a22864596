"""A model that answers, and its steering: the same for `mien run` and `mien chat` in every runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from ..steering import Steering

Message: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class Limits:
    """How to answer. temperature: 0 takes the most probable token; seed: for others."""

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 1


class Speaker(Protocol):
    """An attached model. Both methods give the reply piece by piece."""

    path: Path
    steering: Steering

    def chat(self, messages: Sequence[Message], limits: Limits) -> Iterator[str]:
        """The reply to a conversation, in the model's chat template."""

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        """The plain continuation of `prompt`."""


class LlamaSpeaker:
    """Through llama-cpp-python."""

    def __init__(self, path: Path, n_ctx: int, threads: int | None) -> None:
        from ..runtimes import attach
        from ..runtimes.llama_text import load_llama

        self.path = path
        self._llm = load_llama(path, n_ctx=n_ctx, n_threads=threads)
        self.steering = attach(self._llm)

    def chat(self, messages: Sequence[Message], limits: Limits) -> Iterator[str]:
        for chunk in self._llm.create_chat_completion(messages, stream=True, **vars(limits)):
            yield chunk["choices"][0]["delta"].get("content") or ""

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        for chunk in self._llm.create_completion(prompt, stream=True, **vars(limits)):
            yield chunk["choices"][0]["text"]


class HFSpeaker:
    """Through transformers, which dequantises a GGUF file to float32."""

    def __init__(self, path: Path, n_ctx: int, threads: int | None) -> None:
        import torch

        from ..runtimes import attach
        from ..runtimes.hf_text import load_hf

        if threads:
            torch.set_num_threads(threads)
        self.path, self._n_ctx = path, n_ctx
        self._model, self._tokenizer = load_hf(path)
        self.steering = attach(self._model, tokenizer=self._tokenizer)

    def chat(self, messages: Sequence[Message], limits: Limits) -> Iterator[str]:
        from ..runtimes.hf_text import chat_inputs

        self.steering.turn = 1 + sum(message["role"] == "assistant" for message in messages)
        yield from self._stream(chat_inputs(self._tokenizer, messages), limits)

    def complete(self, prompt: str, limits: Limits) -> Iterator[str]:
        yield from self._stream(self._tokenizer(prompt, return_tensors="pt").input_ids, limits)

    def _stream(self, inputs: Any, limits: Limits) -> Iterator[str]:
        from ..runtimes.hf_text import stream

        yield from stream(self._model, self._tokenizer, inputs, n_ctx=self._n_ctx, **vars(limits))


SPEAKERS: dict[str, type[LlamaSpeaker] | type[HFSpeaker]] = {"llama": LlamaSpeaker, "hf": HFSpeaker}


def load_speaker(runtime: str, model: str | None, n_ctx: int, threads: int | None) -> Speaker:
    """The model, attached. runtime: a key of SPEAKERS. Raises ModelNotFound."""
    from ..models import find_model

    return SPEAKERS[runtime](find_model(model, folders=runtime == "hf"), n_ctx, threads)
