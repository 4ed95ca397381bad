"""Stores in buckets: what lookups list, what is read of an object, and a network that is slow, cut off or gone.

The contract of all stores is in test_store.py, and stores behind an `LM` are in test_archive.py.
"""

import dataclasses
import errno
import os
import shutil
import signal
import sys

import pytest
import torch

from backprompt import LM, Text
from backprompt.errors import DamagedEntryError, MissingDependencyError
from backprompt.store import CachedStore, DiskStore, Entry, Match, MemoryStore, ObjectStore, Store, open_store
from backprompt.store.file import to_pieces
from stores import assert_same, make_entry

pytest.importorskip("obstore")

PROMPT = "a b c d e f g h i j k l m n o p q r s t u v w x y z "


@pytest.fixture
def bucket(tmp_path):
    return ObjectStore(f"file://{tmp_path}/bucket")


def with_ids(number, token_ids):
    entry = make_entry(number, num_tokens=len(token_ids))
    return Entry(dataclasses.replace(entry.header, token_ids=tuple(token_ids), end=f"end{number}"), entry.tensors)


def files_of(bucket, folder):
    return [file for file in sorted((path_of(bucket) / folder).rglob("*")) if file.is_file()]


def path_of(bucket):
    from pathlib import Path

    return Path(bucket.url.removeprefix("file://"))


# Lookups


def test_entries_that_agree_in_more_ids_than_a_name_has_room_for_are_told_apart(bucket):
    shared = list(range(1000, 1100))
    runs = [shared, [*shared, 1], [*shared, 1, 2, 3], [*shared[:90], 7], shared[:50], [9, 9]]
    for number, ids in enumerate(runs):
        bucket.put(with_ids(number, ids))
    again = ObjectStore(bucket.url)
    for number, ids in enumerate(runs):
        assert again.longest("root", [*ids, 55]).num_tokens == len(ids)
        assert again.longest("root", ids) in {
            Match(f"root-end{other}", len(ids)) for other in range(number, len(runs))
        } | {Match(f"root-end{other}", len(ids)) for other, run in enumerate(runs) if run[: len(ids)] == ids}
    assert again.longest("root", [*shared, 1, 2, 8]) == Match("root-end2", 102)
    assert again.longest("root", [*shared[:95], 8]).num_tokens == 95
    for asked in ((), [9], [9, 9], [9, 8], shared[:10], shared[:50], shared[:90], [*shared[:90], 7], shared):
        assert again.goes_on("root", asked) == any(
            len(run) > len(asked) and run[: len(asked)] == [*asked] for run in runs
        )
    for asked, is_there in (
        ([*shared, 1], True),
        ([*shared, 1, 2], True),
        ([*shared, 1, 2, 3], False),
        ([*shared, 2], False),
    ):
        assert again.goes_on("root", asked) == is_there


def test_a_lookup_reads_no_entry_whose_name_says_enough(s3):
    store = s3.store(prefix="lookups")
    for number in range(5):
        store.put(make_entry(number))
    again = s3.store(prefix="lookups")
    s3.requests.clear()
    for number in range(5):
        header = make_entry(number).header
        assert again.longest("root", header.token_ids) == Match(header.name, len(header.token_ids))
        assert again.goes_on("root", header.token_ids[:2])
        assert not again.goes_on("root", header.token_ids)
    assert [method for method, _ in s3.requests] == ["GET"]  # one listing


def test_entries_of_others_are_found_when_a_listing_is_old(bucket, monkeypatch):
    other, entry = ObjectStore(bucket.url), make_entry(1)
    assert other.longest("root", entry.header.token_ids) is None
    bucket.put(entry)
    assert other.longest("root", entry.header.token_ids) is None
    monkeypatch.setattr("backprompt.store.object.LISTING_SECONDS", 0)
    assert other.longest("root", entry.header.token_ids) == Match(entry.header.name, 3)


def test_few_listings_are_remembered(s3, monkeypatch):
    monkeypatch.setattr("backprompt.store.object.MAX_LISTINGS", 2)
    store = s3.store(prefix="listings")
    for number in range(4):
        store.put(make_entry(number, start=f"start{number}"))
        assert store.longest(f"start{number}", make_entry(number).header.token_ids) is not None
    for number, num_requests in ((2, 0), (3, 0), (0, 1), (3, 0), (2, 1)):
        s3.requests.clear()
        store.longest(f"start{number}", make_entry(number).header.token_ids)
        assert len(s3.requests) == num_requests


def test_a_writer_that_dies_between_the_entry_and_its_name(bucket, monkeypatch):
    entry = make_entry(1)
    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.object.Beginning.of", lambda header: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bucket.put(entry)
    again = ObjectStore(bucket.url)
    assert_same(again.get(entry.header.name), entry)
    assert again.longest("root", entry.header.token_ids) is None
    again.put(entry)
    assert again.longest("root", entry.header.token_ids) == Match(entry.header.name, 3)


def test_names_that_say_nothing_are_passed_over(bucket):
    bucket.put(make_entry(1))
    folder = path_of(bucket) / "begins" / "root"
    for name in ("x", "3.zz.end", "0.1.end", "3..end", "3.1.2.3.end-x"):
        (folder / name).touch()
    assert ObjectStore(bucket.url).longest("root", make_entry(1).header.token_ids).num_tokens == 3


# Reading


def test_only_the_bytes_asked_for_are_read_of_a_large_object(s3, monkeypatch):
    store, entry = s3.store(prefix="ranges"), make_entry(1, num_tokens=50)
    store.put(entry)
    monkeypatch.setattr("backprompt.store.object.SMALL_BYTES", 100)
    monkeypatch.setattr("backprompt.store.object.HEADER_BYTES", 64)  # shorter than the header
    assert_same(store.get(entry.header.name), entry)
    assert_same(store.get(entry.header.name, {"hidden"}), entry, {"hidden"})
    s3.requests.clear()
    s3.num_bytes = 0
    assert store.get(entry.header.name, ()).header == entry.header
    assert [method for method, _ in s3.requests] == ["HEAD", "GET", "GET"]  # the size, and the header's two parts
    assert s3.num_bytes == len(to_pieces(entry)[0])


def first_rows(entry, num_rows):
    axes = {"keys.0": 1, "keys.0.scale": 1, "values.0": 1}
    return {name: tensor.narrow(axes.get(name, 0), 0, num_rows) for name, tensor in entry.tensors.items()}


def assert_same_rows(found, entry, num_rows):
    assert found.header == entry.header
    assert_same(Entry(entry.header, found.tensors), Entry(entry.header, first_rows(entry, num_rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
def test_the_first_rows_are_those_of_the_whole(bucket, chunk_bytes, dtype, monkeypatch):
    monkeypatch.setattr("backprompt.store.object.SMALL_BYTES", 0)
    monkeypatch.setattr("backprompt.store.file.CHUNK_BYTES", chunk_bytes)
    entry = make_entry(1, num_tokens=50, dtype=dtype)
    bucket.put(entry)
    for num_rows in (1, 2, 13, 25):
        assert_same_rows(bucket.get_beginning(entry.header.name, num_rows), entry, num_rows)
    assert_same(bucket.get_beginning(entry.header.name, 26), entry)  # more than half
    assert set(bucket.get_beginning(entry.header.name, 3, {"hidden"}).tensors) == {"hidden"}


def test_few_rows_of_a_long_entry_take_few_bytes(s3):
    store, entry = s3.store(prefix="rows"), make_entry(1, num_tokens=200_000)
    store.put(entry)
    header, *pieces = map(len, to_pieces(entry))

    def num_bytes_of(read):
        s3.num_bytes = 0
        found = read()
        return found, s3.num_bytes - max(header, 1 << 16)

    whole, num_bytes = num_bytes_of(lambda: store.get(entry.header.name))
    assert_same(whole, entry)
    assert num_bytes == sum(pieces) == 14_000_000
    rows, num_bytes = num_bytes_of(lambda: store.get_beginning(entry.header.name, 1000))
    assert_same_rows(rows, entry, 1000)
    # A chunk for each of the two heads' keys; what lies less than 1 MiB apart is one request.
    assert num_bytes < 0.55 * sum(pieces)


class CountingBucket:
    """A bucket that counts the bytes of the ranges that are read."""

    def __init__(self, bucket):
        self._bucket = bucket
        self.num_bytes = 0

    def __getattr__(self, name):
        return getattr(self._bucket, name)

    def get_ranges(self, path, *, starts, ends):
        self.num_bytes += sum(ends) - sum(starts)
        return self._bucket.get_ranges(path, starts=starts, ends=ends)


def test_texts_that_share_a_beginning_with_an_entry_read_the_rows_of_that(bucket, model, tokenizer, monkeypatch):
    """Stored is a b c d; read are a x, and then a b y, of which the entry has more rows than were read."""
    monkeypatch.setattr("backprompt.store.object.SMALL_BYTES", 0)
    monkeypatch.setattr("backprompt.store.file.CHUNK_BYTES", 64)
    writer = LM(model, tokenizer, store=bucket)
    writer.evaluate([Text(PROMPT, writer)])
    store = ObjectStore(bucket.url)
    counting = store._bucket = CountingBucket(store._bucket)
    plain, reader = LM(model, tokenizer), LM(model, tokenizer, store=store)
    num_bytes = []
    for beginning in (PROMPT[:8], PROMPT[:20], PROMPT):
        counting.num_bytes, before = 0, reader.stats
        logits = Text(f"{beginning}+", reader).logits
        torch.testing.assert_close(logits, Text(f"{beginning}+", plain).logits, rtol=1e-4, atol=1e-5)
        assert (reader.stats - before).tokens_computed <= 2
        num_bytes.append(counting.num_bytes)
    assert 0 < num_bytes[0] < num_bytes[1] < num_bytes[2] / 2
    together = LM(model, tokenizer, store=store)
    counting.num_bytes = 0
    found = together.evaluate([Text(f"{PROMPT[:stop]}+", together) for stop in (4, 8, 12, 20)])
    for stop, of in zip((4, 8, 12, 20), found, strict=True):
        torch.testing.assert_close(of.logits, Text(f"{PROMPT[:stop]}+", plain).logits, rtol=1e-4, atol=1e-5)
    assert together.stats.tokens_computed <= 8
    assert num_bytes[1] <= counting.num_bytes < 3 * num_bytes[1]


@pytest.mark.parametrize("small_bytes", [0, 1 << 20])
def test_flipped_bytes_never_give_a_wrong_tensor(bucket, small_bytes, monkeypatch, caplog):
    monkeypatch.setattr("backprompt.store.object.SMALL_BYTES", small_bytes)
    entry = make_entry(1)
    bucket.put(entry)
    (file,) = files_of(bucket, "entries")
    whole = file.read_bytes()
    for place in range(0, len(whole), 37):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 32]) + whole[place + 1 :])
        found = bucket.get(entry.header.name)
        assert found is None or found.header == entry.header
        if found is not None:
            assert_same(found, entry)
    for num_bytes in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:num_bytes])
        assert bucket.get(entry.header.name) is None
    assert files_of(bucket, "damaged")
    assert not files_of(bucket, "entries")
    assert "is damaged" in caplog.text


def test_an_entry_under_another_name_is_not_served(bucket):
    one, other = make_entry(1), make_entry(2)
    bucket.put(one)
    bucket.put(other)
    first, second = files_of(bucket, "entries")
    first.write_bytes(second.read_bytes())
    assert [bucket.get(entry.header.name) is None for entry in (one, other)].count(True) == 1


def test_an_end_with_a_hyphen_is_refused(bucket):
    entry = make_entry(1)
    with pytest.raises(DamagedEntryError, match="hyphen"):
        bucket.put(Entry(dataclasses.replace(entry.header, end="a-b"), entry.tensors))


# A network that fails


@pytest.fixture
def failing(s3):
    """The server, well again afterwards."""
    yield s3
    s3.delay_seconds, s3.cuts, s3.refuses = 0.0, False, False


FAULTS = {
    "slow": {"delay_seconds": 1.0},
    "cut off": {"cuts": True},
    "refused": {"refuses": True},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluation_goes_on_without_a_store_that_fails(fault, failing, model, tokenizer, caplog):
    texts = [PROMPT, PROMPT + "and more"]
    plain = LM(model, tokenizer)
    expected = [Text(text, plain).logits for text in texts]
    prefix = fault.replace(" ", "-")
    writer = LM(model, tokenizer, store=failing.store(prefix=prefix))
    writer.evaluate([Text(PROMPT, writer)])
    for name, value in FAULTS[fault].items():
        setattr(failing, name, value)
    quick = {"client_options": {"allow_http": True, "timeout": "0.3s"}}
    reader = LM(model, tokenizer, store=failing.store(prefix=prefix, **quick))
    for text, logits in zip(texts, expected, strict=True):
        torch.testing.assert_close(Text(text, reader).logits, logits)
    assert reader.stats.tokens_computed > 0
    read = [record for record in caplog.records if "cannot be read" in record.message]
    assert len(read) == 1
    assert "Evaluation goes on without this entry" in read[0].message


def test_a_store_that_cannot_be_written_to_is_said_once(failing, model, tokenizer, caplog):
    lm = LM(model, tokenizer, store=failing.store(prefix="unwritten"))
    Text("a b", lm).logits  # noqa: B018  # looks for the beginning
    failing.refuses = True
    expected = Text(PROMPT, LM(model, tokenizer)).logits
    for _ in range(2):
        torch.testing.assert_close(Text(PROMPT, lm).logits, expected)
    assert sum("Evaluation goes on" in record.message for record in caplog.records) in (1, 2)  # reading, and writing


def test_objects_that_are_gone_are_computed_again(bucket, model, tokenizer):
    expected = Text(PROMPT, LM(model, tokenizer, store=bucket)).logits
    shutil.rmtree(path_of(bucket) / "entries")
    reader = LM(model, tokenizer, store=ObjectStore(bucket.url))
    torch.testing.assert_close(Text(PROMPT, reader).logits, expected)
    assert reader.stats.tokens_computed > 0


def test_wrong_keys_say_what_to_check(s3):
    store = s3.store(secret="WRONGKEY1")
    with pytest.raises(OSError, match="Check the keys") as caught:
        store.put(make_entry(1))
    assert caught.value.errno == errno.EACCES


def test_an_address_that_nobody_listens_at_says_what_to_check():
    store = ObjectStore(
        "s3://bucket/prompts",
        config={"endpoint": "http://127.0.0.1:9", "access_key_id": "x", "secret_access_key": "y", "region": "z"},
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    for ask in (
        lambda: store.get(make_entry(1).header.name),
        lambda: store.longest("root", [1]),
        lambda: store.goes_on("root", [1]),
        lambda: list(store.list()),
    ):
        with pytest.raises(OSError, match="Check the address") as caught:
            ask()
        assert caught.value.errno == errno.EIO


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on_without_the_bucket(s3, bucket):
    entry, stores = make_entry(1), (s3.store(prefix="forked"), bucket)
    for store in stores:
        store.put(entry)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # obstore would wait forever
        try:
            for store in stores:
                with pytest.raises(OSError, match=r"forked.*'spawn'"):
                    store.get(entry.header.name)
        except BaseException:  # a child of a test must not go on as another pytest
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for store in stores:
        assert_same(store.get(entry.header.name), entry)


# Names of stores


def test_a_url_names_a_bucket_and_a_path_a_folder(tmp_path, model, tokenizer):
    assert isinstance(open_store(f"file://{tmp_path}/bucket"), ObjectStore)
    assert isinstance(open_store(tmp_path / "prompts.bp"), DiskStore)
    assert isinstance(open_store("memory:///"), ObjectStore)
    expected = Text(PROMPT, LM(model, tokenizer)).logits
    for tokens_computed in (None, 0):
        lm = LM(model, tokenizer, store=f"file://{tmp_path}/bucket")
        torch.testing.assert_close(Text(PROMPT, lm).logits, expected)
        assert tokens_computed is None or lm.stats.tokens_computed == tokens_computed


@pytest.mark.parametrize("url", ["ftp://host/prompts", "s3://", "nonsense://x"])
def test_a_url_that_names_no_store(url):
    with pytest.raises(ValueError, match="No store can be opened at"):
        open_store(url)


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="No store can be opened at"):
        ObjectStore("s3://bucket/prompts", config={"nonsense": 3})


def test_without_obstore(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MissingDependencyError, match="pip install obstore"):
        ObjectStore("s3://bucket/prompts")


# A near store


class Counting(MemoryStore):
    """Counts the entries that are read from it."""

    num_read = 0

    def get(self, name, tensors=None):
        self.num_read += 1
        return super().get(name, tensors)


def test_an_entry_is_read_from_far_away_once(tmp_path):
    far, entry = Counting(), make_entry(1)
    far.put(entry)
    for _ in range(2):
        with CachedStore(far, DiskStore(tmp_path / "cache.bp")) as store:
            assert_same(store.get(entry.header.name, {"hidden"}), entry, {"hidden"})
            assert_same(store.get(entry.header.name), entry)
            assert store.longest("root", entry.header.token_ids) == Match(entry.header.name, 3)
            assert store.goes_on("root", entry.header.token_ids[:2])
            assert not store.goes_on("root", entry.header.token_ids)
    assert far.num_read == 1


def test_an_entry_goes_on_in_either_store_or_in_a_store_that_knows_no_better():
    far, near = MemoryStore(), MemoryStore()
    far.put(make_entry(1, start="far"))
    near.put(make_entry(1, start="near"))
    store = CachedStore(far, near)
    assert [store.goes_on(start, ()) for start in ("far", "near", "root")] == [True, True, False]

    class Plain(MemoryStore):
        goes_on = Store.goes_on

    assert CachedStore(Plain(), near).goes_on("root", ())
    assert CachedStore(far, Plain()).goes_on("root", ())


def test_a_near_store_keeps_to_its_budget(tmp_path):
    far, near = MemoryStore(), DiskStore(tmp_path / "cache.bp", max_bytes=6_000)
    store = CachedStore(far, near)
    for number in range(8):
        store.put(make_entry(number))
    assert near.stats().num_bytes <= 6_000
    assert 0 < near.stats().num_entries < 8
    for number in range(8):
        assert_same(store.get(make_entry(number).header.name), make_entry(number))


@pytest.mark.parametrize("max_bytes", [1, None])
def test_a_near_store_that_keeps_nothing_harms_nothing(tmp_path, max_bytes, monkeypatch, caplog):
    near = DiskStore(tmp_path / "cache.bp", max_bytes=max_bytes)
    if max_bytes is None:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("backprompt.store.folder.os.fsync", full)
    store = CachedStore(MemoryStore(), near)
    store.put(make_entry(1))
    assert_same(store.get(make_entry(1).header.name), make_entry(1))
    assert ("keeps no copy" in caplog.text) == (max_bytes is None)


def test_a_far_store_that_cannot_be_read_leaves_the_near_one(failing, tmp_path, caplog):
    near = DiskStore(tmp_path / "cache.bp")
    store = CachedStore(failing.store(prefix="far"), near)
    kept, far_only = make_entry(1), make_entry(2)
    store.put(kept)
    store.far.put(far_only)
    failing.refuses = True
    again = CachedStore(failing.store(prefix="far"), near)
    assert not again.goes_on("root", far_only.header.token_ids[:2])
    assert again.goes_on("root", kept.header.token_ids[:2])
    for entry, expected in ((far_only, None), (kept, Match(kept.header.name, 3))):
        for _ in range(2):
            assert again.longest("root", entry.header.token_ids) == expected
    assert_same(again.get(kept.header.name), kept)
    assert again.get(far_only.header.name) is None
    assert [header.name for header in again.list()] == [kept.header.name]
    assert caplog.text.count("cannot be read") == 1


def test_stores_of_two_precisions_are_not_put_one_before_the_other():
    with pytest.raises(ValueError, match="open both with the same dtype"):
        CachedStore(MemoryStore(), MemoryStore(dtype="int8"))
    assert CachedStore(MemoryStore(persist="never"), MemoryStore()).persist == "never"
