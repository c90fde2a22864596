"""The tree of texts' tokens, cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from mien.evaluation import Text
from mien.trie import Mark, chunks, successors

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=20)


def walk(texts: Sequence[Sequence[int]], marks: Sequence[Mark], cells: int, leaves: int) -> int:
    """Follow the chunks as a runtime does, checking each path. Returns how many nodes there were."""
    last: list[int] = []
    seen: set[int] = set()
    count = 0
    for chunk in chunks(texts, marks, cells=cells, leaves=leaves):
        kept = last[: chunk.kept]
        assert len(kept) == chunk.kept
        assert len(chunk.shared) <= leaves
        longest = max(len(texts[branch.text]) for branch in chunk.branches)
        assert len(chunk.tokens) <= max(cells, longest)
        paths = [kept[:shared] for shared in chunk.shared]
        for token, position, slots in zip(chunk.tokens, chunk.positions, chunk.slots, strict=True):
            assert slots, "a token on no leaf's path"
            for slot in slots:
                assert len(paths[slot]) == position, "a position is left out, or comes twice"
                paths[slot].append(token)
        path = kept
        for branch in chunk.branches:
            path = path[: branch.common] + [chunk.tokens[node] for node in branch.nodes]
            assert path == list(texts[branch.text])
            assert paths[branch.slot][: len(path)] == path
            seen.add(branch.text)
        for slots in chunk.slots:
            owners = {marks[branch.text] for branch in chunk.branches if branch.slot in slots}
            assert len(owners) == 1, "a token that is evaluated under two marks at once"
        last, count = path, count + len(chunk.tokens)
    assert seen == set(range(len(texts)))
    return count


@st.composite
def marked(draw: st.DrawFn) -> tuple[list[list[int]], list[Mark]]:
    texts = draw(TEXTS)
    kinds = st.tuples(st.integers(0, 1), st.integers(0, 8), st.integers(0, 2))
    return texts, [Mark(*draw(kinds)) for _ in texts]


@given(marked(), st.integers(1, 30), st.integers(1, 5))
def test_every_text_is_a_path_and_every_node_is_evaluated_once(
    given_: tuple[list[list[int]], list[Mark]], cells: int, leaves: int
) -> None:
    texts, marks = given_
    nodes = {
        (mark.before if k < mark.start else mark, tuple(text[: k + 1]))
        for mark, text in zip(marks, texts)
        for k in range(len(text))
    }
    assert walk(texts, marks, cells, leaves) == len(nodes)


@given(TEXTS, st.integers(1, 30), st.integers(1, 5))
def test_what_a_node_is_asked_for_is_what_comes_after_it_in_any_text(
    texts: list[list[int]], cells: int, leaves: int
) -> None:
    given_ = [Text(tuple(text), min(1, len(text))) for text in texts]
    plan = list(chunks(texts, cells=cells, leaves=leaves))
    found: dict[tuple[int, ...], set[int]] = {}
    path: list[int] = []
    for chunk, wanted in zip(plan, successors(plan, given_), strict=True):
        for branch in chunk.branches:
            path = path[: branch.common]
            for node in branch.nodes:
                path.append(chunk.tokens[node])
                found[tuple(path)] = wanted[node]
    for prefix, after in found.items():
        size = len(prefix)
        assert after == {text[size] for text in texts if len(text) > size and tuple(text[:size]) == prefix}


def test_truncations_of_a_text_cost_what_the_text_costs() -> None:
    text = list(range(30))
    (chunk,) = chunks([text[: k + 1] for k in range(30)])
    assert len(chunk.tokens) == 30
    assert len(chunk.shared) == 1
