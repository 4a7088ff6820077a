// The gradient at attention's output, through the out-projection and XSA in one product.
//
// ExcludeSelfGemm: of g = go[M,D] @ w[D,N], the gradient at XSA's result, N = H 64. That result is
// rest = y - own v, of attention's output y, each head's own value v and own = (y . v) / |v|^2.
// With c = (g . v) / |v|^2:
//   dy[M,N]         = g - c v
//   dv[M,G 64]      = -sum over the heads of a group of own dy + c rest
//   row_sums[B,H,L] = y . dy, dy as rounded, which attention's backward pass asks for
//
// y is not read: it is rest + own v. A tile of 128 columns holds the two heads of one group: their
// sums stay in registers.
#pragma once

#include "heads.cuh"

namespace fairway {

constexpr float kSmallestNorm = 1e-12f;  // as in kernels/reference.py
constexpr float kSmallestSquare = kSmallestNorm * kSmallestNorm;
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
  float const* own;  // [B, H, L]
  Element* dv;
  float* row_sums;             // [B, H, L]
  cutlass::FastDivmod window;  // divides by T
  int query_heads;             // H
  int padded;                  // L, at least T

  // Where a row's number of a head lies in [B, H, L].
  CUTLASS_DEVICE int place(int row, int head) const {
    int const in = window.div(row);
    return (in * query_heads + head) * padded + row - in * window.divisor;
  }
};

// dy of the accumulators, rest and the values; dv and the rows' sums on the way.
template <class V>
struct ExcludeSelf : Node<ExcludeSelfArguments> {
  using Node<ExcludeSelfArguments>::Node;
  using Head = PieceFragment<V>;
  using Loaded = cutlass::Array<Element, Head::kValues>;
  using Pair = cutlass::Array<Element, 2>;
  static_assert(Head::kColumns == kHeadSize, "a piece holds one head");
  static_assert(cute::size<1>(typename V::Tile{}) == kMembers * kHeadSize, "a tile is a group");

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    ExcludeSelfArguments const& params;
    int rows;                        // M, or 0 past the last head: clusters and bands reach there
    int row;                         // this thread's first
    int column;                      // likewise
    int places[Head::kTileRows];     // in [B, H, L], of the first head; -1 past the last row
    float own[Head::kRows];          // of a piece's rows
    float inverse[Head::kTileRows];  // of the squared length of a row's value
    float slack[Head::kTileRows];    // where that is shorter than kSmallestNorm, else 0
    // Terms of dv of a group's first head, and rounded: in float32 they would spill.
    Pair first[Head::kPiecesM][Head::kValues / 2];

    CUTLASS_DEVICE ConsumerStoreCallbacks(ExcludeSelfArguments const& params_, int rows_, int row_,
                                          int column_)
        : params(params_), rows(rows_), row(row_), column(column_) {}

    CUTLASS_DEVICE static constexpr int tile_row(int epi_m, int half) {
      return epi_m * Head::kRows + half;
    }

    CUTLASS_DEVICE void begin() {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Head::kTileRows; ++i) {
        int const at = row + Head::row_at(i / Head::kRows, i % Head::kRows);
        places[i] = at < rows ? params.place(at, column / kHeadSize) : -1;
      }
    }

    // Ahead of the wait for a piece of rest.
    CUTLASS_DEVICE void begin_loop(int epi_m, int epi_n) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        int const at = places[tile_row(epi_m, half)];
        own[half] = at >= 0 ? __ldg(params.own + at + epi_n * params.padded) : 0.f;
      }
    }

    template <class Accumulator, int N>
    CUTLASS_DEVICE Loaded visit(cutlass::Array<Accumulator, N> const& g, int, int epi_m, int epi_n,
                                Loaded const& rest, Loaded const& v) {
      Loaded dy;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        visit_row(dy, g, rest, v, epi_m, epi_n, half);
      }
      return dy;
    }

    // One of a piece's rows. What it gives is rounded pair by pair: in float32 all would spill.
    template <class Accumulator, int N>
    CUTLASS_DEVICE void visit_row(Loaded& dy, cutlass::Array<Accumulator, N> const& g,
                                  Loaded const& rest, Loaded const& v, int epi_m, int epi_n,
                                  int half) {
      static_assert(N == Head::kValues, "a fragment holds this thread's share of a head");
      int const of_tile = tile_row(epi_m, half);
      float const share = own[half];
      float vv = 0, gv = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        if (Head::row_of(i) == half) {
          float const value = float(v[i]);
          gv += g[i] * value;
          if (epi_n == 0) {
            vv += value * value;
          }
        }
      }
      if (epi_n == 0) {
        vv = Head::over_lanes(vv);
        // Exactly: with a quicker reciprocal the compiler mixes a piece's rows, and spills.
        inverse[of_tile] = 1 / fmaxf(vv, kSmallestSquare);
      }
      float const c = Head::over_lanes(gv) * inverse[of_tile];
      // The length of a vector shorter than kSmallestNorm has no gradient.
      float const term = inverse[of_tile] < 1 / kSmallestSquare ? 0.f : 2 * c * share;
      slack[of_tile] = epi_n == 0 ? term : slack[of_tile] + term;
      if (epi_n + 1 == kMembers && __any_sync(0xffffffffu, slack[of_tile] != 0)) {  // hardly ever
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; i += 2) {
          if (Head::row_of(i) == half) {
            Pair& kept = first[epi_m][i / 2];
            cutlass::Array<float, 2> more;
            more[0] = float(kept[0]) - slack[of_tile] * float(v[i]);
            more[1] = float(kept[1]) - slack[of_tile] * float(v[i + 1]);
            kept = round(more);
          }
        }
      }
      Element* const to = value_row(row + Head::row_at(epi_m, half));
      bool const inside = places[of_tile] >= 0;
      float row_sum = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; i += 2) {
        if (Head::row_of(i) != half) {
          continue;
        }
        Pair& kept = first[epi_m][i / 2];
        cutlass::Array<float, 2> gradient, terms;
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          float const value = float(v[i + j]);
          gradient[j] = g[i + j] - c * value;
          float const before = epi_n == 0 ? 0.f : float(kept[j]);
          terms[j] = before - c * float(rest[i + j]) - share * gradient[j];
        }
        Pair const rounded = round(gradient);
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          dy[i + j] = rounded[j];
          row_sum += (float(rest[i + j]) + share * float(v[i + j])) * float(rounded[j]);
        }
        if (epi_n + 1 < kMembers) {
          kept = round(terms);
        } else if (inside) {
          *reinterpret_cast<Pair*>(to + Head::column_of(i)) = round(terms);
        }
      }
      row_sum = Head::over_lanes(row_sum);
      if (inside && column % kHeadSize == 0) {
        params.row_sums[places[of_tile] + epi_n * params.padded] = row_sum;
      }
    }

    // A row of dv, from this thread's first column on.
    CUTLASS_DEVICE Element* value_row(int at) const {
      int const width = params.query_heads / kMembers * kHeadSize;
      int const first_column = column / (kMembers * kHeadSize) * kHeadSize + column % kHeadSize;
      return params.dv + int64_t(at) * width + first_column;
    }

    CUTLASS_DEVICE static Pair round(cutlass::Array<float, 2> const& pair) {
      return cutlass::NumericArrayConverter<Element, float, 2, kRound>{}(pair);
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
  static int run(Element const* go, Element const* w, Element const* rest,
                 Element const* heads, Element* dy, ExcludeSelfArguments const& more, int m, int d,
                 Launch const& launch) {
    int const kv_heads = more.query_heads / kMembers;
    int const joint = (more.query_heads + 2 * kv_heads) * kHeadSize;
    Element const* const values = heads + (more.query_heads + kv_heads) * kHeadSize;
    typename Fused::TreeArguments tree{{}, Values::arguments(values, m, joint), more};
    return Fused::run(m, more.query_heads * kHeadSize, d, go, w, rest, dy, tree, launch);
  }
};

}  // namespace fairway
