"""The smallest example: four texts with one beginning, each distinct token computed once.

Hello there.
├── " Senator"
│   ├── " Amidala"
│   └── " Kenobi..."
└── " General"
    ├── " Amidala"
    └── " Kenobi..."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from backprompt import Text, evaluate
from demo_model import add_model_argument, load_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compose four texts with +, evaluate them together, read the results.")
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)

    context = Text("Hello there.", lm)
    texts = [context + name + end for name in (" Senator", " General") for end in (" Amidala", " Kenobi...")]
    print(f"Built {len(texts)} texts; tokens computed so far: {lm.stats.tokens_computed}\n")

    evaluate(texts)
    stats = lm.stats
    print(f"{'text':<34}{'tokens':>6}  {'logits':<10}{'log p(text)':>12}  best next token")
    for text in texts:
        next_token = lm.tokenizer.decode([text.logits.argmax().item()])
        logprob = text.token_logprobs[1:].sum()  # nothing predicts the first token
        shape = str(tuple(text.logits.shape))
        print(f"{text.string!r:<34}{len(text.tokens):>6}  {shape:<10}{logprob:>12.2f}  {next_token!r}")
    print(f"\nTokens in all strings: {stats.tokens_requested}; computed: {stats.tokens_computed}.")

    another = context + " General" + " Grievous"
    evaluate(another)
    print(f"Then {another.string!r}: {(lm.stats - stats).tokens_computed} more.")


if __name__ == "__main__":
    main()
