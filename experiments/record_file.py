"""Published stage times of real training steps: reading a records file.

A records file is CSV, one step (or the mean of several) a line; the shipped one is ``data/records.csv``. Absent columns
and empty fields are unknown, columns that are not listed here are ignored.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from simrl.experiments.config import ConfigError

SETTINGS = (
    "mini_batch_prompts", "micro_batch_responses", "micro_batch_tokens", "learner_parallel", "gpu_memory_utilization",
)  # fmt: skip
COUNTS = (
    "step", "gpus", "prompts_per_step", "responses_per_prompt", "max_prompt_tokens", "max_response_tokens",
    "response_max_tokens", *SETTINGS[:-1],
)  # fmt: skip
NUMBERS = (
    "response_mean_tokens", "prompt_mean_tokens", "gen_s", "generate_sequences_s", "reshard_s", "old_log_prob_s",
    "ref_s", "values_s", "update_actor_s", "update_critic_s", "step_s", SETTINGS[-1],
)  # fmt: skip
SWITCHES = ("checkpointing", "offload")
TEXTS = (
    "record", "log", "model", "algorithm", "gpu_type", "gpu_type_known", "engine", "train_engine", "date", "source",
    "settings_source", "notes", *SWITCHES,
)  # fmt: skip
STAGES: Mapping[str, Sequence[str]] = {
    "generation": ("gen_s",),
    "log_probs": ("old_log_prob_s", "ref_s"),
    "update": ("update_actor_s", "update_critic_s"),
    "values": ("values_s",),
}
"""Stages and the columns that add up to each: a forward pass or a model's update apiece."""
SHIPPED = ("records.csv", "verl_steps.csv")


@dataclass(frozen=True)
class Record:
    """What a step was, and what it took.

    Attributes:
        name: Of the record.
        log: Records of one log are never used to predict each other.
        texts: Texts by column; "" is unknown.
        numbers: Numbers by column, the known ones only.
    """

    name: str
    log: str
    texts: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)

    def count(self, column: str) -> int | None:
        """A whole number, None if unknown."""
        return int(self.numbers[column]) if column in self.numbers else None

    @property
    def step(self) -> int | None:
        """The step's number, if the record is of one."""
        return self.count("step")

    @property
    def knows_lengths(self) -> bool:
        """Whether mean and longest response are known."""
        return {"response_mean_tokens", "response_max_tokens"} <= self.numbers.keys()

    def passes(self, stage: str) -> int:
        """Measured parts of a stage: forward passes of log-probs, updated models."""
        return sum(column in self.numbers for column in STAGES[stage])

    def seconds(self, stage: str) -> float | None:
        """Measured seconds of a stage, None if unknown."""
        return sum(self.numbers.get(column, 0.0) for column in STAGES[stage]) if self.passes(stage) else None

    @property
    def measured(self) -> tuple[tuple[str, float], ...]:
        """All measured times: what tells a copy of a shipped record."""
        return tuple(
            (column, self.numbers[column])
            for columns in STAGES.values()
            for column in columns
            if column in self.numbers
        )


def read_records(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ConfigError: It cannot be read, or a field is not what its column allows; names file, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"records file {str(path)!r} does not exist (--records)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"records file {str(path)!r} cannot be read as UTF-8 text: {error} (--records)") from None
    return parse_records(text, str(path))


def parse_records(text: str, origin: str) -> list[Record]:
    """As `read_records`, from text; *origin* names it in errors."""
    reader = csv.DictReader(text.splitlines())
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "model" not in columns or not {*columns} & {column for names in STAGES.values() for column in names}:
        times = ", ".join(column for names in STAGES.values() for column in names)
        raise ConfigError(
            f"{origin}: line 1: the columns need model and at least one of {times}; got {', '.join(columns) or 'none'}"
        )
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{origin}: line 1: column {twice} occurs twice")
    reader.fieldnames = columns
    records: list[Record] = []
    for line in reader:
        where = f"{origin}: line {reader.line_num}"
        if None in line:
            raise ConfigError(f"{where}: more fields than the {len(columns)} columns")
        fields = {column: (value or "").strip() for column, value in line.items()}
        if any(fields.values()):
            records.append(_record(fields, where, len(records) + 1, records[-1].log if records else None))
    if not records:
        raise ConfigError(f"{origin}: no records")
    return records


def _record(fields: Mapping[str, str], where: str, number: int, log_before: str | None) -> Record:
    numbers = {column: _number(column, fields[column], where) for column in (*COUNTS, *NUMBERS) if fields.get(column)}
    texts = {column: fields.get(column, "") for column in TEXTS}
    mean, longest = numbers.get("response_mean_tokens"), numbers.get("response_max_tokens")
    if mean is not None and longest is not None and mean > longest:
        raise ConfigError(f"{where}: response_mean_tokens={mean:g} must be at most response_max_tokens={longest:g}")
    cap = numbers.get("max_response_tokens")
    if longest is not None and cap is not None and longest > cap:
        raise ConfigError(f"{where}: response_max_tokens={longest:g} must be at most max_response_tokens={cap:g}")
    if texts["date"] and not re.fullmatch(r"20\d\d(-[01]\d(-[0-3]\d)?)?", texts["date"]):
        raise ConfigError(f"{where}: date={texts['date']!r} must be YYYY, YYYY-MM or YYYY-MM-DD, or empty")
    for column in SWITCHES:
        if texts[column] not in ("yes", "no", ""):
            raise ConfigError(f"{where}: {column}={texts[column]!r} must be yes or no, or empty")
    if numbers.get("gpu_memory_utilization", 0) > 1:
        raise ConfigError(f"{where}: gpu_memory_utilization={numbers['gpu_memory_utilization']:g} must be at most 1")
    name = texts["record"] or f"record {number}"
    return Record(name, _log(texts, name, log_before), texts, numbers)


def _number(column: str, text: str, where: str) -> float:
    whole = column in COUNTS
    least = 0 if column == "step" else 1
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if whole and not (number >= least and number.is_integer()):
        raise ConfigError(f"{where}: {column}={text!r} must be a whole number of at least {least}, or empty")
    if not 0 <= number < math.inf or not (number or column in ("step", "reshard_s")):
        raise ConfigError(f"{where}: {column}={text!r} must be a number above 0, or empty")
    return number


def _log(texts: Mapping[str, str], name: str, log_before: str | None) -> str:
    """Which log a record is of: its source up to the steps; "same log" is the one before."""
    if texts["log"]:
        return texts["log"]
    source = texts["source"]
    if source.lower().startswith("same log") and log_before is not None:
        return log_before
    return re.split(r"\s+steps?\s+\d", source)[0] or name


def shipped_records() -> list[Record]:
    """The records that come with simrl, and the steps of the log that it may ship."""
    folder = resources.files("simrl.experiments").joinpath("data")
    texts = ((name, folder.joinpath(name).read_text(encoding="utf-8")) for name in SHIPPED)
    return [record for name, text in texts for record in parse_records(text, name)]


def by_log(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by their log, in order."""
    logs: dict[str, list[Record]] = {}
    for record in records:
        logs.setdefault(record.log, []).append(record)
    return logs
