// Memory that will be read soon. For the kernels of both packages.

#pragma once

#include <cstdint>

struct Span {
    const char* at;
    int64_t bytes;
};

struct Reads {  // by one later loop, in the order of its pieces
    const Span* spans;
    int64_t count;
};
