// The selecting operators on the CPU: checks, statistics, loop. The formulas are selective.h's.
//
// A tensor passes through L1 in blocks of 256: words of the generator, then b/p of every element,
// then the optimizer's line. One parallel region serves a whole call. Its threads take items from a
// counter: a pack of small tensors, whose statistics and update follow each other while g is in
// cache, or a piece of a large one, whose updates wait for statistics that were taken before them.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>

#include "../core/tensor.h"
#include "selective.h"

namespace uegr {
namespace {

constexpr int64_t item_size = 1 << 18; // elements; their gradient fits a second-level cache
constexpr int64_t rank_slots = 8; // tables of large tensors that are alive at a time
constexpr int rank_table = rank_bins + 1; // 1/p by bin; the last one serves what is not finite

// Least and largest |x| over finite elements, as bits: those of non-negative floats order as the
// floats do.
template <class T> struct Extremes {
    using Bits = typename Float<T>::Bits;
    static constexpr int lanes = 256 / sizeof(T); // four vectors of each, in registers
    Bits least[lanes], most[lanes];

    Extremes() {
        std::fill(least, least + lanes, ~Bits(0)), std::fill(most, most + lanes, Bits(0));
    }
    void add(const T* x, int64_t n) {
        Bits low[lanes], high[lanes];
        memcpy(low, least, sizeof(low)), memcpy(high, most, sizeof(high));
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) {
            for (int k = 0; k < lanes; k += 64 / static_cast<int>(sizeof(T)))
                __builtin_prefetch(x + i + k + prefetch_distance);
            for (int k = 0; k < lanes; ++k) add(x + i + k, low[k], high[k]);
        }
        for (int k = 0; i + k < n; ++k) add(x + i + k, low[k], high[k]);
        memcpy(least, low, sizeof(low)), memcpy(most, high, sizeof(high));
    }
    Bits low() const { return std::accumulate(least, least + lanes, least[0], minimum<Bits>); }
    Bits high() const { return std::accumulate(most, most + lanes, most[0], maximum<Bits>); }
    // Read as an integer at once, and masked: GCC 12 vectorises neither a cast from the float nor a
    // conditional maximum.
    static void add(const T* x, Bits& least, Bits& most) {
        Bits bits;
        memcpy(&bits, x, sizeof(bits));
        bits &= ~Bits(0) >> 1;
        const Bits counted = bits & (Bits(0) - Bits(bits < Float<T>::infinity));
        least = bits < least ? bits : least;
        most = counted > most ? counted : most;
    }
};

// One tensor of a call.
template <class T, class Line> struct Entry {
    using Bits = typename Float<T>::Bits;
    View g, s, theta,
        states[3]; // s: a saliency in the place of g*g; states: in the operator's order
    int states_count = 0;
    int64_t size = 0;
    Layout layout{};
    uint32_t step = 0;
    Line line{};
    Probability<T> probability{};
    const float* by_bin = nullptr; // "rank"
    View kept[2]; // "previous": minimum and maximum of s
    bool own_statistics = false; // gathered in this call, before the update
    std::atomic<bool> ready{false};
    std::atomic<int> statistics_left{0}, updates_left{0};
    std::atomic<Bits> low{~Bits(0)}, high{0};

    void join(const Extremes<T>& found) {
        const Bits least = found.low(), most = found.high();
        for (Bits now = low; least < now && !low.compare_exchange_weak(now, least);) {}
        for (Bits now = high; most > now && !high.compare_exchange_weak(now, most);) {}
    }
    // Minimum and maximum of s in the previous step; NaN where nothing is kept yet.
    Range kept_range() const {
        double low = NAN, high = NAN;
        if (kept[0].data) load(kept[0], 0, 1, &low), load(kept[1], 0, 1, &high);
        return {low, high};
    }
    Range range() const { return range_of<T>(low, high, s.data); }
};

template <class T, class Line> struct Call {
    // What an operator does with a block of parameters, gradients, factors b/p and states.
    using LineBlock = void (*)(const Line&, int n, T* theta, const T* g, const T* factor, T* a,
                               T* b, T* c);
    SelectionOptions options{};
    uint64_t seed = 0;
    T unscale = 1; // 1/grad_scale, negative to maximize
    bool draws = true; // false: every u is 0
    bool rounding = false; // some state is bfloat16
    LineBlock line_block = nullptr; // null: statistics alone
    std::vector<Entry<T, Line>> entries;

    bool random() const {
        return draws && (options.normalization != Normalization::constant ||
                         inverse_of_constant(options) != 1);
    }
};

// 1/p by bin from counts by bin, in place; bins outside [first, last] are taken to be empty and
// left alone.
void table_from_counts(float* table, int first, int last, const SelectionOptions& o) {
    double total = 0;
    for (int bin = first; bin <= last; ++bin) total += table[bin];
    double below = 0;
    for (int bin = first; bin <= last; ++bin) {
        const double count = table[bin];
        table[bin] = static_cast<float>(below / std::max(total, 1.0));
        below += count;
    }
    const RankCurve curve(o);
    for (int bin = first; bin <= last; ++bin) table[bin] = curve.inverse(table[bin]);
    table[rank_bins] = 1;
}

// b/p of n elements; `inverse(i)` is element i's 1/p.
template <bool rescale, class T, class Inverse>
void factor_block(int n, const T* __restrict g, const uint32_t* __restrict words,
                  T* __restrict factor, Inverse inverse) {
    slices(n, [=](int i) { factor[i] = drawn_factor<rescale>(g[i], inverse(i), words[i]); });
}

// A thread at work on a call.
template <class T, class Line> struct Worker {
    const Call<T, Line>& call;
    RoundKeys keys, rounding_keys;
    std::vector<float> table; // "rank": of a small tensor
    alignas(64) T g[block_size], s[block_size], factor[block_size], theta[block_size],
        states[3][block_size];
    alignas(64) uint32_t words[2 * block_size + 4] = {}, rounding[2 * block_size + 4];
    alignas(64) int32_t bins[block_size];
    alignas(64) float ranks[block_size]; // 1/p

    explicit Worker(const Call<T, Line>& call)
        : call(call), keys(call.seed), rounding_keys(call.seed ^ rounding_key) {
        if (call.options.normalization == Normalization::rank) table.resize(rank_table);
    }

    const T* gradient(const Entry<T, Line>& e, int64_t begin, int n) {
        const T* block = block_at(e.g, begin, n, g, slice);
        if (call.unscale == 1) return block;
        slices(n, [&, unscale = call.unscale](int i) { g[i] = block[i] * unscale; });
        return g;
    }

    // Calls block(begin, n) for the blocks of [begin, end).
    template <class Block> static void blocks(int64_t begin, int64_t end, Block block) {
        for (; begin < end; begin += block_size)
            block(begin, static_cast<int>(std::min<int64_t>(block_size, end - begin)));
    }

    void gather(Entry<T, Line>& e, int64_t begin, int64_t end) {
        Extremes<T> found;
        const View& from = e.s.data ? e.s : e.g;
        if (from.contiguous && from.storage == storage_of<T> && (e.s.data || call.unscale == 1))
            found.add(reinterpret_cast<const T*>(from.data) + begin, end - begin);
        else
            blocks(begin, end, [&](int64_t at, int n) {
                found.add(e.s.data ? block_at(e.s, at, n, s, slice) : gradient(e, at, n), n);
            });
        e.join(found);
    }

    // The bins of n gradients, or of saliencies in their place; the one after the last is for what
    // is not finite.
    void bin(int n, const T* g, const T* given) {
        auto fill = [n](int32_t* __restrict bins, auto magnitude) {
            slices(n, [=](int i) { bins[i] = minimum(rank_bin(magnitude(i)), rank_bins); });
        };
        if (given) fill(bins, [=](int i) { return root(given[i]); });
        else fill(bins, [=](int i) { return absolute(g[i]); });
    }

    // Counts by bin: elements [0, size) whose unsharded index is a multiple of `every`, each
    // counting `weight`.
    template <class Count>
    void count(const Entry<T, Line>& e, int64_t every, Count* counts, Count weight) {
        auto add = [&](T x) {
            x = e.s.data ? root(x) : absolute(x * call.unscale);
            if (finite(x)) counts[rank_bin(x)] += weight;
        };
        const View& from = e.s.data ? e.s : e.g;
        if (every == 1) {
            blocks(0, e.size, [&](int64_t at, int n) {
                bin(n, e.s.data ? nullptr : gradient(e, at, n),
                    e.s.data ? block_at(e.s, at, n, s, slice) : nullptr);
                for (int i = 0; i < n; ++i)
                    if (bins[i] < rank_bins) counts[bins[i]] += weight;
            });
            return;
        }
        const Layout& at = e.layout;
        for (int64_t run = 0; run < e.size; run += at.run) {
            const int64_t first = at.offset + run / at.run * at.stride,
                          end = std::min(at.run, e.size - run);
            const int64_t begin = (every - first % every) % every;
            if (from.contiguous && from.storage == storage_of<T>) {
                const T* x = reinterpret_cast<const T*>(from.data) + run;
                for (int64_t l = begin; l < end; l += every) add(x[l]);
                continue;
            }
            for (int64_t l = begin; l < end; l += every) {
                T x;
                load(from, run + l, 1, &x);
                add(x);
            }
        }
    }

    void rank(Entry<T, Line>& e, float* into) {
        int first = 0, last = rank_bins - 1;
        const int64_t every = rank_stride(e.size);
        if (every == 1) { // every element is counted: no other bin will be looked up
            gather(e, 0, e.size);
            const T least = bit_cast<T>(e.low.load()), most = bit_cast<T>(e.high.load());
            first = e.low >= Float<T>::infinity ? 0 : rank_bin(e.s.data ? root(least) : least);
            last = e.low >= Float<T>::infinity ? 0 : rank_bin(e.s.data ? root(most) : most);
        }
        std::fill(into + first, into + last + 1, 0.0f);
        count(e, every, into, 1.0f);
        table_from_counts(into, first, last, call.options);
        e.by_bin = into;
    }

    void settle(Entry<T, Line>& e) const {
        const auto range = e.range();
        e.probability = Probability<T>(call.options, range.low, range.high);
    }

    template <bool rescale>
    void factors(const Entry<T, Line>& e, const T* g, const uint32_t* drawn, int64_t begin, int n) {
        const T* given = e.s.data ? block_at(e.s, begin, n, s, slice) : nullptr;
        if (call.options.normalization == Normalization::constant) {
            const T inverse = static_cast<T>(inverse_of_constant(call.options));
            factor_block<rescale>(n, g, drawn, factor, [=](int) { return inverse; });
        } else if (call.options.normalization == Normalization::rank) {
            bin(n, g, given);
            look_up(n, e.by_bin, bins, ranks);
            factor_block<rescale>(n, g, drawn, factor,
                                  [ranks = ranks](int i) { return T(ranks[i]); });
        } else {
            const Probability<T> probability = e.probability;
            if (given)
                factor_block<rescale>(n, g, drawn, factor, [=](int i) {
                    return finite(given[i]) ? probability.inverse(given[i]) : T(1);
                });
            else
                factor_block<rescale>(n, g, drawn, factor,
                                      [=](int i) { return probability.inverse(saliency(g[i])); });
        }
    }

    void update(Entry<T, Line>& e, int64_t begin, int64_t end) {
        Extremes<T> found;
        const bool gathers = e.kept[0].data && !e.own_statistics;
        blocks(begin, end, [&](int64_t at, int n) {
            const T* g = gradient(e, at, n);
            if (gathers) found.add(g, n);
            const uint32_t* drawn =
                call.random() ? element_words(words, at, n, e.layout, e.step, keys) : words;
            T* parameters = block_at(e.theta, at, n, theta, slice);
            T* moments[3] = {};
            for (int k = 0; k < e.states_count; ++k)
                moments[k] = block_at(e.states[k], at, n, states[k], slice);
            if (call.options.rescale) factors<true>(e, g, drawn, at, n);
            else factors<false>(e, g, drawn, at, n);
            call.line_block(e.line, n, parameters, g, factor, moments[0], moments[1], moments[2]);
            if (parameters == theta) store_block(e.theta, at, n, parameters);
            const uint32_t* lower =
                call.rounding ? element_words(rounding, at, n, e.layout, e.step, rounding_keys)
                              : nullptr;
            for (int k = 0; k < e.states_count; ++k)
                if (moments[k] == states[k])
                    store_block(e.states[k], at, n, moments[k], lower, k == 0 ? 0 : 16);
        });
        if (gathers) e.join(found);
    }
};

struct Item {
    enum Kind { pack, statistics, update } kind;
    int64_t first, count, begin,
        end; // entries [first, first + count); elements [begin, end) of a large one
};

// The call's items, in an order in which each waits for earlier ones only. A large tensor's
// statistics stand one tensor ahead of its update.
template <class T, class Line> std::vector<Item> plan(Call<T, Line>& call) {
    std::vector<Item> items, updates;
    auto flush = [&] {
        items.insert(items.end(), updates.begin(), updates.end()), updates.clear();
    };
    const int64_t count = static_cast<int64_t>(call.entries.size());
    for (int64_t i = 0; i < count; ++i) {
        auto& e = call.entries[i];
        if (e.size == 0) continue;
        if (e.size <= item_size) {
            const bool fits = !items.empty() && items.back().kind == Item::pack &&
                              items.back().first + items.back().count == i &&
                              items.back().end + e.size <= item_size;
            if (!fits) items.push_back({Item::pack, i, 0, 0, 0});
            items.back().count += 1, items.back().end += e.size;
            continue;
        }
        const int pieces = static_cast<int>((e.size + item_size - 1) / item_size);
        const bool whole = call.options.normalization == Normalization::rank;
        if (e.own_statistics) {
            e.statistics_left = whole ? 1 : pieces;
            for (int k = 0; k < e.statistics_left; ++k)
                items.push_back({Item::statistics, i, 1, k * item_size,
                                 whole ? e.size : std::min(e.size, (k + 1) * item_size)});
            flush();
        }
        e.updates_left = pieces;
        for (int k = 0; k < pieces; ++k)
            updates.push_back(
                {Item::update, i, 1, k * item_size, std::min(e.size, (k + 1) * item_size)});
        if (!e.own_statistics) flush();
    }
    flush();
    return items;
}

template <class T, class Line> void run(Call<T, Line>& call) {
    const std::vector<Item> items = plan(call);
    if (items.empty()) return;
    const bool rank = call.options.normalization == Normalization::rank;
    std::vector<std::vector<float>> slots(rank ? rank_slots : 0);
    std::vector<Entry<T, Line>*> owners(slots.size(), nullptr);
    std::vector<int64_t> slot_of(rank ? call.entries.size() : 0);
    std::vector<Entry<T, Line>*> before(slot_of.size(), nullptr);
    int64_t large = 0;
    for (size_t i = 0; i < slot_of.size(); ++i)
        if (call.entries[i].size > item_size && call.entries[i].own_statistics) {
            slot_of[i] = large++ % rank_slots;
            before[i] = std::exchange(owners[slot_of[i]], &call.entries[i]);
            slots[slot_of[i]].resize(rank_table);
        }
    std::atomic<size_t> next{0};
    auto work = [&] {
        auto worker = std::make_unique<Worker<T, Line>>(call);
        for (size_t at; (at = next++) < items.size();) {
            const Item& item = items[at];
            auto& e = call.entries[item.first];
            if (item.kind == Item::pack) {
                for (int64_t i = item.first; i < item.first + item.count; ++i) {
                    auto& small = call.entries[i];
                    if (small.own_statistics && rank) worker->rank(small, worker->table.data());
                    else if (small.own_statistics)
                        worker->gather(small, 0, small.size), worker->settle(small);
                    if (call.line_block) worker->update(small, 0, small.size);
                }
            } else if (item.kind == Item::statistics) {
                if (rank) {
                    const auto* owner = before[item.first];
                    while (owner && owner->updates_left > 0) std::this_thread::yield();
                    worker->rank(e, slots[slot_of[item.first]].data());
                } else {
                    worker->gather(e, item.begin, item.end);
                }
                if (e.statistics_left.fetch_sub(1) == 1) {
                    if (!rank) worker->settle(e);
                    e.ready = true;
                }
            } else if (call.line_block) {
                while (e.own_statistics && !e.ready) std::this_thread::yield();
                worker->update(e, item.begin, item.end);
                --e.updates_left;
            }
        }
    };
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items.size());
    if (threads <= 1) work();
    else torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}

// --- The operators ---

// A call with one entry by tensor, checked: options, gradients, saliencies (or none) and layouts.
template <class T, class Line>
Call<T, Line> make_call(const SelectionOptions& options, int64_t seed, const Tensors& grads,
                        const Tensors& saliencies, const std::vector<int64_t>& layout) {
    STD_TORCH_CHECK(options.normalization >= Normalization::minmax &&
                        options.normalization <= Normalization::constant,
                    "normalization is ", static_cast<int64_t>(options.normalization),
                    "; use 0 (minmax), 1 (range), 2 (rank) or 3 (constant)");
    STD_TORCH_CHECK(layout.size() == 4 * grads.size(), "layout has ", layout.size(),
                    " numbers; give stream, offset, run, stride by tensor");
    STD_TORCH_CHECK(saliencies.empty() || saliencies.size() == grads.size(),
                    "saliencies: ", saliencies.size(), " for ", grads.size(), " tensors");
    Call<T, Line> call;
    call.options = options;
    call.seed = static_cast<uint64_t>(seed);
    call.entries = std::vector<Entry<T, Line>>(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        auto& e = call.entries[i];
        e.g = view(grads[i], "grads", false);
        if (!saliencies.empty()) {
            e.s = view(saliencies[i], "saliencies", false);
            check_same_shape(e.s, e.g, "saliencies", i);
        }
        e.size = grads[i].numel();
        e.layout = {layout[4 * i], layout[4 * i + 1], std::max<int64_t>(layout[4 * i + 2], 1),
                    layout[4 * i + 3]};
        check_layout(e.layout, e.size, i);
    }
    return call;
}

void table_from_row(const int64_t* counts, float* table, const SelectionOptions& o) {
    int64_t total = 0;
    for (int bin = 0; bin < rank_bins; ++bin) total += counts[bin];
    // As shares of 2^24: only the ratios matter.
    const double unit = 16777216.0 / static_cast<double>(std::max<int64_t>(total, 1));
    for (int bin = 0; bin < rank_bins; ++bin)
        table[bin] = static_cast<float>(static_cast<double>(counts[bin]) * unit);
    table_from_counts(table, 0, rank_bins - 1, o);
}

// Says where each entry's statistics come from: handed in, kept from the previous step, or this
// call. Returns the tables of handed-in counts.
template <class T, class Line>
std::vector<float> settle_statistics(Call<T, Line>& call, const OptionalTensor& given) {
    std::vector<float> tables;
    const bool rank = call.options.normalization == Normalization::rank;
    if (given && call.options.normalization != Normalization::constant) {
        STD_TORCH_CHECK(given->is_cpu() && given->is_contiguous() && given->dim() == 2 &&
                            given->size(1) == (rank ? rank_bins : 2) &&
                            given->scalar_type() == (rank ? ScalarType::Long : ScalarType::Double),
                        "scope_statistics must be contiguous on the CPU: [rows, 2] float64, or for "
                        "rank [rows, ",
                        rank_bins, "] int64");
        const int64_t rows = given->size(0), tensors = static_cast<int64_t>(call.entries.size());
        STD_TORCH_CHECK(rows == 1 || rows == tensors, "scope_statistics has ", rows,
                        " rows; give one, or one for each of ", tensors, " tensors");
        tables.resize(rank ? rows * rank_table : 0);
        for (int64_t row = 0; rank && row < rows; ++row)
            table_from_row(static_cast<const int64_t*>(given->const_data_ptr()) + row * rank_bins,
                           &tables[row * rank_table], call.options);
        for (int64_t i = 0; i < tensors; ++i) {
            const int64_t row = rows == 1 ? 0 : i;
            auto& e = call.entries[i];
            if (rank) {
                e.by_bin = &tables[row * rank_table];
            } else {
                const double* range = static_cast<const double*>(given->const_data_ptr()) + 2 * row;
                e.probability = Probability<T>(call.options, range[0], range[1]);
            }
        }
        return tables;
    }
    for (auto& e : call.entries) {
        const auto range = e.kept_range();
        if (std::isnan(range.low))
            e.own_statistics =
                call.options.normalization != Normalization::constant; // nothing kept yet
        else e.probability = Probability<T>(call.options, range.low, range.high);
    }
    return tables;
}

// What AdamW and SGD share: checks of every list, then the steps advance, then the run. `states`:
// the operator's lists, empty ones unused.
template <class T, class Line, class MakeLine>
void step(Call<T, Line> call, const Tensors& params, const std::vector<const Tensors*>& states,
          const Tensors& steps, const Tensors& mins, const Tensors& maxs,
          const OptionalTensor& scope_statistics, const OptionalTensor& grad_scale,
          const OptionalTensor& found_inf, bool maximize, MakeLine make_line) {
    const size_t n = params.size();
    STD_TORCH_CHECK(call.entries.size() == n, "grads has ", call.entries.size(), " tensors for ", n,
                    " parameters");
    STD_TORCH_CHECK(call.options.previous || (mins.empty() && maxs.empty()),
                    "saliency_mins and saliency_maxs belong to statistics='previous'");
    if (n == 0) return;
    if (grad_scale) call.unscale = static_cast<T>(1 / scalar(*grad_scale, "grad_scale"));
    if (maximize) call.unscale = -call.unscale;
    const bool skip = found_inf && scalar(*found_inf, "found_inf") != 0;
    const int64_t tensors = static_cast<int64_t>(n);
    int64_t elements = 0;
    for (auto& e : call.entries) elements += e.size;
    std::vector<List> moments, kept;
    for (const Tensors* list : states)
        if (!list->empty()) moments.emplace_back(*list, "states", n, elements);
    if (call.options.previous)
        kept.emplace_back(mins, "saliency_mins", n, tensors),
            kept.emplace_back(maxs, "saliency_maxs", n, tensors);
    List counts(steps, "steps", n, tensors);
    std::vector<View> step_views(n);
    for (size_t i = 0; i < n; ++i) {
        auto& e = call.entries[i];
        e.theta = view(params[i], "params", true);
        check_same_shape(e.g, e.theta, "grads", i);
        STD_TORCH_CHECK(e.theta.storage == call.entries[0].theta.storage, "params[", i,
                        "] has another dtype than params[0]");
        for (auto& list : moments) {
            View& state = e.states[e.states_count++] = list.next(i, e.size, &e.theta);
            call.rounding |= state.storage == Storage::bfloat16;
        }
        for (size_t k = 0; k < kept.size(); ++k) e.kept[k] = kept[k].next(i, 1, nullptr);
        step_views[i] = counts.next(i, 1, nullptr);
        double count;
        load(step_views[i], 0, 1, &count);
        STD_TORCH_CHECK(count >= 0 && count < 16777215.0, "steps[", i, "] is ", count,
                        "; give the number of steps taken, from 0 to 2^24 - 2");
    }
    if (skip) return;
    const auto tables = settle_statistics(call, scope_statistics);
    double last = -1;
    Line line;
    for (size_t i = 0; i < n; ++i) {
        double count;
        load(step_views[i], 0, 1, &count);
        count += 1;
        store_block(step_views[i], 0, 1, &count);
        if (count != last) line = make_line(last = count);
        call.entries[i].line = line;
        call.entries[i].step = static_cast<uint32_t>(count);
    }
    run(call);
    for (auto& e : call.entries)
        if (e.kept[0].data) {
            const auto range = e.range();
            store_block(e.kept[0], 0, 1, &range.low), store_block(e.kept[1], 0, 1, &range.high);
        }
}

template <class T, bool update, bool amsgrad>
void line_block(const AdamW<T>& given, int n, T* __restrict theta, const T* __restrict g,
                const T* __restrict factor, T* __restrict m, T* __restrict v, T* __restrict v_max) {
    const AdamW<T> line = given; // a copy no store can touch
    block_loop<T>({theta, g, m, v}, n, [=](int i) {
        T unused = 0;
        line.template step<update, amsgrad>(theta[i], g[i], factor[i], m[i], v[i],
                                            amsgrad ? v_max[i] : unused);
    });
}

template <class T, bool update, bool has_momentum>
void line_block(const SGD<T>& given, int n, T* __restrict theta, const T* __restrict g,
                const T* __restrict factor, T* __restrict buffer, T*, T*) {
    const SGD<T> line = given;
    block_loop<T>({theta, g, has_momentum ? buffer : theta, theta}, n, [=](int i) {
        T unused = 0;
        line.template step<update, has_momentum>(theta[i], g[i], factor[i],
                                                 has_momentum ? buffer[i] : unused);
    });
}

// The loop for a target and for whether the third moment, or the momentum buffer, is there.
template <class T, bool update, class Line> void choose_block(Call<T, Line>& call, bool more) {
    if (more) call.line_block = line_block<T, update, true>;
    else call.line_block = line_block<T, update, false>;
}
template <class T, class Line> void choose_block(Call<T, Line>& call, bool more) {
    if (call.options.target_update) choose_block<T, true>(call, more);
    else choose_block<T, false>(call, more);
}

struct NoLine {};
template <class T>
void multiply_block(const NoLine&, int n, T* theta, const T* g, const T* factor, T*, T*,
                    T*) { // theta may be g
    slices(n, [=](int i) { theta[i] = g[i] * factor[i]; });
}
template <class T>
void factor_out(const NoLine&, int n, T* out, const T*, const T* factor, T*, T*, T*) {
    slices(n, [=](int i) { out[i] = factor[i]; });
}
template <class T>
void probability_out(const NoLine&, int n, T* out, const T*, const T* factor, T*, T*, T*) {
    slices(n, [=](int i) { out[i] = 1 / factor[i]; });
}

bool is_double(const Tensors& tensors) {
    return !tensors.empty() && tensors[0].scalar_type() == ScalarType::Double;
}

// Calls f<float>() or f<double>() by the gradients' dtype.
#define BY_ARITHMETIC(tensors, ...)                                                                \
    if (is_double(tensors)) {                                                                      \
        using T = double;                                                                          \
        __VA_ARGS__                                                                                \
    } else {                                                                                       \
        using T = float;                                                                           \
        __VA_ARGS__                                                                                \
    }

double value_of(double value, const OptionalTensor& tensor, const char* name) {
    return tensor ? scalar(*tensor, name) : value;
}

} // namespace

static void selective_adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                             Tensors max_exp_avg_sqs, Tensors steps, Tensors saliency_mins,
                             Tensors saliency_maxs, OptionalTensor scope_statistics,
                             std::vector<int64_t> layout, OptionalTensor grad_scale,
                             OptionalTensor found_inf, double lr, OptionalTensor lr_tensor,
                             double weight_decay, bool maximize, int64_t seed, double beta1,
                             double beta2, OptionalTensor beta1_tensor, OptionalTensor beta2_tensor,
                             double eps, SELECTION_ARGUMENTS) {
    STD_TORCH_CHECK(params.empty() || !(exp_avgs.empty() || exp_avg_sqs.empty()), "exp_avgs has ",
                    exp_avgs.size(), " tensors, exp_avg_sqs ", exp_avg_sqs.size(),
                    "; give both moments of ", params.size(), " parameters");
    lr = value_of(lr, lr_tensor, "lr"), beta1 = value_of(beta1, beta1_tensor, "betas[0]"),
    beta2 = value_of(beta2, beta2_tensor, "betas[1]");
    BY_ARITHMETIC(params, {
        auto call = make_call<T, AdamW<T>>(SELECTION_OPTIONS, seed, grads, {}, layout);
        choose_block(call, !max_exp_avg_sqs.empty());
        step(std::move(call), params, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, steps,
             saliency_mins, saliency_maxs, scope_statistics, grad_scale, found_inf, maximize,
             [&](double count) { return AdamW<T>(lr, beta1, beta2, weight_decay, eps, count); });
    })
}

static void selective_sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors steps,
                           Tensors saliency_mins, Tensors saliency_maxs,
                           OptionalTensor scope_statistics, std::vector<int64_t> layout,
                           OptionalTensor grad_scale, OptionalTensor found_inf, double lr,
                           OptionalTensor lr_tensor, double weight_decay, bool maximize,
                           int64_t seed, double momentum, double dampening, bool nesterov,
                           SELECTION_ARGUMENTS) {
    lr = value_of(lr, lr_tensor, "lr");
    BY_ARITHMETIC(params, {
        auto call = make_call<T, SGD<T>>(SELECTION_OPTIONS, seed, grads, {}, layout);
        choose_block(call, !momentum_buffers.empty());
        step(std::move(call), params, {&momentum_buffers}, steps, saliency_mins, saliency_maxs,
             scope_statistics, grad_scale, found_inf, maximize,
             [&](double) { return SGD<T>(lr, momentum, dampening, weight_decay, nesterov); });
    })
}

static void select_gradients_(Tensors grads, Tensors saliencies, OptionalTensor scope_statistics,
                              std::vector<int64_t> layout, int64_t step, int64_t seed,
                              SELECTION_ARGUMENTS) {
    BY_ARITHMETIC(grads, {
        auto call = make_call<T, NoLine>(SELECTION_OPTIONS, seed, grads, saliencies, layout);
        call.line_block = multiply_block<T>;
        for (size_t i = 0; i < grads.size(); ++i) {
            call.entries[i].theta = view(grads[i], "grads", true);
            call.entries[i].step = static_cast<uint32_t>(step);
        }
        if (!call.random()) return; // every factor is 1
        const auto tables = settle_statistics(call, scope_statistics);
        run(call);
    })
}

static void selective_statistics_(Tensors grads, Tensors saliencies, Tensors mins, Tensors maxs,
                                  std::vector<int64_t> layout, std::vector<int64_t> sizes,
                                  int64_t normalization, OptionalTensor grad_scale, Tensor out) {
    SelectionOptions options{};
    options.normalization = static_cast<Normalization>(normalization);
    const bool rank = options.normalization == Normalization::rank;
    const int64_t n = static_cast<int64_t>(grads.size());
    STD_TORCH_CHECK(out.is_cpu() && out.is_contiguous() && out.dim() == 2 &&
                        (out.size(0) == 1 || out.size(0) == n) &&
                        out.size(1) == (rank ? rank_bins : 2) &&
                        out.scalar_type() == (rank ? ScalarType::Long : ScalarType::Double),
                    "out must be contiguous on the CPU: [rows, 2] float64, or for rank [rows, ",
                    rank_bins, "] int64");
    STD_TORCH_CHECK(sizes.empty() || static_cast<int64_t>(sizes.size()) == n,
                    "sizes: ", sizes.size(), " for ", n, " tensors");
    STD_TORCH_CHECK(mins.empty() == maxs.empty() && (mins.empty() || !rank),
                    "saliency_mins and saliency_maxs belong together, not to rank");
    STD_TORCH_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }),
                    "sizes must not be negative");
    BY_ARITHMETIC(grads, {
        auto call = make_call<T, NoLine>(options, 0, grads, saliencies, layout);
        if (grad_scale) call.unscale = static_cast<T>(1 / scalar(*grad_scale, "grad_scale"));
        auto worker = std::make_unique<Worker<T, NoLine>>(call);
        std::vector<List> kept;
        if (!mins.empty())
            kept.emplace_back(mins, "saliency_mins", n, n),
                kept.emplace_back(maxs, "saliency_maxs", n, n);
        for (size_t i = 0; i < call.entries.size(); ++i) {
            auto& e = call.entries[i];
            for (size_t k = 0; k < kept.size(); ++k) e.kept[k] = kept[k].next(i, 1, nullptr);
            e.own_statistics = !rank && std::isnan(e.kept_range().low);
        }
        if (!rank) run(call);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t row = out.size(0) == 1 ? 0 : i;
            if (rank) {
                const int64_t every = rank_stride(sizes.empty() ? call.entries[i].size : sizes[i]);
                worker->count(call.entries[i], every,
                              static_cast<int64_t*>(out.mutable_data_ptr()) + row * rank_bins,
                              every);
            } else {
                double* into = static_cast<double*>(out.mutable_data_ptr()) + 2 * row;
                const auto& e = call.entries[i];
                const Range range = e.own_statistics ? e.range() : e.kept_range();
                into[0] = std::min(into[0], range.low), into[1] = std::max(into[1], range.high);
            }
        }
    })
}

// A call over one tensor that writes `out` and leaves the gradient alone.
template <class T>
void inspect(const SelectionOptions& options, const Tensor& grad, const OptionalTensor& saliency,
             const Tensor& out, const std::vector<int64_t>& layout, int64_t step, int64_t seed,
             bool draws, typename Call<T, NoLine>::LineBlock block) {
    auto call = make_call<T, NoLine>(options, seed, {grad},
                                     saliency ? Tensors{*saliency} : Tensors{}, layout);
    call.line_block = block;
    call.entries[0].theta = view(out, "out", true);
    check_same_shape(call.entries[0].theta, call.entries[0].g, "out", 0);
    call.entries[0].step = static_cast<uint32_t>(step);
    call.draws = draws;
    settle_statistics(call, std::nullopt);
    run(call);
}

static void selection_mask_(Tensor grad, OptionalTensor saliency, Tensor out,
                            std::vector<int64_t> layout, int64_t step, int64_t seed,
                            SELECTION_ARGUMENTS) {
    BY_ARITHMETIC(Tensors{grad}, {
        inspect<T>(SELECTION_OPTIONS, grad, saliency, out, layout, step, seed, true, factor_out<T>);
    })
}

// Every u is 0 where nothing is drawn, so each element is selected and its factor is 1/p.
static void selection_probability_(Tensor grad, OptionalTensor saliency, Tensor out,
                                   SELECTION_ARGUMENTS) {
    rescale = true;
    const int64_t n = grad.numel();
    BY_ARITHMETIC(Tensors{grad}, {
        inspect<T>(SELECTION_OPTIONS, grad, saliency, out, {0, 0, n, n}, 0, 0, false,
                   probability_out<T>);
    })
}

EXPORT_BOXED(selective_adamw_)
EXPORT_BOXED(selective_sgd_)
EXPORT_BOXED(select_gradients_)
EXPORT_BOXED(selective_statistics_)
EXPORT_BOXED(selection_mask_)
EXPORT_BOXED(selection_probability_)

} // namespace uegr
