"""Many threads at once."""

import threading


def in_threads(num_threads, work):
    """Run `work(idx)` in each thread at once; errors are raised here."""
    errors = []

    def run(idx):
        try:
            work(idx)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(idx,)) for idx in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def within(seconds, work):
    """Run `work` in a thread, and return its result; fail if it takes longer than `seconds`."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return found[0]
