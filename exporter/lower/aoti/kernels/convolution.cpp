// A convolution in 8 bits, over pictures whose channels lie side by side: each pixel is quantized by its own largest channel.
//
// Pixels are quantized once, into a picture with its border. There the pixels under one tap of the kernel, for neighbours
// of a row, lie equally far apart: rows of a matrix for the product of w8a8.cpp. Since every pixel has a scale of its own, sums
// of integers end with a tap, and are added up in float32, for a block of pixels and a panel of channels, in the cache. A
// GroupNorm and SiLU before it are done with a pixel that is quantized.
#include <optional>

#include "norm.h"
#include "tensor.h"

namespace {

constexpr int64_t BLOCK = 256;  // pixels whose sums stay in the cache while the weights pass
#ifdef __AVX512F__
constexpr int ROWS = 8;
#else
constexpr int ROWS = 6;
#endif

struct Convolution {
    int64_t inner, columns;               // channels in and out
    int64_t kernel, step, padding;
    int64_t high, wide, out_high, out_wide;  // of a picture with its border, and of what comes out
    const int8_t* panels;                 // for each panel of columns one of w8a8.cpp's for every tap
    const float *scale, *bias;
    std::optional<Norm> norm;
    int64_t stride = row_codes(inner);    // codes of a quantized pixel
    int64_t taps = kernel * kernel;

    // Pixel i of all the pictures with their borders, as bytes. `slope` and `shift` are of all the pictures' channels, `room` of
    // a pixel's.
    template <class T>
    float pixel(const T* x, int64_t i, const float* slope, const float* shift, float* room, Code* q) const {
        int64_t row = i / wide % high - padding, column = i % wide - padding, h = high - 2 * padding, w = wide - 2 * padding;
        if (row < 0 || row >= h || column < 0 || column >= w) {
            std::fill(q, q + stride, NOTHING);
            return 0;
        }
        const T* at = x + ((i / (wide * high) * h + row) * w + column) * inner;
        auto bytes = [&](auto* from) ALWAYS {
            Scale scale{largest(from, inner)};
            quantize(from, inner, scale.to_bytes(), q);
            return scale.from_bytes();
        };
        if (!norm) return bytes(at);
        int64_t picture = i / (wide * high) * inner;
        normed(at, slope + picture, shift + picture, inner, room);
        return bytes(static_cast<const float*>(room));
    }

    // R neighbours under one tap: added to their sums, or their first.
    template <int R>
    INLINE void tile(const Code* q, const float* factor, const int8_t* panel, bool first, float* sum, Ahead ahead) const {
        Ints sums[R * VECTORS];
        multiply_panel<R>(q, stride * step, panel, inner, sums, ahead);
        each_row<R>([&](auto r) ALWAYS {
            Floats by = every(factor[r * step]);
            unrolled<VECTORS>([&](auto v) ALWAYS {
                float* at = sum + (r * VECTORS + v) * LANES;
                Floats before = first ? zeros() : load(at, ALL);
                store(at, fma(floats(sums[r * VECTORS + v]), by, before), ALL);
            });
        });
    }

    // Rows first .. end of what comes out of one picture, for one panel of columns. q and factors are the picture's.
    template <class T>
    void block(const Code* q, const float* factors, int64_t first, int64_t end, int64_t panel, float* sums, T* y) const {
        for (int64_t tap = 0; tap < taps; tap++) {
            const int8_t* weights = panels + (panel * taps + tap) * panel_bytes(inner);
            for (int64_t row = first; row < end; row++) {
                int64_t pixel = (row * step + tap / kernel) * wide + tap % kernel, before = (row - first) * out_wide;
                tiled<ROWS, 4, 2, 1>(out_wide, [&](auto r, int64_t x) ALWAYS {
                    int64_t at = pixel + x * step, done = before + x;
                    Ahead ahead = next_panel(weights, inner, done, r, (end - first) * out_wide);
                    tile<r>(q + at * stride, factors + at, weights, tap == 0, sums + done * PANEL, ahead);
                });
            }
        }
        unrolled<VECTORS>([&](auto v) ALWAYS {
            int64_t at = panel * PANEL + v * LANES;
            Live live = first_lanes(columns - at);
            Floats s = load(scale + at, live), b = bias ? load(bias + at, live) : zeros();
            for (int64_t i = 0; i < (end - first) * out_wide; i++)
                store(y + (first * out_wide + i) * columns + at, fma(load(sums + i * PANEL + v * LANES, ALL), s, b), live);
        });
    }

    template <class T>
    void run(const T* x, int64_t pictures, T* y) const {
        int64_t pixels = high * wide, rows = std::max<int64_t>(1, BLOCK / out_wide);
        int64_t blocks = (out_high + rows - 1) / rows, count = (columns + PANEL - 1) / PANEL;
        Room<Code> q(pictures * pixels * stride);
        Room<float> factors(pictures * pixels), sums(THREADS * rows * out_wide * PANEL);
        Room<float> slope(pictures * inner), shift(pictures * inner), room(THREADS * inner);
        int64_t seen = (high - 2 * padding) * (wide - 2 * padding), parts = (inner + 4 * LANES - 1) / (4 * LANES);
        PARALLEL
        {
            if (norm) {
                EACH for (int64_t i = 0; i < pictures * parts; i++) {
                    int64_t p = i / parts, at = p * inner;
                    moments(x + p * seen * inner, seen, inner, i % parts * 4 * LANES, slope + at, shift + at);
                }
                EACH for (int64_t p = 0; p < pictures; p++) slopes(*norm, inner, slope + p * inner, shift + p * inner);
            }
            EACH for (int64_t i = 0; i < pictures * pixels; i++)
                factors.data[i] = pixel(x, i, slope.data, shift.data, room + THREAD * inner, q + i * stride);
            EACH for (int64_t i = 0; i < pictures * blocks * count; i++) {
                int64_t picture = i / (blocks * count), first = i / count % blocks * rows;
                block(q + picture * pixels * stride, factors + picture * pixels, first, std::min(out_high, first + rows), i % count,
                      sums + THREAD * rows * out_wide * PANEL, y + picture * out_high * out_wide * columns);
            }
        }
    }
};

}  // namespace

// y = conv2d(silu(group_norm(x))) W + bias; with 0 groups y = conv2d(x) W + bias. x: [B, C, H, W] channels last, float32 or bfloat16, as y [B, N, H', W'] is; `packed` as operators.py
// packs it; scale and bias float32 [N]; the kernel is square, with equal steps and padding of zeros on all sides;
// norm_weight and norm_bias float32 [C].
extern "C" AOTITorchError aoti_torch_cpu_packed_w8a8_conv2d(
    AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle scale, const AtenTensorHandle* bias, int64_t kernel,
    int64_t step, int64_t padding, int64_t groups, double epsilon, const AtenTensorHandle* norm_weight,
    const AtenTensorHandle* norm_bias, AtenTensorHandle* y) {
    return guarded([&] {
        Tensor from(x), factors(scale);
        int64_t n = factors.sizes[0], c = from.sizes[1], high = from.sizes[2] + 2 * padding, wide = from.sizes[3] + 2 * padding;
        int64_t out_high = (high - kernel) / step + 1, out_wide = (wide - kernel) / step + 1;
        std::vector<int64_t> strides{out_high * out_wide * n, 1, out_wide * n, n};
        Tensor out = Tensor::empty({from.sizes[0], n, out_high, out_wide}, strides, from.dtype, y);
        Convolution layer{c, n, kernel, step, padding, high, wide, out_high, out_wide, Tensor(packed).as<int8_t>(),
                          factors.as<float>(), bias ? Tensor(*bias).as<float>() : nullptr};
        if (groups) layer.norm = {groups, static_cast<float>(epsilon), Tensor(*norm_weight).as<float>(), Tensor(*norm_bias).as<float>()};
        if (from.is_bfloat16()) layer.run(from.as<half>(), from.sizes[0], out.as<half>());
        else layer.run(from.as<float>(), from.sizes[0], out.as<float>());
    });
}
