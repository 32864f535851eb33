"""How gists reach a model's attention: through transformers' attention interface, with no copy of a modelling file.

A forward pass that is to write or read gists carries a `GistCall` as the keyword argument `gist`, which transformers
hands down to every layer and its attention function. Nothing is kept on the model between calls, so gradient
checkpointing may run a layer again in the backward pass and sees the same call.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modules.backbone import Backbone, Parts
from modules.gist.matcher import GistMatcher, read
from modules.gist.pool import GistPool, LayerGists
from modules.gist.selector import GistSelector

PREFIX = "gist_"


@dataclass
class GistCall:
    """What one forward pass does with gists. B rows, T tokens, N gists in the pool.

    Args:
        active: the layers that take part.
        mask: 1 for text, 0 for padding, of this pass's tokens [B, T].
        selectors: by layer, for the published selection; empty where `matcher` selects.
        matcher: selects once, from the input of layer `match_layer`.
        write_at: index of the gist token in each row [B]: the pass compresses, and `written`, `address` are filled.
        keys_before_rope: store unrotated keys (released code) or rotated ones.
        pool: the pass reads from it.
        visible: which gists a row may see [B, N].
        temperature: divides the logits of selection.
        carried: matches of the rows' earlier tokens [B, N], when these are in a KV cache; updated.
        trace: where it is a dict, it receives each layer's log-probabilities [B, T, N + 1].
    """

    active: range
    mask: Tensor
    selectors: Mapping[int, GistSelector] = field(default_factory=dict)
    matcher: GistMatcher | None = None
    match_layer: int = 0
    write_at: Tensor | None = None
    keys_before_rope: bool = True
    pool: GistPool | None = None
    visible: Tensor | None = None
    temperature: float = 1.0
    carried: Tensor | None = None
    trace: dict[int, Tensor] | None = None
    written: dict[int, LayerGists] = field(default_factory=dict)
    address: Tensor | None = None
    chosen: Tensor | None = None

    def match(self, states: Tensor) -> None:
        """The matcher's part, on the input of its layer [B, T, d]."""
        if self.matcher is None:
            return
        if self.write_at is not None:
            text = self.mask.clone()
            text[torch.arange(len(text), device=text.device), self.write_at] = 0  # the gist is no word of the edit
            self.address, _ = self.matcher(states, text)
        if self.pool is not None:
            self.chosen, self.carried = self.matcher(
                states, self.mask, self.pool.address, self.visible, self.carried, self.temperature
            )

    def write(self, layer: int, key: Tensor, value: Tensor, unrotated: Tensor) -> None:
        """Keep what this layer has at the gist tokens; key and value [B, K, T, D], unrotated [B, T, K, D]."""
        assert self.write_at is not None
        rows = torch.arange(len(self.write_at), device=key.device)
        keys = key[rows, :, self.write_at]
        if self.keys_before_rope:
            # The unrotated keys are taken inside their layer. Under ZeRO-3 its weight is there in the backward pass
            # only if a gradient comes by the layer's output too: by the rotated keys, to which nothing else may lead.
            keys = unrotated[rows, self.write_at] + 0 * keys
        self.written[layer] = LayerGists(keys, value[rows, :, self.write_at])

    def read(self, layer: int, query: Tensor, scaling: float | None) -> Tensor:
        """What the tokens of this layer read [B, T, H, D]; query [B, H, T, D]."""
        assert self.pool is not None
        gists = self.pool.layers[layer]
        if self.chosen is not None and not self.selectors:
            out, logp = read(self.chosen, gists.values, query.shape[1]), self.chosen
        else:
            out, logp = self.selectors[layer](
                query, gists, self.visible, scaling, self.temperature, self.chosen, self.trace is not None
            )
        if self.trace is not None and logp is not None:
            self.trace[layer] = logp
        return out


def install(backbone: Backbone) -> None:
    """Make the backbone's attention able to carry gists. A pass without a `GistCall` is unchanged, bit for bit.

    Raises:
        ValueError: where the attention implementation in use is not known to transformers, or takes no masks.
    """
    model, parts = backbone.model, backbone.parts
    base = str(model.config._attn_implementation)
    refuse_flash(base)
    if base.startswith(PREFIX) or getattr(model, "_carries_gists", False):
        return
    for i, layer in enumerate(backbone.layers):
        # a layer's own hooks run outside its gradient checkpoint: a match is made once, not again in the backward pass
        layer.register_forward_pre_hook(_match_at(i), with_kwargs=True)
        attention = backbone.attention(i)
        attention.get_submodule(parts.keys).register_forward_hook(_remember_keys(attention, parts, backbone))
    model._carries_gists = True  # type: ignore[assignment]
    _register(base)
    model.set_attn_implementation(PREFIX + base)


def refuse_flash(attention: str | None) -> None:
    """Refuse an attention implementation that takes no mask but that of padding, by its name.

    Raises:
        ValueError: where it is one.
    """
    if attention and "flash" in attention:
        raise ValueError(
            f"backbone.attention {attention!r} takes no mask but that of padding, and InComeS's teacher reads edit and "
            "query in blocks of one row; set backbone.attention to sdpa"
        )


def _register(base: str) -> None:
    if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ValueError(f"attention {base!r} is none of transformers' implementations; set backbone.attention to sdpa")
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        call: GistCall | None = kwargs.pop("gist", None)
        unrotated = module.__dict__.pop("unrotated_keys", None)
        # each modelling file has an eager function of its own, which is not in transformers' table
        plain = (
            sys.modules[type(module).__module__].eager_attention_forward
            if base == "eager"
            else ALL_ATTENTION_FUNCTIONS[base]
        )
        out, weights = plain(module, query, key, value, attention_mask, **kwargs)
        layer: int = module.layer_idx  # type: ignore[assignment]
        return _take_part(call, layer, out, query, key, value, unrotated, kwargs.get("scaling")), weights

    AttentionInterface.register(PREFIX + base, attend)


def _take_part(
    call: GistCall | None,
    layer: int,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unrotated: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Write and read, as the call says; `out` [B, T, H, D] is the self-attention's output."""
    if call is None or layer not in call.active:
        return out
    if call.write_at is not None:
        call.write(layer, key, value, key.transpose(1, 2) if unrotated is None else unrotated)
    if call.pool is not None:
        out = out + call.read(layer, query, scaling).to(out)
    return out


def _match_at(layer: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call: GistCall | None = kwargs.get("gist")
        if call is not None and layer == call.match_layer:
            call.match(args[0] if args else kwargs["hidden_states"])

    return hook


def _remember_keys(attention: nn.Module, parts: Parts, backbone: Backbone) -> Callable[..., None]:
    k, width = backbone.key_value_heads, backbone.head_dim

    def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if parts.unrotated:
            return
        if parts.fused_keys == "per_head":  # [..., H * 3 * D]: query, key and value of a head side by side
            output = output.unflatten(-1, (k, 3 * width))[..., width : 2 * width]
        elif output.dim() == 3:
            output = output.unflatten(-1, (k, width))
        attention.__dict__["unrotated_keys"] = output

    return hook
