"""Stage times and lengths of each step out of a verl log, as a records file.

The shipped ``data/verl_steps.csv`` was derived on 2026-11-22 from the log of Qwen2-7B with GPG on MATH in
diqiuzhuanzhuan/verldata (MIT licence):

    python -m simrl.experiments.derive_verl_steps LOG --facts "record=...;source=...;..." > verl_steps.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from simrl.traces.importers.mapping import load_mapping, mapped_rows
from simrl.traces.importers.reading import Reading

COLUMNS: Mapping[str, str] = {
    "generation_s": "gen_s", "rollout_mean_s": "generate_sequences_s", "reshard_s": "reshard_s",
    "old_log_prob_s": "old_log_prob_s", "ref_log_prob_s": "ref_s", "values_s": "values_s",
    "update_actor_s": "update_actor_s", "update_critic_s": "update_critic_s", "step": "step",
    "response_tokens_mean": "response_mean_tokens", "prompt_tokens_mean": "prompt_mean_tokens",
    "response_tokens_max": "response_max_tokens",
}  # fmt: skip
"""Columns of a trace and of a records file."""


def steps(log: Path, facts: Mapping[str, str]) -> pd.DataFrame:
    """A line a step that generated something; GPUs and prompts follow from verl's own throughput and token count.

    Args:
        log: As verl prints or writes it.
        facts: By column of a records file, the same on each line.

    Raises:
        TraceError: The log cannot be read, or a line of it is bad.
    """
    rows = (row for _, _, row in mapped_rows(load_mapping("verl"), [log], Reading()) if "generation_s" in row)
    return pd.DataFrame([{**facts, **_record(row, facts)} for row in rows])


def _record(row: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, Any]:
    found = {"record": f"{facts.get('record', 'step')}-{row['step']}"}
    found |= {column: row[name] for name, column in COLUMNS.items() if name in row}
    if "step_s" in row:  # on some steps with a test or a checkpoint in it
        found["step_s"] = round(row["step_s"] - row.get("testing_s", 0.0) - row.get("checkpoint_s", 0.0), 3)
    if "total_tokens" in row:
        tokens, responses = row["total_tokens"], int(facts.get("responses_per_prompt", 1))
        found["gpus"] = round(tokens / (row["throughput_time_s"] * row["tokens_per_gpu_s"]))
        found["prompts_per_step"] = round(
            tokens / (row["response_tokens_mean"] + row["prompt_tokens_mean"]) / responses
        )
    return found


def main() -> None:
    """Read a log, write CSV to stdout; what the log does not say comes from --facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--facts", default="", help="column=value;column=value, the same on each line")
    given = parser.parse_args()
    facts = dict(fact.split("=", 1) for fact in given.facts.split(";") if fact)
    steps(given.log, facts).to_csv(sys.stdout, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
