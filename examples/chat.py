"""A chat in the terminal that can go back: every turn is a node, and its results are kept.

    /turns        list the turns
    /back 2       go on from turn 2, without the later turns, which are kept, too
    /again        another answer to the last question
    /quit

The line after each answer gives the number of tokens that were computed for it. Earlier text, on this branch or
another, is not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from backprompt import LM, GeneratedText, Text, chat
from demo_model import add_model_argument, load_model

HELP = "Say something, or: /turns, /back N, /again, /quit."


@dataclass
class Conversation:
    """The messages up to now: questions and answers in turn."""

    lm: LM
    system: str
    max_new_tokens: int
    options: dict[str, Any]
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_turns(self) -> int:
        """The number of answered questions."""
        return len(self.messages) // 2

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer in pieces; the answer becomes part of the conversation, even if the reader stops early."""
        asked = [*self.messages, {"role": "user", "content": question}]
        system = {"role": "system", "content": self.system}
        stream = chat(self.lm, [system, *asked]).stream(max_new_tokens=self.max_new_tokens, **self.options)
        try:
            with stream:
                yield from stream
        finally:
            self.messages = [*asked, {"role": "assistant", "content": stream.text}]

    def go_back(self, num_turns: int) -> None:
        """Go on after this many turns."""
        if not 0 <= num_turns <= self.num_turns:
            raise ValueError(f"There are turns 0 to {self.num_turns}.")
        self.messages = self.messages[: 2 * num_turns]

    def turns(self) -> Iterator[str]:
        """Yield a line a turn."""
        pairs = zip(self.messages[::2], self.messages[1::2], strict=True)
        for number, (question, answer) in enumerate(pairs, 1):
            yield f"{number}  {question['content'][:40]!r}: {_string(answer['content'])[:60]!r}"


def _string(content: GeneratedText | Text | str) -> str:
    return content.completion if isinstance(content, GeneratedText) else str(content)


def obey(conversation: Conversation, line: str) -> str | None:
    """Carry out a command; return the question to ask, if there is one."""
    command, _, argument = line.partition(" ")
    if command == "/turns":
        print("\n".join(conversation.turns()) or "No turns yet.")
    elif command == "/back":
        try:
            conversation.go_back(int(argument))
        except ValueError as error:
            print(f"{error} Write, for example, /back 1.")
    elif command == "/again" and conversation.num_turns:
        question: str = conversation.messages[-2]["content"]
        conversation.go_back(conversation.num_turns - 1)
        return question
    elif command.startswith("/"):
        print(HELP)
    else:
        return line
    return None


def answer(conversation: Conversation, question: str) -> None:
    """Print the answer as it comes, and its cost."""
    before = conversation.lm.stats
    try:
        for piece in conversation.ask(question):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    done = conversation.lm.stats - before
    print(f"\n[{done.tokens_computed} tokens computed, {done.tokens_reused} reused]\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="A chat that can go back to earlier turns.", epilog=HELP, allow_abbrev=False
    )
    add_model_argument(parser)
    parser.add_argument("--system", default="You are a helpful assistant.", help="the system message, before all turns")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample; by default decoding is greedy")
    arguments = parser.parse_args(argv)
    lm = load_model(arguments.model)
    options = {} if arguments.temperature is None else {"temperature": arguments.temperature}
    conversation = Conversation(lm, arguments.system, arguments.max_new_tokens, options)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        question = obey(conversation, line) if line else None
        if question is not None:
            answer(conversation, question)


if __name__ == "__main__":
    main()
