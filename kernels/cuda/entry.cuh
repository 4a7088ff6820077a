// The product that ends a block, with the entry of the next one in its epilogue.
//
// EntryGemm: x[M,N] = residual + y[M,K] @ w[N,K]^T
//            u[M,N] = a[n] (x + weight[n] skip) + b[n] x0, and the squares of each row of u
//
// Without kSkip there is no skip. The products' sums are rounded for x, not for u.
#pragma once

#include "block.cuh"

namespace fairway {

struct EnterArguments {
  float const* a;       // [N]
  float const* b;       // [N]
  float const* weight;  // [N], or null
};

template <class V>
struct Enter : Node<EnterArguments> {
  using Node<EnterArguments>::Node;
  using Piece = PieceFragment<V>;
  using Values = cutlass::Array<float, Piece::kValues>;
  using Loaded = cutlass::Array<Element, Piece::kValues>;

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    EnterArguments const& params;
    int columns;  // N
    int column;   // this thread's first

    CUTLASS_DEVICE ConsumerStoreCallbacks(EnterArguments const& params_, int columns_, int column_)
        : params(params_), columns(columns_), column(column_) {}

    // A channel's factor for two neighbours; N is a multiple of 8, so that both are there or none.
    CUTLASS_DEVICE float2 pair(float const* channels, int i, int epi_n) const {
      int const at = column + epi_n * Piece::kColumns + Piece::column_of(i);
      return at < columns ? __ldg(reinterpret_cast<float2 const*>(channels + at)) : float2{0, 0};
    }

    CUTLASS_DEVICE Values mix(Values const& x, Loaded const& x0, int epi_n) const {
      Values u;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Piece::kValues; i += 2) {
        float2 const a = pair(params.a, i, epi_n), b = pair(params.b, i, epi_n);
        u[i] = a.x * x[i] + b.x * float(x0[i]);
        u[i + 1] = a.y * x[i + 1] + b.y * float(x0[i + 1]);
      }
      return u;
    }

    template <class Accumulator, int N>
    CUTLASS_DEVICE Values visit(cutlass::Array<Accumulator, N> const&, int, int, int epi_n,
                                Values const& x, Loaded const& x0) const {
      return mix(x, x0, epi_n);
    }

    template <class Accumulator, int N>
    CUTLASS_DEVICE Values visit(cutlass::Array<Accumulator, N> const&, int, int, int epi_n,
                                Values const& x, Loaded const& x0, Loaded const& skip) const {
      Values joined;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; i += 2) {
        float2 const weight = pair(params.weight, i, epi_n);
        joined[i] = x[i] + weight.x * float(skip[i]);
        joined[i + 1] = x[i + 1] + weight.y * float(skip[i + 1]);
      }
      return mix(joined, x0, epi_n);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    static_assert(Piece::as_expected(decltype(args.tCcD.layout()){}), "another order of elements");
    auto [M, N, K, L] = args.problem_shape_mnkl;
    return ConsumerStoreCallbacks(this->params, int(N),
                                  int(N) - int(cute::get<1>(args.residue_tCcD)));
  }
};

template <class V, bool kSkip>
struct EntryGemm {
  using Rows = AuxLoad<V, Element>;
  using StoreX = AuxStore<V, Element>;
  using X = fusion::Sm90EVT<
      typename StoreX::Node, fusion::Sm90EVT<Compute<cutlass::plus, float>, fusion::Sm90AccFetch,
                                             fusion::Sm90SrcFetch<Element>>>;
  using U = cute::conditional_t<
      kSkip, fusion::Sm90EVT<Enter<V>, X, typename Rows::Node, typename Rows::Node>,
      fusion::Sm90EVT<Enter<V>, X, typename Rows::Node>>;
  using Tree = fusion::Sm90EVT<RowSquares, U>;
  using Fused = FusedGemm<V, ColumnMajor, Element, Tree>;

  static int run(Element const* y, Element const* w, Element const* residual, Element const* x0,
                 Element const* skip, EnterArguments const& enter, Element* x, Element* u,
                 float* squares, int m, int n, int k, Launch const& launch) {
    typename Fused::TreeArguments tree = [&]() -> typename Fused::TreeArguments {
      auto const stored = StoreX::arguments(x, m, n);
      auto const start = Rows::arguments(x0, m, n);
      if constexpr (kSkip) {
        return {{{{{}, {}, {}}, stored}, start, Rows::arguments(skip, m, n), enter}, {squares}};
      } else {
        return {{{{{}, {}, {}}, stored}, start, enter}, {squares}};
      }
    }();
    return Fused::run(m, n, k, y, w, residual, u, tree, launch);
  }
};

}  // namespace fairway
