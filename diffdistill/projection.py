"""Token-wise log-probabilities and divergences, streamed from hidden states and an output head.

The logits of a whole batch are never there at once: tiles of rows are projected, compared and
forgotten, and projected again in the backward pass (``recompute``). All values are accumulated in
float32 (float64 where the inputs are), and returned unreduced.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffdistill.recompute import TILE_NUMBERS, Form, Side, precise, streamed
from diffdistill.tokenwise import IMPOSSIBLE, Maps, TokenMap

__all__ = [
    "IMPOSSIBLE",
    "TILE_NUMBERS",
    "Prediction",
    "Projection",
    "TokenMap",
    "at",
    "cross_entropy",
    "dense",
    "prediction_rows",
    "side_of",
    "spread",
    "token_logprob",
    "token_maps",
    "vocabulary",
    "with_rows",
    "without",
]


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
        return precise(prediction)
    shape = prediction.hidden.shape[:-1]
    form, rows, weight, bias = side_of(prediction, None)
    logits = form.finished(form.product(rows, form.head(weight)), bias)
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
        trained="logprob",
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
    entry_clip: float | None = None,
    reference: Prediction | None = None,
    strength: Tensor | None = None,
    share: Tensor | None = None,
    shared: int | None = None,
    planned: Mapping[TokenMap, Tensor] | None = None,
    trained: TokenMap | None = None,
    tile_rows: int | None = None,
    triton: bool = True,
) -> dict[str, Tensor]:
    """Return maps ``[...]`` of student against teacher, from one pass over the vocabulary.

    The teacher is a constant. Rows that the mask leaves out are 0 and cost nothing; rows that no
    gradient reaches cost nothing in the backward pass.

    Args:
        student: The prediction that is trained.
        teacher: What it is compared with, if anything.
        wanted: Which maps.
        tokens: Token ids ``[...]`` for the log-probabilities; where the mask is False they may
            be out of range (such as -100).
        mask: bool ``[...]``, rows to compute; None is all.
        temperature: Logits of all sides are divided by it, in every map. Gradients of a KL are
            then smaller by about its square, which the caller may multiply with.
        beta: Of the generalized Jensen-Shannon divergence, eq. 1 of GKD (arXiv:2306.13649):
            ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with
            ``m = beta teacher + (1 - beta) student``. At 0 and at 1 it is 0, not a KL. The codes
            of OPSD and TRL have the same in between, and the forward KL at 0 and the reverse KL
            at 1, which is not continuous.
        entry_clip: The most that one entry of the vocabulary may add to ``forward-kl`` and to
            ``jsd``, as in OPSD's code (arXiv:2601.18734). It does not bound the divergence, but
            turns the gradient around: with it that of the forward KL is
            ``p_j q(U) - [j in U] q_j`` in logit j, U being the entries below the clip, so that
            what the teacher most wants raised is lowered. None is off.
        reference: With ``strength`` the target of the divergences and of the teacher's maps is
            the softmax of ``strength teacher + (1 - strength) reference``, mixed as logits and
            constant: the optimum of G-OPD (arXiv:2602.12125) at each token. What is impossible to
            a side with a part in it is impossible.
        strength: ``[...]``, 1 being the teacher alone.
        share: ``[...]``: the target is the softmax of ``(1 - share) student + share teacher``,
            mixed as logits and constant (eq. 1-3 of TIDAL, arXiv:2604.26951); with a reference,
            of what ``strength`` makes of the teacher. None is the teacher alone.
            ``raw-teacher-logprob`` is of the teacher before ``strength`` and ``share``.
        shared: Use only so many first entries of all vocabularies, the rest being impossible to
            all sides (padding, say); None demands that they are equally large.
        planned: The gradients ``[...]`` that maps will get, up to one common factor: the mask, if a
            loss is the mean of a map over it. The student's gradients are then made in the forward
            pass, of the same logits, which saves a third of the time; they are made again where it
            turns out otherwise.
        trained: The only map that will get gradients, whatever they are. Where the student's head
            has none, as under a LoRA, the student's are then made in the forward pass too.
        tile_rows: Rows projected at a time; None chooses by ``TILE_NUMBERS``.
        triton: Use Triton kernels on a GPU, where they have what is wanted (``triton_maps``). The
            environment variable DIFFDISTILL_TRITON=0 turns them off everywhere.
    """
    maps = Maps(tuple(wanted), temperature, beta, entry_clip)
    about_teacher = maps.needs_others([True] * len(maps.wanted))
    assert tokens is not None or not any("logprob" in x for x in wanted), "logprobs need tokens"
    assert teacher is not None or not about_teacher, "this map needs a teacher"
    assert (reference is None) == (strength is None), "a reference goes with a strength"
    others = [] if teacher is None or not about_teacher else [teacher]
    others += [] if reference is None or not others else [reference]
    sizes = [vocabulary(side) for side in (student, *others)]
    same = len(set(sizes)) == 1
    assert same or shared, f"vocabularies of {' and '.join(map(str, sizes))}; set shared"
    shape = prediction_rows(student).shape[:-1]
    columns = {"tokens": tokens, "strength": strength, "share": share}
    given = {
        name: _rows(x.detach().expand(shape), mask) for name, x in columns.items() if x is not None
    }
    planned = planned or {}
    if trained is not None and not planned and not _head_learns(student):
        planned = {trained: torch.ones((), device=prediction_rows(student).device)}
    assert set(planned) <= set(wanted), "only wanted maps get gradients"
    expected = [_rows(planned[x].expand(shape), mask) if x in planned else None for x in wanted]
    side = side_of(student, mask, shared=shared)
    values = streamed(
        _fastest(maps, given, side) if triton else maps,
        side,
        [side_of(other, mask, shared=shared).constant() for other in others],
        given,
        planned=expected if planned else None,
        tile_rows=tile_rows,
    )
    return {name: spread(x, mask, shape) for name, x in zip(maps.wanted, values, strict=True)}


def _head_learns(prediction: Prediction) -> bool:
    """Return whether an output head gets a gradient."""
    if not isinstance(prediction, Projection):
        return False
    return any(x is not None and x.requires_grad for x in (prediction.weight, prediction.bias))


def _fastest(maps: Maps, columns: Mapping[str, Tensor], side: Side) -> Maps:
    """Return the maps by Triton kernels, where there is a GPU and they can be had."""
    allowed = os.environ.get("DIFFDISTILL_TRITON") != "0" and find_spec("triton") is not None
    if not allowed or not side.rows.is_cuda or side.form.dtype == torch.float64:
        return maps
    from diffdistill.triton_maps import TritonMaps, can_make

    if not can_make(maps, columns):
        return maps
    return TritonMaps(maps.wanted, maps.temperature)


def side_of(prediction: Prediction, mask: Tensor | None, *, shared: int | None = None) -> Side:
    """Return the rows of a prediction ``[..., V]`` that a mask ``[...]`` chooses, to be streamed.

    Args:
        prediction: The prediction.
        mask: bool; None is all rows.
        shared: How many first entries of the vocabulary there are; None is all.
    """
    rows = prediction_rows(prediction)
    rows = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask.expand(rows.shape[:-1])]
    if isinstance(prediction, Tensor):
        return Side(Form(False, 1.0, None, shared, prediction.dtype), rows, None, None)
    kind = rows.device.type
    dtype = torch.promote_types(rows.dtype, prediction.weight.dtype)
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    form = Form(True, prediction.scale, prediction.softcap, shared, dtype)
    return Side(form, rows, prediction.weight, prediction.bias)


def spread(values: Tensor, mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return values ``[N, ...]`` of the rows that a mask chooses as ``[*shape, ...]``, else 0."""
    whole = (*shape, *values.shape[1:])
    if mask is None:
        return values.reshape(whole)
    chosen = mask.expand(shape).reshape(*shape, *(1 for _ in values.shape[1:]))
    return values.new_zeros(whole).masked_scatter(chosen, values)


def _rows(column: Tensor, mask: Tensor | None) -> Tensor:
    return column.flatten() if mask is None else column[mask.expand(column.shape)]
