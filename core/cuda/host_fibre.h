// Fibres of the host executor: stacks that a thread goes on with in turns.
#pragma once

#include <cstddef>
#include <setjmp.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace hybridmoe::cuda::host {

// Where a fibre goes on. A switch by setjmp leaves the signal mask alone, which ucontext's asks the system
// for; sanitizers follow ucontext only.
struct Place {
  ucontext_t context;
#if defined(__SANITIZE_ADDRESS__)
  // Told at every switch, or an exception that a fibre throws looks like one from no stack. The thread's own
  // stack is known once a fibre has been entered.
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
#elif !defined(__SANITIZE_THREAD__)
  jmp_buf jump;
#endif
  bool begun = false;  // it has been there: `jump` is set

  // It begins with `entry` on the given stack, which outlives it.
  void begin(void (*entry)(), char* its_stack, std::size_t bytes) {
    begun = false;
    getcontext(&context);
    context.uc_stack.ss_sp = its_stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    stack = its_stack, stack_bytes = bytes;
#endif
    makecontext(&context, entry, 0);
  }
};

inline void switch_to(Place& from, Place& to) {
#if defined(__SANITIZE_ADDRESS__)
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, to.stack, to.stack_bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#elif defined(__SANITIZE_THREAD__)
  swapcontext(&from.context, &to.context);
#else
  from.begun = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.begun) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

// The first thing that a fibre does: `from` is where it was switched to from.
inline void entered_from([[maybe_unused]] Place& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
}

}  // namespace hybridmoe::cuda::host
