"""How good embeddings are: k nearest neighbours, a linear probe, retrieval. Each by a protocol that others publish by.

The figures go into a card as they are: `tower.save_pretrained(folder, metrics=found.metrics, evaluated_on="digits")`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..reader.errors import ArgumentError, shown
from .neighbours import check_k, nearest_rows, unit_rows
from .stored import StoredEmbeddings

_QUERIES_AT_ONCE = 1024
RECALL_AT = (1, 5, 10)
DINO_NEIGHBOURS = (10, 20, 100, 200)
"""`--nb_knn` of DINOv2's `eval/knn.py`, its temperature below."""
DINO_TEMPERATURE = 0.07
CLIP_STEPS_PER_DECADE = 8
CLIP_DECADES = (-6, 6)
"""Of the regularisation strength: section A.3 of Radford et al., 2021."""
CLIP_ITERATIONS = 1000
VALIDATION_SHARE = 0.2
"""Of the training set, where no validation set is given."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: Name -> figure, as `save_pretrained(metrics=...)` takes them; all in [0, 1].
        protocol: What they depend on.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]


def knn(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    k: Sequence[int] | None = None,
    temperature: float = DINO_TEMPERATURE,
) -> Evaluation:
    """Accuracy of the vote of the k nearest training images, as DINOv2 measures it.

    Embeddings are scaled to length 1; each neighbour votes for its class with weight exp(cosine / temperature).

    Args:
        train: `[N, D]`, array or tensor.
        train_labels: `[N]`, numbers or words.
        test: `[M, D]`.
        test_labels: `[M]`.
        k: Numbers of neighbours; None: those of 10, 20, 100 and 200 that there are.
        temperature: As above.

    Returns:
        `knn_<k>_accuracy` for each k, and `knn_<k>_top5_accuracy` where there are more than five classes.

    Raises:
        ArgumentError: the sets do not fit together.
    """
    sets = _Sets.of(unit_rows("train", train), train_labels, unit_rows("test", test), test_labels)
    most = len(sets.train)
    wanted = [each for each in DINO_NEIGHBOURS if each <= most] or [most] if k is None else sorted(set(k))
    for each in wanted:
        check_k(each, most)
    if not wanted or not temperature > 0:
        raise ArgumentError(f"k={k!r}, temperature={temperature!r}: expected numbers above 0")
    tops = (1, 5) if len(sets.classes) > 5 else (1,)
    right = {(each, top): 0 for each in wanted for top in tops}
    for first in range(0, len(sets.test), _QUERIES_AT_ONCE):
        part = slice(first, first + _QUERIES_AT_ONCE)
        cosines, places = nearest_rows(sets.test[part], sets.train, wanted[-1])
        weights = ((cosines - cosines[:, :1]) / temperature).exp()  # of the nearest: 1, so that none overflows
        for each in wanted:
            votes = torch.zeros(len(cosines), len(sets.classes))
            votes.scatter_add_(1, sets.train_numbers[places[:, :each]], weights[:, :each])
            for top in tops:
                given, chosen = votes.topk(top)
                # a class without a vote is not among the first five by chance
                hit = (chosen == sets.test_numbers[part, None]) & (given > 0)
                right[each, top] += int(hit.any(dim=1).sum())
    names = {1: "knn_{}_accuracy", 5: "knn_{}_top5_accuracy"}
    metrics = {names[top].format(each): count / len(sets.test) for (each, top), count in right.items()}
    return Evaluation(metrics, {"k": wanted, "temperature": temperature, "distance": "cosine", **sets.sizes})


def linear_probe(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    validation: tuple[Any, Any] | None = None,
    max_iter: int = CLIP_ITERATIONS,
    seed: int = 0,
) -> Evaluation:
    """Accuracy of a logistic regression on the embeddings, its regularisation chosen as CLIP's authors do.

    scikit-learn's L-BFGS. The strength is searched on the validation set, among 97 values from 1e-6 to 1e6: every
    second decade first, then in halved steps around the best. The final classifier is fitted on both sets together.

    Args:
        train: `[N, D]`, array or tensor; as given, not scaled.
        train_labels: `[N]`, numbers or words.
        test: `[M, D]`.
        test_labels: `[M]`.
        validation: Embeddings and labels; None: a fifth of each class of the training set.
        max_iter: Of L-BFGS.
        seed: Which fifth.

    Returns:
        `linear_probe_accuracy`; `protocol` has the `strength` that was chosen (1 / C of scikit-learn), the `sweep` and
        whether the final fit has `converged`.

    Raises:
        ArgumentError: the sets do not fit together, or a class is too small to be divided.
        ImportError: scikit-learn is not installed.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    sets = _Sets.of(_rows("train", train), train_labels, _rows("test", test), test_labels)
    x, y = sets.train.numpy(), sets.train_numbers.numpy()
    if len(sets.classes) < 2:
        raise ArgumentError(f"train_labels: only {shown(sets.classes.tolist())}, expected at least two classes")
    if validation is None:
        try:
            parts = train_test_split(x, y, test_size=VALIDATION_SHARE, stratify=y, random_state=seed)
        except ValueError as error:
            raise ArgumentError(f"train: {error}; give a validation set: validation=(embeddings, labels)") from error
        fit_x, validation_x, fit_y, validation_y = parts
    else:
        held = _Sets.of(sets.train, train_labels, _rows("validation", validation[0]), validation[1], "validation")
        fit_x, fit_y, validation_x, validation_y = x, y, held.test.numpy(), held.test_numbers.numpy()
        x, y = np.concatenate([x, validation_x]), np.concatenate([y, validation_y])

    def fitted(features: Any, numbers: Any, step: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it
            return LogisticRegression(C=1 / strength_of(step), max_iter=max_iter).fit(features, numbers)

    accuracy: dict[int, float] = {}

    def accuracy_at(step: int) -> float:
        if step not in accuracy:
            accuracy[step] = float(fitted(fit_x, fit_y, step).score(validation_x, validation_y))
        return accuracy[step]

    best = search_peak(accuracy_at)
    classifier = fitted(x, y, best)
    score = float(classifier.score(sets.test.numpy(), sets.test_numbers.numpy()))
    protocol = {
        "strength": strength_of(best),
        "sweep": {strength_of(step): accuracy[step] for step in sorted(accuracy)},
        "converged": bool(classifier.n_iter_.max() < max_iter),
        **sets.sizes,
    }
    return Evaluation({"linear_probe_accuracy": score}, protocol)


def strength_of(step: int) -> float:
    """The regularisation strength at a step of the sweep, 0 to 96."""
    return float(10 ** (CLIP_DECADES[0] + step / CLIP_STEPS_PER_DECADE))


def search_peak(value: Any) -> int:
    """CLIP's parametric search: the best of every second decade, then twice as fine around the best, and so on.

    Args:
        value: Step -> what is to be large.

    Returns:
        The best step that was looked at; the weakest regularisation of equally good ones.
    """
    last = (CLIP_DECADES[1] - CLIP_DECADES[0]) * CLIP_STEPS_PER_DECADE
    width = 2 * CLIP_STEPS_PER_DECADE
    best: int = min(range(0, last + 1, width), key=lambda step: (-value(step), step))
    while width > 1:
        width //= 2
        around = [step for step in (best - width, best, best + width) if 0 <= step <= last]
        best = min(around, key=lambda step: (-value(step), step))
    return best


def retrieval(
    queries: Any,
    query_labels: Any,
    gallery: Any = None,
    gallery_labels: Any = None,
    *,
    k: Sequence[int] = RECALL_AT,
) -> Evaluation:
    """How high images of the query's class are ranked, by cosine.

    Args:
        queries: `[Q, D]`, array or tensor.
        query_labels: `[Q]`, numbers or words.
        gallery: `[N, D]`; None: every query is looked for among the others.
        gallery_labels: `[N]`.
        k: For recall.

    Returns:
        `retrieval_map`, the mean over queries of the average precision of the whole ranking (equal cosines count as
        one rank, as in scikit-learn), and `retrieval_recall_at_<k>`, the share of queries with at least one image of
        their class among the first k. Queries without any such image in the gallery count in neither; the protocol
        says how many there were.

    Raises:
        ArgumentError: the sets do not fit together, or no query has a match.
    """
    if (gallery is None) != (gallery_labels is None):
        raise ArgumentError("gallery and gallery_labels: give both, or neither")
    alone = gallery is None
    if alone:
        gallery, gallery_labels = queries, query_labels
    rows, vectors = unit_rows("gallery", gallery), unit_rows("queries", queries)
    if vectors.shape[1] != rows.shape[1]:
        raise ArgumentError(f"queries have width {vectors.shape[1]}, the gallery {rows.shape[1]}")
    classes, numbers = np.unique(
        np.concatenate(
            [_labels("gallery_labels", gallery_labels, rows), _labels("query_labels", query_labels, vectors)]
        ),
        return_inverse=True,
    )
    row_numbers, query_numbers = torch.from_numpy(numbers[: len(rows)]), torch.from_numpy(numbers[len(rows) :])
    ranks = len(rows) - alone
    for each in k:
        check_k(each, ranks)
    precisions: list[torch.Tensor] = []
    hits: list[torch.Tensor] = []
    step = max(1, 2**23 // len(rows))
    for first in range(0, len(vectors), step):
        cosines = vectors[first : first + step] @ rows.T
        if alone:
            own = torch.arange(first, first + len(cosines))[:, None]
            cosines.scatter_(1, own, -torch.inf)  # sorted last, and cut off
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        same = row_numbers[order[:, :ranks]] == query_numbers[first : first + step, None]
        matched = same.any(dim=1)
        precisions.append(_average_precision(cosines[matched, :ranks], same[matched]))
        hits.append(same[matched])
    precision, counted = torch.cat(precisions), sum(len(part) for part in hits)
    if not counted:
        raise ArgumentError("query_labels: the gallery has no image of any of these classes")
    metrics = {"retrieval_map": float(precision.mean())}
    for each in k:
        found = sum(int(part[:, :each].any(dim=1).sum()) for part in hits)
        metrics[f"retrieval_recall_at_{each}"] = found / counted
    sizes = {"queries": counted, "gallery": len(rows), "classes": len(classes)}
    return Evaluation(metrics, {**sizes, "queries_without_match": len(vectors) - counted, "distance": "cosine"})


def folder_labels(ids: Sequence[str]) -> list[str]:
    """The class of each image where a folder has one folder for each class, as torchvision's `ImageFolder` has it.

    Args:
        ids: Paths below the folder: `cat/1.jpg` is a `cat`, and so is `cat/indoors/2.jpg`.

    Raises:
        ArgumentError: an image is in no such folder.
    """
    for name in ids:
        if "/" not in name.lstrip("/"):
            raise ArgumentError(f"{shown(name)} is in no folder that could name its class")
    return [name.lstrip("/").partition("/")[0] for name in ids]


def evaluate_folders(test: StoredEmbeddings, train: StoredEmbeddings | None = None) -> dict[str, Evaluation]:
    """Stored embeddings of images in one folder for each class.

    Args:
        test: What is measured.
        train: From the same tower; None: only `retrieval`, within `test`.

    Returns:
        `knn`, `linear_probe` and `retrieval` of the test images among the training images, or `retrieval` alone.

    Raises:
        ArgumentError: images are in no folder, the sets do not fit together, two towers made them, or a run that makes
            them is not at its end.
    """
    for each in (test, train):
        if each is not None and not each.complete:
            raise ArgumentError(f"{each.path}: not all images are embedded yet; embed into it again, which goes on")
    ids, rows = test.load()
    labels = folder_labels(ids)
    if len(set(labels)) < 2 and train is None:
        raise ArgumentError(
            f"{test.path}: {len(ids)} images of the classes {shown(sorted(set(labels)))}, the first folders of their "
            "ids; expected at least two. Embed the folder that has one folder for each class"
        )
    if train is None:
        most = len(ids) - 1
        return {"retrieval": retrieval(rows, labels, k=[k for k in RECALL_AT if k <= most] or [1])}
    if any(test.manifest.get(key) != train.manifest.get(key) for key in ("weights", "preprocessing", "options")):
        raise ArgumentError(f"{test.path} and {train.path} were made by different towers, or with different options")
    train_ids, train_rows = train.load()
    sets = (train_rows, folder_labels(train_ids), rows, labels)
    recalls = [k for k in RECALL_AT if k <= len(train_ids)] or [1]
    return {
        "knn": knn(*sets),
        "linear_probe": linear_probe(*sets),
        "retrieval": retrieval(rows, labels, train_rows, sets[1], k=recalls),
    }


def _average_precision(cosines: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Of rankings `[Q, N]`, cosines descending: the mean of precision at the ranks of what is of the same class."""
    last = torch.searchsorted(-cosines, -cosines, right=True) - 1  # of those with an equal cosine
    ranks = torch.arange(1, same.shape[1] + 1, dtype=torch.float64)
    precision = same.cumsum(dim=1).double() / ranks
    return (precision.gather(1, last) * same).sum(dim=1) / same.sum(dim=1)


@dataclass(frozen=True)
class _Sets:
    """A training and a test set that fit together; labels are numbers of classes of the training set."""

    train: torch.Tensor
    train_numbers: torch.Tensor
    test: torch.Tensor
    test_numbers: torch.Tensor
    classes: Any

    @classmethod
    def of(
        cls, train: torch.Tensor, train_labels: Any, test: torch.Tensor, test_labels: Any, name: str = "test"
    ) -> "_Sets":
        if train.shape[1] != test.shape[1]:
            raise ArgumentError(f"train has width {train.shape[1]}, {name} {test.shape[1]}")
        classes, numbers = np.unique(_labels("train_labels", train_labels, train), return_inverse=True)
        labels = _labels(f"{name}_labels", test_labels, test)
        if unknown := sorted(set(labels.tolist()) - set(classes.tolist()), key=str):
            # counted as wrong they would hide that two sets number their classes differently
            raise ArgumentError(f"{name}_labels: train_labels do not have {shown(unknown)}")
        return cls(train, torch.from_numpy(numbers), test, torch.from_numpy(np.searchsorted(classes, labels)), classes)

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "test": len(self.test), "classes": len(self.classes)}


def _rows(name: str, vectors: Any) -> torch.Tensor:
    unit_rows(name, vectors)
    return torch.as_tensor(vectors).detach().cpu().float()


def _labels(name: str, labels: Any, rows: torch.Tensor) -> Any:
    array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if array.shape != (len(rows),) or array.dtype.kind not in "iuUb":
        raise ArgumentError(
            f"{name}: {list(array.shape)} of {array.dtype}, expected a whole number or word for each of {len(rows)} "
            "images"
        )
    if not len(array):
        raise ArgumentError(f"{name}: there are none")
    # numpy compares signed with unsigned ones as floats, which large ones are not
    return array if array.dtype.kind == "U" else array.astype(np.int64)
