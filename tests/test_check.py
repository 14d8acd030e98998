"""The conformance suite tells what is wrong with a policy."""

import random
import sys
import time

import pytest

import simrl
from simrl import At, Learn, Policy, Prepare, Start, Subscribe, Sync
from simrl.policies.check import PolicyCheckFailed
from simrl.policies.verl import Verl


class Faulty(Verl):
    """`verl` whose decisions pass through `spoil`."""

    def decide(self, observation):
        return self.spoil(list(super().decide(observation)), observation)

    def spoil(self, decisions, observation):
        raise NotImplementedError


class AssignsTwice(Faulty):
    def spoil(self, decisions, observation):
        assigns = [decision for decision in decisions if isinstance(decision, simrl.Assign)]
        return [*decisions, *assigns[:1]]


class Starves(Faulty):
    def spoil(self, decisions, observation):
        return [decision for decision in decisions if not isinstance(decision, Prepare)]


class Mutates(Faulty):
    def spoil(self, decisions, observation):
        if observation.prompts:
            object.__setattr__(observation.prompts[0], "tokens", 1)
        return decisions


class Sets(Faulty):
    def spoil(self, decisions, observation):
        observation.time_s = 0.0
        return decisions


class SetsTheEngine(Faulty):
    def spoil(self, decisions, observation):
        object.__setattr__(observation.engine, "tensor_parallel", observation.engine.tensor_parallel + 1)
        return decisions


class WantsNine(Faulty):
    def spoil(self, decisions, observation):
        return [Start("big", 9, ("decode",)), *decisions] if observation.time_s == 0 else decisions


class WantsTooMany(Faulty):
    def spoil(self, decisions, observation):
        return [*decisions, *(Start(f"more-{i}", 8, ("decode",)) for i in range(9) if observation.time_s == 0)]


class Stale(Faulty):
    def spoil(self, decisions, observation):
        return [decision for decision in decisions if not isinstance(decision, Sync)]


class ReturnsNone(Faulty):
    def spoil(self, decisions, observation):
        return None


class Exits(Faulty):
    def spoil(self, decisions, observation):
        sys.exit(0)


class Random(Faulty):
    def spoil(self, decisions, observation):
        learns = [decision for decision in decisions if isinstance(decision, Learn)]
        if learns:
            wait = At(observation.time_s + 1 + random.SystemRandom().random())
            return [*(d for d in decisions if d not in learns), Subscribe(wait)]
        late = any(isinstance(event, At) for event in observation.events)
        return [*decisions, Learn(self.functions)] if late else decisions


CASES = (
    (AssignsTwice, "assigned or finished already"),
    (Starves, "starves the cluster: policy stalled"),
    (Mutates, "changes what it observes: events, prompts"),
    (Sets, "changes what it observes"),
    (SetsTheEngine, "changes what it observes"),
    (WantsNine, "9 GPUs on one node, which has 8"),
    (WantsTooMany, "wants more GPUs than there are"),
    (Stale, "stale weights"),
    (ReturnsNone, "must return a sequence of decisions, got NoneType"),
    (Exits, "SystemExit"),
    (Random, "decided differently"),
)


@pytest.mark.parametrize(("policy", "reason"), CASES, ids=[policy.__name__ for policy, _ in CASES])
def test_a_bad_policy_fails_with_a_reason(policy, reason):
    with pytest.raises(PolicyCheckFailed, match=reason):
        simrl.check_policy(policy())


@pytest.mark.parametrize("name", ["verl", "rlhfuse", "rlhfless"])
def test_built_in_policies_pass(name):
    assert len(simrl.check_policy(name)) >= 4


def test_a_run_does_not_take_an_exit_for_success():
    with pytest.raises(RuntimeError, match=r"called sys\.exit"):
        simrl.run(simrl.load_config(nodes=1, steps=1), policy=Exits())


def test_decide_must_return_decisions_in_a_run_too():
    with pytest.raises(simrl.InvalidDecision, match="decide returned no sequence"):
        simrl.run(simrl.load_config(nodes=1, steps=1), policy=ReturnsNone())


def test_a_policy_is_anything_with_decide():
    assert isinstance(Verl(), Policy)
    assert not isinstance(time, Policy)
    with pytest.raises(PolicyCheckFailed, match="no method decide"):
        simrl.check_policy(object())
