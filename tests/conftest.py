"""Settings of all tests: no downloads, the same examples each time, `cuda` tests only where CUDA is."""

import os
import uuid

# Read when transformers and tokenizers are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# Read when triton is imported: without a GPU its interpreter runs the kernels. No library imports triton before.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# deadline: an example's first run may build a model. derandomize: a failure is there again on the next run.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50, print_blob=True)
# HYPOTHESIS_PROFILE=quick draws few, for slow devices.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=4, print_blob=True)
# HYPOTHESIS_PROFILE=thorough draws other examples each time, to look for what the fixed ones miss.
settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory):
    """Nothing that tests do is remembered in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKPROMPT_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_tokenizers import byte_level_bpe

    return byte_level_bpe()


@pytest.fixture(scope="module")
def model():
    from tiny_models import FAMILIES

    return FAMILIES["gpt2"]()


@pytest.fixture
def lm(model, tokenizer):
    """An LM of its own for each test; a file whose tests share one says so."""
    from backprompt import LM

    return LM(model, tokenizer)


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server on this machine."""
    pytest.importorskip("obstore")
    import s3_server

    if s3_server.rclone() is None:
        pytest.skip("rclone is not installed")
    with s3_server.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["memory", "disk", "bucket", "folder as bucket", "cached"])
def store(request, tmp_path):
    """An empty store of each kind."""
    from backprompt.store import CachedStore, DiskStore, MemoryStore, ObjectStore

    if request.param in ("bucket", "folder as bucket"):
        pytest.importorskip("obstore")
    makers = {
        "memory": MemoryStore,
        "disk": lambda: DiskStore(tmp_path / "prompts.bp"),
        "bucket": lambda: request.getfixturevalue("s3").store(prefix=uuid.uuid4().hex),
        "folder as bucket": lambda: ObjectStore(f"file://{tmp_path}/bucket"),
        "cached": lambda: CachedStore(MemoryStore(), DiskStore(tmp_path / "cache.bp")),
    }
    with makers[request.param]() as made:
        yield made
