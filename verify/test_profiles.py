"""Claims about profiles: every kernel finds its component, and the sums are the step."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles import __main__ as command
from profiles import nsight, pictures, table, torch_trace
from profiles.components import Event, Sizes, Work, component, gemm_role, work
from profiles.profile import Ceilings, Profile, build, load, save
from trainer.config import ModelConfig
from trainer.errors import DataError

RECORD = Sizes(ModelConfig(), tokens=98_304)
N, D, F, V, KV = 98_304, 512, 1792, 1024, 256


def kernel(
    name: str,
    ops: tuple[str, ...] = (),
    phase: str = "forward",
    dims: tuple[tuple[int, ...], ...] = (),
    ms: float = 1.0,
) -> Event:
    return Event(name, ops, dims, phase, ms, on_gpu=True)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (kernel("ncclDevKernel_AllGather", ("c10d::_allgather",), "optimizer"), "communication"),
        (kernel("nvjet_tst_128", ("aten::baddbmm",), "optimizer"), "optimizer"),
        (
            kernel("multi_tensor_apply_kernel", ("aten::_foreach_lerp_",), "average"),
            "weight average",
        ),
        (kernel("Memcpy HtoD (Pinned -> Device)", (), ""), "copies"),
        (kernel("Memset (Device)", ("aten::mm",), dims=((6, 8), (8, 16))), "GEMM other"),
        (kernel("Memset (Device)", ("aten::zeros", "aten::zero_")), "copies"),
        (
            kernel(
                "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16",
                ("CompiledFunction", "aten::_scaled_dot_product_cudnn_attention"),
            ),
            "attention forward",
        ),
        (
            kernel(
                "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16",
                ("CompiledFunctionBackward", "aten::_scaled_dot_product_cudnn_attention_backward"),
                "backward",
            ),
            "attention backward",
        ),
        (kernel("_up_kernel", ("fairway::up_activation_triton",)), "fused MLP forward"),
        (kernel("_up_kernel", ("fairway::activation_cutlass",)), "fused MLP forward"),
        (kernel("_k", ("fairway::up_scaled_cutlass",)), "fused MLP forward"),
        (
            kernel("_k", ("fairway::linear_add_cutlass",), dims=((N, F), (D, F), (N, D))),
            "GEMM MLP",
        ),
        (
            kernel("_k", ("fairway::linear_add_cutlass",), dims=((N, D), (D, D), (N, D))),
            "GEMM attention out",
        ),
        (
            kernel(
                "_k",
                ("fairway::norm_gradient_cutlass",),
                "backward",
                ((N, F), (F, D), (N, D), (N, D), (N,)),
            ),
            "GEMM MLP",
        ),
        (
            kernel("_k", ("fairway::project_heads_cutlass",), dims=((N, D), (1024, D), (N,))),
            "GEMM queries, keys, values, head",
        ),
        (
            kernel("_k", ("fairway::joined_heads_backward",), "backward"),
            "head passes backward",
        ),
        (kernel("mix_norm_kernel", ("fairway::mix_norm",)), "residual passes forward"),
        (kernel("mix_norm_kernel", ("fairway::mix_factor",)), "residual passes forward"),
        (
            kernel("add_norm_backward_kernel", ("fairway::add_norm_backward",), "backward"),
            "residual passes backward",
        ),
        (kernel("split_heads_kernel", ("fairway::split_heads",)), "head passes forward"),
        (
            kernel("cutlass::device_kernel", ("fairway::dpre_cutlass",), "backward"),
            "fused MLP backward",
        ),
        (kernel("nvjet", ("aten::mm",), dims=((N, F), (F, D))), "GEMM MLP"),
        (kernel("triton_red_fused_add_3"), "Inductor fusions forward"),
        (kernel("triton_poi_fused_mul_7", phase="backward"), "Inductor fusions backward"),
        (kernel("direct_copy_kernel", ("aten::to", "aten::_to_copy", "aten::copy_")), "copies"),
        (kernel("vectorized_elementwise_kernel", ("aten::mul",)), "eager elementwise"),
        (kernel("mystery", (), ""), "unattributed"),
        (kernel("mystery", ("aten::mul",), ""), "unattributed"),
    ],
)
def test_kernels_find_their_component(event: Event, expected: str) -> None:
    """Each kind of kernel is put into its named component, and an unknown one into none."""
    assert component(event, RECORD) == expected


@pytest.mark.parametrize(
    ("a", "b", "role"),
    [
        ((N, D), (D, F), "MLP"),
        ((F, N), (N, D), "MLP"),
        ((N, D), (D, D), "attention out"),
        ((D, N), (N, D), "attention out"),
        ((N, D), (D, D + 2 * KV), "queries, keys, values, head"),
        ((N, V), (V, D), "queries, keys, values, head"),
        ((N, 112), (112, D), "embedding projections"),
        ((N, 128), (128, KV), "embedding projections"),
        ((D, D), (D, D), "other"),
    ],
)
def test_products_are_named_by_their_sizes(
    a: tuple[int, int], b: tuple[int, int], role: str
) -> None:
    """A product's role follows from its sizes, in forward, input and weight gradient alike."""
    assert gemm_role(kernel("nvjet", ("aten::mm",), dims=(a, b)), RECORD) == role
    addmm = kernel("nvjet", ("aten::addmm",), dims=((a[0], b[1]), a, b))
    assert gemm_role(addmm, RECORD) == role


def test_a_head_as_wide_as_the_batch_is_still_told_apart() -> None:
    """With as many tokens as vocabulary entries, projections are not taken for the head."""
    sizes = Sizes(ModelConfig(vocab_size=2048), tokens=2048)
    joint = ((D, D + 2 * KV), "queries, keys, values")
    for second, role in (((D, D), "attention out"), ((D, 2048), "head"), joint):
        product = kernel("nvjet", ("aten::mm",), dims=((2048, D), second))
        assert gemm_role(product, sizes) == role


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("aten::mm", ((N, F), (F, D))),
        ("aten::mm", ((N, F), (F, D), (N, D))),  # into a given result, as compiled code does
        ("aten::addmm", ((D,), (N, F), (F, D))),
        ("aten::addmm", ((D,), (N, F), (F, D), (N, D))),
        ("aten::addmm", ((N, D), (N, F), (F, D))),
        ("aten::addmm", ((N, D), (N, F), (F, D), (N, D))),
    ],
)
def test_a_product_is_known_by_its_factors(op: str, dims: tuple[tuple[int, ...], ...]) -> None:
    """Neither a summand before the factors nor a result after them is taken for a factor."""
    event = kernel("nvjet", (op,), dims=dims)
    assert component(event, RECORD) == "GEMM MLP"
    assert work(event).flops == 2 * N * F * D


def test_work_counts_every_operation_once() -> None:
    """Products cost 2MKN, causal attention 2BHTTK forward and 2.5 times that backward."""
    mm = kernel("nvjet", ("aten::mm",), dims=((3, 5), (5, 7)))
    assert (work(mm).flops, work(mm).elements) == (2 * 3 * 5 * 7, 15 + 35 + 21)
    bmm = kernel("nvjet", ("aten::bmm",), dims=((2, 3, 5), (2, 5, 7)))
    assert work(bmm).flops == 2 * 2 * 3 * 5 * 7
    again = Event("splitk", ("aten::mm",), ((3, 5), (5, 7)), "forward", 1.0, True, False)
    assert work(again).flops == 0
    q, k = (2, 8, 16, 4), (2, 4, 16, 4)
    forward = kernel("x", ("aten::_scaled_dot_product_cudnn_attention",), dims=(q, k, k))
    exact = 2 * (2 * 2 * 8 * 16 * 16 * 4) / 2  # two products, half of each is masked
    assert work(forward).flops == exact
    assert work(forward).elements == 2 * 2 * 8 * 16 * 4 + 2 * 2 * 4 * 16 * 4
    ops = ("aten::_scaled_dot_product_cudnn_attention_backward",)
    assert work(kernel("x", ops, "backward", (q, q, k, k, q))).flops == 2.5 * exact
    fused = kernel("x", ("fairway::up_activation_triton",), dims=((6, 4), (10, 4)))
    assert work(fused).flops == 2 * 6 * 4 * 10
    assert work(fused).elements == 6 * 4 + 4 * 10 + 2 * 6 * 10
    alone = kernel("x", ("fairway::activation_cutlass",), dims=((6, 4), (10, 4)))
    assert work(alone).flops == work(fused).flops
    assert work(alone).elements == 6 * 4 + 4 * 10 + 6 * 10
    scaled = kernel("x", ("fairway::up_scaled_cutlass",), dims=((6, 4), (10, 4), (6,)))
    assert work(scaled) == work(alone)
    joint = kernel("x", ("fairway::project_heads_cutlass",), dims=((6, 4), (10, 4), (6,)))
    assert work(joint).flops == work(fused).flops
    assert work(joint).elements == 6 * 4 + 4 * 10 + 6 * 10
    added = kernel("x", ("fairway::linear_add_cutlass",), dims=((6, 10), (4, 10), (6, 4)))
    assert work(added).flops == work(fused).flops
    assert work(added).elements == 6 * 10 + 4 * 10 + 2 * 6 * 4
    dims = ((6, 10), (10, 4), (6, 4), (6, 4), (6,))
    normed = kernel("x", ("fairway::norm_gradient_cutlass",), "backward", dims)
    assert work(normed).flops == work(fused).flops
    assert work(normed).elements == 6 * 10 + 4 * 10 + 3 * 6 * 4


@pytest.mark.parametrize(
    ("op", "dims", "role", "streams"),
    [
        # Beside the factors: rest, y's gradient, and values with theirs, which are half as wide.
        (
            "exclude_self_gradient_cutlass",
            ((N, D), (D, D), (N, D), (48, 8, 2048), (N, D + 2 * KV)),
            "attention out",
            3,
        ),
        # Residual, x0 and, in one of them, a skip come in; x and u go out.
        ("linear_mix_cutlass", ((N, F), (D, F), (N, D), (N, D), (2, D)), "MLP", 4),
        (
            "linear_mix_cutlass",
            ((N, F), (D, F), (N, D), (N, D), (2, D), (N, D), (D,)),
            "MLP",
            5,
        ),
    ],
)
def test_products_with_a_pass_in_their_epilogue(
    op: str, dims: tuple[tuple[int, ...], ...], role: str, streams: int
) -> None:
    """They are products, not passes: named by their weight, with its work and every stream once."""
    event = kernel("cutlass", (f"fairway::{op}",), dims=dims)
    (m, k), n = dims[0], D
    assert component(event, RECORD) == f"GEMM {role}"
    assert work(event) == Work(2.0 * m * k * n, float(m * k + k * n + streams * m * n))


def test_work_of_fused_passes_counts_every_tensor_once() -> None:
    """A pass reads its activations and writes its outputs once; small weights do not count."""
    x, mix, d = (N, D), (2, D), (D,)
    whole = N * D
    qkv, q, kv = (48, 2048, 1024), (48, 2048, 8, 64), (48, 2048, 4, 64)
    tables = ((2048, 8), (2048, 8))
    for name, dims, streams in (
        ("mix_norm", (x, x, mix), 2 + 2),
        ("mix_norm", (x, x, x, mix), 3 + 3),
        ("mix_norm", (x, x, x, d, x, mix), 4 + 3),
        ("mix_norm_backward", (x, x, x, x, mix), 4 + 2),
        ("mix_norm_backward", (x, x, x, x, x, d, mix), 5 + 3),
        ("mix_factor", (x, x, mix), 2 + 1),
        ("mix_factor", (x, x, d, x, mix), 3 + 1),
        ("add_norm", (x, x), 2 + 2),
        ("add_norm_backward", (x, x, x), 3 + 1),
        ("split_heads", (qkv, (8,), *tables), 1.5 + 1.5),
        ("split_heads", (qkv, (48, 2048, 256), (8,), *tables), 2 + 0.5 + 2),
        ("split_heads_backward", (q, kv, kv, kv, qkv, (8,), *tables), 2.5 + 2 + 2),
        (
            "joined_heads_backward",
            ((48, 8, 2048 * 64), (2, *kv), (2, *kv), kv, (N, 1024), (12, N), (N,), (8,), *tables),
            2 + 1 + 1 + 0.5 + 2 + 2,
        ),
        ("exclude_self_backward_numbers", (q, q, kv, (48, 8, 2048)), 2.5 + 1.5),
        ("exclude_self", (q, kv), 1.5 + 1),
        ("exclude_self_backward", (q, q, kv), 2.5 + 1.5),
    ):
        assert work(kernel("x", (f"fairway::{name}",), dims=dims)).elements == streams * whole, name


def profile_of(events: list[Event], idle_ms: float, step_ms: float, steps: int = 1) -> Profile:
    return build(
        source="test",
        title="a step",
        events=events,
        idle_ms=idle_ms,
        steps=steps,
        step_ms=step_ms,
        unprofiled_ms=step_ms,
        sizes=RECORD,
        element_bytes=2,
        ceilings=Ceilings(tflops=100.0, gbytes=1000.0),
        environment={"device": "some GPU", "commit": "abc", "packages": {"torch": "2.11"}},
    )


names = st.sampled_from(
    ["triton_poi_fused", "nvjet", "mystery", "Memcpy HtoD", "ncclDev", "flash_fprop"]
)
events = st.builds(kernel, names, phase=st.sampled_from(["forward", "backward", "optimizer", ""]))


@given(st.lists(st.tuples(events, st.floats(0.001, 10)), min_size=1), st.floats(0, 5))
def test_components_sum_to_the_kernels(timed: list[tuple[Event, float]], idle_ms: float) -> None:
    """Every kernel is in exactly one component, so components plus gap are the step's time."""
    made = [Event(e.name, e.ops, e.dims, e.phase, ms, True) for e, ms in timed]
    total = sum(ms for _, ms in timed)
    profile = profile_of(made, idle_ms, total + idle_ms)
    assert profile.busy_ms == pytest.approx(total)
    assert profile.gap_ms == pytest.approx(idle_ms)
    assert abs(profile.sum_error) < 1e-9
    assert profile.launches == len(made)
    assert sum(k.ms for k in profile.kernels) == pytest.approx(total)
    assert any(c.name == "unattributed" for c in profile.components)


def test_times_and_counts_are_per_step() -> None:
    """Several profiled steps are averaged."""
    profile = profile_of([kernel("triton_poi", ms=3.0)] * 4, idle_ms=2.0, step_ms=7.0, steps=2)
    (fusions,) = (c for c in profile.components if c.name.startswith("Inductor"))
    assert (fusions.ms, fusions.launches) == (6.0, 2.0)
    assert profile.gap_ms == 1.0
    assert profile.sum_error == pytest.approx(0.0)


def test_the_table_shows_rates_shares_and_a_sum_that_does_not_fit() -> None:
    """The summary has shares, achieved rates against ceilings, and says when the sum is off."""
    mm = kernel("nvjet", ("aten::mm",), dims=((N, D), (D, F)), ms=3.0)
    text = table.markdown(profile_of([mm], idle_ms=1.0, step_ms=4.0))
    tflops = 2 * N * D * F / 3.0 / 1e9
    row = next(line for line in text.splitlines() if line.startswith("| GEMM MLP"))
    assert f"| 3.000 | 75.0% | 1 | {tflops:.3g} | {tflops / 100:.0%}" in row
    assert "unattributed | 0.000" in text
    assert "CPU gap | 1.000 | 25.0%" in text
    assert ", within 3%" in text
    assert ", NOT within 3%" in table.markdown(profile_of([mm], idle_ms=1.0, step_ms=4.2))


def x(name: str, cat: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    if "dims" in args:
        args["Input Dims"] = args.pop("dims")
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_gpu_traces_are_read_by_launch() -> None:
    """A kernel belongs to the operation and phase of its launch; overlapping work counts once."""
    raw = [
        x("fairway.step", "user_annotation", 0, 10_000),
        x("fairway.forward", "user_annotation", 0, 2000),
        x("fairway.backward", "user_annotation", 2000, 4000),
        x("aten::linear", "cpu_op", 100, 500),
        x("aten::mm", "cpu_op", 200, 300, dims=[[N, D], [D, F]]),
        x("cudaLaunchKernel", "cuda_runtime", 250, 10, correlation=1),
        x("nvjet", "kernel", 3000, 1000, tid=7, correlation=1),
        # The backward pass is launched by another thread.
        x("aten::mul", "cpu_op", 2100, 100, tid=2),
        x("cuLaunchKernel", "cuda_driver", 2150, 10, tid=2, correlation=2),
        x("elementwise", "kernel", 4000, 500, tid=7, correlation=2),
        x("Memcpy HtoD", "gpu_memcpy", 4200, 800, tid=8, correlation=3),
    ]
    events, busy_ms, window_ms = torch_trace.read(raw)
    assert [(e.name, e.phase, e.ms) for e in events] == [
        ("nvjet", "forward", 1.0),
        ("elementwise", "backward", 0.5),
        ("Memcpy HtoD", "", 0.5),
    ]
    assert events[0].ops == ("aten::linear", "aten::mm")
    assert events[0].dims == ((N, D), (D, F))
    assert events[1].ops == ("aten::mul",)
    assert (busy_ms, window_ms) == (2.0, 10.0)


def test_attention_is_counted_by_its_own_operation() -> None:
    """Kernels of operations inside attention count its work once, by attention's own shapes."""
    q, k = [2, 8, 16, 4], [2, 4, 16, 4]
    raw = [
        x("fairway.step", "user_annotation", 0, 1000),
        x("aten::_scaled_dot_product_cudnn_attention", "cpu_op", 0, 500, dims=[q, k, k]),
        x("aten::_cudnn_attention_forward", "cpu_op", 100, 300, dims=[k, k, k]),
        x("cuLaunchKernel", "cuda_driver", 150, 10, correlation=1),
        x("cuLaunchKernel", "cuda_driver", 170, 10, correlation=2),
        x("flash_fprop", "kernel", 300, 100, tid=7, correlation=1),
        x("flash_fprop_end", "kernel", 500, 100, tid=7, correlation=2),
    ]
    events, _, _ = torch_trace.read(raw)
    assert [component(e, RECORD) for e in events] == ["attention forward"] * 2
    assert [work(e).flops for e in events] == [2 * 2 * 8 * 16 * 16 * 4, 0]


def test_cpu_traces_count_own_time() -> None:
    """On a CPU an operation's time is without that of operations it calls; the rest is the gap."""
    raw = [
        x("fairway.step", "user_annotation", 0, 1000),
        x("fairway.forward", "user_annotation", 0, 900),
        x("aten::linear", "cpu_op", 100, 500),
        x("aten::mm", "cpu_op", 200, 300),
        x("aten::add", "cpu_op", 700, 100),
        x("aten::add", "cpu_op", 5000, 100),  # outside the step
    ]
    events, busy_ms, window_ms = torch_trace.read(raw)
    assert [(e.name, e.ms) for e in events] == [
        ("aten::linear", 0.2),
        ("aten::mm", 0.3),
        ("aten::add", 0.1),
    ]
    assert busy_ms == pytest.approx(0.6)
    assert window_ms == 1.0


def test_nsight_rows_meet_the_kernels_of_the_trace() -> None:
    """Nsight's rows find their component by bare name and order of launch."""
    kernels = [
        ("void at::native::elementwise<int>(int*)", "eager elementwise"),
        ("void at::native::elementwise<float>(float*)", "optimizer"),
        ("triton_poi_fused_0", "Inductor fusions forward"),
    ]

    def row(name: str, ns: float) -> nsight.Row:
        tensor = {nsight.TENSOR[1]: 50.0}
        return nsight.Row(name, {nsight.TIME: ns, nsight.DRAM: 2e6, **tensor})

    rows = [row("elementwise", 1e6), row("elementwise", 2e6), row("new_kernel", 4e6)]
    found = {r["component"]: r for r in nsight.by_component(rows, kernels)}
    assert found["eager elementwise"]["time_ms"] == 1.0
    assert found["optimizer"]["time_ms"] == 2.0
    assert found["unattributed"]["time_ms"] == 4.0
    assert found["eager elementwise"]["dram_gbytes"] == pytest.approx(2.0)
    assert found["optimizer"]["tensor_pct"] == pytest.approx(50.0)
    assert nsight.short_name("void (anonymous namespace)::f<a::b>(int)") == "f"
    assert nsight.short_name("cutlass::device_kernel<x>") == "device_kernel"
    mangled = "_ZN7cutlass13device_kernelINS_4gemm6kernel13GemmUniversalEEEvNT_6ParamsE"
    assert nsight.short_name(mangled) == "device_kernel"
    assert nsight.short_name("_Z6vectoriPf") == "vector"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of a real step on this machine."""
    folder = tmp_path_factory.mktemp("profile")
    assert (
        command.main(["step", "--mode", "eager", "--mlp", "reference", "--out", str(folder)]) == 0
    )
    return folder


def test_a_real_step_sums_to_its_wall_clock(real: Path) -> None:
    """`python -m profiles step` names all components of a real step; they sum to its clock."""
    profile = load(real)
    assert abs(profile.sum_error) <= 0.03
    names = {c.name for c in profile.components}
    expected = {"attention forward", "attention backward", "GEMM MLP", "GEMM head", "optimizer"}
    assert expected | {"weight average", "eager elementwise", "unattributed", "CPU gap"} <= names
    (lost,) = (c for c in profile.components if c.name == "unattributed")
    assert lost.ms < 0.03 * profile.step_ms
    config = command.current().config
    tokens = config.train.sequences_per_step // 8 * config.model.seq_len
    # Forward, input gradient and weight gradient of two products in each layer.
    mlp = 6 * 2 * tokens * config.model.width * config.model.mlp_width * config.model.layers
    (products,) = (c for c in profile.components if c.name == "GEMM MLP")
    assert products.flops == pytest.approx(mlp)
    assert "Source: PyTorch profiler" in (real / "summary.md").read_text()


def test_the_gap_without_the_profiler() -> None:
    """Compared are GPU steps as they run unwatched: kernels as traced, the gap from the clock."""
    events = [kernel("nvjet", ("aten::mm",), dims=((N, F), (F, D)))]
    watched = profile_of(events, idle_ms=9.0, step_ms=10.0)
    plain = replace(watched, unprofiled_ms=1.25).without_profiler()
    assert (plain.busy_ms, plain.gap_ms, plain.step_ms) == (1.0, 0.25, 1.25)
    assert replace(watched, unprofiled_ms=0.5).without_profiler().gap_ms == 0.0
    on_cpu = replace(watched, environment={"device": "cpu"})
    assert on_cpu.without_profiler() == on_cpu


def test_profiles_draw_and_compare(real: Path, tmp_path: Path) -> None:
    """Pictures are readable PNGs: the step, its roofline, two profiles, a subject's trend."""
    out = tmp_path / "both.png"
    assert command.main(["compare", str(real), str(real), "--out", str(out)]) == 0
    entry = {"ratios": [1.0, 1.1], "reference": "a product"}
    pictures.trend(tmp_path / "trend.png", "ema", [("one", entry), ("two", entry)])
    for path in (real / "step.png", real / "roofline.png", out, tmp_path / "trend.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20]) > 500


def test_profiles_round_trip_and_refuse_other_files(tmp_path: Path) -> None:
    """A stored profile is read back equal; anything else is an error that says what to do."""
    profile = profile_of([kernel("triton_poi")], 0.0, 1.0)
    save(tmp_path / "profile.json", profile)
    assert load(tmp_path) == profile
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    for path in (tmp_path / "other.json", tmp_path / "none.json"):
        with pytest.raises(DataError, match="profiles step"):
            load(path)


def test_nsight_is_never_replaced_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nsight insisted upon where it cannot run is an error; otherwise the output says so."""
    monkeypatch.setattr(nsight, "unusable", lambda: "ncu is missing")
    assert command.main(["kernel", "gemm", "--nsight", "on", "--mlp", "reference"]) == 2
    assert "--nsight on: " in capsys.readouterr().err
    assert command.main(["kernel", "gemm", "--mlp", "reference"]) == 0
    assert "without Nsight Compute" in capsys.readouterr().out


def test_nsight_reports_are_read_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel of every range is read in launch order; a metric it lacks is left out."""

    class Metric:
        def as_double(self) -> float:
            return 5.0

    class Action:
        def __init__(self, name: str) -> None:
            self.kernel = name

        def name(self) -> str:
            return self.kernel

        def metric_by_name(self, name: str) -> Metric | None:
            return Metric() if name == nsight.TIME else None

    class Range:
        def __init__(self, *names: str) -> None:
            self.names = names

        def num_actions(self) -> int:
            return len(self.names)

        def action_by_idx(self, i: int) -> Action:
            return Action(self.names[i])

    class Report:
        ranges = (Range("a", "b"), Range("c"))

        def num_ranges(self) -> int:
            return len(self.ranges)

        def range_by_idx(self, i: int) -> Range:
            return self.ranges[i]

    fake = types.SimpleNamespace(load_report=lambda path: Report())
    monkeypatch.setitem(sys.modules, "ncu_report", fake)
    rows = nsight.read_report(Path("x.ncu-rep"), nsight.STEP_METRICS)
    assert rows == [nsight.Row(name, {nsight.TIME: 5.0}) for name in "abc"]


def test_the_profiled_script_finds_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script under Nsight imports the project, not its own neighbours of the same names."""
    (tmp_path / "nsight.py").write_text(
        "class analyze:\n"
        "    def kernel(metrics, output_prefix):\n"
        "        open(output_prefix + 'x.ncu-rep', 'w').close()\n"
        "        return lambda function: lambda number: None\n"
    )
    (tmp_path / "nsight_python-0.9.6.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: nsight-python\nVersion: 0.9.6\n"
    (tmp_path / "nsight_python-0.9.6.dist-info" / "METADATA").write_text(about)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(nsight, "_known", list)
    read: list[Path] = []
    monkeypatch.setattr(nsight, "read_report", lambda path, metrics: read.append(path) or [])
    request = {"kind": "kernel", "name": "gemm", "mlp": "reference"}
    assert nsight.collect(request, nsight.STEP_METRICS) == []
    assert [path.name for path in read] == ["x.ncu-rep"]
