"""The work lists of the GPU kernels cover every query and key exactly once, whatever the lengths."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjengine.pallas_kernels.backends import Target
from pjengine.pallas_kernels.flash import TILE
from pjengine.pallas_kernels.packed.mosaic_short import ShortConfig, fitted
from pjengine.pallas_kernels.packed.plan import packed_plan, tile_bound
from pjengine.pallas_kernels.paged.decode_plan import DecodeConfig, decode_plan
from pjengine.pallas_kernels.paged.mosaic_prefill import prefill_plan
from pjengine.pallas_kernels.persistent_product.tiles import config_for, tiling_of
from pjengine.pallas_kernels.qkv_projection import tiles as qkv_tiles
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.work_items import query_items

ROWS, TOKENS = 6, 900
SETTINGS = settings(max_examples=60, deadline=None)
lengths = st.lists(st.integers(0, 400), min_size=ROWS, max_size=ROWS)


@SETTINGS
@given(
    lens=lengths,
    window=st.sampled_from([None, 70]),
    whole_blocks=st.sampled_from([0, 2, 4]),
    least_share=st.sampled_from([1, 3]),
)
def test_decode_shares_are_even_and_complete(
    lens: list[int], window: int | None, whole_blocks: int, least_share: int
) -> None:
    spec = AttentionSpec(heads=6, kv_heads=3, head_dim=64, page_size=16, decode=True, window=window)
    config = DecodeConfig(block=64, stages=2, workers=2, sms=5, whole_blocks=whole_blocks, least_share=least_share)
    tables = np.arange(ROWS * 28).reshape(ROWS, 28)
    plan = decode_plan(jnp.asarray(lens, jnp.int32), jnp.asarray(tables, jnp.int32), spec, config)
    starts, shares, counters = (np.asarray(x) for x in plan)
    np.testing.assert_array_equal(counters, np.zeros(ROWS * 3))
    first = [max(n - window, 0) // 64 if window else 0 for n in lens]
    blocks = [max(-(-n // 64) - f, 0) for n, f in zip(lens, first, strict=True)]
    np.testing.assert_array_equal(starts, np.cumsum([0, *blocks]))
    pairs = [(row, head) for row in range(ROWS) for head in range(3)]
    line = [(*pair, first[pair[0]] + i) for pair in pairs for i in range(blocks[pair[0]])]
    begins, ends, share = shares[:, 0], shares[:, 1], shares[0, 4]
    assert begins[0] == 0
    assert ends[-1] == len(line)
    np.testing.assert_array_equal(begins[1:], ends[:-1])
    longest = max(blocks) if max(blocks) <= whole_blocks else 0
    assert share == max(-(-len(line) // 10), least_share, longest)
    if whole_blocks:
        assert (ends - begins).max(initial=0) < share + whole_blocks
    else:
        assert (ends - begins).max(initial=0) == min(share, len(line))
    owners: dict[tuple[int, int], list[int]] = {}
    for worker, (begin, end, row, head, _, *rest) in enumerate(shares):
        for pair in {place[:2] for place in line[begin:end]}:
            owners.setdefault(pair, []).append(worker)
        if begin < end:
            assert line[begin][:2] == (row, head)
            block = line[begin][2]
            padded = [*lens, lens[-1], lens[-1]]
            assert rest[:3] == [starts[min(row + i, ROWS)] for i in range(3)]
            assert rest[3:5] == padded[row : row + 2]
            flat = tables.reshape(-1)
            assert rest[5:] == [flat[min(row * 28 + 4 * block + i, flat.size - 1)] for i in range(4)]
    for (row, head), workers in owners.items():
        origin = (starts[row] * 3) + head * blocks[row]
        if blocks[row] <= whole_blocks:
            assert len(workers) == 1
        elif len(workers) > 1:
            assert workers == list(range(origin // share, (origin + blocks[row] - 1) // share + 1))


@SETTINGS
@given(counts=lengths, prefixes=lengths, lead=st.integers(0, 7))
def test_prefill_tiles_hold_each_query_once(counts: list[int], prefixes: list[int], lead: int) -> None:
    room = TOKENS - lead
    for i, count in enumerate(counts):
        counts[i] = min(count, room)
        room -= counts[i]
    counts = [0 if n == 1 else n for n in counts]
    starts = lead + np.cumsum([0, *counts])
    kv_lens = np.add(counts, prefixes)
    query_starts, queries, kv = (jnp.asarray(x, jnp.int32) for x in (starts, counts, kv_lens))
    plan = np.asarray(prefill_plan(query_starts, queries, kv, TOKENS))
    seen = np.zeros(TOKENS, int)
    for token, begin, end, position, row, length in plan[plan[:, 2] > 0]:
        assert length == kv_lens[row]
        assert token % 8 == 0
        assert 0 <= begin < end <= TILE
        seen[token + begin : token + end] += 1
        assert starts[row] <= token + begin
        assert token + end <= starts[row + 1]
        assert position == prefixes[row] + token - starts[row]
    expected = np.zeros(TOKENS, int)
    expected[lead : starts[-1]] = 1
    np.testing.assert_array_equal(seen, expected)
    last_keys = np.where(plan[:, 2] > 0, plan[:, 3] + plan[:, 2], -1)
    assert (np.diff(last_keys) <= 0).all(), "longest first, padding last"


@SETTINGS
@given(
    lens=lengths,
    causal=st.booleans(),
    window=st.sampled_from([None, 30]),
    rows=st.sampled_from([64, 128]),
    block=st.sampled_from([64, 128]),
)
def test_packed_tiles_read_what_their_tokens_see(
    lens: list[int], causal: bool, window: int | None, rows: int, block: int
) -> None:
    starts = np.minimum(np.cumsum([0, *lens]), TOKENS)
    total = starts[-1]
    spec = AttentionSpec(heads=2, kv_heads=2, head_dim=64, causal=causal, window=window)
    plan = packed_plan(jnp.asarray(starts, jnp.int32), TOKENS, spec, rows=rows, block=block)
    lows, highs = np.asarray(plan.ranges)
    assert lows.shape == (TOKENS + rows,)
    row = np.repeat(np.arange(ROWS), np.diff(starts))
    for token in range(total):
        keys = np.arange(starts[row[token]], starts[row[token] + 1])
        if causal:
            keys = keys[keys <= token]
        if window is not None:
            keys = keys[np.abs(keys - token) < window]
        assert (lows[token], highs[token]) == (keys[0], keys[-1] + 1)
    assert not lows[total:].any()
    assert not highs[total:].any()
    real_tokens, count = np.asarray(plan.tiles)[0, 6:]
    assert (np.asarray(plan.tiles)[:, 6:] == (real_tokens, count)).all()
    assert real_tokens == total
    tiles = np.asarray(plan.tiles)[:count, :6]
    assert len(tiles) <= tile_bound(TOKENS, rows)
    np.testing.assert_array_equal(tiles[1:, 0], tiles[:-1, 1])
    assert (tiles[0, 0], tiles[-1, 1]) == (0, TOKENS)
    for first, last, key, blocks, whole_begin, whole_end in tiles:
        assert first < last <= first // 8 * 8 + rows
        assert key % 8 == 0
        assert 0 <= whole_begin <= whole_end <= blocks
        assert blocks >= 1
        if first < total:
            assert last <= total, "no tile holds both tokens and padding"
            assert last in starts or last == first // 8 * 8 + rows
            seen = slice(first, last)
            assert key <= lows[seen].min()
            assert key + (blocks - 1) * block < highs[seen].max() <= key + blocks * block
            if whole_begin < whole_end:
                assert lows[seen].max() <= key + whole_begin * block
                assert key + whole_end * block <= highs[seen].min()
        else:
            assert whole_begin == whole_end


@SETTINGS
@given(
    lens=lengths,
    causal=st.booleans(),
    window=st.sampled_from([None, 30]),
    parts=st.sampled_from([2, 4]),
    block=st.sampled_from([64, 128]),
)
def test_parts_of_packed_tiles_compute_with_what_their_tokens_see(
    lens: list[int], causal: bool, window: int | None, parts: int, block: int
) -> None:
    starts = np.minimum(np.cumsum([0, *lens]), TOKENS)
    total, rows = starts[-1], 64 * parts
    spec = AttentionSpec(heads=2, kv_heads=2, head_dim=64, causal=causal, window=window)
    plan = packed_plan(jnp.asarray(starts, jnp.int32), TOKENS, spec, rows=rows, block=block, parts=parts)
    lows, highs = np.asarray(plan.ranges)
    tiles = np.asarray(plan.tiles)
    np.testing.assert_array_equal(tiles[:, 0], np.arange(0, TOKENS, rows))
    np.testing.assert_array_equal(tiles[:, 1], np.minimum(tiles[:, 0] + rows, TOKENS))
    assert (tiles[:, 6:8] == (total, len(tiles))).all()
    for first, last, key, blocks, *_ in tiles:
        assert key % 8 == 0
        assert blocks >= 1
        seen = slice(first, min(last, total))
        if first < total:
            assert key <= lows[seen].min()
            assert key + (blocks - 1) * block < highs[seen].max() <= key + blocks * block
        for part in range(parts):
            low, high = (min(first + i * 64, last) for i in (part, part + 1))
            begin, end, whole_begin, whole_end = tiles[first // rows, 8 + 4 * part : 12 + 4 * part]
            assert 0 <= begin <= whole_begin <= whole_end <= end <= blocks
            if low == high:
                assert begin == end, "a part without tokens has nothing to do"
            elif low >= total:
                assert (begin, end, whole_end) == (0, 1, whole_begin)
            else:
                seen = slice(low, min(high, total))
                assert key + begin * block <= lows[seen].min() < key + (begin + 1) * block
                assert key + (end - 1) * block < highs[seen].max() <= key + end * block
                if whole_begin < whole_end:
                    assert high <= total
                    assert lows[seen].max() <= key + whole_begin * block
                    assert key + whole_end * block <= highs[seen].min()


def test_short_sequences_meet_the_keys_of_their_own_tile_alone() -> None:
    starts = np.cumsum([0, *[13, 20, 7, 18, 24, 5] * 10])
    spec = AttentionSpec(heads=2, kv_heads=2, head_dim=64, causal=False)
    plan = packed_plan(jnp.asarray(starts, jnp.int32), int(starts[-1]), spec, rows=64, block=64)
    tiles = np.asarray(plan.tiles)[: plan.tiles[0, 7]]
    assert (tiles[:, 3] == 1).all()
    assert len(tiles) < 1.5 * starts[-1] / 64


@pytest.mark.parametrize(
    ("items", "warpgroups", "sms"),
    [(1, 1, 1), (48, 1, 48), (132, 1, 132), (133, 2, 132), (500, 4, 132), (9000, 4, 132)],
)
def test_few_items_start_few_workers(items: int, warpgroups: int, sms: int) -> None:
    assert fitted(ShortConfig(block=64, warpgroups=4, sms=132), items) == ShortConfig(64, warpgroups, sms)


@SETTINGS
@given(counts=st.lists(st.integers(0, 150), min_size=ROWS, max_size=ROWS), size=st.sampled_from([16, 64]))
def test_query_items_cover_each_query_once(counts: list[int], size: int) -> None:
    rows, offsets = (np.asarray(x) for x in query_items(jnp.asarray(counts, jnp.int32), TOKENS, size))
    items = [(row, offset) for row, count in enumerate(counts) for offset in range(0, count, size)]
    assert list(zip(rows, offsets, strict=True))[: len(items)] == items
    assert (rows[len(items) :] == -1).all()


@SETTINGS
@given(tokens=st.integers(1, 5000), blocks=st.integers(1, 40), sms=st.integers(2, 140))
def test_every_tile_of_a_product_is_computed_once(tokens: int, blocks: int, sms: int) -> None:
    config = config_for(tokens, Target("gpu", 90, sms))
    tiling = tiling_of(tokens, blocks, config)
    rows, columns = (np.asarray(x) for x in tiling.place(jnp.arange(tiling.rows * tiling.columns, dtype=jnp.int32)))
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == list(np.ndindex(tiling.rows, tiling.columns))
    beside = config.cluster if config.beside else 1
    assert tiling.columns * beside >= blocks > (tiling.columns - 1) * beside
    below = config.rows * config.cluster // beside
    assert tiling.rows * below >= tokens > (tiling.rows - 1) * below
    assert tiling.workers * tiling.rounds >= tiling.rows * tiling.columns


@pytest.mark.parametrize(
    ("hidden", "width", "served"),
    [(1024, 4096, [1024, 1536, 2048, 4096, 8192]), (4096, 6144, [2048, 4096, 8192]), (896, 1152, [8192])],
)
def test_where_the_qkv_product_pays(hidden: int, width: int, served: list[int]) -> None:
    """Qwen3-0.6B, Llama-3.1-8B and Qwen2-0.5B: rounds of tiles that are half empty cost more than the pass saved."""
    sizes = [512, 1024, 1536, 2048, 4096, 8192]
    assert [t for t in sizes if qkv_tiles.pays(t, hidden, width, Target("gpu", 90, 132))] == served
