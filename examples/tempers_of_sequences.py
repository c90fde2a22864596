"""One question, four tempers, one llama.cpp context: each sequence of it has a recipe of its own.

python examples/tempers_of_sequences.py ["A question"]
"""

import sys
import textwrap

import llama_cpp as api
import mien
import numpy as np
from mien.models import find_model
from mien.runtimes.llama_text import chat_tokens, load_llama

QUESTION = "What happened at the party?"
RECIPES = [None, "joy", "fear", "calm(ramp=8)"]
REPLY = 40


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    llm = load_llama(find_model())  # for its weights and its tokens
    prompt = chat_tokens(llm, [{"role": "user", "content": question}])
    parameters = api.llama_context_default_params()
    parameters.n_seq_max, parameters.n_ctx = len(RECIPES), 512 * len(RECIPES)
    context = mien.init_from_model(llm._model.model, parameters)
    steering = mien.attach(context)
    steering.set(RECIPES)

    batch = api.llama_batch_init(len(RECIPES) * len(prompt), 0, 1)
    vocabulary = llm.n_vocab()

    def decode(tokens: list[list[int]], position: int) -> list[int]:
        """Evaluate these tokens of each sequence; returns what each says next."""
        last = []
        batch.n_tokens = 0
        for sequence, row in enumerate(tokens):
            for i, token in enumerate(row):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, i == len(row) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if status := steering.decode(batch):
            raise SystemExit(f"llama_decode returned {status}")
        logits = (api.llama_get_logits_ith(context, at) for at in last)
        return [int(np.ctypeslib.as_array(row, shape=(vocabulary,)).argmax()) for row in logits]

    said = decode([prompt] * len(RECIPES), 0)
    replies = [[token] for token in said]
    for step in range(REPLY - 1):
        said = decode([[token] for token in said], len(prompt) + step)
        for reply, token in zip(replies, said):
            reply.append(token)
    for recipe, reply in zip(RECIPES, replies):
        end = reply.index(llm.token_eos()) if llm.token_eos() in reply else REPLY
        text = llm.detokenize(reply[:end]).decode(errors="replace")
        name = recipe.partition("(")[0] if recipe else "plain"
        print(f"{name:>6}  {textwrap.fill(' '.join(text.split()), 88, subsequent_indent=' ' * 8)}\n")
    api.llama_batch_free(batch)
    api.llama_free(context)


if __name__ == "__main__":
    main()
