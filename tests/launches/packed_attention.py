"""Calls of the launchers on tensors without memory: every kernel in every form of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lvrpo.kernels import packed_attention as kernels


def call(rows, spans, dtype, *, width=128, v_width=None, heads=28, kv_heads=4, **options):
    """Forward and backward; `queries` fewer than rows select some of them."""
    queries, softcap = options.get("queries", rows), options.get("softcap", 0.0)
    v_width = v_width or width

    def floating(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def table(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    q, k, v = (
        floating(n, h, w)
        for n, h, w in [(queries, heads, width), (rows, kv_heads, width), (rows, kv_heads, v_width)]
    )
    tables = [table(rows), table(rows), table(queries), table(spans, 9), table(2 * spans, 2)]
    window = options.get("window", 0)
    tables.append(table(rows) if window else None)
    tables.append(table(queries // 128 + spans, 4))
    numbers = torch.tensor([options.get("scale", 0.1), softcap, window], dtype=torch.float64)
    out, lse = kernels.packed_attention_fwd(q, k, v, *tables, numbers)
    tables += table(rows // 64, 6), table(rows // 32, 3), table(rows // 128, 6)
    dlse = torch.empty_like(lse) if options.get("with_dlse") else None
    saved = q, k, v, out, lse
    kernels.packed_attention_bwd(torch.empty_like(out), dlse, *saved, *tables, numbers)


def every_form() -> None:
    # One width for each entry of the tables, and one that does not fill its tile.
    for width in (64, 80, 128, 256):
        call(10_496, 19, torch.bfloat16, width=width)
    for dtype in (torch.float32, torch.float64):
        for width in (64, 128, 256)[: 2 if dtype == torch.float64 else 3]:
            call(10_496, 19, dtype, width=width)
    call(900, 19, torch.float16, heads=16, kv_heads=16, queries=500, softcap=50.0, with_dlse=True)
    for width in (128, 256):
        call(10_496, 19, torch.bfloat16, width=width, window=1024)
    call(900, 19, torch.float32, queries=500, window=100, softcap=50.0)


def one_training_run() -> Iterator[None]:
    """200 lengths and layouts."""
    for step in range(200):
        # A window is a number, and whether there is one another kernel.
        yield call(1000 + 17 * step, 3 + step, torch.bfloat16, scale=0.1 + step, window=1 + step)
