// Rotary position embedding of numbers in pairs: (a, b) becomes (a cos - b sin, b cos + a sin).
//
// Inductor reads the two of a pair by themselves, one number at a time; here a vector of them is turned at once.
#include "product.h"
#include "tensor.h"

namespace {

// One row of d numbers.
template <class T, class U>
INLINE void turn(const T* x, const float* cosines, const float* sines, U* y, int64_t d) {
    for (int64_t i = 0; i < d; i += LANES) {
        Live live = first_lanes(d - i);
        Floats value = load(x + i, live);
        store(y + i, fma(value, load(cosines + i, live), turned(value) * load(sines + i, live)), live);
    }
}

template <class T, class U>
void all(const Tensor& x, const Tensor& cosines, const Tensor& sines, U* y) {
    const auto &n = x.sizes, &table = cosines.sizes;
    int64_t d = n[3];
    auto step = [&](int i) { return table[i] == 1 ? 0 : cosines.strides[i]; };  // a table of one row is for all
    PARALLEL
    {
        EACH for (int64_t row = 0; row < n[0] * n[1]; row++) {
            for (int64_t k = 0; k < n[2]; k++) {
                int64_t at = (row * n[2] + k) * d, in = row / n[1] * step(0) + row % n[1] * step(1) + k * step(2);
                turn(x.as<T>() + at, cosines.as<float>() + in, sines.as<float>() + in, y + at, d);
            }
        }
    }
}

}  // namespace

// x [A, B, C, D] contiguous, float32 or bfloat16, D even; cosines and sines float32, one layout for both, of which every
// length but D may be 1; y like x, in bfloat16 if `to_half`, else float32.
extern "C" AOTITorchError aoti_torch_cpu_rotary(
    AtenTensorHandle x, AtenTensorHandle cosines, AtenTensorHandle sines, int64_t to_half, AtenTensorHandle* y) {
    return guarded([&] {
        Tensor in(x), c(cosines), s(sines);
        int32_t dtype = to_half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
        Tensor out = Tensor::contiguous(in.sizes, dtype, y);
        auto from = [&]<class T>(const T*) { to_half ? all<T>(in, c, s, out.as<half>()) : all<T>(in, c, s, out.as<float>()); };
        in.is_bfloat16() ? from(in.as<half>()) : from(in.as<float>());
    });
}
