"""Writing a file so that it holds either what it held before or all of the new data."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replaceable(path: str | Path) -> Path:
    """The file that writing to `path` replaces: `path` itself, or what it leads to if it is a symlink.

    Raises OSError if that exists and is not a regular file: a rename would put a file in the place of a
    device or a FIFO.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # also a symlink to a file that does not exist yet
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        problem = "it already exists and is not a regular file"
        raise FileExistsError(errno.EEXIST, problem, str(path))
    return Path(os.path.realpath(path))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write to; at the end of the context it replaces `path`, see `replaceable`.

    The folder of `path` is made if it does not exist. On any error `path` is as it was. Raises OSError.
    """
    target = replaceable(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that replacing is one rename.
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
