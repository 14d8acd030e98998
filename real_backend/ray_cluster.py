"""Ray for the real backend: one of its own on this machine, or the cluster at an address that the user names.

One of its own listens on the loopback interface only, asks everybody for a token that only this user can read, keeps
its files in a private folder, and is gone with all its processes and files when it is closed.
"""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOCKET_PATH_BYTES = 107  # the kernel's limit
SESSION_PATH = "/simrl-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MAX_FOLDER_BYTES = SOCKET_PATH_BYTES - len(SESSION_PATH)
MIN_FREE_BYTES = 64 << 20  # below, logs and sockets cannot be relied on
FULL_BYTES = 1 << 20  # with less, an error of writing is no coincidence
CONNECT_TIMEOUT_S = 10.0
END_TIMEOUT_S = 5.0
NO_SPACE = ("No space left on device", "Disk quota exceeded", "File too large")


class ClusterError(RuntimeError):
    """Ray, or a process in it, cannot be started or reached, or has no space; says what is wrong and what to change."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Ray, as this process is connected to it.

    Attributes:
        ray: The module.
        ending: Undoes what connecting did.
    """

    ray: Any
    ending: ExitStack

    def close(self) -> None:
        """Disconnect; a Ray that was started here ends. One that ran in this process before stays."""
        self.ending.close()


def open_ray(address: str | None) -> RayCluster:
    """Connect to the cluster at *address*, or start one here unless this process has one.

    Raises:
        ClusterError: it does not start, or does not answer.
    """
    import ray

    with ExitStack() as ending:
        # `log_to_driver` does not silence the news of processes that died, which would get into what a command prints.
        ending.enter_context(_attribute(ray._private.worker, "_worker_logs_enabled", False))
        if address is not None:
            _connect(ray, address)
            ending.callback(ray.shutdown)
        elif not ray.is_initialized():
            ending.enter_context(_own_ray(ray))
        return RayCluster(ray, ending.pop_all())


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait until the block is over: it undoes what must not stay half undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


# --- a cluster that is there ---


def _connect(ray: Any, address: str) -> None:
    from ray._private import ray_constants

    _check_answers(address)
    try:
        with _attribute(ray_constants, "NUM_REDIS_GET_RETRIES", 1):  # of 20, each of most of a minute
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # whatever Ray raises
        raise ClusterError(f"the Ray cluster at {address} cannot be joined (--address): {last_line(error)}") from error


def _check_answers(address: str) -> None:
    """Raise unless somebody listens there: Ray itself would go on trying for most of a minute."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # one of Ray's words, like "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} (--address): {error}") from error


def node_affinity(ray: Any, node: int) -> Any:
    """Where Ray is to start a process: on that node, counted from the driver's own, the others by their addresses.

    Raises:
        ClusterError: there are fewer.
    """
    own = ray.get_runtime_context().get_node_id()
    alive = [entry for entry in ray.nodes() if entry["Alive"]]
    ordered = sorted(alive, key=lambda entry: (entry["NodeID"] != own, entry["NodeManagerAddress"], entry["NodeID"]))
    if node >= len(ordered):
        raise ClusterError(f"the Ray cluster has {len(ordered)} nodes, and node {node} was asked for (cluster.nodes)")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ordered[node]["NodeID"], soft=False)


# --- one of our own ---


@contextmanager
def _own_ray(ray: Any) -> Iterator[None]:
    root = _temporary_folder()
    _check_folder(root)
    with (
        tempfile.TemporaryDirectory(prefix="simrl-", dir=root, ignore_cleanup_errors=True) as folder,
        _private_token(ray, Path(folder)),
        _ends_on_sigterm(),
        _ended(ray, folder),
    ):
        _start(ray, folder)
        yield


def _temporary_folder() -> str:
    """Where Ray's files go: what the user says, or the usual place if its path is short enough for sockets."""
    usual = tempfile.gettempdir()
    return os.environ.get("RAY_TMPDIR") or (usual if len(os.fsencode(usual)) <= MAX_FOLDER_BYTES else "/tmp")


def _check_folder(root: str) -> None:
    """Raise unless Ray's files can be there: its own messages come late or never."""
    if len(os.fsencode(root)) > MAX_FOLDER_BYTES:
        raise ClusterError(
            f"Ray cannot start: RAY_TMPDIR={root} is too long for the path of a socket; set one of at most"
            f" {MAX_FOLDER_BYTES} bytes"
        )
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise ClusterError(f"Ray cannot start: {error}; set RAY_TMPDIR to another folder") from error
    if free < MIN_FREE_BYTES:
        raise ClusterError(
            f"Ray cannot start: {root} has {free} bytes free, at least {MIN_FREE_BYTES} are needed; set RAY_TMPDIR to"
            " another folder"
        )


@contextmanager
def _private_token(ray: Any, folder: Path) -> Iterator[None]:
    """Ray asks for a token of its own: the one that it keeps in the home folder may be readable by others."""
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    try:
        with _environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(path), RAY_AUTH_TOKEN=None):
            _read_token_again(ray)
            yield
    finally:
        _read_token_again(ray)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Variables set, or with None unset, for the block."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _read_token_again(ray: Any) -> None:
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _start(ray: Any, folder: str) -> None:
    from ray._private import ray_constants

    temporary = Path(folder) / "tmp"  # of all processes: the engines' libraries leave files
    temporary.mkdir(mode=0o700)
    with (
        # Ray replaces a loopback address by one that other machines can reach, and then listens on all interfaces,
        # unless it is told that this machine is in no cluster: a setting for desktops, read when Ray is imported.
        _attribute(ray_constants, "ENABLE_RAY_CLUSTER", False),
        _environment(TMPDIR=str(temporary), RAY_USAGE_STATS_ENABLED="0"),
        # Interrupted in the middle it aborts later; it would also take SIGTERM to itself.
        _attribute(ray._private.utils, "set_sigterm_handler", lambda handler: None),
        uninterrupted(),
    ):
        try:
            ray.init(
                "local",
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=f"{folder}/ray",
                _system_config={"enable_metrics_collection": False},
            )
        except Exception as error:  # whatever Ray raises
            raise ClusterError(f"Ray cannot start in {folder}: {last_line(error)}") from error
    address = ray.util.get_node_ip_address()
    if address != "127.0.0.1":
        raise ClusterError(f"Ray {ray.__version__} listens on {address}, not on the loopback interface alone")


@contextmanager
def _attribute(module: Any, name: str, value: object) -> Iterator[None]:
    """A module's variable set for the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """A program that does not handle SIGTERM would leave processes and files behind; it exits as from `sys.exit`."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _ended(ray: Any, folder: str) -> Iterator[None]:
    """After the block, no process of the Ray whose files are in that folder is left."""
    try:
        yield
    finally:
        with uninterrupted():
            processes = _processes(folder)
            try:
                ray.shutdown()
            finally:
                _end(processes)


def _psutil() -> Any:
    return importlib.import_module("psutil")  # comes with Ray


def _processes(folder: str) -> list[Any]:
    """This process's children that Ray's command lines tell, and theirs."""
    psutil, found = _psutil(), []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(folder in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _end(processes: Sequence[Any]) -> None:
    """Kill those that are still there after a while."""
    psutil = _psutil()
    _, alive = psutil.wait_procs(processes, END_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, END_TIMEOUT_S)


# --- what went wrong ---


@contextmanager
def starting(what: str, asked_for: str) -> Iterator[None]:
    """The block waits until a process is ready.

    Args:
        what: It is.
        asked_for: Memory that it takes, in words.

    Raises:
        ClusterError: it died, or was not ready in time.
    """
    try:
        yield
    except Exception as error:  # Ray's own, and TimeoutError
        reason = next(filter(None, map(death, _causes(error))), None)
        reason = reason or (str(error) if isinstance(error, TimeoutError) else None)
        if reason is None:
            raise
        free_gb = _psutil().virtual_memory().available / 1e9
        raise ClusterError(
            f"{what} cannot start: {reason}; it needs {asked_for}; this machine has {free_gb:.1f} GB of memory free,"
            f" Ray {_free_resources()}; fewer GPUs (--gpus) or KV blocks need less"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _free_resources() -> str:
    """CPUs and GPUs that Ray has not given away."""
    free = sys.modules["ray"].available_resources()
    return " and ".join(f"{free.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))


def no_space(error: Exception, folder: Path) -> ClusterError | None:
    """What to raise if *error*, from any process, says that what *folder* is on is full."""
    free = shutil.disk_usage(folder).free
    says_so = any(words in str(error) for words in NO_SPACE)
    if not says_so and not (isinstance(error, OSError) and free < FULL_BYTES):
        return None
    return ClusterError(f"no space to write in {folder}, {free / 1e6:.1f} MB are free: {last_line(error)}")


def death(error: BaseException) -> str | None:
    """In one line, which process died and why, as Ray tells it; None if that is not what happened."""
    ray = sys.modules.get("ray")
    if ray is None or not isinstance(error, ray.exceptions.RayActorError):
        return None
    text = str(error)
    if error.actor_init_failed:
        return f"a process failed while it started: {last_line(error)}"
    facts = dict(line.strip().split(": ", 1) for line in text.splitlines() if line.startswith("\t") and ": " in line)
    who = facts.get("class_name", "a process of Ray")
    reason = " ".join(line for line in text.splitlines()[1:] if not line.startswith("\t")) or text
    return f"{who} (pid {facts.get('pid', 'unknown')}) died: {reason}"


def last_line(error: BaseException) -> str:
    """Ray's messages hold tracebacks of other processes; what happened is in their last line."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
