// Vectors of float32 as the level of the code has them: sixteen lanes with AVX-512, eight with AVX2.
//
// Sums and products are written `a + b` and `a * b`, which gcc knows; what it has no sign for is here. bfloat16 is what
// numbers are stored as; they are computed with as float32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

#define ALWAYS __attribute__((always_inline))
#define INLINE inline ALWAYS

using half = uint16_t;  // a bfloat16's bits; gcc 12 has no type for them

// f(0), f(1), ... with constants, so that what they index stays in registers.
template <int N, class F>
INLINE void unrolled(F f) {
    [&]<int... I>(std::integer_sequence<int, I...>) ALWAYS {
        (f(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

#define REGISTER "v"           // of an instruction written as text
#define TILE INLINE            // a loop that fills the registers with sums, which are used where they are
constexpr int64_t LANES = 16;  // 32-bit lanes in a vector
using Floats = __m512;
using Ints = __m512i;
using Live = __mmask16;  // lanes that are there; the others are read as zero, and not written
constexpr Live ALL = 0xffff;

INLINE Live first_lanes(int64_t n) { return n >= LANES ? ALL : n <= 0 ? 0 : (1u << n) - 1; }

INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats every(float x) { return _mm512_set1_ps(x); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
INLINE Floats where(Live lanes, Floats a, Floats other) { return _mm512_mask_mov_ps(other, lanes, a); }
INLINE float largest_lane(Floats a) { return _mm512_reduce_max_ps(a); }
INLINE float sum_lanes(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE float first_lane(Floats a) { return _mm512_cvtss_f32(a); }
INLINE Floats turned(Floats pairs) {  // (-b, a) of neighbours (a, b)
    const Floats minus_first = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000));
    return _mm512_xor_ps(_mm512_permute_ps(pairs, 0xb1), minus_first);
}

INLINE Floats load(const float* from, Live lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
INLINE Floats load(const half* from, Live lanes) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}
INLINE void store(float* to, Floats values, Live lanes) { _mm512_mask_storeu_ps(to, lanes, values); }
INLINE void store(half* to, Floats values, Live lanes) {
#ifdef __AVX512BF16__
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(values));
#else
    Ints bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    Ints rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 none = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, none, _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(rounded));
#endif
}

INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
INLINE void store_ints(void* to, Ints values) { _mm512_storeu_si512(to, values); }
INLINE Ints every(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints magnitude_bits(Floats a) { return _mm512_and_si512(_mm512_castps_si512(a), every(0x7fffffff)); }
INLINE Ints larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
INLINE int32_t largest_lane(Ints a) { return _mm512_reduce_max_epi32(a); }
INLINE Ints larger_words(Ints a, Ints b) { return _mm512_max_epi16(a, b); }
INLINE Ints low_halves(Ints a) { return _mm512_slli_epi32(a, 16); }  // as numbers
INLINE Ints rounded(Floats a) { return _mm512_cvtps_epi32(a); }
INLINE Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Ints every_pair(int64_t x) { return _mm512_set1_epi64(x); }
INLINE Ints widened(const void* bytes) {  // signed bytes as words
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(bytes)));
}
INLINE Ints sum_pairs(Ints a, Ints b) {  // of neighbouring lanes, those of a first
    const Ints even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b), _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, every(1)), b));
}
INLINE void store_bytes(uint8_t* to, Ints values) {  // plus 128
    __m128i bytes = _mm512_cvtsepi32_epi8(values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}
INLINE void store_words(int16_t* to, Ints values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(values));
}

// 2^x within 4e-6 of its value: a polynomial on [-1/2, 1/2], then the exponent; 0 and infinity beyond what a float holds.
INLINE Floats power_of_two(Floats x) {
    Floats whole = _mm512_roundscale_ps(x, 0), rest = x - whole;
    Floats y = every(0.009618129f);
    for (float c : {0.05550411f, 0.24022651f, 0.6931472f, 1.0f}) y = fma(y, rest, every(c));
    return _mm512_scalef_ps(y, whole);
}

#elif defined(__AVX2__) && defined(__FMA__)

#define REGISTER "x"
#define TILE __attribute__((noinline))  // of 16 registers none is left for what lies around
constexpr int64_t LANES = 8;
using Floats = __m256;
using Ints = __m256i;
using Live = int64_t;  // so many of the first lanes are there; the others are read as zero, and not written
constexpr Live ALL = LANES;

INLINE Live first_lanes(int64_t n) { return std::clamp<int64_t>(n, 0, LANES); }

// All bits of the first lanes, none of the others.
INLINE Ints lane_bits(Live lanes) {
    alignas(32) static constexpr int32_t ones[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256(reinterpret_cast<const Ints*>(ones + LANES - lanes));
}

INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats every(float x) { return _mm256_set1_ps(x); }
INLINE Ints every(int32_t x) { return _mm256_set1_epi32(x); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }    // a b + c
INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a b
INLINE Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats magnitude(Floats a) { return _mm256_andnot_ps(every(-0.0f), a); }
INLINE Floats where(Live lanes, Floats a, Floats other) {
    return lanes == ALL ? a : _mm256_blendv_ps(other, a, _mm256_castsi256_ps(lane_bits(lanes)));
}
INLINE float largest_lane(Floats a) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
INLINE float sum_lanes(Floats a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
INLINE float first_lane(Floats a) { return _mm256_cvtss_f32(a); }
INLINE Floats turned(Floats pairs) {  // (-b, a) of neighbours (a, b)
    const Floats minus_first = _mm256_castsi256_ps(_mm256_set1_epi64x(0x80000000));
    return _mm256_xor_ps(_mm256_permute_ps(pairs, 0xb1), minus_first);
}

INLINE Floats load(const float* from, Live lanes) {
    return lanes == ALL ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lane_bits(lanes));
}
INLINE Floats load(const half* from, Live lanes) {
    half some[LANES] = {};
    if (lanes != ALL) from = static_cast<const half*>(std::memcpy(some, from, lanes * sizeof(half)));
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE void store(float* to, Floats values, Live lanes) {
    if (lanes == ALL) return _mm256_storeu_ps(to, values);
    float some[LANES];  // a masked store takes AMD's cores before Zen 4 dozens of cycles
    _mm256_storeu_ps(some, values);
    std::memcpy(to, some, lanes * sizeof(float));
}
INLINE void store(half* to, Floats values, Live lanes) {
    Ints bits = _mm256_castps_si256(values), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), every(1));
    Ints rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, every(0x7fff))), 16);
    Ints none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, every(0x7fc0), none);
    __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    if (lanes == ALL) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
    half some[LANES];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(some), halves);
    std::memcpy(to, some, lanes * sizeof(half));
}

INLINE Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const Ints*>(from)); }
INLINE void store_ints(void* to, Ints values) { _mm256_storeu_si256(static_cast<Ints*>(to), values); }
INLINE Ints magnitude_bits(Floats a) { return _mm256_and_si256(_mm256_castps_si256(a), every(0x7fffffff)); }
INLINE Ints larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
INLINE Ints larger_words(Ints a, Ints b) { return _mm256_max_epi16(a, b); }
INLINE Ints low_halves(Ints a) { return _mm256_slli_epi32(a, 16); }  // as numbers
INLINE int32_t largest_lane(Ints a) {
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}
INLINE Ints rounded(Floats a) { return _mm256_cvtps_epi32(a); }
INLINE Floats floats(Ints a) { return _mm256_cvtepi32_ps(a); }
INLINE Ints every_pair(int64_t x) { return _mm256_set1_epi64x(x); }
INLINE Ints widened(const void* bytes) {  // signed bytes as words
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
}
INLINE Ints sum_pairs(Ints a, Ints b) {  // of neighbouring lanes, those of a first
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8);
}
INLINE void store_words(int16_t* to, Ints values) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
}
INLINE void store_bytes(uint8_t* to, Ints values) {  // plus 128
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_xor_si128(_mm_packs_epi16(words, words), _mm_set1_epi8(-128)));
}

// 2^x within 4e-6 of its value, as above; what no float holds ends with an exponent of 0 or infinity.
INLINE Floats power_of_two(Floats x) {
    x = _mm256_min_ps(every(128.0f), _mm256_max_ps(every(-127.0f), x));  // in this order what is no number stays none
    Floats whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = x - whole;
    Floats y = every(0.009618129f);
    for (float c : {0.05550411f, 0.24022651f, 0.6931472f, 1.0f}) y = fma(y, rest, every(c));
    Ints exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), every(127)), 23);
    return y * _mm256_castsi256_ps(exponent);
}

#else
#error "these kernels are written for AVX2 with FMA, and for AVX-512"
#endif

constexpr float LOG2E = 1.44269504f;
