"""Evaluation protocols against independent implementations on the same features."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from hf_timm_tower import ArgumentError, TimmModel
from hf_timm_tower.embedding.evaluation import (
    evaluate_folders,
    folder_labels,
    knn,
    linear_probe,
    retrieval,
    search_peak,
    strength_of,
)
from hf_timm_tower.embedding.stored import StoredEmbeddings


@dataclass(frozen=True)
class Digits:
    """Embeddings of scikit-learn's digits by a tower that was trained on the training set for a moment."""

    tower: TimmModel
    train: torch.Tensor
    train_labels: np.ndarray
    test: torch.Tensor
    test_labels: np.ndarray


@pytest.fixture(scope="module")
def digits() -> Digits:
    torch.manual_seed(0)
    table = load_digits()
    images = [Image.fromarray((image * 15).astype(np.uint8)).convert("RGB") for image in table.images[:900]]
    labels = torch.from_numpy(table.target[:900])
    tower = TimmModel("test_resnet", embed_dim=16, image_size=32)
    pixels = torch.stack([tower.transform()(image) for image in images[:600]])
    classifier = torch.nn.Linear(16, 10)
    optimizer = torch.optim.AdamW([*tower.parameters(), *classifier.parameters()], lr=3e-3)
    tower.train()
    for _ in range(30):
        rows = torch.randperm(600)[:64]
        optimizer.zero_grad()
        F.cross_entropy(classifier(tower(pixels[rows])), labels[rows]).backward()
        optimizer.step()
    embeddings = tower.eval().embed(images, batch_size=32, num_workers=0, progress=False)
    numbers = labels.numpy()
    return Digits(tower, embeddings[:600], numbers[:600], embeddings[600:], numbers[600:])


def test_knn_is_the_weighted_vote_of_sklearns_nearest_neighbours(digits: Digits) -> None:
    found = knn(digits.train, digits.train_labels, digits.test, digits.test_labels)
    assert found.protocol["k"] == [10, 20, 100, 200], "DINOv2's, as the training set has them all"
    assert 0.5 < found.metrics["knn_10_accuracy"] < 1, "the tower has learnt, and not all"
    for k in found.protocol["k"]:
        peer = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        peer.fit(digits.train.double().numpy(), digits.train_labels)
        chances = peer.predict_proba(digits.test.double().numpy())
        assert found.metrics[f"knn_{k}_accuracy"] == np.mean(chances.argmax(1) == digits.test_labels)
        first = np.where(chances > 0, -chances, np.inf).argsort(1)[:, :5]
        hits = (first == digits.test_labels[:, None]) & (np.take_along_axis(chances, first, 1) > 0)
        assert found.metrics[f"knn_{k}_top5_accuracy"] == np.mean(hits.any(1))


def test_labels_may_be_words_and_their_order_does_not_matter(digits: Digits) -> None:
    words = np.array("zero one two three four five six seven eight nine".split())
    numbered = knn(digits.train, digits.train_labels, digits.test, digits.test_labels, k=[5])
    named = knn(digits.train, words[digits.train_labels], digits.test, list(words[digits.test_labels]), k=[5])
    assert named.metrics == numbered.metrics


def test_the_probe_is_a_logistic_regression_with_clips_sweep(digits: Digits) -> None:
    validation = (digits.train[450:], digits.train_labels[450:])
    train, labels = digits.train[:450], digits.train_labels[:450]
    found = linear_probe(train, labels, digits.test, digits.test_labels, validation=validation)
    assert found.protocol["converged"] is True
    strength, sweep = found.protocol["strength"], found.protocol["sweep"]
    assert {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6} <= set(sweep), "every second decade"
    assert sweep[strength] == max(sweep.values())
    for step in (-1, 1):
        assert strength_of(round(8 * (np.log10(strength) + 6)) + step) in sweep, "as fine as 8 steps per decade"
    # Each point of the sweep, and the final fit on both sets, by another optimiser and another implementation.
    for each in (1e-2, strength, 1e2):
        assert sweep[each] == pytest.approx(_probe_of_torch(train, labels, *validation, each), abs=0.01)
    both = _probe_of_torch(digits.train, digits.train_labels, digits.test, digits.test_labels, strength)
    assert found.metrics["linear_probe_accuracy"] == pytest.approx(both, abs=0.01)
    plain = LogisticRegression(C=1 / strength, max_iter=1000).fit(digits.train.numpy(), digits.train_labels)
    assert found.metrics["linear_probe_accuracy"] == plain.score(digits.test.numpy(), digits.test_labels)


def _probe_of_torch(train: torch.Tensor, labels: np.ndarray, test: torch.Tensor, truth: np.ndarray, l2: float) -> float:
    """Accuracy of multinomial logistic regression: summed cross entropy + l2 / 2 * |W|^2, in float64."""
    x, y = train.double(), torch.from_numpy(labels)
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in ((10, x.shape[1]), (10,)))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y, reduction="sum") + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(np.mean((test.double() @ weight.T + bias).argmax(1).numpy() == truth))


def test_without_a_validation_set_a_fifth_of_each_class_is_one(digits: Digits) -> None:
    found = linear_probe(digits.train, digits.train_labels, digits.test, digits.test_labels)
    scores = np.array(list(found.protocol["sweep"].values())) * 120
    assert np.allclose(scores, scores.round()), "shares of 120 images, a fifth of 600"
    assert 0.5 < found.metrics["linear_probe_accuracy"] <= 1
    with pytest.raises(ArgumentError, match="validation="):
        linear_probe(torch.rand(3, 2), ["a", "a", "b"], torch.rand(1, 2), ["a"])


@pytest.mark.parametrize("peak", [0, 1, 17, 50, 95, 96])
def test_the_search_finds_a_single_peak_with_few_fits(peak: int) -> None:
    looked: list[int] = []

    def value(step: int) -> float:
        looked.append(step)
        return -abs(step - peak)

    assert search_peak(value) == peak
    assert len(set(looked)) <= 7 + 4 * 2


def test_retrieval_is_sklearns_average_precision_and_its_nearest_neighbours(digits: Digits) -> None:
    found = retrieval(digits.test, digits.test_labels, digits.train, digits.train_labels, k=(1, 5))
    unit = [F.normalize(rows.double(), dim=1).numpy() for rows in (digits.test, digits.train)]
    cosines = unit[0] @ unit[1].T
    precisions = [
        average_precision_score(digits.train_labels == label, row)
        for label, row in zip(digits.test_labels, cosines, strict=True)
    ]
    # in float32 two that are as near as another may change places
    assert found.metrics["retrieval_map"] == pytest.approx(np.mean(precisions), abs=1e-5)
    peer = NearestNeighbors(n_neighbors=5, metric="cosine").fit(digits.train.double().numpy())
    near = digits.train_labels[peer.kneighbors(digits.test.double().numpy(), return_distance=False)]
    for k in (1, 5):
        assert found.metrics[f"retrieval_recall_at_{k}"] == np.mean(
            (near[:, :k] == digits.test_labels[:, None]).any(axis=1)
        )


def test_a_query_is_not_found_by_itself_and_equal_images_share_a_rank() -> None:
    # Rows 0 and 1 are equal and of different classes: for row 2 they have one rank, whatever stands first.
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    labels = np.array(["a", "b", "a", "c"])
    for order in ([0, 1, 2, 3], [1, 0, 2, 3]):
        found = retrieval(rows[order], labels[order], k=(1, 2))
        others = [[1, 2, 3], [0, 1, 3]]  # what rows 0 and 2, the queries that have a match, are compared with
        precisions = [
            average_precision_score(labels[each] == "a", (rows[each] @ rows[query]).numpy())
            for query, each in zip((0, 2), others, strict=True)
        ]
        assert found.metrics["retrieval_map"] == pytest.approx(np.mean(precisions))
        assert found.metrics["retrieval_recall_at_2"] == 1
        assert found.protocol["queries_without_match"] == 2


def test_results_stand_in_the_cards_table_and_model_index(digits: Digits, tmp_path: Path) -> None:
    found = knn(digits.train, digits.train_labels, digits.test, digits.test_labels, k=[20])
    digits.tower.save_pretrained(tmp_path, metrics=found.metrics, evaluated_on="digits")
    card = ModelCard.load(tmp_path / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == found.metrics
    assert {result.dataset_type for result in card.data.eval_results} == {"digits"}
    assert f"{found.metrics['knn_20_accuracy']} |" in card.text


def test_the_class_of_an_image_is_the_first_folder_of_its_path() -> None:
    assert folder_labels(["cat/1.jpg", "dog/indoors/2.jpg"]) == ["cat", "dog"]
    with pytest.raises(ArgumentError, match=r"'3.jpg' is in no folder"):
        folder_labels(["cat/1.jpg", "3.jpg"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.rand(4, 3, 2)}, r"train: \[4, 3, 2\]"),
        ({"train": torch.ones(4, 3, dtype=torch.int64)}, "of torch.int64, expected one vector of floats"),
        ({"test": torch.tensor([[0.1, torch.nan, 0.2]])}, r"test\[0\] holds a number that is not finite"),
        ({"test": torch.rand(1, 2)}, "train has width 3, test 2"),
        ({"train_labels": [0, 1, 1]}, r"train_labels: \[3\] of int64"),
        ({"train_labels": [0.5, 1, 1, 0]}, "train_labels: .* expected a whole number or word"),
        ({"test_labels": [7]}, r"test_labels: train_labels do not have \[7\]"),
        ({"test_labels": ["0"]}, r"test_labels: train_labels do not have \['0'\]"),
        ({"k": [5]}, "k=5: expected a whole number from 1 to 4"),
        ({"temperature": 0}, "temperature=0"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(change: dict[str, object], message: str) -> None:
    given = {
        "train": torch.rand(4, 3), "train_labels": [0, 1, 1, 0], "test": torch.rand(1, 3), "test_labels": [1], "k": [1],
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=message):
        knn(**{**given, **change})


def test_retrieval_without_any_match_is_refused() -> None:
    with pytest.raises(ArgumentError, match="no image of any of these classes"):
        retrieval(torch.rand(2, 3), ["a", "b"], torch.rand(2, 3), ["c", "d"], k=(1,))
    with pytest.raises(ArgumentError, match="give both, or neither"):
        retrieval(torch.rand(2, 3), ["a", "b"], torch.rand(2, 3), k=(1,))


def test_a_list_of_paths_from_one_place_is_no_set_of_classes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    paths = [tmp_path / name / "1.png" for name in ("cat", "dog", "owl")]
    for path in paths:
        path.parent.mkdir()
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    tower = TimmModel("test_resnet", embed_dim=8)
    stored = tower.embed_to(paths, tmp_path / "emb", num_workers=0, progress=False)
    with pytest.raises(ArgumentError, match=r"expected at least two\. Embed the folder"):
        evaluate_folders(stored)  # it was a mean average precision of 1


def test_a_folder_that_is_not_complete_is_not_measured(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)

    def breaks_off() -> Iterator[dict[str, object]]:
        for number in range(16):
            pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            yield {"id": f"{number % 2}/{number}.png", "image": pixels}
        raise TimeoutError

    tower = TimmModel("test_resnet", embed_dim=8)
    with pytest.raises(TimeoutError):
        tower.embed_to(breaks_off(), tmp_path / "emb", num_workers=0, progress=False, rows_per_shard=8)
    stored = StoredEmbeddings(tmp_path / "emb")
    assert len(stored) == 16
    with pytest.raises(ArgumentError, match="not all images are embedded yet"):
        evaluate_folders(stored)


def test_stored_folders_of_classes_are_evaluated_as_their_embeddings_are(digits: Digits, tmp_path: Path) -> None:
    table, stored = load_digits(), []
    for name, rows in (("train", range(60)), ("test", range(60, 80))):
        for row in rows:
            path = tmp_path / name / str(table.target[row]) / f"{row:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((table.images[row] * 15).astype(np.uint8)).save(path)
        stored.append(digits.tower.embed_to(tmp_path / name, tmp_path / f"{name}.emb", num_workers=0, progress=False))
    train, test = stored
    found = evaluate_folders(test, train)
    sets = [part for each in (train, test) for part in (each.load()[1], [name[0] for name in each.load()[0]])]
    assert found["knn"] == knn(*sets)
    assert found["linear_probe"] == linear_probe(*sets)
    assert found["retrieval"] == retrieval(*sets[2:], *sets[:2])
    assert evaluate_folders(test)["retrieval"] == retrieval(*sets[2:])
    other = digits.tower.embed_to(tmp_path / "train", tmp_path / "other.emb", normalize=True, num_workers=0)
    with pytest.raises(ArgumentError, match="different towers, or with different options"):
        evaluate_folders(test, other)


def test_large_numbers_of_classes_are_told_apart_whatever_their_type() -> None:
    rows, labels = torch.eye(4), np.arange(2**60, 2**60 + 4)
    found = retrieval(rows, labels, rows.roll(1, 0), labels.astype(np.uint64), k=[1])
    assert found.metrics["retrieval_recall_at_1"] == 0
    assert knn(rows, labels, rows, labels.astype(np.uint64), k=[1]).metrics["knn_1_accuracy"] == 1


@pytest.mark.parametrize("vectors", [None, "abc", [[1.0], [1.0, 2.0]]])
def test_what_are_no_vectors_is_refused(vectors: object) -> None:
    with pytest.raises(ArgumentError, match="train: expected one vector of floats for each image"):
        knn(vectors, [0, 1], torch.eye(2), [0, 1])
