"""Numbers of a run, derived from its four frames; docs/metrics.md defines each of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from simrl.traces.parameters import Parameters
    from simrl.traces.records import Frames

HOLDING = ("busy", "idle", "cold")
"""States in which a function holds GPUs; one that is parked holds none."""
STAGES = ("generation", "preparation", "learning", "weight_sync")
LOST = "lost"
"""State of a row that tells when a function was lost, at its one moment, or how long a node was, without a function."""
KEPT_FOR = " (kept for "
"""In the name of a row of a process that was kept after its function's release, until the start that woke it."""
NO_STAGE = "none"
"""GPU-seconds that serve no stage: starts, wakes, changes of role, and waiting for the first work after them."""

Seconds = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Price:
    """What holding machines costs.

    Attributes:
        usd_per_hour: For a node or a GPU.
        per: Which of the two is sold.
        minimum_s: Shortest time that is billed.
        date: When it was so, as in 2026-09-17 or 2026-09; empty where nobody says.
    """

    usd_per_hour: float
    per: str
    minimum_s: float
    date: str = ""

    def __post_init__(self) -> None:
        if self.per not in ("node", "gpu"):
            raise ValueError(f"price per={self.per!r} must be 'node' or 'gpu'")

    @classmethod
    def load(cls, name: str, parameters: Parameters) -> Price:
        """The row *name* of the price table.

        Raises:
            ValueError: no such row, or it sells neither nodes nor GPUs.
        """
        number = parameters.number
        return cls(
            number(f"price.{name}.usd_per_hour"),
            parameters.name(f"price.{name}.per"),
            number(f"price.{name}.minimum_s"),
            parameters.name(f"price.{name}.date"),
        )


def summarise(
    frames: Frames,
    *,
    policy: str,
    seed: int,
    nodes: int,
    gpus: int,
    price: Price,
    policy_wall_s: float,
    wall_s: float,
) -> dict[str, Any]:
    """The content of summary.json: plain ints, floats, strings, dicts and None, no NaN.

    Args:
        frames: Of a simulated or a real run with at least one finished step.
        policy: Its name.
        seed: Root of the random streams.
        nodes: Of the cluster.
        gpus: Of the cluster.
        price: Turns leases into dollars.
        policy_wall_s: Host seconds in `decide`.
        wall_s: Host seconds of the run.

    Raises:
        ValueError: no step is finished.
    """
    samples, phases, leases = frames.samples, frames.phases, _leases(frames.workers)
    steps = phases[phases["stage"] == "step"]
    if steps.empty:
        raise ValueError("no step is finished: there is nothing to summarise")
    gpu_s, cost_usd = float(leases.gpu_s.sum()), _cost_usd(frames.workers, price)
    response_tokens, lost = int(samples["response_tokens"].sum()), frames.workers[frames.workers["state"] == LOST]
    prefill = int(samples["prefill_tokens"].sum())
    return {
        "policy": policy,
        "seed": seed,
        "nodes": nodes,
        "gpus": gpus,
        "steps": len(steps),
        "responses": len(samples),
        "response_tokens": response_tokens,
        "prompt_tokens": int(samples["prompt_tokens"].sum()),
        "simulated_s": float(steps["end_s"].max()),
        "step_s": _distribution(_durations(steps)),
        **_stage_means(phases, len(steps)),
        "gpu_s": gpu_s,
        "gpu_s_per_step": gpu_s / len(steps),
        "gpu_s_paper": gpu_s - leases.warm_s(),
        "gpu_s_by": {"stage": leases.by_stage(), "state": leases.by_state()},
        "cost_usd": cost_usd,
        "cost_usd_per_step": cost_usd / len(steps),
        "cost_usd_per_million_response_tokens": 1e6 * cost_usd / response_tokens if response_tokens else None,
        "busy_fraction": leases.by_state()["busy"] / gpu_s if gpu_s else 0.0,
        "cold_starts": _cold_starts(frames),
        "lost_functions": int((lost["function"] != "").sum()),
        "lost_nodes": int((lost["function"] == "").sum()),
        "migrations": int(samples["migrations"].sum()),
        "prefill_tokens_computed": prefill,
        "prefill_tokens_saved": int(samples["prompt_tokens"].sum()) - prefill,
        "first_epoch": _epochs(steps[steps["epoch"] == 0], leases),
        "later_epochs": _epochs(steps[steps["epoch"] > 0], leases),
        "policy_wall_s": float(policy_wall_s),
        "wall_s": float(wall_s),
    }


def _cold_starts(frames: Frames) -> int:
    """Starts that did not wake a kept process."""
    parked = frames.workers.loc[frames.workers["state"] == "parked", "function"]
    woken = sum(KEPT_FOR in function for function in parked)
    return int((frames.decisions["decision"] == "Start").sum()) - woken


@dataclass(frozen=True, slots=True)
class _Leases:
    """Intervals that hold GPUs, as columns."""

    state: NDArray[np.object_]
    stage: NDArray[np.object_]
    gpus: Seconds
    start_s: Seconds
    end_s: Seconds
    gpu_s: Seconds

    def by_state(self) -> dict[str, float]:
        return {state: float(self.gpu_s[self.state == state].sum()) for state in HOLDING}

    def by_stage(self) -> dict[str, float]:
        return {stage: float(self.gpu_s[self.stage == stage].sum()) for stage in (*STAGES, NO_STAGE)}

    def warm_s(self) -> float:
        """GPU-seconds of residency: cold, or idle and not yet used since the start or the wake."""
        unused = (self.state == "idle") & (self.stage == NO_STAGE)
        return float(self.gpu_s[(self.state == "cold") | unused].sum())


def gpu_s_between(leases: pd.DataFrame | _Leases, begin_s: float, end_s: float) -> float:
    """GPU-seconds of the part of *leases* (rows of `workers`) that lies in a window."""
    inside_s = np.minimum(np.asarray(leases.end_s), end_s) - np.maximum(np.asarray(leases.start_s), begin_s)
    return float((np.asarray(leases.gpus) * np.maximum(inside_s, 0.0)).sum())


def _leases(workers: pd.DataFrame) -> _Leases:
    held = workers[workers["state"].isin(HOLDING)]
    stage = held["stage"].astype(object)
    gpus, start_s, end_s = (held[name].to_numpy(dtype=float) for name in ("gpus", "start_s", "end_s"))
    return _Leases(
        state=held["state"].to_numpy(dtype=object),
        stage=stage.where(stage.isin(STAGES), NO_STAGE).to_numpy(dtype=object),
        gpus=gpus,
        start_s=start_s,
        end_s=end_s,
        gpu_s=gpus * (end_s - start_s),
    )


def _durations(phases: pd.DataFrame) -> Seconds:
    durations_s: Seconds = phases["end_s"].to_numpy(dtype=float) - phases["start_s"].to_numpy(dtype=float)
    return durations_s


def _distribution(seconds: Seconds) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"mean": float(seconds.mean()), "p50": float(p50), "p95": float(p95)}


def _stage_means(phases: pd.DataFrame, steps: int) -> dict[str, float]:
    return {f"{stage}_s": float(_durations(phases[phases["stage"] == stage]).sum()) / steps for stage in STAGES}


def _epochs(steps: pd.DataFrame, leases: _Leases) -> dict[str, Any] | None:
    """Step time and GPU-seconds of some steps; None when there are none."""
    if steps.empty:
        return None
    starts_s, ends_s = steps["start_s"].to_numpy(dtype=float), steps["end_s"].to_numpy(dtype=float)
    gpu_s = [gpu_s_between(leases, start_s, end_s) for start_s, end_s in zip(starts_s, ends_s, strict=True)]
    return {
        "steps": len(steps),
        "step_s": float((ends_s - starts_s).mean()),
        "gpu_s_per_step": sum(gpu_s) / len(steps),
    }


def _cost_usd(workers: pd.DataFrame, price: Price) -> float:
    if workers.empty:
        return 0.0
    billed_s = _node_seconds(workers, price) if price.per == "node" else _gpu_lease_seconds(workers, price)
    return price.usd_per_hour * billed_s / 3600


def _node_seconds(workers: pd.DataFrame, price: Price) -> float:
    """Node-seconds: from the first to the last interval on a machine, parked ones too, as they live in its memory.

    A node that was lost and has returned is another machine.
    """
    lost = workers["state"] == LOST
    there, gone = workers[~lost].assign(machine=0), workers[lost & (workers["function"] == "")]
    for node, absences in gone.groupby("node"):
        on_node = there["node"] == node
        lost_s = np.sort(absences["start_s"].to_numpy(dtype=float))
        there.loc[on_node, "machine"] = np.searchsorted(lost_s, there.loc[on_node, "start_s"], side="right")
    machines = there.groupby(["node", "machine"])
    return float((machines["end_s"].max() - machines["start_s"].min()).clip(lower=price.minimum_s).sum())


def _gpu_lease_seconds(workers: pd.DataFrame, price: Price) -> float:
    """GPU-seconds of leases: runs of adjoining intervals of one function, each billed for the minimum at least."""
    held = workers[workers["state"].isin(HOLDING)].sort_values(["function", "start_s"], kind="stable")
    if held.empty:
        return 0.0
    function = held["function"].to_numpy(dtype=object)
    start_s, end_s = held["start_s"].to_numpy(dtype=float), held["end_s"].to_numpy(dtype=float)
    # Intervals of one lease meet at the very same instant; the tolerance is for clocks of real runs.
    begins = np.ones(len(held), dtype=bool)
    begins[1:] = (function[1:] != function[:-1]) | (start_s[1:] > end_s[:-1] + 1e-6)
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(held)) - 1
    duration_s = np.maximum(end_s[last] - start_s[first], price.minimum_s)
    return float((duration_s * held["gpus"].to_numpy(dtype=float)[first]).sum())


def flat(summary: Mapping[str, Any]) -> dict[Hashable, Any]:
    """A summary as one row of a table: nested keys are joined by dots, as in `step_s.mean`."""
    row: dict[Hashable, Any] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            row.update({f"{key}.{inner}": item for inner, item in flat(value).items()})
        else:
            row[key] = value
    return row
