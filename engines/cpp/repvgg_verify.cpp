// Does this engine, on this machine, still compute the network it was exported from? The golden vectors say what that
// network answers in float64 (engines/golden_file.py documents the file; engines/parity.py, outputs.py and golden.py
// the figures, which are the same here):
//
//     relative error   max|y - r| / max|r|, over everything; of several outputs each is divided by its own max|r| first
//     SQNR             10 log10(sum r^2 / sum (y - r)^2), in dB
//     decided flip     a row whose top-1 differs although its margin exceeds max|y - r| in that row
//     mixed up         an answer much nearer to that for another image than to its own
//
// The images are run one alone and then the others together: first as the engine launches its kernels, then as the CUDA
// graphs that were recorded meanwhile.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "program.h"
#include "repvgg_engine.h"

namespace {

using repvgg::Code;
using repvgg::program::fail;
using repvgg::program::formatted;
using repvgg::program::require;

constexpr const char* kUsageText =
    "usage: repvgg_verify ENGINE GOLDEN [--device N] [--runtime-cache FILE]\n"
    "\n"
    "Checks an engine against its sidecar, runs the golden vectors and holds the answers to the gate of its "
    "precision.\n"
    "GOLDEN is the golden.bin that python -m engines golden DIR writes; N is the GPU, 0 by default. FILE keeps the "
    "kernels\n"
    "that TensorRT for RTX compiles; it is written where every check holds.\n"
    "\n"
    "exit codes: 0 verified; 1 a check failed; 2 usage; 3 a file cannot be used; 4 a needed SDK or GPU is missing\n";

struct Arguments {
    std::string engine, golden, runtime_cache;
    int device = 0;
    bool help = false;
};

Arguments arguments_from(int count, char** texts) {
    Arguments arguments;
    std::vector<std::string> files;
    for (int i = 1; i < count; ++i) {
        const std::string text = texts[i];
        if (text == "--help") {
            arguments.help = true;
        } else if (text == "--device") {
            const std::string value = i + 1 < count ? texts[++i] : "";
            arguments.device =
                repvgg::program::whole_number(text, value, 0, repvgg::program::kLastDevice, "repvgg_verify");
        } else if (text == "--runtime-cache") {
            arguments.runtime_cache = i + 1 < count ? texts[++i] : "";
            if (arguments.runtime_cache.empty()) fail(Code::kUsage, text + ": give a file; see repvgg_verify --help");
        } else if (text.compare(0, 1, "-") == 0) {
            fail(Code::kUsage, text + ": no such option; see repvgg_verify --help");
        } else {
            files.push_back(text);
        }
    }
    if (arguments.help) return arguments;
    if (files.size() != 2) fail(Code::kUsage, "give an engine and a golden.bin; see repvgg_verify --help");
    arguments.engine = files[0];
    arguments.golden = files[1];
    return arguments;
}

// -------------------------------------------------------------------------------------------------------- golden.bin

struct Gate {
    std::string precision;
    bool top1 = false;
    double relative = 0;
    double least_sqnr = 0;  // NaN where there is none
};

struct Array {
    std::string name;
    std::vector<int> shape;  // begins with the number of images
    std::vector<float> values;

    std::size_t width() const { return values.size() / static_cast<std::size_t>(shape[0]); }
};

struct Golden {
    int count = 0;  // of images
    std::vector<Gate> gates;
    Array images;
    std::vector<Array> outputs;
};

constexpr std::size_t kChecksumBytes = 32;
constexpr std::uint32_t kLargestCount = 1u << 16;
constexpr std::size_t kLargestFile = std::size_t{1} << 32;

// Takes the content apart, without its checksum; refuses what cannot be.
class GoldenReader {
  public:
    GoldenReader(const std::vector<unsigned char>& content, std::string where)
        : content_(content), where_(std::move(where)) {}

    Golden whole() {
        if (content_.size() < 8 || std::memcmp(content_.data(), "RVGOLDEN", 8) != 0) wrong("not a golden.bin");
        check_checksum();
        position_ = 8;
        if (number32() != 1) wrong("of a version that is not read here");
        if (number64() != content_.size()) wrong("it says another size than it has");
        Golden golden;
        golden.count = static_cast<int>(count(1));
        for (std::uint32_t left = count(1); left > 0; --left) golden.gates.push_back(gate());
        check_gates(golden.gates);
        std::vector<Array> arrays(count(2));
        for (Array& array : arrays) read_shape(array, golden.count);
        for (Array& array : arrays) read_values(array);
        if (position_ != end_) wrong("something stands behind its end");
        check_arrays(arrays);
        golden.images = std::move(arrays[0]);
        golden.outputs.assign(std::make_move_iterator(arrays.begin() + 1), std::make_move_iterator(arrays.end()));
        return golden;
    }

  private:
    [[noreturn]] void wrong(const std::string& problem) const {
        fail(Code::kFile, where_ + ": " + problem + "; copy the file again, or write it with python -m engines golden");
    }

    void check_checksum() {
        const char* problem = "its checksum is not that of its content: damaged, or cut short";
        if (content_.size() < kChecksumBytes) wrong(problem);
        end_ = content_.size() - kChecksumBytes;
        const auto digest = repvgg::sha256(content_.data(), end_);
        if (std::memcmp(digest.data(), content_.data() + end_, kChecksumBytes) != 0) wrong(problem);
    }

    const unsigned char* take(std::size_t size) {
        if (size > end_ - position_) wrong("it ends too early");
        position_ += size;
        return content_.data() + position_ - size;
    }

    std::uint32_t number32() {
        const unsigned char* bytes = take(4);
        return bytes[0] | std::uint32_t{bytes[1]} << 8 | std::uint32_t{bytes[2]} << 16 | std::uint32_t{bytes[3]} << 24;
    }

    std::uint64_t number64() {
        const std::uint64_t low = number32();
        return low | std::uint64_t{number32()} << 32;
    }

    double real64() {
        const std::uint64_t bits = number64();
        double number = 0;
        std::memcpy(&number, &bits, sizeof number);
        return number;
    }

    float real32() {
        const std::uint32_t bits = number32();
        float number = 0;
        std::memcpy(&number, &bits, sizeof number);
        return number;
    }

    std::uint32_t count(std::uint32_t at_least) {
        const std::uint32_t number = number32();
        if (number < at_least || number > kLargestCount) wrong("it has a count of " + std::to_string(number));
        return number;
    }

    std::string text() {
        const std::size_t length = count(1);
        const unsigned char* letters = take(length);
        if (repvgg::utf8_length(letters, length) != length) wrong("it holds a text that is not UTF-8");
        return std::string(letters, letters + length);
    }

    Gate gate() {
        Gate gate;
        gate.precision = text();
        const std::uint32_t top1 = number32();
        gate.top1 = top1 == 1;
        gate.relative = real64();
        gate.least_sqnr = real64();
        if (top1 > 1 || !(gate.relative > 0 && gate.relative < 1) || std::isinf(gate.least_sqnr)) {
            wrong("its gate for " + gate.precision + " is none");
        }
        return gate;
    }

    void check_gates(const std::vector<Gate>& gates) const {
        for (std::size_t i = 0; i < gates.size(); ++i) {
            const auto is_same = [&](const Gate& gate) { return gate.precision == gates[i].precision; };
            if (std::any_of(gates.begin(), gates.begin() + static_cast<std::ptrdiff_t>(i), is_same)) {
                wrong("something is in it twice");
            }
        }
    }

    void read_shape(Array& array, int images) {
        array.name = text();
        array.shape.resize(count(2));
        for (int& extent : array.shape) extent = static_cast<int>(count(1));
        if (array.shape[0] != images) wrong(array.name + " has not a row for each image");
    }

    void read_values(Array& array) {
        std::size_t values = 1;
        for (const int extent : array.shape) {
            values *= static_cast<std::size_t>(extent);
            if (values > end_ - position_) wrong("it ends too early");  // before it can overflow
        }
        if (values > (end_ - position_) / 4) wrong("it ends too early");
        array.values.resize(values);
        for (float& value : array.values) {
            value = real32();
            if (!std::isfinite(value)) wrong("it holds NaN or infinite values");
        }
    }

    void check_arrays(const std::vector<Array>& arrays) const {
        if (arrays[0].name != "input" || arrays[0].shape.size() != 4) wrong("its first array is not images");
        for (std::size_t i = 1; i < arrays.size(); ++i) {
            const std::size_t rank = arrays[i].shape.size();
            if (rank != 2 && rank != 4) wrong("an output has neither two dimensions nor four");
            for (std::size_t j = 0; j < i; ++j) {
                if (arrays[i].name == arrays[j].name) wrong("something is in it twice");
            }
        }
    }

    const std::vector<unsigned char>& content_;
    std::string where_;
    std::size_t position_ = 0, end_ = 0;
};

Golden golden_from_file(const std::string& path) {
    std::vector<unsigned char> content;
    require(repvgg::read_file(path.c_str(), kLargestFile, content));
    return GoldenReader(content, path).whole();
}

// ---------------------------------------------------------------------------------------------------------- figures

// One row of numbers for each image: all outputs, one behind the other, each in its own scale if there are several.
struct Rows {
    std::size_t count = 0, width = 0;
    std::vector<double> values;

    const double* row(std::size_t index) const { return values.data() + index * width; }
};

// The largest absolute value, or what float32 can still divide by; 1 for an output of zeros.
double scale_of(const std::vector<float>& values) {
    float largest = 0;
    for (const float value : values) largest = std::max(largest, std::fabs(value));
    return largest > 0 ? static_cast<double>(std::max(largest, std::numeric_limits<float>::min())) : 1;
}

// `answers` in the order and scale of the golden outputs.
Rows joined(const Golden& golden, const std::vector<std::vector<float>>& answers) {
    Rows rows;
    rows.count = static_cast<std::size_t>(golden.count);
    for (const Array& output : golden.outputs) rows.width += output.width();
    rows.values.reserve(rows.count * rows.width);
    std::vector<double> scales;
    for (const Array& output : golden.outputs) scales.push_back(answers.size() == 1 ? 1 : scale_of(output.values));
    for (std::size_t row = 0; row < rows.count; ++row) {
        for (std::size_t k = 0; k < answers.size(); ++k) {
            const std::size_t width = golden.outputs[k].width();
            const float* values = answers[k].data() + row * width;
            for (std::size_t i = 0; i < width; ++i) {
                rows.values.push_back(static_cast<double>(values[i]) / scales[k]);
            }
        }
    }
    return rows;
}

Rows reference_rows(const Golden& golden) {
    std::vector<std::vector<float>> values;
    for (const Array& output : golden.outputs) values.push_back(output.values);
    return joined(golden, values);
}

double distance(const double* one, const double* other, std::size_t width) {
    double largest = 0;
    for (std::size_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(one[i] - other[i]));
    return largest;
}

// Largest minus second largest; infinite for a single number.
double margin_of(const double* row, std::size_t width) {
    double first = -std::numeric_limits<double>::infinity(), second = first;
    for (std::size_t i = 0; i < width; ++i) {
        second = std::max(second, std::min(first, row[i]));
        first = std::max(first, row[i]);
    }
    return width < 2 ? std::numeric_limits<double>::infinity() : first - second;
}

std::size_t top1_of(const double* row, std::size_t width) {
    return static_cast<std::size_t>(std::max_element(row, row + width) - row);
}

struct Comparison {
    double relative_error = 0, sqnr = 0;
    std::size_t non_finite = 0, flips = 0, decided_flips = 0;
};

Comparison compare(const Rows& reference, const Rows& answers) {
    Comparison found;
    double worst = 0, scale = 0, signal = 0, noise = 0;
    for (std::size_t i = 0; i < reference.values.size(); ++i) {
        const double r = reference.values[i], y = answers.values[i];
        if (!std::isfinite(y)) {
            ++found.non_finite;
            continue;
        }
        worst = std::max(worst, std::fabs(y - r));
        scale = std::max(scale, std::fabs(r));
        signal += r * r;
        noise += (y - r) * (y - r);
    }
    const double infinity = std::numeric_limits<double>::infinity();
    found.relative_error = scale > 0 ? worst / scale : worst == 0 ? 0 : infinity;
    found.sqnr = noise == 0 ? infinity : 10 * std::log10(std::max(signal / noise, 1e-300));
    if (found.non_finite > 0) return found;
    for (std::size_t row = 0; row < reference.count; ++row) {
        const double* r = reference.row(row);
        const double* y = answers.row(row);
        if (top1_of(r, reference.width) == top1_of(y, reference.width)) continue;
        ++found.flips;
        if (margin_of(r, reference.width) > distance(r, y, reference.width)) ++found.decided_flips;
    }
    return found;
}

bool same_image(const Golden& golden, std::size_t one, std::size_t other) {
    const std::size_t size = golden.images.width();
    const float* values = golden.images.values.data();
    return std::memcmp(values + one * size, values + other * size, size * sizeof(float)) == 0;
}

// How far apart the two most alike answers to different images are; 0 where nothing could be told from the vectors.
double contrast_of(const Golden& golden, const Rows& reference) {
    double scale = 0, least = std::numeric_limits<double>::infinity();
    bool constant = reference.width > 1;
    for (std::size_t a = 0; a < reference.count; ++a) {
        for (std::size_t i = 0; i < reference.width; ++i) {
            scale = std::max(scale, std::fabs(reference.row(a)[i]));
            constant = constant && reference.row(a)[i] == reference.row(a)[0];
        }
        for (std::size_t b = 0; b < a; ++b) {
            if (same_image(golden, a, b)) continue;
            least = std::min(least, distance(reference.row(a), reference.row(b), reference.width));
        }
    }
    return scale == 0 || constant ? 0 : least / scale;
}

constexpr double kLeastContrast = 1e-9;
constexpr double kMixedUpFactor = 0.5;

// The first answer that is much nearer to that for another image than to its own; -1 for none.
int mixed_up_row(const Golden& golden, const Rows& reference, const Rows& answers) {
    for (std::size_t row = 0; row < answers.count; ++row) {
        const double own = distance(answers.row(row), reference.row(row), answers.width);
        for (std::size_t other = 0; other < answers.count; ++other) {
            if (same_image(golden, row, other)) continue;
            const double apart = distance(answers.row(row), reference.row(other), answers.width);
            if (apart < kMixedUpFactor * own) return static_cast<int>(row);
        }
    }
    return -1;
}

// Whether a network that answered the same to everything would be beyond the gate: in the relative error the answer
// halfway between the extremes is the nearest, in the SQNR the mean.
bool tells_apart(const Rows& reference, const Gate& gate) {
    Rows halfway = reference, mean = reference;
    for (std::size_t i = 0; i < reference.width; ++i) {
        double least = reference.values[i], most = least, sum = 0;
        for (std::size_t row = 0; row < reference.count; ++row) {
            const double value = reference.row(row)[i];
            least = std::min(least, value);
            most = std::max(most, value);
            sum += value;
        }
        for (std::size_t row = 0; row < reference.count; ++row) {
            halfway.values[row * reference.width + i] = (least + most) / 2;
            mean.values[row * reference.width + i] = sum / static_cast<double>(reference.count);
        }
    }
    if (compare(reference, halfway).relative_error > gate.relative) return true;
    return !std::isnan(gate.least_sqnr) && compare(reference, mean).sqnr < gate.least_sqnr;
}

// -------------------------------------------------------------------------------------------------------- the checks

// Prints a line for each check and counts them.
class Checks {
  public:
    void add(bool passed, const std::string& name, const std::string& detail) {
        print(passed ? "ok  " : "FAIL", name, detail);
        ++made_;
        held_ += passed ? 1 : 0;
        if (!passed && first_failure_.empty()) first_failure_ = name + ": " + detail;
    }
    void leave_out(const std::string& name, const std::string& detail) { print("skip", name, detail); }

    // The verdict; throws where a check failed.
    void finish() const {
        std::printf("%s: %d of %d checks hold\n", held_ == made_ ? "PASS" : "FAIL", held_, made_);
        if (held_ != made_) fail(Code::kVerificationFailed, first_failure_);
    }

  private:
    static void print(const char* mark, const std::string& name, const std::string& detail) {
        std::printf("%s %s: %s\n", mark, name.c_str(), detail.c_str());
    }

    int made_ = 0, held_ = 0;
    std::string first_failure_;
};

// The gate of the engine's precision, no wider than its sidecar's tolerance.
Gate gate_for(const Golden& golden, const repvgg::Description& description, const std::string& path) {
    const auto of_precision = [&](const Gate& gate) { return gate.precision == description.precision; };
    const auto found = std::find_if(golden.gates.begin(), golden.gates.end(), of_precision);
    if (found == golden.gates.end()) fail(Code::kFile, path + ": has no gate for " + description.precision);
    Gate gate = *found;
    gate.relative = std::min(gate.relative, description.tolerance);
    gate.top1 = gate.top1 && golden.outputs.size() == 1 && golden.outputs[0].shape.size() == 2;
    return gate;
}

// Why these vectors cannot be those of this engine; empty where they can.
std::string mismatch(const Golden& golden, const repvgg::Description& description) {
    const std::vector<int>& images = golden.images.shape;
    const std::vector<int>&least = description.profile[0], &most = description.profile[2];
    bool fits = images.size() == least.size();
    for (std::size_t axis = 1; fits && axis < images.size(); ++axis) {
        fits = least[axis] <= images[axis] && images[axis] <= most[axis];
    }
    if (!fits) return "its images are not what the engine takes";
    if (golden.outputs.size() != description.outputs.size()) return "it has other outputs than the engine";
    return "";
}

class Verification {
  public:
    Verification(const Golden& golden, const repvgg::Engine& engine, Gate gate)
        : golden_(golden), gate_(std::move(gate)), reference_(reference_rows(golden)) {
        repvgg::ContextOptions options;
        options.height = golden.images.shape[2];
        options.width = golden.images.shape[3];
        require(repvgg::Context::create(engine, options, context_));
    }

    void run(Checks& checks) {
        for (const Array& output : golden_.outputs) {
            const std::vector<int> row(output.shape.begin() + 1, output.shape.end());
            if (context_.output_shape(output.name.c_str()) == row) continue;
            checks.add(false, "answers", "the engine has no output " + output.name + " of the golden vectors' shape");
            return;
        }
        const char* by_graph = "answers, by CUDA graph";
        check_answers(checks, "answers, by launches");
        if (context_.graphs() > 0) check_answers(checks, by_graph);  // of some batch sizes, if not of all
        if (context_.graph_refusal()[0] == '\0') return;
        checks.leave_out(context_.graphs() > 0 ? "a CUDA graph of every batch size" : by_graph,
                         context_.graph_refusal());
    }

  private:
    // All outputs for the golden images, one alone and then the others together.
    std::vector<std::vector<float>> answers() {
        std::vector<std::vector<float>> values;
        const float unwritten = std::numeric_limits<float>::quiet_NaN();
        for (const Array& output : golden_.outputs) values.emplace_back(output.values.size(), unwritten);
        for (int start = 0, rows = 1; start < golden_.count; start += rows, rows = golden_.count - 1) {
            std::vector<repvgg::Output> wanted;
            for (std::size_t k = 0; k < values.size(); ++k) {
                float* place = values[k].data() + static_cast<std::size_t>(start) * golden_.outputs[k].width();
                wanted.push_back({golden_.outputs[k].name.c_str(), place});
            }
            const float* images =
                golden_.images.values.data() + static_cast<std::size_t>(start) * golden_.images.width();
            const int given = std::min(rows, golden_.count - start);
            require(context_.infer(images, wanted.data(), wanted.size(), given));
        }
        return values;
    }

    void check_answers(Checks& checks, const char* name) {
        const Rows found = joined(golden_, answers());
        const Comparison comparison = compare(reference_, found);
        const std::string failure = failure_of(comparison, found);
        checks.add(failure.empty(), name, (failure.empty() ? "" : failure + "; ") + figures(comparison));
    }

    // Why the answers do not pass; empty where they do. A NaN never passes.
    std::string failure_of(const Comparison& found, const Rows& answers) const {
        if (found.non_finite > 0) return std::to_string(found.non_finite) + " outputs are NaN or infinite";
        if (!(found.relative_error <= gate_.relative)) {
            return "relative error " + formatted("%.2e", found.relative_error) + " exceeds " +
                   formatted("%.1e", gate_.relative);
        }
        if (!std::isnan(gate_.least_sqnr) && !(found.sqnr >= gate_.least_sqnr)) {
            return "SQNR " + formatted("%.1f", found.sqnr) + " dB is below " + formatted("%g", gate_.least_sqnr) +
                   " dB";
        }
        if (gate_.top1 && found.decided_flips > 0) {
            return "top-1 differs in " + std::to_string(found.decided_flips) + " of " + std::to_string(golden_.count) +
                   " rows beyond the error's reach";
        }
        const int row = mixed_up_row(golden_, reference_, answers);
        if (row < 0) return "";
        return "answer " + std::to_string(row) + " is nearer to that of another image: rows are mixed up, or all alike";
    }

    std::string figures(const Comparison& found) const {
        if (found.non_finite > 0) return "nothing else can be told";
        std::string text = "relative error " + formatted("%.1e", found.relative_error) + " (gate " +
                           formatted("%.1e", gate_.relative) + "), SQNR " + formatted("%.1f", found.sqnr) + " dB";
        if (!std::isnan(gate_.least_sqnr)) text += " (gate " + formatted("%g", gate_.least_sqnr) + " dB)";
        if (golden_.outputs.size() == 1 && golden_.outputs[0].shape.size() == 2) {
            text += ", top-1 agrees on " + std::to_string(reference_.count - found.flips) + " of " +
                    std::to_string(golden_.count);
        }
        if (!tells_apart(reference_, gate_)) {
            text += "; a constant answer would pass, too: export with --calib for vectors that tell more";
        }
        return text;
    }

    const Golden& golden_;
    Gate gate_;
    Rows reference_;
    repvgg::Context context_;
};

std::string text_of_integrity(const repvgg::Description& description) {
    std::string text = "SHA-256, " + description.sdk + " " + description.sdk_version;
    for (const int card : description.cards) text += ", sm" + std::to_string(card);
    return text;
}

void verify(const Arguments& arguments) {
    const Golden golden = golden_from_file(arguments.golden);
    repvgg::Engine engine;
    const repvgg::LoadOptions options = {arguments.device, arguments.runtime_cache.c_str()};
    require(repvgg::Engine::load(arguments.engine.c_str(), options, engine));
    const Gate gate = gate_for(golden, engine.description(), arguments.golden);
    Checks checks;
    checks.add(true, "integrity", text_of_integrity(engine.description()));
    const double contrast = contrast_of(golden, reference_rows(golden));
    const std::string problem = mismatch(golden, engine.description());
    if (!problem.empty()) {
        checks.add(false, "golden vectors", problem);
    } else if (!(contrast > kLeastContrast)) {
        checks.add(false, "golden vectors", "two answers or all values are the same, so a mix-up could not be seen");
    } else {
        const std::string images = std::to_string(golden.count) + " images";
        checks.add(true, "golden vectors", images + ", answers " + formatted("%.1e", contrast) + " or more apart");
        Verification(golden, engine, gate).run(checks);
    }
    checks.finish();
    if (arguments.runtime_cache.empty()) return;
    std::printf("runtime cache: %s\n", repvgg::program::runtime_cache_kept(engine).c_str());
}

}  // namespace

int main(int count, char** texts) {
    return repvgg::program::exit_code_of([&] {
        const Arguments arguments = arguments_from(count, texts);
        if (arguments.help) {
            std::fputs(kUsageText, stdout);
        } else {
            verify(arguments);
        }
    });
}
