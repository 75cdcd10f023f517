// kernels.cpu._native: what Python sees.
#include <malloc.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "fused_step.h"
#include "mlx/version.h"

namespace nb = nanobind;
using namespace nb::literals;

using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Int8Matrix = nb::ndarray<const int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A layer's arrays are of megabytes, and freed before those of the next are asked for. By default glibc gives such memory
// back to the system and takes it anew, zeroed page by page: a tenth of a prefill's time.
static void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // bytes; the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, 128 << 20);
#endif
}

NB_MODULE(_native, m) {
  m.doc() = "BitLinear, attention and small float products on the CPU; see kernels/reference.py.";
  // Arrays are MLX's own Python type, so its module has to be loaded first.
  nb::module_::import_("mlx.core");

  // The version this was compiled for, which has to be the one that runs.
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.attr("sources") = BITDRAFT_SOURCES;
  m.attr("max_threads") = bitdraft::kMaxThreads;
  m.def(
      "pack_ternary",
      [](const Int8Matrix& ternary) {
        return bitdraft::pack_ternary(ternary.data(), static_cast<int64_t>(ternary.shape(0)),
                                      static_cast<int64_t>(ternary.shape(1)));
      },
      "ternary"_a);
  m.def(
      "pack_int8",
      [](const Int8Matrix& weight) {
        return bitdraft::pack_int8(weight.data(), static_cast<int64_t>(weight.shape(0)),
                                   static_cast<int64_t>(weight.shape(1)));
      },
      "weight"_a);
  m.def("quantize_rows", &bitdraft::quantize_rows, "x"_a, "norm"_a.none(), "eps"_a);
  m.def("bitlinear", &bitdraft::bitlinear, "xq"_a, "s"_a, "tiles"_a, "scale"_a, "k"_a);
  m.def("int8_product", &bitdraft::int8_product, "xq"_a, "s"_a, "tiles"_a, "scale"_a, "k"_a);
  m.def("ternary_linear", &bitdraft::ternary_linear, "x"_a, "tiles"_a, "scale"_a, "k"_a, "norm"_a.none(),
        "eps"_a, "epilogue"_a, "residual"_a.none());
  m.def("int8_linear", &bitdraft::int8_linear, "x"_a, "tiles"_a, "scale"_a, "k"_a, "norm"_a.none(), "eps"_a,
        "epilogue"_a, "residual"_a.none());
  m.def("dense_linear", &bitdraft::dense_linear, "x"_a, "weight"_a, "norm"_a.none(), "eps"_a, "epilogue"_a,
        "residual"_a.none());
  m.def("attention", &bitdraft::attention, "qkv"_a, "k_cache"_a, "v_cache"_a, "offsets"_a, "counts"_a, "heads"_a,
        "kv_heads"_a, "inverse_frequency"_a, "scale"_a);
  m.def("argmax", &bitdraft::argmax, "x"_a);
  m.def("choose", &bitdraft::choose, "logits"_a, "temperature"_a, "uniform"_a);
  m.def("top_k", &bitdraft::top_k, "logits"_a, "k"_a, "temperatures"_a);
  m.def("clock", &bitdraft::clock, "x"_a);
  nb::class_<bitdraft::Linear>(m, "Linear");
  m.def("make_linear", &bitdraft::make_linear, "data"_a, "scale"_a.none(), "n"_a, "k"_a, "norm"_a.none());
  nb::class_<bitdraft::FusedModel>(m, "FusedModel");
  m.def("fused_model", &bitdraft::fused_model, "embedding"_a, "inverse_frequency"_a, "heads"_a, "kv_heads"_a,
        "scale"_a, "epilogue"_a, "eps"_a, "before"_a, "layers"_a, "after"_a);
  m.def("fused_step", &bitdraft::fused_step, "model"_a, "tokens"_a, "caches"_a, "offset"_a, "taps"_a);
  m.def("choose_tokens", &bitdraft::choose_tokens, "model"_a, "tokens"_a, "caches"_a, "sequences"_a, "offsets"_a,
        "temperature"_a, "uniform"_a);
  m.def("greedy_tokens", &bitdraft::greedy_tokens, "model"_a, "tokens"_a, "states"_a, "caches"_a, "offset"_a,
        "count"_a, "d2t"_a.none());
  m.def("isa", [] { return std::string(bitdraft::kernels().name); });
  m.def("available_isas", &bitdraft::available_isas);
  m.def("select_isa", &bitdraft::select_isa, "name"_a);
  m.def("threads", &bitdraft::threads);
  m.def("take_short_slices", &bitdraft::take_short_slices);
  m.def("keep_freed_memory", &keep_freed_memory);
  m.def("set_threads", &bitdraft::set_threads, "count"_a);
  m.def(
      "parallel_sum",
      [](int chunks) {
        std::vector<int64_t> parts(static_cast<size_t>(chunks));
        bitdraft::parallel_for(chunks, [&](int c) { parts[static_cast<size_t>(c)] = c + 1; });
        int64_t sum = 0;
        for (int64_t part : parts) {
          sum += part;
        }
        return sum;
      },
      "chunks"_a);
  m.def("install_blas", &bitdraft::install_blas, "path"_a);
  m.def("blas_installed", &bitdraft::blas_installed);
  m.def(
      "matmul",
      [](const FloatMatrix& a, const FloatMatrix& b, const nb::ndarray<float, nb::ndim<2>, nb::device::cpu>& out) {
        const auto matrix = [](const FloatMatrix& x) {
          return bitdraft::Matrix<float>(x.data(), static_cast<int64_t>(x.shape(0)), static_cast<int64_t>(x.shape(1)),
                                         x.stride(0), x.stride(1));
        };
        bitdraft::require(a.shape(1) == b.shape(0) && out.shape(0) == a.shape(0) && out.shape(1) == b.shape(1),
                          "the shapes do not fit: [m, k] [k, n] -> [m, n]");
        bitdraft::require(out.stride(1) == 1 || out.shape(1) == 1, "the result must have its rows contiguous");
        nb::gil_scoped_release release;
        bitdraft::matmul(matrix(a), matrix(b), out.data(), out.stride(0));
      },
      "a"_a, "b"_a, "out"_a);
}
