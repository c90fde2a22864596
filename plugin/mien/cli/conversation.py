"""A chat's history, kept to what the model's context has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import PromptTooLong
from .speakers import Message


class Conversation:
    """What was said.

    messages: what the model is given, the system prompt first. turn: the number of the next reply, from 1:
    it counts the turns that were dropped, too.
    """

    def __init__(self, system: str | None) -> None:
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._beginning)
        self.turn = 1

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})
        self.turn += 1

    def take_back(self) -> None:
        """Forget the question, which was not answered."""
        self.messages.pop()

    def trim(
        self,
        count: Callable[[Sequence[Message]], int],
        room: int,
        most: int,
        at_limit: bool = False,
    ) -> int:
        """Drop the oldest turns until the rest has at most `room` tokens; how many were dropped.

        count: the tokens of messages. The system prompt and the last question always stay. Raises
        PromptTooLong, and drops nothing, if these two alone have more than `most`; at_limit: see there.
        """
        alone = count([*self._beginning, self.messages[-1]])
        if alone > most:
            raise PromptTooLong(alone, most, at_limit)
        first, dropped = len(self._beginning), 0
        while len(self.messages) > first + 1 and count(self.messages) > room:
            del self.messages[first : first + 2]  # a question and its answer
            dropped += 1
        return dropped
