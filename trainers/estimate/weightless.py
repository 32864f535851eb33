"""Run a model without its data: floating-point tensors have a shape and no values, and all storages are counted.

What a training step needs is then not guessed by a formula for each architecture and setting: the step itself runs,
forward and backward, in seconds and in no memory. Integers and booleans stay real, for a step's shapes depend on them
(which tokens are scored).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class _Held(NamedTuple):
    size: int
    kind: str


class Weightless(TorchDispatchMode):
    """Within it no tensor of floating point has data. Counts the bytes that are alive, and the multiplications.

    Args:
        fused: whether scaled-dot-product attention of (mask, grouped) runs in a kernel that never holds the
            probabilities; the others run as torch's `math` does.
    """

    def __init__(self, fused: Callable[[bool, bool], bool]) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fused = fused
        self._held: dict[int, _Held] = {}
        self._kind = "other"
        self._now = 0
        self._alive: Counter[str] = Counter()
        self._most = 0
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.wide_flops = 0  # those of them that are of 32 bits or more
        self.wide = -1  # a last dimension by which a [c, V] tensor is known as logits
        self._stack = ExitStack()

    def __enter__(self) -> "Weightless":
        self._stack.enter_context(patch.object(nn.Module, "_apply", _change))
        self._stack.enter_context(patch.object(F, "scaled_dot_product_attention", self._attention))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """What is made within counts as this kind, for as long as it lives."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def counted(self, does: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """The same function, within which what is made counts as this kind."""

        def counting(*args: Any, **options: Any) -> Any:
            with self.kind(kind):
                return does(*args, **options)

        return counting

    def begin(self) -> None:
        """Count peak and multiplications from here."""
        self._most, self.peak = self._now, self._alive.copy()
        self.flops, self.wide_flops = 0, 0

    def call(self, tensor: Tensor, kind: str) -> None:
        """Let a tensor that is there count as another kind."""
        key = tensor.untyped_storage()._cdata
        size, before = self._held[key]
        self._held[key] = _Held(size, kind)
        self._alive[before] -= size
        self._alive[kind] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _by_number(args[1]), *args[2:])
        given = _tensors((args, kwargs))
        if given and not any(isinstance(t, FakeTensor) for t in given):
            out = tree_map(self._without_data, func(*args, **kwargs))
        else:
            with self._fake:
                out = func(*args, **kwargs)
            if not given and not any(t.is_floating_point() for t in _tensors(out)):
                out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._multiplied(formula(*args, **kwargs, out_val=out), out)
        for tensor in _tensors(out):
            self._count(tensor)
        return out

    def _without_data(self, value: Any) -> Any:
        real = isinstance(value, Tensor) and value.is_floating_point() and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if real else value

    def _multiplied(self, flops: int, out: Any) -> None:
        self.flops += flops
        if any(t.dtype.itemsize > 2 for t in _tensors(out)):
            self.wide_flops += flops

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        logits = tensor.dim() == 2 and tensor.shape[1] == self.wide and tensor.is_floating_point()
        held = self._held[key] = _Held(storage.nbytes(), "logits" if logits else self._kind)
        weakref.finalize(storage, self._forget, key)
        self._now += held.size
        self._alive[held.kind] += held.size
        if self._now > self._most:
            self._most, self.peak = self._now, self._alive.copy()

    def _forget(self, key: int) -> None:
        size, kind = self._held.pop(key)
        self._now -= size
        self._alive[kind] -= size

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch's kernels want it added
            attn_mask = query.new_empty(attn_mask.shape)
        grouped = bool(options.get("enable_gqa"))
        if self._fused(attn_mask is not None, grouped):
            return _Fused.apply(self, query, key, value, attn_mask)  # type: ignore[return-value]
        return torch._scaled_dot_product_attention_math(query, key, value, attn_mask, *args, **options)[0]


class _Fused(torch.autograd.Function):
    """The tensors of a fused attention kernel: it keeps its inputs, its output and one number a query."""

    @staticmethod
    def forward(
        ctx: Any, counter: Weightless, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        ctx.counter, ctx.product = counter, 2 * query.numel() * key.shape[2]  # FLOPs of one [T, D] x [D, S] product
        counter._multiplied(2 * ctx.product, query)
        out = query.new_empty(*query.shape[:3], value.shape[-1])  # [B, H, T, D]
        normaliser = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        ctx.counter._multiplied(5 * ctx.product, query)  # the logits once more, and the gradients of both products
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _change(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for parameters without data: torch's own swaps tensors, which these do not allow."""
    for p in module.parameters():
        p.data = change(p.data)
    for part in module.modules():
        part._buffers |= {name: change(b) for name, b in part._buffers.items() if b is not None}
    return module


def _by_number(indices: Any) -> list[Tensor | None]:
    """Indices with every real mask as the numbers of its places: their count is a shape."""
    found: list[Tensor | None] = []
    for index in indices:
        mask = isinstance(index, Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found.extend(index.nonzero(as_tuple=True) if mask else [index])
    return found


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]
