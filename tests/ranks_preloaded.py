"""What `tests.ranks` imports once, for all processes that it forks; also what they would import on their way."""

import deepspeed.module_inject  # noqa: F401
import networkx  # noqa: F401
import torch._dynamo
import torch._inductor.lowering
import torch.export
import torch.utils.cpp_extension
import torch.utils.tensorboard  # noqa: F401

import pipelines.training.loop  # noqa: F401
