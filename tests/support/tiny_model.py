"""A tiny random language model with a real tokenizer, saved as a Hugging Face folder in milliseconds.

The tokenizer is byte level: ids 0 to 255 are the bytes, 256 is `<|endoftext|>` (eos and padding), 257 is
`<|im_start|>`, 258 is `<|im_end|>`; higher ids are words of the model that decode to nothing. So every text
survives a round trip, and a random model emits broken UTF-8 often enough to test what a server does with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EOS_TOKEN = "<|endoftext|>"
EOS_ID = 256
SPECIAL_TOKENS = (EOS_TOKEN, "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>{{ call['function'] | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_POSITIONS = 512
NUM_EXPERTS = 4
WINDOW = 24
SOFT_CAP = 0.25


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte-level tokenizer described above."""
    alphabet = _bytes_in_order()
    backend = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _bytes_in_order() -> list[str]:
    """Return the printable letter GPT-2's byte-level alphabet gives to each byte 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + position) for position, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def save_tiny_model(
    folder: Path,
    *,
    architecture: str = "llama",
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vocab_size: int = 320,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Save a random float32 model and the byte tokenizer; equal arguments give equal weights.

    Args:
        folder: made if missing.
        architecture: a key of ARCHITECTURES. "opt", "gpt_neox" and "phi" have no grouped heads. "qwen3_moe", "mixtral",
            "olmoe" and "gpt_oss" have four experts, two for each token; the first block of "qwen3_moe" is a plain one.
            A sliding window of WINDOW tokens have "mistral" and "phi3" in every block, "gemma2", "gemma3" and "gpt_oss"
            in the blocks 0, 2, ..., "qwen2" in all but the first; "gemma2" caps scores at SOFT_CAP.
        hidden_size: width of the residual stream, a multiple of num_heads.
        intermediate_size: width of the feed-forward; an expert has half of it.
        num_layers: decoder blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, where the architecture groups them.
        vocab_size: at least 259, for the tokenizer's ids.
        tied: whether the head is the embedding.
        seed: of the weights.

    Returns:
        The folder.
    """
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    common = {
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": EOS_ID,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture](sizes, common).float().eval()
        for parameter in model.parameters():  # the default deviation of 0.02 makes near-ties everywhere
            if parameter.ndim >= 2:
                parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def never_route_to(folder: Path, *, block: int, expert: int) -> None:
    """Change a saved mixture so that no token ever goes to one expert of one block.

    The first feature of every token becomes large and positive, and the expert's router row looks at nothing else.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    router = next(name for name in tensors if f".{block}." in name and name.endswith(".gate.weight"))
    tensors["model.embed_tokens.weight"][:, 0] = 2.0
    tensors[router][:, 0] = 0.0
    tensors[router][expert] = 0.0
    tensors[router][expert, 0] = -100.0
    save_file(tensors, file, metadata={"format": "pt"})


def _llama_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "head_dim": sizes["hidden_size"] // sizes["num_heads"],
    }


def _llama(sizes: dict[str, int], common: dict[str, Any]) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_llama_sizes(sizes), **common))


def _qwen3(sizes: dict[str, int], common: dict[str, Any]) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_llama_sizes(sizes), **common))


def _qwen3_moe(sizes: dict[str, int], common: dict[str, Any]) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_llama_sizes(sizes),
            moe_intermediate_size=sizes["intermediate_size"] // 2,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            **common,
        )
    )


def _mixtral(sizes: dict[str, int], common: dict[str, Any]) -> MixtralForCausalLM:
    return MixtralForCausalLM(
        MixtralConfig(
            **{**_llama_sizes(sizes), "intermediate_size": sizes["intermediate_size"] // 2},
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            **common,
        )
    )


def _olmoe(sizes: dict[str, int], common: dict[str, Any]) -> OlmoeForCausalLM:
    given = {**_llama_sizes(sizes), "intermediate_size": sizes["intermediate_size"] // 2}
    del given["head_dim"]
    return OlmoeForCausalLM(OlmoeConfig(**given, num_experts=NUM_EXPERTS, num_experts_per_tok=2, **common))


def _mistral(sizes: dict[str, int], common: dict[str, Any]) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**_llama_sizes(sizes), sliding_window=WINDOW, **common))


def _qwen2(sizes: dict[str, int], common: dict[str, Any]) -> Qwen2ForCausalLM:
    given = _llama_sizes(sizes)
    del given["head_dim"]
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**given, **window, **common))


def _alternating(sizes: dict[str, int]) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    return {"sliding_window": WINDOW, "layer_types": [kinds[index % 2] for index in range(sizes["num_layers"])]}


def _gemma2(sizes: dict[str, int], common: dict[str, Any]) -> Gemma2ForCausalLM:
    caps = {"attn_logit_softcapping": SOFT_CAP, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 24}
    return Gemma2ForCausalLM(Gemma2Config(**_llama_sizes(sizes), **_alternating(sizes), **caps, **common))


def _gemma3(sizes: dict[str, int], common: dict[str, Any]) -> Gemma3ForCausalLM:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    sizes_and_windows = {**_llama_sizes(sizes), **_alternating(sizes)}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**sizes_and_windows, rope_parameters=rope, query_pre_attn_scalar=24, **common)
    )


def _gpt_oss(sizes: dict[str, int], common: dict[str, Any]) -> GptOssForCausalLM:
    model = GptOssForCausalLM(
        GptOssConfig(
            **_llama_sizes(sizes),
            **_alternating(sizes),
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **common,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, std=2.0)
    return model


def _phi(sizes: dict[str, int], common: dict[str, Any]) -> PhiForCausalLM:
    given = _llama_sizes(sizes)
    del given["head_dim"]
    given["num_key_value_heads"] = sizes["num_heads"]
    return PhiForCausalLM(PhiConfig(**given, **common))


def _phi3(sizes: dict[str, int], common: dict[str, Any]) -> Phi3ForCausalLM:
    given = _llama_sizes(sizes)
    del given["head_dim"]
    return Phi3ForCausalLM(Phi3Config(**given, sliding_window=WINDOW, **common))


def _opt(sizes: dict[str, int], common: dict[str, Any]) -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=sizes["hidden_size"],
            word_embed_proj_dim=sizes["hidden_size"],
            ffn_dim=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            **common,
        )
    )


def _gpt_neox(sizes: dict[str, int], common: dict[str, Any]) -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            **common,
        )
    )


ARCHITECTURES: dict[str, Callable[[dict[str, int], dict[str, Any]], Any]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt_oss": _gpt_oss,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
