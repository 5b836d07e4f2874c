"""LinearExperts computes what transformers' own experts compute, and is read from every form on disk."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onebit_core.errors import BadWeight, UnsupportedModel
from onebit_core.model.blocks import groups_of, linear_names, shared_inputs, steps_of
from onebit_core.model.experts import FUSED, LinearExperts, experts_in, use_linear_experts
from onebit_core.model.loading import build_skeleton, load_original, open_original
from onebit_core.model.weights import WeightStore
from tests.support.tiny_model import save_tiny_model

MIXTURES = ["qwen3_moe", "mixtral", "olmoe"]
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("mixture") / request.param, architecture=request.param)


@pytest.fixture(scope="module")
def fused_folder(folder, tmp_path_factory):
    """The same model with the experts of a block in one tensor."""
    target = tmp_path_factory.mktemp("fused") / folder.name
    shutil.copytree(folder, target)
    (target / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, save_original_format=False)
    return target


def both_experts(folder):
    """Return the last block's experts as transformers has them, and as linears with the same weights."""
    model, _ = load_original(str(folder), dtype=torch.float32)
    fused = model.model.layers[-1].mlp.experts
    num_experts, twice_inner, hidden = fused.gate_up_proj.shape
    linear = LinearExperts(num_experts, hidden, twice_inner // 2, fused.act_fn).requires_grad_(requires_grad=False)
    for number, expert in enumerate(linear):
        gate, up = fused.gate_up_proj[number].chunk(2)
        expert.gate_proj.weight.copy_(gate)
        expert.up_proj.weight.copy_(up)
        expert.down_proj.weight.copy_(fused.down_proj[number])
    return fused, linear


def routes(num_tokens, num_experts=4, chosen=2):
    """Return random distinct experts for each token, and their shares."""
    draw = torch.Generator().manual_seed(num_tokens)
    scores = torch.rand(num_tokens, num_experts, generator=draw).softmax(-1)
    weights, index = scores.topk(chosen)
    return index, weights


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_the_output_is_that_of_transformers(folder, implementation, num_tokens):
    """Every implementation of theirs, one token to many; in float32 to rounding."""
    fused, linear = both_experts(folder)
    fused.config._experts_implementation = implementation
    hidden = torch.randn(num_tokens, 64)
    index, weights = routes(num_tokens)
    torch.testing.assert_close(linear(hidden, index, weights), fused(hidden, index, weights), rtol=1e-5, atol=1e-6)


def test_experts_without_tokens_and_an_order_of_choices_are_no_matter(folder):
    """All tokens to experts 2 and 0: the others are not computed, and shares belong to their experts."""
    fused, linear = both_experts(folder)
    hidden, index = torch.randn(5, 64), torch.tensor([[2, 0], [0, 2], [2, 0], [0, 2], [2, 0]])
    weights = torch.rand(5, 2)
    for number in (1, 3):
        linear[number] = torch.nn.Module()  # has no forward
    torch.testing.assert_close(linear(hidden, index, weights), fused(hidden, index, weights), rtol=1e-5, atol=1e-6)


def test_the_output_has_the_dtype_of_the_hidden_states(folder):
    """Mixtral's router gives float32 shares in a bfloat16 model."""
    fused, linear = both_experts(folder)
    index, weights = routes(9)
    hidden = torch.randn(9, 64).bfloat16()
    output = linear.bfloat16()(hidden, index, weights)
    assert output.dtype == torch.bfloat16
    expected = fused.bfloat16()(hidden, index, weights)
    torch.testing.assert_close(output, expected, rtol=5e-2, atol=5e-3)


def test_gradients_are_those_of_transformers(folder):
    """Reconstruction trains through the mixture: gradients of input and shares."""
    fused, linear = both_experts(folder)
    index, shares = routes(17)
    gradients = []
    for experts in (fused, linear):
        hidden = torch.randn(17, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        weights = shares.clone().requires_grad_()
        experts(hidden, index, weights).square().sum().backward()
        gradients.append((hidden.grad, weights.grad))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_input_of_is_what_the_linears_multiply(folder):
    """Row by row, for every linear; without routes, all tokens."""
    _, experts = both_experts(folder)
    hidden = torch.randn(21, 64)
    index, weights = routes(21)
    seen = {}
    for name, module in experts.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(lambda _, arguments, name=name: seen.__setitem__(name, arguments[0]))
    experts(hidden, index, weights)
    routed = dict(seen)
    for name, rows in routed.items():
        assert torch.equal(experts.input_of(name, hidden, index), rows)
    for number, expert in enumerate(experts):
        expert(hidden)
        for linear in ("gate_proj", "up_proj", "down_proj"):
            everywhere = experts.input_of(f"{number}.{linear}", hidden, None)
            assert torch.equal(everywhere, seen[f"{number}.{linear}"])
            assert len(everywhere) == 21


@pytest.mark.parametrize("form", ["one tensor per expert", "fused"])
def test_an_original_has_the_logits_of_transformers(folder, fused_folder, form):
    """Read block by block, whichever form the file has."""
    path = str(folder if form == "one tensor per expert" else fused_folder)
    names = WeightStore(fused_folder if form == "fused" else folder).names()
    assert any(name.endswith("experts.gate_up_proj") for name in names) == (form == "fused")
    original = open_original(path)
    original.load_outer("cpu")
    for index in range(len(original.blocks)):
        original.load_block(index, "cpu")
    expected, _ = load_original(str(folder), dtype=torch.float32)
    torch.testing.assert_close(original.model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert original.num_parameters == expected.num_parameters()


def test_both_forms_hold_the_same_weights(folder, fused_folder):
    """Bit for bit, under the names of the skeleton."""
    first, second = open_original(str(folder)), open_original(str(fused_folder))
    for name, parameter in first.model.named_parameters():
        if name in first.model.all_tied_weights_keys:
            continue
        tensors = [one.store.tensor(one.stored_name(name)) for one in (first, second)]
        assert torch.equal(*tensors), name
        assert tensors[0].shape == parameter.shape
        sizes = [one.store.num_bytes(one.stored_name(name)) for one in (first, second)]
        assert sizes == [parameter.numel() * 4] * 2


def test_a_damaged_expert_is_named_and_the_others_are_read(fused_folder, tmp_path):
    """A NaN in the fused tensor is one expert's: only its own rows are read."""
    broken = tmp_path / "broken"
    shutil.copytree(fused_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 70, 3] = float("nan")  # of 128 rows, gate has the first 64
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    store = WeightStore(broken)
    for name in ("2.gate_proj", "2.down_proj", "3.up_proj"):
        assert torch.isfinite(store.tensor(f"model.layers.1.mlp.experts.{name}.weight")).all()
    with pytest.raises(BadWeight, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        store.tensor("model.layers.1.mlp.experts.2.up_proj.weight")


def test_a_missing_expert_is_refused_by_name(tmp_path):
    """Before any work."""
    path = save_tiny_model(tmp_path / "model", architecture="qwen3_moe")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[name]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"no tensor '{name}'"):
        open_original(str(path))


def test_steps_of_a_plain_and_of_a_mixed_block(tmp_path):
    """The first block of the tiny Qwen3-MoE is plain; in the second, one step holds a group for each expert."""
    original = open_original(str(save_tiny_model(tmp_path / "model", architecture="qwen3_moe")))
    plain, mixed = (steps_of(block, original.layout) for block in original.blocks)
    assert [len(step) for step in plain] == [1, 1, 1, 1]
    assert [len(step) for step in mixed] == [1, 1, 4, 4]
    assert mixed[2][3] == ("mlp.experts.3.gate_proj", "mlp.experts.3.up_proj")
    assert mixed[3][0] == ("mlp.experts.0.down_proj",)
    named = set(linear_names(original.blocks[1], original.layout))
    linears = {name for name, module in original.blocks[1].named_modules() if type(module) is torch.nn.Linear}
    assert named == linears
    assert ["model.layers.1.mlp.experts.2.gate_proj", "model.layers.1.mlp.experts.2.up_proj"] in shared_inputs(
        original.model
    )
    assert len(groups_of(original.blocks[1], original.layout)) == 10


def test_other_models_are_left_alone(tiny_llama):
    """A model without a mixture has the same modules as before."""
    config = open_original(str(tiny_llama)).config
    model = build_skeleton(config)
    before = [name for name, _ in model.named_modules()]
    use_linear_experts(model)
    assert [name for name, _ in model.named_modules()] == before
    assert experts_in(model) is None


def test_the_classes_replaced_are_those_of_the_installed_transformers(folder):
    """A class that was renamed would leave a fused tensor behind, which nobody quantizes."""
    model, _ = load_original(str(folder), dtype=torch.float32)
    assert type(model.model.layers[-1].mlp.experts).__name__ in FUSED
