"""The registry: finds packs on a search path and resolves a name to a vector.

The search path, first to last:

    1. the packs that ship with mien
    2. each entry of the environment variable MIEN_PATH, a pack or a folder of packs
    3. the user's packs, where `mien install` puts them: packs/ in the user's data folder, which the
       environment variable MIEN_DATA replaces
    4. installed Python packages that declare an entry point in the group `mien.packs`; its value is a
       package, whose folder is a pack or holds packs

The first that has a name for the model at hand wins. What ships comes first so that installing a pack
can never silently change what `joy` means; the other `joy` is there under its pack's name,
`other_pack.joy`. Nothing in a pack is ever executed: packages are located, not imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import MienError, ModelMismatch, NameNotFound, PackError, RecipeError
from .fingerprint import Fingerprint
from .models import how_to_make_vectors
from .pack import MANIFEST, Entry, Pack
from .synonyms import meant_by

if TYPE_CHECKING:
    from .vector import Vector

ENTRY_POINTS = "mien.packs"
_LIKE_A_PACK = re.compile(r"[.-][a-z0-9._-]*\.[^\W\d]|(?<![\w.])[0-9]\w*[^\W\d]\.[^\W\d]")  # and a vector


class Problem(NamedTuple):
    """A pack that could not be read.

    path: its folder, or the name of the package that an entry point promises. error: why not.
    """

    path: Path
    error: MienError


def shipped_packs() -> Path:
    """The folder of the packs that ship with mien."""
    from importlib.resources import files

    try:
        return Path(str(files("mien.vectors")))
    except ImportError:  # an editable installation, or a checkout that is not installed
        return Path(__file__).parents[2] / "vectors"


def data_folder() -> Path:
    """The user's data folder: $MIEN_DATA, or the place that the system has for it."""
    if override := os.environ.get("MIEN_DATA"):
        return _home_expanded(override)
    import platformdirs

    return Path(platformdirs.user_data_path("mien"))


def user_packs() -> Path:
    """The folder that packs are installed into; it may not exist yet."""
    return data_folder() / "packs"


def search_path() -> list[Path]:
    """The folders to look in, first to last; each is a pack or holds packs. See the module's docstring."""
    return _locate()[0]


class Registry:
    """What the search path holds, scanned when first asked and again by `refresh`.

    A scan reads manifests and no vector. A pack that can't be read is among `problems` and hides no
    other.
    """

    def __init__(self) -> None:
        self._found: tuple[list[Pack], list[Problem]] | None = None

    def refresh(self) -> None:
        """Scan the search path again: packs were installed or removed, or the environment changed."""
        self._found = _scan()

    def packs(self) -> list[Pack]:
        """Every pack that can be read, in the order of the search path."""
        return list(self._scanned()[0])

    def pack(self, name: str) -> Pack:
        """The pack of that name on the search path, or else in the folder of that name.

        Raises NameNotFound, PackError.
        """
        known = {found.name: found for found in reversed(self.packs())}
        if name in known:
            return known[name]
        if Path(name).is_dir():
            return Pack.read(name)
        raise NameNotFound(name, known, what="pack")

    @property
    def problems(self) -> list[Problem]:
        """Every pack, and entry of the search path, that could not be read."""
        return list(self._scanned()[1])

    def names(self, model: Fingerprint | None = None) -> list[str]:
        """The names, without namespace and sorted, that `find` knows for `model`, or for any model."""
        return sorted({name for pack in self._fitting(self.packs(), model) for name in pack.entries})

    def find(self, name: str, model: Fingerprint | None = None) -> Vector:
        """The vector that `name` means for `model`.

        name: `joy`, or `smollm2_135m_instruct.joy` with a pack's namespace. model: the model it is for;
        None takes any, as long as the name does not mean something for two.

        Raises NameNotFound for an unknown name or namespace; ModelMismatch if the name is known only for
        other models, or without a model for several; and what `Pack.load` raises: a broken vector
        never gives way to the next pack's.
        """
        namespace, dot, bare = name.rpartition(".")
        packs = self.packs()
        if dot:
            packs = [pack for pack in packs if pack.namespace == namespace]
            if not packs:
                known = (pack.namespace for pack in self.packs())
                raise NameNotFound(namespace, known, what="pack", hint=self._hint(packs))
        holders = [pack for pack in packs if bare in pack.entries]
        if not holders:
            fitting = self._fitting(packs, model)
            entries = {key: entry for pack in reversed(fitting) for key, entry in pack.entries.items()}
            prefix = f"{namespace}{dot}"
            terms = [described(bare, key, entry) for key, entry in entries.items()]
            terms.sort(key=lambda term: term.startswith("-"))
            # -pack.warm: the sign comes first
            related = [f"{'-' * term.startswith('-')}{prefix}{term.lstrip('-')}" for term in terms if term]
            known = (prefix + key for key in entries)
            raise NameNotFound(name, known, hint=self._hint(packs, model, name), related=related)
        if model is None:
            _require_one_model(name, bare, holders)
            return holders[0].load(bare)
        fitting = self._fitting(holders, model)
        if not fitting:
            raise _mismatch(name, holders, model)
        vector = fitting[0].load(bare)
        # A pack need not know its vocabulary, and then only the vector can tell.
        differences = vector.fingerprint.differences(model) if vector.fingerprint else []
        if differences:
            what = f"{name} of pack {fitting[0].name} is not for {model}"
            raise ModelMismatch(what, differences, how_to_make_vectors(model))
        return vector

    def _scanned(self) -> tuple[list[Pack], list[Problem]]:
        if self._found is None:
            self._found = _scan()
        return self._found

    @staticmethod
    def _fitting(packs: Iterable[Pack], model: Fingerprint | None) -> list[Pack]:
        return [pack for pack in packs if model is None or not pack.fingerprint.differences(model)]

    def _hint(self, packs: list[Pack], model: Fingerprint | None = None, name: str = "") -> str:
        """What explains that `name` is in none of `packs`, and where it may be."""
        hints = []
        if pack := next((pack for pack in self.packs() if name in (pack.name, pack.namespace)), None):
            hints.append(
                f"It is a pack: `mien list --model {pack.name}` lists its vectors, `mien info "
                f"{pack.namespace}.NAME` shows one, `mien pack verify {pack.name}` checks all."
            )
        if name.isidentifier() and Path(f"{name}.gguf").is_file():
            hints.append(
                f"There is a file {name}.gguf in this folder: use it with --vector {name}.gguf, or "
                f'steering.define("{name}", mien.load("{name}.gguf")).'
            )
        if packs and not self._fitting(packs, model):
            names = ", ".join(dict.fromkeys(pack.name for pack in packs))
            hints.append(f"The packs found ({names}) are not for {model}. {how_to_make_vectors(model)}")
        if self.problems:
            paths = ", ".join(str(problem.path) for problem in self.problems[:3])
            hints.append(f"What could not be read: {paths}; `mien list` says why.")
        return " ".join(hints)


def pack_in_place_of_a_namespace(text: str) -> RecipeError | None:
    """The error for a recipe with a pack's name in it where its namespace belongs: `my-pack.joy`."""
    if not _LIKE_A_PACK.search(text):
        return None
    for pack in packs():
        found = re.search(rf"(?<![\w.]){re.escape(pack.name)}\.([^\W\d]\w*)", text)
        if found and pack.name != pack.namespace:
            problem = f"the pack {pack.name} is written {pack.namespace} in a recipe"
            return RecipeError(problem, text, found.start(), f"{pack.namespace}.{found[1]}")
    return None


def described(query: str, name: str, entry: Entry) -> str:
    """The term that `query` describes of that entry: `name`, `-name` for its negative pole, "" for neither.

    Each word of `query` must be in the name, begin a word of the pole, or have a related meaning.
    """
    words = query.casefold().split()
    # An emotion's negative side is not a pole: it says what the others have in common.
    poles = (name, entry.positive), (f"-{name}", "" if entry.kind == "emotion" else entry.negative)
    for term, pole in poles:
        begun = re.split(r"[^\w-]+", pole.casefold())
        if words and all(
            word in term or term in meant_by(word) or any(part.startswith(word) for part in begun if part)
            for word in words
        ):
            return term
    return ""


def packs() -> list[Pack]:
    """Every pack on the search path that can be read."""
    return Registry().packs()


def load(name: str | Path, model: Fingerprint | None = None) -> Vector:
    """The vector of that name, see `Registry.find`, or in that file.

    name: a vector's name; text that ends in .gguf or holds a path separator, and a Path, is a file, and so
    is text that names a file and no vector.

    Raises what `Registry.find` raises, and VectorFileError; ModelMismatch where the file's vector is
    not for `model`.
    """
    if isinstance(name, str) and not name.endswith(".gguf") and not {"/", os.sep}.intersection(name):
        try:
            return Registry().find(name, model)
        except NameNotFound:
            if not Path(name).is_file():
                raise
    from .vectorfile import load as load_file

    vector = load_file(name)
    differences = vector.fingerprint.differences(model) if vector.fingerprint and model else []
    if differences:
        raise ModelMismatch(f"{name} is not for {model}", differences, how_to_make_vectors(model))
    return vector


def _home_expanded(text: str) -> Path:
    # Path.expanduser raises for an unknown user; here such a path is merely one that leads nowhere.
    return Path(os.path.expanduser(text))


def _require_one_model(name: str, bare: str, holders: list[Pack]) -> None:
    """Raises ModelMismatch where `holders` are not all for the same model."""
    first = holders[0].fingerprint
    if not any(pack.fingerprint.differences(first) for pack in holders):
        return
    choices = list(dict.fromkeys(f"{pack.namespace}.{bare}" for pack in holders))
    if len(choices) > 1:
        hint = f"Say which: {' or '.join(choices)}."
    else:
        hint = "Say for which model, or give the file's path."
    models = [f"{pack.namespace}.{bare} is for {pack.fingerprint}" for pack in holders]
    raise ModelMismatch(f"{name} is in packs for different models", models, hint)


def _mismatch(name: str, holders: list[Pack], model: Fingerprint) -> ModelMismatch:
    differences = [
        f"pack {pack.name} was {' and '.join(pack.fingerprint.differences(model))}" for pack in holders
    ]
    hint = f"{how_to_make_vectors(model)} `mien list` shows the packs and their models."
    return ModelMismatch(f"{name} is not available for {model}", differences, hint)


def _locate() -> tuple[list[Path], list[Problem]]:
    """The search path, and the entry points whose package is nowhere."""
    from importlib.metadata import entry_points

    entries = os.environ.get("MIEN_PATH", "").split(os.pathsep)
    folders = [shipped_packs(), *(_home_expanded(entry) for entry in entries if entry), user_packs()]
    problems = []
    # Sorted, because the order of distributions in a folder is the file system's whim.
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value)):
        package = point.value.partition(":")[0].strip()
        folder = _package_folder(package)
        if folder is None:
            error = PackError(
                f"entry point {point.name} = {point.value}: expected a package with a folder, found none"
            )
            problems.append(Problem(Path(package), error))
        else:
            folders.append(folder)
    return folders, problems


def _package_folder(package: str) -> Path | None:
    """The folder of `a.b`, found without running a line of it; None where there is none.

    Only the top name is asked of the import system: to find `a.b` it would import `a`.
    """
    from importlib.util import find_spec

    top, *rest = package.split(".")
    if not all(part.isidentifier() for part in (top, *rest)):
        return None
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location, *rest)
        if folder.is_dir():
            return folder
        if rest and folder.with_suffix(".py").is_file():
            return folder.parent
    return None


def _scan() -> tuple[list[Pack], list[Problem]]:
    roots, problems = _locate()
    packs: list[Pack] = []
    seen: set[str] = set()
    for root in roots:
        if root == user_packs() and not os.path.lexists(root):
            continue  # nothing was ever installed
        try:
            folders = _pack_folders(root)
        except OSError as error:
            problems.append(Problem(root, PackError(f"{root}: can't be read ({error.strerror})")))
            continue
        for folder in folders:
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            try:
                packs.append(Pack.read(folder))
            except MienError as error:
                problems.append(Problem(folder, error))
    return packs, problems


def _pack_folders(root: Path) -> list[Path]:
    """The folders at or right below `root` that hold a manifest; dot-folders are being installed."""
    if os.path.lexists(root / MANIFEST):
        return [root]
    return sorted(
        child
        for child in root.iterdir()
        if not child.name.startswith(".") and os.path.lexists(child / MANIFEST)
    )
