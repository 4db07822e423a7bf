"""Builds the video models of samples/models: digits that move over a torus, and their rewards.

Every part is made here, offline and seeded: a tokenizer of whole words and bytes, a frozen random
UMT5 text encoder, a trained causal autoencoder, a bidirectional Wan transformer that makes clips
from captions such as "a seven moving right, fast" by flow matching, and the three networks of the
`digits-video` reward.

    python scripts/build_video_models.py                  # all: about 30 minutes on 2 free cores
    python scripts/build_video_models.py --only rewards   # keep the other parts
    python scripts/build_video_models.py --quick          # a smoke run
"""

import argparse
import copy
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import logging as diffusers_logging
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.evaluation.moving_digits import (
    NUM_FRAMES,
    SIZE,
    MovingDigitsJudge,
    captions,
    film,
    moving_digits,
)
from diffdistill.pipelines.exporting import export_pipeline
from diffdistill.rewards.digits_video import (
    DIGITS,
    DIRECTIONS,
    SPEEDS,
    DigitsVideoNetworks,
    caption_scores,
    parse_caption,
)

PARTS = ("autoencoder", "teacher", "rewards", "student")
MAX_LENGTH = 16
PAD, END = "<pad>", "</s>"
CHANNELS = 6
LATENT_FRAMES = 9
LATENT_SIZE = 8
SHIFT = 3.0
GUIDANCE = 3.0


@dataclass(frozen=True)
class Recipe:
    """How long and how hard each part is trained."""

    vae_steps: int = 900
    vae_short_steps: int = 300
    vae_batch: int = 16
    vae_long_batch: int = 6
    vae_rate: float = 4e-3
    vae_noise: float = 0.05
    vae_penalty: float = 1e-3
    pool: int = 3200
    flow_steps: int = 7000
    flow_batch: int = 10
    flow_rate: float = 4e-3
    flow_matrix_rate: float = 0.05
    ema_decay: float = 0.995
    reward_pool: int = 1600
    reward_samples: int = 480
    reward_steps: int = 800
    reward_batch: int = 32
    reward_rate: float = 2e-3
    judged: int = 160
    seed: int = 0


QUICK = Recipe(
    vae_steps=10, vae_batch=8, pool=64, flow_steps=6, flow_batch=8, reward_pool=32,
    reward_samples=16, reward_steps=6, reward_batch=8, judged=16,
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with whole-word tokens for captions, byte tokens for all else, and T5's end."""
    words = ["a", "an", "moving", ",", *DIGITS, *DIRECTIONS, *SPEEDS]
    pieces = [PAD, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [variant for word in words for variant in (word, "\u0120" + word)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(END, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="right",
        model_max_length=512,
    )


def build_text_encoder(vocabulary_size: int, seed: int) -> UMT5EncoderModel:
    """A frozen random UMT5 of 2 layers and 32 channels.

    Embeddings are larger than what a layer adds, so that a word stays recognizable. The output is
    eight times as large as usual: words are told apart sooner, at any rate of the transformer.
    """
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=vocabulary_size,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        is_encoder_decoder=False,
    )
    encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    encoder.get_input_embeddings().weight.mul_(4)
    encoder.encoder.final_layer_norm.weight.mul_(8)
    return encoder


def build_vae(seed: int) -> AutoencoderKLWan:
    """An untrained autoencoder with strides of 2: latents ``[B, 6, 9, 8, 8]`` of 17 frames."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )


def build_transformer(seed: int) -> WanTransformer3DModel:
    """An untrained Wan transformer of 1.1 M parameters over 16 tokens per latent frame.

    Its matrices start as in Wan's own code, larger than torch's, and its output as zero.
    """
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def build_pipeline(recipe: Recipe) -> WanPipeline:
    """The untrained pipeline, with Wan's static shift for small videos, 3."""
    tokenizer = build_tokenizer()
    pipeline = WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=build_vae(recipe.seed),
        text_encoder=build_text_encoder(len(tokenizer), recipe.seed),
        tokenizer=tokenizer,
        transformer=build_transformer(recipe.seed),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: a linear warmup, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def to_model(videos: Tensor) -> Tensor:
    """Videos ``[B, T, 3, H, W]`` in [0, 1] as the autoencoder takes them: ``[B, 3, T, H, W]``."""
    return 2 * videos.transpose(1, 2) - 1


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Pixels ``[B, 3, 1 + T, 16, 16]`` of raw latents ``[B, 6, 1 + T / 2, 8, 8]``.

    `AutoencoderKLWan.decode` ends in a clamp to [-1, 1], which has no gradient on the black
    background. The frames after the first are decoded at once.
    """
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    parts = []
    for index, part in enumerate((hidden[:, :, :1], hidden[:, :, 1:2], hidden[:, :, 2:])):
        vae._conv_idx = [0]
        parts.append(vae.decoder(part, vae._feat_map, vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return torch.cat(parts, dim=2)


def vae_clips(recipe: Recipe, step: int) -> Tensor:
    """What the autoencoder sees in a step, ``[B, T, 3, 16, 16]``: clips of 5 or of 17 frames.

    Short ones come first, and every third time after: they are cheap, but their frames have seen
    few others, and the latents of long videos differ until the long ones are learned too.
    """
    if step < recipe.vae_short_steps or step % 3 == 0:
        return moving_digits(recipe.vae_batch, 5, seed=1000 + step)[0]
    return moving_digits(recipe.vae_long_batch, NUM_FRAMES, seed=1000 + step)[0]


def train_vae(vae: AutoencoderKLWan, recipe: Recipe) -> None:
    """Trains the autoencoder on short clips by squared error.

    Noise of a fixed size on the latents, and a small penalty on their square, stand in for the KL:
    a learned posterior starts as noise only, and takes long to leave it.
    """
    torch.manual_seed(recipe.seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_rate, weight_decay=1e-4)
    start = time.perf_counter()
    for step in range(recipe.vae_steps):
        videos = to_model(vae_clips(recipe, step))
        optimizer.param_groups[0]["lr"] = recipe.vae_rate * cosine_rate(step, recipe.vae_steps, 30)
        latents = vae.encode(videos).latent_dist.mode()
        noisy = latents + recipe.vae_noise * torch.randn_like(latents)
        error = functional.mse_loss(decode_unclamped(vae, noisy), videos)
        (error + recipe.vae_penalty * latents.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.vae_steps - 1:
            seconds = time.perf_counter() - start
            print(f"vae {step} squared error {error.item():.5f} seconds {seconds:.0f}", flush=True)
    vae.eval().requires_grad_(False)


@torch.no_grad()
def raw_latents(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Latents ``[B, 6, F, 8, 8]`` of videos ``[B, T, 3, 16, 16]`` in [0, 1], not standardized."""
    latents = [vae.encode(to_model(part)).latent_dist.mode() for part in videos.split(64)]
    return torch.cat(latents)


def standard(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of the autoencoder's latents, each ``[1, 6, 1, 1, 1]``."""
    mean, deviation = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), deviation.view(1, -1, 1, 1, 1)


def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Standardized latents ``[B, 6, F, 8, 8]`` of videos ``[B, T, 3, 16, 16]`` in [0, 1]."""
    mean, deviation = standard(vae)
    return (raw_latents(vae, videos) - mean) / deviation


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Videos ``[B, T, 3, 16, 16]`` in [0, 1] of standardized latents ``[B, 6, F, 8, 8]``."""
    mean, deviation = standard(vae)
    parts = [vae.decode(part * deviation + mean).sample for part in latents.split(64)]
    return (torch.cat(parts).transpose(1, 2) / 2 + 0.5).clamp(0, 1)


def set_latent_statistics(vae: AutoencoderKLWan, recipe: Recipe) -> None:
    """Writes the latents' mean and deviation on real clips into the autoencoder's config."""
    videos, _ = moving_digits(min(recipe.pool, 640), seed=recipe.seed + 2)
    latents = raw_latents(vae, videos)
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(),
        latents_std=latents.std(dim=(0, 2, 3, 4)).tolist(),
    )


@torch.no_grad()
def embed(pipeline: WanPipeline, prompts: list[str]) -> Tensor:
    """Prompt embeddings ``[B, 16, 32]``, as the pipeline makes them."""
    embeddings: Tensor = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH
    )[0]
    return embeddings


def draw_levels(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels ``[count]``: half uniform, half logit-normal, with half of the shift of Wan."""
    flat = torch.rand(count, generator=generator)
    peaked = torch.randn(count, generator=generator).sigmoid()
    t = torch.where(torch.rand(count, generator=generator) < 0.5, flat, peaked)
    return shifted(t, 1.5)


def shifted(t: Tensor, shift: float) -> Tensor:
    """Noise levels moved towards noise: ``s t / (1 + (s - 1) t)``."""
    return shift * t / (1 + (shift - 1) * t)


def flow_loss(
    transformer: WanTransformer3DModel, clean: Tensor, text: Tensor, generator: torch.Generator
) -> Tensor:
    """The flow-matching loss, a scalar: squared error of the velocity ``noise - clean``."""
    noise = torch.randn(clean.shape, generator=generator)
    t = draw_levels(len(clean), generator)
    x = clean.lerp(noise, t[:, None, None, None, None])
    velocity = transformer(x, 1000 * t, text, return_dict=False)[0]
    return functional.mse_loss(velocity, noise - clean)


def flow_optimizers(
    transformer: WanTransformer3DModel, recipe: Recipe
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the blocks' matrices and AdamW for all else, with their learning rates.

    In equal time, Muon's loss was that of three to four times as many steps of AdamW alone.
    """
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2 and min(p.shape) > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in transformer.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=recipe.flow_matrix_rate, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, lr=recipe.flow_rate, betas=(0.9, 0.98), weight_decay=0.01)
    return [(muon, recipe.flow_matrix_rate), (adamw, recipe.flow_rate)]


def train_transformer(pipeline: WanPipeline, recipe: Recipe) -> None:
    """Trains the transformer on encoded real clips, and leaves its averaged weights."""
    generator = torch.Generator().manual_seed(recipe.seed + 3)
    videos, texts = moving_digits(recipe.pool, seed=recipe.seed + 4)
    pool = encode(pipeline.vae, videos)
    known = captions()
    embeddings = embed(pipeline, [*known, ""])
    rows = torch.tensor([known.index(text) for text in texts])
    transformer = pipeline.transformer.train()
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizers = flow_optimizers(transformer, recipe)
    losses: list[float] = []
    start = time.perf_counter()
    for step in range(recipe.flow_steps):
        share = cosine_rate(step, recipe.flow_steps, min(50, recipe.flow_steps // 2))
        chosen = torch.randint(len(pool), (recipe.flow_batch,), generator=generator)
        dropped = torch.rand(recipe.flow_batch, generator=generator) < 0.1
        text = embeddings[torch.where(dropped, len(known), rows[chosen])]
        loss = flow_loss(transformer, pool[chosen], text, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, transformer, min(recipe.ema_decay, (step + 1) / (step + 10)))
        losses.append(loss.item())
        if step % 50 == 49 or step == recipe.flow_steps - 1:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"flow {step} loss {mean:.4f} seconds {time.perf_counter() - start:.0f}", flush=True
            )
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Moves the averaged weights towards the model's."""
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


@torch.no_grad()
def sample(
    pipeline: WanPipeline,
    prompts: Sequence[str],
    steps: int,
    seed: int,
    guidance: float = GUIDANCE,
    times: Tensor | None = None,
) -> Tensor:
    """Videos ``[N, 17, 3, 16, 16]`` in [0, 1] by Euler steps from pure noise.

    The noise levels are the shifted uniform ones, or ``times`` ``[steps + 1]``.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(
        len(prompts), CHANNELS, LATENT_FRAMES, LATENT_SIZE, LATENT_SIZE, generator=generator
    )
    text = embed(pipeline, list(prompts))
    empty = embed(pipeline, [""]).expand_as(text)
    if times is None:
        times = shifted(torch.linspace(1, 0, steps + 1), SHIFT)
    for t, following in pairwise(times):
        level = (1000 * t).expand(len(x))
        velocity = pipeline.transformer(x, level, text, return_dict=False)[0]
        if guidance != 1:
            plain = pipeline.transformer(x, level, empty, return_dict=False)[0]
            velocity = plain + guidance * (velocity - plain)
        x = x + (following - t) * velocity
    return decode(pipeline.vae, x)


def stock_difference(pipeline: WanPipeline) -> float:
    """The largest pixel difference between `sample` and the stock pipeline at its 8 steps."""
    prompts = captions()[:2]
    stock = pipeline(
        prompts,
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        num_inference_steps=8,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=MAX_LENGTH,
        output_type="pt",
    ).frames
    times = pipeline.scheduler.sigmas
    return (stock - sample(pipeline, prompts, 8, 5, times=times)).abs().max().item()


def measure_vae(vae: AutoencoderKLWan, judge: MovingDigitsJudge, count: int) -> dict[str, float]:
    """How well held-out real clips survive the autoencoder."""
    videos, texts = moving_digits(count, seed=11, held_out=True)
    decoded = decode(vae, encode(vae, videos))
    return {
        "real_frechet": judge.frechet(videos, texts),
        "vae_frechet": judge.frechet(decoded, texts),
        "vae_rmse": (decoded - videos).square().mean().sqrt().item(),
        "vae_all": judge.accuracy(decoded, texts)["all"],
        "vae_flicker": judge.flicker(decoded, texts),
    }


def measure_flow(
    pipeline: WanPipeline, judge: MovingDigitsJudge, count: int, steps: Sequence[int]
) -> dict[str, float]:
    """Accuracy, Frechet distance and flicker of samples of all captions, by number of steps."""
    known = captions()
    prompts = [known[index % len(known)] for index in range(count)]
    results = {}
    for num_steps in steps:
        videos = sample(pipeline, prompts, num_steps, seed=1)
        measured = judge.accuracy(videos, prompts)
        measured["frechet"] = judge.frechet(videos, prompts)
        measured["flicker"] = judge.flicker(videos, prompts)
        results |= {f"{name}_{num_steps}": value for name, value in measured.items()}
    return results


def blurred(videos: Tensor, amount: Tensor) -> Tensor:
    """Videos ``[B, T, 3, H, W]`` blended with their own blur by amounts ``[B]`` in [0, 1]."""
    padded = functional.pad(videos.flatten(0, 1), [1] * 4, mode="circular")
    soft = functional.avg_pool2d(padded, 3, stride=1).view_as(videos)
    return videos.lerp(soft, amount.view(-1, 1, 1, 1, 1))


def noisy(videos: Tensor, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Videos ``[B, T, 3, H, W]`` with grey noise of deviations ``[B]``, still in [0, 1]."""
    noise = torch.randn(videos[:, :, :1].shape, generator=generator)
    return (videos + amount.view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)


def uneven(videos: Tensor, others: Tensor, amount: Tensor) -> Tensor:
    """Videos ``[B, T, 3, H, W]`` that turn into others by amounts ``[B]``, up to the last frame."""
    course = torch.linspace(0, 1, videos.shape[1]).view(1, -1, 1, 1, 1)
    return videos.lerp(others, amount.view(-1, 1, 1, 1, 1) * course)


class Lessons:
    """Batches of videos for the reward networks: real ones, worse ones, and the teacher's.

    What is real is a scan's clip, as it is or after the autoencoder: a student can be no better
    than the latter.
    """

    def __init__(self, pipeline: WanPipeline, recipe: Recipe) -> None:
        """Films, encodes and samples the pools; a quarter of the samples has 2 steps, 3, 4, 6."""
        self.generator = torch.Generator().manual_seed(recipe.seed + 5)
        self.real, texts = moving_digits(recipe.reward_pool, seed=recipe.seed + 6)
        latents = encode(pipeline.vae, self.real)
        self.kept = decode(pipeline.vae, latents)
        jitter = 0.5 * torch.randn(latents.shape, generator=self.generator)
        self.shaken = decode(pipeline.vae, latents + jitter)
        named = [parse_caption(text) for text in texts]
        self.labels = torch.tensor(
            [(n, DIRECTIONS.index(d), SPEEDS.index(s)) for n, d, s in named]
        )  # [N, 3]
        prompts = texts[: recipe.reward_samples]
        parts = [prompts[index::4] for index in range(4)]
        self.samples = torch.cat([
            sample(pipeline, part, steps, seed=steps)
            for part, steps in zip(parts, (2, 3, 4, 6), strict=True)
        ])  # fmt: skip
        self.sample_texts = [text for part in parts for text in part]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Real videos ``[count, 17, 3, 16, 16]``, a third of them decoded, and labels."""
        rows = torch.randint(len(self.real), (count,), generator=self.generator)
        decoded = torch.rand(count, generator=self.generator).view(-1, 1, 1, 1, 1) < 1 / 3
        return torch.where(decoded, self.kept[rows], self.real[rows]), self.labels[rows]

    def worsen(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Videos ``[B, T, 3, H, W]`` made worse, and how real they still are, ``[B]`` in [0, 1].

        Blur, noise, decoded shaken latents, a change into another video; or the teacher's few-step
        samples instead, all more or less blended with what is real.
        """
        count = len(videos)
        amount = torch.rand(count, generator=self.generator)
        rows = torch.randint(len(self.real), (count,), generator=self.generator)
        drawn = torch.randint(len(self.samples), (count,), generator=self.generator)
        kinds = torch.stack([
            blurred(videos, amount),
            noisy(videos, 0.3 * amount, self.generator),
            self.real[rows].lerp(self.shaken[rows], amount.view(-1, 1, 1, 1, 1)),
            uneven(videos, self.real[rows], amount),
            self.samples[drawn],
            self.samples[drawn],
        ])  # fmt: skip
        kind = torch.randint(len(kinds), (count,), generator=self.generator)
        realness = torch.where(kind >= 4, 0.0, 1 - amount)
        return kinds[kind, torch.arange(count)], realness

    def soften(self, videos: Tensor) -> Tensor:
        """Videos ``[B, T, 3, H, W]`` a little blurred and noisy, so that gradients are smooth."""
        count = len(videos)
        soft = blurred(videos, torch.rand(count, generator=self.generator))
        amount = 0.2 * torch.rand(count, generator=self.generator)
        return noisy(soft, amount, self.generator)


def reward_loss(networks: DigitsVideoNetworks, lessons: Lessons, batch: int) -> Tensor:
    """The loss of the three networks, a scalar: cross-entropies, the visual one to soft labels."""
    videos, labels = lessons.draw(batch)
    logits = networks(lessons.soften(videos))
    classified = (logits.digit, logits.direction, logits.speed)
    loss = torch.stack([
        functional.cross_entropy(scores, label, label_smoothing=0.05)
        for scores, label in zip(classified, labels.unbind(1), strict=True)
    ]).sum()  # fmt: skip
    real, _ = lessons.draw(batch)
    worse, realness = lessons.worsen(lessons.draw(batch)[0])
    target = torch.cat([torch.ones(batch), realness]) * 0.9 + 0.05
    visual = networks(torch.cat([real, worse])).visual
    return loss + functional.binary_cross_entropy_with_logits(visual, target)


def train_rewards(networks: DigitsVideoNetworks, lessons: Lessons, recipe: Recipe) -> None:
    """Trains the three networks at once; they share no weights."""
    optimizer = torch.optim.AdamW(networks.parameters(), lr=recipe.reward_rate, weight_decay=0.01)
    start = time.perf_counter()
    for step in range(recipe.reward_steps):
        share = cosine_rate(step, recipe.reward_steps, min(50, recipe.reward_steps // 2))
        optimizer.param_groups[0]["lr"] = recipe.reward_rate * share
        loss = reward_loss(networks, lessons, recipe.reward_batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == recipe.reward_steps - 1:
            seconds = time.perf_counter() - start
            print(f"rewards {step} loss {loss.item():.4f} seconds {seconds:.0f}", flush=True)
    networks.eval().requires_grad_(False)


@torch.no_grad()
def raw_scores(
    networks: DigitsVideoNetworks, videos: Tensor, texts: Sequence[str]
) -> dict[str, Tensor]:
    """The raw scores ``[N]`` of each axis, of videos ``[N, T, 3, H, W]``."""
    parts = [
        caption_scores(networks(videos[start : start + 64]), texts[start : start + 64])
        for start in range(0, len(videos), 64)
    ]
    return {axis: torch.cat([part[axis] for part in parts]) for axis in parts[0]}


def axis_statistics(
    networks: DigitsVideoNetworks, lessons: Lessons
) -> dict[str, tuple[float, float]]:
    """Mean and deviation of each axis's raw score over as many real clips as few-step samples."""
    texts = lessons.sample_texts
    real = film(texts, NUM_FRAMES, seed=12, held_out=True)
    scores = raw_scores(networks, torch.cat([real, lessons.samples]), [*texts, *texts])
    return {axis: (score.mean().item(), score.std().item()) for axis, score in scores.items()}


@torch.no_grad()
def agreement(
    networks: DigitsVideoNetworks, videos: Tensor, texts: Sequence[str]
) -> dict[str, float]:
    """The share of videos ``[N, T, 3, H, W]`` whose caption the networks recognize, by word."""
    logits = networks(videos)
    named = [parse_caption(text) for text in texts]
    digit = logits.digit.argmax(dim=1) == torch.tensor([n for n, _, _ in named])
    heading = logits.direction.argmax(dim=1) == torch.tensor(
        [DIRECTIONS.index(direction) for _, direction, _ in named]
    )
    pace = logits.speed.argmax(dim=1) == torch.tensor(
        [SPEEDS.index(speed) for _, _, speed in named]
    )
    right = {"digit": digit, "motion": heading & pace}
    return {name: hits.float().mean().item() for name, hits in right.items()}


def measure_rewards(
    pipeline: WanPipeline,
    networks: DigitsVideoNetworks,
    statistics: dict[str, tuple[float, float]],
    recipe: Recipe,
) -> dict[str, float]:
    """Accuracies and mean z-scores of real held-out clips, blurred ones and the teacher's."""
    videos, texts = moving_digits(recipe.judged, seed=13, held_out=True)
    compared = {
        "real": videos,
        "decoded": decode(pipeline.vae, encode(pipeline.vae, videos)),
        "blurred": blurred(videos, torch.ones(len(videos))),
        "teacher_4": sample(pipeline, texts, 4, seed=14),
        "teacher_32": sample(pipeline, texts, 32, seed=14),
    }
    results = {}
    for name, shown in compared.items():
        for word, share in agreement(networks, shown, texts).items():
            results[f"{name}_{word}_accuracy"] = share
        for axis, score in raw_scores(networks, shown, texts).items():
            mean, deviation = statistics[axis]
            results[f"{name}_{axis}"] = (score.mean().item() - mean) / deviation
    return results


DATA_AND_LICENSE = """## Data and license

scikit-learn's `load_digits`: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
UCI Machine Learning Repository, CC BY 4.0. The weights are under CC BY 4.0 too.
"""


CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-video
---

# moving-digits

A `WanPipeline` of handwritten digits that move over a torus of 16 by 16 pixels, 17 frames, small
enough for tests and examples on a CPU. Captions are such as "a seven moving right, fast": digits
zero to nine; left, right, up, down; slowly (half a pixel per frame) and fast (one pixel).

Made by `scripts/build_video_models.py` (seed {seed}), from scratch and offline:

- tokenizer: whole words of captions, bytes for everything else;
- text encoder: a random, frozen UMT5 of 2 layers and 32 channels;
- autoencoder: `AutoencoderKLWan` of {channels} channels, stride 2 in space and 2 in time (17 frames
  are 9 latent frames of 8 by 8), {vae_steps} steps on clips of 5 and of 17 frames. It encodes 4
  frames at a time, so 1 plus a multiple of 4 frames, and decodes any number;
- transformer: `WanTransformer3DModel`, patch (1, 2, 2), {parameters:.2f} M parameters stored in
  float16, {flow_steps} steps of flow matching on {flow_batch} clips of {pool}, with Muon for its
  matrices and AdamW for the rest; one caption in ten is empty; averaged weights;
- scheduler: `FlowMatchEulerDiscreteScheduler` with a static shift of {shift}.

Three in four scans of each digit were used; the others are held out.

## Use

```python
from diffusers import WanPipeline

pipeline = WanPipeline.from_pretrained("samples/models/moving-digits")
video = pipeline(
    "a seven moving right, fast",
    height=16,
    width=16,
    num_frames=17,
    num_inference_steps=32,
    guidance_scale={guidance},
    max_sequence_length={max_length},
).frames[0]
```

`max_sequence_length` must be {max_length}: no other was trained. The negative prompt is empty.

## Measured

| what | value |
|---|---|
{rows}

The names end with the number of Euler steps on the shifted grid, at guidance {guidance}. One seed,
{judged} samples, all 80 captions. Digit: an SVC on centered, averaged frames, fitted on all scans.
Direction and speed: the motion of the ink's center, measured. Frechet distance: 23 principal
components of centered frames and what they leave out, and the same of the frames' changes,
against real clips of held-out scans; other such clips, as many, are `real_frechet` away. Flicker:
second differences, 1 as in real clips. All from the saved float16 weights.

The motion is nearly always the named one; what is wrong is mostly the digit (`digit_32`). Its clips
are further from real ones (`frechet_32`) than the autoencoder alone makes them (`vae_frechet`).

{rest}"""


REWARD_CARD = """---
license: cc-by-4.0
---

# digits-video

The three networks of the reward `digits-video` (`diffdistill.rewards.digits_video`): does a video
look real, does it move as its caption says, does it show the digit. {parameters:.2f} M parameters,
made by `scripts/build_video_models.py` (seed {seed}): {reward_steps} steps of {reward_batch} real
clips, a third of them through the autoencoder of [moving-digits](../moving-digits/README.md), a
little blurred and noisy for the digit and the motion. The visual network tells real clips from
blurred and noisy ones, from decoded shaken latents, from digits that turn into others, each with a
soft label by how much, and from {reward_samples} samples of the teacher at 2, 3, 4 and 6 steps. A
clip that went through the autoencoder counts as real: no student can be better.

`config.json` has mean and standard deviation of each axis's raw score, over as many real clips of
held-out scans as few-step samples.

## Measured

| what | value |
|---|---|
{rows}

Accuracies, and mean z-scores of the axes, over {judged} videos: real clips of held-out scans, the
same through the autoencoder and blurred, and the teacher at 4 and 32 Euler steps.

{rest}"""


def write_card(
    folder: Path, card: str, recipe: Recipe, results: dict[str, float], **words: object
) -> None:
    """Writes the model card with what was measured."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    known = {**asdict(recipe), **words, "rows": rows, "rest": DATA_AND_LICENSE}
    (folder / "README.md").write_text(card.format(**known), encoding="utf-8")


def save_pipeline(pipeline: WanPipeline, folder: Path) -> None:
    """Saves the pipeline, the transformer in float16 and everything else in float32."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.transformer.half()
    pipeline.save_pretrained(folder)
    pipeline.transformer.float()


def load_pipeline(folder: Path) -> WanPipeline:
    """The saved pipeline in float32."""
    pipeline = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_autoencoder(folder: Path, recipe: Recipe) -> None:
    """Builds the pipeline, and trains its autoencoder; its transformer is not trained yet."""
    pipeline = build_pipeline(recipe)
    train_vae(pipeline.vae, recipe)
    set_latent_statistics(pipeline.vae, recipe)
    save_pipeline(pipeline, folder)


def build_teacher(folder: Path, recipe: Recipe) -> None:
    """Trains the bidirectional transformer anew, and saves and measures the pipeline."""
    judge = MovingDigitsJudge()
    pipeline = load_pipeline(folder)
    pipeline.transformer = build_transformer(recipe.seed)
    train_transformer(pipeline, recipe)
    pipeline.transformer.half().save_pretrained(folder / "transformer")
    saved = load_pipeline(folder)
    results = {
        "stock_difference": stock_difference(saved),
        **measure_vae(saved.vae, judge, recipe.judged),
        **measure_flow(saved, judge, recipe.judged, (4, 8, 32)),
    }
    report(results)
    write_card(
        folder, CARD, recipe, results,
        parameters=saved.transformer.num_parameters() / 1e6,
        channels=CHANNELS, shift=SHIFT, guidance=GUIDANCE, max_length=MAX_LENGTH,
    )  # fmt: skip


def build_rewards(folder: Path, teacher: Path, recipe: Recipe) -> None:
    """Trains, saves and measures the networks of the reward, with samples of the teacher."""
    pipeline = load_pipeline(teacher)
    torch.manual_seed(recipe.seed + 7)
    networks = DigitsVideoNetworks()
    lessons = Lessons(pipeline, recipe)
    train_rewards(networks, lessons, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    networks.save(folder, axis_statistics(networks, lessons))
    saved, statistics = DigitsVideoNetworks.load(folder)
    results = measure_rewards(pipeline, saved.eval(), statistics, recipe)
    report(results)
    parameters = sum(weight.numel() for weight in saved.parameters()) / 1e6
    write_card(folder, REWARD_CARD, recipe, results, parameters=parameters)


STUDENT_CARD = """---
license: cc-by-4.0
library_name: diffusers
---

# moving-digits-causal

The transformer of [moving-digits](../moving-digits/README.md) as a causal student: blocks of 3
latent frames, a window of 6, 4 steps. Made by `diffdistill train causal-init/digits` ({steps} steps
of ODE regression on the prompts kept for training; `scripts/build_video_models.py` runs it). It is
where `self-forcing/digits` and `stream-r1/digits` begin; it is not a good model yet.

{rest}"""


def build_student(folder: Path, teacher: Path, overrides: Sequence[str]) -> None:
    """Makes a causal student of the teacher with the library's own causal-init, and saves it."""
    here = [f"family.path={teacher}", "sample.every=null", "tracking.tensorboard=false"]
    config = load_config("causal-init/digits", [*here, *overrides])
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as run:
        train(config, Path(run) / "run")
        session = restore(Path(run) / "run")
        student = session.roles["student"].network
        whole = export_pipeline(session.family, student, Path(run) / "whole", dtype=torch.float16)
        shutil.copytree(whole / "transformer", folder / "transformer")
    card = STUDENT_CARD.format(steps=config.train.steps, rest=DATA_AND_LICENSE)
    (folder / "README.md").write_text(card, encoding="utf-8")


def report(results: dict[str, float]) -> None:
    """Prints what was measured."""
    for name, value in results.items():
        print(f"{name} {value:.4g}", flush=True)


def main() -> None:
    """Builds the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    parser.add_argument("--only", choices=PARTS, help="keep the others")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    diffusers_logging.set_verbosity_error()
    recipe = QUICK if options.quick else Recipe()
    teacher = options.output / "moving-digits"
    if options.only in (None, "autoencoder"):
        build_autoencoder(teacher, recipe)
    if options.only in (None, "teacher"):
        build_teacher(teacher, recipe)
    if options.only in (None, "rewards"):
        build_rewards(options.output / "digits-video", teacher, recipe)
    if options.only in (None, "student"):
        quick = ["train.steps=2", "method.num_teacher_steps=4"]
        build_student(
            options.output / "moving-digits-causal", teacher, quick if options.quick else []
        )


if __name__ == "__main__":
    main()
