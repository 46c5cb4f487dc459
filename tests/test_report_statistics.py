"""Paired differences, corrections, interpolation and AUC against scipy and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from minildm.errors import InputError
from minildm.metrics.adherence import phantom_fields, wilson
from minildm.metrics.utility import auc, linear_scores, mean_auc, usefulness
from minildm.report.read_run import Missing
from minildm.report.statistics import holm, interpolate, paired_difference, verdict
from minildm.report.tables import Table, Value, csv_text, spread


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_paired_difference_matches_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), rng.normal(0.3, 2, size=n)
    ours, theirs = paired_difference(a, b), stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9) and ours.mean == pytest.approx((a - b).mean())
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert ours.n == n


def test_the_interval_covers_the_true_difference_in_95_percent():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        found = paired_difference(rng.normal(1, 1, 4), rng.normal(0.5, 1, 4))
        covered += found.low <= 0.5 <= found.high
    assert 0.935 < covered / 2000 < 0.965


def test_equal_values_are_no_difference_and_constant_ones_are():
    assert paired_difference([1, 2, 3], [1, 2, 3]).p == 1
    assert paired_difference([2, 3, 4], [1, 2, 3]).p == 0
    assert np.isnan(paired_difference([1], [2]).p) and paired_difference([1], [2]).mean == -1


def test_holm_equals_its_definition():
    """Rejecting at level L those whose adjusted p is below L is Holm's step-down procedure."""
    rng = np.random.default_rng(1)
    for m in range(1, 7):
        p = rng.uniform(0, 0.1, m)
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2):
            rejected, order = set(), np.argsort(p)
            for k, index in enumerate(order):
                if p[index] > level / (m - k):
                    break
                rejected.add(int(index))
            assert {i for i in range(m) if adjusted[i] <= level} == rejected
    assert holm([]) == []


def test_verdicts_in_words():
    low = paired_difference([1.0, 1.1, 0.9], [2.0, 2.2, 1.8])
    assert verdict(low, 0.01, "lower").startswith("lower: better") and "3 seeds" in verdict(low, 0.01, "lower")
    assert verdict(low, 0.01, "higher").startswith("lower: worse")
    assert verdict(low, 0.06, "lower") == "not significant with 3 seeds"


def test_interpolation_between_ranks():
    assert interpolate([100, 1000], [2.0, 1.0], 100) == 2.0
    assert interpolate([1000, 100], [1.0, 2.0], 10**2.5) == pytest.approx(1.5)
    assert isinstance(interpolate([100, 1000], [2.0, 1.0], 99), Missing)


def test_wilson_matches_scipy():
    for n, k in ((1, 0), (10, 3), (50, 50), (200, 1)):
        theirs = stats.binomtest(k, n).proportion_ci(0.95, "wilson")
        assert wilson(k / n, n) == pytest.approx((theirs.low, theirs.high), abs=2e-5)  # 1.96 for 1.959964


# --- usefulness ------------------------------------------------------------------------------------------------------
def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    for n in (4, 20, 60):
        truth, scores = rng.random(n) < 0.4, rng.integers(0, 6, n)  # with ties
        truth[:2] = True, False
        pairs = list(itertools.product(scores[truth], scores[~truth]))
        assert auc(truth, scores) == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert np.isnan(auc(np.ones(3, bool), np.arange(3)))
    both = np.array([[True, True], [False, True]])
    assert mean_auc(both, np.array([[1, 0], [0, 0]])) == 1.0  # the class without a negative does not count


def test_linear_scores_minimise_the_penalised_loss():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.random((40, 1)) < 0.5
    scores = linear_scores(x, y, x)[:, 0]
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    design = np.c_[z, np.ones(40)]
    weights = np.linalg.lstsq(design, scores, rcond=None)[0]
    gradient = design.T @ (1 / (1 + np.exp(-scores)) - y[:, 0]) / 40 + 1e-2 * np.r_[weights[:3], 0]
    assert np.abs(gradient).max() < 1e-5


def made(n, shift, seed):
    rng = np.random.default_rng(seed)
    labels = [("ill",) if rng.random() < 0.5 else () for _ in range(n)]
    return rng.normal(size=(n, 5)) + shift * np.array([[bool(label)] for label in labels]), labels


def test_useful_images_are_found_useful_and_useless_ones_not():
    found = usefulness(made(80, 1.0, 0), made(80, 1.0, 1), made(100, 1.0, 2), resamples=200)
    assert found["classes"] == ["ill"]
    assert all(entry["auc"] > 0.9 and entry["low"] < entry["auc"] < entry["high"] for entry in found["auc"].values())
    useless = usefulness(made(80, 1.0, 0), made(80, 0.0, 1), made(100, 1.0, 2), resamples=200)["auc"]
    assert useless["synthetic"]["low"] < 0.75 and useless["real"] == found["auc"]["real"]
    assert found == usefulness(made(80, 1.0, 0), made(80, 1.0, 1), made(100, 1.0, 2), resamples=200)


def test_too_few_images_of_a_class_are_an_error():
    with pytest.raises(InputError, match="no class has 3 images"):
        usefulness(made(80, 1.0, 0), (np.zeros((4, 5)), [()] * 4), made(100, 1.0, 2), resamples=200)


# --- prompts of phantoms ---------------------------------------------------------------------------------------------
def test_a_phantoms_prompt_says_what_its_fields_say():
    from minildm.data.prompts import render
    from minildm.data.sets.phantom import records

    for record in records(400)[0]:
        asked = {name: record.fields[name] for name in ("view", "sex", "diagnosis", "loc") if name in record.fields}
        assert phantom_fields(render("full", record.fields)) == asked
    assert phantom_fields("a red circle") == {}


# --- tables ----------------------------------------------------------------------------------------------------------
TABLE = Table(
    "A & B_1 | 50 %",
    ("method", "loss", "note"),
    (("lora r = 4", Value(0.12345, 0.01, 3, 3), "x|y <b>"), ("full", Missing("not run"), "$5 ~ #1")),
    ("a note",),
)


def test_all_forms_of_a_table_show_the_same():
    markdown, latex, text = TABLE.markdown(), TABLE.latex(), csv_text([TABLE])
    assert "0.123 ± 0.010" in markdown and r"0.123 $\pm$ 0.010" in latex
    assert '"0.12345"' not in text and "0.12345,0.01,3," in text
    for form in (markdown, latex, text):
        assert "missing" in form and "not run" in form
    assert all(line.count("|") - line.count("\\|") == 4 for line in markdown.splitlines() if line.startswith("|"))
    assert r"A \& B\_1 $|$ 50 \%" in latex and r"\$5 \textasciitilde{} \#1" in latex
    assert latex.count(r"\\") == 3 and r"x\|y \<b\>" in markdown


def test_spread_keeps_reasons_and_refuses_numbers_that_are_not_finite():
    found = spread([1.0, 3.0], 1)
    assert (found.mean, found.n, found.digits) == (2.0, 2, 1) and found.deviation == pytest.approx(2**0.5)
    assert spread([1.0]).deviation is None
    assert spread([1.0, Missing("gone")]).reason.replace("1 of 2", "2 of 2") == "gone (2 of 2 runs)"
    assert spread([float("nan"), 1.0]) == Missing("not finite") and spread([], of="loss") == Missing("no loss")
