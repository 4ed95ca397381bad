"""Explaining: expected work is the work done, and every reason is the one that the test has caused."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_groups import build, segments
from test_laws import compose, forests, usable
from test_lookup import CONTEXT, state_of
from test_memory import TOKEN_BYTES, make_lm

import backprompt as bp
from backprompt import LM, Divergence, Text, evaluate, explain
from backprompt.evaluation.lookup import positions_of
from backprompt.forest.forest import Forest
from backprompt.forest.span import NOTHING
from backprompt.store import MemoryStore
from comparing import num_distinct
from tiny_models import FAMILIES
from tiny_tokenizers import TOKENIZERS

MODEL = FAMILIES["gpt2"]()
TOKENIZER = TOKENIZERS["byte_level_bpe"]()


def questions(lm):
    context = Text(CONTEXT, lm)
    return [context + f"What is {n} + {n}?" + answer for n in range(6) for answer in (" Yes.", " No.")]


def reasons(explained):
    return {miss.segment: miss.reason for miss in explained.misses}


# Expected work


def test_the_figures_of_a_tree(model, tokenizer):
    lm = LM(model, tokenizer, max_tokens_per_forward=50)
    texts = questions(lm)
    explained = explain(texts)
    plain = sum(len(text.tokens) for text in texts)
    new = num_distinct(texts)
    assert (explained.num_texts, explained.tokens_requested, explained.tokens_distinct) == (12, plain, new)
    assert explained.tokens_to_compute == sum(explained.pass_tokens) == new
    assert explained.forward_passes == -(-new // 50)
    assert explained.tokens_in_memory == explained.tokens_to_recompute == 0
    assert explained.bytes_needed == new * TOKEN_BYTES
    assert f"forwards {new} tokens instead of {plain}: {plain / new:.1f} times fewer." in explained.sentences[0]
    assert explained.times_fewer == plain / new
    assert explained.tokens_shared == plain - new
    evaluate(texts[:6])
    held = num_distinct(texts[:6])
    explained = explain(texts)
    assert (explained.tokens_in_memory, explained.tokens_to_compute) == (held, new - held)
    assert explained.bytes_held == held * TOKEN_BYTES
    evaluate(texts)
    explained = explain(texts)
    assert explained.tokens_to_compute == explained.forward_passes == 0
    assert explained.misses == ()
    assert explained.times_fewer == float("inf")
    assert explained.sentences[0].startswith("No token is forwarded")


def test_nothing_changes(model, tokenizer):
    lm = make_lm(model, tokenizer, num_tokens=100, host_tokens=30, store=MemoryStore())
    texts = questions(lm)
    evaluate(texts[:5])
    before = state_of(lm)
    assert explain(texts).misses
    assert state_of(lm) == before


@settings(max_examples=30)
@given(drawn=st.lists(st.lists(segments, min_size=1, max_size=4), min_size=1, max_size=4), cut=st.integers(0, 4))
def test_what_is_expected_is_done(drawn, cut):
    """Any nested groups, with something held before."""
    lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=7)
    texts = [text for text in (build(lm, one) for one in drawn) if text.tokens]
    if not texts:
        return
    evaluate(texts[:cut])
    before = lm.stats
    explained = explain(texts, analyze=True)
    done = lm.stats - before
    assert explained.actual.tokens_computed == done.tokens_computed == explained.tokens_to_compute
    assert explained.actual.forward_passes == done.forward_passes == explained.forward_passes
    assert sum(miss.num_missing for miss in explained.misses) >= (1 if done.tokens_computed else 0)
    assert bool(explained.misses) == bool(done.tokens_computed)
    assert explain(texts).misses == ()


def test_what_comes_from_a_store(model, tokenizer):
    store = MemoryStore()
    evaluate(Text(CONTEXT, LM(model, tokenizer, store=store)))
    texts = questions(LM(model, tokenizer, store=store))
    explained = explain(texts, analyze=True)
    num_context = len(Text(CONTEXT, texts[0].lm).tokens)
    assert explained.tokens_on_disk == explained.actual.tokens_loaded == num_context
    assert explained.tokens_to_compute == explained.actual.tokens_computed == num_distinct(texts) - num_context
    assert f"{num_context} loaded" in str(explained)


@settings(max_examples=30)
@given(
    drawn=st.lists(st.lists(segments, min_size=1, max_size=4), min_size=2, max_size=5),
    cut=st.integers(0, 3),
    max_tokens=st.integers(3, 9),
)
def test_passes_with_a_store_are_those_expected(drawn, cut, max_tokens):
    """Spans from the store do not change the order of the rest."""
    store = MemoryStore()
    for one in drawn[:cut]:
        stored = build(LM(MODEL, TOKENIZER, store=store), one)
        if stored.tokens:
            stored.save()
    lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=max_tokens, store=store)
    texts = [text for text in (build(lm, one) for one in drawn) if text.tokens]
    if not texts:
        return
    explained = explain(texts, analyze=True)
    assert explained.actual.tokens_loaded == explained.tokens_on_disk
    assert explained.actual.tokens_computed == explained.tokens_to_compute
    assert explained.actual.forward_passes == explained.forward_passes


def test_what_was_dropped_is_computed_once_more(model, tokenizer):
    lm = make_lm(model, tokenizer, num_tokens=60)
    texts = questions(lm)
    evaluate(texts)
    evaluate(Text("Another text of some length, which pushes out what was there before it.", lm))
    explained = explain(texts[0], analyze=True)
    assert explained.tokens_to_recompute > 0
    assert explained.tokens_to_recompute == explained.actual.tokens_recomputed
    assert set(reasons(explained).values()) == {"evicted"}
    (miss, *_) = explained.misses
    assert miss.why == f"{miss.num_missing} of them were computed, and dropped over the budget"


def test_the_second_pool(model, tokenizer):
    lm = make_lm(model, tokenizer, num_tokens=60, host_tokens=500)
    texts = questions(lm)
    evaluate(texts)
    explained = explain(texts[0])
    assert explained.tokens_to_compute == 0
    assert explained.tokens_in_host + explained.tokens_in_memory == len(texts[0].tokens)
    assert explained.tokens_in_host == explain(texts[0], analyze=True).actual.tokens_fetched > 0


def test_seconds_are_those_of_this_lm(model, tokenizer):
    lm = LM(model, tokenizer)
    texts = questions(lm)
    assert explain(texts).seconds is explain(texts).seconds_saved is None
    assert "unknown before the first pass" in str(explain(texts))
    evaluate(texts[0])
    lm.session.counters.seconds = 0.5 * lm.session.counters.tokens_computed
    explained = explain(texts)
    assert explained.seconds == pytest.approx(0.5 * explained.tokens_to_compute)
    plain = sum(len(text.tokens) for text in texts)
    assert explained.seconds_saved == pytest.approx(0.5 * (plain - explained.tokens_to_compute))
    assert f"times fewer, about {explained.seconds_saved:.2g} s less." in explained.sentences[0]


def test_what_exceeds_the_budget_is_said(model, tokenizer):
    texts = questions(make_lm(model, tokenizer, num_tokens=60))
    explained = explain(texts)
    assert explained.exceeds_budget
    assert explained.budget_bytes == 60 * TOKEN_BYTES
    assert any(line.startswith("Warning: these texts take") for line in explained.sentences)
    assert not explain(questions(make_lm(model, tokenizer, num_tokens=1000))).exceeds_budget


# Where sharing stops


def test_nothing_is_shared(model, tokenizer):
    lm = LM(model, tokenizer)
    explained = explain([Text("12 cats", lm), Text("The cat", lm)])
    assert "Sharing saves nothing here: prompts differ from the first token." in explained.sentences
    assert explained.divergence == Divergence(1, 0, "'The cat'", 0, "token")
    alone = explain(Text("12 cats", lm))
    assert alone.divergence is None
    assert alone.sentences == ["One text without held tokens forwards 4 tokens, as its plain call does."]


def test_what_is_held_is_not_shared(model, tokenizer):
    lm = LM(model, tokenizer)
    texts = [Text("12 cats", lm), Text("The cat", lm)]
    evaluate(texts[0])
    explained = explain(texts)
    held, plain = len(texts[0].tokens), explained.tokens_requested
    assert explained.tokens_shared == 0
    assert explained.sentences[0].startswith("Sharing saves nothing here")
    assert f"forwards {plain - held} tokens instead of {plain}: " in explained.sentences[1]
    assert explained.sentences[2:] == [f"Of the tokens saved, {held} are held already."]
    context = Text("The cat", lm)
    explained = explain([texts[0], context + " sat", context + " is"])
    saved = explained.tokens_requested - explained.tokens_to_compute
    assert (
        f"Of the tokens saved, {held} are held already; sharing saves the other {saved - held}." in explained.sentences
    )


def test_special_tokens_are_not_what_is_shared(model):
    """Every text begins with the same one."""
    lm = LM(model, TOKENIZERS["llama3_bpe"]())
    explained = explain([Text("12 cats", lm), Text("The cat", lm)])
    assert explained.tokens_requested == explained.tokens_distinct + 1
    assert explained.tokens_shared == 0
    assert explained.sentences[0] == (
        "Sharing saves only special tokens here: prompts differ from the first token behind them."
    )
    assert not any("in common" in sentence for sentence in explained.sentences)
    assert (
        explain([Text("The cat", lm), Text("The cat", lm) + " sat"]).tokens_shared
        == len(Text("The cat", lm).tokens) - 1
    )
    assert explain([Text("", lm), Text("", lm)]).tokens_shared == 0


def test_no_plain_call_computes_groups(model, tokenizer):
    lm = LM(model, tokenizer)
    text = Text("a", lm) + (Text("b") | "c") + "d"
    explained = explain(text)
    assert explained.num_groups == 1
    assert not any("lain call" in sentence for sentence in explained.sentences)
    evaluate(text)
    assert not any("lain call" in sentence for sentence in explain(text).sentences)


def test_where_tokens_differ(model, tokenizer):
    lm = LM(model, tokenizer)
    context = Text("The cat", lm)
    texts = [context + " sat" + " down", context + " sat" + ", and", context + " sat" + " down"]
    num_common = len((context + " sat").tokens)
    explained = explain(texts)
    assert explained.divergence == Divergence(1, 2, "', and'", num_common, "token")
    assert f"texts[1] parts from texts[0] at token {num_common}, in segment 2 (', and')." in str(explained)
    apart = explain([Text.from_tokens((3, 4), lm), Text.from_tokens((3, 5), lm)])
    assert any("their first 1 token in common" in sentence for sentence in apart.sentences)


def test_where_a_text_ends(model, tokenizer):
    lm = LM(model, tokenizer)
    short, longer = Text("The cat", lm), Text("The cat", lm) + " sat"
    num_short = len(short.tokens)
    assert explain([short, longer]).divergence == Divergence(1, 1, "' sat'", num_short, "end")
    assert explain([longer, short]).divergence == Divergence(1, 0, "'The cat'", num_short, "end")
    assert explain([short, short]).divergence is None


def test_where_a_join_changes_a_token(model):
    """The last token of "x  " alone is two spaces; the next string splits the token."""
    lm = LM(model, TOKENIZERS["byte_level_bpe"]())
    context = Text("x  ", lm)
    one, other = context + "\tz", context + "y"
    num_common = next(i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b)
    assert num_common < len(context.tokens)
    explained = explain([one, other])
    assert explained.divergence == Divergence(1, 1, "'y'", num_common, "join")
    assert "because the next segment of one of them changed the tokens at the join" in str(explained)


# Why something is not there


def test_a_join_changed_what_is_held(model, tokenizer):
    """The left part alone is in memory, and the text needs another token in its place."""
    lm = LM(model, tokenizer)
    context = Text("x  ", lm)
    evaluate(context)
    num_same = next(i for i, (a, b) in enumerate(zip(context.tokens, (context + "y").tokens, strict=False)) if a != b)
    (miss,) = explain(context + "y").misses
    assert (miss.reason, miss.segment, miss.start) == ("join", "'y'", num_same)
    assert f"the join changed token {num_same}: " in miss.why
    assert str(list(context.tokens[num_same:])) in miss.why
    lm.clear()
    assert [miss.reason for miss in explain(context + "y").misses] == ["never computed"] * 2


def test_a_join_behind_a_group(model, tokenizer):
    lm = LM(model, tokenizer)
    before = Text("a", lm) + (Text("b") | "c") + "x  "
    evaluate(before)
    (miss,) = explain(before + "y").misses
    assert (miss.reason, miss.segment, miss.segment_idx) == ("join", "'y'", 4)


def test_held_behind_other_tokens(model, tokenizer):
    lm = LM(model, tokenizer)
    evaluate(Text("Review: the film was great,", lm) + " the ending wasn't")
    position = len(Text("Review: the film was great,", lm).tokens)
    text = Text("On 12 cats:", lm) + " the ending wasn't"
    (front, ending) = explain(text).misses
    assert front.reason == "never computed"
    assert ending.reason == "elsewhere"
    here = ending.start
    assert here != position
    assert ending.why == f"the same tokens are held at position {position}, not {here}, behind other ones"
    assert "held at position" in str(explain(text))
    assert reasons(explain(Text(" the ending was bad", lm))) == {"' the ending was bad'": "never computed"}


def test_stored_by_another_model(model, tokenizer):
    store = MemoryStore()
    evaluate(Text(CONTEXT, LM(FAMILIES["gpt2"](seed=1), tokenizer, store=store)))
    lm = LM(model, tokenizer, store=store)
    explained = explain(Text(CONTEXT, lm) + "What is 7 + 7?")
    assert [miss.reason for miss in explained.misses] == ["other model", "never computed"]
    assert explained.misses[0].why.startswith("the store has it under other weights (")
    in_half = LM(FAMILIES["gpt2"]().bfloat16(), tokenizer, store=store)
    evaluate(Text("Review: the film was great, the ending wasn't.", in_half))
    (miss,) = explain(Text("Review: the film was great, the ending wasn't.", lm)).misses
    assert "another dtype (torch.bfloat16, not torch.float32)" in miss.why


def test_a_store_that_cannot_be_read(model, tokenizer, monkeypatch, caplog):
    store = MemoryStore()

    def fail(text_prefix=""):
        raise OSError("gone")

    monkeypatch.setattr(store, "list", fail)
    monkeypatch.setattr(store, "longest", lambda start, token_ids: None)
    (miss,) = explain(Text(CONTEXT, LM(model, tokenizer, store=store))).misses
    assert miss.reason == "never computed"
    assert "cannot be read (gone)" in caplog.text


def test_what_is_too_short_to_be_stored(model, tokenizer):
    """A short run is computed, and computed again by the next process."""
    store = MemoryStore()
    context, question = Text(CONTEXT, LM(model, tokenizer, store=store)), "What is 7?"
    evaluate(context)
    evaluate(context + question)
    lm = LM(model, tokenizer, store=store)
    explained = explain(Text(CONTEXT, lm) + question)
    (miss,) = explained.misses
    assert 0 < miss.num_missing < 16
    assert (miss.segment, miss.reason) == (repr(question), "too short")
    assert miss.why in str(explained)
    long = Text(CONTEXT, lm) + question + " The cat sat on the mat."
    assert {miss.reason for miss in explain(long).misses} == {"never computed"}
    assert reasons(explain(Text("The cat", LM(model, tokenizer)))) == {"'The cat'": "never computed"}


def test_segments_that_texts_share_are_named_once(model, tokenizer):
    texts = questions(LM(model, tokenizer))
    explained = explain(texts)
    assert len(explained.misses) == 1 + 6 + 12
    assert [miss.num_texts for miss in explained.misses[:2]] == [12, 2]
    assert all(miss.num_missing == miss.stop - miss.start > 0 for miss in explained.misses)
    assert "  19 segments: never computed, as far as is known" in str(explained).splitlines()


# How it looks


def test_account_as_text_html_rich_and_json(model, tokenizer, capsys):
    lm = LM(model, tokenizer)
    evaluate(Text(" the ending <wasn't>", lm))
    explained = explain([Text("On 12 cats:", lm) + " the ending <wasn't>", Text("On 12 hats", lm)], analyze=True)
    printed = str(explained)
    assert printed.splitlines()[0].split() == ["expected", "actual"]
    row = next(line for line in printed.splitlines() if line.startswith("tokens to compute"))
    assert row.split()[-2:] == [str(explained.tokens_to_compute), str(explained.actual.tokens_computed)]
    assert "Segments that were missing, and why:" in printed
    page = explained._repr_html_()
    assert "&lt;wasn" in page
    assert "<wasn" not in page
    figures = json.loads(json.dumps(explained.to_dict()))
    assert figures["tokens_to_compute"] == explained.tokens_to_compute
    assert figures["actual"]["tokens_computed"] == explained.actual.tokens_computed
    assert figures["misses"][-1]["reason"] == explained.misses[-1].reason
    explained.show()
    assert capsys.readouterr().out == printed + "\n"


def test_account_as_a_rich_table(model, tokenizer):
    rich_console = pytest.importorskip("rich.console")
    explained = explain(Text("[bold]The cat[/bold]", LM(model, tokenizer)))
    console = rich_console.Console(width=120, record=True, file=io.StringIO())
    console.print(explained)
    printed = console.export_text()
    assert "tokens to compute" in printed
    assert explained.sentences[0] in printed


# Refusals


def test_texts_that_cannot_be_explained(model, tokenizer):
    lm = LM(model, tokenizer)
    with pytest.raises(ValueError, match="at least one text"):
        explain([])
    with pytest.raises(bp.TextTypeError, match="not the str"):
        explain("The cat")
    with pytest.raises(bp.TextTypeError, match="explain takes a Text or several in a list, not NoneType: None"):
        explain(None)
    with pytest.raises(bp.TextTypeError, match="texts\\[1\\] is a int"):
        explain([Text("a", lm), 1])
    with pytest.raises(bp.UnboundTextError, match="has no model"):
        explain([Text("a")])
    with pytest.raises(bp.MixedModelsError, match="one LM in each call"):
        explain([Text("a", lm), Text("a", LM(model, tokenizer))])
    with pytest.raises(bp.TextTooLongError):
        explain([Text("a " * 300, lm)], analyze=True)
    assert lm.stats.tokens_computed == 0


# Which tokens a segment became


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@settings(max_examples=15)
@given(data=st.data())
def test_extents_cover_a_text_and_say_what_a_join_replaced(name, data):
    """The text before a segment, encoded alone, is the tokens before the segment and those that it replaced."""
    lm = LM(MODEL, TOKENIZERS[name](), joins=data.draw(st.sampled_from(["exact", "split"])))
    texts = usable([compose(one, lm) for one in data.draw(forests())])
    for text, extents in zip(texts, lm.extents(texts), strict=True):
        assert [extent.segment for extent in extents] == list(text.segments)
        edges = [0, *(extent.stop for extent in extents)]
        assert [extent.start for extent in extents] == edges[:-1]
        assert edges[-1] == len(text.tokens) or not extents
        for idx, extent in enumerate(extents[1:], 1):
            before = compose(list(text.segments[:idx]), lm)
            (alone,) = lm.session.prompt_ids([before])
            is_followed = extent.replaced or not extents[idx].start < len(alone)
            assert (*text.tokens[: extent.start], *extent.replaced) == alone or not is_followed


def test_extents_in_groups(model):
    """Each branch's segments are segments of the text; special tokens belong to what they stand next to."""
    lm = LM(model, TOKENIZERS["llama3_bpe"]())
    frozen = Text("Ans", lm).frozen()
    text = Text("The cat", lm) + (Text(" sat") + " on" | "s") + frozen + Text.from_tokens([7, 8], lm)
    (extents,) = lm.extents([text])
    assert [extent.segment for extent in extents] == ["The cat", " sat", " on", "s", "Ans", (7, 8)]
    assert extents[0].start == 0
    assert text.tokens[extents[4].start] == text.tokens[0]  # the frozen segment's own first token
    assert text.tokens[extents[5].start : extents[5].stop] == (7, 8)
    assert extents[-1].stop == len(text.tokens)
    for extent in extents[1:4]:
        ids = text.tokens[extent.start : extent.stop]
        assert lm.tokenizer.decode(ids) == extent.segment


def test_a_later_join_may_change_tokens_further_back(model, tokenizer):
    """The "y" takes apart what the two spaces had become, so the second space has no token of its own."""
    lm = LM(model, tokenizer)
    (two_spaces,) = lm.tokenizer.encode("  ")
    (extents,) = lm.extents([Text("x ", lm) + " " + "y"])
    assert [(extent.start, extent.stop, extent.replaced) for extent in extents] == [
        (0, 1, ()),
        (1, 1, ()),
        (1, 4, (two_spaces,)),
    ]


def test_what_was_dropped_is_held_nowhere_else():
    forest = Forest()
    forest.insert((1, 2, 3, 4))
    assert positions_of(forest, [(2, 3)]) == {}
    for span in forest.spans():
        span.states = NOTHING
    assert positions_of(forest, [(2, 3), (3, 5), (4,)]) == {(2, 3): 1, (4,): 3}
