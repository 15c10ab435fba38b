// Memory that grows and is not kept in order. No class of the standard library: see exact/compiled.h.

#pragma once

#include <cstdint>

namespace {

template <class Number>
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { __builtin_free(at_); }
    Number* fit(int64_t count) {
        if (count > size_) {
            __builtin_free(at_);
            at_ = static_cast<Number*>(__builtin_malloc((count + 16) * sizeof(Number)));
            if (!at_) __builtin_trap();
            size_ = count;
        }
        return at_;
    }

  private:
    Number* at_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace
