"""What runs on the GPU, in Triton; `kernels.cuda` launches it. `kernels.reference` defines it.

A tile is ``GROUPS`` groups of 128 elements as ``(GROUPS, 4, 32)``: a group, one of the four words
of its Philox counter, one of that word's bits. So the generator runs once for a group, and a bit
is found by its place. Nothing is added by atomics, and no float is contracted (launches say
``enable_fp_fusion=False``), so each element has the reference's bits.

A segment is a row of six int64: start, length, tensor, offset in the tensor, and where its first
group is: of contiguous blocks the block and the position of its sums, of interleaved ones the row
and the column. All memory addresses come as int64 in device memory, so one launch serves all
tensors.
"""

# Triton compiles these functions from their source: annotations are its own.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ferret_flwr.projection.kernels.reference import MIX_BITS, MIX_INDEX, ROTATION

_GROUP = tl.constexpr(128)
_SIGN = tl.constexpr(0x80000000)
_ROTATION = tl.constexpr(ROTATION)
_MIX_INDEX, _MIX_BITS = tl.constexpr(MIX_INDEX), tl.constexpr(MIX_BITS)
_FIELDS = tl.constexpr(6)
_VECTOR = tl.constexpr(16)  # elements; what aligned tensors are a multiple of


@triton.jit
def _segment(segments, s):
    """Return the six numbers of segment ``s``."""
    row = segments + s * _FIELDS
    return (
        tl.load(row),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4),
        tl.load(row + 5),
    )


@triton.jit
def _philox(seed, counter, basis, word):
    """Return the four words of Philox4x32-10 at a 64-bit counter, a basis and a last word."""
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), basis, word)


@triton.jit
def _elements(GROUPS: tl.constexpr):
    """Return the place of each element in a tile: int32, ``(GROUPS, 4, 32)``."""
    group = tl.arange(0, GROUPS)[:, None, None]
    word, bit = tl.arange(0, 4)[None, :, None], tl.arange(0, 32)[None, None, :]
    return group * 128 + word * 32 + bit


@triton.jit
def _part(start, length, begin, ALIGNED: tl.constexpr):
    """Return where a segment starts and stops, counted from element ``begin``: int32."""
    first, last = (start - begin).to(tl.int32), (start + length - begin).to(tl.int32)
    if ALIGNED:  # then memory is accessed in vectors, even behind a mask
        first, last = tl.multiple_of(first, _VECTOR), tl.multiple_of(last, _VECTOR)
    return first, last


@triton.jit
def _pointer(addresses, tensor, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the element ``offset`` elements behind the start of a tensor."""
    pointer = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE)) + offset
    return tl.multiple_of(pointer, _VECTOR) if ALIGNED else pointer


@triton.jit
def _sign_words(seed, basis, group, GROUPS: tl.constexpr):
    """Return the sign bits of ``GROUPS`` groups from ``group`` on: uint32, ``(GROUPS, 4, 1)``."""
    w0, w1, w2, w3 = _philox(seed, group + tl.arange(0, GROUPS), basis, 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (GROUPS, 2, 2), in the order 0, 1, 2, 3
    return tl.reshape(words, (GROUPS, 4, 1))


@triton.jit
def _flip(x, words, bit):
    """Return float32 ``x`` with its sign changed where ``words`` have ``bit``: exact."""
    return (x.to(tl.uint32, bitcast=True) ^ (words << (31 - bit) & _SIGN)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _quantile(word, scale):
    """Return the truncated normal's element of a random word, as `reference` computes it."""
    t = (word.to(tl.float64) + 0.5) * 2.0**-31 - 1.0
    s = t * scale
    s2 = s * s
    return (s * (1 + s2 * (1 / 6 + s2 * (7 / 120 + s2 * (127 / 5040))))).to(tl.float32)


@triton.jit
def _normals(seed, basis, group, scale, GROUPS: tl.constexpr):
    """Return a tile of the truncated normal, one counter to four elements."""
    counter = (group + tl.arange(0, GROUPS))[:, None]
    w0, w1, w2, w3 = _philox(seed, counter, basis, 1 + tl.arange(0, 32)[None, :])
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (GROUPS, 32, 2, 2)
    return _quantile(tl.reshape(words, (GROUPS, 4, 32)), scale)


@triton.jit
def _times_basis(x, seed, basis, group, scale, SIGNS: tl.constexpr, GROUPS: tl.constexpr):
    """Return ``x``, a tile or a number, times the tile from ``group`` on of a basis."""
    if SIGNS:
        bit = tl.arange(0, 32)[None, None, :].to(tl.uint32)
        return _flip(x, _sign_words(seed, basis, group, GROUPS), bit)
    return _normals(seed, basis, group, scale, GROUPS) * x


@triton.jit
def _rotation(seed, row, num_blocks):
    """Return by how much a row is rotated: uint32, below ``num_blocks``."""
    w0, _, _, _ = _philox(seed, row, 0, _ROTATION)
    return tl.umulhi(w0, num_blocks)


@triton.jit
def _blocks(seed, row, column, num_blocks, NARROW: tl.constexpr, GROUPS: tl.constexpr):
    """Return the interleaved block of each element of a tile: int32.

    Element 0 is ``column`` behind the first of ``row``; that may be in a later row. The minimum
    of x and x − n in uint32 is x mod n for x < 2 n.
    """
    element = _elements(GROUPS)
    if NARROW:  # many rows to a tile: each element for itself
        place = column + element.to(tl.uint32)
        quotient = place // num_blocks
        block = place - quotient * num_blocks
        block += _rotation(seed, row + quotient.to(tl.int64), num_blocks)
    else:
        first, last = column // num_blocks, (column + (GROUPS * 128 - 1)) // num_blocks
        shift = column - first * num_blocks + _rotation(seed, row + first.to(tl.int64), num_blocks)
        block = element.to(tl.uint32) + shift
        for r in range(first.to(tl.int32) + 1, last.to(tl.int32) + 1):
            begin = (r * num_blocks.to(tl.int64) - column.to(tl.int64)).to(tl.int32)
            here = (element - begin).to(tl.uint32) + _rotation(seed, row + r, num_blocks)
            block = tl.where(element >= begin, here, block)
    return tl.minimum(block, block - num_blocks).to(tl.int32)


@triton.jit
def _rounded(m, DTYPE: tl.constexpr):
    """Return float32 ``m`` in ``DTYPE``, to nearest, ties to even.

    So does a GPU's own conversion, but the interpreter's to bfloat16 truncates.
    """
    if DTYPE.is_bf16():
        bits = m.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        m = tl.where(m == m, bits.to(tl.float32, bitcast=True), m)
    return m.to(DTYPE)


@triton.jit(do_not_specialize=["rounds", "num_blocks"])
def subtract(
    source,
    target,
    segments,
    which,
    seeds,
    scales,
    offsets,
    coefficients,
    rounds,
    num_blocks,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NARROW: tl.constexpr,
    SIGNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Write ``source`` less the reconstructions of all rounds, one after the other, to ``target``.

    Program ``(i, j)`` has tile j of segment ``which[i]``. ``offsets`` has a row
    per round: where the coefficients of each block begin, or of interleaved ones all.
    """
    start, length, tensor, within, block, column = _segment(
        segments, tl.load(which + tl.program_id(0))
    )
    row, done = block, tl.program_id(1) * (GROUPS * _GROUP)  # `block` is a row if interleaved
    group = start // _GROUP + tl.program_id(1) * GROUPS
    first, last = _part(start, length, group * _GROUP, ALIGNED)
    if last > 0:
        element = _elements(GROUPS)
        inside = (element >= first) & (element < last)
        read = _pointer(source, tensor, within - first, SOURCE, ALIGNED)
        write = _pointer(target, tensor, within - first, TARGET, ALIGNED)
        m = tl.load(read + element, mask=inside, other=0.0).to(tl.float32)
        for r in range(rounds):
            seed, scale = tl.load(seeds + r), tl.load(scales + r)
            if INTERLEAVED:
                place, count = column.to(tl.uint32) + done, num_blocks.to(tl.uint32)
                blocks = _blocks(seed, row, place, count, NARROW, GROUPS)
                c = tl.load(coefficients + tl.load(offsets + r) + blocks)
                update = _times_basis(c, seed, 0, group, scale, SIGNS, GROUPS)
            else:
                own = offsets + r * (num_blocks.to(tl.int64) + 1) + block
                position, stop = tl.load(own), tl.load(own + 1)
                update = tl.full((GROUPS, 4, 32), -0.0, tl.float32)  # leaves all it meets
                for k in range((stop - position).to(tl.int32)):
                    c = tl.load(coefficients + position + k)
                    update += _times_basis(c, seed, k, group, scale, SIGNS, GROUPS)
            m -= update
        tl.store(write + element, _rounded(m, TARGET), mask=inside)


@triton.jit
def _difference(before, after, offset, inside, UPDATE: tl.constexpr):
    """Return ``before − after``, or ``before`` if it is an ``UPDATE``, in float32; 0 outside."""
    x = tl.load(before + offset, mask=inside, other=0.0).to(tl.float32)
    if not UPDATE:
        x -= tl.load(after + offset, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def project_contiguous(
    before,
    after,
    segments,
    which,
    bases,
    counts,
    seeds,
    scales,
    sums,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UPDATE: tl.constexpr,
    SIGNS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write Σ v Δ over segment ``which[i]`` for the ``CHUNK`` bases from ``bases[i]`` on."""
    program = tl.program_id(0)
    start, length, tensor, within, block, position = _segment(segments, tl.load(which + program))
    basis = tl.load(bases + program)
    begin = start // _GROUP * _GROUP
    within -= start - begin
    first, last = _part(start, length, begin, ALIGNED)
    old = _pointer(before, tensor, within, DTYPE, ALIGNED)
    new = _pointer(after, tensor, within, DTYPE, ALIGNED)
    seed, scale = tl.load(seeds), tl.load(scales)
    number = tl.minimum(tl.load(counts + block).to(tl.int32) - basis, CHUNK)
    element, place = _elements(GROUPS), tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    for done in range(0, last, GROUPS * _GROUP):
        group = begin // _GROUP + done // _GROUP
        inside = (element >= first - done) & (element < last - done)
        delta = _difference(old + done, new + done, element, inside, UPDATE)
        for k in range(number):
            terms = _times_basis(delta, seed, basis + k, group, scale, SIGNS, GROUPS)
            total += tl.where(place == k, tl.sum(terms).to(tl.float64), 0.0)
    tl.store(sums + position + basis + place, total, mask=place < number)


@triton.jit
def add_up(sums, segments, bounds, counts, offsets, coefficients, CHUNK: tl.constexpr):
    """Add the sums of each block's segments in order, for ``CHUNK`` bases of block i."""
    block = tl.program_id(0)
    k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = k < tl.load(counts + block)
    total = tl.zeros((CHUNK,), tl.float64)
    for s in range(tl.load(bounds + block), tl.load(bounds + block + 1)):
        position = tl.load(segments + s * _FIELDS + 5)
        total += tl.load(sums + position + k, mask=inside, other=0.0)
    tl.store(coefficients + tl.load(offsets + block) + k, total, mask=inside)


@triton.jit
def _signs_from(seed, index, ROWS: tl.constexpr, CELLS: tl.constexpr):
    """Return the sign bits of ``CELLS × 32`` elements from each ``index`` on: ``(ROWS, CELLS)``.

    An index may be anywhere in a word, so each 32 bits come from two words.
    """
    SPAN: tl.constexpr = 16 if CELLS == 32 else 2 * CELLS  # groups; a power of 2 that holds them
    counter = (index >> 7)[:, None] + tl.arange(0, SPAN)[None, :]
    w0, w1, w2, w3 = _philox(seed, counter, 0, 0)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 4 * SPAN))
    low = (index >> 5 & 3).to(tl.int32)[:, None] + tl.arange(0, CELLS)[None, :]
    bits = tl.gather(words, low + 1, 1).to(tl.uint64) << 32 | tl.gather(words, low, 1)
    return (bits >> (index & 31).to(tl.uint64)[:, None]).to(tl.uint32)


@triton.jit
def _normals_from(seed, index, scale):
    """Return the truncated normal's elements at any indices, one counter to each."""
    within = (index & 127).to(tl.int32)
    w0, w1, w2, w3 = _philox(seed, index >> 7, 0, 1 + within // 4)
    which = within & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return _quantile(word, scale)


@triton.jit(do_not_specialize=["num_blocks"])
def project_interleaved(
    before,
    after,
    segments,
    which,
    bounds,
    seeds,
    scales,
    num_blocks,
    sums,
    DTYPE: tl.constexpr,
    UPDATE: tl.constexpr,
    SIGNS: tl.constexpr,
    ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the sums of part i over its segments for the ``CELLS × LANES`` blocks of tile j.

    Of each row a tile has one run, or two where the row's rotation wraps around: elements side
    by side. ``ROWS`` rows are walked at once, more than one if there are few blocks.
    """
    part, tile = tl.program_id(0), tl.program_id(1)
    seed, scale = tl.load(seeds), tl.load(scales)
    first_block = tile.to(tl.int64) * (CELLS * LANES)
    cell = tl.arange(0, CELLS)[None, :] * LANES
    lane = tl.arange(0, LANES)[None, None, :]
    place = cell[:, :, None] + lane  # (1, CELLS, LANES)
    total = tl.zeros((ROWS, CELLS, LANES), tl.float32)
    for i in range(tl.load(bounds + part), tl.load(bounds + part + 1)):
        start, length, tensor, within, row_0, column = _segment(segments, tl.load(which + i))
        stop = start + length
        old = _pointer(before, tensor, within - start, DTYPE, False)
        new = _pointer(after, tensor, within - start, DTYPE, False)
        behind = column + start % _GROUP + length - 1  # of row_0's first element is the last one
        for skipped in range(0, (behind // num_blocks).to(tl.int32) + 1, ROWS):
            row = row_0 + (skipped + tl.arange(0, ROWS))
            rotation = _rotation(seed, row, num_blocks.to(tl.uint32)).to(tl.int64)
            for run in range(2):  # blocks from the rotation on, then those below it
                origin = (row + run) * num_blocks - rotation  # index of block 0 of this run
                low = tl.maximum(tl.where(run == 0, rotation, 0), start - origin) - first_block
                high = tl.where(run == 0, num_blocks, rotation)
                high = tl.minimum(high, stop - origin) - first_block
                low, high = tl.maximum(low, 0), tl.minimum(high, CELLS * LANES)
                if tl.max(high - low, 0) > 0:
                    inside = place >= low.to(tl.int32)[:, None, None]
                    inside &= place < high.to(tl.int32)[:, None, None]
                    index = origin + first_block
                    x = _difference(old, new, index[:, None, None] + place, inside, UPDATE)
                    if SIGNS:
                        words = _signs_from(seed, index, ROWS, CELLS)
                        total += _flip(x, words[:, :, None], lane.to(tl.uint32))
                    else:
                        total += x * _normals_from(seed, index[:, None, None] + place, scale)
    block = first_block + place
    at = sums + part.to(tl.int64) * num_blocks + block
    tl.store(at, tl.sum(total, 0)[None, :, :], mask=block < num_blocks)


@triton.jit
def fingerprint(addresses, segments, sums, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """Write `reference.fingerprint` of segment i, whose sum is that of the whole."""
    s = tl.program_id(0)
    start, length, tensor, within, _, _ = _segment(segments, s)
    bits = _pointer(addresses, tensor, within, tl.uint32, ALIGNED)
    _, last = _part(start, length, start, ALIGNED)
    element = tl.arange(0, GROUPS * _GROUP)
    total = tl.zeros((GROUPS * _GROUP,), tl.uint64)
    for done in range(0, last, GROUPS * _GROUP):
        inside = element < last - done
        index = (start + done + 1 + element).to(tl.uint64)
        z = tl.load(bits + done + element, mask=inside, other=0).to(tl.uint64) + index * _MIX_INDEX
        z = (z ^ (z >> 32)) * _MIX_BITS
        total += tl.where(inside, z ^ (z >> 32), 0)
    tl.store(sums + s, tl.sum(total))
