"""Extraction by mien beside repeng: the same texts, model and float32 weights, one process.

    python benchmarks/extraction.py DATA.json       in the environment that benchmarks/peers.py makes

DATA: a list of reply openings, such as repeng's notebooks/data/all_truncated_outputs.json, which many
truncations of few texts make. Each is put behind two personas; the vector is the first component of the
pairs' differences. Both read the last token at every block. Prints times and, a layer, the cosine of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from peers import ROOT, environment

PERSONAS = ("happy", "sad")
TEMPLATE = "<|im_start|>user\nAct as if you're extremely {}.<|im_end|>\n<|im_start|>assistant\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "extraction.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options)
    else:
        raise SystemExit(subprocess.call([environment(), __file__, "--inside", *sys.argv[1:]]))


def measure(options: argparse.Namespace) -> None:
    import torch
    from mien.contrast import Sample
    from mien.evaluation import evaluator
    from mien.extraction import extract, text_of
    from mien.models import find_model
    from mien.runtimes.hf_text import load_hf
    from mien.trie import chunks
    from repeng import ControlModel, ControlVector, DatasetEntry

    torch.set_num_threads(options.threads)
    model, tokenizer = load_hf(find_model())
    tokenizer.pad_token_id = tokenizer.eos_token_id
    # An empty opening would make the two texts of a side of one persona alike; each text counts once.
    openings = sorted({text for text in json.loads(options.data.read_text()) if text.strip()})
    sides = [[Sample(TEMPLATE.format(persona) + text) for text in openings] for persona in PERSONAS]
    pairs = [DatasetEntry(positive=a.user, negative=b.user) for a, b in zip(*sides)]
    layers = list(range(1, model.config.num_hidden_layers - 1))  # repeng reads the last one after the norm

    def by_mien() -> dict[int, np.ndarray]:
        found = extract(model, "joy", *sides, method="pca_diff", raw=True, layers=layers, tokenizer=tokenizer)
        return dict(found.directions)

    def by_repeng() -> dict[int, np.ndarray]:
        wrapped = ControlModel(model, layers)
        try:
            return ControlVector.train(wrapped, tokenizer, pairs, method="pca_diff", batch_size=32).directions
        finally:
            wrapped.unwrap()

    with closing(evaluator(model, tokenizer)) as many:
        texts = [text_of(many, sample, raw=True).tokens for side in sides for sample in side]
    nodes = sum(len(chunk.tokens) for chunk in chunks(texts))
    print(f"{len(texts)} texts, {sum(map(len, texts))} tokens, {nodes} nodes of their tree")
    seconds: dict[str, list[float]] = {"mien": [], "repeng": []}
    found: dict[str, dict[int, np.ndarray]] = {}
    for turn in range(options.rounds):
        for name, run in (("mien", by_mien), ("repeng", by_repeng))[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name:8}{seconds[name][-1]:8.1f} s", flush=True)
    cosines = {
        layer: float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for layer in layers
        for a, b in [(found["mien"][layer], found["repeng"][layer])]
    }
    ratios = [b / a for a, b in zip(seconds["mien"], seconds["repeng"])]
    print(f"repeng takes {np.median(ratios):.1f} times as long [{min(ratios):.1f}, {max(ratios):.1f}]")
    every = list(cosines.values())
    print(f"cosine of the vectors: least {min(every):.6f}, median {np.median(every):.6f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"texts": len(texts), "nodes": nodes, "seconds": seconds, "cosines": cosines}
    options.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
