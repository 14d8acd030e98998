"""vLLM's logs of single requests, and the results of its serving benchmark.

The server's log has them with --enable-log-requests and --enable-log-outputs; token counts are of the printed lists of
token ids, which vLLM 0.32 prints at log level DEBUG only (older releases at INFO), and which --max-log-len cuts.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from simrl.traces.importers.reading import Reading, lines, load_document, plain
from simrl.traces.importers.verl_rollouts import Count, text_id
from simrl.traces.trace import Row, TraceError

REQUEST_LINE = re.compile(
    r"(?:Received request|Generated response|Request) (\S+?)(?: \(streaming \w+\))?(?: details)?:"
)
_TIME = re.compile(r"\b(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)(?:[.,](\d{1,6}))?")
_PROMPT_IDS = re.compile(r"prompt_token_ids: \[([\d, ]*)\]")
_OUTPUT_IDS = re.compile(r"output_token_ids: (?:\w+\(\w*,? ?)?\[([\d, ]*)\]")
_TEXT = r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
_PROMPT = re.compile(r"(?<!_)prompt: " + _TEXT)
_OUTPUT = re.compile(r"output: " + _TEXT)
_FINISH = re.compile(r"finish_reason: (\w+)")
_MAX_TOKENS = re.compile(r"max_tokens=(\d+)")
_LOST_AFTER = 100_000
BENCHMARK_KEYS = ("input_lens", "output_lens")


def request_rows(paths: Iterable[Path], reading: Reading, count: Count) -> Iterator[tuple[Path, int, Row]]:
    """A row a finished request, with file and line.

    Raises:
        TraceError: A file cannot be read, or a line is bad and bad lines are not skipped.
    """
    for path in paths:
        if path.name.removesuffix(".gz").endswith(".json"):
            yield from ((path, 1, row) for row in _benchmark(path, reading))
        else:
            yield from ((path, line, row) for line, row in _log(path, reading, count))


def _log(path: Path, reading: Reading, count: Count) -> Iterator[tuple[int, Row]]:
    """Requests are put together from their lines; a request ends with its last `Generated response` line."""
    waiting: OrderedDict[str, Row] = OrderedDict()
    unfinished = 0
    for line, text, _ in lines(path, reading, strict=False):
        found = REQUEST_LINE.search(text) if "Re" in text or "Generated" in text else None
        if found is None or "(streaming delta)" in text:
            continue
        request_id, text = found[1], plain(text)
        if "Generated response" in found[0]:
            if "details" in found[0]:  # the line without details follows
                waiting.setdefault(request_id, {}).update(_generated(text, count))
                continue
            row = {**waiting.pop(request_id, {}), **_generated(text, count)}
            if not {"response_tokens", "guessed_response_tokens"} & set(row):
                reading.bad(path, line, f"request {request_id}: neither output_token_ids nor the output's text")
                continue
            yield line, _finished(request_id, row, reading)
        else:
            waiting.setdefault(request_id, {}).update(_received(text, count))
            if len(waiting) > _LOST_AFTER:
                waiting.popitem(last=False)
                unfinished += 1
    if unfinished + len(waiting):
        reading.note(f"{path.name}: {unfinished + len(waiting)} requests without a response are left out")


def _received(text: str, count: Count) -> Row:
    row: Row = {} if "details" in text else {"start_s": _clock_s(text)}
    ids, prompt, limit = _PROMPT_IDS.search(text), _PROMPT.search(text), _MAX_TOKENS.search(text)
    if ids:
        row["prompt_tokens"] = _length(ids[1])
        row["prompt_id"] = text_id(ids[1])
    elif prompt:
        row["guessed_prompt_tokens"], row["prompt_id"] = count(prompt[1][1:-1]), text_id(prompt[1])
    if limit:
        row["max_tokens"] = int(limit[1])
    return row


def _generated(text: str, count: Count) -> Row:
    row: Row = {"end_s": _clock_s(text)}
    ids, output, reason = _OUTPUT_IDS.search(text), _OUTPUT.search(text), _FINISH.search(text)
    if ids:
        row["response_tokens"] = _length(ids[1])
    elif output:
        row["guessed_response_tokens"] = count(output[1][1:-1])
    if reason:
        row["finish_reason"] = reason[1]
    return row


def _length(ids: str) -> int:
    return ids.count(",") + 1 if ids.strip() else 0


def _clock_s(text: str) -> float | None:
    """Seconds since the year began, by a line's MM-DD HH:MM:SS; vLLM prints no year."""
    found = _TIME.search(text)
    if found is None:
        return None
    month, day, hour, minute, second = (int(part) for part in found.groups()[:5])
    try:
        moment = datetime(2024, month, day, hour, minute, second)  # a leap year: it has every date
    except ValueError:
        return None
    return (moment - datetime(2024, 1, 1)).total_seconds() + float(f"0.{found[6] or 0}")


def _finished(request_id: str, row: Row, reading: Reading) -> Row:
    for name in ("prompt_tokens", "response_tokens"):
        guess = row.pop(f"guessed_{name}", None)
        if guess is not None and name not in row:
            row[name] = guess
            reading.estimated[name] = "of requests without printed token ids: of their printed text"
    reason, limit = row.pop("finish_reason", None), row.pop("max_tokens", None)
    metrics = {"request_id": request_id, "finish_reason": reason, "max_tokens": limit}
    truncated = None if reason is None else reason == "length"
    return {**row, "kind": "response", "truncated": truncated, "metrics": metrics}


def _benchmark(path: Path, reading: Reading) -> Iterator[Row]:
    """Requests of `vllm bench serve --save-result --save-detailed`; failed ones are bad."""
    document = load_document(path)
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in BENCHMARK_KEYS):
        raise TraceError(f"{path}: no result of `vllm bench serve --save-detailed`: no lists input_lens, output_lens")
    prompts, outputs = (document[key] for key in BENCHMARK_KEYS)
    if len(prompts) != len(outputs):
        raise TraceError(f"{path}: {len(prompts)} input_lens but {len(outputs)} output_lens")
    others = []
    for key in ("errors", "start_times", "ttfts", "latencies"):
        values = document.get(key)
        whole = isinstance(values, list) and len(values) == len(prompts)
        others.append(values if whole else [None] * len(prompts))
    summary = {key: value for key, value in document.items() if not isinstance(value, list | dict)}
    for index, (prompt, output, other) in enumerate(zip(prompts, outputs, zip(*others, strict=True), strict=True)):
        error, start_s, first_s, latency_s = other
        if error:
            reading.bad(path, 1, f"request {index} failed: {str(error)[:80]!r}")
            continue
        yield {
            "kind": "response",
            "prompt_tokens": prompt,
            "response_tokens": output,
            "start_s": start_s,
            "first_token_s": _sum(start_s, first_s),
            "end_s": _sum(start_s, latency_s),
            "metrics": {"request": index, "ttft": first_s, "latency": latency_s, **(summary if index == 0 else {})},
        }
    reading.finished(path)


def _sum(one: Any, other: Any) -> Any:
    both = isinstance(one, int | float) and isinstance(other, int | float)
    return one + other if both else None
