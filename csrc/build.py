"""Builds `mien._engine`, the C engine behind cffi: a C compiler is all that it takes.

The declarations are the parts of the headers between the `cdef` marks, so there is one source of them.
MIEN_DEV=1 turns warnings into errors, as the test suite builds it.
"""

import os
import re
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def declarations(header: str) -> str:
    """The marked part of a header, as cffi's parser takes it."""
    text = (HERE / header).read_text()
    return re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", text, re.DOTALL).group(1)


warnings = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MIEN_DEV") == "1" else []
flags = (
    ["-std=c11", "-O3", "-ffp-contract=off", *warnings] if sys.platform != "win32" else ["/std:c11", "/O2"]
)

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
    extra_compile_args=flags,
    libraries=[] if sys.platform == "win32" else ["m"],
    py_limited_api=True,
)
