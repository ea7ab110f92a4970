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

    template <class F>
    INLINE void vectors(int64_t row, F f) const {
        auto pass = [&](auto* x) ALWAYS {
            for (int64_t k = 0; k < width; k += LANES) f(load(x + row * width + k, first_lanes(width - k)), k);
        };
        if (is_half) pass(static_cast<const half*>(data));
        else pass(static_cast<const float*>(data));
    }
};

// One row as bytes; returns what they are to be multiplied by.
float quantized(const std::vector<Part>& parts, int64_t row, uint8_t* q) {
    return ::quantized([&](auto f) ALWAYS {
        int64_t first = 0;
        for (const Part& part : parts) {
            part.vectors(row, [&](__m512 x, int64_t k) ALWAYS { f(x, first + k); });
            first += part.width;
        }
    }, q);
}

// x / (1 + e^-u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3), which is GELU's form with the hyperbolic tangent.
INLINE __m512 gelu(__m512 x) {
    __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1));
    __m512 power = power_of_two(_mm512_mul_ps(_mm512_mul_ps(x, cubic), _mm512_set1_ps(-1.5957691f * LOG2E)));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

template <class T, bool GELU>
struct Layer {
    int64_t rows, inner, columns, stride;  // of x [rows, inner], of y [rows, columns], of the quantized rows in bytes
    const int8_t* panels;
    const float *scale, *bias;
    T* y;

    template <int R>
    INLINE void tile(const uint8_t* q, const float* factor, const int8_t* panel, int64_t row, int64_t column, Ahead ahead) const {
        __m512i sums[R * VECTORS];
        unrolled<R * VECTORS>([&](auto i) ALWAYS { sums[i] = _mm512_loadu_si512(panel + i % VECTORS * 64); });
        unrolled<R * VECTORS>([&](auto i) ALWAYS {  // what is written at the end is on its way meanwhile
            __builtin_prefetch(y + (row + i / VECTORS) * columns + column + i % VECTORS * LANES, 1);
        });
        multiply<Bytes, R, VECTORS>(q, stride, panel + VECTORS * 64, (inner + 3) / 4, sums, ahead);
        unrolled<VECTORS>([&](auto v) ALWAYS {
            int64_t at = column + v * LANES;
            __mmask16 live = first_lanes(columns - at);
            __m512 s = load(scale + at, live), b = bias ? load(bias + at, live) : _mm512_setzero_ps();
            unrolled<R>([&](auto r) ALWAYS {
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r * VECTORS + v]), s);
                value = _mm512_fmadd_ps(value, _mm512_set1_ps(factor[r]), b);
                store(y + (row + r) * columns + at, GELU ? gelu(value) : value, live);
            });
        });
    }

    // A block of rows times one panel.
    void block(const uint8_t* q, const float* factors, int64_t first, int64_t panel) const {
        const int8_t* weights = panels + panel * panel_bytes(inner);
        int64_t count = std::min(rows - first, BLOCK);
        tiled<ROWS, 4, 2, 1>(count, [&](auto r, int64_t at) ALWAYS {
            int64_t row = first + at;
            tile<r>(q + row * stride, factors + row, weights, row, panel * PANEL, next_panel(weights, inner, at, r, count));
        });
    }
};

template <class T, bool GELU>
void run(const std::vector<Part>& x, int64_t rows, int64_t columns, const int8_t* panels, const float* scale, const float* bias, T* y) {
    int64_t inner = 0;
    for (const Part& part : x) inner += part.width;
    int64_t stride = row_bytes(inner);
    Room<uint8_t> q(rows * stride);
    Room<float> factors(rows);
    Layer<T, GELU> layer{rows, inner, columns, stride, panels, scale, bias, y};
    int64_t blocks = (rows + BLOCK - 1) / BLOCK, count = (columns + PANEL - 1) / PANEL;
    PARALLEL
    {
        EACH for (int64_t row = 0; row < rows; row++) factors.data[row] = quantized(x, row, q + row * stride);
        EACH for (int64_t i = 0; i < blocks * count; i++) layer.block(q.data, factors.data, i / count * BLOCK, i % count);
    }
}

}  // namespace

// y = act(concat(xs) W + bias). xs: contiguous [..., K_i], float32 or bfloat16, y: that of them which is wider; `packed`
// as operators.py packs it; scale and bias float32 [N]; gelu: 1 for GELU by the hyperbolic tangent, 0 for nothing.
extern "C" AOTITorchError aoti_torch_cpu_packed_w8a8(
    const AtenTensorHandle* xs, int64_t parts, AtenTensorHandle packed, AtenTensorHandle scale, const AtenTensorHandle* bias,
    int64_t gelu, AtenTensorHandle* y) {
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
        sizes.back() = factors.sizes[0];
        Tensor out = Tensor::contiguous(sizes, dtype, y);
        auto go = [&]<class T, bool GELU>(T* to, std::bool_constant<GELU>) {
            run<T, GELU>(x, rows, sizes.back(), Tensor(packed).as<int8_t>(), factors.as<float>(), bias ? Tensor(*bias).as<float>() : nullptr, to);
        };
        auto either = [&](auto* to) { gelu ? go(to, std::true_type{}) : go(to, std::false_type{}); };
        out.is_bfloat16() ? either(out.as<half>()) : either(out.as<float>());
    });
}
