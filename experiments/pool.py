"""Many runs on all cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, TypeVar

from simrl.experiments.config import Config
from simrl.experiments.run import run

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def map_on_cores(
    function: Callable[[Job], Answer],
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """What *function* says of each job, in their order; an error ends all others.

    Args:
        function: Of a module: spawned processes import it.
        jobs: The longest first make best use of the cores.
        workers: Processes; by default one a core. With one everything runs in this process.
        progress: Called with the percentage of jobs done.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return [_told(function(job), 100 * done // len(jobs), progress) for done, job in enumerate(jobs, 1)]
    with spawned_pool(workers) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            _told(future.result(), 100 * done // len(jobs), progress)
        return [future.result() for future in futures]


@contextmanager
def spawned_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, whatever ends it: after an error or Ctrl-C they would finish their jobs first.

    Spawned, as a forked copy of a process with threads may hang.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()


def _start_worker() -> None:
    """Ctrl-C is the parent's business, and a worker ends with its parent, whatever ended that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _told(answer: Answer, percent: int, progress: Callable[[int], None] | None) -> Answer:
    if progress is not None:
        progress(percent)
    return answer


def summary_of(config: Config) -> dict[str, Any]:
    """The summary of a run."""
    return run(config).summary


def summaries_of(
    configs: Iterable[Config], *, workers: int | None = None, progress: Callable[[int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """The summary of each configuration, by `key_of`; equal ones run once."""
    unique = {key_of(config): config for config in configs}
    summaries = map_on_cores(summary_of, list(unique.values()), workers=workers, progress=progress)
    return dict(zip(unique, summaries, strict=True))


def key_of(config: Config) -> str:
    """The same text for equal configurations."""
    return config.model_dump_json()
