// Fused GEMMs of the MLP for Hopper (sm_90a), as CUTLASS 3.x epilogue visitor trees.
//
// DpreGemm:         dpre[M,F]            = (go[M,D] @ w_down[D,F]) * act_grad[M,F]
// UpActivationGemm: act_grad, post[M,F]  = activation(x[M,D] @ w_up[F,D]^T)
// ActivationGemm:   post[M,F], the same to the bit, without act_grad
//
// bfloat16 in and out, float32 accumulation, TMA loads and stores, warp-specialised main loops.
// Tile shape, cluster, schedule and epilogue operand are template parameters: one translation
// unit instantiates one variant.
#pragma once

#include <cuda_runtime.h>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/operations.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace fairway {

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
constexpr int kAlignment = 16 / sizeof(Element);  // TMA moves rows of 16-byte units
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// Status codes of the C interface: 0, a cutlass::Status, or a cudaError_t behind this offset.
constexpr int kCudaErrorOffset = 1000;

struct Launch {
  int device;
  int sm_count;
  int raster_along_m;  // 0: consecutive tiles along N
  int max_swizzle;
  cudaStream_t stream;
};

// kThreads: threads that share one tile's epilogue.
struct Cooperative {
  static constexpr int kThreads = 256;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

struct PingPong {
  static constexpr int kThreads = 128;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
};

// Shape of a variant. The epilogue works on the tile in pieces of EpilogueTile and may have
// kStores of them on their way to memory, and kLoads pieces of C on their way from it.
template <class Tile_, class Cluster_, class EpilogueTile_, class Schedule_, int kStores_,
          int kLoads_>
struct Variant {
  using Tile = Tile_;
  using Cluster = Cluster_;
  using EpilogueTile = EpilogueTile_;
  using Schedule = Schedule_;
  static constexpr int kStores = kStores_;
  static constexpr int kLoads = kLoads_;
};

// Epilogue pieces of a tile.
template <class V>
constexpr int kPiecesOf =
    cute::size(cute::shape_div(cute::take<0, 2>(typename V::Tile{}), typename V::EpilogueTile{}));

// Buffers for pieces of C, or of a matrix beside it.
template <class V, class ElementC>
constexpr int kLoadsOf = cute::is_void_v<ElementC> ? cute::min(kPiecesOf<V>, 4) : V::kLoads;

// A GEMM whose epilogue is the visitor tree `Tree`; ElementC is void when the tree loads no C.
template <class V, class LayoutB, class ElementC, class Tree>
struct FusedGemm {
  // CUTLASS's own choice is two store buffers, each store held back by one piece. Here stores are
  // issued at once and buffers are parameters (kernels/NOTES.md), so the policy is spelt out.
  static constexpr bool kReuseC = !cute::is_void_v<ElementC>;  // D overwrites C's shared memory
  static constexpr int kFragment =
      cute::size(typename V::EpilogueTile{}) / V::Schedule::kThreads;
  static constexpr int kLoads = kLoadsOf<V, ElementC>;
  static_assert(!kReuseC || kLoads > V::kStores, "a piece is free again a store later");
  using Policy = cutlass::epilogue::Sm90TmaWarpSpecialized<kLoads, V::kStores, kFragment, kReuseC,
                                                           /*DelayTmaStore=*/false>;
  static_assert(V::kStores <= kPiecesOf<V>, "more store buffers than pieces of a tile");
  using CollectiveEpilogue = typename cutlass::epilogue::collective::detail::Sm90TmaBuilderImpl<
      typename V::Tile, typename V::EpilogueTile, float, float, ElementC, RowMajor, kAlignment,
      Element, RowMajor, kAlignment, Tree, Policy>::CollectiveOp;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      LayoutB, kAlignment, float, typename V::Tile, typename V::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      typename V::Schedule::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int>,
                                                      CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::StrideA;
  using StrideB = typename Kernel::StrideB;
  using StrideC = typename Kernel::StrideC;
  using StrideD = typename Kernel::StrideD;
  using TreeArguments = typename CollectiveEpilogue::FusionCallbacks::Arguments;

  // Launch on `launch.stream`; no allocation, no synchronisation. c may be null if C is not read.
  static int run(int m, int n, int k, Element const* a, Element const* b, Element const* c,
                 Element* d, TreeArguments const& tree, Launch const& launch) {
    if (cudaError_t error = cudaSetDevice(launch.device); error != cudaSuccess) {
      return kCudaErrorOffset + static_cast<int>(error);
    }
    auto stride_a = cutlass::make_cute_packed_stride(StrideA{}, {m, k, 1});
    auto stride_b = cutlass::make_cute_packed_stride(StrideB{}, {n, k, 1});
    auto stride_d = cutlass::make_cute_packed_stride(StrideD{}, {m, n, 1});
    cutlass::KernelHardwareInfo hardware;
    hardware.device_id = launch.device;
    hardware.sm_count = launch.sm_count;
    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                       {m, n, k},
                                       {a, stride_a, b, stride_b},
                                       {tree, nullptr, {}, d, stride_d},
                                       hardware};
    if constexpr (!cute::is_void_v<ElementC>) {
      arguments.epilogue.ptr_C = c;
      arguments.epilogue.dC = cutlass::make_cute_packed_stride(StrideC{}, {m, n, 1});
    }
    using Raster = typename cutlass::gemm::kernel::detail::RasterOrderOptions;
    arguments.scheduler.raster_order =
        launch.raster_along_m ? Raster::AlongM : Raster::AlongN;
    arguments.scheduler.max_swizzle_size = launch.max_swizzle;
    Gemm gemm;
    if (Gemm::get_workspace_size(arguments) != 0) {
      return static_cast<int>(cutlass::Status::kErrorWorkspaceNull);
    }
    if (auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess) {
      return static_cast<int>(status);
    }
    cudaGetLastError();  // an older error of this thread is not ours to report
    if (auto status = gemm.initialize(arguments, nullptr, launch.stream);
        status != cutlass::Status::kSuccess) {
      return failure(status);
    }
    if (auto status = gemm.run(launch.stream); status != cutlass::Status::kSuccess) {
      return failure(status);
    }
    return 0;
  }

 private:
  // CUTLASS reports every CUDA error as "internal"; the runtime knows which one it was.
  static int failure(cutlass::Status status) {
    cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? static_cast<int>(status)
                                : kCudaErrorOffset + static_cast<int>(error);
  }
};

namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::epilogue::collective::detail;

// A matrix [M,N] that an epilogue reads beside C, `ElementC`; N may be columns of wider rows. It
// shares C's load pipeline, so that their buffers are as many.
template <class V, class ElementC>
struct AuxLoad {
  using Descriptor =
      collective::EpilogueDescriptor<typename V::Tile, typename V::EpilogueTile, ElementC, Element,
                                     typename V::Schedule::Epilogue>;
  using Aux = collective::AuxLoadDescriptor<Descriptor, RowMajor, Element>;
  using Node =
      fusion::Sm90AuxLoad<kLoadsOf<V, ElementC>, typename Descriptor::EpilogueTile, Element,
                          typename Aux::Stride, typename Aux::SmemLayoutAtom,
                          typename Aux::CopyOpS2R, kAlignment, /*EnableNullptr=*/false>;

  static typename Node::Arguments arguments(Element const* matrix, int m, int row_width) {
    auto stride = cutlass::make_cute_packed_stride(typename Aux::Stride{}, {m, row_width, 1});
    return {matrix, Element(0), stride};
  }
};

// A matrix [M,N] that an epilogue stores beside its result; C as above.
template <class V, class ElementC>
struct AuxStore {
  using Descriptor =
      collective::EpilogueDescriptor<typename V::Tile, typename V::EpilogueTile, ElementC, Element,
                                     typename V::Schedule::Epilogue>;
  using Aux = collective::AuxStoreDescriptor<Descriptor, RowMajor, Element>;
  using Node = fusion::Sm90AuxStore<V::kStores, typename Descriptor::EpilogueTile, Element, kRound,
                                    typename Aux::Stride, typename Aux::SmemLayoutAtom,
                                    typename Aux::CopyOpR2S, kAlignment, /*EnableNullptr=*/false>;

  static typename Node::Arguments arguments(Element* matrix, int m, int n) {
    return {matrix, cutlass::make_cute_packed_stride(typename Aux::Stride{}, {m, n, 1})};
  }
};

// Where the backward epilogue takes act_grad from: an auxiliary TMA load beside the main loop's,
// or the GEMM's C operand, whose shared memory is reused for the output.
enum class Operand { kAux, kSource };

template <class V, Operand operand>
struct DpreGemm;

template <class V>
struct DpreGemm<V, Operand::kAux> {
  using ActGrad = AuxLoad<V, void>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, Element, float, kRound>,
                               fusion::Sm90AccFetch, typename ActGrad::Node>;
  using Fused = FusedGemm<V, RowMajor, void, Tree>;

  static int run(Element const* go, Element const* w_down, Element const* act_grad, Element* dpre,
                 int m, int f, int d, Launch const& launch) {
    typename Fused::TreeArguments tree{{}, ActGrad::arguments(act_grad, m, f), {}};
    return Fused::run(m, f, d, go, w_down, nullptr, dpre, tree, launch);
  }
};

template <class V>
struct DpreGemm<V, Operand::kSource> {
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::multiplies, Element, float, kRound>,
                               fusion::Sm90AccFetch, fusion::Sm90SrcFetch<Element>>;
  using Fused = FusedGemm<V, RowMajor, Element, Tree>;

  static int run(Element const* go, Element const* w_down, Element const* act_grad, Element* dpre,
                 int m, int f, int d, Launch const& launch) {
    return Fused::run(m, f, d, go, w_down, act_grad, dpre, {{}, {}, {}}, launch);
  }
};

// Derivative of LeakyReLU(0.5)(pre)^2: 2 pre for positive pre, else pre / 2.
template <class T>
struct ActivationGradient {
  CUTLASS_HOST_DEVICE T operator()(T const& pre) const {
    return pre > T(0) ? T(2) * pre : T(0.5f) * pre;
  }
};

template <class T, int N>
struct ActivationGradient<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& pre) const {
    cutlass::Array<T, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      out[i] = ActivationGradient<T>{}(pre[i]);
    }
    return out;
  }
};

// The activation from its derivative: 0.5 * act_grad * pre, for both signs.
template <class T>
struct Activation {
  CUTLASS_HOST_DEVICE T operator()(T const& act_grad, T const& pre) const {
    return T(0.5f) * act_grad * pre;
  }
};

template <class T, int N>
struct Activation<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& act_grad,
                                                      cutlass::Array<T, N> const& pre) const {
    cutlass::Array<T, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      out[i] = Activation<T>{}(act_grad[i], pre[i]);
    }
    return out;
  }
};

template <class V>
struct UpActivationGemm {
  using StoreActGrad = AuxStore<V, void>;
  using ActGrad = fusion::Sm90EVT<fusion::Sm90Compute<ActivationGradient, float, float, kRound>,
                                  fusion::Sm90AccFetch>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<Activation, Element, float, kRound>,
                               fusion::Sm90EVT<typename StoreActGrad::Node, ActGrad>,
                               fusion::Sm90AccFetch>;
  using Fused = FusedGemm<V, ColumnMajor, void, Tree>;

  static int run(Element const* x, Element const* w_up, Element* act_grad, Element* post, int m,
                 int f, int d, Launch const& launch) {
    typename Fused::TreeArguments tree{{{{}, {}}, StoreActGrad::arguments(act_grad, m, f)}, {}, {}};
    return Fused::run(m, f, d, x, w_up, nullptr, post, tree, launch);
  }
};

// The activation from pre alone: LeakyReLU(0.5)(pre)^2. The factor is a power of two, so the one
// rounding is the product's, as in Activation.
template <class T>
struct SquaredLeakyRelu {
  CUTLASS_HOST_DEVICE T operator()(T const& pre) const {
    return (pre > T(0) ? pre : T(0.25f) * pre) * pre;
  }
};

template <class T, int N>
struct SquaredLeakyRelu<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& pre) const {
    cutlass::Array<T, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      out[i] = SquaredLeakyRelu<T>{}(pre[i]);
    }
    return out;
  }
};

template <class V>
struct ActivationGemm {
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<SquaredLeakyRelu, Element, float, kRound>,
                               fusion::Sm90AccFetch>;
  using Fused = FusedGemm<V, ColumnMajor, void, Tree>;

  static int run(Element const* x, Element const* w_up, Element* post, int m, int f, int d,
                 Launch const& launch) {
    return Fused::run(m, f, d, x, w_up, nullptr, post, {{}, {}}, launch);
  }
};

}  // namespace fairway
