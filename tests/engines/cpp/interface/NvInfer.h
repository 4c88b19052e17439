// The names of TensorRT that engines/cpp uses, and no others, with the signatures and values of the real headers: those
// of TensorRT 10.13 with STUB_FULL_TENSORRT, else those of TensorRT for RTX 1.7. Where the real classes call a hidden
// implementation, these are abstract: a program that compiles against one compiles against the other.
#ifndef REPVGG_STUB_NVINFER_H
#define REPVGG_STUB_NVINFER_H

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#ifdef STUB_FULL_TENSORRT
#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 13
#define NV_TENSORRT_PATCH 3
#define NV_TENSORRT_BUILD 9
#else
#define TRT_MAJOR_RTX 1
#define NV_TENSORRT_MAJOR 1
#define NV_TENSORRT_MINOR 7
#define NV_TENSORRT_PATCH 1
#define NV_TENSORRT_BUILD 116
#endif

namespace nvinfer1 {

using AsciiChar = char;

class Dims64 {
  public:
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1 };
enum class TensorLocation : int32_t { kDEVICE = 0, kHOST = 1 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1 };
enum class OptProfileSelector : int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };
enum class ExecutionContextAllocationStrategy : int32_t { kSTATIC = 0, kON_PROFILE_CHANGE = 1, kUSER_MANAGED = 2 };

class ILogger {
  public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, AsciiChar const* msg) noexcept = 0;
    ILogger() = default;
    virtual ~ILogger() = default;

  protected:
    ILogger(ILogger const&) = default;
    ILogger& operator=(ILogger const&) & = default;
};

class INoCopy {
  protected:
    INoCopy() = default;
    virtual ~INoCopy() = default;
    INoCopy(INoCopy const&) = delete;
    INoCopy& operator=(INoCopy const&) = delete;
};

#ifdef TRT_MAJOR_RTX
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };

class IHostMemory : public INoCopy {
  public:
    ~IHostMemory() noexcept override = default;
    virtual void* data() const noexcept = 0;
    virtual std::size_t size() const noexcept = 0;
};

class IRuntimeCache : public INoCopy {
  public:
    ~IRuntimeCache() noexcept override = default;
    virtual IHostMemory* serialize() const noexcept = 0;
    virtual bool deserialize(void const* blob, size_t size) noexcept = 0;
};
#endif

class IRuntimeConfig : public INoCopy {
  public:
    ~IRuntimeConfig() noexcept override = default;
    virtual void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept = 0;
#ifdef TRT_MAJOR_RTX
    virtual void setDynamicShapesKernelSpecializationStrategy(
        DynamicShapesKernelSpecializationStrategy strategy) noexcept = 0;
    virtual IRuntimeCache* createRuntimeCache() const noexcept = 0;
    virtual bool setRuntimeCache(IRuntimeCache const& cache) noexcept = 0;
#endif
};

class IExecutionContext : public INoCopy {
  public:
    ~IExecutionContext() noexcept override = default;
    virtual void setDeviceMemoryV2(void* memory, int64_t size) noexcept = 0;
    virtual bool setInputShape(char const* tensorName, Dims const& dims) noexcept = 0;
    virtual Dims getTensorShape(char const* tensorName) const noexcept = 0;
    virtual bool setTensorAddress(char const* tensorName, void* data) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
#ifdef TRT_MAJOR_RTX
    virtual bool isStreamCapturable(cudaStream_t stream) const noexcept = 0;
#endif
};

class ICudaEngine : public INoCopy {
  public:
    ~ICudaEngine() noexcept override = default;
    virtual int32_t getNbIOTensors() const noexcept = 0;
    virtual Dims getTensorShape(char const* tensorName) const noexcept = 0;
    virtual DataType getTensorDataType(char const* tensorName) const noexcept = 0;
    virtual TensorLocation getTensorLocation(char const* tensorName) const noexcept = 0;
    virtual TensorIOMode getTensorIOMode(char const* tensorName) const noexcept = 0;
    virtual TensorFormat getTensorFormat(char const* tensorName) const noexcept = 0;
    virtual Dims getProfileShape(char const* tensorName, int32_t profileIndex,
                                 OptProfileSelector select) const noexcept = 0;
    virtual int64_t getDeviceMemorySizeV2() const noexcept = 0;
    virtual IRuntimeConfig* createRuntimeConfig() noexcept = 0;
    virtual IExecutionContext* createExecutionContext(IRuntimeConfig* runtimeConfig) noexcept = 0;
};

class IRuntime : public INoCopy {
  public:
    ~IRuntime() noexcept override = default;
    virtual ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept = 0;
};

}  // namespace nvinfer1

extern "C" void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept;
extern "C" int32_t getInferLibMajorVersion() noexcept;
extern "C" int32_t getInferLibMinorVersion() noexcept;
extern "C" int32_t getInferLibPatchVersion() noexcept;
extern "C" int32_t getInferLibBuildVersion() noexcept;

namespace nvinfer1 {

inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    return static_cast<IRuntime*>(
        createInferRuntime_INTERNAL(&logger, NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100 + NV_TENSORRT_PATCH));
}

}  // namespace nvinfer1

#endif  // REPVGG_STUB_NVINFER_H
