"""Products of a warp, bulk copies and a barrier of the whole grid, in PTX: what neither Pallas nor `registers` has.

Only for use inside `plgpu.inline_mgpu`. Products are mma.m16n8k16 on bfloat16: lane (group g = 0 to 7, pair c = 0 to 3)
holds of the left operand, 16 by 16, the rows g and g + 8 at the columns 2c, 2c + 1, 2c + 8, 2c + 9; of the right one,
16 by 8, those rows at the column g; of the sums, 16 by 8, the rows g and g + 8 at the columns 2c and 2c + 1.
"""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm

from pjengine.pallas_kernels.registers import Int32, float32, int32, pointer, words

Sums = list[Any]  # four float32 of a lane: row g at 2c and 2c + 1, row g + 8 at 2c and 2c + 1


def no_sums() -> Sums:
    return [float32(0.0)] * 4


def multiply(sums: Sums, left: list[Any], right: list[Any]) -> Sums:
    """sums + left @ right.

    Args:
      left: four words of two elements: rows g, g + 8, g, g + 8 at columns 2c, 2c, 2c + 8, 2c + 8 and the next ones.
      right: two words: rows 2c and 2c + 8 and the next ones.
    """
    f32 = ir.F32Type.get()
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*left, *right, *sums],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9},"
        " {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        has_side_effects=False,
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(4)]


def to_bfloat16_pair(low: Any, high: Any) -> Any:
    """A word of two bfloat16 of two float32."""
    return llvm.inline_asm(words(1), [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False)


def from_bfloat16_pair(word: Any) -> list[Any]:
    """Two float32 of a word of two bfloat16."""
    texts = ("shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;")
    return [llvm.inline_asm(ir.F32Type.get(), [word], text, "=f,r", has_side_effects=False) for text in texts]


def load_past_l1(address: Any, nbytes: int, wanted: Any) -> list[Any]:
    """nbytes (4, 8 or 16) of global memory as words, from the L2 cache: other SMs wrote them while this kernel ran.

    Args:
      wanted: a predicate; where it does not hold nothing is read and the words are 0.
    """
    count = nbytes // 4
    places = ", ".join(f"${i}" for i in range(count))
    vector, target = ("", "$0") if count == 1 else (f".v{count}", f"{{{places}}}")
    text = (
        f"{{ .reg .pred wanted; setp.ne.b32 wanted, ${count + 1}, 0; "
        + "".join(f"mov.b32 ${i}, 0; " for i in range(count))
        + f"@wanted ld.global.cg{vector}.b32 {target}, [${count}]; }}"
    )
    kind = words(1) if count == 1 else llvm.StructType.get_literal([words(1)] * count)
    operands = [_integer(address, 64), arith.extui(words(1), wanted)]
    constraints = ",".join(["=&r"] * count + ["l,r,~{memory}"])
    result: Any = llvm.inline_asm(kind, operands, text, constraints, has_side_effects=True)
    return [result] if count == 1 else [llvm.extractvalue(words(1), result, [i]) for i in range(count)]


def bring_to_l2(address: Any) -> None:
    """Begins to bring the 128 bytes around an address in global memory to the L2 cache."""
    _effect("prefetch.global.L2 [$0];", "l", _integer(address, 64))


def block_barrier() -> None:
    """All threads of the block meet; what they wrote to shared memory is seen by all."""
    gpu.barrier()


def init_copy_barriers(barriers: Any, count: int) -> None:
    """By one thread, before a `block_barrier`. barriers: shared memory, 8 bytes each."""
    for i in range(count):
        _effect("mbarrier.init.shared::cta.b64 [$0], 1;", "r", _shared(barriers, int32(8 * i)))
    _effect("fence.mbarrier_init.release.cluster;", "")


def copy_bulk(source: Any, target: Any, offset: Int32, nbytes: int, barriers: Any, index: Int32) -> None:
    """Begins a copy from the global address `source` to shared memory; one thread calls it."""
    _effect(
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {nbytes};"
        f" cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], {nbytes}, [$0];",
        "r,r,l",
        _shared(barriers, index * 8),
        _shared(target, offset),
        _integer(source, 64),
    )


def wait_copied(barriers: Any, index: Int32, parity: Int32) -> None:
    """Until the copy of this parity has arrived; every thread that reads it calls this."""
    _effect(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra again; }",
        "r,r",
        _shared(barriers, index * 8),
        parity.value,
    )


def arrive_at_grid(counter: Any) -> None:
    """One thread, behind a `block_barrier`, says that its block's writes to global memory are done."""
    _effect("red.release.gpu.global.add.u32 [$0], 1;", "l", _integer(pointer(counter, int32(0)), 64))


def wait_for_grid(counter: Any, arrivals: Int32) -> None:
    """One thread waits until `arrivals` blocks have arrived; others join it by a `block_barrier`."""
    _effect(
        "{ .reg .pred done; .reg .b32 seen; again: ld.acquire.gpu.global.u32 seen, [$0];"
        " setp.ge.u32 done, seen, $1; @!done bra again; }",
        "l,r",
        _integer(pointer(counter, int32(0)), 64),
        arrivals.value,
    )


def leave_grid(counter: Any, arrivals: int) -> None:
    """One thread of each block, last of all: who arrives as the last leaves the counter at 0 for the next launch."""
    _effect(
        "{ .reg .pred last; .reg .b32 before; atom.acq_rel.gpu.global.add.u32 before, [$0], 1;"
        f" setp.eq.u32 last, before, {arrivals - 1}; @last st.relaxed.gpu.global.u32 [$0], 0; }}",
        "l",
        _integer(pointer(counter, int32(0)), 64),
    )


def _effect(text: str, constraints: str, *operands: Any) -> None:
    constraints = f"{constraints},~{{memory}}" if constraints else "~{memory}"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=True)


def _shared(ref: Any, offset: Int32) -> Any:
    return _integer(pointer(ref, offset), 32)


def _integer(address: Any, bits: int) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), address)
