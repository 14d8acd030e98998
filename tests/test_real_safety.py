"""What real processes listen to, leave behind and say when something goes wrong."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from simrl import cli
from simrl.real_backend import actors, ray_cluster
from simrl.real_backend.actors import ANYWHERE, HostPool
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.ray_cluster import ClusterError, open_ray
from simrl.real_backend.tiny_model import write_tiny_model

KEY = "from ray._raylet import GcsClient; print(GcsClient(address={0!r}).internal_kv_get(b'session_name', b'session'))"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("model"), seed=0))


@pytest.fixture(scope="module")
def learner(model: str) -> LearnerSettings:
    return LearnerSettings(model, 0, 2, "", timeout_s=60)


@pytest.fixture(scope="module")
def pool(model: str, learner: LearnerSettings) -> Iterator[HostPool]:
    """An engine, and two ranks that have met; afterwards nothing may be left of them."""
    others = children()  # of other tests in this process, such as Python's own resource tracker
    with HostPool(EngineSettings(model=model, num_kv_blocks=64, max_model_len=512, max_num_seqs=4), learner) as pool:
        pool.take_ready()
        rendezvous = f"file://{pool.new_run() / 'rendezvous'}"
        ranks = pool.learners([ANYWHERE] * 2)
        pool.get([rank.connect.remote(replace(learner, rank=i, rendezvous=rendezvous)) for i, rank in enumerate(ranks)])
        processes = [process for process in children() if process not in others]
        folders = [pool.folder, ray_folder()]
        yield pool
    assert [process.name() for process in processes if process.is_running()] == []
    assert [folder for folder in folders if folder.exists()] == []
    assert not ray.is_initialized()


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def ray_folder() -> Path:
    return Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent


def loopback(address: str) -> bool:
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return (mapped or parsed).is_loopback


def test_all_sockets_are_on_the_loopback_interface(pool: HostPool) -> None:
    sockets = [
        (process.name(), connection.laddr.ip, connection.laddr.port)
        for process in (psutil.Process(), *children())
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or not connection.raddr
    ]
    names = " ".join(name for name, _, _ in sockets)
    assert all(name in names for name in ("gcs_server", "raylet", "EngineHost", "LearnerHost")), (
        "not all were looked at"
    )
    assert [each for each in sockets if not loopback(each[1])] == []


def test_ray_asks_everybody_for_a_token_that_only_this_user_can_read(pool: HostPool) -> None:
    token = ray_folder() / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    code = KEY.format(ray.get_runtime_context().gcs_address)
    with_token = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "session_" in with_token.stdout
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    for auth in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
        without = subprocess.run(
            [sys.executable, "-c", code], env=others | auth, capture_output=True, text=True, timeout=60, check=False
        )
        assert without.returncode != 0
        assert "InvalidAuthToken" in without.stderr


def test_files_are_private(pool: HostPool) -> None:
    run = pool.new_run()
    for folder in (pool.folder, Path(str(pool.engine.kv_folder)), run, ray_folder()):
        assert folder.stat().st_mode & 0o777 == 0o700, folder
    sockets = [c.laddr for p in children() for c in p.net_connections("unix") if c.laddr and "/" in c.laddr]
    assert sockets
    assert [path for path in sockets if ray_folder() not in Path(path).parents] == []


def test_a_full_disk_is_said_with_the_folder(pool: HostPool) -> None:
    rank, other = pool.learners([ANYWHERE] * 2)

    def small_files(_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def large_files(_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    folder = str(pool.folder / "weights")
    pool.get(rank.__ray_call__.remote(small_files))
    with pytest.raises(ClusterError, match=rf"no space to write in {pool.folder}, [0-9.]+ MB are free: .*os error 27"):
        pool.get([each.export_weights.remote(folder) for each in (rank, other)])
    pool.get(rank.__ray_call__.remote(large_files))
    pool.get([each.export_weights.remote(folder) for each in (rank, other)])


def test_an_engine_that_cannot_start_says_why_and_what_to_change(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses:
        def __init__(self, *settings: object) -> None:
            raise MemoryError("Available memory is less than the KV cache")

        def ready(self) -> None: ...

    monkeypatch.setattr(actors, "EngineHost", Refuses)
    with pytest.raises(ClusterError) as refused:
        [pool.take_ready() for _ in range(2)]
    told = str(refused.value)
    assert told.startswith("engine 2 cannot start: a process failed while it started: MemoryError: Available memory")
    for words in ("num_kv_blocks=64", "GB of memory free", "--gpus"):
        assert words in told


def test_a_process_that_dies_is_named_with_the_reason(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Victim:
        def process(self) -> int:
            return os.getpid()

        def wait(self) -> None:
            signal.pause()

    actor = ray.remote(Victim).options(num_cpus=0).remote()
    pid = pool.get(actor.process.remote())
    waiting = actor.wait.remote()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError) as died:
        pool.get(waiting)
    monkeypatch.setattr(cli, "app", raising(died.value))
    assert cli.main([]) == 1
    printed = capfd.readouterr()
    assert f"Victim (pid {pid}) died: The actor is dead because its worker process has" in printed.err
    assert "connection error code 2" in printed.err
    assert printed.err.count("\n") == 1


# --- without processes ---


def raising(error: Exception) -> Any:
    def app(*arguments: object, **options: object) -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (ClusterError("no room"), "simrl: no room\n", 2),
        (OSError(errno.ENOSPC, "No space left on device", "p.json"), "simrl: no space to write p.json: No space", 2),
        (TimeoutError("a call took more than 900 s"), "simrl: a call took more than 900 s\n", 1),
    ],
)
def test_errors_of_the_real_backend_take_a_line(
    error: Exception, told: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", raising(error))
    assert cli.main([]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(told)
    assert printed.count("\n") == 1


def test_a_cluster_that_does_not_answer_is_named() -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 \(--address\): .*refused"):
        ray_cluster._check_answers("127.0.0.1:1")


def test_folders_in_which_ray_could_not_start_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 60)
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR=/x+ is too long for the path of a socket"):
        ray_cluster._check_folder(ray_cluster._temporary_folder())
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setattr(ray_cluster.tempfile, "gettempdir", lambda: "/" + "x" * 60)
    assert ray_cluster._temporary_folder() == "/tmp"
    monkeypatch.setattr(ray_cluster.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(ClusterError, match="has 4096 bytes free"):
        ray_cluster._check_folder("/tmp")
    monkeypatch.undo()
    with pytest.raises(ClusterError, match="No such file or directory: '/no-such-folder'; set RAY_TMPDIR to another"):
        ray_cluster._check_folder("/no-such-folder")


def test_what_must_not_stay_half_undone_is_not_interrupted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), ray_cluster.uninterrupted():  # noqa: PT012  the interrupt comes at the end
        signal.raise_signal(signal.SIGINT)
        done.append("to the end")
    assert done == ["to the end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_ray_that_was_there_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("Ray"))
    open_ray(None).close()
    assert ended == []


# --- signals ---

COMMAND = """
import sys, tempfile
from simrl.cli import main

make = tempfile.mkdtemp

def mkdtemp(*arguments, **options):
    folder = make(*arguments, **options)
    with open(sys.argv[1], "a") as file:
        print(folder, file=file)
    return folder

tempfile.mkdtemp = mkdtemp
sys.exit(main(sys.argv[2:]))
"""
"""The command line, with a list of the folders that it makes: others make folders at the same time."""


@pytest.mark.parametrize(
    ("number", "moment", "code", "told"),
    [
        (signal.SIGTERM, "gcs_server", 143, "simrl: ended by SIGTERM\n"),
        (signal.SIGTERM, "ray::EngineHost.__init__", 143, "simrl: ended by SIGTERM\n"),
        (signal.SIGINT, "ray::EngineHost at work", 130, "simrl: interrupted\n"),
    ],
)
def test_a_signal_ends_everything_that_was_started(
    number: signal.Signals, moment: str, code: int, told: str, model: str, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    profile = ["profile", "--device", "cpu", "--model", model, "-o", str(tmp_path / "p.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path / "folders"), *profile],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        started = wait_for(process, moment)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, printed, errors) == (code, "", told)
    assert [each for each in started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
    folders = (tmp_path / "folders").read_text().splitlines()
    assert len(folders) >= 2, "the pool's and Ray's at least"
    assert [folder for folder in folders if Path(folder).exists()] == []
    assert list(temporary.iterdir()) == []


def wait_for(process: subprocess.Popen[str], moment: str) -> list[psutil.Process]:
    """Processes that it started until one of them has that title, as Ray gives them by what they do."""
    for _ in range(2400):
        if process.poll() is not None:
            break
        started = psutil.Process(process.pid).children(recursive=True)
        if moment in map(title, started):
            return started
        time.sleep(0.05)
    process.terminate()
    raise AssertionError(f"no {moment} came: {process.communicate(timeout=60)}")


def title(process: psutil.Process) -> str:
    try:
        name = Path((process.cmdline() or [""])[0]).name
    except psutil.Error:
        return ""
    return "ray::EngineHost at work" if name in ("ray::EngineHost", "ray::EngineHost.step") else name
