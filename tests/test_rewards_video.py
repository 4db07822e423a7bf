import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLVideoProcessor

from diffdistill.errors import UserError
from diffdistill.rewards import video_reward
from diffdistill.rewards.video_reward import VideoReward, packed, unpacked
from diffdistill.rewards.video_reward_checkpoint import read_template
from tests import tiny
from tests.conftest import CPU, randn
from tests.test_rewards import assert_frozen, assert_gradient_is_the_slope, videos

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

SIDE = 4
"""Pixels of a patch; two by two patches make one token."""
PROMPTS = ["a red fox", "two boats on a lake", "rain"]
TEMPLATE = "Quality: <|VQ_reward|>\nMotion: <|MQ_reward|>\nOf {text_prompt}: <|TA_reward|>\n"
CHAT = tiny.CHAT_TEMPLATE.replace(
    "{% else %}{{ c.text }}",
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}",
)


def reward_tokenizer() -> Any:
    words = tiny.tokenizer()
    words.chat_template = CHAT
    words.add_tokens(list(video_reward.TOKENS.values()), special_tokens=True)
    return words


def base_model(size: int) -> Qwen2VLForConditionalGeneration:
    words = tiny.tokenizer()
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in tiny.VISION_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": size,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": SIDE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config)


def old_name(key: str) -> str:
    """Return what transformers 4.45, with which VideoAlign was trained, called a weight."""
    key = key.replace("base_model.model.model.visual.", "base_model.model.visual.")
    return key.replace("base_model.model.model.language_model.", "base_model.model.model.")


class Saved:
    """A tiny VideoReward in the published layout, and the model it was saved from."""

    def __init__(self, folder: Path, layout: str = "model.pth", head_rows: int = 1) -> None:
        self.folder, self.base = folder / "VideoReward", folder / "Qwen2-VL"
        words = reward_tokenizer()
        model = base_model(len(tiny.tokenizer()) + 6)  # the published table has spare rows too
        model.save_pretrained(str(self.base))
        tiny_words = tiny.tokenizer()
        tiny_words.chat_template = CHAT
        tiny_words.save_pretrained(str(self.base))
        model.resize_token_embeddings(len(words))
        model.rm_head = nn.Linear(16, head_rows, bias=False)
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and not any(part in name for part in ("lm_head", "rm_head", "visual"))
        ]
        lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(model, lora).eval()
        for name, parameter in self.model.named_parameters():
            noise = randn(*parameter.shape, seed=len(name)) * 0.2
            if "rm_head" in name:
                parameter.data = noise * 5
            elif "lora_B" in name or (layout != "model.pth" and "embed_tokens" in name):
                parameter.data = noise
        checkpoint = self.folder / "checkpoint-20"
        (self.folder / "checkpoint-3").mkdir(parents=True)
        checkpoint.mkdir()
        self.checkpoint = checkpoint
        self._save_weights(layout)
        words.save_pretrained(str(checkpoint / "tokenizer"))
        (self.folder / "prompt_template.txt").write_text(TEMPLATE)
        self.settings: dict[str, Any] = {
            "data_config": {"prompt_template_type": "detailed_special"},
            "model_config": {"use_special_tokens": True, "reward_token": "special"},
            "peft_lora_config": {"lora_r": 3, "lora_alpha": 6, "use_rslora": False},
            "inference_config": {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": 1.0, "MQ_std": 4.0},
        }
        self.write_settings()
        self.words = words

    def write_settings(self) -> None:
        (self.folder / "model_config.json").write_text(json.dumps(self.settings))

    def state(self) -> dict[str, Tensor]:
        return {old_name(k): v.detach().clone() for k, v in self.model.state_dict().items()}

    def _save_weights(self, layout: str) -> None:
        if layout == "model.pth":
            torch.save(self.state(), self.checkpoint / "model.pth")
        elif layout == "model.safetensors":
            kept = {k: v for k, v in self.state().items() if "lm_head" not in k}
            save_file(kept, self.checkpoint / "model.safetensors")
        else:
            adapter = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            adapter = {old_name(k): v.clone() for k, v in adapter.items()}
            save_file(adapter, self.checkpoint / "adapter_model.safetensors")
            rest = {k: v for k, v in self.state().items() if "embed_tokens" in k or "rm_head" in k}
            torch.save(rest, self.checkpoint / "non_lora_state_dict.pth")

    def reward(self, **options: Any) -> VideoReward:
        given = {"path": str(self.folder), "base_path": str(self.base), "height": 16, "width": 24}
        return VideoReward(device=CPU, **{**given, **options})

    def logits(self, pixels: Tensor, prompt: str) -> Tensor:
        """Return what PEFT's model says at the three tokens of one video, ``[3]``."""
        processor = Qwen2VLVideoProcessor(patch_size=SIDE, merge_size=2, temporal_patch_size=2)
        inputs = processor(
            videos=[pixels],
            do_rescale=False,
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,
            return_tensors="pt",
        )
        count = inputs["video_grid_thw"].prod().item() // 4
        written = {"type": "text", "text": TEMPLATE.replace("{text_prompt}", prompt)}
        turn = {"role": "user", "content": [{"type": "video"}, written]}
        text = self.words.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        text = text.replace("<|video_pad|>", "<|video_pad|>" * count)
        ids = torch.tensor([self.words(text)["input_ids"]])
        inner = self.model.base_model.model
        with torch.no_grad():
            states = inner.model(
                input_ids=ids,
                pixel_values_videos=inputs["pixel_values_videos"],
                video_grid_thw=inputs["video_grid_thw"],
                position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1),
            ).last_hidden_state
            logits = inner.rm_head(states)[0]
        at = [self.words.convert_tokens_to_ids(t) for t in video_reward.TOKENS.values()]
        rows = torch.stack([logits[(ids[0] == token).nonzero().item()] for token in at])
        return rows[:, 0] if rows.shape[1] == 1 else rows.diagonal()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("video-reward"))


@pytest.mark.parametrize(
    ("layout", "head_rows"),
    [("model.pth", 1), ("model.pth", 3), ("model.safetensors", 1), ("pair", 1)],
)
def test_the_scores_are_those_of_the_adapted_model(
    tmp_path: Path, layout: str, head_rows: int
) -> None:
    saved = Saved(tmp_path, layout, head_rows)
    pixels = videos(size=(3, 6, 3, 16, 24))
    scores = saved.reward().score(pixels, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        found = torch.stack([scores[axis][row] for axis in ("visual", "motion", "text")])
        torch.testing.assert_close(found, saved.logits(pixels[row], prompt), rtol=1e-4, atol=1e-5)
    assert scores["visual"].std() > 1e-3


def test_patches_are_in_the_order_of_transformers_and_come_back_in_rows() -> None:
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    processor = Qwen2VLVideoProcessor(patch_size=SIDE, merge_size=2, temporal_patch_size=2, **plain)
    pixels = videos(size=(2, 6, 3, 16, 24))
    expected = processor(
        videos=list(pixels),
        do_rescale=False,
        do_resize=False,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )["pixel_values_videos"]
    patches = packed(pixels, 2, 2, SIDE)
    assert torch.equal(patches.flatten(0, 1), expected)
    grid = (3, 16 // SIDE, 24 // SIDE)
    means = pixels.unfold(3, SIDE, SIDE).unfold(4, SIDE, SIDE).mean(dim=(2, 5, 6))
    in_rows = means.unflatten(1, (3, 2)).mean(dim=2)
    torch.testing.assert_close(unpacked(patches.mean(-1), grid, 2), in_rows)


def test_the_reference_layout_shuffles_cells_within_groups(saved: Saved) -> None:
    pixels = videos(size=(1, 4, 3, 16, 24))
    true = saved.reward().saliency(pixels, PROMPTS[:1])["visual"]
    reference = saved.reward(reference_layout=True).saliency(pixels, PROMPTS[:1])["visual"]
    assert true.shape == reference.shape == (1, 2, 4, 6)
    order = unpacked(torch.arange(48).view(1, 48), (2, 4, 6), 2)
    assert order[0, 0, 0].tolist() == [0, 1, 4, 5, 8, 9]
    torch.testing.assert_close(reference.flatten()[order.flatten()], true.flatten())
    assert not torch.equal(true, reference)


def test_the_saliency_is_the_size_of_the_gradient_in_each_patch(saved: Saved) -> None:
    reward = saved.reward()
    pixels = videos(size=(2, 4, 3, 16, 24))
    leaf = reward.seen(pixels).requires_grad_()
    scores = reward.score_seen(leaf, PROMPTS[:2])
    saliency = reward.saliency(pixels, PROMPTS[:2])
    for axis in reward.axes:
        (gradient,) = torch.autograd.grad(scores[axis].sum(), leaf, retain_graph=True)
        expected = unpacked(gradient.norm(dim=-1), (2, 4, 6), 2)
        torch.testing.assert_close(saliency[axis], expected)


def test_the_gradient_is_the_slope(saved: Saved) -> None:
    reward = saved.reward()
    reward.network.double()
    reward.head = reward.head.double()
    # transformers keeps its norms and rotations in float32
    pixels = videos(size=(2, 4, 3, 20, 30))
    assert_gradient_is_the_slope(reward, pixels, PROMPTS[:2], eps=1e-3, rtol=3e-3)


def test_judging_is_the_same_in_any_micro_batch_and_leaves_no_gradient(saved: Saved) -> None:
    reward = saved.reward()
    pixels = videos(size=(3, 5, 3, 16, 24))
    whole = reward.judge(pixels, PROMPTS, saliency=True, micro_batch=3)
    parts = reward.judge(pixels, PROMPTS, saliency=True, micro_batch=1)
    for axis in reward.axes:
        torch.testing.assert_close(whole.scores[axis], parts.scores[axis], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(whole.saliency[axis], parts.saliency[axis], rtol=1e-3, atol=1e-6)
    assert whole.saliency["text"].shape == (3, 2, 4, 6)
    assert_frozen(reward.network)
    assert not reward.head.requires_grad


@pytest.mark.parametrize("recompute", [True, False])
def test_one_forward_serves_all_axes_with_and_without_recomputing(
    saved: Saved, recompute: bool
) -> None:
    reward = saved.reward(gradient_checkpointing=recompute)
    calls: list[int] = []
    reward.network.language_model.register_forward_hook(lambda *_: calls.append(1))
    pixels = videos(size=(2, 4, 3, 16, 24))
    judged = reward.judge(pixels, PROMPTS[:2], saliency=True, micro_batch=1)
    assert len(calls) == 2
    plain = saved.reward(gradient_checkpointing=False)
    expected = plain.judge(pixels, PROMPTS[:2], saliency=True, micro_batch=1)
    for axis in reward.axes:
        torch.testing.assert_close(judged.saliency[axis], expected.saliency[axis])


@pytest.mark.parametrize(("num_frames", "cells"), [(1, 1), (2, 1), (5, 2), (6, 3)])
def test_an_odd_frame_is_dropped_and_an_image_shown_twice(
    saved: Saved, num_frames: int, cells: int
) -> None:
    reward = saved.reward()
    pixels = videos(size=(1, num_frames, 3, 16, 24))
    judged = reward.judge(pixels, PROMPTS[:1], saliency=True, micro_batch=1)
    assert judged.saliency["motion"].shape[1] == cells


def test_statistics_come_from_the_checkpoint_then_the_paper_and_options_win(saved: Saved) -> None:
    reward = saved.reward(statistics={"motion": (7.0, 8.0)})
    assert reward.statistics == {
        "visual": (0.5, 2.0),
        "motion": (7.0, 8.0),
        "text": (2.8105, 2.5121),
    }


def test_the_base_tokenizer_gets_the_three_tokens_where_the_checkpoint_has_none(
    tmp_path: Path,
) -> None:
    saved = Saved(tmp_path)
    pixels = videos(size=(1, 2, 3, 16, 24))
    expected = saved.reward().score(pixels, PROMPTS[:1])
    (saved.checkpoint / "tokenizer").rename(tmp_path / "elsewhere")
    found = saved.reward().score(pixels, PROMPTS[:1])
    assert torch.equal(found["text"], expected["text"])


def test_a_template_is_read_from_python_without_running_it(tmp_path: Path) -> None:
    file = tmp_path / "prompt_template.py"
    file.write_text(f"raise SystemExit\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {TEMPLATE!r}\n")
    assert read_template("", tmp_path) == TEMPLATE
    assert read_template(str(file), Path("/absent")) == TEMPLATE
    file.write_text("OTHER = 'x'\n")
    with pytest.raises(UserError, match="does not assign DETAILED_PROMPT_WITH_SPECIAL_TOKEN"):
        read_template("", tmp_path)


def without(name: str) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        state = {k: v for k, v in saved.state().items() if name not in k}
        torch.save(state, saved.checkpoint / "model.pth")

    return change


def with_head(*shape: int) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        state = saved.state() | {"base_model.model.rm_head.weight": torch.ones(*shape)}
        torch.save(state, saved.checkpoint / "model.pth")

    return change


def setting(section: str, **changes: Any) -> Callable[[Saved], None]:
    def change(saved: Saved) -> None:
        saved.settings[section] = changes
        saved.write_settings()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("rm_head"), r"no reward head \(rm_head.weight\) in the checkpoint"),
        (with_head(4, 16), r"the reward head rm_head.weight is \[4, 16\], expected \[1, 16\] or"),
        (with_head(1, 8), r"the reward head rm_head.weight is \[1, 8\], expected"),
        (without("visual.merger.mlp.0.weight"), "1 weights are missing, such as visual.merger"),
        (without("layers.0.self_attn.q_proj.lora_B"), "cannot merge .*expected lora_A and lora_B"),
        (setting("peft_lora_config"), "peft_lora_config has no lora_alpha"),
        (setting("model_config", reward_token="last"), "found None and 'last'"),
        (setting("inference_config", VQ_mean=0.0, VQ_std=0.0), "statistics.visual: mean 0.0"),
        (lambda s: (s.checkpoint / "model.pth").unlink(), "has no weights: neither model.pth"),
        (lambda s: (s.checkpoint / "model.pth").write_text("x"), "cannot load .*model.pth"),
        (lambda s: (s.folder / "model_config.json").unlink(), "cannot read .*model_config.json"),
        (lambda s: (s.folder / "prompt_template.txt").unlink(), "template: found no .*github.com"),
        (
            lambda s: (s.folder / "prompt_template.txt").write_text("{text_prompt} <|VQ_reward|>"),
            r"has <\|MQ_reward\|> 0 times",
        ),
    ],
)
def test_what_is_missing_or_wrong_in_a_checkpoint_is_an_error(
    tmp_path: Path, change: Callable[[Saved], Any], message: str
) -> None:
    saved = Saved(tmp_path)
    change(saved)
    with pytest.raises(UserError, match=f"reward VideoReward: .*{message}"):
        saved.reward()


def test_paths_sizes_and_prompts_are_checked(saved: Saved) -> None:
    with pytest.raises(UserError, match="set path to a folder of KwaiVGI/VideoReward"):
        VideoReward(device=CPU)
    with pytest.raises(UserError, match="base_path: /absent does not exist"):
        saved.reward(base_path="/absent")
    with pytest.raises(UserError, match="height 12 and width 24 must be multiples of 8"):
        saved.reward(height=12)
    with pytest.raises(UserError, match=r"puts <\|video_pad\|> 2 times"):
        saved.reward().score(videos(size=(1, 2, 3, 16, 24)), ["a <|video_pad|>"])


def test_pixels_that_are_not_finite_never_reach_the_loss(saved: Saved) -> None:
    pixels = videos(size=(2, 2, 3, 16, 24))
    pixels[1] = torch.nan
    with pytest.raises(UserError, match=r"VideoReward: axis 'visual': its score .* 'two boats"):
        saved.reward().judge(pixels, PROMPTS[:2], saliency=False, micro_batch=2)
