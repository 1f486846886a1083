// The perturbing operators on a GPU: launches. The formulas are perturbation.h's, the checks
// arguments.h's; the plan stands in docs/design.md.
#include <algorithm>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "perturbation.h"

namespace uegr {
namespace {

constexpr int64_t piece_size = 1 << 14;
constexpr int most_threads = 256;
// of a launch
constexpr int64_t most_blocks = 1 << 30;

// One tensor of a call; none is empty.
struct Entry {
    // out = x + step along g; no data: x is 0
    Slot g, x, out;
    int64_t size = 0, length = 0, first_piece = 0, first_group = 0;
    int64_t stream = 0;

    // of a group
    HOST_DEVICE int64_t pieces() const { return (length + piece_size - 1) / piece_size; }
    HOST_DEVICE int64_t groups() const { return size / length; }
};

struct Call {
    Norm norm = Norm::l2;
    double epsilon = 0, radius = HUGE_VAL;
    bool projects = false;
    // one norm over all entries
    bool together = false;
    // a group is a piece: its block finds its factors
    bool alone = false;
    // of tokens of `token` elements each
    Slot mask;
    int64_t token = 1;
    bool random = false;
    // on the device, or null for
    const int64_t* seed = nullptr;
    int64_t seed_value = 0;
    uint32_t step = 0;
    int32_t limit = 1 << 24;
    const Entry* entries = nullptr;
    const int64_t* axes = nullptr;
    int count = 0;
    int64_t pieces = 0, groups = 0;
    // by piece; by group
    double *squares = nullptr, *direction_factors = nullptr, *ball_factors = nullptr;
};

struct Piece {
    Entry e;
    int64_t number, group, begin;
    int size;
};

// The entry whose first piece, or group, is the last that is not after `at`.
template <int64_t Entry::* first> DEVICE const Entry& entry_of(const Call& call, int64_t at) {
    int low = 0, high = call.count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (call.entries[middle].*first <= at ? low : high) = middle;
    }
    return call.entries[low];
}
// A block's piece, counted from the first or from the last of the launch: what was read last may
// still be in the L2.
DEVICE Piece piece_of_block(const Call& call, int64_t first_piece, bool backwards) {
    const int64_t p = first_piece + (backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    const Entry e = entry_of<&Entry::first_piece>(call, p);
    const int64_t group = (p - e.first_piece) / e.pieces(),
                  within = (p - e.first_piece) % e.pieces() * piece_size;
    const int64_t begin = group * e.length + within;
    return {e, p, e.first_group + group, begin,
            static_cast<int>(minimum(piece_size, e.length - within))};
}

// Holds what a thread takes of a tensor at a time: 128 bits of one dtype, or an element, of that
// dtype or of any, with strides. Of each list it asks for so many ahead.
template <Storage storage> struct Whole {
    static constexpr int size = storage == Storage::float32 ? 4 : 2, count = 16 / size, ahead = 2;
    static constexpr bool any = false;
    using Raw = Pack<uint32_t>;

    template <class T> static DEVICE T* place(const Slot& s, int64_t l) {
        return reinterpret_cast<T*>(s.data + l * size);
    }
    template <bool last> static DEVICE Raw load(const Call&, const Slot& from, int64_t l) {
        const uint32_t* at = place<const uint32_t>(from, l);
        return last ? load_last(at) : load_pack(at);
    }
    static DEVICE void store(const Call&, const Slot& to, int64_t l, const float (&x)[count]) {
        store_last(place<uint32_t>(to, l), narrowed<storage>(x));
    }
    static DEVICE void get(const Raw& raw, float (&x)[count]) { widen<storage>(raw, x); }
};
template <bool of_any, Storage known = Storage::float32> struct One {
    static constexpr int count = 1, ahead = of_any ? 4 : 1;
    static constexpr bool any = of_any;
    using Raw = float;

    static DEVICE Storage storage(const Slot& s) { return any ? s.storage : known; }
    static DEVICE char* place(const Call& call, const Slot& s, int64_t l) {
        return any ? place_of(s, call.axes, l) : s.data + l * bytes_of(known);
    }
    template <bool> static DEVICE Raw load(const Call& call, const Slot& from, int64_t l) {
        return value_at<float>(place(call, from, l), storage(from));
    }
    static DEVICE void store(const Call& call, const Slot& to, int64_t l, const float (&x)[1]) {
        put_value(place(call, to, l), storage(to), x[0]);
    }
    static DEVICE void get(Raw raw, float (&x)[1]) { x[0] = raw; }
};

// Calls visit(access, i, end) for all of a piece: the thread has access::ahead times access::count
// elements from i on, in turns with the block's other threads; those from `end` on are left out.
template <Storage storage, class Visit>
DEVICE void each_of(const Piece& piece, Whole<storage> whole, Visit visit) {
    constexpr int n = whole.count;
    const int past = static_cast<int>(
        (reinterpret_cast<uintptr_t>(piece.e.g.data) / whole.size + piece.begin) % n);
    const int from = minimum(piece.size, (n - past) % n), to = from + (piece.size - from) / n * n;
    for (int i = from + n * threadIdx.x; i < to; i += whole.ahead * n * blockDim.x)
        visit(whole, i, to);
    // The elements ahead and behind: fewer than threads.
    const int i = threadIdx.x;
    if (i < from + piece.size - to)
        visit(One<false, storage>(), i < from ? i : to + i - from, piece.size);
}
template <class Visit> DEVICE void each_of(const Piece& piece, One<true> one, Visit visit) {
    for (int i = threadIdx.x; i < piece.size; i += one.ahead * blockDim.x)
        visit(one, i, piece.size);
}

// The place of the turn-th of them.
template <class A> DEVICE int on_turn(int turn, int i) {
    return i + turn * A::count * static_cast<int>(blockDim.x);
}

// The marks of a piece's tokens, of which one that is longer than a piece is as good as one of its
// size. Indices of less than 2^15 are divided by at most 2^14: by a product, exactly.
struct Tokens {
    int64_t first = 0;
    // elements of the first token that are not the piece's
    uint32_t inverse = 0, behind = 0;

    DEVICE Tokens(const Call& call, const Piece& piece) {
        if (!call.mask.data) return;
        const int64_t size = minimum(call.token, piece_size);
        first = piece.begin / call.token;
        inverse = (1u << 31) / static_cast<uint32_t>(size) + 1;
        behind = static_cast<uint32_t>(size -
                                       minimum(call.token - piece.begin % call.token, piece_size));
    }
    template <bool any> DEVICE bool is_real(const Call& call, int i) const {
        const int64_t token =
            first + (wide_product(static_cast<uint32_t>(i) + behind, inverse) >> 31);
        return any ? value_at<float>(place_of(call.mask, call.axes, token), call.mask.storage) != 0
                   : call.mask.data[token] != 0;
    }
};

// Reads g, or zeros where the mask has them, or where there is none.
template <class A, bool last>
DEVICE void load_gradient(const Call& call, const Piece& piece, const Tokens& tokens, int i,
                          int end, typename A::Raw (&raw)[A::ahead]) {
    bool real[A::ahead];
    UNROLL
    for (int u = 0; u < A::ahead; ++u) real[u] = on_turn<A>(u, i) < end;
    if (call.mask.data) {
        UNROLL
        for (int u = 0; u < A::ahead; ++u)
            if (real[u]) real[u] = tokens.is_real<A::any>(call, on_turn<A>(u, i));
    }
    UNROLL
    for (int u = 0; u < A::ahead; ++u) {
        raw[u] = {};
        if (real[u])
            raw[u] = A::template load<last>(call, piece.e.g, piece.begin + on_turn<A>(u, i));
    }
}

template <class Access> DEVICE double squares_of_gradient(const Call& call, const Piece& piece) {
    const Tokens tokens(call, piece);
    double sum = 0;
    each_of(piece, Access(), [&](auto access, int i, int end) {
        using A = decltype(access);
        typename A::Raw raw[A::ahead];
        load_gradient<A, false>(call, piece, tokens, i, end, raw);
        UNROLL
        for (int u = 0; u < A::ahead; ++u) {
            float g[A::count];
            A::get(raw[u], g);
            UNROLL
            for (int j = 0; j < A::count; ++j) sum += square(g[j]);
        }
    });
    return sum;
}

// Calls use(access, l, y): y are the elements from l on of x + b * step.
template <class Access, bool last, Norm norm, bool from_x, bool random, class T, class Use>
DEVICE void move(const Call& call, const Piece& piece, T factor, Use use) {
    const Entry& e = piece.e;
    const Tokens tokens(call, piece);
    const RoundKeys keys(static_cast<uint64_t>(call.seed ? *call.seed : call.seed_value));
    each_of(piece, Access(), [&](auto access, int i, int end) {
        using A = decltype(access);
        constexpr int n = A::count;
        typename A::Raw of_g[A::ahead], of_x[A::ahead] = {};
        load_gradient<A, last>(call, piece, tokens, i, factor > 0 ? end : 0, of_g);
        UNROLL
        for (int u = 0; u < A::ahead; ++u)
            if (from_x && on_turn<A>(u, i) < end)
                of_x[u] = A::template load<last>(call, e.x, piece.begin + on_turn<A>(u, i));
        UNROLL
        for (int u = 0; u < A::ahead; ++u) {
            if (on_turn<A>(u, i) >= end) continue;
            const int64_t at = piece.begin + on_turn<A>(u, i);
            float g[n], x[n];
            T y[n];
            A::get(of_g[u], g), A::get(of_x[u], x);
            UNROLL
            for (int j = 0; j < n; ++j) y[j] = step_along<norm, T>(g[j], factor);
            if constexpr (random) {
                UNROLL
                for (int j = 0; j < n; j += 4) {
                    const FourWords words = philox(static_cast<uint64_t>(at + j) / 4, call.step,
                                                   static_cast<uint32_t>(e.stream), keys);
                    if constexpr (n == 1) {
                        const uint32_t lower = at & 1 ? words.at[1] : words.at[0],
                                       upper = at & 1 ? words.at[3] : words.at[2];
                        y[0] = uegr::kept(y[0], at & 2 ? upper : lower, call.limit);
                    } else {
                        UNROLL
                        for (int i = 0; i < 4; ++i)
                            y[j + i] = uegr::kept(y[j + i], words.at[i], call.limit);
                    }
                }
            }
            if constexpr (from_x) {
                UNROLL
                for (int j = 0; j < n; ++j) y[j] = static_cast<T>(x[j]) + y[j];
            }
            use(access, at, y);
        }
    });
}
template <class Access>
DEVICE double squares_of_moved(const Call& call, const Piece& piece, double factor) {
    double sum = 0;
    auto add = [&](auto access, int64_t, const auto& y) {
        UNROLL
        for (int j = 0; j < decltype(access)::count; ++j) sum += square(y[j]);
    };
    move<Access, false, Norm::l2, true, false>(call, piece, factor, add);
    return sum;
}

// Of a multiprocessor, for the loads under way; the generator's keys take registers too.
template <class Access, bool random>
constexpr int blocks_at_once = Access::count == 1 ? 2
                               : random           ? 3
                                                  : 4;

template <class Access>
__global__ void __launch_bounds__(most_threads, blocks_at_once<Access, false>)
    squares(const __grid_constant__ Call call, int64_t first_piece, bool backwards) {
    __shared__ double room[warp_size];
    const Piece piece = piece_of_block(call, first_piece, backwards);
    const double sum = block_sum(squares_of_gradient<Access>(call, piece), room);
    if (threadIdx.x == 0) call.squares[piece.number] = sum;
}
template <class Access>
__global__ void __launch_bounds__(most_threads, blocks_at_once<Access, false>)
    moved_squares(const __grid_constant__ Call call, int64_t first_piece, bool backwards) {
    __shared__ double room[warp_size];
    const Piece piece = piece_of_block(call, first_piece, backwards);
    const double factor = call.direction_factors[piece.group],
                 sum = block_sum(squares_of_moved<Access>(call, piece, factor), room);
    if (threadIdx.x == 0) call.squares[piece.number] = sum;
}

// Writes a piece: the step itself in float where that will do, else x + b * step on the ball, whose
// factor is 1 where there is none.
template <class Access, Norm norm, bool from_x, bool random>
__global__ void __launch_bounds__(most_threads, blocks_at_once<Access, random>)
    take_step(const __grid_constant__ Call call, int64_t first_piece, bool backwards) {
    __shared__ double room[warp_size];
    const Piece piece = piece_of_block(call, first_piece, backwards);
    double factor, ball = 1;
    if (call.alone) {
        const double sum = block_sum(squares_of_gradient<Access>(call, piece), room);
        factor = direction_factor(sum, call.epsilon, norm);
    } else factor = call.direction_factors[piece.group];
    // A weight that does not move is left alone.
    if (from_x && !call.projects && factor == 0) return;
    if constexpr (from_x && !random && norm == Norm::l2) {
        if (call.projects && call.alone)
            ball = ball_factor(block_sum(squares_of_moved<Access>(call, piece, factor), room),
                               call.radius);
        else if (call.projects) ball = call.ball_factors[piece.group];
    }
    auto store = [&](auto access, int64_t l, const auto& y) {
        constexpr int n = decltype(access)::count;
        float result[n];
        UNROLL
        for (int j = 0; j < n; ++j) {
            if constexpr (from_x)
                result[j] = static_cast<float>(projected<norm, double>(y[j], ball, call.radius));
            else result[j] = static_cast<float>(y[j]);
        }
        access.store(call, piece.e.out, l, result);
    };
    if (!from_x && fits_float(factor))
        move<Access, true, norm, from_x, random>(call, piece, static_cast<float>(factor), store);
    else move<Access, true, norm, from_x, random>(call, piece, factor, store);
}

// The factor of each group from its pieces' sums, in their order; a warp for each, its lanes 32
// apart.
__global__ void __launch_bounds__(most_threads)
    find_factors(const __grid_constant__ Call call, bool of_ball) {
    const int64_t group =
        int64_t(blockIdx.x) * (most_threads / warp_size) + threadIdx.x / warp_size;
    if (group >= call.groups) return;
    const Entry& e = entry_of<&Entry::first_group>(call, group);
    const int64_t pieces = call.together ? call.pieces : e.pieces();
    const int64_t first = call.together ? 0 : e.first_piece + (group - e.first_group) * pieces;
    double total = 0;
    for (int64_t p = threadIdx.x % warp_size; p < pieces; p += warp_size)
        total += call.squares[first + p];
    total = warp_sum(total);
    if (threadIdx.x % warp_size != 0) return;
    if (of_ball) call.ball_factors[group] = ball_factor(total, call.radius);
    else call.direction_factors[group] = direction_factor(total, call.epsilon, call.norm);
}

// --- The host's side ---

using Kernel = void (*)(Call, int64_t first_piece, bool backwards);

// Entries that follow each other and share their launches, and the kernels for their dtype.
struct Run {
    Kernel squares, moved_squares, take_step;
    // elements that a thread asks for
    int64_t at_once;
    int64_t first_piece = 0, pieces = 0, longest = 0;
};

template <class Access> Run run_by(const Call& call, const Entry& e) {
    Kernel step;
    if (call.norm == Norm::linf)
        step = e.x.data      ? take_step<Access, Norm::linf, true, false>
               : call.random ? take_step<Access, Norm::linf, false, true>
                             : take_step<Access, Norm::linf, false, false>;
    else if (e.x.data)
        step = call.random ? take_step<Access, Norm::l2, true, true>
                           : take_step<Access, Norm::l2, true, false>;
    else
        step = call.random ? take_step<Access, Norm::l2, false, true>
                           : take_step<Access, Norm::l2, false, false>;
    return {squares<Access>, moved_squares<Access>, step, Access::count * Access::ahead,
            e.first_piece};
}

// Returns whether whole accesses of g's dtype cover an entry but for the ends of its pieces: all
// lists alike, at one place in 16 bytes, which does not cut what a counter of the generator serves,
// or a token.
bool is_whole(const Call& call, const Entry& e) {
    const int64_t past = reinterpret_cast<uintptr_t>(e.g.data) % 16, size = bytes_of(e.g.storage);
    auto alike = [&](const Slot& s) {
        return !s.data || (s.axes < 0 && s.storage == e.g.storage &&
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(s.data) % 16) == past);
    };
    if (!alike(e.g) || !alike(e.x) || !alike(e.out)) return false;
    if (call.random && past / size % 4 != 0) return false;
    return !call.mask.data || (call.mask.storage == Storage::boolean && call.mask.axes < 0 &&
                               past == 0 && call.token % (16 / size) == 0);
}
int access_of(const Call& call, const Entry& e) {
    return is_whole(call, e) ? static_cast<int>(e.g.storage) : -1;
}
Run run_of(const Call& call, const Entry& e) {
    switch (access_of(call, e)) {
    case static_cast<int>(Storage::float32): return run_by<Whole<Storage::float32>>(call, e);
    case static_cast<int>(Storage::bfloat16): return run_by<Whole<Storage::bfloat16>>(call, e);
    case static_cast<int>(Storage::float16): return run_by<Whole<Storage::float16>>(call, e);
    default: return run_by<One<true>>(call, e);
    }
}

void run(const Call& call, const std::vector<Entry>& entries, bool in_order, cudaStream_t stream) {
    std::vector<Run> runs;
    for (size_t i = 0; i < entries.size(); ++i) {
        const Entry& e = entries[i];
        if (i == 0 || in_order || access_of(call, e) != access_of(call, entries[i - 1]))
            runs.push_back(run_of(call, e));
        Run& run = runs.back();
        run.pieces += e.groups() * e.pieces(), run.longest = maximum(run.longest, e.length);
    }
    auto launch_all = [&](Kernel Run::* kernel, bool backwards) {
        for (size_t r = 0; r < runs.size(); ++r) {
            const Run& run = runs[backwards && !in_order ? runs.size() - 1 - r : r];
            // of a short group that is alone no more threads than have a part of it
            const int64_t wanted = (run.longest + run.at_once - 1) / run.at_once,
                          warps = (wanted + warp_size - 1) / warp_size;
            const int64_t threads = minimum<int64_t>(warps * warp_size, most_threads);
            for (int64_t done = 0; done < run.pieces; done += most_blocks) {
                const int64_t pieces = minimum(most_blocks, run.pieces - done),
                              begin = backwards ? run.pieces - done - pieces : done;
                launch(run.*kernel, {pieces, static_cast<int>(threads)}, stream, call,
                       run.first_piece + begin, backwards);
            }
        }
    };
    const bool on_ball = call.projects && call.norm == Norm::l2;
    if (!call.alone) {
        constexpr int at_once = most_threads / warp_size;
        const Shape groups{(call.groups + at_once - 1) / at_once, most_threads};
        launch_all(&Run::squares, false);
        launch(find_factors, groups, stream, call, false);
        if (on_ball) {
            launch_all(&Run::moved_squares, true);
            launch(find_factors, groups, stream, call, true);
        }
    }
    launch_all(&Run::take_step, !on_ball);
}

} // namespace

static void perturb(const PerturbationArguments& arguments, const Tensor& like) {
    Call call;
    call.norm = arguments.norm, call.epsilon = arguments.epsilon, call.radius = arguments.radius;
    call.projects = arguments.projects, call.together = arguments.together;
    call.random = arguments.random, call.step = arguments.step, call.limit = arguments.limit;
    call.seed = arguments.seed_on_gpu, call.seed_value = arguments.seed;
    AxesTable table;
    call.mask = table.slot(arguments.mask), call.token = arguments.token;
    std::vector<Entry> entries;
    for (const PerturbedTensor& t : arguments.tensors)
        entries.push_back({table.slot(t.g), table.slot(t.x), table.slot(t.out), t.size, t.length, 0,
                           0, t.stream});
    if (!arguments.in_order)
        std::stable_sort(entries.begin(), entries.end(), [&](const Entry& a, const Entry& b) {
            return access_of(call, a) < access_of(call, b);
        });
    call.alone = !call.together || entries.size() == 1;
    for (Entry& e : entries) {
        e.first_piece = call.pieces, e.first_group = call.groups;
        call.pieces += e.groups() * e.pieces(), call.groups += e.groups();
        call.alone &= e.pieces() == 1;
    }
    call.count = static_cast<int>(entries.size());
    const DeviceGuard device(like);
    const DeviceTable<Entry> on_device = upload_table(entries, table.axes, like, device.stream);
    call.entries = on_device.entries, call.axes = on_device.axes;
    const int64_t kept = call.alone ? 0 : call.pieces + 2 * call.groups;
    Tensor sums = torch::stable::new_empty(like, {kept}, ScalarType::Double);
    if (!call.alone) {
        call.squares = static_cast<double*>(sums.mutable_data_ptr());
        call.direction_factors = call.squares + call.pieces,
        call.ball_factors = call.direction_factors + call.groups;
    }
    run(call, entries, arguments.in_order, device.stream);
}

} // namespace uegr
