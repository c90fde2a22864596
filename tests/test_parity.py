"""llama.cpp and transformers, the same weights and the same recipe: the same thing happens.

An off-by-one in layers, a window that begins a token late or a norm kept in another order would show
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
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
from mien.errors import MienError, SiteNotFound
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
        str(path),
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        type_k=exact,
        type_v=exact,
        verbose=False,
        **options,
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

    def compare(self, tokens: list[int]) -> tuple[float, Floats]:
        """The greatest difference between two logits, in standard deviations of all of them, and the logits
        that transformers finds."""
        ours, theirs = self.llama_logits(tokens), self.hf_logits(tokens)
        return float(np.abs(ours - theirs).max() / theirs.std()), theirs

    @cached_property
    def unsteered(self) -> tuple[float, Floats]:
        """`compare` of `make_tokens`, with nothing set."""
        self.set(None)
        return self.compare(make_tokens())

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two have nothing to share of models this small, and wait for each other
    yield pair
    torch.set_num_threads(threads)
    llm.close()


def is_gelu(model: Any) -> bool:
    config = model.config
    return "gelu" in str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "gelu"))


def tiny_vectors(pair: Pair) -> list[Vector]:
    """As long as a row of the stream, so that they change what the model says."""
    model = pair.llama.model
    layers = range(1, model.n_layer)
    tokens = make_tokens()
    lengths = np.median(np.linalg.norm(pair.hf.capture(tokens, list(layers), len(tokens)), axis=2), axis=1)

    def rows(seed: int, *rank: int) -> Floats:
        found = np.random.default_rng(seed).standard_normal((len(layers), *rank, model.n_embd))
        found *= 0.3 / np.linalg.norm(found, axis=-1, keepdims=True)
        found *= lengths.reshape(-1, *[1] * (found.ndim - 1))
        return found.astype(np.float32)

    def vector(name: str, made: Floats, **meta: Any) -> Vector:
        return Vector(name, tuple(layers), made, model_hint=model.architecture, meta=meta)

    found = [vector("joy", rows(0)), vector("anger", rows(1)), vector("plane", rows(2, 2))]
    found.append(vector("probe", rows(3), bias=[0.1] * len(layers)))
    joy = found[0].directions
    found += [
        Vector(f"at{layer}", (layer,), joy[layer][None], model_hint=model.architecture) for layer in layers
    ]
    return [*found, *site_vectors(pair)]


def site_vectors(pair: Pair) -> list[Vector]:
    """At every layer of each site that the model has: constants to add, gains, and experts to choose."""
    runtime, model = pair.hf._runtime, pair.hf.model
    assert runtime is not None
    found = []
    for seed, site in enumerate(("attention", "mlp", "heads", "neurons", "experts")):
        try:
            width = runtime.width(site, 0)
        except SiteNotFound:
            continue
        random = np.random.default_rng(100 + seed)
        kinds = {site: 0.2 * random.standard_normal((model.n_layer, width)), f"{site}_gain": None}
        kinds[f"{site}_gain"] = random.choice([-1.0, 0.0, 0.5], (model.n_layer, width))
        if site == "experts":
            kinds = {"one_expert": np.eye(width)[np.arange(model.n_layer) % width]}
        for name, rows in kinds.items():
            made = np.asarray(rows, dtype=np.float32)
            layers = tuple(range(model.n_layer))
            found.append(Vector(name, layers, made, model_hint=model.architecture, site=site))
    return found


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
    only_reply = 'joy(when="response"' in recipe and "prompt" not in recipe
    must_agree(pair, recipe, REPLY if only_reply else EVERY, least=0.05)


# Of operators, windows and gates: which tokens of GIVEN + MADE they change, at least and at most.
EVERY = range(GIVEN + MADE)
REPLY = range(GIVEN, GIVEN + MADE)
OPERATORS: list[tuple[str, range]] = [
    ("ablate(joy)", EVERY),
    ("0.5*ablate(plane) - 0.5*anger", EVERY),
    ("ablate(joy) + ablate(anger)", EVERY),
    ("clamp(joy, 1.5)", EVERY),
    ("clamp(plane, (1.0, -0.5))", EVERY),
    ("edit(probe, margin=1)", EVERY),
    ("scale(joy, 0.3)", EVERY),
    ("purify(joy, anger)", EVERY),
    ("ablate(anger) + clamp(joy, 1) + edit(probe) + scale(anger, 0.1) + joy + anger(keep_norm=True)", EVERY),
    ("joy(start=1, stop=3)", range(GIVEN + 1, GIVEN + MADE)),
    ("joy(decay=2, ramp=2)", REPLY),
    ("clamp(joy, 1.5, start=2)", range(GIVEN + 2, GIVEN + MADE)),
]


@pytest.mark.parametrize(("recipe", "tokens_changed"), OPERATORS)
def test_operators_and_windows_do_the_same_in_both(pair: Pair, recipe: str, tokens_changed: range) -> None:
    must_agree(pair, recipe, tokens_changed)


def must_agree(pair: Pair, recipe: str, tokens_changed: range, least: float | None = None) -> Floats:
    """Logits under `recipe` differ by no more than unsteered ones do, and just those tokens' change.

    least: how much, in standard deviations; by default more than noise. Returns by how much they do.
    """
    unsteered, plain = pair.unsteered
    pair.set(recipe)
    difference, steered = pair.compare(make_tokens())
    assert difference <= max(2 * unsteered, pair.noise)  # type: ignore[attr-defined]
    changed: Floats = np.abs(steered - plain).max(axis=1) / plain.std()
    assert (changed[list(tokens_changed)] > (least or pair.noise)).all()  # type: ignore[attr-defined]
    assert not changed[: tokens_changed.start].any()
    return changed


SITES = [
    ("attention", ["attention", "attention(keep_norm=True)", "scale(attention_gain, 0.2)"]),
    ("mlp", ["mlp", "ablate(mlp)", "scale(mlp_gain, 0.2)"]),
    ("heads", ["heads", "scale(heads_gain)", "scale(heads_gain, 0.3, decay=3) + joy"]),
    ("neurons", ["neurons", "scale(neurons_gain)", "0.1*joy + clamp(neurons, 0.5)"]),
    ("experts", ["force(one_expert)", "forbid(one_expert)", "force(one_expert, start=1) + joy"]),
]


@pytest.mark.parametrize(("site", "recipe"), [(site, recipe) for site, found in SITES for recipe in found])
def test_each_site_is_the_same_place_in_both(pair: Pair, site: str, recipe: str) -> None:
    """Where neither has it, both say so."""
    missing = []
    for steering in (pair.llama, pair.hf):
        assert steering._runtime is not None
        try:
            steering._runtime.width(site, 0)
        except SiteNotFound as error:
            missing.append(str(error))
    assert len(missing) in (0, 2), missing
    if missing:
        assert all(
            f"no site '{site}' in layer 0: its MLP" in text or "no mixture" in text for text in missing
        )
        return
    must_agree(pair, recipe, EVERY)


@pytest.mark.parametrize(
    "manner", ["above={t}", "below={t}", "above={t}, hysteresis={h}", "above={t}, latch=True"]
)
def test_gates_open_on_the_same_tokens_in_both(pair: Pair, manner: str) -> None:
    """The threshold is where no readout is near, so that noise decides nothing."""
    tokens = make_tokens()
    with pair.hf.watch("at1") as watch:
        pair.set(None)
        pair.hf_logits(tokens)
    readouts = np.sort(watch.series("at1", prompt=True))
    assert len(readouts) == GIVEN + MADE
    middle = len(readouts) // 4 + int(np.diff(readouts[len(readouts) // 4 : -len(readouts) // 4]).argmax())
    threshold, gap = (readouts[middle] + readouts[middle + 1]) / 2, readouts[middle + 1] - readouts[middle]
    gate = manner.format(t=threshold, h=1.5 * gap)
    # at layer 1 alone: elsewhere there is nothing to read
    changed = must_agree(pair, f"gate(anger, on=at1, {gate})", range(0))
    assert changed.any()


def test_both_read_the_same_while_they_run(pair: Pair) -> None:
    tokens = make_tokens()
    pair.set("0.5*joy - anger")
    with pair.llama.watch("joy", "anger") as ours, pair.hf.watch("joy", "anger") as theirs:
        pair.llama_logits(tokens)
        pair.hf_logits(tokens)
    for name in ("joy", "anger"):
        for after in (False, True):
            one, other = (watch.by_layer(name, after=after, prompt=True) for watch in (ours, theirs))
            assert one.shape == other.shape == (GIVEN + MADE, pair.llama.model.n_layer - 1)
            assert np.isfinite(one).all()
            assert np.abs(one - other).max() <= 10 * max(pair.noise, 1e-4) * np.abs(other).max()  # type: ignore[attr-defined]


def test_both_count_the_same_experts(pair: Pair) -> None:
    tokens, n_layer = make_tokens(), pair.llama.model.n_layer
    pair.set(None)
    counts = []
    for steering, run in ((pair.llama, pair.llama_logits), (pair.hf, pair.hf_logits)):
        if not hasattr(pair.model.config, "num_experts_per_tok"):
            with pytest.raises(SiteNotFound, match="experts"):
                steering.count_experts()
            continue
        steering.count_experts()
        run(tokens)
        counts.append(steering.expert_counts)
        steering.count_experts(False)
    for found in counts:
        assert set(found) == set(range(n_layer))
        assert all(count.sum() == len(tokens) * 2 for count in found.values())
        assert all((count == counts[0][layer]).all() for layer, count in found.items())


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
@pytest.mark.parametrize(
    "recipe",
    [
        STEERED,
        "joy(keep_norm=True)",
        'joy(when="response") - 0.5*anger',
        "ablate(joy) + clamp(calm, 1) + 0.5*purify(fear, sadness)",
        "joy(start=1, ramp=2, decay=3)",
    ],
)
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
    with pytest.raises(MienError, match=r"the prompt has \d+ tokens, and at most 15 fit"):
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
