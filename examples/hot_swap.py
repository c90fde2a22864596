"""Change the dose while the model speaks: every few tokens, for free.

python examples/hot_swap.py
"""

import mien
from mien.models import find_model
from mien.runtimes.llama_text import load_llama

# One for every 16 tokens: from calm to joy, and back.
DOSES = ["calm", "calm", "0.5*calm + 0.5*joy", "joy", "0.5*calm + 0.5*joy", "calm"]


def main() -> None:
    llm = load_llama(find_model())
    steering = mien.attach(llm)
    programs = [steering.compile(dose) for dose in DOSES]
    stream = llm.create_chat_completion(
        [{"role": "user", "content": "Describe a walk through the town."}],
        max_tokens=96,
        temperature=0.0,
        stream=True,
    )
    for i, chunk in enumerate(stream):
        program = programs[min(i // 16, len(programs) - 1)]
        if program.recipe != steering.recipe:
            steering.set(program)
            print(f"\n[{steering.recipe}] ", end="")
        print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
