"""`engine.profile`: a run takes its times from a profile, and says when it leaves what was measured."""

import pytest
from test_profile import PROFILE

from simrl.experiments.config import ConfigError, load_config
from simrl.experiments.run import costs_of, run, simulate
from simrl.simulator.costs import DoesNotFit
from simrl.simulator.profiled import ProfiledCosts

ENGINE = PROFILE.engine
SMALL = (
    "engine.tensor_parallel=1", "job.prompts_per_step=4", "job.dataset_prompts=8", "job.max_prompt_tokens=64",
    "job.max_response_tokens=64",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    PROFILE.write(tmp_path / "p.json")
    return tmp_path / "p.json"


def config_of(path, *sets):
    return load_config(nodes=1, steps=2, sets=[*SMALL, f"engine.profile={path}", *sets])


def test_a_run_reads_its_times_from_the_profile(path):
    result = run(config_of(path))
    used = {parameter.key: parameter for parameter in result.parameters}
    assert used["profile.load_weights_s"].value == PROFILE.load_weights_s.median
    assert used["profile.load_weights_s"].status == "measured"
    assert not any(key.startswith(("iteration_times.", "start.", "roofline.")) for key in used)
    assert result.summary["gpus"] == 8, "as many as the node type has"


def test_its_costs_are_those_of_the_profiled_machine(path):
    simulation = simulate(config_of(path))
    assert isinstance(simulation.costs, ProfiledCosts)
    assert simulation.costs.times(1).decode_s(3, 50) == PROFILE.iteration_times("", PROFILE.clock).decode_s(3, 50)


def test_look_ups_beyond_the_profile_are_warned_of(path, tmp_path):
    reached = run(config_of(path))
    assert reached.warnings == ()
    decode = PROFILE.iterations.decode
    narrow = decode.model_copy(update={"tokens": decode.tokens[:1], "seconds": decode.seconds[:1]})
    iterations = PROFILE.iterations.model_copy(update={"decode": narrow})
    PROFILE.model_copy(update={"iterations": iterations}).write(tmp_path / "narrow.json")
    left = run(config_of(tmp_path / "narrow.json"))
    (warning,) = left.warnings
    assert warning.startswith(f"iteration times of {PROFILE.model.name} on 1 x ")
    assert f"are extrapolated: the profile ends at batches of {decode.tokens[0]}," in warning
    (counted,) = [p for p in left.parameters if p.key.endswith(".extrapolated")]
    assert counted.value > 0


def test_the_path_is_made_absolute(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_of("p.json").engine.profile == str(path.resolve())


def test_a_profile_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match=r"profile 'no.json' cannot be read: .* \(--set engine.profile=no.json\)"):
        config_of("no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no schema_version"):
        config_of(tmp_path / "bad.json")


def test_what_the_profile_does_not_hold_is_refused(path):
    with pytest.raises(DoesNotFit, match=r"an engine of 2 GPUs is not in the profile p.json"):
        run(config_of(path, "engine.tensor_parallel=2"))
    with pytest.raises(ConfigError, match=r"job.algorithm='ppo' is not in the profile p.json"):
        run(config_of(path, "job.algorithm=ppo"))


def test_without_a_profile_the_tables_hold():
    config = load_config(nodes=1, steps=1, sets=SMALL)
    simulation = simulate(config)
    assert type(costs_of(config, simulation.costs.node, simulation.parameters)).__name__ == "Costs"
