// More passes than long_rows.cuh has code for, up to 9, and soft labels: rows that stay on chip as
// they are in memory.
#pragma once

#include "long_rows.cuh"

namespace uegr {
namespace {

// passes at most
constexpr int many = 9;
static_assert(many <= most_joined);

// Holds what a block keeps beside the rows: by pass what was found of it, by pair the distance.
// Written by some threads, and read by all after the block has met.
struct ManyRoom {
    struct Pass {
        NearRow near;
        RowSums row;
        GradientFactors<float> factors;
    };
    Room<many * sizeof(Pass)> passes;
    Room<many * many * sizeof(PairOfRows)> pairs;

    DEVICE Pass& of(int pass) { return reinterpret_cast<Pass*>(&passes)[pass]; }
    DEVICE PairOfRows& of(int k, int l) {
        return reinterpret_cast<PairOfRows*>(&pairs)[k * many + l];
    }
};

// As LongRows, with the passes in loops: every pass meets every other. Soft labels are a row more.
template <class Joins, Storage storage> struct ManyRows : RowsOnChip<Joins, storage> {
    using Base = RowsOnChip<Joins, storage>;
    using Base::columns, Base::batch, Base::joins, Base::slots, Base::of_pass, Base::sample_of,
        Base::row_of, Base::column_of, Base::each, Base::each_part, Base::get, Base::put,
        Base::counting, Base::write, Base::is_whole;
    using typename Base::Of, typename Base::Chunk, typename Base::Sample;
    static constexpr size_t room = sizeof(typename Joins::Room) + sizeof(ManyRoom);
    ManyRoom& found;
    const bool pairs;

    DEVICE ManyRows(const LossBatch& batch, char* shared)
        : Base(batch, shared, room),
          found(*reinterpret_cast<ManyRoom*>(shared + sizeof(typename Joins::Room))),
          pairs(batch.passes - batch.first > 1) {}

    DEVICE bool is_class(int column) const {
        return column >= 0 && column < static_cast<int>(batch.classes);
    }
    // Calls f for the passes there are, whose values a thread keeps in registers.
    template <class F> DEVICE void each_pass(F f) const {
        UNROLL
        for (int pass = 0; pass < many; ++pass)
            if (pass < batch.passes) f(pass);
    }
    // A pass's value for the thread that has the pass's number.
    template <class T> static DEVICE T own(const T (&of)[many]) {
        T x{};
        UNROLL
        for (int pass = 0; pass < many; ++pass)
            if (static_cast<int>(threadIdx.x) == pass) x = of[pass];
        return x;
    }

    DEVICE void run() {
        for (int64_t n = counting(Joins::first()); n < batch.samples;
             n = counting(n + Joins::count())) {
            const Sample at = sample_of(n);
            each(at, [&](Chunk* slot, int first) {
                for (int pass = 0; pass < batch.passes; ++pass)
                    copy_async(slot + pass * of_pass,
                               column_of(row_of(batch.logits[pass], at), first));
                if (batch.soft.data)
                    copy_async(slot + batch.passes * of_pass,
                               column_of(row_of(batch.soft, at), first));
            });
            await_copies();
            sample(at);
        }
        Joins::leave();
    }

    DEVICE void sample(const Sample& at) {
        float most[many];
        int where[many];
        this->find_maxima(at, most, where, [&](auto f) { each_pass(f); }, [](int) { return true; });
        this->template fill_parts<many>(
            at, [&](int pass) { return Of::far_below(most[pass], NearRow(most[pass])); });
        double sums[many], labels[many], mass[1] = {batch.indices ? 1.0 : 0.0};
        find_sums(at, most, sums, labels, mass);
        const bool has_pass = static_cast<int>(threadIdx.x) < batch.passes;
        if (has_pass) settle(at, own(most), own(sums), own(labels), mass[0]);
        __syncthreads();
        if (pairs) {
            for (int i = threadIdx.x; i < many * many; i += blockDim.x) {
                const int k = i / many, l = i % many;
                if (k < batch.passes && l < batch.passes)
                    found.of(k, l) = PairOfRows(found.of(k).row, found.of(l).row,
                                                found.of(k).near.moved, found.of(l).near.moved);
            }
            __syncthreads();
            if (has_pass) find_pivot(at, static_cast<int>(threadIdx.x), own(where));
            __syncthreads();
            find_divergences(at);
        }
        if (has_pass) {
            const int pass = static_cast<int>(threadIdx.x);
            GradientFactors<float>& factors = found.of(pass).factors;
            factors = GradientFactors<float>(
                found.of(pass).row, batch.unit() * batch.label_weight(pass), mass[0],
                batch.smoothed(),
                pairs && pass >= batch.first ? batch.unit() * batch.options.js_weight : 0);
            factors.of_w *= static_cast<float>(curvature_unit);
        }
        __syncthreads();
        if (Joins::index() == 0) add_up(at, mass[0]);
        write_gradients(at);
    }

    // Writes the targets t that soft labels, smoothed, give the classes of a chunk; 0 for what is
    // no class.
    DEVICE void get_targets(const Chunk* slot, int first, float (&t)[columns]) const {
        const float share = static_cast<float>(1 - batch.options.label_smoothing),
                    floor = static_cast<float>(batch.options.label_smoothing /
                                               static_cast<double>(batch.classes));
        get(slot, batch.passes, t);
        UNROLL
        for (int j = 0; j < columns; ++j) t[j] = is_class(first + j) ? t[j] * share + floor : 0.0f;
    }

    // Of every pass the sum of e, and that of t * (x - most) over the labels; the labels' own.
    DEVICE void find_sums(const Sample& at, const float (&most)[many], double (&sums)[many],
                          double (&labels)[many], double (&mass)[1]) {
        const double smoothing = batch.options.label_smoothing;
        const float smoothed = static_cast<float>(batch.smoothed());
        const int64_t label = batch.indices ? batch.index(at.n) : -1;
        float sum[many] = {}, of_label[many] = {}, of_mass = 0;
        each(at, [&](const Chunk* slot, int first) {
            float t[columns] = {};
            if (batch.soft.data) get_targets(slot, first, t);
            else if (smoothed > 0) {
                UNROLL
                for (int j = 0; j < columns; ++j) t[j] = is_class(first + j) ? smoothed : 0.0f;
            }
            UNROLL
            for (int j = 0; j < columns; ++j) of_mass += t[j];
            each_pass([&](int pass) {
                const NearRow near(most[pass]);
                float x[columns];
                get(slot, pass, x);
                UNROLL
                for (int j = 0; j < columns; ++j) {
                    sum[pass] += near.template e<false>(x[j]);
                    of_label[pass] += label_term(t[j], x[j] - most[pass]);
                }
            });
        });
        UNROLL
        for (int pass = 0; pass < many; ++pass)
            sums[pass] = sum[pass], labels[pass] = of_label[pass];
        // One thread reads the label's logits: it joins after it has them, and nobody writes
        // gradients before. Smoothing 1 leaves no label, whatever its logit.
        if (Joins::index() == 0 && label >= 0 && label < batch.classes && smoothing < 1)
            each_pass([&](int pass) {
                labels[pass] +=
                    (1 - smoothing) * (batch.logits[pass].get(at.n, label) - most[pass]);
            });
        joins.template join<1>(sums, 0.0, added<double>);
        joins.template join<2>(labels, 0.0, added<double>);
        if (batch.soft.data) {
            mass[0] = of_mass;
            joins.template join<3>(mass, 0.0, added<double>);
        }
    }

    DEVICE void settle(const Sample& at, float most, double sum, double label, double mass) {
        ManyRoom::Pass& pass = found.of(static_cast<int>(threadIdx.x));
        pass.near = NearRow(most);
        RowSums row;
        row.max = pass.near.max(), row.sum = sum;
        row.settle();
        if (batch.labelled()) {
            row.label = label + mass * (most - pass.near.moved - row.max);
            if (batch.indices && (batch.index(at.n) < 0 || batch.index(at.n) >= batch.classes))
                row.label = NAN;
        }
        pass.row = row;
    }

    // The log ratios of pass k at its most probable class, where that dominates: of the row's
    // memory, which nobody writes before this sample's last join.
    DEVICE void find_pivot(const Sample& at, int k, int column) {
        RowSums& row = found.of(k).row;
        float pivot = 0;
        if (k >= batch.first && row.dominated())
            for (int l = batch.first; l < batch.passes; ++l) {
                float of_k, of_l;
                if (l == k) continue;
                found.of(k, l).template find_ratios<false>(batch.logits[k].get(at.n, column),
                                                           batch.logits[l].get(at.n, column), of_k,
                                                           of_l);
                pivot += of_k;
            }
        row.pivot = pivot * curvature_unit;
    }
    // The sums over the other passes of pass k's log ratios less its pivot.
    DEVICE void get_ratios(const Chunk* slot, int k, const float (&x)[columns],
                           float (&w)[columns]) const {
        const float pivot = static_cast<float>(found.of(k).row.pivot / curvature_unit);
        UNROLL
        for (int j = 0; j < columns; ++j) w[j] = -pivot;
#pragma unroll 1
        for (int l = batch.first; l < batch.passes; ++l) {
            if (l == k) continue;
            const PairOfRows pair = found.of(k, l);
            float other[columns];
            get(slot, l, other);
            UNROLL
            for (int j = 0; j < columns; ++j) {
                float of_k, of_l;
                pair.template find_ratios<false>(x[j], other[j], of_k, of_l);
                w[j] += of_k;
            }
        }
    }

    DEVICE void find_divergences(const Sample& at) {
        float kl[many] = {};
        each(at, [&](const Chunk* slot, int) {
            each_pass([&](int pass) {
                if (pass < batch.first) return;
                const NearRow near = found.of(pass).near;
                float x[columns], w[columns];
                get(slot, pass, x), get_ratios(slot, pass, x, w);
                UNROLL
                for (int j = 0; j < columns; ++j) kl[pass] += near.template e<false>(x[j]) * w[j];
            });
        });
        double sums[many];
        UNROLL
        for (int pass = 0; pass < many; ++pass) sums[pass] = kl[pass];
        // of this sample again, after others
        joins.template join<1>(sums, 0.0, added<double>);
        if (static_cast<int>(threadIdx.x) < batch.passes)
            found.of(static_cast<int>(threadIdx.x)).row.kl = own(sums) * curvature_unit;
    }

    DEVICE void add_up(const Sample& at, double mass) {
        double clean = 0, adversarial = 0, divergence = 0;
        for (int pass = 0; pass < batch.passes; ++pass) {
            const RowSums& row = found.of(pass).row;
            if (batch.labelled())
                (pass ? adversarial : clean) += row.cross_entropy(mass) * batch.label_weight(pass);
            if (pairs && pass >= batch.first) divergence += row.divergence();
        }
        write(at.n, clean, adversarial,
              pairs ? pairs_divergence(divergence, batch.passes - batch.first) : 0);
    }

    DEVICE void write_gradients(const Sample& at) const {
        const int label = batch.indices ? static_cast<int>(batch.index(at.n)) : -1;
        const float share = static_cast<float>(1 - batch.options.label_smoothing);
        each(at, [&](const Chunk* slot, int first) {
#pragma unroll 1
            for (int pass = 0; pass < batch.passes; ++pass) {
                const Rows& into = batch.gradients[pass];
                if (!into.data) continue;
                const NearRow near = found.of(pass).near;
                const GradientFactors<float> factors = found.of(pass).factors;
                float x[columns], w[columns] = {}, t[columns];
                get(slot, pass, x);
                if (pairs && pass >= batch.first) get_ratios(slot, pass, x, w);
                UNROLL
                for (int j = 0; j < columns; ++j)
                    x[j] = factors.gradient_of(near.template e<false>(x[j]), w[j]);
                if (batch.soft.data) {
                    get_targets(slot, first, t);
                    UNROLL
                    for (int j = 0; j < columns; ++j) x[j] = factors.labelled(x[j], t[j]);
                } else if (static_cast<unsigned>(label - first) < static_cast<unsigned>(columns)) {
                    UNROLL
                    for (int j = 0; j < columns; ++j)
                        if (first + j == label) x[j] = factors.labelled(x[j], share);
                }
                if (is_whole(first)) put(row_of(into, at), first, Of::pack(x));
                else
                    for (int j = 0; j < columns; ++j)
                        if (is_class(first + j)) into.put(at.n, first + j, x[j]);
            }
        });
    }
};
template <Storage storage>
__global__ void __launch_bounds__(long_threads, 1)
    loss_many_block(const __grid_constant__ LossBatch batch) {
    ManyRows<BlockJoins, storage>(batch, dynamic_shared()).run();
}
template <Storage storage>
__global__ void __launch_bounds__(long_threads, 1)
    loss_many_cluster(const __grid_constant__ LossBatch batch) {
    ManyRows<ClusterJoins, storage>(batch, dynamic_shared()).run();
}

} // namespace
} // namespace uegr
