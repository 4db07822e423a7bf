"""Token-wise log-probabilities and divergences, streamed from hidden states and an output head.

The logits of a whole batch are never there at once: tiles of rows are projected, compared and
forgotten, and projected again in the backward pass. All values are accumulated in float32
(float64 where the inputs are), and returned unreduced.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TokenMap = Literal[
    "logprob",
    "teacher-logprob",
    "entropy",
    "teacher-entropy",
    "forward-kl",
    "reverse-kl",
    "jsd",
]
"""What ``token_maps`` can return. ``forward-kl`` is KL(teacher || student)."""

TILE_NUMBERS = 1 << 26
"""Logits in one tile: 256 MiB in float32."""

IMPOSSIBLE = -1e30
"""Stands for the log-probability of a suppressed token in sums: 0 times it is 0, not NaN."""


class Projection(NamedTuple):
    """Logits that are not yet computed: ``hidden @ weight.T + bias``, scaled and softly capped.

    Attributes:
        hidden: Hidden states ``[..., H]``.
        weight: The output head, ``[V, H]``.
        bias: Its bias ``[V]``, or None.
        scale: Factor of the logits (Cohere's ``logit_scale``).
        softcap: ``c tanh(logits / c)`` after the scale (Gemma 2), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


Prediction: TypeAlias = Projection | Tensor
"""Logits ``[..., V]``, or what they are projected from."""


def vocabulary(prediction: Prediction) -> int:
    """Return the number of logits of one token."""
    table = prediction.weight.shape[0] if isinstance(prediction, Projection) else 0
    return table or prediction_rows(prediction).shape[-1]


def prediction_rows(prediction: Prediction) -> Tensor:
    """Return what has one row per token: hidden states, or the logits themselves."""
    return prediction.hidden if isinstance(prediction, Projection) else prediction


def with_rows(prediction: Prediction, rows: Tensor) -> Prediction:
    """Return the prediction of other rows (see ``prediction_rows``) under the same head."""
    return prediction._replace(hidden=rows) if isinstance(prediction, Projection) else rows


def at(prediction: Prediction, index: Tensor | tuple[Tensor, ...]) -> Prediction:
    """Return the rows of a prediction ``[..., V]`` that an index chooses, ``[N, V]``.

    The index is a mask ``[...]``, or the numbers ``[N]`` of each axis but the last.
    """
    return with_rows(prediction, prediction_rows(prediction)[index])


def without(prediction: Prediction, ids: Sequence[int]) -> Prediction:
    """Return a prediction under which the tokens ``ids`` are impossible.

    With the mask token, it is the zero masking probability of MDLM's SUBS parameterization.
    """
    if isinstance(prediction, Tensor):
        kept = prediction.clone()
        kept[..., list(ids)] = -torch.inf
        return kept
    assert prediction.softcap is None, "a soft cap would make suppressed logits finite"
    weight, bias = prediction.weight, prediction.bias
    table = weight.new_zeros(len(weight)) if bias is None else bias.clone()
    table[list(ids)] = -torch.inf
    return prediction._replace(bias=table)


def dense(prediction: Prediction) -> Tensor:
    """Return the logits ``[..., V]`` in float32 at least, for small inputs and for tests."""
    if isinstance(prediction, Tensor):
        return _precise(prediction)
    shape = prediction.hidden.shape[:-1]
    hidden = prediction.hidden.reshape(-1, prediction.hidden.shape[-1])
    form = _form(prediction, None)
    logits = form.logits(hidden, prediction.weight, prediction.bias)
    return logits.reshape(*shape, logits.shape[-1])


def token_logprob(
    prediction: Prediction,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    tile_rows: int | None = None,
) -> Tensor:
    """Return the log-probability ``[...]`` of given tokens ``[...]``; see ``token_maps``."""
    maps = token_maps(
        prediction,
        None,
        ("logprob",),
        tokens=tokens,
        mask=mask,
        temperature=temperature,
        tile_rows=tile_rows,
    )
    return maps["logprob"]


def cross_entropy(
    prediction: Prediction,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """Return the cross-entropy ``[...]`` of given tokens ``[...]``; see ``token_maps``."""
    return -token_logprob(prediction, tokens, mask=mask, tile_rows=tile_rows)


def token_maps(
    student: Prediction,
    teacher: Prediction | None,
    wanted: Sequence[TokenMap],
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    share: Tensor | None = None,
    shared: int | None = None,
    tile_rows: int | None = None,
) -> dict[str, Tensor]:
    """Return maps ``[...]`` of student against teacher, from one pass over the vocabulary.

    The teacher is a constant. Rows that the mask leaves out are 0 and cost nothing.

    Args:
        student: The prediction that is trained.
        teacher: What it is compared with, if anything.
        wanted: Which maps.
        tokens: Token ids ``[...]`` for the log-probabilities; where the mask is False they may
            be out of range (such as -100).
        mask: bool ``[...]``, rows to compute; None is all.
        temperature: Logits of both sides are divided by it, in every map. Gradients of a KL are
            then smaller by about its square, which the caller may multiply with.
        beta: Of the generalized Jensen-Shannon divergence, eq. 1 of GKD (arXiv:2306.13649):
            ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with
            ``m = beta teacher + (1 - beta) student``. At 0 and at 1 it is 0, not a KL.
        share: ``[...]``: the divergences and the teacher's maps are against the softmax of
            ``(1 - share) student + share teacher``, mixed as logits and constant (eq. 1-3 of
            TIDAL, arXiv:2604.26951). None is the teacher alone.
        shared: Use only so many first entries of both vocabularies; None demands that they are
            equally large.
        tile_rows: Rows projected at a time; None chooses by ``TILE_NUMBERS``.
    """
    rows = prediction_rows(student)
    shape = rows.shape[:-1]
    chosen = torch.ones(shape, dtype=torch.bool, device=rows.device) if mask is None else mask
    chosen = chosen.expand(shape)
    plan = _Plan(tuple(wanted), temperature, beta, share is not None)
    assert tokens is not None or not plan.needs_tokens, "log-probabilities need tokens"
    assert teacher is not None or not plan.needs_teacher, "this map needs a teacher"
    used = teacher if plan.needs_teacher else None
    if used is not None and shared is None:
        sizes = vocabulary(student), vocabulary(used)
        assert sizes[0] == sizes[1], f"vocabularies of {sizes[0]} and {sizes[1]}; set shared"
    student_parts = _parts(at(student, chosen))
    teacher_parts = None if used is None else _parts(_constant(at(used, chosen)))
    per_row = {
        "tokens": None if tokens is None else tokens.expand(shape)[chosen],
        "share": None if share is None else share.detach().expand(shape)[chosen],
    }
    values = _Streamed.apply(
        plan,
        _form(student, shared),
        None if used is None else _form(used, shared),
        teacher_parts,
        per_row,
        tile_rows or max(1, TILE_NUMBERS // (shared or vocabulary(student))),
        *student_parts,
    )
    maps: dict[str, Tensor] = {}
    for name, value in zip(plan.wanted, values, strict=True):
        maps[name] = value.new_zeros(shape).masked_scatter(chosen, value)
    return maps


@dataclass(frozen=True)
class _Form:
    """How rows become logits.

    Attributes:
        projected: Whether there is a head at all.
        scale: See ``Projection``.
        softcap: See ``Projection``.
        shared: How many first logits are kept.
        dtype: Type of the matrix product.
    """

    projected: bool
    scale: float
    softcap: float | None
    shared: int | None
    dtype: torch.dtype

    def logits(self, rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return logits ``[N, V]`` of rows, in float32 at least."""
        if not self.projected:
            return _precise(rows[:, : self.shared])
        assert weight is not None
        kind = rows.device.type
        with torch.autocast(kind, enabled=False):
            product = rows.to(self.dtype) @ weight[: self.shared].to(self.dtype).T
            logits = _precise(product)
            if bias is not None:
                logits = logits + bias[: self.shared].to(logits.dtype)
            logits = logits * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _form(prediction: Prediction, shared: int | None) -> _Form:
    if isinstance(prediction, Tensor):
        return _Form(False, 1.0, None, shared, prediction.dtype)
    kind = prediction.hidden.device.type
    dtype = torch.promote_types(prediction.hidden.dtype, prediction.weight.dtype)
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return _Form(True, prediction.scale, prediction.softcap, shared, dtype)


def _parts(prediction: Prediction) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(prediction, Projection):
        return prediction.hidden, prediction.weight, prediction.bias
    return prediction, None, None


def _constant(prediction: Prediction) -> Prediction:
    if isinstance(prediction, Projection):
        bias = None if prediction.bias is None else prediction.bias.detach()
        return prediction._replace(
            hidden=prediction.hidden.detach(), weight=prediction.weight.detach(), bias=bias
        )
    return prediction.detach()


def _precise(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class _Plan:
    """Which maps are made of a tile of logits, and how."""

    wanted: tuple[TokenMap, ...]
    temperature: float
    beta: float
    mixes: bool

    @property
    def needs_tokens(self) -> bool:
        """Return whether a map is about given tokens."""
        return any(name.endswith("logprob") for name in self.wanted)

    @property
    def needs_teacher(self) -> bool:
        """Return whether a map is about the teacher."""
        return any(name not in ("logprob", "entropy") for name in self.wanted)

    def maps(
        self, logits: Tensor, target: Tensor | None, tokens: Tensor | None, share: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return each map ``[N]`` of logits ``[N, V]``."""
        own = F.log_softmax(logits / self.temperature, dim=-1)
        student = own.clamp_min(IMPOSSIBLE)
        other = teacher = own.detach()
        if target is not None:
            if share is not None:
                part = share.to(target.dtype)[:, None]
                # Finite, because 0 times the logit of a suppressed token would be NaN.
                ours = logits.detach().clamp_min(IMPOSSIBLE)
                target = (1.0 - part) * ours + part * target.clamp_min(IMPOSSIBLE)
            other = F.log_softmax(target.to(own.dtype) / self.temperature, dim=-1)
            teacher = other.clamp_min(IMPOSSIBLE)
        makers: Mapping[str, Callable[[], Tensor]] = {
            "logprob": lambda: _taken(own, tokens),
            "teacher-logprob": lambda: _taken(other, tokens),
            "entropy": lambda: -(student.exp() * student).sum(-1),
            "teacher-entropy": lambda: -(teacher.exp() * teacher).sum(-1),
            "forward-kl": lambda: _kl(teacher, student),
            "reverse-kl": lambda: _kl(student, teacher),
            "jsd": lambda: _jsd(student, teacher, self.beta),
        }
        return tuple(makers[name]() for name in self.wanted)


def _taken(logprobs: Tensor, tokens: Tensor | None) -> Tensor:
    assert tokens is not None
    return logprobs.gather(-1, tokens[:, None])[:, 0]


def _kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def _jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return 0.0 * student[:, 0]
    weights = student.new_tensor([beta, 1.0 - beta]).log()
    middle = torch.logsumexp(torch.stack([teacher + weights[0], student + weights[1]]), dim=0)
    return beta * _kl(teacher, middle) + (1.0 - beta) * _kl(student, middle)


class _Streamed(torch.autograd.Function):
    """The maps of all tiles; their logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        form: _Form,
        teacher_form: _Form | None,
        teacher: tuple[Tensor, Tensor | None, Tensor | None] | None,
        per_row: Mapping[str, Tensor | None],
        tile_rows: int,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return each wanted map ``[N]``."""
        ctx.parts = (plan, form, teacher_form, teacher, per_row, tile_rows)
        ctx.save_for_backward(rows, weight, bias)
        tiles: list[list[Tensor]] = [[] for _ in plan.wanted]
        for tile in _tiles(len(rows), tile_rows):
            logits = form.logits(rows[tile], weight, bias)
            maps = plan.maps(logits, *_given(teacher_form, teacher, per_row, tile))
            for found, value in zip(tiles, maps, strict=True):
                found.append(value)
        empty = _precise(rows.new_zeros(0))
        return tuple(torch.cat(found) if found else empty.clone() for found in tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        """Return the gradients of rows, weight and bias."""
        plan, form, teacher_form, teacher, per_row, tile_rows = ctx.parts
        inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:]
        sums = [
            None if x is None or not needed else torch.zeros_like(x, dtype=_sum_type(x))
            for x, needed in zip(inputs, wanted, strict=True)
        ]
        for tile in _tiles(len(inputs[0]), tile_rows):
            leaves = [None if x is None else x.detach() for x in inputs]
            leaves[0] = inputs[0][tile].detach()
            tracked = [
                leaf.requires_grad_()
                for leaf, total in zip(leaves, sums, strict=True)
                if leaf is not None and total is not None
            ]
            with torch.enable_grad():
                logits = form.logits(*leaves)
                maps = plan.maps(logits, *_given(teacher_form, teacher, per_row, tile))
                pairs = [
                    (value, given[tile])
                    for value, given in zip(maps, upstream, strict=True)
                    if value.requires_grad
                ]
            if not pairs:
                continue
            values, given = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(values, tracked, given, allow_unused=True))
            for index, total in enumerate(sums):
                gradient = None if total is None else next(found)
                if total is not None and gradient is not None:
                    (total[tile] if index == 0 else total).add_(gradient)
        returned = [
            None if total is None else total.to(x.dtype)
            for total, x in zip(sums, inputs, strict=True)
        ]
        return (None,) * 6 + tuple(returned)


def _sum_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _tiles(num_rows: int, tile_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, tile_rows):
        yield slice(start, min(start + tile_rows, num_rows))


@torch.no_grad()
def _given(
    form: _Form | None,
    teacher: tuple[Tensor, Tensor | None, Tensor | None] | None,
    per_row: Mapping[str, Tensor | None],
    tile: slice,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the teacher's logits, the tokens and the shares of a tile."""
    tokens, share = per_row["tokens"], per_row["share"]
    target = None
    if form is not None:
        assert teacher is not None
        target = form.logits(teacher[0][tile], teacher[1], teacher[2])
    return (
        target,
        None if tokens is None else tokens[tile],
        None if share is None else share[tile],
    )
