"""LinearExperts: a mixture of experts whose matrices are plain linears, quantized and packed like any others.

A router gives every token t its K experts and their shares p. The experts e are small gated feed-forwards:

    out_t = sum_e p_te * y_te        y_te = down_e(z_te)        z_te = act(gate_e(x_t)) * up_e(x_t)

transformers keeps all experts of a block in two tensors, `gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]. Here they
are linears `experts.e.gate_proj`, `.up_proj` and `.down_proj`; the router, a few thousand weights that decide over all
others, stays as it is. Called with the same arguments LinearExperts gives the same output.

On disk the matrices have one of three forms, which `stored_parts` tells apart; transformers reads and writes all:

    mlp.experts.3.gate_proj.weight                 checkpoints of Qwen3-MoE and OLMoE, and what save_pretrained writes
    block_sparse_moe.experts.3.w1.weight           the same of Mixtral: w1 is gate, w3 up, w2 down
    mlp.experts.gate_up_proj, .down_proj           fused, gate above up: save_pretrained(save_original_format=False)

Source: Mixtral, arXiv:2401.04088, section 2.1. An expert computes all of its tokens in one product; an expert without
tokens costs nothing.

Shape suffixes: N = tokens, K = experts of a token, E = experts, D = hidden size, I = an expert's inner size, R = N * K.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebit_core.model.replace import replace_module

FUSED = ("MixtralExperts", "OlmoeExperts", "Qwen3MoeExperts")
"""transformers' classes that LinearExperts computes the same as."""

_MIXTRAL = re.compile(r"^(.*\.)block_sparse_moe\.(.*)$")
_MIXTRAL_NAMES = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}


class Expert(nn.Module):
    """One gated feed-forward."""

    def __init__(self, hidden_size: int, inner_size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.activation = activation

    def down_input(self, x_ND: Tensor) -> Tensor:
        """Return what down_proj multiplies; [N, D] to [N, I]."""
        gated_NI: Tensor = self.activation(self.gate_proj(x_ND)) * self.up_proj(x_ND)
        return gated_NI

    def forward(self, x_ND: Tensor) -> Tensor:
        """Compute the expert; [N, D] to [N, D]."""
        output_ND: Tensor = self.down_proj(self.down_input(x_ND))
        return output_ND


class LinearExperts(nn.ModuleList):
    """All experts of a block; children are named by their numbers."""

    def __init__(
        self, num_experts: int, hidden_size: int, inner_size: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__(Expert(hidden_size, inner_size, activation) for _ in range(num_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute a mixture.

        Args:
            hidden_states: [N, D].
            top_k_index: int64 [N, K], the experts of each token.
            top_k_weights: [N, K], their shares.

        Returns:
            [N, D], in the dtype of the hidden states.
        """
        num_tokens, num_chosen = top_k_index.shape
        expert_R = top_k_index.flatten()
        order_R = expert_R.argsort(stable=True)
        counts = expert_R.bincount(minlength=len(self)).tolist()
        tokens = (order_R // num_chosen).split(counts)
        # One tensor goes to an expert's gate and up: packed layers that share an input know it by its identity.
        outputs = [expert(hidden_states[token_N]) for expert, token_N in zip(self, tokens, strict=True) if len(token_N)]
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        output_NKD = torch.cat(outputs)[place_R].view(num_tokens, num_chosen, -1)
        return (output_NKD * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)

    def input_of(self, name: str, hidden_ND: Tensor, top_k_index_NK: Tensor | None) -> Tensor:
        """Return the rows that one of the linears would multiply.

        Args:
            name: of the linear below this module, such as `3.down_proj`.
            hidden_ND: what came in.
            top_k_index_NK: where the router sends it; None sends every token to this expert.
        """
        number, _, linear = name.partition(".")
        chosen = top_k_index_NK
        rows_ND = hidden_ND if chosen is None else hidden_ND[(chosen == int(number)).any(-1)]
        expert = self[int(number)]
        assert isinstance(expert, Expert)
        return expert.down_input(rows_ND) if linear == "down_proj" else rows_ND


def use_linear_experts(model: nn.Module) -> None:
    """Put LinearExperts, without values, in the places of transformers' own experts; does nothing to other models."""
    for name, fused in list(model.named_modules()):
        if type(fused).__name__ in FUSED:
            num_experts, hidden_size, inner_size = fused.down_proj.shape
            with torch.device("meta"):
                experts = LinearExperts(num_experts, hidden_size, inner_size, fused.act_fn)
            replace_module(model, name, experts)


def experts_in(block: nn.Module) -> tuple[str, LinearExperts] | None:
    """Return name and module of a block's mixture; None if it has none."""
    return next(((name, part) for name, part in block.named_modules() if isinstance(part, LinearExperts)), None)


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """A weight that is stored under another name, or as a part of a tensor.

    Attributes:
        tensor: name on disk.
        shape: of the part.
        expert: its place along the first dimension; None if it is the whole tensor.
        first_row: of `shape[0]` rows along the second dimension.
    """

    tensor: str
    shape: tuple[int, ...]
    expert: int | None = None
    first_row: int = 0


def stored_parts(tensor: str, shape: tuple[int, ...]) -> Iterator[tuple[str, StoredPart]]:
    """Yield the weights of a model with LinearExperts that a tensor on disk holds under other names.

    Args:
        tensor: its name.
        shape: its shape.
    """
    mixtral = _MIXTRAL.match(tensor)
    if mixtral:
        name = f"{mixtral[1]}mlp.{mixtral[2]}"
        for theirs, ours in _MIXTRAL_NAMES.items():
            name = name.replace(theirs, ours)
        yield name, StoredPart(tensor=tensor, shape=shape)
    prefix, _, child = tensor.rpartition(".")
    if not prefix.endswith(".mlp.experts") or len(shape) != 3:
        return
    num_experts, num_rows, columns = shape
    linears = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(child, ())
    for number in range(num_experts):
        for place, linear in enumerate(linears):
            rows = num_rows // len(linears)
            part = StoredPart(tensor=tensor, shape=(rows, columns), expert=number, first_row=place * rows)
            yield f"{prefix}.{number}.{linear}.weight", part
