// Rows that do not stay on chip, element by element.
#pragma once

#include "batch.cuh"

namespace uegr {
namespace {

// A block for each sample, element by element; `scratch` has the sums of every pass.
struct Sweep {
    const LossBatch& batch;
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
        // in place, a class's logits are read before any of its gradients is
        // written
        each([&](int64_t i) {
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

__global__ void __launch_bounds__(sweep_threads)
    loss_sweep(const __grid_constant__ LossBatch batch) {
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

} // namespace
} // namespace uegr
