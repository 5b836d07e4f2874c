"""Where OneBit starts: the rank-one model of magnitudes."""

import torch

from onebit_core.methods.rank_one import fit_rank_one


def nmf_rank_one(magnitude_OI: torch.Tensor, steps: int = 200) -> torch.Tensor:
    """Return h g^T by multiplicative updates from a random start: Lee and Seung, 2001, for one component."""
    generator = torch.Generator().manual_seed(0)
    h_O1, g_1I = (torch.rand(*shape, generator=generator) + 0.1 for shape in ((len(magnitude_OI), 1), (1, 96)))
    for _ in range(steps):
        g_1I *= (h_O1.T @ magnitude_OI) / (h_O1.T @ h_O1 @ g_1I)
        h_O1 *= (magnitude_OI @ g_1I.T) / (h_O1 @ g_1I @ g_1I.T)
    return h_O1 @ g_1I


def test_a_start_by_nmf_is_the_start_by_svd():
    """OneBit's two starts (arXiv:2402.11295, section 3.3) are one: the best rank-one fit of |W| is not negative."""
    rows, columns = torch.rand(64, 1) + 0.2, torch.rand(1, 96) + 0.2
    magnitude_OI = (torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * rows * columns).abs()
    left, size, right = torch.linalg.svd(magnitude_OI, full_matrices=False)
    svd_OI = size[0] * torch.outer(left[:, 0], right[0])
    h_O, g_I = fit_rank_one(magnitude_OI)
    for found_OI in (nmf_rank_one(magnitude_OI), torch.outer(h_O, g_I)):
        torch.testing.assert_close(found_OI, svd_OI, rtol=2e-3, atol=1e-4)
