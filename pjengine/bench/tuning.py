"""Finds block sizes for this GPU's attention kernels: times every candidate, keeps the fastest that is right.

`scripts/tune_kernels` calls it and writes the table that `pjengine.pallas_kernels.tuning` reads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from pjengine.bench import kernels, report
from pjengine.bench.kernels import FLOAT8, Heads, Timer
from pjengine.errors import ConfigError, KernelUnavailable, PJEngineError
from pjengine.pallas_kernels.backends import Target, current_target
from pjengine.pallas_kernels.paged.support import mosaic_refusal
from pjengine.pallas_kernels.specs import AttentionSpec
from pjengine.pallas_kernels.triton_support import triton_refusal
from pjengine.pallas_kernels.tuning import TABLES, read_rows, shape_key, table_name

HEADS = (Heads(32, 8, 128), Heads(9, 3, 64))
ENCODER_HEADS = (Heads(16, 16, 64), Heads(12, 12, 32))
PAGE = 64
DECODE_LENS = [512] * 64 + [4096] * 16
PREFILL_SPANS = [(2048, 2048)] * 2 + [(512, 4096)]
SHORT_LENS, LONG_LENS = [18] * 900, [512] * 16 + [2048] * 4
COMPILATIONS = os.cpu_count() or 1
MARGIN = 0.98  # a candidate replaces the heuristic where it needs less of its time than this


@dataclasses.dataclass(frozen=True)
class Tunable:
    """One kernel at one shape.

    Attributes:
      kernel: its name in the table.
      heuristic: the config that serves without a table, a dataclass; `fields` maps fields of it to their candidates.
      prepare: compiles the kernel with a config.
    """

    kernel: str
    spec: AttentionSpec
    heuristic: Any
    fields: dict[str, tuple[int, ...]]
    prepare: Callable[[Any], Callable[[], float]]

    def candidates(self) -> Iterator[Any]:
        for values in itertools.product(*self.fields.values()):
            config = dataclasses.replace(self.heuristic, **dict(zip(self.fields, values, strict=True)))
            if config != self.heuristic:
                yield config


def tune(tunable: Tunable, say: Callable[[str], None]) -> dict[str, Any]:
    """The table's row for it; where no candidate beats the heuristic by the margin, one that replaces nothing.

    A candidate that the compiler refuses (too much shared memory, say) is named and passed over.
    """
    configs = [tunable.heuristic, *tunable.candidates()]
    with ThreadPoolExecutor(COMPILATIONS) as pool:
        prepared = [pool.submit(tunable.prepare, config) for config in configs]
    base = best_seconds = prepared[0].result()()
    best = tunable.heuristic
    for config, timer in zip(configs[1:], prepared[1:], strict=True):
        try:
            seconds = timer.result()()
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            say(f"  {config}: refused: {str(error).splitlines()[0][:100]}")
            continue
        say(f"  {config}: {seconds * 1e6:.1f} µs")
        if seconds < best_seconds:
            best, best_seconds = config, seconds
    say(f"{tunable.kernel}, {shape_key(tunable.spec)}: {base * 1e6:.1f} µs, best {best_seconds * 1e6:.1f} with {best}")
    better = best_seconds <= MARGIN * base
    return {
        "kernel": tunable.kernel,
        "shape": shape_key(tunable.spec),
        "config": {name: getattr(best, name) for name in tunable.fields} if better else {},
        "microseconds": round(best_seconds * 1e6, 1),
        "heuristic_microseconds": round(base * 1e6, 1),
    }


def write_table(tunables: Iterable[Tunable], say: Callable[[str], None], folder: Path = TABLES) -> Path:
    """Tunes them one by one; each has its row in the device's table as soon as it is known, the others keep theirs.

    Raises:
      KernelUnavailable: there is no GPU.
    """
    device_kind = current_target().device_kind
    if device_kind is None:
        raise KernelUnavailable("tune_kernels: needs an NVIDIA GPU")
    folder.mkdir(exist_ok=True)
    path = folder / table_name(device_kind)
    rows = {(row["kernel"], row["shape"]): row for row in read_rows(path)}
    for tunable in tunables:
        row = tune(tunable, say)
        rows[row["kernel"], row["shape"]] = row
        report.write(str(path), "tune_kernels", {"device": device_kind, "rows": list(rows.values())})
    return path


def all_tunables() -> Iterator[Tunable]:
    """Of the backends that serve this GPU."""
    target = dataclasses.replace(current_target(), device_kind=None)  # no table: the heuristics themselves
    spec = AttentionSpec(32, 8, 128, page_size=PAGE)
    if mosaic_refusal(spec, target) is None:
        yield from mosaic_tunables(target)
    if triton_refusal(spec, target) is None:
        yield from triton_tunables(target)


def mosaic_tunables(target: Target) -> Iterator[Tunable]:
    from pjengine.pallas_kernels.packed import mosaic as packed
    from pjengine.pallas_kernels.packed.mosaic_long import long_config
    from pjengine.pallas_kernels.packed.mosaic_short import short_config
    from pjengine.pallas_kernels.paged import mosaic as paged

    sms = target.sms
    for heads in HEADS:
        spec = AttentionSpec(heads.query, heads.kv, heads.dim, page_size=PAGE)
        fields = {"block": (64, 128), "stages": (2, 3, 4, 6)}
        for kv_dtype in (spec.kv_dtype, FLOAT8):
            decode = dataclasses.replace(spec, decode=True, kv_dtype=kv_dtype)
            op = functools.partial(_paged, paged.paged_attention, "decode", decode)
            timer = functools.partial(_decode_timer, op, decode)
            yield Tunable("mosaic decode", decode, paged.decode_config(decode, target), fields, timer)
        op = functools.partial(_paged, paged.paged_attention, "prefill", spec)
        timer = functools.partial(_prefill_timer, op, spec)
        yield Tunable("mosaic prefill", spec, paged.prefill_config(spec, target), fields, timer)
    for heads in ENCODER_HEADS:
        spec = AttentionSpec(heads.query, heads.kv, heads.dim, causal=False)
        op = functools.partial(_packed, packed.packed_attention, "short", spec)
        timer = functools.partial(_packed_timer, op, spec, SHORT_LENS)
        yield Tunable("mosaic packed, short", spec, short_config(spec, sms), {"warpgroups": (2, 3, 4)}, timer)
        op = functools.partial(_packed, packed.packed_attention, "long", spec)
        timer = functools.partial(_packed_timer, op, spec, LONG_LENS)
        fields = {"warpgroups": (3, 4), "stages": (4, 6, 8)}
        yield Tunable("mosaic packed, long", spec, long_config(spec, sms), fields, timer)


def triton_tunables(target: Target) -> Iterator[Tunable]:
    from pjengine.pallas_kernels.packed import triton as packed
    from pjengine.pallas_kernels.paged import triton as paged
    from pjengine.pallas_kernels.triton_attention import tile_config

    shapes = {"keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)}
    for heads in HEADS:
        spec = AttentionSpec(heads.query, heads.kv, heads.dim, page_size=PAGE)
        decode = dataclasses.replace(spec, decode=True)
        op = functools.partial(_paged, paged.paged_attention, "single_tiles", decode)
        heuristic = tile_config(decode, target, single=True)
        yield Tunable("triton decode", decode, heuristic, shapes, functools.partial(_decode_timer, op, decode))
        op = functools.partial(_paged, paged.paged_attention, "tiles", spec)
        heuristic = tile_config(spec, target, single=False)
        prefill = {"queries": (64, 128), **shapes}
        yield Tunable("triton prefill", spec, heuristic, prefill, functools.partial(_prefill_timer, op, spec))
    for heads in ENCODER_HEADS:
        spec = AttentionSpec(heads.query, heads.kv, heads.dim, causal=False)
        heuristic = tile_config(spec, target, single=False)
        op = functools.partial(_packed, packed.packed_attention, "tiles", spec)
        timer = functools.partial(_packed_timer, op, spec, SHORT_LENS + LONG_LENS)
        yield Tunable("triton packed", spec, heuristic, {"queries": (32, 64, 128), **shapes}, timer)


def _paged(function: Any, name: str, spec: AttentionSpec, config: Any, *arrays: Any, **options: Any) -> Any:
    return function(*arrays, None, None, None, spec=spec, scale=options["scale"], **{name: config})


def _packed(function: Any, name: str, spec: AttentionSpec, config: Any, *arguments: Any, **options: Any) -> Any:
    *arrays, query_starts = arguments
    return function(tuple(arrays), query_starts, None, spec=spec, scale=options["scale"], **{name: config})


def _heads(spec: AttentionSpec) -> Heads:
    return Heads(spec.heads, spec.kv_heads, spec.head_dim)


def _decode_timer(op: Any, spec: AttentionSpec, config: Any) -> Timer:
    spans = [(1, length) for length in DECODE_LENS]
    op = functools.partial(op, config)
    return kernels.paged_timer(spans, decode=True, heads=_heads(spec), page=PAGE, kv_dtype=spec.kv_dtype, op=op)


def _prefill_timer(op: Any, spec: AttentionSpec, config: Any) -> Timer:
    op = functools.partial(op, config)
    return kernels.paged_timer(PREFILL_SPANS, decode=False, heads=_heads(spec), page=PAGE, op=op)


def _packed_timer(op: Any, spec: AttentionSpec, lens: list[int], config: Any) -> Timer:
    return kernels.packed_timer(lens, _heads(spec), op=functools.partial(op, config))


def chosen(tunables: Iterable[Tunable], names: Collection[str]) -> list[Tunable]:
    """The tunables of the named kernels; all where none is named.

    Raises:
      ConfigError: one of the names is no kernel's.
    """
    found = list(tunables)
    known = sorted({tunable.kernel for tunable in found})
    unknown = sorted(set(names) - set(known))
    if unknown and known:
        raise ConfigError(f"tune_kernels: no kernel here is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [tunable for tunable in found if not names or tunable.kernel in names]


if __name__ == "__main__":
    try:
        print(write_table(chosen(all_tunables(), sys.argv[1:]), functools.partial(print, flush=True)))
    except PJEngineError as error:
        sys.exit(str(error))
