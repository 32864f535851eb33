"""The student: the frozen model under the edits it starts from, with adapters that are trained.

B rows, T tokens, d hidden width, r rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modules.backbone import Backbone, only_adapters
from modules.distill.start import joined, moved, placed
from modules.interventions import low_rank
from modules.summed import Summed

NAME = "default"  # peft's of the only adapter


@dataclass
class AdapterOptions:
    """The adapters (library defaults as released; GPT-NeoX has `query_key_value` for the targets).

    Args:
        rank: of the product of each adapter's two factors.
        alpha: that product is scaled by alpha / rank.
        targets: names of linear layers, or the ends of them. Not the output head, of which the teacher's distributions
            are made too.
    """

    rank: int = 8
    alpha: int = 8
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                "model.adapters.rank must be at least 1, alpha positive, and targets name a layer; got "
                f"{self.rank}, {self.alpha}, {self.targets}"
            )

    def check(self, backbone: Backbone) -> None:
        """Refuse targets that the model does not have, each by itself: peft refuses them where none is there.

        Raises:
            ValueError: naming the target, and what a layer has.
        """
        linear = [n for n, m in backbone.model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        for target in self.targets:
            if not any(name == target or name.endswith(f".{target}") for name in linear):
                layer = backbone.layers[0].named_modules()
                within = sorted({n.rpartition(".")[2] for n, m in layer if isinstance(m, (nn.Linear, Conv1D))})
                raise ValueError(
                    f"model.adapters.targets {self.targets}: no linear layer's name ends in {target!r}; a layer of "
                    f"this model has {', '.join(within)}"
                )

    def peft(self) -> LoraConfig:
        """peft's description of them."""
        return LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), task_type="CAUSAL_LM")


class Student(nn.Module):
    """A backbone with adapters, which alone are trained. The teacher is the same model without them and without the
    start (`modules.backbone.adapters_off`).

    Neither drops anything out, as published: it is never in training mode.

    Raises:
        ValueError: for targets that the model does not have.
    """

    def __init__(self, backbone: Backbone, adapters: AdapterOptions, start: Mapping[str, Summed]) -> None:
        super().__init__()
        self.backbone = backbone
        adapters.check(backbone)
        inject_adapter_in_model(adapters.peft(), backbone.model, NAME)
        self.language_model = backbone.model
        only_adapters(self.language_model)
        self.start = dict(start)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids and mask [B, T], right-padded -> last hidden states [B, T, d]."""
        self.start = moved(self.start, ids.device)
        decoder: Any = self.language_model.base_model
        with low_rank(self.language_model, placed(self.language_model, self.start)):
            return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def adapters(self) -> dict[str, Summed]:
        """What the adapters add to each layer, by its name: factors of rank r."""
        layers = {n: m for n, m in self.language_model.named_modules() if isinstance(m, LoraLayer)}
        return {n: _term(m) for n, m in layers.items()}

    def terms(self) -> dict[str, Summed]:
        """All that stands between this model and the unedited one."""
        return joined(moved(self.start, self.backbone.device), self.adapters())


def _term(layer: LoraLayer) -> Summed:
    down: Any = layer.lora_A[NAME]
    up: Any = layer.lora_B[NAME]
    a, b = down.weight.detach().float(), up.weight.detach().float()  # [r, d_in], [d_out, r]
    return Summed(a, b.T * layer.scaling[NAME])
