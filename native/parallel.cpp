#include "parallel.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitwright {

namespace {

constexpr int kSpins = 1000;  // looks at a flag before a thread sleeps: tens of microseconds, the gap between layers

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Threads that wait for work between calls: waking one takes a fraction of the time of starting one. A pool lives as
// long as its process; a process made by fork, which has none of its parent's threads, makes its own.
class Pool {
   public:
    // One caller at a time.
    void run(int count, const std::function<void(int, int)>& work) {
        while (size_ + 1 < count) {
            std::thread([this, index = ++size_] { serve(index); }).detach();
            ++awaited_;
        }
        while (ready_.load() < awaited_) std::this_thread::yield();
        work_ = &work;
        count_ = count;
        error_ = nullptr;
        remaining_.store(size_);
        turn_.fetch_add(1);
        turn_.notify_all();
        attempt(0);
        for (int spin = 0; spin < kSpins && remaining_.load() != 0; ++spin) pause();
        for (int left = remaining_.load(); left != 0; left = remaining_.load()) remaining_.wait(left);
        if (error_) std::rethrow_exception(error_);
    }

   private:
    void attempt(int index) {
        try {
            (*work_)(index, count_);
        } catch (...) {
            std::lock_guard<std::mutex> lock(error_lock_);
            if (!error_) error_ = std::current_exception();
        }
    }
    void serve(int index) {
        uint64_t turn = turn_.load();
        ready_.fetch_add(1);
        for (;;) {
            for (int spin = 0; spin < kSpins && turn_.load(std::memory_order_relaxed) == turn; ++spin) pause();
            turn_.wait(turn);
            ++turn;
            if (index < count_) attempt(index);
            if (remaining_.fetch_sub(1) == 1) remaining_.notify_all();
        }
    }
    int size_ = 0, awaited_ = 0, count_ = 0;
    const std::function<void(int, int)>* work_ = nullptr;
    std::exception_ptr error_;
    std::mutex error_lock_;
    std::atomic<uint64_t> turn_{0};
    std::atomic<int> remaining_{0}, ready_{0};
};

}  // namespace

void run_threads(int threads, const std::function<void(int, int)>& work) {
    static std::mutex busy;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::unique_lock<std::mutex> lock(busy, std::defer_lock);
    if (threads <= 1 || !lock.try_lock()) return work(0, 1);
    if (owner != getpid()) pool = new Pool, owner = getpid();
    pool->run(threads, work);
}

void parallel_for(size_t count, size_t grain, int threads, const std::function<void(size_t, size_t, int)>& work) {
    if (count == 0) return;
    grain = std::max<size_t>(grain, 1);
    const size_t chunks = (count - 1) / grain + 1;
    const int used = static_cast<int>(std::min<size_t>(static_cast<size_t>(std::max(threads, 1)), chunks));
    if (used == 1) return work(0, count, 0);
    std::atomic<size_t> next{0};
    run_threads(used, [&](int thread, int) {
        for (size_t chunk = next.fetch_add(1); chunk < chunks; chunk = next.fetch_add(1))
            work(chunk * grain, std::min(count, chunk * grain + grain), thread);
    });
}

void parallel_parts(size_t count, int threads, const std::function<void(size_t, size_t)>& work) {
    const size_t most = std::min(static_cast<size_t>(std::max(threads, 1)), std::max<size_t>(count, 1));
    run_threads(static_cast<int>(most), [&](int thread, int used) {
        const size_t at = static_cast<size_t>(thread), parts = static_cast<size_t>(used);
        const size_t each = count / parts, longer = count % parts;
        const size_t begin = at * each + std::min(at, longer);
        work(begin, begin + each + (at < longer ? 1 : 0));
    });
}

void Barrier::wait() {
    const int phase = phase_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
        arrived_.store(0);
        phase_.fetch_add(1);
        return;
    }
    for (int spin = 0; phase_.load() == phase; ++spin) {
        if (spin < 64 * kSpins) pause();
        else std::this_thread::yield();
    }
}

}  // namespace bitwright
