// The selecting operators on a GPU: statistics and launches. The formulas are selective.h's, the
// checks arguments.h's; the plan and what it rests on stand in docs/design.md.
#include <algorithm>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "selective.h"

namespace uegr {
namespace {

// elements
constexpr int64_t item_size = 1 << 15;
// of statistics that only a tensor's first step needs
constexpr int64_t seldom_item = 1 << 18;
// tensors; a table of ranks has 128 KB
constexpr int64_t ranked_at_once = 1 << 10;
constexpr int threads = 256;
constexpr int table_threads = 1024;
// 1/p by bin; the last one serves what is not finite
constexpr int rank_table = rank_bins + 1;
// blocks that count a tensor's bins
constexpr int rank_parts = 64;

// given: a saliency in the place of g*g
enum Role { theta, gradient, first_state, given = first_state + 3, roles };

// One tensor of a call, as the host knows it.
struct alignas(16) Entry {
    // kept: "previous", minimum and maximum of s
    Slot slots[roles], step, kept[2];
    // elements; those that whole accesses cover
    int64_t size = 0, bulk = 0;
    Layout layout{};
    // where its items start
    int32_t statistics_at = -1, updates_at = -1, ragged_at = -1;
    // "rank"
    int32_t table = 0;
    int32_t statistics_items = 0, updates_items = 0;
    // of the scope's statistics
    int32_t row = 0;
    // updated from its end
    bool backward = false;
    // its statistics are taken in this call (kept ones: if there are none yet)
    bool own = false;
};

enum Kind : int32_t { gathering, updating, nothing };
struct alignas(16) Item {
    int32_t tensor, kind;
    int64_t begin;
};

// Holds what becomes of a tensor in the course of a call.
struct alignas(16) Progress {
    // bits of the least and largest |g| over finite elements
    uint32_t low, high;
    uint32_t statistics_left, updates_left, ready, unused[3];
};

struct NoUpdateRule {};

// Per-tensor constants, computed once and read by every element.
struct alignas(16) Curve {
    Probability<float> probability;
    // 1/grad_scale, negative to maximize
    float unscale;
};
template <class UpdateRule> struct alignas(16) RuleConstants {
    UpdateRule update_rule;
};
template <class UpdateRule> struct alignas(16) Settled {
    Curve curve;
    RuleConstants<UpdateRule> rule;
    // 1/p of "constant"
    float constant;
    uint32_t step;
    bool own, skipped;
};

template <class UpdateRule> struct Call {
    SelectionOptions options{};
    // in constant memory, which instructions read as they go
    RoundKeys keys, rounding_keys;
    // where the tensors have none of their own
    int64_t fixed_step = 0;
    Number grad_scale{1}, found_inf{0};
    bool maximize = false, random, rounding = false;
    Out out = Out::multiplied;
    const Entry* entries = nullptr;
    const int64_t* axes = nullptr;
    Settled<UpdateRule>* settled = nullptr;
    Progress* progress = nullptr;
    Item *items = nullptr, *ragged = nullptr;
    uint32_t *next = nullptr, count = 0, ragged_count = 0;
    float* tables = nullptr;
    // statistics handed in
    const void* scope;
    int64_t scope_rows;

    explicit Call(const SelectionArguments& arguments)
        : options(arguments.options), keys(arguments.seed),
          rounding_keys(arguments.seed ^ rounding_key), random(is_random(arguments.options)),
          scope(arguments.scope.data), scope_rows(arguments.scope.count) {}
    HOST_DEVICE bool linear() const { return options.linear(); }
    HOST_DEVICE bool ranks() const { return options.ranks(); }
};

struct NoOptions {
    template <class T> DEVICE NoUpdateRule at(double) const { return {}; }
};

template <class UpdateRule> struct Work {
    Item item;
    Entry entry;
    Settled<UpdateRule> settled;
};

// --- Before and between the items ---

template <class UpdateRule>
DEVICE Range found_range(const Call<UpdateRule>& call, const Entry& e, int64_t tensor) {
    const Progress& p = call.progress[tensor];
    return range_of<float>(__ldcg(&p.low), __ldcg(&p.high), e.slots[given].data);
}
DEVICE Range kept_range(const Entry& e) {
    return {value_at<double>(e.kept[0].data, e.kept[0].storage),
            value_at<double>(e.kept[1].data, e.kept[1].storage)};
}
template <class UpdateRule>
DEVICE void keep_range(const Call<UpdateRule>& call, const Entry& e, int64_t tensor) {
    const Range range = found_range(call, e, tensor);
    put_value(e.kept[0].data, e.kept[0].storage, range.low),
        put_value(e.kept[1].data, e.kept[1].storage, range.high);
}

// A block for each tensor: its step advances, its constants are settled, its items written.
template <class UpdateRule, class Options>
__global__ void __launch_bounds__(128, 8) prepare(Call<UpdateRule> call, Options options) {
    const Entry& e = call.entries[blockIdx.x];
    const int32_t tensor = static_cast<int32_t>(blockIdx.x);
    const bool skipped = call.found_inf.get() != 0;
    if (threadIdx.x == 0) {
        if (tensor == 0) *call.next = skipped ? call.count : 0;
        double step = static_cast<double>(call.fixed_step);
        if (e.step.data) step = value_at<double>(e.step.data, e.step.storage) + 1;
        if (e.step.data && !skipped) put_value(e.step.data, e.step.storage, step);
        Settled<UpdateRule>& to = call.settled[tensor];
        to.rule.update_rule = options.template at<float>(step);
        to.step = static_cast<uint32_t>(step);
        to.skipped = skipped;
        to.constant = static_cast<float>(inverse_of_constant(call.options));
        to.curve.unscale = (call.maximize ? -1 : 1) * static_cast<float>(1 / call.grad_scale.get());
        Range range{NAN, NAN};
        if (call.linear() && call.scope) {
            const double* row = static_cast<const double*>(call.scope) + 2 * e.row;
            range = {row[0], row[1]};
        } else if (e.kept[0].data) {
            range = kept_range(e);
        }
        // nothing handed in, nothing kept yet
        to.own = e.own && range.low != range.low;
        if (!to.own) to.curve.probability = Probability<float>(call.options, range.low, range.high);
        call.progress[tensor] = {~0u,
                                 0,
                                 static_cast<uint32_t>(e.statistics_items),
                                 static_cast<uint32_t>(e.updates_items),
                                 !to.own || e.statistics_items == 0,
                                 {}};
        if constexpr (!std::is_same_v<UpdateRule, NoUpdateRule>)
            if (e.kept[0].data && e.size == 0 && !skipped) keep_range(call, e, tensor);
    }
    const int64_t pieces = (e.bulk + item_size - 1) / item_size,
                  seldom = e.kept[0].data ? seldom_item : item_size;
    for (int64_t k = threadIdx.x; k < pieces; k += blockDim.x) {
        if (e.statistics_at >= 0 && k * seldom < e.bulk)
            call.items[e.statistics_at + k] = {tensor, gathering, k * seldom};
        if (e.updates_at >= 0)
            call.items[e.updates_at + k] = {tensor, updating,
                                            (e.backward ? pieces - 1 - k : k) * item_size};
    }
    if (e.ragged_at >= 0)
        for (int64_t k = threadIdx.x; e.bulk + k * item_size < e.size; k += blockDim.x)
            call.ragged[e.ragged_at + k] = {tensor, nothing, e.bulk + k * item_size};
}

// One thread, when all of a tensor's statistics are there.
template <class UpdateRule>
DEVICE void settle(const Call<UpdateRule>& call, const Entry& e, int64_t tensor) {
    const Range range = found_range(call, e, tensor);
    call.settled[tensor].curve.probability =
        Probability<float>(call.options, range.low, range.high);
    publish(&call.progress[tensor].ready);
}

// The tensor of an item into shared memory.
template <class UpdateRule>
DEVICE void fetch(const Call<UpdateRule>& call, Work<UpdateRule>& work) {
    constexpr unsigned first = sizeof(Entry) / 16, all = first + sizeof(Settled<UpdateRule>) / 16;
    const int32_t tensor = work.item.tensor;
    for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
        const int4* from = i < first
                               ? reinterpret_cast<const int4*>(call.entries + tensor) + i
                               : reinterpret_cast<const int4*>(call.settled + tensor) + (i - first);
        reinterpret_cast<int4*>(&work.entry)[i] = __ldcg(from);
    }
    static_assert(sizeof(Work<UpdateRule>) == sizeof(Item) + 16 * all);
    __syncthreads();
}
DEVICE Item item_at(const Item* items, uint32_t at) {
    return bit_cast<Item>(__ldcg(reinterpret_cast<const int4*>(items + at)));
}

// The next item for a block; false when there is none.
template <class UpdateRule> DEVICE bool take(const Call<UpdateRule>& call, Work<UpdateRule>& work) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const uint32_t at = atomicAdd(call.next, 1u);
        work.item.kind = nothing;
        if (at < call.count) {
            work.item = item_at(call.items, at);
            if (work.item.kind == updating) await(&call.progress[work.item.tensor].ready);
        }
    }
    __syncthreads();
    if (work.item.kind == nothing) return false;
    fetch(call, work);
    return true;
}

// --- How elements arrive ---

// Words of the generator: element l is the first of a whole counter, or anywhere.
template <int n, bool unsharded>
DEVICE void draw_words(uint32_t (&words)[n], const Layout& at, int64_t l, uint32_t step,
                       const RoundKeys& keys) {
    const uint32_t stream = static_cast<uint32_t>(at.stream);
    const int64_t index = unsharded ? at.offset + l : element_index(at, l);
    const FourWords four = philox(static_cast<uint64_t>(index) / 4, step, stream, keys);
    if constexpr (n == 1) {
        const uint32_t lower = index & 1 ? four.at[1] : four.at[0],
                       upper = index & 1 ? four.at[3] : four.at[2];
        words[0] = index & 2 ? upper : lower;
    } else {
        UNROLL
        for (int j = 0; j < n; ++j) words[j] = four.at[j];
    }
}

// Says where in a word the bits are that round an element of a list.
enum Rounding { to_nearest = -1, by_low_bits = 0, by_high_bits = 16 };
DEVICE uint16_t rounded_bfloat16(float x, uint32_t word, Rounding rounding) {
    return rounding == to_nearest ? round_bfloat16(x) : cut_bfloat16(x, word >> rounding & 0xffffu);
}

// Each has the elements that a thread takes at a time, from element l on, and goes on to its next
// ones. They are loaded as they lie in memory (Raw), so that a thread asks for all lists before it
// waits for one; then `at_once` of them after the other are looked at (get) and replaced (put):
// what a counter of the generator has words for.

// Turn 4 elements of a list from what memory has into floats, and back; 16-bit ones lie in pairs.
template <int n> DEVICE void widen_pairs(const uint32_t* pairs, float (&x)[n]) {
    UNROLL
    for (int i = 0; i < n; i += 2)
        x[i] = first_bfloat16(pairs[i / 2]), x[i + 1] = second_bfloat16(pairs[i / 2]);
}
template <int n>
DEVICE void round_pairs(uint32_t* pairs, const float (&x)[n], const uint32_t (&words)[n],
                        Rounding rounding) {
    UNROLL
    for (int i = 0; i < n; i += 2)
        pairs[i / 2] = pair_of(rounded_bfloat16(x[i], words[i], rounding),
                               rounded_bfloat16(x[i + 1], words[i + 1], rounding));
}

// Lists of one type: float, or uint16_t for bfloat16.
template <class T, bool keeps_> struct Full {
    static constexpr int count = Pack<T>::count, at_once = 4;
    // linear normalisation, rescaled, not sharded within a row
    static constexpr bool usual = true;
    // statistics for the next step
    static constexpr bool keeps = keeps_;
    static constexpr bool wide = sizeof(T) == 4;
    // The halves of a pack take turns: both at once would need more registers than there are.
    static constexpr bool turns = !wide;
    using Raw = Pack<uint32_t>;
    static DEVICE void turn(Raw& raw) { raw = {{raw.x[2], raw.x[3], raw.x[0], raw.x[1]}}; }
    const Entry& e;
    int64_t l;

    DEVICE Full(const Entry& e, const int64_t*, int64_t l) : e(e), l(l) {}
    DEVICE void advance() { l += threads * count; }
    template <int role> DEVICE uint32_t* place() const {
        return reinterpret_cast<uint32_t*>(reinterpret_cast<T*>(e.slots[role].data) + l);
    }
    template <int role> DEVICE Raw load() const { return load_last(place<role>()); }
    // The statistics' visit, which leaves g in the cache.
    DEVICE Raw load_first(bool) const { return load_pack(place<gradient>()); }
    template <int role> DEVICE void store(const Raw& raw) const { store_last(place<role>(), raw); }

    template <int role, int n> DEVICE void get(const Raw& raw, int first, float (&x)[n]) const {
        if constexpr (wide) {
            UNROLL
            for (int i = 0; i < n; ++i) x[i] = bit_cast<float>(raw.x[i]);
        } else {
            widen_pairs(raw.x + first / 2, x);
        }
    }
    template <int role, int n>
    DEVICE void put(Raw& raw, int first, const float (&x)[n], const uint32_t (&words)[n],
                    Rounding rounding) const {
        if constexpr (wide) {
            UNROLL
            for (int i = 0; i < n; ++i) raw.x[i] = bit_cast<uint32_t>(x[i]);
        } else {
            round_pairs(raw.x + first / 2, x, words, rounding);
        }
    }
};

// float32, bfloat16 and float16
struct Mixed {
    static constexpr int count = 8, at_once = 4;
    static constexpr bool usual = false, keeps = true, turns = false;
    struct Raw {
        // the second half of float32's
        Pack<uint32_t> low, high;
    };
    const Entry& e;
    int64_t l;

    DEVICE Mixed(const Entry& e, const int64_t*, int64_t l) : e(e), l(l) {}
    DEVICE void advance() { l += threads * count; }
    DEVICE bool is_wide(int role) const { return e.slots[role].storage == Storage::float32; }
    template <int role> DEVICE uint32_t* place() const {
        return reinterpret_cast<uint32_t*>(e.slots[role].data + (is_wide(role) ? 4 : 2) * l);
    }
    template <int role> DEVICE Raw load() const {
        const uint32_t* at = place<role>();
        Raw raw{load_last(at), {}};
        if (is_wide(role)) raw.high = load_last(at + 4);
        return raw;
    }
    // Nobody but this kernel's updates writes g, after the statistics.
    DEVICE Raw load_first(bool has_saliency) const {
        return has_saliency ? load_kept<given>() : load_kept<gradient>();
    }
    template <int role> DEVICE Raw load_kept() const {
        const auto* at = reinterpret_cast<const Pack<uint32_t>*>(place<role>());
        Raw raw{at[0], {}};
        if (is_wide(role)) raw.high = at[1];
        return raw;
    }
    template <int role> DEVICE void store(const Raw& raw) const {
        uint32_t* to = place<role>();
        store_last(to, raw.low);
        if (is_wide(role)) store_last(to + 4, raw.high);
    }

    template <int role, int n> DEVICE void get(const Raw& raw, int first, float (&x)[n]) const {
        const Storage storage = e.slots[role].storage;
        const uint32_t* pairs = raw.low.x + first / 2;
        if (storage == Storage::bfloat16) return widen_pairs(pairs, x);
        UNROLL
        for (int i = 0; i < n; ++i)
            x[i] = storage == Storage::float32
                       ? bit_cast<float>(first < 4 ? raw.low.x[i] : raw.high.x[i])
                       : widen_float16(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
    }
    template <int role, int n>
    DEVICE void put(Raw& raw, int first, const float (&x)[n], const uint32_t (&words)[n],
                    Rounding rounding) const {
        const Storage storage = e.slots[role].storage;
        uint32_t* pairs = raw.low.x + first / 2;
        if (storage == Storage::float32) {
            UNROLL
            for (int i = 0; i < n; ++i)
                (first < 4 ? raw.low.x[i] : raw.high.x[i]) = bit_cast<uint32_t>(x[i]);
        } else if (storage == Storage::float16) {
            UNROLL
            for (int i = 0; i < n; i += 2)
                pairs[i / 2] = pair_of(round_float16(x[i]), round_float16(x[i + 1]));
        } else if (rounding == to_nearest) {
            round_pairs(pairs, x, words, to_nearest);
        } else {
            round_pairs(pairs, x, words, rounding);
        }
    }
};

// anything
struct Ragged {
    static constexpr int count = 1, at_once = 1;
    static constexpr bool usual = false, keeps = true, turns = false;
    using Raw = float;
    const Entry& e;
    const int64_t* axes;
    int64_t l;

    DEVICE Ragged(const Entry& e, const int64_t* axes, int64_t l) : e(e), axes(axes), l(l) {}
    DEVICE void advance() { l += threads; }
    DEVICE Raw load_first(bool has_saliency) const {
        return load_from(e.slots[has_saliency ? given : gradient]);
    }
    template <int role> DEVICE Raw load() const { return load_from(e.slots[role]); }
    DEVICE Raw load_from(const Slot& from) const {
        return value_at<float>(place_of(from, axes, l), from.storage);
    }
    template <int role> DEVICE void store(Raw raw) const {
        put_value(place_of(e.slots[role], axes, l), e.slots[role].storage, raw);
    }

    template <int role> DEVICE void get(Raw raw, int, float (&x)[1]) const { x[0] = raw; }
    template <int role>
    DEVICE void put(Raw& raw, int, const float (&x)[1], const uint32_t (&words)[1],
                    Rounding rounding) const {
        const bool cut = rounding != to_nearest && e.slots[role].storage == Storage::bfloat16;
        raw = cut ? widen_bfloat16(rounded_bfloat16(x[0], words[0], rounding)) : x[0];
    }
};

// --- What happens to them ---

struct Extremes {
    uint32_t low = ~0u, high = 0;

    DEVICE void add(float x) {
        const uint32_t bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
        low = minimum(low, bits);
        if (bits < Float<float>::infinity) high = maximum(high, bits);
    }
    DEVICE void join(Progress& into) const {
        const uint32_t least = __reduce_min_sync(whole_warp, low),
                       most = __reduce_max_sync(whole_warp, high);
        if (threadIdx.x % warp_size == 0) atomicMin(&into.low, least), atomicMax(&into.high, most);
    }
};

template <class Access, class UpdateRule>
DEVICE void gather(const Call<UpdateRule>& call, const Work<UpdateRule>& work, int64_t begin,
                   int64_t end) {
    if (!work.settled.own) return;
    const bool has_saliency =
        std::is_same_v<UpdateRule, NoUpdateRule> && work.entry.slots[given].data;
    const float unscale = has_saliency ? 1 : work.settled.curve.unscale;
    int left = static_cast<int>(end - begin) - static_cast<int>(threadIdx.x) * Access::count;
    Access access(work.entry, call.axes, begin + threadIdx.x * Access::count);
    Extremes found;
#pragma unroll(Access::count == 1 ? 1 : 4)
    for (; left > 0; left -= threads * Access::count) {
        const typename Access::Raw raw = access.load_first(has_saliency);
        UNROLL
        for (int first = 0; first < Access::count; first += Access::at_once) {
            float x[Access::at_once];
            if (has_saliency) access.template get<given>(raw, first, x);
            else access.template get<gradient>(raw, first, x);
            UNROLL
            for (int i = 0; i < Access::at_once; ++i) found.add(x[i] * unscale);
        }
        access.advance();
    }
    found.join(call.progress[work.item.tensor]);
    __syncthreads();
    if (threadIdx.x == 0 && is_last(&call.progress[work.item.tensor].statistics_left, 1))
        settle(call, work.entry, work.item.tensor);
}

template <int n, class UpdateRule>
DEVICE void find_inverses(const Call<UpdateRule>& call, const Work<UpdateRule>& work,
                          const Probability<float>& probability, const float (&g)[n],
                          const float (&s)[n], float (&inverse)[n]) {
    const bool has_saliency =
        std::is_same_v<UpdateRule, NoUpdateRule> && work.entry.slots[given].data;
    auto each = [&](auto f) {
        UNROLL
        for (int i = 0; i < n; ++i) inverse[i] = f(i);
    };
    if (call.ranks()) {
        const float* table = call.tables + static_cast<int64_t>(work.entry.table) * rank_table;
        each([&](int i) {
            return table[minimum(rank_bin(has_saliency ? root(s[i]) : absolute(g[i])), rank_bins)];
        });
    } else if (!call.linear()) {
        each([&](int) { return work.settled.constant; });
    } else if (has_saliency) {
        each([&](int i) { return finite(s[i]) ? probability.inverse(s[i]) : 1.0f; });
    } else {
        each([&](int i) { return probability.inverse(square(g[i])); });
    }
}

template <bool more>
DEVICE void apply(const AdamW<float>& update_rule, bool update, Out, float& theta, float g,
                  float factor, float& m, float& v, float& v_max) {
    if (update) update_rule.step<true, more>(theta, g, factor, m, v, v_max);
    else update_rule.step<false, more>(theta, g, factor, m, v, v_max);
}
template <bool more>
DEVICE void apply(const SGD<float>& update_rule, bool update, Out, float& theta, float g,
                  float factor, float& buffer, float&, float&) {
    if (update) update_rule.step<true, more>(theta, g, factor, buffer);
    else update_rule.step<false, more>(theta, g, factor, buffer);
}
template <bool>
DEVICE void apply(const NoUpdateRule&, bool, Out out, float& theta, float g, float factor, float&,
                  float&, float&) {
    theta = out == Out::multiplied ? g * factor : out == Out::factor ? factor : 1 / factor;
}
template <class UpdateRule, bool more> constexpr int states_of = 0;
template <bool more> constexpr int states_of<AdamW<float>, more> = more ? 3 : 2;
template <bool more> constexpr int states_of<SGD<float>, more> = more ? 1 : 0;

template <class Access, bool more, class UpdateRule>
DEVICE void update_elements(const Call<UpdateRule>& call, const Work<UpdateRule>& work, bool update,
                            int64_t begin, int64_t end) {
    constexpr int n = Access::count, at_once = Access::at_once,
                  states = states_of<UpdateRule, more>;
    constexpr bool has_update_rule = !std::is_same_v<UpdateRule, NoUpdateRule>;
    const bool gathers = Access::keeps && work.entry.kept[0].data && !work.settled.own;
    const bool has_saliency = !has_update_rule && work.entry.slots[given].data;
    bool rounding = call.rounding;
    // known as it is compiled
    if constexpr (Access::usual) rounding = !Access::wide;
    int left = static_cast<int>(end - begin) - static_cast<int>(threadIdx.x) * n;
    Access access(work.entry, call.axes, begin + threadIdx.x * n);
    Extremes found;
#pragma unroll 1
    for (; left > 0; left -= threads * n, access.advance()) {
        typename Access::Raw raw_g = access.template load<gradient>(), raw_theta{}, raw_s{},
                             raw_state[3]{};
        if (has_update_rule) raw_theta = access.template load<theta>();
        if (states > 0) raw_state[0] = access.template load<first_state>();
        if (states > 1) raw_state[1] = access.template load<first_state + 1>();
        if (states > 2) raw_state[2] = access.template load<first_state + 2>();
        if (has_saliency) raw_s = access.template load<given>();
#pragma unroll(Access::turns ? 1 : n / at_once)
        for (int part = 0; part < n; part += at_once) {
            const int first = Access::turns ? 0 : part;
            float g[at_once], s[at_once] = {}, factor[at_once], inverse[at_once],
                              parameters[at_once] = {}, state[3][at_once] = {};
            uint32_t words[at_once] = {};
            if (Access::usual || call.random)
                draw_words<at_once, Access::usual>(words, work.entry.layout, access.l + part,
                                                   work.settled.step, call.keys);
            access.template get<gradient>(raw_g, first, g);
            if (has_saliency) access.template get<given>(raw_s, first, s);
            // for these elements only: registers are few
            const Curve curve = reread(work.settled.curve);
            UNROLL
            for (int i = 0; i < at_once; ++i) g[i] *= curve.unscale;
            if constexpr (Access::usual) {
                UNROLL
                for (int i = 0; i < at_once; ++i)
                    inverse[i] = curve.probability.inverse(square(g[i]));
            } else {
                find_inverses(call, work, curve.probability, g, s, inverse);
            }
            UNROLL
            for (int i = 0; i < at_once; ++i)
                factor[i] = Access::usual || call.options.rescale
                                ? drawn_factor<true>(g[i], inverse[i], words[i])
                                : drawn_factor<false>(g[i], inverse[i], words[i]);
            if (gathers) {
                UNROLL
                for (int i = 0; i < at_once; ++i) found.add(g[i]);
            }
            if (has_update_rule) access.template get<theta>(raw_theta, first, parameters);
            if (states > 0) access.template get<first_state>(raw_state[0], first, state[0]);
            if (states > 1) access.template get<first_state + 1>(raw_state[1], first, state[1]);
            if (states > 2) access.template get<first_state + 2>(raw_state[2], first, state[2]);
            const UpdateRule update_rule = reread(work.settled.rule).update_rule;
            auto apply_all = [&](bool to_update) {
                UNROLL
                for (int i = 0; i < at_once; ++i)
                    apply<more>(update_rule, to_update, call.out, parameters[i], g[i], factor[i],
                                state[0][i], state[1][i], state[2][i]);
            };
            if (update) apply_all(true);
            else apply_all(false);
            access.template put<theta>(raw_theta, first, parameters, words, to_nearest);
            if (states > 0 && rounding)
                draw_words<at_once, Access::usual>(words, work.entry.layout, access.l + part,
                                                   work.settled.step, call.rounding_keys);
            const Rounding low = rounding ? by_low_bits : to_nearest,
                           high = rounding ? by_high_bits : to_nearest;
            if (states > 0)
                access.template put<first_state>(raw_state[0], first, state[0], words, low);
            if (states > 1)
                access.template put<first_state + 1>(raw_state[1], first, state[1], words, high);
            if (states > 2)
                access.template put<first_state + 2>(raw_state[2], first, state[2], words, high);
            if constexpr (Access::turns) {
                Access::turn(raw_g), Access::turn(raw_theta);
                UNROLL
                for (int i = 0; i < states; ++i) Access::turn(raw_state[i]);
            }
        }
        access.template store<theta>(raw_theta);
        if (states > 0) access.template store<first_state>(raw_state[0]);
        if (states > 1) access.template store<first_state + 1>(raw_state[1]);
        if (states > 2) access.template store<first_state + 2>(raw_state[2]);
    }
    if (gathers) found.join(call.progress[work.item.tensor]);
    if (Access::keeps && work.entry.kept[0].data) {
        __syncthreads();
        if (threadIdx.x == 0 && is_last(&call.progress[work.item.tensor].updates_left, 1))
            keep_range(call, work.entry, work.item.tensor);
    }
}

template <class Access, bool more, class UpdateRule>
DEVICE void work_on_items(const Call<UpdateRule>& call, bool update) {
    __shared__ Room<sizeof(Work<UpdateRule>)> room;
    Work<UpdateRule>& work = *reinterpret_cast<Work<UpdateRule>*>(&room);
    while (take(call, work)) {
        const int64_t begin = work.item.begin, bulk = work.entry.bulk;
        if (work.item.kind == gathering)
            gather<Access>(
                call, work, begin,
                minimum(begin + (work.entry.kept[0].data ? seldom_item : item_size), bulk));
        else
            update_elements<Access, more>(call, work, update, begin,
                                          minimum(begin + item_size, bulk));
    }
}
template <class T, bool keeps, bool update, bool more, class UpdateRule>
__global__ void __launch_bounds__(threads,
                                  sizeof(T) == 4 && states_of<UpdateRule, more> < 3 ? 4 : 3)
    step_full(const __grid_constant__ Call<UpdateRule> call) {
    work_on_items<Full<T, keeps>, more>(call, update);
}
template <bool more, class UpdateRule>
__global__ void __launch_bounds__(threads, 3)
    step_mixed(const __grid_constant__ Call<UpdateRule> call) {
    work_on_items<Mixed, more>(call, call.options.target_update);
}
// Statistics alone.
__global__ void __launch_bounds__(threads, 4)
    gather_full(const __grid_constant__ Call<NoUpdateRule> call) {
    __shared__ Room<sizeof(Work<NoUpdateRule>)> room;
    Work<NoUpdateRule>& work = *reinterpret_cast<Work<NoUpdateRule>*>(&room);
    while (take(call, work)) {
        const int64_t begin = work.item.begin,
                      size = work.entry.kept[0].data ? seldom_item : item_size;
        gather<Mixed>(call, work, begin, minimum(begin + size, work.entry.bulk));
    }
}

template <class UpdateRule, class F> DEVICE void over_ragged(const Call<UpdateRule>& call, F f) {
    __shared__ Room<sizeof(Work<UpdateRule>)> room;
    Work<UpdateRule>& work = *reinterpret_cast<Work<UpdateRule>*>(&room);
    for (uint32_t at = blockIdx.x; at < call.ragged_count; at += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) work.item = item_at(call.ragged, at);
        __syncthreads();
        fetch(call, work);
        if (!work.settled.skipped)
            f(work, work.item.begin, minimum(work.item.begin + item_size, work.entry.size));
    }
}
template <class UpdateRule>
__global__ void __launch_bounds__(threads)
    gather_ragged(const __grid_constant__ Call<UpdateRule> call) {
    over_ragged(call, [&](const Work<UpdateRule>& work, int64_t begin, int64_t end) {
        gather<Ragged>(call, work, begin, end);
    });
}
template <bool more, class UpdateRule>
__global__ void __launch_bounds__(threads, 3)
    step_ragged(const __grid_constant__ Call<UpdateRule> call) {
    over_ragged(call, [&](const Work<UpdateRule>& work, int64_t begin, int64_t end) {
        update_elements<Ragged, more>(call, work, call.options.target_update, begin, end);
    });
}

// --- Ranks ---

// Counts by bin: elements whose unsharded index is a multiple of `every`; rank_parts blocks for
// each tensor. `sizes`: of the unsharded tensors.
template <class UpdateRule, class Count>
__global__ void __launch_bounds__(threads)
    count_bins(Call<UpdateRule> call, Count* counts, int64_t row_size, bool by_row,
               const int64_t* sizes) {
    const int64_t tensor = blockIdx.x / rank_parts;
    const Entry& e = call.entries[tensor];
    const bool has_saliency = e.slots[given].data;
    const int64_t every = rank_stride(sizes ? sizes[tensor] : e.size);
    // then only elements that count are looked at
    const bool straight = e.layout.run >= e.size;
    const int64_t first = straight ? (every - e.layout.offset % every) % every : 0,
                  apart = straight ? every : 1;
    Count* into = counts + (by_row ? tensor * row_size : 0);
    const int64_t from = blockIdx.x % rank_parts * threads + threadIdx.x;
    for (int64_t l = first + from * apart; l < e.size; l += apart * rank_parts * threads) {
        if (!straight && element_index(e.layout, l) % every != 0) continue;
        const float x = Ragged(e, call.axes, l).load_first(has_saliency),
                    magnitude =
                        has_saliency ? root(x) : absolute(x * call.settled[tensor].curve.unscale);
        if (finite(magnitude))
            atomicAdd(into + rank_bin(magnitude),
                      static_cast<Count>(row_size == rank_bins ? every : 1));
    }
}

// 1/p by bin in the place of a table's counts, or from a row of counts handed in; a block for each
// table.
template <class UpdateRule>
__global__ void __launch_bounds__(table_threads) scan_bins(Call<UpdateRule> call) {
    __shared__ double sums[table_threads];
    constexpr int each = (rank_bins + table_threads - 1) / table_threads;
    float* table = call.tables + static_cast<int64_t>(blockIdx.x) * rank_table;
    const int64_t* handed = call.scope ? static_cast<const int64_t*>(call.scope) +
                                             static_cast<int64_t>(blockIdx.x) * rank_bins
                                       : nullptr;
    const int me = static_cast<int>(threadIdx.x), begin = me * each,
              end = minimum(begin + each, rank_bins);
    auto count = [&](int bin) {
        return handed ? static_cast<double>(handed[bin])
                      : static_cast<double>(bit_cast<uint32_t>(table[bin]));
    };
    double below = 0;
    for (int bin = begin; bin < end; ++bin) below += count(bin);
    sums[me] = below;
    // running sums
    for (int apart = 1; apart < table_threads; apart *= 2) {
        __syncthreads();
        const double before = me >= apart ? sums[me - apart] : 0;
        __syncthreads();
        sums[me] += before;
    }
    __syncthreads();
    const double total = maximum(sums[table_threads - 1], 1.0);
    below = me > 0 ? sums[me - 1] : 0;
    const RankCurve curve(call.options);
    for (int bin = begin; bin < end; ++bin) {
        const double here = count(bin);
        table[bin] = curve.inverse(static_cast<float>(below / total));
        below += here;
    }
    if (me == 0) table[rank_bins] = 1;
}

// Joins the tensors' extremes into rows of minimum and maximum; a block for each row.
__global__ void __launch_bounds__(threads)
    join_ranges(Call<NoUpdateRule> call, double* out, int64_t rows, int64_t tensors) {
    __shared__ double room[warp_size];
    double low = HUGE_VAL, high = -HUGE_VAL;
    for (int64_t i = rows == 1 ? threadIdx.x : blockIdx.x; i < tensors;
         i += rows == 1 ? threads : tensors) {
        const Entry& e = call.entries[i];
        const Range range = call.settled[i].own ? found_range(call, e, i) : kept_range(e);
        low = minimum(low, range.low), high = maximum(high, range.high);
    }
    low = over_block(low, room, HUGE_VAL, [](double a, double b) { return minimum(a, b); });
    high = over_block(high, room, -HUGE_VAL, [](double a, double b) { return maximum(a, b); });
    if (threadIdx.x == 0)
        out[2 * blockIdx.x] = minimum(out[2 * blockIdx.x], low),
                out[2 * blockIdx.x + 1] = maximum(out[2 * blockIdx.x + 1], high);
}

// --- The host's side ---

// A call's tensors as the kernels see them, and the axes of those that are not contiguous.
struct TensorTable : AxesTable {
    std::vector<Entry> entries;

    explicit TensorTable(const std::vector<TensorArguments>& tensors) : entries(tensors.size()) {
        for (size_t i = 0; i < entries.size(); ++i) {
            const TensorArguments& t = tensors[i];
            Entry& e = entries[i];
            e.slots[theta] = slot(t.theta), e.slots[gradient] = slot(t.g),
            e.slots[given] = slot(t.s);
            for (int k = 0; k < t.states_count; ++k) e.slots[first_state + k] = slot(t.states[k]);
            for (int k = 0; k < 2; ++k) e.kept[k] = slot(t.kept[k]);
            e.step = slot(t.step);
            e.size = t.size, e.layout = t.layout;
        }
    }
};

// Says what a call is for: `draws` words for its elements, `updates` them, or takes statistics
// alone.
struct Purpose {
    bool draws = true, updates = true;
};

// Returns how many elements of a tensor whole accesses of `pack` elements cover.
int64_t bulk_of(const Entry& e, int pack, const Purpose& purpose) {
    const Layout& at = e.layout;
    bool covered =
        !purpose.draws ||
        (at.offset % 4 == 0 && (at.run >= e.size || (at.run % 4 == 0 && at.stride % 4 == 0)));
    for (const Slot& s : e.slots)
        covered &= !s.data || (s.axes < 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0 &&
                               s.storage != Storage::float64 && s.storage != Storage::boolean);
    return covered ? e.size - e.size % pack : 0;
}

int32_t pieces_of(int64_t elements, int64_t size) {
    return static_cast<int32_t>((elements + size - 1) / size);
}

// Gives every tensor the places of its items, in an order in which each waits for earlier ones
// only.
template <class UpdateRule>
void order(Call<UpdateRule>& call, std::vector<Entry>& entries, int64_t window, bool updates) {
    uint32_t at = 0;
    auto update = [&](size_t i, size_t end) {
        for (; updates && i < end; ++i)
            entries[i].updates_at = static_cast<int32_t>(at),
            at += pieces_of(entries[i].bulk, item_size);
    };
    // the group before, and this one
    size_t last = 0, now = 0;
    for (size_t i = 0; i < entries.size();) {
        for (int64_t bytes = 0;
             i < entries.size() && (i == now || bytes + 4 * entries[i].size <= window / 2); ++i) {
            Entry& e = entries[i];
            bytes += 4 * e.size;
            e.backward = e.own && 4 * e.size > window;
            if (!e.own || e.bulk == 0) continue;
            const int32_t pieces = pieces_of(e.bulk, e.kept[0].data ? seldom_item : item_size);
            e.statistics_at = static_cast<int32_t>(at), e.statistics_items += pieces, at += pieces;
        }
        update(last, now);
        last = now, now = i;
    }
    update(last, entries.size());
    call.count = at;
    for (Entry& e : entries) {
        const int32_t ragged = pieces_of(e.size - e.bulk, item_size);
        e.updates_items = pieces_of(e.bulk, item_size) + ragged;
        if (ragged == 0) continue;
        e.ragged_at = static_cast<int32_t>(call.ragged_count), call.ragged_count += ragged;
        if (e.own) e.statistics_items += ragged;
    }
}

// The memory of a call on its device, for as long as the stream needs it.
struct Memory {
    Tensor table, scratch;
};

// Plans a call, copies its table and runs `prepare`. `pack`: elements of an access.
template <class UpdateRule, class Options>
Memory begin(Call<UpdateRule>& call, TensorTable& tensors, const Options& options, int pack,
             const Purpose& purpose, const Tensor& like, cudaStream_t stream) {
    std::vector<Entry>& entries = tensors.entries;
    const size_t n = entries.size();
    for (Entry& e : entries) e.bulk = bulk_of(e, pack, purpose);
    order(call, entries, attribute_of_device(cudaDevAttrL2CacheSize) / 3, purpose.updates);
    const DeviceTable<Entry> table = upload_table(entries, tensors.axes, like, stream);
    call.entries = table.entries, call.axes = table.axes;

    const int64_t tables = !call.ranks() ? 0
                           : call.scope  ? call.scope_rows
                                         : static_cast<int64_t>(n);
    size_t needed = 0;
    auto reserve = [&](size_t size) {
        return std::exchange(needed, needed + (size + 15) / 16 * 16);
    };
    const size_t settled = reserve(n * sizeof(Settled<UpdateRule>)),
                 progress = reserve(n * sizeof(Progress)),
                 items = reserve(call.count * sizeof(Item)),
                 ragged = reserve(call.ragged_count * sizeof(Item)), next = reserve(16),
                 by_bin = reserve(tables * rank_table * sizeof(float));
    Tensor scratch =
        torch::stable::new_empty(like, {static_cast<int64_t>(needed)}, ScalarType::Byte);
    char* to = static_cast<char*>(scratch.mutable_data_ptr());
    call.settled = reinterpret_cast<Settled<UpdateRule>*>(to + settled),
    call.progress = reinterpret_cast<Progress*>(to + progress);
    call.items = reinterpret_cast<Item*>(to + items),
    call.ragged = reinterpret_cast<Item*>(to + ragged);
    call.next = reinterpret_cast<uint32_t*>(to + next),
    call.tables = reinterpret_cast<float*>(to + by_bin);
    launch(prepare<UpdateRule, Options>, {static_cast<int64_t>(n), 128}, stream, call, options);
    if (tables > 0 && !call.scope) {
        check_cuda(cudaMemsetAsync(call.tables, 0, tables * rank_table * sizeof(float), stream),
                   "cudaMemsetAsync");
        launch(count_bins<UpdateRule, uint32_t>, {static_cast<int64_t>(n) * rank_parts, threads},
               stream, call, reinterpret_cast<uint32_t*>(call.tables), int64_t(rank_table), true,
               static_cast<const int64_t*>(nullptr));
    }
    launch(scan_bins<UpdateRule>, {tables, table_threads}, stream, call);
    return {table.memory, scratch};
}

// Names the dtype that a call's lists have in common.
enum class Lists { float32, bfloat16, mixed };

template <bool update, bool more, class UpdateRule>
auto kernel_for(Lists lists, bool keeps) -> void (*)(Call<UpdateRule>) {
    if constexpr (!std::is_same_v<UpdateRule, NoUpdateRule>) {
        if (lists == Lists::float32)
            return keeps ? step_full<float, true, update, more, UpdateRule>
                         : step_full<float, false, update, more, UpdateRule>;
        if (lists == Lists::bfloat16)
            return keeps ? step_full<uint16_t, true, update, more, UpdateRule>
                         : step_full<uint16_t, false, update, more, UpdateRule>;
    }
    return step_mixed<more, UpdateRule>;
}

template <bool update, bool more, class UpdateRule>
void launch_items(const Call<UpdateRule>& call, Lists lists, bool gathers, cudaStream_t stream) {
    auto go = [&](auto kernel, uint32_t items) {
        if (items > 0)
            launch(kernel, {resident_blocks(kernel, threads, items), threads}, stream, call);
    };
    if (gathers) go(gather_ragged<UpdateRule>, call.ragged_count);
    go(kernel_for<update, more, UpdateRule>(lists, call.options.previous), call.count);
    go(step_ragged<more, UpdateRule>, call.ragged_count);
}

// Runs a call: at once, or for ranks, whose tables take memory, part by part.
template <class UpdateRule, class Options>
void run(const Call<UpdateRule>& call, const SelectionArguments& arguments, const Options& options,
         bool more) {
    const Tensor& like = arguments.grads[0];
    const DeviceGuard device(like);
    const cudaStream_t stream = device.stream;
    TensorTable tensors(arguments.tensors);
    bool usual = call.linear() && call.options.rescale, wide = true, narrow = true;
    for (const Entry& e : tensors.entries) {
        usual &= e.layout.run >= e.size;
        for (const Slot& s : e.slots) {
            wide &= !s.data || s.storage == Storage::float32;
            narrow &= !s.data || s.storage == Storage::bfloat16;
        }
    }
    const Lists lists = usual && wide     ? Lists::float32
                        : usual && narrow ? Lists::bfloat16
                                          : Lists::mixed;
    const bool has_update_rule = !std::is_same_v<UpdateRule, NoUpdateRule>;
    const int pack = has_update_rule && lists == Lists::float32 ? 4 : 8;
    const std::vector<Entry> all = std::move(tensors.entries);
    const size_t most = call.ranks() && !call.scope ? ranked_at_once : all.size();
    for (size_t first = 0; first < all.size(); first += most) {
        tensors.entries.assign(all.begin() + first,
                               all.begin() + std::min(first + most, all.size()));
        bool gathers = false;
        for (size_t i = 0; i < tensors.entries.size(); ++i) {
            Entry& e = tensors.entries[i];
            e.own = call.linear() && !call.scope, gathers |= e.own;
            e.row = call.scope_rows > 1 ? static_cast<int32_t>(first + i) : 0;
            e.table = call.scope ? e.row : static_cast<int32_t>(i);
        }
        Call<UpdateRule> part = call;
        const Memory memory = begin(part, tensors, options, pack, {}, like, stream);
        if constexpr (std::is_same_v<UpdateRule, NoUpdateRule>)
            launch_items<false, false>(part, lists, gathers, stream);
        else if (call.options.target_update)
            more ? launch_items<true, true>(part, lists, gathers, stream)
                 : launch_items<true, false>(part, lists, gathers, stream);
        else
            more ? launch_items<false, true>(part, lists, gathers, stream)
                 : launch_items<false, false>(part, lists, gathers, stream);
    }
}

template <class UpdateRule, class Options>
void step(const StepArguments& arguments, const Options& options, bool more) {
    Call<UpdateRule> call(arguments);
    call.grad_scale = arguments.grad_scale, call.found_inf = arguments.found_inf;
    call.maximize = arguments.maximize, call.rounding = arguments.rounding;
    run(call, arguments, options, more);
}

} // namespace

static void take_step(const StepArguments& arguments, const AdamWOptions& options, bool amsgrad) {
    step<AdamW<float>>(arguments, options, amsgrad);
}

static void take_step(const StepArguments& arguments, const SGDOptions& options,
                      bool has_momentum) {
    step<SGD<float>>(arguments, options, has_momentum);
}

static void multiply(const SelectionArguments& arguments, int64_t step) {
    Call<NoUpdateRule> call(arguments);
    call.fixed_step = step;
    run(call, arguments, NoOptions(), false);
}

static void gather_statistics(const StatisticsArguments& arguments) {
    Call<NoUpdateRule> call(arguments);
    call.grad_scale = arguments.grad_scale;
    TensorTable tensors(arguments.tensors);
    const int64_t n = static_cast<int64_t>(tensors.entries.size());
    const Tensor& like = arguments.grads[0];
    const DeviceGuard device(like);
    const cudaStream_t stream = device.stream;
    const bool rank = call.ranks();
    // sizes travel beside the axes
    const int64_t at = static_cast<int64_t>(tensors.axes.size());
    tensors.axes.insert(tensors.axes.end(), arguments.sizes.begin(), arguments.sizes.end());
    for (Entry& e : tensors.entries) e.own = !rank;
    // no tables of its own
    if (rank) call.options.normalization = Normalization::constant;
    const Memory memory = begin(call, tensors, NoOptions(), 8, {false, false}, like, stream);
    if (rank) {
        launch(count_bins<NoUpdateRule, unsigned long long>, {n * rank_parts, threads}, stream,
               call, static_cast<unsigned long long*>(arguments.out.data), int64_t(rank_bins),
               arguments.out.count > 1, arguments.sizes.empty() ? nullptr : call.axes + at);
    } else {
        auto go = [&](auto kernel, uint32_t items) {
            if (items > 0)
                launch(kernel, {resident_blocks(kernel, threads, items), threads}, stream, call);
        };
        go(gather_full, call.count), go(gather_ragged<NoUpdateRule>, call.ragged_count);
        launch(join_ranges, {arguments.out.count, threads}, stream, call, arguments.out.range(0),
               arguments.out.count, n);
    }
}

// A probability is looked for with every u 0: each element is then selected, its factor 1/p.
static void inspect(const InspectionArguments& arguments, int64_t step, Out out) {
    Call<NoUpdateRule> call(arguments);
    call.out = out, call.fixed_step = step, call.random &= out == Out::factor;
    run(call, arguments, NoOptions(), false);
}

} // namespace uegr
