"""Stores: one contract for all, and what a folder must survive: crashes, flipped bytes, full disks, many writers."""

import dataclasses
import errno
import gc
import json
import os
import random
import re
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import time
from functools import partial
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backprompt import LM, forking, load
from backprompt.errors import (
    DamagedEntryError,
    EntryTooLargeError,
    StoreVersionError,
    TextTypeError,
    TokenIdError,
    TokenizerError,
)
from backprompt.store import DiskStore, Entry, Match, ObjectStore
from backprompt.store.file import to_pieces
from quick import up_to
from stores import assert_same, change_index, file_of, make_entry
from threads import in_threads, within

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]


WRONG_ARGUMENTS = {
    "list of nothing": lambda store: store.list(None),
    "list of half a pair": lambda store: store.list("\ud800"),
    "list of a number": lambda store: store.list(3),
    "a start of half a pair": lambda store: store.longest("\ud800", [1]),
    "a start that is a number": lambda store: store.longest(3, [1]),
    "a negative id": lambda store: store.longest("root", [1, -1]),
    "a large id": lambda store: store.longest("root", [1 << 63]),
    "an id that is a float": lambda store: store.longest("root", [1.0]),
    "ids that are a string": lambda store: store.longest("root", "12"),
    "ids that are nothing": lambda store: store.longest("root", None),
    "going on at a number": lambda store: store.goes_on(3, [1]),
    "going on behind a negative id": lambda store: store.goes_on("root", [-1]),
    "get of a number": lambda store: store.get(3),
    "deleting nothing": lambda store: store.delete(None),
    "contains of bytes": lambda store: store.contains(b"x"),
}


class TestContract:
    """The promises of every implementation."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_what_is_put_is_got(self, store, dtype):
        entry = make_entry(1, dtype=dtype)
        assert store.get(entry.header.name) is None
        assert not store.contains(entry.header.name)
        store.put(entry)
        assert store.contains(entry.header.name)
        assert_same(store.get(entry.header.name), entry)

    def test_only_the_tensors_asked_for(self, store):
        entry = make_entry(1)
        store.put(entry)
        assert_same(store.get(entry.header.name, {"hidden", "not there"}), entry, {"hidden"})
        assert store.get(entry.header.name, ()).tensors == {}

    def test_the_beginning_of_an_entry(self, store):
        entry = make_entry(1, num_tokens=40)
        store.put(entry)
        found = store.get_beginning(entry.header.name, 5, {"hidden", "logprobs"})
        assert found.header == entry.header
        assert found.tensors.keys() == {"hidden", "logprobs"}
        assert len(found.tensors["hidden"]) in (5, 40)
        assert torch.equal(found.tensors["hidden"][:5], entry.tensors["hidden"][:5])
        assert store.get_beginning("no-entry", 5) is None

    def test_what_was_got_belongs_to_the_caller(self, store):
        entry = make_entry(1)
        store.put(entry)
        found = store.get(entry.header.name)
        store.delete(entry.header.name)
        for tensor in found.tensors.values():
            tensor.zero_()
        store.put(entry)
        entry.tensors["hidden"].zero_()
        assert_same(store.get(entry.header.name), make_entry(1))

    def test_putting_again_changes_nothing(self, store):
        for _ in range(3):
            store.put(make_entry(1))
        assert [header.name for header in store.list()] == [make_entry(1).header.name]

    def test_deleting(self, store):
        entries = [make_entry(number) for number in range(3)]
        for entry in entries:
            store.put(entry)
        store.delete(entries[1].header.name)
        store.delete(entries[1].header.name)
        assert store.get(entries[1].header.name) is None
        assert sorted(header.name for header in store.list()) == sorted(entries[i].header.name for i in (0, 2))

    def test_the_longest_common_beginning_at_a_key(self, store):
        """Against comparing with every entry, on ids of which many have beginnings in common."""
        draw = random.Random(0)
        runs = {tuple(draw.choices((0, 1, 256, 1 << 20), k=draw.randint(1, 6))) for _ in range(40)}
        for number, ids in enumerate(sorted(runs)):
            entry = make_entry(number, num_tokens=len(ids))
            store.put(Entry(dataclasses.replace(entry.header, token_ids=ids), entry.tensors))
        for _ in range(200):
            asked = tuple(draw.choices((0, 1, 256, 1 << 20, 5), k=draw.randint(1, 7)))
            common = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, asked))) for ids in runs]  # noqa: B905
            found = store.longest("root", asked)
            assert (found.num_tokens if found is not None else 0) == max(common)
            if found is not None:
                header = store.get(found.name).header
                assert header.token_ids[: found.num_tokens] == asked[: found.num_tokens]
            going_on = any(len(ids) > len(asked) and ids[: len(asked)] == asked for ids in runs)
            assert store.goes_on("root", asked) == going_on
        assert store.goes_on("root", ())
        assert not store.goes_on("elsewhere", ())
        assert store.longest("elsewhere", (0, 1)) is None
        assert isinstance(store.longest("root", min(runs)), Match)

    def test_listing_by_text(self, store):
        texts = ["The cat", "The", "the cat", "100%", "100_", "ünï", ""]
        for number, text in enumerate(texts):
            store.put(make_entry(number, text=text))
        for prefix in ("The", "100%", "ü", "", "nothing"):
            expected = sorted(text for text in texts if text.startswith(prefix))
            assert sorted(header.text for header in store.list(prefix)) == expected

    def test_closing_twice(self, store, tmp_path):
        entry = make_entry(1)
        store.put(entry)
        store.get(entry.header.name)
        store.close()
        store.close()
        if isinstance(store, DiskStore):  # a folder is whole then, and opens again
            assert [file.name for file in store.path.glob("index.sqlite*")] == ["index.sqlite"]
            with DiskStore(store.path) as again:
                assert_same(again.get(entry.header.name), entry)

    def test_many_threads(self, store):
        if isinstance(store, ObjectStore) and store.url.startswith("s3:"):
            pytest.skip("rclone writes over an object in place, and then readers see a part; S3 does not")

        def work(seed):
            draw = random.Random(seed)
            for _ in range(20):
                entry = make_entry(draw.randrange(8))
                found = store.get(entry.header.name)
                if found is not None:
                    assert_same(found, entry)
                draw.choice([store.put, lambda e: store.delete(e.header.name)])(entry)

        in_threads(8, work)

    @pytest.mark.parametrize("ask", WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
    def test_a_wrong_argument_is_refused_and_harms_nothing(self, store, ask, caplog):
        put = make_entry(1)
        store.put(put)
        with pytest.raises((TextTypeError, TokenizerError, TokenIdError), match=r"must be|surrogate"):
            ask(store)
        assert not caplog.records
        assert_same(store.get(put.header.name), put)
        if isinstance(store, DiskStore):
            assert not list((store.path / "damaged").iterdir())


# Any operations, against a dict


class AnyOperations(RuleBasedStateMachine):
    """A folder behaves as a dict does: also when opened again, after crashes, and when its index is lost."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store"
        self.store = DiskStore(self.path)
        self.expected = {}

    @rule(number=st.integers(0, 5), num_tokens=st.integers(1, 4))
    def put(self, number, num_tokens):
        entry = make_entry(number, num_tokens)
        self.store.put(entry)
        self.expected[entry.header.name] = entry

    @rule(number=st.integers(0, 5), num_tokens=st.integers(1, 4))
    def delete(self, number, num_tokens):
        name = make_entry(number, num_tokens).header.name
        self.store.delete(name)
        self.expected.pop(name, None)

    @rule(number=st.integers(0, 5), num_tokens=st.integers(1, 4))
    def get(self, number, num_tokens):
        name = make_entry(number, num_tokens).header.name
        if name in self.expected:
            assert_same(self.store.get(name), self.expected[name])
        else:
            assert self.store.get(name) is None

    @rule(how=st.sampled_from(["close", "forget", "lose the index", "damage the index", "copy"]))
    def open_again(self, how):
        if how == "close":
            self.store.close()
        index = self.path / "index.sqlite"
        if how in ("lose the index", "damage the index"):
            self.store.close()
            for file in self.path.glob("index.sqlite*"):
                file.unlink()
            if how == "damage the index":
                index.write_bytes(b"no database at all" * 100)
        self.store = DiskStore(self.path)

    @rule(number=st.integers(0, 5), num_tokens=st.integers(1, 4), at=st.sampled_from(["fsync", "replace", "insert"]))
    def crash_in_put(self, number, num_tokens, at):
        """The process dies within a put: the entry is there as a whole or not at all."""
        entry = make_entry(number, num_tokens)
        name = entry.header.name

        def die(*_):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backprompt.store." + ("index.Index.insert" if at == "insert" else f"folder.os.{at}"), die)
            try:
                self.store.put(entry)
            except KeyboardInterrupt:
                self.store = DiskStore(self.path)
        if self.store.contains(name):
            assert at == "insert" or name in self.expected
            self.expected[name] = entry
            self.store.put(entry)  # brings the index up to date

    @rule(data=st.data())
    def flip_a_byte(self, data):
        if self.expected:
            name = data.draw(st.sampled_from(sorted(self.expected)))
            file = file_of(self.store, name)
            content = bytearray(file.read_bytes())
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            file.write_bytes(content)
            found = self.store.get(name)
            if found is None:
                assert not self.store.contains(name)
                del self.expected[name]
            else:
                assert_same(found, self.expected[name])
                self.store.delete(name)  # a flipped blank of the header changes nothing
                del self.expected[name]

    @invariant()
    def lists_what_is_there(self):
        assert sorted(header.name for header in self.store.list()) == sorted(self.expected)
        assert self.store.stats().num_entries == len(self.expected)

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


AnyOperations.TestCase.settings = settings(max_examples=up_to(30), stateful_step_count=25, deadline=None)
TestAnyOperations = AnyOperations.TestCase


# Damage


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_a_thousand_flipped_bytes_never_give_a_wrong_tensor(tmp_path, monkeypatch, chunk_bytes):
    """Also where tensors have several checksums and are read side by side."""
    monkeypatch.setattr("backprompt.store.file.CHUNK_BYTES", chunk_bytes)
    store = DiskStore(tmp_path / "store")
    entry = make_entry(1, num_tokens=50)
    content = b"".join(to_pieces(entry))
    file = file_of(store, entry.header.name)
    file.parent.mkdir()
    draw = random.Random(0)
    num_noticed = 0
    for _ in range(1000):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
        file.write_bytes(damaged)
        found = store.get(entry.header.name)
        if found is None:
            num_noticed += 1
        else:
            assert_same(found, entry)
    assert num_noticed > 900  # the others hit blanks that pad the header


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1])
def test_a_file_that_is_cut_off_is_noticed(tmp_path, size):
    store = DiskStore(tmp_path / "store")
    entry = make_entry(1)
    store.put(entry)
    file = file_of(store, entry.header.name)
    file.write_bytes(file.read_bytes()[:size])
    assert store.get(entry.header.name) is None
    assert [aside.name for aside in (store.path / "damaged").iterdir()] == [file.name]


def test_verify_names_what_is_damaged_and_sets_it_aside(tmp_path, caplog):
    store = DiskStore(tmp_path / "store")
    entries = [make_entry(number) for number in range(5)]
    for entry in entries:
        store.put(entry)
    file = file_of(store, entries[2].header.name)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert list(store.verify()) == [entries[2].header.name]
    assert "is damaged" in caplog.text
    assert list(store.verify()) == []
    assert store.stats().num_entries == 4
    store.put(entries[2])
    assert_same(store.get(entries[2].header.name), entries[2])


def test_an_entry_under_another_name_is_not_served(tmp_path):
    store = DiskStore(tmp_path / "store")
    one, other = make_entry(1), make_entry(2)
    store.put(one)
    file = file_of(store, other.header.name)
    file.write_bytes(file_of(store, one.header.name).read_bytes())
    assert store.get(other.header.name) is None


def test_other_versions_get_a_clear_answer(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.file.FORMAT", 99)
        store.put(make_entry(1))
    with pytest.raises(StoreVersionError, match=r"format 99.*reads format 1"):
        store.get(make_entry(1).header.name)


def test_the_index_of_a_newer_version_is_left_alone(tmp_path, caplog):
    """The newer version may be using its index: two versions that set each other's index aside would never stop."""
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
        change_index(store, "PRAGMA user_version = 99")
    before = (tmp_path / "store" / "index.sqlite").read_bytes()
    for number in (2, 3):  # opened again, with what was put meanwhile
        caplog.clear()
        with DiskStore(tmp_path / "store") as store:
            assert "newer version" in caplog.text
            assert len(store.find("")) == number - 1
            store.put(make_entry(number))
            ids = make_entry(number).header.token_ids
            assert store.longest("root", ids) == Match(make_entry(number).header.name, len(ids))
            store.rebuild()
            assert store.stats().num_entries == number
    assert (tmp_path / "store" / "index.sqlite").read_bytes() == before
    assert not list((tmp_path / "store" / "damaged").iterdir())


def test_a_damaged_index_is_made_anew_whatever_it_answers(tmp_path, caplog):
    """Bytes flipped anywhere in it, and rows of nonsense: lookups find the files' entries, and nothing crashes."""
    with DiskStore(tmp_path / "store") as store:
        for number in range(30):
            store.put(make_entry(number, text="x" * 200))
    sound = (tmp_path / "store" / "index.sqlite").read_bytes()
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(sound)
        for _ in range(20):
            damaged[draw.randrange(len(damaged))] ^= draw.randrange(1, 256)
        (tmp_path / "store" / "index.sqlite").write_bytes(damaged)
        with DiskStore(tmp_path / "store") as store:
            for number in range(30):
                entry = make_entry(number, text="x" * 200)
                match = store.longest("root", entry.header.token_ids)
                assert match is None or store.get(match.name) is None or isinstance(match.num_tokens, int)
                assert_same(store.get(entry.header.name), entry)
            list(store.list())
            store.stats()
            store.put(make_entry(0))


@pytest.mark.parametrize("broken", ["token_ids = x'0102'", "name = x'ff'", "name = 'a' || char(0)"])
def test_an_index_of_nonsense_is_made_anew(tmp_path, caplog, broken):
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
        change_index(store, f"UPDATE entries SET {broken}")
        ids = make_entry(1).header.token_ids
        assert [header.text for header in store.list()] == ["text 1"]
        assert store.longest("root", ids) == Match(make_entry(1).header.name, len(ids))


def test_one_file_that_cannot_be_read_is_one_entry_less(tmp_path, caplog, monkeypatch):
    store = DiskStore(tmp_path / "store")
    for number in range(2):
        store.put(make_entry(number))
    file = file_of(store, make_entry(0).header.name)
    opened = os.open

    def refuse(path, *arguments):
        if str(path) == str(file):
            raise OSError(5, "Input/output error")
        return opened(path, *arguments)

    monkeypatch.setattr("backprompt.store.file.os.open", refuse)
    assert store.get(make_entry(0).header.name) is None
    assert "cannot be read" in caplog.text
    assert_same(store.get(make_entry(1).header.name), make_entry(1))
    assert list(store.verify()) == [make_entry(0).header.name]
    store.rebuild()
    assert [header.name for header in store.list()] == [make_entry(1).header.name]


# An index that may come from anywhere

ENDLESS = "WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"


def run_sql(script):
    def change(index):
        with sqlite3.connect(index) as connection:
            connection.executescript(script)
        connection.close()

    return change


def replaced_by(content):
    def change(index):
        index.unlink()
        index.write_bytes(content)

    return change


def instead(make):
    """Something else stands where the index should, or one of SQLite's other files of it."""

    def change(index):
        index.unlink()
        make(index)

    return change


HOSTILE = {
    "endless trigger on a row deleted": run_sql(
        "CREATE TRIGGER t AFTER DELETE ON entries BEGIN "
        f"INSERT INTO needs SELECT x, x FROM ({ENDLESS} SELECT x FROM r); END;"
    ),
    "endless trigger on a row changed": run_sql(
        f"CREATE TRIGGER t BEFORE UPDATE ON entries BEGIN SELECT sum(x) FROM ({ENDLESS} SELECT x FROM r); END;"
    ),
    "endless trigger on a row added": run_sql(
        f"CREATE TRIGGER t BEFORE INSERT ON entries BEGIN SELECT sum(x) FROM ({ENDLESS} SELECT x FROM r); END;"
    ),
    "triggers that call each other": run_sql(
        "CREATE TRIGGER t AFTER DELETE ON entries BEGIN INSERT INTO needs VALUES (random(), random()); END;"
        "CREATE TRIGGER u AFTER INSERT ON needs BEGIN INSERT INTO needs VALUES (random(), random()); END;"
    ),
    "an endless view for a table": run_sql(
        f"DROP TABLE entries; CREATE VIEW entries AS {ENDLESS} SELECT x AS name, x AS start, x AS end, x AS token_ids, "
        "x AS position, x AS num_tokens, x AS num_bytes, x AS text, 0.0 AS error, x AS last_used FROM r;"
    ),
    "an endless view besides": run_sql(f"CREATE VIEW v AS {ENDLESS} SELECT x FROM r;"),
    "a table besides": run_sql("CREATE TABLE more (x);"),
    "a table of another kind": run_sql("DROP TABLE needs; CREATE VIRTUAL TABLE needs USING fts5 (name, behind);"),
    "a column more": run_sql("ALTER TABLE entries ADD COLUMN more TEXT;"),
    "a column that is computed": run_sql("ALTER TABLE entries ADD COLUMN more AS (hex(zeroblob(500000000)));"),
    "an index less": run_sql("DROP INDEX by_start;"),
    "a statement too long": run_sql(f"CREATE VIEW v AS SELECT '{'x' * 500_000}';"),
    "an expression too deep": run_sql(f"CREATE VIEW v AS SELECT 1{'+1' * 300};"),
    "a larger value than any": run_sql("UPDATE entries SET token_ids = zeroblob(3000000);"),
    "a longer name than any": run_sql("UPDATE entries SET name = hex(zeroblob(500)) || rowid;"),
    "sums of something else": run_sql("UPDATE entries SET num_bytes = 'many', num_tokens = 1e999, error = 'x';"),
    "sums that overflow": run_sql("UPDATE entries SET num_bytes = 9223372036854775807;"),
    "negative sizes": run_sql("UPDATE entries SET num_bytes = -5, num_tokens = -5;"),
    "an error that is infinite": run_sql("UPDATE entries SET error = 1e999;"),
    "another application's": replaced_by(b""),  # made below
    "nothing": replaced_by(b""),
    "random bytes": replaced_by(random.Random(0).randbytes(20_000)),
    "a database cut off": lambda index: index.write_bytes(index.read_bytes()[:5000]),
    "a folder": instead(lambda index: (index / "below").mkdir(parents=True)),
    "a link to a file": instead(lambda index: index.symlink_to(index.parent.parent / "precious.sqlite")),
    "a link to nothing": instead(lambda index: index.symlink_to(index.parent.parent / "nowhere")),
    "a pipe": instead(lambda index: os.mkfifo(index)),
    "a log that is a pipe": lambda index: os.mkfifo(f"{index}-wal"),
    "a log that is a folder": lambda index: os.mkdir(f"{index}-shm"),
    "a journal that is a pipe": lambda index: os.mkfifo(f"{index}-journal"),
}
OTHER_APPLICATION = "PRAGMA user_version = 7; CREATE TABLE letters (x); INSERT INTO letters VALUES ('dear');"


@pytest.mark.skipif(os.name != "posix", reason="pipes have names")
@pytest.mark.parametrize("is_writable", [True, False])
@pytest.mark.parametrize("kind", HOSTILE)
def test_no_index_hangs_or_stops_a_store(kind, is_writable, tmp_path, monkeypatch):
    """In bounded time the store answers by the files; all other files are still there."""
    monkeypatch.setattr("backprompt.store.index.MAX_VALUE_BYTES", 1 << 20)
    monkeypatch.setattr("backprompt.store.disk.os.fsync", lambda _: None)
    precious = tmp_path / "precious.sqlite"
    run_sql(OTHER_APPLICATION)(precious)
    kept = precious.read_bytes()
    index = tmp_path / "store" / "index.sqlite"
    entries = [make_entry(number) for number in range(3)]
    with DiskStore(tmp_path / "store") as store:
        for entry in entries:
            store.put(entry)
    HOSTILE[kind](index)
    if kind == "another application's":
        index.write_bytes(kept)
    if not is_writable:
        monkeypatch.setattr("backprompt.store.folder.os.access", lambda *_: False)

    def use():
        with DiskStore(tmp_path / "store") as store:
            for entry in entries:
                ids = entry.header.token_ids
                store.goes_on("root", ids[:2])  # an index may lack entries
                assert store.longest("root", ids) == Match(entry.header.name, len(ids))
                assert store.goes_on("root", ids[:2])
                assert not store.goes_on("root", ids)
                assert_same(store.get(entry.header.name), entry)
            assert sorted(header.text for header in store.find("")) == ["text 0", "text 1", "text 2"]
            stats = store.stats()
            assert (stats.num_entries, stats.num_tokens, stats.largest_error) == (3, 9, 0.0)
            assert stats.num_bytes == sum(file.stat().st_size for file in store.path.glob("entries/*/*"))
            assert list(store.verify()) == []
            store.rebuild()
            if is_writable:
                store.put(make_entry(3))
                store.delete(make_entry(3).header.name)
                assert len(store.prune(0)) == 3
        return True

    assert within(20, use)
    assert precious.read_bytes() == kept
    if kind == "another application's":
        place = tmp_path / "store" / "damaged" / "index.sqlite.1" if is_writable else index
        assert place.read_bytes() == kept


def test_what_is_set_aside_stands_in_nobodys_way(tmp_path, caplog):
    """Each index gets a name of its own and keeps its log: the file may be another application's."""
    for number in (1, 2):
        DiskStore(tmp_path / "store").close()
        index = tmp_path / "store" / "index.sqlite"
        with sqlite3.connect(tmp_path / "live.sqlite") as live:
            live.execute("PRAGMA journal_mode = WAL")
            live.execute(f"CREATE TABLE letters{number} (x)")
            live.commit()
            for suffix in ("", "-wal"):  # as they are while somebody writes
                Path(f"{index}{suffix}").write_bytes(Path(f"{tmp_path}/live.sqlite{suffix}").read_bytes())
        live.close()
        DiskStore(tmp_path / "store").close()
    damaged = tmp_path / "store" / "damaged"
    assert str(damaged / "index.sqlite.2") in caplog.text
    for number in (1, 2):
        with sqlite3.connect(damaged / f"index.sqlite.{number}") as aside:
            tables = [name for (name,) in aside.execute("SELECT name FROM sqlite_master")]
        aside.close()
        assert tables == [f"letters{idx}" for idx in range(1, number + 1)]


def test_a_question_that_takes_too_long_is_broken_off(tmp_path, monkeypatch):
    """Whatever makes it so: pages of a damaged file may lead to each other."""
    monkeypatch.setattr("backprompt.store.index.SCAN_SECONDS", 0.2)
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
        with monkeypatch.context() as patch:
            patch.setattr("backprompt.store.index.TOTALS", f"{ENDLESS} SELECT sum(x), 0, 0, 0.0 FROM r")

            def ask():
                with pytest.raises(OSError, match="cannot be used") as caught:
                    store.stats()
                return caught.value

            assert within(30, ask).errno == 5
        assert store.stats().num_entries == 1
    assert (tmp_path / "store" / "damaged" / "index.sqlite.1").exists()


PAGE_BYTES = 512
LEVELS = 12


def interior_page(child):
    """A page of a table of SQLite's whose 40 children are one and the same."""
    cells = [struct.pack(">IB", child, key + 1) for key in range(39)]  # 5 bytes each, at the end of the page
    starts = [PAGE_BYTES - 5 * (idx + 1) for idx in range(len(cells))]
    head = struct.pack(">BHHHBI", 5, 0, len(cells), starts[-1], 0, child) + struct.pack(f">{len(starts)}H", *starts)
    return head.ljust(starts[-1], b"\0") + b"".join(reversed(cells))


@pytest.mark.parametrize("asked", [DiskStore.stats, DiskStore.rebuild, lambda store: list(store.list())])
def test_pages_that_lead_to_one_page_many_times_are_not_walked_to_the_end(asked, tmp_path, monkeypatch):
    """An index of a few kB with 40 ** 12 rows, and the tables of ours: no look at its schema shows that."""
    monkeypatch.setattr("backprompt.store.index.SCAN_SECONDS", 0.2)
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    index = tmp_path / "store" / "index.sqlite"
    with sqlite3.connect(index) as connection:
        for change in ("journal_mode = DELETE", f"page_size = {PAGE_BYTES}"):
            connection.execute(f"PRAGMA {change}")
    connection.execute("VACUUM")
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'entries'")
    connection.close()
    content = bytearray(index.read_bytes())
    start = (root - 1) * PAGE_BYTES
    content += content[start : start + PAGE_BYTES]
    for _ in range(LEVELS - 1):
        content += interior_page(len(content) // PAGE_BYTES)
    content[start : start + PAGE_BYTES] = interior_page(len(content) // PAGE_BYTES)
    struct.pack_into(">I", content, 28, len(content) // PAGE_BYTES)
    index.write_bytes(content)
    assert index.stat().st_size < 20_000

    def use():
        with DiskStore(tmp_path / "store") as store:
            asked(store)
            assert store.stats().num_entries == 1
        return True

    assert within(60, use)
    assert (tmp_path / "store" / "damaged" / "index.sqlite.1").read_bytes()[28:] == content[28:]


def test_a_full_index_is_an_error_of_the_system(tmp_path, monkeypatch):
    """And is not taken for damage."""
    connect = sqlite3.connect

    def full(*arguments, **options):
        connection = connect(*arguments, **options)
        ((pages,),) = connection.execute("PRAGMA page_count")
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    with monkeypatch.context() as patch:
        patch.setattr("sqlite3.connect", full)
        store = DiskStore(tmp_path / "store")
    with store:
        large = make_entry(2, num_tokens=5000)
        with pytest.raises(OSError, match="Free some space") as caught:
            store.put(large)
        assert caught.value.errno == 28
        assert str(tmp_path / "store") in str(caught.value)
        assert list((tmp_path / "store" / "damaged").iterdir()) == []
        assert_same(store.get(make_entry(1).header.name), make_entry(1))
        assert_same(store.get(large.header.name), large)


# Files of others


def test_what_is_not_ours_is_left_alone(tmp_path):
    """Files of other names, in other folders, behind links; also where they look like an entry."""
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    entry = make_entry(2).header.name
    foreign = [
        "entries/notes.txt",
        "entries/gpt2/model.safetensors",
        "entries/ro/model.safetensors",
        f"entries/zz/{entry}.safetensors",
        f"entries/ro/{entry}.safetensors.bak",
        "writing/letter.txt",
        "damaged/old.txt",
        "mine.txt",
    ]
    for name in foreign:
        (tmp_path / "store" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "store" / name).write_text("mine")
        os.utime(tmp_path / "store" / name, (0, 0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked = make_entry(3, start="link").header.name
    (elsewhere / f"{linked}.safetensors").write_text("mine")
    (tmp_path / "store" / "entries" / "li").symlink_to(elsewhere)
    with DiskStore(tmp_path / "store") as store:
        assert list(store.verify()) == []
        store.rebuild()
        assert store.stats().num_entries == 1
        assert len(store.prune(0)) == 1
    for name in foreign:
        assert (tmp_path / "store" / name).read_text() == "mine", name
    assert (elsewhere / f"{linked}.safetensors").read_text() == "mine"


@pytest.mark.parametrize("name", ["../../mine", "../entries/../../mine", "", "a/b", "a\0b", "x" * 300, "\ud800"])
def test_a_name_is_no_path(name, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine")
    with DiskStore(tmp_path / "store") as store:
        assert store.get(name) is None
        assert not store.contains(name)
        store.delete(name)
        store.set_aside(name, "it is damaged")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_a_header_that_no_entry_has_is_refused_where_a_file_of_its_name_is_there_too(tmp_path, caplog):
    with DiskStore(tmp_path / "store") as store:
        entry = make_entry(1)
        store.put(entry)
        with pytest.raises(DamagedEntryError, match="token ids"):
            store.put(Entry(dataclasses.replace(entry.header, token_ids=(-1,)), entry.tensors))
        assert [header.name for header in store.find("")] == [entry.header.name]
    assert not caplog.records


@pytest.mark.parametrize("name", ["entries", "damaged", "writing"])
def test_a_stores_own_folder_is_no_link(name, tmp_path):
    """Old files in `writing` are deleted and damaged ones moved, but never in a linked folder of others."""
    DiskStore(tmp_path / "store").close()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "tmp1").write_text("mine")
    os.utime(precious / "tmp1", (0, 0))
    (tmp_path / "store" / name).rmdir()
    (tmp_path / "store" / name).symlink_to(precious)
    with pytest.raises(OSError, match="it is a link"):
        DiskStore(tmp_path / "store")
    assert (precious / "tmp1").read_text() == "mine"


def test_a_folder_where_an_entry_should_be_is_set_aside(tmp_path):
    with DiskStore(tmp_path / "store") as store:
        for number in range(2):
            store.put(make_entry(number))
        name = make_entry(0).header.name
        file_of(store, name).unlink()
        file_of(store, name).mkdir()
        (file_of(store, name) / "mine.txt").write_text("mine")
        assert len(store.prune(0)) == 2
        (aside,) = (store.path / "damaged").iterdir()
        assert (aside / "mine.txt").read_text() == "mine"


# Paths


def with_files(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "main.py").write_text("mine")


BAD_PATHS = [
    ("file", errno.ENOTDIR, "Name a folder"),
    ("file/prompts.bp", errno.ENOTDIR, "Name a folder"),
    ("x" * 300, errno.ENAMETOOLONG, "Choose a shorter path"),
    ("x/" * 3000, errno.ENAMETOOLONG, "Choose a shorter path"),
    ("loop", errno.ELOOP, "Name a folder"),
    ("dangling", errno.ENOTDIR, "Name a folder"),
    ("project", errno.EEXIST, "it has other content, such as 'main.py'"),
    ("a\0b", errno.EINVAL, "Name a folder"),
    ("\ud800", errno.EINVAL, "Name a folder"),
]


@pytest.mark.skipif(os.name != "posix", reason="other systems have other errors")
@pytest.mark.parametrize(("name", "number", "advice"), BAD_PATHS)
def test_a_path_of_no_store_says_what_to_do(name, number, advice, tmp_path, model, tokenizer):
    with_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = f"{tmp_path}/{name}"
    for make in (DiskStore, lambda path: LM(model, tokenizer, store=path), lambda path: load("nowhere", store=path)):
        with pytest.raises(OSError, match=re.escape(advice)) as caught:
            make(given)
        assert caught.value.errno == number
        assert caught.value.filename == given
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_path_is_no_folder():
    with pytest.raises(FileNotFoundError, match="the path is empty"):
        DiskStore("")
    with pytest.raises(TypeError, match="must be a str or a Path, not bytes"):
        DiskStore(b"prompts.bp")


def test_a_folder_of_hidden_files_may_become_a_store(tmp_path):
    (tmp_path / ".gitignore").write_text("*")
    with DiskStore(tmp_path) as store:
        store.put(make_entry(1))
    (tmp_path / "notes.txt").write_text("mine")
    with DiskStore(tmp_path) as store:  # the folder is a store now
        assert store.stats().num_entries == 1


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_made(number, tmp_path, monkeypatch):
    monkeypatch.setattr("backprompt.store.folder.Path.mkdir", failing(number))
    with pytest.raises(OSError, match="cannot be made") as caught:
        DiskStore(tmp_path / "store")
    assert caught.value.errno == number
    assert str(tmp_path / "store") in str(caught.value)
    assert re.search("Choose a folder of your own|Free some space", str(caught.value))


def test_a_folder_of_somebody_elses(tmp_path, monkeypatch):
    """As root may look into any folder and write to it, the system's answers are played."""
    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.paths.os.listdir", failing(errno.EACCES))
        with pytest.raises(PermissionError, match="Choose a folder of your own"):
            DiskStore(tmp_path)
    monkeypatch.setattr("backprompt.store.paths.os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="cannot be written to"):
        DiskStore(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_only_read_says_so(tmp_path, monkeypatch):
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    monkeypatch.setattr("backprompt.store.folder.os.access", lambda *_: False)
    with DiskStore(tmp_path / "store") as store:
        for change in (lambda: store.put(make_entry(2)), lambda: store.prune(0)):
            with pytest.raises(PermissionError, match=r"only read.*Choose a folder of your own"):
                change()
        store.rebuild()
        assert store.stats().num_entries == 1


def test_a_store_stays_where_it_was_opened(tmp_path, monkeypatch):
    """Also when the process goes to another folder."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    with DiskStore("store") as store:
        store.put(make_entry(1))
        monkeypatch.chdir(tmp_path / "other")
        assert_same(store.get(make_entry(1).header.name), make_entry(1))
        store.put(make_entry(2))
        assert store.stats().num_entries == 2
    assert list((tmp_path / "other").iterdir()) == []


# Surroundings


def test_only_the_owner_may_read(tmp_path):
    store = DiskStore(tmp_path / "store")
    store.put(make_entry(1))
    for path in [store.path, *store.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_may_be_copied(tmp_path):
    import shutil

    with DiskStore(tmp_path / "one") as store:
        store.put(make_entry(1))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert_same(DiskStore(tmp_path / "two").get(make_entry(1).header.name), make_entry(1))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_opens(tmp_path):
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    for path in [*(tmp_path / "store").rglob("*"), tmp_path / "store"]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    with DiskStore(tmp_path / "store") as store:
        assert_same(store.get(make_entry(1).header.name), make_entry(1))
        assert len(list(store.list())) == 1


def test_a_folder_that_cannot_be_written_to_is_read(tmp_path, monkeypatch):
    """As above, for those who may write anywhere."""
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    monkeypatch.setattr("backprompt.store.folder.os.access", lambda *_: False)
    with DiskStore(tmp_path / "store") as store:
        assert not store.is_writable
        assert_same(store.get(make_entry(1).header.name), make_entry(1))
        assert [header.text for header in store.list()] == ["text 1"]


def test_a_read_only_folder_whose_writer_is_at_work_shows_what_is_there(tmp_path, monkeypatch):
    """The newest lines of the index are in its log, which cannot be read there: the files tell."""
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(0))
    with DiskStore(tmp_path / "store") as writing:
        writing.put(make_entry(1))
        monkeypatch.setattr("backprompt.store.folder.os.access", lambda *_: False)
        with DiskStore(tmp_path / "store") as store:
            assert [header.text for header in store.list()] == ["text 0", "text 1"]
            assert store.longest("root", make_entry(1).header.token_ids) is not None


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "tempfile.mkstemp", "Path.mkdir"])
def test_a_full_disk_leaves_nothing_behind(where, tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "store")
    store.put(make_entry(1))

    with monkeypatch.context() as patch:
        patch.setattr(f"backprompt.store.folder.{where}", failing(errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left on device\. Free some space") as caught:
            store.put(make_entry(2))
    assert caught.value.errno == errno.ENOSPC
    assert str(store.path) in str(caught.value)
    assert not store.contains(make_entry(2).header.name)
    assert list((store.path / "writing").iterdir()) == []
    assert [header.text for header in store.list()] == ["text 1"]
    store.put(make_entry(2))
    assert_same(store.get(make_entry(2).header.name), make_entry(2))


def test_a_budget_keeps_what_was_used_last(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("backprompt.store.disk.time.time", lambda: now[0])
    size = sum(map(len, to_pieces(make_entry(1))))
    store = DiskStore(tmp_path / "store", max_bytes=int(3.5 * size))
    for number in (1, 2, 3):
        now[0] += 1
        store.put(make_entry(number))
    now[0] += 1
    store.get(make_entry(1).header.name)
    store.put(make_entry(4))
    assert sorted(header.text for header in store.list()) == ["text 1", "text 3", "text 4"]
    assert store.stats().num_bytes <= 3.5 * size
    assert len(store.prune("0 MB")) == 3
    with pytest.raises(ValueError, match="needs a limit"):
        DiskStore(tmp_path / "without a bound").prune()
    assert store.stats().num_entries == 0
    with pytest.raises(EntryTooLargeError, match="does not fit"):
        store.put(make_entry(1, num_tokens=5000))
    assert store.stats().num_entries == 0


def test_nothing_goes_before_what_begins_behind_it(tmp_path):
    """A context that was not read for long, and newer entries behind it."""
    store = DiskStore(tmp_path / "store")
    context = make_entry(0)
    store.put(context)
    for number in range(1, 4):
        store.put(make_entry(number, start=context.header.end))
    store.get(make_entry(1, start=context.header.end).header.name)
    num_bytes = store.stats().num_bytes
    assert context.header.name not in store.prune(num_bytes // 2)
    assert store.stats().num_bytes <= num_bytes // 2
    assert list(store.prune(0))[-1] == context.header.name


def test_an_index_that_was_not_finished_is_made_anew(tmp_path, monkeypatch):
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
    for file in store.path.glob("index.sqlite*"):
        file.unlink()

    class Dying(sqlite3.Connection):
        def execute(self, statement, *given):
            if statement.startswith("INSERT"):
                raise KeyboardInterrupt
            return super().execute(statement, *given)

    with monkeypatch.context() as patch:
        patch.setattr("sqlite3.connect", partial(sqlite3.connect, factory=Dying))
        with pytest.raises(KeyboardInterrupt):
            DiskStore(tmp_path / "store")
    with DiskStore(tmp_path / "store") as store:
        assert [header.text for header in store.list()] == ["text 1"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    DiskStore(tmp_path / "store").close()
    left, fresh = (tmp_path / "store" / "writing" / name for name in ("tmp_left", "tmp_fresh"))
    left.write_bytes(b"half an entry")
    fresh.write_bytes(b"another process is at it")
    os.utime(left, (0, 0))
    DiskStore(tmp_path / "store").close()
    assert not left.exists()
    assert fresh.exists()


def test_an_index_in_use_for_too_long_is_an_error_of_the_system(tmp_path):
    store = DiskStore(tmp_path / "store")
    store.close()
    with pytest.raises(OSError, match=r"cannot be used: it is closed\. Open it again"):
        store.put(make_entry(1))
    assert_same(store.get(make_entry(1).header.name), make_entry(1))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOSPC])
@pytest.mark.parametrize("damaged", [False, True])
def test_an_index_that_cannot_be_opened_once_is_opened_the_next_time(number, damaged, tmp_path, monkeypatch):
    with DiskStore(tmp_path / "store") as store:
        store.put(make_entry(1))
        if damaged:
            change_index(store, "UPDATE entries SET name = x'ff'")
        else:
            forking.before_fork()
            forking.after_fork()
        with monkeypatch.context() as patch:
            patch.setattr("backprompt.store.catalog.Index.open", failing(number))
            with pytest.raises(OSError, match=os.strerror(number)):
                store.find("")
        assert [header.text for header in store.find("")] == ["text 1"]
        assert_same(store.get(make_entry(1).header.name), make_entry(1))


@pytest.mark.parametrize("options", [{"max_bytes": "a lot"}, {"max_bytes": -1}, {"persist": "often"}])
def test_options_that_are_none(options, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        DiskStore(tmp_path / "store", **options)


# Other processes

WRITERS = """
import os, sys
sys.path[:0] = json_path
from stores import make_entry
from backprompt.store import DiskStore
for number in map(int, sys.stdin):
    pid = os.fork()
    if not pid:
        store = DiskStore(sys.argv[1])
        print(os.getpid(), flush=True)
        while True:
            store.put(make_entry(number, num_tokens=2000))
            number += 1
    os.waitpid(pid, 0)
    print("killed", flush=True)
"""
"""Forks a writer for each number that it reads: only the first waits for imports."""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_writer_that_is_killed_leaves_a_readable_store(tmp_path):
    """Many times, at random points of a write; each time every entry that is visible is whole."""
    path = tmp_path / "store"
    draw = random.Random(1)
    code = f"json_path = {json.dumps([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}\n" + WRITERS
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        for attempt in range(6):
            print(attempt * 1000, file=writers.stdin, flush=True)
            pid = int(writers.stdout.readline())
            time.sleep(draw.uniform(0.0, 0.15))
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "killed\n"
            with DiskStore(path) as store:
                assert list(store.verify()) == []
                for header in store.list():
                    number = int(header.text.removeprefix("text "))
                    assert_same(store.get(header.name), make_entry(number, num_tokens=2000))
        writers.stdin.close()
    assert len(list(path.glob("entries/*/*.safetensors"))) > 6


HAMMER = """
import sys
sys.path[:0] = json_path
import random
from stores import assert_same, make_entry
from threads import in_threads
from backprompt.store import DiskStore
store = DiskStore(sys.argv[1])
def work(idx):
    draw = random.Random(int(sys.argv[2]) * 100 + idx)
    for _ in range(15):
        entry = make_entry(draw.randrange(10))
        found = store.get(entry.header.name)
        if found is not None:
            assert_same(found, entry)
        draw.choice([store.put, store.put, lambda e: store.delete(e.header.name)])(entry)
        list(store.list())
in_threads(15, work)
store.close()
"""


def test_three_processes_of_fifteen_threads(tmp_path):
    code = f"json_path = {json.dumps([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}\n" + HAMMER
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    processes = [subprocess.Popen([*command, str(number)], stderr=subprocess.PIPE) for number in range(3)]
    errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    assert errors == ["", "", ""]
    with DiskStore(tmp_path / "store") as store:
        assert list(store.verify()) == []
        assert list((store.path / "damaged").iterdir()) == []


def test_an_index_that_nobody_closed_is_closed_with_its_store(tmp_path, monkeypatch):
    """Python 3.13 warns about connections that are let go open."""
    closed, plain = [], sqlite3.connect

    class Noted(sqlite3.Connection):
        def close(self):
            closed.append(self)
            super().close()

    monkeypatch.setattr(sqlite3, "connect", partial(plain, factory=Noted))
    store = DiskStore(tmp_path / "s")
    store.put(make_entry(1))
    before = len(closed)
    del store
    gc.collect()
    assert len(closed) == before + 1
