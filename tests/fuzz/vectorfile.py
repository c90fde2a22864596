"""Any file is a vector or a VectorFileError; a vector that was read can be written, and is the same again.

See driver.py for how to run it. A file that does not hold is left where the message says.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import driver
import numpy as np
from mien import interchange, vectorfile
from mien.errors import MienError, VectorFileError

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
LAYOUTS = {UINT8: "B", INT8: "b", UINT16: "H", INT16: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}
LAYOUTS |= {UINT64: "Q", INT64: "q", FLOAT64: "d"}
F32, F16, Q8_0, I32 = 0, 1, 8, 26

SITES = ["residual", "attention", "mlp", "heads", "neurons", "experts", "queries", "direction"]
INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    (1 << 63) - 1,
    -1,
    -(1 << 31),
]
NUMBERS = [0.0, -0.0, 1.0, 0.1, 1e-45, 3.4e38, 1e39, 1e300, float("inf"), float("nan")]
TEXTS = [
    "",
    "llama",
    "joy",
    "x" * 300,
    "größe",
    "\0",
    "a\nb",
    "\x1b[2J",
    "controlvector",
    "mien-vector",
    *SITES,
]
KEYS = ["name", "site", "width", "model_hint", "bias", "center", "strength", "samples", "model.architecture"]
KEYS += [
    "model.n_layer",
    "model.n_embd",
    "model.vocabulary",
    "model.name",
    "kind",
    "calibration.dose",
    "",
    "größe",
]
PREFIXES = ["mien.", "mien.", "mien.", "controlvector.", "general.", ""]


@dataclass
class File:
    """What a GGUF file is made of. fields: (key, kind, value), an array's value being (kind, list).

    tensors: [name, dims, kind, data]. lies: numbers that are written in place of the true ones.
    """

    fields: list[tuple[str, int, Any]]
    tensors: list[list[Any]]
    version: int = 3
    lies: dict[str, int] = field(default_factory=dict)


def _text(value: str) -> bytes:
    data = value.encode(errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack(f"<{LAYOUTS[kind]}", value)


def encoded(file: File) -> bytes:
    infos, data = b"", b""
    for name, dims, kind, values in file.tensors:
        offset = file.lies.get(f"offset {name}", len(data)) % (1 << 64)
        infos += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        data += values + b"\0" * (-len(values) % 32)
    counts = file.lies.get("tensors", len(file.tensors)), file.lies.get("fields", len(file.fields))
    head = b"GGUF" + struct.pack("<IQQ", file.version, *counts)
    for key, kind, value in file.fields:
        head += _text(key) + struct.pack("<I", kind) + _value(kind, value)
    head += infos
    return head + b"\0" * (-len(head) % 32) + data


# ---- files that hold ----


def _floats(dice: random.Random, count: int) -> bytes:
    return np.array([dice.uniform(-2, 2) for _ in range(count)], dtype=np.float32).tobytes()


def _meta(dice: random.Random, site: str, layers: int, rank: int) -> list[tuple[str, int, Any]]:
    found: list[tuple[str, int, Any]] = [
        ("mien.name", STRING, "joy"),
        ("mien.kind", STRING, "trait"),
        ("mien.samples", INT64, 240),
        ("mien.scale", FLOAT64, 0.1),
        ("mien.checked", BOOL, True),
        ("mien.words", ARRAY, (STRING, ["glad", "fröhlich"])),
        ("mien.center", ARRAY, (FLOAT32, [0.5] * (layers * rank))),
        ("mien.bias", ARRAY, (FLOAT32, [0.25] * layers)),
        ("mien.calibration.dose", ARRAY, (FLOAT64, [0.5, 1.0])),
        ("mien.model.architecture", STRING, "llama"),
        ("mien.model.n_layer", INT64, 12),
        ("mien.model.n_embd", INT64, 4),
    ]
    model = found[-3:] if dice.random() < 0.5 else []
    return dice.sample(found[:-3], dice.randrange(len(found) - 2)) + model


def sound(dice: random.Random) -> File:
    """A file of one of the kinds; now and then it may still not hold, such as for a width."""
    layers = sorted(dice.sample(range(1, 12), dice.randrange(1, 4)))
    if dice.random() < 0.4:
        site, width, rank = "residual", 4, 1
        fields = [
            ("general.architecture", STRING, "controlvector"),
            ("controlvector.model_hint", STRING, "llama"),
        ]
        fields.append(("controlvector.layer_count", UINT32, len(layers)))
        tensors = [[f"direction.{n}", [width], F32, _floats(dice, width)] for n in layers]
        return File(fields + _meta(dice, site, len(layers), rank), tensors)
    site = dice.choice(SITES[:6])
    rank = dice.randrange(2, 4) if site == "residual" else dice.choice([1, 1, 2, 3])
    width = dice.choice([1, 5, 40]) if site in ("heads", "neurons", "experts") else 4
    fields = [("general.architecture", STRING, "mien-vector"), ("mien.site", STRING, site)]
    fields += [("mien.width", INT64, width), ("mien.model_hint", STRING, "llama")]
    tensors = []
    for n in layers:
        if site == "neurons" and rank == 1 and dice.random() < 0.7:
            at = sorted(dice.sample(range(width), min(width, dice.randrange(1, 9))))
            index = np.array(at, dtype=np.int32).tobytes()
            tensors.append([f"neurons.{n}.index", [len(at)], I32, index])
            tensors.append([f"neurons.{n}.value", [len(at)], F32, _floats(dice, len(at))])
        else:
            dims = [width] if rank == 1 else [width, rank]
            tensors.append([f"{site}.{n}", dims, F32, _floats(dice, width * rank)])
    return File(fields + _meta(dice, site, len(layers), rank), tensors)


# ---- and what becomes of them ----


def _any_value(dice: random.Random, depth: int = 0) -> tuple[int, Any]:
    kind = dice.randrange(13)
    if kind == STRING:
        return kind, dice.choice(TEXTS)
    if kind == BOOL:
        return kind, dice.random() < 0.5
    if kind in (FLOAT32, FLOAT64):
        values = [x for x in NUMBERS if kind == FLOAT64 or not 3.5e38 < abs(x) < 1e301]
        return kind, dice.choice(values)
    if kind == ARRAY:
        inner, value = _any_value(dice, depth + 1) if depth < 3 else (INT32, 3)
        same = [value] * dice.randrange(5)
        return kind, (inner, same)
    size = struct.calcsize(LAYOUTS[kind]) * 8
    low, high = (
        (0, (1 << size) - 1) if LAYOUTS[kind].isupper() else (-(1 << (size - 1)), (1 << (size - 1)) - 1)
    )
    return kind, max(low, min(high, dice.choice(INTEGERS)))


def _change_field(dice: random.Random, file: File) -> None:
    at = dice.randrange(len(file.fields))
    key, kind, value = file.fields[at]
    change = dice.randrange(6)
    if change == 0:
        del file.fields[at]
    elif change == 1:
        file.fields.append((dice.choice(PREFIXES) + dice.choice(KEYS), *_any_value(dice)))
    elif change == 2:
        file.fields[at] = (key, *_any_value(dice))
    elif change == 3 and kind == ARRAY:
        inner, items = value
        file.fields[at] = (key, kind, (inner, items[:-1] if dice.random() < 0.5 else items * 2))
    elif change == 4 and kind == STRING:
        file.fields[at] = (key, kind, dice.choice(TEXTS))
    else:
        file.fields.append(file.fields[at])


def _change_tensor(dice: random.Random, file: File) -> None:
    at = dice.randrange(len(file.tensors))
    tensor = list(file.tensors[at])
    name, dims, _, data = tensor
    change = dice.randrange(9)
    if change == 0:
        end = dice.choice(
            ["0", "1", "01", "-1", "9999", "10000", "x", "2.index", "2.value", "2.other", "\u0661", ""]
        )
        tensor[0] = f"{dice.choice(SITES)}{dice.choice(['.', '.', ''])}{end}"
    elif change == 1:
        tensor[1] = dice.choice(
            [[], [0], [1, *dims], [*dims, 1], dims[::-1], [n + 1 for n in dims], [1 << 40], [1 << 62, 4]]
        )
    elif change == 2:
        tensor[2] = dice.choice([F16, Q8_0, I32, F32, 24, 27, 28, 30, 99, (1 << 32) - 1])
    elif change == 3 and len(data) >= 4:
        at_value = dice.randrange(len(data) // 4) * 4
        value = dice.choice([np.nan, np.inf, -np.inf, 1e-45, -0.0])
        tensor[3] = data[:at_value] + struct.pack("<f", value) + data[at_value + 4 :]
    elif change == 4:
        tensor[3] = data[: dice.randrange(len(data) + 1)]
    elif change == 5:
        file.lies[f"offset {name}"] = dice.choice(INTEGERS)
    elif change == 6 and len(data) >= 4:
        at_value = dice.randrange(len(data) // 4) * 4
        number = dice.choice([-1, 0, 1, 39, 40, (1 << 31) - 1, -(1 << 31)])
        tensor[3] = data[:at_value] + struct.pack("<i", number) + data[at_value + 4 :]
    elif change == 7 and len(file.tensors) > 1:
        del file.tensors[at]
        return
    else:
        file.tensors.insert(dice.randrange(len(file.tensors)), tensor)
        return
    file.tensors[at] = tensor


def _change_bytes(dice: random.Random, data: bytes) -> bytes:
    broken = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        at = dice.randrange(len(broken))
        change = dice.randrange(5)
        if change == 0:
            broken[at] ^= 1 << dice.randrange(8)
        elif change == 1:
            broken[at] = dice.choice([0, 1, 127, 128, 255])
        elif change == 2:
            width = dice.choice([4, 8])
            broken[at : at + width] = (dice.choice(INTEGERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif change == 3:
            other = dice.randrange(len(broken))
            broken[at:at] = broken[min(at, other) : max(at, other)][:64]
        else:
            del broken[at : at + dice.randrange(1, 40)]
        broken = broken or bytearray(b"G")
    return bytes(broken[: dice.randrange(len(broken) + 1)] if dice.random() < 0.1 else broken)


def make(dice: random.Random) -> bytes:
    file = sound(dice)
    for _ in range(dice.choice([0, 1, 1, 2, 3])):
        dice.choice([_change_field, _change_tensor])(dice, file)
    if dice.random() < 0.05:
        file.lies[dice.choice(["tensors", "fields"])] = abs(dice.choice(INTEGERS))
    if dice.random() < 0.05:
        file.version = dice.choice([0, 1, 2, 3, 4, 3 << 24])
    data = encoded(file)
    return _change_bytes(dice, data) if dice.random() < 0.4 else data


class Check:
    """In a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.path, self.again = folder / "input.gguf", folder / "again.gguf"

    def __call__(self, data: bytes) -> bool:
        self.path.write_bytes(data)
        try:
            interchange.read(self.path)
        except MienError as refusal:
            str(refusal)
        try:
            vector = vectorfile.load(self.path)
        except VectorFileError as refusal:
            where = refusal.path
            assert where == str(self.path)
            return False
        if vector.model_hint:  # else it can't be written, and says so
            vector.save(self.again)
            again = vectorfile.load(self.again)
            assert (again.digest, again.site, again.name) == (vector.digest, vector.site, vector.name)
            assert (again.fingerprint, again.model_hint) == (vector.fingerprint, vector.model_hint)
            first = self.again.read_bytes()
            again.save(self.again)
            assert self.again.read_bytes() == first
        return True


def target(folder: Path) -> driver.Target[bytes]:
    check = Check(folder)
    return driver.Target(make, check, lambda data: f"{len(data)} bytes, in {check.path}\n{data[:2000]!r}")


if __name__ == "__main__":
    sys.exit(driver.main(target(Path(tempfile.mkdtemp(prefix="mien-fuzz-")))))
