// Adaptive dropout on a GPU: launches. The formulas are dropout.h's, the checks arguments.h's; the
// plan stands in docs/design.md.
#include <algorithm>
#include <tuple>

#include "../core/tensor.h"
#include "arguments.h"
#include "dropout.h"

namespace uegr {
namespace {

// a block's threads along the units and along the rows
constexpr int width = 32, depth = 8;
// at least, of a part whose squares are added up on their own
constexpr int64_t part_rows = 64;
constexpr int rate_threads = 1024;

struct Call {
    const char* in;
    char* out;
    Storage storage;
    // part: rows of it
    int64_t rows, units, part;
    const float* rates;
    const int64_t* key;
    double* sums; // [parts, units]
};

// Holds what a thread takes of a row at a time: whole accesses of one dtype, or an element of any.
template <Storage storage> struct Full {
    static constexpr int count = 8;
    struct Raw {
        Pack<uint32_t> part[storage == Storage::float32 ? 2 : 1];
    };
    // bytes of an element
    static constexpr int parts = sizeof(Raw) / 16, size = 2 * parts;

    static DEVICE Raw load(const Call& c, int64_t l) {
        Raw raw;
        const uint32_t* at = reinterpret_cast<const uint32_t*>(c.in + l * size);
        UNROLL
        for (int i = 0; i < parts; ++i) raw.part[i] = load_last(at + 4 * i);
        return raw;
    }
    static DEVICE void store(const Call& c, int64_t l, const Raw& raw) {
        uint32_t* at = reinterpret_cast<uint32_t*>(c.out + l * size);
        UNROLL
        for (int i = 0; i < parts; ++i) store_last(at + 4 * i, raw.part[i]);
    }
    static DEVICE void get(const Raw& raw, float (&h)[count]) {
        UNROLL
        for (int i = 0; i < parts; ++i) widen<storage>(raw.part[i], h + 4 * i);
    }
    static DEVICE void put(Raw& raw, const float (&h)[count]) {
        UNROLL
        for (int i = 0; i < parts; ++i) raw.part[i] = narrowed<storage>(h + 4 * i);
    }
};
struct Ragged {
    static constexpr int count = 1;
    using Raw = float;
    static DEVICE Raw load(const Call& c, int64_t l) {
        return value_at<float>(c.in + l * bytes_of(c.storage), c.storage);
    }
    static DEVICE void store(const Call& c, int64_t l, Raw raw) {
        put_value(c.out + l * bytes_of(c.storage), c.storage, raw);
    }
    static DEVICE void get(Raw raw, float (&h)[1]) { h[0] = raw; }
    static DEVICE void put(Raw& raw, const float (&h)[1]) { raw = h[0]; }
};

// Units [unit, unit + n) of a part of the rows; `counts`: squares are added up.
template <class Access, bool counts> DEVICE void drop(const Call& c) {
    constexpr int n = Access::count;
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
        typename Access::Raw raw = Access::load(c, l);
        float h[n];
        Access::get(raw, h);
        if constexpr (counts) {
            UNROLL
            for (int j = 0; j < n; ++j) sums[j] = with_square(sums[j], h[j]);
        }
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
        Access::put(raw, h);
        Access::store(c, l, raw);
    }
    if constexpr (counts) {
        __shared__ double below[depth][width * n];
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
}
// Four blocks or more, for the loads under way: without a bound the sums leave room for two.
template <Storage storage, bool counts>
__global__ void __launch_bounds__(width* depth, counts ? 4 : 5)
    drop_full(const __grid_constant__ Call call) {
    drop<Full<storage>, counts>(call);
}
template <bool counts>
__global__ void __launch_bounds__(width* depth) drop_ragged(const __grid_constant__ Call call) {
    drop<Ragged, counts>(call);
}
template <bool counts> auto kernel_for(bool full, Storage storage) -> void (*)(Call) {
    if (!full) return drop_ragged<counts>;
    return storage == Storage::float32    ? drop_full<Storage::float32, counts>
           : storage == Storage::bfloat16 ? drop_full<Storage::bfloat16, counts>
                                          : drop_full<Storage::float16, counts>;
}

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

void check_contiguous(const View& v, const char* name) {
    STD_TORCH_CHECK(v.contiguous, name,
                    " must be float32 or float64, with one contiguous axis; call .contiguous()");
}

} // namespace

static void drop(const DropoutArguments& arguments, const Tensor& out, const Tensor* squares) {
    check_contiguous(arguments.rates, "rates");
    const DeviceGuard device(arguments.tensor);
    const Tensor in =
        arguments.in.contiguous ? arguments.tensor : torch::stable::contiguous(arguments.tensor);
    Call call{};
    call.in = static_cast<const char*>(in.data_ptr());
    call.out = static_cast<char*>(out.mutable_data_ptr());
    call.storage = arguments.in.storage;
    call.units = arguments.units;
    call.rows = call.units ? arguments.size / call.units : 0;
    call.rates = reinterpret_cast<const float*>(arguments.rates.data);
    call.key = arguments.key;
    const bool full = call.units % 8 == 0 && reinterpret_cast<uintptr_t>(call.in) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(call.out) % 16 == 0;
    const int64_t slab = full ? 8 * width : width, slabs = (call.units + slab - 1) / slab;
    const int64_t wanted = maximum<int64_t>(
        1, 8 * attribute_of_device(cudaDevAttrMultiProcessorCount) / maximum<int64_t>(slabs, 1));
    call.part = maximum(part_rows, (call.rows + wanted - 1) / wanted);
    const int64_t parts = (call.rows + call.part - 1) / call.part;
    Tensor sums =
        torch::stable::new_empty(in, {squares ? parts * call.units : 0}, ScalarType::Double);
    if (squares) call.sums = static_cast<double*>(sums.mutable_data_ptr());
    launch(squares ? kernel_for<true>(full, call.storage) : kernel_for<false>(full, call.storage),
           {slabs * parts, width * depth}, device.stream, call);
    if (squares)
        launch(add_parts, {(call.units + 255) / 256, 256}, device.stream, call.sums, parts,
               call.units, static_cast<float*>(squares->mutable_data_ptr()));
}

static void set_rates(const RatesArguments& arguments, const Tensor& rates) {
    check_contiguous(arguments.norm, "gradient_norm");
    check_contiguous(arguments.pending, "pending");
    const DeviceGuard device(rates);
    launch(find_rates, {1, rate_threads}, device.stream,
           reinterpret_cast<float*>(arguments.norm.data),
           reinterpret_cast<float*>(arguments.pending.data),
           static_cast<float*>(rates.mutable_data_ptr()), arguments.units, arguments.p,
           arguments.max_p, arguments.momentum, arguments.fold);
}

} // namespace uegr
