// The pool behind threads.h. Its threads look for work for some microseconds after the last, then sleep.

#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kLooks = 4000;  // before a thread sleeps: some 50 microseconds
constexpr int kBits = 20;     // of a piece's number
constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

class Pool {
  public:
    void run(RunPiece run, const void* context, int64_t pieces, int32_t threads) {
        std::unique_lock<std::mutex> only(callers_, std::try_to_lock);
        if (!only) {
            for (int64_t piece = 0; piece < pieces; ++piece) run(context, piece);
            return;
        }
        for (; helpers_ < threads - 1; ++helpers_) std::thread([this] { help(); }).detach();
        run_ = run;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> 2 * kBits) + 1;
        ticket_.store(loop << 2 * kBits | static_cast<uint64_t>(pieces) << kBits);
        if (sleeping_.load() > 0) {
            const std::lock_guard<std::mutex> guard(sleep_);
            wake_.notify_all();
        }
        while (take()) {
        }
        for (int look = 0; done_.load(std::memory_order_acquire) < pieces; ++look) {
            if (look < kLooks) {
                pause();
                continue;
            }
            // Sleeping frees this core for the thread that is held up.
            std::unique_lock<std::mutex> guard(sleep_);
            waiting_.store(true);
            end_.wait(guard, [&] { return done_.load() >= pieces; });
            waiting_.store(false);
        }
    }

  private:
    // Runs one piece, if one is left. What is read of a loop after its number was taken is of that loop: it cannot end
    // before this piece has.
    bool take() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if ((ticket & kMask) >= (ticket >> kBits & kMask)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                                std::memory_order_acquire));
        run_(context_, static_cast<int64_t>(ticket & kMask));
        done_.fetch_add(1);
        if (waiting_.load()) {
            const std::lock_guard<std::mutex> guard(sleep_);
            end_.notify_one();
        }
        return true;
    }

    bool has_work() const {
        const uint64_t ticket = ticket_.load();
        return (ticket & kMask) < (ticket >> kBits & kMask);
    }

    void help() {
        for (;;) {
            for (int look = 0; look < kLooks; ++look) {
                if (take()) look = 0;
                pause();
            }
            std::unique_lock<std::mutex> guard(sleep_);
            ++sleeping_;
            wake_.wait(guard, [this] { return has_work(); });
            --sleeping_;
        }
    }

    std::mutex callers_, sleep_;
    std::condition_variable wake_, end_;
    std::atomic<uint64_t> ticket_{0};  // number of the loop, its pieces, the next piece
    std::atomic<int64_t> done_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> waiting_{false};
    int32_t helpers_ = 0;
    RunPiece run_ = nullptr;
    const void* context_ = nullptr;
};

Pool& pool() {
    static Pool* const one = new Pool;  // its threads live as long as the process
    return *one;
}

}  // namespace

extern "C" void loramux_run_pieces(RunPiece run, const void* context, int64_t pieces, int32_t threads) {
    pool().run(run, context, pieces, threads);
}
