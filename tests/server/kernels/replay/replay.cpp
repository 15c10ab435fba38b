// Makes recorded calls of the kernels again and compares every bit of what they write.
//
//     replay FILE [ISA...]      ISA: numbers of VectorIsa; none: all that the library has here
//
// tests/support/recorded_calls.py wrote the file and says what a recorded call is. This program is linked with the
// library as setup.py built it, for the processor of this machine or for another one, and needs no Python. A function
// that is new in the library needs one line in kFunctions.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "exact/exact.h"
#include "exact/training.h"
#include "kernels.h"
#include "vpdpwssd.h"

namespace {

using Numbers = std::vector<int64_t>;

template <class T>
T read_as(const void* at) {
    T value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

template <class T>
T as(int64_t bits) {
    return read_as<T>(&bits);  // the low bytes: both kinds of processor have them first
}

template <class Result, class... Arguments, size_t... At>
int64_t call_with(Result (*function)(Arguments...), const Numbers& arguments, std::index_sequence<At...>) {
    if constexpr (std::is_void_v<Result>) {
        function(as<Arguments>(arguments[At])...);
        return 0;
    } else {
        return static_cast<int64_t>(function(as<Arguments>(arguments[At])...));
    }
}

template <class Result, class... Arguments>
int64_t call(Result (*function)(Arguments...), const Numbers& arguments) {
    if (arguments.size() != sizeof...(Arguments)) return -1;
    return call_with(function, arguments, std::index_sequence_for<Arguments...>{});
}

struct Function {
    const char* name;
    int64_t (*call)(const Numbers& arguments);
};

#define FUNCTION(name) {#name, [](const Numbers& arguments) { return call(&name, arguments); }}

const Function kFunctions[] = {
    FUNCTION(loramux_convert_pairs),
    FUNCTION(loramux_copy_slot),
    FUNCTION(loramux_nf4_quantize),
    FUNCTION(loramux_nf4_scales),
    FUNCTION(loramux_nf4_squares),
    FUNCTION(loramux_exact_product),
    FUNCTION(loramux_exact_dense),
    FUNCTION(loramux_exact_pack_head),
    FUNCTION(loramux_exact_search),
    FUNCTION(loramux_exact_log_sums),
    FUNCTION(loramux_exact_first_tokens),
    FUNCTION(loramux_exact_draw),
    FUNCTION(loramux_exact_change),
    FUNCTION(loramux_exact_rms_norm),
    FUNCTION(loramux_exact_gate),
    FUNCTION(loramux_exact_softmax),
    FUNCTION(loramux_exact_attention),
    FUNCTION(loramux_exact_add_lora),
    FUNCTION(loramux_exact_experts),
    FUNCTION(loramux_exact_token_logits),
    FUNCTION(loramux_exact_angles),
    FUNCTION(loramux_exact_scratch),
    FUNCTION(loramux_exact_step),
    FUNCTION(loramux_exact_product_transposed),
    FUNCTION(loramux_exact_dense_transposed),
    FUNCTION(loramux_exact_matmul),
    FUNCTION(loramux_exact_norm_gradient),
    FUNCTION(loramux_exact_activation),
    FUNCTION(loramux_exact_gate_gradient),
    FUNCTION(loramux_exact_loss),
    FUNCTION(loramux_exact_attend),
    FUNCTION(loramux_exact_attend_gradient),
};

enum Kind : int64_t { kNumber, kAddress, kIsa };
struct Argument { int64_t kind, value, offset; };
struct BlockBefore { int64_t content, bytes; };
struct Pointer { int64_t block, offset, to_block, to_offset; };
struct After { int64_t block, content, float_bytes; };  // of a number, where the block holds fp32 or fp64; or 0

struct Call {
    std::string name;
    std::vector<Argument> arguments;
    std::vector<BlockBefore> blocks;
    std::vector<Pointer> pointers;
    std::vector<After> results;
    int64_t returned;

    bool takes_isa() const {
        for (const Argument& argument : arguments)
            if (argument.kind == kIsa) return true;
        return false;
    }
};

struct Recording {
    std::vector<std::string> contents;
    std::vector<Call> calls;
};

[[noreturn]] void fail(const std::string& why) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::exit(2);
}

class Reader {
  public:
    explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
        if (!file_) fail(std::string("cannot open ") + path);
    }
    ~Reader() { std::fclose(file_); }

    int64_t number() {
        int64_t value;
        read(&value, sizeof value);
        return value;
    }
    std::string text() {
        std::string content(static_cast<size_t>(number()), '\0');
        read(&content[0], content.size());
        char padding[8];
        read(padding, (8 - content.size() % 8) % 8);
        return content;
    }
    template <class Row>
    std::vector<Row> listed() {
        std::vector<Row> rows(static_cast<size_t>(number()));
        read(rows.data(), rows.size() * sizeof(Row));
        return rows;
    }
    Recording recording() {
        Recording all;
        for (int64_t left = number(); left > 0; --left) all.contents.push_back(text());
        for (int64_t left = number(); left > 0; --left) {
            Call call;
            call.name = text();
            call.arguments = listed<Argument>();
            call.blocks = listed<BlockBefore>();
            call.pointers = listed<Pointer>();
            call.results = listed<After>();
            call.returned = number();
            all.calls.push_back(call);
        }
        return all;
    }

  private:
    void read(void* to, size_t bytes) {
        if (bytes > 0 && std::fread(to, 1, bytes, file_) != bytes) fail("the recording is cut short");
    }
    std::FILE* file_;
};

constexpr int64_t kGuard = 64;  // bytes before and behind each block that nobody may write
constexpr char kGuardByte = '\x5a';

class Block {
  public:
    Block(const BlockBefore& before, const Recording& all)
        : bytes_(before.bytes), whole_((before.bytes + 3 * kGuard - 1) / kGuard * kGuard),
          memory_(static_cast<char*>(std::aligned_alloc(kGuard, whole_))) {
        std::memset(memory_, kGuardByte, whole_);
        if (before.content < 0) std::memset(at(), 0, bytes_);
        else std::memcpy(at(), all.contents[before.content].data(), bytes_);
    }
    Block(Block&& other) noexcept : bytes_(other.bytes_), whole_(other.whole_), memory_(other.memory_) {
        other.memory_ = nullptr;
    }
    ~Block() { std::free(memory_); }

    char* at() const { return memory_ + kGuard; }
    int64_t bytes() const { return bytes_; }
    bool is_guarded() const {
        for (int64_t i = 0; i < whole_; ++i)
            if ((i < kGuard || i >= kGuard + bytes_) && memory_[i] != kGuardByte) return false;
        return true;
    }

  private:
    int64_t bytes_, whole_;
    char* memory_;
};

bool is_nan(const char* at, int64_t float_bytes) {
    return float_bytes == 4 ? read_as<float>(at) != read_as<float>(at) : read_as<double>(at) != read_as<double>(at);
}

// Where they differ first; -1: nowhere. Two NaN are equal: which one an operation gives, IEEE 754 leaves open.
int64_t difference(const char* found, const std::string& expected, int64_t float_bytes) {
    const auto bytes = static_cast<int64_t>(expected.size());
    if (std::memcmp(found, expected.data(), bytes) == 0) return -1;
    for (int64_t i = 0; i < bytes; ++i)
        if (found[i] != expected[i]) {
            if (float_bytes == 0) return i;
            const int64_t at = i / float_bytes * float_bytes, end = at + float_bytes;
            if (end > bytes || !is_nan(found + at, float_bytes) || !is_nan(&expected[at], float_bytes)) return i;
            i = end - 1;
        }
    return -1;
}

// What is wrong, or empty.
std::string replay(const Call& recorded, const Recording& all, int32_t isa) {
    const Function* function = nullptr;
    for (const Function& each : kFunctions)
        if (recorded.name == each.name) function = &each;
    if (!function) return "is not in kFunctions of replay.cpp: add its line";
    std::vector<Block> blocks;
    for (const BlockBefore& before : recorded.blocks) blocks.emplace_back(before, all);
    const auto address = [&](int64_t block, int64_t offset) { return blocks[block].at() + offset; };
    for (const Pointer& pointer : recorded.pointers) {
        const char* to = address(pointer.to_block, pointer.to_offset);
        std::memcpy(address(pointer.block, pointer.offset), &to, sizeof to);
    }
    Numbers arguments;
    for (const Argument& argument : recorded.arguments)
        if (argument.kind == kIsa) arguments.push_back(isa);
        else if (argument.kind == kNumber) arguments.push_back(argument.value);
        else arguments.push_back(reinterpret_cast<int64_t>(address(argument.value, argument.offset)));
    if (function->call(arguments) != recorded.returned) return "returned something else";
    for (const Pointer& pointer : recorded.pointers) std::memset(address(pointer.block, pointer.offset), 0, 8);
    std::vector<const std::string*> expected;
    std::vector<int64_t> float_bytes(blocks.size());
    for (const BlockBefore& before : recorded.blocks)
        expected.push_back(before.content < 0 ? nullptr : &all.contents[before.content]);
    for (const After& after : recorded.results) {
        expected[after.block] = &all.contents[after.content];
        float_bytes[after.block] = after.float_bytes;
    }
    for (size_t block = 0; block < blocks.size(); ++block) {
        const std::string of = " block " + std::to_string(block) + " of " + std::to_string(blocks[block].bytes()) +
                               " bytes";
        if (!blocks[block].is_guarded()) return "wrote beside" + of;
        if (!expected[block]) continue;
        const int64_t at = difference(blocks[block].at(), *expected[block], float_bytes[block]);
        if (at >= 0) return "gives other bits in" + of + ", first at byte " + std::to_string(at);
    }
    return "";
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) fail("replay FILE [ISA...]");
    const Recording all = Reader(arguments[1]).recording();
    std::vector<int32_t> isas;
    for (int i = 2; i < count; ++i) isas.push_back(std::atoi(arguments[i]));
    if (isas.empty())
        for (int32_t isa = 0; isa < 31; ++isa)
            if (loramux_exact_isas() >> isa & 1) isas.push_back(isa);
    int wrong = 0;
    for (size_t turn = 0; turn < isas.size(); ++turn) {
        emulate_vpdpwssd(isas[turn] == kVectorAvxVnni);
        int64_t calls = 0, differ = 0;
        for (size_t number = 0; number < all.calls.size(); ++number) {
            const Call& recorded = all.calls[number];
            if (turn > 0 && !recorded.takes_isa()) continue;
            const std::string why = replay(recorded, all, isas[turn]);
            ++calls;
            if (why.empty()) continue;
            ++differ;
            std::printf("isa %d: call %zu, %s, %s\n", isas[turn], number, recorded.name.c_str(), why.c_str());
        }
        std::printf("isa %d: %lld calls, %lld differ, %lld instructions emulated\n", isas[turn],
                    static_cast<long long>(calls), static_cast<long long>(differ),
                    static_cast<long long>(emulated_vpdpwssd()));
        wrong += differ > 0;
    }
    return wrong > 0;
}
