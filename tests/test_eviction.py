"""The order of eviction against a plain ranking of all that is held, and the work that an eviction takes."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, Text, evaluate, generate
from backprompt.forest.forest import Forest
from backprompt.forest.passes import cut_into_passes, last_uses, missing_spans, on_the_way
from backprompt.forest.span import IS_FREE, Span
from backprompt.memory import leaves
from backprompt.memory.eviction import GreedyDual, Memory
from backprompt.memory.host import HostMemory
from backprompt.memory.leaves import Spared
from backprompt.memory.location import Location
from backprompt.model.surroundings import plain_surroundings
from backprompt.tokens.graph import TokenBranch, TokenGraph, TokenGroup
from ranking import compare_with_plain, plain_leaves
from tiny_blocks import STATES_BYTES, TOKEN_BYTES, compute

CPU = Location(torch.device("cpu"))

runs = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)


def with_group(before, first, second, behind):
    return TokenGraph((before, TokenGroup((TokenBranch((first,)), TokenBranch((second,)))), behind))


graphs = st.builds(with_group, runs, st.lists(st.just(4), min_size=1, max_size=2).map(tuple), st.just((5,)), runs)


class World:
    """A forest with both pools, in which texts are computed, used and evicted."""

    def __init__(self, num_tokens, num_host_tokens):
        self.forest = Forest()
        order = GreedyDual(hidden_size=1)  # so positions count
        order.times_smaller = TOKEN_BYTES / STATES_BYTES
        host = HostMemory(num_host_tokens * TOKEN_BYTES, order.rank, CPU, CPU)
        self.memory = Memory(num_tokens * TOKEN_BYTES, order, host)

    def evaluate(self, texts, max_tokens, draw_held):
        """Compute texts pass by pass, as an evaluation does, but for rows that are fetched."""
        ends = [self.forest.insert(text) for text in texts]
        self.memory.touch(ends)
        while missing := missing_spans(ends):
            passes = cut_into_passes(self.forest, missing, max_tokens)
            uses = last_uses(passes)
            for pass_idx, spans in enumerate(passes):
                needed = on_the_way(parent for span in spans for parent in span.parents)
                self.memory.evict(self.forest, draw_held(ends), Spared((needed,), uses, pass_idx))
                if any(not parent.is_held(with_keys_values=True) for parent in needed if parent not in spans):
                    break  # dropped before
                self.memory.add(compute(spans))
                self.memory.note(spans)
                ends = [end for end in ends if end not in spans]
            self.memory.end_plan()
        self.memory.evict(self.forest, draw_held(ends))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_order_is_that_of_a_plain_ranking(data):
    world = World(data.draw(st.integers(0, 12)), data.draw(st.sampled_from([0, 0, 4, 10])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, "MIN_NOTED", data.draw(st.sampled_from([2, 1000])))
        compare_with_plain(patch, lambda _: world.forest)
        for _ in range(data.draw(st.integers(1, 6))):
            texts = data.draw(st.lists(st.one_of(runs, graphs), min_size=1, max_size=5))
            max_tokens = data.draw(st.sampled_from([3, 100]))
            may_be_held = data.draw(st.booleans())
            world.evaluate(
                texts,
                max_tokens,
                lambda ends, may=may_be_held: data.draw(st.sets(st.sampled_from(ends))) if may and ends else set(),
            )
            if not may_be_held:
                assert world.memory.num_bytes <= world.memory.max_bytes
            assert world.memory.host.num_bytes <= world.memory.host.max_bytes


def test_growing_texts_go_in_that_order_too(model, tokenizer, monkeypatch):
    """Spans that are absorbed, and texts that are given up, between evaluations over the budget."""
    lm = LM(model, tokenizer, memory_bytes=30_000, max_tokens_per_forward=16)
    taken = compare_with_plain(monkeypatch, lambda _: lm.session.evaluator.forest)
    streams = [Text(f"The cat {number}", lm).stream(max_new_tokens=30) for number in range(3)]
    for number in range(25):
        evaluate([Text(f"{number} more cats sat on the mat {other}", lm) for other in range(3)])
        for stream in streams:
            stream.run.step()
        if number == 12:
            streams.pop().close()
        generate(Text(f"The cat {number % 3} sat", lm), max_new_tokens=4, num_beams=3)
    for stream in streams:
        stream.close()
    evaluate([Text(f"{number} dogs", lm) for number in range(30)])
    assert len(taken) > 200


def test_what_a_dropped_text_continued_can_go(model, tokenizer, monkeypatch):
    """While the text was held, evictions have passed over the span before it."""
    lm = LM(model, tokenizer, memory_bytes=20_000, max_tokens_per_forward=16)
    cats, dogs, birds = (
        [Text(f"{number} more {them} here", lm) for number in range(20)] for them in ("cats", "dogs", "birds")
    )
    evaluate(cats)
    evaluator, prompt = lm.session.evaluator, Text("The cat", lm)
    with plain_surroundings(evaluator.executor.device):
        (before,) = evaluator.evaluate([prompt.tokens])
        ends = evaluator.continuations.grow([(before, (5,)), (before, (6,))], list)
    with evaluator.holders.using(ends):
        evaluate(dogs)
    assert before.is_held(with_keys_values=True)
    evaluator.continuations.settle([], ends, {})
    compare_with_plain(monkeypatch, lambda _: evaluator.forest)
    evaluate(birds)
    evaluate(cats)
    assert not before.is_held(with_keys_values=True)


# Counted


class Looks:
    """Counts looks at the rows that spans hold."""

    def __init__(self, patch):
        self.num = 0
        is_held, is_empty = Span.is_held, Span.is_empty.fget

        def counted(is_free):
            def look(span):
                self.num += 1
                return is_free(span)

            return look

        def counted_is_empty(span):
            self.num += 1
            return is_empty(span)

        def counted_is_held(span, **options):
            self.num += 1
            return is_held(span, **options)

        for of_pool in IS_FREE.values():
            for kind, is_free in of_pool.items():
                patch.setitem(of_pool, kind, counted(is_free))
        patch.setattr(Span, "is_held", counted_is_held)
        patch.setattr(Span, "is_empty", property(counted_is_empty))


def looks_a_text(num_texts, num_held, pass_size=20):
    """How often a span is looked at, a text, for texts of two tokens that share their first, of which some are held."""
    world = World(num_held, 0)
    texts = [(idx // 10, 10_000 + idx) for idx in range(num_texts)]
    with pytest.MonkeyPatch.context() as patch:
        world.evaluate(texts[: 2 * num_held], pass_size, lambda ends: set())
        looks = Looks(patch)
        world.evaluate(texts[2 * num_held :], pass_size, lambda ends: set())
    return looks.num / (num_texts - 2 * num_held)


def test_an_eviction_looks_at_the_spans_that_go_and_at_no_others():
    few = looks_a_text(1000, 100)
    assert 4 < few < 20
    assert looks_a_text(10_000, 100) < 1.1 * few  # ten times the texts
    assert looks_a_text(10_000, 1000) < 1.1 * few  # and ten times as many are held


@pytest.mark.parametrize("is_scored", [False, True])
def test_a_call_over_the_budget_looks_at_each_text_equally_often(is_scored, model, tokenizer, monkeypatch):
    def looks_a_text(num_texts):
        lm = LM(model, tokenizer, memory_bytes=30_000, max_tokens_per_forward=64)
        texts = [Text.from_tokens([idx % 300, idx // 300, 7], lm) for idx in range(num_texts)]
        evaluate(texts[0])
        with monkeypatch.context() as patch:
            looks = Looks(patch)
            (lm.token_logprobs if is_scored else evaluate)(texts)
        return looks.num / num_texts

    assert looks_a_text(2000) < 1.1 * looks_a_text(400)


def num_leaves_queued():
    gc.collect()
    return sum(
        type(found) is tuple and len(found) == 2 and isinstance(found[0], str) and isinstance(found[1], Span)
        for found in gc.get_objects()
    )


def num_alive(of_type):
    gc.collect()
    return sum(type(found) is of_type for found in gc.get_objects())


def test_texts_used_again_and_again_leave_nothing_behind():
    world = World(100, 0)
    world.evaluate([(idx,) for idx in range(150)], 50, lambda ends: set())
    for idx in range(3000):
        world.evaluate([(149,), (1000 + idx,)], 50, lambda ends: set())
    assert num_leaves_queued() < 1500
    assert len(plain_leaves(world.forest, "device")) > 90


def test_texts_that_come_and_go_without_an_eviction_leave_nothing_behind():
    world = World(100, 0)
    world.evaluate([(idx,) for idx in range(150)], 50, lambda ends: set())
    num_before = num_alive(Span)
    for idx in range(3000):
        end = world.forest.insert((1000 + idx,), is_end=False)
        world.memory.touch([end])
        world.forest.discard(end, held=())
    assert num_alive(Span) < num_before + 1500
