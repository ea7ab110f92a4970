// The inner loop of both kernels: rows of one matrix times a packed panel of the other, all sums in registers.
//
// AVX-512 has one kind of instruction for both: VPDPBUSD multiplies four bytes of each 32-bit lane and adds them to
// the lane's sum, VDPBF16PS two bfloat16. So a "step" is 32 bits of a row, broadcast, times 16 columns a vector. A panel
// holds [steps][V][16 columns][32 bits], which is what the loop reads in order.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

// THREADS, given when compiling, is how many Inductor's own loops fork too.
#define PRAGMA(text) _Pragma(#text)
#define THREAD_REGION(n) PRAGMA(omp parallel num_threads(n))
#if THREADS > 1
#define PARALLEL THREAD_REGION(THREADS)
#define EACH _Pragma("omp for schedule(dynamic)")
#define THREAD omp_get_thread_num()
#include <omp.h>
#else
#define PARALLEL
#define EACH
#define THREAD 0
#endif

#define ALWAYS __attribute__((always_inline))
#define INLINE inline ALWAYS

constexpr int64_t LANES = 16;  // 32-bit lanes in a vector

using half = uint16_t;  // a bfloat16's bits; gcc 12 has no type for them

// f(0), f(1), ... with constants, so that what they index stays in registers.
template <int N, class F>
INLINE void unrolled(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) ALWAYS {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

// f(R, at) for n rows from `at` 0 on, so many as a tile has at a time: R are tiles' rows, the largest first, the last of them 1.
template <int... R, class F>
INLINE void tiled(int64_t n, F f) {
    int64_t at = 0;
    auto tiles = [&](auto r) ALWAYS {
        for (; at + r <= n; at += r) f(r, at);
    };
    (tiles(std::integral_constant<int, R>()), ...);
}

// As text: gcc 12 copies and spills every sum when these are intrinsics (measured: half of the speed or less).
struct Bytes {
    using Sum = __m512i;
    static INLINE void add(Sum& sum, __m512i row, __m512i column) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(row), "v"(column));
    }
};

struct Halves {
    using Sum = __m512;
    static INLINE void add(Sum& sum, __m512i row, __m512i column) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(row), "v"(column));
    }
};

// Memory that is read soon: `each` cache line or part of one is asked for at every step of a product, which has ports to spare.
struct Ahead {
    const char* data;
    int64_t each;
};

// sums[r * V + v] += row r of `rows`, whose rows lie `stride` bytes apart, times vector v of `panel`.
template <class Kind, int R, int V>
INLINE void multiply(
    const void* rows, int64_t stride, const void* panel, int64_t steps, typename Kind::Sum (&sums)[R * V], Ahead ahead = {}) {
    const char* column = static_cast<const char*>(panel);
    // an address is a register plus 0, 1 or 2 strides: a register for each row would be more than there are
    const char* row[(R + 2) / 3];
    unrolled<(R + 2) / 3>([&](auto i) ALWAYS { row[i] = static_cast<const char*>(rows) + i * 3 * stride; });
    __m512i columns[V];
    for (int64_t step = 0; step < steps; step++, column += V * 64) {
        unrolled<V>([&](auto v) ALWAYS { columns[v] = _mm512_loadu_si512(column + v * 64); });
        if (ahead.data) _mm_prefetch(ahead.data += ahead.each, _MM_HINT_T0);
        unrolled<R>([&](auto r) ALWAYS {
            int32_t bits;
            std::memcpy(&bits, row[r / 3] + r % 3 * stride, 4);
            __m512i broadcast = _mm512_set1_epi32(bits);
            unrolled<V>([&](auto v) ALWAYS { Kind::add(sums[r * V + v], broadcast, columns[v]); });
        });
        unrolled<(R + 2) / 3>([&](auto i) ALWAYS { asm("add $4, %0" : "+r"(row[i])); });
    }
}

// `n` things of type T, aligned to cache lines, freed with the object.
template <class T>
struct Room {
    T* data;
    explicit Room(int64_t n) : data(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64))) {
        if (!data) throw std::bad_alloc();
    }
    Room(const Room&) = delete;
    ~Room() { std::free(data); }
    T* operator+(int64_t i) const { return data + i; }
};

INLINE __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

INLINE __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
INLINE __m512 load(const half* from, __mmask16 lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}
INLINE void store(float* to, __m512 values, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, values); }
INLINE void store(half* to, __m512 values, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
}

constexpr float LOG2E = 1.44269504f;

// 2^x within 4e-6 of its value: a polynomial on [-1/2, 1/2], then the exponent; 0 and infinity beyond what a float holds.
INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.009618129f);
    for (float c : {0.05550411f, 0.24022651f, 0.6931472f, 1.0f}) y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}
