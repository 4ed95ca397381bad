"""Composing groups: `|` only builds, flattens, and drops what is empty; and what the tokens of a group are."""

import copy
import pickle
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokens import BUILDERS, PRIVATE, lm, string_ids

import backprompt as bp
from backprompt import LM, MixedModelsError, Text, TextTypeError
from backprompt.text.segments import Branch, Group
from backprompt.tokens.graph import (
    TokenBranch,
    TokenGraph,
    TokenGroup,
    as_token_ids,
    ends_in_group,
    flat,
    fold,
    num_positions,
)
from tiny_models import build
from tiny_tokenizers import byte_level_bpe


@pytest.fixture(scope="module")
def one_lm() -> LM:
    return LM(build("gpt2"), byte_level_bpe())


def branches(*strings):
    return tuple(Branch((string,)) for string in strings)


# Building


def test_a_group_gets_no_special_tokens_if_none_of_its_branches_wants_them():
    """They stand before it, once; a frozen branch has its own, or none."""
    bare, plain = Text("a", add_special_tokens=False), Text("b")
    for group in (bare | bare, bare | "", bare | plain.frozen(), (bare | bare) | bare, bp.parallel([bare])):
        assert not group.add_special_tokens
        assert not (group + plain).add_special_tokens
    for group in (
        bare | plain,
        plain | bare,
        (bare | bare) | plain,
        bare.frozen() | plain,
        bare.frozen() | "",
        bare | (plain | bare),
    ):
        assert group.add_special_tokens
    assert bp.parallel([bare]) == bare
    assert (bare.frozen() | plain).segments[0].branches[0] == Branch(("a",), is_frozen=True, add_special_tokens=False)


def test_python_binds_plus_before_the_bar():
    assert (Text("context ") + "a" | "b").segments == (Group((Branch(("context ", "a")), Branch(("b",)))),)
    assert (Text("context ") + (Text("a") | "b")).segments == ("context ", Group(branches("a", "b")))


def test_a_group_joined_with_a_bar_is_one_larger_group():
    a, b, c, d = map(Text, "abcd")
    assert (a | b) | (c | d) == a | ((b | c) | d) == bp.parallel(["a", "b", "c", "d"])
    assert hash((a | b) | c) == hash(a | (b | c))
    assert "a" | (b | "c") == bp.parallel([a, b, c])
    assert ((a | b) + "") | c == a | b | c
    assert ((a | b) + c) | d != a | b | c | d


def test_the_written_order_and_repeats_are_part_of_a_text():
    a, b = Text("a"), Text("b")
    assert a | b != b | a
    assert a | a != a
    assert (a | a).string == "aa"
    assert ("x" + (a | b) + "y").string == "xaby"


def test_empty_branches_are_dropped_and_a_group_of_one_is_its_branch(one_lm):
    a = Text("a", one_lm)
    assert a | "" == "" | a == bp.parallel([a]) == bp.parallel(["", a, ""]) == a
    assert bp.parallel([]) == bp.parallel(["", ""]) == Text("")
    assert (Text("", one_lm) | "a").lm is one_lm
    assert bp.parallel(["a"], positions="sequential") == Text("a")


def test_the_sequential_kind_never_becomes_part_of_a_shared_group():
    ordered = bp.parallel(["a", "b"], positions="sequential")
    assert (ordered | "c").segments == (Group((Branch(ordered.segments), *branches("c"))),)
    assert ordered != Text("a") | "b"
    assert bp.parallel([ordered, "c"], positions="sequential").segments[0].branches[0] == Branch(ordered.segments)


def test_freezing():
    a = Text("a").frozen()
    assert a != Text("a")
    assert a.frozen() == a
    assert Text("").frozen() == Text("")
    assert (a | "b").segments == (Group((Branch(("a",), is_frozen=True), *branches("b"))),)
    assert bp.parallel([a, "b"], positions="sequential").segments[0].branches[0].is_frozen
    assert a + a != a
    assert a | a == bp.parallel([a, a])


def test_groups_are_not_nested_deeper_than_walks_go():
    text = Text("y")
    for _ in range(20):
        text = (text.frozen() + "x") | "y"
    with pytest.raises(bp.GroupError, match="nested 50 deep"):
        reduce(lambda inner, _: (inner.frozen() + "x") | "y", range(30), text)
    assert hash(text) == hash(pickle.loads(pickle.dumps(text)))
    assert repr(text)
    chain = Text("a") | "b"
    for _ in range(1000):
        chain = chain + (Text("a") | "b")
    assert len(chain.segments) == 1001


def test_what_it_looks_like():
    a, b = Text("a"), Text("b")
    assert repr("c " + (a | b + "d") + "q") == "Text('c ' + ('a' | 'bd') + 'q')"
    assert repr(a + ("b" | (a | b) + "x")) == "Text('a' + ('b' | ('a' | 'b') + 'x'))"
    assert repr("c" + a.frozen()) == "Text('c' + ('a').frozen())"
    assert repr(bp.parallel([a, b], positions="sequential")) == ("Text(parallel(['a', 'b'], positions='sequential'))")


def test_a_group_takes_the_model_of_its_branches(one_lm):
    other = LM(build("gpt2"), byte_level_bpe())
    assert (Text("a") | Text("b", one_lm)).lm is one_lm
    with pytest.raises(MixedModelsError, match="two different LM"):
        Text("a", other) | Text("b", one_lm)
    with pytest.raises(MixedModelsError, match="two different LM"):
        bp.parallel(["a", Text("a", other), Text("b", one_lm)])


@pytest.mark.parametrize("other", [1, None, ["a"], b"a"])
def test_a_bar_with_something_else_raises(other):
    with pytest.raises(TextTypeError, match=r"\| takes a Text or a str"):
        Text("a") | other
    with pytest.raises(TextTypeError, match=r"\| takes a Text or a str"):
        other | Text("a")


def test_parallel_checks_what_it_is_given():
    with pytest.raises(TextTypeError, match="list of texts, not the str 'ab'"):
        bp.parallel("ab")
    with pytest.raises(TextTypeError, match="list of texts, not int"):
        bp.parallel(5)
    with pytest.raises(TextTypeError, match="parallel takes a Text or a str"):
        bp.parallel(["a", 3])
    with pytest.raises(ValueError, match="'shared', 'sequential'"):
        bp.parallel(["a", "b"], positions="relative")


def test_groups_are_copied_and_pickled():
    text = "x" + (Text("a") | Text("b").frozen()) + "y"
    assert pickle.loads(pickle.dumps(text)) == text
    assert copy.deepcopy(text) is text


# Tokens


ids = st.lists(st.integers(0, 3), max_size=3).map(tuple)
parts = st.recursive(
    ids,
    lambda inner: st.builds(
        TokenGroup,
        st.lists(st.builds(TokenBranch, st.lists(inner, max_size=3).map(tuple), st.booleans()), max_size=3).map(tuple),
        st.booleans(),
    ),
    max_leaves=10,
)


def visible(token_ids):
    """Each token's position and the sorted (position, id) pairs that it sees; the pairs that what follows sees."""
    rows = []

    def extend(seen, position, run):
        for offset, token_id in enumerate(run):
            seen = (*seen, (position + offset, token_id, len(rows)))
            rows.append(((position + offset, token_id), without_numbers(seen)))
        return seen

    def join(before, ends, position):
        return before + tuple(token for end, _ in ends for token in end if token not in before)

    end, position = fold(token_ids, (), extend, join)
    return rows, without_numbers(end), position


def without_numbers(seen):
    return sorted((position, token_id) for position, token_id, _ in seen)


@given(given_parts=st.lists(parts, max_size=4).map(tuple))
def test_the_one_form_of_a_graph_means_the_same(given_parts):
    graph = as_token_ids(given_parts)
    assert visible(graph) == visible(TokenGraph(given_parts))
    assert as_token_ids(graph.parts if isinstance(graph, TokenGraph) else (graph,)) == graph
    assert len(graph) == len(flat(graph)) == len(visible(graph)[0])
    assert num_positions(graph) == visible(graph)[2]
    if isinstance(graph, TokenGraph):
        assert any(isinstance(part, TokenGroup) for part in graph.parts)
        assert ends_in_group(graph) == isinstance(graph.parts[-1], TokenGroup)


@pytest.mark.parametrize("name", BUILDERS)
def test_branches_are_encoded_apart(name):
    """As continuations behind something, as texts begin where nothing stands before, with special tokens once."""
    an_lm = lm(name)
    cont = lambda string: tuple(string_ids(name, string, is_continuation=True))  # noqa: E731
    start = lambda string: tuple(string_ids(name, string, is_continuation=False))  # noqa: E731
    prefix, _ = PRIVATE[name].special_ids_around(())
    group = Text("the ref", an_lm) | "und the"
    (graph,) = an_lm.session.encoder.encode(["See " + group + "und"])
    inner = TokenGroup((TokenBranch((cont("the ref"),)), TokenBranch((cont("und the"),))))
    assert graph == TokenGraph((prefix + start("See "), inner, cont("und")))
    (graph,) = an_lm.session.encoder.encode([group + "und"])
    inner = TokenGroup((TokenBranch((start("the ref"),)), TokenBranch((start("und the"),))))
    assert graph == TokenGraph((prefix, inner, cont("und")) if prefix else (inner, cont("und")))
    assert graph.flat == (group + "und").tokens


@pytest.mark.parametrize("name", BUILDERS)
def test_a_frozen_text_is_encoded_as_a_text_of_its_own(name):
    an_lm = lm(name)
    frozen, (_, suffix) = Text("the ref", an_lm), PRIVATE[name].special_ids_around(())
    own = frozen.tokens[: len(frozen.tokens) - len(suffix)]
    (graph,) = an_lm.session.encoder.encode(["See " + frozen.frozen() + "und"])
    assert graph.parts[1] == TokenGroup((TokenBranch((own,), is_frozen=True),))
    assert graph.parts[2] == tuple(string_ids(name, "und", is_continuation=True))
    first = frozen.frozen() + "und"
    assert first.tokens == own + tuple(string_ids(name, "und", is_continuation=True))


@pytest.mark.parametrize("name", ["llama3_bpe", "sentencepiece_bpe", "unigram", "byte_level_bpe"])
def test_groups_and_frozen_texts_without_special_tokens(name):
    an_lm = lm(name)
    bare = Text("the ref", an_lm, add_special_tokens=False)
    ids, und = tuple(string_ids(name, "the ref", is_continuation=False)), tuple(string_ids(name, "und", True))
    prefix, _ = PRIVATE[name].special_ids_around(())
    assert (bare.frozen() + "und").tokens == ids + und
    assert (Text("the ref", an_lm).frozen() + "und").tokens == prefix + ids + und
    assert ((bare | bare) + "und").tokens == ids + ids + und
    assert ((bare | Text("the ref")) + "und").tokens == prefix + ids + ids + und
    graph = bp.to_networkx([bare.frozen() + "und", Text("the ref", an_lm).frozen() + "und"])
    own = [data["token_ids"] for _, data in graph.nodes(data=True) if data["is_frozen"]]
    assert own == ([ids, prefix + ids] if prefix else [ids])


def test_a_frozen_segment_of_the_tokens_that_end_a_text_stays():
    an_lm = lm("unigram")
    _, suffix = PRIVATE["unigram"].special_ids_around(())
    assert suffix
    text = Text("a", an_lm) + Text.from_tokens(suffix, an_lm).frozen() + "b"
    assert len(text.tokens) == len((Text("a", an_lm) + Text.from_tokens([5], an_lm).frozen() + "b").tokens)


@pytest.mark.parametrize("name", BUILDERS)
def test_token_ids_within_groups_are_taken_as_they_are(name):
    an_lm = lm(name)
    for text in (
        Text.from_tokens([5, 6], an_lm) | Text.from_tokens([7], an_lm),
        Text("a", an_lm) + (Text.from_tokens([5, 6], an_lm) | Text.from_tokens([7], an_lm)),
    ):
        assert text.tokens[-3:] == (5, 6, 7)
    assert (Text.from_tokens([5, 6], an_lm) | Text.from_tokens([7], an_lm)).tokens == (5, 6, 7)


def test_joins_within_branches_are_reported_and_refused():
    group = Text("the sea", lm("byte_level_bpe")) + "t" | "x"
    assert [join.segment_idx for join in ("See " + group + "the sea" + "t").joins()] == [2, 5]
    assert [join.left for join in ("See " + group + "the sea" + "t").joins()] == ["the sea", "the sea"]
    with pytest.raises(bp.JoinError, match="segment 2"):
        (Text("See ", lm("byte_level_bpe", joins="error")) + (Text("the sea") + "t" | "x")).tokens  # noqa: B018
    assert (Text("the sea", lm("byte_level_bpe", joins="error")) + (Text("t") | "x")).tokens
