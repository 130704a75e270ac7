"""Gradients of attention, recomputed tile by tile as in FlashAttention-2 (Dao, arXiv:2307.08691).

With the maximum m and the weight l of each row kept by the forward, P = exp(s - m) / l needs no softmax, and

    dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP - δ),  δ = rowsum(dO ∘ O)
    dQ = scale · dU K      dK = scale · dUᵀ Q

where dS is the gradient of what the softmax saw (and of a mask that was added), dU that of scale · q kᵀ: through a soft
cap dU = dS (1 - tanh²), through a factor dU = dS · factor. m and l are kept apart: of rows masked by finfo.min the
logarithm of l would be lost beside m, and every weight be 1 instead of 1 / N.

One kernel takes the keys tile by tile for dK and dV (all query heads of a KV head, so nothing is added up in memory),
one the rows for dQ. A sink's gradient is -P_sink δ. Rows without a live key have no P; those that are averages give dO
to every value alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.kernels import _triton
from fxopt.kernels._flash import prefill
from fxopt.kernels._flash_parts import (
    BY_DISTANCE,
    BY_KEY,
    SLOPE,
    UNIFORM,
    ZERO,
    _bound,
    _tanh,
    _times_distance,
    at_zero,
    example_signature,
    example_values,
    example_widths,
    operands,
)
from fxopt.kernels._triton import CompileExample, jit, tl

#: rows whose bounds are looked at together
SCAN = 1024


@jit
def _weights(  # type: ignore[no-untyped-def]
    u, mask, factor, bias, row, key, first, last, live, top, inverse, cap,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, IS_CAUSAL: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """P of a tile from u = scale · q kᵀ, and what dS is multiplied by on its way through the soft cap.

    The tile may lie either way: `row`, `first`, `last`, `top` and `inverse` vary along one dimension, `key` along the
    other.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    s = u
    slope = tl.zeros_like(u) + 1.0
    if FACTOR:
        s = s * factor.to(tl.float32)
    if CAP != 0:
        capped = _tanh(s / cap, CAP)
        s = capped * cap
        slope = 1.0 - capped * capped
    if BIAS != 0:
        s += bias.to(tl.float32)
    if MASK == 1:
        live = live & (mask != 0)
    if MASK == 2:
        s += mask.to(tl.float32)
    if IS_CAUSAL:
        live = live & (row >= key)
    if FIRST:
        live = live & (key >= first)
    if LAST:
        live = live & (key <= last)
    s = tl.where(live, s, float("-inf"))
    return tl.exp2((s - top) * LOG2E) * inverse, slope


@jit
def _row_facts(tops, weights, deltas, place, there, EMPTY: tl.constexpr):  # type: ignore[no-untyped-def]
    """(m, 1 / l, δ) of some rows; of rows that aren't there, or have no P, 1 / l is 0."""
    top = tl.load(tops + place, mask=there, other=0.0)
    weight = tl.load(weights + place, mask=there, other=1.0)
    delta = tl.load(deltas + place, mask=there, other=0.0)
    inverse = 1.0 / weight
    if EMPTY != 0:
        inverse = tl.where(weight == 0.0, 0.0, inverse)
        delta = tl.where(weight == 0.0, 0.0, delta)
    inverse = tl.where(there, inverse, 0.0)
    return tl.where(top == float("-inf"), 0.0, top), inverse, delta


@jit
def _dq_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, bias, sink, first, last, grad, tops, weights, deltas, dq, dmask, dfactor, dbias,
    heads, group, rows, keys, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, b_batch, b_head, s_batch, s_head, s_row,
    first_batch, first_head, first_row, last_batch, last_head, last_row,
    dm_batch, dm_head, dm_row, dm_key, df_batch, df_head, df_row, df_key, db_batch, db_head,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EMPTY: tl.constexpr, DMASK: tl.constexpr,
    DFACTOR: tl.constexpr, DBIAS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows of one head. DMASK: dS is added to the mask's gradient, for 2 summed over the rows first; so
    with DBIAS, for a bias by distance (1) and by key (2); for a slope (3) the sum of all dS · distance is."""
    tile = tl.program_id(1)
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    wide_row = row.to(tl.int64)
    column = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    there = row < rows
    in_rows = there[:, None]
    place = (batch * heads + head) * rows + wide_row
    q_tile = tl.load(
        q + batch * q_batch + head * q_head + (wide_row * q_row)[:, None] + depth[None, :],
        mask=in_rows & (depth < D)[None, :], other=0.0,
    )  # fmt: skip
    grad_tile = tl.load(grad + place[:, None] * DV + width[None, :], mask=in_rows & (width < DV)[None, :], other=0.0)
    top, inverse, delta = _row_facts(tops, weights, deltas, place, there, EMPTY)
    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    mask_tile = mask + batch * m_batch + head * m_head + (wide_row * m_row)[:, None] + (column * m_key)[None, :]
    factor_tile = factor + batch * f_batch + head * f_head + (wide_row * f_row)[:, None] + (column * f_key)[None, :]
    bias += batch * b_batch + head * b_head
    dbias += batch * db_batch + head * db_head
    tilt = 0.0
    if BIAS == 3:
        tilt = tl.load(bias).to(tl.float32)
    of_tilt = tl.zeros([BLOCK_M], tl.float32)
    last_row_there = tl.minimum(row, rows - 1)
    from_key = _bound(first + batch * first_batch + head * first_head, last_row_there, rows, first_row, 0, FIRST)
    to_key = _bound(last + batch * last_batch + head * last_head, last_row_there, rows, last_row, keys - 1, LAST)
    begin = 0
    end = keys
    if IS_CAUSAL:
        end = tl.minimum(end, (tile + 1) * BLOCK_M)
    if LAST:
        end = tl.minimum(end, tl.max(to_key, 0) + 1)
    if FIRST:
        begin = tl.maximum(tl.min(from_key, 0), 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = tl.cast(start, tl.int64)
        in_keys = column < keys - start
        live = in_keys[None, :] & in_rows
        k_tile = tl.load(
            k + at * k_key + (column * k_key)[:, None] + depth[None, :],
            mask=in_keys[:, None] & (depth < D)[None, :], other=0.0,
        )  # fmt: skip
        v_tile = tl.load(
            v + at * v_key + (column * v_key)[None, :] + width[:, None],
            mask=in_keys[None, :] & (width < DV)[:, None], other=0.0,
        )  # fmt: skip
        entries = live
        factors = live
        biases = live
        if MASK != 0:
            entries = tl.load(mask_tile + at * m_key, mask=live, other=0)
        if FACTOR:
            factors = tl.load(factor_tile + at * f_key, mask=live, other=0.0)
        if BIAS == 1:
            biases = tl.load(bias + ((start + column)[None, :] - row[:, None]), mask=live, other=0.0)
        if BIAS == 2:
            biases = tl.load(bias + start + column, mask=in_keys, other=0.0)[None, :]
        if BIAS == 3:
            biases = _times_distance(tilt, row[:, None], column[None, :], start)
        u = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        p, slope = _weights(
            u, entries, factors, biases, row[:, None], (start + column)[None, :], from_key[:, None], to_key[:, None],
            live, top[:, None], inverse[:, None], cap, MASK, FACTOR, BIAS, CAP, IS_CAUSAL, FIRST, LAST,
        )  # fmt: skip
        ds = p * (tl.dot(grad_tile, v_tile, input_precision="ieee") - delta[:, None])
        if DMASK == 1:
            of_mask = dmask + batch * dm_batch + head * dm_head + (wide_row * dm_row)[:, None] + at * dm_key
            tl.atomic_add(of_mask + (column * dm_key)[None, :], ds, mask=live)
        if DMASK == 2:
            of_mask = dmask + batch * dm_batch + head * dm_head + at * dm_key + column * dm_key
            tl.atomic_add(of_mask, tl.sum(ds, 0), mask=in_keys)
        if DBIAS == 1:
            tl.atomic_add(dbias + ((start + column)[None, :] - row[:, None]), ds, mask=live)
        if DBIAS == 2:
            tl.atomic_add(dbias + start + column, tl.sum(ds, 0), mask=in_keys)
        if DBIAS == 3:
            of_tilt += tl.sum(tl.where(live, ds, 0.0) * _times_distance(1.0, row[:, None], column[None, :], start), 1)
        du = ds * slope
        if DFACTOR:
            of_factor = dfactor + batch * df_batch + head * df_head + (wide_row * df_row)[:, None] + at * df_key
            tl.atomic_add(of_factor + (column * df_key)[None, :], du * u, mask=live)
        if FACTOR:
            du = du * factors.to(tl.float32)
        acc += tl.dot(du.to(k_tile.dtype), k_tile, input_precision="ieee")
    if DBIAS == 3:
        tl.atomic_add(dbias, tl.sum(of_tilt, 0))
    tl.store(
        dq + place[:, None] * D + depth[None, :], (acc * scale).to(dq.dtype.element_ty),
        mask=in_rows & (depth < D)[None, :],
    )  # fmt: skip


@jit
def _dkv_kernel(  # type: ignore[no-untyped-def]
    q, k, v, mask, factor, bias, sink, first, last, grad, tops, weights, deltas, dk, dv,
    kv_heads, group, rows, keys, scale, cap,
    q_batch, q_head, q_row, k_batch, k_head, k_key, v_batch, v_head, v_key, m_batch, m_head, m_row, m_key,
    f_batch, f_head, f_row, f_key, b_batch, b_head, s_batch, s_head, s_row,
    first_batch, first_head, first_row, last_batch, last_head, last_row,
    MASK: tl.constexpr, FACTOR: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
    IS_CAUSAL: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EMPTY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one KV head, from the rows that see any of them. Tiles are [keys, rows]."""
    start = tl.program_id(1) * BLOCK_N
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    key = start + tl.arange(0, BLOCK_N)
    wide_key = key.to(tl.int64)
    index = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    width = tl.arange(0, BLOCK_DV)
    in_keys = (key < keys)[:, None]
    k_tile = tl.load(
        k + batch * k_batch + kv_head * k_head + (wide_key * k_key)[:, None] + depth[None, :],
        mask=in_keys & (depth < D)[None, :], other=0.0,
    )  # fmt: skip
    v_tile = tl.load(
        v + batch * v_batch + kv_head * v_head + (wide_key * v_key)[:, None] + width[None, :],
        mask=in_keys & (width < DV)[None, :], other=0.0,
    )  # fmt: skip
    of_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        lowest = first + batch * first_batch + head * first_head
        highest = last + batch * last_batch + head * last_head
        begin = 0
        end = rows
        if IS_CAUSAL:
            begin = start // BLOCK_M * BLOCK_M
        if FIRST or LAST:
            nearest = rows
            farthest = 0
            for scanned in range(begin, rows, SCAN):
                some = scanned + tl.arange(0, SCAN)
                from_key = _bound(lowest, some, rows, first_row, 0, FIRST)
                to_key = _bound(highest, some, rows, last_row, keys - 1, LAST)
                sees = (from_key < start + BLOCK_N) & (to_key >= start) & (some < rows)
                nearest = tl.minimum(nearest, tl.min(tl.where(sees, some, rows), 0))
                farthest = tl.maximum(farthest, tl.max(tl.where(sees, some + 1, 0), 0))
            begin = tl.maximum(begin, nearest // BLOCK_M * BLOCK_M)
            end = farthest
        for at in range(begin, end, BLOCK_M):
            row = at + index
            wide_row = row.to(tl.int64)
            there = row < rows
            in_rows = there[None, :]
            live = in_rows & in_keys
            place = (batch * kv_heads * group + head) * rows + wide_row
            q_tile = tl.load(
                q + batch * q_batch + head * q_head + (wide_row * q_row)[:, None] + depth[None, :],
                mask=there[:, None] & (depth < D)[None, :], other=0.0,
            )  # fmt: skip
            grad_tile = tl.load(
                grad + place[:, None] * DV + width[None, :], mask=there[:, None] & (width < DV)[None, :], other=0.0
            )
            top, inverse, delta = _row_facts(tops, weights, deltas, place, there, EMPTY)
            from_key = _bound(lowest, row, rows, first_row, 0, FIRST)
            to_key = _bound(highest, row, rows, last_row, keys - 1, LAST)
            entries = live
            factors = live
            biases = live
            if MASK != 0:
                mask_at = mask + batch * m_batch + head * m_head + (wide_row * m_row)[None, :]
                entries = tl.load(mask_at + (wide_key * m_key)[:, None], mask=live, other=0)
            if FACTOR:
                factor_at = factor + batch * f_batch + head * f_head + (wide_row * f_row)[None, :]
                factors = tl.load(factor_at + (wide_key * f_key)[:, None], mask=live, other=0.0)
            bias_at = bias + batch * b_batch + head * b_head
            if BIAS == 1:
                biases = tl.load(bias_at + (key[:, None] - row[None, :]), mask=live, other=0.0)
            if BIAS == 2:
                biases = tl.load(bias_at + key, mask=key < keys, other=0.0)[:, None]
            if BIAS == 3:
                biases = _times_distance(tl.load(bias_at).to(tl.float32), row[None, :], key[:, None], 0)
            u = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
            p, slope = _weights(
                u, entries, factors, biases, row[None, :], key[:, None], from_key[None, :], to_key[None, :], live,
                top[None, :], inverse[None, :], cap, MASK, FACTOR, BIAS, CAP, IS_CAUSAL, FIRST, LAST,
            )  # fmt: skip
            of_v += tl.dot(p.to(grad_tile.dtype), grad_tile, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
            du = p * (dp - delta[None, :]) * slope
            if FACTOR:
                du = du * factors.to(tl.float32)
            of_k += tl.dot(du.to(q_tile.dtype), q_tile, input_precision="ieee")
    place = (batch * kv_heads + kv_head) * keys + wide_key
    tl.store(
        dk + place[:, None] * D + depth[None, :], (of_k * scale).to(dk.dtype.element_ty),
        mask=in_keys & (depth < D)[None, :],
    )  # fmt: skip
    tl.store(
        dv + place[:, None] * DV + width[None, :], of_v.to(dv.dtype.element_ty),
        mask=in_keys & (width < DV)[None, :],
    )  # fmt: skip


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The `attention` op and its statistics: float32 [2, B, Hq, M], the maximum and the weight of each row."""
    mask, scale, is_causal, empty_rows, softcap, *tensors = rest
    out = v.new_empty((*q.shape[:3], v.shape[3]))
    stats = out.new_empty((2, *q.shape[:3]), dtype=torch.float32)
    given = operands(q, k, v, mask, is_causal, empty_rows, softcap, *tensors)
    prefill(given, out, scale, softcap, stats=(stats[0], stats[1]))
    return out, stats


def flash_backward(
    grad: Tensor, out: Tensor, stats: Tensor, wanted: tuple[bool, bool, bool, bool], q: Tensor, k: Tensor, v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, and of mask, sink, factor and bias where they are `wanted`, each in its tensor's dtype."""
    mask, scale, is_causal, empty_rows, softcap, sink, factor, first, last, bias = rest
    given = operands(q, k, v, mask, is_causal, empty_rows, softcap, sink, factor, first, last, bias)
    batch, heads, rows, _ = q.shape
    kv_heads, keys, width = v.shape[1:]
    grad = grad.to(given.q.dtype).contiguous()
    delta = (grad.float() * out.float()).sum(-1)
    empty = stats[1] == 0
    if given.flags["EMPTY"]:
        delta = torch.where(empty, 0.0, delta)
    dq, dk, dv = (torch.empty(t.shape, dtype=given.q.dtype, device=t.device) for t in (q, k, v))
    of_mask = torch.zeros_like(mask, dtype=torch.float32) if wanted[0] and mask is not None else None
    of_factor = torch.zeros_like(factor, dtype=torch.float32) if wanted[2] and factor is not None else None
    of_bias, summed = None, dq.new_empty(1, 1, 0)
    if wanted[3] and bias is not None:
        of_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        summed = at_zero(of_bias, given.flags["BIAS"], (batch, heads, rows, keys))
    widths, itemsize = given.widths, given.q.dtype.itemsize
    wide = max(widths["BLOCK_D"], widths["BLOCK_DV"]) * itemsize
    tensors = mask is not None or factor is not None or bias is not None
    block_m, block_n, warps, stages = blocks(wide, itemsize, tensors)
    numbers = (heads // kv_heads, rows, keys, scale, 1.0 if softcap is None else softcap)
    read = (*given.tensors, grad, stats[0], stats[1], delta)
    shape = (batch, heads, rows, keys)
    of_mask_strides, of_factor_strides = (
        (0,) * 4 if t is None else t.expand(shape).stride() for t in (of_mask, of_factor)
    )
    kind = 0 if of_mask is None else 2 if of_mask_strides[2] == 0 and rows > 1 else 1
    launch = {**given.flags, **widths, "num_warps": warps, "num_stages": stages}
    _dq_kernel[(batch * heads, _triton.ceil_div(rows, block_m))](
        *read, dq, dq if of_mask is None else of_mask, dq if of_factor is None else of_factor, summed, heads,
        *numbers, *given.strides, *of_mask_strides, *of_factor_strides, *summed.stride()[:2],
        DMASK=kind, DFACTOR=of_factor is not None, DBIAS=0 if of_bias is None else given.flags["BIAS"],
        BLOCK_M=block_m, BLOCK_N=block_n, **launch,
    )  # fmt: skip
    _dkv_kernel[(batch * kv_heads, _triton.ceil_div(keys, block_n))](
        *read, dk, dv, kv_heads, *numbers, *given.strides, BLOCK_M=block_m, BLOCK_N=block_n, SCAN=SCAN, **launch,
    )  # fmt: skip
    if given.flags["EMPTY"] == UNIFORM:
        share = torch.where(empty[..., None], grad.float(), 0.0).sum(2, keepdim=True) / keys
        dv = dv + share.reshape(batch, kv_heads, heads // kv_heads, 1, width).sum(2)
    of_sink = None
    if wanted[1] and sink is not None:
        weight = torch.exp(sink.float() - stats[0][..., None]) / stats[1][..., None]
        of_sink = torch.where(sink == -torch.inf, 0.0, -weight * delta[..., None]).sum_to_size(
            (1,) * (4 - sink.dim()) + sink.shape
        )
        of_sink = of_sink.reshape(sink.shape).to(sink.dtype)
    return (
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None if of_mask is None else of_mask.to(mask.dtype), of_sink,
        None if of_factor is None else of_factor.to(factor.dtype), None if of_bias is None else of_bias.to(bias.dtype),
    )  # fmt: skip


def blocks(row_bytes: int, itemsize: int, tensors: bool) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) a tile: what compiles without spilling much on sm_80, sm_90 and sm_100.

    `tensors`: a mask, a factor or a bias is read beside the scores.
    """
    if itemsize == 4 or row_bytes > 256:
        return 32, 32, 4 if row_bytes <= 256 else 8, 1
    return 64, 32 if tensors else 64, 8, 2


def _example(name: str, kernel: Any, dtype: str, mask: str | None, d: int, **flags: Any) -> CompileExample:
    widths, itemsize = example_widths(d), 4 if dtype == "fp32" else 2
    block_m, block_n, warps, stages = blocks(
        widths["BLOCK_D"] * itemsize, itemsize, mask is not None or bool({"FACTOR", "BIAS"} & flags.keys())
    )
    own = {"DMASK": 0, "DFACTOR": False, "DBIAS": 0} if kernel is _dq_kernel else {"SCAN": SCAN}
    values = example_values(mask) | own | flags | {**widths, "BLOCK_M": block_m, "BLOCK_N": block_n}
    heads = "heads" if kernel is _dq_kernel else "kv_heads"
    signature = example_signature(dtype, mask, f"{heads} group rows keys")
    signature |= dict.fromkeys(("grad", "dq", "dk", "dv"), f"*{dtype}")
    signature |= dict.fromkeys(("tops", "weights", "deltas", "dmask", "dfactor", "dbias"), "*fp32")
    signature |= {f"{t}_{axis}": "i32" for t in ("dm", "df") for axis in ("batch", "head", "row", "key")}
    signature |= {"db_batch": "i32", "db_head": "i32"}
    names = set(kernel.arg_names) if hasattr(kernel, "arg_names") else set(signature)
    signature = {n: kind for n, kind in signature.items() if n in names}
    return CompileExample(name, kernel, signature, values, warps, stages)


COMPILE_EXAMPLES = (
    *(
        _example(f"{'dq' if kernel is _dq_kernel else 'dk and dv'}, {name}", kernel, dtype, mask, d, **flags)
        for kernel in (_dq_kernel, _dkv_kernel)
        for name, dtype, mask, d, flags in (
            ("causal with a soft cap, 128", "bf16", None, 128, {"IS_CAUSAL": True, "CAP": 2}),
            ("in a window, 64", "fp16", None, 64, {"FIRST": True, "LAST": True, "EMPTY": ZERO}),
            ("in a window with a soft cap, 256", "bf16", None, 256, {"FIRST": True, "LAST": True, "CAP": 2}),
            ("with a mask, 64, float32", "fp32", "fp32", 64, {}),
            ("with a bias, causal, 64", "bf16", None, 64, {"BIAS": BY_DISTANCE, "IS_CAUSAL": True}),
            ("with a slope, causal, 128", "bf16", None, 128, {"BIAS": SLOPE, "IS_CAUSAL": True}),
        )
    ),
    _example("dq, with a learned bias, 64", _dq_kernel, "bf16", "bf16", 64, DMASK=1),
    *(_example(f"dq, with a learned bias {name}, 64", _dq_kernel, "bf16", None, 64, BIAS=by, DBIAS=by)
      for name, by in (("by distance", BY_DISTANCE), ("by key", BY_KEY), ("that is a slope", SLOPE))),
    _example("dq, with a bias for all rows and a factor, 64", _dq_kernel, "bf16", "bf16", 64, DMASK=2, FACTOR=True,
             DFACTOR=True),
)  # fmt: skip
