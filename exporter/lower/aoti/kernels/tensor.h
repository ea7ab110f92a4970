// AOTInductor's handles of tensors, as compiled models pass them: torch's stable C interface and nothing else of torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <numeric>
#include <stdexcept>
#include <vector>

inline void must(AOTITorchError error) {
    if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch refused a call of its C interface");
}

struct Tensor {
    void* data;
    int32_t dtype;
    std::vector<int64_t> sizes, strides;

    explicit Tensor(AtenTensorHandle handle) {
        int64_t dims, *at;
        must(aoti_torch_get_data_ptr(handle, &data));
        must(aoti_torch_get_dtype(handle, &dtype));
        must(aoti_torch_get_dim(handle, &dims));
        must(aoti_torch_get_sizes(handle, &at));
        sizes.assign(at, at + dims);
        must(aoti_torch_get_strides(handle, &at));
        strides.assign(at, at + dims);
    }

    // A new tensor on the CPU, owned by whom `made` is given to.
    static Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype, AtenTensorHandle* made) {
        must(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, made));
        return Tensor(*made);
    }

    static Tensor contiguous(const std::vector<int64_t>& sizes, int32_t dtype, AtenTensorHandle* made) {
        std::vector<int64_t> strides(sizes.size(), 1);
        for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
        return empty(sizes, strides, dtype, made);
    }

    bool is_bfloat16() const { return dtype == aoti_torch_dtype_bfloat16(); }
    int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>()); }
    template <class T>
    T* as() const { return static_cast<T*>(data); }
};

// No exception may leave a C function.
template <class F>
AOTITorchError guarded(F f) {
    try {
        f();
        return AOTI_TORCH_SUCCESS;
    } catch (...) {
        return AOTI_TORCH_FAILURE;
    }
}
