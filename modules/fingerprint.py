"""Which weights a model has, and whether they have changed."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor, nn


@torch.no_grad()
def weights_hash(model: nn.Module) -> str:
    """A hash of all tensors of the state dict: names, shapes, types and bits. Reads each weight once, on the host."""
    return tensors_hash(model.state_dict())


@torch.no_grad()
def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors: names, shapes, types and bits."""
    digest = sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def weights_sum(model: nn.Module) -> int:
    """The sum of all weights' bits as whole numbers (modulo 2 to the 64), where they lie: fast, and other after all but
    contrived changes."""
    sums = []
    for tensor in model.state_dict().values():
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        whole = len(bits) // 8 * 8
        words = bits[:whole] if bits.storage_offset() % 8 == 0 else bits[:whole].clone()
        sums += [words.view(torch.int64).sum(), bits[whole:].sum(dtype=torch.int64)]
    return int(torch.stack([s.to(sums[0].device) for s in sums]).sum()) if sums else 0
