// Rows that a warp, a block or a cluster keeps on chip as floats, with their exponentials: those of
// few classes, and those that do not lie together in memory.
#pragma once

#include "batch.cuh"

namespace uegr {
namespace {

// Holds what a thread keeps of its columns, in a role: x or w, and e, of each pass.
struct Kept {
    float4* base;
    // in float4
    int64_t role_size;
    // threads of a block that keep some
    int stride;

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
    const LossBatch& batch;
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
        // of e; of x - max; of the labels
        double sums[3] = {};
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
        // smoothing 1 leaves no label, whatever its logit
        if (batch.indices) {
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
        // the log ratios at the first of the most probable classes
        if (k.dominated() || l.dominated()) {
            // by the 8 columns they are in
            float first[2] = {HUGE_VALF, HUGE_VALF};
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
                    // one of them
                    first[side] = -1;
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

template <class Group, class Columns, int m> DEVICE void over_samples(const LossBatch& batch) {
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
    loss_full_warp(const __grid_constant__ LossBatch batch) {
    over_samples<WarpGroup, FullColumns, m>(batch);
}
template <int m>
__global__ void __launch_bounds__(warp_threads, 4)
    loss_ragged_warp(const __grid_constant__ LossBatch batch) {
    over_samples<WarpGroup, RaggedColumns, m>(batch);
}
template <int m>
__global__ void __launch_bounds__(block_threads, 1)
    loss_ragged_cluster(const __grid_constant__ LossBatch batch) {
    over_samples<ClusterGroup, RaggedColumns, m>(batch);
}

} // namespace
} // namespace uegr
