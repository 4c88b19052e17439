// What repvgg_verify and repvgg_bench share: a failure ends the program with one line on stderr and its exit code.
#ifndef REPVGG_PROGRAM_H
#define REPVGG_PROGRAM_H

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <string>

#include "repvgg_engine.h"

namespace repvgg::program {

struct Failure {
    Status status;
};

[[noreturn]] inline void fail(Code code, const std::string& message) { throw Failure{Status(code, message.c_str())}; }

inline void require(const Status& status) {
    if (!status.ok()) throw Failure{status};
}

// Runs `body`; whatever it throws becomes a status.
template <typename Body>
Status status_of(const Body& body) noexcept {
    try {
        body();
        return Status();
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return Status(Code::kHostMemory, "out of memory on this machine; free memory and try again");
    } catch (const std::exception& error) {
        return Status(Code::kInternal, error.what());
    }
}

// Runs a program, and gives its exit code. What it prints must arrive.
template <typename Body>
int exit_code_of(const Body& body) noexcept {
    const Status status = status_of(body);
    const bool printed = std::fflush(stdout) == 0;
    if (!status.ok()) {
        std::fprintf(stderr, "error: %s\n", status.message());
        return status.exit_code();
    }
    if (printed) return 0;
    std::fputs("error: standard output: cannot be written\n", stderr);
    return 5;
}

inline std::string formatted(const char* form, double number) {
    char text[64];
    std::snprintf(text, sizeof text, form, number);
    return text;
}

inline bool is_digits(const std::string& text) { return text.find_first_not_of("0123456789") == std::string::npos; }

// The value of an option; `name` is the program's.
inline int whole_number(const std::string& option, const std::string& text, int least, int most, const char* name) {
    const bool fits = !text.empty() && text.size() <= 6 && is_digits(text);
    const int number = fits ? std::atoi(text.c_str()) : -1;
    if (number < least || number > most) {
        fail(Code::kUsage, option + " " + text + ": give a whole number from " + std::to_string(least) + " to " +
                               std::to_string(most) + "; see " + name + " --help");
    }
    return number;
}

constexpr int kLastDevice = 9999;

// Writes the kernels that were compiled into the runtime cache that was named; says in one line what became of it.
inline std::string runtime_cache_kept(const Engine& engine) {
    const std::string refusal = engine.runtime_cache_refusal();
    const Status saved = engine.save_runtime_cache();
    if (!saved.ok()) return saved.message();
    return refusal.empty() ? "its kernels were used" : "made anew (" + refusal + ")";
}

}  // namespace repvgg::program

#endif  // REPVGG_PROGRAM_H
