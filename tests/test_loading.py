"""What happens when a checkpoint is not what it should be, and the ways to load a good one."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffdistill.errors import MissingExtra, UserError
from diffdistill.pipelines import loading
from diffdistill.pipelines.flux2_klein import Flux2Klein
from diffdistill.pipelines.z_image import ZImage
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.types import Example, State
from tests import tiny

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_klein(folder / "klein")
    tiny.save_z_image(folder / "z-image")
    return folder


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny FLUX.2 klein, to break."""
    return Path(shutil.copytree(root / "klein", tmp_path / "klein"))


def klein(path: Path | str, **options: Any) -> Flux2Klein:
    """Return FLUX.2 klein at a path."""
    defaults = {"text_encoder_layers": [1, 2, 3], "max_sequence_length": 48}
    return Flux2Klein(path=str(path), device=CPU, **(defaults | options))


def z_image(path: Path | str, **options: Any) -> ZImage:
    """Return Z-Image at a path."""
    return ZImage(path=str(path), device=CPU, view="none", max_sequence_length=64, **options)


def test_the_transformer_of_another_model_is_named(root: Path) -> None:
    expected = "found Flux2Transformer2DModel, this family needs ZImageTransformer2DModel"
    with pytest.raises(UserError, match=expected):
        z_image(root / "klein").network()
    expected = "found ZImageTransformer2DModel, this family needs Flux2Transformer2DModel"
    with pytest.raises(UserError, match=expected):
        klein(root / "z-image").network()
    with pytest.raises(UserError, match="found AutoencoderKL, this family needs Flux2Trans"):
        klein(root / "klein").network(str(root / "z-image" / "vae"))


def test_flux2_dev_is_not_taken_for_klein(copy: Path) -> None:
    tiny.edit_json(copy / "transformer" / "config.json", guidance_embeds=True)
    with pytest.raises(UserError, match=r"embedded guidance, not FLUX.2 klein"):
        klein(copy).network()


def test_a_missing_checkpoint_or_part_is_named(copy: Path, monkeypatch: Any) -> None:
    with pytest.raises(UserError, match=r"family.path is missing"):
        loading.locate("", "transformer")
    with pytest.raises(UserError, match=r"family.path is missing"):
        loading.transformer_folder("")
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        klein("/nowhere/at/all").network()
    shutil.rmtree(copy / "transformer")
    with pytest.raises(UserError, match="no folder 'transformer' in this checkpoint; found sched"):
        klein(copy).network()

    def offline(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(loading, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"cannot find 'owner/name' .*no connection"):
        klein("owner/name").network()


def test_hub_ids_are_downloaded_part_by_part_without_pickles(root: Path, monkeypatch: Any) -> None:
    asked: list[tuple[str, Any]] = []

    def download(path: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((f"{path}@{revision}", allow_patterns))
        return str(root / "klein")

    monkeypatch.setattr(loading, "snapshot_download", download)
    klein("owner/name", revision="main").network()
    assert {name for name, _ in asked} == {"owner/name@main"}
    assert all(
        p.startswith(("transformer/", "model_index", "README", "LICENSE"))
        for _, ps in asked
        for p in ps
    )
    assert not any(p.endswith((".bin", "*", ".pt")) for _, ps in asked for p in ps)


@pytest.mark.parametrize("code", [False, True])
def test_a_checkpoints_code_is_downloaded_if_asked_for(
    code: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[str] = []

    def download(path: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", download)
    loading.locate("owner/name", "", code=code)
    assert ("*.py" in asked) is code
    assert "*.safetensors" in asked


def test_broken_and_incomplete_weights_are_user_errors(copy: Path) -> None:
    file = copy / "transformer" / WEIGHTS
    weights = load_file(file)
    dropped = weights.pop("proj_out.weight")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"1 weights are missing, such as proj_out\.weight"):
        klein(copy).network()
    save_file(weights | {"proj_out.weight": dropped[:, :-1].contiguous()}, file)
    with pytest.raises(UserError, match=r"cannot load the transformer in .*proj_out"):
        klein(copy).network()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the transformer in"):
        klein(copy).network()
    (copy / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*JSONDecodeError"):
        klein(copy).network()


def test_incomplete_encoders_are_user_errors(copy: Path) -> None:
    example = [Example("a", picture, origin="x:0") for picture in (torch.rand(3, 32, 32),)]
    for part, name, key in (
        ("vae", WEIGHTS, "encoder.conv_in.weight"),
        ("text_encoder", "model.safetensors", "model.norm.weight"),
    ):
        weights = load_file(copy / part / name)
        del weights[key]
        save_file(weights, copy / part / name, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{part}: 1 weights are missing, such as {key}"):
            klein(copy).encode(example, privileged=False)
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        klein(copy).encode(example, privileged=False)


def test_pickled_weights_are_never_read(copy: Path) -> None:
    for part, name in (("transformer", WEIGHTS), ("text_encoder", "model.safetensors")):
        file = copy / part / name
        pickled = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), copy / part / pickled)
        file.unlink()
    with pytest.raises(UserError, match="cannot load the transformer"):
        klein(copy).network()
    with pytest.raises(UserError, match="cannot load the Qwen3ForCausalLM"):
        klein(copy).encode([Example("a", size=(32, 32))], privileged=False)


def test_text_encoder_layers_must_exist_and_fit(root: Path) -> None:
    example = [Example("a", size=(32, 32))]
    with pytest.raises(UserError, match=r"layers \[9, 18, 27\]: the text encoder has 3 layers"):
        klein(root / "klein", text_encoder_layers=[9, 18, 27]).encode(example, privileged=False)
    with pytest.raises(UserError, match="2 layers of width 16 do not make the 48"):
        klein(root / "klein", text_encoder_layers=[1, 2]).encode(example, privileged=False)


def test_a_role_may_name_a_transformer_folder_or_a_pipeline(root: Path, tmp_path: Path) -> None:
    tiny.save_klein(tmp_path / "other", seed=7)
    family = klein(root / "klein")
    folder, pipeline = (family.network(str(tmp_path / p)) for p in ("other/transformer", "other"))
    assert _same(folder, pipeline)
    assert not _same(folder, family.network())


def _same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("family", [klein, z_image])
def test_single_files_load_under_any_prefix(
    root: Path, tmp_path: Path, family: Any, prefix: str
) -> None:
    path = root / ("klein" if family is klein else "z-image")
    weights = load_file(path / "transformer" / WEIGHTS)
    file = str(tmp_path / "one.safetensors")
    save_file({f"{prefix}{key}": value for key, value in weights.items()}, file)
    assert _same(family(path, single_file=file).network(), family(path).network())


def test_single_files_of_other_kinds_are_user_errors(root: Path, tmp_path: Path) -> None:
    path, file = root / "klein", tmp_path / "one.safetensors"
    family = klein(path, single_file=str(file))
    with pytest.raises(UserError, match="cannot load the transformer in"):
        family.network()
    weights = load_file(path / "transformer" / WEIGHTS)
    save_file(weights | {"x_embedder.scale_weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match="scaled fp8 weights"):
        family.network()
    save_file(load_file(root / "z-image" / "transformer" / WEIGHTS), file)
    with pytest.raises(UserError, match=r"one\.safetensors"):
        family.network()


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"quantize": "nf4"}, "bitsandbytes"),
        ({"quantize": "int8"}, "bitsandbytes"),
        ({"attention": "flash"}, "flash-attn"),
        ({"attention": "xformers"}, "xformers"),
    ],
)
def test_a_missing_package_is_named(
    root: Path, monkeypatch: Any, options: dict[str, Any], package: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtra, match=f"needs the package '{package}'"):
        klein(root / "klein", **options).network()


def test_quantization_is_handed_to_both_libraries(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    made: list[tuple[str, dict[str, Any]]] = []

    class Library:
        def __init__(self, name: str) -> None:
            self.name = name

        def BitsAndBytesConfig(self, **options: Any) -> str:  # noqa: N802 - the libraries' name
            made.append((self.name, options))
            return self.name

    monkeypatch.setattr(loading.importlib, "import_module", Library)
    assert loading.bitsandbytes_config("nf4", torch.bfloat16, "diffusers") == "diffusers"
    assert loading.bitsandbytes_config("int8", torch.bfloat16, "transformers") == "transformers"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert made[0] == ("diffusers", nf4 | {"bnb_4bit_compute_dtype": torch.bfloat16})
    assert made[1] == ("transformers", {"load_in_8bit": True})
    assert loading.bitsandbytes_config("fp8", torch.bfloat16, "diffusers") is None


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("attention", ["flash", "xformers"])
@pytest.mark.parametrize("kind", [klein, z_image])
def test_under_autocast_attention_kernels_get_tensors_of_one_type(
    kind: Any, attention: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[torch.dtype]] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append({query.dtype, key.dtype, value.dtype})
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    name = attention_dispatch.AttentionBackendName(attention)
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # puts it back
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", lambda b: None)
    monkeypatch.setitem(registry._backends, name, kernel)
    monkeypatch.setitem(registry._supported_arg_names, name, {"query", "key", "value"})
    path = root / ("klein" if kind is klein else "z-image")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _prediction(kind(path, attention=attention))
        assert seen
        assert set.union(*seen) == {torch.bfloat16}
        torch.testing.assert_close(
            found, _prediction(kind(path, attention="sdpa")), rtol=0.05, atol=0.02
        )


def test_sdpa_is_the_default_attention(root: Path) -> None:
    outputs = [_prediction(klein(root / "klein", attention=name)) for name in ("auto", "sdpa")]
    assert torch.equal(outputs[0], outputs[1])


def _prediction(family: Flux2Klein) -> Tensor:
    batch = family.collate(family.encode([Example("a", size=(32, 32))], privileged=False))
    state = State(torch.ones(1, 16, 8, 8), torch.full((1,), 0.5))
    return family.predict(family.network(), state, family.condition(batch))


def test_dtype_is_that_of_all_weights_and_predictions_are_float32(root: Path) -> None:
    family = klein(root / "klein", dtype="bf16")
    assert {p.dtype for p in family.network().parameters()} == {torch.bfloat16}
    encoded = family.encode([Example("a", size=(32, 32))], privileged=False)[0]
    assert encoded["text"].dtype == torch.bfloat16
    assert _prediction(family).dtype == torch.float32
    assert loading.resolve_dtype("auto", CPU) == torch.float32
    assert loading.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("family", [klein, z_image])
def test_fp8_trains_a_lora_as_rounded_weights_do(root: Path, family: Any) -> None:
    path = root / ("klein" if family is klein else "z-image")
    stored, rounded = family(path, quantize="fp8"), family(path)
    weights = dict(stored.network().named_parameters())
    network = rounded.network()
    count = 0
    for name, parameter in network.named_parameters():
        if weights[name].dtype == torch.float8_e4m3fn:
            parameter.data = weights[name].data.float()
            count += 1
    assert count > len(weights) // 2
    rounded.network = lambda _path=None: network
    gradients = [_lora_gradient(stored), _lora_gradient(rounded)]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def _lora_gradient(family: Flux2Klein | ZImage) -> Tensor:
    student = build_roles({"student": RoleSettings(adapter="lora", rank=2)}, family)["student"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters().values():
            parameter.normal_(std=0.1, generator=generator)
    batch = family.collate(family.encode([Example("a", size=(32, 32))], privileged=False))
    x = torch.randn(1, *family.latent_shape(batch), generator=generator)
    student(State(x, torch.full((1,), 0.5)), family.condition(batch)).square().mean().backward()
    rows = student.parameters().values()
    return torch.cat([p.grad.flatten() for p in rows if p.grad is not None])
