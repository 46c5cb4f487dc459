"""Is a difference between two methods more than chance? Paired over seeds, with an interval and a verdict in words.

Runs of one seed share their split, their validation noise, their prompts and their sampling seeds, so methods are
compared seed by seed: d_i = a_i - b_i, interval mean(d) +- t_{0.975, n-1} s_d / sqrt(n), and Student's paired t-test.
It assumes differences that are about normal, which a few seeds cannot show. Several comparisons by one metric share an
error of 5 % (Holm 1979, Scand. J. Statist. 6, 65).
"""

from dataclasses import dataclass

import numpy as np

from minildm.report.read_run import Missing

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Of a - b over n seeds."""

    mean: float
    low: float  # 95 % interval
    high: float
    p: float  # two-sided
    n: int


def paired_difference(a, b):
    """Difference of two lists of numbers, a pair for each seed; of one pair without an interval (nan)."""
    from scipy import stats

    d = np.asarray(a, float) - np.asarray(b, float)
    n = len(d)
    if n == 1:
        return Difference(float(d[0]), *[float("nan")] * 3, n)
    mean, error = d.mean(), d.std(ddof=1) / n**0.5
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Difference(float(mean), float(mean - half), float(mean + half), p, n)


def holm(p_values):
    """p-values adjusted for their number: the k-th smallest times (m - k + 1), then made increasing; at most 1."""
    order = np.argsort(p_values)
    m, adjusted, largest = len(p_values), np.empty(len(p_values)), 0.0
    for k, index in enumerate(order):
        largest = max(largest, min(1.0, (m - k) * p_values[index]))
        adjusted[index] = largest
    return adjusted.tolist()


def verdict(difference, p, better):
    """In words: whether the first of two methods has the better value.

    Args: p: adjusted. better: "lower" or "higher".
    """
    if p >= LEVEL:
        return f"not significant with {difference.n} seeds"
    direction = "lower" if difference.mean < 0 else "higher"
    return f"{direction}: {'better' if direction == better else 'worse'} (p = {p:.2g}, {difference.n} seeds)"


def interpolate(x, y, at):
    """y at ``at`` on the straight lines through (log x, y); Missing outside of x. Args: x: positive numbers."""
    order = np.argsort(x)
    x, y = np.asarray(x, float)[order], np.asarray(y, float)[order]
    if not x[0] <= at <= x[-1]:
        return Missing(
            f"{at:,.0f} parameters lie outside the compared LoRA ranks' {x[0]:,.0f} to {x[-1]:,.0f} (--ranks)"
        )
    return float(np.interp(np.log(at), np.log(x), y))
