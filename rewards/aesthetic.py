"""How pleasing images are: a linear head on CLIP's image features.

Source: github.com/christophschuhmann/improved-aesthetic-predictor (license not confirmed), such as
``sac+logos+ava1-l14-linearMSE.pth``: five linear layers in a row, without activations, under the
names ``layers.0``, ``2``, ``4``, ``6`` and ``7``; or one linear layer, as in LAION's first one.
Both see unit vectors of OpenAI's ViT-L/14, whose activation is quick-gelu, and not those of
another CLIP of the same width. Frames are scaled so that the shorter side fits, and cropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from diffdistill.rewards.images import Fit, ImageReward, load_open_clip
from diffdistill.rewards.loading import explained, local, read_weights

LAYERS = ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")


@dataclass(kw_only=True)
class Aesthetic(ImageReward):
    """A rating from 1 to 10; by default 5.5, the middle of the scale, is normalized to 0.

    Attributes:
        model: Name of the OpenCLIP architecture.
        path: File of its weights.
        head: File of the predictor, safetensors or torch's.
        fit: How frames come to the model's size; ``crop`` is the published way.
    """

    axes: ClassVar[tuple[str, ...]] = ("aesthetic",)
    default_statistics: ClassVar[Mapping[str, tuple[float, float]]] = {"aesthetic": (5.5, 1.0)}

    model: str = "ViT-L-14-quickgelu"
    path: str = ""
    head: str = ""
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        """Load the model and the head."""
        super().__post_init__()
        file = local(self.path, "Aesthetic", "path", "a file of OpenAI's ViT-L/14 for OpenCLIP")
        head = local(self.head, "Aesthetic", "head", "a LAION aesthetic predictor (.pth)")
        self.clip = load_open_clip(self.model, file, self, self.weights_dtype)
        self.predictor = self._predictor(read_weights(head, "Aesthetic"))

    def _predictor(self, weights: Mapping[str, Tensor]) -> nn.Sequential:
        """Return the linear layers of a head; it stays in float32."""
        for prefixes in (LAYERS, ("",)):
            names = {p + kind for p in prefixes for kind in ("weight", "bias")}
            if set(weights) == names:
                break
        else:
            raise self.error(
                f"head {self.head}: expected {', '.join(LAYERS)[:-1]} or one linear layer, found "
                f"{', '.join(sorted(weights)[:4]) or 'nothing'}"
            )
        width = int(self.clip.network.visual.output_dim)
        layers = []
        for prefix in prefixes:
            weight = weights[prefix + "weight"].float()
            if weight.ndim != 2 or weight.shape[1] != width:
                raise self.error(
                    f"head {self.head}: {prefix}weight is {list(weight.shape)}, but takes {width} "
                    f"features here; is {self.model} the CLIP it was made for?"
                )
            layer = nn.Linear(width, len(weight))
            state = {"weight": weight, "bias": weights[prefix + "bias"].float()}
            with explained("Aesthetic", f"load head {self.head}"):
                layer.load_state_dict(state)
            layers.append(layer)
            width = len(weight)
        if width != 1:
            raise self.error(f"head {self.head}: it gives {width} numbers, not one")
        return nn.Sequential(*layers).requires_grad_(False).to(self.device)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the ratings ``[N]``; prompts do not matter."""
        pixels = self.fitted(images, self.clip.preparation, self.fit)
        seen = self.clip.network.encode_image(pixels, normalize=True)
        dtype = next(self.predictor.parameters()).dtype
        rating: Tensor = self.predictor(seen.to(dtype))[:, 0]
        return rating
