"""Where an architecture keeps its decoder blocks and linears: one table row each.

Linears of one group read the same input, and groups stand in the order in which a block computes them: calibration
records one Hessian per group, on inputs that already went through the quantized groups before it. The first group reads
the input of attention.

In a mixture of experts `*` stands for each expert, so one row of the table becomes a step of many groups: they do not
read each other's outputs, and one pass over the samples can record them all. Some blocks of such a model may be plain.

Modelling code stays in transformers; an architecture without a row is refused by name.
"""

from dataclasses import dataclass

from torch import nn

from onebit_core.errors import UnsupportedModel
from onebit_core.model.experts import experts_in

Group = tuple[str, ...]
"""Linears of a block that read the same input."""

Groups = tuple[Group, ...]
Steps = tuple[Groups, ...]
"""The groups of a block in order of computation; those of one step do not depend on each other."""

_LLAMA: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_OPT: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
_NEOX: Groups = (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",))
_PHI: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.dense",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)
_EXPERTS: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    ("mlp.experts.*.down_proj",),
)
_PHI3: Groups = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Where things are in one architecture.

    Attributes:
        blocks: path of the list of decoder blocks.
        groups: linears of a block by shared input, in order of computation.
        mixture: the same of a block with a mixture of experts; `*` stands for each of them.
    """

    blocks: str
    groups: Groups
    mixture: Groups = ()


LAYOUTS: dict[str, BlockLayout] = {
    "LlamaForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "MistralForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "Qwen2ForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "Qwen3ForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "Gemma2ForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "Gemma3ForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "SmolLM3ForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA),
    "Qwen3MoeForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA, mixture=_EXPERTS),
    "MixtralForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA, mixture=_EXPERTS),
    "OlmoeForCausalLM": BlockLayout(blocks="model.layers", groups=_LLAMA, mixture=_EXPERTS),
    "OPTForCausalLM": BlockLayout(blocks="model.decoder.layers", groups=_OPT),
    "GPTNeoXForCausalLM": BlockLayout(blocks="gpt_neox.layers", groups=_NEOX),
    "PhiForCausalLM": BlockLayout(blocks="model.layers", groups=_PHI),
    "Phi3ForCausalLM": BlockLayout(blocks="model.layers", groups=_PHI3),
}
"""transformers' class name to layout."""


def layout_of(architecture: str) -> BlockLayout:
    """Return the layout of an architecture.

    Raises:
        UnsupportedModel: it has no row in the table.
    """
    if architecture not in LAYOUTS:
        raise UnsupportedModel(f"architecture {architecture!r} is not supported; supported: {', '.join(LAYOUTS)}")
    return LAYOUTS[architecture]


def blocks_of(model: nn.Module, layout: BlockLayout) -> nn.ModuleList:
    """Return the list of decoder blocks.

    Raises:
        UnsupportedModel: the model has none there, or an empty list.
    """
    try:
        blocks = model.get_submodule(layout.blocks)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise UnsupportedModel(
            f"{type(model).__name__} has no decoder blocks at {layout.blocks}; "
            "do model_type, architectures and num_hidden_layers of config.json belong together?"
        )
    return blocks


def steps_of(block: nn.Module, layout: BlockLayout) -> Steps:
    """Return the groups of one block, step by step."""
    mixture = experts_in(block)
    if mixture is None:
        return tuple((group,) for group in layout.groups)
    _, experts = mixture
    return tuple(
        tuple(tuple(name.replace("*", str(number)) for name in group) for number in range(len(experts)))
        if any("*" in name for name in group)
        else (group,)
        for group in layout.mixture
    )


def groups_of(block: nn.Module, layout: BlockLayout) -> Groups:
    """Return the groups of one block in order of computation."""
    return tuple(group for step in steps_of(block, layout) for group in step)


def linear_names(block: nn.Module, layout: BlockLayout) -> list[str]:
    """Return the names of the linears of one block in order of computation."""
    return [name for group in groups_of(block, layout) for name in group]


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return one linear of a block.

    Raises:
        UnsupportedModel: the block has no plain linear of that name (it is computed in another way).
    """
    try:
        module = block.get_submodule(name)
    except AttributeError:
        raise UnsupportedModel(f"the decoder block {type(block).__name__} has no linear {name!r}") from None
    if type(module) is not nn.Linear:
        raise UnsupportedModel(f"{name} is a {type(module).__name__}, and only plain linears can be quantized")
    return module


def shared_inputs(model: nn.Module) -> list[list[str]]:
    """Return the names of the linears that read the same input, group by group of every block.

    A model without a row in the table has none that are known.
    """
    layout = LAYOUTS.get(type(model).__name__)
    if layout is None:
        return []
    return [
        [f"{layout.blocks}.{index}.{name}" for name in group]
        for index, block in enumerate(blocks_of(model, layout))
        for group in groups_of(block, layout)
        if len(group) > 1
    ]
