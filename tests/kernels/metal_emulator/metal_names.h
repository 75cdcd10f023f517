// The names that a Metal kernel finds taken: what metal_emulator.h and metal_spaces.h do not emulate of the standard
// library (chapter 6 of the Metal Shading Language Specification), and what MLX's utils.h declares before the kernels.
// Functions are deleted: a call does not compile, and one of the same name and arguments outside of namespace metal,
// which MLX makes visible as a whole, makes calls ambiguous, here as on a Mac.
#pragma once

#define kernel      // keywords of Metal, no names
#define vertex
#define fragment

#define METAL_FUNC inline
#define MAXFLOAT 3.402823466e+38f
#define HUGE_VALF __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_EPSILON 1.192092896e-07f
#define FLT_MAX MAXFLOAT
#define FLT_MIN 1.175494351e-38f
#define CHAR_BIT 8
#define M_E_F 2.71828182845904523536f
#define M_PI_F 3.14159265358979323846f

#define REST_1(name) half name(half) = delete; bfloat name(bfloat) = delete;
#define REST_2(name) half name(half, half) = delete; bfloat name(bfloat, bfloat) = delete;
#define REST_3(name) half name(half, half, half) = delete; bfloat name(bfloat, bfloat, bfloat) = delete;
#define FLOATS_1(name) float name(float) = delete; REST_1(name)
#define FLOATS_2(name) float name(float, float) = delete; REST_2(name)
#define FLOATS_3(name) float name(float, float, float) = delete; REST_3(name)
#define TEST_1(name) bool name(float) = delete; bool name(half) = delete; bool name(bfloat) = delete;
#define TEST_2(name) bool name(float, float) = delete; bool name(half, half) = delete;
#define OTHER_INTS(M, name) \
  M(name, int8_t) M(name, uchar) M(name, short) M(name, ushort) M(name, uint) M(name, long) M(name, ulong)
#define INTS(M, name) M(name, int) OTHER_INTS(M, name)
#define NUMBERS(M, name) INTS(M, name) M(name, float) M(name, half) M(name, bfloat)
#define OF_1(name, T) T name(T) = delete;
#define OF_2(name, T) T name(T, T) = delete;
#define OF_3(name, T) T name(T, T, T) = delete;
#define VECTORS(M, name) \
  M(name, float, float2) M(name, float, float3) M(name, float, float4) M(name, half, half2) M(name, half, half4)
#define NUMBER_OF_VECTOR(name, T, V) T name(V) = delete;
#define NUMBER_OF_VECTORS(name, T, V) T name(V, V) = delete;
#define VECTOR_OF_VECTOR(name, T, V) V name(V) = delete;
#define VECTOR_OF_VECTORS(name, T, V) V name(V, V) = delete;
#define ANY(name) template <typename... Arguments> void name(Arguments...) = delete;
#define TYPE(name) template <typename... Arguments> struct name;

namespace metal {

using float2 = vec<float, 2>;
using float3 = vec<float, 3>;
using float4 = vec<float, 4>;
using half2 = vec<half, 2>;
using half3 = vec<half, 3>;

// 6.2 common functions, of float
REST_3(clamp) FLOATS_3(mix) FLOATS_1(saturate) FLOATS_1(sign) FLOATS_3(smoothstep) FLOATS_2(step)

// 6.3 integers
INTS(OF_1, abs) INTS(OF_2, absdiff) INTS(OF_2, addsat) OTHER_INTS(OF_3, clamp) INTS(OF_1, clz) INTS(OF_1, ctz)
INTS(OF_2, hadd) INTS(OF_3, madhi) INTS(OF_3, madsat) OTHER_INTS(OF_2, max) INTS(OF_3, max3) INTS(OF_3, median3)
OTHER_INTS(OF_2, min) INTS(OF_3, min3) INTS(OF_2, mulhi) INTS(OF_1, popcount) INTS(OF_1, reverse_bits)
INTS(OF_2, rhadd) INTS(OF_2, rotate) INTS(OF_2, subsat)
int mad24(int, int, int) = delete;
uint mad24(uint, uint, uint) = delete;
int mul24(int, int) = delete;
uint mul24(uint, uint) = delete;
int extract_bits(int, uint, uint) = delete;
uint extract_bits(uint, uint, uint) = delete;
int insert_bits(int, int, uint, uint) = delete;
uint insert_bits(uint, uint, uint, uint) = delete;

// 6.4 relations
bool all(bool) = delete;
bool any(bool) = delete;
TEST_1(isfinite) TEST_1(isnan) TEST_1(isnormal) TEST_1(signbit) TEST_2(isordered) TEST_2(isunordered)
bool isinf(half) = delete;
bool isinf(bfloat) = delete;
#define SELECT(name, T) T name(T, T, bool) = delete;
NUMBERS(SELECT, select)

// 6.5 mathematics; bfloat is MLX's addition (bf16_math.h)
FLOATS_1(abs) FLOATS_1(acos) FLOATS_1(acosh) FLOATS_1(asin) FLOATS_1(asinh) FLOATS_1(atan) FLOATS_2(atan2)
FLOATS_1(atanh) FLOATS_1(ceil) FLOATS_2(copysign) FLOATS_1(cos) FLOATS_1(cosh) FLOATS_1(cospi) FLOATS_2(divide)
FLOATS_1(exp) FLOATS_1(exp2) FLOATS_1(exp10) REST_1(fabs) FLOATS_2(fdim) FLOATS_1(floor) REST_3(fma) REST_2(fmax)
FLOATS_2(max) FLOATS_3(fmax3) FLOATS_3(max3) FLOATS_3(fmedian3) FLOATS_3(median3) FLOATS_2(fmin) FLOATS_2(min)
FLOATS_3(fmin3) FLOATS_3(min3) FLOATS_2(fmod) FLOATS_1(fract) FLOATS_1(log) FLOATS_1(log2) FLOATS_1(log10)
FLOATS_2(nextafter) FLOATS_2(pow) FLOATS_2(powr) REST_1(rint) FLOATS_1(round) FLOATS_1(rsqrt) FLOATS_1(sin)
FLOATS_1(sinh) FLOATS_1(sinpi) FLOATS_1(sqrt) FLOATS_1(tan) FLOATS_1(tanh) FLOATS_1(tanpi) FLOATS_1(trunc)
float frexp(float, int&) = delete;
int ilogb(float) = delete;
float ldexp(float, int) = delete;
float modf(float, float&) = delete;
float sincos(float, float&) = delete;

namespace precise {
FLOATS_1(acos) FLOATS_1(asin) FLOATS_1(atan) FLOATS_2(atan2) REST_1(cos) FLOATS_1(cosh) REST_2(divide) REST_1(exp)
FLOATS_1(exp2) FLOATS_1(exp10) REST_1(log) FLOATS_1(log2) FLOATS_1(log10) FLOATS_2(pow) REST_1(rsqrt) REST_1(sin)
FLOATS_1(sinh) FLOATS_1(sqrt) FLOATS_1(tan) FLOATS_1(tanh)
}  // namespace precise

namespace fast {
FLOATS_1(cos) FLOATS_2(divide) FLOATS_1(exp) FLOATS_1(exp2) FLOATS_1(log) FLOATS_1(log2) FLOATS_2(pow)
FLOATS_1(rsqrt) FLOATS_1(sin) FLOATS_1(sqrt) FLOATS_1(tan) FLOATS_1(tanh)
}  // namespace fast

// 6.6 to 6.8 matrices and geometry
ANY(determinant) ANY(transpose) ANY(make_diagonal_simdgroup_matrix) ANY(simdgroup_multiply)
float3 cross(float3, float3) = delete;
VECTORS(NUMBER_OF_VECTORS, distance) VECTORS(NUMBER_OF_VECTORS, distance_squared) VECTORS(NUMBER_OF_VECTORS, dot)
VECTORS(NUMBER_OF_VECTOR, length) VECTORS(NUMBER_OF_VECTOR, length_squared) VECTORS(VECTOR_OF_VECTOR, normalize)
VECTORS(VECTOR_OF_VECTORS, reflect) ANY(faceforward) ANY(refract)

// 6.9 simdgroups and quads
#define REST_OF_SIMD_SUM(M, name) \
  M(name, int8_t) M(name, uchar) M(name, short) M(name, ushort) M(name, half) M(name, bfloat)
#define LANE(name, T) T name(T, ushort) = delete;
#define FILLED(name, T) T name(T, T, ushort) = delete;
REST_OF_SIMD_SUM(OF_1, simd_sum) REST_OF_SIMD_SUM(OF_1, simd_max) int simd_max(int) = delete;
uint simd_max(uint) = delete;
REST_OF_SIMD_SUM(LANE, simd_broadcast) int simd_broadcast(int, ushort) = delete;
uint simd_broadcast(uint, ushort) = delete;
NUMBERS(OF_1, simd_min) NUMBERS(OF_1, simd_product) INTS(OF_1, simd_and) INTS(OF_1, simd_or) INTS(OF_1, simd_xor)
NUMBERS(OF_1, simd_prefix_exclusive_sum) NUMBERS(OF_1, simd_prefix_inclusive_sum)
NUMBERS(OF_1, simd_prefix_exclusive_product) NUMBERS(OF_1, simd_prefix_inclusive_product)
NUMBERS(OF_1, simd_broadcast_first) NUMBERS(LANE, simd_shuffle) NUMBERS(LANE, simd_shuffle_down)
NUMBERS(LANE, simd_shuffle_up) NUMBERS(LANE, simd_shuffle_xor) NUMBERS(LANE, simd_shuffle_rotate_down)
NUMBERS(LANE, simd_shuffle_rotate_up) NUMBERS(FILLED, simd_shuffle_and_fill_down)
NUMBERS(FILLED, simd_shuffle_and_fill_up)
NUMBERS(OF_1, quad_sum) NUMBERS(OF_1, quad_max) NUMBERS(OF_1, quad_min) NUMBERS(OF_1, quad_product)
INTS(OF_1, quad_and) INTS(OF_1, quad_or) INTS(OF_1, quad_xor) NUMBERS(LANE, quad_broadcast)
NUMBERS(OF_1, quad_broadcast_first) NUMBERS(LANE, quad_shuffle) NUMBERS(LANE, quad_shuffle_down)
NUMBERS(LANE, quad_shuffle_up) NUMBERS(LANE, quad_shuffle_xor) NUMBERS(LANE, quad_shuffle_rotate_down)
NUMBERS(LANE, quad_shuffle_rotate_up) NUMBERS(FILLED, quad_shuffle_and_fill_down)
NUMBERS(FILLED, quad_shuffle_and_fill_up)
NUMBERS(OF_1, quad_prefix_exclusive_sum) NUMBERS(OF_1, quad_prefix_inclusive_sum)
NUMBERS(OF_1, quad_prefix_exclusive_product) NUMBERS(OF_1, quad_prefix_inclusive_product)
bool simd_all(bool) = delete;
bool simd_any(bool) = delete;
bool simd_is_first() = delete;
bool simd_is_helper_thread() = delete;
ulong simd_ballot(bool) = delete;
ulong simd_active_threads_mask() = delete;
bool quad_all(bool) = delete;
bool quad_any(bool) = delete;
bool quad_is_first() = delete;
bool quad_is_helper_thread() = delete;
ushort quad_ballot(bool) = delete;
ushort quad_active_threads_mask() = delete;
void simdgroup_barrier(mem_flags) = delete;

// 6.10 fragments
FLOATS_1(dfdx) FLOATS_1(dfdy) FLOATS_1(fwidth)
void discard_fragment() = delete;
uint get_num_samples() = delete;
float2 get_sample_position(uint) = delete;

// 6.14 packing and 6.15 atomics
#define PACKING(M) \
  M(unorm4x8) M(snorm4x8) M(unorm2x16) M(snorm2x16) M(unorm10a2) M(snorm10a2) M(unorm565)
#define PACK(kind) \
  ANY(pack_float_to_##kind) ANY(pack_half_to_##kind) ANY(unpack_##kind##_to_float) ANY(unpack_##kind##_to_half)
PACKING(PACK)
ANY(pack_float_to_srgb_unorm4x8) ANY(pack_half_to_srgb_unorm4x8) ANY(unpack_unorm4x8_srgb_to_float)
ANY(unpack_unorm4x8_srgb_to_half)
ANY(atomic_store_explicit) ANY(atomic_load_explicit) ANY(atomic_exchange_explicit) ANY(atomic_max_explicit)
ANY(atomic_min_explicit) ANY(atomic_compare_exchange_weak_explicit) ANY(atomic_fetch_add_explicit)
ANY(atomic_fetch_and_explicit) ANY(atomic_fetch_max_explicit) ANY(atomic_fetch_min_explicit)
ANY(atomic_fetch_or_explicit) ANY(atomic_fetch_sub_explicit) ANY(atomic_fetch_xor_explicit) ANY(atomic_thread_fence)

// Types
TYPE(array) TYPE(array_ref) TYPE(atomic) TYPE(atomic_bool) TYPE(atomic_int) TYPE(atomic_uint) TYPE(atomic_float)
TYPE(bool2) TYPE(bool3) TYPE(bool4) TYPE(buffer) TYPE(char2) TYPE(char3) TYPE(char4) TYPE(conditional) TYPE(depth2d)
TYPE(enable_if) TYPE(float2x2) TYPE(float3x3) TYPE(float4x4) TYPE(half2x2) TYPE(half3x3) TYPE(half4x4) TYPE(int2)
TYPE(int3) TYPE(int4) TYPE(integral_constant) TYPE(is_convertible) TYPE(is_floating_point) TYPE(is_integral)
TYPE(is_same) TYPE(long2) TYPE(long3) TYPE(long4) TYPE(matrix) TYPE(numeric_limits) TYPE(packed_float2)
TYPE(packed_float3) TYPE(packed_float4) TYPE(packed_half2) TYPE(packed_half4) TYPE(packed_vec) TYPE(sampler)
TYPE(short2) TYPE(short3) TYPE(short4) TYPE(simd_vote) TYPE(quad_vote) TYPE(simdgroup_float8x8)
TYPE(simdgroup_half8x8) TYPE(simdgroup_bfloat8x8) TYPE(texture1d) TYPE(texture2d) TYPE(texture3d) TYPE(texture_buffer)
TYPE(texturecube) TYPE(uchar2) TYPE(uchar3) TYPE(uchar4) TYPE(uint2) TYPE(ulong3) TYPE(ulong4) TYPE(ushort2)
TYPE(ushort3) TYPE(ushort4) TYPE(access) TYPE(address) TYPE(bias) TYPE(compare_func) TYPE(coord) TYPE(filter)
TYPE(gradient2d) TYPE(gradient3d) TYPE(gradientcube) TYPE(level) TYPE(memory_order) TYPE(min_lod_clamp)
TYPE(mip_filter) TYPE(thread_scope)

}  // namespace metal

using namespace metal;

// MLX's own (utils.h, bf16.h, complex.h, defines.h, logging.h)
#define MTL_CONST
#define MLX_MTL_PRAGMA_UNROLL
#define instantiate_kernel(...)
#define instantiate_default_limit(type)
#define instantiate_float_limit(type)
#define instantiate_metal_math_funcs(...)
#define instantiate_metal_simd_comm_funcs(...)
#define instantiate_metal_simd_reduction_funcs(...)
static constexpr int MAX_REDUCE_SPECIALIZED_DIMS = 4;
static constexpr int CROSS_ENTROPY_N_READS = 4;
static constexpr int REDUCE_N_READS = 4;
static constexpr int REDUCE_N_WRITES = 4;
static constexpr int SOFTMAX_N_READS = 4;
static constexpr int RMS_N_READS = 4;
static constexpr int RMS_LOOPED_LIMIT = 4096;
namespace mlx {
struct os_log;
}
TYPE(WorkPerThread) TYPE(Limits) TYPE(LoopedElemToLoc) TYPE(ConditionalType) TYPE(complex_t) TYPE(complex32_t)
TYPE(complex64_t) TYPE(is_complex_v) TYPE(is_lane_convertible_v)
ANY(elem_to_loc) ANY(elem_to_loc_1) ANY(elem_to_loc_2) ANY(elem_to_loc_3) ANY(elem_to_loc_2_nd) ANY(elem_to_loc_3_nd)
ANY(ceildiv) ANY(cast_to) ANY(schedule_row_tile)
uint16_t bfloat16_to_uint16(const bfloat) = delete;
bfloat uint16_to_bfloat16(const uint16_t) = delete;
float hypot(float, float) = delete;
float log1p(float) = delete;
bfloat log1p(bfloat) = delete;
#define SHUFFLES(name) ulong name(ulong, uint16_t) = delete; long name(long, uint16_t) = delete;
SHUFFLES(simd_shuffle) SHUFFLES(simd_shuffle_up) SHUFFLES(simd_shuffle_down)
