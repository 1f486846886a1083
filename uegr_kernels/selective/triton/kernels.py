"""The selective step's kernels in Triton: Eq. 7-9 and Algorithm 1, lines 10-13, on any number of
tensors.

The kernels find tensors by rows of addresses and sizes in device memory. Tensors of like dtypes
make a family, which is launched together:

    prepare_kernel    a lane per tensor: advances the step, works out what a tensor's elements
        share, empties its statistics
    update_kernel     a program per item, a piece of 16,384 elements: gathers its gradient's
        extremes, or updates it
    count_kernel, tabulate_kernel    "rank": the histogram of a gradient, and from it 1/p by bin
    keep_kernel       "previous": the gathered extremes into the parameter's state
    join_kernel       the gathered extremes into those of a wider scope

Where this step's own statistics are needed, `update_kernel` updates one group of tensors and
gathers the next one's extremes; a group's gradients fit the second-level cache. In a piece that is
whole, aligned and in natural order the accesses have 128 bits and one call of Philox serves four
neighbours; anything else (tails, views, shards) goes element by element behind a mask.

Upper case is what is known when a kernel is compiled: a kernel's options are one argument, `form`.
"""

import typing

import triton
import triton.language as tl

from ...core import triton_ops
from .. import options
from .math import (
    SGD,
    AdamW,
    adamw_update_rule,
    divide,
    drawn_factor,
    finite,
    inverse_of_rank,
    inverse_probability,
    probability_of_scope,
    rank_bin,
    root,
    round_stochastically,
    sgd_update_rule,
    square,
)

RANK_BINS = tl.constexpr(options.RANK_BINS)
# from one table of bins to the next
TABLE = tl.constexpr(0x8000)

# elements at a time
BLOCK = tl.constexpr(1024)
# the same behind a mask, where an element has an index, a call of Philox and perhaps offsets of its
# own
TAIL = tl.constexpr(256)
# elements of an item
PIECE = tl.constexpr(16 * 1024)
# tensors a program of `prepare_kernel` and `keep_kernel` looks at
LANES = tl.constexpr(128)
# tables of bins that are alive at a time: 512 MiB at most
TABLES = tl.constexpr(4096)


class TensorRow(typing.NamedTuple):
    """Holds what kernels know of a tensor, a column of it by tensor: addresses (0: no such list),
    then sizes. g's address is not among it: it stands in the head.
    """

    theta: list[int]
    moment1: list[int]
    moment2: list[int]
    moment3: list[int]
    saliency: list[int]
    step: list[int]
    minimum: list[int]
    maximum: list[int]
    axes: list[int]
    size: list[int]
    stream: list[int]
    offset: list[int]
    run: list[int]
    stride: list[int]
    every: list[int]
    position: list[int]


# Where they stand in a row; a test compares.
(
    THETA,
    MOMENT1,
    MOMENT2,
    MOMENT3,
    SALIENCY,
    STEP,
    MINIMUM,
    MAXIMUM,
    AXES,
    SIZE,
    STREAM,
    OFFSET,
    RUN,
    STRIDE,
    EVERY,
    POSITION,
) = map(tl.constexpr, range(16))
ROW = tl.constexpr(16)


class StepHead(typing.NamedTuple):
    """Holds what may change from step to step: float64 numbers, the seed and a step count. The
    address of every gradient follows it.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float
    dampening: float
    # -1: maximize
    sign: float
    steepness: float
    threshold: float
    largest_inverse: float
    constant_inverse: float
    seed: int
    count: int


# Where they stand in the head; a test compares.
(
    LR,
    BETA1,
    BETA2,
    EPS,
    WEIGHT_DECAY,
    MOMENTUM,
    DAMPENING,
    SIGN,
    STEEPNESS,
    THRESHOLD,
    LARGEST_INVERSE,
    CONSTANT_INVERSE,
    SEED,
    COUNT,
) = map(tl.constexpr, range(14))
HEAD = tl.constexpr(16)

# Where `prepare_kernel` puts the scalars of a tensor's step into its row of them; SGD has one.
CONSTANTS = tl.constexpr(8)
(OWN_DECAY, OWN_STEP_SIZE, OWN_INVERSE_ROOT, OWN_BETA2, OWN_COMPLEMENT1, OWN_COMPLEMENT2) = map(
    tl.constexpr, range(6)
)
OWN_RATE = tl.constexpr(0)


class Form(typing.NamedTuple):
    """Says what a family's kernels are compiled for: the options that change the code, and the
    dtypes of its lists (None: no such list).
    """

    # "adamw", "sgd", "multiply" (the gradient in place), "probability", "mask", "statistics"
    RULE: str
    # of the arithmetic
    DTYPE: object
    NORMALIZATION: str
    # of the statistics: "own", "kept", "scope" (a row for all), "scopes" (a row each), "" where
    # there are none
    SOURCE: str
    RANDOM: bool
    RESCALE: bool
    # of the target "update"
    TO_UPDATE: bool
    NESTEROV: bool
    THETA: object
    MOMENT1: object
    MOMENT2: object
    MOMENT3: object
    S: object
    G: object
    STEP: object
    # of the extremes that are kept
    LOW: object
    HIGH: object
    STRIDED: bool
    # a moment is rounded stochastically
    ROUNDING: bool


# What travels together.


class Lists(typing.NamedTuple):
    """Holds a pointer, or a block of them, for each elementwise list."""

    theta: object
    moment1: object
    moment2: object
    moment3: object
    s: object
    g: object


class Extremes(typing.NamedTuple):
    """Holds a minimum and a maximum: of the bits of |g| (or of s), or of s itself."""

    low: object
    high: object


class Shared(typing.NamedTuple):
    """Holds what a piece's elements share; `rule`: the scalars of AdamW's or SGD's step."""

    unscale: object
    probability: object
    largest_inverse: object
    table_ptr: object
    rule: object


# ---- How elements arrive


@triton.jit
def number(head_ptr, WHICH: tl.constexpr):
    """Reads a float64 of the table's head."""
    return tl.load(head_ptr + WHICH).to(tl.float64, bitcast=True)


@triton.jit
def allowed(mask, found_inf_ptr):
    """Returns a mask, empty where GradScaler found something that is not finite: then nothing may
    change.
    """
    if found_inf_ptr is None:
        return mask
    else:
        return tl.where(mask, tl.load(found_inf_ptr), 1) == 0


@triton.jit
def bounds(row_ptr, piece, found_inf_ptr):
    """Returns where a piece starts and ends; at its start where nothing may change."""
    start = piece.to(tl.int64) * PIECE
    end = tl.minimum(start + PIECE, tl.load(row_ptr + SIZE))
    if found_inf_ptr is not None:
        end = tl.where(tl.load(found_inf_ptr) == 0, end, start)
    return start, end


@triton.jit
def read(ptrs, mask, DTYPE: tl.constexpr):
    """Reads elements in another dtype, 0 where the mask leaves them out."""
    if mask is None:
        return triton_ops.widened(tl.load(ptrs, eviction_policy="evict_first"), DTYPE)
    else:
        return triton_ops.widened(tl.load(ptrs, mask=mask, other=0), DTYPE)


@triton.jit
def read_again(ptrs, DTYPE: tl.constexpr):
    """Reads whole blocks in another dtype, which will be read once more soon."""
    return triton_ops.widened(tl.load(ptrs, eviction_policy="evict_last"), DTYPE)


@triton.jit
def write(ptrs, value, mask):
    """Writes elements, rounded to nearest in the dtype of the memory."""
    value = triton_ops.nearest(value, ptrs.dtype.element_ty)
    if mask is None:
        tl.store(ptrs, value, eviction_policy="evict_first")
    else:
        tl.store(ptrs, value, mask=mask)


@triton.jit
def write_moment(ptrs, value, mask, low16):
    """Writes elements of a moment; to bfloat16 by stochastic rounding with 16 random bits each."""
    if ptrs.dtype.element_ty == tl.bfloat16:
        write(ptrs, round_stochastically(value, low16), mask)
    else:
        write(ptrs, value, mask)


@triton.jit
def read_gradient(ptrs, mask, unscale, form):
    """Reads g in the arithmetic's dtype, without the loss scale; negative to maximize."""
    return read(ptrs, mask, form.DTYPE) * unscale


@triton.jit
def list_pointer(row_ptr, column, DTYPE: tl.constexpr, other, ALIGNED: tl.constexpr):
    """Returns the pointer to a list's tensor; `other` where there is no such list."""
    if DTYPE is None:
        return other
    elif ALIGNED:
        return triton_ops.aligned_pointer(tl.load(row_ptr + column), DTYPE)
    else:
        return triton_ops.pointer(tl.load(row_ptr + column), DTYPE)


@triton.jit
def list_pointers(head_ptr, row_ptr, form, ALIGNED: tl.constexpr):
    """Returns the pointers to a tensor's lists; g's stands in the head, among what every step may
    change.
    """
    g = list_pointer(head_ptr + HEAD, tl.load(row_ptr + POSITION), form.G, None, ALIGNED)
    return Lists(
        theta=list_pointer(row_ptr, THETA, form.THETA, g, ALIGNED),
        moment1=list_pointer(row_ptr, MOMENT1, form.MOMENT1, g, ALIGNED),
        moment2=list_pointer(row_ptr, MOMENT2, form.MOMENT2, g, ALIGNED),
        moment3=list_pointer(row_ptr, MOMENT3, form.MOMENT3, g, ALIGNED),
        s=list_pointer(row_ptr, SALIENCY, form.S, g, ALIGNED),
        g=g,
    )


@triton.jit
def elements(lists, at):
    """Returns pointers to the lists' elements `at`."""
    return Lists(
        theta=lists.theta + at,
        moment1=lists.moment1 + at,
        moment2=lists.moment2 + at,
        moment3=lists.moment3 + at,
        s=lists.s + at,
        g=lists.g + at,
    )


@triton.jit
def strided_elements(lists, local, row_ptr):
    """Returns pointers to elements where each list has strides of its own. AXES names a table: how
    many axes; then by axis its size and the lists' strides.
    """
    found = elements(lists, local * 0)
    axes_ptr = triton_ops.pointer(tl.load(row_ptr + AXES), tl.int64)
    rest = local
    for _ in range(tl.load(axes_ptr)):
        at = rest % tl.load(axes_ptr + 1)
        rest = rest // tl.load(axes_ptr + 1)
        found = Lists(
            theta=found.theta + at * tl.load(axes_ptr + 2),
            moment1=found.moment1 + at * tl.load(axes_ptr + 3),
            moment2=found.moment2 + at * tl.load(axes_ptr + 4),
            moment3=found.moment3 + at * tl.load(axes_ptr + 5),
            s=found.s + at * tl.load(axes_ptr + 6),
            g=found.g + at * tl.load(axes_ptr + 7),
        )
        axes_ptr += 7
    return found


@triton.jit
def any_elements(lists, local, row_ptr, form):
    """Returns pointers to elements of dense or strided lists."""
    if form.STRIDED:
        return strided_elements(lists, local, row_ptr)
    else:
        return elements(lists, local)


@triton.jit
def whole_blocks(head_ptr, row_ptr, start, end, form):
    """Returns how many blocks from `start` on go without masks: all lists aligned, elements in
    order and numbered from a multiple of 4.
    """
    together = (
        tl.load(head_ptr + HEAD + tl.load(row_ptr + POSITION)) | tl.load(row_ptr + OFFSET) * 4
    )
    together = (
        together
        | tl.load(row_ptr + THETA)
        | tl.load(row_ptr + MOMENT1)
        | tl.load(row_ptr + MOMENT2)
        | tl.load(row_ptr + MOMENT3)
        | tl.load(row_ptr + SALIENCY)
    )
    in_order = tl.load(row_ptr + RUN) >= tl.load(row_ptr + SIZE)
    regular = (together % 16 == 0) & in_order & (end > start)
    if form.STRIDED:
        regular = regular & False
    return tl.where(regular, (end - start) // BLOCK, 0).to(tl.int32)


@triton.jit
def unscaling(head_ptr, grad_scale_ptr, DTYPE: tl.constexpr):
    """Returns what a gradient is multiplied by: 1/grad_scale, negative to maximize."""
    sign = number(head_ptr, SIGN)
    if grad_scale_ptr is not None:
        sign = sign / tl.load(grad_scale_ptr).to(tl.float64)
    return sign.to(DTYPE)


# ---- Extremes


@triton.jit
def bits_of(x):
    """Returns the bits of |x|: they order as the floats do."""
    return (
        tl.abs(x).to(tl.int64, bitcast=True)
        if x.dtype == tl.float64
        else tl.abs(x).to(tl.int32, bitcast=True)
    )


@triton.jit
def from_bits(bits, DTYPE: tl.constexpr):
    """Returns the float of a dtype whose bits these are."""
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def empty_low(DTYPE: tl.constexpr):
    """Returns what is above the bits of any float; 0 is the other end's start."""
    return 0x7FFFFFFFFFFFFFFF if DTYPE == tl.float64 else 0x7FFFFFFF


@triton.jit
def no_extremes(bits_ptr, WIDTH: tl.constexpr, form):
    """Returns a block of extremes of nothing."""
    zero = tl.zeros([WIDTH], bits_ptr.dtype.element_ty)
    return Extremes(low=zero + empty_low(form.DTYPE), high=zero)


@triton.jit
def widened_extremes(extremes, g, s, mask, form):
    """Returns the extremes with those of a block in them."""
    counts = finite(g) & finite(s) if form.S is not None else finite(g)
    if mask is not None:
        counts = counts & mask
    bits = bits_of(s) if form.S is not None else bits_of(g)
    return Extremes(
        low=tl.minimum(extremes.low, tl.where(counts, bits, empty_low(form.DTYPE))),
        high=tl.maximum(extremes.high, tl.where(counts, bits, 0)),
    )


@triton.jit
def join_extremes(bits_ptr, extremes, more):
    """Joins extremes of blocks and of a tail into a tensor's."""
    low = tl.minimum(tl.min(extremes.low, axis=0), tl.min(more.low, axis=0))
    high = tl.maximum(tl.max(extremes.high, axis=0), tl.max(more.high, axis=0))
    tl.atomic_min(bits_ptr, low, sem="relaxed")
    tl.atomic_max(bits_ptr + 1, high, sem="relaxed")


@triton.jit
def kept_extremes(row_ptr, form):
    """Reads minimum and maximum of s of the previous step; NaN where nothing is kept yet."""
    low_ptr = triton_ops.pointer(tl.load(row_ptr + MINIMUM), form.LOW)
    high_ptr = triton_ops.pointer(tl.load(row_ptr + MAXIMUM), form.HIGH)
    return Extremes(low=tl.load(low_ptr).to(tl.float64), high=tl.load(high_ptr).to(tl.float64))


@triton.jit
def found_extremes(low, high, form):
    """Returns minimum and maximum of s from the bits of |g| (or of s); infinity and its negative
    where nothing is finite.
    """
    least, most = from_bits(tl.minimum(low, high), form.DTYPE), from_bits(high, form.DTYPE)
    if form.S is None:
        least, most = square(least), square(most)
    return Extremes(
        low=tl.where(low > high, float("inf"), least.to(tl.float64)),
        high=tl.where(low > high, float("-inf"), most.to(tl.float64)),
    )


@triton.jit
def scope_extremes(row_ptr, bits_ptr, scope_ptr, form):
    """Returns minimum and maximum of s over the tensor's scope."""
    if form.SOURCE == "scope" or form.SOURCE == "scopes":
        own_ptr = scope_ptr + (2 * tl.load(row_ptr + POSITION) if form.SOURCE == "scopes" else 0)
        return Extremes(low=tl.load(own_ptr), high=tl.load(own_ptr + 1))
    else:
        found = found_extremes(tl.load(bits_ptr), tl.load(bits_ptr + 1), form)
        low, high = found.low, found.high
        if form.SOURCE == "kept":
            kept = kept_extremes(row_ptr, form)
            high = tl.where(kept.low == kept.low, kept.high, high)
            low = tl.where(kept.low == kept.low, kept.low, low)
        return Extremes(low=low, high=high)


@triton.jit
def gather_piece(head_ptr, row_ptr, bits_ptr, start, end, unscale, form):
    """Joins the extremes of a piece into its tensor's. With kept ones they are wanted of a
    first-timer only.
    """
    if form.LOW is not None:
        kept = kept_extremes(row_ptr, form)
        end = tl.where(kept.low == kept.low, start, end)
    whole = whole_blocks(head_ptr, row_ptr, start, end, form)
    extremes = no_extremes(bits_ptr, BLOCK, form)
    if not form.STRIDED:
        piece = elements(list_pointers(head_ptr, row_ptr, form, True), start)
        for block in range(whole):
            at = block * BLOCK + tl.arange(0, BLOCK)
            g = read_again(piece.g + at, form.DTYPE) * unscale
            s = read_again(piece.s + at, form.DTYPE) if form.S is not None else g
            extremes = widened_extremes(extremes, g, s, None, form)
    more = no_extremes(bits_ptr, TAIL, form)
    lists = list_pointers(head_ptr, row_ptr, form, False)
    for first in range(start + whole * BLOCK, end, TAIL):
        local = first + tl.arange(0, TAIL)
        ptrs = any_elements(lists, local, row_ptr, form)
        g = read_gradient(ptrs.g, local < end, unscale, form)
        s = read(ptrs.s, local < end, form.DTYPE) if form.S is not None else g
        more = widened_extremes(more, g, s, local < end, form)
    join_extremes(bits_ptr, extremes, more)


# ---- The update


@triton.jit
def selected_inverse(g, s, shared, form):
    """Returns 1/p of a block of elements."""
    if form.NORMALIZATION == "constant":
        inverse = tl.zeros_like(g) + shared.largest_inverse
    elif form.NORMALIZATION == "rank":
        # the root of -0 is -0
        magnitude = tl.abs(root(s) if form.S is not None else g)
        counted = finite(magnitude)
        ptrs = shared.table_ptr + tl.where(counted, rank_bin(magnitude), 0)
        inverse = tl.load(ptrs, mask=counted, other=1.0).to(form.DTYPE)
    elif form.S is not None:
        found = inverse_probability(s, shared.probability, shared.largest_inverse)
        inverse = tl.where(finite(s), found, 1)
    else:
        inverse = inverse_probability(square(g), shared.probability, shared.largest_inverse)
    return inverse


@triton.jit
def apply_rule(ptrs, mask, g, factor, rounding_word, rule, form):
    """Makes the optimizer's step with a block of elements."""
    if form.RULE == "sgd":
        theta = read(ptrs.theta, mask, form.DTYPE)
        buffer = read(ptrs.moment1, mask, form.DTYPE) if form.MOMENT1 is not None else theta
        stepped = sgd_update_rule(theta, g, factor, buffer, rule, form)
        write(ptrs.theta, stepped.theta, mask)
        if form.MOMENT1 is not None:
            write_moment(ptrs.moment1, stepped.buffer, mask, rounding_word & 0xFFFF)
    else:
        theta = read(ptrs.theta, mask, form.DTYPE)
        m, v = read(ptrs.moment1, mask, form.DTYPE), read(ptrs.moment2, mask, form.DTYPE)
        v_max = read(ptrs.moment3, mask, form.DTYPE) if form.MOMENT3 is not None else v
        stepped = adamw_update_rule(theta, g, factor, m, v, v_max, rule, form)
        write(ptrs.theta, stepped.theta, mask)
        write_moment(ptrs.moment1, stepped.m, mask, rounding_word & 0xFFFF)
        write_moment(ptrs.moment2, stepped.v, mask, rounding_word >> 16)
        if form.MOMENT3 is not None:
            write_moment(ptrs.moment3, stepped.v_max, mask, rounding_word >> 16)


@triton.jit
def update_block(ptrs, mask, word, rounding_word, extremes, shared, form):
    """Updates a block of elements, from memory to memory. Returns the extremes, widened where the
    next step wants them.
    """
    g = read_gradient(ptrs.g, mask, shared.unscale, form)
    s = read(ptrs.s, mask, form.DTYPE) if form.S is not None else g
    if form.LOW is not None:
        extremes = widened_extremes(extremes, g, s, mask, form)
    inverse = selected_inverse(g, s, shared, form)
    one = tl.full([1], 1, form.DTYPE)
    if form.RULE == "probability":
        write(ptrs.theta, tl.where(finite(g), divide(one, inverse), 1), mask)
    else:
        if form.RANDOM:
            factor = drawn_factor(g, inverse, word, form.RESCALE)
        else:
            factor = tl.where(finite(g), inverse if form.RESCALE else one, 1)
        if form.RULE == "mask":
            write(ptrs.theta, factor != 0, mask)
        elif form.RULE == "multiply":
            write(ptrs.g, g * factor, mask)
        else:
            apply_rule(ptrs, mask, g, factor, rounding_word, shared.rule, form)
    return extremes


@triton.jit
def update_elements(head_ptr, row_ptr, bits_ptr, start, end, step, shared, form):
    """Updates a piece from memory to memory."""
    seed, stream, offset = (
        tl.load(head_ptr + SEED),
        tl.load(row_ptr + STREAM),
        tl.load(row_ptr + OFFSET),
    )
    run, stride = tl.load(row_ptr + RUN), tl.load(row_ptr + STRIDE)
    rounding_seed = seed ^ triton_ops.ROUNDING_KEY
    whole = whole_blocks(head_ptr, row_ptr, start, end, form)
    extremes = no_extremes(bits_ptr, BLOCK, form)
    if not form.STRIDED:
        piece = elements(list_pointers(head_ptr, row_ptr, form, True), start)
        for block in range(whole):
            word, rounding_word = tl.zeros([BLOCK], tl.uint32), tl.zeros([BLOCK], tl.uint32)
            first = offset + start + block * BLOCK
            if form.RANDOM:
                word = triton_ops.words_in_order(first, seed, step, stream, BLOCK)
            if form.ROUNDING:
                rounding_word = triton_ops.words_in_order(first, rounding_seed, step, stream, BLOCK)
            ptrs = elements(piece, block * BLOCK + tl.arange(0, BLOCK))
            extremes = update_block(ptrs, None, word, rounding_word, extremes, shared, form)
    more = no_extremes(bits_ptr, TAIL, form)
    lists = list_pointers(head_ptr, row_ptr, form, False)
    for first in range(start + whole * BLOCK, end, TAIL):
        local = first + tl.arange(0, TAIL)
        word, rounding_word = tl.zeros([TAIL], tl.uint32), tl.zeros([TAIL], tl.uint32)
        indices = triton_ops.element_indices(local, offset, run, stride)
        if form.RANDOM:
            word = triton_ops.words(indices, seed, step, stream)
        if form.ROUNDING:
            rounding_word = triton_ops.words(indices, rounding_seed, step, stream)
        ptrs = any_elements(lists, local, row_ptr, form)
        more = update_block(ptrs, local < end, word, rounding_word, more, shared, form)
    if form.LOW is not None:
        join_extremes(bits_ptr, extremes, more)


@triton.jit
def rule_constants(head_ptr, own_ptr, form):
    """Reads the scalars of a tensor's AdamW or SGD step."""
    if form.RULE == "adamw":
        return AdamW(
            decay=tl.load(own_ptr + OWN_DECAY),
            step_size=tl.load(own_ptr + OWN_STEP_SIZE),
            inverse_root=tl.load(own_ptr + OWN_INVERSE_ROOT),
            beta2=tl.load(own_ptr + OWN_BETA2),
            complement1=tl.load(own_ptr + OWN_COMPLEMENT1),
            complement2=tl.load(own_ptr + OWN_COMPLEMENT2),
            eps=number(head_ptr, EPS).to(form.DTYPE),
        )
    else:
        return SGD(
            complement=(1 - number(head_ptr, DAMPENING)).to(form.DTYPE),
            lr=tl.load(own_ptr + OWN_RATE),
            momentum=number(head_ptr, MOMENTUM).to(form.DTYPE),
            weight_decay=number(head_ptr, WEIGHT_DECAY).to(form.DTYPE),
        )


@triton.jit
def update_piece(
    head_ptr,
    row_ptr,
    bits_ptr,
    constants_ptr,
    count_ptr,
    scope_ptr,
    tables_ptr,
    own_table,
    grad_scale_ptr,
    start,
    end,
    form,
):
    """Works out what a piece's elements share, then updates the piece."""
    largest_inverse = number(
        head_ptr, CONSTANT_INVERSE if form.NORMALIZATION == "constant" else LARGEST_INVERSE
    ).to(form.DTYPE)
    probability, table_ptr = (), tables_ptr
    if form.NORMALIZATION == "rank":
        if form.SOURCE == "own":
            table_ptr = tables_ptr + own_table * TABLE
        elif form.SOURCE == "scopes":
            table_ptr = tables_ptr + tl.load(row_ptr + POSITION) * TABLE
    elif form.NORMALIZATION != "constant":
        s = scope_extremes(row_ptr, bits_ptr, scope_ptr, form)
        probability = probability_of_scope(
            s.low, s.high, number(head_ptr, STEEPNESS), number(head_ptr, THRESHOLD), form
        )
    shared = Shared(
        unscale=unscaling(head_ptr, grad_scale_ptr, form.DTYPE),
        probability=probability,
        largest_inverse=largest_inverse,
        table_ptr=table_ptr,
        rule=rule_constants(head_ptr, constants_ptr, form),
    )
    update_elements(head_ptr, row_ptr, bits_ptr, start, end, tl.load(count_ptr), shared, form)


# ---- The kernels


@triton.jit
def store_adamw_constants(own_ptr, head_ptr, rate, count, beta1_ptr, beta2_ptr, there, form):
    """Stores the scalars of AdamW's step by tensor."""
    DTYPE: tl.constexpr = form.DTYPE
    first = number(head_ptr, BETA1) if beta1_ptr is None else tl.load(beta1_ptr).to(tl.float64)
    second = number(head_ptr, BETA2) if beta2_ptr is None else tl.load(beta2_ptr).to(tl.float64)
    # beta^step; 0^step is 0.
    power1 = tl.where(first > 0, tl.exp(count * tl.log(tl.where(first > 0, first, 1.0))), 0.0)
    power2 = tl.where(second > 0, tl.exp(count * tl.log(tl.where(second > 0, second, 1.0))), 0.0)
    nothing = count * 0
    decay = nothing + 1 - rate * number(head_ptr, WEIGHT_DECAY)
    tl.store(own_ptr + OWN_DECAY, decay.to(DTYPE), mask=there)
    tl.store(own_ptr + OWN_STEP_SIZE, (rate / (1 - power1)).to(DTYPE), mask=there)
    tl.store(own_ptr + OWN_INVERSE_ROOT, (1 / tl.sqrt(1 - power2)).to(DTYPE), mask=there)
    tl.store(own_ptr + OWN_BETA2, (nothing + second).to(DTYPE), mask=there)
    tl.store(own_ptr + OWN_COMPLEMENT1, (nothing + 1 - first).to(DTYPE), mask=there)
    tl.store(own_ptr + OWN_COMPLEMENT2, (nothing + 1 - second).to(DTYPE), mask=there)


@triton.jit(do_not_specialize=["tensors"])
def prepare_kernel(
    head_ptr,
    rows_ptr,
    bits_ptr,
    constants_ptr,
    counts_ptr,
    tensors,
    lr_ptr,
    beta1_ptr,
    beta2_ptr,
    found_inf_ptr,
    form,
):
    """Advances the steps of tensors, works out what a tensor's elements share, and empties its
    statistics.
    """
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < tensors
    empty = tl.zeros([LANES], bits_ptr.dtype.element_ty) + empty_low(form.DTYPE)
    tl.store(bits_ptr + 2 * i, empty, mask=there)
    tl.store(bits_ptr + 2 * i + 1, 0, mask=there)
    count = tl.zeros([LANES], tl.float64) + tl.load(head_ptr + COUNT)
    if form.STEP is not None:
        addresses = tl.load(rows_ptr + i * ROW + STEP, mask=there, other=0)
        step_ptrs = triton_ops.pointer(addresses, form.STEP)
        count = tl.load(step_ptrs, mask=there, other=0).to(tl.float64) + 1
        tl.store(step_ptrs, count.to(form.STEP), mask=allowed(there, found_inf_ptr))
    tl.store(counts_ptr + i, count.to(tl.int32), mask=there)
    if form.RULE == "adamw" or form.RULE == "sgd":
        own_ptr = constants_ptr + CONSTANTS * i
        rate = number(head_ptr, LR) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64)
        if form.RULE == "sgd":
            rates = tl.zeros([LANES], form.DTYPE) + rate.to(form.DTYPE)
            tl.store(own_ptr + OWN_RATE, rates, mask=there)
        else:
            store_adamw_constants(own_ptr, head_ptr, rate, count, beta1_ptr, beta2_ptr, there, form)


@triton.jit
def update_kernel(
    head_ptr,
    rows_ptr,
    items_ptr,
    bits_ptr,
    constants_ptr,
    counts_ptr,
    scope_ptr,
    tables_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    GATHERS: tl.constexpr,
    form,
):
    """Updates an item, which is a tensor and a piece of it; gathers its extremes where the tensor
    is below 0. GATHERS says that there are such items.
    """
    item_ptr = items_ptr + 2 * tl.program_id(0)
    tensor, piece = tl.load(item_ptr), tl.load(item_ptr + 1)
    gathers = tensor < 0
    tensor = tl.where(gathers, -1 - tensor, tensor).to(tl.int64)
    row_ptr, own_ptr = rows_ptr + tensor * ROW, bits_ptr + 2 * tensor
    start, end = bounds(row_ptr, piece, found_inf_ptr)
    if GATHERS:
        if gathers:
            unscale = unscaling(head_ptr, grad_scale_ptr, form.DTYPE)
            gather_piece(head_ptr, row_ptr, own_ptr, start, end, unscale, form)
    if form.RULE != "statistics":
        if gathers == 0:
            update_piece(
                head_ptr,
                row_ptr,
                own_ptr,
                constants_ptr + CONSTANTS * tensor,
                counts_ptr + tensor,
                scope_ptr,
                tables_ptr,
                tensor % TABLES,
                grad_scale_ptr,
                start,
                end,
                form,
            )


@triton.jit
def count_kernel(
    head_ptr, rows_ptr, items_ptr, out_ptr, grad_scale_ptr, found_inf_ptr, MANY: tl.constexpr, form
):
    """Counts a piece's histogram: elements whose index in the unsharded tensor is a multiple of
    `every`. 64-bit counts hold each `every` times.
    """
    WEIGHTED: tl.constexpr = out_ptr.dtype.element_ty == tl.int64
    item_ptr = items_ptr + 2 * tl.program_id(0)
    tensor, piece = tl.load(item_ptr).to(tl.int64), tl.load(item_ptr + 1)
    row_ptr = rows_ptr + tensor * ROW
    start, end = bounds(row_ptr, piece, found_inf_ptr)
    n, every = tl.load(row_ptr + SIZE), tl.load(row_ptr + EVERY)
    offset, run, stride = (
        tl.load(row_ptr + OFFSET),
        tl.load(row_ptr + RUN),
        tl.load(row_ptr + STRIDE),
    )
    if WEIGHTED:
        bins_ptr = out_ptr + (tl.load(row_ptr + POSITION) * RANK_BINS if MANY else 0)
    else:
        bins_ptr = out_ptr + tensor % TABLES * TABLE
    # then the wanted ones are known; else each index is looked at
    ordered = run >= n
    jump = tl.where(ordered, every, 1)
    start += tl.where(ordered, (every - (offset + start) % every) % every, 0)
    lists = list_pointers(head_ptr, row_ptr, form, False)
    unscale = unscaling(head_ptr, grad_scale_ptr, form.DTYPE)
    for first in range(start, end, jump * TAIL):
        local = first + tl.arange(0, TAIL) * jump
        mask = (local < end) & (triton_ops.element_indices(local, offset, run, stride) % every == 0)
        ptrs = any_elements(lists, local, row_ptr, form)
        g = read_gradient(ptrs.g, mask, unscale, form)
        magnitude = tl.abs(root(read(ptrs.s, mask, form.DTYPE)) if form.S is not None else g)
        mask = mask & finite(g) & finite(magnitude)
        tl.atomic_add(
            bins_ptr + rank_bin(tl.where(mask, magnitude, 0)),
            every if WEIGHTED else 1,
            mask=mask,
            sem="relaxed",
        )


@triton.jit
def tabulate_kernel(head_ptr, counts_ptr, tables_ptr):
    """Computes 1/p by bin from counts by bin; 32-bit counts may lie where the table is to be."""
    WIDTH: tl.constexpr = 4096
    OWN: tl.constexpr = counts_ptr.dtype.element_ty == tl.int32
    counts_ptr += tl.program_id(0).to(tl.int64) * (TABLE if OWN else RANK_BINS)
    tables_ptr += tl.program_id(0).to(tl.int64) * TABLE
    steepness = number(head_ptr, STEEPNESS).to(tl.float32)
    threshold = number(head_ptr, THRESHOLD).to(tl.float32)
    largest_inverse = number(head_ptr, LARGEST_INVERSE).to(tl.float32)
    total = tl.full((), 0, tl.int64)
    for first in range(0, RANK_BINS, WIDTH):
        bin = first + tl.arange(0, WIDTH)
        here = tl.load(counts_ptr + bin, mask=bin < RANK_BINS, other=0).to(tl.int64)
        total += tl.sum(here, axis=0)
    divisor = tl.maximum(total, 1).to(tl.float64)
    below = tl.full((), 0, tl.int64)
    for first in range(0, RANK_BINS, WIDTH):
        bin = first + tl.arange(0, WIDTH)
        here = tl.load(counts_ptr + bin, mask=bin < RANK_BINS, other=0).to(tl.int64)
        rank = (below + tl.cumsum(here, axis=0) - here).to(tl.float64) / divisor
        below += tl.sum(here, axis=0)
        inverse = inverse_of_rank(rank.to(tl.float32), steepness, threshold, largest_inverse)
        tl.store(tables_ptr + bin, inverse, mask=bin < RANK_BINS)


@triton.jit
def extreme_pointers(rows_ptr, i, there, form):
    """Returns pointers to the minima and maxima of s that tensors keep."""
    minima = tl.load(rows_ptr + i * ROW + MINIMUM, mask=there, other=0)
    maxima = tl.load(rows_ptr + i * ROW + MAXIMUM, mask=there, other=0)
    return Extremes(
        low=triton_ops.pointer(minima, form.LOW), high=triton_ops.pointer(maxima, form.HIGH)
    )


@triton.jit(do_not_specialize=["tensors"])
def keep_kernel(rows_ptr, bits_ptr, tensors, found_inf_ptr, form):
    """Writes the gathered extremes into the parameters' states."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = i < tensors
    low = tl.load(bits_ptr + 2 * i, mask=there, other=0)
    high = tl.load(bits_ptr + 2 * i + 1, mask=there, other=0)
    found = found_extremes(low, high, form)
    ptrs = extreme_pointers(rows_ptr, i, there, form)
    there = allowed(there, found_inf_ptr)
    tl.store(ptrs.low, found.low.to(form.LOW), mask=there)
    tl.store(ptrs.high, found.high.to(form.HIGH), mask=there)


@triton.jit(do_not_specialize=["tensors"])
def join_kernel(rows_ptr, bits_ptr, out_ptr, tensors, MANY: tl.constexpr, form):
    """Joins the gathered extremes, or those kept, into rows of minimum and maximum: one for all
    tensors, or one each.
    """
    least = tl.full([LANES], float("inf"), tl.float64)
    most = tl.full([LANES], float("-inf"), tl.float64)
    for first in range(0, tensors, LANES):
        i = first + tl.arange(0, LANES)
        there = i < tensors
        low = tl.load(bits_ptr + 2 * i, mask=there, other=1)
        high = tl.load(bits_ptr + 2 * i + 1, mask=there, other=0)
        found = found_extremes(low, high, form)
        low, high = found.low, found.high
        if form.LOW is not None:
            ptrs = extreme_pointers(rows_ptr, i, there, form)
            kept_low = tl.load(ptrs.low, mask=there, other=float("nan")).to(tl.float64)
            kept_high = tl.load(ptrs.high, mask=there, other=0).to(tl.float64)
            high = tl.where(kept_low == kept_low, kept_high, high)
            low = tl.where(kept_low == kept_low, kept_low, low)
        if MANY:
            own_ptr = out_ptr + 2 * tl.load(rows_ptr + i * ROW + POSITION, mask=there, other=0)
            lowest = tl.minimum(tl.load(own_ptr, mask=there, other=0), low)
            highest = tl.maximum(tl.load(own_ptr + 1, mask=there, other=0), high)
            tl.store(own_ptr, lowest, mask=there)
            tl.store(own_ptr + 1, highest, mask=there)
        least, most = tl.minimum(least, low), tl.maximum(most, high)
    if not MANY:
        tl.store(out_ptr, tl.minimum(tl.load(out_ptr), tl.min(least, axis=0)))
        tl.store(out_ptr + 1, tl.maximum(tl.load(out_ptr + 1), tl.max(most, axis=0)))
