"""RayLM: one engine of many workers on Ray, each with an `LM` of its own; and a class for `ray.data`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from backprompt.arguments import as_int
from backprompt.engines.crew import RayCrew
from backprompt.engines.crew_lm import CrewLM
from backprompt.engines.worker import Maker, Source
from backprompt.lm import LM
from backprompt.session.options import check_options

LOAD_OPTIONS = ("device", "dtype", "show_progress_bar")
"""Options of `load` beyond those of `LM`, for a model that is given by name."""


class RayLM(CrewLM):
    """A causal language model on several workers of Ray; takes texts as an `LM` does.

        lm = RayLM("gpt2", num_workers=4, num_gpus=1)
        classify.predict(prompts, labels, lm)

    Each worker is an actor with an `LM` of its own, so the model must fit a worker. The texts of a call are divided by
    common beginnings, one part for each worker. Texts of later calls go to the workers that hold their beginnings (see
    `engines/layout.py`). The driver keeps the tokenizer, and results lie on its CPU. A worker that dies is restarted,
    up to 16 times, and computes its part again.

    Without a `name`, the workers end with `close`, with the driver, and with the last reference to the `RayLM` or its
    texts. With a name, the workers and their results outlive the driver, and a later driver's `RayLM` of this name uses
    them; `close` ends them. If Ray has not been started, `ray.init()` is called, which finds the cluster of
    `RAY_ADDRESS`, or starts Ray on this machine.

    Functions that need the model or its rows of memory in this process raise `UnsupportedModelError`: pictures
    (`draw`, `to_networkx`), `verify`, training, and `lm.model`.

    Args:
        name_or_loader: a name or path for `backprompt.load`, or a function that returns an `LM` or a tuple of a model
            and its tokenizer. Each worker calls the function.
        num_workers: the number of workers.
        num_cpus, num_gpus, resources: the resources that Ray reserves for each worker. torch computes on `num_cpus`
            threads.
        store: a path or URL that all workers can reach, such as "s3://bucket/prompts"; see `LM`.
        name: the name of workers that outlive this driver.
        **lm_options: options of `LM`, and `device` and `dtype` of `load`. On the CPU, the default of `memory_bytes` is
            that of an `LM`, times the worker's share of the machine's cores (`num_cpus`).

    Raises:
        MissingDependencyError: Ray is not installed.
        TypeError, ValueError: an option has an invalid value, or named workers were made with other options.
        All errors of the loader, unchanged.

    """

    def __init__(
        self,
        name_or_loader: Source,
        *,
        num_workers: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
        resources: Mapping[str, float] | None = None,
        store: str | os.PathLike[str] | None = None,
        name: str | None = None,
        **lm_options: Any,
    ) -> None:
        num_workers = as_int(num_workers, "num_workers", at_least=1)
        maker = _maker(name_or_loader, num_cpus, {**lm_options, **({} if store is None else {"store": store})})
        reserved = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources or {})}
        crew = RayCrew(maker, num_workers, reserved, name)
        try:
            super().__init__(crew, crew.describe(maker))
        except BaseException:
            if name is None:
                crew.close()
            raise


class MapTexts:
    """A function of an `LM` and a batch of rows, for `ray.data.Dataset.map_batches`.

        rows.sort("prompt").map_batches(
            MapTexts, fn_constructor_args=("gpt2", label), concurrency=4, num_gpus=1, batch_size=1024
        )

    Ray makes one for each of its `concurrency` actors, so each has an `LM` of its own. If rows are sorted by their
    prompts, each batch is a subtree: prompts with a common beginning are in one batch.

    Args:
        name_or_loader: see `RayLM`.
        function: takes the `LM` and a batch, and returns a batch: a dict of arrays, or the type that `batch_format`
            names.
        **lm_options: see `RayLM`.

    """

    def __init__(self, name_or_loader: Source, function: Callable[[LM, Any], Any], **lm_options: Any) -> None:
        self.lm = _maker(name_or_loader, 1, lm_options).lm()
        self._function = function

    def __call__(self, batch: Any) -> Any:
        """Return the function's result for a batch."""
        return self._function(self.lm, batch)


def _maker(source: Source, num_cpus: float, options: Mapping[str, Any]) -> Maker:
    own = {name: value for name, value in options.items() if name not in LOAD_OPTIONS}
    check_options(**own)
    if not isinstance(source, (str, os.PathLike)) and not callable(source):
        raise TypeError(
            f"name_or_loader must be a name or path of a model, or a function that returns an LM, not {source!r}."
        )
    if callable(source) and len(own) < len(options):
        raise TypeError("device and dtype are options for a model's name; a loader sets them itself. Leave them out.")
    store = options.get("store")
    if store is not None and not isinstance(store, (str, os.PathLike)):
        raise TypeError(f"The store of workers must be a path or a URL that each worker can open, not {store!r}.")
    return Maker(source, dict(options), min(1.0, max(num_cpus, 0.25) / (os.cpu_count() or 1)))
