// What a CPU build of torch lacks to accept CUDA tensors without memory (FakeTensorMode): a device guard, hooks, and an
// allocator of "page-locked" memory, which is ordinary memory that is remembered. Nothing here needs a GPU.
//
// The library must be loaded before torch, with RTLD_GLOBAL: its getAccelerator then takes the place of torch's own.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>

namespace {

const c10::Device kGpu(c10::DeviceType::CUDA, 0);

// ---- page-locked memory: begin -> end of each block

std::mutex lock;
std::map<uintptr_t, uintptr_t> blocks;

void remember(const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  blocks[reinterpret_cast<uintptr_t>(begin)] = reinterpret_cast<uintptr_t>(begin) + bytes;
}

bool is_locked(const void* address) {
  std::lock_guard<std::mutex> guard(lock);
  auto value = reinterpret_cast<uintptr_t>(address);
  auto after = blocks.upper_bound(value);
  return after != blocks.begin() && value < std::prev(after)->second;
}

void release(void* begin) {
  {
    std::lock_guard<std::mutex> guard(lock);
    blocks.erase(reinterpret_cast<uintptr_t>(begin));
  }
  std::free(begin);
}

struct LockedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* begin = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (begin) {
      remember(begin, bytes);
    }
    return {begin, begin, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

LockedAllocator allocator;

// ---- one device, one stream, on which everything is done at once

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kGpu.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex current_device() const override { return 0; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(at::DeviceIndex) const override {}
  at::DeviceIndex exchangeDevice(at::DeviceIndex) const override { return 0; }
  at::DeviceIndex maybeExchangeDevice(at::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* address) const override { return is_locked(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &allocator; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks) // torch looks the name up
namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
} // namespace accelerator
} // namespace at

// What cudaHostRegister would do.
extern "C" void lock_pages(const void* begin, size_t bytes) {
  remember(begin, bytes);
}
