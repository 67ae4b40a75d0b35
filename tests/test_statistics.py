"""The clustered bootstrap and the paired tests against closed forms and simulated truth."""
import time
from math import comb, sqrt

import numpy as np
import pytest

from vlm_repro.metrics.statistics import (
    by_group,
    clustered_interval,
    clustered_interval_of,
    expanded_percentiles,
    macro_mean,
    mcnemar,
    paired_test,
    sign_flip_p,
    t_quantile,
    too_few,
)

# two-sided 95 % and 99 % points of Student's t, from printed tables
T_TABLE = {(.975, 1): 12.706, (.975, 2): 4.303, (.975, 5): 2.571, (.975, 11): 2.201, (.975, 30): 2.042, (.975, 120): 1.980, (.995, 5): 4.032, (.995, 30): 2.750}


def clustered_sample(rng: np.random.Generator, n_clusters: int = 12, spread: float = 1., noise: float = 1.) -> tuple[np.ndarray, np.ndarray]:
    "Values with true mean 0, and the cluster of each; sizes differ but do not depend on the values."
    code = np.repeat(np.arange(n_clusters), rng.integers(10, 60, n_clusters))
    return rng.normal(0, spread, n_clusters)[code] + rng.normal(0, noise, len(code)), code.astype(str)


@pytest.mark.parametrize(('q', 'df'), T_TABLE)
def test_t_quantile_agrees_with_printed_tables(q, df):
    assert t_quantile(q, df) == pytest.approx(T_TABLE[q, df], abs=6e-4)


def test_t_quantile_is_odd_and_becomes_normal():
    assert t_quantile(.1, 7) == pytest.approx(-t_quantile(.9, 7))
    assert t_quantile(.975, 1999) == pytest.approx(t_quantile(.975, 2001), abs=2e-3)
    assert t_quantile(.975, 10**6) == pytest.approx(1.959964, abs=1e-5)


def test_independent_samples_give_the_textbook_interval():
    x = np.random.default_rng(0).normal(3, 2, 4000)
    i = clustered_interval(x, np.arange(4000).astype(str))
    half = 1.96 * x.std(ddof=1) / sqrt(4000)
    assert i.value == pytest.approx(x.mean())
    assert [i.lo, i.hi] == pytest.approx([x.mean() - half, x.mean() + half], abs=.1 * half)


def test_equal_clusters_give_the_t_interval_of_their_means():
    rng = np.random.default_rng(1)
    means = rng.normal(0, 1, 40)
    x, code = np.repeat(means, 25), np.repeat(np.arange(40), 25).astype(str)
    half = t_quantile(.975, 39) * means.std(ddof=1) / sqrt(40)
    i = clustered_interval(x, code, n_resamples=8000)
    assert [i.lo, i.hi] == pytest.approx([means.mean() - half, means.mean() + half], abs=.1 * half)


def test_simulated_coverage_is_nominal_by_cluster_and_far_below_it_by_sample():
    rng, runs, by_cluster, by_sample = np.random.default_rng(2), 400, 0, 0
    for k in range(runs):
        x, code = clustered_sample(rng)
        a, b = clustered_interval(x, code, n_resamples=400, seed=k), clustered_interval(x, np.arange(len(x)).astype(str), n_resamples=400, seed=k)
        by_cluster += a.lo <= 0 <= a.hi
        by_sample += b.lo <= 0 <= b.hi
    # three standard errors of a proportion of .95 in 400 runs are .033; unequal clusters cost the bootstrap a little more
    assert .90 <= by_cluster / runs <= .985
    assert by_sample / runs < .6


def test_expanded_percentiles_widen_few_clusters_and_leave_many_alone():
    assert expanded_percentiles(6)[0] < expanded_percentiles(12)[0] < expanded_percentiles(744)[0] < .025
    assert expanded_percentiles(744)[0] == pytest.approx(.025, abs=3e-4)


def test_the_general_road_agrees_with_the_road_over_sums():
    x, code = clustered_sample(np.random.default_rng(3))
    a = clustered_interval(x, code, n_resamples=4000)
    b = clustered_interval_of(lambda i: x[i].mean(), code, n_resamples=4000, seed=5)
    assert b.value == pytest.approx(a.value)
    assert [b.lo, b.hi] == pytest.approx([a.lo, a.hi], abs=.1 * (a.hi - a.lo))


def test_ratios_and_macro_means_are_functions_of_sums():
    rng = np.random.default_rng(4)
    x, group = rng.integers(1, 6, 300).astype(float), rng.choice(list('abc'), 300, p=[.7, .2, .1])
    code = np.repeat(np.arange(30), 10).astype(str)
    macro = clustered_interval(by_group(x, group), code, macro_mean)
    assert macro.value == pytest.approx(np.mean([x[group == g].mean() for g in 'abc']))
    assert macro.lo < macro.value < macro.hi
    ratio = clustered_interval(np.stack([x, x ** 2], 1), code, lambda totals, n: totals[..., 0] / totals[..., 1])
    assert ratio.value == pytest.approx(x.sum() / (x ** 2).sum())


def test_a_group_missing_from_a_resample_is_left_out_of_its_mean():
    totals = by_group([4., 2.], ['a', 'b'])[:1].sum(0)
    assert macro_mean(totals, np.array(1)) == 4


def test_the_order_of_samples_and_the_names_of_clusters_change_nothing():
    x, code = clustered_sample(np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(len(x))
    a, b = clustered_interval(x, code), clustered_interval(x[order], code[order])
    # sums of floats in another order may differ in the last bit
    assert [a.value, a.lo, a.hi] == pytest.approx([b.value, b.lo, b.hi], rel=1e-12)
    assert clustered_interval(x, code, seed=1) != a == clustered_interval(x, code)


def test_edge_cases_are_labelled():
    empty = clustered_interval(np.array([]), [])
    assert (empty.value, empty.lo, empty.n, empty.note) == (None, None, 0, 'no samples')
    one = clustered_interval([1., 0., 1.], ['a'] * 3)
    assert (one.lo, one.n_clusters) == (None, 1) and 'one cluster' in one.note and one.value == pytest.approx(2 / 3)
    assert clustered_interval([1., 2., 3., 4., 5.], list('abcde')).lo is None
    assert clustered_interval([1., 2., 3., 4., 5., 6.], list('abcdef')).lo is not None
    same = clustered_interval([2.] * 9, list('abcdefghi'))
    assert (same.value, same.lo, same.hi) == (2, 2, 2) and same.note
    assert clustered_interval_of(lambda i: 1., []).note == 'no samples'
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match='row 1'): clustered_interval([1., bad, 2.], list('abc'))
    with pytest.raises(ValueError, match='3 rows of values but 2'): clustered_interval([1., 2., 3.], list('ab'))


def test_six_clusters_are_needed_because_five_cannot_cover():
    # the mean of g symmetric draws lies outside their range when all fall on one side of it
    assert [bool(too_few(g)) for g in (1, 2, 3, 4, 5, 6, 7)] == [True] * 5 + [False] * 2
    assert too_few(5, level=.9) == ''


def test_a_missing_interval_says_so_when_shown():
    assert 'one cluster' in clustered_interval([1., 0.], ['a', 'a'])._repr_markdown_()
    assert clustered_interval([], [])._repr_markdown_().startswith('no value')


def test_linear_maps_keep_the_order_of_the_bounds():
    i = clustered_interval(*clustered_sample(np.random.default_rng(7)))
    up, down = i.linear(25, -25), i.linear(-1)
    assert (up.value, up.lo) == (25 * i.value - 25, 25 * i.lo - 25) and up.lo < up.hi
    assert (down.lo, down.hi) == (-i.hi, -i.lo)


def test_ten_thousand_single_samples_take_less_than_two_seconds():
    x = np.random.default_rng(8).random(10_000)
    clusters, start = np.arange(10_000).astype(str), time.process_time()
    clustered_interval(x, clusters, n_resamples=2000)
    assert time.process_time() - start < 2


def test_pairs_of_equal_runs_are_significant_as_often_as_promised():
    rng, runs, found = np.random.default_rng(9), 300, 0
    for k in range(runs):
        shared, code = clustered_sample(rng, n_clusters=10, noise=.1)
        effect = rng.normal(0, .5, 10)[code.astype(int)]
        found += paired_test(shared + effect, shared, code, n_resamples=50, seed=k).p <= .05
    # three standard errors of .05 in 300 runs are .038
    assert found / runs <= .088


def test_a_small_gain_is_found_in_pairs_where_the_runs_overlap():
    rng = np.random.default_rng(10)
    x, code = clustered_sample(rng, n_clusters=20)
    gain = paired_test(x + .2 + rng.normal(0, .2, len(x)), x, code)
    alone = clustered_interval(x, code)
    assert gain.diff == pytest.approx(.2, abs=.05) and gain.lo > 0 and gain.p < .01
    assert gain.hi - gain.lo < .2 * (alone.hi - alone.lo)
    worse = paired_test(x, x + .2, code)
    assert worse.diff == pytest.approx(-.2) and worse.hi < 0


def test_sign_flips_are_exact_for_few_clusters_and_close_for_many():
    assert sign_flip_p(np.ones(3)) == (.25, True)
    assert sign_flip_p(np.array([3., 1., -1.])) == (.75, True)
    sums = np.random.default_rng(11).normal(.4, 1, 14)
    exact, drawn = sign_flip_p(sums)[0], sign_flip_p(np.append(sums, 0.), 20_000)
    assert drawn[1] is False and drawn[0] == pytest.approx(exact, abs=.02)


def test_paired_edge_cases_are_labelled():
    assert paired_test([1., 1.], [1., 1.], list('ab')).p == 1
    assert paired_test([1., 0.], [0., 0.], ['a', 'a']).p is None
    few = paired_test([1., 1., 1.], [0., 0., 0.], list('abc'))
    assert (few.p, few.lo) == (.25, None) and 'too few' in few.note
    assert paired_test([], [], []).diff is None
    with pytest.raises(ValueError, match='pair them by sample id'): paired_test([1.], [1., 2.], ['a'])


@pytest.mark.parametrize(('only_a', 'only_b'), [(0, 0), (1, 0), (5, 5), (9, 1), (40, 20), (600, 500)])
def test_mcnemar_is_the_exact_binomial(only_a, only_b):
    a, b = [1] * only_a + [0] * only_b + [1, 0], [0] * only_a + [1] * only_b + [1, 0]
    n, k = only_a + only_b, min(only_a, only_b)
    want = min(1., 2 * sum(comb(n, i) for i in range(k + 1)) / 2 ** n)
    got = mcnemar(a, b)
    assert (got.only_a, got.only_b, got.n) == (only_a, only_b, n + 2) and got.p == pytest.approx(want, rel=1e-12)


def test_mcnemar_refuses_other_scores():
    with pytest.raises(ValueError, match='0 and 1'): mcnemar([1, 3], [0, 1])
