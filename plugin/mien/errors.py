"""Every error meant for a user.

    MienError                   exit code
    ├── VectorFileError         4   a file that is not a vector, or a broken one
    │   └── VectorFileNotFound  3   no such vector file
    ├── PackError               4   a pack that is broken, unsafe or not as its manifest says
    ├── VectorError             1   arithmetic that has no meaning (shapes, numbers)
    ├── RecipeError             2   a recipe that does not parse; shows the place
    ├── NameNotFound            3   no such vector or pack; lists the nearest
    ├── InputNotFound           3   no such file or folder of texts
    ├── ModelNotFound           3   no such model file, or none given
    │   └── ModelFileError      4   a model file that is broken, or not a model
    ├── PromptTooLong           1   a prompt that does not fit into the context
    ├── ContextNotMade          1   the runtime could not make a context of that size
    ├── ModelMismatch           5   vector, pack and model do not belong together
    ├── RuntimeNotSupported     6   not a model that mien can attach to
    ├── SiteNotFound            6   the model has no such site, or it can't be told where
    ├── MissingExtra            6   an optional dependency is not installed
    └── SteeringNotApplied      7   the model ran, and what was asked for did not happen

And every warning, for what can be done and is probably not meant:

    MienWarning
    ├── ReplyWarning                several tokens of a reply at once were taken for a prompt
    └── DoseWarning                 a dose outside those that the vector was tested at

A message says what was expected, what came instead, where, and what to do next. The facts are
attributes too. Anything else that escapes mien is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable

_NEAREST = 5  # names that are offered in place of an unknown one


class MienError(Exception):
    """Base of every error meant for a user. `exit_code` is what the command line returns."""

    exit_code = 1


class VectorFileError(MienError):
    """A vector file is not readable as one. `path` is the file, `where` the tensor or key."""

    exit_code = 4

    def __init__(self, path: object, problem: str, where: str = "") -> None:
        self.path, self.where, self.problem = str(path), where, problem
        super().__init__(f"{path}{', ' + where if where else ''}: {problem}")


class VectorFileNotFound(VectorFileError):
    """There is no vector file at that path."""

    exit_code = 3

    def __init__(self, path: object) -> None:
        super().__init__(path, "can't be read (No such file or directory)")


class PackError(MienError):
    """A pack is broken, unsafe, or not as its manifest says."""

    exit_code = 4


class VectorError(MienError):
    """An operation on vectors that has no meaning: other shapes, a number that is not finite."""


class RecipeError(MienError):
    """A recipe that can't be understood.

    text: the recipe. offset: the place (0-based). suggestion: what was probably meant there, as a recipe
    would say it; "" if there is nothing to suggest.
    """

    exit_code = 2

    def __init__(self, problem: str, text: str = "", offset: int | None = None, suggestion: str = "") -> None:
        self.problem, self.text, self.offset, self.suggestion = problem, text, offset, suggestion
        place = f". Did you mean {suggestion}?" if suggestion else ""
        if text and offset is not None:
            # One line around the place, so that a long recipe stays readable.
            start = max(0, offset - 40)
            shown = text[start : offset + 40]
            line = "".join(char if char.isprintable() else " " for char in shown)
            place += f"\n    {line}\n    {' ' * (offset - start)}^"
        super().__init__(f"recipe: {problem}{place}")


class NameNotFound(MienError):
    """No vector or pack of that name.

    name: what was asked for. nearest: what may have been meant, by spelling first and then by meaning.
    known: every name that would do. related: those of a related meaning, as terms of a recipe (-warm).
    """

    exit_code = 3

    def __init__(
        self,
        name: str,
        known: Iterable[str],
        what: str = "vector",
        hint: str = "",
        related: Iterable[str] = (),
    ) -> None:
        known = sorted(set(known))
        # The pack's name before a vector's would make all of them alike.
        folded = {full.rpartition(".")[2].casefold() if what == "vector" else full: full for full in known}
        asked = name.rpartition(".")[2].casefold() if what == "vector" else name
        spelled = [folded[near] for near in difflib.get_close_matches(asked, folded, n=3, cutoff=0.6)]
        self.name, self.nearest = name, list(dict.fromkeys([*spelled, *related]))[:_NEAREST]
        if self.nearest:
            tail = f"Did you mean {' or '.join(self.nearest)}?"
        elif len(known) > _NEAREST:
            tail = f"`mien list` shows all {len(known)} {what}s."
        elif known:
            tail = f"Known: {', '.join(known)}."
        else:
            tail = f"No {what} is known."
        super().__init__(f"no {what} named {name!r}. {tail}{' ' + hint if hint else ''}")


class ModelNotFound(MienError):
    """No model file at that path, or no model given and no default installed."""

    exit_code = 3


class ModelFileError(ModelNotFound):
    """The file is there, and it is broken or not a model. `path` is the file, `problem` what is wrong."""

    exit_code = 4

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"{path}: {problem}")


class InputNotFound(MienError):
    """There is no file or folder of that name. `path` is what was asked for."""

    exit_code = 3

    def __init__(self, path: object, problem: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {problem}")


class PromptTooLong(MienError):
    """The prompt does not fit into the context.

    tokens: its length. room: the most that fits. at_limit: whether the model was trained with no larger
    context.
    """

    def __init__(self, tokens: int, room: int, at_limit: bool = False) -> None:
        self.tokens, self.room, self.at_limit = tokens, room, at_limit
        advice = (
            "Make it shorter: the model was trained with no larger context."
            if at_limit
            else "Make it shorter, or the context larger (--ctx)."
        )
        super().__init__(f"the prompt has {tokens} tokens, and at most {room} fit into the context. {advice}")


class ContextNotMade(MienError):
    """The runtime could not make a context. `n_ctx` is its size in tokens, `cause` what the runtime said."""

    def __init__(self, path: object, n_ctx: int, cause: str) -> None:
        self.path, self.n_ctx, self.cause = str(path), n_ctx, cause
        super().__init__(
            f"{path}: could not make a context of {n_ctx} tokens ({cause}). Ask for fewer (--ctx)."
        )


class ModelMismatch(MienError):
    """Vector, pack and model do not belong together. `differences` says in what."""

    exit_code = 5

    def __init__(self, what: str, differences: Iterable[str], hint: str = "") -> None:
        self.differences = tuple(differences)
        super().__init__(f"{what}: {'; '.join(self.differences)}.{' ' + hint if hint else ''}")


class RuntimeNotSupported(MienError):
    """The object is not a model that mien can attach to, or not in a state that allows it."""

    exit_code = 6


class SiteNotFound(MienError):
    """The model has no such site, or where it is can't be told. `site` is its name, `layer` the block."""

    exit_code = 6

    def __init__(self, site: str, layer: int | None, problem: str) -> None:
        self.site, self.layer = site, layer
        where = "" if layer is None else f" in layer {layer}"
        super().__init__(f"no site {site!r}{where}: {problem}")


class MissingExtra(MienError):
    """An optional dependency is not installed; the message has the pip command."""

    exit_code = 6

    def __init__(self, module: str, extra: str) -> None:
        self.module, self.extra = module, extra
        super().__init__(f"{module} is not installed: pip install 'mien[{extra}]'")


class SteeringNotApplied(MienError):
    """The model ran, and the program did not act where it should. `layers` are the missing ones."""

    exit_code = 7

    def __init__(self, problem: str, layers: Iterable[int] = ()) -> None:
        self.layers = tuple(layers)
        super().__init__(problem)


class MienWarning(UserWarning):
    """Base of every warning meant for a user."""


class ReplyWarning(MienWarning):
    """A reply continued with several tokens at once, which were taken for the prompt of a new turn."""


class DoseWarning(MienWarning):
    """A dose outside those that the vector was tested at; it was calibrated.

    name: the vector's. dose: what was asked for. limits: the least and the greatest dose that pass, see
    `Vector.limits`.
    """

    def __init__(self, name: str, dose: float, limits: tuple[float, float]) -> None:
        self.name, self.dose, self.limits = name, dose, limits
        super().__init__(
            f"{dose:g}*{name} is outside {limits[0]:.3g} to {limits[1]:.3g}, the doses that {name} was "
            "tested at; expect broken replies. 1 is the strongest fluent dose. "
            f"`mien info {name}` shows the dose curve."
        )


def warn(warning: MienWarning) -> None:
    """Issue `warning` at the line that called mien."""
    level, frame = 1, sys._getframe()
    # contextlib stands between a `with` statement and mien
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mien", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)
