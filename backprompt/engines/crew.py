"""RayCrew: workers as actors of Ray. No other module calls Ray.

A `RayCrew` keeps the handles of the actors. Ray restarts a dead actor, and repeats its question once (`max_restarts`,
`max_task_retries`). An error that a worker raises is raised here unchanged. After an error that does not depend on the
texts, such as a lack of memory, the question is asked a second time.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from backprompt.engines.remote import Question
from backprompt.engines.worker import Description, Maker, Worker
from backprompt.errors import BackpromptError, MissingDependencyError, WorkerError

NAMESPACE = "backprompt"
"""The namespace of named workers in Ray; the same for all drivers."""
MAX_RESTARTS = 16


class RayCrew:
    """Workers on Ray.

    Args:
        maker: makes the `LM` of each worker.
        num_workers: the number of workers.
        resources: the resources of each worker, as `ray.remote` takes them: num_cpus, num_gpus, resources.
        name: the name of workers that outlive the driver; running workers of this name are used again. None for
            workers that end with the driver.

    """

    where = "with the workers of a RayLM"

    def __init__(self, maker: Maker, num_workers: int, resources: Mapping[str, Any], name: str | None) -> None:
        ray = imported_ray()
        if not ray.is_initialized():
            ray.init()
        self.num_workers = num_workers
        self.name = name
        options: dict[str, Any] = {"max_restarts": MAX_RESTARTS, "max_task_retries": 1, **resources}
        actor = ray.remote(Worker)
        if name is None:
            self._actors = [actor.options(**options).remote(maker) for _ in range(num_workers)]
            # Ray ends an actor once nobody has its handle, but an error's traceback may hold one.
            self._end = weakref.finalize(self, _kill, self._actors)
        else:
            options |= {"lifetime": "detached", "namespace": NAMESPACE, "get_if_exists": True}
            self._actors = [
                actor.options(name=f"{name}-{worker}", **options).remote(maker) for worker in range(num_workers)
            ]
            self._end = weakref.finalize(self, _let_go, self._actors)

    def describe(self, maker: Maker) -> Description:
        """Return the description of the workers, once all have started.

        Raises:
            ValueError: workers of this name were made with other options.

        """
        questions = [Question(worker, "description") for worker in range(self.num_workers)]
        descriptions: list[Description] = self.ask(questions)
        for description in descriptions:
            if description.maker != str(maker):
                raise ValueError(
                    f"The workers named {self.name!r} were made from {description.maker}, not from {maker}. Ask "
                    "for the same, or use another name; RayLM.close() ends the running ones."
                )
        return descriptions[0]

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Ask all questions at once, and return the answers in order.

        Raises:
            The error of a worker, unchanged.
            WorkerError: a worker died twice at a question, or could not be restarted.

        """
        refs = [self._asked(question) for question in questions]
        return [self._answer(question, ref) for question, ref in zip(questions, refs, strict=True)]

    def close(self) -> None:
        """End the workers, named ones as well."""
        self._end.detach()
        _kill(self._actors)

    def _asked(self, question: Question) -> Any:
        return getattr(self._actors[question.worker], question.method).remote(*question.arguments)

    def _answer(self, question: Question, ref: Any) -> Any:
        try:
            return self._got(question, ref)
        except (BackpromptError, TypeError, ValueError, LookupError, NotImplementedError):
            raise  # caused by the texts, or by a worker that died twice: a second try would fail, too
        except Exception:
            return self._got(question, self._asked(question))

    def _got(self, question: Question, ref: Any) -> Any:
        ray = imported_ray()
        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
                raise cause from error
            raise
        except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError) as error:
            raise WorkerError(
                f"Worker {question.worker} died while it was asked to {question.method}, and its successor died, "
                f"too, or could not be started: {error}"
            ) from error


def imported_ray() -> Any:
    """Return the module `ray`.

    Raises:
        MissingDependencyError: Ray is not installed.

    """
    if find_spec("ray") is None:
        raise MissingDependencyError("backprompt.engines.ray needs Ray: pip install ray")
    import ray

    return ray


def _kill(actors: Sequence[Any]) -> None:
    ray = imported_ray()
    if ray.is_initialized():  # else the cluster's connection is gone, and Ray has ended the actors
        for actor in actors:
            ray.kill(actor)


def _let_go(actors: Sequence[Any]) -> None:
    """Leave named workers to the next driver."""
