"""Builds samples/models: two small, real FLUX.2 klein pipelines of handwritten digits.

Every part is made here, offline and seeded: a tokenizer of whole words and bytes, a frozen random
Qwen3 text encoder, a trained autoencoder, and a flow-matching transformer that draws digits 0 to 7
from captions and varies a reference image when it is given one. No scan, glyph or caption of an 8
or a 9 is used, but references are mirrored and joined at random, so some look like one: a six
mirrored in both directions is a nine.

    python scripts/build_digits_models.py            # both: 15 minutes on 2 cores
    python scripts/build_digits_models.py --quick    # a smoke run, 1 to 3 minutes

digits-base comes out bit for bit as shipped with two threads, on a machine like ours;
digits-turbo as shipped was made with ``--only-turbo --threads 1``; otherwise rounding differs.
"""

import argparse
import copy
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from diffdistill.checkpoints import restore
from diffdistill.commands.train import train
from diffdistill.config import load_config
from diffdistill.evaluation.digits import DigitJudge, balanced_digits, real_digits
from diffdistill.pipelines.exporting import export_pipeline

SUFFIX = (
    "Make the main subject (facial/ip details), background, and overall composition "
    "consistent with the reference image."
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINED = tuple(range(8))
LETTERS = "bcdefghijklmnopqrstuvwxyz"
UNSEEN = (8, 9)
SIZE = 8
VARIATION = 0.45
"""How much a reference differs from its target, as a strength of `warp`."""
MAX_LENGTH = 32
SHORT_LENGTH = 8
PAD, USER = "<|pad|>", "<|user|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|user|>"
    "{% if message['content'] | trim %} {{ message['content'] | trim }}{% endif %}{% endfor %}"
)
OTHER_WORDS_TEXT = (
    "an the of with and in on photo picture drawing sketch letter symbol sign shape mark digit "
    "number figure glyph line dot cross circle square star cat dog bird fish horse tree flower "
    "house car boat chair table cup book clock key hat shoe apple pear lamp door window cloud sun "
    "moon hill river printed painted scanned written thin thick bold small large tilted black "
    "white grey red green blue ten eleven twelve alpha beta gamma delta omega"
)
OTHER_WORDS = tuple(OTHER_WORDS_TEXT.split())
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
GLYPHS = (
    "01234567abcdefghijklmnopqrstuvwxyzACDEFGHIJKLMNOPQRSTUVWXYZ#$%&?!@+*/=<>~^()[]{}"
    "\u0393\u0394\u0398\u039b\u039e\u03a0\u03a3\u03a6\u03a8\u03a9\u03b1\u03b2\u03b3\u03b4\u03b5"
    "\u03b6\u03b7\u03b8\u03bb\u03bc\u03be\u03c0\u03c1\u03c3\u03c6\u03c8\u03c9\u0411\u0414\u0416"
    "\u0418\u041b\u0424\u0426\u0427\u0429\u042b\u042d\u042e\u042f\u221e\u2200\u2203\u2208\u2229"
    "\u222b\u2260\u2264\u2190\u2191\u2192\u2193\u25cb\u25a1\u25b3\u2605\u2665\u266a"
)


@dataclass(frozen=True)
class Recipe:
    """How long and how hard each part is trained."""

    vae_steps: int = 1000
    vae_batch: int = 128
    vae_rate: float = 3e-3
    kl_weight: float = 1e-4
    flow_steps: int = 1400
    text_batch: int = 48
    letter_batch: int = 32
    reference_batch: int = 32
    flow_rate: float = 2e-3
    ema_decay: float = 0.99
    pool: int = 3200
    unknown_prompts: int = 1000
    judged_per_class: int = 64
    seed: int = 0


QUICK = Recipe(
    vae_steps=20, vae_batch=32, flow_steps=6, text_batch=8, letter_batch=8, reference_batch=8,
    pool=64, unknown_prompts=10, judged_per_class=2,
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with whole-word tokens for captions and byte tokens for everything else."""
    suffix_pieces = "Make the main subject ( facial / ip details ), background , and overall"
    suffix_pieces += " composition consistent with the reference image ."
    words = ["a", "A", "handwritten", *DIGITS, *suffix_pieces.split(), *OTHER_WORDS]
    pieces = [PAD, USER, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [variant for word in words for variant in (word, "\u0120" + word)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(USER, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        additional_special_tokens=[USER],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )


def build_text_encoder(vocabulary_size: int, seed: int) -> Qwen3ForCausalLM:
    """A frozen random Qwen3 whose layers 9, 18 and 27, klein's default, give 96 channels.

    Weights keep the scale of what they multiply and embeddings are larger than what a layer adds,
    so that a token stays recognizable at every depth and later tokens still know earlier ones.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=32**-0.5,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    encoder = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    encoder.get_input_embeddings().weight.mul_(8)
    return encoder


def build_vae(seed: int) -> AutoencoderKLFlux2:
    """An untrained one-block autoencoder: latents ``[B, 1, 8, 8]`` of images ``[B, 3, 8, 8]``."""
    torch.manual_seed(seed)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_transformer(seed: int) -> Flux2Transformer2DModel:
    """An untrained 1.4 M parameter FLUX.2 transformer over 16 tokens of 4 channels."""
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        timestep_guidance_channels=128,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )


def build_pipeline(recipe: Recipe) -> Flux2KleinPipeline:
    """The untrained pipeline.

    The scheduler's shift is static, 1: klein's empirical shift is 5.7 to 7 at 16 tokens, which
    would leave the last quarter of the noise of so small an image to a single step.
    """
    tokenizer = build_tokenizer()
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=build_vae(recipe.seed),
        text_encoder=build_text_encoder(len(tokenizer), recipe.seed),
        tokenizer=tokenizer,
        transformer=build_transformer(recipe.seed),
        is_distilled=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def glyphs() -> Tensor:
    """Letters and symbols, ``[N, 1, 32, 32]`` in [0, 1], drawn at the proportions of digits."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = [
        draw_glyph(character, ImageFont.truetype(str(folder / f"{name}.ttf"), 48))
        for name in FONTS
        for character in GLYPHS
    ]
    return torch.stack(drawn).unsqueeze(1)


def draw_glyph(character: str, font: ImageFont.FreeTypeFont) -> Tensor:
    """One glyph ``[32, 32]`` in [0, 1]: full height and about two thirds of the width."""
    canvas = Image.new("L", (96, 96))
    ImageDraw.Draw(canvas).text((16, 16), character, fill=255, font=font)
    glyph = canvas.crop(canvas.getbbox() or (0, 0, 96, 96)).resize((22, 32), Image.Resampling.BOX)
    square = Image.new("L", (32, 32))
    square.paste(glyph, (5, 0))
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)


def uniform(shape: Sequence[int], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers of ``shape``, uniform between ``low`` and ``high``."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def warp(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images ``[N, 1, H, W]``, turned, scaled, sheared, moved and bent at random.

    Strength 1 turns by up to 25 degrees, scales by up to a quarter and moves by up to one eighth.
    """
    count = len(images)
    angle = uniform((count,), -0.44, 0.44, generator) * strength
    scale = 1 + uniform((2, count), -0.25, 0.25, generator) * strength
    shear = uniform((count,), -0.25, 0.25, generator) * strength
    move = uniform((2, count), -0.25, 0.25, generator) * strength
    cosine, sine = angle.cos(), angle.sin()
    rows = [
        torch.stack([scale[0] * cosine, shear - sine, move[0]], dim=1),
        torch.stack([sine, scale[1] * cosine, move[1]], dim=1),
    ]
    grid = functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), False)
    bend = torch.randn(count, 2, 3, 3, generator=generator) * 0.08 * strength
    bend = functional.interpolate(bend, images.shape[-2:], mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    return functional.grid_sample(images, grid, align_corners=False)


def vary_ink(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[N, 1, H, W]`` with thicker or thinner strokes and more or less contrast."""
    thick = functional.max_pool2d(images, 3, stride=1, padding=1)
    thin = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    amount = uniform((len(images), 1, 1, 1), -0.4, 0.5, generator)
    images = torch.where(amount > 0, images.lerp(thick, amount.abs()), images.lerp(thin, -amount))
    power = uniform((len(images), 1, 1, 1), 0.6, 1.5, generator)
    ink = uniform((len(images), 1, 1, 1), 0.7, 1.1, generator)
    return (images.clamp(0, 1).pow(power) * ink).clamp(0, 1)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[N, 1, H, W]``, each mirrored or not in both directions at random."""
    for axis in (2, 3):
        mirrored = uniform((len(images), 1, 1, 1), 0, 1, generator) < 0.5
        images = torch.where(mirrored, images.flip(axis), images)
    return images


def draw_strokes(count: int, generator: torch.Generator) -> Tensor:
    """Random curves, ``[count, 1, 8, 8]`` in [0, 1]: ink along quadratic Bezier paths."""
    ends = uniform((count, 3, 3, 1, 2), -0.5, 7.5, generator)  # [N, curves, control points, 1, 2]
    time_along = torch.linspace(0, 1, 16).view(1, 1, 16, 1)
    first = ends[:, :, 0].lerp(ends[:, :, 1], time_along)
    second = ends[:, :, 1].lerp(ends[:, :, 2], time_along)
    points = first.lerp(second, time_along)
    kept = torch.arange(3).view(1, 3, 1) < uniform((count, 1, 1), 1, 4, generator)
    points = torch.where(kept[..., None], points, torch.full_like(points, -99.0)).flatten(1, 2)
    axis = torch.arange(8.0)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).view(1, 64, 2)
    distance = torch.cdist(pixels.expand(count, -1, -1), points).amin(dim=2)
    width = uniform((count, 1), 0.5, 1.3, generator)
    return (1.4 - distance / width).clamp(0, 1).view(count, 1, 8, 8)


def mix_digits(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Digits ``[N, 1, 8, 8]`` joined in pairs: overlaid, blended, or the top of one on another."""
    others = flip(digits[torch.randperm(len(digits), generator=generator)], generator)
    row = torch.arange(8).view(1, 1, 8, 1)
    top = row < uniform((len(digits), 1, 1, 1), 2, 7, generator)
    spliced = torch.where(top, digits, others)
    overlaid = torch.maximum(digits, others)
    blended = digits.lerp(others, uniform((len(digits), 1, 1, 1), 0, 1, generator))
    kind = uniform((len(digits), 1, 1, 1), 0, 1, generator)
    return torch.where(kind < 0.6, spliced, torch.where(kind < 0.8, overlaid, blended))


def reference_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Varied images ``[count, 3, 8, 8]`` in [0, 1], made without 8s and 9s, and their labels.

    The label is a digit where the image is still one, else -1. Two fifths are digits (half of
    these mirrored, so no longer digits), then joined digits, letters and symbols, and strokes.
    """
    scans, labels = real_digits(TRAINED)
    chosen = torch.randint(len(scans), (count,), generator=generator)
    digits = vary_ink(warp(scans[chosen, :1], 0.6, generator), generator)
    letters = glyphs()
    letters = letters[torch.randint(len(letters), (count,), generator=generator)]
    letters = warp(vary_ink(letters, generator), 1.0, generator)
    letters = functional.interpolate(flip(letters, generator), size=SIZE, mode="area")
    kinds = torch.stack([
        digits,
        flip(warp(digits, 1.0, generator), generator),
        mix_digits(digits, generator),
        letters,
        draw_strokes(count, generator),
    ])  # fmt: skip
    shares = torch.tensor([0.2, 0.2, 0.2, 0.25, 0.15])
    kind = torch.multinomial(shares, count, replacement=True, generator=generator)
    images = kinds[kind, torch.arange(count)]
    return images.repeat(1, 3, 1, 1), torch.where(kind == 0, labels[chosen], -1)


def vae_images(count: int, generator: torch.Generator) -> Tensor:
    """What the autoencoder learns from, ``[count, 3, 8, 8]``: references, scans, some noise."""
    images, _ = reference_images(count, generator)
    scans, _ = real_digits(TRAINED)
    scans = scans[torch.randint(len(scans), (count,), generator=generator)]
    images = torch.where(uniform((count, 1, 1, 1), 0, 1, generator) < 0.4, scans, images)
    noise = torch.rand(count, 1, 8, 8, generator=generator)
    amount = uniform((count, 1, 1, 1), -3, 1, generator).clamp(min=0)
    return images.lerp(noise.expand_as(images), amount)


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: a linear warmup, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def train_vae(vae: AutoencoderKLFlux2, recipe: Recipe) -> None:
    """Trains the autoencoder on squared error and a small KL, and sets its latent statistics."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    torch.manual_seed(recipe.seed + 1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_rate, weight_decay=1e-4)
    pool = vae_images(recipe.vae_batch, generator)
    for step in range(recipe.vae_steps):
        if step % 20 == 0:
            pool = vae_images(20 * recipe.vae_batch, generator)
        rows = torch.arange(recipe.vae_batch) + (step % 20) * recipe.vae_batch
        images = 2 * pool[rows] - 1
        optimizer.param_groups[0]["lr"] = recipe.vae_rate * cosine_rate(step, recipe.vae_steps, 50)
        posterior = vae.encode(images).latent_dist
        error = functional.mse_loss(vae.decode(posterior.sample()).sample, images)
        (error + recipe.kl_weight * posterior.kl().mean() / SIZE**2).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == recipe.vae_steps - 1:
            print(f"vae {step} squared error {error.item():.5f}", flush=True)
    vae.eval().requires_grad_(False)
    set_latent_statistics(vae)


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLFlux2) -> None:
    """Sets the batch norm's running mean and variance to those of real digits 0 to 7."""
    images, _ = real_digits(TRAINED)
    latents = vae.encode(2 * images - 1).latent_dist.mode()
    patches = Flux2KleinPipeline._patchify_latents(latents)
    vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))


@torch.no_grad()
def encode_images(pipeline: Flux2KleinPipeline, images: Tensor) -> Tensor:
    """Normalized tokens ``[N, 16, 4]`` of images ``[N, 3, 8, 8]`` in [0, 1], packed as in klein."""
    latents = pipeline._encode_vae_image(2 * images - 1, generator=None)
    tokens: Tensor = pipeline._pack_latents(latents)
    return tokens


def positions(pipeline: Flux2KleinPipeline, with_reference: bool) -> Tensor:
    """Position ids ``[N, 4]`` of 16 noisy tokens, then of 16 reference tokens if there are any."""
    grid = torch.zeros(1, 4, SIZE // 2, SIZE // 2)
    ids = pipeline._prepare_latent_ids(grid)[0]
    return torch.cat([ids, pipeline._prepare_image_ids([grid])[0]]) if with_reference else ids


def predict(
    pipeline: Flux2KleinPipeline,
    x: Tensor,
    t: Tensor,
    text: Tensor,
    reference: Tensor | None = None,
) -> Tensor:
    """The velocity ``[B, 16, 4]`` of noisy tokens ``[B, 16, 4]`` at noise levels ``[B]``.

    Args:
        pipeline: Gives the transformer and the position ids.
        x: Noisy tokens.
        t: Noise levels in [0, 1].
        text: Prompt embeddings ``[B, L, 96]``.
        reference: Clean tokens ``[B, 16, 4]`` to append, as klein's image editing does.
    """
    velocity: Tensor = pipeline.transformer(
        hidden_states=x if reference is None else torch.cat([x, reference], dim=1),
        encoder_hidden_states=text,
        timestep=t,
        img_ids=positions(pipeline, reference is not None),
        txt_ids=pipeline._prepare_text_ids(text[:1])[0],
        return_dict=False,
    )[0]
    return velocity[:, : x.shape[1]]


def caption(label: int) -> str:
    """The caption of a digit."""
    return f"a handwritten {DIGITS[label]}"


def with_suffix(prompt: str) -> str:
    """A prompt that asks for the reference to be kept."""
    return f"{prompt} {SUFFIX}"


def unknown_prompts(count: int, seed: int) -> list[str]:
    """Prompts that name no digit, for references the captions have no word for."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        made = "".join(draw.choices(letters, k=draw.choice((1, 2, 3))))
        return draw.choice((draw.choice(OTHER_WORDS), made))

    prompts = []
    for _ in range(count):
        prompt = draw.choice((f"a handwritten {word()}", f"a {word()} {word()}", f"a {word()}"))
        prompts.append(prompt + draw.choice(("", "", ".")))
    return prompts


class Texts:
    """Embeddings of all training prompts, made once: ``[P, 32, 96]`` per group."""

    def __init__(self, pipeline: Flux2KleinPipeline, num_unknown: int, seed: int) -> None:
        """Embeds the captions and as many prompts of unknown words as asked for."""
        captions = [caption(label) for label in TRAINED]
        letters = [f"a printed {letter}" for letter in LETTERS]
        unknown = unknown_prompts(num_unknown, seed)
        self.captions = embed(pipeline, [*captions, *letters, ""])
        self.dotted = embed(pipeline, [*(f"{text}." for text in [*captions, *letters]), ""])
        self.reference_captions = embed(
            pipeline, [with_suffix(text) for text in [*captions, *(f"{c}." for c in captions)]]
        )
        self.reference_unknown = embed(pipeline, [with_suffix(text) for text in ["", *unknown]])

    def draw_captions(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Caption embeddings ``[B, L, 96]``: one in ten empty, one in ten with a full stop.

        Labels are digits 0 to 7, then the letters.
        """
        dropped = torch.rand(len(labels), generator=generator) < 0.1
        rows = torch.where(dropped, len(self.captions) - 1, labels)
        dotted = (torch.rand(len(labels), generator=generator) < 0.1)[:, None, None]
        short = torch.rand(1, generator=generator).item() < 0.7
        length = SHORT_LENGTH if short else MAX_LENGTH
        return torch.where(dotted, self.dotted[rows], self.captions[rows])[:, :length]

    def draw_reference_prompts(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Embeddings ``[B, 32, 96]`` of prompts with the suffix, for labels with -1 for unknown.

        A digit has its caption half of the time, one prompt in twenty names a wrong digit, and
        the others are empty (one in eight) or unknown words.
        """
        count = len(labels)
        unknown = torch.randint(len(self.reference_unknown), (count,), generator=generator)
        unknown = torch.where(torch.rand(count, generator=generator) < 0.125, 0, unknown)
        wrong = torch.rand(count, generator=generator) < 0.05
        known = ((labels >= 0) & (torch.rand(count, generator=generator) < 0.5)) | wrong
        others = torch.randint(len(TRAINED), (count,), generator=generator)
        rows = torch.where(wrong, others, labels.clamp(min=0))
        rows = rows + len(TRAINED) * (torch.rand(count, generator=generator) < 0.3)
        named, unnamed = self.reference_captions[rows], self.reference_unknown[unknown]
        return torch.where(known[:, None, None], named, unnamed)


@torch.no_grad()
def embed(pipeline: Flux2KleinPipeline, prompts: list[str]) -> Tensor:
    """Prompt embeddings ``[B, 32, 96]``, as the pipeline makes them."""
    embeddings: Tensor = pipeline.encode_prompt(prompts, max_sequence_length=MAX_LENGTH)[0]
    return embeddings


def draw_levels(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels ``[count]``: half uniform, half logit-normal."""
    flat = torch.rand(count, generator=generator)
    peaked = torch.randn(count, generator=generator).sigmoid()
    return torch.where(torch.rand(count, generator=generator) < 0.5, flat, peaked)


def flow_loss(
    pipeline: Flux2KleinPipeline,
    clean: Tensor,
    text: Tensor,
    reference: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """The flow-matching loss, a scalar: squared error of the velocity ``noise - clean``."""
    noise = torch.randn(clean.shape, generator=generator)
    t = draw_levels(len(clean), generator)
    x = clean.lerp(noise, t[:, None, None])
    velocity = predict(pipeline, x, t, text, reference)
    return functional.mse_loss(velocity, noise - clean)


class References:
    """An endless source of encoded targets and references ``[B, 16, 4]``, and labels ``[B]``.

    A reference is its target turned, moved, bent and inked a little differently: the model learns
    to keep the subject, and takes the rest from the noise, instead of copying pixels.
    """

    def __init__(self, pipeline: Flux2KleinPipeline, pool: int, generator: torch.Generator) -> None:
        """Starts with an empty pool."""
        self.pipeline, self.pool, self.generator = pipeline, pool, generator
        self.left: list[Tensor] = [torch.empty(0)] * 3

    def draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The next targets, references and labels; a new pool is made when one is used up."""
        if len(self.left[0]) < count:
            images, labels = reference_images(max(self.pool, count), self.generator)
            varied = vary_ink(warp(images[:, :1], VARIATION, self.generator), self.generator)
            targets, references = encode_images(
                self.pipeline, torch.cat([images, varied.expand_as(images)])
            ).chunk(2)
            self.left = [targets, references, labels]
        drawn = [rest[:count] for rest in self.left]
        self.left = [rest[count:] for rest in self.left]
        return drawn[0], drawn[1], drawn[2]


def draw_letters(
    pipeline: Flux2KleinPipeline, generator: torch.Generator, count: int
) -> tuple[Tensor, Tensor]:
    """Encoded letters ``[count, 16, 4]`` in any of the fonts, a little bent, and their labels."""
    letters = torch.randint(len(LETTERS), (count,), generator=generator)
    font = torch.randint(len(FONTS), (count,), generator=generator)
    places = torch.tensor([GLYPHS.index(letter) for letter in LETTERS])
    drawn = warp(glyphs()[font * len(GLYPHS) + places[letters]], 0.3, generator)
    images = functional.interpolate(vary_ink(drawn, generator), size=SIZE, mode="area")
    return encode_images(pipeline, images.repeat(1, 3, 1, 1)), letters + len(TRAINED)


def draw_digits(pipeline: Flux2KleinPipeline, generator: torch.Generator, count: int) -> Tensor:
    """Encoded scans ``[count, 16, 4]``, equally many per class and in class order.

    Three in ten are moved and bent a little, less than one pixel.
    """
    scans, _ = balanced_digits(TRAINED)
    per_class = len(scans) // len(TRAINED)
    within = torch.randint(per_class, (count,), generator=generator)
    images = scans[within + per_class * (torch.arange(count) % len(TRAINED))]
    bent = warp(images[:, :1], 0.12, generator).expand_as(images)
    images = torch.where(uniform((count, 1, 1, 1), 0, 1, generator) < 0.3, bent, images)
    return encode_images(pipeline, images)


def train_transformer(pipeline: Flux2KleinPipeline, recipe: Recipe) -> None:
    """Trains the transformer on captions and on references, and leaves its averaged weights."""
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    texts = Texts(pipeline, recipe.unknown_prompts, recipe.seed)
    references = References(pipeline, recipe.pool, generator)
    transformer = pipeline.transformer.train()
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=recipe.flow_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    labels = torch.arange(recipe.text_batch) % len(TRAINED)
    start = time.perf_counter()
    for step in range(recipe.flow_steps):
        share = cosine_rate(step, recipe.flow_steps, min(100, recipe.flow_steps // 2))
        optimizer.param_groups[0]["lr"] = recipe.flow_rate * share
        letters, letter_labels = draw_letters(pipeline, generator, recipe.letter_batch)
        clean = torch.cat([draw_digits(pipeline, generator, recipe.text_batch), letters])
        text = texts.draw_captions(torch.cat([labels, letter_labels]), generator)
        text_loss = flow_loss(pipeline, clean, text, None, generator)
        text_loss.backward()
        target, reference, reference_labels = references.draw(recipe.reference_batch)
        prompts = texts.draw_reference_prompts(reference_labels, generator)
        reference_loss = flow_loss(pipeline, target, prompts, reference, generator)
        (reference_loss * 0.5).backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, transformer, min(recipe.ema_decay, (step + 1) / (step + 10)))
        if step % 50 == 0 or step == recipe.flow_steps - 1:
            print(
                f"flow {step} text {text_loss.item():.4f} reference {reference_loss.item():.4f} "
                f"seconds {time.perf_counter() - start:.0f}",
                flush=True,
            )
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)


@torch.no_grad()
def update_average(
    average: Flux2Transformer2DModel, model: Flux2Transformer2DModel, decay: float
) -> None:
    """Moves the averaged weights towards the model's."""
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


@torch.no_grad()
def sample(
    pipeline: Flux2KleinPipeline,
    prompts: list[str],
    steps: int,
    seed: int,
    references: Tensor | None = None,
) -> Tensor:
    """Samples ``[N, 3, 8, 8]`` in [0, 1], what the stock pipeline makes with guidance 1.

    The stock call has one reference for a whole batch; here each prompt has its own, of
    ``references`` ``[N, 3, 8, 8]``. `stock_difference` compares the two.
    """
    generator = torch.Generator().manual_seed(seed)
    text = embed(pipeline, prompts)
    noise = torch.randn(len(prompts), 4, SIZE // 2, SIZE // 2, generator=generator)
    x = pipeline._pack_latents(noise)
    tokens = None if references is None else encode_images(pipeline, references)
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=None)
    levels = pipeline.scheduler.sigmas
    for t, next_t in pairwise(levels):
        level = t.expand(len(x))
        x = x + (next_t - t) * predict(pipeline, x, level, text, tokens)
    return decode_tokens(pipeline, x)


@torch.no_grad()
def decode_tokens(pipeline: Flux2KleinPipeline, tokens: Tensor) -> Tensor:
    """Images ``[N, 3, 8, 8]`` in [0, 1] of normalized tokens ``[N, 16, 4]``."""
    norm = pipeline.vae.bn
    deviation = (norm.running_var + pipeline.vae.config.batch_norm_eps).sqrt()
    latents = (tokens * deviation + norm.running_mean).mT.unflatten(2, (SIZE // 2, SIZE // 2))
    images: Tensor = pipeline.vae.decode(pipeline._unpatchify_latents(latents)).sample
    return ((images + 1) / 2).clamp(0, 1)


def stock_difference(pipeline: Flux2KleinPipeline) -> float:
    """The largest pixel difference of `sample` from the stock call, with and without a reference.

    The stock call refuses references below 64 pixels a side; that check alone is set aside.
    """
    prompts = [caption(label) for label in (1, 3, 4)]
    scans, _ = real_digits(UNSEEN)
    pixels = (scans[0].permute(1, 2, 0) * 255).round().byte()
    picture = Image.fromarray(pixels.numpy())
    reference = (pixels.float() / 255).permute(2, 0, 1).expand(3, -1, -1, -1)
    pipeline.image_processor.check_image_input = lambda image: None
    differences = []
    for image, tensor in ((None, None), (picture, reference)):
        words = prompts if image is None else [with_suffix(prompt) for prompt in prompts]
        stock = pipeline(
            image=image,
            prompt=words,
            height=SIZE,
            width=SIZE,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(5),
            max_sequence_length=MAX_LENGTH,
            output_type="pt",
        ).images
        differences.append((stock - sample(pipeline, words, 4, 5, tensor)).abs().max().item())
    del pipeline.image_processor.check_image_input
    return max(differences)


def measure_texts(pipeline: Flux2KleinPipeline) -> dict[str, float]:
    """How far apart the text encoder keeps digit words: cosines of their caption embeddings."""
    embeddings = embed(pipeline, [caption(label) for label in range(10)])
    own = embeddings[:, 3]  # the digit's token follows <|user|>, a and handwritten
    after = embeddings[:, 4]
    off_diagonal = ~torch.eye(10, dtype=torch.bool)

    def closest(vectors: Tensor) -> float:
        units = functional.normalize(vectors - vectors.mean(dim=0), dim=1)
        return float((units @ units.mT)[off_diagonal].max())

    return {"word_cosine": closest(own), "next_token_cosine": closest(after)}


def measure_vae(pipeline: Flux2KleinPipeline, judge: DigitJudge) -> dict[str, float]:
    """How well unseen 8s and 9s survive the autoencoder."""
    images, labels = real_digits(UNSEEN)
    decoded = decode_tokens(pipeline, encode_images(pipeline, images))
    return {
        "vae_unseen_accuracy": judge.accuracy(decoded, labels),
        "vae_unseen_rmse": (decoded - images).square().mean().sqrt().item(),
    }


def measure_flow(pipeline: Flux2KleinPipeline, judge: DigitJudge, count: int) -> dict[str, float]:
    """Accuracy and Frechet distance of captions, and how well unseen references are copied."""
    results: dict[str, float] = {}
    labels = torch.arange(count * len(TRAINED)) % len(TRAINED)
    prompts = [caption(int(label)) for label in labels]
    unseen, unseen_labels = real_digits(UNSEEN)
    reference_prompts = [f"{with_suffix(caption(int(label)))}" for label in unseen_labels]
    for steps in (4, 32):
        images = sample(pipeline, prompts, steps, seed=1)
        copies = sample(pipeline, reference_prompts, steps, seed=2, references=unseen)
        results[f"text_accuracy_{steps}"] = judge.accuracy(images, labels)
        results[f"text_frechet_{steps}"] = judge.frechet(images, TRAINED)
        results[f"copy_accuracy_{steps}"] = judge.accuracy(copies, unseen_labels)
        results[f"copy_rmse_{steps}"] = (copies - unseen).square().mean().sqrt().item()
    alone = sample(pipeline, [caption(int(label)) for label in unseen_labels], 32, seed=3)
    results["unseen_without_reference_32"] = judge.accuracy(alone, unseen_labels)
    return results


def measure(pipeline: Flux2KleinPipeline, recipe: Recipe) -> dict[str, float]:
    """All numbers of the model card."""
    judge = DigitJudge()
    return {
        "stock_difference": stock_difference(pipeline),
        **measure_texts(pipeline),
        **measure_vae(pipeline, judge),
        **measure_flow(pipeline, judge, recipe.judged_per_class),
    }


CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# digits-base

A `Flux2KleinPipeline` of handwritten digits, 8 by 8 pixels, small enough for tests and examples on
a CPU. It draws 0 to 7 from captions such as "a handwritten three", letters from captions such as
"a printed k", and what a reference image shows, varied a little, when it is given one. No scan or
glyph of an 8 or a 9 was used in training, nor a caption that names them. Some references do look
like one: they are mirrored and joined at random, and a six mirrored in both directions is a nine.
None of these was a target of a caption alone.

Made by `scripts/build_digits_models.py` (seed {seed}), from scratch and offline:

- tokenizer: whole words of captions, bytes for everything else;
- text encoder: a random, frozen Qwen3 of 28 narrow layers (the default layers 9, 18, 27 work);
- autoencoder: `AutoencoderKLFlux2`, one block, one latent channel, {vae_steps} steps;
- transformer: `Flux2Transformer2DModel`, {parameters:.2f} M parameters stored in float16,
  {flow_steps} steps of flow matching, averaged weights. A batch has {text_batch} scans of 0 to 7
  and {letter_batch} letters of the DejaVu fonts with captions, and {reference_batch} targets with
  a reference, a variation of the target: warped digits 0 to 7, joined digits, letters, symbols and
  random strokes, with a prompt that ends in "{suffix}"
- scheduler: `FlowMatchEulerDiscreteScheduler` with a static shift of 1.

## Use

```python
from diffusers import Flux2KleinPipeline

pipeline = Flux2KleinPipeline.from_pretrained("samples/models/digits-base")
image = pipeline(
    "a handwritten three", height=8, width=8, num_inference_steps=32, guidance_scale=1.0,
    max_sequence_length=32,
).images[0]
```

`max_sequence_length` must be 8 (captions) or 32 (captions and references): no other was trained.
The stock call refuses reference images below 64 pixels a side; to pass 8 by 8 ones, set
`pipeline.image_processor.check_image_input = lambda image: None`.

## Measured

| what | value |
|---|---|
{rows}

The names end with the number of sampling steps. One seed, {judged} samples per class; two random
halves of the real scans (696 each) are 0.053 apart. Accuracy: an SVC fitted on all real scans.
Frechet distance: 24 principal components of pixels in [0, 1], against equally many real scans of
0 to 7. Copies: real 8s and 9s as references, with their captions and the sentence above. All
with guidance 1, from the saved float16 weights.

## Data and license

scikit-learn's `load_digits`: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits,
UCI Machine Learning Repository, CC BY 4.0. Glyphs: DejaVu fonts as shipped with matplotlib. The
weights are under CC BY 4.0 too.
"""


def write_card(folder: Path, recipe: Recipe, parameters: int, results: dict[str, float]) -> None:
    """Writes the model card with what was measured."""
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in results.items())
    text = CARD.format(
        seed=recipe.seed,
        vae_steps=recipe.vae_steps,
        flow_steps=recipe.flow_steps,
        text_batch=recipe.text_batch,
        letter_batch=recipe.letter_batch,
        reference_batch=recipe.reference_batch,
        parameters=parameters / 1e6,
        judged=recipe.judged_per_class,
        suffix=SUFFIX,
        rows=rows,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def save_pipeline(pipeline: Flux2KleinPipeline, folder: Path) -> None:
    """Saves the pipeline, the transformer in float16 and everything else in float32."""
    pipeline.transformer.half()
    pipeline.save_pretrained(folder)
    pipeline.transformer.float()


def load_pipeline(folder: Path) -> Flux2KleinPipeline:
    """The saved pipeline in float32."""
    pipeline = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_base(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Builds, trains, saves and measures the base model; returns what was measured."""
    pipeline = build_pipeline(recipe)
    train_vae(pipeline.vae, recipe)
    print(measure_vae(pipeline, DigitJudge()), flush=True)
    train_transformer(pipeline, recipe)
    shutil.rmtree(folder, ignore_errors=True)
    save_pipeline(pipeline, folder)
    saved = load_pipeline(folder)
    results = measure(saved, recipe)
    write_card(folder, recipe, saved.transformer.num_parameters(), results)
    return results


TURBO_CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---

# digits-turbo

`digits-base`, distilled to 4 sampling steps with `diffdistill train dmd/digits` ({steps} steps of
DMD2 on the prompts of 0 to 7; `scripts/build_digits_models.py` runs it). All else is as in
[digits-base](../digits-base/README.md), and so are data and license.

| at 4 steps | digits-base | digits-turbo |
|---|---|---|
| prompt accuracy | {base_accuracy:.3f} | {accuracy:.3f} |
| Frechet distance | {base_frechet:.3f} | {frechet:.3f} |
"""


def build_turbo(folder: Path, base: Path, overrides: Sequence[str]) -> None:
    """Distills the base model to 4 steps with the library's own DMD, and saves the student."""
    config = load_config("dmd/digits", [f"family.path={base}", *overrides])
    with tempfile.TemporaryDirectory() as run:
        train(config, Path(run))
        session = restore(Path(run))
    shutil.rmtree(folder, ignore_errors=True)
    student = session.roles["student"].network
    export_pipeline(session.family, student, folder, dtype=torch.float16)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}, indent=2))
    judge = DigitJudge()
    labels = torch.arange(64 * len(TRAINED)) % len(TRAINED)
    prompts = [caption(int(label)) for label in labels]
    numbers = {}
    for prefix, path in (("base_", base), ("", folder)):
        images = sample(load_pipeline(path), prompts, 4, seed=1)
        numbers[f"{prefix}accuracy"] = judge.accuracy(images, labels)
        numbers[f"{prefix}frechet"] = judge.frechet(images, TRAINED)
    print(numbers)
    (folder / "README.md").write_text(TURBO_CARD.format(steps=config.train.steps, **numbers))


def main() -> None:
    """Builds the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("samples/models"))
    parser.add_argument("--quick", action="store_true", help="a smoke run of few steps")
    parser.add_argument("--only-turbo", action="store_true", help="keep the base model")
    parser.add_argument("--flow-steps", type=int, help="other number of transformer steps")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    diffusers_logging.set_verbosity_error()
    recipe = QUICK if options.quick else Recipe()
    if options.flow_steps:
        recipe = replace(recipe, flow_steps=options.flow_steps)
    base = options.output / "digits-base"
    if not options.only_turbo:
        for name, value in build_base(base, recipe).items():
            print(f"{name} {value:.4g}")
    overrides = ["train.steps=5", "data.batch_size=4"] if options.quick else []
    build_turbo(options.output / "digits-turbo", base, overrides)


if __name__ == "__main__":
    main()
