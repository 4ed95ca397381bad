"""A process that forks after it has used an `LM`: right numbers in the child, and no process waits for ever.

Each case is a process of its own, which is killed when it takes too long, with all that it has started.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")

SECONDS = 120
PRELUDE = '''
import os, sys, threading
import torch
from backprompt import LM, Text, evaluate
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_close
from reference import plain_logits
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

torch.set_num_threads(NUM_THREADS)
model = FAMILIES["llama"]()
lm = LM(model, byte_level_bpe(), max_tokens_per_forward=16)
LONG = "Question: What is 12 + 34? The cat sat on the mat. " * 2


def check(strings, lm=lm):
    for string in strings:
        text = Text(string, lm)
        expected = EXPECTED[string] if string in EXPECTED else plain_logits(model, text.tokens)[-1]
        assert_close(text.logits, expected)


def in_child(work):
    """Run `work()` in a forked child; its exit status says whether it went well."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def wait(*pids):
    for pid in pids:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


STRINGS = [f"{number} cats, {LONG}"[:40] for number in range(8)]
EXPECTED = {string: plain_logits(model, Text(string, lm).tokens)[-1] for string in STRINGS}
'''


def run(script, num_threads=1):
    """Run a script in a process group of its own; fail, and kill all of it, if it takes too long."""
    root = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE.replace("NUM_THREADS", str(num_threads)) + textwrap.dedent(script)],
        cwd=root.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root.parent)]), "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it hangs: {process.communicate()[0][-2000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


def test_a_child_goes_on_with_what_was_computed_though_torch_has_lost_its_threads():
    run(
        """
        import multiprocessing
        from torch.utils.data import DataLoader, Dataset

        matrix = torch.randn(600, 600)
        (matrix @ matrix).softmax(-1)  # on two threads
        check(STRINGS[:4])
        pin = Text(STRINGS[0], lm).pin()
        stream = Text(STRINGS[1], lm).stream(max_new_tokens=4)
        next(stream)

        def work():
            (matrix @ matrix).softmax(-1)
            before = lm.stats
            check(STRINGS[:4])
            assert (lm.stats - before).tokens_computed == 0
            check(STRINGS)
            pin.release()
            list(stream)
            check(STRINGS, LM(model, byte_level_bpe()))
            lm.clear()
            check(STRINGS)

        class Scored(Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, idx):
                return Text(STRINGS[idx], lm).logits

        def argmax(string):
            return int(Text(string, lm).logits.argmax())

        pids = [in_child(work) for _ in range(2)]
        for idx, logits in enumerate(DataLoader(Scored(), batch_size=None, num_workers=2)):
            assert_close(logits, EXPECTED[STRINGS[idx]])
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(argmax, STRINGS) == [int(EXPECTED[string].argmax()) for string in STRINGS]
        check(STRINGS)
        assert torch.get_num_threads() == 2
        wait(*pids)
        """,
        num_threads=2,
    )


def test_forks_in_the_middle_of_the_calls_of_other_threads_that_share_a_store(tmp_path):
    run(
        f"""
        stores = [DiskStore({str(tmp_path)!r}), MemoryStore()]
        lms = [LM(model, byte_level_bpe(), store=store) for store in stores for _ in range(2)]
        check([LONG], lms[0])
        check([LONG], lms[2])
        stop = threading.Event()

        def use(lm):
            number = 0
            while not stop.is_set():
                number += 1
                check([f"{{number}} {{LONG}}"], lm)
                Text(f"{{number}}", lm).generate(max_new_tokens=2)
                if number % 3 == 0:
                    lm.clear()

        threads = [threading.Thread(target=use, args=(used,)) for used in (lms[0], lms[0], lms[2])]
        for thread in threads:
            thread.start()

        def work(child):
            for lm in lms[1], lms[3]:
                before = lm.stats
                check([LONG], lm)
                assert (lm.stats - before).tokens_loaded
            for lm in lms:
                check([f"{{child}} of the children. {{LONG}}"], lm)
            Text("A", lms[0]).generate(max_new_tokens=2)
            stores[0].close()

        for first in (0, 3, 6):
            wait(*[in_child(lambda child=child: work(child)) for child in range(first, first + 3)])
        stop.set()
        for thread in threads:
            thread.join()
        check([f"The parent. {{LONG}}"], lms[1])
        with DiskStore(stores[0].path) as other:
            assert not other.verify()
            assert other.stats().num_entries == len(list(other.path.glob("entries/*/*.safetensors")))
            fresh = LM(model, byte_level_bpe(), store=other)
            check([f"{{child}} of the children. {{LONG}}" for child in range(9)], fresh)
            assert fresh.stats.tokens_computed < fresh.stats.tokens_loaded / 2, fresh.stats
        """
    )


def test_a_bar_whose_lock_another_thread_held_shows_in_the_child():
    run(
        """
        from backprompt.progress import Bar, progress_bar, showing

        held, stop = threading.Event(), threading.Event()

        def draw():
            with Bar._lock:
                held.set()
                stop.wait()

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        held.wait()

        def work():
            with showing(True), progress_bar(2, "counting", "words") as bar:
                bar.update(2)

        pid = in_child(work)
        for _ in range(200):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                break
            threading.Event().wait(0.1)
        else:
            os.kill(pid, 9)
            raise AssertionError("the child waits for ever")
        stop.set()
        thread.join()
        work()
        """
    )


def test_a_store_that_another_thread_makes_while_forking_looks_for_all():
    """Otherwise the new store would join the set of stores while the fork iterates over it."""
    run(
        """
        from weakref import WeakSet
        from backprompt import forking

        made, failed = [], []
        sys.unraisablehook = lambda raised: failed.append(raised.exc_value)

        class Watched(WeakSet):
            def __iter__(self):
                for store in super().__iter__():
                    if not made:
                        thread = threading.Thread(target=lambda: made.append(MemoryStore()))
                        thread.start()
                        thread.join(1)  # it waits until the walk is over
                    yield store

        kept = [forking.ForkableLock() for _ in range(2)]
        forking.stores = Watched(kept)
        wait(in_child(lambda: MemoryStore().close()))
        assert not failed, failed
        """
    )
