// Engines of RepVGG in C++17, for servers: checked before they are loaded, then run without an allocation per call.
//
//     repvgg::Engine engine;                                  // shared by all threads
//     repvgg::Status status = repvgg::Engine::load("model.fp16.engine", {}, engine);
//     repvgg::Context context;                                // one for each thread
//     if (status.ok()) status = repvgg::Context::create(engine, {}, context);
//     if (status.ok()) status = context.infer(images, scores, 8);
//     if (!status.ok()) std::fprintf(stderr, "%s\n", status.message());
//
// An engine is native code. Engine::load holds the file against its sidecar, <engine>.json, in the order of
// engines/integrity.py: sidecar, SHA-256, header, SDK, version, GPU and card. What was hashed is what is deserialized;
// the file is read once. There is no way round the checks. Every refusal is one line.
//
// Nothing throws. An allocation that fails, on the host or on the GPU, is an error code like any other, and nothing
// leaks. Whatever is loaded is freed by destructors.
//
// This header needs neither TensorRT nor CUDA; repvgg_engine.cpp does. `golden.bin`, which repvgg_verify reads, is
// documented in engines/golden_file.py.
#ifndef REPVGG_ENGINE_H
#define REPVGG_ENGINE_H

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace repvgg {

// What went wrong. The first five are the exit codes of every command of this project.
enum class Code : int {
    kOk = 0,
    kVerificationFailed = 1,  // an answer is not what it should be
    kUsage = 2,               // the call is wrong: a batch, size or name that cannot be
    kFile = 3,                // a file is missing, damaged, replaced, or of another kind
    kDevice = 4,              // the SDK, its version or a fitting GPU is not here, or a call to it failed
    kHostMemory = 5,          // memory of the machine did not suffice
    kDeviceMemory = 6,        // memory of the GPU did not suffice
    kInternal = 7,            // a defect of this library
    kOutput = 8,              // a file cannot be written
};

// A code and one line: what, where, what to do. Never allocates.
class [[nodiscard]] Status {
  public:
    Status() noexcept = default;
    Status(Code code, const char* message) noexcept;  // no message stands for an empty one

    bool ok() const noexcept { return code_ == Code::kOk; }
    Code code() const noexcept { return code_; }
    const char* message() const noexcept { return message_; }
    int exit_code() const noexcept;  // kHostMemory ends a program with 3, kDeviceMemory and kInternal 4, kOutput 5

  private:
    Code code_ = Code::kOk;
    char message_[768] = "";
};

// An input or output: float32, row by row. `shape` begins with the batch; an extent that is free is -1.
struct Tensor {
    std::string name;
    std::vector<int> shape;
};

// What the sidecar says of the engine. Images are x = (pixel / 255 - mean) / std per channel.
struct Description {
    std::string precision;                    // fp32, fp16, int8
    std::string sdk;                          // tensorrt, tensorrt_rtx
    std::string sdk_version;                  // as in 1.7.1.116
    std::string golden;                       // file name of the vectors it was exported with
    std::vector<int> cards;                   // compute capabilities, as in 86 for 8.6
    double tolerance = 0;                     // largest relative error against the golden vectors
    Tensor input;                             // (N, channels, height, width)
    std::vector<Tensor> outputs;              // in the graph's order
    std::array<std::vector<int>, 3> profile;  // of the engine itself: its smallest, usual and largest input
    std::vector<double> mean, std;
};

namespace internal {
struct LoadedEngine;
struct Running;
}  // namespace internal

// How an engine is loaded.
//
// TensorRT for RTX compiles kernels for the card when a batch size is run for the first time, which takes seconds at
// each start of a server. Where `runtime_cache` names a file, the kernels in it are used in place of compiling them,
// and Engine::save_runtime_cache() writes those that are compiled by then. A file that is not there, damaged, or of
// another engine, version, card or driver is passed over. It is the file that Python keeps as <engine>.sm86.cache, and
// native code like the engine: whoever can write the one must be trusted as much as whoever can write the other.
struct LoadOptions {
    int device = 0;                       // index of the GPU
    const char* runtime_cache = nullptr;  // null or "" for none, which is all that full TensorRT takes
};

// A loaded engine: immutable, so every thread may use it at once. Copies are handles of the same one; the last that
// goes, among them those inside of contexts, frees it.
class Engine {
  public:
    Engine() noexcept = default;

    // Checks, reads and deserializes `path`. `engine` is untouched unless it succeeds.
    static Status load(const char* path, const LoadOptions& options, Engine& engine) noexcept;

    // Writes the kernels that are compiled by now into the runtime cache, unless they are those that it had: whole, or
    // not at all. Call it once the batch sizes that matter have run; other threads may go on meanwhile, and wait only
    // to compile. Where it fails, serving may go on.
    Status save_runtime_cache() const noexcept;

    // Why the runtime cache that was named is of no use, in one line; "" where it is in use, or none was named.
    const char* runtime_cache_refusal() const noexcept;

    explicit operator bool() const noexcept { return loaded_ != nullptr; }
    const Description& description() const noexcept;  // lives as long as the engine; an empty one before load
    int device() const noexcept;

  private:
    friend class Context;
    std::shared_ptr<const internal::LoadedEngine> loaded_;
};

// How a context is made. Where images may be of several sizes, a context is for one: `height` and `width`, which the
// profile must admit; 0 stands for its usual size.
struct ContextOptions {
    int height = 0;
    int width = 0;
    bool graph = true;    // records the computation of each batch size as a CUDA graph, once it has run
    bool timing = false;  // lets times() know what the GPU did
};

// Where an output goes: `values` has room for batch * output_values(name) floats, apart from the images.
struct Output {
    const char* name;
    float* values;
};

// Seconds on the GPU's clock.
struct Times {
    double to_device = 0;
    double compute = 0;
    double to_host = 0;
};

// What one thread needs to run an engine: a stream, memory for the largest batch, pinned memory, graphs. Everything is
// allocated by create; only the first run of a batch size records a graph. A second thread that comes into infer
// meanwhile is turned away with kUsage; the other members are for the thread that runs it. Freed like an engine: before
// main ends, since CUDA may be gone when static objects are destroyed.
class Context {
  public:
    Context() noexcept;
    ~Context();
    Context(Context&&) noexcept;
    Context& operator=(Context&&) noexcept;

    // `context` is untouched unless it succeeds.
    static Status create(const Engine& engine, const ContextOptions& options, Context& context) noexcept;

    // Computes `batch` images of input_values() floats each; any number from 1. More than the engine takes at once are
    // computed in parts; fewer than it takes are filled up with copies of the last, whose answers are dropped. Returns
    // when the answers are there. After an error they are not to be used.
    Status infer(const float* input, float* output, int batch) noexcept;  // of an engine with one output
    Status infer(const float* input, const Output* outputs, std::size_t count, int batch) noexcept;  // some, by name

    explicit operator bool() const noexcept { return running_ != nullptr; }
    std::size_t input_values() const noexcept;                   // floats of one image
    std::size_t output_values(const char* name) const noexcept;  // floats of one answer; 0 for an unknown name
    const std::vector<int>& output_shape(const char* name) const noexcept;  // of one answer; empty for an unknown name
    int smallest_batch() const noexcept;                                    // computed at once
    int largest_batch() const noexcept;
    int graphs() const noexcept;                 // batch sizes that are launched as a CUDA graph by now
    const char* graph_refusal() const noexcept;  // why a batch size is not, in one line; "" where all are
    Times times() const noexcept;                // of the last infer that succeeded; zeros without `timing`

  private:
    std::unique_ptr<internal::Running> running_;
};

// SHA-256 as of FIPS 180-4.
std::array<std::uint8_t, 32> sha256(const void* data, std::size_t size) noexcept;

// How many bytes are UTF-8, before the first that is not.
std::size_t utf8_length(const void* data, std::size_t size) noexcept;

// Reads a whole file of at most `limit` bytes, once.
Status read_file(const char* path, std::size_t limit, std::vector<unsigned char>& content) noexcept;

}  // namespace repvgg

#endif  // REPVGG_ENGINE_H
