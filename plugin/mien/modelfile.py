"""What the files of a model say of it, without a runtime: its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .architectures import gguf_architecture
from .errors import ModelNotFound, VectorFileError
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


def fingerprint_of(path: str | Path) -> Fingerprint:
    """The fingerprint of a model that is not loaded.

    path: a GGUF file, or a transformers model's folder, of which config.json alone is read: its
    fingerprint has no vocabulary, and none is compared.

    Raises ModelNotFound if there is no such model, the file is something else or a later part of a split
    model, or it does not say what is needed.
    """
    path = Path(path)
    data = _of_folder(path) if path.is_dir() else _of_gguf(find_model(path))
    try:
        return Fingerprint.from_mapping(data)
    except ValueError as error:
        raise ModelNotFound(f"{path}: not a model that mien knows how to read ({error})") from error


def _of_folder(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{path}: expected a transformers model's configuration ({error})") from error
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a model that takes pictures too
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelNotFound(f"{path}: expected a transformers model's configuration, with a model_type")
    return {
        "architecture": gguf_architecture(config["model_type"]),
        "n_layer": next((config[key] for key in _N_LAYER if key in config), None),
        "n_embd": next((config[key] for key in _N_EMBD if key in config), None),
        "name": folder.resolve().name,
    }


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
            "vocabulary": vocabulary_digest(_texts(tokens)) if tokens is not None else "",
            "name": value("general.basename") or value("general.name", ""),
        }
    except VectorFileError as error:
        raise ModelNotFound(f"{path}: {error.problem}") from error
    except BROKEN as error:
        raise ModelNotFound(f"{path}: the metadata is broken ({error})") from error


def _require_model(path: Path, architecture: Any, value: Callable[..., Any]) -> None:
    """Raises ModelNotFound for a GGUF that is known to be something else, and says what."""
    if architecture == "controlvector":
        raise ModelNotFound(f"{path}: expected a model, got a vector")
    kind = value("general.type", "model")
    if kind in _OTHER_KINDS:
        raise ModelNotFound(f"{path}: expected a model, got {_OTHER_KINDS[kind]} (general.type is {kind!r})")
    if part := value("split.no", 0):
        raise ModelNotFound(
            f"{path}: this is part {part + 1} of {value('split.count', 'several')} of a split model; name "
            "its first part, which describes the model (-00001-of-...)"
        )


def _texts(tokens: Any) -> Iterator[bytes]:
    """As llama.cpp holds them: cut at a zero byte, and an empty one named by its id."""
    for i, index in enumerate(tokens.data):
        text = bytes(tokens.parts[index]).partition(b"\0")[0]
        yield text or f"[EMPTY_{i}]".encode()
