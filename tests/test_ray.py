"""RayLM on a real Ray of two workers, started once for this file. Skipped without the extra `ray`."""

import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

ray = pytest.importorskip("ray")

import backprompt as bp
from backprompt import Text, classify
from backprompt.engines.ray import MapTexts, RayLM
from backprompt.errors import NonFiniteError, WorkerError
from crews import Failing, plain_lm, tiny_gpt2
from engine_contract import LABELS, PROMPTS, EngineContract

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray on this machine; its workers find the modules of the tests."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else they wait for all other tests of the machine
        ray.init(
            num_cpus=2,
            num_gpus=2,  # which no machine needs to have: Ray counts, and says which ones a worker may see
            resources={"shelf": 1},
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=100_000_000,
            _temp_dir=None,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def engine():
    # Less than a core each, so that other tests' workers find a place beside these.
    with RayLM(tiny_gpt2, num_workers=2, num_cpus=0.25) as lm:
        yield lm


class TestRayLM(EngineContract):
    pass


def is_alive(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    return is_so()


def texts_of(lm):
    return [Text(f"{prompt} {idx}", lm) for prompt in PROMPTS for idx in range(4)]


def rows_of(lm):
    """Numbers of texts, computed by all workers."""
    return torch.cat([row[1:] for row in lm.token_logprobs(texts_of(lm))])


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not is_alive(pid))


# Faults


def test_a_killed_worker_is_started_again_and_its_part_done_again(engine):
    expected = rows_of(plain_lm())
    torch.testing.assert_close(rows_of(engine), expected, rtol=1e-4, atol=1e-5)
    pids = engine.worker_pids
    kill(pids[1])
    torch.testing.assert_close(rows_of(engine), expected, rtol=1e-4, atol=1e-5)
    now = engine.worker_pids
    assert (now[0], now[1] != pids[1]) == (pids[0], True)
    before = engine.worker_stats
    rows_of(engine)
    assert [stats.tokens_computed for stats in engine.worker_stats] == [stats.tokens_computed for stats in before]


def small(loader, num_workers=1, **options):
    return RayLM(loader, num_workers=num_workers, num_cpus=0.25, **options)


def test_parts_that_fail_are_done_again_once(tmp_path):
    """Killed within a pass, or an error that says nothing of the texts: once is no error, twice is."""
    loader, expected = Failing(tmp_path), rows_of(plain_lm())
    with small(loader) as lm:

        def rows(*errors):
            lm.clear()
            loader.plan(*errors)
            try:
                return rows_of(lm)
            finally:
                assert loader.num_left == 0

        no_memory = RuntimeError("out of memory")
        for errors in ([no_memory], [None], []):
            torch.testing.assert_close(rows(*errors), expected, rtol=1e-4, atol=1e-5)
        for error in (ValueError("no"), NonFiniteError("nan")):  # of the texts: the same again
            with pytest.raises(type(error), match=str(error)):
                rows(error)
        with pytest.raises(RuntimeError, match="out of memory"):
            rows(no_memory, no_memory)
        lm.clear()
        loader.plan(*[None] * 6)  # Ray may forgive a death that it sees before the question is on its way
        with pytest.raises(WorkerError, match="Worker 0 died"):
            rows_of(lm)
        for file in loader.folder.iterdir():
            file.unlink()
        torch.testing.assert_close(rows(), expected, rtol=1e-4, atol=1e-5)


# The ends of workers


def left_of(name):
    return ray.available_resources().get(name, 0)


@dataclass(frozen=True)
class Noting:
    """A loader that writes down which GPUs its worker may see."""

    file: Path

    def __call__(self):
        self.file.write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return tiny_gpt2()


def test_workers_end_with_the_last_reference_and_give_back_their_share(tmp_path):
    assert (left_of("GPU"), left_of("shelf")) == (2, 1)
    lm = small(Noting(tmp_path / "gpus"), num_gpus=1, resources={"shelf": 0.5})
    text, (pid,) = Text("The cat", lm), lm.worker_pids
    assert wait_until(lambda: (left_of("GPU"), left_of("shelf")) == (1, 0.5))
    assert (tmp_path / "gpus").read_text() in ("0", "1")
    del lm
    gc.collect()
    assert text.logits.isfinite().all()
    assert is_alive(pid)
    del text
    gc.collect()
    assert wait_until(lambda: not is_alive(pid))
    assert wait_until(lambda: (left_of("GPU"), left_of("shelf")) == (2, 1))


DRIVER = """
import ray, signal
from backprompt import Text
from backprompt.engines.ray import RayLM
from crews import tiny_gpt2
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
ray.init({address!r}, log_to_driver=False, logging_level="ERROR")
lms = [RayLM(tiny_gpt2, num_cpus=0.25, name=name) for name in (None, "kept")]
for lm in lms:
    lm.evaluate([Text("The cat sat on the mat", lm)])
print(*(lm.worker_pids[0] for lm in lms), flush=True)
while True:
    lms[0].clear()
    lms[0].evaluate([Text("The cat sat on the mat", lms[0])])
"""


def interrupted_driver(cluster):
    """Return the numbers of the processes of an unnamed worker and of a named one, and what their driver said."""
    command = [sys.executable, "-c", DRIVER.format(address=cluster)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            pids = list(map(int, process.stdout.readline().split()))
            assert all(map(is_alive, pids))
            process.send_signal(signal.SIGINT)
            return *pids, process.communicate(timeout=120)[1]
        finally:
            process.kill()


def test_an_interrupt_leaves_named_workers_and_no_others(cluster):
    unnamed, named, said = interrupted_driver(cluster)
    assert "KeyboardInterrupt" in said
    assert wait_until(lambda: not is_alive(unnamed))
    assert is_alive(named)
    with pytest.raises(ValueError, match="'kept' were made from"):
        small(tiny_gpt2, name="kept", max_tokens_per_forward=7)
    lm = small(tiny_gpt2, name="kept")
    assert lm.worker_pids == [named]
    before = lm.stats.tokens_computed
    lm.evaluate([Text("The cat sat on the mat", lm)])
    assert lm.stats.tokens_computed == before > 0
    lm.close()
    lm.close()
    assert wait_until(lambda: not is_alive(named))


# Options


def test_options_are_checked_before_workers_start(tmp_path):
    for error, options in (
        (TypeError, {"num_threads": 2}),
        (TypeError, {"dtype": "float32"}),
        (TypeError, {"store": bp.MemoryStore()}),
        (ValueError, {"num_workers": 0}),
        (ValueError, {"joins": "none"}),
    ):
        with pytest.raises(error):
            RayLM(tiny_gpt2, **options)
    with pytest.raises(TypeError, match="name_or_loader"):
        RayLM(7)


def test_a_model_of_a_folder_and_the_harness_by_arguments(tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from backprompt.integrations.lm_eval import BackpromptLM

    model, tokenizer = tiny_gpt2()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = Instance("loglikelihood", {}, ("The cat", " sat"), 0)
    arguments = f"pretrained={tmp_path},num_workers=1,num_cpus=0.25,max_tokens_per_forward=64"
    model = BackpromptLM.create_from_arg_string(arguments)
    with model.lm as lm:
        assert isinstance(lm, RayLM)
        torch.testing.assert_close(rows_of(lm), rows_of(plain_lm()), rtol=1e-4, atol=1e-5)
        assert lm.fingerprint == bp.load(tmp_path).fingerprint
        found, expected = (of.loglikelihood([asked], disable_tqdm=True) for of in (model, BackpromptLM(plain_lm())))
        assert found[0] == pytest.approx(expected[0], abs=1e-4)


# ray.data


def labelled(lm, batch):
    """Rows with the most probable label of each prompt."""
    prompts = list(batch["prompt"])
    batch["label"] = np.array(classify.predict(prompts, LABELS, lm))
    batch["tokens_computed"] = np.full(len(prompts), lm.stats.tokens_computed)
    return batch


@pytest.mark.filterwarnings("ignore")  # Ray warns of uses of its own
def test_rows_of_a_table_are_labelled(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    prompts = [f"{prompt} {idx}. Label:" for idx in range(6) for prompt in PROMPTS]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "prompts.parquet")
    rows = ray.data.read_parquet(str(tmp_path / "prompts.parquet"), override_num_blocks=1).sort("prompt")
    found = rows.map_batches(
        MapTexts, fn_constructor_args=(tiny_gpt2, labelled), concurrency=1, num_cpus=0.25, batch_size=12
    )
    found.write_parquet(str(tmp_path / "labelled"))
    table = pq.read_table(tmp_path / "labelled").to_pydict()
    assert sorted(table["prompt"]) == sorted(prompts)
    assert table["label"] == classify.predict(table["prompt"], LABELS, plain_lm())
