// Rows of features as bytes with a scale each, and their product with a panel: what both int8 kernels multiply. The product is exact.
//
// VPDPBUSD takes unsigned bytes times signed ones, so rows are stored with 128 added, and every sum starts at -128 times
// its column's sum of weights, which is packed in front of a panel. Without VNNI rows are stored as words, and sums start at 0.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#include "product.h"

constexpr float LEVELS = 127.5f, TINY = 1.17549435e-38f;

constexpr int64_t PANEL = 32;  // columns of a panel, as operators.py packs them
constexpr int VECTORS = PANEL / LANES;

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Product = Bytes;
using Code = uint8_t;
INLINE void store_codes(Code* to, Ints values) { store_bytes(to, values); }
constexpr Code NOTHING = 128;  // the code of zero
#else
using Product = Words;
using Code = int16_t;
INLINE void store_codes(Code* to, Ints values) { store_words(to, values); }
constexpr Code NOTHING = 0;
#endif

// Bytes of a packed panel for `inner` features: its first sums, then its weights.
INLINE int64_t panel_bytes(int64_t inner) { return PANEL * 4 * (1 + (inner + 3) / 4); }

// Codes from one row to the next: an odd number of cache lines, so that rows fall into different sets. What quantizes a row, or
// the last part of it, writes whole vectors.
INLINE int64_t row_codes(int64_t inner) {
    constexpr int64_t LINE = 64 / sizeof(Code);
    return ((inner + LANES - 1 + LINE - 1) / LINE | 1) * LINE;
}

// What `rows` of `all` rows ask for of the panel behind theirs, so that it has come when they are through; they begin at row `at`.
INLINE Ahead next_panel(const int8_t* panel, int64_t inner, int64_t at, int64_t rows, int64_t all) {
    return {reinterpret_cast<const char*>(panel) + panel_bytes(inner) * (all + at) / all, PANEL * 4 * rows / all};
}

// f(r) for R rows, as constants where a tile's sums stay in registers.
template <int R, class F>
INLINE void each_row(F f) {
#ifdef __AVX512F__
    unrolled<R>(f);
#else
    for (int r = 0; r < R; r++) f(r);
#endif
}

// R rows times a panel: vector v of row r's columns in sums[r * VECTORS + v].
template <int R>
INLINE void multiply_panel(
    const Code* q, int64_t stride, const int8_t* panel, int64_t inner, Ints (&sums)[R * VECTORS], Ahead ahead) {
    constexpr int64_t NEXT = PANEL * 4;  // from one step of a panel to the next; in front of the first are the first sums
    int64_t steps = (inner + 3) / 4;
    stride *= sizeof(Code);
#ifdef __AVX512VNNI__
    unrolled<R * VECTORS>([&](auto i) ALWAYS { sums[i] = load_ints(panel + i % VECTORS * VECTOR); });
    multiply<Bytes, R, VECTORS>(q, stride, panel + NEXT, NEXT, steps, sums, ahead);
#else  // some columns at a time, two vectors of them: there are too few registers for more, or lanes have parts of sums
#pragma GCC unroll 1
    for (int64_t part = 0; part < NEXT; part += 2 * Product::COLUMNS, ahead.data = nullptr) {
        Ints some[R * 2];
#ifdef __AVXVNNI__
        unrolled<R * 2>([&](auto i) ALWAYS { some[i] = load_ints(panel + part + i % 2 * VECTOR); });
        multiply<Bytes, R, 2>(q, stride, panel + NEXT + part, NEXT, steps, some, ahead);
        unrolled<R * 2>([&](auto i) ALWAYS { sums[i / 2 * VECTORS + part / VECTOR + i % 2] = some[i]; });
#else
        unrolled<R * 2>([&](auto i) ALWAYS { some[i] = every(0); });
        multiply<Words, R, 2>(q, stride, panel + NEXT + part, NEXT, steps, some, ahead);
        unrolled<R>([&](auto r) ALWAYS { sums[r * VECTORS + part / VECTOR] = sum_pairs(some[r * 2], some[r * 2 + 1]); });
#endif
    }
#endif
}

// max |x| of n numbers, and no number if one of them is none. Without their signs numbers are integers of the same order.
INLINE float largest(const float* x, int64_t n) {
    Ints most = every(0);
    for (int64_t k = 0; k < n; k += LANES) most = larger(most, magnitude_bits(load(x + k, first_lanes(n - k))));
    return std::bit_cast<float>(largest_lane(most));
}
INLINE float largest(const half* x, int64_t n) {
    Ints most = every(0), pairs = every(0);
    int64_t k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES) pairs = larger_words(pairs, load_ints(x + k) & every_pair(0x7fff7fff7fff7fff));
    for (; k < n; k += LANES) most = larger(most, magnitude_bits(load(x + k, first_lanes(n - k))));
    most = larger(most, larger(low_halves(pairs), pairs & every_pair(0xffff0000ffff0000)));
    return std::bit_cast<float>(largest_lane(most));
}

// What numbers of which none is larger than `most` are multiplied by to become bytes, and what bytes are to become numbers.
struct Scale {
    float most;
    // an ulp less: the largest of a row would be a tie, and becomes 127 on either side, as with torchao's two divisions
    Floats to_bytes() const { return every(std::nextafter(std::min(LEVELS / std::max(most, TINY), FLT_MAX), 0.0f)); }
    float from_bytes() const { return std::max(most, TINY) / LEVELS; }
};

// n numbers as codes, filled up to whole vectors.
template <class T>
INLINE void quantize(const T* x, int64_t n, Floats by, Code* q) {
    for (int64_t k = 0; k < n; k += LANES) store_codes(q + k, rounded(load(x + k, first_lanes(n - k)) * by));
}
