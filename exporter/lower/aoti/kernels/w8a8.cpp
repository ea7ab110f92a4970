// y = round(x / a * 127.5) W (a / 127.5) s + bias, with a = max |x| of each row: a W8A8 linear layer in one pass.
//
// Rows are quantized to bytes once. Scales and bias are applied while the sums are still in registers.
#include "rows.h"
#include "tensor.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr int ROWS = 10;  // 20 sums, 2 columns and 1 row of the 32 registers
#elif defined(__AVX512F__)
constexpr int ROWS = 12;  // 24 sums, 2 columns, 1 row and 1 product
#else
constexpr int ROWS = 6;  // 12 sums, 2 columns, 1 row and 1 product of 16 registers
#endif
constexpr int64_t BLOCK = 16 * ROWS;  // rows that stay in the cache while the panels pass

// Features of the input that lie in one tensor: a layer may read several side by side.
struct Part {
    const void* data;
    bool is_half;
    int64_t width;

    // f(row), of float or half.
    template <class F>
    INLINE auto with(int64_t row, F f) const {
        return is_half ? f(static_cast<const half*>(data) + row * width) : f(static_cast<const float*>(data) + row * width);
    }
};

// One row as bytes; returns what they are to be multiplied by.
float quantized(const std::vector<Part>& parts, int64_t row, Code* q) {
    Scale scale{0};
    for (const Part& part : parts) {
        float most = part.with(row, [&](auto* x) ALWAYS { return largest(x, part.width); });
        if (most > scale.most || most != most) scale.most = most;  // what is no number stays
    }
    Floats by = scale.to_bytes();
    for (const Part& part : parts) {
        part.with(row, [&](auto* x) ALWAYS { quantize(x, part.width, by, q); });
        q += part.width;
    }
    return scale.from_bytes();
}

// x / (1 + e^-u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is GELU's form with the hyperbolic tangent.
INLINE Floats gelu(Floats x) {
    Floats cubic = fma(x * x, every(0.044715f), every(1.0f));
    return x / (every(1.0f) + power_of_two(x * cubic * every(-1.5957691f * LOG2E)));
}

// x Phi(x): Phi by formula 7.1.26 of Abramowitz and Stegun for the error function, within 1.5e-7.
INLINE Floats exact_gelu(Floats x) {
    Floats size = magnitude(x), one = every(1.0f);
    Floats t = one / fma(size, every(0.3275911f * 0.70710678f), one);
    Floats y = every(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = fma(y, t, every(c));
    Floats tail = y * t * (power_of_two(x * x * every(-0.5f * LOG2E)) * every(0.5f));
    return fnma(size, tail, larger(x, zeros()));
}

enum Act { PLAIN, GELU, GEGLU };  // as in operators.py

template <class T, Act ACT>
struct Layer {
    int64_t rows, inner, columns, stride;  // of x [rows, inner] and the product [rows, columns], of the quantized rows in codes
    const int8_t* panels;
    const float *scale, *bias;
    T* y;
    int64_t wide = ACT == GEGLU ? columns / 2 : columns, share = ACT == GEGLU ? PANEL / 2 : PANEL;  // of y, and of a panel's part of it

    template <int R>
    INLINE void tile(const Code* q, const float* factor, const int8_t* panel, int64_t row, int64_t part, Ahead ahead) const {
        Ints sums[R * VECTORS];
        unrolled<R * VECTORS>([&](auto i) ALWAYS {  // what is written at the end is on its way meanwhile
            int64_t column = i % VECTORS * LANES;
            if (column % 16 == 0 && column < share) __builtin_prefetch(y + (row + i / VECTORS) * wide + part * share + column, 1);
        });
        multiply_panel<R>(q, stride, panel, inner, sums, ahead);
        Floats scales[VECTORS], biases[VECTORS];
        unrolled<VECTORS>([&](auto v) ALWAYS {
            int64_t at = first_column(part, v);
            Live live = first_lanes(columns - at);
            scales[v] = load(scale + at, live);
            biases[v] = bias ? load(bias + at, live) : zeros();
        });
        each_row<R>([&](auto r) ALWAYS {
            Floats values[VECTORS], by = every(factor[r]);
            unrolled<VECTORS>([&](auto v) ALWAYS { values[v] = fma(floats(sums[r * VECTORS + v]) * scales[v], by, biases[v]); });
            T* to = y + (row + r) * wide + part * share;
            if constexpr (ACT == GEGLU) {
                unrolled<VECTORS / 2>([&](auto v) ALWAYS { store(to + v * LANES, values[v] * exact_gelu(values[v + VECTORS / 2]), ALL); });
            } else {
                unrolled<VECTORS>([&](auto v) ALWAYS {
                    store(to + v * LANES, ACT == GELU ? gelu(values[v]) : values[v], first_lanes(columns - first_column(part, v)));
                });
            }
        });
    }

    // The column of the product that vector v of a panel begins with: with a gate each panel has some of both halves.
    int64_t first_column(int64_t panel, int v) const {
        return panel * share + (ACT == GEGLU ? v % (VECTORS / 2) * LANES + v / (VECTORS / 2) * wide : v * LANES);
    }

    // A block of rows times one panel.
    void block(const Code* q, const float* factors, int64_t first, int64_t panel) const {
        const int8_t* weights = panels + panel * panel_bytes(inner);
        int64_t count = std::min(rows - first, BLOCK);
        tiled<ROWS, 4, 2, 1>(count, [&](auto r, int64_t at) ALWAYS {
            int64_t row = first + at;
            tile<r>(q + row * stride, factors + row, weights, row, panel, next_panel(weights, inner, at, r, count));
        });
    }
};

template <class T, Act ACT>
void run(const std::vector<Part>& x, int64_t rows, int64_t columns, const int8_t* panels, const float* scale, const float* bias, T* y) {
    int64_t inner = 0;
    for (const Part& part : x) inner += part.width;
    int64_t stride = row_codes(inner);
    Room<Code> q(rows * stride);
    Room<float> factors(rows);
    Layer<T, ACT> layer{rows, inner, columns, stride, panels, scale, bias, y};
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, count = (columns + PANEL - 1) / PANEL;
    PARALLEL
    {
        EACH for (int64_t row = 0; row < rows; row++) factors.data[row] = quantized(x, row, q + row * stride);
        EACH for (int64_t i = 0; i < blocks * count; i++) layer.block(q.data, factors.data, i / count * BLOCK, i % count);
    }
}

}  // namespace

// y = act(concat(xs) W + bias). xs: contiguous [..., K_i], float32 or bfloat16, y: that of them which is wider; `packed`
// as operators.py packs it; scale and bias float32 [N].
extern "C" AOTITorchError aoti_torch_cpu_packed_w8a8(
    const AtenTensorHandle* xs, int64_t parts, AtenTensorHandle packed, AtenTensorHandle scale, const AtenTensorHandle* bias,
    int64_t act, AtenTensorHandle* y) {
    return guarded([&] {
        std::vector<Part> x;
        std::vector<int64_t> sizes;
        int32_t dtype = aoti_torch_dtype_bfloat16();
        int64_t rows = 1;
        for (int64_t i = 0; i < parts; i++) {
            Tensor part(xs[i]);
            sizes = part.sizes;
            rows = part.numel() / std::max<int64_t>(sizes.back(), 1);
            x.push_back({part.data, part.is_bfloat16(), sizes.back()});
            if (!part.is_bfloat16()) dtype = part.dtype;
        }
        Tensor factors(scale);
        int64_t columns = factors.sizes[0];
        sizes.back() = act == GEGLU ? columns / 2 : columns;
        Tensor out = Tensor::contiguous(sizes, dtype, y);
        auto go = [&]<class T, Act ACT>(T* to, std::integral_constant<Act, ACT>) {
            run<T, ACT>(x, rows, columns, Tensor(packed).as<int8_t>(), factors.as<float>(), bias ? Tensor(*bias).as<float>() : nullptr, to);
        };
        auto any = [&](auto* to) {
            if (act == GELU) go(to, std::integral_constant<Act, GELU>());
            else if (act == GEGLU) go(to, std::integral_constant<Act, GEGLU>());
            else go(to, std::integral_constant<Act, PLAIN>());
        };
        out.is_bfloat16() ? any(out.as<half>()) : any(out.as<float>());
    });
}
