"""Does a model name and draw handwritten digits? On scikit-learn's digits, with an independent judge."""

import numpy as np

from jaxmm.data.sources import DIGIT_NAMES, Digits
from jaxmm.inference import Pipeline


def evaluate_digits(
    pipeline: Pipeline, *, seed: int = 0, drawings: int = 500, batch_size: int = 100
) -> dict[str, float]:
    """Name every held-out digit, draw all ten, and compare with the real ones.

    Args:
      pipeline: the model.
      seed: of the drawings.
      drawings: how many, shared evenly by the ten digits.
      batch_size: rows that are drawn or read together.

    Returns:
      naming_accuracy: share of held-out images whose greedy description is their caption exactly.
      drawing_accuracy: share of drawings that the judge takes for what was asked.
      judge_accuracy: of the judge (SVC on raw pixels of the training images) on held-out images.
      drawing_variance_ratio, drawing_copies: see `variance_ratio` and `copies`.
      naming_count, drawing_count: how many were judged.
    """
    train, test = Digits("train"), Digits("test")
    texts = pipeline.describe(list(test.images), limit=8, batch_size=batch_size)
    captions = [f"a {DIGIT_NAMES[label]}" for label in test.labels]
    labels = np.repeat(np.arange(10), -(-drawings // 10))
    drawn = pipeline.generate([f"a {DIGIT_NAMES[i]}" for i in labels], seed=seed, batch_size=batch_size)
    judge = make_judge(train)
    return {
        "naming_accuracy": float(np.mean([text == caption for text, caption in zip(texts, captions)])),
        "drawing_accuracy": float(np.mean(judge(drawn) == labels)),
        "judge_accuracy": float(np.mean(judge(test.images) == test.labels)),
        "drawing_variance_ratio": variance_ratio(drawn, labels, train.images, train.labels),
        "drawing_copies": copies(drawn, train.images, test.images),
        "naming_count": len(captions),
        "drawing_count": len(labels),
    }


def make_judge(source: Digits):
    """Images -> labels, by a support vector classifier on the raw pixels of the source."""
    from sklearn.svm import SVC

    classifier = SVC(gamma=0.001).fit(_flat(source.images), source.labels)
    return lambda images: classifier.predict(_flat(images))


def variance_ratio(drawn: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Variance of the pixels within a class, averaged over pixels and classes: of drawings over real images."""
    return _within(_flat(drawn), labels) / _within(_flat(real), real_labels)


def copies(drawn: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> float:
    """Share of drawings nearer to a training image than the first percentile of held-out images is."""
    threshold = np.percentile(_nearest(_flat(held_out), _flat(train)), 1)
    return float(np.mean(_nearest(_flat(drawn), _flat(train)) < threshold))


def _flat(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8, 1] -> [N, 64] on scikit-learn's scale of 0 to 16."""
    return images.reshape(len(images), -1).astype(np.float64) * 16 / 255


def _within(pixels: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([pixels[labels == label].var(axis=0).mean() for label in np.unique(labels)]))


def _nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    squares = (points**2).sum(1)[:, None] + (others**2).sum(1) - 2 * points @ others.T
    return np.sqrt(np.maximum(squares, 0).min(axis=1))
