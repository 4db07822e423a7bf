"""Human preference by PickScore: a CLIP-H tuned on Pick-a-Pic.

Source: arXiv:2305.01569, github.com/yuvalkirstain/PickScore, MIT (code). The weights are a
transformers CLIPModel folder, ``yuvalkirstain/PickScore_v1``; its tokenizer and preprocessing are
those of ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``: the shorter side is scaled to fit, and the
center cropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from diffdistill.rewards.images import Fit, ImageReward, Preparation, widened
from diffdistill.rewards.loading import explained, local

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(kw_only=True)
class PickScore(ImageReward):
    """``exp(logit_scale)`` times the cosine of image and prompt, around 20.

    By default it is normalized by 26, as FastVideo and DiffusionNFT do.

    Attributes:
        path: Folder of the CLIPModel, with safetensors weights.
        tokenizer_path: Folder of its tokenizer; empty takes ``path``.
        fit: How frames come to the model's size; ``crop`` is the published way.
    """

    axes: ClassVar[tuple[str, ...]] = ("preference",)
    default_statistics: ClassVar[Mapping[str, tuple[float, float]]] = {"preference": (0.0, 26.0)}

    path: str = ""
    tokenizer_path: str = ""
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        """Load model and tokenizer."""
        super().__post_init__()
        folder = local(self.path, "PickScore", "path", "a folder of yuvalkirstain/PickScore_v1")
        self.network = self._load(str(folder))
        side = self.network.config.vision_config.image_size
        self.preparation = Preparation((side, side), CLIP_MEAN, CLIP_STD)
        words = local(
            self.tokenizer_path or self.path,
            "PickScore",
            "tokenizer_path",
            "a folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        )
        self.tokenizer = self._load_tokenizer(str(words))

    def _load(self, folder: str) -> Any:
        from transformers import CLIPModel

        with explained("PickScore", f"load {folder} as a CLIPModel"):
            network, info = CLIPModel.from_pretrained(
                folder,
                dtype=self.weights_dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        if missing := sorted(info["missing_keys"]):
            raise self.error(
                f"{folder}: {len(missing)} weights are missing, such as {missing[0]}; "
                "it should be a CLIPModel"
            )
        return network.requires_grad_(False).eval().to(self.device)

    def _load_tokenizer(self, folder: str) -> Any:
        from transformers import AutoTokenizer

        with explained("PickScore", f"load the tokenizer in {folder} (see tokenizer_path)"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def score_images(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the scaled cosines ``[N]``."""
        pixels = self.fitted(images, self.preparation, self.fit)
        seen = self.network.get_image_features(pixel_values=pixels).pooler_output
        cosine = (normalize(widened(seen), dim=-1) * self._text_features(prompts)).sum(dim=-1)
        return widened(self.network.logit_scale).exp() * cosine

    @torch.no_grad()
    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        different = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            different,
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        told = self.network.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return normalize(widened(told), dim=-1)[[different.index(prompt) for prompt in prompts]]
