"""The family ``vlm``: models of transformers that read pictures and write text."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
)

from diffdistill.errors import UserError
from diffdistill.pipelines import loading, remote_code
from diffdistill.pipelines.answers import is_one_of
from diffdistill.pipelines.block_diffusion import headed
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.causal_sampling import positions_in
from diffdistill.pipelines.chats import Messages
from diffdistill.pipelines.sharding import last_hidden
from diffdistill.pipelines.three_parts import encoded, fed, parts_of
from diffdistill.projection import Projection
from diffdistill.sights import Sight
from diffdistill.types import Condition, State

MARK = "diffdistill"
"""Stands for an answer where the template is looked at."""


@dataclass(kw_only=True)
class VLM(CausalLM):
    """Any image-text-to-text model of transformers, with its processor.

    Attributes:
        encoder: The end of the name of the vision encoder's module; to switch it.
        projector: The same of the module between it and the language model: its first input are
            the features that are switched.
    """

    encoder: str = "vision_tower"
    projector: str = "multi_modal_projector"

    @cached_property
    def processor(self) -> Any:
        """The processor of transformers: template, tokenizer and image processor in one.

        Raises:
            UserError: If it is missing or broken, or has no chat template.
        """
        processor = self._processor_of(self.folder)
        if self.chat_template is not None:
            processor.chat_template = self.tokenizer.chat_template
        if not processor.chat_template:
            raise UserError(f"{self.path}: its processor has no chat template: set "
                            "family.chat_template")  # fmt: skip
        return processor

    def _processor_of(self, folder: Path) -> Any:
        with loading.explained(f"load the processor in {folder}"):
            return AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=self.trust_remote_code
            )

    @cached_property
    def turn_ends(self) -> list[int]:
        """Ids of the special tokens that the template ends an assistant's turn with."""
        turn = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "a"), ("assistant", MARK))
        ]
        text: str = self.processor.apply_chat_template(turn, tokenize=False)
        tail = text.rpartition(MARK)[2]
        tokens = self.tokenizer.encode(tail, add_special_tokens=False)
        return [token for token in tokens if token in self.tokenizer.all_special_ids][:1]

    # prompts

    def rendered(self, messages: Messages, num_pictures: int, *, thinking: bool | None) -> str:
        """Return a chat as the template writes it, up to where the answer begins.

        Pictures come before the text of the last message.

        Raises:
            UserError: If the template refuses the chat.
        """
        chat = [
            {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}
            for m in messages
        ]
        chat[-1]["content"] = [{"type": "image"}] * num_pictures + list(chat[-1]["content"])
        told: Mapping[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text: str = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, **told
            )
        except Exception as error:  # templates raise what they like
            raise UserError(
                f"the chat template of {self.path} refused a chat of roles "
                f"{[m['role'] for m in messages]}: {' '.join(str(error).split())}"
            ) from None
        return text

    def read(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Any]:
        """Return what a network is told of chats with pictures.

        That is ``prompt`` and ``pads`` (see ``prompts.prompt_condition``), where each picture has
        as many tokens as it has places, and ``seen``: all else that the processor makes of them.

        Raises:
            UserError: If the processor refuses them.
        """
        start = self.tokenizer.bos_token
        written = start is not None and all(text.startswith(start) for text in texts)
        with loading.explained(f"read pictures with the processor of {self.path}"):
            made = self.processor(
                text=list(texts),
                images=[list(row) for row in pictures] if any(pictures) else None,
                padding=True,
                padding_side="left",
                add_special_tokens=not written,
                return_tensors="pt",
            )
        found = dict(made.to(self.device))
        seen = found.pop("attention_mask")
        return {
            "prompt": found.pop("input_ids"),
            "pads": (1 - seen).sum(1),
            "seen": found,
        }

    @cached_property
    def placeholders(self) -> list[int]:
        """Ids of the tokens that stand for pictures, videos and sounds in a prompt.

        transformers counts them in whole rows, so an answer must not have any.
        """
        config, kinds = loading.read_config(self.folder), ("image", "video", "audio")
        names = [f"{kind}_token_{key}" for kind in kinds for key in ("id", "index")]
        found = [config.get(name) for name in names]
        found += [getattr(self.processor, name, None) for name in names]
        return sorted({t for t in found if isinstance(t, int) and 0 <= t < self.words})

    # what roles ask

    def predict(self, network: nn.Module, state: State, condition: Condition) -> Projection:
        """Return logits ``[B, A, V]``: see ``CausalLM.predict``.

        Where a given solution has a token that stands for a picture, it is read as a pad token.
        """
        pictured = is_one_of(state.x, self.placeholders)
        read = state._replace(x=state.x.masked_fill(pictured, self.pad_id))
        return super().predict(network, read, condition)

    def told_besides(self, network: nn.Module, condition: Condition) -> dict[str, Any]:
        """Return what the processor made of pictures, in the network's type."""
        kind = loading.input_dtype(network)
        return {
            name: value.to(kind)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in condition.get("seen", {}).items()
        }

    def projected(
        self, network: nn.Module, tokens: Tensor, pads: Tensor, condition: Condition
    ) -> Projection:
        """Return logits ``[B, L, V]`` at all tokens ``[B, L]``, before the output head.

        Positions are the network's own, for pictures may have two. Where the condition has a
        ``sight``, the encoder is not asked.
        """
        sight: Sight | None = condition.get("sight")
        parts = None if sight is None else parts_of(network, self.encoder, self.projector)
        with nullcontext() if parts is None or sight is None else fed(parts, sight):
            hidden = last_hidden(network, self._inputs(network, tokens, pads, condition))
        return headed(network, hidden)

    def _inputs(
        self, network: nn.Module, tokens: Tensor, pads: Tensor, condition: Condition
    ) -> dict[str, Any]:
        """Return the arguments of a call; what there is one of for each token is filled up."""
        shape = condition["prompt"].shape if "prompt" in condition else None
        more = {
            name: pad(value, (0, tokens.shape[1] - value.shape[1]))
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for name, value in self.told_besides(network, condition).items()
        }
        seen = positions_in(tokens) >= pads[:, None]
        return {
            "input_ids": tokens,
            "attention_mask": seen.long(),
            "use_cache": False,
            **more,
        }

    def look(self, network: nn.Module, condition: Condition) -> Sight:
        """Return what the vision encoder makes of the pictures; see ``three_parts.encoded``.

        Raises:
            UserError: If there are no pictures, or no such parts.
        """
        parts = parts_of(network, self.encoder, self.projector)
        inputs = self._inputs(network, condition["prompt"], condition["pads"], condition)
        return encoded(parts, lambda: last_hidden(network, inputs))

    # loading

    def _load(self, folder: Path) -> Any:
        remote_code.check_trusted(folder, self.trust_remote_code)
        config = loading.read_config(folder)
        if not self.trust_remote_code and config.get("model_type") not in KNOWN:
            kinds = ", ".join(config.get("architectures") or ["none"])
            raise UserError(
                f"{folder}: needs an image-text-to-text model, found {kinds}; for text alone use "
                "the family causal-lm"
            )
        options = self._load_options() | {"trust_remote_code": self.trust_remote_code}
        with remote_code.explained(folder):
            return loading.load_frozen(AutoModelForImageTextToText, folder, options)

    def _check_tokenizer(self, folder: Path) -> None:
        """Refuse weights that go with other tokens, or other pictures."""
        super()._check_tokenizer(folder)
        if not (folder / "processor_config.json").is_file():
            return
        if self._processor_of(folder).to_dict() != self._processor_of(self.folder).to_dict():
            raise UserError(
                f"{folder} has another processor than {self.path}: give that role a family of its "
                "own, roles.NAME.family: {name: vlm, path: ...}"
            )

    def save_reader(self, folder: Path) -> None:
        """Write the processor, with its tokenizer, beside exported weights."""
        self.processor.save_pretrained(str(folder))
