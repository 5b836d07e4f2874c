"""Swaps a named module for another one."""

from torch import nn


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of `root.<name>`.

    Args:
        root: the model or block.
        name: dotted path below it; its parent exists.
        module: the newcomer.
    """
    parent_name, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent_name), child, module)
