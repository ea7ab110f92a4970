// y = x W^T + bias for a few rows: what takes the time is reading the weight, once and in order. Modulation layers are such.
#include "product.h"
#include "tensor.h"

namespace {

constexpr int64_t BLOCK = 16;  // rows of the weight that a thread takes at once
constexpr int SUMS = 4;        // of a dot product, so that it does not wait for itself

// R rows of x [R, inner] times one row of the weight: y[r * columns].
template <int R, class T>
INLINE void dots(const T* x, const T* weight, int64_t inner, int64_t columns, float bias, T* y) {
    Floats sums[R * SUMS];
    unrolled<R * SUMS>([&](auto i) ALWAYS { sums[i] = zeros(); });
    auto vector = [&](int64_t k, auto s, Live lanes) ALWAYS {
        Floats w = load(weight + k, lanes);
        unrolled<R>([&](auto r) ALWAYS { sums[r * SUMS + s] = fma(load(x + r * inner + k, lanes), w, sums[r * SUMS + s]); });
    };
    int64_t k = 0;
    for (; k + SUMS * LANES <= inner; k += SUMS * LANES) unrolled<SUMS>([&](auto s) ALWAYS { vector(k + s * LANES, s, ALL); });
    for (; k < inner; k += LANES) vector(k, std::integral_constant<int, 0>(), first_lanes(inner - k));
    unrolled<R>([&](auto r) ALWAYS {
        Floats sum = sums[r * SUMS];
        unrolled<SUMS - 1>([&](auto s) ALWAYS { sum = sum + sums[r * SUMS + s + 1]; });
        store(y + r * columns, every(sum_lanes(sum) + bias), first_lanes(1));
    });
}

template <class T>
void run(const T* x, int64_t rows, int64_t inner, const T* weight, int64_t columns, const T* bias, T* y) {
    PARALLEL {
        EACH for (int64_t first = 0; first < columns; first += BLOCK)
            for (int64_t n = first; n < std::min(columns, first + BLOCK); n++) {
                float b = bias ? first_lane(load(bias + n, first_lanes(1))) : 0;
                tiled<4, 2, 1>(rows, [&](auto r, int64_t at) ALWAYS {
                    dots<r>(x + at * inner, weight + n * inner, inner, columns, b, y + at * columns + n);
                });
            }
    }
}

}  // namespace

// x [..., K], weight [N, K], bias [N], all float32 or all bfloat16, contiguous; y [..., N] as they are.
extern "C" AOTITorchError aoti_torch_cpu_few_rows(
    AtenTensorHandle x, AtenTensorHandle weight, const AtenTensorHandle* bias, AtenTensorHandle* y) {
    return guarded([&] {
        Tensor from(x), by(weight);
        std::vector<int64_t> sizes = from.sizes;
        sizes.back() = by.sizes[0];
        Tensor out = Tensor::contiguous(sizes, from.dtype, y);
        auto go = [&](auto* to) {
            using T = std::remove_pointer_t<decltype(to)>;
            run<T>(from.as<T>(), from.numel() / by.sizes[1], by.sizes[1], by.as<T>(), by.sizes[0], bias ? Tensor(*bias).as<T>() : nullptr, to);
        };
        from.is_bfloat16() ? go(out.as<half>()) : go(out.as<float>());
    });
}
