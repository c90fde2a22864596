"""Do the emotions of a pack do what they say? Replies to events that took no part in making them.

    python benchmarks/emotions.py [PACK] [--events N] [--doses 0.25,0.5,1]

Each of the 120 events of the test split is answered plainly, under a system prompt that asks for the emotion,
and under each emotion's vector at growing doses; greedy, 40 tokens. A reply is a hit where the judge
(tests/tone.py: a classifier over word embeddings that knows ten emotions) finds the emotion in it. Perplexity
is under the unsteered model without any system prompt. Prints a table, and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
BASIC = ("joy", "sadness", "anger", "fear", "disgust", "surprise")
TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pack", nargs="?", default="smollm2-135m-instruct", help="a name, or a folder")
    parser.add_argument("--events", type=int, default=120)
    parser.add_argument("--doses", default="0.25,0.5,0.75,1")
    parser.add_argument("--emotions", default=",".join(BASIC))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "emotions.json")
    options = parser.parse_args()

    from mien.corpus import Corpus
    from mien.evaluation import Text, evaluator
    from mien.judging import distinct, perplexity, repetition
    from mien.models import find_model
    from mien.program import NOTHING
    from mien.registry import Registry
    from mien.runtimes.llama_text import load_llama
    from tone import judge

    pack, corpus = Registry().pack(options.pack), Corpus.read()
    (group,) = (group for group in corpus.groups if group.family == "emotions")
    events = group.of("test")
    events = events[:: max(len(events) // options.events, 1)][: options.events]
    llm = load_llama(find_model(), n_ctx=1024, n_threads=os.cpu_count(), flash_attn=True)
    rows: list[dict[str, Any]] = []
    with closing(evaluator(llm)) as many:

        def prompts(system: str = "") -> list[Text]:
            first = [{"role": "system", "content": system}] if system else []
            return [many.text([*first, {"role": "user", "content": event.text}]) for event in events]

        def row(emotion: str, arm: str, asked: list[Text], program: Any) -> None:
            replies = many.generate(asked, TOKENS, programs=[program] * len(asked))
            plain = [Text((*p.tokens, *reply.answer), p.reply) for p, reply in zip(prompts(), replies)]
            scores = many.log_probabilities(plain)
            texts = [many.decode(reply.answer) for reply in replies]
            found = judge()(texts)
            rows.append(
                {
                    "emotion": emotion,
                    "arm": arm,
                    "hit": sum(one == emotion for one in found) / len(found),
                    "perplexity": perplexity(scores),
                    "repetition": sum(map(repetition, texts)) / len(texts),
                    "distinct-2": distinct(texts, 2),
                    "verdicts": {name: found.count(name) for name in sorted(set(found))},
                    "example": texts[0],
                }
            )
            last = rows[-1]
            print(
                f"{emotion:13}{arm:9}{last['hit']:6.0%}{last['perplexity']:8.2f}{last['repetition']:8.3f}"
                f"{last['distinct-2']:8.2f}",
                flush=True,
            )

        print(f"{'emotion':13}{'arm':9}{'hit':>6}{'ppl':>8}{'rep3':>8}{'dist2':>8}")
        row("none", "plain", prompts(), NOTHING)
        for emotion in options.emotions.split(","):
            asking = f"Answer as someone who is very {group.members[emotion]}."
            row(emotion, "prompt", prompts(asking), NOTHING)
            vector = pack.load(emotion)
            for dose in map(float, options.doses.split(",")):
                row(emotion, f"{dose:g}", prompts(), many.compile(vector * dose))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"pack": pack.version, "events": len(events), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
