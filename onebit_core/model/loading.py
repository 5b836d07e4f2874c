"""Opens an original causal language model: a Hugging Face folder, a hub id or a GGUF file.

Each becomes a folder with safetensors first: a hub id is downloaded (weights in safetensors, configuration, tokenizer,
nothing else), a GGUF file is converted once into a cache. Code from a model folder never runs, pickles are never read.

`open_original` gives a skeleton without weights, which blocks are then read into one by one. `load_original` gives the
whole model, for evaluation.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.errors import ModelNotFound, NotEnoughMemory, UnsupportedModel, first_line
from onebit_core.model.blocks import BlockLayout, blocks_of, layout_of
from onebit_core.model.experts import use_linear_experts
from onebit_core.model.gguf import convert_gguf
from onebit_core.model.weights import WeightStore

HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


class OriginalModel:
    """An original whose blocks are in memory only while asked for.

    Attributes:
        name: as the user named it.
        folder: where its files are.
        model: transformers' model; weights outside of memory are on the meta device.
        tokenizer: its tokenizer.
        layout: its row of the architecture table.
        store: its weights on disk.
        num_parameters: weights in all, tied ones counted once.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.config = self._read_config()
        self.architecture = architecture_of(self.config, folder)
        self.layout: BlockLayout = layout_of(self.architecture)
        self.store = WeightStore(folder)
        self.tokenizer = read_tokenizer(folder)
        self.model = self._skeleton()
        self.blocks: nn.ModuleList = blocks_of(self.model, self.layout)
        self._tied = set(self.model.all_tied_weights_keys)
        named = self.model.named_parameters()
        self.num_parameters = sum(tensor.numel() for name, tensor in named if name not in self._tied)
        self._check_shapes()

    def _read_config(self) -> Any:
        """Read config.json."""
        return read_config(self.folder)

    def config_values(self) -> dict[str, Any]:
        """Return config.json as an artifact keeps it, without what concerns its folder."""
        values: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return {key: value for key, value in values.items() if key not in ("auto_map", "_name_or_path")}

    def _skeleton(self) -> PreTrainedModel:
        """Build the model without weights; an error names the folder."""
        try:
            return build_skeleton(self.config)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{self.folder}: {error}") from error

    def outer_parameters(self, *, head: bool) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of everything outside of the blocks (embedding, final norm), tied ones once.

        Args:
            head: whether the output head, which only logits need, is among them.
        """
        inner = f"{self.model.base_model_prefix}."
        for name, parameter in list(self.model.named_parameters()):
            outside = not name.startswith(f"{self.layout.blocks}.") and name not in self._tied
            if outside and (head or name.startswith(inner)):
                yield name, parameter

    def load_outer(self, device: str, *, head: bool = True) -> None:
        """Read everything outside of the blocks, as float32; without the head the model gives no logits."""
        for name, parameter in self.outer_parameters(head=head):
            if parameter.is_meta:
                self._assign(self.model, name, self.stored_name(name), device)
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            if not name.startswith(f"{self.layout.blocks}."):
                module_name, _, child = name.rpartition(".")
                self.model.get_submodule(module_name)._buffers[child] = buffer.to(device)
        self.store.release()

    def release_outer(self) -> None:
        """Forget the weights outside of the blocks."""
        for name, parameter in self.outer_parameters(head=True):
            module_name, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(module_name), child, nn.Parameter(parameter.to("meta"), False))  # noqa: FBT003
        self.model.tie_weights()

    def load_block(self, index: int, device: str) -> nn.Module:
        """Read one block, as float32."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                self._assign(block, name, self.stored_name(f"{self.layout.blocks}.{index}.{name}"), device)
        self.store.release()
        return block.to(device)

    def release_block(self, index: int) -> None:
        """Forget the dense weights of one block; packed layers in it stay, on the CPU."""
        block = self.blocks[index].cpu()
        for module in block.modules():
            if type(module) is nn.Linear:
                module.to("meta")

    def stored_name(self, name: str) -> str:
        """Return the name on disk of one of the model's parameters (some checkpoints lack the outer prefix)."""
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.store:
                return candidate
        return name

    def _check_shapes(self) -> None:
        """Compare every weight's shape on disk with the model's, before hours of work go into one that is wrong."""
        for name, parameter in self.model.named_parameters():
            if name in self._tied:
                continue
            stored_name = self.stored_name(name)
            shape = self.store.shape(stored_name)
            if shape != tuple(parameter.shape):
                raise UnsupportedModel(
                    f"{self.folder}: tensor {stored_name!r} has shape {list(shape)}, "
                    f"but config.json asks for {list(parameter.shape)}"
                )

    def _assign(self, root: nn.Module, name: str, stored_name: str, device: str) -> None:
        tensor = self.store.tensor(stored_name)
        module_name, _, child = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(device=device, dtype=torch.float32), requires_grad=False)
        setattr(root.get_submodule(module_name), child, parameter)


def open_original(name: str) -> OriginalModel:
    """Open a model without reading its weights.

    Raises:
        ModelNotFound: no such folder, file or hub id.
        UnsupportedModel: an unknown architecture, no safetensors weights, or a tensor missing or misshapen.
    """
    return OriginalModel(name, find_folder(name))


def load_original(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a whole model, dense, in eval mode.

    Raises:
        ModelNotFound: no such folder, file or hub id.
        UnsupportedModel: transformers does not know it, no safetensors weights, or a tensor missing or misshapen.
    """
    folder = find_folder(name)
    config = read_config(folder)
    WeightStore(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise UnsupportedModel(f"{folder}: transformers cannot load it ({first_line(error)})") from error
    model, problems = loaded
    if problems["missing_keys"]:  # transformers would go on with random numbers in their place
        name = min(problems["missing_keys"])
        raise UnsupportedModel(f"{folder}: the weights hold no tensor {name!r}, which the architecture needs")
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model.to(device), read_tokenizer(folder)


def find_folder(name: str) -> Path:
    """Turn a folder, a GGUF file or a hub id into a folder with safetensors.

    Raises:
        ModelNotFound: it is none of these.
        UnsupportedModel: a file that is no GGUF file, or one that transformers cannot convert.
    """
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:
        raise ModelNotFound(f"{name}: not a path this machine can follow ({first_line(error)})") from error
    if is_folder:
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{name}: a folder without config.json is not a Hugging Face model")
        return path
    if is_file:
        if path.suffix != ".gguf":
            raise UnsupportedModel(f"{name}: a file must be a .gguf; give the model's folder for other formats")
        return convert_gguf(path)
    if not HUB_ID.match(name):
        raise ModelNotFound(f"{name}: no such folder or file, and not a hub id of the form owner/name")
    return _download(name)


def _download(name: str) -> Path:
    """Fetch a hub model's safetensors, configuration and tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise ModelNotFound(f"{name}: no such folder, and the hub did not deliver it ({reason})") from error


def read_config(folder: Path) -> Any:
    """Read config.json without running code from the folder.

    Raises:
        UnsupportedModel: transformers does not know the model type, or the model is already quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(f"{folder}: config.json cannot be used ({first_line(error)})") from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{folder}: the model is already quantized; give the original")
    return config


def architecture_of(config: Any, folder: Path) -> str:
    """Return the name of the model's class, as config.json gives it.

    Raises:
        UnsupportedModel: it gives none.
    """
    match getattr(config, "architectures", None):
        case [str(name), *_]:
            return name
        case other:
            raise UnsupportedModel(
                f"{folder}: config.json has architectures {other!r}; it must name the model's class, "
                f'such as ["LlamaForCausalLM"]'
            )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer.

    Raises:
        UnsupportedModel: there is none that transformers can read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UnsupportedModel(f"{folder}: no usable tokenizer ({first_line(error)})") from error
    return tokenizer


def build_skeleton(config: Any) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device and whose buffers are real, in eval mode.

    Raises:
        NotEnoughMemory: a single weight is larger than the machine's memory.
        UnsupportedModel: transformers cannot build it from these values.
    """
    try:
        with init_empty_weights(include_buffers=False):  # attention: sdpa, or eager where a model has only that
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            total = psutil.virtual_memory().total / 2**30
            reason = f"a single weight of the model is larger than this machine's {total:.0f} GiB"
            raise NotEnoughMemory(reason) from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UnsupportedModel(f"config.json: transformers cannot build a model of its values ({reason})") from error
    use_linear_experts(model)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model
