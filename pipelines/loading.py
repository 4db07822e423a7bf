"""Finding, validating and loading the parts of a diffusers checkpoint, from safetensors only."""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from diffdistill.errors import MissingExtra, UserError

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
Quantization = Literal["none", "nf4", "int8", "fp8"]
Attention = Literal["auto", "sdpa", "flash", "xformers"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")
LICENSES = ("LICENSE", "LICENSE.md", "LICENSE.txt")
TERMS = ("README.md", *LICENSES)
QUERY_KEY_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
SCALED = (".scale_weight", ".weight_scale", "scaled_fp8")


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the type of that name; ``auto`` is bf16 on CUDA and fp32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


@contextmanager
def explained(task: str) -> Iterator[None]:
    """Turn what the libraries raise about files within the block into one ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        detail = " ".join(str(error).split())[:400]
        raise UserError(f"cannot {task}: {type(error).__name__}: {detail}") from error


def locate(path: str, part: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Return the local folder of one part of a checkpoint, downloaded if ``path`` is a hub id.

    Args:
        path: A folder in the diffusers layout, or a hub id.
        part: The name of the part's folder; "" is the checkpoint itself.
        revision: Branch, tag or commit on the hub.
        code: Whether to download the checkpoint's own code too.

    Raises:
        UserError: If it is not there, or ``path`` is empty.
    """
    _check_given(path)
    root = Path(path).expanduser()
    if not root.is_dir():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is None:
            raise UserError(f"{path!r} is neither a folder nor a hub id such as 'owner/name'")
        root = _download(path, part, revision, (*FILES, "*.py") if code else FILES)
    folder = root / part
    if not folder.is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
        raise UserError(f"{path}: no folder {part!r} in this checkpoint; found {found}")
    return folder


def _check_given(path: str) -> None:
    """Refuse an empty path, which would be the working directory."""
    if not path:
        raise UserError(
            "family.path is missing: set it to a folder, or to a hub id such as 'owner/name'"
        )


def _download(path: str, part: str, revision: str | None, files: Sequence[str]) -> Path:
    patterns = [f"{part}/{p}" if part else p for p in files]
    with explained(f"find {path!r} (no such folder here, so it was taken for a hub id)"):
        found = snapshot_download(
            path, revision=revision, allow_patterns=[*patterns, "model_index.json", *TERMS]
        )
    return Path(found)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a JSON file of a part's folder.

    Raises:
        UserError: If it is missing or not JSON.
    """
    with explained(f"read {folder / name}"):
        config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def transformer_folder(path: str, revision: str | None = None) -> Path:
    """Return the folder of a transformer: ``path`` itself, or its ``transformer`` part.

    Raises:
        UserError: If it is not there, or ``path`` is empty.
    """
    _check_given(path)
    root = Path(path).expanduser()
    return root if (root / "config.json").is_file() else locate(path, "transformer", revision)


def load_transformer(
    kind: type, folder: Path, *, dtype: torch.dtype, quantize: Quantization = "none"
) -> Any:
    """Return the network in ``folder``, on the CPU unless bitsandbytes places it.

    Raises:
        UserError: If the folder holds another model, or not all of this one.
    """
    check_class(folder, kind)
    with explained(f"load the transformer in {folder}"):
        network, info = kind.from_pretrained(  # type: ignore[attr-defined]
            str(folder),
            torch_dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=bitsandbytes_config(quantize, dtype, "diffusers"),
        )
    _check_complete(info["missing_keys"], folder)
    return network


def load_single_file(
    kind: type, file: str, folder: Path, *, dtype: torch.dtype, quantize: Quantization = "none"
) -> Any:
    """Return the network of one ``.safetensors`` file in the original or ComfyUI key layout.

    Args:
        kind: The network's class.
        file: The file.
        folder: Where the network's ``config.json`` is.
        dtype: Type of the weights.
        quantize: How to store them.

    Raises:
        UserError: If the file is missing, not safetensors, or of another model.
    """
    check_class(folder, kind)
    with explained(f"load the transformer in {file}"):
        state = _without_prefix(load_file(Path(file).expanduser()))
        scaled = [key for key in state if key.endswith(SCALED)]
        if scaled:
            raise UserError(f"{file}: scaled fp8 weights ({scaled[0]}) are not supported")
        network = kind.from_single_file(  # type: ignore[attr-defined]
            state,
            config=str(folder),
            torch_dtype=dtype,
            quantization_config=bitsandbytes_config(quantize, dtype, "diffusers"),
        )
    _check_complete([n for n, p in network.named_parameters() if p.is_meta], file)
    return network


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefixes = ("model.diffusion_model.", "diffusion_model.")
    for prefix in prefixes:
        if any(key.startswith(prefix) for key in state):
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return state


def check_class(folder: Path, kind: type) -> None:
    """Raise a ``UserError`` unless the config in ``folder`` is of the class ``kind``."""
    found = read_config(folder).get("_class_name")
    if found != kind.__name__:
        raise UserError(
            f"{folder}: checkpoint of another model: found {found or 'no class name'}, "
            f"this family needs {kind.__name__}"
        )


def load_frozen(kind: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """Return an encoder or VAE in ``folder``, on the CPU unless bitsandbytes places it.

    Raises:
        UserError: If it is missing, broken or incomplete.
    """
    with explained(f"load the {kind.__name__} in {folder}"):
        module, info = kind.from_pretrained(
            str(folder), use_safetensors=True, output_loading_info=True, **options
        )
    _check_complete(sorted(info["missing_keys"]), folder)
    return module


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    """Return the tokenizer in ``folder``.

    Raises:
        UserError: If it is missing or broken.
    """
    with explained(f"load the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.get_added_vocab()):  # made up where there are no files
            raise ValueError("it has no vocabulary")
        return tokenizer


def _check_complete(missing: Sequence[str], where: Path | str) -> None:
    if missing:
        raise UserError(f"{where}: {len(missing)} weights are missing, such as {missing[0]}")


def place(
    network: Any, device: torch.device, dtype: torch.dtype, quantize: Quantization
) -> nn.Module:
    """Return the network on the device, without gradients; fp8 storage is set up here."""
    network.requires_grad_(False)
    if quantize == "fp8":
        network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if quantize in ("none", "fp8"):
        network.to(device)
    network.input_dtype = dtype if quantize != "none" else None
    return network


def input_dtype(network: Any) -> torch.dtype:
    """Return the type that ``network`` computes in; quantized weights do not tell."""
    chosen: torch.dtype | None = getattr(network, "input_dtype", None)
    return chosen or network.dtype


def bitsandbytes_config(
    quantize: Quantization, dtype: torch.dtype, library: Literal["diffusers", "transformers"]
) -> Any:
    """Return the library's own config object for ``nf4`` and ``int8``, else None.

    Raises:
        MissingExtra: If bitsandbytes is not installed.
    """
    if quantize not in ("nf4", "int8"):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", f"quantize: {quantize}")
    config = importlib.import_module(library).BitsAndBytesConfig
    if quantize == "int8":
        return config(load_in_8bit=True)
    return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def set_attention(network: Any, attention: Attention) -> None:
    """Choose the attention kernels of ``network``.

    Raises:
        MissingExtra: If their package is not installed.
    """
    packages = {"flash": ("flash_attn", "flash-attn"), "xformers": ("xformers", "xformers")}
    if attention == "auto":
        return
    module, package = packages.get(attention, ("torch", "torch"))
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(package, f"attention: {attention}")
    with explained(f"use attention: {attention}"):
        network.set_attention_backend("native" if attention == "sdpa" else attention)
    if attention != "sdpa":
        for name, module in network.named_modules():
            if name.rpartition(".")[2] in QUERY_KEY_NORMS:
                module.register_forward_hook(_as_given)


def _as_given(norm: nn.Module, given: tuple[Tensor], normed: Tensor) -> Tensor:
    """Return what a norm made in the type that it was given.

    Autocast normalizes in float32, and flash-attn and xformers take no queries and keys of
    another type than the values; sdpa casts them itself.
    """
    return normed.type_as(given[0])


def identity(folder: Path) -> str:
    """Return a hash of what is in a folder: the small files' text, the weights' names and sizes."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.is_file()):
        digest.update(f"{file.name}:{file.stat().st_size};".encode())
        if file.suffix in (".json", ".txt", ".jinja"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
