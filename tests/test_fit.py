"""The fit of lengths: families against scipy, the likelihood against brute force, coverage, and what is written."""

import dataclasses
import gzip
import json
import math
import tomllib
from importlib import resources

import numpy as np
import pytest
from scipy import integrate, special, stats

from simrl.cli import main
from simrl.experiments.fit_workloads import SHIPPED, coverage, simulated, table_path, truth_of
from simrl.traces import families, workloads
from simrl.traces.fit import FitError, Form, Lengths, Likelihood, fit, within_variance
from simrl.traces.length_tables import LengthTable, lengths_of
from simrl.traces.lengths import FAMILIES, MIXTURE, load_workload
from simrl.traces.trace import Provenance, TraceError, TraceWriter, checked

SHAPE = {"within_sd": 0.35, "second_share": 0.3, "second_offset": 0.9, "second_sd": 0.6}
GAMMA_K = families.gamma_shape(0.35)
WEIBULL_K = math.pi / (0.35 * math.sqrt(6))
# The same distributions of the sample effect, as scipy has them.
REFERENCE = {
    "lognormal": stats.norm(0, 0.35).cdf,
    "gamma": lambda x: stats.gamma(GAMMA_K).cdf(np.exp(x + special.digamma(GAMMA_K))),
    "weibull": lambda x: stats.weibull_min(WEIBULL_K).cdf(np.exp(x - np.euler_gamma / WEIBULL_K)),
    MIXTURE: lambda x: 0.7 * stats.norm(0, 0.35).cdf(x) + 0.3 * stats.norm(0.9, 0.6).cdf(x),
}


# Families.


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_scipy(family):
    low, high = np.array([-np.inf, -1.0, -0.2, 0.0, 0.3, 0.8]), np.array([-1.0, -0.2, 0.0, 0.3, 0.8, np.inf])
    found = np.exp(families.ln_probability(family, low, high, SHAPE))
    assert found == pytest.approx(REFERENCE[family](high) - REFERENCE[family](low), rel=1e-6)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", [-14.0, 14.0])
def test_far_from_the_middle_probabilities_stay_ordered(family, at):
    steps = at + np.sign(at) * np.arange(3) * 0.1
    ln = families.ln_probability(family, steps, steps + 0.001, SHAPE)
    assert not np.isnan(ln).any()
    assert (np.diff(ln) <= 0).all()


@pytest.mark.parametrize("family", families.SINGLE)
def test_effects_have_mean_0_and_the_stated_spread(family):
    x = np.linspace(-6, 6, 24001)
    mass = np.exp(families.ln_probability(family, x[:-1], x[1:], SHAPE))
    middle = (x[:-1] + x[1:]) / 2
    assert (mass * middle).sum() == pytest.approx(0, abs=1e-4)
    assert (mass * middle**2).sum() == pytest.approx(0.35**2, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_follows_the_probabilities(family):
    shape = SHAPE if family == MIXTURE else {"within_sd": 0.35}
    model = dataclasses.replace(
        load_workload("gsm8k"), parameters=(), family=family, mu=12.0, between_sd=0.0, cap_mass=0.0, **shape
    )
    ln = np.log(model.response_lengths(3, 0, 20_000, 1, 10**9).tokens[:, 0]) - 12.0
    assert stats.kstest(ln, REFERENCE[family]).pvalue > 0.01


def test_within_variance_of_a_mixture_is_that_of_its_draws():
    rng_model = dataclasses.replace(
        load_workload("gsm8k"), parameters=(), family=MIXTURE, mu=12.0, between_sd=0.0, cap_mass=0.0, **SHAPE
    )
    ln = np.log(rng_model.response_lengths(0, 0, 40_000, 1, 10**9).tokens)
    assert ln.var() == pytest.approx(within_variance(SHAPE), rel=0.04)


# The likelihood.

FEW = Lengths(
    prompt=np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3]),
    tokens=np.array([1, 3, 500, 310, 290, 120, 90, 500, 101, 101]),
    truncated=np.array([0, 0, 1, 0, 0, 0, 0, 1, 0, 0], dtype=bool),
    epoch=np.array([0, 0, 1, 0, 1, 0, 0, 1, 0, 1.0]),
)
VALUES = {"mu": 4.8, "between_sd": 0.9, **SHAPE, "cap_mass": 0.1, "drift_per_epoch": 0.2}


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihood_is_the_integral_that_brute_force_gives(family):
    def of_prompt(prompt: int) -> float:
        rows = np.flatnonzero(FEW.prompt == prompt)

        z = np.linspace(-9, 9, 4001)
        product = stats.norm.pdf(z)
        for row in rows:
            location = 4.8 + 0.9 * z + 0.2 * FEW.epoch[row]
            above = REFERENCE[family](math.log(FEW.tokens[row] + 0.5) - location)
            if FEW.truncated[row]:
                product *= 0.1 + 0.9 * (1 - above)
            else:
                below = REFERENCE[family](math.log(FEW.tokens[row] - 0.5) - location) if FEW.tokens[row] > 1 else 0
                product *= 0.9 * (above - below)
        return math.log(integrate.simpson(product, x=z))

    likelihood = Likelihood(FEW, Form(family, True, True))
    likelihood.adapt(VALUES)
    assert likelihood.by_prompt(VALUES) == pytest.approx([of_prompt(p) for p in range(4)], abs=0.02)


def test_free_values_and_values_are_each_others_reverse():
    form = Form(MIXTURE, True, True)
    assert form.values(form.free(VALUES)) == pytest.approx(VALUES)


def test_a_stated_share_sets_the_spread_between_prompts():
    form = Form(MIXTURE, between_share=0.75)
    values = form.values(form.free(VALUES))
    assert values["between_sd"] ** 2 == pytest.approx(3 * within_variance(values))
    assert "between_sd" not in form.names


# Recovery. 50 named seeds: of 50 intervals at 95 %, fewer than 43 hold the truth once in 1300 cases.


@pytest.mark.parametrize("family", ["lognormal", "weibull"])
def test_intervals_cover_as_often_as_they_say(family):
    held, truncated = coverage(family, range(50))
    assert truncated == pytest.approx(0.2, abs=0.02)
    assert set(held) == set(truth_of(family))
    assert all(43 <= count <= 50 for count in held.values()), held


@pytest.mark.parametrize(("family", "prompts"), [("gamma", 100), (MIXTURE, 200)])
def test_slow_families_recover_what_they_were_drawn_from(family, prompts):
    found = fit(simulated(family, 0, prompts=prompts), Form(family, True, True))
    for name, truth in truth_of(family).items():
        low, high = found.intervals[name]
        assert low - (high - low) / 4 < truth < high + (high - low) / 4
        assert low < found.values[name] < high


def test_taking_truncated_responses_for_whole_ones_is_seen_by_coverage():
    wrong = 0
    for seed in range(20):
        lengths = dataclasses.replace(simulated("lognormal", seed), truncated=np.zeros(800, dtype=bool))
        low, high = fit(lengths, Form("lognormal", drift=True)).intervals["between_sd"]
        wrong += not low <= truth_of("lognormal")["between_sd"] <= high
    assert wrong >= 10, "of 20; 95 % intervals miss once"


def test_long_responses_and_endless_ones_are_told_apart():
    with_both = simulated("lognormal", 5)
    whole, no_mass = (fit(with_both, Form("lognormal", mass, True)) for mass in (True, False))
    assert whole.bic < no_mass.bic
    assert no_mass.values["within_sd"] > whole.intervals["within_sd"][1]


# Choice.


def table(lengths: Lengths, **changes):
    cap = int(np.median(lengths.tokens[lengths.truncated])) if lengths.truncated.any() else None
    known = {"truncation_known": True, "cap": cap, "origin": "drawn", "notes": ()}
    return LengthTable(lengths, tuple(range(50, 50 + lengths.prompts)), **{**known, **changes})


@pytest.fixture(scope="module")
def drifting():
    return workloads.choose(table(simulated("lognormal", 1, prompts=20)))


@pytest.fixture(scope="module")
def single():
    lengths = simulated("lognormal", 2, cap=10**6, prompts=75)
    first = np.unique(lengths.prompt, return_index=True)[1]
    kept = np.isin(np.arange(lengths.tokens.size), first)
    whole = dataclasses.replace(lengths.of(kept), epoch=None)
    return workloads.choose(table(whole.of(~whole.truncated), truncation_known=False), workloads.Share(0.6, 0.4, 0.8))


def test_every_form_that_the_data_can_show_is_fitted_and_the_best_by_bic_chosen(drifting):
    assert len(drifting.candidates) == 4 * 2 * 2
    assert drifting.best.form == min(drifting.candidates, key=lambda found: found.bic).form
    assert set(drifting.held_out) == set(FAMILIES)
    for found in drifting.candidates:
        spent = len(found.form.names) * math.log(drifting.table.lengths.tokens.size)
        assert found.bic == pytest.approx(spent - 2 * found.ln_likelihood)


def test_held_out_likelihood_is_below_that_of_the_fit(drifting):
    best = drifting.best
    held_out = workloads.held_out_ln_likelihood(drifting.table.lengths, best)
    assert best.ln_likelihood - 60 < held_out < best.ln_likelihood


def test_drift_is_kept_where_the_data_show_it_only():
    shown, still = simulated("lognormal", 0), simulated("lognormal", 0)
    tokens = np.where(shown.epoch == 1, np.rint(shown.tokens * 0.7), shown.tokens).astype(np.int64)
    shown = dataclasses.replace(shown, tokens=tokens)
    form, without = Form("lognormal", True, True), Form("lognormal", True, False)
    assert fit(shown, form, intervals=False).bic < fit(shown, without, intervals=False).bic
    shuffled = dataclasses.replace(still, epoch=np.tile([0.0, 1.0], 400))
    assert fit(shuffled, form, intervals=False).bic > fit(shuffled, without, intervals=False).bic


def test_one_response_a_prompt_takes_the_split_from_a_stated_share(single):
    rows = {p.key: p for p in workloads.parameters_of(single)}
    between, within = rows["workload.between_sd"], rows["workload.within_sd"]
    assert between.status == within.status == "assumed"
    assert between.low < between.value < between.high
    total = between.value**2 + within.value**2
    if single.best.form.family != MIXTURE:
        assert between.value**2 / total == pytest.approx(0.6, abs=1e-3)
        assert total == pytest.approx(0.4**2 + 0.3**2, rel=0.35)
    assert any("cannot be told apart" in note for note in workloads.notes_of(single))
    assert rows["workload.cap_mass"].status == "assumed"
    assert (rows["workload.drift_per_epoch"].low, rows["workload.drift_per_epoch"].high) == (-0.08, 0.03)


def test_data_that_cannot_determine_a_form_are_refused():
    alone = FEW.of(np.array([1, 0, 0, 1, 0, 1, 1, 0, 0, 0], dtype=bool))
    with pytest.raises(FitError, match="no prompt has two responses"):
        fit(alone, Form("lognormal"))
    with pytest.raises(FitError, match="no response is truncated"):
        fit(alone, Form("lognormal", cap_mass=True, between_share=0.5))
    with pytest.raises(FitError, match="of one epoch"):
        fit(dataclasses.replace(FEW, epoch=None), Form("lognormal", drift=True))
    with pytest.raises(FitError, match="all responses are truncated"):
        fit(dataclasses.replace(FEW, truncated=np.ones(10, dtype=bool)), Form("lognormal"))


@pytest.mark.parametrize("text", ["0.5", "a,b,c", "0.5,0.6,0.7", "0.5,0,0.7", "0.5,0.4,1"])
def test_shares_that_are_none(text):
    with pytest.raises(FitError, match="between-share"):
        workloads.parse_share(text)


# Files of lengths.

CSV = "model,prompt_id,prompt_tokens,sample,response_tokens,truncated\n" + "\n".join(
    f"m{i % 2},p{i % 5},{30 + i % 5},{i // 10},{100 + 7 * i},{int(i == 3)}" for i in range(20)
)


def written(tmp_path, text: str, name: str = "mine.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_a_table_is_read_as_it_stands(tmp_path):
    found = lengths_of(written(tmp_path, CSV, "mine.csv.gz"), ["model=m1"])
    assert found.lengths.tokens.tolist() == [100 + 7 * i for i in range(1, 20, 2)]
    assert found.lengths.prompt.tolist() == [i % 5 for i in range(1, 20, 2)]
    assert found.lengths.truncated.sum() == 1
    assert (found.truncation_known, found.cap) == (True, 121)
    assert found.prompt_tokens == (30, 31, 32, 33, 34)
    assert (found.origin, found.lengths.epoch) == ("mine.csv.gz, m1", None)


def test_a_stated_cap_truncates(tmp_path):
    found = lengths_of(written(tmp_path, CSV), ["model=m0"], cap=200)
    assert found.lengths.truncated.tolist() == [100 + 7 * i >= 200 for i in range(0, 20, 2)]


def test_unknown_truncation_is_said(tmp_path):
    found = lengths_of(written(tmp_path, CSV.replace("truncated", "other")), ["model=m0"])
    assert not found.truncation_known
    assert not found.lengths.truncated.any()
    assert any("truncated" in note for note in found.notes)


def test_steps_become_epochs_by_how_often_a_prompt_came_back(tmp_path):
    text = "prompt_id,response_tokens,step\na,5,0\nb,6,1\na,7,2\nb,8,3\nb,9,3\n"
    assert lengths_of(written(tmp_path, text)).lengths.epoch.tolist() == [0, 0, 1, 1, 1]
    assert lengths_of(written(tmp_path, text), steps_per_epoch=3).lengths.epoch.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("old", "new", "groups", "message"),
    [
        ("m1", "m1", [], "several models: choose one by --group model=VALUE; it has m0, m1"),
        ("m1", "m1", ["model=m3"], "has no such row; it has m0, m1"),
        ("m1", "m1", ["size=3"], "must be column=value with a column of"),
        ("m1", "m1", ["model"], "must be column=value"),
        ("prompt_id", "id", ["model=m0"], "column prompt_id is missing"),
        (",100,", ",-5,", ["model=m0"], "response_tokens=-5 in row 1 must be a whole number >= 0"),
        (",100,", ",abc,", ["model=m0"], "response_tokens=abc in row 1 must be a whole number"),
        (",100,", ",,", ["model=m0"], "response_tokens=nan in row 1 must be a whole number"),
        (",100,", ",1.5,", ["model=m0"], "response_tokens=1.5 in row 1 must be a whole number"),
        (",100,0", ",100,7", ["model=m0"], "truncated=7 in row 1 must be 0 or 1"),
        ("m0,p0,30,0,100", "m0,,30,0,100", ["model=m0"], "1 rows have no prompt_id"),
    ],
)
def test_bad_tables_are_refused_with_file_and_row(tmp_path, old, new, groups, message):
    assert old in CSV
    with pytest.raises(FitError) as caught:
        lengths_of(written(tmp_path, CSV.replace(old, new)), groups)
    assert message in str(caught.value)


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(FitError, match="no such file"):
        lengths_of(tmp_path / "none.csv")
    with pytest.raises(FitError, match="not a CSV table"):
        lengths_of(written(tmp_path, ""))
    (tmp_path / "bad.csv.gz").write_bytes(b"\x00\x01")
    with pytest.raises(FitError, match="not a CSV table"):
        lengths_of(tmp_path / "bad.csv.gz")
    (tmp_path / "bad.parquet").write_bytes(b"\x00\x01")
    with pytest.raises(TraceError, match="not a trace"):
        lengths_of(tmp_path / "bad.parquet")


def test_a_trace_gives_the_same_lengths_as_a_table(tmp_path):
    path = tmp_path / "t.parquet"
    with TraceWriter(path) as writer:
        for step, tokens in ((0, 5), (0, 9), (1, 7)):
            row = {"kind": "response", "step": step, "prompt_id": "a", "response_tokens": tokens, "prompt_tokens": 3}
            writer.add(checked({**row, "truncated": tokens == 9}))
        writer.finish(Provenance("test", ["log"], "2026-01-01", "0"))
    found = lengths_of(path)
    assert found.lengths.tokens.tolist() == [5, 9, 7]
    assert found.lengths.truncated.tolist() == [False, True, False]
    assert found.lengths.epoch.tolist() == [0, 0, 1]
    assert found.prompt_tokens == (3,)


# The command.


@pytest.fixture(scope="module")
def lengths_csv(tmp_path_factory):
    lengths = simulated("lognormal", 3, prompts=40)
    first = lengths.epoch == 0
    rows = zip(lengths.prompt[first], lengths.tokens[first], lengths.truncated[first], strict=True)
    text = "prompt_id,prompt_tokens,response_tokens,truncated\n"
    text += "".join(f"{p},{60 + p},{n},{int(t)}\n" for p, n, t in rows)
    return written(tmp_path_factory.mktemp("lengths"), text)


def test_the_command_writes_a_workload_that_a_run_takes(lengths_csv, tmp_path, capsys):
    out, png = tmp_path / "w.toml", tmp_path / "qq.png"
    arguments = ["trace", "fit", str(lengths_csv), "-o", str(out), "--plot", str(png), "--template-tokens", "30"]
    assert main([*arguments, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    model = load_workload(str(out))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert (model.template_tokens, len(model.prompt_tokens)) == (30, 40)
    assert figures["parameters"]["mu"]["value"] == model.mu
    assert figures["candidates"][0]["form"] == figures["form"]
    document = tomllib.loads(out.read_text(encoding="utf-8"))
    assert document["fit"]["responses"] == 160
    assert document["fit"]["candidates"] == figures["candidates"]
    run = ["run", "--set", f"job.workload={out}", "--steps", "1", "--set", "job.prompts_per_step=8", "--json"]
    assert main([*run, "--set", "job.mini_batch_prompts=8", "--nodes", "1"]) == 0
    for row in figures["measured_beside_drawn"]:
        assert row["low"] <= row["drawn"] <= row["high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv", "-o", "w.toml"], "none.csv: no such file"),
        (["CSV", "-o", "nowhere/w.toml"], "cannot be written"),
        (["CSV", "-o", "w.toml", "--cap", "0"], "cap=0 must be >= 1 (--cap)"),
        (["CSV", "-o", "w.toml", "--steps-per-epoch", "0"], "steps_per_epoch=0 must be >= 1"),
        (["CSV", "-o", "w.toml", "--template-tokens", "-1"], "template_tokens=-1 must be >= 0"),
        (["CSV", "-o", "w.toml", "--between-share", "2,1,3"], "between share: low=1.0, value=2.0"),
        (["CSV", "-o", "w.toml", "--cap", "x"], "'x' is not a whole number"),
    ],
)
def test_what_the_user_can_mend_is_one_line(lengths_csv, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [str(lengths_csv) if a == "CSV" else a for a in arguments]
    assert main(["trace", "fit", *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "w.toml").exists()


def test_a_table_without_prompt_lengths_is_refused(tmp_path, capsys):
    path = written(tmp_path, "prompt_id,response_tokens\na,5\na,6\nb,9\n")
    assert main(["trace", "fit", str(path), "-o", str(tmp_path / "w.toml")]) == 2
    assert "no prompt_tokens" in capsys.readouterr().err


# The shipped files.


def shipped(name: str) -> dict:
    text = resources.files("simrl.traces").joinpath(f"data/workload_{name}.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_written_form_is_the_best_by_bic_and_says_where_it_comes_from(name):
    document = shipped(name)
    rows = document["fit"]["candidates"]
    assert rows == sorted(rows, key=lambda row: row["bic"])
    best = rows[0]["form"]
    undetermined = f"best by BIC was {best}, which the data do not determine"
    assert best.split(" + ")[0] == document["family"] or undetermined in document["fit"]["notes"]
    assert SHIPPED[name].attribution in document["source"]
    assert SHIPPED[name].model in document["source"]


@pytest.mark.parametrize("name", [n for n in SHIPPED if n.startswith(("livecodebench", "math500"))])
def test_the_chosen_model_is_at_least_as_good_on_unseen_prompts_as_any_single_family(name):
    rows = [row for row in shipped(name)["fit"]["candidates"] if "held_out_ln_likelihood" in row]
    single = [row["held_out_ln_likelihood"] for row in rows if row["form"].split(" + ")[0] in families.SINGLE]
    assert len(single) == 3
    assert rows[0]["held_out_ln_likelihood"] >= max(single)


@pytest.mark.parametrize("name", ["gsm8k-qwen2.5-32b", "gsm8k-reasoning", "math500", "math500-reasoning"])
def test_a_fresh_fit_of_the_shipped_table_gives_the_shipped_file(name):
    what, document = SHIPPED[name], shipped(name)
    lengths = lengths_of(table_path(what.table), [f"model={what.model}"], what.cap).lengths
    chosen = document["fit"]["candidates"][0]
    share = None if lengths.repeated else workloads.ANY_TASK.value
    form = Form(document["family"], "cap mass" in chosen["form"], False, share)
    first = fit(lengths, form, intervals=False)
    assert first.ln_likelihood == pytest.approx(chosen["ln_likelihood"], abs=0.05)
    found = fit(lengths, form, first.values)  # as intervals are found: once more, from there
    for key in found.form.names:
        row = document["parameters"][key]
        assert found.values[key] == pytest.approx(row["value"], abs=max((row["high"] - row["low"]) / 20, 1e-4))
        if share is None:
            assert found.intervals[key] == pytest.approx((row["low"], row["high"]), rel=0.05, abs=0.002)


def test_the_new_fit_and_the_old_agree_on_gsm8k():
    new, old = load_workload("gsm8k-qwen2.5-32b"), load_workload("gsm8k")
    assert new.mu == pytest.approx(old.mu, abs=0.001)
    total = [math.hypot(model.between_sd, model.within_sd) for model in (new, old)]
    assert total[0] == pytest.approx(total[1], rel=0.01)
