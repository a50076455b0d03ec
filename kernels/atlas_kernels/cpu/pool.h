// A small thread pool. The caller works too, and waits only for threads that took a piece: a thread that the machine
// does not run holds nobody up.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <pthread.h>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized" // gcc 12 complains of its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace atlas {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// Denormal numbers are slow on some machines and worth nothing here: while one of these lives they are zero.
class NoDenormals {
public:
#if defined(__x86_64__)
    NoDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
    ~NoDenormals() { _mm_setcsr(saved_); }
    NoDenormals(const NoDenormals &) = delete;
    NoDenormals &operator=(const NoDenormals &) = delete;

private:
    unsigned saved_;
#else
    NoDenormals() {}
#endif
};

using Work = void (*)(void *context, int64_t piece);

class Pool {
public:
    // Runs work(context, i) for i in [0, pieces) on up to `threads` threads, this one among them; returns when all are
    // done. When another call has the pool, this thread does everything.
    void run(Work work, void *context, int64_t pieces, int threads) {
        if (threads > kMost) threads = kMost;
        if (threads > pieces) threads = static_cast<int>(pieces);
        if (threads <= 1 || !owner_.try_lock()) {
            NoDenormals guard;
            for (int64_t i = 0; i < pieces; ++i) work(context, i);
            return;
        }
        std::lock_guard<std::mutex> owned(owner_, std::adopt_lock);
        open(work, context, pieces, threads);
        take();
        close();
    }

private:
    static constexpr int kMost = 256;
    static constexpr int kSpins = 400; // some 10 us, the gap between two layers; then it sleeps

    void open(Work work, void *context, int64_t pieces, int threads) {
        bool asleep;
        {
            std::lock_guard<std::mutex> hold(state_);
            while (workers_ < threads - 1 && start()) ++workers_;
            work_ = work;
            context_ = context;
            pieces_ = pieces;
            next_.store(0, std::memory_order_relaxed);
            seats_ = threads - 1;
            generation_.fetch_add(1, std::memory_order_release);
            asleep = sleepers_ > 0;
        }
        if (asleep) wake_.notify_all();
    }

    // No thread enters after this; those inside are waited for.
    void close() {
        {
            std::lock_guard<std::mutex> hold(state_);
            seats_ = 0;
        }
        for (int spins = 0; inside_.load(std::memory_order_acquire) != 0; ++spins) {
            if (spins < kSpins) pause();
            else std::this_thread::yield();
        }
    }

    void take() {
        NoDenormals guard;
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) work_(context_, i);
    }

    bool start() {
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) {
            return false; // the limit of threads is reached: fewer do the work
        }
        return true;
    }

    void serve() {
        for (uint64_t seen = 0;;) {
            for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spins) pause();
            {
                std::unique_lock<std::mutex> hold(state_);
                ++sleepers_;
                wake_.wait(hold, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
                --sleepers_;
                seen = generation_.load(std::memory_order_relaxed);
                if (seats_ <= 0) continue; // came too late, or is not wanted
                --seats_;
                inside_.fetch_add(1, std::memory_order_relaxed);
            }
            take();
            inside_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex owner_; // held by the call that has the pool
    std::mutex state_; // guards what follows, but the atomics
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> inside_{0};
    Work work_ = nullptr;
    void *context_ = nullptr;
    int64_t pieces_ = 0;
    int workers_ = 0, sleepers_ = 0, seats_ = 0;
};

// Never destroyed: its threads may outlive main(). A forked child has none of them and starts with a new pool in the
// same place, since the old one's locks may be held by threads that are not there.
inline Pool &pool() {
    alignas(Pool) static unsigned char place[sizeof(Pool)];
    static Pool *made = [] {
        pthread_atfork(nullptr, nullptr, [] { new (place) Pool; });
        return new (place) Pool;
    }();
    return *made;
}

} // namespace atlas
