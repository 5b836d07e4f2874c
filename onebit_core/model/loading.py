"""Opens an original causal language model: a Hugging Face folder, a hub id or a GGUF file.

Each becomes a folder with safetensors first: a hub id is downloaded (weights in safetensors, configuration, tokenizer,
nothing else), a GGUF file is converted once into a cache. Code from a model folder never runs, pickles are never read.

`open_original` gives a skeleton without weights, which blocks are then read into one by one. `load_original` gives the
whole model, for evaluation.
"""

import re
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.errors import ModelNotFound, NotEnoughMemory, UnsupportedModel
from onebit_core.model.blocks import BlockLayout, blocks_of, layout_of
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
        self.config = read_config(folder)
        self.architecture = (getattr(self.config, "architectures", None) or ["unknown"])[0]
        self.layout: BlockLayout = layout_of(self.architecture)
        self.store = WeightStore(folder)
        self.tokenizer = read_tokenizer(folder)
        self.model = build_skeleton(self.config)
        self.blocks: nn.ModuleList = blocks_of(self.model, self.layout)
        self._tied = set(self.model.all_tied_weights_keys)
        named = self.model.named_parameters()
        self.num_parameters = sum(tensor.numel() for name, tensor in named if name not in self._tied)

    def load_outer(self, device: str) -> None:
        """Read everything outside of the blocks (embedding, final norm, head), as float32."""
        for name, parameter in list(self.model.named_parameters()):
            outside = not name.startswith(f"{self.layout.blocks}.") and name not in self._tied
            if outside and parameter.is_meta:
                self._assign(self.model, name, self.stored_name(name), device)
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            if not name.startswith(f"{self.layout.blocks}."):
                module_name, _, child = name.rpartition(".")
                self.model.get_submodule(module_name)._buffers[child] = buffer.to(device)

    def load_block(self, index: int, device: str) -> nn.Module:
        """Read one block, as float32."""
        block = self.blocks[index]
        for name, parameter in list(block.named_parameters()):
            if parameter.is_meta:
                self._assign(block, name, self.stored_name(f"{self.layout.blocks}.{index}.{name}"), device)
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

    def _assign(self, root: nn.Module, name: str, stored_name: str, device: str) -> None:
        tensor = self.store.tensor(stored_name)
        module_name, _, child = name.rpartition(".")
        module = root.get_submodule(module_name)
        expected = getattr(module, child).shape
        if tensor.shape != expected:
            raise UnsupportedModel(
                f"{self.folder}: tensor {stored_name!r} has shape {list(tensor.shape)}, "
                f"but config.json asks for {list(expected)}"
            )
        parameter = nn.Parameter(tensor.to(device=device, dtype=torch.float32), requires_grad=False)
        setattr(module, child, parameter)


def open_original(name: str) -> OriginalModel:
    """Open a model without reading its weights.

    Raises:
        ModelNotFound: no such folder, file or hub id.
        UnsupportedModel: an unknown architecture, or no safetensors weights.
    """
    return OriginalModel(name, find_folder(name))


def load_original(
    name: str, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a whole model, dense, in eval mode.

    Raises:
        ModelNotFound: no such folder, file or hub id.
        UnsupportedModel: transformers does not know it, or no safetensors weights.
    """
    folder = find_folder(name)
    config = read_config(folder)
    WeightStore(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model.to(device), read_tokenizer(folder)


def find_folder(name: str) -> Path:
    """Turn a folder, a GGUF file or a hub id into a folder with safetensors.

    Raises:
        ModelNotFound: it is none of these.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(f"{name}: a folder without config.json is not a Hugging Face model")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModel(f"{name}: a file must be a .gguf; give the model's folder for other formats")
        return convert_gguf(path)
    if not HUB_ID.match(name):
        raise ModelNotFound(f"{name}: no such folder or file, and not a hub id of the form owner/name")
    return _download(name)


def _download(name: str) -> Path:
    """Fetch a hub model's safetensors, configuration and tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelNotFound(f"{name}: no such folder, and the hub did not deliver it ({reason})") from error


def read_config(folder: Path) -> Any:
    """Read config.json without running code from the folder.

    Raises:
        UnsupportedModel: transformers does not know the model type, or the model is already quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModel(f"{folder}: config.json cannot be used ({str(error).splitlines()[0]})") from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{folder}: the model is already quantized; give the original")
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer.

    Raises:
        UnsupportedModel: there is none that transformers can read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedModel(f"{folder}: no usable tokenizer ({reason})") from error
    return tokenizer


def build_skeleton(config: Any) -> PreTrainedModel:
    """Build a model whose parameters are on the meta device and whose buffers are real, in eval mode.

    Raises:
        NotEnoughMemory: a single weight is larger than the machine's memory.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
            )
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        total = psutil.virtual_memory().total / 2**30
        raise NotEnoughMemory(f"a single weight of the model is larger than this machine's {total:.0f} GiB") from error
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model
