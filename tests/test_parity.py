"""llama.cpp and transformers, the same weights and the same recipe: the same thing happens.

An off-by-one in layers, a window that begins a token late or a norm kept in another order would show
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import mien
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from llama_cpp._internals import LlamaBatch
from makers import DictRegistry
from mien.contrast import read_lines
from mien.errors import MienError
from mien.registry import Registry
from mien.runtimes.hf_text import chat_inputs, load_hf, stream
from mien.vector import Floats, Vector
from tiny import ARCHITECTURES, N_VOCAB, build
from transformers import DynamicCache

GIVEN, MADE = 20, 4  # tokens of a prompt, and after it one at a time
# The least difference that is called one, in standard deviations of the logits: float noise, which a
# lookup table of llama.cpp's makes larger in models with a GELU.
NOISE = {"silu": 1e-5, "gelu": 1e-3}


def load_llama_exactly(path: Path, n_ctx: int, n_threads: int = 1, **options: Any) -> Any:
    """With a KV cache in float32: by default it is half precision, which transformers' is not."""
    exact = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=n_ctx, n_threads=n_threads, type_k=exact, type_v=exact, verbose=False, **options
    )


class Pair:
    """One model in both runtimes, attached."""

    def __init__(self, llm: Any, model: Any, registry: Any, tokenizer: Any = None) -> None:
        self.llm, self.model = llm, model
        self.llama = mien.attach(llm, registry=registry)
        self.hf = mien.attach(model, registry=registry, tokenizer=tokenizer)

    def set(self, recipe: Any) -> None:
        self.llama.set(recipe)
        self.hf.set(recipe)

    def llama_logits(self, tokens: list[int]) -> Floats:
        """(len(tokens), n_vocab): the first GIVEN in one go, the others one at a time."""
        self.llm.reset()
        self.llm._ctx.kv_cache_clear()
        self.llm.eval(tokens[:GIVEN])
        for token in tokens[GIVEN:]:
            self.llm.eval([token])
        found: Floats = self.llm.scores[: len(tokens)].copy()
        return found

    @torch.no_grad()
    def hf_logits(self, tokens: list[int]) -> Floats:
        """As `llama_logits`."""
        cache = DynamicCache(config=self.model.config)
        parts = [tokens[:GIVEN], *([token] for token in tokens[GIVEN:])]
        logits = [self.model(torch.tensor([part]), cache=cache, use_cache=True).logits[0] for part in parts]
        found: Floats = torch.cat(logits).numpy()
        return found

    def difference(self, tokens: list[int]) -> float:
        """The greatest between two logits, in standard deviations of all of them."""
        ours, theirs = self.llama_logits(tokens), self.hf_logits(tokens)
        return float(np.abs(ours - theirs).max() / theirs.std())

    def state_difference(self, tokens: list[int]) -> Floats:
        """By layer, the greatest in the block's output, over the median length of a row."""
        ours, theirs = (steering.capture(tokens, last=len(tokens)) for steering in (self.llama, self.hf))
        lengths = np.linalg.norm(theirs, axis=2)
        found: Floats = np.abs(ours - theirs).max(axis=(1, 2)) / np.median(lengths, axis=1)
        return found


# ---- many architectures, random weights ----


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    tiny = build(request.param, tmp_path_factory.mktemp("tiny"))
    llm = load_llama_exactly(tiny.gguf, 64, n_batch=32, n_ubatch=8, logits_all=True)
    pair = Pair(llm, tiny.model, None)
    pair.vectors = DictRegistry(*tiny_vectors(pair))  # type: ignore[attr-defined]
    for steering in (pair.llama, pair.hf):
        steering._registry = pair.vectors  # type: ignore[attr-defined]
    pair.noise = NOISE["gelu" if is_gelu(tiny.model) else "silu"]  # type: ignore[attr-defined]
    yield pair
    llm.close()


def is_gelu(model: Any) -> bool:
    config = model.config
    return "gelu" in str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "gelu"))


def tiny_vectors(pair: Pair) -> list[Vector]:
    """As long as a row of the stream, so that they change what the model says."""
    model = pair.llama.model
    layers = range(1, model.n_layer)
    tokens = make_tokens()
    lengths = np.linalg.norm(pair.hf.capture(tokens, list(layers), len(tokens)), axis=2)
    found = []
    for seed, name in enumerate(("joy", "anger")):
        rows = np.random.default_rng(seed).standard_normal((len(layers), model.n_embd))
        rows *= 0.3 * np.median(lengths, axis=1)[:, None] / np.linalg.norm(rows, axis=1)[:, None]
        found.append(Vector(name, tuple(layers), rows.astype(np.float32), model_hint=model.architecture))
    joy = found[0].directions
    singles = [
        Vector(f"at{layer}", (layer,), joy[layer][None], model_hint=model.architecture) for layer in layers
    ]
    return [*found, *singles]


def make_tokens() -> list[int]:
    tokens: list[int] = np.random.default_rng(0).integers(N_VOCAB, size=GIVEN + MADE).tolist()
    return tokens


RECIPES = [
    "joy",
    "0.8*joy - 0.5*anger",
    "joy(keep_norm=True)",
    "joy - anger(keep_norm=True)",
    'joy(when="prompt")',
    'joy(when="response")',
    'joy(when="response", keep_norm=True) - 0.3*anger(when="prompt")',
]


def test_both_know_the_same_model(pair: Pair) -> None:
    one, other = pair.llama.model, pair.hf.model
    assert (one.architecture, one.n_layer, one.n_embd) == (other.architecture, other.n_layer, other.n_embd)


@pytest.mark.parametrize("recipe", RECIPES)
def test_steered_logits_differ_by_no_more_than_unsteered_ones(pair: Pair, recipe: str) -> None:
    tokens = make_tokens()
    pair.set(None)
    unsteered, plain = pair.difference(tokens), pair.hf_logits(tokens)
    pair.set(recipe)
    assert pair.difference(tokens) <= max(2 * unsteered, pair.noise)  # type: ignore[attr-defined]
    changed = np.abs(pair.hf_logits(tokens) - plain).max(axis=1) / plain.std()
    first = GIVEN if 'joy(when="response"' in recipe and "prompt" not in recipe else 0
    assert (changed[first:] > 0.05).all()
    assert not changed[:first].any()


def test_each_layer_is_the_same_layer_in_both(pair: Pair) -> None:
    tokens = make_tokens()
    pair.set(None)
    unsteered = pair.state_difference(tokens)
    plain = pair.llama.capture(tokens, last=len(tokens))
    for layer in range(1, pair.llama.model.n_layer):
        pair.set(f"at{layer}")
        assert (pair.state_difference(tokens) <= np.maximum(2 * unsteered, pair.noise)).all()  # type: ignore[attr-defined]
        changed = np.abs(pair.llama.capture(tokens, last=len(tokens)) - plain).max(axis=(1, 2))
        assert not changed[:layer].any()
        assert changed[layer:].all()


# ---- the real model, in float32 ----

STEERED = "0.8*joy - 0.3*anger"
REPLIES, REPLY_TOKENS, ROOM = 50, 64, 160  # ROOM: tokens of one prompt and its reply
EOS = 2


def write_f32(source: Path, target: Path) -> None:
    """The same GGUF with every tensor dequantised."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, inner = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def f32(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("f32") / "model.gguf"
    write_f32(model_path, target)
    return target


@pytest.fixture(scope="module")
def real(f32: Path) -> Iterator[tuple[Pair, Any]]:
    model, tokenizer = load_hf(f32)
    llm = load_llama_exactly(f32, REPLIES * ROOM, 2, n_batch=ROOM, n_ubatch=64)
    llm.context_params.n_seq_max = REPLIES  # llama-cpp-python has no option for it; attaching makes it so
    yield Pair(llm, model, Registry(), tokenizer), tokenizer
    llm.close()


@pytest.mark.model
def test_transformers_reads_the_quantised_file_as_the_same_weights(
    real: tuple[Pair, Any], model_path: Path
) -> None:
    quantised, _ = load_hf(model_path)
    expected = real[0].model.state_dict()
    for name, tensor in quantised.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.model
def test_the_vocabulary_digests_agree(real: tuple[Pair, Any]) -> None:
    pair, _ = real
    assert pair.hf.model.vocabulary == pair.llama.model.vocabulary != ""


@pytest.mark.model
@pytest.mark.parametrize("recipe", [STEERED, "joy(keep_norm=True)", 'joy(when="response") - anger'])
def test_the_real_model_is_steered_alike(real: tuple[Pair, Any], recipe: str) -> None:
    """Per-layer activations of a prompt, and logits of the prompt's end and of tokens after it."""
    pair, tokenizer = real
    text = [{"role": "user", "content": "What happened at the party?"}]
    tokens = [*chat_inputs(tokenizer, text)[0].tolist()[:GIVEN], 504, 7423, 436, 260]
    differences = []
    for what in (None, recipe):
        pair.set(what)
        states = pair.state_difference(tokens[:GIVEN])
        pair.llm.reset()
        pair.llm._ctx.kv_cache_clear()
        rows = []
        for part in (tokens[:GIVEN], *([token] for token in tokens[GIVEN:])):
            pair.llm.eval(part)
            rows.append(np.ctypeslib.as_array(pair.llm._ctx.get_logits(), shape=(pair.llm.n_vocab(),)).copy())
        theirs = pair.hf_logits(tokens)[GIVEN - 1 :]
        differences.append((float(states.max()), float(np.abs(np.stack(rows) - theirs).max())))
    (states_plain, logits_plain), (states_steered, logits_steered) = differences
    assert logits_plain < 1e-3
    assert states_steered <= 2 * states_plain
    assert logits_steered <= 2 * logits_plain


@pytest.mark.model
def test_a_stream_stops_when_it_is_closed_and_tells_when_there_is_no_room(real: tuple[Pair, Any]) -> None:
    pair, tokenizer = real
    inputs = chat_inputs(tokenizer, [{"role": "user", "content": "Count to a thousand."}])
    pair.set(None)
    whole = "".join(stream(pair.model, tokenizer, inputs, max_tokens=12))
    pieces = stream(pair.model, tokenizer, inputs, max_tokens=10_000)
    begun = "".join(next(pieces) for _ in range(4))
    pieces.close()  # returns once the model has stopped
    assert begun
    assert whole.startswith(begun)
    sampled = [
        "".join(stream(pair.model, tokenizer, inputs, max_tokens=8, temperature=1.5, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(MienError, match=r"the prompt has \d+ tokens, the context room for 16"):
        next(stream(pair.model, tokenizer, inputs, max_tokens=8, n_ctx=16))


@pytest.mark.model
def test_fifty_greedy_replies_are_the_same(real: tuple[Pair, Any]) -> None:
    """transformers pads them on the left, llama.cpp takes them as sequences of their own."""
    pair, tokenizer = real
    folder = Path(__file__).parent / "data"
    questions = read_lines(folder / "heldout.txt")
    prompts = [prefix + q for prefix in ("", "Answer in one sentence. ", "Be brief. ") for q in questions]
    prompts = prompts[:REPLIES]
    assert len(prompts) == REPLIES
    inputs = [chat_inputs(tokenizer, [{"role": "user", "content": prompt}])[0] for prompt in prompts]
    width = max(map(len, inputs))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=EOS) for row in inputs])
    mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in inputs])
    same = []
    for recipe in (None, STEERED):
        pair.set(recipe)
        theirs = pair.model.generate(
            ids, attention_mask=mask, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=EOS
        )[:, width:].tolist()
        ours = greedy_replies(pair.llm, [row.tolist() for row in inputs])
        same.append([until_eos(reply) == until_eos(other) for reply, other in zip(ours, theirs)])
    plain, steered = same
    assert sum(plain) >= 45
    assert [i for i in range(REPLIES) if plain[i] and not steered[i]] == []


def until_eos(reply: list[int]) -> list[int]:
    return reply[: reply.index(EOS)] if EOS in reply else reply


def greedy_replies(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """REPLY_TOKENS to each prompt, every prompt a sequence of llama.cpp's and all decoded together."""
    llm._ctx.kv_cache_clear()
    batch = LlamaBatch(n_tokens=ROOM, embd=0, n_seq_max=1, verbose=False)

    def best(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: (token, position, sequence, whether to predict what follows it)."""
        raw = batch.batch
        raw.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            raw.token[i], raw.pos[i], raw.n_seq_id[i], raw.seq_id[i][0] = token, position, 1, sequence
            raw.logits[i] = wanted
        llm._ctx.decode(batch)
        count = sum(row[3] for row in rows)
        logits = np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(count, llm.n_vocab()))
        found: list[int] = logits.argmax(axis=1).tolist()
        return found

    replies = []
    for sequence, prompt in enumerate(prompts):
        last = len(prompt) - 1
        replies.append(best([(token, i, sequence, i == last) for i, token in enumerate(prompt)]))
    for step in range(REPLY_TOKENS - 1):
        rows = [(reply[-1], len(prompts[i]) + step, i, True) for i, reply in enumerate(replies)]
        for reply, token in zip(replies, best(rows)):
            reply.append(token)
    batch.close()
    return replies
