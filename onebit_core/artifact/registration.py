"""Makes transformers build our layers: `AutoModelForCausalLM.from_pretrained` then loads an artifact like any model.

Registration uses transformers' two public decorators and happens when this module is imported; `import onebit_core.hf`
is the short way. Without it transformers only warns about the unknown `quant_method` and returns freshly initialized
weights, which is why `onebit_core.artifact.reader.load_model` is the front door.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from onebit_core.errors import CorruptArtifact, UnsupportedFormat
from onebit_core.layers import EMBEDDINGS, LayerSpec, QuantizedEmbedding, TiedHead, build_layer
from onebit_core.model.experts import use_linear_experts
from onebit_core.model.replace import replace_module

QUANT_METHOD = "onebit"
CONFIG_VERSION = 1


class OnebitQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact's config.json.

    Attributes:
        layers: module path to LayerSpec values.
        embedding_bits: 16 if embedding and head are stored as in the original, 8 or 4 if in so many bits.
        format_version: of this layout; newer ones are refused.
    """

    def __init__(
        self,
        layers: dict[str, Any] | None = None,
        embedding_bits: int = 16,
        format_version: int = CONFIG_VERSION,
        **ignored: Any,
    ) -> None:
        del ignored
        self.quant_method: Any = QUANT_METHOD  # transformers' enum has no member for methods of others
        self.layers = layers or {}
        self.embedding_bits = embedding_bits
        self.format_version = format_version

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "embedding_bits": self.embedding_bits,
            "layers": self.layers,
        }


class OnebitQuantizer(HfQuantizer):
    """Swaps the linears of a skeleton for packed layers before transformers reads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del kwargs
        assert isinstance(self.quantization_config, OnebitQuantizationConfig)
        swap_modules(model, self.quantization_config)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Packed layers can be saved again with save_pretrained."""
        del args, kwargs
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed layers have no gradients."""
        return False


def swap_modules(model: PreTrainedModel, config: OnebitQuantizationConfig) -> None:
    """Put empty packed layers in the places the configuration names.

    Raises:
        UnsupportedFormat: the configuration is of a newer version.
        CorruptArtifact: it names a module the architecture does not have, or one of another shape.
    """
    if config.format_version > CONFIG_VERSION:
        raise UnsupportedFormat(
            f"artifact format {config.format_version} is newer than {CONFIG_VERSION}, "
            "which this version reads; upgrade onebit"
        )
    if config.embedding_bits not in (*EMBEDDINGS, 16) or not isinstance(config.layers, dict):
        raise CorruptArtifact(
            f"config.json: quantization_config has embedding_bits {config.embedding_bits!r} (4, 8 or 16) and layers of "
            f"type {type(config.layers).__name__} (an object)"
        )
    use_linear_experts(model)
    for name, values in config.layers.items():
        spec = LayerSpec.from_dict(values)
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CorruptArtifact(f"config.json names a layer {name!r} that the architecture does not have") from None
        if type(module) is not nn.Linear:
            raise CorruptArtifact(f"config.json: layer {name!r} is a {type(module).__name__}, not a linear")
        if (spec.out_features, spec.in_features) != tuple(module.weight.shape):
            raise CorruptArtifact(
                f"config.json: layer {name!r} has {spec.out_features} x {spec.in_features} weights, "
                "which is not the architecture's shape"
            )
        with module.weight.device:
            replace_module(model, name, build_layer(spec))
    if config.embedding_bits < 16:
        swap_embedding(model, config.embedding_bits)


def swap_embedding(model: PreTrainedModel, bits: int) -> QuantizedEmbedding:
    """Put an empty embedding of 8 or 4 bits in place, and a tied head where the model ties them; return the embedding.

    Raises:
        CorruptArtifact: the model's embedding is more than a table (it also scales, say).
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise CorruptArtifact(f"config.json: embedding_bits {bits}, but the embedding is a {type(table).__name__}")
    with table.weight.device:
        embedding = EMBEDDINGS[bits](table.num_embeddings, table.embedding_dim)
    model.set_input_embeddings(embedding)
    if ties_embedding(model):
        model.set_output_embeddings(TiedHead(embedding))
        # Nothing is left to tie: the head has no weight of its own.
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
    return embedding


def ties_embedding(model: PreTrainedModel) -> bool:
    """Return whether the model's head is its embedding."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second import must not fail
    register_quantization_config(QUANT_METHOD)(OnebitQuantizationConfig)
    register_quantizer(QUANT_METHOD)(OnebitQuantizer)
