"""Builds `mien._engine`, the C engine behind cffi: it requires a C compiler (gcc or clang) and nothing else.

The declarations are the parts of the headers between the `cdef` marks, so there is one source of them.
MIEN_DEV=1 turns warnings into errors, as the test suite builds it.
"""

import os
import re
import sys
from pathlib import Path

from cffi import FFI

if sys.platform == "win32":
    raise SystemExit(
        "\nmien: Windows is not supported, got sys.platform win32. The C engine builds on Linux and macOS,\n"
        "with gcc or clang. On Windows, install mien inside WSL (https://learn.microsoft.com/windows/wsl).\n"
    )

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def declarations(header: str) -> str:
    """The marked part of a header, as cffi's parser takes it."""
    text = (HERE / header).read_text()
    return re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", text, re.DOTALL).group(1)


warnings = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MIEN_DEV") == "1" else []

ffibuilder = FFI()
for header in ("mien_program.h", "mien_batch.h", "mien_llama.h"):
    ffibuilder.cdef(declarations(header))
ffibuilder.set_source(
    "mien._engine",
    '#include "mien_program.h"\n#include "mien_llama.h"\n',
    sources=[
        os.path.relpath(HERE / f"mien_{part}.c", ROOT)
        for part in ("kernels", "program", "ggml", "batch", "llama")
    ],
    include_dirs=["csrc"],
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", *warnings],
    libraries=["m"],
    py_limited_api=True,
)
