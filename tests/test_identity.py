"""A key names a token by all that its representation depends on, and by nothing else, in every process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt.forest import keys as identity
from backprompt.forest.keys import extend_key, root_key

PARTS = {"model": "weights-1", "dtype": "float32", "tokenizer": "tokenizer-1", "exactness": "exact"}
ROOT = root_key(**PARTS)

token_ids = st.lists(st.integers(0, 2**40), max_size=8)

# Worked out with hashlib alone. Stored representations are found by their keys: a change of the contents of
# a key must raise FORMAT_VERSION, and change this constant.
RECORDED_KEY = "1a39a62e47c301b55deb41829d0374d75aa4a163c05caf39d98706bd36b33112"


def keys_of(ids: Sequence[int], root: bytes = ROOT, position: int = 0) -> list[bytes]:
    """The key of each token, one after the other."""
    keys = [root]
    for idx, token_id in enumerate(ids, position):
        keys.append(extend_key(keys[-1], idx, [token_id]))
    return keys[1:]


@given(token_ids, st.lists(st.integers(0, 8)), st.integers(0, 1000))
def test_a_key_does_not_depend_on_how_the_ids_are_cut(ids: list[int], cuts: list[int], position: int) -> None:
    """As one span, token by token, and cut anywhere, into empty spans too."""
    whole = extend_key(ROOT, position, tuple(ids))
    assert whole == [ROOT, *keys_of(ids, position=position)][-1]
    key, bounds = ROOT, sorted({0, len(ids), *(cut for cut in cuts if cut <= len(ids))})
    for start, stop in pairwise(bounds):
        key = extend_key(key, position + start, iter(ids[start:stop]))
    assert key == whole
    assert extend_key(key, position + len(ids), ()) == whole


@given(st.lists(token_ids, max_size=6))
def test_two_tokens_have_one_key_if_the_same_ids_lead_to_them(texts: list[list[int]]) -> None:
    named = {tuple(ids[: stop + 1]): key for ids in texts for stop, key in enumerate(keys_of(ids))}
    assert len({ROOT, *named.values()}) == 1 + len(named)
    assert {len(key) for key in named.values()} <= {32}


@given(token_ids, st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_key_depends_on_every_token_before_it(ids: list[int], token_id: int, other_id: int) -> None:
    first, second = keys_of([token_id, *ids]), keys_of([other_id, *ids])
    assert [a == b for a, b in zip(first, second, strict=True)] == [token_id == other_id] * len(first)


@given(token_ids.filter(bool), st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_key_depends_on_the_position(ids: list[int], position: int, other_position: int) -> None:
    keys, others = keys_of(ids, position=position), keys_of(ids, position=other_position)
    assert [a == b for a, b in zip(keys, others, strict=True)] == [position == other_position] * len(ids)


@pytest.mark.parametrize("name", PARTS)
@given(st.text(), st.text())
def test_a_key_depends_on_every_part_of_the_root(name: str, part: str, other_part: str) -> None:
    root, other_root = root_key(**{**PARTS, name: part}), root_key(**{**PARTS, name: other_part})
    assert (root == other_root) == (part == other_part)
    assert (keys_of([7], root) == keys_of([7], other_root)) == (part == other_part)


def test_a_key_depends_on_the_format_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "FORMAT_VERSION", 2)
    assert root_key(**PARTS) != ROOT


def test_parts_are_exact_unless_said_otherwise() -> None:
    assert root_key(model="weights-1", dtype="float32", tokenizer="tokenizer-1") == ROOT
    assert root_key(model="weights-1", dtype="float32", tokenizer="tokenizer-1", exactness="float16") != ROOT


@given(st.lists(st.text(), min_size=4, max_size=4), st.lists(st.text(), min_size=4, max_size=4))
def test_parts_do_not_run_into_one_another(parts: list[str], others: list[str]) -> None:
    first, second = (root_key(**dict(zip(PARTS, values, strict=True))) for values in (parts, others))
    assert (first == second) == (parts == others)


@pytest.mark.parametrize(
    ("parts", "others"),
    [
        (("ab", "c"), ("a", "bc")),
        (("ab", ""), ("", "ab")),
        (("a\0", "b"), ("a", "\0b")),
        (("é", ""), ("", "é")),
        (("1a", "b"), ("1", "ab")),
    ],
)
def test_the_same_letters_in_other_parts_are_another_root(parts: tuple[str, str], others: tuple[str, str]) -> None:
    """The negative control: all the letters, one after the other, are the same."""
    roots = {root_key(model=model, dtype=dtype, tokenizer="t", exactness="exact") for model, dtype in (parts, others)}
    assert "".join(parts) == "".join(others)
    assert len(roots) == 2


def test_digits_of_a_position_and_a_token_do_not_run_into_one_another() -> None:
    keys = {extend_key(ROOT, position, [token_id]) for position, token_id in ((1, 11), (11, 1), (111, 0), (0, 111))}
    assert len(keys) == 4


@pytest.mark.parametrize("hash_seed", ["0", "1", "12345"])
def test_a_key_is_the_same_in_every_process(hash_seed: str) -> None:
    code = (
        "import runpy\n"
        f"identity = runpy.run_path({identity.__file__!r})\n"  # without importing torch
        f"root = identity['root_key'](**{PARTS!r})\n"
        "print(identity['extend_key'](root, 5, [0, 1, 50256]).hex())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == RECORDED_KEY
    assert extend_key(ROOT, 5, [0, 1, 50256]).hex() == RECORDED_KEY
