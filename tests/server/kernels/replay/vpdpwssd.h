// VPDPWSSD of AVX-VNNI, emulated on an x86 processor that has AVX2 and not AVX-VNNI: laptops have it, servers rarely do,
// and QEMU does not know it (7.2, `-cpu max`). The processor refuses the instruction; the handler of that signal does what
// it says to the registers that the kernel saved, and goes on behind it. All else runs on the processor itself.
//
//     VPDPWSSD ymm1, ymm2, ymm3/m256:  ymm1[i] += ymm2[2i] * ymm3[2i] + ymm2[2i + 1] * ymm3[2i + 1],  8 sums of int32
//     VEX.256.66.0F38.W0 52 /r

#pragma once

#include <cstdint>

#if defined(__x86_64__)

#include <cpuid.h>
#include <signal.h>
#include <sys/ucontext.h>

#include <atomic>
#include <cstring>

namespace {

std::atomic<int64_t> emulated{0};

// The saved vector registers: the low halves lie in the legacy area of XSAVE, the high ones where CPUID says.
class SavedVectors {
  public:
    explicit SavedVectors(void* area) : area_(static_cast<char*>(area)) {
        unsigned a = 0, b = 0, c = 0, d = 0;
        __get_cpuid_count(13, 2, &a, &b, &c, &d);
        high_ = b;
        std::memcpy(&saved_, area_ + kHeader, sizeof saved_);
    }
    void read(int number, int16_t* to) const {
        std::memcpy(to, low(number), 16);
        if (saved_ & kHighHalves) std::memcpy(to + 8, high(number), 16);
        else std::memset(to + 8, 0, 16);  // the processor left them out because all are zero
    }
    void write(int number, const int32_t* from) {
        if (!(saved_ & kHighHalves)) {
            for (int each = 0; each < 16; ++each) std::memset(high(each), 0, 16);
        }
        saved_ |= kLowHalves | kHighHalves;
        std::memcpy(area_ + kHeader, &saved_, sizeof saved_);
        std::memcpy(low(number), from, 16);
        std::memcpy(high(number), from + 4, 16);
    }

  private:
    static constexpr int kLow = 160, kHeader = 512;
    static constexpr uint64_t kLowHalves = 2, kHighHalves = 4;
    char* low(int number) const { return area_ + kLow + 16 * number; }
    char* high(int number) const { return area_ + high_ + 16 * number; }
    char* area_;
    unsigned high_;
    uint64_t saved_;
};

// One instruction at `code`, read from its bytes (Intel's manual, volume 2, chapter 2).
struct Decoded {
    bool is_vpdpwssd = false;
    int to = 0, first = 0, second = -1;  // registers; second -1: memory
    const char* memory = nullptr;
    int length = 0;

    Decoded(const uint8_t* code, const greg_t* registers) {
        // C4, then R X B (inverted) and the map (2: 0F38), then W, vvvv (inverted), L (1: 256 bits), pp (1: 66)
        if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x52) return;
        is_vpdpwssd = true;
        const int mode = code[4] >> 6, field = code[4] & 7, b = code[1] & 0x20 ? 0 : 8;
        to = (code[4] >> 3 & 7) + (code[1] & 0x80 ? 0 : 8);
        first = ~(code[2] >> 3) & 15;
        length = 5;
        if (mode == 3) {
            second = field + b;
            return;
        }
        int64_t at = 0;
        bool has_wide_offset = mode == 2;
        if (field == 4) {  // base + index << scale
            const int scale = code[5] >> 6, index = (code[5] >> 3 & 7) + (code[1] & 0x40 ? 0 : 8), base = code[5] & 7;
            length = 6;
            if (index != 4) at += general(registers, index) << scale;
            if (base == 5 && mode == 0) has_wide_offset = true;
            else at += general(registers, base + b);
        } else if (field == 5 && mode == 0) {  // behind this instruction
            has_wide_offset = true;
            at += reinterpret_cast<int64_t>(code) + length + 4;
        } else {
            at += general(registers, field + b);
        }
        if (has_wide_offset) {
            int32_t offset;
            std::memcpy(&offset, code + length, sizeof offset);
            at += offset;
            length += 4;
        } else if (mode == 1) {
            at += static_cast<int8_t>(code[length]);
            length += 1;
        }
        memory = reinterpret_cast<const char*>(at);
    }

    static int64_t general(const greg_t* registers, int number) {
        static constexpr int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
        return registers[kPlaces[number]];
    }
};

void on_refused_instruction(int, siginfo_t*, void* context) {
    mcontext_t& state = static_cast<ucontext_t*>(context)->uc_mcontext;
    const Decoded found(reinterpret_cast<const uint8_t*>(state.gregs[REG_RIP]), state.gregs);
    if (!found.is_vpdpwssd) {  // comes again at once, and ends the process
        signal(SIGILL, SIG_DFL);
        return;
    }
    SavedVectors vectors(state.fpregs);
    int16_t a[16], b[16];
    int32_t sum[8];
    vectors.read(found.to, reinterpret_cast<int16_t*>(sum));
    vectors.read(found.first, a);
    if (found.second >= 0) vectors.read(found.second, b);
    else std::memcpy(b, found.memory, sizeof b);
    for (int i = 0; i < 8; ++i) {
        const int64_t all = int64_t{sum[i]} + a[2 * i] * b[2 * i] + int64_t{a[2 * i + 1]} * b[2 * i + 1];
        sum[i] = static_cast<int32_t>(static_cast<uint32_t>(all));
    }
    vectors.write(found.to, sum);
    state.gregs[REG_RIP] += found.length;
    emulated.fetch_add(1, std::memory_order_relaxed);
}

void emulate_vpdpwssd(bool wanted) {
    struct sigaction action {};
    action.sa_sigaction = on_refused_instruction;
    action.sa_flags = SA_SIGINFO;
    if (!wanted) action.sa_handler = SIG_DFL;
    sigaction(SIGILL, &action, nullptr);
    emulated = 0;
}

int64_t emulated_vpdpwssd() { return emulated; }

}  // namespace

#else

namespace {

void emulate_vpdpwssd(bool) {}
int64_t emulated_vpdpwssd() { return 0; }

}  // namespace

#endif
