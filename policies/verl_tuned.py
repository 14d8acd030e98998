"""The best static plan: `verl` on as few nodes, and with engines of such a size, as the search found.

A user who cannot scale within a job can still rent fewer nodes for all of it. This policy is what elastic ones have to
beat.

Source: ours, no system's. `simrl.experiments.static_search` simulates `verl` and writes `nodes` and `tensor_parallel`
into the parameters, so that nothing is searched for when a run is repeated, or run on real engines.
"""

from __future__ import annotations

from pydantic import Field

from simrl.policies.contract import Observation, Start
from simrl.policies.verl import Verl, start_everywhere


class VerlTuned(Verl):
    """`verl` on some of the nodes; it leases no GPU of the others."""

    class Params(Verl.Params):
        """Parameters of `verl-tuned`.

        Attributes:
            nodes: How many of the cluster's nodes are used; None: found by search.
            tensor_parallel: GPUs an engine; None: found by search.
            step_limit_s: Longest mean step that the plan may take, in seconds; None: by `step_limit_of`.
            step_limit_of: The policy whose mean step on all nodes is the limit, in the search's own runs.
            step_slack: That mean times this is the limit.
        """

        nodes: int | None = Field(None, ge=1)
        tensor_parallel: int | None = Field(None, ge=1, le=8)
        step_limit_s: float | None = Field(None, gt=0)
        step_limit_of: str = "verl"
        step_slack: float = Field(1.0, gt=0)

    params: Params

    def __init__(self, params: Params | None = None) -> None:
        super().__init__(params or self.Params())

    def starts(self, observation: Observation) -> list[Start]:
        """Engines of the plan's size on the plan's nodes.

        Raises:
            ValueError: there is no plan, or the cluster is too small for it.
        """
        nodes, gpus = self.params.nodes, self.params.tensor_parallel
        if nodes is None or gpus is None:
            raise ValueError(f"policy.{nodes=} and policy.tensor_parallel={gpus} must both be numbers: the plan")
        if nodes > len(observation.nodes):
            raise ValueError(f"policy.{nodes=} must be at most cluster.nodes={len(observation.nodes)}")
        return start_everywhere(observation, nodes=nodes, gpus=gpus)
