"""Loading: a folder, arguments of transformers, a hub that does not answer, and refusals before anything runs."""

import copy
import os
import re
import socket
import threading

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from backprompt import LM, ModelLoadError, Text, UnsupportedModelError, evaluate, load
from comparing import assert_equals_plain
from reference import plain_ids
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe


@pytest.fixture
def model():
    return FAMILIES["gpt2"]()


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    """A folder with a bfloat16 model and its tokenizer."""
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_load_reads_a_folder(checkpoint, model):
    expected = copy.deepcopy(model).bfloat16().float()
    for name in (checkpoint, str(checkpoint)):
        lm = load(name, device="cpu")
        assert (lm.model.dtype, lm.model.device.type) == (torch.float32, "cpu")
        text = Text("The cat sat", lm)
        assert text.tokens == tuple(plain_ids(byte_level_bpe(), "The cat sat"))
        assert_equals_plain(expected, [text])


def test_load_passes_its_options_on(checkpoint):
    lm = load(checkpoint, device="cpu", dtype=torch.bfloat16, joins="split", max_tokens_per_forward=3)
    text = Text("T", lm) + "he cat"
    representation = evaluate(text)
    assert representation.logits.dtype == torch.bfloat16
    assert len(text.tokens) > len(plain_ids(lm.tokenizer, text.string))  # "T" and "he" did not merge
    assert lm.stats.forward_passes >= len(text.tokens) / 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"device": "banana"},
            ValueError,
            r"device='banana' cannot be used: Expected one of .*\. Leave it out to use '",
        ),
        ({"device": torch.device("cuda", 99)}, ValueError, "device='cuda:99' cannot be used"),
        ({"device": "meta"}, ValueError, "device='meta' holds no weights"),
        ({"device": "hpu"}, ValueError, r"device='hpu' cannot be used: No module named"),
        ({"device": "privateuseone"}, ValueError, r"device='privateuseone' cannot be used: No module named"),
        ({"device": 10**30}, ValueError, r"cannot be used: .*Leave it out"),
        ({"device": True}, TypeError, "device must be the name of a device"),
        ({"dtype": "banana"}, ValueError, "floating dtype of torch, .* not 'banana'"),
        ({"dtype": torch.int8}, ValueError, "not torch.int8"),
        ({"dtype": float}, ValueError, "not <class 'float'>"),
        ({"show_progress_bar": "no"}, ValueError, "show_progress_bar must be True or False, not 'no'"),
        ({"memory": "2 GB"}, TypeError, "load has no option 'memory'. .*It has device, .*, memory_bytes.*model_kwargs"),
        ({"trust_remotecode": True}, TypeError, r"'trust_remotecode'\. Did you mean 'trust_remote_code'\?"),
        ({"trust_remote_code": "yes"}, ValueError, "trust_remote_code must be True or False, not 'yes'"),
        ({"revision": ""}, ValueError, "revision must be a string that is not empty"),
        ({"dtype": "fp16"}, ValueError, "not 'fp16'. Did you mean \"float16\"?"),
        ({"dtype": "float32", "torch_dtype": "float32"}, TypeError, "torch_dtype is the old name of dtype"),
        ({"torch_dtype": "banana"}, ValueError, "not 'banana'"),
        ({"device": "cpu", "device_map": "auto"}, ValueError, "device= puts the model on one device, and device_map="),
        ({"device_map": {"": "banana"}}, ValueError, "device_map='banana' cannot be used"),
        ({"device_map": "cuda:99"}, ValueError, "device_map='cuda:99' cannot be used"),
        ({"device_map": "cpu", "weights": "int8"}, ValueError, "on one device, after loading: leave out device_map="),
        ({"model_kwargs": ["dtype"]}, TypeError, "model_kwargs must be a mapping of names to values"),
        ({"model_kwargs": {"dtype": "float32"}}, TypeError, "model_kwargs has 'dtype', which is an argument of load"),
        ({"model_kwargs": {"joins": "split"}}, TypeError, "model_kwargs has 'joins'"),
        ({"revision": "a", "model_kwargs": {"revision": "a"}}, TypeError, "model_kwargs has 'revision'"),
        ({"quantization_config": 3}, TypeError, "quantization_config must be a configuration of transformers.*not 3"),
        ({"model_kwargs": {"quantization_config": "int8"}}, TypeError, "or its dict, not 'int8'"),
        ({"name": "./no/such/folder"}, ModelLoadError, "'./no/such/folder': there is no such folder"),
        ({"name": __file__}, ModelLoadError, "is a file. Give the folder"),
        ({"name": None}, TypeError, "name must be a hub id or the path of a model's folder, not None"),
        ({"name": ""}, TypeError, "name must be"),
    ],
)
def test_what_load_cannot_take_is_refused_before_anything_is_looked_for(options, error, message, monkeypatch):
    monkeypatch.setattr("backprompt.loading.AutoTokenizer", None)
    with pytest.raises(error, match=message):
        load(**{"name": "anything", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_says_what_there_is(checkpoint):
    with pytest.raises(ValueError, match=r"device='cuda' cannot be used: .*Leave it out"):
        load(checkpoint, device="cuda")


def test_a_dtype_by_name_is_the_dtype(checkpoint):
    for dtype in ("float16", "torch.float16", torch.float16):
        assert load(checkpoint, device="cpu", dtype=dtype).model.dtype is torch.float16
    assert load(checkpoint, device="cpu", dtype="auto").model.dtype is torch.bfloat16


def test_a_folder_without_a_model_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(ModelLoadError, match=r"The folder '.*' is empty. Give the folder that model.save_pretrained"):
        load(tmp_path, device="cpu")
    for idx in range(7):
        (tmp_path / f"{idx}.txt").touch()
    with pytest.raises(ModelLoadError, match=r"has no config.json, but '0.txt', .*, '4.txt' \.\.\."):
        load(tmp_path, device="cpu")
    with pytest.raises(ModelLoadError, match=r"The folder '.*inner' does not exist"):
        load(tmp_path, device="cpu", subfolder="inner")


def test_arguments_of_transformers_reach_model_and_tokenizer(checkpoint, monkeypatch):
    given = []
    for kind in (AutoModelForCausalLM, AutoTokenizer):

        def noted(*args, before=kind.from_pretrained, **kwargs):
            given.append(kwargs)
            return before(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", noted)
    lm = load(
        checkpoint,
        torch_dtype="bfloat16",
        revision="main",
        trust_remote_code=False,
        device_map={"": "cpu"},
        model_kwargs={"low_cpu_mem_usage": True},
        joins="split",
    )
    for_tokenizer = {"revision": "main", "trust_remote_code": False}
    for_model = {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True, "dtype": torch.bfloat16}
    assert given == [for_tokenizer, {**for_tokenizer, **for_model, "output_loading_info": True}]
    assert_equals_plain(lm.model, [Text("The cat sat", lm)])


def test_transformers_quantizes_where_it_is_asked_to(tmp_path, tokenizer):
    quantization = pytest.importorskip("torchao.quantization")
    FAMILIES["llama"]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    lm = load(tmp_path, device="cpu", quantization_config=config)
    assert "int8" in repr(lm.model.model.layers[0].mlp.up_proj.weight).lower()
    assert_equals_plain(lm.model, [Text("The cat sat", lm)])
    with pytest.raises(ValueError, match="leave out quantization_config="):
        load(tmp_path, device="cpu", quantization_config=config, weights="int8")


def test_weights_read_with_other_arguments_are_not_remembered_for_the_files(checkpoint):
    for file in checkpoint.rglob("*"):
        os.utime(file, (1, 1))
    lm = load(checkpoint, device="cpu", config=AutoConfig.from_pretrained(checkpoint, tie_word_embeddings=False))
    assert lm.session.fingerprint.checkpoint is None


def test_a_model_that_is_offloaded_while_it_loads(tmp_path, checkpoint, model):
    parts = ["lm_head", *(f"transformer.{name}" for name, _ in model.transformer.named_children() if name != "h")]
    parts += [f"transformer.h.{idx}" for idx in range(len(model.transformer.h))]
    lm = load(
        checkpoint,
        device_map={**dict.fromkeys(parts, "cpu"), "transformer.h.0": "disk"},
        offload_folder=tmp_path / "offloaded",
        dtype="float32",
    )
    text = Text("The cat sat", lm)
    assert_equals_plain(copy.deepcopy(model).bfloat16().float(), [text])


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that hangs up on each call; yields the calls that ask for files (the client asks once for other things)."""
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    if (line := connection.recv(100).split(b"\r\n")[0]).startswith(b"HEAD"):
                        calls.append(line)

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a pause before another call"))
        yield calls
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_hub_that_does_not_answer_is_asked_once(silent_hub):
    with pytest.raises(ModelLoadError, match=r"'nobody/model': the hub cannot be asked \(.*pass the path"):
        load("nobody/model", device="cpu")
    assert len(silent_hub) == 1


def test_an_earlier_download_serves_where_the_hub_does_not(silent_hub, tmp_path, model, tokenizer):
    repository = tmp_path / "models--nobody--model"
    snapshot = repository / "snapshots" / ("1" * 40)
    model.save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    lm = load("nobody/model", device="cpu", cache_dir=tmp_path)
    assert_equals_plain(model, [Text("The cat sat", lm)])
    assert len(silent_hub) == 1


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder/anywhere", "a name"])
def test_what_cannot_be_loaded_says_to_pass_a_local_path(name):
    with pytest.raises(ModelLoadError, match=re.escape(f"Could not load '{name}'")) as error:
        load(name)
    assert re.search("pass the path of its folder|Give the path of a model's folder", str(error.value))
    assert isinstance(error.value, OSError)


def test_a_name_in_the_place_of_a_model_says_what_loads_it():
    with pytest.raises(UnsupportedModelError, match=re.escape("use backprompt.load('gpt2')")):
        LM("gpt2")
