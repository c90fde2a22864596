"""Texts as a tree of tokens, so that what they begin with alike is evaluated once.

Sorted, the tree needs no building: of each text the tokens beyond what it has in common with the text
before are its new nodes, and the nodes come out in the order of a walk down the tree. The walk is cut into
chunks of as many tokens and leaves as a runtime takes at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Branch:
    """One text in a chunk: its path is the first `common` nodes of the path before it, and `nodes`.

    text: its number. slot: the leaf whose path it is on. nodes: of the chunk.
    """

    text: int
    slot: int
    common: int
    nodes: range


@dataclass
class Chunk:
    """What to evaluate next, at the end of the first `kept` tokens of the last path of the chunk before.

    tokens, positions: by node. slots: by node, the leaves below it. shared: by slot, how many of the kept
    tokens are on its path. branches: in order.
    """

    kept: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[list[int]] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)


class Mark(NamedTuple):
    """What else must be equal for two texts to share tokens: `before` for those up to number `start`,
    and all three for those from there on."""

    before: Hashable = ()
    start: int = 0
    after: Hashable = ()


def chunks(
    texts: Sequence[Sequence[int]],
    marks: Sequence[Mark] | None = None,
    *,
    cells: int = 512,
    leaves: int = 32,
) -> Iterator[Chunk]:
    """Cut the tree of `texts`, none of them empty, into chunks.

    marks: by text; by default they are alike. Where texts of different marks share tokens, those are in an
    earlier chunk, so that in each chunk a node is of one mark. cells, leaves: at most so many nodes, unless
    one text alone has more, and leaves a chunk.
    """
    marks = marks or [Mark()] * len(texts)
    places: dict[Hashable, int] = {}
    for mark in marks:
        places.setdefault(mark.before, len(places))
        places.setdefault(mark, len(places))
    order = sorted(
        range(len(texts)),
        key=lambda i: (
            places[marks[i].before],
            texts[i][: marks[i].start],
            places[marks[i]],
            texts[i][marks[i].start :],
            i,
        ),
    )
    chunk, before = Chunk(0), -1
    path: list[int | None] = []  # the chunk's nodes that the newest text is made of, None for a kept token
    for i in order:
        same = before >= 0 and marks[before] == marks[i]
        common = _shared(texts[before], marks[before], texts[i], marks[i]) if before >= 0 else 0
        extends = same and common == len(texts[before])
        full = len(chunk.tokens) + len(texts[i]) - common > cells or (
            len(chunk.shared) == leaves and not extends
        )
        apart = not same and any(node is not None for node in path[:common])
        grows = common < len(texts[i]) or not same
        if chunk.branches and (apart or (full and grows)):
            _close(chunk, path)
            yield chunk
            chunk, path, extends = Chunk(common), [None] * common, False
        if not chunk.branches:
            extends = False
        if not extends:
            if chunk.branches:
                _close(chunk, path)
            chunk.shared.append(min([common, chunk.kept, *chunk.shared[-1:]]))
        first = len(chunk.tokens)
        chunk.tokens += texts[i][common:]
        chunk.positions += range(common, len(texts[i]))
        chunk.slots += ([] for _ in range(common, len(texts[i])))
        nodes = range(first, len(chunk.tokens))
        path = [*path[:common], *nodes]
        chunk.branches.append(Branch(i, len(chunk.shared) - 1, common, nodes))
        before = i
    if chunk.branches:
        _close(chunk, path)
        yield chunk


def _close(chunk: Chunk, path: Sequence[int | None]) -> None:
    """The path of the newest leaf is complete."""
    for node in path:
        if node is not None:
            chunk.slots[node].append(len(chunk.shared) - 1)


def _shared(a: Sequence[int], mark: Mark, b: Sequence[int], other: Mark) -> int:
    """How many tokens both begin with, as far as they may be shared."""
    count = min(len(a), len(b))
    if mark != other:
        count = min(count, mark.start, other.start) if mark.before == other.before else 0
    return next((k for k in range(count) if a[k] != b[k]), count)


def successors(plan: Sequence[Chunk], texts: Sequence[Any]) -> list[list[set[int]]]:
    """For each node of each chunk, the tokens after it whose probability is asked for: those of replies.

    texts: the `evaluation.Text`s that the chunks were made of. A chunk may ask on behalf of later ones.
    """
    wanted = [[set[int]() for _ in chunk.tokens] for chunk in plan]
    path: list[set[int]] = []
    for chunk, asked in zip(plan, wanted):
        for branch in chunk.branches:
            path = [*path[: branch.common], *(asked[node] for node in branch.nodes)]
            text = texts[branch.text]
            for after, token in zip(path[text.reply - 1 :], text.answer):
                after.add(token)
    return wanted
