"""Real handwritten digits and a judge of generated ones (scikit-learn's 8x8 scans, offline)."""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import interpolate

NUM_FEATURES = 24
FEATURE_CLASSES = tuple(range(8))


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All 1797 scans ``[N, 8, 8]`` in [0, 1] and their labels ``[N]``."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    return images, torch.from_numpy(digits.target).long()


def real_digits(classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The real scans of some classes, ``[N, 3, 8, 8]`` in [0, 1], and their labels ``[N]``."""
    images, labels = _scans()
    kept = torch.isin(labels, torch.tensor(list(classes)))
    return images[kept].unsqueeze(1).repeat(1, 3, 1, 1), labels[kept]


def balanced_digits(classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Equally many real scans of each class, ``[N, 3, 8, 8]``, and their labels ``[N]``.

    The first scans of each class are kept, as many as the rarest class has.
    """
    images, labels = real_digits(classes)
    members = [(labels == label).nonzero().flatten() for label in classes]
    count = min(len(indices) for indices in members)
    kept = torch.cat([indices[:count] for indices in members])
    return images[kept], labels[kept]


def as_pixels(images: Tensor) -> np.ndarray:
    """Grey pixels ``[N, 64]`` in [0, 1] of images ``[N, C, H, W]``, area-averaged to 8x8."""
    grey = images.detach().float().cpu().mean(dim=1, keepdim=True).clamp(0, 1)
    small: np.ndarray = interpolate(grey, size=(8, 8), mode="area").flatten(1).double().numpy()
    return small


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The Frechet distance of two feature sets ``[N, F]`` and ``[M, F]``, each as a Gaussian.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), as in FID (arXiv:1706.08500, eq. 6).
    """
    shift = first.mean(axis=0) - second.mean(axis=0)
    spread = np.cov(first, rowvar=False)
    other_spread = np.cov(second, rowvar=False)
    root = np.real(sqrtm(spread @ other_spread))
    return float(shift @ shift + np.trace(spread + other_spread - 2 * root))


class DigitJudge:
    """Recognizes digits and measures how far generated ones are from real scans.

    The classifier (an SVC over all ten classes) and the features (24 principal components of real
    digits 0 to 7) are fitted when first used. Images are ``[N, C, H, W]`` in [0, 1] of any size.
    """

    @cached_property
    def _classifier(self) -> SVC:
        images, labels = real_digits(range(10))
        return SVC(gamma=0.25, C=10.0).fit(as_pixels(images), labels.numpy())

    @cached_property
    def _features(self) -> PCA:
        images, _ = real_digits(FEATURE_CLASSES)
        return PCA(NUM_FEATURES, random_state=0).fit(as_pixels(images))

    def classify(self, images: Tensor) -> Tensor:
        """The digit seen in each image, ``[N]``, of images ``[N, C, H, W]``."""
        return torch.from_numpy(self._classifier.predict(as_pixels(images))).long()

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images ``[N, C, H, W]`` recognized as their label ``[N]``."""
        return float((self.classify(images) == labels.cpu()).float().mean())

    def frechet(self, images: Tensor, classes: Sequence[int]) -> float:
        """The Frechet distance of images ``[N, C, H, W]`` to equally many scans of each class.

        The images should hold the classes in equal numbers too; 24 features of pixels in [0, 1].
        """
        real, _ = balanced_digits(classes)
        features = self._features.transform
        return frechet_distance(features(as_pixels(images)), features(as_pixels(real)))
