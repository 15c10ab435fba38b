// Memory that will be read soon. For the kernels of both packages.

#pragma once

#include <cstdint>

struct Span {
    const char* at;
    int64_t bytes;
};
