"""Lengths: the same responses whoever asks, the moments of the model, and a fit that recovers them."""

import dataclasses
import math
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from simrl.experiments import fit_gsm8k
from simrl.traces.lengths import FAMILIES, LengthModel, load_workload, prompts_of_step, workload_names

GSM8K = load_workload("gsm8k")
SHIPPED = resources.files("simrl.traces").joinpath("data/workload_gsm8k.toml").read_text(encoding="utf-8")
FAR = 10**9  # a cap that no ordinary response reaches


def model(**changes) -> LengthModel:
    return dataclasses.replace(GSM8K, **changes)


def tokens(of: LengthModel, epoch=0, prompts=50, group=3, cap=FAR, seed=0) -> np.ndarray:
    return of.response_lengths(seed, epoch, prompts, group, cap).tokens


# The same work for everyone.


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**64), epoch=st.integers(0, 5), prompts=st.integers(1, 400), group=st.integers(1, 6))
def test_a_smaller_data_set_or_group_gets_the_same_lengths(seed, epoch, prompts, group):
    of = model(cap_mass=0.1)
    whole = of.response_lengths(seed, epoch, 400, 6, 1024)
    part = of.response_lengths(seed, epoch, prompts, group, 1024)
    assert np.array_equal(part.tokens, whole.tokens[:prompts, :group])
    assert np.array_equal(part.truncated, whole.truncated[:prompts, :group])
    assert np.array_equal(of.prompt_lengths(seed, prompts), of.prompt_lengths(seed, 400)[:prompts])


@given(cap=st.integers(1, 600))
def test_a_smaller_cap_cuts_the_same_lengths(cap):
    of = model(cap_mass=0.05)
    assert np.array_equal(tokens(of, cap=cap), np.minimum(tokens(of, cap=600), cap))


def test_draws_repeat_and_do_not_depend_on_what_was_drawn_before():
    first = tokens(GSM8K, epoch=1)
    tokens(GSM8K, epoch=0, prompts=7)
    GSM8K.prompt_lengths(0, 20)
    assert np.array_equal(tokens(GSM8K, epoch=1), first)


def test_seeds_epochs_and_samples_differ():
    base = tokens(GSM8K)
    assert not np.array_equal(base, tokens(GSM8K, seed=1))
    assert not np.array_equal(base, tokens(GSM8K, epoch=1))
    assert not np.array_equal(base[:, 0], base[:, 1])


def test_exact_draws_are_pinned():
    # Changes here change every result: say so in the changelog.
    assert tokens(GSM8K, prompts=3, group=2, cap=1024).tolist() == [[241, 173], [254, 318], [213, 259]]
    assert GSM8K.prompt_lengths(0, 4).tolist() == [79, 102, 92, 93]
    assert prompts_of_step(0, 5, 3, 8)[1].tolist() == [5, 2, 4]


# Caps.


@given(cap=st.integers(1, 2000), seed=st.integers(0, 1000))
def test_lengths_stay_within_one_and_the_cap(cap, seed):
    drawn = model(cap_mass=0.2, within_sd=1.5).response_lengths(seed, 0, 100, 2, cap)
    assert drawn.tokens.dtype == np.int64
    assert drawn.tokens.shape == drawn.truncated.shape == (100, 2)
    assert drawn.tokens.min() >= 1
    assert drawn.tokens.max() <= cap
    assert (drawn.tokens[drawn.truncated] == cap).all()


def test_a_response_that_ends_at_the_cap_by_itself_is_not_truncated():
    drawn = model(mu=math.log(100), between_sd=0.0, within_sd=0.0, cap_mass=0.0).response_lengths(0, 0, 5, 2, 100)
    assert (drawn.tokens == 100).all()
    assert not drawn.truncated.any()


@pytest.mark.parametrize(("mass", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_mass_at_the_cap_at_its_limits(mass, share):
    assert model(cap_mass=mass).response_lengths(0, 0, 500, 4, FAR).truncated.mean() == share


def test_short_and_endless_models_stay_in_range():
    assert (tokens(model(mu=-50.0, cap_mass=0.0)) == 1).all()
    assert (tokens(model(mu=5000.0), cap=77) == 77).all()


# Moments. Tolerances are four standard errors.


def test_mean_and_spread_of_ln_length():
    of, prompts, group = model(mu=8.0, cap_mass=0.0), 40_000, 4  # long, so that rounding to whole tokens is invisible
    ln = np.log(tokens(of, prompts=prompts, group=group))
    between, within = of.between_sd**2, of.within_sd**2
    assert ln.mean() == pytest.approx(8.0, abs=4 * math.sqrt(between / prompts + within / (prompts * group)))
    found = ln.var(axis=1, ddof=1).mean()
    assert found == pytest.approx(within, abs=4 * within * math.sqrt(2 / (prompts * (group - 1))))
    spread = between + within / group
    assert ln.mean(axis=1).var(ddof=1) == pytest.approx(spread, abs=4 * spread * math.sqrt(2 / prompts))


def test_share_that_never_stops():
    mass, count = 0.02, 40_000
    share = model(cap_mass=mass).response_lengths(0, 0, count // 4, 4, FAR).truncated.mean()
    assert share == pytest.approx(mass, abs=4 * math.sqrt(mass * (1 - mass) / count))


def test_never_stopping_is_independent_of_length_and_of_the_other_samples():
    prompts = 20_000
    endless = model(cap_mass=0.5).response_lengths(0, 0, prompts, 2, FAR).truncated
    ln = np.log(tokens(model(cap_mass=0.0), prompts=prompts, group=2))
    for sample in (0, 1):
        assert abs(np.corrcoef(endless[:, sample], ln[:, sample])[0, 1]) < 4 / math.sqrt(prompts)
    assert abs(np.corrcoef(endless[:, 0], endless[:, 1])[0, 1]) < 4 / math.sqrt(prompts)


def test_a_prompt_keeps_its_effect_over_epochs_and_only_that():
    of, prompts = model(mu=8.0, cap_mass=0.0), 40_000
    first, second = (np.log(tokens(of, epoch=epoch, prompts=prompts, group=1)[:, 0]) for epoch in (0, 1))
    icc = of.between_sd**2 / (of.between_sd**2 + of.within_sd**2)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(icc, abs=4 * (1 - icc**2) / math.sqrt(prompts))


def test_drift_moves_every_length():
    still, drifting = model(cap_mass=0.0, mu=10.0), model(cap_mass=0.0, mu=10.0, drift_per_epoch=-0.1)
    assert np.array_equal(tokens(still), tokens(drifting))
    assert tokens(drifting, epoch=3) == pytest.approx(tokens(still, epoch=3) * math.exp(-0.3), abs=1)


def test_prompt_lengths_are_measured_questions_plus_template():
    lengths = GSM8K.prompt_lengths(0, 20_000)
    measured = np.array(GSM8K.prompt_tokens)
    assert set(lengths.tolist()) <= set((measured + GSM8K.template_tokens).tolist())
    tolerance = 4 * measured.std() / math.sqrt(lengths.size)
    assert lengths.mean() == pytest.approx(measured.mean() + GSM8K.template_tokens, abs=tolerance)


# The order of prompts.


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 40), st.integers(0, 60), st.integers(0, 3))
def test_an_epoch_visits_each_prompt_at_most_once_and_drops_the_rest(seed, per_step, extra, epoch):
    dataset = per_step + extra
    batches = dataset // per_step
    visits = [prompts_of_step(seed, epoch * batches + batch, per_step, dataset) for batch in range(batches)]
    assert [at for at, _ in visits] == [epoch] * batches
    ids = np.concatenate([prompts for _, prompts in visits])
    assert ids.size == np.unique(ids).size == batches * per_step
    assert ids.min() >= 0
    assert ids.max() < dataset


def test_a_divisible_data_set_is_covered_and_reordered_each_epoch():
    epochs = [np.concatenate([prompts_of_step(0, e * 5 + b, 20, 100)[1] for b in range(5)]) for e in (0, 1)]
    assert [sorted(ids.tolist()) for ids in epochs] == [list(range(100))] * 2
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize(
    ("step", "per_step", "dataset", "names"),
    [(0, 11, 10, "dataset_prompts=10"), (-1, 1, 10, "step=-1"), (0, 0, 10, "prompts_per_step=0")],
)
def test_impossible_steps(step, per_step, dataset, names):
    with pytest.raises(ValueError, match=names):
        prompts_of_step(0, step, per_step, dataset)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((0, -1, 1, 1, 1), "epoch=-1"),
        ((0, 0, 0, 1, 1), "dataset_prompts=0"),
        ((0, 0, 1, 0, 1), "responses_per_prompt=0"),
        ((0, 0, 1, 1, 0), "max_tokens=0"),
    ],
)
def test_impossible_draws(arguments, names):
    with pytest.raises(ValueError, match=names):
        GSM8K.response_lengths(*arguments)


# Workload files.


def test_shipped_workloads_load_and_say_where_they_come_from():
    assert "gsm8k" in workload_names()
    assert {p.key for p in GSM8K.parameters} == {
        f"workload.{key}" for key in ("mu", "between_sd", "within_sd", "cap_mass", "drift_per_epoch", "template_tokens")
    }
    for parameter in GSM8K.parameters:
        assert parameter.source
        assert getattr(GSM8K, parameter.key.removeprefix("workload.")) == parameter.value
        if parameter.low is not None:
            assert parameter.low <= parameter.value <= parameter.high


@pytest.mark.parametrize("name", [name for name in workload_names() if name != "gsm8k"])
def test_every_shipped_workload_draws(name):
    of = load_workload(name)
    drawn = of.response_lengths(0, 0, 200, 3, 4096)
    assert 1 <= drawn.tokens.min() < drawn.tokens.max() <= 4096
    assert {p.key for p in of.parameters} >= {f"workload.{key}" for key in ("mu", "between_sd", "within_sd")}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_draw_the_same_responses_whoever_asks(family):
    of = model(family=family, cap_mass=0.1, second_share=0.3, second_offset=1.0, second_sd=0.2)
    whole = of.response_lengths(7, 2, 100, 4, 1024)
    part = of.response_lengths(7, 2, 30, 2, 1024)
    assert np.array_equal(part.tokens, whole.tokens[:30, :2])
    assert np.array_equal(part.truncated, whole.truncated[:30, :2])


def test_families_differ_by_their_sample_effect_alone():
    first, *others = (tokens(model(family=family, within_sd=0.0, second_share=0.0)) for family in FAMILIES)
    assert all(np.array_equal(first, other) for other in others)
    drawn = [tokens(model(family=family, second_share=0.5, second_sd=1.0)) for family in FAMILIES]
    assert all(not np.array_equal(drawn[0], other) for other in drawn[1:])


def test_a_mixture_needs_its_second_component(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.replace("[parameters]", 'family = "lognormal-mixture"\n[parameters]'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"parameters\.second_share must be a table, and is missing"):
        load_workload(str(path))
    path.write_text(SHIPPED.replace("[parameters]", 'family = "gama"\n[parameters]'), encoding="utf-8")
    with pytest.raises(ValueError, match="family='gama' must be one of lognormal, gamma, weibull, lognormal-mixture"):
        load_workload(str(path))


def test_a_path_loads_like_a_name(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED, encoding="utf-8")
    assert load_workload(str(path)) == GSM8K


def test_unknown_name_is_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"unknown workload 'gsm8'; did you mean 'gsm8k'\?; known: .*, or a path"):
        load_workload("gsm8")
    with pytest.raises(ValueError, match=r"known: .*gsm8k"):
        load_workload(str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[parameters]", "[parameters", "not TOML"),
        ("within_sd ", "withing_sd ", "unknown key parameters.withing_sd; did you mean 'within_sd'"),
        ("mu              = {", "# {", "parameters.mu must be a table, and is missing"),
        ("{ value = 5.36", "{ valu = 5.36", "unknown key parameters.mu.valu"),
        ("{ value = 5.36", '{ value = "5.36', "not TOML"),
        ("{ value = 42", "{ value = 42.5", "parameters.template_tokens.value=42.5 must be a whole number"),
        ("{ value = 42", "{ value = true", "parameters.template_tokens.value=True must be a finite number"),
        ("{ value = 42", "{ value = inf", "parameters.template_tokens.value=inf must be a finite number"),
        ("{ value = 42", "{ value = -42", "template_tokens=-42 must be >= 0"),
        ("{ value = 0.00144", "{ value = 1.5", "cap_mass=1.5 must be a probability"),
        ("{ value = 0.1889", "{ value = -1", "within_sd=-1.0 must be >= 0"),
        ('unit = "1"', 'unit = "%"', "parameters.cap_mass.unit='%' must be '1'"),
        ("low = 5.33353", "low = 5.37", "parameters.mu: low=5.37, value=5.36345, high=5.39338 must be in this order"),
        ("high = 5.39338", "high = 5.3", "parameters.mu: low=5.33353, value=5.36345, high=5.3 must be in this order"),
        ("low = 5.33353, ", "", "parameters.mu has high alone; give both ends of the range, or none"),
        ("high = 0.0042", "high = 1.2", "parameters.cap_mass, an end of its range: cap_mass=1.2 must be a probability"),
        ("low = 0.15753", "low = -1", "parameters.within_sd, an end of its range: within_sd=-1 must be >= 0"),
        ("low = -0.08, high = 0.03, ", "", "parameters.drift_per_epoch.status='assumed' needs a range"),
        ('"assumed"', '"guessed"', "parameters.drift_per_epoch.status='guessed' must be one of measured"),
        ('status = "derived"\n', "", "status must be a text, and is missing"),
        ('status = "derived"\n', 'status = "sure"\n', "status='sure' must be one of measured"),
        ("values = [", "values = [0, ", "prompt_tokens.values must be a list of whole numbers"),
        ("values = [", "values = [1.5, ", "prompt_tokens.values must be a list of whole numbers"),
        ("values = [", "lengths = [", "unknown key prompt_tokens.lengths"),
        ("[prompt_tokens]", "[questions]", "unknown key questions"),
    ],
)
def test_malformed_files_name_the_file_and_the_key(tmp_path, old, new, message):
    assert old in SHIPPED
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.toml: ") as caught:
        load_workload(str(path))
    assert message in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"mine\.toml: cannot be read"):
        load_workload(str(path))


def test_model_rejects_what_is_no_number():
    with pytest.raises(ValueError, match="mu=nan must be finite"):
        model(mu=math.nan)
    with pytest.raises(ValueError, match="prompt_tokens"):
        model(prompt_tokens=())


def test_import_is_light():
    code = "import sys, simrl.traces.lengths; print([m for m in ('pandas', 'scipy', 'pydantic') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# The fit.


def test_running_the_fit_again_gives_the_shipped_file():
    assert fit_gsm8k.workload_toml(fit_gsm8k.fit(fit_gsm8k.read_counts())) == SHIPPED


def test_the_counts_are_those_of_the_sources():
    counts = fit_gsm8k.read_counts()
    assert len(counts.questions) == 1319
    assert counts.groups.shape == (16, 4)
    assert (counts.singles.size, counts.at_cap) == (484, 2)
    assert len({tuple(group) for group in counts.groups.tolist()}) == 16, "a run of the source that repeats another"


def test_one_way_recovers_the_components():
    of, prompts, group = model(mu=8.0, between_sd=0.3, within_sd=0.2, cap_mass=0.0), 20_000, 4
    found = fit_gsm8k.one_way(np.log(tokens(of, prompts=prompts, group=group)))
    spread = 0.09 + 0.04 / group
    assert found.between_variance == pytest.approx(0.09, abs=4 * spread * math.sqrt(2 / prompts))
    assert found.within_variance == pytest.approx(0.04, abs=4 * 0.04 * math.sqrt(2 / (prompts * (group - 1))))
    assert found.icc.value == pytest.approx(0.09 / 0.13, abs=0.02)
    assert found.icc.low < 0.09 / 0.13 < found.icc.high


def test_one_way_is_the_maximum_of_the_likelihood():
    groups = np.log(fit_gsm8k.read_counts().groups)
    count, samples = groups.shape

    def minus_ln_likelihood(logs: np.ndarray) -> float:
        between, within = np.exp(logs)
        covariance = np.eye(samples) * within + between
        rest = groups - groups.mean()
        squares = np.einsum("gi,ij,gj->", rest, np.linalg.inv(covariance), rest)
        return 0.5 * (count * np.linalg.slogdet(covariance)[1] + squares)

    best = optimize.minimize(minus_ln_likelihood, np.log([0.05, 0.05]), method="Nelder-Mead", tol=1e-12)
    found = fit_gsm8k.one_way(groups)
    assert np.exp(best.x) == pytest.approx([found.between_variance, found.within_variance], rel=1e-4)


def test_no_spread_between_groups_is_zero_not_negative():
    groups = np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]])
    found = fit_gsm8k.one_way(groups)
    assert (found.between_variance, found.within_variance) == (0.0, pytest.approx(groups.var()))


def test_interval_of_the_intraclass_correlation_covers_as_often_as_it_says():
    trials = 400
    of = model(mu=8.0, between_sd=0.3, within_sd=0.2, cap_mass=0.0)
    ln = np.log(tokens(of, prompts=16 * trials, group=4)).reshape(trials, 16, 4)
    covered = np.mean([(i := fit_gsm8k.one_way(g).icc).low < 0.09 / 0.13 < i.high for g in ln])
    assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


def test_the_whole_fit_recovers_the_model_it_drew_from():
    of = model(mu=6.0, between_sd=0.3, within_sd=0.2, cap_mass=0.0)
    counts = fit_gsm8k.Counts(
        (60, 62), tokens(of, prompts=2000, group=4), tokens(of, seed=1, prompts=9000, group=1)[:, 0], 2
    )
    found = fit_gsm8k.fit(counts)
    for estimate, truth in ((found.mu, 6.0), (found.between_sd, 0.3), (found.within_sd, 0.2), (found.icc, 0.09 / 0.13)):
        assert estimate.low < truth < estimate.high
        assert estimate.value == pytest.approx(truth, rel=0.05)


def test_within_spread_above_the_total_is_refused():
    small, large = fit_gsm8k.Estimate(1.0, 0.9, 1.1), fit_gsm8k.Estimate(2.0, 1.9, 2.1)
    with pytest.raises(ValueError, match=r"2\.0000 must be below the total 1\.0000"):
        fit_gsm8k.difference(small, large)


def test_report_shows_measured_beside_simulated():
    counts = fit_gsm8k.read_counts()
    text = fit_gsm8k.report(counts, fit_gsm8k.fit(counts), GSM8K)
    assert "measured         simulated" in text
    assert "mean of 5 step maxima" in text
