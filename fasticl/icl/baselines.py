"""Classical learners that see a prompt's context as their training set: what in-context learning is compared with."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np

from fasticl.icl.data import Prompts

BASELINES = ("logistic", "linear SVM", "RBF SVM", "1-NN", "3-NN")


def baseline_errors(prompts: Prompts, d_x: int, names: tuple[str, ...] = BASELINES) -> dict[str, float]:
    """0/1 error of each learner, fitted anew to every prompt's ``(x_i, y_i)`` and asked for the query's label.

    Learners are scikit-learn's (extra ``reproduce``) with its default parameters. Where all labels of a context agree,
    that label is the answer.

    Args:
        prompts: of any length of at least 1.
        d_x: how many of a column's d coordinates are the input; the label is the sign of the sum of the others.
        names: of :data:`BASELINES`.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: a name is unknown.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"names: expected of {', '.join(BASELINES)}, got {', '.join(unknown)}")
    if find_spec("sklearn") is None:
        raise ImportError("baselines need scikit-learn: pip install 'fasticl[reproduce]'")
    import sklearn.linear_model  # all that is used, for threadpool_limits reaches only the pools of what is loaded
    import sklearn.neighbors
    import sklearn.svm  # noqa: F401
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits  # a requirement of scikit-learn

    inputs = prompts.context[..., :d_x].double().numpy()  # [B, L, d_x]
    labels = np.sign(prompts.context[..., d_x:].sum(dim=-1).numpy())  # [B, L]
    queries = prompts.query[:, :d_x].double().numpy()
    targets = prompts.target.numpy()
    wrong = dict.fromkeys(names, 0)
    with warnings.catch_warnings(), threadpool_limits(1):  # 20 points: threads would only wait for each other
        warnings.simplefilter("ignore", ConvergenceWarning)
        for x, y, query, target in zip(inputs, labels, queries, targets, strict=True):
            for name in names:
                answer = y[0] if (y == y[0]).all() else _learner(name, len(y)).fit(x, y).predict(query[None])[0]
                wrong[name] += int(answer != target)
    return {name: count / len(targets) for name, count in wrong.items()}


def _learner(name: str, examples: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    if name == "logistic":
        return LogisticRegression()
    if name.endswith("SVM"):
        return SVC(kernel="linear" if name == "linear SVM" else "rbf")
    return KNeighborsClassifier(min(int(name[0]), examples))
