"""A backbone that writes edits into gists and reads them: the network that InComeS trains.

B rows, T tokens, N edits, d hidden width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.backbone import Backbone
from modules.gist.attention import GistCall, install
from modules.gist.matcher import GistMatcher
from modules.gist.pool import GistPool
from modules.gist.selector import GistSelector


@dataclass
class GistConfig:
    """The switches of compression and selection.

    Args:
        layers: which layers take part: the upper half (published) or all (paper, figure 4b).
        selection: `qk`: each layer's queries against the gists' keys, as published. `hidden`: by whitened states of a
            low layer, ours (modules/gist/matcher.py).
        keys: gist keys stored before their rotation (released code) or after it.
        bos: queries begin with a BOS where the tokenizer uses one, as the unedited model is asked: in training, the
            teacher's too, and when edited. Off: none do (released code, of the student alone).
        zero_gist: offer the zero-gist (off: an ablation of the paper).
        zero_key: where the zero-gist's key starts: `normal` (released code), or `mean_query`, the mean of the queries
            over the texts of calibration records, so that reading starts at "nothing"; without such records it stays
            `normal`, so InComeS refuses to train then.
        temperature: logits are divided by it at inference when more than ten keys compete (released code: 0.45).
        match_layer: whose input `hidden` selection, and that part of `both`, sees, as a share of the depth; at most the
            first layer that takes part.
        scale: where `hidden` selection starts: the factor on the cosine.
        threshold: where it starts: the cosine of indifference.
    """

    layers: Literal["upper", "all"] = "upper"
    selection: Literal["qk", "hidden", "both"] = "qk"
    keys: Literal["before_rope", "after_rope"] = "before_rope"
    bos: bool = True
    zero_gist: bool = True
    zero_key: Literal["normal", "mean_query"] = "normal"
    temperature: float = 0.45
    match_layer: float = 0.2
    scale: float = 30.0
    threshold: float = 0.38

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.scale <= 0:
            raise ValueError(f"gist.temperature and gist.scale must be positive, got {self.temperature}, {self.scale}")
        if not 0 <= self.match_layer < 1:
            raise ValueError(f"gist.match_layer is a share of the depth, 0 <= share < 1, got {self.match_layer}")

    def active(self, depth: int) -> range:
        """The layers that take part, of a model of so many. Below the layer that `hidden` selection sees nothing is
        chosen yet, so with it, and with `both`, `all` are those from there on."""
        if self.layers == "upper":
            return range(depth // 2, depth)
        return range(0 if self.selection == "qk" else int(depth * self.match_layer), depth)


class GistModel(nn.Module):
    """A backbone with a gist token of its own and the modules that select among gists.

    The gist token stands outside the vocabulary: its embedding is a parameter here, and is fed as an embedding. So the
    vocabulary, the head and the teacher stay as they are (the released code adds a row, which the teacher lacks).

    `reader`, where it is not the backbone itself, is the unedited model that reads what the backbone wrote.
    """

    reader: Backbone

    def __init__(self, backbone: Backbone, config: GistConfig, reader: Backbone | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.language_model = backbone.model
        self.__dict__["reader"] = (
            reader or backbone
        )  # not a submodule: an original that reads is neither trained nor saved
        install(backbone)
        install(self.reader)
        count = len(backbone.layers)
        self.active = config.active(count)
        self.match_layer = min(int(count * config.match_layer), self.active.start)
        embeddings: Tensor = backbone.model.get_input_embeddings().weight  # type: ignore[assignment]
        self.gist_embedding = nn.Parameter(embeddings.detach().float().mean(0))
        self.selectors = nn.ModuleDict()
        self.matcher = None
        if config.selection != "qk":
            self.matcher = GistMatcher(backbone.hidden_size, config.scale, config.threshold, config.zero_gist)
        if config.selection != "hidden":
            for i in self.active:
                self.selectors[str(i)] = GistSelector(backbone.key_value_heads, backbone.head_dim, config.zero_gist)

    def compress(self, ids: Tensor, mask: Tensor) -> GistPool:
        """Write each row into one gist: ids and mask [N, T], right-padded. Edits see neither each other nor a pool."""
        lengths = mask.sum(1)
        embeds = self.backbone.embed(F.pad(ids, (0, 1)))  # [N, T + 1, d]
        at = F.one_hot(lengths, embeds.shape[1]).bool()  # the gist follows the last token
        embeds = torch.where(at[..., None], self.gist_embedding.to(embeds), embeds)
        mask = F.pad(mask, (0, 1)).masked_fill(at, 1)
        call = self._call(mask, write_at=lengths)
        self.backbone.decode(inputs_embeds=embeds, attention_mask=mask, use_cache=False, gist=call)
        return GistPool(call.written, call.address)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        pool: GistPool | None,
        visible: Tensor | None = None,
        trace: dict[int, Tensor] | None = None,
        carried: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, Tensor | None]:
        """Run the decoder on ids [B, T], reading from `pool`.

        Args:
            mask: [B, T'], of cached tokens and these.
            visible, trace, carried: see GistCall.
            options: for the decoder (cache, position_ids, use_cache).

        Returns:
            transformers' output of the decoder, and what to pass as `carried` with the next tokens.
        """
        options.setdefault("use_cache", False)
        if pool is None or not len(pool):
            return self.reader.decode(input_ids=ids, attention_mask=mask, **options), None
        cold = self.training or len(pool) + 1 <= 10
        call = self._call(
            mask[:, -ids.shape[1] :],
            pool=pool,
            visible=visible,
            trace=trace,
            carried=carried,
            temperature=1.0 if cold else self.config.temperature,
        )
        out = self.reader.decode(input_ids=ids, attention_mask=mask, gist=call, **options)
        return out, call.carried

    def _call(self, mask: Tensor, **options: Any) -> GistCall:
        return GistCall(
            self.active,
            mask,
            {int(i): s for i, s in self.selectors.items()},  # type: ignore[misc]
            self.matcher,
            self.match_layer,
            keys_before_rope=self.config.keys == "before_rope",
            **options,
        )
