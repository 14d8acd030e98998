"""A response, as backends book it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simrl.policies.runtime.function import Serving, Trip


@dataclass(slots=True, eq=False)
class Rollout:
    """A response on its way through a step.

    Attributes:
        response_id: Id in the run.
        group: Responses of one group have the same prompt.
        prompt_tokens: Length of the prompt.
        target_tokens: Length at which generation ends, where it is known beforehand: to nature, not to policies.
        generated: Tokens generated so far, as of its engine's last report.
        kv_tokens: Tokens whose KV is on its engine's GPUs, or was sent along when it arrived.
        computed_tokens: Prompt (or recomputed) tokens that prefill really computed for it, over its life.
        cached_tokens: Tokens that prefill could skip, because they were cached or had been sent.
    """

    response_id: int
    group: int
    prompt_tokens: int
    target_tokens: int
    generated: int = 0
    kv_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    step: int = 0
    function: str | None = None
    serving: Serving | None = None  # where it is, or is under way to
    trip: Trip | None = None  # while it is under way
    weights_version: int = 0
    assigned_s: float = 0.0
    finished_s: float | None = None
    prepared_s: float | None = None
    migrations: int = 0
