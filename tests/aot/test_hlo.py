"""Reading optimised HLO: trip counts, collectives spread over fusions, copies."""

import pytest

from dsv3_jax.aot import large_copies, list_operations, xla_operations
from dsv3_jax.aot.hlo_traffic import count_traffic

SPREAD_ALL_GATHER = """
%start (p: bf16[8,128]) -> (bf16[8,128], bf16[64,128], u32[]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %all-gather.1 = bf16[64,128]{1,0} all-gather(%p), channel_id=1, replica_groups=[8,8]<=[64], dimensions={0}
  ROOT %s = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="@START"
}
%async_collective_fusion.1 (q: bf16[8,128], r: bf16[64,128], y: f32[8,128]) -> (f32[8,128], bf16[64,128]) {
  %q = bf16[8,128]{1,0} parameter(0)
  %r = bf16[64,128]{1,0} parameter(1)
  %y = f32[8,128]{1,0} parameter(2)
  %all-gather.2 = bf16[64,128]{1,0} all-gather(%q), channel_id=1, replica_groups=[8,8]<=[64], dimensions={0}
  %sine = f32[8,128]{1,0} sine(%y)
  ROOT %t = (f32[8,128]{1,0}, bf16[64,128]{1,0}) tuple(%sine, %all-gather.2)
}
%done (u: bf16[8,128], v: bf16[64,128]) -> bf16[64,128] {
  %u = bf16[8,128]{1,0} parameter(0)
  %v = bf16[64,128]{1,0} parameter(1)
  %all-gather.3 = bf16[64,128]{1,0} all-gather(%u), channel_id=1, replica_groups=[8,8]<=[64], dimensions={0}
  ROOT %d = bf16[64,128]{1,0} custom-call(%u, %v, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (a: bf16[8,128], b: f32[8,128]) -> bf16[64,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[8,128]{1,0} parameter(1)
  %f = (bf16[8,128]{1,0}, bf16[64,128]{1,0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %x = bf16[8,128]{1,0} get-tuple-element(%f), index=0
  %g = bf16[64,128]{1,0} get-tuple-element(%f), index=1
  %h = (f32[8,128]{1,0}, bf16[64,128]{1,0}) fusion(%x, %g, %b), kind=kLoop, calls=%async_collective_fusion.1
  %i = bf16[64,128]{1,0} get-tuple-element(%h), index=1
  ROOT %j = bf16[64,128]{1,0} fusion(%x, %i), kind=kCustom, calls=%done
}
""".replace("@START", "AsyncCollectiveStart")


def test_all_gather_spread_over_three_fusions_counts_once() -> None:
    traffic = count_traffic(SPREAD_ALL_GATHER)
    assert traffic.collectives["all-gather", "count"] == 1
    assert traffic.collectives["all-gather", "wire_bytes"] == 64 * 128 * 2 * 7 / 8
    assert (
        traffic.figures["read_bytes"] == 8 * 128 * 2 + 8 * 128 * 4
    )  # the shard, and the operand of the sine
    assert traffic.figures["write_bytes"] == 64 * 128 * 2 + 8 * 128 * 4  # the gathered array, and the sine


LOOP = """
%body (p: (s32[], s32[], f32[1024])) -> (s32[], s32[], f32[1024]) {{
  %p = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[1024]{{0}}) parameter(0)
  %i = s32[]{{:S(6)}} get-tuple-element(%p), index=0
  %step = s32[]{{:S(6)}} get-tuple-element(%p), index=1
  %x = f32[1024]{{0}} get-tuple-element(%p), index=2
  %y = f32[1024]{{0}} sine(%x)
  %next = s32[]{{:S(6)}} add(%i, %step)
  ROOT %t = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[1024]{{0}}) tuple(%next, %step, %y)
}}
%condition (q: (s32[], s32[], f32[1024])) -> pred[] {{
  %q = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[1024]{{0}}) parameter(0)
  %j = s32[]{{:S(6)}} get-tuple-element(%q), index=0
  %limit = s32[]{{:S(6)}} constant({limit})
  ROOT %c = pred[]{{:S(6)}} compare(%j, %limit), direction={direction}
}}
ENTRY %main (a: f32[1024]) -> f32[1024] {{
  %a = f32[1024]{{0}} parameter(0)
  %zero = s32[]{{:S(6)}} constant({start})
  %by = s32[]{{:S(6)}} constant({step})
  %s = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[1024]{{0}}) tuple(%zero, %by, %a)
  %w = (s32[]{{:S(6)}}, s32[]{{:S(6)}}, f32[1024]{{0}}) while(%s), condition=%condition, body=%body
  ROOT %r = f32[1024]{{0}} get-tuple-element(%w), index=2
}}
"""


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "trips"),
    [
        (0, 10, 1, "LT", 10),
        (0, 10, 3, "LT", 4),
        (1, 10, 3, "LE", 4),
        (10, 0, -1, "GT", 10),
        (10, 0, -2, "GE", 6),
    ],
)
def test_trip_counts(start: int, limit: int, step: int, direction: str, trips: int) -> None:
    text = LOOP.format(start=start, limit=limit, step=step, direction=direction)
    figures = count_traffic(text).figures
    assert figures["read_bytes"] == figures["write_bytes"] == trips * 4096
    # The counter's own addition is a scalar operation, which costs no fixed overhead.
    assert [(op.name, op.times) for op in list_operations(text)] == [("y", trips), ("next", trips)]
    assert [op.name for op in xla_operations(text)] == ["y"]


COPIES = """
%upcast (p: f8e4m3fn[1024,1024]) -> bf16[1024,1024] {
  %p = f8e4m3fn[1024,1024]{1,0} parameter(0)
  ROOT %c = bf16[1024,1024]{1,0} convert(%p)
}
%layer (q: f32[4,1024,1024], i: s32[]) -> f32[1024,1024] {
  %q = f32[4,1024,1024]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[]{:S(6)} constant(0)
  %one = s32[]{:S(6)} add(%i, %i)
  %s = f32[1,1024,1024]{2,1,0} dynamic-slice(%q, %one, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %b = f32[1024,1024]{1,0} bitcast(%s)
}
%write (r: f32[4,1024,1024], u: f32[1,8,1024], k: s32[]) -> f32[4,1024,1024] {
  %r = f32[4,1024,1024]{2,1,0} parameter(0)
  %u = f32[1,8,1024]{2,1,0} parameter(1)
  %k = s32[]{:S(6)} parameter(2)
  ROOT %d = f32[4,1024,1024]{2,1,0} dynamic-update-slice(%r, %u, %k, %k, %k)
}
%double (v: f32[1024,1024]) -> f32[1024,1024] {
  %v = f32[1024,1024]{1,0} parameter(0)
  ROOT %m = f32[1024,1024]{1,0} add(%v, %v)
}
ENTRY %main (a: f8e4m3fn[1024,1024], b: f32[4,1024,1024], c: f32[1,8,1024], n: s32[]) -> f32[4,1024,1024] {
  %a = f8e4m3fn[1024,1024]{1,0} parameter(0)
  %b = f32[4,1024,1024]{2,1,0} parameter(1)
  %c = f32[1,8,1024]{2,1,0} parameter(2)
  %n = s32[]{:S(6)} parameter(3)
  %upcast.1 = bf16[1024,1024]{1,0} fusion(%a), kind=kLoop, calls=%upcast
  %layer.1 = f32[1024,1024]{1,0:S(1)} fusion(%b, %n), kind=kLoop, calls=%layer
  %double.1 = f32[1024,1024]{1,0} fusion(%layer.1), kind=kLoop, calls=%double
  ROOT %write.1 = f32[4,1024,1024]{2,1,0} fusion(%b, %c, %n), kind=kLoop, calls=%write
}
"""


def test_copies_are_told_from_updates_and_arithmetic() -> None:
    copies = {op.name: (op.written_bytes, op.written_to_hbm) for op in large_copies(COPIES, 1_000_000)}
    assert copies == {"upcast.1": (2 * 2**20, True), "layer.1": (4 * 2**20, False)}
    assert [op.written_bytes for op in large_copies(COPIES, 0) if op.name == "write.1"] == [8 * 1024 * 4]
