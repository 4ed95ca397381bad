"""See `families`; a line a family, each in a process of its own."""

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import warnings
from collections import Counter
from multiprocessing.connection import Connection

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

from families import page
from families.checks import Verdict, check
from families.models import CAUSAL, MEDIA

_SECONDS = 420
_BYTES = 12 << 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="families", description="Compare families of models with their plain calls.")
    parser.add_argument("families", nargs="*", help="types of models; all, if none is named")
    parser.add_argument("--media", action="store_true", help="classes of images, sounds and texts, fed with texts")
    arguments = parser.parse_args()
    names = MEDIA if arguments.media else CAUSAL
    unknown = sorted(set(arguments.families) - names.keys())
    if unknown:
        parser.error(f"transformers has no {', '.join(unknown)}")
    if arguments.families or arguments.media:
        verdicts = _check_all({name: names[name] for name in arguments.families or names})
    else:
        causal, media = _check_all(CAUSAL), _check_all(MEDIA)
        page.write(causal, media)
        verdicts = causal + media
    return int(any(verdict.status in ("WRONG", "RAW") for verdict in verdicts))


def _check_all(names: dict[str, str]) -> list[Verdict]:
    verdicts = []
    for model_type, class_name in names.items():
        verdicts.append(_in_a_process(model_type, class_name))
        print(verdicts[-1].line(), flush=True)
    counts = Counter(verdict.status for verdict in verdicts)
    print(", ".join(f"{number} {status}" for status, number in counts.most_common()), flush=True)
    return verdicts


def _in_a_process(model_type: str, class_name: str) -> Verdict:
    """A model may take the process with it, or never end."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_check_and_send, args=(model_type, class_name, sending))
    process.start()
    sending.close()
    try:
        if receiving.poll(_SECONDS):
            found: Verdict = receiving.recv()
            return found
        why = f"no verdict in {_SECONDS} seconds"
    except EOFError:
        process.join()
        why = f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Verdict(model_type, class_name, "RAW", why)


def _check_and_send(model_type: str, class_name: str, sending: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    sending.send(check(model_type, class_name))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    sys.exit(main())
