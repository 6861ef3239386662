"""What Triton makes of the kernels for an H100, looked at without one: a compiler needs no GPU.

The interpreter shows that the kernels are right; this shows what makes them fast, and exact, once
they are compiled.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PHILOX = 20  # 32-bit products whose upper half is taken, of ten rounds

SCRIPT = """
import json, sys
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ferret_flwr.projection.kernels import cuda, cuda_kernels

FLOATS = {"coefficients": "*fp32", "scales": "*fp64", "sums": "*fp64"}
INTEGERS = {"rounds": "i32", "num_blocks": "i32", "bases": "*i32"}

def compiled(name, constants, types=None, **options):
    kernel = getattr(cuda_kernels, name)
    known = FLOATS | INTEGERS | (types or {})
    kinds = {a: "constexpr" if a in constants else known.get(a, "*i64") for a in kernel.arg_names}
    whole = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]]
             for a, kind in kinds.items() if kind[0] == "*"}
    source = ASTSource(kernel, kinds, constants, whole)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

def subtract(dtype, interleaved, signs):
    constants = dict(SOURCE=dtype, TARGET=dtype, ALIGNED=True, INTERLEAVED=interleaved,
                     NARROW=False, SIGNS=signs, GROUPS=cuda.GROUPS[signs])
    return compiled("subtract", constants, num_warps=4, maxnreg=128, **cuda.EXACT)

row = dict(DTYPE=tl.float32, UPDATE=True, SIGNS=True, ROWS=1, CELLS=32, LANES=32)
run = dict(DTYPE=tl.bfloat16, ALIGNED=True, UPDATE=False, SIGNS=True, GROUPS=32, CHUNK=16)
print(json.dumps({
    "interleaved signs": subtract(tl.bfloat16, True, True),
    "contiguous signs": subtract(tl.float32, False, True),
    "contiguous normals": subtract(tl.float32, False, False),
    "project interleaved": compiled("project_interleaved", row, {"sums": "*fp32"}, num_warps=1,
                                    **cuda.EXACT),
    "project contiguous": compiled("project_contiguous", run, num_warps=4, **cuda.EXACT),
    "fingerprint": compiled("fingerprint", dict(ALIGNED=True, GROUPS=8), {"sums": "*i64"}),
    "add up": compiled("add_up", dict(CHUNK=16), {"coefficients": "*fp64"}),
}))
"""


@pytest.fixture(scope="module")
def ptx(tmp_path_factory):
    """The kernels' assembly by name."""
    cache = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def count(text, *words):
    """Return how many lines have all ``words``."""
    return sum(all(word in line for word in words) for line in text.splitlines())


def test_nothing_is_contracted_and_nothing_is_added_by_atomics(ptx):
    for text in ptx.values():
        assert count(text, "st.global")
        for word in ("fma.", "mad.f", "atom.", "red.global"):
            assert not count(text, word)
    assert count(ptx["contiguous normals"], "mul.rn.f64")  # of which each rounds for itself
    assert not count(ptx["contiguous normals"], "mul.f64")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("interleaved signs", 3),  # and two for the rotations of two rows
        ("contiguous signs", 1),
        ("project contiguous", 1),
        ("project interleaved", 2),  # and one for the rotation of a row
    ],
)
def test_a_thread_runs_the_generator_once_for_its_group(ptx, name, most):
    found = count(ptx[name], "mul.hi.u32") + count(ptx[name], "mul.wide.u32")
    assert 0 < found <= most * (PHILOX + 2)  # two more for a rotation's product and an address


@pytest.mark.parametrize("name", ["interleaved signs", "contiguous signs", "contiguous normals"])
def test_memory_is_read_and_written_16_bytes_at_a_time(ptx, name):
    assert count(ptx[name], "ld.global", "v4")
    assert count(ptx[name], "st.global", "v4")
