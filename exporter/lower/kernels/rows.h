// Rows of features as bytes with a scale each: what both int8 kernels multiply.
//
// VPDPBUSD takes unsigned bytes times signed ones, so rows are stored with 128 added, and every sum starts at -128 times
// its column's sum of weights, which is packed in front of a panel. The product is exact.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "product.h"

constexpr float LEVELS = 127.5f, TINY = 1.17549435e-38f;

constexpr int VECTORS = 2;
constexpr int64_t PANEL = VECTORS * LANES;  // columns of a panel

// Bytes of a packed panel for `inner` features: its first sums, then its weights.
INLINE int64_t panel_bytes(int64_t inner) { return PANEL * 4 * (1 + (inner + 3) / 4); }

// Bytes from one row to the next: an odd number of cache lines, so that rows fall into different sets.
INLINE int64_t row_bytes(int64_t inner) { return ((inner + 63) / 64 * 64) | 64; }

// What `rows` of `all` rows ask for of the panel behind theirs, so that it has come when they are through; they begin at row `at`.
INLINE Ahead next_panel(const int8_t* panel, int64_t inner, int64_t at, int64_t rows, int64_t all) {
    return {reinterpret_cast<const char*>(panel) + panel_bytes(inner) * (all + at) / all, PANEL * 4 * rows / all};
}

// A row given by `vectors(f)`, which calls f(values, first feature) for every 16 features, twice: as bytes plus 128, filled up
// to a multiple of 16. Returns a / 127.5, with a = max |x|.
template <class Vectors>
INLINE float quantized(Vectors vectors, uint8_t* q) {
    __m512 largest = _mm512_setzero_ps();
    vectors([&](__m512 x, int64_t) ALWAYS { largest = _mm512_max_ps(largest, _mm512_abs_ps(x)); });
    float a = std::max(_mm512_reduce_max_ps(largest), TINY);
    // an ulp less: the largest of a row would be a tie, and becomes 127 on either side, as with torchao's two divisions
    __m512 by = _mm512_set1_ps(std::nextafter(std::min(LEVELS / a, FLT_MAX), 0.0f));
    vectors([&](__m512 x, int64_t k) ALWAYS {
        __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, by)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    });
    return a / LEVELS;
}
