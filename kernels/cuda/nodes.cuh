// Visitor nodes of our own: factors of the rows of a tile, sums along them, and its signs as bits.
//
// A node meets each thread's accumulators once per epilogue piece, as one fragment of 32 values.
#pragma once

#include "gemm.cuh"

namespace fairway {

// What the nodes here have in common: by default no shared memory and nothing for the load warp.
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

// Brings `bytes` for a whole tile to shared memory, with the tile's first piece of C: whoever waits
// for that finds them there. One buffer will do, for what is brought is read with that piece, and the
// load warp meets the next tile's first piece only once this one's place is free again.
template <class V>
struct WithFirstPiece : fusion::detail::EmptyProducerLoadCallbacks {
  static_assert(V::kLoads <= kPiecesOf<V>, "the load warp would be a tile ahead");
  void const* from;
  int bytes;  // a multiple of 16; nothing if not positive
  void* to;

  CUTLASS_DEVICE WithFirstPiece(void const* from_, int bytes_, void* to_)
      : from(from_), bytes(bytes_), to(to_) {}

  CUTLASS_DEVICE void step(uint64_t* barrier, int epi_m, int epi_n, int, bool issue) {
    if (epi_m == 0 && epi_n == 0 && issue && bytes > 0) {
      cutlass::arch::ClusterTransactionBarrier::expect_transaction(barrier, bytes);
      cute::SM90_BULK_COPY_G2S::copy(from, barrier, to, bytes);
    }
  }
};

struct RowsArguments {
  float const* factors;  // [M]
};

// A float32 factor per row, as CUTLASS's Sm90ColBroadcast gives it, without its wait for L2 at the
// start of a tile: for trees with a load warp.
template <class V>
struct RowFactorStaged : Node<RowsArguments> {
  using Piece = PieceFragment<V>;
  static constexpr int kRows = cute::size<0>(typename V::Tile{});
  static constexpr int kVector = 16 / sizeof(float);
  struct SharedStorage {
    alignas(16) float factors[kRows];
  };

  CUTLASS_HOST_DEVICE RowFactorStaged() {}
  CUTLASS_HOST_DEVICE RowFactorStaged(RowsArguments const& params_, SharedStorage const& storage)
      : Node<RowsArguments>(params_, {}), staged(const_cast<float*>(storage.factors)) {}

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const& args) {
    int const first = int(cute::get<0>(args.tile_coord_mnkl)) * kRows;
    int const rows = cute::min(int(cute::get<0>(args.problem_shape_mnkl)) - first, int(kRows));
    int const bytes = rows / kVector * kVector * int(sizeof(float));
    return WithFirstPiece<V>(this->params.factors + first, bytes, staged);
  }

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    float const* staged;
    float const* factors;
    int row;   // this thread's first
    int rows;  // M
    float found[Piece::kTileRows];

    CUTLASS_DEVICE ConsumerStoreCallbacks(float const* staged_, float const* factors_, int row_,
                                          int rows_)
        : staged(staged_), factors(factors_), row(row_), rows(rows_) {}

    CUTLASS_DEVICE void previsit(int epi_m, int epi_n, int, bool) {
      if (epi_m != 0 || epi_n != 0) {
        return;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Piece::kTileRows; ++i) {
        int const at = row + Piece::row_at(i / Piece::kRows, i % Piece::kRows);
        // The last rows, fewer than the copy can bring, are read where they lie.
        bool const copied = at < rows / kVector * kVector;
        found[i] = copied ? staged[at % kRows] : at < rows ? __ldg(factors + at) : 0.f;
      }
    }

    template <class Accumulator, int N>
    CUTLASS_DEVICE cutlass::Array<float, N> visit(cutlass::Array<Accumulator, N> const&, int,
                                                  int epi_m, int) {
      static_assert(N == Piece::kValues, "a fragment holds this thread's share of a piece");
      cutlass::Array<float, N> out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < N; ++i) {
        out[i] = found[epi_m * Piece::kRows + Piece::row_of(i)];
      }
      return out;
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(
      fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    static_assert(Piece::as_expected(decltype(args.tCcD.layout()){}), "another order of elements");
    int const rows = int(cute::get<0>(args.problem_shape_mnkl));
    return ConsumerStoreCallbacks(staged, this->params.factors,
                                  rows - int(cute::get<0>(args.residue_tCcD)), rows);
  }

  float* staged;
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
  struct SharedStorage {
    alignas(16) uint4 signs[Signs<V>::kThreads];
  };

  CUTLASS_HOST_DEVICE ActivationBackward() {}
  CUTLASS_HOST_DEVICE ActivationBackward(ActivationBackwardArguments const& params_,
                                         SharedStorage const& storage)
      : Node<ActivationBackwardArguments>(params_, {}),
        staged(const_cast<uint4*>(storage.signs)) {}

  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(
      fusion::detail::ProducerLoadArgs<Args...> const& args) {
    int64_t const tile = Signs<V>::tile(args);
    constexpr int kBytes = sizeof(SharedStorage);
    uint4 const* const from = this->params.signs + tile * Signs<V>::kThreads;
    return WithFirstPiece<V>(from, tile < 0 ? 0 : kBytes, staged);
  }

  template <class Rows>
  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Rows rows;
    uint4 const* signs;  // of this thread
    uint32_t words[4];

    CUTLASS_DEVICE ConsumerStoreCallbacks(Rows rows_, uint4 const* signs_)
        : rows(rows_), signs(signs_) {}

    CUTLASS_DEVICE void previsit(int epi_m, int epi_n, int, bool) {
      if (epi_m == 0 && epi_n == 0) {
        words[0] = signs->x, words[1] = signs->y, words[2] = signs->z, words[3] = signs->w;
      }
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
        float const slope = (word & (0x80000000u >> i)) ? -scale[i] : 2 * scale[i];
        terms(epi_v * N + i) += acc[i] * p;
        out[i] = slope * (acc[i] * root);
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
    return ConsumerStoreCallbacks<decltype(rows)>(rows, staged + args.thread_idx);
  }

  uint4* staged;
};

}  // namespace fairway
