// The losses on a GPU: launches. The formulas are divergence.h's, the checks arguments.h's; the
// plan and what it rests on stand in docs/design.md.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "long_rows.cuh"
#include "many_rows.cuh"
#include "short_rows.cuh"
#include "sweep.cuh"

namespace uegr {
namespace {

// --- Before and after the rows ---

// By one block, whose threads all have the count afterwards.
DEVICE void count(const LossBatch& batch, double* room, int64_t* count) {
    double rows[1] = {};
    for (int64_t n = threadIdx.x; n < batch.samples; n += blockDim.x)
        rows[0] += batch.ignored(n) ? 0 : 1;
    BlockGroup(room).join(rows, 0.0, added<double>);
    if (threadIdx.x == 0) *count = static_cast<int64_t>(rows[0]);
    __syncthreads();
}
DEVICE void finish(const LossBatch& batch, double* room, float* loss, float* parts) {
    const bool by_row = batch.options.reduction == Reduction::none;
    double sums[3] = {};
    auto put = [&](int64_t n, int64_t rows, const double* v) {
        loss[n] = static_cast<float>(v[0] + v[1] + batch.options.js_weight * v[2]);
        UNROLL
        for (int k = 0; k < 3; ++k) parts[k * rows + n] = static_cast<float>(v[k]);
    };
    for (int64_t n = threadIdx.x; n < batch.samples; n += blockDim.x) {
        const double* v = batch.values + 3 * n;
        if (by_row) put(n, batch.samples, v);
        UNROLL
        for (int k = 0; k < 3; ++k) sums[k] += v[k];
    }
    if (by_row) return;
    BlockGroup(room).join(sums, 0.0, added<double>);
    const double by =
        batch.options.reduction == Reduction::mean ? static_cast<double>(*batch.count) : 1;
    UNROLL
    for (int k = 0; k < 3; ++k) sums[k] /= by;
    if (threadIdx.x == 0) put(0, 1, sums);
}
__global__ void __launch_bounds__(finish_threads)
    count_rows(const __grid_constant__ LossBatch batch, int64_t* into) {
    __shared__ double room[64];
    count(batch, room, into);
}
__global__ void __launch_bounds__(finish_threads)
    finish_loss(const __grid_constant__ LossBatch batch, float* loss, float* parts) {
    __shared__ double room[64];
    finish(batch, room, loss, parts);
}

// All of it for a small batch by one block, in one launch. Its threads see each other's counts and
// values, as barriers of the block stand between.
template <int m>
__global__ void __launch_bounds__(warp_threads)
    loss_small(const __grid_constant__ LossBatch batch, int64_t* into, float* loss, float* parts) {
    __shared__ double room[64];
    count(batch, room, into);
    over_samples<WarpGroup, RaggedColumns, m>(batch);
    __syncthreads();
    finish(batch, room, loss, parts);
}

// Gradients [.., N, C] times that of the loss, () or [N].
struct Scaling {
    Slot from, to, factor;
    int64_t size, classes, samples;
    // in place, times 1 is left alone
    bool by_row, in_place;
};
template <bool full, bool by_row> DEVICE void scale(const Scaling& s, const int64_t* axes) {
    constexpr int n = full ? columns : 1;
    auto factor_of = [&](int64_t row) {
        return value_at<float>(place_of(s.factor, axes, row), s.factor.storage);
    };
    const float of_all = by_row ? 1.0f : factor_of(0);
    if (!by_row && s.in_place && of_all == 1) return;
    for (int64_t l = n * (int64_t(blockIdx.x) * blockDim.x + threadIdx.x); l < s.size;
         l += n * int64_t(gridDim.x) * blockDim.x) {
        const float factor = by_row ? factor_of(s.by_row ? l / s.classes % s.samples : 0) : of_all;
        if (by_row && s.in_place && factor == 1) continue;
        if constexpr (full) {
            float x[columns];
            FullColumns::load({s.from.data, s.from.storage}, 0, l, s.size, x);
            UNROLL
            for (int j = 0; j < columns; ++j) x[j] *= factor;
            FullColumns::store({s.to.data, s.to.storage}, 0, l, s.size, x);
        } else {
            const float x = value_at<float>(place_of(s.from, axes, l), s.from.storage);
            put_value(place_of(s.to, axes, l), s.to.storage, x * factor);
        }
    }
}
struct Axes {
    // of up to three views with up to four axes
    int64_t at[28];
};
__global__ void __launch_bounds__(block_threads)
    scale_full(const __grid_constant__ Scaling scaling, const __grid_constant__ Axes axes) {
    scale<true, false>(scaling, axes.at);
}
__global__ void __launch_bounds__(block_threads)
    scale_rows(const __grid_constant__ Scaling scaling, const __grid_constant__ Axes axes) {
    scale<true, true>(scaling, axes.at);
}
__global__ void __launch_bounds__(block_threads)
    scale_ragged(const __grid_constant__ Scaling scaling, const __grid_constant__ Axes axes) {
    scale<false, true>(scaling, axes.at);
}

// --- The host's side ---

Rows rows_of(const View& v, int64_t pass) {
    Rows rows;
    rows.storage = v.storage, rows.row = v.strides[v.dim - 2], rows.column = v.strides[v.dim - 1];
    rows.data = v.data + (v.dim == 3 ? pass * v.strides[0] * bytes_of(v.storage) : 0);
    return rows;
}
// by whole accesses
bool covered(const Rows& rows, int64_t samples) {
    const int64_t row_bytes = rows.row * bytes_of(rows.storage);
    return !rows.data || (rows.column == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                          (row_bytes % 16 == 0 || samples <= 1));
}

LossBatch make_batch(const LossArguments& arguments) {
    if (arguments.passes > most_passes) throw LeftToOthers();
    LossBatch batch;
    batch.options = arguments.options;
    batch.samples = arguments.samples, batch.classes = arguments.classes;
    batch.first = static_cast<int>(arguments.first);
    for (const View& v : arguments.logits)
        for (int64_t pass = 0; pass < passes_of(v); ++pass)
            batch.logits[batch.passes++] = rows_of(v, pass);
    batch.indices = arguments.indices, batch.index_stride = arguments.index_stride;
    if (arguments.soft.data) batch.soft = rows_of(arguments.soft, 0);
    return batch;
}

template <class Kernel> void allow_shared(Kernel kernel, size_t bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "cudaFuncSetAttribute");
}
// More than the 8 blocks that every device with clusters takes; false where this one refuses them.
template <class Kernel> bool allow_large_cluster(Kernel kernel) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
        cudaSuccess)
        return true;
    // else the next call would be blamed
    cudaGetLastError();
    return false;
}

// Runs rows that stay on chip; false where they do not.
template <int m> bool run_on_chip(LossBatch& batch, bool full, cudaStream_t stream) {
    constexpr int64_t roles = m == 2 ? 4 : 1;
    const int64_t chunks = (batch.classes + columns - 1) / columns,
                  sms = attribute_of_device(cudaDevAttrMultiProcessorCount);
    auto kept = [&](int64_t group, int64_t keepers) {
        return (chunks + group - 1) / group * keepers * columns * int64_t(sizeof(float));
    };
    auto go = [&](auto kernel, const Shape& shape) {
        allow_shared(kernel, shape.shared);
        launch(kernel, shape, stream, batch);
        return true;
    };
    if (batch.classes <= warp_classes) {
        batch.kept = kept(warp_size, warp_size);
        constexpr int64_t warps = warp_threads / warp_size;
        const Shape shape{minimum((batch.samples + warps - 1) / warps, 16 * sms), warp_threads,
                          static_cast<size_t>(warps * roles * batch.kept)};
        return go(full ? loss_full_warp<m> : loss_ragged_warp<m>, shape);
    }
    const int64_t most = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    for (int cluster = 1; cluster <= most_cluster; cluster *= 2) {
        if (cluster > 1 && !attribute_of_device(cudaDevAttrClusterLaunch)) return false;
        batch.kept = kept(int64_t(cluster) * block_threads, block_threads);
        const int64_t bytes = static_cast<int64_t>(room_bytes) + roles * batch.kept;
        if (bytes > most) continue;
        const Shape shape{minimum(batch.samples, 4 * sms) * cluster, block_threads,
                          static_cast<size_t>(bytes), cluster};
        const auto kernel = loss_ragged_cluster<m>;
        allow_shared(kernel, shape.shared);
        // Some devices of sm_90 refuse large clusters, or all of them.
        if (cluster > 1 && ((cluster > portable_cluster && !allow_large_cluster(kernel)) ||
                            active_clusters(kernel, shape) == 0))
            return false;
        return go(kernel, shape);
    }
    return false;
}

// --- Long rows ---

// Returns whether all rows of a sample, soft labels too, have one dtype and begin at the same place
// of 16 bytes.
bool together(const LossBatch& batch) {
    const Rows& first = batch.logits[0];
    auto like_first = [&](const Rows& rows) {
        const int64_t size = bytes_of(rows.storage);
        auto place = [](const Rows& r) { return reinterpret_cast<uintptr_t>(r.data) % 16; };
        return !rows.data || (rows.storage == first.storage && rows.column == 1 &&
                              place(rows) == place(first) && place(rows) % size == 0 &&
                              (batch.samples <= 1 || (rows.row - first.row) * size % 16 == 0));
    };
    bool all = true;
    for (int pass = 0; pass < batch.passes; ++pass)
        all &= like_first(batch.logits[pass]) && like_first(batch.gradients[pass]);
    return all && like_first(batch.soft);
}

// Runs rows that stay on chip as they are in memory, `rows` of a sample beside rooms of a block and
// of a cluster; false where they do not.
template <Storage storage, class Kernel>
bool launch_rows(LossBatch& batch, int rows, Kernel of_block, size_t block_room, Kernel of_cluster,
                 size_t cluster_room, cudaStream_t stream) {
    constexpr int size = Elements<storage>::columns;
    const Rows& first = batch.logits[0];
    const bool aligned = reinterpret_cast<uintptr_t>(first.data) % 16 == 0 &&
                         (batch.samples <= 1 || first.row * bytes_of(storage) % 16 == 0);
    const int64_t chunks = (batch.classes + (aligned ? 0 : size - 1) + size - 1) / size;
    const int64_t most = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    for (int cluster = 1; cluster <= most_cluster; cluster *= 2) {
        if (cluster > 1 && !attribute_of_device(cudaDevAttrClusterLaunch)) return false;
        // Rows too short for so many threads have smaller blocks, and more of them run at once.
        int threads = long_threads;
        while (cluster == 1 && threads > warp_size && chunks <= threads) threads /= 2;
        const int64_t group = int64_t(cluster) * threads;
        batch.turns = static_cast<int>((chunks + group - 1) / group);
        const size_t bytes =
            (cluster > 1 ? cluster_room : block_room) + size_t(16) * rows * batch.turns * threads;
        if (bytes > static_cast<size_t>(most)) continue;
        const auto kernel = cluster > 1 ? of_cluster : of_block;
        // As many as run at once: a sample's rows are then on their way while the one before is
        // worked on.
        Shape shape{cluster, threads, bytes, cluster};
        allow_shared(kernel, bytes);
        if (cluster == 1) {
            shape.blocks = resident_blocks(kernel, threads, batch.samples, bytes);
        } else {
            if (cluster > portable_cluster && !allow_large_cluster(kernel)) return false;
            shape.blocks =
                minimum<int64_t>(batch.samples, active_clusters(kernel, shape)) * cluster;
            // all of them are refused
            if (shape.blocks == 0) return false;
        }
        launch(kernel, shape, stream, batch);
        return true;
    }
    return false;
}
template <Storage storage, int passes, bool pairs>
bool launch_long(LossBatch& batch, cudaStream_t stream) {
    return launch_rows<storage>(batch, passes, loss_long_block<storage, passes, pairs>,
                                sizeof(BlockJoins::Room), loss_long_cluster<storage, passes, pairs>,
                                sizeof(ClusterJoins::Room), stream);
}
template <Storage storage> bool launch_many(LossBatch& batch, cudaStream_t stream) {
    return launch_rows<storage>(batch, batch.passes + (batch.soft.data ? 1 : 0),
                                loss_many_block<storage>, ManyRows<BlockJoins, storage>::room,
                                loss_many_cluster<storage>, ManyRows<ClusterJoins, storage>::room,
                                stream);
}
template <int passes, bool pairs> bool launch_long(LossBatch& batch, cudaStream_t stream) {
    switch (batch.logits[0].storage) {
    case Storage::float32: return launch_long<Storage::float32, passes, pairs>(batch, stream);
    case Storage::bfloat16: return launch_long<Storage::bfloat16, passes, pairs>(batch, stream);
    default: return launch_long<Storage::float16, passes, pairs>(batch, stream);
    }
}
bool run_long(LossBatch& batch, cudaStream_t stream) {
    if (batch.classes <= short_classes || !together(batch)) return false;
    const bool pairs = batch.passes - batch.first == 2;
    if (batch.passes == 1) return launch_long<1, false>(batch, stream);
    if (batch.passes == 2)
        return pairs ? launch_long<2, true>(batch, stream) : launch_long<2, false>(batch, stream);
    return launch_long<3, true>(batch, stream);
}

bool run_many(LossBatch& batch, cudaStream_t stream) {
    if (batch.passes > many || !together(batch)) return false;
    switch (batch.logits[0].storage) {
    case Storage::float32: return launch_many<Storage::float32>(batch, stream);
    case Storage::bfloat16: return launch_many<Storage::bfloat16>(batch, stream);
    default: return launch_many<Storage::float16>(batch, stream);
    }
}

// Returns whether one block does all of a batch: a few samples for each of its warps, of few
// classes.
bool is_small(const LossBatch& batch) {
    return !batch.options.regression && !batch.soft.data && batch.passes - batch.first <= 2 &&
           batch.samples <= 64 && batch.classes <= 64;
}

// Runs a batch and returns the loss and its parts.
std::pair<Tensor, Tensor> run(LossBatch batch, const Tensor& like, cudaStream_t stream) {
    const bool by_row = batch.options.reduction == Reduction::none;
    const auto shape = [&](std::vector<int64_t> front) {
        if (by_row) front.push_back(batch.samples);
        return front;
    };
    Tensor loss = torch::stable::new_empty(like, shape({}), ScalarType::Float);
    Tensor parts = torch::stable::new_empty(like, shape({3}), ScalarType::Float);
    Tensor scratch = torch::stable::new_empty(like, {3 * batch.samples + 1}, ScalarType::Double);
    batch.values = static_cast<double*>(scratch.mutable_data_ptr());
    int64_t* count = reinterpret_cast<int64_t*>(batch.values + 3 * batch.samples);
    batch.count = count;
    float *to_loss = static_cast<float*>(loss.mutable_data_ptr()),
          *to_parts = static_cast<float*>(parts.mutable_data_ptr());
    if (is_small(batch)) {
        const int64_t chunks = (batch.classes + columns - 1) / columns,
                      roles = batch.passes - batch.first == 2 ? 4 : 1;
        batch.kept = (chunks + warp_size - 1) / warp_size * warp_size * columns *
                     static_cast<int64_t>(sizeof(float));
        const Shape shape{1, warp_threads,
                          static_cast<size_t>(warp_threads / warp_size * roles * batch.kept)};
        launch(roles == 4 ? loss_small<2> : loss_small<1>, shape, stream, batch, count, to_loss,
               to_parts);
        return {loss, parts};
    }
    launch(count_rows, {1, finish_threads}, stream, batch, count);
    bool full = batch.classes % columns == 0;
    for (int pass = 0; pass < batch.passes; ++pass)
        full &= covered(batch.logits[pass], batch.samples) &&
                covered(batch.gradients[pass], batch.samples);
    const int m = batch.passes - batch.first;
    const bool few = m <= 2 && !batch.soft.data;
    const bool on_chip =
        batch.samples == 0 ||
        (!batch.options.regression &&
         (few ? run_long(batch, stream) || (m == 2 ? run_on_chip<2>(batch, full, stream)
                                                   : run_on_chip<1>(batch, full, stream))
              : run_many(batch, stream)));
    if (!on_chip) {
        const int64_t sms = attribute_of_device(cudaDevAttrMultiProcessorCount);
        const int64_t in_cache =
            attribute_of_device(cudaDevAttrL2CacheSize) /
            (batch.passes * batch.classes * bytes_of(batch.logits[0].storage) + 1);
        const int64_t blocks =
            minimum(batch.samples, maximum((sms + 3) / 4, minimum(2 * sms, in_cache)));
        launch(loss_sweep, {blocks, sweep_threads}, stream, batch);
    }
    launch(finish_loss, {1, finish_threads}, stream, batch, to_loss, to_parts);
    return {loss, parts};
}

} // namespace

static std::pair<Tensor, Tensor> evaluate(const LossArguments& arguments,
                                          const std::vector<bool>& needs, const Tensors& gradients,
                                          bool) {
    LossBatch batch = make_batch(arguments);
    size_t at = 0;
    int pass = 0;
    for (size_t i = 0; i < needs.size(); ++i) {
        const int64_t passes = passes_of(arguments.logits[i]);
        if (needs[i]) {
            const View into = view(gradients[at++], "logits", true);
            for (int64_t k = 0; k < passes; ++k) batch.gradients[pass + k] = rows_of(into, k);
        }
        pass += static_cast<int>(passes);
    }
    const DeviceGuard device(arguments.like);
    return run(batch, arguments.like, device.stream);
}

static void scale(const ScalingArguments& arguments) {
    if (arguments.size == 0) return;
    Scaling s{};
    s.size = arguments.size, s.classes = arguments.classes, s.samples = arguments.samples;
    s.by_row = arguments.factors != 1, s.in_place = arguments.in_place();
    Axes axes{};
    int at = 0;
    auto slot = [&](const View& v) {
        Slot slot;
        slot.data = v.data, slot.storage = v.storage;
        if (v.contiguous) return slot;
        slot.axes = at, axes.at[at++] = v.dim;
        for (int d = 0; d < v.dim; ++d)
            axes.at[at + d] = v.sizes[d], axes.at[at + v.dim + d] = v.strides[d];
        at += 2 * v.dim;
        return slot;
    };
    s.from = slot(arguments.source), s.to = slot(arguments.target);
    s.factor = slot(arguments.factor);
    const DeviceGuard device(arguments.like);
    const bool full = at == 0 && s.classes % columns == 0 &&
                      reinterpret_cast<uintptr_t>(s.from.data) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(s.to.data) % 16 == 0;
    const int64_t blocks = (s.size / (full ? columns : 1) + block_threads - 1) / block_threads;
    const int64_t most = 8 * attribute_of_device(cudaDevAttrMultiProcessorCount);
    launch(!full      ? scale_ragged
           : s.by_row ? scale_rows
                      : scale_full,
           {minimum(blocks, most), block_threads}, device.stream, s, axes);
}

// Leaves a loss to others: they have the operator in place, over copies, since torch's dispatcher
// confuses tensors and lists that are returned together.
static std::tuple<Tensor, Tensor, Tensors> leave(Tensors logits, const OptionalTensor& labels,
                                                 LOSS_ARGUMENTS) {
    Tensors gradients;
    for (size_t i = 0; i < logits.size(); ++i)
        if (needs[i]) gradients.push_back(logits[i] = torch::stable::clone(logits[i]));
    StableIValue stack[8];
    const auto given = std::make_tuple(logits, labels, js_weight, label_smoothing, ignore_index,
                                       reduction, regression, needs);
    call_fallback(QUALIFIED(uegr_loss_), stack, given);
    const auto [loss, parts] = torch::stable::detail::unbox_to_tuple<Tensor, Tensor>(stack);
    return {loss, parts, gradients};
}

static std::tuple<Tensor, Tensor, Tensors>
uegr_loss_or_leave(const Tensors& logits, OptionalTensor labels, LOSS_ARGUMENTS) {
    try {
        return uegr_loss(logits, labels, js_weight, label_smoothing, ignore_index, reduction,
                         regression, needs);
    } catch (const LeftToOthers&) {
        return leave(logits, labels, js_weight, label_smoothing, ignore_index, reduction,
                     regression, needs);
    }
}

EXPORT_BOXED_AS(uegr_loss, uegr_loss_or_leave)
EXPORT_BOXED(uegr_loss_)
EXPORT_BOXED(scale_gradients)
EXPORT_BOXED(scale_gradients_)

} // namespace uegr
