"""Bytes that the operands of a matrix product move between external memory and the buffer of an engine."""

from __future__ import annotations

import math

from bitwright.core.workload import Gemm


def panel_traffic(
    gemm: Gemm, rows: int, columns: int, left_bytes: float, right_bytes: float, buffer_bytes: float
) -> tuple[float, float]:
    """External bytes read for the left (m, k) and right (k, n) operand of all products of a batch.

    The array takes `rows` of m and `columns` of n at a time. Half of the buffer holds a panel of whole rows of one
    operand (or whole columns of the other) while the other operand streams past it once per panel; when not even a
    panel as high as the array fits, both stream, once per tile of the array. The cheapest of the three schedules is
    taken. `left_bytes` and `right_bytes` are per element.
    """
    left = gemm.m * gemm.k * left_bytes
    right = gemm.n * gemm.k * right_bytes
    options = [(left * math.ceil(gemm.n / columns), right * math.ceil(gemm.m / rows))]
    left_panels = _panels(gemm.m, rows, gemm.k * left_bytes, buffer_bytes / 2)
    right_panels = _panels(gemm.n, columns, gemm.k * right_bytes, buffer_bytes / 2)
    if left_panels:
        options.append((left, right * left_panels))
    if right_panels:
        options.append((left * right_panels, right))
    best = min(options, key=sum)
    return best[0] * gemm.batch, best[1] * gemm.batch


def _panels(lines: int, tile: int, line_bytes: float, room_bytes: float) -> int:
    """Panels needed for `lines` rows (or columns) in `room_bytes`, in whole tiles of the array; 0 if none fits."""
    if lines * line_bytes <= room_bytes:
        return 1
    per_panel = int(room_bytes // line_bytes) // tile * tile
    if not per_panel:
        return 0
    panels, rest = divmod(lines, per_panel)
    # A last tile that is not full may still fit beside the panel before it.
    return panels + (rest > 0 and (per_panel + rest) * line_bytes > room_bytes)
