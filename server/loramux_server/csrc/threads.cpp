// The pool of threads is the adapters' library's; this one is told of it when it is loaded (kernels.py).

#include "threads.h"

namespace {

decltype(&loramux_run_pieces) shared = nullptr;

}  // namespace

extern "C" {

void loramux_use_pool(void* run_pieces) { shared = reinterpret_cast<decltype(&loramux_run_pieces)>(run_pieces); }

void loramux_run_pieces(RunPiece run, const void* context, int64_t pieces, int32_t threads) {
    if (shared) return shared(run, context, pieces, threads);
    for (int64_t piece = 0; piece < pieces; ++piece) run(context, piece);
}

}  // extern "C"
