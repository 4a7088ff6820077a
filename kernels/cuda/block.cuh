// Four GEMMs of a transformer block whose epilogues take over passes beside them.
//
// LinearAddGemm:    out[M,N] = residual + x[M,K] @ w[N,K]^T, and the squares of each row of out
// UpScaledGemm:     post[M,F] = LeakyReLU(0.5)(pre)^2 of pre = scale[m] (x[M,D] @ w_up[F,D]^T),
//                   and the signs of pre
// DpreScaledGemm:   dpre[M,F] = scale[m] acc act of acc = go[M,D] @ w_down[D,F] and act from post
//                   and the signs, and 2 acc post summed along each row
// NormGradientGemm: dt[M,D] = go + dpre[M,F] @ w_up[F,D] - factor[m] t
//
// Sums along rows stay partial, one a tile along N: added up by whoever reads them.
#pragma once

#include "nodes.cuh"

namespace fairway {

// A float32 factor per row.
template <class V>
using RowFactor = fusion::Sm90ColBroadcast<0, typename V::Tile, float, float,
                                           cute::Stride<cute::_1, cute::_0, cute::_0>,
                                           kAlignment / 2, /*EnableNullptr=*/false>;

template <template <class> class Function, class Out>
using Compute = fusion::Sm90Compute<Function, Out, float, kRound>;

template <class V>
struct LinearAddGemm {
  using Sum = fusion::Sm90EVT<Compute<cutlass::plus, float>, fusion::Sm90AccFetch,
                              fusion::Sm90SrcFetch<Element>>;
  using Tree = fusion::Sm90EVT<RowSquares, Sum>;
  using Fused = FusedGemm<V, ColumnMajor, Element, Tree>;

  static int run(Element const* x, Element const* w, Element const* residual, Element* out,
                 float* squares, int m, int n, int k, Launch const& launch) {
    typename Fused::TreeArguments tree{{{}, {}, {}}, {squares}};
    return Fused::run(m, n, k, x, w, residual, out, tree, launch);
  }
};

template <class V>
struct UpScaledGemm {
  using Pre =
      fusion::Sm90EVT<Compute<cutlass::multiplies, float>, RowFactor<V>, fusion::Sm90AccFetch>;
  using Post = fusion::Sm90EVT<Compute<SquaredLeakyRelu, Element>, Pre>;
  using Tree = fusion::Sm90EVT<StoreSigns<V>, Post>;  // scale > 0: acc has the sign of pre
  using Fused = FusedGemm<V, ColumnMajor, void, Tree>;

  static int run(Element const* x, Element const* w_up, float const* scale, Element* post,
                 uint4* signs, int m, int f, int d, Launch const& launch) {
    typename Fused::TreeArguments tree{{{{scale}, {}, {}}, {}}, {signs}};
    return Fused::run(m, f, d, x, w_up, nullptr, post, tree, launch);
  }
};

template <class V>
struct DpreScaledGemm {
  using Tree =
      fusion::Sm90EVT<ActivationBackward<V>, RowFactorStaged<V>, fusion::Sm90SrcFetch<Element>>;
  using Fused = FusedGemm<V, RowMajor, Element, Tree>;

  static int run(Element const* go, Element const* w_down, Element const* post, uint4 const* signs,
                 float const* scale, Element* dpre, float* along, int m, int f, int d,
                 Launch const& launch) {
    typename Fused::TreeArguments tree{{scale}, {}, {signs, along}};
    return Fused::run(m, f, d, go, w_down, post, dpre, tree, launch);
  }
};

// c - factor t.
template <class T>
struct TakeScaled {
  CUTLASS_HOST_DEVICE T operator()(T const& factor, T const& t, T const& c) const {
    return c - factor * t;
  }
};

template <class T, int N>
struct TakeScaled<cutlass::Array<T, N>> {
  CUTLASS_HOST_DEVICE cutlass::Array<T, N> operator()(cutlass::Array<T, N> const& factor,
                                                      cutlass::Array<T, N> const& t,
                                                      cutlass::Array<T, N> const& c) const {
    cutlass::Array<T, N> out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      out[i] = TakeScaled<T>{}(factor[i], t[i], c[i]);
    }
    return out;
  }
};

template <class V>
struct NormGradientGemm {
  using Rows = AuxLoad<V, Element>;
  using Sum = fusion::Sm90EVT<Compute<cutlass::plus, float>, fusion::Sm90AccFetch,
                              fusion::Sm90SrcFetch<Element>>;
  using Tree =
      fusion::Sm90EVT<Compute<TakeScaled, Element>, RowFactor<V>, typename Rows::Node, Sum>;
  using Fused = FusedGemm<V, RowMajor, Element, Tree>;

  static int run(Element const* dpre, Element const* w_up, Element const* go, Element const* t,
                 float const* factor, Element* dt, int m, int d, int f, Launch const& launch) {
    typename Fused::TreeArguments tree{{factor}, Rows::arguments(t, m, d), {{}, {}, {}}, {}};
    return Fused::run(m, d, f, dpre, w_up, go, dt, tree, launch);
  }
};

}  // namespace fairway
