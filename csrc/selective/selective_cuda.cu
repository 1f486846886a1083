// The selecting operators on a GPU: checks, statistics, launches. The formulas are selective.h's.
//
// Bytes per element in float32: g, theta, m, v read, theta, m, v written: 28; and 4 for the
// statistics' visit of g, which the second one finds in the L2. All-bfloat16: 14 and 2. One launch
// serves a call, whatever its tensors: its blocks, as many as run at once, take items of 2^15
// elements from a counter. Items of statistics stand ahead of their tensor's updates by at most a
// third of the L2 (tensors in groups of a sixth), so that both kinds share the machine and no grid
// ever waits; a larger tensor is updated from its end, which is what its statistics saw last. An
// update waits for its tensor's mark, which the last of its statistics sets; those wait for nothing
// and are taken first, so somebody always moves. theta, m, v and the last visit of g pass as first
// to be evicted. On chip: a tensor's addresses and scalars in shared memory, read by all threads at
// once, since in registers they would cost an eighth of the threads; one access of 128 bits a list
// and thread (float32: 4 elements, else 8), which is one counter of the generator (two). 256
// threads at 48 registers are 5 blocks and 1,280 threads a multiprocessor: 80 KB under way, where
// the memory's latency asks for 12. Least and largest |g| meet as integers, by redux and one atomic
// a warp: no order, no rounding. Launches: `prepare` (steps, scalars, items), then the items'
// kernel, step_full (all float32) or step_mixed. What no access of 128 bits covers (the last
// elements of a tensor, tensors that are strided, misaligned or cut through a counter) belongs to
// gather_ragged before it and step_ragged after it, which are not launched where there is none.
// step_full is for float32, minmax or range, rescaled, this step's statistics and tensors in one
// piece; all else (16-bit tensors, previous, rank, constant, rescale=False, pieces of sharded
// tensors, AMSGrad on target "update") takes step_mixed, whose switches cost registers (two blocks
// a multiprocessor) and instructions. The statistics of a wider scope and the operators without a
// line pass element by element. Ranks take two launches more. The table of a call is copied to
// memory that the call itself allocates, in the stream's order: nothing waits on the host, and a
// graph that captured a step reads a table of its own.
#include <algorithm>
#include <vector>

#include "../core/tensor.h"
#include "selective.h"

namespace uegr {
namespace {

constexpr int64_t item_size = 1 << 15; // elements
constexpr int64_t seldom_item = 1 << 18; // of statistics that only a tensor's first step needs
constexpr int64_t ranked_at_once = 1 << 10; // tensors; a table of ranks has 128 KB
constexpr int threads = 256;
constexpr int table_threads = 1024;
constexpr int rank_table = rank_bins + 1; // 1/p by bin; the last one serves what is not finite
constexpr int rank_parts = 64; // blocks that count a tensor's bins

enum Role {
    theta,
    gradient,
    first_state,
    given = first_state + 3,
    roles
}; // given: a saliency in the place of g*g

// One tensor of a call, as the host knows it.
struct alignas(16) Entry {
    Slot slots[roles], step, kept[2]; // kept: "previous", minimum and maximum of s
    int64_t size = 0, bulk = 0; // elements; those that whole accesses cover
    Layout layout{};
    int32_t statistics_at = -1, updates_at = -1, ragged_at = -1; // where its items start
    int32_t table = 0; // "rank"
    int32_t statistics_items = 0, updates_items = 0;
    int32_t row = 0; // of the scope's statistics
    bool backward = false; // updated from its end
    bool own = false; // its statistics are taken in this call (kept ones: if there are none yet)
};

enum Kind : int32_t { gathering, updating, nothing };
struct alignas(16) Item {
    int32_t tensor, kind;
    int64_t begin;
};

// What becomes of a tensor in the course of a call.
struct alignas(16) Progress {
    uint32_t low, high; // bits of the least and largest |g| over finite elements
    uint32_t statistics_left, updates_left, ready, unused[3];
};

enum class Out { multiplied, factor, probability }; // of operators without a line
struct NoLine {};

// What a tensor's elements share.
struct alignas(16) Curve {
    Probability<float> probability;
    float unscale; // 1/grad_scale, negative to maximize
};
template <class Line> struct alignas(16) Slope {
    Line line;
};
template <class Line> struct alignas(16) Settled {
    Curve curve;
    Slope<Line> slope;
    float constant; // 1/p of "constant"
    uint32_t step;
    bool own, skipped;
};

template <class Line> struct Call {
    SelectionOptions options{};
    RoundKeys keys, rounding_keys; // in constant memory, which instructions read as they go
    int64_t fixed_step = 0; // where the tensors have none of their own
    Number grad_scale{1}, found_inf{0};
    bool maximize = false, random = false, rounding = false;
    Out out = Out::multiplied;
    const Entry* entries = nullptr;
    const int64_t* axes = nullptr;
    Settled<Line>* settled = nullptr;
    Progress* progress = nullptr;
    Item *items = nullptr, *ragged = nullptr;
    uint32_t *next = nullptr, count = 0, ragged_count = 0;
    float* tables = nullptr;
    const void* scope = nullptr; // statistics handed in
    int64_t scope_rows = 0;

    explicit Call(int64_t seed)
        : keys(static_cast<uint64_t>(seed)),
          rounding_keys(static_cast<uint64_t>(seed) ^ rounding_key) {}
    HOST_DEVICE bool linear() const {
        return options.normalization == Normalization::minmax ||
               options.normalization == Normalization::range;
    }
    HOST_DEVICE bool ranks() const { return options.normalization == Normalization::rank; }
};

// The scalars of a tensor's line, whose options may lie on the device.
struct AdamWOptions {
    Number lr, beta1, beta2;
    double weight_decay, eps;
    DEVICE AdamW<float> at(double step) const {
        return {lr.get(), beta1.get(), beta2.get(), weight_decay, eps, step};
    }
};
struct SGDOptions {
    Number lr;
    double momentum, dampening, weight_decay;
    bool nesterov;
    DEVICE SGD<float> at(double) const {
        return {lr.get(), momentum, dampening, weight_decay, nesterov};
    }
};
struct NoOptions {
    DEVICE NoLine at(double) const { return {}; }
};

template <class Line> struct Work {
    Item item;
    Entry entry;
    Settled<Line> settled;
};

// --- Before and between the items ---

template <class Line>
DEVICE Range found_range(const Call<Line>& call, const Entry& e, int64_t tensor) {
    const Progress& p = call.progress[tensor];
    return range_of<float>(__ldcg(&p.low), __ldcg(&p.high), e.slots[given].data);
}
DEVICE Range kept_range(const Entry& e) {
    return {value_at<double>(e.kept[0].data, e.kept[0].storage),
            value_at<double>(e.kept[1].data, e.kept[1].storage)};
}
template <class Line>
DEVICE void keep_range(const Call<Line>& call, const Entry& e, int64_t tensor) {
    const Range range = found_range(call, e, tensor);
    put_value(e.kept[0].data, e.kept[0].storage, range.low),
        put_value(e.kept[1].data, e.kept[1].storage, range.high);
}

// A block for each tensor: its step advances, its scalars are settled, its items written.
template <class Line, class Options>
__global__ void __launch_bounds__(128, 8) prepare(Call<Line> call, Options options) {
    const Entry& e = call.entries[blockIdx.x];
    const int32_t tensor = static_cast<int32_t>(blockIdx.x);
    const bool skipped = call.found_inf.get() != 0;
    if (threadIdx.x == 0) {
        if (tensor == 0) *call.next = skipped ? call.count : 0;
        double step = static_cast<double>(call.fixed_step);
        if (e.step.data) step = value_at<double>(e.step.data, e.step.storage) + 1;
        if (e.step.data && !skipped) put_value(e.step.data, e.step.storage, step);
        Settled<Line>& to = call.settled[tensor];
        to.slope.line = options.at(step);
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
        to.own = e.own && range.low != range.low; // nothing handed in, nothing kept yet
        if (!to.own) to.curve.probability = Probability<float>(call.options, range.low, range.high);
        call.progress[tensor] = {~0u,
                                 0,
                                 static_cast<uint32_t>(e.statistics_items),
                                 static_cast<uint32_t>(e.updates_items),
                                 !to.own || e.statistics_items == 0,
                                 {}};
        if constexpr (!std::is_same_v<Line, NoLine>)
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
template <class Line> DEVICE void settle(const Call<Line>& call, const Entry& e, int64_t tensor) {
    const Range range = found_range(call, e, tensor);
    call.settled[tensor].curve.probability =
        Probability<float>(call.options, range.low, range.high);
    publish(&call.progress[tensor].ready);
}

// The tensor of an item into shared memory.
template <class Line> DEVICE void fetch(const Call<Line>& call, Work<Line>& work) {
    constexpr unsigned first = sizeof(Entry) / 16, all = first + sizeof(Settled<Line>) / 16;
    const int32_t tensor = work.item.tensor;
    for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
        const int4* from = i < first
                               ? reinterpret_cast<const int4*>(call.entries + tensor) + i
                               : reinterpret_cast<const int4*>(call.settled + tensor) + (i - first);
        reinterpret_cast<int4*>(&work.entry)[i] = __ldcg(from);
    }
    static_assert(sizeof(Work<Line>) == sizeof(Item) + 16 * all);
    __syncthreads();
}
DEVICE Item item_at(const Item* items, uint32_t at) {
    return bit_cast<Item>(__ldcg(reinterpret_cast<const int4*>(items + at)));
}

// The next item for a block; false when there is none.
template <class Line> DEVICE bool take(const Call<Line>& call, Work<Line>& work) {
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

// Words of the generator: element l is the first of whole counters, or anywhere.
template <int n, bool unsharded>
DEVICE void draw(uint32_t (&words)[n], const Layout& at, int64_t l, uint32_t step,
                 const RoundKeys& keys) {
    const uint32_t stream = static_cast<uint32_t>(at.stream);
    if constexpr (n == 1) {
        const int64_t index = element_index(at, l);
        const FourWords four = philox(static_cast<uint64_t>(index) / 4, step, stream, keys);
        const uint32_t lower = index & 1 ? four.at[1] : four.at[0],
                       upper = index & 1 ? four.at[3] : four.at[2];
        words[0] = index & 2 ? upper : lower;
    } else {
        UNROLL
        for (int i = 0; i < n; i += 4) {
            const int64_t index = unsharded ? at.offset + l + i : element_index(at, l + i);
            const FourWords four = philox(static_cast<uint64_t>(index) / 4, step, stream, keys);
            UNROLL
            for (int j = 0; j < 4; ++j) words[i + j] = four.at[j];
        }
    }
}

// Each has the elements that a thread takes at a time, from element l on, and goes on to its next
// ones.
struct Full { // float32 alone
    static constexpr int count = 4;
    static constexpr bool usual = true; // linear normalisation, rescaled, not sharded within a row
    float* at[roles];

    DEVICE Full(const Entry& e, const int64_t*, int64_t l) {
        UNROLL
        for (int i = 0; i < roles; ++i) at[i] = reinterpret_cast<float*>(e.slots[i].data) + l;
    }
    DEVICE void advance() {
        UNROLL
        for (int i = 0; i < roles; ++i) at[i] += threads * count;
    }
    template <int role> DEVICE void load(float (&x)[count]) const {
        const Pack<float> pack = load_last(at[role]);
        UNROLL
        for (int i = 0; i < count; ++i) x[i] = pack.x[i];
    }
    // The statistics' visit, which leaves g in the cache.
    DEVICE void load_first(bool, float (&x)[count]) const {
        const Pack<float> pack = load_pack(at[gradient]);
        UNROLL
        for (int i = 0; i < count; ++i) x[i] = pack.x[i];
    }
    template <int role>
    DEVICE void store(const float (&x)[count], const uint32_t (&)[count], bool, int) const {
        Pack<float> pack;
        UNROLL
        for (int i = 0; i < count; ++i) pack.x[i] = x[i];
        store_last(at[role], pack);
    }
};

struct Mixed { // float32, bfloat16 and float16
    static constexpr int count = 8;
    static constexpr bool usual = false;
    const Entry& e;
    int64_t l;

    DEVICE Mixed(const Entry& e, const int64_t*, int64_t l) : e(e), l(l) {}
    DEVICE void advance() { l += threads * count; }
    DEVICE void load_first(bool, float (&x)[count]) const { load<gradient>(x); }
    template <int role> DEVICE void load(float (&x)[count]) const {
        const Slot& from = e.slots[role];
        if (from.storage == Storage::float32) {
            const float* at = reinterpret_cast<const float*>(from.data) + l;
            const Pack<float> low = load_last(at), high = load_last(at + 4);
            UNROLL
            for (int i = 0; i < 4; ++i) x[i] = low.x[i], x[4 + i] = high.x[i];
            return;
        }
        const Pack<uint16_t> pack = load_last(reinterpret_cast<const uint16_t*>(from.data) + l);
        UNROLL
        for (int i = 0; i < count; ++i)
            x[i] = from.storage == Storage::bfloat16 ? widen_bfloat16(pack.x[i])
                                                     : widen_float16(pack.x[i]);
    }
    template <int role>
    DEVICE void store(const float (&x)[count], const uint32_t (&words)[count], bool rounding,
                      int shift) const {
        const Slot& to = e.slots[role];
        if (to.storage == Storage::float32) {
            Pack<float> low, high;
            UNROLL
            for (int i = 0; i < 4; ++i) low.x[i] = x[i], high.x[i] = x[4 + i];
            float* at = reinterpret_cast<float*>(to.data) + l;
            store_last(at, low), store_last(at + 4, high);
            return;
        }
        Pack<uint16_t> pack;
        UNROLL
        for (int i = 0; i < count; ++i)
            pack.x[i] = to.storage == Storage::float16 ? round_float16(x[i])
                        : rounding ? cut_bfloat16(x[i], words[i] >> shift & 0xffffu)
                                   : round_bfloat16(x[i]);
        store_last(reinterpret_cast<uint16_t*>(to.data) + l, pack);
    }
};

struct Ragged { // anything
    static constexpr int count = 1;
    static constexpr bool usual = false;
    const Entry& e;
    const int64_t* axes;
    int64_t l;

    DEVICE Ragged(const Entry& e, const int64_t* axes, int64_t l) : e(e), axes(axes), l(l) {}
    DEVICE void advance() { l += threads; }
    DEVICE void load_first(bool has_saliency, float (&x)[count]) const {
        load_from(e.slots[has_saliency ? given : gradient], x);
    }
    template <int role> DEVICE void load(float (&x)[count]) const { load_from(e.slots[role], x); }
    DEVICE void load_from(const Slot& from, float (&x)[count]) const {
        x[0] = value_at<float>(place_of(from, axes, l), from.storage);
    }
    template <int role>
    DEVICE void store(const float (&x)[count], const uint32_t (&words)[count], bool rounding,
                      int shift) const {
        char* to = place_of(e.slots[role], axes, l);
        const Storage storage = e.slots[role].storage;
        if (rounding && storage == Storage::bfloat16)
            *reinterpret_cast<uint16_t*>(to) = cut_bfloat16(x[0], words[0] >> shift & 0xffffu);
        else put_value(to, storage, x[0]);
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

template <class Access, class Line>
DEVICE void gather(const Call<Line>& call, const Work<Line>& work, int64_t begin, int64_t end) {
    if (!work.settled.own) return;
    const bool has_saliency = std::is_same_v<Line, NoLine> && work.entry.slots[given].data;
    const float unscale = has_saliency ? 1 : work.settled.curve.unscale;
    int left = static_cast<int>(end - begin) - static_cast<int>(threadIdx.x) * Access::count;
    Access access(work.entry, call.axes, begin + threadIdx.x * Access::count);
    Extremes found;
#pragma unroll(Access::count == 1 ? 1 : 4)
    for (; left > 0; left -= threads * Access::count) {
        float x[Access::count];
        access.load_first(has_saliency, x);
        access.advance();
        UNROLL
        for (int i = 0; i < Access::count; ++i) found.add(x[i] * unscale);
    }
    found.join(call.progress[work.item.tensor]);
    __syncthreads();
    if (threadIdx.x == 0 && is_last(&call.progress[work.item.tensor].statistics_left, 1))
        settle(call, work.entry, work.item.tensor);
}

template <class Line>
DEVICE float inverse_of(const Call<Line>& call, const Work<Line>& work,
                        const Probability<float>& probability, float g, float s) {
    const bool has_saliency = std::is_same_v<Line, NoLine> && work.entry.slots[given].data;
    if (call.ranks()) {
        const float* table = call.tables + static_cast<int64_t>(work.entry.table) * rank_table;
        return table[minimum(rank_bin(has_saliency ? root(s) : absolute(g)), rank_bins)];
    }
    if (!call.linear()) return work.settled.constant;
    if (has_saliency) return finite(s) ? probability.inverse(s) : 1.0f;
    return probability.inverse(saliency(g));
}

template <bool more>
DEVICE void apply(const AdamW<float>& line, bool update, Out, float& theta, float g, float factor,
                  float& m, float& v, float& v_max) {
    if (update) line.step<true, more>(theta, g, factor, m, v, v_max);
    else line.step<false, more>(theta, g, factor, m, v, v_max);
}
template <bool more>
DEVICE void apply(const SGD<float>& line, bool update, Out, float& theta, float g, float factor,
                  float& buffer, float&, float&) {
    if (update) line.step<true, more>(theta, g, factor, buffer);
    else line.step<false, more>(theta, g, factor, buffer);
}
template <bool>
DEVICE void apply(const NoLine&, bool, Out out, float& theta, float g, float factor, float&, float&,
                  float&) {
    theta = out == Out::multiplied ? g * factor : out == Out::factor ? factor : 1 / factor;
}
template <class Line, bool more> constexpr int states_of = 0;
template <bool more> constexpr int states_of<AdamW<float>, more> = more ? 3 : 2;
template <bool more> constexpr int states_of<SGD<float>, more> = more ? 1 : 0;

template <class Access, bool more, class Line>
DEVICE void update_elements(const Call<Line>& call, const Work<Line>& work, bool update,
                            int64_t begin, int64_t end) {
    constexpr int n = Access::count, states = states_of<Line, more>;
    constexpr bool has_line = !std::is_same_v<Line, NoLine>;
    const bool gathers = !Access::usual && work.entry.kept[0].data && !work.settled.own;
    int64_t l = begin + threadIdx.x * n;
    int left = static_cast<int>(end - l);
    Access access(work.entry, call.axes, l);
    Extremes found;
#pragma unroll 1
    for (; left > 0; left -= threads * n, l += threads * n, access.advance()) {
        float g[n], s[n] = {}, factor[n], parameters[n] = {}, state[3][n] = {};
        uint32_t words[n] = {};
        access.template load<gradient>(g);
        if (has_line) access.template load<theta>(parameters);
        if (states > 0) access.template load<first_state>(state[0]);
        if (states > 1) access.template load<first_state + 1>(state[1]);
        if constexpr (!has_line)
            if (work.entry.slots[given].data) access.template load<given>(s);
        if (Access::usual || call.random)
            draw<n, Access::usual>(words, work.entry.layout, l, work.settled.step, call.keys);
        const Curve curve =
            reread(work.settled.curve); // for these elements only: registers are few
        UNROLL
        for (int i = 0; i < n; ++i) {
            g[i] *= curve.unscale;
            const float inverse = Access::usual
                                      ? curve.probability.inverse(saliency(g[i]))
                                      : inverse_of(call, work, curve.probability, g[i], s[i]);
            factor[i] = Access::usual || call.options.rescale
                            ? drawn_factor<true>(g[i], inverse, words[i])
                            : drawn_factor<false>(g[i], inverse, words[i]);
        }
        if (gathers) {
            UNROLL
            for (int i = 0; i < n; ++i) found.add(g[i]);
        }
        if (states > 2) access.template load<first_state + 2>(state[2]);
        const Line line = reread(work.settled.slope).line;
        UNROLL
        for (int i = 0; i < n; ++i)
            apply<more>(line, update, call.out, parameters[i], g[i], factor[i], state[0][i],
                        state[1][i], state[2][i]);
        access.template store<theta>(parameters, words, false, 0);
        if (!Access::usual && call.rounding)
            draw<n, Access::usual>(words, work.entry.layout, l, work.settled.step,
                                   call.rounding_keys);
        const bool rounding = !Access::usual && call.rounding;
        if (states > 0) access.template store<first_state>(state[0], words, rounding, 0);
        if (states > 1) access.template store<first_state + 1>(state[1], words, rounding, 16);
        if (states > 2) access.template store<first_state + 2>(state[2], words, rounding, 16);
    }
    if (gathers) found.join(call.progress[work.item.tensor]);
    if (work.entry.kept[0].data) {
        __syncthreads();
        if (threadIdx.x == 0 && is_last(&call.progress[work.item.tensor].updates_left, 1))
            keep_range(call, work.entry, work.item.tensor);
    }
}

template <class Access, bool more, class Line>
DEVICE void work_on_items(const Call<Line>& call, bool update) {
    __shared__ Room<sizeof(Work<Line>)> room;
    Work<Line>& work = *reinterpret_cast<Work<Line>*>(&room);
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
template <bool update, bool more, class Line>
__global__ void __launch_bounds__(threads, 5) step_full(const __grid_constant__ Call<Line> call) {
    work_on_items<Full, more>(call, update);
}
template <bool more, class Line>
__global__ void __launch_bounds__(threads, 2) step_mixed(const __grid_constant__ Call<Line> call) {
    work_on_items<Mixed, more>(call, call.options.target_update);
}

template <class Line, class F> DEVICE void over_ragged(const Call<Line>& call, F f) {
    __shared__ Room<sizeof(Work<Line>)> room;
    Work<Line>& work = *reinterpret_cast<Work<Line>*>(&room);
    for (uint32_t at = blockIdx.x; at < call.ragged_count; at += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) work.item = item_at(call.ragged, at);
        __syncthreads();
        fetch(call, work);
        if (!work.settled.skipped)
            f(work, work.item.begin, minimum(work.item.begin + item_size, work.entry.size));
    }
}
template <class Line>
__global__ void __launch_bounds__(threads) gather_ragged(const __grid_constant__ Call<Line> call) {
    over_ragged(call, [&](const Work<Line>& work, int64_t begin, int64_t end) {
        gather<Ragged>(call, work, begin, end);
    });
}
template <bool more, class Line>
__global__ void __launch_bounds__(threads, 3) step_ragged(const __grid_constant__ Call<Line> call) {
    over_ragged(call, [&](const Work<Line>& work, int64_t begin, int64_t end) {
        update_elements<Ragged, more>(call, work, call.options.target_update, begin, end);
    });
}

// --- Ranks ---

// Counts by bin: elements whose unsharded index is a multiple of `every`; rank_parts blocks for
// each tensor. `sizes`: of the unsharded tensors.
template <class Line, class Count>
__global__ void __launch_bounds__(threads)
    count_bins(Call<Line> call, Count* counts, int64_t row_size, bool by_row,
               const int64_t* sizes) {
    const int64_t tensor = blockIdx.x / rank_parts;
    const Entry& e = call.entries[tensor];
    const bool has_saliency = e.slots[given].data;
    const int64_t every = rank_stride(sizes ? sizes[tensor] : e.size);
    const bool straight = e.layout.run >= e.size; // then only elements that count are looked at
    const int64_t first = straight ? (every - e.layout.offset % every) % every : 0,
                  apart = straight ? every : 1;
    Count* into = counts + (by_row ? tensor * row_size : 0);
    const int64_t from = blockIdx.x % rank_parts * threads + threadIdx.x;
    for (int64_t l = first + from * apart; l < e.size; l += apart * rank_parts * threads) {
        if (!straight && element_index(e.layout, l) % every != 0) continue;
        float x[1];
        Ragged(e, call.axes, l).load_first(has_saliency, x);
        x[0] = has_saliency ? root(x[0]) : absolute(x[0] * call.settled[tensor].curve.unscale);
        if (finite(x[0]))
            atomicAdd(into + rank_bin(x[0]), static_cast<Count>(row_size == rank_bins ? every : 1));
    }
}

// 1/p by bin in the place of a table's counts, or from a row of counts handed in; a block for each
// table.
template <class Line> __global__ void __launch_bounds__(table_threads) scan_bins(Call<Line> call) {
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
    for (int apart = 1; apart < table_threads; apart *= 2) { // running sums
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
    join_ranges(Call<NoLine> call, double* out, int64_t rows, int64_t tensors) {
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

// A call's tensors and what they need beside them.
struct Roster : AxesTable {
    std::vector<Entry> entries;
};

bool is_float(const Slot& s) { return !s.data || s.storage == Storage::float32; }

// Which elements of a tensor whole accesses of `pack` elements cover.
int64_t bulk_of(const Entry& e, int pack, bool line) {
    const Layout& at = e.layout;
    bool covered = line && !e.slots[given].data && at.offset % 4 == 0 &&
                   (at.run >= e.size || (pack == 8 && at.run % 4 == 0 && at.stride % 4 == 0));
    for (const Slot& s : e.slots)
        covered &= s.axes < 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
    return covered ? e.size - e.size % pack : 0;
}

int32_t pieces_of(int64_t elements, int64_t size) {
    return static_cast<int32_t>((elements + size - 1) / size);
}

// Gives every tensor the places of its items, in an order in which each waits for earlier ones
// only.
template <class Line> void order(Call<Line>& call, std::vector<Entry>& entries, int64_t window) {
    uint32_t at = 0;
    auto update = [&](size_t i, size_t end) {
        for (; i < end; ++i)
            entries[i].updates_at = static_cast<int32_t>(at),
            at += pieces_of(entries[i].bulk, item_size);
    };
    size_t last = 0, now = 0; // the group before, and this one
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
template <class Line, class Options>
Memory begin(Call<Line>& call, Roster& roster, const Options& options, int pack, const Tensor& like,
             cudaStream_t stream) {
    std::vector<Entry>& entries = roster.entries;
    const size_t n = entries.size();
    for (Entry& e : entries) e.bulk = bulk_of(e, pack, !std::is_same_v<Line, NoLine>);
    order(call, entries, attribute_of_device(cudaDevAttrL2CacheSize) / 3);
    const size_t entry_bytes = n * sizeof(Entry), axes_bytes = roster.axes.size() * sizeof(int64_t);
    std::vector<char> bytes(entry_bytes + axes_bytes);
    memcpy(bytes.data(), entries.data(), entry_bytes),
        memcpy(bytes.data() + entry_bytes, roster.axes.data(), axes_bytes);
    Tensor table =
        torch::stable::new_empty(like, {static_cast<int64_t>(bytes.size())}, ScalarType::Byte);
    upload(bytes, table, stream);
    const char* at = static_cast<const char*>(table.data_ptr());
    call.entries = reinterpret_cast<const Entry*>(at),
    call.axes = reinterpret_cast<const int64_t*>(at + entry_bytes);

    const int64_t tables = !call.ranks() ? 0
                           : call.scope  ? call.scope_rows
                                         : static_cast<int64_t>(n);
    size_t needed = 0;
    auto reserve = [&](size_t size) {
        return std::exchange(needed, needed + (size + 15) / 16 * 16);
    };
    const size_t settled = reserve(n * sizeof(Settled<Line>)),
                 progress = reserve(n * sizeof(Progress)),
                 items = reserve(call.count * sizeof(Item)),
                 ragged = reserve(call.ragged_count * sizeof(Item)), next = reserve(16),
                 by_bin = reserve(tables * rank_table * sizeof(float));
    Tensor scratch =
        torch::stable::new_empty(like, {static_cast<int64_t>(needed)}, ScalarType::Byte);
    char* to = static_cast<char*>(scratch.mutable_data_ptr());
    call.settled = reinterpret_cast<Settled<Line>*>(to + settled),
    call.progress = reinterpret_cast<Progress*>(to + progress);
    call.items = reinterpret_cast<Item*>(to + items),
    call.ragged = reinterpret_cast<Item*>(to + ragged);
    call.next = reinterpret_cast<uint32_t*>(to + next),
    call.tables = reinterpret_cast<float*>(to + by_bin);
    launch(prepare<Line, Options>, {static_cast<int64_t>(n), 128}, stream, call, options);
    if (tables > 0 && !call.scope) {
        check_cuda(cudaMemsetAsync(call.tables, 0, tables * rank_table * sizeof(float), stream),
                   "cudaMemsetAsync");
        launch(count_bins<Line, uint32_t>, {static_cast<int64_t>(n) * rank_parts, threads}, stream,
               call, reinterpret_cast<uint32_t*>(call.tables), int64_t(rank_table), true,
               static_cast<const int64_t*>(nullptr));
    }
    launch(scan_bins<Line>, {tables, table_threads}, stream, call);
    return {table, scratch};
}

// AMSGrad on target "update" wants more registers than `step_full` has.
template <class Line> constexpr bool fits_full(bool update, bool more) {
    return !(update && more && std::is_same_v<Line, AdamW<float>>);
}

template <bool update, bool more, class Line>
void visit(const Call<Line>& call, int pack, bool gathers, cudaStream_t stream) {
    if (gathers && call.ragged_count > 0)
        launch(gather_ragged<Line>,
               {resident_blocks(gather_ragged<Line>, threads, call.ragged_count), threads}, stream,
               call);
    if constexpr (!std::is_same_v<Line, NoLine>) {
        auto kernel = step_mixed<more, Line>;
        if constexpr (fits_full<Line>(update, more))
            if (pack == 4) kernel = step_full<update, more, Line>;
        if (call.count > 0)
            launch(kernel, {resident_blocks(kernel, threads, call.count), threads}, stream, call);
    }
    const auto ragged = step_ragged<more, Line>;
    if (call.ragged_count > 0)
        launch(ragged, {resident_blocks(ragged, threads, call.ragged_count), threads}, stream,
               call);
}

// The parts of a roster that run on their own: all of it, but for ranks, whose tables take memory.
template <class Line, class Options>
void run(const Call<Line>& call, Roster roster, const Options& options, bool more,
         const Tensor& like, cudaStream_t stream) {
    bool narrow = call.linear() && call.options.rescale && !call.options.previous &&
                  fits_full<Line>(call.options.target_update, more);
    for (const Entry& e : roster.entries)
        for (const Slot& s : e.slots) narrow &= is_float(s) && e.layout.run >= e.size;
    const int pack = narrow ? 4 : 8;
    const std::vector<Entry> all = std::move(roster.entries);
    const size_t most = call.ranks() && !call.scope ? ranked_at_once : all.size();
    for (size_t first = 0; first < all.size(); first += most) {
        roster.entries.assign(all.begin() + first,
                              all.begin() + std::min(first + most, all.size()));
        bool gathers = false;
        for (size_t i = 0; i < roster.entries.size(); ++i) {
            Entry& e = roster.entries[i];
            e.own = call.linear() && !call.scope, gathers |= e.own;
            e.row = call.scope_rows > 1 ? static_cast<int32_t>(first + i) : 0;
            e.table = call.scope ? e.row : static_cast<int32_t>(i);
        }
        Call<Line> part = call;
        const Memory memory = begin(part, roster, options, pack, like, stream);
        if constexpr (std::is_same_v<Line, NoLine>)
            visit<false, false>(part, pack, gathers, stream);
        else if (call.options.target_update)
            more ? visit<true, true>(part, pack, gathers, stream)
                 : visit<true, false>(part, pack, gathers, stream);
        else
            more ? visit<false, true>(part, pack, gathers, stream)
                 : visit<false, false>(part, pack, gathers, stream);
    }
}

// --- The operators ---

View single(const Tensor& t, const char* name, bool written) {
    const View v = view(t, name, written);
    if (v.storage == Storage::float64) throw LeftToOthers();
    return v;
}

// The gradients, saliencies (or none) and layouts of a call, checked.
Roster make_roster(const Tensors& grads, const Tensors& saliencies,
                   const std::vector<int64_t>& layout) {
    STD_TORCH_CHECK(layout.size() == 4 * grads.size(), "layout has ", layout.size(),
                    " numbers; give stream, offset, run, stride by tensor");
    STD_TORCH_CHECK(saliencies.empty() || saliencies.size() == grads.size(),
                    "saliencies: ", saliencies.size(), " for ", grads.size(), " tensors");
    Roster roster;
    roster.entries.resize(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        Entry& e = roster.entries[i];
        STD_TORCH_CHECK(grads[i].get_device_index() == grads[0].get_device_index(), "grads[", i,
                        "] is on another device than grads[0]");
        const View g = single(grads[i], "grads", false);
        e.slots[gradient] = roster.slot(g);
        if (!saliencies.empty()) {
            const View s = view(saliencies[i], "saliencies", false);
            check_same_shape(s, g, "saliencies", i);
            e.slots[given] = roster.slot(s);
        }
        e.size = grads[i].numel();
        e.layout = {layout[4 * i], layout[4 * i + 1], std::max<int64_t>(layout[4 * i + 2], 1),
                    layout[4 * i + 3]};
        check_layout(e.layout, e.size, i);
    }
    return roster;
}

// A number on whichever device its tensor lies.
Number number(double value, const OptionalTensor& tensor, const char* name) {
    if (!tensor) return {value};
    if (tensor->is_cpu() && on_gpu) return {scalar(*tensor, name)};
    const View v = view(*tensor, name, false);
    STD_TORCH_CHECK(tensor->numel() == 1, name, " has ", tensor->numel(),
                    " elements; it must have one");
    return {value, v.data, v.storage};
}

// Minima and maxima, or counts by bin: a row for all tensors, or one for each.
void check_rows(const Tensor& rows, const char* name, bool rank, int64_t tensors) {
    STD_TORCH_CHECK((rows.is_cuda() || !on_gpu) && rows.is_contiguous() && rows.dim() == 2 &&
                        rows.size(1) == (rank ? rank_bins : 2) &&
                        rows.scalar_type() == (rank ? ScalarType::Long : ScalarType::Double),
                    name, " must be contiguous on the GPU: [rows, 2] float64, or for rank [rows, ",
                    rank_bins, "] int64");
    STD_TORCH_CHECK(rows.size(0) == 1 || rows.size(0) == tensors, name, " has ", rows.size(0),
                    " rows; give one, or one for each of ", tensors, " tensors");
}

template <class Line>
Call<Line> make_call(const SelectionOptions& options, int64_t seed, const OptionalTensor& scope,
                     size_t tensors) {
    STD_TORCH_CHECK(options.normalization >= Normalization::minmax &&
                        options.normalization <= Normalization::constant,
                    "normalization is ", static_cast<int64_t>(options.normalization),
                    "; use 0 (minmax), 1 (range), 2 (rank) or 3 (constant)");
    Call<Line> call(seed);
    call.options = options;
    call.random =
        options.normalization != Normalization::constant || inverse_of_constant(options) != 1;
    if (!scope || options.normalization == Normalization::constant) return call;
    check_rows(*scope, "scope_statistics", call.ranks(), static_cast<int64_t>(tensors));
    call.scope = scope->data_ptr(), call.scope_rows = scope->size(0);
    return call;
}

// What AdamW and SGD share: checks of every list, then the run. `states`: the operator's lists,
// empty ones unused.
template <class Line, class Options>
void step(Call<Line> call, Roster roster, const Options& options, const Tensors& params,
          const Tensors& grads, const std::vector<const Tensors*>& states, const Tensors& steps,
          const Tensors& mins, const Tensors& maxs, const OptionalTensor& grad_scale,
          const OptionalTensor& found_inf, bool maximize, bool more) {
    const size_t n = params.size();
    STD_TORCH_CHECK(roster.entries.size() == n, "grads has ", roster.entries.size(),
                    " tensors for ", n, " parameters");
    STD_TORCH_CHECK(call.options.previous || (mins.empty() && maxs.empty()),
                    "saliency_mins and saliency_maxs belong to statistics='previous'");
    if (n == 0) return;
    call.grad_scale = number(1, grad_scale, "grad_scale"),
    call.found_inf = number(0, found_inf, "found_inf");
    call.maximize = maximize;
    const int64_t tensors = static_cast<int64_t>(n);
    int64_t elements = 0;
    for (const Entry& e : roster.entries) elements += e.size;
    std::vector<List> moments, kept;
    for (const Tensors* list : states)
        if (!list->empty()) moments.emplace_back(*list, "states", n, elements);
    if (call.options.previous)
        kept.emplace_back(mins, "saliency_mins", n, tensors),
            kept.emplace_back(maxs, "saliency_maxs", n, tensors);
    List counts(steps, "steps", n, tensors);
    for (size_t i = 0; i < n; ++i) {
        Entry& e = roster.entries[i];
        const View p = single(params[i], "params", true);
        STD_TORCH_CHECK(params[i].scalar_type() == params[0].scalar_type(), "params[", i,
                        "] has another dtype than params[0]");
        STD_TORCH_CHECK(params[i].get_device_index() == params[0].get_device_index(), "params[", i,
                        "] is on another device than params[0]");
        check_same_shape(view(grads[i], "grads", false), p, "grads", i);
        e.slots[theta] = roster.slot(p);
        for (size_t k = 0; k < moments.size(); ++k) {
            const View state = moments[k].next(i, e.size, &p);
            STD_TORCH_CHECK(state.storage == Storage::float32 || state.storage == Storage::bfloat16,
                            "states must be float32 or bfloat16");
            call.rounding |= state.storage == Storage::bfloat16;
            e.slots[first_state + k] = roster.slot(state);
        }
        for (size_t k = 0; k < kept.size(); ++k)
            e.kept[k] = roster.slot(kept[k].next(i, 1, nullptr));
        e.step = roster.slot(counts.next(i, 1, nullptr));
    }
    const Place place(params[0]);
    run(call, std::move(roster), options, more, params[0], static_cast<cudaStream_t>(place.stream));
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
    const AdamWOptions line{number(lr, lr_tensor, "lr"), number(beta1, beta1_tensor, "betas[0]"),
                            number(beta2, beta2_tensor, "betas[1]"), weight_decay, eps};
    step(make_call<AdamW<float>>(SELECTION_OPTIONS, seed, scope_statistics, params.size()),
         make_roster(grads, {}, layout), line, params, grads,
         {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, steps, saliency_mins, saliency_maxs,
         grad_scale, found_inf, maximize, !max_exp_avg_sqs.empty());
}

static void selective_sgd_(Tensors params, Tensors grads, Tensors momentum_buffers, Tensors steps,
                           Tensors saliency_mins, Tensors saliency_maxs,
                           OptionalTensor scope_statistics, std::vector<int64_t> layout,
                           OptionalTensor grad_scale, OptionalTensor found_inf, double lr,
                           OptionalTensor lr_tensor, double weight_decay, bool maximize,
                           int64_t seed, double momentum, double dampening, bool nesterov,
                           SELECTION_ARGUMENTS) {
    const SGDOptions line{number(lr, lr_tensor, "lr"), momentum, dampening, weight_decay, nesterov};
    step(make_call<SGD<float>>(SELECTION_OPTIONS, seed, scope_statistics, params.size()),
         make_roster(grads, {}, layout), line, params, grads, {&momentum_buffers}, steps,
         saliency_mins, saliency_maxs, grad_scale, found_inf, maximize, !momentum_buffers.empty());
}

static void select_gradients_(Tensors grads, Tensors saliencies, OptionalTensor scope_statistics,
                              std::vector<int64_t> layout, int64_t step, int64_t seed,
                              SELECTION_ARGUMENTS) {
    Call<NoLine> call = make_call<NoLine>(SELECTION_OPTIONS, seed, scope_statistics, grads.size());
    Roster roster = make_roster(grads, saliencies, layout);
    if (grads.empty()) return;
    call.fixed_step = step;
    for (size_t i = 0; i < grads.size(); ++i)
        view(grads[i], "grads", true),
            roster.entries[i].slots[theta] = roster.entries[i].slots[gradient];
    if (!call.random) return; // every factor is 1
    const Place place(grads[0]);
    run(call, std::move(roster), NoOptions(), false, grads[0],
        static_cast<cudaStream_t>(place.stream));
}

static void selective_statistics_(Tensors grads, Tensors saliencies, Tensors mins, Tensors maxs,
                                  std::vector<int64_t> layout, std::vector<int64_t> sizes,
                                  int64_t normalization, OptionalTensor grad_scale, Tensor out) {
    SelectionOptions options{};
    options.normalization = static_cast<Normalization>(normalization);
    Call<NoLine> call = make_call<NoLine>(options, 0, std::nullopt, grads.size());
    Roster roster = make_roster(grads, saliencies, layout);
    const int64_t n = static_cast<int64_t>(grads.size());
    check_rows(out, "out", call.ranks(), n);
    STD_TORCH_CHECK(sizes.empty() || static_cast<int64_t>(sizes.size()) == n,
                    "sizes: ", sizes.size(), " for ", n, " tensors");
    STD_TORCH_CHECK(mins.empty() == maxs.empty() && (mins.empty() || !call.ranks()),
                    "saliency_mins and saliency_maxs belong together, not to rank");
    STD_TORCH_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }),
                    "sizes must not be negative");
    if (n == 0) return;
    if (!mins.empty()) {
        List low(mins, "saliency_mins", n, n), high(maxs, "saliency_maxs", n, n);
        for (int64_t i = 0; i < n; ++i) {
            roster.entries[i].kept[0] = roster.slot(low.next(i, 1, nullptr));
            roster.entries[i].kept[1] = roster.slot(high.next(i, 1, nullptr));
        }
    }
    call.grad_scale = number(1, grad_scale, "grad_scale");
    const Place place(grads[0]);
    const cudaStream_t stream = static_cast<cudaStream_t>(place.stream);
    const bool rank = call.ranks();
    const int64_t at = static_cast<int64_t>(roster.axes.size()); // sizes travel beside the axes
    roster.axes.insert(roster.axes.end(), sizes.begin(), sizes.end());
    for (Entry& e : roster.entries) e.own = !rank;
    if (rank) call.options.normalization = Normalization::constant; // no tables of its own
    const Memory memory = begin(call, roster, NoOptions(), 4, grads[0], stream);
    if (rank) {
        launch(count_bins<NoLine, unsigned long long>, {n * rank_parts, threads}, stream, call,
               static_cast<unsigned long long*>(out.mutable_data_ptr()), int64_t(rank_bins),
               out.size(0) > 1, sizes.empty() ? nullptr : call.axes + at);
    } else {
        launch(gather_ragged<NoLine>,
               {resident_blocks(gather_ragged<NoLine>, threads, call.ragged_count), threads},
               stream, call);
        launch(join_ranges, {out.size(0), threads}, stream, call,
               static_cast<double*>(out.mutable_data_ptr()), out.size(0), n);
    }
}

// A call over one tensor that writes `out` and leaves the gradient alone.
static void inspect(Call<NoLine> call, const Tensor& grad, const OptionalTensor& saliency,
                    const Tensor& out, const std::vector<int64_t>& layout, int64_t step, bool draws,
                    Out wanted) {
    Roster roster = make_roster({grad}, saliency ? Tensors{*saliency} : Tensors{}, layout);
    STD_TORCH_CHECK(out.numel() == grad.numel(),
                    "out has another shape than the gradient; they must be equal");
    roster.entries[0].slots[theta] = roster.slot(single(out, "out", true));
    call.out = wanted, call.fixed_step = step, call.random &= draws;
    const Place place(grad);
    run(call, std::move(roster), NoOptions(), false, grad, static_cast<cudaStream_t>(place.stream));
}

static void selection_mask_(Tensor grad, OptionalTensor saliency, Tensor out,
                            std::vector<int64_t> layout, int64_t step, int64_t seed,
                            SELECTION_ARGUMENTS) {
    inspect(make_call<NoLine>(SELECTION_OPTIONS, seed, std::nullopt, 1), grad, saliency, out,
            layout, step, true, Out::factor);
}

// Every u is 0 where nothing is drawn, so each element is selected and its factor is 1/p.
static void selection_probability_(Tensor grad, OptionalTensor saliency, Tensor out,
                                   SELECTION_ARGUMENTS) {
    rescale = true;
    const int64_t n = grad.numel();
    inspect(make_call<NoLine>(SELECTION_OPTIONS, 0, std::nullopt, 1), grad, saliency, out,
            {0, 0, n, n}, 0, false, Out::probability);
}

EXPORT_BOXED(selective_adamw_)
EXPORT_BOXED(selective_sgd_)
EXPORT_BOXED(select_gradients_)
EXPORT_BOXED(selective_statistics_)
EXPORT_BOXED(selection_mask_)
EXPORT_BOXED(selection_probability_)

} // namespace uegr
