"""Engines over several workers for tests: workers in this process, and what workers on Ray load."""

import os
import pickle
import signal
from dataclasses import dataclass
from pathlib import Path

from backprompt import LM, Text
from backprompt.engines.crew_lm import CrewLM
from backprompt.engines.worker import Maker, Worker
from tiny_models import build
from tiny_tokenizers import byte_level_bpe


def tiny_gpt2():
    """The loader of tests: the same weights in every process."""
    return build("gpt2"), byte_level_bpe()


class HereCrew:
    """Workers in this process. All that is said travels as bytes, and questions are noted."""

    where = "with workers of this process"

    def __init__(self, maker, num_workers):
        self.num_workers = num_workers
        self.workers = [Worker(maker) for _ in range(num_workers)]
        self.asked = []

    def ask(self, questions):
        self.asked += [(question.worker, question.method) for question in questions]
        return [
            pickle.loads(pickle.dumps(getattr(self.workers[question.worker], question.method)(*arguments)))
            for question in questions
            for arguments in [pickle.loads(pickle.dumps(question.arguments))]
        ]

    def close(self):
        self.workers = []


def crew_lm(num_workers=2, loader=tiny_gpt2, **options):
    crew = HereCrew(Maker(loader, options, 0.1), num_workers)
    return CrewLM(crew, crew.workers[0].description())


def plain_lm(**options):
    return LM(*tiny_gpt2(), **options)


@dataclass(frozen=True)
class Failing:
    """A loader of a model whose passes fail as files in a folder say, in whatever process; each file counts once.

    A file holds the error that the pass raises, or None where the pass kills its process.
    """

    folder: Path

    def plan(self, *errors):
        for idx, error in enumerate(errors):
            (self.folder / f"{idx}").write_bytes(pickle.dumps(error))

    @property
    def num_left(self):
        return len(list(self.folder.iterdir()))

    def __call__(self):
        lm = plain_lm()
        lm.evaluate([Text("The first evaluation looks at the model", lm)])
        executor = lm.session.evaluator.executor
        forward = executor.forward

        def failing(*args, **kwargs):
            for file in sorted(self.folder.iterdir()):
                error = pickle.loads(file.read_bytes())
                file.unlink()
                if error is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise error
            return forward(*args, **kwargs)

        executor.forward = failing
        return lm
