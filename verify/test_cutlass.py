"""Claims about the CUTLASS kernels: how they are built, loaded and called, and what they compute.

Letters: M rows (tokens), D model width, F MLP width.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import build, checks, cutlass, reference
from kernels.variants import ACTIVATION_PLAN, DPRE_PLAN, UP_PLAN, VARIANTS, Plan, Variant
from verify import hopper_code
from verify.tolerance import check, kernel_budget, relative_error

BF16 = torch.bfloat16
NO_DEVICE = 999
MLP = [name for name, v in VARIANTS.items() if v.op in ("dpre", "up", "activation")]
"""The MLP's variants; those of a block's products have verify/test_block_products.py."""

# The variants table and the hash.


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_source_of_a_variant_has_its_numbers(variant: Variant) -> None:
    """Each variant's source holds its tile, cluster, epilogue, schedule and buffers, in order."""
    source = build.instantiate(variant)
    assert "@" not in source
    numbers = [int(n) for n in re.findall(r"cute::Int<(\d+)>", source)]
    assert numbers == [*variant.tile, *variant.cluster, 1, *variant.epilogue]
    assert re.search(rf"fairway::{variant.schedule}, {variant.stores},\s+{variant.loads}>;", source)
    assert f"int fairway_{variant.name}(" in source
    if variant.op == "dpre":
        assert f"fairway::Operand::{variant.operand}>" in source


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_shape_of_a_variant_is_one_the_hardware_has(variant: Variant) -> None:
    """Epilogue pieces divide the tile, and each consumer group gets rows in multiples of 64."""
    rows, columns, depth = variant.tile
    assert rows % variant.epilogue[0] == 0
    assert columns % variant.epilogue[1] == 0
    groups = 2 if variant.schedule == "Cooperative" else 1
    assert rows % (64 * groups) == 0
    assert columns % 8 == 0
    assert columns <= 256
    assert depth == 64  # 128 bytes: one swizzle atom of shared memory


def test_variants_have_distinct_sources() -> None:
    """No two variants are the same kernel."""
    bodies = {build.instantiate(v).replace(v.name, "") for v in VARIANTS.values()}
    assert len(bodies) == len(VARIANTS)


def _copied_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cuda"
    shutil.copytree(build.SOURCES, folder)
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


def test_hash_follows_sources_flags_and_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change in any source file, flag, variant or header version gives another library name."""
    before = build.source_hash()
    folder = _copied_sources(tmp_path, monkeypatch)
    assert build.source_hash() == before
    found = {before}
    for path in sorted(folder.iterdir()):
        path.write_text(path.read_text() + "\n")
        found.add(build.source_hash())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-lineinfo"))
    found.add(build.source_hash())
    monkeypatch.setattr(build, "HEADER_PACKAGE", "nvidia-cutlass==0")
    found.add(build.source_hash())
    monkeypatch.setattr(build, "VARIANTS", {UP_PLAN.variant: VARIANTS[UP_PLAN.variant]})
    found.add(build.source_hash())
    assert len(found) == 1 + len(list(folder.iterdir())) + 3


def test_object_follows_its_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header counts for the objects that include it, directly or not, and for no others."""
    folder = _copied_sources(tmp_path, monkeypatch)
    sources = {v.op: build.instantiate(v) for v in VARIANTS.values()}

    def places() -> dict[str, Path]:
        return {op: build.object_folder(text, "a b c") for op, text in sources.items()}

    before = places()
    assert len(set(before.values())) == len(sources)
    of_mlp = {"dpre", "up", "activation"}
    for header, kept in (("block.cuh", of_mlp), ("nodes.cuh", of_mlp), ("gemm.cuh", set[str]())):
        text = (folder / header).read_text()
        (folder / header).write_text(text + "\n")
        after = places()
        assert {op for op in of_mlp if after[op] == before[op]} == kept
        assert after["up_scaled"] != before["up_scaled"]
        (folder / header).write_text(text)
    assert places() == before
    assert build.object_folder(sources["up"], "a b d") != before["up"]


def test_loader_finds_its_library_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's name does not depend on the compiler, so it may be carried elsewhere."""
    before = build.library_path()
    monkeypatch.setattr(build, "find_nvcc", lambda: pytest.fail("asked for a compiler"))
    monkeypatch.setattr(build, "compiler_version", lambda _: pytest.fail("asked for a version"))
    assert build.library_path() == before
    assert build.source_hash() in before.name


# What is missing is named.


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without nvcc the error says where it was looked for."""
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"nvcc.*PATH.*CUDA_HOME.*/usr/local/cuda"):
        build.find_nvcc()


def test_compiler_is_found_on_path_then_under_cuda_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc on PATH comes before the one under CUDA_HOME."""
    places = [tmp_path / "path" / "bin", tmp_path / "home" / "bin"]
    for place in places:
        place.mkdir(parents=True)
        (place / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(places[0]))
    assert build.find_nvcc() == places[0] / "nvcc"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_nvcc() == places[1] / "nvcc"


def test_broken_compiler_is_named(tmp_path: Path) -> None:
    """An nvcc that does not run gives a RuntimeError with its path."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(RuntimeError, match=str(broken)):
        build.compiler_version(broken)
    with pytest.raises(RuntimeError, match="does not run"):
        build.compiler_version(tmp_path / "absent")


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_missing_headers_are_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the CUTLASS headers the error gives the command that installs them."""
    spec = {"nowhere": None, "empty": SimpleNamespace(submodule_search_locations=[str(tmp_path)])}
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda _: spec[place])
    with pytest.raises(RuntimeError, match=r"pip install --no-deps nvidia-cutlass==4\.2\.0\.0"):
        build.find_headers()


def test_command_line_reports_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build command ends with status 2 and the reason when a piece is missing."""
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["kernels.build"])
    assert build.main() == 2
    assert capsys.readouterr().err.startswith("error: no CUDA compiler")
    for wrong in (["--jobs", "0"], ["--variant", "none"]):
        monkeypatch.setattr(sys, "argv", ["kernels.build", *wrong])
        with pytest.raises(SystemExit, match="2"):
            build.main()


# The builder, with a stand-in for the compiler that records what it was asked to do.

STAND_IN = """#!/bin/sh
here=$(dirname "$0")
if [ "$1" = --version ]; then echo "Build $(cat "$here/version")"; exit 0; fi
for last; do :; done
for word; do case "$word" in *.cu) echo "compile $(basename "$word")" >> "$here/log";; esac; done
case "$*" in *-shared*) echo link >> "$here/log";; esac
cat "$here/says" >&2
[ "$(cat "$here/fails")" = no ] || exit 1
echo made > "$last"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a stand-in compiler with files version, says and fails; it writes to log."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    for name, text in {"nvcc": STAND_IN, "version": "a b c", "says": "", "fails": "no"}.items():
        (folder / name).write_text(text)
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(build, "find_headers", lambda: (tmp_path, tmp_path))
    return folder


def _log(stand_in: Path) -> Counter[str]:
    """What the stand-in was asked since the last look, and how often."""
    log = stand_in / "log"
    lines = Counter(log.read_text().splitlines()) if log.exists() else Counter()
    log.unlink(missing_ok=True)
    return lines


EVERYTHING = Counter(["link", "compile status.cu", *(f"compile {n}.cu" for n in VARIANTS)])


def test_build_compiles_each_variant_once(stand_in: Path) -> None:
    """A build compiles every variant once and links once; the next one does nothing."""
    path = build.build(jobs=2)
    assert path == build.library_path()
    assert path.read_text() == "made\n"
    assert _log(stand_in) == EVERYTHING
    assert build.build() == path
    assert not _log(stand_in)
    assert not list(path.parent.rglob("*partial*"))


def test_build_follows_the_compiler(stand_in: Path) -> None:
    """Another compiler version builds everything anew, under the same name."""
    before = build.build()
    _log(stand_in)
    (stand_in / "version").write_text("a b d")
    assert build.build() == before
    assert _log(stand_in) == EVERYTHING


@pytest.mark.parametrize("left", [None, "", "{}"])
def test_interrupted_build_is_finished(stand_in: Path, left: str | None) -> None:
    """A library whose record is missing or torn is linked again from the objects."""
    sidecar = build.build().with_suffix(".json")
    _log(stand_in)
    sidecar.unlink()
    if left is not None:
        sidecar.write_text(left)
    build.build()
    assert _log(stand_in) == Counter(["link"])


def test_some_variants_never_pass_for_all(stand_in: Path) -> None:
    """A library of some variants is not the one the loader looks for."""
    path = build.build([DPRE_PLAN.variant])
    assert path != build.library_path()
    assert not build.library_path().exists()
    assert _log(stand_in) == Counter(
        ["link", "compile status.cu", f"compile {DPRE_PLAN.variant}.cu"]
    )
    assert build.build([UP_PLAN.variant]) != path


def test_failed_compilation_shows_the_compilers_words(stand_in: Path) -> None:
    """A failed compilation raises with the compiler's message and leaves no object or library."""
    (stand_in / "says").write_text("gemm.cuh(7): error: expected a semicolon")
    (stand_in / "fails").write_text("yes")
    with pytest.raises(RuntimeError, match=r"compiling \w+ failed:\n.*expected a semicolon"):
        build.build()
    (stand_in / "fails").write_text("no")
    (stand_in / "says").write_text("")
    _log(stand_in)
    build.build()
    assert _log(stand_in) == EVERYTHING


@pytest.mark.parametrize("code", ["C7508", "C7510"])
def test_serialised_matrix_instructions_are_an_error(stand_in: Path, code: str) -> None:
    """ptxas giving up on asynchronous matrix instructions fails the build, status 0 or not."""
    (stand_in / "says").write_text(f"ptxas info : ({code}) Potential Performance Loss")
    with pytest.raises(RuntimeError, match=rf"serialised[\s\S]*{code}"):
        build.build()
    assert not build.library_path().exists()


def test_two_builders_share_the_work(stand_in: Path) -> None:
    """Two builds at once compile each variant once between them."""
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: build.build(), range(2)))
    assert paths[0] == paths[1]
    assert _log(stand_in) == EVERYTHING


# The loader and the calls.


def test_missing_library_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library the error gives the command that builds it."""
    monkeypatch.setattr(cutlass, "library_path", lambda: tmp_path / "absent.so")
    with pytest.raises(RuntimeError, match=r"absent\.so is missing.*python -m kernels\.build"):
        cutlass.library.__wrapped__()


def test_damaged_library_says_how_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is no library gives an error with its path and the remedy."""
    (tmp_path / "torn.so").write_bytes(b"\x7fELF torn")
    monkeypatch.setattr(cutlass, "library_path", lambda: tmp_path / "torn.so")
    with pytest.raises(RuntimeError, match=r"torn\.so cannot be loaded.*delete it"):
        cutlass.library.__wrapped__()


def test_status_becomes_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any status but 0 raises with the kernel's name, the library's text and the number."""
    given: list[object] = []

    def kernel(*arguments: int) -> int:
        given.extend(arguments)
        return arguments[-1]

    texts = SimpleNamespace(
        fairway_kernel=kernel, fairway_status_text=lambda status: f"text of {status}".encode()
    )
    monkeypatch.setattr(cutlass, "library", lambda: texts)
    cutlass.call("kernel", 5, 0)
    assert given == [5, 0]
    for status in (1, 7, 1035, -1):
        with pytest.raises(RuntimeError, match=rf"kernel.*text of {status} \(status {status}\)"):
            cutlass.call("kernel", status)


def test_launch_settings_match_the_c_struct() -> None:
    """The Python struct has the C struct's fields, in its order and of its types."""
    text = (build.SOURCES / "gemm.cuh").read_text()
    body = re.search(r"struct Launch \{(.*?)\};", text, re.DOTALL)
    assert body is not None
    fields = re.findall(r"^\s*(\w+) (\w+);", body[1], re.MULTILINE)
    types = {"int": "c_int", "cudaStream_t": "c_void_p"}
    wanted = [(name, types[kind]) for kind, name in fields]
    assert [(field[0], field[1].__name__) for field in cutlass._Launch._fields_] == wanted


@pytest.mark.parametrize("wrong", ["absent", "other"])
def test_plan_must_name_a_variant_of_the_operator(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan with an unknown variant, or one of another operator, is a ValueError."""
    monkeypatch.setattr(checks, "check_dpre", lambda *_: None)
    monkeypatch.setattr(checks, "check_up_activation", lambda *_: None)
    t = torch.empty(8, 8)
    dpre = Plan("absent") if wrong == "absent" else UP_PLAN
    with pytest.raises(ValueError, match=rf"{dpre.variant}.*is not one of {DPRE_PLAN.variant}"):
        cutlass.run_dpre(t, t, t, dpre)
    up = Plan("absent") if wrong == "absent" else DPRE_PLAN
    with pytest.raises(ValueError, match=rf"{up.variant}.*is not one of {UP_PLAN.variant}"):
        cutlass.run_up_activation(t, t, up)
    alone = Plan("absent") if wrong == "absent" else UP_PLAN
    wanted = rf"{alone.variant}.*is not one of {ACTIVATION_PLAN.variant}"
    with pytest.raises(ValueError, match=wanted):
        cutlass.run_activation(t, t, alone)


def test_other_gpus_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not Hopper gives a RuntimeError with its name and capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    for index, capability in enumerate([(8, 0), (10, 0), (9, 1)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        tensor = SimpleNamespace(device=torch.device("cuda", 100 + index))
        wanted = rf"Some GPU.*{capability[0]}\.{capability[1]}.*9\.0"
        with pytest.raises(RuntimeError, match=wanted):
            checks.require_hopper(tensor)  # pyright: ignore[reportArgumentType]


# With the compiler: the machine code of the default variant.


@pytest.fixture(scope="module")
def default_library() -> Path:
    """A library of the default backward variant alone."""
    return hopper_code.cutlass_library(DPRE_PLAN.variant)


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_machine_code_uses_hoppers_own_instructions(default_library: Path) -> None:
    """The compiled kernel has warp-group matrix, bulk-copy and register-handover instructions."""
    code = hopper_code.read(default_library)
    assert code.target == "sm_90a"
    rows, columns, depth = VARIANTS[DPRE_PLAN.variant].tile
    instructions = (rows // 64) * (columns / 256) * (depth // 16)  # 64 x 256 x 16 at most each
    assert code.opcodes["HGMMA"] >= instructions
    assert code.opcodes["HMMA"] == 0
    assert code.opcodes["UTMALDG"] >= 3  # go, w_down, act_grad
    assert code.opcodes["UTMASTG"] >= 1
    assert code.opcodes["USETMAXREG"] == 2  # producer gives registers up, consumers take them
    assert code.opcodes["LDL"] == code.opcodes["STL"] == 0


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_compiler_reports_no_spills(default_library: Path) -> None:
    """ptxas reports the kernel without stack, spills or warnings."""
    assert default_library.exists()
    text = hopper_code.compiler_log(DPRE_PLAN.variant)
    reports = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", text)
    assert reports == [("0", "0", "0")]
    assert "C75" not in text
    assert "warning" not in text


CALLS = """
import ctypes, sys
from kernels import build, cutlass
cutlass.library_path = lambda: __import__("pathlib").Path(sys.argv[1])
settings = cutlass._Launch({device}, 132, 0, 1, None)
for name, arguments in (
    ("sm_count", ({device}, ctypes.byref(ctypes.c_int()))),
    (sys.argv[2], (None, None, None, None, 8, 8, 8, ctypes.byref(settings))),
):
    try:
        cutlass.call(name, *arguments)
    except RuntimeError as error:
        print(error)
texts = [cutlass.library().fairway_status_text(s).decode() for s in (0, 1, 1001, -1, 10**6)]
print(*texts, sep="|")
"""


@pytest.mark.nvcc
@pytest.mark.timeout(900)
def test_calls_without_their_gpu_raise(default_library: Path) -> None:
    """A call for a GPU that is not there raises CUDA's own words; the process lives on."""
    script = CALLS.format(device=NO_DEVICE)
    result = subprocess.run(
        [sys.executable, "-c", script, str(default_library), DPRE_PLAN.variant],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    first, second, texts = result.stdout.splitlines()
    assert re.fullmatch(r"CUTLASS kernel sm_count failed: .*\w.* \(status 1\d+\)", first)
    assert re.fullmatch(
        rf"CUTLASS kernel {DPRE_PLAN.variant} failed: .*\w.* \(status 1\d+\)", second
    )
    success, misaligned, invalid, *unknown = texts.split("|")
    assert success == "Success"
    assert "Misaligned" in misaligned
    assert "invalid argument" in invalid
    assert all(unknown)


# On a Hopper GPU.

MANY_TILES = (20_001, 520, 1800)
"""M, D, F: several tiles for every multiprocessor, all three sizes ragged."""


def _inputs(m: int, d: int, f: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left operand [M, D], w_up [F, D], w_down [D, F] and act_grad [M, F], random bfloat16."""
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda", generator=g)).to(BF16)

    left, w_up = normal(m, d), normal(f, d, scale=d**-0.5)
    return left, w_up, normal(d, f, scale=f**-0.5), reference.up_activation(left, w_up)[0]


def _run(plan: Plan, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    left, w_up, w_down, act_grad = inputs
    op = VARIANTS[plan.variant].op
    if op == "up":
        return cutlass.run_up_activation(left, w_up, plan)
    if op == "activation":
        return (cutlass.run_activation(left, w_up, plan),)
    return (cutlass.run_dpre(left, w_down, act_grad, plan),)


def _meaning(name: str, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    left, w_up, w_down, act_grad = inputs
    op = VARIANTS[name].op
    if op == "up":
        return reference.up_activation(left, w_up)
    if op == "activation":
        return (reference.activation(left, w_up),)
    return (reference.dpre(left, w_down, act_grad),)


@pytest.mark.hopper
@pytest.mark.parametrize("name", MLP)
def test_many_tiles_on_hopper(name: str) -> None:
    """With many tiles a multiprocessor, each row is right, whatever the order of the tiles."""
    inputs = _inputs(*MANY_TILES)
    plain = _meaning(name, inputs)
    exact = _meaning(name, tuple(t.float() for t in inputs))  # pyright: ignore[reportArgumentType]
    first = _run(Plan(name), inputs)
    for got, p, e in zip(first, plain, exact, strict=True):
        check(name, relative_error(got, e), kernel_budget(p, e, BF16))
        for rows in torch.arange(got.shape[0], device="cuda").split(1024):
            worst = relative_error(got[rows], e[rows])
            check(f"{name}, 1024 rows", worst, kernel_budget(p[rows], e[rows], BF16))
    for along_m in (False, True):
        for swizzle in (1, 2, 8):
            other = _run(Plan(name, along_m, swizzle), inputs)
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.hopper
@pytest.mark.parametrize("name", MLP)
def test_nothing_outside_the_result_is_written(name: str) -> None:
    """Ragged tiles write their rows and columns alone: memory after the result stays as it was."""
    m, d, f = 129, 72, 136
    inputs = _inputs(m, d, f)
    left, w_up, w_down, act_grad = inputs
    operands = (left, w_down, act_grad) if VARIANTS[name].op == "dpre" else (left, w_up)
    want = _run(Plan(name), inputs)
    buffers = [torch.full((3 * m * f,), 7.0, device="cuda", dtype=BF16) for _ in want]
    results = [buffer[m * f : 2 * m * f].view(m, f) for buffer in buffers]
    cutlass.launch(Plan(name), (*operands, *results), (m, f, d))
    for buffer, result, w in zip(buffers, results, want, strict=True):
        assert torch.equal(result, w)
        assert (buffer[: m * f] == 7).all()
        assert (buffer[2 * m * f :] == 7).all()


@pytest.mark.hopper
@pytest.mark.parametrize(
    "plan", [DPRE_PLAN, UP_PLAN, ACTIVATION_PLAN], ids=["dpre", "up", "activation"]
)
def test_kernel_runs_on_the_current_stream(plan: Plan) -> None:
    """On a side stream the kernel waits for that stream's earlier work."""
    inputs = _inputs(300, 64, 128)
    want = _run(plan, inputs)
    late = tuple(torch.zeros_like(t) for t in inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, so that another stream would be first
        for target, source in zip(late, inputs, strict=True):
            target.copy_(source)
        got = _run(plan, late)  # pyright: ignore[reportArgumentType]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


EDGES = [0.0, 1e-40, -1e-40, 2.0**-133, 1.0, -1.0, 1.8e19, -1.8e19, 3e38, -3e38, float("inf")]


@pytest.mark.hopper
@pytest.mark.parametrize("name", MLP)
def test_edges_pass_through_on_hopper(name: str) -> None:
    """Zeros, denormals, the largest numbers and infinities come out as float32 rounds them."""
    edges = torch.tensor([*EDGES, float("-inf"), 3.0, -3.0, 0.5, -0.5], device="cuda", dtype=BF16)
    rows, width = 4, 8
    left = torch.zeros(rows, width, device="cuda", dtype=BF16)
    left[:, 0] = torch.tensor([1.0, -1.0, 2.0, 0.5])
    if VARIANTS[name].op != "dpre":
        weight = torch.zeros(edges.numel(), width, device="cuda", dtype=BF16)
        weight[:, 0] = edges
        got = _run(Plan(name), (left, weight, weight, weight))
        pre = left[:, :1].float() * edges.float()
        slope = torch.where(pre > 0, 2 * pre, 0.5 * pre)
        want = (slope.to(BF16), (0.5 * slope * pre).to(BF16))[-len(got) :]
    else:
        weight = torch.zeros(width, edges.numel(), device="cuda", dtype=BF16)
        weight[0] = 1.0
        act_grad = edges.expand(rows, -1).contiguous()
        got = (cutlass.run_dpre(left, weight, act_grad, Plan(name)),)
        want = ((left[:, :1].float() * edges.float()).to(BF16),)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.hopper
def test_current_device_is_left_alone() -> None:
    """A kernel on the last GPU leaves the caller's current GPU as it was."""
    last = torch.cuda.device_count() - 1
    inputs = tuple(t.to(f"cuda:{last}") for t in _inputs(100, 64, 128))
    before = torch.cuda.current_device()
    got = _run(DPRE_PLAN, inputs)  # pyright: ignore[reportArgumentType]
    assert torch.cuda.current_device() == before
    exact = _meaning(DPRE_PLAN.variant, tuple(t.float() for t in inputs))  # pyright: ignore[reportArgumentType]
    plain = _meaning(DPRE_PLAN.variant, inputs)  # pyright: ignore[reportArgumentType]
    budget = kernel_budget(plain[0], exact[0], BF16)
    check("dpre on the last GPU", relative_error(got[0], exact[0]), budget)
