"""An error in an expert costs the model as often as tokens go there."""

import torch

from onebit_core.model.blocks import groups_of, linear_of
from onebit_core.model.loading import load_original, open_original
from onebit_core.pipeline.sensitivity import measure_sensitivity
from tests.support.tiny_model import never_route_to, save_tiny_model


def test_sensitivity_of_experts_predicts_what_an_error_costs(tmp_path):
    """Against the divergence of transformers' own model; of an expert that no token reaches it is nothing."""
    folder = save_tiny_model(tmp_path / "model", architecture="mixtral", num_layers=1)
    never_route_to(folder, block=0, expert=3)
    original = open_original(str(folder))
    draw = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(0, 256, (6, 48), generator=draw)
    original.load_outer("cpu")
    (block,) = measure_sensitivity(
        original, lambda block: groups_of(block, original.layout), ids_ST, "cpu", 1.0, lambda: None
    )
    whole, _ = load_original(str(folder), dtype=torch.float32)
    whole = whole.double()
    whole.set_experts_implementation("eager")
    experts = whole.model.layers[0].mlp.experts

    @torch.no_grad()
    def log_probabilities() -> torch.Tensor:
        return whole(input_ids=ids_ST).logits[:, :-1].flatten(0, 1).log_softmax(-1)

    before = log_probabilities()
    ratios = []
    for number in range(4):
        gate, up = experts.gate_up_proj.data[number].chunk(2)
        for linear, weight in {"gate_proj": gate, "up_proj": up, "down_proj": experts.down_proj.data[number]}.items():
            name = f"mlp.experts.{number}.{linear}"
            error_OI = 0.02 * torch.randn(linear_of(block.block, name).weight.shape, generator=draw)
            weight += error_OI
            divergence = float((before.exp() * (before - log_probabilities())).sum(-1).mean())
            weight -= error_OI
            predicted = block.cost(name, error_OI)
            if number == 3:
                assert predicted == divergence == 0
            else:
                ratios.append(divergence / predicted)
    assert all(1 / 8 < ratio < 8 for ratio in ratios), ratios
    assert 0.6 < sorted(ratios)[len(ratios) // 2] < 1.7, ratios
