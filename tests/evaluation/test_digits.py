"""The judge of digits, on models whose score is known."""

import numpy as np
import pytest

from jaxmm.data.sources import DIGIT_NAMES, Digits
from jaxmm.errors import InputError
from jaxmm.evaluation import get_benchmark
from jaxmm.evaluation.digits import copies, evaluate_digits, variance_ratio

TRAIN, TEST = Digits("train"), Digits("test")


class Known:
    """Answers with images and captions that are given; every tenth name is wrong."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def describe(self, images, **_):
        truth = {image.tobytes(): label for image, label in zip(TEST.images, TEST.labels)}
        names = [f"a {DIGIT_NAMES[truth[image.tobytes()]]}" for image in images]
        return [name if i % 10 else "a" for i, name in enumerate(names)]

    def generate(self, prompts, *, seed, **_):
        rng = np.random.default_rng(seed)
        wanted = [DIGIT_NAMES.index(prompt.split()[1]) for prompt in prompts]
        return np.stack([self.images[rng.choice(np.flatnonzero(self.labels == digit))] for digit in wanted])


def test_real_held_out_images_pass():
    report = evaluate_digits(Known(TEST.images, TEST.labels), drawings=200)
    assert report["naming_accuracy"] == pytest.approx(0.9)
    assert report["drawing_accuracy"] > 0.95 and report["judge_accuracy"] == pytest.approx(356 / 360)
    assert report["drawing_variance_ratio"] == pytest.approx(1.0, abs=0.15)
    assert report["drawing_copies"] < 0.05
    assert (report["naming_count"], report["drawing_count"]) == (360, 200)


def test_memorised_images_are_copies():
    report = evaluate_digits(Known(TRAIN.images, TRAIN.labels), drawings=50)
    assert report["drawing_copies"] == 1.0 and report["drawing_accuracy"] == 1.0


def test_one_image_per_class_has_no_variance():
    first = np.array([np.flatnonzero(TEST.labels == digit)[0] for digit in range(10)])
    report = evaluate_digits(Known(TEST.images[first], TEST.labels[first]), drawings=50)
    assert report["drawing_variance_ratio"] < 1e-12


def test_variance_ratio_by_hand():
    real = np.array([0, 2, 10, 14], np.uint8).reshape(4, 1, 1, 1)
    drawn = np.array([0, 1, 10, 12], np.uint8).reshape(4, 1, 1, 1)
    labels = np.array([0, 0, 1, 1])
    assert variance_ratio(drawn, labels, real, labels) == pytest.approx((0.25 + 1) / (1 + 4))


def test_copies_by_hand():
    train = np.array([0, 100], np.uint8).reshape(2, 1, 1, 1)
    held_out = np.array([10, 120], np.uint8).reshape(2, 1, 1, 1)  # nearest distances 10 and 20: first percentile 10.1
    drawn = np.array([5, 110, 90, 130], np.uint8).reshape(4, 1, 1, 1)
    assert copies(drawn, train, held_out) == 0.75


def test_unknown_benchmark_is_named():
    with pytest.raises(InputError, match="did you mean 'digits'"):
        get_benchmark("digit")
