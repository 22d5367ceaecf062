# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Many texts on many machines: windows of them are classified by workers of Ray Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from transformers_cee.bulk.classifying import BulkSummary, checked_output, written
from transformers_cee.bulk.texts import Texts, find_texts
from transformers_cee.bulk.windows import ClassifiedTexts, WindowClassifier
from transformers_cee.exits.fields import check_field, whole
from transformers_cee.tokenizing import tokenizer_of


# So many windows for each worker are held at once, or as many as fit in some bytes: two that it has in hand, two that
# wait.
WINDOWS, BYTES = 4, 2**26
# Ray reports to its makers and opens a page for the network unless it is told not to; what its workers have to say of
# their deaths is in its own files.
_ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def classify_on_ray(
    model: str | os.PathLike[str],
    texts: Any,
    *,
    output: str | os.PathLike[str],
    workers: int = 2,
    text_column: str = "text",
    batch_size: int = 32,
    window: int = 4096,
    max_length: int | None = None,
    exit_threshold: float | list[float] | str | None = None,
    exit_criterion: str | None = None,
    exit_budget: float | None = None,
    min_exit_layer: int | None = None,
    disable_tqdm: bool = False,
) -> BulkSummary:
    """Classifies any number of texts on several workers, with the results of [`classify`] in the order of the texts.

    One process reads the texts, on this machine, a window at a time; each worker loads the model once and classifies
    window after window. A worker that dies is started again and its windows are classified again. Runs on the cluster
    of Ray that this process is connected to, or that the environment variable `RAY_ADDRESS` names; without one, on
    this machine. Workers run on CPUs, which they share evenly.

    Args:
        model (`str` or `os.PathLike`):
            Folder or Hub name of a classifier with exits, or of its export. Every machine loads it by this name.
        texts (iterable of `str`, `datasets.Dataset`, `str` or `os.PathLike`): as in [`classify`]; no iterator.
        output (`str` or `os.PathLike`):
            File for the results, .jsonl or .csv. It is written beside, and in its place when all is done.
        workers (`int`, *optional*, defaults to 2): processes that classify.
        text_column, batch_size, window, max_length (*optional*): as in [`classify`].
        exit_threshold, exit_criterion, exit_budget, min_exit_layer (*optional*): as in the model's call.
        disable_tqdm (`bool`, *optional*, defaults to `False`): show no progress.

    Returns:
        [`BulkSummary`]: once the file holds the results.

    Raises:
        ImportError: Ray is not installed.
        TypeError: a model that is no name, classifies no texts or has no exits; texts that can be read only once.
        FileNotFoundError: there is no such file.
        ValueError: a row that holds no text, which is named, an argument that is not accepted, or more workers than
            the cluster has CPUs. No worker has been started by then.
    """
    check_field("workers", workers, whole(1))
    check_field("window", window, whole(1))
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"`model` of type {type(model).__name__} must be a name, by which every worker loads it: save the model "
            "with its tokenizer and give the folder."
        )
    require_ray()
    source, target = find_texts(texts, text_column), checked_output(output, texts)
    if not source.is_lasting:
        raise TypeError(
            f"`texts` of type {type(texts).__name__} can be read only once, but a worker that dies reads again: give "
            "a file, a list or a `datasets.Dataset`."
        )
    # Wherever a worker runs.
    name = os.fspath(Path(model).absolute() if Path(model).is_dir() else model)
    asked = {
        "batch_size": batch_size, "max_length": max_length, "exit_threshold": exit_threshold,
        "exit_criterion": exit_criterion, "exit_budget": exit_budget, "min_exit_layer": min_exit_layer,
    }  # fmt: skip
    # Made here, it says what it does not accept before there is a worker.
    classifier = _load(name, asked)
    takes_blanks, names = classifier.takes_blanks, classifier.model.config.id2label
    del classifier
    count = largest = 0
    for some in source.windows(window, takes_blanks):
        # A character takes up to four bytes.
        count, largest = count + len(some), max(largest, 4 * sum(map(len, some)))
    if count == 0:
        return written(iter(()), names, target)
    if isinstance(texts, (str, os.PathLike)):
        source = find_texts(Path(texts).absolute(), text_column)
    with _cluster(workers) as cpus, tqdm(total=count, unit="texts", disable=disable_tqdm) as progress:
        made = {"model": name, "asked": asked, "threads": cpus}
        read = partial(_blocks, source, window, takes_blanks)
        held = max(BYTES, WINDOWS * workers * largest)
        with closing(_classified(read, made, workers, held, progress)) as found:
            return written(found, names, target)


def require_ray() -> None:
    """Raises `ImportError` unless Ray Data is installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"`workers` are processes of Ray Data, which cannot be imported ({error}): "
            "pip install 'transformers-cee[ray]'."
        ) from error


class Worker:
    """Loads a model once and classifies windows.

    Args:
        model (`str`): folder or Hub name.
        asked (`dict`): arguments of [`WindowClassifier`].
        threads (`int`): that the model may use.
    """

    def __init__(self, model: str, asked: dict[str, Any], threads: int) -> None:
        # Before the tokenizer first uses them.
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        self.classifier = _load(model, asked)

    def __call__(self, block: Any) -> Any:
        """The results of a window; both are tables of Arrow with one row, and carry the window's number."""
        import pyarrow

        (window,) = block["texts"].to_pylist()
        found = self.classifier(window)
        columns = {key: pyarrow.array([value.numpy()]) for key, value in vars(found).items()}
        return pyarrow.table({"number": block["number"], **columns})


def _load(model: str, asked: dict[str, Any]) -> WindowClassifier:
    loaded = AutoModelForSequenceClassification.from_pretrained(model)
    return WindowClassifier(loaded, tokenizer_of(loaded, "`texts`"), **asked)


def _blocks(source: Texts, window: int, takes_blanks: bool) -> Iterator[Any]:
    """Windows of texts as tables of Arrow with one row, numbered from 0."""
    import pyarrow

    kind = pyarrow.large_list(pyarrow.large_string())
    for number, texts in enumerate(source.windows(window, takes_blanks)):
        yield pyarrow.table({"number": [number], "texts": pyarrow.array([texts], kind)})


def _classified(
    read: partial[Iterator[Any]], made: dict[str, Any], workers: int, held: int, progress: tqdm
) -> Generator[ClassifiedTexts, None, None]:
    """What becomes of the windows, in their order.

    Args:
        read (`partial`): gives the windows.
        made (`dict`): arguments of [`Worker`].
        held (`int`): bytes of windows that are read and not yet classified, about.
    """
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources, read_datasource
    from ray.exceptions import RayTaskError

    context = DataContext.get_current().copy()
    # A block for each window, however small, so that workers get one at a time.
    context.target_max_block_size = 1
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=held)
    with DataContext.current(context):
        # Reading takes no CPU from the workers, which have them all.
        results = read_datasource(_reading(read), num_cpus=0, override_num_blocks=1).map_batches(
            Worker, fn_constructor_kwargs=made, batch_size=1, batch_format="pyarrow", num_cpus=made["threads"],
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2), udf_modifying_row_count=False,
        )  # fmt: skip
        blocks = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        try:
            for expected, row in enumerate(row for block in blocks for row in _rows(block)):
                if row.pop("number") != expected:
                    raise RuntimeError(f"Window {expected} of the texts is missing from what the workers gave.")
                some = ClassifiedTexts(**row)
                progress.update(len(some.exit_layers))
                yield some
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                # The lines behind tell how often Ray Data has tried.
                raise ValueError(str(error.cause).splitlines()[0]) from error
            raise


def _rows(block: Any) -> Iterator[dict[str, Any]]:
    """Rows of a table of Arrow: numbers as they are, lists as tensors."""
    for place in range(block.num_rows):
        row = {name: block[name][place] for name in block.column_names}
        yield {
            name: torch.from_numpy(value.values.to_numpy().copy()) if hasattr(value, "values") else value.as_py()
            for name, value in row.items()
        }


def _reading(read: partial[Iterator[Any]]) -> Any:
    """What Ray Data reads from: one task on this machine, which goes on as windows are taken from it."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Windows(Datasource):  # type: ignore[misc]
        supports_distributed_reads = False

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *args: Any, **kwargs: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(read, unknown)]

    return Windows()


@contextmanager
def _cluster(workers: int) -> Iterator[int]:
    """Connects to Ray unless this process is connected, and gives the CPUs that each worker may take."""
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        address = os.environ.get("RAY_ADDRESS") or "local"
        local = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False}
        with mock.patch.dict(os.environ, _ALONE):
            ray.init(
                address, log_to_driver=False, logging_level=logging.ERROR, **(local if address == "local" else {})
            )
    # What it tells of each run is told by the summary.
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield _cpus(workers, [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]])
    finally:
        logger.setLevel(level)
        if is_ours:
            ray.shutdown()


def _cpus(workers: int, nodes: list[int]) -> int:
    """The most CPUs that each of some workers can have.

    Args:
        nodes (`list[int]`): CPUs of the machines.

    Raises:
        ValueError: there are fewer CPUs than workers.
    """
    for cpus in range(max(nodes, default=0), 0, -1):
        if sum(node // cpus for node in nodes) >= workers:
            return cpus
    raise ValueError(f"`workers`={workers} must be at most {sum(nodes)}, the CPUs of the cluster.")
