"""Kernels that read the image data of a baseline JPEG at a fraction of its size, compiled by Numba.

Most of a large JPEG's decoding time goes into entropy decoding, symbol by symbol. A picture at an n-th of its
size needs the first few coefficients of each block only. The others are passed over: one look into a table
tells how many bits the next symbols take together, and how many coefficients they stand for.

Indices are unsigned, since Numba would otherwise look for negative ones. No kernel checks bounds.
`read_scan` stays within its arrays whatever the data are: see `MARGIN` and `_read_segment`.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, njit, uint8, uint64
from numpy.typing import NDArray

__all__ = [
    "ACROSS",
    "DOWN",
    "MARGIN",
    "SIDE",
    "join_segments",
    "put_plane",
    "read_scan",
    "shorten",
    "skips",
    "symbols",
    "to_rgb",
]

# Bits that a look into each table takes. All of a picture's tables fit into a processor's first cache.
SYMBOL_BITS, SKIP_BITS, CODE_BITS = 10, 11, 16
# Bytes that follow the image data in memory. The largest MCU, 6 blocks of 64 symbols of at most 31 bits, ends
# within them wherever it begins.
MARGIN = 4096
# Columns of `layout`, which has a row per component: blocks of an MCU across and down, samples per side of a
# block, the last coefficient that is kept in zigzag order, where its tables, its coefficients and its plane
# begin, and the samples of a line of the plane.
ACROSS, DOWN, SIDE, LAST, DC, DC_CODES, AC, AC_CODES, SKIPS, COEFFICIENTS, PLANE, PITCH = range(12)

# An entry of a table is made of the bits of a symbol and the value behind it, the coefficients that they
# stand for, the last coefficient at which that may begin, and the bits of the value alone.
_COEFFICIENTS, _BEGIN, _VALUE, _SEVEN_BITS = 5, 12, 19, 127
_TO_SYMBOL, _TO_SKIP, _TO_CODE = uint64(64 - SYMBOL_BITS), uint64(64 - SKIP_BITS), uint64(64 - CODE_BITS)
_END = 64  # coefficients of the end of a block: it is over wherever it begins
_BROKEN = 127 << _COEFFICIENTS  # no code begins like this
_MARKED, _ONES = 0x8080808080808080, 0x0101010101010101


def _places() -> NDArray[np.uint64]:
    """The place of each coefficient, in zigzag order, among those that are kept of a block of each side."""
    places = np.zeros((5, 64), np.uint64)
    squares = sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))
    for side in (1, 2, 4):
        for k, (row, column) in enumerate(squares):
            inside = row < side and column < side
            places[side, k] = side * row + column if inside else side * side
    return places


_PLACES = _places()


def _compile(function):
    """Compile at the first call, and keep the result for the next start where there is a folder for it."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the folder of the source nor the user's cache can be written
        return njit(nogil=True)(function)


_inline = njit(inline="always")


@_compile
def symbols(codes):
    """The entry of the code that the next 16 bits begin with, for each value of theirs: uint32 [65536].

    Args:
        codes: uint8, a Huffman table of a JPEG: codes of each of the lengths 1 to 16, then their symbols.
    """
    table = np.full(1 << CODE_BITS, _BROKEN, np.uint32)
    position, symbol = 0, 16
    for length in range(1, CODE_BITS + 1):
        room = 1 << (CODE_BITS - length)
        for _ in range(codes[length - 1]):
            run, size = codes[symbol] >> 4, codes[symbol] & 15
            count = _END if size == 0 and run != 15 else run + 1
            entry = length + size | count << _COEFFICIENTS | 63 << _BEGIN | size << _VALUE
            table[position : position + room] = entry
            position += room
            symbol += 1
    return table


@_compile
def shorten(table):
    """The entries of `symbols` by the next `SYMBOL_BITS` bits. Longer codes are missing."""
    short = np.full(1 << SYMBOL_BITS, _BROKEN, np.uint32)
    for window in range(1 << SYMBOL_BITS):
        entry = table[window << (CODE_BITS - SYMBOL_BITS)]
        if (entry & 31) - (entry >> _VALUE) <= SYMBOL_BITS:
            short[window] = entry
    return short


@_compile
def skips(table):
    """The joint entry of all AC symbols that the next `SKIP_BITS` bits begin with.

    Symbols behind a block's last coefficient are of the next one, so it holds up to some coefficient only. It
    is 0, which holds at none, where the first code is longer.

    Args:
        table: as of `symbols`.
    """
    size = 1 << SKIP_BITS
    joint = np.zeros(size, np.uint32)
    for window in range(size):
        bits, count, begin = 0, 0, 0
        while bits < SKIP_BITS and count < _END:
            entry = int64(table[((window << bits) & (size - 1)) << (CODE_BITS - SKIP_BITS)])
            taken, more = entry & 31, (entry >> _COEFFICIENTS) & _SEVEN_BITS
            if entry == _BROKEN or bits + taken - (entry >> _VALUE) > SKIP_BITS or bits + taken > 31:
                break
            begin = 63 - count if more == _END else 64 - count - more
            if begin < 1:
                break
            bits, count = bits + taken, count + more
            joint[window] = bits | count << _COEFFICIENTS | begin << _BEGIN
    return joint


@_inline
def _load(data, at):
    """The 8 bytes from `at` on, the first in the highest place; a compiler makes one instruction of it."""
    high = (uint64(data[at]) << uint64(24)) | (uint64(data[at + uint64(1)]) << uint64(16))
    high |= (uint64(data[at + uint64(2)]) << uint64(8)) | uint64(data[at + uint64(3)])
    low = (uint64(data[at + uint64(4)]) << uint64(24)) | (uint64(data[at + uint64(5)]) << uint64(16))
    low |= (uint64(data[at + uint64(6)]) << uint64(8)) | uint64(data[at + uint64(7)])
    return high << uint64(32) | low


@_compile
def join_segments(data, start, joined, ends):
    """Copy image data without the zeros after 0xFF and without restart markers.

    Args:
        data: uint8, the file.
        start: first byte of its image data.
        joined: uint8, where they are copied; as long as the rest of the file and `MARGIN`, which is zeroed.
        ends: int64, one more than there are restart markers.

    Returns:
        True if all markers are there, in order, and the end of the image after them. Then `ends` tells where
        each segment ends in `joined`.
    """
    at, size, written, segment = uint64(start), uint64(len(data)), uint64(0), 0
    while True:
        while at + uint64(8) <= size:
            eight = _load(data, at)
            # A byte of 0xFF is a zero in its complement, which borrows when one is subtracted.
            if (~eight - uint64(_ONES)) & eight & uint64(_MARKED):
                break
            for index in range(uint64(8)):
                joined[written + index] = data[at + index]
            at, written = at + uint64(8), written + uint64(8)
        while at < size and data[at] != 255:
            joined[written] = data[at]
            at, written = at + uint64(1), written + uint64(1)
        if at + uint64(1) >= size:
            return False
        marker = data[at + uint64(1)]
        at += uint64(2)
        if marker == 0:
            joined[written] = 255
            written += uint64(1)
            continue
        ends[segment] = written
        if segment == len(ends) - 1:
            joined[written : written + uint64(MARGIN)] = 0
            return marker == 0xD9
        if marker != 0xD0 + segment % 8:
            return False
        segment += 1


@_compile
def read_scan(data, ends, mcus, interval, layout, tables, coefficients):
    """Decode image data into the first coefficients of each block.

    Args:
        data, ends: uint8 and int64, as of `join_segments`.
        mcus: number of them.
        interval: MCUs of a segment, but for the last.
        layout: uint64 [components, 12], see `ACROSS`.
        tables: uint32, those of `symbols` and `skips`, the former also cut to `SYMBOL_BITS`.
        coefficients: int16, zeros. They become those of each component's blocks in the order of the scan,
            for each block one more than it has samples.

    Returns:
        False if the data are not what such a scan holds.
    """
    nexts = layout[:, COEFFICIENTS].copy()
    start, left = uint64(0), mcus
    for end in ends:
        count = min(interval, left)
        if not _read_segment(data, start, uint64(end), count, layout, tables, coefficients, nexts):
            return False
        start, left = uint64(end), left - count
    return left == 0


@_inline
def _value(bits, size):
    """The signed number that the first `size` bits stand for, at most 15 of them."""
    number = int64((bits >> uint64(1)) >> (uint64(63) - size))
    positive = int64(bits) >> int64(63)  # -1 or 0: the first bit
    return number + ((int64(1) - (int64(1) << int64(size))) & ~positive)


@_compile
def _read_segment(data, at, end, mcus, layout, tables, coefficients, nexts):
    """Decode MCUs. False if a code does not exist, or they do not end where the segment does."""
    predicted, stop = np.zeros(3, np.int64), end + uint64(8)
    bits, count, broken = uint64(0), uint64(0), uint64(2 * _END)
    for _mcu in range(mcus):
        for component in range(len(layout)):
            dc, dc_codes, skip = layout[component, DC], layout[component, DC_CODES], layout[component, SKIPS]
            ac, ac_codes, last = layout[component, AC], layout[component, AC_CODES], layout[component, LAST]
            block, side = nexts[component], layout[component, SIDE]
            for _block in range(layout[component, ACROSS] * layout[component, DOWN]):
                if count < uint64(32):
                    bits |= _load(data, at) >> count
                    at, count = at + ((uint64(63) - count) >> uint64(3)), count | uint64(56)
                found = uint64(tables[dc + (bits >> _TO_SYMBOL)])
                if found == uint64(_BROKEN):
                    found = uint64(tables[dc_codes + (bits >> _TO_CODE)])
                taken, size = found & uint64(31), found >> uint64(_VALUE)
                predicted[component] += _value(bits << (taken - size), size)
                coefficients[block] = predicted[component]
                bits, count = bits << taken, count - taken
                k = broken if found == uint64(_BROKEN) else uint64(1)
                while k <= last:
                    if count < uint64(32):
                        bits |= _load(data, at) >> count
                        at, count = at + ((uint64(63) - count) >> uint64(3)), count | uint64(56)
                    found = uint64(tables[ac + (bits >> _TO_SYMBOL)])
                    if found == uint64(_BROKEN):
                        found = uint64(tables[ac_codes + (bits >> _TO_CODE)])
                    taken, size = found & uint64(31), found >> uint64(_VALUE)
                    k += (found >> uint64(_COEFFICIENTS)) & uint64(_SEVEN_BITS)
                    if k <= last + uint64(1):
                        place = _PLACES[side, k - uint64(1)]
                        coefficients[block + place] = _value(bits << (taken - size), size)
                    bits, count = bits << taken, count - taken
                while k < uint64(64):
                    if count < uint64(32):
                        bits |= _load(data, at) >> count
                        at, count = at + ((uint64(63) - count) >> uint64(3)), count | uint64(56)
                    found = uint64(tables[skip + (bits >> _TO_SKIP)])
                    if k > found >> uint64(_BEGIN):
                        found = uint64(tables[ac_codes + (bits >> _TO_CODE)])
                    k += (found >> uint64(_COEFFICIENTS)) & uint64(_SEVEN_BITS)
                    bits, count = bits << (found & uint64(31)), count - (found & uint64(31))
                if k >= broken or at > stop:
                    return False
                block += side * side + uint64(1)
            nexts[component] = block
    unread = 8 * int64(end) - int64(uint64(8) * at - count)
    return unread >= 0 and unread <= 7


@_inline
def _level(value):
    return uint8(min(max(value + float32(128.5), float32(0)), float32(255)))


@_compile
def put_plane(coefficients, mcus, layout, factors, basis, planes):
    """Transform the coefficients of one component into samples.

    Args:
        coefficients: as of `read_scan`.
        mcus: their rows and columns.
        layout: the component's row.
        factors: float32 [64], its quantisation in zigzag order.
        basis: float32 [side, side], the share of each coefficient in each sample along one axis.
        planes: uint8, all planes, each of whole MCUs.
    """
    side, block, place = layout[SIDE], layout[COEFFICIENTS], layout[PLANE]
    across, down, pitch = layout[ACROSS], layout[DOWN], layout[PITCH]
    scales, half = np.zeros(17, np.float32), np.zeros(16, np.float32)
    for k in range(64):
        scales[_PLACES[side, k]] = factors[k]
    if side < uint64(4):
        for k in range(side * side):
            scales[k] *= basis[0, 0] * basis[0, 0]
    for row in range(uint64(mcus[0])):
        for column in range(uint64(mcus[1])):
            for y in range(down):
                line = (row * down + y) * side * pitch
                for x in range(across):
                    corner = place + line + (column * across + x) * side
                    if side == uint64(1):
                        planes[corner] = _level(float32(coefficients[block]) * scales[0])
                    elif side == uint64(2):
                        _put_two(coefficients, block, scales, basis, planes, corner, pitch)
                    else:
                        _put_four(coefficients, block, scales, half, basis, planes, corner, pitch)
                    block += side * side + uint64(1)


@_inline
def _put_two(coefficients, block, scales, basis, planes, corner, pitch):
    slope = basis[0, 1] / basis[0, 0]
    mean = float32(coefficients[block]) * scales[0]
    across = float32(coefficients[block + uint64(1)]) * scales[1] * slope
    down = float32(coefficients[block + uint64(2)]) * scales[2] * slope
    both = float32(coefficients[block + uint64(3)]) * scales[3] * slope * slope
    planes[corner] = _level(mean + across + down + both)
    planes[corner + uint64(1)] = _level(mean - across + down - both)
    planes[corner + pitch] = _level(mean + across - down - both)
    planes[corner + pitch + uint64(1)] = _level(mean - across - down + both)


@_inline
def _put_four(coefficients, block, scales, half, basis, planes, corner, pitch):
    """The columns of `basis` are even or odd, so that half of each is enough."""
    one, two, three, four = basis[0, 1], basis[1, 1], basis[0, 3], basis[1, 3]
    even, flat = basis[0, 2], basis[0, 0]
    for column in range(uint64(4)):
        first = float32(coefficients[block + column]) * scales[column] * flat
        second = float32(coefficients[block + column + uint64(4)]) * scales[column + uint64(4)]
        third = float32(coefficients[block + column + uint64(8)]) * scales[column + uint64(8)] * even
        fourth = float32(coefficients[block + column + uint64(12)]) * scales[column + uint64(12)]
        outer, inner = one * second + three * fourth, two * second + four * fourth
        half[column] = first + third + outer
        half[column + uint64(4)] = first - third + inner
        half[column + uint64(8)] = first - third - inner
        half[column + uint64(12)] = first + third - outer
    for row in range(uint64(4)):
        first, second = half[uint64(4) * row] * flat, half[uint64(4) * row + uint64(1)]
        third, fourth = half[uint64(4) * row + uint64(2)] * even, half[uint64(4) * row + uint64(3)]
        outer, inner = one * second + three * fourth, two * second + four * fourth
        at = corner + row * pitch
        planes[at] = _level(first + third + outer)
        planes[at + uint64(1)] = _level(first - third + inner)
        planes[at + uint64(2)] = _level(first - third - inner)
        planes[at + uint64(3)] = _level(first + third - outer)


@_compile
def to_rgb(planes, layout, halves, pixels):
    """Convert YCbCr or grey planes to uint8 RGB [H, W, 3], which is written to `pixels`, and sharpen them.

    A mean over pixels weakens what is fine. To first order, a 24th of the second difference undoes that.

    Args:
        planes: as of `put_plane`.
        layout: as of `read_scan`.
        halves: samples of colour of two pixels, 1, 2 or 4 down, and 1 or 2 across.
        pixels: may be smaller than the planes, whose rest is padding.
    """
    height, width, _ = pixels.shape
    line = np.full((3, width + 1), 128, np.uint8)
    red, green, blue = np.empty(width, np.uint8), np.empty(width, np.uint8), np.empty(width, np.uint8)
    for row in range(uint64(height)):
        for component in range(uint64(len(layout))):
            pitch, start = layout[component, PITCH], layout[component, PLANE]
            own = row if component == uint64(0) else row * uint64(halves[0]) // uint64(2)
            if component > uint64(0) and halves[1] == 1:
                _repeat_line(planes, start + own * pitch, line[component])
            elif component > uint64(0) and halves[0] == 4:
                _join_lines(planes, start + own * pitch, pitch, line[component])
            else:
                above = row - uint64(1) if row > uint64(0) else row
                below = row + uint64(1) if row + uint64(1) < uint64(height) else row
                rows = (start + above * pitch, start + row * pitch, start + below * pitch)
                _sharpen_line(planes, rows, line[component], uint64(width))
        _convert_line(line[0], line[1], line[2], red, green, blue)
        for column in range(uint64(width)):
            pixels[row, column, 0] = red[column]
            pixels[row, column, 1] = green[column]
            pixels[row, column, 2] = blue[column]


@_compile
def _join_lines(planes, start, pitch, line):
    for column in range(uint64(len(line) - 1)):
        both = int32(planes[start + column]) + int32(planes[start + pitch + column])
        line[column] = _clip((both + int32(1)) >> int32(1))


@_compile
def _repeat_line(planes, start, line):
    for column in range(uint64(len(line) // 2)):
        line[uint64(2) * column] = planes[start + column]
        line[uint64(2) * column + uint64(1)] = planes[start + column]


@_compile
def _sharpen_line(planes, rows, line, width):
    above, start, below = rows
    last = width - uint64(1)
    for column in range(uint64(1), last):
        around = int32(planes[start + column - uint64(1)]) + int32(planes[start + column + uint64(1)])
        around += int32(planes[above + column]) + int32(planes[below + column])
        own = int32(planes[start + column])
        line[column] = _clip(own + ((int32(2731) * (int32(4) * own - around) + int32(32768)) >> int32(16)))
    line[0], line[last] = planes[start], planes[start + last]


@_compile
def _convert_line(luma, first, second, red, green, blue):
    for column in range(uint64(len(red))):
        y = int32(luma[column])
        b, r = int32(first[column]) - int32(128), int32(second[column]) - int32(128)
        red[column] = _clip(y + ((int32(91881) * r + int32(32768)) >> int32(16)))
        green[column] = _clip(y - ((int32(22554) * b + int32(46802) * r + int32(32767)) >> int32(16)))
        blue[column] = _clip(y + ((int32(116130) * b + int32(32768)) >> int32(16)))


@_inline
def _clip(value):
    return uint8(min(max(value, int32(0)), int32(255)))
