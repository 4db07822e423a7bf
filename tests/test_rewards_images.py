import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision
from transformers import CLIPConfig, CLIPModel

from diffdistill.errors import UserError
from diffdistill.rewards.aesthetic import Aesthetic
from diffdistill.rewards.clip import Clip
from diffdistill.rewards.hps_v2 import HPSv2
from diffdistill.rewards.images import ImageReward, Preparation, prepared
from diffdistill.rewards.pickscore import PickScore
from tests import tiny
from tests.conftest import CPU
from tests.test_rewards import assert_frozen, assert_gradient_is_the_slope, videos

MODEL = "tiny-clip-of-the-tests"
PROMPTS = ["a red fox", "two boats", "a red fox"]
NORMAL = Preparation((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny OpenCLIP and return the file of its weights."""
    folder = tmp_path_factory.mktemp("clip")
    settings = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    (folder / f"{MODEL}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder / f"{MODEL}.json")
    torch.manual_seed(0)
    network = open_clip.create_model(MODEL)
    weights = {k: v.clone() for k, v in network.state_dict().items() if k != "attn_mask"}
    save_file(weights, folder / "clip.safetensors")
    return folder / "clip.safetensors"


@pytest.fixture(scope="module")
def pickscore_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny CLIPModel with a tokenizer."""
    folder = tmp_path_factory.mktemp("pickscore")
    words = tiny.tokenizer()
    shared = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=shared | ids | {"vocab_size": len(words), "max_position_embeddings": 32},
        vision_config=shared | {"image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(str(folder))
    words.save_pretrained(str(folder))
    return folder


def laion_head(width: int, file: Path) -> nn.Sequential:
    """Save a head in the layout of the improved aesthetic predictor."""
    sizes = [width, 12, 10, 6, 4, 1]
    torch.manual_seed(1)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    names = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
    state = {
        f"{name}.{key}": value.detach()
        for name, layer in zip(names, layers, strict=True)
        for key, value in layer.state_dict().items()
    }
    torch.save(state, file)
    return nn.Sequential(*layers)


Maker = Callable[..., ImageReward]


@pytest.fixture(scope="module")
def make(clip_weights: Path, pickscore_folder: Path, tmp_path_factory: Any) -> Maker:
    head = tmp_path_factory.mktemp("head") / "head.pth"
    laion_head(8, head)

    def made(kind: type[ImageReward], **options: Any) -> ImageReward:
        given: dict[type, dict[str, Any]] = {
            Clip: {"model": MODEL, "path": str(clip_weights)},
            HPSv2: {"model": MODEL, "path": str(clip_weights)},
            PickScore: {"path": str(pickscore_folder)},
            Aesthetic: {"model": MODEL, "path": str(clip_weights), "head": str(head)},
        }
        return kind(device=CPU, **{**given[kind], **options})

    return made


def network(reward: Any) -> nn.Module:
    found: nn.Module = reward.network if isinstance(reward, PickScore) else reward.clip.network
    return found


KINDS = [Clip, HPSv2, PickScore, Aesthetic]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope(make: Maker, kind: type[ImageReward]) -> None:
    reward: Any = make(kind, num_frames=None)
    network(reward).double()
    reward.weights_dtype = torch.float64
    if kind is Aesthetic:
        reward.predictor.double()
    pixels = videos(size=(2, 3, 3, 12, 10))
    assert_gradient_is_the_slope(reward, pixels, PROMPTS[:2], eps=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Clip, HPSv2, PickScore])
def test_scores_of_bf16_weights_are_not_rounded_to_bf16(
    make: Maker, kind: type[ImageReward]
) -> None:
    reward: Any = make(kind, dtype="bf16", num_frames=None)
    (axis,) = reward.axes
    base = videos(size=(1, 1, 3, 8, 8))
    pixels = torch.cat([base + 0.02 * step for step in range(16)]).clamp(0, 1).requires_grad_()
    scores = reward.score(pixels, ["a red fox"] * 16)[axis]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_the_cosine_is_the_float32_one_of_bf16_features(make: Maker) -> None:
    reward: Any = make(Clip, dtype="bf16", num_frames=None)
    pixels = videos(size=(3, 1, 3, 12, 10))
    model, tokenizer, preparation = reward.clip
    with torch.no_grad():
        seen = model.encode_image(prepared(pixels[:, 0], preparation, "crop").bfloat16())
        told = model.encode_text(tokenizer(PROMPTS))
    expected = nn.functional.cosine_similarity(seen.float(), told.float(), dim=-1)
    torch.testing.assert_close(reward.score(pixels, PROMPTS)["text"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_judging_is_the_same_in_any_micro_batch_and_leaves_no_gradient(
    make: Maker, kind: type[ImageReward]
) -> None:
    reward = make(kind, num_frames=2)
    pixels = videos(size=(3, 5, 3, 8, 8))
    whole = reward.judge(pixels, PROMPTS, saliency=True, micro_batch=3)
    parts = reward.judge(pixels, PROMPTS, saliency=True, micro_batch=1)
    (axis,) = reward.axes
    torch.testing.assert_close(whole.scores[axis], parts.scores[axis])
    torch.testing.assert_close(whole.saliency[axis], parts.saliency[axis])
    assert whole.saliency[axis].shape == (3, 5, 8, 8)
    assert_frozen(network(reward))


@pytest.mark.parametrize("kind", KINDS)
def test_the_vision_network_runs_once_a_micro_batch(make: Maker, kind: type[ImageReward]) -> None:
    reward = make(kind)
    calls: list[int] = []
    tower = network(reward)
    vision_tower = tower.vision_model if kind is PickScore else tower.visual
    vision_tower.register_forward_hook(lambda *_: calls.append(1))
    reward.judge(videos(size=(3, 2, 3, 8, 8)), PROMPTS, saliency=True, micro_batch=2)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_that_are_not_finite_never_reach_the_loss(
    make: Maker, kind: type[ImageReward]
) -> None:
    pixels = videos(size=(3, 2, 3, 8, 8))
    pixels[1] = torch.nan
    with pytest.raises(UserError, match=f"reward {kind.__name__}: axis .* 'two boats'"):
        make(kind).judge(pixels, PROMPTS, saliency=False, micro_batch=3)


def test_clip_is_the_cosine_that_open_clip_gives(make: Maker, clip_weights: Path) -> None:
    reward = make(Clip, num_frames=None)
    model = open_clip.create_model(MODEL, pretrained=str(clip_weights)).eval()
    pixels = videos(size=(3, 2, 3, 8, 8))
    tokens = open_clip.get_tokenizer(MODEL)(PROMPTS)
    visual: Any = model.visual
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (visual.image_mean, visual.image_std))
    with torch.no_grad():
        seen = model.encode_image((pixels.flatten(0, 1) - mean) / std, normalize=True)
        told = model.encode_text(tokens, normalize=True).repeat_interleave(2, dim=0)
    expected = (seen * told).sum(-1).unflatten(0, (3, 2)).mean(1)
    torch.testing.assert_close(reward.score(pixels, PROMPTS)["text"], expected)


def test_hps_reads_the_published_layout(make: Maker, clip_weights: Path, tmp_path: Path) -> None:
    published = {"epoch": 1, "name": "x", "state_dict": load_file(clip_weights)}
    torch.save(published, tmp_path / "HPS_v2_compressed.pt")
    pixels = videos(size=(3, 2, 3, 8, 8))
    expected = make(Clip).score(pixels, PROMPTS)["text"]
    found = make(HPSv2, path=str(tmp_path / "HPS_v2_compressed.pt")).score(pixels, PROMPTS)
    torch.testing.assert_close(found["preference"], expected)


def test_pickscore_is_what_transformers_clip_gives(make: Maker, pickscore_folder: Path) -> None:
    reward: Any = make(PickScore, num_frames=None)
    model = CLIPModel.from_pretrained(str(pickscore_folder)).eval()
    pixels = videos(size=(3, 1, 3, 8, 8))
    tokens = reward.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    mean, std = reward.preparation.mean, reward.preparation.std
    with torch.no_grad():
        output = model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=vision.normalize(pixels[:, 0], list(mean), list(std)),
        )
    expected = output.logits_per_image.diagonal()
    scores = reward.score(pixels, PROMPTS)
    torch.testing.assert_close(scores["preference"], expected)
    torch.testing.assert_close(reward.normalized(scores)["preference"], expected / 26)


@pytest.mark.parametrize("layout", ["laion", "linear"])
def test_the_aesthetic_head_is_a_row_of_linear_layers(
    make: Maker, tmp_path: Path, layout: str
) -> None:
    file = tmp_path / "head.pth"
    head: nn.Module = laion_head(8, file)
    if layout == "linear":
        head = nn.Linear(8, 1)
        file = tmp_path / "head.safetensors"
        save_file(head.state_dict(), file)
    reward: Any = make(Aesthetic, head=str(file))
    pixels = videos(size=(3, 1, 3, 8, 8))
    images = prepared(pixels[:, 0], reward.clip.preparation, "crop")
    expected = head(reward.clip.network.encode_image(images, normalize=True))[:, 0]
    torch.testing.assert_close(reward.score(pixels, PROMPTS)["aesthetic"], expected)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.ones(1, 8)}, "expected layers.0.* or one linear layer, found fc.w"),
        ({"weight": torch.ones(1, 9), "bias": torch.ones(1)}, r"weight is \[1, 9\], but takes 8"),
        ({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, "it gives 2 numbers, not one"),
        ({"weight": torch.ones(1, 8), "bias": torch.ones(2)}, "cannot load head"),
    ],
)
def test_another_head_is_an_error(
    make: Maker, tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(UserError, match=f"reward Aesthetic: .*{message}"):
        make(Aesthetic, head=str(tmp_path / "head.pth"))


def test_missing_and_wrong_weights_are_errors(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reward Clip: set path to a file of OpenCLIP weights"):
        Clip(device=CPU)
    with pytest.raises(UserError, match=r"HPSv2: path: .*absent.pt does not exist; it should be H"):
        make(HPSv2, path=str(tmp_path / "absent.pt"))
    with pytest.raises(UserError, match="model 'ViT-Z' is no built-in OpenCLIP architecture"):
        make(Clip, model="ViT-Z")
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"reward Clip: cannot load .*other.safetensors as OpenCLI"):
        make(Clip, path=str(tmp_path / "other.safetensors"))
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"reward Clip: cannot load .*text.pt"):
        make(Clip, path=str(tmp_path / "text.pt"))
    with pytest.raises(UserError, match=r"PickScore: cannot load .* as a CLIPModel"):
        make(PickScore, path=str(tmp_path))


def test_a_clip_model_without_all_its_weights_is_an_error(
    make: Maker, pickscore_folder: Path, tmp_path: Path
) -> None:
    for file in pickscore_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    weights = {k: v for k, v in weights.items() if k != "visual_projection.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, such as visual_projection.weight"):
        make(PickScore, path=str(tmp_path))


@pytest.mark.parametrize(
    ("total", "num_frames", "chosen"),
    [
        (9, 3, [1, 4, 7]),
        (9, 1, [4]),
        (5, None, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),
        (80, 4, [10, 30, 50, 70]),
    ],
)
def test_the_frames_are_the_middles_of_equal_parts(
    make: Maker, total: int, num_frames: int | None, chosen: list[int]
) -> None:
    reward = make(Clip, num_frames=num_frames)
    pixels = torch.arange(float(total)).view(1, total, 1, 1, 1).expand(1, total, 3, 2, 2)
    assert reward.seen(pixels)[0, :, 0, 0, 0].tolist() == chosen


def test_a_frame_that_was_not_scored_has_the_saliency_of_its_part(make: Maker) -> None:
    reward = make(Clip, num_frames=2)
    pixels = videos(size=(1, 6, 3, 8, 8))
    saliency = reward.saliency(pixels, PROMPTS[:1])["text"][0]
    for frame in range(6):
        assert torch.equal(saliency[frame], saliency[1 if frame < 3 else 4])
    assert not torch.equal(saliency[0], saliency[3])


@pytest.mark.parametrize("num_frames", [1, 2, 8, 16])
def test_a_scored_frame_has_its_own_saliency_and_any_other_that_of_the_nearest(
    make: Maker, num_frames: int
) -> None:
    reward = make(Clip, num_frames=num_frames)
    for total in range(1, 130):
        videos = torch.arange(float(total)).view(1, total, 1, 1, 1).expand(1, total, 3, 1, 1)
        chosen = reward.seen(videos)
        found = reward.places(chosen[:, :, :1], videos)[0, :, 0, 0].tolist()
        scored = chosen[0, :, 0, 0, 0].tolist()
        assert [found[int(frame)] for frame in scored] == scored
        for frame, source in enumerate(found):
            assert abs(frame - source) == min(abs(frame - other) for other in scored)


def test_squashing_cropping_and_padding_agree_where_the_shape_fits() -> None:
    images = videos()[:, 0, :, :6, :]
    sized = [prepared(images, NORMAL, fit) for fit in ("squash", "crop", "pad")]
    torch.testing.assert_close(sized[0], sized[1])
    torch.testing.assert_close(sized[0], sized[2])


def test_cropping_takes_the_center_and_padding_adds_black() -> None:
    images = torch.zeros(1, 3, 8, 16)
    images[..., 4:12] = 0.75
    torch.testing.assert_close(prepared(images, NORMAL, "crop"), torch.full((1, 3, 8, 8), 0.75))
    padded = prepared(images, NORMAL, "pad")
    assert padded.shape == (1, 3, 8, 8)
    assert padded[..., :2, :].abs().max() == padded[..., 6:, :].abs().max() == 0
    assert padded[..., 2:6, 3:5].min() > 0.7


def test_resizing_is_torchvisions_and_white_keeps_its_gradient() -> None:
    images = videos(size=(3, 1, 3, 20, 20))[:, 0]
    expected = vision.resize(
        images, [8, 8], interpolation=vision.InterpolationMode.BICUBIC, antialias=True
    )
    torch.testing.assert_close(prepared(images, NORMAL, "crop"), expected)
    white = torch.ones(1, 3, 20, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(prepared(white, NORMAL, "crop").sum(), white)
    assert gradient.min() > 0
