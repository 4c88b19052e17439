// TensorRT and the CUDA runtime in host memory, for the names in interface/.
//
// Work is queued by its stream and done when the stream is waited for, as on a GPU, so that whoever does not wait reads
// what is not there yet. Time is pretended: a copy takes a nanosecond per byte, a computation what the engine says.
// Memory of the "device" is filled with NaN at first. An engine file is a header as engines/plan.py has it, then text:
//
//     stub 1                             activations 4096               nanoseconds 1000 (per image)
//     input NAME RANK EXTENTS            -1 where an extent is free
//     profile MIN OPT MAX                three shapes
//     linear NAME CLASSES WEIGHTS        an output: the matrix (classes, channels) times each channel's mean
//     affine NAME FACTOR TERM            an output of the input's shape
//     fault KIND NAME                    nan, swap, half, host, vector, fixed: something is wrong with this output
//     uncapturable                       the work cannot be recorded
//     jitter FRACTION                    computations take in turn so much more and less
//
// TensorRT for RTX compiles a kernel when a context runs a shape for the first time, unless the runtime cache has it. A
// serialized cache is a line with the version and driver, then a line for each kernel.
//
// Environment: STUB_DEVICES (1), STUB_CARD (86), STUB_VERSION, STUB_DRIVER (1), STUB_FAIL_CALL. A process that leaks,
// or did what a real GPU would punish, says so on stderr at its end and exits with 86.
#include "stub.h"

#include <NvInfer.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <locale>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace stub {

thread_local int inside = 0;

}  // namespace stub

namespace {

struct Inside {
    Inside() { ++stub::inside; }
    ~Inside() { --stub::inside; }
};

// Counted without an order among threads, which would hide the races of the program under test.
class Counter {
  public:
    void operator++() { number_.fetch_add(1, std::memory_order_relaxed); }
    void operator--() { number_.fetch_sub(1, std::memory_order_relaxed); }
    long next() { return number_.fetch_add(1, std::memory_order_relaxed) + 1; }
    void operator=(long number) { number_.store(number, std::memory_order_relaxed); }
    operator long() const { return number_.load(std::memory_order_relaxed); }

  private:
    std::atomic<long> number_{0};
};

Counter live_count, violation_count, call_count, failing_call, fails_forever, failure_happened, compiled_count;

void violated(const char* what) {
    ++violation_count;
    std::fprintf(stderr, "stub: %s\n", what);
}

thread_local cudaError_t last_error = cudaSuccess;

// Whether this call is the one to fail; `error` is then this thread's last one.
bool fails(cudaError_t error = cudaErrorUnknown) {
    const long call = call_count.next(), failing = failing_call;
    const bool now = failing > 0 && (call == failing || (fails_forever != 0 && call > failing));
    if (!now) return false;
    failure_happened = 1;
    last_error = error;
    return true;
}

int number_from_environment(const char* name, int usual) {
    const char* text = std::getenv(name);
    return text == nullptr ? usual : std::atoi(text);
}

void report_at_exit() {
    if (live_count != 0) violated("something was never freed");
    if (violation_count != 0) _exit(86);
}

const bool prepared = [] {
    failing_call = number_from_environment("STUB_FAIL_CALL", 0);
    return std::atexit(report_at_exit) == 0;
}();

// ------------------------------------------------------------------------------------------------------------ memory

enum class Place { kDevice, kPinned };

struct Block {
    std::size_t size;
    Place place;
    int device;
};

std::mutex blocks_mutex;
std::map<const char*, Block> blocks;
thread_local int current_device = 0;

bool is_in_block(const void* address, std::size_t size, Place place) {
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    const char* start = static_cast<const char*>(address);
    auto after = blocks.upper_bound(start);
    if (after == blocks.begin()) return false;
    const auto& [first, block] = *std::prev(after);
    return block.place == place && start + size <= first + block.size;
}

cudaError_t allocate(void** memory, std::size_t size, Place place) {
    const Inside inside;
    if (fails(cudaErrorMemoryAllocation)) return cudaErrorMemoryAllocation;
    void* made = std::malloc(size);
    std::memset(made, 0xff, size);
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    blocks[static_cast<char*>(made)] = {size, place, current_device};
    ++live_count;
    *memory = made;
    return cudaSuccess;
}

cudaError_t give_back(void* memory, Place place) {
    const Inside inside;
    const std::lock_guard<std::mutex> lock(blocks_mutex);
    const auto found = blocks.find(static_cast<char*>(memory));
    if (found == blocks.end() || found->second.place != place) {
        violated("memory was freed that is not allocated");
        return cudaErrorInvalidValue;
    }
    if (found->second.device != current_device) violated("memory was freed on another device");
    blocks.erase(found);
    --live_count;
    std::free(memory);
    return cudaSuccess;
}

}  // namespace

// ----------------------------------------------------------------------------------------------- streams and graphs

using Work = std::function<void(CUstream_st&)>;

struct CUstream_st {
    int device = current_device;
    std::vector<Work> queue, captured;
    bool capturing = false, broken = false, odd = false;
    double nanoseconds = 0;
};
struct CUevent_st {
    double nanoseconds = -1;
};
struct CUgraph_st {
    std::vector<Work> work;
};
struct CUgraphExec_st {
    std::vector<Work> work;
};

namespace {

void enqueue(cudaStream_t stream, Work work) {
    if (stream->device != current_device) violated("a stream was used on another device");
    (stream->capturing ? stream->captured : stream->queue).push_back(std::move(work));
}

void run_queue(CUstream_st& stream) {
    for (const Work& work : std::exchange(stream.queue, {})) work(stream);
}

template <typename Handle>
cudaError_t make(Handle** handle) {
    if (fails()) return cudaErrorUnknown;
    *handle = new Handle;
    ++live_count;
    return cudaSuccess;
}

template <typename Handle>
cudaError_t destroy(Handle* handle) {
    const Inside inside;
    delete handle;
    --live_count;
    return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    const Inside inside;
    if (fails()) return cudaErrorUnknown;
    *count = number_from_environment("STUB_DEVICES", 1);
    return *count < 0 ? cudaErrorInsufficientDriver : *count == 0 ? cudaErrorNoDevice : cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attr, int device) {
    const Inside inside;
    if (fails()) return cudaErrorUnknown;
    if (device >= number_from_environment("STUB_DEVICES", 1)) return cudaErrorInvalidDevice;
    const int card = number_from_environment("STUB_CARD", 86);
    *value = attr == cudaDevAttrComputeCapabilityMajor ? card / 10 : card % 10;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    if (fails()) return cudaErrorUnknown;
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (fails()) return cudaErrorUnknown;
    if (device < 0 || device >= number_from_environment("STUB_DEVICES", 1)) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorInsufficientDriver:
            return "cudaErrorInsufficientDriver";
        case cudaErrorNoDevice:
            return "cudaErrorNoDevice";
        default:
            return "cudaErrorUnknown";
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "unknown error";
}

cudaError_t cudaMalloc(void** devPtr, size_t size) { return allocate(devPtr, size, Place::kDevice); }
cudaError_t cudaFree(void* devPtr) { return give_back(devPtr, Place::kDevice); }
cudaError_t cudaMallocHost(void** ptr, size_t size) { return allocate(ptr, size, Place::kPinned); }
cudaError_t cudaFreeHost(void* ptr) { return give_back(ptr, Place::kPinned); }

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t count, cudaMemcpyKind kind, cudaStream_t stream) {
    const Inside inside;
    if (fails()) return cudaErrorUnknown;
    const bool to_device = kind == cudaMemcpyHostToDevice;
    enqueue(stream, [=](CUstream_st& on) {
        if (!is_in_block(dst, count, to_device ? Place::kDevice : Place::kPinned) ||
            !is_in_block(src, count, to_device ? Place::kPinned : Place::kDevice)) {
            return violated("a copy leaves its buffers, or its host memory is not pinned");
        }
        std::memcpy(dst, src, count);
        on.nanoseconds += static_cast<double>(count);
    });
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* pStream, unsigned int flags) {
    const Inside inside;
    if (flags != cudaStreamNonBlocking) violated("a stream that waits for the default stream");
    return make(pStream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (!stream->queue.empty() || stream->capturing) violated("a stream was destroyed while it had work");
    return destroy(stream);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const Inside inside;
    if (stream->capturing) {
        stream->broken = true;
        return cudaErrorStreamCaptureInvalidated;
    }
    run_queue(*stream);
    return fails() ? cudaErrorUnknown : cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (fails()) return cudaErrorUnknown;
    stream->capturing = true;
    stream->broken = false;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* pGraph) {
    const Inside inside;
    if (!stream->capturing) violated("a capture was ended that was not begun");
    stream->capturing = false;
    std::vector<Work> work = std::exchange(stream->captured, {});
    if (stream->broken) return cudaErrorStreamCaptureInvalidated;
    const cudaError_t error = make(pGraph);
    if (error == cudaSuccess) (*pGraph)->work = std::move(work);
    return error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
    const Inside inside;
    return make(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const Inside inside;
    if (fails()) return cudaErrorUnknown;
    enqueue(stream, [event](CUstream_st& on) { event->nanoseconds = on.nanoseconds; });
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    if (fails()) return cudaErrorUnknown;
    if (start->nanoseconds < 0 || end->nanoseconds < 0) violated("events were asked that are not recorded");
    *ms = static_cast<float>((end->nanoseconds - start->nanoseconds) / 1e6);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* pGraphExec, cudaGraph_t graph, unsigned long long) {
    const Inside inside;
    const cudaError_t error = make(pGraphExec);
    if (error == cudaSuccess) (*pGraphExec)->work = graph->work;
    return error;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graphExec, cudaStream_t stream) {
    const Inside inside;
    if (fails()) return cudaErrorUnknown;
    for (const Work& work : graphExec->work) enqueue(stream, work);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy(graph); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graphExec) { return destroy(graphExec); }

}  // extern "C"

// ---------------------------------------------------------------------------------------------------------- TensorRT

namespace {

using nvinfer1::Dims;

constexpr std::size_t kHeaderBytes = 64;

struct Counted {
    Counted() { ++live_count; }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;
    ~Counted() { --live_count; }
};

bool refused(nvinfer1::ILogger* logger, const char* call, cudaError_t error = cudaErrorUnknown) {
    if (!fails(error)) return false;
    logger->log(nvinfer1::ILogger::Severity::kWARNING, "a warning that is nobody's reason");
    logger->log(nvinfer1::ILogger::Severity::kERROR, call);
    return true;
}

struct OutputOfStub {
    std::string name;
    bool linear = false;
    int classes = 0;
    std::vector<float> weights;
    float factor = 0, term = 0;
    std::vector<std::string> faults;

    bool has(const char* fault) const { return std::find(faults.begin(), faults.end(), fault) != faults.end(); }
};

struct Network {
    std::string input;
    Dims form{};
    std::array<Dims, 3> profile{};
    std::vector<OutputOfStub> outputs;
    std::int64_t activations = 1;
    double nanoseconds = 0, jitter = 0;
    bool capturable = true;

    const OutputOfStub* output(const char* name) const {
        const auto found =
            std::find_if(outputs.begin(), outputs.end(), [name](const auto& o) { return o.name == name; });
        return found == outputs.end() ? nullptr : &*found;
    }

    // Of `name`, where the input has this shape.
    Dims shape_of(const char* name, const Dims& shape) const {
        const OutputOfStub* found = output(name);
        if (found == nullptr) return name == input ? shape : Dims{-1, {}};
        if (found->has("fixed")) return Dims{2, {1, found->classes}};
        return found->linear ? Dims{2, {shape.d[0], found->classes}} : shape;
    }
};

void read_dims(std::istream& text, Dims& dims, std::int32_t rank) {
    dims.nbDims = std::clamp(rank, 0, Dims::MAX_DIMS);
    for (int i = 0; i < dims.nbDims; ++i) text >> dims.d[i];
}

// False for what is no engine of the stub.
bool read_network(const void* blob, std::size_t size, Network& network) {
    if (size < kHeaderBytes) return false;
    std::istringstream text(std::string(static_cast<const char*>(blob) + kHeaderBytes, size - kHeaderBytes));
    text.imbue(std::locale::classic());
    std::string word;
    int version = 0;
    if (!(text >> word >> version) || word != "stub" || version != 1) return false;
    while (text >> word) {
        if (word == "activations") text >> network.activations;
        if (word == "nanoseconds") text >> network.nanoseconds;
        if (word == "jitter") text >> network.jitter;
        if (word == "uncapturable") network.capturable = false;
        if (word == "input") {
            int rank = 0;
            text >> network.input >> rank;
            read_dims(text, network.form, rank);
        }
        if (word == "profile") {
            for (Dims& dims : network.profile) read_dims(text, dims, network.form.nbDims);
        }
        if (word == "linear" || word == "affine") {
            OutputOfStub output;
            output.linear = word == "linear";
            text >> output.name;
            if (output.linear) {
                text >> output.classes;
                output.weights.resize(static_cast<std::size_t>(output.classes * network.form.d[1]));
                for (float& weight : output.weights) text >> weight;
            } else {
                text >> output.factor >> output.term;
            }
            network.outputs.push_back(output);
        }
        if (word == "fault") {
            std::string kind, name;
            text >> kind >> name;
            for (OutputOfStub& output : network.outputs) {
                if (output.name == name) output.faults.push_back(kind);
            }
        }
        if (text.fail()) return false;
    }
    return !network.input.empty();
}

std::size_t volume(const Dims& dims) {
    std::size_t values = 1;
    for (int i = 0; i < dims.nbDims; ++i) values *= static_cast<std::size_t>(dims.d[i]);
    return values;
}

// One row of an output.
void compute_row(const OutputOfStub& output, const float* image, const Dims& shape, float* answer) {
    const std::size_t channels = static_cast<std::size_t>(shape.d[1]),
                      values = volume(shape) / static_cast<std::size_t>(shape.d[0]);
    const std::size_t pixels = values / channels;
    if (!output.linear) {
        for (std::size_t i = 0; i < values; ++i) answer[i] = output.factor * image[i] + output.term;
        return;
    }
    for (std::size_t k = 0; k < static_cast<std::size_t>(output.classes); ++k) {
        double sum = 0;
        for (std::size_t c = 0; c < channels; ++c) {
            double mean = 0;
            for (std::size_t i = 0; i < pixels; ++i) mean += image[c * pixels + i];
            sum += mean / static_cast<double>(pixels) * output.weights[k * channels + c];
        }
        answer[k] = static_cast<float>(sum);
    }
}

void compute(const OutputOfStub& output, const float* images, const Dims& shape, float* answers, std::size_t width) {
    const auto rows = static_cast<std::size_t>(shape.d[0]);
    const std::size_t values = volume(shape) / rows;
    for (std::size_t row = 0; row < rows; ++row) {
        const std::size_t place = output.has("swap") ? rows - 1 - row : row;
        compute_row(output, images + row * values, shape, answers + place * width);
    }
    if (output.has("nan")) answers[rows * width - 1] = std::nanf("");
}

int32_t version_part(std::size_t index) {
    const char* said = std::getenv("STUB_VERSION");
    std::array<int, 4> parts = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD};
    if (said != nullptr) std::sscanf(said, "%d.%d.%d.%d", &parts[0], &parts[1], &parts[2], &parts[3]);
    return parts[index];
}

#ifdef TRT_MAJOR_RTX
class StubMemory final : public nvinfer1::IHostMemory, Counted {
  public:
    explicit StubMemory(std::string content) : content_(std::move(content)) {}
    void* data() const noexcept override { return const_cast<char*>(content_.data()); }
    std::size_t size() const noexcept override { return content_.size(); }

  private:
    std::string content_;
};

// Contexts of several threads may put kernels into it at once; whether it may be serialized meanwhile nobody says.
class StubCache final : public nvinfer1::IRuntimeCache, Counted {
  public:
    explicit StubCache(nvinfer1::ILogger* logger) : logger_(logger) {}
    ~StubCache() noexcept override {
        if (users_ != 0) violated("a runtime cache was destroyed before what uses it");
    }

    nvinfer1::IHostMemory* serialize() const noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in serialize")) return nullptr;
        if (compiling_ != 0) violated("a runtime cache was serialized while kernels were compiled");
        std::string content = environment();
        for (const std::string& kernel : kernels_) content += kernel + "\n";
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        if (compiling_ != 0) violated("kernels were compiled while a runtime cache was serialized");
        return new StubMemory(content);
    }

    bool deserialize(void const* blob, size_t size) noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in deserialize")) return false;
        std::istringstream text(std::string(static_cast<const char*>(blob), size));
        std::string line;
        if (!std::getline(text, line) || line + "\n" != environment()) {
            logger_->log(nvinfer1::ILogger::Severity::kERROR, "the cache is of another environment");
            last_error = cudaErrorInvalidValue;
            return false;
        }
        while (std::getline(text, line)) kernels_.insert(line);
        return true;
    }

    // Whether it had the kernel already.
    bool take(const std::string& kernel) {
        be_busy();
        const std::lock_guard<std::mutex> lock(mutex_);
        return !kernels_.insert(kernel).second;
    }

    // As while something is compiled into it.
    void be_busy() {
        ++compiling_;
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        --compiling_;
    }

    mutable Counter users_;  // configurations and contexts

  private:
    static std::string environment() {
        return "stub kernels " + std::to_string(version_part(3)) + " " +
               std::to_string(number_from_environment("STUB_DRIVER", 1)) + "\n";
    }

    nvinfer1::ILogger* logger_;
    std::mutex mutex_;
    std::set<std::string> kernels_;
    Counter compiling_;
};
#endif

class StubConfig final : public nvinfer1::IRuntimeConfig, Counted {
  public:
    explicit StubConfig(nvinfer1::ILogger* logger) : logger_(logger) {}
    void setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy given) noexcept override {
        user_managed = given == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
    }
#ifdef TRT_MAJOR_RTX
    void setDynamicShapesKernelSpecializationStrategy(
        nvinfer1::DynamicShapesKernelSpecializationStrategy given) noexcept override {
        eager = given == nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER;
    }

    nvinfer1::IRuntimeCache* createRuntimeCache() const noexcept override {
        const Inside inside;
        return refused(logger_, "planted in createRuntimeCache") ? nullptr : new StubCache(logger_);
    }

    bool setRuntimeCache(nvinfer1::IRuntimeCache const& given) noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in setRuntimeCache")) return false;
        cache = const_cast<StubCache*>(static_cast<const StubCache*>(&given));
        ++cache->users_;
        return true;
    }

    ~StubConfig() noexcept override {
        if (cache != nullptr) --cache->users_;
    }

    StubCache* cache = nullptr;
    bool eager = false;
#else
    bool eager = true;
#endif
    bool user_managed = false;

  private:
    nvinfer1::ILogger* logger_;
};

// Complains where two threads are in one at once, and stays long enough to meet another.
class OneAtATime {
  public:
    explicit OneAtATime(std::atomic<bool>& taken) : taken_(taken) {
        if (taken_.exchange(true)) violated("two threads made or freed contexts of one engine at once");
        std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    OneAtATime(const OneAtATime&) = delete;
    OneAtATime& operator=(const OneAtATime&) = delete;
    ~OneAtATime() { taken_ = false; }

  private:
    std::atomic<bool>& taken_;
};

class StubContext final : public nvinfer1::IExecutionContext, Counted {
  public:
    StubContext(const Network& network, const StubConfig& config, nvinfer1::ILogger* logger,
                std::atomic<long>& contexts, std::atomic<bool>& changing)
        : network_(network), logger_(logger), contexts_(contexts), changing_(changing) {
        ++contexts_;
#ifdef TRT_MAJOR_RTX
        cache_ = config.cache;
        if (cache_ == nullptr) return;
        ++cache_->users_;
        cache_->be_busy();
#else
        static_cast<void>(config);
#endif
    }
    ~StubContext() noexcept override {
#ifdef TRT_MAJOR_RTX
        if (cache_ != nullptr) --cache_->users_;
#endif
        if (queued_ != 0) violated("a context was destroyed before its work was done");
        const OneAtATime turn(changing_);
        --contexts_;
    }

    void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
        if (size < network_.activations || !is_in_block(memory, static_cast<std::size_t>(size), Place::kDevice)) {
            violated("a context was given too little memory");
        }
        activations_ = memory;
    }

    bool setInputShape(char const* tensorName, Dims const& dims) noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in setInputShape") || network_.input != tensorName) return false;
        for (int i = 0; i < dims.nbDims; ++i) {
            if (dims.d[i] < network_.profile[0].d[i] || dims.d[i] > network_.profile[2].d[i]) return false;
        }
        shape_ = dims;
        return dims.nbDims == network_.form.nbDims;
    }

    Dims getTensorShape(char const* tensorName) const noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in getTensorShape")) return Dims{-1, {}};
        return network_.shape_of(tensorName, shape_);
    }

    bool setTensorAddress(char const* tensorName, void* data) noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in setTensorAddress")) return false;
        addresses_[tensorName] = static_cast<float*>(data);
        return true;
    }

    bool enqueueV3(cudaStream_t stream) noexcept override {
        const Inside inside;
        if (refused(logger_, "planted in enqueueV3")) {
            // A real one may have launched some of its kernels.
            if (stream->capturing) return false;
            ++queued_;
            enqueue(stream, [this](CUstream_st&) { --queued_; });
            return false;
        }
        if (addresses_.size() != 1 + network_.outputs.size() || shape_.nbDims == 0 || activations_ == nullptr) {
            violated("enqueueV3 before every address, shape and memory was set");
            return false;
        }
        if (stream->capturing && (!network_.capturable || std::memcmp(&settled_, &shape_, sizeof(Dims)) != 0)) {
            stream->broken = true;  // a new shape makes a real context do what cannot be recorded
            return network_.capturable;
        }
        if (std::memcmp(&settled_, &shape_, sizeof(Dims)) != 0) compile();
        settled_ = shape_;
        const int counted = stream->capturing ? 0 : 1;
        queued_ += counted;
        enqueue(stream, [this, counted, shape = shape_, addresses = addresses_](CUstream_st& on) {
            queued_ -= counted;
            work(on, shape, addresses);
        });
        return true;
    }

#ifdef TRT_MAJOR_RTX
    bool isStreamCapturable(cudaStream_t) const noexcept override { return network_.capturable && !fails(); }
#endif

  private:
    // The kernels for `shape_`, unless they were compiled before.
    void compile() {
#ifdef TRT_MAJOR_RTX
        std::string kernel = "kernel";
        for (int i = 0; i < shape_.nbDims; ++i) kernel += " " + std::to_string(shape_.d[i]);
        if (cache_ != nullptr && cache_->take(kernel)) return;
#endif
        ++compiled_count;
    }

    void work(CUstream_st& on, const Dims& shape, const std::map<std::string, float*>& addresses) const {
        const float* images = addresses.at(network_.input);
        bool fits = is_in_block(images, 4 * volume(shape), Place::kDevice);
        std::memset(activations_, 0, static_cast<std::size_t>(network_.activations));
        for (const OutputOfStub& output : network_.outputs) {
            const std::size_t values = volume(network_.shape_of(output.name.c_str(), shape));
            float* answers = addresses.at(output.name);
            fits = fits && is_in_block(answers, 4 * values, Place::kDevice);
            if (fits) compute(output, images, shape, answers, values / static_cast<std::size_t>(shape.d[0]));
        }
        if (!fits) violated("a computation leaves its buffers");
        on.odd = !on.odd;
        on.nanoseconds +=
            network_.nanoseconds * static_cast<double>(shape.d[0]) * (1 + (on.odd ? 1 : -1) * network_.jitter);
    }

    const Network& network_;
    nvinfer1::ILogger* logger_;
    std::atomic<long>& contexts_;
    std::atomic<bool>& changing_;
    int queued_ = 0;
    Dims shape_{}, settled_{};
    std::map<std::string, float*> addresses_;
    void* activations_ = nullptr;
#ifdef TRT_MAJOR_RTX
    StubCache* cache_ = nullptr;
#endif
};

class StubEngine final : public nvinfer1::ICudaEngine, Counted {
  public:
    StubEngine(Network network, nvinfer1::ILogger* logger) : network_(std::move(network)), logger_(logger) {}
    ~StubEngine() noexcept override {
        if (contexts_ != 0) violated("an engine was destroyed before its contexts");
    }

    int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(1 + network_.outputs.size()); }
    Dims getTensorShape(char const* tensorName) const noexcept override {
        return network_.shape_of(tensorName, network_.form);
    }
    nvinfer1::DataType getTensorDataType(char const* tensorName) const noexcept override {
        return has(tensorName, "half") ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kFLOAT;
    }
    nvinfer1::TensorLocation getTensorLocation(char const* tensorName) const noexcept override {
        return has(tensorName, "host") ? nvinfer1::TensorLocation::kHOST : nvinfer1::TensorLocation::kDEVICE;
    }
    nvinfer1::TensorFormat getTensorFormat(char const* tensorName) const noexcept override {
        return has(tensorName, "vector") ? nvinfer1::TensorFormat::kCHW2 : nvinfer1::TensorFormat::kLINEAR;
    }
    nvinfer1::TensorIOMode getTensorIOMode(char const* tensorName) const noexcept override {
        if (network_.output(tensorName) != nullptr) return nvinfer1::TensorIOMode::kOUTPUT;
        return network_.input == tensorName ? nvinfer1::TensorIOMode::kINPUT : nvinfer1::TensorIOMode::kNONE;
    }
    Dims getProfileShape(char const*, int32_t, nvinfer1::OptProfileSelector select) const noexcept override {
        return network_.profile[static_cast<std::size_t>(select)];
    }
    int64_t getDeviceMemorySizeV2() const noexcept override { return network_.activations; }

    nvinfer1::IRuntimeConfig* createRuntimeConfig() noexcept override {
        const Inside inside;
        return refused(logger_, "planted in createRuntimeConfig") ? nullptr : new StubConfig(logger_);
    }

    nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::IRuntimeConfig* runtimeConfig) noexcept override {
        const Inside inside;
        const auto* config = static_cast<StubConfig*>(runtimeConfig);
        if (!config->eager || !config->user_managed) violated("a context was made with another configuration");
        const OneAtATime turn(changing_);
        if (refused(logger_, "planted in createExecutionContext", cudaErrorMemoryAllocation)) return nullptr;
        return new StubContext(network_, *config, logger_, contexts_, changing_);
    }

  private:
    bool has(const char* name, const char* fault) const {
        const OutputOfStub* output = network_.output(name);
        return output != nullptr && output->has(fault);
    }

    Network network_;
    nvinfer1::ILogger* logger_;
    std::atomic<long> contexts_{0};
    std::atomic<bool> changing_{false};
};

class StubRuntime final : public nvinfer1::IRuntime, Counted {
  public:
    explicit StubRuntime(nvinfer1::ILogger* logger) : logger_(logger) {}

    nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        const Inside inside;
        Network network;
        if (refused(logger_, "planted in deserializeCudaEngine")) return nullptr;
        if (!read_network(blob, size, network)) {
            logger_->log(nvinfer1::ILogger::Severity::kERROR, "this is no engine of the stub");
            return nullptr;
        }
        return new StubEngine(network, logger_);
    }

  private:
    nvinfer1::ILogger* logger_;
};

}  // namespace

extern "C" {

void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
    const Inside inside;
    if (version != NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH) violated("another version");
    auto* told = static_cast<nvinfer1::ILogger*>(logger);
    if (refused(told, "planted in createInferRuntime")) return nullptr;
    return static_cast<nvinfer1::IRuntime*>(new StubRuntime(told));
}

int32_t getInferLibMajorVersion() noexcept { return version_part(0); }
int32_t getInferLibMinorVersion() noexcept { return version_part(1); }
int32_t getInferLibPatchVersion() noexcept { return version_part(2); }
int32_t getInferLibBuildVersion() noexcept { return version_part(3); }

}  // extern "C"

namespace stub {

void fail_call(long number, bool forever) {
    call_count = 0;
    failure_happened = 0;
    compiled_count = 0;
    fails_forever = forever ? 1 : 0;
    failing_call = number;
}

bool has_failed() { return failure_happened != 0; }
long calls() { return call_count; }
long live() { return live_count; }
long violations() { return violation_count; }
long compiled() { return compiled_count; }

}  // namespace stub
