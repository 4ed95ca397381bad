"""Composing: `+` only builds, and how a text was put together does not matter.

Text("a") + "b" + "c"            ((a b) c)
"a" + (Text("b") + "c")          (a (b c))
"""

import ast
import copy
import gc
import importlib
import inspect
import operator
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import reduce
from graphlib import TopologicalSorter
from itertools import permutations
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import backprompt as bp
import backprompt.text.node
from backprompt import LM, Text
from backprompt.session.session import Session
from backprompt.tokens.tokenizer import PrivateTokenizer
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

strings = st.text(max_size=6)
# Few and short, so that two lists of them are often one string and sometimes the same segments.
colliding_segments = st.lists(st.sampled_from(["", "a", "b", "ab", (1,), (2,), (1, 2)]), max_size=6)


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(build("gpt2"), byte_level_bpe())


@pytest.fixture(scope="module")
def other_lm() -> LM:
    return LM(build("gpt2"), byte_level_bpe())


@pytest.fixture
def no_work(monkeypatch) -> None:
    """From here on every call of a tokenizer, of any module of torch, or of an LM's own methods is an error."""

    def fail(*args, **kwargs):
        raise AssertionError("something was tokenized or computed")

    for owner, names in [
        (LM, ("evaluate", "tokens", "joins", "string")),
        (Session, ("current",)),
        (PrivateTokenizer, ("encode", "decode", "cut", "has_changed")),
        (torch.nn.Module, ("__call__",)),
    ]:
        for name in names:
            monkeypatch.setattr(owner, name, fail)


def leaf(segment: str | tuple[int, ...], lm: LM) -> Text:
    return Text(segment, lm) if isinstance(segment, str) else Text.from_tokens(segment, lm)


def grouped_at_random(texts: Sequence[Text], random: Random) -> Text:
    """The sum of the texts in their order, brackets set by chance."""
    groups = list(texts)
    while len(groups) > 1:
        idx = random.randrange(len(groups) - 1)
        groups[idx : idx + 2] = [groups[idx] + groups[idx + 1]]
    return groups[0]


def left_nested(texts: Sequence[Text]) -> Text:
    return reduce(operator.add, texts)


def right_nested(texts: Sequence[Text]) -> Text:
    return reduce(lambda right, left: left + right, reversed(texts))


def balanced(texts: Sequence[Text]) -> Text:
    groups = list(texts)
    while len(groups) > 1:
        groups = [left_nested(groups[start : start + 2]) for start in range(0, len(groups), 2)]
    return groups[0]


# Joining strings


@given(left=strings, right=strings)
def test_a_str_on_either_side_is_a_text(left, right):
    assert (Text(left) + Text(right)).string == left + right
    assert Text(left) + right == left + Text(right) == Text(left) + Text(right)


@given(separator=strings, parts=st.lists(strings, max_size=6), random=st.randoms(use_true_random=False))
def test_join_and_sum_read_as_those_of_str(separator, parts, random):
    texts = [Text(part) if random.random() < 0.5 else part for part in parts]
    assert Text(separator).join(texts).string == separator.join(parts)
    assert Text(separator).join(iter(texts)).string == separator.join(parts)
    assert sum(texts, Text("")).string == "".join(parts)


def test_join_takes_a_plain_string_apart_as_str_join_does():
    assert Text("-").join("abc").segments == ("a", "-", "b", "-", "c")


@given(string=st.text())
def test_str_and_f_strings_give_the_string(string):
    text = Text(string[:2]) + string[2:]
    assert str(text) == f"{text}" == text.string == string


def test_iadd_leaves_the_text_it_started_from_as_it_was():
    text = start = Text("a")
    text += "b"
    assert (start.string, text.string) == ("a", "ab")


# Identity: the flattened segments and the LM


@given(segments=colliding_segments.filter(len), random=st.randoms(use_true_random=False))
def test_grouping_does_not_matter(lm, segments, random):
    texts = [leaf(segment, lm) for segment in segments]
    text, regrouped = grouped_at_random(texts, random), grouped_at_random(texts, random)
    assert text == regrouped
    assert hash(text) == hash(regrouped)
    assert text.segments == regrouped.segments == tuple(filter(len, segments))
    assert {text: "found"}[regrouped] == "found"


@given(segments=colliding_segments, other_segments=colliding_segments)
def test_texts_are_equal_exactly_where_their_segments_are(lm, segments, other_segments):
    text = sum((leaf(segment, lm) for segment in segments), Text("", lm))
    other = sum((leaf(segment, lm) for segment in other_segments), Text("", lm))
    assert (text == other) is (text.segments == other.segments)
    assert (text != other) is (text.segments != other.segments)


def test_a_join_is_part_of_identity():
    assert Text("ab") != Text("a") + "b"
    assert Text("ab").string == (Text("a") + "b").string


def test_empty_strings_add_no_segment(lm):
    assert (Text("") + "a" + "" + Text("b") + "").segments == ("a", "b")
    assert Text.from_tokens([], lm) + "a" == Text("a", lm)
    assert Text("").segments == ()


beginnings = st.tuples(st.sampled_from(["", "", "a", "b"]), st.booleans(), st.booleans())


@given(parts=st.lists(beginnings, max_size=5), others=st.lists(beginnings, max_size=5), random=st.randoms())
@example(parts=[("", True, True), ("a", False, False)], others=[("a", True, True)], random=Random(0))
@example(parts=[("", True, True), ("", False, False), ("a", True, False)], others=[], random=Random(0))
@example(parts=[("a", True, False), ("", False, True), ("b", False, False)], others=[], random=Random(0))
def test_the_beginning_says_whether_special_tokens_are_added_however_texts_are_grouped(lm, parts, others, random):
    """The first part decides that is not empty or that wants none; behind something it means nothing."""

    def expected(parts):
        decides = next((adds for string, adds, _ in parts if string or not adds), True)
        return decides, tuple(string for string, _, _ in parts if string), any(is_bound for _, _, is_bound in parts)

    def built(parts):
        texts = [Text(string, lm if is_bound else None, add_special_tokens=adds) for string, adds, is_bound in parts]
        return grouped_at_random(texts, random) if texts else Text("")

    text, other = built(parts), built(others)
    assert (text.add_special_tokens, text.segments, text.lm is lm) == expected(parts)
    assert (text == other) is (expected(parts) == expected(others))
    assert text == built(parts)
    assert hash(text) == hash(built(parts))
    reduced, arguments = text.__reduce__()
    for same in (reduced(*arguments), text + "", Text("") + text, Text("").join([text])):
        assert same == text
        assert hash(same) == hash(text)


def test_a_text_without_special_tokens_says_so(lm):
    rendered = Text("<s>Hi", lm, add_special_tokens=False)
    assert repr(rendered + "!") == "Text('<s>Hi!', add_special_tokens=False)"
    assert repr("x" + rendered) == "Text('x<s>Hi')"
    assert repr("x" + rendered.frozen()) == "Text('x' + Text('<s>Hi', add_special_tokens=False).frozen())"
    assert rendered.frozen() != Text("<s>Hi", lm).frozen()
    assert rendered.frozen() == rendered.frozen().frozen()


def test_an_order_of_segments_has_a_hash_of_its_own():
    """A sum of hashes would be associative too, and put all of these in one bucket."""
    texts = [sum(order, Text("")) for order in permutations("abcdef")]
    assert len({hash(text) for text in texts}) == len(texts) == 720


def test_a_text_equals_no_other_kind_of_object():
    assert (Text("a") == "a") is False
    assert Text("a") != ("a",)


def test_the_lm_is_part_of_identity(lm, other_lm):
    texts = [Text("a"), Text("a", lm), Text("a", other_lm)]
    assert [[text == other for other in texts] for text in texts] == np.eye(3, dtype=bool).tolist()
    assert len({hash(text) for text in texts}) == 3


def test_texts_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(backprompt.text.node, "PRIME", 1)
    texts = [Text("a") + "b", Text("b") + "a", Text("c") + "d"]
    assert len({hash(text) for text in texts}) == 1
    assert len(set(texts)) == 3


# Which LM


@given(segments=st.lists(strings, min_size=1, max_size=6), bound_idx=st.integers(0, 5), random=st.randoms())
def test_one_bound_text_binds_all(lm, segments, bound_idx, random):
    bound_idx %= len(segments)
    texts = [Text(segment, lm if idx == bound_idx else None) for idx, segment in enumerate(segments)]
    text = grouped_at_random(texts, random)
    assert text.lm is lm
    assert text == sum((Text(segment, lm) for segment in segments), Text(""))


def test_binding_works_in_both_orders_and_leaves_the_unbound_text_unbound(lm):
    unbound = Text("a")
    assert (unbound + Text("b", lm)).lm is (Text("b", lm) + unbound).lm is lm
    assert (Text("", lm) + "a").lm is ("a" + Text("", lm)).lm is lm
    assert unbound.lm is None


@pytest.mark.parametrize("parts", [[], ["a"], ["a", "b"]])
def test_a_bound_separator_binds_what_it_joins(lm, parts):
    """However many texts there are to join: code that joins a list must not depend on its length."""
    assert Text(", ", lm).join(parts) == Text("", lm) + Text(", ").join(parts)


def test_a_model_and_a_tokenizer_find_one_lm_for_as_long_as_it_is_used():
    model, tokenizer, other_tokenizer = build("gpt2"), byte_level_bpe(), byte_level_bpe()
    text = Text("a", (model, tokenizer)) + Text("b", (model, tokenizer))
    assert text.lm is Text("c", (model, tokenizer)).lm
    assert text.lm is not Text("c", (model, other_tokenizer)).lm
    assert text.lm is not LM(model, tokenizer)

    token_ids, lm = text.tokens, weakref.ref(text.lm)
    assert text.logits.shape == (model.config.vocab_size,)
    del text
    gc.collect()
    assert lm() is None
    assert (Text("a", (model, tokenizer)) + "b").tokens == token_ids


# Chains of ten thousand, ten times the depth of Python's recursion limit

NUM_LINKS = 10_000
NESTINGS: dict[str, Callable[[Sequence[Text]], Text]] = {
    "left": left_nested,
    "right": right_nested,
    "balanced": balanced,
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_long_chains(lm, nesting):
    segments = tuple(f"link no {idx} " for idx in range(NUM_LINKS))
    text = NESTINGS[nesting]([Text(segment, lm) for segment in segments])
    assert text.segments == segments
    assert text.string == "".join(segments)
    assert repr(text).startswith("Text('link no 0 link no 1 ")
    assert text.tokens == tuple(lm.tokenizer(text.string)["input_ids"])
    assert copy.copy(text) == copy.deepcopy(text) == text
    again = sum(segments, Text("", lm))
    assert hash(text) == hash(again)
    assert text == again
    assert text != sum((*segments[:-1], "another"), Text("", lm))


@pytest.mark.parametrize("nesting", NESTINGS)
def test_long_chains_are_pickled(nesting):
    text = NESTINGS[nesting]([Text("ab ")] * NUM_LINKS)
    assert pickle.loads(pickle.dumps(text)) == text


@pytest.mark.parametrize("nesting", NESTINGS)
def test_long_chains_are_deleted_link_by_link(nesting):
    """C's stack is deeper than Python's, hence the longer chain."""
    links = [Text(str(idx)) for idx in range(10 * NUM_LINKS)]
    first = weakref.ref(links[0])
    text = NESTINGS[nesting](links)
    del links
    assert first() is not None
    del text
    assert first() is None


# Building computes nothing


@pytest.mark.usefixtures("no_work")
def test_a_hundred_thousand_compositions_touch_neither_model_nor_tokenizer(lm):
    context = Text("context ", lm)
    texts = [context + f"question {idx}" + Text.from_tokens([idx % 300], lm) for idx in range(50_000)]
    assert len(set(texts)) == 50_000
    assert Text(" ", lm).join(texts[:100]) == Text(" ").join(texts[:100])
    assert "question 49999" in repr(texts[-1])


@pytest.mark.usefixtures("no_work")
def test_the_guard_against_work_sees_work(lm):
    with pytest.raises(AssertionError, match="tokenized or computed"):
        _ = Text("never asked before", lm).tokens
    with pytest.raises(AssertionError, match="tokenized or computed"):
        lm.model(input_ids=torch.tensor([[1]]))


def test_the_node_imports_neither_torch_nor_a_model():
    """Nor does a module that it imports, later or for types alone; of torch the types of tensors are known."""
    node = {f"backprompt.{name}" for name in ("arguments", "drawing", "errors", "forking", "visible")}
    node |= {f"backprompt.text.{name}" for name in ("node", "questions", "segments", "extents", "engine")}
    found = {name: imports_of(importlib.import_module(name)) for name in node}
    own = {name: {module for module in imports if module.startswith("backprompt")} for name, imports in found.items()}
    assert own["backprompt.text.questions"] - node == {"backprompt"}  # for the types that `generate` returns
    assert set().union(*own.values()) <= node | {"backprompt"}
    assert own["backprompt.arguments"] == {"backprompt.visible", "backprompt.errors"}
    assert own["backprompt.text.engine"] == {"backprompt.visible", "backprompt.text.extents", "backprompt.errors"}
    TopologicalSorter(own).prepare()
    at_import = {name: imports_of(importlib.import_module(name), later=False) for name in node}
    at_import.pop("backprompt.drawing")  # named for its type alone
    assert set().union(*at_import.values()) - set().union(*own.values()) == {"numpy", "numpy.typing"}


def imports_of(module, *, later=True):
    """The imports of a module outside the standard library; unless `later`, only those at import and not for types."""
    tree = ast.parse(inspect.getsource(module))
    statements = list(ast.walk(tree)) if later else tree.body
    imported = {statement.module for statement in statements if isinstance(statement, ast.ImportFrom)}
    imported |= {alias.name for found in statements if isinstance(found, ast.Import) for alias in found.names}
    return {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}


def test_a_text_holds_no_tensors(lm):
    """Everything reachable from a text, its LM left out, is texts, strings, ints, bools, None and a mark."""
    text = Text("a text", lm) + " of" + Text.from_tokens([1, 2], lm)
    assert text.logits.isfinite().all()
    reached: dict[int, Any] = {}
    pending: list[Any] = [text]
    while pending:
        found = pending.pop()
        if id(found) not in reached and not isinstance(found, (LM, type)):
            reached[id(found)] = found
            pending += gc.get_referents(found)
    assert {type(found) for found in reached.values()} <= {Text, str, tuple, int, bool, type(None), object}
    assert len([found for found in reached.values() if isinstance(found, Text)]) == 5
    assert not hasattr(text, "__dict__")


# Eager mode


def test_eager_evaluates_as_texts_are_built():
    lm = LM(build("gpt2"), byte_level_bpe())
    before = lm.stats
    with bp.eager():
        context = Text("some context", lm)
        built = lm.stats - before
        assert (built.tokens_computed, built.forward_passes) == (len(context.tokens), 1)
        text = context + " and more"
    after = lm.stats
    assert (after - before).tokens_computed == len(text.tokens)
    assert text.logits.isfinite().all()
    assert (lm.stats - after).tokens_computed == (lm.stats - after).forward_passes == 0


def test_eager_ends_with_its_context_also_on_an_error_and_holds_for_one_thread(lm):
    before = lm.stats
    with pytest.raises(bp.TextTypeError), bp.eager(), bp.eager():
        Text(1)
    with bp.eager():
        thread = threading.Thread(target=lambda: Text("built in another thread", lm) + " with no eager")
        thread.start()
        thread.join()
    assert Text("built outside", lm) + " of it"
    assert (lm.stats - before).tokens_requested == 0


def test_eager_leaves_texts_without_model_or_tokens_alone(lm):
    before = lm.stats
    with bp.eager():
        texts = [Text("no model") + " at all", Text("", lm), Text.from_tokens([], lm), Text("", lm) + ""]
    assert [len(text.segments) for text in texts] == [2, 0, 0, 0]
    assert (lm.stats - before).tokens_requested == 0


# repr, copies, pickles


@given(parts=st.lists(st.text(), max_size=4))
def test_repr_is_short_and_shows_both_ends(parts):
    text = sum(parts, Text(""))
    shown = repr(text)
    assert len(shown) <= 80
    assert shown == f"Text({text.string!r})" or "..." in shown


def test_repr_leaves_out_the_middle_and_counts_token_ids(lm):
    text = Text("It begins here " + "x" * 1000 + " and ends there.") + Text.from_tokens([1, 2, 3], lm)
    assert repr(text).startswith("Text('It begins here xxx")
    assert repr(text).endswith(" ends there.<3 token ids>')")
    assert "xxx..." in repr(text)


def test_copies_are_the_text_itself(lm):
    text = Text("a", lm) + "b"
    assert copy.copy(text) is copy.deepcopy(text) is copy.deepcopy([text])[0] is text


@given(parts=st.lists(strings, max_size=5), protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_unbound_texts_are_pickled(parts, protocol):
    text = sum(parts, Text(""))
    loaded = pickle.loads(pickle.dumps(text, protocol))
    assert (loaded, loaded.segments, loaded.lm) == (text, text.segments, None)


def test_bound_texts_are_not_pickled(lm):
    with pytest.raises(bp.NotPicklableError, match="Pickle texts without a model") as raised:
        pickle.dumps(Text("a", lm) + "b")
    assert isinstance(raised.value, TypeError)


# Errors

NOT_STRINGS: dict[str, Any] = {
    "int": 3,
    "zero": 0,
    "none": None,
    "bytes": b"a",
    "list": ["a"],
    "tensor": torch.tensor(1),
    "tensor of two": torch.tensor([1, 2]),
    "array": np.array([1, 2]),
}


@pytest.mark.parametrize("value", NOT_STRINGS.values(), ids=NOT_STRINGS)
@pytest.mark.parametrize(
    "compose",
    [
        Text,
        lambda value: Text("a") + value,
        lambda value: value + Text("a"),
        lambda value: Text(", ").join(["a", value]),
        lambda value: Text(", ").join([value]),
        lambda value: sum([Text("a"), value], Text("")),
    ],
    ids=["Text()", "+ value", "value +", "join", "join of one", "sum"],
)
def test_only_strings_and_texts_are_composed(compose, value):
    with pytest.raises(bp.TextTypeError) as raised:
        compose(value)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("value", [None, 0, "False"])
def test_special_tokens_are_added_or_not(value):
    with pytest.raises(bp.TextTypeError, match="add_special_tokens must be True or False"):
        Text("a", add_special_tokens=value)


def test_sum_without_a_start_says_what_to_start_from():
    with pytest.raises(bp.TextTypeError, match=r"sum\(texts, Text\(''\)\)"):
        sum([Text("a"), Text("b")])


@pytest.mark.parametrize("token_ids", [[1, True], [1.0], torch.tensor([1, 2]), np.array([1, 2]), "12", [None]], ids=str)
def test_token_ids_are_ints(lm, token_ids):
    with pytest.raises(bp.TextTypeError, match=r"Text\.from_tokens takes ints"):
        Text.from_tokens(token_ids, lm)


@pytest.mark.parametrize("bad_lm", ["gpt2", 1, (build,), [1, 2]], ids=["a name", "an int", "a tuple of one", "a list"])
def test_a_text_is_bound_to_nothing_but_an_lm(bad_lm):
    with pytest.raises(bp.TextTypeError, match=r"an LM or a \(model, tokenizer\) tuple"):
        Text("a", bad_lm)


def test_two_lms_do_not_meet_in_one_text(lm, other_lm):
    for compose in (
        lambda: Text("a", lm) + Text("b", other_lm),
        lambda: Text("", lm) + Text("", other_lm),
        lambda: Text("", lm).join(["a", Text("b", other_lm)]),
        lambda: sum([Text("a"), Text("b", lm), Text("c", other_lm)], Text("")),
    ):
        with pytest.raises(bp.MixedModelsError, match="two different LM objects") as raised:
            compose()
        assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    "attribute", ["tokens", "logits", "token_logprobs", "model_repr", "joins", "__call__", "entropies"]
)
def test_an_unbound_text_says_that_it_needs_a_model(attribute):
    text, is_method = Text("a") + "b", attribute in ("joins", "__call__", "entropies")
    with pytest.raises(bp.UnboundTextError, match=r"Text\('ab'\) has no model") as raised:
        operator.methodcaller(attribute)(text) if is_method else getattr(text, attribute)
    assert isinstance(raised.value, ValueError)
