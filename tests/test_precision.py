"""Storing in reduced precision: the error is as measured, is part of the keys, and only requests allow it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt import LM, Text, evaluate
from backprompt.store import DiskStore, MemoryStore
from backprompt.store.precision import decode, encode, parts_of
from comparing import assert_close
from reference import plain_logits
from tiny_models import FAMILIES

SHOTS = "Question: What is 12 + 34? Answer: 46. Question: What is 5 + 6? Answer: 11. "
DTYPES = ["float16", "int8"]


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama"]()


def draw_tensors(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((2, 5, 8), generator=generator) * torch.rand((2, 5, 1), generator=generator) * scale
    hidden = torch.randn((5, 16), generator=generator)
    logprobs = torch.full((5,), float("nan"))
    return {"keys.0": keys.to(dtype), "values.0": -2 * keys.to(dtype), "hidden": hidden.to(dtype), "logprobs": logprobs}


def relative(decoded, given):
    return float((decoded.double() - given.double()).norm() / given.double().norm())


# Tensors


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_int8_is_off_by_half_a_step_of_its_row_at_most(seed, scale):
    tensors = draw_tensors(seed, scale)
    encoded = encode(tensors, "int8")
    assert encoded.tensors["keys.0"].dtype == torch.int8
    for name in ("keys.0", "values.0"):
        decoded = decode(encoded.tensors, name, encoded.dtypes)
        steps = tensors[name].abs().amax(dim=-1, keepdim=True) / 127
        assert bool(((decoded - tensors[name]).abs() <= steps * 0.501).all())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_error_is_the_largest_of_the_tensors_relative_errors(stored, dtype):
    tensors = draw_tensors(1, dtype=dtype)
    encoded = encode(tensors, stored)
    decoded = {name: decode(encoded.tensors, name, encoded.dtypes) for name in tensors}
    assert all(decoded[name].dtype == tensors[name].dtype for name in tensors)
    names = ("keys.0", "values.0", "hidden")
    assert encoded.error == pytest.approx(max(relative(decoded[name], tensors[name]) for name in names), rel=1e-6)
    # 8 bits of bfloat16 are a part of the 11 of float16, within its range
    assert (encoded.error == 0) == (stored == "float16" and dtype in (torch.float16, torch.bfloat16))
    assert encoded.error < (0.01 if stored == "int8" else 0.001)
    assert torch.equal(decoded["logprobs"].isnan(), tensors["logprobs"].isnan())


@pytest.mark.parametrize("stored", DTYPES)
def test_rows_do_not_depend_on_where_an_entry_is_cut(stored):
    tensors = draw_tensors(2)
    whole = encode(tensors, stored).tensors
    part = encode({"keys.0": tensors["keys.0"][:, 2:4]}, stored).tensors
    assert part.keys() == whole.keys() & set(parts_of("keys.0"))
    for name, tensor in part.items():
        assert torch.equal(whole[name][:, 2:4], tensor)


def test_numbers_that_do_not_fit_stay_as_they_are():
    tensors = draw_tensors(3) | {"hidden": torch.full((5, 16), 1e6), "values.0": torch.zeros(2, 5, 8)}
    for stored in DTYPES:
        encoded = encode(tensors, stored)
        for name in ("hidden", "values.0"):
            assert torch.equal(decode(encoded.tensors, name, encoded.dtypes), tensors[name])
        assert encoded.tensors["hidden"].dtype == torch.float32


# LMs


@pytest.fixture(params=["memory", "disk"])
def make_store(request, tmp_path):
    """Makes stores of the same entries that differ in the dtype asked for, one after the other."""
    shared = MemoryStore()

    def make(dtype):
        if request.param == "disk":
            return DiskStore(tmp_path / "prompts.bp", dtype=dtype)
        shared.dtype = dtype
        return shared

    return make


@pytest.mark.parametrize("stored", DTYPES)
def test_what_comes_back_is_near_and_says_how_near(stored, model, tokenizer, make_store):
    store = make_store(stored)
    exact = evaluate(Text(SHOTS, LM(model, tokenizer, store=store)))
    assert exact.stored_error == 0
    (header,) = store.list()
    assert header.exactness == stored

    lm = LM(model, tokenizer, store=store)
    found = evaluate(Text(SHOTS, lm))
    assert lm.stats.tokens_computed == 0
    assert found.stored_error == header.error > 0
    pairs = [(found.hidden_states, exact.hidden_states)]
    for ours, theirs in zip(found.past_key_values().layers, exact.past_key_values().layers, strict=True):
        pairs += [(ours.keys, theirs.keys), (ours.values, theirs.values)]
    assert max(relative(*pair) for pair in pairs) == pytest.approx(header.error, rel=1e-3)
    assert not torch.equal(found.logits, exact.logits)
    torch.testing.assert_close(found.logits, exact.logits, rtol=0, atol=0.01)
    assert found.key != exact.key


@pytest.mark.parametrize("stored", DTYPES)
def test_what_is_computed_on_it_carries_it(stored, model, tokenizer, make_store):
    evaluate(Text(SHOTS, LM(model, tokenizer, store=make_store(stored))))
    lm = LM(model, tokenizer, store=make_store(stored))
    child = evaluate(Text(SHOTS, lm) + "Question: What is 1 + 1? Answer:")
    other = evaluate(Text("General Kenobi, who does not continue it", lm))
    assert lm.stats.tokens_loaded > 0
    assert child.stored_error > 0
    assert other.stored_error == 0
    torch.testing.assert_close(
        child.logits, plain_logits(model, tuple(child.input_ids.tolist()))[-1], rtol=0, atol=0.02
    )
    assert {header.exactness for header in make_store(stored).list()} == {stored}
    exact_lm = LM(model, tokenizer)
    exact = evaluate([Text.from_tokens(r.input_ids.tolist(), exact_lm) for r in (child, other)])
    assert exact[0].key != child.key
    assert exact[1].key == other.key
    headers = {header.position: header for header in make_store(stored).list()}
    own = [header for position, header in headers.items() if position > 0]
    assert own
    assert all(header.error >= child.stored_error for header in own)  # the error of the loaded parents


@pytest.mark.parametrize("stored", DTYPES)
def test_who_did_not_ask_for_fewer_bits_never_reads_them(stored, model, tokenizer, make_store):
    evaluate(Text(SHOTS, LM(model, tokenizer, store=make_store(stored))))
    for dtype in {None, *DTYPES} - {stored}:
        lm = LM(model, tokenizer, store=make_store(dtype))
        text = Text(SHOTS, lm)
        assert_close(text.logits, plain_logits(model, text.tokens)[-1])
        assert lm.stats.tokens_loaded == 0


def test_what_is_computed_again_is_exact_again(model, tokenizer, make_store):
    store = make_store("int8")
    evaluate(Text(SHOTS, LM(model, tokenizer, store=store)))
    store.persist = "never"
    lm = LM(model, tokenizer, store=store, memory_bytes=0)
    text = Text(SHOTS, lm)
    assert text.logits.isfinite().all()  # its row is held
    assert text().stored_error > 0
    for header in list(store.list()):
        store.delete(header.name)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    assert text().stored_error == 0


def test_parts_of_what_was_read_inexactly_are_inexact(model, tokenizer):
    """A text that leaves it in its middle: the span is cut, and both parts say so."""
    store = MemoryStore(dtype="int8")
    ids = tuple(range(5, 65))
    evaluate(Text.from_tokens(ids, LM(model, tokenizer, store=store)))
    lm = LM(model, tokenizer, store=store)
    assert evaluate(Text.from_tokens(ids, lm)).stored_error > 0
    assert evaluate(Text.from_tokens((*ids[:20], 3), lm)).stored_error > 0
    assert evaluate(Text.from_tokens(ids, lm)).stored_error > 0


def test_it_takes_less_space_and_the_store_knows_the_error(model, tokenizer, tmp_path):
    sizes = {}
    for stored in (None, *DTYPES):
        store = DiskStore(tmp_path / str(stored), dtype=stored)
        evaluate(Text(SHOTS, LM(model, tokenizer, store=store)))
        stats = store.stats()
        sizes[stored] = stats.num_bytes
        assert stats.largest_error == max(header.error for header in store.list())
        assert (stats.largest_error == 0) == (stored is None)
    assert sizes["int8"] < sizes["float16"] < sizes[None]


def test_unknown_dtypes_are_refused(tmp_path):
    for make in (lambda: MemoryStore(dtype="int4"), lambda: DiskStore(tmp_path / "store", dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"'float16', 'int8'"):
            make()
    assert not (tmp_path / "store").exists()
