"""Small packs, sound and unsound, for the tests of pack, install and registry."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from mien.fingerprint import Fingerprint
from mien.pack import Pack
from mien.vector import MetaValue, Vector

MODEL = Fingerprint("llama", 4, 8, vocabulary="ab" * 32, name="tiny")
OTHER_MODEL = Fingerprint("llama", 4, 16, vocabulary="cd" * 32, name="wide")


def make_vector(
    name: str,
    model: Fingerprint | None = MODEL,
    value: float = 1.0,
    meta: Mapping[str, MetaValue] | None = None,
) -> Vector:
    """Directions at layers 1 and 2, every float `value`."""
    n_embd = model.n_embd if model else 8
    row = np.full(n_embd, value, dtype=np.float32)
    return Vector.from_directions(name, {1: row, 2: row}, model, "llama", meta)


def make_pack(
    folder: Path,
    name: str = "tiny",
    vectors: Iterable[str] = ("anger", "joy"),
    model: Fingerprint = MODEL,
    version: str = "1.0",
    value: float = 1.0,
) -> Pack:
    for vector in vectors:
        meta: dict[str, MetaValue] = {"kind": "emotion", "positive": f"full of {vector}"}
        make_vector(vector, model, value, meta).save(folder / f"{vector}.gguf")
    return Pack.build(folder, name=name, version=version, licence="MIT")


def make_zip(folder: Path, target: Path, top: str = "") -> Path:
    """A zip of the files in `folder`, as any zip tool would make it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{top}{path.name}")
    return target


def zip_entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def patch_directory(archive: Path, offset: int, layout: str, change: Callable[[int], int]) -> None:
    """Change one number of the last entry in a zip's central directory.

    offset: of the number in the entry's record, from its signature. layout: as for struct.
    """
    data = bytearray(archive.read_bytes())
    place = data.rindex(b"PK\x01\x02") + offset
    (value,) = struct.unpack_from(layout, data, place)
    struct.pack_into(layout, data, place, change(value))
    archive.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """{path below `folder`: its bytes} for every file, hidden ones too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }
