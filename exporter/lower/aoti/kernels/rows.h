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

// max |x| of n numbers. Without its sign a bfloat16 is an integer of the same order.
INLINE float largest(const float* x, int64_t n) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += LANES) most = _mm512_max_ps(most, _mm512_abs_ps(load(x + k, first_lanes(n - k))));
    return _mm512_reduce_max_ps(most);
}
INLINE float largest(const half* x, int64_t n) {
    __m512i most = _mm512_setzero_si512(), unsigned_ = _mm512_set1_epi16(0x7fff);
    for (int64_t k = 0; k < n; k += 2 * LANES) {
        __mmask32 lanes = n - k >= 2 * LANES ? ~0u : (1u << (n - k)) - 1;
        most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_maskz_loadu_epi16(lanes, x + k), unsigned_));
    }
    __m512i low = _mm512_slli_epi32(most, 16), high = _mm512_andnot_si512(_mm512_set1_epi32(0xffff), most);
    return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(high)));
}

// What numbers of which none is larger than `most` are multiplied by to become bytes, and what bytes are to become numbers.
struct Scale {
    float most;
    // an ulp less: the largest of a row would be a tie, and becomes 127 on either side, as with torchao's two divisions
    __m512 to_bytes() const { return _mm512_set1_ps(std::nextafter(std::min(LEVELS / std::max(most, TINY), FLT_MAX), 0.0f)); }
    float from_bytes() const { return std::max(most, TINY) / LEVELS; }
};

// n numbers as bytes plus 128, filled up to a multiple of 16.
template <class T>
INLINE void quantize(const T* x, int64_t n, __m512 by, uint8_t* q) {
    for (int64_t k = 0; k < n; k += LANES) {
        __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(load(x + k, first_lanes(n - k)), by)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }
}
