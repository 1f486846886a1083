// The losses on a GPU: launches. The formulas are divergence.h's, the checks arguments.h's; the
// plan and what it rests on stand in docs/design.md.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "divergence.h"

namespace uegr {
namespace {

constexpr int columns = 8; // that a thread takes at a time
constexpr int warp_threads = 128, block_threads = 512, long_threads = 512, sweep_threads = 1024,
              finish_threads = 1024;
// Of rows that a warp takes: those that are not together in memory, and those that are too short to
// be shared.
constexpr int64_t warp_classes = 1024, short_classes = 64;
constexpr int most_cluster = 16, portable_cluster = 8;
constexpr int most_passes = 32;
constexpr size_t room_bytes = 64 * sizeof(double); // for the sums of a group that spans blocks
constexpr float lowest = -HUGE_VALF;
constexpr int lowest_column = -(1 << 30) - (1 << 30); // below all

// The N rows of one pass.
struct Rows {
    char* data = nullptr; // null: nothing is wanted here
    Storage storage = Storage::float32;
    int64_t row = 0, column = 1; // strides, in elements

    DEVICE char* at(int64_t n, int64_t i) const {
        return data + (n * row + i * column) * bytes_of(storage);
    }
    DEVICE float get(int64_t n, int64_t i) const { return value_at<float>(at(n, i), storage); }
    DEVICE void put(int64_t n, int64_t i, float x) const { put_value(at(n, i), storage, x); }
};

struct Batch {
    LossOptions options{};
    int64_t samples = 0, classes = 0;
    int passes = 0, first = 0; // first: pass of the pairs
    Rows logits[most_passes], gradients[most_passes], soft;
    const int64_t* indices = nullptr;
    int64_t index_stride = 0;
    const int64_t* count = nullptr; // rows that count
    double* values = nullptr; // clean, adversarial, divergence of each row
    int64_t kept = 0; // bytes of shared memory a thread group keeps for a role
    int turns = 0; // chunks of a long row that a thread has

    HOST_DEVICE bool labelled() const { return indices || soft.data; }
    DEVICE int64_t index(int64_t n) const { return indices[n * index_stride]; }
    DEVICE bool ignored(int64_t n) const { return indices && index(n) == options.ignore_index; }
    DEVICE double label_weight(int pass) const {
        return !labelled() ? 0 : pass == 0 ? 1 : 1 / static_cast<double>(passes - 1);
    }
    DEVICE double unit() const {
        return options.reduction == Reduction::mean ? 1 / static_cast<double>(*count) : 1;
    }
    DEVICE float target(int64_t n, int64_t i) const {
        const float share = static_cast<float>(1 - options.label_smoothing),
                    floor =
                        static_cast<float>(options.label_smoothing / static_cast<double>(classes));
        return soft.get(n, i) * share + floor;
    }
    DEVICE double smoothed() const {
        return indices ? options.label_smoothing / static_cast<double>(classes) : 0;
    }
};

template <class T> DEVICE T larger(T a, T b) { return a > b ? a : b; }
template <class T> DEVICE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE T added(T a, T b) { return a + b; }

// --- 8 columns from memory and back ---

struct FullColumns {
    static constexpr bool full = true;
    static DEVICE void load(const Rows& from, int64_t n, int64_t i, int64_t, float (&x)[columns]) {
        const char* at = from.data + (n * from.row + i) * bytes_of(from.storage);
        if (from.storage == Storage::float32) {
            const float* wide = reinterpret_cast<const float*>(at);
            const Pack<float> low = load_last(wide), high = load_last(wide + 4);
            UNROLL
            for (int j = 0; j < 4; ++j) x[j] = low.x[j], x[4 + j] = high.x[j];
            return;
        }
        const Pack<uint16_t> pack = load_last(reinterpret_cast<const uint16_t*>(at));
        UNROLL
        for (int j = 0; j < columns; ++j)
            x[j] = from.storage == Storage::bfloat16 ? widen_bfloat16(pack.x[j])
                                                     : widen_float16(pack.x[j]);
    }
    static DEVICE void store(const Rows& to, int64_t n, int64_t i, int64_t,
                             const float (&x)[columns]) {
        char* at = to.data + (n * to.row + i) * bytes_of(to.storage);
        if (to.storage == Storage::float32) {
            Pack<float> low, high;
            UNROLL
            for (int j = 0; j < 4; ++j) low.x[j] = x[j], high.x[j] = x[4 + j];
            float* wide = reinterpret_cast<float*>(at);
            store_last(wide, low), store_last(wide + 4, high);
            return;
        }
        Pack<uint16_t> pack;
        UNROLL
        for (int j = 0; j < columns; ++j)
            pack.x[j] =
                to.storage == Storage::bfloat16 ? round_bfloat16(x[j]) : round_float16(x[j]);
        store_last(reinterpret_cast<uint16_t*>(at), pack);
    }
};
struct RaggedColumns {
    static constexpr bool full = false;
    template <class T, class F>
    static DEVICE void each(const Rows& rows, int64_t n, int64_t i, int64_t classes, F f) {
        T* at = reinterpret_cast<T*>(rows.data) + n * rows.row + i * rows.column;
        UNROLL
        for (int j = 0; j < columns; ++j)
            if (i + j < classes) f(at[j * rows.column], j);
    }
    static DEVICE void load(const Rows& from, int64_t n, int64_t i, int64_t classes,
                            float (&x)[columns]) {
        UNROLL
        for (int j = 0; j < columns; ++j) x[j] = lowest;
        if (from.storage == Storage::float32)
            return each<const float>(from, n, i, classes, [&](float v, int j) { x[j] = v; });
        const bool brain = from.storage == Storage::bfloat16;
        each<const uint16_t>(from, n, i, classes, [&](uint16_t v, int j) {
            x[j] = brain ? widen_bfloat16(v) : widen_float16(v);
        });
    }
    static DEVICE void store(const Rows& to, int64_t n, int64_t i, int64_t classes,
                             const float (&x)[columns]) {
        if (to.storage == Storage::float32)
            return each<float>(to, n, i, classes, [&](float& v, int j) { v = x[j]; });
        const bool brain = to.storage == Storage::bfloat16;
        each<uint16_t>(to, n, i, classes, [&](uint16_t& v, int j) {
            v = brain ? round_bfloat16(x[j]) : round_float16(x[j]);
        });
    }
};

// --- Rows that stay on chip ---

// What a thread keeps of its columns, in a role: x or w, and e, of each pass.
struct Kept {
    float4* base;
    int64_t role_size; // in float4
    int stride; // threads of a block that keep some

    DEVICE float4* at(int role, int turn) const {
        return base + role * role_size + 2 * turn * stride;
    }
    DEVICE void get(int role, int turn, float (&x)[columns]) const {
        const float4 low = at(role, turn)[0], high = at(role, turn)[stride];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y,
        x[6] = high.z, x[7] = high.w;
    }
    DEVICE float one(int role, int turn, int j) const {
        return reinterpret_cast<const float*>(at(role, turn) + j / 4 * stride)[j % 4];
    }
    DEVICE void put(int role, int turn, const float (&x)[columns]) const {
        at(role, turn)[0] = {x[0], x[1], x[2], x[3]},
                 at(role, turn)[stride] = {x[4], x[5], x[6], x[7]};
    }
};

template <class Group, class Columns> struct Sample {
    const Batch& batch;
    Group group;
    Kept kept;
    int64_t n;

    // Calls f(turn, i) for the 8 columns from i on that are this thread's.
    template <class F> DEVICE void each(F f) {
        int turn = 0;
        for (int64_t i = int64_t(columns) * Group::index(); i < batch.classes;
             i += int64_t(columns) * Group::size())
            f(turn++, i);
    }

    // Reads a pass: x in `role`, its exponentials in `role_e`, which may be the same; its sums.
    DEVICE RowSums read(int pass, int role, int role_e) {
        const Rows& from = batch.logits[pass];
        float most[1] = {lowest};
        each([&](int turn, int64_t i) {
            float x[columns];
            Columns::load(from, n, i, batch.classes, x);
            kept.put(role, turn, x);
            UNROLL
            for (int j = 0; j < columns; ++j) most[0] = maximum(x[j], most[0]);
        });
        group.join(most, lowest, larger<float>);
        // A row far out is moved by its maximum, as the differences would be lost in it.
        const float moved = absolute(most[0]) <= static_cast<float>(far_out) ? 0.0f : most[0],
                    max = most[0] - moved;
        const double smoothing = batch.options.label_smoothing;
        const int64_t label = batch.indices ? batch.index(n) : -1;
        double sums[3] = {}; // of e; of x - max; of the labels
        each([&](int turn, int64_t i) {
            float x[columns], e[columns], sum = 0, differences = 0, labels = 0;
            kept.get(role, turn, x);
            UNROLL
            for (int j = 0; j < columns; ++j) {
                x[j] -= moved;
                e[j] = exponential(x[j] - max);
                sum += e[j];
            }
            if (batch.labelled()) {
                UNROLL
                for (int j = 0; j < columns; ++j) {
                    if (!Columns::full && i + j >= batch.classes) continue;
                    if (smoothing > 0) differences += x[j] - max;
                    if (i + j == label) labels = x[j] - max;
                }
            }
            if (role != role_e) kept.put(role, turn, x);
            kept.put(role_e, turn, e);
            sums[0] += sum, sums[1] += differences, sums[2] += labels;
        });
        group.join(sums, 0.0, added<double>);
        RowSums row;
        row.max = max, row.sum = sums[0];
        row.settle();
        if (batch.indices) { // smoothing 1 leaves no label, whatever its logit
            if (smoothing < 1) row.label = (1 - smoothing) * sums[2];
            if (smoothing > 0)
                row.label += smoothing / static_cast<double>(batch.classes) * sums[1];
            if (label < 0 || label >= batch.classes) row.label = NAN;
        }
        return row;
    }

    // Two passes' products w in the place of x; their sums.
    DEVICE void pair(RowSums& k, RowSums& l) {
        const float far_k = static_cast<float>(k.max - far_below),
                    far_l = static_cast<float>(l.max - far_below);
        const PairDistance between(k, l);
        const float from_k = static_cast<float>(between.from_k),
                    from_l = static_cast<float>(between.from_l),
                    gap = static_cast<float>(between.gap);
        auto add_ratios = [&](float x_k, float x_l, float& of_k, float& of_l) {
            const float d = (maximum(far_k, x_k) - from_k) - (maximum(far_l, x_l) - from_l) - gap;
            add_log_ratios(d, half_complement(minus_absolute(d)), of_k, of_l);
        };
        if (k.dominated() ||
            l.dominated()) { // the log ratios at the first of the most probable classes
            float first[2] = {HUGE_VALF, HUGE_VALF}; // by the 8 columns they are in
            auto likeliest = [&](int side, auto f) {
                each([&](int turn, int64_t i) {
                    for (int j = 0; j < columns; ++j)
                        if (kept.one(2 * side + 1, turn, j) == 1)
                            f(turn, j, static_cast<float>(i / columns));
                });
            };
            UNROLL
            for (int side = 0; side < 2; ++side)
                likeliest(side, [&](int, int, float chunk) {
                    first[side] = minimum(chunk, first[side]);
                });
            group.join(first, HUGE_VALF, smaller<float>);
            double pivots[2] = {};
            UNROLL
            for (int side = 0; side < 2; ++side)
                likeliest(side, [&](int turn, int j, float chunk) {
                    if (chunk != first[side]) return;
                    first[side] = -1; // one of them
                    float ratios[2] = {};
                    add_ratios(kept.one(0, turn, j), kept.one(2, turn, j), ratios[0], ratios[1]);
                    pivots[side] = ratios[side];
                });
            group.join(pivots, 0.0, added<double>);
            k.pivot = k.dominated() ? pivots[0] : 0, l.pivot = l.dominated() ? pivots[1] : 0;
        }
        const float pivot_k = static_cast<float>(k.pivot), pivot_l = static_cast<float>(l.pivot);
        double sums[2] = {};
        each([&](int turn, int64_t) {
            float x_k[columns], x_l[columns], e_k[columns], e_l[columns], of_k = 0, of_l = 0;
            kept.get(0, turn, x_k), kept.get(2, turn, x_l), kept.get(1, turn, e_k),
                kept.get(3, turn, e_l);
            UNROLL
            for (int j = 0; j < columns; ++j) {
                float ratio_k = -pivot_k, ratio_l = -pivot_l;
                add_ratios(x_k[j], x_l[j], ratio_k, ratio_l);
                x_k[j] = e_k[j] * ratio_k, x_l[j] = e_l[j] * ratio_l;
                of_k += x_k[j], of_l += x_l[j];
            }
            kept.put(0, turn, x_k), kept.put(2, turn, x_l);
            sums[0] += of_k, sums[1] += of_l;
        });
        group.join(sums, 0.0, added<double>);
        k.kl = sums[0], l.kl = sums[1];
    }

    DEVICE void write(int pass, const RowSums& row, int role_w, int role_e, double mass,
                      bool in_pairs) {
        const Rows& into = batch.gradients[pass];
        if (!into.data) return;
        const double unit = batch.unit();
        const GradientFactors<float> factors(row, unit * batch.label_weight(pass), mass,
                                             batch.smoothed(),
                                             in_pairs ? unit * batch.options.js_weight : 0);
        const int64_t label = batch.indices ? batch.index(n) : -1;
        const float share = static_cast<float>(1 - batch.options.label_smoothing);
        each([&](int turn, int64_t i) {
            float e[columns], w[columns];
            kept.get(role_e, turn, e);
            if (in_pairs) kept.get(role_w, turn, w);
            UNROLL
            for (int j = 0; j < columns; ++j) {
                e[j] = in_pairs ? factors.gradient(e[j], w[j]) : factors.gradient(e[j]);
                if (i + j == label) e[j] = factors.labelled(e[j], share);
            }
            Columns::store(into, n, i, batch.classes, e);
        });
    }

    DEVICE void clear() {
        for (int pass = 0; pass < batch.passes; ++pass)
            if (batch.gradients[pass].data)
                each([&](int, int64_t i) {
                    Columns::store(batch.gradients[pass], n, i, batch.classes, {});
                });
    }

    template <int m> DEVICE void run() {
        double clean = 0, adversarial = 0, divergence = 0;
        if (batch.ignored(n)) {
            clear();
        } else {
            const double mass = batch.indices ? 1 : 0;
            if (batch.first == 1) {
                const RowSums row = read(0, 0, 0);
                clean = row.cross_entropy(mass);
                write(0, row, 0, 0, mass, false);
            }
            if constexpr (m == 2) {
                RowSums rows[2] = {read(batch.first, 0, 1), read(batch.first + 1, 2, 3)};
                pair(rows[0], rows[1]);
                divergence = pairs_divergence(rows[0].divergence() + rows[1].divergence(), 2);
                UNROLL
                for (int k = 0; k < 2; ++k) {
                    if (batch.labelled())
                        adversarial +=
                            rows[k].cross_entropy(mass) * batch.label_weight(batch.first + k);
                    write(batch.first + k, rows[k], 2 * k, 2 * k + 1, mass, true);
                }
            } else if (batch.passes > batch.first) {
                const RowSums row = read(batch.first, 0, 0);
                if (batch.labelled())
                    adversarial = row.cross_entropy(mass) * batch.label_weight(batch.first);
                write(batch.first, row, 0, 0, mass, false);
            }
        }
        if (Group::index() == 0)
            batch.values[3 * n] = clean, batch.values[3 * n + 1] = adversarial,
                             batch.values[3 * n + 2] = divergence;
    }
};

template <class Group, class Columns, int m> DEVICE void over_samples(const Batch& batch) {
    char* shared = dynamic_shared();
    const int keepers = Group::spans_block ? blockDim.x : warp_size;
    constexpr int64_t roles = m == 2 ? 4 : 1;
    const int64_t own = Group::spans_block ? 0 : threadIdx.x / warp_size * roles * batch.kept;
    const Kept kept{
        reinterpret_cast<float4*>(shared + (Group::spans_block ? room_bytes : 0) + own) +
            threadIdx.x % keepers,
        batch.kept / 16, keepers};
    Group group(reinterpret_cast<double*>(shared));
    for (int64_t n = Group::first(); n < batch.samples; n += Group::count()) {
        Sample<Group, Columns> sample{batch, group, kept, n};
        sample.template run<m>();
        group = sample.group;
    }
    Group::leave();
}
template <int m>
__global__ void __launch_bounds__(warp_threads, 4)
    loss_full_warp(const __grid_constant__ Batch batch) {
    over_samples<WarpGroup, FullColumns, m>(batch);
}
template <int m>
__global__ void __launch_bounds__(warp_threads, 4)
    loss_ragged_warp(const __grid_constant__ Batch batch) {
    over_samples<WarpGroup, RaggedColumns, m>(batch);
}
template <int m>
__global__ void __launch_bounds__(block_threads, 1)
    loss_ragged_cluster(const __grid_constant__ Batch batch) {
    over_samples<ClusterGroup, RaggedColumns, m>(batch);
}

// --- Long rows that stay on chip as they are in memory ---

// What 16 bytes of a row hold.
template <Storage storage> struct Elements {
    static constexpr int columns = storage == Storage::float32 ? 4 : 8;
    // The least finite number, or a little more.
    static constexpr float least = storage == Storage::float16 ? -65504.0f : -3.3e38f;
    using Chunk = Pack<uint32_t>;

    static DEVICE void unpack(const Chunk& chunk, float (&x)[columns]) {
        UNROLL
        for (int j = 0; j < columns; ++j) {
            const uint32_t word = chunk.x[j * 4 / columns];
            if constexpr (storage == Storage::float32) x[j] = bit_cast<float>(word);
            else if constexpr (storage == Storage::bfloat16)
                x[j] = j % 2 ? second_bfloat16(word) : first_bfloat16(word);
            else x[j] = widen_float16(static_cast<uint16_t>(word >> (j % 2 * 16)));
        }
    }
    static DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
#ifdef ASSEMBLY
        if constexpr (storage == Storage::bfloat16)
            asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        else asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
#else
        auto larger = [](uint32_t x, uint32_t y) { // ordered as the floats
            auto key = [](uint32_t h) { return h >> 15 ? 0x7fffu - (h & 0x7fffu) : h + 0x8000u; };
            return key(x) > key(y) ? x : y;
        };
        return larger(a & 0xffffu, b & 0xffffu) | larger(a >> 16, b >> 16) << 16;
#endif
    }
    // The largest of a chunk; NaN is less than all.
    static DEVICE float largest(const Chunk& chunk) {
        float most = lowest;
        if constexpr (storage == Storage::float32) {
            UNROLL
            for (int i = 0; i < 4; ++i) most = at_least(bit_cast<float>(chunk.x[i]), most);
        } else {
            Chunk pair{};
            pair.x[0] = larger_pair(larger_pair(chunk.x[0], chunk.x[1]),
                                    larger_pair(chunk.x[2], chunk.x[3]));
            float x[columns];
            unpack(pair, x);
            most = at_least(x[0], at_least(x[1], most));
        }
        return most;
    }
    // An element of a chunk in memory.
    static DEVICE float element(const Chunk& chunk, int j) {
        return value_at<float>(reinterpret_cast<const char*>(&chunk) + j * (16 / columns), storage);
    }
    static DEVICE uint16_t narrow(float x) {
        return storage == Storage::bfloat16 ? round_bfloat16(x) : round_float16(x);
    }
    static DEVICE void set(Chunk& chunk, int j, float x) {
        if constexpr (storage == Storage::float32) chunk.x[j] = bit_cast<uint32_t>(x);
        else reinterpret_cast<uint16_t*>(&chunk)[j] = narrow(x);
    }
    static DEVICE Chunk pack(const float (&x)[columns]) {
        Chunk chunk;
        UNROLL
        for (int i = 0; i < 4; ++i)
            if constexpr (storage == Storage::float32) chunk.x[i] = bit_cast<uint32_t>(x[i]);
            else chunk.x[i] = pair_of(narrow(x[2 * i]), narrow(x[2 * i + 1]));
        return chunk;
    }
};

// Samples one after another: all of a sample's rows are asked for at once, chunks of 16 bytes, and
// lie in shared memory as they are. A thread has the same chunks of all passes, and nobody else
// looks at them. A visit finds the maxima, one the sums, one the pairs, the last the gradients; the
// exponentials are found anew each time. As the last visit leaves a chunk it asks for the next
// sample's. A row may begin anywhere, if all begin at the same place of 16 bytes: the first and the
// last chunk then hold less, and what else they hold is no class.
template <class Joins, Storage storage, int passes, bool pairs> struct LongRows {
    using Of = Elements<storage>;
    using Chunk = typename Of::Chunk;
    static constexpr int columns = Of::columns;
    static constexpr int k = passes - 2; // the pair: this pass and the one after it
    const Batch& batch;
    Joins joins;
    Chunk* slots; // this thread's first
    int of_pass; // slots of a pass

    DEVICE LongRows(const Batch& batch, char* shared)
        : batch(batch), joins(shared),
          slots(reinterpret_cast<Chunk*>(shared + sizeof(typename Joins::Room)) + threadIdx.x),
          of_pass(batch.turns * static_cast<int>(blockDim.x)) {}

    // A sample's rows.
    struct Place {
        int64_t n;
        int shift; // columns from the start of 16 bytes to that of a row
        int chunks;
    };
    DEVICE Place place_of(int64_t n) const {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(batch.logits[0].at(n, 0)) %
                                           16 / (16 / columns));
        const int classes = static_cast<int>(batch.classes);
        return {n, shift, (classes + shift + columns - 1) / columns};
    }
    // Where a sample's row begins in a pass.
    static DEVICE char* row_of(const Rows& rows, const Place& at) {
        return rows.data + at.n * rows.row * (16 / columns);
    }
    static DEVICE char* column_of(char* row, int column) {
        return row + static_cast<int64_t>(column) * (16 / columns);
    }
    // Calls f(slot, first) for this thread's chunks: where the first pass's lies, and its first
    // column.
    template <class F> DEVICE void each(const Place& at, F f) const {
        const int classes = static_cast<int>(batch.classes);
        int first = Joins::index() * columns - at.shift;
        Chunk* slot = slots;
#pragma unroll 1
        for (; first < classes; slot += blockDim.x, first += Joins::size() * columns)
            f(slot, first);
    }
    // The same for those of them that are classes in part: a row's first chunk and its last.
    template <class F> DEVICE void each_part(const Place& at, F f) const {
#pragma unroll 1
        for (int last = 0; last < 2; ++last) {
            const int chunk = last ? at.chunks - 1 : 0, first = chunk * columns - at.shift;
            if (chunk % Joins::size() == Joins::index() && !(last && chunk == 0) &&
                !is_whole(first))
                f(slots + chunk / Joins::size() * static_cast<int>(blockDim.x), first);
        }
    }
    DEVICE bool is_whole(int first) const {
        return first >= 0 && first + columns <= static_cast<int>(batch.classes);
    }
    DEVICE void get(const Chunk* slot, int pass, float (&x)[columns]) const {
        Of::unpack(slot[pass * of_pass], x);
    }
    struct Addresses {
        char* row[passes];
    };
    DEVICE Addresses logits_of(const Place& at) const {
        Addresses of;
        UNROLL
        for (int pass = 0; pass < passes; ++pass) of.row[pass] = row_of(batch.logits[pass], at);
        return of;
    }
    static DEVICE Addresses settled_at(Addresses of) {
        UNROLL
        for (int pass = 0; pass < passes; ++pass) of.row[pass] = settled(of.row[pass]);
        return of;
    }
    DEVICE void copy(const Addresses& from, Chunk* slot, int first) const {
        UNROLL
        for (int pass = 0; pass < passes; ++pass)
            copy_async(slot + pass * of_pass, column_of(from.row[pass], first));
    }
    static DEVICE void put(char* row, int first, const Chunk& chunk) {
        store_last(reinterpret_cast<uint32_t*>(column_of(row, first)), chunk);
    }
    // The elements of a chunk in part, from shared memory.
    DEVICE void put_part(char* row, int first, const Chunk& from) const {
        constexpr int size = 16 / columns;
        for (int j = first < 0 ? -first : 0; j < columns && first + j < batch.classes; ++j) {
            const char* element = reinterpret_cast<const char*>(&from) + j * size;
            char* to = column_of(row, first + j);
            if constexpr (size == 4)
                *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(element);
            else *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(element);
        }
    }

    // The next sample that counts; the gradients of those that do not are 0.
    DEVICE int64_t counting(int64_t n) const {
        for (; n < batch.samples && batch.ignored(n); n += Joins::count()) {
#pragma unroll 1
            for (int pass = 0; pass < passes; ++pass)
                if (batch.gradients[pass].data) clear(batch.gradients[pass], place_of(n));
            if (Joins::index() == 0) write(n, 0, 0, 0);
        }
        return n;
    }
    DEVICE void clear(const Rows& into, const Place& at) const {
        char* row = row_of(into, at);
        each(at, [&](Chunk*, int first) {
            if (is_whole(first)) put(row, first, Chunk{});
        });
        each_part(at, [&](Chunk*, int first) {
            for (int j = 0; j < columns; ++j)
                if (first + j >= 0 && first + j < batch.classes) into.put(at.n, first + j, 0.0f);
        });
    }
    DEVICE void write(int64_t n, double clean, double adversarial, double divergence) const {
        double* to = batch.values + 3 * n;
        to[0] = clean, to[1] = adversarial, to[2] = divergence;
    }

    DEVICE void run() {
        int64_t n = counting(Joins::first());
        if (n < batch.samples) {
            const Addresses from = logits_of(place_of(n));
            each(place_of(n), [&](Chunk* slot, int first) { copy(from, slot, first); });
        }
        while (n < batch.samples) {
            const int64_t next = counting(n + Joins::count());
            sample(place_of(n), next);
            n = next;
        }
        Joins::leave();
    }

    // Gives what is in a chunk and no class a value, by pass.
    template <class F> DEVICE void fill_parts(const Place& at, F value_of) {
        each_part(at, [&](Chunk* slot, int first) {
            for (int j = 0; j < columns; ++j)
                if (first + j < 0 || first + j >= batch.classes)
                    for (int pass = 0; pass < passes; ++pass)
                        Of::set(slot[pass * of_pass], j, value_of(pass));
        });
    }

    // A row's maximum, and the column where a pass has it, for all threads the same.
    DEVICE void find_maxima(const Place& at, float (&most)[passes], int (&where)[passes]) {
        const Chunk* found[passes];
        int columns_of[passes] = {};
        UNROLL
        for (int pass = 0; pass < passes; ++pass) most[pass] = lowest, found[pass] = slots;
        fill_parts(at, [](int) { return lowest; });
        each(at, [&](const Chunk* slot, int first) {
            UNROLL
            for (int pass = 0; pass < passes; ++pass) {
                const float here = Of::largest(slot[pass * of_pass]);
                if (pairs && pass >= k && here > most[pass])
                    found[pass] = slot, columns_of[pass] = first;
                most[pass] = at_least(here, most[pass]);
            }
        });
        // As integers that order as the floats do, and of equal ones the first column.
        uint64_t keys[passes];
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            int column = 0;
            if (pairs && pass >= k && most[pass] > lowest) {
                float x[columns];
                get(found[pass], pass, x);
                UNROLL
                for (int j = columns - 1; j >= 0; --j)
                    if (x[j] == most[pass]) column = columns_of[pass] + j;
            }
            const uint32_t bits = bit_cast<uint32_t>(most[pass]);
            keys[pass] = static_cast<uint64_t>(bits >> 31 ? ~bits : bits | 1u << 31) << 32 |
                         (~0u - static_cast<uint32_t>(column));
        }
        joins.template join<0>(keys, uint64_t(0),
                               [](uint64_t a, uint64_t b) { return a > b ? a : b; });
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            const uint32_t bits = static_cast<uint32_t>(keys[pass] >> 32);
            most[pass] = bit_cast<float>(bits >> 31 ? bits & ~(1u << 31) : ~bits);
            where[pass] = static_cast<int>(~0u - static_cast<uint32_t>(keys[pass]));
        }
    }

    // The rows' sums.
    DEVICE void find_sums(const Place& at, const float (&most)[passes],
                          const NearRow (&near)[passes], bool plain, RowSums (&rows)[passes]) {
        const double smoothing = batch.options.label_smoothing;
        const int64_t label = batch.indices ? batch.index(at.n) : -1;
        const bool is_class = label >= 0 && label < batch.classes;
        float sum[passes] = {}, differences[passes] = {};
        auto add_up = [&](auto plain) {
            each(at, [&](const Chunk* slot, int) {
                UNROLL
                for (int pass = 0; pass < passes; ++pass) {
                    float x[columns];
                    get(slot, pass, x);
                    UNROLL
                    for (int j = 0; j < columns; ++j)
                        sum[pass] += near[pass].template e<decltype(plain)::value>(x[j]);
                }
            });
        };
        if (plain) add_up(std::true_type());
        else add_up(std::false_type());
        if (smoothing > 0)
            each(at, [&](const Chunk* slot, int first) {
                UNROLL
                for (int pass = 0; pass < passes; ++pass) {
                    float x[columns];
                    get(slot, pass, x);
                    UNROLL
                    for (int j = 0; j < columns; ++j)
                        if (first + j >= 0 && first + j < batch.classes)
                            differences[pass] += x[j] - most[pass];
                }
            });
        // One thread reads the labels' logits: it joins after it has them, and nobody writes
        // gradients before.
        double sums[3 * passes];
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            sums[pass] = sum[pass], sums[passes + pass] = differences[pass];
            sums[2 * passes + pass] = 0;
            if (Joins::index() == 0 && is_class)
                sums[2 * passes + pass] = batch.logits[pass].get(at.n, label) - most[pass];
        }
        joins.template join<1>(sums, 0.0, added<double>);
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            RowSums& row = rows[pass];
            row.max = near[pass].max(), row.sum = sums[pass];
            row.settle();
            if (batch.indices) { // smoothing 1 leaves no label, whatever its logit
                const double apart = most[pass] - near[pass].moved - row.max;
                if (smoothing < 1) row.label = (1 - smoothing) * (sums[2 * passes + pass] + apart);
                if (smoothing > 0)
                    row.label +=
                        smoothing *
                        (sums[passes + pass] / static_cast<double>(batch.classes) + apart);
                if (!is_class) row.label = NAN;
            }
        }
    }

    // The divergences of the last two passes. Not `plain`: of rows far out, far apart, with a class
    // that dominates, or with an infinite logit, as the NaN of such a row's sum tells.
    DEVICE PairOfRows find_pair(const Place& at, const int (&where)[passes],
                                const NearRow (&near)[passes], RowSums (&rows)[passes],
                                bool& plain) {
        RowSums &row_k = rows[k], &row_l = rows[k + 1];
        PairOfRows pair(row_k, row_l, near[k].moved, near[k + 1].moved);
        // In each thread of the row's memory, which nobody writes before this sample's last join.
        auto ratio_at = [&](int column, bool of_k) {
            float ratio_k, ratio_l;
            pair.template find_ratios<false>(batch.logits[k].get(at.n, column),
                                             batch.logits[k + 1].get(at.n, column), ratio_k,
                                             ratio_l);
            return of_k ? ratio_k : ratio_l;
        };
        const float pivot_k = row_k.dominated() ? ratio_at(where[k], true) : 0,
                    pivot_l = row_l.dominated() ? ratio_at(where[k + 1], false) : 0;
        pair.pivot_k = pivot_k, pair.pivot_l = pivot_l;
        plain = plain && pair.is_plain();
        double sums[2];
        auto add_up = [&](auto plain) {
            float of_k = 0, of_l = 0;
            each(at, [&](const Chunk* slot, int) {
                float x_k[columns], x_l[columns];
                get(slot, k, x_k), get(slot, k + 1, x_l);
                UNROLL
                for (int j = 0; j < columns; ++j) {
                    float ratio_k, ratio_l;
                    pair.template find_ratios<decltype(plain)::value>(x_k[j], x_l[j], ratio_k,
                                                                      ratio_l);
                    of_k += near[k].template e<decltype(plain)::value>(x_k[j]) * ratio_k;
                    of_l += near[k + 1].template e<decltype(plain)::value>(x_l[j]) * ratio_l;
                }
            });
            sums[0] = of_k, sums[1] = of_l;
            joins.template join<decltype(plain)::value ? 2 : 3>(sums, 0.0, added<double>);
        };
        if (plain) add_up(std::true_type()), plain = sums[0] + sums[1] == sums[0] + sums[1];
        if (!plain) add_up(std::false_type());
        row_k.pivot = pivot_k * curvature_unit, row_k.kl = sums[0] * curvature_unit;
        row_l.pivot = pivot_l * curvature_unit, row_l.kl = sums[1] * curvature_unit;
        return pair;
    }

    DEVICE void sample(const Place& at, int64_t next) {
        float most[passes];
        int where[passes];
        RowSums rows[passes];
        NearRow near[passes];
        await_copies();
        find_maxima(at, most, where);
        bool plain = true;
        UNROLL
        for (int pass = 0; pass < passes; ++pass)
            near[pass] = NearRow(most[pass]), plain = plain && near[pass].is_plain();
        // So low that its e is 0, and finite where such a number is.
        fill_parts(at, [&](int pass) {
            const float low = most[pass] - 1e3f - 0.5f * absolute(most[pass]);
            return low > Of::least && near[pass].is_plain() ? low : lowest;
        });
        find_sums(at, most, near, plain, rows);
        const double mass = batch.indices ? 1 : 0, unit = batch.unit();
        double clean = 0, adversarial = 0, divergence = 0;
        UNROLL
        for (int pass = 0; pass < passes; ++pass)
            if (batch.labelled())
                (pass == 0 ? clean : adversarial) +=
                    rows[pass].cross_entropy(mass) * batch.label_weight(pass);
        auto write_all = [&](const auto& pair) {
            if (plain) write_gradients<true>(at, next, near, rows, unit, mass, pair);
            else write_gradients<false>(at, next, near, rows, unit, mass, pair);
        };
        if constexpr (pairs) {
            const PairOfRows pair = find_pair(at, where, near, rows, plain);
            divergence = pairs_divergence(rows[k].divergence() + rows[k + 1].divergence(), 2);
            write_all(pair);
        } else {
            write_all(nullptr);
        }
        if (Joins::index() == 0) write(at.n, clean, adversarial, divergence);
    }

    template <bool plain, class Pair>
    DEVICE void write_gradients(const Place& at, int64_t next, const NearRow (&near)[passes],
                                const RowSums (&rows)[passes], double unit, double mass,
                                [[maybe_unused]] const Pair& pair) {
        const int label = batch.indices ? static_cast<int>(batch.index(at.n)) : -1;
        const float share = static_cast<float>(1 - batch.options.label_smoothing);
        GradientFactors<float> factors[passes];
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            factors[pass] = GradientFactors<float>(
                rows[pass], unit * batch.label_weight(pass), mass, batch.smoothed(),
                pairs && pass >= k ? unit * batch.options.js_weight : 0);
            factors[pass].of_w *= static_cast<float>(curvature_unit);
        }
        // The next sample's chunks go to these places; its rows may begin elsewhere.
        const bool more = next < batch.samples;
        const Place after = more ? place_of(next) : at;
        const Addresses from = settled_at(logits_of(after));
        const int classes = static_cast<int>(batch.classes), moved = at.shift - after.shift,
                  end_of_next = more ? classes - moved : lowest_column;
        auto copy_next = [&](Chunk* slot, int first) {
            if (first < end_of_next) copy(from, slot, first + moved);
        };
        Addresses into;
        int wanted = 0; // a bit for each pass
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            into.row[pass] = row_of(batch.gradients[pass], at);
            wanted |= (batch.gradients[pass].data != nullptr) << pass;
        }
        into = settled_at(into), wanted = settled(wanted);
        auto find_gradients = [&](auto count, auto& x) { // of x[pass][j] in its place
            UNROLL
            for (int j = 0; j < decltype(count)::value; ++j) {
                UNROLL
                for (int pass = 0; pass < (pairs ? k : passes); ++pass)
                    x[pass][j] =
                        factors[pass].gradient(near[pass].template e<plain>(x[pass][j]));
                if constexpr (pairs) {
                    float ratio_k, ratio_l;
                    pair.template find_ratios<plain>(x[k][j], x[k + 1][j], ratio_k, ratio_l);
                    x[k][j] =
                        factors[k].gradient_of(near[k].template e<plain>(x[k][j]), ratio_k);
                    x[k + 1][j] = factors[k + 1].gradient_of(
                        near[k + 1].template e<plain>(x[k + 1][j]), ratio_l);
                }
            }
        };
        auto of_chunk = [&](const Chunk* slot, Chunk (&packed)[passes]) {
            float x[passes][columns];
            UNROLL
            for (int pass = 0; pass < passes; ++pass) get(slot, pass, x[pass]);
            find_gradients(std::integral_constant<int, columns>(), x);
            UNROLL
            for (int pass = 0; pass < passes; ++pass) packed[pass] = Of::pack(x[pass]);
        };
        // The thread that has the label's chunk keeps its logits: what lies there is overwritten.
        const int label_chunk = (label + at.shift) / columns;
        const bool has_label = wanted && label >= 0 && label < classes &&
                               label_chunk % Joins::size() == Joins::index();
        float labelled[passes][1];
        if (has_label) {
            const Chunk* slot =
                slots + label_chunk / Joins::size() * static_cast<int>(blockDim.x);
            UNROLL
            for (int pass = 0; pass < passes; ++pass)
                labelled[pass][0] =
                    Of::element(slot[pass * of_pass], (label + at.shift) % columns);
        }
        if (wanted) {
            Chunk* slot = slots;
            int first = Joins::index() * columns - at.shift;
            // first of all a chunk in part, of which there may be one more at the end
            if (first < 0) slot += blockDim.x, first += Joins::size() * columns;
#pragma unroll 1
            for (; first <= classes - columns;
                 slot += blockDim.x, first += Joins::size() * columns) {
                Chunk packed[passes];
                of_chunk(slot, packed);
                copy_next(slot, first);
                UNROLL
                for (int pass = 0; pass < passes; ++pass)
                    if (wanted >> pass & 1) put(into.row[pass], first, packed[pass]);
            }
            each_part(at, [&](Chunk* slot, int first) {
                Chunk packed[passes];
                of_chunk(slot, packed);
                UNROLL
                for (int pass = 0; pass < passes; ++pass) {
                    slot[pass * of_pass] = packed[pass];
                    if (wanted >> pass & 1)
                        put_part(into.row[pass], first, slot[pass * of_pass]);
                }
                copy_next(slot, first);
            });
        } else {
            each(at, copy_next);
        }
        if (has_label) { // once more, over what this thread has just written
            find_gradients(std::integral_constant<int, 1>(), labelled);
            UNROLL
            for (int pass = 0; pass < passes; ++pass)
                if (wanted >> pass & 1)
                    batch.gradients[pass].put(at.n, label,
                                              factors[pass].labelled(labelled[pass][0], share));
        }
        // One more chunk, perhaps, than this sample had.
        const int turns =
            (at.chunks - Joins::index() + Joins::size() - 1) / Joins::size(); // of this thread
        copy_next(slots + turns * static_cast<int>(blockDim.x),
                  (turns * Joins::size() + Joins::index()) * columns - at.shift);
    }
};
template <Storage storage, int passes, bool pairs>
__global__ void __launch_bounds__(long_threads, 1)
    loss_long_block(const __grid_constant__ Batch batch) {
    LongRows<BlockJoins, storage, passes, pairs>(batch, dynamic_shared()).run();
}
template <Storage storage, int passes, bool pairs>
__global__ void __launch_bounds__(long_threads, 1)
    loss_long_cluster(const __grid_constant__ Batch batch) {
    LongRows<ClusterJoins, storage, passes, pairs>(batch, dynamic_shared()).run();
}

// --- Rows that do not ---

// A block for each sample, element by element; `scratch` has the sums of every pass.
struct Sweep {
    const Batch& batch;
    BlockGroup group;
    RowSums* rows;
    float* moved;
    int64_t n;

    template <class F> DEVICE void each(F f) {
        for (int64_t i = threadIdx.x; i < batch.classes; i += blockDim.x) f(i);
    }
    DEVICE float x(int pass, int64_t i) const { return batch.logits[pass].get(n, i) - moved[pass]; }
    DEVICE float t(int64_t i) const { return batch.target(n, i); }

    DEVICE void read(int pass) {
        float most[1] = {lowest};
        each([&](int64_t i) { most[0] = maximum(batch.logits[pass].get(n, i), most[0]); });
        group.join(most, lowest, larger<float>);
        const float shift = absolute(most[0]) <= static_cast<float>(far_out) ? 0.0f : most[0],
                    max = most[0] - shift;
        if (threadIdx.x == 0) moved[pass] = shift;
        __syncthreads();
        const double smoothing = batch.options.label_smoothing;
        double sums[3] = {};
        each([&](int64_t i) {
            const float y = x(pass, i) - max;
            sums[0] += exponential(y);
            if (batch.indices && smoothing > 0) sums[1] += y;
            if (batch.indices && i == batch.index(n)) sums[2] += y;
            if (batch.soft.data) sums[2] += label_term(t(i), y);
        });
        group.join(sums, 0.0, added<double>);
        if (threadIdx.x == 0) {
            RowSums& row = rows[pass];
            row = RowSums();
            row.max = max, row.sum = sums[0];
            row.settle();
            if (batch.soft.data) row.label = sums[2];
            if (batch.indices && smoothing < 1) row.label = (1 - smoothing) * sums[2];
            if (batch.indices && smoothing > 0)
                row.label += smoothing / static_cast<double>(batch.classes) * sums[1];
            if (batch.indices && (batch.index(n) < 0 || batch.index(n) >= batch.classes))
                row.label = NAN;
        }
        __syncthreads();
    }
    // The sum of a class's log ratios with every other pass, less the pivot.
    DEVICE float ratios(int k, int64_t i) const {
        float of_k = -static_cast<float>(rows[k].pivot), unused = 0;
        const float x_k = maximum(static_cast<float>(rows[k].max - far_below), x(k, i));
        for (int l = batch.first; l < batch.passes; ++l) {
            if (l == k) continue;
            const PairDistance between(rows[k], rows[l]);
            const float d = (x_k - static_cast<float>(between.from_k)) -
                            (maximum(static_cast<float>(rows[l].max - far_below), x(l, i)) -
                             static_cast<float>(between.from_l)) -
                            static_cast<float>(between.gap);
            add_log_ratios(d, half_complement(minus_absolute(d)), of_k, unused);
        }
        return of_k;
    }
    // The log ratios at the first of the most probable classes, where it dominates the row.
    DEVICE void find_pivot(int k) {
        if (!rows[k].dominated()) return;
        double first[1] = {HUGE_VAL};
        each([&](int64_t i) {
            if (e(k, i) == 1) first[0] = smaller(first[0], static_cast<double>(i));
        });
        group.join(first, HUGE_VAL, smaller<double>);
        const double pivot = first[0] < HUGE_VAL ? ratios(k, static_cast<int64_t>(first[0])) : 0;
        __syncthreads();
        if (threadIdx.x == 0) rows[k].pivot = pivot;
        __syncthreads();
    }
    DEVICE float e(int pass, int64_t i) const {
        return exponential(x(pass, i) - static_cast<float>(rows[pass].max));
    }

    DEVICE void classification() {
        double mass = batch.indices ? 1 : 0, clean = 0, adversarial = 0, divergence = 0;
        if (batch.soft.data) {
            double sums[1] = {};
            each([&](int64_t i) { sums[0] += t(i); });
            group.join(sums, 0.0, added<double>);
            mass = sums[0];
        }
        for (int pass = 0; pass < batch.passes; ++pass) read(pass);
        const bool pairs = batch.passes - batch.first > 1;
        for (int k = batch.first; pairs && k < batch.passes; ++k) {
            find_pivot(k);
            double sums[1] = {};
            each([&](int64_t i) { sums[0] += e(k, i) * ratios(k, i); });
            group.join(sums, 0.0, added<double>);
            if (threadIdx.x == 0) rows[k].kl = sums[0];
        }
        __syncthreads();
        for (int pass = 0; pass < batch.passes; ++pass) {
            if (batch.labelled())
                (pass ? adversarial : clean) +=
                    rows[pass].cross_entropy(mass) * batch.label_weight(pass);
            if (pairs && pass >= batch.first) divergence += rows[pass].divergence();
        }
        const double unit = batch.unit();
        each([&](int64_t i) { // in place, a class's logits are read before any of its gradients is
                              // written
            float gradient[most_passes];
            for (int pass = 0; pass < batch.passes; ++pass) {
                if (!batch.gradients[pass].data) continue;
                const bool in_pairs = pairs && pass >= batch.first;
                const GradientFactors<float> factors(rows[pass], unit * batch.label_weight(pass),
                                                     mass, batch.smoothed(),
                                                     in_pairs ? unit * batch.options.js_weight : 0);
                const float own = e(pass, i);
                float g =
                    in_pairs ? factors.gradient(own, own * ratios(pass, i)) : factors.gradient(own);
                if (batch.indices && i == batch.index(n))
                    g = factors.labelled(g, static_cast<float>(1 - batch.options.label_smoothing));
                if (batch.soft.data) g = factors.labelled(g, t(i));
                gradient[pass] = g;
            }
            for (int pass = 0; pass < batch.passes; ++pass)
                if (batch.gradients[pass].data) batch.gradients[pass].put(n, i, gradient[pass]);
        });
        finish(clean, adversarial,
               pairs ? pairs_divergence(divergence, batch.passes - batch.first) : 0);
    }

    DEVICE void regression() {
        double clean = 0, adversarial = 0, divergence = 0;
        const double classes = static_cast<double>(batch.classes);
        auto distance = [&](auto a, auto b) {
            double sums[1] = {};
            each([&](int64_t i) { sums[0] += squared(a(i), b(i)); });
            group.join(sums, 0.0, added<double>);
            return sums[0] / classes;
        };
        for (int k = 0; k < batch.passes; ++k) {
            auto own = [&](int64_t i) { return batch.logits[k].get(n, i); };
            if (batch.labelled())
                (k ? adversarial : clean) +=
                    distance(own, [&](int64_t i) { return t(i); }) * batch.label_weight(k);
            for (int l = k + 1; k >= batch.first && l < batch.passes; ++l)
                divergence += distance(own, [&](int64_t i) { return batch.logits[l].get(n, i); });
        }
        const float unit = static_cast<float>(batch.unit() / classes),
                    js_weight = static_cast<float>(batch.options.js_weight);
        each([&](int64_t i) {
            float gradient[most_passes];
            for (int k = 0; k < batch.passes; ++k) {
                const float own = batch.logits[k].get(n, i);
                float g = batch.labelled()
                              ? static_cast<float>(batch.label_weight(k)) * squared_slope(own, t(i))
                              : 0.0f;
                for (int l = batch.first; k >= batch.first && l < batch.passes; ++l)
                    g += js_weight * squared_slope(own, batch.logits[l].get(n, i));
                gradient[k] = g * unit;
            }
            for (int k = 0; k < batch.passes; ++k)
                if (batch.gradients[k].data) batch.gradients[k].put(n, i, gradient[k]);
        });
        finish(clean, adversarial, divergence);
    }

    DEVICE void finish(double clean, double adversarial, double divergence) {
        if (threadIdx.x == 0)
            batch.values[3 * n] = clean, batch.values[3 * n + 1] = adversarial,
                             batch.values[3 * n + 2] = divergence;
    }
};

__global__ void __launch_bounds__(sweep_threads) loss_sweep(const __grid_constant__ Batch batch) {
    __shared__ double room[64];
    __shared__ Room<most_passes * sizeof(RowSums)> rows;
    __shared__ float moved[most_passes];
    for (int64_t n = blockIdx.x; n < batch.samples; n += gridDim.x) {
        Sweep sweep{batch, BlockGroup(room), reinterpret_cast<RowSums*>(&rows), moved, n};
        __syncthreads();
        if (batch.ignored(n)) {
            for (int pass = 0; pass < batch.passes; ++pass)
                if (batch.gradients[pass].data)
                    sweep.each([&](int64_t i) { batch.gradients[pass].put(n, i, 0.0f); });
            sweep.finish(0, 0, 0);
        } else if (batch.options.regression) {
            sweep.regression();
        } else {
            sweep.classification();
        }
    }
}

// --- Before and after the rows ---

// By one block, whose threads all have the count afterwards.
DEVICE void count(const Batch& batch, double* room, int64_t* count) {
    double rows[1] = {};
    for (int64_t n = threadIdx.x; n < batch.samples; n += blockDim.x)
        rows[0] += batch.ignored(n) ? 0 : 1;
    BlockGroup(room).join(rows, 0.0, added<double>);
    if (threadIdx.x == 0) *count = static_cast<int64_t>(rows[0]);
    __syncthreads();
}
DEVICE void finish(const Batch& batch, double* room, float* loss, float* parts) {
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
    count_rows(const __grid_constant__ Batch batch, int64_t* into) {
    __shared__ double room[64];
    count(batch, room, into);
}
__global__ void __launch_bounds__(finish_threads)
    finish_loss(const __grid_constant__ Batch batch, float* loss, float* parts) {
    __shared__ double room[64];
    finish(batch, room, loss, parts);
}

// All of it for a small batch by one block, in one launch. Its threads see each other's counts and
// values, as barriers of the block stand between.
template <int m>
__global__ void __launch_bounds__(warp_threads)
    loss_small(const __grid_constant__ Batch batch, int64_t* into, float* loss, float* parts) {
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
    bool by_row, in_place; // in place, times 1 is left alone
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
    int64_t at[28]; // of up to three views with up to four axes
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
bool covered(const Rows& rows, int64_t samples) { // by whole accesses
    const int64_t row_bytes = rows.row * bytes_of(rows.storage);
    return !rows.data || (rows.column == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                          (row_bytes % 16 == 0 || samples <= 1));
}

Batch make_batch(const LossArguments& arguments) {
    if (arguments.passes > most_passes) throw LeftToOthers();
    Batch batch;
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
    cudaGetLastError(); // else the next call would be blamed
    return false;
}

// Runs rows that stay on chip; false where they do not.
template <int m> bool run_on_chip(Batch& batch, bool full, cudaStream_t stream) {
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

// Whether all rows of a sample have one dtype and begin at the same place of 16 bytes.
bool together(const Batch& batch) {
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
    return all;
}

// Runs rows that stay on chip as they are in memory; false where they do not.
template <Storage storage, int passes, bool pairs>
bool launch_long(Batch& batch, cudaStream_t stream) {
    constexpr int size = Elements<storage>::columns;
    const Rows& rows = batch.logits[0];
    const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
                         (batch.samples <= 1 || rows.row * bytes_of(storage) % 16 == 0);
    const int64_t chunks = (batch.classes + (aligned ? 0 : size - 1) + size - 1) / size;
    const int64_t most = attribute_of_device(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    for (int cluster = 1; cluster <= most_cluster; cluster *= 2) {
        if (cluster > 1 && !attribute_of_device(cudaDevAttrClusterLaunch)) return false;
        // Rows too short for so many threads have smaller blocks, and more of them run at once.
        int threads = long_threads;
        while (cluster == 1 && threads > warp_size && chunks <= threads) threads /= 2;
        const int64_t group = int64_t(cluster) * threads;
        batch.turns = static_cast<int>((chunks + group - 1) / group);
        const size_t room = cluster > 1 ? sizeof(ClusterJoins::Room) : sizeof(BlockJoins::Room),
                     bytes = room + size_t(16) * passes * batch.turns * threads;
        if (bytes > static_cast<size_t>(most)) continue;
        const auto kernel = cluster > 1 ? loss_long_cluster<storage, passes, pairs>
                                        : loss_long_block<storage, passes, pairs>;
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
            if (shape.blocks == 0) return false; // all of them are refused
        }
        launch(kernel, shape, stream, batch);
        return true;
    }
    return false;
}
template <int passes, bool pairs> bool launch_long(Batch& batch, cudaStream_t stream) {
    switch (batch.logits[0].storage) {
    case Storage::float32: return launch_long<Storage::float32, passes, pairs>(batch, stream);
    case Storage::bfloat16: return launch_long<Storage::bfloat16, passes, pairs>(batch, stream);
    default: return launch_long<Storage::float16, passes, pairs>(batch, stream);
    }
}
bool run_long(Batch& batch, cudaStream_t stream) {
    if (batch.classes <= short_classes || !together(batch)) return false;
    const bool pairs = batch.passes - batch.first == 2;
    if (batch.passes == 1) return launch_long<1, false>(batch, stream);
    if (batch.passes == 2)
        return pairs ? launch_long<2, true>(batch, stream) : launch_long<2, false>(batch, stream);
    return launch_long<3, true>(batch, stream);
}

// Whether one block does all of a batch: a few samples for each of its warps, of few classes.
bool is_small(const Batch& batch) {
    return !batch.options.regression && !batch.soft.data && batch.passes - batch.first <= 2 &&
           batch.samples <= 64 && batch.classes <= 64;
}

// Runs a batch and returns the loss and its parts.
std::pair<Tensor, Tensor> run(Batch batch, const Tensor& like, cudaStream_t stream) {
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
    const bool on_chip =
        batch.samples == 0 ||
        (!batch.options.regression && !batch.soft.data && m <= 2 &&
         (run_long(batch, stream) ||
          (m == 2 ? run_on_chip<2>(batch, full, stream) : run_on_chip<1>(batch, full, stream))));
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
    Batch batch = make_batch(arguments);
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

// What is left to others takes the operator in place, over copies: torch's dispatcher confuses
// tensors and lists that are returned together.
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

static std::tuple<Tensor, Tensor, Tensors> uegr_loss_or_leave(Tensors logits, OptionalTensor labels,
                                                              LOSS_ARGUMENTS) {
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
