// How fast is this engine on this machine, called as a server calls it? Each thread has a context of its own and calls
// infer() over and over: float arrays in, float arrays out, with both copies. The host's clock gives latency and images
// per second; events on the GPU give what of it were copies and computation. The first call is told apart: TensorRT for
// RTX compiles kernels in it. Events and clock are read in every query, and cost little beside it.
//
// A percentile p is sorted[n - 1 - floor((1 - p) n)], as trtexec has it, and left out where there are too few queries
// for it. Nothing here says whether the answers are right, which is for repvgg_verify.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "program.h"
#include "repvgg_engine.h"

namespace {

using repvgg::Code;
using repvgg::Status;
using repvgg::program::fail;
using repvgg::program::formatted;
using repvgg::program::require;
using repvgg::program::status_of;
using Clock = std::chrono::steady_clock;

constexpr const char* kUsageText =
    "usage: repvgg_bench ENGINE [--batch N] [--duration S] [--threads N] [--device N] [--no-graph]\n"
    "                    [--runtime-cache FILE] [--json]\n"
    "\n"
    "Measures an engine: images per second, latency, and what the GPU spends on copies and computation.\n"
    "\n"
    "  --batch N             images in a call (default: the usual batch of the engine's profile)\n"
    "  --duration S          seconds to measure, after a tenth of it to warm up (default: 3)\n"
    "  --threads N           threads, each with a context of its own (default: 1)\n"
    "  --device N            the GPU (default: 0)\n"
    "  --no-graph            launches kernels one by one, without a CUDA graph\n"
    "  --runtime-cache FILE  keeps the kernels that TensorRT for RTX compiles in the first query\n"
    "  --json                prints one object of JSON\n"
    "\n"
    "exit codes: 0 done; 1 the answers are not finite; 2 usage; 3 a file cannot be used; 4 a needed SDK or GPU is "
    "missing\n";

struct Arguments {
    std::string engine, runtime_cache;
    int batch = 0, threads = 1, device = 0;
    double duration = 3;
    bool graph = true, json = false, help = false;
};

int number_from_text(const std::string& option, const std::string& text, int least, int most) {
    return repvgg::program::whole_number(option, text, least, most, "repvgg_bench");
}

// As in 3 or 0.5, whatever the locale.
double seconds_from_text(const std::string& text) {
    const std::size_t point = std::min(text.find('.'), text.size());
    const std::string whole = text.substr(0, point), rest = point < text.size() ? text.substr(point + 1) : "";
    const auto is_number = [](const std::string& part) { return part.size() <= 6 && repvgg::program::is_digits(part); };
    const bool fits = is_number(whole) && is_number(rest) && !(whole + rest).empty();
    const double seconds =
        fits ? std::atoi(whole.c_str()) + std::atoi(rest.c_str()) / std::pow(10.0, static_cast<double>(rest.size()))
             : 0;
    if (!(seconds > 0 && seconds <= 3600)) {
        fail(Code::kUsage,
             "--duration " + text + ": give seconds, more than 0 and at most 3600; see repvgg_bench --help");
    }
    return seconds;
}

Arguments arguments_from(int count, char** texts) {
    Arguments arguments;
    std::vector<std::string> files;
    for (int i = 1; i < count; ++i) {
        const std::string text = texts[i];
        const auto value = [&] { return std::string(i + 1 < count ? texts[++i] : ""); };
        if (text == "--help") {
            arguments.help = true;
        } else if (text == "--json") {
            arguments.json = true;
        } else if (text == "--no-graph") {
            arguments.graph = false;
        } else if (text == "--batch") {
            arguments.batch = number_from_text(text, value(), 1, 65536);
        } else if (text == "--threads") {
            arguments.threads = number_from_text(text, value(), 1, 64);
        } else if (text == "--device") {
            arguments.device = number_from_text(text, value(), 0, repvgg::program::kLastDevice);
        } else if (text == "--duration") {
            arguments.duration = seconds_from_text(value());
        } else if (text == "--runtime-cache") {
            arguments.runtime_cache = value();
            if (arguments.runtime_cache.empty()) fail(Code::kUsage, text + ": give a file; see repvgg_bench --help");
        } else if (text.compare(0, 1, "-") == 0) {
            fail(Code::kUsage, text + ": no such option; see repvgg_bench --help");
        } else {
            files.push_back(text);
        }
    }
    if (arguments.help) return arguments;
    if (files.size() != 1) fail(Code::kUsage, "give one engine; see repvgg_bench --help");
    arguments.engine = files[0];
    return arguments;
}

double seconds_between(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double>(end - start).count();
}

// -------------------------------------------------------------------------------------------------------- measuring

// What one thread measured, in seconds; one entry for each query.
struct Measured {
    double first = 0;
    std::vector<double> latencies, to_device, compute, to_host;
    Clock::time_point start, end;
    int graphs = 0;
    std::string graph_refusal;
    bool finite = true;
    Status status;
};

// The values that every run computes: from -1 to 1, and in the same order everywhere.
std::vector<float> test_images(std::size_t values) {
    std::vector<float> images(values);
    std::uint32_t state = 1;
    for (float& value : images) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return images;
}

// One thread's arrays, context and queries.
class Worker {
  public:
    Worker(const repvgg::Engine& engine, const Arguments& arguments, int batch) : batch_(batch) {
        repvgg::ContextOptions options;
        options.graph = arguments.graph;
        options.timing = true;
        require(repvgg::Context::create(engine, options, context_));
        const auto rows = static_cast<std::size_t>(batch);
        images_ = test_images(rows * context_.input_values());
        for (const repvgg::Tensor& output : engine.description().outputs) {
            answers_.emplace_back(rows * context_.output_values(output.name.c_str()));
        }
        for (std::size_t i = 0; i < answers_.size(); ++i) {
            wanted_.push_back({engine.description().outputs[i].name.c_str(), answers_[i].data()});
        }
    }

    // The first query, and those that bring the rest to its usual speed.
    void warm_up(double seconds, Measured& measured) {
        const Clock::time_point start = Clock::now();
        query();
        measured.first = seconds_between(start, Clock::now());
        for (const std::vector<float>& values : answers_) {
            const auto is_finite = [](float value) { return std::isfinite(value); };
            measured.finite = measured.finite && std::all_of(values.begin(), values.end(), is_finite);
        }
        while (seconds_between(start, Clock::now()) < seconds) query();
    }

    void measure(double seconds, Measured& measured) {
        measured.start = measured.end = Clock::now();
        while (seconds_between(measured.start, measured.end) < seconds) {
            const Clock::time_point before = measured.end;
            query();
            measured.end = Clock::now();
            const repvgg::Times times = context_.times();
            measured.latencies.push_back(seconds_between(before, measured.end));
            measured.to_device.push_back(times.to_device);
            measured.compute.push_back(times.compute);
            measured.to_host.push_back(times.to_host);
        }
        measured.graphs = context_.graphs();
        measured.graph_refusal = context_.graph_refusal();
    }

  private:
    void query() { require(context_.infer(images_.data(), wanted_.data(), wanted_.size(), batch_)); }

    int batch_;
    repvgg::Context context_;
    std::vector<float> images_;
    std::vector<std::vector<float>> answers_;
    std::vector<repvgg::Output> wanted_;
};

// All threads warm up, wait for each other, and measure together.
std::vector<Measured> measured_by_threads(const repvgg::Engine& engine, const Arguments& arguments, int batch) {
    std::vector<Measured> all(static_cast<std::size_t>(arguments.threads));
    std::atomic<int> still_warming{arguments.threads};
    const auto run = [&](Measured& measured) {
        std::unique_ptr<Worker> worker;
        measured.status = status_of([&] {
            worker = std::make_unique<Worker>(engine, arguments, batch);
            worker->warm_up(arguments.duration / 10, measured);
        });
        --still_warming;
        while (still_warming > 0) std::this_thread::yield();
        if (!measured.status.ok()) return;
        measured.status = status_of([&] { worker->measure(arguments.duration, measured); });
    };
    std::vector<std::thread> threads;
    for (std::size_t i = 1; i < all.size(); ++i) {
        try {
            threads.emplace_back(run, std::ref(all[i]));
        } catch (const std::exception&) {
            all[i].status = Status(Code::kHostMemory, "a thread could not be started; give a smaller --threads");
            --still_warming;
        }
    }
    run(all[0]);
    for (std::thread& thread : threads) thread.join();
    for (const Measured& measured : all) require(measured.status);
    return all;
}

// ---------------------------------------------------------------------------------------------------------- figures

constexpr double kNone = -1;  // in place of a figure that cannot be given
constexpr double kMostVariation = 0.025;

std::vector<double> sorted(std::vector<double> numbers) {
    std::sort(numbers.begin(), numbers.end());
    return numbers;
}

// Of sorted numbers; kNone where fewer than `least` are there.
double percentile(const std::vector<double>& numbers, double percent, std::size_t least) {
    if (numbers.size() < least || numbers.empty()) return kNone;
    const double above = std::floor((1 - percent / 100) * static_cast<double>(numbers.size()));
    return numbers[numbers.size() - 1 - std::min(static_cast<std::size_t>(above), numbers.size() - 1)];
}

double median(const std::vector<double>& numbers) { return percentile(sorted(numbers), 50, 1); }

// Standard deviation over mean; 0 for what takes no time.
double variation_of(const std::vector<double>& numbers) {
    double sum = 0, squares = 0;
    for (const double number : numbers) sum += number;
    const double count = static_cast<double>(numbers.size()), mean = sum / count;
    for (const double number : numbers) squares += (number - mean) * (number - mean);
    return mean > 0 ? std::sqrt(squares / count) / mean : 0;
}

struct Figures {
    int batch = 0;
    std::size_t queries = 0;
    double first = 0, seconds = 0, images_per_second = 0, queries_per_second = 0;
    double p50 = 0, p90 = 0, p99 = 0;
    double to_device = 0, compute = 0, to_host = 0, variation = 0;
    bool graph = false;
    std::string runtime_cache;  // what became of it; empty without one
    std::vector<std::string> warnings;
};

void append(std::vector<double>& all, const std::vector<double>& more) {
    all.insert(all.end(), more.begin(), more.end());
}

Figures figures_of(const std::vector<Measured>& all, const Arguments& arguments, int batch) {
    Measured together = all[0];
    for (std::size_t i = 1; i < all.size(); ++i) {
        append(together.latencies, all[i].latencies);
        append(together.to_device, all[i].to_device);
        append(together.compute, all[i].compute);
        append(together.to_host, all[i].to_host);
        together.start = std::min(together.start, all[i].start);
        together.end = std::max(together.end, all[i].end);
        together.graphs = std::min(together.graphs, all[i].graphs);
        together.first = std::max(together.first, all[i].first);
        if (together.graph_refusal.empty()) together.graph_refusal = all[i].graph_refusal;
    }
    Figures figures;
    figures.batch = batch;
    figures.first = together.first;
    figures.queries = together.latencies.size();
    figures.seconds = seconds_between(together.start, together.end);
    figures.queries_per_second = static_cast<double>(figures.queries) / figures.seconds;
    figures.images_per_second = figures.queries_per_second * batch;
    const std::vector<double> latencies = sorted(together.latencies);
    figures.p50 = percentile(latencies, 50, 1);
    figures.p90 = percentile(latencies, 90, 10);
    figures.p99 = percentile(latencies, 99, 100);
    figures.to_device = median(together.to_device);
    figures.compute = median(together.compute);
    figures.to_host = median(together.to_host);
    figures.variation = variation_of(together.compute);
    figures.graph = together.graphs > 0 && together.graph_refusal.empty();
    if (arguments.graph && !figures.graph) {
        figures.warnings.push_back("launched without a CUDA graph: " + together.graph_refusal);
    }
    if (figures.variation > kMostVariation) {
        figures.warnings.push_back(
            "the time of a computation varies by " + formatted("%.1f", 100 * figures.variation) +
            " % of its mean, more than 2.5 %: lock the GPU's clocks, and let nothing else run on it");
    }
    return figures;
}

// ---------------------------------------------------------------------------------------------------------- printing

std::string milliseconds(double seconds) {
    return seconds < 0 ? "too few queries" : formatted("%.3f ms", 1000 * seconds);
}

void print_text(const repvgg::Description& description, const Arguments& arguments, const Figures& figures) {
    std::printf("%s: %s, %s %s, batch %d, threads %d, %s, with transfers\n", arguments.engine.c_str(),
                description.precision.c_str(), description.sdk.c_str(), description.sdk_version.c_str(), figures.batch,
                arguments.threads, figures.graph ? "CUDA graph" : "launches");
    std::printf("  first query     %s\n", milliseconds(figures.first).c_str());
    std::printf("  throughput      %s images/s, %s queries/s (%zu queries in %s s)\n",
                formatted("%.1f", figures.images_per_second).c_str(),
                formatted("%.1f", figures.queries_per_second).c_str(), figures.queries,
                formatted("%.2f", figures.seconds).c_str());
    std::printf("  latency         p50 %s, p90 %s, p99 %s (host clock, arrays to arrays)\n",
                milliseconds(figures.p50).c_str(), milliseconds(figures.p90).c_str(),
                milliseconds(figures.p99).c_str());
    std::printf("  on the GPU      host to device %s, compute %s, device to host %s (medians, events)\n",
                milliseconds(figures.to_device).c_str(), milliseconds(figures.compute).c_str(),
                milliseconds(figures.to_host).c_str());
    if (!figures.runtime_cache.empty()) std::printf("  runtime cache   %s\n", figures.runtime_cache.c_str());
    for (const std::string& warning : figures.warnings) std::printf("warning: %s\n", warning.c_str());
}

// As JSON has it; what is not UTF-8, which a file's name may hold, becomes question marks.
std::string quoted(std::string text) {
    const auto sound = [&text] { return repvgg::utf8_length(text.data(), text.size()); };
    for (std::size_t place = sound(); place < text.size(); place = sound()) text[place] = '?';
    std::string escaped = "\"";
    for (const char letter : text) {
        const auto byte = static_cast<unsigned char>(letter);
        if (byte < 0x20) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(byte));
            escaped += code;
            continue;
        }
        if (letter == '"' || letter == '\\') escaped += '\\';
        escaped += letter;
    }
    return escaped + "\"";
}

std::string json_number(double number) { return number < 0 ? "null" : formatted("%.9g", number); }
std::string json_milliseconds(double seconds) { return seconds < 0 ? "null" : json_number(1000 * seconds); }

void print_json(const repvgg::Description& description, const Arguments& arguments, const Figures& figures) {
    const auto print = [](const char* name, const std::string& value, const char* after) {
        std::printf("\"%s\": %s%s", name, value.c_str(), after);
    };
    std::printf("{");
    print("schema", "1", ", ");
    print("engine", quoted(arguments.engine), ", ");
    print("precision", quoted(description.precision), ", ");
    print("sdk", quoted(description.sdk), ", ");
    print("sdk_version", quoted(description.sdk_version), ", ");
    print("device", std::to_string(arguments.device), ", ");
    print("batch", std::to_string(figures.batch), ", ");
    print("threads", std::to_string(arguments.threads), ", ");
    print("graph", figures.graph ? "true" : "false", ", ");
    print("transfers", "true", ", ");
    print("runtime_cache", figures.runtime_cache.empty() ? "null" : quoted(figures.runtime_cache), ", ");
    print("first_ms", json_milliseconds(figures.first), ", ");
    print("queries", std::to_string(figures.queries), ", ");
    print("seconds", json_number(figures.seconds), ", ");
    print("images_per_second", json_number(figures.images_per_second), ", ");
    print("queries_per_second", json_number(figures.queries_per_second), ", ");
    std::printf("\"latency_ms\": {");
    print("p50", json_milliseconds(figures.p50), ", ");
    print("p90", json_milliseconds(figures.p90), ", ");
    print("p99", json_milliseconds(figures.p99), "}, ");
    std::printf("\"parts_ms\": {");
    print("h2d", json_milliseconds(figures.to_device), ", ");
    print("compute", json_milliseconds(figures.compute), ", ");
    print("d2h", json_milliseconds(figures.to_host), "}, ");
    print("variation", json_number(figures.variation), ", ");
    std::printf("\"warnings\": [");
    for (std::size_t i = 0; i < figures.warnings.size(); ++i) {
        std::printf("%s%s", i > 0 ? ", " : "", quoted(figures.warnings[i]).c_str());
    }
    std::printf("]}\n");
}

void bench(const Arguments& arguments) {
    repvgg::Engine engine;
    const repvgg::LoadOptions options = {arguments.device, arguments.runtime_cache.c_str()};
    require(repvgg::Engine::load(arguments.engine.c_str(), options, engine));
    const repvgg::Description& description = engine.description();
    const int batch = arguments.batch > 0 ? arguments.batch : description.profile[1][0];
    const std::vector<Measured> all = measured_by_threads(engine, arguments, batch);
    for (const Measured& measured : all) {
        if (measured.finite) continue;
        fail(Code::kVerificationFailed, arguments.engine +
                                            ": its answers are NaN or infinite, so no figure is given; " +
                                            "see what repvgg_verify says");
    }
    Figures figures = figures_of(all, arguments, batch);
    if (!arguments.runtime_cache.empty()) figures.runtime_cache = repvgg::program::runtime_cache_kept(engine);
    (arguments.json ? print_json : print_text)(description, arguments, figures);
}

}  // namespace

int main(int count, char** texts) {
    return repvgg::program::exit_code_of([&] {
        const Arguments arguments = arguments_from(count, texts);
        if (arguments.help) {
            std::fputs(kUsageText, stdout);
        } else {
            bench(arguments);
        }
    });
}
