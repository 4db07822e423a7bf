"""How well images match their prompts: cosine in the space of an OpenCLIP model.

Source: CLIP (arXiv:2103.00020), weights of any OpenCLIP architecture, as a file on the disk. Code
is MIT; each set of weights has its own license. Frames are scaled so that the shorter side fits
and cropped to the center, as CLIP's own preprocessing does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffdistill.rewards.images import Fit, ImageReward, load_open_clip, widened
from diffdistill.rewards.loading import local


@dataclass(kw_only=True)
class Clip(ImageReward):
    """Cosine of image and prompt, in [-1, 1]: not multiplied by 100.

    Attributes:
        model: Name of the OpenCLIP architecture. OpenAI's own weights need a ``-quickgelu`` one.
        path: File of its weights, ``.safetensors`` or torch's.
        fit: How frames come to the model's size: ``crop`` scales the shorter side and takes
            the center, ``pad`` scales the longer side and adds black, ``squash`` ignores
            proportions.
    """

    axes: ClassVar[tuple[str, ...]] = ("text",)
    file_wanted: ClassVar = "a file of OpenCLIP weights"

    model: str = "ViT-B-32"
    path: str = ""
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        """Load the model."""
        super().__post_init__()
        file = local(self.path, type(self).__name__, "path", self.file_wanted)
        self.clip = load_open_clip(self.model, file, self, self.weights_dtype)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the cosines ``[N]``."""
        return (self.image_features(images) * self.text_features(prompts)).sum(dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Return unit vectors ``[N, D]``."""
        network, _, preparation = self.clip
        seen = network.encode_image(self.fitted(images, preparation, self.fit))
        return normalize(widened(seen), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors ``[N, D]``; each different prompt is encoded once."""
        network, tokenizer, _ = self.clip
        different = list(dict.fromkeys(prompts))
        with torch.no_grad():
            told = network.encode_text(tokenizer(different).to(self.device))
        return normalize(widened(told), dim=-1)[[different.index(prompt) for prompt in prompts]]
