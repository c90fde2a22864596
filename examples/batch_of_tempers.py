"""One question, four tempers, one batch: each row of it has a recipe of its own, in transformers.

python examples/batch_of_tempers.py ["A question"]
"""

import sys
import textwrap

import mien
from mien.models import find_model
from mien.runtimes.hf_text import chat_inputs, load_hf

QUESTION = "What happened at the party?"
RECIPES = [None, "joy", "fear", 'calm(when="response")']


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    model, tokenizer = load_hf(find_model())
    prompt = chat_inputs(tokenizer, [{"role": "user", "content": question}])
    steering = mien.attach(model, tokenizer=tokenizer)
    steering.set(RECIPES)
    replies = model.generate(
        prompt.expand(len(RECIPES), -1),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    for recipe, reply in zip(RECIPES, replies):
        text = tokenizer.decode(reply[prompt.shape[1] :], skip_special_tokens=True)
        name = recipe.partition("(")[0] if recipe else "plain"
        print(f"{name:>6}  {textwrap.fill(' '.join(text.split()), 88, subsequent_indent=' ' * 8)}\n")


if __name__ == "__main__":
    main()
