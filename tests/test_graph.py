"""The graph of texts against what an evaluation computes, and what a picture of it would say of each segment."""

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, DiskStore, Text, TextTypeError, evaluate, parallel, to_networkx
from tiny_models import build
from tiny_tokenizers import TOKENIZERS

VOCAB_SIZE = 1000
MODEL = build("gpt2", vocab_size=VOCAB_SIZE)
STRINGS = ("the ref", "und", " is", " due", "it is not tr", "ue th", "at", "\n\n", "Message", " ", "é東")


def new_lm(tokenizer: str = "byte_level_bpe", **options) -> LM:
    return LM(MODEL, TOKENIZERS[tokenizer](), **options)


def by_string(graph: nx.DiGraph) -> dict[str, dict]:
    return {data["string"]: data for _, data in graph.nodes(data=True) if data["kind"] != "junction"}


@st.composite
def forests(draw, lm: LM) -> list[Text]:
    """Texts that share beginnings, with groups of all kinds."""
    segments = st.sampled_from(STRINGS).map(lambda string: Text(string, lm))

    def longer(texts):
        branches = st.lists(texts, min_size=1, max_size=3)
        positions = st.sampled_from(["shared", "sequential"])
        return st.one_of(
            st.lists(texts, min_size=2, max_size=3).map(lambda parts: sum(parts, Text("", lm))),
            st.builds(lambda of, kind: parallel(of, positions=kind), branches, positions),
            texts.map(Text.frozen),
            st.lists(st.integers(3, 200), min_size=1, max_size=3).map(lambda ids: Text.from_tokens(ids, lm)),
        )

    texts = st.recursive(segments, longer, max_leaves=6)
    beginning = draw(texts)
    return [beginning + end for end in draw(st.lists(texts, min_size=1, max_size=4))]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=15)
@given(data=st.data())
def test_tokens_are_those_that_an_evaluation_computes(tokenizer: str, data: st.DataObject) -> None:
    lm = new_lm(tokenizer)
    texts = data.draw(forests(lm))
    before = to_networkx(texts)
    assert nx.is_directed_acyclic_graph(before)
    assert list(before) == list(range(len(before)))
    assert all(parent < node for parent, node in before.edges)
    assert lm.stats.tokens_computed == 0
    assert {data["status"] for data in by_string(before).values()} == {"not evaluated"}

    evaluate(texts)
    graph = to_networkx(texts)
    data_of = [data for _, data in graph.nodes(data=True)]
    assert sum(data["num_own_tokens"] for data in data_of) == lm.stats.tokens_computed
    assert sum(data["num_bytes"] or 0 for data in data_of) == lm.stats.bytes_held
    assert {status for data in data_of for status in data["statuses"]} == {"computed now"}
    assert all(sum(data["statuses"].values()) == data["num_own_tokens"] for data in data_of)
    assert graph.graph == {"num_texts": len(texts), "num_tokens": sum(len(text.tokens) for text in texts)}
    assert sorted(idx for data in data_of for idx in data["ends"]) == list(range(len(texts)))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=15)
@given(data=st.data())
def test_segments_bring_all_tokens_and_joins_are_those_of_the_text(tokenizer: str, data: st.DataObject) -> None:
    lm = new_lm(tokenizer)
    (text, *_) = data.draw(forests(lm))
    (extents,) = lm.session.encoder.extents([text])
    stops = [0, *(extent.stop for extent in extents)]
    assert stops[-1] == len(text.tokens)
    assert [extent.start for extent in extents] == stops[:-1]
    joins = {join.segment_idx for join in text.joins()}
    if joins:
        assert {idx for idx, extent in enumerate(extents) if extent.is_join_changed} >= joins


def test_nodes_are_segments_and_their_numbers_the_order_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    a --+-- b
        +-- cc --+-- d          cc and what follows has more tokens, so it is forwarded before b
                 +-- e
    """
    lm = new_lm(joins="split")
    a = Text("a", lm)
    texts = [a + "b", a + "cc ref" + "d", a + "cc ref" + "e"]
    graph = to_networkx(texts)
    evaluate(Text("x", lm))  # the probe forwards tokens of its own
    forwarded: list[int] = []
    compute = lm.session.evaluator.executor.compute

    def compute_and_note(pass_):
        forwarded.extend(pass_.token_ids)
        return compute(pass_)

    monkeypatch.setattr(lm.session.evaluator.executor, "compute", compute_and_note)
    evaluate(texts)
    strings = [data["string"] for _, data in graph.nodes(data=True)]
    assert [data["written_order"] for data in by_string(graph).values()] != [0, 1, 2, 3, 4]
    assert forwarded == [token_id for _, data in graph.nodes(data=True) for token_id in data["token_ids"]]
    assert set(strings) == {"a", "b", "cc ref", "d", "e"}
    edges = {(strings[parent], strings[node]) for parent, node in graph.edges}
    assert edges == {("a", "b"), ("a", "cc ref"), ("cc ref", "d"), ("cc ref", "e")}
    data = by_string(graph)["cc ref"]
    assert (data["position"], data["num_texts"], data["ends"]) == (len(a.tokens), 2, ())
    assert by_string(graph)["b"]["ends"] == (0,)


def test_a_segment_behind_the_same_segments_is_one_node_and_otherwise_another() -> None:
    lm = new_lm()
    graph = to_networkx([Text("x", lm) + "y" + "z", Text("x", lm) + "y" + "z", Text("xy", lm) + "z"])
    assert sorted(data["string"] for _, data in graph.nodes(data=True)) == ["x", "xy", "y", "z", "z"]
    assert sum(data["num_own_tokens"] for _, data in graph.nodes(data=True)) == len(Text("xyz", lm).tokens)


def test_branches_stand_between_what_the_group_stands_behind_and_a_junction() -> None:
    lm = new_lm()
    context, a, b, q = Text("context ", lm), Text("a", lm), Text("b", lm), "question"
    graph = to_networkx([context + (a | b | b) + q, context + (b | a | b) + q, context + a.frozen() + q])
    number = {(data["string"], data["is_frozen"]): node for node, data in graph.nodes(data=True) if data["string"] != q}
    junctions = [node for node, data in graph.nodes(data=True) if data["kind"] == "junction"]
    assert len(junctions) == 2  # the order of branches does not matter
    bag = next(node for node in junctions if len(graph.pred[node]) == 2 and number["b", False] in graph.pred[node])
    assert graph.edges[number["b", False], bag]["times"] == 2
    assert graph.edges[number["a", False], bag]["times"] == 1
    assert set(graph.pred[number["a", False]]) == {number["context ", False]} == {graph.nodes[bag]["behind"]}
    assert not graph.pred[number["a", True]]  # frozen: nothing stands before it
    (frozen_end,) = set(junctions) - {bag}
    assert set(graph.pred[frozen_end]) == {number["a", True], number["context ", False]}
    assert [data["ends"] for _, data in graph.nodes(data=True) if data["string"] == q].count((0, 1)) == 1


def test_sequential_branches_depend_on_those_before_them() -> None:
    lm = new_lm()
    one, other = (Text("c ", lm) + parallel(of, positions="sequential") + "q" for of in (["a", "b"], ["xy z", "b"]))
    graph = to_networkx([one, other])
    assert sorted(data["position"] for _, data in graph.nodes(data=True) if data["string"] == "b") == [
        len(Text("c ", lm).tokens) + len(lm.tokens(Text.from_tokens(Text(before, lm).tokens, lm)))
        for before in ("a", "xy z")
    ]


def test_a_reading_is_no_evaluation_and_a_second_evaluation_reuses() -> None:
    lm = new_lm()
    context = Text("Hello there.", lm)
    texts = [context + " Senator", context + " General"]
    evaluate(texts)
    _ = texts[0].logits, texts[1].token_logprobs
    assert {data["status"] for data in by_string(to_networkx(texts)).values()} == {"computed now"}
    evaluate(texts)
    assert {data["status"] for data in by_string(to_networkx(texts)).values()} == {"reused from memory"}
    third = context + " Admiral"
    evaluate([*texts, third])
    found = {string: data["status"] for string, data in by_string(to_networkx([*texts, third])).items()}
    assert found == {
        "Hello there.": "reused from memory",
        " Senator": "reused from memory",
        " General": "reused from memory",
        " Admiral": "computed now",
    }
    evaluate(third)
    assert by_string(to_networkx(third))[" Admiral"]["status"] == "reused from memory"


def test_a_reading_that_splits_a_span_changes_nothing_of_when_it_was_computed() -> None:
    lm = new_lm(joins="split")
    text = Text("the ref", lm) + " is due"
    evaluate(text)
    before = lm.stats.tokens_computed
    _ = Text("the ref", lm).logits
    assert lm.stats.tokens_computed == before
    assert {data["status"] for data in by_string(to_networkx(text)).values()} == {"computed now"}


def test_a_generation_is_one_evaluation() -> None:
    lm = new_lm()
    text = Text("Hello", lm)
    evaluate(text)
    draft = text.generate(max_new_tokens=4)
    found = by_string(to_networkx(draft))
    assert found["Hello"]["status"] == "reused from memory"
    assert found[draft.completion]["statuses"] == {"computed now": 3, "not evaluated": 1}  # the last was not needed


def test_evicted_and_loaded_from_disk(tmp_path) -> None:
    store = DiskStore(tmp_path / "prompts.bp")
    text = Text("the refund is due " * 4, new_lm(store=store))
    text.save()
    lm = new_lm(store=store)
    again = Text("the refund is due " * 4, lm) + "now"
    (before, new) = by_string(to_networkx(again)).values()
    assert before["status"] == "from disk"
    assert new["status"] == "not evaluated"
    again()
    (after, new) = by_string(to_networkx(again)).values()
    assert after["status"] == "from disk"  # the text came from there
    assert new["status"] == "computed now"
    evaluate(again)
    assert {data["status"] for data in by_string(to_networkx(again)).values()} == {"reused from memory"}
    small = new_lm(memory_bytes=1)
    dropped = Text("Hello there.", small)
    dropped()
    assert by_string(to_networkx(dropped))["Hello there."]["status"] == "evicted"


def test_a_join_that_changes_tokens_is_marked_at_the_segment_behind_it() -> None:
    lm = new_lm()
    text = Text("it is not tr", lm) + "ue th" + "at it is"
    assert [join.segment_idx for join in text.joins()] == [2]
    graph = to_networkx(text)
    assert [data["is_join_changed"] for _, data in graph.nodes(data=True)] == [False, False, True]
    assert nx.get_edge_attributes(graph, "is_join_changed") == {(0, 1): False, (1, 2): True}


def test_texts_without_a_model_and_of_several() -> None:
    one, other = new_lm(), new_lm()
    graph = to_networkx([Text("a") + "b", Text("a", one), Text("a", other)])
    assert sorted((data["string"], data["status"]) for _, data in graph.nodes(data=True)) == [
        ("a", "no model"),
        ("a", "not evaluated"),
        ("a", "not evaluated"),
        ("b", "no model"),
    ]
    assert graph.nodes[0]["position"] is None
    assert not to_networkx([])
    assert not to_networkx(Text(""))
    with pytest.raises(TextTypeError, match="takes a Text or several in a list, not NoneType: None"):
        to_networkx(None)
    with pytest.raises(TextTypeError, match=r"texts\[1\] is a str"):
        to_networkx([Text("a"), "b"])


def test_special_tokens_before_a_group_are_a_node() -> None:
    lm = new_lm("llama3_bpe")
    graph = to_networkx((Text("a", lm) | "b") + "c")
    assert [data["string"] for _, data in graph.nodes(data=True) if data["kind"] == "special tokens"] == [
        "<|begin_of_text|>"
    ]
    assert torch.isnan(((Text("a", lm) | "b") + "c").token_logprobs[0])
