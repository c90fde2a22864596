"""Contrast data for packs: what the poles of a trait, or the members of a group, would say.

A corpus is a folder. Each folder in it is a family. A family of traits has a TOML file for each trait:

    positive = "curious, imaginative"          # completes "someone who is very ..."
    negative = "conventional, practical"
    [personas]
    high = ["You are curious about everything.", ...]
    low = [...]
    [[pair]]
    split = "train"                            # or "calibration", "test"
    ask = "What would you like to do on a free Saturday?"
    high = "Wander into a gallery I have never seen."
    low = "Do what I do every Saturday."

A family of a group has events, to each of which every member of the group replies. It is told by a
`group.toml` with an entry for each member, and its other files are themes:

    [joy]
    positive = "joyful"                        # completes "someone who is very ..."

    [[event]]
    split = "train"
    scenario = "interview"                     # all events of a scenario are in one split
    text = "They offered me the post on the spot."
    joy = "Oh, that is wonderful!"             # and so on; test events may be without replies

Splits are disjoint: a scenario, or a question, that stands in two of them is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import InputNotFound, MienError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SPLITS = ("train", "calibration", "test")
GROUP = "group.toml"


@dataclass(frozen=True)
class Pair:
    """A question and what each pole answers."""

    split: str
    ask: str
    high: str
    low: str


@dataclass(frozen=True)
class Trait:
    """Two poles. positive, negative: phrases that complete "someone who is very ..."."""

    name: str
    family: str
    positive: str
    negative: str
    high: tuple[str, ...]
    low: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all of the above."""
        return _digest(self)

    def of(self, split: str) -> list[Pair]:
        """The pairs of one split."""
        return [pair for pair in self.pairs if pair.split == split]


@dataclass(frozen=True)
class Event:
    """What a user tells, and what each member of the group replies; {} where no replies are written."""

    split: str
    theme: str
    scenario: str
    text: str
    replies: Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Members that differ from each other. members: {name: what completes "someone who is very ..."}."""

    family: str
    members: Mapping[str, str]
    events: tuple[Event, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over all of the above."""
        return _digest(self)

    def of(self, split: str, *, replied: bool = False) -> list[Event]:
        """The events of one split; replied: only those that the members reply to."""
        return [event for event in self.events if event.split == split and (event.replies or not replied)]


@dataclass(frozen=True)
class Corpus:
    """What a pack is made from."""

    traits: tuple[Trait, ...]
    groups: tuple[Group, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over what was read; comments and layout of the files do not count."""
        return _digest(self)

    @property
    def names(self) -> list[str]:
        """Of every vector that it makes."""
        return [name for group in self.groups for name in group.members] + [t.name for t in self.traits]

    @classmethod
    def read(cls, folder: str | Path | None = None) -> Corpus:
        """The corpus in `folder`, by default the one that comes with mien.

        Raises InputNotFound if there is no such folder; MienError, naming file and entry, for what can't be
        read, is empty, one-sided, stands twice, stands in two splits, or is said by both poles.
        """
        folder = Path(folder) if folder is not None else Path(__file__).parent / "data"
        if not folder.is_dir():
            raise InputNotFound(folder, "there is no such folder")
        families = sorted(path for path in folder.iterdir() if path.is_dir())
        traits: list[Trait] = []
        groups: list[Group] = []
        for family in families:
            files = sorted(family.glob("*.toml"))
            if (family / GROUP).exists():
                groups.append(_group(family, [path for path in files if path.name != GROUP]))
            else:
                traits += (_trait(path) for path in files)
        corpus = cls(tuple(traits), tuple(groups))
        names = corpus.names
        if not names:
            raise MienError(f"{folder}: there is no contrast data in it")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise MienError(f"{folder}: {', '.join(twice)} is there twice")
        return corpus


def _digest(entry: Trait | Group | Corpus) -> str:
    return hashlib.sha256(json.dumps(asdict(entry)).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:
        raise MienError(f"{path}: can't be read as TOML ({error})") from error


def _trait(path: Path) -> Trait:
    data = _read(path)
    if not path.stem.isidentifier():
        raise MienError(f"{path}: {path.stem!r} can't be written in a recipe: letters, digits and _ only")
    personas = data.get("personas", {})
    high, low = (tuple(personas.get(pole, ())) for pole in ("high", "low"))
    pairs = tuple(
        Pair(_split(path, i, pair), *(_line(path, f"pair {i}", pair, key) for key in ("ask", "high", "low")))
        for i, pair in _numbered(path, data, "pair")
    )
    for i, pair in enumerate(pairs, 1):
        if pair.high == pair.low:
            raise MienError(f"{path}, pair {i}: both poles answer {pair.high!r}")
    said = {pair.high for pair in pairs} & {pair.low for pair in pairs}
    if said:
        raise MienError(f"{path}: said by both poles: {min(said)!r}")
    _require_apart(path, "question", [(pair.ask, pair.split) for pair in pairs], once=True)
    _require_splits(path, [pair.split for pair in pairs])
    positive, negative = (_line(path, "the file", data, key) for key in ("positive", "negative"))
    return Trait(path.stem, path.parent.name, positive, negative, high, low, pairs)


def _group(family: Path, themes: Sequence[Path]) -> Group:
    members = {
        name: _line(family / GROUP, name, entry, "positive") for name, entry in _read(family / GROUP).items()
    }
    if len(members) < 2:
        raise MienError(f"{family / GROUP}: a group needs at least two members to differ from each other")
    events = tuple(event for path in themes for event in _events(path, members))
    if not events:
        raise MienError(f"{family}: there are no events")
    _require_apart(family, "event", [(event.text, event.split) for event in events], once=True)
    scenarios = [(f"{event.theme}/{event.scenario}", event.split) for event in events]
    _require_apart(family, "scenario", scenarios, once=False)
    _require_splits(family, [event.split for event in events])
    return Group(family.name, members, events)


def _events(path: Path, members: Mapping[str, str]) -> Iterator[Event]:
    for i, entry in _numbered(path, _read(path), "event"):
        there = [name for name in members if name in entry]
        if there and len(there) < len(members):
            missing = ", ".join(name for name in members if name not in there)
            raise MienError(
                f"{path}, event {i}: expected a reply of every member or of none; missing {missing}"
            )
        split = _split(path, i, entry)
        if split == "train" and not there:
            raise MienError(f"{path}, event {i}: an event of the train split needs replies")
        replies = {name: _line(path, f"event {i}", entry, name) for name in there}
        if len(set(replies.values())) < len(replies):
            raise MienError(f"{path}, event {i}: two members reply the same")
        scenario, text = (_line(path, f"event {i}", entry, key) for key in ("scenario", "text"))
        yield Event(split, path.stem, scenario, text, replies)


def _numbered(path: Path, data: Mapping[str, Any], key: str) -> list[tuple[int, dict[str, Any]]]:
    entries = data.get(key)
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise MienError(
            f"{path}: expected [[{key}]] tables, got {'none' if not entries else 'something else'}"
        )
    return list(enumerate(entries, 1))


def _split(path: Path, i: int, entry: Mapping[str, Any]) -> str:
    split = entry.get("split")
    if split not in SPLITS:
        raise MienError(f"{path}, entry {i}: split: expected one of {', '.join(SPLITS)}, got {split!r}")
    return str(split)


def _line(path: Path, where: str, entry: Mapping[str, Any], key: str) -> str:
    text = entry.get(key)
    if not isinstance(text, str) or not text.strip():
        raise MienError(f"{path}, {where}: {key}: expected text, got {text!r}")
    return text.strip()


def _require_apart(where: Path, what: str, entries: Sequence[tuple[str, str]], *, once: bool) -> None:
    """No text in two splits; once: none twice at all."""
    splits: dict[str, str] = {}
    for text, split in entries:
        if splits.get(text, split) != split:
            raise MienError(f"{where}: {what} {text!r} stands in the splits {splits[text]} and {split}")
        if once and text in splits:
            raise MienError(f"{where}: {what} {text!r} stands there twice")
        splits[text] = split


def _require_splits(where: Path, splits: Sequence[str]) -> None:
    if missing := [split for split in SPLITS if split not in splits]:
        raise MienError(f"{where}: the split {missing[0]} is empty")
