"""`pjengine bench kernels`: every kernel over a grid of shapes, as a ratio to what this card can do.

Decode and KV writes are bound by memory: their ratio is to the copy bandwidth measured in the same run, KV bytes
counted once. Prefill and packed attention are bound by the tensor cores: theirs is to the GEMM rate. Each case runs
several times inside one jitted function, as often as a model has layers, each result feeding the next call, over
caches that exceed the L2, and functions follow one another for so long that the host's first launch counts for
nothing. That heats the card to its power limit, which the GEMM rate, ten products after a pause, does not meet: rows
bound by the tensor cores also say what they reach as long as the card is cool, if they are long enough. Calls of a few
microseconds, which the device runs faster than the host launches them, are timed on the device: from the first kernel's
start to the last one's end in a profile.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjengine.bench import report, roofline
from pjengine.errors import KernelUnavailable
from pjengine.pallas_kernels import describe_backends, packed_attention, paged_attention, rope_write_kv_qkv

DTYPE, FLOAT8 = "bfloat16", "float8_e4m3fn"
L2_BYTES = 200_000_000  # caches of a case exceed this together: three times an H200's L2
CALLS = 32  # of the op inside one jitted function
REPEATS = 9
LAUNCHES = 3  # of the function, at least, and so many that they take SUSTAINED seconds
SUSTAINED = 40e-3
PAUSE = 1.0  # seconds in which the card cools
COOL = 15e-3  # seconds of a launch after it, at least: ten products of the GEMM rate
HOST_BOUND = 30e-6  # seconds of a call; shorter ones are timed on the device


@dataclasses.dataclass(frozen=True)
class Timer:
    """A function that calls an op CALLS times, compiled, and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self) -> float:
        """Seconds of one call of the op, sustained."""
        return _seconds(self.function, *self.arguments)

    def cool(self) -> float | None:
        """Seconds of one call as the GEMM rate is taken: in a launch after a pause and another launch.

        None where a launch is shorter than COOL: what the host takes to begin would count.
        """
        time.sleep(PAUSE)
        if _launch(self.function, self.arguments, 1) < COOL:
            return None
        return _launch(self.function, self.arguments, 1) / CALLS


@dataclasses.dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    dim: int


LLAMA_8B, BGE_LARGE = Heads(32, 8, 128), Heads(16, 16, 64)


def skewed_lengths(count: int, mean: float, longest: int, seed: int = 0) -> list[int]:
    """Log-normal lengths (sigma 1) of about this mean, at least 1."""
    draws = np.random.default_rng(seed).lognormal(math.log(mean) - 0.5, 1.0, count)
    return [int(n) for n in np.clip(draws, 1, longest)]


def decode_cases() -> dict[str, list[int]]:
    """KV length of each row."""
    return {
        "32 × 8k": [8192] * 32,
        "8 × 32k": [32768] * 8,
        "64 × 1k": [1024] * 64,
        "256 × 256": [256] * 256,
        "1 × 1k": [1024],
        "1 × 32k": [32768],
        "256, log-normal, mean 400": skewed_lengths(256, 400, 4096),
    }


def prefill_cases() -> dict[str, list[tuple[int, int]]]:
    """(queries, KV tokens) of each row."""
    return {
        "8k": [(8192, 8192)],
        "2k": [(2048, 2048)],
        "512 after 16k": [(512, 16384 + 512)],
        "64 decode rows at 2k": [(1, 2048)] * 64,
        "64 decode rows at 2k + 2k": [(1, 2048)] * 64 + [(2048, 2048)],
    }


def packed_cases() -> dict[str, list[int]]:
    """Length of each sequence."""
    queries = skewed_lengths(2000, 18, 200)
    total = np.cumsum(queries)
    return {
        "16k tokens of queries, mean 18": [n for n, end in zip(queries, total, strict=True) if end <= 16384],
        "32 × 512": [512] * 32,
    }


def main(json_path: str | None) -> list[dict[str, Any]]:
    """Runs everything, prints a table, and writes it to json_path where given.

    Returns: a row per case: op, case, microseconds, rate, unit, ratio (to the unit's ceiling), cool (the rate after a
      pause; None where the memory is the bound or the calls are short), cudnn (our rate over that of
      `jax.nn.dot_product_attention`'s cuDNN path; None where cuDNN cannot do the work).
    Raises:
      KernelUnavailable: there is no GPU.
      ConfigError: json_path cannot be written.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise KernelUnavailable(f"bench kernels: needs an NVIDIA GPU, found only {device.device_kind!r}")
    ceiling = roofline.measure()
    print(f"{device.device_kind}: {ceiling}")
    backends = describe_backends(LLAMA_8B.query, LLAMA_8B.kv, LLAMA_8B.dim, 64, DTYPE)
    for op, backend, reasons in backends:
        print(f"{op}: {backend}" + (f" ({reasons})" if reasons else ""))
    rows = [_decode_row(name, lens, ceiling) for name, lens in decode_cases().items()]
    rows.append(_decode_row("32 × 8k, float8 KV", decode_cases()["32 × 8k"], ceiling, kv_dtype=FLOAT8))
    rows += [_prefill_row(name, spans, ceiling) for name, spans in prefill_cases().items()]
    rows += [_packed_row(name, lens, ceiling) for name, lens in packed_cases().items()]
    rows += [_write_row(tokens, ceiling) for tokens in (64, 8192)]
    report.show("kernels", rows)
    if json_path is not None:
        document = {
            "device": device.device_kind,
            "roofline": dataclasses.asdict(ceiling),
            "backends": [list(row) for row in backends],
            "rows": rows,
        }
        report.write(json_path, "kernels", document)
    return rows


def _row(
    op: str,
    case: str,
    seconds: float,
    ceiling: roofline.Roofline,
    *,
    nbytes: float = 0,
    flops: float = 0,
    cool: float | None = None,
) -> dict[str, Any]:
    unit, work, limit = ("TFLOP/s", flops, ceiling.gemm_rate) if flops else ("TB/s", nbytes, ceiling.copy_bandwidth)
    return {
        "op": op,
        "case": case,
        "microseconds": round(seconds * 1e6, 2),
        "rate": round(work / seconds / 1e12, 3),
        "unit": unit,
        "ratio": round(work / seconds / limit, 3),
        "cool": None if cool is None else round(work / cool / 1e12, 3),
        "cudnn": None,
    }


def _timer(function: Any, *arguments: Any) -> Timer:
    return Timer(function.lower(*arguments).compile(), arguments)


def _seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Median time of one op in a function that calls it CALLS times."""
    _launch(function, arguments, 1)
    count = max(LAUNCHES, math.ceil(SUSTAINED / _launch(function, arguments, 1)))
    seconds = statistics.median(_launch(function, arguments, count) for _ in range(REPEATS)) / CALLS
    if seconds > HOST_BOUND:
        return seconds
    return statistics.median(_device_seconds(function, *arguments) for _ in range(5)) / CALLS


def _launch(function: Callable[..., Any], arguments: tuple[Any, ...], count: int) -> float:
    """Mean seconds of launches that follow one another."""
    started = time.perf_counter()
    for _ in range(count):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / count


def _device_seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds from the start of the first kernel that one call runs to the end of the last."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(function(*arguments))
        (path,) = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
    spans = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return (max(end for _, end in spans) - min(start for start, _ in spans)) * 1e-9


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(DTYPE))


def _pools(kv_lens: Sequence[int], heads: Heads, page_size: int, dtype: str) -> tuple[list[Any], jax.Array]:
    """Enough KV caches to exceed the L2, and shuffled block tables for one of them."""
    needed = [-(-n // page_size) for n in kv_lens]
    order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1))
    tables, used = np.zeros((len(needed), max(needed)), np.int32), 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[used : used + count]
        used += count
    shape = (sum(needed) + 1, heads.kv, page_size, heads.dim)
    copies = min(CALLS, -(-L2_BYTES // (2 * math.prod(shape) * jnp.dtype(dtype).itemsize)))
    pools = [tuple(_random(2 * i + j, *shape).astype(dtype) for j in (0, 1)) for i in range(copies)]
    return pools, jnp.asarray(tables)


def paged_timer(
    spans: Sequence[tuple[int, int]],
    *,
    decode: bool,
    heads: Heads = LLAMA_8B,
    page: int = 64,
    kv_dtype: str = DTYPE,
    op: Callable[..., jax.Array] = paged_attention,
) -> Timer:
    """Compiles calls over rows of (queries, KV tokens). op: with the arguments of `paged_attention`."""
    kv_lens = [kv for _, kv in spans]
    caches, tables = _pools(kv_lens, heads, page, kv_dtype)
    starts = np.cumsum([0, *(n for n, _ in spans)]).astype(np.int32)

    @jax.jit
    def run(q: jax.Array, caches: Any, *batch: jax.Array) -> jax.Array:
        for i in range(CALLS):
            q = op(q, *caches[i % len(caches)], *batch, scale=heads.dim**-0.5, decode=decode)
        return q

    q = _random(99, int(starts[-1]), heads.query, heads.dim)
    return _timer(run, q, caches, jnp.asarray(starts), jnp.asarray(kv_lens, jnp.int32), tables)


def _decode_row(
    case: str, kv_lens: list[int], ceiling: roofline.Roofline, heads: Heads = LLAMA_8B, kv_dtype: str = DTYPE
) -> dict[str, Any]:
    seconds = paged_timer([(1, n) for n in kv_lens], decode=True, heads=heads, kv_dtype=kv_dtype)()
    nbytes = 2 * sum(kv_lens) * heads.kv * heads.dim * jnp.dtype(kv_dtype).itemsize
    return _row("paged_attention, decode", case, seconds, ceiling, nbytes=nbytes)


def _prefill_row(
    case: str, spans: list[tuple[int, int]], ceiling: roofline.Roofline, heads: Heads = LLAMA_8B
) -> dict[str, Any]:
    timer = paged_timer(spans, decode=False, heads=heads)
    cool, seconds = timer.cool(), timer()
    pairs = sum(n * (kv - n) + n * (n + 1) / 2 for n, kv in spans)
    row = _row("paged_attention, mixed", case, seconds, ceiling, flops=4 * heads.query * heads.dim * pairs, cool=cool)
    if len(spans) == 1 and spans[0][0] == spans[0][1]:
        row["cudnn"] = round(_cudnn_seconds(1, spans[0][0], heads, causal=True) / seconds, 3)
    return row


def packed_timer(
    lens: Sequence[int], heads: Heads = BGE_LARGE, op: Callable[..., jax.Array] = packed_attention
) -> Timer:
    """Compiles calls over sequences of these lengths. op: with the arguments of `packed_attention`."""
    starts = jnp.asarray(np.cumsum([0, *lens]), jnp.int32)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            q = op(q, k, v, starts, scale=heads.dim**-0.5)
        return q

    q, k, v = (_random(i, sum(lens), n, heads.dim) for i, n in enumerate((heads.query, heads.kv, heads.kv)))
    return _timer(run, q, k, v, starts)


def _packed_row(case: str, lens: list[int], ceiling: roofline.Roofline, heads: Heads = BGE_LARGE) -> dict[str, Any]:
    timer = packed_timer(lens, heads)
    cool, seconds = timer.cool(), timer()
    flops = 4 * heads.query * heads.dim * sum(n * n for n in lens)
    row = _row("packed_attention", case, seconds, ceiling, flops=flops, cool=cool)
    if len(set(lens)) == 1:
        row["cudnn"] = round(_cudnn_seconds(len(lens), lens[0], heads, causal=False) / seconds, 3)
    return row


def _cudnn_seconds(batch: int, length: int, heads: Heads, *, causal: bool) -> float:
    """cuDNN's dense attention over equal lengths."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for _ in range(CALLS):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
        return q

    return _seconds(
        run, *(_random(i, batch, length, n, heads.dim) for i, n in enumerate((heads.query, heads.kv, heads.kv)))
    )


def write_chain(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, k_pages: jax.Array, v_pages: jax.Array, slots: jax.Array
) -> tuple[jax.Array, ...]:
    """CALLS writes one after the other: each goes on with the pages of the one before."""
    for _ in range(CALLS):
        q, k_pages, v_pages = rope_write_kv_qkv(qkv, cos, sin, k_pages, v_pages, slots)
    return q, k_pages, v_pages


def _write_row(tokens: int, ceiling: roofline.Roofline, heads: Heads = LLAMA_8B, page: int = 64) -> dict[str, Any]:
    pages = tokens // page + 64
    order = np.random.default_rng(0).permutation(np.arange(page, pages * page))
    slots = jnp.asarray(order[:tokens] if tokens < 256 else np.arange(page, page + tokens), jnp.int32)
    angles = jnp.linspace(0, 6, tokens * heads.dim // 2).reshape(tokens, -1)
    qkv, cos, sin = _random(0, tokens, heads.query + 2 * heads.kv, heads.dim), jnp.cos(angles), jnp.sin(angles)
    caches = [(_random(8, pages, heads.kv, page, heads.dim), _random(9, pages, heads.kv, page, heads.dim))]
    run = jax.jit(write_chain, donate_argnums=(3, 4))

    def step() -> jax.Array:
        result, *pools = run(qkv, cos, sin, *caches.pop(), slots)
        caches.append((pools[0], pools[1]))
        return result

    nbytes = (2 * heads.query + 4 * heads.kv) * heads.dim * tokens * jnp.dtype(DTYPE).itemsize
    return _row("rope_write_kv", f"{tokens} tokens", _seconds(step), ceiling, nbytes=nbytes)
