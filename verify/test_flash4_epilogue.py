"""Claims about flash4's kernels as compiled here: XSA in the epilogue, and their files on disk.

Letters: B windows, T positions, L positions of whole tiles, H query heads, G key/value heads,
K head size.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import flash4, flash4_compiled, flash4_package, reference
from verify import flash4_stand_in
from verify.flash4_stand_in import plain_attention
from verify.tolerance import check, kernel_budget, relative_error

BF16, F64 = torch.bfloat16, torch.float64
K = flash4.HEAD_SIZE


def _heads(batch: int, length: int, heads: tuple[int, int], device: str) -> list[Tensor]:
    """Queries, keys and values side by side, as the projection leaves them."""
    H, G = heads
    draw = torch.Generator(device).manual_seed(length)
    joint = torch.randn(batch, length, H + 2 * G, K, generator=draw, device=device).to(BF16)
    return list(joint.split([H, G, G], dim=2))


# On a GPU: the kernel.


@pytest.mark.hopper
@pytest.mark.flash4
@pytest.mark.parametrize("length", [1, 2, 127, 128, 193, 500, 2048])
@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (6, 2)])
def test_xsa_in_the_epilogue_meets_the_budget(length: int, heads: tuple[int, int]) -> None:
    """The rest, own shares and logarithms against float64."""
    q, k, v = _heads(3, length, heads, "cuda")
    v[:, ::3, 0] = 0  # a value of length zero takes nothing off
    rest, own, lse2 = flash4.flash_attention_exclude_self(q, k, v)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        typed = [t.to(dtype) for t in (q, k, v)]
        return reference.exclude_self_parts(plain_attention(*typed), typed[2])

    exact, rounded = plain(F64), plain(BF16)
    if length > 1:  # one position attends to itself alone: nothing is left but roundings
        for part in (slice(0, 1), slice(1, None)):
            budget = kernel_budget(rounded[0][:, part], exact[0][:, part], BF16)
            check("rest", relative_error(rest[:, part], exact[0][:, part]), budget)
    else:
        assert rest.abs().max() <= 2.0**-7 * v.abs().max()
    budget = kernel_budget(rounded[1], exact[1], BF16)
    check("own", relative_error(own[..., :length], exact[1]), budget)
    want = flash4_stand_in.logarithms(q.double(), k.double()) / math.log(2)
    check("logarithms", (lse2[..., :length] - want).abs().max().item(), 1e-4)
    assert (lse2[..., length:] == math.inf).all()
    assert (own[..., length:] == 0).all()


@pytest.mark.hopper
@pytest.mark.flash4
def test_xsa_in_the_epilogue_repeats_and_keeps_to_its_stream() -> None:
    """The same call gives the same bits, also on a stream that must wait for its arguments."""
    q, k, v = _heads(2, 500, (8, 4), "cuda")
    want = flash4.flash_attention_exclude_self(q, k, v)
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that another stream would be first
        late.copy_(q)
        got = flash4.flash_attention_exclude_self(late, k, v)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Without one: what the operator says of itself.


def test_operator_keeps_what_it_promises_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, strides and types told to the compiler are those that come out."""
    for name, replacement in flash4_stand_in.replacements().items():
        monkeypatch.setattr(flash4, name, replacement)
    arguments = tuple(t.float() for t in _heads(2, 7, (4, 2), "cpu"))
    torch.library.opcheck(flash4.flash_attention_exclude_self, arguments)
    rest, own, lse2 = flash4.flash_attention_exclude_self(*arguments)
    assert own.shape == lse2.shape == (2, 4, 128)
    assert (lse2[..., 7:] == math.inf).all()
    assert (own[..., 7:] == 0).all()
    out = plain_attention(*arguments)
    assert torch.equal(rest, reference.exclude_self(out, arguments[2]))


def test_heads_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is written for one size of head."""
    monkeypatch.setattr(flash4, "check_heads", lambda **_: None)
    heads = torch.zeros(1, 3, 2, 32)
    with pytest.raises(ValueError, match="heads of 64, not 32"):
        flash4.flash_attention_exclude_self(heads, heads, heads)


# Compiled kernels on disk.


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Kinds of kernels compiled so far, by a stand-in for compiler and loader, under `tmp_path`."""
    made: list[str] = []

    class Compiled:
        def __init__(self, kind: str) -> None:
            self.kind = kind

        def export_to_c(self, *, object_file_path: str, function_name: str) -> None:
            made.append(self.kind)
            time.sleep(0.05)  # as long as a second process needs to come along
            Path(object_file_path).write_text(f"{self.kind} as {function_name}")

    def load(library: Path) -> Callable[..., str]:
        if not library.exists():
            raise FileNotFoundError(library)
        content = library.read_text()
        if "broken" in content:
            raise OSError("a needed library has moved")
        return lambda: content

    monkeypatch.setenv(flash4_package.CACHE_FOLDER, str(tmp_path))
    monkeypatch.delenv(flash4_package.CACHE_SWITCH, raising=False)
    monkeypatch.setattr(
        flash4_compiled, "_compiled_forward", lambda members: Compiled(f"forward {members}")
    )
    monkeypatch.setattr(flash4_compiled, "_compiled_backward", lambda: Compiled("backward"))
    monkeypatch.setattr(flash4_compiled, "_load", load)
    monkeypatch.setattr(flash4_compiled, "_link", lambda a, b: b.write_bytes(a.read_bytes()))
    monkeypatch.setattr(flash4_compiled, "versions", lambda: {"flash-attn-4": "4", "tvm": "1"})
    flash4_compiled._kernel.cache_clear()
    yield made
    flash4_compiled._kernel.cache_clear()


def _again(kind: str, members: int) -> Any:
    """A kernel as a later process gets it."""
    flash4_compiled._kernel.cache_clear()
    return flash4_compiled._kernel(kind, members)()


def test_a_kernel_is_compiled_once(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Later processes load it; other groups, kernels and versions are compiled on their own."""
    assert flash4_compiled._kernel("forward", 2)() == "forward 2 as fairway"
    assert _again("forward", 2) == "forward 2 as fairway"
    assert built == ["forward 2"]
    assert _again("forward", 1) == "forward 1 as fairway"
    assert _again("backward", 1) == "backward as fairway"
    monkeypatch.setattr(flash4_compiled, "versions", lambda: {"flash-attn-4": "4", "tvm": "2"})
    assert _again("forward", 2) == "forward 2 as fairway"
    assert built == ["forward 2", "forward 1", "backward", "forward 2"]
    assert len(list(tmp_path.glob("*.so"))) == 4
    assert {p.suffix for p in tmp_path.iterdir()} == {".so", ".lock"}


def test_a_library_that_cannot_be_loaded_is_made_anew(built: list[str], tmp_path: Path) -> None:
    """Where what it was linked with has moved, say."""
    flash4_compiled._kernel("forward", 2)
    (library,) = tmp_path.glob("*.so")
    library.write_text("broken")
    assert _again("forward", 2) == "forward 2 as fairway"
    assert built == ["forward 2"] * 2


@pytest.mark.parametrize("name", ["flash4_compiled.py", "flash4_epilogue.py"])
def test_a_kernel_of_other_sources_is_not_loaded(
    name: str, built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever edits the epilogue gets what it says now."""
    flash4_compiled._kernel("forward", 2)
    (old,) = (path for path in flash4_compiled.SOURCES if path.name == name)
    edited = tmp_path / name
    edited.write_bytes(old.read_bytes() + b"#")
    sources = [edited if path == old else path for path in flash4_compiled.SOURCES]
    monkeypatch.setattr(flash4_compiled, "SOURCES", sources)
    assert _again("forward", 2) == "forward 2 as fairway"
    assert built == ["forward 2"] * 2


def test_processes_wait_for_the_one_that_compiles(built: list[str]) -> None:
    """Several ranks start at once; one compiles, all load what it made."""
    kernel = flash4_compiled._kernel.__wrapped__
    with ThreadPoolExecutor(4) as ranks:
        loaded = list(ranks.map(lambda _: kernel("forward", 2)(), range(4)))
    assert loaded == ["forward 2 as fairway"] * 4
    assert built == ["forward 2"]


def test_a_link_that_breaks_off_leaves_nothing(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Half a library would be loaded by the next process."""

    def halfway(_: Path, library: Path) -> None:
        library.write_text("half")
        raise RuntimeError("out of space")

    monkeypatch.setattr(flash4_compiled, "_link", halfway)
    with pytest.raises(RuntimeError, match="out of space"):
        flash4_compiled._kernel("forward", 2)
    assert built == ["forward 2"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_serves_what_it_has(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A kept kernel is loaded without a lock; else the error says what to do."""
    flash4_compiled._kernel("forward", 2)

    def refused(_: Path) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(flash4_compiled, "FileLock", refused)
    assert _again("forward", 2) == "forward 2 as fairway"
    with pytest.raises(RuntimeError, match=r"read-only.*CACHE_DIR name a folder.*ENABLED=0"):
        flash4_compiled._kernel("forward", 1)
    assert built == ["forward 2"]


def test_nothing_is_kept_where_the_user_says_so(
    built: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The package's own switch counts for these kernels too."""
    monkeypatch.setenv(flash4_package.CACHE_SWITCH, "0")
    for _ in range(2):
        assert _again("forward", 2) == "forward 2 as fairway"
    assert built == ["forward 2"] * 2
    assert not list(tmp_path.iterdir())


def test_failing_links_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a C compiler, or where it fails."""
    arguments = (tmp_path / "a.o", tmp_path / "a.so")
    monkeypatch.setattr(flash4_compiled, "_inside", lambda package: tmp_path / package)
    for compiler in ("false", "no-such-compiler -O2"):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RuntimeError, match=r"install gcc or set CC \(.*" + compiler.split()[0]):
            flash4_compiled._link(*arguments)
    with pytest.raises(FileNotFoundError):
        flash4_compiled._load(tmp_path / "none.so")
