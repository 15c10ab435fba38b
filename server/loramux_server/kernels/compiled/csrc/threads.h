// Loops in pieces, on the threads of one pool.
//
// Whoever calls takes pieces too, and never waits for a thread that has not begun: where other work keeps a core busy,
// a loop takes as long as the cores that are left need. With OpenMP every loop waits for all its threads, and a step of a
// model is some hundreds of loops. A loop's pieces are parted among the threads in their order, and only who is done with
// its own part helps another: so a core finds in its cache what it read or wrote in the loop before.

#pragma once

#include <cstdint>

extern "C" {

using RunPiece = void (*)(const void* context, int64_t piece);

// Runs all pieces and returns when they are done; other callers meanwhile run theirs alone. Fewer than 2^20 pieces.
void loramux_run_pieces(RunPiece run, const void* context, int64_t pieces, int32_t threads);

}  // extern "C"

namespace {

// body(piece) for each piece; in which order and on which thread is left open.
template <class Body>
void in_pieces(int64_t pieces, int32_t threads, const Body& body) {
    if (threads <= 1 || pieces <= 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) body(piece);
        return;
    }
    const auto run = [](const void* context, int64_t piece) { (*static_cast<const Body*>(context))(piece); };
    loramux_run_pieces(run, &body, pieces, threads);
}

struct Share {
    int64_t begin, end;
};

// One piece of `count` things that are split into nearly equal pieces.
inline Share share_of(int64_t count, int64_t piece, int64_t pieces) {
    return {count * piece / pieces, count * (piece + 1) / pieces};
}

// Into how many pieces `count` things go that take so many operations together: pieces of 10 to 50 microseconds, but a
// few for each thread, so that one that is held up leaves little to the others.
inline int64_t pieces_of(int64_t count, int64_t operations, int32_t threads) {
    constexpr int64_t kOperations = 4 << 20;
    int64_t pieces = operations / kOperations;
    if (pieces < 4 * threads) pieces = 4 * threads;
    if (pieces > 1 << 10) pieces = 1 << 10;
    return pieces < count ? pieces : count;
}

}  // namespace
