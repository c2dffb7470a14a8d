// One pool of threads for all kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>

namespace bitwright {

// Runs work(thread, used) once on each of `used` <= threads threads at the same time; the caller is thread 0. Fewer
// than asked run while another caller has the pool (then used is 1). An exception of any thread is thrown here.
void run_threads(int threads, const std::function<void(int thread, int used)>& work);

// Runs work(begin, end, thread) over [0, count) in chunks of `grain`, each taken by the next free thread; thread is
// below `threads` and names scratch space of its own. One chunk, or one thread, runs here without the pool.
void parallel_for(size_t count, size_t grain, int threads,
                  const std::function<void(size_t begin, size_t end, int thread)>& work);

// Parts [begin, end) of [0, count), one per thread and equal but for one, for work that is known to be even.
void parallel_parts(size_t count, int threads, const std::function<void(size_t begin, size_t end)>& work);

// Where the threads of one run_threads meet: nobody passes before all have come. Waits by spinning, so it is meant
// for phases of microseconds.
class Barrier {
   public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

   private:
    const int threads_;
    std::atomic<int> arrived_{0}, phase_{0};
};

}  // namespace bitwright
