// The part of torch's header that DeepSpeed's optimizer on the CPU uses: a third of the whole's time.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

namespace torch {
using at::Tensor;
constexpr auto kFloat32 = at::kFloat;
}  // namespace torch
