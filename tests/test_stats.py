"Statistics of evidence against known cases."

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sp
from simulated import records, worlds

from vlkd.eval.stats import (
    check_examples,
    detectable,
    equivalence,
    estimate,
    format_p,
    holm,
    mean_interval,
    p_value,
    paired_difference,
)


# ---- records
@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d.drop(columns="group"), "column 'group' is missing"),
        (lambda d: d.assign(kind=None), "missing values in kind"),
        (lambda d: d.iloc[:0], "no examples"),
        (lambda d: pd.concat([d, d.tail(1)]), "occurs a second time"),
        (lambda d: d.assign(right=~d.right), "row 0: `right` contradicts"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        check_examples,
        mean_interval,
        lambda d: paired_difference(d, records("b", [1, 1, 1])),
        lambda d: paired_difference(records("b", [1, 1, 1]), d),
    ],
)
def test_bad_records(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(change(records("a", [1, 0, 1])))


# ---- one world: t over clusters
def test_independent_examples_match_the_paired_t_test():
    generator = np.random.default_rng(1)
    a = records("a", generator.random(900) < 0.8)
    b = records("b", generator.random(900) < 0.74)
    gain = 100 * (a.right.astype(float) - b.right)
    known = sp.ttest_1samp(gain, 0)
    interval = known.confidence_interval(0.95)
    d = paired_difference(a, b)
    assert (d["diff"], d["p"]) == pytest.approx((gain.mean(), known.pvalue))
    assert (d["low"], d["high"]) == pytest.approx((interval.low, interval.high))
    assert (d["unit"], d["df"]) == ("cluster", 899)


def test_clusters_not_examples_are_the_unit():
    generator = np.random.default_rng(2)
    cluster = np.repeat(np.arange(50), 8)
    a, b = (records(r, np.repeat(generator.random(50) < 0.6, 8), group=cluster) for r in "ab")
    gain = 100 * (a.right.astype(float) - b.right)[::8]
    d = paired_difference(a, b)
    assert (d["n_clusters"], d["n_examples"]) == (50, 400)
    assert d["se"] == pytest.approx(gain.std(ddof=1) / 50**0.5)
    assert paired_difference(a, b, cluster="id")["se"] < 0.45 * d["se"]


def test_unequal_clusters_are_weighted_by_examples():
    cluster = [0] * 9 + [1]
    a, b = records("a", [1] * 9 + [0], group=cluster), records("b", [0] * 10, group=cluster)
    assert paired_difference(a, b)["diff"] == pytest.approx(90)


# ---- several worlds: t over worlds
def test_worlds_are_the_unit():
    "The interval is that of t over the worlds' differences, whatever happens within them."
    gain = np.array([0, 0.2, 0.4, 0.6, 0.8])
    one_cluster = np.zeros(50, int)
    a = pd.concat(
        [records("a", np.arange(50) < 50 * x, seed=s, group=one_cluster) for s, x in enumerate(gain)]
    )
    b = a.assign(run="b", prediction=1 - a.label, right=False)
    d = paired_difference(a, b)
    points = 100 * gain
    assert [w["diff"] for w in d["per_world"]] == pytest.approx(points)
    assert (d["diff"], d["unit"], d["df"]) == (pytest.approx(40), "world", 4)
    interval = sp.t.interval(0.95, 4, points.mean(), points.std(ddof=1) / 5**0.5)
    assert (d["low"], d["high"]) == pytest.approx(interval)
    assert d["p"] == pytest.approx(sp.ttest_1samp(points, 0).pvalue)


def test_one_cluster_in_one_world_says_nothing():
    a, b = records("a", [1, 1, 0], group=[0, 0, 0]), records("b", [0, 1, 0], group=[0, 0, 0])
    d = paired_difference(a, b)
    assert (d["low"], d["high"], d["p"], d["detectable"]) == (-100, 100, 1, None)


def test_seeds_of_fine_tuning_are_averaged():
    "Three fine-tunings that agree tell what one tells; pairs are of one seed of fine-tuning."
    a, b = worlds("a", 0.6), worlds("b", 0.5)
    three = [pd.concat([d.assign(ft_seed=k) for k in (1, 2, 3)]) for d in (a, b)]
    once, thrice = paired_difference(a, b), paired_difference(*three)
    assert [thrice[k] for k in ("diff", "low", "high")] == pytest.approx(
        [once[k] for k in ("diff", "low", "high")]
    )
    second = pd.concat([a.assign(ft_seed=1), worlds("a", 0.6, seed=7).assign(ft_seed=2)])
    both = paired_difference(second, pd.concat([b.assign(ft_seed=k) for k in (1, 2)]))
    assert both["diff"] == pytest.approx(100 * (second.right.mean() - b.right.mean()))
    with pytest.raises(ValueError, match="ft_seed 2"):
        paired_difference(second, b.assign(ft_seed=1))
    assert paired_difference(a.assign(ft_seed=float("nan")), b)["diff"] == once["diff"]


def test_tasks_count_equally():
    a = pd.concat([records("a", [1] * 90, task="piqa"), records("a", [0] * 10, task="sst2")])
    b = a.assign(run="b", prediction=1 - a.label, right=False)
    assert paired_difference(a, b)["diff"] == pytest.approx(50)  # not 90: mean of 100 and 0


def test_tasks_share_their_clusters():
    "A second task with the same answers about the same nouns adds no information; other nouns do."
    generator = np.random.default_rng(3)
    right = dict(a=generator.random(400) < 0.7, b=generator.random(400) < 0.5)

    def two_tasks(run, prefix):
        second = records(run, right[run], task="mnli")
        second["group"] = prefix + second["group"]
        return pd.concat([records(run, right[run], task="piqa"), second])

    same, apart = (paired_difference(two_tasks("a", p), two_tasks("b", p))["se"] for p in ("", "m"))
    assert same / apart == pytest.approx(2**0.5, rel=0.06)


def test_ties():
    a = worlds("a", 0.6)
    d = paired_difference(a, a.assign(run="b"))
    assert (d["diff"], d["low"], d["high"], d["p"], d["se"]) == (0, 0, 0, 1, 0)


def test_deterministic_and_antisymmetric():
    a, b = worlds("a", 0.6), worlds("b", 0.5)
    d, reverse = paired_difference(a, b), paired_difference(b, a)
    assert d == paired_difference(a.sample(frac=1, random_state=1), b)
    assert (reverse["diff"], reverse["low"], reverse["high"]) == pytest.approx(
        (-d["diff"], -d["high"], -d["low"])
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d[d.seed == 1], "200 examples are in one only; first: seed 2"),
        (lambda d: d.assign(label=1 - d.label, prediction=1 - d.prediction), "has label"),
        (lambda d: d.assign(group="x"), "has group"),
        (lambda d: d.assign(kind="x"), "has kind"),
        (lambda d: d.assign(task="sst2"), "400|800"),
        (lambda d: pd.concat([d, d.assign(run="c")]), "one run"),
    ],
)
def test_misalignment(change, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(worlds("a", 0.6, n_worlds=2), change(worlds("b", 0.5, n_worlds=2)))


def test_wrong_arguments():
    a, b = worlds("a", 0.6, n_worlds=2), worlds("b", 0.5, n_worlds=2)
    with pytest.raises(ValueError, match="world 2 has no examples of sst2"):
        mean_interval(pd.concat([a, records("a", [1, 0], task="sst2")]))
    with pytest.raises(ValueError, match="no column 'noun'"):
        paired_difference(a, b, cluster="noun")


def test_coverage():
    "A 95 % interval holds the true difference in about 95 of 100 simulations; p < 0.05 in about 5."

    def difference(a, b, accuracy, seed):
        first = worlds(a, accuracy, n=80, n_worlds=1, seed=seed)
        return paired_difference(first, worlds(b, 0.5, n=80, n_worlds=1, seed=seed))

    ten_points = [difference("a", "b", 0.6, seed) for seed in range(100)]
    none = [difference("c", "d", 0.5, seed) for seed in range(100)]
    assert 89 <= sum(d["low"] <= 10 <= d["high"] for d in ten_points) <= 99
    assert 1 <= sum(d["p"] < 0.05 for d in none) <= 11


def test_mean_interval():
    a = worlds("a", 0.6, n=400)
    m = mean_interval(a, chance=50)
    assert m["mean"] == pytest.approx(100 * a.right.mean())
    assert m["low"] < m["mean"] < m["high"]
    assert m["p"] < 0.05 < mean_interval(worlds("b", 0.5, n=400), chance=50)["p"]


@pytest.mark.parametrize("p,shown", [(0.0, "p < 0.001"), (0.00099, "p < 0.001"), (0.0412, "p = 0.041")])
def test_p_is_never_printed_as_zero(p, shown):
    assert format_p(p) == shown


# ---- errors of both kinds
@pytest.mark.parametrize(
    "n_worlds,shape",
    [(2, "normal"), (5, "normal"), (8, "normal"), (5, "learned or not"), (8, "learned or not")],
)
def test_errors_of_the_first_kind(n_worlds, shape):
    "A null is found in about 5 of 100 cases; where five worlds learn a task or not, in no more."
    generator = np.random.default_rng([7, n_worlds])
    draws = generator.normal(0, 6, (1000, n_worlds))
    if shape == "learned":
        learned = generator.random((2, 1000, n_worlds)) < 0.5
        draws = 25.0 * (learned[0].astype(int) - learned[1]) + generator.normal(0, 1, draws.shape)
    found = np.mean([p_value(estimate(pd.Series(d))) < 0.05 for d in draws])
    assert 0.033 < found < 0.067 if shape == "normal" else found < 0.07


def test_power_at_the_detectable_effect():
    generator = np.random.default_rng(8)
    size = detectable(dict(se=6 / 8**0.5, df=7))
    draws = generator.normal(size, 6, (1000, 8))
    assert np.mean([p_value(estimate(pd.Series(d))) < 0.05 for d in draws]) == pytest.approx(0.8, abs=0.05)


# ---- equivalence and Holm
@pytest.mark.parametrize("accuracy,verdict", [(0.6, "equivalent"), (0.8, "different"), (0.55, "undecided")])
def test_equivalence(accuracy, verdict):
    a, b = worlds("a", 0.6, n=2000), worlds("b", accuracy, n=2000)
    assert equivalence(a, b, 5)["verdict"] == verdict


def test_equivalence_needs_data():
    a = worlds("a", 0.6, n=20, n_worlds=1)
    same = equivalence(a, a.assign(run="b"), 0.1)
    assert same["verdict"] == "equivalent" and same["p"] < 0.001
    few = equivalence(a, worlds("b", 0.6, n=20, n_worlds=1), 5)
    assert few["verdict"] == "undecided"  # not significant is not equivalent
    with pytest.raises(ValueError, match="bound"):
        equivalence(a, a, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm(p):
    "Definition: the largest (number of hypotheses from j on) * p_j over all p_j that are not above p_i."
    adjusted, n = holm(p), len(p)
    order = sorted(range(n), key=lambda j: p[j])
    for i in range(n):
        before = [(n - k) * p[j] for k, j in enumerate(order) if p[j] < p[i] or k <= order.index(i)]
        assert adjusted[i] == pytest.approx(min(1, max(before)))


@pytest.mark.parametrize("p", [1.5, -0.1, float("nan")])
def test_holm_of_no_probability(p):
    with pytest.raises(ValueError, match="p-values"):
        holm([p])
