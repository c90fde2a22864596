"""Which models a vector fits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass


def vocabulary_digest(tokens: Iterable[bytes]) -> str:
    """SHA-256, as hex, over the vocabulary's token texts in id order, each ended by a zero byte.

    tokens: the texts as the tokenizer stores them (byte-level alphabet and all), not decoded.
    """
    digest = hashlib.sha256()
    digest.update(b"".join(token + b"\0" for token in tokens))
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What of a model must agree for a vector to mean the same thing in it.

    architecture: the GGUF name, such as `llama`. n_layer, n_embd: blocks, and floats in a row of
    the residual stream. vocabulary: see `vocabulary_digest`; empty where not known. name: the base
    model, for people; never compared, since quantisations of one model carry different names.
    """

    architecture: str
    n_layer: int
    n_embd: int
    vocabulary: str = ""
    name: str = ""

    def differences(self, other: Fingerprint) -> list[str]:
        """What keeps the two apart, `self` being the vector's side and `other` the model's."""
        found = []
        for field, word in (("architecture", "architecture"), ("n_layer", "layers"), ("n_embd", "n_embd")):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                found.append(f"made for {word} {mine}, the model has {theirs}")
        if self.vocabulary and other.vocabulary and self.vocabulary != other.vocabulary:
            mine, theirs = self.vocabulary[:12], other.vocabulary[:12]
            found.append(f"made for a vocabulary with digest {mine}, the model's is {theirs}")
        return found

    def as_dict(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, object]) -> Fingerprint:
        """From a manifest's table. Raises ValueError that names the key that is missing or wrong."""
        values: dict[str, str | int] = {}
        for key, kind, default in (
            ("architecture", str, None),
            ("n_layer", int, None),
            ("n_embd", int, None),
            ("vocabulary", str, ""),
            ("name", str, ""),
        ):
            value = data.get(key, default)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{key}: expected {kind.__name__}, got {value!r}")
            if kind is int and not 0 < int(value) < 1 << 31:
                raise ValueError(f"{key}: expected a positive number, got {value!r}")
            values[key] = value
        return cls(**values)  # type: ignore[arg-type]  # the keys are the fields

    def __str__(self) -> str:
        name = self.name or self.architecture
        return f"{name} ({self.architecture}, {self.n_layer} layers, n_embd {self.n_embd})"
