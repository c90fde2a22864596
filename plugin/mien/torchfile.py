"""Reading what `torch.save` wrote, without torch and without unpickling.

    NAME/data.pkl      a pickle: what was saved, its tensors as references to storages
    NAME/byteorder     "little" or "big"; "little" where it is missing
    NAME/data/K        the bytes of storage K

A pickle is a program, and loading it runs it. Here it is read as data: its opcodes work on plain
values, and of the functions and classes that it can name, those below are known by name and never
looked up. It is refused with the first other one, so nothing that it says is ever run.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import VectorFileError

MAX_BYTES = 512 << 20  # of all storages and tensors together
_MAX_PICKLE = 1 << 20  # a vector's is some kilobytes

_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = ("collections", "OrderedDict")
_STEERING_VECTOR = ("steering_vectors.steering_vector", "SteeringVector")
_STORAGES = {
    ("torch", "FloatStorage"): "f4",
    ("torch", "HalfStorage"): "f2",
    ("torch", "DoubleStorage"): "f8",
    ("torch", "BFloat16Storage"): "u2",  # the upper half of a float32, and no type of NumPy's
}
_KNOWN = {_REBUILD_TENSOR, _REBUILD_PARAMETER, _ORDERED_DICT, _STEERING_VECTOR, *_STORAGES}
_CLASSES = (_ORDERED_DICT, _STEERING_VECTOR)

_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What zipfile lets out when an archive lies about itself.
_BROKEN = (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, OSError, ValueError)


class Global(NamedTuple):
    """A function or class that the pickle names: its name, and nothing behind it."""

    module: str
    name: str


class Storage(NamedTuple):
    """kind: NumPy's type without byte order. key: of the entry data/KEY. length: in values."""

    kind: str
    key: str
    length: int


@dataclass
class Saved:
    """An object of the class `type`, as the attributes that were saved of it."""

    type: Global
    state: dict[Any, Any] = field(default_factory=dict)


def load(path: Path) -> Any:
    """What was saved: dict, list, tuple, str, numbers, None, and `Saved`; tensors as arrays.

    A tensor is an array of its shape, float64 where it was saved so and float32 otherwise: each value
    of float16 and bfloat16 is one of float32.

    Raises VectorFileError, naming the entry and for a pickle the byte, for a file that is no archive of
    torch's, is cut short, names a function, class or kind of tensor that is not known here, or whose
    tensors lie outside of their storages or are larger than MAX_BYTES together.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"PK\x03\x04":
            raise VectorFileError(
                path,
                f"expected a zip archive, as torch.save writes it, got a file that starts with {magic!r}. "
                f"A bare pickle, or a file of torch before 1.6, is not read: save it again with torch.save",
            )
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read()
    except _BROKEN as error:
        raise VectorFileError(path, f"can't be read ({error}); fetch it again") from error


def from_bfloat16(halves: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float32 of bfloat16, which is its upper half: uint16 in, a copy out."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


class _Reader:
    """One archive. `room`: the bytes that its storages and tensors may still take."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive, self.room = path, archive, MAX_BYTES
        self.size = path.stat().st_size
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].count("/") != 1:
            self.refuse("expected one data.pkl, in the archive's one folder; torch.save did not write this")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.storages: dict[Storage, npt.NDArray[Any]] = {}
        self.order = "<"

    def refuse(self, problem: str, where: str = "") -> NoReturn:
        raise VectorFileError(self.path, problem, where)

    def read(self) -> Any:
        if f"{self.folder}byteorder" in self.archive.namelist():
            order = self.entry("byteorder", 16)
            if order not in (b"little", b"big"):
                self.refuse(f"expected little or big, got {order!r}", "byteorder")
            self.order = "<" if order == b"little" else ">"
        return _Machine(self).run(self.entry("data.pkl", _MAX_PICKLE))

    def entry(self, name: str, most: int) -> bytes:
        """The bytes of an entry. It is stored, not deflated, so it can't be larger than the file."""
        try:
            info = self.archive.getinfo(self.folder + name)
        except KeyError:
            self.refuse("there is no such entry in the archive", name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            self.refuse("expected an entry that is stored, as torch.save does, got a packed one", name)
        if info.file_size > min(most, self.size):
            self.refuse(f"expected at most {min(most, self.size)} bytes, got {info.file_size}", name)
        return self.archive.read(info)

    def values(self, storage: Storage) -> npt.NDArray[Any]:
        """The storage's values, shape (count,), in the file's type."""
        if storage not in self.storages:
            where, kind = f"data/{storage.key}", np.dtype(self.order + storage.kind)
            self.take(storage.length * kind.itemsize, where)
            data = self.entry(where, MAX_BYTES)
            if len(data) != storage.length * kind.itemsize:
                self.refuse(f"expected {storage.length * kind.itemsize} bytes, got {len(data)}", where)
            self.storages[storage] = np.frombuffer(data, kind)
        return self.storages[storage]

    def take(self, size: int, where: str) -> None:
        self.room -= size
        if self.room < 0:
            self.refuse(f"with it there are more than {MAX_BYTES} bytes of tensors", where)

    def tensor(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """A copy of the view that `offset` and `strides`, counted in values, make of the storage."""
        where = f"data/{storage.key}"
        last, count = offset, 1
        for length, stride in zip(shape, strides):
            last, count = last + (length - 1) * stride, count * length
        if count == 0 or last >= storage.length:
            self.refuse(
                f"a tensor of shape {shape} and strides {strides} from {offset} is not within its "
                f"{storage.length} values",
                where,
            )
        self.take(count * (8 if storage.kind == "f8" else 4), where)
        values = self.values(storage)
        # The stride of a dimension of one can be any number, and means nothing.
        steps = tuple(stride * values.itemsize if n > 1 else 0 for n, stride in zip(shape, strides))
        view = np.ndarray(shape, values.dtype, values.data, offset * values.itemsize, steps)
        if storage.kind == "u2":
            return from_bfloat16(view)
        return view.astype(np.float64 if storage.kind == "f8" else np.float32)


class _Machine:
    """The pickle's stack machine, as far as torch.save makes use of it.

    Values are compared, hashed and shown only where they are texts or numbers: a few bytes of pickle
    can nest tuples so that to walk them would never end.
    """

    def __init__(self, reader: _Reader) -> None:
        self.reader, self.place = reader, 0
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[], None]] = {
            "MARK": self.mark,
            "TUPLE": lambda: self.push(tuple(self.to_mark())),
            "SETITEM": lambda: self.set_items([self.pop(), self.pop()][::-1]),
            "SETITEMS": lambda: self.set_items(self.to_mark()),
            "APPEND": lambda: self.append([self.pop()]),
            "APPENDS": lambda: self.append(self.to_mark()),
            "STACK_GLOBAL": lambda: self.named(*[self.pop(), self.pop()][::-1]),
            "BINPERSID": self.refer_to_storage,
            "REDUCE": self.call,
            "NEWOBJ": self.call,
            "BUILD": self.build,
            "MEMOIZE": lambda: self.memoize(len(self.memo)),
            "EMPTY_DICT": lambda: self.push({}),
            "EMPTY_LIST": lambda: self.push([]),
            "EMPTY_TUPLE": lambda: self.push(()),
        }

    def refuse(self, problem: str) -> NoReturn:
        self.reader.refuse(problem, f"data.pkl, byte {self.place}")

    def run(self, data: bytes) -> Any:
        try:
            for opcode, argument, place in pickletools.genops(data):
                self.place = place or 0
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        except ValueError as error:  # of genops, which knows the opcodes' layout
            self.refuse(f"the pickle is broken or cut short ({error})")
        self.refuse("the pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        if name in self.steps:
            self.steps[name]()
        elif name in _VALUES:
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name in _TUPLES:
            self.push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "GLOBAL":  # the module and the name, one space between
            self.named(*argument.split(" ", 1))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memoize(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                self.refuse(f"the pickle is broken: nothing was memoized as {argument}")
            self.push(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self.refuse(f"refused: {name} is no opcode that a saved vector needs. Nothing of it was run")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            self.refuse("the pickle is broken: it takes more from its stack than is there")
        return self.stack.pop()

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        if not self.marked:
            self.refuse("the pickle is broken: there is no mark")
        values, self.stack = self.stack, self.marked.pop()
        return values

    def memoize(self, index: int) -> None:
        self.memo[index] = self.pop()
        self.push(self.memo[index])

    def named(self, module: object, name: object = "") -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self.refuse("the pickle is broken: a name is no text")
        if (module, name) not in _KNOWN:
            self.refuse(
                f"refused: it names {f'{module}.{name}'[:100]!r}, and only tensors of floats, dicts and "
                f"steering_vectors' SteeringVector are read. Nothing of it was run"
            )
        self.push(Global(module, name))

    def set_items(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not dict or len(items) % 2:
            self.refuse("the pickle is broken: expected a dict and pairs")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (int, str):
                self.refuse(f"expected a number or a text as key, got {type(key).__name__}")
            target[key] = value
        self.push(target)

    def append(self, items: list[Any]) -> None:
        target = self.pop()
        if type(target) is not list:
            self.refuse("the pickle is broken: expected a list")
        target += items
        self.push(target)

    def refer_to_storage(self) -> None:
        found = self.pop()
        if type(found) is not tuple or len(found) != 5:
            self.refuse("expected a reference to a storage")
        word, kind, key, _, count = found
        if type(word) is not str or word != "storage" or type(kind) is not Global or kind not in _STORAGES:
            self.refuse("expected a reference to a storage")
        if type(key) is not str or not key.isdecimal() or type(count) is not int or count < 0:
            self.refuse("expected a storage's number and its count of values")
        self.push(Storage(_STORAGES[kind], key, count))

    def call(self) -> None:
        """REDUCE and NEWOBJ: what the known names make of their arguments."""
        arguments, target = self.pop(), self.pop()
        if type(target) is not Global or type(arguments) is not tuple:
            self.refuse("refused: it calls what is no function or class by name. Nothing of it was run")
        if target in _CLASSES and not arguments:
            self.push({} if target == _ORDERED_DICT else Saved(target))
        elif target == _REBUILD_TENSOR:
            self.push(self.rebuild(arguments))
        elif target == _REBUILD_PARAMETER and arguments and isinstance(arguments[0], np.ndarray):
            self.push(arguments[0])
        else:
            self.refuse(f"refused: {target.module}.{target.name} is called in a way that torch.save does not")

    def rebuild(self, arguments: tuple[Any, ...]) -> npt.NDArray[Any]:
        if len(arguments) < 4 or type(arguments[0]) is not Storage:
            self.refuse("expected a tensor's storage, offset, shape and strides")
        storage, offset, shape, strides = arguments[:4]
        plain = type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) <= 8
        if not plain or any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            self.refuse("expected an offset, a shape and strides of 0 or more, in at most 8 dimensions")
        return self.reader.tensor(storage, offset, shape, strides)

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, Saved) or type(state) is not dict:
            self.refuse("expected the attributes of a SteeringVector")
        target.state.update(state)
        self.push(target)
