// Visitor nodes of our own: sums along the rows of a tile, and the signs of a tile as bits.
//
// A node meets each thread's accumulators once per epilogue piece, as one fragment of 32 values.
#pragma once

#include "gemm.cuh"

namespace fairway {

// What the nodes here have in common: no shared memory, no workspace, nothing for the load warp.
template <class Arguments_>
struct Node {
  struct SharedStorage {};
  using Arguments = Arguments_;
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments,
                                                  void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*,
                                              cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE Node() {}
  CUTLASS_HOST_DEVICE Node(Params const& params_, SharedStorage const&) : params(params_) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  Params params;
};

// A thread's share of an epilogue piece: where its values lie.
//
// wgmma's accumulators: pairs of neighbours, in two rows 8 apart, in groups of 8 columns. A row's
// columns lie in 4 neighbouring lanes; columns 8 apart, as rotary partners are, in one.
template <class V>
struct PieceFragment {
  static constexpr int kColumns = cute::size<1>(typename V::EpilogueTile{});
  static constexpr int kValues =
      cute::size(typename V::EpilogueTile{}) / V::Schedule::kThreads;
  static constexpr int kRows = 2;
  static constexpr int kRowStep = 8;
  static constexpr int kPieceRows = cute::size<0>(typename V::EpilogueTile{});
  static constexpr int kPiecesM = cute::size<0>(typename V::Tile{}) / kPieceRows;
  static constexpr int kTileRows = kPiecesM * kRows;  // of one thread

  CUTLASS_HOST_DEVICE static constexpr int row_of(int i) { return i / 2 % 2; }

  // Columns from the thread's first.
  CUTLASS_HOST_DEVICE static constexpr int column_of(int i) { return i / 4 * 8 + i % 2; }

  // Rows from the thread's first.
  CUTLASS_HOST_DEVICE static constexpr int row_at(int epi_m, int half) {
    return epi_m * kPieceRows + half * kRowStep;
  }

  // The sum of a row's terms over the lanes that share it.
  CUTLASS_DEVICE static float over_lanes(float sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }

  // Whether elements lie as said above, by their coordinates from the thread's first.
  template <class Layout>
  static constexpr bool as_expected(Layout const& coordinates) {
    for (int at = 0; at < int(cute::size(coordinates)); ++at) {
      int const i = at % kValues, piece = at / kValues;
      int const row = row_at(piece % kPiecesM, row_of(i));
      int const column = piece / kPiecesM * kColumns + column_of(i);
      auto const found = coordinates(at);
      if (int(cute::get<0>(found)) != row || int(cute::get<1>(found)) != column) {
        return false;
      }
    }
    return true;
  }
};

// Sums along the rows of a tile, in float32, into sums[m, p] for the p-th tile along N: float32
// [M, ceil(N / columns of a tile)], row major. Columns outside N must add zero, as they do where
// the accumulator or C is a factor: both are zero there.
template <class Sums, class Coordinates, class Left>
struct RowSums {
  static constexpr int kLanesPerRow = 4;  // wgmma spreads a row over four neighbouring lanes

  Sums sums;                // of this thread's rows; columns have stride 0
  Coordinates coordinates;  // of each element, from this thread's first
  Left left;                // rows and columns of the matrix from this thread's first on
  float* first;             // where its first row's sum belongs
  int columns;              // of the result; 0 where the tile lies outside it

  // Zeros for one epilogue piece's terms, by element: those of a row share a register.
  CUTLASS_DEVICE auto piece() const {
    auto terms = cute::make_tensor_like<float>(sums(cute::_, cute::_, cute::_, 0, 0));
    cute::fill(terms, 0.f);
    return terms;
  }

  // Add a piece's terms. The lanes exchange theirs here and not at the end of the tile: additions
  // that nothing waits for the compiler puts off, with all their operands in registers, and spills.
  template <class Terms>
  CUTLASS_DEVICE void add(Terms const& terms, int epi_m, int epi_n) {
    auto from = cute::filter_zeros(terms);
    auto into = cute::filter_zeros(sums(cute::_, cute::_, cute::_, epi_m, epi_n));
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(into); ++i) {
      float sum = from(i);
      CUTLASS_PRAGMA_UNROLL
      for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      }
      into(i) += sum;
    }
  }

  // Write the sums, times a factor.
  CUTLASS_DEVICE void store(float factor) const {
    auto of_rows = cute::filter_zeros(sums);
    auto rows = cute::filter_zeros(coordinates, sums.stride());
    bool const writes = columns > 0 && cutlass::canonical_lane_idx() % kLanesPerRow == 0;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size(of_rows); ++i) {
      int const row = cute::get<0>(rows(i));
      if (writes && row < cute::get<0>(left)) {
        first[int64_t(row) * columns] = factor * of_rows(i);
      }
    }
  }
};

template <bool ReferenceSrc, class Args>
CUTLASS_DEVICE auto make_row_sums(float* target, Args const& args) {
  auto [M, N, K, L] = args.problem_shape_mnkl;
  auto [m, n, k, l] = args.tile_coord_mnkl;
  // A vector along M, seen as a matrix: it lends its layout to the registers and is never read.
  auto vector = cute::make_tensor(cute::make_gmem_ptr(target), cute::make_shape(M, N, L),
                                  cute::Stride<cute::_1, cute::_0, cute::_0>{});
  auto partition = fusion::sm90_partition_for_epilogue<ReferenceSrc>(
      vector, args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile, args.tiled_copy,
      args.thread_idx);
  auto sums = cute::make_tensor_like<float>(partition);
  cute::fill(sums, 0.f);
  int const columns = cute::ceil_div(int(N), int(cute::size<1>(args.tile_shape_mnk)));
  int const row = int(M) - int(cute::get<0>(args.residue_tCcD));
  float* const first = target + int64_t(row) * columns + int(n);
  return RowSums<decltype(sums), decltype(args.tCcD), decltype(args.residue_tCcD)>{
      sums, args.tCcD, args.residue_tCcD, first, int(n) < columns ? columns : 0};
}

struct RowSquaresArguments {
  float* squares;
};

// Hands its input on and sums its squares along the rows.
struct RowSquares : Node<RowSquaresArguments> {
  using Node<RowSquaresArguments>::Node;

  template <class Rows>
  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Rows rows;

    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(Rows rows_) : rows(rows_) {}

    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<Accumulator, N> const&, int epi_v,
                                                  int epi_m, int epi_n,
                                                  cutlass::Array<float, N> const& input) {
      auto terms = rows.piece();
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        terms(epi_v * N + i) += input[i] * input[i];
      }
      rows.add(terms, epi_m, epi_n);
      return input;
    }

    CUTLASS_DEVICE void end() { rows.store(1); }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    auto rows = make_row_sums<ReferenceSrc>(this->params.squares, args);
    return ConsumerStoreCallbacks<decltype(rows)>(rows);
  }
};

// Sign bits of the accumulators, uint32 [tiles along M, tiles along N, threads, 4]: thread t's
// i-th value of the p-th piece of a tile is bit 31 - i of its word p, set where it is negative.
// Only a GEMM with the same tile, epilogue piece and schedule can read them back.
template <class V>
struct Signs {
  static constexpr int kThreads = V::Schedule::kThreads;
  static constexpr int kPiecesM =
      cute::size<0>(typename V::Tile{}) / cute::size<0>(typename V::EpilogueTile{});
  static constexpr int kPiecesN =
      cute::size<1>(typename V::Tile{}) / cute::size<1>(typename V::EpilogueTile{});
  static_assert(cute::size(typename V::EpilogueTile{}) == 32 * kThreads, "a word per piece");
  static_assert(kPiecesM * kPiecesN == 4, "four words, one vector of 16 bytes, per tile");

  CUTLASS_DEVICE static constexpr int word(int epi_m, int epi_n) {
    return epi_n * kPiecesM + epi_m;
  }

  // A thread's four words; null where the tile lies outside the matrix.
  template <class Pointer, class Args>
  CUTLASS_DEVICE static Pointer place(Pointer signs, Args const& args) {
    int64_t const at = tile(args);
    return at < 0 ? nullptr : signs + at * kThreads + args.thread_idx;
  }

  // Number of a tile, or -1 outside the matrix.
  template <class Args>
  CUTLASS_DEVICE static int64_t tile(Args const& args) {
    auto [M, N, K, L] = args.problem_shape_mnkl;
    auto [m, n, k, l] = args.tile_coord_mnkl;
    int const rows = cute::ceil_div(int(M), int(cute::size<0>(args.tile_shape_mnk)));
    int const columns = cute::ceil_div(int(N), int(cute::size<1>(args.tile_shape_mnk)));
    bool const inside = int(m) < rows && int(n) < columns;
    return inside ? int64_t(m) * columns + int(n) : -1;
  }
};

struct StoreSignsArguments {
  uint4* signs;
};

// Hands its input on and stores the accumulators' signs.
template <class V>
struct StoreSigns : Node<StoreSignsArguments> {
  using Node<StoreSignsArguments>::Node;

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    uint4* place;
    uint32_t words[4];

    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(uint4* place_) : place(place_) {}

    template <class Accumulator, class Input, int N>
    CUTLASS_DEVICE cutlass::Array<Input, N> visit(cutlass::Array<Accumulator, N> const& acc, int,
                                                  int epi_m, int epi_n,
                                                  cutlass::Array<Input, N> const& input) {
      static_assert(N == 32, "a word holds one fragment");
      uint32_t word = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        word = __funnelshift_l(__float_as_uint(acc[i]), word, 1);  // one instruction a value
      }
      words[Signs<V>::word(epi_m, epi_n)] = word;
      return input;
    }

    CUTLASS_DEVICE void end() {
      if (place != nullptr) {
        *place = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    return ConsumerStoreCallbacks(Signs<V>::place(this->params.signs, args));
  }
};

struct ActivationBackwardArguments {
  uint4 const* signs;
  float* along;
};

// scale acc act, with act the derivative of LeakyReLU(0.5)(pre)^2 at pre from post and the stored
// signs: 2 sqrt(post) where pre is positive, else -sqrt(post). Sums 2 acc post along the rows. One
// node for both, for both need acc and post. A post below 2^-126 counts as zero.
template <class V>
struct ActivationBackward : Node<ActivationBackwardArguments> {
  using Node<ActivationBackwardArguments>::Node;

  // The load warp runs a tile ahead: it has the tile's signs brought from memory to L2, so that the
  // epilogue, which waits for them before its first value, waits less.
  struct ProducerLoadCallbacks : fusion::detail::EmptyProducerLoadCallbacks {
    uint4 const* signs;
    int64_t tile;  // -1 outside the matrix

    CUTLASS_DEVICE ProducerLoadCallbacks(uint4 const* signs_, int64_t tile_)
        : signs(signs_), tile(tile_) {}

    CUTLASS_DEVICE void begin() {
      if (tile >= 0 && cute::elect_one_sync()) {
        constexpr uint32_t kBytes = Signs<V>::kThreads * sizeof(uint4);
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                         __cvta_generic_to_global(signs + tile * Signs<V>::kThreads)),
                     "r"(kBytes));
      }
    }
  };

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const& args) {
    return ProducerLoadCallbacks(this->params.signs, Signs<V>::tile(args));
  }

  template <class Rows>
  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Rows rows;
    uint4 const* place;
    uint32_t words[4];

    CUTLASS_DEVICE ConsumerStoreCallbacks(Rows rows_, uint4 const* place_)
        : rows(rows_), place(place_) {}

    CUTLASS_DEVICE void begin() {
      uint4 const read = place != nullptr ? __ldg(place) : make_uint4(0, 0, 0, 0);
      words[0] = read.x, words[1] = read.y, words[2] = read.z, words[3] = read.w;
    }

    template <class Accumulator, class Input, int N>
    CUTLASS_DEVICE cutlass::Array<Element, N> visit(cutlass::Array<Accumulator, N> const& acc,
                                                    int epi_v, int epi_m, int epi_n,
                                                    cutlass::Array<float, N> const& scale,
                                                    cutlass::Array<Input, N> const& post) {
      static_assert(N == 32, "a word holds one fragment");
      uint32_t const word = words[Signs<V>::word(epi_m, epi_n)];
      auto terms = rows.piece();
      cutlass::Array<float, N> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        float const p = float(post[i]);
        float root;
        asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(p));
        float const act = (word & (0x80000000u >> i)) ? -root : 2 * root;
        terms(epi_v * N + i) += acc[i] * p;
        out[i] = scale[i] * (acc[i] * act);
      }
      rows.add(terms, epi_m, epi_n);
      return cutlass::NumericArrayConverter<Element, float, N, kRound>{}(out);
    }

    CUTLASS_DEVICE void end() { rows.store(2); }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    auto rows = make_row_sums<ReferenceSrc>(this->params.along, args);
    return ConsumerStoreCallbacks<decltype(rows)>(rows,
                                                  Signs<V>::place(this->params.signs, args));
  }
};

}  // namespace fairway
