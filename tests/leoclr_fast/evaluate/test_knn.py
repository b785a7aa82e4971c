"""kNN against scikit-learn, and schedules."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from leoclr_fast.evaluate import knn, linear
from leoclr_fast.evaluate.accuracy import accuracy
from leoclr_fast.evaluate.knn import knn_scores
from leoclr_fast.evaluate.protocols import KnnProtocol, LinearProtocol, TrainingOptions, ViewOptions
from leoclr_fast.schedules import learning_rate


def clusters(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 7, (rows,), generator=generator)
    centres = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(rows, 16, dtype=torch.float64, generator=generator)
    return F.normalize(centres[labels] + 1.5 * noise, dim=1), labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 0.5)])
def test_knn_equals_scikit_learn(k: int, temperature: float) -> None:
    """Cosine neighbours with weights exp(similarity / temperature): every single prediction."""
    bank, bank_labels = clusters(300, 1)
    queries, labels = clusters(200, 2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    )
    theirs.fit(bank.numpy(), bank_labels.numpy())
    predicted = theirs.predict(queries.numpy())
    scores = knn_scores(bank, bank_labels, queries, num_classes=7, k=k, temperature=temperature)
    assert scores.argmax(1).tolist() == predicted.tolist()
    found = accuracy(scores, labels)
    assert found.top1 == pytest.approx(100 * (predicted == labels.numpy()).mean())
    shares = theirs.predict_proba(queries.numpy())
    top5 = np.argsort(-shares, axis=1, kind="stable")[:, :5]
    hits = (top5 == labels.numpy()[:, None]) & (np.take_along_axis(shares, top5, axis=1) > 0)
    assert found.top5 == pytest.approx(100 * hits.any(1).mean(), abs=1.0 if k >= 20 else 1e-9)


def test_knn_by_hand() -> None:
    bank = torch.eye(3, dtype=torch.float64)
    query = F.normalize(torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64), dim=1)
    scores = knn_scores(bank, torch.tensor([0, 1, 0]), query, num_classes=2, k=3, temperature=0.5)
    assert scores[0].tolist() == pytest.approx([math.exp((0.6 - 0.8) / 0.5) + math.exp(-0.8 / 0.5), 1.0])


def test_a_class_without_a_vote_is_no_prediction() -> None:
    """A neighbour each of classes 0, 1 and 2 of 7; the queries are of class 0, of 0 beside a nearer 1, and of 6."""
    bank = torch.eye(3, dtype=torch.float64)
    queries = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    for k, top5 in ((1, 1 / 3), (2, 2 / 3), (3, 2 / 3)):
        scores = knn_scores(bank, torch.arange(3), queries, num_classes=7, k=k, temperature=0.1)
        found = accuracy(scores, torch.tensor([0, 0, 6]))
        assert (found.top1, found.top5) == pytest.approx((100 / 3, 100 * top5))


def test_a_tiny_temperature_is_the_nearest_neighbour() -> None:
    """exp(1 / 0.005) is not a float32, and exp(-0.1 / 0.0005) is 0 in it; the ranking must not notice."""
    bank, bank_labels = clusters(300, 1)
    queries, _ = clusters(200, 2)
    arguments = {"num_classes": 7, "k": 20}
    for temperature in (0.005, 0.0005):
        sharp = knn_scores(bank.float(), bank_labels, queries.float(), temperature=temperature, **arguments).argmax(1)
        exact = knn_scores(bank, bank_labels, queries, temperature=temperature, **arguments).argmax(1)
        assert sharp.tolist() == exact.tolist()
    assert sharp.tolist() == bank_labels[(queries @ bank.mT).argmax(dim=1)].tolist()


def test_cosine_per_epoch_is_mocos() -> None:
    """adjust_learning_rate of facebookresearch/moco: lr *= 0.5 * (1 + cos(pi * epoch / epochs))."""
    for step in (0, 9, 10, 55, 1999):
        epoch = step // 10
        expected = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
        assert learning_rate("cosine_per_epoch", 0.03, step, 10, 200) == pytest.approx(expected, rel=1e-15)


def test_other_schedules() -> None:
    assert learning_rate("constant", 0.03, 77, 10, 20) == 0.03
    assert learning_rate("cosine_per_step", 0.03, 0, 10, 20) == 0.03
    assert learning_rate("cosine_per_step", 0.03, 100, 10, 20) == pytest.approx(0.015)
    assert learning_rate("cosine_per_step", 0.03, 150, 10, 20) == pytest.approx(0.015 * (1 + math.cos(0.75 * math.pi)))


def test_a_class_without_images(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """It is no obstacle: its images in val are wrong. Only what learns classes refuses it."""
    shutil.copytree(tiny_data, tmp_path / "data")
    for image in (tmp_path / "data/train/class1").iterdir():
        image.unlink()
    options = ViewOptions(device="cpu", out=tmp_path / "knn")
    found = knn.run(tiny_run, tmp_path / "data", KnnProtocol(k=3, temperature=0.1), options)
    assert found["note"] == "train has no image of 1 of the 3 classes."
    assert found["top1"] < 100
    with pytest.raises(ValueError, match="has no image of 1 of the 3 classes: class1"):
        linear.run(tiny_run, tmp_path / "data", LinearProtocol(), TrainingOptions(device="cpu"))
