"""Threads that wait for an `LM` together, as they do while a long call of another thread runs."""

import threading
import time


def all_at_once(lm, work, seconds=60):
    """Call each of `work` in a thread of its own; none begins to compute before all wait. Return results or errors."""
    found = [None] * len(work)
    line = lm.session.line

    def run(idx):
        try:
            found[idx] = work[idx]()
        except BaseException as error:
            found[idx] = error

    threads = [threading.Thread(target=run, args=(idx,)) for idx in range(len(work))]
    with line.lock:
        for idx, thread in enumerate(threads):
            thread.start()
            wait_until(lambda num=idx + 1: len(line.places) >= num, seconds)
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "it hangs"
    return found


def wait_until(is_so, seconds=60):
    """Wait until `is_so()`; fail after some time."""
    stop = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < stop, "it never came"
        time.sleep(0.001)
