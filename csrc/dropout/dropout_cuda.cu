// Adaptive dropout on a GPU: checks and launches. The formulas are dropout.h's.
//
// Bytes per element: read and written once, 8 in float32 and 4 in 16 bits, forward and backward
// alike: the mask is drawn again. A thread has 8 units (an index of the last axis) and walks down
// the rows, so that what belongs to its units, the limit of u and the scale, stays in registers,
// and so do its sums of squares; every 4 elements take one counter of the generator. A block of 256
// threads is 32 of these side by side, 256 units, and 8 rows deep: 64 KB under way a multiprocessor
// with one access of 128 bits (two in float32) a thread. Sums are taken by part of the rows and
// added in the parts' order. Units in numbers that 8 does not divide, and misaligned tensors, pass
// element by element (drop_ragged); strided ones are copied first. The key is read on the device: a
// graph replays with the key of the day.
#include <algorithm>
#include <tuple>

#include "../core/tensor.h"
#include "dropout.h"

namespace uegr {
namespace {

constexpr int width = 32, depth = 8; // a block's threads along the units and along the rows
constexpr int64_t part_rows = 64; // at least, of a part whose squares are added up on their own
constexpr int rate_threads = 1024;

struct Call {
    const char* in;
    char* out;
    Storage storage;
    int64_t rows, units, part; // part: rows of it
    const float* rates;
    const int64_t* key;
    double* sums; // [parts, units]; null: nobody asks
};

// Units [unit, unit + n) of a part of the rows.
template <int n> DEVICE void drop(const Call& c) {
    __shared__ double below[depth][width * n];
    const int64_t slabs = (c.units + width * n - 1) / (width * n), part = blockIdx.x / slabs;
    const int column = threadIdx.x % width * n, row_of_block = threadIdx.x / width;
    const int64_t unit = blockIdx.x % slabs * width * n + column,
                  end = minimum((part + 1) * c.part, c.rows);
    const RoundKeys keys(static_cast<uint64_t>(*c.key));
    int32_t limits[n];
    float scales[n];
    double sums[n] = {};
    UNROLL
    for (int j = 0; j < n; ++j) {
        const float r = unit < c.units ? c.rates[unit + j] : 0.0f;
        limits[j] = uniform_limit(r), scales[j] = keep_scale<float>(r);
    }
    for (int64_t row = part * c.part + row_of_block; unit < c.units && row < end; row += depth) {
        const int64_t l = row * c.units + unit;
        float h[n];
        if constexpr (n == 1) {
            h[0] = value_at<float>(c.in + l * bytes_of(c.storage), c.storage);
        } else if (c.storage == Storage::float32) {
            const float* at = reinterpret_cast<const float*>(c.in) + l;
            const Pack<float> low = load_last(at), high = load_last(at + 4);
            UNROLL
            for (int j = 0; j < 4; ++j) h[j] = low.x[j], h[4 + j] = high.x[j];
        } else {
            const Pack<uint16_t> pack = load_last(reinterpret_cast<const uint16_t*>(c.in) + l);
            UNROLL
            for (int j = 0; j < n; ++j)
                h[j] = c.storage == Storage::bfloat16 ? widen_bfloat16(pack.x[j])
                                                      : widen_float16(pack.x[j]);
        }
        UNROLL
        for (int j = 0; j < n; ++j) sums[j] = c.sums ? with_square(sums[j], h[j]) : 0;
        UNROLL
        for (int j = 0; j < n; j += 4) {
            const FourWords words = philox(static_cast<uint64_t>(l + j) / 4, 0, 0, keys);
            if constexpr (n == 1) {
                const uint32_t lower = l & 1 ? words.at[1] : words.at[0],
                               upper = l & 1 ? words.at[3] : words.at[2];
                h[0] = dropped(h[0], l & 2 ? upper : lower, limits[0], scales[0]);
            } else {
                UNROLL
                for (int i = 0; i < 4; ++i)
                    h[j + i] = dropped(h[j + i], words.at[i], limits[j + i], scales[j + i]);
            }
        }
        if constexpr (n == 1) {
            put_value(c.out + l * bytes_of(c.storage), c.storage, h[0]);
        } else if (c.storage == Storage::float32) {
            Pack<float> low, high;
            UNROLL
            for (int j = 0; j < 4; ++j) low.x[j] = h[j], high.x[j] = h[4 + j];
            float* at = reinterpret_cast<float*>(c.out) + l;
            store_last(at, low), store_last(at + 4, high);
        } else {
            Pack<uint16_t> pack;
            UNROLL
            for (int j = 0; j < n; ++j)
                pack.x[j] =
                    c.storage == Storage::bfloat16 ? round_bfloat16(h[j]) : round_float16(h[j]);
            store_last(reinterpret_cast<uint16_t*>(c.out) + l, pack);
        }
    }
    if (!c.sums) return;
    UNROLL
    for (int j = 0; j < n; ++j) below[row_of_block][column + j] = sums[j];
    __syncthreads();
    for (int j = threadIdx.x; j < width * n; j += width * depth) {
        const int64_t to = blockIdx.x % slabs * width * n + j;
        double total = 0;
        for (int k = 0; k < depth; ++k) total += below[k][j];
        if (to < c.units) c.sums[part * c.units + to] = total;
    }
}
__global__ void __launch_bounds__(width* depth) drop_full(Call call) { drop<8>(call); }
__global__ void __launch_bounds__(width* depth) drop_ragged(Call call) { drop<1>(call); }

__global__ void __launch_bounds__(256)
    add_parts(const double* sums, int64_t parts, int64_t units, float* squares) {
    const int64_t unit = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (unit >= units) return;
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += sums[part * units + unit];
    squares[unit] = static_cast<float>(total);
}

// The rates, after what backwards left in `pending` is folded into n. One block.
__global__ void __launch_bounds__(rate_threads)
    find_rates(float* n, float* pending, float* rates, int64_t units, double p, double max_p,
               double momentum, bool fold) {
    __shared__ double room[64];
    BlockGroup group(room);
    auto each = [&](auto f) {
        for (int64_t j = threadIdx.x; j < units; j += blockDim.x) f(j);
    };
    auto sum = [&](auto f) {
        double sums[1] = {};
        each([&](int64_t j) { sums[0] += f(j); });
        group.join(sums, 0.0, [](double a, double b) { return a + b; });
        return sums[0];
    };
    if (fold) {
        const bool some = sum([&](int64_t j) { return pending[j] > 0 ? 1.0 : 0.0; }) > 0;
        const bool first = sum([&](int64_t j) { return n[j] == 0 ? 0.0 : 1.0; }) == 0;
        each([&](int64_t j) {
            if (some) n[j] = moved_norm(n[j], pending[j], momentum, first);
            pending[j] = 0;
        });
    }
    const bool unseen = sum([&](int64_t j) { return n[j] == 0 ? 0.0 : 1.0; }) == 0;
    const float mean = static_cast<float>(
        sum([&](int64_t j) { return static_cast<double>(n[j]); }) / static_cast<double>(units));
    each([&](int64_t j) {
        rates[j] = unseen ? static_cast<float>(p) : dropout_rate(n[j], mean, p, max_p);
    });
}

void check_floats(const View& v, const char* name) {
    if (v.storage == Storage::float64) throw LeftToOthers();
    STD_TORCH_CHECK(v.storage == Storage::float32 && v.dim == 1 && v.contiguous, name,
                    " must be float32 or float64, with one contiguous axis");
}

// `in` dropped into a fresh tensor, and with `squares` the sums of squares of its units.
Tensor drop(const Tensor& given, const char* name, const Tensor& rates, const Tensor& key,
            Tensor* squares) {
    const View source = view(given, name, false), r = view(rates, "rates", false);
    STD_TORCH_CHECK(source.storage != Storage::boolean, name,
                    " is bool; use float32, bfloat16, float16 or float64");
    if (source.storage == Storage::float64) throw LeftToOthers();
    check_floats(r, "rates");
    STD_TORCH_CHECK(source.dim > 0 && r.sizes[0] == source.sizes[source.dim - 1],
                    "rates must have one number for each index of ", name, "'s last axis");
    STD_TORCH_CHECK((key.is_cuda() || !on_gpu) && key.numel() == 1 &&
                        key.scalar_type() == ScalarType::Long,
                    "key must be an int64 on the GPU");
    const Place place(given);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    const Tensor in = source.contiguous ? given : torch::stable::contiguous(given);
    Tensor out = torch::stable::new_empty(in, in.sizes());
    Call call{static_cast<const char*>(in.data_ptr()),
              static_cast<char*>(out.mutable_data_ptr()),
              source.storage,
              0,
              r.sizes[0],
              0,
              static_cast<const float*>(rates.data_ptr()),
              static_cast<const int64_t*>(key.const_data_ptr()),
              nullptr};
    call.rows = call.units ? in.numel() / call.units : 0;
    const bool full = call.units % 8 == 0 && reinterpret_cast<uintptr_t>(call.in) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
    const int64_t slab = full ? 8 * width : width, slabs = (call.units + slab - 1) / slab;
    const int64_t wanted = maximum<int64_t>(
        1, 8 * attribute_of_device(cudaDevAttrMultiProcessorCount) / maximum<int64_t>(slabs, 1));
    call.part = maximum(part_rows, (call.rows + wanted - 1) / wanted);
    const int64_t parts = (call.rows + call.part - 1) / call.part;
    Tensor sums =
        torch::stable::new_empty(rates, {squares ? parts * call.units : 0}, ScalarType::Double);
    if (squares) call.sums = static_cast<double*>(sums.mutable_data_ptr());
    launch(full ? drop_full : drop_ragged, {slabs * parts, width * depth}, stream, call);
    if (squares)
        launch(add_parts, {(call.units + 255) / 256, 256}, stream, call.sums, parts, call.units,
               static_cast<float*>(squares->mutable_data_ptr()));
    return out;
}

} // namespace

static Tensor adaptive_dropout(Tensor h, Tensor rates, Tensor key, Tensor) {
    return drop(h, "h", rates, key, nullptr);
}

static std::tuple<Tensor, Tensor> adaptive_dropout_backward(Tensor grad, Tensor rates, Tensor key) {
    Tensor squares = torch::stable::new_empty(rates, rates.sizes());
    Tensor gradient = drop(grad, "grad", rates, key, &squares);
    return {gradient, squares};
}

static Tensor dropout_rates_(Tensor gradient_norm, Tensor pending, double p, double max_p,
                             double momentum, bool fold) {
    const View n = view(gradient_norm, "gradient_norm", true),
               squares = view(pending, "pending", true);
    STD_TORCH_CHECK(
        n.dim == 1 && squares.dim == 1 && n.sizes[0] == squares.sizes[0] &&
            n.storage == squares.storage,
        "gradient_norm and pending must have one axis of the same size, and the same dtype");
    check_floats(n, "gradient_norm"), check_floats(squares, "pending");
    const Place place(gradient_norm);
    Tensor rates = torch::stable::new_empty(gradient_norm, gradient_norm.sizes());
    if (n.sizes[0] == 0) return rates;
    launch(find_rates, {1, rate_threads}, static_cast<cudaStream_t>(place.stream),
           reinterpret_cast<float*>(n.data), reinterpret_cast<float*>(squares.data),
           static_cast<float*>(rates.mutable_data_ptr()), n.sizes[0], p, max_p, momentum, fold);
    return rates;
}

EXPORT_BOXED(adaptive_dropout)
EXPORT_BOXED(adaptive_dropout_backward)
EXPORT_BOXED(dropout_rates_)

} // namespace uegr
