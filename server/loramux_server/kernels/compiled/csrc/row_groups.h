// Rows in groups that share what is read: a product's rows are split into as few groups as fit, of nearly equal size, so
// that none is left with few.

#pragma once

#include <cstdint>
#include <type_traits>

namespace {

// body(std::integral_constant<int, count>) for a count from 1 to Most.
template <int Most, class Body>
inline void with_count(int64_t count, const Body& body) {
    if constexpr (Most > 1) {
        if (count < Most) return with_count<Most - 1>(count, body);
    }
    body(std::integral_constant<int, Most>{});
}

// body(count, first row, groups that are left with this one) for each group of at most Most rows.
template <int Most, class Body>
inline void for_row_groups(int64_t rows, const Body& body) {
    int64_t first = 0;
    for (int64_t left = (rows + Most - 1) / Most; left > 0; --left) {
        const int64_t count = (rows - first) / left;
        with_count<Most>(count, [&](auto size) { body(size, first, left); });
        first += count;
    }
}

}  // namespace
