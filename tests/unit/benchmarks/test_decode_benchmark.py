"""The decoding benchmark's prompts, and that a backend with other logits is not timed."""

import torch
from transformers import AutoModelForCausalLM

from benchmarks.decode import agreeing, measure, prompts_of


def test_rows_of_a_batch_continue_different_prompts():
    """Windows of one text, each a token later, starting over at its end."""
    prompts = prompts_of(torch.arange(10), 4, 8)
    assert prompts.tolist() == [list(range(start, start + 8)) for start in (0, 1, 0, 1)]
    assert prompts_of(torch.arange(5), 1, 32).shape == (1, 4)


def test_a_backend_with_other_logits_is_left_out(tiny_llama, capsys):
    """Compared with the reference on the prompt."""
    reference, same, other = (AutoModelForCausalLM.from_pretrained(tiny_llama).eval() for _ in range(3))
    torch.nn.init.normal_(other.model.layers[0].mlp.down_proj.weight)
    models = {"reference": reference, "same": same, "other": other}
    kept = agreeing(models, torch.arange(3, 20))
    assert list(kept) == ["reference", "same"]
    assert "other: WRONG" in capsys.readouterr().err
    rates = measure(kept, prompts_of(torch.arange(3, 20), 2, 8), new_tokens=4, rounds=1)
    assert list(rates) == ["reference", "same"]
    assert min(rates.values()) > 0
