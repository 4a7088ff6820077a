"""Claims about the run that compute-sanitizer watches: it leaves no kernel out but flash4's."""

import pytest

from kernels.variants import VARIANTS
from verify import sanitize
from verify.interpreter import run_interpreted


def test_every_product_has_a_run() -> None:
    """Operators with arguments are those of the variants, neither fewer nor others."""
    runs = sanitize.cutlass_runs(*sanitize.SHAPES[1], "cpu")
    assert runs.keys() == {variant.op for variant in VARIANTS.values()}


PASSES = """
import importlib, pkgutil
from triton.runtime.interpreter import InterpretedFunction
import kernels
from kernels import joined_attention, pass_ops
from verify import sanitize

for module, place in ((pass_ops, "check_cuda_tensors"), (pass_ops, "check_rows"),
                      (joined_attention, "check_cuda_tensors")):
    setattr(module, place, lambda **tensors: None)  # the interpreter takes CPU tensors
ran, call = set(), InterpretedFunction.run

def run(kernel, *arguments, **options):
    ran.add(kernel.fn.__name__)
    return call(kernel, *arguments, **options)

InterpretedFunction.run = run
sanitize.run_passes(2, "cpu")
there = set()
for name in ("residual_triton", "heads_triton", "joined_heads_triton", "muon_triton"):
    module = vars(importlib.import_module(f"kernels.{name}"))
    there |= {n for n, x in module.items()
              if isinstance(x, InterpretedFunction) and n.endswith("_kernel")}
assert ran == there != set(), ran ^ there
"""


def test_every_pass_runs() -> None:
    """Interpreted, the passes take their arguments, and each of their kernels is launched."""
    run_interpreted(PASSES)


@pytest.mark.hopper
def test_everything_runs_on_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The script comes to its end, all shapes named."""
    sanitize.main()
    assert len(capsys.readouterr().out.splitlines()) == len(sanitize.SHAPES) + 2
