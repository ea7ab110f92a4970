// The inner loop of the kernels: rows of one matrix times a packed panel of the other, all sums in registers.
//
// A "step" is what one instruction takes of a row: a few features, broadcast, times as many of each column of a vector, added
// to the column's sum. What instruction that is, is a parameter:
//
//     Bytes    VPDPBUSD     4 unsigned bytes times 4 signed bytes, to int32; AVX-512 VNNI, or AVX-VNNI
//     Words    VPMADDWD     the same of signed words, for CPUs without: exact too, since no 16 bits have to hold a sum
//     Halves   VDPBF16PS    2 bfloat16 times 2 bfloat16, to float32; AVX-512 BF16
//     Singles  VFMADD231PS  float32
//
// A panel lies as [steps][columns][features of a step], which is what the loop reads in order.
#pragma once

#include <cstdlib>
#include <new>

#include "vectors.h"

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

// f(R, at) for n rows from `at` 0 on, so many as a tile has at a time: R are tiles' rows, the largest first, the last of them 1.
template <int... R, class F>
INLINE void tiled(int64_t n, F f) {
    int64_t at = 0;
    auto tiles = [&](auto r) ALWAYS {
        for (; at + r <= n; at += r) f(r, at);
    };
    (tiles(std::integral_constant<int, R>()), ...);
}

constexpr int64_t VECTOR = LANES * 4;  // bytes of a vector

// 32 bits of a row, in every lane.
INLINE Ints broadcast(const char* row) {
    int32_t bits;
    std::memcpy(&bits, row, 4);
    return every(bits);
}

// What one instruction multiplies and adds, as text: gcc 12 copies and spills every sum when these are intrinsics (measured: half
// of the speed or less). STEP and COLUMNS are the bytes that it takes of a row and of a panel.
struct Singles {
    using Sum = Floats;
    static constexpr int64_t STEP = 4, COLUMNS = VECTOR;
    static INLINE Ints row(const char* at) { return broadcast(at); }
    static INLINE Ints columns(const char* at) { return load_ints(at); }
    static INLINE void add(Sum& sum, Ints row, Ints column) {
        asm("vfmadd231ps %2, %1, %0" : "+" REGISTER(sum) : REGISTER(row), REGISTER(column));
    }
};

#ifdef __AVX512BF16__
struct Halves : Singles {
    static INLINE void add(Sum& sum, Ints row, Ints column) {
        asm("vdpbf16ps %2, %1, %0" : "+" REGISTER(sum) : REGISTER(row), REGISTER(column));
    }
    static INLINE Ints rounded(Floats low, Floats high) { return (Ints)_mm512_cvtne2ps_pbh(high, low); }  // the lanes of low, then those of high
    static INLINE Ints joined(Floats low, Floats high) {  // a lane of each side by side, of what is bfloat16 already
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
    }
};
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct Bytes {
    using Sum = Ints;
    static constexpr int64_t STEP = 4, COLUMNS = VECTOR;
    static INLINE Ints row(const char* at) { return broadcast(at); }
    static INLINE Ints columns(const char* at) { return load_ints(at); }
    static INLINE void add(Sum& sum, Ints row, Ints column) {
#ifdef __AVX512VNNI__
        asm("vpdpbusd %2, %1, %0" : "+" REGISTER(sum) : REGISTER(row), REGISTER(column));
#else
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+" REGISTER(sum) : REGISTER(row), REGISTER(column));
#endif
    }
};
#else
// A lane has but two of a step's four features: columns have their sums in two neighbouring lanes, see `sum_pairs`.
struct Words {
    using Sum = Ints;
    static constexpr int64_t STEP = 8, COLUMNS = VECTOR / 2;
    static INLINE Ints row(const char* at) {
        int64_t bits;
        std::memcpy(&bits, at, 8);
        return every_pair(bits);
    }
    static INLINE Ints columns(const char* at) { return widened(at); }
    static INLINE void add(Sum& sum, Ints row, Ints column) {
        Ints product;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+" REGISTER(sum), "=&" REGISTER(product) : REGISTER(row), REGISTER(column));
    }
};
#endif

// Memory that is read soon: `each` cache line or part of one is asked for at every step of a product, which has ports to spare.
struct Ahead {
    const char* data;
    int64_t each;
};

// sums[r * V + v] += row r of `rows`, whose rows lie `stride` bytes apart, times vector v of `panel`, whose steps lie `next`
// bytes apart.
template <class Kind, int R, int V>
TILE void multiply(
    const void* rows, int64_t stride, const void* panel, int64_t next, int64_t steps, typename Kind::Sum (&sums)[R * V],
    Ahead ahead) {
    const char* column = static_cast<const char*>(panel);
    // an address is a register plus 0, 1 or 2 strides: a register for each row would be more than there are
    const char* row[(R + 2) / 3];
    unrolled<(R + 2) / 3>([&](auto i) ALWAYS { row[i] = static_cast<const char*>(rows) + i * 3 * stride; });
    typename Kind::Sum sum[R * V];
    unrolled<R * V>([&](auto i) ALWAYS { sum[i] = sums[i]; });
    Ints columns[V];
    for (int64_t step = 0; step < steps; step++, column += next) {
        unrolled<V>([&](auto v) ALWAYS { columns[v] = Kind::columns(column + v * Kind::COLUMNS); });
        if (ahead.data) _mm_prefetch(ahead.data += ahead.each, _MM_HINT_T0);
        unrolled<R>([&](auto r) ALWAYS {
            Ints some = Kind::row(row[r / 3] + r % 3 * stride);
            unrolled<V>([&](auto v) ALWAYS { Kind::add(sum[r * V + v], some, columns[v]); });
        });
        unrolled<(R + 2) / 3>([&](auto i) ALWAYS { asm("add %1, %0" : "+r"(row[i]) : "i"(Kind::STEP)); });
    }
    unrolled<R * V>([&](auto i) ALWAYS { sums[i] = sum[i]; });
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
