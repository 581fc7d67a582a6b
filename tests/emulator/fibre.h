// Fibres: functions that suspend in the middle, each on a stack of its own that lies above an inaccessible page, so
// that an overflow crashes instead of corrupting a neighbour.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif
#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext saves the signal mask by a system call: 0.4 us for a collective of one thread, against 0.05 us with the
// switch below. -DEMULATOR_UCONTEXT chooses it all the same.
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulator::detail {

class Stack {
 public:
  static constexpr size_t kBytes = 128 << 10;

  Stack() : guard_bytes_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    base_ = mmap(nullptr, guard_bytes_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(base_, guard_bytes_, PROT_NONE) != 0) {
      munmap(base_, guard_bytes_ + kBytes);
      throw std::bad_alloc();
    }
  }
  ~Stack() { munmap(base_, guard_bytes_ + kBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* bottom() const { return static_cast<char*>(base_) + guard_bytes_; }

 private:
  size_t guard_bytes_;
  void* base_;
};

#if defined(EMULATOR_ASM_SWITCH)

struct Context {
  void* stack_pointer = nullptr;
};

// Saves what a function must preserve; the floating-point control words are left alone, since no kernel changes them.
// noipa: the compiler must not conclude from the body that a call keeps registers or memory.
__attribute__((naked, noipa)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  __asm__(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "ret");
}

inline void switch_context(Context& from, Context& to) { swap_stacks(&from.stack_pointer, to.stack_pointer); }

inline void make_context(Context& context, const Stack& stack, void (*entry)()) {
  // Six registers, the address that `ret` takes, and a null return address, which also aligns the stack as a call does.
  auto* words = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack.bottom()) + Stack::kBytes) - 8;
  for (int i = 0; i < 8; ++i) words[i] = 0;
  words[6] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = words;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.bottom();
  context.uc_stack.ss_size = Stack::kBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

class Fibre {
 public:
  // The next resume() calls body(argument) on an empty stack. What the fibre did before is dropped without unwinding.
  void start(void (*body)(void*), void* argument) {
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(stack_.bottom(), Stack::kBytes);  // the marks of frames that never returned
#endif
    body_ = body;
    argument_ = argument;
    make_context(self_, stack_, &Fibre::enter);
  }

  // Runs the fibre until it suspends or its body returns.
  void resume() {
    running_ = this;
#if defined(EMULATOR_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_.bottom(), Stack::kBytes);
#endif
    switch_context(host_, self_);
#if defined(EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Called on the fibre itself: returns to whoever resumed it.
  void suspend() {
#if defined(EMULATOR_ASAN)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, host_bottom_, host_bytes_);
#endif
    switch_context(self_, host_);
#if defined(EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, &host_bottom_, &host_bytes_);
#endif
  }

 private:
  static void enter() {
    Fibre* const self = running_;
#if defined(EMULATOR_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self->host_bottom_, &self->host_bytes_);
#endif
    self->body_(self->argument_);
#if defined(EMULATOR_ASAN)
    __sanitizer_start_switch_fiber(nullptr, self->host_bottom_, self->host_bytes_);
#endif
    switch_context(self->self_, self->host_);
    __builtin_unreachable();
  }

  static inline Fibre* running_ = nullptr;

  Stack stack_;
  Context self_{}, host_{};
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
#if defined(EMULATOR_ASAN)
  const void* host_bottom_ = nullptr;
  size_t host_bytes_ = 0;
#endif
};

}  // namespace emulator::detail
