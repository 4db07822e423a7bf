"""Functions of logits that are projected a tile of rows at a time, and again for the backward pass.

A tile is one matrix product. What is made of its logits is made in blocks of a few rows, which
stay in the processor's cache; so are the logits' gradients, which overwrite the tile. Sums over
tiles are in float32 (float64 where the inputs are).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_NUMBERS = 1 << 25
"""Logits in one tile: 128 MiB in float32."""

BLOCK_NUMBERS = 1 << 19
"""Logits in one block, for each thread: 2 MiB in float32."""

GPU_BLOCK_NUMBERS = 1 << 22
"""Logits in one block on a GPU, where a block costs some launches."""


@dataclass(frozen=True)
class Form:
    """How rows become logits.

    Attributes:
        projected: Whether there is a head at all; else rows are logits.
        scale: Factor of the logits.
        softcap: ``c tanh(logits / c)`` after the scale, or None.
        shared: How many first logits are kept; None is all.
        dtype: Type of the matrix product.
    """

    projected: bool
    scale: float
    softcap: float | None
    shared: int | None
    dtype: torch.dtype

    def head(self, weight: Tensor | None) -> Tensor | None:
        """Return the part of a head ``[V, H]`` that is used, as the product takes it."""
        return None if weight is None else weight[: self.shared].to(self.dtype)

    def product(self, rows: Tensor, head: Tensor | None) -> Tensor:
        """Return what ``finished`` makes logits ``[n, V]`` of."""
        if head is None:
            return rows[:, : self.shared]
        with torch.autocast(rows.device.type, enabled=False):
            return rows.to(self.dtype) @ head.T

    def finished(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """Return logits ``[n, V]`` in float32 at least."""
        logits = precise(product)
        if not self.projected:
            return logits
        if bias is not None:
            logits = logits + bias[: self.shared].to(logits.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def unfinished(self, slope: Tensor, logits: Tensor) -> Tensor:
        """Return the gradient in the product, of that in the logits, overwriting the latter."""
        if not self.projected:
            return slope
        if self.softcap is not None:
            slope.mul_(1.0 - (logits / self.softcap).square())
        return slope if self.scale == 1.0 else slope.mul_(self.scale)


class Side(NamedTuple):
    """One of the models that are compared: how and of what its logits are made.

    Attributes:
        form: How.
        rows: Hidden states ``[N, H]``, or logits ``[N, V]``.
        weight: The output head ``[V, H]``, if there is one.
        bias: Its bias ``[V]``, if there is one.
    """

    form: Form
    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def constant(self) -> "Side":
        """Return it without a graph."""
        weight, bias = (None if x is None else x.detach() for x in (self.weight, self.bias))
        return Side(self.form, self.rows.detach(), weight, bias)


class Block(NamedTuple):
    """Some rows of what a ``RowFunction`` is a function of.

    Attributes:
        logits: ``[n, V]`` of the side that is trained; float32 at least.
        others: Those of the other sides.
        columns: Numbers ``[n, ...]`` of each row.
    """

    logits: Tensor
    others: Sequence[Tensor]
    columns: Mapping[str, Tensor]


class RowFunction(Protocol):
    """Values of each row, and their gradient in the logits of the side that is trained."""

    @property
    def trained(self) -> Sequence[bool]:
        """Return which values have a gradient."""
        ...

    def values(self, block: Block) -> Sequence[Tensor]:
        """Return values ``[n, ...]``."""
        ...

    def needs_others(self, given: Sequence[bool]) -> bool:
        """Return whether the gradient of the values that ``given`` chooses needs other sides."""
        ...

    def slope(
        self, block: Block, values: Sequence[Tensor], upstream: Sequence[Tensor | None]
    ) -> Tensor:
        """Return the gradient in the logits ``[n, V]``, as a tensor of its own.

        Args:
            block: The rows; ``others`` are missing where they are not needed.
            values: What ``values`` returned.
            upstream: The gradient in each value.
        """
        ...


def streamed(
    function: RowFunction,
    side: Side,
    others: Sequence[Side] = (),
    columns: Mapping[str, Tensor] | None = None,
    *,
    tile_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the values ``[N, ...]`` of a function of each row.

    Args:
        function: What to compute.
        side: The side that is trained.
        others: The other sides; they are constants.
        columns: Numbers ``[N, ...]`` of each row, constants too.
        tile_rows: Rows projected at a time; None chooses by ``TILE_NUMBERS``.
    """
    return _Streamed.apply(function, side.form, others, columns or {}, tile_rows, *side[1:])


def precise(values: Tensor) -> Tensor:
    """Return values in float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


class _Streamed(torch.autograd.Function):
    """The values of all rows; logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        function: RowFunction,
        form: Form,
        others: Sequence[Side],
        columns: Mapping[str, Tensor],
        tile_rows: int | None,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return each value ``[N, ...]``."""
        ctx.set_materialize_grads(False)
        ctx.parts = function, form, others, columns, tile_rows
        sides = _prepared((Side(form, rows, weight, bias), *others))
        found: list[Sequence[Tensor]] = []
        for tile in _pieces(max(1, len(rows)), tile_rows or _tile_rows(sides)):
            found += _values(function, sides, columns, tile)
        values = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        marks = zip(values, function.trained, strict=True)
        ctx.mark_non_differentiable(*(value for value, trained in marks if not trained))
        ctx.save_for_backward(rows, weight, bias, *values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of rows, weight and bias; rows without one cost nothing."""
        function, form, others, columns, tile_rows = ctx.parts
        rows, weight, bias, *values = ctx.saved_tensors
        sums = _Sums(form, (rows, weight, bias), ctx.needs_input_grad[5:])
        used = others if function.needs_others([given is not None for given in upstream]) else ()
        sides = _prepared((Side(form, rows, weight, bias), *used))
        live = _live(rows, upstream)
        for piece in _pieces(len(live), tile_rows or _tile_rows(sides)):
            _add_slopes(sums, function, sides, columns, live[piece], values, upstream)
        return (None,) * 5 + sums.gradients()


def _values(
    function: RowFunction, sides: Sequence[Side], columns: Mapping[str, Tensor], tile: slice
) -> list[Sequence[Tensor]]:
    """Return the values of each block of a tile."""
    products = _products(sides, tile)
    found = []
    for part in _blocks(products[0]):
        pick = slice(tile.start + part.start, tile.start + part.stop)
        found.append(function.values(_block(sides, products, part, columns, pick)))
    return found


def _add_slopes(
    sums: "_Sums",
    function: RowFunction,
    sides: Sequence[Side],
    columns: Mapping[str, Tensor],
    tile: Tensor,
    values: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
) -> None:
    """Add the gradients of the rows ``tile``."""
    products = _products(sides, tile)
    for part in _blocks(products[0]):
        pick = tile[part]
        block = _block(sides, products, part, columns, pick)
        given = [None if gradient is None else gradient[pick] for gradient in upstream]
        slope = function.slope(block, [value[pick] for value in values], given)
        slope = sides[0].form.unfinished(slope, block.logits)
        sums.add_bias(slope)
        products[0][part] = slope
    sums.add(tile, products[0], sides[0])


class _Sums:
    """The gradients of rows, weight and bias, summed over tiles.

    Attributes:
        totals: Each sum so far, or None where there is no gradient.
    """

    def __init__(self, form: Form, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.form, self.types = form, [None if x is None else x.dtype for x in inputs]
        exact = (False, True, True)  # what only one tile adds to needs no better type
        self.totals = [
            torch.zeros_like(x, dtype=precise(x[:0]).dtype if summed else x.dtype)
            if x is not None and wanted
            else None
            for x, wanted, summed in zip(inputs, needed, exact, strict=True)
        ]

    def add_bias(self, slope: Tensor) -> None:
        """Add a block's gradient ``[n, V]`` in the product, as it is that of the bias."""
        if (bias := self.totals[2]) is not None:
            bias[: self.form.shared] += slope.sum(0)

    def add(self, tile: Tensor, slope: Tensor, side: Side) -> None:
        """Add what the gradient ``[n, V]`` in the product of a tile's rows comes to."""
        rows, weight = self.totals[:2]
        if not self.form.projected:
            if rows is not None:
                rows[tile, : self.form.shared] = slope.to(rows.dtype)
            return
        assert side.weight is not None
        with torch.autocast(slope.device.type, enabled=False):
            if rows is not None:
                rows[tile] = (slope @ side.weight).to(rows.dtype)
            if weight is not None:
                _add_product(weight[: self.form.shared], slope, side.rows[tile].to(slope.dtype))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the sums in the types of what they are gradients of."""
        pairs = zip(self.totals, self.types, strict=True)
        return tuple(None if total is None else total.to(kind) for total, kind in pairs)


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Add ``slope.T @ rows`` to a total, which may be more precise."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, rows)
        return
    for part in _pieces(len(total), 1 << 14):
        total[part] += slope[:, part].T @ rows


def _prepared(sides: Sequence[Side]) -> list[Side]:
    """Return sides with the part of their heads that is used, in the type of the product."""
    return [side._replace(weight=side.form.head(side.weight)) for side in sides]


def _products(sides: Sequence[Side], tile: Tensor | slice) -> list[Tensor]:
    return [side.form.product(side.rows[tile], side.weight) for side in sides]


def _block(
    sides: Sequence[Side],
    products: Sequence[Tensor],
    part: slice,
    columns: Mapping[str, Tensor],
    pick: Tensor | slice,
) -> Block:
    """Return a part of a tile, whose rows are ``pick`` among all."""
    pairs = zip(sides, products, strict=True)
    logits, *others = [side.form.finished(x[part], side.bias) for side, x in pairs]
    return Block(logits, others, {name: column[pick] for name, column in columns.items()})


def _live(rows: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Return the numbers of the rows that a gradient reaches."""
    reached = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for given in upstream:
        if given is not None:
            reached |= (given != 0).flatten(1).any(1) if given.ndim > 1 else given != 0
    return reached.nonzero()[:, 0]


def _tile_rows(sides: Sequence[Side]) -> int:
    words = max(x.rows.shape[-1] if x.weight is None else len(x.weight) for x in sides)
    return max(1, TILE_NUMBERS // words)


def _blocks(product: Tensor) -> Iterator[slice]:
    on_cpu = product.device.type == "cpu"
    numbers = BLOCK_NUMBERS * torch.get_num_threads() if on_cpu else GPU_BLOCK_NUMBERS
    return _pieces(max(1, len(product)), max(1, numbers // max(1, product.shape[-1])))


def _pieces(length: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` at most that cover a length."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
