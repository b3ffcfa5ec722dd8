// "cuda" for fake tensors on a machine without CUDA: a device guard that does nothing, and hooks that
// say that there is one device. Nothing is ever computed there. fake_cuda.py compiles and loads it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
const c10::Device HERE(c10::DeviceType::CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, HERE);

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return HERE; }
  c10::Device exchangeDevice(c10::Device) const override { return HERE; }
  c10::Stream getStream(c10::Device) const noexcept override { return STREAM; }
  c10::Stream getDefaultStream(c10::Device) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return STREAM; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  long versionRuntimeCuDNN() const override { return 0; }  // a build with CUDA asks; 0: too old
};

std::unique_ptr<at::CUDAHooksInterface> make(at::CUDAHooksArgs) { return std::make_unique<Hooks>(); }
struct AtLoad {
  AtLoad() { at::CUDAHooksRegistry()->Register("CUDAHooks", make, c10::REGISTRY_PREFERRED); }
} at_load;  // to be loaded before torch is, which asks for the hooks at once
}

// To be called after torch is loaded: a build with CUDA has put its own guard in place by then.
extern "C" void take_over() {
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
