"""Whether a tensor is nothing but a tensor, and nobody watches what is done with it."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_plain(x: Tensor) -> bool:
    """Whether x may be worked on in memory that outlives the call, or by a kernel's address.

    Not a subclass (FakeTensor, DTensor), not while torch.compile, torch.jit or a dispatch mode
    records operations, and not inside a torch.func transform, where a tensor is a wrapper.
    """
    return type(x) in (Tensor, torch.nn.Parameter) and not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
