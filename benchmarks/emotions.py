"""Do the emotions of a pack do what they say? Replies to events that took no part in making them.

    python benchmarks/emotions.py [PACK] [--events N] [--doses 0.25,0.5,0.75]

Events of the test split are answered plainly, under a system prompt that asks for the emotion, and under
each emotion's vector at full dose; a few of them at other doses, too. Greedy, 40 tokens, the weights in
float32. What a perplexity means is told by replies that the unsteered model draws at two temperatures. A
reply is a hit where the judge (tests/tone.py: a classifier over word embeddings that knows ten emotions)
finds the emotion. `words` is the share of its words that a lexicon files under the emotion (tests/judge.py),
where it knows it. Perplexity is under the unsteered model without any system prompt, of the replies to their
prompts and of the replies alone. Prints a table, and writes it as JSON.
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
    parser.add_argument("--events", type=int, default=120, help="at full dose and for prompts")
    parser.add_argument("--doses", default="0.25,0.5,0.75,1.25", help="others, on fewer events")
    parser.add_argument("--few", type=int, default=24, help="how many")
    parser.add_argument("--emotions", default=",".join(BASIC))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "emotions.json")
    options = parser.parse_args()

    import judge as lexicon
    from mien.calibration import read_alone
    from mien.corpus import Corpus, Event
    from mien.evaluation import Text, evaluator
    from mien.judging import distinct, perplexity, repetition
    from mien.models import find_model
    from mien.program import NOTHING
    from mien.registry import Registry
    from mien.runtimes.llama_text import in_float32, load_llama
    from tone import judge

    pack, corpus = Registry().pack(options.pack), Corpus.read()
    (group,) = (group for group in corpus.groups if group.family == "emotions")
    every = group.of("test")

    def events(count: int) -> list[Event]:
        return [every[i * len(every) // count] for i in range(min(count, len(every)))]

    rows: list[dict[str, Any]] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        in_float32(find_model()) as path,  # half the time
        closing(load_llama(path, n_ctx=1024, n_threads=os.cpu_count(), flash_attn=True)) as llm,
        closing(evaluator(llm)) as many,
    ):

        def row(emotion: str, arm: str, program: Any, count: int, system: str = "") -> None:
            first = [{"role": "system", "content": system}] if system else []
            users = [[{"role": "user", "content": event.text}] for event in events(count)]
            replies = many.generate(
                [many.text([*first, *user]) for user in users], TOKENS, programs=[program] * len(users)
            )
            given = [reply.after(many.text(user)) for reply, user in zip(replies, users)]
            write(emotion, arm, given)

        def drawn(temperature: float) -> None:
            every = {"max_tokens": TOKENS, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
            given = []
            for seed, event in enumerate(events(options.events)):
                user = [{"role": "user", "content": event.text}]
                answer = llm.create_chat_completion(user, temperature=temperature, seed=seed, **every)
                given.append(many.text(user, answer["choices"][0]["message"]["content"]))
            write("none", f"t={temperature:g}", given)

        def write(emotion: str, arm: str, given: list[Text]) -> None:
            texts = [many.decode(reply.answer) for reply in given]
            found = judge()(texts)
            shares = [lexicon.judge(text) for text in texts]
            rows.append(
                {
                    "emotion": emotion,
                    "arm": arm,
                    "events": len(given),
                    "hit": found.count(emotion) / len(found),
                    "words": {name: sum(s[name] for s in shares) / len(shares) for name in lexicon.EMOTIONS},
                    "perplexity": perplexity(many.log_probabilities(given)),
                    "alone": perplexity(many.log_probabilities(read_alone(many, given))),
                    "repetition": sum(map(repetition, texts)) / len(texts),
                    "distinct-2": distinct(texts, 2),
                    "verdicts": {name: found.count(name) for name in sorted(set(found))},
                    "examples": texts[:3],
                }
            )
            options.out.write_text(json.dumps({"pack": pack.version, "rows": rows}, indent=2))
            last = rows[-1]
            words = last["words"].get(emotion)
            print(
                f"{emotion:13}{arm:8}{len(given):4}{last['hit']:7.0%}{last['perplexity']:7.2f}"
                f"{last['alone']:7.2f}{last['repetition']:7.3f}{last['distinct-2']:7.2f}"
                f"{f'{words:8.1%}' if words is not None else '':8}",
                flush=True,
            )

        print(
            f"{'emotion':13}{'arm':8}{'n':>4}{'hit':>7}{'ppl':>7}{'alone':>7}{'rep3':>7}{'dist2':>7}{'words':>8}"
        )
        row("none", "plain", NOTHING, options.events)
        for temperature in (0.7, 1.0):
            drawn(temperature)
        emotions = options.emotions.split(",")
        for emotion in emotions:
            row(emotion, "1", many.compile(pack.load(emotion)), options.events)
        for emotion in emotions:
            asking = f"Answer as someone who is very {group.members[emotion]}."
            row(emotion, "prompt", NOTHING, options.events, asking)
        for emotion in emotions:
            for dose in map(float, options.doses.split(",")):
                row(emotion, f"{dose:g}", many.compile(pack.load(emotion) * dose), options.few)


if __name__ == "__main__":
    main()
