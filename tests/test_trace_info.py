"""The figures of a trace, against hand arithmetic and data whose spread is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from simrl.cli import main
from simrl.experiments.trace_info import RESPONSE_COLUMNS, info, spread, stability
from simrl.traces.importers import import_trace
from simrl.traces.trace import read_trace

LINES = [
    "step:0 - val/acc:0.5",
    "step:1 - timing_s/gen:40.0 - timing_s/generate_sequences:30.0 - timing_s/reshard:4.0 - timing_s/old_log_prob:6.0"
    " - timing_s/ref:4.0 - timing_s/update_actor:48.0 - timing_s/step:100.0 - response_length/mean:200.0"
    " - response_length/max:400.0 - response_length/min:3.0",
    "step:2 - timing_s/gen:60.0 - timing_s/generate_sequences:50.0 - timing_s/reshard:4.0 - timing_s/old_log_prob:6.0"
    " - timing_s/ref:4.0 - timing_s/update_actor:28.0 - timing_s/step:1000.0 - timing_s/testing:500.0"
    " - timing_s/save_checkpoint:400.0 - response_length/mean:300.0 - response_length/max:500.0"
    " - response_length/min:5.0",
]


def trace_of(tmp_path: Path, *lines: str) -> Path:
    (tmp_path / "run.log").write_text("".join(f"{line}\n" for line in lines))
    import_trace([tmp_path / "run.log"], tmp_path / "t.parquet", imported="2026-01-02")
    return tmp_path / "t.parquet"


def responses(step: object, prompt: object, tokens: object, epoch: object = None) -> pd.DataFrame:
    return pd.DataFrame({"step": step, "epoch": epoch, "prompt_id": prompt, "response_tokens": tokens})


def test_stages_by_hand(tmp_path: Path) -> None:
    """Work is 100 and 1000 - 500 - 400 = 100 s: testing and checkpoints are no work."""
    found = info(read_trace(trace_of(tmp_path, *LINES)))
    assert found["stages"] == {
        "steps": 2,
        "basis": "step time",
        "work_mean_s": 100.0,
        "generation": {"mean_s": 50.0, "share": 0.5},
        "preparation": {"mean_s": 10.0, "share": 0.1},
        "learning": {"mean_s": 38.0, "share": 0.38},
        "other": {"mean_s": 2.0, "share": 0.02},
        "testing_total_s": 500.0,
        "checkpoint_total_s": 400.0,
    }
    # 40 - 30 - 4 = 6 and 60 - 50 - 4 = 6, of 100 s of generation.
    assert found["rollout_bubble"] == {"steps": 2, "mean_s": 6.0, "share_of_generation": 0.12}
    assert (found["steps"], found["first_step"], found["last_step"], found["responses"]) == (3, 0, 2, 0)
    assert found["step_statistics"] == {
        "prompt_tokens_mean": None,
        "response_tokens_mean": 250.0,
        "truncated_share": None,
        "response_tokens_min": 3.0,
        "response_tokens_max": 500.0,
    }


def test_stages_without_a_step_time_are_shares_of_their_sum(tmp_path: Path) -> None:
    found = info(read_trace(trace_of(tmp_path, "step:0 - timing/gen:30.0 - timing/update_actor:10.0")))["stages"]
    assert found["basis"] == "sum of stages"
    assert found["generation"]["share"] == 0.75
    assert "other" not in found


def test_spread_by_hand() -> None:
    """Two prompts of two samples, ln 1 and 3 against 5 and 7."""
    found = spread(responses(0, ["a", "a", "b", "b"], np.exp([1.0, 3.0, 5.0, 7.0])))
    assert found is not None
    # Means 2 and 6 about 4: mean square between 2 x (4 + 4) / 1 = 16, within (2 + 2) / 2 = 2, so (16 - 2) / 2 = 7.
    assert found["within_sd"] ** 2 == pytest.approx(2)
    assert found["between_sd"] ** 2 == pytest.approx(7)
    assert found["icc"] == pytest.approx(7 / 9)
    assert (found["groups"], found["responses"]) == (2, 4)


def test_spread_recovers_what_was_drawn() -> None:
    rng = np.random.default_rng(3)
    prompts, epochs, samples = 400, 3, 4
    level = 5 + 0.6 * rng.standard_normal(prompts)[None, :, None] - 0.5 * np.arange(epochs)[:, None, None]
    ln = level + 0.3 * rng.standard_normal((epochs, prompts, samples))
    step, prompt, _ = np.indices(ln.shape)
    found = spread(responses(step.ravel(), prompt.astype(str).ravel(), np.exp(ln).ravel()))
    assert found is not None
    assert found["between_sd"] == pytest.approx(0.6, abs=0.07)  # three standard errors: 0.6 / sqrt(2 x 400) x 3
    assert found["within_sd"] == pytest.approx(0.3, abs=0.02)
    assert found["icc"] == pytest.approx(0.8, abs=0.05)


def test_spread_needs_several_responses_a_prompt() -> None:
    assert spread(responses(0, ["a", "b", "c"], [1, 2, 3])) is None
    assert spread(responses(0, ["a", "a"], [1, 2])) is None
    assert spread(responses(0, [None, None], [1, 2])) is None


def test_stability_by_hand() -> None:
    """Prompt means 10, 100, 1000 become 20, 149, 1050: one move of 10, one of 49, one of 50, which is not below 50."""
    step = [0, 0, 0, 5, 5, 5, 5]
    found = stability(responses(step, ["a", "b", "c", "a", "a", "b", "c"], [10, 100, 1000, 18, 22, 149, 1050]))
    assert found is not None
    assert found["pairs"] == 3
    assert found["rank_correlation"] == pytest.approx(1.0)
    assert found["share_moved_below_50_tokens"] == pytest.approx(2 / 3)


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(5)
    before, noise = rng.integers(1, 30, 60), rng.integers(0, 15, 60)
    names = [f"p{i}" for i in range(60)]
    found = stability(responses([0] * 60 + [1] * 60, names * 2, [*before, *(before + noise)], [0] * 60 + [1] * 60))
    assert found is not None
    assert found["rank_correlation"] == pytest.approx(spearmanr(before, before + noise).statistic)


def test_epochs_are_compared_only_with_the_next() -> None:
    assert stability(responses([0, 9], ["a", "a"], [5, 6], epoch=[0, 2])) is None
    assert stability(responses([0, 9], ["a", "b"], [5, 6])) is None


def test_lengths_of_responses(tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(
        'rows = "response"\n[fields]\nresponse_tokens = "n"\ntruncated = "cut"\nstep = "it"\nprompt_id = "q"\n'
    )
    rows = "\n".join(f"{n},{str(n > 90).lower()},{n % 2},q{n % 10}" for n in range(1, 101))
    (tmp_path / "l.csv").write_text(f"n,cut,it,q\n{rows}\n")
    import_trace([tmp_path / "l.csv"], tmp_path / "t.parquet", imported="d", log_format=str(tmp_path / "m.toml"))
    found = info(read_trace(tmp_path / "t.parquet", RESPONSE_COLUMNS))
    assert found["response_tokens"]["mean"] == 50.5
    assert found["response_tokens"]["p50"] == 50.5
    assert found["response_tokens"]["max"] == 100.0
    assert found["truncated_share"] == 0.1
    assert (found["steps"], found["responses"], found["prompts"]) == (2, 100, 10)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    trace, picture = trace_of(tmp_path, *LINES), tmp_path / "p.png"
    assert main(["trace", "info", str(trace), "--json", "-o", str(picture)]) == 0
    assert json.loads(capsys.readouterr().out) == info(read_trace(trace))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["trace", "info", str(trace)]) == 0
    assert "rollout_bubble.share_of_generation" in capsys.readouterr().out
    assert main(["trace", "info", str(trace), "-o", str(tmp_path / "no" / "p.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_import_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.log").write_text("\n".join([*LINES, "step:3 - timing_s/gen:soon", ""]))
    command = ["trace", "import", str(tmp_path / "run.log"), "-o", str(tmp_path / "t.parquet"), "--json"]
    assert main([*command, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "name": str(tmp_path / "t.parquet"), "format": "verl-log", "files": 1, "steps": 3, "responses": 0, "skipped": 1,
    }  # fmt: skip
    assert "simrl: warning: 1 bad lines left out, first run.log:4: generation_s='soon' must be a number" in captured.err
