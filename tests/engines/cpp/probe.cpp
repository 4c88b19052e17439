// Drives the library in one process, where a command line would be too slow or too far away:
//
//     probe load ENGINE...            a line for each: code, message
//     probe faults ENGINE [miss]      each call of TensorRT and CUDA fails in turn, once, and from there on
//     probe allocations ENGINE        each allocation of the program fails in turn
//     probe threads ENGINE            two threads with a context each, and a context that both enter
//     probe steady ENGINE BATCH...    allocations of the program in calls of infer that have been made before
//     probe infer ENGINE BATCH...     answers of batches of numbered images, in hexadecimal floats
//     probe calls ENGINE              wrong calls, a line for each
//     probe devices ENGINE            an engine on each of two GPUs, called from a thread whose current one is a third
//     probe saving ENGINE             the runtime cache is saved while two threads run
//     probe times ENGINE              times() after calls that fail
//     probe hash FILE...              SHA-256
//     probe fault KIND                a fault that a sanitizer or the stub must see: leak, race, double free, unfreed
//
// Where PROBE_CACHE names a file, it is the runtime cache of every engine.
#include <cuda_runtime_api.h>
#include <repvgg_engine.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "stub.h"

namespace {

using repvgg::Context;
using repvgg::Engine;
using repvgg::Output;
using repvgg::Status;

// The allocation of the program under test that fails; those of the stub are not counted.
std::atomic<long> allocations{0}, failing_allocation{0};

void* allocated(std::size_t size) {
    if (stub::inside == 0 && ++allocations == failing_allocation) throw std::bad_alloc();
    return std::malloc(size > 0 ? size : 1);
}

void fail_allocation(long number) {
    allocations = 0;
    failing_allocation = number;
}

// Pixels from the image's number on, so that every image differs from every other.
std::vector<float> numbered_images(int batch, std::size_t values) {
    std::vector<float> images;
    for (int image = 0; image < batch; ++image) {
        for (std::size_t i = 0; i < values; ++i) {
            images.push_back(static_cast<float>(image % 7) - 3.0f + static_cast<float>((i * 31 + 7) % 17) / 17.0f);
        }
    }
    return images;
}

static_assert(std::is_nothrow_move_constructible_v<Context> && std::is_nothrow_move_assignable_v<Context>);
static_assert(!std::is_copy_constructible_v<Context> && std::is_nothrow_copy_constructible_v<Engine>);

repvgg::LoadOptions options() { return {0, std::getenv("PROBE_CACHE")}; }

void report(const Status& status) { std::printf("%d %s\n", static_cast<int>(status.code()), status.message()); }

struct Answers {
    std::vector<std::vector<float>> values;
};

Status infer_all(const Engine& engine, Context& context, int batch, Answers& answers) {
    const std::vector<float> images = numbered_images(batch, context.input_values());
    std::vector<Output> wanted;
    answers.values.clear();
    for (const repvgg::Tensor& output : engine.description().outputs) {
        answers.values.emplace_back(static_cast<std::size_t>(batch) * context.output_values(output.name.c_str()),
                                    -1.0f);
    }
    for (std::size_t i = 0; i < answers.values.size(); ++i) {
        wanted.push_back({engine.description().outputs[i].name.c_str(), answers.values[i].data()});
    }
    return context.infer(images.data(), wanted.data(), wanted.size(), batch);
}

// Everything once: load, create, and batches that are padded, split, and launched as a graph.
Status everything(const char* path, std::vector<Answers>& answers) {
    Engine engine;
    Status status = Engine::load(path, options(), engine);
    Context context;
    repvgg::ContextOptions timed;
    timed.timing = true;
    if (status.ok()) status = Context::create(engine, timed, context);
    for (const int batch : {1, 3, 3, 9}) {
        if (!status.ok()) break;
        answers.emplace_back();
        status = infer_all(engine, context, batch, answers.back());
    }
    if (status.ok() && std::getenv("PROBE_CACHE") != nullptr) static_cast<void>(engine.save_runtime_cache());
    return status;
}

// The runtime cache that a sound run left, which each run finds as a hit or not at all, and leaves whole or not at all.
class CacheOfFaults {
  public:
    explicit CacheOfFaults(bool hit) : hit_(hit) { static_cast<void>(read(sound_)); }
    void prepare() const {
        if (path_ != nullptr && !hit_) std::remove(path_);
    }
    bool holds() const {
        std::vector<unsigned char> found;
        return read(found) ? found == sound_ : path_ == nullptr || !hit_;
    }

  private:
    bool read(std::vector<unsigned char>& content) const {
        return path_ != nullptr && repvgg::read_file(path_, 1 << 20, content).ok();
    }

    const char* path_ = options().runtime_cache;
    bool hit_;
    std::vector<unsigned char> sound_;
};

bool same(const std::vector<Answers>& one, const std::vector<Answers>& other) {
    bool equal = one.size() == other.size();
    for (std::size_t i = 0; equal && i < one.size(); ++i) equal = one[i].values == other[i].values;
    return equal;
}

int wrong(const char* what, long number) {
    std::printf("wrong at %ld: %s\n", number, what);
    return 1;
}

// Memory that is pinned is the host's; all else that fails is the device's.
bool is_known_failure(const Status& status) {
    const bool pinned = std::strncmp(status.message(), "cudaMallocHost", 14) == 0;
    const bool of_device = status.code() == repvgg::Code::kDevice || status.code() == repvgg::Code::kDeviceMemory;
    return std::strlen(status.message()) >= 20 && (pinned ? status.code() == repvgg::Code::kHostMemory : of_device);
}

int faults(const char* path, bool hit) {
    std::vector<Answers> expected;
    stub::fail_call(0);
    if (!everything(path, expected).ok()) return wrong("the sound run", 0);
    const CacheOfFaults cache(hit);
    cache.prepare();
    stub::fail_call(0);
    std::vector<Answers> again;
    if (!everything(path, again).ok() || !same(again, expected)) return wrong("the sound run", 1);
    const long calls = stub::calls();
    long refused = 0, endured = 0;
    for (const bool forever : {false, true}) {
        for (long number = 1; number <= calls; ++number) {
            std::vector<Answers> answers;
            cache.prepare();
            stub::fail_call(number, forever);
            const Status status = everything(path, answers);
            if (!stub::has_failed()) return wrong("the failure did not come to pass", number);
            if (status.ok() && !same(answers, expected)) return wrong("other answers, and no error", number);
            if (!status.ok() && !is_known_failure(status)) return wrong(status.message(), number);
            if (cudaGetLastError() != cudaSuccess) return wrong("an error was left behind in CUDA", number);
            stub::fail_call(0);
            if (!cache.holds()) return wrong("the runtime cache", number);
            if (stub::live() != 0) return wrong("something leaked", number);
            if (stub::violations() != 0) return wrong("something a GPU would punish", number);
            ++(status.ok() ? endured : refused);
        }
    }
    std::printf("%ld calls, %ld refused, %ld endured\n", calls, refused, endured);
    return 0;
}

int failing_allocations(const char* path) {
    std::vector<Answers> expected;
    if (!everything(path, expected).ok()) return wrong("the sound run", 0);
    long refused = 0, endured = 0;
    for (long number = 1;; ++number) {
        Engine engine;
        Context context;
        std::vector<float> images(1000), scores(1000);
        if (options().runtime_cache != nullptr) std::remove(options().runtime_cache);
        fail_allocation(number);
        Status status = Engine::load(path, options(), engine);
        if (status.ok()) status = Context::create(engine, {}, context);
        for (const int batch : {3, 3, 1}) {
            if (!status.ok()) break;
            Output wanted = {"output", scores.data()};
            status = context.infer(images.data(), &wanted, 1, batch);
        }
        if (status.ok() && options().runtime_cache != nullptr) status = engine.save_runtime_cache();
        const bool happened = allocations >= failing_allocation;
        fail_allocation(0);
        if (!happened) break;
        if (!status.ok() && status.code() != repvgg::Code::kHostMemory) return wrong(status.message(), number);
        ++(status.ok() ? endured : refused);
        context = Context();
        engine = Engine();
    }
    std::printf("%ld refused, %ld endured\n", refused, endured);
    return 0;
}

int threads(const char* path) {
    Engine engine;
    Status status = Engine::load(path, options(), engine);
    if (!status.ok()) return report(status), 1;
    Context shared;
    status = Context::create(engine, {}, shared);
    std::vector<Answers> found(2);
    std::atomic<int> turned_away{0}, wrong_answers{0};
    const auto work = [&](std::size_t index) {
        Context own;
        Answers first, answers;
        if (!Context::create(engine, {}, own).ok() || !infer_all(engine, own, 5, first).ok()) ++wrong_answers;
        for (int i = 0; i < 40; ++i) {
            if (!infer_all(engine, own, 1 + i % 9, answers).ok()) ++wrong_answers;
            if (i % 9 == 4 && answers.values != first.values) ++wrong_answers;
            const Status busy = infer_all(engine, shared, 2, answers);
            if (busy.code() == repvgg::Code::kUsage) {
                ++turned_away;
            } else if (!busy.ok()) {
                ++wrong_answers;
            }
        }
        found[index] = first;
    };
    std::thread other(work, 1);
    work(0);
    other.join();
    if (wrong_answers > 0 || found[0].values != found[1].values) return wrong("answers of threads", wrong_answers);
    std::printf("two threads agree\n");
    return 0;
}

int infer(const char* path, int count, char** batches) {
    Engine engine;
    Context context;
    Status status = Engine::load(path, options(), engine);
    repvgg::ContextOptions size;
    if (const char* height = std::getenv("PROBE_HEIGHT")) size.height = std::atoi(height);
    if (const char* width = std::getenv("PROBE_WIDTH")) size.width = std::atoi(width);
    if (status.ok()) status = Context::create(engine, size, context);
    for (int i = 0; i < count && status.ok(); ++i) {
        Answers answers;
        status = infer_all(engine, context, std::atoi(batches[i]), answers);
        for (const std::vector<float>& values : answers.values) {
            for (const float value : values) std::printf("%a ", static_cast<double>(value));
            std::printf("\n");
        }
    }
    if (!status.ok()) return report(status), status.exit_code();
    std::printf("graphs %d %s\n", context.graphs(), context.graph_refusal());
    if (std::getenv("PROBE_CACHE") == nullptr) return 0;
    std::printf("compiled %ld %s\n", stub::compiled(), engine.runtime_cache_refusal());
    report(engine.save_runtime_cache());
    return 0;
}

// One engine on each of two devices; the thread's own is a third, and is it again after every call.
int devices(const char* path) {
    constexpr int kOwn = 2;
    const auto is_own = [] {
        int device = -1;
        return cudaGetDevice(&device) == cudaSuccess && device == kOwn;
    };
    if (cudaSetDevice(kOwn) != cudaSuccess) return 1;
    std::vector<Answers> answers(2);
    std::vector<Context> contexts(2);
    for (std::size_t i = 0; i < contexts.size(); ++i) {
        Engine engine;
        Status status = Engine::load(path, {static_cast<int>(i), nullptr}, engine);
        if (!is_own()) return wrong("the thread's device after load", kOwn);
        if (status.ok()) status = Context::create(engine, {}, contexts[i]);
        if (!is_own()) return wrong("the thread's device after create", kOwn);
        for (const int batch : {3, 9, 3}) {
            if (status.ok()) status = infer_all(engine, contexts[i], batch, answers[i]);
            if (!is_own()) return wrong("the thread's device after infer", kOwn);
        }
        if (!status.ok()) return report(status), 1;
        for (long number = 1; number <= 6; ++number) {
            Answers failed;
            stub::fail_call(number);
            if (infer_all(engine, contexts[i], 3, failed).ok()) return wrong("a failure that was not told", number);
            stub::fail_call(0);
            if (!is_own()) return wrong("the thread's device after a failure", number);
        }
        if (!infer_all(engine, contexts[i], 3, answers[i]).ok()) return wrong("infer after failures", kOwn);
    }
    if (answers[0].values != answers[1].values) return wrong("the answers", kOwn);
    contexts[0] = std::move(contexts[1]);
    contexts.clear();
    if (!is_own()) return wrong("the thread's device at the end", kOwn);
    std::printf("two devices agree\n");
    return 0;
}

int saving(const char* path) {
    Engine engine;
    Status status = Engine::load(path, options(), engine);
    std::atomic<int> wrong_answers{0}, working{2};
    const auto work = [&] {
        Context own;
        Answers answers;
        repvgg::ContextOptions launches;
        launches.graph = false;  // each other batch size is a new shape for its one context
        for (int i = 0; i < 60; ++i) {
            if (i % 10 == 0 && !Context::create(engine, launches, own).ok()) ++wrong_answers;
            if (!infer_all(engine, own, 2 + i % 3, answers).ok()) ++wrong_answers;
        }
        --working;
    };
    std::thread one(work), other(work);
    int saved = 0;
    for (; status.ok() && (working > 0 || saved == 0); ++saved) status = engine.save_runtime_cache();
    one.join();
    other.join();
    if (!status.ok()) return report(status), 1;
    if (wrong_answers > 0) return wrong("answers of threads", wrong_answers);
    std::printf("saved while two threads ran\n");
    return 0;
}

int steady(const char* path, int count, char** batches) {
    Engine engine;
    Context context;
    std::vector<float> images(100'000), scores(100'000);
    const Output wanted = {"output", scores.data()};
    Status status = Engine::load(path, options(), engine);
    if (status.ok()) status = Context::create(engine, {}, context);
    for (int i = 0; i < 2 * count && status.ok(); ++i) {
        if (i == count) fail_allocation(0);
        status = context.infer(images.data(), &wanted, 1, std::atoi(batches[i % count]));
    }
    const long made = allocations;
    if (!status.ok()) return report(status), status.exit_code();
    std::printf("%ld allocations, %d graphs\n", made, context.graphs());
    return 0;
}

int wrong_calls(const char* path) {
    Engine engine, none;
    Context context, empty;
    float numbers[4096] = {};
    report(Engine::load(nullptr, {}, engine));
    report(Engine::load(path, {-1, nullptr}, engine));
    report(Context::create(none, {}, context));
    report(empty.infer(numbers, numbers, 1));
    report(Engine::load(path, options(), engine));
    repvgg::ContextOptions large;
    large.height = 9999;
    report(Context::create(engine, large, context));
    report(Context::create(engine, {}, context));
    report(context.infer(numbers, numbers, 1));  // there are several outputs
    const Output unknown = {"other", numbers}, unnamed = {nullptr, numbers}, nowhere = {"output", nullptr};
    const Output good = {"output", numbers};
    report(context.infer(numbers, &unknown, 1, 1));
    report(context.infer(numbers, &unnamed, 1, 1));
    report(context.infer(numbers, &nowhere, 1, 1));
    report(context.infer(nullptr, &good, 1, 1));
    report(context.infer(numbers, &good, 0, 1));
    report(context.infer(numbers, &good, 1, 0));
    report(context.infer(numbers, &good, 1, -5));
    const Output twice[] = {good, {"output", numbers + 9}};
    report(context.infer(numbers, twice, 2, 1));
    report(engine.save_runtime_cache());
    report(none.save_runtime_cache());
    report(Status(repvgg::Code::kInternal, nullptr));
    engine = Engine();  // the context keeps it alive
    report(context.infer(numbers, &good, 1, 1));
    Context moved = std::move(context);
    report(moved.infer(numbers, &good, 1, 1));
    report(context.infer(numbers, &good, 1, 1));
    return 0;
}

// The times of the last call that succeeded stay those of it, whatever fails later.
int times(const char* path) {
    Engine engine;
    Context context;
    Answers answers;
    repvgg::ContextOptions timed;
    timed.timing = true;
    Status status = Engine::load(path, options(), engine);
    if (status.ok()) status = Context::create(engine, timed, context);
    if (status.ok()) status = infer_all(engine, context, 9, answers);
    if (!status.ok()) return report(status), 1;
    const repvgg::Times sound = context.times();
    long failures = 0;
    for (long number = 1; number <= 12; ++number) {
        stub::fail_call(number);
        failures += infer_all(engine, context, 9, answers).ok() ? 0 : 1;
        stub::fail_call(0);
        const repvgg::Times now = context.times();
        if (now.to_device != sound.to_device || now.compute != sound.compute || now.to_host != sound.to_host) {
            return wrong("the times after a failure", number);
        }
    }
    std::printf("%g %ld\n", sound.compute, failures);
    return 0;
}

int load(int count, char** paths) {
    for (int i = 0; i < count; ++i) {
        Engine engine;
        report(Engine::load(paths[i], options(), engine));
    }
    return 0;
}

int hash(int count, char** paths) {
    for (int i = 0; i < count; ++i) {
        std::vector<unsigned char> content;
        if (!repvgg::read_file(paths[i], 1 << 20, content).ok()) return 1;
        for (const unsigned byte : repvgg::sha256(content.data(), content.size())) std::printf("%02x", byte);
        std::printf("\n");
    }
    return 0;
}

// As where a decimal point is a comma; a server may have any locale.
struct Comma final : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
};

int planted(const std::string& kind) {
    void* memory = nullptr;
    if (kind == "leak") {
        for (int i = 0; i < 10; ++i) new char[100];
    } else if (kind == "race") {
        int shared = 0;
        std::thread other([&shared] { ++shared; });
        ++shared;
        other.join();
        return shared > 9 ? 1 : 0;
    } else if (cudaMalloc(&memory, 16) == cudaSuccess && kind == "double free") {
        static_cast<void>(cudaFree(memory));
        static_cast<void>(cudaFree(memory));
    }
    return 0;
}

}  // namespace

void* operator new(std::size_t size) { return allocated(size); }
void* operator new[](std::size_t size) { return allocated(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

int main(int count, char** texts) {
    const std::string what = count > 2 ? texts[1] : "";
    if (std::getenv("PROBE_COMMA") != nullptr) std::locale::global(std::locale(std::locale(), new Comma));
    if (what == "load") return load(count - 2, texts + 2);
    if (what == "faults") return faults(texts[2], count == 3);
    if (what == "devices") return devices(texts[2]);
    if (what == "saving") return saving(texts[2]);
    if (what == "allocations") return failing_allocations(texts[2]);
    if (what == "threads") return threads(texts[2]);
    if (what == "steady") return steady(texts[2], count - 3, texts + 3);
    if (what == "infer") return infer(texts[2], count - 3, texts + 3);
    if (what == "calls") return wrong_calls(texts[2]);
    if (what == "fault") return planted(texts[2]);
    if (what == "times") return times(texts[2]);
    if (what == "hash") return hash(count - 2, texts + 2);
    return 2;
}
