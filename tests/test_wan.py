"""Wan, on tiny random models with VAEs like those of Wan2.1 and of Wan2.2-TI2V-5B."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.methods.sft import SFT
from diffdistill.pipelines.wan import NEGATIVE_PROMPT, Wan, _inputs
from diffdistill.readouts import clean_of
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.types import Example, Progress, State
from tests import tiny
from tests.conftest import CPU, randn

LIKE = ("2.1", "2.2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tiny checkpoints."""
    folder = tmp_path_factory.mktemp("wan")
    for like in LIKE:
        tiny.save_wan(folder / like, like=like)
    return folder


def wan(root: Path, like: str = "2.1", **options: Any) -> Wan:
    """Return the tiny Wan."""
    return Wan(path=str(root / like), device=CPU, **({"max_sequence_length": 32} | options))


def video(num_frames: int = 9, height: int = 32, width: int = 64, seed: int = 0) -> Tensor:
    """Return random pixels ``[T, 3, H, W]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_frames, 3, height, width, generator=generator)


def batch_of(family: Wan, *prompts: str, num_frames: int = 9) -> dict[str, Any]:
    """Return a batch of videos to be generated, 32 by 64 pixels."""
    items = [Example(prompt, size=(32, 64), num_frames=num_frames) for prompt in prompts]
    batch = family.collate(family.encode(items))
    return batch | {"ids": torch.arange(len(items)), "prompts": list(prompts)}


def noise_of(family: Wan, batch: dict[str, Any]) -> Tensor:
    return Draws(1).normal("noise", batch["ids"], family.latent_shape(batch))


@pytest.mark.parametrize("like", LIKE)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_wan_samples_what_its_pipeline_samples(root: Path, like: str, num_steps: int) -> None:
    family, prompts = wan(root, like), ["a cat", "a much bigger dog"]
    network, batch = family.network(), batch_of(family, *prompts)
    noise = noise_of(family, batch)
    latents = family.sample(
        lambda state, condition: family.predict(network, state, condition),
        family.condition(batch),
        noise,
        num_steps=num_steps,
    )
    pipeline = WanPipeline.from_pretrained(str(root / like))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = tiny.EvenSigmas(shift=5.0)
    arguments = {
        "prompt": prompts,
        "height": 32,
        "width": 64,
        "num_frames": 9,
        "num_inference_steps": num_steps,
        "guidance_scale": 1.0,
        "latents": noise,
        "max_sequence_length": 32,
    }
    expected = pipeline(**arguments, output_type="latent").frames
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    pixels = pipeline(**arguments, output_type="pt").frames
    torch.testing.assert_close(family.decode(latents), pixels, atol=1e-5, rtol=0)


def test_the_grid_is_that_of_the_distilled_models(root: Path) -> None:
    grid = wan(root).grid(4, (16, 3, 4, 8))
    torch.testing.assert_close(grid, torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(grid, scheduler.sigmas)
    scheduler.set_timesteps(4)
    assert (grid - scheduler.sigmas).abs().max() > 0.5
    assert wan(root, shift=1.0).grid(2, ()).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("like", LIKE)
def test_one_time_for_all_frames_is_that_time_for_each(root: Path, like: str) -> None:
    family = wan(root, like)
    network, batch = family.network(), batch_of(family, "a", "b")
    x, t = noise_of(family, batch), torch.tensor([0.3, 0.8])
    condition = family.condition(batch)
    whole = family.predict(network, State(x, t), condition)
    each = family.predict(network, State(x, t[:, None].expand(2, 3)), condition)
    torch.testing.assert_close(each, whole, atol=1e-5, rtol=0)


def test_each_frame_is_told_its_own_time(root: Path) -> None:
    family = wan(root)
    network, batch = family.network(), batch_of(family, "a", "b")
    t = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    told = _inputs(network, State(noise_of(family, batch), t), family.condition(batch))
    # 2 by 4 patches in a frame
    torch.testing.assert_close(
        told["timestep"].reshape(2, 3, 8), 1000 * t[..., None].expand(2, 3, 8)
    )


def test_frames_of_different_noise_levels_come_back_clean(root: Path) -> None:
    family, t = wan(root), torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.25, 0.75]])
    data, noise = randn(2, 16, 3, 4, 8, seed=0), randn(2, 16, 3, 4, 8, seed=1)
    state = family.noise(data, t, noise)
    assert torch.equal(state.x[0, :, 0], data[0, :, 0])
    assert torch.equal(state.x[0, :, 2], noise[0, :, 2])
    torch.testing.assert_close(clean_of(state, noise - data), data)
    same = family.noise(data, torch.tensor([0.5, 0.5]), noise)
    assert torch.equal(family.noise(data, torch.full((2, 3), 0.5), noise).x, same.x)


@pytest.mark.parametrize(("like", "shape"), [("2.1", (16, 3, 4, 8)), ("2.2", (48, 3, 2, 4))])
def test_latents_are_the_normalized_mode_of_the_vae(
    root: Path, like: str, shape: tuple[int, ...]
) -> None:
    family, pixels = wan(root, like), video()
    latents = family.encode([Example("a", video=pixels)])[0]["latents"]
    assert latents.shape == shape
    assert latents.dtype == torch.float32
    vae = WanPipeline.from_pretrained(str(root / like)).vae
    with torch.no_grad():
        mode = vae.encode((2 * pixels - 1).transpose(0, 1)[None]).latent_dist.mode()[0]
    mean, std = _statistics(vae)
    torch.testing.assert_close(latents, (mode - mean) / std, atol=1e-5, rtol=0)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, std = (torch.tensor(value)[:, None, None, None] for value in values)
    return mean, std


@pytest.mark.parametrize(("like", "multiple"), [("2.1", 16), ("2.2", 32)])
def test_strides_are_those_of_the_vae_and_the_patches(root: Path, like: str, multiple: int) -> None:
    family = wan(root, like)
    assert (family.time_stride, family.multiple()) == (4, multiple)
    assert [family.num_latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [family.num_pixel_frames(n) for n in (1, 2, 21)] == [1, 5, 81]
    decoded = family.decode(torch.zeros(1, family._channels(), 2, 2, 2))
    assert decoded.shape == (1, 5, 3, 2 * family.space_stride, 2 * family.space_stride)


@pytest.mark.parametrize("num_frames", [0, 2, 4, 80])
def test_other_numbers_of_frames_are_refused(root: Path, num_frames: int) -> None:
    family = wan(root)
    with pytest.raises(UserError, match=f"{num_frames} frames: .* 1 plus a multiple of 4"):
        family.num_latent_frames(num_frames)


def test_an_example_that_cannot_be_encoded_is_named(root: Path) -> None:
    family = wan(root)
    for example, message in (
        (Example("a", origin="p:1"), "p:1: neither a video, nor a size and a number of frames"),
        (Example("a", size=(32, 32), origin="p:2"), "p:2: neither a video"),
        (Example("a", size=(32, 32), num_frames=6, origin="p:3"), "p:3: 6 frames: .*as 5 or 9"),
        (Example("a", video=video(4), origin="p:4"), "p:4: 4 frames"),
        (Example("a", size=(8, 32), num_frames=5, origin="p:5"), r"p:5: .*under 16 pixels"),
        (Example("a", references=(video()[0],), origin="p:6"), "p:6: Wan takes no reference"),
    ):
        with pytest.raises(UserError, match=message):
            family.encode([example])


def test_an_image_is_a_video_of_one_frame(root: Path) -> None:
    family, image = wan(root), video(1)[0]
    still, clip = family.encode([Example("a", image=image), Example("a", video=image[None])])
    assert still["latents"].shape == (16, 1, 4, 8)
    assert torch.equal(still["latents"], clip["latents"])


def test_empty_latents_take_no_memory(root: Path) -> None:
    latents = wan(root).encode([Example("a", size=(480, 832), num_frames=81)])[0]["latents"]
    assert latents.shape == (16, 21, 60, 104)
    assert latents.untyped_storage().nbytes() == 4
    assert not latents.any()


def test_texts_are_padded_with_zeros_as_the_pipeline_does(root: Path) -> None:
    family = wan(root)
    condition = family.condition(batch_of(family, "a cat", "a dog &amp;  two", ""))
    pipeline = WanPipeline.from_pretrained(str(root / "2.1"))
    expected, _ = pipeline.encode_prompt(
        ["a cat", "a dog &amp;  two", ""], do_classifier_free_guidance=False, max_sequence_length=32
    )
    torch.testing.assert_close(condition["text"], expected, atol=1e-6, rtol=0)
    assert [int(text.any(dim=1).sum()) for text in condition["text"]] == [6, 12, 1]


def test_guidance_leads_away_from_the_negative_prompt(root: Path) -> None:
    family = wan(root)
    batch = batch_of(family, "a cat", NEGATIVE_PROMPT)
    assert torch.equal(family.condition(batch, negative=True)["text"][0], batch["text"][1])
    family = wan(root, negative_prompt="ugly")
    batch = batch_of(family, "a cat", "ugly")
    assert torch.equal(family.condition(batch, negative=True)["text"][0], batch["text"][1])


@pytest.mark.parametrize("names", [["encoder.embed_tokens"], ["encoder.embed_tokens", "shared"]])
def test_the_word_embeddings_are_found_under_either_name(
    root: Path, tmp_path: Path, names: list[str]
) -> None:
    tiny.save_wan(tmp_path / "2.1")
    file = tmp_path / "2.1" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    words = state.pop("shared.weight")
    state |= {f"{name}.weight": words.clone() for name in names}
    save_file(state, file, metadata={"format": "pt"})
    ours, theirs = (batch_of(wan(folder), "a cat")["text"] for folder in (tmp_path, root))
    assert torch.equal(ours, theirs)


def test_features_are_the_tokens_of_the_middle_block(root: Path) -> None:
    family = wan(root)
    batch = batch_of(family, "a", "b")
    state = State(noise_of(family, batch), torch.tensor([0.3, 0.8]))
    condition, network = family.condition(batch), tiny.wan_transformer(num_layers=1)
    features = family.features(network, state, condition)
    assert features.shape == (2, 3 * 2 * 4, 24)
    time = network.condition_embedder(state.t * 1000, condition["text"])[0]
    shift, scale = (network.scale_shift_table + time[:, None]).chunk(2, dim=1)
    patches = network.proj_out(network.norm_out(features) * (1 + scale) + shift)
    patches = patches.reshape(2, 3, 2, 4, 2, 2, 16).permute(0, 6, 1, 2, 4, 3, 5)
    expected = family.predict(network, state, condition)
    torch.testing.assert_close(patches.reshape(expected.shape), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("like", LIKE)
def test_tiles_decode_to_almost_the_same_pixels(root: Path, like: str) -> None:
    whole, tiled = wan(root, like), wan(root, like, vae_tiling=True)
    side = 320 // whole.space_stride
    latents = randn(1, whole._channels(), 2, 2, side, seed=0)
    pixels, other = whole.decode(latents), tiled.decode(latents)
    assert other.shape == pixels.shape == (1, 5, 3, 2 * whole.space_stride, 320)
    assert 0 < (other - pixels).abs().mean() < 0.05
    vae = WanPipeline.from_pretrained(str(root / like)).vae
    vae.enable_tiling()
    mean, std = _statistics(vae)
    with torch.no_grad():
        expected = vae.decode(latents * std + mean).sample.transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)
    wide = Example("a", video=video(5, 32, 320))
    assert torch.equal(tiled.encode([wide])[0]["latents"], whole.encode([wide])[0]["latents"])


def test_two_experts_are_refused(root: Path, tmp_path: Path) -> None:
    tiny.save_wan(tmp_path / "2.1")
    kind = ["diffusers", "WanTransformer3DModel"]
    tiny.edit_json(tmp_path / "2.1" / "model_index.json", transformer_2=kind)
    with pytest.raises(UserError, match=r"transformer_2 \(Wan2.2-A14B\); .* not supported"):
        wan(tmp_path).network()
    with pytest.raises(UserError, match="transformer_2"):
        wan(root).network(str(tmp_path / "2.1"))


def test_transformers_of_other_latents_are_refused(root: Path, tmp_path: Path) -> None:
    tiny.wan_transformer(in_channels=36).save_pretrained(str(tmp_path / "i2v"))
    with pytest.raises(UserError, match=r"reads 36 channels and the VAE .* has 16; image-to-video"):
        wan(root).network(str(tmp_path / "i2v"))
    with pytest.raises(UserError, match=r"reads 48 channels and the VAE .* has 16"):
        wan(root).network(str(root / "2.2"))
    wan(root).network(str(root / "2.1" / "transformer"))


def test_another_text_encoder_is_refused(tmp_path: Path) -> None:
    tiny.save_wan(tmp_path / "2.1")
    tiny.edit_json(tmp_path / "2.1" / "text_encoder" / "config.json", model_type="t5")
    with pytest.raises(UserError, match="found model type 't5', needed 'umt5'"):
        batch_of(wan(tmp_path), "a")


def test_there_is_no_privileged_view(root: Path) -> None:
    family = wan(root)
    batch = batch_of(family, "a")
    with pytest.raises(UserError, match="Wan has no privileged view"):
        family.condition(batch, exposure=1.0)


def test_a_student_learns_from_videos_with_a_head_on_its_features(root: Path) -> None:
    family = wan(root)
    settings = RoleSettings(adapter="lora", rank=2, alpha=2.0, head=True)
    student = build_roles({"student": settings}, family)["student"]
    items = [Example(prompt, video=video(seed=i)) for i, prompt in enumerate(("a", "b"))]
    batch = family.collate(family.encode(items)) | {"ids": torch.arange(2), "prompts": ["a", "b"]}
    for loss in SFT(family=family, draws=Draws(0), student=student).losses(batch, Progress(0, 1)):
        loss.value.backward()
    assert any(p.grad.abs().max() > 0 for p in student.parameters().values() if p.grad is not None)
    state = State(family.clean(batch), torch.tensor([0.5, 0.5]))
    assert student.discriminate(state, family.condition(batch)).shape == (2,)
