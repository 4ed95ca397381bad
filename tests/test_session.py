"""The session behind an `LM`: its public use and its lifetime."""

import gc
import weakref

import pytest

import backprompt as bp
from backprompt import LM, Text
from backprompt.errors import TextTypeError, UnboundTextError
from backprompt.session.texts import session_of
from tiny_models import build
from tiny_tokenizers import byte_level_bpe


@pytest.fixture
def pair():
    return build("gpt2"), byte_level_bpe()


def test_a_pair_finds_its_session_for_as_long_as_a_result_lives(pair):
    text = Text("The cat sat", pair)
    session, found = weakref.ref(text.lm.session), text()
    del text
    gc.collect()
    again = Text("The cat sat", pair)
    assert again.lm.session is session()
    assert again().logits.equal(found.logits)
    assert again.lm.stats.tokens_computed == len(again.tokens)


def test_a_session_goes_with_the_last_that_uses_it(pair):
    text = Text("The cat sat", pair)
    found, session = text(), weakref.ref(text.lm.session)
    del text
    gc.collect()
    assert session() is not None
    del found
    assert session() is None, "no cycle keeps it"


def test_texts_are_those_of_one_session(pair):
    lm, other = LM(*pair), LM(*pair)
    assert session_of(Text("a", lm), 0) is lm.session is not other.session
    with pytest.raises(UnboundTextError, match=r"texts\[1\].*belongs to another LM"):
        lm.session.own_texts([Text("a", lm), Text("a", other)])
    with pytest.raises(UnboundTextError, match=r"texts\[7\].*has no model"):
        session_of(Text("a"), 7)
    with pytest.raises(TextTypeError, match=r"texts\[0\] is a str"):
        lm.session.own_texts(["a"])


def test_all_that_works_with_texts_shares_one_lock_and_one_count(pair):
    lm = LM(*pair)
    text = Text("The cat sat on the mat", lm)
    found = text()
    with lm.session.exclusive():
        assert lm.session.current() is lm.session.evaluator
        assert found.logits.shape == (lm.model.config.vocab_size,)
        assert text.generate(max_new_tokens=1).completion_tokens
        bp.explain(text)
    assert lm.stats.tokens_computed == lm.session.counters.tokens_computed > 0
