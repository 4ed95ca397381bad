"""The public types, as users' checkers infer them, and names that completion shows."""

from pathlib import Path

import pytest

from backprompt import Text, evaluate, generate

TYPED = Path(__file__).parent / "typed.py"


def test_types_of_results():
    """Unused `type: ignore` comments are errors, so each line that must be wrong is."""
    api = pytest.importorskip("mypy.api")
    said, _, code = api.run([str(TYPED), "--config-file", str(TYPED.parent.parent / "pyproject.toml")])
    assert code == 0, said


def test_completion_of_an_lm_shows_what_users_need(lm):
    shown = {name for name in dir(lm) if not name.startswith("_")}
    assert {"evaluate", "stats", "token_logprobs", "model", "tokenizer", "clear"} <= shown
    assert shown.isdisjoint({"session", "representation", "extents", "look_up"})
    assert all(hasattr(lm, name) for name in shown)


def test_a_generated_text_shows_what_was_generated(lm):
    text = generate(Text("The cat", lm), max_new_tokens=3)
    assert repr(text) == f"<GeneratedText: {text.completion!r} behind Text('The cat'), finish_reason='length'>"
    assert len(repr(generate(Text("The cat", lm), max_new_tokens=90))) < 260


def test_reading_what_is_held_requests_no_tokens(lm):
    texts = [Text("The cat", lm), Text("The cat sat", lm)]
    evaluate(texts)
    before = lm.stats
    for text in texts:
        assert text.logits.isfinite().all()
        assert text.token_logprobs.shape == (len(text.tokens),)
    assert (lm.stats - before).tokens_requested == 0
    evaluate(texts[0])
    assert (lm.stats - before).tokens_requested == len(texts[0].tokens)
