"""Human preference by HPSv2: the cosine of a CLIP-H tuned on people's choices.

Source: HPS v2 (arXiv:2306.09341), github.com/tgxs002/HPSv2, Apache-2.0. The published files
(``HPS_v2_compressed.pt``, ``HPS_v2.1_compressed.pt``) hold the weights of OpenCLIP's ViT-H-14 under
the key ``state_dict``; they are read without running code, and a safetensors copy works as well.
Frames are scaled so that the longer side fits, and padded with black.
"""

from dataclasses import dataclass
from typing import ClassVar

from diffdistill.rewards.clip import Clip
from diffdistill.rewards.images import Fit


@dataclass(kw_only=True)
class HPSv2(Clip):
    """The cosine itself, as the published ``score`` returns it.

    Attributes:
        model: Name of the OpenCLIP architecture.
        path: The published file, or a safetensors copy of its weights.
        fit: How frames come to the model's size; ``pad`` is the published way.
    """

    axes: ClassVar[tuple[str, ...]] = ("preference",)
    file_wanted: ClassVar = (
        "HPS_v2.1_compressed.pt of huggingface.co/xswu/HPSv2, or a safetensors copy"
    )

    model: str = "ViT-H-14"
    fit: Fit = "pad"
