"""Functions of logits that are projected a tile of rows at a time, and again for the backward pass.

A tile is one matrix product. What is made of its logits is made in blocks of a few rows, which
stay in the processor's cache; so are the logits' gradients, which overwrite the tile. The last tile
of the forward pass is kept for the backward pass, which needs its memory anyway: few rows are
projected only once. Sums over tiles are in float32 (float64 where the inputs are).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_NUMBERS = 1 << 25
"""Logits in one tile: 128 MiB in float32."""

BLOCK_NUMBERS = 1 << 18
"""Logits in one block, for each thread: 1 MiB in float32."""

LARGEST_BLOCK = 1 << 22
"""Logits in one block at most, and in one on a GPU, where a block costs some launches."""


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

    def product(self, rows: Tensor, head: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return what ``finished`` makes logits ``[n, V]`` of, in memory that may be given."""
        if head is None:
            return rows[:, : self.shared]
        with torch.autocast(rows.device.type, enabled=False):
            if out is None:
                return rows.to(self.dtype) @ head.T
            return torch.mm(rows.to(self.dtype), head.T, out=out[: len(rows)])

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
    def whole_tiles(self) -> bool:
        """Return whether it takes a whole tile at once, since it makes no copies of it."""
        ...

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
    planned: Sequence[Tensor | None] | None = None,
    tile_rows: int | None = None,
) -> tuple[Tensor, ...]:
    """Return the values ``[N, ...]`` of a function of each row.

    Args:
        function: What to compute.
        side: The side that is trained.
        others: The other sides; they are constants.
        columns: Numbers ``[N, ...]`` of each row, constants too.
        planned: The gradients ``[N, ...]`` that the values will get, up to one common factor; if it
            is one value ``[N]``, and head and bias have no gradient, up to a factor of each row.
            The side's gradients are then made in the forward pass, of the same logits; they are
            made again where it turns out otherwise.
        tile_rows: Rows projected at a time; None chooses by ``TILE_NUMBERS``.
    """
    wish = planned if torch.is_grad_enabled() else None
    job = _Job(function, side.form, others, columns or {}, wish, tile_rows)
    return _Streamed.apply(job, *side[1:])


def precise(values: Tensor) -> Tensor:
    """Return values in float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


class _Job(NamedTuple):
    """What is streamed, besides the tensors that have gradients; see ``streamed``."""

    function: RowFunction
    form: Form
    others: Sequence[Side]
    columns: Mapping[str, Tensor]
    planned: Sequence[Tensor | None] | None
    tile_rows: int | None


class _Streamed(torch.autograd.Function):
    """The values of all rows; logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, job: _Job, rows: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return each value ``[N, ...]``."""
        ctx.set_materialize_grads(False)
        ctx.job, ctx.sums, ctx.kept = job, None, None
        trains = job.form.projected and any(ctx.needs_input_grad)
        if trains and job.planned is not None:
            ctx.sums = _Sums(job, (rows, weight, bias), ctx.needs_input_grad[1:])
        tiles = _Tiles(job, (Side(job.form, rows, weight, bias), *job.others))
        found: list[Sequence[Tensor]] = []
        for tile in _pieces(max(1, len(rows)), tiles.size):
            products = tiles.products(tile)
            for part in tiles.blocks(products):
                pick = slice(tile.start + part.start, tile.start + part.stop)
                block = tiles.block(products, part, pick)
                found.append(job.function.values(block))
                if ctx.sums is not None:
                    given = _at(job.planned, pick)
                    products[0][part] = ctx.sums.slope(block, found[-1], given)
            if ctx.sums is not None:
                ctx.sums.add(tile, products[0], tiles.sides[0])
        if trains and ctx.sums is None:
            ctx.kept = tile.start, products, tiles.buffers
        values = tuple(torch.cat(parts) for parts in zip(*found, strict=True))
        marks = zip(values, job.function.trained, strict=True)
        ctx.mark_non_differentiable(*(value for value, trained in marks if not trained))
        ctx.save_for_backward(rows, weight, bias, *values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of rows, weight and bias; rows without one cost nothing."""
        job, (rows, weight, bias, *values) = ctx.job, ctx.saved_tensors
        if ctx.sums is not None:
            sums, ctx.sums = ctx.sums, None
            factor: float | Tensor | None = _factor(job.planned, upstream)
            if factor is None and not any(ctx.needs_input_grad[2:]):
                factor = _row_factors(job.planned, upstream)
            if factor is not None:
                return None, *sums.gradients(factor)
        sums = _Sums(job, (rows, weight, bias), ctx.needs_input_grad[1:])
        needed = job.function.needs_others([given is not None for given in upstream])
        sides = (Side(job.form, rows, weight, bias), *(job.others if needed else ()))
        tiles = _Tiles(job, sides)
        live = _live(rows, upstream)

        def add(tile: Tensor, products: Sequence[Tensor]) -> None:
            for part in tiles.blocks(products):
                pick = tile[part]
                block = tiles.block(products, part, pick)
                known = [value[pick] for value in values]
                products[0][part] = sums.slope(block, known, _at(upstream, pick))
            sums.add(tile, products[0], tiles.sides[0])

        if ctx.kept is not None:
            start, products, tiles.buffers = ctx.kept
            ctx.kept = None  # its memory is written to
            last, live = live[live >= start], live[live < start]
            if len(last) == len(products[0]):
                add(last, products)
            elif len(last):
                add(last, [product[last - start] for product in products[: len(sides)]])
        for piece in _pieces(len(live), tiles.size):
            add(live[piece], tiles.products(live[piece]))
        return None, *sums.gradients()


class _Tiles:
    """The logits of some rows at a time, in memory that is used again.

    Attributes:
        sides: The sides, with the part of their heads that is used, in the type of the product.
        size: Rows in a tile.
        buffers: The memory of each side's product.
    """

    def __init__(self, job: _Job, sides: Sequence[Side]) -> None:
        self.job = job
        self.sides = [side._replace(weight=side.form.head(side.weight)) for side in sides]
        words = max(x.rows.shape[-1] if x.weight is None else len(x.weight) for x in self.sides)
        self.size = job.tile_rows or max(1, TILE_NUMBERS // words)
        self.buffers: Sequence[Tensor] = ()

    def products(self, tile: Tensor | slice) -> list[Tensor]:
        """Return the product ``[n, V]`` of each side."""
        if not self.buffers:
            self.buffers = [
                x.rows.new_empty(0)
                if x.weight is None
                else x.weight.new_empty(min(self.size, len(x.rows)), len(x.weight))
                for x in self.sides
            ]
        pairs = zip(self.sides, self.buffers, strict=False)
        return [side.form.product(side.rows[tile], side.weight, x) for side, x in pairs]

    def blocks(self, products: Sequence[Tensor]) -> Iterator[slice]:
        """Yield the blocks of a tile; one, empty, if it has no rows."""
        count, words = products[0].shape
        on_cpu = products[0].device.type == "cpu"
        numbers = BLOCK_NUMBERS * torch.get_num_threads() if on_cpu else LARGEST_BLOCK
        size = count if self.job.function.whole_tiles else min(numbers, LARGEST_BLOCK) // words
        return _pieces(max(1, count), max(1, size))

    def block(self, products: Sequence[Tensor], part: slice, pick: Tensor | slice) -> Block:
        """Return a part of a tile, whose rows are ``pick`` among all."""
        pairs = zip(self.sides, products, strict=False)
        logits, *others = [side.form.finished(x[part], side.bias) for side, x in pairs]
        return Block(logits, others, {name: x[pick] for name, x in self.job.columns.items()})


class _Sums:
    """The gradients of rows, weight and bias, summed over tiles.

    Attributes:
        totals: Each sum so far, or None where there is no gradient.
    """

    def __init__(self, job: _Job, inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> None:
        self.job, self.types = job, [None if x is None else x.dtype for x in inputs]
        exact = (False, True, True)  # what only one tile adds to needs no better type
        self.totals = [
            torch.zeros_like(x, dtype=precise(x[:0]).dtype if summed else x.dtype)
            if x is not None and wanted
            else None
            for x, wanted, summed in zip(inputs, needed, exact, strict=True)
        ]

    def slope(
        self, block: Block, values: Sequence[Tensor], upstream: Sequence[Tensor | None]
    ) -> Tensor:
        """Return a block's gradient ``[n, V]`` in the product, having added that of the bias."""
        slope = self.job.function.slope(block, values, upstream)
        slope = self.job.form.unfinished(slope, block.logits)
        if (bias := self.totals[2]) is not None:
            bias[: self.job.form.shared] += slope.sum(0)
        return slope

    def add(self, tile: Tensor | slice, slope: Tensor, side: Side) -> None:
        """Add what the gradient ``[n, V]`` in the product of a tile's rows comes to."""
        (rows, weight), form = self.totals[:2], self.job.form
        if not form.projected:
            if rows is not None:
                rows[tile, : form.shared] = slope.to(rows.dtype)
            return
        assert side.weight is not None
        with torch.autocast(slope.device.type, enabled=False):
            if rows is not None:
                rows[tile] = (slope @ side.weight).to(rows.dtype)
            if weight is not None:
                _add_product(weight[: form.shared], slope, side.rows[tile].to(slope.dtype))

    def gradients(self, factor: float | Tensor = 1.0) -> tuple[Tensor | None, ...]:
        """Return the sums times a factor, in the types of what they are gradients of.

        A tensor ``[N, 1]`` has a factor for each row, where there is no other sum than of rows.
        """
        if isinstance(factor, Tensor):
            rows = self.totals[0]
            assert rows is not None, "something has a gradient"
            return rows.mul_(factor.to(rows.dtype)), None, None
        pairs = zip(self.totals, self.types, strict=True)
        scaled = ((x if x is None or factor == 1.0 else x.mul_(factor), kind) for x, kind in pairs)
        return tuple(None if total is None else total.to(kind) for total, kind in scaled)


def _add_product(total: Tensor, slope: Tensor, rows: Tensor) -> None:
    """Add ``slope.T @ rows`` to a total, which may be more precise."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, rows)
        return
    for part in _pieces(len(total), 1 << 14):
        total[part] += slope[:, part].T @ rows


def _live(rows: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """Return the numbers of the rows that a gradient reaches."""
    reached = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for given in upstream:
        if given is not None:
            reached |= (given != 0).flatten(1).any(1) if given.ndim > 1 else given != 0
    return reached.nonzero()[:, 0]


def _factor(planned: Sequence[Tensor | None], upstream: Sequence[Tensor | None]) -> float | None:
    """Return what gradients are times the planned ones, or None if they are something else."""
    pairs = [
        [torch.zeros_like(other) if x is None else x.to(other.dtype) for x in pair]
        for pair in zip(planned, upstream, strict=True)
        if (other := pair[0] if pair[1] is None else pair[1]) is not None
    ]
    expected, found = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
    if not expected.any():
        return None
    place = expected.abs().argmax()
    factor = found[place] / expected[place]
    return factor.item() if torch.allclose(found, factor * expected, 1e-5, 0.0) else None


def _row_factors(
    planned: Sequence[Tensor | None], upstream: Sequence[Tensor | None]
) -> Tensor | None:
    """Return what gradients are times the planned ones of one value, ``[N, 1]``, if they are so."""
    places = [
        index
        for index, pair in enumerate(zip(planned, upstream, strict=True))
        if any(x is not None for x in pair)
    ]
    expected, found = planned[places[0]], upstream[places[0]]
    if len(places) > 1 or expected is None or found is None:
        return None
    if expected.ndim > 1 or not expected.all():
        return None
    return (found / expected)[:, None]


def _at(values: Sequence[Tensor | None] | None, pick: Tensor | slice) -> list[Tensor | None]:
    return [None if value is None else value[pick] for value in values or ()]


def _pieces(length: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` at most that cover a length."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
