"""The claims of a store, with right checksums: impossible entries are set aside, and change no number."""

import copy
import dataclasses
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, Text, evaluate
from backprompt.cli import main
from backprompt.errors import EntryTooLargeError
from backprompt.store import DiskStore, Entry, Header, MemoryStore
from comparing import assert_close
from reference import plain_logits
from stores import file_of
from tiny_models import FAMILIES

IDS = tuple(range(5, 45))
LONGER = (*IDS, 3, 7)


class File:
    """An entry's file in parts, and what they make together, with right checksums of the header."""

    def __init__(self, content):
        length = int.from_bytes(content[:8], "little")
        self.table = json.loads(content[8 : 8 + length])
        metadata = self.table.pop("__metadata__")
        self.format = metadata["format"]
        self.entry = json.loads(metadata["entry"])
        self.checksums = json.loads(metadata["checksums"])
        self.data = content[8 + length :]

    def content(self, change_text=lambda text: text):
        metadata = {"format": self.format, "entry": json.dumps(self.entry), "checksums": json.dumps(self.checksums)}
        table = {"__metadata__": metadata, **self.table}
        metadata["check"] = str(zlib.crc32(json.dumps(table, sort_keys=True).encode()))
        described = change_text(json.dumps(table)).encode()
        return len(described).to_bytes(8, "little") + described + self.data

    def drop(self, name):
        """Leave out a tensor, its bytes too, so that the rest still tiles the file."""
        start, stop = self.table.pop(name)["data_offsets"]
        self.checksums.pop(name)
        self.data = self.data[:start] + self.data[stop:]
        for described in self.table.values():
            if described["data_offsets"][0] >= stop:
                described["data_offsets"] = [offset - (stop - start) for offset in described["data_offsets"]]

    def set(self, name, tensor, dtype="F32"):
        """Put a tensor in place of another one, or add it, at the end of the file."""
        if name in self.table:
            self.drop(name)
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        place = [len(self.data), len(self.data) + len(data)]
        self.table[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": place}
        self.checksums[name] = [zlib.crc32(data)]
        self.data += data


def changed(**fields):
    return lambda file: file.entry.update(fields)


def described(**parts):
    return lambda file: file.table["keys.0"].update(parts)


def without(field):
    return lambda file: file.entry.pop(field)


def sparse_terabytes(file):
    file.table["keys.0"].update(shape=[4, 40, 1 << 37], data_offsets=[0, 4 * 40 * 4 << 37])


def shifted(file):
    file.table["keys.0"]["data_offsets"] = [offset + 4 for offset in file.table["keys.0"]["data_offsets"]]


def two_in_one_place(file):
    file.table["keys.0"]["data_offsets"] = file.table["values.0"]["data_offsets"]


CHANGES = {
    "a tensor is missing": lambda file: file.drop("keys.1"),
    "hidden states are missing": lambda file: file.drop("hidden"),
    "log-probabilities are missing": lambda file: file.drop("logprobs"),
    "a tensor too many": lambda file: file.set("extra", torch.zeros(40)),
    "a layer without values": lambda file: file.set("keys.2", torch.zeros(4, 40, 8)),
    "a layer far away": lambda file: file.set("keys.999999", torch.zeros(4, 40, 8)),
    "a scale in an exact entry": lambda file: file.set("keys.0.scale", torch.zeros(4, 40, 1)),
    "a scale of nothing": lambda file: file.set("x.scale", torch.zeros(4, 40, 1)),
    "a name with another zero": lambda file: file.set("keys.00", torch.zeros(4, 40, 8)),
    "no tensors": lambda file: [file.drop(name) for name in list(file.table)],
    "a tensor described by a number": lambda file: file.table.update({"keys.0": 3}),
    "a tensor without a shape": lambda file: file.table["keys.0"].pop("shape"),
    "a tensor described by more": described(more=1),
    "a shape of a string": described(shape="4, 40, 8"),
    "a shape of strings": described(shape=["4", "40", "8"]),
    "a negative shape": described(shape=[-4, 40, -8]),
    "a shape of 2 ** 70": described(shape=[1 << 70, 40, 8]),
    "a shape of a fraction": described(shape=[4.0, 40, 8]),
    "a shape of flags": described(shape=[True, 40, 8]),
    "a shape of nothing": described(shape=[]),
    "a shape of many axes": described(shape=[1] * 70),
    "a shape of zero": described(shape=[4, 0, 8], data_offsets=[0, 0]),
    "140 terabytes": sparse_terabytes,
    "offsets of strings": described(data_offsets=["0", "5120"]),
    "negative offsets": described(data_offsets=[-5120, 0]),
    "offsets of 2 ** 70": described(data_offsets=[0, 1 << 70]),
    "one offset": described(data_offsets=[0]),
    "offsets that leave a gap": shifted,
    "offsets that overlap": two_in_one_place,
    "another dtype": described(dtype="I32"),
    "a dtype that is none": described(dtype="F31"),
    "a dtype of a list": described(dtype=["F32"]),
    "the dtype of log-probabilities": lambda file: file.set("logprobs", torch.zeros(40).half(), "F16"),
    "the dtype of flags": lambda file: file.set("has_logprobs", torch.zeros(40, dtype=torch.int8), "I8"),
    "int8 without scales": lambda file: file.set("keys.0", torch.zeros(4, 40, 8, dtype=torch.int8), "I8"),
    "one row": lambda file: file.set("keys.0", torch.zeros(4, 1, 8)),
    "one hidden state": lambda file: file.set("hidden", torch.zeros(1, 32)),
    "hidden states in a row": lambda file: file.set("hidden", torch.zeros(40 * 32)),
    "data behind the data": lambda file: setattr(file, "data", file.data + b"12345678"),
    "data cut off": lambda file: setattr(file, "data", file.data[:-8]),
    "no checksum": lambda file: file.checksums.pop("keys.0"),
    "no checksums of a tensor": lambda file: file.checksums.update({"keys.0": []}),
    "a checksum of a string": lambda file: file.checksums.update({"keys.0": ["1"]}),
    "a checksum for nothing": lambda file: file.checksums.update({"nothing": [1]}),
    "a checksum too many": lambda file: file.checksums["keys.0"].append(1),
    "checksums of a list": lambda file: setattr(file, "checksums", [1, 2]),
    "an entry of a list": lambda file: setattr(file, "entry", [1]),
    "an entry of null": lambda file: setattr(file, "entry", None),
    "a field too many": changed(more=1),
    "no start": without("start"),
    "no token ids": without("token_ids"),
    "token ids of nothing": changed(token_ids=[]),
    "token ids of a string": changed(token_ids="abc"),
    "token ids of strings": changed(token_ids=["a"] * 40),
    "token ids of 2 ** 70": changed(token_ids=[1 << 70] * 40),
    "negative token ids": changed(token_ids=[-1] * 40),
    "fewer token ids": changed(token_ids=list(IDS[:-1])),
    "a position of a string": changed(position="0"),
    "a position of 2 ** 70": changed(position=1 << 70),
    "a negative position": changed(position=-1),
    "a position at the end of all": changed(position=(1 << 63) - 2),
    "a text of a number": changed(text=5),
    "a model of a number": changed(model=5),
    "a model of half a character": changed(model="\ud800"),
    "a dtype of null": changed(dtype=None),
    "an error that is not a number": changed(error=float("nan")),
    "an infinite error": changed(error=float("inf")),
    "a negative error": changed(error=-1.0),
    "an error of a string": changed(error="0"),
    "an unknown exactness": changed(exactness="int4"),
    "fewer bits of nothing": changed(exactness="int8"),
    "dtypes in an exact entry": changed(dtypes={"keys": "float32"}),
    "dtypes of a list": changed(dtypes=["float32"]),
    "behind a path": changed(behind=["../../x"]),
    "behind a string": changed(behind="abc"),
    "a start of a path": changed(start="../../x"),
    "an end of null": changed(end=None),
    "an end with a line": changed(end="a\n"),
    "a format of words": lambda file: setattr(file, "format", "one"),
}
"""Errors for any model."""

OF_ANOTHER_MODEL = {
    "a head fewer": lambda file: file.set("keys.0", torch.zeros(3, 40, 8)),
    "a smaller head": lambda file: file.set("values.1", torch.zeros(4, 40, 4)),
    "another dtype of keys": lambda file: file.set("keys.1", torch.zeros(4, 40, 8).half(), "F16"),
    "another dtype of all": lambda file: [
        file.set(name, torch.zeros(4, 40, 8).half(), "F16") for name in ("keys.0", "keys.1", "values.0", "values.1")
    ],
    "a layer more": lambda file: [file.set(f"{kind}.2", torch.zeros(4, 40, 8)) for kind in ("keys", "values")],
    "a layer fewer": lambda file: [file.drop(f"{kind}.1") for kind in ("keys", "values")],
    "a larger hidden state": lambda file: file.set("hidden", torch.zeros(40, 33)),
    "hidden states of another dtype": lambda file: file.set("hidden", torch.zeros(40, 32).half(), "F16"),
    "another model's name": changed(model="m"),
    "another dtype of the computation": changed(dtype="torch.float16"),
    "another position": changed(position=3),
}
"""Errors for this model."""

TEXT_CHANGES = {
    "nested deeply": lambda text: "[" * 100_000 + text,
    "an object nested deeply": lambda text: '{"a":' * 100_000 + text,
    "not a number": lambda text: text.replace('"shape": [4,', '"shape": [NaN,'),
    "a number too long": lambda text: text.replace('"shape": [4,', f'"shape": [{"4" * 5000},'),
    "an infinite shape": lambda text: text.replace('"shape": [4,', '"shape": [1e999,'),
    "a name twice": lambda text: text.replace('"shape": [4,', '"shape": [1], "shape": [4,'),
    "a tensor twice": lambda text: text[:-1] + ', "keys.0": 1}',
    "a list": lambda text: f"[{text}]",
    "a string": lambda text: json.dumps(text),
    "half of it": lambda text: text[: len(text) // 2],
    "half a character": lambda text: text.replace("keys", "\\ud800"),
    "nothing": lambda text: "{}",
    "empty": lambda text: "",
    "metadata of a number": lambda text: '{"__metadata__": 1}',
    "metadata of numbers": lambda text: '{"__metadata__": {"check": 1}}',
    "no metadata": lambda text: text.replace("__metadata__", "metadata"),
}


def of_length(length):
    return lambda content: length.to_bytes(8, "little") + content[8:]


RAW_CHANGES = {
    "a header of 2 ** 63 bytes": of_length(1 << 63),
    "a header of 2 ** 64 - 1 bytes": of_length((1 << 64) - 1),
    "a header of 30 megabytes": of_length(30_000_000),
    "a header of no bytes": of_length(0),
    "a header that is not text": lambda content: content[:8] + b"\xff\xfe" * 50 + content[108:],
    "a length cut off": lambda content: content[:3],
    "nothing": lambda content: b"",
}


def broken_contents(content, model_too=True):
    """Yield each way to break the file, and what it is then."""
    for what, change in (CHANGES | OF_ANOTHER_MODEL if model_too else CHANGES).items():
        file = File(content)
        change(file)
        yield what, file.content()
    for what, change in TEXT_CHANGES.items():
        yield what, File(content).content(change)
    for what, change in RAW_CHANGES.items():
        yield what, change(content)


@pytest.fixture(autouse=True)
def without_waiting_for_disks(monkeypatch):
    monkeypatch.setattr("backprompt.store.folder.os.fsync", lambda _: None)


@pytest.fixture
def stored(model, tokenizer, tmp_path):
    """An LM that stores nothing by itself, its store, the one entry's file in it, and the file's content."""
    with DiskStore(tmp_path / "prompts.bp", persist="explicit") as store:
        lm = LM(model, tokenizer, store=store)
        Text.from_tokens(IDS, lm).save()
        (file,) = store.path.glob("entries/*/*")
        yield lm, store, file, file.read_bytes()


def overwrite(store, entry, content):
    """Let the index know of an entry whose file is another one."""
    store.put(entry)
    file_of(store, entry.header.name).write_bytes(content)


def assert_right(model, lm, ids):
    found = Text.from_tokens(ids, lm).logits
    assert_close(found, plain_logits(model, ids)[-1])


def test_the_file_as_it_is_put_together_here_is_sound(model, stored):
    """Otherwise the changes below would not be the only errors."""
    lm, store, file, content = stored
    file.write_bytes(File(content).content())
    lm.clear()
    assert_right(model, lm, LONGER)
    assert lm.stats.tokens_loaded == len(IDS)
    assert list(store.verify()) == []


def test_no_header_gives_a_wrong_number_or_an_error(model, stored, caplog):
    """Any broken entry is reported and set aside, and its tokens are computed."""
    lm, store, file, content = stored
    aside, entry = store.path / "damaged" / file.name, store.get(file.stem)
    for what, broken in broken_contents(content):
        overwrite(store, entry, broken)
        caplog.clear()
        lm.clear()
        assert_right(model, lm, LONGER)  # the longer text needs keys and values
        assert aside.read_bytes() == broken, what
        assert caplog.text.count("is damaged") == 1, what
        assert not store.contains(file.stem), what
        aside.unlink()


def test_no_header_stops_whoever_looks_into_the_store(stored, caplog, capsys):
    _, store, file, content = stored
    name, path, entry = file.stem, str(store.path), store.get(file.stem)
    for what, broken in broken_contents(content, model_too=False):
        for look, expected in [
            (lambda: store.verify(), [name]),
            (lambda: [header.name for header in store.find("")], []),
            (lambda: store.get(name), None),
            (lambda: (store.rebuild(), store.stats().num_entries)[1], 0),
            (lambda: main(["store", "verify", path]), 1),
            (lambda: main(["store", "ls", path, "--json"]), 0),
            (lambda: main(["store", "find", path, ""]), 1),
        ]:
            overwrite(store, entry, broken)
            assert look() == expected, what
            assert not file.exists(), what
        file.write_bytes(broken)
        assert main(["store", "stat", path]) == 0, what
        assert main(["store", "prune", path, "0"]) == 0, what
    assert "Traceback" not in capsys.readouterr().err


PLACES = ["table", "entry", "checksums"]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([1 << 31, 1 << 63, (1 << 63) - 1, 1 << 64, 1 << 70, -1, 0, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-3, 50), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places_in(value, path=()):
    """Yield where something stands in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places_in(part, (*path, key))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_any_values_gives_a_wrong_number_or_an_error(data, model, stored):
    lm, store, file, content = stored
    changing = File(content)
    for _ in range(data.draw(st.integers(1, 3))):
        part = getattr(changing, data.draw(st.sampled_from(PLACES)))
        path = data.draw(st.sampled_from(sorted(places_in(part), key=repr)))
        for key in path[:-1]:
            part = part[key]
        if data.draw(st.booleans()):
            part[path[-1]] = data.draw(VALUES)
        elif isinstance(part, dict):
            part[data.draw(st.text(max_size=8))] = part.pop(path[-1])
        if not all((changing.table, changing.entry, changing.checksums)):
            break
    file.write_bytes(changing.content())
    store.rebuild()
    if file.exists():
        list(store.list())
        assert list(store.verify()) == [] or not file.exists()
    if not file.exists():
        file.write_bytes(changing.content())
    lm.clear()
    assert_right(model, lm, LONGER)


@pytest.mark.parametrize("stored_dtype", ["float16", "int8"])
def test_fewer_bits_that_contradict_each_other(stored_dtype, model, tokenizer, tmp_path):
    store = DiskStore(tmp_path / "prompts.bp", dtype=stored_dtype, persist="explicit")
    Text.from_tokens(IDS, LM(model, tokenizer, store=store)).save()
    (file,) = store.path.glob("entries/*/*")
    content, entry = file.read_bytes(), store.get(file.stem)
    again = LM(model, tokenizer, store=store)
    evaluate(Text.from_tokens(LONGER, again))
    assert again.stats.tokens_loaded == len(IDS)
    half, quarter = torch.zeros(4, 40, 8).half(), torch.zeros(4, 40, 8, dtype=torch.int8)
    changes = [
        changed(dtypes={}),
        changed(dtypes={"keys": "float32", "values": "float32"}),
        changed(dtypes={"keys": "float16", "values": "float32", "hidden": "float32"}),
        changed(dtypes={"keys": [], "values": "float32", "hidden": "float32"}),
        changed(dtypes={"keys": "int8", "values": "float32", "hidden": "float32"}),
        changed(exactness="exact"),
        changed(exactness="float16" if stored_dtype == "int8" else "int8"),
        lambda file: file.set("keys.0", half, "F16") if stored_dtype == "int8" else file.set("keys.0", quarter, "I8"),
        lambda file: file.set("hidden", torch.zeros(40, 32, dtype=torch.int8), "I8"),
        lambda file: file.set("keys.0.scale", torch.zeros(4, 1, 1)),
        lambda file: file.set("values.1.scale", torch.zeros(4, 40, 1).half(), "F16"),
    ]
    for idx, change in enumerate(changes):
        broken = File(content)
        change(broken)
        overwrite(store, entry, broken.content())
        again.clear()
        assert_right(model, again, LONGER)
        assert not file.exists(), idx


class Handing(MemoryStore):
    """A custom store, which hands out changed entries."""

    def __init__(self):
        super().__init__()
        self.change = None
        self.aside = []

    def get(self, name, tensors=None):
        entry = super().get(name, tensors)
        return entry if entry is None or self.change is None else self.change(entry)

    def set_aside(self, name, reason):
        self.aside.append(reason)
        super().set_aside(name, reason)


def with_tensor(name, change):
    def changing(entry):
        tensors = {n: change(t) if n == name else t for n, t in entry.tensors.items()}
        return Entry(entry.header, {n: t for n, t in tensors.items() if t is not None})

    return changing


def with_header(**fields):
    return lambda entry: Entry(dataclasses.replace(entry.header, **fields), entry.tensors)


@pytest.mark.parametrize(
    "change",
    [
        with_tensor("keys.0", lambda tensor: tensor[:3]),
        with_tensor("keys.1", lambda tensor: tensor[:, :20]),
        with_tensor("values.0", lambda tensor: tensor[..., :4]),
        with_tensor("values.1", lambda tensor: tensor.double()),
        with_tensor("values.1", lambda tensor: None),
        with_tensor("hidden", lambda tensor: tensor[:, :16]),
        with_tensor("hidden", lambda tensor: None),
        with_tensor("logprobs", lambda tensor: tensor[:1]),
        with_header(token_ids=list(IDS)),
        with_header(token_ids=IDS[:-1]),
        with_header(error=None),
        with_header(position=1),
        with_header(model="m"),
        with_header(end="x"),
        with_header(exactness="int8"),
    ],
)
def test_what_any_store_hands_out_is_compared_with_the_model(change, model, tokenizer, caplog):
    store = Handing()
    evaluate(Text.from_tokens(IDS, LM(model, tokenizer, store=store)))
    store.change = change
    lm = LM(model, tokenizer, store=store)
    assert_right(model, lm, LONGER)
    assert len(store.aside) == 1
    assert "is damaged" in caplog.text
    store.change = None
    lm = LM(model, tokenizer, store=store)
    assert_right(model, lm, LONGER)
    assert lm.stats.tokens_loaded >= len(IDS)  # the text was stored again


def test_a_store_that_hands_out_more_than_was_asked_for_serves(model, tokenizer):
    class Generous(MemoryStore):
        def get(self, name, tensors=None):
            return super().get(name)

    store = Generous()
    evaluate(Text.from_tokens(IDS, LM(model, tokenizer, store=store)))
    lm = LM(model, tokenizer, store=store)
    assert_right(model, lm, IDS)
    assert lm.stats.tokens_computed == 0


def test_a_damaged_entry_that_cannot_be_set_aside_is_not_used(model, stored, monkeypatch, caplog):
    lm, _, file, content = stored
    broken = File(content)
    broken.set("keys.0", torch.zeros(3, 40, 8))
    file.write_bytes(broken.content())
    lm.clear()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("backprompt.store.folder.os.replace", refuse)
    assert_right(model, lm, LONGER)
    assert_right(model, lm, LONGER)
    assert "cannot be set aside" in caplog.text


def test_an_entry_of_no_structure_is_not_put(stored):
    _, store, file, _ = stored
    entry = store.get(file.stem)
    header = dataclasses.replace(entry.header, end="another")
    with pytest.raises(ValueError, match="lacks the tensor 'hidden'"):
        store.put(Entry(header, {name: tensor for name, tensor in entry.tensors.items() if name != "hidden"}))
    with pytest.raises(ValueError, match="token ids"):
        store.put(Entry(dataclasses.replace(header, token_ids=()), entry.tensors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backprompt.store.file.MAX_HEADER_BYTES", 500)
        with pytest.raises(EntryTooLargeError, match="40 tokens"):
            store.put(Entry(header, entry.tensors))
    assert [header.name for header in store.list()] == [file.stem]


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices have names")
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_an_entry_that_is_no_file_is_set_aside_at_once(kind, model, stored):
    """Opening a pipe waits for a writer; reading a device may never end."""
    import socket

    lm, store, file, _ = stored
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        folder = Path.cwd()
        os.chdir(file.parent)  # a socket's path is short
        try:
            with socket.socket(socket.AF_UNIX) as opened:
                opened.bind(file.name[-40:])
                os.rename(file.name[-40:], file.name)
        finally:
            os.chdir(folder)
    lm.clear()
    assert_right(model, lm, LONGER)
    store.verify()
    store.rebuild()
    assert store.stats().num_entries <= 1
    if kind != "socket":  # opening one is an error of the system
        assert (store.path / "damaged" / file.name).is_symlink() or (store.path / "damaged" / file.name).is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="sparse files")
def test_a_file_larger_than_memory_is_one_entry_less(stored, monkeypatch, caplog):
    """The file is long enough for its header, and costs nothing on the disk."""
    _, store, file, content = stored
    made = torch.empty

    def refuse(*arguments, **options):
        if options.get("dtype") is torch.float32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("backprompt.store.file.torch.empty", refuse)
        assert store.get(file.stem) is None
    assert "no room for" in caplog.text
    assert file.read_bytes() == content  # the file is not damaged
    assert store.get(file.stem) is not None


def test_headers_are_plain_data():
    """A header has only JSON's own types, so that a file names no code."""
    header = Header("s", "e", 0, (1,), "t", "m", "k", "torch.float32")
    assert json.loads(json.dumps(dataclasses.asdict(header)))["token_ids"] == [1]
    assert copy.deepcopy(header) == header


def test_families_with_other_layouts_are_served(tokenizer):
    """Heads of keys and values fewer than queries', of another size, one for all."""
    for family in ("llama", "gemma", "gpt_oss", "qwen3"):
        model, store = FAMILIES[family](), MemoryStore()
        evaluate(Text.from_tokens(IDS, LM(model, tokenizer, store=store)))
        lm = LM(model, tokenizer, store=store)
        assert_right(model, lm, LONGER)
        assert lm.stats.tokens_loaded == len(IDS)
