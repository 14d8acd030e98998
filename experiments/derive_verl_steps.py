"""Stage times and lengths of each step out of a verl console log, as a records file.

The shipped ``data/verl_steps.csv`` was derived on 2026-11-22 from the log of Qwen2-7B with GPG on MATH in
diqiuzhuanzhuan/verldata (MIT licence):

    python -m simrl.experiments.derive_verl_steps LOG --facts "record=...;source=...;..." > verl_steps.csv
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

LINE = re.compile(r"\bstep:(\d+) - (.*)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
TIMES: Mapping[str, str] = {
    "gen": "gen_s", "generate_sequences": "generate_sequences_s", "reshard": "reshard_s",
    "old_log_prob": "old_log_prob_s", "ref": "ref_s", "values": "values_s", "update_actor": "update_actor_s",
    "update_critic": "update_critic_s",
}  # fmt: skip
"""verl's names of stages, below `timing_s/` or, in 2024, `timing/`, and the columns of a records file."""
OUTSIDE_THE_STEP = ("testing", "save_checkpoint")  # part of timing_s/step on some steps


def steps(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """Number and metrics of every step that generated something."""
    for line in lines:
        found = LINE.search(ANSI.sub("", line))
        if found:
            metrics = dict(_metrics(found[2]))
            if "timing_s/gen" in metrics or "timing/gen" in metrics:
                yield int(found[1]), metrics


def _metrics(text: str) -> Iterator[tuple[str, float]]:
    for part in text.split(" - "):
        name, _, value = part.strip().rpartition(":")
        number = re.fullmatch(r"(?:np\.float\d+\()?(-?[\d.]+(?:e[-+]?\d+)?)\)?", value)
        if number:
            yield name, float(number[1])


def row(step: int, metrics: Mapping[str, float], responses_per_prompt: int) -> dict[str, object]:
    """One step as a line of a records file; GPUs and prompts follow from verl's own throughput and token count."""
    times = {
        name.partition("/")[2]: value for name, value in metrics.items() if name.startswith(("timing_s/", "timing/"))
    }
    found: dict[str, object] = {column: times[name] for name, column in TIMES.items() if name in times}
    if "step" in times:
        found["step_s"] = round(times["step"] - sum(times.get(name, 0.0) for name in OUTSIDE_THE_STEP), 3)
    mean, prompt = metrics["response_length/mean"], metrics["prompt_length/mean"]
    found |= {"step": step, "response_mean_tokens": mean, "prompt_mean_tokens": prompt}
    found["response_max_tokens"] = int(metrics["response_length/max"])
    if "perf/total_num_tokens" in metrics:
        tokens = metrics["perf/total_num_tokens"]
        found["gpus"] = round(tokens / (metrics["perf/time_per_step"] * metrics["perf/throughput"]))
        found["prompts_per_step"] = round(tokens / (mean + prompt) / responses_per_prompt)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Read a log, write CSV to stdout; what the log does not say comes from --facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log")
    parser.add_argument("--facts", default="", help="column=value;column=value, the same on each line")
    given = parser.parse_args(arguments)
    facts = dict(fact.split("=", 1) for fact in given.facts.split(";") if fact)
    samples = int(facts.get("responses_per_prompt", 1))
    with open(given.log, encoding="utf-8") as log:
        rows = [facts | row(step, metrics, samples) for step, metrics in steps(log)]
    for line in rows:
        line["record"] = f"{facts.get('record', 'step')}-{line['step']}"
    columns = dict.fromkeys(column for line in rows for column in line)
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
