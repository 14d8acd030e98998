"""The notebook that runs a real engine, in its small size."""

from __future__ import annotations

from test_notebooks import EXECUTE, FOLDER, REAL, said_on_stderr

CHECKS = """
assert {run.kind for run in validation.runs} == {"real", "simulated"}
assert set(validation.rows["step"]) == set(range(STEPS))
real = next(run for run in validation.runs if run.kind == "real").frames
simulated = next(run for run in validation.runs if run.kind == "simulated").frames
assert real.samples["response_tokens"].tolist() == simulated.samples["response_tokens"].tolist()
assert real.phases["end_s"].max() != simulated.phases["end_s"].max()
assert (validation.rows["real_s"] > 0).all()
"""


def test_it_runs_in_the_small_size() -> None:
    assert said_on_stderr(EXECUTE(FOLDER / f"{REAL}.ipynb", small=True, checks=CHECKS)) == []
