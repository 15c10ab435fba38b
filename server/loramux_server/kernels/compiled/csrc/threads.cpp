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

constexpr int kLooks = 4000;    // before a thread sleeps: some 50 microseconds
constexpr int kBits = 20;       // of a piece's number
constexpr int32_t kMost = 128;  // threads
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
        threads = threads < 1 ? 1 : threads > kMost ? kMost : threads;
        for (; helpers_ < threads - 1; ++helpers_) std::thread([this, own = helpers_ + 1] { help(own); }).detach();
        run_ = run;
        context_ = context;
        done_.store(0, std::memory_order_relaxed);
        ++loop_;
        parts_.store(threads);
        for (int32_t part = 0; part < threads; ++part) {
            const Share share = share_of(pieces, part, threads);
            left_[part].pieces.store(Left{loop_, share.begin, share.end}.packed());
        }
        if (sleeping_.load() > 0) {
            const std::lock_guard<std::mutex> guard(sleep_);
            wake_.notify_all();
        }
        while (take(0)) {
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
    // Pieces of one thread's part that nobody has taken: [begin, end) of loop `loop`.
    struct Left {
        uint64_t loop;
        int64_t begin, end;

        uint64_t packed() const {
            return loop << 2 * kBits | static_cast<uint64_t>(begin) << kBits | static_cast<uint64_t>(end);
        }

        static Left of(uint64_t bits) {
            return {bits >> 2 * kBits, static_cast<int64_t>(bits >> kBits & kMask), static_cast<int64_t>(bits & kMask)};
        }
    };

    // Runs one piece, if one is left: the next of the own part, or the last of another's. What is read of a loop after
    // one of its pieces was taken is of that loop: it cannot end before this piece has.
    bool take(int32_t own) {
        const int32_t parts = parts_.load(std::memory_order_relaxed);
        uint64_t loop = 0;  // of the own part: others get theirs a moment sooner or later, and are not helped before
        for (int32_t n = 0; own < parts && n < parts; ++n) {
            const int32_t part = (own + n) % parts;
            std::atomic<uint64_t>& pieces = left_[part].pieces;
            uint64_t bits = pieces.load(std::memory_order_acquire);
            for (;;) {
                Left left = Left::of(bits);
                if (n == 0) loop = left.loop;
                if (left.begin >= left.end || left.loop != loop) break;
                const int64_t piece = part == own ? left.begin++ : --left.end;
                if (!pieces.compare_exchange_weak(bits, left.packed(), std::memory_order_acq_rel,
                                                  std::memory_order_acquire))
                    continue;
                run_(context_, piece);
                done_.fetch_add(1);
                if (waiting_.load()) {
                    const std::lock_guard<std::mutex> guard(sleep_);
                    end_.notify_one();
                }
                return true;
            }
        }
        return false;
    }

    bool has_work(int32_t own) const {
        const int32_t parts = parts_.load();
        for (int32_t part = 0; own < parts && part < parts; ++part) {  // others are not of this loop
            const Left left = Left::of(left_[part].pieces.load());
            if (left.begin < left.end) return true;
        }
        return false;
    }

    void help(int32_t own) {
        for (;;) {
            for (int look = 0; look < kLooks; ++look) {
                if (take(own)) look = 0;
                pause();
            }
            std::unique_lock<std::mutex> guard(sleep_);
            ++sleeping_;
            wake_.wait(guard, [this, own] { return has_work(own); });
            --sleeping_;
        }
    }

    std::mutex callers_, sleep_;
    std::condition_variable wake_, end_;
    struct alignas(64) Part {
        std::atomic<uint64_t> pieces{0};  // Left
    };
    Part left_[kMost];  // by thread, the caller's first
    std::atomic<int32_t> parts_{1};
    uint64_t loop_ = 0;
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
