// torch's parallel_for on plain threads, preloaded in the place of torch's own: ThreadSanitizer,
// which is to look at our loops, does not see the barriers of OpenMP.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t most_threads = 4;
thread_local bool within = false; // a loop inside of a loop is not divided again, as in torch
} // namespace

extern "C" int32_t torch_get_num_threads(uint32_t* threads) {
    *threads = within ? 1 : most_threads;
    return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*part)(int64_t, int64_t, void*), void* context) {
    if (begin >= end) return 0;
    const int64_t size = end - begin, least = std::max<int64_t>(grain, 1);
    const int64_t threads = within ? 1 : std::min(most_threads, (size + least - 1) / least),
                  each = (size + threads - 1) / threads;
    std::vector<std::thread> others;
    auto run = [=](int64_t first) {
        const bool before = within;
        within = true;
        part(first, std::min(end, first + each), context);
        within = before;
    };
    for (int64_t first = begin + each; first < end; first += each) others.emplace_back(run, first);
    run(begin);
    for (auto& other : others) other.join();
    return 0;
}
