"""Are generated images useful? A classifier trained on them is tested on real ones.

The classifier is linear: for each class of a caption field, logistic regression on a network's features, standardised
by the training images, with the penalty L2 / 2 |w|^2 on the weights. It is small on purpose, because the question is
what the images teach, not how good a classifier can be; a network trained end to end would reach more.

AUC: the probability that an image with the class gets a higher score than one without, ties counting half (Hanley and
McNeil 1982, Radiology 143, 29), averaged over the classes. Interval: bootstrap over the test images.
"""

import numpy as np

from minildm.errors import InputError

L2 = 1e-2  # of the mean loss
FEWEST = 3  # images with and without a class, in training and in the test, or the class does not count


def usefulness(real, synthetic, test, seed=0, resamples=1000):
    """AUC on the test images of classifiers trained on real, on synthetic, and on both.

    Args:
        real, synthetic, test: each (features (n, d), the classes of each image as `splits.classes_of` gives them).
        seed, resamples: of the bootstrap.
    Returns: {"classes": [...], "auc": {"real" | "synthetic" | "real + synthetic": {"auc", "low", "high", ...}}}.
    Raises: InputError if no class has enough images everywhere.
    """
    parts = {name: part for name, part in (("real", real), ("synthetic", synthetic), ("test", test))}
    names = sorted({name for _, labels in parts.values() for of_image in labels for name in of_image})
    counts = {part: {name: sum(name in c for c in labels) for name in names} for part, (_, labels) in parts.items()}
    sizes = {part: len(labels) for part, (_, labels) in parts.items()}
    kept = [n for n in names if all(FEWEST <= counts[part][n] <= sizes[part] - FEWEST for part in parts)]
    if not kept:
        raise InputError(
            f"no class has {FEWEST} images with and {FEWEST} without it among training, generated and held-out images; "
            "give more data, more --samples or another --utility"
        )
    both = (np.concatenate([real[0], synthetic[0]]), [*real[1], *synthetic[1]])
    truth = one_hot(test[1], kept)
    result = {}
    for training, (features, labels) in (("real", real), ("synthetic", synthetic), ("real + synthetic", both)):
        scores = linear_scores(features, one_hot(labels, kept), test[0])
        low, high = bootstrap_interval(
            lambda rows, s=scores: mean_auc(truth[rows], s[rows]), len(truth), seed, resamples
        )
        value = mean_auc(truth, scores)
        result[training] = {"auc": value, "low": low, "high": high, "n_train": len(labels), "n_test": len(truth)}
    return {"classes": kept, "auc": result}


def one_hot(labels, names):
    """bool (n, classes)"""
    return np.array([[name in of_image for name in names] for of_image in labels])


def linear_scores(features, truth, test):
    """Scores (m, classes) of the test features (m, d): logistic regression on features (n, d), truth (n, classes)."""
    from scipy.optimize import minimize
    from scipy.special import expit

    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, z = ((part - mean).astype(np.float64) / deviation for part in (features, test))

    def loss(parameters, y):  # the mean of log(1 + e^s) - y s, plus the penalty; and its gradient
        weights, bias = parameters[:-1], parameters[-1]
        scores = x @ weights + bias
        error = (expit(scores) - y) / len(y)
        value = np.mean(np.logaddexp(0, scores) - y * scores) + L2 / 2 * weights @ weights
        return value, np.append(x.T @ error + L2 * weights, error.sum())

    columns = []
    for y in truth.T.astype(np.float64):
        found = minimize(loss, np.zeros(x.shape[1] + 1), (y,), "L-BFGS-B", jac=True, options={"gtol": 1e-7, "ftol": 0})
        columns.append(z @ found.x[:-1] + found.x[-1])
    return np.stack(columns, axis=1)


def auc(truth, scores):
    """Area under the ROC curve: truth bool (n,), scores (n,); nan without both kinds of image."""
    from scipy.stats import rankdata

    with_class = truth.sum()
    without = len(truth) - with_class
    if not with_class or not without:
        return float("nan")
    return float((rankdata(scores)[truth].sum() - with_class * (with_class + 1) / 2) / (with_class * without))


def mean_auc(truth, scores):
    """The mean over the classes that have both kinds of image."""
    values = [auc(truth[:, k], scores[:, k]) for k in range(truth.shape[1])]
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


def bootstrap_interval(statistic, n, seed, resamples):
    """95 % percentile interval of statistic(indices) over resamples of n items; undefined ones (nan) do not count."""
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)])
    return tuple(float(q) for q in np.nanquantile(values, (0.025, 0.975)))
