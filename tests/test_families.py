"""The same questions to every family, on tiny random models of the real classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.d_opsd import DOPSD
from diffdistill.pipelines import qwen_vl
from diffdistill.pipelines.flux2_klein import SUFFIXES, Flux2Klein, _inputs, _limited
from diffdistill.pipelines.latent import LatentFamily
from diffdistill.pipelines.wan import Wan
from diffdistill.pipelines.z_image import ZImage
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles, enable_checkpointing
from diffdistill.types import Example, Progress, State
from tests import tiny

CPU = torch.device("cpu")
IMAGES = ("klein", "z-image")
NAMES = (*IMAGES, "wan")
PROMPTS = ("a cat", "a dog that is much bigger")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny checkpoints."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_klein(folder / "klein")
    tiny.save_z_image(folder / "z-image")
    tiny.save_vlm(folder / "vlm")
    tiny.save_wan(folder / "wan")
    return folder


def klein(root: Path, **options: Any) -> Flux2Klein:
    """Return the tiny FLUX.2 klein."""
    defaults = {"text_encoder_layers": [1, 2, 3], "max_sequence_length": 48}
    return Flux2Klein(path=str(root / "klein"), device=CPU, **(defaults | options))


def z_image(root: Path, **options: Any) -> ZImage:
    """Return the tiny Z-Image with its tiny VLM."""
    defaults = {
        "max_sequence_length": 64,
        "vlm_path": str(root / "vlm"),
        "vlm_min_pixels": 32 * 32,
        "vlm_max_pixels": 64 * 64,
    }
    return ZImage(path=str(root / "z-image"), device=CPU, **(defaults | options))


def wan(root: Path, **options: Any) -> Wan:
    """Return the tiny Wan."""
    return Wan(path=str(root / "wan"), device=CPU, **({"max_sequence_length": 48} | options))


def family_of(name: str, root: Path, **options: Any) -> LatentFamily:
    """Return a family by name."""
    return {"klein": klein, "z-image": z_image, "wan": wan}[name](root, **options)


def picture(height: int, width: int, seed: int) -> Tensor:
    """Return random pixels that survive 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(3, height, width, generator=generator) * 255).round() / 255


def examples(count: int = 2, size: int = 32, references: int = 0) -> list[Example]:
    """Return examples with images, each with so many references."""
    refs = tuple(picture(size, size, 10 + index) for index in range(references))
    return [
        Example(prompt, picture(size, size, seed), refs, f"{prompt}, detailed", origin=f"x:{seed}")
        for seed, prompt in enumerate(PROMPTS[:count])
    ]


def examples_of(name: str, count: int = 2, size: int = 32) -> list[Example]:
    """Return examples with what a family learns from: images, or videos of five frames."""
    if name != "wan":
        return examples(count, size)
    return [
        Example(prompt, video=torch.stack([picture(size, size, 10 * seed + i) for i in range(5)]))
        for seed, prompt in enumerate(PROMPTS[:count])
    ]


def batch_of(family: LatentFamily, items: list[Example]) -> dict[str, Any]:
    """Return the collated batch of the examples."""
    batch = family.collate(family.encode(items))
    return batch | {"ids": torch.arange(len(items)), "prompts": [item.prompt for item in items]}


def state_of(family: LatentFamily, batch: dict[str, Any], t: float = 0.7) -> State:
    """Return a state of noise at one noise level."""
    noise = Draws(0).normal("test", batch["ids"], family.latent_shape(batch))
    return State(noise, torch.full((len(noise),), t))


def sample(family: LatentFamily, batch: dict[str, Any], noise: Tensor, num_steps: int) -> Tensor:
    """Return latents from the family's own network."""
    network = family.network()
    condition = family.condition(batch)
    return family.sample(
        lambda state, told: family.predict(network, state, told),
        condition,
        noise,
        num_steps=num_steps,
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_klein_samples_what_its_pipeline_samples(
    root: Path, num_steps: int, references: int
) -> None:
    family = klein(root)
    sizes = [(64, 64), (64, 96)][:references]
    images = tuple(picture(h, w, seed) for seed, (h, w) in enumerate(sizes))
    batch = batch_of(family, [Example("a cat", picture(64, 64, 9), images)])
    noise = Draws(1).normal("noise", batch["ids"], family.latent_shape(batch))
    latents = sample(family, batch, noise, num_steps)
    pipeline = Flux2KleinPipeline.from_pretrained(str(root / "klein"))
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "image": [_pil(image) for image in images] or None,
        "prompt": "a cat",
        "height": 64,
        "width": 64,
        "num_inference_steps": num_steps,
        "guidance_scale": 1.0,
        "latents": noise,
        "max_sequence_length": 48,
        "text_encoder_out_layers": (1, 2, 3),
    }
    expected = pipeline(**arguments, output_type="latent").images
    with family.using("vae") as vae:
        bn, eps = vae.bn, vae.config.batch_norm_eps
    mean, std = bn.running_mean[:, None, None], (bn.running_var + eps).sqrt()[:, None, None]
    unpacked = pipeline._unpatchify_latents(latents * std + mean)
    torch.testing.assert_close(unpacked, expected, atol=1e-5, rtol=0)
    pixels = pipeline(**arguments, output_type="pt").images
    torch.testing.assert_close(family.decode(latents), pixels, atol=1e-5, rtol=0)


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.movedim(0, -1) * 255).round().byte().numpy())


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_z_image_samples_what_its_pipeline_samples(root: Path, num_steps: int) -> None:
    family = z_image(root, view="none")
    batch = batch_of(family, examples())
    noise = Draws(1).normal("noise", batch["ids"], family.latent_shape(batch))
    latents = sample(family, batch, noise, num_steps)
    pipeline = ZImagePipeline.from_pretrained(str(root / "z-image"))
    pipeline.set_progress_bar_config(disable=True)
    outputs = []
    for kind in ("latent", "pt"):
        outputs.append(
            pipeline(
                prompt=list(PROMPTS),
                height=32,
                width=32,
                num_inference_steps=num_steps,
                guidance_scale=0.0,
                latents=noise,
                max_sequence_length=64,
                output_type=kind,
            ).images
        )
    torch.testing.assert_close(latents, outputs[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(family.decode(latents), outputs[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "exposure"), [*((name, 0.0) for name in NAMES), *((name, 1.0) for name in IMAGES)]
)
def test_a_batch_predicts_what_its_samples_predict_alone(
    root: Path, name: str, exposure: float
) -> None:
    family = family_of(name, root)
    network, items = family.network(), examples_of(name)
    batch = batch_of(family, items)
    state = state_of(family, batch)
    together = family.predict(network, state, family.condition(batch, exposure=exposure))
    for index, item in enumerate(items):
        alone = family.condition(batch_of(family, [item]), exposure=exposure)
        single = State(state.x[index : index + 1], state.t[index : index + 1])
        expected = family.predict(network, single, alone)[0]
        torch.testing.assert_close(together[index], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_views_and_the_negative_prompt_change_the_prediction(root: Path, name: str) -> None:
    family = family_of(name, root)
    network, batch = family.network(), batch_of(family, examples_of(name))
    state = state_of(family, batch)
    conditions = [family.condition(batch), family.condition(batch, negative=True)]
    if family.views:
        conditions.append(family.condition(batch, exposure=1.0))
    plain, *others = (family.predict(network, state, condition) for condition in conditions)
    assert all((plain - other).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("name", IMAGES)
def test_the_negative_prompt_is_the_empty_one(root: Path, name: str) -> None:
    family = family_of(name, root, view="none")
    empty, other = family.encode([Example("", size=(32, 32)), Example("a", size=(32, 32))])
    assert torch.equal(other["negative"], empty["text"])


@pytest.mark.parametrize("name", IMAGES)
def test_detailed_prompts_are_seen_in_place_of_the_prompts(root: Path, name: str) -> None:
    family = family_of(name, root, view="detailed-prompt")
    encoded = family.encode(examples(1))[0]
    longer = family.encode([Example(f"{PROMPTS[0]}, detailed", size=(32, 32))], privileged=False)
    assert torch.equal(encoded["privileged_text"], longer[0]["text"])


@pytest.mark.parametrize("view", ["reference", "last-reference"])
def test_klein_shows_the_target_as_the_last_reference(root: Path, view: str) -> None:
    family = klein(root, view=view, max_sequence_length=300)
    batch = batch_of(family, examples(1, references=2))
    student, teacher = family.condition(batch), family.condition(batch, exposure=1.0)
    assert [len(c["references"]) for c in (student, teacher)] == [2, 3]
    assert torch.equal(teacher["references"][2], batch["latents"])
    ids = _inputs(family.network(), state_of(family, batch), teacher)["img_ids"]
    assert ids[:, 0].unique_consecutive().tolist() == [0, 10, 20, 30]
    asked = [Example(f"{PROMPTS[0]} {SUFFIXES[view]}", size=(32, 32))]
    assert torch.equal(teacher["text"][0], family.encode(asked, privileged=False)[0]["text"])


def test_a_suffix_of_ones_own_replaces_the_scripts_sentence(root: Path) -> None:
    family = klein(root, suffix="Copy it.")
    encoded = family.encode(examples(1))[0]
    asked = family.encode([Example("a cat Copy it.", size=(32, 32))], privileged=False)[0]
    assert torch.equal(encoded["privileged_text"], asked["text"])


def test_large_references_are_scaled_as_the_pipeline_does() -> None:
    large, small = picture(1040, 1100, 0), picture(64, 36, 0)
    expected = Flux2ImageProcessor._resize_to_target_area(_pil(large))
    assert torch.equal((_limited(large) * 255).round(), (_pixels(expected) * 255).round())
    assert _limited(large).shape == (3, 995, 1053)
    assert torch.equal(_limited(small), small)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0) / 255


@pytest.mark.parametrize("name", NAMES)
def test_an_example_without_image_has_empty_latents_of_its_size(root: Path, name: str) -> None:
    family = family_of(name, root)
    target = examples_of(name, 1)[0]
    if target.video is None:
        target = Example("a", picture(64, 36, 0))
    else:
        target = Example("a", video=torch.rand(5, 3, 64, 36))
    sized = family.encode([target.without_target()], privileged=False)[0]["latents"]
    real = family.encode([target], privileged=False)[0]["latents"]
    assert sized.shape == real.shape
    assert sized.abs().max() == 0.0
    assert real.dtype == torch.float32


def test_z_image_latents_are_the_mode_shifted_and_scaled(root: Path) -> None:
    family, image = z_image(root, view="none"), picture(32, 32, 0)
    latents = family.encode([Example("a", image)])[0]["latents"]
    vae = ZImagePipeline.from_pretrained(str(root / "z-image")).vae
    with torch.no_grad():
        mode = vae.encode(2 * image[None] - 1).latent_dist.mode()[0]
    torch.testing.assert_close(latents, (mode - 0.1159) * 0.3611)


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_vae_gets_pixels_that_were_rounded_once(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, seen = picture(32, 32, 0), list[Tensor]()
    if name == "wan":
        family: LatentFamily = Wan(path=str(root / name), device=CPU, vae_dtype="bf16")
    else:
        family = (klein if name == "klein" else z_image)(root, view="none", dtype="bf16")
    with family.using("vae") as vae:
        encode = vae.encode
        monkeypatch.setattr(vae, "encode", lambda x: seen.append(x) or encode(x))
    family.encode([Example("a", image)])
    assert torch.equal(seen[0].flatten(), (2 * image - 1).bfloat16().flatten())


def test_the_vlm_sees_pixels_that_are_not_scaled_down_twice(root: Path) -> None:
    family, image = z_image(root, vlm_min_pixels=64 * 64), picture(64, 64, 0)
    seen: list[Tensor] = []
    with family.using("vlm") as vlm:
        hook = vlm.visual.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        qwen_vl.embed(vlm, family._processor, "a", image, pixels=(64 * 64, 64 * 64))
        hook.remove()
    settings = family._processor.image_processor
    shift, scale = (
        torch.tensor(v)[:, None, None] for v in (settings.image_mean, settings.image_std)
    )
    expected = (image - shift) / scale
    # patches repeat each frame twice
    torch.testing.assert_close(seen[0].mean(), expected.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].std(), expected.std(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", IMAGES)
def test_an_example_that_lacks_what_the_view_shows_is_named(root: Path, name: str) -> None:
    family = family_of(name, root)
    with pytest.raises(UserError, match=r"rows\.jsonl:7: view .* needs a target image"):
        family.encode([Example("a", size=(32, 32), origin="rows.jsonl:7")])
    family = family_of(name, root, view="detailed-prompt")
    with pytest.raises(UserError, match=r"rows\.jsonl:8: .*needs a detailed prompt"):
        family.encode([Example("a", picture(32, 32, 0), origin="rows.jsonl:8")])
    with pytest.raises(UserError, match=r"rows\.jsonl:9: .*neither an image nor a size"):
        family.encode([Example("a", origin="rows.jsonl:9")], privileged=False)


def test_an_unknown_view_lists_the_known_ones(root: Path) -> None:
    with pytest.raises(UserError, match="reference, last-reference, detailed-prompt, none"):
        klein(root, view="vlm")
    with pytest.raises(UserError, match="vlm, detailed-prompt, none"):
        z_image(root, view="reference")


@pytest.mark.parametrize("name", IMAGES)
def test_exposure_is_all_or_nothing(root: Path, name: str) -> None:
    family = family_of(name, root, view="none")
    batch = batch_of(family, examples(1))
    with pytest.raises(UserError, match=r"exposure 0 or 1, not 0.5"):
        family.condition(batch, exposure=0.5)
    with pytest.raises(UserError, match="needs a view"):
        family.condition(batch, exposure=1.0)


def test_z_image_refuses_references_and_long_captions(root: Path) -> None:
    family = z_image(root)
    with pytest.raises(UserError, match="x:0: Z-Image takes no reference images"):
        family.encode(examples(1, references=1))
    family = z_image(root, max_sequence_length=512, view="none")
    batch = batch_of(family, [Example("long " * 100, size=(32, 32))])
    with pytest.raises(UserError, match="512 tokens is too long"):
        family.predict(family.network(), state_of(family, batch), family.condition(batch))


def test_the_vlm_embeds_text_alone_as_the_text_encoder_if_told_its_rope_base(root: Path) -> None:
    told, untold = z_image(root, vlm_rope_base=1e6), z_image(root)
    text = told.encode(examples(1), privileged=False)[0]["text"]
    for family, equal in ((told, True), (untold, False)):
        with family.using("vlm") as vlm:
            hidden = qwen_vl.embed(vlm, family._processor, PROMPTS[0], None, pixels=(1, 2))
        assert torch.allclose(hidden, text, rtol=0, atol=1e-6) is equal


def test_the_vlm_reads_the_image_before_the_text(root: Path) -> None:
    family = z_image(root, vlm_min_pixels=64 * 64)
    encoded = family.encode([Example(PROMPTS[0], picture(64, 64, 0))])[0]
    # 4 merged patches between two marks
    assert len(encoded["privileged_text"]) == len(encoded["text"]) + 4 + 2
    other = family.encode([Example(PROMPTS[0], picture(64, 64, 5))])[0]
    start = len("<s>user\n") - len("<s>") + 1  # the mark of a turn, then bytes
    same = (encoded["privileged_text"] == other["privileged_text"]).all(dim=1)
    assert same[: start + 1].all()
    assert not same[start + 1 :].any()


def test_vlm_tokens_are_cut_off(root: Path) -> None:
    family = z_image(root, vlm_max_tokens=12)
    assert len(family.encode(examples(1))[0]["privileged_text"]) == 12


def test_a_vlm_of_another_shape_is_refused(root: Path, tmp_path: Path) -> None:
    tiny.save_vlm(tmp_path / "vlm", num_layers=2)
    family = z_image(root, vlm_path=str(tmp_path / "vlm"))
    with pytest.raises(UserError, match=r"11 weights are in one alone, such as layers.2"):
        family.encode(examples(1))
    with pytest.raises(UserError, match="needs vlm_path"):
        z_image(root, vlm_path=None).encode(examples(1))
    with pytest.raises(UserError, match="found model type 'qwen3', needed 'qwen3_vl'"):
        z_image(root, vlm_path=str(root / "z-image" / "text_encoder")).encode(examples(1))


def test_grids_are_those_of_the_pipelines_and_of_the_scripts(root: Path) -> None:
    shape = (128, 64, 64)  # 1024 pixels
    assert _rounded(klein(root), 4, shape) == [1.0, 0.9674, 0.9081, 0.7672, 0.0]
    scripts = klein(root, noise_grid="reference")
    assert _rounded(scripts, 4, shape) == [1.0, 0.9519, 0.8322, 0.0098, 0.0]
    shape = (16, 128, 128)
    eight = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0]
    assert _rounded(z_image(root), 8, shape) == eight
    assert _rounded(z_image(root), 4, shape) == [1.0, 0.9, 0.75, 0.5, 0.0]
    scripts = z_image(root, noise_grid="reference")
    assert _rounded(scripts, 4, shape) == [1.0, 0.9, 0.75, 0.5, 0.0]
    eight = [1.0, 0.9769, 0.9478, 0.9099, 0.8586, 0.7853, 0.6719, 0.4732, 0.0]
    assert _rounded(scripts, 8, shape) == eight
    with pytest.raises(UserError, match="4 and 8 steps, not 5"):
        scripts.grid(5, shape)


def _rounded(family: LatentFamily, num_steps: int, shape: tuple[int, ...]) -> list[float]:
    return [round(t, 4) for t in family.grid(num_steps, shape).tolist()]


def test_features_are_the_image_tokens_of_the_middle_block(root: Path) -> None:
    family = klein(root)
    batch = batch_of(family, examples(references=1))
    state, condition = state_of(family, batch), family.condition(batch, exposure=1.0)
    network = tiny.klein_transformer(num_layers=1, num_single_layers=1)
    time = network.time_guidance_embed(state.t * 1000, None)
    tokens = network.proj_out(network.norm_out(family.features(network, state, condition), time))
    expected = family.predict(network, state, condition).flatten(2).movedim(1, -1)
    torch.testing.assert_close(tokens, expected)
    network = tiny.klein_transformer(num_layers=2, num_single_layers=1)
    assert family.features(network, state, condition).shape == (2, 64, 32)


def test_z_image_features_are_the_image_tokens_of_the_middle_layer(root: Path) -> None:
    family = z_image(root)
    batch = batch_of(family, examples())
    state, condition = state_of(family, batch), family.condition(batch)
    network = tiny.z_image_transformer(n_layers=1)
    time = network.t_embedder((1 - state.t) * network.t_scale)
    tokens = network.all_final_layer["2-1"](family.features(network, state, condition), c=time)
    expected = family.predict(network, state, condition)
    patches = expected.reshape(2, 16, 8, 2, 8, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 64, 64)
    torch.testing.assert_close(-tokens, patches, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_features_carry_the_graph_with_checkpointing_too(root: Path, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        family = family_of(name, root)
        roles = _roles(family, checkpointing)
        batch = batch_of(family, examples_of(name))
        state, student = state_of(family, batch), roles["student"]
        with student.acting(CPU):
            features = family.features(student.network, state, family.condition(batch))
        features.square().sum().backward()
        gradients.append(_gradient(roles))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def _roles(family: LatentFamily, checkpointing: bool) -> Roles:
    student = RoleSettings(adapter="lora", rank=2, alpha=4.0)
    teacher = RoleSettings(weights="ema", of="student")
    roles = build_roles({"student": student, "teacher": teacher}, family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in roles["student"].parameters().values():
            parameter.normal_(std=0.1, generator=generator)
    if checkpointing:
        enable_checkpointing(roles["student"].network)
    return roles


def _gradient(roles: Roles) -> Tensor:
    rows = roles["student"].parameters().values()
    return torch.cat([p.grad.flatten() for p in rows if p.grad is not None])


@pytest.mark.parametrize("name", IMAGES)
def test_a_d_opsd_step_has_the_same_gradient_with_checkpointing(root: Path, name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        family = family_of(name, root)
        roles = _roles(family, checkpointing)
        method = DOPSD(
            family=family,
            draws=Draws(0),
            student=roles["student"],
            teacher=roles["teacher"],
            num_steps=2,
        )
        batch = batch_of(family, examples())
        for loss in method.losses(batch, Progress(0, 1)):
            loss.value.backward()
        assert all(p.grad is None for p in roles["teacher"].parameters().values())
        assert all(p.grad is not None for p in roles["student"].parameters().values())
        gradients.append(_gradient(roles))
    assert gradients[0].norm() > 1e-4
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)


KLEIN_DOUBLE = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj "
    "attn.to_add_out ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out"
)
WAN_BLOCK = (
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k attn2.to_v "
    "attn2.to_out.0 ffn.net.0.proj ffn.net.2"
)
Z_BLOCK = (
    "attention.to_q attention.to_k attention.to_v attention.to_out.0 "
    "feed_forward.w1 feed_forward.w2 feed_forward.w3"
)


@pytest.mark.parametrize("name", NAMES)
def test_lora_reaches_attention_and_feed_forward_of_every_block(root: Path, name: str) -> None:
    blocks = {
        "klein": {
            "transformer_blocks.0": KLEIN_DOUBLE,
            "transformer_blocks.1": KLEIN_DOUBLE,
            "single_transformer_blocks.0": "attn.to_qkv_mlp_proj attn.to_out",
            "single_transformer_blocks.1": "attn.to_qkv_mlp_proj attn.to_out",
        },
        "z-image": dict.fromkeys(
            ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"), Z_BLOCK
        ),
        "wan": dict.fromkeys(("blocks.0", "blocks.1"), WAN_BLOCK),
    }[name]
    expected = {f"{block}.{part}" for block, parts in blocks.items() for part in parts.split()}
    roles = _roles(family_of(name, root), checkpointing=False)
    for role in ("student", "teacher"):
        names = roles[role].parameters()
        found = {key.removesuffix(".lora_A.weight") for key in names if ".lora_A." in key}
        assert found == expected
    assert roles.matched["student"] == len(expected) == {"wan": 20}.get(name, 28)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded_before_it_is_used(root: Path, name: str) -> None:
    family = family_of(name, root)
    family.network()
    family.grid(4, (16, 8, 8))
    family.fingerprint()
    assert family._loaded == {}
    family.encode([Example("a", size=(32, 32), num_frames=5)], privileged=False)
    assert list(family._loaded) == ["text_encoder"]


@pytest.mark.parametrize("name", NAMES)
def test_released_and_offloaded_encoders_give_the_same(root: Path, name: str) -> None:
    family, offloaded = family_of(name, root), family_of(name, root, offload="encoders")
    items = examples_of(name, 1)
    first = family.encode(items)[0]
    family.release()
    for again in (family.encode(items)[0], offloaded.encode(items)[0]):
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_the_fingerprint_follows_what_alters_an_encoding(root: Path, name: str) -> None:
    base = family_of(name, root).fingerprint()
    assert family_of(name, root).fingerprint() == base
    other = {"shift": 3.0, "vae_tiling": True} if name == "wan" else {"noise_grid": "reference"}
    assert family_of(name, root, attention="sdpa", **other).fingerprint() == base
    changes: list[dict[str, Any]] = [{"dtype": "bf16"}, {"max_sequence_length": 32}]
    changes += {
        "klein": [{"view": "detailed-prompt"}, {"suffix": "x"}],
        "z-image": [{"view": "detailed-prompt"}, {"vlm_rope_base": 1e6}],
        "wan": [{"negative_prompt": "bad"}, {"vae_dtype": "bf16"}],
    }[name]
    prints = {family_of(name, root, **change).fingerprint() for change in changes}
    assert len(prints | {base}) == len(changes) + 1


def test_batches_of_unlike_examples_are_refused(root: Path) -> None:
    family = klein(root)
    with pytest.raises(UserError, match="how many references"):
        batch_of(family, [*examples(1), *examples(1, references=1)])
    with pytest.raises(UserError, match=r"differ in latents: \(16, 16, 16\), \(16, 8, 8\)"):
        batch_of(family, [*examples(1), *examples(1, size=64)])
