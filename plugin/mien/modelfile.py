"""What a model's files say about it, without a runtime: its fingerprint, its context, its size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architectures import gguf_architecture
from .errors import ModelFileError, ModelNotFound, VectorFileError
from .fingerprint import Fingerprint, vocabulary_digest
from .models import find_model

# transformers' name and gpt2's; the same in a GGUF file is ARCHITECTURE.block_count.
_N_LAYER = ("num_hidden_layers", "n_layer", "num_layers")
_N_EMBD = ("hidden_size", "n_embd", "d_model")
_OTHER_KINDS = {
    "adapter": "a LoRA adapter",
    "mmproj": "a multimodal projector",
    "imatrix": "an importance matrix",
}
_N_CTX = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True)
class ModelFile:
    """A model that is not loaded.

    path: its GGUF file, or a transformers model's folder. n_ctx: the context it was trained with, in tokens,
    0 if its file does not say. size: of the file, or of all files in the folder, in bytes. chat_template:
    whether there is one.
    """

    path: Path
    fingerprint: Fingerprint
    n_ctx: int
    size: int
    chat_template: bool


def fingerprint_of(path: str | Path) -> Fingerprint:
    """The fingerprint of a model that is not loaded.

    path: a GGUF file, or a transformers model's folder, of which config.json alone is read: its
    fingerprint has no vocabulary, and none is compared.

    Raises ModelNotFound if there is no such model, ModelFileError if its file is broken, something else or a
    later part of a split model, or does not say what is needed.
    """
    return describe(path).fingerprint


def describe(path: str | Path) -> ModelFile:
    """What the files of a model say about it. path, errors: as for `fingerprint_of`."""
    path = Path(path)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    data = _of_folder(path) if path.is_dir() else _of_gguf(find_model(path))
    try:
        fingerprint = Fingerprint.from_mapping(data)
    except ValueError as error:
        raise ModelFileError(path, f"not a model that mien knows how to read ({error})") from error
    n_ctx = data["n_ctx"] if isinstance(data["n_ctx"], int) else 0
    size = sum(file.stat().st_size for file in files)
    return ModelFile(path, fingerprint, n_ctx, size, bool(data["chat_template"]))


def _of_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path}: expected a transformers model's configuration ({error})") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"expected a transformers model's configuration ({error})") from error
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a model that takes pictures too
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelFileError(path, "expected a transformers model's configuration, with a model_type")
    return {
        "architecture": gguf_architecture(config["model_type"]),
        "n_layer": next((config[key] for key in _N_LAYER if key in config), None),
        "n_embd": next((config[key] for key in _N_EMBD if key in config), None),
        "n_ctx": next((config[key] for key in _N_CTX if key in config), 0),
        "chat_template": (folder / "chat_template.jinja").is_file() or _has_template(folder),
        "name": folder.resolve().name,
    }


def _has_template(folder: Path) -> bool:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "chat_template" in settings


def _of_gguf(path: Path) -> dict[str, Any]:
    from .vectorfile import BROKEN, open_gguf

    try:
        fields = open_gguf(path).fields

        def value(key: str, default: Any = None) -> Any:
            return fields[key].contents() if key in fields else default

        architecture = value("general.architecture")
        _require_model(path, architecture, value)
        blocks = value(f"{architecture}.block_count")
        # Blocks that only guess ahead belong to the file's count, and not to llama.cpp's.
        ahead = value(f"{architecture}.nextn_predict_layers", 0)
        tokens = fields.get("tokenizer.ggml.tokens")
        return {
            "architecture": architecture,
            "n_layer": blocks - ahead if isinstance(blocks, int) else blocks,
            "n_embd": value(f"{architecture}.embedding_length"),
            "chat_template": "tokenizer.chat_template" in fields,
            "n_ctx": value(f"{architecture}.context_length", 0),
            "vocabulary": vocabulary_digest(_texts(tokens)) if tokens is not None else "",
            "name": value("general.basename") or value("general.name", ""),
        }
    except VectorFileError as error:
        raise ModelFileError(path, error.problem) from error
    except BROKEN as error:
        raise ModelFileError(path, f"the metadata is broken ({error})") from error


def _require_model(path: Path, architecture: Any, value: Callable[..., Any]) -> None:
    """Raises ModelFileError for a GGUF that is known to be something else, and says what."""
    if architecture == "controlvector":
        raise ModelFileError(path, "expected a model, got a vector")
    kind = value("general.type", "model")
    if kind in _OTHER_KINDS:
        raise ModelFileError(path, f"expected a model, got {_OTHER_KINDS[kind]} (general.type is {kind!r})")
    if part := value("split.no", 0):
        raise ModelFileError(
            path,
            f"this is part {part + 1} of {value('split.count', 'several')} of a split model; name its first "
            "part, which describes the model (-00001-of-...)",
        )


def _texts(tokens: Any) -> Iterator[bytes]:
    """As llama.cpp holds them: cut at a zero byte, and an empty one named by its id."""
    for i, index in enumerate(tokens.data):
        text = bytes(tokens.parts[index]).partition(b"\0")[0]
        yield text or f"[EMPTY_{i}]".encode()
