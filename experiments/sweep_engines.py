"""Where the runs of a sweep are carried out: processes of this machine, or Ray. A run that fails harms no other."""

from __future__ import annotations

import functools
import gc
import hashlib
import traceback
from collections.abc import Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import simrl
from simrl.experiments.config import Config
from simrl.experiments.pool import spawned_pool
from simrl.experiments.run import Work, drawn_work, run

ATTEMPTS = 3  # of a run whose process dies
AHEAD = 4  # runs a core that Ray is given beforehand
SOURCES = ("traces", "policies", "simulator", "experiments")
LIBRARIES = ("numpy", "pandas", "scipy", "simpy")  # that results go through

Outcome = Mapping[str, Any]
"""Of a run: `summary` and `warnings`, or `error` and `traceback`; nothing but what JSON has."""


@functools.cache
def code_version() -> str:
    """Hash of all that decides what a run's results are: simrl's sources and data, and versions of libraries.

    A commit would not tell what is changed and not committed, and an installed package has none.
    """
    digest = hashlib.sha256(json_of_versions().encode())
    for folder in SOURCES:
        root = Path(simrl.__path__[0], folder).resolve()
        for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            digest.update(f"{folder}/{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def json_of_versions() -> str:
    """Names and versions of the libraries."""
    return ",".join(f"{name}={version(name)}" for name in LIBRARIES)


def run_cell(config_json: str, expected_version: str | None = None) -> Outcome:
    """One run, for a process that does many of them.

    Args:
        config_json: A `Config`.
        expected_version: What `code_version` must be here; another machine may have another one.
    """
    try:
        if expected_version not in (None, code_version()):
            raise RuntimeError("simrl or its libraries differ between this worker and the driver of the sweep")
        config = Config.model_validate_json(config_json)
        gc.disable()  # a run makes little garbage: searching for it after the run saves an eighth of the time
        result = run(config, work=_work(config.job.model_dump_json(), config.seed))
    except (Exception, SystemExit) as error:  # a policy's bug too: the other cells go on
        return {"error": " ".join(f"{type(error).__name__}: {error}".split()), "traceback": traceback.format_exc()}
    finally:
        gc.enable()
        gc.collect()
    return {"summary": result.summary, "warnings": list(result.warnings)}


@functools.lru_cache(maxsize=2)
def _work(job_json: str, seed: int) -> Work:
    """What cells of the same job and seed share in a process: the lengths, drawn once."""
    work = drawn_work(Config.model_validate_json(f'{{"job": {job_json}, "seed": {seed}}}'))
    return replace(work, of_step=functools.lru_cache(maxsize=64)(work.of_step))


# --- processes of this machine ---


def on_processes(jobs: Mapping[str, str], processes: int) -> Generator[tuple[str, Outcome], None, None]:
    """Outcomes as they come, by key; *jobs* are texts of configurations.

    A process that dies takes its pool with it: runs that were under way are done again after all others, each in a
    process of its own, so that one that kills its process is told from its neighbours.
    """
    waiting, suspects = dict(jobs), dict[str, str]()
    while waiting:
        for key, outcome in _one_pool(waiting, processes):
            if outcome is None:
                suspects[key] = waiting.pop(key)
            else:
                del waiting[key]
                yield key, outcome
    for key, job in suspects.items():
        yield key, _alone(key, job)


def _alone(key: str, job: str) -> Outcome:
    for _ in range(ATTEMPTS - 1):
        for _, outcome in _one_pool({key: job}, 1):
            if outcome is not None:
                return outcome
    return {"error": f"its process died {ATTEMPTS} times", "traceback": ""}


def _one_pool(jobs: Mapping[str, str], processes: int) -> Generator[tuple[str, Outcome | None], None, None]:
    """Outcomes until all are there or a process dies; then None for those that were under way."""
    with spawned_pool(min(processes, len(jobs))) as pool:
        queue, pending = list(jobs.items())[::-1], dict[Future[Outcome], str]()
        broken = False
        while True:
            # One more than the processes can do at once, so that none waits, and few were under way when one dies.
            while queue and not broken and len(pending) <= processes:
                try:
                    pending[pool.submit(run_cell, queue[-1][1])] = queue[-1][0]
                    queue.pop()
                except BrokenProcessPool:
                    broken = True
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                key = pending.pop(future)
                try:
                    yield key, future.result()
                except BrokenProcessPool:
                    broken = True
                    yield key, None


# --- Ray ---


def on_ray(
    jobs: Mapping[str, str], address: str | None, at_once: int | None
) -> Generator[tuple[str, Outcome], None, None]:
    """The same on Ray: one of its own on this machine, or the cluster at *address*, on all of whose CPUs or *at_once*.

    Ray starts a run again whose worker died.

    Raises:
        ClusterError: Ray does not start, or does not answer.
    """
    from simrl.real_backend.ray_cluster import last_line, open_ray

    cluster = open_ray(address)
    try:
        ray = cluster.ray
        task = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(run_cell)
        queue, pending = list(jobs.items())[::-1], dict[Any, str]()
        while True:
            # The CPUs of now: clusters grow.
            ahead = at_once or AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
            while queue and len(pending) < ahead:
                key, job = queue.pop()
                pending[task.remote(job, code_version())] = key
            if not pending:
                return
            done, _ = ray.wait(list(pending), num_returns=1)
            key = pending.pop(done[0])
            try:
                yield key, ray.get(done[0])
            except ray.exceptions.RayError as error:
                yield key, {"error": last_line(error), "traceback": str(error)}
    finally:
        cluster.close()
