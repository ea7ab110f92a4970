// y = round(x / a * 127.5) W (a / 127.5) s + bias, with a = max |x| of each row: a W8A8 linear layer in one pass.
//
// Rows are quantized to bytes once. Scales and bias are applied while the sums are still in registers.
#include "rows.h"
#include "tensor.h"

namespace {

constexpr int ROWS = 10;                // 20 sums, 2 columns and 1 row of the 32 registers
constexpr int64_t BLOCK = 16 * ROWS;    // rows that stay in the cache while the panels pass

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
float quantized(const std::vector<Part>& parts, int64_t row, uint8_t* q) {
    Scale scale{0};
    for (const Part& part : parts) scale.most = std::max(scale.most, part.with(row, [&](auto* x) ALWAYS { return largest(x, part.width); }));
    __m512 by = scale.to_bytes();
    for (const Part& part : parts) {
        part.with(row, [&](auto* x) ALWAYS { quantize(x, part.width, by, q); });
        q += part.width;
    }
    return scale.from_bytes();
}

// x / (1 + e^-u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is GELU's form with the hyperbolic tangent.
INLINE __m512 gelu(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1));
    __m512 power = power_of_two(_mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-1.5957691f * LOG2E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

// x Phi(x): Phi by formula 7.1.26 of Abramowitz and Stegun for the error function, within 1.5e-7.
INLINE __m512 exact_gelu(__m512 x) {
    __m512 size = _mm512_abs_ps(x), one = _mm512_set1_ps(1);
    __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f * 0.70710678f), one));
    __m512 y = _mm512_set1_ps(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c));
    __m512 tail = power_of_two(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2E)));
    tail = _mm512_mul_ps(_mm512_mul_ps(y, t), _mm512_mul_ps(tail, _mm512_set1_ps(0.5f)));
    return _mm512_fnmadd_ps(size, tail, _mm512_max_ps(x, _mm512_setzero_ps()));
}

enum Act { PLAIN, GELU, GEGLU };  // as in operators.py

template <class T, Act ACT>
struct Layer {
    int64_t rows, inner, columns, stride;  // of x [rows, inner] and the product [rows, columns], of the quantized rows in bytes
    const int8_t* panels;
    const float *scale, *bias;
    T* y;
    int64_t wide = ACT == GEGLU ? columns / 2 : columns, share = ACT == GEGLU ? LANES : PANEL;  // of y, and of a panel's part of it

    template <int R>
    INLINE void tile(const uint8_t* q, const float* factor, const int8_t* panel, int64_t row, int64_t part, Ahead ahead) const {
        __m512i sums[R * VECTORS];
        unrolled<R * VECTORS>([&](auto i) ALWAYS { sums[i] = _mm512_loadu_si512(panel + i % VECTORS * 64); });
        unrolled<R * VECTORS>([&](auto i) ALWAYS {  // what is written at the end is on its way meanwhile
            if (ACT != GEGLU || i % VECTORS == 0) __builtin_prefetch(y + (row + i / VECTORS) * wide + part * share + i % VECTORS * LANES, 1);
        });
        multiply<Bytes, R, VECTORS>(q, stride, panel + VECTORS * 64, (inner + 3) / 4, sums, ahead);
        __m512 scales[VECTORS], biases[VECTORS];
        unrolled<VECTORS>([&](auto v) ALWAYS {
            int64_t at = first_column(part, v);
            __mmask16 live = first_lanes(columns - at);
            scales[v] = load(scale + at, live);
            biases[v] = bias ? load(bias + at, live) : _mm512_setzero_ps();
        });
        unrolled<R>([&](auto r) ALWAYS {
            __m512 values[VECTORS], by = _mm512_set1_ps(factor[r]);
            unrolled<VECTORS>([&](auto v) ALWAYS {
                values[v] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r * VECTORS + v]), scales[v]), by, biases[v]);
            });
            T* to = y + (row + r) * wide + part * share;
            if constexpr (ACT == GEGLU) {
                store(to, _mm512_mul_ps(values[0], exact_gelu(values[1])), 0xffff);
            } else {
                unrolled<VECTORS>([&](auto v) ALWAYS {
                    store(to + v * LANES, ACT == GELU ? gelu(values[v]) : values[v], first_lanes(columns - first_column(part, v)));
                });
            }
        });
    }

    // The column of the product that vector v of a panel begins with.
    int64_t first_column(int64_t panel, int v) const { return panel * share + v * (ACT == GEGLU ? wide : LANES); }

    // A block of rows times one panel.
    void block(const uint8_t* q, const float* factors, int64_t first, int64_t panel) const {
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
    int64_t stride = row_bytes(inner);
    Room<uint8_t> q(rows * stride);
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
