"""What is exported does in other programs what it did in training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.exporting import (
    export_comfy_lora,
    export_lora,
    export_pipeline,
    export_single_file,
    merged_state,
)
from diffdistill.pipelines.flux2_klein import Flux2Klein
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.original_keys import klein_place, original_lora
from diffdistill.pipelines.wan import Wan
from diffdistill.pipelines.z_image import ZImage
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Role
from diffdistill.types import Example
from tests import tiny

CPU = torch.device("cpu")
NAMES = ("klein", "z-image", "wan")
RANK, ALPHA = 2, 8.0
CLASSES = {
    "klein": Flux2Transformer2DModel,
    "z-image": ZImageTransformer2DModel,
    "wan": WanTransformer3DModel,
}
PIPELINES = {"klein": Flux2KleinPipeline, "z-image": ZImagePipeline, "wan": WanPipeline}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_klein(folder / "klein")
    tiny.save_z_image(folder / "z-image")
    tiny.save_wan(folder / "wan")
    return folder


def family_of(name: str, root: Path, **options: Any) -> LatentFamily:
    """Return a family by name, without a view."""
    options |= {"path": str(root / name), "device": CPU, "max_sequence_length": 48}
    if name == "wan":
        return Wan(**options)
    if name == "klein":
        return Flux2Klein(text_encoder_layers=[1, 2, 3], view="none", **options)
    return ZImage(view="none", **options)


def trained(family: LatentFamily) -> Role:
    """Return a student whose adapter does something."""
    settings = RoleSettings(adapter="lora", rank=RANK, alpha=ALPHA)
    student = build_roles({"student": settings}, family)["student"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters().values():
            parameter.normal_(std=0.1, generator=generator)
    return student


def adapter_of(student: Role) -> dict[str, Tensor]:
    """Return the adapter's tensors by name."""
    return {name: parameter.detach() for name, parameter in student.parameters().items()}


def sampled(family: LatentFamily, model: Any) -> Tensor:
    """Return pixels of two steps from fixed noise."""
    batch = family.collate(family.encode([Example("a cat", size=(32, 32), num_frames=5)]))
    noise = _noise(family)
    return family.decode(family.sample(model, family.condition(batch), noise, num_steps=2))


def _noise(family: LatentFamily) -> Tensor:
    shapes = {Flux2Klein: (16, 8, 8), ZImage: (16, 16, 16), Wan: (16, 2, 4, 4)}
    return Draws(3).normal("noise", torch.tensor([0]), shapes[type(family)])


def piped(pipeline: Any, family: LatentFamily) -> Tensor:
    """Return what a plain pipeline makes of the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if isinstance(family, Flux2Klein):
        more = {"text_encoder_out_layers": (1, 2, 3)}
    if isinstance(family, Wan):
        more = {"num_frames": 5}
        pipeline.scheduler = tiny.EvenSigmas(shift=5.0)
    return pipeline(
        prompt="a cat",
        height=32,
        width=32,
        num_inference_steps=2,
        guidance_scale=0.0,
        latents=_noise(family),
        max_sequence_length=48,
        output_type="pt",
        return_dict=False,
        **more,
    )[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["diffusers", "comfy"])
def test_a_lora_does_in_the_plain_pipeline_what_it_did_in_training(
    root: Path, tmp_path: Path, name: str, form: str
) -> None:
    family = family_of(name, root)
    student = trained(family)
    options = {"rank": RANK, "alpha": ALPHA}
    pipeline = PIPELINES[name].from_pretrained(str(root / name))
    before = piped(pipeline, family)
    if form == "diffusers":
        export_lora(family, adapter_of(student), tmp_path, **options)
        pipeline.load_lora_weights(str(tmp_path))
    else:
        file = export_comfy_lora(family, adapter_of(student), tmp_path / "x.safetensors", **options)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = sampled(family, student)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(piped(pipeline, family), expected, atol=1e-5, rtol=0)


def test_a_lora_is_not_written_into_a_folder_in_use(root: Path, tmp_path: Path) -> None:
    family = family_of(NAMES[0], root)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="is not empty: export into a new folder"):
        export_lora(family, adapter_of(trained(family)), tmp_path, rank=RANK, alpha=ALPHA)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", NAMES)
def test_comfy_keys_are_those_of_the_original_layout(root: Path, tmp_path: Path, name: str) -> None:
    family = family_of(name, root)
    adapter = adapter_of(trained(family))
    file = tmp_path / "x.safetensors"
    export_comfy_lora(family, adapter, file, rank=RANK, alpha=ALPHA, dtype=torch.bfloat16)
    state = load_file(file)
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    if name == "klein":
        assert state["diffusion_model.double_blocks.1.txt_attn.qkv.lora_A.weight"].shape == (6, 32)
        assert state["diffusion_model.double_blocks.1.txt_attn.qkv.lora_B.weight"].shape == (96, 6)
        assert "diffusion_model.single_blocks.0.linear1.lora_A.weight" in state
    elif name == "wan":
        assert state["diffusion_model.blocks.1.cross_attn.o.lora_A.weight"].shape == (2, 24)
        assert state["diffusion_model.blocks.0.ffn.0.lora_B.weight"].shape == (32, 2)
        assert len(state) == len(adapter)
    else:
        assert set(state) == {f"diffusion_model.{key}" for key in adapter}


def test_fused_adapters_leave_out_projections_that_have_none() -> None:
    module = "transformer_blocks.0.attn"
    adapter = {
        f"{module}.{name}.lora_{side}.weight": torch.randn(shape)
        for name in ("to_q", "to_v")
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    fused = original_lora(adapter, klein_place)
    name = "double_blocks.0.img_attn.qkv.lora_{}.weight"
    update = fused[name.format("B")] @ fused[name.format("A")]
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        expected = torch.zeros(4, 4)
        if part != "to_k":
            up, down = (adapter[f"{module}.{part}.lora_{side}.weight"] for side in "BA")
            expected = up @ down
        torch.testing.assert_close(update[4 * index : 4 * index + 4], expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_with_the_adapter_merged_is_complete(
    root: Path, tmp_path: Path, name: str
) -> None:
    family = family_of(name, root)
    student = trained(family)
    export_pipeline(family, student.network, tmp_path / "out", adapter="student")
    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "out"))
    assert type(pipeline) is PIPELINES[name]
    assert str(root) not in (tmp_path / "out" / "transformer" / "config.json").read_text()
    torch.testing.assert_close(piped(pipeline, family), sampled(family, student), atol=1e-5, rtol=0)
    again = family_of(name, tmp_path / "out" / "..", single_file=None)
    again.path = str(tmp_path / "out")
    assert _predictions_agree(again.network(), merged_state(student.network, "student", F32))
    with pytest.raises(UserError, match="is not empty"):
        export_pipeline(family, student.network, tmp_path / "out", adapter="student")


F32 = torch.float32


def _predictions_agree(network: nn.Module, state: dict[str, Tensor]) -> bool:
    ours = network.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], v) for k, v in state.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, "student"])
def test_a_single_file_comes_back_through_the_converters(
    root: Path, tmp_path: Path, name: str, adapter: str | None
) -> None:
    family = family_of(name, root)
    student = trained(family)
    file = tmp_path / "one.safetensors"
    export_single_file(family, student.network, file, adapter=adapter)
    expected = merged_state(student.network, adapter, F32)
    original = load_file(file)
    assert not any("to_q" in key for key in original)
    loaded = CLASSES[name].from_single_file(
        original, config=str(root / name), subfolder="transformer"
    )
    assert _predictions_agree(loaded, expected)
    assert _predictions_agree(family_of(name, root, single_file=str(file)).network(), expected)
    plain = family.network().state_dict()
    same = all(torch.equal(value, plain[key]) for key, value in expected.items())
    assert same is (adapter is None)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_in_the_type_asked_for(root: Path, tmp_path: Path, name: str) -> None:
    family = family_of(name, root)
    file = tmp_path / "one.safetensors"
    export_single_file(family, family.network(), file, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_a_quantized_base_is_not_exported(root: Path, tmp_path: Path) -> None:
    family = family_of("klein", root, quantize="fp8")
    with pytest.raises(UserError, match="the base is quantized"):
        export_single_file(family, family.network(), tmp_path / "one.safetensors")
