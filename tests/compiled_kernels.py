"""Small kernels, one good and the others each with one fault, compiled and judged; prints JSON. Run as a script.

A process of its own, because pytest's has Triton in interpreter mode.
"""

import dataclasses
import json
import sys

import torch
import triton
import triton.language as tl

from ijepa_fast.kernels.compile import compile_spec
from ijepa_fast.kernels.specs import CompileSpec, record_specs


@triton.jit
def copy_kernel(x, out, num_values, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < num_values), mask=i < num_values)


@triton.jit
def center_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, values - tl.sum(values) / BLOCK)


@triton.jit
def silent_kernel(x, BLOCK: tl.constexpr):
    tl.load(x + tl.arange(0, BLOCK))


@triton.jit
def product_kernel(a, b, c, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, depth, K):
        left = tl.load(a + m[:, None] * depth + (first + k)[None, :])
        right = tl.load(b + (first + k)[:, None] * N + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def product_and_sums_kernel(a, b, c, sums, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    total, columns = tl.zeros([M, N], tl.float32), tl.zeros([N], tl.float32)
    for first in range(0, depth, K):
        left = tl.load(a + (first + k)[:, None] * M + m[None, :])
        right = tl.load(b + (first + k)[:, None] * N + n[None, :])
        total = tl.dot(tl.trans(left), right, total)
        columns += tl.sum(right.to(tl.float32), axis=0)
    tl.store(c + m[:, None] * N + n[None, :], total)
    tl.store(sums + n, columns)


def copy(x):
    copy_kernel[(1,)](x, torch.empty_like(x), x.numel(), BLOCK=1024, num_warps=4)


def center(x):
    center_kernel[(1,)](x, torch.empty_like(x), BLOCK=x.numel(), num_warps=4, maxnreg=32)


def silent(x):
    silent_kernel[(1,)](x, BLOCK=x.numel())


def product(m, n, k, **options):
    a, b = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((m, 1024), (1024, n)))
    c = torch.empty(m, n, device="meta")
    product_kernel[(1,)](a, b, c, 1024, M=m, N=n, K=k, num_warps=4, **options)


def product_and_sums(size):
    a, b = (torch.empty(1024, size, dtype=torch.bfloat16, device="meta") for _ in range(2))
    c, sums = torch.empty(size, size, device="meta"), torch.empty(size, device="meta")
    product_and_sums_kernel[(1,)](a, b, c, sums, 1024, M=size, N=size, K=64, num_warps=8, num_stages=3)


def specs(arch: str) -> dict[str, CompileSpec]:
    values = torch.empty(16384, dtype=torch.bfloat16, device="meta")
    (good,) = record_specs(arch, "", copy, values, memory_bound=True)
    (spilling,) = record_specs(arch, "", center, values.float(), memory_bound=True)
    (silent_spec,) = record_specs(arch, "", silent, values)
    (good_product,) = record_specs(arch, "", lambda: product(64, 64, 64, num_stages=2), product=True)
    (large,) = record_specs(arch, "", lambda: product(64, 128, 256, num_stages=4))
    (spilling_product,) = record_specs(arch, "", lambda: product(128, 128, 64, num_stages=2, maxnreg=96))
    (racing,) = record_specs(arch, "", lambda: product_and_sums(128))
    (impossible,) = record_specs(arch, "", lambda: product(64, 64, 8))
    return {
        "good": good,
        "good product": good_product,
        "spills": spilling,
        "spills in a loop with matrix instructions": spilling_product,
        "does not compile": impossible,
        "too much shared memory": large,
        "a buffer too few": racing,
        "no write": silent_spec,
        "narrow loads": dataclasses.replace(good, aligned=()),
        "no matrix instructions": dataclasses.replace(good, product=True),
    }


if __name__ == "__main__":
    (arch,) = sys.argv[1:]
    print(json.dumps({name: dataclasses.asdict(compile_spec(spec, arch)) for name, spec in specs(arch).items()}))
