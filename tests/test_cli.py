"""The command line: what it prints, what it writes, its exit codes, and one line for every error."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import simrl
from simrl.cli import main
from simrl.traces.parameters import shipped_parameters

SMALL = [
    "--steps", "3", "--nodes", "1", "--set", "job.model=qwen2.5-0.5b", "--set", "job.prompts_per_step=8",
    "--set", "job.dataset_prompts=16", "--set", "job.max_response_tokens=128",
]  # fmt: skip
SUMMARY_KEYS = [
    "policy", "seed", "nodes", "gpus", "steps", "responses", "response_tokens", "prompt_tokens", "simulated_s",
    "step_s", "generation_s", "preparation_s", "learning_s", "weight_sync_s", "gpu_s", "gpu_s_per_step",
    "gpu_s_paper", "gpu_s_by", "cost_usd", "cost_usd_per_step", "cost_usd_per_million_response_tokens",
    "busy_fraction", "cold_starts", "lost_functions", "lost_nodes", "migrations", "prefill_tokens_computed",
    "prefill_tokens_saved", "policy_wall_s", "wall_s",
]  # fmt: skip

THIRD_PARTY = """
from simrl import Assign, Start

class Marked:
    "Leaves a file when it is asked, and does nothing."
    def decide(self, observation):
        open("asked", "w").close()
        return []

class Invalid:
    def decide(self, observation):
        return [Assign("nobody", (0,))]

class Broken:
    def decide(self, observation):
        return [1 / 0]

class Picky:
    def decide(self, observation):
        raise ValueError("policy.size=3 must be at most 2")
"""


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """Every test runs in a directory of its own, as `runs/` is relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    (tmp_path / "cli_third_party.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "cli_third_party"
    sys.modules.pop("cli_third_party", None)


def succeed(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refuse(capsys, *arguments):
    """The one line on stderr of a command that must end with exit code 2."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("simrl: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err.removeprefix("simrl: ").rstrip()


def in_process_of_its_own(*arguments):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", "simrl", *arguments], capture_output=True, text=True, env=environment)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "rlhfles"], "did you mean 'rlhfless'?"),
        (["--policy", "ver"], "did you mean 'verl'?"),
        (["--nodes", "0"], "nodes=0 must be at least 1 and at most 10000 (--nodes)"),
        (["--nodes", "abc"], "Invalid value for '--nodes': 'abc' is not a whole number"),
        (["--steps", "0"], "steps=0 must be at least 1 and at most 1000000 (--steps)"),
        (["--nodez", "3"], "No such option"),
        (["--config", "missing.toml"], "config file 'missing.toml' does not exist (--config)"),
        (["--set", "job.stps=3"], "job.stps is unknown; did you mean 'job.steps'? (--set job.stps=3)"),
        (
            ["--set", "job.steps=abc"],
            "job.steps='abc' must be a whole number of at least 1 and at most 1000000 (--set job.steps=abc)",
        ),
        (["--preset", "g7"], "preset='g7' is unknown"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_errors_of_run_are_one_line(capsys, arguments, message):
    assert message in refuse(capsys, "run", *arguments)


def test_errors_in_files_come_with_file_and_line(capsys):
    Path("bad.toml").write_text("[job]\nsteps = = 2\n")
    assert refuse(capsys, "run", "--config", "bad.toml").startswith("bad.toml:2: not valid TOML")
    Path("typo.toml").write_text("[job]\n\nstps = 2\n")
    message = refuse(capsys, "run", "--config", "typo.toml")
    assert message == "job.stps is unknown; did you mean 'job.steps'? (typo.toml:3)"


def test_a_model_that_does_not_fit_says_what_it_needs_and_has(capsys):
    message = refuse(capsys, "run", "--set", "job.model=llama-2-70b", "--nodes", "2", "--steps", "2")
    assert message.startswith("llama-2-70b on 2 x l40s an engine does not fit"), "before any policy is asked"
    assert re.search(r"each l40s needs \d+\.\d GB .* has 48\.3 GB", message)


def test_unwritable_outputs_are_refused_before_the_run(capsys, third_party):
    Path("file").touch()
    Path("full").mkdir()
    Path("full", "mine").touch()
    policy = ("--policy", f"{third_party}:Marked")
    assert "cannot be written" in refuse(capsys, "run", *policy, "--output", "file/run")
    assert "cannot be written" in refuse(capsys, "run", *policy, "--output", "/proc/simrl/run")
    assert "exists and is not empty" in refuse(capsys, "run", *policy, "--output", "full", "--json")
    assert not Path("asked").exists()


def test_usage_errors_of_other_commands(capsys):
    assert "No such command 'rum'" in refuse(capsys, "rum")
    assert "--policies" in refuse(capsys, "compare")
    assert "'ver' is unknown" in refuse(capsys, "compare", "--policies", "verl,ver")
    assert "at least one policy" in refuse(capsys, "compare", "--policies", ",", "--baseline", "verl")
    assert "seeds=0 must be at least 1" in refuse(capsys, "compare", "--policies", "verl", "--seeds", "0")


def test_policies_that_break_the_rules_are_named(capsys, third_party):
    message = refuse(capsys, "run", *SMALL, "--json", "--policy", f"{third_party}:Invalid")
    assert message.startswith(f"policy '{third_party}:Invalid': invalid decision Assign(")
    message = refuse(capsys, "run", *SMALL, "--json", "--policy", f"{third_party}:Marked")
    assert message.startswith(f"policy '{third_party}:Marked': policy stalled at 0.0 s")


def test_a_policy_can_say_that_its_parameters_do_not_suit_the_cluster(capsys, third_party):
    message = refuse(capsys, "run", *SMALL, "--json", "--policy", f"{third_party}:Picky")
    assert message == f"policy.size=3 must be at most 2 (policy '{third_party}:Picky')"


def test_a_bug_in_a_policy_keeps_its_traceback(third_party):
    done = in_process_of_its_own("run", *SMALL, "--json", "--policy", f"{third_party}:Broken")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "1 / 0" in done.stderr


def test_exit_codes_of_the_process():
    done = in_process_of_its_own("run", "--nodes", "0")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "simrl: nodes=0 must be at least 1 and at most 10000 (--nodes)\n",
    )
    done = in_process_of_its_own("run", "--nodes", "abc")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = in_process_of_its_own("run", *SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, ""), "no progress bar where stderr is no terminal"
    assert json.loads(done.stdout)["steps"] == 3


# --- run ---


def test_json_has_the_documented_keys_and_writes_nothing(capsys, empty_directory):
    summary = json.loads(succeed(capsys, "run", *SMALL, "--json", "--seed", "7"))
    assert [key for key in summary if key not in ("first_epoch", "later_epochs")] == SUMMARY_KEYS
    assert list(summary["step_s"]) == ["mean", "p50", "p95"]
    assert (summary["policy"], summary["seed"], summary["nodes"], summary["gpus"]) == ("verl", 7, 1, 8)
    assert list(empty_directory.iterdir()) == []


def test_one_seed_one_result(capsys):
    one, other, third = (json.loads(succeed(capsys, "run", *SMALL, "--json", "--seed", s)) for s in ("1", "1", "2"))
    assert [key for key in one if one[key] != other[key] and "wall" not in key] == []
    assert one["response_tokens"] != third["response_tokens"]


def test_output_is_the_run_directory(capsys):
    succeed(capsys, "run", *SMALL, "--json", "--output", "there")
    assert json.loads(Path("there/summary.json").read_text())["steps"] == 3


def test_the_default_directory_names_time_policy_and_seed(capsys):
    out = succeed(capsys, "run", *SMALL, "--seed", "4")
    (directory,) = Path("runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-verl-s4", directory.name)
    assert f"written to runs/{directory.name}" in out
    assert (directory / "summary.json").exists()


def test_the_table_shows_the_summary(capsys):
    out = succeed(capsys, "run", *SMALL, "--output", "there")
    summary = json.loads(Path("there/summary.json").read_text())
    assert "verl: qwen2.5-0.5b on 1 x g6e.48xlarge, 3 steps, 96 responses, seed 0" in out
    assert f"{summary['step_s']['mean']:.2f}" in out
    assert f"{summary['gpu_s_by']['state']['cold']:,.0f}" in out
    assert f"{summary['cost_usd']:,.2f} USD" in out
    for words in ("generation", "weight_sync", "first epoch, 2 steps", "later epochs, 1 steps", "prefill tokens saved"):
        assert words in out
    rows = Path("there/parameters.csv").read_text().splitlines()[1:]
    assumed = sum(",assumed," in row for row in rows)
    assert f"{assumed} of {len(rows)} parameters are assumed; see parameters.csv" in out


@pytest.mark.parametrize("command", [["run", *SMALL], ["policies"], ["presets"], ["hardware"]])
def test_narrow_terminals_hold_every_line(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "60")
    out = succeed(capsys, *command)
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out, "nothing is cut off"


def test_extrapolated_times_are_warned_of(capsys):
    code = main(["run", *SMALL, "--json", "--set", "engine.max_num_seqs=1024", "--set", "job.prompts_per_step=600",
                 "--set", "job.dataset_prompts=600", "--steps", "1", "--set", "engine.tensor_parallel=2",
                 "--set", "job.responses_per_prompt=8", "--output", "there"])  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err.count("iteration times of qwen2.5-0.5b on 2 x l40s are extrapolated: the table ends at") == 1
    assert "iteration_times.qwen2.5-0.5b.l40s.tp2.extrapolated" in Path("there/parameters.csv").read_text()


def test_a_comparison_warns_once_however_many_seeds_and_policies(capsys):
    code = main(["compare", "--policies", "verl,rlhfuse", "--seeds", "2", *SMALL, "--json", "--steps", "1",
                 "--set", "job.prompts_per_step=600", "--set", "job.dataset_prompts=600",
                 "--set", "engine.tensor_parallel=2", "--set", "job.responses_per_prompt=8"])  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert captured.err.count("warning: iteration times of qwen2.5-0.5b on 2 x l40s are extrapolated") == 1


# --- compare ---


def test_compare_prints_the_documented_object(capsys, empty_directory):
    arguments = ["compare", "--policies", "verl,rlhfuse", "--seeds", "2", *SMALL, "--json"]
    document = json.loads(succeed(capsys, *arguments))
    assert document["baseline"] == "verl"
    assert [row["policy"] for row in document["rows"]] == ["verl", "rlhfuse"]
    assert len(document["rows"][1]["speedup_ci95"]) == 2
    assert list(empty_directory.iterdir()) == []


def test_compare_writes_where_it_is_told(capsys):
    out = succeed(capsys, "compare", "--policies", "verl,rlhfuse", *SMALL, "--output", "there")
    assert {path.name for path in Path("there").iterdir()} == {"config.toml", "comparison.json", "runs.csv"}
    assert "against verl, 1 seed" in out


# --- lists ---


def test_policies_are_listed_with_their_sources(capsys):
    rows = {row["name"]: row for row in json.loads(succeed(capsys, "policies", "--json"))}
    assert {"verl", "rlhfuse", "rlhfless"} <= set(rows)
    assert rows["verl"]["where"] == "simrl.policies.verl:Verl"
    assert "HybridFlow" in rows["verl"]["source"]
    assert all(row["what"] and row["source"] for row in rows.values())
    assert "HybridFlow" in succeed(capsys, "policies")


def test_presets_are_listed(capsys):
    rows = json.loads(succeed(capsys, "presets", "--json"))
    assert [row["name"] for row in rows] == ["g6e", "paper-physical", "paper-simulated"]
    assert all(len(row["what"]) > 20 for row in rows)
    assert "paper-physical" in succeed(capsys, "presets")


def test_hardware_lists_every_parameter_with_its_source(capsys):
    tables = json.loads(succeed(capsys, "hardware", "--json"))
    assert list(tables) == ["GPUs", "node types", "engine presets", "prices", "parameters"]
    assert {"g6e.48xlarge", "p5.48xlarge"} <= {row["name"] for row in tables["node types"]}
    assert {row["name"]: row["iteration_times"] for row in tables["GPUs"]} == {
        **dict.fromkeys(("l40s", "h100", "h200", "a100"), "tables"),
        **dict.fromkeys(("h20", "h800", "gh200", "mi300x"), "roofline"),
    }
    assert all(row["unit"] and row["source"] and row["status"] for row in tables["parameters"])
    assert {row["name"] for row in tables["parameters"]} == set(shipped_parameters())
    out = succeed(capsys, "hardware")
    assert all(row["name"] in out.replace("\n", "") for row in tables["parameters"])


def test_hardware_tells_how_a_model_runs_on_each_gpu(capsys, monkeypatch):
    tables = json.loads(succeed(capsys, "hardware", "--model", "Llama-2-70B", "--json"))
    times, misfits, sources, model = tables.values()
    rows = {(row["name"], row["tp"]): row for row in times}
    assert len(rows) == 8 * 4
    assert rows["h100", 4]["times"] == "table (derived)"
    assert rows["h100", 4]["b32_ms"] == pytest.approx(16.78, abs=0.01)
    assert rows["h20", 4]["times"] == "roofline (assumed)"
    assert (rows["l40s", 2]["times"], rows["l40s", 2]["b1_ms"]) == ("does not fit", None)
    weights_gb, kv_gb = 2 * 68.977 / 2, 4096 * 2 * 80 * 8 * 128 * 2 / 2 / 1e9
    assert rows["l40s", 2]["needs_gb"] == pytest.approx(weights_gb + 3 + kv_gb, abs=0.05)
    without_times = {f"{name} TP {tp}" for (name, tp), row in rows.items() if row["b1_ms"] is None}
    assert {row["name"] for row in misfits} == without_times
    assert "(69.0 weights + 3.0 activations + 0.7 KV of 4096 tokens)" in misfits[-1]["what"]
    assert any("aiconfigurator-core" in row["what"] for row in sources)
    assert "meta-llama" in model[0]["what"]
    monkeypatch.setenv("NO_COLOR", "1")
    out = succeed(capsys, "hardware", "--model", "Llama-2-70B")
    assert "does not fit" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_hardware_refuses_an_unknown_model(capsys):
    message = refuse(capsys, "hardware", "--model", "qwen2.5-8b")
    assert message.startswith("model 'qwen2.5-8b' is unknown; did you mean 'qwen2.5-7b'?")


def test_policies_are_checked(capsys, third_party):
    assert succeed(capsys, "policies", "--check", "verl").count("ok  ") == 4
    message = refuse(capsys, "policies", "--check", f"{third_party}:Marked")
    assert "starves the cluster" in message


# --- the program ---


def test_version(capsys):
    assert succeed(capsys, "--version") == f"simrl {simrl.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", simrl.__version__)


def test_help_tells_the_commands(capsys):
    out = succeed(capsys)
    assert all(command in out for command in ("run", "compare", "policies", "presets", "hardware"))


def test_every_name_of_the_facade_resolves():
    assert all(getattr(simrl, name) is not None for name in simrl.__all__)
    assert simrl.run is sys.modules["simrl.experiments.run"].run
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = simrl.nothing


def test_importing_simrl_is_light():
    code = (
        "import simrl, sys\n"
        "heavy = {'pandas', 'scipy', 'matplotlib', 'typer', 'rich', 'simpy', 'numpy', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_needs_neither_matplotlib_nor_scipy_stats():
    code = (
        "import sys; from simrl.cli import main; main(sys.argv[1:])\n"
        "print(sorted({'matplotlib', 'scipy.stats', 'torch', 'vllm'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "run", *SMALL, "--json"], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
