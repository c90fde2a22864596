"""Contrast texts: what a vector is extracted from.

A text file holds one item a line; blank lines and lines that start with `#` are left out. A line is

    USER TEXT => REPLY OPENING      a turn of the user, and how the reply begins
    USER TEXT                       a turn of the user; the reply begins from nothing

and, where a template is given, the line takes the place of `{}` in each line of the template, so that
ten personas and twenty-four questions make 240 samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import InputNotFound, MienError

ARROW = "=>"


@dataclass(frozen=True)
class Sample:
    """One text: a user's turn, and the opening of the reply, whose last token is read."""

    user: str
    opening: str = ""

    @classmethod
    def parse(cls, line: str) -> Sample:
        user, _, opening = line.partition(ARROW)
        return cls(user.strip(), opening.strip())


def read_lines(path: str | Path) -> list[str]:
    """The items of a text file.

    Raises InputNotFound if there is no such file, MienError if it can't be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputNotFound(path, "can't be read (there is no such file)") from error
    except OSError as error:
        raise MienError(f"{path}: can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise MienError(f"{path}: can't be read as UTF-8 text ({error})") from error
    lines = [line.strip() for line in text.splitlines()]
    items = [line for line in lines if line and not line.startswith("#")]
    if not items:
        raise MienError(f"{path}: there is no text in it")
    return items


def samples(lines: Iterable[str], template: Sequence[str] = ("{}",)) -> list[Sample]:
    """Each line in each template. Raises MienError for a template without exactly one `{}`."""
    for pattern in template:
        if pattern.count("{}") != 1:
            raise MienError(f"template: expected exactly one {{}} in {pattern!r}")
    return [Sample.parse(pattern.replace("{}", line)) for line in lines for pattern in template]


def digest(*groups: Iterable[Sample]) -> str:
    """SHA-256 over the groups' texts, in order."""
    text = "\x1d".join("\x1e".join(f"{s.user}\x1f{s.opening}" for s in group) for group in groups)
    return hashlib.sha256(text.encode()).hexdigest()
