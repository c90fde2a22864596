"""Installing, removing and exporting packs.

A pack comes as a folder or a zip from anywhere, so nothing it says is trusted: names, sizes and kinds
of files are checked one by one, bytes are counted as they come, and only a pack that verifies whole
is moved into place.
"""

from __future__ import annotations

import copy
import io
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .errors import MienError, NameNotFound, PackError
from .pack import MANIFEST, Pack, is_pack_name, is_plain_name, require_regular, write_whole
from .registry import Registry, shipped_packs, user_packs

MAX_ENTRIES = 256
MAX_BYTES = 512 << 20  # of all files together, unpacked

FORCE = "Use --force, in Python force=True, to replace it."

_CHUNK = 1 << 16
_DRIVE = re.compile(r"[A-Za-z]:")
# General purpose flags: encrypted, strongly encrypted, encrypted directory.
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile lets out when an archive lies about itself.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError)


def install(source: str | Path, force: bool = False) -> Pack:
    """Copy the pack in `source` to the user's packs, and give it as it lies there.

    source: a pack's folder, or a zip of one. force: replace an installed pack of the same name.

    Raises PackError, naming the file, for a pack that is broken or unsafe, does not verify whole, or is
    already installed. On error, and on an interrupt before the last rename, what was installed is as it
    was and nothing is left behind.
    """
    source = Path(source)
    home = user_packs()
    try:
        home.mkdir(parents=True, exist_ok=True)
        # On the file system of the target, so that moving it there is one rename.
        with tempfile.TemporaryDirectory(dir=home, prefix=".install-", ignore_cleanup_errors=True) as work:
            new = Path(work, "pack")
            new.mkdir()
            pack = _fetch_and_verify(source, new)
            target = home / pack.name
            if os.path.lexists(target) and not force:
                raise PackError(_already_installed(pack, target))
            move_into_place(new, target, aside=Path(f"{work}.old"))
    except OSError as error:
        raise PackError(f"{source}: can't be installed into {home} ({error})") from error
    return Pack.read(target)


def remove(name: str) -> Path:
    """Remove an installed pack; gives the folder where it was.

    name: the pack's name, such as `smollm2-135m-instruct`.

    Raises NameNotFound if there is no pack of that name. PackError if it can't be moved, is shipped with
    mien, or is brought by MIEN_PATH or a Python package: those are not mien's to remove.
    """
    home = user_packs()
    target = home / name
    try:
        installed = [path.name for path in home.iterdir()] if home.is_dir() else []
        installed = [file for file in installed if is_pack_name(file)]  # the others are work in progress
        if name not in installed:
            _require_not_elsewhere(name)
            hint = f"Only packs in {home} can be removed."
            raise NameNotFound(name, installed, what="pack", hint=hint)
        # Out of sight by one rename: what is half deleted is never taken for a pack.
        with tempfile.TemporaryDirectory(dir=home, prefix=".remove-", ignore_cleanup_errors=True) as work:
            os.rename(target, Path(work, "pack"))
    except OSError as error:
        raise PackError(f"{target}: can't be removed ({error.strerror})") from error
    return target


def _require_not_elsewhere(name: str) -> None:
    """Raises PackError if a pack of that name is on the search path, where nobody installed it."""
    for pack in Registry().packs():
        if pack.name == name and shipped_packs() in (pack.path, *pack.path.parents):
            raise PackError(f"{name} is shipped with mien and can't be removed")
        if pack.name == name:
            raise PackError(f"{name} was not installed by mien: remove {pack.path} yourself")


def export(pack: Pack, target: str | Path, force: bool = False) -> Path:
    """Write the pack as a zip, `install` takes it; the same pack gives the same bytes. Gives `target`.

    force: replace an existing file. Packed are the manifest, the files that it names, README.md and
    LICENSE*, in a folder named as the pack. Entries are stored, not deflated: floats hardly shrink, and
    deflated bytes differ between versions of zlib.

    Raises what `Pack.load` raises for a vector that is not as the manifest says, and PackError if
    `target` exists without `force` or can't be written. On error an existing file is as it was.
    """
    target = Path(target)
    require_new(target, force)
    pack = Pack.read(pack.path)  # the manifest as it is now is the one that travels
    for name in pack.entries:
        pack.load(name)
    files = {MANIFEST, *(entry.file for entry in pack.entries.values())}
    try:
        files |= {path.name for path in pack.path.iterdir() if _is_text(path.name) and not path.is_dir()}
        data = _zip(pack, sorted(files))
    except OSError as error:
        raise PackError(f"{pack.path}: can't be read ({error})") from error
    write_whole(target, data)
    return target


@contextmanager
def unpacked(source: str | Path) -> Iterator[Pack]:
    """The pack in the zip `source`, as it lies in a temporary folder until the end of the context.

    Raises PackError, naming `source`, for what is not a zip of a pack, or is unsafe. Its vectors are not
    checked.
    """
    source = Path(source)
    with tempfile.TemporaryDirectory(prefix="mien-") as work:
        try:
            _fetch(source, Path(work))
            pack = Pack.read(work)
        except PackError as error:
            raise PackError(str(error).replace(work, str(source))) from error
        yield pack


def _zip(pack: Pack, files: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            require_regular(pack.path / file)
            info = zipfile.ZipInfo(f"{pack.name}/{file}", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, also where it isn't: the mode below is Unix's
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, (pack.path / file).read_bytes())
    return buffer.getvalue()


def _fetch_and_verify(source: Path, new: Path) -> Pack:
    """Fill the empty folder `new` from `source`. Raises PackError with every problem of the pack."""
    _fetch(source, new)
    try:
        pack = Pack.read(new)
        problems = pack.verify()
    except MienError as error:
        problems = [error]
    if problems:
        # `new` is about to go; what the user knows is `source`.
        raise PackError("\n".join(str(problem).replace(str(new), str(source)) for problem in problems))
    return pack


def _fetch(source: Path, new: Path) -> None:
    """Fill the empty folder `new` with the files in `source`, a folder or a zip."""
    if source.is_dir():
        _copy_folder(source, new)
    elif not source.exists():
        raise PackError(f"{source}: there is no such file or folder")
    elif not zipfile.is_zipfile(source):
        raise PackError(f"{source}: expected the folder of a pack, or a zip file; this is neither")
    else:
        _unpack(source, new)


def _already_installed(pack: Pack, target: Path) -> str:
    try:
        there = Pack.read(target).version
    except PackError:
        return f"{target}: there is something that is no readable pack. {FORCE}"
    if there == pack.version:
        return f"{pack.name} {there} is already installed in {target}. {FORCE}"
    return f"{pack.name} {there} is installed in {target}, and this is version {pack.version}. {FORCE}"


def require_new(target: Path, force: bool) -> None:
    """Raises PackError if there is something at `target`, unless it is to be replaced."""
    if not force and os.path.lexists(target):
        raise PackError(f"{target}: it already exists. {FORCE}")


def move_into_place(new: Path, target: Path, aside: Path) -> None:
    """Rename `new` to `target`; what was there waits in `aside` and goes back if that fails."""
    try:
        if os.path.lexists(target):
            os.rename(target, aside)
        os.rename(new, target)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)


def _is_text(name: str) -> bool:
    return name == "README.md" or (name.startswith("LICENSE") and is_plain_name(name))


def _is_known(name: str) -> bool:
    return name == MANIFEST or _is_text(name) or (name.endswith(".gguf") and is_plain_name(name))


def _require_known(shown: str, name: str) -> None:
    if not _is_known(name):
        raise PackError(f"{shown}: expected only {MANIFEST}, *.gguf, README.md and LICENSE* in a pack")


def _require_few(source: Path, count: int) -> None:
    if count > MAX_ENTRIES:
        raise PackError(f"{source}: expected at most {MAX_ENTRIES} entries, got {count}")


def _pour(stream: IO[bytes], target: Path, size: int, room: int, shown: str) -> None:
    """Copy `stream` to the new file `target`, believing no header.

    size: the bytes that are promised. room: the bytes that may still come. Raises PackError at the first
    chunk that goes beyond either, or when fewer come than promised.
    """
    count = 0
    with open(target, "xb") as file:
        while chunk := stream.read(_CHUNK):
            count += len(chunk)
            if count > size:
                raise PackError(f"{shown}: expected the {size} bytes that were announced, got more")
            if count > room:
                raise PackError(f"{shown}: with it the pack is larger than {MAX_BYTES} bytes")
            file.write(chunk)
    if count != size:
        raise PackError(f"{shown}: expected the {size} bytes that were announced, got {count}")


def _copy_folder(source: Path, new: Path) -> None:
    """Copy the files of a pack; what else its maker keeps beside them, such as texts, stays behind."""
    files = [path for path in sorted(source.iterdir()) if _is_known(path.name)]
    _require_few(source, len(files))
    room = MAX_BYTES
    for path in files:
        require_regular(path)
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            _pour(stream, new / path.name, size, room, str(path))
        room -= size


def _unpack(source: Path, new: Path) -> None:
    """Unpack the files of a pack, without the folder that may be around them."""
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            _require_few(source, len(entries))
            for info in entries:
                _require_safe(source, info)
            _require_flat(source, entries)
            room = MAX_BYTES
            for info in entries:
                if info.is_dir():
                    continue
                shown = f"{source}, {info.filename!r}"
                name = info.filename.rpartition("/")[2]
                _require_known(shown, name)
                # zipfile would stop silently at the promised size; asked for more, it shows a lie.
                probe = copy.copy(info)
                probe.file_size = sys.maxsize
                with archive.open(probe) as stream:
                    _pour(stream, new / name, info.file_size, room, shown)
                room -= info.file_size
    except _BROKEN as error:
        raise PackError(f"{source}: the zip file is broken ({error}); fetch it again") from error


def _require_safe(source: Path, info: zipfile.ZipInfo) -> None:
    """Raises PackError for an entry that could land elsewhere, or be something else than a file."""
    # The name as it stands in the archive: `filename` has been cut at a zero byte, or replaced.
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    kind = stat.S_IFMT(info.external_attr >> 16)
    expected_kind = stat.S_IFDIR if name.endswith("/") else stat.S_IFREG
    problem = ""
    if "\\" in name:
        problem = "a backslash in a name"
    elif name.startswith("/"):
        problem = "an absolute path"
    elif _DRIVE.match(name):
        problem = "a drive letter"
    elif ".." in parts:
        problem = "a path with '..'"
    elif name != info.filename or "." in parts or "" in parts:
        problem = "a path that is not plain"
    elif kind == stat.S_IFLNK:
        problem = "a symlink"
    elif kind not in (0, expected_kind):
        problem = "an entry that is not a regular file"
    elif info.flag_bits & _ENCRYPTED:
        problem = "an encrypted entry"
    elif info.compress_type not in _METHODS:
        problem = f"compression method {info.compress_type}; only stored and deflated are read"
    if problem:
        raise PackError(f"{source}, {name!r}: refused, {problem}")


def _require_flat(source: Path, entries: Iterable[zipfile.ZipInfo]) -> None:
    """Raises PackError for entries that are twice there, or not all in the root or in one folder."""
    paths: set[str] = set()
    folders: set[str] = set()
    for info in entries:
        path = info.filename.removesuffix("/")
        if path.casefold() in paths:
            raise PackError(f"{source}, {path!r}: refused, the name is there twice (case does not count)")
        paths.add(path.casefold())
        folders.add(path if info.is_dir() else path.rpartition("/")[0])
        nested = next((folder for folder in sorted(folders) if "/" in folder), None)
        if nested is not None or len(folders) > 1:
            raise PackError(
                f"{source}, {path!r}: refused, expected all files in one folder, "
                f"got {', '.join(repr(folder or '.') for folder in sorted(folders))}"
            )
