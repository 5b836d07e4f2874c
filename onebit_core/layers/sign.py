"""SignLinear: a sum of scaled sign planes.

    W_oi = sum_p  h_po * c_pog * S_poi * g_pi   +  m_og          (g = the group that column i belongs to)

One plane with h and g is OneBit's layer (arXiv:2402.11295, section 3.2, without its LayerNorm); one plane with h alone
is a row-wise sign matrix; more planes are residual binaries. Group scale c and shift m are optional, as are h and g.
"""

from typing import ClassVar

import torch
from torch import Tensor

from onebit_core.kernels import LinearOperands, num_words, pack_signs, sign_dequantize, sign_matmul, sign_terms
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.salient import SalientWeights
from onebit_core.layers.spec import LayerSpec


class SignLinear(QuantizedLinear):
    """Sign planes with scales.

    Tensors: signs int32 [P, O, W]; scale_in float16 [P, I]; scale_out float16 [P, O]; group_scale float16 [P, O, G];
    shift float16 [O, Gs]. All but signs only where the spec has them.
    """

    PARTS: ClassVar[dict[str, str]] = {
        "signs": "signs",
        "scale_in": "scales",
        "scale_out": "scales",
        "group_scale": "scales",
        "shift": "scales",
    }
    signs: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        planes, rows, columns = spec.planes, spec.out_features, spec.in_features
        self.register_buffer("signs", torch.empty(planes, rows, num_words(columns), dtype=torch.int32))
        shapes = {
            "scale_in": (planes, columns) if spec.scale_in else None,
            "scale_out": (planes, rows) if spec.scale_out else None,
            "group_scale": (planes, rows, spec.groups) if spec.groups else None,
            "shift": (rows, spec.shift_groups) if spec.shift_groups else None,
        }
        for name, shape in shapes.items():
            if shape is not None:
                self.register_buffer(name, torch.empty(shape, dtype=torch.float16))

    @classmethod
    @torch.no_grad()
    def from_parts(
        cls,
        signs_POI: Tensor,
        *,
        scale_in_PI: Tensor | None = None,
        scale_out_PO: Tensor | None = None,
        group_scale_POG: Tensor | None = None,
        shift_OG: Tensor | None = None,
        salient: SalientWeights | None = None,
    ) -> "SignLinear":
        """Pack a layer.

        Args:
            signs_POI: floating or integer; negative entries become -1, all others +1.
            scale_in_PI: floating, or None for ones; scales are stored as float16.
            scale_out_PO: floating, or None for ones.
            group_scale_POG: floating, or None.
            shift_OG: floating, or None.
            salient: weights that replace the base, or None.
        """
        planes, rows, columns = signs_POI.shape
        spec = LayerSpec(
            format="sign",
            in_features=columns,
            out_features=rows,
            planes=planes,
            groups=0 if group_scale_POG is None else group_scale_POG.shape[-1],
            shift_groups=0 if shift_OG is None else shift_OG.shape[-1],
            scale_in=scale_in_PI is not None,
            scale_out=scale_out_PO is not None,
            salient=salient.spec() if salient else None,
        )
        with signs_POI.device:
            layer = cls(spec)
        layer.signs.copy_(pack_signs(signs_POI))
        scales = {"scale_in": scale_in_PI, "scale_out": scale_out_PO, "group_scale": group_scale_POG, "shift": shift_OG}
        for name, value in scales.items():
            if value is not None:
                layer.get_buffer(name).copy_(value)
        if layer.salient is not None and salient is not None:
            layer.salient.fill(salient)
        return layer

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the op's arguments: absent scales as ones, absent group scale and shift as empty."""
        planes, device = self.spec.planes, self.signs.device
        ones_in = torch.ones(planes, self.in_features, device=device)
        ones_out = torch.ones(planes, self.out_features, device=device)
        empty = torch.empty(0, device=device)
        stored = self._buffers
        return (
            self.signs,
            _first(stored.get("scale_in"), ones_in),
            _first(stored.get("scale_out"), ones_out),
            _first(stored.get("group_scale"), empty),
            _first(stored.get("shift"), empty),
        )

    def base_weight(self) -> Tensor:
        """Return the dense sum of planes, float32 [O, I]."""
        return sign_dequantize(*self._operands())

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply through `sign_matmul`."""
        return sign_matmul(x, *self._operands())

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return the planes in the form that packed kernels read."""
        stored = self._buffers
        terms = sign_terms(
            self.signs,
            scale_in_PI=stored.get("scale_in"),
            scale_out_PO=stored.get("scale_out"),
            group_scale_POG=stored.get("group_scale"),
            shift_OG=stored.get("shift"),
        )
        return (self.product(terms),)


def _first(tensor: Tensor | None, default: Tensor) -> Tensor:
    """Return the tensor, or the default where there is none."""
    return default if tensor is None else tensor
