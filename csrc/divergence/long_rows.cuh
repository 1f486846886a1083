// Rows that stay on chip as they are in memory, in the shared memory of a block or of a cluster.
#pragma once

#include <type_traits>

#include "batch.cuh"

namespace uegr {
namespace {

// Takes apart what 16 bytes of a row hold.
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
        // ordered as the floats
        auto larger = [](uint32_t x, uint32_t y) {
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
    // Returns a logit so far below a row's maximum that its e is 0; a finite one where there is
    // such a number.
    static DEVICE float far_below(float most, const NearRow& near) {
        const float low = most - 1e3f - 0.5f * absolute(most);
        return low > least && near.is_plain() ? low : lowest;
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

// A value and its column as an integer that orders as the values do, of equal ones the first column
// last.
DEVICE uint64_t key_of(float value, int column) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return static_cast<uint64_t>(bits >> 31 ? ~bits : bits | 1u << 31) << 32 |
           (~0u - static_cast<uint32_t>(column));
}
DEVICE float value_of_key(uint64_t key) {
    const uint32_t bits = static_cast<uint32_t>(key >> 32);
    return bit_cast<float>(bits >> 31 ? bits & ~(1u << 31) : ~bits);
}
DEVICE int column_of_key(uint64_t key) {
    return static_cast<int>(~0u - static_cast<uint32_t>(key));
}

// A sample's rows in shared memory as they are: chunks of 16 bytes, of which a thread has the same
// of all rows, and nobody else looks at them. A row may begin anywhere, if all begin at the same
// place of 16 bytes: the first and the last chunk then hold less, and what else they hold is no
// class.
template <class Joins, Storage storage> struct RowsOnChip {
    using Of = Elements<storage>;
    using Chunk = typename Of::Chunk;
    static constexpr int columns = Of::columns;
    const LossBatch& batch;
    Joins joins;
    // this thread's first
    Chunk* slots;
    // slots of a pass
    int of_pass;

    DEVICE RowsOnChip(const LossBatch& batch, char* shared, size_t room)
        : batch(batch), joins(shared), slots(reinterpret_cast<Chunk*>(shared + room) + threadIdx.x),
          of_pass(batch.turns * static_cast<int>(blockDim.x)) {}

    // A sample's rows.
    struct Sample {
        int64_t n;
        // columns from the start of 16 bytes to that of a row
        int shift;
        int chunks;
    };
    DEVICE Sample sample_of(int64_t n) const {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(batch.logits[0].at(n, 0)) %
                                           16 / (16 / columns));
        const int classes = static_cast<int>(batch.classes);
        return {n, shift, (classes + shift + columns - 1) / columns};
    }
    // Returns where a sample's row begins in a pass.
    static DEVICE char* row_of(const Rows& rows, const Sample& at) {
        return rows.data + at.n * rows.row * (16 / columns);
    }
    static DEVICE char* column_of(char* row, int column) {
        return row + static_cast<int64_t>(column) * (16 / columns);
    }
    // Calls f(slot, first) for this thread's chunks: where the first pass's lies, and its first
    // column.
    template <class F> DEVICE void each(const Sample& at, F f) const {
        const int classes = static_cast<int>(batch.classes);
        int first = Joins::index() * columns - at.shift;
        Chunk* slot = slots;
#pragma unroll 1
        for (; first < classes; slot += blockDim.x, first += Joins::size() * columns)
            f(slot, first);
    }
    // Calls f(slot, first), as `each` does, for those of this thread's chunks that are classes in
    // part: a row's first and its last.
    template <class F> DEVICE void each_part(const Sample& at, F f) const {
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
            for (int pass = 0; pass < batch.passes; ++pass)
                if (batch.gradients[pass].data) clear(batch.gradients[pass], sample_of(n));
            if (Joins::index() == 0) write(n, 0, 0, 0);
        }
        return n;
    }
    DEVICE void clear(const Rows& into, const Sample& at) const {
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

    // Gives what is in a chunk and no class a value, by pass; of `most` passes at most.
    template <int most, class F> DEVICE void fill_parts(const Sample& at, F value_of) {
        each_part(at, [&](Chunk* slot, int first) {
            for (int j = 0; j < columns; ++j)
                if (first + j < 0 || first + j >= batch.classes) {
                    UNROLL
                    for (int pass = 0; pass < most; ++pass)
                        if (pass < batch.passes) Of::set(slot[pass * of_pass], j, value_of(pass));
                }
        });
    }

    // Finds each row's maximum, for all threads the same, and the column where a pass has it: of
    // the passes that `placed` names, for the others 0. each_pass(f) calls f for every pass.
    template <int most_passes, class EachPass, class Placed>
    DEVICE void find_maxima(const Sample& at, float (&most)[most_passes], int (&where)[most_passes],
                            EachPass each_pass, Placed placed) {
        const Chunk* chunks[most_passes];
        int firsts[most_passes] = {};
        UNROLL
        for (int pass = 0; pass < most_passes; ++pass) most[pass] = lowest, chunks[pass] = slots;
        fill_parts<most_passes>(at, [](int) { return lowest; });
        each(at, [&](const Chunk* slot, int first) {
            each_pass([&](int pass) {
                const float here = Of::largest(slot[pass * of_pass]);
                if (placed(pass) && here > most[pass]) chunks[pass] = slot, firsts[pass] = first;
                most[pass] = at_least(here, most[pass]);
            });
        });
        uint64_t keys[most_passes] = {};
        each_pass([&](int pass) {
            int column = 0;
            if (placed(pass) && most[pass] > lowest) {
                float x[columns];
                get(chunks[pass], pass, x);
                UNROLL
                for (int j = columns - 1; j >= 0; --j)
                    if (x[j] == most[pass]) column = firsts[pass] + j;
            }
            keys[pass] = key_of(most[pass], column);
        });
        joins.template join<0>(keys, uint64_t(0), larger<uint64_t>);
        UNROLL
        for (int pass = 0; pass < most_passes; ++pass)
            most[pass] = value_of_key(keys[pass]), where[pass] = column_of_key(keys[pass]);
    }
};

// Samples one after another: all of a sample's rows are asked for at once. A visit finds the
// maxima, one the sums, one the pairs, the last the gradients; the exponentials are found anew each
// time. As the last visit leaves a chunk it asks for the next sample's.
template <class Joins, Storage storage, int passes, bool pairs>
struct LongRows : RowsOnChip<Joins, storage> {
    using Base = RowsOnChip<Joins, storage>;
    using Base::columns, Base::batch, Base::joins, Base::slots, Base::of_pass, Base::sample_of,
        Base::row_of, Base::column_of, Base::each, Base::each_part, Base::get, Base::put,
        Base::put_part, Base::counting, Base::write;
    using typename Base::Of, typename Base::Chunk, typename Base::Sample;
    // the pair: this pass and the one after it
    static constexpr int k = passes - 2;

    DEVICE LongRows(const LossBatch& batch, char* shared)
        : Base(batch, shared, sizeof(typename Joins::Room)) {}

    struct Addresses {
        char* row[passes];
    };
    DEVICE Addresses logits_of(const Sample& at) const {
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
    DEVICE void run() {
        int64_t n = counting(Joins::first());
        if (n < batch.samples) {
            const Addresses from = logits_of(sample_of(n));
            each(sample_of(n), [&](Chunk* slot, int first) { copy(from, slot, first); });
        }
        while (n < batch.samples) {
            const int64_t next = counting(n + Joins::count());
            sample(sample_of(n), next);
            n = next;
        }
        Joins::leave();
    }

    // The rows' sums.
    DEVICE void find_sums(const Sample& at, const float (&most)[passes],
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
            // smoothing 1 leaves no label, whatever its logit
            if (batch.indices) {
                const double apart = most[pass] - near[pass].moved - row.max;
                if (smoothing < 1) row.label = (1 - smoothing) * (sums[2 * passes + pass] + apart);
                if (smoothing > 0)
                    row.label += smoothing *
                                 (sums[passes + pass] / static_cast<double>(batch.classes) + apart);
                if (!is_class) row.label = NAN;
            }
        }
    }

    // The divergences of the last two passes. Not `plain`: of rows far out, far apart, with a class
    // that dominates, or with an infinite logit, as the NaN of such a row's sum tells.
    DEVICE PairOfRows find_pair(const Sample& at, const int (&where)[passes],
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

    DEVICE void sample(const Sample& at, int64_t next) {
        float most[passes];
        int where[passes];
        RowSums rows[passes];
        NearRow near[passes];
        await_copies();
        this->find_maxima(
            at, most, where,
            [](auto f) {
                UNROLL
                for (int pass = 0; pass < passes; ++pass) f(pass);
            },
            [](int pass) { return pairs && pass >= k; });
        bool plain = true;
        UNROLL
        for (int pass = 0; pass < passes; ++pass)
            near[pass] = NearRow(most[pass]), plain = plain && near[pass].is_plain();
        this->template fill_parts<passes>(
            at, [&](int pass) { return Of::far_below(most[pass], near[pass]); });
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
    DEVICE void write_gradients(const Sample& at, int64_t next, const NearRow (&near)[passes],
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
        const Sample after = more ? sample_of(next) : at;
        const Addresses from = settled_at(logits_of(after));
        const int classes = static_cast<int>(batch.classes), moved = at.shift - after.shift,
                  end_of_next = more ? classes - moved : lowest_column;
        auto copy_next = [&](Chunk* slot, int first) {
            if (first < end_of_next) copy(from, slot, first + moved);
        };
        Addresses into;
        // a bit for each pass
        int wanted = 0;
        UNROLL
        for (int pass = 0; pass < passes; ++pass) {
            into.row[pass] = row_of(batch.gradients[pass], at);
            wanted |= (batch.gradients[pass].data != nullptr) << pass;
        }
        into = settled_at(into), wanted = settled(wanted);
        // of x[pass][j] in its place
        auto find_gradients = [&](auto count, auto& x) {
            UNROLL
            for (int j = 0; j < decltype(count)::value; ++j) {
                UNROLL
                for (int pass = 0; pass < (pairs ? k : passes); ++pass)
                    x[pass][j] = factors[pass].gradient(near[pass].template e<plain>(x[pass][j]));
                if constexpr (pairs) {
                    float ratio_k, ratio_l;
                    pair.template find_ratios<plain>(x[k][j], x[k + 1][j], ratio_k, ratio_l);
                    x[k][j] = factors[k].gradient_of(near[k].template e<plain>(x[k][j]), ratio_k);
                    x[k + 1][j] = factors[k + 1].gradient_of(
                        near[k + 1].template e<plain>(x[k + 1][j]), ratio_l);
                }
            }
        };
        auto of_chunk = [&](const Chunk* slot, Chunk(&packed)[passes]) {
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
            const Chunk* slot = slots + label_chunk / Joins::size() * static_cast<int>(blockDim.x);
            UNROLL
            for (int pass = 0; pass < passes; ++pass)
                labelled[pass][0] = Of::element(slot[pass * of_pass], (label + at.shift) % columns);
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
                    if (wanted >> pass & 1) put_part(into.row[pass], first, slot[pass * of_pass]);
                }
                copy_next(slot, first);
            });
        } else {
            each(at, copy_next);
        }
        // once more, over what this thread has just written
        if (has_label) {
            find_gradients(std::integral_constant<int, 1>(), labelled);
            UNROLL
            for (int pass = 0; pass < passes; ++pass)
                if (wanted >> pass & 1)
                    batch.gradients[pass].put(at.n, label,
                                              factors[pass].labelled(labelled[pass][0], share));
        }
        // One more chunk, perhaps, than this sample had.
        // of this thread
        const int turns = (at.chunks - Joins::index() + Joins::size() - 1) / Joins::size();
        copy_next(slots + turns * static_cast<int>(blockDim.x),
                  (turns * Joins::size() + Joins::index()) * columns - at.shift);
    }
};
template <Storage storage, int passes, bool pairs>
__global__ void __launch_bounds__(long_threads, 1)
    loss_long_block(const __grid_constant__ LossBatch batch) {
    LongRows<BlockJoins, storage, passes, pairs>(batch, dynamic_shared()).run();
}
template <Storage storage, int passes, bool pairs>
__global__ void __launch_bounds__(long_threads, 1)
    loss_long_cluster(const __grid_constant__ LossBatch batch) {
    LongRows<ClusterJoins, storage, passes, pairs>(batch, dynamic_shared()).run();
}

} // namespace
} // namespace uegr
