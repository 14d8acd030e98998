"""Statistics over seeds: by hand, by construction, and by how often they are wrong on noise."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simrl.experiments.statistics import (
    NOT_SHOWN,
    bootstrap_interval95,
    compare_paired,
    half_width,
    holm,
    interval95,
    paired_p,
    seeds_needed,
    split_variance,
)

T_975_2 = 4.302652729911275  # Student's t, two degrees of freedom, from a table
SHARES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_the_paired_test_is_students():
    # With two degrees of freedom the t distribution has a closed form: p = 1 - t / sqrt(2 + t^2).
    t = 2 / (1 / math.sqrt(3))
    assert paired_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert paired_p(np.array([1.0])) is None


def test_differences_without_spread_need_no_test():
    assert paired_p(np.array([0.0, 0.0])) == 1.0
    assert paired_p(np.array([0.5, 0.5])) == 0.0


def test_pairing_takes_off_what_seeds_share():
    reference = [100.0, 300.0, 200.0, 500.0]
    values = [99.0, 298.9, 199.1, 499.0]  # 1 less but for 0.1, while seeds differ by hundreds
    (paired,) = compare_paired([(values, reference)])
    assert paired.verdict == "less"
    assert paired.difference == pytest.approx(-1.0)
    differences = [-1.0, -1.1, -0.9, -1.0]
    half = 3.182446305284263 * statistics.stdev(differences) / 2  # t with three degrees of freedom, from a table
    assert paired.ci95 == [pytest.approx(-1 - half), pytest.approx(-1 + half)]
    (turned,) = compare_paired([(reference, values)])
    assert (turned.verdict, turned.p) == ("more", pytest.approx(paired.p))


def test_one_seed_shows_no_difference():
    (paired,) = compare_paired([([1.0], [2.0])])
    assert (paired.verdict, paired.ci95, paired.p, paired.seeds_for_1_percent) == (NOT_SHOWN, None, None, None)


def test_holm_by_hand():
    # In order: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1, which must not be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(SHARES)
def test_holm_is_between_no_correction_and_bonferroni(ps):
    for p, corrected in zip(ps, holm(ps), strict=True):
        assert p <= corrected <= min(len(ps) * p, 1.0) + 1e-12


def test_tables_of_noise_rarely_show_a_difference():
    noise = np.random.Generator(np.random.Philox(1)).standard_normal((150, 8, 4))
    tables = [compare_paired([(values, values * 0) for values in table]) for table in noise]
    wrong = np.mean([any(paired.verdict != NOT_SHOWN for paired in table) for table in tables])
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    uncorrected = np.mean([any(paired.p <= 0.05 for paired in table) for table in tables])
    assert uncorrected > 0.2  # 1 - 0.95^8 = 0.34: the correction is what holds the line


def test_seeds_needed_by_hand():
    values = np.array([1.0, 2.0, 3.0])  # standard deviation 1
    width = T_975_2 / math.sqrt(3)
    assert seeds_needed(values, width * 1.0001) == 3
    assert seeds_needed(values, width * 0.9999) == 4
    with pytest.raises(ValueError, match="need 2, and above 0"):
        seeds_needed(values, 0.0)


@given(st.floats(0.01, 100), st.floats(0.05, 10))
def test_seeds_needed_are_the_fewest(sd, share):
    values = sd * np.array([-1.0, 0.0, 1.0])
    count = seeds_needed(values, share * sd)
    assert half_width(sd, count) <= share * sd * (1 + 1e-9)
    assert count == 2 or half_width(sd, count - 1) > share * sd * (1 - 1e-9)


def test_the_bootstrap_of_many_normal_values_is_near_students():
    values = np.random.Generator(np.random.Philox(2)).normal(10, 2, 400)
    students, found = interval95(values), bootstrap_interval95(values)
    assert found == pytest.approx(students, abs=0.15 * (students[1] - students[0]) / 2)
    assert found == bootstrap_interval95(values)


def test_the_bootstrap_leans_with_skewed_values():
    values = np.array([0.0] * 9 + [10.0])
    low, high = bootstrap_interval95(values)
    assert 0 <= low < values.mean() < high <= 10  # Student's would reach below 0, where no value is
    assert interval95(values)[0] < 0
    assert high - values.mean() > values.mean() - low


def test_few_or_equal_values_have_no_bootstrap():
    assert bootstrap_interval95(np.arange(4.0)) is None
    assert bootstrap_interval95(np.full(6, 3.0)) == [3.0, 3.0]


def test_variance_is_split_by_construction():
    cells, seeds = np.array([0.0, 10.0, 50.0]), np.array([0.0, 2.0, 1.0, -3.0])
    found = split_variance(cells[:, None] + seeds[None, :])  # no interaction: cells differ alike at every seed
    assert found["over_cells"] == pytest.approx(statistics.stdev(cells))
    assert found["over_seeds"] == pytest.approx(statistics.stdev(seeds))


def test_noise_alone_is_no_difference_of_cells():
    noise = np.random.Generator(np.random.Philox(3)).normal(0, 1, (200, 5))
    found = split_variance(noise)
    assert found["over_cells"] < 0.2  # the spread of the means is 1 / sqrt(5) = 0.45
    assert found["over_seeds"] == pytest.approx(1, abs=0.1)
