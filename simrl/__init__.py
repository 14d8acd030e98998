"""simrl: a discrete-event simulator and policy-research toolkit for RL post-training of language models.

Names are looked up on first use (PEP 562): importing simrl loads neither pandas nor the simulator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simrl.experiments.check import check_policy as check_policy
    from simrl.experiments.compare import Comparison as Comparison
    from simrl.experiments.compare import compare as compare
    from simrl.experiments.config import Config as Config
    from simrl.experiments.config import ConfigError as ConfigError
    from simrl.experiments.config import load_config as load_config
    from simrl.experiments.progress import progress_bar as progress_bar
    from simrl.experiments.replay import replay as replay
    from simrl.experiments.run import Result as Result
    from simrl.experiments.run import run as run
    from simrl.experiments.run import write_run as write_run
    from simrl.experiments.sweep import sweep as sweep
    from simrl.experiments.timeline import read_frames as read_frames
    from simrl.experiments.timeline import write_timeline as write_timeline
    from simrl.experiments.tune import tune as tune
    from simrl.policies.contract import *  # noqa: F403  the same names as in _CONTRACT

_CONTRACT = (
    "Assign", "At", "Backend", "CompletionRatio", "Completions", "Decision", "Estimates", "Event", "FinishedStep",
    "Function", "FunctionIdle", "FunctionLost", "InvalidDecision", "Learn", "Migrate", "Node", "NodeReclaimed",
    "NodeReturned", "Observation", "Park", "Policy",
    "PolicyStalled", "Prepare", "Prompt", "Release", "Response", "Role", "Stage", "StageFinished", "Start",
    "State", "StepStarted", "Subscribe", "Sync", "Trigger", "UnfinishedBelow", "Wake", "drive",
)  # fmt: skip
_WHERE = {
    **dict.fromkeys(_CONTRACT, "simrl.policies.contract"),
    "check_policy": "simrl.experiments.check",
    "Comparison": "simrl.experiments.compare",
    "compare": "simrl.experiments.compare",
    "Config": "simrl.experiments.config",
    "ConfigError": "simrl.experiments.config",
    "load_config": "simrl.experiments.config",
    "progress_bar": "simrl.experiments.progress",
    "replay": "simrl.experiments.replay",
    "Result": "simrl.experiments.run",
    "read_frames": "simrl.experiments.timeline",
    "run": "simrl.experiments.run",
    "sweep": "simrl.experiments.sweep",
    "tune": "simrl.experiments.tune",
    "write_run": "simrl.experiments.run",
    "write_timeline": "simrl.experiments.timeline",
}
__all__ = sorted((*_WHERE, "__version__"))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("simrl")
    if name not in _WHERE:
        raise AttributeError(f"module 'simrl' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
