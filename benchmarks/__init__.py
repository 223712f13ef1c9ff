"""Benchmarks, and the data and tools that they share."""

import logging

# transformers and PEFT import these where they are installed; at import they tell of kernels for other devices.
for name in ("bitsandbytes", "torchao", "torch.utils._pytree", "torch.utils.cpp_extension"):
    logging.getLogger(name).setLevel(logging.ERROR)
