"""The vector files that `--vector` gives to `mien run` and `mien chat`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from ..errors import NameNotFound, RecipeError
from .options import not_calibrated

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..vector import Vector

vector_option = click.option(
    "--vector",
    "vectors",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Use a vector file under NAME, by default the name in the file (repeatable).",
)


class VectorFile(NamedTuple):
    """A vector, and the file that it was read from. renamed: whether the user gave the name."""

    vector: Vector
    file: str
    renamed: bool


VectorFiles = Mapping[str, VectorFile]  # by the names that they have in recipes


def read_vectors(given: tuple[str, ...]) -> dict[str, VectorFile]:
    """What the values of --vector name. Raises VectorFileError, and RecipeError for a bad name."""
    from ..recipe import as_name
    from ..vectorfile import load

    found = {}
    for text in given:
        name, _, file = text.partition("=")
        if not file or "/" in name:  # no name, or a path with a = of its own
            name, file = "", text
        vector = load(file)
        try:
            found[as_name(name or vector.name)] = VectorFile(vector, file, bool(name))
        except RecipeError as error:
            raise RecipeError(f"{error.problem}. Name it: --vector NAME={file}") from None
    return found


def require_names(names: Collection[str], files: VectorFiles) -> None:
    """Raises NameNotFound if a file's name stands where the name of the vector in it is meant."""
    for name, (_, file, renamed) in files.items():
        stem = Path(file).stem
        if stem in names and not renamed and not {stem, name} & (files.keys() & names):
            hint = f"{file} holds the vector {name!r}: write {name}, or --vector {stem}={file}."
            raise NameNotFound(stem, [name], hint=hint)


def tell_unused(names: Collection[str], files: VectorFiles) -> None:
    """Say on stderr which files neither steer nor are watched."""
    for name, given in files.items():
        if name not in names:
            click.echo(f"note: {given.file} steers nothing: write --steer {name}", err=True)


def tell_uncalibrated(recipe: Recipe, files: VectorFiles) -> None:
    """Say on stderr which files that the recipe adds have no measured dose."""
    from ..recipe import Recipe, names_in

    added = names_in(Recipe(tuple(term for term in recipe.terms if term.operator == "add")), gates=False)
    for name, given in files.items():
        if name in added and given.vector.calibrated is None:
            click.echo(not_calibrated(name), err=True)
