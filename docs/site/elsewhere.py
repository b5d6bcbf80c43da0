"""Names of torch and Python in signatures, as their own documentation calls them.

`torch.inv` and `python.inv` beside this file list those that occur, with their pages: a build needs no
network. A name that is missing there is a warning, and a line to be added; `make docs-links` finds out
whether the pages are there.
"""

from typing import Any

from docutils import nodes

# By where they are implemented, which is what a signature has.
PUBLIC = {
    "torch.amp.grad_scaler.GradScaler": "torch.amp.GradScaler",
    "torch.nn.modules.linear.Linear": "torch.nn.Linear",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "torch.utils.data.dataloader.DataLoader": "torch.utils.data.DataLoader",
    "torch.utils.data.dataset.Dataset": "torch.utils.data.Dataset",
}


def rename(app: Any, env: Any, link: nodes.Element, text: nodes.Element) -> None:
    """Have a link look for the public name; who resolves it comes after this."""
    link["reftarget"] = PUBLIC.get(link["reftarget"], link["reftarget"])


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("missing-reference", rename, priority=100)
    return {"parallel_read_safe": True}
