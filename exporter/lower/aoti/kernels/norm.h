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
    Live lanes[N];
    Floats start[N], sums[N], squares[N];  // of differences from the first pixel: of large numbers little would be left
    unrolled<N>([&](auto v) ALWAYS {
        lanes[v] = first_lanes(channels - first - v * LANES);
        start[v] = load(x + first + v * LANES, lanes[v]);
        sums[v] = squares[v] = zeros();
    });
    for (int64_t i = 0; i < pixels; i++)
        unrolled<N>([&](auto v) ALWAYS {
            Floats d = load(x + i * channels + first + v * LANES, lanes[v]) - start[v];
            sums[v] = sums[v] + d;
            squares[v] = fma(d, d, squares[v]);
        });
    Floats share = every(1.0f / pixels);
    unrolled<N>([&](auto v) ALWAYS {
        Floats m = sums[v] * share;
        store(mean + first + v * LANES, m + start[v], lanes[v]);
        store(square + first + v * LANES, fnma(m, m, squares[v] * share), lanes[v]);
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
        Live lanes = first_lanes(n - k);
        Floats v = fma(load(x + k, lanes), load(slope + k, lanes), load(shift + k, lanes));
        store(y + k, v / (every(1.0f) + power_of_two(v * every(-LOG2E))), lanes);
    }
}
