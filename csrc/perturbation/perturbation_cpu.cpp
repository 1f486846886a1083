// The perturbing operators on the CPU: sums and loop. The formulas are perturbation.h's, the checks
// arguments.h's.
//
// A tensor is a row of groups that have one norm each (a sample, a token, all of it), a group a row
// of pieces of a fixed size. Sums of squares are taken by piece and added in the pieces' order, so
// that threads do not show.
#include <algorithm>
#include <numeric>
#include <vector>

#include "../core/tensor.h"
#include "arguments.h"
#include "perturbation.h"

namespace uegr {
namespace {

constexpr int64_t piece_size = 1 << 14;
// bytes that stay in a second-level cache from the norm to the step
constexpr int64_t cached_bytes = 1 << 20;
// elements that are worth a thread
constexpr int64_t thread_size = 1 << 14;

// One tensor of a call.
struct Entry : PerturbedTensor {
    int64_t first_piece = 0, first_group = 0;

    // of a group
    int64_t pieces() const { return (length + piece_size - 1) / piece_size; }
    bool is_double() const {
        return g.storage == Storage::float64 || out.storage == Storage::float64 ||
               (x.data && x.storage == Storage::float64);
    }
};

struct Piece {
    const Entry& e;
    int64_t group, begin, end;
};

struct Call {
    const PerturbationArguments& arguments;
    // the mask, where there is one
    std::vector<uint8_t> real;
    std::vector<Entry> entries;
    int64_t pieces = 0, groups = 0, size = 0;
    // by piece; by group
    std::vector<double> squares, direction_factors, ball_factors;

    explicit Call(const PerturbationArguments& arguments) : arguments(arguments) {
        for (const PerturbedTensor& t : arguments.tensors) {
            Entry e;
            static_cast<PerturbedTensor&>(e) = t;
            e.first_piece = pieces, e.first_group = groups;
            pieces += e.groups() * e.pieces(), groups += e.groups(), size += e.size;
            entries.push_back(e);
            if (t.out.data != t.x.data) expect_large_pages(t.out, t.size);
        }
        if (!arguments.mask.data) return;
        const int64_t tokens = count_elements(arguments.mask, 0, arguments.mask.dim);
        real.resize(tokens);
        double values[block_size];
        for (int64_t begin = 0; begin < tokens; begin += block_size) {
            const int n = static_cast<int>(std::min<int64_t>(block_size, tokens - begin));
            load(arguments.mask, begin, n, values);
            std::transform(values, values + n, &real[begin], [](double x) { return x != 0; });
        }
    }
    Piece piece(int64_t p) const {
        const auto after =
            std::upper_bound(entries.begin(), entries.end(), p,
                             [](int64_t p, const Entry& e) { return p < e.first_piece; });
        const Entry& e = *(after - 1);
        const int64_t group = (p - e.first_piece) / e.pieces(),
                      within = (p - e.first_piece) % e.pieces() * piece_size;
        const int64_t begin = group * e.length + within;
        return {e, e.first_group + group, begin, begin + std::min(piece_size, e.length - within)};
    }
    double sum(int64_t first, int64_t count) const {
        double total = 0;
        for (int64_t p = first; p < first + count; ++p) total += squares[p];
        return total;
    }
};

// A sum over blocks, in a fixed order that vectorises.
struct Sum {
    static constexpr int lanes = 32;
    double sums[lanes] = {};

    template <class F> void add_block(F f) {
        for (int i = 0; i < block_size; i += lanes)
            for (int j = 0; j < lanes; ++j) sums[j] += f(i + j);
    }
    double total() const { return std::accumulate(sums, sums + lanes, 0.0); }
};

// A thread at work on pieces of a dtype's arithmetic.
template <class T> struct Worker {
    const Call& call;
    RoundKeys keys;
    alignas(64) T g[block_size], x[block_size], out[block_size];
    alignas(64) uint32_t words[2 * block_size + 4] = {};

    explicit Worker(const Call& call)
        : call(call), keys(static_cast<uint64_t>(call.arguments.seed)) {}

    // Tells whether the mask hides one of g's elements [begin, begin + n).
    bool hides_some(int64_t begin, int n) const {
        if (call.real.empty()) return false;
        const int64_t token = call.arguments.token;
        const auto first = call.real.begin() + begin / token;
        const auto last = call.real.begin() + (begin + n - 1) / token + 1;
        return std::find(first, last, 0) != last;
    }

    // Calls use(element), element(i) being g's element begin + i, 0 where the mask hides it.
    template <class Use> void gradient(const Entry& e, int64_t begin, int n, Use use) {
        if (!hides_some(begin, n)) return read_block(e.g, begin, n, g, use);
        load_block(e.g, begin, n, g);
        const int64_t token = call.arguments.token;
        for (int64_t t = begin / token; t * token < begin + n; ++t) {
            if (call.real[t]) continue;
            const int64_t from = std::max(t * token - begin, int64_t(0)),
                          to = std::min((t + 1) * token - begin, int64_t(n));
            std::fill(g + from, g + to, T(0));
        }
        const T* from = g;
        use([=](int i) { return from[i]; });
    }

    template <class Block> static void blocks(const Piece& piece, Block block) {
        for (int64_t begin = piece.begin; begin < piece.end; begin += block_size)
            block(begin, static_cast<int>(std::min<int64_t>(block_size, piece.end - begin)));
    }

    double gradient_squares(const Piece& piece) {
        Sum sum;
        blocks(piece, [&](int64_t begin, int n) {
            prefetch_block(piece.e.g, begin + 4 * block_size);
            gradient(piece.e, begin, n, [&](auto element) {
                sum.add_block([=](int i) { return square(element(i)); });
            });
        });
        return sum.total();
    }

    // Calls use(begin, n, f): f(i) is element begin + i of x + b * step, in double; in T where that
    // will do: without x; and with one of 16 bits, where a float's rounding is small beside the
    // result's but for sums that cancel, and a step that fits cannot make a float overflow.
    template <Norm norm, class Use> void move(const Piece& piece, Use use) {
        const double factor = call.direction_factors[piece.group];
        const View& x = piece.e.x;
        const bool in_float =
            fits_float(factor) &&
            (!x.data || (bytes_of(x.storage) == 2 && fits_float(call.arguments.epsilon)));
        auto by = [&](auto factor) {
            if (call.arguments.random) move_by<norm, true>(piece, factor, use);
            else move_by<norm, false>(piece, factor, use);
        };
        if (in_float) by(static_cast<T>(factor));
        else by(factor);
    }

    // Not part of its callers: among their branches the compiler takes its loops for cold ones, and
    // leaves them scalar.
    template <Norm norm, bool random, class Factor, class Use>
    [[gnu::noinline]] void move_by(const Piece& piece, Factor factor, Use use) {
        const Entry& e = piece.e;
        const int32_t limit = call.arguments.limit;
        blocks(piece, [&](int64_t begin, int n) {
            const uint32_t* drawn = words;
            if constexpr (random)
                drawn = element_words(words, begin, n, {e.stream, 0, e.size, e.size},
                                      call.arguments.step, keys);
            gradient(e, begin, n, [&](auto along) {
                auto step = [=](int i) {
                    const Factor whole = step_along<norm, Factor>(along(i), factor);
                    if constexpr (random) return kept(whole, drawn[i], limit);
                    else return whole;
                };
                if (!e.x.data) return use(begin, n, step);
                read_block(e.x, begin, n, x, [&](auto from) {
                    use(begin, n, [=](int i) { return from(i) + step(i); });
                });
            });
        });
    }

    template <Norm norm> double moved_squares(const Piece& piece) {
        Sum sum;
        move<norm>(piece, [&](int64_t, int, auto element) {
            sum.add_block([=](int i) { return square(element(i)); });
        });
        return sum.total();
    }

    template <Norm norm> void write(const Piece& piece) {
        const View& to = piece.e.out;
        const double factor = call.ball_factors[piece.group], radius = call.arguments.radius;
        // A weight that does not move is left alone.
        if (!call.arguments.projects && to.data == piece.e.x.data &&
            call.direction_factors[piece.group] == 0)
            return;
        move<norm>(piece, [&](int64_t begin, int n, auto element) {
            auto project = [&](auto factor, auto radius) {
                write_block(to, begin, n, out, [=](int i) {
                    return projected<norm, decltype(factor)>(element(i), factor, radius);
                });
            };
            using Element = decltype(element(0));
            if (!call.arguments.projects) write_block(to, begin, n, out, element);
            else if (fits_float(factor) && fits_float(radius))
                project(static_cast<Element>(factor), static_cast<Element>(radius));
            else project(factor, radius);
        });
    }
};

template <Norm norm> void run(Call& call) {
    call.squares.resize(call.pieces), call.direction_factors.resize(call.groups),
        call.ball_factors.resize(call.groups, 1);
    const bool projects = call.arguments.projects && norm == Norm::l2;

    struct Thread {
        Worker<float> single;
        Worker<double> wide;
        explicit Thread(const Call& call) : single(call), wide(call) {}
    };
    // Calls f(thread, i) for i in [first, last).
    auto parallel = [&](int64_t first, int64_t last, auto f) {
        const int64_t grain = std::max<int64_t>(1, thread_size * (last - first) / call.size);
        torch::stable::parallel_for(first, last, grain, [&](int64_t begin, int64_t end) {
            Thread thread(call);
            for (int64_t i = begin; i < end; ++i) f(thread, i);
        });
    };
    auto by_dtype = [&](Thread& thread, int64_t p, auto f) {
        const Piece piece = call.piece(p);
        if (piece.e.is_double()) f(thread.wide, piece);
        else f(thread.single, piece);
    };
    auto sum_gradient = [&](Thread& thread, int64_t p) {
        by_dtype(thread, p, [&](auto& worker, const Piece& piece) {
            call.squares[p] = worker.gradient_squares(piece);
        });
    };
    auto sum_moved = [&](Thread& thread, int64_t p) {
        by_dtype(thread, p, [&](auto& worker, const Piece& piece) {
            call.squares[p] = worker.template moved_squares<norm>(piece);
        });
    };
    auto write = [&](Thread& thread, int64_t p) {
        by_dtype(thread, p,
                 [&](auto& worker, const Piece& piece) { worker.template write<norm>(piece); });
    };
    auto direct = [&](int64_t group, double squares) {
        call.direction_factors[group] = direction_factor(squares, call.arguments.epsilon, norm);
    };
    auto shrink = [&](int64_t group, double squares) {
        call.ball_factors[group] = ball_factor(squares, call.arguments.radius);
    };

    const Entry& first = call.entries[0];
    if (call.entries.size() == 1 && first.length * bytes_of(first.g.storage) <= cached_bytes &&
        call.groups >= static_cast<int64_t>(torch::stable::get_num_threads())) {
        // every group on its own, while it is in cache
        const int64_t pieces = first.pieces();
        parallel(0, call.groups, [&](Thread& thread, int64_t group) {
            auto each = [&](auto f) {
                for (int64_t p = group * pieces; p < (group + 1) * pieces; ++p) f(thread, p);
            };
            each(sum_gradient), direct(group, call.sum(group * pieces, pieces));
            if (projects) each(sum_moved), shrink(group, call.sum(group * pieces, pieces));
            each(write);
        });
        return;
    }
    auto settle = [&](auto set) {
        const double all = call.arguments.together ? call.sum(0, call.pieces) : 0;
        for (const Entry& e : call.entries)
            for (int64_t i = 0; i < e.groups(); ++i)
                set(e.first_group + i, call.arguments.together
                                           ? all
                                           : call.sum(e.first_piece + i * e.pieces(), e.pieces()));
    };
    parallel(0, call.pieces, sum_gradient), settle(direct);
    if (projects) parallel(0, call.pieces, sum_moved), settle(shrink);
    if (!call.arguments.in_order) return parallel(0, call.pieces, write);
    for (const Entry& e : call.entries)
        parallel(e.first_piece, e.first_piece + e.groups() * e.pieces(), write);
}

} // namespace

static void perturb(const PerturbationArguments& arguments, const Tensor&) {
    Call call(arguments);
    if (arguments.norm == Norm::l2) run<Norm::l2>(call);
    else run<Norm::linf>(call);
}

} // namespace uegr
