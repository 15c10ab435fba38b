// Memory that is read soon, prefetched while a loop computes: a few cache lines at each of its steps.

#pragma once

#include <cstdint>

#include "buffer.h"
#include "threads.h"

struct Span {
    const char* at;
    int64_t bytes;
};

struct Reads {  // by one later loop, in the order of its pieces
    const Span* spans;
    int64_t count;
};

namespace {

constexpr int64_t kCacheLine = 64;

// One run of numbers, read by the loop that follows this one.
class RunPrefetch {
  public:
    // `steps`: how often step() is called.
    RunPrefetch(const uint16_t* begin, int64_t count, int64_t steps)
        : at_(begin), end_(begin + count), lines_((count / kNumbers + steps) / steps) {}

    void step() {
        for (int64_t n = 0; n < lines_ && at_ < end_; ++n, at_ += kNumbers) __builtin_prefetch(at_, 0, 2);
    }

  private:
    static constexpr int64_t kNumbers = kCacheLine / sizeof(uint16_t);
    const uint16_t *at_, *end_;
    int64_t lines_;  // at each step
};

// What later loops read: with many rows a loop keeps a core busy and leaves memory idle. The pieces of every loop go to
// the threads in the same order (threads.h), so a piece prefetches its own share of each later loop's memory: the core
// that prefetches is the one that reads.
class SharePrefetch {
  public:
    // What one piece of the loop prefetches, over so many steps.
    SharePrefetch(const Reads* reads, int64_t count, int64_t piece, int64_t pieces, int64_t steps) {
        if (steps <= 0) return;
        static thread_local Buffer<Span> buffer;
        int64_t most = 0, found = 0, lines = 0;
        for (const Reads* from = reads; from < reads + count; ++from) most += from->count;
        Span* spans = buffer.fit(most);
        for (const Reads* from = reads; from < reads + count; ++from) {
            int64_t bytes = 0, passed = 0;
            for (int64_t i = 0; i < from->count; ++i) bytes += from->spans[i].bytes;
            const Share share = share_of(bytes, piece, pieces);
            for (int64_t i = 0; i < from->count; passed += from->spans[i++].bytes) {
                const Span& span = from->spans[i];
                const int64_t begin = passed < share.begin ? share.begin - passed : 0;
                const int64_t end = span.bytes < share.end - passed ? span.bytes : share.end - passed;
                if (begin >= end) continue;
                spans[found++] = {span.at + begin, end - begin};
                lines += (end - begin) / kCacheLine + 1;
            }
        }
        lines_ = lines / steps + 1 < kMost ? lines / steps + 1 : kMost;
        next_ = spans;
        end_ = next_ + found;
        take();
    }

    void step() {
        for (int64_t n = 0; n < lines_; ++n) {
            if (at_ >= stop_) {
                take();
                if (at_ >= stop_) return;
            }
            __builtin_prefetch(at_, 0, 2);
            at_ += kCacheLine;
        }
    }

  private:
    void take() {
        if (next_ == end_) return;
        at_ = next_->at;
        stop_ = at_ + next_->bytes;
        ++next_;
    }

    static constexpr int64_t kMost = 32;  // lines at a step
    const Span *next_ = nullptr, *end_ = nullptr;
    int64_t lines_ = 0;
    const char *at_ = nullptr, *stop_ = nullptr;
};

}  // namespace
