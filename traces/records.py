"""What a run leaves behind: four tidy frames, one observation a row, the same for simulated and real runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_COLUMNS = (
    "response_id", "step", "epoch", "prompt_id", "sample", "prompt_tokens", "response_tokens", "truncated",
    "function", "weights_version", "assigned_s", "finished_s", "prepared_s", "migrations", "prefill_tokens",
    "cached_tokens",
)  # fmt: skip
PHASE_COLUMNS = ("step", "epoch", "stage", "start_s", "end_s")
WORKER_COLUMNS = ("function", "node", "gpus", "gpu_ids", "state", "role", "stage", "start_s", "end_s")
DECISION_COLUMNS = ("time_s", "step", "decision", "function", "responses", "detail")


@dataclass(slots=True)
class Recorder:
    """Rows as they are reported; nothing is derived here.

    Attributes:
        samples: Columns of the responses of a step or of part of one: who generated them when, with which weights, and
            what their prefill cost. A step is the phase "step", from the arrival of its prompts to the end of its
            learning.
        phases: A row a step and stage, from first to last activity.
        workers: A row an interval of a function in one state: `busy`, `idle`, `cold` (GPUs held but not yet of use:
            start, wake, park, change of role) or `parked` (no GPU held). `stage` is what it works for, or for an idle
            one last worked for; empty for one that has not worked since it started or woke.
        decisions: A row a decision.
    """

    samples: list[Mapping[str, Any]] = field(default_factory=list)
    phases: list[tuple[object, ...]] = field(default_factory=list)
    workers: list[tuple[object, ...]] = field(default_factory=list)
    decisions: list[tuple[object, ...]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.samples.clear()
        for rows in (self.phases, self.workers, self.decisions):
            rows.clear()

    def frames(self) -> Frames:
        """The rows as data frames."""
        return Frames(
            samples=_joined(self.samples, SAMPLE_COLUMNS),
            phases=_frame(self.phases, PHASE_COLUMNS),
            workers=_frame(self.workers, WORKER_COLUMNS),
            decisions=_frame(self.decisions, DECISION_COLUMNS),
        )


@dataclass(frozen=True, slots=True)
class Frames:
    """The four frames of a run, as described in `Recorder`."""

    samples: pd.DataFrame
    phases: pd.DataFrame
    workers: pd.DataFrame
    decisions: pd.DataFrame

    def by_name(self) -> dict[str, pd.DataFrame]:
        """Frames under the names of their files."""
        names = ("samples", "phases", "workers", "decisions")
        return {name: getattr(self, name) for name in names}


TEXT = {"prompt_id", "function", "stage", "state", "role", "gpu_ids", "decision", "detail", "node"}  # or may be None


def _joined(chunks: Sequence[Mapping[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd  # heavy: only when a run is over

    if not chunks:
        return _frame((), columns)
    return pd.DataFrame({name: np.concatenate([np.asarray(chunk[name]) for chunk in chunks]) for name in columns})


def _frame(rows: Sequence[tuple[object, ...]], columns: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd

    values = zip(*rows, strict=True) if rows else ([] for _ in columns)
    return pd.DataFrame({name: _column(name, column) for name, column in zip(columns, values, strict=True)})


def _column(name: str, values: Sequence[object]) -> NDArray[Any]:
    """An array of a fitting type; pandas would look at every value of a list to find it."""
    if name in TEXT and not all(type(value) is int for value in values):
        return np.array(values, dtype=object)
    return np.array(values)
