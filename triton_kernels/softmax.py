"""Sums of exponentials, and the softmax divergences of rows that are close, in Triton: shared by the losses over a
vocabulary and over hidden states. The forms are those of csrc/cpu/softmax.h: with d = log q - log p less its mean
under p,

    KL(p || q) = log(1 + sum_i p_i (exp d_i - 1 - d_i)),

of which no term is negative, and no digit is lost where both sides are close.
"""

from __future__ import annotations

import triton
import triton.language as tl

CLOSE = tl.constexpr(0.0625)  # a KL under this is left with too few digits by cross entropy less entropy


@triton.jit
def temperature_of(temperature, ACC: tl.constexpr):
    """A kernel's argument as a number: that of float64 is a tensor, as a number would arrive as float32."""
    if ACC == tl.float64:
        temperature = tl.load(temperature)
    return temperature


@triton.jit
def exp_series(d):
    """``(exp d - 1 - d) 2 / d^2`` for ``|d| < 1/2``, to the precision of the type."""
    LAST: tl.constexpr = 16 if d.dtype == tl.float64 else 8
    series = d * 0 + 1
    for k in tl.static_range(LAST, 2, -1):
        series = 1 + d * (1.0 / k) * series
    return series


@triton.jit
def log_one_plus(x):
    """``log(1 + x)`` for ``x > -1``, of small x too."""
    LAST: tl.constexpr = 35 if x.dtype == tl.float64 else 17
    small = (x < 0.5) & (x > -0.5)
    z = tl.where(small, x, 0.0)
    z = z / (2 + z)
    square = z * z
    series = z * 0
    for k in tl.static_range(LAST, 0, -2):
        series = 1.0 / k + square * series
    return tl.where(small, 2 * z * series, tl.log(1 + x))


@triton.jit
def exp_less_one(x):
    """``exp(x) - 1`` for ``x <= 0``."""
    small = x > -0.5
    near = tl.where(small, x, 0.0)
    return tl.where(small, near + near * near * exp_series(near) * 0.5, tl.exp(x) - 1)


@triton.jit
def less_its_log(y):
    """``y - log(1 + y)`` in float32 for ``|y| < 0.14``, as exact as y is."""
    series = y * 0 + 1.0 / 9
    for k in tl.static_range(8, 1, -1):
        series = 1.0 / k - y * series
    return y * y * series


@triton.jit
def close_step(p, q, scale, d):
    """``p (exp d - 1)`` and ``p (exp d - 1 - d)``, neither by a difference where d is small; ``scale`` turns q into
    ``p exp d``."""
    small = (d < 0.5) & (d > -0.5)
    e = tl.where(small, d, 0.0)
    near, far = p * (e * e * exp_series(e) * 0.5), q * scale - p
    along = tl.where(p == 0, 0.0, p * d)
    return tl.where(small, near + along, far), tl.where(small, near, far - along)


@triton.jit
def quotient(a, b):
    """``a / b`` as exact as the type, so exactly 1 where both are equal."""
    if a.dtype == tl.float64:
        value = a / b
    else:
        value = tl.div_rn(a, b)
    return value


@triton.jit
def shift_of(top):
    """A class of -inf logits only is shifted by nothing, so that its terms are exp(-inf) = 0 and not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def online(top, total, x, inverse):
    """Of every lane the largest so far and the sum of exp((. - largest) / T), with x added to both."""
    above = x > top
    high = tl.where(above, x, top)
    less = tl.exp((tl.where(above, top, x) - shift_of(high)) * inverse)
    return high, tl.where(above, total * less + 1, total + less)


@triton.jit
def online_two(top_s, sum_s, top_t, sum_t, dot, s, t, difference, inverse):
    """The same of both sides, and the sum of exp(t) difference / T."""
    high_s, total_s = online(top_s, sum_s, s, inverse)
    above = t > top_t
    high_t = tl.where(above, t, top_t)
    less = tl.exp((tl.where(above, top_t, t) - shift_of(high_t)) * inverse)
    difference *= inverse
    # No mass, no contribution, even where the difference is infinite.
    weighed = tl.where(less == 0, 0.0, less * tl.where(above, dot, difference))
    dot = weighed + tl.where(above, difference, dot)
    return high_s, total_s, high_t, tl.where(above, sum_t * less + 1, sum_t + less), dot
