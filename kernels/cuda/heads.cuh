// The joint projection of queries, keys and values, with what every head of it still needs.
//
// HeadsGemm: heads[M,W] of x = factor[m] (rows[M,D] @ w[W,D]^T), W = (H + 2 G) 64: for H query
// and G key heads rotary(x / rms(x)), times gain[h] for queries, then G value heads x + value_embed;
// and inverse[H + G, M], the 1 / rms(x) of each head that has one, for the backward pass.
//
// One epilogue piece is as wide as one head, so a thread's fragment is its share of one head.
#pragma once

#include <limits>

#include "cutlass/fast_math.h"
#include "nodes.cuh"

namespace fairway {

constexpr int kHeadSize = 64;
constexpr int kHalf = 8;  // dims 0..7 of a head turn against dims 8..15

struct FinishHeadsArguments {
  float const* factor;         // [M]
  Element const* value_embed;  // [M, G 64], or null
  float const* gain;           // [H]
  float const* cos;            // [T, 8]
  float const* sin;            // [T, 8]
  float* inverse;              // [H + G, M]
  cutlass::FastDivmod window;  // divides by T
  int query_heads;             // H
  int kv_heads;                // G
};

// Norm, rotary and gain of a head's accumulators, or the value embedding's addition.
template <class V>
struct FinishHeads : Node<FinishHeadsArguments> {
  using Node<FinishHeadsArguments>::Node;

  using Head = PieceFragment<V>;
  static_assert(Head::kColumns == kHeadSize, "a piece holds one head");

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    FinishHeadsArguments const& params;
    int rows;    // M
    int row;     // this thread's first
    int column;  // likewise
    float factor[Head::kTileRows];
    float2 cos[Head::kTileRows];  // of this thread's two columns in every group of 8
    float2 sin[Head::kTileRows];

    CUTLASS_DEVICE ConsumerStoreCallbacks(FinishHeadsArguments const& params_, int rows_, int row_,
                                          int column_)
        : params(params_), rows(rows_), row(row_), column(column_) {}

    CUTLASS_DEVICE int row_at(int epi_m, int half) const { return row + Head::row_at(epi_m, half); }

    // All that a tile's rows need, in one go: the loads wait together.
    CUTLASS_DEVICE void begin() {
      CUTLASS_PRAGMA_UNROLL
      for (int r = 0; r < Head::kTileRows; ++r) {
        // Rows past the last are computed like it and never stored.
        int const known = cute::min(row_at(r / Head::kRows, r % Head::kRows), rows - 1);
        int const position = known - params.window.div(known) * params.window.divisor;
        int const at = position * kHalf + column % kHalf;
        factor[r] = __ldg(params.factor + known);
        cos[r] = __ldg(reinterpret_cast<float2 const*>(params.cos + at));
        sin[r] = __ldg(reinterpret_cast<float2 const*>(params.sin + at));
      }
    }

    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<Element, N> visit(cutlass::Array<Accumulator, N> const&, int,
                                                    int epi_m, int epi_n,
                                                    cutlass::Array<float, N> const& acc) {
      static_assert(N == Head::kValues, "a fragment holds this thread's share of a head");
      int const head = column / kHeadSize + epi_n;
      cutlass::Array<float, N> out;
      if (head < params.query_heads + params.kv_heads) {
        turn(out, acc, head, epi_m);
      } else {
        add_embedding(out, acc, head - params.query_heads - params.kv_heads, epi_m);
      }
      return cutlass::NumericArrayConverter<Element, float, N, kRound>{}(out);
    }

    CUTLASS_DEVICE void turn(cutlass::Array<float, Head::kValues>& out,
                             cutlass::Array<float, Head::kValues> const& acc, int head, int epi_m) {
      float const gain = head < params.query_heads ? __ldg(params.gain + head) : 1.f;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        int const r = epi_m * Head::kRows + half;
        float sum = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Head::kValues; ++i) {
          if (Head::row_of(i) == half) {
            sum += acc[i] * acc[i];
          }
        }
        float const mean = factor[r] * factor[r] * Head::over_lanes(sum) / kHeadSize;
        float const inverse = rsqrtf(mean + std::numeric_limits<float>::epsilon());
        int const at = row_at(epi_m, half);
        if (column % kHeadSize == 0 && at < rows) {
          params.inverse[int64_t(head) * rows + at] = inverse;
        }
        float const scale = gain * inverse * factor[r];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < Head::kValues; ++i) {
          if (Head::row_of(i) != half) {
            continue;
          }
          float const c = i % 2 ? cos[r].y : cos[r].x;
          float const s = i % 2 ? sin[r].y : sin[r].x;
          float turned = acc[i];
          if (i / 4 == 0) {
            turned = acc[i] * c + acc[i + 4] * s;
          } else if (i / 4 == 1) {
            turned = acc[i] * c - acc[i - 4] * s;
          }
          out[i] = scale * turned;
        }
      }
    }

    CUTLASS_DEVICE void add_embedding(cutlass::Array<float, Head::kValues>& out,
                                      cutlass::Array<float, Head::kValues> const& acc, int head,
                                      int epi_m) {
      bool const reads = params.value_embed != nullptr && head < params.kv_heads;
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < Head::kRows; ++half) {
        int const r = epi_m * Head::kRows + half;
        int64_t const known = cute::min(row_at(epi_m, half), rows - 1);
        Element const* const embed = params.value_embed +
                                     (known * params.kv_heads + head) * kHeadSize +
                                     column % kHeadSize;
        CUTLASS_PRAGMA_UNROLL
        for (int group = 0; group < 8; ++group) {
          uint32_t const pair = reads ? __ldg(reinterpret_cast<uint32_t const*>(embed + 8 * group))
                                      : 0u;
          int const i = group * 4 + half * 2;
          out[i] = factor[r] * acc[i] + __uint_as_float(pair << 16);
          out[i + 1] = factor[r] * acc[i + 1] + __uint_as_float(pair & 0xffff0000u);
        }
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    static_assert(Head::as_expected(decltype(args.tCcD.layout()){}), "another order of elements");
    auto [M, N, K, L] = args.problem_shape_mnkl;
    return ConsumerStoreCallbacks(this->params, int(M),
                                  int(M) - int(cute::get<0>(args.residue_tCcD)),
                                  int(N) - int(cute::get<1>(args.residue_tCcD)));
  }
};

template <class V>
struct HeadsGemm {
  using Tree = fusion::Sm90EVT<FinishHeads<V>, fusion::Sm90AccFetch>;
  using Fused = FusedGemm<V, ColumnMajor, void, Tree>;

  static int run(Element const* rows, Element const* w, FinishHeadsArguments const& finish,
                 Element* heads, int m, int d, Launch const& launch) {
    int const columns = (finish.query_heads + 2 * finish.kv_heads) * kHeadSize;
    typename Fused::TreeArguments tree{{}, finish};
    return Fused::run(m, columns, d, rows, w, nullptr, heads, tree, launch);
  }
};

}  // namespace fairway
