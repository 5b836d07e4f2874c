"""The inverse factor and the column sweep."""

import torch

from onebit_core.methods.second_order import inverse_factor, output_error, sweep


def positive_definite(size: int, rank: int | None = None) -> torch.Tensor:
    x = torch.randn(rank or 4 * size, size, generator=torch.Generator().manual_seed(size))
    return x.T @ x / len(x)


def test_factor_inverts_the_damped_hessian():
    """U^T U (H + damping) = 1."""
    hessian = positive_definite(40)
    factor = inverse_factor(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(40), rtol=1e-3, atol=1e-3)
    assert torch.equal(factor, factor.triu())


def test_a_hessian_that_cannot_be_factored_gets_more_damping():
    """An indefinite matrix is damped until it works; the result is finite with a positive diagonal."""
    hessian = positive_definite(20)
    hessian[0, 1] = hessian[1, 0] = 30.0
    factor = inverse_factor(hessian, 0.01)
    assert torch.isfinite(factor).all()
    assert (factor.diagonal() > 0).all()


def test_a_hopeless_hessian_becomes_its_diagonal():
    """Then the sweep is plain rounding."""
    hessian = torch.full((6, 6), torch.nan)
    hessian.diagonal()[:] = 1.0
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, torch.diag(factor.diagonal()))
    assert torch.isfinite(factor).all()


def test_few_samples_are_enough():
    """A Hessian of rank 3 in 32 dimensions still gives a usable factor."""
    assert torch.isfinite(inverse_factor(positive_definite(32, rank=3), 0.01)).all()


def test_the_lazy_sweep_equals_the_eager_one():
    """Blocks only postpone updates: any block size gives the same decision."""
    hessian = positive_definite(48)
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(1))
    factor = inverse_factor(hessian, 0.01)
    results = [sweep(weight, factor, lambda _c, values, _w: torch.round(values), block) for block in (1, 5, 16, 48, 64)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_the_sweep_is_the_textbook_recursion():
    """Against optimal brain quantization written out: fix a column, update the rest by the inverse Hessian."""
    hessian = positive_definite(10).double()
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(2)).double()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(10).double())
    work, expected = weight.clone(), torch.empty_like(weight)
    for column in range(10):
        expected[:, column] = torch.round(work[:, column])
        error = (work[:, column] - expected[:, column]) / inverse[column, column]
        work = work - torch.outer(error, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    actual = sweep(weight.float(), inverse_factor(hessian.float(), 0.01), lambda _c, values, _w: torch.round(values))
    assert torch.equal(actual.double(), expected)


def test_output_error_is_the_error_of_the_output():
    """tr(E H E^T) / tr(W H W^T) equals |X E^T|^2 / |X W^T|^2."""
    x = torch.randn(100, 12)
    weight, decided = torch.randn(5, 12), torch.randn(5, 12)
    expected = (x @ (weight - decided).T).square().sum() / (x @ weight.T).square().sum()
    assert abs(output_error(weight, decided, x.T @ x) - float(expected)) < 1e-4
