"""LMs that share a store: each finds the other's spans, wherever a text is cut, and never another model's."""

import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, EntryTooLargeError, NoStoreError, Text, evaluate
from backprompt.store import DiskStore, Entry, MemoryStore
from comparing import assert_close, assert_equals_plain, beginnings
from reference import plain_greedy, plain_is_argmax, plain_token_logprobs
from stores import change_index
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

SHOTS = "Question: What is 12 + 34? Answer: 46. Question: What is 5 + 6? Answer: 11. "


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gpt_oss"])
def test_another_lm_computes_nothing(family, tokenizer, store):
    """And everything that a representation offers is the same, bit by bit."""
    model = FAMILIES[family]()
    first = evaluate(Text(SHOTS, LM(model, tokenizer, store=store)))
    expected = first.logits, first.token_logprobs, first.hidden_states
    lm = LM(model, tokenizer, store=store)
    found = evaluate(Text(SHOTS, lm))
    for actual, wanted in zip((found.logits, found.token_logprobs, found.hidden_states), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6, equal_nan=True)
    for actual, wanted in zip(found.past_key_values().layers, first.past_key_values().layers, strict=True):
        assert torch.equal(actual.keys, wanted.keys)
        assert torch.equal(actual.values, wanted.values)
    assert found.key == first.key
    assert (lm.stats.tokens_computed, lm.stats.forward_passes) == (0, 0)
    assert lm.stats.tokens_loaded == found.num_tokens


def test_one_stored_parent_serves_new_children(model, tokenizer, store):
    evaluate(Text(SHOTS, LM(model, tokenizer, store=store)))
    lm = LM(model, tokenizer, store=store)
    context = Text(SHOTS, lm)
    texts = [context + f"Question: What is {n} + {n}? Answer:" for n in range(5)]
    for text in texts:
        assert_equals_plain(model, [text])
    num_context = len(context.tokens)
    new = beginnings(text.tokens for text in texts)
    old = {context.tokens[:end] for end in range(1, num_context + 1)}
    assert lm.stats.tokens_computed == len(new - old)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_texts_in_any_order_by_any_lm(data, model, tokenizer):
    """Several LMs, one store, small budgets: the plain numbers, and no token computed twice that is in the store."""
    store = MemoryStore()
    ids = st.lists(st.integers(0, 2), min_size=1, max_size=60).map(tuple)
    stem = tuple(range(10, 50))
    pool = data.draw(st.lists(st.tuples(st.integers(0, 40), ids), min_size=1, max_size=6))
    num_tokens = data.draw(st.sampled_from([0, 30, 10_000]))
    for _ in range(3):
        lm = LM(model, tokenizer, store=store, memory_bytes=num_tokens * 646, max_tokens_per_forward=16)
        chosen = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4))
        texts = [Text.from_tokens(stem[:cut] + tail, lm) for cut, tail in chosen]
        for text, logprobs in zip(texts, lm.token_logprobs(texts), strict=True):
            expected = plain_token_logprobs(model, text.tokens)
            assert_close(logprobs, expected)
        for text in texts:
            assert_equals_plain(model, [text])


def test_a_text_that_is_cut_elsewhere_is_found(model, tokenizer, store):
    """Stored as one long entry; asked for as a beginning of it, and as one that leaves it in its middle."""
    ids = tuple(range(5, 65))
    evaluate(Text.from_tokens(ids, LM(model, tokenizer, store=store)))
    for wanted, num_new in [(ids[:20], 0), ((*ids[:33], 3, 3), 2), (ids, 0), ((*ids, 7), 1), ((9, *ids), 61)]:
        lm = LM(model, tokenizer, store=store)
        text = Text.from_tokens(wanted, lm)
        assert_equals_plain(model, [text])
        assert lm.stats.tokens_computed == num_new


def test_keys_and_values_of_a_beginning_that_memory_dropped_come_from_the_store(model, tokenizer, store):
    lm = LM(model, tokenizer, store=store, memory_bytes=0)
    context = Text(SHOTS, lm)
    evaluate(context)
    text = context + "Question: 1?"
    before = lm.stats
    (logprobs,) = lm.token_logprobs([text])
    done = lm.stats - before
    expected = plain_token_logprobs(model, text.tokens)
    assert_close(logprobs, expected)
    num_common = len(context.tokens) - (text.tokens[: len(context.tokens)] != context.tokens)
    assert done.tokens_computed == len(text.tokens) - 1 - num_common  # the last one is not forwarded
    assert done.tokens_loaded == num_common


@pytest.mark.parametrize("num_computed", [0, 20])
def test_what_is_scored_when_it_is_saved_is_not_scored_again(model, tokenizer, tmp_path, num_computed):
    """Log-probabilities and argmax flags come with the entry, also where it is cut."""
    prompt = tuple(range(5, 25))
    ids = (*prompt, *plain_greedy(model, prompt, 6), 3, 3)
    with DiskStore(tmp_path / "prompts.bp", persist="explicit") as store:
        first = LM(model, tokenizer, store=store)
        text = Text.from_tokens(ids, first)
        evaluate(text)  # all of it: scoring alone does not forward the last token
        (expected,) = first.token_scores([text])
        text.save()
        lm = LM(model, tokenizer, store=store)
        if num_computed:
            evaluate(Text.from_tokens((*ids[:num_computed], 300), lm))  # so that the entry is read in two parts
        evaluate(Text.from_tokens(ids, lm))
        (found,) = lm.token_scores([Text.from_tokens(ids, lm)])
    assert torch.equal(found.is_argmax, plain_is_argmax(model, ids))
    assert found.is_argmax[20:].tolist() == [True] * 6 + [False] * 2
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=0, equal_nan=True)
    assert lm.stats.logit_rows == 0


def test_entries_of_before_argmax_was_kept_are_scored_anew(model, tokenizer):
    prompt = tuple(range(5, 25))
    ids = (*prompt, *plain_greedy(model, prompt, 6), 3, 3)
    scored, old = MemoryStore(persist="explicit"), MemoryStore()
    lm = LM(model, tokenizer, store=scored)
    text = Text.from_tokens(ids, lm)
    text.token_logprobs  # noqa: B018
    text.save()
    for header in scored.list():
        tensors = scored.get(header.name).tensors
        old.put(Entry(header, {name: tensor for name, tensor in tensors.items() if name != "is_argmax"}))
        assert len(old.get(header.name).tensors) == len(tensors) - 1
    lm = LM(model, tokenizer, store=old)
    (found,) = lm.token_scores([Text.from_tokens(ids, lm)])
    assert torch.equal(found.is_argmax, plain_is_argmax(model, ids))
    assert_close(found.logprobs, plain_token_logprobs(model, ids))
    assert (lm.stats.tokens_computed, lm.stats.logit_rows) == (0, len(ids) - 1)


def test_other_weights_find_nothing(tokenizer, store):
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer, store=store)
    evaluate(Text(SHOTS, lm))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 0.5
    text = Text(SHOTS, lm)
    assert_equals_plain(model, [text])
    assert lm.stats.tokens_loaded == 0
    other_tokenizer = byte_level_bpe()
    other_tokenizer.add_tokens(["<a token more>"])
    other = LM(model, other_tokenizer, store=store)
    assert_equals_plain(model, [Text(SHOTS, other)])
    assert other.stats.tokens_loaded == 0


def test_what_is_worth_it_is_stored(model, tokenizer):
    """Short leaves are not stored, but their parent is."""
    store = MemoryStore()
    lm = LM(model, tokenizer, store=store)
    evaluate([Text(SHOTS, lm) + str(number) for number in range(10, 30)])
    assert len(list(store.list())) == 1
    assert SHOTS.startswith(next(store.list()).text)
    assert next(store.list("Question: What")).model == lm.session.fingerprint.root().model


@pytest.mark.parametrize("persist", ["explicit", "never"])
def test_what_is_not_asked_for_is_not_stored(persist, model, tokenizer):
    store = MemoryStore(persist=persist)
    lm = LM(model, tokenizer, store=store)
    evaluate(Text(SHOTS, lm))
    assert list(store.list()) == []
    if persist == "never":
        with pytest.raises(NoStoreError, match='persist="never"'):
            Text(SHOTS, lm).save()
        return
    short = Text("The cat", lm)
    short.save()
    short.save()
    assert [header.text for header in store.list()] == ["The cat"]
    assert [header.token_ids for header in store.list()] == [short.tokens]
    again = LM(model, tokenizer, store=store)
    assert_equals_plain(model, [Text("The cat", again)])
    assert again.stats.tokens_computed == 0


def test_saving_without_a_store_says_how_to_get_one(model, tokenizer):
    with pytest.raises(NoStoreError, match=r"store=.prompts\.bp"):
        Text("The cat", LM(model, tokenizer)).save()
    with pytest.raises(ValueError, match="persist must be one of"):
        MemoryStore(persist="sometimes")


def test_a_path_makes_a_store_that_outlives_the_lm(model, tokenizer, tmp_path):
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    evaluate(Text(SHOTS, lm))
    del lm
    lm = LM(model, tokenizer, store=str(tmp_path / "prompts.bp"))
    assert_equals_plain(model, [Text(SHOTS, lm)])
    assert lm.stats.tokens_computed == 0


def test_a_full_disk_stops_nothing_and_is_said_once(model, tokenizer, tmp_path, monkeypatch, caplog):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backprompt.store.folder.os.fsync", full)
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    for number in range(3):
        assert_equals_plain(model, [Text(SHOTS + f"And {number} is a number as good as any other.", lm)])
    evaluate([Text(f"{number} and a number as good as any other.", lm) for number in range(10, 15)])
    assert caplog.text.count("cannot be written to") == 1
    assert list((tmp_path / "prompts.bp").glob("entries/*/*")) == []


def test_what_a_full_disk_does_not_take_is_not_lost(model, tokenizer, tmp_path, monkeypatch, caplog):
    """Results are returned and stay in memory; who asked for them to be stored gets an error, and may ask again."""
    lm = LM(model, tokenizer, store=DiskStore(tmp_path / "prompts.bp", persist="explicit"))
    text = Text(SHOTS, lm)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.folder.os.fsync", full)
        with pytest.raises(OSError, match="Free some space") as caught:
            text.save()
    assert caught.value.errno == 28
    assert str(tmp_path / "prompts.bp") in str(caught.value)
    assert_equals_plain(model, [text])
    num_computed = lm.stats.tokens_computed
    assert num_computed == len(text.tokens)
    text.save()
    assert lm.stats.tokens_computed == num_computed
    again = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    assert_equals_plain(model, [Text(SHOTS, again)])
    assert again.stats.tokens_computed == 0


@pytest.mark.parametrize("where", ["folder.os.fsync", "folder.tempfile.mkstemp", "index.Index.insert"])
def test_a_generation_on_a_full_disk_ends_and_is_kept(where, model, tokenizer, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    prompt = tuple(range(5, 25))
    monkeypatch.setattr(f"backprompt.store.{where}", full)
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    text = Text.from_tokens(prompt, lm)
    generated = text.generate(max_new_tokens=6)
    assert generated.tokens == (*prompt, *plain_greedy(model, prompt, 6))
    assert caplog.text.count("Evaluation goes on; nothing more is stored in this process") == 1
    num_computed = lm.stats.tokens_computed
    evaluate(text)
    assert lm.stats.tokens_computed == num_computed


def test_an_index_that_is_wrong_gives_no_wrong_numbers(model, tokenizer, tmp_path, caplog):
    """Token ids in the index are those of another text: the entry itself says so."""
    ids = tuple(range(5, 45))
    other = (*ids[:-1], 99)
    with DiskStore(tmp_path / "prompts.bp") as store:
        evaluate(Text.from_tokens(ids, LM(model, tokenizer, store=store)))
        change_index(store, "UPDATE entries SET token_ids = ?", struct.pack(f">{len(other)}Q", *other))
        lm = LM(model, tokenizer, store=store)
        assert_equals_plain(model, [Text.from_tokens(other, lm)])
        assert lm.stats.tokens_loaded == 0
    assert "names a wrong entry" in caplog.text


def test_what_is_loaded_stays_within_the_budget(model, tokenizer):
    """Many stored texts, room for few: loaded some at a time, and never computed."""
    store = MemoryStore()
    texts = [SHOTS + f"And number {number} is a number as good as any other." for number in range(12)]
    lm = LM(model, tokenizer, store=store)
    evaluate([Text(string, lm) for string in texts])
    token_bytes = lm.session.evaluator.executor.token_bytes
    lm = LM(model, tokenizer, store=store, memory_bytes=20 * token_bytes, max_tokens_per_forward=16)
    memory, peaks = lm.session.evaluator.memory, []
    add = memory.add
    memory.add = lambda blocks: (add(blocks), peaks.append(memory.num_bytes))
    asked = [Text(string, lm) for string in texts]
    longest = max(len(text.tokens) for text in asked)
    for text, logprobs in zip(asked, lm.token_logprobs(asked), strict=True):
        expected = plain_token_logprobs(model, text.tokens)
        assert_close(logprobs, expected)
    assert lm.stats.tokens_computed == 0
    assert max(peaks) <= (20 + 16 + longest) * token_bytes
    assert lm.stats.bytes_held <= 20 * token_bytes


def test_many_stored_texts_are_continued_with_room_for_few(model, tokenizer):
    """None of them is computed again, though the keys and values of all of them do not fit."""
    store = MemoryStore()
    strings = [SHOTS + f"And number {number} is a number as good as any other." for number in range(12)]
    lm = LM(model, tokenizer, store=store)
    evaluate([Text(string, lm) for string in strings])
    token_bytes = lm.session.evaluator.executor.token_bytes
    lm = LM(model, tokenizer, store=store, memory_bytes=100 * token_bytes, max_tokens_per_forward=16)
    texts = [Text(string, lm) + " So it is." for string in strings]
    evaluate(texts)
    for text in texts:
        assert_equals_plain(model, [text])
    stored = beginnings(Text(string, lm).tokens for string in strings)
    wanted = beginnings(text.tokens for text in texts)
    assert lm.stats.tokens_computed - lm.stats.tokens_recomputed == len(wanted - stored)


def test_what_somebody_deleted_is_computed_and_stored_again(model, tokenizer):
    """Also by the LM that had stored it."""
    store = MemoryStore()
    lm = LM(model, tokenizer, store=store, memory_bytes=0)
    evaluate(Text(SHOTS, lm))
    (header,) = store.list()
    store.delete(header.name)
    evaluate(Text(SHOTS, lm))
    assert [again.name for again in store.list()] == [header.name]


def test_saving_again_what_somebody_deleted(model, tokenizer):
    store = MemoryStore(persist="explicit")
    text = Text(SHOTS, LM(model, tokenizer, store=store))
    text.save()
    (header,) = store.list()
    store.delete(header.name)
    text.save()
    assert [again.name for again in store.list()] == [header.name]


def test_a_store_that_cannot_be_read_stops_nothing(model, tokenizer, tmp_path, caplog):
    store = DiskStore(tmp_path / "prompts.bp")
    lm = LM(model, tokenizer, store=store)
    evaluate(Text(SHOTS, lm))
    store.close()
    lm = LM(model, tokenizer, store=store)
    for number in range(3):
        assert_equals_plain(model, [Text(f"{SHOTS}{number}", lm)])
    assert caplog.text.count("cannot be read") == 1
    with pytest.raises(TypeError, match="a path or a"):
        LM(model, tokenizer, store=5)


def test_a_damaged_entry_is_computed_again_and_stored_again(model, tokenizer, tmp_path, caplog):
    evaluate(Text(SHOTS, LM(model, tokenizer, store=tmp_path / "prompts.bp")))
    (file,) = (tmp_path / "prompts.bp").glob("entries/*/*")
    content = bytearray(file.read_bytes())
    for offset in range(len(content) // 2, len(content), 50):
        content[offset] ^= 1
    file.write_bytes(content)
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    assert_equals_plain(model, [Text(SHOTS, lm)])
    assert lm.stats.tokens_loaded == 0
    assert "is damaged" in caplog.text
    again = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    assert_equals_plain(model, [Text(SHOTS, again)])
    assert again.stats.tokens_computed == 0


# Entries that others delete


def num_loaded(model, tokenizer, store, ids):
    lm = LM(model, tokenizer, store=store)
    evaluate(Text.from_tokens(ids, lm))
    return lm.stats.tokens_loaded


def test_a_budget_on_disk_keeps_what_others_begin_in_the_middle_of(model, tokenizer, tmp_path):
    """Prompt and first question are one entry; the others begin in its middle, and are of no use without it."""
    prompt = tuple(range(10, 50))
    questions = [tuple(range(50 + n, 50 + n + 20)) for n in range(8)]
    with DiskStore(tmp_path / "prompts.bp") as store:
        for question in questions:
            evaluate(Text.from_tokens(prompt + question, LM(model, tokenizer, store=store)))
        total = store.stats().num_bytes
        store.prune(total // 2)
        left = store.stats()
        assert 0 < left.num_entries < 8
        loaded = [num_loaded(model, tokenizer, DiskStore(store.path, persist="never"), prompt + q) for q in questions]
        assert min(loaded) >= len(prompt)
        assert sum(loaded) == 8 * len(prompt) + left.num_tokens - len(prompt)


def test_nothing_is_stored_behind_what_others_deleted(model, tokenizer, tmp_path):
    prompt = tuple(range(10, 50))
    with DiskStore(tmp_path / "prompts.bp") as store:
        lm = LM(model, tokenizer, store=store)
        evaluate(Text.from_tokens(prompt, lm))
        store.prune(0)
        children = [prompt + tuple(range(50 + n, 70 + n)) for n in range(3)]
        for ids in children:
            evaluate(Text.from_tokens(ids, lm))
        for ids in children:
            assert num_loaded(model, tokenizer, store, ids) == len(ids)
        for file in store.path.glob("entries/*/*"):
            file.unlink()  # behind the back of the index
        text = Text.from_tokens(children[0], lm)
        text.save()
        assert num_loaded(model, tokenizer, store, children[0]) == len(children[0])


def test_what_does_not_fit_is_said_once_and_nothing_goes_behind_it(model, tokenizer, tmp_path, caplog):
    with DiskStore(tmp_path / "prompts.bp", max_bytes=30_000) as store:
        lm = LM(model, tokenizer, store=store)
        long = tuple(range(5, 105))
        evaluate(Text.from_tokens(long, lm))
        for number in range(3):
            evaluate(Text.from_tokens((*long, *range(number, number + 17)), lm))
        assert caplog.text.count("bytes does not fit") == 1
        assert store.stats().num_entries == 0
        evaluate(Text.from_tokens(tuple(range(200, 220)), lm))
        assert store.stats().num_entries == 1
        with pytest.raises(EntryTooLargeError):
            Text.from_tokens(long, lm).save()
