"""Every backend keeps the contract: simulated ones, and real engines and learners on either clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from clusters import EXACT_STARTS, make_costs
from conformance import (
    EVERYTHING,
    Case,
    Make,
    check_expiry,
    check_illegal,
    check_job,
    check_life,
    check_loss,
    check_overlap,
    check_reset,
    check_stale,
    check_staleness,
    check_stalls,
)
from test_decisions import ILLEGAL_AT_ONCE, STARTS, Idle, Waits
from test_profile import PROFILE
from test_real_backend import Guess

from simrl.policies.contract import Assign, Decision, Observation, Park, Policy, Start
from simrl.real_backend.actors import HostPool
from simrl.real_backend.backend import ClockName, RealBackend, Replay
from simrl.real_backend.engine import EngineSettings
from simrl.real_backend.learner_settings import LearnerSettings
from simrl.real_backend.tiny_model import write_tiny_model
from simrl.simulator.backend import SimulatedBackend
from simrl.simulator.costs import CostModel
from simrl.simulator.profiled import ProfiledCosts
from simrl.traces.job import Engine
from simrl.traces.parameters import Parameters
from simrl.traces.records import Recorder

GPUS = 8


# --- makers ---


def on_shipped_tables(case: Case) -> tuple[SimulatedBackend, Recorder]:
    """A simulated node with measured kernels."""
    return simulated(case, make_costs(case.job(), parameters=EXACT_STARTS))


def on_a_profile(case: Case) -> tuple[SimulatedBackend, Recorder]:
    """The simulation of a profiled machine."""
    engine = Engine(tensor_parallel=1)
    costs = ProfiledCosts(
        case.job(), engine, PROFILE, nodes=1, gpus_per_node=GPUS, parameters=Parameters(), path="p", clock="virtual"
    )
    return simulated(case, costs)


def simulated(case: Case, costs: CostModel) -> tuple[SimulatedBackend, Recorder]:
    recorder = Recorder()
    return SimulatedBackend(costs, case.work, recorder, 0), recorder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostPool]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"), seed=0)
    engine = EngineSettings(model=str(model), num_kv_blocks=128, max_num_seqs=16, max_num_batched_tokens=256)
    learner = LearnerSettings(str(model), 0, 1, "", micro_batch_tokens=1024, mini_batch_prompts=2, timeout_s=120)
    with HostPool(engine, learner) as pool:
        yield pool


def real(hosts: HostPool, clock: ClockName) -> Make:
    def make(case: Case) -> tuple[RealBackend, Recorder]:
        recorder, engine, content = Recorder(), Engine(tensor_parallel=1, max_num_seqs=16), Replay(0, vocabulary=4096)
        backend = RealBackend(
            case.job(), engine, 1, GPUS, case.work, recorder, hosts, content, lambda _: Guess(), clock,
            checkpoints=False,
        )  # fmt: skip
        return backend, recorder

    return make


# --- policies that starve a cluster, of those that the tests of decisions have ---


class Hoards:
    """Generates, and never prepares."""

    def decide(self, observation: Observation) -> Sequence[Decision]:
        """Only at the beginning."""
        return [Start("a", 1, EVERYTHING), Assign("a", observation.unassigned)] if not observation.functions else []


STARVED: dict[str, tuple[Policy, str]] = {
    "does nothing": (Idle(), "4 responses unassigned"),
    "never prepares": (Hoards(), "0 unfinished, 4 unprepared"),
}
STARVED_IN_THE_END: dict[str, tuple[Policy, str]] = {
    "waits for ever": (Waits(), "4 responses unassigned"),
    "waits for GPUs that it holds": (
        Waits(Start("all", GPUS, ("learn",)), Start("more", 1, ("decode",))), "1 waiting for GPUs"
    ),
    "parks and forgets": (Waits(Start("a", 1, EVERYTHING), Park("a")), "1 parked"),
}  # fmt: skip


def check_starved(make: Make) -> None:
    """Also those who wait for ever, on clocks that make it short."""
    check_stalls(make, STARVED | STARVED_IN_THE_END)


def check_starved_soon(make: Make) -> None:
    """Those who do not wait."""
    check_stalls(make, STARVED)


def check_refused(make: Make) -> None:
    """What is illegal at once."""
    check_illegal(make, ILLEGAL_AT_ONCE, *STARTS)


# --- all of them ---

Check = Callable[[Make], object]
ON_ANY_CLOCK: tuple[Check, ...] = (check_reset, check_expiry, check_life, check_job, check_refused, check_starved_soon)
ON_CLOCKS_OF_THEIR_OWN: tuple[Check, ...] = (
    check_reset, check_expiry, check_life, check_overlap, check_refused, check_starved, check_stale, check_staleness,
)  # fmt: skip


@pytest.mark.parametrize("check", [*ON_CLOCKS_OF_THEIR_OWN, check_loss])
@pytest.mark.parametrize("make", [on_shipped_tables, on_a_profile])
def test_simulated_clusters_keep_the_contract(make: Make, check: Check) -> None:
    check(make)


@pytest.mark.parametrize("check", ON_CLOCKS_OF_THEIR_OWN)
def test_real_engines_keep_the_contract(hosts: HostPool, check: Check) -> None:
    check(real(hosts, "virtual"))


@pytest.mark.parametrize("check", ON_ANY_CLOCK)
def test_real_engines_keep_the_contract_while_time_is_time(hosts: HostPool, check: Check) -> None:
    check(real(hosts, "wall"))


def test_what_a_real_function_had_goes_on_when_it_is_lost(hosts: HostPool) -> None:
    check_loss(real(hosts, "virtual"))  # the last, as it costs an engine
