"""A remembered content hash is that of the weights in memory, whatever happens to files, memory and models."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from backprompt import LM, Text, load
from backprompt.model import checkpoint
from backprompt.model.checkpoint import Checkpoint
from backprompt.model.weights import content_hash
from backprompt.session import fingerprint as fingerprint_module
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where hashes are remembered; empty."""
    monkeypatch.setenv("BACKPROMPT_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _files_settle_at_once(home, monkeypatch):
    """Instead of after two seconds, which each test would have to wait."""
    monkeypatch.setattr(checkpoint, "RACY_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model")


@pytest.fixture
def hashed(monkeypatch):
    """One element for each time that every weight was hashed."""
    calls = []

    def counted(model):
        calls.append(model)
        return content_hash(model)

    monkeypatch.setattr(fingerprint_module, "content_hash", counted)
    return calls


def save(folder, seed=0, **options):
    FAMILIES["llama"](seed=seed).save_pretrained(folder, **options)
    byte_level_bpe().save_pretrained(folder)
    return folder


def fingerprint(name, **options):
    return load(name, device="cpu", **options).fingerprint


def computed(name):
    """The same, of a model that `load` knows nothing of."""
    return LM(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)).fingerprint


def remembered(home):
    return sorted(home.glob("weights/*"))


# Remembered


def test_a_second_load_hashes_nothing(folder, hashed, home):
    expected = computed(folder)
    assert len(hashed) == 1
    assert [fingerprint(folder) for _ in range(3)] == [expected] * 3
    assert len(hashed) == 2
    assert len(remembered(home)) == 1


def test_nor_does_a_load_in_another_process_by_another_path(folder, hashed, tmp_path):
    expected = fingerprint(folder)
    (tmp_path / "link").symlink_to(folder)
    code = (
        "from backprompt import load\n"
        "from backprompt.model import checkpoint\n"
        "from backprompt.session import fingerprint\n"
        "checkpoint.RACY_SECONDS = 0\n"
        "fingerprint.content_hash = None\n"
        "print(load('link', device='cpu').fingerprint)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONHASHSEED": "1234"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert printed.split()[-1] == expected
    assert len(hashed) == 1


def test_with_a_store_the_first_evaluation_hashes_nothing_either(folder, hashed, tmp_path):
    for _ in range(2):
        text = Text("Question: 12 + 34? The cat sat on the mat.", load(folder, device="cpu", store=tmp_path / "store"))
        text.logits  # noqa: B018
    assert text.lm.stats.tokens_loaded > 0
    assert len(hashed) == 1


def test_each_dtype_is_remembered(folder, hashed):
    fingerprints = [fingerprint(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16) * 2]
    assert fingerprints[:2] == fingerprints[2:]
    assert fingerprints[0] != fingerprints[1]
    assert len(hashed) == 2


def test_shards_are_remembered(tmp_path, hashed):
    folder = save(tmp_path / "shards", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert fingerprint(folder) == fingerprint(folder) == computed(folder)
    assert len(hashed) == 2


@pytest.fixture
def hub_id(tmp_path, monkeypatch):
    """A model in the hub's cache, as a download leaves it: links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--model"
    for part in ("refs", "blobs", "snapshots/" + "1" * 40):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    for file in save(tmp_path / "model").iterdir():
        file.rename(repository / "blobs" / file.name)
        (repository / "snapshots" / ("1" * 40) / file.name).symlink_to(f"../../blobs/{file.name}")
    return "somebody/model"


def test_a_model_in_the_hubs_cache_is_remembered(hub_id, hashed, tmp_path):
    assert fingerprint(hub_id) == fingerprint(hub_id)
    assert len(hashed) == 1
    os.utime(tmp_path / "hub" / "models--somebody--model" / "blobs" / "model.safetensors")
    fingerprint(hub_id)
    assert len(hashed) == 2


def test_which_of_two_snapshots_is_read_is_in_doubt(hub_id, hashed, tmp_path, home):
    snapshots = tmp_path / "hub" / "models--somebody--model" / "snapshots"
    shutil.copytree(snapshots / ("1" * 40), snapshots / ("2" * 40), symlinks=True)
    assert fingerprint(hub_id) == fingerprint(hub_id)
    assert len(hashed) == 2
    assert remembered(home) == []


def test_a_snapshot_that_arrives_while_a_model_is_loaded_may_be_what_was_loaded(hub_id, home, monkeypatch, tmp_path):
    repository = tmp_path / "hub" / "models--somebody--model"
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def download_and_load(*args, **kwargs):
        save(repository / "snapshots" / ("2" * 40), seed=1)
        (repository / "refs" / "main").write_text("2" * 40)
        return from_pretrained(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", download_and_load)
        after = fingerprint(hub_id)
    assert after == fingerprint(hub_id) == fingerprint(repository / "snapshots" / ("2" * 40))
    assert len(remembered(home)) == 1  # of the folder, which was asked for by its path


# Files that change


def rewrite(folder):
    save(folder, seed=1)


def rewrite_in_place(folder):
    """With its size and time of modification kept."""
    file, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    before, tensors["lm_head.weight"][3, 5] = file.stat(), 7.0
    save_file(tensors, folder.parent / "other", metadata={"format": "pt"})
    file.write_bytes((folder.parent / "other").read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def configure(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def swap_with_older(folder):
    """A rename changes no time of a file."""
    file, older = folder / "model.safetensors", folder.parent / "older" / "model.safetensors"
    os.utime(older, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    os.replace(older, file)


def touch(folder):
    os.utime(folder / "model.safetensors")


def add(folder):
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("")


FILE_CHANGES = {
    "other weights": (rewrite, True),
    "one weight, in place": (rewrite_in_place, True),
    "another file in its place": (swap_with_older, True),
    "the configuration": (configure, True),
    "a touch": (touch, False),
    "one more file, further down": (add, False),
}


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_changed_files_are_hashed_again(change, folder, hashed):
    save(folder.parent / "older", seed=1)
    before = fingerprint(folder)
    change, is_another_model = FILE_CHANGES[change]
    change(folder)
    after = fingerprint(folder)
    assert len(hashed) == 2
    assert after == computed(folder)
    assert (after != before) == is_another_model
    assert fingerprint(folder) == after
    assert len(hashed) == 3  # the second was `computed`


def test_files_written_just_now_are_not_remembered(folder, hashed, home, monkeypatch):
    monkeypatch.setattr(checkpoint, "RACY_SECONDS", 60.0)
    assert fingerprint(folder) == fingerprint(folder)
    assert len(hashed) == 2
    assert remembered(home) == []


def test_files_that_changed_while_they_were_loaded_are_not_remembered(folder, hashed, home, monkeypatch):
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def load_and_touch(*args, **kwargs):
        loaded = from_pretrained(*args, **kwargs)
        touch(folder)
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_touch)
        expected = fingerprint(folder)
    assert remembered(home) == []
    assert fingerprint(folder) == expected
    assert len(hashed) == 2


@pytest.mark.parametrize("is_known", [True, False])
def test_files_that_changed_after_they_were_loaded_say_nothing(is_known, folder, hashed, home):
    """Weights may be mapped into memory from the file, and then show changes of the file."""
    if is_known:
        fingerprint(folder)
    loaded, before = load(folder, device="cpu"), (remembered(home), len(hashed))
    rewrite_in_place(folder)
    assert loaded.fingerprint == LM(loaded.model, loaded.tokenizer).fingerprint
    assert len(hashed) == before[1] + 2
    assert remembered(home) == before[0]
    assert fingerprint(folder) == computed(folder)


def test_what_has_the_same_name_in_another_disk_image_is_told_apart(folder, hashed, monkeypatch):
    """Where all times are set to one, and a file of the same size has the same place."""
    files = checkpoint.files_in(folder)
    monkeypatch.setattr(checkpoint, "files_in", lambda folder: files)
    first = fingerprint(folder)
    for change in (rewrite, configure):
        change(folder)
        assert fingerprint(folder) == computed(folder) != first
    assert len(hashed) == 1 + 2 * 2


# Files that do not decide about all weights


def with_a_missing_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_an_adapter(folder):
    model = peft.get_peft_model(FAMILIES["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(folder.parent / "adapter")
    byte_level_bpe().save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


def with_shards_elsewhere(folder):
    save(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(index["weight_map"].values())[0]
    (folder / first).rename(folder.parent / first)
    index["weight_map"] = {n: f"../{s}" if s == first else s for n, s in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def with_a_linked_folder(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder / "more").symlink_to("../elsewhere")
    return folder


@pytest.mark.parametrize("make", [with_a_missing_weight, with_an_adapter, with_shards_elsewhere, with_a_linked_folder])
def test_what_the_files_do_not_decide_is_never_remembered(make, folder, hashed, home):
    """A missing weight is drawn at random, each time anew."""
    name = make(folder)
    is_random = make is with_a_missing_weight
    assert (fingerprint(name) != fingerprint(name)) == is_random
    assert len(hashed) == 2
    assert remembered(home) == []


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnLlama(LlamaForCausalLM):
    config_class = OwnConfig


@pytest.mark.parametrize(
    ("model_class", "attributes", "decides"),
    [
        (LlamaForCausalLM, {}, True),
        (OwnLlama, {}, False),
        (LlamaForCausalLM, {"hf_quantizer": "one"}, False),
        (LlamaForCausalLM, {"_hf_peft_config_loaded": True}, False),
        (LlamaForCausalLM, {"config": LlamaConfig(quantization_config={"bits": 4})}, False),
    ],
)
def test_files_decide_only_about_plain_models_of_transformers(model_class, attributes, decides, folder):
    model, loading_info = model_class.from_pretrained(folder, output_loading_info=True)
    for name, value in attributes.items():
        setattr(model, name, value)
    found = Checkpoint.find(folder, torch.float32)
    assert found.decides(model, loading_info) == decides
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        assert not found.decides(model, {**loading_info, kind: {"one"}})
    (folder / "adapter_config.json").write_text("{}")
    assert not Checkpoint.find(folder, torch.float32).decides(model, loading_info)


# Weights that change in memory


def one_element(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1


def setting(model):
    model.model.layers[0].self_attn.scaling *= 2


def epsilon(model):
    model.config.rms_norm_eps = 0.1


def in_place(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def adapter(model):
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("change", [one_element, setting, epsilon, in_place, adapter])
def test_weights_changed_after_loading_are_hashed_and_not_remembered(change, is_known, folder, home):
    """Also by writes that the quick look cannot see."""
    expected = computed(folder)
    if is_known:
        assert fingerprint(folder) == expected
    before = remembered(home)
    loaded = load(folder, device="cpu")
    change(loaded.model)
    assert loaded.fingerprint == LM(loaded.model, loaded.tokenizer).fingerprint != expected
    assert remembered(home) == before
    assert fingerprint(folder) == expected


def test_a_model_handed_out_while_its_weights_are_hashed_is_not_remembered(folder, home, monkeypatch):
    loaded = load(folder, device="cpu")

    def hash_while_others_write(model):
        thread = threading.Thread(target=lambda: one_element(loaded.model))
        thread.start()
        thread.join()
        return content_hash(model)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "content_hash", hash_while_others_write)
        assert loaded.fingerprint != computed(folder)
    assert remembered(home) == []


def test_a_change_after_the_first_use_is_noticed(folder, hashed, home):
    loaded = load(folder, device="cpu")
    first, before = loaded.fingerprint, remembered(home)
    in_place(loaded.model)
    assert loaded.fingerprint != first
    assert len(hashed) == 2
    assert remembered(home) == before
    assert fingerprint(folder) == first


def test_refresh_hashes_everything_and_keeps_what_is_right(folder, hashed, home):
    expected = fingerprint(folder)
    loaded = load(folder, device="cpu")
    assert loaded.fingerprint == expected
    loaded.refresh()
    assert len(hashed) == 2
    assert loaded.fingerprint == fingerprint(folder) == expected
    assert len(hashed) == 2


def test_refresh_forgets_what_is_wrong(folder, hashed, home):
    """`refresh` cannot know whether the weights or the remembered hashes are wrong; a fresh load can."""
    expected = fingerprint(folder)
    loaded = load(folder, device="cpu")
    text = Text("The cat", loaded)
    text.logits  # noqa: B018
    assert loaded.fingerprint == expected
    one_element(loaded.model)
    loaded.refresh()
    assert remembered(home) == []
    assert loaded.stats.bytes_held == 0
    assert loaded.fingerprint != expected
    assert remembered(home) == []
    assert fingerprint(folder) == expected
    assert len(remembered(home)) == 1


# Where it is remembered


def flipped(entry):
    return (b"1" if entry[:1] == b"0" else b"0") + entry[1:]


DAMAGE = {
    "empty": lambda entry: b"",
    "cut off": lambda entry: entry[:-10],
    "one letter": flipped,
    "zeros": lambda entry: bytes(len(entry)),
    "no text": lambda entry: b"\xff\xfe" * 80,
    "something behind": lambda entry: entry + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memory_is_hashed_again_and_mended(damage, folder, hashed, home):
    expected = fingerprint(folder)
    (path,) = remembered(home)
    entry = path.read_bytes()
    path.write_bytes(DAMAGE[damage](entry))
    assert fingerprint(folder) == fingerprint(folder) == expected
    assert len(hashed) == 2
    assert path.read_bytes() == entry


def test_what_is_remembered_for_another_checkpoint_is_not_used(folder, hashed, home, tmp_path):
    expected = fingerprint(folder)
    (path,) = remembered(home)
    rewrite_in_place(save(tmp_path / "second"))  # of which no sample is taken
    fingerprint(tmp_path / "second")
    (other,) = set(remembered(home)) - {path}
    path.write_bytes(other.read_bytes())
    assert fingerprint(folder) == expected
    assert len(hashed) == 3


def a_file_in_its_place(home):
    home.write_text("")


def a_folder_in_the_entrys_place(home):
    (entry,) = remembered(home)
    entry.unlink()
    entry.mkdir()


def for_others_to_write(home):
    (home / "weights").chmod(0o777)


@pytest.mark.parametrize("spoil", [a_file_in_its_place, a_folder_in_the_entrys_place, for_others_to_write])
def test_an_unusable_memory_is_not_used(spoil, folder, hashed, home):
    expected = fingerprint(folder)
    if spoil is a_file_in_its_place:
        shutil.rmtree(home)
    spoil(home)
    assert fingerprint(folder) == fingerprint(folder) == expected
    loaded = load(folder, device="cpu")
    loaded.refresh()
    assert loaded.fingerprint == expected
    assert len(hashed) == 4
    assert not list(home.glob("weights/tmp*"))


@pytest.mark.parametrize("function", ["tempfile.mkstemp", "os.fdopen", "os.replace"])
def test_a_memory_that_cannot_be_written_is_no_error(function, folder, hashed, home, monkeypatch):
    """As on a read-only or full disk; the tests may run as root, whom no mode stops."""
    module, name = function.split(".")

    def refuse(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module), name, refuse)
        loaded = load(folder, device="cpu")
        first = loaded.fingerprint
    assert remembered(home) == []
    assert fingerprint(folder) == first
    assert len(hashed) == 2


def test_what_is_remembered_is_for_the_user_alone(folder, home):
    before = os.umask(0)
    try:
        fingerprint(folder)
    finally:
        os.umask(before)
    (entry,) = remembered(home)
    assert [path.stat().st_mode & 0o777 for path in (entry, entry.parent, home)] == [0o600, 0o700, 0o700]


def test_the_oldest_of_too_many_go(folder, home, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_REMEMBERED", 3)
    entries = []
    for seconds in range(5):
        touch(folder)
        fingerprint(folder)
        entries += set(remembered(home)) - set(entries)
        os.utime(entries[-1], (seconds, seconds))
    assert remembered(home) == sorted(entries[-3:])


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"HOME": "{}/user"}, "user/.cache/backprompt"),
        ({"HOME": "{}/user", "XDG_CACHE_HOME": ""}, "user/.cache/backprompt"),
        ({"HOME": "{}/user", "XDG_CACHE_HOME": "not/absolute"}, "user/.cache/backprompt"),
        ({"HOME": "{}/user", "XDG_CACHE_HOME": "{}/xdg"}, "xdg/backprompt"),
        ({"HOME": "{}/user", "XDG_CACHE_HOME": "{}/xdg", "BACKPROMPT_CACHE_HOME": "{}/own"}, "own"),
    ],
)
def test_where_it_is_remembered(variables, place, folder, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "BACKPROMPT_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    fingerprint(folder)
    assert len(remembered(tmp_path / place)) == 1
