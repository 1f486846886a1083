// The selecting operators on the CPU: statistics and loop. The formulas are selective.h's, the
// checks arguments.h's, the plan is docs/design.md's.
//
// A tensor passes through L1 in blocks of 256: words of the generator, then b/p of every element,
// then the optimizer's update rule. One parallel region serves a whole call. Its threads take items
// from a counter: a pack of small tensors, whose statistics and update follow each other while g is
// in cache, or a piece of a large one, whose updates wait for statistics that were taken before
// them.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>

#include "../core/tensor.h"
#include "arguments.h"
#include "blocks_cpu.h"

namespace uegr {
namespace {

// elements; their gradient fits a second-level cache
constexpr int64_t item_size = 1 << 18;
// tables of large tensors that are alive at a time
constexpr int64_t rank_slots = 8;
// 1/p by bin; the last one serves what is not finite
constexpr int rank_table = rank_bins + 1;
// upper halves of floats without their signs: bins, and after them what is not finite
constexpr int upper_halves = 1 << 15;
constexpr bool little_endian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
// elements; of more than these all bins are cleared and looked through, rather than the extremes
// taken first
constexpr int64_t rank_few = 1 << 16;

// One tensor of a call.
template <class T, class UpdateRule> struct Entry {
    using Bits = typename Float<T>::Bits;
    // of the call's arguments, which outlive it
    const TensorArguments* tensor = nullptr;
    // taken, with this one
    uint32_t steps = 0;
    UpdateRule update_rule{};
    Probability<T> probability{};
    // `probability` is so for every element
    bool plain = false;
    // "rank"
    const float* by_bin = nullptr;
    // gathered in this call, before the update
    bool own_statistics = false;
    std::atomic<bool> ready{false};
    std::atomic<int> statistics_left{0}, updates_left{0};
    std::atomic<Bits> low{~Bits(0)}, high{0};
    std::atomic<bool> all_finite{true};

    void join(const Extremes<T>& found) {
        if (!found.all_finite) all_finite = false;
        for (Bits now = low; found.least < now && !low.compare_exchange_weak(now, found.least);) {}
        for (Bits now = high; found.most > now && !high.compare_exchange_weak(now, found.most);) {}
    }
    // Minimum and maximum of s in the previous step; NaN where nothing is kept yet.
    Range kept_range() const {
        double low = NAN, high = NAN;
        const View* kept = tensor->kept;
        if (kept[0].data) load(kept[0], 0, 1, &low), load(kept[1], 0, 1, &high);
        return {low, high};
    }
    Range range() const { return range_of<T>(low, high, tensor->s.data); }
};

template <class T, class UpdateRule> struct Call {
    // Updates a block from its parameters, gradients, factors b/p and states, as an operator does.
    using BlockUpdate = void (*)(const UpdateRule&, int n, T* theta, const T* g, const T* factor,
                                 T* a, T* b, T* c);
    SelectionOptions options{};
    uint64_t seed = 0;
    // 1/grad_scale, negative to maximize
    T unscale = 1;
    // false: every u is 0
    bool draws = true;
    // some state is bfloat16
    bool rounding = false;
    // null: statistics alone
    BlockUpdate update_block = nullptr;
    std::vector<Entry<T, UpdateRule>> entries;

    explicit Call(const SelectionArguments& arguments)
        : options(arguments.options), seed(arguments.seed), entries(arguments.tensors.size()) {
        for (size_t i = 0; i < entries.size(); ++i) entries[i].tensor = &arguments.tensors[i];
    }
    bool random() const { return draws && is_random(options); }
    bool ranks() const { return options.ranks(); }
};

// The bins of [first, last] from the first to the last that counted something; `last` alone where
// none did.
template <class Count> std::pair<int, int> occupied(const Count* counts, int first, int last) {
    constexpr int some = 64;
    auto empty = [](const Count* from, int n) {
        bool found = false;
        for (int i = 0; i < n; ++i) found |= from[i] != 0;
        return !found;
    };
    while (last - first >= some && empty(counts + first, some)) first += some;
    while (last - first >= some && empty(counts + last - some + 1, some)) last -= some;
    while (first < last && counts[first] == 0) ++first;
    while (first < last && counts[last] == 0) --last;
    return {first, last};
}

// 1/p by bin from counts by bin, which may lie in the same place; bins outside [first, last] are
// taken to be empty and left alone.
template <class Count>
void table_from_counts(const Count* counts, float* table, int first, int last,
                       const SelectionOptions& o) {
    const auto [from, to] = occupied(counts, first, last);
    double total = 0;
    for (int bin = from; bin <= to; ++bin) total += counts[bin];
    double below = 0;
    for (int bin = from; bin <= to; ++bin) {
        const double count = counts[bin];
        table[bin] = static_cast<float>(below / std::max(total, 1.0));
        below += count;
    }
    const RankCurve curve(o);
    for (int bin = from; bin <= to; ++bin) table[bin] = curve.inverse(table[bin]);
    // nothing lies below the one, all below the other
    std::fill(table + first, table + from, curve.inverse(0));
    std::fill(table + to + 1, table + last + 1, curve.inverse(total > 0 ? 1 : 0));
    table[rank_bins] = 1;
}

// A thread at work on a call.
template <class T, class UpdateRule> struct Worker {
    const Call<T, UpdateRule>& call;
    RoundKeys keys, rounding_keys;
    // "rank": of a tensor; of a small one
    std::vector<uint32_t> counts;
    std::vector<float> table;
    alignas(64) T g[block_size], s[block_size], factor[block_size], theta[block_size],
        states[3][block_size];
    alignas(64) uint32_t words[2 * block_size + 4] = {}, rounding[2 * block_size + 4];
    alignas(64) int32_t bins[block_size];
    // 1/p
    alignas(64) float ranks[block_size];

    explicit Worker(const Call<T, UpdateRule>& call)
        : call(call), keys(call.seed), rounding_keys(call.seed ^ rounding_key) {
        if (call.ranks()) counts.resize(upper_halves), table.resize(rank_table);
    }

    const T* gradient(const Entry<T, UpdateRule>& e, int64_t begin, int n) {
        const T* block = block_at(e.tensor->g, begin, n, g, slice);
        if (call.unscale == 1) return block;
        slices(n, [&, unscale = call.unscale](int i) { g[i] = block[i] * unscale; });
        return g;
    }

    // Calls block(begin, n) for the blocks of [begin, end).
    template <class Block> static void blocks(int64_t begin, int64_t end, Block block) {
        for (; begin < end; begin += block_size)
            block(begin, static_cast<int>(std::min<int64_t>(block_size, end - begin)));
    }

    void gather(Entry<T, UpdateRule>& e, int64_t begin, int64_t end) {
        Extremes<T> found;
        const View& from = e.tensor->s.data ? e.tensor->s : e.tensor->g;
        if (from.contiguous && from.storage == storage_of<T> &&
            (e.tensor->s.data || call.unscale == 1))
            found.add(reinterpret_cast<const T*>(from.data) + begin, end - begin);
        else
            blocks(begin, end, [&](int64_t at, int n) {
                found.add(e.tensor->s.data ? block_at(e.tensor->s, at, n, s, slice)
                                           : gradient(e, at, n),
                          n);
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

    // Calls at(l) for the places l, in a shard of `size`, of the elements whose unsharded index is
    // a multiple of `every`.
    template <class At>
    static void every_so_many(const Layout& layout, int64_t size, int64_t every, At at) {
        for (int64_t run = 0; run < size; run += layout.run) {
            const int64_t first = layout.offset + run / layout.run * layout.stride;
            const int64_t end = std::min(run + layout.run, size);
            for (int64_t l = run + (every - first % every) % every; l < end; l += every) at(l);
        }
    }

    // Calls add(bin) for elements [0, size) whose unsharded index is a multiple of `every`; bins
    // after the last, upper halves all, are for what is not finite.
    template <class Add> void count(const Entry<T, UpdateRule>& e, int64_t every, Add add) {
        const View& from = e.tensor->s.data ? e.tensor->s : e.tensor->g;
        if (std::is_same_v<T, float> && little_endian && !e.tensor->s.data && from.contiguous &&
            (from.storage == Storage::float32 || from.storage == Storage::bfloat16) &&
            absolute(call.unscale) == 1) {
            // the bins lie there already, but for the signs
            const int64_t bytes = bytes_of(from.storage);
            every_so_many(e.tensor->layout, e.tensor->size, every,
                          [=, halves = from.data + bytes - 2](int64_t l) {
                              uint16_t half;
                              memcpy(&half, halves + l * bytes, sizeof(half));
                              add(half & 0x7fff);
                          });
            return;
        }
        if (every == 1) {
            blocks(0, e.tensor->size, [&](int64_t at, int n) {
                bin(n, e.tensor->s.data ? nullptr : gradient(e, at, n),
                    e.tensor->s.data ? block_at(e.tensor->s, at, n, s, slice) : nullptr);
                for (int i = 0; i < n; ++i) add(bins[i]);
            });
            return;
        }
        auto add_one = [&](T x) {
            add(minimum(rank_bin(e.tensor->s.data ? root(x) : absolute(x * call.unscale)),
                        rank_bins));
        };
        const bool there = from.contiguous && from.storage == storage_of<T>;
        every_so_many(e.tensor->layout, e.tensor->size, every, [&](int64_t l) {
            T x;
            if (there) x = reinterpret_cast<const T*>(from.data)[l];
            else load(from, l, 1, &x);
            add_one(x);
        });
    }

    void rank(Entry<T, UpdateRule>& e, float* into) {
        int first = 0, last = rank_bins - 1;
        const int64_t every = rank_stride(e.tensor->size);
        // every element is counted: no other bin will be looked up
        if (every == 1 && e.tensor->size <= rank_few) {
            gather(e, 0, e.tensor->size);
            const T least = bit_cast<T>(e.low.load()), most = bit_cast<T>(e.high.load());
            first =
                e.low >= Float<T>::infinity ? 0 : rank_bin(e.tensor->s.data ? root(least) : least);
            last = e.low >= Float<T>::infinity ? 0 : rank_bin(e.tensor->s.data ? root(most) : most);
        }
        std::fill(counts.begin() + first, counts.begin() + last + 1, 0);
        count(e, every, [by_bin = counts.data()](int bin) { ++by_bin[bin]; });
        table_from_counts(counts.data(), into, first, last, call.options);
        e.by_bin = into;
    }

    void settle(Entry<T, UpdateRule>& e) const {
        const auto range = e.range();
        e.probability = Probability<T>(call.options, range.low, range.high);
        e.plain = e.all_finite && !e.tensor->s.data &&
                  e.probability.plain(static_cast<T>(range.low), static_cast<T>(range.high));
    }

    // `plain`: e.probability is so for this block.
    template <bool rescale>
    void factors(const Entry<T, UpdateRule>& e, const T* g, const uint32_t* drawn, int64_t begin,
                 int n, bool plain) {
        const T* given = e.tensor->s.data ? block_at(e.tensor->s, begin, n, s, slice) : nullptr;
        if (call.options.normalization == Normalization::constant) {
            const T inverse = static_cast<T>(inverse_of_constant(call.options));
            factor_block<rescale>(n, g, drawn, factor, [=](int) { return inverse; });
        } else if (call.ranks()) {
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
            else if (plain)
                factor_block<rescale, true>(n, g, drawn, factor, [=](int i) {
                    return probability.plain_inverse(square(g[i]));
                });
            else
                factor_block<rescale>(n, g, drawn, factor,
                                      [=](int i) { return probability.inverse(square(g[i])); });
        }
    }

    static Ahead<4> ahead_of(const Entry<T, UpdateRule>& e, int64_t at) {
        Ahead<4> ahead(e.tensor->g, at);
        ahead.follow(1, e.tensor->theta, at);
        // the hardware asks for AMSGrad's third
        for (int k = 0; k < std::min(e.tensor->states_count, 2); ++k)
            ahead.follow(2 + k, e.tensor->states[k], at);
        return ahead;
    }

    void update(Entry<T, UpdateRule>& e, int64_t begin, int64_t end) {
        Extremes<T> found;
        const bool gathers = e.tensor->kept[0].data && !e.own_statistics, random = call.random();
        blocks(begin, end, [&](int64_t at, int n) {
            const T* g = gradient(e, at, n);
            bool plain = e.plain;
            if (gathers) {
                Extremes<T> here;
                here.add(g, n);
                const Range range = here.range(false);
                plain = here.all_finite &&
                        e.probability.plain(static_cast<T>(range.low), static_cast<T>(range.high));
                found.add(here);
            }
            const uint32_t* drawn = random ? element_words(words, at, n, e.tensor->layout, e.steps,
                                                           keys, ahead_of(e, at))
                                           : words;
            T* parameters = block_at(e.tensor->theta, at, n, theta, slice);
            T* moments[3] = {};
            for (int k = 0; k < e.tensor->states_count; ++k)
                moments[k] = block_at(e.tensor->states[k], at, n, states[k], slice);
            if (call.options.rescale) factors<true>(e, g, drawn, at, n, plain);
            else factors<false>(e, g, drawn, at, n, plain);
            call.update_block(e.update_rule, n, parameters, g, factor, moments[0], moments[1],
                              moments[2]);
            if (parameters == theta) store_block(e.tensor->theta, at, n, parameters);
            const uint32_t* lower = call.rounding ? element_words(rounding, at, n, e.tensor->layout,
                                                                  e.steps, rounding_keys)
                                                  : nullptr;
            for (int k = 0; k < e.tensor->states_count; ++k)
                if (moments[k] == states[k])
                    store_block(e.tensor->states[k], at, n, moments[k], lower, k == 0 ? 0 : 16);
        });
        if (gathers) e.join(found);
    }
};

struct Item {
    enum Kind { pack, statistics, update } kind;
    // entries [first, first + count)
    int64_t first, count;
    // elements [begin, end) of a large one
    int64_t begin, end;
};

// The call's items, in an order in which each waits for earlier ones only. Between a large tensor's
// statistics and its update stand as many pieces of the tensor before it as there are threads, so
// that none of them waits; and the pieces whose gradient was read last, which the cache still has,
// are updated first.
template <class T, class UpdateRule>
std::vector<Item> items_in_order(Call<T, UpdateRule>& call, int64_t threads) {
    std::vector<Item> items, updates;
    auto flush = [&](size_t all_but) {
        const auto end = updates.end() - std::min(all_but, updates.size());
        items.insert(items.end(), updates.begin(), end), updates.erase(updates.begin(), end);
    };
    const int64_t count = static_cast<int64_t>(call.entries.size());
    for (int64_t i = 0; i < count; ++i) {
        auto& e = call.entries[i];
        if (e.tensor->size == 0) continue;
        if (e.tensor->size <= item_size) {
            const bool fits = !items.empty() && items.back().kind == Item::pack &&
                              items.back().first + items.back().count == i &&
                              items.back().end + e.tensor->size <= item_size;
            if (!fits) items.push_back({Item::pack, i, 0, 0, 0});
            items.back().count += 1, items.back().end += e.tensor->size;
            continue;
        }
        const int pieces = static_cast<int>((e.tensor->size + item_size - 1) / item_size);
        const bool whole = call.ranks();
        flush(!e.own_statistics ? 0 : whole ? updates.size() : static_cast<size_t>(threads));
        if (e.own_statistics) {
            e.statistics_left = whole ? 1 : pieces;
            for (int k = 0; k < e.statistics_left; ++k)
                items.push_back(
                    {Item::statistics, i, 1, k * item_size,
                     whole ? e.tensor->size : std::min(e.tensor->size, (k + 1) * item_size)});
        }
        flush(0);
        e.updates_left = pieces;
        for (int k = pieces; k-- > 0;)
            updates.push_back(
                {Item::update, i, 1, k * item_size, std::min(e.tensor->size, (k + 1) * item_size)});
    }
    flush(0);
    return items;
}

template <class T, class UpdateRule> void run(Call<T, UpdateRule>& call) {
    const std::vector<Item> items = items_in_order(call, torch::stable::get_num_threads());
    if (items.empty()) return;
    const bool rank = call.ranks();
    std::vector<std::vector<float>> slots(rank ? rank_slots : 0);
    std::vector<Entry<T, UpdateRule>*> owners(slots.size(), nullptr);
    std::vector<int64_t> slot_of(rank ? call.entries.size() : 0);
    std::vector<Entry<T, UpdateRule>*> before(slot_of.size(), nullptr);
    int64_t large = 0;
    for (size_t i = 0; i < slot_of.size(); ++i)
        if (call.entries[i].tensor->size > item_size && call.entries[i].own_statistics) {
            slot_of[i] = large++ % rank_slots;
            before[i] = std::exchange(owners[slot_of[i]], &call.entries[i]);
            slots[slot_of[i]].resize(rank_table);
        }
    std::atomic<size_t> next{0};
    auto work = [&] {
        auto worker = std::make_unique<Worker<T, UpdateRule>>(call);
        for (size_t at; (at = next++) < items.size();) {
            const Item& item = items[at];
            auto& e = call.entries[item.first];
            if (item.kind == Item::pack) {
                for (int64_t i = item.first; i < item.first + item.count; ++i) {
                    auto& small = call.entries[i];
                    if (small.own_statistics && rank) worker->rank(small, worker->table.data());
                    else if (small.own_statistics)
                        worker->gather(small, 0, small.tensor->size), worker->settle(small);
                    if (call.update_block) worker->update(small, 0, small.tensor->size);
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
            } else if (call.update_block) {
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

void table_from_row(const int64_t* counts, float* table, const SelectionOptions& o) {
    int64_t total = 0;
    for (int bin = 0; bin < rank_bins; ++bin) total += counts[bin];
    // As shares of 2^24: only the ratios matter.
    const double unit = 16777216.0 / static_cast<double>(std::max<int64_t>(total, 1));
    for (int bin = 0; bin < rank_bins; ++bin)
        table[bin] = static_cast<float>(static_cast<double>(counts[bin]) * unit);
    table_from_counts(table, table, 0, rank_bins - 1, o);
}

// Says where each entry's statistics come from: handed in, kept from the previous step, or this
// call. Returns the tables of handed-in counts.
template <class T, class UpdateRule>
std::vector<float> settle_statistics(Call<T, UpdateRule>& call, const StatisticsRows& given) {
    std::vector<float> tables(call.ranks() ? given.count * rank_table : 0);
    for (int64_t row = 0; call.ranks() && row < given.count; ++row)
        table_from_row(given.bins(row), &tables[row * rank_table], call.options);
    for (size_t i = 0; i < call.entries.size(); ++i) {
        auto& e = call.entries[i];
        const int64_t row = given.of(static_cast<int64_t>(i));
        if (given.count > 0 && call.ranks()) {
            e.by_bin = &tables[row * rank_table];
            continue;
        }
        const double* handed = given.count > 0 ? given.range(row) : nullptr;
        const Range range = handed ? Range{handed[0], handed[1]} : e.kept_range();
        // nothing kept yet
        if (!handed && std::isnan(range.low))
            e.own_statistics = call.options.normalization != Normalization::constant;
        else e.probability = Probability<T>(call.options, range.low, range.high);
    }
    return tables;
}

// Takes a step of AdamW or SGD: the step counts advance, then the run. Nothing is written before
// every step is known to be a number of steps.
template <class T, class UpdateRule, class Options>
void step(const StepArguments& arguments, const Options& options,
          typename Call<T, UpdateRule>::BlockUpdate update_block) {
    Call<T, UpdateRule> call(arguments);
    call.update_block = update_block, call.rounding = arguments.rounding;
    call.unscale = static_cast<T>(1 / arguments.grad_scale.get());
    if (arguments.maximize) call.unscale = -call.unscale;
    auto steps_of = [](const View& step) {
        double steps;
        load(step, 0, 1, &steps);
        return steps;
    };
    for (size_t i = 0; i < call.entries.size(); ++i) {
        const double steps = steps_of(call.entries[i].tensor->step);
        STD_TORCH_CHECK(steps >= 0 && steps < 16777215.0, "steps[", i, "] is ", steps,
                        "; give the number of steps taken, from 0 to 2^24 - 2");
    }

    if (arguments.found_inf.get() != 0) return;

    const auto tables = settle_statistics(call, arguments.scope);
    double last = -1;
    UpdateRule update_rule;
    for (auto& e : call.entries) {
        const double steps = steps_of(e.tensor->step) + 1;
        store_block(e.tensor->step, 0, 1, &steps);
        if (steps != last) update_rule = options.template at<T>(last = steps);
        e.update_rule = update_rule, e.steps = static_cast<uint32_t>(steps);
    }
    run(call);
    for (auto& e : call.entries)
        if (e.tensor->kept[0].data) {
            const auto range = e.range();
            store_block(e.tensor->kept[0], 0, 1, &range.low),
                store_block(e.tensor->kept[1], 0, 1, &range.high);
        }
}

// The loop for a target and for whether the third moment, or the momentum buffer, is there.
template <class T, class UpdateRule>
typename Call<T, UpdateRule>::BlockUpdate choose_block(bool update, bool more) {
    if (update && more) return update_block<T, true, true>;
    if (update) return update_block<T, true, false>;
    if (more) return update_block<T, false, true>;
    return update_block<T, false, false>;
}

struct NoUpdateRule {};
// theta may be g
template <class T>
void multiply_block(const NoUpdateRule&, int n, T* theta, const T* g, const T* factor, T*, T*, T*) {
    slices(n, [=](int i) { theta[i] = g[i] * factor[i]; });
}
template <class T>
void factor_out(const NoUpdateRule&, int n, T* out, const T*, const T* factor, T*, T*, T*) {
    slices(n, [=](int i) { out[i] = factor[i]; });
}
template <class T>
void probability_out(const NoUpdateRule&, int n, T* out, const T*, const T* factor, T*, T*, T*) {
    slices(n, [=](int i) { out[i] = 1 / factor[i]; });
}

// Calls f with a float or a double: the arithmetic that a tensor's dtype asks for.
template <class F> void by_arithmetic(const View& tensor, F f) {
    if (tensor.storage == Storage::float64) f(0.0);
    else f(0.0f);
}

} // namespace

static void take_step(const StepArguments& arguments, const AdamWOptions& options, bool amsgrad) {
    by_arithmetic(arguments.tensors[0].theta, [&](auto zero) {
        using T = decltype(zero);
        step<T, AdamW<T>>(arguments, options,
                          choose_block<T, AdamW<T>>(arguments.options.target_update, amsgrad));
    });
}

static void take_step(const StepArguments& arguments, const SGDOptions& options,
                      bool has_momentum) {
    by_arithmetic(arguments.tensors[0].theta, [&](auto zero) {
        using T = decltype(zero);
        step<T, SGD<T>>(arguments, options,
                        choose_block<T, SGD<T>>(arguments.options.target_update, has_momentum));
    });
}

static void multiply(const SelectionArguments& arguments, int64_t step) {
    by_arithmetic(arguments.tensors[0].g, [&](auto zero) {
        using T = decltype(zero);
        Call<T, NoUpdateRule> call(arguments);
        call.update_block = multiply_block<T>;
        for (auto& e : call.entries) e.steps = static_cast<uint32_t>(step);
        const auto tables = settle_statistics(call, arguments.scope);
        run(call);
    });
}

static void gather_statistics(const StatisticsArguments& arguments) {
    by_arithmetic(arguments.tensors[0].g, [&](auto zero) {
        using T = decltype(zero);
        Call<T, NoUpdateRule> call(arguments);
        call.unscale = static_cast<T>(1 / arguments.grad_scale.get());
        auto worker = std::make_unique<Worker<T, NoUpdateRule>>(call);
        const bool rank = call.ranks();
        for (auto& e : call.entries) e.own_statistics = !rank && std::isnan(e.kept_range().low);
        if (!rank) run(call);
        for (size_t i = 0; i < call.entries.size(); ++i) {
            auto& e = call.entries[i];
            const int64_t row = arguments.out.of(static_cast<int64_t>(i));
            if (rank) {
                const int64_t every =
                    rank_stride(arguments.sizes.empty() ? e.tensor->size : arguments.sizes[i]);
                worker->count(e, every, [every, counts = arguments.out.bins(row)](int bin) {
                    if (bin < rank_bins) counts[bin] += every;
                });
            } else {
                double* into = arguments.out.range(row);
                const Range range = e.own_statistics ? e.range() : e.kept_range();
                into[0] = std::min(into[0], range.low), into[1] = std::max(into[1], range.high);
            }
        }
    });
}

// A probability is looked for with every u 0: each element is then selected, its factor 1/p.
static void inspect(const InspectionArguments& arguments, int64_t step, Out out) {
    by_arithmetic(arguments.tensors[0].g, [&](auto zero) {
        using T = decltype(zero);
        Call<T, NoUpdateRule> call(arguments);
        call.update_block = out == Out::factor ? factor_out<T> : probability_out<T>;
        call.draws = out == Out::factor;
        call.entries[0].steps = static_cast<uint32_t>(step);
        settle_statistics(call, {});
        run(call);
    });
}

} // namespace uegr
