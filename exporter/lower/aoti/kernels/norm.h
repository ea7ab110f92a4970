// GroupNorm and SiLU of a picture whose channels lie side by side, as factors of its channels: silu(x * slope + shift).
#pragma once

#include "rows.h"

struct Norm {
    int64_t groups;
    float epsilon;
    const float *weight, *bias;  // of channels
};

// 4 vectors of channels of a picture: their means, and their mean squares about them, in `mean` and `square`.
template <class T>
void moments(const T* x, int64_t pixels, int64_t channels, int64_t first, float* mean, float* square) {
    constexpr int N = 4;
    __mmask16 lanes[N];
    __m512 start[N], sums[N], squares[N];  // of differences from the first pixel: of large numbers little would be left
    unrolled<N>([&](auto v) ALWAYS {
        lanes[v] = first_lanes(channels - first - v * LANES);
        start[v] = load(x + first + v * LANES, lanes[v]);
        sums[v] = squares[v] = _mm512_setzero_ps();
    });
    for (int64_t i = 0; i < pixels; i++)
        unrolled<N>([&](auto v) ALWAYS {
            __m512 d = _mm512_sub_ps(load(x + i * channels + first + v * LANES, lanes[v]), start[v]);
            sums[v] = _mm512_add_ps(sums[v], d);
            squares[v] = _mm512_fmadd_ps(d, d, squares[v]);
        });
    __m512 share = _mm512_set1_ps(1.0f / pixels);
    unrolled<N>([&](auto v) ALWAYS {
        __m512 m = _mm512_mul_ps(sums[v], share);
        store(mean + first + v * LANES, _mm512_add_ps(m, start[v]), lanes[v]);
        store(square + first + v * LANES, _mm512_fnmadd_ps(m, m, _mm512_mul_ps(squares[v], share)), lanes[v]);
    });
}

// The moments of channels become slope and shift.
inline void slopes(const Norm& norm, int64_t channels, float* mean, float* square) {
    int64_t size = channels / norm.groups;
    for (int64_t first = 0; first < channels; first += size) {
        double middle = 0, variance = 0;
        for (int64_t c = first; c < first + size; c++) middle += mean[c];
        middle /= size;
        for (int64_t c = first; c < first + size; c++) variance += square[c] + (mean[c] - middle) * (mean[c] - middle);
        float by = 1 / std::sqrt(variance / size + norm.epsilon);
        for (int64_t c = first; c < first + size; c++) {
            mean[c] = norm.weight[c] * by;
            square[c] = norm.bias[c] - static_cast<float>(middle) * mean[c];
        }
    }
}

// n channels of a pixel, normed and through SiLU, in `y`.
template <class T>
INLINE void normed(const T* x, const float* slope, const float* shift, int64_t n, float* y) {
    for (int64_t k = 0; k < n; k += LANES) {
        __mmask16 lanes = first_lanes(n - k);
        __m512 v = _mm512_fmadd_ps(load(x + k, lanes), load(slope + k, lanes), load(shift + k, lanes));
        __m512 power = power_of_two(_mm512_mul_ps(v, _mm512_set1_ps(-LOG2E)));
        store(y + k, _mm512_div_ps(v, _mm512_add_ps(_mm512_set1_ps(1), power)), lanes);
    }
}
