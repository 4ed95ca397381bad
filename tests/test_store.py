"""Stores: one contract for all, and what a folder must survive: crashes, flipped bytes, full disks, many writers."""

import dataclasses
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from threads import in_threads

from backprompt.errors import EntryTooLargeError, StoreVersionError
from backprompt.store import DiskStore, Entry, Header, Match, MemoryStore
from backprompt.store.file import to_pieces

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]


def make_entry(number, num_tokens=3, start="root", dtype=torch.float32, text=None):
    """An entry whose content follows from its arguments."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.rand((2, num_tokens, 4), generator=generator)
    tensors = {
        "keys.0": (drawn * 100).to(dtype),
        "values.0": drawn.transpose(0, 2),  # not contiguous
        "hidden": drawn[0].clone(),
        "logprobs": torch.tensor([float("nan"), *(-1.5,) * (num_tokens - 1)]),
        "none": torch.empty(0, 4),
    }
    ids = tuple((number * 31 + idx) % 1000 for idx in range(num_tokens))
    header = Header(
        start=start,
        end=f"end{number}x{num_tokens}",
        position=7,
        token_ids=ids,
        text=f"text {number}" if text is None else text,
        model="m",
        tokenizer="t",
        dtype=str(dtype),
    )
    return Entry(header, tensors)


def assert_same(found, put, names=None):
    assert found is not None
    assert found.header == put.header
    expected = put.tensors if names is None else {name: put.tensors[name] for name in names if name in put.tensors}
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name].nan_to_num(9), tensor.nan_to_num(9)), name


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    with MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "prompts.bp") as made:
        yield made


class TestContract:
    """What every implementation promises."""

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
        def work(seed):
            draw = random.Random(seed)
            for _ in range(20):
                entry = make_entry(draw.randrange(8))
                found = store.get(entry.header.name)
                if found is not None:
                    assert_same(found, entry)
                draw.choice([store.put, lambda e: store.delete(e.header.name)])(entry)

        in_threads(8, work)


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

    @rule(number=st.integers(0, 5), num_tokens=st.integers(1, 4), at=st.sampled_from(["fsync", "replace", "_insert"]))
    def crash_in_put(self, number, num_tokens, at):
        """The process dies within a put: the entry is there as a whole or not at all."""
        entry = make_entry(number, num_tokens)
        name = entry.header.name

        def die(*_):
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backprompt.store.disk." + ("_insert" if at == "_insert" else f"os.{at}"), die)
            try:
                self.store.put(entry)
            except KeyboardInterrupt:
                self.store = DiskStore(self.path)
        if self.store.contains(name):
            assert at == "_insert" or name in self.expected
            self.expected[name] = entry
            self.store.put(entry)  # brings the index up to date

    @rule(data=st.data())
    def flip_a_byte(self, data):
        if self.expected:
            name = data.draw(st.sampled_from(sorted(self.expected)))
            file = self.store._file(name)
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


AnyOperations.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestAnyOperations = AnyOperations.TestCase


# Damage


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_a_thousand_flipped_bytes_never_give_a_wrong_tensor(tmp_path, monkeypatch, chunk_bytes):
    """Also where tensors have several checksums and are read side by side."""
    monkeypatch.setattr("backprompt.store.file.CHUNK_BYTES", chunk_bytes)
    store = DiskStore(tmp_path / "store")
    entry = make_entry(1, num_tokens=50)
    content = b"".join(to_pieces(entry))
    file = store._file(entry.header.name)
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
    file = store._file(entry.header.name)
    file.write_bytes(file.read_bytes()[:size])
    assert store.get(entry.header.name) is None
    assert [aside.name for aside in (store.path / "damaged").iterdir()] == [file.name]


def test_verify_names_what_is_damaged_and_sets_it_aside(tmp_path, caplog):
    store = DiskStore(tmp_path / "store")
    entries = [make_entry(number) for number in range(5)]
    for entry in entries:
        store.put(entry)
    file = store._file(entries[2].header.name)
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
    file = store._file(other.header.name)
    file.write_bytes(store._file(one.header.name).read_bytes())
    assert store.get(other.header.name) is None


def test_other_versions_get_a_clear_answer(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.file.FORMAT", 99)
        store.put(make_entry(1))
    with pytest.raises(StoreVersionError, match=r"format 99.*reads format 1"):
        store.get(make_entry(1).header.name)
    store._index.execute("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StoreVersionError, match="newer version"):
        DiskStore(tmp_path / "store")


def test_a_damaged_index_is_made_anew_whatever_it_answers(tmp_path, caplog):
    """Bytes flipped anywhere in it, and rows of nonsense: lookups find what the files say, and nothing crashes."""
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
        store._index.execute(f"UPDATE entries SET {broken}")
        ids = make_entry(1).header.token_ids
        assert [header.text for header in store.list()] == ["text 1"]
        assert store.longest("root", ids) == Match(make_entry(1).header.name, len(ids))


def test_one_file_that_cannot_be_read_is_one_entry_less(tmp_path, caplog):
    store = DiskStore(tmp_path / "store")
    for number in range(2):
        store.put(make_entry(number))
    file = store._file(make_entry(0).header.name)
    file.unlink()
    file.mkdir()  # reading it is an OSError
    assert store.get(make_entry(0).header.name) is None
    assert "cannot be read" in caplog.text
    assert_same(store.get(make_entry(1).header.name), make_entry(1))
    assert list(store.verify()) == [make_entry(0).header.name]
    store.rebuild()
    assert [header.name for header in store.list()] == [make_entry(1).header.name]


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
    monkeypatch.setattr("backprompt.store.disk.os.access", lambda *_: False)
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
        monkeypatch.setattr("backprompt.store.disk.os.access", lambda *_: False)
        with DiskStore(tmp_path / "store") as store:
            assert [header.text for header in store.list()] == ["text 0", "text 1"]
            assert store.longest("root", make_entry(1).header.token_ids) is not None


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    store = DiskStore(tmp_path / "store")
    store.put(make_entry(1))

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.disk.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            store.put(make_entry(2))
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
    with pytest.raises(ValueError, match="Say how much"):
        DiskStore(tmp_path / "without a bound").prune()
    assert store.stats().num_entries == 0
    with pytest.raises(EntryTooLargeError, match="does not fit"):
        store.put(make_entry(1, num_tokens=5000))
    assert store.stats().num_entries == 0


def test_nothing_goes_before_what_begins_behind_it(tmp_path):
    """A context that was not looked at for long, and what was computed behind it since."""
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

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.disk._insert", die)
        with pytest.raises(KeyboardInterrupt):
            DiskStore(tmp_path / "store")
    with DiskStore(tmp_path / "store") as store:
        assert [header.text for header in store.list()] == ["text 1"]


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    DiskStore(tmp_path / "store").close()
    left, fresh = (tmp_path / "store" / "writing" / name for name in ("left", "fresh"))
    left.write_bytes(b"half an entry")
    fresh.write_bytes(b"another process is at it")
    os.utime(left, (0, 0))
    DiskStore(tmp_path / "store").close()
    assert not left.exists()
    assert fresh.exists()


def test_an_index_in_use_for_too_long_is_an_error_of_the_system(tmp_path):
    store = DiskStore(tmp_path / "store")
    store.close()
    with pytest.raises(OSError, match="cannot be used"):
        store.put(make_entry(1))
    assert_same(store.get(make_entry(1).header.name), make_entry(1))


@pytest.mark.parametrize("options", [{"max_bytes": "a lot"}, {"max_bytes": -1}, {"persist": "often"}])
def test_options_that_are_none(options, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        DiskStore(tmp_path / "store", **options)


# Other processes

WRITER = """
import sys
sys.path[:0] = json_path
from test_store import make_entry
from backprompt.store import DiskStore
store = DiskStore(sys.argv[1])
print("ready", flush=True)
number = int(sys.argv[2])
while True:
    store.put(make_entry(number, num_tokens=2000))
    number += 1
"""


def start_writer(path, number):
    code = f"json_path = {json.dumps([str(Path(__file__).parent), str(Path(__file__).parent.parent)])}\n" + WRITER
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(number)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_writer_that_is_killed_leaves_a_readable_store(tmp_path):
    """Many times, at random points of a write; each time every entry that is visible is whole."""
    path = tmp_path / "store"
    draw = random.Random(1)
    for attempt in range(6):
        process = start_writer(path, attempt * 1000)
        time.sleep(draw.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with DiskStore(path) as store:
            assert list(store.verify()) == []
            for header in store.list():
                number = int(header.text.removeprefix("text "))
                assert_same(store.get(header.name), make_entry(number, num_tokens=2000))
    assert len(list(path.glob("entries/*/*.safetensors"))) > 6


HAMMER = """
import sys
sys.path[:0] = json_path
import random
from test_store import assert_same, make_entry
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
