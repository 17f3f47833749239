"""The architecture that this process emulates."""

import triton

ARCH: int = triton.runtime.driver.active.get_current_target().arch
