"""What an error in a layer's output costs the whole model: one backward pass, one block in memory at a time.

    dL  ~=  1/2 sum_o F_o (E H E^T)_oo        E = W - W_quantized,  H = mean x x^T,  F_o = mean (dL / dy_o)^2

L is the next-token loss of the original on calibration text; E H E^T is what the error does to the output, and F how
much the loss notices. Blocks are run forward once, keeping only what enters each, then taken from the last to the
first: loaded, run again with gradients, and released. So a model that fits nowhere as a whole is measured all the same.

Sources: the diagonal of the Fisher information as weight of an error: Optimal Brain Surgeon's family, and for low-bit
language models SqueezeLLM (arXiv:2306.07629, section 4.1); H and F together are K-FAC's factors (arXiv:1503.05671,
section 3), of the second only the diagonal.

Shape suffixes: S = samples, T = tokens, D = hidden size, I = input features, O = output features, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.calibration.statistics import InputStatistics, StatisticsAccumulator
from onebit_core.model.blocks import Groups, linear_of
from onebit_core.model.loading import OriginalModel
from onebit_core.model.stand_ins import given_hidden
from onebit_core.pipeline.capture import CapturedInputs


@dataclass(frozen=True, kw_only=True)
class BlockSensitivity:
    """One block of the original with what was measured in it.

    Attributes:
        index: of the block.
        block: the decoder block, loaded until the next one is asked for.
        statistics: linear name to the second moments of its input; one object for a group.
        importance: linear name to F, float32 [O].
    """

    index: int
    block: nn.Module
    statistics: dict[str, InputStatistics] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)

    def cost(self, name: str, error_OI: Tensor) -> float:
        """Return the loss, in nats a token, that replacing a weight by one that differs by `error_OI` costs."""
        hessian_II = self.statistics[name].hessian_II
        return 0.5 * float((self.importance[name] * ((error_OI @ hessian_II) * error_OI).sum(1)).sum())


def measure_sensitivity(
    original: OriginalModel,
    groups_of: Callable[[nn.Module], Groups],
    ids_ST: Tensor,
    device: str,
    first_token_weight: float,
    check: Callable[[], None],
) -> Iterator[BlockSensitivity]:
    """Yield every block, the last one first, with the sensitivity of its linears.

    Args:
        original: with its outer weights, head included, loaded.
        groups_of: linears of a block by shared input.
        ids_ST: calibration tokens, int64.
        device: where blocks are run.
        first_token_weight: of the first token, in the statistics of attention's input.
        check: called before every block; may raise to stop.
    """
    captured = CapturedInputs(original, ids_ST, device)
    inputs: list[Tensor] = []
    runs: list[Callable[[nn.Module, Tensor], Tensor]] = []
    for index in range(len(original.blocks)):
        check()
        inputs.append(captured.hidden_STD.clone())
        runs.append(captured.runner())
        captured.advance(original.load_block(index, device))
        original.release_block(index)
    gradient_STD = _gradient_of_loss(original, ids_ST, captured.hidden_STD, device)
    for index in reversed(range(len(original.blocks))):
        check()
        block = original.load_block(index, device)
        yield _backward(index, block, groups_of(block), (inputs.pop(), gradient_STD), runs.pop(), first_token_weight)
        original.release_block(index)


def _gradient_of_loss(original: OriginalModel, ids_ST: Tensor, hidden_STD: Tensor, device: str) -> Tensor:
    """Return the gradient of the summed next-token loss after the last block, float32 [S, T, D]."""
    gradients = []
    for ids_T, hidden_TD in zip(ids_ST.to(device), hidden_STD, strict=True):
        hidden_1TD = hidden_TD[None].to(device).requires_grad_()
        with given_hidden(original.blocks, hidden_1TD):
            logits_1TV = original.model(input_ids=ids_T[None], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_1TV[0, :-1].float(), ids_T[1:], reduction="sum")
        (gradient_1TD,) = torch.autograd.grad(loss, hidden_1TD)
        gradients.append(gradient_1TD[0].cpu())
    return torch.stack(gradients)


def _backward(
    index: int,
    block: nn.Module,
    groups: Groups,
    states: tuple[Tensor, Tensor],
    run: Callable[[nn.Module, Tensor], Tensor],
    first_token_weight: float,
) -> BlockSensitivity:
    """Run one block forward and backward over all samples; the gradient is carried to its input, in place."""
    inputs_STD, gradient_STD = states
    recorders = [
        _Recorder(block, group, first_token_weight if position == 0 else 1.0) for position, group in enumerate(groups)
    ]
    for sample, hidden_TD in enumerate(inputs_STD):
        hidden_1TD = hidden_TD[None].clone().requires_grad_()
        output_1TD = run(block, hidden_1TD)
        output_1TD.backward(gradient_STD[sample][None].to(output_1TD))
        assert hidden_1TD.grad is not None
        gradient_STD[sample] = hidden_1TD.grad[0]
    result = BlockSensitivity(index=index, block=block)
    while recorders:  # each lets its sums go before the next makes its means
        recorders.pop(0).finish(result, inputs_STD.shape[:2].numel())
    return result


class _Recorder:
    """Records input moments and squared output gradients of the linears that share one input."""

    def __init__(self, block: nn.Module, names: tuple[str, ...], first_token_weight: float) -> None:
        self.names = names
        linears = [linear_of(block, name) for name in names]
        device = linears[0].weight.device
        self.moments = StatisticsAccumulator(
            linears[0].in_features, first_token_weight=first_token_weight, device=device
        )
        self.squares = [torch.zeros(linear.out_features, device=device) for linear in linears]
        self.handles = [linears[0].register_forward_pre_hook(self._record_input)]
        for place, linear in enumerate(linears):
            self.handles.append(linear.register_forward_hook(self._recorder_of_gradient(place)))

    def _record_input(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        del module
        x = arguments[0].detach()
        self.moments.add(x.reshape(1, -1, x.shape[-1]))

    def _recorder_of_gradient(self, place: int) -> Callable[..., None]:
        def record(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            self.squares[place] += rows.square().sum(0)

        def watch(module: nn.Module, arguments: Any, output: Tensor) -> None:
            del module, arguments
            output.register_hook(record)

        return watch

    def finish(self, result: BlockSensitivity, num_tokens: int) -> None:
        """Write what was recorded, and stop recording.

        Of an expert, H is a mean over its own tokens and F over all, so that errors count as often as they are made.
        """
        for handle in self.handles:
            handle.remove()
        statistics = self.moments.finish()
        for name, squares_O in zip(self.names, self.squares, strict=True):
            result.statistics[name] = statistics
            result.importance[name] = squares_O / num_tokens
