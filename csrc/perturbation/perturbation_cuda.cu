// The perturbing operators on a GPU: launches. The formulas are perturbation.h's, the checks
// arguments.h's; the plan stands in docs/design.md.
#include <algorithm>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "perturbation.h"

namespace uegr {
namespace {

constexpr int64_t piece_size = 1 << 14;
constexpr int threads = 256;

// One tensor of a call; none is empty.
struct Entry {
    Slot g, x, out; // out = x + step along g; no data: x is 0
    int64_t size = 0, length = 0, first_piece = 0, first_group = 0;
    int64_t stream = 0;

    HOST_DEVICE int64_t pieces() const {
        return (length + piece_size - 1) / piece_size;
    } // of a group
    HOST_DEVICE int64_t groups() const { return size / length; }
};

struct Call {
    Norm norm = Norm::l2;
    double epsilon = 0, radius = HUGE_VAL;
    bool projects = false;
    bool together = false; // one norm over all entries
    Slot mask; // of tokens of `token` elements each
    int64_t token = 1;
    bool random = false;
    const int64_t* seed = nullptr; // on the device, or null for
    int64_t seed_value = 0;
    uint32_t step = 0;
    int32_t limit = 1 << 24;
    const Entry* entries = nullptr;
    const int64_t* axes = nullptr;
    int count = 0;
    int64_t pieces = 0, groups = 0;
    double *squares = nullptr, *direction_factors = nullptr,
           *ball_factors = nullptr; // by piece; by group
};

struct Piece {
    Entry e;
    int64_t group, begin, end;
};

// The entry whose first piece, or group, is the last that is not after `at`.
template <int64_t Entry::* first> DEVICE const Entry& entry_of(const Call& call, int64_t at) {
    int low = 0, high = call.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (call.entries[middle].*first <= at ? low : high) = middle;
    }
    return call.entries[low];
}
DEVICE Piece piece_of(const Call& call, int64_t p) {
    const Entry e = entry_of<&Entry::first_piece>(call, p);
    const int64_t group = (p - e.first_piece) / e.pieces(),
                  within = (p - e.first_piece) % e.pieces() * piece_size;
    const int64_t begin = group * e.length + within;
    return {e, e.first_group + group, begin, begin + minimum(piece_size, e.length - within)};
}

// n elements from l on: 8 that whole accesses cover, or 1.
template <int n> DEVICE void load(const Slot& from, const int64_t* axes, int64_t l, float (&x)[n]) {
    if constexpr (n == 1) {
        x[0] = value_at<float>(place_of(from, axes, l), from.storage);
    } else if (from.storage == Storage::float32) {
        const float* at = reinterpret_cast<const float*>(from.data) + l;
        const float4 low = reinterpret_cast<const float4*>(at)[0],
                     high = reinterpret_cast<const float4*>(at)[1];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y,
        x[6] = high.z, x[7] = high.w;
    } else {
        const auto pack =
            bit_cast<Pack<uint16_t>>(*reinterpret_cast<const float4*>(from.data + 2 * l));
        UNROLL
        for (int j = 0; j < n; ++j)
            x[j] = from.storage == Storage::bfloat16 ? widen_bfloat16(pack.x[j])
                                                     : widen_float16(pack.x[j]);
    }
}
template <int n>
DEVICE void store(const Slot& to, const int64_t* axes, int64_t l, const float (&x)[n]) {
    if constexpr (n == 1) {
        put_value(place_of(to, axes, l), to.storage, x[0]);
    } else if (to.storage == Storage::float32) {
        float4* at = reinterpret_cast<float4*>(reinterpret_cast<float*>(to.data) + l);
        at[0] = {x[0], x[1], x[2], x[3]}, at[1] = {x[4], x[5], x[6], x[7]};
    } else {
        Pack<uint16_t> pack;
        UNROLL
        for (int j = 0; j < n; ++j)
            pack.x[j] =
                to.storage == Storage::bfloat16 ? round_bfloat16(x[j]) : round_float16(x[j]);
        *reinterpret_cast<float4*>(to.data + 2 * l) = bit_cast<float4>(pack);
    }
}

// g with zeros where the mask has them.
template <int n, bool masked>
DEVICE void gradient(const Call& call, const Entry& e, int64_t l, float (&g)[n]) {
    load(e.g, call.axes, l, g);
    if constexpr (masked) {
        const bool real =
            !call.mask.data ||
            value_at<float>(place_of(call.mask, call.axes, l / call.token), call.mask.storage) != 0;
        UNROLL
        for (int j = 0; j < n; ++j) g[j] = real ? g[j] : 0;
    }
}

// Calls use(l, y): y are the n elements from l on of x + b * step, in double; without x in float
// where that will do.
template <int n, bool masked, Norm norm, class Use>
DEVICE void move(const Call& call, const Piece& piece, Use use) {
    const Entry& e = piece.e;
    const double factor = call.direction_factors[piece.group];
    const bool single = !e.x.data && fits_float(factor);
    const RoundKeys keys(static_cast<uint64_t>(call.seed ? *call.seed : call.seed_value));
    for (int64_t l = piece.begin + n * threadIdx.x; l < piece.end; l += n * threads) {
        float g[n], x[n] = {};
        double y[n];
        gradient<n, masked>(call, e, l, g);
        if (e.x.data) load(e.x, call.axes, l, x);
        UNROLL
        for (int j = 0; j < n; ++j)
            y[j] = single ? static_cast<double>(step_along<norm>(g[j], static_cast<float>(factor)))
                          : step_along<norm, double>(g[j], factor);
        if (call.random) {
            UNROLL
            for (int j = 0; j < n; j += 4) {
                const FourWords words = philox(static_cast<uint64_t>(l + j) / 4, call.step,
                                               static_cast<uint32_t>(e.stream), keys);
                if constexpr (n == 1) {
                    const uint32_t lower = l & 1 ? words.at[1] : words.at[0],
                                   upper = l & 1 ? words.at[3] : words.at[2];
                    y[0] = uegr::kept(y[0], l & 2 ? upper : lower, call.limit);
                } else {
                    UNROLL
                    for (int i = 0; i < 4; ++i)
                        y[j + i] = uegr::kept(y[j + i], words.at[i], call.limit);
                }
            }
        }
        if (e.x.data) {
            UNROLL
            for (int j = 0; j < n; ++j) y[j] = static_cast<double>(x[j]) + y[j];
        }
        use(l, y);
    }
}

template <int n, bool masked> DEVICE void sum_gradient(const Call& call) {
    __shared__ double room[warp_size];
    const Piece piece = piece_of(call, blockIdx.x);
    double sum = 0;
    for (int64_t l = piece.begin + n * threadIdx.x; l < piece.end; l += n * threads) {
        float g[n];
        gradient<n, masked>(call, piece.e, l, g);
        UNROLL
        for (int j = 0; j < n; ++j) sum += square(g[j]);
    }
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) call.squares[blockIdx.x] = sum;
}
template <int n, bool masked, Norm norm> DEVICE void sum_moved(const Call& call) {
    __shared__ double room[warp_size];
    double sum = 0;
    move<n, masked, norm>(call, piece_of(call, blockIdx.x), [&](int64_t, const double (&y)[n]) {
        UNROLL
        for (int j = 0; j < n; ++j) sum += square(y[j]);
    });
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) call.squares[blockIdx.x] = sum;
}
template <int n, bool masked, Norm norm> DEVICE void write(const Call& call, int64_t first_piece) {
    const Piece piece = piece_of(call, first_piece + blockIdx.x);
    // A weight that does not move is left alone.
    if (!call.projects && piece.e.out.data == piece.e.x.data &&
        call.direction_factors[piece.group] == 0)
        return;
    const double factor = call.projects && norm == Norm::l2 ? call.ball_factors[piece.group] : 1;
    move<n, masked, norm>(call, piece, [&](int64_t l, const double (&y)[n]) {
        float result[n];
        UNROLL
        for (int j = 0; j < n; ++j)
            result[j] = static_cast<float>(
                call.projects ? projected<norm>(y[j], factor, call.radius) : y[j]);
        store(piece.e.out, call.axes, l, result);
    });
}

__global__ void __launch_bounds__(threads) squares_full(const __grid_constant__ Call call) {
    sum_gradient<8, false>(call);
}
__global__ void __launch_bounds__(threads) squares_masked(const __grid_constant__ Call call) {
    sum_gradient<8, true>(call);
}
__global__ void __launch_bounds__(threads) squares_ragged(const __grid_constant__ Call call) {
    sum_gradient<1, true>(call);
}
template <Norm norm>
__global__ void __launch_bounds__(threads) moved_full(const __grid_constant__ Call call) {
    sum_moved<8, false, norm>(call);
}
template <Norm norm>
__global__ void __launch_bounds__(threads) moved_masked(const __grid_constant__ Call call) {
    sum_moved<8, true, norm>(call);
}
template <Norm norm>
__global__ void __launch_bounds__(threads) moved_ragged(const __grid_constant__ Call call) {
    sum_moved<1, true, norm>(call);
}
template <Norm norm>
__global__ void __launch_bounds__(threads)
    move_full(const __grid_constant__ Call call, int64_t first_piece) {
    write<8, false, norm>(call, first_piece);
}
template <Norm norm>
__global__ void __launch_bounds__(threads)
    move_masked(const __grid_constant__ Call call, int64_t first_piece) {
    write<8, true, norm>(call, first_piece);
}
template <Norm norm>
__global__ void __launch_bounds__(threads)
    move_ragged(const __grid_constant__ Call call, int64_t first_piece) {
    write<1, true, norm>(call, first_piece);
}

// The factor of each group from its pieces' sums, in their order; a warp for each, its lanes 32
// apart.
__global__ void __launch_bounds__(threads)
    find_factors(const __grid_constant__ Call call, bool of_ball) {
    const int64_t group = int64_t(blockIdx.x) * (threads / warp_size) + threadIdx.x / warp_size;
    if (group >= call.groups) return;
    const Entry& e = entry_of<&Entry::first_group>(call, group);
    const int64_t pieces = call.together ? call.pieces : e.pieces();
    const int64_t first = call.together ? 0 : e.first_piece + (group - e.first_group) * pieces;
    double total = 0;
    for (int64_t p = threadIdx.x % warp_size; p < pieces; p += warp_size)
        total += call.squares[first + p];
    total = warp_sum(total);
    if (threadIdx.x % warp_size != 0) return;
    if (of_ball) call.ball_factors[group] = ball_factor(total, call.radius);
    else call.direction_factors[group] = direction_factor(total, call.epsilon, call.norm);
}

// --- The host's side ---

bool covered(const Slot& s) { return s.axes < 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0; }

template <Norm norm>
void run(Call& call, const std::vector<Entry>& entries, bool in_order, bool full,
         cudaStream_t stream) {
    const Shape pieces{call.pieces, threads},
        groups{(call.groups + threads / warp_size - 1) / (threads / warp_size), threads};
    launch(!full            ? squares_ragged
           : call.mask.data ? squares_masked
                            : squares_full,
           pieces, stream, call);
    launch(find_factors, groups, stream, call, false);
    if (call.projects && norm == Norm::l2) {
        launch(!full            ? moved_ragged<norm>
               : call.mask.data ? moved_masked<norm>
                                : moved_full<norm>,
               pieces, stream, call);
        launch(find_factors, groups, stream, call, true);
    }
    const auto step = !full            ? move_ragged<norm>
                      : call.mask.data ? move_masked<norm>
                                       : move_full<norm>;
    if (!in_order) return launch(step, pieces, stream, call, int64_t(0));
    for (const Entry& e : entries)
        launch(step, {e.groups() * e.pieces(), threads}, stream, call, e.first_piece);
}

} // namespace

static void perturb(const PerturbationArguments& arguments, const Tensor& like) {
    Call call;
    call.norm = arguments.norm, call.epsilon = arguments.epsilon, call.radius = arguments.radius;
    call.projects = arguments.projects, call.together = arguments.together;
    call.random = arguments.random, call.step = arguments.step, call.limit = arguments.limit;
    call.seed = arguments.seed_on_gpu, call.seed_value = arguments.seed;
    AxesTable table;
    call.mask = table.slot(arguments.mask), call.token = arguments.token;
    std::vector<Entry> entries;
    bool full = !call.mask.data || call.token % 8 == 0;
    for (const PerturbedTensor& t : arguments.tensors) {
        Entry e{table.slot(t.g), table.slot(t.x), table.slot(t.out), t.size, t.length};
        e.first_piece = call.pieces, e.first_group = call.groups, e.stream = t.stream;
        call.pieces += e.groups() * e.pieces(), call.groups += e.groups();
        full &= covered(e.g) && covered(e.x) && covered(e.out) && e.length % 8 == 0;
        entries.push_back(e);
    }
    call.count = static_cast<int>(entries.size());
    const DeviceGuard device(like);
    const size_t entry_bytes = entries.size() * sizeof(Entry),
                 axes_bytes = table.axes.size() * sizeof(int64_t);
    std::vector<char> bytes(entry_bytes + axes_bytes);
    memcpy(bytes.data(), entries.data(), entry_bytes),
        memcpy(bytes.data() + entry_bytes, table.axes.data(), axes_bytes);
    Tensor uploaded =
        torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
    upload(bytes, uploaded, device.stream);
    const char* at = static_cast<const char*>(uploaded.data_ptr());
    call.entries = reinterpret_cast<const Entry*>(at);
    call.axes = reinterpret_cast<const int64_t*>(at + entry_bytes);
    Tensor sums =
        torch::stable::new_empty(like, {call.pieces + 2 * call.groups}, ScalarType::Double);
    call.squares = static_cast<double*>(sums.mutable_data_ptr());
    call.direction_factors = call.squares + call.pieces,
    call.ball_factors = call.direction_factors + call.groups;
    const auto go = call.norm == Norm::l2 ? run<Norm::l2> : run<Norm::linf>;
    go(call, entries, arguments.in_order, full, device.stream);
}

} // namespace uegr
