"""transformers loads artifacts after `import onebit_core.hf`, and what happens without it."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import onebit_core.hf
from onebit_core.artifact.reader import load_model
from tests.support.quantized import quantize_tiny

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("embedding_bits", [4, 8])
def test_from_pretrained_gives_the_same_model(tiny_llama, tmp_path, embedding_bits):
    """No missing or unexpected keys, equal logits, scales stay float16 under bfloat16, the tokenizer is there."""
    assert onebit_core.hf.registration.QUANT_METHOD == "onebit"
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "pb_llm", embedding_bits=embedding_bits)
    model, info = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model(IDS).logits, load_model(artifact, backend="dense").model(IDS).logits)
    assert AutoTokenizer.from_pretrained(artifact)("abc")["input_ids"] == [97, 98, 99]


def test_bfloat16_keeps_packed_tensors(tiny_llama, tmp_path):
    """Words stay int32 and scales float16, whatever the activations are."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.named_buffers() if "_proj" in name}
    assert dtypes == {"signs": torch.int32, "scale_in": torch.float16, "scale_out": torch.float16}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_save_pretrained_round_trips(tiny_llama, tmp_path):
    """A loaded artifact saved by transformers loads again with equal logits."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "gptq")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(model(IDS).logits, again(IDS).logits)


def test_generate_works(tiny_llama, tmp_path):
    """Transformers' own generation runs on packed layers."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "pb_llm")
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)
    output = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, eos_token_id=-1
    )
    assert output.shape == (1, 25)


def test_without_the_import_transformers_only_warns(tiny_llama, tmp_path):
    """The reason load_model is the front door: an unregistered artifact loads as fresh noise with a warning."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "rtn")
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, 'onebit_core' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Linear", "False"]
    assert "onebit" in done.stderr
