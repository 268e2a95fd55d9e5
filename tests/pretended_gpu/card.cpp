// A pretended CUDA card for a CPU build of PyTorch, registered with torch's dispatcher.
//
// Device memory is host memory and every operator runs the CPU's kernel on it, so values are the
// CPU's. What a card refuses is refused: arguments on two devices, and a CPU generator for a device
// tensor. Bytes that tensors hold are counted for each card, with a peak and an optional limit, and
// so is everything for which a program would wait for a card.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

using at::Device;
using at::Tensor;
using c10::DeviceIndex;
using c10::DispatchKeySet;
using c10::IValue;

constexpr auto kCard = c10::DeviceType::CUDA;
constexpr size_t kMostCards = 16;
constexpr size_t kAlignment = 64;
constexpr size_t kBytesOfCard = size_t{24} << 30;

// ---- the cards ----------------------------------------------------------------------------------

struct Card {
  std::atomic<size_t> held{0};
  std::atomic<size_t> peak{0};
  std::atomic<size_t> limit{0};  // 0: none
  size_t total() const { return limit ? limit.load() : kBytesOfCard; }
};

std::array<Card, kMostCards> cards;
std::atomic<size_t> waits{0};
thread_local DeviceIndex active = 0;
thread_local int inside_operator = 0;  // copies that the fallback makes are not the program's

DeviceIndex num_cards() {
  static const DeviceIndex number = [] {
    const char* asked = std::getenv("PRETENDED_GPUS");
    const int given = asked ? std::atoi(asked) : 1;
    return static_cast<DeviceIndex>(std::clamp<int>(given, 1, kMostCards));
  }();
  return number;
}

DeviceIndex index_of(Device device) { return device.index() < 0 ? active : device.index(); }

void wait_for_card() {
  if (!inside_operator) ++waits;
}

// Makes a card the active one in a scope.
class OnCard {
 public:
  explicit OnCard(std::optional<Device> device) : before_(active) {
    if (device && device->index() >= 0) active = device->index();
  }
  ~OnCard() { active = before_; }

 private:
  DeviceIndex before_;
};

class InsideOperator {
 public:
  InsideOperator() { ++inside_operator; }
  ~InsideOperator() { --inside_operator; }
};

// ---- memory -------------------------------------------------------------------------------------

struct Allocation {
  void* start;
  size_t bytes;
  DeviceIndex card;
};

void* aligned(size_t bytes) {
  void* start = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  TORCH_CHECK(start, "the host has no memory left for the pretended card");
  return start;
}

class CardMemory final : public c10::DeviceAllocator {
 public:
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const at::DataPtr&, c10::Stream) override {}
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex index) override { cards[index].peak = cards[index].held.load(); }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    const size_t total = cards[index].total(), held = cards[index].held;
    return {held < total ? total - held : 0, total};
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex index) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* found : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      auto& all = (*found)[0];  // of all pools
      all.current = cards[index].held;
      all.peak = cards[index].peak;
    }
    return stats;
  }

  at::DataPtr allocate(size_t bytes) override {
    const DeviceIndex index = active;
    const Device device(kCard, index);
    if (bytes == 0) return {nullptr, nullptr, [](void*) {}, device};
    count(bytes, index);
    auto* made = new Allocation{aligned(bytes), bytes, index};
    return {made->start, made, &release, device};
  }

  // Takes so many bytes of a card.
  static void count(size_t bytes, DeviceIndex index) {
    Card& card = cards[index];
    const size_t after = card.held.fetch_add(bytes) + bytes;
    if (const size_t limit = card.limit; limit && after > limit) {
      card.held -= bytes;
      const size_t before = after - bytes;
      C10_THROW_ERROR(OutOfMemoryError,
                      c10::str("CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ", int(index),
                               " has a total capacity of ", limit, " bytes of which ",
                               before < limit ? limit - before : 0, " bytes are free."));
    }
    for (size_t peak = card.peak; after > peak && !card.peak.compare_exchange_weak(peak, after);) {
    }
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static void release(void* context) {
    auto* made = static_cast<Allocation*>(context);
    cards[made->card].held -= made->bytes;
    std::free(made->start);
    delete made;
  }
};

// Host memory that counts as pinned.
class PinnedMemory final : public at::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    void* start = aligned(std::max<size_t>(bytes, 1));
    const std::lock_guard lock(mutex_);
    starts_.insert(start);
    return {start, start, &release, Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static bool holds(const void* start) {
    const std::lock_guard lock(mutex_);
    return starts_.count(const_cast<void*>(start)) > 0;
  }

 private:
  static void release(void* start) {
    const std::lock_guard lock(mutex_);
    starts_.erase(start);
    std::free(start);
  }

  inline static std::mutex mutex_;
  inline static std::set<void*> starts_;
};

CardMemory card_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(kCard, &card_memory);

// ---- what torch asks of a device ----------------------------------------------------------------

struct CardGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kCard;
  c10::DeviceType type() const override { return kCard; }
  DeviceIndex deviceCount() const noexcept override { return num_cards(); }
  Device getDevice() const override { return Device(kCard, active); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override { active = index_of(device); }
  void uncheckedSetDevice(Device device) const noexcept override { active = index_of(device); }
  // work is done at once, so one stream is enough and every event has happened
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, Device(kCard, index_of(device)));
  }
  c10::Stream getNewStream(Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, CardGuard);

// A generator that kernels on a card accept; the numbers come from one of the CPU.
class CardGenerator final : public at::CPUGeneratorImpl {
 public:
  explicit CardGenerator(DeviceIndex index) : host(at::make_generator<at::CPUGeneratorImpl>()) {
    device_ = Device(kCard, index);
    key_set_ = DispatchKeySet(c10::DispatchKey::CUDA);
  }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }

  at::Generator host;
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return num_cards(); }
  DeviceIndex current_device() const override { return active; }
  DeviceIndex getCurrentDevice() const override { return active; }
  bool isPinnedPtr(const void* start) const override { return PinnedMemory::holds(start); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override {
    static const std::vector<at::Generator> made = [] {
      std::vector<at::Generator> all;
      for (DeviceIndex i = 0; i < num_cards(); ++i) all.push_back(at::make_generator<CardGenerator>(i));
      return all;
    }();
    return made[index < 0 ? active : index];
  }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<CardGenerator>(index < 0 ? active : index);
  }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

// ---- operators that are about memory, not about values ------------------------------------------

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const OnCard scope(device);
  return at::detail::empty_generic(size, &card_memory, DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const OnCard scope(device);
  return at::detail::empty_strided_generic(size, stride, &card_memory, DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
Tensor on_host(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  const at::Storage storage = tensor.storage();
  char* start = static_cast<char*>(storage.mutable_data());
  if (start) start += tensor.storage_offset() * tensor.element_size();
  return at::from_blob(start, tensor.sizes(), tensor.strides(), [storage](void*) {},
                       tensor.options().device(at::kCPU));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  const bool to_host = to.device().is_cpu() && !from.device().is_cpu();
  const bool to_card = from.device().is_cpu() && !to.device().is_cpu() && from.dim() > 0;
  const bool can_overlap = non_blocking && (to_host ? to : from).is_pinned();
  if ((to_host || to_card) && !can_overlap) wait_for_card();
  if (to.numel()) on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  copy_(target, from, non_blocking);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (from.sizes() != to.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& tensor) {
  wait_for_card();
  return on_host(tensor).item();
}

// A card counts whole numbers, too, which the CPU's kernel does not.
Tensor histc(const Tensor& tensor, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  const Tensor host = on_host(tensor);
  const bool is_whole = at::isIntegralType(host.scalar_type(), false);
  return at::histc(is_whole ? host.to(at::kDouble) : host, bins, low, high).to(tensor.options());
}

Tensor& set_storage_at(Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                       c10::IntArrayRef stride) {
  at::native::checkSetStorage(tensor, std::move(storage), offset, size, stride);
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  at::native::resize_impl_cpu_(impl, size, stride);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) {
  const auto numel = static_cast<int64_t>(storage.nbytes() / tensor.element_size());
  return set_storage_at(tensor, std::move(storage), 0, {numel}, {1});
}

Tensor& set_tensor(Tensor& tensor, const Tensor& source) {
  return set_storage_at(tensor, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

const Tensor& resize_(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  const OnCard scope(tensor.device());
  auto* impl = tensor.unsafeGetTensorImpl();
  at::native::resize_impl_cpu_(impl, C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  if (format) impl->empty_tensor_restride(*format);
  return tensor;
}

// ---- all other operators ------------------------------------------------------------------------

template <typename Visit>
void each_tensor(const IValue& value, Visit visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorVector())
      if (tensor.defined()) visit(tensor);
  } else if (value.isList()) {
    for (const IValue& item : value.toListRef())
      if (item.isTensor() && item.toTensor().defined()) visit(item.toTensor());
  }
}

bool starts_with(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

// Whether the number of results depends on values, so that a program waits for the card to know it.
bool waits_for_values(const std::string& name, const std::vector<const IValue*>& indices) {
  for (const char* each : {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique", "aten::unique",
                           "aten::repeat_interleave.Tensor", "aten::bincount", "aten::is_nonzero"})
    if (starts_with(name, each) && name != "aten::nonzero_static") return true;
  bool by_mask = false;
  for (const IValue* value : indices)
    each_tensor(*value, [&](const Tensor& t) { by_mask |= t.scalar_type() == at::kBool || t.scalar_type() == at::kByte; });
  return by_mask && starts_with(name, "aten::index");
}

// A tensor that the CPU computed, as one of the active card: the same memory, counted there.
Tensor adopted(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
  const at::Storage storage = tensor.storage();
  struct Adopted {
    at::Storage storage;
    size_t bytes;
    DeviceIndex card;
  };
  card_memory.count(storage.nbytes(), active);
  auto* made = new Adopted{storage, storage.nbytes(), active};
  at::DataPtr pointer(
      storage.mutable_data(), made,
      [](void* context) {
        auto* ended = static_cast<Adopted*>(context);
        cards[ended->card].held -= ended->bytes;
        delete ended;
      },
      Device(kCard, active));
  at::Storage on_card(at::Storage::use_byte_size_t{}, storage.nbytes(), std::move(pointer), &card_memory, true);
  Tensor result = at::detail::make_tensor<at::TensorImpl>(std::move(on_card), DispatchKeySet(c10::DispatchKey::CUDA),
                                                          tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

// Runs the CPU's kernel on the card's own memory: arguments and results are not copied.
void run_in_place(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const size_t begin = stack->size() - count;
  const std::vector<IValue> given(stack->begin() + begin, stack->end());
  for (size_t i = 0; i < count; ++i) {
    IValue& value = (*stack)[begin + i];
    if (value.isTensor() && value.toTensor().defined()) {
      value = on_host(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> all;
      for (const Tensor& tensor : value.toTensorVector()) all.push_back(tensor.defined() ? on_host(tensor) : tensor);
      value = IValue(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList().vec())
        all.push_back(tensor && tensor->defined() ? std::optional<Tensor>(on_host(*tensor)) : tensor);
      value = IValue(all);
    } else if (value.isDevice()) {
      value = IValue(Device(at::kCPU));
    }
  }
  op.redispatchBoxed(DispatchKeySet(c10::DispatchKey::CPU), stack);

  const auto& returns = schema.returns();
  const size_t first = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    IValue& value = (*stack)[first + i];
    if (const auto* alias = returns[i].alias_info(); alias && alias->isWrite()) {  // an argument, changed
      for (size_t j = 0; j < count; ++j) {
        const auto* other = schema.arguments()[j].alias_info();
        if (other && other->beforeSets() == alias->beforeSets()) value = given[j];
      }
    } else if (value.isTensor()) {
      value = adopted(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> all;
      for (const Tensor& tensor : value.toTensorVector()) all.push_back(adopted(tensor));
      value = IValue(all);
    }
  }
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::string& name = op.schema().name();
  IValue* given = stack->data() + (stack->size() - arguments.size());

  std::optional<Device> card;
  bool has_shape = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    each_tensor(given[i], [&](const Tensor& tensor) {
      if (tensor.device().type() != kCard || (card && (has_shape || tensor.dim() == 0))) return;
      card = tensor.device();
      has_shape = tensor.dim() > 0;
    });
    if (given[i].isGenerator() && given[i].toGenerator().defined()) {
      const at::Generator generator = given[i].toGenerator();
      TORCH_CHECK(generator.device().type() == kCard, "Expected a 'cuda' device type for generator but found '",
                  generator.device(), "'");
      given[i] = static_cast<CardGenerator*>(generator.unsafeGetGeneratorImpl())->host;
    }
  }

  const bool is_indexing = starts_with(name, "aten::index") || starts_with(name, "aten::_index_put") ||
                           starts_with(name, "aten::_unsafe_index");
  std::vector<const IValue*> indices;
  for (size_t i = 0; card && i < arguments.size(); ++i) {
    const bool is_indices = is_indexing && arguments[i].name() == "indices";
    if (is_indices) indices.push_back(&given[i]);
    each_tensor(given[i], [&](const Tensor& tensor) {
      if (tensor.device() == *card) return;
      const bool is_number = tensor.device().is_cpu() && tensor.dim() == 0;
      if (is_number || (is_indices && tensor.device().is_cpu())) return;  // a card takes these, too
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", arguments[i].name(), " is on ",
                  tensor.device(), ", different from other tensors on ", *card, " (", name, ")");
    });
  }
  if (waits_for_values(name, indices)) wait_for_card();

  const OnCard scope(card);
  const InsideOperator quiet;
  for (const auto& argument : arguments)
    if (argument.is_out()) return at::native::cpu_fallback(op, stack);  // it may be resized
  run_in_place(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("unfold", at::native::unfold);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("copy_", &copy_);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  library.impl("histc", &histc);
  for (const char* name : {"convolution", "convolution_backward"})  // else torch asks for a card's own kernels
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  library.impl("set_.source_Storage_storage_offset", &set_storage_at);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("resize_", &resize_);
}
TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

extern "C" {
int card_count() { return num_cards(); }
int card_active() { return active; }
void card_activate(int index) { active = static_cast<DeviceIndex>(index); }
size_t card_held(int index) { return cards[index].held; }
size_t card_peak(int index) { return cards[index].peak; }
void card_reset_peak(int index) { card_memory.resetPeakStats(static_cast<DeviceIndex>(index)); }
size_t card_total(int index) { return cards[index].total(); }
void card_limit(int index, size_t bytes) { cards[index].limit = bytes; }
size_t card_waits() { return waits; }
}
