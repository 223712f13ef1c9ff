"""Small tensors run fastest on one thread, and a test must not depend on how many there are."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
torch.set_warn_always(True)  # a warning that torch gives once per process would hang on the order of the tests
