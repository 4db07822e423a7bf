"""Families whose network is a causal LM of transformers: how it is found, checked and loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn
from transformers import AutoModelForCausalLM

from diffdistill.errors import UserError
from diffdistill.pipelines import loading, remote_code
from diffdistill.pipelines.block_diffusion import Attention
from diffdistill.pipelines.loading import DtypeName
from diffdistill.pipelines.token_family import TokenFamily


@dataclass(kw_only=True)
class NetworkFamily(TokenFamily):
    """A family of language models on networks of transformers.

    Attributes:
        dtype: Type of all weights; ``auto`` is bf16 on CUDA and fp32 elsewhere.
        quantize: Storage of a frozen network: ``nf4`` or ``int8`` (bitsandbytes).
        attention: ``sdpa`` everywhere; ``flex_attention`` skips what a block mask hides, on a GPU,
            with rows of multiples of 64 tokens; ``eager`` to look into it.
    """

    dtype: DtypeName = "auto"
    quantize: Literal["none", "nf4", "int8"] = "none"
    attention: Attention = "sdpa"

    adapter_targets: ClassVar[tuple[str, ...]] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Choose the type of the weights."""
        self.weights_dtype = loading.resolve_dtype(self.dtype, self.device)

    def network(self, path: str | None = None) -> nn.Module:
        """Return a freshly loaded network, of this family's checkpoint or of ``path``.

        Raises:
            UserError: If there is none, or it is another kind of model, or has another tokenizer.
        """
        folder = self.folder_of(path)
        if path is not None:
            self._check_tokenizer(folder)
        network = self._load(folder)
        self._check_network(network, folder)
        return loading.place(network, self.device, self.weights_dtype, self.quantize)

    def folder_of(self, path: str | None) -> Path:
        """Return the local folder of ``path``, or of this family's checkpoint."""
        return self._locate(path, None) if path else self.folder

    def _check_network(self, network: Any, folder: Path) -> None:
        """Refuse a network that does not go with the family; most do.

        Raises:
            UserError: If it does not.
        """

    def _load(self, folder: Path) -> Any:
        """Return the network in a folder."""
        remote_code.check_trusted(folder, self.trust_remote_code)
        kinds = loading.read_config(folder).get("architectures") or ["none"]
        if not self.trust_remote_code and not any(k.endswith("ForCausalLM") for k in kinds):
            raise UserError(
                f"{folder}: needs a causal language model (...ForCausalLM), found "
                f"{', '.join(kinds)}"
            )
        options = self._load_options() | {"trust_remote_code": self.trust_remote_code}
        with remote_code.explained(folder):
            return loading.load_frozen(AutoModelForCausalLM, folder, options)

    def _load_options(self) -> dict[str, Any]:
        """Return how transformers is to load the network."""
        options: dict[str, Any] = {
            "dtype": self.weights_dtype,
            "attn_implementation": self.attention,
        }
        stored = loading.bitsandbytes_config(self.quantize, self.weights_dtype, "transformers")
        return options if stored is None else options | {"quantization_config": stored}

    def _check_tokenizer(self, folder: Path) -> None:
        """Refuse weights that go with other tokens."""
        if not (folder / "tokenizer.json").is_file():
            return
        other = loading.load_tokenizer(folder, self.trust_remote_code)
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{folder} has another tokenizer than {self.path}: give that role a family of its "
                "own, roles.NAME.family: {name: ..., path: ...}"
            )
