"""Evaluating many texts at once: what extraction, calibration and judging ask of a model.

An `Evaluator` is a runtime's way of doing that, the same above it for all: `capture` reads block outputs,
`log_probabilities` scores replies, `generate` writes them, each under a program of its own. Texts that begin
alike are evaluated once there (`trie`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import MienError, RuntimeNotSupported
from .fingerprint import Fingerprint
from .program import NOTHING, Program
from .recipe import RecipeLike
from .vector import Floats

Progress = Callable[[int, int], None]  # (done, of how many), in tokens


def silent(_done: int, _total: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Text:
    """What the model is given, and a reply. tokens: of both; reply: where that begins."""

    tokens: tuple[int, ...]
    reply: int

    @property
    def answer(self) -> tuple[int, ...]:
        return self.tokens[self.reply :]

    def after(self, prompt: Text) -> Text:
        """The same reply to another prompt."""
        return Text((*prompt.tokens, *self.answer), len(prompt.tokens))


class Evaluator(Protocol):
    """A model that many texts can be put to. Nothing steers it but the programs that are passed."""

    fingerprint: Fingerprint

    def text(self, messages: Sequence[dict[str, str]], reply: str = "", *, raw: bool = False) -> Text:
        """`messages` in the model's chat template and the reply to them; raw: their contents as they are."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text."""

    def compile(self, recipe: RecipeLike) -> Program:
        """A program for this model."""

    def capture(
        self,
        texts: Sequence[Text],
        layers: Sequence[int],
        *,
        last: bool = False,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Floats]]:
        """(number, block outputs) of each text, in no particular order.

        Float32 (len(layers), tokens of the reply, n_embd); last: of the text's last token alone. programs: by
        text, none by default.
        """

    def log_probabilities(
        self, texts: Sequence[Text], *, programs: Sequence[Program] = (), progress: Progress = silent
    ) -> list[npt.NDArray[np.float64]]:
        """Of each text, the natural log-probability of every token of its reply after those before it."""

    def generate(
        self,
        prompts: Sequence[Text],
        limit: int,
        *,
        programs: Sequence[Program] = (),
        progress: Progress = silent,
    ) -> list[Text]:
        """The most probable continuation of each, token by token, up to `limit` or the end of the turn."""

    def close(self) -> None:
        """Free what it holds; the model is as it was. Twice does nothing."""


def evaluator(model: Any, tokenizer: Any = None) -> Evaluator:
    """For a llama_cpp.Llama, which must not be attached, or a transformers model with its tokenizer.

    (Or mien's own NumPy model, `mien.runtimes.fake.NumpyModel`.)

    Raises RuntimeNotSupported for another.
    """
    homes = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(model).__mro__}
    if "llama_cpp.Llama" in homes:
        from .runtimes.llama_many import LlamaEvaluator

        return LlamaEvaluator(model)
    if "transformers.PreTrainedModel" in homes:
        from .runtimes.hf_many import HFEvaluator

        return HFEvaluator(model, tokenizer)
    if "mien.NumpyModel" in homes:
        from .runtimes.fake import NumpyEvaluator

        return NumpyEvaluator(model)
    raise RuntimeNotSupported(
        f"expected a llama_cpp.Llama or a transformers model, got {type(model).__qualname__}"
    )


def programs_of(programs: Sequence[Program], count: int) -> list[Program]:
    """One for each of `count` texts."""
    if programs and len(programs) != count:
        raise ValueError(f"programs: expected one for each of {count} texts, got {len(programs)}")
    return list(programs) or [NOTHING] * count


def require_room(texts: Sequence[Text], room: int) -> None:
    """Raises MienError for an empty text, or one of more than `room` tokens."""
    for text in texts:
        if not text.tokens:
            raise MienError("a text has no token")
        if len(text.tokens) > room:
            raise MienError(f"expected at most {room} tokens, got {len(text.tokens)}")
