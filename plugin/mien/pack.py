"""The pack: a folder of vectors for one model, with a manifest.

    pack.toml       format = 1
                    name = "smollm2-135m-instruct"     [a-z0-9][a-z0-9._-]*, at most 64 characters
                    version = "1.0"
                    licence = "Apache-2.0"
                    description = "..."                optional
                    [model]                            the fingerprint, see fingerprint.py
                    architecture = "llama"
                    n_layer = 30
                    n_embd = 576
                    vocabulary = "..."                 optional
                    name = "SmolLM2-135M-Instruct"     optional
                    [vectors.joy]                      a Python identifier, at most 64 characters
                    file = "joy.gguf"                  beside pack.toml, never elsewhere
                    sha256 = "..."
                    kind = "emotion"                   optional, as are the poles in words
                    positive = "joyful"
                    negative = "joyless"
                    site = "heads"                     where it acts, if not at the residual stream
                    rank = 3                           directions a layer, if there are several
                    weak = true                        where it falls short of what it should do
    joy.gguf        see vectorfile.py

Reading a pack reads pack.toml alone; a vector is read, and checked, when it is asked for. Keys that
are not named here are left alone, so that later versions can add some.
"""

from __future__ import annotations

import hashlib
import keyword
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MienError, ModelMismatch, NameNotFound, PackError
from .fingerprint import Fingerprint
from .wholefile import replacing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from .vector import Vector

FORMAT = 1
MANIFEST = "pack.toml"
KINDS = ("emotion", "trait", "")
_SITE = "residual"  # where a vector acts whose entry does not say

# A manifest is a page of text; a larger file is something else, and slow to parse.
_MAX_MANIFEST = 1 << 20
_MAX_NAME = 64
NAMES = "1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*[A-Za-z0-9]*([.+-][A-Za-z0-9]+)*")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PLAIN_NAME = re.compile(r"[\w-][\w.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# What these texts hold is printed to terminals, where control characters are commands.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MISSING = object()


@dataclass(frozen=True)
class Entry:
    """One vector as the manifest has it.

    file: a name in the pack's folder. sha256: of the file's bytes, 64 lower-case hex digits. kind:
    'emotion', 'trait' or ''. positive, negative: the poles in words, '' where not given. site, rank: where
    it acts, and how many directions it has a layer. weak: whether its file says that it falls short.
    """

    file: str
    sha256: str
    kind: str = ""
    positive: str = ""
    negative: str = ""
    site: str = _SITE
    rank: int = 1
    weak: bool = False


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack as its manifest has it; `Pack.read` makes one.

    path: the folder. fingerprint: the model that every vector in it is for. entries: {vector's name:
    Entry}, in the manifest's order.
    """

    path: Path
    name: str
    version: str
    licence: str
    fingerprint: Fingerprint
    entries: dict[str, Entry]
    description: str = ""
    _loaded: dict[str, Vector] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Pack:
        """Read the manifest of the pack in `folder`; no vector is opened.

        Raises PackError, naming the file and the key, what was expected and what is there.
        """
        folder = Path(folder)
        return cls._from_manifest(folder, _parse(folder / MANIFEST))

    @classmethod
    def build(
        cls, folder: str | Path, *, name: str, version: str, licence: str, description: str = ""
    ) -> Pack:
        """Write the manifest for every *.gguf in `folder`: the same files give the same bytes.

        name, version, licence, description: see the module's docstring. A vector's name is its file's
        name without .gguf; kind and poles come from the vector's `kind`, `positive`, `negative`.

        Raises PackError for a folder without vectors, a vector that does not say which model it is for
        or is named otherwise than its file, or a value that a manifest can't hold; ModelMismatch where
        two vectors are for different models; VectorFileError for a broken file. On error the folder,
        and the manifest that it may already hold, are as they were.
        """
        folder = Path(folder)
        if os.path.lexists(folder / MANIFEST):
            require_regular(folder / MANIFEST)  # which is what `read` asks for
        vectors: dict[Path, Vector] = {}
        digests: dict[Path, str] = {}
        for path in _gguf_files(folder):
            digests[path], vectors[path] = _read_vector(path)
        manifest: dict[str, Any] = {"format": FORMAT, "name": name, "version": version, "licence": licence}
        if description:
            manifest["description"] = description
        model = _common_fingerprint(folder, vectors)
        manifest["model"] = {key: value for key, value in model.as_dict().items() if value != ""}
        manifest["vectors"] = {
            vector.name: _manifest_entry(path, digests[path], vector) for path, vector in vectors.items()
        }
        pack = cls._from_manifest(folder, manifest)  # whatever could not be read back is refused here
        if not is_version(version):
            raise PackError(_wrong(folder / MANIFEST, "version", "a version such as 1.0.0", version))

        import tomli_w

        write_whole(folder / MANIFEST, tomli_w.dumps(manifest).encode())
        return pack

    @classmethod
    def _from_manifest(cls, folder: Path, data: Mapping[str, Any]) -> Pack:
        where = folder / MANIFEST
        number = data.get("format", _MISSING)
        if type(number) is not int or number != FORMAT:
            newer = ". A newer mien may read it." if type(number) is int and number > FORMAT else ""
            raise PackError(_wrong(where, "format", str(FORMAT), number) + newer)
        if not is_pack_name(data.get("name")):
            raise PackError(_wrong(where, "name", NAMES, data.get("name", _MISSING)))
        vectors = _table(where, data, "vectors")
        if not vectors:
            raise PackError(_wrong(where, "vectors", "at least one vector", vectors))
        entries = {name: _entry(where, name, _table(where, vectors, name, "vectors.")) for name in vectors}
        # Case is folded because some file systems do: there the two would be one file.
        owners: dict[str, str] = {}
        for name, entry in entries.items():
            owner = owners.setdefault(entry.file.casefold(), name)
            if owner != name:
                raise PackError(
                    f"{where}, vectors.{name}.file: {entry.file!r} already belongs to vectors.{owner}"
                )
        return cls(
            path=folder,
            name=data["name"],
            version=_text(where, data, "version"),
            licence=_text(where, data, "licence"),
            fingerprint=_fingerprint(where, _table(where, data, "model")),
            entries=entries,
            description=_text(where, data, "description", default=""),
        )

    @property
    def namespace(self) -> str:
        """The pack's name as recipes write it, an identifier: `smollm2_135m_instruct`."""
        text = re.sub(r"[.-]", "_", self.name)
        return f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text

    def load(self, name: str) -> Vector:
        """The vector of that name, read and checked the first time and kept from then on.

        Raises NameNotFound where the manifest has no such vector; PackError where the file is missing,
        a symlink, not the bytes that the manifest's SHA-256 was taken of, or holds a vector of another
        name; VectorFileError where it is not a vector; ModelMismatch where it is not for the pack's
        model.
        """
        if name not in self.entries:
            raise NameNotFound(name, self.entries, hint=f"Looked in pack {self.name}.")
        if name not in self._loaded:
            self._loaded[name] = self._checked(name)
        return self._loaded[name]

    def verify(self) -> list[MienError]:
        """Read every vector afresh and give all that is wrong with the pack; empty where nothing is.

        A *.gguf file that the manifest does not name is wrong too.
        """
        problems: list[MienError] = []
        for name in self.entries:
            try:
                self._checked(name)
            except MienError as error:
                problems.append(error)
        known = {entry.file for entry in self.entries.values()}
        try:
            files = _gguf_files(self.path)
        except PackError as error:
            return [*problems, error]
        problems += [
            PackError(f"{path}: {MANIFEST} does not name it; build the pack again or remove the file")
            for path in files
            if path.name not in known
        ]
        return problems

    def _checked(self, name: str) -> Vector:
        entry = self.entries[name]
        path = self.path / entry.file
        _, vector = _read_vector(path, entry.sha256)
        if vector.name != name:
            raise PackError(f"{path}: expected the vector {name!r}, as {MANIFEST} says, got {vector.name!r}")
        if (vector.site, vector.rank) != (entry.site, entry.rank):
            raise PackError(
                f"{path}: expected site {entry.site} and rank {entry.rank}, as {MANIFEST} says, got "
                f"{vector.site} and {vector.rank}"
            )
        differences = _required_fingerprint(path, vector).differences(self.fingerprint)
        if differences:
            raise ModelMismatch(f"{path} does not fit the model that its pack is for", differences)
        return vector


def is_pack_name(name: object) -> bool:
    """Whether a pack may be called that; such a name is also safe as a folder's name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_version(text: str) -> bool:
    """Whether a new pack may have that version: numbers with dots such as 1.0, and perhaps more: 1.0-rc.1.

    A pack that is read may have any.
    """
    return len(text) <= _MAX_NAME and _VERSION.fullmatch(text) is not None


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file in the folder it is looked up in, on every system.

    That refuses separators, drive letters, '..', a leading or closing dot, spaces and the like.
    """
    return _PLAIN_NAME.fullmatch(name) is not None and ".." not in name and not name.endswith(".")


def require_regular(path: Path) -> None:
    """Raises PackError unless `path` is a regular file, and not through a symlink."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        raise PackError(f"{path}: can't be read ({error.strerror})") from error
    if stat.S_ISLNK(mode):
        raise PackError(f"{path}: expected a regular file, got a symlink")
    if not stat.S_ISREG(mode):
        raise PackError(f"{path}: expected a regular file, got {stat.filemode(mode)}")


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file holds either what it held or all of it.

    Raises PackError if it can't be written, or exists and is not a regular file.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise PackError(f"{path}: can't be written ({error.strerror})") from error


def _parse(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise PackError(f"{path}: there is no such file; a pack is a folder with a {MANIFEST}")
    require_regular(path)
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_MANIFEST + 1)
    except OSError as error:
        raise PackError(f"{path}: can't be read ({error.strerror})") from error
    if len(text) > _MAX_MANIFEST:
        raise PackError(f"{path}: expected at most {_MAX_MANIFEST} bytes, got more")
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, nested without end
        raise PackError(f"{path}: not TOML ({error})") from error


def _wrong(where: Path, key: str, expected: str, got: object) -> str:
    shown = "nothing" if got is _MISSING else repr(got)
    return f"{where}, {key}: expected {expected}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _table(where: Path, data: Mapping[str, Any], key: str, prefix: str = "") -> dict[str, Any]:
    value = data.get(key, _MISSING)
    if not isinstance(value, dict):
        raise PackError(_wrong(where, prefix + key, "a table", value))
    return value


def _text(
    where: Path, data: Mapping[str, Any], key: str, prefix: str = "", default: str | None = None
) -> str:
    """A line of text, which may be empty only where `default` is."""
    value = data.get(key, _MISSING if default is None else default)
    if not isinstance(value, str) or _CONTROL.search(value) or (value == "" and default is None):
        raise PackError(_wrong(where, prefix + key, "one line of text", value))
    return value


def _entry(where: Path, name: str, data: Mapping[str, Any]) -> Entry:
    # Recipes are parsed as Python, which sees only NFKC: another spelling could never be asked for.
    usable = name.isidentifier() and unicodedata.normalize("NFKC", name) == name
    if not usable or keyword.iskeyword(name) or len(name) > _MAX_NAME:
        expected = f"an identifier of at most {_MAX_NAME} characters, not a Python keyword"
        raise PackError(_wrong(where, "vectors", expected, name))
    prefix = f"vectors.{name}."
    file = data.get("file", _MISSING)
    if not isinstance(file, str) or not is_plain_name(file) or not file.endswith(".gguf"):
        raise PackError(_wrong(where, f"{prefix}file", "a plain file name that ends in .gguf", file))
    sha256 = data.get("sha256", _MISSING)
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise PackError(_wrong(where, f"{prefix}sha256", "64 hex digits", sha256))
    kind = data.get("kind", "")
    if kind not in KINDS:
        raise PackError(_wrong(where, f"{prefix}kind", "'emotion', 'trait' or ''", kind))
    positive, negative = (_text(where, data, key, prefix, default="") for key in ("positive", "negative"))
    site, rank = data.get("site", _SITE), data.get("rank", 1)
    if site != _SITE:
        from .vector import SITES  # it needs NumPy, and listing packs does not

        if site not in SITES:
            raise PackError(_wrong(where, f"{prefix}site", f"one of {', '.join(SITES)}", site))
    if type(rank) is not int or rank < 1:
        raise PackError(_wrong(where, f"{prefix}rank", "a positive number", rank))
    weak = data.get("weak", False)
    if not isinstance(weak, bool):
        raise PackError(_wrong(where, f"{prefix}weak", "true or false", weak))
    return Entry(file, sha256.lower(), kind, positive, negative, site, rank, weak)


def _fingerprint(where: Path, data: Mapping[str, Any]) -> Fingerprint:
    try:
        fingerprint = Fingerprint.from_mapping(data)
    except ValueError as error:
        raise PackError(f"{where}, model.{error}") from error
    for key in ("architecture", "vocabulary", "name"):
        _text(where, data, key, "model.", default="")
    return fingerprint


def _gguf_files(folder: Path) -> list[Path]:
    """Every vector file in `folder`, by name; dot-files belong to the system, or are being written."""
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() == ".gguf" and not path.name.startswith(".")
        )
    except OSError as error:
        raise PackError(f"{folder}: can't be read ({error.strerror})") from error


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, as hex. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read_vector(path: Path, sha256: str = "") -> tuple[str, Vector]:
    """The SHA-256 of the file's bytes, which must be `sha256` where that is given, and its vector."""
    require_regular(path)
    try:
        found = file_digest(path)
    except OSError as error:
        raise PackError(f"{path}: can't be read ({error.strerror})") from error
    if sha256 and found != sha256:
        raise PackError(
            f"{path}: expected SHA-256 {sha256}, as {MANIFEST} says, got {found}; fetch the pack again"
        )
    from .vectorfile import load  # numpy loads slowly, and listing packs needs none of it

    return found, load(path)


def _required_fingerprint(path: Path, vector: Vector) -> Fingerprint:
    if vector.fingerprint is None:
        raise PackError(f"{path}: expected the fingerprint of its model (mien.model.*), got none")
    return vector.fingerprint


def _common_fingerprint(folder: Path, vectors: Mapping[Path, Vector]) -> Fingerprint:
    """The fingerprint that all agree with: the first, or the first that knows its vocabulary."""
    if not vectors:
        raise PackError(f"{folder}: expected vector files (*.gguf), found none")
    found = {path: _required_fingerprint(path, vector) for path, vector in vectors.items()}
    first = next((path for path, fingerprint in found.items() if fingerprint.vocabulary), next(iter(found)))
    for path, fingerprint in found.items():
        differences = fingerprint.differences(found[first])
        if differences:
            raise ModelMismatch(f"{path} is not for the model that {first.name} is for", differences)
    return found[first]


def _manifest_entry(path: Path, sha256: str, vector: Vector) -> dict[str, Any]:
    if vector.name != path.stem:
        raise PackError(f"{path}: expected a vector named {path.stem!r}, as the file is, got {vector.name!r}")
    words: dict[str, Any] = {key: vector.meta.get(key, "") for key in ("kind", "positive", "negative")}
    words |= {"site": vector.site} if vector.site != _SITE else {}
    words |= {"rank": vector.rank} if vector.rank > 1 else {}
    words |= {"weak": True} if vector.meta.get("weak") else {}
    return {"file": path.name, "sha256": sha256, **{key: word for key, word in words.items() if word != ""}}
