// The gradient at attention's output, through the out-projection and XSA in one product.
//
// ExcludeSelfGemm: of g = go[M,D] @ w[D,N], the gradient at XSA's result, N = H 64:
//   dy[M,N]         = g - (g . u) u, with u the unit vector of the head's own value
//   dv[M,G 64]      = -sum over the heads of a group of (y . u) g + (g . u) y - 2 (y . u)(g . u) u,
//                     divided by the value's length
//   row_sums[B,H,L] = y . dy, dy as rounded, which attention's backward pass asks for
//
// A tile of 128 columns holds the two heads of one group: their sums stay in registers.
#pragma once

#include "heads.cuh"

namespace fairway {

constexpr float kSmallestNorm = 1e-12f;  // as in kernels/reference.py
constexpr int kMembers = 2;              // query heads of a group

// Loads a matrix that is narrower than the result: all pieces of a row of pieces meet the same one.
template <class Load>
struct LoadOfGroup : Load {
  using Load::Load;

  template <class Shape>
  static constexpr auto narrowed(Shape const& shape) {
    return cute::replace<1>(shape, cute::get<1>(shape) / cute::Int<kMembers>{});
  }

  template <class Problem>
  static constexpr typename Load::Params to_underlying_arguments(
      Problem const& problem, typename Load::Arguments const& arguments, void* workspace) {
    return Load::to_underlying_arguments(narrowed(problem), arguments, workspace);
  }

  template <class Callbacks>
  struct ProducerLoadCallbacks : Callbacks {
    CUTLASS_DEVICE explicit ProducerLoadCallbacks(Callbacks const& callbacks)
        : Callbacks(callbacks) {}

    CUTLASS_DEVICE void step(uint64_t* barrier, int epi_m, int, int iteration, bool issue) {
      Callbacks::step(barrier, epi_m, 0, iteration, issue);
    }
  };

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const& args) {
    fusion::detail::ProducerLoadArgs const narrow(
        narrowed(args.problem_shape_mnkl), narrowed(args.tile_shape_mnk), args.tile_coord_mnkl,
        args.tiled_mma, args.epi_tile, args.thread_idx);
    auto callbacks = Load::get_producer_load_callbacks(narrow);
    return ProducerLoadCallbacks<decltype(callbacks)>(callbacks);
  }
};

struct ExcludeSelfArguments {
  Element* dv;
  float* row_sums;
  cutlass::FastDivmod window;  // divides by T
  int query_heads;             // H
  int padded;                  // L, at least T
};

// dy of the accumulators, y and the values; dv and the rows' sums on the way.
template <class V>
struct ExcludeSelf : Node<ExcludeSelfArguments> {
  using Node<ExcludeSelfArguments>::Node;
  using Head = PieceFragment<V>;
  static_assert(Head::kColumns == kHeadSize, "a piece holds one head");
  static_assert(cute::size<1>(typename V::Tile{}) == kMembers * kHeadSize, "a tile is a group");

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    ExcludeSelfArguments const& params;
    int rows;    // M, or 0 past the last head: clusters and bands of tiles reach there
    int row;     // this thread's first
    int column;  // likewise
    // Of a group's first head, and rounded: in float32 they would spill.
    cutlass::Array<Element, Head::kValues> d_unit[Head::kPiecesM];
    float along[Head::kPiecesM][Head::kRows];

    CUTLASS_DEVICE ConsumerStoreCallbacks(ExcludeSelfArguments const& params_, int rows_, int row_,
                                          int column_)
        : params(params_), rows(rows_), row(row_), column(column_) {}

    template <class Accumulator, class Output, int N>
    CUTLASS_DEVICE cutlass::Array<Element, N> visit(cutlass::Array<Accumulator, N> const& g, int,
                                                    int epi_m, int epi_n,
                                                    cutlass::Array<Output, N> const& y,
                                                    cutlass::Array<Element, N> const& v) {
      static_assert(N == Head::kValues, "a fragment holds this thread's share of a head");
      float inverse[Head::kRows], y_unit[Head::kRows], g_unit[Head::kRows];
      cutlass::Array<float, N> rest, terms;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        float vv = 0, yv = 0, gv = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          if (Head::row_of(i) == half) {
            float const value = float(v[i]);
            vv += value * value;
            yv += float(y[i]) * value;
            gv += g[i] * value;
          }
        }
        float const length = sqrtf(Head::over_lanes(vv));
        inverse[half] = 1 / fmaxf(length, kSmallestNorm);
        y_unit[half] = Head::over_lanes(yv) * inverse[half];
        g_unit[half] = Head::over_lanes(gv) * inverse[half];
        float const own = g_unit[half] * inverse[half];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
          if (Head::row_of(i) == half) {
            rest[i] = g[i] - own * float(v[i]);
            terms[i] = y_unit[half] * g[i] + g_unit[half] * float(y[i]);
          }
        }
        // The length of a vector shorter than kSmallestNorm has no gradient.
        float const term = length > kSmallestNorm ? 2 * y_unit[half] * g_unit[half] : 0.f;
        along[epi_m][half] = epi_n == 0 ? term : along[epi_m][half] + term;
      }
      cutlass::NumericArrayConverter<Element, float, N, kRound> const rounded;
      if (epi_n == 0) {
        d_unit[epi_m] = rounded(terms);
      }
      auto const dy = rounded(rest);
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        int const at = row + Head::row_at(epi_m, half);
        store_row_sum(at, epi_n, half, y, dy);
        if (epi_n == kMembers - 1) {
          store_value(at, epi_m, half, inverse[half], v, terms);
        }
      }
      return dy;
    }

    template <class Output>
    CUTLASS_DEVICE void store_row_sum(int at, int epi_n, int half,
                                      cutlass::Array<Output, Head::kValues> const& y,
                                      cutlass::Array<Element, Head::kValues> const& dy) const {
      float sum = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Head::kValues; ++i) {
        if (Head::row_of(i) == half) {
          sum += float(y[i]) * float(dy[i]);
        }
      }
      sum = Head::over_lanes(sum);
      if (column % kHeadSize == 0 && at < rows) {
        int const window = params.window.div(at);
        int const head = column / kHeadSize + epi_n;
        int64_t const line = int64_t(window) * params.query_heads + head;
        params.row_sums[line * params.padded + at - window * params.window.divisor] = sum;
      }
    }

    CUTLASS_DEVICE void store_value(int at, int epi_m, int half, float inverse,
                                    cutlass::Array<Element, Head::kValues> const& v,
                                    cutlass::Array<float, Head::kValues> const& terms) const {
      int const width = params.query_heads / kMembers * kHeadSize;
      int const first = column / (kMembers * kHeadSize) * kHeadSize + column % kHeadSize;
      Element* const to = params.dv + int64_t(at) * width + first;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Head::kValues; i += 2) {
        if (Head::row_of(i) != half) {
          continue;
        }
        cutlass::Array<float, 2> pair;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          float const unit = inverse * float(v[i + j]);
          float const sum = float(d_unit[epi_m][i + j]) + terms[i + j];
          pair[j] = inverse * (along[epi_m][half] * unit - sum);
        }
        if (at < rows) {
          *reinterpret_cast<cutlass::Array<Element, 2>*>(to + Head::column_of(i)) =
              cutlass::NumericArrayConverter<Element, float, 2, kRound>{}(pair);
        }
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    static_assert(Head::as_expected(decltype(args.tCcD.layout()){}), "another order of elements");
    auto [M, N, K, L] = args.problem_shape_mnkl;
    int const column = int(N) - int(cute::get<1>(args.residue_tCcD));
    return ConsumerStoreCallbacks(this->params, column < int(N) ? int(M) : 0,
                                  int(M) - int(cute::get<0>(args.residue_tCcD)), column);
  }
};

template <class V>
struct ExcludeSelfGemm {
  using Values = AuxLoad<V, Element>;
  using Tree = fusion::Sm90EVT<ExcludeSelf<V>, fusion::Sm90SrcFetch<Element>,
                               LoadOfGroup<typename Values::Node>>;
  using Fused = FusedGemm<V, RowMajor, Element, Tree>;

  // The values are columns of the joint heads, `heads`[M, (H + 2 G) 64].
  static int run(Element const* go, Element const* w, Element const* y, Element const* heads,
                 Element* dy, ExcludeSelfArguments const& more, int m, int d,
                 Launch const& launch) {
    int const kv_heads = more.query_heads / kMembers;
    int const joint = (more.query_heads + 2 * kv_heads) * kHeadSize;
    Element const* const values = heads + (more.query_heads + kv_heads) * kHeadSize;
    typename Fused::TreeArguments tree{{}, Values::arguments(values, m, joint), more};
    return Fused::run(m, more.query_heads * kHeadSize, d, go, w, y, dy, tree, launch);
  }
};

}  // namespace fairway
