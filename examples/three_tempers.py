"""One question, three tempers: plain, joyful, fearful.

python examples/three_tempers.py ["A question"]
"""

import sys
import textwrap

import mien
from mien.models import find_model
from mien.runtimes.llama_text import load_llama

QUESTION = "What happened at the party?"


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    llm = load_llama(find_model())
    steering = mien.attach(llm)
    print(f"\n{find_model().name}, asked: {question}\n")
    for recipe in ("", "joy", "fear"):
        steering.set(recipe)
        answer = llm.create_chat_completion(
            [{"role": "user", "content": question}], max_tokens=48, temperature=0.0
        )
        text = " ".join(answer["choices"][0]["message"]["content"].split())
        print(f"{recipe or 'plain':>6}  {textwrap.fill(text, 88, subsequent_indent=' ' * 8)}\n", flush=True)
    print(f'Try your own:  .venv/bin/mien run "{question}" --steer "0.6*joy - 0.4*calm" --compare')


if __name__ == "__main__":
    main()
